"""Public data sets in miniature: each function writes a layout exactly as it is published, and returns the expected documents.

`@layout(name, **options)` registers a function that writes files to a folder and returns the expected result of `pile prepare`,
an `Expected`. `options` are those of `prepare`; without options, the layout must be recognized without help.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml
import zstandard
from PIL import Image

from pile_app.data.shards import Shards
from pile_app.documents import Document, Segment

NAMES: dict[bytes, str] = {}  # of the media made here, for messages


@cache
def picture(number: int, extension: str = "jpg", size: tuple[int, int] = (12, 8)) -> bytes:
    """The n-th picture, in colors of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "jpeg", "jfif": "jpeg", "jpe": "jpeg", "tif": "tiff"}.get(extension, extension))
    NAMES.setdefault(file.getvalue(), f"<{extension} {number}>")
    return file.getvalue()


@cache
def sound(number: int, extension: str = "wav", rate: int = 16_000, seconds: float = 0.15) -> bytes:
    """The n-th tone."""
    wave = 0.5 * np.sin((number + 1) * np.arange(int(rate * seconds)) / 30)
    file = io.BytesIO()
    container, subtype = {"opus": ("OGG", "OPUS"), "ogg": ("OGG", "VORBIS")}.get(extension, (extension.upper(), None))
    soundfile.write(file, wave, rate, subtype, format=container)
    NAMES.setdefault(file.getvalue(), f"<{extension} {number}>")
    return file.getvalue()


def printed_options(output: str) -> dict[str, Any]:
    """The options of the commands that `pile prepare` printed, by their names; values as YAML has them."""
    words = shlex.split(output)
    return {word: yaml.safe_load(value) for word, value in pairwise(words) if word.startswith("--")}


# -- documents, expected and read


class Given(str):
    """A text without loss."""


class Choices(tuple[str, ...]):
    """Alternative texts: training draws one for each epoch."""


@dataclass(frozen=True)
class Doc:
    """A document as tests compare it. segments: media as bytes, texts as str, `Given` or `Choices`."""

    segments: tuple[Any, ...]
    label: str | None = None
    group: str | None = None
    spans: tuple[tuple[int, int, str], ...] = ()


def doc(*segments: Any, label: str | None = None, group: str | None = None, spans: Iterable[Any] = ()) -> Doc:
    return Doc(segments, label, group, tuple(map(tuple, spans)))


def one_of(texts: Sequence[str]) -> str | Choices:
    return Choices(texts) if len(texts) > 1 else texts[0]


def chat(*turns: str) -> Doc:
    """A conversation of (role, text or medium, ..., role, ...). Only the assistant's turns are learned."""
    markers = {"system": "\x01", "user": "\x02", "assistant": "\x03"}
    segments: list[Any] = []
    learned = False
    for turn in (*turns, "user"):
        if turn in markers:
            segments.append(markers[turn] if learned else Given(markers[turn]))
            learned = turn == "assistant"
        else:
            segments.append(turn if learned else Given(turn) if isinstance(turn, str) else turn)
    return Doc(tuple(segments))


def shown(document: Document | Doc) -> str:
    """One line, the same for equal documents."""
    if isinstance(document, Document):
        meta = document.meta
        spans = tuple((start, stop, kind) for start, stop, kind in meta.get("spans", ()))
        document = Doc(tuple(map(_piece, document.segments)), meta.get("label"), meta.get("group"), spans)
    words = [
        NAMES.get(piece, f"<unknown medium of {len(piece):,} bytes>")
        if isinstance(piece, bytes)
        else f"{'given ' * isinstance(piece, Given)}{'one of ' * isinstance(piece, Choices)}{piece!r}"
        for piece in document.segments
    ]
    words += [f"label={document.label!r}"] * (document.label is not None) + [f"group={document.group!r}"] * bool(document.group)
    return " ".join(words + [f"spans={document.spans}"] * bool(document.spans))


def _piece(segment: Segment) -> Any:
    if not isinstance(segment.data, str):
        return segment.file
    if len(segment.choices) > 1:
        return Choices(segment.choices)
    return segment.text if segment.loss else Given(segment.text)


def read_back(folder: Path) -> dict[str, list[Document]]:
    """All documents of prepared shards, by split."""
    return {
        split: list(Shards(str(folder / f"*-{split}-*.tar")))
        for split in ("train", "validation", "test")
        if any(folder.glob(f"*-{split}-*.tar"))
    }


@dataclass(frozen=True)
class Balance:
    """What `pile prepare` counted. unread: names of files that it did not read, without their folders."""

    samples: int
    pieces: int
    documents: int
    rejected: Mapping[str, int]
    unused: Mapping[str, int]
    unread: Sequence[str]


def read_balance(folder: Path) -> Balance:
    """The balance of prepared shards, whose sums must be right."""
    description = json.loads((folder / "dataset.json").read_text())
    balance, rejected = description["balance"], description["rejected"]
    assert balance["rejected"] == sum(rejected.values())
    assert balance["samples"] + balance["pieces"] == balance["documents"] + balance["rejected"]
    assert balance["fields"] == balance["used"] + balance["unused"] + balance["of_rejected"]
    assert balance["unused"] == sum(balance["unused_fields"].values())
    path = folder / "rejected.jsonl"
    listed = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len(listed) == balance["rejected"] + sum(balance["files_not_read"].values())
    unread = [one["file"].rpartition("/")[2] for one in listed if one["reason"] in balance["files_not_read"]]
    return Balance(
        balance["samples"], balance["pieces"], balance["documents"], rejected, balance["unused_fields"], sorted(unread)
    )


@dataclass
class Expected:
    """The expected result of a layout. unused: fields of samples that no document holds, by name; unread: files of no
    sample; rejected: samples by reason."""

    train: Sequence[Doc] = ()
    validation: Sequence[Doc] = ()
    test: Sequence[Doc] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    unread: Sequence[str] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)
    input: str = ""  # below the folder that was written; "" for the folder itself


