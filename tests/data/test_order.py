"""The promises of `data/order.py`: the order of the data is a pure function of (seed, lengths, position)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data import order
from pile_app.data.datamodule import StepBatches
from pile_app.data.order import (
    MIXTURE_BLOCK,
    ORDER_VERSION,
    SourceOrder,
    SourceTokens,
    TrainingOrder,
    ValidationOrder,
    hash64,
    integer_weights,
    permutation,
    share_counts,
    uniform,
)

CONTEXT = 256


def source(name: str, lengths: Sequence[int] | np.ndarray, shards: int = 5) -> SourceTokens:
    """A source of whole documents, spread evenly over its shards."""
    lengths = np.asarray(lengths, np.int64)
    numbers = np.arange(len(lengths))
    return SourceTokens(name, numbers, np.zeros_like(lengths), lengths, numbers * shards // len(lengths))


def synthetic_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Integers only, so that they are the same on every machine."""
    return 3 + permutation(count, seed, "lengths") * 7919 % (CONTEXT - 2)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred documents take many windows and groups of shards."""
    monkeypatch.setattr(order, "WINDOW_PIECES", 32)
    monkeypatch.setattr(order, "GROUP_SHARDS", 2)


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
GOLDEN_PLAN = "3ad56b160c866353e71abc5613320ab5"
CHANGED = (
    "the order of the training data has changed: runs that resume would repeat and miss documents. Where that is meant, "
    "increase ORDER_VERSION and put the new values here"
)


def test_the_order_changes_only_with_its_version() -> None:
    assert ORDER_VERSION == 1, "put the golden values of the new ORDER_VERSION here"
    assert int(hash64(0, "a")) == GOLDEN_HASH64, CHANGED
    assert uniform(1, 2, "x") == GOLDEN_UNIFORM, CHANGED
    assert permutation(10, 0, "golden").tolist() == GOLDEN_PERMUTATION, CHANGED
    assert share_counts(1000, [500_000, 300_000, 200_000]).tolist() == [500, 300, 200], CHANGED
    sources = [
        source("text", synthetic_lengths(9000, 1), 20),
        source("images", np.full(700, 83), 3),
        source("speech", synthetic_lengths(1500, 2), 9),
    ]
    plan = TrainingOrder(sources, [0.6, 0.3, 0.1], CONTEXT, seed=7)
    positions = [[tuple(piece) for piece in plan.pack(position)] for position in range(2000)]
    assert hashlib.blake2b(repr(positions).encode(), digest_size=16).hexdigest() == GOLDEN_PLAN, CHANGED


@given(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=6), st.integers(0, 10**12))
def test_shares_are_exact_monotone_and_within_bounds(weights: list[int], k: int) -> None:
    counts, following = share_counts(k, weights), share_counts(k + 1, weights)
    assert counts.sum() == k and (counts >= 0).all()
    assert sorted(following - counts) == [0] * (len(weights) - 1) + [1]
    exact = [k * weight / sum(weights) for weight in weights]
    assert np.abs(counts - exact).max() <= len(weights)


def test_weights_are_shares_in_any_unit() -> None:
    assert integer_weights([6, 3, 1]) == integer_weights([0.6, 0.3, 0.1]) == [600_000, 300_000, 100_000]
    for weights in ([1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="above 0"):
            integer_weights(weights)


@pytest.mark.usefixtures("small_windows")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(1, 12), st.integers(0, 2**40))
def test_every_document_comes_exactly_once_an_epoch(lengths: list[int], shards: int, seed: int) -> None:
    tokens = source("s", lengths, shards)
    plan = SourceOrder(tokens, 64, seed)
    for epoch in range(3):
        packs = [plan.pack(epoch * plan.packs_per_epoch + k) for k in range(plan.packs_per_epoch)]
        assert {number for number, _ in packs} == {epoch}
        assert sorted(np.concatenate([pieces for _, pieces in packs]).tolist()) == list(range(len(lengths)))
        assert all((tokens.stop - tokens.start)[pieces].sum() <= 64 for _, pieces in packs)


@pytest.mark.usefixtures("small_windows")
def test_a_window_fills_as_many_packs_in_every_epoch() -> None:
    plan = SourceOrder(source("s", synthetic_lengths(300)), CONTEXT, 3)
    counts = [[len(plan._pack_window(epoch, window)) for window in range(len(plan._windows))] for epoch in range(20)]
    assert len(counts[0]) == 10
    assert all(count == plan._window_packs.tolist() for count in counts)


@pytest.mark.usefixtures("small_windows")
def test_epochs_seeds_and_sources_differ_in_order() -> None:
    def epoch(name: str, seed: int, number: int) -> list[list[int]]:
        plan = SourceOrder(source(name, synthetic_lengths(300)), CONTEXT, seed)
        return [plan.pack(number * plan.packs_per_epoch + k)[1].tolist() for k in range(plan.packs_per_epoch)]

    orders = [epoch("a", 0, 0), epoch("a", 0, 1), epoch("a", 1, 0), epoch("b", 0, 0)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert epoch("a", 0, 1) == orders[1]


def test_documents_of_one_length_meet_others_in_another_epoch() -> None:
    plan = SourceOrder(source("s", np.full(300, 60)), CONTEXT, 0)
    epochs = [{frozenset(plan.pack(e * plan.packs_per_epoch + k)[1].tolist()) for k in range(75)} for e in range(2)]
    assert len(epochs[0]) == 75 and len(epochs[0] & epochs[1]) < 5


@pytest.mark.usefixtures("small_windows")
def test_a_window_reads_from_few_shards() -> None:
    tokens = source("s", synthetic_lengths(2000), shards=40)
    plan = SourceOrder(tokens, CONTEXT, 0)
    touched = [len(set(tokens.shard[window].tolist())) for window in plan._windows]
    assert max(touched) <= 2 * order.GROUP_SHARDS


def test_lengths_do_not_drift_within_an_epoch() -> None:
    lengths = np.repeat([10, 60, 250], [1200, 600, 300])
    plan = SourceOrder(source("s", lengths), CONTEXT, 0)
    long = np.array([lengths[plan.pack(k)[1]].max() == 250 for k in range(plan.packs_per_epoch)])
    quarters = [part.mean() for part in np.array_split(long, 4)]
    assert max(quarters) - min(quarters) < 0.2


def test_the_mixture_keeps_its_weights_at_every_position() -> None:
    sources = [source(name, synthetic_lengths(200, n)) for n, name in enumerate("abc")]
    weights = np.array([0.7, 0.2, 0.1])
    plan = TrainingOrder(sources, weights.tolist(), CONTEXT, 0)
    drawn = np.array([plan.locate(position)[0] for position in range(10 * MIXTURE_BLOCK)])
    seen = np.cumsum(drawn[:, None] == np.arange(3), axis=0)
    wanted = np.arange(1, len(drawn) + 1)[:, None] * weights
    assert np.abs(seen - wanted).max() < 30  # shuffled inside a block
    assert np.abs(seen - wanted)[MIXTURE_BLOCK - 1 :: MIXTURE_BLOCK].max() < 3  # exact from block to block
    runs = max(len(run) for run in "".join(map(str, drawn)).replace("0", " ").split())
    assert runs < 12, "sources are not mixed inside a block"


def test_each_source_is_consumed_pack_by_pack_without_gap() -> None:
    sources = [source("a", synthetic_lengths(100, 0)), source("b", synthetic_lengths(100, 1))]
    plan = TrainingOrder(sources, [2, 1], CONTEXT, 5)
    located = [plan.locate(position) for position in range(3 * MIXTURE_BLOCK + 100)]
    for number in range(2):
        packs = [k for one, k in located[: 3 * MIXTURE_BLOCK] if one == number]
        assert packs == list(range(len(packs)))
        assert len([k for one, k in located if one == number]) == len({k for one, k in located if one == number})


def test_without_weights_all_sources_end_an_epoch_together() -> None:
    sources = [source("a", synthetic_lengths(2000, 0)), source("b", synthetic_lengths(500, 1))]
    plan = TrainingOrder(sources, None, CONTEXT, 0)
    seen = Counter(
        (piece.source, piece.document)
        for position in range(plan.packs_per_epoch)
        for piece in plan.pack(position)
        if piece.epoch == 0
    )
    assert len(seen) > 0.97 * 2500 and max(seen.values()) == 1


def test_a_pack_does_not_hang_on_what_was_asked_before() -> None:
    def plan() -> TrainingOrder:
        return TrainingOrder([source("a", synthetic_lengths(300)), source("b", [9] * 999)], [1, 1], CONTEXT, 1)

    forwards = plan()
    packs = [forwards.pack(position) for position in range(900)]
    backwards = plan()
    shuffled = np.random.default_rng(0).permutation(900).tolist()
    assert {position: backwards.pack(position) for position in shuffled} == dict(enumerate(packs))
    far = 10**9 + 7
    assert plan().pack(far) == forwards.pack(far)


def test_targets_count_every_token_but_the_first_of_a_piece() -> None:
    plan = TrainingOrder([source("a", synthetic_lengths(300))], None, CONTEXT, 1)
    pieces = [piece for position in range(8, 24) for piece in plan.pack(position)]
    assert plan.targets(8, 24) == sum(piece.stop - piece.start for piece in pieces) - len(pieces)


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
