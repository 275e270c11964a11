"""Generation: documents in, one more segment out, of any modality; or as many as the model wants.

The prompt is laid out and encoded exactly as in training; then one token at a time is drawn from the softmax of the modality
that is to be written: an image takes its fixed number of codes, a sound runs until `<audio_end>`, a text until an opener or
`<end>`. With `guidance` w other than 1 a second pass sees the prompt's segments as `<null>` and the logits become
`u + w (c - u)` (classifier-free guidance, arXiv:2207.12598; see `guide`).

    generate             a segment for each prompt          answer_prompts   the same, with log-probabilities
    stream               a text, piece by piece             choose           one of some given texts (`choose.py`)
    generate_document    segments of any modality, as the model chooses, until `<end>`
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document, Segment
from pile_app.model.backbones import Cache
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.sampling import Sampling, TextPieces, Uniforms, draw
from pile_app.model.segments import decode_codes, plain, prompt_tokens, segment_length
from pile_app.vocabulary import Vocabulary

__all__ = ["Answer", "Sampling", "answer_prompts", "generate", "generate_document", "plain", "segment_length", "stream"]


@dataclass(frozen=True)
class Answer:
    """A segment that was written, and how that came about.

    Args:
        segment: what was written.
        codes: (K,) ids within the modality's slice of the vocabulary, all that were drawn: with what ended the segment.
        log_probabilities: (K,) of each by the model at temperature 1, with guidance.
        ended_by: the "model", a "stop" string, or the "limit" of the sampling.
    """

    segment: Segment
    codes: Tensor
    log_probabilities: Tensor
    ended_by: Literal["model", "stop", "limit"]


def generate(
    model: FusedLanguageModel, prompts: Sequence[Document], to: int, sampling: Sampling | None = None
) -> list[Segment]:
    """One segment of modality `to` for each prompt. A text prompt that asks for text is continued.

    Raises:
        ValueError: the model does not know a modality.
        BadSample: a medium of a prompt cannot be decoded.
    """
    return [answer.segment for answer in _answer(model, prompts, to, sampling or Sampling(), scored=False)]


def answer_prompts(
    model: FusedLanguageModel, prompts: Sequence[Document], to: int, sampling: Sampling | None = None
) -> list[Answer]:
    """What `generate` gives, with the log-probabilities of what was drawn."""
    return _answer(model, prompts, to, sampling or Sampling(), scored=True)


@torch.no_grad()
def stream(model: FusedLanguageModel, prompt: Document, sampling: Sampling | None = None) -> Iterator[str | Answer]:
    """A text, in pieces that are safe to show while it is written (see `TextPieces`); then the `Answer`, whose text is all of
    them together. It is the text that `generate` gives for the same prompt and sampling."""
    sampling = sampling or Sampling()
    check_modalities(model, TEXT, [prompt])
    with evaluating(model):
        rows = Rows(model, [prompt_tokens(model, prompt, TEXT)], sampling, [0], scored=True)
        answer = yield from _write_text(rows, sampling)
        yield answer


@torch.no_grad()
def generate_document(
    model: FusedLanguageModel,
    prompt: Document,
    sampling: Sampling | None = None,
    *,
    most_segments: int = 8,
    continue_text: bool = True,
) -> Iterator[str | Answer]:
    """Goes on with a document as the model sees fit, segment by segment of any modality, until `<end>` or a stop string.

    Yields pieces of a text while it is written, and an `Answer` for every segment that is finished. A text that has reached
    `max_text` is the last segment, for the model had more to say; texts of nothing are left out.

    Args:
        most_segments: that are written.
        continue_text: False: a text at the end of the prompt is complete, and what comes is a segment of its own.
    """
    sampling = sampling or Sampling()
    check_modalities(model, TEXT, [prompt])
    vocabulary = model.vocabulary
    openers = {vocabulary.OPENERS[modality]: modality for modality in vocabulary.modalities}
    ends_in_text = bool(prompt.segments) and prompt.segments[-1].modality == TEXT
    with evaluating(model):
        rows = Rows(model, [prompt_tokens(model, prompt, None)], sampling, [0], scored=True)
        opener = Vocabulary.OPENERS[TEXT] if ends_in_text and continue_text else None
        for _ in range(most_segments):
            if opener is None:
                opener = int(rows.draw(TEXT, among=[Vocabulary.END, *openers]))
            if opener == Vocabulary.END:
                return
            to = openers[opener]
            if to == TEXT:
                answer = yield from _write_text(rows, sampling)
                opener = int(answer.codes[-1]) if answer.ended_by == "model" else Vocabulary.END
            else:
                answer, opener = _write(rows, to, sampling)[0], None
            if answer.segment.data:
                yield answer


class Rows:
    """Documents of one length that are continued together, token by token.

    Args:
        rows: what `prompt_tokens` made of each.
        sampling: how tokens are drawn.
        numbers: of the rows among all prompts: the draws of a row follow from its number.
        scored: keep the log-probabilities of what is drawn, (B,) a draw.
    """

    def __init__(
        self,
        model: FusedLanguageModel,
        rows: Sequence[tuple[Tensor, Tensor, Tensor]],
        sampling: Sampling,
        numbers: Sequence[int],
        scored: bool = False,
    ) -> None:
        self.model, self.sampling, self.scored = model, sampling, scored
        tokens, places, hidden = (torch.stack([row[part] for row in rows]) for part in range(3))
        self.contexts = [(tokens, places)]  # (B, T) each
        if sampling.guidance != 1.0:
            self.contexts.append((hidden, torch.zeros_like(places)))
        self.new = self.contexts  # what the backbone has not seen
        self.length = tokens.size(1)
        self.caches: list[Cache | None] = [model.backbone.new_cache() if sampling.use_cache else None for _ in self.contexts]
        self.uniforms = Uniforms(sampling.seed, numbers, tokens.device)
        self.log_probabilities: list[Tensor] = []
        unknown = set(range(len(MODALITIES))) - set(model.vocabulary.modalities)
        self.never = [Vocabulary.BEGIN, Vocabulary.NULL, *(Vocabulary.OPENERS[modality] for modality in unknown)]

    def logits(self, to: int) -> Tensor:
        """(B, slice of modality `to`) of what follows."""
        each = []
        for (tokens, places), cache in zip(self.new, self.caches, strict=True):
            position = torch.arange(self.length - tokens.size(1), self.length, device=tokens.device).expand_as(tokens)
            hidden = self.model.hidden(tokens, places, torch.zeros_like(tokens), position, cache)
            each.append(self.model.logits(hidden[:, -1], to))
        return self._guided(each, to)

    def look_ahead(self, tokens: Tensor) -> Tensor:
        """(C, L, V) text logits after each of `tokens` (C, L), C ways to go on after a single row that `logits` was asked of;
        the row stays as it is."""
        each = []
        for cache in self.caches:
            assert cache is not None
            branches = cache.select(torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device))
            position = torch.arange(self.length, self.length + tokens.size(1), device=tokens.device).expand_as(tokens)
            nowhere = torch.zeros_like(tokens)
            each.append(self.model.logits(self.model.hidden(tokens, nowhere, nowhere, position, branches), TEXT))
        return self._guided(each, TEXT)

    def _guided(self, each: list[Tensor], to: int) -> Tensor:
        """(..., V) of the logits with the prompt, and perhaps without it."""
        mixed = each[0] if len(each) == 1 else guide(each[0], each[1], self.sampling.guidance)
        if to == TEXT:
            mixed[..., self.never] = -torch.inf
        return mixed

    def draw(self, to: int, place: int = 0, among: Sequence[int] | None = None) -> Tensor:
        """(B,) codes of modality `to`, which the rows are continued by. `place`: 1 + number of the code within its image;
        `among`: the only codes that are possible."""
        logits = self.logits(to)
        if among is not None:
            possible = torch.full_like(logits, -torch.inf)
            possible[:, among] = logits[:, among]
            logits = possible
        codes = draw(logits, self.sampling, self.uniforms)
        if self.scored:
            self.log_probabilities.append(logits.log_softmax(-1).gather(1, codes[:, None]).squeeze(1))
        self.append(codes + self.model.vocabulary.slices[to].start, place)
        return codes

    def append(self, token: Tensor, place: int = 0) -> None:
        """Continues the rows by `token` (B,)."""
        token = token[:, None]
        places = torch.full_like(token, place)
        if self.sampling.use_cache:
            self.new = [(token, places)] * len(self.contexts)
        else:
            self.contexts = [(torch.cat([t, token], 1), torch.cat([p, places], 1)) for t, p in self.contexts]
            self.new = self.contexts
        self.length += 1

    def scores(self, first: int, row: int, count: int) -> Tensor:
        """(count,) log-probabilities of the draws of a row from number `first` on, if they were kept."""
        return torch.stack([one[row] for one in self.log_probabilities[first : first + count]]) if self.scored else NO_SCORES


NO_SCORES = torch.zeros(0)
PLAUSIBLE = 0.1  # of the likeliest token's probability


def guide(prompted: Tensor, unprompted: Tensor, guidance: float) -> Tensor:
    """(..., V) logits -> (..., V) logits, `u + w (c - u)`.

    What is implausible with the prompt does not become likelier by guidance above 1 (after the plausibility constraint of
    arXiv:2210.15097): a token of probability 1e-4 with the prompt and 1e-10 without would beat the right one else. What is
    plausible shares the probability that it has with the prompt.
    """
    mixed = unprompted.lerp(prompted, guidance)
    if guidance <= 1:
        return mixed
    implausible = prompted < prompted.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
    before, after = (one.masked_fill(implausible, -torch.inf).logsumexp(-1, keepdim=True) for one in (prompted, mixed))
    mixed += before - after
    return torch.where(implausible, torch.minimum(mixed, prompted), mixed)


@torch.no_grad()
def _answer(model: FusedLanguageModel, prompts: Sequence[Document], to: int, sampling: Sampling, scored: bool) -> list[Answer]:
    check_modalities(model, to, prompts)
    answers: dict[int, Answer] = {}
    with evaluating(model):
        groups: dict[int, list[int]] = defaultdict(list)  # prompts of one length run together, so that no row is padded
        laid_out = [prompt_tokens(model, prompt, to) for prompt in prompts]
        for number, (tokens, _, _) in enumerate(laid_out):
            groups[len(tokens)].append(number)
        for numbers in groups.values():
            rows = Rows(model, [laid_out[number] for number in numbers], sampling, numbers, scored)
            answers.update(zip(numbers, _write(rows, to, sampling), strict=True))
    return [answers[number] for number in range(len(prompts))]


def _write(rows: Rows, to: int, sampling: Sampling) -> list[Answer]:
    """One segment of modality `to` for each row."""
    model, vocabulary, first = rows.model, rows.model.vocabulary, len(rows.log_probabilities)
    count, device = len(rows.new[0][0]), rows.new[0][0].device
    stops, limit = _stops(vocabulary, to, sampling)
    stop_codes = torch.tensor(stops, device=device)
    texts = [TextPieces(model.tokenizer, sampling.stop) for _ in range(count)] if to == TEXT and sampling.stop else []
    done = torch.zeros(count, dtype=torch.bool, device=device)
    lengths = torch.full((count,), limit, device=device)  # without what ended the segment
    drawn: list[Tensor] = []
    for step in range(limit):
        codes = rows.draw(to, step + 1 if to == IMAGE else 0)
        drawn.append(codes)
        ended = torch.isin(codes, stop_codes) & ~done
        lengths[ended] = step
        done |= ended
        if texts:
            finished, tokens = done.tolist(), (codes - Vocabulary.SPECIALS).tolist()
            for number, text in enumerate(texts):
                if not finished[number]:
                    text.push(tokens[number])
                    if text.stopped:
                        done[number], lengths[number] = True, step + 1
        if bool(done.all()):
            break
    every = torch.stack(drawn, 1)
    kept = [row[:length] for row, length in zip(every, lengths.tolist(), strict=True)]
    answers = []
    for number, segment in enumerate(decode_codes(model, kept, to)):
        by: Literal["model", "stop", "limit"] = "model" if bool(done[number]) or to == IMAGE else "limit"
        if texts:
            texts[number].finish()
            by = "stop" if texts[number].stopped else by
            segment = Segment(texts[number].text)
        codes = every[number, : len(kept[number]) + (by == "model" and to != IMAGE)]
        answers.append(Answer(segment, codes, rows.scores(first, number, len(codes)), by))
    if to == AUDIO and not bool(done.all()):  # for what may come after it
        rows.append(torch.full((count,), vocabulary.audio_end, device=device))
    return answers


def _write_text(rows: Rows, sampling: Sampling) -> Generator[str, None, Answer]:
    """One text for the one row, in pieces."""
    model, first = rows.model, len(rows.log_probabilities)
    stops, limit = _stops(model.vocabulary, TEXT, sampling)
    text = TextPieces(model.tokenizer, sampling.stop)
    codes: list[int] = []
    by: Literal["model", "stop", "limit"] = "limit"
    while by == "limit" and len(codes) < limit:
        codes.append(int(rows.draw(TEXT)))
        if codes[-1] in stops:
            by = "model"
        elif piece := text.push(codes[-1] - Vocabulary.SPECIALS):
            yield piece
        if text.stopped:
            by = "stop"
    if piece := text.finish():
        yield piece
    return Answer(Segment(text.text), torch.tensor(codes), rows.scores(first, 0, len(codes)), by)


def _stops(vocabulary: Vocabulary, to: int, sampling: Sampling) -> tuple[list[int], int]:
    """Codes that end a segment, and the most codes it may have."""
    if to == IMAGE:
        return [], vocabulary.image_tokens
    if to == AUDIO:
        return [vocabulary.audio_codes], max(1, int(sampling.max_seconds * vocabulary.audio_tokens_per_second))
    return [Vocabulary.END, *Vocabulary.OPENERS], sampling.max_text


def check_modalities(model: FusedLanguageModel, to: int, prompts: Sequence[Document]) -> None:
    for modality in {to, *(segment.modality for prompt in prompts for segment in prompt.segments)}:
        if modality not in model.vocabulary.modalities:
            name = MODALITIES[modality]
            raise ValueError(f"the model has no {name} codec: it can neither read nor write {name}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A model, or what hangs on it, without dropout."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
