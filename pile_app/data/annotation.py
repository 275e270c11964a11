"""What an objective wants to know of documents besides their tokens: a label at some of their places.

A batch of a run without an objective holds no labels, and nothing here is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pile_app.documents import TEXT, Document, Segment

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer

NO_LABEL = -1


class Annotator(ABC):
    """Labels places of documents, in the workers that load them.

    splits_segments: each segment, from its opener on, is a piece of its own that sees nothing of the others; so are `<begin>`
    and `<end>`.
    """

    splits_segments = False

    def arrange(self, document: Document) -> Document:
        """The document as it is to be read, if the order of its segments matters."""
        return document

    @abstractmethod
    def labels(
        self, document: Document, spans: Sequence[tuple[int, int]], length: int, number: int, tokenizer: Tokenizer
    ) -> np.ndarray:
        """(length,) int32: the label, from 0, of each token of the document, `NO_LABEL` where it has none.

        Args:
            document: with its texts as they are, and its `meta`.
            spans: [first, stop) of each segment's tokens; its opener stands before them.
            length: tokens of the document.
            number: of the document in the batch.
            tokenizer: of the texts.

        Raises:
            ValueError: what the document says cannot be; the run stops.
        """


def label_last(document: Document) -> Document:
    """A labelled example: its last segment is the label. Where the order is free that is its `cls` file, or its last text."""
    if document.ordered:
        return document
    texts = [number for number, segment in enumerate(document.segments) if segment.modality == TEXT]
    if not texts:
        raise ValueError(f"document {document.key!r} has no label: its last segment has to be one, a text such as a cls file")
    label = document.segments[texts[-1]]
    others: tuple[Segment, ...] = tuple(segment for segment in document.segments if segment is not label)
    return Document((*others, label), document.key, True, document.meta)
