"""The n-gram baseline of `wikitext_bits.py`: interpolated Kneser-Ney smoothing with three discounts for each order.

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h ·) + gamma(h) p(w | h without its first word)

(Chen and Goodman 1999, "modified Kneser-Ney"). The highest order counts frequencies, lower orders count the different words
seen before; the discounts D1, D2, D3+ of an order follow from how many n-grams were counted once to four times; the lowest
order is interpolated with the uniform distribution. N-grams are sorted arrays of 64-bit keys, (id of the first n - 1 words) · V
+ last word, so a whole text is counted, or looked up, at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass
class _Order:
    """N-grams of one length: keys (G,) increasing; discounted (G,) counts; total, weight (contexts,): the counts after each
    context, and the weight of the shorter context."""

    keys: np.ndarray
    discounted: np.ndarray
    total: np.ndarray
    weight: np.ndarray


class KneserNey:
    """An n-gram model of (N,) int64 symbols below `size`."""

    def __init__(self, symbols: np.ndarray, size: int, order: int = 5) -> None:
        self.size = size
        ids = np.zeros(len(symbols), np.int64)  # of the context before each index: its (n - 1)-gram; a single empty context
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
        contexts = 1
        for n in range(1, order + 1):
            keys = ids[n - 1 :] * size + symbols[n - 1 :]
            unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
            found.append((unique, inverse, counts, contexts))
            following = np.zeros(len(symbols), np.int64)
            following[n:] = inverse[: len(symbols) - n]
            ids, contexts = following, len(unique)
        self.orders = []
        for n, (unique, inverse, counts, contexts) in enumerate(found, 1):
            if n < order:  # count the different (n + 1)-grams that end with it
                longer, inverse_longer = found[n][0], found[n][1]
                first = np.zeros(len(longer), np.int64)
                first[inverse_longer] = np.arange(len(inverse_longer))  # an index where each begins
                counts = np.bincount(inverse[first + 1], minlength=len(unique))
            self.orders.append(_discount(unique, counts, contexts, size))

    def bits(self, symbols: np.ndarray) -> np.ndarray:
        """(N,) bits of each symbol given those before it."""
        probability = np.full(len(symbols), 1.0 / self.size)
        ids = np.zeros(len(symbols), np.int64)  # of the context of n - 1 symbols, -1 where it was never seen
        for n, order in enumerate(self.orders, 1):
            known = ids >= 0
            known[: n - 1] = False
            keys = ids * self.size + symbols
            indices = np.minimum(order.keys.searchsorted(keys), len(order.keys) - 1)
            hit = known & (order.keys[indices] == keys)
            context = np.where(known, ids, 0)
            total = order.total[context]
            own = np.where(hit, order.discounted[indices], 0.0)
            mixed = own / np.maximum(total, 1) + order.weight[context] * probability
            probability = np.where(known & (total > 0), mixed, probability)
            ids = np.concatenate([[-1], np.where(hit, indices, -1)[:-1]])
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


def word_bits(training: str, text: str, order: int = 5, rare_fraction: float = 0.01) -> float:
    """Bits of `text` by words, with a line break as a word. The rarest words of the training text, `rare_fraction` of it, and
    unknown words are one symbol; a Kneser-Ney model of characters, trained on each training word once, spells them."""
    words, asked = (some.replace("\n", " \n ").split(" ") for some in (training, text))
    counts = Counter(words)
    types = sorted(counts, key=counts.__getitem__)
    rare = int(np.searchsorted(np.cumsum([counts[word] for word in types]), rare_fraction * len(words)))
    known = {word: n for n, word in enumerate(types[rare:], 1)}
    symbols, asked_symbols = (np.array([known.get(word, 0) for word in some], np.int64) for some in (words, asked))
    bits = float(KneserNey(symbols, len(known) + 1, order).bits(asked_symbols).sum())
    unknown = [word for word in asked if word not in known]
    return bits + (_byte_bits("\n".join(["", *types, ""]), "\n".join(["", *unknown, ""]), order, 1) if unknown else 0.0)


def byte_bits(training: str, text: str, order: int = 5) -> float:
    """Bits of `text` by its UTF-8 bytes."""
    return _byte_bits(training, text, order, 0)


def _byte_bits(training: str, text: str, order: int, skipped: int) -> float:
    symbols, asked = (np.frombuffer(some.encode(), np.uint8).astype(np.int64) for some in (training, text))
    return float(KneserNey(symbols, 256, order).bits(asked)[skipped:].sum())
