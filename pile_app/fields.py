"""Field maps: which files and JSON fields of a sample are the segments of its document, and which are only labels.

    fields: [jpg|png|webp, json.caption|txt]               # a picture, then its caption: the first alternative that is present
    fields: [flac|wav, {text: txt, loss: false}]           # a transcript that is given, not learned
    fields: [image, {text: captions, choose: true}, {label: class}, {group: speaker}, shuffle]
    fields: messages                                       # a chat

A *sample* maps names to values: the files of a WebDataset sample by extension, the columns of a table, or the files of a folder
that share a stem. A dotted name leads into JSON (`json.meta.title`). `infer.py` guesses the map from a few samples."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pile_app import documents, records
from pile_app.documents import MODALITIES, MODALITY_OF_EXTENSION, TEXT, BadSample, Document, Segment, media_extension

Sample = Mapping[str, Any]
OpenFile = Callable[[str | Path], tuple[str, bytes]]  # a path, or the name of a file of the input -> its name and content
Part = tuple[Segment, str]  # a segment, and the name of the file that it is, byte for byte, else ""
SEGMENT_ROLES = ("text", "image", "audio", "media")
RECORD_ROLES = ("messages", "interleaved", "segments")  # the whole document, in one field
META_ROLES = ("label", "group", "split")
OPTIONS = ("loss", "optional", "choose", "learn")
UNKNOWN = ("", "-", "-1", "n/a", "none", "null", "unknown")  # values of an unknown group; the first three of an unknown label
MEDIA_EXTENSIONS = documents.IMAGE_EXTENSIONS + documents.AUDIO_EXTENSIONS


@dataclass(frozen=True)
class Field:
    """An entry of a field map.

    names: alternatives; the first that is present counts. role: one of `SEGMENT_ROLES` (`media`: any kind, by its content),
    `RECORD_ROLES` or `META_ROLES`. choose: a text of a list is drawn for each epoch. learn: a label is also the last text."""

    names: tuple[str, ...]
    role: str = "media"
    loss: bool = True
    optional: bool = False
    choose: bool = False
    learn: bool = False

    def spec(self) -> Any:
        """Return the entry in YAML."""
        options = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) != (name == "loss")}
        names = "|".join(self.names)
        if self.role in RECORD_ROLES:
            return self.role
        return {self.role: names} | options if options or self.role != "media" else names

    @classmethod
    def parse(cls, entry: Any) -> Field:
        if isinstance(entry, str) and entry in RECORD_ROLES:
            return cls((), entry)
        given: Mapping[Any, Any] = entry if isinstance(entry, Mapping) else {"media": entry}
        options, roles = {key: given[key] for key in OPTIONS if key in given}, [key for key in given if key not in OPTIONS]
        if len(roles) != 1 or roles[0] not in SEGMENT_ROLES + META_ROLES:
            known = f"{', '.join(SEGMENT_ROLES + META_ROLES)}, and may have {', '.join(OPTIONS)}"
            raise ValueError(f"fields: {dict(given)} needs one of {known}, e.g. {{text: txt, loss: false}}")
        names = given[roles[0]]
        if not isinstance(names, str) or not all(name.strip() for name in names.split("|")):
            raise ValueError(f"fields: {names!r} is not a name, or alternatives such as jpg|png or json.caption|txt")
        if bad := [f"{name}: {value!r}" for name, value in options.items() if not isinstance(value, bool)]:
            raise ValueError(f"fields: {', '.join(bad)} must be true or false")
        return cls(tuple(name.strip() for name in names.split("|")), roles[0], **options)


@dataclass(frozen=True)
class Reading:
    """A sample that was read. files: for each segment the name of the file that it is, byte for byte, else ""; used, unused:
    names of the sample's files and fields; dropped: parts of a chat that could not be kept, by reason."""

    document: Document
    files: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fields:
    """A field map. `str()` gives its YAML in one line, which `parse` reads back."""

    entries: tuple[Field, ...]
    shuffle: bool = False  # training shuffles the segments in each epoch

    @classmethod
    def parse(cls, spec: Any) -> Fields:
        """Make a field map from its YAML (a string, an entry, or a list of entries). Raises ValueError."""
        if isinstance(spec, Fields):
            return spec
        try:
            spec = yaml.safe_load(spec) if isinstance(spec, str) else spec
        except yaml.YAMLError as error:
            raise ValueError(f"fields: {spec!r} is not YAML: {str(error).splitlines()[0]}") from error
        items = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
        entries = tuple(Field.parse(item) for item in items if item != "shuffle")
        if not any(entry.role in SEGMENT_ROLES + RECORD_ROLES or entry.learn for entry in entries):
            raise ValueError(f"fields: {spec!r} names no segment, e.g. [jpg|png, json.caption|txt]")
        roles = [entry.role for entry in entries if entry.role not in META_ROLES]
        if len(roles) > 1 and set(roles) & set(RECORD_ROLES):
            raise ValueError(f"fields: {', '.join(RECORD_ROLES)} describe a whole document; no other segment goes with them")
        return cls(entries, "shuffle" in items)

    def __str__(self) -> str:
        spec = [entry.spec() for entry in self.entries] + ["shuffle"] * self.shuffle
        only = spec[0] if len(spec) == 1 and spec[0] in RECORD_ROLES else spec
        text = yaml.safe_dump(only, default_flow_style=True, width=10_000, sort_keys=False)
        return text.removesuffix("\n...\n").strip()

    @property
    def is_own(self) -> bool:
        """Whether samples are in Pile's own form, where any text segment may be a role marker of a chat."""
        return any(entry.role == "segments" for entry in self.entries)

    def read(self, key: str, sample: Sample, open_file: OpenFile | None = None) -> Reading:
        """Read the document of a sample.

        Args:
            sample: name -> value: bytes of a file (its name ends with the extension), `Path`, str, number, list, dict.
            open_file: reads files that values name; by default only files of the sample can be named.

        Raises BadSample: `missing_field`, `wrong_type`, `invalid_utf8`, `invalid_json`, `missing_file` ..."""
        view, dropped = SampleView(key, sample, open_file), Counter[str]()
        parts, labels, ordered, meta = list[Part](), list[Part](), not self.shuffle, dict[str, Any]()
        for entry in self.entries:
            if entry.role == "segments":
                parts, ordered, meta = _own_segments(view)
            elif entry.role in RECORD_ROLES:
                test, parse, names = RECORDS[entry.role]
                parts += [(segment, "") for segment in parse(view.record(test, names), view.medium, dropped)]
            elif (found := view.find(entry)) is None:
                continue
            elif entry.role not in META_ROLES:
                parts += view.segments(entry, *found)
            elif (value := view.scalar(*found)).lower() not in UNKNOWN[: None if entry.role == "group" else 3]:
                meta[entry.role] = value  # "none" may be the name of a class
                labels += [(Segment(value), "")] if entry.learn else []
        if any(segment.data == b"" for segment, _ in parts):
            raise BadSample("empty_file", f"sample {key!r} holds a medium of 0 bytes, in {listing(sample)}")
        parts = [part for part in parts if part[0].data] + labels
        if not parts:
            raise BadSample("no_segment", f"sample {key!r} holds no text, image or sound, only {listing(sample)}")
        unreadable = [name for name in sample if extension(name) in documents.UNREADABLE_EXTENSIONS]
        if unreadable and all(segment.modality == TEXT for segment, _ in parts):
            raise BadSample("unreadable_medium", f"sample {key!r} holds {listing(unreadable)}, which cannot be decoded")
        mapped = {name.lower() for entry in self.entries for name in entry.names} | set(map(str.lower, view.used))
        balance: dict[bool, list[str]] = {True: [], False: []}
        for leaf in view.leaves():  # used also where an earlier alternative was taken
            low = leaf.lower()
            balance[low in mapped or any(name.startswith(f"{low}.") for name in mapped)].append(leaf)
        segments, files = zip(*parts, strict=True)
        document = Document(segments, key, ordered or (len(segments) < 2 and not self.is_own), meta)
        return Reading(document, files, tuple(balance[True]), tuple(balance[False]), dropped)


