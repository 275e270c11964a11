"""The promises of `data/order.py`: the order of the data is a pure function of (seed, lengths, position)."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data import order
from pile_app.data.datamodule import StepBatches
from pile_app.data.order import (
    ORDER_VERSION,
    Phase,
    SourceOrder,
    SourceTokens,
    TrainingOrder,
    ValidationOrder,
    count_streams,
    hash64,
    pack_weights,
    permutation,
    piece_table,
    share_counts,
)

CONTEXT = 256


class Shelf:
    """What loads the pieces of a shard: whole documents, of given lengths. `loaded`: the shards that were asked for."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, counts: np.ndarray) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        self.loaded: list[int] = []

    def __call__(self, shard: int) -> np.ndarray:
        self.loaded.append(shard)
        numbers = np.arange(self.first[shard], self.first[shard + 1])
        return pieces_of(numbers, self.lengths[numbers])


def pieces_of(numbers: np.ndarray, lengths: np.ndarray, varies: bool = False) -> np.ndarray:
    """A table of whole documents; with `varies`, their texts are drawn and their first segments may be hidden."""
    drawn = {"varies": np.full(len(numbers), varies), "hides": np.full(len(numbers), varies)}
    whole = np.ones(len(numbers), bool)
    return piece_table(document=numbers, start=0 * lengths, stop=lengths, targets=lengths - 1, whole=whole, **drawn)


def source(name: str, lengths: Sequence[int] | np.ndarray, shards: int | Sequence[int] = 5) -> SourceTokens:
    """A source of whole documents, spread evenly over its shards, or so many in each."""
    even = (
        np.bincount(np.arange(len(lengths)) * shards // len(lengths), minlength=shards) if isinstance(shards, int) else shards
    )
    starts = np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], np.cumsum(even)])]
    return SourceTokens(name, np.asarray(even), np.diff(starts), Shelf(lengths, np.asarray(even)))


def ordered(
    name: str, lengths: Sequence[int] | np.ndarray, shards: int | Sequence[int] = 5, seed: int = 0, streams: int = 1
) -> SourceOrder:
    return SourceOrder(source(name, lengths, shards), CONTEXT, seed, streams)


def mixture(orders: list[SourceOrder], weights: Sequence[float] | None = None, global_batch: int = 1) -> TrainingOrder:
    """One phase; without weights each source weighs its packs."""
    packs = tuple(one.packs_per_epoch for one in orders)
    return TrainingOrder(orders, [Phase(0, pack_weights(orders, weights) if weights else packs)], global_batch)


def synthetic_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Integers only, so that they are the same on every machine."""
    return 3 + permutation(count, seed, "lengths") * 7919 % (CONTEXT - 2)


def packs_of_epoch(plan: SourceOrder, epoch: int) -> list[list[int]]:
    """The documents of its packs."""
    size = plan.packs_per_epoch
    return [[piece.document for piece in plan.pack(k)] for k in range(epoch * size, (epoch + 1) * size)]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred documents take many windows and groups of shards."""
    monkeypatch.setattr(order, "WINDOW_PIECES", 32)
    monkeypatch.setattr(order, "WINDOW_PACKS", 2)
    monkeypatch.setattr(order, "STREAM_PACKS", 4)
    monkeypatch.setattr(order, "GROUP_SHARDS", 4)
    monkeypatch.setattr(order, "GROUP_PIECES", 120)


@given(st.integers(0, 3000), st.integers(), st.text())
def test_a_permutation_holds_every_number_once_and_hangs_on_its_key_only(n: int, seed: int, name: str) -> None:
    permuted = permutation(n, seed, name)
    assert np.array_equal(np.sort(permuted), np.arange(n))
    assert np.array_equal(permuted, permutation(n, seed, name))
    if n > 50:
        assert not np.array_equal(permuted, permutation(n, seed, name, 0))
        assert not np.array_equal(permuted, permutation(n, seed + 1, name))


def test_every_place_of_a_permutation_is_equally_likely() -> None:
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), permutation(8, seed, "uniform")] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 100  # chi-squared with 49 degrees of freedom: 5 sigma


