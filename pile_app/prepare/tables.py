"""Rows of tables: CSV in any dialect, JSON lines and arrays, Parquet and Arrow files, and lists of `name text`.

    sniff(tree, file) ──► Table ──► rows(table) ──► (where, {column: value} or BadSample, bytes read)

A table whose column names files that exist is the index of those files. Rows that do not fit their header, quotes that are not
closed, records that are no objects: each is one `BadSample` with its line, and the rows after it are read.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

from pile_app.documents import AUDIO_EXTENSIONS, BadSample
from pile_app.infer import GROUP_NAMES, LABEL_NAMES, TEXT_NAMES
from pile_app.prepare import files
from pile_app.prepare.files import MEDIA, File, Tree, extension, lines_of, open_plain, open_text, read_file, read_text
from pile_app.prepare.options import require
from pile_app.prepare.tagged import SPAN_FIELDS, TAG_FIELDS
from pile_app.prepare.text import decode_text
from pile_app.records import is_interleaved

KNOWN_COLUMNS = {
    *TEXT_NAMES,
    *LABEL_NAMES,
    *GROUP_NAMES,
    "image",
    "audio",
    "file",
    "file_name",
    "filename",
    "path",
    "id",
    "split",
}
PREVIEW = 100  # rows that show which columns name files
MAX_LABELS = 50
csv.field_size_limit(files.MAX_LINE_BYTES)


@dataclass(frozen=True)
class Table:
    """A table, or its part from byte `start` (after `line` lines) to `stop`. format: csv, lines, json, yaml, parquet or arrow;
    columns: of a CSV file; files: columns that name files; nested: records name files somewhere within; group: of Parquet;
    classes: column -> names of its classes; tagged: rows are texts with entities; merged: rows of one image become one."""

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
    classes: Mapping[str, Sequence[str]] | None = None
    merged: bool = False
    start: int = 0
    stop: int = 0
    line: int = 0
    group: int = -1

    @property
    def layout(self) -> str:
        kind = {"csv": "list of names and texts" if self.delimiter == " " else "table", "parquet": "Parquet", "arrow": "Arrow"}
        name = kind.get(self.format, "YAML" if self.format == "yaml" else "JSON lines" if self.format == "lines" else "JSON")
        return f"entities ({name})" if self.tagged else f"{name} of files" if self.files or self.nested else name


Row = tuple[str, "dict[str, Any] | BadSample", int]


def rows(table: Table) -> Iterator[Row]:
    """Yield (`file:line`, the row or why it cannot be read, position in bytes) of each row.

    Raises:
        BadSample, OSError, EOFError: the file is damaged; rows before the damage are yielded.
    """
    for number, row, position in READERS[table.format](table):
        if isinstance(row, dict):
            row = {name: value for name, value in row.items() if value is not None}
            for name, names in (table.classes or {}).items():
                if name in row:
                    row[name] = _named(row[name], names)
        elif not isinstance(row, BadSample):
            row = BadSample("no_object", f"the record is {row!r:.80}, not an object with fields")
        yield f"{table.name}{number}", row, position


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if isinstance(value, str) and value.isdecimal() and value not in names:  # of a CSV file
        value = int(value)
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


# -- CSV


def _csv_rows(table: Table) -> Iterator[tuple[str, Any, int]]:
    with open_text(table.real, table.encoding)[0] as file:
        if table.start:
            file.seek(table.start)
        is_header = table.has_header and not table.start
        for line, cells, position in _cells(file, table):
            if is_header:
                is_header = False
                continue
            number = f":{table.line + line}"
            if isinstance(cells, list):
                if any("\ud800" <= letter <= "\udfff" for cell in cells for letter in cell):
                    cells = BadSample("invalid_utf8", "the row is not UTF-8: give --encoding, e.g. cp1252 or latin-1")
                elif len(cells) != len(table.columns):
                    wanted = f"{len(table.columns)}: {', '.join(table.columns)}"
                    cells = BadSample("row_width", f"the row has {len(cells)} cells instead of {wanted:.200}. Quote the texts")
                else:
                    yield number, dict(zip(table.columns, cells, strict=True)), table.start + position
            if not isinstance(cells, list) or len(cells) != len(table.columns):
                yield number, cells, table.start + position
            if table.stop and table.start + position >= table.stop:
                return


def _cells(file: BinaryIO, table: Table) -> Iterator[tuple[int, list[str] | BadSample, int]]:
    """Yield (line, cells or why there are none, bytes read) of each row. Where a quote is not closed as it should be, only its
    line is lost: the lines that it swallowed are read again."""
    source, pending, taken = lines_of(file), deque[bytes | BadSample](), list[bytes]()
    line = position = 0

    def feed() -> Iterator[str]:
        while (found := pending.popleft() if pending else next(source, None)) is not None:
            if isinstance(found, BadSample):
                raise found
            taken.append(found)
            if sum(map(len, taken[-1:])) + size() > files.MAX_LINE_BYTES:
                raise csv.Error("end of data")
            yield found.decode("utf-8-sig" if line == 0 and len(taken) == 1 else "utf-8", "surrogateescape")

    def size() -> int:
        return 0 if len(taken) < 1000 else sum(map(len, taken))

    reader = _reader(feed(), table)
    while True:
        taken.clear()
        cells: list[str] | BadSample | None
        try:
            cells = next(reader, None)
        except BadSample as error:
            cells, reader = error, _reader(feed(), table)
            taken.append(b"")
        except csv.Error as error:
            reader = _reader(feed(), table)
            if "end of data" in str(error) or len(taken) > 1:
                detail = f"a quote opens in line {table.line + line + 1} and is not closed as it should be"
                detail += f"; the {len(taken) - 1:,} lines that it swallows are read again" * (len(taken) > 1)
                cells = BadSample("unclosed_quote", detail)
                pending.extendleft(reversed(taken[1:]))
                del taken[1:]
            else:  # a quote within a cell
                try:
                    cells = next(_reader(iter([taken[0].decode("utf-8", "surrogateescape")]), table, strict=False), [])
                except csv.Error as damage:
                    cells = BadSample("damaged_row", str(damage))
        if cells is None:
            return
        position += sum(map(len, taken))
        if cells:
            yield line + 1, cells, position
        line += len(taken)


def _reader(lines: Iterator[str], table: Table, strict: bool = True) -> Iterator[list[str]]:
    if table.delimiter in "\t|\x1f ":  # never quoted: a lone quote in a caption would swallow the rows up to the next
        for line in lines:
            text = line.rstrip("\r\n")
            cells = text.split(None, 1) if table.delimiter == " " else text.split(table.delimiter)
            if len(cells) == 1 < len(table.columns) and table.delimiter == " ":
                cells.append("")
            yield [_unquoted(cell.strip()) for cell in cells] if text.strip() else []
        return
    yield from csv.reader(
        lines, delimiter=table.delimiter, escapechar=table.escape or None, strict=strict, skipinitialspace=True
    )


def _unquoted(cell: str) -> str:
    """A cell without the quotes that spreadsheets add where a text contains quotes."""
    inner = cell[1:-1]
    doubled = '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if doubled and cell[0] == cell[-1] == '"' else cell


def _sniff_csv(table: Table, tree: Tree) -> Table:
    """Find the delimiter, and whether the first row is a header; name the columns that have no header by their content."""
    with open_text(table.real, table.encoding)[0] as file:
        head = file.read(1 << 18)
    if b"\0" in head:
        raise BadSample("damaged_file", "it holds bytes that are no text")
    lines = [f"{line}\n" for line in head.decode("utf-8-sig", "replace").split("\n")][: 2 * PREVIEW]
    lines = lines[:-1] if len(head) == 1 << 18 and len(lines) > 1 else lines
    best: tuple[tuple[bool, bool, float], Table, list[list[str]]] = ((False, False, 0.0), replace(table, delimiter="\x1f"), [])
    for delimiter in "\t|" if extension(table.name) == "tsv" else ",\t;|":
        for escape in ("", "\\") if delimiter in ",;" and any('\\"' in line for line in lines) else ("",):
            trial = replace(table, delimiter=delimiter, escape=escape)
            found = _try_rows(lines, trial)
            width = len(found[0]) if found else 0
            fits = sum(len(row) == width for row in found) / max(1, len(found))
            columns = zip(*(row for row in found if len(row) == width), strict=True)
            names_files = any(_names_files(tree, table.name, cells) for cells in columns)
            if (width > 1 or (delimiter == "," and fits == 1)) and fits >= 0.5 and (names_files, width > 1, fits) > best[0]:
                best = ((names_files, width > 1, fits), trial, found)
    table, found = best[1], best[2] or _try_rows(lines, best[1])
    if not found:
        raise BadSample("empty_file", "the table holds no row")
    has_header = _is_header(found, tree, table.name)
    body = [row for row in found if len(row) == len(found[0])][has_header:]
    names = [cell.strip() for cell in found[0]] if has_header else _names_by_content(body, tree, table.name)
    names = [f"{name}.{names[:n].count(name)}" if name and name in names[:n] else name for n, name in enumerate(names)]
    return replace(table, columns=tuple(name or f"column_{n}" for n, name in enumerate(names)), has_header=has_header)


def _names_files(tree: Tree, table: str, cells: Sequence[str]) -> bool:
    """Whether a column of a CSV file names files of the input."""
    return _naming(cells[1:] if len(cells) > 1 else cells, tree, table)[0] and _are_ids("id", cells)


def _try_rows(lines: Sequence[str], table: Table) -> list[list[str]]:
    found: list[list[str]] = []
    try:
        found.extend(row for row in _reader(iter(lines), table) if row)
    except csv.Error as error:
        if "end of data" not in str(error):
            with suppress(csv.Error):
                found.extend(row for row in _reader(iter(lines[len(found) :]), table, strict=False) if row)
    return found


def _is_header(found: Sequence[Sequence[str]], tree: Tree, name: str) -> bool:
    first, body = [cell.strip() for cell in found[0]], found[1:]
    if any(cell.lower() in KNOWN_COLUMNS for cell in first) and not any(map(_is_number, first)):
        return True
    if len({*first}) < len(first) or any(_is_number(cell) or len(cell) > 60 or cell.count(" ") > 4 for cell in first):
        return False
    if any(cell and tree.resolve(name, cell) for cell in first):
        return False
    return len(first) > 1 and not any(
        first[n] and first[n] == row[n] for row in body for n in range(len(first)) if n < len(row)
    )


def _names_by_content(body: Sequence[Sequence[str]], tree: Tree, name: str) -> list[str]:
    """Names for the columns of a table without header: the file, the label, the texts."""
    names = [f"column_{n}" for n in range(len(body[0]))]
    columns = [[row[n].strip() for row in body] for n in range(len(names))]
    media = [n for n, cells in enumerate(columns) if _naming(cells, tree, name)[0] and _are_ids("id", cells)]
    for n in media[:1]:
        file = next(file for cell in columns[n] if (file := tree.resolve(name, cell)))
        names[n] = "audio" if extension(file.name) in AUDIO_EXTENSIONS else "image"
    prose = [n for n, cells in enumerate(columns) if n not in media and sum(" " in cell for cell in cells) > len(cells) / 2]
    rest = [n for n in range(len(names)) if n not in media and n not in prose]
    labels = [
        n
        for n in rest
        if not any(re.fullmatch(r"\d+\.\d*", cell) for cell in columns[n])
        and len({*columns[n]}) <= max(2, min(MAX_LABELS, len(body) * 0.8))
    ]
    if not prose and media and rest:  # transcripts of one word
        prose = [n for n in rest if not all(map(_is_number, columns[n]))][-1:]
    texts = ("text", "normalized_text") if media else ("title", "text") if len(prose) == 2 else ("text",)
    if len(prose) <= 2:
        names = [texts[prose.index(n)] if n in prose else one for n, one in enumerate(names)]
    for n in [n for n in labels if n not in prose][:1]:
        names[n] = "label"
    return names


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[0-9.,]+(e[-+]?\d+)?%?", cell.strip().lower()))


# -- JSON, YAML, Parquet, Arrow


def _json_lines(table: Table) -> Iterator[tuple[str, Any, int]]:
    file, is_plain = open_text(table.real, table.encoding)
    with file:
        position = table.start
        if position:  # the line that goes over the border belongs to the part before
            file.seek(position - 1)
            position += len(file.readline(files.MAX_LINE_BYTES)) - 1
        for number, line in enumerate(lines_of(file), start=1):
            if table.stop and position >= table.stop:
                return
            name = f":@{position}" if table.stop else f":{number}"
            if isinstance(line, BadSample):
                yield name, line, position
                position = file.tell() if is_plain else position
                continue
            position += len(line)
            if line.strip():
                yield name, _parsed(line), position


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(decode_text(data))
    except BadSample as error:
        return error
    except (ValueError, RecursionError) as error:
        return BadSample("invalid_json", str(error))


def _json_file(table: Table) -> Iterator[tuple[str, Any, int]]:
    content = json_content(table)
    if isinstance(content, dict):
        content = _records_of(content)
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        yield f":{number}", record, 0


def json_content(table: Table) -> Any:
    data = read_text(table.real, table.encoding)
    if table.format != "yaml":
        content = _parsed(data)
    else:
        import yaml

        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # strings, lists and mappings only
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, loader)):
                raise ValueError("it refers to parts of itself, which may be a bomb")
            content = yaml.load(data, loader)
        except Exception as error:  # of a hostile file
            raise BadSample("invalid_yaml", f"{error}"[:200]) from error
    if isinstance(content, BadSample):
        raise content
    return content


def _records_of(content: dict[str, Any]) -> list[Any]:
    """The records in an object: captions of COCO, dialogues of ChatterBot, `{"data": [...]}`, an object a key, or itself."""
    lists = {name: value for name, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    dialogues = content.get("conversations")
    if isinstance(dialogues, list) and any(isinstance(one, list) for one in dialogues):
        return [{"exchange": one if isinstance(one, list) else [one]} for one in dialogues]
    if content and all(extension(key) in MEDIA and isinstance(value, str | list) for key, value in content.items()):
        return [{"file": key, "captions" if isinstance(value, list) else "text": value} for key, value in content.items()]
    if "images" in lists and "annotations" in lists:
        captions: dict[Any, list[str]] = defaultdict(list)
        for one in lists["annotations"]:
            captions[one.get("image_id")] += [one["caption"]] if isinstance(one.get("caption"), str) else []
        if not captions or not any(captions.values()):
            raise BadSample("no_caption", "its annotations are no captions")
        return [{"image": one.get("file_name"), "captions": captions[one.get("id")]} for one in lists["images"]]
    if "images" in lists and isinstance(lists["images"][0].get("sentences"), list):  # Karpathy's splits
        texts = ([one.get("raw") for one in image.get("sentences", [])] for image in lists["images"])
        return [
            {"image": i.get("filename"), "captions": t, "split": i.get("split")}
            for i, t in zip(lists["images"], texts, strict=True)
        ]
    if len(lists) == 1 and not content.keys() & {"messages", "conversations", "segments", "text"}:
        return next(iter(lists.values()))
    if len(content) > 1 and all(isinstance(value, dict) for value in content.values()):
        return [{"key": key} | value for key, value in content.items()]
    return [content]


def _columnar_rows(table: Table) -> Iterator[tuple[str, Any, int]]:
    """Rows of a row group of Parquet, or of an Arrow file or stream."""
    number = 0
    try:
        with open_plain(table.real) as file:
            if table.format == "arrow":
                batches: Any = _open_arrow(file)
                if hasattr(batches, "num_record_batches"):
                    batches = map(batches.get_batch, range(batches.num_record_batches))
            else:
                opened = require("pyarrow.parquet", "prepare", "reading Parquet").ParquetFile(file, memory_map=False)
                groups = [opened.metadata.row_group(group) for group in range(opened.metadata.num_row_groups)]
                number = sum(group.num_rows for group in groups[: max(0, table.group)])
                chosen = range(len(groups)) if table.group < 0 else [table.group]
                row_bytes = max((groups[n].total_byte_size // max(1, groups[n].num_rows) for n in chosen), default=0)
                if row_bytes > files.MAX_FILE_BYTES:
                    raise BadSample("damaged_file", f"{row_bytes:,} bytes a row")
                at_once = max(1, min(1024, (1 << 24) // max(1, row_bytes)))
                batches = opened.iter_batches(at_once, row_groups=list(chosen), use_threads=False)
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f":{number}", row, 0
    except BadSample:
        raise
    except Exception as error:  # pyarrow raises many kinds for hostile files
        raise BadSample("damaged_file", f"{error}"[:300]) from error


def _open_arrow(file: BinaryIO) -> Any:
    ipc = require("pyarrow.ipc", "prepare", "reading Arrow files")
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return ipc.open_file(file) if is_file else ipc.open_stream(file)


def row_groups(table: Table) -> int:
    with open_plain(table.real) as file:
        return int(require("pyarrow.parquet", "prepare", "reading Parquet").read_metadata(file).num_row_groups)


def _classes(table: Table) -> dict[str, list[str]]:
    """Column -> names of its classes, as Hugging Face's `datasets` writes them into the schema."""
    try:
        with open_plain(table.real) as file:
            parquet = require("pyarrow.parquet", "prepare", "reading Parquet")
            schema = parquet.read_schema(file) if table.format == "parquet" else _open_arrow(file).schema
    except Exception as error:
        raise BadSample("damaged_file", f"{error}"[:300]) from error
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        inner = {name: about[0] if isinstance(about, list) else about.get("feature", about) for name, about in features.items()}
        return {name: list(map(str, about["names"])) for name, about in inner.items() if isinstance(about.get("names"), list)}
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}


