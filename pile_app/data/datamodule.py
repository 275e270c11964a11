"""The data module: sources of shards in, batches out, on the ordinary PyTorch `DataLoader`.

A map-style dataset makes the pack of a position; a batch sampler lists the positions of this rank from the resumed step on, so
nothing has state: rank r of W takes [s * G + r * G // W, s * G + (r + 1) * G // W) of step s."""

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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pile_app.bundled import copy_recipe
from pile_app.data import order as data_order
from pile_app.data.annotation import Annotator
from pile_app.data.assembly import PackedDocument, assemble
from pile_app.data.batch import Batch
from pile_app.data.files import cache_folder, worker_context
from pile_app.data.order import ORDER_VERSION, Phase, Piece, SourceOrder, TrainingOrder, ValidationOrder
from pile_app.data.remote import Prefetcher, ShardCache, Wanted, is_remote
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import Tokenizer
from pile_app.data.transforms import Transforms
from pile_app.documents import BadSample, Document
from pile_app.vocabulary import Vocabulary


@dataclass
class Source:
    """Name a set of shards.

    Args:
        train: shards to train on: one or several paths or URLs with wildcards or braces (`data/x/train-{000..099}.tar`).
        validation: shards to validate on, if any.
        weight: fraction of the training tokens, in any unit; None, for all sources: proportional to size.
        epochs: passes through this source instead of a weight; the run ends after all of them.
        fields: files and JSON fields of a sample that are segments, e.g. `[jpg|png, json.caption|txt]`; None: inferred.
        transforms: augmentations of the training samples, e.g. `[flip, crop(0.8), my.module.function]`."""

    train: str | list[str]
    validation: str | list[str] | None = None
    weight: float | None = None
    epochs: float | None = None
    fields: Any = None
    transforms: list[str] = field(default_factory=list)


