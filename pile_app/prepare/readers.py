"""Read the units of an input: `read_unit` gives records, samples or the reason why there is none, and `read_record` their
documents, by field maps that `infer_maps` guesses. Bad records are yielded as errors, and the next are read. A unit is read in
any process, at any time."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pile_app.data.tar import is_hidden, plain_members, split_name
from pile_app.documents import BadSample, Document, media_extension
from pile_app.fields import Field, Fields, Reading
from pile_app.infer import infer_fields
from pile_app.prepare import files
from pile_app.prepare.entities import document_of_record, document_of_words, scheme_of_tags, sentences_of_conll
from pile_app.prepare.files import DAMAGE, decode_text, open_plain, open_text, read_file, read_text
from pile_app.prepare.filters import normalize_text
from pile_app.prepare.listing import Listing, Record, Unit, as_bad
from pile_app.prepare.options import Options
from pile_app.prepare.tables import Table, rows

LAYOUTS = {"text": "text file", "conll": "CoNLL", "tar": "WebDataset"}
SAMPLES = 200  # of a table or folder, by which its field map is inferred


def read_unit(unit: Unit, options: Options) -> Iterator[Record]:
    """Read the records of a unit, in order."""
    name, layout = str(unit.arguments[0]), LAYOUTS.get(unit.reader, "")
    try:
        for record in READERS[unit.reader](options, *unit.arguments):
            yield record if record.where.isascii() else record._replace(where=_printable(record.where))
    except (BadSample, *DAMAGE) as error:
        yield Record(_printable(name), as_bad(error), layout or unit.arguments[1].layout)


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")


def _tried(read: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result, or the reason why there is none."""
    try:
        return read(*arguments)
    except (BadSample, *DAMAGE) as error:
        return as_bad(error)


def _read_samples(options: Options, _: str, packed: bytes) -> Iterator[Record]:
    for record in pickle.loads(zlib.decompress(packed)):  # of `Listing`
        yield record._replace(content=_tried(_filled, record, options), named={})


def _filled(record: Record, options: Options) -> Any:
    """Read the text and the JSON of a sample; other files stay paths."""
    content: Any = dict(record.content) if isinstance(record.content, Mapping) else record.content
    for name, path in record.named.items() if isinstance(content, dict) else ():
        if name == "txt":
            content[name] = decode_text(read_text(path, options.encoding, files.MAX_LINE_BYTES)).strip()
        elif name == "json":
            content[name] = read_file(path)
        else:
            content[name] = list(map(Path, path)) if isinstance(path, list) else Path(path)
    return content


def _read_text(options: Options, name: str, path: str, split: str | None, start: int, stop: int) -> Iterator[Record]:
    """Read one sample, or several if the file is longer than `document_bytes`."""
    file, begin = open_text(path, options.encoding, start, stop)
    if begin < 0 and start:  # the first part reads a file that is compressed or UTF-16
        return
    with file:
        for piece in files.pieces_of(file, options.document_bytes):
            text = _tried(decode_text, piece)
            yield Record(name, text if isinstance(text, BadSample) else {"txt": text}, LAYOUTS["text"], split)


def _read_table(options: Options, _: str, table: Table) -> Iterator[Record]:
    for where, row in rows(table):
        if isinstance(row, BadSample) or not (table.tagged or options.kind == "entities"):
            yield Record(where, row, table.layout, table.split)
        else:
            yield _tagged(where, table.layout, table.split, document_of_record, row, partial(normalize_text, options=options))


def _tagged(where: str, layout: str, split: str | None, read: Callable[..., Any], *arguments: Any) -> Record:
    found = _tried(read, *arguments) or BadSample("no_spans", "it has neither text and spans nor tokens and tags")
    if isinstance(found, BadSample):
        return Record(where, found, layout)
    return Record(where, found[0], layout + ", fixed" * found[1], split)


