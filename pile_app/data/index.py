"""The index of a shard: byte range, checksum and key of each sample, modality and size of each segment.

The rows of all shards of a source make its manifest (`manifest.py`). S is the number of samples, G of segments. Alternatives of
a segment (several captions: training draws one for each epoch) are rows of their own, marked by `choice`.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from pile_app.data.files import ShardError
from pile_app.data.packing import sentence_ends
from pile_app.data.tar import MAX_SAMPLE_BYTES, TarSample, files_of_block, read_samples
from pile_app.documents import AUDIO, ENCODED_EXTENSIONS, IMAGE, MODALITY_OF_EXTENSION, TEXT, BadSample, Document, Segment
from pile_app.fields import OWN, Fields
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
TYPES = {name: kind for columns in COLUMNS.values() for name, kind in columns.items()}
INFERRED_FROM = 200  # samples
LISTED = 5  # keys of rejected samples that a manifest lists for each reason
NAMES = 100  # of unused files and fields that are counted for each shard


@dataclass(eq=False)
class ShardIndex:
    """The rows of one shard. path: for messages; about: its JSON entry in the manifest; columns: see `docs/data-format.md`.

    about: name, size of the tar, fingerprint (changes with any row), rows (S, G, breaks, key bytes), read (samples), rejected
    (reason -> [count, first keys, first message]), unused and dropped (name -> count), tokens (tokenizer -> CRC-32).
    """

    path: str
    about: dict[str, Any]
    columns: dict[str, np.ndarray]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.path, self.about, self.columns)

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
    def first_key(self) -> np.ndarray:
        return starts(self.key_size)

    @cached_property
    def numbers(self) -> SimpleNamespace:
        """The columns as memoryviews, which give single numbers in a third of the time."""
        firsts = {"first_segment": self.first_segment, "first_key": self.first_key}
        return SimpleNamespace(**{name: column.data for name, column in (self.columns | firsts).items()})

    def key(self, sample: int) -> str:
        first, stop = self.numbers.first_key[sample], self.numbers.first_key[sample + 1]
        return str(self.numbers.key_bytes[first:stop], "utf-8", "replace")

    @property
    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    @property
    def rejected(self) -> dict[str, int]:
        """Reason -> number of samples that cannot be used."""
        return {reason: count for reason, (count, *_) in self.about["rejected"].items()}

    def check(self) -> None:
        """Raise `ShardError` if the rows are not those that were written."""
        sizes = (int(self.segments.sum()), int(self.break_count.sum()), int(self.key_size.sum()))
        if sizes != tuple(self.about["rows"][1:]) or fingerprint(self.about["size"], self.columns) != self.about["fingerprint"]:
            raise ShardError(f"the manifest is damaged in the rows of shard {self.path!r}: run `pile index {self.path}`")

    def check_tar(self, path: str) -> None:
        """Raise `ShardError` if the tar at `path` is not the one that was indexed, in any sample."""
        with open(path, "rb") as file:
            for sample, (offset, size, crc) in enumerate(zip(self.offset, self.size, self.crc, strict=True)):
                if zlib.crc32(os.pread(file.fileno(), int(size), int(offset))) != crc:
                    raise ShardError(
                        f"sample {self.key(sample)!r} of shard {self.path!r} differs from the manifest: fetch the shard again, "
                        f"or run `pile index --overwrite {self.path}` to accept it"
                    )

    def contents(self, sample: int, block: bytes, fields: Fields, rows: Iterable[int]) -> list[str | bytes]:
        """The text or file of some rows of a sample: byte ranges of its `block`, or read through the field map."""
        n = self.numbers
        rows = list(rows)
        if all(n.file_offset[row] for row in rows):
            files = [(EXTENSIONS[n.file[row]], block[n.file_offset[row] :][: n.file_size[row]]) for row in rows]
            return [data.decode() if kind == "txt" else data for kind, data in files]
        found: list[str | bytes] = []
        for segment in self.document(sample, block, fields).segments:
            found += segment.choices or (segment.data,)
        first, stop = n.first_segment[sample], n.first_segment[sample + 1]
        if len(found) != stop - first:
            raise BadSample("other_fields", f"{self.key(sample)!r} has {len(found)} segments, {stop - first} were indexed")
        return [found[row - first] for row in rows]

    def document(self, sample: int, block: bytes, fields: Fields) -> Document:
        return fields.read(self.key(sample), files_of_block(block)).document


def starts(sizes: np.ndarray) -> np.ndarray:
    """(N + 1,) int64 cumulated sizes, from 0."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def fingerprint(tar_size: int, columns: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(str(tar_size).encode(), digest_size=16)
    for name in TYPES:
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest()


# -- Building


