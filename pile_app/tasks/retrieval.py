"""Retrieval across modalities: segments of one document are drawn together in one space, those of others apart.

    segment -> mean of its hidden vectors -> projection of its modality -> unit vector; similarity = cosine

The loss is that of CLIP (arXiv:2103.00020), symmetric InfoNCE with a learned temperature, over every pair of modalities that
the batch holds. Each segment is read alone: it sees nothing of the document around it, in training as in search.

**Negatives** are the segments of the other documents in the micro-batch, over all devices (gathered with their gradients). So
their number is set by packing: about `data.context * data.global_batch` tokens / tokens of a document, where a global batch is
one micro-batch a device. More come from a larger `global_batch`, not from gradient accumulation.

**Who belongs together**: documents of one `meta.concept`, or without that of the same first text, say the same. They are never
negatives of each other: each is a right answer, and the loss of a query is the mean over its right answers, each against the
wrong ones (arXiv:2004.11362, the sum outside). With one right answer that is CLIP's loss.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.batch import Batch
from pile_app.documents import AUDIO, MODALITIES, TEXT, Document
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.objective import Objective, mean_by_piece
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

LARGEST_SCALE = 100.0  # 1 / temperature, as in CLIP
CUTOFFS = (1, 5, 10)
RANKED_AT_ONCE = 1024  # queries
PLACE_WIDTH = 16  # numbers that each code of an image adds to it, by its place


class GroupAnnotator(Annotator):
    """The label of a segment: 31 bits of a hash of what its document says."""

    splits_segments = True

    def label(self, document: Document) -> int:
        """Of all segments of a document."""
        return group_of(document)

    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        labels = np.full(length, NO_LABEL, np.int32)
        label = self.label(document)
        for first, stop in spans:
            labels[first:stop] = label
        return labels


def group_of(document: Document) -> int:
    """Of `meta.concept`, else of its first text, else of its key."""
    text = next((segment.data for segment in document.segments if segment.modality == TEXT), document.key)
    group = document.meta.get("concept", text)
    content = group if isinstance(group, bytes) else str(group).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) >> 1


class Contrastive(Objective):
    """What belongs together is near, whatever its modality.

    Args:
        dimensions: of the space.
        temperature: at the start.
        dropout: share of the pooled features that is dropped in training.
        language_weight: see `Objective`.
        freeze: see `Objective`.
        learning_rate: see `Objective`.
        unrounded: see `Objective`.
    """

    def __init__(
        self,
        dimensions: int = 128,
        temperature: float = 0.07,
        dropout: float = 0.1,
        language_weight: float = 0.0,
        freeze: bool = False,
        learning_rate: float = 0.001,
        unrounded: bool = False,
    ) -> None:
        super().__init__(language_weight, freeze, learning_rate, unrounded)
        if dimensions < 1 or not temperature >= 1 / LARGEST_SCALE:
            raise ValueError(
                f"objective.dimensions >= 1 and temperature >= {1 / LARGEST_SCALE}, not {dimensions} and {temperature}"
            )
        self.dimensions = dimensions
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.dropout = nn.Dropout(dropout)
        self.seen: list[Embeddings] = []  # of the validation under way

    @property
    def annotator(self) -> Annotator:
        return GroupAnnotator()

    def build(self, model: FusedLanguageModel) -> None:
        super().build(model)
        width = model.backbone.width
        self.projections = nn.ModuleList(nn.Linear(width, self.dimensions, bias=False) for _ in MODALITIES)
        if model.image_codec is not None:
            self.of_place = nn.Linear(width, PLACE_WIDTH, bias=False)
            self.of_grid = nn.Linear(PLACE_WIDTH * model.vocabulary.image_tokens, self.dimensions, bias=False)

    def embed(self, hidden: Tensor, batch: Batch) -> Embeddings:
        """Of every labelled segment that begins in the batch, in its order. Of a text that was cut that is the first part."""
        features, labels = mean_by_piece(hidden, batch)
        openers = batch.tokens.flatten()[batch.piece_starts[:-1].long()]
        modalities = openers - Vocabulary.OPENERS[TEXT]
        kept = (labels != NO_LABEL) & (modalities >= TEXT) & (modalities <= AUDIO)
        features, labels, modalities = self.dropout(features[kept]), labels[kept], modalities[kept]
        vectors = features.new_zeros(len(features), self.dimensions)
        for modality, projection in enumerate(self.projections):
            own = modalities == modality
            vectors = vectors + projection(features * own[:, None]).float() * own[:, None]
        if len(batch.image_starts):
            number = (kept.cumsum(0) - 1)[batch.piece_numbers.flatten()[batch.image_starts.long()]]
            places = self.of_place(hidden.flatten(0, 1)[batch.image_slots].float())  # (N, codes of an image, PLACE_WIDTH)
            vectors = vectors.index_add(0, number, self.of_grid(self.dropout(places.flatten(1))).float())
        return Embeddings(F.normalize(vectors, dim=1), labels, modalities)

    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> Tensor:
        scale = self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
        return contrastive_loss(gather(self.embed(hidden, batch)), scale)

    @torch.no_grad()
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        self.seen.append(self.embed(hidden, batch))

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """Of the whole validation set: see `retrieval_metrics`; `recall_5` is the mean over directions, to choose by."""
        found = gather(Embeddings(*(torch.cat(parts) for parts in zip(*self.seen, strict=True))))
        self.seen = []
        values: dict[str, Tensor] = {}
        for query, target in permutations(range(len(MODALITIES)), 2):
            of_direction = retrieval_metrics(found.of(query), found.of(target))
            name = f"{MODALITIES[query]}_to_{MODALITIES[target]}"
            values |= {f"{name}_{key}": torch.tensor(value) for key, value in of_direction.items()}
        recalls = [value for key, value in values.items() if key.endswith("recall_5")]
        if recalls:
            values["recall_5"] = torch.stack(recalls).mean()
        return values


@dataclass
class Embeddings:
    """vectors (S, E) float32 of length 1; labels (S,) int64, equal where segments belong together; modalities (S,)."""

    vectors: Tensor
    labels: Tensor
    modalities: Tensor

    def __iter__(self) -> Any:
        return iter((self.vectors, self.labels, self.modalities))

    def of(self, modality: int) -> Embeddings:
        own = self.modalities == modality
        return Embeddings(self.vectors[own], self.labels[own], self.modalities[own])


def contrastive_loss(segments: Embeddings, scale: Tensor) -> Tensor:
    """() mean over the queries, which are the segments that have a right answer in another modality; 0 without any.

    Args:
        segments: of all devices.
        scale: () 1 / temperature.
    """
    total, count = segments.vectors.sum() * 0.0, segments.vectors.new_zeros(())
    for modality in range(len(MODALITIES)):
        among = segments.of(modality)
        if not len(among.labels):
            continue
        others = segments.modalities != modality
        logits = scale * segments.vectors[others] @ among.vectors.T  # (queries, answers)
        right = segments.labels[others][:, None] == among.labels
        wrong = logits.masked_fill(right, torch.finfo(logits.dtype).min / 2).logsumexp(1, keepdim=True)
        of_answers = F.softplus(wrong - logits) * right  # -log of one right answer's share beside all wrong ones
        answers = right.sum(1)
        total = total + (of_answers.sum(1) / answers.clamp_min(1)).sum()
        count = count + (answers > 0).sum()
    return total / count.clamp_min(1)


def retrieval_metrics(queries: Embeddings, among: Embeddings) -> dict[str, float]:
    """Of the queries that have a right answer: recall at `CUTOFFS` (is one among the first k?), median rank of the best one,
    mean of 1 / rank (MRR), their number, and `chance_5`, the recall at 5 of a random order; nothing where there are none.

    A wrong answer as near as the right one stands before it.
    """
    ranks, chances = [], []
    for start in range(0, len(queries.labels), RANKED_AT_ONCE):
        some = slice(start, start + RANKED_AT_ONCE)
        similarity = queries.vectors[some] @ among.vectors.T
        right = queries.labels[some][:, None] == among.labels
        has_answer = right.any(1)
        similarity, right = similarity[has_answer], right[has_answer]
        if not len(right):
            continue
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        ranks.append(1 + ((similarity >= best) & ~right).sum(1))
        chances += [chance_of_recall(answers, len(among.labels), 5) for answers in right.sum(1).tolist()]
    if not ranks:
        return {}
    rank = torch.cat(ranks).double()
    values = {f"recall_{cutoff}": float((rank <= cutoff).double().mean()) for cutoff in CUTOFFS}
    return values | {
        "median_rank": float(rank.quantile(0.5)),
        "mrr": float((1 / rank).mean()),
        "queries": float(len(rank)),
        "chance_5": float(np.mean(chances)),
    }


def chance_of_recall(answers: int, among: int, cutoff: int) -> float:
    """That one of `answers` is among the first `cutoff` of `among` in a random order."""
    return 1 - math.comb(among - answers, cutoff) / math.comb(among, cutoff) if among > cutoff else 1.0


def gather(segments: Embeddings) -> Embeddings:
    """Those of all devices, in the order of ranks. Gradients come back to where the vectors are from, summed over the devices
    that computed a loss of them all; DDP then takes the mean, which is the gradient of that one loss."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return segments
    device = segments.vectors.device
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, torch.tensor([len(segments.labels)], device=device))
    sizes = torch.cat(counts).tolist()
    labels, modalities = (_gather_rows(rows, sizes) for rows in (segments.labels, segments.modalities))
    vectors: Tensor = _Gather.apply(segments.vectors, sizes)
    return Embeddings(vectors, labels, modalities)


def _gather_rows(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """(sizes[rank], ...) of each rank -> (sum, ...)."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        rank = torch.distributed.get_rank()
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return _gather_rows(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.own], None
