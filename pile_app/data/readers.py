"""The readers of `pile prepare`: files of users, one kind each, to documents.

    folder ──► read_files ──► Found(file, Document), or Found(file, BadSample) with the reason why there is none

What is read (the kind `auto` reads all of it):

* `text`: text files, one document a file, or several cut at blank lines where it is very long; JSON lines, plain or compressed,
  `{"text": ..., "meta": {...}}` a line, where `meta.pile_set_name` names the source, as in the Pile;
* `images`, `audio`: the files of a folder that share a name (`frog.png`, `frog.ogg` and the caption or transcript `frog.txt`)
  make one document; or a CSV or TSV table with a column that names the file and one that holds the text, and then only the
  files of its rows.

Documents stream: memory does not grow with the data, and the same folder gives the same documents in the same order.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pile_app.data.text import clean_text
from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, BadSample, Document, Segment

Kind = Literal["auto", "text", "images", "audio"]

TEXT_EXTENSIONS = ("txt", "text", "md", "rst")
JSON_EXTENSIONS = ("jsonl", "jsonl.gz", "jsonl.zst")


class TabSeparated(csv.excel_tab):
    quoting = csv.QUOTE_NONE  # a lone quote in a caption would swallow the rows up to the next one


TABLE_DIALECTS = {"csv": csv.excel, "tsv": TabSeparated}
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS + AUDIO_EXTENSIONS
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "auto": (*TEXT_EXTENSIONS, *JSON_EXTENSIONS, *MEDIA_EXTENSIONS, *TABLE_DIALECTS),
    "text": (*TEXT_EXTENSIONS, *JSON_EXTENSIONS),
    "images": (*IMAGE_EXTENSIONS, *TABLE_DIALECTS),
    "audio": (*AUDIO_EXTENSIONS, *TABLE_DIALECTS),
}
FILE_COLUMNS = ("image", "audio", "file", "path")
TEXT_COLUMNS = ("caption", "transcript", "text", "sentence")
TABLE_FOLDERS = ("", "clips", "images", "audio")  # where the files that a table names may lie, beside it (Common Voice: clips)


@dataclass(frozen=True)
class Options:
    """The arguments of `prepare` that decide what the shards hold."""

    kind: Kind = "auto"
    validation_share: float = 0.01
    seed: int = 0
    clean: bool = True
    shard_megabytes: float = 64
    max_audio_seconds: float = 30.0
    caption_from_folder: bool = False
    document_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.kind not in EXTENSIONS:
            raise ValueError(f"kind is {self.kind!r}; it has to be one of {', '.join(EXTENSIONS)}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it has to be 0 or more and below 1")
        for name, smallest in {"shard_megabytes": 0.01, "max_audio_seconds": 0.01, "document_bytes": 16}.items():
            if not getattr(self, name) >= smallest:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be {smallest} or more")

    @property
    def extensions(self) -> tuple[str, ...]:
        return EXTENSIONS[self.kind]


@dataclass(frozen=True)
class Found:
    """What a reader made of a file (or a line of one, `file:line`): a document, or why there is none."""

    file: str
    content: Document | BadSample


def read_files(input: Path, options: Options, seen: DigestSet) -> Iterator[Found]:
    """Everything under a folder (or one file) that the options ask for: tables first, then folder by folder, sorted."""
    wanted = options.extensions
    tables = 0
    for folder, names, _ in _walk(input):
        for name in names:
            if _extension(name) in TABLE_DIALECTS and _extension(name) in wanted:
                tables += 1
                yield from read_table(os.path.join(folder, name), options, seen)
    for folder, names, skipped in _walk(input):
        for name in skipped:
            yield Found(os.path.join(folder, name), BadSample("ignored_folder", "hidden folders and links are not followed"))
        groups: dict[str, list[str]] = defaultdict(list)
        for name in names:
            groups[name.rsplit(".", 1)[0]].append(os.path.join(folder, name))
        for group in groups.values():
            media = [file for file in group if _extension(file) in MEDIA_EXTENSIONS and _extension(file) in wanted]
            captions = [file for file in group if media and _extension(file) == "txt"]
            if tables:
                outside = [file for file in media + captions if _path_digest(file) not in seen]
                yield from (Found(file, BadSample("not_in_table", "no row of a table names it")) for file in outside)
            elif media:
                yield _found(media[0], _document_of_group, media, captions, options)
            for file in group:
                if _extension(file) not in wanted and file not in captions:
                    yield Found(file, BadSample("ignored_extension", f"only *.{', *.'.join(wanted)} are read"))
                elif _extension(file) in READERS and file not in captions:
                    yield from READERS[_extension(file)](file, options)


def read_text(path: str, options: Options) -> Iterator[Found]:
    """One document, or several where the file is longer than `document_bytes`."""
    try:
        with open(path, "rb") as file:
            for piece in _pieces(file, options.document_bytes):
                yield _found(path, _document_of_text, piece)
    except OSError as error:
        yield Found(path, BadSample("unreadable_file", str(error)))


def read_json_lines(path: str, _: Options) -> Iterator[Found]:
    """A document a line, plain or compressed; what follows damage in a compressed file is lost, and the file is listed."""
    try:
        for number, line in enumerate(LINES[_extension(path)](path), start=1):
            if line.strip():
                yield _found(f"{path}:{number}", _document_of_json, line)
    except (OSError, EOFError, zlib.error) as error:
        yield Found(path, BadSample("damaged_file", str(error)))


def read_table(path: str, options: Options, seen: DigestSet) -> Iterator[Found]:
    """A document a row; the files that rows name are noted in `seen`."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file, dialect=TABLE_DIALECTS[_extension(path)])
            columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
            file_columns = [columns[name] for name in FILE_COLUMNS if name in columns]
            text_column = next((columns[name] for name in TEXT_COLUMNS if name in columns), None)
            if not file_columns:
                detail = f"the table has columns {list(columns)}; one of {', '.join(FILE_COLUMNS)} has to name the file"
                yield Found(path, BadSample("no_file_column", detail))
                return
            for row in rows:
                media = [_file_of_table(path, row[name]) for name in file_columns if row[name]]
                for one in media:
                    seen.add(_path_digest(one))
                text = (row[text_column] or "") if text_column else None
                yield _found(f"{path}:{rows.line_num}", _document_of_row, media, text, options)
    except (csv.Error, OSError) as error:
        yield Found(path, BadSample("damaged_file", str(error)))


