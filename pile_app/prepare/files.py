"""List and read the files of an untrusted input: names, bytes, lines and pieces of text, all bounded; unpack archives.

Links are only followed on request, within a given folder; devices and pipes are never opened. A name in a table reaches a file
only through `Tree.resolve`, so never a file outside the input."""

from __future__ import annotations

import bz2
import codecs
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from pile_app.data.tar import is_hidden
from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, UNREADABLE_EXTENSIONS, BadSample

MAX_FILE_BYTES = 1 << 30  # of a medium, or of JSON that is one value
MAX_LINE_BYTES = 1 << 26  # of JSON lines, rows of tables and captions
MAX_WINDOW = 1 << 27  # what `zstd --long` and `xz -9` need; `--long=31` would take 2 GiB a process
MAX_ARCHIVE = (1 << 30, 100, 10_000_000)  # unpacked: at most this many bytes or times its size, and files
MAX_AROUND = 200_000  # files around a table that is the input
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
COMPRESSIONS = ("gz", "zst", "bz2", "xz")
CUTS = (b"\n\n", b"\n", b" ")  # where a text is best cut: after a paragraph, a line, a word
MEDIA = frozenset((*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS, *UNREADABLE_EXTENSIONS))
DAMAGE = (
    EOFError, OSError, UnicodeError, zlib.error, lzma.LZMAError, zstandard.ZstdError, tarfile.TarError, zipfile.BadZipFile,
)  # fmt: skip
# Byte order marks; UTF-32 first: its little-endian mark begins with that of UTF-16
BOMS = {"\ufeff".encode(name): name for name in ("utf-32-le", "utf-32-be", "utf-8", "utf-16-le", "utf-16-be")}


class File(NamedTuple):
    """A plain file. name: relative to the input, with `/`; real: the path to open."""

    name: str
    real: str
    size: int


