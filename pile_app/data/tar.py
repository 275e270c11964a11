"""Read WebDataset samples from tar files: their byte ranges, and the files in each. Nothing is ever extracted.

`tarfile` parses the headers, when a shard is indexed only. It takes a damaged header for the end of the archive, so the bytes
after the last member must be the zeros that end a tar."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pile_app.data.files import ShardError
from pile_app.documents import BadSample

BLOCK = 512  # bytes of a tar block
MAX_HEADER_BYTES = 1 << 20  # of the headers of one member
MAX_SAMPLE_BYTES = 1 << 30
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}


@dataclass
class TarSample:
    """Files that share a key. start, stop: bytes in the tar; files: rest of the name -> (offset from `start`, size)."""

    key: str
    start: int
    stop: int
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    error: BadSample | None = None  # why it cannot be used


def read_samples(path: str) -> tuple[list[TarSample], Counter[str]]:
    """List the samples of a tar, and count ignored members. Raises `ShardError` if it is missing, damaged or compressed."""
    samples: list[TarSample] = []
    ignored: Counter[str] = Counter()
    stop = 0
    try:
        with open(path, "rb") as file:
            if program := COMPRESSED.get(file.read(2)):
                raise ShardError(f"shard {path!r} is compressed: {program} it first, samples are read at random offsets")
            file.seek(0)
            for member, start, stop in _members(file, os.fstat(file.fileno()).st_size):
                if member.isdir() or is_hidden(member.name):
                    ignored["hidden files"] += not member.isdir()
                    continue
                key, name = split_name(member.name)
                if not samples or samples[-1].key != key or name in samples[-1].files:
                    samples.append(TarSample(key, start, stop))
                sample = samples[-1]
                sample.files[name], sample.stop = (member.offset_data - sample.start, member.size), stop
                sample.error = sample.error or _unsafe(member)
    except OSError as error:
        raise ShardError(f"shard {path!r} cannot be opened: {error}") from error
    except ValueError as error:
        message = f"shard {path!r} is damaged or truncated at byte {stop:,}: {error}. Fetch or write it again"
        raise ShardError(message) from error
    return _check_keys(samples), +ignored


def _members(file: BinaryIO, size: int | None = None) -> Iterator[tuple[tarfile.TarInfo, int, int]]:
    """Yield each member and the bytes [start, stop) of its headers and content. Raises ValueError; of a whole tar of `size`
    bytes also for a member that is cut off, and where the end is missing."""
    stop = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # or memory grows with the archive
                length = member.size if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES else 0
                if length < 0 or member.offset < stop or member.offset_data - member.offset > MAX_HEADER_BYTES:
                    raise ValueError(f"the header of {member.name!r} gives an impossible size")
                start, stop = member.offset, member.offset_data + -(-length // BLOCK) * BLOCK
                if size is not None and stop - BLOCK >= size:
                    raise ValueError(f"{member.name!r} is cut off")
                yield member, start, stop
    except (tarfile.TarError, ArithmeticError, LookupError, RecursionError, AttributeError) as error:  # hostile headers
        raise ValueError(str(error)) from error
    if size is not None:
        rest = (os.pread(file.fileno(), 1 << 20, offset) for offset in range(stop, size, 1 << 20))
        if size - stop < BLOCK or any(part.strip(b"\0") for part in rest):
            raise ValueError("neither a member nor the end of the archive follows")


def _unsafe(member: tarfile.TarInfo) -> BadSample | None:
    """Refuse members that no data set needs and an attack may use."""
    reason = ""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) or member.issparse():
        reason = f"is no plain file (tar type {member.type!r})"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        reason = "leaves the archive"
    elif any("\ud800" <= letter <= "\udfff" for letter in member.name):
        reason = "is not UTF-8"
    return BadSample("unsafe_member", f"{member.name!r} {reason}") if reason else None


def _check_keys(samples: list[TarSample]) -> list[TarSample]:
    """Reject the second of two samples with the same key and file, and join and reject a sample in several parts."""
    first: dict[str, TarSample] = {}
    for sample in samples:
        earlier = first.setdefault(sample.key, sample)
        if earlier is sample:
            continue
        if earlier.files.keys() & sample.files.keys():
            sample.error = BadSample("duplicate_key", f"two samples are called {sample.key!r}")
        else:
            earlier.error = BadSample("scattered_key", f"files of {sample.key!r} are not adjacent: `pile prepare` joins them")
            earlier.files |= sample.files
            sample.files.clear()
    return [sample for sample in samples if sample.files]


def split_name(name: str) -> tuple[str, str]:
    """(key, rest) of a member's name: the key ends at the first dot of the last part, as in WebDataset."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest


def is_hidden(name: str) -> bool:
    """Tell whether a name is hidden, or of the resource forks that macOS adds."""
    return name.rpartition("/")[2].startswith(".") or "__MACOSX" in name.split("/")


def files_of_block(block: bytes) -> dict[str, bytes]:
    """Name -> content of the files of a sample, from its bytes in the tar. Raises `BadSample`."""
    try:
        members = [member for member, *_ in _members(io.BytesIO(block)) if not (member.isdir() or is_hidden(member.name))]
        return {split_name(m.name)[1]: block[m.offset_data : m.offset_data + m.size] for m in members}
    except ValueError as error:
        raise BadSample("damaged_sample", str(error)) from error


def plain_members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, BadSample | None]]:
    """Yield the files of a tar, each with the reason why it is unsafe, if it is. Raises ValueError: damaged or truncated."""
    for member, *_ in _members(file, os.fstat(file.fileno()).st_size):
        member.name = os.fsencode(member.name).decode(errors="replace")  # names in other encodings do no harm
        if not member.isdir():
            yield member, _unsafe(member)
