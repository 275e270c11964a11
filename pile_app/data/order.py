"""The order of the training data: position -> pieces of documents. Pure functions of (seed, lengths, position), no I/O.

    streams   a global batch of G packs is C equal runs; run c is stream c, and reads about 1 / C of the shards of each source
    source    shards in a permuted line, cut into groups that lie within a stream; the pieces of a group are permuted
    windows   about 4,096 pieces of a group, packed by best fit
    packs     epoch e visits a stream's groups, their windows and the packs of a window in orders drawn for that epoch
    mixture   (stream, index in it) -> (source, k-th pack of the stream in that source), a closed form of integer weights

The documents of a window are the same in every epoch, and best-fit-decreasing fills as many packs however ties are broken, so
one table of packs per window serves all epochs, and any pack is found in O(log windows). With the table, an epoch of a source
is a line of E packs. Stream c takes a contiguous range of it, E / C packs rounded up or down, so every document comes exactly
once per epoch, over all streams. Memory grows with the table only: pieces are loaded per group and dropped again.

Permutations sort by our own counter-based hash, so no library can change the order. `ORDER_VERSION` changes when the order does
and is stored in checkpoints.
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

ORDER_VERSION = 3
WINDOW_PIECES = 4096
VALIDATION_PIECES = 512  # fewer, so that ranks read different shards of small sets too
MAX_STREAMS = 64
STREAM_SHARDS = 4  # at least, in the source with the most shards
# Bounds on the groups that all streams of a source read at the same time, together:
GROUP_SHARDS = 256
GROUP_BYTES = 4 << 30
GROUP_PIECES = 1 << 18


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


def draws(documents: np.ndarray, *key: int | str) -> np.ndarray:
    """A random integer in [0, 2^32) for each document, int64 of the same shape."""
    return (mix64(mix64(documents.astype(np.uint64)) ^ hash64(*key)) >> np.uint64(32)).astype(np.int64)


@lru_cache(1024)
def _offsets(source: int, streams: int) -> list[int]:
    return permutation(streams, source, "streams").tolist() if source else list(range(streams))


def share_counts(k: int, weights: Sequence[int], stream: int = 0, streams: int = 1) -> list[int]:
    """How many of the first `k` packs of a stream belong to each source.

    Nested floors: exact in total, monotone in `k` (rounding by largest remainder is not), `weights` after `sum(weights)` packs.
    Each stream rounds at an offset of its own, so that their errors cancel: by Hermite's identity, the sum over c of
    floor(x + c / C) is floor(C x).
    """
    counts: list[int] = []
    left, current = sum(weights), k
    for source, weight in enumerate(weights):
        offset = _offsets(source, streams)[stream] * left // streams
        following = (current * (left - weight) + offset) // left if left else 0
        counts.append(current - following)
        current, left = following, left - weight
    return counts


def _below(n: int, remainder: int, streams: int) -> int:
    """How many integers of [0, n) are less than `remainder` modulo `streams`."""
    return n // streams * remainder + min(n % streams, remainder)


class Piece(NamedTuple):
    """The tokens [start, stop) of a document of a source, in one pack. whole: they are the whole document."""

    source: int
    epoch: int
    document: int
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True, eq=False)
class Pieces:
    """P pieces of documents, in index order: the columns of a table.

    document: (P,) index of the document within its source; start, stop: (P,) see `Piece`, for the longest of several texts;
    targets: (P,) tokens of the piece that are predicted; whole: (P,) bool; varies: (P,) bool, length or targets depend on the
    epoch, because a segment has several texts, or segments in free order are not all learned; hides: (P,) bool, condition
    dropout applies, because the document has several segments and all of them are learned.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    targets: np.ndarray
    whole: np.ndarray
    varies: np.ndarray
    hides: np.ndarray

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


Segments = tuple[Sequence[tuple[int, bool]], bool]  # ([(tokens, learned)] of each as stored, whether their order is fixed)


@dataclass(frozen=True, eq=False)
class SourceTokens:
    """What the order needs to know of a source.

    name: of the source; counts, tokens: (shards,) pieces in each shard, and their tokens; load: shard -> its pieces; bytes:
    (shards,) size of each shard; segments: (document, draw) -> its segments, where a segment with n texts takes text
    `draw % n`. Only documents that vary or are hidden are asked for.
    """

    name: str
    counts: np.ndarray
    tokens: np.ndarray
    load: Callable[[int], Pieces]
    bytes: np.ndarray | None = None
    segments: Callable[[int, int], Segments] | None = None


