"""The promises of `data/datamodule.py`: the training data of a run, from the shards to the batch."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pile_app.data import order
from pile_app.data.batch import PADDING, Batch
from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.files import ShardError
from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import TEXT, Document, Segment
from pile_app.vocabulary import Vocabulary

VOCABULARY = Vocabulary()
CONTEXT = 64
SIZES = {"news": 150, "books": 90, "code": 61}

Step = tuple[int, str, int, int, int]  # source, key, epoch, first token, stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three sources of texts, some longer than the context."""
    folder = tmp_path_factory.mktemp("datamodule")
    for name, count in SIZES.items():
        rng = np.random.default_rng(count)
        lengths = rng.integers(1, 40, count) + 60 * (rng.random(count) < 0.1)
        documents = (Document((Segment("x" * length),), f"{name}-{n}") for n, length in enumerate(lengths.tolist()))
        write_shards(documents, folder, name, shard_bytes=40_000)
    return folder


def module(folder: Path, sources: dict[str, dict[str, Any]] | None = None, **arguments: Any) -> PileDataModule:
    """Set up, as `Trainer.fit` would."""
    given = sources or {name: {} for name in SIZES}
    named = {name: Source(str(folder / f"{name}-*.tar"), **one) for name, one in given.items()}
    made = PileDataModule(named, VOCABULARY, ByteTokenizer(), **{"context": CONTEXT, "global_batch": 4} | arguments)
    made.setup()
    return made


def seen(made: PileDataModule, first: int, stop: int) -> list[list[Step]]:
    dataset = made.train_dataset()
    return [dataset[position].documents[0] for position in range(first, stop)]


def whole_documents(packs: list[list[Step]]) -> Counter[tuple[int, str]]:
    """How often each document began."""
    return Counter((source, key) for pack in packs for source, key, _, start, _ in pack if start == 0)


def batches(made: PileDataModule, step: int = 0, max_steps: int = -1, world_size: int = 1, rank: int = 0) -> list[Batch]:
    """The batches of a rank that resumes at `step`."""
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"num_replicas": world_size, "rank": rank},
        local_rank=rank,
        global_step=step,
        max_steps=max_steps,
    )
    return list(made.train_dataloader())


# How long a run is


