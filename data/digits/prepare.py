"""Makes the data of the demo: handwritten digits, spoken digits, written digits, and prose.

    python data/digits/prepare.py [--folder data/digits/shards] [--seed 0]

Nothing is fetched. The images are scikit-learn's `load_digits` (1,797 handwritten digits), the sounds are spoken by espeak-ng
in over ninety voices, the prose comes with Python: the help topics of `pydoc` and the docstrings of the standard
library, without the rules under headings. Ten sets of shards are written:

    digits-train       documents that show a digit as image, sound and name, or some of these, in the orders of `SHARES`
    digits-validation  the same from images and voices that appear in no training document
    labelled-train     every plain training image and every training clip once, followed by its name
    labelled-heldout   every held-out image and every held-out clip once, followed by its name
    prose-train        a help topic, or the docstrings of a module, a document
    prose-validation   documents of the same kind, chosen by the hash of their text
    images-train       an image a document and nothing else, for models of images alone; augmented like those of digits-train
    images-validation  every held-out image once
    clips-train        a clip a document and nothing else, for models of sound alone
    clips-validation   held-out clips

Images are 16 by 16 grey PNG, white on black; clips are 8 kHz mono FLAC of 0.15 to 1 s. With the same seed and the same versions
of the packages (`dataset.json` lists them), every byte of every shard is the same.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pile_app.documents import Document, Segment

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the repository

from data.recipe import counts, deal, finished, package_versions, recipe_command, timed, write_whole
from data.speech import INSTALL, Espeak, level, trim

VERSION = 6  # of this recipe: raise it when the bytes of the shards change
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PACKAGES = ("scikit-learn", "espeakng-loader", "numpy", "pillow", "torch", "torchaudio", "soundfile", "webdataset")

# The segments of a document, in order, and the fraction of the documents.
SHARES: dict[tuple[str, ...], float] = {
    ("name", "image"): 0.14,
    ("name", "audio"): 0.15,
    ("image", "name"): 0.14,
    ("audio", "name"): 0.13,
    ("image", "audio"): 0.22,
    ("audio", "image"): 0.04,
    ("name", "image", "audio"): 0.10 / 6,
    ("name", "audio", "image"): 0.10 / 6,
    ("image", "name", "audio"): 0.10 / 6,
    ("image", "audio", "name"): 0.10 / 6,
    ("audio", "name", "image"): 0.10 / 6,
    ("audio", "image", "name"): 0.10 / 6,
    ("image",): 0.02,
    ("audio",): 0.03,
    ("name",): 0.03,
}
TRAIN_DOCUMENTS = 30_000
VALIDATION_DOCUMENTS = 300
IMAGE_DOCUMENTS = 6_000  # of images-train

IMAGE_SIZE = 16
HELD_OUT_IMAGES = 297
AUGMENTED = 0.95  # fraction of the uses of an image or a clip in training documents

SAMPLE_RATE = 8_000
SECONDS = (0.15, 1.0)  # a clip outside of this is rejected
ACCENTS = ("en", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-us", "en-us-nyc")
# A voice is a variant of espeak-ng, which speaks any accent. These three women and three men speak in no training clip. They
# were chosen because they are intelligible and unlike every other variant (klatt6 and adam are nearly the same voice).
HELD_OUT_VOICES = ("Annie", "f1", "linda", "m2", "norbert", "pablo")
# Unvoiced, unlike any human, or confused most by a classifier that was trained on all other voices.
EXCLUDED_VOICES = ("Alicia", "Demonic", "Mr serious", "shelby", "whisper", "whisperf", "zac")
TRAIN_CLIPS_A_VOICE = 5  # of each digit, each in another accent
HELD_OUT_CLIPS_A_VOICE = 5
ATTEMPTS = 5  # to say a digit within SECONDS, each with a new rate and pitch

HELD_OUT_PROSE = 0.1  # of the documents, drawn by the hash of their text
MAX_HELD_OUT_CHARACTERS = (
    20_000  # longer documents are used for training: `_pydecimal` alone would be half of the held-out prose
)
MIN_PROSE_CHARACTERS = 200
RULE = re.compile(r"^[ \t]*([^\w\s])\1{3,}[ \t]*\n", re.MULTILINE)  # "*****" under a heading, which a model would repeat
SHARED_PARAGRAPH = 100  # characters: longer paragraphs of the held-out prose are removed from the training prose
EXCLUDED_MODULES = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data"),
    *("ensurepip", "encodings", "__pycache__"),
}


@dataclass(frozen=True)
class Picture:
    """A handwritten digit: `pixels` (16, 16) uint8; `number` is its row in `load_digits`."""

    digit: int
    number: int
    pixels: np.ndarray
    segment: Segment


@dataclass(frozen=True)
class Clip:
    """A spoken digit: `waveform` (samples,) float32; the voice decides whether it is held out."""

    digit: int
    voice: str
    accent: str
    waveform: np.ndarray
    segment: Segment


def prepare(folder: Path, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write all shards to `folder` atomically and return the content of its `dataset.json`. A complete folder is not changed.

    Raises:
        FileExistsError: the folder holds something else, or the data of another seed or version of this recipe.
        RuntimeError: scikit-learn or espeak-ng is missing or fails.
    """
    if (done := finished(folder, VERSION, seed, report)) is not None:
        return done
    progress = timed(report)

    pictures, held_out_pictures = handwritten_digits(seed)
    progress(f"{len(pictures):,} training images, {len(held_out_pictures):,} held out")
    clips, held_out_clips, rejected = spoken_digits(seed)
    progress(f"{len(clips):,} training clips, {len(held_out_clips):,} held out, {sum(rejected.values()):,} rejected")
    prose, held_out_prose, prose_rejected = prose_documents()
    rejected += prose_rejected
    progress(f"{len(prose):,} training documents of prose, {len(held_out_prose):,} held out")

    sources: dict[str, list[Document]] = {
        "digits-train": digit_documents(TRAIN_DOCUMENTS, pictures, clips, seed, AUGMENTED),
        "digits-validation": digit_documents(VALIDATION_DOCUMENTS, held_out_pictures, held_out_clips, seed, 0.0),
        "labelled-train": labelled_documents(pictures, clips),
        "labelled-heldout": labelled_documents(held_out_pictures, held_out_clips),
        "prose-train": prose,
        "prose-validation": held_out_prose,
    }
    for kind, name, count, held_out_count in (
        ("image", "images", IMAGE_DOCUMENTS, len(held_out_pictures)),
        ("audio", "clips", len(clips), len(held_out_clips)),
    ):
        alone: dict[tuple[str, ...], float] = {(kind,): 1.0}
        sources[f"{name}-train"] = digit_documents(count, pictures, clips, seed, AUGMENTED, alone, name)
        sources[f"{name}-validation"] = digit_documents(
            held_out_count, held_out_pictures, held_out_clips, seed, 0.0, alone, name
        )
    summary: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        "documents": {prefix: len(documents) for prefix, documents in sources.items()},
        "images": {"train": len(pictures), "heldout": len(held_out_pictures)},
        "clips": {"train": len(clips), "heldout": len(held_out_clips)},
        "sound_hours": {"train": _hours(clips), "heldout": _hours(held_out_clips)},
        "voices": {"train": sorted({clip.voice for clip in clips}), "heldout": sorted({clip.voice for clip in held_out_clips})},
        "prose_bytes": {"train": _text_bytes(prose), "heldout": _text_bytes(held_out_prose)},
        "rejected": dict(sorted(rejected.items())),
        "packages": package_versions(*PACKAGES),
    }
    write_whole(folder, sources, summary, progress)
    progress(f"{folder} is complete")
    return summary