READERS = {
    "csv": _csv_rows, "lines": _json_lines, "json": _json_file, "yaml": _json_file, "parquet": _columnar_rows,
    "arrow": _columnar_rows,
}  # fmt: skip


# -- what a table is


def sniff(tree: Tree, file: File, format: str, encoding: str = "") -> tuple[Table, list[dict[str, Any]]]:
    """The table that a file is, by its content, and its first rows.

    Raises:
        BadSample, OSError, EOFError: the file cannot be read.
    """
    table = Table(file.name, file.real, format, encoding)
    if file.size < 1024 and read_file(file.real).startswith(b"version https://git-lfs"):
        raise BadSample("lfs_pointer", "it is a pointer of Git LFS: fetch the data with git lfs pull")
    if format == "csv":
        table = _sniff_csv(table, tree)
    elif format == "list":
        table = replace(table, format="csv", delimiter=" ", has_header=False, columns=("file", "text"))
    elif format == "json":
        table = replace(table, format="lines" if _is_lines(table) else "json")
    elif format in ("parquet", "arrow"):
        table = replace(table, classes=_classes(table))
    found = [row for _, row, _ in islice(rows(table), PREVIEW)]
    if not found:
        raise BadSample("empty_file", "it holds no row")
    preview = [row for row in found if isinstance(row, dict)]
    return replace(table, **_naming_columns(table, preview, tree), tagged=any(map(_is_tagged, preview))), preview