OWN = Fields((Field((), "segments"),))
RECORDS = {  # role -> (test, reader, fields that it uses)
    "messages": (records.chat_layout, records.chat, records.CHAT_FIELDS),
    "interleaved": (records.is_interleaved, records.interleaved, records.INTERLEAVED_FIELDS),
}


def document_from_sample(key: str, files: Mapping[str, bytes]) -> Document:
    """Read the document of a sample in Pile's own form."""
    return OWN.read(key, files).document


class SampleView:
    """A sample while it is read: its parsed `json`, and the names that were used (besides those of the field map)."""

    def __init__(self, key: str, sample: Sample, open_file: OpenFile | None = None) -> None:
        self.key, self.sample, self.used = key, sample, set[str]()
        self._open, self._lower = open_file, {name.lower(): name for name in sample}
        self.damaged: BadSample | None = None  # the `json` cannot be parsed, which matters only where it is needed
        self.json: Any = sample.get(self._lower.get("json", "json"))
        if isinstance(self.json, bytes):
            try:
                self.json = json.loads(self.json)
            except (ValueError, RecursionError) as error:  # RecursionError: lists in lists in lists ...
                reason = "invalid_utf8" if isinstance(error, UnicodeDecodeError) else "invalid_json"
                self.json, self.damaged = None, BadSample(reason, f"json of sample {key!r}: {error}")

    def raw(self, name: str) -> Any:
        """Return the value under a name; None where there is none."""
        if name.lower() in self._lower:
            return self.json if name == "json" else self.sample[self._lower[name.lower()]]
        head, *rest = name.split(".")
        value = self.json if head == "json" else self.sample.get(head)
        for part in rest or [""]:
            if isinstance(value, Mapping):
                value = value.get(part)
            elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return None
        return value

    def values(self, name: str) -> list[Any]:
        """Return the value under a name, unless it is empty, in a list."""
        value = self.raw(name)
        return [] if value is None or (isinstance(value, str | bytes | list | tuple | dict) and not len(value)) else [value]

    def find(self, entry: Field) -> tuple[str, Any] | None:
        """Return the first alternative of a field that is present, and its value. Raises BadSample if it must be present."""
        found = [(name, value) for name in entry.names for value in self.values(name)]
        if found:
            return (found[0][0], [one for _, value in found for one in as_list(value)]) if entry.choose else found[0]
        self.used.update(name for name in entry.names if self.raw(name) is not None)
        if entry.optional or entry.role in META_ROLES:
            return None
        if self.damaged and any(name.startswith("json.") for name in entry.names):
            raise self.damaged
        names = f"{'|'.join(entry.names)}, only {listing(self.sample)}"
        raise BadSample("missing_field", f"sample {self.key!r} has no {names}")

    def leaves(self) -> list[str]:
        """Return the names of files and columns, and of the fields of the `json`."""
        fields = [f"json.{name}" for name in self.json] if isinstance(self.json, Mapping) else []
        return [name for name in self.sample if name.lower() != "json" or not isinstance(self.json, Mapping)] + fields

    def records(self) -> list[Mapping[str, Any]]:
        """Return the `json`, and the columns of a row: either may be a chat or an interleaved record."""
        return [record for record in (self.json, self.sample) if isinstance(record, Mapping)]

    def record(self, test: Callable[[Mapping[str, Any]], Any], names: set[str]) -> Mapping[str, Any]:
        """Return the chat or the interleaved record of the sample. names: fields that such a record uses."""
        found = next((record for record in self.records() if test(record)), None)
        if found is None:
            chat, other = "messages, conversations or instruction + output", "texts + images or text_list + image_info"
            detail = f"sample {self.key!r} has {listing(self.leaves())}, but no {chat if 'messages' in names else other}"
            raise self.damaged or BadSample("no_conversation", detail)
        is_json = found is self.json
        self.used.update(f"json.{name}" if is_json else name for name in names & found.keys())
        if is_json:  # files that its conversation does not name
            said = repr([found[name] for name in names & found.keys()])  # metadata may name them too
            others = [name for name, one in self.sample.items() if not (isinstance(one, Path) and one.name in said)]
            for kind, extensions in {"images": documents.IMAGE_EXTENSIONS, "audios": documents.AUDIO_EXTENSIONS}.items():
                files = [name for name in others if extension(name) in extensions]
                if files and not {kind, kind[:-1]} & found.keys():
                    found = {**found, kind: files}
        return found

    def is_medium(self, name: str) -> bool:
        value = self.raw(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, Path):
            return extension(value.name) in MEDIA_EXTENSIONS
        if isinstance(value, Mapping):
            return isinstance(value.get("bytes"), bytes) or (value.keys() <= {"bytes", "path"} and bool(value.get("path")))
        return isinstance(value, bytes) and (extension(name) in MEDIA_EXTENSIONS or media_extension(value) is not None)

    def medium(self, value: Any) -> Segment:
        """Read a medium: bytes, a path, a data URI, base64, the name of a file, or a mapping that holds one of these under
        bytes, path, data or url. Nothing is fetched.

        Raises BadSample: `missing_file`, `remote_medium`, `invalid_base64`, `unknown_medium` or `empty_file`."""
        name = ""
        if isinstance(value, Mapping):
            name = str(value.get("path") or "")
            data = value.get("data") and f"data:;base64,{value['data']}"
            value = value["bytes"] if value.get("bytes") is not None else name or data or value.get("url") or value
        if isinstance(value, str) and value in self.sample:
            self.used.add(value)
            name, value = value, self.sample[value]
        if isinstance(value, str):
            value = _decoded(value) or value
        if isinstance(value, Path) or (isinstance(value, str) and self._open):
            assert self._open
            name, value = self._open(value)
        if not isinstance(value, bytes):
            raise BadSample("missing_file", f"sample {self.key!r} names the medium {value!r:.100}, which it does not hold")
        if not value:
            raise BadSample("empty_file", f"sample {self.key!r} holds a medium of 0 bytes: {name or 'without name'}")
        if kind := media_extension(value, name):
            return Segment(value, kind)
        is_pointer = value.startswith(b"version https://git-lfs")
        found = "a Git LFS pointer: git lfs pull" if is_pointer else f"no known image or sound: it begins with {value[:12]!r}"
        raise BadSample("unknown_medium", f"{name or 'a medium'} of sample {self.key!r} is {found}")

    def segments(self, entry: Field, name: str, value: Any) -> Iterator[Part]:
        """Yield the segments of a field's value, each with the name of the file that it is."""
        if isinstance(value, list | tuple):
            texts = [records.strip_markers(one) for one in value if isinstance(one, str) and one.strip()]
            if entry.choose and texts:
                yield Segment(texts[0], loss=entry.loss, choices=tuple(texts)), ""
                return
            for one in value:
                yield from self.segments(entry, name, one)
            return
        kind = extension(value.name if isinstance(value, Path) else name)
        is_text = isinstance(value, str | int | float) or (isinstance(value, Path | bytes) and kind == "txt")
        if entry.role == "text" or (entry.role == "media" and is_text):
            data = self._open(value)[1] if isinstance(value, Path) and self._open else value
            text = records.strip_markers(self.decode(name, data) if isinstance(data, bytes) else str(data))
            yield Segment(text, loss=entry.loss), name if isinstance(data, bytes) and text.encode() == data else ""
            return
        if isinstance(value, Mapping) and not {"bytes", "path"} & value.keys():
            raise BadSample("wrong_type", f"{name} of sample {self.key!r} is an object: name a field of it, e.g. {name}.text")
        is_file = isinstance(value, bytes) and kind in MEDIA_EXTENSIONS + documents.ENCODED_EXTENSIONS and name in self.sample
        segment = Segment(value, kind) if is_file else self.medium(value)
        if entry.role in ("image", "audio") and entry.role != MODALITIES[segment.modality]:
            raise BadSample("wrong_type", f"{name} of sample {self.key!r} is a {segment.extension}, not {entry.role}")
        yield replace(segment, loss=entry.loss), name if is_file else ""

    def scalar(self, name: str, value: Any) -> str:
        value = self.decode(name, value) if isinstance(value, bytes) else value
        if isinstance(value, Mapping | list):
            raise BadSample("no_label", f"{name} of sample {self.key!r} is {value!r:.100}: a name or a number is expected")
        return str(value).strip()

    def decode(self, name: str, data: bytes) -> str:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("invalid_utf8", f"{name} of sample {self.key!r}: {error}") from error