# Images


def handwritten_digits(seed: int) -> tuple[list[Picture], list[Picture]]:
    """Return (training, held-out) pictures; `HELD_OUT_IMAGES` are held out, about equally many of each digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(f"the handwritten digits come with scikit-learn, which is missing ({error}): {INSTALL}") from error
    images, targets = load_digits(return_X_y=True)
    levels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rng = np.random.default_rng([seed, 1])
    held_out: set[int] = set()
    for digit, share in enumerate(np.array_split(np.arange(HELD_OUT_IMAGES), len(DIGITS))):
        held_out.update(rng.permutation(np.flatnonzero(targets == digit))[: len(share)].tolist())
    pictures: tuple[list[Picture], list[Picture]] = [], []
    for number, (small, digit) in enumerate(zip(levels, targets.tolist(), strict=True)):
        pixels = np.asarray(Image.fromarray(small).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        pictures[number in held_out].append(Picture(digit, number, pixels, Segment.from_image(pixels)))
    return pictures


def augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Augment `pixels` (16, 16): rotate by up to 12 degrees, shear by up to 0.15, scale by 0.85 to 1.1, shift up to a pixel."""
    angle, shear, scale = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.1)
    centre = IMAGE_SIZE / 2
    goal = centre + rng.uniform(-1, 1, size=2)  # where the centre goes
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    # Pillow wants the inverse: the position in the input of each output pixel.
    back = turn @ np.array([[1.0, shear], [0.0, 1.0]]) / scale
    offset = centre - back @ goal
    matrix = (*back[0], offset[0], *back[1], offset[1])
    image = Image.fromarray(pixels)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


