"""The readers of `pile prepare`: files of users, one layout each, to documents.

    folder ──► list_items ──► Item(reader, arguments) ──► read_item ──► Found(file, Document), or Found(file, BadSample)

Listing is quick and happens once, in one process; an item is some megabytes of input, which any process can read at any time.
What is read (the kind `auto` reads all of it):

* text files, one document a file, or several cut at blank lines where it is very long;
* JSON lines, plain or compressed (`.gz`, `.zst`): `{"text": ..., "meta": {...}}` a line, where `meta.pile_set_name` names the
  source, as in the Pile; or interleaved records: `text_list` and `image_info` (MMC4), `texts` and `images` (OBELICS);
* Parquet: a column of texts, of media as Hugging Face writes them (structs with `bytes`), or the records above;
* files of a folder that share a name (`frog.png`, `frog.ogg` and the caption or transcript `frog.txt`): one document;
* a CSV or TSV table with a column that names the file and one that holds the text, and then only the files of its rows;
  Common Voice (`validated.tsv` beside `clips/`): that table alone;
* LibriSpeech: `*.trans.txt` with a line a recording, beside the recordings;
* WebDataset shards (`.tar`): their documents as they are.

Input is not trusted. Links are not followed, and no name in a table or record reaches a file outside the input folder. Lines,
rows, files and the windows of decompression are bounded, so that memory is; nothing is unpickled or extracted.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import sqlite3
import stat
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pile_app.data.filters import QUALITY, evaluation_strings, require
from pile_app.data.shards import MAX_SAMPLE_BYTES, ShardError, files_of_block, sample_ranges
from pile_app.data.text import clean_text
from pile_app.documents import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    BadSample,
    Document,
    Segment,
    document_from_sample,
)

Kind = Literal["auto", "text", "images", "audio", "interleaved", "webdataset"]

TEXT_EXTENSIONS = ("txt", "text", "md", "rst")
JSON_EXTENSIONS = ("jsonl", "jsonl.gz", "jsonl.zst")


class TabSeparated(csv.excel_tab):
    quoting = csv.QUOTE_NONE  # a lone quote in a caption would swallow the rows up to the next one


TABLE_DIALECTS = {"csv": csv.excel, "tsv": TabSeparated}
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS + AUDIO_EXTENSIONS
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "auto": (*TEXT_EXTENSIONS, *JSON_EXTENSIONS, "parquet", *MEDIA_EXTENSIONS, *TABLE_DIALECTS, "tar"),
    "text": (*TEXT_EXTENSIONS, *JSON_EXTENSIONS, "parquet"),
    "images": (*IMAGE_EXTENSIONS, *TABLE_DIALECTS, "parquet"),
    "audio": (*AUDIO_EXTENSIONS, *TABLE_DIALECTS, "parquet"),
    "interleaved": (*JSON_EXTENSIONS, "parquet"),
    "webdataset": ("tar",),
}
FILE_COLUMNS = ("image", "audio", "file", "path")
TEXT_COLUMNS = ("caption", "transcript", "transcription", "text", "sentence")
TABLE_FOLDERS = ("", "clips", "images", "audio")  # where files that are named may lie, beside what names them
MAX_LINE_BYTES = 1 << 26  # of JSON lines, tables and captions
MAX_ZSTD_WINDOW = 1 << 27  # what `zstd --long` needs; `--long=31` would take 2 GiB a process
ITEM_BYTES = 1 << 24  # longer plain files are cut
TABLE_ROWS = 256


@dataclass(frozen=True)
class Options:
    """The arguments of `prepare` that decide what the shards hold. See there."""

    kind: Kind = "auto"
    validation_share: float = 0.01
    seed: int = 0
    clean: bool = True
    shard_megabytes: float = 64
    caption_from_folder: bool = False
    document_bytes: int = 1 << 20
    repair: bool = False
    quality: tuple[str, ...] = ()
    exact_duplicates: bool = True
    near_duplicates: float | None = None
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13
    min_image_size: int = 0
    max_aspect: float | None = None
    image_max_size: int | None = None
    min_audio_seconds: float = 0.0
    max_audio_seconds: float = 30.0
    silence: float | None = None
    resample: int | None = None
    audio_format: str | None = None

    BOUNDS = {  # noqa: RUF012 (a table, never changed)
        "shard_megabytes": (0.01, 1e6), "max_audio_seconds": (0.01, 3600), "min_audio_seconds": (0, 3600),
        "document_bytes": (16, MAX_LINE_BYTES), "near_duplicates": (0.1, 1), "ngram": (1, 100), "min_image_size": (0, 100_000),
        "max_aspect": (1, 100_000), "image_max_size": (1, 100_000), "silence": (-200, 0), "resample": (1000, 768_000),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.kind not in EXTENSIONS:
            raise ValueError(f"kind is {self.kind!r}; it has to be one of {', '.join(EXTENSIONS)}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it has to be 0 or more and below 1")
        for name, (smallest, largest) in self.BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value <= largest:
                raise ValueError(f"{name} is {value}; it has to be {smallest:g} or more and at most {largest:g}")
        if unknown := set(self.quality) - QUALITY.keys():
            raise ValueError(f"quality is {', '.join(sorted(unknown))}; it has to be of {', '.join(QUALITY)}")
        if self.audio_format not in (None, "flac", "wav"):
            raise ValueError(f"audio_format is {self.audio_format!r}; it has to be flac or wav")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """From names and values; JSON and command lines have lists for tuples."""
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**given)

    @property
    def extensions(self) -> tuple[str, ...]:
        return EXTENSIONS[self.kind]


class Item(NamedTuple):
    """A part of the input: the reader's name and JSON arguments, paths relative to the root; bytes to read."""

    reader: str
    arguments: list[Any]
    weight: int = 0


