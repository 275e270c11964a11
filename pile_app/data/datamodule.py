"""The data module: sources of shards in, batches out, on the ordinary PyTorch `DataLoader`.

A map-style dataset makes the pack of a position; a batch sampler lists the positions of this rank, starting at the optimizer
step that is resumed. No worker holds state and the sampler has a length, so Lightning neither fetches a batch ahead that a
resumed run would lose, nor saves a loader state that only fits rank 0.

    global batch of step s = positions [s * G, (s + 1) * G); rank r of W takes the r-th of W equal parts, in micro-batches
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from pile_app.data import shards
from pile_app.data.order import (
    ORDER_VERSION,
    Piece,
    SourceTokens,
    TrainingOrder,
    ValidationOrder,
    permutation,
    uniform,
)
from pile_app.data.packing import Batch, Pack, assemble, collate, cut_document
from pile_app.data.shards import ShardError, ShardIndex, ShardReader
from pile_app.data.text import Tokenizer, text_token_counts
from pile_app.documents import AUDIO, IMAGE, MODALITIES, BadSample, Document, Vocabulary

log = logging.getLogger(__name__)


@dataclass
class Source:
    """A named set of shards.

    Args:
        train: shards to train on: path with wildcards or braces (`data/x/train-{000..099}.tar`).
        validation: shards to validate on; None: none.
        weight: share of the training tokens, in any unit; None (then for all sources): its size.
    """

    train: str
    validation: str | None = None
    weight: float | None = None


class SourceData:
    """The documents of one source: their pieces for the order, their contents by number."""

    def __init__(self, name: str, pattern: str, vocabulary: Vocabulary, tokenizer: Tokenizer, context: int) -> None:
        self.name = name
        self.indexes = [shards.load_index(path) for path in shards.expand_shards(pattern)]
        self.reader = ShardReader(self.indexes)
        self.first_document = np.cumsum([0, *(len(index) for index in self.indexes)])
        self.too_long = 0
        self.cut: set[int] = set()  # documents longer than the context
        pieces = [self._pieces(number, vocabulary, tokenizer, context) for number in range(len(self.indexes))]
        document, start, stop, shard, targets = (np.concatenate(column) for column in zip(*pieces, strict=True))
        if not len(document):
            raise ShardError(f"source {name!r} ({pattern!r}) holds no document that fits a context of {context} tokens")
        self.tokens = SourceTokens(name, document, start, stop, shard, targets)
        documents = int(self.first_document[-1])
        rejected = sum(len(index.rejected) for index in self.indexes)
        if self.too_long or rejected:
            log.warning(
                "source %r: of %d documents %d were rejected when indexed and %d hold an image or a sound longer than the "
                "context of %d tokens", name, documents + rejected, rejected, self.too_long, context,
            )  # fmt: skip

    def _pieces(self, shard: int, vocabulary: Vocabulary, tokenizer: Tokenizer, context: int) -> tuple[np.ndarray, ...]:
        """(document, start, stop, shard, targets) of the pieces of one shard's documents, see `SourceTokens`."""
        index = self.indexes[shard]
        tokens = segment_tokens(index, vocabulary, tokenizer)
        first = index.first_segment.astype(np.int64)
        lengths = np.add.reduceat(tokens, first[:-1]) + 2 if len(index) else np.zeros(0, np.int64)
        ends = index.loss[first[1:] - 1]  # is the `<end>` predicted?
        targets = np.add.reduceat(tokens * index.loss, first[:-1]) + ends if len(index) else lengths
        numbers = np.arange(len(index)) + self.first_document[shard]
        short = lengths <= context
        columns = [(numbers[short], np.zeros(short.sum(), np.int64), lengths[short], targets[short])]
        for sample in np.flatnonzero(~short):
            within = slice(first[sample], first[sample + 1])
            try:
                cuts = cut_document(list(zip(index.modality[within].tolist(), tokens[within].tolist(), strict=True)), context)
            except ValueError:
                self.too_long += 1
                continue
            self.cut.add(int(numbers[sample]))
            starts, stops = np.array(cuts).T
            predicted = np.repeat([False, *index.loss[within], ends[sample]], [1, *tokens[within], 1])
            cut_targets = np.array([predicted[start + 1 : stop].sum() for start, stop in cuts])
            columns.append((np.full(len(cuts), numbers[sample]), starts, stops, cut_targets))
        document, start, stop, counts = (np.concatenate(column) for column in zip(*columns, strict=True))
        return document, start, stop, np.full(len(document), shard), counts

    def __len__(self) -> int:
        """Number of documents."""
        return int(self.first_document[-1])

    def document(self, number: int) -> Document:
        """Raises `BadSample` where it cannot be used."""
        shard = int(np.searchsorted(self.first_document, number, side="right")) - 1
        return self.reader.document(shard, number - int(self.first_document[shard]))

    def key(self, number: int) -> str:
        shard = int(np.searchsorted(self.first_document, number, side="right")) - 1
        return self.indexes[shard].keys[number - int(self.first_document[shard])]

    @property
    def fingerprint(self) -> str:
        return shards.hashlib.blake2b("".join(i.fingerprint for i in self.indexes).encode(), digest_size=16).hexdigest()