@dataclass(eq=False)
class PackDataset(Dataset[Batch]):
    """Map positions to a batch of packs, with the normalizer of the whole optimizer step when training."""

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
        tokens, targets = self._step_sizes(max(positions[0], ~positions[0]) // self.global_batch)
        positions = [position for position in positions if position >= 0]
        read = SourceData.document_to_train if self.annotator is None else SourceData.document_or_reason
        packs = [[self._arranged(piece, read) for piece in self.order.pack(position)] for position in positions] or [[]]
        model, step = (self.vocabulary, self.tokenizer, self.context), (positions, targets, tokens)
        batch = assemble(packs, *model, *step, decode=self._decode, annotator=self.annotator, transforms=self.transforms)
        batch.documents = batch.documents[: len(positions)]
        return batch

    def documents(self, position: int) -> list[PackedDocument]:
        """Read the pieces in the pack of a position, in order, with their texts."""
        return [self._arranged(piece, SourceData.document_or_reason) for piece in self.order.pack(position)]

    def _arranged(self, piece: Piece, read: Callable[..., tuple[str, Document | BadSample]]) -> PackedDocument:
        """Read a piece with the texts, order and hidden segments drawn for its epoch."""
        draw, epoch, number = self.order.draws[piece.source], piece.epoch, piece.document
        span = None if piece.whole else (piece.start, piece.stop)
        key, document = read(self.sources[piece.source], number, partial(draw.text, epoch, number), span)
        if isinstance(document, BadSample) or (len(document.segments) == 1 and self.annotator is None):
            return PackedDocument(piece, key, document)
        if self.annotator is not None:  # labels may be in the text, and in the meta
            return PackedDocument(piece, key, self.annotator.arrange(document))
        segments = document.segments
        # Documents longer than the context were cut in the order that they are stored in.
        if not document.ordered and piece.whole:
            segments = tuple(segments[i] for i in draw.order(epoch, number, len(segments)))
            document = Document(segments, key, True, document.meta)
        hides = all(segment.loss for segment in segments)
        return PackedDocument(piece, key, document, draw.hidden(epoch, number, len(segments)) if hides else 0)

    @lru_cache(8)  # noqa: B019 (lives as long as the run)
    def _step_sizes(self, step: int) -> tuple[list[int], int]:
        """Count (tokens of each source, targets) of an optimizer step; nothing in validation."""
        if isinstance(self.order, ValidationOrder):
            return [], 0
        tokens, targets = self.order.sizes(step * self.global_batch, (step + 1) * self.global_batch)
        return tokens.tolist(), max(1, targets)

    def _decode(self, function: Callable[[Any], Any], media: Iterable[Any]) -> Iterable[Any]:
        """Decode media in two threads of a worker, as decoders release the GIL."""
        if get_worker_info() is None:
            return map(function, media)
        self._threads = self._threads or ThreadPoolExecutor(2)
        items = list(media)
        halves = (items[: len(items) // 2], items[len(items) // 2 :])  # a task per item would cost as much as a small item
        return chain.from_iterable(self._threads.map(lambda half: list(map(function, half)), halves))


def data_parallel(trainer: Trainer) -> tuple[int, int]:
    """Return (data-parallel world size, rank). Tensor-parallel devices train on the same part."""
    arguments = trainer.distributed_sampler_kwargs or {}  # None on a single device
    return arguments.get("num_replicas", 1), arguments.get("rank", 0)


class StepBatches(Sampler[list[int]]):
    """List the positions of each micro-batch of a rank in steps [start, steps); the length counts all steps, for Lightning.

    All ranks have the same number of micro-batches. Where a rank has fewer packs, `[~position]` is a micro-batch of padding in
    the step of that position."""

    def __init__(self, start: int, steps: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
        self.start, self.steps, self.global_batch = start, steps, global_batch
        first, stop = (r * global_batch // world_size for r in (rank, rank + 1))
        count = math.ceil(math.ceil(global_batch / world_size) / micro_batch)
        self.bounds = [first + (stop - first) * number // count for number in range(count + 1)]

    def __len__(self) -> int:
        return self.steps * (len(self.bounds) - 1)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.start * self.global_batch, self.steps * self.global_batch, self.global_batch):
            for begin, stop in pairwise(self.bounds):
                yield list(range(first + begin, first + stop)) or [~first]


class TimedLoader(DataLoader[Batch]):
    """A loader that measures the seconds for which its batches are waited for."""

    waited = 0.0

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - began
            yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Ignore SLURM's signals and Ctrl-C in workers, whose end would end the run before its last step is saved."""
    for name in {"SIGTERM", "SIGINT", "SIGUSR1"} & set(dir(signal)):  # Windows lacks some
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _end_workers() -> None:
    """Kill the workers at exit: Python would wait for their end after a SIGTERM, which they ignore."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def whole_epochs(epochs: float, min_steps: int, steps: float) -> float:
    """Return how often data that last `steps` are read: `epochs` times, or until the whole pass that reaches `min_steps`."""
    return max(epochs, math.ceil(min_steps / max(1, math.ceil(steps))))


RESTORE = {  # key of `PileDataModule.identity` -> how to resume if its value has changed
    "seed": "set data.seed back",
    "context": "set data.context back",
    "global_batch": "set data.global_batch back (devices and data.micro_batch may change)",
    "sources": "name the same sources in the same order",
    "tokenizer": "set model.tokenizer back",
    "fingerprints": "restore the shards",
    "streams": "restore the shards",
    "weights": "set the weights back; data.weights_from may change them from a future step on",
    "end": "set data.epochs and data.min_steps back",
}


class PileDataModule(LightningDataModule):
    """Load text, image and audio shards as packed batches, for the vocabulary, tokenizer and annotator of the model.

    Args:
        sources: name -> shards of texts, images, sounds or any mixture.
        context: tokens of a pack.
        global_batch: packs of one optimizer step over all devices; the largest number of devices.
        micro_batch: most packs that a device computes at once, with gradient accumulation; None: all of its part.
        epochs: passes through all sources; None: `trainer.max_steps` or the `epochs` of the sources end the run.
        min_steps: optimizer steps that small data is repeated for, beyond `epochs`.
        weights_from: optimizer step -> source -> weight from then on, else 0. A resumed run may change future steps.
        seed: of the order of the data and of all random choices about documents.
        condition_dropout: fraction of documents (that learn all of several segments) with hidden first segments, for guidance.
        num_workers: loader processes; 0: the training process itself.
        prepare: a recipe (`data/<name>/prepare.py`) that is run if its shards do not exist.
        max_rejected_share: fraction of unusable documents above which the run stops.
        cache: folder for remote shards, which several runs and nodes may share; None: `~/.cache/pile/shards`.
        cache_gigabytes: limit of its size.
        allow_pipe: run the commands of `pipe:` URLs, so the author of the configuration can run programs."""

    def __init__(
        self,
        sources: dict[str, Source],
        vocabulary: Vocabulary | None = None,
        tokenizer: Tokenizer | None = None,
        context: int = 512,
        global_batch: int = 16,
        micro_batch: int | None = None,
        epochs: float | None = None,
        min_steps: int = 0,
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
        assert vocabulary is not None and tokenizer is not None
        self.sources, self.vocabulary, self.tokenizer, self.annotator = sources, vocabulary, tokenizer, annotator
        self.context, self.global_batch, self.micro_batch = context, global_batch, micro_batch
        self.epochs, self.min_steps, self.weights_from, self.seed = epochs, min_steps, weights_from or {}, seed
        self.condition_dropout, self.num_workers, self.source_names = condition_dropout, num_workers, list(sources)
        check_data(sources, self)
        self.prepare, self.max_rejected_share = prepare, max_rejected_share
        self.cache = ShardCache(cache or cache_folder() / "shards", int(cache_gigabytes * 1e9), allow_pipe)
        specs = enumerate(source.transforms for source in sources.values())
        self.transforms = {number: Transforms(given, seed) for number, given in specs if given}
        self.train_data, self.validation_data = list[SourceData](), list[SourceData]()
        self._restored: dict[str, Any] | None = None
        self._prefetcher: Prefetcher | None = None

    @property
    def _model(self) -> tuple[Vocabulary, Tokenizer, int]:  # the model replaces the vocabulary once its codecs are known
        return self.vocabulary, self.tokenizer, self.context

    def _open(self, split: str) -> list[SourceData]:
        given = ((name, getattr(source, split), source.fields) for name, source in self.sources.items())
        open_source = partial(SourceData, cache=self.cache, readings=self.annotator.readings if self.annotator else 1)
        return [open_source(name, where, *self._model, fields=fields) for name, where, fields in given if where]

    def _open_train(self) -> tuple[list[SourceData], list[SourceOrder]]:
        data = self._open("train")
        streams = data_order.count_streams([source.tokens for source in data], self.context, self.global_batch)
        dropout = self.condition_dropout if self.annotator is None else 0.0
        return data, [source.order(self.seed, streams, dropout) for source in data]

    def prepare_data(self) -> None:
        if self.prepare is not None and any(_is_unmade(source, self.prepare) for source in self.sources.values()):
            run_recipe(self.prepare)
        is_validation = self.trainer is not None and self.trainer.state.fn == "validate"
        for data in ([] if is_validation else self._open_train()[0]) + self._open("validation"):
            print(data.describe(), file=sys.stderr, flush=True)

    def setup(self, stage: str | None = None) -> None:
        """Open the sources; the training shards only if `stage` is not "validate"."""
        if self.train_data:
            return
        self.validation_data = self._open("validation")
        self.validation_names = [data.name for data in self.validation_data]
        if stage != "validate":
            self.train_data, orders = self._open_train()
            self.order = self._make_order(orders)
        self.validation_order = ValidationOrder([data.tokens for data in self.validation_data], self.context)
        if self._restored is not None:
            self.load_state_dict(self._restored)

    def _make_order(self, orders: list[SourceOrder]) -> TrainingOrder:
        sizes = [order.packs_per_epoch for order in orders]
        given = [source.epochs for source in self.sources.values()]
        make = partial(TrainingOrder, orders, global_batch=self.global_batch)
        if any(epochs is not None for epochs in given):
            packs = (math.ceil(size * (1.0 if n is None else n)) for size, n in zip(sizes, given, strict=True))
            return make([Phase(0, tuple(packs), exact=True)])
        if self.epochs is not None:  # each is a phase of whole steps, complete before the next begins
            epochs = whole_epochs(self.epochs, self.min_steps, sum(sizes) / self.global_batch)
            phases = [Phase(None if epoch else 0, tuple(sizes), exact=True) for epoch in range(math.ceil(epochs))]
            order, last = make(phases), epochs - len(phases) + 1  # fraction of the last epoch
            return make(phases, end=order.first(len(phases) - 1) + math.ceil(last * sum(sizes))) if last < 1 else order
        weights = [source.weight for source in self.sources.values() if source.weight is not None]
        phases = [Phase(0, data_order.pack_weights(orders, weights) if weights else tuple(sizes))]
        for step, later in sorted(self.weights_from.items()):
            weights = [later.get(name, 0.0) for name in self.sources]
            phases.append(Phase(step * self.global_batch, data_order.pack_weights(orders, weights)))
        return make(phases)

    def steps(self, trainer: Trainer) -> int:
        """Count the optimizer steps of the whole run, or raise ValueError if no option gives them."""
        limits = [-(-self.order.length // self.global_batch)] if self.order.length is not None else []
        limits += [trainer.max_steps] if trainer.max_steps >= 0 else []
        if not limits:
            raise ValueError("how long to train? Set trainer.max_steps (optimizer steps) or data.epochs (passes)")
        return min(limits)

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Return (most packs of a micro-batch, micro-batches per device and step); raise ValueError for too many devices."""
        if world_size > (packs := self.global_batch):
            fix = f"use at most {packs} devices, or begin another run with a larger data.global_batch"
            raise ValueError(f"data.global_batch={packs} packs are too few for {world_size} devices: {fix}")
        per_device = -(-self.global_batch // world_size)
        micro = min(self.micro_batch or per_device, per_device)
        return micro, -(-per_device // micro)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"position": self.trainer.global_step * self.global_batch, **self.identity()}

    def identity(self) -> dict[str, Any]:
        """Return everything that the packs of positions depend on."""
        order = self.order
        return {
            "order_version": ORDER_VERSION, "seed": self.seed, "context": self.context, "global_batch": self.global_batch,
            "sources": self.source_names, "tokenizer": self.vocabulary.tokenizer,
            "fingerprints": {data.name: data.fingerprint for data in self.train_data}, "streams": order.streams,
            "weights": [[order.first(number), phase.exact, *phase.weights] for number, phase in enumerate(order.phases)],
            "end": order.end,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state and, once the sources are open, raise ValueError if the data would not continue where it stopped."""
        self._restored = state_dict
        if not self.train_data:
            return
        position, another = state_dict["position"], "or begin another run with another --name"
        if (version := state_dict["order_version"]) != ORDER_VERSION:
            fix = f"continue with the pile_app that the run began with, {another}"
            raise ValueError(f"the checkpoint was made with order_version {version}, now it is {ORDER_VERSION}: {fix}")

        def before(identity: dict[str, Any]) -> dict[str, Any]:  # later phases and ends do not change the packs before
            phases = [phase for phase in identity["weights"] if not phase[0] or phase[0] < position]
            end = identity["end"] if identity.get("end") is not None and identity["end"] < position else None
            return identity | {"weights": phases, "end": end}

        was, now = before(state_dict), before(self.identity())
        for key, fix in RESTORE.items():
            old, new = was[key], now[key]
            if old != new:
                if isinstance(old, dict):  # only the differences
                    names = sorted(name for name in old | new if old.get(name) != new.get(name))
                    old, new = ({name: values.get(name) for name in names} for values in (old, new))
                why = f"the data would not continue where it stopped. To resume, {fix}; {another}"
                raise ValueError(f"the checkpoint was made with {key} {old}, now it is {new}: {why}")

    def train_dataset(self) -> PackDataset:
        return PackDataset(self.train_data, self.order, *self._model, self.global_batch, self.annotator, self.transforms)

    def _loader(self, dataset: Dataset[Any], batches: Sampler[list[int]] | list[list[int]]) -> TimedLoader:
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
        is_remote = any(any(data.remote) for data in self.train_data + self.validation_data)
        forks = self.num_workers and is_remote  # not of this process: a fork would copy the locks of prefetching threads
        return TimedLoader(
            dataset, batch_sampler=batches, num_workers=self.num_workers, collate_fn=_unchanged, worker_init_fn=_ignore_signals,
            multiprocessing_context=worker_context() if forks else None, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or creating the iterator would draw from the global generator
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        world_size, rank = data_parallel(self.trainer)
        micro, _ = self.micro_batches(world_size)
        start, steps = self.trainer.global_step, self.steps(self.trainer)
        self.teardown()
        if self.trainer.local_rank == 0 and any(any(data.remote) for data in self.train_data):
            nodes = getattr(self.trainer, "num_nodes", 1)
            run, last = self.global_batch // self.order.streams, min(rank + -(-world_size // nodes), world_size)
            first, stop = (r * self.global_batch // world_size for r in (rank, last))
            streams = range(first // run, -(-stop // run))  # of the ranks of this node
            ahead = shards_ahead(self.train_data, self.order, streams, start * self.global_batch, steps * self.global_batch)
            self._prefetcher = Prefetcher(self.cache, ahead, ahead=4 * max(16, len(streams)))
        return self._loader(self.train_dataset(), StepBatches(start, steps, self.global_batch, micro, rank, world_size))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self._prefetcher is not None and self.trainer is not None and self.trainer.training:
            first = min(batch.numbers, default=0)
            self._prefetcher.advance(first - 2 * self.global_batch)  # shard positions are estimates
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
        count = -(-len(self.validation_order) // (micro * world_size))  # on every rank; packs past the end are empty
        batches = [list(range(first * micro, (first + 1) * micro)) for first in range(rank * count, (rank + 1) * count)]
        dataset = PackDataset(self.validation_data, self.validation_order, *self._model, self.global_batch, self.annotator)
        return self._loader(dataset, batches)


def shards_ahead(
    sources: Sequence[SourceData], order: TrainingOrder, streams: range, position: int, stop: int
) -> Iterator[tuple[float, Wanted]]:
    """Yield (approximate position after the last use, file) of the remote shards of some streams, in the order of first use."""

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
    """Tell whether a pattern is in the recipe's folder and no shard is there (other shards: the pattern is mistyped)."""
    for given in (source.train, source.validation or []):
        for pattern in [given] if isinstance(given, str) else given:
            folder = Path(re.split(r"[*?\[{]", pattern, maxsplit=1)[0] + "x").parent
            is_recipes = Path(recipe).resolve().parent in folder.resolve().parents
            if not is_remote(pattern) and is_recipes and not any(folder.glob("*.tar")):
                return True
    return False


def run_recipe(recipe: str) -> None:
    """Run `python <recipe>`; raise FileNotFoundError if it does not exist, ValueError if it fails."""
    if not Path(recipe).is_file():
        copy_recipe(recipe)
    if not Path(recipe).is_file():
        raise FileNotFoundError(f"data.prepare names the recipe {recipe!r}, which does not exist in {os.getcwd()}")
    print(f"preparing data: python {recipe}", flush=True)
    if subprocess.run([sys.executable, recipe]).returncode:
        raise ValueError(f"the recipe {recipe!r} failed; see its message above")


def check_data(sources: Mapping[str, Source], data: Any) -> None:
    """Raise ValueError for invalid settings. data: `PileDataModule` or its part of the configuration."""
    weights = [source.weight is not None for source in sources.values()]
    later: Mapping[int, Mapping[str, float]] = data.weights_from or {}
    lengths = any(source.epochs is not None for source in sources.values()) + (data.epochs is not None)
    batch, micro, dropout = data.global_batch, data.micro_batch or 1, data.condition_dropout
    divides = batch >= 1 and micro >= 1 and batch % micro == 0 and data.micro_batch != 0
    problems = {
        "data.sources is empty: name at least one, e.g. {text: {train: 'shards/train-*.tar'}}": not sources,
        "weights and epochs exclude each other: give data.epochs (passes through all sources), epochs to the sources, or "
        "weights with trainer.max_steps": lengths + (any(weights) or bool(later)) > 1,
        "give every source of data.sources a weight, or none of them (then by their size)": any(weights) != all(weights),
        f"data.context={data.context} tokens is too short: at least 8": data.context < 8,
        f"data.micro_batch={data.micro_batch} must divide data.global_batch={batch}, both at least 1": not divides,
        f"data.condition_dropout={dropout} must be in [0, 1)": not 0 <= dropout < 1,
    }
    positive = {f"sources.{name}.{key}": vars(source)[key] for name, source in sources.items() for key in ("weight", "epochs")}
    for name, value in (positive | {"epochs": data.epochs}).items():
        problems[f"data.{name} must be above 0, not {value}"] = value is not None and not value > 0
    for step, named in later.items():
        where, unknown = f"data.weights_from.{step}", sorted(set(named) - set(sources))
        valid = all(weight >= 0 for weight in named.values()) and sum(named.values()) > 0
        problems |= {
            f"{where}: the step must be at least 1; the first weights belong to data.sources": step < 1,
            f"{where} names {unknown}, which data.sources does not": bool(unknown),
            f"{where}: weights must be 0 or more, at least one above 0, not {dict(named)}": not valid,
        }
    for message in (message for message, is_wrong in problems.items() if is_wrong):
        raise ValueError(message)
