"""Read URLs and the output of commands as streams of bytes: `pipe:<command>`, and every scheme that fsspec knows.

Credentials, endpoints, headers and proxies come from the libraries' own configuration: `AWS_ENDPOINT_URL`, `AWS_PROFILE` etc.
for S3, `HTTPS_PROXY` and `.netrc` for HTTP, `~/.config/fsspec/*.json` for all.
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
TRY_AGAIN = (408, 425, 429)  # HTTP statuses below 500 that are temporary
CANNOT_RUN = (126, 127)  # exit statuses of a shell that finds no such command


class MissingError(ShardError):
    """The server says that the file does not exist, or denies access."""


def is_remote(path: str) -> bool:
    """Whether `path` is a URL (`file://` is not remote) or a `pipe:`."""
    return path.startswith("pipe:") or (not path.startswith("file://") and bool(re.match(r"[A-Za-z][\w+.:-]*://", path)))


def expand_remote(url: str) -> list[str]:
    """The URLs that match the wildcards in `url`, sorted; [url] if it has none. HTTP servers have to list their folders.

    Raises:
        ShardError: the server cannot be reached.
    """
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
    """The result of `action`, which is retried after errors that may be temporary."""
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
                raise ShardError(f"{said}. Lower data.cache_gigabytes below the free space of the disk") from error
            if attempt >= retries:
                raise ShardError(f"{said} (tried {attempt + 1} times). Check the URL, and that the server runs") from error
            log.info("%s; attempt %d of %d", said, attempt + 2, retries + 1)
            pause(backoff_seconds * 2**attempt)
    raise AssertionError


@contextmanager
def opened(url: str) -> Iterator[tuple[Callable[[int], bytes], int | None]]:
    """(read, size): `read(n)` returns up to n of the next bytes of a URL or pipe; size: as the server says."""
    if url.startswith("pipe:"):
        with _piped(url.removeprefix("pipe:")) as read:
            yield read, None
        return
    filesystem, path = _filesystem(url)
    filesystem.invalidate_cache()  # cached listings may be of another version
    if url.startswith("http"):
        # One plain GET: `size` only avoids a HEAD request, which signed URLs refuse.
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

    def given(option: str) -> dict[str, Any]:
        names = {"http": ("http", "https"), "https": ("http", "https"), "s3": ("s3", "s3a"), "s3a": ("s3", "s3a")}[scheme]
        return {key: value for name in names for key, value in fsspec.config.conf.get(name, {}).get(option, {}).items()}

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        # aiohttp would end any download after five minutes, and ignore proxies.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, **given("client_kwargs")}
        options["encoded"] = "%" in url  # quoting a signature again breaks it
    elif scheme in ("s3", "s3a"):  # its retries would multiply with ours and s3fs's
        options["config_kwargs"] = {"retries": {"max_attempts": 0}, **given("config_kwargs")}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        fix = "run `uv sync --extra s3` or `pip install 'pile-app[s3]'`" if scheme in ("s3", "s3a") else f"{error}"
        raise ShardError(f"{url!r} needs a package that is not installed: {fix}") from error
    except ValueError as error:
        raise ShardError(f"{url!r} cannot be read: {error}") from error


@contextmanager
def _piped(command: str) -> Iterator[Callable[[int], bytes]]:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],  # else `curl | gunzip` could fail and look like a short shard
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdout is not None
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
            if process.poll() is None:  # abandoned, or this process ends
                os.killpg(process.pid, signal.SIGKILL)
            output.close()
            process.wait()
