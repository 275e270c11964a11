"""Read rows of tables: CSV in any dialect, JSON lines and arrays, Parquet and Arrow files, and lists of `name text`.

A table with a column of existing file names is the index of those files. A row that does not fit the header, a quote that is
not closed, a record that is no object: each gives a `BadSample` with its line, and the rows after it are read."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

from pile_app.documents import AUDIO_EXTENSIONS, BadSample
from pile_app.fields import as_list, is_texts
from pile_app.infer import GROUP_NAMES, LABEL_NAMES, TEXT_NAMES
from pile_app.prepare import files
from pile_app.prepare.entities import SPAN_FIELDS, TAG_FIELDS, document_of_record
from pile_app.prepare.files import MEDIA, File, Tree, decode_text, extension, lines_of, open_plain, open_text, read_text
from pile_app.prepare.layouts import named_split
from pile_app.prepare.options import require
from pile_app.records import is_interleaved

FILE_NAMES = ("image", "audio", "file", "file_name", "filename", "path")
KNOWN_COLUMNS = {*TEXT_NAMES, *LABEL_NAMES, *GROUP_NAMES, *FILE_NAMES, "id", "split"}
PREVIEW = 100  # rows that show which columns name files
MAX_LABELS = 50
MAX_QUOTED = 10_000  # lines in a quoted cell
csv.field_size_limit(files.MAX_LINE_BYTES)
_UNDECODED = re.compile("[\ud800-\udfff]")
_LAYOUTS = {"csv": "table", "lines": "JSON lines", "json": "JSON", "parquet": "Parquet", "arrow": "Arrow"}


class Undecoded(BadSample):
    """A row in an unknown encoding. row: the row as Latin-1, which shows the files that it names."""

    def __init__(self, detail: str, row: Any) -> None:
        super().__init__("invalid_utf8", detail)
        self.row = row


def shown(row: Any) -> Any:
    return row.row if isinstance(row, Undecoded) else row


@dataclass(frozen=True)
class Table:
    """Describe a table, or a part of it: JSON lines from byte `start` to `stop`, or a row group of Parquet.

    format: csv, lines, json, parquet or arrow; columns: of a CSV file; files: columns that name files; nested: records name
    files at any depth; tagged: rows are texts with entities; classes: column -> names of its classes."""

    name: str
    real: str
    format: str
    encoding: str = ""
    columns: tuple[str, ...] = ()
    has_header: bool = True
    delimiter: str = ","
    escape: str = ""
    files: tuple[str, ...] = ()
    nested: bool = False
    tagged: bool = False
    split: str | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    start: int = 0
    stop: int = 0
    group: int = -1

    @property
    def is_index(self) -> bool:
        return bool(self.files or self.nested)

    @property
    def layout(self) -> str:
        name = "list of names and texts" if self.delimiter == " " else _LAYOUTS[self.format]
        return f"entities ({name})" if self.tagged else f"{name} of files" if self.is_index else name


def rows(table: Table) -> Iterator[tuple[str, Any]]:
    """Yield (`file:line`, the row or why it cannot be read) of each row.

    Raises BadSample, OSError, EOFError: the file is damaged; rows before the damage are yielded."""
    for number, row in READERS[table.format](table):
        if isinstance(row, dict):
            row = {name: value for name, value in row.items() if value is not None}
            row |= {name: _class_names(row[name], names) for name, names in table.classes.items() if name in row}
        elif not isinstance(row, BadSample):
            row = BadSample("no_object", f"the record is {row!r:.80}, not an object with fields")
        yield f"{table.name}{number}", row


def _class_names(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_names(one, names) for one in value]
    if isinstance(value, str) and value.isdecimal() and value not in names:  # of a CSV file
        value = int(value)
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


# -- CSV


def _csv_rows(table: Table) -> Iterator[tuple[str, Any]]:
    with open_text(table.real, table.encoding)[0] as file:
        for line, cells in islice(_cells(file, table), int(table.has_header), None):
            yield f":{line}", cells if isinstance(cells, BadSample) else _row(cells, table)


def _row(cells: list[str], table: Table) -> Any:
    if is_damaged := bool(_UNDECODED.search("".join(cells))):
        cells = [cell.encode("utf-8", "surrogateescape").decode("latin-1") for cell in cells]
    if len(cells) != len(table.columns):
        wanted = f"{len(table.columns)}: {', '.join(table.columns)}"
        return BadSample("row_width", f"the row has {len(cells)} cells instead of {wanted:.200}. Quote the texts")
    row = dict(zip(table.columns, cells, strict=True))
    return Undecoded("the row is not UTF-8: give --encoding, e.g. cp1252 or latin-1", row) if is_damaged else row


def _cells(file: BinaryIO, table: Table) -> Iterator[tuple[int, list[str] | BadSample]]:
    """Yield (line, cells or the error) of each row. A quote that `MAX_QUOTED` lines do not close costs its own line only."""
    source, pending, number = lines_of(file), deque[bytes | BadSample](), 1
    while (line := pending.popleft() if pending else next(source, None)) is not None:
        taken = [line]
        cells = line if isinstance(line, BadSample) else _parse(line, table, number == 1)
        while cells is None and len(taken) < MAX_QUOTED and (more := pending.popleft() if pending else next(source, None)):
            taken.append(more)
            if isinstance(more, BadSample):
                break
            if b'"' in more:
                cells = _parse(b"".join(taken), table, number == 1)  # type: ignore[arg-type]
        if cells is None:
            again = f"; the {len(taken) - 1:,} lines after it are read again" * (len(taken) > 1)
            cells = BadSample("unclosed_quote", f"a quote opens in line {number} and is not closed{again}")
            pending.extendleft(reversed(taken[1:]))
            del taken[1:]
        if cells:
            yield number, cells
        number += len(taken)


def _parse(data: bytes, table: Table, is_first: bool) -> list[str] | None:
    """Split a row; None if a quote is open."""
    text = data.decode("utf-8-sig" if is_first else "utf-8", "surrogateescape")
    if not text.strip():
        return []
    if table.delimiter == " ":
        return [*text.strip().split(None, 1), ""][:2]
    if table.delimiter in "\t|\x1f":  # never quoted: a lone quote in a caption would swallow the rows up to the next
        return [_unquoted(cell.strip()) for cell in text.rstrip("\r\n").split(table.delimiter)]
    for strict in (True, False):  # not strict: a quote within a cell
        try:
            escape = table.escape or None
            return next(csv.reader([text], delimiter=table.delimiter, escapechar=escape, skipinitialspace=True, strict=strict))
        except csv.Error as error:
            if "end of data" in str(error):
                return None
    return [text]


def _unquoted(cell: str) -> str:
    """Remove the quotes that spreadsheets add where a text contains quotes."""
    inner = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if '"' not in inner != cell[1:-1] and cell[0] == cell[-1] == '"' else cell


def _sniff_csv(table: Table, tree: Tree) -> Table:
    """Find the delimiter, and whether the first row is a header; name the columns that have no header by their content."""
    with open_text(table.real, table.encoding)[0] as file:
        head = file.read(1 << 18)
    if b"\0" in head:
        raise BadSample("damaged_file", "it holds bytes that are no text")
    lines = head.splitlines(keepends=True)[: 2 * PREVIEW]
    head = b"".join(lines[:-1] if len(head) == 1 << 18 and len(lines) > 1 else lines)
    best, chosen, found = (False, False, 0.0), table, list[list[str]]()
    for delimiter in "\t|\x1f" if extension(table.name) == "tsv" else ",\t;|\x1f":
        for escape in ("", "\\") if delimiter in ",;" and b'\\"' in head else ("",):
            trial = replace(table, delimiter=delimiter, escape=escape)
            cells = [row for _, row in _cells(io.BytesIO(head), trial) if not isinstance(row, BadSample)]
            width = len(cells[0]) if cells else 0
            even = [row for row in cells if len(row) == width]
            fits = len(even) / max(1, len(cells))
            names_files = any(_is_media(column[1:] or column, tree, table.name) for column in zip(*even, strict=True))
            score = names_files, width > 1, fits
            if not found or ((width > 1 or delimiter in ",\x1f") and fits >= (0.5 if width > 1 else 1) and score > best):
                best, chosen, found = score, trial, cells
    if not found:
        raise BadSample("empty_file", "the table holds no row")
    has_header = _is_header(found, tree, table.name)
    body = [row for row in found if len(row) == len(found[0])][has_header:]
    names = [cell.strip() for cell in found[0]] if has_header else _names_by_content(body, tree, table.name)
    names = [f"{name}.{names[:n].count(name)}" if name and name in names[:n] else name for n, name in enumerate(names)]
    return replace(chosen, columns=tuple(name or f"column_{n}" for n, name in enumerate(names)), has_header=has_header)


def _is_header(found: Sequence[Sequence[str]], tree: Tree, name: str) -> bool:
    first, body = [stripped for cell in found[0] if (stripped := cell.strip())], found[1:]  # spreadsheets add empty columns
    has_number = any(map(_is_number, first))
    if any(cell.lower() in KNOWN_COLUMNS for cell in first) and not has_number:
        return True
    if has_number or len({*first}) < max(2, len(first)) or any(len(cell) > 60 or cell.count(" ") > 4 for cell in first):
        return False
    repeats = any(cell and cell == other for row in body for cell, other in zip(first, row, strict=False))
    return not repeats and not any(cell and tree.resolve(name, cell) for cell in first)


def _names_by_content(body: Sequence[Sequence[str]], tree: Tree, name: str) -> list[str]:
    """Name the columns of a table without header: the file, the label, the texts."""
    columns = [[cell.strip() for cell in cells] for cells in zip(*body, strict=True)]
    names = {n: f"column_{n}" for n in range(len(columns))}
    media = [n for n, cells in enumerate(columns) if _is_media(cells, tree, name)]
    for n in media[:1]:
        file = next(file for cell in columns[n] if (file := tree.resolve(name, cell)))
        names[n] = "audio" if extension(file.name) in AUDIO_EXTENSIONS else "image"
    rest = [n for n in names if n not in media]
    prose = [n for n in rest if sum(" " in cell for cell in columns[n]) > len(body) / 2]
    numbers = {n for n in rest if all(map(_is_number, columns[n]))}
    most = {n: max(2, min(MAX_LABELS if n in numbers else len(body), len(body) * 0.8)) for n in rest}
    labels = sorted((n for n in rest if n not in prose and len({*columns[n]}) <= most[n]), key=lambda n: n in numbers)
    labels = [n for n in labels if not any(re.fullmatch(r"\d+\.\d*", cell) for cell in columns[n])]
    if not prose and media:  # transcripts of one word, not names such as n01443537
        prose = [n for n in rest if n not in numbers and not any(map(str.isdigit, "".join(columns[n])))][-1:]
    texts = ("text", "normalized_text") if media else ("title", "text") if len(prose) == 2 else ("text",)
    names |= dict(zip(prose, texts, strict=False)) if len(prose) <= 2 else {}
    names |= dict.fromkeys([n for n in labels if n not in prose][:1], "label")
    return list(names.values())


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[0-9.,]+(e[-+]?\d+)?%?", cell.strip().lower()))


# -- JSON, YAML, Parquet, Arrow


def _json_lines(table: Table) -> Iterator[tuple[str, Any]]:
    file, start = open_text(table.real, table.encoding, table.start, table.stop)
    with file:
        for number, line in enumerate(lines_of(file), start=1):
            if isinstance(line, BadSample) or line.strip():
                name = f":@{start}+{number}" if table.stop else f":{number}"  # the line after that byte
                yield name, line if isinstance(line, BadSample) else _parsed(line)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(decode_text(data))
    except BadSample as error:
        with suppress(ValueError, RecursionError):
            return Undecoded(error.detail, json.loads(data.decode("latin-1")))
        return error
    except (ValueError, RecursionError) as error:
        return BadSample("invalid_json", str(error))


def _json_file(table: Table) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file; if its encoding is unknown, an error for each record."""
    found = _parsed(read_text(table.real, table.encoding))
    content = shown(found)
    if isinstance(content, BadSample):
        raise content
    if isinstance(content, dict):
        content = _records_of(content)
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        yield f":{number}", Undecoded(found.detail, record) if isinstance(found, Undecoded) else record


