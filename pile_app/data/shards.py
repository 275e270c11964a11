"""Shards: WebDataset tar files. `write_shards` writes documents, `Shards` reads them by number.

A sample is read by its byte range (`pread`: no shared file position, safe in threads and after a fork) and checked against its
CRC-32. Tars are opened when they are first needed."""

from __future__ import annotations

import glob
import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from pile_app.data.files import ShardError, whole_file
from pile_app.data.index import ShardIndex
from pile_app.data.manifest import Again, Manifest, group_shards, open_manifest, split_path
from pile_app.data.remote import ShardCache, expand_remote, is_remote
from pile_app.data.tar import split_name
from pile_app.data.tokenizers import ByteTokenizer, Tokenizer
from pile_app.documents import BadSample, Document, sample_from_document
from pile_app.fields import OWN, Fields

OPEN_SHARDS = 64  # files that a process holds open: an evicted shard frees its disk when its last reader closes it


def expand_shards(pattern: str | Sequence[str]) -> list[str]:
    """Paths or URLs from a pattern: braces as in WebDataset (`shard-{000000..000012}.tar`), then wildcards. Raises `ShardError`
    if nothing matches, a shard is named twice, or braces do not match."""
    import braceexpand

    where = f"(from {pattern!r}, working folder {os.getcwd()})"
    paths: list[str] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        try:
            expansions = [one] if one.startswith("pipe:") else list(braceexpand.braceexpand(one))
        except ValueError as error:  # UnbalancedBracesError
            raise ShardError(f"{one!r} has an unmatched brace: write e.g. 'train-{{000..007}}.tar'") from error
        for expanded in (expansion.removeprefix("file://") for expansion in expansions):
            found = expand_remote(expanded) if is_remote(expanded) else [expanded]
            if not is_remote(expanded) and glob.has_magic(expanded) and not os.path.exists(expanded):
                found = sorted(glob.glob(expanded))
            if not found:
                raise ShardError(f"no shard matches {expanded!r} {where}")
            paths += found
    local = [os.path.split(path) for path in paths if not is_remote(path)]
    folders = {folder for folder, _ in local}  # one listing for each, not a request for each shard
    listed = {folder: set(os.listdir(folder or ".")) for folder in folders if os.path.isdir(folder or ".")}
    if missing := [os.path.join(folder, name) for folder, name in local if name not in listed.get(folder, ())]:
        raise ShardError(f"shard {missing[0]!r} does not exist {where}")
    real = {folder: os.path.realpath(folder) for folder in folders}
    same = [os.path.join(real[folder], name) for folder, name in local] + list(filter(is_remote, paths))
    if twice := [path for path, count in Counter(same).items() if count > 1]:
        raise ShardError(f"{pattern!r} names a shard twice: {twice[:3]}")
    return paths


class OpenShard:
    """A shard that is being read. Its index is loaded and its file is opened, or fetched, when they are first needed."""

    def __init__(self, shards: Shards, number: int) -> None:
        self.path, self.size, self._manifest = shards.paths[number], shards.sizes[number], shards.manifest_of[number]
        self.cache = shards.cache if shards.remote[number] else None

    @cached_property
    def index(self) -> ShardIndex:
        """The rows of the shard. Raises `ShardError` if they are damaged."""
        index = self._manifest.index(split_path(self.path)[1])
        index.check()
        return index

    @cached_property
    def descriptor(self) -> int:
        if self.cache is not None:
            return self.cache.open(self.path, self.size, self.index.check_tar)
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"shard {self.path!r} cannot be opened: {error}") from error
        if (found := os.fstat(descriptor).st_size) != self.size:
            os.close(descriptor)
            message = f"shard {self.path!r} has {found:,} bytes, {self.size:,} were indexed: run `pile index {self.path}`"
            raise ShardError(message)
        return descriptor

    def __del__(self) -> None:
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


