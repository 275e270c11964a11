"""The promises of `data/order.py`: the order of the data is a pure function of (seed, lengths, position)."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data import order
from pile_app.data.datamodule import StepBatches
from pile_app.data.order import (
    MIXTURE_BLOCK,
    ORDER_VERSION,
    Phase,
    Pieces,
    SourceOrder,
    SourceTokens,
    TrainingOrder,
    ValidationOrder,
    hash64,
    pack_weights,
    permutation,
    share_counts,
    uniform,
)

CONTEXT = 256


class Shelf:
    """What loads the pieces of a shard: whole documents, of given lengths. `loaded`: the shards that were asked for."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, counts: np.ndarray) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        self.loaded: list[int] = []

    def __call__(self, shard: int) -> Pieces:
        self.loaded.append(shard)
        numbers = np.arange(self.first[shard], self.first[shard + 1])
        lengths = self.lengths[numbers]
        return Pieces(numbers, np.zeros_like(lengths), lengths, lengths - 1, np.ones(len(numbers), bool))


def source(name: str, lengths: Sequence[int] | np.ndarray, shards: int | Sequence[int] = 5) -> SourceTokens:
    """A source of whole documents, spread evenly over its shards, or so many in each."""
    even = (
        np.bincount(np.arange(len(lengths)) * shards // len(lengths), minlength=shards) if isinstance(shards, int) else shards
    )
    return SourceTokens(name, np.asarray(even), int(np.sum(lengths)), Shelf(lengths, np.asarray(even)))


def ordered(name: str, lengths: Sequence[int] | np.ndarray, shards: int = 5, seed: int = 0) -> SourceOrder:
    return SourceOrder(source(name, lengths, shards), CONTEXT, seed)


def mixture(orders: list[SourceOrder], weights: Sequence[float] | None = None, seed: int = 0) -> TrainingOrder:
    """One phase; without weights each source weighs its packs."""
    packs = tuple(one.packs_per_epoch for one in orders)
    return TrainingOrder(orders, [Phase(0, pack_weights(orders, weights) if weights else packs)], seed)


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
    monkeypatch.setattr(order, "GROUP_SHARDS", 2)
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
GOLDEN_UNIFORM = 0.9962706250749569
GOLDEN_PERMUTATION = [7, 8, 5, 1, 6, 9, 0, 2, 3, 4]
GOLDEN_WEIGHTS = (596_114, 305_104, 98_782)
GOLDEN_PLAN = "6baa6229a5d927fe11ec3ba1d914de39"
CHANGED = (
    "the order of the training data has changed: runs that resume would repeat and miss documents. Where that is meant, "
    "increase ORDER_VERSION and put the new values here"
)


def test_the_order_changes_only_with_its_version() -> None:
    assert ORDER_VERSION == 2, "put the golden values of the new ORDER_VERSION here"
    assert int(hash64(0, "a")) == GOLDEN_HASH64, CHANGED
    assert uniform(1, 2, "x") == GOLDEN_UNIFORM, CHANGED
    assert permutation(10, 0, "golden").tolist() == GOLDEN_PERMUTATION, CHANGED
    assert share_counts(1000, [500_000, 300_000, 200_000]).tolist() == [500, 300, 200], CHANGED
    orders = [
        ordered("text", synthetic_lengths(9000, 1), 20, seed=7),
        ordered("images", np.full(700, 83), 3, seed=7),
        ordered("speech", synthetic_lengths(1500, 2), 9, seed=7),
    ]
    weights = pack_weights(orders, [0.6, 0.3, 0.1])
    assert weights == GOLDEN_WEIGHTS, CHANGED
    plan = TrainingOrder(orders, [Phase(0, weights), Phase(1000, (2, 0, 1)), Phase(1500, weights)], seed=7)
    positions = [[tuple(piece) for piece in plan.pack(position)] for position in range(2000)]
    assert hashlib.blake2b(repr(positions).encode(), digest_size=16).hexdigest() == GOLDEN_PLAN, CHANGED


@given(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=6), st.integers(0, 10**12))
def test_shares_are_exact_monotone_and_within_bounds(weights: list[int], k: int) -> None:
    counts, following = share_counts(k, weights), share_counts(k + 1, weights)
    assert counts.sum() == k and (counts >= 0).all()
    assert sorted(following - counts) == [0] * (len(weights) - 1) + [1]
    exact = [k * weight / sum(weights) for weight in weights]
    assert np.abs(counts - exact).max() <= len(weights)