def _read_conll(options: Options, name: str, path: str, split: str | None) -> Iterator[Record]:
    """Read a document a sentence."""
    clean = partial(normalize_text, options=options)
    with open_text(path, options.encoding)[0] as opened:
        scheme = scheme_of_tags(sentence[2] for sentence in sentences_of_conll(opened) if len(sentence) == 3)
    with open_text(path, options.encoding)[0] as opened:
        for first, *sentence in sentences_of_conll(opened):
            if isinstance(sentence[0], BadSample):
                yield Record(f"{name}:{first}", sentence[0], LAYOUTS["conll"])
            else:
                yield _tagged(f"{name}:{first}", LAYOUTS["conll"], split, document_of_words, *sentence, scheme, clean)


def _read_tar(options: Options, name: str, path: str, split: str | None) -> Iterator[Record]:
    """Read the samples of a WebDataset: members with one key, adjacent or not, in the order of their first member."""
    groups: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    bad: dict[str, BadSample] = {}
    damage = None
    with open_plain(path) as file:
        try:
            for member, unsafe in plain_members(file):
                key, rest = split_name(member.name.removeprefix("./"))
                if is_hidden(member.name):
                    yield Record(f"{name}:{member.name}", BadSample("hidden_file", "hidden files are not read"))
                    continue
                if unsafe or rest in groups[key]:
                    bad.setdefault(key, unsafe or BadSample("duplicate_key", f"two samples are called {key!r}"))
                groups[key].setdefault(rest, (member.offset_data, member.size))
        except (ValueError, *DAMAGE) as error:
            damage = BadSample("damaged_file", f"damaged or truncated: {error}")
        for key, found in _regrouped(groups):
            yield Record(f"{name}:{key}", bad.get(key) or _tried(_members, file, found, options), LAYOUTS["tar"], split)
    if damage or not groups:
        raise damage or BadSample("empty_file", "the tar holds no file")


def _members(file: BinaryIO, found: Mapping[str, tuple[int, int]], options: Options) -> dict[str, Any]:
    if (size := sum(size for _, size in found.values())) > files.MAX_FILE_BYTES:
        raise BadSample("sample_too_large", f"the sample has {size:,} bytes")
    sample: dict[str, Any] = {rest: os.pread(file.fileno(), size, at) for rest, (at, size) in found.items()}
    if "txt" in sample and len(sample) > 1:  # a caption
        sample["txt"] = decode_text(sample["txt"], options.encoding).strip()
    return sample


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
    "samples": _read_samples, "text": _read_text, "table": _read_table, "conll": _read_conll, "tar": _read_tar,
}  # fmt: skip


# -- documents


Maps = Mapping[str, Fields]  # the field maps of an input, by table or folder (`table_of`), or by "" for all records


def infer_maps(units: Iterable[Unit], options: Options) -> tuple[Maps, list[str]]:
    """Infer the field map of each table and folder from its first samples; return them, and lines that describe them."""
    if options.fields is not None:
        given = _with_label(Fields.parse(options.fields), options)
        return {"": given}, [f"{given}  (given)"]
    samples, names, seen = defaultdict[str, list[Any]](list), dict[str, str](), Counter[Any]()
    for unit in units:
        kind, folder = unit.reader, os.path.dirname(str(unit.arguments[0]))
        if seen[kind] >= 10 * SAMPLES or seen[kind, folder] >= SAMPLES:
            continue
        seen.update([kind, (kind, folder)])
        for record in islice(read_unit(unit, options), None if kind == "samples" else SAMPLES):
            table = table_of(record)
            names.setdefault(table, record.where.partition(":")[0])
            if isinstance(record.content, Mapping) and len(samples[table]) < SAMPLES:
                samples[table].append({name: _head(name, value) for name, value in record.content.items()})
    maps, tables, lines = dict[str, Fields](), defaultdict[Fields, list[str]](list), list[str]()
    for table, known in samples.items():
        with suppress(ValueError):  # each record of the table is rejected with the reason
            maps[table] = _with_label(infer_fields(known), options)
            tables[maps[table]].append(table)
    for fields, found in tables.items():
        layout, _, path = found[0].partition(": ")
        where = names[found[0]] if path[-1:] not in ("", "/") else path or "the input"
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        count = sum(len(samples[name]) for name in found)
        lines.append(f"{fields}  (inferred from {count:,} samples of {where}{more}, {layout})")
    return maps, lines