@pytest.mark.parametrize("seed", range(3))
def test_one_epoch_is_every_document_exactly_once(folder: Path, seed: int) -> None:
    made = module(folder, epochs=1, global_batch=8, seed=seed)
    found = batches(made)
    assert len(found) == made.steps(made.trainer) == -(-made.order.packs_per_epoch // 8)
    assert made.order.packs_per_epoch % 8, "the last batch must be partial"
    packs = [pack for batch in found for pack in batch.documents]
    assert not packs[-1] and packs == seen(made, 0, len(packs))
    counts = whole_documents(packs)
    assert len(counts) == sum(SIZES.values()) and set(counts.values()) == {1}
    assert {epoch for pack in packs for _, _, epoch, _, _ in pack} == {0}
    assert max(Counter((source, key, start) for pack in packs for source, key, _, start, _ in pack).values()) == 1
    # The last batch weighs what it holds.
    assert found[-1].normalizer == sum(len(places) for places in found[-1].targets) < found[0].normalizer
    empty = np.array([not pack for pack in found[-1].documents])
    assert (found[-1].document.numpy()[empty] == PADDING).all()


@pytest.mark.parametrize("epochs", [0.3, 1, 1.5, 3])
def test_epochs_are_passes_over_all_sources(folder: Path, epochs: float) -> None:
    made = module(folder, epochs=epochs)
    size, steps = made.order.packs_per_epoch, -(-made.order.packs_per_epoch // made.global_batch)
    assert made.order.length is not None and made.order.length - 4 <= epochs * steps * made.global_batch
    assert made.order.length >= epochs * size
    counts = whole_documents(seen(made, 0, made.order.length + 9))
    times = {counts[source, f"{name}-{n}"] for source, (name, size) in enumerate(SIZES.items()) for n in range(size)}
    assert times == {math.floor(epochs), math.ceil(epochs)}


def test_small_data_is_repeated_for_the_least_number_of_steps(folder: Path) -> None:
    once, more = module(folder, epochs=1), module(folder, epochs=1, min_steps=40)
    assert once.order.length is not None and more.order.length is not None
    assert once.order.length < 40 * more.global_batch <= more.order.length < 40 * more.global_batch + once.order.length
    assert module(folder, epochs=1, min_steps=1).order.length == once.order.length


def test_more_epochs_keep_what_was_seen_before(folder: Path) -> None:
    once, twice = module(folder, epochs=1), module(folder, epochs=2)
    size = once.order.packs_per_epoch
    assert seen(once, 0, size) == seen(twice, 0, size)
    assert twice.order.length is not None
    counts = whole_documents(seen(twice, size, twice.order.length))
    assert len(counts) == sum(SIZES.values()) and set(counts.values()) == {1}
    assert {epoch for pack in seen(twice, size, twice.order.length) for _, _, epoch, _, _ in pack} == {1}
    part = once.identity() | {"position": size // 2}
    twice.load_state_dict(part)  # and is accepted


def test_a_finished_run_that_gets_more_epochs_misses_nothing(folder: Path) -> None:
    once, twice = module(folder, epochs=1, global_batch=8), module(folder, epochs=2, global_batch=8)
    position = 8 * len(batches(once))
    assert position > once.order.packs_per_epoch
    twice.load_state_dict(once.identity() | {"position": position})
    assert twice.order.length is not None
    counts = whole_documents(seen(once, 0, position) + seen(twice, position, twice.order.length))
    assert set(counts.values()) == {2}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([0.3, 0.5, 1, 1.5, 2]),
    st.sampled_from([0.3, 0.5, 0.7, 1, 1.5, 1.9, 2, 3]),
    st.floats(0, 1),
    st.sampled_from([1, 4, 7, 64]),
)
@example(0.5, 1, 1.0, 1)
@example(0.5, 1, 0.99, 4)
@example(1, 2, 1.0, 64)
def test_other_epochs_are_refused_or_repeat_and_miss_nothing(
    folder: Path, epochs: float, then: float, share: float, global_batch: int
) -> None:
    before, after = (module(folder, epochs=one, global_batch=global_batch) for one in (epochs, then))
    assert before.order.length is not None
    position = math.floor(share * -(-before.order.length // global_batch)) * global_batch
    try:
        after.load_state_dict(before.identity() | {"position": position})
    except ValueError:
        assert then != epochs
        return
    assert seen(before, 0, position) == seen(after, 0, position), "the positions before the checkpoint hold other packs now"


@settings(max_examples=8, deadline=None)
@given(st.tuples(*[st.sampled_from([0.1, 0.5, 1.0, 1.7, 2.0, 3.0, None])] * 3).filter(any), st.integers(0, 9))
def test_every_source_has_its_own_epochs(folder: Path, epochs: tuple[float | None, ...], seed: int) -> None:
    sources = {name: {"epochs": one} for name, one in zip(SIZES, epochs, strict=True)}
    made = module(folder, sources, seed=seed)
    assert made.order.length is not None
    counts = whole_documents(seen(made, 0, made.order.length + 5))
    for source, ((name, size), one) in enumerate(zip(SIZES.items(), epochs, strict=True)):
        number = 1.0 if one is None else one
        times = {counts[source, f"{name}-{n}"] for n in range(size)}
        assert times <= {math.floor(number), math.ceil(number)}, name
        share = sum(counts[source, f"{name}-{n}"] for n in range(size)) / size
        assert abs(share - number) < 0.15


def test_the_sources_of_half_one_and_two_epochs_are_mixed_until_the_end(folder: Path) -> None:
    sources = {name: {"epochs": n} for name, n in zip(SIZES, (0.5, 1.0, 2.0), strict=True)}
    made = module(folder, sources)
    length = made.order.length
    assert length is not None
    located = [made.order.locate(position) for position in range(length)]
    drawn = np.array([one[0] for one in located if one is not None])
    halves = [np.bincount(half, minlength=3) / len(half) for half in np.array_split(drawn, 2)]
    assert np.abs(halves[0] - halves[1]).max() < 0.25
    assert np.bincount(drawn).tolist() == [
        math.ceil(n * s.packs_per_epoch) for n, s in zip((0.5, 1, 2), made.order.sources, strict=True)
    ]


def test_without_epochs_the_steps_have_to_be_given(folder: Path) -> None:
    made = module(folder)
    with pytest.raises(ValueError, match=r"Set trainer\.max_steps .* or data\.epochs"):
        batches(made)
    assert len(batches(made, max_steps=5)) == 5
    assert len(batches(module(folder, epochs=1), max_steps=5)) == 5, "the shorter of the two"


# The description of a batch


def test_a_batch_knows_its_positions_documents_and_the_tokens_of_its_step(folder: Path) -> None:
    whole = batches(module(folder, global_batch=8), max_steps=6)
    parts = [batches(module(folder, global_batch=8, micro_batch=2), 2, 6, 2, rank) for rank in range(2)]
    assert [batch.numbers for batch in whole] == [list(range(8 * step, 8 * step + 8)) for step in range(6)]
    for step in range(2, 6):
        here = [part[2 * (step - 2) + i] for part in parts for i in range(2)]
        assert [number for batch in here for number in batch.numbers] == whole[step].numbers
        assert [pack for batch in here for pack in batch.documents] == whole[step].documents
        assert {float(batch.normalizer) for batch in here} == {float(whole[step].normalizer)}
        assert {tuple(batch.source_tokens) for batch in here} == {tuple(whole[step].source_tokens)}
    for batch in whole:
        planned = Counter[int]()
        for pack in batch.documents:
            for source, _, _, start, stop in pack:
                planned[source] += stop - start
        assert batch.source_tokens == [planned[source] for source in range(3)]
        assert batch.source_tokens == [int(((batch.source == n) & (batch.document != PADDING)).sum()) for n in range(3)]
        assert batch.normalizer == len(batch.targets[TEXT])


def test_a_document_that_cannot_be_read_is_planned_rejected_and_counted(tmp_path: Path) -> None:
    documents = [Document((Segment(f"number {n}"),), f"d-{n}") for n in range(30)]
    path = Path(write_shards(documents, tmp_path, "x").paths[0])
    data = bytearray(path.read_bytes())
    data[data.index(b"number 7") + 7] ^= 1
    path.write_bytes(data)
    made = module(tmp_path, {"x": {}}, epochs=1, global_batch=4)
    found = batches(made)
    assert [one[:3] for batch in found for one in batch.rejected] == [(0, "d-7", "checksum")]
    assert sorted(key for batch in found for pack in batch.documents for _, key, *_ in pack) == sorted(d.key for d in documents)
    (spoiled,) = [batch for batch in found if batch.rejected]
    assert spoiled.normalizer - len(spoiled.targets[TEXT]) == len("number 7") + 2, "planned targets do not change with damage"


def test_a_dataset_is_the_same_in_another_process(folder: Path) -> None:
    dataset = module(folder).train_dataset()
    copy = pickle.loads(pickle.dumps(dataset))
    for position in (0, 5, 999):
        assert copy[position].documents == dataset[position].documents
        assert np.array_equal(copy[position].tokens, dataset[position].tokens)


def test_loader_processes_give_what_the_training_process_gives(folder: Path) -> None:
    here = batches(module(folder), max_steps=4)
    there = batches(module(folder, num_workers=2), max_steps=4)
    assert [batch.documents for batch in here] == [batch.documents for batch in there]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(here, there, strict=True))


# Weights that change during the run

WEIGHTS = {"news": {"weight": 2.0}, "books": {"weight": 1.0}, "code": {"weight": 1.0}}
FIRST, SECOND = 48, 96  # steps
LATER: dict[int, dict[str, float]] = {FIRST: {"news": 1.0, "code": 3.0}}


def test_weights_from_a_step_on_are_those_of_its_tokens(folder: Path) -> None:
    made = module(folder, WEIGHTS, weights_from={FIRST: {"news": 1.0, "code": 3.0}, SECOND: {"books": 1.0}})
    before, _ = made.order.sizes(0, 4 * FIRST)
    between, _ = made.order.sizes(4 * FIRST, 4 * SECOND)
    after, _ = made.order.sizes(4 * SECOND, 4 * SECOND + 100)
    assert before / before.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert between / between.sum() == pytest.approx([0.25, 0, 0.75], abs=0.02) and between[1] == 0
    assert after[0] == after[2] == 0 < after[1]
    unchanged = module(folder, WEIGHTS)
    assert seen(made, 0, 4 * FIRST) == seen(unchanged, 0, 4 * FIRST)


def state(made: PileDataModule, step: int) -> dict[str, Any]:
    made.trainer = SimpleNamespace(global_step=step)  # type: ignore[assignment]
    return made.state_dict()


@pytest.mark.parametrize(
    ("step", "was", "now", "accepted"),
    [
        (FIRST, {}, LATER, True),  # a phase was added that begins now
        (FIRST, LATER, {}, True),
        (FIRST - 8, {}, LATER, True),
        (FIRST, LATER, {FIRST: {"books": 1.0}}, True),  # ... or changed
        (FIRST, LATER, {SECOND: {"books": 1.0}}, True),  # ... or put off
        (SECOND, LATER, LATER | {SECOND: {"books": 1.0}}, True),
        (SECOND, LATER, LATER, True),
        (FIRST + 1, LATER, {}, False),  # it has begun
        (FIRST + 1, {}, LATER, False),
        (FIRST + 1, LATER, {FIRST: {"books": 1.0}}, False),
        (SECOND, LATER, {FIRST + 16: {"news": 1.0, "code": 3.0}}, False),
        (1000, LATER, LATER | {SECOND: {"books": 1.0}}, False),
    ],
)
def test_phases_that_have_not_begun_may_be_changed(
    folder: Path, step: int, was: dict[int, dict[str, float]], now: dict[int, dict[str, float]], accepted: bool
) -> None:
    saved = state(module(folder, WEIGHTS, weights_from=was), step)
    resumed = module(folder, WEIGHTS, weights_from=now)
    if not accepted:
        with pytest.raises(ValueError, match="made with weights"):
            resumed.load_state_dict(saved)
        return
    resumed.load_state_dict(saved)
    before = module(folder, WEIGHTS, weights_from=was)
    assert seen(before, 0, 4 * step) == seen(resumed, 0, 4 * step), "the trained packs differ from the order"


def test_weights_of_the_sources_may_not_change(folder: Path) -> None:
    saved = state(module(folder, WEIGHTS), 1)
    with pytest.raises(ValueError, match="made with weights"):
        module(folder, WEIGHTS | {"code": {"weight": 2.0}}).load_state_dict(saved)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 80), st.integers(1, 80), st.booleans())
@example(1, 1, 1, False)
@example(2, 5, 9, True)
def test_a_resume_that_is_accepted_repeats_and_misses_nothing(
    folder: Path, step: int, one: int, other: int, later: bool
) -> None:
    """Whatever phases are added, moved or taken away near the position: refused, or the packs before it are the same."""
    was = {one: {"books": 1.0}} if later else {}
    now = {other: {"code": 1.0}}
    before, after = (module(folder, WEIGHTS, weights_from=phases, global_batch=7) for phases in (was, now))
    try:
        after.load_state_dict(state(before, step))
    except ValueError:
        return
    located = [[made.order.locate(position) for position in range(7 * step)] for made in (before, after)]
    assert located[0] == located[1], "the positions before the checkpoint hold other packs now"


@pytest.mark.parametrize(
    ("sources", "arguments", "message"),
    [
        ({}, {"epochs": 1, "weights_from": LATER}, "exclude each other"),
        (WEIGHTS, {"epochs": 1}, "exclude each other"),
        ({"news": {"epochs": 1.0}, "books": {"weight": 1.0}}, {}, "exclude each other"),
        ({"news": {"epochs": 1.0}}, {"weights_from": {3: {"news": 1.0}}}, "exclude each other"),
        ({}, {"weights_from": {0: {"news": 1.0}}}, "must be at least 1"),
        ({}, {"weights_from": {4: {"nows": 1.0}}}, "names .'nows'."),
        ({}, {"weights_from": {4: {"news": 0.0}}}, "at least one above 0"),
        ({}, {"weights_from": {4: {"news": -1.0, "code": 2.0}}}, "0 or more"),
        ({"news": {"weight": 1.0}, "books": {}}, {}, "or none of them"),
        ({"news": {"weight": 0.0}}, {}, "above 0"),
        ({"news": {"epochs": 0.0}}, {}, "above 0"),
        ({"news": {"epochs": -1.0}}, {}, "above 0"),
        ({}, {"epochs": 0}, "above 0"),
        ({"news": {"epochs": math.nan}}, {}, "above 0"),
        ({"news": {"weight": math.nan}}, {}, "above 0"),
        ({}, {"weights_from": {4: {"news": math.nan}}}, "at least one above 0"),
        ({}, {"context": 7}, "at least 8"),
        ({}, {"micro_batch": 3}, "must divide"),
        ({}, {"condition_dropout": 1.0}, "must be in"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(
    folder: Path, sources: dict[str, dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module(folder, sources or None, **arguments)


# Resuming


@pytest.mark.parametrize("changed", ["seed", "context", "global_batch", "sources", "fingerprints"])
def test_a_resume_with_other_data_is_refused_by_name(folder: Path, tmp_path: Path, changed: str) -> None:
    saved = state(module(folder), 3)
    write_shards([Document((Segment("another text"),))], tmp_path, "books")
    other = {
        "seed": lambda: module(folder, seed=1),
        "context": lambda: module(folder, context=CONTEXT - 1),
        "global_batch": lambda: module(folder, global_batch=2),
        "sources": lambda: module(folder, {"books": {}, "news": {}, "code": {}}),
        "fingerprints": lambda: module(folder),
    }[changed]()
    if changed == "fingerprints":
        saved["fingerprints"]["books"] = module(tmp_path, {"books": {}}).train_data[0].fingerprint
    with pytest.raises(ValueError, match=f"made with {changed}"):
        other.load_state_dict(saved)
    module(folder).load_state_dict(state(module(folder), 3))


def test_a_resumed_run_continues_where_it_stopped(folder: Path) -> None:
    whole = batches(module(folder), max_steps=12)
    resumed = batches(module(folder), 5, 12, 2, 1)
    assert [batch.documents for batch in resumed] == [batch.documents[2:] for batch in whole[5:]]


# Tables of large sources


def test_the_table_of_a_large_source_is_kept_and_gives_the_same_order(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pile_app.data import sources

    monkeypatch.setattr(order, "WINDOW_PIECES", 16)
    monkeypatch.setattr(order, "GROUP_SHARDS", 2)
    plain = seen(module(folder), 0, 60)
    monkeypatch.setenv("PILE_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "LARGE_SOURCE", 10)
    monkeypatch.setattr("pile_app.data.files.available_cores", lambda: 1)
    assert seen(module(folder), 0, 60) == plain
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 2 * len(SIZES), "shards and packs of each source"
    with monkeypatch.context() as patch:
        patch.setattr(order.SourceOrder, "count_packs", lambda *_: pytest.fail("counted again"))
        assert seen(module(folder), 0, 60) == plain
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    assert seen(module(folder), 0, 60) == plain, "a damaged table must be rebuilt"
    assert seen(module(folder, context=CONTEXT + 1), 0, 60) != plain
    assert len(sorted(tmp_path.rglob("*.safetensors"))) == 4 * len(SIZES)


# Streams


@pytest.fixture
def many_shards(shards_of_streams: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 shards of texts, and 12, of a few packs each."""
    monkeypatch.setattr(order, "STREAM_PACKS", 1)
    return shards_of_streams


@pytest.fixture(scope="module")
def shards_of_streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    for name, shards in {"news": 40, "books": 12}.items():
        lengths = np.random.default_rng(shards).integers(1, 60, 12 * shards).tolist()
        documents = [Document((Segment("x" * length),), f"{name}-{n}") for n, length in enumerate(lengths)]
        for shard in range(shards):
            write_shards(documents[12 * shard : 12 * shard + 12], folder, f"{name}-{shard:03d}")
    return folder


@pytest.mark.parametrize(("world_size", "micro_batch", "num_workers"), [(1, 8, 0), (1, 2, 2), (2, 4, 0), (4, 1, 0), (8, 1, 0)])
def test_global_batches_are_the_same_whatever_the_devices_micro_batches_and_workers(
    many_shards: Path, world_size: int, micro_batch: int, num_workers: int
) -> None:
    sources: dict[str, dict[str, Any]] = {"news": {}, "books": {}}
    plain = module(many_shards, sources, epochs=1, global_batch=8)
    assert plain.order.streams == 8
    wanted = {number: pack for batch in batches(plain, 3) for number, pack in zip(batch.numbers, batch.documents, strict=True)}
    made = module(many_shards, sources, epochs=1, global_batch=8, micro_batch=micro_batch, num_workers=num_workers)
    found = [batch for rank in range(world_size) for batch in batches(made, 3, world_size=world_size, rank=rank)]
    seen_there = [(number, pack) for batch in found for number, pack in zip(batch.numbers, batch.documents, strict=True)]
    assert len(seen_there) == len(wanted) and dict(seen_there) == wanted


def test_with_streams_an_epoch_is_every_document_exactly_once(many_shards: Path) -> None:
    made = module(many_shards, {"news": {}, "books": {}}, epochs=2, global_batch=8)
    packs = [pack for batch in batches(made) for pack in batch.documents]
    counts = Counter((key, epoch) for pack in packs for _, key, epoch, start, _ in pack if start == 0)
    assert len(counts) == 2 * 12 * 52 and set(counts.values()) == {1}
    assert sum(not pack for pack in packs) < 2 * (8 + 8)


def test_ranks_validate_on_different_shards(many_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "VALIDATION_PIECES", 60)
    source = Source(str(many_shards / "books-*.tar"), str(many_shards / "news-*.tar"))
    made = PileDataModule({"news": source}, VOCABULARY, ByteTokenizer(), CONTEXT, global_batch=8)
    made.setup()
    keys: list[set[str]] = []
    for rank in range(4):
        made.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 4, "rank": rank})  # type: ignore[assignment]
        keys.append({key for batch in made.val_dataloader() for pack in batch.documents for _, key, *_ in pack})
    assert sum(map(len, keys)) == len(set.union(*keys)) == 12 * 40
    of_shards = [{int(key.split("-")[1]) // 12 for key in of_rank} for of_rank in keys]
    assert all(len(a & b) <= 5 for n, a in enumerate(of_shards) for b in of_shards[:n])


def test_a_source_may_name_several_patterns(many_shards: Path) -> None:
    patterns = [str(many_shards / f"news-{n:03d}-*.tar") for n in (3, 7)]
    made = PileDataModule({"news": Source(patterns, patterns[:1])}, VOCABULARY, ByteTokenizer(), CONTEXT, epochs=1)
    made.setup()
    assert len(whole_documents(seen(made, 0, made.order.length or 0))) == 24 and len(made.validation_data[0]) == 12


# Recipes


def test_a_mistyped_pattern_does_not_run_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine" / "prepare.py"
    recipe.parent.mkdir()
    recipe.write_text(
        "from pathlib import Path\nfrom pile_app.data.shards import write_shards\n"
        "from pile_app.documents import Document, Segment\n"
        "here = Path(__file__).parent\n(here / 'ran').touch()\n"
        "write_shards([Document((Segment('some text'),))] * 3, here / 'shards', 'text-train')\n"
    )

    def prepared(pattern: str) -> bool:
        source = Source(str(tmp_path / pattern))
        made = PileDataModule({"x": source}, VOCABULARY, ByteTokenizer(), CONTEXT, prepare=str(recipe))
        (recipe.parent / "ran").unlink(missing_ok=True)
        try:
            made.prepare_data()
        except RuntimeError as error:
            assert "no shard matches" in str(error) or "does not exist" in str(error)
        return (recipe.parent / "ran").exists()

    assert not prepared("elsewhere/text-train-*.tar"), "the recipe does not write there"
    assert prepared("mine/shards/text-train-*.tar")
    assert not prepared("mine/shards/text-train-*.tar") and not prepared("mine/shards/txt-train-*.tar")


# Condition dropout


def test_hidden_segments_are_planned_and_chats_and_labelled_documents_keep_theirs(tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        for n in range(300):
            texts = [Segment(f"one {n}"), Segment("two two two"), Segment("x" * (20 + n % 60))]
            question = Segment(f"what is {n}?", loss=False)
            yield Document(tuple(texts[: 1 + n % 3]), f"captions-{n}", n % 2 == 0)
            yield Document((question, Segment("an answer"), question, Segment("another")), f"chat-{n}")
            yield Document((Segment(f"a picture {n}", loss=False), Segment("class 3")), f"labelled-{n}")

    write_shards(documents(), tmp_path, "x")
    made = module(tmp_path, {"x": {}}, epochs=2, condition_dropout=0.5, global_batch=8)
    hidden, planned = Counter[str](), 0
    for batch in batches(made):
        assert batch.normalizer == max(1, len(batch.targets[TEXT]))
        planned += len(batch.targets[TEXT])
    dataset = made.train_dataset()
    for position in range(made.order.length or 0):
        for one in dataset.documents(position):
            hidden[one.key.split("-")[0]] += one.dropped > 0
    assert 150 < hidden["captions"] < 260, "half of 400"
    assert not hidden["chat"] and not hidden["labelled"]


def test_a_source_that_lost_most_samples_at_indexing_stops_the_run(tmp_path: Path) -> None:
    import tarfile
    from io import BytesIO

    from pile_app.training.callbacks import DataReport

    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        for n in range(300):
            member = tarfile.TarInfo(f"{n:03d}.txt")
            data = b"\xff\xfe\x00\x80" if n % 10 else b"a good text"
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    made = module(tmp_path, {"x": {}}, epochs=1)
    strategy = SimpleNamespace(barrier=lambda name: None)
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=0, strategy=strategy, datamodule=made)
    with pytest.raises(ShardError, match=r"'x': 270 of 300 samples cannot be used .*invalid_utf8.*data.max_rejected_share"):
        DataReport(tmp_path, 0.01).on_train_start(trainer, None)  # type: ignore[arg-type]
    DataReport(tmp_path, 0.95).on_train_start(trainer, None)  # type: ignore[arg-type]


def test_transforms_of_a_source_change_its_training_and_not_its_validation(
    tmp_path: Path, image: Callable[[int], Segment]
) -> None:
    write_shards([Document((image(n),), f"{n}") for n in range(8)], tmp_path, "x")
    pattern, vocabulary = str(tmp_path / "*.tar"), Vocabulary(image_codes=12, image_shape=(1, 8, 8), image_grid=(2, 2))

    def pixels(transforms: list[str]) -> tuple[np.ndarray, np.ndarray]:
        sources = {"x": Source(pattern, pattern, transforms=transforms)}
        made = PileDataModule(sources, vocabulary, ByteTokenizer(), CONTEXT, global_batch=1, epochs=1)
        made.setup()
        train = made.train_dataset()[0].images.numpy()
        made.trainer = SimpleNamespace(distributed_sampler_kwargs=None)  # type: ignore[assignment]
        return train, next(iter(made.val_dataloader())).images.numpy()

    plain, flipped = pixels([]), pixels(["flip(1.0)"])
    assert np.array_equal(plain[0][..., ::-1], flipped[0]) or np.array_equal(plain[0][..., ::-1, :], flipped[0])
    assert np.array_equal(plain[1], flipped[1])
    with pytest.raises(ValueError, match="transforms: 'flop' cannot be used"):
        pixels(["flop"])


def test_waiting_for_data_is_measured_apart_from_the_work_between_batches(folder: Path) -> None:
    data = module(folder)
    dataset = data.train_dataset()
    slow = SimpleNamespace(__getitems__=lambda positions: (time.sleep(0.05), dataset.__getitems__(positions))[1])
    loader = data._loader(slow, [[0], [1], [2]])  # type: ignore[arg-type]
    for _ in loader:
        time.sleep(0.1)
    assert 0.15 <= loader.waited < 0.3
