"""The order of the training data: position -> pieces of documents. Pure functions of (seed, lengths, position), no I/O.

    streams   a global batch of G packs is C equal runs; run c is stream c and reads about 1 / C of the shards of each source
    source    permuted shards, cut into groups within a stream; the pieces of a group are permuted
    windows   about 4,096 pieces of a group, and at least 64 packs, packed by best fit
    packs     in each epoch a stream visits its groups, their windows and the packs of a window in another order
    mixture   (stream, index in it) -> (source, k-th pack of the stream in that source), a closed form of integer weights

A window fills the same number of packs in every epoch, however ties are broken, so one table of pack counts serves all epochs.
Permutations sort by our own hash, so no library changes them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.packing import best_fit_decreasing

ORDER_VERSION = 4  # changes with the order; in checkpoints
WINDOW_PIECES = 4096
WINDOW_PACKS = 64  # at least, as the last pack of a window is half empty on average
VALIDATION_PIECES = 512  # fewer, so that ranks read different shards of small sets too
MAX_STREAMS = 64
STREAM_SHARDS, STREAM_PACKS = 4, 2 * WINDOW_PACKS  # at least, in the source with the most
GROUP_SHARDS, GROUP_BYTES, GROUP_PIECES = 256, 4 << 30, 1 << 18  # limits of the groups that all streams read at once


def hash64(*key: int | str) -> np.uint64:
    """Hash `key` to 64 bits."""
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "<u8")[0]


def mix64(x: np.ndarray) -> np.ndarray:
    """Mix uint64 values with SplitMix64's finalizer, a bijection (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(values: np.ndarray, *key: int | str) -> np.ndarray:
    """Draw a uint64 for each value of an integer array."""
    return mix64(mix64(values.astype(np.uint64)) ^ hash64(*key))


def permutation(n: int, *key: int | str) -> np.ndarray:
    """Return a permutation of `range(n)`, (n,) int64."""
    return np.argsort(draws(np.arange(n), *key), kind="stable")


@lru_cache(1024)
def _offsets(source: int, streams: int) -> list[int]:
    return permutation(streams, source, "streams").tolist() if source else list(range(streams))


def share_counts(k: int, weights: Sequence[int], stream: int = 0, streams: int = 1) -> list[int]:
    """Count the packs of each source among the first `k` of a stream. Nested floors are exact in total and monotone in `k`;
    streams round at different offsets, so that errors cancel (Hermite: the sum over c of floor(x + c / C) is floor(C x))."""
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


# A table of pieces has these columns, (P,). stop: of the longest of several texts; targets: predicted tokens; varies: length or
# targets depend on the epoch (several texts, or free order and not all learned); hides: condition dropout applies (all of
# several segments are learned).
SPAN = ["document", "start", "stop", "whole"]
PIECE = np.dtype(list(zip([*SPAN, "targets", "varies", "hides"], ["i8", "i4", "i4", "?", "i4", "?", "?"], strict=True)))


def piece_table(**columns: np.ndarray) -> np.ndarray:
    """Return the table of pieces with these columns."""
    table = np.empty(len(columns["document"]), PIECE)
    for name, column in columns.items():
        table[name] = column
    return table


def _lengths(pieces: np.ndarray) -> np.ndarray:
    return pieces["stop"] - pieces["start"]


@dataclass(frozen=True, eq=False)
class SourceTokens:
    """Sizes of a source."""

    name: str
    counts: np.ndarray  # (shards,) pieces
    tokens: np.ndarray  # (shards,)
    load: Callable[[int], np.ndarray]  # the table of pieces of a shard
    bytes: np.ndarray | None = None  # (shards,)
    # (document, draw) -> ([(tokens, learned)] of its segments, whether their order is fixed); of n texts the `draw % n`-th
    segments: Callable[[int, int], tuple[Sequence[tuple[int, bool]], bool]] | None = None


