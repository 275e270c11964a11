"""The readers of `pile prepare`: files of users, one layout each, to documents.

    Item ──► read_item ──► Found(file, Document), or Found(file, BadSample)

What is read (the kind `auto` reads all of it):

* text files, one document a file, or several cut at blank lines where it is very long;
* JSON lines, plain or compressed (`.gz`, `.zst`): `{"text": ..., "meta": {...}}` a line, where `meta.pile_set_name` names the
  source, as in the Pile; or interleaved records: `text_list` and `image_info` (MMC4), `texts` and `images` (OBELICS);
* Parquet: a column of texts, of media as Hugging Face writes them (structs with `bytes`), or the records above;
* named entities: CoNLL files and tagged records, see `tagged.py`;
* media: files that share a name (`frog.png`, `frog.ogg` and the caption or transcript `frog.txt`); the rows of a CSV or TSV
  table with a column that names the file and one that holds the text, and then no other media; Common Voice (`validated.tsv`
  beside `clips/`, that table alone); LibriSpeech (`*.trans.txt` with a line a recording, beside the recordings);
* what has a label, which then is the last segment: a column `label` (or the one that is named) of a table, of JSON lines or of
  Parquet, where the names of Hugging Face's classes are known; the folder that a file lies in, if that is asked for;
* conversations (the kind `chat` alone): records of JSON lines, JSON, YAML and Parquet, see `chats.py`;
* WebDataset shards (`.tar`): their documents as they are.

Input is not trusted: see `files.py`. No name in a table or record reaches a file outside the input folder; nothing is unpickled
or extracted.
"""

from __future__ import annotations

import csv
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pile_app.data.index import MAX_SAMPLE_BYTES
from pile_app.data.tar import ShardError, files_of_block, sample_ranges
from pile_app.data.tokenizers import clean_text
from pile_app.documents import BadSample, Document, Segment
from pile_app.fields import document_from_sample
from pile_app.prepare.chats import document_of_chat, records_of_file
from pile_app.prepare.files import (
    DECOMPRESSORS,
    MAX_JSON_BYTES,
    MAX_LINE_BYTES,
    decode,
    extension,
    file_beside,
    lines_of,
    next_cut,
    open_plain,
    pieces_of,
    read_file,
    table_lines,
)
from pile_app.prepare.filters import mend_text
from pile_app.prepare.labels import TEXT_COLUMNS, class_names, label_column, label_of_folder, label_text, labelled, texts_of
from pile_app.prepare.listing import ITEM_BYTES, TABLE_DIALECTS, Item, list_items
from pile_app.prepare.options import JSON_EXTENSIONS, TABLE_EXTENSIONS, TEXT_EXTENSIONS, Options, require
from pile_app.prepare.tagged import (
    SPAN_FIELDS,
    TAG_FIELDS,
    document_of_record,
    document_of_words,
    scheme_of_conll,
    sentences_of_conll,
)
from pile_app.records import chat_layout, interleaved, is_interleaved


class Found(NamedTuple):
    """What a reader made of a file (or a line of one, `file:line`): a document, or why there is none.

    layout: what it was read as; raw: what there was in place of a document; label: of a labelled document; class_number: of
    that label, -1 where it is not known.
    """

    file: str
    content: Document | BadSample
    layout: str = ""
    raw: bytes = b""
    label: str = ""
    class_number: int = -1


def read_item(root: str, item: Item, options: Options) -> Iterator[Found]:
    """What an item holds, in order."""
    file = os.fsencode(item.arguments[0]).decode(errors="replace")
    try:
        yield from READERS[item.reader](root, file, options, *item.arguments)
    except BadSample as error:
        yield Found(file, error)
    except (EOFError, zlib.error, ShardError) as error:
        yield Found(file, BadSample("damaged_file", str(error)))
    except OSError as error:
        reason = "damaged_file" if error.errno is None else "unreadable_file"
        yield Found(file, BadSample(reason, str(error)))


def _read_rejected(_: str, file: str, __: Options, ___: str, reason: str, detail: str, layout: str) -> Iterator[Found]:
    yield Found(file, BadSample(reason, detail), layout)


