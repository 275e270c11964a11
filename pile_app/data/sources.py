"""Sources: the shards of one name, and the pieces that their documents are cut into.

    shards ──► manifest, token counts ──► pieces of each shard ──► `SourceOrder`

Tables of large sources, which take time to compute, are computed by all cores and kept in `$PILE_CACHE`.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.data.files import ShardError, cache_folder, for_each, map_arrays, save_arrays
from pile_app.data.index import EXTENSIONS, UNORDERED, ShardIndex, starts
from pile_app.data.order import ORDER_VERSION, Pieces, SourceOrder, SourceTokens
from pile_app.data.packing import cut_document
from pile_app.data.shards import OPEN_SHARDS, Shards, describe_balance
from pile_app.data.tokenizers import Tokenizer
from pile_app.data.tokens import KeptIds, columns_of, text_counts
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Codes, Document, Segment
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.remote import ShardCache

log = logging.getLogger(__name__)

LARGE_SOURCE = 1_000_000  # documents, from which on the tables of the order are kept
LONG_TOKENS = 64 << 20  # of long documents that a process keeps
SHARD_COLUMNS = ("pieces", "tokens", "too_long", "shortest", "longest")
TXT = EXTENSIONS.index("txt")
STAND_IN = ("txt", "png", "wav")  # extension of a segment outside of a piece, by modality


class SourceData(Shards):
    """The documents of one source: their pieces for the order, their contents for training.

    Args:
        name: of the source.
        pattern: of its shards, see `expand_shards`.
        vocabulary: of the model.
        tokenizer: of the model.
        context: T, tokens of a pack.
        cache: of remote shards.
        processes: that index and count; None: one for each core.
        fields: the field map; None: that of the manifest, or inferred.
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
        fields: Any = None,
    ) -> None:
        super().__init__(pattern, cache, fields, tokenizer, processes)
        self.name, self.vocabulary, self.context, self.processes = name, vocabulary, context, processes
        shards = range(len(self.paths))
        columns = self._kept("shards", lambda: np.array(for_each(self._count, shards, self._processes)))
        self.counts = dict(zip(SHARD_COLUMNS, columns.T, strict=True))
        if not self.counts["pieces"].sum():
            raise ShardError(f"source {name!r} ({pattern!r}) holds {self._why_empty()}")
        counts = self.counts["pieces"], self.counts["tokens"]
        self.tokens = SourceTokens(name, *counts, self.pieces, np.array(self.sizes), self.segments)

    def _forget(self) -> None:
        super()._forget()
        self._kept_ids: OrderedDict[int, KeptIds | None] = OrderedDict()
        self._last_long: OrderedDict[tuple[int, int], dict[int, Any]] = OrderedDict()
        self._checked: set[tuple[int, int]] = set()  # long documents whose checksum was right

    def _why_empty(self) -> str:
        if len(self):
            lengths = f"they have {self.counts['shortest'].min():,} to {self.counts['longest'].max():,} tokens"
            return f"no document that fits a context of {self.context:,} tokens: {lengths}. Raise data.context"
        balance = self.balance()
        return f"no document: {describe_balance(balance)}. " + "; ".join(detail for _, detail in balance["examples"].values())

    def describe(self) -> str:
        """One line for people: samples, documents, rejections, unused names, the field map."""
        too_long = int(self.counts["too_long"].sum())
        left = f"; {too_long:,} documents hold a medium longer than the context of {self.context:,} tokens" if too_long else ""
        return f"source {self.name!r}: {describe_balance(self.balance())}{left}"

    def rejected(self) -> dict[str, int]:
        """Reason -> samples that were rejected when the shards were indexed."""
        return dict(sorted(self.balance()["rejected"].items()))

    # -- Pieces

    def order(self, seed: int, streams: int = 1, condition_dropout: float = 0.0) -> SourceOrder:
        """The order of the source. The packs of every window are counted once for a large source, and kept."""
        make = partial(SourceOrder, self.tokens, self.context, seed, streams, condition_dropout=condition_dropout)
        count = partial(for_each, processes=self._processes)
        return make(self._kept(f"packs-{seed}-{streams}", lambda: make(for_each=count).window_packs))

    def _kept(self, what: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """A table of this source; that of a large source is read from the cache folder if it is there."""
        if not self._is_large:
            return compute()
        identity = (what, ORDER_VERSION, self.name, self.fingerprint, self.context, self.vocabulary)
        digest = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
        path = cache_folder() / "tables" / f"{digest}.safetensors"
        try:
            stored, header = map_arrays(str(path), {"table": "<i8"})
            return stored["table"].reshape(header["shape"])
        except (OSError, ValueError, KeyError):
            log.info("source %r: computing the order of %d documents", self.name, len(self))
            table = compute().astype("<i8")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(str(path), {"table": table.reshape(-1)}, {"shape": table.shape})
            return table

    @property
    def _is_large(self) -> bool:
        return len(self) >= LARGE_SOURCE

    @property
    def _processes(self) -> int | None:
        return self.processes if self._is_large else 1

    def _count(self, shard: int) -> list[int]:
        """`SHARD_COLUMNS` of a shard."""
        pieces, lengths, too_long = self._pieces(shard)
        bounds = (int(lengths.min()), int(lengths.max())) if len(lengths) else (1 << 62, 0)
        return [len(pieces), int((pieces.stop - pieces.start).sum()), too_long, *bounds]

    def pieces(self, shard: int) -> Pieces:
        """The pieces that the documents of a shard are cut into."""
        return self._pieces(shard)[0]

    def _pieces(self, shard: int) -> tuple[Pieces, np.ndarray, int]:
        """(pieces, lengths of the documents, documents left out because a medium in them is longer than the context)."""
        index, context = self.index(shard), self.context
        counts, breaks = text_counts(index, self.tokenizer)
        every = tokens = segment_tokens(index, self.vocabulary, counts)
        rows, loss, modality, first = np.arange(len(tokens)), index.loss, index.modality, index.first_segment
        if index.choice.any():  # room for the longest alternative
            rows = np.flatnonzero(~index.choice)
            tokens, loss, modality = np.maximum.reduceat(tokens, rows), loss[rows], modality[rows]
            first = np.searchsorted(rows, first)
        if not len(index):
            return Pieces(*(np.zeros(0, kind) for kind in (np.int64, *(np.int32,) * 3, *(bool,) * 3))), tokens, 0
        lengths = np.add.reduceat(tokens, first[:-1]) + 2
        ends = loss[first[1:] - 1]  # whether `<end>` is predicted
        targets = np.add.reduceat(tokens * loss, first[:-1]) + ends
        count, learned = np.diff(first), np.add.reduceat(loss.astype(np.int64), first[:-1])
        varies = (count < index.segments) | ((index.flags & UNORDERED > 0) & (learned < count))
        hides = (count > 1) & (learned == count)
        numbers = np.arange(len(index)) + self.first_document[shard]
        short = lengths <= context
        cut: list[tuple[int, int, int, int]] = []  # document, start, stop, targets
        too_long = 0
        first_break = starts(index.break_count)
        for sample in np.flatnonzero(~short).tolist():
            start, stop = first[sample : sample + 2].tolist()
            of_sample = every[rows[start:stop]].tolist()  # a document that is cut has its first alternatives
            good: list[int] = []
            position = 1
            for row, length in zip(rows[start:stop].tolist(), of_sample, strict=True):
                good += (breaks[first_break[row] : first_break[row + 1]] + np.int64(position + 1)).tolist()
                position += length
            try:
                ranges = cut_document(list(zip(modality[start:stop].tolist(), of_sample, strict=True)), context, good)
            except ValueError:
                too_long += 1
                continue
            predicted = np.repeat([False, *loss[start:stop], ends[sample]], [1, *of_sample, 1])
            before = starts(predicted)
            cut += [(int(numbers[sample]), one, end, int(before[end] - before[one + 1])) for one, end in ranges]
        table = np.array(cut, np.int64).reshape(-1, 4)
        document = np.concatenate([numbers[short], table[:, 0]])
        whole = np.arange(len(document)) < short.sum()
        pieces = Pieces(
            document,
            np.concatenate([np.zeros_like(lengths[short]), table[:, 1]]).astype(np.int32),
            np.concatenate([lengths[short], table[:, 2]]).astype(np.int32),
            np.concatenate([targets[short], table[:, 3]]).astype(np.int32),
            whole,
            whole & varies[document - self.first_document[shard]],
            hides[document - self.first_document[shard]],
        )
        return pieces, lengths, too_long

    def segments(self, number: int, draw: int) -> tuple[list[tuple[int, bool]], bool]:
        """([(tokens, learned)] of the segments of a document, whether their order is fixed)."""
        shard, sample = self.place(number)
        index = self.index(shard)
        rows = self._choose(index, sample, draw)
        sizes = [(self._row_tokens(index, row), bool(index.numbers.loss[row])) for row in rows]
        return sizes, not index.numbers.flags[sample] & UNORDERED

    # -- Documents

    def document_or_reason(
        self, number: int, draw: Callable[[], int] | None = None, span: tuple[int, int] | None = None
    ) -> tuple[str, Document | BadSample]:
        """(key, document), or the reason why it cannot be used. See `document_to_train`."""
        shard, sample = self.place(number)
        index = self.index(shard)
        try:
            document = self.document(number)
            if draw is not None and any(segment.choices for segment in document.segments):
                found = self._contents(shard, sample, self.block(shard, sample))
                chosen = [found[row] for row in self._choose(index, sample, draw())]
                parts = (replace(one, data=data, choices=()) for one, data in zip(document.segments, chosen, strict=True))
                document = replace(document, segments=tuple(parts))
            return index.key(sample), document
        except BadSample as error:
            return index.key(sample), error

    def document_to_train(
        self, number: int, draw: Callable[[], int] | None = None, span: tuple[int, int] | None = None
    ) -> tuple[str, Document | BadSample]:
        """(key, document as training reads it: texts as token ids, no `meta`), or the reason why it cannot be used.

        Args:
            number: of the document.
            draw: of n alternative texts of a segment, number `draw() % n` is taken; None: the first.
            span: tokens [start, stop) that are needed of a document that was cut: texts outside are zeros, media outside have
                no bytes, so that reading all pieces takes time linear in the document. None: the whole document.
        """
        shard, sample = self.place(number)
        index = self.index(shard)
        try:
            segments = self._part(shard, sample, *span) if span else self._whole(shard, sample, draw() if draw else 0)
            return index.key(sample), Document(tuple(segments), "", not index.numbers.flags[sample] & UNORDERED)
        except BadSample as error:
            return index.key(sample), error

    def _whole(self, shard: int, sample: int, draw: int) -> Iterator[Segment]:
        index, kept = self.index(shard), self._ids_of(shard)
        n, is_bytes = index.numbers, self.tokenizer.fingerprint == "bytes"
        rows = self._choose(index, sample, draw)
        block = b"" if kept and all(n.file[row] == TXT for row in rows) else self.block(shard, sample)
        others = None if all(n.file_offset[row] for row in rows) or not block else self._contents(shard, sample, block)
        for row in rows:
            offset, size, loss = n.file_offset[row], n.file_size[row], n.loss[row]
            if n.file[row] != TXT:
                data = block[offset : offset + size] if offset else others[row]  # type: ignore[index]
                yield Segment(data, EXTENSIONS[n.file[row]], loss, size=(n.segment_size[row], n.sample_rate[row]))
            elif kept:
                yield Segment("", "txt", loss, ids=kept.ids(row))
            elif offset and is_bytes:
                yield Segment("", "txt", loss, ids=np.frombuffer(block, np.uint8, size, offset))
            else:
                text = block[offset : offset + size].decode() if offset else others[row]  # type: ignore[index]
                yield Segment("", "txt", loss, ids=self._encode(index, row, text))

    def _part(self, shard: int, sample: int, start: int, stop: int) -> Iterator[Segment]:
        index, n = self.index(shard), self.index(shard).numbers
        self._check_once(shard, sample)
        position = 1
        for row in self._choose(index, sample, 0):
            modality, loss, size = n.modality[row], n.loss[row], (n.segment_size[row], n.sample_rate[row])
            if modality == TEXT:
                count = self._text_count(index, row)
                low, high = max(start - position - 1, 0), min(stop - position - 1, count)
                ids = self._text_part(shard, sample, row, low, high) if low < high else np.zeros(count, np.uint8)
                yield Segment("", "txt", loss, ids=ids)
                position += 1 + count
                continue
            if start <= position + 1 < stop:
                offset = n.file_offset[row]
                data = (
                    self.read(shard, n.offset[sample] + offset, n.file_size[row]) if offset else self._long(shard, sample)[row]
                )
                yield Segment(data, EXTENSIONS[n.file[row]], loss, size=size)
            else:
                yield Segment(b"", STAND_IN[modality], loss, size=size)
            position += self._row_tokens(index, row)

    def _text_part(self, shard: int, sample: int, row: int, low: int, high: int) -> np.ndarray:
        """(tokens,) ids of a text, of which [low, high) are right."""
        index = self.index(shard)
        n, count, kept = index.numbers, self._text_count(index, row), self._ids_of(shard)
        begin = n.offset[sample] + n.file_offset[row]
        item, kind = 1, "<u1"
        if n.file[row] != TXT:  # encoded: a header, breaks, then the ids
            header = self.read(shard, begin, Codes.HEADER.size)
            _, _, _, item, is_lost, breaks = Codes.HEADER.unpack(header)
            if is_lost:
                raise BadSample("checksum", "the sample was damaged before it was encoded")
            begin, kind = begin + len(header) + 8 * breaks, f"<u{item}"
        elif kept:
            is_checked = (shard, -1 - row) in self._checked
            self._checked.add((shard, -1 - row))
            return kept.ids(row, is_checked)
        elif not n.file_offset[row] or self.tokenizer.fingerprint != "bytes":
            return self._long(shard, sample)[row]
        ids = np.zeros(count, kind)  # pages that are not written take no memory
        ids[low:high] = np.frombuffer(self.read(shard, begin + low * item, (high - low) * item), kind)
        return ids

    def _long(self, shard: int, sample: int) -> dict[int, Any]:
        """Row -> ids of a text or bytes of a medium, of a long document that is not read by byte ranges."""
        found = self._last_long.pop((shard, sample), None)
        if found is None:
            index = self.index(shard)
            found = self._contents(shard, sample, self.block(shard, sample))
            found = {row: self._encode(index, row, data) if isinstance(data, str) else data for row, data in found.items()}
        self._last_long[shard, sample] = found
        while (
            len(self._last_long) > 1
            and sum(len(one) for rows in self._last_long.values() for one in rows.values()) > LONG_TOKENS
        ):
            self._last_long.popitem(last=False)
        return found

    def _contents(self, shard: int, sample: int, block: bytes) -> dict[int, Any]:
        index = self.index(shard)
        rows = range(index.numbers.first_segment[sample], index.numbers.first_segment[sample + 1])
        return dict(zip(rows, index.contents(sample, block, self.manifest(shard).fields, rows), strict=True))

    def _encode(self, index: ShardIndex, row: int, text: str) -> np.ndarray:
        ids = self.tokenizer.encode(text)
        if len(ids) != self._text_count(index, row):
            raise BadSample("length", f"a text has {len(ids)} tokens, {self._text_count(index, row)} were counted")
        return ids

    def _choose(self, index: ShardIndex, sample: int, draw: int) -> list[int]:
        """The rows of a document, one of each group of alternatives: the first, if it is cut or `draw` is 0."""
        n = index.numbers
        rows = range(n.first_segment[sample], n.first_segment[sample + 1])
        if not any(n.choice[rows.start : rows.stop]):
            return list(rows)
        groups: list[list[int]] = []
        for row in rows:
            groups += [] if n.choice[row] else [[]]
            groups[-1].append(row)
        longest = sum(max(self._row_tokens(index, row) for row in group) for group in groups) + 2
        return [group[draw % len(group) if longest <= self.context else 0] for group in groups]

    def _row_tokens(self, index: ShardIndex, row: int) -> int:
        """Tokens of a segment with opener and closing token."""
        n = index.numbers
        is_text = n.modality[row] == TEXT
        size = self._text_count(index, row) if is_text else n.segment_size[row]
        return self.vocabulary.segment_tokens(n.modality[row], size, n.sample_rate[row])

    def _text_count(self, index: ShardIndex, row: int) -> int:
        is_bytes = self.tokenizer.fingerprint == "bytes"
        return int((index.segment_size if is_bytes else index.columns[columns_of(self.tokenizer)[0]])[row])

    def _check_once(self, shard: int, sample: int) -> None:
        """Check the CRC-32 of a long document when this process reads the first piece of it."""
        if (shard, sample) in self._checked:
            return
        n, crc = self.index(shard).numbers, 0
        offset, size = n.offset[sample], n.size[sample]
        for first in range(0, size, 1 << 24):
            crc = zlib.crc32(self.read(shard, offset + first, min(1 << 24, size - first)), crc)
        if crc != n.crc[sample]:
            self.block(shard, sample)
        self._checked.add((shard, sample))

    def _ids_of(self, shard: int) -> KeptIds | None:
        """The ids that are kept next to a local shard."""
        if self.tokenizer.fingerprint == "bytes" or self.remote[shard]:
            return None
        if shard not in self._kept_ids:
            self._kept_ids[shard] = None
            with suppress(OSError, ValueError):
                self._kept_ids[shard] = KeptIds(self.index(shard), self.paths[shard], self.tokenizer)
            if len(self._kept_ids) > OPEN_SHARDS:
                self._kept_ids.popitem(last=False)
        return self._kept_ids[shard]


def segment_tokens(index: ShardIndex, vocabulary: Vocabulary, counts: np.ndarray) -> np.ndarray:
    """(G,) tokens of each segment of a shard, with opener and closing token. counts: (G,) tokens of each text.

    Raises:
        ShardError: the shard holds a modality that the model has no codec for.
    """
    for modality in (IMAGE, AUDIO):
        if (index.modality == modality).any() and modality not in vocabulary.modalities:
            name = MODALITIES[modality]
            raise ShardError(f"shard {index.path!r} holds {name}s, and the model has no codec for them: set model.{name}")
    tokens = counts + 1
    tokens[index.modality == IMAGE] = 1 + vocabulary.image_tokens
    sounds = index.modality == AUDIO
    tokens[sounds] = 2 + vocabulary.audio_tokens(
        index.segment_size[sounds].astype(np.int64), index.sample_rate[sounds].astype(np.int64)
    )
    return tokens