GOLDEN_HASH64 = 9026062096370171638
GOLDEN_PERMUTATION = [7, 8, 5, 1, 6, 9, 0, 2, 3, 4]
GOLDEN_WEIGHTS = (595_862, 302_468, 101_670)
GOLDEN_PLAN = "e6102f3c2e8136ee7307177ebf801d2e"
CHANGED = (
    "the order of the training data has changed: runs that resume would repeat and miss documents. Where that is meant, "
    "increase ORDER_VERSION and put the new values here"
)


def test_the_order_changes_only_with_its_version() -> None:
    assert ORDER_VERSION == 4, "put the golden values of the new ORDER_VERSION here"
    assert int(hash64(0, "a")) == GOLDEN_HASH64, CHANGED
    assert permutation(10, 0, "golden").tolist() == GOLDEN_PERMUTATION, CHANGED
    assert share_counts(1000, [500_000, 300_000, 200_000]) == [500, 300, 200], CHANGED
    orders = [
        ordered("text", synthetic_lengths(9000, 1), 20, 7, streams=4),
        ordered("images", np.full(700, 83), 3, 7, streams=4),
        ordered("speech", synthetic_lengths(1500, 2), 9, 7, streams=4),
    ]
    weights = pack_weights(orders, [0.6, 0.3, 0.1])
    assert weights == GOLDEN_WEIGHTS, CHANGED
    plan = TrainingOrder(orders, [Phase(0, weights), Phase(1000, (2, 0, 1)), Phase(1600, weights)], 8)
    positions = [[tuple(piece) for piece in plan.pack(position)] for position in range(2000)]
    assert hashlib.blake2b(repr(positions).encode(), digest_size=16).hexdigest() == GOLDEN_PLAN, CHANGED


@given(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=6), st.integers(0, 10**12), st.sampled_from([1, 3, 8]))
def test_shares_are_exact_monotone_and_within_bounds(weights: list[int], k: int, streams: int) -> None:
    for stream in range(streams):
        counts, following = (np.array(share_counts(i, weights, stream, streams)) for i in (k, k + 1))
        assert counts.sum() == k and (counts >= 0).all()
        assert sorted(following - counts) == [0] * (len(weights) - 1) + [1]
        exact = [k * weight / sum(weights) for weight in weights]
        assert np.abs(counts - exact).max() <= len(weights)
        assert share_counts(7 * sum(weights), weights, stream, streams) == [7 * weight for weight in weights]


@pytest.mark.parametrize("streams", [1, 4, 16, 64])
def test_rounding_errors_of_streams_cancel(streams: int) -> None:
    weights = np.array([350_000, 250_000, 200_000, 150_000, 50_000])
    for index in range(1, 300):
        counts = np.sum([share_counts(index, weights.tolist(), c, streams) for c in range(streams)], axis=0)
        assert np.abs(counts - index * streams * weights / 1e6).max() <= 6, "packs, of all streams together"


