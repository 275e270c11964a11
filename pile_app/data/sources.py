"""Sources: the shards of one name, the pieces that their documents are cut into for the order, and their contents.

Tables of large sources, which take time to compute, are computed by all cores and kept in `$PILE_CACHE`."""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from pile_app.data.files import ShardError, cache_folder, for_each, map_arrays, save_arrays
from pile_app.data.index import EXTENSIONS, UNORDERED, KeptIds, ShardIndex, starts, text_counts
from pile_app.data.order import ORDER_VERSION, SourceOrder, SourceTokens, piece_table
from pile_app.data.packing import cut_document
from pile_app.data.remote import ShardCache
from pile_app.data.shards import OpenShard, Shards, describe_balance
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Codes, Document, Segment
from pile_app.vocabulary import Vocabulary

log = logging.getLogger(__name__)

LARGE_SOURCE = 1_000_000  # documents, from which on the tables of the order are kept
LONG_TOKENS = 64 << 20  # of long documents that a process keeps
READ_WHOLE = 1 << 14  # bytes of a document that cost no more to read than a part of them
SHARD_COLUMNS = ("pieces", "tokens", "too_long", "shortest", "longest")
TXT = EXTENSIONS.index("txt")
STAND_IN = ("txt", "png", "wav")  # extension of a segment outside of a piece, by modality
Draw = Callable[[], int] | None  # of n alternative texts of a segment, number `draw() % n` is taken; None: the first
Span = tuple[int, int] | None  # tokens [start, stop) that are needed of a document that was cut; None: the whole document
Found = tuple[str, Document | BadSample]  # (key, document, or the reason why it cannot be used)


class SourceShard(OpenShard):
    """An open shard of a source, with the tokens of its segments."""

    def __init__(self, source: SourceData, number: int) -> None:
        super().__init__(source, number)
        self.vocabulary, self.tokenizer, self.context = source.vocabulary, source.tokenizer, source.context
        self.readings, self.is_bytes = source.readings, source.tokenizer.fingerprint == "bytes"
        self.checked = set[int]()  # long documents whose checksum was right

    @cached_property
    def kept(self) -> KeptIds | None:
        """The ids that are kept next to a local shard."""
        if not self.is_bytes and self.cache is None:
            try:
                with suppress(OSError):
                    return KeptIds(self.index, self.path, self.tokenizer)
            except ValueError as error:
                log.warning(
                    "%s has token ids next to it that cannot be used (%s), so training tokenizes its texts, which is slow: "
                    "run `pile index --overwrite --tokenizer ...` on the shards", self.path, error,
                )  # fmt: skip
        return None

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """((G,) tokens of each segment with opener and closing token, breaks in tokens)."""
        counts, breaks = text_counts(self.index, self.tokenizer)
        return segment_tokens(self.index, self.vocabulary, counts), breaks

    def cut(self) -> tuple[np.ndarray, np.ndarray, int]:
        """(table of the pieces, (S,) tokens of the documents, number of documents with a medium longer than the context)."""
        index, (every, breaks) = self.index, self.lengths
        rows = np.flatnonzero(~index.choice)  # the first alternative of each segment
        tokens = np.maximum.reduceat(every, rows) if len(rows) else every  # room for the longest alternative
        loss, modality, first = index.loss[rows], index.modality[rows], np.searchsorted(rows, index.first_segment)
        if self.readings > 1:  # see `Annotator`
            each = [range(*ends) for ends in pairwise(first.tolist())]
            again = np.array([row for one in each for _ in range(self.readings) for row in one], np.int64)
            last = np.array([n == self.readings for one in each for n in range(1, self.readings + 1) for _ in one], bool)
            rows, tokens, loss, modality = rows[again], tokens[again], loss[again] & last, modality[again]
            first = first * self.readings

        def total(values: np.ndarray) -> np.ndarray:  # (S,), of the segments of each document
            return np.diff(starts(values)[first])

        count, learned, lengths = np.diff(first), total(loss), total(tokens) + 2
        ends = loss[first[1:] - 1]  # whether `<end>` is predicted
        varies = (count < index.segments) | ((index.flags & UNORDERED > 0) & (learned < count) & (self.readings == 1))
        hides = (count > 1) & (learned == count)
        cut: list[tuple[int, int, int, int]] = []  # sample, start, stop, targets
        too_long, first_break = 0, starts(index.break_count)
        for sample in np.flatnonzero(lengths > self.context).tolist():
            start, stop = first[sample : sample + 2].tolist()
            sizes = every[rows[start:stop]].tolist()  # a document that is cut has its first alternatives
            good: list[int] = []
            position = 1
            for row, size in zip(rows[start:stop].tolist(), sizes, strict=True):
                good += (breaks[first_break[row] : first_break[row + 1]] + np.int64(position + 1)).tolist()
                position += size
            try:
                ranges = cut_document(list(zip(modality[start:stop].tolist(), sizes, strict=True)), self.context, good)
            except ValueError:
                too_long += 1
                continue
            if learned[sample] == count[sample]:  # every token but the first of a piece
                cut += [(sample, begin, end, end - begin - 1) for begin, end in ranges]
            else:
                before = starts(np.repeat([False, *loss[start:stop], ends[sample]], [1, *sizes, 1]))  # predicted tokens
                cut += [(sample, begin, end, int(before[end] - before[begin + 1])) for begin, end in ranges]
        fits = np.flatnonzero(lengths <= self.context)
        table = np.stack([fits, 0 * fits, lengths[fits], (total(tokens * loss) + ends)[fits]], 1)
        sample, start, stop, targets = np.concatenate([table, np.array(cut, np.int64).reshape(-1, 4)]).T
        whole = np.arange(len(sample)) < len(fits)
        columns = {"whole": whole, "targets": targets, "varies": whole & varies[sample], "hides": hides[sample]}
        return piece_table(document=sample, start=start, stop=stop, **columns), lengths, too_long

    def choose(self, sample: int, draw: Draw) -> Sequence[int]:
        """The rows of a document: row `draw()` of each group of alternatives, the first if the document may be cut."""
        rows, choice, tokens = self.index.rows(sample), self.index.numbers.choice, self.lengths[0]
        if not any(choice[rows.start : rows.stop]):
            return rows
        groups: list[list[int]] = []
        for row in rows:
            groups += [] if choice[row] else [[]]
            groups[-1].append(row)
        longest = sum(int(tokens[group].max()) for group in groups) + 2
        number = draw() if draw and longest <= self.context else 0
        return [group[number % len(group)] for group in groups]


