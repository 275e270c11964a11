"""Stand-in for the readers (helper E writes the real ones)."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pile_app.data.tar import files_of_block, sample_ranges
from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, BadSample, Document, Segment, media_extension


class Unit(NamedTuple):
    reader: str
    arguments: list[Any]
    weight: int = 0


class Record(NamedTuple):
    where: str
    content: Any
    layout: str = ""
    split: str | None = None


_WORDS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}


def named_split(name: str) -> str | None:
    found = re.match("[a-z]+", name.lower())
    return _WORDS.get(found[0]) if found else None


def _split(path: str) -> str | None:
    return next((split for part in path.split("/") if (split := named_split(part))), None)


def list_units(input: Path, options: Any) -> Iterator[Unit]:
    root = str(input if input.is_dir() else input.parent)
    walk = os.walk(input) if input.is_dir() else [(root, [], [input.name])]
    for folder, folders, names in walk:
        folders.sort()
        groups: dict[str, list[str]] = {}
        for name in sorted(names):
            path = os.path.relpath(os.path.join(folder, name), root)
            kind = name.rsplit(".", 1)[-1].lower()
            size = os.path.getsize(os.path.join(folder, name))
            if kind in ("jsonl", "csv", "tar"):
                yield Unit(kind, [path], size)
            elif kind in ("txt", "json", "cls", *IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS):
                groups.setdefault(path.rsplit(".", 1)[0], []).append(path)
            else:
                yield Unit("unread", [path, "unknown_extension", "use --kind"])
        for paths in groups.values():
            yield Unit("files", [paths[0], paths], sum(os.path.getsize(os.path.join(root, path)) for path in paths))


def read_unit(root: str, unit: Unit, options: Any) -> Iterator[Record]:
    path = unit.arguments[0]
    if unit.reader == "unread":
        yield Record(path, BadSample(*unit.arguments[1:]))
    elif unit.reader == "files":
        yield Record(
            path, {p.rsplit(".", 1)[-1].lower(): Path(root, p).read_bytes() for p in unit.arguments[1]}, "files", _split(path)
        )
    elif unit.reader == "tar":
        with open(os.path.join(root, path), "rb") as file:
            for sample in sample_ranges(path, file.fileno(), os.fstat(file.fileno()).st_size):
                block = os.pread(file.fileno(), sample.stop - sample.start, sample.start)
                yield Record(f"{path}:{sample.key}", files_of_block(block), "WebDataset", _split(path))
    elif unit.reader == "csv":
        with open(os.path.join(root, path), newline="") as rows:
            for number, row in enumerate(csv.DictReader(rows), 2):
                yield Record(f"{path}:{number}", row, "table", _split(path))
    else:
        for number, line in enumerate(Path(root, path).read_bytes().splitlines(), 1):
            try:
                yield Record(f"{path}:{number}", json.loads(line), "JSON lines", _split(path))
            except ValueError as error:
                yield Record(f"{path}:{number}", BadSample("invalid_json", str(error)), "JSON lines")


def medium(root: str, where: str, value: Any) -> Segment:
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, str):
        try:
            data = Path(root, os.path.dirname(where.partition(":")[0]), data).read_bytes()
        except OSError as error:
            raise BadSample("missing_file", str(error)) from error
    return Segment(data, media_extension(data) or "png")


def evaluation_texts(path: str) -> Iterator[str]:
    for line in Path(path).read_text().splitlines():
        yield from json.loads(line).values()


assert Document