def test_weights_are_shares_of_tokens_in_any_unit() -> None:
    full = [ordered(name, [CONTEXT] * 20) for name in "abc"]
    assert pack_weights(full, [6, 3, 1]) == pack_weights(full, [0.6, 0.3, 0.1]) == (600_000, 300_000, 100_000)
    half = [full[0], ordered("half", [CONTEXT // 2 + 1] * 20)]  # one document a pack
    packs = pack_weights(half, [1, 1])
    assert packs[1] / packs[0] == pytest.approx(CONTEXT / (CONTEXT // 2 + 1), rel=1e-4)
    assert pack_weights(full, [1, 0, 1e-9]) == (1_000_000, 0, 1), "what weighs nothing comes never, what weighs little does"
    for weights in ([1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="0 or more, at least one above 0"):
            pack_weights(full, weights)


shelves = st.lists(st.lists(st.integers(1, 64), max_size=70), min_size=1, max_size=12).filter(any)


@pytest.mark.usefixtures("small_windows")
@settings(max_examples=60, deadline=None)
@given(shelves, st.integers(0, 2**40))
def test_every_document_comes_exactly_once_an_epoch(shards: list[list[int]], seed: int) -> None:
    lengths = [length for shard in shards for length in shard]
    plan = SourceOrder(source("s", lengths, list(map(len, shards))), 64, seed)
    for epoch in range(3):
        packs = [plan.pack(epoch * plan.packs_per_epoch + k) for k in range(plan.packs_per_epoch)]
        assert {piece.epoch for pack in packs for piece in pack} == {epoch}
        assert sorted(piece.document for pack in packs for piece in pack) == list(range(len(lengths)))
        assert all(sum(piece.stop - piece.start for piece in pack) <= 64 for pack in packs)
        assert all(lengths[piece.document] == piece.stop for pack in packs for piece in pack)


@pytest.mark.usefixtures("small_windows")
def test_a_window_fills_as_many_packs_in_every_epoch() -> None:
    lengths = synthetic_lengths(300)
    plan = ordered("s", lengths, seed=3)
    assert len(plan.window_packs) >= 10 and plan.groups >= 2
    for epoch in range(20):
        packs = packs_of_epoch(plan, epoch)
        assert sorted(n for pack in packs for n in pack) == list(range(300))
        assert all(lengths[pack].sum() <= CONTEXT for pack in packs)


@pytest.mark.usefixtures("small_windows")
def test_epochs_seeds_and_sources_differ_in_order() -> None:
    def epoch(name: str, seed: int, number: int) -> list[list[int]]:
        return packs_of_epoch(ordered(name, synthetic_lengths(300), seed=seed), number)

    orders = [epoch("a", 0, 0), epoch("a", 0, 1), epoch("a", 1, 0), epoch("b", 0, 0)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert epoch("a", 0, 1) == orders[1]


def test_documents_of_one_length_meet_others_in_another_epoch() -> None:
    plan = ordered("s", np.full(300, 60))
    epochs = [set(map(frozenset, packs_of_epoch(plan, epoch))) for epoch in range(2)]
    assert len(epochs[0]) == 75 and len(epochs[0] & epochs[1]) < 5


def shard_of(tokens: SourceTokens, documents: np.ndarray) -> set[int]:
    assert isinstance(tokens.load, Shelf)
    return set((np.searchsorted(tokens.load.first, documents, side="right") - 1).tolist())


@pytest.mark.usefixtures("small_windows")
@settings(max_examples=40, deadline=None)
@given(shelves, st.integers(0, 10**6), st.integers(0, 3000), st.sampled_from([(1, 0), (3, 1), (4, 3)]))
def test_upcoming_shards_are_those_that_the_packs_touch_in_order(
    shards: list[list[int]], seed: int, k: int, stream: tuple[int, int]
) -> None:
    lengths = [length for shard in shards for length in shard]
    plan = SourceOrder(source("s", lengths, list(map(len, shards))), 64, seed, stream[0])
    announced = list(islice(plan.upcoming_shards(k, stream[1]), 2 * plan.groups + 2))
    firsts = [first for first, _ in announced]
    assert firsts[0] <= k < firsts[1] and all(a < b for a, b in pairwise(firsts))
    for (first, allowed), (stop, _) in pairwise(announced):
        for one in range(max(first, k), stop):
            touched = shard_of(plan.source, np.array([piece.document for piece in plan.pack(one, stream[1])]))
            assert touched <= set(allowed)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_shards_are_grouped_by_pieces_bytes_and_number(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    def largest_group(tokens: SourceTokens) -> int:
        plan = SourceOrder(tokens, CONTEXT, 0, streams)
        groups = [plan.shards_of_group(group) for group in range(plan.groups)]
        assert sorted(shard for group in groups for shard in group) == list(range(len(tokens.counts)))
        return max(map(len, groups))

    tokens = source("s", [9] * 6400, [64] * 100)
    monkeypatch.setattr(order, "GROUP_PIECES", 64 * 40)
    monkeypatch.setattr(order, "GROUP_SHARDS", 100)
    assert 40 // streams <= largest_group(tokens) + 8 <= 40 // streams + 8
    small = replace(tokens, bytes=np.full(100, 1 << 20))
    monkeypatch.setattr(order, "GROUP_BYTES", 8 << 20)
    assert largest_group(small) <= 8 // streams
    monkeypatch.setattr(order, "GROUP_BYTES", 8 << 30)
    assert largest_group(small) == largest_group(tokens)
    monkeypatch.setattr(order, "GROUP_SHARDS", 4)
    assert largest_group(tokens) <= 4 // streams


def test_shuffling_reaches_more_than_eight_small_shards() -> None:
    tokens = replace(source("s", [64] * 20_000, 200), bytes=np.full(200, 1 << 20))
    plan = SourceOrder(tokens, CONTEXT, 0)
    first = [piece.document for k in range(250) for piece in plan.pack(k)]
    assert len(shard_of(tokens, np.array(first))) > 50


@pytest.mark.usefixtures("small_windows")
def test_only_the_shards_of_the_group_of_the_asked_pack_are_loaded() -> None:
    tokens = source("s", synthetic_lengths(2000), shards=80)
    shelf = tokens.load
    assert isinstance(shelf, Shelf)
    counted = SourceOrder(tokens, CONTEXT, 0)
    assert sorted(shelf.loaded) == list(range(80)), "to count, each shard is loaded once"
    shelf.loaded.clear()
    plan = SourceOrder(tokens, CONTEXT, 0, 1, counted.window_packs)
    assert plan.packs_per_epoch == counted.packs_per_epoch and not shelf.loaded
    k = plan.packs_per_epoch * 7 + 123
    first, shards = next(plan.upcoming_shards(k))
    following = next(islice(plan.upcoming_shards(k), 1, None))[0]
    assert not shelf.loaded
    for one in range(first, following):
        plan.pack(one)
    assert sorted(shelf.loaded) == sorted(shards), "a group is loaded once, while its packs are visited in order"


@pytest.mark.usefixtures("small_windows")
def test_groups_counted_at_the_same_time_give_the_same_order() -> None:
    tokens = source("s", synthetic_lengths(1500), shards=30)
    alone = SourceOrder(tokens, CONTEXT, 5)
    with ThreadPoolExecutor(2) as pool:  # a fork would copy the locks of other tests' threads
        together = SourceOrder(tokens, CONTEXT, 5, for_each=pool.map)
    assert np.array_equal(alone.window_packs, together.window_packs)
    assert packs_of_epoch(alone, 1) == packs_of_epoch(together, 1)


@pytest.mark.usefixtures("small_windows")
def test_a_pickled_order_gives_the_same_packs() -> None:
    plan = mixture([ordered("a", synthetic_lengths(300)), ordered("b", [9] * 999)], [2, 1])
    before = [plan.pack(position) for position in range(300)]
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.pack(position) for position in range(300)] == before


class Endless:
    """Loads `size` pieces of any shard, from its number alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, shard: int) -> np.ndarray:
        lengths = (3 + permutation(self.size, shard, "lengths") % (CONTEXT - 3)).astype(np.int32)
        return pieces_of(np.arange(self.size) + shard * self.size, lengths)


def test_a_million_documents_take_no_memory() -> None:
    tokens = SourceTokens("s", np.full(1000, 1000), np.full(1000, 128_000), Endless(1000))
    window_packs = SourceOrder(tokens, CONTEXT, 0).window_packs  # loads every shard, one group after another
    tracemalloc.start()
    try:
        plan = TrainingOrder([SourceOrder(tokens, CONTEXT, 0, 1, window_packs)], [Phase(0, (1,))])
        for position in np.random.default_rng(0).integers(0, 10 * plan.packs_per_epoch, 30).tolist():
            assert plan.pack(position)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(window_packs) <= 1000 and len(pickle.dumps(plan)) < 50_000
    assert now < 8e6 and peak < 24e6, (now, peak)  # a group and its windows; one column of all documents would take 8e6


def test_lengths_do_not_drift_within_an_epoch() -> None:
    lengths = np.repeat([10, 60, 250], [1200, 600, 300])
    plan = ordered("s", lengths)
    long = np.array([lengths[documents].max() == 250 for documents in packs_of_epoch(plan, 0)])
    quarters = [part.mean() for part in np.array_split(long, 4)]
    assert max(quarters) - min(quarters) < 0.2


# Streams


@pytest.mark.usefixtures("small_windows")
@settings(max_examples=30, deadline=None)
@given(st.lists(shelves, min_size=1, max_size=3), st.integers(0, 99), st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(1, 3))
def test_every_document_comes_once_an_epoch_over_all_streams(
    sources: list[list[list[int]]], seed: int, streams: int, run: int
) -> None:
    lengths = [[length for shard in shards for length in shard] for shards in sources]
    orders = [SourceOrder(source(f"s{n}", one, list(map(len, sources[n]))), 64, seed, streams) for n, one in enumerate(lengths)]
    sizes = tuple(one.packs_per_epoch for one in orders)
    plan = TrainingOrder(orders, [Phase(None if epoch else 0, sizes, exact=True) for epoch in range(3)], streams * run)
    borders = [plan.first(0), plan.first(1), plan.first(2), plan.length]
    for epoch, (first, stop) in enumerate(pairwise(borders)):
        packs = [plan.pack(position) for position in range(first, stop)]
        counts = Counter((piece.source, piece.document) for pack in packs for piece in pack)
        assert len(counts) == sum(map(len, lengths)) and set(counts.values()) == {1}
        assert {piece.epoch for pack in packs for piece in pack} == {epoch}
        steps = -(-sum(sizes) // plan.global_batch)
        assert (
            stop - first == steps * plan.global_batch
            if not epoch
            else (stop - first) // plan.global_batch <= steps + 1 + (len(sizes) // run)
        )
    endless = TrainingOrder(orders, [Phase(0, sizes)], streams * run)
    counts = Counter(piece for position in range(2 * sum(sizes)) for piece in endless.pack(position))
    assert set(counts.values()) == {1}, "nothing is repeated within an epoch"


@pytest.mark.parametrize(("shards", "nodes"), [(30, 2), (64, 4), (100, 4), (200, 8)])
def test_nodes_read_different_shards(shards: int, nodes: int) -> None:
    rng = np.random.default_rng(shards)
    counts = rng.integers(60, 140, shards)
    tokens = source("s", rng.integers(3, 200, counts.sum()), counts.tolist())
    streams = count_streams([tokens], CONTEXT, 64)
    plan = mixture([SourceOrder(tokens, CONTEXT, 0, streams)], global_batch=64)
    assert streams % nodes == 0
    touched: list[set[int]] = [set() for _ in range(nodes)]
    for position in range(plan.packs_per_epoch // 64 * 64):
        documents = np.array([piece.document for piece in plan.pack(position)])
        touched[position % 64 // (64 // nodes)] |= shard_of(tokens, documents)
    assert set.union(*touched) == set(range(shards))
    tokens_read = [tokens.tokens[sorted(some)].sum() / tokens.tokens.sum() for some in touched]
    assert max(tokens_read) <= 1 / nodes + 2 / shards and max(tokens_read) <= 1.15 / nodes, tokens_read


@pytest.mark.parametrize("streams", [1, 2, 16])
@pytest.mark.parametrize(
    ("documents", "shortest", "longest"), [(2000, 27, 200), (3000, 17, 254), (6000, 100, 3000), (40000, 5, 20)]
)
def test_packs_are_nearly_as_full_as_the_lengths_allow(streams: int, documents: int, shortest: int, longest: int) -> None:
    lengths = np.random.default_rng(0).integers(shortest, longest, documents)
    tokens, context = source("s", lengths, 30), 4096
    plan = SourceOrder(tokens, context, 0, streams)
    best = len(order.best_fit_decreasing(lengths, context))  # of the whole source
    assert plan.packs_per_epoch <= best / 0.985 and plan.tokens_per_pack >= 0.98 * min(
        context, lengths.sum() / best + 0.01 * context
    )


def test_few_or_large_shards_make_few_streams() -> None:
    def streams(shards: int, global_batch: int, gigabytes: float = 0.1, tokens_of_context: int = 1) -> int:
        tokens = replace(source("s", [CONTEXT] * 32 * shards, shards), bytes=np.full(shards, int(gigabytes * 1e9)))
        return count_streams([tokens, replace(tokens, counts=tokens.counts[:1])], CONTEXT * tokens_of_context, global_batch)

    assert [streams(n, 64) for n in (1, 7, 8, 16, 40, 1000)] == [1, 1, 2, 4, 8, 64]
    assert [streams(1000, n) for n in (1, 6, 16, 7, 97, 96, 1024)] == [1, 6, 16, 7, 1, 48, 64]
    assert streams(1000, 64, tokens_of_context=25) == 8, "or their windows would hold few packs"
    assert streams(1000, 64, gigabytes=1.0) == 16, "or the cache of one node would not hold those that are read"


# Mixture


def test_the_mixture_keeps_its_weights_at_every_position() -> None:
    orders = [ordered(name, [CONTEXT] * 40) for name in "abc"]
    weights = np.array([0.7, 0.2, 0.1])
    plan = mixture(orders, weights.tolist())
    drawn = np.array([plan.locate(position)[0] for position in range(3000)])
    seen = np.cumsum(drawn[:, None] == np.arange(3), axis=0)
    assert np.abs(seen - np.arange(1, len(drawn) + 1)[:, None] * weights).max() < 3


@st.composite
def phase_lists(draw: Callable[..., list[Phase]]) -> list[Phase]:
    sources = draw(st.integers(1, 5))
    weights = st.lists(st.integers(0, 1000), min_size=sources, max_size=sources).filter(any)
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    firsts = np.cumsum([0, *lengths[:-1]]) * 8
    return [Phase(first, tuple(draw(weights))) for first in firsts.tolist()]


@settings(max_examples=60, deadline=None)
@given(phase_lists(), st.sampled_from([1, 2, 8]))
def test_no_pack_is_lost_or_repeated_at_any_border_of_phases(phases: list[Phase], streams: int) -> None:
    sources = [ordered("tiny", [200] * 7, 1, streams=streams)] * len(phases[0].weights)
    plan = TrainingOrder(sources, phases, 8)
    end = plan.first(len(phases) - 1) + 320
    located = [plan.locate(position) for position in range(end)]
    seen: Counter[tuple[int, int]] = Counter()
    for one in located:
        assert one is not None and one[2] == seen[one[:2]], "a pack is repeated or missing"
        seen[one[:2]] += 1
    for number, phase in enumerate(phases):
        stop = end if number == len(phases) - 1 else plan.first(number + 1)
        first = plan.first(number)
        drawn = np.bincount([one[0] for one in located[first:stop] if one], minlength=len(sources))
        assert not drawn[np.array(phase.weights) == 0].any()
        share = np.array(phase.weights) / sum(phase.weights)
        assert np.abs(drawn - (stop - first) * share).max() <= streams + len(sources)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any))
def test_a_phase_to_come_changes_nothing_before_it_wherever_it_begins(first: int, weights: tuple[int, int]) -> None:
    tiny = [ordered("tiny", [200] * 3, 1, streams=4)] * 2
    plan = TrainingOrder(tiny, [Phase(0, (2, 1))], 8)
    longer = TrainingOrder(tiny, [Phase(0, (2, 1)), Phase(8 * first, weights)], 8)
    assert [plan.locate(position) for position in range(8 * first)] == [
        longer.locate(position) for position in range(8 * first)
    ]


@pytest.mark.parametrize("streams", [1, 4])
def test_without_weights_all_sources_end_an_epoch_together(streams: int) -> None:
    orders = [ordered(f"{n}", synthetic_lengths(size, n), 20, streams=streams) for n, size in enumerate((2000, 500))]
    endless = mixture(orders, global_batch=8)

    def seen(plan: TrainingOrder, stop: int) -> Counter[tuple[int, int]]:
        pieces = (piece for position in range(stop) for piece in plan.pack(position))
        return Counter((piece.source, piece.document) for piece in pieces if piece.epoch == 0)

    counts = seen(endless, endless.packs_per_epoch)
    assert len(counts) > 0.97 * 2500 and max(counts.values()) == 1
    in_epochs = TrainingOrder(orders, [Phase(0, endless.phases[0].weights, exact=True)], 8)
    counts = seen(in_epochs, in_epochs.length)
    assert len(counts) == 2500 and max(counts.values()) == 1, "where a phase ends with the epoch, it is complete"
    assert in_epochs.length - in_epochs.packs_per_epoch < 8
    assert in_epochs.pack(in_epochs.length) == in_epochs.pack(10**12) == ()


@pytest.mark.parametrize(("context", "streams"), [(256, 1), (512, 1), (512, 8)])
def test_tokens_of_sources_with_different_fills_have_the_given_shares(context: int, streams: int) -> None:
    rng = np.random.default_rng(0)
    lengths = {
        "text": rng.lognormal(4.5, 1.0, 6000).astype(int).clip(3, context),
        "images": np.full(5000, 83),  # 3 or 6 a pack
        "long": rng.integers(context // 2 + 1, context + 1, 3000),  # one a pack
        "lines": rng.integers(3, 30, 9000),
        "speech": np.full(3000, context * 5 // 8),
    }
    orders = [SourceOrder(source(name, one, 7), context, 0, streams) for name, one in lengths.items()]
    fills = [one.tokens_per_pack / context for one in orders]
    assert min(fills) < 0.8 and max(fills) > 0.98
    weights = [0.35, 0.25, 0.2, 0.15, 0.05]
    plan = mixture(orders, weights, 16)
    tokens, targets = plan.sizes(0, round(1e6 / context / np.mean(fills)))
    assert 0.9e6 < tokens.sum() < 1.15e6 and targets < tokens.sum()
    assert np.abs(tokens / tokens.sum() - weights).max() < 0.002


def test_a_pack_does_not_hang_on_what_was_asked_before() -> None:
    def plan() -> TrainingOrder:
        return mixture([ordered("a", synthetic_lengths(300)), ordered("b", [9] * 999)], [1, 1])

    forwards = plan()
    packs = [forwards.pack(position) for position in range(900)]
    backwards = plan()
    shuffled = np.random.default_rng(0).permutation(900).tolist()
    assert {position: backwards.pack(position) for position in shuffled} == dict(enumerate(packs))
    far = 10**9 + 7
    assert plan().pack(far) == forwards.pack(far)


@pytest.mark.usefixtures("small_windows")
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.integers(0, 9))
def test_an_order_that_was_asked_for_anything_is_as_one_that_was_not(asked: list[int], seed: int) -> None:
    def plan() -> TrainingOrder:
        orders = [ordered("a", synthetic_lengths(200), 9, seed, 2), ordered("b", [9] * 400, 9, seed, 2)]
        return TrainingOrder(orders, [Phase(0, (1, 2)), Phase(1000, (1, 0))], 4)

    used = plan()
    answers = [(used.pack(position), used.sizes(position, position + 3)[1]) for position in asked]
    fresh = plan()
    for position, answer in sorted(zip(asked, answers, strict=True)):
        assert (fresh.pack(position), fresh.sizes(position, position + 3)[1]) == answer


def test_targets_count_every_token_but_the_first_of_a_piece() -> None:
    orders = [ordered("a", synthetic_lengths(300)), ordered("b", synthetic_lengths(200, 1))]
    plan = TrainingOrder(orders, [Phase(0, (24, 16), exact=True)])
    pieces = [piece for position in range(8, 50) for piece in plan.pack(position)]
    tokens, targets = plan.sizes(8, 50)
    lengths = [[piece.stop - piece.start for piece in pieces if piece.source == number] for number in range(2)]
    assert tokens.tolist() == [sum(one) for one in lengths]
    assert targets == tokens.sum() - len(pieces)


def test_validation_is_every_document_once_whatever_the_seed() -> None:
    sources = [source("a", synthetic_lengths(5000)), source("b", [7] * 10)]
    plan = ValidationOrder(sources, CONTEXT)
    pieces = [piece for position in range(len(plan)) for piece in plan.pack(position)]
    assert sorted((piece.source, piece.document) for piece in pieces) == [
        *((0, n) for n in range(5000)),
        *((1, n) for n in range(10)),
    ]
    assert all(sum(piece.stop - piece.start for piece in plan.pack(p)) <= CONTEXT for p in range(len(plan)))
    assert plan.pack(len(plan)) == plan.pack(len(plan) + 99) == ()


@given(st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_a_step_is_the_same_positions_at_any_world_size_and_micro_batch(shape: tuple[int, int]) -> None:
    world_size, micro = shape
    ranks = [list(StepBatches(0, 5, 12, micro, rank, world_size)) for rank in range(world_size)]
    [per_step] = {len(rank) // 5 for rank in ranks}
    for step in range(5):
        of_step = [batch for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
        assert [p for batch in of_step for p in batch if p >= 0] == list(range(12 * step, 12 * step + 12))
        assert {~batch[0] for batch in of_step if batch[0] < 0} <= {12 * step}, "padding belongs to the step"
    for rank, batches in enumerate(ranks):
        assert all(1 <= len(batch) <= micro for batch in batches)
        assert len(StepBatches(0, 5, 12, micro, rank, world_size)) == len(batches)


def test_resume_starts_at_its_step_with_another_world_size_and_loses_nothing() -> None:
    before = [batch for rank in range(2) for batch in StepBatches(0, 3, 8, 2, rank, 2)]
    after = [batch for rank in range(4) for batch in StepBatches(3, 6, 8, 1, rank, 4)]
    assert sorted(p for batch in before + after for p in batch) == list(range(48))
    assert min(p for batch in after for p in batch) == 24
    # Lightning counts the batches of an epoch from its beginning, those before the resumed step too.
    assert len(StepBatches(3, 6, 8, 1, 0, 4)) == len(StepBatches(0, 6, 8, 1, 0, 4)) == 12


def test_successive_steps_of_a_rank_follow_one_another() -> None:
    first = [batch[0] for batch in StepBatches(0, 20, 8, 4, 1, 2)]
    assert all(b - a == 8 for a, b in pairwise(first))


# Random choices about documents


def captions(document: int, draw: int) -> tuple[list[tuple[int, bool]], bool]:
    """A picture of 20 tokens and a caption drawn out of three, in free order."""
    return [(20, True), (10 + document % 7 + 5 * (draw % 3), True)], document % 2 == 0


def test_the_texts_drawn_in_each_epoch_and_hidden_segments_are_planned_exactly() -> None:
    numbers = np.arange(400)
    longest = 2 + 20 + 10 + numbers % 7 + 10
    pieces = pieces_of(numbers, longest, varies=True)
    tokens = SourceTokens("s", np.array([400]), np.array([longest.sum()]), lambda shard: pieces, None, captions)
    plan = SourceOrder(tokens, CONTEXT, 0, condition_dropout=0.25)
    drawn = [Counter[int]() for _ in range(400)]
    hidden = 0
    for epoch in range(30):
        for k in range(epoch * plan.packs_per_epoch, (epoch + 1) * plan.packs_per_epoch):
            pack, targets = plan.pack(k), 0
            for piece in pack:
                sizes, ordered = captions(piece.document, plan.draw.text(epoch, piece.document))
                if not ordered:
                    sizes = [sizes[i] for i in plan.draw.order(epoch, piece.document, 2)]
                dropped = plan.draw.hidden(epoch, piece.document, 2)
                assert piece.stop == 2 + sum(size for size, _ in sizes) <= longest[piece.document]
                targets += piece.stop - 1 - sum(size for size, _ in sizes[:dropped])
                drawn[piece.document][piece.stop] += 1
                hidden += dropped
            assert plan.sizes(k) == (sum(piece.stop for piece in pack), targets)
    assert all(len(texts) == 3 and max(texts.values()) < 25 for texts in drawn)
    assert 0.23 < hidden / (30 * 400) < 0.27
    validation = ValidationOrder([tokens], CONTEXT)
    stops = {piece.document: piece.stop for n in range(len(validation)) for piece in validation.pack(n)}
    assert all(stops[n] == 2 + sum(size for size, _ in captions(n, validation.draws[0].text(0, n))[0]) for n in range(400))
    assert not any(validation.draws[0].hidden(0, n, 2) for n in range(400))
