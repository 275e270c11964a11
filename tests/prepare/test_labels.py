"""Labelled data as they come: the label is the last segment, given splits stay, and the labels are told in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pile_app.data.shards import Shards
from pile_app.documents import BadSample, Document, Segment
from pile_app.prepare.labels import given_splits, in_order, label_text, split_in_path
from pile_app.prepare.pipeline import prepare


def read(output: Path, split: str) -> list[Document]:
    return list(Shards(str(output / f"*-{split}-*.tar")))


def texts(output: Path, split: str) -> list[tuple[str, ...]]:
    return [tuple(segment.text for segment in document.segments) for document in read(output, split)]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_splits_that_are_given_stay_and_labels_are_printed_to_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {name: "".join(f"{name} {n}\t{n % 2}\n" for n in range(3)) for name in ("train", "dev", "test")}
    folder = write(tmp_path / "reviews", {f"{name}.tsv": rows for name, rows in table.items()})
    prepare(folder, tmp_path / "out", columns=["text", "label"], label_names=["bad", "good"], processes=1)
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        assert texts(tmp_path / "out", split) == [(f"{name} 0", "bad"), (f"{name} 1", "good"), (f"{name} 2", "bad")]
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["objective"]["init_args"]["labels"] == ["bad", "good"]
    assert set(printed["data"]["sources"]["reviews"]) == {"train", "validation"}
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] == ["bad", "good"]


def test_json_lines_with_a_label_and_with_pairs_of_texts(tmp_path: Path) -> None:
    records = [{"text": "a", "label": "yes", "id": 3}, {"text": "b", "label": -1}, {"text": "c", "label": ["x"]}]
    write(tmp_path / "in", {"one.jsonl": "\n".join(map(json.dumps, records))})
    summary = prepare(tmp_path / "in", tmp_path / "out", validation_share=0, processes=1)
    assert texts(tmp_path / "out", "train") == [("a", "yes")] and summary.rejected == {"no_label": 2}

    pair = {"premise": "it rains", "hypothesis": "it is wet", "gold": 1, "text": "not asked for"}
    write(tmp_path / "pairs", {"one.jsonl": json.dumps(pair)})
    options = {"text_column": ["premise", "hypothesis"], "label_column": "gold", "label_loss_only": True}
    prepare(tmp_path / "pairs", tmp_path / "out2", validation_share=0, processes=1, **options)
    (document,) = read(tmp_path / "out2", "train")
    assert [(one.text, one.loss) for one in document.segments] == [("it rains", False), ("it is wet", False), ("1", True)]
    prepare(tmp_path / "pairs", tmp_path / "out3", label_column="", validation_share=0, processes=1)
    assert texts(tmp_path / "out3", "train") == [("not asked for",)]


def test_names_of_hugging_face_classes_are_known(tmp_path: Path, image: Callable[[int], Segment]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    features = {"label": {"names": ["cat", "ape"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    images = [{"bytes": image(n).file, "path": None} for n in range(3)]
    table = pyarrow.table({"image": images, "label": [1, 0, 5]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (tmp_path / "data").mkdir()
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "data" / "train-00000-of-00001.parquet")
    summary = prepare(tmp_path / "data", tmp_path / "out", validation_share=0, processes=1)
    documents = read(tmp_path / "out", "train")
    assert [document.segments[-1].text for document in documents] == ["ape", "cat"]
    assert documents[0].segments[0] == image(0) and documents[0].ordered
    assert in_order(summary.labels) == ["cat", "ape"] and summary.rejected == {"no_label": 1}


def test_folders_of_media_and_texts_are_labels(tmp_path: Path, image: Callable[[int], Segment]) -> None:
    for n, name in enumerate(("train/cat", "train/dog", "test/cat")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"{n}.png").write_bytes(image(n).file)
    write(tmp_path / "in", {"train/pos/0.txt": "fine", "0.txt": "nowhere"})
    summary = prepare(tmp_path / "in", tmp_path / "out", label_from_folder=True, validation_share=0, processes=1)
    assert [document.segments[-1].text for document in read(tmp_path / "out", "train")] == ["cat", "dog", "pos"]
    assert [document.segments[0] for document in read(tmp_path / "out", "test")] == [image(2)]
    assert summary.rejected == {"no_label": 1}


def test_a_table_of_files_with_labels(tmp_path: Path, image: Callable[[int], Segment]) -> None:
    write(tmp_path / "in", {"metadata.csv": "file_name,label,text\n0.png,frog,seen in May\n"})
    (tmp_path / "in" / "0.png").write_bytes(image(0).file)
    prepare(tmp_path / "in", tmp_path / "out", validation_share=0, processes=1)
    (document,) = read(tmp_path / "out", "train")
    assert document.segments == (image(0), Segment("frog"))


def test_one_text_with_two_labels_is_on_one_side(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "{n // 2}", "label": {n % 2}}}\n' for n in range(200))
    write(tmp_path / "in", {"all.jsonl": rows})
    prepare(tmp_path / "in", tmp_path / "out", validation_share=0.5, processes=1)
    sides = [{text for text, _ in texts(tmp_path / "out", split)} for split in ("train", "validation")]
    assert len(sides[0] | sides[1]) == 100 and not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/pos/test.txt", "train"),
        ("data/validation-00000-of-00002.parquet", "validation"),
        ("sst2_dev.jsonl", "validation"),
        ("TREC.test", "test"),
        ("vehicles/train_0001.png", None),
        ("testimony.txt", None),
    ],
)
def test_a_path_says_the_split(path: str, split: str | None) -> None:
    assert split_in_path(path) == split


def test_a_test_folder_alone_is_no_split() -> None:
    assert given_splits({"test"}) == given_splits({"train"}) == [] and given_splits({"test", "train"}) == ["test", "train"]


def test_labels_are_in_the_order_of_classes_numbers_or_letters() -> None:
    assert in_order({"b": 0, "a": 1}) == ["b", "a"]
    assert in_order({"10": -1, "9": -1}) == ["9", "10"]
    assert in_order({"b": -1, "a": -1}) == ["a", "b"]
    with pytest.raises(BadSample, match="2 is no label: there are 2 classes"):
        label_text(2, ["a", "b"])
