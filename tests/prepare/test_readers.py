"""Inputs of `pile prepare`: situations that users meet, under any file names, and malicious files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pile_app.documents import BadSample, Document, Segment
from pile_app.fields import Fields
from pile_app.prepare import files, listing
from pile_app.prepare.listing import Listing, Record
from pile_app.prepare.options import Options
from pile_app.prepare.readers import evaluation_texts, read_documents, read_record, read_unit


def image(number: int, extension: str = "png") -> bytes:
    return Segment.from_image(np.full((6, 5, 3), number, np.uint8)).file


def sound(number: int = 0) -> bytes:
    return Segment.from_audio(0.5 * np.sin((number + 1) * np.arange(800) / 20), 8000).file


def write(folder: Path, named: Mapping[str, Any]) -> Path:
    for name, data in named.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def packed(members: Mapping[str, str | bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def read(folder: Path, work: Path | None = None, **options: Any) -> list[Record]:
    """The records of an input; units are pickled, as they are between processes."""
    chosen = Options(**options)
    units = pickle.loads(pickle.dumps(list(Listing(str(folder), chosen, str(work) if work else None).units())))
    return [record for unit in units for record in read_unit(unit, chosen)]


def medium(folder: Path, value: Any, where: str = "x") -> Segment:
    """The medium in a column of a table of this folder."""
    name = where.partition(":")[0]
    found = Listing(str(folder), Options()).tree.resolve(name, value) if isinstance(value, str) else None
    record = Record(where, {"x": value}, files={value: found.real} if found else {})
    return read_record(record, Options(), {"": Fields.parse("[{image: x}]")}).document.segments[0]


def texts(folder: Path, **options: Any) -> dict[str, list[Any]]:
    """`file:line` -> data of the segments."""
    found = read_documents(folder, Options(**options))
    return {where: [s.data for s in one.segments] for where, one in found if isinstance(one, Document)}


def samples(records: list[Record]) -> dict[str, dict[str, Any]]:
    """Samples, media by their bytes."""
    return {
        record.where: {name: value.read_bytes() if isinstance(value, Path) else value for name, value in record.content.items()}
        for record in records
        if isinstance(record.content, Mapping)
    }


def reasons(records: list[Record]) -> dict[str, str]:
    return {record.where: record.content.reason for record in records if isinstance(record.content, BadSample)}


# -- files that belong together


def test_files_that_share_a_stem_are_one_sample(tmp_path: Path) -> None:
    names = {
        "a.jpg": image(1), "a.txt": "of a ", "a.json": '{"n": 1}', "b.PNG": image(2), "B.txt": "of b", "c.jpg": image(3),
        "c.jpg.txt": "of c", "d.v1.jpg": image(4), "d.v1.txt": "of d", "e.jpg": image(5), "e.seg.png": image(6), "e.xml": "<x/>",  # noqa: E501
        "f.wav": sound(), "f.normalized.txt": "words", "f.original.txt": "Words.", "g.jpg": image(7), "g.0.txt": "of g",
    }  # fmt: skip
    found = samples(read(write(tmp_path, names)))
    assert found == {
        "a.jpg": {"jpg": image(1), "txt": "of a", "json": b'{"n": 1}'}, "b.PNG": {"png": image(2), "txt": "of b"},
        "c.jpg": {"jpg": image(3), "txt": "of c"}, "d.v1.jpg": {"jpg": image(4), "txt": "of d"},
        "e.jpg": {"jpg": image(5), "seg.png": image(6), "xml": b"<x/>"}, "g.jpg": {"jpg": image(7), "txt": "of g"},
        "f.wav": {"wav": sound(), "txt": "words", "original.txt": b"Words."},
    }  # fmt: skip


def test_a_caption_without_a_readable_medium_is_no_document(tmp_path: Path) -> None:
    named = {"a.mp4": b"\0" * 20, "a.txt": "a film", "b.mkv": b"\0" * 20, "c.xyz": "?", "d.txt": "a text"}
    records = read(write(tmp_path, named))
    assert {record.where: record.layout for record in records if isinstance(record.content, Mapping)} == {
        "a.mp4": "unreadable files", "d.txt": "text file",
    }  # fmt: skip
    assert reasons(records) == {"b.mkv": "ignored_extension", "c.xyz": "ignored_extension"}
    assert texts(tmp_path) == {"d.txt": ["a text"]}


def test_every_file_is_counted(tmp_path: Path) -> None:
    """Each file of a messy folder is in a sample, or has a reason."""
    named = {
        "a.jpg": image(1), "a.txt": "one", "README.md": "# About", ".hidden/x.txt": "x", ".DS_Store": "x", "b.docx": "x",
        "t.csv": "text,label\nx y,1\n", "s/train.jsonl": lines({"text": "t"}), "w.tar": packed({"1.txt": "t"}), "empty.csv": "",
        "z.mp4": b"x", "noext": "x", "config.yaml": "a: 1\n",
    }  # fmt: skip
    folder = write(tmp_path, named)
    records = read(folder)
    mentioned = " ".join(record.where for record in records)
    joined = {"a.txt": "a.jpg", ".hidden/x.txt": ".hidden"}
    assert [name for name in named if joined.get(name, name) not in mentioned] == []
    assert all(record.layout for record in records if isinstance(record.content, Mapping))


def test_parallel_folders_of_media_and_texts(tmp_path: Path) -> None:
    named = {f"set/images/train/{n}.png": image(n) for n in range(3)} | {
        f"set/captions/train/{n}.txt": f"no. {n}" for n in range(3)
    }
    records = read(write(tmp_path, named))
    assert samples(records) == {f"set/images/train/{n}.png": {"png": image(n), "txt": f"no. {n}"} for n in range(3)}
    assert {record.split for record in records} == {"train"}


# -- tables


def test_a_table_names_its_files_however_they_are_written(tmp_path: Path) -> None:
    """Relative to the table, to the input, by base name, by stem, by a path of another machine; with `#0` or a backslash."""
    named = {f"sets/one/deep/{n}x.png": image(n) for n in range(7)}
    rows = ["deep/0x.png", "sets/one/deep/1x.png", "2x.png", "/home/ann/deep/3x.png", "deep\\4x.png", "5x.png#0", "gone.png"]
    folder = write(tmp_path, named | {"sets/one/list.tsv": "file\tcaption\n" + "".join(f"{row}\tcaption\n" for row in rows)})
    records = read(folder)
    assert [sample["file"] for sample in samples(records).values()] == [image(n) for n in range(6)]
    assert reasons(records) == {"sets/one/list.tsv:8": "missing_file", "sets/one/deep/6x.png": "not_in_table"}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('a|Printing, "in the only|Printing\nb|the words|the words\n', ['Printing, "in the only', "the words"]),
        ("a.png\tfirst caption\nb.png\tsecond, with a comma\n", ["first caption", "second, with a comma"]),
        ("a.png first caption\nb.png second caption\n", ["first caption", "second caption"]),
        ('image,text\na.png,"first, quoted"\nb.png,second\n', ["first, quoted", "second"]),
        ("image; text\na.png; first one\nb.png; second one\n", ["first one", "second one"]),
    ],
)
@pytest.mark.parametrize("name", ["list.csv", "captions.txt"])
def test_the_form_of_a_table_is_found_by_its_content(tmp_path: Path, name: str, table: str, expected: list[str]) -> None:
    name = "list.txt" if "a.png first" in table else name  # separated by spaces, which no CSV is
    named = {"pictures/a.png": image(1), "pictures/b.png": image(2), name: table}
    found = texts(write(tmp_path, named))
    assert list(found.values()) == [[image(1), expected[0]], [image(2), expected[1]]]


def test_rows_of_one_image_are_one_sample_with_several_captions(tmp_path: Path) -> None:
    rows = "".join(f"{n}.png,{k},caption {k} of {n}\n" for n in range(2) for k in range(3))
    found = samples(
        read(write(tmp_path, {f"im/{n}.png": image(n) for n in range(2)} | {"t.csv": "image,number,text\n" + rows}))
    )
    assert [sample["text"] for sample in found.values()] == [[f"caption {k} of {n}" for k in range(3)] for n in range(2)]


def test_questions_about_one_image_stay_apart(tmp_path: Path) -> None:
    rows = lines(*({"image": "0.png", "question": f"what is {k}?", "answer": f"it is {k}"} for k in range(2)))
    assert len(samples(read(write(tmp_path, {"0.png": image(0), "t.jsonl": rows})))) == 2


def test_labels_of_a_table_without_header_are_a_column(tmp_path: Path) -> None:
    rows = "".join(f'"{n % 4 + 1}","Title {n}","A longer description, {n}."\n' for n in range(12))
    found = samples(read(write(tmp_path, {"train.csv": rows})))
    assert found["train.csv:1"] == {"label": "1", "title": "Title 0", "text": "A longer description, 0."}
    assert len(found) == 12


def test_rows_that_do_not_fit_are_rejected_and_the_next_are_read(tmp_path: Path) -> None:
    table = 'text,label\nfine,1\ntoo, many,1\n"quoted, text\nof two lines",2\n"never closed,2\nfine too,1\nsay ""hi"",2\n'
    records = read(write(tmp_path, {"t.csv": table}))
    assert [sample["text"] for sample in samples(records).values()] == [
        "fine",
        "quoted, text\nof two lines",
        "fine too",
        'say ""hi""',
    ]
    assert reasons(records) == {"t.csv:3": "row_width", "t.csv:6": "unclosed_quote"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    named = {"a.txt": "Füße\nzwei", "b.csv": "text,label\nGrüße an alle,de\n", "c.jsonl": '{"text": "häufig"}\n'}
    folder = write(tmp_path, {name: text.encode(encoding) for name, text in named.items()})
    if encoding == "cp1252":
        found = reasons(read(folder))
        assert found == {"a.txt": "invalid_utf8", "b.csv:2": "invalid_utf8", "c.jsonl:1": "invalid_utf8"}
        assert all("--encoding" in str(record.content) for record in read(folder))
    found = {where.partition(":")[0]: data for where, data in texts(folder, encoding="cp1252").items()}
    assert found == {"a.txt": ["Füße\nzwei"], "b.csv": ["Grüße an alle"], "c.jsonl": ["häufig"]}


@pytest.mark.parametrize("form", ["csv", "tsv", "txt", "list", "jsonl", "json", "coco"])
def test_media_of_a_table_in_an_unknown_encoding_are_refused_with_it(tmp_path: Path, form: str) -> None:
    """They do not become documents without their captions; with `--encoding` all is read."""
    captions = [f"Füße und Straßen, {n}" for n in range(3)]
    records = [{"image": f"grün{n}.png", "text": text} for n, text in enumerate(captions)]
    coco = {"images": [{"id": n, "file_name": f"grün{n}.png"} for n in range(3)],
            "annotations": [{"image_id": n, "caption": text} for n, text in enumerate(captions)]}  # fmt: skip
    table = {
        "csv": "image;text\n" + "".join(f"grün{n}.png;{text}\n" for n, text in enumerate(captions)),
        "tsv": "image\ttext\n" + "".join(f"grün{n}.png\t{text}\n" for n, text in enumerate(captions)),
        "txt": "".join(f"grün{n}.png\t{text}\n" for n, text in enumerate(captions)),
        "list": "".join(f"grün{n}.png {text}\n" for n, text in enumerate(captions)),
        "jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        "json": json.dumps(records, ensure_ascii=False),
        "coco": json.dumps(coco, ensure_ascii=False),
    }[form]
    name = f"table.{ {'list': 'txt', 'coco': 'json'}.get(form, form) }"
    folder = write(tmp_path, {f"images/grün{n}.png": image(n) for n in range(3)} | {name: table.encode("cp1252")})
    for wrong in ("", "ascii"):
        found = read(folder, encoding=wrong)
        assert samples(found) == {} and list(reasons(found).values()) == ["invalid_utf8"] * 3
        assert all(record.layout and "--encoding" in str(record.content) for record in found)
    assert [data for _, data in texts(folder, encoding="cp1252").values()] == captions


@pytest.mark.parametrize(
    ("extension", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstandard.compress)]
)
def test_compressed_files_are_known_by_their_content(tmp_path: Path, extension: str, pack: Any) -> None:
    named = {
        f"a.json.{extension}": pack(lines({"text": "a"}, {"text": "b"}).encode()), f"c.csv.{extension}": pack(b"text\nc c\nd d\n"),  # noqa: E501
        f"e.txt.{extension}": pack(b"e"), "f.jsonl": pack(lines({"text": "f"}).encode()), f"g.ndjson.{extension}": pack(b'[{"text": "g"}]'),  # noqa: E501
    }  # fmt: skip
    assert sorted(text for (text,) in texts(write(tmp_path, named)).values()) == ["a", "b", "c c", "d d", "e", "f", "g"]


def test_columns_of_parquet_and_names_of_classes(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "tags": {"feature": {"names": ["O", "B-X"]}}}
    table = pa.Table.from_pylist([{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": 0, "tags": None}])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=1)
    with pa.OSFile(str(tmp_path / "test.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    records = read(tmp_path)
    rows = [{"text": "a", "label": "dog", "tags": ["O", "B-X"]}, {"text": "b", "label": "cat"}]
    assert [record.content for record in records if record.split == "train"] == rows
    assert [record.content for record in records if record.split == "test"] == rows


@pytest.mark.parametrize("config", ["", "#small"])
def test_a_data_set_card_says_which_files_are_which_split(tmp_path: Path, config: str) -> None:
    pytest.importorskip("datasets")
    card = """---
