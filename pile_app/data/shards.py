"""Shards: WebDataset tar files, each with an index beside it (`index.py`).

`write_shards` turns documents into `<prefix>-000000.tar`, `-000001.tar` ... and indexes each. `Shards.document` reads a sample
by its byte range (`pread`: no shared file position, safe after a fork) and checks it.
"""

from __future__ import annotations

import glob
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.documents import BadSample, Document, Segment, sample_from_document
from pile_app.fields import document_from_sample

if TYPE_CHECKING:
    import io

    from pile_app.data.remote import ShardCache
    from pile_app.data.tokenizers import TextTokens

from pile_app.data.index import EXTENSIONS, INDEX_SUFFIX, UNORDERED, ShardIndex, build_index, load_index
from pile_app.data.tar import ShardError, files_of_block, sample_key

OPEN_SHARDS = 64  # files that a reader holds open: an evicted shard frees its disk when the last reader lets go


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
