"""Objectives: heads on the model's hidden vectors with a loss of their own, trained instead of or besides the next token.

    labelled documents -> batch with labels (B, T) -> hidden vectors (B, T, D) of the model -> head -> loss, metrics

An objective brings the `Annotator` that labels tokens, a head, its loss and its metrics. The loss is that of the whole
optimizer step, however it is divided into devices and micro-batches. The forward pass does not wait for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pile_app.data.annotation import Annotator
from pile_app.data.batch import Batch
from pile_app.model.fused import FusedLanguageModel


class Objective(nn.Module, ABC):
    """Base class; the objectives are in `tasks/`.

    Args:
        language_weight: weight of the next-token loss added to the objective's own, 0 or more; it keeps a model from memorizing
            a small data set (the auxiliary language model of arXiv:1806.06146).
        freeze: train the head alone.
        learning_rate: of the head, by AdamW; the model follows `model.optimizer`.
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
        """Labels the tokens of documents."""

    @abstractmethod
    def build(self, model: FusedLanguageModel) -> None:
        """Make head and metrics for a model."""

    def read(self, model: FusedLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `FusedLanguageModel.read`. Computes in the type that the run trains in, also when it is used."""
        dtype = model.autocast_dtype
        with torch.autocast(batch.tokens.device.type, dtype, enabled=dtype is not None):
            return model.read(batch)

    def prepare(
        self, model: FusedLanguageModel, batches: Sequence[Batch], seed: Callable[[Batch], None] = lambda batch: None
    ) -> list[Any]:
        """Return for each micro-batch of this device in a step what its loss needs to know of the whole step.

        All devices call it together, before the first loss. By default that is `count`, summed over micro-batches and devices.

        Args:
            seed: to be called before a batch is read, so that dropout can be repeated.
        """
        total = sum_over_devices(torch.stack([self.count(model, batch) for batch in batches]).sum(0))
        return [self.begin_step(total)] * len(batches)

    def count(self, model: FusedLanguageModel, batch: Batch) -> Tensor:
        """Count (K,) float32 of a micro-batch what the step's loss depends on, such as its labels."""
        return (batch.labels >= 0).sum().float()[None]

    def begin_step(self, total: Tensor) -> Any:
        """Return what `forward` takes as `step`, from the counts of the whole step."""
        return total

    @abstractmethod
    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch, step: Any = None) -> Tensor:
        """Return () float32, the batch's part of the step's loss: the parts of all micro-batches and devices sum to it.

        Args:
            hidden: (B, T, D) of `FusedLanguageModel.read`.
            step: see `prepare`; None: the batch is the whole step.
        """

    @abstractmethod
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        """Add a validation batch to the metrics."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return name -> () value of the metrics over all devices, and reset them."""

    def report(self, folder: Path) -> dict[str, Any]:
        """Write pictures and tables of the last validation into `folder`; return more figures for `summary.json`."""
        return {}

    def drop(self, features: Tensor, batch: Batch, indices: Tensor, rate: float, purpose: int = 0) -> Tensor:
        """Dropout of (L, F) features in training; the masks depend on the flat indices (L,), not on the rest of the batch."""
        if not self.training or not rate:
            return features
        return features * (batch.uniform(indices, features.size(-1), purpose) >= rate) / (1 - rate)


def sum_over_devices(values: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def labelled_pieces(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (L,) numbers of the pieces with labelled tokens, and (L,) int64 their labels, which all of their tokens share."""
    labels = batch.labels.flatten().long()
    by_piece = labels.new_full((len(batch.piece_sources),), -1).scatter_reduce(0, batch.piece_numbers.flatten(), labels, "amax")
    size = sum(map(bool, batch.label_counts))
    pieces = torch.nonzero_static(by_piece >= 0, size=size, fill_value=0).squeeze(1)
    return pieces, by_piece[pieces]


def mean_by_piece(hidden: Tensor, batch: Batch) -> Tensor:
    """Return (P, D) float32, the mean over the labelled tokens of each piece, 0 without any."""
    piece = batch.piece_numbers.flatten()
    inside = (batch.labels.flatten() >= 0).float()
    counts = inside.new_zeros(len(batch.piece_sources)).index_add(0, piece, inside)
    sums = inside.new_zeros(len(counts), hidden.size(-1)).index_add(0, piece, hidden.flatten(0, 1).float() * inside[:, None])
    return sums / counts.clamp_min(1)[:, None]
