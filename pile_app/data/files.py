"""Files that appear whole or not at all, locks between processes, and arrays that are mapped into memory."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import signal
import threading
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
except ImportError:  # Windows, where nothing is locked
    LOCK_SH, LOCK_EX, LOCK_NB, LOCK_UN = 1, 2, 4, 8  # type: ignore[misc]
    flock = lambda *_: None  # noqa: E731


DTYPES = {"BOOL": "|b1"} | {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "UIF" for size in (1, 2, 4, 8)}


class ShardError(RuntimeError):
    """A shard or its manifest is missing, damaged or stale. The message names the file and the fix."""


def cache_folder() -> Path:
    """The folder for remote shards, for manifests of read-only folders and for tables of large sources: `$PILE_CACHE`."""
    return Path(os.environ.get("PILE_CACHE") or Path.home() / ".cache" / "pile")


@contextmanager
def whole_file(path: str | Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when complete (`durable`: and synced), or is removed if writing fails."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"  # process ids coincide in containers of several hosts
    try:
        with open(temporary, "wb", 1 << 20) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(Path(path).parent)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def sync_folder(folder: Path) -> None:
    """Wait until renames in a folder are on disk; Windows has no such call."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def release(descriptor: int) -> None:
    """Unlock and close a file. Closing alone does not unlock it while a forked child holds a copy of the descriptor."""
    flock(descriptor, LOCK_UN)
    os.close(descriptor)


@contextmanager
def locked(path: str, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock file, removed when it is released; yield False if it is held elsewhere and `wait` is False."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flock(descriptor, LOCK_EX if wait else LOCK_EX | LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                break  # else its last holder has removed the file meanwhile
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ShardError(f"{path!r} cannot be locked ({error}): put the folder on a file system with flock") from error
        os.close(descriptor)
    try:
        yield True
    finally:
        with suppress(OSError):
            os.unlink(path)
        release(descriptor)


def save_arrays(path: str, arrays: Mapping[str, Sequence[np.ndarray]], header: Mapping[str, Any]) -> None:
    """Write the concatenations of one-dimensional arrays as a safetensors file, its JSON header as the metadata `pile`."""
    text = json.dumps(dict(sorted(header.items())))
    description: dict[str, Any] = {"__metadata__": {"pile": text, "crc": str(zlib.crc32(text.encode()))}}
    dtypes = {name: parts[0].dtype for name, parts in arrays.items()}
    names = sorted(arrays, key=lambda name: (-dtypes[name].itemsize, name))  # large items first, so that all are aligned
    stop = 0
    for name in names:
        start, length = stop, sum(map(len, arrays[name]))
        stop += length * dtypes[name].itemsize
        dtype = next(key for key, value in DTYPES.items() if dtypes[name] == value)
        description[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, stop]}
    encoded = json.dumps(description).encode()
    encoded += b" " * (-len(encoded) % 8)
    with whole_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            for part in arrays[name]:
                file.write(np.ascontiguousarray(part, dtypes[name]).data)


def map_arrays(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Map the arrays of a safetensors file into memory, and read its header. Raises OSError, or ValueError if it is damaged."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError("the file is too short")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(mapped[:8], "little")
    if begin > size:
        raise ValueError("the file is truncated")
    try:
        description = json.loads(mapped[8:begin])
        metadata, arrays = description.pop("__metadata__"), {}
        for name, about in description.items():
            (start, stop), dtype = about["data_offsets"], np.dtype(DTYPES[about["dtype"]])
            if not 0 <= start <= stop <= size - begin or (stop - start) % dtype.itemsize:
                raise ValueError("the file is truncated")
            arrays[name] = np.frombuffer(mapped, dtype, (stop - start) // dtype.itemsize, begin + start)
        if zlib.crc32(metadata["pile"].encode()) != int(metadata["crc"]):
            raise ValueError("the header is damaged")
        return arrays, dict(json.loads(metadata["pile"]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"missing array or value: {error}") from error


def worker_context(*preload: str) -> Any:
    """Start the server that forks worker processes and return its context. Ctrl-C is blocked in them: their parent ends them.

    preload: modules that the server imports, if it did not run already."""
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # which would unblock Ctrl-C
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


def available_cores() -> int:
    """The cores that this process may run on; where the system cannot tell, as macOS, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@contextmanager
def worker_pool(processes: int, *preload: str) -> Iterator[Run]:
    """Yield `run(function, items)`, which maps in worker processes, or in this one if one process is enough. An exception, such
    as Ctrl-C, kills the workers. preload: see `worker_context`."""
    context, others = worker_context(*preload), set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, _end_with_parent) as pool:  # a process starts when there is work for it

        def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
            if min(processes, len(items)) < 2:
                return map(function, items)
            with _delayed_interrupt():  # a worker that was just being started would not be found below
                futures = [pool.submit(function, item) for item in items]
            return (future.result() for future in futures)  # not `map`, which cancels the rest: an error if a worker was killed

        try:
            yield run
        except BrokenProcessPool as error:
            raise ValueError("a process was killed, perhaps for lack of memory: try fewer with --processes") from error
        except BaseException:  # do not wait for the running tasks
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


@contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def for_each(function: Callable[[Any], Any], items: Sequence[Any], processes: int | None = None) -> list[Any]:
    """Map a function over items in several processes (None: one for each core), in this process if that is one."""
    processes = min(processes or available_cores(), len(items))
    if processes < 2:
        return [function(item) for item in items]
    size = max(1, len(items) // (8 * processes))
    with worker_pool(processes) as run:
        chunks = run(partial(_map, function), [items[first : first + size] for first in range(0, len(items), size)])
        return [result for chunk in chunks for result in chunk]


def _map(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [function(item) for item in items]
