"""`pile inspect`: its statistics equal those of the data, and positions show the same as steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from conftest import TinyRun
from PIL import Image

from pile_app.cli import main
from pile_app.data.index import text_counts
from pile_app.data.shards import write_shards
from pile_app.data.sources import segment_tokens
from pile_app.documents import Codes, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.tasks.inspection import decoder, describe_segment, describe_values, inspect_data
from pile_app.training.load import load_run

Make = Callable[..., Segment]


def pile(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def text(content: str, key: str) -> Document:
    return Document((Segment(content),), key)


def of_source(statistics: dict[str, Any], source: str, split: str = "") -> dict[str, Any]:
    (found,) = [one for one in statistics["sources"] if (one["source"], one["split"]) == (source, split)]
    return found


def media_of_page(page: Path) -> list[Path]:
    return [page.parent / unescape(name) for name in re.findall(r'src="(?!data:)([^"]+)"', page.read_text("utf-8"))]


# -- Statistics


def test_texts_are_counted_cut_and_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [5, 10, 29, 61, 100]  # with <begin>, <text> and <end>: 8, 13, 32, 64 and 103 in packs of 64
    shards = tmp_path / "shards"
    write_shards((text("x" * n, str(n)) for n in lengths), shards, "prose-train")
    write_shards([text("a" * 7, "a"), text("b" * 9, "a")], shards, "prose-validation")  # a key twice
    write_shards([text("x" * 9, "z")], shards, "other")
    pile("inspect", shards, "--context", "64", "--output", tmp_path / "out")
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    train = of_source(statistics, "prose", "train")
    assert (train["shards"], train["documents"], train["rejected"]) == (1, 5, {})
    assert train["tokens"] == {"text": 205, "image": 0, "audio": 0, "special": 15, "all": 220}
    assert train["document_tokens"]["minimum"] == 8 and train["document_tokens"]["50%"] == 32
    assert train["document_tokens"]["maximum"] == 103 and train["document_tokens"]["count"] == 5
    assert (train["longer"], train["cut"], train["left_out"]) == (1, 1, 0)
    # 64 | 64 of the long one | its 40 and 8 and 13 | 32; its second piece repeats a token
    assert train["packs"] == 4 and train["fill"] == 221 / 256 and train["padding"] == 1 - train["fill"]
    assert of_source(statistics, "prose", "validation")["rejected"] == {"duplicate_key": 1}
    assert of_source(statistics, "other")["documents"] == 1
    printed = capsys.readouterr().out
    assert "86.3%" in printed and "rejected of prose validation: 1 duplicate_key" in printed


def test_without_codecs_media_are_told_in_pixels_and_seconds(tmp_path: Path, image: Make, sound: Make) -> None:
    documents = [
        Document((image(1), Segment("<script>alert(1)</script>")), "a", ordered=False),
        Document((Segment("what?"), sound(1, 4000)), "b"),
        Document((Segment.from_image(np.zeros((20, 30, 3), np.uint8)),), "c"),
    ]
    write_shards(documents, tmp_path, "media")
    statistics = inspect_data([str(tmp_path / "media-*.tar")], tmp_path / "out")
    media = of_source(statistics, "media")
    assert media["segments"] == {"text": 2, "image": 2, "audio": 1} and media["audio_seconds"] == 0.5
    assert (media["image_pixels"]["minimum"], media["image_pixels"]["maximum"]) == (64, 600)
    assert media["tokens"] == {"text": 30, "image": None, "audio": None, "special": None, "all": None}
    assert media["only_text"] and media["packs"] is None and media["fill"] is None
    assert statistics["vocabulary"] is None and "tokens of images and sounds depend on the codecs" in statistics["notes"][0]

    page = tmp_path / "out" / "documents.html"
    assert "<script>" not in page.read_text() and "&lt;script&gt;" in page.read_text()
    third, first, second = sorted(media_of_page(page), key=lambda path: (path.suffix, path.name))  # as they are stored
    assert np.array_equal(np.asarray(Image.open(first).convert("L")), np.asarray(Image.open(_file(image(1)))))
    assert Image.open(second).size == (30, 20)
    samples, rate = soundfile.read(third)
    assert (len(samples), rate) == (4000, 8000)


def _file(segment: Segment) -> Any:
    import io

    return io.BytesIO(segment.file)


def test_a_run_counts_media_as_its_training_does(tiny_run: TinyRun, tmp_path: Path) -> None:
    statistics = inspect_data([str(tiny_run.folder)], tmp_path)
    _, data, _ = load_run(tiny_run.folder)
    data.setup()
    assert statistics["context"] == 128 and not statistics["notes"]
    for number, name in enumerate(("media", "prose")):
        found, source = of_source(statistics, name, "train"), data.train_data[number]
        counted = [
            segment_tokens(source.index(shard), data.vocabulary, text_counts(source.index(shard), data.tokenizer)[0])
            for shard in range(len(source.paths))
        ]
        assert found["tokens"]["all"] == sum(map(np.sum, counted)) + 2 * found["documents"]
        assert found["documents"] == len(source) == 60 and found["left_out"] == 0
        assert found["packs"] == source.order(data.seed).packs_per_epoch
        assert found["fill"] == pytest.approx(source.tokens.tokens.sum() / (found["packs"] * 128))
    assert of_source(statistics, "media", "train")["tokens"]["image"] == 30 * 4
    assert of_source(statistics, "media", "validation")["documents"] == 8
    assert of_source(statistics, "prose", "train")["cut"] > 0


def test_the_configuration_of_a_run_to_come_does_as_well(tiny_run: TinyRun, tmp_path: Path) -> None:
    both = [inspect_data([str(path)], tmp_path / path.name, samples=0) for path in (tiny_run.folder, tiny_run.config)]
    assert both[0]["sources"] == both[1]["sources"] and both[0]["vocabulary"] == both[1]["vocabulary"]
    shards = inspect_data([str(tiny_run.config), str(tiny_run.shards)], tmp_path / "shards", context=256, samples=0)
    assert of_source(shards, "media (2)", "train")["packs"] == of_source(shards, "media", "train")["packs"]
    assert of_source(shards, "media", "train")["packs"] < of_source(both[0], "media", "train")["packs"]


def test_a_medium_longer_than_the_context_is_told_as_left_out(tiny_run: TinyRun, tmp_path: Path, sound: Make) -> None:
    documents = [Document((sound(n, 8000 * (1 + 5 * (n == 3))), Segment("hm")), str(n)) for n in range(5)]  # 25 codes a second
    write_shards(documents, tmp_path / "long", "long")
    write_shards(documents[3:4], tmp_path / "only", "only")
    paths = [str(tiny_run.config), str(tmp_path / "long"), str(tmp_path / "only")]
    statistics = inspect_data(paths, tmp_path / "out")
    long, only = of_source(statistics, "long"), of_source(statistics, "only")
    assert (long["longer"], long["cut"], long["left_out"], long["packs"]) == (1, 0, 1, 1)
    assert (only["left_out"], only["packs"], only["fill"]) == (1, 0, None)


def test_a_prepared_folder_is_taken_with_its_sources_and_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"text number {n}\n" * 5)
    pile("prepare", tmp_path / "texts", tmp_path / "made", "--validation-fraction", "0.3")
    pile("inspect", tmp_path / "made")
    statistics = json.loads((tmp_path / "made" / "inspect" / "statistics.json").read_text())
    assert {one["split"] for one in statistics["sources"]} == {"train", "validation"}
    assert sum(one["documents"] for one in statistics["sources"]) == 20
    assert (tmp_path / "made" / "inspect" / "documents.html").is_file()
    assert "train" in capsys.readouterr().out


def test_quantiles_are_exact_whatever_the_size() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 256, 999), (10 ** rng.uniform(0, 15, 5000)).astype(np.int64), np.array([2**53, 2**60])):
        found = describe_values(values)
        assert found is not None and (found["count"], found["sum"]) == (len(values), values.sum())
        middle = np.sort(values)[(len(values) + 1) // 2 - 1]
        assert [found[name] for name in ("minimum", "50%", "maximum")] == [values.min(), middle, values.max()]


# -- Duplicates


def test_duplicates_and_leaks_are_found_whatever_the_key(
    tmp_path: Path, image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [text(f"text {n}", str(n)) for n in range(40)]
    train += [text("text 7", "again"), Document((image(1), Segment("one")), "p", ordered=False)]
    held = [
        text("text 3", "leak"),
        text("new", "new"),
        Document((Segment("one"), image(1)), "q", ordered=False),  # the same in a free order
        Document((Segment("one"), image(1)), "r"),  # the same image in another document
        Document((Segment("1"), image(2)), "s"),
    ]
    write_shards(train, tmp_path / "a", "a-train", shard_bytes=20_000)
    write_shards(held, tmp_path / "b", "b-validation")
    pile("inspect", tmp_path / "a", tmp_path / "b", "--duplicates", "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "statistics.json").read_text())["duplicates"]
    assert (found["documents"]["groups"], found["documents"]["copies"], found["documents"]["leaked"]) == (3, 3, 2)
    assert found["documents"]["of_source"] == {"a, train": 1, "b, validation": 2}
    assert sorted(found["documents"]["examples"][:2]) == [
        [["a", "train", "3"], ["b", "validation", "leak"]],
        [["a", "train", "p"], ["b", "validation", "q"]],
    ]
    assert found["documents"]["examples"][2] == [["a", "train", "7"], ["a", "train", "again"]]
    assert (found["images"]["groups"], found["images"]["copies"], found["images"]["leaked"]) == (1, 2, 2)
    assert found["sounds"]["groups"] == found["unreadable"] == 0
    assert "LEAK: 2 of the documents held out" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "documents",
        "documents.html",
        "statistics.json",
    ]


def test_damaged_documents_are_counted_and_shown_as_such(tmp_path: Path) -> None:
    (path,) = write_shards([text(f"text {n}", str(n)) for n in range(3)], tmp_path, "a").paths
    Path(path).write_bytes(Path(path).read_bytes().replace(b"text 1", b"text 2"))
    statistics = inspect_data([path], tmp_path / "out", duplicates=True)
    assert statistics["duplicates"]["unreadable"] == 1 and statistics["duplicates"]["documents"]["groups"] == 0
    assert "checksum" in (tmp_path / "out" / "documents.html").read_text()


# -- Positions


def test_positions_show_what_steps_show(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pile("inspect", tiny_run.folder, "--step", "2", "--output", tmp_path / "step")
    pile("inspect", tiny_run.folder, "--position", "4:8", "--output", tmp_path / "four")
    pile("inspect", tiny_run.folder, "--position", "5", "--output", tmp_path / "one")
    step, four, one = (json.loads((tmp_path / name / "documents.json").read_text()) for name in ("step", "four", "one"))
    assert four["documents"] == step["documents"] and four["positions"] == step["positions"] == [4, 8]
    assert one["documents"] == [document for document in step["documents"] if document["position"] == 5]
    assert (step["step"], four["step"], four["phase"], four["trained"]) == (2, None, "codecs", True)
    pile("inspect", tiny_run.folder, "--position", "7:25", "--output", tmp_path / "many", "--limit", "40")
    many = json.loads((tmp_path / "many" / "documents.json").read_text())
    assert many["phase"] == "codecs, language model" and not many["trained"] and len(many["documents"]) == 40
    assert [document["step"] for document in many["documents"]] == [d["position"] // 4 + 1 for d in many["documents"]]
    assert f"{tiny_run.folder}: position 5, " in capsys.readouterr().out


def test_the_page_shows_every_document_and_only_files_beside_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    pile("inspect", tiny_run.folder, "--position", "8:24", "--output", tmp_path)
    documents = json.loads((tmp_path / "documents.json").read_text())["documents"]
    page = (tmp_path / "documents.html").read_text()
    files = [segment["file"] for one in documents for segment in one["segments"] if "file" in segment]
    assert {Path(file).suffix for file in files} == {".png", ".flac"}
    assert [path.name for path in media_of_page(tmp_path / "documents.html")] == files
    assert all(path.is_file() for path in media_of_page(tmp_path / "documents.html"))
    assert page.count('class="card"') == len(documents) and "http://" not in page and "https://" not in page
    for one in documents:
        assert f"<b>{one['key']}</b>" in page
        assert all(segment["text"] in unescape(page) for segment in one["segments"] if "text" in segment)
    assert any(segment["hidden"] for one in documents for segment in one["segments"]) == (">hidden<" in page)


def test_what_is_stored_encoded_is_decoded_by_the_run(tiny_model: Callable[..., FusedLanguageModel]) -> None:
    decode = decoder(tiny_model())

    def encoded(extension: str, values: list[int]) -> Segment:
        codes = Codes("00" * 16, 4, 8000 * (extension == "audiocodes"), np.array(values))
        return Segment(codes.to_bytes(), extension, loss=False)

    written = decode(encoded("textids", list("grüß".encode())))
    assert written is not None and (written.data, written.loss) == ("grüß", False)
    drawn = decode(encoded("imagecodes", [0, 3, 11, 5]))
    assert drawn is not None and Image.open(_file(drawn)).size == (8, 8)
    heard = decode(encoded("audiocodes", [1, 2, 3]))
    assert heard is not None and len(soundfile.read(_file(heard))[0]) == 3 * 320
    assert decode(encoded("imagecodes", [0, 1, 2])) is None  # of another codec
    assert decode(encoded("audiocodes", [36])) is None
    entry = describe_segment(Segment(b"damaged", "textids"), Path("unused"), decode)
    assert "damaged_codes" in entry["note"]


# -- What cannot be


def test_what_cannot_be_inspected_is_told_in_one_line(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit):
            pile("inspect", *arguments, "--output", tmp_path / "out")
        error = capsys.readouterr().err
        assert error.startswith("pile: error: ") and error.count("\n") == 1, error
        return error

    run = tiny_run.folder
    (tmp_path / "dataset.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("model: [")
    assert "is not what `pile prepare` writes" in fails(tmp_path)
    assert "no shard matches" in fails(tmp_path / "empty")
    assert "does not exist" in fails(tmp_path / "x.tar")
    assert "is not a configuration" in fails(tmp_path / "bad.yaml")
    assert "is a second run or configuration" in fails(run, tiny_run.config)
    assert "context=4" in fails(run, "--context", "4") and "samples=-1" in fails(run, "--limit", "-1")
    assert "not both" in fails(run, "--step", "1", "--position", "1")
    assert "take one run" in fails(run, run, "--step", "1") and "take one run" in fails(run, "--step", "1", "--duplicates")
    assert "neither a position" in fails(run, "--position", "1-2")
    assert "0 <= START < STOP, not 3:3" in fails(run, "--position", "3:3") and "not -1:2" in fails(run, "--position=-1:2")


def test_shards_are_inspected_by_the_installed_command(tmp_path: Path) -> None:
    write_shards([text("one", "1")], tmp_path, "a")
    command = [sys.executable, "-m", "pile_app.cli", "inspect", "a-*.tar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "inspect/documents.html" in done.stdout and (tmp_path / "inspect" / "documents.html").is_file()
