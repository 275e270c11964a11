"""Files of users as bytes, lines and pieces, which are not trusted; and files that are written whole or not at all.

Links are not followed and pipes not opened; lines, files and the windows of decompression are bounded, so that memory is.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pile_app.data.tar import MAX_SAMPLE_BYTES
from pile_app.documents import BadSample

MAX_LINE_BYTES = 1 << 26  # of JSON lines, tables and captions
MAX_JSON_BYTES = 1 << 30  # of a JSON file that is one list
MAX_ZSTD_WINDOW = 1 << 27  # what `zstd --long` needs; `--long=31` would take 2 GiB a process
CUTS = (b"\n\n", b"\n", b" ")  # where a text had best be cut: after a paragraph, a line, a word
MEDIA_FOLDERS = ("", "clips", "images", "audio")  # where files that are named may lie, beside what names them


def extension(file: str) -> str:
    """In small letters; `jsonl.zst` is one."""
    parts = os.path.basename(file).lower().split(".")
    return ".".join(parts[-2:] if parts[-1] in ("gz", "zst") else parts[-1:]) if len(parts) > 1 else ""


def open_plain(path: str) -> BinaryIO:
    """Raises `OSError` for a link, `BadSample` for what is no plain file (a pipe would block for ever)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadSample("ignored_link", f"{path!r} is no plain file")
    return os.fdopen(descriptor, "rb")


def read_file(path: str, limit: int = MAX_SAMPLE_BYTES) -> bytes:
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise BadSample("file_too_large", f"{path!r} has {size:,} bytes; at most {limit:,} are read")
        return file.read(limit)


def decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", str(error)) from error


def file_beside(root: str, path: str, name: str) -> str | None:
    """The plain file of that name beside `path`; None where there is none, or outside the root."""
    for folder in MEDIA_FOLDERS:
        candidate = os.path.normpath(os.path.join(os.path.dirname(path), folder, name))
        with suppress(OSError, ValueError):  # ValueError: a zero byte
            is_plain = stat.S_ISREG(os.lstat(candidate).st_mode)
            if is_plain and Path(os.path.realpath(candidate)).is_relative_to(os.path.realpath(root)):
                return candidate
    return None


def lines_of(file: BinaryIO) -> Iterator[bytes | BadSample]:
    """The lines of a file; a `BadSample` in place of one that is too long, and the end where it is far too long."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        for _ in range(16):
            line = file.readline(MAX_LINE_BYTES)
            if not line or line.endswith(b"\n"):
                break
        else:
            raise BadSample("line_too_long", f"a line is longer than {16 * MAX_LINE_BYTES:,} bytes; what follows is left out")
        yield BadSample("line_too_long", f"the line is longer than {MAX_LINE_BYTES:,} bytes")


def table_lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a table, for `csv`, whose rows end where a line is too long."""
    for line in lines_of(file):
        if isinstance(line, BadSample):
            raise line
        yield line.decode("utf-8-sig", "surrogateescape")


class _Zstandard(io.RawIOBase):
    """Decompresses frame by frame: `zstandard.open` takes a truncated file for a whole one.

    A block of 4 bytes can hold 128 KiB, so 2 KiB of input are at most 64 MiB.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        self._file, self._frame, self._input, self._output = file, None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(2048)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end mark")
                return 0
            frame: Any = self._frame or self._decompressor.decompressobj()
            try:
                self._output = memoryview(frame.decompress(self._input))
            except self._error as error:
                raise OSError(str(error)) from error
            self._input = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    "jsonl": lambda file: file,
    "jsonl.gz": lambda file: gzip.GzipFile(fileobj=file),
    "jsonl.zst": lambda file: io.BufferedReader(_Zstandard(file), 1 << 17),
}


def next_cut(file: BinaryIO, place: int, limit: int) -> int:
    """The first place from `place` on, within `limit` bytes, where a paragraph begins, else a line, a word, a character."""
    if place in (0, os.fstat(file.fileno()).st_size):
        return place
    file.seek(place)
    window = file.read(min(limit, 1 << 16))
    cuts = (at + len(mark) for mark in CUTS if (at := window.find(mark)) >= 0)
    characters = (at for at in range(min(4, len(window))) if window[at] & 0xC0 != 0x80)
    return place + (next(cuts, 0) or next(characters, 0))


def pieces_of(file: BinaryIO, size: int, limit: int) -> Iterator[bytes]:
    """The next `size` bytes in pieces of at most `limit`, each cut after a paragraph, else a line, a word, a character."""
    piece = file.read(min(limit, size))
    size -= len(piece)
    while size > 0:
        cuts = (at + len(mark) for mark in CUTS if (at := piece.rfind(mark, limit // 2)) >= 0)
        characters = (
            at for at in range(len(piece) - 1, len(piece) - 5, -1) if piece[at] & 0xC0 != 0x80
        )  # first bytes, from the end
        cut = next(cuts, 0) or next(characters, 0) or limit
        yield piece[:cut]
        following = file.read(min(cut, size))
        piece, size = piece[cut:] + following, size - len(following) if following else 0
    yield piece


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when it is whole, and not at all where that fails."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb", 1 << 20) as file:
            yield file
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
