"""The order of the training data: position -> pieces of documents. Pure functions of (seed, lengths, position), no I/O.

    source      documents, shards permuted, documents permuted inside groups of a few shards (so that reading stays local)
    windows     the next 4,096 pieces of that order; a window is packed by best fit
    packs       epoch e visits the windows in an order of its own, packs each anew, and visits its packs in an order of its own
    mixture     position p -> (source, k-th pack of that source), a closed form of integer weights

Which documents stand in a window does not depend on the epoch, and best-fit-decreasing fills as many packs however ties are
broken, so the number of packs of a window is the same in every epoch: one table serves them all, and the k-th pack of any epoch
is found in O(log windows). (Re-drawing the windows in each epoch would need the tables of all epochs before.)

Every permutation sorts by a counter-based hash of our own, so the order cannot change with a library's random generator.
`ORDER_VERSION` changes when the order does; checkpoints carry it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pile_app.data.packing import best_fit_decreasing

ORDER_VERSION = 1
WINDOW_PIECES = 4096
GROUP_SHARDS = 8
MIXTURE_BLOCK = 256


def hash64(*key: int | str) -> np.uint64:
    """64 bits that depend on every part of `key`."""
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "<u8")[0]


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection on uint64 that looks random (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A permutation of `range(n)`, (n,) int64."""
    return np.argsort(mix64(mix64(np.arange(n, dtype=np.uint64)) ^ hash64(*key)), kind="stable")


def uniform(*key: int | str) -> float:
    """A number in [0, 1)."""
    return int(hash64(*key)) / 2.0**64


def share_counts(k: int, weights: Sequence[int]) -> np.ndarray:
    """How many of the first `k` packs belong to each source, (S,) int64.

    Nested floors: exact in total, O(sources), and each count is monotone in `k` (rounding by largest remainder is not).
    """
    counts = np.zeros(len(weights), np.int64)
    left, current = sum(weights), k
    for source, weight in enumerate(weights):
        following = current * (left - weight) // left if left else 0
        counts[source] = current - following
        current, left = following, left - weight
    return counts


class Piece(NamedTuple):
    """The tokens [start, stop) of a document of a source, as they stand in one pack."""

    source: int
    epoch: int
    document: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SourceTokens:
    """What the order needs to know of a source: P pieces of D documents in index order.

    name: the source's; document, start, stop: (P,) int64, see `Piece`; shard: (P,) int64, the shard that holds the document;
    targets: (P,) int64, tokens of the piece that are predicted, None: all but the first.
    """

    name: str
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    shard: np.ndarray
    targets: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return int((self.stop - self.start).sum())


class SourceOrder:
    """The k-th pack of a source, for any k: epoch after epoch, every piece once in each."""

    def __init__(self, tokens: SourceTokens, context: int, seed: int) -> None:
        self.tokens = tokens
        self.context = context
        self._key = (seed, tokens.name)
        self._lengths = tokens.stop - tokens.start
        shards = permutation(int(tokens.shard.max()) + 1, *self._key, "shards")
        group = np.argsort(shards)[tokens.shard] // GROUP_SHARDS  # the group of shards that each piece is drawn with
        shuffled = permutation(len(group), *self._key, "documents")
        self._order = shuffled[np.argsort(group[shuffled], kind="stable")]
        starts = range(0, len(self._order), WINDOW_PIECES)
        self._windows = [self._order[start : start + WINDOW_PIECES] for start in starts]
        self._window_packs = np.array([len(best_fit_decreasing(self._lengths[w], context)) for w in self._windows])

    @property
    def packs_per_epoch(self) -> int:
        return int(self._window_packs.sum())

    def pack(self, k: int) -> tuple[int, np.ndarray]:
        """(epoch, indices of the pieces) of pack number `k`."""
        epoch, within = divmod(k, self.packs_per_epoch)
        order, ends = self._epoch_windows(epoch)
        place = int(np.searchsorted(ends, within, side="right"))
        window = int(order[place])
        number = within - (int(ends[place - 1]) if place else 0)
        return epoch, self._pack_window(epoch, window)[number]

    @lru_cache(8)  # noqa: B019 (an order lives as long as its run)
    def _epoch_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._windows), *self._key, epoch, "windows")
        return order, np.cumsum(self._window_packs[order])

    @lru_cache(64)  # noqa: B019
    def _pack_window(self, epoch: int, window: int) -> list[np.ndarray]:
        pieces = self._windows[window]
        pieces = pieces[permutation(len(pieces), *self._key, epoch, window, "ties")]
        packs = best_fit_decreasing(self._lengths[pieces], self.context)
        # Best fit leaves the long documents in the first packs: without this the lengths would drift through a window.
        shuffled = permutation(len(packs), *self._key, epoch, window, "packs")
        return [pieces[packs[i]] for i in shuffled]