def index_shard(path: str, name: str, shown: str, fields: Fields) -> ShardIndex:
    """Index the tar at `path`. Samples that cannot be used are counted by reason.

    Raises:
        ShardError: the tar is missing, damaged or compressed.
    """
    columns: dict[str, list[Any]] = {name: [] for name in TYPES}
    keys = bytearray()
    rejected: dict[str, list[Any]] = {}
    unused, dropped = Counter[str](), Counter[str]()
    samples, ignored = read_samples(path)
    with open(path, "rb") as file:
        for sample in samples:
            try:
                block = _read_block(file.fileno(), sample)
                files = {name: block[first : first + size] for name, (first, size) in sample.files.items()}
                _check_names(sample, fields)
                reading = fields.read(sample.key, files)
                rows = [row for pair in zip(reading.document.segments, reading.files, strict=True) for row in _rows(*pair)]
            except BadSample as error:
                detail = re.sub(r"<_io\.BytesIO object at \w+>", "the file", error.detail)  # the address varies
                count = rejected.setdefault(error.reason, [0, [], detail[:300]])
                count[0] += 1
                count[1] += [sample.key] * (len(count[1]) < LISTED)
                continue
            unused.update(reading.unused)
            dropped.update(reading.dropped)
            key = sample.key.encode()
            keys += key
            flags = 0 if reading.document.ordered else UNORDERED
            values = (sample.start, len(block), zlib.crc32(block), flags, len(rows), len(key))
            for column, value in zip(COLUMNS["samples"], values, strict=True):
                columns[column].append(value)
            for segment, size, is_choice, file_name, breaks in rows:
                kind = (segment.modality, *size, segment.loss, is_choice, EXTENSIONS.index(segment.extension))
                for column, value in zip(
                    COLUMNS["segments"], (*kind, *sample.files.get(file_name, (0, 0)), len(breaks)), strict=True
                ):
                    columns[column].append(value)
                columns["break_bytes"] += breaks
    arrays = {name: np.array(columns[name], kind) for name, kind in TYPES.items()}
    arrays["key_bytes"] = np.frombuffer(bytes(keys), np.uint8)
    about = {
        "name": name,
        "size": os.path.getsize(path),
        "fingerprint": fingerprint(os.path.getsize(path), arrays),
        "rows": [len(arrays[next(iter(group))]) for group in COLUMNS.values()],
        "read": len(samples),
        "rejected": rejected,
        "unused": dict((unused + ignored).most_common(NAMES)),
        "dropped": dict(dropped),
        "tokens": {},
    }
    return ShardIndex(shown, about, arrays)


def infer_from_shard(path: str) -> tuple[Fields, int]:
    """(the field map that samples of a tar suggest, number of these samples). Raises `ShardError` if there are none."""
    samples, _ = read_samples(path)
    usable = [sample for sample in samples if sample.error is None]
    usable = usable[:: max(1, len(usable) // INFERRED_FROM)][:INFERRED_FROM]
    names = Counter(name for sample in usable for name in sample.files)
    usual = {name for name, count in names.items() if 1 < count >= len(usable) / 2}
    clear = [sample for sample in usable if "json" in sample.files or not _alike(sample, usual)]
    if not clear:
        why = next((str(sample.error) for sample in samples if sample.error), str(_ambiguous(usable[0])) if usable else "")
        raise ShardError(f"shard {path!r} holds no usable sample" + (f": {why}" if why else ", the archive is empty"))
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


def _alike(sample: TarSample, named: Iterable[str]) -> list[str]:
    """Files of one kind that differ in the part of the name before it, and are not `named`: probably of several samples."""
    dotted = [name for name in sample.files if "." in name and name not in named]
    kinds = Counter(name.rsplit(".", 1)[1].lower() for name in dotted)
    return [name for name in dotted if kinds[name.rsplit(".", 1)[1].lower()] > 1]


def _check_names(sample: TarSample, fields: Fields) -> None:
    named = {name for entry in fields.entries for name in entry.names}
    if not (fields.is_own and "json" in sample.files) and _alike(sample, named):
        raise _ambiguous(sample)


def _ambiguous(sample: TarSample) -> BadSample:
    names = ", ".join(_alike(sample, ())[:4])
    return BadSample(
        "ambiguous_names",
        f"sample {sample.key!r} holds {names}: a key ends at the first dot of a name, so these may be several samples. Rename "
        "the files, or name them in `fields`",
    )


def _rows(segment: Segment, file_name: str) -> list[tuple[Segment, tuple[int, int], bool, str, list[int]]]:
    """(segment, size, is a choice, file, breaks) of a segment and of each of its alternatives."""
    parts = [replace(segment, data=text) for text in segment.choices] or [segment]
    return [
        (part, segment_size(part), number > 0, "" if segment.choices else file_name, segment_breaks(part))
        for number, part in enumerate(parts)
    ]


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
    assert segment.modality == AUDIO
    return audio_size(segment.file)


def segment_breaks(segment: Segment) -> list[int]:
    """Ends of the sentences of a long text, in UTF-8 bytes."""
    if segment.modality != TEXT:
        return []
    if segment.is_encoded:
        return segment.codes.breaks[0].tolist()
    parts = pairwise([0, *sentence_ends(segment.text)])
    return np.cumsum([len(segment.text[first:stop].encode()) for first, stop in parts]).tolist()
