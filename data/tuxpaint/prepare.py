"""Makes shards of the stamps of Tux Paint: pictures with captions in three languages, captions spoken, and sounds of things.

    python data/tuxpaint/prepare.py [--stamps FOLDER] [--folder data/tuxpaint/shards]

The stamps (GPL-2) are not part of the project. `--stamps`, else the environment's `PILE_TUXPAINT`, names the folder whose
`index.jsonl` lists the captions and sounds of each picture; without either it is `../shared/data/tuxpaint-stamps`.

**Splits share no concept.** Stamps with the same caption in any language, apart from case and article, or with similar pictures
(also mirrored or in other colours) are the same concept, and a concept is never split: a tenth goes to validation (to choose
the checkpoint), a fifth to test (to report), the rest to training. Letters and coins that look alike may be in several splits:
their concepts differ.

A training document is a picture, a caption and a sound, in `VARIANTS` versions of each stamp: the caption in English, French,
Spanish, or in English with the names of its folders; the picture shifted, scaled, rotated, mirrored (except symbols, which
would change), on a white or coloured background; the caption spoken, or the sound of the thing, at another speed. A
document of validation or test is the unchanged picture on white, with its English caption and its spoken French one.

`meta.group` of a document is its English caption: documents with the same caption are right answers to each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pile_app.data.shards import write_shards
from pile_app.documents import BadSample, Document, Segment
from pile_app.media import decode_audio

DEFAULT = "../shared/data/tuxpaint-stamps"
SPLITS = {"test": 0.2, "validation": 0.1}  # fractions of the stamps; the rest is for training
VARIANTS = 8
SIZE = 32  # pixels a side in training
SAMPLE_RATE = 8000  # Hz
SECONDS = 6.0  # of a sound, at most
ALIKE = 0.97  # correlation of two pictures, 12 x 12 and grey, from which on they are one concept
ARTICLES = re.compile(r"^(an?|the|some|une?|des|les?|la|l'|los|las|el|unos|unas) ?\b")

Stamp = dict[str, Any]  # a line of index.jsonl, with its picture


def read_stamps(folder: Path) -> list[Stamp]:
    stamps = [json.loads(line) for line in (folder / "index.jsonl").read_text("utf-8").splitlines()]
    for stamp in stamps:
        with Image.open(folder / stamp["image"]) as file:
            stamp["picture"] = squared(file.convert("RGBA"))
    return stamps


def squared(picture: Image.Image) -> Image.Image:
    """Centre the picture on a transparent square of at most 128 pixels."""
    picture.thumbnail((128, 128), Image.Resampling.LANCZOS)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def on_ground(picture: Image.Image, color: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert to RGB on a background of this color."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*color, 255)), picture).convert("RGB")


def concepts(stamps: Sequence[Stamp]) -> list[int]:
    """Return the concept of each stamp, as the index of a stamp with the same concept."""
    parents = list(range(len(stamps)))

    def find(stamp: int) -> int:
        while parents[stamp] != stamp:
            parents[stamp] = stamp = parents[parents[stamp]]
        return stamp

    first: dict[str, int] = {}
    for number, stamp in enumerate(stamps):
        for language in ("caption", "caption_fr", "caption_es"):
            if words := normalized(stamp.get(language, "")):
                parents[find(number)] = find(first.setdefault(f"{language} {words}", number))
    pictures = np.stack([np.asarray(on_ground(s["picture"]).convert("L").resize((12, 12)), np.float32) for s in stamps])

    def standard(pixels: np.ndarray) -> np.ndarray:
        flat = pixels.reshape(len(pixels), -1)
        flat = flat - flat.mean(1, keepdims=True)
        return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-3)

    one, mirrored = standard(pictures), standard(pictures[:, :, ::-1])
    for a, b in np.argwhere((abs(one @ one.T) > ALIKE) | (abs(one @ mirrored.T) > ALIKE)).tolist():
        parents[find(a)] = find(b)
    return [find(number) for number in range(len(stamps))]


def normalized(caption: str) -> str:
    """Remove case, article and punctuation: `A frog.` and `The frog!` are equal."""
    plain = unicodedata.normalize("NFKC", caption).casefold().replace("\u2019", "'").strip(" .!?")
    return ARTICLES.sub("", plain).strip()


def split(of_concept: Sequence[int], seed: int) -> list[str]:
    """Return the split of each stamp: whole concepts in a random order, until a split has its fraction."""
    members = defaultdict(list)
    for number, concept in enumerate(of_concept):
        members[concept].append(number)
    order = [members[concept] for concept in sorted(members)]
    order = [order[index] for index in np.random.default_rng(seed).permutation(len(order))]
    splits = ["train"] * len(of_concept)
    fractions = iter(SPLITS.items())
    name, fraction = next(fractions)
    count = 0
    for alike in order:
        if len(alike) > max(4, 0.01 * len(of_concept)):
            continue  # a large concept (tombstones, for example) would dominate a held-out split
        for number in alike:
            splits[number] = name
        count += len(alike)
        if count >= fraction * len(of_concept):
            try:
                name, fraction = next(fractions)
            except StopIteration:
                break
            count = 0
    return splits


def varied(picture: Image.Image, mirror: bool, rng: np.random.Generator) -> Image.Image:
    """Shift, scale, rotate and perhaps mirror a picture, on a white or coloured background of `SIZE` pixels."""
    if mirror and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    side = round(SIZE * rng.uniform(0.75, 1.1))
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    left, top = (round((SIZE - side) / 2 + rng.uniform(-3, 3)) for _ in range(2))
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(picture, (left, top))
    ground = (255, 255, 255) if rng.random() < 0.6 else tuple(rng.integers(120, 256, 3).tolist())
    light = rng.uniform(0.85, 1.15)
    return Image.eval(on_ground(square, ground), lambda value: min(255, round(value * light)))


def sound(file: Path, rng: np.random.Generator | None = None) -> Segment | None:
    """Trim silence, normalize loudness, cut to `SECONDS`, with `rng` change the speed; returns None for a silent sound."""
    try:
        waveform = decode_audio(file.read_bytes(), SAMPLE_RATE)
    except BadSample as error:
        print(f"skipped {file}: {error}")
        return None
    loud = np.flatnonzero(abs(waveform) > 0.02 * abs(waveform).max())
    waveform = waveform[loud[0] : loud[-1] + 1]
    if rng is not None:
        times = np.arange(0, len(waveform) - 1, rng.uniform(0.88, 1.12))
        waveform = np.interp(times, np.arange(len(waveform)), waveform)
    waveform = waveform[: int(SECONDS * SAMPLE_RATE)]
    return Segment.from_audio(0.7 * waveform / abs(waveform).max(), SAMPLE_RATE)


def documents(stamps: Sequence[Stamp], folder: Path, is_training: bool, seed: int) -> Iterator[Document]:
    """Return the documents with versions of a stamp far apart, so that few are in the same step."""
    for variant in range(VARIANTS if is_training else 1):
        for number, stamp in enumerate(stamps):
            rng = np.random.default_rng([seed, variant, number])
            spoken = stamp.get("speech_fr")
            if is_training:
                texts = [stamp["caption"], stamp["caption_fr"], stamp.get("caption_es") or stamp["caption"]]
                texts.append(f"{stamp['caption']} {' '.join(Path(stamp['image']).parts[:-1])}")
                text = texts[variant % len(texts)]
                picture = varied(stamp["picture"], stamp["category"] != "symbols", rng)
                others = [stamp[name] for name in ("effect", "speech_en") if name in stamp]
                if others and variant % 4 == 3:
                    spoken = others[variant // 4 % len(others)]
            else:
                text, picture = stamp["caption"], on_ground(stamp["picture"])
            segments = [Segment.from_image(np.asarray(picture)), Segment(text)]
            if spoken and (clip := sound(folder / spoken, rng if is_training else None)):
                segments.append(clip)
            name = stamp["image"].removesuffix(".png").replace(".", "_")
            meta = {"concept": stamp["caption"], "category": stamp["category"]}
            yield Document(tuple(segments), f"{name}-{variant}" if is_training else name, False, meta)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stamps", type=Path, default=os.environ.get("PILE_TUXPAINT", DEFAULT), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "shards", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of split and variations")
    options = parser.parse_args(arguments)
    if not (options.stamps / "index.jsonl").is_file():
        print(
            f"error: there is no {str(options.stamps / 'index.jsonl')!r} (from {os.getcwd()}). Give the folder of the stamps "
            "with --stamps, or in the environment's PILE_TUXPAINT",
            file=sys.stderr,
        )
        return 1
    stamps = read_stamps(options.stamps)
    of_concept = concepts(stamps)
    splits = split(of_concept, options.seed)
    print(f"{len(stamps)} stamps of {len(set(of_concept))} concepts")
    for name in ("train", *SPLITS):
        some = [stamp for stamp, of in zip(stamps, splits, strict=True) if of == name]
        written = write_shards(documents(some, options.stamps, name == "train", options.seed), options.folder, name)
        print(f"{name}: {len(some)} stamps, {len(written):,} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