def _read_text(root: str, file: str, options: Options, path: str, start: int, stop: int, _: bool) -> Iterator[Found]:
    """One document, or several where the file is longer than `document_bytes`."""
    with open_plain(os.path.join(root, path)) as opened:
        start, stop = (next_cut(opened, place, options.document_bytes) for place in (start, stop))
        opened.seek(start)
        for piece in pieces_of(opened, stop - start, options.document_bytes):
            if options.label_from_folder:
                yield _found_labelled(file, "labelled text file", piece, partial(_segments_of_text, piece), path, options)
            else:
                yield _found(file, "text file", piece, _document_of_text, piece)


def _read_json_lines(
    root: str, file: str, options: Options, path: str, start: int = 0, stop: int = 0, cut: bool = False
) -> Iterator[Found]:
    """A document a line, plain or compressed; what follows damage in a compressed file is lost, and the file is listed."""
    path = os.path.join(root, path)
    place, number = start, 0
    with open_plain(path) as opened:
        if start:  # the line that goes over the border belongs to the part before
            opened.seek(start - 1)
            place += len(opened.readline(MAX_LINE_BYTES)) - 1
        for line in lines_of(DECOMPRESSORS[extension(path)](opened)):
            if cut and place >= stop:
                break
            number += 1
            name = f"{file}@{place}" if cut else f"{file}:{number}"
            if isinstance(line, BadSample):
                yield Found(name, line)
                place = opened.tell()
                continue
            place += len(line)
            if line.strip():
                yield _found_in_line(root, path, name, line, options)


