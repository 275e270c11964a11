"""The order of the training data: position -> pieces of documents. Pure functions of (seed, lengths, position), no I/O.

    source      shards permuted and taken in groups of a few; the pieces of a group permuted (so that reading stays local)
    windows     some 4,096 pieces of a group; a window is packed by best fit
    packs       epoch e visits the groups, and the windows of each, in orders of its own, packs each window anew, and visits its
                packs in an order of its own
    mixture     position p -> (source, k-th pack of that source), a closed form of integer weights

Which documents stand in a window does not depend on the epoch, and best-fit-decreasing fills as many packs however ties are
broken, so the number of packs of a window is the same in every epoch: one table serves them all, and the k-th pack of any epoch
is found in O(log windows). (Re-drawing the windows in each epoch would need the tables of all epochs before.)

Nothing here grows with the number of documents but that table, one number a window: the pieces of a group are made when a pack
of it is asked for, and forgotten when two groups later ones are.

Every permutation sorts by a counter-based hash of our own, so the order cannot change with a library's random generator.
`ORDER_VERSION` changes when the order does; checkpoints carry it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.packing import best_fit_decreasing

ORDER_VERSION = 2
WINDOW_PIECES = 4096
GROUP_SHARDS = 8
GROUP_PIECES = 1 << 19  # a group of large shards takes fewer of them
MIXTURE_BLOCK = 64


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

    Nested floors: exact in total, O(sources), and each count is monotone in `k` (rounding by largest remainder is not). After
    `sum(weights)` packs, source i has exactly `weights[i]`.
    """
    counts = np.zeros(len(weights), np.int64)
    left, current = sum(weights), k
    for source, weight in enumerate(weights):
        following = current * (left - weight) // left if left else 0
        counts[source] = current - following
        current, left = following, left - weight
    return counts


