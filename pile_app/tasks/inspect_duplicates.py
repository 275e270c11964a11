"""What occurs more than once in shards, whatever its key: whole documents, and single images and sounds.

One pass over the shards writes a row for each to a temporary database: 128 bits of its hash and where it is. SQLite sorts them
on disk, so memory does not grow with the documents.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pile_app.documents import MODALITIES, TEXT, BadSample, Segment
from pile_app.prepare.engines import tracked

if TYPE_CHECKING:
    from pile_app.tasks.inspect_data import Part

KINDS = ("documents", "images", "sounds")
EXAMPLES = 10


def find_duplicates(parts: Sequence[Part]) -> dict[str, Any]:
    """{"unreadable": documents whose bytes are not those that were indexed,
    "documents" | "images" | "sounds": {"groups": contents that occur more than once, "copies": how many could go,
            "of_source": {source and split: copies in it, all but the first of each group},
            "leaked": those outside the training split that occur in the training split of any source,
            "examples": [[source, split, key] of each copy, at most 5 of a group], leaked ones first}}
    """
    unreadable = Counter[str]()
    found: dict[str, Any] = {
        kind: {"groups": 0, "copies": 0, "of_source": Counter(), "leaked": 0, "examples": []} for kind in KINDS
    }
    leaks: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE seen (kind, hash, held_out, part, number)")
        for number, part in enumerate(parts):
            held_out = part.split not in ("train", "")
            rows = ((kind, one, held_out, number, document) for kind, one, document in _hashes(part, unreadable))
            database.executemany("INSERT INTO seen VALUES (?, ?, ?, ?, ?)", rows)
        ordered = database.execute("SELECT * FROM seen ORDER BY kind, hash, held_out, part, number")
        for (kind, _), group in groupby(ordered, lambda row: row[:2]):
            copies = list(group)
            if len(copies) < 2:
                continue
            of_kind = found[KINDS[kind]]
            of_kind["groups"] += 1
            of_kind["copies"] += len(copies) - 1
            of_kind["of_source"].update(parts[part].title for *_, part, _ in copies[1:])
            is_leak = not copies[0][2] and copies[-1][2]
            of_kind["leaked"] += sum(held_out for _, _, held_out, *_ in copies) if is_leak else 0
            examples = leaks[KINDS[kind]] if is_leak else of_kind["examples"]
            if len(examples) < EXAMPLES:
                examples.append([_name(parts[part], number) for *_, part, number in copies[:4] + copies[4:][-1:]])
    for kind in KINDS:
        found[kind]["examples"] = (leaks[kind] + found[kind]["examples"])[:EXAMPLES]
    return {"unreadable": unreadable["documents"]} | found


def _hashes(part: Part, unreadable: Counter[str]) -> Iterator[tuple[int, bytes, int]]:
    """(index of the kind, hash, number of the document) of every document and medium."""
    for number in tracked(range(len(part.shards)), f"{part.title}: reading", len(part.shards)):
        try:
            document = part.shards.document(number)
        except BadSample:
            unreadable["documents"] += 1
            continue
        hashes = [_hash(segment) for segment in document.segments]
        whole = b"".join(hashes if document.ordered else sorted(hashes))
        yield 0, hashlib.blake2b(whole, digest_size=16).digest(), number
        for segment, one in zip(document.segments, hashes, strict=True):
            if segment.modality != TEXT:
                yield segment.modality, one, number


def _hash(segment: Segment) -> bytes:
    kind = segment.extension if segment.is_encoded else MODALITIES[segment.modality]
    data = segment.data.encode("utf-8", "surrogatepass") if isinstance(segment.data, str) else segment.data
    return hashlib.blake2b(data, digest_size=16, person=kind.encode()).digest()


def _name(part: Part, number: int) -> list[str]:
    return [part.source, part.split, part.shards.key(number)]


def duplicate_lines(found: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    lines = [f"{found['unreadable']:,} documents are not what was indexed: `pile index --verify`"] * bool(found["unreadable"])
    if not found["documents"]["groups"]:
        lines.append("no document occurs more than once")
    for kind in (kind for kind in KINDS if found[kind]["groups"]):
        one = found[kind]
        where = ", ".join(f"{number:,} in {title}" for title, number in one["of_source"].items())
        lines.append(f"duplicate {kind}: {one['groups']:,} occur more than once, {one['copies']:,} copies could go: {where}")
        if one["leaked"]:
            lines.append(f"  LEAK: {one['leaked']:,} of the {kind} held out from training are in a training split too")
        lines += ["  " + " = ".join(" ".join(filter(None, name)) for name in example) for example in one["examples"][:5]]
    return lines