def is_remote(name: str) -> bool:
    return bool(re.match("(?!file:)[a-z][a-z0-9+.-]*://", name))


def _decoded(text: str) -> bytes | None:
    """Decode a data URI, or base64 that holds a medium; refuse addresses."""
    if text.startswith("data:"):
        try:
            return base64.b64decode(text.partition(",")[2], validate=True)
        except ValueError as error:
            raise BadSample("invalid_base64", str(error)) from error
    if is_remote(text):
        raise BadSample("remote_medium", f"{text:.200} is not fetched: put the file into the input (img2dataset can do that)")
    with suppress(ValueError):
        data = base64.b64decode(text, validate=True) if len(text) >= 100 else b""
        return data if media_extension(data) else None
    return None


def _own_segments(view: SampleView) -> tuple[list[Part], bool, dict[str, Any]]:
    """Return (segments, whether they are ordered, meta) of a sample in Pile's own form. Without a `json` that names them, every
    text, image and sound file is a segment."""
    key, description = view.key, view.json
    if view.damaged:
        raise view.damaged
    if not is_own_form(description):
        if isinstance(description, Mapping) and "segments" in description:
            raise BadSample("invalid_json", f"`segments` of sample {key!r} is not a list of texts and files")
        files = sorted(name for name in view.sample if extension(name) in MODALITY_OF_EXTENSION)
        found = [one for name in files for one in view.segments(Field((name,)), name, view.sample[name])]
        label = {"label": view.scalar("cls", view.sample["cls"])} if "cls" in view.sample else {}
        view.used.update(files, ["cls"] if label else [])
        return found, len(found) < 2, label
    view.used.update(f"json.{name}" for name in ("segments", "meta", "ordered"))
    parts: list[Part] = []
    for entry in description["segments"]:
        loss, file, texts = bool(entry.get("loss", True)), entry.get("file"), as_list(entry.get("text"))
        if file is None:
            texts = [text if text in records.MARKERS and len(texts) == 1 else records.strip_markers(text) for text in texts]
            parts.append((Segment(texts[0], loss=loss, choices=tuple(texts) if isinstance(entry["text"], list) else ()), ""))
        elif file not in view.sample:
            raise BadSample("missing_file", f"sample {key!r} names {file!r}; it holds {listing(view.sample)}")
        else:
            view.used.add(file)
            parts += view.segments(Field((file,), loss=loss), file, view.sample[file])
    meta = description.get("meta")
    return parts, bool(description.get("ordered", True)), dict(meta) if isinstance(meta, Mapping) else {}


def is_own_form(description: Any) -> bool:
    """Tell whether a sample's JSON is Pile's own: its `segments` are all `{"text": ...}` or `{"file": ...}`, or with `loss`."""

    def is_entry(entry: Any) -> bool:
        names = entry.keys() - {"loss"} if isinstance(entry, Mapping) else None
        if names == {"text"}:
            return isinstance(entry["text"], str) or is_texts(entry["text"])
        return names == {"file"} and isinstance(entry["file"], str)

    segments = description.get("segments") if isinstance(description, Mapping) else None
    return isinstance(segments, list) and bool(segments) and all(map(is_entry, segments))


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def extension(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower()


def listing(names: Iterable[str], most: int = 12) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
