"""The index of a shard: a small file beside it, so that training never parses a tar.

`build_index` reads a tar once. The index (`<shard>.index.safetensors`, arrays that are mapped into memory, so that processes
share one copy) holds for every sample its byte range and CRC-32, and for every segment its modality and its *own* size: UTF-8
bytes, image pixels, or sound samples and their rate. Token counts follow from those and the `Vocabulary` by arithmetic, so that
no index goes stale when a codec changes; only a subword tokenizer has to count, once, into a second file that carries its
fingerprint (`text.py`).

In arrays, S is the samples and G the segments of a shard.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.data.packing import sentence_ends
from pile_app.documents import AUDIO, IMAGE, MODALITY_OF_EXTENSION, TEXT, BadSample, Segment
from pile_app.fields import OWN
from pile_app.media import audio_size, image_size

if TYPE_CHECKING:
    from pile_app.data.tokenizers import TextTokens

from pile_app.data.tar import ShardError, ranges_of_files, sample_ranges

INDEX_VERSION = 3
INDEX_SUFFIX = ".index.safetensors"
UNORDERED = 1  # sample flag: the order of its segments is free
EXTENSIONS = tuple(MODALITY_OF_EXTENSION)  # `ShardIndex.file` holds places in it: append, never reorder
MAX_SAMPLE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is known of one tar without opening it. S samples, G segments, L texts with breaks.

    offset, size: (S,) byte range in the tar; crc: (S,) CRC-32 of that range; flags: (S,) uint8; first_segment: (S + 1,);
    modality: (G,) uint8; segment_size: (G,) UTF-8 bytes | pixels | samples; sample_rate: (G,) Hz, 0 but for sounds; loss: (G,)
    bool; file: (G,) number of its extension in `EXTENSIONS`; file_offset, file_size: (G,) where in the sample it stands, in
    bytes, offset 0 for a text of the `json`; breaks: places inside long texts where a sentence ends, in UTF-8 bytes, those of
    segment `break_segment[l]` from `first_break[l]` up to `first_break[l + 1]`, (L,) and (L + 1,); key_bytes, first_key: sample
    keys in UTF-8, (S + 1,); rejected: [key, reason] of samples that cannot be used; fingerprint: changes when any sample of the
    shard changes, moves, comes or goes.
    """

    path: str
    tar_size: int
    fingerprint: str
    rejected: list[list[str]]
    crc_of_arrays: int | None
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    flags: np.ndarray
    first_segment: np.ndarray
    modality: np.ndarray
    segment_size: np.ndarray
    sample_rate: np.ndarray
    loss: np.ndarray
    file: np.ndarray
    file_offset: np.ndarray
    file_size: np.ndarray
    breaks: np.ndarray
    break_segment: np.ndarray
    first_break: np.ndarray
    key_bytes: np.ndarray
    first_key: np.ndarray

    TYPES = {  # noqa: RUF012 (a table, never changed)
        "offset": "<u8", "size": "<u8", "crc": "<u4", "flags": "|u1", "first_segment": "<u8", "modality": "|u1",
        "segment_size": "<u8", "sample_rate": "<u4", "loss": "|b1", "file": "|u1", "file_offset": "<u4", "file_size": "<u4",
        "breaks": "<u4", "break_segment": "<u4", "first_break": "<u8", "key_bytes": "|u1", "first_key": "<u8",
    }  # fmt: skip

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, sample: int) -> str:
        first, stop = self.numbers.first_key[sample], self.numbers.first_key[sample + 1]
        return str(self.numbers.key_bytes[first:stop], "utf-8", "replace")

    @property
    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    def _crc_of_arrays(self) -> int:
        crc = 0
        for name in self.TYPES:
            crc = zlib.crc32(np.ascontiguousarray(getattr(self, name)).data, crc)
        return crc

    def check_arrays(self) -> None:
        """Raises `ShardError` where the arrays are not those that were saved. Reads them all, so it is not done at every start,
        but when a shard is opened."""
        if self._crc_of_arrays() != self.crc_of_arrays:
            raise ShardError(f"the index of shard {self.path!r} is damaged: run `pile index {self.path}`")

    @cached_property
    def numbers(self) -> SimpleNamespace:
        """The arrays as memoryviews: they give single numbers in a third of the time."""
        return SimpleNamespace(**{name: memoryview(getattr(self, name)) for name in self.TYPES})

    def breaks_of_segments(self, breaks: np.ndarray) -> dict[int, np.ndarray]:
        """Segment -> its part of `self.breaks`, or of what stands in the same order."""
        first = self.first_break.tolist()
        ranges = zip(self.break_segment.tolist(), first[:-1], first[1:], strict=True)
        return {segment: breaks[start:stop] for segment, start, stop in ranges}

    @cached_property
    def texts(self) -> dict[str, TextTokens]:
        """What `text_tokens` has found, by tokenizer."""
        return {}

    @cached_property
    def has_media(self) -> bool:
        """Is any of its segments no text?"""
        return bool((self.modality != TEXT).any()) or bool((self.file != EXTENSIONS.index("txt")).any())

    def save(self) -> None:
        header = {
            "version": str(INDEX_VERSION),
            "tar_size": str(self.tar_size),
            "fingerprint": self.fingerprint,
            "rejected": json.dumps(self.rejected),
            "crc": str(self._crc_of_arrays()),
        }
        save_arrays(self.path + INDEX_SUFFIX, {name: getattr(self, name) for name in self.TYPES}, header)


