"""How a token is drawn from logits, and how drawn tokens become text that can be shown while it is written.

    logits (B, V), a uniform number a row ──► tokens (B,)          draw
    tokens of a text, one by one ──► pieces that are safe to show  TextPieces

A row is drawn by inverting its cumulated probabilities at one uniform number, and those numbers belong to a row (`Uniforms`):
what one prompt is answered does not depend on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draws among the most likely tokens that together have this probability (arXiv:1904.09751), 0 < top_p <= 1.
        guidance: weight of the prompt, 1 = as learned.
        max_text: most text tokens of a segment.
        max_seconds: longest sound.
        seed: of the draws; what answer number n of a batch is follows from it, n and the prompt.
        stop: a text ends before the first of these, which does not become part of it.
        use_cache: False computes everything anew for every token; slower, and the same greedy answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0
    max_text: int = 256
    max_seconds: float = 10.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature >= 0 and 0 < top_p <= 1, not {self.temperature} and {self.top_p}")
        if self.max_text < 1 or not self.max_seconds > 0:
            raise ValueError(f"max_text >= 1 and max_seconds > 0, not {self.max_text} and {self.max_seconds}")
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise ValueError(f"stop is a tuple of strings that are not empty, not {self.stop!r}")


class Uniforms:
    """A stream of uniform numbers for each row, from (seed, number of the row).

    Args:
        seed: of all of them.
        numbers: of the rows.
        device: where they are wanted.
    """

    BLOCK = 64  # numbers that are drawn at once

    def __init__(self, seed: int, numbers: Sequence[int], device: torch.device) -> None:
        self.generators = [np.random.default_rng([seed % (1 << 64), number]) for number in numbers]
        self.device = device
        self.drawn = 0

    def next(self) -> Tensor:
        """(B, 1) float64 in [0, 1)"""
        place = self.drawn % self.BLOCK
        if place == 0:
            block = np.stack([generator.random(self.BLOCK) for generator in self.generators])
            self.block = torch.from_numpy(block).to(self.device)
        self.drawn += 1
        return self.block[:, place : place + 1]


def draw(logits: Tensor, sampling: Sampling, uniforms: Uniforms) -> Tensor:
    """(B, V) logits -> (B,) drawn."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / sampling.temperature).softmax(-1)
    order = None
    if sampling.top_p < 1:
        probabilities, order = probabilities.sort(-1, descending=True)
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    kept = torch.full((len(logits), 1), logits.size(-1), device=logits.device)
    if order is not None:
        kept = (cumulated - probabilities < sampling.top_p).sum(-1, keepdim=True).clamp_min(1)
    goal = uniforms.next() * cumulated.gather(1, kept - 1)
    place = torch.searchsorted(cumulated, goal, right=True).minimum(kept - 1)
    return (place if order is None else order.gather(1, place)).squeeze(1)


class TextPieces:
    """Tokens of one text in; out come whole characters, and nothing that may yet turn out to begin a stop string.

    `text` is all that came out, `stopped` says that a stop string was found. With `finish`, the pieces are what `decode` of all
    tokens gives, up to the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self.stopped = False
        self._tokens: list[int] = []  # the last ones that were read as characters, and those that were not yet
        self._read = 0  # how many of those are read; word-level tokenizers need the word before to know a space
        self._held = ""  # characters that may begin a stop string

    def push(self, token: int) -> str:
        """What may be shown once this token (an id of the tokenizer) is there, mostly a character or a word."""
        self._tokens.append(token)
        return self._let_out(self._new_text(), last=False)

    def finish(self) -> str:
        """What is left when there are no more tokens; bytes that are no character are U+FFFD, as everywhere."""
        return self._let_out(self._new_text(whole=False), last=True)

    def _new_text(self, whole: bool = True) -> str:
        """Characters of the tokens that were not read yet; none where the last is not complete and `whole` are asked for."""
        text = self.tokenizer.decode(self._tokens)
        if whole and text.endswith("\ufffd"):
            return ""
        new = text[len(self.tokenizer.decode(self._tokens[: self._read])) :]
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        return new

    def _let_out(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for one in self.stop if (place := text.find(one)) >= 0]
        self.stopped = bool(found)
        cut = min(found) if found else len(text) if last else len(text) - self._beginning(text)
        self._held = text[cut:]
        self.text += text[:cut]
        return text[:cut]

    def _beginning(self, text: str) -> int:
        """Characters at the end of `text` that a stop string begins with."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(one.startswith(text[-length:]) for one in self.stop):
                return length
        return 0
