"""Which prepared document stands in which shard: what one process of `pile prepare` does with the tables of all units.

    tables ──► drop duplicates and near-duplicates ──► plans (samples of each shard), rejected.jsonl, rejected/, Summary

Memory does not grow with the data but for near-duplicates: 4 kB a document.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from heapq import merge
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.prepare.labels import MOST_LABELS, SPLITS, in_order
from pile_app.prepare.ngrams import NearDuplicates
from pile_app.prepare.spill import KEPT, Table, Workplace, document_of_block

DIGESTS_AT_ONCE = 1 << 24  # that are sorted in memory


@dataclass
class Tally:
    """What one split of one source holds."""

    documents: int = 0
    text_bytes: int = 0
    images: int = 0
    audio_seconds: float = 0.0

    def add(self, rows: np.ndarray) -> None:
        self.documents += len(rows)
        self.text_bytes += int(rows["text_bytes"].sum())
        self.images += int(rows["images"].sum())
        self.audio_seconds += float(rows["audio_seconds"].sum())


@dataclass
class Summary:
    """What `prepare` wrote: `sources[source][split]`, a split without documents is absent; `rejected[reason]`; `read[layout]`,
    documents, and what was rejected, by what they were read as; `labels`: their numbers, -1 where not known."""

    output: Path
    sources: dict[str, dict[str, Tally]] = field(default_factory=lambda: defaultdict(dict))
    rejected: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        return sum(tally.documents for splits in self.sources.values() for tally in splits.values())

    def shards(self, source: str) -> dict[str, str]:
        """Pattern of the shards of each split, relative to `output`."""
        return {split: f"{source}-{split}-*.tar" for split in SPLITS if split in self.sources[source]}

    def description(self) -> dict[str, Any]:
        """What `dataset.json` holds, but for the options."""
        sources = {
            source: {
                split: {"shards": pattern, **asdict(self.sources[source][split])}
                for split, pattern in self.shards(source).items()
            }
            for source in sorted(self.sources)
        }
        counts = {"read": dict(sorted(self.read.items())), "rejected": dict(sorted(self.rejected.items()))}
        labels = {"labels": in_order(self.labels)} if self.labels else {}
        return {"pile_dataset": 1, "sources": sources, **labels, **counts}

    def yaml(self) -> str:
        """The `data.sources` of a configuration: every source that has documents to train on. And the labels, in order."""
        import yaml

        sources = {
            source: {
                split: os.path.join(self.output, pattern) for split, pattern in self.shards(source).items() if split != "test"
            }
            for source in sorted(self.sources)
            if "train" in self.sources[source]
        }
        description: dict[str, Any] = {"data": {"sources": sources}}
        if 1 < len(self.labels) <= MOST_LABELS:
            description["model"] = {"objective": {"init_args": {"labels": in_order(self.labels)}}}
        return yaml.safe_dump(description, default_flow_style=None, sort_keys=False, allow_unicode=True, width=10_000).rstrip()


def assign(work: Workplace, units: int, summary: Summary) -> list[str]:
    """Writes `rejected.jsonl`, `rejected/` and the plans of all shards; the names of the shards, in order."""
    options = work.options
    duplicates = _duplicates(work, units) if options.exact_duplicates else repeat(np.zeros(0, np.int64))
    similar = NearDuplicates(options.near_duplicates) if options.near_duplicates is not None else None
    plans: dict[tuple[str, str], _ShardPlans] = {}
    reviews: dict[str, list[tuple[dict[str, str], int, int, int]]] = defaultdict(list)
    with open(work.result / "rejected.jsonl", "w", encoding="utf-8") as lines:
        for unit, repeated in zip(range(units), duplicates, strict=False):
            table = Table.load(work.table(unit))
            summary.read.update({layout: count for layout, count in table.layouts.items() if layout})
            summary.labels.update(table.labels)
            dropped = _dropped(table, repeated, similar)
            for _, source, file, reason, detail, place, size in merge(table.rejected, dropped, key=lambda entry: entry[0]):
                summary.rejected[reason] += 1
                line = {"source": source, "file": file, "reason": reason, "detail": detail}
                lines.write(json.dumps(line) + "\n")
                if size and len(reviews[reason]) < KEPT:
                    reviews[reason].append((line, unit, place, size))
            kept = np.delete(table.rows, [entry[0] for entry in dropped])
            for number, source in enumerate(table.sources):
                for place, split in enumerate(SPLITS):
                    rows = kept[(kept["source"] == number) & (kept["split"] == place)]
                    if len(rows):
                        plan = plans.setdefault((source, split), _ShardPlans(work, f"{source}-{split}"))
                        plan.add(unit, rows["offset"], rows["size"])
                        summary.sources[source].setdefault(split, Tally()).add(rows)
    _write_reviews(work, reviews)
    return [shard for plan in plans.values() for shard in plan.close()]


def _dropped(table: Table, repeated: np.ndarray, similar: NearDuplicates | None) -> list[list[Any]]:
    """The documents of a unit that stood before, exactly or nearly, as entries of `Table.rejected`, in order."""
    found = dict.fromkeys(repeated.tolist(), ("duplicate", "a document of the same content was taken before"))
    for row, signature in enumerate(table.signatures if similar else ()):
        if row not in found and signature.any() and similar and (first := similar.add(signature, table.files[row])):
            found[row] = "near_duplicate", f"{first[1]:.2f} of its 5-grams are those of {first[0]}"
    return [
        [row, table.sources[table.rows["source"][row]], table.files[row], *why, *table.rows[row].item()[:2]]
        for row, why in sorted(found.items())
    ]


def _duplicates(work: Workplace, units: int) -> Iterator[np.ndarray]:
    """For each unit the rows whose document stood before. Digests are sorted in parts that fit memory."""
    counts = [len(Table.digests(work.table(unit))) for unit in range(units)]
    first = np.concatenate([[0], np.cumsum(counts)])
    parts = 1 + int(first[-1]) // DIGESTS_AT_ONCE
    found = [np.zeros(0, np.int64)]
    for part in range(parts):
        digests, rows = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
        for unit in range(units):
            digest = Table.digests(work.table(unit))
            chosen = np.flatnonzero(digest[:, 1] % np.uint64(parts) == part)
            digests.append(digest[chosen])
            rows.append(first[unit] + chosen)
        one, row = np.concatenate(digests), np.concatenate(rows)
        order = np.lexsort((one[:, 1], one[:, 0]))  # stable: rows of one digest stay in order
        same = (one[order[1:]] == one[order[:-1]]).all(axis=1)
        found.append(row[order[1:][same]])
    repeated = np.sort(np.concatenate(found))
    for unit in range(units):
        start, stop = np.searchsorted(repeated, first[unit : unit + 2]).tolist()
        yield repeated[start:stop] - first[unit]


class _ShardPlans:
    """Of one source and split: which samples make up each shard."""

    def __init__(self, work: Workplace, prefix: str) -> None:
        self._work, self._prefix = work, prefix
        self._limit = int(work.options.shard_megabytes * 2**20)
        self._names: list[str] = []
        self._rows: list[np.ndarray] = []
        self._bytes = 0

    def add(self, unit: int, offset: np.ndarray, size: np.ndarray) -> None:
        while len(offset):
            ends = self._bytes + np.cumsum(size)
            count = int(np.searchsorted(ends, self._limit)) + 1  # the sample that reaches the limit is the last
            self._rows.append(np.stack([np.full(len(ends), unit, np.uint64), offset, size], axis=1)[:count])
            self._bytes = int(ends[:count][-1])
            if self._bytes >= self._limit:
                self._finish()
            offset, size = offset[count:], size[count:]

    def _finish(self) -> None:
        name = f"{self._prefix}-{len(self._names):06d}"
        np.save(self._work.plan(name), np.concatenate(self._rows))
        self._names.append(name)
        self._rows, self._bytes = [], 0

    def close(self) -> list[str]:
        if self._rows:
            self._finish()
        return self._names


def _write_reviews(work: Workplace, reviews: dict[str, list[tuple[dict[str, str], int, int, int]]]) -> None:
    """The first rejected samples of each reason (line of `rejected.jsonl`, unit, place, size): `rejected/<reason>.jsonl`, with
    their media beside it."""
    folder = work.result / "rejected"
    for reason, samples in reviews.items():
        folder.mkdir(exist_ok=True)
        with open(folder / f"{reason}.jsonl", "w", encoding="utf-8") as lines:
            for number, (line, unit, place, size) in enumerate(samples):
                with open(work.blocks(unit), "rb") as blocks:
                    document = document_of_block(os.pread(blocks.fileno(), size, place))
                segments: list[dict[str, str]] = []
                for part, segment in enumerate(document.segments):
                    if isinstance(segment.data, str):
                        segments.append({"text": segment.data})
                        continue
                    name = f"{reason}/{number:02d}.{part}.{segment.extension}"
                    (folder / reason).mkdir(exist_ok=True)
                    (folder / name).write_bytes(segment.data)
                    segments.append({"file": name})
                lines.write(json.dumps(line | {"segments": segments}, ensure_ascii=False) + "\n")
