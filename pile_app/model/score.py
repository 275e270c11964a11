"""Log-likelihoods of given answers, instead of drawing one.

    prompts, answers of each -> a prefix tree for each prompt -> nats of every token that is asked for

A prompt is read once; its answers share the cache, and what they begin alike with is read once. Nothing here depends on what is
computed together. Of the answers, what is counted is:

    score_choices          a closed set of segments: tokens and the end of the segment (not its opener, if all have the same)
    score_answers          a segment that ends the document: opener, tokens and `<end>`, as the training loss counts them
    score_continuations    text that goes on where the prompt stops: its tokens only
    rolling_scores         a long text in windows that overlap: every token once
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pile_app.documents import TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import TEXT_ENDS, Decoder, Rows, by_length, check_modalities, lay_out, stack
from pile_app.model.sampling import RowGenerators, Sampling, draw
from pile_app.model.segments import is_continued, prompt_tokens
from pile_app.vocabulary import Vocabulary

AT_ONCE = 32  # prompts
ROWS = 1024  # beginnings of answers that are read at once
LOGITS = 1 << 24  # in memory at a time
TEXT_END = -1  # stands for whatever ends a text


@dataclass(frozen=True)
class Score:
    """Of the tokens of an answer.

    nats: their negative log-likelihood. tokens: their number. bytes: UTF-8 bytes that they write. is_greedy: each was the most
    likely one.
    """

    nats: float
    tokens: int
    bytes: int
    is_greedy: bool


@dataclass(frozen=True)
class Choice:
    """`index` of the chosen text; (C,) log-probabilities of all of them by the model, which need not sum to 1."""

    index: int
    log_probabilities: Tensor


class Path(NamedTuple):
    """Tokens of an answer and their image indices; `TEXT_END` may be the last."""

    tokens: list[int]
    image_indices: list[int]


def choose(
    model: FusedLanguageModel, prompts: Sequence[Document], texts: Sequence[str], sampling: Sampling | None = None
) -> list[Choice]:
    """Choose one of the texts for each prompt, as if the model's answer had been drawn until it was one of them. Temperature and
    `top_p` apply to the choice among the texts.

    Raises:
        ValueError: fewer than two texts, an empty one, or one twice.
        BadSample: a medium of a prompt cannot be decoded.
    """
    sampling = sampling or Sampling()
    if len(texts) < 2 or not all(texts) or len(set(texts)) < len(texts):
        raise ValueError(f"choices are two or more different texts, none of them empty, not {list(texts)}")
    scores = score_choices(model, prompts, [Segment(text) for text in texts], guidance=sampling.guidance)
    uniform = RowGenerators(sampling.seed, range(len(prompts))).uniform(1, scores.device)[:, 0]
    return [Choice(int(index), row) for index, row in zip(draw(scores, sampling, uniform), scores, strict=True)]


def score_choices(
    model: FusedLanguageModel,
    prompts: Sequence[Document],
    choices: Sequence[Segment],
    *,
    guidance: float = 1.0,
    prior: float = 0.0,
    beam: int | None = None,
    normalize: Literal["none", "tokens", "bytes"] = "none",
) -> Tensor:
    """(prompts, choices) float32 log-probabilities of a closed set of answers of any modality, on the CPU.

    `log_softmax` over the choices gives their probabilities, given that the answer is one of them.

    Args:
        model: see `FusedLanguageModel`.
        prompts: a text at the end of a prompt is continued by texts.
        choices: all answers there are.
        guidance: weight of the prompt, see `generate.guide`.
        prior: fraction of the log-probability without the prompt's segments (but a text that is continued) that is subtracted;
            1 gives the log of how much likelier they make the choice, which does not depend on how common it is.
        beam: most beginnings of choices that are followed for each prompt; None: all. Others get -inf.
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
    to = modalities.pop() if len(modalities) == 1 else None  # where it is known, the opener is given
    with model.inference():
        paths = [_path(model, choice, to is not None) for choice in choices]
        contexts = []
        for prompt in prompts:
            masked = len(prompt.segments) - (is_continued(prompt, to) if prior else 0)
            contexts.append(lay_out(model, prompt, to, bool(prior) or guidance != 1, masked))
        found = score_paths(model, contexts, [paths] * len(prompts), guidance, prior, beam)
    scores = torch.full((len(prompts), len(choices)), -torch.inf)
    for row, column, score in ((r, c, s) for r, row in enumerate(found) for c, s in row.items()):
        size = {"none": 1, "tokens": score.tokens, "bytes": score.bytes}[normalize]
        if not size:
            raise ValueError("normalize='bytes' needs answers with text in them; media and empty texts have no bytes: take tokens")
        scores[row, column] = -score.nats / size
    return scores