class Shards:
    """The documents of some shards, by number. See `expand_shards` and `open_manifest` for the arguments."""

    opened_as: type[OpenShard] = OpenShard

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
        self.remote = [is_remote(path) for path in self.paths]
        if cache is None and any(self.remote):
            raise ShardError(f"{pattern!r} is remote and has to be read through a cache")
        self.cache, self.tokenizer = cache, tokenizer or ByteTokenizer()
        options = cache, Fields.parse(fields) if fields else None, self.tokenizer, processes, again
        self.manifest_of: dict[int, Manifest] = {}  # by shard
        for (_, stem), shards in group_shards(self.paths).items():
            manifest = open_manifest(stem, [self.paths[shard] for shard in shards], *options)
            self.manifest_of |= dict.fromkeys(shards, manifest)
        self.manifests = list(dict.fromkeys(self.manifest_of.values()))
        abouts = self._abouts()
        self.sizes = [int(about["size"]) for about in abouts]  # of the tars, in bytes
        self.first_document: list[int] = [0, *np.cumsum([about["rows"][0] for about in abouts]).tolist()]
        prints = [about["fingerprint"] for about in abouts] + [str(m.fields) for m in self.manifests if m.fields != OWN]
        self.fingerprint = hashlib.blake2b("".join(prints).encode(), digest_size=16).hexdigest()
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("opened", "_fetched_again")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.opened: Any = lru_cache(OPEN_SHARDS)(partial(self.opened_as, self))
        self._fetched_again: set[int] = set()

    def __len__(self) -> int:
        return self.first_document[-1]

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents. Raises `BadSample` at a damaged one."""
        return map(self.document, range(len(self)))

    def _abouts(self) -> list[dict[str, Any]]:
        return [self.manifest_of[shard].about(split_path(path)[1]) for shard, path in enumerate(self.paths)]

    def index(self, shard: int) -> ShardIndex:
        return self.opened(shard).index

    def place(self, number: int) -> tuple[int, int]:
        """(shard, sample in it) of a document."""
        shard = bisect_right(self.first_document, number) - 1
        return shard, number - self.first_document[shard]

    def key(self, number: int) -> str:
        shard, sample = self.place(number)
        return self.index(shard).key(sample)

    def document(self, number: int) -> Document:
        """Read a document. Raises `BadSample`, or `ShardError` if the shard cannot be opened or fetched any more."""
        shard, sample = self.place(number)
        return self.index(shard).document(sample, self.block(shard, sample))

    def block(self, shard: int, sample: int) -> bytes:
        """The bytes of a sample; a remote shard is fetched once more if it differs from the index. Raises `BadSample`."""
        opened = self.opened(shard)  # held, so that another thread does not close it
        try:
            return opened.index.block(sample, opened.descriptor)
        except BadSample:
            if self.cache is None or not self.remote[shard] or shard in self._fetched_again:
                raise
        self._fetched_again.add(shard)  # the copy may be of an earlier version
        Path(self.cache.path(self.paths[shard])).unlink(missing_ok=True)
        self.opened.cache_clear()
        opened = self.opened(shard)
        return opened.index.block(sample, opened.descriptor)

    def publish(self) -> list[str]:
        """Upload the manifests of remote folders next to the shards. Returns where the manifests are."""
        found = [manifest.path for manifest in self.manifests]
        for number, path in enumerate(found):
            folder, url = self.manifests[number].folder, f"{self.manifests[number].folder}/{os.path.basename(path)}"
            if is_remote(folder) and not path.endswith(".published"):
                try:
                    with fsspec.open(url, "wb") as file:
                        file.write(Path(path).read_bytes())
                    found[number] = url
                except Exception as error:
                    found[number] += f" (cannot be written to {url}, so upload it there: {type(error).__name__} {error})"
        return found

    def balance(self) -> dict[str, Any]:
        """Account for all samples: `read` = `documents` + the sum of `rejected` (reason -> count). `examples`: reason -> first
        keys and message; `unused`, `dropped`: name of a file, field or part -> count."""
        abouts, examples = self._abouts(), dict[str, tuple[list[str], str]]()
        counts = {name: Counter[str]() for name in ("rejected", "unused", "dropped")}
        for about in abouts:
            for reason, (count, keys, detail) in about["rejected"].items():
                counts["rejected"][reason] += count
                examples.setdefault(reason, (keys, detail))
            for name in ("unused", "dropped"):
                counts[name].update(about[name])
        found = {"read": sum(about["read"] for about in abouts), "documents": len(self), "examples": examples}
        return found | counts | {"fields": str(self.manifests[0].fields)}


def describe_balance(balance: Mapping[str, Any]) -> str:
    """`1,000 samples: 990 documents; rejected: 10 missing_field (a, b); unused: 1,000 json.url; fields [jpg, txt]`"""
    counts, examples = balance["rejected"].most_common(), balance["examples"]
    rejected = [f"{count:,} {reason} ({', '.join(examples[reason][0])})" for reason, count in counts]
    parts = [f"{balance['read']:,} samples: {balance['documents']:,} documents", f"rejected: {', '.join(rejected) or 'none'}"]
    for name in ("unused", "dropped"):
        listed = [f"{count:,} {what}" for what, count in balance[name].most_common(8)]
        parts += [f"{name}: {', '.join(listed)}" + ", ..." * (len(balance[name]) > 8)] if listed else []
    return "; ".join([*parts, f"fields {balance['fields']}"])


def write_shards(documents: Iterable[Document], folder: str | Path, prefix: str, shard_bytes: int = 64 << 20) -> Shards:
    """Write documents to `folder/prefix-000000.tar` ... of about `shard_bytes` bytes each, and then the manifest.

    Documents without a key are numbered. The same documents give the same bytes. Documents that cannot be read back are
    rejected in the manifest. Raises ValueError for a key that WebDataset would change."""
    import webdataset

    Path(folder).mkdir(parents=True, exist_ok=True)
    paths: list[str] = []
    numbered = enumerate(documents)
    entry = next(numbered, None)
    while entry is not None:
        paths.append(str(Path(folder) / f"{prefix}-{len(paths):06d}.tar"))
        # mtime=0: with the float default, webdataset writes a kilobyte of PAX header a member, different in every run.
        with whole_file(paths[-1]) as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            while entry is not None and (file.tell() < shard_bytes):
                number, document = entry
                if split_name(f"{document.key}.json")[0] != document.key:
                    raise ValueError(f"document key {document.key!r}: a key ends at the first dot; use another character")
                tar.write(sample_from_document(document) | {"__key__": document.key or f"{prefix}-{number:09d}"})
                entry = next(numbered, None)
    return Shards(paths, fields=OWN, again="all")
