"""The n-gram baseline of `benchmarks/` is the model it says it is: a baseline that is too weak would flatter us."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from ngrams import KneserNey, byte_bits, word_bits  # type: ignore[import-not-found]


def textbook(symbols: list[int], size: int, order: int) -> Callable[[tuple[int, ...], int], float]:
    """Modified Kneser-Ney by counters, as Chen and Goodman write it."""
    grams = [Counter(tuple(symbols[i : i + n]) for i in range(len(symbols) - n + 1)) for n in range(1, order + 1)]
    counts = [Counter(gram[1:] for gram in grams[n]) for n in range(1, order)] + [grams[-1]]
    discounts = []
    for of_order in counts:
        n1, n2, n3, n4 = (max(1, sum(count == c for count in of_order.values())) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        three = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        fits = all(0 < discount < bound for bound, discount in enumerate(three, 1))
        discounts.append([0.0, *(three if fits else (0.5, 1.0, 1.5))])

    def probability(history: tuple[int, ...], symbol: int) -> float:
        shorter = probability(history[1:], symbol) if history else 1 / size
        of_order, discount = counts[len(history)], discounts[len(history)]
        after = {gram[-1]: count for gram, count in of_order.items() if gram[:-1] == history}
        if not after:
            return shorter
        taken = {s: min(discount[min(count, 3)], count) for s, count in after.items()}
        own = after.get(symbol, 0) - taken.get(symbol, 0.0)
        return (own + sum(taken.values()) * shorter) / sum(after.values())

    return probability


def test_kneser_ney_is_that_of_the_textbook() -> None:
    symbols = np.random.default_rng(0).integers(0, 4, 300) ** 2 % 7
    model, probability = KneserNey(symbols, 9, 3), textbook(symbols.tolist(), 9, 3)
    for history in ((0, 1), (4, 4), (2, 0), (8, 8), (1, 8)):
        found = [2 ** -model.bits(np.array([*history, symbol]))[-1] for symbol in range(9)]
        assert math.isclose(sum(found), 1)
        assert np.allclose(found, [probability(history, symbol) for symbol in range(9)])


def test_unknown_words_are_spelled_at_a_finite_price() -> None:
    training = "the cat sat on the mat \n the dog sat on the cat \n a bird saw the dog \n" * 2 + "once seen words only"
    known, unknown = (word_bits(training, f"the cat {word} on the mat") for word in ("sat", "zyx"))
    assert math.isfinite(unknown) and unknown > known + 8
    assert math.isfinite(byte_bits(training, "é never seen"))
