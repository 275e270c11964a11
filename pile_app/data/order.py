"""The order of the training data: position -> pieces of documents. Pure functions of (seed, lengths, position), no I/O.

    streams   a global batch of G packs is C equal runs; run c is stream c and reads about 1 / C of the shards of each source
    source    permuted shards, cut into groups within a stream; the pieces of a group are permuted
    windows   about 4,096 pieces of a group, packed by best fit
    packs     in each epoch a stream visits its groups, their windows and the packs of a window in another order
    mixture   (stream, index in it) -> (source, k-th pack of the stream in that source), a closed form of integer weights

A window fills the same number of packs in every epoch, however ties are broken, so one table of pack counts serves all epochs.
Stream c visits a contiguous range of E / C of the E packs of a source in an epoch, so every document comes exactly once. Memory
grows with the table only. Permutations sort by our own hash, so no library changes them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.packing import best_fit_decreasing

ORDER_VERSION = 3  # changes with the order; in checkpoints
WINDOW_PIECES = 4096
VALIDATION_PIECES = 512  # fewer, so that ranks read different shards of small sets too
MAX_STREAMS = 64
STREAM_SHARDS = 4  # at least, in the source with the most shards
GROUP_SHARDS, GROUP_BYTES, GROUP_PIECES = 256, 4 << 30, 1 << 18  # limits of the groups that all streams read at once


def hash64(*key: int | str) -> np.uint64:
    """Hash `key` to 64 bits."""
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "<u8")[0]


def mix64(x: np.ndarray) -> np.ndarray:
    """Mix uint64 values with SplitMix64's finalizer, a bijection (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int | str) -> np.ndarray:
    """Return a permutation of `range(n)`, (n,) int64."""
    return np.argsort(mix64(mix64(np.arange(n, dtype=np.uint64)) ^ hash64(*key)), kind="stable")


def draws(documents: np.ndarray, *key: int | str) -> np.ndarray:
    """Draw an integer in [0, 2^32) for each document, int64 of the same shape."""
    return (mix64(mix64(documents.astype(np.uint64)) ^ hash64(*key)) >> np.uint64(32)).astype(np.int64)


@lru_cache(1024)
def _offsets(source: int, streams: int) -> list[int]:
    return permutation(streams, source, "streams").tolist() if source else list(range(streams))


def share_counts(k: int, weights: Sequence[int], stream: int = 0, streams: int = 1) -> list[int]:
    """Count the packs of each source among the first `k` of a stream.

    Nested floors are exact in total and monotone in `k`. The streams round at different offsets, so that their errors cancel
    (Hermite's identity: the sum over c of floor(x + c / C) is floor(C x)).
    """
    counts: list[int] = []
    left, current = sum(weights), k
    for source, weight in enumerate(weights):
        offset = _offsets(source, streams)[stream] * left // streams
        following = (current * (left - weight) + offset) // left if left else 0
        counts.append(current - following)
        current, left = following, left - weight
    return counts


