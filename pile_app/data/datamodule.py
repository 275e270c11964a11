"""The data module: sources of shards in, batches out, on the ordinary PyTorch `DataLoader`.

A map-style dataset makes the pack of a position; a batch sampler lists the positions of this rank, starting at the optimizer
step that is resumed. No worker holds state and the sampler has a length, so Lightning neither fetches a batch ahead that a
resumed run would lose, nor saves a loader state that only fits rank 0.

    global batch of step s = positions [s * G, (s + 1) * G); rank r of W takes the r-th of W equal parts, in micro-batches
"""

from __future__ import annotations

import heapq
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pile_app.data import shards
from pile_app.data.annotation import Annotator
from pile_app.data.assembly import PackedDocument, assemble
from pile_app.data.batch import Batch
from pile_app.data.order import (
    GROUP_SHARDS,
    ORDER_VERSION,
    Phase,
    Piece,
    SourceOrder,
    TrainingOrder,
    ValidationOrder,
    pack_weights,
    permutation,
    uniform,
)
from pile_app.data.remote import Prefetcher, ShardCache
from pile_app.data.sources import SourceData, cache_folder
from pile_app.data.tar import ShardError
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import BadSample, Document
from pile_app.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A named set of shards.

    Args:
        train: shards to train on: path or URL with wildcards or braces (`data/x/train-{000..099}.tar`, `s3://bucket/x/*.tar`).
        validation: shards to validate on; None: none.
        weight: share of the training tokens, in any unit; None (then for all sources): its size.
        epochs: passes over this source, 0.5 for half of it; the run ends when all sources have had theirs. Instead of weights.
    """

    train: str
    validation: str | None = None
    weight: float | None = None
    epochs: float | None = None


class PackDataset(Dataset[Batch]):
    """Positions -> their packs, as one batch. See `PileDataModule` for the arguments.

    Training batches carry the normalizer of the whole optimizer step, which `global_batch` packs make.
    """

    def __init__(
        self,
        sources: Sequence[SourceData],
        order: TrainingOrder | ValidationOrder,
        vocabulary: Vocabulary,
        tokenizer: Tokenizer,
        context: int,
        global_batch: int,
        seed: int,
        condition_dropout: float,
        annotator: Annotator | None = None,
    ) -> None:
        self.sources = sources
        self.order = order
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.context = context
        self.global_batch = global_batch
        self.seed = seed
        self.condition_dropout = condition_dropout
        self.annotator = annotator
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_threads": None}

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Batch:
        tokens, targets = self._step_sizes(positions[0] // self.global_batch)
        return assemble(
            [[self._arranged(position, *one) for one in enumerate(self.order.pack(position))] for position in positions],
            self.vocabulary,
            self.tokenizer,
            self.context,
            numbers=positions,
            normalizer=targets,
            source_tokens=tokens,
            decode=self._decode,
            annotator=self.annotator,
        )

    def documents(self, position: int) -> list[PackedDocument]:
        """What stands in the pack of a position, in order, as it is seen there; texts as they are, for people."""
        return [
            self._arranged(position, number, piece, self.sources[piece.source].document_or_reason(piece.document))
            for number, piece in enumerate(self.order.pack(position))
        ]

    def _arranged(
        self, position: int, number: int, piece: Piece, read: tuple[str, Document | BadSample] | None = None
    ) -> PackedDocument:
        """The `number`-th piece at a position: with its segments in the order they are seen in, and how many are hidden."""
        data = self.sources[piece.source]
        if self.annotator is not None:  # labels may stand in the text, and in the meta
            key, document = data.document_or_reason(piece.document)
            if not isinstance(document, BadSample):
                document = self.annotator.arrange(document)
            return PackedDocument(piece, key, document)
        key, document = read or data.document_to_train(piece.document)
        if isinstance(document, BadSample) or len(document.segments) < 2:
            return PackedDocument(piece, key, document)
        segments = document.segments
        # The cuts of a document longer than the context were made for the order that it is stored in.
        if not document.ordered and piece.whole:
            order = permutation(len(segments), self.seed, data.name, piece.epoch, piece.document, "segments")
            document = Document(tuple(segments[i] for i in order), key, True, document.meta)
        dropped = 0
        if self.condition_dropout:
            chance = uniform(self.seed, position, number, "condition") / self.condition_dropout
            if chance < 1:  # then it is uniform once more, and says after how many segments the document begins
                dropped = 1 + int(chance * (len(segments) - 1))
        return PackedDocument(piece, key, document, dropped)

    @lru_cache(8)  # noqa: B019 (lives as long as the run)
    def _step_sizes(self, step: int) -> tuple[list[int], int]:
        """(tokens of each source, targets) of an optimizer step; nothing while validating."""
        if isinstance(self.order, ValidationOrder):
            return [], 0
        tokens, targets = self.order.sizes(step * self.global_batch, (step + 1) * self.global_batch)
        return tokens.tolist(), max(1, targets)

    def _decode(self, function: Callable[[Any], Any], media: Iterable[Any]) -> Iterable[Any]:
        """In a worker, media are decoded by two threads: decoders leave Python's lock to others, and so hide what Python does.

        Not in the training process: its threads are the model's.
        """
        if get_worker_info() is None:
            return map(function, media)
        self._threads = self._threads or ThreadPoolExecutor(2)
        items = list(media)
        halves = (items[: len(items) // 2], items[len(items) // 2 :])  # a task for each item would cost as much as a small one
        return chain.from_iterable(self._threads.map(lambda half: list(map(function, half)), halves))


def data_parallel(trainer: Trainer) -> tuple[int, int]:
    """Number of parts that each step is shared out in, and the one of this device: devices that cut the layers of the model
    among themselves (tensor parallel) train on the same part."""
    share = trainer.distributed_sampler_kwargs  # None on a single device
    return (share["num_replicas"], share["rank"]) if share else (1, 0)


class StepBatches(Sampler[list[int]]):
    """Positions of each micro-batch of one rank, from optimizer step `start` up to `steps`.

    Its length counts all steps, those before `start` too, as Lightning counts them.
    """

    def __init__(self, start: int, steps: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
        self.start, self.steps = start, steps
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps * (self.global_batch // self.world_size // self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        per_rank = self.global_batch // self.world_size
        for step in range(self.start, self.steps):
            first = step * self.global_batch + self.rank * per_rank
            for offset in range(0, per_rank, self.micro_batch):
                yield list(range(first + offset, first + offset + self.micro_batch))


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(worker: int) -> None:
    """SLURM signals the workers too; one that went would take the run with it before its last step is saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """When the process ends: Python would ask them by SIGTERM, and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a worker that was killed for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class PileDataModule(LightningDataModule):
    """Text, image and audio shards as packed batches.

    Args:
        sources: name -> shards. One of text, one of images, one of sounds, or any mixture.
        vocabulary: of the model (set by `train.py`).
        tokenizer: of the model (set by `train.py`).
        context: tokens of a pack.
        global_batch: packs of one optimizer step, over all devices.
        micro_batch: packs that one device computes at once; None: as many as its share. Gradients of the micro-batches are
            accumulated. `global_batch` has to be a multiple of devices x micro_batch.
        epochs: length of the run in passes over all sources, each document once in each; None: `trainer.max_steps`, or the
            `epochs` of each source, say it.
        weights_from: optimizer step -> source -> weight from that step on, where shares change during the run. A source that is
            not named weighs nothing. Steps that are still to come may be changed when a run is resumed.
        seed: of the order of the data and of the condition dropout.
        condition_dropout: share of the documents with several segments whose first ones are hidden, so that guidance has an
            unconditional model to compare with, 0 to 1.
        num_workers: processes that load; 0: the training process itself.
        prepare: a recipe (`data/<name>/prepare.py`) that makes the shards where they are missing.
        max_rejected_share: the run stops when more than this share of its documents cannot be used.
        cache: folder for remote shards, which several runs and nodes may share; None: `~/.cache/pile/shards`.
        cache_gigabytes: what it may hold.
        allow_pipe: run the commands of `pipe:` URLs. Whoever writes the configuration then runs programs.
        annotator: of the model's objective (set by `train.py`).
    """

    def __init__(
        self,
        sources: dict[str, Source],
        vocabulary: Vocabulary | None = None,
        tokenizer: Tokenizer | None = None,
        context: int = 512,
        global_batch: int = 16,
        micro_batch: int | None = None,
        epochs: float | None = None,
        weights_from: dict[int, dict[str, float]] | None = None,
        seed: int = 0,
        condition_dropout: float = 0.1,
        num_workers: int = 0,
        prepare: str | None = None,
        max_rejected_share: float = 0.01,
        cache: str | None = None,
        cache_gigabytes: float = 100.0,
        allow_pipe: bool = False,
        annotator: Annotator | None = None,
    ) -> None:
        super().__init__()
        check_data(sources, context, global_batch, micro_batch, condition_dropout, epochs, weights_from)
        assert vocabulary is not None and tokenizer is not None
        self.sources = sources
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.annotator = annotator
        self.context = context
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.epochs = epochs
        self.weights_from = weights_from or {}
        self.seed = seed
        self.condition_dropout = condition_dropout
        self.num_workers = num_workers
        self.prepare = prepare
        self.max_rejected_share = max_rejected_share
        self.cache = ShardCache(cache or cache_folder() / "shards", int(cache_gigabytes * 1e9), allow_pipe)
        self.train_data: list[SourceData] = []
        self.validation_data: list[SourceData] = []
        self._restored: dict[str, Any] | None = None
        self._prefetcher: _ShardsAhead | None = None

    # -- Before training: one process a node makes what is missing.

    def _make_source(self, name: str, pattern: str) -> SourceData:
        return SourceData(name, pattern, self.vocabulary, self.tokenizer, self.context, self.cache)

    def prepare_data(self) -> None:
        patterns = [(n, pattern) for n, s in self.sources.items() for pattern in (s.train, s.validation) if pattern]
        if self.prepare is not None and any(not _exists(pattern) for _, pattern in patterns):
            run_recipe(self.prepare)
        trains = self.trainer is None or self.trainer.state.fn != "validate"
        for name, source in self.sources.items():
            if trains:
                self._make_source(name, source.train).order(self.seed)
            if source.validation is not None:
                self._make_source(name, source.validation)

    def setup(self, stage: str | None = None) -> None:
        """`stage` "validate", where nothing was set up before: no shard of training is opened, and there is no order of it."""
        if self.train_data:
            return
        self.validation_data = [
            self._make_source(name, source.validation) for name, source in self.sources.items() if source.validation is not None
        ]
        self.validation_names = [data.name for data in self.validation_data]
        if stage != "validate":
            self.train_data = [self._make_source(name, source.train) for name, source in self.sources.items()]
            self.order = self._make_order([data.order(self.seed) for data in self.train_data])
        self.validation_order = ValidationOrder([data.tokens for data in self.validation_data], self.context)
        if self._restored is not None:
            self._check_restored(self._restored)

    def _make_order(self, orders: list[SourceOrder]) -> TrainingOrder:
        sizes = [order.packs_per_epoch for order in orders]
        given = [source.epochs for source in self.sources.values()]
        if any(one is not None for one in given):  # exactly so many packs of each, then nothing
            weights = tuple(math.ceil(size * (1.0 if n is None else n)) for size, n in zip(sizes, given, strict=True))
            return TrainingOrder(orders, [Phase(0, weights, sum(weights))], self.seed)
        if self.epochs is not None:  # each a phase of whole steps, so that it is complete before the next begins
            steps = -(-sum(sizes) // self.global_batch)
            starts = [epoch * steps * self.global_batch for epoch in range(math.ceil(self.epochs))]
            phases = [Phase(start, tuple(sizes), start + sum(sizes)) for start in starts]
            share = self.epochs - len(starts) + 1  # of the last epoch
            return TrainingOrder(orders, phases, self.seed, starts[-1] + math.ceil(share * sum(sizes)))
        shares = [source.weight for source in self.sources.values() if source.weight is not None]
        phases = [Phase(0, pack_weights(orders, shares) if shares else tuple(sizes))]
        for step, weights_then in sorted(self.weights_from.items()):
            weights = pack_weights(orders, [weights_then.get(name, 0.0) for name in self.sources])
            phases.append(Phase(step * self.global_batch, weights))
        return TrainingOrder(orders, phases, self.seed)

    @property
    def source_names(self) -> list[str]:
        return list(self.sources)

    def steps(self, trainer: Trainer) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: neither `data.epochs`, nor those of the sources, nor `trainer.max_steps` says it.
        """
        if self.order.length is not None:
            in_epochs = -(-self.order.length // self.global_batch)
            return in_epochs if trainer.max_steps < 0 else min(in_epochs, trainer.max_steps)
        if trainer.max_steps < 0:
            raise ValueError("how long to train? Set trainer.max_steps (optimizer steps) or data.epochs (passes)")
        return trainer.max_steps

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """(packs of a micro-batch, micro-batches that one device accumulates for one optimizer step).

        Raises:
            ValueError: the global batch cannot be shared out so.
        """
        per_device, rest = divmod(self.global_batch, world_size)
        micro = self.micro_batch or per_device
        if rest or not per_device or per_device % micro:
            fitting = [w for w in range(1, self.global_batch + 1) if self.global_batch % (w * (self.micro_batch or 1)) == 0]
            raise ValueError(
                f"data.global_batch={self.global_batch} packs cannot be shared by {world_size} devices in micro-batches of "
                f"{micro}: devices x data.micro_batch must divide it (possible numbers of devices: {fitting})"
            )
        return micro, per_device // micro

    # -- The checkpoint holds the position; it is derived from optimizer steps, never from what a loader yielded.

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"position": self.trainer.global_step * self.global_batch, **self.identity()}

    def identity(self) -> dict[str, Any]:
        """What the order of the data hangs on: where it is the same, the same positions hold the same packs."""
        return {
            "global_batch": self.global_batch,
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "context": self.context,
            "weights": [
                [phase.first, phase.stop if phase.stop is None else min(phase.stop, self.order.length or 0), *phase.weights]
                for phase in self.order.phases
            ],
            "sources": self.source_names,
            "tokenizer": self.vocabulary.tokenizer,
            "fingerprints": {data.name: data.fingerprint for data in self.train_data},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if self.train_data:
            self._check_restored(state_dict)

    def _check_restored(self, state: dict[str, Any]) -> None:
        now = self.identity()
        # Shares that begin, and ends that come, after the position change nothing of what was read.
        position = state["position"]
        state, now = (
            one
            | {
                "weights": [
                    [first, stop if stop is not None and stop < position else None, *weights]
                    for first, stop, *weights in one["weights"]
                    if not first or first < position
                ]
            }
            for one in (state, now)
        )
        for key, mend in (
            ("order_version", "continue with the version of pile_app that the run began with"),
            ("seed", "set data.seed back"),
            ("context", "set data.context back"),
            ("global_batch", "set data.global_batch back (devices and data.micro_batch may change)"),
            ("sources", "name the same sources in the same order"),
            ("tokenizer", "set model.tokenizer back"),
            ("fingerprints", "restore the shards"),
            ("weights", "set the weights back; data.weights_from may change them from a step on that is still to come"),
        ):
            was, is_now = state[key], now[key]
            if was != is_now:
                if isinstance(was, dict):  # only those that differ
                    names = sorted(name for name in was | is_now if was.get(name) != is_now.get(name))
                    was, is_now = ({name: one.get(name) for name in names} for one in (was, is_now))
                raise ValueError(
                    f"the checkpoint was made with {key} {was}, now it is {is_now}: the data would not continue where "
                    f"it stopped. To resume, {mend}; or begin another run with another --name"
                )

    # -- Loaders.

    def train_dataset(self) -> PackDataset:
        """The packs of all positions."""
        return self._dataset(self.train_data, self.order, self.condition_dropout)

    def _dataset(self, data: list[SourceData], order: TrainingOrder | ValidationOrder, dropout: float) -> PackDataset:
        return PackDataset(
            data,
            order,
            self.vocabulary,
            self.tokenizer,
            self.context,
            self.global_batch,
            self.seed,
            dropout,
            self.annotator,
        )

    def _loader(self, dataset: Dataset[Any], batches: Sampler[list[int]] | list[list[int]]) -> DataLoader[Batch]:
        import torch

        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            # A fork would copy the locks of the threads that fetch.
            multiprocessing_context="forkserver" if self.num_workers and self._is_remote else None,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # or creating the iterator would draw from the global generator
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        world_size, rank = data_parallel(self.trainer)
        micro, _ = self.micro_batches(world_size)
        dataset = self.train_dataset()
        start, steps = self.trainer.global_step, self.steps(self.trainer)
        self._prefetch(start)
        return self._loader(dataset, StepBatches(start, steps, self.global_batch, micro, rank, world_size))

    @property
    def _is_remote(self) -> bool:
        return any(any(data.shards.remote) for data in self.train_data + self.validation_data)

    def _prefetch(self, step: int) -> None:
        """Fetches remote shards ahead of need, one process for all of a node."""
        self.teardown()
        assert self.trainer is not None
        if self.trainer.local_rank == 0 and any(any(data.shards.remote) for data in self.train_data):
            self._prefetcher = _ShardsAhead(self.train_data, self.order, self.cache, step * self.global_batch)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self._prefetcher is not None and self.trainer is not None and self.trainer.training:
            self._prefetcher.advance_to(min(batch.numbers))
        return batch

    def teardown(self, stage: str | None = None) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher = None

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not len(self.validation_order):
            return []
        assert self.trainer is not None
        world_size, rank = data_parallel(self.trainer)
        micro, _ = self.micro_batches(world_size)
        batches = -(-len(self.validation_order) // (micro * world_size))
        mine = [
            [(batch * world_size + rank) * micro + i for i in range(micro)] for batch in range(batches)
        ]  # past the end stand empty packs, so that every rank has as many batches
        dataset = self._dataset(self.validation_data, self.validation_order, 0.0)
        return self._loader(dataset, mine)


class _ShardsAhead:
    """Remote shards in the order that training will need them, from a position on, handed to a `Prefetcher`."""

    def __init__(self, sources: Sequence[SourceData], order: TrainingOrder, cache: ShardCache, position: int) -> None:
        self._ends: deque[float] = deque()  # position after the last use, of each file in the order of their first use
        self._used = 0
        remote = [number for number, data in enumerate(sources) if any(data.shards.remote)]
        streams = heapq.merge(*(self._of_source(number, sources[number], order, position) for number in remote))
        shards_ahead = 2 * GROUP_SHARDS * len(remote)
        self._prefetcher = Prefetcher(cache, self._files(streams, sources), shards_ahead, 2 * shards_ahead)

    @staticmethod
    def _of_source(
        number: int, data: SourceData, order: TrainingOrder, position: int
    ) -> Iterator[tuple[float, float, int, list[int]]]:
        """(about the position of its first use, and after its last, source, shards) of each group."""
        before, later = (int(order.counts(p)[number]) for p in (position, position + 100_000))
        stride = 100_000 / max(later - before, 1e-3)  # positions a pack of this source
        groups = order.sources[number].upcoming_shards(before)
        first, of_group = next(groups)
        for following, of_next in groups:
            yield position + (first - before) * stride, position + (following - before) * stride, number, of_group
            first, of_group = following, of_next

    def _files(
        self, streams: Iterator[tuple[float, float, int, list[int]]], sources: Sequence[SourceData]
    ) -> Iterator[tuple[str, int, Callable[[str], None]]]:
        for _, end, number, of_group in streams:
            data = sources[number].shards
            for shard in of_group:
                if data.remote[shard]:
                    self._ends.append(end)
                    index = data.index(shard)
                    yield data.paths[shard], index.tar_size, partial(shards.check_content, index=index)

    def advance_to(self, position: int) -> None:
        while self._ends and self._ends[0] < position:
            self._ends.popleft()
            self._used += 1
        self._prefetcher.advance(self._used)

    def close(self) -> None:
        self._prefetcher.close()


def _exists(pattern: str) -> bool:
    try:
        return bool(shards.expand_shards(pattern))
    except ShardError:
        return False


def run_recipe(recipe: str) -> None:
    """Runs `python <recipe>` in a process of its own (speech synthesis has global state).

    Raises:
        FileNotFoundError: there is no such recipe.
        RuntimeError: it failed; what it printed says why.
    """
    if not Path(recipe).is_file():
        raise FileNotFoundError(f"data.prepare names the recipe {recipe!r}, which does not exist in {os.getcwd()}")
    print(f"preparing data: python {recipe}", flush=True)
    if subprocess.run([sys.executable, recipe]).returncode:
        raise RuntimeError(f"the recipe {recipe!r} failed; its message stands above")


def check_data(
    sources: dict[str, Source],
    context: int,
    global_batch: int,
    micro_batch: int | None,
    condition_dropout: float,
    epochs: float | None,
    weights_from: Mapping[int, Mapping[str, float]] | None = None,
) -> None:
    """Raises ValueError for values that cannot be."""
    if not sources:
        raise ValueError("data.sources is empty: name at least one, e.g. {text: {train: 'shards/train-*.tar'}}")
    weights = [source.weight for source in sources.values()]
    given_epochs = any(source.epochs is not None for source in sources.values())
    given_weights = any(weight is not None for weight in weights)
    if given_epochs + (epochs is not None) + (given_weights or bool(weights_from)) > 1:
        raise ValueError(
            "weights and epochs exclude each other: give data.epochs (passes over all sources), or epochs to the sources, or "
            "weights with trainer.max_steps"
        )
    for step, shares in (weights_from or {}).items():
        if step < 1:
            raise ValueError(
                f"data.weights_from: step {step} must be at least 1; from the start on, weights stand in data.sources"
            )
        if unknown := sorted(set(shares) - set(sources)):
            raise ValueError(f"data.weights_from.{step} names {unknown}, which data.sources does not")
        if any(weight < 0 for weight in shares.values()) or not sum(shares.values()) > 0:
            raise ValueError(f"data.weights_from.{step}: weights must be 0 or more and one of them above, not {dict(shares)}")
    if any(weight is not None for weight in weights) and any(weight is None for weight in weights):
        raise ValueError("give every source of data.sources a weight, or none of them (then they weigh what they hold)")
    for name, source in sources.items():
        if source.weight is not None and not source.weight > 0:
            raise ValueError(f"data.sources.{name}.weight must be above 0, not {source.weight}; leave the source out instead")
        if source.epochs is not None and not source.epochs > 0:
            raise ValueError(f"data.sources.{name}.epochs must be above 0, not {source.epochs}; leave the source out instead")
    if context < 8:
        raise ValueError(f"data.context={context} tokens is too short: at least 8")
    if global_batch < 1 or (micro_batch is not None and (micro_batch < 1 or global_batch % micro_batch)):
        raise ValueError(f"data.micro_batch={micro_batch} must divide data.global_batch={global_batch}, both at least 1")
    if not 0 <= condition_dropout < 1:
        raise ValueError(f"data.condition_dropout={condition_dropout} must be in [0, 1)")
    if epochs is not None and not epochs > 0:
        raise ValueError(f"data.epochs={epochs} must be above 0")
