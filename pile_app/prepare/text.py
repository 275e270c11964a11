"""Decode texts of users: a byte order mark decides, else zero bytes (UTF-16) or strict UTF-8; nothing else is guessed."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress

from pile_app.documents import BadSample

# UTF-32 first: its little-endian mark begins with that of UTF-16
BOMS = {"\ufeff".encode(name): name for name in ("utf-32-le", "utf-32-be", "utf-8", "utf-16-le", "utf-16-be")}


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
        likely = _likely(data[max(0, error.start - (1 << 15)) :][: 1 << 16])
        found = f"byte 0x{data[error.start]:02x} at {error.start} is not UTF-8"
        raise BadSample("invalid_utf8", f"{found}. Perhaps the text is {likely}: --encoding {likely}") from error
    return "utf-8"


def _likely(data: bytes) -> str:
    """Guess for the hint: Western if most bytes are ASCII, else by charset_normalizer (a dependency of wandb's requests)."""
    if len(high := [byte for byte in data if byte >= 0x80]) <= len(data) / 5:
        return "cp1252" if min(high) < 0xA0 else "latin-1"
    with suppress(ImportError):
        from charset_normalizer import from_bytes

        if found := from_bytes(data).best():
            return found.encoding
    return "latin-1"