class Tree:
    """List all plain files below a folder; `skipped` holds (name, reason, detail) of all others.

    A file as input is in the tree with the files around it (`around`), which a table may name. follow: the folder that links
    may lead into; digest: a hash of the name, size and time of change of each file."""

    def __init__(self, input: str, follow: str | None = None, around: bool = True) -> None:
        self.files: dict[str, File] = {}
        self.skipped: list[tuple[str, str, str]] = []
        self.digest = hashlib.blake2b(digest_size=16)
        self.only = None if os.path.isdir(input) else os.path.basename(os.path.abspath(input))
        self.root = os.path.abspath(input if self.only is None else os.path.dirname(os.path.abspath(input)))
        self.real = os.path.realpath(self.root)
        self._follow = follow and os.path.realpath(follow)
        if self.only is not None:  # a link that the user names is followed
            self._add(self.only, os.path.realpath(input), os.stat(input))
        if self.only is None or around:
            self._walk(self.root, "", {self.real})

    def _walk(self, folder: str, prefix: str, parents: set[str]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            return self.skipped.append((prefix, "unreadable_folder", str(error)))
        folders = []
        for entry in entries:
            name, path, about = prefix + entry.name, entry.path, entry.stat(follow_symlinks=False)
            reason, detail = ("hidden_file", "hidden files and folders are not read") if is_hidden(entry.name) else ("", "")
            if not reason and stat.S_ISLNK(about.st_mode):
                path = os.path.realpath(path)
                if not os.path.exists(path):
                    reason, detail = "broken_link", "its target is missing: git annex get or dvc pull fetches it"
                elif self._follow is None or path in parents or not is_below(path, self._follow):
                    reason, detail = "ignored_link", "--follow-links ROOT reads links that lead into the folder ROOT"
                else:
                    about = os.stat(path)
            if reason:
                self.skipped.append((name, reason, detail))
            elif stat.S_ISDIR(about.st_mode):
                folders.append((path, f"{name}/"))
            elif name != self.only:
                self._add(name, path, about)
        for path, name in folders:
            if self.only is None or len(self.files) < MAX_AROUND:
                self._walk(path, name, parents | {os.path.realpath(path)})

    def _add(self, name: str, real: str, about: os.stat_result) -> None:
        if not stat.S_ISREG(about.st_mode):
            return self.skipped.append((name, "no_plain_file", "devices and pipes are not read"))
        self.files[name] = File(name, real, about.st_size)
        self.digest.update(os.fsencode(name) + f"\0{about.st_size}\0{about.st_mtime_ns}".encode())

    def unpack(self, name: str, folder: str) -> None:
        """Replace an archive by its files, which are written below `folder` once. Raises `BadSample`."""
        file, about = self.files[name], os.stat(self.files[name].real)
        key = hashlib.sha256(f"{file.real}\0{about.st_size}\0{about.st_mtime_ns}".encode()).hexdigest()[:16]
        target = os.path.join(folder, key)
        if not os.path.exists(target):
            shutil.rmtree(f"{target}.partial", ignore_errors=True)
            try:
                refused = _extract(file, f"{target}.partial")
            except BadSample:
                raise
            except (*DAMAGE, ValueError, RuntimeError, LookupError) as error:
                raise BadSample("damaged_file", str(error)) from error
            Path(f"{target}.json").write_text(json.dumps(refused))
            os.rename(f"{target}.partial", target)
        inner = Tree(target)
        del self.files[name]
        self.files |= {f"{name}/{one.name}": one._replace(name=f"{name}/{one.name}") for one in inner.files.values()}
        unsafe = "links, devices and names that leave the archive are not unpacked"
        links = [(member, "unsafe_member", unsafe) for member in json.loads(Path(f"{target}.json").read_text())]
        self.skipped += [(f"{name}/{member}", reason, detail) for member, reason, detail in inner.skipped + links]

    @cached_property
    def _names(self) -> tuple[dict[str, list[str]], ...]:
        """Names of files by base name, of media by base name without extension, and of files by base name folded."""
        bases, stems, folded = defaultdict(list), defaultdict(list), defaultdict(list)
        for name in self.files:
            base = name.rpartition("/")[2]
            bases[base].append(name)
            folded[_fold(base)].append(name)
            if extension(base) in MEDIA:
                stems[base.rpartition(".")[0]].append(name)
        return bases, stems, folded

    def resolve(self, table: str, value: str) -> File | None:
        """Find the file that a value in a table means: relative to the table or to the input; else the one file with that base
        name, or the one medium with that name and any extension, whose folders fit best."""
        if not value or len(value) > 4096 or "\n" in value:
            return None
        folder, value = os.path.dirname(table), re.sub(r"#\d+$", "", value.strip()).replace("\\", "/").removeprefix("file://")
        value = value.removeprefix(f"{self.root}/").removeprefix(f"{self.real}/")
        for name in (os.path.normpath(os.path.join(folder, value)), os.path.normpath(value)):
            if name in self.files:
                return self.files[name]
        base, (bases, stems, folded) = value.rpartition("/")[2], self._names
        found = bases.get(base) or stems.get(base) or folded.get(_fold(base)) or []
        found = [name for name in found if is_below(name, folder)] or found
        if len(found) > 1:
            wanted, *parts = (os.path.splitext(path)[0].split("/")[::-1] for path in (os.path.join(folder, value), *found))
            fits = [len(os.path.commonprefix([wanted, names])) for names in parts]  # noqa: RUF071 (of lists)
            found = [name for name, fit in zip(found, fits, strict=True) if fit == max(fits)]
        found = [name for name in found if "train" in name.lower()] or found  # labels are of the training set
        return self.files[found[0]] if len(found) == 1 else None


def _fold(name: str) -> str:
    """A name as a file system compares it that ignores case (Windows) or decomposes letters (macOS)."""
    return unicodedata.normalize("NFC", name).casefold()


def is_below(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(f"{folder}/")


def extension(name: str) -> str:
    """The extension in lower case, "" if there is none; `c.jsonl.zst` has `jsonl`."""
    parts = name.rpartition("/")[2].lower().split(".")
    if len(parts) > 2 and parts[-1] in COMPRESSIONS:
        parts.pop()
    return parts[-1] if len(parts) > 1 else ""


def open_plain(path: str) -> BinaryIO:
    """Open a file that is no link. Raises `OSError` for a link, `BadSample` for a pipe, which would block forever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadSample("no_plain_file", f"{path!r} is a device or a pipe")
    return os.fdopen(descriptor, "rb")


def read_file(path: str) -> bytes:
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_FILE_BYTES:
            raise BadSample("file_too_large", f"{path!r} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        return file.read(size)


def read_text(path: str, encoding: str = "", limit: int | None = None) -> bytes:
    """Read a text file as UTF-8, decompressed."""
    limit = limit or MAX_FILE_BYTES
    with open_text(path, encoding)[0] as file:
        if len(data := file.read(limit + 1)) > limit:
            raise BadSample("file_too_large", f"{path!r} holds more than {limit:,} bytes")
    return data


# -- encodings: a byte order mark decides, else zero bytes (UTF-16) or strict UTF-8; nothing else is guessed


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Decode a text by its byte order mark, else by `encoding`, else by `encoding_of`; line ends become newlines.

    Raises BadSample: `invalid_utf8` with the likely encoding, or `wrong_encoding`."""
    mark = next((mark for mark in BOMS if data.startswith(mark)), b"")
    name = BOMS.get(mark) or encoding or encoding_of(data)
    try:
        return re.sub("\r\n?", "\n", data[len(mark) :].decode(name).removeprefix("\ufeff"))
    except (UnicodeError, LookupError) as error:
        raise BadSample("wrong_encoding", f"the text is not {name}: {error}") from error


def encoding_of(data: bytes, whole: bool = True) -> str:
    """Name the encoding of a text (`utf-8`, `utf-16-le` ...), or of its beginning if it is not `whole`. Raises `BadSample`."""
    if name := next((name for mark, name in BOMS.items() if data.startswith(mark)), None):
        return name
    even, odd, half = data[0::2].count(0), data[1::2].count(0), len(data) // 2
    for name, other, zeros in (("utf-16-be", odd, even), ("utf-16-le", even, odd)):
        if other == 0 and zeros >= max(2, half / 20) and len(data) % 2 <= (not whole):
            return name
    if even + odd >= max(4, half / 2):
        raise BadSample("invalid_utf8", "a quarter of its bytes are zero: a binary file, or UTF-32 without byte order mark")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        part, likely = data[max(0, error.start - (1 << 15)) :][: 1 << 16], "latin-1"
        if len(high := [byte for byte in part if byte >= 0x80]) <= len(part) / 5:  # mostly ASCII: Western
            likely = "cp1252" if min(high) < 0xA0 else "latin-1"
        else:
            with suppress(ImportError):  # a dependency of wandb's requests
                from charset_normalizer import from_bytes

                likely = getattr(from_bytes(part).best(), "encoding", likely)
        found = f"byte 0x{data[error.start]:02x} at {error.start} is not UTF-8"
        raise BadSample("invalid_utf8", f"{found}. Perhaps the text is {likely}: --encoding {likely}") from error
    return "utf-8"


# -- streams and archives


class _Chunks(io.RawIOBase):
    """A stream of the bytes that an iterator gives."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _decompressed(file: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress frame by frame, 2 KiB at a time, which may hold 64 MiB. Raises `EOFError` for a file that is cut off."""
    frame, data = None, file.read(2048)
    while data:
        if frame is None and not data.strip(b"\0"):  # padding
            data = b""
        else:
            frame = frame or new_frame()
            bounded = hasattr(frame, "needs_input")  # bzip2 and xz: 2 KiB may hold gigabytes
            yield frame.decompress(data, 1 << 20) if bounded else frame.decompress(data)
            while bounded and not frame.needs_input and not frame.eof:
                yield frame.decompress(b"", 1 << 20)
            frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
        data = data or file.read(2048)
    if frame is not None:
        raise EOFError("the compressed file ends before its end mark")


FRAMES: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b\x08": lambda: zlib.decompressobj(31),
    b"\x28\xb5\x2f\xfd": lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj(),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(memlimit=MAX_WINDOW),
}


def open_text(path: str, encoding: str = "", start: int = 0, stop: int = 0) -> tuple[BinaryIO, int]:
    """Open a file as UTF-8 bytes: its content says whether it is compressed or UTF-16, `encoding` is that of other files.

    start, stop: read the lines that begin in this range of bytes, which plain files allow (stop 0: to the end). Returns the
    stream, and the offset of its first byte in the file, -1 if the file is not plain."""
    file: Any = io.BufferedReader(open_plain(path).detach(), 1 << 17)  # type: ignore[attr-defined]
    is_plain, head = True, file.peek(6)
    if new_frame := next((new_frame for magic, new_frame in FRAMES.items() if head.startswith(magic)), None):
        file, is_plain = io.BufferedReader(_Chunks(_decompressed(file, new_frame)), 1 << 17), False
    head = file.peek(6)[: 1 << 12]
    try:
        found = encoding_of(head, whole=False) if not encoding or head.startswith(tuple(BOMS)) else encoding
        if codecs.lookup(found).name != "utf-8":
            texts = codecs.iterdecode(iter(partial(file.read, 1 << 16), b""), found, "surrogateescape")  # which stay wrong
            return io.BufferedReader(_Chunks(text.encode(errors="surrogateescape") for text in texts), 1 << 17), -1
    except BadSample:
        pass  # decoding the lines says where the damage is
    except LookupError as error:
        raise ValueError(f"--encoding {encoding!r} is unknown to Python") from error
    if is_plain and (start or stop):
        end = _seek_line(file, stop) if stop else os.fstat(file.fileno()).st_size
        start = _seek_line(file, start)
        sizes = (min(1 << 17, end - at) for at in range(start, end, 1 << 17))
        file = io.BufferedReader(_Chunks(map(file.read, sizes)), 1 << 17)
    return file, start if is_plain else -1


def _seek_line(file: BinaryIO, position: int) -> int:
    """Seek to the first line that begins at or after `position`; return its offset."""
    file.seek(max(0, position - 1))
    while position and _is_cut(file.readline(MAX_LINE_BYTES)):
        pass
    return file.tell()


def lines_of(file: BinaryIO) -> Iterator[bytes | BadSample]:
    """Yield the lines of a file, and a `BadSample` for each line that is too long. Raises it beyond 16 times that length."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        if all(map(_is_cut, (file.readline(MAX_LINE_BYTES) for _ in range(16)))):
            raise BadSample("line_too_long", f"a line has more than {16 * MAX_LINE_BYTES:,} bytes: the rest is not read")
        yield BadSample("line_too_long", f"a line has more than {MAX_LINE_BYTES:,} bytes")


def _is_cut(line: bytes) -> bool:
    return bool(line) and not line.endswith(b"\n")


def pieces_of(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Yield a text in pieces of at most `limit` bytes, cut after a paragraph, line, word or character."""
    piece = b""
    while len(piece := piece + file.read(limit + 1 - len(piece))) > limit:
        cuts = (at + len(mark) for mark in CUTS if (at := piece.rfind(mark, limit // 2, limit)) >= 0)
        characters = (at for at in range(limit, limit - 4, -1) if piece[at] & 0xC0 != 0x80)
        cut = next(cuts, 0) or next(characters, 0) or limit
        yield piece[:cut]
        piece = piece[cut:]
    yield piece


def _extract(file: File, target: str) -> list[str]:
    """Write the files of an archive below `target`; return the names of members that are refused."""
    refused, size, most = list[str](), 0, max(MAX_ARCHIVE[0], MAX_ARCHIVE[1] * file.size)
    os.makedirs(target)
    with ExitStack() as stack:
        if is_zip := file.name.lower().endswith(".zip"):
            archive: Any = stack.enter_context(zipfile.ZipFile(file.real))
        else:
            stream = stack.enter_context(open_text(file.real)[0])
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
        for count, member in enumerate(archive.infolist() if is_zip else archive, start=1):
            if is_zip:
                name, bytes_, is_folder = member.filename, member.file_size, member.is_dir()
                is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
            else:
                name, bytes_, is_folder = member.name, member.size, member.isdir()
                is_plain = member.isreg() and not member.issparse()
            size += bytes_
            if size > most or count > MAX_ARCHIVE[2]:
                raise BadSample("archive_too_large", f"more than {most:,} bytes or {MAX_ARCHIVE[2]:,} files: unpack it first")
            if is_plain and not is_folder and name[:1] != "/" and ".." not in name.split("/") and "\\" not in name:
                archive.extract(member, target, **({} if is_zip else {"filter": "data"}))
            elif not is_folder:  # the filter of tarfile alone was no protection (CVE-2025-4517)
                refused.append(name)
    return refused
