"""Read the input of `pile prepare`: an input becomes units of some megabytes, and units become samples.

    input ──► list_units ──► Unit ──► read_unit ──► Record(where, sample, layout, split) ──► a field map makes documents

One process lists the input; any process can read a unit at any time. Files of a folder that share a stem are one sample, a
table whose column names files is their index, each row of another table is a sample, archives are unpacked, tars are
WebDatasets. A file that is not read is a record too, with the reason.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pile_app.data.tar import plain_members, split_name
from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, BadSample, Document, Segment, media_extension
from pile_app.fields import Fields, as_list
from pile_app.infer import TEXT_NAMES, infer_fields
from pile_app.prepare import files
from pile_app.prepare.files import DAMAGE, MEDIA, File, Tree, extension, open_plain, open_text, read_file, read_text, root_of
from pile_app.prepare.filters import normalize_text
from pile_app.prepare.hub import Card, read_card
from pile_app.prepare.layouts import RECIPES, TEXT_EXTENSIONS, is_about, named_split, speaker_of, split_of
from pile_app.prepare.options import Options
from pile_app.prepare.tables import PREVIEW, Table, is_held, named_within, row_groups, rows, sniff
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
    """A part of the input: the name of its reader, JSON arguments (the first names the file), and bytes to read."""

    reader: str
    arguments: list[Any]
    weight: int = 0


class Record(NamedTuple):
    """A sample that was read. where: the file, or `file:line`; content: name -> value, a document, or an error; layout: shown
    to people, "" for a file that is not read; split: given by a name."""

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
    """Deal the files of an input to units.

    rest: files that are not dealt yet; scopes: folders with an index, which decides about texts and tables; folders: those of
    files in an index; splits: of media, by a card or a list; samples: layout -> samples; unread, bad: (file, reason, detail).
    """

    def __init__(self, input: str, options: Options, work: str | None, stamp: Callable[[bytes], Any]) -> None:
        digest = hashlib.sha256()
        path, _, config = input.partition("#") if not os.path.exists(input) else (input, "", "")
        if not os.path.exists(path):
            raise ValueError(f"{path!r} does not exist (working folder {os.getcwd()})")
        self.options, self.encoding = options, options.encoding or ""
        self.tree = _open_tree([path, work], options, lambda data: [stamp(data), digest.update(data)])  # type: ignore[func-returns-value]
        self.key = [path, work, digest.hexdigest()]
        _TREES[self.tree.root] = self.key, self.tree
        self.is_one_file = self.tree.only in self.tree.files
        self.rest = {name: file for name, file in self.tree.files.items() if not self.is_one_file or name == self.tree.only}
        self.has_media = any(extension(name) in MEDIA for name in self.tree.files)
        self.unread = [one for one in self.tree.skipped if files.is_below(one[0], self.tree.only or "")]
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

    def add(self, layout: str, where: str, named: Mapping[str, File], values: Mapping[str, Any]) -> None:
        split = self.split(where.partition(":")[0]) or self.split(next(iter(named.values())).name)
        paths, size = {name: file.real for name, file in named.items()}, sum(file.size for file in named.values())
        self.samples[layout].append((where, split, paths, dict(values), size))
        for file in named.values():
            self.rest.pop(file.name, None)

    def split(self, name: str) -> str | None:
        return self.splits.get(name) or split_of(name)

    def is_covered(self, name: str, scopes: Collection[str]) -> bool:
        while name.strip("/") and (name := os.path.dirname(name)) not in scopes:
            pass
        return name in scopes

    def format(self, name: str) -> str:
        """Return the format to read a file as, "" for none: by its extension, or by the given kind."""
        kind, found = self.options.kind, FORMATS.get(extension(name), "")
        if kind == "auto" or found in OF_KIND[kind]:
            return found
        if found not in ("", "text") or extension(name) in MEDIA or (is_about(name) and not self.is_one_file):
            return ""
        return FORCED.get(kind) or (FORCED_FILE[kind] if self.is_one_file else "")

    def units(self) -> Iterator[Unit]:
        for name in list(self.rest):
            if self.card.splits and name not in self.card.splits and not is_about(name):
                self.skip(name, "other_config", "the configuration of the data set card does not name it")
        if not self.is_one_file and not all(map(is_about, self.rest)):
            for name in filter(is_about, list(self.rest)):
                self.skip(name, "about_file", "it describes the data set")
        for recipe in RECIPES if self.options.kind == "auto" else ():
            recipe(self)
        groups = self._groups()
        tables = self._tables({name for names in groups.values() for name in names})
        self._add_groups(groups)
        for layout, found in self.samples.items():
            yield from _units_of_samples(layout, found)
        yield from tables
        for name, file in list(self.rest.items()):
            yield from self._single(name, file, self.format(name))
        for found in (self.bad, [(*one, "") for one in sorted(self.unread, key=lambda one: (one[1] == "about_file", one))]):
            yield from [Unit("rejected", ["", found])] if found else []

    def _groups(self) -> dict[str, list[str]]:
        """Group media files with the files that share their stem: path without extension -> names.

        `c.jpg.txt` and `c.0.txt` belong to `c.jpg`, `E.txt` to `e.jpg`, and `frog.seg.png` to `frog.jpg`.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.rest:
            if extension(name) in MEDIA:
                groups[name.rpartition(".")[0]].append(name)
        lower = Counter(map(str.lower, groups))
        owners = {stem.lower(): stem for stem in groups if lower[stem.lower()] == 1} | {stem: stem for stem in groups}
        for name in list(self.rest) if groups else ():
            is_medium, is_text = extension(name) in MEDIA, extension(name) in (*TEXT_EXTENSIONS, "json")
            own = name.rpartition(".")[0] if is_medium else ""
            stem, owner = own or name, None
            while owner is None and "." in os.path.basename(stem):
                stem, _, part = stem.rpartition(".")
                if not is_medium or part.isalpha():
                    owner = owners.get(stem, owners.get(stem.lower()))
                if not is_text and not is_medium:
                    break
            if owner in groups and not is_medium:
                groups[owner].append(name)
            elif owner in groups and len(groups.get(own, ())) == 1:
                groups[owner] += groups.pop(own)
        return groups

    def _add_groups(self, groups: Mapping[str, list[str]]) -> None:
        """Add the samples of files that share a stem."""
        kinds = {stem: {self.format(name) for name in names} & {"image", "audio"} for stem, names in groups.items()}
        labels = self._class_folders([stem for stem in groups if kinds[stem]], groups)
        for stem, names in groups.items():
            names = [name for name in names if name in self.rest]
            media = [name for name in names if extension(name) in MEDIA]
            folder, has_text = os.path.dirname(stem), any(extension(name) in TEXT_EXTENSIONS for name in names)
            if folder in self.folders or self.is_covered(stem, self.list_scopes):
                reason = "not_in_table", "no row of a table names it"
            elif not kinds[stem] and not (has_text and self.options.kind == "auto"):
                reason = "ignored_extension", f"kind is {self.options.kind}: no such file is read"
            elif media:
                named = {key: self.tree.files[name] for key, name in _names_in_sample(names, stem).items()}
                values = ({"label": labels[folder]} if folder in labels else {}) | speaker_of(media[0])
                self.add(f"{' and '.join(sorted(kinds[stem])) or 'unreadable'} files", media[0], named, values)
                continue
            else:
                continue
            for name in names:
                self.skip(name, *reason)

    def _class_folders(self, stems: Iterable[str], groups: Mapping[str, list[str]]) -> dict[str, str]:
        """Return folder -> label, if the media lie in folders of classes, all at one depth, and have no texts."""
        folders = {os.path.dirname(stem): _label_folder(os.path.dirname(stem)) for stem in stems}
        has_texts = any(extension(name) in TEXT_EXTENSIONS for stem in stems for name in groups[stem])
        is_even = len({folder.count("/") for folder in folders}) == 1 and all(folders.values())
        if self.scopes or has_texts or not is_even or not 2 <= len({*folders.values()}) <= 1000:
            return {}
        parents = {folder: _label_folder(os.path.dirname(folder)) for folder in folders}
        pairs = Counter(label for label, _ in {(label, parents[folder]) for folder, label in folders.items()})
        repeated = {label for label, count in pairs.items() if count > 1}  # characters of several alphabets, say
        return {f: f"{parents[f]}/{label}" if label in repeated else str(label) for f, label in folders.items()}

    def _tables(self, grouped: set[str]) -> list[Unit]:
        """List the units of all tables, first of those that name files, since they decide which other files are read."""
        found = [table for name in list(self.rest) if name not in grouped and (table := self._sniff(name))]
        named: set[str] = set()
        units = [unit for table in found if table.is_index for unit in self._parts(table, named)]
        if lists := [os.path.dirname(table.name) for table in found if table.delimiter == " "]:  # a list a chapter
            self.list_scopes.add(_common(lists))
            self.scopes |= self.list_scopes
        for name in named:
            self.rest.pop(name, None)
        for table in found:
            if not table.is_index and self.is_covered(table.name, self.scopes):
                self.skip(table.name, "other_table", "another table names the files here")
            elif not table.is_index:
                units += self._parts(table, named)
        return units

    def _sniff(self, name: str) -> Table | None:
        """Return the table in a file; a text, or a file without extension, is a table if it names media."""
        format, file = self.format(name), self.tree.files[name]
        is_list = self.has_media and (format == "text" or (not extension(name) and self.options.kind == "auto"))
        if (not is_list and format not in TABLES) or (is_list and self.is_covered(name, self.scopes)):
            return None
        if format in ("json", "parquet") and re.sub(r"(_stats)?\.\w+$", ".tar", name) in self.rest:
            self.skip(name, "table_of_tar", "it describes the tar with its name")
            return None
        try:
            table, preview = sniff(self.tree, file, "csv" if is_list else format, self.encoding)
            if is_list and not table.files:
                table, preview = sniff(self.tree, file, "list", self.encoding)
        except (BadSample, *DAMAGE) as error:
            bad = _bad(error)
            if bad.reason == "no_caption":
                self.skip(name, bad.reason, bad.detail)
            elif not is_list:
                self.bad.append((self.take(name).name, bad.reason, bad.detail, format))
            return None
        is_dialogue = any("exchange" in row for row in preview)
        texts = [list(map(str, row.values()))[1:] for row in preview if is_list]
        has_text = [any(re.search(r"[^\W\d_]", text) and "://" not in text for text in some) for some in texts]
        if is_list and sum(has_text) <= len(preview) / 2:
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
        return replace(table, classes={**table.classes, **self.card.classes}, merged=is_merged, split=self.split(name))

    def _parts(self, table: Table, named: set[str]) -> Iterator[Unit]:
        """Yield the units of a table; add the files that it names to `named`, and their folders to the scopes."""
        size, is_plain = self.tree.files[table.name].size, open_text(table.real, self.encoding)[1]
        key = self.key if table.is_index or table.format in ("json", "lines", "parquet") else None
        cuts, parts = [(0, 0)], [table]
        if table.is_index or (table.format == "csv" and is_plain and size > UNIT_BYTES):
            folders, weight, before, end = {os.path.dirname(table.name)}, 0, None, 0
            with suppress(BadSample, *DAMAGE):  # the reader reports the damage
                for where, row, position in rows(replace(table, lenient=True)):
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
            if table.is_index:
                self.scopes.add(_common(folders))
                self.folders |= {*folders, _common(folders)}
        if table.format == "csv" and is_plain:
            parts = [replace(table, start=a, line=line, stop=b) for (a, line), (b, _) in pairwise([*cuts, (0, 0)])]
        elif table.format == "lines" and is_plain and (count := size // UNIT_BYTES) > 1:
            parts = [replace(table, start=a, stop=b) for a, b in pairwise(size * n // count for n in range(count + 1))]
        elif table.format == "parquet":
            parts = [replace(table, group=group) for group in range(row_groups(table))]
        for part in parts:
            yield Unit("table", [table.name, asdict(part), key], size // len(parts))

    def _single(self, name: str, file: File, format: str) -> Iterator[Unit]:
        if format == "text" and self.is_covered(name, self.scopes):
            self.skip(name, "not_in_table", "no row of a table names it")
        elif format == "text" and self.has_media and self.options.kind == "auto" and _lists_numbers(file.real):
            self.skip(name, "no_text", "it lists numbers or names; --kind text reads it as a text")
        elif format == "text" and self.options.label_from_folder and not _label_folder(os.path.dirname(name)):
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


_TREES: dict[str, tuple[list[Any], Tree]] = {}  # root of the input -> its newest tree in this process


def _tree(key: list[Any], options: Options) -> Tree:
    root = root_of(key[0])
    if root not in _TREES or _TREES[root][0] != key:
        _TREES[root] = key, _open_tree(key, options)
    return _TREES[root][1]


def _open_tree(key: list[Any], options: Options, stamp: Callable[[bytes], Any] = len) -> Tree:
    """List the files of an input, with its archives unpacked below the folder `work`."""
    path, work = key[:2]
    tree = Tree(path, options.follow_links, stamp, around=FORMATS.get(extension(path)) in TABLES)
    for _ in range(2):  # archives in archives
        for name, file in list(tree.files.items()):
            if tree.only not in (None, name) or not (name.lower().endswith(files.ARCHIVES) or _is_folder_tree(file, options)):
                continue
            try:
                if work is None:
                    raise BadSample("archive", "unpack it first")
                tree.unpack(name, os.path.join(work, "unpacked"))
            except BadSample as error:
                del tree.files[name]
                tree.skipped.append((name, error.reason, error.detail))
    return tree


def _is_folder_tree(file: File, options: Options) -> bool:
    """Whether a tar is a tree of folders, not a WebDataset: no two files share a key."""
    if extension(file.name) != "tar" or options.kind == "webdataset":
        return False
    try:
        with open_plain(file.real) as opened:
            names = [member.name.removeprefix("./") for member, _ in islice(plain_members(opened), 2000)]
    except (ValueError, *DAMAGE):
        return False
    names = [name for name in names if not _is_hidden(name)]
    return len({split_name(name)[0] for name in names}) == len(names) > 0 and all("/" in name for name in names)


def _common(folders: Collection[str]) -> str:
    return os.path.commonpath(folders) if "" not in folders else ""


def _label_folder(folder: str) -> str | None:
    base = os.path.basename(folder)
    is_label = base and not re.fullmatch(r"(?i)(data|images?|audio|wavs?|clips)", base) and named_split(base) is None
    return base if is_label else None


def _lists_numbers(path: str) -> bool:
    """Whether the first lines of a file are all a name with a number in it and further numbers, as lists of pictures are."""
    with open_plain(path) as file:
        lines = file.read(4096).decode(errors="replace").split("\n")
    return all(re.fullmatch(r"[\w./-]*\d[\w./-]*(\s+[-+.\d]+)*\s*", line) for line in lines[:-1] or lines)


def _file_names(table: Table, row: Mapping[str, Any]) -> list[str]:
    found = [one for name in table.files for one in as_list(row.get(name)) if isinstance(one, str)]
    return [re.sub(r"#\d+$", "", one) for one in found]


def _names_in_sample(names: Iterable[str], stem: str) -> dict[str, str]:
    """Name the files of a sample: by extension, `txt` for the text, `normalized.txt` before `original.txt`."""
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
    """Read the records of a unit, in order: the same in any process, at any time.

    Damage to a file is a record; rows after it are lost.
    """
    name, argument = str(unit.arguments[0]), unit.arguments[1]
    try:
        for record in READERS[unit.reader](options, *unit.arguments):
            where = record.where
            yield record if where.isascii() else record._replace(where=os.fsencode(where).decode(errors="replace"))
    except (BadSample, *DAMAGE) as error:
        layout = LAYOUTS.get(unit.reader) or Table(**argument).layout
        yield Record(os.fsencode(name).decode(errors="replace"), _bad(error), layout)


def _bad(error: Exception) -> BadSample:
    if isinstance(error, BadSample):
        return error
    return BadSample("unreadable_file" if getattr(error, "errno", None) else "damaged_file", str(error))


def _read_rejected(_: Options, __: str, found: list[Any]) -> Iterator[Record]:
    for where, reason, detail, layout in found:
        yield Record(where, BadSample(reason, detail), layout)


def _read_samples(options: Options, _: str, layout: str, found: list[Any]) -> Iterator[Record]:
    for where, split, named, values in found:
        try:
            sample = {name: _content(name, path, options) for name, path in named.items()}
            yield Record(where, sample | values, layout, split)
        except (BadSample, *DAMAGE) as error:
            yield Record(where, _bad(error), layout)


def _content(name: str, path: str, options: Options) -> Any:
    """Decode the text of a sample, and read its JSON; other files stay paths."""
    if name == "txt":
        return decode_text(read_text(path, options.encoding or "", files.MAX_LINE_BYTES)).strip()
    return read_file(path) if name == "json" else Path(path)


def _read_text(options: Options, name: str, path: str, split: str | None, start: int, stop: int) -> Iterator[Record]:
    """Read one sample, or several if the file is longer than `document_bytes`."""
    file, is_plain = open_text(path, options.encoding or "")
    with file:
        if is_plain:
            start, stop = (files.next_cut(file, cut, options.document_bytes) for cut in (start, stop))
            file.seek(start)
        elif start:
            return
        for piece in files.pieces_of(file, stop - start if is_plain else -1, options.document_bytes):
            try:
                yield Record(name, {"txt": decode_text(piece)}, LAYOUTS["text"], split)
            except BadSample as error:
                yield Record(name, error, LAYOUTS["text"])


def _read_table(options: Options, _: str, fields: dict[str, Any], key: list[Any] | None) -> Iterator[Record]:
    table = Table(**fields)
    tree = key and _tree(key, options)
    for where, row, _end in _merged(table) if table.merged else rows(table):
        try:
            if isinstance(row, BadSample):
                raise row
            if table.tagged or options.kind == "entities":
                tagged = document_of_record(row, partial(normalize_text, options=options))
                if tagged is None:
                    raise BadSample("no_spans", "it has neither text and spans nor tokens and tags")
                yield Record(where, tagged[0], table.layout + ", fixed" * tagged[1], table.split)
            else:
                sample, split = _with_files(table, row, tree, options) if tree else (row, None)
                yield Record(where, sample, table.layout, table.split or split)
        except BadSample as error:
            yield Record(where, error, table.layout)


def _with_files(table: Table, row: Mapping[str, Any], tree: Tree, options: Options) -> tuple[dict[str, Any], str | None]:
    """Replace names of files in a row by their paths; returns the row, and the split that the first file's name gives."""
    sample, first = dict(row), None
    if table.nested and not chat_layout(row) and not is_interleaved(row):  # such as a cut of Lhotse
        for file in named_within(tree, table.name, row):
            sample["audio" if extension(file.name) in AUDIO_EXTENSIONS else "image"] = Path(file.real)
        texts = [text for value in row.values() if isinstance(value, list | Mapping) for text in _texts_in(value)]
        sample |= {"text": texts[0]} if len(texts) == 1 else {}
    for name in table.files:
        if name in row:
            found = [_resolve(tree, table.name, value) for value in as_list(row[name])]
            first = first or next(iter(found), None)
            paths = [Path(file.real) for file in found]
            sample[name] = paths[0] if len(paths) == 1 else paths
    is_chat = options.kind == "chat" or chat_layout(row)
    if table.files and first is None and not is_chat and not any(map(is_held, row.values())):
        raise BadSample("missing_file", f"the row names no file: {', '.join(table.files)} is empty")
    return (speaker_of(first.name) | sample, split_of(first.name)) if first else (sample, None)


def _texts_in(value: Any) -> Iterator[str]:
    for name, one in value.items() if isinstance(value, Mapping) else enumerate(value):
        if name == "text" and isinstance(one, str):
            yield one
        elif isinstance(one, list | Mapping):
            yield from _texts_in(one)


def _resolve(tree: Tree, table: str, name: Any) -> File:
    """Return the file that a table names. Raises BadSample: `remote_medium` or `missing_file`."""
    if isinstance(name, str) and (file := tree.resolve(table, name)):
        return file
    if isinstance(name, str) and "://" in name[:10]:
        raise BadSample("remote_medium", f"{name!r:.200} is an address: nothing is fetched, img2dataset can do that")
    raise BadSample("missing_file", f"{name!r:.200} is not in the input, or several files have that name")


def _merged(table: Table) -> Iterator[tuple[str, Any, int]]:
    """Join neighbors that differ only in a text (and in numbers) to a row with a list of texts: the captions of an image."""
    held: tuple[str, Any, int] | None = None
    for where, row, position in rows(table):
        joined = _joined(held[1], row, table.files) if held else None
        if held and joined is None:
            yield held
        held = (held[0], joined, position) if held and joined else (where, row, position)
    yield from [held] if held else []


def _joined(row: Any, other: Any, columns: Collection[str]) -> dict[str, Any] | None:
    if not isinstance(row, dict) or not isinstance(other, dict) or row.keys() != other.keys():
        return None
    names, others = ([re.sub(r"#\d+$", "", str(one.get(name) or "")) for name in columns] for one in (row, other))
    differs = [name for name in row if name not in columns and row[name] != other[name]]
    texts = [n for n in differs if isinstance(other[n], str) and (n.lower() in TEXT_NAMES or " " in other[n])]
    if (
        names != others
        or not any(names)
        or len(texts) != 1
        or not all(str(other[n]).isdecimal() for n in {*differs} - {*texts})
    ):
        return None
    return row | {texts[0]: [*as_list(row[texts[0]]), other[texts[0]]]}


def _read_conll(options: Options, name: str, path: str, split: str | None) -> Iterator[Record]:
    """Read a document a sentence."""
    clean = partial(normalize_text, options=options)
    with open_text(path, options.encoding or "")[0] as opened:
        scheme = scheme_of_conll(opened)
    with open_text(path, options.encoding or "")[0] as opened:
        for first, *sentence in sentences_of_conll(opened):
            try:
                if isinstance(sentence[0], BadSample):
                    raise sentence[0]
                document, fixed = document_of_words(sentence[0], sentence[1], scheme, clean)
                yield Record(f"{name}:{first}", document, LAYOUTS["conll"] + ", fixed" * fixed, split)
            except BadSample as error:
                yield Record(f"{name}:{first}", error, LAYOUTS["conll"])


def _read_tar(options: Options, name: str, path: str, split: str | None) -> Iterator[Record]:
    """Read the samples of a WebDataset: members with one key, adjacent or not, in the order of their first member."""
    groups: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    bad: dict[str, BadSample] = {}
    damage = None
    with open_plain(path) as file:
        try:
            for member, unsafe in plain_members(file):
                key, rest = split_name(member.name.removeprefix("./"))
                if _is_hidden(member.name):
                    yield Record(f"{name}:{member.name}", BadSample("hidden_file", "hidden files are not read"))
                    continue
                if unsafe or rest in groups[key]:
                    bad.setdefault(key, unsafe or BadSample("duplicate_key", f"two samples are called {key!r}"))
                groups[key].setdefault(rest, (member.offset_data, member.size))
        except (ValueError, *DAMAGE) as error:
            damage = BadSample("damaged_file", f"damaged or truncated: {error}")
        for key, found in _regrouped(groups):
            try:
                if key in bad:
                    raise bad[key]
                if (size := sum(size for _, size in found.values())) > files.MAX_FILE_BYTES:
                    raise BadSample("sample_too_large", f"the sample has {size:,} bytes")
                sample: dict[str, Any] = {rest: os.pread(file.fileno(), size, at) for rest, (at, size) in found.items()}
                if "txt" in sample and len(sample) > 1:  # a caption
                    sample["txt"] = decode_text(sample["txt"], options.encoding).strip()
                yield Record(f"{name}:{key}", sample, LAYOUTS["tar"], split)
            except BadSample as error:
                yield Record(f"{name}:{key}", error, LAYOUTS["tar"])
    if damage or not groups:
        raise damage or BadSample("empty_file", "the tar holds no file")


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or "__MACOSX" in name.split("/")


def _regrouped(groups: Mapping[str, dict[str, tuple[int, int]]]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Split groups that are several samples with dots in their names (`a.b.jpg a.b.txt a.c.jpg a.c.txt`)."""
    for key, found in groups.items():
        parts: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        for rest, position in found.items():
            stem, _, last = rest.rpartition(".")
            parts[stem][last] = position
        alike = len({frozenset(part) for part in parts.values()}) == 1 and all(len(part) > 1 for part in parts.values())
        yield from ((f"{key}.{stem}", part) for stem, part in parts.items()) if len(parts) > 1 and alike else [(key, found)]


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    "rejected": _read_rejected, "samples": _read_samples, "text": _read_text, "table": _read_table, "conll": _read_conll,
    "tar": _read_tar,
}  # fmt: skip
LAYOUTS = {"text": "text file", "conll": "CoNLL", "tar": "WebDataset"}


def medium(root: str, where: str, value: Any) -> Segment:
    """Read a medium: a path, bytes, `{"bytes", "path"}`, a data URI, base64, or the name of a file of the input.

    Raises:
        BadSample: `missing_file`, `remote_medium`, `unknown_medium`, `empty_file`, `file_too_large` or `unreadable_file`.
    """
    name = ""
    if isinstance(value, Mapping):
        name = str(value.get("path") or "")
        value = value.get("bytes") or name
    if isinstance(value, str):
        tree = _TREES[root][1] if root in _TREES else _tree([root, None], Options())
        table = re.sub(r":@?\d+$", "", where)
        value = _decoded(value) or Path(_resolve(tree, table, value).real)
    if isinstance(value, Path):
        name = value.name
        try:
            value = read_file(str(value))
        except OSError as error:
            raise BadSample("unreadable_file", str(error)) from error
    if not isinstance(value, bytes):
        raise BadSample("unknown_medium", f"{value!r:.80} is no image or sound")
    if not value:
        raise BadSample("empty_file", f"{name or 'the medium'} is empty")
    if kind := media_extension(value, name):
        return Segment(value, kind)
    is_pointer = value.startswith(b"version https://git-lfs")
    found = "a Git LFS pointer: git lfs pull" if is_pointer else f"no known image or sound; it begins with {value[:12]!r}"
    raise BadSample("unknown_medium", f"{name or 'it'} is {found}")


def _decoded(text: str) -> bytes | None:
    """Decode a data URI, or base64 that holds a medium."""
    is_uri = text.startswith("data:")
    with suppress(ValueError):
        data = (
            base64.b64decode(text.partition(",")[2] if is_uri else text, validate=True) if is_uri or len(text) >= 100 else b""
        )
        return data if media_extension(data) else None
    return None


# -- documents without a pipeline


def read_documents(input: str | Path, options: Options | None = None) -> Iterator[tuple[str, Document | BadSample]]:
    """Yield (file or `file:line`, its document or the error) of an input, by inferred field maps.

    Raises:
        ValueError: there is no such input.
    """
    options, maps, root = options or Options(), dict[str, Fields](), root_of(str(input))
    with tempfile.TemporaryDirectory() as work:
        for unit in list_units(str(input), options, work):
            records = read_unit(root, unit, options)
            head = list(islice(records, PREVIEW))
            for where, content, layout, _ in chain(head, records):
                try:
                    if isinstance(content, Mapping):
                        if layout not in maps:
                            alike = [r.content for r in head if r.layout == layout and isinstance(r.content, Mapping)]
                            maps[layout] = Fields.parse(options.fields) if options.fields else infer_fields(alike or [content])
                        content = maps[layout].read(where, content, partial(medium, root, where)).document
                except ValueError as error:
                    content = error if isinstance(error, BadSample) else BadSample("no_fields", str(error))
                yield where, content


def evaluation_texts(path: str) -> Iterator[str]:
    """Yield every text of an evaluation set: a text file whole, each string in the rows of a table.

    Raises:
        ValueError: the file cannot be read, or is of another kind.
    """
    format, real = FORMATS.get(extension(path), ""), os.path.realpath(path)
    try:
        if format == "text":
            yield decode_text(read_text(real))
        elif format in TABLES:
            table = sniff(Tree(path, around=False), File(os.path.basename(path), real, 0), format)[0]
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
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings_in(one)
    elif isinstance(value, str):
        yield value
