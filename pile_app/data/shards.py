"""Shards: WebDataset tar files, each with a small index beside it.

`write_shards` turns documents into `<prefix>-000000.tar`, `-000001.tar` ... and indexes each. `build_index` indexes a tar that
came from elsewhere in one pass. The index (`<shard>.index.safetensors`, arrays that are mapped into memory, so that processes
share one copy) holds for every sample its byte range and CRC-32, and for every segment its modality and its *own* size: UTF-8
bytes, image pixels, or sound samples and their rate. Token counts follow from those and the `Vocabulary` by arithmetic, so that
no index goes stale when a codec changes; only a subword tokenizer has to count, once, into a second file that carries its
fingerprint (`text.py`).

`ShardReader.document` reads one sample by its byte range (`pread`: no shared file position, safe after a fork) and checks it.
Headers of tars are read by `read_members`: the standard library takes a damaged header for the end of the archive, reads
headers of any size into memory, and takes ten times as long for a sample.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pile_app.documents import (
    AUDIO,
    IMAGE,
    MODALITY_OF_EXTENSION,
    TEXT,
    BadSample,
    Document,
    Segment,
    audio_size,
    document_and_files,
    document_from_sample,
    image_size,
    sample_from_document,
    sentence_ends,
)

if TYPE_CHECKING:
    import io

    from pile_app.data.remote import ShardCache
    from pile_app.data.text import TextTokens

INDEX_VERSION = 3
INDEX_SUFFIX = ".index.safetensors"
UNORDERED = 1  # sample flag: the order of its segments is free
BLOCK = 512  # bytes of a tar block
EXTENSIONS = tuple(MODALITY_OF_EXTENSION)  # `ShardIndex.file` holds places in it: append, never reorder
MAX_SAMPLE_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20  # of one extended header: names, no data
OPEN_SHARDS = 64  # files that a reader holds open: an evicted shard frees its disk when the last reader lets go


class ShardError(RuntimeError):
    """A shard or its index is missing, damaged or stale; the message names the file and the mend."""


def expand_shards(pattern: str | Sequence[str]) -> list[str]:
    """Paths or URLs from a pattern: brace expansion as in WebDataset (`shard-{000000..000012}.tar`), then wildcards.

    Raises:
        ShardError: nothing matches, a shard stands there twice, or braces do not match. Whether a URL exists shows when it is
            fetched.
    """
    import braceexpand

    from pile_app.data.remote import expand_remote, is_remote

    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    paths: list[str] = []
    for one in patterns:
        try:
            expansions = [one] if one.startswith("pipe:") else list(braceexpand.braceexpand(one))
        except ValueError as error:  # UnbalancedBracesError
            raise ShardError(
                f"{one!r} opens or closes a brace without the other: write e.g. 'train-{{000..007}}.tar'"
            ) from error
        for expanded in expansions:
            if is_remote(expanded):
                found = expand_remote(expanded)
            else:
                expanded = expanded.removeprefix("file://")
                found = sorted(glob.glob(expanded)) if glob.has_magic(expanded) else [expanded]
            if not found:
                raise ShardError(f"no shard matches {expanded!r} (from {one!r}, working folder {os.getcwd()})")
            paths += found
    for path in paths:
        if not is_remote(path) and not os.path.isfile(path):
            raise ShardError(f"shard {path!r} does not exist (from {pattern!r}, working folder {os.getcwd()})")
    same = [path if is_remote(path) else os.path.realpath(path) for path in paths]
    if len(set(same)) < len(same):
        raise ShardError(f"{pattern!r} names a shard twice: {sorted({p for p in same if same.count(p) > 1})}")
    return paths


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
        arrays, header = map_arrays(path + INDEX_SUFFIX, ShardIndex.TYPES)
        version, tar_size = int(header["version"]), int(header["tar_size"])
        rejected, fingerprint = json.loads(header["rejected"]), header["fingerprint"]
        if version == INDEX_VERSION:
            _check_lengths(arrays)
            crc = int(header["crc"])
    except FileNotFoundError:
        raise ShardError(f"shard {shown!r} has no index: {mend}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"the index of shard {shown!r} cannot be read ({error}): {mend}") from error
    if version != INDEX_VERSION:
        raise ShardError(f"the index of shard {shown!r} has version {version}, not {INDEX_VERSION}: {mend}")
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
                document, names = document_and_files(sample.key, {n: block[at : at + size] for n, (at, size) in ranges.items()})
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


class Member(NamedTuple):
    """A file of a tar: its headers begin at `offset`, its data at `data`. kind: "0" a file, "5" a folder, others as in tar."""

    name: str
    kind: str
    offset: int
    data: int
    size: int


def read_members(read: Callable[[int, int], bytes], stop: int) -> Iterator[Member]:
    """The members of the tar (ustar, GNU and PAX headers) in bytes [0, stop), read by `read(size, offset)`.

    Ends at the first block of zeros, or at `stop`.

    Raises:
        ValueError: something that is no header stands where one has to, or the last member is cut off.
    """
    offset = start = 0
    name: str | None = None
    size: int | None = None
    sparse = False
    while offset < stop:
        header = read(BLOCK, offset)
        if len(header) < BLOCK:
            raise ValueError(f"a header is cut off at byte {offset:,}")
        if header[0] == 0 and not header.strip(b"\0"):
            break
        kind = chr(header[156]) if header[156] else "0"
        try:
            field = header[124:136]
            length = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)
            if length < 0 or sum(header) - sum(header[148:156]) + 256 != int(header[148:156].strip(b" \0"), 8):
                raise ValueError
        except ValueError:
            raise ValueError(f"what stands at byte {offset:,} is no header of a member") from None
        data = offset + BLOCK
        if kind in "xgLK":  # extended headers: of the next member, of all (no names), long names and links
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes stands at byte {offset:,}")
            content = read(length, data)
            if len(content) < length:
                raise ValueError(f"a header is cut off at byte {offset:,}")
            if kind == "L":
                name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == "x":
                values = _pax_values(content)
                name = values.get("path", name)
                size = int(values["size"]) if "size" in values else size
                sparse = any(key.startswith("GNU.sparse.") for key in values)
                if size is not None and size < 0:
                    raise ValueError(f"a PAX header at byte {offset:,} claims a size of {size:,} bytes")
        else:
            if name is None:
                prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
                short = header[: header.find(b"\0") if 0 <= header.find(b"\0") < 100 else 100]
                name = (prefix + b"/" + short if prefix else short).decode("utf-8", "surrogateescape")
            length = length if size is None else size
            if kind in "123456":  # links, devices and folders have no data, whatever size they claim
                length = 0
            if data + length > stop:
                raise ValueError(f"member {name!r} is cut off at byte {stop:,}")
            if kind in "07":
                kind = "S" if sparse else "0"
            yield Member(name, kind, start, data, length)
            name, size, sparse, start = None, None, False, data + -(-length // BLOCK) * BLOCK
        offset = data + -(-length // BLOCK) * BLOCK


def _pax_values(content: bytes) -> dict[str, str]:
    """The `length key=value\\n` records of a PAX header."""
    values = {}
    start = 0
    while start < len(content):
        try:
            space = content.index(b" ", start, start + 20)
            stop = start + int(content[start:space])
            if not space < stop <= len(content):
                raise ValueError
            key, _, value = content[space + 1 : stop - 1].partition(b"=")
            values[key.decode()] = value.decode("utf-8", "surrogateescape")
        except ValueError:
            raise ValueError("a PAX header is damaged") from None
        start = stop
    return values


class _Sample(NamedTuple):
    """A run of members that share a key; trouble: what of them cannot be data."""

    key: str
    start: int
    stop: int
    trouble: str


def sample_ranges(path: str, descriptor: int, tar_size: int) -> Iterator[_Sample]:
    """The samples of a tar; then checks that the tar ends where they do."""
    sample: _Sample | None = None
    stop = 0
    try:
        for member in read_members(lambda size, offset: os.pread(descriptor, size, offset), tar_size):
            stop = member.data + -(-member.size // BLOCK) * BLOCK
            if member.kind == "5":
                continue
            key = sample_key(member.name)
            trouble = _trouble(member)
            if sample is not None and sample.key == key:
                sample = sample._replace(stop=stop, trouble=sample.trouble or trouble)
                continue
            if sample is not None:
                yield sample
            sample = _Sample(key, member.offset, stop, trouble)
    except ValueError as error:
        raise ShardError(
            f"shard {path!r} is damaged or truncated near byte {stop:,}: {error}. Fetch or write it again"
        ) from error
    rest = tar_size - stop
    if rest < BLOCK or any(os.pread(descriptor, 1 << 20, at).strip(b"\0") for at in range(stop, tar_size, 1 << 20)):
        raise ShardError(
            f"shard {path!r} is damaged or truncated at byte {stop:,}: neither a member nor the end of the archive stands "
            "there. Fetch or write it again"
        )
    if sample is not None:
        yield sample


def _trouble(member: Member) -> str:
    """What no data set needs and an attack may use, "" for none. Nothing is ever extracted, so it could do no harm here."""
    if member.kind != "0":
        return f"a member that is no file (tar type {member.kind!r})"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"the path {member.name!r}, which leaves the archive"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    return ""


def sample_key(name: str) -> str:
    """The key of a member: its name up to the first dot of the last part, as in WebDataset."""
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def ranges_of_files(block: bytes) -> dict[str, tuple[int, int]]:
    """Extension -> (first byte, bytes) of the files of one sample in its range of the tar."""
    ranges: dict[str, tuple[int, int]] = {}
    try:
        for member in read_members(lambda size, offset: block[offset : offset + size], len(block)):
            _, dot, extension = member.name.rpartition("/")[2].partition(".")
            if member.kind == "0" and dot:
                if extension in ranges:
                    raise BadSample("duplicate_key", f"two samples in a row are called {sample_key(member.name)!r}")
                ranges[extension] = member.data, member.size
    except BadSample:
        raise
    except ValueError as error:
        raise BadSample("damaged_sample", str(error)) from error
    return ranges


def files_of_block(block: bytes) -> dict[str, bytes]:
    """The files, by extension, of one sample from its range of the tar."""
    return {extension: block[first : first + size] for extension, (first, size) in ranges_of_files(block).items()}


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


class ShardWriter:
    """Writes documents, one by one, to `folder/prefix-000000.tar` ... of about `shard_bytes` bytes each, and indexes them.

    A shard appears under its name only when it is whole. Keys are given by count where a document has none. The same documents
    give the same bytes. Documents that the index rejects are listed in `ShardIndex.rejected`. Memory does not grow with the
    documents: indexes stay on disk until `close` loads them.
    """

    def __init__(self, folder: str | Path, prefix: str, shard_bytes: int = 64 << 20) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix
        self.shard_bytes = shard_bytes
        self._paths: list[str] = []
        self._count = 0
        self._file: io.BufferedWriter | None = None
        self._tar: Any = None

    def write(self, document: Document) -> None:
        """Adds a document.

        Raises:
            ValueError: its key would be read back as another one.
        """
        import webdataset

        if sample_key(f"{document.key}.json") != document.key:
            raise ValueError(
                f"document key {document.key!r}: WebDataset ends a key at the first dot; write another character there"
            )
        if self._file is None:
            path = self.folder / f"{self.prefix}-{len(self._paths):06d}.tar.{os.getpid()}.tmp"
            self._file = open(path, "wb")  # noqa: SIM115 (closed by finish_shard)
            # mtime=0: with the float default, webdataset writes a kilobyte of PAX header a member, different in every run.
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        sample = sample_from_document(document)
        sample["__key__"] = document.key or f"{self.prefix}-{self._count:09d}"
        self._tar.write(sample)
        self._count += 1
        if self._file.tell() >= self.shard_bytes:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Gives the shard that is being written its name and its index; the next document opens another."""
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        path = str(self.folder / f"{self.prefix}-{len(self._paths):06d}.tar")
        os.replace(self._file.name, path)
        self._file = None
        self._paths.append(path)
        build_index(path)

    def close(self) -> list[ShardIndex]:
        """Finishes the last shard; the indexes of all."""
        self.finish_shard()
        return [load_index(path) for path in self._paths]


