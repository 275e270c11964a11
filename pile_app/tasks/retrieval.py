"""Retrieval across modalities: segments of one document get similar vectors, segments of different documents do not.

    segment -> mean of its hidden vectors -> projection of its modality -> unit vector; similarity = cosine

The loss is CLIP's (arXiv:2103.00020): symmetric InfoNCE with a learned temperature, over every pair of modalities. Each segment
is read alone: it does not attend to the rest of its document, in training as in search. **Negatives** are the segments of all
other documents of the optimizer step, on all devices and in all micro-batches (GradCache, arXiv:2101.06983). So
`data.global_batch` sets their number; gradient accumulation costs one more forward pass, without gradients.

Documents with the same `meta.concept`, or else the same first text, are positives of each other. With several positives the
loss of a query is the mean over them, each against the negatives (arXiv:2004.11362, sum outside).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, permutations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.batch import Batch
from pile_app.documents import AUDIO, MODALITIES, TEXT, Document
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.objective import Objective, labelled_pieces, mean_by_piece
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

LARGEST_SCALE = 100.0  # 1 / temperature, as in CLIP
CUTOFFS = (1, 5, 10)
RANKED_AT_ONCE = 1024  # queries
PLACE_WIDTH = 16  # features of each code of an image that keep its position


class GroupAnnotator(Annotator):
    """Label segments with 31 bits of a hash of their document's content."""

    splits_segments = True

    def label(self, document: Document) -> int:
        """Return the label of all segments of a document."""
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
    """Hash `meta.concept`, else the first text, else the key."""
    text = next((segment.data for segment in document.segments if segment.modality == TEXT), document.key)
    group = document.meta.get("concept", text)
    content = group if isinstance(group, bytes) else str(group).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) >> 1


class Step(NamedTuple):
    """All segments of an optimizer step, without gradients. A micro-batch is one of `parts` and begins at row `start`."""

    segments: Embeddings
    start: int
    parts: int


class Contrastive(Objective):
    """Learn one vector space for all modalities.

    Args:
        dimensions: of the space.
        temperature: at the start.
        dropout: fraction of the pooled features that is dropped in training.
        language_weight: see `Objective`.
        freeze: see `Objective`.
        learning_rate: see `Objective`.
    """

    def __init__(
        self, dimensions: int = 128, temperature: float = 0.07, dropout: float = 0.1, language_weight: float = 0.0,
        freeze: bool = False, learning_rate: float = 0.001,
    ) -> None:  # fmt: skip
        super().__init__(language_weight, freeze, learning_rate)
        if dimensions < 1 or not temperature >= 1 / LARGEST_SCALE:
            raise ValueError(
                f"objective.dimensions >= 1 and temperature >= {1 / LARGEST_SCALE}, not {dimensions} and {temperature}"
            )
        self.dimensions = dimensions
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.dropout = dropout
        self.seen: list[Embeddings] = []  # in the validation

    @property
    def annotator(self) -> Annotator:
        return GroupAnnotator()

    def build(self, model: FusedLanguageModel) -> None:
        if len(model.vocabulary.modalities) < 2:
            raise ValueError(
                "objective Contrastive brings modalities together, and this model has text alone: start from a run with "
                "model.image or model.audio"
            )
        width = model.backbone.width
        self.projections = nn.ModuleList(nn.Linear(width, self.dimensions, bias=False) for _ in MODALITIES)
        if model.image_codec is not None:
            self.of_place = nn.Linear(width, PLACE_WIDTH, bias=False)
            self.of_grid = nn.Linear(PLACE_WIDTH * model.vocabulary.image_tokens, self.dimensions, bias=False)

    def embed(self, hidden: Tensor, batch: Batch) -> Embeddings:
        """Embed every labelled segment, in the order of the batch. Later parts of a text that was cut have no modality (-1)."""
        pieces, labels = labelled_pieces(batch)
        starts = batch.piece_starts[pieces].long()
        opened = batch.tokens.flatten()[starts].long() - Vocabulary.OPENERS[TEXT]
        modalities = opened.masked_fill((opened < TEXT) | (opened > AUDIO), -1)
        features = self.drop(mean_by_piece(hidden, batch)[pieces], batch, starts, self.dropout)
        vectors = features.new_zeros(len(features), self.dimensions)
        for modality, projection in enumerate(self.projections):
            vectors = vectors + projection(features).float() * (modalities == modality)[:, None]
        if len(batch.image_starts):
            number = labels.new_zeros(len(batch.piece_sources)).index_copy(
                0, pieces, torch.arange(len(pieces), device=pieces.device)
            )
            first = batch.image_starts.long()
            places = self.of_place(hidden.flatten(0, 1)[batch.image_slots].float())  # (N, codes of an image, PLACE_WIDTH)
            grids = self.of_grid(self.drop(places.flatten(1), batch, first, self.dropout, 1)).float()
            vectors = vectors.index_add(0, number[batch.piece_numbers.flatten()[first]], grids)
        return Embeddings(F.normalize(vectors, dim=1), labels, modalities)

    def prepare(
        self, model: FusedLanguageModel, batches: Sequence[Batch], seed: Callable[[Batch], None] = lambda batch: None
    ) -> list[Step | None]:
        if len(batches) == 1:  # `forward` has all that this device knows of the step
            return [None]
        embedded = []
        with torch.no_grad():
            for batch in batches:
                seed(batch)
                embedded.append(self.embed(self.read(model, batch)[1], batch))
        return [*self._steps(embedded)]

    def _steps(self, embedded: Sequence[Embeddings]) -> list[Step]:
        """Return the step for each micro-batch of this device."""
        segments, sizes = gather(Embeddings.join(embedded))
        first = sum(sizes[: dist.get_rank()]) if len(sizes) > 1 else 0
        starts = accumulate((len(one.labels) for one in embedded[:-1]), initial=first)
        return [Step(segments, start, len(embedded) * len(sizes)) for start in starts]

    def forward(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch, step: Step | None = None) -> Tensor:
        own = self.embed(hidden, batch)
        segments, start, parts = step or self._steps([own])[0]
        before, _, after = segments.vectors.tensor_split([start, start + len(own.labels)])
        vectors = torch.cat([before, own.vectors, after])
        # All parts compute the step's loss. The gradients of the own vectors are of this part alone; those of the temperature,
        # and the loss itself, are divided.
        log_scale = self.log_scale.clamp(max=math.log(LARGEST_SCALE))
        log_scale = log_scale.detach() + (log_scale - log_scale.detach()) / parts
        with torch.autocast(vectors.device.type, enabled=False):
            loss = contrastive_loss(Embeddings(vectors, segments.labels, segments.modalities), log_scale.exp())
        return loss + (loss / parts - loss).detach()

    @torch.no_grad()
    def update(self, model: FusedLanguageModel, hidden: Tensor, batch: Batch) -> None:
        self.seen.append(self.embed(hidden, batch))

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """`retrieval_metrics` of every direction; `recall_5`, the mean over directions, is to choose by."""
        found, _ = gather(Embeddings.join(self.seen))
        self.seen = []
        values: dict[str, Tensor] = {}
        for query, target in permutations(range(len(MODALITIES)), 2):
            of_direction = retrieval_metrics(found.of(query), found.of(target))
            name = f"{MODALITIES[query]}_to_{MODALITIES[target]}"
            values |= {f"{name}_{key}": torch.tensor(value) for key, value in of_direction.items()}
        recalls = [value for key, value in values.items() if key.endswith("recall_5")]
        if not recalls:
            raise ValueError(
                "no document of the validation data has segments of two modalities, which retrieval brings together: give "
                "documents of a picture or a sound with its text in data.sources"
            )
        return values | {"recall_5": torch.stack(recalls).mean()}


