"""Draw tokens from logits, and decode them to text while it is written.

logits (B, V), a uniform number for each row -> tokens (B,)     draw
tokens of a text, one by one -> pieces that are safe to show    TextPieces
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pile_app.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing tokens.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: draw among the most likely tokens that together have this probability (arXiv:1904.09751), 0 < top_p <= 1.
        guidance: weight of the prompt, 1 = as learned.
        max_text: most text tokens of a segment.
        max_seconds: longest sound.
        seed: of the draws; answer n of a batch depends on the seed, n and its prompt only.
        stop: a text ends before the first of these strings.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0
    max_text: int = 256
    max_seconds: float = 10.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature >= 0 and 0 < top_p <= 1, not {self.temperature} and {self.top_p}")
        if self.max_text < 1 or not self.max_seconds > 0:
            raise ValueError(f"max_text >= 1 and max_seconds > 0, not {self.max_text} and {self.max_seconds}")
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise ValueError(f"stop is a tuple of strings that are not empty, not {self.stop!r}")


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """(B, V) logits -> (B,) tokens, by inverting the cumulative probabilities at `uniform` (B,) in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / sampling.temperature).softmax(-1)
    order = None
    if sampling.top_p < 1:
        probabilities, order = probabilities.sort(-1, descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        outside[:, 0] = False
        probabilities = probabilities.masked_fill(outside, 0)
    cumulative = probabilities.cumsum(-1)
    # Two units in the last place below 1: rounding must not reach the total, or an impossible token would be drawn.
    goal = (uniform * (1 - 2**-22))[:, None] * cumulative[:, -1:]
    token = ((cumulative > goal) & (probabilities > 0)).int().argmax(-1)  # the first
    return token if order is None else order.gather(1, token[:, None]).squeeze(1)


class TextPieces:
    """Turns the tokens of one text into whole characters, holding back what may be the beginning of a stop string.

    `text` is all that was returned, `stopped` whether a stop string was found. With `finish`, the pieces are what `decode`
    gives for all tokens, up to the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self.stopped = False
        self._tokens: list[int] = []  # those that were decoded last, and those that were not yet
        self._decoded = 0  # word-level tokenizers need the word before to know a space
        self._held = ""  # characters that may begin a stop string

    def push(self, token: int) -> str:
        """Return what may be shown once this token (an id of the tokenizer) is known: mostly a character or a word."""
        self._tokens.append(token)
        return self._release(is_last=False)

    def finish(self) -> str:
        """Return the rest when there are no more tokens; bytes that are no character become U+FFFD."""
        return self._release(is_last=True)

    def _decode(self, is_last: bool) -> str:
        text = self.tokenizer.decode(self._tokens)
        if text.endswith("\ufffd") and not is_last:  # a character that is not complete
            return ""
        new = text[len(self.tokenizer.decode(self._tokens[: self._decoded])) :]
        self._tokens = self._tokens[self._decoded :]
        self._decoded = len(self._tokens)
        return new

    def _release(self, is_last: bool) -> str:
        text = self._held + self._decode(is_last)
        if self.stopped:
            return ""
        found = [index for stop in self.stop if (index := text.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) if is_last else len(text) - self._stop_prefix(text)
        self._held = text[end:]
        self.text += text[:end]
        return text[:end]

    def _stop_prefix(self, text: str) -> int:
        """Count the characters at the end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
