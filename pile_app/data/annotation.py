"""Labels of tokens, for runs with an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import TEXT, Document

NO_LABEL = -1


class Annotator(ABC):
    """Label tokens of documents, in the loading workers."""

    splits_segments = False  # whether each segment, from its opener on, is a piece of its own, as are `<begin>` and `<end>`
    readings = 1  # times that a document stands in its sequence, with loss and labels at the last

    def arrange(self, document: Document) -> Document:
        """Order the segments if the order matters; repeat them if the document is read again."""
        if self.readings == 1:
            return document
        first = [replace(segment, loss=False) for segment in document.segments] * (self.readings - 1)
        return replace(document, segments=(*first, *document.segments))

    def check(self, document: Document) -> Any:  # noqa: B027 (optional)
        """Raise ValueError if an arranged document cannot be labelled. Documents are checked before training begins."""

    @abstractmethod
    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        """Return the label of each token from 0, or `NO_LABEL`, (length,) int32; raise ValueError to stop the run.
        spans: [first, stop) of the tokens of each segment, without its opener; number: of the document in the batch."""


def label_last(document: Document) -> Document:
    """Move the last text, which is the label, to the end, unless `meta["label"]` is given."""
    if document.ordered or "label" in document.meta:
        return document
    texts = [number for number, segment in enumerate(document.segments) if segment.modality == TEXT]
    if not texts:
        raise ValueError(f"document {document.key!r} has no label: name its field, e.g. fields: [..., {{label: cls}}]")
    label = document.segments[texts[-1]]
    others = [segment for segment in document.segments if segment is not label]
    return replace(document, segments=(*others, label), ordered=True)


def label_of(document: Document) -> tuple[str, bool]:
    """Return the label, `meta["label"]` or the last text, and whether the last segment holds it."""
    last = document.segments[-1]
    text = last.text.strip() if last.modality == TEXT else ""
    label = str(document.meta.get("label", text or last.extension))
    return label, "label" not in document.meta or (text == label and len(document.segments) > 1)
