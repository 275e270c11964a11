"""The index of a shard: byte range, checksum and key of each sample, modality and size of each segment.

The rows of all shards of a source make its manifest (`manifest.py`). S is the number of samples, G of segments. Alternatives of
a segment (several captions: training draws one for each epoch) are rows of their own, marked by `choice`."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from pile_app.data.files import ShardError, map_arrays, save_arrays
from pile_app.data.packing import sentence_ends
from pile_app.data.tar import MAX_SAMPLE_BYTES, TarSample, files_of_block, read_samples
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import ENCODED_EXTENSIONS, IMAGE, MODALITY_OF_EXTENSION, TEXT, BadSample, Codes, Document, Segment
from pile_app.fields import OWN, Fields, Reading
from pile_app.infer import infer_fields
from pile_app.media import audio_size, image_size

EXTENSIONS = tuple(MODALITY_OF_EXTENSION)  # the column `file` holds indices of it
UNORDERED = 1  # flag of a sample: training draws the order of its segments
COLUMNS = {
    "samples": {"offset": "<u8", "size": "<u4", "crc": "<u4", "flags": "|u1", "segments": "<u4", "key_size": "<u4"},
    "segments": {
        "modality": "|u1", "segment_size": "<u8", "sample_rate": "<u4", "loss": "|b1", "choice": "|b1", "file": "|u1",
        "file_offset": "<u4", "file_size": "<u4", "break_count": "<u4",
    },
    "breaks": {"break_bytes": "<u4"},
    "keys": {"key_bytes": "|u1"},
}  # fmt: skip
TOKENIZED_AT_ONCE = 1 << 20  # characters
TYPES = {name: kind for columns in COLUMNS.values() for name, kind in columns.items()}
INFERRED_FROM = 200  # samples
LISTED = 5  # keys of rejected samples that a manifest lists for each reason
NAMES = 100  # of unused files and fields that are counted for each shard


@dataclass(eq=False)
class ShardIndex:
    """The rows of one shard. Each column (`COLUMNS`, see `docs/data-format.md`) is an attribute.

    path: of the tar, for messages; fields: the field map that it was read with; about: the shard's JSON entry in the manifest:
    name, size of the tar, fingerprint (changes with any row), rows (S, G, breaks, key bytes), read (samples), rejected
    (reason -> [count, first keys, first message]), unused and dropped (name -> count), tokens (tokenizer -> CRC-32)."""

    path: str
    about: dict[str, Any]
    columns: dict[str, np.ndarray]
    fields: Fields

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.path, self.about, self.columns, self.fields)

    def __len__(self) -> int:
        return int(self.about["rows"][0])

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    @cached_property
    def first_segment(self) -> np.ndarray:
        """(S + 1,) segments of sample `s` are `first_segment[s]` up to `first_segment[s + 1]`."""
        return starts(self.segments)

    @cached_property
    def numbers(self) -> SimpleNamespace:
        """The columns as memoryviews, which give single numbers in a third of the time."""
        columns = self.columns | {"first_segment": self.first_segment, "first_key": starts(self.key_size)}
        return SimpleNamespace(**{name: column.data for name, column in columns.items()})

    def rows(self, sample: int) -> range:
        """The segments of a sample."""
        return range(self.numbers.first_segment[sample], self.numbers.first_segment[sample + 1])

    def key(self, sample: int) -> str:
        first, stop = self.numbers.first_key[sample], self.numbers.first_key[sample + 1]
        return str(self.numbers.key_bytes[first:stop], "utf-8", "replace")

    def check(self) -> None:
        """Raise `ShardError` if the rows are not those that were written."""
        sizes = [int(self.segments.sum()), int(self.break_count.sum()), int(self.key_size.sum())]
        if sizes != self.about["rows"][1:] or fingerprint(self.about["size"], self.columns) != self.about["fingerprint"]:
            raise ShardError(f"the manifest is damaged in the rows of shard {self.path!r}: run `pile index {self.path}`")

    def check_tar(self, path: str) -> None:
        """Raise `ShardError` if the tar at `path` differs from the indexed tar in any sample."""
        with open(path, "rb") as file:
            try:
                for sample in range(len(self)):
                    self.block(sample, file.fileno())
            except BadSample as error:
                raise ShardError(f"{error}{self.fix}") from error

    @property
    def fix(self) -> str:
        return f". Fetch the shard again, or run `pile index --overwrite {self.path}` to accept it"

    def block(self, sample: int, descriptor: int) -> bytes:
        """The bytes of a sample in the tar that is open as `descriptor`. Raises `BadSample` if they are not as indexed."""
        n = self.numbers
        block = os.pread(descriptor, n.size[sample], n.offset[sample])
        if zlib.crc32(block) != n.crc[sample]:
            raise BadSample("checksum", f"sample {self.key(sample)!r} of shard {self.path!r} differs from the manifest")
        return block

    def document(self, sample: int, block: bytes) -> Document:
        """Return the document of a sample, from its bytes in the tar. Raises `BadSample`."""
        return self.fields.read(self.key(sample), files_of_block(block)).document

    def contents(self, sample: int, block: bytes) -> dict[int, str | bytes]:
        """Row -> text or file of each segment of a sample: byte ranges of its `block`, or read through the field map."""
        n, rows = self.numbers, self.rows(sample)
        if all(n.file_offset[row] for row in rows):
            ends = {row: n.file_offset[row] + n.file_size[row] for row in rows}
            files = {row: block[n.file_offset[row] : end] for row, end in ends.items()}
            return {row: file.decode() if EXTENSIONS[n.file[row]] == "txt" else file for row, file in files.items()}
        found: list[str | bytes] = []
        for segment in self.document(sample, block).segments:
            found += segment.choices or (segment.data,)
        if len(found) != len(rows):
            raise BadSample("other_fields", f"{self.key(sample)!r} has {len(found)} segments, {len(rows)} were indexed")
        return dict(zip(rows, found, strict=True))


def starts(sizes: np.ndarray) -> np.ndarray:
    """(N + 1,) int64 cumulated sizes, from 0."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def fingerprint(tar_size: int, columns: Mapping[str, np.ndarray]) -> str:
    """32 hexadecimal digits that change with any row."""
    digest = hashlib.blake2b(str(tar_size).encode(), digest_size=16)
    for name in TYPES:
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest()


