"""Shards: WebDataset tar files. `write_shards` writes documents, `Shards` reads them by number.

A sample is read by its byte range (`pread`: no shared file position, safe after a fork) and checked against its CRC-32. Each
process opens manifests and tars when it first needs them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import threading
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from pile_app.data.files import ShardError
from pile_app.data.index import ShardIndex
from pile_app.data.manifest import Again, Manifest, group_shards, open_manifest, split_path
from pile_app.data.tar import split_name
from pile_app.data.tokenizers import ByteTokenizer, Tokenizer
from pile_app.data.urls import expand_remote, is_remote
from pile_app.documents import BadSample, Document, sample_from_document
from pile_app.fields import OWN, Fields

if TYPE_CHECKING:
    import io

    from pile_app.data.remote import ShardCache

OPEN_SHARDS = 64  # files that a process holds open: an evicted shard frees its disk when its last reader closes it


def expand_shards(pattern: str | Sequence[str]) -> list[str]:
    """Paths or URLs from a pattern: brace expansion as in WebDataset (`shard-{000000..000012}.tar`), then wildcards.

    Raises:
        ShardError: nothing matches, a shard is named twice, or braces do not match. A missing URL shows when it is fetched.
    """
    import braceexpand

    paths: list[str] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        try:
            expansions = [one] if one.startswith("pipe:") else list(braceexpand.braceexpand(one))
        except ValueError as error:  # UnbalancedBracesError
            raise ShardError(f"{one!r} has an unmatched brace: write e.g. 'train-{{000..007}}.tar'") from error
        for expanded in expansions:
            if is_remote(expanded):
                found = expand_remote(expanded)
            else:
                expanded = expanded.removeprefix("file://")
                found = sorted(glob.glob(expanded)) if glob.has_magic(expanded) and not os.path.exists(expanded) else [expanded]
            if not found:
                raise ShardError(f"no shard matches {expanded!r} (from {one!r}, working folder {os.getcwd()})")
            paths += found
    folders = {os.path.dirname(path) for path in paths if not is_remote(path)}
    names = {folder: set(os.listdir(folder or ".")) for folder in folders if os.path.isdir(folder or ".")}
    for path in paths:  # by one listing for each folder, not a request for each shard
        if not is_remote(path) and os.path.basename(path) not in names.get(os.path.dirname(path), ()):
            raise ShardError(f"shard {path!r} does not exist (from {pattern!r}, working folder {os.getcwd()})")
    real = {folder: os.path.realpath(folder) for folder in folders}
    same = [path if is_remote(path) else os.path.join(real[os.path.dirname(path)], os.path.basename(path)) for path in paths]
    if twice := [path for path, count in Counter(same).items() if count > 1]:
        raise ShardError(f"{pattern!r} names a shard twice: {twice[:3]}")
    return paths


class Shards:
    """The documents of some shards, by number.

    Args:
        pattern: of paths or URLs, see `expand_shards`.
        cache: of remote shards; None where there are none.
        fields: the field map; None: that of the manifest, or inferred.
        tokenizer: whose token counts the manifest has to hold.
        processes: that index new shards; None: one for each core.
        again: shards to index again, see `open_manifest`.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        cache: ShardCache | None = None,
        fields: Any = None,
        tokenizer: Tokenizer | None = None,
        processes: int | None = None,
        again: Again = "",
    ) -> None:
        self.paths = expand_shards(pattern)
        self.cache, self.tokenizer = cache, tokenizer or ByteTokenizer()
        self.remote = [is_remote(path) for path in self.paths]
        self._forget()
        self._manifest_files: list[tuple[str, str]] = []  # path and folder of each
        self._where = [(0, "")] * len(self.paths)  # manifest and name of each shard
        wanted = Fields.parse(fields) if fields else None
        for number, ((folder, stem), shards) in enumerate(group_shards(self.paths).items()):
            paths = [self.paths[shard] for shard in shards]
            found = self._manifests[number] = open_manifest(paths, stem, cache, wanted, tokenizer, processes, again)
            self._manifest_files.append((found.path, folder))
            for shard in shards:
                self._where[shard] = number, split_path(self.paths[shard])[1]
        abouts = [self._about(shard) for shard in range(len(self.paths))]
        self.sizes = [int(about["size"]) for about in abouts]  # of the tars, in bytes
        self.first_document: list[int] = [0, *np.cumsum([about["rows"][0] for about in abouts]).tolist()]
        prints = [about["fingerprint"] for about in abouts] + [
            str(one.fields) for one in self._manifests.values() if one.fields != OWN
        ]
        self.fingerprint = hashlib.blake2b("".join(prints).encode(), digest_size=16).hexdigest()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._manifests: dict[int, Manifest] = {}
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._fetched_again: set[int] = set()
        self._lock = threading.RLock()  # the thread that prefetches asks for indexes too

    def __getstate__(self) -> dict[str, Any]:
        opened = (
            "_process",
            "_manifests",
            "_indexes",
            "_descriptors",
            "_lock",
            "_fetched_again",
            "_kept_ids",
            "_last_long",
            "_checked",
        )
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self.first_document[-1]

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents. Raises `BadSample` at a damaged one."""
        return map(self.document, range(len(self)))

    def manifest(self, shard: int) -> Manifest:
        number, _ = self._where[shard]
        if number not in self._manifests:
            self._manifests[number] = Manifest(*self._manifest_files[number])
        return self._manifests[number]

    def _about(self, shard: int) -> dict[str, Any]:
        return self.manifest(shard).entries[self._where[shard][1]][1]

    def index(self, shard: int) -> ShardIndex:
        """The rows of a shard. Raises `ShardError` if they are damaged."""
        with self._lock:
            index = self._indexes.get(shard)
            if index is None:
                index = self._indexes[shard] = self.manifest(shard).index(self._where[shard][1])
                index.check()
                if len(self._indexes) > OPEN_SHARDS:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(shard)
            return index

    def place(self, number: int) -> tuple[int, int]:
        """(shard, sample in it) of a document."""
        shard = bisect_right(self.first_document, number) - 1
        return shard, number - self.first_document[shard]

    def key(self, number: int) -> str:
        shard, sample = self.place(number)
        return self.index(shard).key(sample)

    def document(self, number: int) -> Document:
        """Read a document.

        Raises:
            BadSample: its bytes are not those that were indexed, or make no document.
            ShardError: the shard cannot be opened or fetched any more.
        """
        shard, sample = self.place(number)
        return self.index(shard).document(sample, self.block(shard, sample), self.manifest(shard).fields)

    def block(self, shard: int, sample: int) -> bytes:
        """The bytes of a sample. Raises `BadSample` if they are not those that were indexed."""
        index = self.index(shard)
        while True:
            block = self.read(shard, index.numbers.offset[sample], index.numbers.size[sample])
            if zlib.crc32(block) == index.numbers.crc[sample]:
                return block
            if not self._forget_copy(shard):
                raise BadSample("checksum", f"sample {index.key(sample)!r} of {index.path!r} is not what was indexed")

    def _forget_copy(self, shard: int) -> bool:
        """Remove the local copy of a remote shard, which may be of an earlier version; once."""
        if self.cache is None or not self.remote[shard] or shard in self._fetched_again:
            return False
        with self._lock:
            self._fetched_again.add(shard)
            os.close(self._descriptors.pop(shard))
            Path(self.cache.path(self.paths[shard])).unlink(missing_ok=True)
        return True

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read bytes of a tar, which is fetched if it is remote."""
        with self._lock:
            if self._process != os.getpid():  # after a fork
                self._forget()
            if shard not in self._descriptors:
                self._descriptors[shard] = self._open(shard)
                if len(self._descriptors) > OPEN_SHARDS:
                    os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors.move_to_end(shard)
            return os.pread(self._descriptors[shard], size, offset)

    def _open(self, shard: int) -> int:
        path = self.paths[shard]
        if self.remote[shard] and self.cache is not None:
            return self.cache.open(path, self.sizes[shard], self.index(shard).check_tar)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"shard {path!r} cannot be opened: {error}") from error
        if (size := os.fstat(descriptor).st_size) != self.sizes[shard]:
            os.close(descriptor)
            raise ShardError(f"shard {path!r} has {size:,} bytes, {self.sizes[shard]:,} were indexed: run `pile index {path}`")
        return descriptor

    def publish(self) -> list[str]:
        """Upload the manifests of remote folders next to the shards. Returns where the manifests are."""
        found = []
        for path, folder in self._manifest_files:
            url = f"{folder}/{os.path.basename(path)}"
            if is_remote(folder) and not path.endswith(".published"):
                try:
                    with fsspec.open(url, "wb") as file:
                        file.write(Path(path).read_bytes())
                    path = url
                except Exception as error:
                    path += f" (cannot be written to {url}, so upload it there: {type(error).__name__} {error})"
            found.append(path)
        return found

    def balance(self) -> dict[str, Any]:
        """Account for all samples: `read` = `documents` + the sum of `rejected` (reason -> count).

        `examples`: reason -> the first keys and the first message; `unused`, `dropped`: name of a file, field or part -> count.
        """
        found: dict[str, Any] = {"fields": str(self.manifest(0).fields), "read": 0, "documents": len(self), "examples": {}}
        found |= {name: Counter() for name in ("rejected", "unused", "dropped")}
        for about in map(self._about, range(len(self.paths))):
            found["read"] += about["read"]
            for reason, (count, keys, detail) in about["rejected"].items():
                found["rejected"][reason] += count
                found["examples"].setdefault(reason, (keys, detail))
            for name in ("unused", "dropped"):
                found[name].update(about[name])
        return found