def write_shards(
    documents: Iterable[Document], folder: str | Path, prefix: str, shard_bytes: int = 64 << 20
) -> list[ShardIndex]:
    """Writes all `documents` through a `ShardWriter`, and returns the indexes of its shards."""
    writer = ShardWriter(folder, prefix, shard_bytes)
    for document in documents:
        writer.write(document)
    return writer.close()


class Shards:
    """Shards by number: their indexes and, as files on this machine, their tars. Both are opened when they are first needed, in
    each process on its own, and only some are kept open.

    Args:
        paths: of the tars, or URLs.
        cache: of the URLs; None where there are none.
    """

    def __init__(self, paths: Sequence[str], cache: ShardCache | None = None) -> None:
        from pile_app.data.remote import is_remote

        self.paths = list(paths)
        self.cache = cache
        self.remote = [is_remote(path) for path in self.paths]
        if any(self.remote) and cache is None:
            raise ShardError(f"{self.paths[self.remote.index(True)]!r} is remote and has to be read through a cache")
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.RLock()  # the thread that fetches ahead asks for indexes too

    def __getstate__(self) -> Mapping[str, Any]:
        return {"paths": self.paths, "cache": self.cache, "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self.paths)

    def local(self, shard: int) -> str:
        """Path on this machine, where a remote shard lies once it is fetched. Index and token counts lie beside it."""
        path = self.paths[shard]
        return self.cache.path(path) if self.remote[shard] and self.cache else path

    def make_index(self, shard: int) -> None:
        """Fetches or builds the index of a shard that has none."""
        local = self.local(shard)
        if os.path.exists(local + INDEX_SUFFIX):
            return
        if self.remote[shard] and self.cache:
            url = self.paths[shard]
            if self.cache.fetch_small(url + INDEX_SUFFIX, to=local + INDEX_SUFFIX) is not None:
                return
            self.cache.fetch(url)
        build_index(local)

    def index(self, shard: int) -> ShardIndex:
        """Raises `ShardError` where there is none, or where the shard is another one than was indexed."""
        with self._lock:
            index = self._indexes.get(shard)
            if index is None:
                index = load_index(self.local(shard), self.paths[shard] if self.remote[shard] else None)
                self._indexes[shard] = index
                if len(self._indexes) > OPEN_SHARDS:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(shard)
            return index

    def document(self, shard: int, sample: int) -> Document:
        """The document of a sample.

        Raises:
            BadSample: the bytes are not those that were indexed, or do not make a document.
            ShardError: the shard cannot be opened or fetched any more.
        """
        index = self.index(shard)
        return document_from_sample(index.key(sample), files_of_block(self._block(shard, index, sample)))

    def document_to_train(self, shard: int, sample: int, texts: TextTokens | None = None) -> Document:
        """The same as training reads it, straight from the places that the index names: no `meta`, and texts are token ids.

        Args:
            shard: number of the shard.
            sample: number of the sample.
            texts: ids of its texts; None: the UTF-8 bytes themselves.
        """
        index = self.index(shard)
        block = b""
        if texts is None or index.has_media:
            block = self._block(shard, index, sample)
        segments = []
        for number in range(index.numbers.first_segment[sample], index.numbers.first_segment[sample + 1]):
            extension, loss = EXTENSIONS[index.numbers.file[number]], index.numbers.loss[number]
            offset, size = index.numbers.file_offset[number], index.numbers.file_size[number]
            if extension != "txt":
                own = int(index.segment_size[number]), int(index.sample_rate[number])
                segments.append(Segment(block[offset : offset + size], extension, loss, size=own))
            elif texts is not None:
                segments.append(Segment("", "txt", loss, texts.ids(number)))
            elif offset:
                segments.append(Segment("", "txt", loss, np.frombuffer(block, np.uint8, size, offset)))
            else:
                return document_from_sample(index.key(sample), files_of_block(block))
        return Document(tuple(segments), "", not index.numbers.flags[sample] & UNORDERED)

    def _block(self, shard: int, index: ShardIndex, sample: int) -> bytes:
        """The checked bytes of a sample."""
        size = index.numbers.size[sample]
        with self._lock:
            block = os.pread(self._descriptor(shard), size, index.numbers.offset[sample])
        if len(block) != size or zlib.crc32(block) != index.numbers.crc[sample]:
            raise BadSample("checksum", f"sample {index.key(sample)!r} of {index.path!r} is not what was indexed")
        return block

    def _open(self, shard: int) -> int:
        """A descriptor of the tar on this machine, fetched where it is remote and not there."""
        index = self.index(shard)
        index.check_arrays()
        if not self.remote[shard] or self.cache is None:
            return os.open(self.paths[shard], os.O_RDONLY)
        return self.cache.open(self.paths[shard], index.tar_size, partial(check_content, index=index))

    def _descriptor(self, shard: int) -> int:
        if self._process != os.getpid():  # after a fork: the parent's are its own
            self._forget()
        if shard not in self._descriptors:
            try:
                self._descriptors[shard] = self._open(shard)
            except OSError as error:
                raise ShardError(f"shard {self.paths[shard]!r} cannot be opened: {error}") from error
            if len(self._descriptors) > OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


def check_content(path: str, index: ShardIndex) -> None:
    """Raises ShardError where the tar at `path` is not the one that was indexed, in any sample."""
    with open(path, "rb") as file:
        for sample in range(len(index)):
            block = os.pread(file.fileno(), int(index.size[sample]), int(index.offset[sample]))
            if zlib.crc32(block) != index.crc[sample]:
                raise ShardError(
                    f"sample {index.key(sample)!r} of shard {index.path!r} is not what was indexed: the shard was changed or "
                    f"damaged on its way. Run `pile index {index.path}` to take it as it is"
                )
