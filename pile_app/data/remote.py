"""Remote shards: whole files in a folder of limited size, `<folder>/<hash of the URL>/<name>`, fetched before they are needed.

Processes and hosts share no other state. The holder of `<name>.lock` downloads to a `.part`, which has its final size from the
start to reserve the space (`room.lock` is held meanwhile); if the lock is free, its process died. Readers hold a shared `flock`
on files that are open or needed next, which protects them from eviction, and which the kernel releases when a process dies."""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import logging
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

from pile_app.data.files import LOCK_EX, LOCK_NB, LOCK_SH, ShardError, flock, locked, release

log = logging.getLogger(__name__)
T = TypeVar("T")

Check = Callable[[str], None]  # raises if the file at a path is not the indexed file
CHUNK = 16 << 20  # bytes of a read, and of a ranged request to S3
WAIT_SECONDS = 0.1  # between attempts to reserve space
STUCK_SECONDS = 60  # until a file that is needed now replaces files in use
SILENT_SECONDS = 60  # timeout for a connection, and for the next byte
TEMPORARY = (408, 425, 429)  # HTTP statuses below 500 that are retried
CANNOT_RUN = (126, 127)  # exit statuses of a shell that finds no such command


class Wanted(NamedTuple):
    url: str
    size: int | None = None
    check: Check | None = None


class Ahead(NamedTuple):
    """Of a file that is fetched ahead: do not wait for room or other processes, and end when `stop` is set; call `has_room` as
    soon as room is reserved."""

    stop: Event
    has_room: Callable[[], None]


class _Later(ShardError):
    """A prefetched file is being fetched by another process, has no room yet, or is no longer wanted."""


class _NoRoom(_Later):
    pass


