"""Unknown labels and types of entities are found before training, wherever in the shards they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TinyRun
from processes import start

from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment

CONFIG = """
model:
  codec_steps: 0
  objective: {{class_path: pile_app.tasks.{objective}}}
data:
  sources: {{labelled: {{train: "{shards}/train-*.tar", validation: "{shards}/validation-*.tar"}}}}
monitor: validation/text_loss
"""
CLASSIFICATION = "classification.Classification, init_args: {labels: [dark, light], "


def as_meta(label: str) -> Document:
    return Document((Segment("good"),), meta={"label": label})


def as_text(label: str) -> Document:
    return Document((Segment("good"), Segment(label)))


def as_span(label: str) -> Document:
    return Document((Segment("Ada came"),), meta={"spans": [[0, 3, label]]})


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("objective", "make", "message"),
    [
        (
            CLASSIFICATION + "head: linear}",
            as_meta,
            "has the label 'maybe', model.objective.labels has ['dark', 'light']: add it",
        ),
        (
            CLASSIFICATION + "head: language}",
            as_text,
            "has the label 'maybe', model.objective.labels has ['dark', 'light']: add it",
        ),
        (
            "tagging.Tagging, init_args: {types: [dark, light]}",
            as_span,
            "has the type 'maybe', model.objective.types has ['dark', 'light']",
        ),
    ],
)
def test_an_unknown_label_is_found_before_training(
    tiny_run: TinyRun, tmp_path: Path, objective: str, make: object, message: str, split: str
) -> None:
    def documents(has_unknown: bool) -> Iterator[Document]:
        for number in range(60):
            label = "maybe" if has_unknown and number == 50 else ("dark", "light")[number % 2]
            document: Document = make(label)  # type: ignore[operator]
            yield Document(document.segments, f"{number}", meta=document.meta)

    for name in ("train", "validation"):
        shards = write_shards(documents(name == split), tmp_path, name, shard_bytes=20_000)
        assert len(shards.paths) > 2
    config = tmp_path / "task.yaml"
    config.write_text(CONFIG.format(objective=objective, shards=tmp_path))
    words = ["train.py", "--config", str(tiny_run.folder / "config.yaml"), "--config", str(config), "--name", "new"]
    attempt = start([*words, "--runs", str(tmp_path), "--wandb", "null"], tmp_path)
    assert attempt.wait() == 2
    (error,) = [line for line in attempt.text.splitlines() if "error:" in line]
    assert f"{split}-0000" in error and "document '50'" in error and message in error
    assert "Traceback" not in attempt.text and not (tmp_path / "new" / "metrics.csv").exists()
