"""Shards: WebDataset tar files, each with a small index beside it.

`write_shards` turns documents into `<prefix>-000000.tar`, `-000001.tar` ... and indexes each. `build_index` indexes a tar that
came from elsewhere in one pass. The index (`<shard>.index.npz`, plain numpy arrays) holds for every sample its byte range and
CRC-32, and for every segment its modality and its *own* size: UTF-8 bytes, image pixels, or sound samples and their rate. Token
counts follow from those and the `Vocabulary` by arithmetic, so that no index goes stale when a codec changes; only a
subword tokenizer has to count, once, into a second file that carries its fingerprint (`text.py`).

`ShardReader.document` reads one sample by its byte range (`pread`: no shared file position, safe after a fork) and checks it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.documents import (
    AUDIO,
    IMAGE,
    TEXT,
    BadSample,
    Document,
    audio_size,
    document_from_sample,
    image_size,
    sample_from_document,
)

INDEX_VERSION = 1
INDEX_SUFFIX = ".index.npz"
UNORDERED = 1  # sample flag: the order of its segments is free


class ShardError(RuntimeError):
    """A shard or its index is missing, damaged or stale; the message names the file and the mend."""


def expand_shards(pattern: str | Sequence[str]) -> list[str]:
    """Paths from a pattern: brace expansion as in WebDataset (`shard-{000000..000012}.tar`), then shell wildcards.

    Raises:
        ShardError: nothing matches, a path stands there twice, or braces do not match.
    """
    import braceexpand

    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    paths: list[str] = []
    for one in patterns:
        try:
            expansions = list(braceexpand.braceexpand(one))
        except ValueError as error:  # UnbalancedBracesError
            raise ShardError(
                f"{one!r} opens or closes a brace without the other: write e.g. 'train-{{000..007}}.tar'"
            ) from error
        for expanded in expansions:
            found = sorted(glob.glob(expanded)) if glob.has_magic(expanded) else [expanded]
            if not found:
                raise ShardError(f"no shard matches {expanded!r} (from {one!r}, working folder {os.getcwd()})")
            paths += found
    for path in paths:
        if not os.path.isfile(path):
            raise ShardError(f"shard {path!r} does not exist (from {pattern!r}, working folder {os.getcwd()})")
    if len(set(paths)) < len(paths):
        raise ShardError(f"{pattern!r} names a shard twice: {sorted({p for p in paths if paths.count(p) > 1})}")
    return paths


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is known of one tar without opening it. S samples, G segments.

    offset, size: (S,) byte range in the tar; crc: (S,) CRC-32 of that range; flags: (S,) uint8; first_segment: (S + 1,);
    modality: (G,) uint8; segment_size: (G,) UTF-8 bytes | pixels | samples; sample_rate: (G,) Hz, 0 but for sounds;
    loss: (G,) bool; keys: S sample keys; rejected: [key, reason] of samples that cannot be used.
    """

    path: str
    tar_size: int
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    flags: np.ndarray
    first_segment: np.ndarray
    modality: np.ndarray
    segment_size: np.ndarray
    sample_rate: np.ndarray
    loss: np.ndarray
    keys: list[str]
    rejected: list[list[str]]

    ARRAYS = ("offset", "size", "crc", "flags", "first_segment", "modality", "segment_size", "sample_rate", "loss")

    def __len__(self) -> int:
        return len(self.offset)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any sample of the shard changes, moves, comes or goes."""
        digest = hashlib.blake2b(str(self.tar_size).encode(), digest_size=16)
        for array in (self.offset, self.size, self.crc):
            digest.update(array.astype("<u8").tobytes())
        return digest.hexdigest()

    def save(self) -> None:
        header = json.dumps({"version": INDEX_VERSION, "tar_size": self.tar_size, "keys": self.keys, "rejected": self.rejected})
        temporary = f"{self.path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            np.savez(file, header=np.array(header), **{name: getattr(self, name) for name in self.ARRAYS})
        os.replace(temporary, self.path + INDEX_SUFFIX)


def load_index(path: str) -> ShardIndex:
    """The index of the tar at `path`.

    Raises:
        ShardError: there is none, it is unreadable, or the tar's size is not the one that was indexed.
    """
    mend = f"run `pile index {path}`"
    try:
        with np.load(path + INDEX_SUFFIX, allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            if header["version"] != INDEX_VERSION:
                raise ShardError(f"the index of shard {path!r} has version {header['version']}, not {INDEX_VERSION}: {mend}")
            columns = {name: arrays[name] for name in ShardIndex.ARRAYS}
    except FileNotFoundError:
        raise ShardError(f"shard {path!r} has no index: {mend}") from None
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ShardError(f"the index of shard {path!r} cannot be read ({error}): {mend}") from error
    tar_size = os.path.getsize(path)
    if tar_size != header["tar_size"]:
        raise ShardError(
            f"the index of shard {path!r} is stale: the tar has {tar_size:,} bytes, {header['tar_size']:,} were indexed: {mend}"
        )
    return ShardIndex(path, tar_size, keys=header["keys"], rejected=header["rejected"], **columns)


def build_index(path: str) -> ShardIndex:
    """Reads the tar at `path` once and writes its index beside it. Samples that cannot be used are listed as rejected.

    Raises:
        ShardError: the tar is missing, truncated or damaged (the standard library takes a damaged header for the end of the
            archive, without a word; here the archive has to end where it says it ends).
    """
    columns: dict[str, list[Any]] = {name: [] for name in ShardIndex.ARRAYS}
    columns["first_segment"].append(0)
    keys: list[str] = []
    rejected: list[list[str]] = []
    seen: set[str] = set()
    tar_size = os.path.getsize(path) if os.path.isfile(path) else 0
    with _open_tar(path) as (file, members):
        for key, start, stop in _sample_ranges(path, members, tar_size):
            block = os.pread(file.fileno(), stop - start, start)
            try:
                if key in seen:
                    raise BadSample("duplicate_key", f"two samples of {path!r} are called {key!r}")
                seen.add(key)
                document = document_from_sample(key, files_of_block(block))
                sizes = [_segment_size(segment.modality, segment.data) for segment in document.segments]
            except BadSample as error:
                rejected.append([key, error.reason])
                continue
            keys.append(key)
            columns["offset"].append(start)
            columns["size"].append(len(block))
            columns["crc"].append(zlib.crc32(block))
            columns["flags"].append(0 if document.ordered else UNORDERED)
            columns["first_segment"].append(columns["first_segment"][-1] + len(sizes))
            columns["modality"] += [segment.modality for segment in document.segments]
            columns["loss"] += [segment.loss for segment in document.segments]
            columns["segment_size"] += [size for size, _ in sizes]
            columns["sample_rate"] += [rate for _, rate in sizes]
    types = ("u8", "u8", "u4", "u1", "u8", "u1", "u8", "u4", "?")
    arrays = {name: np.array(columns[name], f"<{t}") for name, t in zip(ShardIndex.ARRAYS, types, strict=True)}
    index = ShardIndex(path, tar_size, keys=keys, rejected=rejected, **arrays)
    index.save()
    return index


@contextmanager
def _open_tar(path: str) -> Iterator[tuple[io.BufferedReader, tarfile.TarFile]]:
    """(file, its members in order)."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            members = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        except OSError as error:
            raise ShardError(f"shard {path!r} cannot be opened: {error}") from error
        except tarfile.TarError as error:
            raise ShardError(f"shard {path!r} is not an uncompressed tar file: {error}") from error
        yield file, members