class Piece(NamedTuple):
    """The tokens [start, stop) of a document of a source, as they stand in one pack; `whole`: they are all of it."""

    source: int
    epoch: int
    document: int
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True, eq=False)
class Pieces:
    """P pieces of documents, in index order: the columns of a table.

    document: (P,) number of the document within its source; start, stop: (P,) see `Piece`; targets: (P,) tokens of the piece
    that are predicted; whole: (P,) bool.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    targets: np.ndarray
    whole: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, places: np.ndarray | slice) -> Pieces:
        return Pieces(*(column[places] for column in self._columns()))

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.document, self.start, self.stop, self.targets, self.whole

    @classmethod
    def concatenate(cls, parts: Sequence[Pieces]) -> Pieces:
        return cls(*(np.concatenate(columns) for columns in zip(*(part._columns() for part in parts), strict=True)))

    def of_source(self, source: int, epoch: int) -> tuple[Piece, ...]:
        columns = (self.document.tolist(), self.start.tolist(), self.stop.tolist(), self.whole.tolist())
        return tuple(Piece(source, epoch, *row) for row in zip(*columns, strict=True))


@dataclass(frozen=True, eq=False)
class SourceTokens:
    """What the order needs to know of a source.

    name: the source's; counts: (shards,) number of pieces in each shard; tokens: of all pieces together; load: the pieces of a
    shard.
    """

    name: str
    counts: np.ndarray
    tokens: int
    load: Callable[[int], Pieces]


class Packed(NamedTuple):
    """A packed window, its packs in the order they are visited in: pieces of the `n`-th are `pieces[first[n] : first[n + 1]]`,
    its number within the source is `number + n`; `tokens`, `targets` of each."""

    number: int
    pieces: tuple[Piece, ...]  # of source 0
    first: list[int]
    tokens: np.ndarray
    targets: np.ndarray


class SourceOrder:
    """The k-th pack of a source, for any k: epoch after epoch, every piece once in each.

    Args:
        source: its pieces.
        context: tokens of a pack.
        seed: of every permutation.
        window_packs: (windows,) packs of each window, where they were counted before; None: count them now, which loads all
            pieces once.
        for_each: `map`, or what does the same in several processes, for counting.
    """

    def __init__(
        self,
        source: SourceTokens,
        context: int,
        seed: int,
        window_packs: np.ndarray | None = None,
        for_each: Callable[[Callable[[int], Any], Sequence[int]], Iterable[Any]] = map,
    ) -> None:
        self.source = source
        self.context = context
        self._key = (seed, source.name)
        self._cache()
        self._shards = permutation(len(source.counts), *self._key, "shards")
        self._first_shard = _group_shards(source.counts[self._shards])
        sizes = np.add.reduceat(source.counts[self._shards], self._first_shard[:-1])
        windows = -(-sizes // WINDOW_PIECES)  # of each group
        self._first_window = np.concatenate([[0], np.cumsum(windows)])
        if window_packs is None:
            window_packs = np.concatenate(list(for_each(self.count_packs, range(self.groups))))
        self.window_packs = window_packs
        self._group_packs = np.add.reduceat(window_packs, self._first_window[:-1])
        self.packs_per_epoch = int(window_packs.sum())

    def _cache(self) -> None:
        """Caches of its own: shared by all instances, those of many sources would push each other out."""
        self._epoch_groups = lru_cache(2)(self._make_epoch_groups)
        self._epoch_windows = lru_cache(2)(self._make_epoch_windows)
        self._group = lru_cache(1)(self._make_group)
        self._pack_window = lru_cache(3)(self._make_packs)
        self._last: Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        caches = ("_epoch_groups", "_epoch_windows", "_group", "_pack_window", "_last")
        return {name: value for name, value in self.__dict__.items() if name not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache()

    @property
    def groups(self) -> int:
        return len(self._first_shard) - 1

    @property
    def tokens_per_pack(self) -> float:
        """Mean, so: what one pack of this source is worth in a mixture."""
        return self.source.tokens / self.packs_per_epoch

    def shards_of_group(self, group: int) -> list[int]:
        return self._shards[self._first_shard[group] : self._first_shard[group + 1]].tolist()

    def count_packs(self, group: int) -> np.ndarray:
        """(windows of the group,) packs of each."""
        pieces = self._group(group)
        lengths = pieces.stop - pieces.start
        return np.array([len(best_fit_decreasing(lengths[window], self.context)) for window in self._slices(group)])

    def pack(self, k: int) -> tuple[Piece, ...]:
        """The pieces of pack number `k`, as of source 0."""
        packed = self._window_of(k)
        return packed.pieces[packed.first[k - packed.number] : packed.first[k - packed.number + 1]]

    def sizes(self, first: int, stop: int) -> tuple[int, int]:
        """(tokens, targets) of the packs number [first, stop)."""
        tokens = targets = 0
        while first < stop:
            packed = self._window_of(first)
            number = first - packed.number
            last = min(stop - packed.number, len(packed.tokens))
            tokens += int(packed.tokens[number:last].sum())
            targets += int(packed.targets[number:last].sum())
            first += last - number
        return tokens, targets

    def upcoming_shards(self, k: int) -> Iterator[tuple[int, list[int]]]:
        """(number of the first pack that needs them, shards) of the group that pack `k` is in and of all after it, for ever."""
        epoch, within = divmod(k, self.packs_per_epoch)
        while True:
            order, ends = self._epoch_groups(epoch)
            place = int(np.searchsorted(ends, within, side="right"))
            for group, end in zip(order[place:].tolist(), ends[place:].tolist(), strict=True):
                first = end - int(self._group_packs[group])
                yield epoch * self.packs_per_epoch + first, self.shards_of_group(group)
            epoch, within = epoch + 1, 0

    def _window_of(self, k: int) -> Packed:
        """The packed window that pack number `k` stands in."""
        if self._last is None or not self._last.number <= k < self._last.number + len(self._last.tokens):
            epoch, within = divmod(k, self.packs_per_epoch)
            group, within = _find(self._epoch_groups(epoch), within)
            window, number = _find(self._epoch_windows(epoch, group), within)
            self._last = self._pack_window(epoch, group, window, k - number)
        return self._last

    def _make_epoch_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(self.groups, *self._key, epoch, "groups")
        return order, np.cumsum(self._group_packs[order])

    def _make_epoch_windows(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Order and cumulated packs of the windows of a group."""
        first, stop = self._first_window[group : group + 2]
        order = permutation(int(stop - first), *self._key, epoch, group, "windows")
        return order, np.cumsum(self.window_packs[first:stop][order])

    def _make_group(self, group: int) -> Pieces:
        """The pieces of a group, shuffled."""
        pieces = Pieces.concatenate([self.source.load(shard) for shard in self.shards_of_group(group)])
        return pieces[permutation(len(pieces), *self._key, group, "documents")]

    def _slices(self, group: int) -> list[slice]:
        """The windows of a group, equally large but for one piece."""
        windows = int(self._first_window[group + 1] - self._first_window[group])
        size = int(self.source.counts[self.shards_of_group(group)].sum())
        ends = [size * i // windows for i in range(windows + 1)]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def _make_packs(self, epoch: int, group: int, window: int, number: int) -> Packed:
        pieces = self._group(group)[self._slices(group)[window]]
        pieces = pieces[permutation(len(pieces), *self._key, epoch, group, window, "ties")]
        lengths = pieces.stop - pieces.start
        packs = best_fit_decreasing(lengths, self.context)
        # Best fit leaves the long documents in the first packs: without this the lengths would drift through a window.
        shuffled = permutation(len(packs), *self._key, epoch, group, window, "packs")
        packs = [packs[i] for i in shuffled]
        first = np.cumsum([0, *(len(pack) for pack in packs)])
        visited = np.concatenate(packs)
        return Packed(
            number,
            pieces[visited].of_source(0, epoch),
            first.tolist(),
            np.add.reduceat(lengths[visited], first[:-1]),
            np.add.reduceat(pieces.targets[visited], first[:-1]),
        )


def _group_shards(counts: np.ndarray) -> np.ndarray:
    """(groups + 1,) number of the first shard of each group of neighbouring shards with `counts` pieces each.

    A group ends after `GROUP_SHARDS` shards or `GROUP_PIECES` pieces, but not before it fills a window.
    """
    firsts, shards, pieces = [0], 0, 0
    for number, count in enumerate(counts.tolist()):
        if pieces >= WINDOW_PIECES and (shards >= GROUP_SHARDS or pieces + count > GROUP_PIECES):
            firsts.append(number)
            shards = pieces = 0
        shards, pieces = shards + 1, pieces + count
    if pieces < WINDOW_PIECES and len(firsts) > 1:
        firsts.pop()
    return np.array([*firsts, len(counts)])


def _find(ordered: tuple[np.ndarray, np.ndarray], within: int) -> tuple[int, int]:
    """(which, how far inside it) for a place in things laid end to end: (their order, their cumulated sizes)."""
    order, ends = ordered
    place = int(np.searchsorted(ends, within, side="right"))
    return int(order[place]), within - (int(ends[place - 1]) if place else 0)


class Phase(NamedTuple):
    """From position `first` on, sources stand in the ratio of these integer weights, counted in packs.

    Positions from `stop` up to the next phase are empty; there, and only there, every source has had its exact share. None: the
    next phase follows at once, or none does.
    """

    first: int
    weights: tuple[int, ...]
    stop: int | None = None


@dataclass(eq=False)
class TrainingOrder:
    """Position -> pack, over all sources.

    sources: their orders; phases: at least one, the first from position 0; seed: of the mixture; end: positions from there on
    are empty, wherever in a phase it lies.
    """

    sources: Sequence[SourceOrder]
    phases: Sequence[Phase]
    seed: int
    end: int | None = None
    _base: list[np.ndarray] = field(init=False, repr=False)  # packs of each source before each phase

    def __post_init__(self) -> None:
        self._firsts = [phase.first for phase in self.phases]
        self._base = [np.zeros(len(self.sources), np.int64)]
        for phase, following in pairwise(self.phases):
            # Not the share of so many packs: a phase may be appended inside a block that was already begun.
            self._base.append(self.counts(following.first if phase.stop is None else phase.stop, len(self._base) - 1))

    @property
    def packs_per_epoch(self) -> int:
        """Packs of one epoch of all sources together."""
        return sum(source.packs_per_epoch for source in self.sources)

    @property
    def length(self) -> int | None:
        """Position after the last pack; None: endless."""
        return self.phases[-1].stop if self.end is None else self.end

    def _phase(self, position: int) -> int:
        return bisect_right(self._firsts, position) - 1

    def counts(self, position: int, number: int | None = None) -> np.ndarray:
        """(S,) packs of each source before a position, which is in phase `number`, or at its end."""
        number = self._phase(position) if number is None else number
        phase = self.phases[number]
        position = position if phase.stop is None else min(position, phase.stop)
        blocks = (position - phase.first) // MIXTURE_BLOCK * MIXTURE_BLOCK
        counts = self._base[number] + share_counts(blocks, phase.weights)
        if phase.first + blocks < position:
            sources, _ = self._block(number, phase.first + blocks)
            counts += np.bincount(sources[: position - phase.first - blocks], minlength=len(counts))
        return counts

    def locate(self, position: int) -> tuple[int, int] | None:
        """(source, number of the pack within the source) of a position; None where it is empty."""
        number = self._phase(position)
        phase = self.phases[number]
        if (phase.stop is not None and position >= phase.stop) or (self.end is not None and position >= self.end):
            return None
        first = phase.first + (position - phase.first) // MIXTURE_BLOCK * MIXTURE_BLOCK
        sources, numbers = self._block(number, first)
        return int(sources[position - first]), int(numbers[position - first])

    @lru_cache(64)  # noqa: B019
    def _block(self, number: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources, numbers within the sources) of the positions of the block of phase `number` that begins at `first`."""
        start, weights, end = self.phases[number]
        stop = first + MIXTURE_BLOCK if end is None else min(first + MIXTURE_BLOCK, end)
        before = self._base[number] + share_counts(first - start, weights)
        counts = self._base[number] + share_counts(stop - start, weights) - before
        sources = np.repeat(np.arange(len(counts)), counts)[permutation(stop - first, self.seed, "mixture", first)]
        numbers = np.zeros(stop - first, np.int64)
        for source in range(len(counts)):
            places = sources == source
            numbers[places] = before[source] + np.arange(counts[source])
        return sources, numbers

    def pack(self, position: int) -> tuple[Piece, ...]:
        """The pieces of the pack at a position; none where it is empty."""
        located = self.locate(position)
        if located is None:
            return ()
        source, k = located
        pieces = self.sources[source].pack(k)
        return tuple(piece._replace(source=source) for piece in pieces) if source else pieces

    def sizes(self, first: int, stop: int) -> tuple[np.ndarray, int]:
        """(tokens of each source (S,), targets) of the packs at positions [first, stop), if all documents can be read and none
        loses its first segments to condition dropout."""
        tokens, targets = np.zeros(len(self.sources), np.int64), 0
        packs: dict[int, list[int]] = {}
        for position in range(first, stop):
            located = self.locate(position)
            if located is not None:
                packs.setdefault(located[0], []).append(located[1])
        for source, numbers in packs.items():
            for run in _runs(sorted(numbers)):
                of_run = self.sources[source].sizes(run.start, run.stop)
                tokens[source] += of_run[0]
                targets += of_run[1]
        return tokens, targets


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """Increasing numbers as ranges of neighbours."""
    start = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number is None or number != previous + 1:
            yield range(start, previous + 1)
            start = number if number is not None else 0
        previous = number if number is not None else 0


class ValidationOrder:
    """Every document of every source once, in index order, whatever the seed, the world size and the batch."""

    def __init__(self, sources: Sequence[SourceTokens], context: int) -> None:
        self._packs: list[tuple[Piece, ...]] = []
        for number, source in enumerate(sources):
            pieces = Pieces.concatenate([source.load(shard) for shard in range(len(source.counts))])
            for start in range(0, len(pieces), WINDOW_PIECES):
                window = pieces[start : start + WINDOW_PIECES]
                packs = best_fit_decreasing(window.stop - window.start, context)
                self._packs += [window[pack].of_source(number, 0) for pack in packs]

    def __len__(self) -> int:
        return len(self._packs)

    def pack(self, position: int) -> tuple[Piece, ...]:
        """The pack, or an empty one past the end: it fills up the last batch and weighs nothing."""
        return self._packs[position] if position < len(self._packs) else ()


def pack_weights(sources: Sequence[SourceOrder], weights: Sequence[float], unit: int = 1_000_000) -> tuple[int, ...]:
    """Shares of tokens as shares of packs (those of a source of media may be less full than those of another), in millionths of
    their sum: integers, because the order must not hang on a rounding error."""
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights of sources must be 0 or more, and one of them above, not {list(weights)}")
    packs = [weight / source.tokens_per_pack for weight, source in zip(weights, sources, strict=True)]
    return tuple(max(1, round(one / sum(packs) * unit)) if one else 0 for one in packs)
