"""Remote shards: whole files, fetched ahead of need into a folder of bounded size.

    <folder>/<hash of the URL>/<name>            the file: there only when it is whole
                               <name>.<random>.part, <name>.lock
                               <name>....safetensors   what is known of it: its index, its tokens
             plans/<host>@<process>@...          what that process reads next, in order
             room.lock                           held while room is made

All that processes and hosts know of each other stands in that folder. Who holds `<name>.lock` downloads; a `.part` whose lock
is free belongs to a process that died. A `.part` has its final size from the start, so it counts before its bytes are there.
Locks are `flock`: the kernel frees them when a process dies, and NFSv4 carries them between hosts. There the bound is late by
the seconds for which NFS remembers sizes. A file that a process holds open frees its disk when that process closes it.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pile_app.data.files import ShardError, whole_file
from pile_app.data.urls import MissingError, expand_remote, is_remote, opened, with_retries

__all__ = ["Prefetcher", "ShardCache", "expand_remote", "is_remote"]

log = logging.getLogger(__name__)

Check = Callable[[str], None]  # raises where the file at that path is not the one that was indexed
Wanted = tuple[str, int | None, Check | None]  # URL, expected size, check
CHUNK = 16 << 20  # bytes of a read, and of a ranged request to S3
PLAN_SECONDS = 3600  # after which the plan of a process on another host counts no more: it may be dead
WAIT_SECONDS = 0.1  # between looks for room
NEVER = 1 << 62  # place of what stands in no plan


class _NoRoomError(ShardError):
    """What is fetched ahead would take the place of what is needed sooner, or is not wanted any more."""


@dataclass(frozen=True)
class _Job:
    """One file to fetch. ahead: set when nobody wants it ahead of need any more; None where it is needed now."""

    url: str
    path: str
    size: int | None = None
    check: Check | None = None
    ahead: threading.Event | None = None
    is_bounded: bool = True

    def is_done(self) -> bool:
        """Whether a whole file of that size is there. Notes its use in its time."""
        try:
            with suppress(PermissionError):  # another user's
                os.utime(self.path)
            return self.size in (None, os.stat(self.path).st_size)
        except FileNotFoundError:
            return False

    def pause(self, seconds: float) -> None:
        if self.ahead is None:
            time.sleep(seconds)
        elif self.ahead.wait(seconds):
            raise _NoRoomError


class ShardCache:
    """Local copies of remote files, at most `max_bytes` of them together, shared by all that use the same folder.

    It holds no handle and nothing that changes, so it may be pickled and used by threads.

    Args:
        folder: of the copies; made when needed.
        max_bytes: of whole files and those under way. What `fetch_small` fetches, and what others write beside, comes on top.
        allow_pipe: run the commands of `pipe:` URLs.
        retries: after a first failure, with `backoff_seconds` before the first, and twice as long before each next one.
    """

    def __init__(
        self, folder: str | Path, max_bytes: int, allow_pipe: bool = False, retries: int = 5, backoff_seconds: float = 0.5
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"data.cache_gigabytes has to be above 0, not {max_bytes / 1e9:g}")
        self.folder = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self.allow_pipe = allow_pipe
        self.retries = retries
        self.backoff_seconds = backoff_seconds

    def path(self, url: str) -> str:
        """Where the copy of `url` lies once it is fetched."""
        where = url.partition("?")[0].partition("#")[0] if url.startswith("http") else url
        name = re.sub(r"[^\w.,=+-]+", "_", where.rpartition("/")[2], flags=re.ASCII)[-100:].strip(".")
        return os.path.join(self.folder, _digest(url), name or "shard")

    def fetch(
        self, url: str, expected_size: int | None = None, check: Check | None = None, ahead: threading.Event | None = None
    ) -> str:
        """Path of a whole local copy, which is downloaded where it is missing, by one of all that ask at the same time.

        Another process may evict it before the caller opens it; `open` knows of that.

        Args:
            expected_size: bytes; a copy of another size is fetched anew.
            check: is given the path of a new copy before others see it. If it raises, the copy is fetched once more.
            ahead: given where the file is not needed yet: it takes no room from what is needed sooner, nobody waits for another
                who fetches it, and all ends when the event is set.

        Raises:
            ShardError: naming the URL, what happened last and what to do.
            Exception: what `check` raised the second time.
        """
        if url.startswith("pipe:") and not self.allow_pipe:
            raise ShardError(f"{url!r} would run a command: set data.allow_pipe: true if you trust who wrote it")
        job = _Job(url, self.path(url), expected_size, check, ahead)
        if not job.is_done():
            os.makedirs(os.path.dirname(job.path), exist_ok=True)
            with _locked(job.path + ".lock", wait=ahead is None) as ours:
                if ours and not job.is_done():
                    self._download(job)
        return job.path

    def open(self, url: str, expected_size: int | None = None, check: Check | None = None) -> int:
        """A file descriptor, for reading, of what `fetch` gives. The caller closes it."""
        while True:
            with suppress(FileNotFoundError):  # evicted in between
                return os.open(self.fetch(url, expected_size, check), os.O_RDONLY)

    def fetch_small(self, url: str, to: str) -> str | None:
        """Brings a small file beside a shard, such as its index, to the path `to`; None where the server has none.

        Raises:
            ShardError: as `fetch`; not for 404 and 403, which S3 answers for a missing file to who may not list.
        """
        if url.startswith("pipe:") or (url.startswith("http") and "?" in url):
            return None  # a query is the shard's own, such as a signature
        os.makedirs(os.path.dirname(to), exist_ok=True)
        with _locked(to + ".lock"):
            if not os.path.exists(to):
                try:
                    self._download(_Job(url, to, is_bounded=False))
                except MissingError:
                    return None
        return to

    def plan(self, urls: Sequence[str], name: str = "") -> None:
        """Tells all that share the folder what this process reads next, in order. Replaces its last plan of that `name`.

        Who makes room takes what stands in no plan first, longest unused first, then what is used last.
        """
        path = os.path.join(self.folder, "plans", f"{socket.gethostname()}@{os.getpid()}@{name}")
        if not urls:
            return _remove(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with whole_file(path) as file:
            file.write("\n".join(map(_digest, urls)).encode())

    def _download(self, job: _Job) -> None:
        """Brings the file to `job.path`, whose lock is held."""
        for stale in (job.path, *glob.glob(glob.escape(job.path) + ".*.part")):
            _remove(stale)
        part = f"{job.path}.{uuid.uuid4().hex[:8]}.part"

        def transfer() -> None:
            try:
                self._transfer(job, part)
            except BaseException:
                _remove(part)  # at once, so that it takes no room while we wait
                raise

        for is_last in (False, True):
            with_retries(job.url, transfer, self.retries, self.backoff_seconds, job.pause)
            try:
                if job.check is not None:
                    job.check(part)
                return os.replace(part, job.path)
            except Exception as error:
                if is_last:
                    raise
                log.warning("%s came wrong and is fetched once more: %s", job.url, error)
            finally:
                _remove(part)

    def _transfer(self, job: _Job, part: str) -> None:
        """Downloads to `part` once."""
        size, written, reserved = job.size, 0, 0
        with open(part, "wb") as file:
            if job.is_bounded and size:
                self._reserve(job, part, size)
                reserved = size
            with opened(job.url) as (read, said):
                if size is not None and said is not None and size != said:
                    raise ShardError(f"{job.url!r} has {said:,} bytes, {size:,} were indexed: run `pile index {job.url}` again")
                size = said if size is None else size
                while chunk := read(CHUNK):
                    needed = max(size or 0, written + len(chunk))
                    if job.is_bounded and needed > reserved:
                        if size is None:  # it shows as it comes: in steps, each looks at the whole folder
                            needed = max(needed, min(needed + min(CHUNK, self.max_bytes // 16), self.max_bytes))
                        self._reserve(job, part, needed)
                        reserved = needed
                    job.pause(0)
                    file.write(chunk)
                    written += len(chunk)
            file.truncate()  # what was reserved and did not come
            os.fsync(file.fileno())
        if size is not None and written != size:
            raise OSError(f"{written:,} of {size:,} bytes came")

    def _reserve(self, job: _Job, part: str, size: int) -> None:
        """Makes `part` `size` bytes long, and room for it. Waits while other downloads hold all room that could be made."""
        if size > self.max_bytes:
            raise ShardError(
                f"{job.url!r} has {size:,} bytes or more, the whole cache {self.max_bytes:,}: raise data.cache_gigabytes"
            )
        while True:
            with _locked(os.path.join(self.folder, "room.lock")):
                plan = self._next_uses()
                files, taken = self._contents(part)
                soonest = plan.get(_digest(job.url), NEVER) if job.ahead else 0  # place of what may go
                ranked = [(plan.get(Path(path).parent.name, NEVER), used, bytes_, path) for path, bytes_, used in files]
                victims = []
                for place, _, bytes_, path in sorted(ranked, key=lambda file: (-file[0], file[1])):
                    if taken + size <= self.max_bytes or place < soonest:
                        break
                    victims.append(path)
                    taken -= bytes_
                if taken + size <= self.max_bytes and all(map(_evict, victims)):
                    return os.truncate(part, size)
            if job.ahead:
                raise _NoRoomError
            if os.path.getsize(part):  # two that hold room could wait for each other
                raise OSError("other downloads left no room in the cache")
            time.sleep(WAIT_SECONDS)

    def _contents(self, own_part: str) -> tuple[list[tuple[str, int, int]], int]:
        """((path, bytes, last use) of whole files, bytes of all but `own_part`). Removes what dead processes left."""
        files, taken = [], 0
        for folder in glob.glob(os.path.join(glob.escape(self.folder), "[0-9a-f]" * 32)):
            while os.path.isdir(folder):
                with suppress(FileNotFoundError):  # finished, evicted or given up since it was listed: what is there instead?
                    there, under_way = _contents_of(folder, own_part)
                    files += there
                    taken += under_way + sum(bytes_ for _, bytes_, _ in there)
                    break
        return files, taken

    def _next_uses(self) -> dict[str, int]:
        """Hash of a URL -> its first place in any living process's plan."""
        places: dict[str, int] = {}
        for path in glob.glob(os.path.join(glob.escape(self.folder), "plans", "*@*@*")):
            host, process, _ = os.path.basename(path).split("@", 2)
            with suppress(FileNotFoundError):
                is_old = time.time() - os.stat(path).st_mtime > PLAN_SECONDS
                if is_old if host != socket.gethostname() else not _runs(int(process)):
                    os.unlink(path)
                    continue
                for place, digest in enumerate(Path(path).read_text().split()):
                    places[digest] = min(place, places.get(digest, place))
        return places


