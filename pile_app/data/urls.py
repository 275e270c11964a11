"""URLs and commands as streams of bytes: fsspec for `http(s)://`, `s3://` and all else that it knows, `pipe:<command>`.

Credentials, endpoints, headers and proxies are those of the libraries' own configuration: `AWS_ENDPOINT_URL`, `AWS_PROFILE` and
so on for S3, `HTTPS_PROXY` and `.netrc` for HTTP, `~/.config/fsspec/*.json` for all.
"""

from __future__ import annotations

import errno
import glob
import itertools
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pile_app.data.files import ShardError

log = logging.getLogger(__name__)
T = TypeVar("T")

SILENT_SECONDS = 60  # without a byte, after which a server counts as dead
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
TRY_AGAIN = (408, 425, 429)  # HTTP statuses below 500 that pass
CANNOT_RUN = (126, 127)  # exit statuses of a shell that finds no such command


class MissingError(ShardError):
    """The server says that there is no such file, or none for us."""


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

    return sorted(filesystem.unstrip_protocol(one) for one in with_retries(url, ask, 5, 0.5, time.sleep))


def with_retries(
    url: str, action: Callable[[], T], retries: int, backoff_seconds: float, pause: Callable[[float], object]
) -> T:
    """What `action` returns; tried again after errors that may pass."""
    for attempt in itertools.count():
        try:
            return action()
        except ShardError:
            raise
        except Exception as error:
            said = f"{url!r} cannot be fetched: {type(error).__name__}: {error}"
            status = getattr(error, "status", 0)  # aiohttp.ClientResponseError
            if isinstance(error, FileNotFoundError) or status in (404, 410):
                raise MissingError(f"{said}. There is no such file: check the URL") from error
            if isinstance(error, PermissionError) or status in (401, 403):
                raise MissingError(f"{said}. The server refuses: check the credentials and the URL") from error
            if isinstance(error, ValueError | TypeError) or (400 <= status < 500 and status not in TRY_AGAIN):
                raise ShardError(f"{said}. Check the URL") from error
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise ShardError(f"{said}. Lower data.cache_gigabytes below what the disk has room for") from error
            if attempt >= retries:
                raise ShardError(f"{said} (tried {attempt + 1} times). Check the URL, and that the server runs") from error
            log.info("%s; attempt %d of %d", said, attempt + 2, retries + 1)
            pause(backoff_seconds * 2**attempt)
    raise AssertionError


@contextmanager
def opened(url: str) -> Iterator[tuple[Callable[[int], bytes], int | None]]:
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
