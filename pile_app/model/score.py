"""Log-likelihoods of given answers, instead of drawing one.

A prompt is read once; its answers share its cache, and tokens that several answers begin with are read once. Scores do not
depend on what is computed together. What counts:

    score_choices          a closed set of segments: tokens and end of the segment; the opener only if modalities differ
    score_answers          a segment that ends the document: opener, tokens and `<end>`, as in the training loss
    score_continuations    text that continues the prompt: its tokens
    rolling_scores         a long text in windows that overlap: every token once
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pile_app.documents import TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import TEXT_ENDS, Context, Decoder, as_row, by_length, check_modalities, lay_out
from pile_app.model.sampling import Sampling, draw
from pile_app.model.segments import is_continued, prompt_tokens
from pile_app.vocabulary import Vocabulary

PROMPTS, ROWS, LOGITS = 32, 1024, 1 << 24  # that are computed at once: prompts, beginnings of answers, logits
TEXT_END = -1  # in a path: whatever ends a text

Path = list[tuple[int, int]]  # tokens of an answer and their image indices


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of an answer, its number of tokens, their UTF-8 bytes, whether each token was the likeliest."""

    nats: float
    tokens: int
    bytes: int
    is_greedy: bool


@dataclass(frozen=True)
class Choice:
    """`index` of the chosen text; (C,) log-probabilities of all of them by the model, which need not sum to 1."""

    index: int
    log_probabilities: Tensor


def choose(
    model: FusedLanguageModel, prompts: Sequence[Document], texts: Sequence[str], sampling: Sampling | None = None
) -> list[Choice]:
    """Choose one of the texts for each prompt, as if answers had been drawn until a given text came. Temperature and `top_p`
    apply to the choice among the texts. Raises ValueError for fewer than two texts, an empty one, or one twice."""
    sampling = sampling or Sampling()
    if len(texts) < 2 or not all(texts) or len(set(texts)) < len(texts):
        raise ValueError(f"choices are two or more different texts, none of them empty, not {list(texts)}")
    scores = score_choices(model, prompts, [Segment(text) for text in texts], guidance=sampling.guidance)
    uniform = [np.random.default_rng([sampling.seed % (1 << 64), index]).random() for index in range(len(prompts))]
    indices = draw(scores, sampling, torch.tensor(uniform, dtype=torch.float32)).tolist()
    return [Choice(index, row) for index, row in zip(indices, scores, strict=True)]


def score_choices(
    model: FusedLanguageModel, prompts: Sequence[Document], choices: Sequence[Segment], *, guidance: float = 1.0,
    prior: float = 0.0, beam: int | None = None, normalize: Literal["none", "tokens", "bytes"] = "none",
) -> Tensor:  # fmt: skip
    """Score a closed set of answers of any modality: (prompts, choices) float32 log-probabilities, on the CPU.

    `log_softmax` over the choices gives probabilities. A text at the end of a prompt is continued by texts.

    Args:
        guidance: weight of the prompt, see `generate.guide`.
        prior: fraction of the log-probability without the prompt's segments (except a text that is continued) that is
            subtracted; 1 gives how much likelier they make a choice, whose own frequency then does not count.
        beam: most beginnings of choices that are followed for each prompt; None: all. The other choices get -inf.
        normalize: divide by nothing, or by tokens or bytes, so that long answers are not at a disadvantage (arXiv:2005.14165,
            section 2.4). Media have no bytes.

    Raises:
        ValueError: the model does not know a modality, or bytes are asked of answers without any.
        BadSample: a medium cannot be decoded.
    """
    if normalize not in ("none", "tokens", "bytes"):
        raise ValueError(f"normalize is none, tokens or bytes, not {normalize!r}")
    modalities = {choice.modality for choice in choices}
    check_modalities(model, modalities, prompts)
    to = min(modalities) if len(modalities) == 1 else None
    with model.inference():
        paths = [_path(model, choice)[to is not None :] for choice in choices]
        contexts = []
        for prompt in prompts:
            masked = len(prompt.segments) - (bool(prior) and is_continued(prompt, to))
            contexts.append(lay_out(model, prompt, to, bool(prior) or guidance != 1, masked))
        found = score_paths(model, contexts, [paths] * len(prompts), guidance, prior, beam)
    scores = torch.full((len(prompts), len(choices)), -torch.inf)
    for row, some in enumerate(found):
        for column, score in some.items():
            size = {"none": 1, "tokens": score.tokens, "bytes": score.bytes}[normalize]
            if not size:
                raise ValueError("normalize='bytes' needs answers with text; media and empty texts have no bytes: take tokens")
            scores[row, column] = -score.nats / size
    return scores