# Sound


def spoken_digits(
    seed: int, train_clips: int = TRAIN_CLIPS_A_VOICE, held_out_clips: int = HELD_OUT_CLIPS_A_VOICE
) -> tuple[list[Clip], list[Clip], Counter[str]]:
    """Return (training clips, held-out clips, rejections by reason), with this many clips of each digit by each voice."""
    from torch import from_numpy
    from torchaudio.transforms import Resample

    rng = np.random.default_rng([seed, 2])
    rejected: Counter[str] = Counter()
    clips: dict[bool, list[Clip]] = {False: [], True: []}
    with Espeak() as espeak:
        if missing := set(HELD_OUT_VOICES).difference(espeak.voices):
            raise RuntimeError(f"this espeak-ng lacks the voices {sorted(missing)}: {INSTALL}")
        resample = Resample(espeak.sample_rate, SAMPLE_RATE)
        for voice in espeak.voices:
            if voice in EXCLUDED_VOICES:
                continue
            held_out = voice in HELD_OUT_VOICES
            for accent in rng.permutation(ACCENTS)[: held_out_clips if held_out else train_clips].tolist():
                for digit, name in enumerate(DIGITS):
                    for _ in range(ATTEMPTS):
                        rate, pitch, pitch_range = rng.integers((130, 30, 30), (201, 71, 71)).tolist()
                        samples = espeak.say(name, accent, voice, rate, pitch, pitch_range)
                        waveform = level(trim(resample(from_numpy(samples)).numpy(), SAMPLE_RATE))
                        seconds = len(waveform) / SAMPLE_RATE
                        if SECONDS[0] <= seconds <= SECONDS[1]:
                            segment = Segment.from_audio(waveform, SAMPLE_RATE)
                            clips[held_out].append(Clip(digit, voice, accent, waveform, segment))
                            break
                        rejected["clip_too_short" if seconds < SECONDS[0] else "clip_too_long"] += 1
    return clips[False], clips[True], rejected


# Documents