def describe_balance(balance: Mapping[str, Any]) -> str:
    """`1,000 samples: 990 documents; rejected: 10 missing_field (a, b); unused: 1,000 json.url; fields [jpg, txt]`"""
    rejected = [
        f"{n:,} {reason} ({', '.join(balance['examples'][reason][0])})" for reason, n in balance["rejected"].most_common()
    ]
    parts = [f"{balance['read']:,} samples: {balance['documents']:,} documents", f"rejected: {', '.join(rejected) or 'none'}"]
    for name in ("unused", "dropped"):
        told = [f"{count:,} {what}" for what, count in balance[name].most_common(8)]
        parts += [f"{name}: {', '.join(told)}" + ", ..." * (len(balance[name]) > 8)] if told else []
    return "; ".join([*parts, f"fields {balance['fields']}"])


class ShardWriter:
    """Writes documents to `folder/prefix-000000.tar` ... of about `shard_bytes` bytes each, and then the manifest.

    A shard gets its name when it is complete. Documents without a key are numbered. The same documents give the same bytes.
    """

    def __init__(self, folder: str | Path, prefix: str, shard_bytes: int = 64 << 20) -> None:
        self.folder, self.prefix, self.shard_bytes = Path(folder), prefix, shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._paths: list[str] = []
        self._count = 0
        self._file: io.BufferedWriter | None = None
        self._tar: Any = None

    def write(self, document: Document) -> None:
        """Add a document. Raises ValueError if its key would be read back as another one."""
        import webdataset

        if split_name(f"{document.key}.json")[0] != document.key:
            raise ValueError(f"document key {document.key!r}: WebDataset ends a key at the first dot; use another character")
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
        """Complete the current shard; the next document opens another."""
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._paths.append(str(self.folder / f"{self.prefix}-{len(self._paths):06d}.tar"))
        os.replace(self._file.name, self._paths[-1])
        self._file = None

    def close(self) -> Shards:
        """Complete the last shard and write the manifest."""
        self.finish_shard()
        return Shards(self._paths, fields=OWN, again="all")


def write_shards(documents: Iterable[Document], folder: str | Path, prefix: str, shard_bytes: int = 64 << 20) -> Shards:
    """Write all documents through a `ShardWriter`. Documents that cannot be read back are rejected in the manifest."""
    writer = ShardWriter(folder, prefix, shard_bytes)
    for document in documents:
        writer.write(document)
    return writer.close()