@dataclass
class Embeddings:
    """vectors (S, E) float32 of length 1; labels (S,) int64, equal for positives; modalities (S,)."""

    vectors: Tensor
    labels: Tensor
    modalities: Tensor

    @staticmethod
    def join(parts: Sequence[Embeddings]) -> Embeddings:
        rows = zip(*((part.vectors, part.labels, part.modalities) for part in parts), strict=True)
        return Embeddings(*map(torch.cat, rows))

    def of(self, modality: int) -> Embeddings:
        own = self.modalities == modality
        return Embeddings(self.vectors[own], self.labels[own], self.modalities[own])


def contrastive_loss(segments: Embeddings, scale: Tensor) -> Tensor:
    """Return () the mean over the queries of a step, which are the segments with a positive in another modality; 0 without any.
    `scale`: () 1 / temperature."""
    logits = scale * segments.vectors @ segments.vectors.T  # (queries, answers)
    total, count = logits.sum() * 0.0, logits.new_zeros(())
    same = segments.labels[:, None] == segments.labels
    for modality in range(len(MODALITIES)):
        is_answer, is_query = segments.modalities == modality, segments.modalities != modality
        right = same & is_answer & (is_query & (segments.modalities >= TEXT))[:, None]
        wrong = logits.masked_fill(same | ~is_answer, torch.finfo(logits.dtype).min / 2).logsumexp(1, keepdim=True)
        of_answers = F.softplus(wrong - logits) * right  # -log of the probability of one positive among all negatives
        answers = right.sum(1)
        total = total + (of_answers.sum(1) / answers.clamp_min(1)).sum()
        count = count + (answers > 0).sum()
    return total / count.clamp_min(1)


def retrieval_metrics(queries: Embeddings, among: Embeddings) -> dict[str, float]:
    """Compute recall at `CUTOFFS`, median rank and mean reciprocal rank (MRR) of the best positive, and the number of queries.

    `chance_5` is the recall at 5 of a random order. Queries without a positive do not count; without any the result is empty. A
    negative as near as the positive ranks before it.
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
    rank = torch.cat(ranks).cpu().double()
    values = {f"recall_{cutoff}": float((rank <= cutoff).double().mean()) for cutoff in CUTOFFS}
    return values | {
        "median_rank": float(rank.quantile(0.5)),
        "mrr": float((1 / rank).mean()),
        "queries": float(len(rank)),
        "chance_5": float(np.mean(chances)),
    }


def chance_of_recall(answers: int, among: int, cutoff: int) -> float:
    """Return the probability that one of `answers` is among the first `cutoff` of `among` in a random order."""
    return 1 - math.comb(among - answers, cutoff) / math.comb(among, cutoff) if among > cutoff else 1.0


def gather(segments: Embeddings) -> tuple[Embeddings, list[int]]:
    """Return the segments of all devices, in the order of ranks, without gradients, and how many are of each rank.

    With several devices this waits for the device, once: they exchange these numbers.
    """
    sizes = [len(segments.labels)]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Embeddings(segments.vectors.detach(), segments.labels, segments.modalities), sizes
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=segments.labels.device)
    counts[dist.get_rank()] = sizes[0]
    dist.all_reduce(counts)
    sizes = counts.tolist()
    found = []
    for rows in (segments.vectors.detach(), segments.labels, segments.modalities):
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        found.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return Embeddings(*found), sizes