def read_record(record: Record, options: Options, maps: Maps) -> Reading:
    """Read the document of a record. Raises BadSample (`no_fields` if no field map could be inferred)."""
    content = record.content
    if isinstance(content, BadSample):
        raise content
    if isinstance(content, Document):
        return Reading(content)
    if (fields := maps.get("") or maps.get(table_of(record))) is None:  # of a table that was not sampled: by the record alone
        try:
            fields = _with_label(infer_fields([content]), options)
        except ValueError as error:
            raise BadSample("no_fields", str(error)) from error
    return fields.read(record.where, content, partial(_open, record.files))


def _open(named: Mapping[str, str], value: str | Path) -> tuple[str, bytes]:
    """Read a file that a sample holds as a path, or that its record names."""
    found = value if isinstance(value, Path) else named.get(value)
    if found is None and not any("/" in name for name in named):  # they lie beside a JSON, which may write a folder before them
        found = named.get(os.path.basename(str(value)))
    if found is None:
        raise BadSample("missing_file", f"{value!r:.200} is not in the input, or several files have that name")
    path = Path(found)
    try:
        return path.name, read_file(str(path))
    except OSError as error:
        raise BadSample("unreadable_file", str(error)) from error


def table_of(record: Record) -> str:
    """Name the records that share a field map: those of tables whose names differ in digits only, else of a folder."""
    name, is_row, _ = record.where.partition(":")
    return f"{record.layout}: {re.sub(r'[0-9]+', '', name) if is_row else os.path.join(os.path.dirname(name), '')}"


def _with_label(fields: Fields, options: Options) -> Fields:
    """Apply the options about labels to a field map."""
    entries, learn = list(fields.entries), options.learn_label
    if options.label:
        names = tuple(dict.fromkeys((options.label, f"json.{options.label.removeprefix('json.')}")))
        others = (entry for entry in entries if entry.role != "label" and not set(entry.names) & set(names))
        entries = [*others, Field(names, "label")]
    for n, entry in enumerate(entries):
        if entry.role == "label":
            entries[n] = replace(entry, learn=entry.learn or learn)
        elif options.label_loss_only:
            entries[n] = replace(entry, loss=False)
    return replace(fields, entries=tuple(entries), shuffle=fields.shuffle and not learn)


def _head(name: str, value: Any) -> Any:
    """Return the beginning of a medium, which shows its kind."""
    return value[:64] if isinstance(value, bytes) and name.lower() not in ("json", "txt") and media_extension(value) else value


def read_documents(input: str | Path, options: Options | None = None) -> Iterator[tuple[str, Document | BadSample]]:
    """Yield (file or `file:line`, its document or the error) of an input, by inferred field maps. Raises ValueError."""
    options = options or Options()
    with tempfile.TemporaryDirectory() as work:
        units = list(Listing(str(input), options, work).units())
        maps, _ = infer_maps(units, options)
        for record in (record for unit in units for record in read_unit(unit, options)):
            try:
                yield record.where, read_record(record, options, maps).document
            except BadSample as error:
                yield record.where, error


def evaluation_texts(path: str) -> Iterator[str]:
    """Yield every text of an evaluation set: a text file whole, each string in the rows of a table. Raises ValueError."""
    options = Options(document_bytes=1 << 26)
    try:
        for record in (record for unit in Listing(path, options).units() for record in read_unit(unit, options)):
            if isinstance(record.content, BadSample):
                raise record.content
            content = record.content
            yield from _strings_in(content if isinstance(content, Mapping) else [one.text for one in content.segments])
    except ValueError as error:
        raise ValueError(f"the evaluation set {path!r} cannot be read: {error}") from error


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings_in(one)
    elif isinstance(value, str):
        yield value