def vary(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Augment a clip: 12 % slower and deeper to 12 % faster and higher, with up to 20 ms of silence at either end.

    This imitates other vocal tracts; without it, a model memorizes the training voices and fails on new ones.
    """
    times = np.arange(0, len(waveform) - 1, rng.uniform(0.88, 1.12))
    before, after = rng.integers(0, SAMPLE_RATE // 50, size=2)
    return np.pad(np.interp(times, np.arange(len(waveform)), waveform), (before, after)).astype(np.float32)


def digit_documents(
    count: int,
    pictures: Sequence[Picture],
    clips: Sequence[Clip],
    seed: int,
    augmented: float,
    fractions: Mapping[tuple[str, ...], float] = SHARES,
    prefix: str = "digits",
) -> list[Document]:
    """Return `count` documents in these fractions, with every digit, picture and clip about equally often.

    The fraction `augmented` of the uses of a picture or clip is augmented. Keys begin with `prefix`.
    """
    rng = np.random.default_rng([seed, 3])
    picture_decks = _decks(pictures, rng)
    clip_decks = _decks(clips, rng)

    def segment(kind: str, digit: int) -> Segment:
        if kind == "name":
            return Segment(DIGITS[digit])
        medium = next((clip_decks if kind == "audio" else picture_decks)[digit])
        if rng.random() >= augmented:
            return medium.segment
        if kind == "audio":
            return Segment.from_audio(vary(medium.waveform, rng), SAMPLE_RATE)
        return Segment.from_image(augment(medium.pixels, rng))

    orders = [order for order, times in zip(fractions, counts(fractions, count), strict=True) for _ in range(times)]
    # Assigning the digits in turn before shuffling balances them within each order, too.
    plan = [(order, number % len(DIGITS)) for number, order in enumerate(orders)]
    documents = []
    for number, index in enumerate(rng.permutation(len(plan)).tolist()):
        order, digit = plan[index]
        segments = tuple(segment(kind, digit) for kind in order)
        documents.append(Document(segments, key=f"{prefix}-{number:06d}", meta={"label": DIGITS[digit]}))
    return documents


def _decks(media: Sequence[Any], rng: np.random.Generator) -> dict[int, Iterator[Any]]:
    """Deal the media of each digit without end."""
    of_digit: dict[int, list[Any]] = defaultdict(list)
    for medium in media:
        of_digit[medium.digit].append(medium)
    return {digit: deal(cards, rng) for digit, cards in of_digit.items()}


def labelled_documents(pictures: Sequence[Picture], clips: Sequence[Clip]) -> list[Document]:
    """Return every picture and every clip once, followed by its name, to measure classification."""
    media: list[tuple[Segment, int, str, dict[str, str]]] = [
        (one.segment, one.digit, f"image-{one.number:04d}", {}) for one in pictures
    ]
    for clip in clips:
        key = f"clip-{clip.voice}-{clip.accent}-{DIGITS[clip.digit]}"
        media.append((clip.segment, clip.digit, key, {"voice": clip.voice, "accent": clip.accent}))
    return [
        Document((medium, Segment(DIGITS[digit])), key=key, meta={"label": DIGITS[digit]} | meta)
        for medium, digit, key, meta in media
    ]


# Prose


def prose_documents() -> tuple[list[Document], list[Document], Counter[str]]:
    """Return (training, held-out) help topics and docstrings of the standard library, and the rejections by reason."""
    from pydoc_data.topics import topics

    rejected: Counter[str] = Counter()
    texts: dict[str, str] = {}  # text -> key
    named = {f"topic-{name}": text.strip() for name, text in sorted(topics.items())}
    for key, text in (named | _docstrings_of_modules(Path(sysconfig.get_paths()["stdlib"]))).items():
        if len(text) < MIN_PROSE_CHARACTERS:
            rejected["prose_too_short"] += 1
        elif text in texts:
            rejected["prose_duplicate"] += 1
        else:
            texts[text] = key
    held_out = {
        text: key
        for text, key in texts.items()
        if len(text) <= MAX_HELD_OUT_CHARACTERS and _hash_fraction(text) < HELD_OUT_PROSE
    }
    seen = {_words(paragraph) for text in held_out for paragraph in text.split("\n\n")}
    train: dict[str, str] = {}
    for text, key in texts.items():
        if text in held_out:
            continue
        paragraphs = text.split("\n\n")
        kept = [one for one in paragraphs if len(one) < SHARED_PARAGRAPH or _words(one) not in seen]
        rejected["prose_paragraph_of_heldout"] += len(paragraphs) - len(kept)
        if remainder := "\n\n".join(kept).strip():
            train[remainder] = key
    return _named_texts(train), _named_texts(held_out), rejected


def _named_texts(keys: Mapping[str, str]) -> list[Document]:
    return [Document((Segment(RULE.sub("", text)),), key=key, meta={"name": key}) for text, key in keys.items()]


def _docstrings_of_modules(root: Path) -> dict[str, str]:
    """Return the docstrings of each module below `root` in the order of the file. Nothing is imported."""
    texts = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if EXCLUDED_MODULES.intersection(parts) or not all(part.isidentifier() for part in parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in string literals
            tree = ast.parse(path.read_bytes(), str(path))
        texts["module-" + "-".join(parts)] = "\n\n".join(_docstrings(tree)).strip()
    return texts


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield inspect.cleandoc(docstring)
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _docstrings(child)


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _hash_fraction(text: str) -> float:
    """Return a number from 0 to 1, the same for the same text on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


# The summary


def _hours(clips: Sequence[Clip]) -> float:
    return round(sum(len(clip.waveform) for clip in clips) / SAMPLE_RATE / 3600, 4)


def _text_bytes(documents: Sequence[Document]) -> int:
    return sum(len(segment.text.encode()) for document in documents for segment in document.segments)


def main(arguments: Sequence[str] | None = None) -> int:
    shown = ("documents", "images", "clips", "sound_hours", "prose_bytes", "rejected")
    return recipe_command(prepare, __doc__, Path(__file__).parent / "shards", shown, arguments)


if __name__ == "__main__":
    sys.exit(main())
