"""Own data to shards: every reader, every reason, and the promises of the split."""

import gzip
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
import zstandard

from pile_app.data.shards import Shards, expand_shards, write_shards
from pile_app.documents import Codes, Document, Segment
from pile_app.prepare.files import pieces_of
from pile_app.prepare.pipeline import Summary, prepare

RATE = 8000


def image(number: int) -> bytes:
    return Segment.from_image(np.full((6, 5, 3), number, np.uint8)).file


def sound(number: int = 0, seconds: float = 0.1, extension: str = "flac") -> bytes:
    wave = 0.5 * np.sin((number + 1) * np.arange(int(seconds * RATE)) / 20)
    return Segment.from_audio(wave, RATE, extension).file


def float_wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, "FLOAT", format="WAV")
    return file.getvalue()


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def read(output: Path, pattern: str = "*.tar") -> list[Document]:
    return list(Shards(str(output / pattern)))


def texts(output: Path, pattern: str = "*.tar") -> list[str]:
    return [document.segments[-1].text for document in read(output, pattern)]


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rejected(output: Path) -> dict[str, str]:
    """Reason by file."""
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert all(set(line) == {"source", "file", "reason", "detail"} for line in lines)
    return {line["file"]: line["reason"] for line in lines}


def run(folder: Path, output: Path, **options: Any) -> Summary:
    return prepare(folder, output, **{"validation_share": 0.0, "processes": 1} | options)


def test_text_files_are_documents(tmp_path: Path) -> None:
    folder = write(tmp_path / "My Notes", {"b.txt": "two  \r\n", "a/x.md": "\ufeffe\u0301", "a.rst": "one", "a/y.bin": "?"})
    summary = run(folder, tmp_path / "out")
    assert texts(tmp_path / "out") == ["one", "two\n", "é"]
    assert [document.meta["file"] for document in read(tmp_path / "out")] == ["a.rst", "b.txt", "a/x.md"]
    assert list(summary.sources) == ["my-notes"]
    assert summary.sources["my-notes"]["train"].text_bytes == 3 + 4 + 2
    assert rejected(tmp_path / "out") == {"a/y.bin": "ignored_extension"}


def test_clean_can_be_turned_off(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.txt": "two  \r\n"})
    run(folder, tmp_path / "out", clean=False)
    assert texts(tmp_path / "out") == ["two  \r\n"]


def test_long_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {number}: " + "é" * (number % 40 + 1) for number in range(200)]
    folder = write(tmp_path / "in", {"a.txt": "\n\n".join(paragraphs)})
    run(folder, tmp_path / "out", document_bytes=512)
    pieces = texts(tmp_path / "out")
    assert len(pieces) > 10
    assert "".join(pieces) == "\n\n".join(paragraphs)
    assert all(piece.startswith("paragraph") and len(piece.encode()) <= 512 for piece in pieces)


@pytest.mark.parametrize("data", [b"", b"ab cd\n" * 9, "猫".encode() * 40, b"x" * 64, b"\x80" * 70, b"a\n\n" + b"b" * 61])
def test_pieces_are_the_file(data: bytes) -> None:
    pieces = list(pieces_of(io.BytesIO(data), len(data), 16))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= 16 for piece in pieces) or data == b""
    if data[:1] != b"\x80":
        assert all(piece.decode() for piece in pieces) or data == b""


PILE = "".join(
    json.dumps({"text": text, "meta": {"pile_set_name": name, "id": 7}}) + "\n"
    for name, text in [("Pile-CC", "web one"), ("Wikipedia (en)", "wiki one"), ("Pile-CC", "web two")]
).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("pile/00.jsonl", PILE),
        ("pile/00.jsonl.gz", gzip.compress(PILE)),
        ("pile/00.jsonl.zst", zstandard.compress(PILE)),
        ("pile/00.jsonl.zst", zstandard.compress(PILE[:40]) + zstandard.compress(PILE[40:])),
    ],
    ids=["plain", "gz", "zst", "zst of two frames"],
)
def test_pile_layout_gives_a_source_a_component(tmp_path: Path, name: str, data: bytes) -> None:
    write(tmp_path, {name: data})
    for number, given in enumerate((tmp_path / "pile", tmp_path / name)):  # the folder, the file alone
        output = tmp_path / f"out{number}"
        summary = run(given, output)
        assert sorted(summary.sources) == ["pile-cc", "wikipedia-en"]
        assert texts(output, "pile-cc-train-*.tar") == ["web one", "web two"]
        assert texts(output, "wikipedia-en-train-*.tar") == ["wiki one"]
        assert read(output, "wikipedia-en-*.tar")[0].meta == {
            "pile_set_name": "Wikipedia (en)",
            "id": 7,
            "file": f"{name[5:]}:2",
        }