class SourceData(Shards):
    """The documents of one source: their pieces of at most `context` tokens for the order, their contents for training."""

    opened_as = SourceShard

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
        readings: int = 1,
    ) -> None:
        super().__init__(pattern, cache, fields, tokenizer, processes)
        self.name, self.vocabulary, self.context, self.readings = name, vocabulary, context, readings
        self._is_large = len(self) >= LARGE_SOURCE
        self._processes = processes if self._is_large else 1
        shards = range(len(self.paths))
        columns = self._table("shards", lambda: np.array(for_each(self._count, shards, self._processes)))
        self.counts = dict(zip(SHARD_COLUMNS, columns.T, strict=True))
        counts = self.counts["pieces"], self.counts["tokens"]
        self.tokens = SourceTokens(name, *counts, self.pieces, np.array(self.sizes), self.segments)
        if counts[0].sum():
            return
        lengths = f"{self.counts['shortest'].min():,} to {self.counts['longest'].max():,}"
        why = f" that fits a context of {context:,} tokens: they have {lengths} tokens. Raise data.context"
        if not len(self):
            why = f": {describe_balance(self.balance())}. {'; '.join(text for _, text in self.balance()['examples'].values())}"
        raise ShardError(f"source {name!r} ({pattern!r}) holds no document{why}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_long: OrderedDict[tuple[int, int], tuple[int, list[Segment]]] = OrderedDict()

    def describe(self) -> str:
        """One line for people: samples, documents, rejections, unused names, the field map."""
        too_long = int(self.counts["too_long"].sum())
        more = f"; {too_long:,} documents hold a medium longer than the context of {self.context:,} tokens" if too_long else ""
        return f"source {self.name!r}: {describe_balance(self.balance())}{more}"

    def rejected(self) -> dict[str, int]:
        """Reason -> samples that were rejected when the shards were indexed."""
        return dict(sorted(self.balance()["rejected"].items()))

    # -- Pieces

    def order(self, seed: int, streams: int = 1, condition_dropout: float = 0.0) -> SourceOrder:
        """The order of the source. The packs of every window are counted once for a large source, and kept."""
        make = partial(SourceOrder, self.tokens, self.context, seed, streams, condition_dropout=condition_dropout)
        count = partial(for_each, processes=self._processes)
        return make(self._table(f"packs-{seed}-{streams}", lambda: make(for_each=count).window_packs))

    def _table(self, what: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """A table of this source; that of a large source is read from the cache folder if it is there."""
        if not self._is_large:
            return compute()
        identity = (what, ORDER_VERSION, self.name, self.fingerprint, self.context, self.vocabulary, self.readings)
        digest = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
        path = cache_folder() / "tables" / f"{digest}.safetensors"
        try:
            stored, header = map_arrays(str(path))
            return stored["table"].reshape(header["shape"])
        except (OSError, ValueError, KeyError):
            log.info("source %r: computing the order of %d documents", self.name, len(self))
            table = compute().astype("<i8")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(str(path), {"table": [table.reshape(-1)]}, {"shape": table.shape})
            return table

    def _count(self, shard: int) -> list[int]:
        """Return the `SHARD_COLUMNS` of a shard."""
        pieces, lengths, too_long = self.opened(shard).cut()
        bounds = (int(lengths.min()), int(lengths.max())) if len(lengths) else (1 << 62, 0)
        return [len(pieces), int((pieces["stop"] - pieces["start"]).sum()), too_long, *bounds]

    def pieces(self, shard: int) -> np.ndarray:
        """The table of the pieces that the documents of a shard are cut into."""
        table, *_ = self.opened(shard).cut()
        table["document"] += self.first_document[shard]
        return table

    def segments(self, number: int, draw: int) -> tuple[list[tuple[int, bool]], bool]:
        """([(tokens, learned)] of the segments of a document, whether their order is fixed)."""
        shard, sample = self.place(number)
        opened = self.opened(shard)
        n, tokens = opened.index.numbers, opened.lengths[0]
        sizes = [(int(tokens[row]), bool(n.loss[row])) for row in opened.choose(sample, lambda: draw)]
        return sizes, not n.flags[sample] & UNORDERED

    # -- Documents

    def document_or_reason(self, number: int, draw: Draw = None, span: Span = None) -> Found:
        """Read a document with its texts and `meta`, whole."""
        shard, sample = self.place(number)
        opened = self.opened(shard)
        try:
            document = self.document(number)
            if draw is not None and any(segment.choices for segment in document.segments):
                found = opened.index.contents(sample, self.block(shard, sample))
                chosen = [found[row] for row in opened.choose(sample, draw)]
                parts = (replace(one, data=data, choices=()) for one, data in zip(document.segments, chosen, strict=True))
                document = replace(document, segments=tuple(parts))
            return opened.index.key(sample), document
        except BadSample as error:
            return opened.index.key(sample), error

    def document_to_train(self, number: int, draw: Draw = None, span: Span = None) -> Found:
        """Read a document as training needs it: texts as token ids, no `meta`. Contents outside of `span` may be zeros, so that
        reading all pieces takes time linear in the document."""
        shard = bisect_right(self.first_document, number) - 1
        opened, sample = self.opened(shard), number - self.first_document[shard]
        n, key = opened.index.numbers, opened.index.key(sample)
        try:
            row = n.first_segment[sample]
            if n.segments[sample] == 1 and n.file[row] == TXT:
                # A text, as most documents are: `_segments` does the same in three times the time.
                if opened.kept and not span:
                    return key, Document((Segment("", "txt", n.loss[row], opened.kept.ids(row)),), key)
                if opened.is_bytes and n.file_offset[row] and (not span or n.size[sample] <= READ_WHOLE):
                    ids = np.frombuffer(self.block(shard, sample), np.uint8, n.file_size[row], n.file_offset[row])
                    return key, Document((Segment("", "txt", n.loss[row], ids),), key)
            segments = self._segments(shard, sample, None if span else draw, span)
            return key, Document(tuple(segments), key, not n.flags[sample] & UNORDERED)
        except BadSample as error:
            return key, error

    def _segments(self, shard: int, sample: int, draw: Draw, span: Span) -> list[Segment]:
        opened = self.opened(shard)
        index, kept, is_bytes, n = opened.index, opened.kept, opened.is_bytes, opened.index.numbers
        rows, lengths = opened.choose(sample, draw), opened.lengths[0]
        in_tar = [row for row in rows if kept is None or n.file[row] != TXT]
        if span and not all(n.file_offset[row] and (is_bytes or n.file[row] != TXT) for row in in_tar):
            return self._long(shard, sample)
        block, parsed = b"", dict[int, Any]()
        if sample not in opened.checked if span else in_tar:  # once for all pieces of a long document
            block = self.block(shard, sample)
            opened.checked |= {sample} if span else set()
        if in_tar and not span:
            parsed = {} if all(n.file_offset[row] for row in in_tar) else index.contents(sample, block)

        def read(row: int, begin: int, size: int) -> bytes:
            """Bytes of the file of a segment."""
            offset = n.file_offset[row] + begin
            return block[offset : offset + size] if block else os.pread(opened.descriptor, size, n.offset[sample] + offset)

        def ids_of(row: int, count: int, low: int, high: int) -> np.ndarray:
            """(count,) ids of a text: those of [low, high)."""
            begin, item = 0, 1
            if low >= high:
                return np.zeros(count, np.uint8)
            if kept is not None and n.file[row] == TXT:
                return kept.ids(row)
            if n.file[row] != TXT:  # encoded: a header, breaks, then the ids
                *_, item, is_lost, breaks = Codes.HEADER.unpack(read(row, 0, Codes.HEADER.size))
                if is_lost:
                    raise BadSample("checksum", "the sample was damaged before it was encoded")
                begin = Codes.HEADER.size + 8 * breaks
            elif parsed or not is_bytes:
                ids = self.tokenizer.encode(parsed[row] if parsed else read(row, 0, n.file_size[row]).decode())
                if len(ids) != count:
                    raise BadSample("length", f"a text has {len(ids)} tokens, {count} were counted")
                return ids
            part = np.frombuffer(read(row, begin + low * item, (high - low) * item), f"<u{item}")
            if len(part) == count:
                return part
            ids = np.zeros(count, part.dtype)  # pages that are not written take no memory
            ids[low:high] = part
            return ids

        start, stop = span or (0, 1 << 62)
        segments, first = [], 2  # index in the document of the first token after an opener
        for row in rows:
            count, loss, size = int(lengths[row]) - 1, n.loss[row], (n.segment_size[row], n.sample_rate[row])
            low, high = max(start - first, 0), min(stop - first, count)  # the tokens of the segment in the span
            if n.modality[row] == TEXT and (span or n.file[row] == TXT):
                segments.append(Segment("", "txt", loss, ids=ids_of(row, count, low, high)))
            elif span and low >= high:
                segments.append(Segment(b"", STAND_IN[n.modality[row]], loss, size=size))
            else:
                data = parsed[row] if parsed else read(row, 0, n.file_size[row])
                segments.append(Segment(data, EXTENSIONS[n.file[row]], loss, size=size))
            first += 1 + count
        return segments

    def _long(self, shard: int, sample: int) -> list[Segment]:
        """The segments of a long document that cannot be read by byte ranges; documents that were read last are kept."""
        size, segments = self._last_long.pop((shard, sample), (0, []))
        if not segments:
            segments = self._segments(shard, sample, None, None)
            size = sum(len(one.data) if one.ids is None else len(one.ids) for one in segments)
        self._last_long[shard, sample] = size, segments
        while len(self._last_long) > 1 and sum(size for size, _ in self._last_long.values()) > LONG_TOKENS:
            self._last_long.popitem(last=False)
        return segments


def segment_tokens(index: ShardIndex, vocabulary: Vocabulary, counts: np.ndarray) -> np.ndarray:
    """(G,) tokens of each segment of a shard, with opener and closing token, from those of its texts. Raises `ShardError` if it
    holds a modality that the model has no codec for."""
    for modality in (IMAGE, AUDIO):
        if (index.modality == modality).any() and modality not in vocabulary.modalities:
            name = MODALITIES[modality]
            raise ShardError(f"shard {index.path!r} holds {name}s, and the model has no codec for them: set model.{name}")
    tokens, is_sound = counts + 1, index.modality == AUDIO
    tokens[index.modality == IMAGE] = 1 + vocabulary.image_tokens
    sizes = (index.columns[name][is_sound].astype(np.int64) for name in ("segment_size", "sample_rate"))
    tokens[is_sound] = 2 + vocabulary.audio_tokens(*sizes)
    return tokens
