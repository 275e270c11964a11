"""`pile prepare`: the balance, field maps, splits, labels and long sounds, through `prepare` and the command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import printed_options

from pile_app.documents import Document, Segment
from pile_app.fields import document_from_sample
from pile_app.media import audio_size
from pile_app.prepare.pipeline import Summary, prepare

RATE = 8000


def image(number: int) -> bytes:
    return Segment.from_image(np.full((6, 5, 3), number, np.uint8)).file


def sound(number: int = 0, seconds: float = 0.1, extension: str = "flac") -> bytes:
    wave = 0.5 * np.sin((number + 1) * np.arange(int(seconds * RATE)) / 20)
    return Segment.from_audio(wave, RATE, extension).file


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def lines(*records: Mapping[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(output: Path, pattern: str = "*.tar") -> list[Document]:
    """The documents of shards, by `tarfile` alone."""
    documents = []
    for path in sorted(output.glob(pattern)):
        with tarfile.open(path) as tar:
            members = [(*member.name.split(".", 1), tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        for key, files in groupby(members, lambda member: member[0]):
            documents.append(document_from_sample(key, {name: data for _, name, data in files}))
    return documents


def texts(output: Path, pattern: str = "*.tar") -> list[str]:
    return [document.segments[-1].text for document in read(output, pattern)]


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rejected(output: Path) -> dict[str, str]:
    """Reason by file."""
    found = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert all(set(line) == {"source", "file", "reason", "detail", "excerpt"} for line in found)
    return {line["file"]: line["reason"] for line in found}


def run(folder: Path, output: Path, **options: Any) -> Summary:
    return prepare(folder, output, **{"validation_fraction": 0.0, "processes": 1} | options)


# -- balance


def test_everything_that_was_read_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"text": f"text {n % 8}", "url": "u", "tags": ["a"]} for n in range(10)]
    files = {
        "a.jsonl": lines(*records) + "{broken\n",
        "photos/0.png": image(0), "photos/0.txt": "zero", "photos/1.png": b"\x89PNG damaged", "photos/1.txt": "one",
        "thing.docx": "?",
    }  # fmt: skip
    summary = run(write(tmp_path / "in", files), tmp_path / "out")
    balance = json.loads((tmp_path / "out" / "dataset.json").read_text())["balance"]
    assert balance == summary.balance()
    assert (balance["samples"], balance["documents"], balance["rejected"]) == (13, 9, 4)
    assert summary.rejected == {"duplicate": 2, "invalid_json": 1, "undecodable_image": 1}
    assert balance["fields"] == balance["used"] + balance["unused"] == 10 * 3 + 4
    assert balance["unused_fields"] == {"tags": 10, "url": 10}
    assert sum(balance["files_not_read"].values()) == 1
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 4 + 1
    said = capsys.readouterr().err
    for line in (
        "fields: [text]",
        "fields: [png, txt, shuffle]",
        "samples: 13 read",
        "= 9 documents + 4 rejected",
        "url: 10 unused",
    ):
        assert line in said


def test_a_sample_that_is_lost_uncounted_is_a_bug_that_ends_the_preparation(tmp_path: Path) -> None:
    summary = Summary(tmp_path)
    summary.counts["read:table"] = 2
    with pytest.raises(AssertionError, match="2 samples"):
        summary.balance()


def test_rejected_samples_can_be_recognized(tmp_path: Path) -> None:
    records = {"a.jsonl": lines({"text": "good"}, {"text": "good too"}, {"number": 7})}
    run(write(tmp_path / "in", records), tmp_path / "out")
    (line,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert line["file"] == "a.jsonl:3" and line["reason"] == "missing_field" and line["excerpt"] == "number: 7"


# -- field maps


def test_a_field_map_may_be_given_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"premise": f"it rains {n}", "hypothesis": "it is wet", "gold": 1, "text": "not asked for"} for n in range(3)]
    fields = "[{text: premise, loss: false}, hypothesis, {label: gold}]"
    run(write(tmp_path / "in", {"a.jsonl": lines(*records)}), tmp_path / "out", fields=fields)
    first = read(tmp_path / "out")[0]
    assert [(one.text, one.loss) for one in first.segments] == [("it rains 0", False), ("it is wet", True)]
    assert first.meta["label"] == "1"
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["fields"] == [f"{fields}  (given)"] and described["balance"]["unused_fields"] == {"text": 3}
    assert f"fields: {fields}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="fields: 'wrong: \\[' is not YAML"):
        run(tmp_path / "in", tmp_path / "other", fields="wrong: [")


def test_tables_of_different_columns_have_field_maps_of_their_own(tmp_path: Path) -> None:
    files = {
        "one.jsonl": lines({"text": "first text"}, {"text": "second text"}),
        "two.jsonl": lines({"question": "what?", "answer": "that"}),
        "in/three-00.jsonl": lines(*({"content": f"content {n}"} for n in range(3))),
        "in/three-01.jsonl": lines({"content": "content 4", "extra": 1}),
    }
    summary = run(write(tmp_path / "in", files), tmp_path / "out")
    assert sorted(map(len, (document.segments for document in read(tmp_path / "out")))) == [1] * 6 + [2]
    assert {line.partition("  ")[0] for line in summary.maps} == {
        "[text]",
        "[{text: question, loss: false}, answer]",
        "[content]",
    }
    assert summary.balance()["unused_fields"] == {"extra": 1}


def test_pictures_and_captions_of_one_folder_and_texts_of_another(tmp_path: Path) -> None:
    pairs = {f"photos/{n}.png": image(n) for n in range(9)} | {f"photos/{n}.txt": f"photo {n}" for n in range(8)}
    summary = run(
        write(tmp_path / "in", pairs | {f"stories/{n}.txt": f"Once upon a time there was a story, {n}." for n in range(3)}),
        tmp_path / "out",
    )
    kinds = Counter(tuple(segment.extension for segment in document.segments) for document in read(tmp_path / "out"))
    assert kinds == {("png", "txt"): 8, ("png",): 1, ("txt",): 3}
    assert not any(document.ordered for document in read(tmp_path / "out") if len(document.segments) > 1)
    assert not summary.rejected


# -- labels


def classes(output: Path) -> list[tuple[list[str], str]]:
    return [([segment.text for segment in document.segments], document.meta["label"]) for document in read(output)]


def test_a_label_is_not_learned_unless_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(
        tmp_path / "in", {"a.jsonl": lines(*({"text": f"text {n}", "label": "no" if n % 2 else "yes"} for n in range(4)))}
    )
    summary = run(folder, tmp_path / "out")
    assert classes(tmp_path / "out")[:2] == [(["text 0"], "yes"), (["text 1"], "no")]
    assert summary.labels == ["no", "yes"]
    printed = printed_options(capsys.readouterr().out)
    assert printed["--model.objective.init_args.labels"] == ["no", "yes"]
    assert set(printed["--data.sources"]) == {"in"}
    run(folder, tmp_path / "learned", learn_label=True)
    assert classes(tmp_path / "learned")[0] == (["text 0", "yes"], "yes")
    run(folder, tmp_path / "only", learn_label=True, label_loss_only=True)
    assert [segment.loss for segment in read(tmp_path / "only")[0].segments] == [False, True]
    with pytest.raises(ValueError, match="label_loss_only needs learn_label"):
        run(folder, tmp_path / "wrong", label_loss_only=True)


def test_names_are_given_to_the_labels_that_there_are(tmp_path: Path) -> None:
    """AG News: labels 1 to 4; names were given to 0 to 3, and a quarter of the rows was dropped."""
    records = [{"label": n % 4 + 1, "title": f"title {n}", "description": f"description {n}"} for n in range(12)]
    records += [{"label": 10, "title": "last", "description": "of ten"}] * 2
    folder = write(tmp_path / "in", {"a.jsonl": lines(*records)})
    names = ["World", "Sports", "Business", "Sci/Tech", "Ten"]
    summary = run(folder, tmp_path / "out", label_names=names, exact_duplicates=False)
    found = classes(tmp_path / "out")
    assert [label for _, label in found] == names[:4] * 3 + ["Ten"] * 2 and found[0][0] == ["title 0", "description 0"]
    assert summary.labels == names and not summary.rejected
    run(folder, tmp_path / "learned", label_names=names, learn_label=True)
    assert classes(tmp_path / "learned")[1] == (["title 1", "description 1", "Sports"], "Sports")
    with pytest.raises(ValueError, match=r"2 names \(a, b\) to 5 labels \(1, 2, 3, 4, 10\)"):
        run(folder, tmp_path / "wrong", label_names=["a", "b"])
    run(folder, tmp_path / "wrong", label_names=names)  # nothing has to be read again
    assert content(tmp_path / "wrong")["in-train-000000.tar"] != b""


def test_a_label_may_be_another_column_or_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.jsonl": lines({"text": "fine film", "stars": 5}, {"text": "bad film"})})
    summary = run(tmp_path / "in", tmp_path / "out", label="stars")
    assert classes(tmp_path / "out") == [(["fine film"], "5")] and summary.rejected == {"no_label": 1}
    write(tmp_path / "folders", {"pos/0.txt": "fine", "neg/0.txt": "bad", "1.txt": "nowhere"})
    summary = run(tmp_path / "folders", tmp_path / "out2", label_from_folder=True)
    assert sorted(classes(tmp_path / "out2")) == [(["bad"], "neg"), (["fine"], "pos")] and summary.of("unread") == {
        "no_label": 1
    }


# -- splits


@pytest.mark.parametrize(("documents", "expected"), [(4, 0), (5, 1), (43, 8), (160, 32), (400, 32), (1000, 50)])
def test_the_default_validation_split_is_useful(tmp_path: Path, documents: int, expected: int) -> None:
    """5 %, at least 32, at most 20 %: 1 % of 43 recordings was none."""
    folder = write(tmp_path / "in", {"a.jsonl": lines(*({"text": f"text {n}"} for n in range(documents)))})
    sources = prepare(folder, tmp_path / "out", processes=1).sources["in"]
    assert (sources["validation"].documents if expected else 0) == expected == documents - sources["train"].documents


def test_a_set_without_validation_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(write(tmp_path / "in", {"a.txt": "a"}), tmp_path / "out", processes=1)
    assert "in has no validation documents: set --validation-fraction" in capsys.readouterr().err


def test_a_group_is_in_one_split(tmp_path: Path) -> None:
    records = [{"text": f"text {n}", "speaker": f"speaker {n % 23}"} for n in range(230)]
    prepare(write(tmp_path / "in", {"a.jsonl": lines(*records)}), tmp_path / "out", processes=1)
    groups = [{one.meta["group"] for one in read(tmp_path / "out", f"*-{split}-*.tar")} for split in ("train", "validation")]
    assert len(groups[0] | groups[1]) == 23 and not groups[0] & groups[1]
    assert 32 <= len(read(tmp_path / "out", "*-validation-*.tar")) <= 46


def test_given_splits_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{name}.jsonl": lines(*({"text": f"{name} {n}"} for n in range(40))) for name in ("train", "validation", "test")}
    prepare(write(tmp_path / "in", files), tmp_path / "out", processes=1)
    for split in ("train", "validation", "test"):
        assert {text.split()[0] for text in texts(tmp_path / "out", f"*-{split}-*.tar")} == {split}
    assert set(printed_options(capsys.readouterr().out)["--data.sources"]["in"]) == {"train", "validation"}
    mixed = prepare(tmp_path / "in", tmp_path / "mixed", processes=1, given_splits=False)
    assert set(mixed.sources["in"]) == {"train", "validation"} and mixed.sources["in"]["validation"].documents == 24


def test_evaluation_sets_are_not_learned_where_no_training_set_is_named(tmp_path: Path) -> None:
    files = {f"{name}.jsonl": lines(*({"text": f"{name} {n}"} for n in range(10))) for name in ("reviews", "reviews-test")}
    sources = prepare(write(tmp_path / "in", files), tmp_path / "out", processes=1).sources["in"]
    assert {split: tally.documents for split, tally in sources.items()} == {"train": 8, "validation": 2, "test": 10}
    files = {f"{name}/a.jsonl": lines({"text": name}) for name in ("dev-clean", "test-clean")}
    assert set(prepare(write(tmp_path / "two", files), tmp_path / "out2", processes=1).sources["two"]) == {"validation", "test"}


def test_a_column_may_name_the_split_and_a_missing_validation_split_is_drawn_from_training(tmp_path: Path) -> None:
    records = [{"text": f"text {n}", "split": "test" if n < 10 else "train"} for n in range(110)]
    sources = prepare(write(tmp_path / "in", {"a.jsonl": lines(*records)}), tmp_path / "out", processes=1).sources["in"]
    assert {split: tally.documents for split, tally in sources.items()} == {"train": 80, "validation": 20, "test": 10}
    assert sorted(texts(tmp_path / "out", "*-test-*.tar")) == [f"text {n}" for n in range(10)]


def test_with_a_fraction_a_document_stays_in_its_split_whatever_is_added(tmp_path: Path) -> None:
    few = {f"{number}.txt": f"text {number}" for number in range(0, 200, 2)}
    many = few | {f"{number}.txt": f"text {number}" for number in range(200)}
    for name, files in {"few": few, "many": many}.items():
        run(write(tmp_path / name, files), tmp_path / f"{name}-out", validation_fraction=0.3)
    sides = {
        name: {split: set(texts(tmp_path / f"{name}-out", f"{name}-{split}-*.tar")) for split in ("train", "validation")}
        for name in ("few", "many")
    }
    assert sides["few"]["train"] < sides["many"]["train"] and sides["few"]["validation"] < sides["many"]["validation"]
    assert not sides["many"]["train"] & sides["many"]["validation"] and 30 < len(sides["many"]["validation"]) < 90
    run(tmp_path / "many", tmp_path / "other", validation_fraction=0.3, seed=1)
    assert set(texts(tmp_path / "other", "many-validation-*.tar")) != sides["many"]["validation"]


def test_texts_with_two_labels_and_images_with_several_captions_are_in_one_split(tmp_path: Path) -> None:
    rows = lines(*({"text": str(n // 2), "label": n % 2} for n in range(200)))
    run(write(tmp_path / "in", {"all.jsonl": rows}), tmp_path / "out", validation_fraction=0.5)
    sides = [set(texts(tmp_path / "out", f"*-{split}-*.tar")) for split in ("train", "validation")]
    assert len(sides[0] | sides[1]) == 100 and not sides[0] & sides[1]
    photos = {f"{caption}/{n}.png": image(n) for n in range(12) for caption in range(3)}
    captions = {f"{caption}/{n}.txt": f"caption {caption}" for n in range(12) for caption in range(3)}
    run(write(tmp_path / "photos", photos | captions), tmp_path / "out2", validation_fraction=0.5)
    files = [{one.segments[0].file for one in read(tmp_path / "out2", f"*-{split}-*.tar")} for split in ("train", "validation")]
    assert len(files[0] | files[1]) == 12 and not files[0] & files[1]


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    photos = {"d/d.png": image(1), "d/e.png": image(1), "d/f.png": image(1), "d/f.txt": "captioned"}
    files = photos | {"a.txt": "same", "b/c.txt": "same  "}
    summary = run(write(tmp_path / "in", files), tmp_path / "out")
    assert summary.documents == 4 - 1 and sorted(summary.rejected.elements()) == ["duplicate"] * 2
    assert run(tmp_path / "in", tmp_path / "all", exact_duplicates=False).documents == 5


def test_of_equal_documents_that_of_the_evaluation_set_is_kept(tmp_path: Path) -> None:
    files = {f"{name}.jsonl": lines({"text": "same"}, {"text": name}) for name in ("a-train", "b-validation", "c-test")}
    run(write(tmp_path / "in", files), tmp_path / "out")
    assert texts(tmp_path / "out", "*-test-*.tar") == ["same", "c-test"]
    assert rejected(tmp_path / "out") == {"a-train.jsonl:1": "duplicate", "b-validation.jsonl:1": "duplicate"}


# -- long sounds


def seconds(document: Document) -> float:
    samples, rate = audio_size(document.segments[0].file)
    return samples / rate


def test_a_long_sound_is_cut_with_its_part_of_the_transcript(tmp_path: Path) -> None:
    """A Whisper-style JSON: the sound is not lost, and each piece has its words."""
    parts = [{"start": 2.0 * n, "end": 2.0 * n + 1.6, "text": f" part {n}."} for n in range(10)]
    whisper = {"text": "".join(part["text"] for part in parts), "segments": parts, "speaker": "ann"}
    files = {
        "a.flac": sound(1, 20.0),
        "a.json": json.dumps(whisper),
        "b.flac": sound(2, 2.0),
        "b.json": json.dumps({"text": "short"}),
    }
    summary = run(write(tmp_path / "in", files), tmp_path / "out", max_audio_seconds=6.0)
    *pieces, short = read(tmp_path / "out")
    assert [piece.segments[1].text for piece in pieces] == ["part 0. part 1. part 2.", "part 3. part 4. part 5.",
                                                            "part 6. part 7. part 8.", "part 9."]  # fmt: skip
    assert all(seconds(piece) <= 6.0 for piece in pieces) and sum(map(seconds, pieces)) > 19
    assert {piece.meta["group"] for piece in pieces} == {"ann"} and pieces[1].meta["start_seconds"] == pytest.approx(
        5.8, abs=0.05
    )
    assert short.segments[1].text == "short" and summary.of("pieces").total() == 3 and not summary.rejected


def test_a_long_sound_without_text_is_cut_at_silence(tmp_path: Path) -> None:
    wave = np.where(np.arange(20 * RATE) % (2 * RATE) < RATE // 2, 0, 0.5) * np.sin(np.arange(20 * RATE) / 5)
    files = {"a.flac": Segment.from_audio(wave, RATE).file, "b.flac": sound(1, 1.0)}
    summary = run(write(tmp_path / "in", files), tmp_path / "out", max_audio_seconds=7.0)
    lengths = [seconds(document) for document in read(tmp_path / "out")]
    assert sum(lengths) == pytest.approx(21) and max(lengths) <= 7 and summary.of("pieces").total() == len(lengths) - 2 >= 2
    assert len({document.meta["file"] for document in read(tmp_path / "out")}) == 2


def test_a_part_of_a_transcript_that_is_too_long_to_be_cut_is_kept_whole_up_to_a_minute(tmp_path: Path) -> None:
    whisper = json.dumps({"text": "a b", "segments": [{"start": 0, "end": 40, "text": "a b"}]})
    run(write(tmp_path / "in", {"a.flac": sound(1, 40.0), "a.json": whisper}), tmp_path / "out")
    assert texts(tmp_path / "out") == ["a b"]


def test_a_transcript_without_times_goes_with_sounds_of_up_to_a_minute(tmp_path: Path) -> None:
    """LibriSpeech's longest utterances take 35 s; longer sounds are counted."""
    files = {"a.flac": sound(1, 35.0), "a.txt": "long", "b.flac": sound(2, 61.0), "b.txt": "too long"}
    summary = run(write(tmp_path / "in", files), tmp_path / "out")
    assert texts(tmp_path / "out") == ["long"] and summary.rejected == {"audio_too_long": 1}
    assert run(tmp_path / "in", tmp_path / "more", max_audio_seconds=70).documents == 2