READERS: dict[str, Callable[[str, Options], Iterator[Found]]] = {
    **dict.fromkeys(TEXT_EXTENSIONS, read_text),
    **dict.fromkeys(JSON_EXTENSIONS, read_json_lines),
}


def _found(file: str, make: Callable[..., Document], *arguments: Any) -> Found:
    try:
        return Found(file, make(*arguments))
    except BadSample as error:
        return Found(file, error)
    except FileNotFoundError as error:
        return Found(file, BadSample("missing_file", str(error)))
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        return Found(file, BadSample("unreadable_file", str(error)))


def _document_of_text(data: bytes) -> Document:
    return Document((Segment(_decode(data)),))


def _document_of_json(line: bytes) -> Document:
    text = _decode(line)
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("invalid_json", str(error)) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise BadSample("no_text", 'the line is not an object with a string "text"')
    return Document((Segment(entry["text"]),), meta=entry["meta"] if isinstance(entry.get("meta"), dict) else {})


def _document_of_group(media: list[str], captions: list[str], options: Options) -> Document:
    text = _decode(Path(captions[0]).read_bytes()) if captions else None
    return _document_of_media(media, text, options)


def _document_of_row(media: list[str], text: str | None, options: Options) -> Document:
    if not media:
        raise BadSample("missing_file", "the row names no file")
    for file in media:
        if _extension(file) not in options.extensions or _extension(file) not in MEDIA_EXTENSIONS:
            raise BadSample("ignored_extension", f"{file!r} is not of a kind that is read")
    return _document_of_media(media, text, options)


