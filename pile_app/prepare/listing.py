"""What there is to read for `pile prepare`: a folder of users to items.

    folder ──► list_items ──► Item(reader, arguments)

Listing is quick and happens once, in one process; an item is some megabytes of input, which any process can read at any time
(`readers.py`). Layouts are known by the names of files; in a table or record they name files beside it, or in `clips/`,
`images/` or `audio/` there, and never outside the input folder.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pile_app.documents import AUDIO_EXTENSIONS, BadSample
from pile_app.prepare.files import (
    DECOMPRESSORS,
    MAX_LINE_BYTES,
    extension,
    file_beside,
    lines_of,
    open_plain,
    read_file,
    table_lines,
)
from pile_app.prepare.labels import TEXT_COLUMNS, label_column, split_in_path
from pile_app.prepare.options import (
    JSON_EXTENSIONS,
    MEDIA_EXTENSIONS,
    TABLE_EXTENSIONS,
    TAGGED_EXTENSIONS,
    TEXT_EXTENSIONS,
    Options,
    require,
)


class TabSeparated(csv.excel_tab):
    quoting = csv.QUOTE_NONE  # a lone quote in a caption would swallow the rows up to the next one


TABLE_DIALECTS = {"csv": csv.excel, "tsv": TabSeparated}
FILE_COLUMNS = ("image", "audio", "file", "file_name", "path")
ITEM_BYTES = 1 << 24  # longer plain files are cut


class Item(NamedTuple):
    """A part of the input: the reader's name and JSON arguments, the first one a name for people; bytes to read."""

    reader: str
    arguments: list[Any]
    weight: int = 0


def split_of(item: Item) -> str | None:
    """The split that its path names, of what is read."""
    if item.reader == "rejected":
        return None
    path: str = item.arguments[2][0] if item.reader == "media" else item.arguments[0]
    return split_in_path(re.sub(r":\d+$", "", path) if item.reader == "labelled" else path)


def list_items(input: Path, options: Options, stamp: Callable[[bytes], Any] = len) -> Iterator[Item]:
    """Everything under a folder (or one file) that the options ask for: tables first, then folder by folder, sorted.

    Args:
        input: an absolute path.
        stamp: is called with path, size and time of change of every file.
    """
    wanted = options.extensions
    root = str(input if input.is_dir() else input.parent)
    named: set[str] | None = None  # files that tables name, where there are tables
    records: list[str] = []  # folders whose media belong to interleaved records
    for folder, names, _ in _walk(input):
        voice = "validated.tsv" in names and os.path.isdir(os.path.join(folder, "clips"))
        for name in names:
            path = os.path.join(folder, name)
            if extension(name) in TABLE_EXTENSIONS and extension(name) in wanted and not os.path.islink(path):
                if voice and name != "validated.tsv":
                    yield _rejected(root, path, "other_table", "of Common Voice, validated.tsv is read")
                else:
                    named = set() if named is None else named
                    layout = "Common Voice" if voice else "table"
                    yield from _guarded(root, path, _list_table(root, path, layout, options, named))
            elif extension(name) in JSON_EXTENSIONS and options.kind in ("auto", "interleaved") and _is_interleaved(path):
                records.append(os.path.join(folder, ""))
        if options.kind == "chat":  # media are those that conversations name
            records.append(os.path.join(folder, ""))
    for folder, names, skipped in _walk(input):
        for name in skipped:
            yield _rejected(root, os.path.join(folder, name), "ignored_folder", "hidden folders and links are not followed")
        sizes: dict[str, int] = {}
        for name in names:
            path = os.path.join(folder, name)
            about = os.lstat(path)
            if stat.S_ISREG(about.st_mode):
                sizes[name] = about.st_size
                stamp(os.fsencode(_relative(root, path)) + f"\0{about.st_size}\0{about.st_mtime_ns}".encode())
            else:
                yield _rejected(root, path, "ignored_link", "links, devices and pipes are not read")
        is_recorded = os.path.join(folder, "").startswith(tuple(records))
        yield from _list_folder(root, folder, sizes, options, named, is_recorded)


