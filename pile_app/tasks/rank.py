"""Which of many names fits a prompt best, by the model's own likelihood.

A beam search over the tree of all names: only what begins one of them is followed, and the `width` most likely beginnings of
each prompt are kept. All prompts go on together, one token a step, with the cache of generation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pile_app.documents import TEXT, Document, Vocabulary
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import evaluating
from pile_app.model.segments import prompt_tokens

AT_ONCE = 32  # prompts, `width` rows of the cache each
END = -1  # in a node: a name ends here


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
    model: FusedLanguageModel, prompts: Sequence[Document], names: Sequence[str], count: int = 5, width: int = 24
) -> list[list[int]]:
    """Numbers of the `count` likeliest names for each prompt, best first; fewer where there are fewer.

    Args:
        model: in evaluation mode or not, it is left as it was.
        prompts: whose last segment is text are continued, as in `generate`.
        names: to choose from.
        count: names that are wanted.
        width: beginnings of each prompt that are followed, at least `count`.
    """
    tree = name_tree(model, names)
    groups: dict[int, list[int]] = defaultdict(list)  # of one length run together
    found: dict[int, list[int]] = {}
    with evaluating(model):
        rows = [prompt_tokens(model, prompt, TEXT)[:2] for prompt in prompts]
        for number, (tokens, _) in enumerate(rows):
            groups[len(tokens)].append(number)
        for numbers in groups.values():
            for some in (numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE)):
                tokens, places = (torch.stack([rows[number][part] for number in some]) for part in range(2))
                found.update(zip(some, _search(model, tokens, places, tree, count, max(width, count)), strict=True))
    return [found[number] for number in range(len(prompts))]


def _search(
    model: FusedLanguageModel, tokens: Tensor, places: Tensor, tree: dict[int, Any], count: int, width: int
) -> list[list[int]]:
    """For each row of `tokens` (B, T)."""
    stops = [Vocabulary.END, *Vocabulary.OPENERS]
    done: list[list[tuple[float, int]]] = [[] for _ in tokens]
    beams = [(row, 0.0, tree) for row in range(len(tokens))]  # (prompt, log-probability, node), one a row of the cache
    cache, length = model.backbone.new_cache(), tokens.size(1)
    while beams:
        position = torch.arange(length - tokens.size(1), length, device=tokens.device).expand_as(tokens)
        hidden = model.hidden(tokens, places, torch.zeros_like(tokens), position, cache)
        log_p = model.logits(hidden[:, -1], TEXT).log_softmax(-1)
        ends = log_p[:, stops].logsumexp(-1).tolist()
        grown: list[list[tuple[float, int, int, dict[int, Any]]]] = [[] for _ in done]
        table = log_p.tolist()
        for place, (row, score, node) in enumerate(beams):
            for token, below in node.items():
                if token == END:
                    done[row].append((score + ends[place], below))
                else:
                    grown[row].append((score + table[place][token], place, token, below))
        kept = []
        for row, candidates in enumerate(grown):
            worst = sorted((score for score, _ in done[row]), reverse=True)[:count]
            hopeless = worst[-1] if len(worst) == count else -float("inf")  # what is less likely now ends less likely
            best = sorted(candidates, key=lambda one: -one[0])[:width]
            kept += [(row, *one) for one in best if one[0] > hopeless]
        beams = [(row, score, below) for row, score, _, _, below in kept]
        if kept:
            cache = cache.select(torch.tensor([place for _, _, place, _, _ in kept], device=tokens.device))
            tokens = torch.tensor([[token] for _, _, _, token, _ in kept], device=tokens.device)
            places = torch.zeros_like(tokens)
            length += 1
    return [[number for _, number in sorted(one, reverse=True)[:count]] for one in done]
