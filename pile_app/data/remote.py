"""Remote shards: whole files, fetched ahead of need into a folder of bounded size.

`http(s)://`, `s3://` and whatever else fsspec knows are read through fsspec, `pipe:<command>` from a command's output where
that is switched on. Credentials, endpoints, headers and proxies are those of the libraries' own configuration:
`AWS_ENDPOINT_URL`, `AWS_PROFILE` and so on for S3, `HTTPS_PROXY` and `.netrc` for HTTP, `~/.config/fsspec/*.json` for all.

    <folder>/<hash of the URL>/<name>            the file: there only when it is whole
                               <name>.checksum   of its content as it came; only bounded files have one
                               <name>.<random>.part, <name>.lock
             plans/<host>@<process>@...          what that process reads next, in order
             room.lock                           held while room is made

All that processes and hosts know of each other stands in that folder. Who holds `<name>.lock` downloads; a `.part` whose lock
is free belongs to a process that died. A `.part` has its final size from the start, so it counts before its bytes are there.
Locks are `flock`: the kernel frees them when a process dies, and NFSv4 carries them between hosts. There the bound is late by
the seconds for which NFS remembers sizes. A file that a process holds open frees its disk when that process closes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pile_app.data.shards import ShardError

log = logging.getLogger(__name__)

Check = Callable[[str], None]  # raises where the file at that path is not the one that was indexed
Wanted = tuple[str, int | None, Check | None]  # URL, expected size, check
CHUNK = 16 << 20  # bytes of a read, and of a ranged request to S3
PLAN_SECONDS = 3600  # after which the plan of a process on another host counts no more: it may be dead
SILENT_SECONDS = 60  # without a byte, after which a server counts as dead
WAIT_SECONDS = 0.1  # between looks for room
NEVER = 1 << 62  # place of what stands in no plan
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
TRY_AGAIN = (408, 425, 429)  # HTTP statuses below 500 that pass
CANNOT_RUN = (126, 127)  # exit statuses of a shell that finds no such command


class _Missing(ShardError):
    """The server says that there is no such file, or none for us."""


class _NoRoom(Exception):
    """What is fetched ahead would take the place of what is needed sooner, or is not wanted any more."""


def is_remote(path: str) -> bool:
    """Whether `path` is a URL (`file://` is not remote) or a `pipe:`."""
    return path.startswith("pipe:") or (not path.startswith("file://") and bool(re.match(r"[A-Za-z][\w+.:-]*://", path)))


def expand_remote(url: str) -> list[str]:
    """URLs that match the wildcards in `url`, sorted; [url] where it has none. HTTP servers have to list their folders.

    Raises:
        ShardError: the server cannot be asked.
    """
    scheme, _, rest = url.partition("://")
    place = rest.partition("/")[2]  # without the host, which may be [::1]
    if scheme.startswith("http"):
        place = place.replace("?", "")  # begins a query there
    if url.startswith("pipe:") or not glob.has_magic(place):
        return [url]
    filesystem, path = _filesystem(url)

    def ask() -> list[str]:
        found = filesystem.glob(path)
        if not found:  # glob takes a dead server for an empty folder
            filesystem.ls(re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0])
        return found

    return sorted(filesystem.unstrip_protocol(one) for one in _with_retries(url, ask, 5, 0.5, time.sleep))


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
            raise _NoRoom


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

    def fetch(self, url: str, expected_size: int | None = None, check: Check | None = None) -> str:
        """Path of a whole local copy, which is downloaded where it is missing, by one of all that ask at the same time.

        Another process may evict it before the caller opens it; `open` knows of that.

        Args:
            expected_size: bytes; a copy of another size is fetched anew.
            check: is given the path of a new copy before others see it. If it raises, the copy is fetched once more.

        Raises:
            ShardError: naming the URL, what happened last and what to do.
            Exception: what `check` raised the second time.
        """
        return self._fetch(_Job(url, self.path(url), expected_size, check))

    def open(self, url: str, expected_size: int | None = None, check: Check | None = None) -> int:
        """A file descriptor, for reading, of what `fetch` gives. The caller closes it."""
        while True:
            with suppress(FileNotFoundError):  # evicted in between
                return os.open(self.fetch(url, expected_size, check), os.O_RDONLY)

    def fetch_small(self, url: str, to: str | None = None) -> str | None:
        """Path of a small file beside a shard, such as its index; None where the server has none. It is never evicted.

        Args:
            to: where it should lie, if not at `path(url)`.

        Raises:
            ShardError: as `fetch`; not for 404 and 403, which S3 answers for a missing file to who may not list.
        """
        if url.startswith("pipe:") or (url.startswith("http") and "?" in url):
            return None  # a query is the shard's own, such as a signature
        path = to or self.path(url)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _locked(path + ".lock"):
            if not os.path.exists(path):
                try:
                    self._download(_Job(url, path, is_bounded=False))
                except _Missing:
                    return None
        return path

    def plan(self, urls: Sequence[str], name: str = "") -> None:
        """Tells all that share the folder what this process reads next, in order. Replaces its last plan of that `name`.

        Who makes room takes what stands in no plan first, longest unused first, then what is used last.
        """
        folder = os.path.join(self.folder, "plans")
        path = os.path.join(folder, f"{socket.gethostname()}@{os.getpid()}@{name}")
        if not urls:
            return _remove(path)
        os.makedirs(folder, exist_ok=True)
        _write(path, "\n".join(_digest(url) for url in urls))

    def verify(self, url: str) -> None:
        """Raises ShardError where the copy of `url` is missing, or its content is not what was downloaded."""
        path = self.path(url)
        try:
            recorded = Path(path + ".checksum").read_text().strip()
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, _hash).hexdigest()
        except FileNotFoundError as error:
            raise ShardError(f"{url!r} is not in the cache ({error})") from error
        if found != recorded:
            raise ShardError(f"the copy of {url!r} is damaged: its checksum is {found}, not {recorded}. Delete {path!r}")

    def _fetch(self, job: _Job) -> str:
        if job.url.startswith("pipe:") and not self.allow_pipe:
            raise ShardError(f"{job.url!r} would run a command: set data.allow_pipe: true if you trust who wrote it")
        if not job.is_done():
            os.makedirs(os.path.dirname(job.path), exist_ok=True)
            with _locked(job.path + ".lock", wait=job.ahead is None) as ours:
                if ours and not job.is_done():
                    self._download(job)
        return job.path

    def _download(self, job: _Job) -> None:
        """Brings the file to `job.path`, whose lock is held."""
        for stale in (job.path, *glob.glob(glob.escape(job.path) + ".*.part")):
            _remove(stale)
        part = f"{job.path}.{uuid.uuid4().hex[:8]}.part"

        def transfer() -> str:
            try:
                return self._transfer(job, part)
            except BaseException:
                _remove(part)  # at once, so that it takes no room while we wait
                raise

        for is_last in (False, True):
            checksum = _with_retries(job.url, transfer, self.retries, self.backoff_seconds, job.pause)
            try:
                if job.check is not None:
                    job.check(part)
                if job.is_bounded:
                    _write(job.path + ".checksum", checksum)  # first: a file without one would never be evicted
                return os.replace(part, job.path)
            except Exception as error:
                if is_last:
                    raise
                log.warning("%s came wrong and is fetched once more: %s", job.url, error)
            finally:
                _remove(part)

    def _transfer(self, job: _Job, part: str) -> str:
        """Downloads to `part` once; checksum of what came."""
        size, written, reserved, checksum = job.size, 0, 0, _hash()
        with open(part, "wb") as file:
            if job.is_bounded and size:
                self._reserve(job, part, size)
                reserved = size
            with _opened(job.url) as (read, said):
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
                    checksum.update(chunk)
                    written += len(chunk)
            file.truncate()  # what was reserved and did not come
            os.fsync(file.fileno())
        if size is not None and written != size:
            raise OSError(f"{written:,} of {size:,} bytes came")
        return checksum.hexdigest()

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
                taken += sum(bytes_ for _, bytes_, _ in files)
                places = {path: plan.get(os.path.basename(os.path.dirname(path)), NEVER) for path, _, _ in files}
                soonest = plan.get(_digest(job.url), NEVER) if job.ahead else 0  # place of what may go
                victims = []
                for path, bytes_, _ in sorted(files, key=lambda file: (-places[file[0]], file[2])):
                    if taken + size <= self.max_bytes or places[path] < soonest:
                        break
                    victims.append(path)
                    taken -= bytes_
                if taken + size <= self.max_bytes and all(_evict(path) for path in victims):
                    return os.truncate(part, size)
            if job.ahead:
                raise _NoRoom
            if os.path.getsize(part):  # two that hold room could wait for each other
                raise OSError("other downloads left no room in the cache")
            time.sleep(WAIT_SECONDS)

    def _contents(self, own_part: str) -> tuple[list[tuple[str, int, int]], int]:
        """((path, bytes, last use) of bounded files, bytes of downloads but `own_part`). Removes what dead processes left."""
        files, under_way = [], 0
        for folder in glob.glob(os.path.join(glob.escape(self.folder), "[0-9a-f]" * 32)):
            while os.path.isdir(folder):
                try:
                    files_there, under_way_there = _contents_of(folder, own_part)
                except FileNotFoundError:  # finished, evicted or given up since it was listed: what is there instead?
                    continue
                files += files_there
                under_way += under_way_there
                break
        return files, under_way

    def _next_uses(self) -> dict[str, int]:
        """Hash of a URL -> its first place in any living process's plan."""
        places: dict[str, int] = {}
        for path in glob.glob(os.path.join(glob.escape(self.folder), "plans", "*")):
            with suppress(FileNotFoundError):
                host, process, _ = os.path.basename(path).split("@", 2)
                is_dead = time.time() - os.stat(path).st_mtime > PLAN_SECONDS
                if host == socket.gethostname():
                    is_dead = not _runs(int(process))
                if is_dead:
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

    def __init__(
        self,
        cache: ShardCache,
        files: Iterable[Wanted],
        ahead: int = 8,
        horizon: int = 64,
        threads: int = 2,
    ) -> None:
        self.cache = cache
        self.ahead = ahead
        self.horizon = max(ahead, horizon)
        self._files = iter(files)
        self._pulled: deque[Wanted] = deque()  # from number `_first` on
        self._first = self._next = self._used = 0
        self._blocked: int | None = None  # number of a file that found no room: later ones must not take it first
        self._changes = 0
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._failed = False
        self._threads = [threading.Thread(target=self._run, name=f"prefetch-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def advance(self, used: int) -> None:
        """Says that the first `used` files of the order are not needed any more."""
        with self._changed:
            self._used = max(self._used, used)
            self._change()

    def close(self) -> None:
        """Ends the threads. A download under way is given up at its next chunk, and waited for some seconds at most."""
        self._closed.set()
        with self._changed:
            self._change()
        for thread in self._threads:
            thread.join(timeout=5)
        self.cache.plan([], name=str(id(self)))

    def _change(self) -> None:
        self._changes += 1
        self._changed.notify_all()

    def _run(self) -> None:
        while not self._closed.is_set():
            seen = self._changes  # before the attempt: none must be missed
            number = -1
            try:
                taken = self._take()
                if taken is not None:
                    number, (url, size, check) = taken
                    self.cache._fetch(_Job(url, self.cache.path(url), size, check, self._closed))
            except _NoRoom:
                with self._changed:
                    self._blocked = self._next = min(self._next, number)
                number = -1
            except Exception as error:
                level = logging.DEBUG if self._failed else logging.WARNING
                log.log(level, "a shard could not be fetched ahead; who needs it will try again: %s", error)
                self._failed = True
            with self._changed:
                if number >= 0:
                    if number == self._blocked:
                        self._blocked = None
                        self._change()
                    continue
                self._changed.wait_for(lambda: self._closed.is_set() or self._changes != seen)  # noqa: B023 (called at once)

    def _take(self) -> tuple[int, Wanted] | None:
        """(number, file) of the next one to fetch; None where all that may be ahead is, or under way."""
        with self._changed:
            before = self._first, len(self._pulled)
            while self._first < self._used and (self._pulled or self._pull()):
                self._pulled.popleft()
                self._first += 1
            while len(self._pulled) < self.horizon and self._pull():
                pass
            if before != (self._first, len(self._pulled)):
                self.cache.plan([url for url, _, _ in self._pulled], name=str(id(self)))
            self._next = max(self._next, self._first)
            if self._blocked is not None and self._blocked < self._first:
                self._blocked = None
            if self._blocked not in (None, self._next) or self._next >= self._first + min(self.ahead, len(self._pulled)):
                return None
            self._next += 1
            return self._next - 1, self._pulled[self._next - 1 - self._first]

    def _pull(self) -> bool:
        for file in self._files:
            self._pulled.append(file)
            return True
        return False


def _digest(url: str) -> str:
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def _hash() -> Any:
    return hashlib.blake2b(digest_size=32)


def _evict(path: str) -> bool:
    """Removes a file, unless someone holds its lock, who is fetching it anew."""
    with _locked(path + ".lock", wait=False) as ours:
        if ours:
            _remove(path)
            _remove(path + ".checksum")
        return ours


def _contents_of(folder: str, own_part: str) -> tuple[list[tuple[str, int, int]], int]:
    files, under_way, names = [], 0, set(os.listdir(folder))
    for name in names:
        path = os.path.join(folder, name)
        if name + ".checksum" in names:
            stat = os.stat(path)
            files.append((path, stat.st_size, stat.st_mtime_ns))
        elif name.endswith(".part") and path != own_part:
            size = os.stat(path).st_size
            with _locked(path.rsplit(".", 2)[0] + ".lock", wait=False) as is_stale:
                if is_stale:
                    os.unlink(path)
                else:
                    under_way += size
    return files, under_way


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _write(path: str, text: str) -> None:
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        Path(temporary).write_text(text)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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


def _with_retries(
    url: str, action: Callable[[], Any], retries: int, backoff_seconds: float, pause: Callable[[float], object]
) -> Any:
    """What `action` returns; tried again after errors that may pass."""
    for attempt in itertools.count():
        try:
            return action()
        except (ShardError, _NoRoom):
            raise
        except Exception as error:
            said = f"{url!r} cannot be fetched: {type(error).__name__}: {error}"
            status = getattr(error, "status", 0)  # aiohttp.ClientResponseError
            if isinstance(error, FileNotFoundError) or status in (404, 410):
                raise _Missing(f"{said}. There is no such file: check the URL") from error
            if isinstance(error, PermissionError) or status in (401, 403):
                raise _Missing(f"{said}. The server refuses: check the credentials and the URL") from error
            if isinstance(error, ValueError | TypeError) or (400 <= status < 500 and status not in TRY_AGAIN):
                raise ShardError(f"{said}. Check the URL") from error
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise ShardError(f"{said}. Lower data.cache_gigabytes below what the disk has room for") from error
            if attempt >= retries:
                raise ShardError(f"{said} (tried {attempt + 1} times). Check the URL, and that the server runs") from error
            log.info("%s; attempt %d of %d", said, attempt + 2, retries + 1)
            pause(backoff_seconds * 2**attempt)


def _filesystem(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it)."""
    import fsspec

    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        # aiohttp would end any download after five minutes, and ignore proxies.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        given = {**fsspec.config.conf.get("http", {}), **fsspec.config.conf.get("https", {})}
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, **given.get("client_kwargs", {})}
        options["encoded"] = "%" in url  # a signature breaks when it is quoted anew
    elif scheme in ("s3", "s3a"):
        # Its retries would multiply with ours and s3fs's.
        given = {**fsspec.config.conf.get("s3", {}), **fsspec.config.conf.get("s3a", {})}
        options["config_kwargs"] = {"retries": {"max_attempts": 0}, **given.get("config_kwargs", {})}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        mend = "run `uv sync --extra s3` or `pip install 'pile-app[s3]'`" if scheme in ("s3", "s3a") else f"{error}"
        raise ShardError(f"{url!r} needs a package that is not installed: {mend}") from error
    except ValueError as error:
        raise ShardError(f"{url!r} cannot be read: {error}") from error


@contextmanager
def _opened(url: str) -> Iterator[tuple[Callable[[int], bytes], int | None]]:
    """(reads up to so many of the next bytes, size that the server says) of a URL or pipe."""
    if url.startswith("pipe:"):
        with _piped(url.removeprefix("pipe:")) as read:
            yield read, None
        return
    filesystem, path = _filesystem(url)
    filesystem.invalidate_cache()  # what it remembers of listings may be of another version
    if url.startswith("http"):
        # One GET, as plain as possible: `size` only spares a HEAD, which signed URLs refuse.
        headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        with filesystem.open(path, "rb", block_size=0, size=1, headers=headers) as file:
            length = None if "Content-Encoding" in file.r.headers else file.r.headers.get("Content-Length")
            yield file.read, None if length is None else int(length)
        return
    with filesystem.open(path, "rb", cache_type="none") as file:  # S3: ranges, all of the version that was first seen
        size = getattr(file, "size", None)
        yield file.read, size if isinstance(size, int) else None


@contextmanager
def _piped(command: str) -> Iterator[Callable[[int], bytes]]:
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],  # else `curl | gunzip` could fail and look like a short shard
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        assert process.stdout is not None

        def read(size: int) -> bytes:
            chunk = process.stdout.read1(size)  # type: ignore[union-attr]
            if not chunk and process.wait():
                complaints.seek(-min(1000, complaints.seek(0, os.SEEK_END)), os.SEEK_END)
                said = complaints.read().decode(errors="replace").strip()
                error = ValueError if process.returncode in CANNOT_RUN else OSError
                raise error(f"the command ended with exit status {process.returncode}: {said or 'it said nothing'}")
            return chunk

        try:
            yield read
        finally:
            if process.poll() is None:  # given up, or we are told to end
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