class Piece(NamedTuple):
    """Tokens [start, stop) of a document in a pack. whole: they are the whole document."""

    source: int
    epoch: int
    document: int
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True, eq=False)
class Pieces:
    """Columns (P,) of a table of pieces, in index order."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray  # of the longest of several texts
    targets: np.ndarray  # predicted tokens
    whole: np.ndarray
    varies: np.ndarray  # length or targets depend on the epoch: several texts, or free order and not all learned
    hides: np.ndarray  # condition dropout applies: all of several segments are learned

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, indices: np.ndarray | slice) -> Pieces:
        return Pieces(*(column[indices] for column in vars(self).values()))

    @classmethod
    def concatenate(cls, parts: Sequence[Pieces]) -> Pieces:
        return cls(*(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))

    def of_source(self, source: int, epoch: int) -> tuple[Piece, ...]:
        columns = (self.document.tolist(), self.start.tolist(), self.stop.tolist(), self.whole.tolist())
        return tuple(Piece(source, epoch, *row) for row in zip(*columns, strict=True))


@dataclass(frozen=True, eq=False)
class SourceTokens:
    """Sizes of a source."""

    name: str
    counts: np.ndarray  # (shards,) pieces
    tokens: np.ndarray  # (shards,)
    load: Callable[[int], Pieces]  # of a shard
    bytes: np.ndarray | None = None  # (shards,)
    # (document, draw) -> ([(tokens, learned)] of its segments, whether their order is fixed); of n texts the `draw % n`-th
    segments: Callable[[int, int], tuple[Sequence[tuple[int, bool]], bool]] | None = None


def count_streams(sources: Sequence[SourceTokens], global_batch: int) -> int:
    """Return the largest divisor of the global batch that gives each stream a few shards and limits the bytes read at once."""
    shards = max((int(np.count_nonzero(source.counts)) for source in sources), default=0)
    active = sum(float(source.bytes.mean()) for source in sources if source.bytes is not None)
    limit = min(MAX_STREAMS, shards // STREAM_SHARDS, int(8 * GROUP_BYTES / active) if active else MAX_STREAMS)
    return max(c for c in range(1, max(limit, 1) + 1) if global_batch % c == 0)


class Draw:
    """Random choices about documents: functions of (seed, source, epoch, document). `condition_dropout`: probability that the
    first segments are hidden, of documents that learn all of several segments."""

    def __init__(self, seed: int, source: SourceTokens, condition_dropout: float = 0.0) -> None:
        self.source, self.condition_dropout = source, condition_dropout
        self._key = (seed, source.name)

    def text(self, epoch: int, document: int, about: str = "text") -> int:
        """Draw an integer in [0, 2^32), which selects among the texts of a segment."""
        return int(draws(np.array([document]), *self._key, epoch, about)[0])

    def order(self, epoch: int, document: int, segments: int) -> list[int]:
        """Permute segments that have no fixed order."""
        return permutation(segments, *self._key, epoch, document, "segments").tolist()

    def hidden(self, epoch: int, document: int, segments: int) -> int:
        """Draw how many of the first segments are hidden: mostly 0, else 1 to `segments - 1`, uniformly."""
        drawn = self.text(epoch, document, "condition") / 2.0**32
        return 1 + int(drawn / self.condition_dropout * (segments - 1)) if drawn < self.condition_dropout else 0

    def apply(self, pieces: Pieces, epoch: int) -> Pieces:
        """Set the lengths and targets of the pieces in an epoch."""
        drops = draws(pieces.document, *self._key, epoch, "condition") < self.condition_dropout * 2.0**32
        rows = np.flatnonzero(pieces.varies | (pieces.hides & drops))
        if not len(rows) or self.source.segments is None:
            return pieces
        stops, targets = pieces.stop.copy(), pieces.targets.copy()
        for row, piece in zip(rows.tolist(), pieces[rows].of_source(0, epoch), strict=True):
            sizes, ordered = self.source.segments(piece.document, self.text(epoch, piece.document))
            if piece.whole and not ordered:
                sizes = [sizes[i] for i in self.order(epoch, piece.document, len(sizes))]
            hidden = self.hidden(epoch, piece.document, len(sizes)) if pieces.hides[row] else 0
            stops[row] = 2 + sum(tokens for tokens, _ in sizes) if piece.whole else piece.stop
            targets[row], opener = 0, 1
            for number, (tokens, learned) in enumerate([*sizes, (1, sizes[-1][1])]):  # the last is `<end>`
                if learned and number >= hidden:
                    targets[row] += max(0, min(opener + tokens, stops[row]) - max(opener, piece.start + 1))
                opener += tokens
        return replace(pieces, stop=stops, targets=targets)


Packed = tuple[Pieces, list[int], np.ndarray, np.ndarray]  # pieces, first piece of each pack, and its tokens and targets


class SourceOrder:
    """Order of a source: in each epoch, each of its E packs is visited by exactly one stream.

    Args:
        window_packs: (windows,) packs of each window, if already counted; None: count them, which loads all pieces once.
        for_each: `map`, or an equivalent over several processes, for counting.
        condition_dropout: see `Draw`.
    """

    def __init__(
        self,
        source: SourceTokens,
        context: int,
        seed: int,
        streams: int = 1,
        window_packs: np.ndarray | None = None,
        for_each: Callable[[Callable[[int], Any], Sequence[int]], Iterable[Any]] = map,
        condition_dropout: float = 0.0,
    ) -> None:
        self.source, self.context, self.streams = source, context, streams
        self.draw = Draw(seed, source, condition_dropout)
        self._key = (seed, source.name)
        self.offset = 0  # the E % C packs that remain are given to streams from this number on
        self._make_caches()
        shards = permutation(len(source.counts), *self._key, "shards")
        self._shards = shards[source.counts[shards] > 0]
        counts, tokens = source.counts[self._shards], source.tokens[self._shards]
        sizes = np.zeros_like(counts) if source.bytes is None else source.bytes[self._shards]
        self._first_shard = _group_shards(tokens, counts, sizes, streams)
        self.groups = len(self._first_shard) - 1
        self._group_pieces = np.add.reduceat(counts, self._first_shard[:-1])
        self._first_window = np.concatenate([[0], np.cumsum(-(-self._group_pieces // WINDOW_PIECES))])
        if window_packs is None:
            window_packs = np.concatenate(list(for_each(self.count_packs, range(self.groups))))
        self.window_packs = window_packs
        self._starts = np.concatenate([[0], np.cumsum(window_packs)])  # of windows, in the line of packs
        self._group_starts = self._starts[self._first_window]
        self.packs_per_epoch = int(self._starts[-1])
        self.tokens_per_pack = float(source.tokens.sum()) / self.packs_per_epoch  # mean
        self._shift = int(self._group_starts[1]) // 2 if streams > 1 else 0  # the line is a circle: see `_group_shards`

    def _make_caches(self) -> None:
        """Cache a window, a group and two visiting orders per stream in each instance, and a few more for transitions."""
        entries = self.streams + self.streams // 4 + 2
        self._group = lru_cache(self.streams)(self._make_group)
        self._packed = lru_cache(entries)(self._make_packs)
        self._visits = lru_cache(2 * entries)(self._make_visits)
        self._find = lru_cache(4096)(self._find_pack)  # a pack is located for its sizes, then for its pieces

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_group", "_packed", "_visits", "_find")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def shards_of_group(self, group: int) -> list[int]:
        return self._shards[self._first_shard[group] : self._first_shard[group + 1]].tolist()

    def _windows(self, group: int) -> range:
        return range(int(self._first_window[group]), int(self._first_window[group + 1]))

    def count_packs(self, group: int) -> np.ndarray:
        """Count the packs of each window of a group."""
        windows = (self._pieces(group, window) for window in self._windows(group))
        return np.array([len(best_fit_decreasing(pieces.stop - pieces.start, self.context)) for pieces in windows])

    def part(self, epoch: int, stream: int) -> tuple[int, int]:
        """Return [low, high), the range that a stream visits of an epoch's packs, which form a circle of E."""
        first, streams = self.offset + epoch * self.packs_per_epoch, self.streams
        stop = first + self.packs_per_epoch  # [first, stop): how many are less than c modulo `streams`?
        low, high = (
            (stop // streams - first // streams) * c + min(stop % streams, c) - min(first % streams, c)
            for c in (stream, stream + 1)
        )
        return low + self._shift, high + self._shift

    def packs_before(self, total: int, stream: int) -> int:
        """Count the packs that a stream has visited when all streams together have visited `total`."""
        return max(0, -(-(total - (stream - self.offset) % self.streams) // self.streams))

    def find(self, k: int, stream: int) -> tuple[int, int]:
        """Return (epoch, index within it) of the k-th pack of a stream."""
        epoch = ((stream - self.offset) % self.streams + k * self.streams) // self.packs_per_epoch
        return epoch, k - self.packs_before(epoch * self.packs_per_epoch, stream)

    def pack(self, k: int, stream: int = 0, source: int = 0) -> tuple[Piece, ...]:
        """Return the pieces of the k-th pack of a stream."""
        epoch, (pieces, first, *_), n = self._locate(k, stream)
        return pieces[first[n] : first[n + 1]].of_source(source, epoch)

    def sizes(self, k: int, stream: int = 0) -> tuple[int, int]:
        """Count (tokens, targets) of the k-th pack of a stream."""
        _, (*_, tokens, targets), n = self._locate(k, stream)
        return int(tokens[n]), int(targets[n])

    def upcoming_shards(self, k: int, stream: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Yield (index of the first pack, shards) of each group from the k-th pack of a stream on, endlessly."""
        epoch, within = self.find(k, stream)
        while True:
            first = k - within
            groups, ends = self._visits(epoch, None, *self.part(epoch, stream))
            for group, start, end in zip(groups, [0, *ends], ends, strict=False):
                if end > max(start, within):
                    yield first + start, self.shards_of_group(group)
            k, epoch, within = first + (ends[-1] if ends else 0), epoch + 1, 0

    def _locate(self, k: int, stream: int) -> tuple[int, Packed, int]:
        """Return (epoch, packs of a window, index of the pack) for the k-th pack of a stream."""
        epoch, group, window, n = self._find(k, stream)
        return epoch, self._packed(epoch, group, window), n

    def _find_pack(self, k: int, stream: int) -> tuple[int, int, int, int]:
        """Return (epoch, group, window, index in the window) of the k-th pack of a stream."""
        epoch, within = self.find(k, stream)
        low, high = self.part(epoch, stream)
        found: list[Any] = [None]  # the group, then the window
        for _ in range(2):
            order, ends = self._visits(epoch, found[-1], low, high)
            at = bisect_right(ends, within)
            found.append(order[at])
            within -= ends[at - 1] if at else 0
        _, group, window = found
        start, stop = int(self._starts[window]), int(self._starts[window + 1])
        first = min(stop, high) - max(start, low)  # packs before the line's end; the others are at its beginning
        n = within - max(0, first) + max(0, low - start - self.packs_per_epoch)
        n = within + max(0, low - start) if within < first else n
        return epoch, group, window, n

    def _make_visits(self, epoch: int, group: int | None, low: int, high: int) -> tuple[list[int], list[int]]:
        """Order the groups, or the windows of a group, for the stream of [low, high), with their cumulated packs in it."""
        starts, some = (self._group_starts, range(self.groups)) if group is None else (self._starts, self._windows(group))
        key = (epoch, "groups") if group is None else (epoch, group, "windows")
        order = some.start + permutation(len(some), *self._key, *key, low)
        turns = (np.minimum(starts[order + 1] + n, high) - np.maximum(starts[order] + n, low) for n in (0, starts[-1]))
        return order.tolist(), np.cumsum(sum(np.maximum(sizes, 0) for sizes in turns)).tolist()

    def _make_group(self, group: int) -> Pieces:
        pieces = Pieces.concatenate([self.source.load(shard) for shard in self.shards_of_group(group)])
        return pieces[permutation(len(pieces), *self._key, group, "documents")]

    def _pieces(self, group: int, window: int) -> Pieces:
        """Return the pieces of a window; the windows of a group differ by at most one piece."""
        windows, size = self._windows(group), int(self._group_pieces[group])
        n = window - windows.start
        return self._group(group)[size * n // len(windows) : size * (n + 1) // len(windows)]

    def _make_packs(self, epoch: int, group: int, window: int) -> Packed:
        pieces = self._pieces(group, window)
        pieces = pieces[permutation(len(pieces), *self._key, epoch, window, "ties")]
        packs = best_fit_decreasing(pieces.stop - pieces.start, self.context)
        # Best fit puts long documents first: shuffle, or the lengths would drift.
        packs = [packs[i] for i in permutation(len(packs), *self._key, epoch, window, "packs")]
        first = np.cumsum([0, *(len(pack) for pack in packs)])
        pieces = self.draw.apply(pieces[np.concatenate(packs)], epoch)
        tokens = np.add.reduceat(pieces.stop - pieces.start, first[:-1])
        return pieces, first.tolist(), tokens, np.add.reduceat(pieces.targets, first[:-1])


def _group_shards(tokens: np.ndarray, counts: np.ndarray, sizes: np.ndarray, streams: int) -> np.ndarray:
    """Return the first shard of each group (groups + 1,) of neighbouring shards, with these tokens, pieces and bytes.

    The circle of shards is cut into `streams` parts of equal tokens, first within the first shard. Shards near a cut are groups
    alone, so streams overlap little; the others are split evenly, within the limits.
    """
    ends = np.cumsum(tokens)
    starts = ends - tokens
    borders = tokens[0] // 2 + ends[-1] * np.arange(streams) // streams if streams > 1 else ends[:0]
    part = np.searchsorted(borders, starts, side="right")
    margin = ends[-1] // (8 * len(ends))  # packs are not exactly as many as the tokens promise
    alone = np.searchsorted(borders, ends + margin, side="left") > np.searchsorted(borders, starts - margin, side="right")
    begins = (np.diff(part, prepend=0) > 0) | alone | np.concatenate([[False], alone[:-1]])
    stretch = np.cumsum(begins) - begins[0]
    bounds = ((counts, GROUP_PIECES), (sizes, GROUP_BYTES), (np.ones_like(counts), GROUP_SHARDS))
    groups = np.ceil(np.max([np.bincount(stretch, amount) * streams / bound for amount, bound in bounds], axis=0))
    groups = np.clip(groups, 1, np.maximum(np.bincount(stretch, counts) // WINDOW_PIECES, 1)).astype(np.int64)
    of_stretch = np.bincount(stretch, tokens).astype(np.int64)
    offset = starts - (np.cumsum(of_stretch) - of_stretch)[stretch]
    firsts = 1 + np.flatnonzero(np.diff(stretch) | np.diff(offset * groups[stretch] // of_stretch[stretch]))
    return np.array([0, *firsts.tolist(), len(counts)])


class Phase(NamedTuple):
    """Weights of packs from position `first` on (None: after the previous phase); exact: `weights` packs, then none."""

    first: int | None
    weights: tuple[int, ...]
    exact: bool = False


class TrainingOrder:
    """Position -> pack, over all sources, which have the same number C of streams.

    Phases begin at multiples of the global batch, itself a multiple of C, the first at 0. Positions from `end` on are empty.
    """

    def __init__(
        self, sources: Sequence[SourceOrder], phases: Sequence[Phase], global_batch: int = 1, end: int | None = None
    ) -> None:
        self.phases, self.global_batch, self.end = phases, global_batch, end
        self.streams = sources[0].streams
        self.run = global_batch // self.streams  # positions of a stream in a global batch
        packs = phases[0].weights if phases[0].exact else [source.packs_per_epoch for source in sources]
        self.sources = [copy(source) for source in sources]
        for number, source in enumerate(self.sources):
            source.offset = sum(packs[:number])
        self.draws = [source.draw for source in sources]
        self.packs_per_epoch = sum(source.packs_per_epoch for source in sources)
        self._firsts: list[int] = []  # of the phases, in each stream
        self._base: list[list[list[int]]] = []  # [phase][stream][source] packs before the phase
        self._weights: list[list[list[int]]] = []  # [phase][stream][source]
        every = range(self.streams)
        for number, phase in enumerate(phases):
            first = self._end_of_phase() if phase.first is None else phase.first // self.streams
            base = [self._counts(number - 1, c, first) if number else [0] * len(sources) for c in every]
            weights = [list(phase.weights)] * self.streams
            if phase.exact:
                ends = [sum(column) for column in zip(*base, phase.weights, strict=True)]
                before = [[source.packs_before(end, c) for source, end in zip(self.sources, ends, strict=True)] for c in every]
                weights = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(base, before, strict=True)]
            self._firsts.append(first)
            self._base.append(base)
            self._weights.append(weights)

    @property
    def length(self) -> int | None:
        """Position after the last step; None: endless."""
        return self._end_of_phase() * self.streams if self.end is None and self.phases[-1].exact else self.end

    def first(self, number: int) -> int:
        """Return the first position of a phase."""
        return self._firsts[number] * self.streams

    def _end_of_phase(self) -> int:
        """Return the index in each stream after the last phase so far, which is exact."""
        return self._firsts[-1] + -(-max(map(sum, self._weights[-1])) // self.run) * self.run

    @lru_cache(4096)  # noqa: B019 (lives as long as the run); `locate` asks for neighbors
    def _counts(self, number: int, stream: int, index: int) -> list[int]:
        """Count the packs of each source in a stream before an index in phase `number`."""
        weights, index = self._weights[number][stream], index - self._firsts[number]
        index = min(index, sum(weights)) if self.phases[number].exact else index
        shares = share_counts(index, weights, stream, self.streams)
        return [a + b for a, b in zip(self._base[number][stream], shares, strict=True)]

    @lru_cache(4096)  # noqa: B019 (lives as long as the run)
    def locate(self, position: int) -> tuple[int, int, int] | None:
        """Return (source, stream, index among the packs of the source in the stream), or None for an empty position."""
        step, within = divmod(position, self.global_batch)
        stream, index = within // self.run, step * self.run + within % self.run
        number = bisect_right(self._firsts, index) - 1
        counts, following = (self._counts(number, stream, i) for i in (index, index + 1))
        if counts == following or (self.end is not None and position >= self.end):
            return None
        source = next(i for i, count in enumerate(counts) if following[i] > count)
        return source, stream, counts[source]

    def pack(self, position: int) -> tuple[Piece, ...]:
        """Return the pieces of the pack at a position."""
        source, stream, k = self.locate(position) or (None, 0, 0)
        return () if source is None else self.sources[source].pack(k, stream, source)

    def sizes(self, first: int, stop: int) -> tuple[np.ndarray, int]:
        """Count (tokens of each source (S,), targets) planned for the positions [first, stop)."""
        tokens, targets = np.zeros(len(self.sources), np.int64), 0
        for source, stream, k in filter(None, map(self.locate, range(first, stop))):
            of_pack = self.sources[source].sizes(k, stream)
            tokens[source] += of_pack[0]
            targets += of_pack[1]
        return tokens, targets

    def upcoming_shards(self, source: int, stream: int, position: int) -> Iterator[tuple[float, list[int]]]:
        """Yield (approximate position of the first pack, shards) of each group, endlessly, ignoring later phases."""
        index = position // self.streams  # at the start of a step
        number = bisect_right(self._firsts, index) - 1
        before, weights = self._counts(number, stream, index)[source], self._weights[number][stream]
        if weights[source]:
            stride = self.streams * sum(weights) / weights[source]  # positions per pack
            for first, shards in self.sources[source].upcoming_shards(before, stream):
                yield position + (first - before) * stride, shards


class ValidationOrder:
    """Visit every document once, in index order, at any seed, world size and batch."""

    def __init__(self, sources: Sequence[SourceTokens], context: int) -> None:
        self.draws = [Draw(0, source) for source in sources]
        self._packs: list[tuple[Piece, ...]] = []
        for number, source in enumerate(sources):
            pieces = Pieces.concatenate([source.load(shard) for shard in range(len(source.counts))])
            for start in range(0, len(pieces), VALIDATION_PIECES):
                window = self.draws[number].apply(pieces[start : start + VALIDATION_PIECES], 0)
                packs = best_fit_decreasing(window.stop - window.start, context)
                self._packs += [window[pack].of_source(number, 0) for pack in packs]

    def __len__(self) -> int:
        return len(self._packs)

    def pack(self, position: int) -> tuple[Piece, ...]:
        """Return a pack, empty past the end, to fill the last batch."""
        return self._packs[position] if position < len(self._packs) else ()


def pack_weights(sources: Sequence[SourceOrder], weights: Sequence[float], unit: int = 1_000_000) -> tuple[int, ...]:
    """Convert weights of tokens to integer weights of packs, which may be less full, in millionths of their sum."""
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights of sources must be 0 or more, at least one above 0, not {list(weights)}")
    packs = [weight / source.tokens_per_pack for weight, source in zip(weights, sources, strict=True)]
    return tuple(max(1, round(pack / sum(packs) * unit)) if pack else 0 for pack in packs)