def test_bad_lines_and_damaged_files_are_counted(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{",
        b'{"txt": "x"}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": " \\n"}',
        b'{"text": "\\ud800"}',
    ]
    many = "".join(json.dumps({"text": f"{number} {hash(str(number))}"}) + "\n" for number in range(5000)).encode()
    files = {
        "a.jsonl": b"\n\n".join(lines),
        "b.jsonl.zst": zstandard.compress(many)[:-9],
        "c.jsonl.gz": gzip.compress(many)[:-9],
    }
    summary = run(write(tmp_path / "in", files), tmp_path / "out")
    reasons = rejected(tmp_path / "out")
    expected = {3: "invalid_json", 5: "no_text", 7: "no_text", 9: "invalid_utf8", 11: "empty_text", 13: "invalid_utf8"}
    assert {f"a.jsonl:{line}": reason for line, reason in expected.items()}.items() <= reasons.items()
    assert reasons["b.jsonl.zst"] == reasons["c.jsonl.gz"] == "damaged_file"
    assert texts(tmp_path / "out")[0] == "good"
    assert summary.rejected["damaged_file"] == 2


def test_images_with_and_without_captions(tmp_path: Path) -> None:
    files = {"cats/a.png": image(1), "cats/a.txt": "a cat\n", "cats/b.PNG": image(2), "cats/read me.txt": "not a caption"}
    folder = write(tmp_path / "pets", files)
    summary = run(folder, tmp_path / "out", kind="images")
    with_caption, alone = read(tmp_path / "out")
    assert with_caption.segments == (Segment(image(1), "png"), Segment("a cat"))
    assert not with_caption.ordered  # training draws the order of image and caption anew in every epoch
    assert alone.segments == (Segment(image(2), "png"),)
    assert Shards(str(tmp_path / "out" / "pets-train-000000.tar")).index(0).flags.tolist() == [1, 0]
    assert summary.sources["pets"]["train"].images == 2
    assert rejected(tmp_path / "out") == {"cats/read me.txt": "ignored_extension"}

    run(folder, tmp_path / "named", kind="images", caption_from_folder=True)
    assert texts(tmp_path / "named") == ["a cat", "cats"]


def test_auto_joins_what_shares_a_name_and_reads_the_rest(tmp_path: Path) -> None:
    files = {
        "frog.png": image(1),
        "frog.flac": sound(),
        "frog.txt": "A frog.",
        "story.txt": "Once ...",
        "x.jsonl": '{"text": "y"}',
    }
    summary = run(write(tmp_path / "in", files), tmp_path / "out")
    assert [[segment.extension for segment in document.segments] for document in read(tmp_path / "out")] == [
        ["flac", "png", "txt"],
        ["txt"],
        ["txt"],
    ]
    tally = summary.sources["in"]["train"]
    assert (tally.documents, tally.images, tally.audio_seconds) == (3, 1, pytest.approx(0.1))


def test_recordings_with_transcripts(tmp_path: Path) -> None:
    files = {"0.flac": sound(0), "0.txt": "zero", "1.wav": sound(1, extension="wav"), "1.txt": "one"}
    summary = run(write(tmp_path / "in", files), tmp_path / "out", kind="audio")
    assert [document.segments for document in read(tmp_path / "out")] == [
        (Segment(sound(0), "flac"), Segment("zero")),
        (Segment(sound(1, extension="wav"), "wav"), Segment("one")),
    ]
    assert summary.sources["in"]["train"].audio_seconds == pytest.approx(0.2)


def test_tables_name_the_files_that_are_read(tmp_path: Path) -> None:
    files = {
        "train.tsv": 'client\tpath\tsentence\nx\t1.flac\tHe said "no\nx\t2.flac\tsecond\nx\tmissing.flac\tthird\nx\t\tfourth\n',
        "clips/1.flac": sound(1),
        "clips/2.flac": sound(2),
        "clips/3.flac": sound(3),
        "pictures/list.csv": 'Image,Caption\na.png,"red, green"\nb.png,\n',
        "pictures/a.png": image(1),
        "pictures/b.png": image(2),
        "other.csv": "a,b\n1,2\n",
    }
    run(write(tmp_path / "in", files), tmp_path / "out")
    assert sorted(texts(tmp_path / "out")) == ['He said "no', "red, green", "second"]
    assert rejected(tmp_path / "out") == {
        "train.tsv:4": "missing_file",
        "train.tsv:5": "missing_file",
        "clips/3.flac": "not_in_table",
        "pictures/list.csv:3": "empty_text",
        "other.csv": "no_file_column",
    }
    assert not any(document.ordered for document in read(tmp_path / "out"))


def test_bad_media_and_texts_are_counted_by_reason(tmp_path: Path) -> None:
    silence, nan = np.zeros(800, np.float32), np.full(800, np.nan, np.float32)
    files = {
        "good.png": image(1),
        "broken.png": image(2)[:-20],
        "not.jpg": b"hello",
        "silent.wav": float_wav(silence),
        "nan.wav": float_wav(nan),
        "empty.wav": float_wav(silence[:0]),
        "neither.ogg": b"hello",
        "long.flac": sound(seconds=2.0),
        "latin.txt": "é".encode("latin-1"),
        "nothing.txt": "",
        "blank.md": " \n\u00a0",
        "captioned.png": image(3),
        "captioned.txt": b"\xff",
        "kind.gif": b"GIF",
        ".git/readme.txt": "hidden",
    }
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    (tmp_path / "in" / "good-link.png").symlink_to("good.png")
    summary = run(write(tmp_path / "in", files), tmp_path / "out", max_audio_seconds=1.0)
    assert rejected(tmp_path / "out") == {
        "broken.png": "undecodable_image",
        "not.jpg": "undecodable_image",
        "silent.wav": "silent_audio",
        "nan.wav": "nan_audio",
        "empty.wav": "empty_audio",
        "neither.ogg": "undecodable_audio",
        "long.flac": "audio_too_long",
        "latin.txt": "invalid_utf8",
        "nothing.txt": "empty_text",
        "blank.md": "empty_text",
        "captioned.png": "invalid_utf8",
        "kind.gif": "ignored_extension",
        ".git": "ignored_folder",
        "link": "ignored_folder",
        "good-link.png": "ignored_link",
    }
    assert summary.documents == 1
    assert summary.rejected == Counter(rejected(tmp_path / "out").values())
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["rejected"] == dict(summary.rejected)


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    files = {
        "a.txt": "same",
        "b/c.txt": "same  ",
        "d.png": image(1),
        "e.png": image(1),
        "f.png": image(1),
        "f.txt": "captioned",
    }
    summary = run(write(tmp_path / "in", files), tmp_path / "out")
    assert summary.documents == 3
    assert rejected(tmp_path / "out") == {"b/c.txt": "duplicate", "e.png": "duplicate"}
    assert run(tmp_path / "in", tmp_path / "all", exact_duplicates=False).documents == 5


def test_rejected_samples_are_kept_for_review(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "same"})] * 30 + ["{broken"]
    files = {"a.jsonl": "\n".join(lines), "small.png": image(1), "small.txt": "a caption"}
    summary = run(write(tmp_path / "in", files), tmp_path / "out", min_image_size=6)
    assert summary.rejected == {"duplicate": 29, "invalid_json": 1, "image_too_small": 1}
    folder = tmp_path / "out" / "rejected"
    kept = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("*.jsonl"))}
    assert {reason: len(samples) for reason, samples in kept.items()} == {
        "duplicate": 20, "image_too_small": 1, "invalid_json": 1,
    }  # fmt: skip
    assert kept["invalid_json"][0]["segments"] == [{"text": "{broken"}]
    picture, caption = kept["image_too_small"][0]["segments"]
    assert ((folder / picture["file"]).read_bytes(), caption) == (image(1), {"text": "a caption"})
    assert kept["duplicate"][0]["file"] == "a.jsonl:2"


