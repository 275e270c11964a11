"""Which of many names fits a prompt best, by the model's own likelihood.

    score(name) = log p(name | prompt) - prior * log p(name | prompt with its media hidden)

With `prior` 1 it is how much likelier the media make the name, which does not depend on how common the name is: a name that was
never trained on ("woman firefighter") has next to no likelihood of its own, whatever is shown.

A beam search over the tree of all names: only what begins one of them is followed, and the `width` most likely beginnings of
each prompt are kept. All prompts go on together, one token a step, with the cache of generation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pile_app.data.assembly import assemble, whole
from pile_app.documents import TEXT, Document
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import evaluating
from pile_app.model.segments import prompt_tokens, segment_length
from pile_app.vocabulary import Vocabulary

AT_ONCE = 32  # prompts, `width` rows of the cache each
END = -1  # in a node: a name ends here
STOPS = [Vocabulary.END, *Vocabulary.OPENERS]  # what may follow a name

Path = tuple[int, ...]  # tokens of the beginning of a name, `END` behind a whole one


def name_tree(model: FusedLanguageModel, names: Sequence[str]) -> dict[int, Any]:
    """Names as a tree: token -> subtree, and `END` -> the name's number."""
    tree: dict[int, Any] = {}
    for number, name in enumerate(names):
        node = tree
        for token in model.tokenizer.encode(name):
            node = node.setdefault(int(token) + Vocabulary.SPECIALS, {})
        node[END] = number
    return tree


@torch.no_grad()
def rank_names(
    model: FusedLanguageModel,
    prompts: Sequence[Document],
    names: Sequence[str],
    count: int = 5,
    width: int = 24,
    prior: float = 0.0,
) -> list[list[int]]:
    """Numbers of the `count` likeliest names for each prompt, best first; fewer where there are fewer.

    Args:
        model: in evaluation mode or not, it is left as it was.
        prompts: whose last segment is text are continued, as in `generate`.
        names: to choose from.
        count: names that are wanted.
        width: beginnings of each prompt that are followed, at least `count`.
        prior: share of a name's own log-likelihood that does not count, 0 to 1. Prompts then have to differ in their
            media alone.
    """
    tree = name_tree(model, names)
    groups: dict[int, list[int]] = defaultdict(list)  # of one length run together
    found: dict[int, list[int]] = {}
    with evaluating(model):
        rows = [prompt_tokens(model, prompt, TEXT)[:2] for prompt in prompts]
        for number, (tokens, _) in enumerate(rows):
            groups[len(tokens)].append(number)
        for numbers in groups.values():
            priors = _priors(model, prompts[numbers[0]], names, prior) if prior else {}
            for some in (numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE)):
                tokens, places = (torch.stack([rows[number][part] for number in some]) for part in range(2))
                found.update(zip(some, _search(model, tokens, places, tree, count, max(width, count), priors), strict=True))
    return [found[number] for number in range(len(prompts))]


def _priors(model: FusedLanguageModel, prompt: Document, names: Sequence[str], share: float) -> dict[Path, float]:
    """`share` of the log-probability of every beginning of a name where the media of the prompt are hidden."""
    media = len(prompt.segments) - (prompt.segments[-1].modality == TEXT)
    length = 1 + sum(segment_length(model, segment) for segment in prompt.segments)
    batch = assemble([[whole(prompt, length, media)]], model.vocabulary, model.tokenizer, length)
    context = batch.tokens[0].long().tolist()
    context += [Vocabulary.OPENERS[TEXT]] * (media == len(prompt.segments))
    rows = [[int(token) + Vocabulary.SPECIALS for token in model.tokenizer.encode(name)] for name in names]
    longest = len(context) + max(map(len, rows))
    padded = [(context + row + [Vocabulary.END] * longest)[:longest] for row in rows]
    tokens = torch.tensor(padded, device=model.token_bytes.device)
    nothing, position = torch.zeros_like(tokens), torch.arange(longest, device=tokens.device).expand_as(tokens)
    log_p = model.logits(model.hidden(tokens, nothing, nothing, position)[:, len(context) - 1 :], TEXT).log_softmax(-1)
    ends = log_p[..., STOPS].logsumexp(-1).tolist()
    each = log_p[:, :-1].gather(2, tokens[:, len(context) :, None]).squeeze(2).cumsum(1).tolist()
    found: dict[Path, float] = {}
    for row, sums, end in zip(rows, each, ends, strict=True):
        found |= {tuple(row[: n + 1]): share * sums[n] for n in range(len(row))}
        found[(*row, END)] = share * (sums[len(row) - 1] + end[len(row)])
    return found


def _search(
    model: FusedLanguageModel,
    tokens: Tensor,
    places: Tensor,
    tree: dict[int, Any],
    count: int,
    width: int,
    priors: Mapping[Path, float],
) -> list[list[int]]:
    """For each row of `tokens` (B, T)."""
    done: list[list[tuple[float, int]]] = [[] for _ in tokens]
    # (prompt, log-probability, what it has been so far, node), one a row of the cache
    beams: list[tuple[int, float, Path, dict[int, Any]]] = [(row, 0.0, (), tree) for row in range(len(tokens))]
    cache, length = model.backbone.new_cache(), tokens.size(1)
    while beams:
        position = torch.arange(length - tokens.size(1), length, device=tokens.device).expand_as(tokens)
        hidden = model.hidden(tokens, places, torch.zeros_like(tokens), position, cache)
        log_p = model.logits(hidden[:, -1], TEXT).log_softmax(-1)
        ends = log_p[:, STOPS].logsumexp(-1).tolist()
        grown: list[list[tuple[float, float, int, Path, dict[int, Any]]]] = [[] for _ in done]
        table = log_p.tolist()
        for place, (row, score, path, node) in enumerate(beams):
            for token, below in node.items():
                longer = (*path, token)
                if token == END:
                    done[row].append((score + ends[place] - priors.get(longer, 0.0), below))
                else:
                    likelihood = score + table[place][token]
                    grown[row].append((likelihood - priors.get(longer, 0.0), likelihood, place, longer, below))
        kept = []
        for row, candidates in enumerate(grown):
            worst = sorted((score for score, _ in done[row]), reverse=True)[:count]
            # Without a prior, what is less likely now ends less likely.
            hopeless = worst[-1] if len(worst) == count and not priors else -float("inf")
            best = sorted(candidates, key=lambda one: -one[0])[:width]
            kept += [(row, *one) for one in best if one[0] > hopeless]
        beams = [(row, likelihood, path, below) for row, _, likelihood, _, path, below in kept]
        if kept:
            cache = cache.select(torch.tensor([place for _, _, _, place, _, _ in kept], device=tokens.device))
            tokens = torch.tensor([[path[-1]] for _, _, path, _ in beams], device=tokens.device)
            places = torch.zeros_like(tokens)
            length += 1
    return [[number for _, number in sorted(one, reverse=True)[:count]] for one in done]