def _list_folder(
    root: str, folder: str, sizes: dict[str, int], options: Options, named: set[str] | None, is_recorded: bool
) -> Iterator[Item]:
    """What the plain files of a folder, name -> bytes, are read as."""
    wanted = options.extensions
    media_names = {name for name in sizes if extension(name) in MEDIA_EXTENSIONS and extension(name) in wanted}
    spoken = _librispeech(sizes) if options.kind in ("auto", "audio") else {}
    taken = {name for names in spoken.values() for name in names} | (media_names if is_recorded else set())
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sizes:
        groups[name.rsplit(".", 1)[0]].append(name)
    for group in groups.values():
        media = [name for name in group if name in media_names and name not in taken]
        captions = [name for name in group if media and extension(name) == "txt"]
        if named is not None:
            for path in (os.path.join(folder, name) for name in media + captions):
                if path not in named:
                    yield _rejected(root, path, "not_in_table", "no row of a table names it")
        elif media:
            layout = "files that share a name" if len(media) + len(captions) > 1 else "media file"
            files, texts = ([_relative(root, folder, name) for name in names] for names in (media, captions))
            yield Item("media", [files[0], layout, files, None, texts], sum(sizes[name] for name in media + captions))
        for name in group:
            path = os.path.join(folder, name)
            if name in spoken:
                yield from _guarded(root, path, _list_librispeech(root, path, spoken[name], sizes))
            elif name in taken or name in media or name in captions:
                continue
            elif extension(name) in LISTERS and extension(name) in wanted:
                yield from _guarded(root, path, LISTERS[extension(name)](root, path, sizes[name]))
            elif extension(name) not in wanted and not (is_recorded and extension(name) in MEDIA_EXTENSIONS):
                yield _rejected(root, path, "ignored_extension", f"only *.{', *.'.join(wanted)} are read")


def _guarded(root: str, path: str, items: Iterator[Item]) -> Iterator[Item]:
    """The items; what cannot be listed is rejected, and what comes before it stays."""
    try:
        yield from items
    except BadSample as error:
        yield _rejected(root, path, error.reason, error.detail)
    except (OSError, csv.Error) as error:
        yield _rejected(root, path, "damaged_file", str(error))


def _rejected(root: str, path: str, reason: str, detail: str, layout: str = "") -> Item:
    return Item("rejected", [_relative(root, path), reason, detail, layout])


def _list_file(reader: str, root: str, path: str, size: int) -> Iterator[Item]:
    yield Item(reader, [_relative(root, path)], size)


