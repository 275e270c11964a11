"""The manifest of a source: one file that holds the indexes of all its shards, so that training never parses a tar.

`<stem>.manifest.safetensors` lies in the folder of the shards, or in the cache folder if they are remote or read-only. It also
holds the token counts of each tokenizer. Tokens of media follow from their sizes by arithmetic, so a manifest stays right when
a codec changes. Opening a source opens one file, regardless of the number of shards."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np

from pile_app.data.files import ShardError, available_cores, cache_folder, for_each, locked, map_arrays, save_arrays
from pile_app.data.index import COLUMNS, EXTENSIONS, TYPES, ShardIndex, count_tokens, index_shard, infer_from_shard, starts
from pile_app.data.remote import ShardCache, is_remote
from pile_app.data.tokenizers import Tokenizer
from pile_app.fields import Fields

Again = Literal["", "changed", "all"]
log = logging.getLogger(__name__)
MANIFEST_VERSION = 1
SUFFIX = ".manifest.safetensors"
MAX_STEMS = 8  # manifests of one folder that a source opens
BYTES_FOR_A_PROCESS = 64 << 20  # of shards, below which no further process is started


class Manifest:
    """The indexes of the shards of one folder, mapped into memory. Raises FileNotFoundError, or `ShardError` if damaged."""

    def __init__(self, path: str, folder: str) -> None:
        self.path, self.folder = path, folder
        try:
            self._columns, header = map_arrays(path)
            if header["version"] != MANIFEST_VERSION or tuple(header["extensions"]) != EXTENSIONS:
                raise ValueError("another version of Pile wrote it")
            self.fields, entries = Fields.parse(header["fields"]), header["shards"]
            self.entries = {entry["name"]: (number, entry) for number, entry in enumerate(entries)}
            rows = np.array([entry["rows"] for entry in entries], np.int64).reshape(len(entries), len(COLUMNS))
            self._starts = {group: starts(rows[:, number]) for number, group in enumerate(COLUMNS)}
            for name in {**TYPES, **self._columns}:
                if len(self._columns[name]) != self._starts[_group(name)][-1]:
                    raise ValueError(f"the length of {name} does not fit")
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ShardError(f"the manifest {path!r} cannot be read ({error}): run `pile index` on its shards") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.path, self.folder)

    def about(self, name: str) -> dict[str, Any]:
        return self.entries[name][1]

    def index(self, name: str) -> ShardIndex:
        """The index of a shard. Raises KeyError if the manifest does not hold it."""
        number, about = self.entries[name]
        columns = {}
        for column, array in self._columns.items():
            if column in TYPES or column.partition(".")[2] in about["tokens"]:
                start, stop = self._starts[_group(column)][number : number + 2]
                columns[column] = array[start:stop]
        about = about | {"tokens": dict(about["tokens"])}
        return ShardIndex(os.path.join(self.folder, name), about, columns, self.fields)


def _group(column: str) -> str:
    """The group of `COLUMNS` that a column has the length of."""
    kind = column.partition(".")[0]
    return {"tokens": "segments", "breaks": "breaks"}.get(kind) or next(group for group in COLUMNS if kind in COLUMNS[group])


def save_manifest(path: str, fields: Fields, indexes: Sequence[ShardIndex]) -> None:
    """Write the indexes of shards as one file. Tokens that were not counted for all of them are zeros in the others."""
    tokenizers = sorted({tokenizer for index in indexes for tokenizer in index.about["tokens"]})
    kinds = TYPES | {f"{kind}.{tokenizer}": "<u4" for tokenizer in tokenizers for kind in ("tokens", "breaks")}
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    for index in indexes:
        rows = dict(zip(COLUMNS, index.about["rows"], strict=True))
        for name, kind in kinds.items():
            column = index.columns.get(name)
            arrays[name].append(np.zeros(rows[_group(name)], kind) if column is None else column.astype(kind, copy=False))
    header = {"version": MANIFEST_VERSION, "extensions": EXTENSIONS, "fields": str(fields)}
    save_arrays(path, arrays, header | {"shards": [index.about for index in indexes]})


def open_manifest(
    stem: str,
    paths: Sequence[str],
    cache: ShardCache | None,
    fields: Fields | None,
    tokenizer: Tokenizer,
    processes: int | None,
    again: Again,
) -> Manifest:
    """Open the manifest of a group of `group_shards`. Missing shards and token counts are added first.

    fields: None: those of the manifest, or inferred from the first shard, and printed; another field map than that of the
    manifest gets a file of its own. again: shards to index again: "changed" (another size or a later time), "all", or none."""
    own = f"{stem}.{hashlib.blake2b(str(fields).encode(), digest_size=3).hexdigest()}"
    folder, names = split_path(paths[0])[0], [split_path(path)[1] for path in paths]
    original, published, home = _locations(folder, stem, cache)

    def known() -> list[Manifest]:  # the newest first
        found = []
        with suppress(FileNotFoundError):  # another process fetches it
            for path in sorted(filter(os.path.exists, {published, home}), key=os.path.getmtime, reverse=True):
                with suppress(*([ShardError] if again else [])):
                    found.append(Manifest(path, folder))
        return found

    def is_done(about: Mapping[str, Any]) -> bool:
        return tokenizer.fingerprint == "bytes" or tokenizer.fingerprint[:16] in about["tokens"]

    def complete(found: Sequence[Manifest]) -> Manifest | None:
        return next((one for one in found if all(n in one.entries and is_done(one.about(n)) for n in names)), None)

    def usable(found: Sequence[Manifest], stale: Collection[str] = ()) -> Manifest | None:
        if fields is not None and any(str(one.fields) != str(fields) and one.entries.keys() - set(stale) for one in found):
            return open_manifest(own, paths, cache, fields, tokenizer, processes, again)
        return None if stale else complete(found)

    if manifest := None if again else usable(known()):
        return manifest
    os.makedirs(os.path.dirname(home), exist_ok=True)
    with locked(home + ".lock"):
        found = known()  # another process may have written it meanwhile
        if cache is not None and is_remote(folder) and "?" not in paths[0] and (again or not complete(found)):
            Path(published).unlink(missing_ok=True)  # a signature, after `?`, is valid for its shard only
            if cache.fetch_small(original, published) is not None:
                found = known()
        stale = set(names) if again == "all" else set()
        if found and again == "changed":
            stale = {name for name, path in zip(names, paths, strict=True) if _has_changed(path, name, found[0])}
        if manifest := usable(found, stale):
            return manifest
        fields = fields or (found[0].fields if found else _infer(paths, cache))
        indexes = {}
        for name in set(names) - stale:
            if same := [one.index(name) for one in found if name in one.entries]:
                same = [one for one in same if one.about["fingerprint"] == same[0].about["fingerprint"]]
                indexes[name] = max(same, key=lambda index: is_done(index.about))
        jobs = [(path, name, indexes.get(name)) for path, name in zip(paths, names, strict=True)]
        todo = [job for job in jobs if job[2] is None or not is_done(job[2].about)]
        make = partial(_make, cache=cache, fields=fields, tokenizer=tokenizer, again=again)
        if not is_remote(paths[0]):
            size = sum(os.path.getsize(path) for path, *_ in todo)
            processes = min(processes or available_cores(), 1 + size // BYTES_FOR_A_PROCESS)
        for index in for_each(make, todo, processes):
            indexes[index.about["name"]] = index
            if not index.about["read"]:
                log.warning("shard %r holds no sample", index.path)
        for name in found[0].entries.keys() - indexes.keys() if found else ():
            if is_remote(folder) or os.path.exists(os.path.join(folder, name)):
                indexes[name] = found[0].index(name)
        save_manifest(home, fields, [indexes[name] for name in sorted(indexes)])
    return Manifest(home, folder)


def _locations(folder: str, stem: str, cache: ShardCache | None) -> tuple[str, str, str]:
    """(path or URL next to the shards, local path of that file, path that this process writes)."""
    original, is_local = f"{folder}/{stem}{SUFFIX}", bool(folder) and not is_remote(folder)
    root = cache_folder() if is_local or cache is None else Path(cache.folder)
    digest = hashlib.blake2b(folder.encode(), digest_size=12).hexdigest()
    copy = str(root / "manifests" / digest / f"{stem}{SUFFIX}")
    if not is_local:
        return original, f"{copy}.published", copy
    return original, original, original if os.access(folder, os.W_OK) else copy


def _has_changed(path: str, name: str, manifest: Manifest) -> bool:
    """Whether a shard of a manifest has another size than when it was indexed, or a local shard a later time."""
    with suppress(Exception):  # it is not in the manifest, or the server does not tell
        size = manifest.about(name)["size"]
        if not is_remote(path):
            return (about := os.stat(path)).st_size != size or about.st_mtime > os.path.getmtime(manifest.path)
        filesystem, place = fsspec.core.url_to_fs(path)
        return filesystem.size(place) not in (size, None)
    return False


def _make(
    job: tuple[str, str, ShardIndex | None], cache: ShardCache | None, fields: Fields, tokenizer: Tokenizer, again: Again
) -> ShardIndex:
    """Index a shard, unless it has an index that lacks token counts only."""
    path, name, index = job
    with _local_copy(path, cache, bool(again) and index is None) as local:
        index = index or index_shard(local, name, os.path.join(split_path(path)[0], name), fields)
        if tokenizer.fingerprint != "bytes" and tokenizer.fingerprint[:16] not in index.about["tokens"]:
            count_tokens(index, local, tokenizer, keep=local == path)
    return index


@contextmanager
def _local_copy(path: str, cache: ShardCache | None, again: bool = False) -> Iterator[str]:
    """Yield the local path of a shard. A remote shard is fetched, even if there is a copy (`again`), and kept meanwhile."""
    if cache is None or not is_remote(path):
        yield path
        return
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
            with _local_copy(path, cache) as local:
                fields, count = infer_from_shard(local)
            print(f"{path}: fields {fields} (inferred from {count} samples)", file=sys.stderr, flush=True)
            return fields
        except ShardError as error:
            errors.append(error)
    raise errors[0]


def group_shards(paths: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """(folder, stem of the manifest: `x-train` of `x-train-000.tar`, or what is common to many) -> indices of its shards."""
    groups: dict[tuple[str, str], list[int]] = {}
    parts = [split_path(path) for path in paths]
    for folder in dict.fromkeys(folder for folder, _ in parts):
        stems = {number: _stem(name) for number, (other, name) in enumerate(parts) if other == folder}
        if len(set(stems.values())) > MAX_STEMS:
            stems = dict.fromkeys(stems, _stem(*(parts[number][1] for number in stems)))
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