configs:
- config_name: large
  default: true
  data_files:
  - {split: train, path: "large/*.csv"}
  - {split: test, path: other.csv}
- config_name: small
  data_files: [{split: validation, path: small.csv}]
dataset_info:
- config_name: large
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}
---
"""
    table = "text,label\na b,0\nc d,1\n"
    named = {"README.md": card, "large/x.csv": table, "other.csv": table, "small.csv": table}
    write(tmp_path, named)
    records = read(Path(f"{tmp_path}{config}"))
    splits = {record.where: record.split for record in records if isinstance(record.content, Mapping)}
    if config:
        assert splits == {"small.csv:2": "validation", "small.csv:3": "validation"}
        assert reasons(records).keys() == {"README.md", "large/x.csv", "other.csv"}
    else:
        assert splits == {"large/x.csv:2": "train", "large/x.csv:3": "train", "other.csv:2": "test", "other.csv:3": "test"}
        assert [sample["label"] for sample in samples(records).values()] == ["bad", "good"] * 2


# -- splits, archives, links


@pytest.mark.parametrize("name", ["reviews.zip", "reviews.tar.gz", "reviews.tar.xz", "reviews.tgz", "reviews.tar"])
def test_archives_of_files_are_read_as_folders(tmp_path: Path, name: str) -> None:
    named = {"set/train/pos/1.txt": "good", "set/train/neg/1.txt": "bad", "set/train/neg/2.jpg": image(1)}
    if name.endswith("zip"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for member, data in named.items():
                archive.writestr(member, data)
        data = file.getvalue()
    else:
        data = packed(named, {"gz": "w:gz", "tgz": "w:gz", "xz": "w:xz", "tar": "w"}[name.rpartition(".")[2]])
    records = read(write(tmp_path / "in", {name: data}), tmp_path / "work")
    assert samples(records) == {
        f"{name}/set/train/neg/1.txt": {"txt": "bad"}, f"{name}/set/train/neg/2.jpg": {"jpg": image(1)},
        f"{name}/set/train/pos/1.txt": {"txt": "good"},
    }  # fmt: skip
    assert {record.split for record in records} == {"train"}
    assert read(tmp_path / "in", tmp_path / "work") == records  # a second time: it is unpacked already
    assert len(samples(read(tmp_path / "in" / name, tmp_path / "work"))) == 3


def test_a_table_may_name_files_in_an_archive(tmp_path: Path) -> None:
    archive = packed({"images/a.png": image(1), "images/b.png": image(2)}, "w:gz")
    write(tmp_path / "in", {"images.tar.gz": archive, "metadata.csv": "file_name,text\na.png,of a\nimages/b.png,of b\n"})
    found = samples(read(tmp_path / "in", tmp_path / "work"))
    assert [sample["file_name"] for sample in found.values()] == [image(1), image(2)]


def test_links_are_followed_only_within_the_input(tmp_path: Path) -> None:
    write(tmp_path, {"in/blobs/1a": image(1), "outside.png": image(2), "elsewhere/x.txt": "secret"})
    links = tmp_path / "in/snapshot"
    links.mkdir()
    for name, target in {
        "a.png": "../blobs/1a",
        "b.png": "../../outside.png",
        "c": "../../elsewhere",
        "d.txt": "gone",
        "loop": "..",
    }.items():
        (links / name).symlink_to(target)
    (links / "a.txt").write_text("of a")
    refused = reasons(read(tmp_path / "in"))
    assert (
        refused["snapshot/a.png"] == refused["snapshot/b.png"] == "ignored_link" and refused["snapshot/d.txt"] == "broken_link"
    )
    records = read(tmp_path / "in", follow_links=str(tmp_path / "in"))
    assert samples(records) == {"snapshot/a.png": {"png": image(1), "txt": "of a"}}
    assert {reasons(records)[f"snapshot/{name}"] for name in ("b.png", "c", "loop")} == {"ignored_link"}
    assert samples(read(tmp_path / "in/snapshot/a.png"))["a.png"] == {"png": image(1)}  # a link that is named is meant


def test_a_kind_that_is_given_is_believed(tmp_path: Path) -> None:
    named = {
        "x.annotated": "Ann B-per\nlives O\n",
        "chat.log": lines({"messages": [{"role": "user", "content": "a"}]}),
        "book": "a text",
    }
    write(tmp_path, named)
    (record,) = read(tmp_path / "x.annotated", kind="entities")
    assert isinstance(record.content, Document) and record.content.meta["spans"] == [[0, 3, "per"]]
    assert list(samples(read(tmp_path / "chat.log", kind="chat"))) == ["chat.log:1"]
    assert samples(read(tmp_path / "book", kind="text")) == {"book": {"txt": "a text"}}


# -- long files, in parts


def test_long_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": f"{n} " + "é" * (n * 7 % 60)} for n in range(200)]
    prose = "\n\n".join(f"paragraph {n}: " + "word " * (n % 30) for n in range(200))
    captions = "image,text\n" + "".join(f"{n // 5}.png,caption no. {n}\n" for n in range(100))
    named = {"a.jsonl": lines(*records), "b.txt": prose, "d/t.csv": captions}
    folder = write(tmp_path, named | {f"d/{n}.png": image(n) for n in range(20)})
    whole = read(folder, document_bytes=300)
    monkeypatch.setattr(listing, "UNIT_BYTES", 700)
    units = list(Listing(str(folder), Options()).units())
    assert all(sum(unit.arguments[0].startswith(name) for unit in units) > 1 for name in named)
    parts = read(folder, document_bytes=300)
    for name in ("a.jsonl", "d/t.csv"):
        expected, found = ([one.content for one in records if one.where.startswith(name)] for records in (whole, parts))
        assert found == expected, name
    pieces = [one.content["txt"] for one in parts if one.where == "b.txt" and isinstance(one.content, Mapping)]
    assert "".join(pieces) == prose
    assert all(piece.lstrip("\n").startswith("paragraph") for piece in pieces)


@pytest.mark.parametrize("data", [b"", b"ab cd\n" * 9, "猫".encode() * 40, b"x" * 64, b"\x80" * 70, b"a\n\n" + b"b" * 61])
def test_pieces_are_the_file(data: bytes) -> None:
    pieces = list(files.pieces_of(io.BytesIO(data), 16))
    assert b"".join(pieces) == data
    assert all(len(piece) <= 16 for piece in pieces)


# -- files that were made to do harm


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.xz"])
def test_a_line_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    data = b'{"text": "before"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "after"}\n'
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress, "jsonl.xz": lzma.compress}[kind]
    records = read(write(tmp_path, {f"a.{kind}": pack(data)}))
    assert samples(records) == {f"a.{kind}:1": {"text": "before"}, f"a.{kind}:3": {"text": "after"}}
    assert reasons(records) == {f"a.{kind}:2": "line_too_long"}


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "csv.bz2", "txt.xz"])
def test_a_bomb_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import tracemalloc

    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    packers = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}
    folder = write(tmp_path, {f"a.{kind}": packers[kind.rpartition(".")[2]](bytes(1 << 27))})
    tracemalloc.start()
    found = {record.content.reason if isinstance(record.content, BadSample) else "" for record in iterate(folder)}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == {{"t": "invalid_utf8", "c": "damaged_file", "j": "line_too_long"}[kind[0]]}
    assert peak < 120 << 20


def iterate(folder: Path) -> Any:
    for unit in Listing(str(folder), Options()).units():
        yield from read_unit(unit, Options())


def test_windows_that_are_too_large_and_files_cut_off_are_refused(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=30)).compressobj()
    wide = compressor.compress(lines({"text": "x"}).encode() * 1000) + compressor.flush()
    cut = {
        f"{n}.jsonl": pack(lines({"text": "x"}).encode() * 9999)[:-5]
        for n, pack in enumerate((gzip.compress, zstandard.compress, bz2.compress, lzma.compress))
    }
    found = reasons(read(write(tmp_path, {"wide.jsonl.zst": wide} | cut)))
    assert {where.partition(":")[0]: reason for where, reason in found.items()} == dict.fromkeys(
        ("wide.jsonl.zst", *cut), "damaged_file"
    )


def test_no_name_reaches_outside_the_input(tmp_path: Path) -> None:
    write(tmp_path, {"secret.png": image(7)})
    table = f"file,caption\n../secret.png,one\n{tmp_path}/secret.png,two\nlinked/secret.png,three\nlink.png,four\nok.png,five\n"
    nested = lines({"texts": ["a", None, None], "images": [None, "../../secret.png", "x.png"]})
    folder = write(tmp_path / "in", {"list.csv": table, "docs/a.jsonl": nested, "docs/x.png": image(1), "ok.png": image(2)})
    (folder / "linked").symlink_to(tmp_path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for follow in (None, str(folder)):
        records = read(folder, follow_links=follow)
        assert [name for name, sample in samples(records).items() if image(7) in sample.values()] == []
        assert all(Path(path).resolve().is_relative_to(folder) for record in records for path in record.files.values())
        assert {f"list.csv:{n}": "missing_file" for n in (2, 3, 4, 5)}.items() <= reasons(records).items()
    for name in (
        "../secret.png",
        "../../secret.png",
        str(tmp_path / "secret.png"),
        "linked/secret.png",
        "link.png",
        "/etc/passwd",
    ):
        with pytest.raises(BadSample, match="missing_file"):
            medium(folder, name, "docs/a.jsonl:1")
        write(folder, {"docs/b.jsonl": lines(*({"texts": ["a", None], "images": [None, file]} for file in ("x.png", name)))})
        assert [where for where, one in read_documents(folder, Options()) if isinstance(one, BadSample)
                if where == "docs/b.jsonl:2" and one.reason == "missing_file"]  # fmt: skip
    assert medium(folder, "x.png", "docs/a.jsonl:1").file == image(1)


def test_archives_that_do_harm_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, kind, target in (("ok/a.txt", tarfile.REGTYPE, ""), ("../out.txt", tarfile.REGTYPE, ""), ("/abs.txt", tarfile.REGTYPE, ""),  # noqa: E501
                                   ("link", tarfile.SYMTYPE, "/etc"), ("link/b.txt", tarfile.REGTYPE, ""), ("pipe", tarfile.FIFOTYPE, "")):  # fmt: skip  # noqa: E501
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"text") if member.size else None)
    packed_bomb = io.BytesIO()
    with zipfile.ZipFile(packed_bomb, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x.txt", bytes(1 << 22))
    monkeypatch.setattr(files, "MAX_ARCHIVE", (1 << 20, 10, 100))
    write(
        tmp_path / "in",
        {
            "a.tgz": file.getvalue(),
            "b.zip": packed_bomb.getvalue(),
            "c.zip": b"PK\3\4 no",
            "d.tar.gz": gzip.compress(b"x" * 2000),
        },
    )
    records = read(tmp_path / "in", tmp_path / "work")
    assert samples(records) == {"a.tgz/ok/a.txt": {"txt": "text"}, "a.tgz/link/b.txt": {"txt": "text"}}
    assert reasons(records) == {
        "a.tgz/../out.txt": "unsafe_member", "a.tgz//abs.txt": "unsafe_member", "a.tgz/link": "unsafe_member",
        "a.tgz/pipe": "unsafe_member", "b.zip": "archive_too_large", "c.zip": "damaged_file", "d.tar.gz": "damaged_file",
    }  # fmt: skip
    assert not (tmp_path / "work/out.txt").exists() and not any(path.is_symlink() for path in (tmp_path / "work").rglob("*"))


def test_pipes_and_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 5000)
    folder = write(tmp_path, {"a.png": image(1), "large.png": bytes(5001)})
    os.mkfifo(folder / "b.txt")
    records = read(folder)
    assert reasons(records) == {"b.txt": "no_plain_file"}
    with pytest.raises(BadSample, match="file_too_large"):
        medium(folder, folder / "large.png")


def test_hostile_records_and_tars_are_rejected(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, target in (
            ("ok.txt", tarfile.REGTYPE, ""),
            ("a.txt", tarfile.SYMTYPE, "/etc/passwd"),
            ("../b.txt", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"text") if member.size else None)
    hostile = ["[" * 100_000, '{"text": 1' + "0" * 9999 + "}", "[1, 2]", "nothing"]
    named = {
        "a.tar": file.getvalue(), "b.tar": b"x" * 2000, "c.jsonl": "\n".join(hostile) + '\n{"text": "fine"}\n',
        "e.parquet": b"PAR1" + b"\xff" * 99 + b"PAR1", "f.arrow": b"ARROW1" + b"\xff" * 99, "g.json": "{" * 9999,
        "h.tar": packed({"1.txt": "t" * 3000})[:2000],
    }  # fmt: skip
    records = read(write(tmp_path, named))
    assert samples(records) == {"a.tar:ok": {"txt": b"text"}, "c.jsonl:5": {"text": "fine"}}
    expected = {
        f"c.jsonl:{n}": reason for n, reason in enumerate(("invalid_json", "invalid_json", "no_object", "invalid_json"), 1)
    }
    expected |= {"a.tar:a": "unsafe_member", "a.tar:../b": "unsafe_member", "b.tar": "damaged_file", "h.tar": "damaged_file",
                 "e.parquet": "damaged_file", "f.arrow": "damaged_file", "g.json": "invalid_json"}  # fmt: skip
    assert expected.items() <= reasons(records).items()


# -- without a pipeline


def test_documents_of_any_input_and_evaluation_sets(tmp_path: Path) -> None:
    named = {
        "a.txt": "one  ",
        "b.jsonl": '{"text": "two"}\n{"question": "three", "choices": ["four"]}',
        "c.csv": "x,y\nfive,six\n",
    }
    folder = write(tmp_path, named)
    assert texts(folder / "a.txt") == {"a.txt": ["one  "]}
    assert list(evaluation_texts(str(folder / "b.jsonl"))) == ["two", "three", "four"]
    assert list(evaluation_texts(str(folder / "c.csv"))) == ["five", "six"]
    for name in ("nothing.txt", "a.docx"):
        with pytest.raises(ValueError, match=name):
            list(evaluation_texts(str(folder / name)))


@pytest.mark.parametrize("form", ["bytes", "struct", "data uri", "base64"])
def test_media_of_records_in_every_form(tmp_path: Path, form: str) -> None:
    import base64

    encoded = base64.b64encode(image(1)).decode()
    value = {
        "bytes": image(1),
        "struct": {"bytes": image(1), "path": None},
        "data uri": f"data:image/png;base64,{encoded}",
        "base64": encoded,
    }[form]
    assert medium(tmp_path, value) == Segment(image(1), "png")
    with pytest.raises(BadSample, match="git lfs pull"):
        medium(tmp_path, b"version https://git-lfs.github.com/spec/v1\n")
