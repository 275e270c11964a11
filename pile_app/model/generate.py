"""Generation: documents in, another segment of any modality out, or as many as the model wants.

The prompt is laid out and encoded as in training; then one token at a time is drawn from the softmax of the modality that is
written: an image takes its fixed number of codes, a sound runs until `<audio_end>`, a text until an opener or `<end>`. With
`guidance` w other than 1 a second pass sees the prompt's segments as `<null>`, and the logits become `u + w (c - u)`
(classifier-free guidance, arXiv:2207.12598; see `guide`).

    generate             a segment for each prompt          answer_prompts   the same, with log-probabilities
    stream               a text, piece by piece             score.choose     a choice among given texts
    generate_document    segments of any modality, as the model chooses, until `<end>`
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.sampling import Sampling, TextPieces, draw
from pile_app.model.segments import decode_codes, plain, prompt_tokens, segment_length
from pile_app.vocabulary import Vocabulary

__all__ = ["Answer", "Sampling", "answer_prompts", "generate", "generate_document", "plain", "segment_length", "stream"]

Row = tuple[Tensor, Tensor, Tensor | None]  # (B, T) tokens and image indices, (B, T, embedding width) features
Context = list[Row]  # with the prompt, and perhaps without it
CHECK_EVERY = 16  # tokens between looks at which rows have ended: each look waits for the device
TEXT_ENDS = (Vocabulary.END, *Vocabulary.OPENERS)  # what may follow a text


@dataclass(frozen=True)
class Answer:
    """A generated segment, and how it was drawn."""

    segment: Segment
    codes: Tensor  # (K,) ids within the modality's slice of the vocabulary, including the code that ended the segment
    log_probabilities: Tensor  # (K,) of each code by the model at temperature 1, with guidance
    ended_by: Literal["model", "stop", "limit"]


def generate(
    model: FusedLanguageModel, prompts: Sequence[Document], to: int, sampling: Sampling | None = None
) -> list[Segment]:
    """Write a segment of modality `to` for each prompt. A text at the end of a prompt is continued by text.

    Raises ValueError if the model does not know a modality, BadSample if a medium of a prompt cannot be decoded.
    """
    return [answer.segment for answer in answer_prompts(model, prompts, to, sampling)]


@torch.no_grad()
def answer_prompts(
    model: FusedLanguageModel, prompts: Sequence[Document], to: int, sampling: Sampling | None = None
) -> list[Answer]:
    """Like `generate`, with the log-probabilities of what was drawn."""
    sampling = sampling or Sampling()
    check_modalities(model, {to}, prompts)
    answers: dict[int, Answer] = {}
    with model.inference():
        for indices, context in by_length([lay_out(model, prompt, to, sampling.guidance != 1) for prompt in prompts]):
            decoder = Decoder(model, context, segment_limit(model, to, sampling), sampling.guidance, sampling.seed, indices)
            try:
                next(decoder.write(to, sampling))  # yields nothing
            except StopIteration as end:
                answers.update(zip(indices, end.value, strict=True))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def stream(model: FusedLanguageModel, prompt: Document, sampling: Sampling | None = None) -> Iterator[str | Answer]:
    """Yield a text piece by piece (see `TextPieces`), then the `Answer`. It is the text that `generate` gives."""
    sampling = sampling or Sampling()
    check_modalities(model, {TEXT}, [prompt])
    with model.inference():
        context = lay_out(model, prompt, TEXT, sampling.guidance != 1)
        decoder = Decoder(model, context, sampling.max_text, sampling.guidance, sampling.seed)
        yield from (yield from decoder.write(TEXT, sampling, streams=True))


@torch.no_grad()
def generate_document(
    model: FusedLanguageModel, prompt: Document, sampling: Sampling | None = None, *, most_segments: int = 8,
    continue_text: bool = True,
) -> Iterator[str | Answer]:  # fmt: skip
    """Continue a document as the model sees fit, segment by segment of any modality, until `<end>` or a stop string.

    Yields pieces of a text while it is written, and an `Answer` for every finished segment. A text that reaches `max_text` is
    the last segment; empty texts are omitted. Without `continue_text` a text at the end of the prompt is complete, and a new
    segment follows.
    """
    sampling = sampling or Sampling()
    check_modalities(model, set(), [prompt])
    openers = {Vocabulary.OPENERS[modality]: modality for modality in model.vocabulary.modalities}
    ends_in_text = bool(prompt.segments) and prompt.segments[-1].modality == TEXT
    opener = Vocabulary.OPENERS[TEXT] if ends_in_text and continue_text else None
    with model.inference():
        room = max(segment_limit(model, modality, sampling) for modality in openers.values())
        context = lay_out(model, prompt, None, sampling.guidance != 1)
        decoder = Decoder(model, context, room, sampling.guidance, sampling.seed)
        for _ in range(most_segments):
            if opener is None:
                allowed = [Vocabulary.END, *openers]
                opener = allowed[int(draw(decoder.logits(TEXT)[:, allowed], sampling, decoder.uniform(1)[:, 0]))]
                decoder.append(torch.full((1, 1), opener, device=decoder.device))
            if opener == Vocabulary.END:
                return
            to = openers[opener]
            (answer,) = yield from decoder.write(to, sampling, streams=True)
            opener = None
            if to == TEXT:
                opener = int(answer.codes[-1]) if answer.ended_by == "model" else Vocabulary.END
            if answer.segment.data:
                yield answer


class Decoder:
    """Rows of one length that are read and continued together, within `model.inference`, with a cache of fixed size.

    Args:
        context: the rows; and the same rows without the prompt, where guidance or a prior needs them.
        room: tokens that may follow; beyond it the cache grows.
        seed, indices: of the rows' generators. Each row has its own, so that draws depend on neither the batch nor the device.
    """

    def __init__(
        self, model: FusedLanguageModel, context: Context, room: int, guidance: float = 1.0, seed: int = 0,
        indices: Sequence[int] = (0,),
    ) -> None:  # fmt: skip
        self.model, self.guidance, self.unread, self.length = model, guidance, context, 0
        self.caches = [model.backbone.new_cache(tokens.size(1) + room) for tokens, *_ in context]
        self.generators = [np.random.default_rng([seed % (1 << 64), index]) for index in indices]
        self.device = model.token_bytes.device
        unknown = set(range(len(MODALITIES))) - set(model.vocabulary.modalities)
        never = [Vocabulary.BEGIN, Vocabulary.NULL, *(Vocabulary.OPENERS[modality] for modality in unknown)]
        self.never = torch.tensor(never, device=self.device)

    def uniform(self, count: int) -> Tensor:
        """(B, count) float32 in [0, 1), as MPS has no float64."""
        return torch.from_numpy(np.stack([one.random(count, np.float32) for one in self.generators])).to(self.device)

    def append(self, tokens: Tensor, image_indices: Tensor | None = None) -> None:
        """Continue the rows by (B, n) tokens."""
        indices = torch.zeros_like(tokens) if image_indices is None else image_indices
        self.unread = [(tokens, indices, None)] * len(self.caches)

    def read(self) -> list[Tensor]:
        """Read what was appended: (B, n, D) hidden states in each context."""
        size = self.unread[0][0].shape
        position = torch.arange(self.length, self.length + size[1], device=self.device).expand(size)
        self.length += size[1]
        with self.model.autocast():
            return [
                self.model.hidden(tokens, indices, torch.zeros_like(position), position, cache, None, features)
                for (tokens, indices, features), cache in zip(self.unread, self.caches, strict=True)
            ]

    def select(self, rows: Sequence[int]) -> Decoder:
        """Copy some rows."""
        chosen, rows_of_cache = copy(self), torch.tensor(rows, device=self.device)
        chosen.caches = [cache.select(rows_of_cache) for cache in self.caches]
        return chosen

    def guided(self, logits: list[Tensor]) -> list[Tensor]:
        """The logits of each context; with guidance, their mixture."""
        return logits if self.guidance == 1 else [guide(logits[0], logits[1], self.guidance)]

    def logits(self, to: int, step: int = 0) -> Tensor:
        """(B, slice of modality `to`) logits of the next token, which has index `step` within its segment."""
        logits = self.guided([self.model.logits(hidden[:, -1], to) for hidden in self.read()])[0]
        if to == AUDIO and (codebooks := self.model.vocabulary.audio_codebooks) > 1:  # in turn; a sound ends with a frame
            *others, end = logits.split(self.model.vocabulary.audio_codes // codebooks, -1)
            for index in {*range(codebooks)} - {step % codebooks}:
                others[index].fill_(-torch.inf)
            end.fill_(-torch.inf) if step % codebooks else end
        return logits.index_fill_(-1, self.never, -torch.inf) if to == TEXT else logits

    def write(self, to: int, sampling: Sampling, streams: bool = False) -> Generator[str, None, list[Answer]]:
        """Write one segment of modality `to` for each row; `streams`: of a single row, yielding the pieces of a text."""
        vocabulary, rows, limit = self.model.vocabulary, len(self.generators), segment_limit(self.model, to, sampling)
        ends = {TEXT: TEXT_ENDS, IMAGE: (), AUDIO: (vocabulary.audio_codes,)}[to]
        texts = [TextPieces(self.model.tokenizer, sampling.stop) for _ in range(rows)] if streams or sampling.stop else []
        texts = texts if to == TEXT else []
        check_every = 1 if streams or texts or self.device.type == "cpu" else CHECK_EVERY
        uniform = self.uniform(limit)
        codes: list[list[int]] = [[] for _ in range(rows)]
        ended_by: list[Literal["model", "stop", "limit"]] = ["limit"] * rows
        drawn: list[Tensor] = []
        log_probabilities: list[Tensor] = []
        for step in range(limit):
            logits = self.logits(to, step)
            drawn.append(draw(logits, sampling, uniform[:, step])[:, None])
            log_probabilities.append(logits.gather(1, drawn[-1]) - logits.logsumexp(-1, keepdim=True))
            indices = torch.full_like(drawn[-1], step + 1) if to == IMAGE else None
            self.append(drawn[-1] + vocabulary.slices[to].start, indices)
            if len(drawn) < check_every and step < limit - 1:
                continue
            for row, new in enumerate(torch.cat(drawn, 1).tolist()):
                for code in new if ended_by[row] == "limit" else ():
                    codes[row].append(code)
                    if code in ends:
                        ended_by[row] = "model"
                        break
                    if texts and (piece := texts[row].push(code - Vocabulary.SPECIALS)) and streams:
                        yield piece
                    if texts and texts[row].stopped:
                        ended_by[row] = "stop"
            drawn.clear()
            if "limit" not in ended_by:
                break
        if to == IMAGE:
            ended_by = ["model"] * rows
        if streams and to == AUDIO and ended_by == ["limit"]:  # for the segment that may follow
            end = torch.full((1, 1), vocabulary.audio_end, device=self.device)
            self.append(torch.cat([self.unread[0][0], end], 1))
        for text in texts:
            if (piece := text.finish()) and streams:
                yield piece
        if texts:
            segments = [Segment(text.text) for text in texts]
        else:
            segments = decode_codes(self.model, [row[:-1] if row[-1] in ends else row for row in codes], to)
        scores = torch.cat(log_probabilities, 1).cpu()
        return [
            Answer(segment, torch.tensor(row), score[: len(row)], by)
            for segment, row, score, by in zip(segments, codes, scores, ended_by, strict=True)
        ]


def segment_limit(model: FusedLanguageModel, to: int, sampling: Sampling) -> int:
    """Most codes of a segment that is written."""
    if to == IMAGE:
        return model.vocabulary.image_tokens
    if to == AUDIO:
        codebooks = model.vocabulary.audio_codebooks
        frames = int(sampling.max_seconds * model.vocabulary.audio_tokens_per_second / codebooks)
        return max(1, frames) * codebooks
    return sampling.max_text


def lay_out(
    model: FusedLanguageModel, prompt: Document, to: int | None, with_masked: bool, masked_segments: int | None = None
) -> Context:
    """The tokens of a prompt, (1, T); `with_masked`: also with its first segments (None: all) behind `<null>`."""
    masked = len(prompt.segments) if masked_segments is None else masked_segments
    return [as_row(*prompt_tokens(model, prompt, to, count)) for count in (0, *[masked] * with_masked)]


def as_row(tokens: Tensor, indices: Tensor, features: Tensor | None, first: int = 0, stop: int | None = None) -> Row:
    """What `prompt_tokens` laid out as one row, from a token to another."""
    some = slice(first, stop)
    return tokens[None, some], indices[None, some], None if features is None else features[None, some]


def by_length(contexts: Sequence[Context], at_once: int = 1 << 30) -> Iterator[tuple[list[int], Context]]:
    """Stack laid out prompts of one length, so that no row is padded: yields their indices and their contexts."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, context in enumerate(contexts):
        groups[context[0][0].size(1)].append(index)
    for group in groups.values():
        for first in range(0, len(group), at_once):
            some = group[first : first + at_once]
            pairs = zip(*(contexts[index] for index in some), strict=True)
            yield some, [_stack(list(zip(*rows, strict=True))) for rows in pairs]