def test_a_document_stays_on_its_side_whatever_is_added(tmp_path: Path) -> None:
    few = {f"{number}.txt": f"text {number}" for number in range(0, 200, 2)}
    many = few | {f"{number}.txt": f"text {number}" for number in range(200)}
    for name, files in {"few": few, "many": many}.items():
        run(write(tmp_path / name, files), tmp_path / f"{name}-out", validation_share=0.3)
    sides = {
        name: {split: set(texts(tmp_path / f"{name}-out", f"{name}-{split}-*.tar")) for split in ("train", "validation")}
        for name in ("few", "many")
    }
    assert sides["few"]["train"] < sides["many"]["train"]
    assert sides["few"]["validation"] < sides["many"]["validation"]
    assert not sides["many"]["train"] & sides["many"]["validation"]
    assert 30 < len(sides["many"]["validation"]) < 90
    run(tmp_path / "many", tmp_path / "other", validation_share=0.3, seed=1)
    assert set(texts(tmp_path / "other", "many-validation-*.tar")) != sides["many"]["validation"]


def test_captions_of_one_image_are_on_one_side(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,caption {caption}\n" for number in range(12) for caption in range(5))
    files = {"list.csv": "file,caption\n" + rows} | {f"{number}.png": image(number) for number in range(12)}
    run(write(tmp_path / "in", files), tmp_path / "out", validation_share=0.5)
    train, validation = (
        Counter(document.segments[0].file for document in read(tmp_path / "out", f"in-{split}-*.tar"))
        for split in ("train", "validation")
    )
    assert not train.keys() & validation.keys()
    assert set((train + validation).values()) == {5}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"{number}.txt": f"text {number} " * 900 for number in range(30)}
    folder = write(tmp_path / "in", files | {"a.png": image(1), "a.wav": sound(extension="wav"), "bad.png": b"bad"})
    for name in "ab":
        run(folder, tmp_path / name, validation_share=0.2, shard_megabytes=0.1)
    contents = [content(tmp_path / name) for name in "ab"]
    assert contents[0] == contents[1]
    assert len([name for name in contents[0] if name.startswith("in-train-") and name.endswith(".tar")]) > 1