class Prefetcher:
    """Fetches files in threads before they are needed. Who needs one fetches it all the same: this only makes that fast.

    Args:
        files: (URL, expected size, check) in the order of their next use, cheap to iterate; may be endless and repeat itself.
        ahead: files that are fetched before they are used, counted from the last `advance`.
        horizon: files that are planned, of which those used last make room first.
        threads: downloads at the same time.
    """

    def __init__(self, cache: ShardCache, files: Iterable[Wanted], ahead: int = 8, horizon: int = 64, threads: int = 2) -> None:
        self.cache = cache
        self.ahead = ahead
        self._files = iter(files)
        self._planned: deque[Wanted] = deque()  # from number `_used` on
        self._used = self._next = 0
        self._blocked: int | None = None  # number of a file that found no room: later ones must not take it first
        self._is_full = False  # and nothing has changed since
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._failed = False
        self._plan(max(ahead, horizon))
        self._threads = [threading.Thread(target=self._run, name=f"prefetch-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def advance(self, used: int) -> None:
        """Says that the first `used` files of the order are not needed any more."""
        with self._changed:
            count = min(used - self._used, len(self._planned))
            if count > 0:
                for _ in range(count):
                    self._planned.popleft()
                self._used += count
                self._next = max(self._next, self._used)
                self._plan(count)
            self._is_full = False
            if self._blocked is not None and self._blocked < self._used:
                self._blocked = None
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads. A download under way is given up at its next chunk, and waited for some seconds at most."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)
        self.cache.plan([], name=str(id(self)))

    def _plan(self, count: int) -> None:
        """Plans so many more files."""
        try:
            self._planned.extend(islice(self._files, count))
            self.cache.plan([url for url, _, _ in self._planned], name=str(id(self)))
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        level = logging.DEBUG if self._failed else logging.WARNING
        log.log(level, "a shard could not be fetched ahead; who needs it will try again: %s", error)
        self._failed = True

    def _may_fetch(self) -> bool:
        is_ahead = self._next < self._used + min(self.ahead, len(self._planned))
        return is_ahead and not self._is_full and self._blocked in (None, self._next)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed.is_set() or self._may_fetch())
                if self._closed.is_set():
                    return
                number, self._next = self._next, self._next + 1
                url, size, check = self._planned[number - self._used]
            has_room = True
            try:
                self.cache.fetch(url, size, check, self._closed)
            except _NoRoomError:
                has_room = False
            except Exception as error:
                self._warn(error)
            with self._changed:
                if not has_room and number >= self._used:
                    self._next = self._blocked = number if self._blocked is None else min(number, self._blocked)
                    self._is_full = True
                elif has_room and number == self._blocked:
                    self._blocked = None
                    self._changed.notify_all()


def _digest(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def _contents_of(folder: str, own_part: str) -> tuple[list[tuple[str, int, int]], int]:
    """((path, bytes, last use) of the whole file, bytes of the downloads but `own_part`) in the folder of a URL."""
    files, under_way = [], 0
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".part"):
            with _locked(path.rsplit(".", 2)[0] + ".lock", wait=False) as is_stale:
                if is_stale:
                    os.unlink(path)
                elif path != own_part:
                    under_way += os.stat(path).st_size
        elif not name.endswith((".lock", ".tmp", ".safetensors")):
            about = os.stat(path)
            files.append((path, about.st_size, about.st_mtime_ns))
    return files, under_way


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _evict(path: str) -> bool:
    """Removes a file, unless someone holds its lock, who is fetching it anew."""
    with _locked(path + ".lock", wait=False) as ours:
        if ours:
            _remove(path)
        return ours


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def _locked(path: str, wait: bool = True) -> Iterator[bool]:
    """Holds the lock at `path`; False where another thread, process or host does and `wait` is not set."""
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
