"""Precision, recall and F1 of named entities, as seqeval and conlleval define them: an entity counts where its type, its first
and its last word are all right (Tjong Kim Sang and De Meulder 2003). Tags are valid BIO, where seqeval's schemes agree.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class EntityScores(Metric):
    """Counts of entities by type, which add up over batches and devices."""

    full_state_update = False
    right: Tensor
    found: Tensor
    gold: Tensor

    def __init__(self, types: int) -> None:
        super().__init__()
        for name in ("right", "found", "gold"):
            self.add_state(name, torch.zeros(types, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Tensor, gold: Tensor) -> None:
        """(S, W) int64 tags, `OUTSIDE` past the end of a sentence."""
        found_stops, gold_stops = _stops(found), _stops(gold)
        begins = gold % 2 == 1
        for state, tags in (
            (self.right, gold[begins & (found == gold) & (found_stops == gold_stops)]),
            (self.found, found[found % 2 == 1]),
            (self.gold, gold[begins]),
        ):
            state += torch.bincount(tags // 2, minlength=len(state))

    def compute(self) -> dict[str, Tensor]:
        """precision, recall, f1: () over all entities (micro average), and (types,) with `_by_type`; 0 of nothing."""
        values = {}
        for suffix, sums in (("", [self.right.sum(), self.found.sum(), self.gold.sum()]),
                             ("_by_type", [self.right, self.found, self.gold])):  # fmt: skip
            right, found, gold = (one.float() for one in sums)
            values["precision" + suffix] = right / found.clamp_min(1)
            values["recall" + suffix] = right / gold.clamp_min(1)
            values["f1" + suffix] = 2 * right / (found + gold).clamp_min(1)
        return values | {"count_by_type": self.gold}


def _stops(tags: Tensor) -> Tensor:
    """(S, W) the first word from each place on, itself left out, that does not go on with an entity."""
    words = tags.size(1)
    places = torch.arange(words, device=tags.device).expand_as(tags)
    ends = places.masked_fill((tags > 0) & (tags % 2 == 0), words)
    following = torch.cat([ends[:, 1:], torch.full_like(ends[:, :1], words)], 1)
    return following.flip(1).cummin(1).values.flip(1)
