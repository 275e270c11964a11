"""List the input of `pile prepare`: files become units of some megabytes, which any process can read at any time.

Files of a folder that share a stem are one sample, as is each row of a table whose column names files; other tables, texts and
WebDatasets are read by their units. A file that is not read is in a unit too, with the reason."""

from __future__ import annotations

import os
import pickle
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

from pile_app.data.tar import is_hidden, plain_members, split_name
from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, BadSample, Document
from pile_app.fields import as_list, is_remote
from pile_app.infer import TEXT_NAMES
from pile_app.prepare import files
from pile_app.prepare.files import DAMAGE, MEDIA, File, Tree, extension, open_plain, open_text
from pile_app.prepare.layouts import RECIPES, TEXT_EXTENSIONS, data_set_card, is_about, named_split, speaker_of, split_of
from pile_app.prepare.options import Options
from pile_app.prepare.tables import Table, columnar, is_held, named_within, rows, shown, sniff
from pile_app.records import chat_layout, is_interleaved

UNIT_BYTES = 1 << 24
UNIT_SAMPLES = 1000
FORMATS = dict.fromkeys(TEXT_EXTENSIONS, "text") | {
    "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "ndjson": "json",
    "parquet": "parquet", "arrow": "arrow", "conll": "conll", "bio": "conll", "iob": "conll", "tar": "tar",
} | dict.fromkeys(IMAGE_EXTENSIONS, "image") | dict.fromkeys(AUDIO_EXTENSIONS, "audio")  # fmt: skip
TABLES = ("csv", "json", "parquet", "arrow")
OF_KIND = {
    "text": ("text", "csv", "json", "parquet", "arrow"), "images": ("image", *TABLES), "audio": ("audio", *TABLES),
    "interleaved": ("json", "parquet", "arrow"), "entities": ("conll", "json", "parquet", "arrow"),
    "chat": ("json", "parquet", "arrow"), "webdataset": ("tar",),
}  # fmt: skip


class Unit(NamedTuple):
    """A part of the input: the name of its reader, its arguments (the first names a file), and bytes to read."""

    reader: str
    arguments: list[Any]
    weight: int = 0


class Record(NamedTuple):
    """A sample. where: the file, or `file:line`; content: name -> value, a document, or the reason why it cannot be used;
    layout: shown to people, "" for a file that is not read; split: given by a name; named: name -> path or paths, to read;
    files: path of each file that the content names within chats and interleaved records."""

    where: str
    content: Mapping[str, Any] | BadSample | Document
    layout: str = ""
    split: str | None = None
    named: Mapping[str, Any] = {}
    size: int = 0
    files: Mapping[str, str] = {}


