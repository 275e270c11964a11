"""Every layout `pile prepare` reads, and files that were made to do harm."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard

from pile_app.documents import BadSample, Document, Segment
from pile_app.prepare import files, listing
from pile_app.prepare.listing import Item, list_items
from pile_app.prepare.options import Options
from pile_app.prepare.readers import Found, evaluation_texts, read_item, read_texts

RATE = 8000


def image(number: int) -> bytes:
    return Segment.from_image(np.full((6, 5, 3), number, np.uint8)).file


def sound(number: int = 0) -> bytes:
    return Segment.from_audio(0.5 * np.sin((number + 1) * np.arange(800) / 20), RATE).file


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def read(folder: Path, **options: Any) -> list[Found]:
    chosen = Options(**options)
    items = json.loads(json.dumps(list(list_items(folder, chosen))))  # as they are kept between listing and reading
    root = str(folder if folder.is_dir() else folder.parent)
    return [found for item in items for found in read_item(root, Item(*item), chosen)]


def documents(found: list[Found]) -> dict[str, list[Any]]:
    """File -> data of the segments."""
    return {one.file: [s.data for s in one.content.segments] for one in found if isinstance(one.content, Document)}


def reasons(found: list[Found]) -> dict[str, str]:
    return {one.file: one.content.reason for one in found if isinstance(one.content, BadSample)}


def layouts(found: list[Found]) -> set[str]:
    return {one.layout for one in found if isinstance(one.content, Document)}


# -- layouts


def test_librispeech(tmp_path: Path) -> None:
    folder = "LibriSpeech/dev-clean/84/121123/"
    named = {
        folder + "84-121123.trans.txt": "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n84-121123-0007 LOST\n",
        folder + "84-121123-0000.flac": sound(0),
        folder + "84-121123-0001.flac": sound(1),
        folder + "84-121123-0002.flac": sound(2),
        "LibriSpeech/README.TXT": "about",
    }
    for kind in ("auto", "audio"):
        found = read(write(tmp_path / "in", named), kind=kind)
        spoken = {name: data for name, data in documents(found).items() if "trans" in name}
        assert list(spoken.values()) == [[sound(0), "GO DO YOU HEAR"], [sound(1), "BUT IN LESS"]]
        missing = {folder + "84-121123.trans.txt:3": "missing_file", folder + "84-121123-0002.flac": "not_in_table"}
        assert missing.items() <= reasons(found).items()
        assert "LibriSpeech" in layouts(found)


def test_common_voice_reads_validated_alone(tmp_path: Path) -> None:
    header = "client_id\tpath\tsentence\tup_votes\n"
    named = {
        "cv/en/validated.tsv": header + 'x\tc1.flac\tHe said "no\t2\nx\tc2.flac\tsecond\t2\n',
        "cv/en/train.tsv": header + "x\tc1.flac\tone\t2\n",
        "cv/en/invalidated.tsv": header + "x\tc3.flac\tbad\t0\n",
        "cv/en/clips/c1.flac": sound(1),
        "cv/en/clips/c2.flac": sound(2),
        "cv/en/clips/c3.flac": sound(3),
    }
    found = read(write(tmp_path / "in", named))
    assert documents(found) == {
        "cv/en/validated.tsv:2": [sound(1), 'He said "no'],
        "cv/en/validated.tsv:3": [sound(2), "second"],
    }
    assert reasons(found) == {
        "cv/en/train.tsv": "other_table",
        "cv/en/invalidated.tsv": "other_table",
        "cv/en/clips/c3.flac": "not_in_table",
    }
    assert layouts(found) == {"Common Voice"}


def test_rows_of_a_table_may_go_over_several_lines(tmp_path: Path) -> None:
    rows = "".join(f'{number}.png,"caption {number},\n2nd line"\n' for number in range(10))
    named = {"list.csv": "\ufefffile,caption\n" + rows} | {f"{number}.png": image(number) for number in range(10)}
    found = read(write(tmp_path / "in", named))
    assert list(documents(found)) == [f"list.csv:{2 * number + 3}" for number in range(10)]
    assert [data[1] for data in documents(found).values()] == [f"caption {number},\n2nd line" for number in range(10)]


def test_parquet_texts_media_and_interleaved(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = [{"text": f"text {n}", "meta": {"pile_set_name": "Wiki"}, "other": n} for n in range(7)]
    pq.write_table(pa.Table.from_pylist([*texts, {"text": None}]), tmp_path / "in/a.parquet", row_group_size=3)
    media = [{"image": {"bytes": image(n), "path": "a.png"}, "caption": f"picture {n}"} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(media), tmp_path / "in/b.parquet")
    spoken = [{"audio": {"bytes": sound(1), "path": None}, "transcription": "one"}]
    pq.write_table(pa.Table.from_pylist(spoken), tmp_path / "in/c.parquet")
    mixed = [{"texts": ["before", None, "after"], "images": [None, {"bytes": image(9)}, None]}]
    pq.write_table(pa.Table.from_pylist(mixed), tmp_path / "in/d.parquet")
    (tmp_path / "in/e.parquet").write_bytes(b"PAR1" + b"\xff" * 99 + b"PAR1")
    found = read(tmp_path / "in")
    assert [data for name, data in documents(found).items() if name.startswith("a")] == [[f"text {n}"] for n in range(7)]
    assert documents(found)["b.parquet:2"] == [image(1), "picture 1"]
    assert documents(found)["c.parquet:1"] == [sound(1), "one"]
    assert documents(found)["d.parquet:1"] == ["before", image(9), "after"]
    assert reasons(found) == {"a.parquet:8": "no_text", "e.parquet": "damaged_file"}
    first = found[0].content
    assert isinstance(first, Document)
    assert first.meta == {"pile_set_name": "Wiki"}
    assert set(documents(read(tmp_path / "in", kind="images"))) == {"b.parquet:1", "b.parquet:2"}
    assert set(documents(read(tmp_path / "in", kind="audio"))) == {"c.parquet:1"}
    assert len(documents(read(tmp_path / "in", kind="text"))) == 7


def test_interleaved_json_lines_keep_their_order(tmp_path: Path) -> None:
    mmc4 = {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "x.png", "matched_text_index": 1},
            {"image_name": "y.png", "matched_text_index": 0},
            {"image_name": "gone.png", "matched_text_index": 2},
        ],
    }
    obelics = {"texts": ["Title", None, "End", "More"], "images": [None, "x.png", None, None]}
    lines = [mmc4, obelics, {"text_list": ["lost"], "image_info": [{"image_name": "gone.png"}]}, {"text": "plain"}]
    named = {
        "docs/shard.jsonl": "\n".join(map(json.dumps, lines)),
        "docs/images/x.png": image(1),
        "docs/images/y.png": image(2),
        "other/z.png": image(3),
    }
    found = read(write(tmp_path / "in", named))
    assert documents(found) == {
        "docs/shard.jsonl:1": [image(2), "One.", image(1), "Two. Three."],
        "docs/shard.jsonl:2": ["Title", image(1), "End\n\nMore"],
        "docs/shard.jsonl:4": ["plain"],
        "other/z.png": [image(3)],  # the images of records are no documents of their own
    }
    assert reasons(found) == {"docs/shard.jsonl:3": "missing_file"}
    first = found[0].content
    assert isinstance(first, Document)
    assert first.ordered
    assert first.meta == {"missing_images": 1}
    assert {"MMC4 (JSON lines)", "OBELICS (JSON lines)"} < layouts(found)


def test_shards_are_read_as_they_are(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "x/1", "jpg": b"not looked at here", "txt": b"caption"})
        description = {"segments": [{"text": "Q", "loss": False}, {"file": "0.png"}], "meta": {"n": 1}}
        tar.write({"__key__": "x/2", "json": json.dumps(description).encode(), "0.png": image(1)})
        tar.write({"__key__": "x/3", "bin": b"?"})
    found = read(tmp_path / "a.tar", kind="webdataset")
    assert documents(found) == {"a.tar:x/1": [b"not looked at here", "caption"], "a.tar:x/2": ["Q", image(1)]}
    assert reasons(found) == {"a.tar:x/3": "no_segment"}
    second = found[1].content
    assert isinstance(second, Document)
    assert (second.ordered, second.meta, second.segments[0].loss) == (True, {"n": 1}, False)


def test_long_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"{n} " + "é" * (n * 7 % 60)}, ensure_ascii=False) for n in range(200)]
    prose = "\n\n".join(f"paragraph {n}: " + "word " * (n % 30) for n in range(200))
    folder = write(tmp_path / "in", {"a.jsonl": "\n".join(lines), "b.txt": prose})
    whole = read(folder, document_bytes=300)
    monkeypatch.setattr(listing, "ITEM_BYTES", 700)
    parts = read(folder, document_bytes=300)
    assert [one.file for one in whole[:3]] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    lines_of_whole, lines_of_parts = ([one for one in found if "jsonl" in one.file] for found in (whole, parts))
    assert [one.content for one in lines_of_whole] == [one.content for one in lines_of_parts]
    data = (folder / "a.jsonl").read_bytes()
    for one in lines_of_parts:
        place = int(one.file.partition("@")[2])
        assert isinstance(one.content, Document)
        assert json.loads(data[place:].split(b"\n")[0])["text"] == one.content.segments[0].data
    pieces = [one.content.segments[0].text for one in parts if one.file == "b.txt" and isinstance(one.content, Document)]
    assert "".join(pieces) == prose
    assert all(piece.startswith("paragraph") for piece in pieces)


def test_texts_alone_and_evaluation_sets(tmp_path: Path) -> None:
    named = {
        "a.txt": "one  ",
        "b.jsonl": '{"text": "two"}\n{"question": "three", "choices": ["four"]}',
        "c.csv": "x,y\nfive,six\n",
    }
    folder = write(tmp_path / "in", named)
    assert list(read_texts(folder)) == ["one", "two"]
    assert list(evaluation_texts(str(folder / "b.jsonl"))) == ["two", "three", "four"]
    assert list(evaluation_texts(str(folder / "c.csv"))) == ["x", "y", "five", "six"]
    for name in ("nothing.txt", "a.docx"):
        with pytest.raises(ValueError, match=name):
            list(evaluation_texts(str(folder / name)))


# -- files that were made to do harm


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    data = b'{"text": "before"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "after"}\n'
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind]
    found = read(write(tmp_path / "in", {f"a.{kind}": pack(data)}))
    assert documents(found) == {f"a.{kind}:1": ["before"], f"a.{kind}:3": ["after"]}
    assert reasons(found) == {f"a.{kind}:2": "line_too_long"}


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_bomb_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import tracemalloc

    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    data = bytes(1 << 27)
    pack = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind]
    folder = write(tmp_path / "in", {f"a.{kind}": pack(data)})
    assert (folder / f"a.{kind}").stat().st_size < 200_000
    del data
    tracemalloc.start()
    found = read(folder, kind="text")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reasons(found) == {f"a.{kind}": "line_too_long"}
    assert peak < 80 << 20


def test_a_zstandard_window_that_is_too_large_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(b"") or b""
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(b'{"text": "x"}\n' * 1000) + compressor.flush()
    found = read(write(tmp_path / "in", {"a.jsonl.zst": packed}))
    assert reasons(found) == {"a.jsonl.zst": "damaged_file"}


def test_no_name_reaches_outside_the_input(tmp_path: Path) -> None:
    write(tmp_path, {"secret.png": image(7)})
    outside = str(tmp_path / "secret.png")
    named = {
        "list.csv": f"file,caption\n../secret.png,one\n{outside},two\nlinked/secret.png,three\nlink.png,four\n",
        "docs/a.jsonl": json.dumps({"texts": ["a", None], "images": [None, "../../secret.png"]}),
    }
    folder = write(tmp_path / "in", named)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    found = read(folder)
    assert documents(found) == {}
    assert set(reasons(found).values()) == {"missing_file", "ignored_folder", "ignored_link"}


def test_pipes_and_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.read_file, "__defaults__", (5000,))
    folder = write(tmp_path / "in", {"a.png": image(1), "large.png": bytes(5001)})
    os.mkfifo(folder / "b.txt")
    found = read(folder)
    assert list(documents(found)) == ["a.png"]
    assert reasons(found) == {"b.txt": "ignored_link", "large.png": "file_too_large"}


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
    lines = [
        "[" * 100_000,
        '{"text": 1' + "0" * 9999 + "}",
        '{"text_list": [1, {}], "image_info": 3}',
        '{"texts": [[]], "images": [{}]}',
    ]
    found = read(write(tmp_path / "in", {"a.tar": file.getvalue(), "b.tar": b"x" * 2000, "c.jsonl": "\n".join(lines)}))
    assert documents(found) == {"a.tar:ok": ["text"]}
    expected = {"a.tar:a": "unsafe_member", "a.tar:../b": "unsafe_member", "b.tar": "damaged_file", "c.jsonl:1": "invalid_json"}
    assert expected.items() <= reasons(found).items()
    assert {f"c.jsonl:{n}" for n in (1, 2, 3, 4)} < reasons(found).keys()