def _sample_ranges(path: str, tar: tarfile.TarFile, tar_size: int) -> Iterator[tuple[str, int, int]]:
    """(key, first byte, byte after the last) of each run of members that share a key, then checks that the tar ends there."""
    key, start, stop = None, 0, 0
    try:
        for member in tar:
            if not member.isfile():
                continue
            stem = sample_key(member.name)
            if stem != key:
                if key is not None:
                    yield key, start, stop
                key, start = stem, member.offset
            stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if stop > tar_size:
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise ShardError(
            f"shard {path!r} is damaged or truncated near byte {stop:,}: {error}. Fetch or write it again"
        ) from error
    with open(path, "rb") as file:
        file.seek(stop)
        rest = file.read()
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise ShardError(
            f"shard {path!r} is damaged or truncated at byte {stop:,}: neither a member nor the end of the archive stands "
            "there. Fetch or write it again"
        )
    if key is not None:
        yield key, start, stop


def sample_key(name: str) -> str:
    """The key of a member: its name up to the first dot of the last part, as in WebDataset."""
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def files_of_block(block: bytes) -> dict[str, bytes]:
    """The files, by extension, of one sample from its range of the tar."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
            for member in tar:
                base = member.name.rpartition("/")[2]
                if member.isfile() and "." in base:
                    extension = base.split(".", 1)[1]
                    if extension in files:
                        raise BadSample("duplicate_key", f"two samples in a row are called {sample_key(member.name)!r}")
                    files[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except tarfile.TarError as error:
        raise BadSample("damaged_sample", str(error)) from error
    return files


def _segment_size(modality: int, data: str | bytes) -> tuple[int, int]:
    """(size, sample rate) of a segment as the index holds it."""
    if modality == TEXT:
        assert isinstance(data, str)
        try:
            return len(data.encode()), 0
        except UnicodeEncodeError as error:  # JSON may hold lone surrogates
            raise BadSample("invalid_utf8", str(error)) from error
    assert isinstance(data, bytes)
    if modality == IMAGE:
        height, width = image_size(data)
        return height * width, 0
    assert modality == AUDIO
    return audio_size(data)


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


class ShardReader:
    """Reads samples of a list of shards by byte range. Files are opened on first use, in each process on its own."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self.indexes = indexes
        self._descriptors: dict[int, tuple[int, int]] = {}  # shard -> (process, file descriptor)

    def __getstate__(self) -> Mapping[str, Any]:
        return {"indexes": self.indexes, "_descriptors": {}}

    def document(self, shard: int, sample: int) -> Document:
        """The document of a sample.

        Raises:
            BadSample: the bytes are not those that were indexed, or do not make a document.
            ShardError: the shard cannot be opened any more.
        """
        index = self.indexes[shard]
        size = int(index.size[sample])
        block = os.pread(self._descriptor(shard), size, int(index.offset[sample]))
        if len(block) != size or zlib.crc32(block) != index.crc[sample]:
            raise BadSample("checksum", f"sample {index.keys[sample]!r} of {index.path!r} is not what was indexed")
        return document_from_sample(index.keys[sample], files_of_block(block))

    def _descriptor(self, shard: int) -> int:
        process, descriptor = self._descriptors.get(shard, (0, -1))
        if process != os.getpid():
            try:
                descriptor = os.open(self.indexes[shard].path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"shard {self.indexes[shard].path!r} cannot be opened: {error}") from error
            self._descriptors[shard] = (os.getpid(), descriptor)
        return descriptor