def test_weights_are_shares_of_tokens_in_any_unit() -> None:
    full = [ordered(name, [CONTEXT] * 20) for name in "abc"]
    assert pack_weights(full, [6, 3, 1]) == pack_weights(full, [0.6, 0.3, 0.1]) == (600_000, 300_000, 100_000)
    half = [full[0], ordered("half", [CONTEXT // 2 + 1] * 20)]  # one document a pack
    packs = pack_weights(half, [1, 1])
    assert packs[1] / packs[0] == pytest.approx(CONTEXT / (CONTEXT // 2 + 1), rel=1e-4)
    assert pack_weights(full, [1, 0, 1e-9]) == (1_000_000, 0, 1), "what weighs nothing comes never, what weighs little does"
    for weights in ([1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="0 or more, and one of them above"):
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
    plan = ordered("s", synthetic_lengths(300), seed=3)
    windows = [(group, window) for group in range(plan.groups) for window in range(len(plan._slices(group)))]
    assert len(windows) >= 10 and plan.groups >= 2
    for epoch in range(20):
        counts = [len(plan._pack_window(epoch, group, window, 0).tokens) for group, window in windows]
        assert counts == plan.window_packs.tolist()


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
def test_a_window_reads_from_the_few_shards_of_its_group() -> None:
    plan = ordered("s", synthetic_lengths(2000), shards=40)
    assert plan.groups == 40 // order.GROUP_SHARDS
    groups = [plan.shards_of_group(group) for group in range(plan.groups)]
    assert sorted(shard for group in groups for shard in group) == list(range(40))
    for group, shards in enumerate(groups):
        for window in range(len(plan._slices(group))):
            pieces = plan._pack_window(0, group, window, 0).pieces
            touched = shard_of(plan.source, np.array([piece.document for piece in pieces]))
            assert touched <= set(shards) and len(touched) <= order.GROUP_SHARDS


@pytest.mark.usefixtures("small_windows")
@settings(max_examples=40, deadline=None)
@given(shelves, st.integers(0, 10**6), st.integers(0, 3000))
def test_upcoming_shards_are_those_that_the_packs_touch_in_order(shards: list[list[int]], seed: int, k: int) -> None:
    lengths = [length for shard in shards for length in shard]
    plan = SourceOrder(source("s", lengths, list(map(len, shards))), 64, seed)
    announced = list(islice(plan.upcoming_shards(k), 2 * plan.groups + 2))
    firsts = [first for first, _ in announced]
    assert firsts[0] <= k < firsts[1] and all(a < b for a, b in pairwise(firsts))
    for number in {0, 1, len(announced) - 2}:
        first, allowed = announced[number]
        packs = range(max(first, k), announced[number + 1][0])
        touched: set[int] = set().union(
            *(shard_of(plan.source, np.array([piece.document for piece in plan.pack(one)])) for one in packs)
        )
        assert touched <= set(allowed)
        if first >= k:  # all packs of the group
            assert touched == {shard for shard in allowed if shards[shard]}


@pytest.mark.usefixtures("small_windows")
def test_large_shards_stand_in_groups_of_fewer() -> None:
    plan = SourceOrder(source("s", [5] * 1000, [80] * 5 + [10] * 60), CONTEXT, 0)
    for group in range(plan.groups):
        shards = plan.shards_of_group(group)
        pieces = int(plan.source.counts[shards].sum())
        assert pieces >= order.WINDOW_PIECES
        assert (
            len(shards) <= order.GROUP_SHARDS
            or int(plan.source.counts[shards[: order.GROUP_SHARDS]].sum()) < order.WINDOW_PIECES
        )
        assert pieces <= order.GROUP_PIECES or int(plan.source.counts[shards[:-1]].sum()) < order.WINDOW_PIECES
        sizes = [window.stop - window.start for window in plan._slices(group)]
        assert sum(sizes) == pieces and max(sizes) <= order.WINDOW_PIECES and max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("small_windows")
def test_only_the_shards_of_the_group_of_the_asked_pack_are_loaded() -> None:
    tokens = source("s", synthetic_lengths(2000), shards=40)
    shelf = tokens.load
    assert isinstance(shelf, Shelf)
    counted = SourceOrder(tokens, CONTEXT, 0)
    assert sorted(shelf.loaded) == list(range(40)), "to count, each shard is loaded once"
    shelf.loaded.clear()
    plan = SourceOrder(tokens, CONTEXT, 0, counted.window_packs)
    assert plan.packs_per_epoch == counted.packs_per_epoch and not shelf.loaded
    k = plan.packs_per_epoch * 7 + 123
    first, shards = next(plan.upcoming_shards(k))
    following = next(islice(plan.upcoming_shards(k), 1, None))[0]
    assert not shelf.loaded
    for one in range(first, following):
        plan.pack(one)
    assert sorted(shelf.loaded) == sorted(shards), "a group is loaded once, while its packs are visited in order"


@pytest.mark.usefixtures("small_windows")
def test_groups_counted_by_processes_give_the_same_order() -> None:
    tokens = source("s", synthetic_lengths(1500), shards=30)
    alone = SourceOrder(tokens, CONTEXT, 5)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        together = SourceOrder(tokens, CONTEXT, 5, for_each=pool.map)
    assert np.array_equal(alone.window_packs, together.window_packs)
    assert packs_of_epoch(alone, 1) == packs_of_epoch(together, 1)


@pytest.mark.usefixtures("small_windows")
def test_a_pickled_order_gives_the_same_packs() -> None:
    plan = mixture([ordered("a", synthetic_lengths(300)), ordered("b", [9] * 999)], [2, 1], seed=1)
    before = [plan.pack(position) for position in range(300)]
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.pack(position) for position in range(300)] == before


class Endless:
    """Loads `size` pieces of any shard, from its number alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, shard: int) -> Pieces:
        lengths = 3 + permutation(self.size, shard, "lengths") % (CONTEXT - 3)
        zeros = np.zeros_like(lengths)
        return Pieces(np.arange(self.size) + shard * self.size, zeros, lengths, lengths - 1, np.ones(self.size, bool))


def test_a_million_documents_take_no_memory() -> None:
    tokens = SourceTokens("s", np.full(1000, 1000), 0, Endless(1000))
    window_packs = SourceOrder(tokens, CONTEXT, 0).window_packs  # loads every shard, one group after another
    tracemalloc.start()
    try:
        plan = TrainingOrder([SourceOrder(tokens, CONTEXT, 0, window_packs)], [Phase(0, (1,))], 0)
        for position in np.random.default_rng(0).integers(0, 10 * plan.packs_per_epoch, 30).tolist():
            assert plan.pack(position)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(window_packs) <= 1000 and len(pickle.dumps(plan)) < 50_000
    assert now < 6e6 and peak < 12e6, (now, peak)  # a group and its windows; one column of all documents would take 8e6


def test_lengths_do_not_drift_within_an_epoch() -> None:
    lengths = np.repeat([10, 60, 250], [1200, 600, 300])
    plan = ordered("s", lengths)
    long = np.array([lengths[documents].max() == 250 for documents in packs_of_epoch(plan, 0)])
    quarters = [part.mean() for part in np.array_split(long, 4)]
    assert max(quarters) - min(quarters) < 0.2


# Mixture


def test_the_mixture_keeps_its_weights_at_every_position() -> None:
    orders = [ordered(name, [CONTEXT] * 40) for name in "abc"]
    weights = np.array([0.7, 0.2, 0.1])
    plan = mixture(orders, weights.tolist())
    drawn = np.array([plan.locate(position)[0] for position in range(40 * MIXTURE_BLOCK)])
    seen = np.cumsum(drawn[:, None] == np.arange(3), axis=0)
    wanted = np.arange(1, len(drawn) + 1)[:, None] * weights
    assert np.abs(seen - wanted).max() < 15  # shuffled inside a block
    assert np.abs(seen - wanted)[MIXTURE_BLOCK - 1 :: MIXTURE_BLOCK].max() < 3  # exact from block to block
    runs = max(len(run) for run in "".join(map(str, drawn)).replace("0", " ").split())
    assert runs < 12, "sources are not mixed inside a block"


def test_each_source_is_consumed_pack_by_pack_without_gap() -> None:
    plan = mixture([ordered("a", synthetic_lengths(100, 0)), ordered("b", synthetic_lengths(100, 1))], [2, 1], seed=5)
    located = [plan.locate(position) for position in range(12 * MIXTURE_BLOCK + 40)]
    for number in range(2):
        packs = [k for one, k in located[: 12 * MIXTURE_BLOCK] if one == number]
        assert packs == list(range(len(packs)))
        assert len([k for one, k in located if one == number]) == len({k for one, k in located if one == number})


@st.composite
def phase_lists(draw: Callable[..., list[Phase]]) -> list[Phase]:
    """Some of which end some positions before the next begins."""
    sources = draw(st.integers(1, 5))
    weights = st.lists(st.integers(0, 1000), min_size=sources, max_size=sources).filter(any)
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
    phases, first = [], 0
    for length in lengths:
        gap = draw(st.none() | st.integers(0, 20))
        phases.append(Phase(first, tuple(draw(weights)), None if gap is None else max(first, first + length - gap)))
        first += length
    return phases


@settings(max_examples=60, deadline=None)
@given(phase_lists(), st.integers(0, 2**40))
def test_counts_are_exact_where_a_phase_stops_and_no_pack_is_lost_at_any_border(phases: list[Phase], seed: int) -> None:
    sources = [tiny_order] * len(phases[0].weights)
    plan = TrainingOrder(sources, phases, seed)
    end = phases[-1].first + 330
    located = [plan.locate(position) for position in range(end)]
    before = np.zeros(len(sources), np.int64)
    for phase, following in pairwise([*phases, Phase(end, ())]):
        assert plan.counts(phase.first).tolist() == before.tolist()
        stop = following.first if phase.stop is None else phase.stop
        assert all(one is None for one in located[stop : following.first])
        drawn = np.zeros(len(sources), np.int64)
        for position in range(phase.first, stop):
            found = located[position]
            assert found is not None
            assert found[1] == before[found[0]] + drawn[found[0]], "a pack is repeated or left out"
            drawn[found[0]] += 1
        if phase.stop is not None:
            assert drawn.tolist() == share_counts(stop - phase.first, phase.weights).tolist()
        assert not any(drawn[number] for number, weight in enumerate(phase.weights) if not weight)
        share = np.array(phase.weights) / sum(phase.weights)
        assert np.abs(drawn - (stop - phase.first) * share).max() <= len(sources) + MIXTURE_BLOCK / 2
        before += drawn


tiny_order = ordered("tiny", [5, 6, 7], 1)


def test_a_phase_to_come_changes_nothing_of_the_blocks_before_it() -> None:
    orders = [ordered("a", synthetic_lengths(300, 0)), ordered("b", synthetic_lengths(300, 1))]
    border = 3 * MIXTURE_BLOCK
    plans = [
        TrainingOrder(orders, [Phase(0, (2, 1)), *later], 0)
        for later in ([], [Phase(border, (1, 5))], [Phase(border, (0, 1)), Phase(border + 100, (1, 1))])
    ]
    prefixes = [[plan.pack(position) for position in range(border)] for plan in plans]
    assert prefixes[0] == prefixes[1] == prefixes[2]
    assert len({tuple(plan.pack(position) for position in range(border, border + 64)) for plan in plans}) == 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any))
def test_a_phase_to_come_changes_nothing_before_it_wherever_it_begins(first: int, weights: tuple[int, int]) -> None:
    plan = TrainingOrder([tiny_order] * 2, [Phase(0, (2, 1))], 0)
    longer = TrainingOrder([tiny_order] * 2, [Phase(0, (2, 1)), Phase(first, weights)], 0)
    assert [plan.locate(position) for position in range(first)] == [longer.locate(position) for position in range(first)]


def test_without_weights_all_sources_end_an_epoch_together() -> None:
    orders = [ordered("a", synthetic_lengths(2000, 0)), ordered("b", synthetic_lengths(500, 1))]
    endless = mixture(orders)

    def seen(plan: TrainingOrder) -> Counter[tuple[int, int]]:
        pieces = (piece for position in range(plan.packs_per_epoch) for piece in plan.pack(position))
        return Counter((piece.source, piece.document) for piece in pieces if piece.epoch == 0)

    counts = seen(endless)
    assert len(counts) > 0.97 * 2500 and max(counts.values()) == 1
    sizes = endless.phases[0].weights
    in_epochs = TrainingOrder(orders, [Phase(0, sizes, sum(sizes))], 0)
    counts = seen(in_epochs)
    assert len(counts) == 2500 and max(counts.values()) == 1, "where a phase ends with the epoch, it is complete"
    assert in_epochs.pack(sum(sizes) - 1) and in_epochs.pack(sum(sizes)) == in_epochs.pack(10**12) == ()


@pytest.mark.parametrize("context", [256, 512])
def test_tokens_of_sources_with_different_fills_have_the_given_shares(context: int) -> None:
    rng = np.random.default_rng(0)
    lengths = {
        "text": rng.lognormal(4.5, 1.0, 6000).astype(int).clip(3, context),
        "images": np.full(5000, 83),  # 3 or 6 a pack
        "long": rng.integers(context // 2 + 1, context + 1, 3000),  # one a pack
        "lines": rng.integers(3, 30, 9000),
        "speech": np.full(3000, context * 5 // 8),
    }
    orders = [SourceOrder(source(name, one, 7), context, 0) for name, one in lengths.items()]
    fills = [one.tokens_per_pack / context for one in orders]
    assert min(fills) < 0.8 and max(fills) > 0.98
    weights = [0.35, 0.25, 0.2, 0.15, 0.05]
    plan = mixture(orders, weights)
    tokens, targets = plan.sizes(0, round(1e6 / context / np.mean(fills)))
    assert 0.9e6 < tokens.sum() < 1.15e6 and targets < tokens.sum()
    assert np.abs(tokens / tokens.sum() - weights).max() < 0.002


def test_a_pack_does_not_hang_on_what_was_asked_before() -> None:
    def plan() -> TrainingOrder:
        return mixture([ordered("a", synthetic_lengths(300)), ordered("b", [9] * 999)], [1, 1], seed=1)

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
        orders = [ordered("a", synthetic_lengths(200), 9, seed), ordered("b", [9] * 400, 9, seed)]
        return TrainingOrder(orders, [Phase(0, (1, 2)), Phase(1000, (1, 0))], seed)

    used = plan()
    answers = [(used.pack(position), used.sizes(position, position + 3)[1]) for position in asked]
    fresh = plan()
    for position, answer in sorted(zip(asked, answers, strict=True)):
        assert (fresh.pack(position), fresh.sizes(position, position + 3)[1]) == answer


def test_targets_count_every_token_but_the_first_of_a_piece() -> None:
    orders = [ordered("a", synthetic_lengths(300)), ordered("b", synthetic_lengths(200, 1))]
    plan = TrainingOrder(orders, [Phase(0, (3, 2), 40)], seed=1)
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


@given(st.sampled_from([(w, m) for w in (1, 2, 3, 4, 6, 12) for m in (1, 2, 3, 4, 6, 12) if 12 % (w * m) == 0]))
def test_a_step_is_the_same_positions_at_any_world_size_and_micro_batch(shape: tuple[int, int]) -> None:
    world_size, micro = shape
    ranks = [list(StepBatches(0, 5, 12, micro, rank, world_size)) for rank in range(world_size)]
    per_step = 12 // world_size // micro
    for step in range(5):
        positions = [p for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step] for p in batch]
        assert positions == list(range(12 * step, 12 * step + 12))
    for rank, batches in enumerate(ranks):
        assert all(len(batch) == micro for batch in batches)
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