def count_streams(sources: Sequence[SourceTokens], context: int, global_batch: int) -> int:
    """Return the largest divisor of the global batch that leaves each stream a few shards and packs of the largest source, and
    limits the bytes read at once."""
    shards = max((int(np.count_nonzero(source.counts)) for source in sources), default=0)
    packs = max((int(source.tokens.sum()) // context for source in sources), default=0)
    active = sum(float(source.bytes.mean()) for source in sources if source.bytes is not None)
    limits = [MAX_STREAMS, shards // STREAM_SHARDS, packs // STREAM_PACKS]
    return _largest_divisor(global_batch, min([*limits, int(8 * GROUP_BYTES / active)] if active else limits))


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, max(limit, 1) + 1) if number % divisor == 0)


class Draw:
    """Random choices about documents: functions of (seed, source, epoch, document). `condition_dropout`: probability that the
    first segments are hidden, of documents that learn all of several segments."""

    def __init__(self, seed: int, source: SourceTokens, condition_dropout: float = 0.0) -> None:
        self.source, self.condition_dropout = source, condition_dropout
        self._key = (seed, source.name)

    def text(self, epoch: int, document: int, about: str = "text") -> int:
        """Draw an integer in [0, 2^32), which selects among the texts of a segment."""
        return int(draws(np.array([document]), *self._key, epoch, about)[0]) >> 32

    def order(self, epoch: int, document: int, segments: int) -> list[int]:
        """Permute segments that have no fixed order."""
        return permutation(segments, *self._key, epoch, document, "segments").tolist()

    def hidden(self, epoch: int, document: int, segments: int) -> int:
        """Draw how many of the first segments are hidden: mostly 0, else 1 to `segments - 1`, uniformly."""
        drawn = self.text(epoch, document, "condition") / 2.0**32
        return 1 + int(drawn / self.condition_dropout * (segments - 1)) if drawn < self.condition_dropout else 0

    def apply(self, pieces: np.ndarray, epoch: int) -> np.ndarray:
        """Set the lengths and targets of a table of pieces in an epoch."""
        drawn = draws(pieces["document"], *self._key, epoch, "condition") >> np.uint64(32)
        rows = np.flatnonzero(pieces["varies"] | (pieces["hides"] & (drawn < self.condition_dropout * 2.0**32)))
        if not len(rows) or self.source.segments is None:
            return pieces
        pieces = pieces.copy()
        for row, (document, start, stop, whole, *_, hides) in zip(rows.tolist(), pieces[rows].tolist(), strict=True):
            sizes, ordered = self.source.segments(document, self.text(epoch, document))
            if whole and not ordered:
                sizes = [sizes[i] for i in self.order(epoch, document, len(sizes))]
            hidden = self.hidden(epoch, document, len(sizes)) if hides else 0
            stop = 2 + sum(tokens for tokens, _ in sizes) if whole else stop
            targets, opener = 0, 1
            for number, (tokens, learned) in enumerate([*sizes, (1, sizes[-1][1])]):  # the last is `<end>`
                if learned and number >= hidden:
                    targets += max(0, min(opener + tokens, stop) - max(opener, start + 1))
                opener += tokens
            pieces["stop"][row], pieces["targets"][row] = stop, targets
        return pieces


class _Window(NamedTuple):
    """The packs of a window in an epoch: spans of the pieces (P,), first piece of each pack, and its tokens and targets."""

    spans: np.ndarray
    first: list[int]
    tokens: list[int]
    targets: list[int]


class SourceOrder:
    """Order of a source: in each epoch, each of its E packs is visited by exactly one stream.

    window_packs: (windows,) packs of each window; None: count them with `for_each`, a `map`, which loads all pieces once."""

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
        self._parts = _largest_divisor(streams, int(source.tokens.sum()) // context // STREAM_PACKS)
        self._first_shard = self._group_shards()
        self.groups = len(self._first_shard) - 1
        counts, tokens = (np.add.reduceat(n[self._shards], self._first_shard[:-1]) for n in (source.counts, source.tokens))
        windows = np.clip(tokens // (WINDOW_PACKS * context), 1, -(-counts // WINDOW_PIECES))  # of each group
        self._group_pieces, self._first_window = counts, [0, *np.cumsum(windows).tolist()]
        if window_packs is None:
            window_packs = np.concatenate(list(for_each(self.count_packs, range(self.groups))))
        self.window_packs = window_packs
        self.packs_per_epoch = int(window_packs.sum())
        self._starts = np.cumsum([0, *window_packs, *window_packs])  # of windows, twice around the circle of packs
        self.tokens_per_pack = float(source.tokens.sum()) / self.packs_per_epoch  # mean
        # A circle: the first stream begins in the middle of the first group, see `_group_shards`.
        self._shift = int(self._starts[self._first_window[1]]) // 2 if self._parts > 1 else 0

    def _make_caches(self) -> None:
        """Cache a window, a group and two visiting orders per stream in each instance, and a few more for transitions."""
        entries = self.streams + self.streams // 4 + 2
        self._group = lru_cache(self.streams)(self._make_group)
        self._window = lru_cache(entries)(self._pack_window)
        self._visits = lru_cache(2 * entries)(self._make_visits)
        self._last: dict[int, Any] = {}  # stream -> the window that was asked for last

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_group", "_window", "_visits", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def _group_shards(self) -> np.ndarray:
        """Return the first shard of each group of neighbouring shards, and their number (groups + 1,).

        The circle of shards is cut into parts of equal tokens, one or, in a small source, a fraction of one for each stream,
        first within the first shard. Shards near a cut are groups alone, so streams overlap little; others are split evenly."""
        shards, full = self._shards, WINDOW_PACKS * self.context
        tokens, counts = self.source.tokens[shards], self.source.counts[shards]
        sizes = np.zeros_like(counts) if self.source.bytes is None else self.source.bytes[shards]
        ends = np.cumsum(tokens)
        starts = ends - tokens
        cuts = tokens[0] // 2 + ends[-1] * np.arange(self._parts) // self._parts if self._parts > 1 else ends[:0]
        part = np.searchsorted(cuts, starts, side="right")
        margin = ends[-1] // (8 * len(ends))  # packs are not exactly as many as the tokens promise
        alone = np.searchsorted(cuts, ends + margin, side="left") > np.searchsorted(cuts, starts - margin, side="right")
        begins = (np.diff(part, prepend=0) > 0) | alone | np.concatenate([[False], alone[:-1]])
        stretch = np.cumsum(begins) - begins[0]
        bounds = ((counts, GROUP_PIECES), (sizes, GROUP_BYTES), (np.ones_like(counts), GROUP_SHARDS))
        groups = np.ceil(np.max([np.bincount(stretch, amount) * self.streams / bound for amount, bound in bounds], axis=0))
        of_stretch = np.bincount(stretch, tokens).astype(np.int64)
        most = np.minimum(np.bincount(stretch, counts) // WINDOW_PIECES, of_stretch // full)
        groups = np.clip(groups, 1, np.maximum(most, 1)).astype(np.int64)
        offset = starts - (np.cumsum(of_stretch) - of_stretch)[stretch]
        firsts = 1 + np.flatnonzero(np.diff(stretch) | np.diff(offset * groups[stretch] // of_stretch[stretch]))
        return np.array([0, *firsts.tolist(), len(counts)])

    def shards_of_group(self, group: int) -> list[int]:
        return self._shards[self._first_shard[group] : self._first_shard[group + 1]].tolist()

    def count_packs(self, group: int) -> np.ndarray:
        """Count the packs of each window of a group."""
        windows = range(self._first_window[group], self._first_window[group + 1])
        return np.array([len(best_fit_decreasing(_lengths(self._pieces(window)), self.context)) for window in windows])

    def packs_before(self, total: int, stream: int) -> int:
        """Count the packs that a stream has visited when all streams together have visited `total`."""
        return max(0, -(-(total - (stream - self.offset) % self.streams) // self.streams))

    def find(self, k: int, stream: int) -> tuple[int, int]:
        """Return (epoch, index within it) of the k-th pack of a stream."""
        epoch = ((stream - self.offset) % self.streams + k * self.streams) // self.packs_per_epoch
        return epoch, k - self.packs_before(epoch * self.packs_per_epoch, stream)

    def pack(self, k: int, stream: int = 0, source: int = 0) -> tuple[Piece, ...]:
        """Return the pieces of the k-th pack of a stream."""
        epoch, window, n = self._locate(k, stream)
        return _pieces(window.spans[window.first[n] : window.first[n + 1]], source, epoch)

    def sizes(self, k: int, stream: int = 0) -> tuple[int, int]:
        """Count (tokens, targets) of the k-th pack of a stream."""
        _, window, n = self._locate(k, stream)
        return window.tokens[n], window.targets[n]

    def upcoming_shards(self, k: int, stream: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Yield (index of the first pack, shards) of each group from the k-th pack of a stream on, endlessly."""
        epoch, within = self.find(k, stream)
        while True:
            first, (windows, _, ends) = k - within, self._visits(epoch, stream)
            visits = zip(map(self._group_of, windows), [0, *ends], ends, strict=False)
            for group, of_group in groupby(visits, key=itemgetter(0)):
                (_, start, end), *more = of_group
                if (more[-1][2] if more else end) > within:
                    yield first + start, self.shards_of_group(group)
            k, epoch, within = first + (ends[-1] if ends else 0), epoch + 1, 0

    def _group_of(self, window: int) -> int:
        return bisect_right(self._first_window, window) - 1

    def _locate(self, k: int, stream: int) -> tuple[int, _Window, int]:
        """Return (epoch, packs of a window, index of the pack) for the k-th pack of a stream."""
        first, stop, epoch, window, shift = self._last.get(stream, (0, 0, 0, None, 0))
        if not first <= k < stop:
            epoch, within = self.find(k, stream)
            windows, firsts, ends = self._visits(epoch, stream)
            at = bisect_right(ends, within)
            first, stop = (k - within + end for end in (ends[at - 1] if at else 0, ends[at]))
            window, shift = self._window(epoch, windows[at]), firsts[at] - first
            self._last[stream] = first, stop, epoch, window, shift
        return epoch, window, k + shift

    def _make_visits(self, epoch: int, stream: int) -> tuple[list[int], list[int], list[int]]:
        """Order the windows in a stream's part of an epoch: (window, the stream's first pack in it, cumulated packs)."""
        size, starts, count = self.packs_per_epoch, self._starts, len(self.window_packs)
        first = self.offset + epoch * size  # in the line of all epochs, whose n-th pack belongs to stream n modulo C
        low, high = (
            self._shift
            + sum(sign * (n // self.streams * c + min(n % self.streams, c)) for n, sign in ((first + size, 1), (first, -1)))
            for c in (stream, stream + 1)
        )
        some = np.arange(np.searchsorted(starts, low, side="right") - 1, np.searchsorted(starts, high))
        window = some % count
        group = np.searchsorted(self._first_window, window, side="right")
        keys = (draws(one, *self._key, epoch, name, low) for one, name in ((window, "windows"), (group, "groups")))
        some = some[np.lexsort((some, *keys))]
        begins = np.maximum(starts[some], low)
        ends = np.cumsum(np.minimum(starts[some + 1], high) - begins)
        return (some % count).tolist(), (begins - starts[some]).tolist(), ends.tolist()

    def _make_group(self, group: int) -> np.ndarray:
        pieces = np.concatenate([self.source.load(shard) for shard in self.shards_of_group(group)])
        return pieces[permutation(len(pieces), *self._key, group, "documents")]

    def _pieces(self, window: int) -> np.ndarray:
        """Return the pieces of a window; the windows of a group differ by at most one piece."""
        group = self._group_of(window)
        first, stop = self._first_window[group : group + 2]
        low, high = (int(self._group_pieces[group]) * (n - first) // (stop - first) for n in (window, window + 1))
        return self._group(group)[low:high]

    def _pack_window(self, epoch: int, window: int) -> _Window:
        pieces = self._pieces(window)
        pieces = pieces[permutation(len(pieces), *self._key, epoch, window, "ties")]
        packs = best_fit_decreasing(_lengths(pieces), self.context)
        # Best fit puts long documents first: shuffle, or the lengths would drift.
        packs = [packs[i] for i in permutation(len(packs), *self._key, epoch, window, "packs")]
        first = np.cumsum([0, *map(len, packs)])
        pieces = self.draw.apply(pieces[np.concatenate(packs)], epoch)
        tokens, targets = (np.add.reduceat(n, first[:-1], dtype=np.int64) for n in (_lengths(pieces), pieces["targets"]))
        return _Window(pieces[SPAN], first.tolist(), tokens.tolist(), targets.tolist())


def _pieces(spans: np.ndarray, source: int, epoch: int) -> tuple[Piece, ...]:
    return tuple([Piece(source, epoch, *row) for row in spans.tolist()])


class Phase(NamedTuple):
    """Weights of packs from position `first` on (None: after the previous phase); exact: `weights` packs, then none."""

    first: int | None
    weights: tuple[int, ...]
    exact: bool = False


class TrainingOrder:
    """Position -> pack, over all sources, with the same C streams. Phases begin at multiples of the global batch, itself a
    multiple of C, the first at 0. Positions from `end` on are empty."""

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

    def _counts(self, number: int, stream: int, index: int) -> list[int]:
        """Count the packs of each source in a stream before an index in phase `number`."""
        weights, index = self._weights[number][stream], index - self._firsts[number]
        index = min(index, sum(weights)) if self.phases[number].exact else index
        shares = share_counts(index, weights, stream, self.streams)
        return [a + b for a, b in zip(self._base[number][stream], shares, strict=True)]

    @lru_cache(8)  # noqa: B019 (lives as long as the run)
    def _step(self, step: int) -> list[tuple[int, int, int] | None]:
        """Locate all positions of a step."""
        found: list[tuple[int, int, int] | None] = []
        index = step * self.run
        number = bisect_right(self._firsts, index) - 1
        for stream in range(self.streams):
            counts = self._counts(number, stream, index)
            for following in (self._counts(number, stream, index + n + 1) for n in range(self.run)):
                source = next((i for i, count in enumerate(counts) if following[i] > count), None)
                found.append(None if source is None else (source, stream, counts[source]))
                counts = following
        last = self.global_batch if self.end is None else max(0, self.end - step * self.global_batch)
        return found[:last] + [None] * (len(found) - last)

    def locate(self, position: int) -> tuple[int, int, int] | None:
        """Return (source, stream, index among the packs of the source in the stream), or None for an empty position."""
        step, within = divmod(position, self.global_batch)
        return self._step(step)[within]

    def pack(self, position: int) -> tuple[Piece, ...]:
        """Return the pieces of the pack at a position."""
        source, stream, k = self.locate(position) or (None, 0, 0)
        return () if source is None else self.sources[source].pack(k, stream, source)

    def sizes(self, first: int, stop: int) -> tuple[np.ndarray, int]:
        """Count (tokens of each source (S,), targets) planned for the positions [first, stop)."""
        tokens, targets = [0] * len(self.sources), 0
        for source, stream, k in filter(None, map(self.locate, range(first, stop))):
            more = self.sources[source].sizes(k, stream)
            tokens[source] += more[0]
            targets += more[1]
        return np.array(tokens), targets

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
            pieces = np.concatenate([source.load(shard) for shard in range(len(source.counts))])
            for start in range(0, len(pieces), VALIDATION_PIECES):
                window = self.draws[number].apply(pieces[start : start + VALIDATION_PIECES], 0)
                packs = best_fit_decreasing(_lengths(window), context)
                self._packs += [_pieces(window[SPAN][pack], number, 0) for pack in packs]

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
