"""The data module: sources of shards in, batches out, on the ordinary PyTorch `DataLoader`.

A map-style dataset makes the pack of a position; a batch sampler lists the positions of this rank, starting at the optimizer
step that is resumed. No worker holds state and the sampler has a length, so Lightning neither fetches a batch ahead that a
resumed run would lose, nor saves a loader state that only fits rank 0.

    global batch of step s = positions [s * G, (s + 1) * G); rank r of W takes the r-th of W equal parts, in micro-batches
"""

from __future__ import annotations

import heapq
import math
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pile_app.data.annotation import Annotator
from pile_app.data.assembly import PackedDocument, assemble
from pile_app.data.batch import Batch
from pile_app.data.files import cache_folder
from pile_app.data.order import (
    ORDER_VERSION,
    Phase,
    Piece,
    SourceOrder,
    TrainingOrder,
    ValidationOrder,
    count_streams,
    pack_weights,
)
from pile_app.data.remote import Prefetcher, ShardCache, Wanted, is_remote
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import Tokenizer
from pile_app.data.transforms import Transforms
from pile_app.documents import BadSample, Document
from pile_app.vocabulary import Vocabulary


@dataclass
class Source:
    """A named set of shards.

    Args:
        train: shards to train on: paths or URLs with wildcards or braces (`data/x/train-{000..099}.tar`, `s3://bucket/x/*.tar`),
            one pattern or several.
        validation: shards to validate on; None: none.
        weight: fraction of the training tokens, in any unit; None (then for all sources): its size.
        epochs: passes over this source, 0.5 for half of it; the run ends when all sources have had theirs. Instead of weights.
        fields: which files and JSON fields of a sample are the segments of a document, e.g. `[jpg|png, json.caption|txt]`;
            None: inferred from the first samples and printed.
        transforms: augmentations of the training samples, e.g. `[flip, crop(0.8), my.module.function]`.
    """

    train: str | list[str]
    validation: str | list[str] | None = None
    weight: float | None = None
    epochs: float | None = None
    fields: Any = None
    transforms: list[str] = field(default_factory=list)