class ShardCache:
    """Keep local copies of remote files, shared by all processes that use the same folder, and delete the least recently used.
    `max_bytes` limits the whole folder. It has no handles and no state, so it may be pickled and used by threads."""

    def __init__(
        self, folder: str | Path, max_bytes: int, allow_pipe: bool = False, retries: int = 5, backoff_seconds: float = 0.5
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"data.cache_gigabytes must be above 0, not {max_bytes / 1e9:g}")
        self.folder, self.max_bytes, self.allow_pipe = os.path.abspath(folder), max_bytes, allow_pipe
        self.retries, self.backoff_seconds = retries, backoff_seconds
        self.room = os.path.join(self.folder, "room.lock")

    def path(self, url: str) -> str:
        """Return the path of the copy of `url`."""
        path = url.partition("?")[0].partition("#")[0] if url.startswith("http") else url
        name = re.sub(r"[^\w.,=+-]+", "_", path.rpartition("/")[2], flags=re.ASCII)[-100:].strip(".")
        return os.path.join(self.folder, hashlib.blake2b(url.encode(), digest_size=16).hexdigest(), name or "shard")

    def fetch(self, url: str, size: int | None = None, check: Check | None = None) -> str:
        """Return the path of a whole local copy; it may be evicted later."""
        release(self.open(url, size, check))
        return self.path(url)

    def open(self, url: str, size: int | None = None, check: Check | None = None, ahead: Ahead | None = None) -> int:
        """Open a whole local copy for reading, downloaded by one process at most: a descriptor, which protects it from eviction
        until closed.

        A copy of another `size` is replaced, and a new copy for which `check` raises is fetched once more."""
        if url.startswith("pipe:") and not self.allow_pipe:
            raise ShardError(f"{url!r} would run a command: set data.allow_pipe: true if you trust its author")
        path = self.path(url)
        if (descriptor := _open_whole(path, size)) is None:
            with locked(path + ".lock", wait=ahead is None) as ours:
                if not ours:
                    raise _Later(f"{url!r} is being fetched by another process")
                if (descriptor := _open_whole(path, size)) is None:
                    descriptor = self._download(Wanted(url, size, check), path, ahead)
        return descriptor

    def fetch_small(self, url: str, to: str) -> str | None:
        """Fetch a small file, such as a manifest, to the path `to`; None for 404, and for 403 as S3 answers without listing."""
        if url.startswith("pipe:") or (url.startswith("http") and "?" in url):
            return None  # a query, such as a signature, is valid for the shard only
        with locked(to + ".lock"), suppress(MissingError):
            if not os.path.exists(to):
                release(self._download(Wanted(url), to, None))
            return to
        return None

    def _download(self, wanted: Wanted, path: str, ahead: Ahead | None) -> int:
        """Fetch a file to `path`, whose `.lock` is held, and return it open: it must be protected before others can see it."""
        for stale in (path, *glob.glob(glob.escape(path) + ".*.part")):
            Path(stale).unlink(missing_ok=True)
        part, stop = Path(f"{path}.{uuid.uuid4().hex[:8]}.part"), ahead.stop if ahead else Event()

        def pause(seconds: float) -> None:
            if stop.wait(seconds):
                raise _Later(f"{wanted.url!r} is no longer wanted")

        def transfer() -> None:
            try:
                self._transfer(wanted, str(part), pause, ahead)
            except BaseException:
                part.unlink(missing_ok=True)  # it must take no space during the pause
                raise

        for is_last in (False, True):
            with_retries(wanted.url, transfer, self.retries, self.backoff_seconds, pause)
            try:
                if wanted.check is not None:
                    wanted.check(str(part))
                descriptor = _open_in_use(part)
                with locked(self.room):
                    os.replace(part, path)
                return descriptor
            except Exception as error:
                if is_last:
                    raise
                log.warning("%s is damaged and is fetched once more: %s", wanted.url, error)
            finally:
                part.unlink(missing_ok=True)
        raise AssertionError

    def _transfer(self, wanted: Wanted, part: str, pause: Callable[[float], None], ahead: Ahead | None) -> None:
        """Download to `part` once."""
        (url, size, _), written = wanted, 0
        open(part, "wb").close()
        now = ahead is None
        reserved = self._reserve(url, part, size, now) if size else 0
        if ahead:
            ahead.has_room()
        with open(part, "r+b") as file, opened(url) as (read, said):
            if None not in (size, said) and size != said:
                raise ShardError(f"{url!r} has {said:,} bytes, {size:,} were indexed: run `pile index {url}` again")
            size = said if size is None else size
            while chunk := read(CHUNK):
                needed = max(size or 0, written + len(chunk))
                if needed > reserved:  # of unknown size: in steps, since each scans the whole folder
                    step = 0 if size else min(CHUNK, self.max_bytes // 16)
                    reserved = self._reserve(url, part, max(needed, min(needed + step, self.max_bytes)), now)
                pause(0)
                file.write(chunk)
                written += len(chunk)
            file.truncate()  # to the bytes that arrived
            os.fsync(file.fileno())
        if size is not None and written != size:
            raise OSError(f"{written:,} of {size:,} bytes came")

    def _reserve(self, url: str, part: str, size: int, now: bool) -> int:
        """Make room for `part` and extend it to `size` bytes. now: wait while files in use and downloads take all room."""
        if size > self.max_bytes:
            raise ShardError(f"{url!r} has {size:,} bytes or more, the cache {self.max_bytes:,}: raise data.cache_gigabytes")
        began = time.monotonic()
        while True:
            with locked(self.room):
                if self._evict(size, part, time.monotonic() - began > STUCK_SECONDS):
                    os.truncate(part, size)
                    return size
            if not now:
                raise _NoRoom(f"no room for {url!r}")
            if os.path.getsize(part):  # two downloads that hold space could wait for each other
                raise OSError("other downloads left no room in the cache")
            time.sleep(WAIT_SECONDS)

    def _evict(self, size: int, own: str, is_stuck: bool) -> bool:
        """Delete copies until there is room for `size` bytes in addition to the file `own`; False if there is not."""
        copies, taken = [], 0
        for folder, _, names in os.walk(self.folder):
            for path in {os.path.join(folder, name) for name in names} - {own}:
                with suppress(FileNotFoundError):
                    about = os.stat(path)
                    if path.endswith(".part"):
                        with locked(path.rsplit(".", 2)[0] + ".lock", wait=False) as is_abandoned:
                            if is_abandoned:
                                os.unlink(path)
                                continue
                    taken += about.st_size
                    if len(Path(folder).name) == 32 and not path.endswith((".part", ".lock", ".tmp")):
                        copies.append((about.st_mtime_ns, about.st_size, path))
        for _, bytes_, path in sorted(copies):
            if taken + size > self.max_bytes and _delete_unused(path, is_stuck):
                taken -= bytes_
        return taken + size <= self.max_bytes


class Prefetcher:
    """Fetch files in threads before they are needed: an optimization, as readers fetch missing files themselves.

    files: (position after which it is not needed, file) in the order of first use; ahead: how many are fetched and kept."""

    def __init__(self, cache: ShardCache, files: Iterable[tuple[float, Wanted]], ahead: int = 16, threads: int = 2) -> None:
        self.cache, self.ahead, self._files = cache, ahead, enumerate(files)
        self._kept: list[tuple[int, float, int]] = []  # (number of the file, position, open descriptor)
        self._busy, self._waiting = set[int](), set[int]()  # numbers of files that are fetched; of those without room yet
        self._changed, self._closed, self._warned, self._position = threading.Condition(), Event(), False, float("-inf")
        self._threads = [threading.Thread(target=self._run, name=f"prefetch-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def advance(self, position: float) -> None:
        """Release the files that are not needed from `position` on."""
        with self._changed:
            self._position = position
            self._release(lambda number, end: end <= position)

    def _release(self, is_unneeded: Callable[[int, float], bool]) -> None:
        for kept in [kept for kept in self._kept if is_unneeded(*kept[:2])]:
            release(kept[2])
            self._kept.remove(kept)
        self._changed.notify_all()

    def close(self) -> None:
        """End the threads, and their downloads at the next chunk; wait for a few seconds at most."""
        self._closed.set()
        self.advance(float("inf"))
        for thread in self._threads:
            thread.join(timeout=5)
        self.advance(float("inf"))

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        self._changed.wait_for(lambda: self._closed.is_set() or condition())
        return not self._closed.is_set()

    def _run(self) -> None:
        while True:
            with self._changed:
                has_room = self._wait_for(lambda: not self._waiting and len(self._busy) + len(self._kept) < self.ahead)
                number, file = next(self._files, (0, None)) if has_room else (0, None)
                if file is None:
                    return
                self._busy.add(number)
                self._waiting.add(number)  # so that no later file takes its room
            descriptor = self._open(number, file[1])
            with self._changed:
                self._busy.remove(number)
                self._waiting.discard(number)
                if descriptor is not None:
                    self._kept.append((number, file[0], descriptor))
                self.advance(self._position)  # which may have passed the file while it was fetched

    def _has_room(self, number: int) -> None:
        with self._changed:
            self._waiting.discard(number)
            self._changed.notify_all()

    def _open(self, number: int, file: Wanted) -> int | None:
        while not self._closed.is_set():
            try:
                return self.cache.open(*file, ahead=Ahead(self._closed, partial(self._has_room, number)))
            except _Later as error:
                with self._changed:
                    self._waiting.add(number)
                    if isinstance(error, _NoRoom):  # files that are needed later must not take the room
                        self._release(lambda kept, _: kept > number)
                    if self._wait_for(lambda: number == min(self._waiting)):
                        self._changed.wait(WAIT_SECONDS)
            except Exception as error:
                level = logging.DEBUG if self._warned else logging.WARNING
                log.log(level, "a shard could not be fetched ahead; its reader will try again: %s", error)
                self._warned = True
                break
        return None


def _open_in_use(path: str | Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    flock(descriptor, LOCK_SH)
    return descriptor


def _open_whole(path: str, size: int | None) -> int | None:
    """Open a copy of that size and mark it as recently used; None if there is none, or if it was evicted meanwhile."""
    try:
        with suppress(PermissionError):  # another user's
            os.utime(path)
        descriptor = _open_in_use(path)
    except FileNotFoundError:
        return None
    about = os.fstat(descriptor)
    if about.st_nlink and size in (None, about.st_size):
        return descriptor
    release(descriptor)
    return None


def _delete_unused(path: str, is_stuck: bool) -> bool:
    """Delete a copy unless it is in use or being replaced."""
    try:
        with suppress(FileNotFoundError), open(path, "r+b") as file:
            flock(file, LOCK_EX | LOCK_NB)
    except PermissionError:  # another user's
        return False
    except BlockingIOError:
        if not is_stuck:
            return False
        log.warning("the cache holds less than is read at the same time: raise data.cache_gigabytes")
    Path(path).unlink(missing_ok=True)
    return True


# -- URLs and the output of commands as streams of bytes. Credentials, endpoints and proxies come from the environment
# (`AWS_ENDPOINT_URL`, `HTTPS_PROXY`), `.netrc` and `~/.config/fsspec/*.json`.


class MissingError(ShardError):
    """The file does not exist, or the server denies access."""


def is_remote(path: str) -> bool:
    """Tell whether `path` is a URL, except `file://`, or a `pipe:`."""
    return path.startswith("pipe:") or (not path.startswith("file://") and bool(re.match(r"[A-Za-z][\w+.:-]*://", path)))


def expand_remote(url: str) -> list[str]:
    """List the URLs that match the wildcards in `url`, sorted; HTTP servers have to list their folders."""
    scheme, _, rest = url.partition("://")
    path = rest.partition("/")[2]  # without the host, which may be [::1]
    if url.startswith("pipe:") or not glob.has_magic(path.replace("?", "") if scheme.startswith("http") else path):
        return [url]  # in HTTP, `?` begins a query
    filesystem, path = _filesystem(url)

    def ask() -> list[str]:
        found = filesystem.glob(path)
        if not found:  # glob takes a dead server for an empty folder
            filesystem.ls(re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0])
        return found

    return sorted(filesystem.unstrip_protocol(name) for name in with_retries(url, ask, 5, 0.5, time.sleep))


def with_retries(
    url: str, action: Callable[[], T], retries: int, backoff_seconds: float, pause: Callable[[float], object]
) -> T:
    """Return the result of `action`, retried after errors that may be temporary; raise ShardError with the fix otherwise."""
    for attempt in itertools.count(1):
        try:
            return action()
        except ShardError:
            raise
        except Exception as error:
            said = f"{url!r} cannot be fetched: {type(error).__name__}: {error}"
            status = getattr(error, "status", 0)  # of aiohttp
            if "Credential" in type(error).__name__:  # of botocore, whose classes are not known here
                raise ShardError(f"{said}. Set the credentials: AWS_ACCESS_KEY_ID and so on") from error
            if isinstance(error, FileNotFoundError | PermissionError) or status in (401, 403, 404, 410):
                raise MissingError(f"{said}. No such file, or no access: check the URL and the credentials") from error
            if isinstance(error, ValueError | TypeError) or (400 <= status < 500 and status not in TEMPORARY):
                raise ShardError(f"{said}. Check the URL") from error
            if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):
                raise ShardError(f"{said}. Lower data.cache_gigabytes below the free space of the disk") from error
            if attempt > retries:
                raise ShardError(f"{said} (tried {attempt} times). Check the URL, and that the server runs") from error
            log.info("%s; attempt %d of %d", said, attempt + 1, retries + 1)
            pause(backoff_seconds * 2 ** (attempt - 1))
    raise AssertionError


@contextmanager
def opened(url: str) -> Iterator[tuple[Callable[[int], bytes], int | None]]:
    """Open a URL or pipe as (read, size): `read(n)` returns up to n of the next bytes; size: as the server says."""
    if url.startswith("pipe:"):
        with _piped(url.removeprefix("pipe:")) as read:
            yield read, None
        return
    filesystem, path = _filesystem(url)
    filesystem.invalidate_cache()  # listings may be outdated
    options: dict[str, Any] = {"cache_type": "none"}  # S3: ranges of one version
    if url.startswith("http"):  # a plain GET: `size` only avoids a HEAD request, which signed URLs refuse
        headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        options = {"block_size": 0, "size": 1, "headers": headers}
    with filesystem.open(path, "rb", **options) as file:
        size = getattr(file, "size", None)
        if url.startswith("http"):
            size = None if "Content-Encoding" in file.r.headers else file.r.headers.get("Content-Length")
        yield file.read, None if size is None else int(size)


def _filesystem(url: str) -> tuple[Any, str]:
    """Return (fsspec filesystem, path in it)."""
    import fsspec

    scheme, options = url.partition("://")[0], dict[str, Any]()
    is_s3 = scheme in ("s3", "s3a")

    def merged(option: str, defaults: dict[str, Any], *names: str) -> dict[str, Any]:  # options replace the configuration's
        given = [fsspec.config.conf.get(name, {}).get(option, {}) for name in names]
        return {option: defaults | given[0] | given[1]}

    if is_s3:  # its retries would multiply with ours
        options = merged("config_kwargs", {"retries": {"max_attempts": 0}}, "s3", "s3a")
    elif scheme in ("http", "https"):  # aiohttp would end any download after five minutes, and ignore proxies
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        options = merged("client_kwargs", {"timeout": timeout, "trust_env": True}, "http", "https")
        options["encoded"] = "%" in url  # quoting a signature again breaks it
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        fix = "pip install s3fs" if is_s3 else f"{error}"
        raise ShardError(f"{url!r} needs a package that is not installed: {fix}") from error
    except ValueError as error:
        raise ShardError(f"{url!r} cannot be read: {error}") from error


@contextmanager
def _piped(command: str) -> Iterator[Callable[[int], bytes]]:
    """Run a shell command and return a function that reads its output; kill the command at the end."""
    shell = ["bash", "-o", "pipefail", "-c", command]  # else `curl | gunzip` could fail and look like a short shard
    with tempfile.TemporaryFile() as errors:
        options: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors, "start_new_session": True}
        process = subprocess.Popen(shell, **options)
        output: Any = process.stdout

        def read(size: int) -> bytes:
            chunk = output.read1(size)
            if not chunk and process.wait():
                errors.seek(-min(1000, errors.seek(0, os.SEEK_END)), os.SEEK_END)
                said = errors.read().decode(errors="replace").strip()
                error = ValueError if process.returncode in CANNOT_RUN else OSError
                raise error(f"the command ended with exit status {process.returncode}: {said or 'without a message'}")
            return bytes(chunk)

        try:
            yield read
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            output.close()
            process.wait()
