"""Field maps: which files and JSON fields of a sample are the segments of its document, and which are only labels.

    fields: [jpg|png|webp, json.caption|txt]               # a picture, then its caption: the first alternative that is present
    fields: [flac|wav, {text: txt, loss: false}]           # a transcript that is given, not learned
    fields: [image, {text: captions, choose: true}, {label: class}, {group: speaker}, shuffle]
    fields: messages                                       # a chat

A *sample* maps names to values: the files of a WebDataset sample by extension, the columns of a table, or the files of a folder
that share a stem. A dotted name leads into JSON (`json.meta.title`). `infer.py` guesses the map from a few samples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pile_app.documents import (
    AUDIO_EXTENSIONS,
    ENCODED_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MODALITY_OF_EXTENSION,
    TEXT,
    UNREADABLE_EXTENSIONS,
    BadSample,
    Document,
    Segment,
    media_extension,
)
from pile_app.records import (
    CHAT_FIELDS,
    INTERLEAVED_FIELDS,
    MARKERS,
    chat,
    chat_layout,
    interleaved,
    is_interleaved,
    strip_markers,
)

Sample = Mapping[str, Any]
SEGMENT_ROLES = ("text", "image", "audio", "media")
RECORD_ROLES = ("messages", "interleaved", "segments")  # the whole document, in one field
META_ROLES = ("label", "group", "split")
OPTIONS = ("loss", "optional", "choose", "learn")
UNKNOWN = ("", "-1", "n/a", "none", "null", "unknown")  # values of an unknown group; the first two of an unknown label
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS + AUDIO_EXTENSIONS
OWN_KEYS = {"text", "file", "loss"}  # of an entry of Pile's own `segments`


@dataclass(frozen=True)
class Field:
    """One entry of a field map.

    names: alternatives; the first that is present counts. role: one of `SEGMENT_ROLES` (`media`: any kind, by its content),
    `RECORD_ROLES` or `META_ROLES`. choose: one of a list of texts is drawn for each epoch. learn: a label becomes the last
    segment, and is learned.
    """

    names: tuple[str, ...]
    role: str = "media"
    loss: bool = True
    optional: bool = False
    choose: bool = False
    learn: bool = False

    def spec(self) -> Any:
        """The entry in YAML."""
        options = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) != (name == "loss")}
        names = "|".join(self.names)
        if self.role in RECORD_ROLES:
            return self.role
        if self.role == "media" and not options:
            return names
        return {self.role: names} | options

    @classmethod
    def parse(cls, entry: Any) -> Field:
        if isinstance(entry, str) and entry in RECORD_ROLES:
            return cls((), entry)
        role, options = "media", {}
        if isinstance(entry, Mapping):
            options = {str(key): value for key, value in entry.items() if key in OPTIONS}
            roles = [key for key in entry if key not in OPTIONS]
            if len(roles) != 1 or roles[0] not in SEGMENT_ROLES + META_ROLES:
                raise ValueError(
                    f"fields: {dict(entry)} needs one of {', '.join(SEGMENT_ROLES + META_ROLES)}, and may have "
                    f"{', '.join(OPTIONS)}, e.g. {{text: txt, loss: false}}"
                )
            role, entry = roles[0], entry[roles[0]]
        if not isinstance(entry, str) or not all(name.strip() for name in entry.split("|")):
            raise ValueError(f"fields: {entry!r} is not a name, or alternatives such as jpg|png or json.caption|txt")
        if bad := [f"{name}: {value!r}" for name, value in options.items() if not isinstance(value, bool)]:
            raise ValueError(f"fields: {', '.join(bad)} must be true or false")
        return cls(tuple(name.strip() for name in entry.split("|")), role, **options)


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
        """A field map from its YAML (a string, an entry, or a list of entries).

        Raises:
            ValueError: an entry has an unknown role or option, or no entry is a segment.
        """
        if isinstance(spec, Fields):
            return spec
        if isinstance(spec, str):
            try:
                spec = yaml.safe_load(spec)
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

    def read(self, key: str, sample: Sample, medium: Callable[[Any], Segment] | None = None) -> Reading:
        """The document of a sample.

        Args:
            key: of the sample.
            sample: name -> value: bytes of a file (its name ends with the extension), `Path`, str, number, list, dict.
            medium: reads a value that names or holds a medium (a path of a table, `{"bytes": ..., "path": ...}`); the default
                takes bytes and the names of the sample's own files.

        Raises:
            BadSample: `missing_field`, `wrong_type`, `invalid_utf8`, `invalid_json`, `unreadable_medium`, or from `medium`.
        """
        view = SampleView(key, sample, medium)
        dropped: Counter[str] = Counter()
        segments: list[tuple[Segment, str]] = []
        labels: list[Segment] = []
        meta: dict[str, Any] = {}
        ordered = not self.shuffle
        for entry in self.entries:
            if entry.role == "segments":
                segments, ordered, meta = _own_segments(view)
                continue
            if entry.role in RECORD_ROLES:
                test, parse, names = RECORDS[entry.role]
                segments += [(segment, "") for segment in parse(view.record(test, names), view.medium, dropped)]
                continue
            found = next(((name, value) for name in entry.names for value in view.values(name)), None)
            if found is None:
                view.used.update(name for name in entry.names if view.raw(name) is not None)
                if entry.optional or entry.role in META_ROLES:
                    continue
                if view.damaged and any(name.startswith("json.") for name in entry.names):
                    raise view.damaged
                raise BadSample("missing_field", f"sample {key!r} has no {'|'.join(entry.names)}, only {listing(view.names())}")
            if entry.role in META_ROLES:
                value = _scalar(key, *found)
                if value.lower() in UNKNOWN[: None if entry.role == "group" else 2]:  # None is the name of a class
                    continue
                meta[entry.role] = value
                labels += [Segment(value)] if entry.learn else []
                continue
            if entry.choose:
                found = found[0], [text for name in entry.names for value in view.values(name) for text in as_list(value)]
            segments += view.segments(entry, *found)
        if any(segment.data == b"" for segment, _ in segments):
            raise BadSample("empty_file", f"sample {key!r} holds a medium of 0 bytes, in {listing(view.names())}")
        segments = [(segment, name) for segment, name in segments if segment.data] + [(label, "") for label in labels]
        if not segments:
            raise BadSample("no_segment", f"sample {key!r} holds no text, image or sound, only {listing(view.names())}")
        self._check_media(key, view, segments)
        used, unused = view.balance(self)
        parts, files = zip(*segments, strict=True)
        document = Document(parts, key, ordered or (len(parts) < 2 and not self.is_own), meta)
        return Reading(document, files, used, unused, dropped)

    @staticmethod
    def _check_media(key: str, view: SampleView, segments: list[tuple[Segment, str]]) -> None:
        """Refuse a text whose medium is of a kind that cannot be read: it is no text document."""
        unreadable = [name for name in view.sample if extension(name) in UNREADABLE_EXTENSIONS]
        if unreadable and all(segment.modality == TEXT for segment, _ in segments):
            raise BadSample("unreadable_medium", f"sample {key!r} holds {listing(unreadable)}, which cannot be decoded")


OWN = Fields((Field((), "segments"),))
RECORDS = {"messages": (chat_layout, chat, CHAT_FIELDS), "interleaved": (is_interleaved, interleaved, INTERLEAVED_FIELDS)}


def document_from_sample(key: str, files: Mapping[str, bytes]) -> Document:
    """The document of a sample in Pile's own form."""
    return OWN.read(key, files).document


