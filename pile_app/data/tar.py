"""Tars by byte ranges: which bytes are which sample, and which file of it.

The standard library takes a damaged header for the end of the archive, reads headers of any size into memory, and takes ten
times as long for a sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pile_app.data.files import ShardError
from pile_app.documents import BadSample

if TYPE_CHECKING:
    pass

BLOCK = 512  # bytes of a tar block
MAX_HEADER_BYTES = 1 << 20  # of one extended header: names, no data


class Member(NamedTuple):
    """A file of a tar: its headers begin at `offset`, its data at `data`. kind: "0" a file, "5" a folder, others as in tar."""

    name: str
    kind: str
    offset: int
    data: int
    size: int


def read_members(read: Callable[[int, int], bytes], stop: int) -> Iterator[Member]:
    """The members of the tar (ustar, GNU and PAX headers) in bytes [0, stop), read by `read(size, offset)`.

    Ends at the first block of zeros, or at `stop`.

    Raises:
        ValueError: something that is no header stands where one has to, or the last member is cut off.
    """
    offset = start = 0
    name: str | None = None
    size: int | None = None
    sparse = False
    while offset < stop:
        header = read(BLOCK, offset)
        if len(header) < BLOCK:
            raise ValueError(f"a header is cut off at byte {offset:,}")
        if header[0] == 0 and not header.strip(b"\0"):
            break
        kind = chr(header[156]) if header[156] else "0"
        try:
            field = header[124:136]
            length = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)
            if length < 0 or sum(header) - sum(header[148:156]) + 256 != int(header[148:156].strip(b" \0"), 8):
                raise ValueError
        except ValueError:
            raise ValueError(f"what stands at byte {offset:,} is no header of a member") from None
        data = offset + BLOCK
        if kind in "xgLK":  # extended headers: of the next member, of all (no names), long names and links
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes stands at byte {offset:,}")
            content = read(length, data)
            if len(content) < length:
                raise ValueError(f"a header is cut off at byte {offset:,}")
            if kind == "L":
                name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == "x":
                values = _pax_values(content)
                name = values.get("path", name)
                size = int(values["size"]) if "size" in values else size
                sparse = any(key.startswith("GNU.sparse.") for key in values)
                if size is not None and size < 0:
                    raise ValueError(f"a PAX header at byte {offset:,} claims a size of {size:,} bytes")
        else:
            if name is None:
                prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
                short = header[: header.find(b"\0") if 0 <= header.find(b"\0") < 100 else 100]
                name = (prefix + b"/" + short if prefix else short).decode("utf-8", "surrogateescape")
            length = length if size is None else size
            if kind in "123456":  # links, devices and folders have no data, whatever size they claim
                length = 0
            if data + length > stop:
                raise ValueError(f"member {name!r} is cut off at byte {stop:,}")
            if kind in "07":
                kind = "S" if sparse else "0"
            yield Member(name, kind, start, data, length)
            name, size, sparse, start = None, None, False, data + -(-length // BLOCK) * BLOCK
        offset = data + -(-length // BLOCK) * BLOCK


def _pax_values(content: bytes) -> dict[str, str]:
    """The `length key=value\\n` records of a PAX header."""
    values = {}
    start = 0
    while start < len(content):
        try:
            space = content.index(b" ", start, start + 20)
            stop = start + int(content[start:space])
            if not space < stop <= len(content):
                raise ValueError
            key, _, value = content[space + 1 : stop - 1].partition(b"=")
            values[key.decode()] = value.decode("utf-8", "surrogateescape")
        except ValueError:
            raise ValueError("a PAX header is damaged") from None
        start = stop
    return values


class _Sample(NamedTuple):
    """A run of members that share a key; trouble: what of them cannot be data."""

    key: str
    start: int
    stop: int
    trouble: str


def sample_ranges(path: str, descriptor: int, tar_size: int) -> Iterator[_Sample]:
    """The samples of a tar; then checks that the tar ends where they do."""
    sample: _Sample | None = None
    stop = 0
    try:
        for member in read_members(lambda size, offset: os.pread(descriptor, size, offset), tar_size):
            stop = member.data + -(-member.size // BLOCK) * BLOCK
            if member.kind == "5":
                continue
            key = sample_key(member.name)
            trouble = _trouble(member)
            if sample is not None and sample.key == key:
                sample = sample._replace(stop=stop, trouble=sample.trouble or trouble)
                continue
            if sample is not None:
                yield sample
            sample = _Sample(key, member.offset, stop, trouble)
    except ValueError as error:
        raise ShardError(
            f"shard {path!r} is damaged or truncated near byte {stop:,}: {error}. Fetch or write it again"
        ) from error
    rest = tar_size - stop
    if rest < BLOCK or any(os.pread(descriptor, 1 << 20, at).strip(b"\0") for at in range(stop, tar_size, 1 << 20)):
        raise ShardError(
            f"shard {path!r} is damaged or truncated at byte {stop:,}: neither a member nor the end of the archive stands "
            "there. Fetch or write it again"
        )
    if sample is not None:
        yield sample


def _trouble(member: Member) -> str:
    """What no data set needs and an attack may use, "" for none. Nothing is ever extracted, so it could do no harm here."""
    if member.kind != "0":
        return f"a member that is no file (tar type {member.kind!r})"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"the path {member.name!r}, which leaves the archive"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    return ""


def sample_key(name: str) -> str:
    """The key of a member: its name up to the first dot of the last part, as in WebDataset."""
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def ranges_of_files(block: bytes) -> dict[str, tuple[int, int]]:
    """Extension -> (first byte, bytes) of the files of one sample in its range of the tar."""
    ranges: dict[str, tuple[int, int]] = {}
    try:
        for member in read_members(lambda size, offset: block[offset : offset + size], len(block)):
            _, dot, extension = member.name.rpartition("/")[2].partition(".")
            if member.kind == "0" and dot:
                if extension in ranges:
                    raise BadSample("duplicate_key", f"two samples in a row are called {sample_key(member.name)!r}")
                ranges[extension] = member.data, member.size
    except BadSample:
        raise
    except ValueError as error:
        raise BadSample("damaged_sample", str(error)) from error
    return ranges


def files_of_block(block: bytes) -> dict[str, bytes]:
    """The files, by extension, of one sample from its range of the tar."""
    return {extension: block[first : first + size] for extension, (first, size) in ranges_of_files(block).items()}