def load_index(path: str, name: str | None = None) -> ShardIndex:
    """The index of the tar at `path`, from the file beside it.

    Args:
        path: of the tar, which may be absent where `name` is given.
        name: URL of a remote shard, whose copy `path` is.

    Raises:
        ShardError: there is none, it is unreadable, or the tar's size is not the one that was indexed.
    """
    shown = name or path
    mend = f"run `pile index {shown}`"
    try:
        version = int(map_arrays(path + INDEX_SUFFIX, {})[1]["version"])
        if version != INDEX_VERSION:  # whose arrays may be others
            raise ShardError(f"the index of shard {shown!r} has version {version}, not {INDEX_VERSION}: {mend}")
        arrays, header = map_arrays(path + INDEX_SUFFIX, ShardIndex.TYPES)
        tar_size, crc = int(header["tar_size"]), int(header["crc"])
        rejected, fingerprint = json.loads(header["rejected"]), header["fingerprint"]
        _check_lengths(arrays)
    except FileNotFoundError:
        raise ShardError(f"shard {shown!r} has no index: {mend}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"the index of shard {shown!r} cannot be read ({error}): {mend}") from error
    if name is None and (size := os.path.getsize(path)) != tar_size:
        raise ShardError(
            f"the index of shard {shown!r} is stale: the tar has {size:,} bytes, {tar_size:,} were indexed: {mend}"
        )
    return ShardIndex(shown, tar_size, fingerprint, rejected, crc, **arrays)


def _check_lengths(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where the arrays of an index do not fit together."""
    for first, columns, of in (
        (
            "first_segment",
            ("offset", "size", "crc", "flags"),
            ("modality", "segment_size", "sample_rate", "loss", "file", "file_offset", "file_size"),
        ),
        ("first_key", ("offset",), ("key_bytes",)),
        ("first_break", ("break_segment",), ("breaks",)),
    ):
        starts = arrays[first]
        ends = [len(starts) - 1] + [len(arrays[name]) for name in columns]
        parts = [int(starts[-1]) if len(starts) else -1] + [len(arrays[name]) for name in of]
        if len(set(ends)) > 1 or len(set(parts)) > 1:
            raise ValueError(f"{first}, {', '.join((*columns, *of))} do not fit together")


def build_index(path: str) -> ShardIndex:
    """Reads the tar at `path` once and writes its index beside it. Samples that cannot be used are listed as rejected.

    Raises:
        ShardError: the tar is missing, truncated or damaged.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ShardIndex.TYPES}
    for name in ("first_segment", "first_break", "first_key"):
        columns[name].append(0)
    key_bytes = bytearray()
    rejected: list[list[str]] = []
    seen: set[str] = set()
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise ShardError(f"shard {path!r} cannot be opened: {error}") from error
        descriptor, tar_size = file.fileno(), os.fstat(file.fileno()).st_size
        for sample in sample_ranges(path, descriptor, tar_size):
            try:
                if sample.trouble:
                    raise BadSample("unsafe_member", f"{sample.key!r} holds {sample.trouble}")
                if sample.stop - sample.start > MAX_SAMPLE_BYTES:
                    raise BadSample("sample_too_large", f"{sample.stop - sample.start:,} bytes")
                if sample.key in seen:
                    raise BadSample("duplicate_key", f"two samples of {path!r} are called {sample.key!r}")
                seen.add(sample.key)
                block = os.pread(descriptor, sample.stop - sample.start, sample.start)
                ranges = ranges_of_files(block)
                reading = OWN.read(sample.key, {n: block[at : at + size] for n, (at, size) in ranges.items()})
                document, names = reading.document, reading.files
                sizes = [segment_size(segment) for segment in document.segments]
            except BadSample as error:
                rejected.append([sample.key, error.reason])
                continue
            key_bytes += sample.key.encode()
            columns["first_key"].append(len(key_bytes))
            columns["offset"].append(sample.start)
            columns["size"].append(len(block))
            columns["crc"].append(zlib.crc32(block))
            columns["flags"].append(0 if document.ordered else UNORDERED)
            first = columns["first_segment"][-1]
            columns["first_segment"].append(first + len(sizes))
            for number, (segment, name, (size, rate)) in enumerate(zip(document.segments, names, sizes, strict=True), first):
                file_offset, file_size = ranges.get(name, (0, 0))
                columns["file"].append(EXTENSIONS.index(segment.extension))
                columns["file_offset"].append(file_offset)
                columns["file_size"].append(file_size)
                columns["modality"].append(segment.modality)
                columns["loss"].append(segment.loss)
                columns["segment_size"].append(size)
                columns["sample_rate"].append(rate)
                breaks = segment_breaks(segment)
                if breaks:
                    columns["break_segment"].append(number)
                    columns["breaks"] += breaks
                    columns["first_break"].append(len(columns["breaks"]))
    arrays = {name: np.array(columns[name], kind) for name, kind in ShardIndex.TYPES.items() if name != "key_bytes"}
    arrays["key_bytes"] = np.frombuffer(bytes(key_bytes), np.uint8)
    digest = hashlib.blake2b(str(tar_size).encode(), digest_size=16)
    for name in ("offset", "size", "crc"):
        digest.update(arrays[name].astype("<u8").tobytes())
    ShardIndex(path, tar_size, digest.hexdigest(), rejected, None, **arrays).save()
    return load_index(path)


def breaks_in_bytes(text: str, breaks: Sequence[int]) -> list[int]:
    """UTF-8 bytes before each of the places `breaks` (in characters) of a text."""
    if text.isascii():
        return list(breaks)
    places = [0, *breaks]
    return np.cumsum([len(text[a:b].encode()) for a, b in pairwise(places)]).tolist()


def segment_size(segment: Segment) -> tuple[int, int]:
    """(size, sample rate) of a segment as the index holds it."""
    if segment.size is not None:
        return segment.size
    if segment.is_encoded:
        codes = segment.codes
        return codes.size, codes.sample_rate
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
    """Places in a segment, in UTF-8 bytes, where a sentence ends."""
    if segment.modality != TEXT:
        return []
    if segment.is_encoded:
        return segment.codes.breaks[0].tolist()
    return breaks_in_bytes(segment.text, sentence_ends(segment.text))


def tokens_path(path: str, tokenizer: str) -> str:
    """Where the token counts of the shard at `path` are kept, by the fingerprint of the tokenizer."""
    return f"{path}.{tokenizer[:16]}.tokens.safetensors"


def save_arrays(path: str, arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """Writes a safetensors file; it appears when it is whole."""
    from safetensors.numpy import save

    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        # One entry: the library writes several in any order, and the same shard has to give the same bytes.
        metadata = {"pile": json.dumps(dict(sorted(header.items())))}
        file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))
    os.replace(temporary, path)


def map_arrays(path: str, types: Mapping[str, str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, header) of a safetensors file. The arrays are views of the mapped file (the library would copy them), which
    nobody writes to: a new version takes its place.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a file, or lacks one of the arrays `types` names.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError("the file is too short")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[:8], "little")
    if length > size - 8:
        raise ValueError("the file is cut off")
    try:
        header = json.loads(mapped[8 : 8 + length])
        arrays = {}
        for name, kind in types.items():
            first, stop = header[name]["data_offsets"]
            item = np.dtype(kind).itemsize
            if not 0 <= first <= stop <= size - 8 - length or (stop - first) % item:
                raise ValueError("the file is cut off")
            arrays[name] = np.frombuffer(mapped, kind, (stop - first) // item, 8 + length + first)
        return arrays, dict(json.loads(header["__metadata__"]["pile"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no array or value {error}") from error
    except RecursionError as error:
        raise ValueError(str(error)) from error