# -- the output


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"{number}.txt": f"text {number} " * 900 for number in range(30)}
    folder = write(tmp_path / "in", files | {"a.png": image(1), "b.wav": sound(extension="wav"), "bad.png": b"bad"})
    for name in "ab":
        run(folder, tmp_path / name, validation_fraction=0.2, shard_megabytes=0.1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.tar"))) >= 3
    assert len(read(tmp_path / "a")) == 32


def test_the_output_is_complete_or_unchanged(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.txt": "one"})
    for output in (folder, folder / "out", tmp_path):
        with pytest.raises(ValueError, match="contain each other"):
            run(folder, output)
    write(tmp_path / "foreign", {"precious.txt": "kept"})
    with pytest.raises(ValueError, match="not a result of `pile prepare`"):
        run(folder, tmp_path / "foreign", overwrite=True)
    run(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="--overwrite"):
        run(folder, tmp_path / "out")
    write(folder, {"a.txt": "two"})
    run(folder, tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "in", "out"]


@pytest.mark.parametrize("name", ["br[0]x", "cur{a,b}", "what?", "s*r"])
def test_an_output_whose_name_is_a_pattern_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name) + ".*give another"):
        run(write(tmp_path / "in", {"a.txt": "one"}), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_leaves_the_earlier_result_and_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "in", {"a.txt": "one", "b.txt": "two"})
    run(folder, tmp_path / "out")
    write(folder, {"c.txt": "three"})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pile_app.prepare.pipeline.write_shards", full)
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
    assert "1 of 1 jobs are done" in capsys.readouterr().err