def score_answers(
    model: FusedLanguageModel, prompts: Sequence[Document], answers: Sequence[Segment], context: int | None = None
) -> list[Score]:
    """Score each answer as the segment that follows its prompt and ends the document.

    Args:
        model: see `FusedLanguageModel`.
        prompts: one for each answer.
        answers: texts, images or sounds.
        context: most tokens of a document; of a longer one the first are not seen. None: all are.

    Raises:
        ValueError: an answer alone is longer than the context.
        BadSample: a medium cannot be decoded.
    """
    with model.inference():
        rows, paths = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            path = _path(model, answer, False)
            tokens = [*path.tokens[: -1 if path.tokens[-1] == TEXT_END else None], Vocabulary.END]
            paths.append(Path(tokens, (path.image_indices + [0])[: len(tokens)]))
            rows.append(_within(*prompt_tokens(model, prompt, None), len(tokens), context))
        return [row[0] for row in score_paths(model, rows, [[path] for path in paths])]


def score_continuations(
    model: FusedLanguageModel, prompts: Sequence[str], continuations: Sequence[str], context: int | None = None
) -> list[Score]:
    """Score each continuation as text that goes on where the prompt stops; `<end>` does not count.

    Prompt and continuation are tokenized together, as in training; tokens count from the first that differs from those of the
    prompt alone. (Spaces at the end of a prompt go to the continuation, as in EleutherAI's harness: a token seldom ends with
    one.) An empty prompt is the beginning of a document.

    Args:
        model: see `FusedLanguageModel`.
        prompts: one for each continuation; continuations of one prompt share its reading.
        continuations: texts.
        context: most tokens that are seen, those of the continuation included; None: all.

    Raises:
        ValueError: a continuation alone is longer than the context.
    """
    indices: dict[tuple[int, ...], list[int]] = {}  # of the continuations of what is read first
    paths: list[Path] = []
    for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        ids, alone = (model.tokenizer.encode(text) for text in (prompt + continuation, prompt.rstrip()))
        shared = min(len(ids), len(alone))
        tokens = _text_tokens(ids)
        first = 2 + int(np.append(ids[:shared] == alone[:shared], False).argmin())
        start = _start(first, len(tokens), context)
        indices.setdefault(tuple(tokens[start:first]), []).append(index)
        paths.append(Path(tokens[first:], [0] * (len(tokens) - first)))
    with model.inference():
        rows = [_row(model, tokens) for tokens in indices]
        found = score_paths(model, rows, [[paths[index] for index in group] for group in indices.values()])
    scores = {index: row[n] for group, row in zip(indices.values(), found, strict=True) for n, index in enumerate(group)}
    return [scores[index] for index in range(len(paths))]


def rolling_scores(model: FusedLanguageModel, text: str, context: int, stride: int | None = None) -> list[Score]:
    """Score all tokens of a text, window by window: each window counts its last `stride` tokens (the first all of its tokens) and
    sees at least `context - stride` tokens before them. `<end>` does not count.

    Args:
        model: see `FusedLanguageModel`.
        text: of any length.
        context: tokens of a window.
        stride: new tokens of each; None: all but one, so that windows overlap as little as can be, as in EleutherAI's harness.

    Raises:
        ValueError: `stride` is not in [1, context).
    """
    stride = context - 1 if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride={stride} must be at least 1 and below the context of {context} tokens")
    tokens = _text_tokens(model.tokenizer.encode(text))
    spans = [(0, 2, min(len(tokens), context))]
    spans += [(max(0, min(n + stride, len(tokens)) - context), n, min(n + stride, len(tokens)))
              for n in range(context, len(tokens), stride)]  # fmt: skip
    with model.inference():
        rows = [_row(model, tokens[start:first]) for start, first, _ in spans]
        paths = [Path(tokens[first:stop], [0] * (stop - first)) for _, first, stop in spans]
        found = score_paths(model, rows, [[path] for path in paths])
    return [row[0] for row in found] if len(tokens) > 2 else []