def score_answers(
    model: FusedLanguageModel, prompts: Sequence[Document], answers: Sequence[Segment], context: int | None = None
) -> list[Score]:
    """Score each answer, of any modality, as the segment that follows its prompt and ends the document.

    `context`: most tokens of a document; of longer ones the first are not seen. Raises ValueError if an answer alone is longer.
    """
    contexts, paths = [], []
    with model.inference():
        for prompt, answer in zip(prompts, answers, strict=True):
            path = [pair for pair in _path(model, answer) if pair[0] != TEXT_END] + [(Vocabulary.END, 0)]
            tokens, indices, features = prompt_tokens(model, prompt, None)
            start = _start(len(tokens), len(tokens) + len(path), context)
            if start and bool(indices.any()):
                raise ValueError(f"a document with media is longer than the context of {context}: only texts can be cut")
            contexts.append([as_row(tokens, indices, features, start)])
            paths.append([path])
        return [row[0] for row in score_paths(model, contexts, paths)]


def score_continuations(
    model: FusedLanguageModel, prompts: Sequence[str], continuations: Sequence[str], context: int | None = None
) -> list[Score]:
    """Score each continuation as text that continues its prompt; `<end>` does not count.

    Prompt and continuation are tokenized together, as in training; tokens count from the first that differs from those of the
    prompt alone. (Spaces at the end of a prompt go to the continuation, as in EleutherAI's harness: a token seldom ends with
    one.) An empty prompt is the beginning of a document.

    A prompt of several continuations is read once. `context`: most tokens that are seen, those of the continuation included.
    Raises ValueError if a continuation alone is longer.
    """
    spans = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        ids, alone = (model.tokenizer.encode(text) for text in (prompt + continuation, prompt.rstrip()))
        shared = min(len(ids), len(alone))
        first = 2 + int(np.append(ids[:shared] == alone[:shared], False).argmin())
        tokens = _text_tokens(ids)
        spans.append((tokens[_start(first, len(tokens), context) : first], tokens[first:]))
    return score_tokens(model, spans)


def rolling_scores(model: FusedLanguageModel, text: str, context: int, stride: int | None = None) -> list[Score]:
    """Score all tokens of a text, window by window: each window of `context` tokens counts its last `stride` tokens (the first
    window all of them), having seen those before them. `<end>` does not count.

    `stride`: 1 to below the context; None: all but one, as in EleutherAI's harness, so that they overlap little.
    """
    stride = context - 1 if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride={stride} must be at least 1 and below the context of {context} tokens")
    tokens = _text_tokens(model.tokenizer.encode(text))
    firsts = [2, *range(context, len(tokens), stride)] if len(tokens) > 2 else []
    stops = [min(first + stride if first > 2 else context, len(tokens)) for first in firsts]
    windows = zip(firsts, stops, strict=True)
    return score_tokens(model, [(tokens[max(0, stop - context) : first], tokens[first:stop]) for first, stop in windows])


