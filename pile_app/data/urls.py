"""Read URLs and the output of commands as streams of bytes: `pipe:<command>`, and every scheme that fsspec knows.

Credentials, endpoints and proxies come from the environment (`AWS_ENDPOINT_URL`, `HTTPS_PROXY`), `.netrc` and
`~/.config/fsspec/*.json`.
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

SILENT_SECONDS = 60  # timeout for a connection, and for the next byte
TEMPORARY = (408, 425, 429)  # HTTP statuses below 500 that are retried
CANNOT_RUN = (126, 127)  # exit statuses of a shell that finds no such command


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