def segment_tokens(index: ShardIndex, vocabulary: Vocabulary, tokenizer: Tokenizer) -> np.ndarray:
    """(G,) tokens of each segment of a shard, with openers and closing tokens, without reading the shard.

    Raises:
        ShardError: the shard holds a modality that the model has no codec for.
    """
    for modality in (IMAGE, AUDIO):
        if (index.modality == modality).any() and modality not in vocabulary.modalities:
            name = MODALITIES[modality]
            raise ShardError(f"shard {index.path!r} holds {name}s, and the model has no codec for them: set model.{name}")
    tokens = text_token_counts(index, tokenizer) + 1
    tokens[index.modality == IMAGE] = 1 + vocabulary.image_tokens
    sounds = index.modality == AUDIO
    tokens[sounds] = 2 + vocabulary.audio_tokens(
        index.segment_size[sounds].astype(np.int64), index.sample_rate[sounds].astype(np.int64)
    )
    return tokens


@dataclass(frozen=True)
class PackedDocument:
    """A piece of a document as it stands in a pack: segments in the order they are seen in, the first `dropped` hidden.

    `document` is a `BadSample` where it could not be read.
    """

    piece: Piece
    key: str
    document: Document | BadSample
    dropped: int


class PackDataset(Dataset[Pack]):
    """Position -> assembled pack. See `PileDataModule` for the arguments."""

    def __init__(
        self,
        sources: Sequence[SourceData],
        order: TrainingOrder | ValidationOrder,
        vocabulary: Vocabulary,
        tokenizer: Tokenizer,
        context: int,
        seed: int,
        condition_dropout: float,
    ) -> None:
        self.sources = sources
        self.order = order
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.context = context
        self.seed = seed
        self.condition_dropout = condition_dropout

    def __getitem__(self, position: int) -> Pack:
        entries = [
            (one.piece.source, one.document, one.key, one.piece.start, one.piece.stop, one.dropped)
            for one in self.documents(position)
        ]
        return assemble(entries, self.vocabulary, self.tokenizer, self.context)

    def documents(self, position: int) -> list[PackedDocument]:
        """What stands in the pack of a position, in order, as it is seen there."""
        return [self._document(position, number, piece) for number, piece in enumerate(self.order.pack(position))]

    def _document(self, position: int, number: int, piece: Piece) -> PackedDocument:
        """The `number`-th piece at a position."""
        data = self.sources[piece.source]
        key = data.key(piece.document)
        try:
            document = data.document(piece.document)
        except BadSample as error:
            return PackedDocument(piece, key, error, 0)
        segments = document.segments
        # The cuts of a document longer than the context were made for the order that it is stored in.
        if not document.ordered and len(segments) > 1 and piece.document not in data.cut:
            order = permutation(len(segments), self.seed, data.name, piece.epoch, piece.document, "segments")
            document = Document(tuple(segments[i] for i in order), key, True, document.meta)
        dropped = 0
        if len(segments) > 1 and self.condition_dropout:
            chance = uniform(self.seed, position, number, "condition") / self.condition_dropout
            if chance < 1:  # then it is uniform once more, and says after how many segments the document begins
                dropped = 1 + int(chance * (len(segments) - 1))
        return PackedDocument(piece, key, document, dropped)


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


