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
from pile_app.documents import TEXT
from pile_app.model.codecs import AudioCodec
from pile_app.model.fused import FusedLanguageModel, full_precision


class Objective(nn.Module, ABC):
    """One of `tasks/`.

    Args:
        language_weight: of the next-token loss beside the objective's own, 0 or more; it keeps a small data set from being
            learned by heart (arXiv:1806.06146 calls it the auxiliary language model).
        freeze: train the head alone, on the model as it is.
        learning_rate: of the head, by AdamW; the model moves as `model.optimizer` says.
        unrounded: images and sounds are read as they are, besides as codes (see `Unrounded`); not from encoded shards.
    """

    def __init__(
        self, language_weight: float = 0.0, freeze: bool = False, learning_rate: float = 0.001, unrounded: bool = False
    ) -> None:
        super().__init__()
        if language_weight < 0 or not learning_rate > 0:
            raise ValueError(f"language_weight >= 0 and learning_rate > 0, not {language_weight} and {learning_rate}")
        if freeze and language_weight:
            raise ValueError("objective.freeze trains the head alone: set objective.language_weight to 0")
        self.language_weight = language_weight
        self.freeze = freeze
        self.learning_rate = learning_rate
        self.unrounded: Unrounded | None = None
        self._reads_unrounded = unrounded

    @property
    @abstractmethod
    def annotator(self) -> Annotator:
        """What labels its documents."""

    def build(self, model: FusedLanguageModel) -> None:
        """Makes head and metrics, once the model is known."""
        if self._reads_unrounded and model.codecs:
            self.unrounded = Unrounded(model)

    def read(self, model: FusedLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `FusedLanguageModel.read`."""
        return model.read(batch, None if self.unrounded is None else self.unrounded(model, batch))

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


class Unrounded(nn.Module):
    """What codes leave out: the pixels or log-mel frames that each code stands for are added to its embedding, through a linear
    map that begins at 0 (the patch embedding of ViT, arXiv:2010.11929, and AST, arXiv:2104.01778).

    A code of 1,000 values is enough to draw and speak with; who is speaking and what exactly a stroke looks like is lost in it.
    Codes that the model writes itself have nothing besides, so this is for what is read.
    """

    def __init__(self, model: FusedLanguageModel) -> None:
        super().__init__()
        width = model.backbone.embedding_width
        self.maps = nn.ModuleDict()
        if model.image_codec is not None:
            config = model.image_codec.config
            self.maps["image"] = nn.Linear(config.channels * config.patch**2, width)
        if model.audio_codec is not None:
            shape = model.audio_codec.config
            self.maps["audio"] = nn.Linear(shape.frames_per_token * shape.mels, width)
        for one in self.maps.values():
            nn.init.zeros_(one.weight)  # type: ignore[arg-type]
            nn.init.zeros_(one.bias)  # type: ignore[arg-type]

    def forward(self, model: FusedLanguageModel, batch: Batch) -> Tensor:
        """(B, T, embedding width), 0 where no code is. Raises ValueError where media came encoded."""
        refuse_encoded(model, batch, "unrounded")
        flat = torch.zeros(batch.tokens.numel(), model.backbone.embedding_width, device=batch.tokens.device)
        if model.image_codec is not None and len(batch.images):
            pixels = model.image_codec.patches(batch.images).flatten(0, 1)
            flat = flat.index_copy(0, batch.image_slots.flatten(), self.maps["image"](pixels).float())
        if model.audio_codec is not None and len(batch.audio):
            flat = flat.index_copy(0, batch.audio_slots, self.maps["audio"](frames_of_codes(model.audio_codec, batch)).float())
        return flat.unflatten(0, batch.tokens.shape)


def refuse_encoded(model: FusedLanguageModel, batch: Batch, option: str) -> None:
    """Raises ValueError where images or sounds of the batch are codes from the start."""
    vocabulary = model.vocabulary
    if bool(((batch.tokens >= vocabulary.slices[TEXT].stop) & (batch.tokens != vocabulary.audio_end)).any()):
        raise ValueError(
            f"objective.{option} reads images and sounds themselves, and those of these shards were encoded: take the "
            "shards that `pile encode` read, or set it to false"
        )


def frames_of_codes(codec: AudioCodec, batch: Batch) -> Tensor:
    """(A, frames_per_token * mels) float32 log-mel frames of each code; see `AudioCodec.patches`."""
    with full_precision(batch):
        return codec.patches(batch.audio, batch.audio_tokens)


def mean_by_piece(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(P, D) float32 mean over the labelled places of each piece, (P,) their label; see `labels_by_piece`."""
    piece = batch.piece_numbers.flatten()
    pieces = len(batch.piece_sources)
    inside = (batch.labels.flatten() >= 0).float()
    counts = hidden.new_zeros(pieces, dtype=torch.float32).index_add_(0, piece, inside)
    sums = torch.zeros(pieces, hidden.size(-1), device=hidden.device)
    sums = sums.index_add(0, piece, hidden.flatten(0, 1).float() * inside[:, None])
    return sums / counts.clamp_min(1)[:, None], labels_by_piece(batch)


def labels_by_piece(batch: Batch) -> Tensor:
    """(P,) int64 label of each piece, which all its labelled places have; -1 of pieces without one."""
    labels = batch.labels.flatten().long()
    return labels.new_full((len(batch.piece_sources),), -1).scatter_reduce(0, batch.piece_numbers.flatten(), labels, "amax")
