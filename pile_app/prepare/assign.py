"""What one process of `pile prepare` decides from the tables of all jobs: duplicates, splits, and which shard holds what.

    tables ──► rejected.jsonl; plans (the documents of each shard); Summary with its balance

Memory: 32 bytes per document while splits and duplicates are decided, in parts of `AT_ONCE`; 4 kB per text with near-duplicates.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from heapq import merge
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.prepare.ngrams import NearDuplicates
from pile_app.prepare.spill import SPLITS, Table, Work, load_rows

AT_ONCE = 1 << 24  # digests that are sorted in memory; documents of a source whose split is decided by their number
FRACTION, LEAST, MOST = 0.05, 32, 0.2  # documents for validation by default
MOST_LABELS = 1000  # that are printed


@dataclass
class Tally:
    """What a split of a source contains."""

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
    """What `prepare` wrote: `sources[source][split]`; `read`: samples by layout; `rejected`: samples by reason; `unread`: files
    by reason; `dropped`: parts of chats; `pieces`: documents added by cutting long sounds; `fields`: name -> [used, unused, of
    rejected samples]; `maps`: the field maps in use; `labels` in order."""

    output: Path
    sources: dict[str, dict[str, Tally]] = field(default_factory=lambda: defaultdict(dict))
    rejected: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    pieces: int = 0
    fields: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(3, np.int64)))
    labels: list[str] = field(default_factory=list)
    maps: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)  # the first rejection, or else the first file that was not read

    @property
    def documents(self) -> int:
        return sum(tally.documents for splits in self.sources.values() for tally in splits.values())

    def balance(self) -> dict[str, Any]:
        """What was read and what it became. Raises `AssertionError` if the two differ: a bug, a sample was lost uncounted."""
        read, rejected = self.read.total(), self.rejected.total()
        if read + self.pieces != self.documents + rejected:
            raise AssertionError(f"{read:,} samples + {self.pieces:,} pieces != {self.documents:,} documents + {rejected:,} rejected")
        used, unused, lost = (sum(int(counts[column]) for counts in self.fields.values()) for column in range(3))
        by_name = {name: int(counts[1]) for name, counts in sorted(self.fields.items()) if counts[1]}
        return {
            "samples": read, "pieces": self.pieces, "documents": self.documents, "rejected": rejected,
            "fields": used + unused + lost, "used": used, "unused": unused, "of_rejected": lost, "unused_fields": by_name,
            "dropped_parts": dict(self.dropped), "files_not_read": dict(self.unread),
        }  # fmt: skip

    def shards(self, source: str) -> dict[str, str]:
        """Pattern of the shards of each split, relative to `output`."""
        return {split: f"{source}-{split}-*.tar" for split in SPLITS if split in self.sources[source]}

    def description(self) -> dict[str, Any]:
        """What `dataset.json` holds, except the options."""
        sources = {
            source: {split: {"shards": name, **asdict(self.sources[source][split])} for split, name in self.shards(source).items()}
            for source in sorted(self.sources)
        }
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("read", "rejected")}
        labels = {"labels": self.labels} if self.labels else {}
        return {"pile_dataset": 1, "sources": sources, "fields": self.maps, **labels, **counts, "balance": self.balance()}

    def yaml(self) -> str:
        """The `data.sources` of a configuration, of every source that has training data; and the labels, in order."""
        import yaml

        sources = {
            source: {split: os.path.join(self.output, name) for split, name in self.shards(source).items() if split != "test"}
            for source in sorted(self.sources)
            if "train" in self.sources[source]
        }
        description: dict[str, Any] = {"data": {"sources": sources}}
        if 1 < len(self.labels) <= MOST_LABELS:
            description["model"] = {"objective": {"init_args": {"labels": self.labels}}}
        return yaml.safe_dump(description, default_flow_style=None, sort_keys=False, allow_unicode=True, width=10_000).rstrip()


def assign(work: Work, jobs: int, summary: Summary) -> list[str]:
    """Write `rejected.jsonl` and the plans of all shards; return the names of the shards, in order."""
    similar = NearDuplicates(work.options.near_duplicates) if work.options.near_duplicates is not None else None
    labels: Counter[str] = Counter()
    kept: list[np.ndarray] = []
    given: set[int] = set()
    draws: dict[str, list[np.ndarray]] = defaultdict(list)
    with open(work.result / "rejected.jsonl", "w", encoding="utf-8") as lines:
        for job, repeated in zip(range(jobs), _duplicates(work, jobs), strict=True):
            table = Table.load(work.blocks(job))
            for name in ("read", "unread", "dropped"):
                getattr(summary, name).update(table.counts[name])
            labels.update(table.counts["labels"])
            summary.pieces += sum(table.counts["pieces"].values())
            for name, counts in table.counts["fields"].items():
                summary.fields[name] += counts
            dropped = _dropped(table, repeated, similar)
            for _, *entry in merge(table.rejected, dropped, key=lambda entry: entry[0]):
                line = dict(zip(("source", "file", "reason", "detail", "excerpt"), entry, strict=True))
                lines.write(json.dumps(line) + "\n")
                summary.rejected[line["reason"]] += 1
                if not summary.first or (summary.first["reason"] in summary.unread and line["reason"] not in summary.unread):
                    summary.first = line
            kept.append(np.delete(np.arange(len(table.rows)), [entry[0] for entry in dropped]))
            rows = table.rows[kept[-1]]
            given |= set(np.unique(rows["split"]).tolist())
            for number, source in enumerate(table.sources):
                draws[source].append(rows[["draw", "split"]][rows["source"] == number])
    summary.rejected -= summary.unread
    _name_labels(work, labels, summary)
    has_splits = {1} < given - {0}  # training and another: a folder `test` alone is as likely the tests of some program
    is_drawn = not (has_splits and 2 in given)
    chosen = {}
    for source, found in draws.items():
        rows = np.concatenate(found)
        rows = rows[rows["split"] < 2] if has_splits else rows
        chosen[source] = _validation_draws(rows["draw"], work.options.validation_fraction)
    plans: dict[tuple[str, str], _ShardPlans] = {}
    for job in range(jobs):
        rows, sources = load_rows(work.blocks(job))
        rows = rows[kept[job]]
        for number, source in enumerate(sources):
            own = rows[rows["source"] == number]
            splits = np.maximum(own["split"], 1) if has_splits else np.ones(len(own), np.uint8)
            splits[is_drawn & (splits == 1) & chosen[source](own["draw"])] = 2
            for split, name in enumerate(SPLITS, 1):
                if len(found := own[splits == split]):
                    plan = plans.setdefault((source, name), _ShardPlans(work, f"{source}-{name}"))
                    plan.add(job, found["offset"], found["size"])
                    summary.sources[source].setdefault(name, Tally()).add(found)
    return [shard for plan in plans.values() for shard in plan.close()]


def _validation_draws(draws: np.ndarray, fraction: float | None) -> Any:
    """A function of draws (N,) uint64: which are for validation. Documents of the same draw, such as those of a speaker, stay
    together. By default 5 %, at least 32 and at most 20 % of the documents are chosen, those of the smallest draws."""
    if fraction is not None or len(draws) > AT_ONCE:
        limit = np.uint64(min(2**64 - 1, int((FRACTION if fraction is None else fraction) * 2**64)))
        return lambda those: those < limit
    groups, sizes = np.unique(draws, return_counts=True)
    most = int(MOST * len(draws))
    wanted = min(most, max(LEAST, round(FRACTION * len(draws))))
    taken, count = [], 0
    for group, size in zip(groups, sizes.tolist(), strict=True):
        if count >= wanted:
            break
        if count + size <= most:
            taken.append(group)
            count += size
    return lambda those: np.isin(those, np.array(taken, np.uint64))


def _name_labels(work: Work, labels: Counter[str], summary: Summary) -> None:
    """Order the labels by number, else by letter, and give them the names that were asked for."""
    found = sorted(labels, key=(lambda label: (int(label), label)) if all(map(str.isdecimal, labels)) else None)
    names, path = work.options.label_names, work.folder / "labels.json"
    if names and len(names) != len(found):
        shown = ", ".join(found[:20]) + (" ..." if len(found) > 20 else "")
        raise ValueError(f"label_names gives {len(names)} names ({', '.join(names)}) to {len(found)} labels ({shown or 'none'})")
    wanted = json.dumps(dict(zip(found, names, strict=False)))
    if path.exists() and path.read_text() != wanted:
        for shard in work.result.glob("*.tar"):  # of an interrupted preparation with other names
            shard.unlink()
    path.write_text(wanted)
    summary.labels = list(names) or found


def _dropped(table: Table, repeated: np.ndarray, similar: NearDuplicates | None) -> list[list[Any]]:
    """The documents of a job that repeat an earlier one, exactly or nearly, as entries of `Table.rejected`, in order."""
    found = dict.fromkeys(repeated.tolist(), ("duplicate", "an earlier document has the same content"))
    for row, signature in enumerate(table.signatures if similar else ()):
        if row not in found and signature.any() and similar and (first := similar.add(signature, table.files[row])):
            found[row] = "near_duplicate", f"{first[1]:.2f} of its 5-grams are those of {first[0]}"
    return [[row, table.sources[table.rows["source"][row]], table.files[row], *why, ""] for row, why in sorted(found.items())]


def _duplicates(work: Work, jobs: int) -> Iterator[np.ndarray]:
    """Yield for each job the rows whose document came before. Digests are sorted in parts that fit in memory."""
    first = np.cumsum([0, *(len(load_rows(work.blocks(job))[0]) for job in range(jobs))])
    parts = 1 + int(first[-1]) // AT_ONCE if work.options.exact_duplicates else 0
    found = [np.zeros(0, np.int64)]
    for part in range(parts):
        hashes, rows = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
        for job in range(jobs):
            digest = load_rows(work.blocks(job))[0]["digest"]
            chosen = np.flatnonzero(digest[:, 1] % np.uint64(parts) == part)
            hashes.append(digest[chosen])
            rows.append(first[job] + chosen)
        every, row = np.concatenate(hashes), np.concatenate(rows)
        order = np.lexsort((every[:, 1], every[:, 0]))  # stable: rows of a digest stay in order
        found.append(row[order[1:][(every[order[1:]] == every[order[:-1]]).all(axis=1)]])
    repeated = np.sort(np.concatenate(found))
    for job in range(jobs):
        yield repeated[slice(*np.searchsorted(repeated, first[job : job + 2]))] - first[job]


class _ShardPlans:
    """Which documents make up each shard of a source and split."""

    def __init__(self, work: Work, prefix: str) -> None:
        self._folder, self._prefix = work.folder / "plans", prefix
        self._limit = int(work.options.shard_megabytes * 2**20)
        self._names: list[str] = []
        self._rows: list[np.ndarray] = []
        self._bytes = 0

    def add(self, job: int, offset: np.ndarray, size: np.ndarray) -> None:
        while len(offset):
            ends = self._bytes + np.cumsum(size)
            count = int(np.searchsorted(ends, self._limit)) + 1  # the document that reaches the limit is the last
            self._rows.append(np.stack([np.full(len(ends), job, np.uint64), offset, size], axis=1)[:count])
            self._bytes = int(ends[:count][-1])
            if self._bytes >= self._limit:
                self.close()
            offset, size = offset[count:], size[count:]

    def close(self) -> list[str]:
        if self._rows:
            self._names.append(f"{self._prefix}-{len(self._names):06d}")
            np.save(self._folder / f"{self._names[-1]}.npy", np.concatenate(self._rows))
            self._rows, self._bytes = [], 0
        return self._names
