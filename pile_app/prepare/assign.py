"""The sequential part of `pile prepare`: from the tables of all jobs, decide on duplicates and splits, and write the shards.

Memory: 24 bytes per document of `AT_ONCE` while duplicates and splits are decided; 4 kB per text with near-duplicates."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.tar import BLOCK, files_of_block
from pile_app.fields import document_from_sample
from pile_app.prepare.ngrams import NearDuplicates
from pile_app.prepare.spill import ROW, SPLITS, Work, sample_block

AT_ONCE = 1 << 24  # documents that are sorted in memory
FRACTION, LEAST, MOST = 0.05, 32, 0.2  # documents for validation by default
MOST_LABELS = 1000  # that are printed


class Tally(NamedTuple):
    """Totals of a split of a source."""

    documents: int = 0
    text_bytes: int = 0
    images: int = 0
    audio_seconds: float = 0.0


@dataclass
class Summary:
    """The result of `prepare`: `sources[source][split]`. counts: `read:<layout>`, `rejected:<reason>` (samples),
    `unread:<reason>` (files), `used:<name>`, `unused:<name>`, `lost:<name>` (fields; lost: of rejected samples),
    `dropped:<reason>` (parts of chats), `pieces:` (documents added by cutting long sounds), `label:<label>`."""

    output: Path
    sources: dict[str, dict[str, Tally]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    labels: list[str] = field(default_factory=list)  # in order
    maps: list[str] = field(default_factory=list)  # the field maps

    def of(self, what: str) -> Counter[str]:
        """Return the counts of one kind."""
        return Counter({name.partition(":")[2]: count for name, count in self.counts.items() if name.startswith(f"{what}:")})

    @property
    def rejected(self) -> Counter[str]:
        return self.of("rejected")

    @property
    def documents(self) -> int:
        return sum(tally.documents for splits in self.sources.values() for tally in splits.values())

    def balance(self) -> dict[str, Any]:
        """Count samples and fields by outcome. Raises `AssertionError` if a sample is missing: a bug."""
        kinds = ("read", "pieces", "rejected", "used", "unused", "lost")
        read, pieces, rejected, used, unused, lost = (self.of(kind).total() for kind in kinds)
        if read + pieces != self.documents + rejected:
            raise AssertionError(f"{read} samples + {pieces} pieces != {self.documents} documents + {rejected} rejected")
        return {
            "samples": read, "pieces": pieces, "documents": self.documents, "rejected": rejected,
            "fields": used + unused + lost, "used": used, "unused": unused, "of_rejected": lost,
            "unused_fields": dict(sorted(self.of("unused").items())),
            "dropped_parts": self.of("dropped"), "files_not_read": self.of("unread"),
        }  # fmt: skip

    def description(self) -> dict[str, Any]:
        """Return the content of `dataset.json`, except the options. Shards are relative to its folder."""
        sources = {
            source: {split: {"shards": f"{source}-{split}-*.tar", **tally._asdict()} for split, tally in splits.items()}
            for source, splits in self.sources.items()
        }
        counts = {what: dict(sorted(self.of(what).items())) for what in ("read", "rejected")}
        labels = {"labels": self.labels} if self.labels else {}
        return {"pile_dataset": 1, "sources": sources, "fields": self.maps, **labels, **counts, "balance": self.balance()}

    def yaml(self) -> str:
        """Return the `data.sources` of a configuration, of every source that has training data; and the labels, in order."""
        import yaml

        sources = {
            source: {split: os.path.join(self.output, f"{source}-{split}-*.tar") for split in splits if split != "test"}
            for source, splits in self.sources.items()
            if "train" in splits
        }
        description: dict[str, Any] = {"data": {"sources": sources}}
        if 1 < len(self.labels) <= MOST_LABELS:
            description["model"] = {"objective": {"init_args": {"labels": self.labels}}}
        return yaml.safe_dump(description, default_flow_style=None, sort_keys=False, allow_unicode=True, width=10_000).rstrip()


def write_shards(work: Work, jobs: int, result: Path, summary: Summary) -> None:
    """Write `rejected.jsonl` and, if anything is usable, the shards to `result`."""
    kept, draws = _drop_duplicates(work, jobs, result, summary)
    names = _name_labels(work, summary)
    given = {split for found in draws.values() for split in np.unique(found["split"]).tolist()}
    has_splits = len(given) > 1  # not if everything is in a folder `test`, say
    is_chosen = {
        source: _choose(found["draw"][(found["split"] < 2) | (not has_splits)], work.options.validation_fraction)
        for source, found in draws.items()
        if not (has_splits and 2 in given)
    }
    shards, tallies = dict[tuple[str, str], _Shards](), defaultdict[tuple[str, str], Tally](Tally)
    for job, chosen in enumerate(kept):
        rows, sources = work.part(job, "rows")[chosen], work.part(job, "about")["sources"]
        splits = np.maximum(rows["split"], 1) if has_splits else np.ones(len(rows), np.uint8)
        for number, source in enumerate(sources):
            is_own = rows["source"] == number
            if source in is_chosen:
                splits[is_own & (splits == 1) & is_chosen[source](rows["draw"])] = 2
            for split, name in enumerate(SPLITS, 1):
                if len(found := rows[is_own & (splits == split)]):
                    shards.setdefault((source, name), _Shards(result / f"{source}-{name}", work, names)).copy(job, found)
                    figures = (found[figure].sum().item() for figure in Tally._fields[1:])
                    tallies[source, name] = Tally(*map(add, tallies[source, name], (len(found), *figures)))
    for source, name in sorted(shards, key=lambda key: (key[0], SPLITS.index(key[1]))):
        shards[source, name].close()
        summary.sources.setdefault(source, {})[name] = tallies[source, name]


def _drop_duplicates(work: Work, jobs: int, result: Path, summary: Summary) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Write `rejected.jsonl` and count everything; return the kept rows of each job, and draws and splits of each source."""
    similar = NearDuplicates(threshold) if (threshold := work.options.near_duplicates) else None
    kept, draws = [], defaultdict[str, list[np.ndarray]](list)
    with open(result / "rejected.jsonl", "w", encoding="utf-8") as lines:
        for job, repeated in enumerate(_repeated(work, jobs)):
            rows, about = work.part(job, "rows"), work.part(job, "about")
            sources, files = about["sources"], about["files"]
            dropped = dict.fromkeys(repeated.tolist(), ("duplicate", "another document has the same content"))
            for row, signature in enumerate(work.part(job, "signatures") if similar else ()):
                if similar and row not in dropped and signature.any() and (first := similar.add(signature, files[row])):
                    dropped[row] = "near_duplicate", f"{first[1]:.2f} of its 5-grams are those of {first[0]}"
            entries = [[sources[rows["source"][row]], files[row], *why, ""] for row, why in sorted(dropped.items())]
            summary.counts.update(about["counts"])
            summary.counts.update(f"rejected:{entry[2]}" for entry in entries)
            for entry in about["rejected"] + entries:
                line = dict(zip(("source", "file", "reason", "detail", "excerpt"), entry, strict=True))
                lines.write(json.dumps(line) + "\n")
            kept.append(np.delete(np.arange(len(rows)), list(dropped)))
            for number, source in enumerate(sources):
                draws[source].append(rows[["draw", "split"]][kept[-1]][rows["source"][kept[-1]] == number])
    return kept, {source: np.concatenate(found) for source, found in draws.items()}