def test_what_is_printed_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "123", {f"{number}.txt": f"text {number}" for number in range(50)})
    output = tmp_path / "my shards, new"
    summary = run(folder, output, validation_share=0.3)
    printed = capsys.readouterr()
    sources = yaml.safe_load(printed.out)["data"]["sources"]
    assert list(sources) == ["123"]
    found = {split: expand_shards(pattern) for split, pattern in sources["123"].items()}
    assert {split: len(Shards(paths)) for split, paths in found.items()} == {
        split: tally.documents for split, tally in summary.sources["123"].items()
    }
    assert "documents" in printed.err
    description = json.loads((output / "dataset.json").read_text())
    assert description["sources"]["123"]["train"]["shards"] == "123-train-*.tar"
    assert description["options"]["validation_share"] == 0.3
    assert sorted(path.name for path in output.iterdir() if not path.name.startswith("123-")) == [
        "dataset.json",
        "rejected.jsonl",
    ]


def test_an_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.txt": "one"})
    foreign = write(tmp_path / "foreign", {"thesis.txt": "precious"})
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"foreign.*not the result of an earlier"):
            run(folder, foreign, overwrite=overwrite)
    (tmp_path / "out").mkdir()  # an empty one is fine
    run(folder, tmp_path / "out")
    write(folder, {"a.txt": "changed"})
    with pytest.raises(ValueError, match="overwrite=True"):
        run(folder, tmp_path / "out")
    assert texts(tmp_path / "out") == ["one"]
    run(folder, tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["changed"]
    for inside in (folder / "out", folder, tmp_path):
        with pytest.raises(ValueError, match="lie in each other"):
            run(folder, inside)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "in", "out"]


def test_a_failure_leaves_the_earlier_result_and_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "in", {"a.txt": "one", "b.txt": "two"})
    run(folder, tmp_path / "out")
    write(folder, {"c.txt": "three"})

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pile_app.prepare.pipeline.Shards", full)
        with pytest.raises(OSError, match="no space left"):
            run(folder, tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["one", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.partial"]
    assert "the same command continues" in capsys.readouterr().err
    write(tmp_path / "out.partial" / "result", {"in-train-000000.tar.1.tmp": "of a writer that was killed"})
    run(folder, tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["one", "two", "three"]
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert "1 of 1 units are done" in capsys.readouterr().err


def test_long_names_and_encoded_samples_do_not_end_a_preparation(tmp_path: Path) -> None:
    line = json.dumps({"text": "good", "meta": {"pile_set_name": "\U00010348" * 90}})
    codes = Codes("00" * 16, 4, 0, np.array([1, 2]))
    write_shards([Document((Segment(codes.to_bytes(), "textids"),), "x")], tmp_path / "in", "encoded")
    run(write(tmp_path / "in", {"a.jsonl": line}), tmp_path / "out")
    assert texts(tmp_path / "out") == ["good"]
    assert rejected(tmp_path / "out")["encoded-000000.tar:x"] == "encoded_segment"


def test_an_input_with_nothing_usable_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.docx": "?", "b.txt": "text"})
    with pytest.raises(ValueError, match=r"in'.*kind 'images'.*\*\.png.*found 2 ignored_extension"):
        run(folder, tmp_path / "out", kind="images")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file at all"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "video"}, {"validation_share": 1.0}, {"shard_megabytes": 0}, {"max_audio_seconds": -1}, {"document_bytes": 1}],
)
def test_wrong_arguments_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is .*it has to be"):
        run(write(tmp_path / "in", {"a.txt": "one"}), tmp_path / "out", **wrong)
