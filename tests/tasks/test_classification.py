"""Labelled documents: which places are labelled, and that a run learns to tell them apart from a trained model on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyRun, train

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.assembly import assemble, whole
from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment, document_from_sample
from pile_app.model.fused import FusedLanguageModel
from pile_app.tasks.classification import LabelAnnotator
from pile_app.training.objective import mean_by_piece

CONFIG = """
model:
  codec_steps: 0
  objective:
    class_path: pile_app.tasks.classification.Classification
    init_args: {{labels: [dark, light, low, high], learning_rate: 0.02, language_weight: 0.1}}
data:
  sources: {{labelled: {{train: "{shards}/train-*.tar", validation: "{shards}/validation-*.tar"}}}}
trainer: {{max_steps: 30, val_check_interval: 15, callbacks: []}}
monitor: validation/f1
monitor_mode: max
"""


def labelled(count: int) -> Iterator[Document]:
    """Dark and light images with their names in free order, and texts of low and high letters."""
    for n in range(count):
        rng = np.random.default_rng(n)
        if n % 2:
            pixels = rng.integers(0, 100, (8, 8), np.uint8) + np.uint8(150 * (n % 4 == 1))
            document = Document((Segment.from_image(pixels), Segment("light" if n % 4 == 1 else "dark")), f"{n}", ordered=False)
        else:
            letters = rng.choice(list("abcd" if n % 4 else "wxyz"), 12)
            document = Document((Segment("".join(letters)), Segment("low" if n % 4 else "high")), f"{n}")
        yield document


def test_the_label_of_any_layout_stands_last_and_is_not_read(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment]
) -> None:
    model = tiny_model()
    annotator = LabelAnnotator(["no", "yes"])
    of_text = document_from_sample("a", {"cls": b"yes", "txt": b"good"})
    of_image = document_from_sample("b", {"png": image(1).file, "cls": b"no"})
    documents = [annotator.arrange(document) for document in (of_text, of_image)]
    assert [document.segments[-1].text for document in documents] == ["yes", "no"]
    lengths = [2 + 1 + 4 + 1 + 3, 2 + 1 + 4 + 1 + 2]
    pack = [whole(document, length) for document, length in zip(documents, lengths, strict=True)]
    batch = assemble([pack], model.vocabulary, model.tokenizer, 24, annotator=annotator)
    assert batch.labels[0].tolist() == [-1] * 2 + [1] * 5 + [-1] * 6 + [0] * 5 + [-1] * 6
    _, hidden = model.read(batch)
    features, labels = mean_by_piece(hidden, batch)
    assert labels.tolist() == [1, 0, NO_LABEL]
    torch.testing.assert_close(features[0], hidden[0, 2:7].mean(0))

    other = Document((*documents[0].segments[:-1], Segment("no ")), "a")
    again = assemble([[whole(other, 11), pack[1]]], model.vocabulary, model.tokenizer, 24, annotator=annotator)
    again.labels.copy_(batch.labels)
    torch.testing.assert_close(mean_by_piece(model.read(again)[1], again)[0], features)


def test_an_unknown_label_is_named(tiny_model: Callable[..., FusedLanguageModel]) -> None:
    model = tiny_model()
    document = Document((Segment("good"), Segment("maybe")), "7")
    with pytest.raises(ValueError, match=r"'7' has the label 'maybe', .*\['no', 'yes'\]"):
        assemble([[whole(document, 13)]], model.vocabulary, model.tokenizer, 16, annotator=LabelAnnotator(["no", "yes"]))


def test_segments_can_be_pieces_that_do_not_see_each_other(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment]
) -> None:
    class Pairs(Annotator):
        splits_segments = True

        def labels(self, document, spans, length, number, tokenizer):  # type: ignore[no-untyped-def]
            labels = np.full(length, NO_LABEL, np.int32)
            for first, stop in spans:
                labels[first:stop] = number
            return labels

    model = tiny_model()

    def read(first: str) -> tuple[torch.Tensor, torch.Tensor]:
        document = Document((Segment(first), image(1)), "a")
        batch = assemble([[whole(document, 11)]], model.vocabulary, model.tokenizer, 12, annotator=Pairs())
        assert batch.piece_starts.tolist() == [0, 1, 5, 10, 11, 12]
        return mean_by_piece(model.read(batch)[1], batch)

    features, labels = read("one")
    assert labels.tolist() == [NO_LABEL, 0, 0, NO_LABEL, NO_LABEL]
    others, _ = read("two")
    torch.testing.assert_close(others[2], features[2])
    assert not torch.allclose(others[1], features[1])


def test_a_trained_model_learns_labels_of_texts_and_images_by_one_config(tiny_run: TinyRun, tmp_path: Path) -> None:
    write_shards(labelled(120), tmp_path / "shards", "train")
    write_shards(labelled(20), tmp_path / "shards", "validation")
    config = tmp_path / "task.yaml"
    config.write_text(CONFIG.format(shards=tmp_path / "shards"))
    command = ("--config", tiny_run.folder / "config.yaml", "--config", config, "--model.start_from", tiny_run.folder)
    train(*command, "--name", "task", "--runs", tmp_path, "--wandb", "null", cwd=tmp_path)
    summary = json.loads((tmp_path / "task" / "summary.json").read_text())
    assert summary["f1"] == summary["accuracy"] == 1.0
    assert summary["text_loss"] > 0