def _path(model: FusedLanguageModel, choice: Segment, without_opener: bool) -> Path:
    """A segment as it is laid out in training, and its end."""
    tokens, indices = prompt_tokens(model, Document((choice,)), None)
    first = 1 + without_opener
    end = [TEXT_END] * (choice.modality == TEXT)
    return Path(tokens[first:].tolist() + end, indices[first:].tolist() + [0] * len(end))


def _text_tokens(ids: np.ndarray) -> list[int]:
    return [Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT], *(ids.astype(np.int64) + Vocabulary.SPECIALS).tolist()]


def _row(model: FusedLanguageModel, tokens: Sequence[int]) -> list[Rows]:
    row = torch.tensor([tokens], device=model.token_bytes.device)
    return [(row, torch.zeros_like(row))]


def _start(first: int, stop: int, context: int | None) -> int:
    """The first token that is seen, where tokens [first, stop) count."""
    start = 0 if context is None else max(0, stop - context)
    if start >= first:
        raise ValueError(f"an answer of {stop - first} tokens does not fit a context of {context}")
    return start


def _within(tokens: Tensor, indices: Tensor, answer: int, context: int | None) -> list[Rows]:
    """A prompt, without its beginning where prompt and answer are longer than the context."""
    start = _start(len(tokens), len(tokens) + answer, context)
    if start and bool(indices.any()):
        raise ValueError(
            f"a document of {len(tokens) + answer} tokens with media is longer than the context of {context}: only texts can be cut"
        )
    return [(tokens[None, start:], indices[None, start:])]


# -- The search


@dataclass
class _Node:
    """A token of the prefix tree. `ends`: the paths whose last token it is."""

    token: int = 0
    image_index: int = 0
    children: dict[int, _Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)

    def run(self) -> Iterator[_Node]:
        """The nodes that are read from here on without a decision, from this one on; a leaf is not read."""
        node = self
        while node.children:
            yield node
            if len(node.children) > 1:
                return
            (node,) = node.children.values()


class _Row(NamedTuple):
    """A beginning of answers to one prompt: its nodes that were read last, and their score without them."""

    prompt: int
    nodes: list[_Node]
    nats: float
    tokens: int
    bytes: int
    is_greedy: bool


def _tree(paths: Sequence[Path]) -> _Node:
    root = _Node()
    for index, (tokens, image_indices) in enumerate(paths):
        node = root
        for token, image_index in zip(tokens, image_indices, strict=True):
            node = node.children.setdefault(token, _Node(token, image_index))
        node.ends.append(index)
    return root