def count_streams(sources: Sequence[SourceTokens], global_batch: int) -> int:
    """The number of streams: the largest divisor of the global batch for which every stream has a few shards to itself.

    The shards that all streams read at the same time are bounded too, in bytes: the cache of a node has to hold its part.
    """
    shards = max((int(np.count_nonzero(source.counts)) for source in sources), default=0)
    active = sum(float(source.bytes.mean()) for source in sources if source.bytes is not None)
    limit = min(MAX_STREAMS, shards // STREAM_SHARDS, int(8 * GROUP_BYTES / active) if active else MAX_STREAMS)
    return max(c for c in range(1, max(limit, 1) + 1) if global_batch % c == 0)


class Draw:
    """The random choices about the documents of a source: functions of (seed, source, epoch, document).

    `condition_dropout` is the fraction of documents with several segments, all of them learned, whose first ones are hidden.
    """

    def __init__(self, seed: int, source: SourceTokens, condition_dropout: float = 0.0) -> None:
        self.source = source
        self.condition_dropout = condition_dropout
        self._key = (seed, source.name)

    def text(self, epoch: int, document: int) -> int:
        """The draw in [0, 2^32) that selects one of several texts of a segment."""
        return int(draws(np.array([document]), *self._key, epoch, "text")[0])

    def order(self, epoch: int, document: int, segments: int) -> list[int]:
        """The order of segments that have no fixed order."""
        return permutation(segments, *self._key, epoch, document, "segments").tolist()

    def hidden(self, epoch: int, document: int, segments: int) -> int:
        """How many of the first segments are hidden: mostly none, else 1 to `segments - 1`, equally likely."""
        drawn = int(draws(np.array([document]), *self._key, epoch, "condition")[0]) / 2.0**32
        return 1 + int(drawn / self.condition_dropout * (segments - 1)) if drawn < self.condition_dropout else 0

    def apply(self, pieces: Pieces, epoch: int) -> Pieces:
        """The pieces with the lengths and targets that they have in an epoch."""
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
            stops[row], targets[row] = _sizes_of_piece(piece, sizes, hidden)
        return replace(pieces, stop=stops, targets=targets)


def _sizes_of_piece(piece: Piece, sizes: Sequence[tuple[int, bool]], hidden: int) -> tuple[int, int]:
    """(stop, targets) of a piece of a document with these segments, the first `hidden` of them hidden."""
    stop = 2 + sum(tokens for tokens, _ in sizes) if piece.whole else piece.stop
    targets, opener = 0, 1
    for number, (tokens, learned) in enumerate([*sizes, (1, sizes[-1][1])]):  # the last is `<end>`
        if learned and number >= hidden:
            targets += max(0, min(opener + tokens, stop) - max(opener, piece.start + 1))
        opener += tokens
    return stop, targets


class Packed(NamedTuple):
    """A packed window, its packs in the order of their visit: the pieces of pack n are `pieces[first[n] : first[n + 1]]`, with
    `tokens[n]` tokens and `targets[n]` targets."""

    pieces: Pieces
    first: list[int]
    tokens: np.ndarray
    targets: np.ndarray


class SourceOrder:
    """The packs of a source: epoch after epoch, each of its E packs is visited by exactly one stream.

    Args:
        source: its pieces.
        context: tokens of a pack.
        seed: of every permutation.
        streams: that share the source. Groups of shards end where the range of a stream does.
        window_packs: (windows,) packs of each window, where they were counted before; None: count them now, which loads all
            pieces once.
        for_each: `map`, or an equivalent over several processes, for counting.
        condition_dropout: fraction of the documents whose first segments are hidden.
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
        self.offset = 0
        self._cache()
        shards = permutation(len(source.counts), *self._key, "shards")
        self._shards = shards[source.counts[shards] > 0]
        counts, tokens = source.counts[self._shards], source.tokens[self._shards]
        sizes = np.zeros_like(counts) if source.bytes is None else source.bytes[self._shards]
        self._first_shard = _group_shards(tokens, counts, sizes, streams)
        self._group_pieces = np.add.reduceat(counts, self._first_shard[:-1])
        self._first_window = np.concatenate([[0], np.cumsum(-(-self._group_pieces // WINDOW_PIECES))])
        if window_packs is None:
            window_packs = np.concatenate(list(for_each(self.count_packs, range(self.groups))))
        self.window_packs = window_packs
        self._starts = np.concatenate([[0], np.cumsum(window_packs)])  # of windows, in the line of packs
        self._group_starts = self._starts[self._first_window]
        self.packs_per_epoch = int(self._starts[-1])
        self._shift = int(self._group_starts[1]) // 2 if streams > 1 else 0  # the line is a circle: see `_group_shards`

    def _cache(self) -> None:
        """Each instance has its own caches: one window, group and plan per stream, and some more for the moments of change."""
        entries = self.streams + self.streams // 4 + 2
        self._group = lru_cache(self.streams)(self._make_group)
        self._packed = lru_cache(entries)(self._make_packs)
        self._visits = lru_cache(entries)(self._make_visits)
        self._group_visits = lru_cache(entries)(self._make_group_visits)

    def __getstate__(self) -> dict[str, Any]:
        caches = ("_group", "_packed", "_visits", "_group_visits")
        return {name: value for name, value in self.__dict__.items() if name not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache()

    @property
    def groups(self) -> int:
        return len(self._first_shard) - 1

    @property
    def tokens_per_pack(self) -> float:
        """Mean: the worth of one pack of this source in a mixture."""
        return float(self.source.tokens.sum()) / self.packs_per_epoch

    def shards_of_group(self, group: int) -> list[int]:
        return self._shards[self._first_shard[group] : self._first_shard[group + 1]].tolist()

    def windows_of_group(self, group: int) -> range:
        return range(int(self._first_window[group]), int(self._first_window[group + 1]))

    def count_packs(self, group: int) -> np.ndarray:
        """(windows of the group,) packs of each."""
        windows = (self._pieces(group, window) for window in self.windows_of_group(group))
        return np.array([len(best_fit_decreasing(pieces.stop - pieces.start, self.context)) for pieces in windows])

    # -- What a stream has of an epoch.

    def rotated(self, offset: int) -> SourceOrder:
        """The same order, but the packs that remain when E is divided by C go to other streams."""
        order = copy(self)
        order.offset = offset
        return order

    def part(self, epoch: int, stream: int) -> tuple[int, int]:
        """[low, high): the range that a stream visits in the line of an epoch's packs, which begins again after E."""
        before = self.offset + epoch * self.packs_per_epoch
        low, high = (
            _below(before + self.packs_per_epoch, c, self.streams) - _below(before, c, self.streams)
            for c in (stream, stream + 1)
        )
        return low + self._shift, high + self._shift

    def packs_before(self, total: int, stream: int) -> int:
        """How many packs a stream has visited when all streams together have visited `total`."""
        return max(0, -(-(total - (stream - self.offset) % self.streams) // self.streams))

    def find(self, k: int, stream: int) -> tuple[int, int]:
        """(epoch, index of the visit in it) of the k-th pack of a stream."""
        epoch = ((stream - self.offset) % self.streams + k * self.streams) // self.packs_per_epoch
        return epoch, k - self.packs_before(epoch * self.packs_per_epoch, stream)

    def pack(self, k: int, stream: int = 0, source: int = 0) -> tuple[Piece, ...]:
        """The pieces of the k-th pack of a stream."""
        epoch, packed, n = self._locate(k, stream)
        return packed.pieces[packed.first[n] : packed.first[n + 1]].of_source(source, epoch)

    def sizes(self, k: int, stream: int = 0) -> tuple[int, int]:
        """(tokens, targets) of the k-th pack of a stream."""
        _, packed, n = self._locate(k, stream)
        return int(packed.tokens[n]), int(packed.targets[n])

    def upcoming_shards(self, k: int, stream: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(index of the first pack that needs them, shards) of the groups from the k-th pack of a stream on, endless."""
        epoch, within = self.find(k, stream)
        while True:
            first = k - within
            groups, ends = self._visits(epoch, *self.part(epoch, stream))
            for group, start, end in zip(groups.tolist(), [0, *ends.tolist()], ends.tolist(), strict=False):
                if end > max(start, within):
                    yield first + start, self.shards_of_group(group)
            k, epoch, within = first + (int(ends[-1]) if len(ends) else 0), epoch + 1, 0

    def _locate(self, k: int, stream: int) -> tuple[int, Packed, int]:
        """(epoch, window, index of the pack in it) of the k-th pack of a stream."""
        epoch, within = self.find(k, stream)
        low, high = self.part(epoch, stream)
        group, within = _find(self._visits(epoch, low, high), within)
        window, within = _find(self._group_visits(epoch, group, low, high), within)
        start, stop = self._starts[window : window + 2].tolist()
        first = min(stop, high) - max(start, low)  # packs before the line's end; the others are at its beginning
        n = within - max(0, first) + max(0, low - start - self.packs_per_epoch)
        n = within + max(0, low - start) if within < first else n
        return epoch, self._packed(epoch, group, window), n

    def _make_visits(self, epoch: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups in the order that the stream of [low, high) visits them, and their cumulated packs in that range."""
        return _visits(self._group_starts, range(self.groups), low, high, *self._key, epoch, "groups")

    def _make_group_visits(self, epoch: int, group: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for the windows of a group."""
        return _visits(self._starts, self.windows_of_group(group), low, high, *self._key, epoch, group, "windows")

    def _make_group(self, group: int) -> Pieces:
        """The pieces of a group, shuffled."""
        pieces = Pieces.concatenate([self.source.load(shard) for shard in self.shards_of_group(group)])
        return pieces[permutation(len(pieces), *self._key, group, "documents")]

    def _pieces(self, group: int, window: int) -> Pieces:
        """The pieces of a window. The windows of a group differ by at most one piece."""
        windows, size = self.windows_of_group(group), int(self._group_pieces[group])
        n = window - windows.start
        return self._group(group)[size * n // len(windows) : size * (n + 1) // len(windows)]

    def _make_packs(self, epoch: int, group: int, window: int) -> Packed:
        pieces = self._pieces(group, window)
        pieces = pieces[permutation(len(pieces), *self._key, epoch, window, "ties")]
        packs = best_fit_decreasing(pieces.stop - pieces.start, self.context)
        # Best fit puts the long documents into the first packs: without this the lengths would drift through a window.
        packs = [packs[i] for i in permutation(len(packs), *self._key, epoch, window, "packs")]
        first = np.cumsum([0, *(len(pack) for pack in packs)])
        pieces = self.draw.apply(pieces[np.concatenate(packs)], epoch)
        tokens = np.add.reduceat(pieces.stop - pieces.start, first[:-1])
        return Packed(pieces, first.tolist(), tokens, np.add.reduceat(pieces.targets, first[:-1]))


def _group_shards(tokens: np.ndarray, counts: np.ndarray, sizes: np.ndarray, streams: int) -> np.ndarray:
    """(groups + 1,) index of the first shard of each group of neighbouring shards, with these tokens, pieces and bytes.

    The line, a circle, is cut into `streams` parts of equally many tokens. A shard on or near a cut is a group of its own, so
    that two streams share little more than that shard. The first cut is in the middle of the first shard: if shards are equal,
    so are the others. The shards between are split evenly, within the bounds of a group.
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


def _visits(starts: np.ndarray, some: range, low: int, high: int, *key: int | str) -> tuple[np.ndarray, np.ndarray]:
    """(some of the intervals of a line in a permuted order, their cumulated sizes as far as they lie in [low, high))."""
    order = some.start + permutation(len(some), *key, low)
    turns = (np.minimum(starts[order + 1] + n, high) - np.maximum(starts[order] + n, low) for n in (0, starts[-1]))
    return order, np.cumsum(sum(np.maximum(sizes, 0) for sizes in turns))


def _find(visits: tuple[np.ndarray, np.ndarray], within: int) -> tuple[int, int]:
    """(interval, index inside it) of an index in intervals laid end to end, of given cumulated sizes."""
    order, ends = visits
    at = int(np.searchsorted(ends, within, side="right"))
    return int(order[at]), within - (int(ends[at - 1]) if at else 0)


class Phase(NamedTuple):
    """From position `first` on, packs of the sources come in the ratio of these integer weights. first: None: after the phase
    before. exact: source i has exactly `weights[i]` packs, and the remaining positions up to the next phase are empty."""

    first: int | None
    weights: tuple[int, ...]
    exact: bool = False


class TrainingOrder:
    """Position -> pack, over all sources.

    Args:
        sources: their orders, all with the same number C of streams.
        phases: at least one, the first from position 0, each at a multiple of the global batch.
        global_batch: a multiple of C.
        end: positions from there on are empty.
    """

    def __init__(
        self, sources: Sequence[SourceOrder], phases: Sequence[Phase], global_batch: int = 1, end: int | None = None
    ) -> None:
        self.phases, self.global_batch, self.end = phases, global_batch, end
        self.streams = sources[0].streams
        self.run = global_batch // self.streams  # positions of a stream in a global batch
        packs = phases[0].weights if phases[0].exact else [source.packs_per_epoch for source in sources]
        self.sources = [source.rotated(sum(packs[:number])) for number, source in enumerate(sources)]
        self.draws = [source.draw for source in sources]
        self._firsts: list[int] = []  # of the phases, in each stream
        self._base: list[list[list[int]]] = []  # phase -> stream -> packs of each source before it
        self._weights: list[list[list[int]]] = []  # phase -> stream -> weights of the sources
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
    def packs_per_epoch(self) -> int:
        """Packs of one epoch of all sources together."""
        return sum(source.packs_per_epoch for source in self.sources)

    @property
    def length(self) -> int | None:
        """Position after the last step that holds a pack; None: endless."""
        return self._end_of_phase() * self.streams if self.end is None and self.phases[-1].exact else self.end

    def first(self, number: int) -> int:
        """Position that a phase begins at."""
        return self._firsts[number] * self.streams

    def _end_of_phase(self) -> int:
        """Index, in every stream, after the last step of the last phase so far, which is exact."""
        return self._firsts[-1] + -(-max(map(sum, self._weights[-1])) // self.run) * self.run

    def _counts(self, number: int, stream: int, index: int) -> list[int]:
        """Packs of each source in a stream before an index, which is in phase `number` or at its end."""
        weights, index = self._weights[number][stream], index - self._firsts[number]
        index = min(index, sum(weights)) if self.phases[number].exact else index
        shares = share_counts(index, weights, stream, self.streams)
        return [a + b for a, b in zip(self._base[number][stream], shares, strict=True)]

    def locate(self, position: int) -> tuple[int, int, int] | None:
        """(source, stream, index of the pack among those of the source in the stream); None where the position is empty."""
        step, within = divmod(position, self.global_batch)
        stream, index = within // self.run, step * self.run + within % self.run
        number = bisect_right(self._firsts, index) - 1
        counts, following = (self._counts(number, stream, i) for i in (index, index + 1))
        if counts == following or (self.end is not None and position >= self.end):
            return None
        source = next(i for i, count in enumerate(counts) if following[i] > count)
        return source, stream, counts[source]

    def pack(self, position: int) -> tuple[Piece, ...]:
        """The pieces of the pack at a position; none where it is empty."""
        located = self.locate(position)
        if located is None:
            return ()
        source, stream, k = located
        return self.sources[source].pack(k, stream, source)

    def sizes(self, first: int, stop: int) -> tuple[np.ndarray, int]:
        """(tokens of each source (S,), targets) of the packs at positions [first, stop), if all documents can be read."""
        tokens, targets = np.zeros(len(self.sources), np.int64), 0
        for located in filter(None, map(self.locate, range(first, stop))):
            source, stream, k = located
            of_pack = self.sources[source].sizes(k, stream)
            tokens[source] += of_pack[0]
            targets += of_pack[1]
        return tokens, targets

    def upcoming_shards(self, source: int, stream: int, position: int) -> Iterator[tuple[float, list[int]]]:
        """(about the position of the first pack that needs them, shards) of the groups of a source, endless.

        `position` is the beginning of a step. Weights that change later are not foreseen.
        """
        index = position // self.streams
        number = bisect_right(self._firsts, index) - 1
        before, weights = self._counts(number, stream, index)[source], self._weights[number][stream]
        if weights[source]:
            stride = self.streams * sum(weights) / weights[source]  # positions per pack
            for first, shards in self.sources[source].upcoming_shards(before, stream):
                yield position + (first - before) * stride, shards


class ValidationOrder:
    """Every document of every source once, in index order, whatever the seed, the world size and the batch."""

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
        """The pack, or an empty one past the end, which fills the last batch and has no weight."""
        return self._packs[position] if position < len(self._packs) else ()


def pack_weights(sources: Sequence[SourceOrder], weights: Sequence[float], unit: int = 1_000_000) -> tuple[int, ...]:
    """Weights of tokens as weights of packs (packs of media may be less full), in millionths of their sum. They are integers so
    that the order does not depend on rounding errors."""
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights of sources must be 0 or more, at least one above 0, not {list(weights)}")
    packs = [weight / source.tokens_per_pack for weight, source in zip(weights, sources, strict=True)]
    return tuple(max(1, round(pack / sum(packs) * unit)) if pack else 0 for pack in packs)
