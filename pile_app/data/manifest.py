"""The manifest of a source: one file that holds the indexes of all its shards, so that training never parses a tar.

`<stem>.manifest.safetensors` lies in the folder of the shards, or in the cache folder if they are remote or read-only. It also
holds the token counts of each tokenizer. Tokens of media follow from their sizes by arithmetic, so a manifest stays right when
a codec changes. Opening a source opens one file, whatever the number of shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import fsspec
import numpy as np

from pile_app.data.files import ShardError, cache_folder, for_each, locked, map_arrays, save_arrays
from pile_app.data.index import COLUMNS, EXTENSIONS, TYPES, ShardIndex, index_shard, infer_from_shard, starts
from pile_app.data.tokenizers import ByteTokenizer, Tokenizer
from pile_app.data.tokens import columns_of, count_tokens
from pile_app.data.urls import is_remote
from pile_app.fields import Fields

if TYPE_CHECKING:
    from pile_app.data.remote import ShardCache

Again = Literal["", "changed", "all"]
log = logging.getLogger(__name__)
MANIFEST_VERSION = 1
SUFFIX = ".manifest.safetensors"
MAX_STEMS = 8  # manifests of one folder that a source opens
BYTES_FOR_A_PROCESS = 64 << 20  # of shards, below which no further process is started
_GROUP = {name: group for group, columns in COLUMNS.items() for name in columns} | {"tokens": "segments", "breaks": "breaks"}


class Manifest:
    """The indexes of the shards of one folder, mapped into memory. fields: the field map that they were read with.

    Raises:
        FileNotFoundError: there is no such file.
        ShardError: the file is damaged, or of another version of Pile.
    """

    def __init__(self, path: str, folder: str) -> None:
        self.path, self.folder = path, folder
        try:
            self._columns, header = map_arrays(path)
            if header["version"] != MANIFEST_VERSION or tuple(header["extensions"]) != EXTENSIONS:
                raise ValueError("another version of Pile wrote it")
            self.fields = Fields.parse(header["fields"])
            entries = header["shards"]
            self.entries = {entry["name"]: (number, entry) for number, entry in enumerate(entries)}
            rows = np.array([entry["rows"] for entry in entries], np.int64).reshape(len(entries), len(COLUMNS))
            self._starts = {group: starts(rows[:, number]) for number, group in enumerate(COLUMNS)}
            for name in {**TYPES, **self._columns}:
                if len(self._columns[name]) != self._starts[_GROUP[name.partition(".")[0]]][-1]:
                    raise ValueError(f"the length of {name} does not fit")
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ShardError(f"the manifest {path!r} cannot be read ({error}): run `pile index` on its shards") from error

    def index(self, name: str) -> ShardIndex:
        """The index of a shard; KeyError if the manifest does not hold it."""
        number, about = self.entries[name]
        columns = {}
        for column, array in self._columns.items():
            first, stop = self._starts[_GROUP[column.partition(".")[0]]][number : number + 2]
            if column in TYPES or column.partition(".")[2] in about["tokens"]:
                columns[column] = array[first:stop]
        return ShardIndex(os.path.join(self.folder, name), about | {"tokens": dict(about["tokens"])}, columns)

    def is_complete(self, names: Collection[str], tokenizer: Tokenizer) -> bool:
        fingerprint = tokenizer.fingerprint[:16]
        return all(
            name in self.entries and (fingerprint == "bytes" or fingerprint in self.entries[name][1]["tokens"])
            for name in names
        )

    def agrees_with(self, other: Manifest, names: Collection[str]) -> bool:
        """Whether it describes these shards alike, as far as the other one does."""
        both = [name for name in names if name in self.entries and name in other.entries]
        return all(self.entries[name][1]["fingerprint"] == other.entries[name][1]["fingerprint"] for name in both)


def save_manifest(path: str, fields: Fields, indexes: Sequence[ShardIndex]) -> None:
    tokenizers = sorted({tokenizer for index in indexes for tokenizer in index.about["tokens"]})
    extra = {f"{kind}.{tokenizer}": "<u4" for tokenizer in tokenizers for kind in ("tokens", "breaks")}
    arrays = {}
    for name, kind in (TYPES | extra).items():
        group = list(COLUMNS).index(_GROUP[name.partition(".")[0]])
        arrays[name] = [
            index.columns[name].astype(kind, copy=False)
            if name in index.columns
            else np.zeros(index.about["rows"][group], kind)
            for index in indexes
        ]
    header = {"version": MANIFEST_VERSION, "extensions": EXTENSIONS, "fields": str(fields)}
    save_arrays(path, arrays, header | {"shards": [index.about for index in indexes]})


def open_manifest(
    paths: Sequence[str],
    stem: str,
    cache: ShardCache | None = None,
    fields: Fields | None = None,
    tokenizer: Tokenizer | None = None,
    processes: int | None = None,
    again: Again = "",
) -> Manifest:
    """Open the manifest of shards that share one. Shards and token counts that are missing are added first.

    Args:
        paths: paths or URLs of the tars, one group of `group_shards`.
        stem: of that group.
        cache: of remote shards.
        fields: the field map; None: that of the manifest, or inferred from the first shard, and printed.
        tokenizer: whose token counts are needed.
        processes: that index; None: one for each core.
        again: which shards to index although the manifest holds them: "changed" (another size or a later time), "all", or none.

    Raises:
        ShardError: a shard or the manifest is missing or damaged.
    """
    tokenizer = tokenizer or ByteTokenizer()
    folder, names = split_path(paths[0])[0], [split_path(path)[1] for path in paths]
    look = partial(_known, folder, names=names, cache=cache, tokenizer=tokenizer, repair=bool(again))
    url = "" if "?" in paths[0] else folder  # a signature is valid for its shard only
    known = look(stem, url)
    stale = _stale(paths, known, again)
    if fields and any(str(one.fields) != str(fields) and one.entries.keys() - stale for one in known):
        stem += "." + hashlib.blake2b(str(fields).encode(), digest_size=3).hexdigest()
        known = look(stem, url)
        stale = _stale(paths, known, again)

    def found() -> Manifest | None:
        fitting = (one for one in known if one.is_complete(names, tokenizer) and one.agrees_with(known[0], names))
        return None if stale else next(fitting, None)

    if manifest := found():
        return manifest
    path = _beside(folder, stem) if _is_writable(folder) else _copy(folder, stem, cache)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with locked(path + ".lock"):
        known = look(stem, "")  # another process may have written it meanwhile
        if manifest := found():
            return manifest
        fields = fields or (known[0].fields if known else _infer(paths, cache))
        indexes = {name: index for name in names if name not in stale and (index := _best(known, name, tokenizer)) is not None}
        todo = [
            (path, indexes.get(name))
            for path, name in zip(paths, names, strict=True)
            if not _is_done(indexes.get(name), tokenizer)
        ]
        make = partial(_make, cache=cache, fields=fields, tokenizer=tokenizer, again=bool(stale))
        for index in for_each(make, todo, _processes(todo, processes)):
            indexes[index.about["name"]] = index
            if not index.about["read"]:
                log.warning("shard %r holds no sample", index.path)
        for name in known[0].entries.keys() - indexes.keys() if known else ():
            if is_remote(folder) or os.path.exists(os.path.join(folder, name)):
                indexes[name] = known[0].index(name)
        save_manifest(path, fields, [indexes[name] for name in sorted(indexes)])
    return Manifest(path, folder)


def _known(
    folder: str, stem: str, url: str, names: Collection[str], cache: ShardCache | None, tokenizer: Tokenizer, repair: bool
) -> list[Manifest]:
    """The manifests that there are, the published one first. url: the folder to fetch one from, if none is complete."""
    copy = _copy(folder, stem, cache)
    published = f"{copy}.published" if is_remote(folder) else _beside(folder, stem)
    found = []
    for path in (published, copy):
        with suppress(FileNotFoundError):
            try:
                found.append(Manifest(path, folder))
            except ShardError:
                if not repair:
                    raise
    if is_remote(url) and cache is not None and (repair or not any(one.is_complete(names, tokenizer) for one in found)):
        os.makedirs(os.path.dirname(published), exist_ok=True)
        with locked(f"{published}.fetch"), suppress(FileNotFoundError):
            if os.path.exists(published):
                os.unlink(published)
            if cache.fetch_small(_beside(url, stem), to=published) is not None:
                found = [Manifest(published, folder), *(one for one in found if one.path != published)]
    return found


def _stale(paths: Sequence[str], known: Sequence[Manifest], again: Again) -> set[str]:
    """Names of the shards to index again."""
    if again == "all":
        return {split_path(path)[1] for path in paths}
    stale = set()
    for path in paths if known and again else ():
        name = split_path(path)[1]
        if name in known[0].entries and _has_changed(path, known[0].entries[name][1]["size"], os.path.getmtime(known[0].path)):
            stale.add(name)
    return stale


def _has_changed(path: str, size: int, since: float) -> bool:
    if not is_remote(path):
        with suppress(OSError):
            return (about := os.stat(path)).st_size != size or about.st_mtime > since
    with suppress(Exception):  # servers that do not tell
        filesystem, place = fsspec.core.url_to_fs(path)
        return filesystem.size(place) not in (size, None)
    return False


def _best(known: Sequence[Manifest], name: str, tokenizer: Tokenizer) -> ShardIndex | None:
    """The index of a shard, with token counts if any of the manifests that agree has them."""
    having = [one for one in known if name in one.entries]
    same = [one for one in having if one.agrees_with(having[0], [name])]
    return next((one.index(name) for one in sorted(same, key=lambda one: not one.is_complete([name], tokenizer))), None)


def _is_done(index: ShardIndex | None, tokenizer: Tokenizer) -> bool:
    return index is not None and (tokenizer.fingerprint == "bytes" or columns_of(tokenizer)[0] in index.columns)


def _make(
    job: tuple[str, ShardIndex | None], cache: ShardCache | None, fields: Fields, tokenizer: Tokenizer, again: bool
) -> ShardIndex:
    """Index a shard, unless it has an index that lacks token counts only."""
    path, index = job
    with _opened(path, cache, again and index is None) as local:
        if index is None:
            folder, name = split_path(path)
            index = index_shard(local, name, os.path.join(folder, name), fields)
        if tokenizer.fingerprint != "bytes":
            count_tokens(index, local, fields, tokenizer, keep=local == path)
    return index


@contextmanager
def _opened(path: str, cache: ShardCache | None, again: bool = False) -> Iterator[str]:
    """The local path of a shard, which is fetched if it is remote, and not evicted meanwhile."""
    if not is_remote(path):
        yield path
        return
    if cache is None:
        raise ShardError(f"{path!r} is remote and has to be read through a cache")
    if again:
        Path(cache.path(path)).unlink(missing_ok=True)
    descriptor = cache.open(path)
    try:
        yield cache.path(path)
    finally:
        os.close(descriptor)


def _infer(paths: Sequence[str], cache: ShardCache | None) -> Fields:
    """Infer and print the field map of the first shard that has usable samples."""
    errors = []
    for path in paths:
        try:
            with _opened(path, cache) as local:
                fields, count = infer_from_shard(local)
        except ShardError as error:
            errors.append(error)
            continue
        print(f"{path}: fields {fields} (inferred from {count} samples)", file=sys.stderr, flush=True)
        return fields
    raise errors[0]


def _processes(todo: Sequence[tuple[str, ShardIndex | None]], processes: int | None) -> int | None:
    if any(is_remote(path) for path, _ in todo):
        return processes
    size = sum(os.path.getsize(path) for path, _ in todo if os.path.exists(path))
    return min(processes or os.cpu_count() or 1, 1 + size // BYTES_FOR_A_PROCESS)


def group_shards(paths: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """(folder, stem of the manifest) -> indices of the shards that share a manifest.

    The stem is the name without the number at its end: `x-train-000.tar` -> `x-train`. If a folder has many of them, all its
    shards share the stem that their names have in common.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    names = [split_path(path) for path in paths]
    for folder in dict.fromkeys(folder for folder, _ in names):
        stems = {number: _stem(name) for number, (place, name) in enumerate(names) if place == folder}
        if len(set(stems.values())) > MAX_STEMS:
            stems = dict.fromkeys(stems, _stem(*(names[number][1] for number in stems)))
        for number, stem in stems.items():
            groups.setdefault((folder, stem), []).append(number)
    return groups


def _stem(*names: str) -> str:
    common = os.path.commonprefix([name.removesuffix(".tar") for name in names])  # noqa: RUF071 (of names, not of folders)
    return re.sub(r"[^\w.,=+-]+", "_", re.sub(r"[-_.\d]+$", "", common))[-100:] or "shards"


def split_path(path: str) -> tuple[str, str]:
    """(folder, name) of a path or URL. The name of a signed URL is without its query; a pipe has no folder."""
    if path.startswith("pipe:"):
        return "", path
    if is_remote(path):
        folder, _, name = (path.partition("?")[0] if path.startswith("http") else path).rpartition("/")
        return folder, name
    return os.path.split(os.path.abspath(path))


def _beside(folder: str, stem: str) -> str:
    return f"{folder}/{stem}{SUFFIX}"


def _copy(folder: str, stem: str, cache: ShardCache | None) -> str:
    root = Path(cache.folder) if cache is not None and (is_remote(folder) or not folder) else cache_folder()
    return str(root / "manifests" / hashlib.blake2b(folder.encode(), digest_size=12).hexdigest() / f"{stem}{SUFFIX}")


def _is_writable(folder: str) -> bool:
    return bool(folder) and not is_remote(folder) and os.access(folder, os.W_OK)