def _records_of(content: dict[str, Any]) -> list[Any]:
    """Find the records: COCO, captions by file, files by class or split, `{"data": [...]}`, an object a key, or the object."""
    lists = {name: value for name, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    if content and all(extension(key) in MEDIA and isinstance(value, str | list) for key, value in content.items()):
        return [{"file": key, "captions" if isinstance(value, list) else "text": value} for key, value in content.items()]
    if len(content) > 1 and all(
        is_texts(some) and all("/" in one and " " not in one for one in some) for some in content.values()
    ):
        column = "split" if all(map(named_split, content)) else "label"
        return [{"file": file, column: name} for name, some in content.items() for file in some]
    if "images" in lists and "annotations" in lists:
        captions: dict[Any, list[str]] = defaultdict(list)
        for one in lists["annotations"]:
            if isinstance(one.get("caption"), str):
                captions[one.get("image_id")].append(one["caption"])
        if not captions:
            raise BadSample("no_caption", "its annotations are no captions")
        return [{"image": one.get("file_name"), "captions": captions[one.get("id")]} for one in lists["images"]]
    if len(lists) == 1 and not content.keys() & {"messages", "conversations", "segments", "text"}:
        return next(iter(lists.values()))
    if len(content) > 1 and all(isinstance(value, dict) for value in content.values()):
        return [{"key": key} | value for key, value in content.items()]
    return [content]


@contextmanager
def columnar(table: Table) -> Iterator[Any]:
    """Open a Parquet or Arrow file. Raises `BadSample` for the many kinds of errors that pyarrow raises for hostile files."""
    is_parquet = table.format == "parquet"
    library = require(f"pyarrow.{'parquet' if is_parquet else 'ipc'}", "prepare", f"reading {_LAYOUTS[table.format]} files")
    try:
        with open_plain(table.real) as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            if is_parquet:
                yield library.ParquetFile(file, memory_map=False)
            else:
                yield library.open_stream(file) if is_stream else library.open_file(file)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("damaged_file", f"{error}"[:300]) from error


def _columnar_rows(table: Table) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a row group of Parquet, or of an Arrow file or stream."""
    number = 0
    with columnar(table) as batches:
        if table.format == "parquet":
            groups = [batches.metadata.row_group(group) for group in range(batches.metadata.num_row_groups)]
            number = sum(group.num_rows for group in groups[: max(0, table.group)])
            chosen = list(range(len(groups)) if table.group < 0 else [table.group])
            row_bytes = max((groups[n].total_byte_size // max(1, groups[n].num_rows) for n in chosen), default=0)
            if row_bytes > files.MAX_FILE_BYTES:
                raise BadSample("damaged_file", f"{row_bytes:,} bytes a row")
            at_once = max(1, min(1024, (1 << 24) // max(1, row_bytes)))
            batches = batches.iter_batches(at_once, row_groups=chosen, use_threads=False)
        elif hasattr(batches, "num_record_batches"):
            batches = map(batches.get_batch, range(batches.num_record_batches))
        found = (row for batch in batches for row in batch.to_pylist())
        yield from ((f":{line}", row) for line, row in enumerate(found, start=number + 1))


def _classes(table: Table) -> dict[str, list[str]]:
    """Read column -> names of its classes, as Hugging Face's `datasets` writes them into the schema."""
    with columnar(table) as opened:
        about = (opened.schema_arrow if table.format == "parquet" else opened.schema).metadata or {}
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        features = json.loads(about[b"huggingface"])["info"]["features"]
        inner = {name: about[0] if isinstance(about, list) else about.get("feature", about) for name, about in features.items()}
        return {name: list(map(str, about["names"])) for name, about in inner.items() if isinstance(about.get("names"), list)}
    return {}


READERS = {"csv": _csv_rows, "lines": _json_lines, "json": _json_file} | dict.fromkeys(("parquet", "arrow"), _columnar_rows)


# -- the form and the meaning of a table


def sniff(tree: Tree, file: File, format: str, encoding: str = "") -> tuple[Table, list[dict[str, Any]]]:
    """Describe the table in a file by its content, and return its first rows. Raises BadSample, OSError, EOFError."""
    table = Table(file.name, file.real, format, encoding)
    if file.size < 1024 and files.read_file(file.real).startswith(b"version https://git-lfs"):
        raise BadSample("lfs_pointer", "it is a pointer of Git LFS: fetch the data with git lfs pull")
    if format == "csv":
        table = _sniff_csv(table, tree)
    elif format == "list":
        table = replace(table, format="csv", delimiter=" ", has_header=False, columns=("file", "text"))
    elif format == "json":
        table = replace(table, format="lines" if _is_lines(table) else "json")
    elif format in ("parquet", "arrow"):
        table = replace(table, classes=_classes(table))
    found = [shown(row) for _, row in islice(rows(table), PREVIEW)]
    if not found:
        raise BadSample("empty_file", "it holds no row")
    preview = [row for row in found if isinstance(row, dict)]
    named = [] if any(map(is_interleaved, preview)) else _naming_columns(table, preview, tree)
    nested = not named and any(True for row in preview for _ in named_within(tree, table.name, row))
    return replace(table, files=tuple(named), nested=nested, tagged=any(map(_is_tagged, preview))), preview


def _is_lines(table: Table) -> bool:
    """Tell whether JSON is one value a line."""
    is_named = extension(table.name) in ("jsonl", "ndjson")
    with open_text(table.real, table.encoding)[0] as opened:
        first = next((line for line in iter(partial(opened.readline, files.MAX_LINE_BYTES), b"") if line.strip()), b"")
        more = opened.read(1 << 16).strip()
    is_object = first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    if not isinstance(shown(_parsed(first)), BadSample):
        return bool(more) or (is_named and is_object)
    return (is_named and len(first.strip()) > 2) or (is_object and more.startswith(b"{"))  # its first line is damaged


def _is_tagged(row: Mapping[str, Any]) -> bool:
    try:
        return any(row.get(name) for name in SPAN_FIELDS + TAG_FIELDS) and document_of_record(row, str) is not None
    except BadSample:
        return True


def _naming(values: Sequence[Any], tree: Tree, name: str, is_list: bool = False) -> tuple[bool, bool]:
    """Tell whether values name files of the input, and whether they do or look as if they did."""
    texts = [one for value in values for one in as_list(value) if isinstance(one, str) and one]
    if is_list:  # of names and texts: a word is no name of a file
        texts = [text if re.search(r"[\d.]", text) else "" for text in texts]
    hits = [tree.resolve(name, text) for text in texts]
    found = sum(file is not None and extension(file.name) in MEDIA for file in hits)
    looks = sum(extension(text) in MEDIA and " " not in text.strip() for text in texts)
    is_naming = bool(found) and max(found, looks) >= len(texts) / 2
    return is_naming, is_naming or looks > len(texts) / 2


def _is_media(cells: Sequence[str], tree: Tree, table: str) -> bool:
    """Tell whether a column of a CSV file names files of the input."""
    return _naming(cells, tree, table)[0] and _are_ids("id", cells)


def _naming_columns(table: Table, preview: Sequence[dict[str, Any]], tree: Tree) -> list[str]:
    """Find the columns that name files."""
    columns = {name: [row[name] for row in preview if name in row] for name in dict.fromkeys(n for row in preview for n in row)}
    verdicts = {name: _naming(values, tree, table.name, table.delimiter == " ") for name, values in columns.items()}
    found = [name for name in columns if verdicts[name][0]]
    exact = [name for name in found if any(extension(f"{value}") in MEDIA for value in columns[name])]
    if not found and not any(is_held(value) for row in preview for value in row.values()):  # all files are missing
        exact = [name for name in columns if verdicts[name][1]]
    return exact or [name for name in found if _are_ids(name, columns[name])][:1]


def is_held(value: Any) -> bool:
    """Tell whether a value holds a medium, as Hugging Face's Parquet files do."""
    return isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)


def _are_ids(name: str, values: Sequence[Any]) -> bool:
    """Tell whether values without extension may well be names of files, rather than labels or numbers."""
    is_named = re.search("id|file|name|image|audio|path|key|utt", name.lower())
    return len({*map(str, values)}) > len(values) / 2 and bool(is_named or not all(_is_number(f"{value}") for value in values))


def named_within(tree: Tree, table: str, value: Any) -> Iterator[tuple[str, File]]:
    """Yield (name as written, file) of the files that a record names, at any depth."""
    if isinstance(value, str) and extension(value[-12:]) in MEDIA and (file := tree.resolve(table, value)):
        yield value, file
    for one in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from named_within(tree, table, one)
