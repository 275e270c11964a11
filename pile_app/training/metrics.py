"""Validation metrics: nats, targets, hits and bytes of each source and modality, in one table that is summed over devices.

All likelihoods follow from it: loss, perplexity, accuracy, bits per UTF-8 byte of text, bits of codes per pixel and channel or
per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from pile_app.data.batch import Batch
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT
from pile_app.model.fused import ModalityLoss
from pile_app.vocabulary import Vocabulary

NATS, TARGETS, HITS, WRITTEN_NATS, BYTES = range(5)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenMetrics(Metric):
    """Sums over the targets of validation batches.

    table: (sources, modalities, 5): nats; targets; targets that were the most likely token; nats and UTF-8 bytes of targets
    with bytes (openers and `<end>` have none).

    Args:
        sources: number of sources.
        dtype: see `sum_dtype`.
    """

    full_state_update = False
    table: Tensor

    def __init__(self, sources: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.add_state("table", torch.zeros(sources, len(MODALITIES), 5, dtype=dtype), dist_reduce_fx="sum")

    def update(self, batch: Batch, losses: dict[int, ModalityLoss], token_bytes: Tensor) -> None:
        """Add a batch. `token_bytes`: of each text token, see `FusedLanguageModel`; losses have their predictions."""
        for modality, loss in losses.items():
            source = batch.source.flatten()[batch.targets[modality]].long()
            sizes = token_bytes[loss.targets] if modality == TEXT else torch.zeros_like(loss.targets)
            assert loss.predictions is not None
            hits = loss.predictions.eq(loss.targets)
            columns = (loss.each, torch.ones_like(loss.each), hits, loss.each * (sizes > 0), sizes)
            self.table[:, modality].index_add_(0, source, torch.stack([c.to(self.table.dtype) for c in columns], 1))

    def compute(self) -> Tensor:
        """Return the table over all devices. Raises RuntimeError if a loss was not a number."""
        if bool(self.table.isnan().any()):
            raise RuntimeError("a loss of the validation is not a number: the weights of the model are damaged, or diverged")
        return self.table


def likelihoods(rows: Tensor, vocabulary: Vocabulary) -> dict[str, dict[str, float]]:
    """Return modality -> its figures, for the modalities with targets in `rows` (modalities, 5) of a table."""
    figures: dict[str, dict[str, float]] = {}
    for modality, (nats, targets, hits, written_nats, size) in enumerate(rows.tolist()):
        if not targets:
            continue
        loss = nats / targets
        perplexity = math.exp(loss) if loss < 700 else math.inf
        values = {"targets": targets, "loss": loss, "perplexity": perplexity, "accuracy": hits / targets}
        bits = loss / math.log(2)
        if modality == TEXT and size:
            values |= {"bytes": size, "bits_per_byte": written_nats / size / math.log(2)}
        elif modality == IMAGE:
            values["code_bits_per_pixel_channel"] = bits * vocabulary.image_tokens / math.prod(vocabulary.image_shape)
        elif modality == AUDIO:
            values["code_bits_per_second"] = bits * vocabulary.audio_tokens_per_second
        figures[MODALITIES[modality]] = values
    return figures


def validation_values(table: Tensor, sources: Sequence[str], vocabulary: Vocabulary) -> dict[str, float]:
    """Return the values of a validation by name, see docs/architecture.md."""
    by_modality = likelihoods(table.sum(0), vocabulary)
    values = {f"{modality}_{name}": value for modality, figures in by_modality.items() for name, value in figures.items()}
    values = {name: value for name, value in values.items() if not name.endswith(("_targets", "_bytes"))}
    for name, rows in zip(sources, table, strict=True):
        if rows[:, TARGETS].any():
            values[f"source/{name}_loss"] = float(rows[:, NATS].sum() / rows[:, TARGETS].sum())
        if rows[:, BYTES].any():
            values[f"source/{name}_bits_per_byte"] = likelihoods(rows, vocabulary)["text"]["bits_per_byte"]
    if table[..., TARGETS].any():
        values["loss"] = float(table[..., NATS].sum() / table[..., TARGETS].sum())
    return values