@dataclass(eq=False)
class PackDataset(Dataset[Batch]):
    """Positions -> their packs, as one batch. See `PileDataModule` for the fields.

    Training batches carry the normalizer of the whole optimizer step, which consists of `global_batch` packs.
    """

    sources: Sequence[SourceData]
    order: TrainingOrder | ValidationOrder
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    context: int
    global_batch: int
    annotator: Annotator | None = None
    transforms: Mapping[int, Transforms] = field(default_factory=dict)  # by source
    _threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_threads": None}

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Batch:
        tokens, targets = self._step_sizes(positions[0] // self.global_batch)
        read = SourceData.document_to_train if self.annotator is None else SourceData.document_or_reason
        return assemble(
            [[self._arranged(piece, read) for piece in self.order.pack(position)] for position in positions],
            self.vocabulary,
            self.tokenizer,
            self.context,
            numbers=positions,
            normalizer=targets,
            source_tokens=tokens,
            decode=self._decode,
            annotator=self.annotator,
            transforms=self.transforms,
        )

    def documents(self, position: int) -> list[PackedDocument]:
        """The pieces in the pack of a position, in order, as they are read there; with their texts, for people."""
        return [self._arranged(piece, SourceData.document_or_reason) for piece in self.order.pack(position)]

    def _arranged(self, piece: Piece, read: Callable[..., tuple[str, Document | BadSample]]) -> PackedDocument:
        """A piece with the texts, the order and the hidden segments that are drawn for its epoch."""
        draw, epoch, number = self.order.draws[piece.source], piece.epoch, piece.document
        span = None if piece.whole else (piece.start, piece.stop)
        key, document = read(self.sources[piece.source], number, partial(draw.text, epoch, number), span)
        if isinstance(document, BadSample):
            return PackedDocument(piece, key, document)
        if self.annotator is not None:  # labels may be in the text, and in the meta
            return PackedDocument(piece, key, self.annotator.arrange(document))
        segments, dropped = document.segments, 0
        if len(segments) > 1:
            # Documents longer than the context were cut in the order that they are stored in.
            if not document.ordered and piece.whole:
                segments = tuple(segments[i] for i in draw.order(epoch, number, len(segments)))
                document = Document(segments, key, True, document.meta)
            if all(segment.loss for segment in segments):
                dropped = draw.hidden(epoch, number, len(segments))
        return PackedDocument(piece, key, document, dropped)

    @lru_cache(8)  # noqa: B019 (lives as long as the run)
    def _step_sizes(self, step: int) -> tuple[list[int], int]:
        """(tokens of each source, targets) of an optimizer step; nothing while validating."""
        if isinstance(self.order, ValidationOrder):
            return [], 0
        tokens, targets = self.order.sizes(step * self.global_batch, (step + 1) * self.global_batch)
        return tokens.tolist(), max(1, targets)

    def _decode(self, function: Callable[[Any], Any], media: Iterable[Any]) -> Iterable[Any]:
        """In a worker, two threads decode media: decoders release Python's lock, so this hides the time of the Python code.

        Not in the training process, whose threads are the model's.
        """
        if get_worker_info() is None:
            return map(function, media)
        self._threads = self._threads or ThreadPoolExecutor(2)
        items = list(media)
        halves = (items[: len(items) // 2], items[len(items) // 2 :])  # a task per item would cost as much as a small item
        return chain.from_iterable(self._threads.map(lambda half: list(map(function, half)), halves))


def data_parallel(trainer: Trainer) -> tuple[int, int]:
    """(number of parts that each step is divided into, the part of this device). Devices that share the layers of the model
    (tensor parallel) train on the same part."""
    arguments = trainer.distributed_sampler_kwargs  # None on a single device
    return (arguments["num_replicas"], arguments["rank"]) if arguments else (1, 0)


class StepBatches(Sampler[list[int]]):
    """Positions of each micro-batch of one rank, from optimizer step `start` up to `steps`.

    Its length counts all steps, including those before `start`, as Lightning counts them.
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


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """SLURM signals the workers too; a worker that ends would end the run before its last step is saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At the end of the process: Python would send SIGTERM to them, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a killed worker as an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


RESTORE = {  # part of the identity of the data -> how to resume if it has changed
    "seed": "set data.seed back",
    "context": "set data.context back",
    "global_batch": "set data.global_batch back (devices and data.micro_batch may change)",
    "sources": "name the same sources in the same order",
    "tokenizer": "set model.tokenizer back",
    "fingerprints": "restore the shards",
    "streams": "restore the shards",
    "weights": "set the weights back; data.weights_from may change them from a step on that is still to come",
    "end": "set data.epochs back",
}


class PileDataModule(LightningDataModule):
    """Text, image and audio shards as packed batches.

    Args:
        sources: name -> shards. One of text, one of images, one of sounds, or any mixture.
        vocabulary: of the model (set by `train.py`).
        tokenizer: of the model (set by `train.py`).
        context: tokens of a pack.
        global_batch: packs of one optimizer step, over all devices.
        micro_batch: packs that one device computes at once; None: all of its part. Gradients of the micro-batches are
            accumulated. `global_batch` must be a multiple of devices x micro_batch.
        epochs: length of the run in passes over all sources, each document once in each; None: given by `trainer.max_steps`, or
            by the `epochs` of each source.
        weights_from: optimizer step -> source -> weight from that step on, for mixtures that change during the run. A source
            that is not named has weight 0. Steps that are still to come may be changed when a run is resumed.
        seed: of the order of the data and of all random choices about documents.
        condition_dropout: fraction of the documents with several segments, all of them learned, whose first ones are hidden, so
            that guidance has an unconditional model to compare with, 0 to 1.
        num_workers: loader processes; 0: the training process itself.
        prepare: a recipe (`data/<name>/prepare.py`) that is run if it has not made its shards yet.
        max_rejected_share: the run stops when more than this fraction of its documents cannot be used.
        cache: folder for remote shards, which several runs and nodes may share; None: `~/.cache/pile/shards`.
        cache_gigabytes: bound on its size.
        allow_pipe: run the commands of `pipe:` URLs. The author of the configuration can then run programs.
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
        given = [source.transforms for source in sources.values()]
        self.transforms = {number: Transforms(specs, seed) for number, specs in enumerate(given) if specs}
        self.train_data: list[SourceData] = []
        self.validation_data: list[SourceData] = []
        self._restored: dict[str, Any] | None = None
        self._prefetcher: Prefetcher | None = None

    # -- Before training: one process per node makes missing files.

    def _open(self, name: str, split: str) -> SourceData:
        pattern, fields = getattr(self.sources[name], split), self.sources[name].fields
        return SourceData(name, pattern, self.vocabulary, self.tokenizer, self.context, self.cache, fields=fields)

    def _open_train(self) -> tuple[list[SourceData], list[SourceOrder]]:
        data = [self._open(name, "train") for name in self.sources]
        streams = count_streams([source.tokens for source in data], self.global_batch)
        dropout = self.condition_dropout if self.annotator is None else 0.0
        return data, [source.order(self.seed, streams, dropout) for source in data]

    def _open_validation(self) -> list[SourceData]:
        return [self._open(name, "validation") for name, source in self.sources.items() if source.validation]

    def prepare_data(self) -> None:
        if self.prepare is not None and any(_is_unmade(one, self.prepare) for one in self.sources.values()):
            run_recipe(self.prepare)
        opened = self._open_validation()
        if self.trainer is None or self.trainer.state.fn != "validate":
            opened = self._open_train()[0] + opened
        for data in opened:
            print(data.describe(), file=sys.stderr, flush=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the sources. With `stage` "validate" the shards of training are not opened, unless they are already."""
        if self.train_data:
            return
        self.validation_data = self._open_validation()
        self.validation_names = [data.name for data in self.validation_data]
        if stage != "validate":
            self.train_data, orders = self._open_train()
            self.order = self._make_order(orders)
        self.validation_order = ValidationOrder([data.tokens for data in self.validation_data], self.context)
        if self._restored is not None:
            self._check_restored(self._restored)

    def _make_order(self, orders: list[SourceOrder]) -> TrainingOrder:
        sizes = [order.packs_per_epoch for order in orders]
        given = [source.epochs for source in self.sources.values()]
        make = partial(TrainingOrder, orders, global_batch=self.global_batch)
        if any(epochs is not None for epochs in given):  # exactly so many packs of each, then nothing
            packs = (math.ceil(size * (1.0 if n is None else n)) for size, n in zip(sizes, given, strict=True))
            return make([Phase(0, tuple(packs), exact=True)])
        if self.epochs is not None:  # each is a phase of whole steps, so that it is complete before the next begins
            phases = [Phase(None if epoch else 0, tuple(sizes), exact=True) for epoch in range(math.ceil(self.epochs))]
            order = make(phases)
            rest = self.epochs - len(phases)  # 0, or the missing part of the last epoch as a negative number
            return make(phases, end=order.first(len(phases) - 1) + math.ceil((1 + rest) * sum(sizes))) if rest else order
        weights = [source.weight for source in self.sources.values() if source.weight is not None]
        phases = [Phase(0, pack_weights(orders, weights) if weights else tuple(sizes))]
        for step, later in sorted(self.weights_from.items()):
            weights = [later.get(name, 0.0) for name in self.sources]
            phases.append(Phase(step * self.global_batch, pack_weights(orders, weights)))
        return make(phases)

    @property
    def source_names(self) -> list[str]:
        return list(self.sources)

    def steps(self, trainer: Trainer) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: neither `data.epochs`, nor those of the sources, nor `trainer.max_steps` is given.
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
            ValueError: the global batch cannot be divided like that.
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

    # -- The checkpoint holds the position; it is derived from optimizer steps, never from a loader's state.

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"position": self.trainer.global_step * self.global_batch, **self.identity()}

    def identity(self) -> dict[str, Any]:
        """Everything that the order of the data depends on: if it is the same, the same positions hold the same packs."""
        order = self.order
        phases = [[order.first(number), phase.exact, *phase.weights] for number, phase in enumerate(order.phases)]
        return {
            "global_batch": self.global_batch,
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "context": self.context,
            "weights": phases,
            "end": order.end,
            "streams": order.streams,
            "sources": self.source_names,
            "tokenizer": self.vocabulary.tokenizer,
            "fingerprints": {data.name: data.fingerprint for data in self.train_data},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if self.train_data:
            self._check_restored(state_dict)

    def _check_restored(self, state: dict[str, Any]) -> None:
        def before(identity: dict[str, Any]) -> dict[str, Any]:
            """Phases that begin, and an end that comes, after the position do not change the packs before it."""
            phases = [phase for phase in identity["weights"] if not phase[0] or phase[0] < state["position"]]
            end = identity["end"] if identity.get("end") is not None and identity["end"] < state["position"] else None
            return identity | {"weights": phases, "end": end}

        if state["order_version"] != ORDER_VERSION:
            raise ValueError(
                f"the checkpoint was made with order_version {state['order_version']}, now it is {ORDER_VERSION}: continue "
                "with the version of pile_app that the run began with, or begin another run with another --name"
            )
        was, now = before(state), before(self.identity())
        for key, fix in RESTORE.items():
            old, new = was[key], now[key]
            if old != new:
                if isinstance(old, dict):  # only those that differ
                    names = sorted(name for name in old | new if old.get(name) != new.get(name))
                    old, new = ({name: values.get(name) for name in names} for values in (old, new))
                raise ValueError(
                    f"the checkpoint was made with {key} {old}, now it is {new}: the data would not continue where "
                    f"it stopped. To resume, {fix}; or begin another run with another --name"
                )

    # -- Loaders.

    def train_dataset(self) -> PackDataset:
        """The packs of all positions."""
        return self._dataset(self.train_data, self.order, self.transforms)

    def _dataset(self, data: list[SourceData], order: TrainingOrder | ValidationOrder, transforms: Any = None) -> PackDataset:
        model = self.vocabulary, self.tokenizer, self.context
        return PackDataset(data, order, *model, self.global_batch, self.annotator, transforms or {})

    def _loader(self, dataset: Dataset[Any], batches: Sampler[list[int]] | list[list[int]]) -> DataLoader[Batch]:
        import torch

        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
        is_remote = any(any(data.remote) for data in self.train_data + self.validation_data)
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            # A fork would copy the locks of the threads that fetch.
            multiprocessing_context="forkserver" if self.num_workers and is_remote else None,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # or creating the iterator would draw from the global generator
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        world_size, rank = data_parallel(self.trainer)
        micro, _ = self.micro_batches(world_size)
        start, steps = self.trainer.global_step, self.steps(self.trainer)
        self.teardown()
        if self.trainer.local_rank == 0 and any(any(data.remote) for data in self.train_data):
            nodes = getattr(self.trainer, "num_nodes", 1)
            per_rank, run = self.global_batch // world_size, self.global_batch // self.order.streams
            stop = min((rank + -(-world_size // nodes)) * per_rank, self.global_batch)
            streams = range(rank * per_rank // run, -(-stop // run))  # of this node: its ranks are numbered from this one on
            ahead = shards_ahead(self.train_data, self.order, streams, start * self.global_batch, steps * self.global_batch)
            self._prefetcher = Prefetcher(self.cache, ahead, ahead=4 * max(16, len(streams)))
        return self._loader(self.train_dataset(), StepBatches(start, steps, self.global_batch, micro, rank, world_size))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self._prefetcher is not None and self.trainer is not None and self.trainer.training:
            self._prefetcher.advance(min(batch.numbers) - 2 * self.global_batch)  # the positions of shards are estimates
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
        count = -(-len(self.validation_order) // (micro * world_size))  # every rank has as many; past the end, packs are empty
        batches = [list(range(first * micro, (first + 1) * micro)) for first in range(rank * count, (rank + 1) * count)]
        return self._loader(self._dataset(self.validation_data, self.validation_order), batches)


def shards_ahead(
    sources: Sequence[SourceData], order: TrainingOrder, streams: range, position: int, stop: int
) -> Iterator[tuple[float, Wanted]]:
    """(about the position after its last use, file) of the remote shards of some streams, in the order of their first use."""

    def of_stream(source: int, stream: int) -> Iterator[tuple[float, float, int, int]]:
        for (first, group), (end, _) in pairwise(order.upcoming_shards(source, stream, position)):
            if first >= stop:
                return
            yield from ((first, end, source, shard) for shard in group)

    for _, end, source, shard in heapq.merge(*(of_stream(source, c) for source in range(len(sources)) for c in streams)):
        data = sources[source]
        if data.remote[shard]:
            yield end, Wanted(data.paths[shard], data.sizes[shard], data.index(shard).check_tar)


def _is_unmade(source: Source, recipe: str) -> bool:
    """Whether a pattern of the source is in the folder of the recipe, and there is no shard where it points.

    Where there are other shards, the pattern is mistyped.
    """
    given = [pattern for pattern in (source.train, source.validation) if pattern]
    for pattern in chain.from_iterable([pattern] if isinstance(pattern, str) else pattern for pattern in given):
        folder = Path(re.split(r"[*?\[{]", pattern, maxsplit=1)[0] + "x").parent
        is_recipes = Path(recipe).resolve().parent in folder.resolve().parents
        if not is_remote(pattern) and is_recipes and not any(folder.glob("*.tar")):
            return True
    return False


def run_recipe(recipe: str) -> None:
    """Run `python <recipe>` in a process of its own (speech synthesis has global state).

    Raises:
        FileNotFoundError: there is no such recipe.
        RuntimeError: it failed; its output says why.
    """
    if not Path(recipe).is_file():
        raise FileNotFoundError(f"data.prepare names the recipe {recipe!r}, which does not exist in {os.getcwd()}")
    print(f"preparing data: python {recipe}", flush=True)
    if subprocess.run([sys.executable, recipe]).returncode:
        raise RuntimeError(f"the recipe {recipe!r} failed; see its message above")


def check_data(
    sources: dict[str, Source],
    context: int,
    global_batch: int,
    micro_batch: int | None,
    condition_dropout: float,
    epochs: float | None,
    weights_from: Mapping[int, Mapping[str, float]] | None = None,
) -> None:
    """Raise ValueError for invalid settings."""
    weights = [source.weight is not None for source in sources.values()]
    given = any(source.epochs is not None for source in sources.values()) + (epochs is not None)
    positive = {f"sources.{name}.{key}": vars(source)[key] for name, source in sources.items() for key in ("weight", "epochs")}
    problems = [
        (not sources, "data.sources is empty: name at least one, e.g. {text: {train: 'shards/train-*.tar'}}"),
        (
            given + (any(weights) or bool(weights_from)) > 1,
            "weights and epochs exclude each other: give data.epochs (passes over all sources), or epochs to the sources, or "
            "weights with trainer.max_steps",
        ),
        (any(weights) and not all(weights), "give every source of data.sources a weight, or none of them (then by their size)"),
        (context < 8, f"data.context={context} tokens is too short: at least 8"),
        (
            global_batch < 1 or (micro_batch is not None and (micro_batch < 1 or global_batch % micro_batch > 0)),
            f"data.micro_batch={micro_batch} must divide data.global_batch={global_batch}, both at least 1",
        ),
        (not 0 <= condition_dropout < 1, f"data.condition_dropout={condition_dropout} must be in [0, 1)"),
    ]
    for name, value in (positive | {"epochs": epochs}).items():
        problems.append((value is not None and not value > 0, f"data.{name} must be above 0, not {value}"))
    for step, later in (weights_from or {}).items():
        unknown = sorted(set(later) - set(sources))
        bad = any(weight < 0 for weight in later.values()) or not sum(later.values()) > 0
        problems += [
            (step < 1, f"data.weights_from: step {step} must be at least 1; the first weights belong to data.sources"),
            (bool(unknown), f"data.weights_from.{step} names {unknown}, which data.sources does not"),
            (bad, f"data.weights_from.{step}: weights must be 0 or more, at least one above 0, not {dict(later)}"),
        ]
    for is_wrong, message in problems:
        if is_wrong:
            raise ValueError(message)