def _is_lines(table: Table) -> bool:
    """Whether JSON is one value a line."""
    with open_text(table.real, table.encoding)[0] as opened:
        first = next((line for line in iter(partial(opened.readline, files.MAX_LINE_BYTES), b"") if line.strip()), b"")
        more = opened.read(1 << 16).strip()
    if not isinstance(_parsed(first), BadSample):
        return bool(more) or (
            extension(table.name) in ("jsonl", "ndjson") and first.lstrip(codecs.BOM_UTF8 + b" ").startswith(b"{")
        )
    if extension(table.name) in ("jsonl", "ndjson") and len(first.strip()) > 2:  # its first line is damaged
        return True
    return first.removeprefix(codecs.BOM_UTF8).startswith(b"{") and more.startswith(b"{")


def _is_tagged(row: Mapping[str, Any]) -> bool:
    if isinstance(row.get("tokens"), list) and any(isinstance(row.get(name), list) for name in TAG_FIELDS):
        return True
    spans = next((row[name] for name in SPAN_FIELDS if isinstance(row.get(name), list) and row[name]), None)
    keys = {"start", "end", "label"}
    return isinstance(row.get("text"), str) and isinstance(spans, list) and all(
        keys <= one.keys() if isinstance(one, dict) else isinstance(one, list) and len(one) == 3 for one in spans
    )  # fmt: skip


