"""Remote shards: whole files, fetched ahead of need into a folder of bounded size.

    <folder>/<hash of the URL>/<name>     a whole file, renamed into place after its size and checksums were verified
                               <name>.<random>.part, <name>.lock
             room.lock                    held while space is reserved

The folder is the only state that processes and hosts share. The holder of `<name>.lock` downloads; a `.part` whose lock is free
belongs to a process that died. A `.part` has its final size from the start, so the space is reserved before its bytes arrive.
Readers hold a shared lock on every file that they have open or need next, so it is not evicted. The locks are `flock`: the
kernel releases them when a process dies, and NFSv4 carries them between hosts.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from pile_app.data.files import ShardError
from pile_app.data.urls import MissingError, expand_remote, is_remote, opened, with_retries

__all__ = ["Prefetcher", "ShardCache", "Wanted", "expand_remote", "is_remote"]

log = logging.getLogger(__name__)

Check = Callable[[str], None]  # raises if the file at a path is not the one that was indexed
CHUNK = 16 << 20  # bytes of a read, and of a ranged request to S3
WAIT_SECONDS = 0.1  # between attempts to reserve space
STUCK_SECONDS = 60  # after which a file that is needed now replaces files in use, rather than wait for ever


class Wanted(NamedTuple):
    """A remote file: see `ShardCache.fetch`."""

    url: str
    size: int | None = None
    check: Check | None = None


class _Later(ShardError):
    """A file that is fetched ahead is being fetched by another process, or is not wanted any more."""


class _NoRoom(_Later):
    """There is no room for a file that is fetched ahead."""


class ShardCache:
    """Local copies of remote files, shared by all processes that use the same folder.

    The least recently used copies are deleted first. It holds no handle and no state, so it may be pickled and used by threads.

    Args:
        folder: of the copies; created when needed.
        max_bytes: of everything in the folder: whole files, downloads under way, and files that others write there.
        allow_pipe: run the commands of `pipe:` URLs.
        retries: after a first failure. `backoff_seconds` pass before the first retry, and twice as long before each next one.
    """

    def __init__(
        self, folder: str | Path, max_bytes: int, allow_pipe: bool = False, retries: int = 5, backoff_seconds: float = 0.5
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"data.cache_gigabytes must be above 0, not {max_bytes / 1e9:g}")
        self.folder = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self.allow_pipe = allow_pipe
        self.retries = retries
        self.backoff_seconds = backoff_seconds

    def path(self, url: str) -> str:
        """Where the copy of `url` is, once it is fetched."""
        path = url.partition("?")[0].partition("#")[0] if url.startswith("http") else url
        name = re.sub(r"[^\w.,=+-]+", "_", path.rpartition("/")[2], flags=re.ASCII)[-100:].strip(".")
        return os.path.join(self.folder, hashlib.blake2b(url.encode(), digest_size=16).hexdigest(), name or "shard")

    def fetch(self, url: str, size: int | None = None, check: Check | None = None, ahead: Event | None = None) -> str:
        """Path of a whole local copy. If it is missing, one of the processes that ask for it downloads it.

        Another process may evict it before the caller opens it; `open` handles that.

        Args:
            size: in bytes; a copy of another size is replaced.
            check: called with the path of a new copy before others see it. If it raises, the copy is fetched once more.
            ahead: for a file that is not needed yet: the call does not wait for room or for other processes, and ends when
                this event is set.

        Raises:
            ShardError: names the URL, the last error and the fix.
            Exception: raised by `check` the second time.
        """
        if url.startswith("pipe:") and not self.allow_pipe:
            raise ShardError(f"{url!r} would run a command: set data.allow_pipe: true if you trust its author")
        path = self.path(url)
        if not _is_whole(path, size):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with _locked(path + ".lock", wait=ahead is None) as ours:
                if not ours:
                    raise _Later(f"{url!r} is being fetched by another process")
                if not _is_whole(path, size):
                    self._download(Wanted(url, size, check), path, ahead)
        return path

    def open(self, url: str, size: int | None = None, check: Check | None = None, ahead: Event | None = None) -> int:
        """A file descriptor, for reading, of the copy that `fetch` returns. The copy is not evicted until it is closed."""
        while True:
            with suppress(FileNotFoundError):  # evicted in between
                descriptor = os.open(self.fetch(url, size, check, ahead), os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
                os.close(descriptor)

    def fetch_small(self, url: str, to: str) -> str | None:
        """Fetch a small file of a data set, such as its manifest, to the path `to`; None if the server has none.

        Raises:
            ShardError: as `fetch`; but not for 404 or 403 (S3 answers 403 for a missing file if listing is not allowed).
        """
        if url.startswith("pipe:") or (url.startswith("http") and "?" in url):
            return None  # a query, such as a signature, is valid for the shard only
        os.makedirs(os.path.dirname(to), exist_ok=True)
        with _locked(to + ".lock"), suppress(MissingError):
            if not os.path.exists(to):
                self._download(Wanted(url), to, None)
            return to
        return None

    def _download(self, wanted: Wanted, path: str, ahead: Event | None) -> None:
        """Fetch a file to `path`, whose lock is held."""
        for stale in (path, *glob.glob(glob.escape(path) + ".*.part")):
            _remove(stale)
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"

        def pause(seconds: float) -> None:
            if ahead is None:
                time.sleep(seconds)
            elif ahead.wait(seconds):
                raise _Later(f"{wanted.url!r} is not wanted any more")

        def transfer() -> None:
            try:
                self._transfer(wanted, part, pause, ahead is None)
            except BaseException:
                _remove(part)  # at once, so that it takes no space during the pause
                raise

        for is_last in (False, True):
            with_retries(wanted.url, transfer, self.retries, self.backoff_seconds, pause)
            try:
                if wanted.check is not None:
                    wanted.check(part)
                with self._room():
                    return os.replace(part, path)
            except Exception as error:
                if is_last:
                    raise
                log.warning("%s is damaged and is fetched once more: %s", wanted.url, error)
            finally:
                _remove(part)

    def _transfer(self, wanted: Wanted, part: str, pause: Callable[[float], None], now: bool) -> None:
        """Download to `part` once."""
        url, size, written = wanted.url, wanted.size, 0
        open(part, "wb").close()
        reserved = self._reserve(url, part, size, now) if size else 0
        with open(part, "r+b") as file, opened(url) as (read, said):
            if None not in (size, said) and size != said:
                raise ShardError(f"{url!r} has {said:,} bytes, {size:,} were indexed: run `pile index {url}` again")
            size = said if size is None else size
            while chunk := read(CHUNK):
                needed = max(size or 0, written + len(chunk))
                if needed > reserved:  # of unknown size: reserve in steps, since each looks at the whole folder
                    step = 0 if size else min(CHUNK, self.max_bytes // 16)
                    reserved = self._reserve(url, part, max(needed, min(needed + step, self.max_bytes)), now)
                pause(0)
                file.write(chunk)
                written += len(chunk)
            file.truncate()  # to the bytes that arrived
            os.fsync(file.fileno())
        if size is not None and written != size:
            raise OSError(f"{written:,} of {size:,} bytes came")

    def _room(self) -> AbstractContextManager[bool]:
        os.makedirs(self.folder, exist_ok=True)
        return _locked(os.path.join(self.folder, "room.lock"))

    def _reserve(self, url: str, part: str, size: int, now: bool) -> int:
        """Make `part` `size` bytes long, and room for it. now: wait while all room is taken by files in use and downloads."""
        if size > self.max_bytes:
            limit = f"the cache holds {self.max_bytes:,}: raise data.cache_gigabytes"
            raise ShardError(f"{url!r} has {size:,} bytes or more, {limit}")
        began = time.monotonic()
        while True:
            is_stuck = time.monotonic() - began > STUCK_SECONDS
            with self._room():
                if self._evict(size, part, is_stuck):
                    os.truncate(part, size)
                    return size
            if not now:
                raise _NoRoom(f"no room for {url!r}")
            if os.path.getsize(part):  # two downloads that hold space could wait for each other
                raise OSError("other downloads left no room in the cache")
            time.sleep(WAIT_SECONDS)

    def _evict(self, size: int, own: str, is_stuck: bool) -> bool:
        """Delete copies until there is room for `size` bytes besides the file `own`. Returns whether there is."""
        copies, taken = [], 0
        for folder, _, names in os.walk(self.folder):
            for path in (os.path.join(folder, name) for name in names):
                with suppress(FileNotFoundError):
                    about = os.stat(path)
                    if path.endswith(".part") and path != own and _is_abandoned(path):
                        os.unlink(path)
                    elif path != own:
                        taken += about.st_size
                        if len(Path(folder).name) == 32 and not path.endswith((".part", ".lock", ".tmp")):
                            copies.append((about.st_mtime_ns, about.st_size, path))
        for _, bytes_, path in sorted(copies):
            if taken + size <= self.max_bytes:
                break
            if _delete_unused(path, is_stuck):
                taken -= bytes_
        return taken + size <= self.max_bytes


_Kept = tuple[int, tuple[float, Wanted], int]  # (number, file, open descriptor)


class Prefetcher:
    """Fetch files in threads before they are needed. Readers fetch missing files themselves: this is an optimization.

    Args:
        files: (position after which it is not needed, file) in the order of their first use; may be endless.
        ahead: files that are fetched and kept, counted from the last `advance`.
        threads: concurrent downloads.
    """

    def __init__(self, cache: ShardCache, files: Iterable[tuple[float, Wanted]], ahead: int = 16, threads: int = 2) -> None:
        self.cache, self.ahead = cache, ahead
        self._files = enumerate(files)
        self._again: list[tuple[int, tuple[float, Wanted]]] = []  # found no room
        self._is_full = False  # then the file that is needed soonest is tried alone
        self._kept: list[_Kept] = []
        self._pending = 0
        self._changed = threading.Condition()
        self._closed = Event()
        self._warned = False
        self._threads = [threading.Thread(target=self._run, name=f"prefetch-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def advance(self, position: float) -> None:
        """Release the files that are not needed from `position` on."""
        with self._changed:
            self._release([kept for kept in self._kept if kept[1][0] <= position])
            self._changed.notify_all()

    def _release(self, kept: Sequence[_Kept]) -> None:
        for *_, descriptor in kept:
            os.close(descriptor)
        self._kept = [other for other in self._kept if other not in kept]

    def close(self) -> None:
        """End the threads. A download under way is given up at its next chunk; wait for it some seconds at most."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)
        self.advance(float("inf"))

    def _may_begin(self) -> bool:
        has_room = self._pending + len(self._kept) < self.ahead and not (self._is_full and self._pending)
        return has_room or self._closed.is_set()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_begin)
                number, file = next(self._files, (0, None)) if not self._again else self._again.pop(0)
                if self._closed.is_set() or file is None:
                    return
                self._pending += 1
            descriptor, later = None, list[tuple[int, tuple[float, Wanted]]]()
            try:
                descriptor = self.cache.open(*file[1], ahead=self._closed)
            except _Later as error:
                later = [(number, file)]
                if isinstance(error, _NoRoom):  # files that are needed later must not take the room
                    with self._changed:
                        farther = [kept for kept in self._kept if kept[0] > number]
                        later += [kept[:2] for kept in farther]
                        self._release(farther)
            except Exception as error:
                level = logging.DEBUG if self._warned else logging.WARNING
                log.log(level, "a shard could not be fetched ahead; its reader will try again: %s", error)
                self._warned = True
            with self._changed:
                self._pending -= 1
                self._is_full = bool(later)
                if descriptor is not None:
                    self._kept.append((number, file, descriptor))
                if later:
                    self._again = sorted([*self._again, *later], key=lambda entry: entry[0])
                    self._changed.wait(WAIT_SECONDS)
                self._changed.notify_all()


def _is_whole(path: str, size: int | None) -> bool:
    """Whether a whole file of that size exists; marks it as used now."""
    try:
        with suppress(PermissionError):  # another user's
            os.utime(path)
        return size in (None, os.stat(path).st_size)
    except FileNotFoundError:
        return False


def _is_abandoned(part: str) -> bool:
    with _locked(part.rsplit(".", 2)[0] + ".lock", wait=False) as free:
        return free


def _delete_unused(path: str, is_stuck: bool) -> bool:
    """Delete a copy unless it is in use, or being replaced."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except PermissionError:  # another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not is_stuck:
            return False
        log.warning("the cache holds less than is read at the same time: raise data.cache_gigabytes")
    finally:
        os.close(descriptor)
    _remove(path)
    return True


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def _locked(path: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock at `path`; False if another thread, process or host holds it and `wait` is not set."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            ours = True
        except BlockingIOError:
            ours = False
        except OSError as error:
            raise ShardError(f"{path!r} cannot be locked ({error}): put the cache on a file system with flock") from error
        yield ours
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked child may hold a copy
        os.close(descriptor)