def _list_ranges(reader: str, root: str, path: str, size: int) -> Iterator[Item]:
    """A long file in parts, [start, stop) in bytes; who reads one finds its first line or paragraph."""
    parts = max(1, size // ITEM_BYTES)
    for start, stop in pairwise(size * part // parts for part in range(parts + 1)):
        yield Item(reader, [_relative(root, path), start, stop, parts > 1], stop - start)


def _list_parquet(root: str, path: str, _: int) -> Iterator[Item]:
    parquet = require("pyarrow.parquet", "prepare", "reading Parquet")
    try:
        with open_plain(path) as file, parquet.ParquetFile(file, memory_map=False) as opened:
            groups = range(opened.metadata.num_row_groups)
            sizes = [opened.metadata.row_group(group).total_byte_size for group in groups]
    except Exception as error:  # of pyarrow, and what a hostile footer makes of it
        raise BadSample("damaged_file", str(error)) from error
    for group, size in enumerate(sizes):
        yield Item("parquet", [_relative(root, path), group], max(0, size))


LISTERS: dict[str, Callable[[str, str, int], Iterator[Item]]] = {
    **dict.fromkeys(TEXT_EXTENSIONS, partial(_list_ranges, "text")),
    "jsonl": partial(_list_ranges, "json_lines"),
    "jsonl.gz": partial(_list_file, "json_lines"),
    "jsonl.zst": partial(_list_file, "json_lines"),
    "parquet": _list_parquet,
    **dict.fromkeys(("json", "yml", "yaml"), partial(_list_file, "conversations")),
    **dict.fromkeys(TAGGED_EXTENSIONS, partial(_list_file, "conll")),
    "tar": partial(_list_file, "tar"),
}


def _list_table(root: str, path: str, layout: str, options: Options, named: set[str]) -> Iterator[Item]:
    """An item a row; the files that rows name are noted in `named`."""
    with open_plain(path) as file:
        rows = csv.reader(table_lines(file), TABLE_DIALECTS[extension(path)])
        header = list(options.columns) or [name.strip().lower() for name in next(rows, [])]
        file_columns = [name for name in FILE_COLUMNS if name in header]
        text_column = next((name for name in TEXT_COLUMNS if name in header), None)
        label = label_column(header, options) if layout == "table" else None
        if not file_columns and not label:
            detail = f"the table has columns {header}; one of {', '.join(FILE_COLUMNS)} has to name the file, or one the label"
            raise BadSample("no_file_column", detail)
        for row in rows:
            cells = dict(zip(header, row, strict=False))
            if label and not file_columns:
                arguments = [_relative(root, f"{path}:{rows.line_num}"), "labelled table", [], cells]
                yield Item("labelled", arguments, sum(map(len, row)))
                continue
            names = [cells[column] for column in file_columns if cells.get(column)]
            text = cells.get(text_column, "") if text_column is not None else None
            line = f"{path}:{rows.line_num}"
            try:
                media = _files_of_row(root, path, names, options)
            except BadSample as error:
                yield _rejected(root, line, error.reason, error.detail, layout)
                continue
            named.update(media)
            files = [_relative(root, one) for one in media]
            size = sum(map(os.path.getsize, media))
            if label:
                yield Item("labelled", [_relative(root, line), "labelled table", files, cells], size)
            else:
                yield Item("media", [_relative(root, line), layout, files, text, []], size)


def _files_of_row(root: str, table: str, names: list[str], options: Options) -> list[str]:
    if not names:
        raise BadSample("missing_file", "no file is named")
    files = []
    for name in names:
        file = file_beside(root, table, name)
        if file is None:
            raise BadSample("missing_file", f"{name!r} is not in the input folder")
        if extension(file) not in options.extensions or extension(file) not in MEDIA_EXTENSIONS:
            raise BadSample("ignored_extension", f"{file!r} is not of a kind that is read")
        files.append(file)
    return files


def _is_interleaved(path: str) -> bool:
    """By the first record."""
    try:
        with open_plain(path) as file:
            for line in lines_of(DECOMPRESSORS[extension(path)](file)):
                if isinstance(line, bytes) and line.strip():
                    record = json.loads(line)
                    return isinstance(record, dict) and bool({"text_list", "texts"} & record.keys())
    except (OSError, EOFError, ValueError, zlib.error, RecursionError):
        pass  # who reads it says what is wrong
    return False


def _librispeech(names: Iterable[str]) -> dict[str, list[str]]:
    """Transcripts `84-121123.trans.txt` -> recordings `84-121123-0000.flac` ... of a folder."""
    transcripts = {name.removesuffix(".trans.txt") + "-": name for name in names if name.endswith(".trans.txt")}
    found: dict[str, list[str]] = {name: [] for name in transcripts.values()}
    for name in names:
        if extension(name) in AUDIO_EXTENSIONS and (prefix := name.rpartition("-")[0] + "-") in transcripts:
            found[transcripts[prefix]].append(name)
    return {name: sounds for name, sounds in found.items() if sounds}


def _list_librispeech(root: str, path: str, sounds: list[str], sizes: dict[str, int]) -> Iterator[Item]:
    """An item a line: the name of a recording without extension, a space, what is said."""
    folder = os.path.dirname(path)
    recordings = {name.rsplit(".", 1)[0]: name for name in sounds}
    for number, line in enumerate(read_file(path, MAX_LINE_BYTES).splitlines(), start=1):
        name, _, text = line.decode(errors="surrogateescape").strip().partition(" ")
        if sound := recordings.pop(name, None):
            arguments = [_relative(root, f"{path}:{number}"), "LibriSpeech", [_relative(root, folder, sound)], text, []]
            yield Item("media", arguments, sizes[sound])
        elif name:
            yield _rejected(root, f"{path}:{number}", "missing_file", f"no recording is called {name!r}", "LibriSpeech")
    for sound in recordings.values():
        detail = "no line of the transcript names it"
        yield _rejected(root, os.path.join(folder, sound), "not_in_table", detail, "LibriSpeech")


def _walk(input: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, names of its files, names of folders that are not followed), sorted, top down."""
    if input.is_file():
        yield str(input.parent), [input.name], []
        return
    for folder, folders, names in os.walk(input):
        skipped = sorted(name for name in folders if name.startswith(".") or os.path.islink(os.path.join(folder, name)))
        folders[:] = sorted(set(folders) - set(skipped))
        yield folder, sorted(names), skipped


def _relative(root: str, *path: str) -> str:
    return os.path.join(*path).removeprefix(os.path.join(root, ""))
