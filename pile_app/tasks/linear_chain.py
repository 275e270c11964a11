"""A linear-chain conditional random field over BIO tags (Lafferty et al. 2001; over an LSTM: arXiv:1508.01991).

    score(tags) = Σ_w emission[w, tag_w] + step[tag_w-1, tag_w] + first[tag_0] + last[tag_W-1]

Scores of what BIO does not allow (an inside tag after anything but its own entity, or at the start) are -inf, in training and
in decoding alike: no weights, however wrong, can give an invalid sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pile_app.tasks.entities import OUTSIDE


class LinearChain(nn.Module):
    """Args:
    types: of entities; K = 1 + 2 · types tags, numbered as in `tasks/entities.py`.
    """

    may_begin: Tensor
    may_follow: Tensor

    def __init__(self, types: int) -> None:
        super().__init__()
        tags = torch.arange(1 + 2 * types)
        inside = (tags > OUTSIDE) & (tags % 2 == 0)
        of_type = (tags + 1) // 2
        self.register_buffer("may_begin", ~inside, persistent=False)  # (K,)
        same = (of_type[:, None] == of_type) & (tags[:, None] > OUTSIDE)
        self.register_buffer("may_follow", ~inside | same, persistent=False)  # (K, K) from, to
        self.first = nn.Parameter(torch.zeros(len(tags)))
        self.last = nn.Parameter(torch.zeros(len(tags)))
        self.step = nn.Parameter(torch.zeros(len(tags), len(tags)))

    def _scores(self) -> tuple[Tensor, Tensor]:
        first = self.first.masked_fill(~self.may_begin, -torch.inf)
        return first, self.step.masked_fill(~self.may_follow, -torch.inf)

    def forward(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """(S,) -log p(tags) of each sentence.

        Args:
            emissions: (S, W, K) float32.
            tags: (S, W) int64, valid BIO; anything from `lengths` on.
            lengths: (S,) words of each sentence, at least 1.
        """
        first, step = self._scores()
        inside = torch.arange(emissions.size(1), device=lengths.device) < lengths[:, None]  # (S, W)
        tags = tags.masked_fill(~inside, OUTSIDE)
        taken = emissions.gather(2, tags[..., None]).squeeze(2).masked_fill(~inside, 0.0).sum(1)
        steps = step[tags[:, :-1], tags[:, 1:]].masked_fill(~inside[:, 1:], 0.0).sum(1)
        final = tags.gather(1, lengths[:, None] - 1).squeeze(1)
        score = taken + steps + first[tags[:, 0]] + self.last[final]
        total = first + emissions[:, 0]  # (S, K) log of the sum over all beginnings that end in each tag
        for word in range(1, emissions.size(1)):
            longer = torch.logsumexp(total[:, :, None] + step, 1) + emissions[:, word]
            total = torch.where(inside[:, word, None], longer, total)
        return torch.logsumexp(total + self.last, 1) - score

    @torch.no_grad()
    def decode(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """(S, W) int64: the most likely tags (Viterbi), `OUTSIDE` from the lengths on. Arguments as above."""
        first, step = self._scores()
        words = emissions.size(1)
        best = first + emissions[:, 0]
        origins = []
        for word in range(1, words):
            reached, origin = (best[:, :, None] + step).max(1)  # (S, K)
            here = (word < lengths)[:, None]
            best = torch.where(here, reached + emissions[:, word], best)
            origins.append(torch.where(here, origin, torch.arange(len(self.last), device=origin.device)))
        tags = [(best + self.last).argmax(1)]
        for origin in reversed(origins):
            tags.append(origin.gather(1, tags[-1][:, None]).squeeze(1))
        found = torch.stack(tags[::-1], 1)
        return found.masked_fill(torch.arange(words, device=found.device) >= lengths[:, None], OUTSIDE)
