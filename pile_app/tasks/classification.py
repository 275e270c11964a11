"""Classification of documents: texts, images, sounds, or any mixture of them.

A labelled document ends with its label, a text: `cls` beside `txt`, `jpg` or `wav` in a shard. What stands before it is read by
the model, and the mean of its hidden vectors goes through a linear head. The label itself is not seen: the model is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.data.annotation import NO_LABEL, Annotator, label_last
from pile_app.data.batch import Batch
from pile_app.documents import Document
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.objective import Objective, mean_by_piece

if TYPE_CHECKING:
    from pile_app.data.text import Tokenizer


class LabelAnnotator(Annotator):
    """Every token before the label has the number of the label. `labels`: the labels in order."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.numbers = {label: number for number, label in enumerate(labels)}

    def arrange(self, document: Document) -> Document:
        return label_last(document)

    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        label = document.segments[-1].text.strip()
        if label not in self.numbers:
            raise ValueError(
                f"document {document.key!r} has the label {label!r}, model.objective.labels names {list(self.numbers)}"
            )
        labels = np.full(length, NO_LABEL, np.int32)
        for first, stop in spans[:-1]:
            labels[first:stop] = self.numbers[label]
        return labels


class Classification(Objective):
    """Which of several labels a document has.

    Args:
        labels: all labels, in the order of the classes.
        dropout: share of the features that is dropped in training.
        language_weight: see `Objective`.
        freeze: see `Objective`.
        learning_rate: see `Objective`.
    """

    def __init__(
        self,
        labels: list[str],
        dropout: float = 0.1,
        language_weight: float = 0.0,
        freeze: bool = False,
        learning_rate: float = 0.001,
    ) -> None:
        super().__init__(language_weight, freeze, learning_rate)
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"objective.labels needs two different labels or more, not {labels}")
        self.labels = labels
        self.dropout = nn.Dropout(dropout)

    @property
    def annotator(self) -> Annotator:
        return LabelAnnotator(self.labels)

    def build(self, model: FusedLanguageModel) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall

        classes = len(self.labels)
        self.head = nn.Linear(model.backbone.width, classes)
        nn.init.zeros_(self.head.weight)
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "precision": MulticlassPrecision(classes, average="macro"),
                "recall": MulticlassRecall(classes, average="macro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )

    def logits(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(L, classes) float32 of the labelled pieces, (L,) their labels."""
        features, labels = mean_by_piece(hidden, batch)
        kept = labels >= 0
        return self.head(self.dropout(features[kept])).float(), labels[kept]

    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> Tensor:
        logits, labels = self.logits(hidden, batch)
        if not len(labels):
            return logits.sum()
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        logits, labels = self.logits(hidden, batch)
        if len(labels):
            self.metrics.update(logits, labels)

    def compute(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self.metrics.compute()
        self.metrics.reset()
        return values