def _repeated(work: Work, jobs: int) -> Iterator[np.ndarray]:
    """Yield for each job the rows whose document is kept elsewhere: in a test split, else for validation, else earlier. Digests
    are sorted in parts that fit in memory."""
    first = np.cumsum([0, *(len(work.part(job, "rows")) for job in range(jobs))])
    parts = 1 + int(first[-1]) // AT_ONCE if work.options.exact_duplicates else 0
    found = [np.zeros(0, np.int64)]
    for part in range(parts):
        every, index = [np.zeros(0, ROW)[["digest", "split"]]], [np.zeros(0, np.int64)]
        for job in range(jobs):
            rows = work.part(job, "rows")[["digest", "split"]]
            index.append(first[job] + np.flatnonzero(rows["digest"][:, 1] % np.uint64(parts) == part))
            every.append(rows[index[-1] - first[job]])
        rows = np.concatenate(every)
        order = np.lexsort((-rows["split"].astype(int), rows["digest"][:, 1], rows["digest"][:, 0]))  # stable
        digests = rows["digest"][order]
        found.append(np.concatenate(index)[order[1:][(digests[1:] == digests[:-1]).all(axis=1)]])
    repeated = np.sort(np.concatenate(found))
    for job in range(jobs):
        yield repeated[slice(*np.searchsorted(repeated, first[job : job + 2]))] - first[job]


