"""Situations that users of webdataset, datasets, img2dataset, axolotl and others reported, tried with `pile prepare`."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from layouts import (
    COMMON_VOICE,
    Balance,
    Choices,
    Doc,
    Given,
    chat,
    commas,
    doc,
    lines,
    parquet,
    picture,
    printed_options,
    read_back,
    read_balance,
    shown,
    sound,
    struct,
    tabs,
    tar,
    write,
)
from PIL import Image

from pile_app.data.shards import expand_shards
from pile_app.prepare.pipeline import prepare


def run(folder: Path, files: Mapping[str, str | bytes], name: str = "", **options: Any) -> tuple[list[str], Balance]:
    """Prepare these files, or only the file `name`. Return the documents as lines, and the balance."""
    write(folder / "in", files)
    prepare(folder / "in" / name, folder / "out", **{"processes": 1, "validation_fraction": 0} | options)
    documents = [shown(document) for some in read_back(folder / "out").values() for document in some]
    balance = read_balance(folder / "out")
    assert balance.documents == len(documents)
    return sorted(documents), balance


def expect(*documents: Doc) -> list[str]:
    return sorted(map(shown, documents))


# -- WebDataset


def test_dots_in_names_do_not_merge_samples(tmp_path: Path) -> None:
    members = [("a.b.jpg", picture(0)), ("a.b.txt", "of b"), ("a.c.jpg", picture(1)), ("a.c.txt", "of c")]
    documents, _ = run(tmp_path, {"x.tar": tar([*members, ("d.jpg", picture(2)), ("d.txt", "of d")])})
    assert documents == expect(doc(picture(0), "of b"), doc(picture(1), "of c"), doc(picture(2), "of d"))


def test_members_of_a_sample_need_not_be_adjacent(tmp_path: Path) -> None:
    members = [("1.jpg", picture(1)), ("2.jpg", picture(2)), ("1.txt", "one"), ("2.txt", "two")]
    documents, _ = run(tmp_path, {"x.tar": tar(members)})
    assert documents == expect(doc(picture(1), "one"), doc(picture(2), "two"))


def test_macos_resource_forks_are_no_samples(tmp_path: Path) -> None:
    members = [("./._1.jpg", b"\0\5\26\7Mac OS X"), ("./1.jpg", picture(1)), ("./._1.txt", b"\0\5\26\7Mac"), ("./1.txt", "one")]
    documents, balance = run(tmp_path, {"x.tar": tar(members), ".DS_Store": "Bud1", "__MACOSX/._x.tar": "Mac"})
    assert documents == expect(doc(picture(1), "one")) and len(balance.unread) == 4


def test_an_empty_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty\.tar"):
        run(tmp_path, {"empty.tar": tar([])})


def test_a_failed_download_is_rejected(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data) for n in range(9) for kind, data in (("jpg", picture(n)), ("json", "{}"), ("txt", f"t {n}"))
    ]
    failed = json.dumps({"status": "failed_to_download", "caption": "nothing"})
    documents, balance = run(tmp_path, {"x.tar": tar([*members, ("9.json", failed), ("9.txt", "nothing")])})
    assert len(documents) == 9
    assert sum(balance.rejected.values()) == 1


# -- media


@pytest.mark.parametrize("kind", ["avif", "bmp", "tiff", "tif", "gif", "jfif", "jpe", "webp"])
def test_pictures_of_every_kind_keep_their_captions(tmp_path: Path, kind: str) -> None:
    documents, _ = run(tmp_path, {f"a.{kind}": picture(1, kind), "a.txt": "a cat"})
    assert documents == expect(doc(picture(1, kind), "a cat"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["heic", "svg", "mp4"])
def test_a_text_whose_medium_cannot_be_read_is_no_text_document(tmp_path: Path, kind: str, packed: bool) -> None:
    files: dict[str, str | bytes] = {
        f"a.{kind}": b"\0\0\0\x18ftypheic",
        "a.txt": "a cat",
        "b.jpg": picture(1),
        "b.txt": "a dog",
    }
    documents, balance = run(tmp_path, {"x.tar": tar(files.items())} if packed else files)
    assert documents == expect(doc(picture(1), "a dog"))
    assert sum(balance.rejected.values()) == 1


def test_opus_with_transcripts(tmp_path: Path) -> None:
    documents, _ = run(tmp_path, {"a.opus": sound(1, "opus", 48_000), "a.txt": "hello"})
    assert documents == expect(doc(sound(1, "opus", 48_000), "hello"))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.open(io.BytesIO(picture(n, "png"))) for n in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    documents, _ = run(tmp_path, {"a.gif": file.getvalue(), "a.txt": "it moves"})
    assert documents == [f"<unknown medium of {len(file.getvalue()):,} bytes> 'it moves'"]


def test_names_that_nearly_match_are_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files: dict[str, str | bytes] = {
        "c.jpg": picture(1), "c.jpg.txt": "of c", "b.jpg": picture(2), "b.0.txt": "of b", "e.jpg": picture(3), "E.txt": "of e",
        "d.jpg": picture(4), "d.txt": "of d",
    }  # fmt: skip
    documents, _ = run(tmp_path, files)
    said = capfd.readouterr().err
    pairs = {"c.jpg.txt": doc(picture(1), "of c"), "b.0.txt": doc(picture(2), "of b"), "E.txt": doc(picture(3), "of e")}
    for name, pair in pairs.items():
        assert shown(pair) in documents or name in said
        assert shown(doc(pair.segments[1])) not in documents


# -- encodings and tables


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_with_a_mark_are_detected(tmp_path: Path, encoding: str) -> None:
    text, mark = "Füße, naïve café\n", "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    rows = mark + commas([("text", "label"), ("Grüße", "de"), ("été", "fr")])
    documents, _ = run(tmp_path, {"a.txt": (mark + text).encode(encoding), "b.csv": rows.encode(encoding)})
    assert documents == expect(doc(text), doc("Grüße", label="de"), doc("été", label="fr"))


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_other_encodings_are_read_or_refused_with_the_fix(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, encoding: str
) -> None:
    text = "text\n" * name.endswith("csv") + "Füße und Straßen\n"
    try:
        documents, _ = run(tmp_path, {name: text.encode(encoding)})
        assert "Füße und Straßen" in documents[0]
    except ValueError as error:
        assert name in str(error) + capfd.readouterr().err
        assert "encoding" in str(error)


def test_rows_with_more_cells_than_the_header_are_rejected(tmp_path: Path) -> None:
    table = "text,label\ngood one,pos\nwell, it has a comma,neg\nfine too,neg\n"
    documents, balance = run(tmp_path, {"a.csv": table})
    assert documents == expect(doc("good one", label="pos"), doc("fine too", label="neg"))
    assert sum(balance.rejected.values()) == 1


def test_an_unclosed_quote_does_not_swallow_the_table(tmp_path: Path) -> None:
    rows = "".join(f"row number {n},pos\n" for n in range(50))
    table = 'text,label\nfirst,neg\n"never closed,neg\n' + rows
    documents, balance = run(tmp_path, {"a.csv": table})
    assert shown(doc("first", label="neg")) in documents
    assert len(documents) + sum(balance.rejected.values()) == 52
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert len(documents) >= 51 or "a.csv:3" in rejected


@pytest.mark.parametrize("options", [{}, {"kind": "text"}])
def test_a_table_with_only_a_column_of_texts(tmp_path: Path, options: dict[str, Any]) -> None:
    documents, _ = run(tmp_path, {"a.csv": "text\nfirst text\nsecond text\n"}, **options)
    assert documents == expect(doc("first text"), doc("second text"))


def test_title_and_text_are_both_kept(tmp_path: Path) -> None:
    documents, _ = run(
        tmp_path, {"a.csv": commas([("label", "title", "text"), (1, "The title", "The text."), (2, "Two", "Both.")])}
    )
    assert documents == expect(doc("The title", "The text.", label="1"), doc("Two", "Both.", label="2"))


def test_common_voice_without_validated(tmp_path: Path) -> None:
    """The rejected recordings are no training data."""
    rows = [(f"c{n}", f"v{n}.mp3", f"{n}", f"sentence {n}", "", 2, 0, "", "", "", "", "en", "") for n in range(4)]
    tables = {"train": rows[:1], "invalidated": rows[1:3], "other": rows[3:]}
    files: dict[str, str | bytes] = {f"{name}.tsv": tabs([COMMON_VOICE, *some]) for name, some in tables.items()}
    documents, _ = run(tmp_path, files | {f"clips/v{n}.mp3": sound(n, "mp3") for n in range(4)})
    assert documents == expect(doc(sound(0, "mp3"), "sentence 0", group="c0"))


# -- JSON under every name


RECORDS = [{"text": f"text number {n}"} for n in range(3)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ndjson", lines(RECORDS).encode()),
        ("a.json", lines(RECORDS).encode()),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.json", json.dumps({"version": "1", "data": RECORDS}).encode()),
        ("a.json.gz", gzip.compress(lines(RECORDS).encode())),
        ("a.jsonl.bz2", bz2.compress(lines(RECORDS).encode())),
        ("a.jsonl.xz", lzma.compress(lines(RECORDS).encode())),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
    ],
    ids=["ndjson", "lines in .json", "array", "array in an object", "json.gz", "bz2", "xz", "array in gz"],
)
def test_json_is_known_by_its_content(tmp_path: Path, name: str, data: bytes) -> None:
    documents, _ = run(tmp_path, {name: data})
    assert documents == expect(*(doc(record["text"]) for record in RECORDS))


# -- Parquet


def test_parquet_with_several_captions(tmp_path: Path) -> None:
    columns = {
        "image": [struct(picture(n)) for n in range(2)],
        "captions": [["one a", "one b"], ["two a", "two b"]],
        "height": [8, 8],
    }
    documents, balance = run(tmp_path, {"a.parquet": parquet(columns)})
    assert documents == expect(doc(picture(0), Choices(("one a", "one b"))), doc(picture(1), Choices(("two a", "two b"))))
    assert balance.unused == {"height": 2}


def test_parquet_with_conversations(tmp_path: Path) -> None:
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {n}."}] for n in range(2)]
    documents, _ = run(
        tmp_path, {"a.parquet": parquet({"image": [struct(picture(n)) for n in range(2)], "conversations": turns})}
    )
    assert documents == expect(*(chat("user", picture(n), "What?", "assistant", f"It is {n}.") for n in range(2)))


def test_parquet_with_question_and_answers(tmp_path: Path) -> None:
    columns = {
        "image": [struct(picture(n)) for n in range(2)],
        "question": ["What color?", "How many?"],
        "answers": [["red", "pink"], ["2", "two"]],
    }
    documents, _ = run(tmp_path, {"a.parquet": parquet(columns)})
    questions = [(Given("What color?"), Choices(("red", "pink"))), (Given("How many?"), Choices(("2", "two")))]
    assert documents == expect(*(doc(picture(n), *texts) for n, texts in enumerate(questions)))


# -- chats


def test_chats_are_recognized(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]} for n in range(3)
    ]
    documents, _ = run(tmp_path, {"chats.jsonl": lines(records)})
    assert documents == expect(*(chat("user", f"Q{n}", "assistant", f"A{n}") for n in range(3)))


def test_what_can_be_kept_of_a_chat_with_tools_is_kept(tmp_path: Path) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ]
    documents, _ = run(tmp_path, {"a.jsonl": lines([{"messages": messages}])})
    assert documents == expect(chat("user", "Rain?", "dry", "assistant", "No."))
    description = (tmp_path / "out" / "dataset.json").read_text()
    assert "tool_call" in description  # dropped parts are counted


def test_an_answer_of_weight_0_is_not_learned(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "R"},
        {"role": "assistant", "content": "good"},
    ]
    documents, _ = run(tmp_path, {"a.jsonl": lines([{"messages": messages}])})
    assert documents == expect(doc(*map(Given, ("\2", "Q", "\3", "bad", "\2", "R", "\3")), "good", "\2"))


# -- folders


def test_a_folder_of_links(tmp_path: Path) -> None:
    """The cache of the hub holds links to files without extension."""
    write(tmp_path, {"blobs/1a2b": picture(1), "blobs/3c4d": lines([{"file_name": "0.jpg", "text": "a cat"}])})
    snapshot = tmp_path / "in"
    snapshot.mkdir()
    (snapshot / "0.jpg").symlink_to("../blobs/1a2b")
    (snapshot / "metadata.jsonl").symlink_to("../blobs/3c4d")
    with pytest.raises(ValueError, match=r"link"):  # said, with the option that follows them
        run(tmp_path, {})


@pytest.mark.parametrize("name", ["br[0]x", "cur{a,b}", "what?", "a*b", "with space"])
def test_printed_sources_match_the_shards(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", {"a.txt": "a text"})
    try:
        prepare(tmp_path / "in", tmp_path / name, processes=1, validation_fraction=0)
    except ValueError as error:
        assert name in str(error)
        return
    source = printed_options(capsys.readouterr().out)["--data.sources"]["in"]
    assert len(expand_shards(source["train"])) == 1


# -- messages


def test_nothing_usable_shows_the_first_row_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        run(tmp_path, {"a.csv": "a,b\n1,2\n3,4\n"})
    message = str(error.value)
    assert "a.csv" in message
    assert "fields" in message
    assert "1" in message and "2" in message


def test_a_broken_file_alone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet"):
        run(tmp_path, {"a.parquet": b"PAR1 no, not at all"})


def test_interrupting_takes_one_line(tmp_path: Path) -> None:
    write(tmp_path / "in", {f"{n}.txt": f"text {n} " * 2000 for n in range(2500)})
    command = [sys.executable, "-c", "from pile_app.cli import main; main()", "prepare", "in", "out", "--processes", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True, env=dict(os.environ)
    )
    for _ in range(600):
        if any((tmp_path / "out.partial").glob("spill/*")) or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT, 2)
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 5, said  # with the progress of the reading