class Listing:
    """Deal the files of an input to units.

    work: a folder to unpack archives to; rest: files that are not dealt yet; scopes: folders with an index, which decides about
    texts and tables; folders: those of files in an index; splits: of files, by a card or a list; classes: of columns,
    by a card.

    Raises ValueError: `input` does not exist."""

    def __init__(self, input: str, options: Options, work: str | None = None) -> None:
        path, _, config = input.partition("#") if not os.path.exists(input) else (input, "", "")
        if not os.path.exists(path):
            raise ValueError(f"{path!r} does not exist (working folder {os.getcwd()})")
        self.options, self.encoding = options, options.encoding
        self.tree = Tree(path, options.follow_links, around=FORMATS.get(extension(path)) in TABLES)
        for _ in range(2):  # archives in archives
            for name in [name for name, file in self.tree.files.items() if self._is_archive(file)]:
                try:
                    if work is None:
                        raise BadSample("archive", "unpack it first")
                    self.tree.unpack(name, os.path.join(work, "unpacked"))
                except BadSample as error:
                    del self.tree.files[name]
                    self.tree.skipped.append((name, error.reason, error.detail))
        self.is_one_file = self.tree.only in self.tree.files
        self.rest = {name: file for name, file in self.tree.files.items() if not self.is_one_file or name == self.tree.only}
        self.has_media = any(extension(name) in MEDIA for name in self.tree.files)
        self.splits, self.classes = dict[str, str | None](), dict[str, list[str]]()
        self.scopes, self.folders, self.list_scopes = set[str](), set[str](), set[str]()
        self.samples: dict[str, _Packer] = defaultdict(_Packer)  # by layout; "": rejected
        self.unread = list[Record]()
        self.said = set[int]()  # hashes of files and the longest text about them, of the tables so far
        for name, *why in self.tree.skipped:
            if files.is_below(name, self.tree.only or ""):
                self.skip(name, *why)
        data_set_card(self, path, config)

    def _is_archive(self, file: File) -> bool:
        """Tell whether a file is an archive of files; a tar is none if two of its members share a key: a WebDataset."""
        if self.tree.only not in (None, file.name):  # around a table that is the input
            return False
        if file.name.lower().endswith(files.ARCHIVES):
            return True
        if extension(file.name) != "tar" or self.options.kind == "webdataset":
            return False
        try:
            with open_plain(file.real) as opened:
                names = [member.name.removeprefix("./") for member, _ in islice(plain_members(opened), 2000)]
        except (ValueError, *DAMAGE):
            return False
        names = [name for name in names if not is_hidden(name)]
        return len({split_name(name)[0] for name in names}) == len(names) > 0 and all("/" in name for name in names)

    def take(self, name: str) -> File:
        return self.rest.pop(name, None) or self.tree.files[name]

    def skip(self, name: str, reason: str, detail: str) -> None:
        """Count a file that is not read."""
        self.rest.pop(name, None)
        self.unread.append(Record(name, BadSample(reason, detail)))

    def reject(self, where: str, layout: str, reason: str, detail: str) -> None:
        self.samples[""].add(Record(where, BadSample(reason, detail), layout))

    def add(self, layout: str, where: str, named: Mapping[str, File], values: Mapping[str, Any]) -> None:
        split = self.split(where.partition(":")[0]) or self.split(next(iter(named.values())).name)
        paths, size = {name: file.real for name, file in named.items()}, sum(file.size for file in named.values())
        own = {os.path.basename(file.name): file.real for file in named.values()} if "json" in named else {}
        self.samples[layout].add(Record(where, values, layout, split, paths, size, own))
        for file in named.values():
            self.rest.pop(file.name, None)

    def split(self, name: str) -> str | None:
        return self.splits.get(name) or split_of(name)

    def format(self, name: str) -> str:
        """Return the format to read a file as, "" for none: by its extension, or by the given kind."""
        kind, found = self.options.kind, FORMATS.get(extension(name), "")
        if kind == "auto" or found in OF_KIND[kind]:
            return found
        is_forced = found in ("", "text") or (kind, found) == ("entities", "csv")  # a word, a tab and its tag
        if not is_forced or extension(name) in MEDIA or (is_about(name) and not self.is_one_file):
            return ""
        return OF_KIND[kind][0] if self.is_one_file or kind not in ("images", "audio") else ""

    def units(self) -> Iterator[Unit]:
        if not self.is_one_file and not all(map(is_about, self.rest)):
            for name in filter(is_about, list(self.rest)):
                self.skip(name, "about_file", "it describes the data set")
        for recipe in RECIPES if self.options.kind == "auto" else ():
            recipe(self)
        groups = self._groups()
        tables = self._tables({name for names in groups.values() for name in names})
        self._add_groups(groups)
        units = [unit for name, file in list(self.rest.items()) for unit in self._single(name, file, self.format(name))]
        for found in self.samples.values():
            yield from found.units()
        yield from (unit for table in tables for unit in self._parts(table))
        yield from units
        yield from _Packer(sorted(self.unread, key=lambda one: (is_about(one.where), one.where))).units()

    def _groups(self) -> dict[str, list[str]]:
        """Group media files with the files that share their stem: path without extension -> names.

        `c.jpg.txt` and `c.0.txt` belong to `c.jpg`, `E.txt` to `e.jpg`, and `frog.seg.png` to `frog.jpg`."""
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
            if folder in self.folders or _is_within(stem, self.list_scopes):
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

    # -- tables

    def _tables(self, grouped: set[str]) -> list[Table]:
        """Add the samples of tables that name files, which decide about the other files; return the other tables."""
        found = [table for name in list(self.rest) if name not in grouped and (table := self._sniff(name))]
        named = {file for table in found if table.is_index for file in self._add_rows(table)}
        if lists := [os.path.dirname(table.name) for table in found if table.delimiter == " "]:  # a list a chapter
            self.list_scopes.add(_common(lists))
            self.scopes |= self.list_scopes
        for name in named:
            self.rest.pop(name, None)
        for table in (others := [table for table in found if not table.is_index]):
            if _is_within(table.name, self.scopes):
                self.skip(table.name, "other_table", "another table names the files here")
        return [table for table in others if not _is_within(table.name, self.scopes)]

    def _sniff(self, name: str) -> Table | None:
        """Return the table in a file; a text, or a file without extension, is a table if it names media."""
        format, file = self.format(name), self.tree.files[name]
        is_list = self.has_media and (format == "text" or (not extension(name) and self.options.kind == "auto"))
        if (not is_list and format not in TABLES) or (is_list and _is_within(name, self.scopes)):
            return None
        if format in ("json", "parquet") and re.sub(r"(_stats)?\.\w+$", ".tar", name) in self.rest:
            self.skip(name, "table_of_tar", "it describes the tar with its name")
            return None
        try:
            table, preview = sniff(self.tree, file, "csv" if is_list else format, self.encoding)
            if is_list and not table.files:
                table, preview = sniff(self.tree, file, "list", self.encoding)
            if self.has_media and not table.is_index and any(chat_layout(row) or is_interleaved(row) for row in preview):
                table = replace(table, nested=self._names_media(table))  # after its first rows, perhaps
        except (BadSample, *DAMAGE) as error:
            bad = as_bad(error)
            if bad.reason == "no_caption":
                self.skip(name, bad.reason, bad.detail)
            elif not is_list:
                self.reject(self.take(name).name, format, bad.reason, bad.detail)
            return None
        if is_list:
            texts = [[text for text in list(map(str, row.values()))[1:] if "://" not in text] for row in preview]
            has_text = sum(bool(re.search(r"[^\W\d_]", "".join(some))) for some in texts) > len(preview) / 2
            if table.files and not has_text:
                self.skip(name, "no_text", "it names files, and holds no texts")
            if not (table.files and has_text):
                return None
        self.take(name)
        if self.options.kind == "text":
            table = replace(table, files=(), nested=False)
        return replace(table, classes={**table.classes, **self.classes}, split=self.split(name))

    def _names_media(self, table: Table) -> bool:
        with suppress(*DAMAGE):
            return any(True for _, row in rows(table) for _ in named_within(self.tree, table.name, shown(row)))
        return False

    def _add_rows(self, table: Table) -> set[str]:
        """Add a sample for each row of a table that names files; return their names."""
        named, folders, said = set[str](), {os.path.dirname(table.name)}, set[int]()
        samples = self.samples[f"{table.layout}:{table.name}"]
        try:
            for where, row in _merged(table):
                hits, sample = self._row(table, where, row)
                values = sample.content.items() if hits and isinstance(sample.content, Mapping) else ()
                texts = [str(value) for name, value in values if name not in table.files]
                said.add(key := hash((tuple(hits), max(texts, key=len, default=""))))
                if texts and key in self.said:
                    error = BadSample("duplicate", "a table before it says the same of its files")
                    sample = sample._replace(content=error, named={})
                samples.add(sample)
                named |= {file.name for file in hits}
                folders |= {os.path.dirname(file.name) for file in hits}
        except (BadSample, *DAMAGE) as error:
            samples.add(Record(table.name, as_bad(error), table.layout))
        self.said |= said
        self.scopes.add(_common(folders))
        self.folders |= {*folders, _common(folders)}
        return named

    def _row(self, table: Table, where: str, row: Any) -> tuple[list[File], Record]:
        """Return the files that a row names, and its sample, in which their paths replace the names."""
        values, error = (dict(found), None) if isinstance(found := shown(row), dict) else ({}, found)
        error, paths, hits = row if isinstance(row, BadSample) else error, dict[str, Any](), list[File]()
        is_record = self.options.kind == "chat" or bool(chat_layout(values)) or is_interleaved(values)
        within = dict(named_within(self.tree, table.name, values)) if table.nested else {}
        hits += within.values()
        if table.nested and not is_record:  # such as a cut of Lhotse
            paths = {"audio" if extension(file.name) in AUDIO_EXTENSIONS else "image": file.real for file in hits}
            texts = [text for value in values.values() if isinstance(value, list | dict) for text in _texts_in(value)]
            values |= {"text": texts[0]} if len(texts) == 1 else {}
        for name in table.files:
            if name in values:
                try:
                    found = [self._find(table.name, value) for value in as_list(values[name])]
                    hits += found
                    paths[name] = found[0].real if len(found) == 1 else [file.real for file in found]
                except BadSample as missing:
                    error = error or missing
        if table.files and not (hits or error or is_record or any(map(is_held, values.values()))):
            error = BadSample("missing_file", f"the row names no file: {', '.join(table.files)} is empty")
        if error:
            error = BadSample(error.reason, error.detail)  # without the row
        speaker = speaker_of(hits[0].name) if hits and table.files else {}
        split = table.split or (split_of(hits[0].name) if hits and table.files else None)
        size, real = sum(file.size for file in hits), {name: file.real for name, file in within.items()}
        return hits, Record(where, error or speaker | values, table.layout, split, paths, size, real)

    def _find(self, table: str, name: Any) -> File:
        """Return the file that a table names. Raises BadSample: `remote_medium` or `missing_file`."""
        if isinstance(name, str) and (file := self.tree.resolve(table, name)):
            return file
        if isinstance(name, str) and is_remote(name):
            raise BadSample("remote_medium", f"{name!r:.200} is an address: nothing is fetched, img2dataset can do that")
        raise BadSample("missing_file", f"{name!r:.200} is not in the input, or several files have that name")

    def _parts(self, table: Table) -> Iterator[Unit]:
        """Yield the units of a table: row groups, or ranges of bytes."""
        size, parts = self.tree.files[table.name].size, [table]
        with suppress(BadSample, *DAMAGE):  # the reader reports the damage
            if table.format == "parquet":
                with columnar(table) as opened:
                    parts = [replace(table, group=group) for group in range(opened.metadata.num_row_groups)]
            elif table.format == "lines" and size > 2 * UNIT_BYTES and open_text(table.real, self.encoding)[1] == 0:
                parts = [replace(table, start=start, stop=stop) for start, stop in _ranges(size)]
        for part in parts:
            yield Unit("table", [table.name, part], size // len(parts))

    # -- other files

    def _single(self, name: str, file: File, format: str) -> Iterator[Unit]:
        if format == "text" and _is_within(name, self.scopes):
            self.skip(name, "not_in_table", "no row of a table names it")
        elif format == "text" and self.has_media and self.options.kind == "auto" and _lists_numbers(file.real):
            self.skip(name, "no_text", "it lists numbers or names, and no files; --kind text reads it as a text")
        elif format == "text" and self.options.label_from_folder and not _label_folder(os.path.dirname(name)):
            self.skip(name, "no_label", "it lies in no folder whose name could be its label")
        elif format == "text":
            for start, stop in _ranges(file.size):
                yield Unit("text", [name, file.real, self.split(name), start, stop], stop - start)
        elif format in ("conll", "tar"):
            yield Unit(format, [name, file.real, self.split(name)], file.size)
        elif format in ("image", "audio"):  # a file of any name, as --kind says
            self.add(f"{format} files", name, {"medium": file}, {})
        else:
            kind = f" with kind {self.options.kind}" * (self.options.kind != "auto")
            self.skip(name, "ignored_extension", f"*.{extension(name) or '(none)'} is not read{kind}; --kind says what it is")


def as_bad(error: Exception) -> BadSample:
    if isinstance(error, BadSample):
        return error
    return BadSample("unreadable_file" if getattr(error, "errno", None) else "damaged_file", str(error))


def _ranges(size: int) -> Iterator[tuple[int, int]]:
    count = max(1, size // UNIT_BYTES)
    return pairwise(size * part // count for part in range(count + 1))


class _Packer:
    """Packs records to units of some megabytes, compressed: the units of millions of files are held in memory."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._units, self._records, self._weight = list[Unit](), list[Record](), 0
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        self._records.append(record)
        self._weight += record.size
        if self._weight > UNIT_BYTES or len(self._records) >= UNIT_SAMPLES:
            self.units()

    def units(self) -> list[Unit]:
        if self._records:
            data = zlib.compress(pickle.dumps(self._records), 1)
            self._units.append(Unit("samples", [self._records[0].where, data], self._weight))
            self._records, self._weight = [], 0
        return self._units


def _is_within(name: str, scopes: Collection[str]) -> bool:
    while name.strip("/") and (name := os.path.dirname(name)) not in scopes:
        pass
    return name in scopes


def _common(folders: Collection[str]) -> str:
    return os.path.commonpath(folders) if "" not in folders else ""


def _label_folder(folder: str) -> str | None:
    base = os.path.basename(folder)
    is_label = base and not re.fullmatch(r"(?i)(data|images?|audio|wavs?|clips)", base) and named_split(base) is None
    return base if is_label else None


def _lists_numbers(path: str) -> bool:
    """Tell whether the first lines of a file are a table, or all a name with a number in it and further numbers."""
    with open_plain(path) as file:
        lines = file.read(4096).decode(errors="replace").split("\n")
    lines = [line for line in lines[:-1] or lines if line.strip()]
    is_table = any(len(counts := {line.count(mark) for line in lines}) == 1 and 0 not in counts for mark in "\t|")
    return is_table or all(re.fullmatch(r"[\w./-]*\d[\w./-]*(\s+[-+.\d]+)*\s*", line) for line in lines)


def _names_in_sample(names: Iterable[str], stem: str) -> dict[str, str]:
    """Name the files of a sample: by extension, `txt` for the text, `normalized.txt` before `original.txt`."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: ("original" in name, len(name), name)):
        full = name[len(stem) + 1 :].lower()
        short = "txt" if extension(name) in TEXT_EXTENSIONS else full if extension(name) in MEDIA else extension(name)
        found[full if short in found else short] = name
    return found


def _texts_in(value: Any) -> Iterator[str]:
    for name, one in value.items() if isinstance(value, Mapping) else enumerate(value):
        if name == "text" and isinstance(one, str):
            yield one
        elif isinstance(one, list | Mapping):
            yield from _texts_in(one)


def _merged(table: Table) -> Iterator[tuple[str, Any]]:
    """Join neighboring rows that differ only in a text (and in numbers): the captions of an image become a list of texts."""
    held: list[tuple[str, Any]] = []
    for where, row in rows(table):
        joined = _joined(held[0][1], row, table.files[0]) if held and len(table.files) == 1 else None
        if joined is None:
            yield from held
        held = [(held[0][0], joined) if joined else (where, row)]
    yield from held


def _joined(row: Any, other: Any, column: str) -> dict[str, Any] | None:
    if not isinstance(row, dict) or not isinstance(other, dict) or row.keys() != other.keys():
        return None
    name, other_name = (re.sub(r"#\d+$", "", str(one.get(column) or "")) for one in (row, other))
    differs = [n for n in row if n != column and row[n] != other[n]]
    texts = [n for n in differs if isinstance(other[n], str) and (n.lower() in TEXT_NAMES or " " in other[n])]
    are_numbers = all(str(other[n]).isdecimal() for n in {*differs} - {*texts})
    if not name or name != other_name or len(texts) != 1 or not are_numbers:
        return None
    return row | {texts[0]: [*as_list(row[texts[0]]), other[texts[0]]]}