def _document_of_media(media: list[str], text: str | None, options: Options) -> Document:
    segments = [Segment(Path(file).read_bytes(), _extension(file)) for file in media]
    if options.caption_from_folder and not text:
        text = re.sub("[-_]+", " ", Path(media[0]).resolve().parent.name)
    if text is not None:
        segments.append(Segment(text.strip()))
    return Document(tuple(segments), ordered=len(segments) == 1)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", str(error)) from error


def _pieces(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """A file in pieces of at most `limit` bytes, each cut after a blank line, else a line, else a space, else a character."""
    piece = file.read(limit)
    while len(piece) == limit:
        cuts = (at + len(mark) for mark in (b"\n\n", b"\n", b" ") if (at := piece.rfind(mark, limit // 2)) >= 0)
        characters = (at for at in range(limit - 1, limit - 5, -1) if piece[at] & 0xC0 != 0x80)  # first bytes, from the end
        cut = next(cuts, 0) or next(characters, 0) or limit
        rest = piece[cut:] + file.read(cut)
        if rest:
            yield piece[:cut]
            piece = rest
        else:
            break
    yield piece


def _plain_lines(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file


def _gzip_lines(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        yield from file


def _zstd_lines(path: str) -> Iterator[bytes]:
    """Frame by frame: `zstandard.open` takes a truncated file for a whole one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, rest = None, b""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 17):
            while chunk:
                frame = frame or decompressor.decompressobj()
                try:
                    *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                yield from lines
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed file ends before its end mark")
    yield rest


LINES = dict(zip(JSON_EXTENSIONS, (_plain_lines, _gzip_lines, _zstd_lines), strict=True))


def _walk(input: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, names of its files, names of folders that are not followed), sorted, top down."""
    if input.is_file():
        yield str(input.parent), [input.name], []
        return
    for folder, folders, names in os.walk(input):
        skipped = sorted(name for name in folders if name.startswith(".") or os.path.islink(os.path.join(folder, name)))
        folders[:] = sorted(set(folders) - set(skipped))
        yield folder, sorted(names), skipped


def _extension(file: str) -> str:
    parts = os.path.basename(file).lower().split(".")
    return ".".join(parts[-2:] if parts[-1] in ("gz", "zst") else parts[-1:]) if len(parts) > 1 else ""


def _file_of_table(table: str, name: str) -> str:
    candidates = [os.path.join(os.path.dirname(table), folder, name) for folder in TABLE_FOLDERS]
    return next((path for path in candidates if os.path.isfile(path)), candidates[0])


def _path_digest(file: str) -> bytes:
    return hashlib.blake2b(os.fsencode(os.path.abspath(file)), digest_size=16, person=b"path").digest()


class DigestSet:
    """A set of digests in a file, so that memory does not grow with the data."""

    def __init__(self, path: Path) -> None:
        # One thread at a time, but not always the same: `tokenizers` iterates in one of its own.
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for statement in (
            "PRAGMA journal_mode=OFF",
            "PRAGMA synchronous=OFF",
            "PRAGMA cache_size=-65536",  # KiB
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID",
            "BEGIN",
        ):
            self._database.execute(statement)

    def __enter__(self) -> DigestSet:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def add(self, digest: bytes) -> bool:
        """False if it was there already."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def __contains__(self, digest: bytes) -> bool:
        return self._database.execute("SELECT 1 FROM seen WHERE digest = ?", (digest,)).fetchone() is not None


def read_texts(input: Path) -> Iterator[str]:
    """The texts alone, cleaned, of a text file or a folder of them; what cannot be read is left out."""
    with DigestSet(Path(":memory:")) as seen:
        for found in read_files(input, Options(kind="text"), seen):
            if isinstance(found.content, Document):
                yield from (clean_text(segment.text) for segment in found.content.segments)
