"""Shards of labelled data sets on this machine: writes files in a layout that `pile prepare` reads, then prepares them.

    python data/labelled/prepare.py SET [--data ../shared/data] [--folder data/labelled/shards]

| set       | what                                         | train / validation / test                                        |
|-----------|----------------------------------------------|------------------------------------------------------------------|
| sst2      | sentences of film reviews, positive or not   | as given: train.tsv, dev.tsv, test.tsv                           |
| trec      | questions, by what they ask for (TREC-6)     | TREC.train less a tenth drawn by hash; that tenth; TREC.test     |
| mnist     | handwritten digits, 28x28                    | 60,000 less a twentieth drawn by hash; that; the 10,000          |
| fsdd      | spoken digits, 8 kHz                         | three speakers less every tenth take; that; the fourth speaker   |
| esc10     | sounds of the environment, 5 s               | folds 1 and 2 less a tenth; that; fold 3                         |
| lexicon   | words, positive or not (VADER)               | all for training                                                 |
| sentences | texts without labels, to train a model first | those for training of sst2 and trec, and subj.all (films too)    |

Texts are lower-cased, as in SST-2. Sounds are mono, 8 kHz, of equal loudness (RMS) and without silence (ESC-10 pads short clips
to 5 s). `fsdd-jackson` is fsdd with that speaker in the test split. None of the data is part of the project.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pile_app.documents import Segment
from pile_app.media import decode_audio
from pile_app.prepare.pipeline import prepare

DEFAULT = Path("../shared/data")
RATE = 8000  # Hz
LOUDNESS = 0.1  # RMS of the loudest half second, of full scale
QUIET = 0.01  # of the power of the loudest 20 ms: quieter parts are removed, except for 40 ms around louder ones
SPEAKERS = ("yweweler", "jackson", "lucas", "nicolas")  # of fsdd: that of the test split, by default the first
QUESTIONS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


def make_sst2(data: Path, files: Path) -> dict[str, object]:
    for split in ("train", "dev", "test"):
        shutil.copy(data / "sst2" / f"{split}.tsv", files)
    return {"label_names": ["negative", "positive"]}


def make_trec(data: Path, files: Path) -> dict[str, object]:
    """`DESC:manner How did ...`: the coarse label is the part before the colon."""
    for split in ("train", "test"):
        with open(files / f"{split}.tsv", "w", encoding="utf-8", newline="") as table:
            print("label\ttext", file=table)
            for line in trec_lines(data, split):
                label, _, question = line.partition(" ")
                print(QUESTIONS[label.partition(":")[0]], question.strip().lower(), sep="\t", file=table)
    return {"validation_fraction": 0.1}


def make_mnist(data: Path, files: Path) -> dict[str, object]:
    for split, name in (("train", "train"), ("test", "t10k")):
        with gzip.open(data / "mnist" / f"{name}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(data / "mnist" / f"{name}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        folders = [files / split / str(digit) for digit in range(10)]
        for folder in folders:
            folder.mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            (folders[label] / f"{number:05d}.png").write_bytes(Segment.from_image(image).file)
    return {"label_from_folder": True, "validation_fraction": 0.05}


def make_fsdd(data: Path, files: Path, unseen: str = SPEAKERS[0]) -> dict[str, object]:
    for path in sorted((data / "fsdd" / "recordings").glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        split = "test" if speaker == unseen else "validation" if int(take) % 10 == 0 else "train"
        write_sound(path.read_bytes(), files / split / digit, path.stem)
    return {"label_from_folder": True}


def make_esc10(data: Path, files: Path) -> dict[str, object]:
    for path in sorted((data / "esc10").glob("*/*.ogg")):
        fold, recording, _ = path.stem.split("-")  # takes of one recording stay together
        split = "test" if fold == "3" else "validation" if zlib.crc32(recording.encode()) % 10 == 0 else "train"
        label = path.parent.name.partition(" - ")[2].lower()
        write_sound(path.read_bytes(), files / split / label, path.stem)
    return {"label_from_folder": True}


def make_lexicon(data: Path, files: Path) -> dict[str, object]:
    """Write the words of the VADER lexicon (Hutto and Gilbert 2014, MIT), labelled by the sign of their mean rating."""
    package = importlib.util.find_spec("vaderSentiment")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: the lexicon is in the package vaderSentiment: pip install --no-deps vaderSentiment")
    lines = (Path(package.submodule_search_locations[0]) / "vader_lexicon.txt").read_text("utf-8").splitlines()
    with open(files / "train.tsv", "w", encoding="utf-8") as table:
        print("text\tlabel", file=table)
        for line in lines:
            word, rating = line.split("\t")[:2]
            if word.isascii() and word.isalpha() and len(word) > 2 and abs(float(rating)) >= 0.5:
                print(word, "positive" if float(rating) > 0 else "negative", sep="\t", file=table)
    return {"validation_fraction": 0.0}


def make_sentences(data: Path, files: Path) -> dict[str, object]:
    """`decontaminate` drops texts that contain a part of an evaluation text."""
    lines = [line.rpartition("\t")[0] for line in (data / "sst2" / "train.tsv").read_text().splitlines()]
    for name in ("TREC.train", "subj.all"):
        lines += [line.partition(" ")[2].lower() for line in (data / "sent-conv" / name).read_text("latin-1").splitlines()]
    (files / "sentences.jsonl").write_text("".join(json.dumps({"text": line.strip()}) + "\n" for line in lines))
    questions = files.parent / "questions.tsv"
    questions.write_text("\n".join(line.partition(" ")[2].lower() for line in trec_lines(data, "test")))
    evaluation = [str(data / "sst2" / "dev.tsv"), str(data / "sst2" / "test.tsv"), str(questions)]
    return {"decontaminate": evaluation, "validation_fraction": 0.02, "exact_duplicates": True}


def trec_lines(data: Path, split: str) -> list[str]:
    return (data / "sent-conv" / f"TREC.{split}").read_text("latin-1").splitlines()


def write_sound(sound: bytes, folder: Path, key: str) -> None:
    """Write a sound without silence, at equal loudness."""
    waveform = without_silence(decode_audio(sound, RATE))
    folder.mkdir(parents=True, exist_ok=True)
    power = np.convolve(np.square(waveform, dtype=np.float64), np.ones(RATE // 2) / (RATE // 2), "same").max()
    loud = waveform * (LOUDNESS / max(power, 1e-12) ** 0.5)
    (folder / f"{key}.flac").write_bytes(Segment.from_audio(loud, RATE).file)


def without_silence(waveform: np.ndarray) -> np.ndarray:
    frames = np.pad(waveform, (0, -len(waveform) % (RATE // 50))).reshape(-1, RATE // 50)
    power = np.square(frames, dtype=np.float64).mean(1)
    return frames[np.convolve(power >= QUIET * power.max(), np.ones(5), "same") > 0].ravel()


SETS: dict[str, Callable[[Path, Path], dict[str, object]]] = {
    "sst2": make_sst2,
    "trec": make_trec,
    "mnist": make_mnist,
    "fsdd": make_fsdd,
    **{f"fsdd-{speaker}": partial(make_fsdd, unseen=speaker) for speaker in SPEAKERS[1:]},
    "esc10": make_esc10,
    "lexicon": make_lexicon,
    "sentences": make_sentences,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("set", choices=SETS, help="what to prepare")
    parser.add_argument("--data", type=Path, default=DEFAULT, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "shards", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        print(f"error: there is no folder {str(options.data)!r}: give that of the data sets with --data", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / options.set
        files.mkdir()
        steps = {"exact_duplicates": False} | SETS[options.set](options.data, files)
        prepare(files, options.folder / options.set, overwrite=True, **steps)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
