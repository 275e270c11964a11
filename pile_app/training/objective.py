"""What a run may learn besides the next token: a head on the model's hidden vectors, and the labels it is trained on.

    labelled documents -> batch with labels (B, T) -> hidden vectors (B, T, D) of the model -> head -> loss, metrics

An objective brings the `Annotator` that labels places of documents, a head, its loss and its metrics; documents, data path,
model and training are those of every run. `model.start_from` says which trained model it begins with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pile_app.data.annotation import Annotator
from pile_app.data.batch import Batch
from pile_app.model.fused import FusedLanguageModel


class Objective(nn.Module, ABC):
    """One of `tasks/`.

    Args:
        language_weight: of the next-token loss beside the objective's own, 0 or more; it keeps a small data set from being
            learned by heart (arXiv:1806.06146 calls it the auxiliary language model).
        freeze: train the head alone, on the model as it is.
        learning_rate: of the head, by AdamW; the model moves as `model.optimizer` says.
    """

    def __init__(self, language_weight: float = 0.0, freeze: bool = False, learning_rate: float = 0.001) -> None:
        super().__init__()
        if language_weight < 0 or not learning_rate > 0:
            raise ValueError(f"language_weight >= 0 and learning_rate > 0, not {language_weight} and {learning_rate}")
        if freeze and language_weight:
            raise ValueError("objective.freeze trains the head alone: set objective.language_weight to 0")
        self.language_weight = language_weight
        self.freeze = freeze
        self.learning_rate = learning_rate

    @property
    @abstractmethod
    def annotator(self) -> Annotator:
        """What labels its documents."""

    @abstractmethod
    def build(self, model: FusedLanguageModel) -> None:
        """Makes head and metrics, once the model is known."""

    @abstractmethod
    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> Tensor:
        """() float32 loss: the mean over what is labelled in the micro-batch, 0 where nothing is.

        Args:
            model: that the head hangs on.
            hidden: (B, T, D).
            batch: with labels.
        """

    @abstractmethod
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        """Adds a validation batch to the metrics."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Name -> () value of its metrics over all devices, which then begin anew."""

    def report(self, folder: Path) -> dict[str, Any]:
        """Writes pictures and tables of the last validation into `folder`; more figures for `summary.json`."""
        return {}


def mean_by_piece(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(P, D) float32 mean over the labelled places of each piece, (P,) their label, -1 of pieces without one.

    The label of a piece is that of its labelled places, which all have the same.
    """
    labels = batch.labels.flatten().long()
    piece = batch.piece_numbers.flatten()
    pieces = len(batch.piece_sources)
    labelled = labels >= 0
    inside = labelled.float()
    counts = hidden.new_zeros(pieces, dtype=torch.float32).index_add_(0, piece, inside)
    sums = torch.zeros(pieces, hidden.size(-1), device=hidden.device)
    sums = sums.index_add(0, piece, hidden.flatten(0, 1).float() * inside[:, None])
    of_piece = labels.new_full((pieces,), -1).scatter_reduce(0, piece, labels, "amax")
    return sums / counts.clamp_min(1)[:, None], of_piece