def score_tokens(model: FusedLanguageModel, spans: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
    """Score tokens after the tokens before them."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (before, _) in enumerate(spans):
        groups[tuple(before)].append(index)
    rows = [torch.tensor([before], device=model.token_bytes.device) for before in groups]
    paths = [[[(token, 0) for token in spans[index][1]] for index in group] for group in groups.values()]
    with model.inference():
        found = score_paths(model, [[(row, torch.zeros_like(row), None)] for row in rows], paths)
    scores = {index: row[n] for group, row in zip(groups.values(), found, strict=True) for n, index in enumerate(group)}
    return [scores[index] for index in range(len(spans))]


def _path(model: FusedLanguageModel, answer: Segment) -> Path:
    """Lay out a segment as in training, from its opener to its end."""
    tokens, indices = (part[1:].tolist() for part in prompt_tokens(model, Document((answer,)), None)[:2])
    return [*zip(tokens, indices, strict=True), *[(TEXT_END, 0)] * (answer.modality == TEXT)]


def _text_tokens(ids: np.ndarray) -> list[int]:
    return [Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT], *(ids.astype(np.int64) + Vocabulary.SPECIALS).tolist()]


def _start(first: int, stop: int, context: int | None) -> int:
    """The first token that is seen, where tokens [first, stop) count."""
    start = 0 if context is None else max(0, stop - context)
    if start >= first:
        raise ValueError(f"an answer of {stop - first} tokens does not fit a context of {context}")
    return start


@torch.no_grad()
def score_paths(
    model: FusedLanguageModel, contexts: Sequence[Context], paths: Sequence[Sequence[Path]], guidance: float = 1.0,
    prior: float = 0.0, beam: int | None = None,
) -> list[dict[int, Score]]:  # fmt: skip
    """Score the paths of each laid out prompt, within `model.inference`: index of the path -> score, if not dropped.

    A row of the cache holds what some paths of a prompt begin with. All rows advance together, up to the next branch of any.
    """
    nats = [[0.0] * len(some) for some in paths]
    is_greedy = [[True] * len(some) for some in paths]
    dropped: list[set[int]] = [set() for _ in paths]
    room = max((len(path) for some in paths for path in some), default=0)
    for prompts, context in by_length(contexts, max(1, min(PROMPTS, ROWS // (beam or 1)))):
        rows = [(prompt, list(range(len(paths[prompt])))) for prompt in prompts]
        pending = [(Decoder(model, context, room, guidance), rows, 0, 1)]
        while pending:
            decoder, rows, start, count = pending.pop()  # the last `count` tokens predict tokens [start, start + count)
            stop = start + count
            asked = {(row, n - start, paths[prompt][member][n][0])
                     for row, (prompt, members) in enumerate(rows) for member in members
                     for n in range(start, min(stop, len(paths[prompt][member])))}  # fmt: skip
            answers = _look_up(decoder, [hidden[:, -count:] for hidden in decoder.read()], asked, prior)
            grown: dict[int, list[tuple[float, int, list[int]]]] = defaultdict(list)
            for row, (prompt, members) in enumerate(rows):
                groups: dict[tuple[int, int], list[int]] = defaultdict(list)
                for member in members:
                    path = paths[prompt][member]
                    for n in range(start, min(stop, len(path))):
                        log_p, is_best = answers[row, n - start, path[n][0]]
                        nats[prompt][member] -= log_p
                        is_greedy[prompt][member] &= is_best
                    if len(path) > stop:
                        groups[path[stop - 1]].append(member)
                grown[prompt] += [(nats[prompt][group[0]], row, group) for group in groups.values()]
            kept = []
            for prompt, some in grown.items():
                some = sorted(some)
                kept += [(prompt, row, group) for _, row, group in some[:beam]]
                dropped[prompt] |= {member for _, _, group in some[beam or len(some) :] for member in group}
            for first in range(0, len(kept), ROWS):
                part = kept[first : first + ROWS]
                runs = [os.path.commonprefix([paths[prompt][m][stop - 1 : -1] for m in group]) for prompt, _, group in part]  # noqa: RUF071
                branching = [len(run) for run, (_, _, group) in zip(runs, part, strict=True) if len(group) > 1]
                count = min(branching) if branching else max(map(len, runs))
                tokens = torch.tensor([[*run, *[(0, 0)] * count][:count] for run in runs], device=decoder.device)
                next_decoder = decoder.select([row for _, row, _ in part])
                next_decoder.append(tokens[..., 0], tokens[..., 1])
                pending.append((next_decoder, [(prompt, group) for prompt, _, group in part], stop, count))
    sizes = np.concatenate([np.zeros(Vocabulary.SPECIALS, np.int64), model.tokenizer.token_bytes])
    return [
        {
            index: Score(nats[prompt][index], len(path), sum(int(sizes[t]) for t, _ in path if 0 <= t < len(sizes)),
                         is_greedy[prompt][index])
            for index, path in enumerate(some) if index not in dropped[prompt]
        }
        for prompt, some in enumerate(paths)
    ]  # fmt: skip


def _look_up(
    decoder: Decoder, hidden: list[Tensor], asked: set[tuple[int, int, int]], prior: float
) -> dict[tuple[int, int, int], tuple[float, bool]]:
    """(row, step, token that follows it) -> log-probability, whether it is the most likely; hidden: (R, steps, D) each."""
    found: dict[tuple[int, int, int], tuple[float, bool]] = {}
    for modality, part in enumerate(decoder.model.vocabulary.slices):
        positions: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, step, token in asked:
            if part.start <= max(token, 0) < part.stop:
                positions[row, step].append(token)
        at_once = max(1, LOGITS // (1 + part.stop - part.start))
        for first in range(0, len(positions), at_once):
            some = list(positions)[first : first + at_once]
            rows, steps = torch.tensor(some, device=decoder.device).T
            tables = decoder.guided([decoder.model.logits(states[rows, steps], modality) for states in hidden])
            tables = [table.log_softmax(-1) for table in tables]
            best = tables[0].argmax(-1)
            if modality == TEXT:  # the last column, which TEXT_END = -1 means
                tables = [torch.cat([table, table[:, TEXT_ENDS].logsumexp(-1, keepdim=True)], 1) for table in tables]
            table = tables[0] - prior * tables[1] if prior else tables[0]
            keys = [(*position, token) for position in some for token in positions[position]]
            picks = [(n, token - part.start) for n, position in enumerate(some) for token in positions[position]]
            index, code = torch.tensor(picks, device=decoder.device).T
            found.update(zip(keys, zip(table[index, code].tolist(), (best[index] == code).tolist(), strict=True), strict=True))
    return found
