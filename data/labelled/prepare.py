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
to 5 s). Training sounds come in several speeds, by resampling as in Kaldi (Ko et al. 2015), which changes the pitch and the
apparent length of the vocal tract like another speaker, and with bass and treble changed like another microphone. None of the
data is part of the project.
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
from pathlib import Path

import numpy as np

from pile_app.documents import Segment
from pile_app.media import decode_audio
from pile_app.prepare.pipeline import prepare

DEFAULT = Path("../shared/data")
RATE = 8000  # Hz
LOUDNESS = 0.1  # RMS of the loudest half second, of full scale
QUIET = 0.01  # of the power of the loudest 20 ms: quieter parts are removed, except for 40 ms around louder ones
UNSEEN_SPEAKER = "yweweler"  # of fsdd: only in the test split
TONE = 10.0  # dB
SPEEDS = {"fsdd": (0.8, 0.87, 0.93, 1.07, 1.15, 1.25), "esc10": (0.85, 0.92, 1.08, 1.17)}  # besides 1
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


def make_fsdd(data: Path, files: Path) -> dict[str, object]:
    for path in sorted((data / "fsdd" / "recordings").glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        split = "test" if speaker == UNSEEN_SPEAKER else "validation" if int(take) % 10 == 0 else "train"
        write_sound(path.read_bytes(), files / split / digit, path.stem, SPEEDS["fsdd"] if split == "train" else ())
    return {"label_from_folder": True}


def make_esc10(data: Path, files: Path) -> dict[str, object]:
    for path in sorted((data / "esc10").glob("*/*.ogg")):
        fold, recording, _ = path.stem.split("-")  # takes of one recording stay together
        split = "test" if fold == "3" else "validation" if zlib.crc32(recording.encode()) % 10 == 0 else "train"
        label = path.parent.name.partition(" - ")[2].lower()
        write_sound(path.read_bytes(), files / split / label, path.stem, SPEEDS["esc10"] if split == "train" else ())
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


def write_sound(sound: bytes, folder: Path, key: str, speeds: Sequence[float]) -> None:
    """Write a sound at its own and at other speeds (2: twice as fast, an octave higher), without silence, at equal loudness."""
    waveform = without_silence(decode_audio(sound, RATE))
    folder.mkdir(parents=True, exist_ok=True)
    for speed in (1.0, *speeds):
        other = waveform if speed == 1 else other_tone(resample(waveform, round(RATE * speed / 10) * 10), f"{key}{speed}")
        power = np.convolve(np.square(other, dtype=np.float64), np.ones(RATE // 2) / (RATE // 2), "same").max()
        loud = other * (LOUDNESS / max(power, 1e-12) ** 0.5)
        name = f"{key}{'' if speed == 1 else f'-{speed}'}.flac"
        (folder / name).write_bytes(Segment.from_audio(loud, RATE).file)


def without_silence(waveform: np.ndarray) -> np.ndarray:
    frames = np.pad(waveform, (0, -len(waveform) % (RATE // 50))).reshape(-1, RATE // 50)
    power = np.square(frames, dtype=np.float64).mean(1)
    return frames[np.convolve(power >= QUIET * power.max(), np.ones(5), "same") > 0].ravel()


def other_tone(waveform: np.ndarray, key: str) -> np.ndarray:
    """Raise or lower bass and treble by up to `TONE` each, at random with the key as seed."""
    import torch
    from torchaudio.functional import bass_biquad, treble_biquad

    low, high = np.random.default_rng(zlib.crc32(key.encode())).uniform(-TONE, TONE, 2).tolist()
    return treble_biquad(bass_biquad(torch.from_numpy(waveform), RATE, low, 400.0), RATE, high, 1500.0).numpy()


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Resample a waveform as if recorded at `rate`: shorter and higher if that is above 8 kHz."""
    import torch
    from torchaudio.functional import resample

    return resample(torch.from_numpy(waveform), rate, RATE).numpy()


SETS: dict[str, Callable[[Path, Path], dict[str, object]]] = {
    "sst2": make_sst2,
    "trec": make_trec,
    "mnist": make_mnist,
    "fsdd": make_fsdd,
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
