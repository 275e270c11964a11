"""What occurs more than once in shards, whatever its key: whole documents, and single images and sounds.

One pass over the shards writes a row for each, 128 bits of its hash and where it is, to one of 256 files by the hash; then each
of these is sorted on its own. So disk takes some 30 bytes a document or medium, and memory a 256th of that.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.documents import MODALITIES, TEXT, BadSample, Segment

if TYPE_CHECKING:
    from pile_app.tasks.inspect_data import Part


class Duplicates:
    """Finds them in the parts of a data set.

    Args:
        parts: sources and splits, all of which are compared with each other.
        folder: empty, for the rows.
        track: goes through the numbers of shards, and may tell how far it is; its second argument says what is being done.
    """

    ROW = np.dtype([("hash", ">u8", 2), ("kind", "u1"), ("part", "<u4"), ("shard", "<u4"), ("sample", "<u4")])
    KINDS = ("documents", "images", "sounds")
    EXAMPLES = 10

    def __init__(self, parts: Sequence[Part], folder: Path, track: Callable[[Sequence[int], str], Iterable[int]]) -> None:
        self.parts = parts
        self.folder = folder
        self.track = track
        self.is_train = np.array([part.split in ("train", "") for part in parts])
        self.unreadable = 0

    def find(self) -> dict[str, Any]:
        """{"unreadable": documents whose bytes are not those that were indexed,
        "documents" | "images" | "sounds": {"groups": contents that occur more than once, "copies": how many could go,
                "of_source": {source and split: copies in it, all but the first of each group},
                "leaked": those outside the training split that occur in the training split of any source,
                "examples": [[source, split, key] of each copy, at most 5 of a group], leaked ones first}}
        """
        for number, part in enumerate(self.parts):
            for shard in self.track(range(len(part.shards)), f"{part.title}: reading"):
                self._write(self._rows(number, shard))
        found: dict[str, Any] = {
            kind: {"groups": 0, "copies": 0, "of_source": Counter(), "leaked": 0, "examples": []} for kind in self.KINDS
        }
        leaks: dict[str, list[Any]] = {kind: [] for kind in self.KINDS}
        for path in sorted(self.folder.iterdir()):
            self._count(np.fromfile(path, self.ROW), found, leaks)
            path.unlink()
        for kind in self.KINDS:
            found[kind]["examples"] = (leaks[kind] + found[kind]["examples"])[: self.EXAMPLES]
        return {"unreadable": self.unreadable} | found

    def _rows(self, part: int, shard: int) -> np.ndarray:
        shards = self.parts[part].shards
        rows: list[tuple[bytes, int, int]] = []
        for sample in range(len(shards.index(shard))):
            try:
                document = shards.document(shard, sample)
            except BadSample:
                self.unreadable += 1
                continue
            hashes = [_hash(segment) for segment in document.segments]
            ordered = hashes if document.ordered else sorted(hashes)
            rows.append((hashlib.blake2b(b"".join(ordered), digest_size=16).digest(), 0, sample))
            rows += [
                (one, segment.modality, sample)
                for one, segment in zip(hashes, document.segments, strict=True)
                if segment.modality != TEXT
            ]
        table = np.zeros(len(rows), self.ROW)
        if rows:
            table["hash"] = np.frombuffer(b"".join(one for one, _, _ in rows), ">u8").reshape(-1, 2)
            table["kind"], table["sample"] = np.array([row[1:] for row in rows]).T
        table["part"], table["shard"] = part, shard
        return table

    def _write(self, rows: np.ndarray) -> None:
        files = (rows["hash"][:, 0] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(files, kind="stable")
        ends = np.cumsum(np.bincount(files, minlength=256))
        for number, own in enumerate(np.split(rows[order], ends[:-1])):
            if len(own):
                with open(self.folder / f"{number:03d}", "ab") as file:
                    file.write(own.tobytes())

    def _count(self, rows: np.ndarray, found: dict[str, Any], leaks: dict[str, list[Any]]) -> None:
        """Adds what one partition holds."""
        order = np.lexsort(
            (rows["sample"], rows["shard"], rows["part"], ~self.is_train[rows["part"]], *rows["hash"].T, rows["kind"])
        )
        rows = rows[order]
        same = (rows["kind"][1:] == rows["kind"][:-1]) & (rows["hash"][1:] == rows["hash"][:-1]).all(1)
        first = np.flatnonzero(np.concatenate([[True], ~same]))
        stop = np.append(first[1:], len(rows))
        several = stop - first > 1
        for start, end in zip(first[several].tolist(), stop[several].tolist(), strict=True):
            copies = rows[start:end]
            kind = self.KINDS[int(copies["kind"][0])]
            of_kind = found[kind]
            of_kind["groups"] += 1
            of_kind["copies"] += len(copies) - 1
            of_kind["of_source"].update(self.parts[part].title for part in copies["part"][1:].tolist())
            train = self.is_train[copies["part"]]
            leaked = int((~train).sum()) if train.any() else 0
            of_kind["leaked"] += leaked
            examples = leaks[kind] if leaked else of_kind["examples"]
            if len(examples) < self.EXAMPLES:
                examples.append(
                    [self._name(row) for row in copies[sorted({0, 1, 2, 3, len(copies) - 1} & set(range(len(copies))))]]
                )

    def _name(self, row: np.void) -> list[str]:
        part = self.parts[int(row["part"])]
        key = part.shards.index(int(row["shard"])).key(int(row["sample"]))
        return [part.source, part.split, key]


def _hash(segment: Segment) -> bytes:
    kind = segment.extension if segment.is_encoded else MODALITIES[segment.modality]
    data = segment.data.encode("utf-8", "surrogatepass") if isinstance(segment.data, str) else segment.data
    return hashlib.blake2b(data, digest_size=16, person=kind.encode()).digest()