class SampleView:
    """A sample while it is read: parsed JSON, and which names were used."""

    def __init__(self, key: str, sample: Sample, medium: Callable[[Any], Segment] | None) -> None:
        self.key, self.sample = key, sample
        self.used: set[str] = set()
        self._medium = medium
        self.json: Any = None
        self._lower = {name.lower(): name for name in sample}
        self.damaged: BadSample | None = None  # the `json` cannot be parsed, which matters only where it is needed
        try:
            self.json = _parse_json(key, data) if isinstance(data := self.raw_file("json"), bytes) else data
        except BadSample as error:
            self.damaged = error

    def raw_file(self, name: str) -> Any:
        value = self.sample.get(self._lower.get(name.lower(), name))
        return value.read_bytes() if isinstance(value, Path) and extension(name) == "json" else value

    def raw(self, name: str) -> Any:
        """The value under a name; None where there is none."""
        if name.lower() in self._lower:
            return self.json if name == "json" else self.sample[self._lower[name.lower()]]
        head, _, rest = name.partition(".")
        value = self.json if head == "json" else self.sample.get(head)
        for part in rest.split("."):
            if isinstance(value, Mapping):
                value = value.get(part)
            elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and part.isdecimal():
                value = value[int(part)] if int(part) < len(value) else None
            else:
                return None
        return value

    def values(self, name: str) -> Iterator[Any]:
        """The value under a name, if it is not empty."""
        value = self.raw(name)
        if value is not None and (not isinstance(value, str | bytes | list | tuple | dict) or len(value)):
            yield value

    def names(self) -> list[str]:
        return sorted(self.sample)

    def leaves(self) -> list[str]:
        """Names of files and columns, and of the fields of the `json`."""
        fields = [f"json.{name}" for name in self.json] if isinstance(self.json, Mapping) else []
        return [name for name in self.sample if name.lower() != "json" or not isinstance(self.json, Mapping)] + fields

    def records(self) -> list[Mapping[str, Any]]:
        """What may be a chat or an interleaved record: the `json`, or the columns of a row."""
        return [record for record in (self.json, self.sample) if isinstance(record, Mapping)]

    def record(self, test: Callable[[Mapping[str, Any]], Any], names: set[str]) -> Mapping[str, Any]:
        """The chat or the interleaved record of the sample. names: fields that such a record uses."""
        found = next((record for record in self.records() if test(record)), None)
        if found is None:
            raise self.damaged or BadSample(
                "no_conversation", f"sample {self.key!r} holds no conversation, only {listing(self.leaves())}"
            )
        is_json = found is self.json
        self.used.update(f"json.{name}" if is_json else name for name in names & found.keys())
        for kind, extensions in {"images": IMAGE_EXTENSIONS, "audios": AUDIO_EXTENSIONS}.items():  # that the JSON does not name
            files = [name for name in self.sample if extension(name) in extensions and is_json]
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
        """The segment of a value that holds or names a medium."""
        if isinstance(value, str) and value in self.sample:
            self.used.add(value)
            value = self.sample[value]
        if self._medium is not None:
            return self._medium(value)
        if isinstance(value, Mapping):
            value = value.get("bytes")
        kind = media_extension(value) if isinstance(value, bytes) else None
        if value == b"":
            raise BadSample("empty_file", f"sample {self.key!r} holds a medium of 0 bytes")
        if kind is None and isinstance(value, bytes):
            raise BadSample("unknown_medium", f"sample {self.key!r} holds {value[:8]!r}..., no kind of medium that is read")
        if kind is None:
            raise BadSample("missing_file", f"sample {self.key!r} names the medium {value!r:.100}, which it does not hold")
        return Segment(value, kind)

    def segments(self, entry: Field, name: str, value: Any) -> Iterator[tuple[Segment, str]]:
        """The segments of a field's value, each with the name of the file that it is."""
        if isinstance(value, list | tuple):
            texts = [one for one in value if isinstance(one, str) and one.strip()]
            if entry.choose and texts:
                yield Segment(strip_markers(texts[0]), loss=entry.loss, choices=tuple(map(strip_markers, texts))), ""
                return
            for one in value:
                yield from self.segments(entry, name, one)
            return
        kind = extension(value.name if isinstance(value, Path) else name)
        is_text = isinstance(value, str | int | float) or (isinstance(value, Path | bytes) and kind == "txt")
        if entry.role == "text" or (entry.role == "media" and is_text):
            data = value.read_bytes() if isinstance(value, Path) else value
            text = strip_markers(_decode(self.key, name, data) if isinstance(data, bytes) else str(data))
            yield Segment(text, loss=entry.loss), name if isinstance(data, bytes) and text.encode() == data else ""
            return
        if isinstance(value, Mapping) and not {"bytes", "path"} & value.keys():
            raise BadSample("wrong_type", f"{name} of sample {self.key!r} is an object: name a field of it, e.g. {name}.text")
        known = kind in MEDIA_EXTENSIONS or kind in ENCODED_EXTENSIONS
        if isinstance(value, bytes) and known and name in self.sample:
            segment, file = Segment(value, kind), name
        else:
            segment, file = self.medium(value), ""
        if entry.role in ("image", "audio") and entry.role != ("text", "image", "audio")[segment.modality]:
            raise BadSample("wrong_type", f"{name} of sample {self.key!r} is a {segment.extension}, not {entry.role}")
        yield replace(segment, loss=entry.loss), file

    def balance(self, fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(used, unused) names. A field that the map names is used, also where an earlier alternative was taken."""
        mapped = {name.lower() for entry in fields.entries for name in entry.names} | {name.lower() for name in self.used}
        used: list[str] = []
        unused: list[str] = []
        for leaf in self.leaves():
            low = leaf.lower()
            (used if low in mapped or any(name.startswith(f"{low}.") for name in mapped) else unused).append(leaf)
        return tuple(used), tuple(unused)


def _own_segments(view: SampleView) -> tuple[list[tuple[Segment, str]], bool, dict[str, Any]]:
    """(segments with their files, whether they are ordered, meta) of a sample in Pile's own form.

    Without a `json` that names them, every text, image and sound file is a segment.
    """
    key, description = view.key, view.json
    if view.damaged:
        raise view.damaged
    if not is_own_form(description):
        if isinstance(description, Mapping) and "segments" in description:
            raise BadSample("invalid_json", f"`segments` of sample {key!r} is not a list of texts and files")
        files = sorted(name for name in view.sample if extension(name) in MODALITY_OF_EXTENSION)
        found = [one for name in files for one in view.segments(Field((name,)), name, view.sample[name])]
        view.used.update(files)
        label = {"label": _scalar(key, "cls", view.sample["cls"])} if "cls" in view.sample else {}
        view.used.update(label and ("cls",))
        return found, len(found) < 2, label
    view.used.update(f"json.{name}" for name in ("segments", "meta", "ordered"))
    segments: list[tuple[Segment, str]] = []
    for entry in description["segments"]:
        loss, text = bool(entry.get("loss", True)), entry.get("text")
        if isinstance(text, list):
            texts = tuple(map(strip_markers, text))
            segments.append((Segment(texts[0], loss=loss, choices=texts), ""))
        elif text is not None:
            segments.append((Segment(text if text in MARKERS else strip_markers(text), loss=loss), ""))
        elif entry["file"] not in view.sample:
            raise BadSample("missing_file", f"sample {key!r} names {entry['file']!r}; it holds {listing(view.names())}")
        else:
            view.used.add(entry["file"])
            segments += view.segments(Field((entry["file"],), loss=loss), entry["file"], view.sample[entry["file"]])
    meta = description.get("meta")
    return segments, bool(description.get("ordered", True)), dict(meta) if isinstance(meta, Mapping) else {}


def is_own_form(description: Any) -> bool:
    """Whether a sample's JSON is Pile's own: its `segments` are all `{"text": ...}` or `{"file": ...}`, perhaps with `loss`."""

    def is_entry(entry: Any) -> bool:
        if not isinstance(entry, Mapping) or not entry.keys() <= OWN_KEYS or len(entry.keys() & {"text", "file"}) != 1:
            return False
        return isinstance(entry.get("file", entry.get("text")), str) or is_texts(entry.get("text"))

    segments = description.get("segments") if isinstance(description, Mapping) else None
    return isinstance(segments, list) and bool(segments) and all(map(is_entry, segments))


def base(name: str) -> str:
    """A name in small letters, without the `json.` before it and the `.text` behind it."""
    return name.lower().removeprefix("json.").removesuffix(".text")


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _scalar(key: str, name: str, value: Any) -> str:
    if isinstance(value, bytes):
        value = _decode(key, name, value).strip()
    if isinstance(value, Mapping | list):
        raise BadSample("no_label", f"{name} of sample {key!r} is {value!r:.100}: a name or a number is expected")
    return str(value).strip()


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def extension(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower()


def _decode(key: str, name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", f"{name} of sample {key!r}: {error}") from error


def _parse_json(key: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", f"json of sample {key!r}: {error}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: lists in lists in lists ...
        raise BadSample("invalid_json", f"json of sample {key!r}: {error}") from error


def listing(names: Iterable[str], most: int = 12) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