def _stack(columns: list[tuple[Any, ...]]) -> Row:
    tokens, indices, features = columns
    if any(found is None for found in features):  # of all, or of prompts without segments
        return torch.cat(tokens), torch.cat(indices), None
    return torch.cat(tokens), torch.cat(indices), torch.cat(features)


PLAUSIBLE = 0.1  # of the likeliest token's probability


def guide(prompted: Tensor, unprompted: Tensor, guidance: float) -> Tensor:
    """(..., V) logits -> (..., V) logits, `u + w (c - u)`.

    Guidance above 1 does not make an implausible token likelier (after the plausibility constraint of arXiv:2210.15097):
    otherwise a token of probability 1e-4 with the prompt and 1e-10 without it would beat the right one. The plausible tokens
    share the probability that they have with the prompt.
    """
    mixed = unprompted.lerp(prompted, guidance)
    if guidance <= 1:
        return mixed
    implausible = prompted < prompted.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
    before, after = (x.masked_fill(implausible, -torch.inf).logsumexp(-1, keepdim=True) for x in (prompted, mixed))
    mixed += before - after
    return torch.where(implausible, torch.minimum(mixed, prompted), mixed)


def check_modalities(model: FusedLanguageModel, to: set[int], prompts: Sequence[Document]) -> None:
    """Raise ValueError if the model does not know a modality."""
    for modality in to | {segment.modality for prompt in prompts for segment in prompt.segments}:
        if modality not in model.vocabulary.modalities:
            name = MODALITIES[modality]
            raise ValueError(f"the model has no {name} codec: it can neither read nor write {name}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[Any]:
    """Switch a module to evaluation mode, and back."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
