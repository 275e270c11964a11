"""Log-likelihoods: what the model thinks of an answer that is given, instead of drawing one.

    (document, which of its tokens count) -> packs, as in training -> nats of those tokens

The nats are those of the training loss, token by token. Documents of one call are packed together and do not see each other
(`test_packed_scores_are_those_of_each_alone`), so that many short ones cost little more than their tokens.

- `score_answers`: a segment of any modality after a prompt, with its opener and what ends it.
- `score_continuations`: text that goes on where the last text of a prompt stops.
- `compare_answers`: probabilities of a closed set of answers, of any modality, by length if asked (`choose.py` chooses a text).
- `rolling_scores`: all of a long text, in windows that overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pile_app.data.assembly import PackedDocument, assemble
from pile_app.data.batch import NOT_LEARNED, Batch
from pile_app.data.order import Piece
from pile_app.data.packing import best_fit_decreasing
from pile_app.documents import TEXT, BadSample, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import evaluating, segment_length

BATCH_TOKENS = 8192  # of the packs that are computed at once


class Span(NamedTuple):
    """Tokens [first, stop) of a document, which count, seen after its tokens [start, first)."""

    document: Document
    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Score:
    """Of the tokens of a span that training would learn.

    nats: their negative log-likelihood. tokens: their number. bytes: UTF-8 bytes that they write. is_greedy: each was the most
    likely one.
    """

    nats: float
    tokens: int
    bytes: int
    is_greedy: bool


def score_answers(
    model: FusedLanguageModel, prompts: Sequence[Document], answers: Sequence[Segment], context: int | None = None
) -> list[Score]:
    """Of each answer as the segment that follows the prompt and ends the document: its opener, its tokens, and `<end>`.

    Args:
        model: see `FusedLanguageModel`.
        prompts: one for each answer; their segments are given, whatever their `loss`.
        answers: texts, images or sounds.
        context: most tokens of a document; of a longer one the first are not seen. None: all are.

    Raises:
        ValueError: an answer alone is longer than the context.
        BadSample: a medium cannot be decoded.
    """
    spans = []
    for prompt, answer in zip(prompts, answers, strict=True):
        document = Document((*prompt.segments, replace(answer, loss=True)), prompt.key)
        lengths = [segment_length(model, segment) for segment in document.segments]
        first = 1 + sum(lengths[:-1])
        spans.append(_within(Span(document, 0, first, first + lengths[-1] + 1), context))
    return score_spans(model, spans)


def score_continuations(
    model: FusedLanguageModel, prompts: Sequence[str], continuations: Sequence[str], context: int | None = None
) -> list[Score]:
    """Of each continuation, as text that goes on where the prompt stops; `<end>` does not count.

    Prompt and continuation are tokenized together, as in training. What counts is the tokens from the first on that those of
    the prompt alone do not begin with. (Spaces at the end of a prompt go to the continuation, as in EleutherAI's harness: a
    token seldom ends with one.) An empty prompt is the beginning of a document.

    Args:
        model: see `FusedLanguageModel`.
        prompts: one for each continuation.
        continuations: texts.
        context: most tokens that are seen, those of the continuation included; None: all.

    Raises:
        ValueError: a continuation alone is longer than the context.
    """
    spans = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        ids, alone = (model.tokenizer.encode(text) for text in (prompt + continuation, prompt.rstrip()))
        shared = min(len(ids), len(alone))
        first = 2 + int(np.append(ids[:shared] == alone[:shared], False).argmin())
        spans.append(_within(Span(_text(ids), 0, first, 2 + len(ids)), context))
    return score_spans(model, spans)


def compare_answers(
    model: FusedLanguageModel,
    prompts: Sequence[Document],
    answers: Sequence[Segment],
    normalize: Literal["none", "tokens", "bytes"] = "none",
    context: int | None = None,
) -> Tensor:
    """(prompts, answers) float32 log-probabilities of each answer of a closed set, which sum up to 1 for each prompt.

    Args:
        model: see `FusedLanguageModel`.
        prompts: what is asked.
        answers: all answers there are.
        normalize: none: by likelihood, as classification of documents has it. tokens, bytes: by likelihood a token or byte, so
            that long answers are not at a disadvantage (arXiv:2005.14165, section 2.4). Media have no bytes.
        context: see `score_answers`.

    Raises:
        ValueError: `normalize` is not one of them, or bytes are asked of answers without any.
    """
    if normalize not in ("none", "tokens", "bytes"):
        raise ValueError(f"normalize is none, tokens or bytes, not {normalize!r}")
    scores = score_answers(model, [p for p in prompts for _ in answers], [*answers] * len(prompts), context)
    sizes = {"none": [1] * len(scores), "tokens": [s.tokens for s in scores], "bytes": [s.bytes for s in scores]}[normalize]
    if not all(sizes):
        raise ValueError("normalize='bytes' needs answers with text in them; media and empty texts have no bytes: take tokens")
    each = torch.tensor([-score.nats / size for score, size in zip(scores, sizes, strict=True)])
    return each.view(len(prompts), len(answers)).log_softmax(-1)


def rolling_scores(model: FusedLanguageModel, text: str, context: int, stride: int | None = None) -> list[Score]:
    """Of all tokens of a text, window by window: each window scores its last `stride` tokens (the first window all of its), and
    sees at least `context - stride` tokens before them. Every token counts exactly once; `<end>` does not.

    Args:
        model: see `FusedLanguageModel`.
        text: of any length.
        context: tokens of a window.
        stride: tokens that are new in each; None: all but one, so that windows overlap as little as can be, as those of
            EleutherAI's harness do.

    Raises:
        ValueError: `stride` is not in [1, context).
    """
    stride = context - 1 if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride={stride} must be at least 1 and below the context of {context} tokens")
    ids = model.tokenizer.encode(text)
    length = 2 + len(ids)
    if length == 2:
        return []
    document = _text(ids)
    spans = [Span(document, 0, 2, min(length, context))]
    for first in range(context, length, stride):
        stop = min(first + stride, length)
        spans.append(Span(document, stop - context, first, stop))
    return score_spans(model, spans)


@torch.no_grad()
def score_spans(model: FusedLanguageModel, spans: Sequence[Span]) -> list[Score]:
    """One score a span, in their order.

    Raises:
        BadSample: a document cannot be laid out.
    """
    if not spans:
        return []
    lengths = np.array([span.stop - span.start for span in spans])
    context = int(lengths.max())
    packs = best_fit_decreasing(lengths, context)
    rows = max(1, BATCH_TOKENS // context)
    scores: list[Score | None] = [None] * len(spans)
    with evaluating(model):
        for first in range(0, len(packs), rows):
            numbers = [int(number) for pack in packs[first : first + rows] for number in pack]
            batch = _batch(model, spans, packs[first : first + rows], context)
            for number, score in zip(numbers, _score_batch(model, batch), strict=True):
                scores[number] = score
    return [score for score in scores if score is not None]


def _text(ids: np.ndarray) -> Document:
    return Document((Segment("", ids=ids),))


def _within(span: Span, context: int | None) -> Span:
    """The span, with as much before it as the context holds."""
    if context is None or span.stop - span.start <= context:
        return span
    start = span.stop - context
    if start >= span.first:
        raise ValueError(f"an answer of {span.stop - span.first} tokens does not fit a context of {context}")
    if any(segment.modality != TEXT for segment in span.document.segments):
        raise ValueError(
            f"a document of {span.stop} tokens with media is longer than the context of {context}: only texts can be cut"
        )
    return span._replace(start=start)


def _batch(model: FusedLanguageModel, spans: Sequence[Span], packs: Sequence[np.ndarray], context: int) -> Batch:
    """The packs, with targets only where tokens count."""
    pieces = [
        [
            PackedDocument(Piece(0, 0, 0, span.start, span.stop, span.start == 0), span.document.key, span.document)
            for span in row
        ]
        for row in ([spans[int(number)] for number in pack] for pack in packs)
    ]
    batch = assemble(pieces, model.vocabulary, model.tokenizer, context)
    if batch.rejected:
        raise BadSample(*batch.rejected[0][2:])
    learned = batch.learned.view(-1)
    for row, pack in enumerate(packs):
        place = row * context
        for number in pack:
            span = spans[int(number)]
            # The place before a token is where it is predicted.
            learned[place : place + span.first - span.start - 1] = NOT_LEARNED
            place += span.stop - span.start
            learned[place - 1] = NOT_LEARNED
    counts = torch.bincount(learned.int(), minlength=NOT_LEARNED + 1)[:NOT_LEARNED].tolist()
    return replace(batch, target_counts=tuple(counts)).to(model.token_bytes.device)


def _score_batch(model: FusedLanguageModel, batch: Batch) -> list[Score]:
    """One score a piece, padding left out."""
    pieces = len(batch.piece_sources)
    table = torch.zeros(pieces, 4, dtype=torch.float64, device=batch.tokens.device)  # nats, tokens, bytes, hits
    for modality, loss in model(batch, predict=True).items():
        piece = batch.piece_numbers.flatten()[batch.targets[modality]]
        sizes = model.token_bytes[loss.targets] if modality == TEXT else torch.zeros_like(loss.targets)
        columns = (loss.each, torch.ones_like(loss.each), sizes, loss.predictions == loss.targets)
        table.index_add_(0, piece, torch.stack([column.double() for column in columns], 1))
    kept = table[batch.piece_sources >= 0].tolist()
    return [Score(nats, int(tokens), int(size), hits == tokens) for nats, tokens, size, hits in kept]
