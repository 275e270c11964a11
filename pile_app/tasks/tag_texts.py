"""Find named entities in texts, with a run of the objective `Tagging`.

text ──► pieces of at most the context, cut between words ──► tags of their words ──► spans of the text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pile_app.data.assembly import assemble, whole
from pile_app.documents import Document, Segment
from pile_app.prepare.entities import Offsets
from pile_app.tasks.embed import batches_by_length
from pile_app.tasks.entities import Span, document_words, last_tokens, merge_words, spans_of_words
from pile_app.tasks.tagging import Tagging, gather_words
from pile_app.training.module import PileModule

BATCH_TOKENS = 16_384
AROUND = 4  # `<begin>`, `<text>`, `<end>`, and one more token if the text is cut


class Tagged(NamedTuple):
    text: str
    spans: list[Span]


class _Piece(NamedTuple):
    """Some words of text number `text`, from character `start` on."""

    text: int
    start: int
    words: list[Offsets]
    document: Document
    tokens: int


@torch.no_grad()
def tag_documents(module: PileModule, documents: Sequence[Document], context: int) -> list[Tagged]:
    """Find the entities of each text, in order and without overlaps.

    Args:
        module: in evaluation mode, of a run with the objective `Tagging`.
        documents: of one text each, with `words` in their meta or without.
        context: largest number of tokens that are read at once; longer texts are cut, at the end of a sentence if possible.

    Raises:
        ValueError: the run has another objective.
    """
    objective = module.objective
    if not isinstance(objective, Tagging):
        raise ValueError("the run was not trained to tag: its model.objective is not pile_app.tasks.tagging.Tagging")
    tagged = [Tagged(document.segments[0].text, []) for document in documents]
    pieces = [piece for number, document in enumerate(documents) for piece in _pieces(number, document, context, module)]
    for batch in batches_by_length(pieces, lambda piece: piece.tokens + AROUND, BATCH_TOKENS):
        longest = batch[-1].tokens + AROUND
        packs = [[whole(piece.document, piece.tokens + AROUND - 1)] for piece in batch]
        inputs = assemble(packs, module.vocabulary, module.tokenizer, longest, annotator=objective.annotator)
        inputs = inputs.to(module.device)
        _, hidden = module.model.read(inputs)
        words = gather_words(hidden, inputs)
        for piece, tags, count in zip(batch, objective.decode(words).tolist(), words.lengths.tolist(), strict=True):
            text = piece.document.segments[0].text
            last = last_tokens(text, piece.words, module.tokenizer)
            _, units, _ = merge_words(last, piece.words, np.zeros(len(last), np.int32))
            for start, stop, name in spans_of_words(units, tags[:count], objective.types):
                tagged[piece.text].spans.append(Span(piece.start + start, piece.start + stop, name))
    for one in tagged:
        one.spans.sort()
    return tagged


def _pieces(number: int, document: Document, context: int, module: PileModule) -> Iterator[_Piece]:
    text = document.segments[0].text
    words, limit = document_words(text, document.meta), context - AROUND
    ends = last_tokens(text, words, module.tokenizer) + 1 if words else np.zeros(0, np.int64)
    first = 0
    while first < len(words):
        start = words[first][0]
        before = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, before + limit, side="right")))
        if stop < len(words):
            sentences = (n for n in range(stop, first + (stop - first) // 2, -1) if text[words[n - 1][1] - 1] in ".!?\n\u3002")
            stop = next(sentences, stop)
        part = text[start : words[stop - 1][1]]
        places = [(a - start, b - start) for a, b in words[first:stop]]
        meta = {"words": places, "spans": []}
        yield _Piece(
            number, start, places, Document((Segment(part),), str(number), meta=meta), len(module.tokenizer.encode(part))
        )
        first = stop


def as_inline(tagged: Tagged) -> str:
    """`I was in [Paris|location] .`"""
    return "".join(part if name is None else f"[{part}|{name}]" for part, name in split_parts(tagged))


def as_record(tagged: Tagged) -> dict[str, Any]:
    """Return what `pile prepare` reads, with the words of each span for people."""
    spans = [{"start": a, "end": b, "label": name, "text": tagged.text[a:b]} for a, b, name in tagged.spans]
    return {"text": tagged.text, "spans": spans}


def split_parts(tagged: Tagged) -> Iterator[tuple[str, str | None]]:
    """Yield the text in parts, each with its type or None."""
    place = 0
    for start, stop, name in tagged.spans:
        yield tagged.text[place:start], None
        yield tagged.text[start:stop], name
        place = stop
    yield tagged.text[place:], None