class Found(NamedTuple):
    """What a reader made of a file (or a line of one, `file:line`): a document, or why there is none.

    layout: what it was read as; raw: what there was in place of a document.
    """

    file: str
    content: Document | BadSample
    layout: str = ""
    raw: bytes = b""


# -- listing


def list_items(input: Path, options: Options, named: DigestSet, stamp: Callable[[bytes], Any] = len) -> Iterator[Item]:
    """Everything under a folder (or one file) that the options ask for: tables first, then folder by folder, sorted.

    Args:
        named: takes the digests of files that tables name.
        stamp: is called with path, size and time of change of every file.
    """
    wanted = options.extensions
    root = str(input if input.is_dir() else input.parent)
    tables = 0
    records: list[str] = []  # folders whose media belong to interleaved records
    for folder, names, _ in _walk(input):
        voice = "clips" in _folders(folder) and "validated.tsv" in names
        for name in names:
            path = os.path.join(folder, name)
            if _extension(name) in TABLE_DIALECTS and _extension(name) in wanted and not _is_link(path):
                if voice and name != "validated.tsv":
                    yield _rejected(root, path, "other_table", "of Common Voice, validated.tsv is read")
                else:
                    tables += 1
                    yield from _list_table(root, path, voice, named)
            elif _extension(name) in JSON_EXTENSIONS and options.kind in ("auto", "interleaved") and _is_interleaved(path):
                records.append(os.path.join(folder, ""))
    for folder, names, skipped in _walk(input):
        for name in skipped:
            path = os.path.join(folder, name)
            yield _rejected(root, path, "ignored_folder", "hidden folders and links are not followed")
        groups: dict[str, list[str]] = defaultdict(list)
        sizes: dict[str, int] = {}
        recorded = any(os.path.join(folder, "").startswith(prefix) for prefix in records)
        for name in names:
            path = os.path.join(folder, name)
            about = os.lstat(path)
            if not stat.S_ISREG(about.st_mode):
                yield _rejected(root, path, "ignored_link", "links, devices and pipes are not read")
                continue
            stamp(os.fsencode(os.path.relpath(path, root)) + f"\0{about.st_size}\0{about.st_mtime_ns}".encode())
            groups[name.rsplit(".", 1)[0]].append(name)
            sizes[name] = about.st_size
        relative = partial(_relative, root, folder)
        spoken = _librispeech(sizes) if options.kind in ("auto", "audio") else {}
        taken = {name for names in spoken.values() for name in names} | spoken.keys()
        for group in groups.values():
            media = [name for name in group if _extension(name) in MEDIA_EXTENSIONS and _extension(name) in wanted]
            captions = [name for name in group if media and _extension(name) == "txt"]
            if recorded and media:
                taken.update(media)
            elif tables:
                for name in media + captions:
                    if name not in taken and _path_digest(os.path.join(folder, name)) not in named:
                        yield _rejected(root, os.path.join(folder, name), "not_in_table", "no row of a table names it")
            elif media and not taken & set(media):
                weight = sum(sizes[name] for name in media + captions)
                yield Item("media", [[relative(name) for name in media], [relative(name) for name in captions]], weight)
            for name in group:
                path, extension = os.path.join(folder, name), _extension(name)
                if name in spoken:
                    weight = sum(sizes[sound] for sound in spoken[name])
                    yield Item("librispeech", [relative(name), spoken[name]], weight)
                elif name in captions or name in taken:
                    continue
                elif extension not in wanted:
                    if not (recorded and extension in MEDIA_EXTENSIONS):
                        yield _rejected(root, path, "ignored_extension", f"only *.{', *.'.join(wanted)} are read")
                elif extension in LISTERS:
                    yield from LISTERS[extension](root, path, sizes[name])


