"""The reading half of `pile prepare`: an input becomes units of some megabytes, and units become samples.

    input ──► list_units ──► Unit ──► read_unit ──► Record(where, sample, layout, split) ──► a field map makes documents

Listing happens once, in one process; any process can read a unit at any time. Files of a folder that share a stem are one
sample, a table whose column names files is their index, each row of another table is a sample, archives are unpacked, tars are
WebDatasets. A file that is not read is a record too, with the reason.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pile_app.documents import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    UNREADABLE_EXTENSIONS,
    BadSample,
    Document,
    Segment,
    media_extension,
)
from pile_app.fields import Fields
from pile_app.infer import TEXT_NAMES, infer_fields
from pile_app.prepare import files
from pile_app.prepare.files import (
    ARCHIVES,
    DAMAGE,
    MEDIA,
    File,
    Tree,
    extension,
    is_below,
    open_plain,
    open_text,
    read_file,
    read_text,
)
from pile_app.prepare.filters import normalize_text
from pile_app.prepare.hub import Card, read_card
from pile_app.prepare.layouts import RECIPES, TEXT_EXTENSIONS, is_about, named_split, speaker_of, split_of
from pile_app.prepare.options import Options
from pile_app.prepare.tables import PREVIEW, Table, named_within, row_groups, rows, sniff
from pile_app.prepare.tagged import document_of_record, document_of_words, scheme_of_conll, sentences_of_conll
from pile_app.prepare.text import decode_text
from pile_app.records import chat_layout, is_interleaved

__all__ = ["Record", "Unit", "evaluation_texts", "list_units", "medium", "named_split", "read_documents", "read_unit"]

UNIT_BYTES = 1 << 24
UNIT_SAMPLES = 1000
FORMATS = dict.fromkeys(TEXT_EXTENSIONS, "text") | {
    "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "ndjson": "json", "yml": "yaml", "yaml": "yaml",
    "parquet": "parquet", "arrow": "arrow", "conll": "conll", "bio": "conll", "iob": "conll", "tar": "tar",
} | dict.fromkeys(IMAGE_EXTENSIONS, "image") | dict.fromkeys(AUDIO_EXTENSIONS, "audio")  # fmt: skip
TABLES = ("csv", "json", "yaml", "parquet", "arrow")
OF_KIND = {
    "text": ("text", "csv", "json", "parquet", "arrow"), "images": ("image", *TABLES), "audio": ("audio", *TABLES),
    "interleaved": ("json", "parquet", "arrow"), "entities": ("conll", "json", "parquet", "arrow"),
    "chat": ("json", "yaml", "parquet", "arrow"), "webdataset": ("tar",),
}  # fmt: skip
FORCED = {"text": "text", "entities": "conll", "chat": "json", "interleaved": "json", "webdataset": "tar"}
FORCED_FILE = {"images": "image", "audio": "audio"}  # of a single file with another extension


class Unit(NamedTuple):
    """A part of the input: the name of its reader, JSON arguments, and bytes to read."""

    reader: str
    arguments: list[Any]
    weight: int = 0


class Record(NamedTuple):
    """A sample that was read. where: the file, or `file:line`; content: name -> value, a document, or why there is none;
    layout: for people, "" for a file that is not read; split: that a name gives."""

    where: str
    content: Mapping[str, Any] | BadSample | Document
    layout: str = ""
    split: str | None = None


def list_units(input: str, options: Options, work: str | None = None, stamp: Callable[[bytes], Any] = len) -> Iterator[Unit]:
    """List the units of a folder or file.

    Args:
        work: a folder to unpack archives to; None: archives are not read.
        stamp: is called with the name, size and time of change of every file.

    Raises:
        ValueError: `input` does not exist.
    """
    yield from _Listing(input, options, work, stamp).units()


class _Listing:
    """The files of an input while they are dealt to units. rest: those not dealt yet; scopes: folders with an index, in which
    media and texts that it does not name are not read; splits: of media, by a card or a list; samples: layout -> samples."""

    def __init__(self, input: str, options: Options, work: str | None, stamp: Callable[[bytes], Any]) -> None:
        digest = hashlib.sha256()
        path, _, config = input.partition("#") if not os.path.exists(input) else (input, "", "")
        if not os.path.exists(path):
            raise ValueError(f"{path!r} does not exist (working folder {os.getcwd()})")
        self.options, self.encoding = options, options.encoding or ""
        self.tree = _open_tree([path, work], options, lambda data: [stamp(data), digest.update(data)])  # type: ignore[func-returns-value]
        self.key = [path, work, digest.hexdigest()]
        _TREES[self.tree.root] = self.key, self.tree
        self.is_one_file = self.tree.only is not None and self.tree.only in self.tree.files
        self.rest = {name: file for name, file in self.tree.files.items() if not self.is_one_file or name == self.tree.only}
        self.unread = [one for one in self.tree.skipped if self.tree.only is None or is_below(one[0], self.tree.only)]
        self.card = read_card(path, config) if os.path.isdir(path) else Card()
        self.scopes: set[str] = set()
        self.folders: set[str] = set()
        self.list_scopes: set[str] = set()
        self.splits: dict[str, str | None] = dict(self.card.splits)
        self.samples: dict[str, list[Any]] = defaultdict(list)
        self.bad: list[tuple[str, str, str, str]] = []

    def take(self, name: str) -> File:
        return self.rest.pop(name, None) or self.tree.files[name]

    def skip(self, name: str, reason: str, detail: str) -> None:
        self.rest.pop(name, None)
        self.unread.append((name, reason, detail))

    def reject(self, where: str, reason: str, detail: str, layout: str) -> None:
        self.bad.append((where, reason, detail, layout))

    def add(self, layout: str, where: str, named: Mapping[str, File], values: Mapping[str, Any]) -> None:
        first = next(iter(named.values())).name
        split = self.split(where.partition(":")[0]) or self.split(first)
        paths, size = {name: file.real for name, file in named.items()}, sum(file.size for file in named.values())
        self.samples[layout].append((where, split, paths, dict(values), size))
        for file in named.values():
            self.rest.pop(file.name, None)

    def split(self, name: str) -> str | None:
        return self.splits.get(name) or split_of(name)

    def is_covered(self, name: str, scopes: Collection[str] | None = None) -> bool:
        """Whether an index decides about the texts and tables of the folder."""
        scopes = self.scopes if scopes is None else scopes
        while name.strip("/") and (name := os.path.dirname(name)) not in scopes:
            pass
        return name in scopes

    def format(self, name: str) -> str:
        """The format that a file is read as, "" for none: by its extension, or by the kind that was asked for."""
        kind, found = self.options.kind, FORMATS.get(extension(name), "")
        if kind == "auto" or found in OF_KIND[kind]:
            return found
        if found not in ("", "text") or extension(name) in UNREADABLE_EXTENSIONS or (is_about(name) and not self.is_one_file):
            return ""
        return FORCED.get(kind) or (FORCED_FILE[kind] if self.is_one_file else "")

    def units(self) -> Iterator[Unit]:
        for name in [name for name in self.rest if self.card.splits and name not in self.card.splits and not is_about(name)]:
            self.skip(name, "other_config", "the configuration of the data set card does not name it")
        if not self.is_one_file and not all(map(is_about, self.rest)):
            for name in filter(is_about, list(self.rest)):
                self.skip(name, "about_file", "it describes the data set")
        for recipe in RECIPES if self.options.kind == "auto" else ():
            recipe(self)
        groups = self._groups()
        tables = list(self._tables({name for names in groups.values() for name in names}))
        self._add_groups(groups)
        for layout, found in self.samples.items():
            yield from _units_of_samples(layout, found)
        yield from tables
        for name in list(self.rest):
            yield from self._single(name, self.rest[name], self.format(name))
        for found in (self.bad, [(*one, "") for one in sorted(self.unread, key=lambda one: (one[1] == "about_file", one))]):
            yield from [Unit("rejected", ["", found])] if found else []

    def _groups(self) -> dict[str, list[str]]:
        """Media files with the files that share their stem: path without extension -> names. `c.jpg.txt` and `c.0.txt` belong
        to `c.jpg`, `E.txt` to `e.jpg`, and `frog.seg.png` to `frog.jpg`."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.rest:
            if extension(name) in MEDIA:
                groups[name.rpartition(".")[0]].append(name)
        lower = Counter(stem.lower() for stem in groups)
        exact = {stem.lower(): stem for stem in groups if lower[stem.lower()] == 1} | {stem: stem for stem in groups}
        for name in list(self.rest) if groups else ():
            stem, owner = name, None
            is_medium, is_text = extension(name) in MEDIA, extension(name) in (*TEXT_EXTENSIONS, "json")
            if is_medium:
                stem = name.rpartition(".")[0]
            while owner is None and "." in os.path.basename(stem):
                stem, _, part = stem.rpartition(".")
                if not is_medium or part.isalpha():
                    owner = exact.get(stem, exact.get(stem.lower()))
                if not is_text and not is_medium:
                    break
            if owner and is_medium and len(groups.get(name.rpartition(".")[0], ())) == 1 and owner in groups:
                groups[owner] += groups.pop(name.rpartition(".")[0])
            elif owner and not is_medium and owner in groups:
                groups[owner].append(name)
        return groups

    def _add_groups(self, groups: Mapping[str, list[str]]) -> None:
        """Add the samples of files that share a stem."""
        kinds = {stem: {self.format(name) for name in names} & {"image", "audio"} for stem, names in groups.items()}
        labels = self._class_folders([stem for stem in groups if kinds[stem]], groups)
        for stem, names in groups.items():
            names = [name for name in names if name in self.rest]
            folder, texts = os.path.dirname(stem), any(extension(name) in TEXT_EXTENSIONS for name in names)
            if folder in self.folders or self.is_covered(stem, self.list_scopes):
                reason = "not_in_table", "no row of a table names it"
            elif not kinds[stem] and not (texts and self.options.kind == "auto"):
                reason = "ignored_extension", f"kind is {self.options.kind}: no such file is read"
            else:
                media = [name for name in names if extension(name) in MEDIA]
                if media:
                    named = {key: self.tree.files[name] for key, name in _names_in_sample(names, stem).items()}
                    values = ({"label": labels[folder]} if folder in labels else {}) | speaker_of(media[0])
                    self.add(f"{' and '.join(sorted(kinds[stem])) or 'unreadable'} files", media[0], named, values)
                continue
            for name in names:
                self.skip(name, *reason)

    def _class_folders(self, stems: Iterable[str], groups: Mapping[str, list[str]]) -> dict[str, str]:
        """Folder -> label, if the media lie in folders of classes, all at one depth, and have no texts."""
        folders = {os.path.dirname(stem): _label_folder(os.path.dirname(stem)) for stem in stems}
        has_texts = any(extension(name) in TEXT_EXTENSIONS for stem in stems for name in groups[stem])
        is_even = len({folder.count("/") for folder in folders}) == 1 and all(folders.values())
        if self.scopes or has_texts or not is_even or not 2 <= len({*folders.values()}) <= 1000:
            return {}
        parents = defaultdict(set)  # of equal labels: characters of several alphabets, say
        for folder, label in folders.items():
            parents[label].add(_label_folder(os.path.dirname(folder)))
        return {
            folder: f"{_label_folder(os.path.dirname(folder))}/{label}" if len(parents[label]) > 1 else str(label)
            for folder, label in folders.items()
        }

    def _tables(self, grouped: set[str]) -> Iterator[Unit]:
        """Units of all tables. Those that name files come first, since they decide which other files are read."""
        found = [table for name in list(self.rest) if name not in grouped and (table := self._sniff(name))]
        named: set[str] = set()
        units = [unit for table in found if table.files or table.nested for unit in self._parts(table, named)]
        if lists := [os.path.dirname(table.name) for table in found if table.delimiter == " "]:  # a list a chapter
            self.list_scopes.add(_common(lists))
            self.scopes |= self.list_scopes
        for name in named:
            self.rest.pop(name, None)
        for table in found:
            if table.files or table.nested:
                continue
            if self.is_covered(table.name):
                self.skip(table.name, "other_table", "another table names the files here")
            else:
                units += self._parts(table, named)
        yield from units

    def _sniff(self, name: str) -> Table | None:
        """The table that a file is; a text, or a file without extension, is one if it names media."""
        format, file = self.format(name), self.tree.files[name]
        is_list = self.has_media and (format == "text" or (not extension(name) and self.options.kind == "auto"))
        if (not is_list and format not in TABLES) or (is_list and self.is_covered(name)):
            return None
        if format in ("json", "parquet") and re.sub(r"(_stats)?\.\w+$", ".tar", name) in self.rest:
            self.skip(name, "table_of_tar", "it describes the tar with its name")
            return None
        try:
            table, preview = sniff(self.tree, file, "csv" if is_list else format, self.encoding)
            if is_list and not table.files:
                table, preview = sniff(self.tree, file, "list", self.encoding)
        except (BadSample, *DAMAGE) as error:
            if is_list:
                return None
            bad = _bad(error)
            if bad.reason == "no_caption":
                self.skip(name, bad.reason, bad.detail)
            else:
                self.reject(self.take(name).name, bad.reason, bad.detail, format)
            return None
        is_dialogue = any("exchange" in row for row in preview)
        if is_list and (len(table.columns) < 2 or sum(map(_has_letters, preview)) <= len(preview) / 2):
            if table.files:
                self.skip(name, "no_text", "it names files, and holds no texts")
            return None
        if (is_list and not table.files) or (format == "yaml" and self.options.kind == "auto" and not is_dialogue):
            return None
        self.take(name)
        if self.options.kind == "text":
            table = replace(table, files=(), nested=False)
        values = [_file_names(table, row) for row in preview]
        is_merged = len(table.files) == 1 and any(a and a == b for a, b in pairwise(values))
        return replace(table, classes={**(table.classes or {}), **self.card.classes}, merged=is_merged, split=self.split(name))

    @cached_property
    def has_media(self) -> bool:
        return any(extension(name) in MEDIA for name in self.tree.files)

    def _parts(self, table: Table, named: set[str]) -> Iterator[Unit]:
        """Units of a table; the files that it names are added to `named`, their folders to the scopes."""
        size, is_plain = self.tree.files[table.name].size, open_text(table.real, self.encoding)[1]
        is_index, cuts = bool(table.files or table.nested), [(0, 0)]
        key = self.key if is_index or table.format in ("json", "lines", "parquet") else None
        if is_index or (table.format == "csv" and is_plain and size > UNIT_BYTES):
            folders, weight, before, end = {os.path.dirname(table.name)}, 0, None, 0
            try:
                for where, row, position in rows(table):
                    values = _file_names(table, row) if isinstance(row, dict) else []
                    hits = [file for value in values if (file := self.tree.resolve(table.name, value))]
                    if table.nested and isinstance(row, dict):
                        hits = list(named_within(self.tree, table.name, row))
                    weight += sum(file.size for file in hits) + position - end
                    if weight > UNIT_BYTES and (values != before or not table.merged) and end and table.format == "csv":
                        cuts.append((end, int(where.rpartition(":")[2]) - 1))
                        weight = 0
                    before, end = values, position
                    named |= {file.name for file in hits}
                    folders |= {os.path.dirname(file.name) for file in hits}
            except (BadSample, *DAMAGE):
                pass  # the reader says what is damaged
            if is_index:
                self.scopes.add(_common(folders))
                self.folders |= {*folders, _common(folders)}
        parts = [table]
        if table.format == "csv" and is_plain:
            parts = [replace(table, start=a, line=line, stop=b) for (a, line), (b, _) in pairwise([*cuts, (0, 0)])]
        elif table.format == "lines" and is_plain and (count := size // UNIT_BYTES) > 1:
            parts = [replace(table, start=a, stop=b) for a, b in pairwise(size * n // count for n in range(count + 1))]
        elif table.format == "parquet":
            parts = [replace(table, group=group) for group in range(row_groups(table))]
        for part in parts:
            yield Unit("table", [table.name, asdict(part), key], size // len(parts))

    def _single(self, name: str, file: File, format: str) -> Iterator[Unit]:
        folder = os.path.dirname(name)
        if format == "text" and self.is_covered(name):
            self.skip(name, "not_in_table", "no row of a table names it")
        elif format == "text" and self.options.label_from_folder and not _label_folder(folder):
            self.skip(name, "no_label", "it lies in no folder whose name could be its label")
        elif format == "text":
            parts = max(1, file.size // UNIT_BYTES)
            for start, stop in pairwise(file.size * part // parts for part in range(parts + 1)):
                yield Unit("text", [name, file.real, self.split(name), start, stop], stop - start)
        elif format in ("conll", "tar"):
            yield Unit(format, [name, file.real, self.split(name)], file.size)
        elif format in ("image", "audio"):  # a file of any name, as --kind says
            yield from _units_of_samples(f"{format} files", [(name, self.split(name), {"medium": file.real}, {}, file.size)])
        else:
            kind = f" with kind {self.options.kind}" * (self.options.kind != "auto")
            self.skip(name, "ignored_extension", f"*.{extension(name) or '(none)'} is not read{kind}; --kind says what it is")


def _open_tree(key: list[Any], options: Options, stamp: Callable[[bytes], Any] = len) -> Tree:
    """The files of an input, with its archives unpacked below the folder `work`."""
    path, work = key[:2]
    tree = Tree(path, options.follow_links, stamp, around=FORMATS.get(extension(path)) in TABLES)
    for _ in range(2):  # archives in archives
        for name, file in list(tree.files.items()):
            is_archive = name.lower().endswith(ARCHIVES) or _is_folder_tree(file, options)
            if not is_archive or tree.only not in (None, name):
                continue
            try:
                if work is None:
                    raise BadSample("archive", "unpack it first")
                tree.unpack(name, os.path.join(work, "unpacked"))
            except BadSample as error:
                del tree.files[name]
                tree.skipped.append((name, error.reason, error.detail))
    return tree


_TREES: dict[str, tuple[list[Any], Tree]] = {}  # root of the input -> its newest tree in this process


def _tree(key: list[Any], options: Options) -> Tree:
    root = os.path.abspath(key[0] if os.path.isdir(key[0]) else os.path.dirname(os.path.abspath(key[0])))
    if root not in _TREES or _TREES[root][0] != key:
        _TREES[root] = key, _open_tree(key, options)
    return _TREES[root][1]


def _is_folder_tree(file: File, options: Options) -> bool:
    """Whether a tar is a tree of folders, not a WebDataset: no two files share a key."""
    if extension(file.name) != "tar" or options.kind == "webdataset":
        return False
    try:
        with open_plain(file.real) as opened:
            names = [member.name for member, _ in islice(_members(opened), 2000) if not _is_hidden(member.name)]
    except (BadSample, *HOSTILE):
        return False
    keys = {split_name(name)[0] for name in names}
    return len(keys) == len(names) > 0 and all("/" in name.removeprefix("./") for name in names)


def _common(folders: Collection[str]) -> str:
    return os.path.commonpath(folders) if "" not in folders else ""


def _has_letters(row: Mapping[str, Any]) -> bool:
    texts = list(row.values())[1:]
    return any(isinstance(text, str) and re.search(r"[^\W\d_]", text) and "://" not in text for text in texts)


def _label_folder(folder: str) -> str | None:
    base = os.path.basename(folder)
    is_label = base and not re.fullmatch(r"(?i)(data|images?|audio|wavs?|clips)", base) and named_split(base) is None
    return base if is_label else None


def _file_names(table: Table, row: Mapping[str, Any]) -> list[str]:
    values = [row.get(name) for name in table.files]
    found = [one for value in values for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    return [re.sub(r"#\d+$", "", one) for one in found]


def _names_in_sample(names: Iterable[str], stem: str) -> dict[str, str]:
    """The names that files get in their sample: the extension, `txt` for the text, `normalized.txt` before `original.txt`."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: ("original" in name, len(name), name)):
        full = name[len(stem) + 1 :].lower()
        short = "txt" if extension(name) in TEXT_EXTENSIONS else full if extension(name) in MEDIA else extension(name)
        found[full if short in found else short] = name
    return found


def _units_of_samples(layout: str, found: Iterable[Any]) -> Iterator[Unit]:
    some: list[Any] = []
    weight = 0
    for *one, size in found:
        some.append(one)
        weight += size
        if weight > UNIT_BYTES or len(some) >= UNIT_SAMPLES:
            yield Unit("samples", [some[0][0], layout, some], weight)
            some, weight = [], 0
    yield from [Unit("samples", [some[0][0], layout, some], weight)] if some else []


# -- reading


def read_unit(root: str, unit: Unit, options: Options) -> Iterator[Record]:
    """Read the records of a unit, in order: the same in any process, at any time. Rows after damage to a file are lost, and the
    damage is a record."""
    for record in READERS[unit.reader](options, *unit.arguments):
        yield (record if record.where.isascii() else record._replace(where=os.fsencode(record.where).decode(errors="replace")))


def _read_rejected(_: Options, __: str, found: list[Any]) -> Iterator[Record]:
    for where, reason, detail, layout in found:
        yield Record(where, BadSample(reason, detail), layout)


def _bad(error: Exception) -> BadSample:
    if isinstance(error, BadSample):
        return error
    return BadSample("unreadable_file" if getattr(error, "errno", None) else "damaged_file", str(error))


def _read_samples(options: Options, _: str, layout: str, found: list[Any]) -> Iterator[Record]:
    for where, split, named, values in found:
        try:
            sample = {name: _content(name, path, options) for name, path in named.items()}
        except (BadSample, *DAMAGE) as error:
            yield Record(where, _bad(error), layout)
        else:
            yield Record(where, sample | values, layout, split)


def _content(name: str, path: str, options: Options) -> Any:
    """A file of a sample: text is decoded, JSON is read, other files stay paths."""
    if name == "txt":
        return decode_text(read_text(path, options.encoding or "", files.MAX_LINE_BYTES)).strip()
    return read_file(path) if name == "json" else Path(path)


def _read_text(options: Options, name: str, path: str, split: str | None, start: int, stop: int) -> Iterator[Record]:
    """One sample, or several where the file is longer than `document_bytes`."""
    layout = "text file"
    try:
        file, is_plain = open_text(path, options.encoding or "")
        with file:
            if is_plain:
                start, stop = (files.next_cut(file, cut, options.document_bytes) for cut in (start, stop))
                file.seek(start)
            elif start:
                return
            for piece in files.pieces_of(file, stop - start if is_plain else -1, options.document_bytes):
                try:
                    yield Record(name, {"txt": decode_text(piece)}, layout, split)
                except BadSample as error:
                    yield Record(name, error, layout)
    except (BadSample, *DAMAGE) as error:
        yield Record(name, _bad(error), layout)


def _read_table(options: Options, _: str, fields: dict[str, Any], key: list[Any] | None) -> Iterator[Record]:
    table = Table(**fields)
    tree = key and _tree(key, options)
    clean = partial(normalize_text, options=options)
    split, where = table.split, table.name
    try:
        for where, row, _end in _merged(table) if table.merged else rows(table):
            try:
                if isinstance(row, BadSample):
                    raise row
                if table.tagged or options.kind == "entities":
                    tagged = document_of_record(row, clean)
                    if tagged is None:
                        raise BadSample("no_spans", "it has neither text and spans nor tokens and tags")
                    yield Record(where, tagged[0], table.layout + ", fixed" * tagged[1], split)
                    continue
                if table.nested and tree and not chat_layout(row) and not is_interleaved(row):
                    row = row | _lifted(tree, table.name, row)
                named = {name: _named_files(tree, table.name, row[name]) for name in table.files if name in row} if tree else {}
                first = next((file for found in named.values() for file in found), None)
                is_chat = options.kind == "chat" or chat_layout(row)
                if table.files and first is None and not is_chat and not any(map(_is_held, row.values())):
                    raise BadSample("missing_file", f"the row names no file: {', '.join(table.files)} is empty")
                paths = {
                    name: Path(found[0].real) if len(found) == 1 else [Path(one.real) for one in found]
                    for name, found in named.items()
                }
                given = split or (first and split_of(first.name))
                more = speaker_of(first.name) if first else {}
                yield Record(where, more | row | paths, table.layout, given)
            except BadSample as error:
                yield Record(where, error, table.layout)
    except (BadSample, *DAMAGE) as error:
        yield Record(table.name if where == table.name else where, _bad(error), table.layout)


def _is_held(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)


def _lifted(tree: Tree, table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The file and the text that lie deep in a record, such as a cut of Lhotse."""
    found = {
        ("audio" if extension(file.name) in AUDIO_EXTENSIONS else "image"): file for file in named_within(tree, table, row)
    }
    texts = [text for value in row.values() if isinstance(value, list | Mapping) for text in _texts_in(value)]
    return {name: Path(file.real) for name, file in found.items()} | ({"text": texts[0]} if len(texts) == 1 else {})


def _texts_in(value: Any) -> Iterator[str]:
    for name, one in value.items() if isinstance(value, Mapping) else enumerate(value):
        if name == "text" and isinstance(one, str):
            yield one
        elif isinstance(one, list | Mapping):
            yield from _texts_in(one)


def _named_files(tree: Tree, table: str, value: Any) -> list[File]:
    found = []
    for name in value if isinstance(value, list) else [value]:
        file = tree.resolve(table, name) if isinstance(name, str) else None
        if file is None and isinstance(name, str) and "://" in name[:10]:
            raise BadSample("remote_medium", f"{name!r:.200} is an address: nothing is fetched, img2dataset can do that")
        if file is None:
            raise BadSample("missing_file", f"{name!r:.200} is not in the input, or several files have that name")
        found.append(file)
    return found


def _merged(table: Table) -> Iterator[tuple[str, Any, int]]:
    """Join neighbours that differ only in a text (and in numbers) to a row with a list of texts: the captions of an image."""
    held: tuple[str, Any, int] | None = None
    for where, row, position in rows(table):
        if held and isinstance(row, dict) and isinstance(held[1], dict) and (joined := _joined(held[1], row, table.files)):
            held = held[0], joined, position
            continue
        if held:
            yield held
        held = where, row, position
    if held:
        yield held


def _joined(one: dict[str, Any], other: dict[str, Any], columns: Iterable[str]) -> dict[str, Any] | None:
    if one.keys() != other.keys() or any(
        re.sub(r"#\d+$", "", str(one.get(c))) != re.sub(r"#\d+$", "", str(other.get(c))) for c in columns
    ):
        return None
    if not any(one.get(column) for column in columns):
        return None
    differs = [name for name in one if name not in columns and one[name] != other[name]]
    texts = [n for n in differs if isinstance(other[n], str) and (n.lower() in TEXT_NAMES or " " in other[n])]
    if len(texts) != 1 or any(not str(other[name]).isdecimal() for name in differs if name not in texts):
        return None
    earlier = one[texts[0]]
    return one | {texts[0]: [*(earlier if isinstance(earlier, list) else [earlier]), other[texts[0]]]}


def _read_conll(options: Options, name: str, path: str, split: str | None) -> Iterator[Record]:
    """A document a sentence."""
    clean = partial(normalize_text, options=options)
    try:
        with open_text(path, options.encoding or "")[0] as opened:
            scheme = scheme_of_conll(opened)
        with open_text(path, options.encoding or "")[0] as opened:
            for first, *sentence in sentences_of_conll(opened):
                try:
                    if isinstance(sentence[0], BadSample):
                        raise sentence[0]
                    document, fixed = document_of_words(sentence[0], sentence[1], scheme, clean)
                    yield Record(f"{name}:{first}", document, "CoNLL" + ", fixed" * fixed, split)
                except BadSample as error:
                    yield Record(f"{name}:{first}", error, "CoNLL")
    except (BadSample, *DAMAGE) as error:
        yield Record(name, _bad(error), "CoNLL")


def _read_tar(options: Options, name: str, path: str, split: str | None) -> Iterator[Record]:
    """The samples of a WebDataset: members with one key, adjacent or not, in the order of their first member."""
    groups: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    bad: dict[str, BadSample] = {}
    damage: Exception | None = None
    with open_plain(path) as file:
        try:
            for member, unsafe in _members(file):
                key, rest = split_name(member.name)
                if _is_hidden(member.name):
                    yield Record(f"{name}:{member.name}", BadSample("hidden_file", "hidden files are not read"))
                elif rest in groups[key] or unsafe:
                    detail = unsafe or f"two samples are called {key!r}"
                    bad.setdefault(key, BadSample("unsafe_member" if unsafe else "duplicate_key", detail))
                else:
                    groups[key][rest] = member.offset_data, member.size
        except HOSTILE as error:
            damage = error
        for key, found in _regrouped(groups):
            size, where = sum(size for _, size in found.values()), f"{name}:{key}"
            if key not in bad and size > files.MAX_FILE_BYTES:
                bad[key] = BadSample("sample_too_large", f"the sample has {size:,} bytes")
            sample: Any = bad.get(key) or {one: os.pread(file.fileno(), size, at) for one, (at, size) in found.items()}
            if isinstance(sample, dict) and "txt" in sample and len(sample) > 1:  # a caption
                try:
                    sample["txt"] = decode_text(sample["txt"], options.encoding).strip()
                except BadSample as error:
                    sample = error
            yield Record(where, sample, "WebDataset", split)
    if damage:
        yield Record(name, _bad(damage), "WebDataset")
    elif not groups:
        yield Record(name, BadSample("empty_file", "the tar holds no file"))


HOSTILE = (*DAMAGE, ValueError, ArithmeticError, LookupError, RecursionError, AttributeError)  # what tarfile raises


def _members(file: Any) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the files of a tar, each with the reason why it is unsafe, if it is. Raises one of `HOSTILE`."""
    stop, end = 0, os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            size = member.size if member.isreg() else 0
            if size < 0 or member.offset < stop or member.offset_data - member.offset > 1 << 20:
                raise ValueError(f"the header of {member.name!r} gives an impossible size")
            stop = member.offset_data + -(-size // 512) * 512
            unsafe = "" if member.isreg() and not member.issparse() else f"it is no plain file (tar type {member.type!r})"
            if member.name.startswith("/") or ".." in member.name.split("/"):
                unsafe = f"the name {member.name!r} leaves the archive"
            if stop - 511 > end:
                raise ValueError(f"{member.name!r} is cut off")
            if not member.isdir():
                yield member, unsafe
    if end - stop < 512 or any(os.pread(file.fileno(), 1 << 20, at).strip(b"\0") for at in range(stop, end, 1 << 20)):
        raise ValueError(f"damaged or truncated at byte {stop:,}: neither a member nor the end of the archive follows")


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or "__MACOSX" in name.split("/")


def split_name(name: str) -> tuple[str, str]:
    """(key, rest) of a member's name: the key ends at the first dot of the last part, as in WebDataset."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest


def _regrouped(groups: Mapping[str, dict[str, tuple[int, int]]]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Split groups that are several samples with dots in their names (`a.b.jpg a.b.txt a.c.jpg a.c.txt`)."""
    for key, found in groups.items():
        parts: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        for rest, place in found.items():
            stem, _, last = rest.rpartition(".")
            parts[stem][last] = place
        alike = len({frozenset(part) for part in parts.values()}) == 1 and all(len(part) > 1 for part in parts.values())
        yield from ((f"{key}.{stem}", part) for stem, part in parts.items()) if len(parts) > 1 and alike else [(key, found)]


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    "rejected": _read_rejected, "samples": _read_samples, "text": _read_text, "table": _read_table, "conll": _read_conll,
    "tar": _read_tar,
}  # fmt: skip


def medium(root: str, where: str, value: Any) -> Segment:
    """The segment of a medium: a path, bytes, `{"bytes", "path"}`, a data URI, base64, or the name of a file of the input.

    Raises:
        BadSample: `missing_file`, `unknown_medium`, `file_too_large` or `unreadable_file`.
    """
    name = ""
    if isinstance(value, Mapping):
        name = str(value.get("path") or "")
        value = value.get("bytes") or name
    if isinstance(value, str):
        table = re.sub(r":@?\d+$", "", where)
        tree = _TREES[root][1] if root in _TREES else _tree([root, None], Options())
        file = tree.resolve(table, value)
        data = None if file else _decoded(value)
        if "://" in value[:10] and file is None and data is None:
            raise BadSample("remote_medium", f"{value!r:.200} is an address: nothing is fetched, img2dataset can do that")
        if file is None and data is None:
            raise BadSample("missing_file", f"{value!r:.200} is not in the input, or several files have that name")
        value = Path(file.real) if file else data
    if isinstance(value, Path):
        name = value.name
        try:
            value = read_file(str(value))
        except OSError as error:
            raise BadSample("unreadable_file", str(error)) from error
    if value == b"":
        raise BadSample("empty_file", f"{name or 'the medium'} is empty")
    kind = media_extension(value, name) if isinstance(value, bytes) else None
    if kind is None:
        hint = (
            "a Git LFS pointer: git lfs pull"
            if str(value).startswith("b'version https://git-lfs")
            else "no known image or sound"
        )
        raise BadSample(
            "unknown_medium", f"{name or 'it'} is {hint}; it begins with {value[:12]!r}" if value else "there is no file"
        )
    return Segment(value, kind)


def _decoded(text: str) -> bytes | None:
    """The bytes of a data URI, or of base64 that holds a medium."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    elif len(text) < 100:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if media_extension(data) else None


# -- documents without a pipeline


def read_documents(input: str | Path, options: Options | None = None) -> Iterator[tuple[str, Document | BadSample]]:
    """Yield (file or `file:line`, its document or why there is none) of an input, by inferred field maps.

    Raises:
        ValueError: there is no such input.
    """
    options, maps = options or Options(), dict[str, Fields]()
    with tempfile.TemporaryDirectory() as work:
        for unit in list_units(str(input), options, work):
            root = os.path.abspath(input if os.path.isdir(input) else os.path.dirname(os.path.abspath(input)))
            records = read_unit(root, unit, options)
            head = list(islice(records, PREVIEW))
            for record in chain(head, records):
                content = record.content
                try:
                    if isinstance(content, Mapping):
                        if record.layout not in maps:
                            alike = [r.content for r in head if r.layout == record.layout and isinstance(r.content, Mapping)]
                            maps[record.layout] = (
                                Fields.parse(options.fields) if options.fields else infer_fields(alike or [content])
                            )
                        read = partial(medium, root, record.where)
                        content = maps[record.layout].read(record.where, content, read).document
                except BadSample as error:
                    content = error
                except ValueError as error:
                    content = BadSample("no_fields", str(error))
                yield record.where, content


def evaluation_texts(path: str) -> Iterator[str]:
    """Yield every text of an evaluation set: a text file whole, each string in the rows of a table.

    Raises:
        ValueError: the file cannot be read, or is of another kind.
    """
    format = FORMATS.get(extension(path), "")
    try:
        if format == "text":
            yield decode_text(read_text(os.path.realpath(path)))
        elif format in TABLES:
            file = File(os.path.basename(path), os.path.realpath(path), 0)
            table = sniff(Tree(path, around=False), file, format)[0]
            yield from table.columns if table.has_header else ()
            for _, row, _ in rows(table):
                if isinstance(row, BadSample):
                    raise row
                yield from _strings_in(row)
        else:
            raise ValueError(f"*.{extension(path)} is no text, CSV, JSON or Parquet file")
    except (*DAMAGE, ValueError) as error:  # BadSample is a ValueError
        raise ValueError(f"the evaluation set {path!r} cannot be read: {error}") from error


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings_in(one)
