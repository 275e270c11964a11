"""Embed segments and documents with a run of the objective `Contrastive`.

A segment is embedded alone, laid out as in training. The vector of a document is the mean of its segments', normalized. Only
the beginning of a text longer than the run's context is read; a longer image or sound has no embedding, as in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pile_app.data.assembly import assemble, whole
from pile_app.data.index import segment_size
from pile_app.documents import MODALITIES, TEXT, BadSample, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.tasks.retrieval import Contrastive, GroupAnnotator
from pile_app.training.module import PileModule


class _Numbers(GroupAnnotator):
    """Use the index of a segment, which is the key of its document, as its label."""

    def label(self, document: Document) -> int:
        return int(document.key)


class Embedder:
    """A trained model and its objective, which it sets to evaluation mode.

    Args:
        model: on its device.
        objective: on the same.
        context: tokens that are read of a text, of the run.
        batch_tokens: places of a batch.
    """

    def __init__(self, model: FusedLanguageModel, objective: Contrastive, context: int, batch_tokens: int = 16_384) -> None:
        self.model, self.objective = model.eval(), objective.eval()
        self.context, self.batch_tokens, self.run = context, batch_tokens, ""

    @classmethod
    def of_run(cls, run: Path | str, module: PileModule, context: int) -> Embedder:
        """Make it of a run's module. Raises ValueError if it was not trained to embed."""
        if not isinstance(module.objective, Contrastive):
            raise ValueError(f"{str(run)!r} was not trained to embed: train one with --config retrieval")
        embedder = cls(module.model, module.objective, context)
        embedder.run = str(Path(run).resolve())
        return embedder

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that differ between models whose embeddings cannot be compared."""
        digest = hashlib.blake2b(f"{self.model.vocabulary.tokenizer} {self.context}".encode(), digest_size=16)
        for module in (self.model, self.objective):
            for name, tensor in sorted(module.state_dict().items()):
                content = int(torch.hash_tensor(tensor).view(torch.int64)) if tensor.numel() else 0
                digest.update(f"{name} {tuple(tensor.shape)} {content}".encode())
        return digest.hexdigest()

    def segments(self, segments: Sequence[Segment]) -> tuple[np.ndarray, dict[int, BadSample]]:
        """(S, E) float32 of length 1, zeros where a segment has none; number of the segment -> why it has none."""
        vectors = np.zeros((len(segments), self.objective.dimensions), np.float32)
        bad: dict[int, BadSample] = {}
        rows: list[tuple[int, int, Segment]] = []  # tokens, number, segment
        for number, segment in enumerate(segments):
            try:
                rows.append((*self._measured(segment, number),))
            except BadSample as error:
                bad[number] = error
        for some in batches_by_length(rows, lambda row: row[0], self.batch_tokens):
            batch = assemble(
                [[whole(Document((segment,), str(number)), tokens)] for tokens, number, segment in some],
                self.model.vocabulary,
                self.model.tokenizer,
                some[-1][0],
                annotator=_Numbers(),
            )
            bad |= {int(key): BadSample(reason, detail) for _, key, reason, detail in batch.rejected}
            with torch.no_grad():
                batch = batch.to(self.model.token_bytes.device)
                found = self.objective.embed(self.model.read(batch)[1], batch)
            vectors[found.labels.cpu().numpy()] = found.vectors.cpu().numpy()
        return vectors, bad

    def documents(self, documents: Sequence[Document]) -> np.ndarray:
        """(N, E) of documents.

        Raises:
            BadSample: none of the segments of a document can be used.
        """
        starts = list(accumulate((len(document.segments) for document in documents), initial=0))
        vectors, bad = self.segments([segment for document in documents for segment in document.segments])
        pooled = np.zeros((len(documents), vectors.shape[1]), np.float32)
        for number, (start, stop) in enumerate(pairwise(starts)):
            usable = [n for n in range(start, stop) if n not in bad]
            if not usable:
                raise bad[start]
            mean = vectors[usable].mean(0)
            pooled[number] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return pooled

    def _measured(self, segment: Segment, number: int) -> tuple[int, int, Segment]:
        """(tokens of a document of it alone, its number, the segment with its text as ids)."""
        vocabulary = self.model.vocabulary
        if segment.modality not in vocabulary.modalities:
            name = MODALITIES[segment.modality]
            raise BadSample(f"no_{name}_codec", f"the model of the run knows no {name}")
        if segment.modality == TEXT:
            if not segment.is_encoded:
                segment = replace(segment, ids=self.model.tokenizer.encode(segment.text))
            size, rate = len(segment.codes.values if segment.ids is None else segment.ids), 0
        else:
            size, rate = segment_size(segment)
        tokens = 2 + vocabulary.segment_tokens(segment.modality, size, rate)
        if tokens > self.context and segment.modality != TEXT:
            raise BadSample("longer_than_context", f"{tokens} tokens; the run was trained with {self.context}")
        return min(tokens, self.context), number, segment


T = TypeVar("T")


def batches_by_length(rows: Iterable[T], length: Callable[[T], int], tokens: int) -> Iterator[list[T]]:
    """Group rows of similar length to batches of about `tokens` with the padding; the last row of a batch is the longest."""
    batch: list[T] = []
    for row in sorted(rows, key=length):
        if batch and length(row) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