def _list_file(reader: str, root: str, path: str, size: int) -> Iterator[Item]:
    yield Item(reader, [_relative(root, path)], size)


def _list_ranges(reader: str, root: str, path: str, size: int) -> Iterator[Item]:
    """A long file in parts, [start, stop) in bytes; who reads one finds its first line or paragraph."""
    parts = max(1, size // ITEM_BYTES)
    places = [size * part // parts for part in range(parts + 1)]
    for start, stop in pairwise(places):
        yield Item(reader, [_relative(root, path), start, stop, parts > 1], stop - start)


def _list_parquet(root: str, path: str, _: int) -> Iterator[Item]:
    parquet = require("pyarrow.parquet", "prepare", "reading Parquet")
    try:
        with _open(path) as file, parquet.ParquetFile(file, memory_map=False) as opened:
            metadata = opened.metadata
            sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except Exception as error:  # of pyarrow, and what a hostile footer makes of it
        yield _rejected(root, path, "damaged_file", str(error))
        return
    for group, size in enumerate(sizes):
        yield Item("parquet", [_relative(root, path), group], max(0, size))


LISTERS: dict[str, Callable[[str, str, int], Iterator[Item]]] = {
    **dict.fromkeys(TEXT_EXTENSIONS, partial(_list_ranges, "text")),
    "jsonl": partial(_list_ranges, "json_lines"),
    "jsonl.gz": partial(_list_file, "json_lines"),
    "jsonl.zst": partial(_list_file, "json_lines"),
    "parquet": _list_parquet,
    "tar": partial(_list_file, "tar"),
}


def _list_table(root: str, path: str, voice: bool, named: DigestSet) -> Iterator[Item]:
    """Items of `TABLE_ROWS` rows; the files that rows name are noted in `named`."""
    relative = _relative(root, path)
    try:
        with _open(path) as file:
            lines = _Lines(file, 0)
            rows = csv.reader(lines, TABLE_DIALECTS[_extension(path)])
            header = [name.strip().lower() for name in next(rows, [])]
            file_columns = [header.index(name) for name in FILE_COLUMNS if name in header]
            if not file_columns:
                detail = f"the table has columns {header}; one of {', '.join(FILE_COLUMNS)} has to name the file"
                yield _rejected(root, path, "no_file_column", detail)
                return
            layout = "Common Voice" if voice else "table"
            start, first, count, weight = lines.place, lines.number, 0, 0
            for row in rows:
                for column in file_columns:
                    if column < len(row) and row[column] and (named_file := _beside(root, path, row[column])):
                        named.add(_path_digest(named_file))
                        weight += os.lstat(named_file).st_size
                count += 1
                if count == TABLE_ROWS or weight >= ITEM_BYTES:
                    yield Item("table", [relative, header, start, first, count, layout], weight)
                    start, first, count, weight = lines.place, lines.number, 0, 0
            if count:
                yield Item("table", [relative, header, start, first, count, layout], weight)
    except (csv.Error, OSError, BadSample) as error:
        if count:
            yield Item("table", [relative, header, start, first, count, layout], weight)
        yield _rejected(root, path, "damaged_file", str(error))


class _Lines:
    """The lines of a table, decoded; how many there were and where the next begins."""

    def __init__(self, file: BinaryIO, place: int, number: int = 0) -> None:
        file.seek(place)
        self.file, self.place, self.number = file, place, number

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        if len(line) == MAX_LINE_BYTES:
            raise BadSample("line_too_long", f"line {self.number + 1} of the table is longer than {MAX_LINE_BYTES:,} bytes")
        text = line.decode("utf-8" if self.place else "utf-8-sig", "surrogateescape")
        self.place += len(line)
        self.number += 1
        return text


def _is_interleaved(path: str) -> bool:
    """By the first record."""
    try:
        with _open(path) as file:
            for line in _lines(DECOMPRESSORS[_extension(path)](file)):
                if isinstance(line, bytes) and line.strip():
                    record = json.loads(line)
                    return isinstance(record, dict) and bool(_INTERLEAVED.keys() & record.keys())
    except (OSError, EOFError, ValueError, zlib.error, RecursionError):
        pass
    return False


def _librispeech(names: Iterable[str]) -> dict[str, list[str]]:
    """Transcripts `84-121123.trans.txt` -> recordings `84-121123-0000.flac` ... of a folder."""
    transcripts = {name.removesuffix(".trans.txt") + "-": name for name in names if name.endswith(".trans.txt")}
    found: dict[str, list[str]] = {name: [] for name in transcripts.values()}
    for name in names:
        if _extension(name) in AUDIO_EXTENSIONS and (prefix := name.rpartition("-")[0] + "-") in transcripts:
            found[transcripts[prefix]].append(name)
    return {name: sounds for name, sounds in found.items() if sounds}


def _walk(input: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, names of its files, names of folders that are not followed), sorted, top down."""
    if input.is_file():
        yield str(input.parent), [input.name], []
        return
    for folder, folders, names in os.walk(input):
        skipped = sorted(name for name in folders if name.startswith(".") or os.path.islink(os.path.join(folder, name)))
        folders[:] = sorted(set(folders) - set(skipped))
        yield folder, sorted(names), skipped


def _rejected(root: str, path: str, reason: str, detail: str) -> Item:
    return Item("rejected", [_relative(root, path), reason, detail])


# -- reading


def read_item(root: str, item: Item, options: Options) -> Iterator[Found]:
    """What an item holds, in order."""
    file = os.fsencode(item.arguments[0][0] if item.reader == "media" else item.arguments[0]).decode(errors="replace")
    try:
        yield from READERS[item.reader](root, file, options, *item.arguments)
    except BadSample as error:
        yield Found(file, error)
    except (EOFError, zlib.error, csv.Error, ShardError) as error:
        yield Found(file, BadSample("damaged_file", str(error)))
    except OSError as error:
        reason = "damaged_file" if error.errno is None else "unreadable_file"
        yield Found(file, BadSample(reason, str(error)))


def _read_rejected(_: str, file: str, __: Options, ___: str, reason: str, detail: str) -> Iterator[Found]:
    yield Found(file, BadSample(reason, detail))


def _read_text(root: str, file: str, options: Options, path: str, start: int, stop: int, _: bool) -> Iterator[Found]:
    """One document, or several where the file is longer than `document_bytes`."""
    with _open(os.path.join(root, path)) as opened:
        start, stop = (_paragraph_after(opened, place, options.document_bytes) for place in (start, stop))
        for piece in _pieces(_Range(opened, start, stop), options.document_bytes):
            yield _found(file, "text file", piece, _document_of_text, piece)


def _read_json_lines(
    root: str, file: str, options: Options, path: str, start: int = 0, stop: int = 0, cut: bool = False
) -> Iterator[Found]:
    """A document a line, plain or compressed; what follows damage in a compressed file is lost, and the file is listed."""
    path = os.path.join(root, path)
    place, number = start, 0
    with _open(path) as opened:
        if start:  # the line that goes over the border belongs to the part before
            opened.seek(start - 1)
            place += len(opened.readline(MAX_LINE_BYTES)) - 1
        for line in _lines(DECOMPRESSORS[_extension(path)](opened)):
            if cut and place >= stop:
                break
            number += 1
            name = f"{file}@{place}" if cut else f"{file}:{number}"
            if isinstance(line, BadSample):
                yield Found(name, line)
                place = opened.tell()
            else:
                place += len(line)
                if line.strip():
                    yield _found_in_line(root, path, name, line, options)


def _found_in_line(root: str, path: str, name: str, line: bytes, options: Options) -> Found:
    try:
        record = json.loads(_decode(line))
    except BadSample as error:
        return Found(name, error, "JSON lines", line)
    except (ValueError, RecursionError) as error:
        return Found(name, BadSample("invalid_json", str(error)), "JSON lines", line)
    if isinstance(record, dict) and isinstance(record.get("text"), str) and options.kind in ("auto", "text"):
        meta = record.get("meta")
        return Found(name, Document((Segment(record["text"]),), meta=meta if isinstance(meta, dict) else {}), "JSON lines")
    return _found_in_record(root, path, name, "JSON lines", record, options, line)


def _found_in_record(root: str, path: str, name: str, layout: str, record: Any, options: Options, raw: bytes = b"") -> Found:
    """Of a record that is not just a text: interleaved, or media with a caption."""
    if isinstance(record, dict):
        for key, (interleaved, make) in _INTERLEAVED.items():
            if isinstance(record.get(key), list) and options.kind in ("auto", "interleaved"):
                return _found(name, f"{interleaved} ({layout})", raw, make, root, path, record)
        media = [value for value in record.values() if _is_medium(value)] if options.kind != "text" else []
        if media and options.kind in ("auto", "images", "audio"):
            return _found(name, layout, raw, _document_of_media_record, root, path, record, media, options)
        if isinstance(record.get("text"), str) and options.kind in ("auto", "text"):
            meta = record.get("meta")
            return Found(name, Document((Segment(record["text"]),), meta=meta if isinstance(meta, dict) else {}), layout)
    return Found(name, BadSample("no_text", 'the record is not an object with a string "text"'), layout, raw)


def _document_of_mmc4(root: str, path: str, record: dict[str, Any]) -> Document:
    """Each image before the sentence that it was matched with."""
    texts = [text for text in record["text_list"] if isinstance(text, str)]
    before: dict[int, list[Any]] = defaultdict(list)
    for image in record.get("image_info") or []:
        if isinstance(image, dict) and isinstance(image.get("matched_text_index", 0), int):
            before[image.get("matched_text_index", 0)].append(image.get("image_name"))
    parts = [part for place, text in enumerate(texts) for part in (*before[place], {"text": text})]
    return _document_of_parts(root, path, parts, " ")


def _document_of_obelics(root: str, path: str, record: dict[str, Any]) -> Document:
    """Two lists of one length; at each place a text or an image."""
    images = record.get("images")
    pairs = zip(record["texts"], images if isinstance(images, list) else [None] * len(record["texts"]), strict=False)
    parts = [{"text": text} if isinstance(text, str) else image for text, image in pairs if text or image]
    return _document_of_parts(root, path, parts, "\n\n")


_INTERLEAVED = {"text_list": ("MMC4", _document_of_mmc4), "texts": ("OBELICS", _document_of_obelics)}


def _document_of_parts(root: str, path: str, parts: list[Any], glue: str) -> Document:
    """Texts in a row are one segment. Images that are not there are left out and counted in the document's meta."""
    segments: list[Segment] = []
    missing = 0
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str) and "bytes" not in part:
            if segments and isinstance(segments[-1].data, str):
                segments[-1] = Segment(segments[-1].data + glue + part["text"])
            elif part["text"].strip():
                segments.append(Segment(part["text"]))
            continue
        try:
            segments.append(_medium(root, path, part))
        except (BadSample, OSError) as error:
            if isinstance(error, BadSample) and error.reason not in ("missing_file", "unknown_medium"):
                raise
            missing += 1
    if missing and not any(isinstance(segment.data, bytes) for segment in segments):
        raise BadSample("missing_file", f"none of its {missing} images is there")
    if not segments:
        raise BadSample("empty_text", "the record holds neither a text nor an image")
    return Document(tuple(segments), meta={"missing_images": missing} if missing else {})


def _document_of_media_record(root: str, path: str, record: dict[str, Any], media: list[Any], options: Options) -> Document:
    segments = [_medium(root, path, medium) for medium in media]
    for segment in segments:
        if segment.extension not in options.extensions and options.kind != "auto":
            raise BadSample("ignored_extension", f"{segment.extension} is not of a kind that is read")
    text = next((record[name] for name in TEXT_COLUMNS if isinstance(record.get(name), str)), None)
    if text is not None:
        segments.append(Segment(text.strip()))
    return Document(tuple(segments), ordered=len(segments) == 1)


def _is_medium(value: Any) -> bool:
    return isinstance(value, bytes) or (
        isinstance(value, dict) and "bytes" in value and isinstance(value["bytes"], bytes | None)
    )


_MAGIC = (
    (b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpg"), (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"),
    (b"\xff\xfb", "mp3"), (b"\xff\xf3", "mp3"), (b"\xff\xf2", "mp3"),
)  # fmt: skip


def _medium(root: str, path: str, value: Any) -> Segment:
    """From bytes, a struct of `bytes` and `path`, or the name of a file beside `path`."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        file = _beside(root, path, value)
        if file is None:
            raise BadSample("missing_file", f"{value!r} is not in the input folder")
        value = _read_file(file)
    if not isinstance(value, bytes):
        raise BadSample("missing_file", "neither bytes nor the name of a file")
    if value[:4] == b"RIFF" and (extension := {b"WAVE": "wav", b"WEBP": "webp"}.get(value[8:12])):
        return Segment(value, extension)
    for magic, extension in _MAGIC:
        if value.startswith(magic):
            return Segment(value, extension)
    raise BadSample("unknown_medium", f"it begins with {value[:8]!r}, as no kind of medium that is read does")


MAX_BATCH_BYTES = 1 << 30


def _read_parquet(root: str, file: str, options: Options, path: str, group: int) -> Iterator[Found]:
    parquet = require("pyarrow.parquet", "prepare", "reading Parquet")
    path = os.path.join(root, path)
    try:
        with _open(path) as opened, parquet.ParquetFile(opened, memory_map=False) as table:
            first = sum(table.metadata.row_group(before).num_rows for before in range(group))
            names = _parquet_columns(table.schema_arrow)
            rows = max(1, table.metadata.row_group(group).num_rows)
            size = table.metadata.row_group(group).total_byte_size
            at_once = max(1, min(1024, rows * ITEM_BYTES // max(1, size)))
            if size > rows * MAX_SAMPLE_BYTES:
                raise BadSample("damaged_file", f"{size:,} bytes in {rows:,} rows")
            for batch in table.iter_batches(at_once, row_groups=[group], columns=names, use_threads=False):
                for record in batch.to_pylist():
                    first += 1
                    record = {name: value for name, value in record.items() if value is not None}
                    yield _found_in_record(root, path, f"{file}:{first}", "Parquet", record, options)
    except BadSample:
        raise
    except Exception as error:  # of pyarrow, and what a hostile file makes of it
        raise BadSample("damaged_file", f"row group {group}: {error}") from error


def _parquet_columns(schema: Any) -> list[str]:
    """Columns that may make a document: those that readers know by name, and media."""
    import pyarrow.types as types

    known = {"text", "meta", "texts", "images", "text_list", "image_info", *TEXT_COLUMNS}
    return [
        field.name
        for field in schema
        if field.name in known
        or types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]


def _read_media(root: str, file: str, options: Options, media: list[str], captions: list[str]) -> Iterator[Found]:
    """Files that share a name."""
    layout = "files that share a name" if len(media) + len(captions) > 1 else "media file"
    media, captions = ([os.path.join(root, name) for name in names] for names in (media, captions))
    yield _found(file, layout, b"", _document_of_group, media, captions, options)


def _read_table(
    root: str, file: str, options: Options, path: str, header: list[str], start: int, first: int, count: int, layout: str
) -> Iterator[Found]:
    """A document a row."""
    path = os.path.join(root, path)
    file_columns = [header.index(name) for name in FILE_COLUMNS if name in header]
    text_column = next((header.index(name) for name in TEXT_COLUMNS if name in header), None)
    with _open(path) as opened:
        lines = _Lines(opened, start, first)
        for _, row in zip(range(count), csv.reader(lines, TABLE_DIALECTS[_extension(path)]), strict=False):
            media = [row[column] for column in file_columns if column < len(row) and row[column]]
            text = (row[text_column] if text_column < len(row) else "") if text_column is not None else None
            yield _found(f"{file}:{lines.number}", layout, b"", _document_of_row, root, path, media, text, options)


def _read_librispeech(root: str, file: str, options: Options, path: str, sounds: list[str]) -> Iterator[Found]:
    """A line a recording: its name without extension, a space, what is said."""
    folder = os.path.join(root, os.path.dirname(path))
    recordings = {name.rsplit(".", 1)[0]: name for name in sounds}
    data = _read_file(os.path.join(root, path), MAX_LINE_BYTES)
    for number, line in enumerate(data.splitlines(), start=1):
        name, _, text = line.decode(errors="surrogateescape").strip().partition(" ")
        if name:
            sound = recordings.pop(name, None)
            media = [os.path.join(folder, sound)] if sound else []
            yield _found(f"{file}:{number}", "LibriSpeech", line, _document_of_media, media, text, options)
    for sound in recordings.values():
        name = os.path.join(os.path.dirname(file), os.fsencode(sound).decode(errors="replace"))
        yield Found(name, BadSample("not_in_table", "no line of the transcript names it"), "LibriSpeech")


def _read_tar(root: str, file: str, options: Options, path: str) -> Iterator[Found]:
    """The samples of a WebDataset shard."""
    with _open(os.path.join(root, path)) as opened:
        descriptor = opened.fileno()
        for sample in sample_ranges(file, descriptor, os.fstat(descriptor).st_size):
            name = f"{file}:{os.fsencode(sample.key).decode(errors='replace')}"
            if sample.trouble or sample.stop - sample.start > MAX_SAMPLE_BYTES:
                trouble = sample.trouble or f"{sample.stop - sample.start:,} bytes"
                yield Found(name, BadSample("unsafe_member", f"it holds {trouble}"), "WebDataset")
                continue
            block = os.pread(descriptor, sample.stop - sample.start, sample.start)
            yield _found(name, "WebDataset", b"", _document_of_block, sample.key, block)


def _document_of_block(key: str, block: bytes) -> Document:
    return document_from_sample(key, files_of_block(block))


READERS: dict[str, Callable[..., Iterator[Found]]] = {
    "rejected": _read_rejected,
    "text": _read_text,
    "json_lines": _read_json_lines,
    "parquet": _read_parquet,
    "media": _read_media,
    "table": _read_table,
    "librispeech": _read_librispeech,
    "tar": _read_tar,
}


def _found(file: str, layout: str, raw: bytes, make: Callable[..., Document], *arguments: Any) -> Found:
    try:
        return Found(file, make(*arguments), layout)
    except BadSample as error:
        return Found(file, error, layout, raw)
    except FileNotFoundError as error:
        return Found(file, BadSample("missing_file", str(error)), layout, raw)
    except (OSError, ValueError, TypeError) as error:  # ValueError: a path with a zero byte; TypeError: a record of other types
        return Found(file, BadSample("unreadable_file", str(error)), layout, raw)


def _document_of_text(data: bytes) -> Document:
    return Document((Segment(_decode(data)),))


def _document_of_group(media: list[str], captions: list[str], options: Options) -> Document:
    text = _decode(_read_file(captions[0], MAX_LINE_BYTES)) if captions else None
    return _document_of_media(media, text, options)


def _document_of_row(root: str, table: str, names: list[str], text: str | None, options: Options) -> Document:
    media = []
    for name in names:
        file = _beside(root, table, name)
        if file is None:
            raise BadSample("missing_file", f"{name!r} is not in the input folder")
        if _extension(file) not in options.extensions or _extension(file) not in MEDIA_EXTENSIONS:
            raise BadSample("ignored_extension", f"{file!r} is not of a kind that is read")
        media.append(file)
    return _document_of_media(media, text, options)


def _document_of_media(media: list[str], text: str | None, options: Options) -> Document:
    if not media:
        raise BadSample("missing_file", "no file is named, or none of that name is there")
    segments = [Segment(_read_file(file), _extension(file)) for file in media]
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


# -- files


def _open(path: str) -> BinaryIO:
    """Raises `BadSample` where `path` is a link or no plain file (a pipe would block for ever)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadSample("ignored_link", f"{path!r} is no plain file")
    return os.fdopen(descriptor, "rb")


def _read_file(path: str, limit: int = MAX_SAMPLE_BYTES) -> bytes:
    with _open(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise BadSample("file_too_large", f"{path!r} has {size:,} bytes; at most {limit:,} are read")
        return file.read(limit)


def _lines(file: BinaryIO) -> Iterator[bytes | BadSample]:
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


class _Range(io.RawIOBase):
    """The bytes [start, stop) of a file."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        self._file, self._left = file, max(0, stop - start)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def _paragraph_after(file: BinaryIO, place: int, limit: int) -> int:
    """The first place from `place` on where a paragraph begins, else a line, a word, a character; the borders of parts."""
    size = os.fstat(file.fileno()).st_size
    if place in (0, size):
        return place
    file.seek(place)
    window = file.read(min(limit, 1 << 16))
    cuts = (at + len(mark) for mark in (b"\n\n", b"\n", b" ") if (at := window.find(mark)) >= 0)
    characters = (at for at in range(min(4, len(window))) if window[at] & 0xC0 != 0x80)
    return place + (next(cuts, 0) or next(characters, 0))


def _pieces(file: Any, limit: int) -> Iterator[bytes]:
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


def _relative(root: str, *path: str) -> str:
    joined = os.path.join(*path)
    return joined[len(root) :].lstrip(os.sep) if joined.startswith(os.path.join(root, "")) else os.path.relpath(joined, root)


def _extension(file: str) -> str:
    parts = os.path.basename(file).lower().split(".")
    return ".".join(parts[-2:] if parts[-1] in ("gz", "zst") else parts[-1:]) if len(parts) > 1 else ""


def _folders(folder: str) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}


def _is_link(path: str) -> bool:
    return os.path.islink(path)


def _beside(root: str, path: str, name: str) -> str | None:
    """The plain file of that name beside `path`; None where there is none, or outside the root."""
    inside = os.path.realpath(root)
    for folder in TABLE_FOLDERS:
        candidate = os.path.join(os.path.dirname(path), folder, name)
        with suppress(OSError, ValueError):  # ValueError: a zero byte
            if stat.S_ISREG(os.lstat(candidate).st_mode) and Path(os.path.realpath(candidate)).is_relative_to(inside):
                return candidate
    return None


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

    def add(self, digest: bytes) -> None:
        self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))

    def __contains__(self, digest: bytes) -> bool:
        return self._database.execute("SELECT 1 FROM seen WHERE digest = ?", (digest,)).fetchone() is not None


def read_texts(input: Path) -> Iterator[str]:
    """The texts alone, cleaned, of a text file or a folder of them; what cannot be read is left out."""
    input = input.resolve()
    options = Options(kind="text")
    with DigestSet(Path(":memory:")) as named:
        for item in list_items(input, options, named):
            for found in read_item(str(input if input.is_dir() else input.parent), item, options):
                if isinstance(found.content, Document):
                    yield from (clean_text(segment.text) for segment in found.content.segments)


def evaluation_texts(path: str) -> Iterator[str]:
    """Every text of an evaluation set: a text file whole, each string of JSON lines, each cell of a table or of Parquet.

    Raises:
        ValueError: the file cannot be read, or is of another kind.
    """
    extension = _extension(path)
    try:
        if extension in TEXT_EXTENSIONS:
            yield _decode(_read_file(os.path.realpath(path)))
        elif extension in JSON_EXTENSIONS:
            with _open(os.path.realpath(path)) as file:
                for line in _lines(DECOMPRESSORS[extension](file)):
                    if isinstance(line, BadSample):
                        raise line
                    if line.strip():
                        yield from evaluation_strings(json.loads(line))
        elif extension in TABLE_DIALECTS:
            with _open(os.path.realpath(path)) as file:
                for row in csv.reader(_Lines(file, 0), TABLE_DIALECTS[extension]):
                    yield from row
        elif extension == "parquet":
            parquet = require("pyarrow.parquet", "prepare", "reading Parquet")
            with parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(1024):
                    yield from evaluation_strings(batch.to_pylist())
        else:
            known = (*TEXT_EXTENSIONS, *JSON_EXTENSIONS, *TABLE_DIALECTS, "parquet")
            raise ValueError(f"the evaluation set {path!r} is none of *.{', *.'.join(known)}")
    except (OSError, EOFError, zlib.error, csv.Error, json.JSONDecodeError, BadSample) as error:
        raise ValueError(f"the evaluation set {path!r} cannot be read: {error}") from error