def _naming(values: Sequence[Any], tree: Tree, name: str, is_list: bool = False) -> tuple[bool, bool]:
    """Whether values name files of the input, and whether they do or look as if they did."""
    texts = [one for value in values for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]
    if is_list:  # of names and texts: a word is no name of a file
        texts = [text if re.search(r"[\d.]", text) else "" for text in texts]
    hits = [tree.resolve(name, text) for text in texts]
    found = sum(file is not None and extension(file.name) in MEDIA for file in hits)
    looks = sum(extension(text) in MEDIA and " " not in text.strip() for text in texts)
    is_naming = bool(found) and max(found, looks) >= len(texts) / 2
    return is_naming, is_naming or looks > len(texts) / 2


def _naming_columns(table: Table, preview: Sequence[dict[str, Any]], tree: Tree) -> dict[str, Any]:
    """The columns that name files, or that records name files somewhere within."""
    names = [] if any(map(is_interleaved, preview)) else list(dict.fromkeys(name for row in preview for name in row))
    columns = {name: [row[name] for row in preview if name in row] for name in names}
    verdicts = {name: _naming(values, tree, table.name, table.delimiter == " ") for name, values in columns.items()}
    found = [name for name in names if verdicts[name][0]]
    exact = [name for name in found if any(extension(f"{value}") in MEDIA for value in columns[name])]
    held = any(isinstance(value, dict) and isinstance(value.get("bytes"), bytes) for row in preview for value in row.values())
    if not found and not held:  # all files are missing, or were never fetched
        exact = [name for name in names if verdicts[name][1]]
    found = exact or [name for name in found if _are_ids(name, columns[name])][:1]
    nested = not found and any(True for row in preview for _ in named_within(tree, table.name, row))
    return {"files": tuple(found), "nested": nested}


def _are_ids(name: str, values: Sequence[Any]) -> bool:
    """Whether values without extension may well be names of files, rather than labels or numbers."""
    is_named = re.search("id|file|name|image|audio|path|key|utt", name.lower())
    return len({*map(str, values)}) > len(values) / 2 and bool(is_named or not all(_is_number(f"{value}") for value in values))


def named_within(tree: Tree, table: str, value: Any) -> Iterator[File]:
    """The files that a record names, however deep."""
    if isinstance(value, str):
        if extension(value[-12:]) in MEDIA and (file := tree.resolve(table, value)):
            yield file
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from named_within(tree, table, one)
