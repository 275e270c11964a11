"""Files that appear whole or not at all, locks between processes, and arrays that are mapped into memory."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class ShardError(RuntimeError):
    """A shard or its manifest is missing, damaged or stale. The message names the file and the fix."""


def cache_folder() -> Path:
    """The folder for remote shards, for manifests of read-only folders and for tables of large sources: `$PILE_CACHE`."""
    return Path(os.environ.get("PILE_CACHE") or Path.home() / ".cache" / "pile")


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when it is complete, or is removed if writing fails."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"  # process ids coincide in containers of several hosts
    try:
        with open(temporary, "wb", 1 << 20) as file:
            yield file
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold an exclusive lock between processes and hosts. The lock file is removed when the lock is released."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # its last holder has removed the file meanwhile
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(descriptor)


def save_arrays(path: str, arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]], header: Mapping[str, Any]) -> None:
    """Write a safetensors file; the same arrays and header give the same bytes.

    Args:
        arrays: one-dimensional; a sequence of arrays is written as their concatenation, which is never in memory.
        header: JSON values, kept as one string under the metadata key `pile`, with its CRC-32.
    """
    text = json.dumps(dict(sorted(header.items())))
    described: dict[str, Any] = {"__metadata__": {"pile": text, "crc": str(zlib.crc32(text.encode()))}}
    parts = {name: [array] if isinstance(array, np.ndarray) else list(array) for name, array in arrays.items()}
    kinds = {name: some[0].dtype for name, some in parts.items()}
    names = sorted(parts, key=lambda name: (-kinds[name].itemsize, name))  # large items first, so that all are aligned
    stop = 0
    for name in names:
        kind = {"b": "BOOL", "u": "U{}", "i": "I{}", "f": "F{}"}[kinds[name].kind].format(8 * kinds[name].itemsize)
        first, length = stop, sum(map(len, parts[name]))
        stop += length * kinds[name].itemsize
        described[name] = {"dtype": kind, "shape": [length], "data_offsets": [first, stop]}
    first_bytes = json.dumps(described).encode()
    first_bytes += b" " * (-len(first_bytes) % 8)
    with whole_file(path) as file:
        file.write(len(first_bytes).to_bytes(8, "little") + first_bytes)
        for name in names:
            for array in parts[name]:
                file.write(np.ascontiguousarray(array, kinds[name]).data)


def map_arrays(path: str, types: Mapping[str, str] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Map the arrays of a safetensors file into memory. Returns read-only views and the header.

    Args:
        types: name -> dtype of the arrays that are needed; None: all arrays, as the file describes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or lacks an array.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError("the file is too short")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[:8], "little")
    if length > size - 8:
        raise ValueError("the file is truncated")
    try:
        described = json.loads(mapped[8 : 8 + length])
        if types is None:
            kinds = {"BOOL": "|b1"} | {f"{k}{8 * n}": f"<{k.lower()}{n}" for k in "UIF" for n in (1, 2, 4, 8)}
            types = {name: kinds[one["dtype"]] for name, one in described.items() if name != "__metadata__"}
        arrays = {}
        for name, kind in types.items():
            first, stop = described[name]["data_offsets"]
            item = np.dtype(kind).itemsize
            if not 0 <= first <= stop <= size - 8 - length or (stop - first) % item:
                raise ValueError("the file is truncated")
            arrays[name] = np.frombuffer(mapped, kind, (stop - first) // item, 8 + length + first)
        text = described["__metadata__"]["pile"]
        if zlib.crc32(text.encode()) != int(described["__metadata__"]["crc"]):
            raise ValueError("the header is damaged")
        return arrays, dict(json.loads(text))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"missing array or value: {error}") from error


def for_each(function: Callable[[Any], Any], items: Sequence[Any], processes: int | None = None) -> list[Any]:
    """Map a function over items in several processes (None: one for each core), in this process if that is one."""
    processes = min(processes or os.cpu_count() or 1, len(items))
    if processes < 2:
        return [function(item) for item in items]
    with ProcessPoolExecutor(processes, get_context("forkserver")) as pool:
        return list(pool.map(function, items, chunksize=max(1, len(items) // (8 * processes))))