@dataclass(frozen=True)
class Layout:
    write: Callable[[Path], Expected]
    options: Mapping[str, Any]


LAYOUTS: dict[str, Layout] = {}


def layout(name: str, **options: Any) -> Callable[[Callable[[Path], Expected]], Callable[[Path], Expected]]:
    def register(function: Callable[[Path], Expected]) -> Callable[[Path], Expected]:
        LAYOUTS[name] = Layout(function, options)
        return function

    return register


# -- writers of files


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def lines(records: Iterable[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def tabs(rows: Iterable[Sequence[Any]]) -> str:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def commas(rows: Iterable[Sequence[Any]], quoting: int = csv.QUOTE_MINIMAL) -> str:
    file = io.StringIO()
    csv.writer(file, quoting=quoting, lineterminator="\n").writerows(rows)
    return file.getvalue()


def tar(members: Iterable[tuple[str, str | bytes]], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(members: Mapping[str, str | bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def parquet(columns: Mapping[str, list[Any]], features: Mapping[str, Any] | None = None) -> bytes:
    """A Parquet file as `datasets` writes it: its schema metadata holds the features."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def struct(data: bytes, path: str | None = None) -> dict[str, Any]:
    """A picture or a sound as Parquet files of the hub hold it."""
    return {"bytes": data, "path": path}


IMAGE, STRING = {"_type": "Image"}, {"dtype": "string", "_type": "Value"}


def class_label(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


# -- speech


@layout("LJSpeech", validation_fraction=0)
def ljspeech(root: Path) -> Expected:
    """Without header, and never quoted: a text may begin with a quotation mark that nothing closes."""
    rows = [
        ("LJ001-0001", "Printing, in the only sense", "Printing, in the only sense"),
        ("LJ001-0002", 'in 1455, "the Bible|'[:-1], 'in fourteen fifty-five, "the Bible'),
        ("LJ001-0003", '"the 42-line Bible of about 1455', '"the forty-two line Bible of about fourteen fifty-five'),
        ("LJ002-0106", "Dr. Dodd & Mr. Cox", "Doctor Dodd and Mister Cox"),
    ]
    audio = {f"LJSpeech-1.1/wavs/{row[0]}.wav": sound(n, "wav", 22_050) for n, row in enumerate(rows)}
    table = "".join("|".join(row) + "\n" for row in rows)
    write(root, {**audio, "LJSpeech-1.1/metadata.csv": table, "LJSpeech-1.1/README": "-----\nThe LJ Speech Dataset\n"})
    documents = [doc(sound(n, "wav", 22_050), row[2]) for n, row in enumerate(rows)]
    return Expected(train=documents, unread=["README"], input="LJSpeech-1.1")


@layout("LibriSpeech")
def librispeech(root: Path) -> Expected:
    """Recordings of 36 s occur. Speakers are groups."""
    folders = {
        "train-clean-100": ("103", "1240"), "train-other-500": ("20", "205"), "dev-clean": ("84", "121123"),
        "test-clean": ("61", "70968"), "test-other": ("367", "130732"),
    }  # fmt: skip
    splits: dict[str, list[Doc]] = {"train": [], "dev": [], "test": []}
    number = 0
    for name, (speaker, chapter) in folders.items():
        texts = []
        for index in range(2):
            number += 1
            stem, text = f"{speaker}-{chapter}-{index:04d}", f"CHAPTER {number} MISSUS RACHEL LYNDE'S SURPRISE"
            data = sound(number, "flac", 16_000, 36 if number == 1 else 0.2)
            write(root, {f"LibriSpeech/{name}/{speaker}/{chapter}/{stem}.flac": data})
            texts.append(f"{stem} {text}\n")
            splits[name.split("-")[0]].append(doc(data, text, group=speaker))
        write(root, {f"LibriSpeech/{name}/{speaker}/{chapter}/{speaker}-{chapter}.trans.txt": "".join(texts)})
    papers = ("LICENSE", "README", "CHAPTERS", "SPEAKERS", "BOOKS")
    write(
        root,
        {f"LibriSpeech/{name}.TXT": f"; {name} of LibriSpeech\n14  | F | train-clean-360 | 25.03 | ...\n" for name in papers},
    )
    unread = [f"{name}.TXT" for name in papers]
    return Expected(splits["train"], splits["dev"], splits["test"], unread=unread, input="LibriSpeech")


COMMON_VOICE = (
    "client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "down_votes", "age", "gender", "accents",
    "variant", "locale", "segment",
)  # fmt: skip


@layout("Common Voice")
def common_voice(root: Path) -> Expected:
    """validated.tsv holds the rows of train, dev and test, and more. Fields are not quoted."""
    sentences = [
        '"It is old, he said.',
        "We go.",
        "Joe Keaton disapproved.",
        "She'll be all right.",
        "Six.",
        "No, never.",
        "Bad",
        "?",
    ]
    rows = [
        (f"client{n // 2:02d}", f"common_voice_en_{n}.mp3", f"{n:08x}", text, "", 2, 0, "twenties", "", "", "", "en", "")
        for n, text in enumerate(sentences)
    ]
    tables = {
        "train": rows[:2],
        "dev": rows[2:3],
        "test": rows[4:5],
        "validated": rows[:6],
        "invalidated": rows[6:7],
        "other": rows[7:],
    }
    folder = "cv-corpus-17.0-delta-2024-03-15/en"
    write(root, {f"{folder}/{name}.tsv": tabs([COMMON_VOICE, *some]) for name, some in tables.items()})
    write(root, {f"{folder}/clips/{row[1]}": sound(n, "mp3") for n, row in enumerate(rows)})
    write(
        root,
        {f"{folder}/reported.tsv": tabs([("sentence_id", "sentence", "locale", "reason"), ("1", "We go.", "en", "grammar")])},
    )
    durations = [("clip", "duration[ms]"), *((row[1], 150) for row in rows)]
    write(root, {f"{folder}/clip_durations.tsv": tabs(durations)})
    documents = [doc(sound(n, "mp3"), row[3], group=row[0]) for n, row in enumerate(rows)]
    unused = dict.fromkeys(sorted(set(COMMON_VOICE) - {"client_id", "path", "sentence"}), 4)
    tables = [f"{name}.tsv" for name in ("validated", "invalidated", "other", "reported", "clip_durations")]
    clips = [rows[n][1] for n in (3, 5, 6, 7)]
    return Expected(documents[:2], documents[2:3], documents[4:5], unused, tables + clips, input=folder)


@layout("VCTK", validation_fraction=0)
def vctk(root: Path) -> Expected:
    """wav48 and txt are two trees. Of speaker p315 the texts were lost."""
    documents = []
    for number, (speaker, index) in enumerate([("p225", 1), ("p225", 2), ("p226", 1)]):
        stem = f"{speaker}/{speaker}_{index:03d}"
        data, text = sound(number, "wav", 48_000), f"Please call Stella number {number}."
        write(root, {f"VCTK-Corpus/wav48/{stem}.wav": data, f"VCTK-Corpus/txt/{stem}.txt": text + "\n"})
        documents.append(doc(data, text, group=speaker))
    write(root, {"VCTK-Corpus/wav48/p315/p315_001.wav": sound(9, "wav", 48_000)})
    write(
        root, {"VCTK-Corpus/speaker-info.txt": "ID  AGE  GENDER  ACCENTS  REGION\n225  23  F    English    Southern  England\n"}
    )
    write(
        root, {"VCTK-Corpus/COPYING": "Open Data Commons\n", "VCTK-Corpus/NOTE": "p315\n", "VCTK-Corpus/README": "CSTR VCTK\n"}
    )
    papers = ["speaker-info.txt", "COPYING", "NOTE", "README"]
    return Expected(documents, unread=papers, rejected={"missing_field": 1}, input="VCTK-Corpus")


@layout("VCTK 0.92", validation_fraction=0)
def vctk_092(root: Path) -> Expected:
    """Each sentence was recorded by two microphones."""
    documents = []
    for number, (speaker, index) in enumerate([("p225", 1), ("p225", 2), ("s5", 1)]):
        text = f"Ask her to bring these things, {number}."
        write(root, {f"txt/{speaker}/{speaker}_{index:03d}.txt": text + "\n"})
        for microphone in (1, 2):
            data = sound(2 * number + microphone, "flac", 48_000)
            write(root, {f"wav48_silence_trimmed/{speaker}/{speaker}_{index:03d}_mic{microphone}.flac": data})
            documents.append(doc(data, text, group=speaker))
    write(
        root, {"speaker-info.txt": "ID  AGE  GENDER  ACCENTS  REGION COMMENTS\np225  23  F    English    Southern  England\n"}
    )
    write(root, {"license_text": "CC BY 4.0\n", "update.txt": "A new version\n", "README.txt": "CSTR VCTK\n"})
    return Expected(documents, unread=["speaker-info.txt", "license_text", "update.txt", "README.txt"])


@layout("NeMo manifests")
def nemo(root: Path) -> Expected:
    """Paths are relative to the manifest, or absolute as NeMo's scripts write them."""
    splits: dict[str, list[Doc]] = {}
    for number, name in enumerate(("train_manifest", "dev_manifest", "test_manifest")):
        records = []
        for index in range(2):
            wav, text = f"wavs/{name}_{index}.wav", f"recording {number} {index}"
            data = sound(2 * number + index)
            write(root, {wav: data})
            path = wav if index else str((root / wav).resolve())
            records.append({"audio_filepath": path, "duration": 0.15, "text": text})
            splits.setdefault(name, []).append(doc(data, text))
        write(root, {f"{name}.json": lines(records)})
    return Expected(*splits.values(), unused={"duration": 6})


@layout("Whisper JSON in a WebDataset", validation_fraction=0)
def whisper(root: Path) -> Expected:
    """Each sound with the result of `whisper.transcribe`, whose `segments` are times, not the segments of a document."""
    members: list[tuple[str, str | bytes]] = []
    documents = []
    for number in range(3):
        parts = [f" Part one of {number}.", " Part two."]
        segments = [
            {"id": n, "seek": 0, "start": n * 0.1, "end": (n + 1) * 0.1, "text": part, "tokens": [50364, 1], "temperature": 0.0}
            for n, part in enumerate(parts)
        ]
        result = {"text": "".join(parts), "segments": segments, "language": "en"}
        extension = "flac" if number else "wav"
        members += [(f"{number:06d}.{extension}", sound(number, extension)), (f"{number:06d}.json", json.dumps(result))]
        documents.append(doc(sound(number, extension), "".join(parts).strip()))
    write(root, {"whisper-000000.tar": tar(members)})
    return Expected(documents, unused={"json.segments": 3, "json.language": 3})


@layout("Whisper JSON in a folder", validation_fraction=0)
def whisper_folder(root: Path) -> Expected:
    """`whisper --output_format json` writes `0.json` next to `0.wav`."""
    documents = []
    for number in range(2):
        text = f" All of it, {number}."
        result = {"text": text, "segments": [{"id": 0, "start": 0.0, "end": 0.1, "text": text}], "language": "en"}
        write(root, {f"{number}.wav": sound(number), f"{number}.json": json.dumps(result)})
        documents.append(doc(sound(number), text.strip()))
    return Expected(documents, unused={"json.segments": 2, "json.language": 2})


@layout("ESC-50", validation_fraction=0)
def esc50(root: Path) -> Expected:
    header = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
    rows = [
        ("1-100032-A-0.wav", 1, 0, "dog", "True", 100032, "A"),
        ("1-100038-A-14.wav", 1, 14, "chirping_birds", "False", 100038, "A"),
        ("5-9032-A-0.wav", 5, 0, "dog", "True", 9032, "A"),
    ]
    audio = {f"ESC-50-master/audio/{row[0]}": sound(n, "wav", 44_100) for n, row in enumerate(rows)}
    write(
        root,
        {**audio, "ESC-50-master/meta/esc50.csv": commas([header, *rows]), "ESC-50-master/meta/esc50-human.xlsx": b"PK\3\4"},
    )
    write(
        root,
        {"ESC-50-master/README.md": "# ESC-50\n", "ESC-50-master/LICENSE": "CC\n", "ESC-50-master/requirements.txt": "numpy\n"},
    )
    write(root, {"ESC-50-master/esc50.gif": picture(1, "gif")})
    documents = [doc(sound(n, "wav", 44_100), label=row[3]) for n, row in enumerate(rows)]
    fields = {name: 3 for name in ("fold", "target", "esc10", "src_file", "take")}
    files = ["esc50-human.xlsx", "README.md", "LICENSE", "requirements.txt", "esc50.gif"]
    return Expected(documents, unused=fields, unread=files, input="ESC-50-master")


@layout("Speech Commands")
def speech_commands(root: Path) -> Expected:
    """Splits are two lists; all other words are for training. The noise is of no word."""
    words = {
        "yes/0a7c2a8d_nohash_0.wav": 0, "yes/0a7c2a8d_nohash_1.wav": 1, "yes/1b4c9b89_nohash_0.wav": 2,
        "no/1b4c9b89_nohash_0.wav": 3, "no/c50f55b8_nohash_0.wav": 4,
    }  # fmt: skip
    write(root, {name: sound(number) for name, number in words.items()})
    write(root, {"_background_noise_/pink_noise.wav": sound(9), "_background_noise_/README.md": "Noise.\n"})
    write(
        root,
        {
            "validation_list.txt": "yes/1b4c9b89_nohash_0.wav\nno/1b4c9b89_nohash_0.wav\n",
            "testing_list.txt": "no/c50f55b8_nohash_0.wav\n",
        },
    )
    write(root, {"README.md": "# Speech Commands Data Set v0.02\n", "LICENSE": "CC BY 4.0\n"})
    documents = [doc(sound(number), label=name.split("/")[0]) for name, number in words.items()]
    noise = doc(sound(9), label="_background_noise_")
    return Expected([*documents[:2], noise], documents[2:4], documents[4:], unread=["README.md", "README.md", "LICENSE"])


@layout("Kaldi")
def kaldi(root: Path) -> Expected:
    """data/<split>/ with wav.scp, text and utt2spk, sorted by utterance."""
    splits: dict[str, list[Doc]] = {}
    number = 0
    for name in ("train", "dev", "test"):
        scp, text, speakers = "", "", ""
        for _ in range(2):
            number += 1
            key, words = f"spk{number // 3}-utt{number}", f"THE UTTERANCE {number}"
            write(root, {f"wav/{key}.wav": sound(number)})
            scp, text, speakers = (
                scp + f"{key} wav/{key}.wav\n",
                text + f"{key} {words}\n",
                speakers + f"{key} spk{number // 3}\n",
            )
            splits.setdefault(name, []).append(doc(sound(number), words, group=f"spk{number // 3}"))
        write(root, {f"data/{name}/wav.scp": scp, f"data/{name}/text": text, f"data/{name}/utt2spk": speakers})
        write(root, {f"data/{name}/spk2utt": "".join(f"{b} {a}\n" for a, b in map(str.split, speakers.splitlines()))})
    return Expected(*splits.values(), unread=["spk2utt"] * 3)


@layout("HF audiofolder with metadata.csv")
def audiofolder(root: Path) -> Expected:
    splits: list[list[Doc]] = []
    rows: list[Sequence[Any]] = [("file_name", "transcription", "speaker_id")]
    for number, split in enumerate(("train", "test")):
        for index in range(2):
            name, text = f"data/{split}/{index:04d}.mp3", f'znowu się duch z "ciałem" zrośnie, {number} {index}'
            rows.append((name, text, f"s{2 * number + index}"))
            write(root, {name: sound(2 * number + index, "mp3")})
            splits.append([]) if index == 0 else None
            splits[-1].append(doc(sound(2 * number + index, "mp3"), text, group=f"s{2 * number + index}"))
    write(root, {"metadata.csv": commas(rows), "README.md": "---\nlicense: cc0-1.0\n---\n# A set\n"})
    return Expected(splits[0], [], splits[1], unread=["README.md"])


# -- pictures


@layout("HF imagefolder with class folders")
def imagefolder_classes(root: Path) -> Expected:
    splits: dict[str, list[Doc]] = {}
    number = 0
    for split in ("train", "validation", "test"):
        for label in ("cat", "dog"):
            number += 1
            extension = "png" if number % 2 else "jpg"
            write(root, {f"{split}/{label}/{number:04d}.{extension}": picture(number, extension)})
            splits.setdefault(split, []).append(doc(picture(number, extension), label=label))
    return Expected(*splits.values())


@layout("HF imagefolder with metadata.jsonl")
def imagefolder_metadata(root: Path) -> Expected:
    splits: list[list[Doc]] = []
    for number, split in enumerate(("train", "test")):
        records = [
            {
                "file_name": f"{index:04d}.png",
                "text": f"This is a golden retriever, {split} {index}",
                "additional_feature": index,
            }
            for index in range(3)
        ]
        write(
            root, {f"{split}/{record['file_name']}": picture(3 * number + index, "png") for index, record in enumerate(records)}
        )
        write(root, {f"{split}/metadata.jsonl": lines(records)})
        splits.append([doc(picture(3 * number + index, "png"), record["text"]) for index, record in enumerate(records)])
    return Expected(splits[0], [], splits[1], unused={"additional_feature": 6})


@layout("HF Parquet with images and class labels")
def parquet_images(root: Path) -> Expected:
    features = {"image": IMAGE, "label": class_label("angular_leaf_spot", "bean_rust", "healthy")}
    splits: list[list[Doc]] = []
    for number, split in enumerate(("train", "validation", "test")):
        labels = [2, 0, 1]
        images = [struct(picture(3 * number + index), f"{split}_{index}.jpg") for index in range(3)]
        write(root, {f"data/{split}-00000-of-00001.parquet": parquet({"image": images, "label": labels}, features)})
        names = features["label"]["names"]
        splits.append([doc(picture(3 * number + index), label=names[label]) for index, label in enumerate(labels)])
    card = (
        "---\ntask_categories:\n- image-classification\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n  - split: validation\n    path: data/validation-*\n  - split: test\n    path: data/test-*\n"
        "dataset_info:\n  config_name: default\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n"
        "          '0': angular_leaf_spot\n          '1': bean_rust\n          '2': healthy\n"
        "  splits:\n  - name: train\n    num_examples: 3\n---\n\n# Beans\n"
    )
    write(root, {"README.md": card, ".gitattributes": "*.parquet filter=lfs\n"})
    return Expected(*splits, unread=["README.md", ".gitattributes"])


@layout("MNIST as HF Parquet")
def mnist(root: Path) -> Expected:
    features = {"image": IMAGE, "label": class_label(*map(str, range(10)))}
    splits: list[list[Doc]] = []
    for number, (split, labels) in enumerate({"train": [5, 0, 4, 1], "test": [7, 2]}.items()):
        images = [struct(picture(10 * number + index, "png", (28, 28))) for index in range(len(labels))]
        write(root, {f"mnist/{split}-00000-of-00001.parquet": parquet({"image": images, "label": labels}, features)})
        splits.append([doc(picture(10 * number + n, "png", (28, 28)), label=str(label)) for n, label in enumerate(labels)])
    return Expected(splits[0], [], splits[1])


@layout("COCO captions")
def coco(root: Path) -> Expected:
    """Five captions for each picture, in any order; the instances of objects are another file."""
    splits: list[list[Doc]] = []
    for number, (split, ids) in enumerate({"train2017": [9, 25], "val2017": [139]}.items()):
        names = {image: f"{image:012d}.jpg" for image in ids}
        captions = {image: [f"A picture of {image}, caption {n}." for n in range(5)] for image in ids}
        order = [(image, n) for n in range(5) for image in ids]
        annotation = {
            "info": {"description": "COCO 2017 Dataset", "year": 2017},
            "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
            "images": [
                {"license": 4, "file_name": name, "height": 8, "width": 12, "id": image} for image, name in names.items()
            ],
            "annotations": [{"image_id": image, "id": 100 * image + n, "caption": captions[image][n]} for image, n in order],
        }
        instances = annotation | {"annotations": [{"image_id": ids[0], "id": 1, "bbox": [1, 1, 2, 2], "category_id": 18}]}
        write(root, {f"{split}/{name}": picture(10 * number + index) for index, name in enumerate(names.values())})
        write(root, {f"annotations/captions_{split}.json": json.dumps(annotation)})
        write(root, {f"annotations/instances_{split}.json": json.dumps(instances)})
        splits.append([doc(picture(10 * number + index), Choices(captions[image])) for index, image in enumerate(ids)])
    return Expected(splits[0], splits[1], unread=["instances_train2017.json", "instances_val2017.json"])


@layout("Flickr8k", validation_fraction=0)
def flickr8k(root: Path) -> Expected:
    names = ["1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg"]
    captions = {
        name: [f"A child in a pink dress , {n} , is climbing up {index} ." for n in range(5)]
        for index, name in enumerate(names)
    }
    rows = [("image", "caption"), *((name, text) for name in names for text in captions[name])]
    write(root, {"captions.txt": commas(rows)} | {f"Images/{name}": picture(n) for n, name in enumerate(names)})
    return Expected([doc(picture(n), Choices(captions[name])) for n, name in enumerate(names)])


@layout("img2dataset", validation_fraction=0)
def img2dataset(root: Path) -> Expected:
    """Failed downloads have no picture. Each tar comes with a table and statistics."""
    members: list[tuple[str, str | bytes]] = []
    records, documents = [], []
    for number in range(5):
        key, caption, failed = f"{number:09d}", f"A photo, the {number}th", number == 3
        status = (
            {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"} if failed else {"status": "success"}
        )
        sizes = {"width": 12, "height": 8, "original_width": 24, "original_height": 16, "exif": "{}", "sha256": "ab"}
        url = f"https://example.com/{number}.jpg"
        records.append(
            {"caption": caption, "url": url, "key": key, "error_message": None} | status | (sizes if not failed else {})
        )
        members += [] if failed else [(f"{key}.jpg", picture(number))]
        members += [(f"{key}.json", json.dumps(records[-1], indent=4)), (f"{key}.txt", caption)]
        documents += [] if failed else [doc(picture(number), caption)]
    table = {
        name: [record.get(name) for record in records]
        for name in ("caption", "url", "key", "status", "error_message", "width", "height")
    }
    statistics = {
        "count": 5,
        "successes": 4,
        "failed_to_download": 1,
        "status_dict": {"success": 4, "HTTP Error 404: Not Found": 1},
    }
    write(root, {"00000.tar": tar(members), "00000.parquet": parquet(table), "00000_stats.json": json.dumps(statistics)})
    names = ("url", "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256")
    unused = {f"json.{name}": 4 for name in names}
    return Expected(documents, unused=unused, unread=["00000.parquet", "00000_stats.json"], rejected={"missing_field": 1})


@layout("CC3M as WebDataset")
def cc3m(root: Path) -> Expected:
    """open_clip's form: a picture of any kind and a txt. The splits are in the names of the shards."""
    splits: list[list[Doc]] = []
    for number, (shard, count) in enumerate({"cc3m-train-0000": 4, "cc3m-validation-0000": 2}.items()):
        members: list[tuple[str, str | bytes]] = []
        splits.append([])
        for index in range(count):
            extension = ("jpg", "png", "webp", "jpeg")[index]
            data, text = picture(10 * number + index, extension.replace("jpeg", "jpg")), f"caption {number} {index}"
            members += [(f"{index:09d}.{extension}", data), (f"{index:09d}.txt", text)]
            splits[-1].append(doc(data, text))
        write(root, {f"{shard}.tar": tar(members)})
    return Expected(*splits)


@layout("VQA as Parquet", validation_fraction=0)
def vqa(root: Path) -> Expected:
    """A question with the answers of several people."""
    answers = [["net", "net", "netting"], ["white"], ["2", "two"]]
    columns = {
        "question_id": [100, 101, 102],
        "image": [struct(picture(n), f"{n}.jpg") for n in range(3)],
        "question": [f"What is in picture {n}?" for n in range(3)],
        "answers": answers,
    }
    write(root, {"train-00000-of-00001.parquet": parquet(columns)})
    documents = [doc(picture(n), Given(f"What is in picture {n}?"), one_of(answers[n])) for n in range(3)]
    return Expected(documents, unused={"question_id": 3})


# -- texts


@layout("AG News", validation_fraction=0, label_names=["World", "Sports", "Business", "Sci/Tech"])
def ag_news(root: Path) -> Expected:
    """No header, labels from 1, everything quoted, `\\` in texts."""
    classes = ["World", "Sports", "Business", "Sci/Tech"]
    splits: list[list[Doc]] = []
    for split, labels in {"train": [3, 4, 1, 2, 3], "test": [4, 2]}.items():
        rows = [
            (label, f'Bears "Claw" Back, {split} {n}', f"Reuters - Short-sellers\\, {n}.") for n, label in enumerate(labels)
        ]
        write(root, {f"{split}.csv": commas(rows, csv.QUOTE_ALL)})
        splits.append([doc(row[1], row[2], label=classes[row[0] - 1]) for row in rows])
    write(
        root,
        {"classes.txt": "".join(f"{name}\n" for name in classes), "readme.txt": "AG's News Topic Classification Dataset\n"},
    )
    return Expected(splits[0], [], splits[1], unread=["classes.txt", "readme.txt"])


@layout("IMDB folders", label_from_folder=True)
def aclimdb(root: Path) -> Expected:
    splits: list[list[Doc]] = []
    for split in ("train", "test"):
        splits.append([])
        for label in ("neg", "pos"):
            for number in range(2):
                text = f"A {label} film of {split}, {number}.<br /><br />Zentropa has much in common with it."
                write(root, {f"aclImdb/{split}/{label}/{number}_{9 if label == 'pos' else 2}.txt": text})
                splits[-1].append(doc(text, label=label))
            write(root, {f"aclImdb/{split}/urls_{label}.txt": "http://www.imdb.com/title/tt0210075/usercomments\n"})
        write(root, {f"aclImdb/{split}/labeledBow.feat": "9 0:9 1:1 2:4\n"})
    write(
        root,
        {
            "aclImdb/imdb.vocab": "the\nand\n",
            "aclImdb/imdbEr.txt": "0.049\n0.201\n",
            "aclImdb/README": "Large Movie Review Dataset\n",
        },
    )
    unread = ["urls_pos.txt", "urls_neg.txt", "labeledBow.feat"] * 2 + ["imdb.vocab", "imdbEr.txt", "README"]
    return Expected(splits[0], [], splits[1], unread=unread, input="aclImdb")


@layout("IMDB as CSV", validation_fraction=0)
def imdb_csv(root: Path) -> Expected:
    rows = [(f'One of the "other" reviewers, {n},<br />said\nso.', ("positive", "negative")[n % 2]) for n in range(4)]
    write(root, {"IMDB Dataset.csv": commas([("review", "sentiment"), *rows])})
    return Expected([doc(*row[:1], label=row[1]) for row in rows], input="IMDB Dataset.csv")


@layout("SST-2 of GLUE", label_names=["negative", "positive"])
def sst2(root: Path) -> Expected:
    """The test set has no labels. Quotation marks are text: nothing is quoted."""
    names = ("negative", "positive")
    train = [("hide new secretions from the parental units ", 0), ("\"a depressed fifteen-year-old 's suicidal poetry ", 1)]
    dev = [("it 's a charming and often affecting journey . ", 1), ("unflinchingly bleak and desperate ", 0)]
    test = [(0, "uneasy mishmash of styles and genres ."), (1, '" the mesmerizing performances of the leads .')]
    write(
        root, {"SST-2/train.tsv": tabs([("sentence", "label"), *train]), "SST-2/dev.tsv": tabs([("sentence", "label"), *dev])}
    )
    write(root, {"SST-2/test.tsv": tabs([("index", "sentence"), *test])})
    labelled = [[doc(text.strip(), label=names[label]) for text, label in rows] for rows in (train, dev)]
    return Expected(*labelled, [doc(row[1]) for row in test], unused={"index": 2}, input="SST-2")


@layout("C4")
def c4(root: Path) -> Expected:
    splits: list[list[Doc]] = []
    for split, total in (("train", 1024), ("validation", 8)):
        texts = [f"Beginners BBQ Class, {split} {n}!\nDo you want to get better?" for n in range(3)]
        records = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://klyq.com/x"} for text in texts]
        write(root, {f"en/c4-{split}.00000-of-{total:05d}.json.gz": gzip.compress(lines(records).encode())})
        splits.append([doc(text) for text in texts])
    return Expected(*splits, unused={"timestamp": 6, "url": 6})


@layout("Dolma", validation_fraction=0)
def dolma(root: Path) -> Expected:
    """`metadata` is an object, of other keys in each source."""
    documents = []
    for number, source in enumerate(("reddit", "wiki")):
        records = [
            {"id": f"{source}{n}", "text": f"Of {source} {n}.", "source": source, "added": "2023-04-11T09:57:03.044571+00:00",
             "created": "2022-11-30T14:24:25Z", "metadata": {"n": n} if number else {"subreddit": "a", "nested": {"b": [1]}}}
            for n in range(3)
        ]  # fmt: skip
        write(root, {f"v1_7/{source}-0000.json.gz": gzip.compress(lines(records).encode())})
        documents += [doc(record["text"]) for record in records]
    return Expected(documents, unused={"id": 6, "source": 6, "added": 6, "created": 6, "metadata": 6})


@layout("The Pile")
def the_pile(root: Path) -> Expected:
    """One source for each set; test.jsonl.zst and val.jsonl.zst lie next to train/."""
    splits: list[list[Doc]] = []
    for name in ("train/00", "val", "test"):
        sets = ("Pile-CC", "Wikipedia (en)", "Pile-CC")
        records = [{"text": f"{name} {n} of {one}", "meta": {"pile_set_name": one}} for n, one in enumerate(sets)]
        write(root, {f"{name}.jsonl.zst": zstandard.compress(lines(records).encode())})
        splits.append([doc(record["text"]) for record in records])
    return Expected(*splits)


@layout("Books in several encodings", validation_fraction=0)
def books(root: Path) -> Expected:
    """Project Gutenberg's files: UTF-8 with and without BOM, CRLF, UTF-16."""
    text = "The Project Gutenberg eBook of Café No. {}\r\n\r\nIt is a truth “universally” acknowledged,\r\nthat ...\r\n"
    ways = {"1342-0": "utf-8-sig", "1343-0": "utf-8", "pg84": "utf-16"}
    write(root, {f"{name}.txt": text.format(n).encode(encoding) for n, (name, encoding) in enumerate(ways.items())})
    return Expected([doc(text.format(n).replace("\r\n", "\n")) for n in range(len(ways))])


@layout(
    "SQuAD in JSON lines",
    fields="[{text: context, loss: false}, {text: question, loss: false}, {text: answers.text, choose: true}]",
)
def squad(root: Path) -> Expected:
    splits: list[list[Doc]] = []
    for split in ("train", "validation"):
        records = []
        for number in range(2):
            answers = ["Denver Broncos", "The Denver Broncos"] if split == "validation" else [f"Saint {number}"]
            context = f"In {split}, {number}: {answers[0]} won."
            places = {"text": answers, "answer_start": [12] * len(answers)}
            records.append(
                {
                    "id": f"{number:x}",
                    "title": "Super_Bowl_50",
                    "context": context,
                    "question": f"Who won {number}?",
                    "answers": places,
                }
            )
        write(root, {f"{split}.jsonl": lines(records)})
        splits.append([
            doc(Given(one["context"]), Given(one["question"]), one_of(one["answers"]["text"]))
            for one in records
        ])  # fmt: skip
    return Expected(*splits, unused={"id": 4, "title": 4})


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O
. . O O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


@layout("CoNLL-2003", kind="entities")
def conll(root: Path) -> Expected:
    splits = []
    for split, word in (("train", "German"), ("valid", "French"), ("test", "British")):
        write(root, {f"conll2003/{split}.txt": CONLL.replace("German", word).replace("Blackburn", split)})
        first, stop = f"EU rejects {word} call .", 11 + len(word)
        spans = [(0, 2, "ORG"), (11, stop, "MISC")]
        splits.append([doc(first, spans=spans), doc(f"Peter {split}", spans=[(0, 6 + len(split), "PER")])])
    return Expected(*splits)


@layout("WNUT 17", kind="entities")
def wnut(root: Path) -> Expected:
    """A word and its tag, between them a tab; the extension of the test set is of no format."""
    splits = []
    for name, place in (("wnut17train.conll", "ESB"), ("emerging.dev.conll", "Rome"), ("emerging.test.annotated", "Lima")):
        write(root, {name: f"the\tO\nview\tO\nof\tO\nEmpire\tB-location\n{place}\tI-location\n\t\n{place}\tO\ngone\tO\n\n"})
        splits.append([doc(f"the view of Empire {place}", spans=[(12, 19 + len(place), "location")]), doc(f"{place} gone")])
    return Expected(splits[0], splits[1], splits[2])


@layout("Reviews in a zip", label_from_folder=True, validation_fraction=0)
def reviews_zip(root: Path) -> Expected:
    files = {f"{label}/{n}.txt": f"A {label} review, {n}." for label in ("pos", "neg") for n in range(2)}
    write(root, {"reviews.zip": zipped(files)})
    return Expected([doc(text, label=name.split("/")[0]) for name, text in files.items()], input="reviews.zip")


@layout("Reviews in a tar.gz", label_from_folder=True, validation_fraction=0)
def reviews_tar(root: Path) -> Expected:
    files = {
        f"./review_polarity/{label}/cv{n:03d}.txt": f"A {label} review, {n}." for label in ("pos", "neg") for n in range(2)
    }
    write(root, {"review_polarity.tar.gz": tar(files.items(), "w:gz")})
    return Expected([doc(text, label=name.split("/")[2]) for name, text in files.items()], input="review_polarity.tar.gz")


# -- conversations and interleaved documents


@layout("LLaVA", validation_fraction=0)
def llava(root: Path) -> Expected:
    """A JSON array, in which some records are only text; pictures are in folders next to it."""
    records, documents = [], []
    for number in range(3):
        image = f"coco/train2017/{number:012d}.jpg"
        question, answer = f"What is it, {number}?", f"It is {number}."
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": f"Yes, {number}."}]
        records.append({"id": f"{number:012d}", "image": image, "conversations": turns})
        write(root, {image: picture(number)})
        documents.append(
            chat("user", picture(number), question, "assistant", answer, "user", "Sure?", "assistant", f"Yes, {number}.")
        )
    turns = [{"from": "human", "value": "Just text?"}, {"from": "gpt", "value": "Just text."}]
    records.append({"id": "sharegpt_1", "model": "", "conversations": turns})
    documents.append(chat("user", "Just text?", "assistant", "Just text."))
    write(root, {"llava_v1_5_mix665k.json": json.dumps(records)})
    return Expected(documents, unused={"id": 4, "model": 1})


@layout("ShareGPT", validation_fraction=0)
def sharegpt(root: Path) -> Expected:
    """Some begin with the assistant, some end with the user."""
    chats = [
        (("system", "Be brief."), ("human", "Hi."), ("gpt", "Hello.")),
        (("gpt", "Continuing."), ("human", "Go on."), ("gpt", "Done.")),
        (("human", "Who?"), ("gpt", "Me."), ("human", "Unanswered?")),
    ]
    records = [
        {"id": f"QWJhYvA_{n}", "conversations": [{"from": who, "value": text} for who, text in some]}
        for n, some in enumerate(chats)
    ]
    write(root, {"sharegpt.jsonl": lines(records)})
    documents = [
        chat("system", "Be brief.", "user", "Hi.", "assistant", "Hello."),
        chat("assistant", "Continuing.", "user", "Go on.", "assistant", "Done."),
        chat("user", "Who?", "assistant", "Me."),
    ]
    return Expected(documents, unused={"id": 3})


@layout("OpenAI chats")
def openai(root: Path) -> Expected:
    """Fine-tuning files: a call of a tool has null content, an answer of weight 0 is not learned."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    weather = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ]
    weighted = [
        {"role": "system", "content": "Marv is sarcastic."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris", "weight": 0},
        {"role": "user", "content": "More sarcastic?"},
        {"role": "assistant", "content": "Paris, as if.", "weight": 1},
    ]
    plain = [{"role": "user", "content": [{"type": "text", "text": "Two?"}]}, {"role": "assistant", "content": "2"}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    write(
        root,
        {
            "train.jsonl": lines([{"messages": weather, "tools": tools}, {"messages": weighted}]),
            "valid.jsonl": lines([{"messages": plain}]),
        },
    )
    train = [
        chat("user", "Rain?", "dry", "assistant", "No."),
        doc(
            Given("\1"), Given("Marv is sarcastic."), Given("\2"), Given("Capital of France?"), Given("\3"), Given("Paris"),
            Given("\2"), Given("More sarcastic?"), Given("\3"), "Paris, as if.", "\2",
        ),
    ]  # fmt: skip
    return Expected(train, [chat("user", "Two?", "assistant", "2")], unused={"tools": 1})


@layout("Alpaca", validation_fraction=0)
def alpaca(root: Path) -> Expected:
    records = [
        {"instruction": "Give three tips.", "input": "", "output": "1. Eat."},
        {"instruction": "Classify.", "input": "oak", "output": "A tree."},
    ]
    write(root, {"alpaca_data.json": json.dumps(records, indent=4)})
    return Expected(
        [chat("user", "Give three tips.", "assistant", "1. Eat."), chat("user", "Classify.\n\noak", "assistant", "A tree.")]
    )


@layout("OBELICS", validation_fraction=0)
def obelics(root: Path) -> Expected:
    """Two lists, aligned; metadata is a list in a string."""
    records = [
        {"texts": [None, f"Between pictures {n}.", None, "The end."],
         "images": [f"images/{2 * n}.jpg", None, f"images/{2 * n + 1}.jpg", None],
         "metadata": json.dumps([{"src": "https://a.example"}, None]), "general_metadata": json.dumps({"url": "https://a.example"})}
        for n in range(2)
    ]  # fmt: skip
    write(root, {f"images/{n}.jpg": picture(n) for n in range(4)} | {"obelics.jsonl": lines(records)})
    documents = [doc(picture(2 * n), f"Between pictures {n}.", picture(2 * n + 1), "The end.") for n in range(2)]
    return Expected(documents, unused={"metadata": 2, "general_metadata": 2})


@layout("MMC4", validation_fraction=0)
def mmc4(root: Path) -> Expected:
    """A picture belongs before the sentence that it was matched with; most were never downloaded."""
    records = [
        {
            "text_list": [f"First of {n}.", "Second.", "Third."],
            "image_info": [
                {"image_name": f"{n}a.png", "raw_url": "https://a.example/a.png", "matched_text_index": 1, "matched_sim": 0.29},
                {"image_name": f"{n}gone.png", "raw_url": "https://a.example/b", "matched_text_index": 2, "matched_sim": 0.2},
            ],
            "similarity_matrix": [[0.1, 0.29, 0.2]],
            "could_have_url_duplicate": 0,
            "url": f"https://a.example/{n}",
        }
        for n in range(2)
    ]  # fmt: skip
    write(root, {f"images/{n}a.png": picture(n, "png") for n in range(2)} | {"docs_shard_0_v3.jsonl": lines(records)})
    documents = [doc(f"First of {n}.", picture(n, "png"), "Second. Third.") for n in range(2)]
    return Expected(documents, unused={"similarity_matrix": 2, "could_have_url_duplicate": 2, "url": 2})
