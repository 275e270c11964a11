"""What an objective has to know of documents besides their tokens: labels of tokens. Runs without an objective have none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pile_app.documents import TEXT, Document

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

NO_LABEL = -1


class Annotator(ABC):
    """Labels tokens of documents, in the workers that load them.

    splits_segments: each segment, from its opener on, becomes a piece that does not attend to the others; so do `<begin>` and
    `<end>`.
    """

    splits_segments = False

    def arrange(self, document: Document) -> Document:
        """Put the segments in order, if it matters."""
        return document

    @abstractmethod
    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        """Return (length,) int32, the label of each token from 0, or `NO_LABEL`.

        Args:
            document: with texts that are not tokenized, and its `meta`.
            spans: [first, stop) of each segment's tokens; its opener comes before them.
            length: tokens of the document.
            number: of the document in the batch.

        Raises:
            ValueError: the document cannot be labelled; the run stops.
        """


def label_last(document: Document) -> Document:
    """Order a document whose label is a segment, not in `meta["label"]`: its last text comes last."""
    if document.ordered or "label" in document.meta:
        return document
    texts = [number for number, segment in enumerate(document.segments) if segment.modality == TEXT]
    if not texts:
        raise ValueError(f"document {document.key!r} has no label: name its field, e.g. fields: [..., {{label: cls}}]")
    label = document.segments[texts[-1]]
    return replace(document, segments=(*(one for one in document.segments if one is not label), label), ordered=True)


def label_of(document: Document) -> tuple[str, bool]:
    """Return the label, and whether it is the last segment: `meta["label"]`, which may be learned as text, or the last text."""
    last = document.segments[-1]
    text = last.text.strip() if last.modality == TEXT else ""
    label = str(document.meta.get("label", text or last.extension))
    return label, "label" not in document.meta or (text == label and len(document.segments) > 1)