# -- Building


def index_shard(path: str, name: str, shown: str, fields: Fields) -> ShardIndex:
    """Index the tar at `path`, and count unusable samples by reason. Raises `ShardError` as `read_samples`."""
    rows: dict[str, list[tuple[int, ...]]] = {"samples": [], "segments": []}
    keys, breaks = bytearray(), list[int]()
    rejected: dict[str, list[Any]] = {}
    unused, dropped = Counter[str](), Counter[str]()
    named = {name for entry in fields.entries for name in entry.names}
    samples, ignored = read_samples(path)
    with open(path, "rb") as file:
        for sample in samples:
            try:
                block = _read_block(file.fileno(), sample)
                if not (fields.is_own and "json" in sample.files) and (error := _ambiguity(sample, named)):
                    raise error
                reading = fields.read(sample.key, {n: block[at : at + size] for n, (at, size) in sample.files.items()})
                segments = _segment_rows(reading, sample.files)
            except BadSample as error:
                count = rejected.setdefault(error.reason, [0, [], error.detail[:300]])
                count[0] += 1
                count[1] += [sample.key] * (len(count[1]) < LISTED)
                continue
            unused.update(reading.unused)
            dropped.update(reading.dropped)
            key, flags = sample.key.encode(), 0 if reading.document.ordered else UNORDERED
            keys += key
            rows["samples"].append((sample.start, len(block), zlib.crc32(block), flags, len(segments), len(key)))
            for row, ends in segments:
                rows["segments"].append((*row, len(ends)))
                breaks += ends
    arrays = {"break_bytes": np.array(breaks, "<u4"), "key_bytes": np.frombuffer(bytes(keys), np.uint8)}
    for group, table in rows.items():
        columns: Iterable[Any] = zip(*table, strict=True) if table else [()] * len(COLUMNS[group])
        for (column, kind), values in zip(COLUMNS[group].items(), columns, strict=True):
            arrays[column] = np.array(values, kind)
    size = os.path.getsize(path)
    about = {"name": name, "size": size, "fingerprint": fingerprint(size, arrays), "read": len(samples), "rejected": rejected}
    about |= {"rows": [len(arrays[next(iter(group))]) for group in COLUMNS.values()], "tokens": {}, "dropped": dict(dropped)}
    return ShardIndex(shown, about | {"unused": dict((unused + ignored).most_common(NAMES))}, arrays, fields)