# -- messages


def test_with_nothing_usable_the_first_row_the_option_and_the_list_of_reasons_are_shown(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.jsonl": lines({"id": 3, "x": "abc"}, {"id": 4, "x": "abd"}), "b.docx": "?"})
    with pytest.raises(
        ValueError, match=r"in' holds nothing usable: 2 no_fields.*a\.jsonl:1: .*'id': 3, 'x': 'abc'.*--fields"
    ) as error:
        run(folder, tmp_path / "out")
    kept = tmp_path / "out.partial" / "rejected.jsonl"
    assert str(kept) in str(error.value)
    assert [json.loads(line)["file"] for line in kept.read_text().splitlines()] == ["a.jsonl:1", "a.jsonl:2", "b.docx"]
    run(folder, tmp_path / "out", fields="x")  # the way that the message names is free
    assert texts(tmp_path / "out") == ["abc", "abd"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_empty_input_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' contains no files"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match=r"missing' does not exist"):
        run(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "video"}, {"validation_fraction": 1.0}, {"shard_megabytes": 0}, {"max_audio_seconds": -1}, {"quality": ["b4"]}],
)
def test_wrong_arguments_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is .*choose from"):
        run(write(tmp_path / "in", {"a.txt": "one"}), tmp_path / "out", **wrong)
    with pytest.raises(ValueError, match="no option is called text_column"):
        run(tmp_path / "in", tmp_path / "out", text_column="x")


@pytest.mark.parametrize(
    ("processes", "moment"), [(1, "spill/*/*.blocks*"), (2, "spill/*/*.blocks*"), (2, "*"), (2, "spill/*")]
)
def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path: Path, processes: int, moment: str) -> None:
    for n in range(6):
        write(tmp_path / "in", {f"{n}.jsonl": lines(*({"text": f"{n} {m} " * 400} for m in range(7000)))})
    command = [
        sys.executable,
        "-m",
        "pile_app.cli",
        "prepare",
        tmp_path / "in",
        tmp_path / "out",
        "--processes",
        str(processes),
    ]
    child = subprocess.Popen(list(map(str, [*command, "--repair"])), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.partial").glob(moment)):  # also while the workers are being started
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all processes
    said = child.communicate(timeout=60)[1]
    assert child.returncode in (130, -signal.SIGINT), said  # a shell shows 130 for both; Python's choice if it ran an `exec`
    last = [line for line in said.splitlines() if line and not line.startswith("fields:")]
    kept = r"pile: interrupted: what is done is kept in .*out\.partial: the same command continues"
    assert len(last) == 1 and re.fullmatch("pile: prepare was interrupted|" * (moment == "*") + kept, last[0]), said