def _choose(draws: np.ndarray, fraction: float | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of draws (N,) uint64 that tells which are for validation. Documents of a draw, such as those of a
    speaker, stay together. By default 5 %, at least 32 and at most 20 % of the documents are chosen, by the smallest draws."""
    if fraction is not None or len(draws) > AT_ONCE:
        limit = np.uint64(int((FRACTION if fraction is None else fraction) * 2**64))
        return lambda those: those < limit
    most = int(MOST * len(draws))
    wanted, taken, count = min(most, max(LEAST, round(FRACTION * len(draws)))), [], 0
    for group, size in zip(*np.unique(draws, return_counts=True), strict=True):
        if count >= wanted:
            break
        if count + size <= most:
            taken.append(group)
            count += size
    return lambda those: np.isin(those, np.array(taken, np.uint64))


def _name_labels(work: Work, summary: Summary) -> dict[str, str]:
    """Order the labels by number, else by letter; return the names that they were given."""
    labels, names = list(summary.of("label")), work.options.label_names
    are_numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in labels)
    labels.sort(key=(lambda label: (float(label), label)) if are_numbers else None)
    if names and len(names) != len(labels):
        shown = ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "") or "none: name it with --label"
        raise ValueError(f"label_names gives {len(names)} names ({', '.join(names)}) to {len(labels)} labels ({shown})")
    summary.labels = list(names) or labels
    return dict(zip(labels, names, strict=False))


class _Shards:
    """Appends documents to the shards of a source and split."""

    def __init__(self, prefix: Path, work: Work, names: dict[str, str]) -> None:
        self._prefix, self._work, self._names = prefix, work, names
        self._limit, self._number, self._size = int(work.options.shard_megabytes * 2**20), 0, 0

    def copy(self, job: int, rows: np.ndarray) -> None:
        with open(self._work.blocks(job), "rb") as blocks:
            for offset, size in rows[["offset", "size"]].tolist():
                block = os.pread(blocks.fileno(), size, offset)
                self._write(self._renamed(block) if self._names else block)
                if self._size >= self._limit:
                    self.close()

    def _write(self, data: bytes) -> None:
        with open(f"{self._prefix}-{self._number:06d}.tar", "ab") as tar:
            tar.write(data)
        self._size += len(data)

    def close(self) -> None:
        if self._size:
            self._write(bytes(2 * BLOCK + -(self._size + 2 * BLOCK) % tarfile.RECORDSIZE))
            self._number, self._size = self._number + 1, 0

    def _renamed(self, block: bytes) -> bytes:
        """Replace the label of a document by its name."""
        key = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "strict").name.partition(".")[0]
        document = document_from_sample(key, files_of_block(block))
        if (label := document.meta.get("label")) not in self._names:
            return block
        name = self._names[label]
        *segments, last = document.segments
        segments.append(replace(last, data=name) if self._work.options.learn_label and last.data == label else last)
        return sample_block(replace(document, segments=tuple(segments), meta={**document.meta, "label": name}))