class TrainingOrder:
    """Position -> pack, over all sources.

    Args:
        sources: what is known of each source.
        weights: share of the packs (all nearly full, so: of the tokens) of each source, in any unit; None gives each source
            its size, so that all epochs end together.
        context: tokens of a pack.
        seed: of every permutation.
    """

    def __init__(self, sources: Sequence[SourceTokens], weights: Sequence[float] | None, context: int, seed: int) -> None:
        self.orders = [SourceOrder(source, context, seed) for source in sources]
        self.seed = seed
        shares = [order.packs_per_epoch for order in self.orders] if weights is None else list(weights)
        self.weights = integer_weights(shares)

    @property
    def packs_per_epoch(self) -> int:
        """Packs of one epoch of all sources together."""
        return sum(order.packs_per_epoch for order in self.orders)

    def locate(self, position: int) -> tuple[int, int]:
        """(source, number of the pack within the source) of a position."""
        block, place = divmod(position, MIXTURE_BLOCK)
        sources, numbers = self._block(block)
        return int(sources[place]), int(numbers[place])

    @lru_cache(64)  # noqa: B019
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        first = share_counts(block * MIXTURE_BLOCK, self.weights)
        counts = share_counts((block + 1) * MIXTURE_BLOCK, self.weights) - first
        sources = np.repeat(np.arange(len(counts)), counts)[permutation(MIXTURE_BLOCK, self.seed, "mixture", block)]
        numbers = np.zeros(MIXTURE_BLOCK, np.int64)
        for source in range(len(counts)):
            places = sources == source
            numbers[places] = first[source] + np.arange(counts[source])
        return sources, numbers

    @lru_cache(4096)  # noqa: B019
    def pack(self, position: int) -> tuple[Piece, ...]:
        """The pieces of the pack at a position."""
        source, k = self.locate(position)
        order = self.orders[source]
        epoch, pieces = order.pack(k)
        return _pieces(source, epoch, order.tokens, pieces)

    def targets(self, first: int, stop: int) -> int:
        """Tokens that are predicted in the packs at positions [first, stop), if all documents can be read and none loses its
        first segments to condition dropout."""
        total = 0
        for position in range(first, stop):
            source, k = self.locate(position)
            tokens = self.orders[source].tokens
            _, pieces = self.orders[source].pack(k)
            predicted = tokens.stop - tokens.start - 1 if tokens.targets is None else tokens.targets
            total += int(predicted[pieces].sum())
        return total


class ValidationOrder:
    """Every document of every source once, in index order, whatever the seed, the world size and the batch."""

    def __init__(self, sources: Sequence[SourceTokens], context: int) -> None:
        self._packs: list[tuple[Piece, ...]] = []
        for number, source in enumerate(sources):
            for start in range(0, len(source.document), WINDOW_PIECES):
                lengths = (source.stop - source.start)[start : start + WINDOW_PIECES]
                self._packs += [_pieces(number, 0, source, start + p) for p in best_fit_decreasing(lengths, context)]

    def __len__(self) -> int:
        return len(self._packs)

    def pack(self, position: int) -> tuple[Piece, ...]:
        """The pack, or an empty one past the end: it fills up the last batch and weighs nothing."""
        return self._packs[position] if position < len(self._packs) else ()


def integer_weights(weights: Sequence[float], unit: int = 1_000_000) -> list[int]:
    """Weights in millionths of their sum: integers, because the order must not hang on a rounding error."""
    if any(not weight > 0 for weight in weights):
        raise ValueError(f"weights of sources must be above 0, not {list(weights)}: leave out a source that weighs nothing")
    return [max(1, round(weight / sum(weights) * unit)) for weight in weights]


def _pieces(source: int, epoch: int, tokens: SourceTokens, indices: np.ndarray) -> tuple[Piece, ...]:
    return tuple(Piece(source, epoch, int(tokens.document[i]), int(tokens.start[i]), int(tokens.stop[i])) for i in indices)