def infer_from_shard(path: str) -> tuple[Fields, int]:
    """(the field map that samples of a tar suggest, number of these samples). Raises `ShardError` if there are none."""
    samples, _ = read_samples(path)
    usable = [sample for sample in samples if sample.error is None]
    usable = usable[:: max(1, len(usable) // INFERRED_FROM)][:INFERRED_FROM]
    names = Counter(name for sample in usable for name in sample.files)
    usual = {name for name, count in names.items() if 1 < count >= len(usable) / 2}
    clear = [sample for sample in usable if "json" in sample.files or not _ambiguity(sample, usual)]
    if not clear:
        errors = (f"e.g. {error}" for sample in samples if (error := sample.error or _ambiguity(sample, usual)))
        raise ShardError(f"shard {path!r} holds no usable sample, {next(errors, 'the archive is empty')}")
    if any(name.rsplit(".", 1)[-1] in ENCODED_EXTENSIONS for name in names):
        return OWN, len(clear)
    with open(path, "rb") as file:
        blocks = [(sample.files, _read_block(file.fileno(), sample)) for sample in clear]
    views = [{name: block[first : first + size] for name, (first, size) in files.items()} for files, block in blocks]
    try:
        return infer_fields(views), len(views)
    except ValueError as error:
        raise ShardError(f"shard {path!r}: {error}") from error


def _read_block(descriptor: int, sample: TarSample) -> bytes:
    """The bytes of a sample in its tar. Raises `BadSample`."""
    if sample.error is not None:
        raise sample.error
    if sample.stop - sample.start > MAX_SAMPLE_BYTES:
        raise BadSample("sample_too_large", f"{sample.stop - sample.start:,} bytes")
    return os.pread(descriptor, sample.stop - sample.start, sample.start)


def _ambiguity(sample: TarSample, named: Collection[str]) -> BadSample | None:
    """An error if files of one kind differ in the part of the name before it, and are not `named`."""
    kinds = {name: name.rsplit(".", 1)[1].lower() for name in sample.files if "." in name and name not in named}
    counts = Counter(kinds.values())
    alike = [name for name, kind in kinds.items() if counts[kind] > 1]
    why = "a key ends at the first dot, so these may be several samples. Rename the files, or name them in `fields`"
    return BadSample("ambiguous_names", f"sample {sample.key!r} holds {', '.join(alike[:4])}: {why}") if alike else None


def _segment_rows(reading: Reading, files: Mapping[str, tuple[int, int]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """(values of the columns of "segments" but `break_count`, breaks) of each segment and alternative."""
    rows: list[tuple[tuple[int, ...], list[int]]] = []
    for segment, name in zip(reading.document.segments, reading.files, strict=True):
        kind, offset = EXTENSIONS.index(segment.extension), (0, 0) if segment.choices else files.get(name, (0, 0))
        for number, part in enumerate([replace(segment, data=text) for text in segment.choices] or [segment]):
            row = (part.modality, *segment_size(part), part.loss, number > 0, kind, *offset)
            rows.append((row, segment_breaks(part)))
    return rows


def segment_size(segment: Segment) -> tuple[int, int]:
    """(UTF-8 bytes, pixels, or samples per channel; sample rate in Hz or 0) of a segment. Raises `BadSample`."""
    if segment.size is not None:
        return segment.size
    if segment.is_encoded:
        return segment.codes.size, segment.codes.sample_rate
    if segment.modality == TEXT:
        try:
            return len(segment.text.encode()), 0
        except UnicodeEncodeError as error:  # JSON may hold lone surrogates
            raise BadSample("invalid_utf8", str(error)) from error
    if segment.modality == IMAGE:
        height, width = image_size(segment.file)
        return height * width, 0
    return audio_size(segment.file)


def segment_breaks(segment: Segment) -> list[int]:
    """Ends of the sentences of a long text, in UTF-8 bytes."""
    if segment.modality != TEXT:
        return []
    if segment.is_encoded:
        return segment.codes.breaks[0].tolist()
    parts = pairwise([0, *sentence_ends(segment.text)])
    return np.cumsum([len(segment.text[first:stop].encode()) for first, stop in parts]).tolist()


# -- Tokens of texts, by a tokenizer other than bytes. Counts become columns of the manifest. The ids of a local shard are kept
# in `<shard>.<fingerprint>.tokens.safetensors`; without that file, the worker that reads a document tokenizes it.


def columns_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """Names of the manifest's columns for a tokenizer: (G,) counts of tokens, and breaks in tokens."""
    return f"tokens.{tokenizer.fingerprint[:16]}", f"breaks.{tokenizer.fingerprint[:16]}"


def text_counts(index: ShardIndex, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """((G,) int64 tokens of each text, 0 for media; breaks in tokens) of a shard. Raises `ShardError` if they are damaged."""
    if tokenizer.fingerprint == "bytes":
        return np.where(index.modality == TEXT, index.segment_size, 0).astype(np.int64), index.break_bytes
    counts, breaks = (index.columns[name] for name in columns_of(tokenizer))
    if _checksum(counts, breaks) != index.about["tokens"].get(tokenizer.fingerprint[:16]):
        raise ShardError(f"the token counts of shard {index.path!r} are damaged: run `pile index --overwrite {index.path}`")
    return counts.astype(np.int64), breaks


def _checksum(counts: np.ndarray, breaks: np.ndarray) -> int:
    return zlib.crc32(breaks.tobytes(), zlib.crc32(counts.tobytes()))


class KeptIds:
    """The ids of the texts of a local shard. Raises OSError or ValueError if they are missing, or those of another shard."""

    def __init__(self, index: ShardIndex, path: str, tokenizer: Tokenizer) -> None:
        arrays, header = map_arrays(_ids_path(path, tokenizer))
        in_files = index.file == EXTENSIONS.index("txt")  # the shard itself holds the ids of encoded texts
        self.first = starts(np.where(in_files, text_counts(index, tokenizer)[0], 0))
        lengths = [len(arrays.get(name, ())) for name in ("crc", "ids")]
        if header.get("shard") != index.about["fingerprint"] or lengths != [len(in_files), self.first[-1]]:
            raise ValueError("these are the ids of another shard")
        self.path, self.crc, self.ids_of_all = index.path, arrays["crc"], arrays["ids"]
        self.is_checked = bytearray(len(in_files))

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) ids of a text, whose checksum is compared once. Raises `BadSample` if they are damaged."""
        ids = self.ids_of_all[self.first[row] : self.first[row + 1]]
        if not self.is_checked[row] and zlib.crc32(ids.data) != self.crc[row]:
            raise BadSample("checksum", f"the token ids that were kept for {self.path!r} are damaged: remove the file")
        self.is_checked[row] = True
        return ids


def count_tokens(index: ShardIndex, path: str, tokenizer: Tokenizer, keep: bool) -> None:
    """Add the columns of a tokenizer to an index. keep: write the ids next to the tar at `path`, if the folder can be written.

    Raises `ShardError` if a sample differs from the index, or another tokenizer encoded it."""
    kind = "<u2" if tokenizer.size <= 1 << 16 else "<u4"
    counts, crc = np.zeros(len(index.modality), "<u4"), np.zeros(len(index.modality), "<u4")
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # row -> ids (none if the shard holds them), breaks
    waiting: dict[int, str] = {}
    size = 0

    def tokenize() -> None:
        texts = list(waiting.values())
        for row, (ids, ends) in zip(waiting, tokenizer.encode_all(texts, list(map(sentence_ends, texts))), strict=True):
            found[row] = ids.astype(kind), ends.astype("<u4")
            counts[row], crc[row] = len(ids), zlib.crc32(found[row][0].data)
        waiting.clear()

    with open(path, "rb") as file:
        for sample in range(len(index)):
            if not any(index.numbers.modality[row] == TEXT for row in index.rows(sample)):
                continue
            try:
                block = index.block(sample, file.fileno())
                for row, content in index.contents(sample, block).items():
                    if isinstance(content, str):
                        waiting[row] = content
                        size += len(content)
                    elif index.modality[row] == TEXT:
                        codes = Codes.from_bytes(content)
                        if codes.encoder != tokenizer.fingerprint:
                            what = f"text encoded by tokenizer {codes.encoder}, not {tokenizer.fingerprint}"
                            raise ShardError(f"{index.path!r} holds {what}: set model.tokenizer to that, or encode again")
                        counts[row] = len(codes.values)
                        found[row] = np.zeros(0, kind), codes.breaks[1].astype("<u4")
            except BadSample as error:
                raise ShardError(f"the texts of shard {index.path!r} cannot be tokenized: {error}{index.fix}") from error
            if size > TOKENIZED_AT_ONCE:
                tokenize()
                size = 0
    tokenize()
    in_order = [(np.zeros(0, kind), np.zeros(0, "<u4")), *(found[row] for row in sorted(found))]
    breaks = np.concatenate([ends for _, ends in in_order])
    index.columns |= dict(zip(columns_of(tokenizer), (counts, breaks), strict=True))
    index.about["tokens"][tokenizer.fingerprint[:16]] = _checksum(counts, breaks)
    if keep and os.access(os.path.dirname(path) or ".", os.W_OK):
        with suppress(OSError):
            arrays = {"crc": [crc], "ids": [ids for ids, _ in in_order]}
            save_arrays(_ids_path(path, tokenizer), arrays, {"shard": index.about["fingerprint"]})


def _ids_path(path: str, tokenizer: Tokenizer) -> str:
    return f"{path}.{tokenizer.fingerprint[:16]}.tokens.safetensors"