def _read_parquet(root: str, file: str, options: Options, path: str, group: int) -> Iterator[Found]:
    """A document a row of a row group."""
    parquet = require("pyarrow.parquet", "prepare", "reading Parquet")
    path = os.path.join(root, path)
    try:
        with open_plain(path) as opened, parquet.ParquetFile(opened, memory_map=False) as table:
            number = sum(table.metadata.row_group(before).num_rows for before in range(group))
            rows, size = max(1, table.metadata.row_group(group).num_rows), table.metadata.row_group(group).total_byte_size
            if size > rows * MAX_SAMPLE_BYTES:
                raise BadSample("damaged_file", f"{size:,} bytes in {rows:,} rows")
            at_once = max(1, min(1024, rows * ITEM_BYTES // max(1, size)))
            columns = _parquet_columns(table.schema_arrow, options)
            label = label_column(table.schema_arrow.names, options)
            names = class_names(table.schema_arrow.metadata, label) if label else []
            tag_names = {field: dict(enumerate(class_names(table.schema_arrow.metadata, field))) for field in TAG_FIELDS}
            for batch in table.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    record = {name: value for name, value in record.items() if value is not None}
                    for field, meaning in tag_names.items():
                        record |= {field: [meaning.get(tag, tag) for tag in record[field]]} if field in record else {}
                    yield _found_in_record(root, path, f"{file}:{number}", "Parquet", record, options, names=names)
    except BadSample:
        raise
    except Exception as error:  # of pyarrow, and what a hostile file makes of it
        raise BadSample("damaged_file", f"row group {group}: {error}") from error


def _parquet_columns(schema: Any, options: Options) -> list[str]:
    """Columns that may make a document: those that readers know by name or are told, and media."""
    import pyarrow.types as types

    known = {"text", "meta", "texts", "images", "text_list", "image_info", *TEXT_COLUMNS, *options.text_column}
    if options.kind == "chat":
        return [name for name in schema.names if name not in ("id", "source")]
    known |= {label_column(schema.names, options) or "text", "tokens", *SPAN_FIELDS, *TAG_FIELDS}

    def is_medium(kind: Any) -> bool:
        is_file = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind) or is_file

    return [field.name for field in schema if field.name in known or is_medium(field.type)]


def _read_conll(root: str, file: str, options: Options, path: str) -> Iterator[Found]:
    """A document a sentence."""
    with open_plain(os.path.join(root, path)) as opened:
        scheme = scheme_of_conll(opened)
        opened.seek(0)
        for first, *sentence in sentences_of_conll(opened):
            if isinstance(sentence[0], BadSample):
                yield Found(f"{file}:{first}", sentence[0], "CoNLL")
                continue
            words, tags = sentence
            raw = " ".join(words).encode()
            yield _found_tagged(f"{file}:{first}", "CoNLL", raw, document_of_words, words, tags, scheme, options=options)


def _read_media(
    root: str, file: str, options: Options, _: str, layout: str, media: list[str], text: str | None, captions: list[str]
) -> Iterator[Found]:
    """Files, and what is said of them."""
    if options.label_from_folder:
        files = [*media, *captions[:1]]
        yield _found_labelled(file, f"labelled {layout}", b"", partial(_segments_of_files, root, files), media[0], options)
    else:
        yield _found(file, layout, b"", _document_of_files, root, media, text, captions, options)


def _read_labelled(
    root: str, file: str, options: Options, _: str, layout: str, media: list[str], cells: dict[str, str]
) -> Iterator[Found]:
    """A row of a table that has a label: its files, its text unless there are files and nobody asked for it, and the label."""
    column = label_column(cells, options)
    texts = options.text_column or not media

    def inputs() -> list[Segment]:
        return _segments_of_files(root, media) + (texts_of(cells, options) if texts else [])

    yield _found_with_label(file, layout, b"", inputs, cells.get(column or ""), options)


def _read_conversations(root: str, file: str, options: Options, path: str) -> Iterator[Found]:
    """A document a record of a JSON or YAML file, which is read whole."""
    path = os.path.join(root, path)
    for number, record in enumerate(records_of_file(path.lower(), read_file(path, MAX_JSON_BYTES)), start=1):
        yield _found_in_record(root, path, f"{file}:{number}", "file", record, options)


def _read_tar(root: str, file: str, options: Options, path: str) -> Iterator[Found]:
    """The samples of a WebDataset shard."""
    with open_plain(os.path.join(root, path)) as opened:
        descriptor = opened.fileno()
        for sample in sample_ranges(file, descriptor, os.fstat(descriptor).st_size):
            name = f"{file}:{os.fsencode(sample.key).decode(errors='replace')}"
            size = sample.stop - sample.start
            if sample.trouble or size > MAX_SAMPLE_BYTES:
                yield Found(name, BadSample("unsafe_member", f"it holds {sample.trouble or f'{size:,} bytes'}"), "WebDataset")
                continue
            block = os.pread(descriptor, size, sample.start)
            yield _found(name, "WebDataset", b"", _document_of_block, sample.key, block)


READERS: dict[str, Callable[..., Iterator[Found]]] = {
    "rejected": _read_rejected,
    "text": _read_text,
    "json_lines": _read_json_lines,
    "parquet": _read_parquet,
    "conll": _read_conll,
    "media": _read_media,
    "labelled": _read_labelled,
    "conversations": _read_conversations,
    "tar": _read_tar,
}


# -- documents


def _found(file: str, layout: str, raw: bytes, make: Callable[..., Document], *arguments: Any) -> Found:
    try:
        return Found(file, make(*arguments), layout)
    except BadSample as error:
        return Found(file, error, layout, raw)
    except FileNotFoundError as error:
        return Found(file, BadSample("missing_file", str(error)), layout, raw)
    except (OSError, ValueError, TypeError) as error:  # ValueError: a path with a zero byte; TypeError: a record of other types
        return Found(file, BadSample("unreadable_file", str(error)), layout, raw)


def _found_labelled(
    file: str, layout: str, raw: bytes, inputs: Callable[[], list[Segment]], path: str, options: Options
) -> Found:
    """With the name of its folder as the label."""
    try:
        label = label_of_folder(path)
    except BadSample as error:
        return Found(file, error, layout, raw)
    return _found_with_label(file, layout, raw, inputs, label, options)


def _found_with_label(
    file: str,
    layout: str,
    raw: bytes,
    inputs: Callable[[], list[Segment]],
    label: Any,
    options: Options,
    names: Sequence[str] = (),
) -> Found:
    """With the label as it stands in the data: a text, or the number of a class with one of the names."""
    if options.label_names:
        names, label = options.label_names, int(label) if isinstance(label, str) and label.strip().isdecimal() else label
    found = _found(file, layout, raw, lambda: labelled(inputs(), label_text(label, names), options))
    if isinstance(found.content, BadSample):
        return found
    number = label if names and isinstance(label, int) else -1
    return found._replace(label=found.content.segments[-1].text, class_number=number)


def _segments_of_text(data: bytes) -> list[Segment]:
    return [Segment(decode(data))]


def _segments_of_files(root: str, files: Sequence[str]) -> list[Segment]:
    read = ((extension(file), read_file(os.path.join(root, file))) for file in files)
    return [Segment(decode(data)) if kind in TEXT_EXTENSIONS else Segment(data, kind) for kind, data in read]


def _document_of_text(data: bytes) -> Document:
    return Document((Segment(decode(data)),))


def _document_of_block(key: str, block: bytes) -> Document:
    return document_from_sample(key, files_of_block(block))


def _document_of_files(root: str, media: list[str], text: str | None, captions: list[str], options: Options) -> Document:
    segments = _segments_of_files(root, media)
    if captions:
        text = decode(read_file(os.path.join(root, captions[0]), MAX_LINE_BYTES))
    if options.caption_from_folder and not text:
        text = re.sub("[-_]+", " ", Path(root, media[0]).parent.name)
    return _captioned(segments, text)


def _captioned(media: list[Segment], text: str | None) -> Document:
    segments = (*media, *([Segment(text.strip())] if text is not None else []))
    return Document(segments, ordered=len(segments) == 1)


def _found_in_line(root: str, path: str, name: str, line: bytes, options: Options) -> Found:
    try:
        record = json.loads(decode(line))
    except BadSample as error:
        return Found(name, error, "JSON lines", line)
    except (ValueError, RecursionError) as error:
        return Found(name, BadSample("invalid_json", str(error)), "JSON lines", line)
    return _found_in_record(root, path, name, "JSON lines", record, options, line)


def _found_in_record(
    root: str,
    path: str,
    name: str,
    layout: str,
    record: Any,
    options: Options,
    raw: bytes = b"",
    names: Sequence[str] = (),
) -> Found:
    """Of a record that is interleaved, has a label, media and a caption, or is a text. names: of the classes of its label."""
    record = record if isinstance(record, dict) else {}
    if options.kind == "chat":
        made = partial(document_of_chat, record, partial(_medium, root, path))
        return _found(name, f"{chat_layout(record) or 'no conversation'} ({layout})", raw, made)
    if options.kind == "entities" or (options.kind == "auto" and options.label_column is None):
        tagged = _found_tagged(name, f"entities ({layout})", raw, document_of_record, record, options=options)
        if tagged is not None:
            return tagged
        if options.kind == "entities":
            return Found(name, BadSample("no_spans", "it has neither text and spans nor tokens and tags"), layout, raw)
    if is_interleaved(record) and options.kind in ("auto", "interleaved"):
        interleaved_layout = "MMC4" if "text_list" in record else "OBELICS"
        return _found(name, f"{interleaved_layout} ({layout})", raw, _document_of_interleaved, root, path, record)
    media = [value for value in record.values() if _is_medium(value)] if options.kind in ("auto", "images", "audio") else []
    try:
        column = label_column(record, options)
    except BadSample as error:
        return Found(name, error, layout, raw)
    if column and (media or options.kind in ("auto", "text")):
        texts = options.text_column or not media

        def inputs() -> list[Segment]:
            return [_medium(root, path, medium) for medium in media] + (texts_of(record, options) if texts else [])

        return _found_with_label(name, f"labelled {layout}", raw, inputs, record[column], options, names)
    if media:
        return _found(name, layout, raw, _document_of_media, root, path, record, media, options)
    if options.kind in ("auto", "text") and isinstance(record.get("text"), str):
        meta = record.get("meta")
        return Found(name, Document((Segment(record["text"]),), meta=meta if isinstance(meta, dict) else {}), layout)
    return Found(name, BadSample("no_text", 'the record is not an object with a string "text"'), layout, raw)


def _found_tagged(name: str, layout: str, raw: bytes, make: Callable[..., Any], *arguments: Any, options: Options) -> Any:
    """Found, with a layout that says whether something was mended; None where `make` makes none."""
    try:
        made = make(*arguments, partial(mend_text, options=options))
    except BadSample as error:
        return Found(name, error, layout, raw)
    return made and Found(name, made[0], layout + (", mended" if made[1] else ""))


def _document_of_interleaved(root: str, path: str, record: dict[str, Any]) -> Document:
    dropped: Counter[str] = Counter()
    segments = interleaved(record, partial(_medium, root, path), dropped)
    return Document(tuple(segments), meta={"missing_images": dropped.total()} if dropped else {})


def _document_of_media(root: str, path: str, record: dict[str, Any], media: list[Any], options: Options) -> Document:
    segments = [_medium(root, path, medium) for medium in media]
    for segment in segments:
        if segment.extension not in options.extensions:
            raise BadSample("ignored_extension", f"{segment.extension} is not of a kind that is read")
    return _captioned(segments, next((record[name] for name in TEXT_COLUMNS if isinstance(record.get(name), str)), None))


def _is_medium(value: Any) -> bool:
    """Bytes, or a struct of `bytes` and `path`, either of which may be missing."""
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes", ""), bytes | None))


_MAGIC = (
    (b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpg"), (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"),
    (b"\xff\xfb", "mp3"), (b"\xff\xf3", "mp3"), (b"\xff\xf2", "mp3"),
)  # fmt: skip


def _medium(root: str, path: str, value: Any) -> Segment:
    """From bytes, a struct of `bytes` and `path`, or the name of a file beside `path`."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        file = file_beside(root, path, value)
        if file is None:
            raise BadSample("missing_file", f"{value!r} is not in the input folder")
        value = read_file(file)
    if not isinstance(value, bytes):
        raise BadSample("missing_file", "neither bytes nor the name of a file")
    if value[:4] == b"RIFF" and (kind := {b"WAVE": "wav", b"WEBP": "webp"}.get(value[8:12])):
        return Segment(value, kind)
    for magic, kind in _MAGIC:
        if value.startswith(magic):
            return Segment(value, kind)
    raise BadSample("unknown_medium", f"it begins with {value[:8]!r}, as no kind of medium that is read does")


# -- texts alone


def read_texts(input: Path) -> Iterator[str]:
    """The texts alone, cleaned, of a text file or a folder of them; what cannot be read is left out.

    Raises:
        ValueError: there is no such file or folder.
    """
    if not input.exists():
        raise ValueError(f"{str(input)!r} does not exist (working folder {os.getcwd()})")
    input = input.resolve()
    options = Options(kind="text")
    for item in list_items(input, options):
        for found in read_item(str(input if input.is_dir() else input.parent), item, options):
            if isinstance(found.content, Document):
                yield from (clean_text(segment.text) for segment in found.content.segments)


def evaluation_texts(path: str) -> Iterator[str]:
    """Every text of an evaluation set: a text file whole, each string of JSON lines, each cell of a table or of Parquet.

    Raises:
        ValueError: the file cannot be read, or is of another kind.
    """
    kind = extension(path)
    try:
        if kind == "parquet":
            parquet = require("pyarrow.parquet", "prepare", "reading Parquet")
            with parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(1024):
                    yield from _strings_in(batch.to_pylist())
            return
        if kind in TEXT_EXTENSIONS:
            yield decode(read_file(os.path.realpath(path)))
            return
        with open_plain(os.path.realpath(path)) as file:
            if kind in TABLE_EXTENSIONS:
                yield from _strings_in(csv.reader(table_lines(file), TABLE_DIALECTS[kind]))
            elif kind in JSON_EXTENSIONS:
                for line in lines_of(DECOMPRESSORS[kind](file)):
                    if isinstance(line, BadSample):
                        raise line
                    if line.strip():
                        yield from _strings_in(json.loads(line))
            else:
                known = (*TEXT_EXTENSIONS, *JSON_EXTENSIONS, *TABLE_EXTENSIONS, "parquet")
                raise ValueError(f"it is none of *.{', *.'.join(known)}")
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:  # BadSample is a ValueError
        raise ValueError(f"the evaluation set {path!r} cannot be read: {error}") from error


def _strings_in(value: Any) -> Iterator[str]:
    """Every string in a record, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings_in(list(value.values()))
    elif isinstance(value, Iterable):
        for one in value:
            yield from _strings_in(one)
