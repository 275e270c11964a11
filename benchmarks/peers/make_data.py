"""The data of `data_peers.py`, made once from `../shared/data`: the same files for every contestant.

    python benchmarks/peers/make_data.py FOLDER [--text_megabytes 120] [--image_gigabytes 2.2] [--copies 4]

tars/text    documents of sentences and speeches in a new order, 1,600 bytes in the median (log-normal)
tars/image   JPEG, 256 x 256, quality 90, about 24 kB: enlarged photos of CIFAR-10 with detail and noise; 3,000 distinct
tars/ogg     5 s at 44.1 kHz mono: clips of ESC-10, mixed in pairs; 600 distinct, `copies` of each
tars/flac    the same clips
tokenizer.json, a byte-level BPE of 32,000
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import PROJECT, command

SHARED = PROJECT.parent / "shared" / "data"
IMAGES, CLIPS = 3000, 600  # distinct


def documents(size: int) -> Iterator[str]:
    """`size` bytes of texts. A few words are replaced, so that documents share no long passages and have rare words."""
    random = np.random.default_rng(0)
    prose, plays = ((SHARED / name).read_text() for name in ("wikitext2/valid.txt", "tinyshakespeare/input.txt"))
    reviews = (SHARED / "sst2" / "train.tsv").read_text() + (SHARED / "sent-conv" / "subj.all").read_text(errors="replace")
    parts = [
        [line.strip() for line in prose.split("\n") if len(line) > 40],
        [part.strip() for part in plays.split("\n\n") if part.strip()],
        [re.sub(r"^\d\s|\s\d$", "", line).strip() for line in reviews.split("\n") if line.strip()],
    ]
    words = np.array(sorted({word for lines in parts for line in lines for word in line.split()}))
    while size > 0:
        wanted = min(60_000, int(random.lognormal(np.log(1600), 0.9)) + 20)
        lines = parts[int(random.integers(3))]
        text = ""
        while len(text) < wanted:
            line = lines[int(random.integers(len(lines)))].split(" ")
            replaced = random.random(len(line)) < 0.08
            text += (
                " ".join(str(random.choice(words)) if new else word for word, new in zip(line, replaced, strict=True)) + "\n"
            )
        text = text[: wanted + 40]
        size -= len(text.encode())
        yield text


def photos() -> Iterator[bytes]:
    from PIL import Image

    random = np.random.default_rng(0)
    with tarfile.open(SHARED / "cifar10-subset.tar") as tar:
        members = [member for member in tar if member.isfile() and "/train/" in member.name]
        for member in members[:: len(members) // IMAGES][:IMAGES]:
            photo = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
            fine = Image.fromarray(random.integers(0, 256, (128, 128), np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
            pixels = np.asarray(photo.resize((256, 256), Image.Resampling.BICUBIC), np.float32)
            detail = (np.asarray(fine, np.float32)[..., None] - 128) / 10 + random.normal(0, 5, pixels.shape)
            file = io.BytesIO()
            Image.fromarray(np.clip(pixels + detail, 0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
            yield file.getvalue()


def clips() -> Iterator[np.ndarray]:
    """(220500,) float32 each."""
    import soundfile

    random = np.random.default_rng(0)
    sounds = [np.resize(soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1), 220_500)
              for path in sorted((SHARED / "esc10").glob("*/*.ogg"))]  # fmt: skip
    for _ in range(CLIPS):
        one, other = (sounds[i] for i in random.integers(len(sounds), size=2))
        mixed = random.uniform(0.4, 0.8) * one + 0.2 * np.roll(other, int(random.integers(len(other))))
        yield np.clip(mixed + random.normal(0, 1e-3, len(mixed)), -1, 1)  # no digital silence


def encode(waveform: np.ndarray, kind: str, subtype: str) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, waveform, 44_100, format=kind, subtype=subtype)
    return file.getvalue()


def write_tars(folder: Path, extension: str, files: Iterable[bytes], megabytes: int) -> None:
    import webdataset

    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxsize=megabytes << 20, encoder=False, mtime=0, verbose=0) as writer:
        for n, data in enumerate(files):
            writer.write({"__key__": f"{n:08d}", extension: data})


def main(folder: Path, text_megabytes: float = 120, image_gigabytes: float = 2.2, copies: int = 4) -> None:
    from pile_app.data.tokenizers import train_tokenizer

    if (folder / "complete").exists():
        return
    texts = list(documents(int(text_megabytes * 1e6)))
    write_tars(folder / "tars" / "text", "txt", (text.encode() for text in texts), 8)
    train_tokenizer(texts[:: max(1, len(texts) // 10_000)], "bpe", 32_000, folder / "tokenizer.json")
    jpegs = list(photos())
    image_copies = max(1, round(image_gigabytes * 1e9 / sum(map(len, jpegs))))
    write_tars(folder / "tars" / "image", "jpg", (jpeg for _ in range(image_copies) for jpeg in jpegs), 64)
    waveforms = list(clips())
    for kind, subtype, megabytes in (("ogg", "VORBIS", 16), ("flac", "PCM_16", 64)):
        files = [encode(waveform, kind.upper(), subtype) for waveform in waveforms]
        write_tars(folder / "tars" / kind, kind, (file for _ in range(copies) for file in files), megabytes)
    (folder / "complete").touch()


if __name__ == "__main__":
    command(main, __doc__)
