"""A plain baseline of `wikitext_bits.py`: interpolated Kneser-Ney smoothing with three discounts an order.

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h ·) + gamma(h) p(w | h without its first word)

(Chen and Goodman 1999, "modified Kneser-Ney"). Counts of the highest order are frequencies, those below the number of different
words seen before; D1, D2, D3+ of an order follow from how many of its n-grams were counted once to four times; below the lowest
order stands the uniform distribution. N-grams are sorted arrays of 64-bit keys, (number of their first n - 1 words) · V + last
word, so that all of a text is counted, and looked up, at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class _Order:
    """N-grams of one length: keys (G,) increasing; discounted (G,) counts without their discount; total, weight (contexts,):
    counts after each context, and what it leaves to the shorter one."""

    keys: np.ndarray
    discounted: np.ndarray
    total: np.ndarray
    weight: np.ndarray


class KneserNey:
    """Trains on symbols, numbers from 0.

    Args:
        symbols: (N,) int64 of the training text.
        size: V, different symbols there are.
        order: n.
    """

    def __init__(self, symbols: np.ndarray, size: int, order: int = 5) -> None:
        self.size = size
        numbers = np.zeros(len(symbols), np.int64)  # of the (n - 1)-gram before each place; one empty context
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
        contexts = 1
        for n in range(1, order + 1):
            # Place t of `numbers` is the context of symbol t, made of the n - 1 symbols before it.
            keys = numbers[n - 1 :] * size + symbols[n - 1 :]
            unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
            found.append((unique, inverse, counts, contexts))
            following = np.zeros(len(symbols), np.int64)
            following[n:] = inverse[: len(symbols) - n]
            numbers, contexts = following, len(unique)
        self.orders = []
        for n, (unique, _, counts, contexts) in enumerate(found, 1):
            if n < order:  # in how many different (n + 1)-grams does it stand last?
                longer, inverse_longer = found[n][0], found[n][1]
                first = np.zeros(len(longer), np.int64)
                first[inverse_longer] = np.arange(len(inverse_longer))  # a place where each stands
                counts = np.bincount(found[n - 1][1][first + 1], minlength=len(unique))
            self.orders.append(_discount(unique, counts, contexts, size))

    def bits(self, symbols: np.ndarray) -> np.ndarray:
        """(N,) bits of each symbol after those before it, the first after nothing."""
        probability = np.full(len(symbols), 1.0 / self.size)
        numbers = np.zeros(len(symbols), np.int64)  # of the context of n - 1 symbols, -1 where it was never seen
        for n, order in enumerate(self.orders, 1):
            known = numbers >= 0
            known[: n - 1] = False
            keys = numbers * self.size + symbols
            places = np.minimum(order.keys.searchsorted(keys), len(order.keys) - 1)
            hit = known & (order.keys[places] == keys)
            context = np.where(known, numbers, 0)
            total = order.total[context]
            seen = known & (total > 0)
            own = np.where(hit, order.discounted[places], 0.0)
            probability = np.where(seen, own / np.maximum(total, 1) + order.weight[context] * probability, probability)
            numbers = np.concatenate([[-1], np.where(hit, places, -1)[:-1]])
        return -np.log2(probability)


def _discount(keys: np.ndarray, counts: np.ndarray, contexts: int, size: int) -> _Order:
    context = keys // size
    n1, n2, n3, n4 = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    if not ((discounts[1:] > 0) & (discounts[1:] < [1, 2, 3])).all():  # few different n-grams, as single bytes are
        discounts = np.array([0.0, 0.5, 1.0, 1.5])  # as KenLM's --discount_fallback
    discount = np.minimum(discounts[np.minimum(counts, 3)], counts)
    total = np.bincount(context, counts, contexts)
    weight = np.bincount(context, discount, contexts) / np.maximum(total, 1)
    return _Order(keys, counts - discount, total, weight)


def word_bits(training: str, text: str, order: int = 5) -> float:
    """Bits of all of `text` by words, a line break being one. Words that occur once in training, and all that do not, are one
    symbol there, followed by their spelling by a Kneser-Ney model of characters, of the words that occur once."""
    words, asked = _words(training), _words(text)
    counts = Counter(words)
    known = {word: number for number, word in enumerate((w for w, count in counts.items() if count > 1), 1)}

    def symbols(of: Sequence[str]) -> np.ndarray:
        return np.array([known.get(word, 0) for word in of], np.int64)

    bits = KneserNey(symbols(words), len(known) + 1, order).bits(symbols(asked)).sum()
    once = [word for word, count in counts.items() if count == 1]
    return float(bits + _spelling_bits(once, [word for word in asked if word not in known], order))


def _words(text: str) -> list[str]:
    return text.replace("\n", " \n ").split(" ")


def _spelling_bits(words: Sequence[str], asked: Sequence[str], order: int) -> float:
    """Bits of the UTF-8 bytes of words and their ends; each begins after an end."""
    if not asked:
        return 0.0
    training, text = ("\n".join(["", *some, ""]).encode() for some in (words, asked))
    model = KneserNey(np.frombuffer(training, np.uint8).astype(np.int64), 256, order)
    return float(model.bits(np.frombuffer(text, np.uint8).astype(np.int64))[1:].sum())


def byte_bits(training: str, text: str, order: int = 5) -> float:
    """Bits of all of `text` by its UTF-8 bytes."""
    model = KneserNey(np.frombuffer(training.encode(), np.uint8).astype(np.int64), 256, order)
    return float(model.bits(np.frombuffer(text.encode(), np.uint8).astype(np.int64)).sum())