@torch.no_grad()
def score_paths(
    model: FusedLanguageModel,
    prompts: Sequence[list[Rows]],
    paths: Sequence[Sequence[Path]],
    guidance: float = 1.0,
    prior: float = 0.0,
    beam: int | None = None,
) -> list[dict[int, Score]]:
    """Score the paths of each laid out prompt (see `lay_out`); within `model.inference`.

    All beginnings advance together, by as many tokens as none of them branches at.
    """
    trees: dict[int, _Node] = {id(some): _tree(some) for some in paths}
    longest = max((len(path.tokens) for some in paths for path in some), default=0)
    found: list[dict[int, Score]] = [{} for _ in prompts]
    at_once = max(1, min(AT_ONCE, ROWS // beam if beam else AT_ONCE))
    for group in by_length(prompts):
        for some in iter(lambda left=iter(group): list(islice(left, at_once)), []):  # type: ignore[misc]
            contexts = stack([prompts[index] for index in some])
            decoder = Decoder(model, contexts, contexts[0][0].size(1) + longest, guidance)
            rows = [_Row(index, [trees[id(paths[index])]], 0.0, 0, 0, True) for index in some]
            for row in rows:  # an empty path
                found[row.prompt] |= dict.fromkeys(row.nodes[0].ends, Score(0.0, 0, 0, True))
            pending = [(decoder, rows)]
            while pending:
                decoder, rows = pending.pop()
                pending += _advance(decoder, rows, found, prior, beam)
    return found


def _advance(
    decoder: Decoder, rows: list[_Row], found: list[dict[int, Score]], prior: float, beam: int | None
) -> Iterator[tuple[Decoder, list[_Row]]]:
    """Read the nodes of the rows, record the paths that end after them, and yield what is to be read next."""
    longest = max(len(row.nodes) for row in rows)
    hidden = [states[:, -longest:] for states in decoder.read()]
    asked = [(r, n, token) for r, row in enumerate(rows) for n, node in enumerate(row.nodes) for token in node.children]
    answers = iter(_look_up(decoder, hidden, asked, prior))
    grown: dict[int, list[tuple[int, _Row]]] = {}
    for r, row in enumerate(rows):
        prompt, _, nats, tokens, size, is_greedy = row
        for node in row.nodes:
            for child in node.children.values():
                log_p, bytes_of_token, is_best = next(answers)
                score = Score(nats - log_p, tokens + 1, size + bytes_of_token, is_greedy and is_best)
                found[prompt] |= dict.fromkeys(child.ends, score)
                if node is row.nodes[-1] and child.children:
                    last = _Row(prompt, [child], score.nats, score.tokens, score.bytes, score.is_greedy)
                    grown.setdefault(prompt, []).append((r, last))
            if node is not row.nodes[-1]:
                nats, tokens, size, is_greedy = score.nats, score.tokens, score.bytes, score.is_greedy
    kept = [pair for several in grown.values() for pair in sorted(several, key=lambda pair: pair[1].nats)[:beam]]
    for first in range(0, len(kept), ROWS):
        parents, after = zip(*kept[first : first + ROWS], strict=True)
        runs = [list(row.nodes[0].run()) for row in after]
        branching = [len(run) for run in runs if len(run[-1].children) > 1]
        steps = min(branching) if branching else max(map(len, runs))
        padded = [run[:steps] + [run[-1]] * (steps - len(run)) for run in runs]
        device = decoder.never.device
        tokens_read = torch.tensor([[node.token for node in run] for run in padded], device=device)
        image_indices = torch.tensor([[node.image_index for node in run] for run in padded], device=device)
        selected = decoder.select(parents)
        selected.append(tokens_read, image_indices)
        yield selected, [row._replace(nodes=run[:steps]) for row, run in zip(after, runs, strict=True)]


def _look_up(
    decoder: Decoder, hidden: list[Tensor], asked: Sequence[tuple[int, int, int]], prior: float
) -> list[tuple[float, int, bool]]:
    """For each (row, step, token) the log-probability of the token after that step, its bytes, and whether it is the most likely;
    hidden: (R, steps, D) in each context."""
    vocabulary, device = decoder.model.vocabulary, decoder.never.device
    result = torch.zeros(len(asked), 3, device=device)
    for modality, part in enumerate(vocabulary.slices):
        mine = [index for index, (_, _, token) in enumerate(asked) if part.start <= max(token, 0) < part.stop]
        positions = list(dict.fromkeys(asked[index][:2] for index in mine))  # in the order of `mine`
        at_once, last = max(1, LOGITS // (part.stop - part.start)), 0
        for start in range(0, len(positions), at_once):
            some = {position: n for n, position in enumerate(positions[start : start + at_once])}
            first = last
            while last < len(mine) and asked[mine[last]][:2] in some:
                last += 1
            here = mine[first:last]
            where = torch.tensor(list(some), device=device)
            logits = [decoder.model.logits(states[where[:, 0], where[:, 1]], modality) for states in hidden]
            tables = [x.log_softmax(-1) for x in decoder.guided(logits)]
            rows = torch.tensor([some[asked[index][:2]] for index in here], device=device)
            tokens = torch.tensor([asked[index][2] for index in here], device=device)
            code = (tokens - part.start).clamp_min(0)
            each = [table[rows, code] for table in tables]
            if modality == TEXT:
                ends = [table[:, TEXT_ENDS].logsumexp(-1)[rows] for table in tables]
                each = [torch.where(tokens == TEXT_END, end, x) for end, x in zip(ends, each, strict=True)]
                result[here, 1] = (decoder.model.token_bytes[code] * (tokens != TEXT_END)).float()
            result[here, 0] = each[0] - prior * each[1] if prior else each[0]
            result[here, 2] = (tables[0].argmax(-1)[rows] == code).float()
    return [(log_p, int(size), bool(is_best)) for log_p, size, is_best in result.tolist()]