class _Batches(Dataset[Batch]):
    """Lists of positions -> batches; while training, with the normalizer of the whole optimizer step."""

    def __init__(self, dataset: PackDataset, global_batch: int) -> None:
        self.dataset = dataset
        self.global_batch = global_batch

    @lru_cache(8)  # noqa: B019 (lives as long as the run)
    def _step_targets(self, step: int) -> int:
        order = self.dataset.order
        assert isinstance(order, TrainingOrder)
        return max(1, order.targets(step * self.global_batch, (step + 1) * self.global_batch))

    def __getitems__(self, positions: list[int]) -> Batch:
        packs = [self.dataset[position] for position in positions]
        training = isinstance(self.dataset.order, TrainingOrder)
        normalizer = float(self._step_targets(positions[0] // self.global_batch)) if training else 0.0
        return collate(packs, self.dataset.vocabulary, normalizer)


def _as_it_is(batch: Any) -> Any:
    return batch


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
        epochs: length of the run in passes over all sources; None: `trainer.max_steps` says it.
        seed: of the order of the data and of the condition dropout.
        condition_dropout: share of the documents with several segments whose first ones are hidden, so that guidance has an
            unconditional model to compare with, 0 to 1.
        num_workers: processes that load; 0: the training process itself.
        prepare: a recipe (`data/<name>/prepare.py`) that makes the shards where they are missing.
        max_rejected_share: the run stops when more than this share of its documents cannot be used.
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
        seed: int = 0,
        condition_dropout: float = 0.1,
        num_workers: int = 0,
        prepare: str | None = None,
        max_rejected_share: float = 0.01,
    ) -> None:
        super().__init__()
        check_data(sources, context, global_batch, micro_batch, condition_dropout, epochs)
        assert vocabulary is not None and tokenizer is not None
        self.sources = sources
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.context = context
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.epochs = epochs
        self.seed = seed
        self.condition_dropout = condition_dropout
        self.num_workers = num_workers
        self.prepare = prepare
        self.max_rejected_share = max_rejected_share
        self.train_data: list[SourceData] = []
        self.validation_data: list[SourceData] = []
        self._restored: dict[str, Any] | None = None

    # -- Before training: one process a node makes what is missing.

    def prepare_data(self) -> None:
        patterns = [pattern for s in self.sources.values() for pattern in (s.train, s.validation) if pattern]
        if self.prepare is not None and any(not _exists(pattern) for pattern in patterns):
            run_recipe(self.prepare)
        for pattern in patterns:
            for path in shards.expand_shards(pattern):
                if not os.path.exists(path + shards.INDEX_SUFFIX):
                    log.info("indexing %s", path)
                    shards.build_index(path)
                text_token_counts(shards.load_index(path), self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        if self.train_data:
            return
        make = partial(SourceData, vocabulary=self.vocabulary, tokenizer=self.tokenizer, context=self.context)
        self.train_data = [make(name, source.train) for name, source in self.sources.items()]
        self.validation_data = [
            make(name, source.validation) for name, source in self.sources.items() if source.validation is not None
        ]
        self.validation_names = [name for name, source in self.sources.items() if source.validation is not None]
        weights = [source.weight for source in self.sources.values()]
        given = [weight for weight in weights if weight is not None]
        tokens = [data.tokens for data in self.train_data]
        self.order = TrainingOrder(tokens, given or None, self.context, self.seed)
        self.validation_order = ValidationOrder([data.tokens for data in self.validation_data], self.context)
        if self._restored is not None:
            self._check_restored(self._restored)

    @property
    def source_names(self) -> list[str]:
        return list(self.sources)

    def steps(self, trainer: Trainer) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: neither `data.epochs` nor `trainer.max_steps` says it.
        """
        if self.epochs is not None:
            in_epochs = math.ceil(self.epochs * self.order.packs_per_epoch / self.global_batch)
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
            "weights": self.order.weights,
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
        for key, mend in (
            ("order_version", "continue with the version of pile_app that the run began with"),
            ("seed", "set data.seed back"),
            ("context", "set data.context back"),
            ("global_batch", "set data.global_batch back (devices and data.micro_batch may change)"),
            ("sources", "name the same sources in the same order"),
            ("weights", "set the weights of data.sources back"),
            ("tokenizer", "set model.tokenizer back"),
            ("fingerprints", "restore the shards"),
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
        return PackDataset(data, order, self.vocabulary, self.tokenizer, self.context, self.seed, dropout)

    def _loader(self, dataset: Dataset[Any], batches: Sampler[list[int]] | list[list[int]]) -> DataLoader[Batch]:
        import torch

        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            generator=torch.Generator(),  # or creating the iterator would draw from the global generator
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        micro, _ = self.micro_batches(world_size)
        dataset = _Batches(self.train_dataset(), self.global_batch)
        start, steps = self.trainer.global_step, self.steps(self.trainer)
        return self._loader(dataset, StepBatches(start, steps, self.global_batch, micro, rank, world_size))

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not len(self.validation_order):
            return []
        assert self.trainer is not None
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        micro, _ = self.micro_batches(world_size)
        batches = -(-len(self.validation_order) // (micro * world_size))
        mine = [
            [(batch * world_size + rank) * micro + i for i in range(micro)] for batch in range(batches)
        ]  # past the end stand empty packs, so that every rank has as many batches
        dataset = _Batches(self._dataset(self.validation_data, self.validation_order, 0.0), self.global_batch)
        return self._loader(dataset, mine)


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
) -> None:
    """Raises ValueError for values that cannot be."""
    if not sources:
        raise ValueError("data.sources is empty: name at least one, e.g. {text: {train: 'shards/train-*.tar'}}")
    weights = [source.weight for source in sources.values()]
    if any(weight is not None for weight in weights) and any(weight is None for weight in weights):
        raise ValueError("give every source of data.sources a weight, or none of them (then they weigh what they hold)")
    for name, source in sources.items():
        if source.weight is not None and not source.weight > 0:
            raise ValueError(f"data.sources.{name}.weight must be above 0, not {source.weight}; leave the source out instead")
    if context < 8:
        raise ValueError(f"data.context={context} tokens is too short: at least 8")
    if global_batch < 1 or (micro_batch is not None and (micro_batch < 1 or global_batch % micro_batch)):
        raise ValueError(f"data.micro_batch={micro_batch} must divide data.global_batch={global_batch}, both at least 1")
    if not 0 <= condition_dropout < 1:
        raise ValueError(f"data.condition_dropout={condition_dropout} must be in [0, 1)")
    if epochs is not None and not epochs > 0:
        raise ValueError(f"data.epochs={epochs} must be above 0")
