"""Sources: what the shards of one name hold, as the order and the reader need it.

    shards ──► index, token counts ──► pieces of each shard ──► `SourceOrder`

Whatever takes time for many shards (indexing, counting tokens, packing every window once) is done by all cores, and kept: index
and counts beside the shard, tables of large sources in `PILE_CACHE`. No import here takes long: processes that help do it all.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.data import shards
from pile_app.data.index import INDEX_SUFFIX, ShardIndex, map_arrays, save_arrays, tokens_path
from pile_app.data.order import ORDER_VERSION, Pieces, SourceOrder, SourceTokens
from pile_app.data.packing import cut_document
from pile_app.data.shards import Shards
from pile_app.data.tar import ShardError
from pile_app.data.tokenizers import TextTokens, Tokenizer, text_tokens
from pile_app.documents import AUDIO, IMAGE, MODALITIES, BadSample, Document
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.remote import ShardCache

log = logging.getLogger(__name__)

LARGE_SOURCE = 1_000_000  # documents, from which on the table of the order is computed by all cores, and kept
SHARD_COLUMNS = ("documents", "pieces", "tokens", "too_long", "rejected")


class SourceData:
    """The documents of one source: their pieces for the order, their contents by number.

    Args:
        name: of the source.
        pattern: of its shards, see `Source`.
        cache: of remote shards.
        processes: that count and index where that is to be done; None: as many as there are cores.
    """

    def __init__(
        self,
        name: str,
        pattern: str | Sequence[str],
        vocabulary: Vocabulary,
        tokenizer: Tokenizer,
        context: int,
        cache: ShardCache | None = None,
        processes: int | None = None,
    ) -> None:
        self.name = name
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.context = context
        self.shards = Shards(shards.expand_shards(pattern), cache)
        self.processes = processes
        for_each(self._make_sidecars, self._without_sidecars(), processes)
        fingerprints = [self.shards.index(shard).fingerprint for shard in range(len(self.shards))]
        self.fingerprint = hashlib.blake2b("".join(fingerprints).encode(), digest_size=16).hexdigest()
        documents = np.array([self._documents_of(shard) for shard in range(len(self.shards))])
        self.first_document: list[int] = [0, *np.cumsum(documents).tolist()]
        columns = self._kept("shards", lambda: np.array(for_each(self._count, range(len(self.shards)), self._processes)))
        self.counts = dict(zip(SHARD_COLUMNS, columns.T, strict=True))
        if not self.counts["pieces"].sum():
            raise ShardError(f"source {name!r} ({pattern!r}) holds no document that fits a context of {context} tokens")
        self.tokens = SourceTokens(name, self.counts["pieces"], int(self.counts["tokens"].sum()), self.pieces)
        too_long = int(self.counts["too_long"].sum())
        if too_long or self.counts["rejected"].any():
            log.warning(
                "source %r: left out when indexed: %s; documents that hold an image or a sound longer than the context of %d "
                "tokens: %d; %d documents remain",
                name, self.rejected() or "nothing", context, too_long, len(self) - too_long,
            )  # fmt: skip

    def rejected(self) -> dict[str, int]:
        """Reason -> samples that were rejected when the shards were indexed."""
        shards = np.flatnonzero(self.counts["rejected"]).tolist()
        reasons = Counter(reason for shard in shards for _, reason in self.shards.index(shard).rejected)
        return dict(sorted(reasons.items()))

    def order(self, seed: int) -> SourceOrder:
        """Its order. What that takes, the packs of every window, is computed once for a large source, and kept."""
        make = partial(SourceOrder, self.tokens, self.context, seed)
        count = partial(for_each, processes=self._processes)
        return make(self._kept(f"packs-{seed}", lambda: make(for_each=count).window_packs))

    def _kept(self, what: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """A table of this source: of a large one from the cache, where it is there."""
        if not self._is_large:
            return compute()
        identity = (what, ORDER_VERSION, self.name, self.fingerprint, self.context, self.vocabulary)
        digest = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
        path = cache_folder() / "tables" / f"{digest}.safetensors"
        try:
            stored, header = map_arrays(str(path), {"table": "<i8"})
            return stored["table"].reshape(int(header["rows"]), -1).squeeze(-1 if header["vector"] == "1" else ())
        except (OSError, ValueError, KeyError):
            log.info("source %r: computing the order of %d documents", self.name, len(self))
            table = compute().astype("<i8")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(str(path), {"table": table}, {"rows": str(len(table)), "vector": str(int(table.ndim == 1))})
            return table

    @property
    def _is_large(self) -> bool:
        return len(self) >= LARGE_SOURCE

    @property
    def _processes(self) -> int | None:
        return self.processes if self._is_large else 1

    def _documents_of(self, shard: int) -> int:
        return len(self.shards.index(shard))

    def _without_sidecars(self) -> list[int]:
        def lacks(shard: int) -> bool:
            local = self.shards.local(shard)
            counted = self.tokenizer.fingerprint == "bytes" or os.path.exists(tokens_path(local, self.tokenizer.fingerprint))
            return not (counted and os.path.exists(local + INDEX_SUFFIX))

        return [shard for shard in range(len(self.shards)) if lacks(shard)]

    def _make_sidecars(self, shard: int) -> None:
        self.shards.make_index(shard)
        text_tokens(self.shards, shard, self.tokenizer)

    def _count(self, shard: int) -> list[int]:
        """`SHARD_COLUMNS` of a shard."""
        pieces, too_long = self._pieces(shard)
        index = self.shards.index(shard)
        tokens = int((pieces.stop - pieces.start).sum())
        return [len(index), len(pieces), tokens, too_long, len(index.rejected)]

    def pieces(self, shard: int) -> Pieces:
        """What the documents of a shard are cut into."""
        return self._pieces(shard)[0]

    def _pieces(self, shard: int) -> tuple[Pieces, int]:
        """(pieces, documents left out because a medium in them is longer than the context)."""
        index, context = self.shards.index(shard), self.context
        texts = text_tokens(self.shards, shard, self.tokenizer)
        tokens = segment_tokens(index, self.vocabulary, texts)
        first = index.first_segment.astype(np.int64)
        some = len(index) > 0
        lengths = np.add.reduceat(tokens, first[:-1]) + 2 if some else np.zeros(0, np.int64)
        ends = index.loss[first[1:] - 1] if some else np.zeros(0, bool)  # is the `<end>` predicted?
        targets = np.add.reduceat(tokens * index.loss, first[:-1]) + ends if some else lengths
        numbers = np.arange(len(index)) + self.first_document[shard]
        short = lengths <= context
        cut: list[tuple[int, int, int, int]] = []  # document, start, stop, targets
        too_long = 0
        for sample in np.flatnonzero(~short).tolist():
            start, stop = first[sample : sample + 2].tolist()
            of_sample = tokens[start:stop].tolist()
            breaks: list[int] = []
            place = 1
            for segment, length in enumerate(of_sample, start):
                found = texts.breaks.get(segment)
                if found is not None:
                    breaks += (found + np.int64(place + 1)).tolist()
                place += length
            try:
                ranges = cut_document(list(zip(index.modality[start:stop].tolist(), of_sample, strict=True)), context, breaks)
            except ValueError:
                too_long += 1
                continue
            learned = index.loss[start:stop]
            if learned.all():
                cut += [(int(numbers[sample]), one, end, end - one - 1) for one, end in ranges]
            else:
                predicted = np.repeat([False, *learned, ends[sample]], [1, *of_sample, 1])
                cut += [(int(numbers[sample]), one, end, int(predicted[one + 1 : end].sum())) for one, end in ranges]
        rows = np.array(cut, np.int64).reshape(-1, 4)
        count = int(short.sum())
        return Pieces(
            np.concatenate([numbers[short], rows[:, 0]]),
            np.concatenate([np.zeros(count, np.int32), rows[:, 1].astype(np.int32)]),
            np.concatenate([lengths[short], rows[:, 2]]).astype(np.int32),
            np.concatenate([targets[short], rows[:, 3]]).astype(np.int32),
            np.concatenate([np.ones(count, bool), np.zeros(len(rows), bool)]),
        ), too_long

    def __len__(self) -> int:
        """Number of documents."""
        return self.first_document[-1]

    def _place(self, number: int) -> tuple[int, int]:
        shard = bisect_right(self.first_document, number) - 1
        return shard, number - self.first_document[shard]

    def document(self, number: int) -> Document:
        """Raises `BadSample` where it cannot be used."""
        return self.shards.document(*self._place(number))

    def document_or_reason(self, number: int) -> tuple[str, Document | BadSample]:
        """(key, document) or why it cannot be used."""
        try:
            return self.key(number), self.document(number)
        except BadSample as error:
            return self.key(number), error

    def document_to_train(self, number: int) -> tuple[str, Document | BadSample]:
        """(key, document as training reads it: texts as token ids) or why it cannot be used."""
        shard, sample = self._place(number)
        key = self.shards.index(shard).key(sample)
        try:
            texts = None if self.tokenizer.fingerprint == "bytes" else text_tokens(self.shards, shard, self.tokenizer)
            return key, self.shards.document_to_train(shard, sample, texts)
        except BadSample as error:
            return key, error

    def key(self, number: int) -> str:
        shard, sample = self._place(number)
        return self.shards.index(shard).key(sample)


def segment_tokens(index: ShardIndex, vocabulary: Vocabulary, texts: TextTokens) -> np.ndarray:
    """(G,) tokens of each segment of a shard, with openers and closing tokens, without reading the shard.

    Raises:
        ShardError: the shard holds a modality that the model has no codec for.
    """
    for modality in (IMAGE, AUDIO):
        if (index.modality == modality).any() and modality not in vocabulary.modalities:
            name = MODALITIES[modality]
            raise ShardError(f"shard {index.path!r} holds {name}s, and the model has no codec for them: set model.{name}")
    tokens = texts.counts + 1
    tokens[index.modality == IMAGE] = 1 + vocabulary.image_tokens
    sounds = index.modality == AUDIO
    tokens[sounds] = 2 + vocabulary.audio_tokens(
        index.segment_size[sounds].astype(np.int64), index.sample_rate[sounds].astype(np.int64)
    )
    return tokens


def for_each(function: Callable[[int], Any], numbers: Sequence[int], processes: int | None = None) -> list[Any]:
    """[function(n) for n in numbers], by several processes (None: all cores) where there is more than one number."""
    processes = min(processes or os.cpu_count() or 1, len(numbers))
    if processes < 2:
        return [function(number) for number in numbers]
    with ProcessPoolExecutor(processes, get_context("forkserver")) as pool:
        return list(pool.map(function, numbers, chunksize=max(1, len(numbers) // (8 * processes))))


def cache_folder() -> Path:
    """Where tables of large orders are kept, and remote shards unless `data.cache` says otherwise."""
    return Path(os.environ.get("PILE_CACHE") or Path.home() / ".cache" / "pile")
