"""The sequential part of `pile prepare`: from the tables of all jobs, decide on duplicates and splits, and write the shards.

Memory: about 150 bytes per document; 4 kB per text with near-duplicates."""

from __future__ import annotations

import json
import os
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.tar import BLOCK, files_of_block
from pile_app.fields import document_from_sample
from pile_app.prepare.ngrams import NearDuplicates
from pile_app.prepare.spill import ROW, SPLITS, Work, sample_block, slug

FRACTION, LEAST, MOST = 0.05, 32, 0.2  # documents for validation by default
MOST_LABELS = 1000  # that are printed
CONFIGS = ("text_only", "photos", "speech", "media")  # 1: with images, 2: with sound


class Tally(NamedTuple):
    """Totals of a split of a source."""

    documents: int = 0
    text_bytes: int = 0
    images: int = 0
    audio_seconds: float = 0.0


def listed(counts: Mapping[str, int], what: str = "") -> str:
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name}: {n:,} {what}" if what else f"{n:,} {name}" for name, n in ordered)


@dataclass
class Summary:
    """The result of `prepare`: `sources[source][split]`. counts: `read:<layout>`, `rejected:<reason>` (samples),
    `unread:<reason>` (files), `used:<name>`, `unused:<name>`, `lost:<name>` (fields; lost: of rejected samples),
    `label:<label>`, `entity:<type>`, `dropped:<reason>` (parts of chats), `pieces:` (documents added by cutting sounds)."""

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
            source: {split: {"shards": f"{source}-{split}-[0-9]*.tar", **tally._asdict()} for split, tally in splits.items()}
            for source, splits in self.sources.items()
        }
        counts = {what: dict(sorted(self.of(what).items())) for what in ("read", "rejected")}
        labels = {"labels": self.labels} if self.labels else {}
        return {"pile_dataset": 1, "sources": sources, "fields": self.maps, **labels, **counts, "balance": self.balance()}

    def commands(self) -> list[str]:
        """Return the shell commands that train on the shards: a language model, then its classes or entities."""
        import yaml

        def inline(value: Any) -> str:  # YAML, or JSON where YAML needs the quotes of the shell
            text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1_000_000).strip()
            return shlex.quote(json.dumps(value, ensure_ascii=False) if "'" in text else text)

        trained = {source: splits for source, splits in self.sources.items() if "train" in splits}
        if not trained:
            return []
        patterns = {
            source: {split: os.path.join(self.output, f"{source}-{split}-[0-9]*.tar") for split in splits if split != "test"}
            for source, splits in trained.items()
        }
        holds = [any(splits["train"][figure] for splits in trained.values()) for figure in (2, 3)]  # images, sound
        name, sources = slug(self.output.resolve().name) or "data", f"--data.sources {inline(patterns)}"
        train = "uv run pile train" if "UV" in os.environ else "pile train"  # `uv run` sets it
        commands = [f"{train} --config {CONFIGS[holds[0] + 2 * holds[1]]} --name {name} {sources}"]
        run, given = f"runs/{name}", "--model.objective.init_args"
        tuned = f"{train} --config {run}/config.yaml --config tasks/{{}} --model.start_from {run} --name {name}-{{}}"
        if 1 < len(self.labels) <= MOST_LABELS:
            commands.append(f"{tuned.format('classification', 'classes')} {given}.labels {inline(self.labels)}")
        if types := sorted(self.of("entity")):
            commands.append(f"{tuned.format('ner', 'entities')} {sources} {given}.types {inline(types)}")
        return commands

    def print(self) -> None:
        """Print the balance to stderr, and to stdout the `commands` that train on the shards."""
        from rich.console import Console
        from rich.table import Column, Table

        figures = (Column(name, justify="right") for name in ("documents", "text bytes", "images", "hours"))
        table, total, unread = Table("source", "split", *figures), self.balance(), self.of("unread")
        for source, splits in self.sources.items():
            for split, tally in splits.items():
                table.add_row(source, split, *(f"{figure:,}" for figure in tally[:3]), f"{tally.audio_seconds / 3600:,.3f}")
        pieces = f" + {total['pieces']:,} pieces of long sounds" * bool(total["pieces"])
        lost = f" + {total['of_rejected']:,} of rejected samples" * bool(total["of_rejected"])
        reasons, unused = f" ({listed(self.rejected)})", f" ({listed(self.of('unused'), 'unused')})" * bool(total["unused"])
        missing = [f"{source} has no {split} documents" for source, splits in self.sources.items()
                   for split in SPLITS[:2] if split not in splits]  # fmt: skip
        hint = "set --validation-fraction, or cut texts into more documents with --document-bytes"
        commands = self.commands()
        lines = {
            f"samples: {total['samples']:,} read ({listed(self.of('read'))}){pieces} = {total['documents']:,} documents + "
            f"{total['rejected']:,} rejected{reasons * bool(total['rejected'])}": True,
            f"files and fields: {total['fields']:,} read = {total['used']:,} used + "
            f"{total['unused']:,} unused{unused}{lost}": True,
            f"parts of chats dropped: {listed(total['dropped_parts'])}": total["dropped_parts"],
            f"files not read: {listed(unread)}": unread,
            f"see {self.output / 'rejected.jsonl'}": unread or total["rejected"],
            f"{', '.join(missing)}: {hint}": missing,
            "to train on it, from this folder:": commands,
        }
        shown = [line for line, is_shown in lines.items() if is_shown]
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(table, *shown, sep="\n")
        print(*commands, sep="\n", end="\n" * bool(commands), flush=True)


def write_shards(work: Work, jobs: int, result: Path, summary: Summary) -> None:
    """Write `rejected.jsonl` and, if anything is usable, the shards to `result`."""
    numbers, tables = dict[str, int](), [np.zeros(0, ROW)]
    for job in range(jobs):
        rows, sources = work.part(job, "rows"), work.part(job, "about")["sources"]
        rows["source"] = np.array([numbers.setdefault(source, len(numbers)) for source in sources], int)[rows["source"]]
        tables.append(rows)
    rows, starts = np.concatenate(tables), np.cumsum(list(map(len, tables)))  # (N,), (jobs + 1,)
    is_kept = _drop_duplicates(work, rows, starts, list(numbers), result, summary)
    names = _name_labels(work, summary)
    given = set(np.unique(rows["split"][is_kept]).tolist())
    has_splits = len(given) > 1  # not if everything is in a folder `test`, say
    splits = np.maximum(rows["split"], 1) if has_splits else np.ones(len(rows), np.uint8)
    for source, number in sorted(numbers.items()):
        is_own = is_kept & (rows["source"] == number)
        if not (has_splits and 2 in given):
            candidates = np.flatnonzero(is_own & (splits == 1))
            splits[candidates] += _choose(rows["draw"][candidates], work.options.validation_fraction)
        for split, name in enumerate(SPLITS, 1):
            if len(index := np.flatnonzero(is_own & (splits == split))):
                parts = np.split(index, np.searchsorted(index, starts[1:-1]))  # by job
                _write_tars(result / f"{source}-{name}", _blocks(work, rows, parts, names), work.options.shard_megabytes)
                text_bytes, images = (rows[figure][index].sum().item() for figure in ("text_bytes", "images"))
                seconds = sum(rows["audio_seconds"][part].sum().item() for part in parts)
                summary.sources.setdefault(source, {})[name] = Tally(len(index), text_bytes, images, seconds)


def _drop_duplicates(
    work: Work, rows: np.ndarray, starts: np.ndarray, sources: list[str], result: Path, summary: Summary
) -> np.ndarray:
    """Write `rejected.jsonl` and count everything; return which rows are kept, (N,) bool."""
    is_kept = np.ones(len(rows), bool)
    if work.options.exact_duplicates:  # keep the document of a test split, else for validation, else the first
        order = np.lexsort((-rows["split"].astype(int), *rows["digest"].T))  # stable
        digests = rows["digest"][order]
        is_kept[order[1:]] = (digests[1:] != digests[:-1]).any(axis=1)
    similar = NearDuplicates(threshold) if (threshold := work.options.near_duplicates) else None
    with open(result / "rejected.jsonl", "w", encoding="utf-8") as lines:
        for job, (start, stop) in enumerate(pairwise(starts.tolist())):
            about = work.part(job, "about")
            repeated = np.flatnonzero(~is_kept[start:stop]).tolist()
            dropped = dict.fromkeys(repeated, ("duplicate", "another document has the same content"))
            for row, signature in enumerate(work.part(job, "signatures") if similar else ()):
                is_text = row not in dropped and signature.any()
                if similar and is_text and (found := similar.add(signature, about["files"][row])):
                    dropped[row] = "near_duplicate", f"{found[1]:.2f} of its 5-grams are those of {found[0]}"
            is_kept[start + np.array(list(dropped), int)] = False
            summary.counts.update(about["counts"])
            summary.counts.update(f"rejected:{reason}" for reason, _ in dropped.values())
            entries = [(sources[rows["source"][start + n]], about["files"][n], *why, "") for n, why in sorted(dropped.items())]
            for entry in about["rejected"] + entries:
                line = dict(zip(("source", "file", "reason", "detail", "excerpt"), entry, strict=True))
                lines.write(json.dumps(line) + "\n")
    return is_kept


def _choose(draws: np.ndarray, fraction: float | None) -> np.ndarray:
    """Tell which draws, (N,) uint64, are for validation: below `fraction`, else the smallest 5 %, at least 32 and at most 20 %.
    Documents of a draw, such as those of a speaker, stay together."""
    if fraction is not None:
        return draws < np.uint64(int(fraction * 2**64))
    most = int(MOST * len(draws))
    wanted, taken, count = min(most, max(LEAST, round(FRACTION * len(draws)))), [], 0
    for group, size in zip(*np.unique(draws, return_counts=True), strict=True):
        if count >= wanted:
            break
        if count + size <= most:
            taken.append(group)
            count += size
    return np.isin(draws, np.array(taken, np.uint64))


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


def _blocks(work: Work, rows: np.ndarray, parts: list[np.ndarray], names: dict[str, str]) -> Iterator[bytes]:
    """Yield the blocks of rows, given as their indices in each job, with new names for their labels."""
    for job, part in enumerate(parts):
        with open(work.blocks(job), "rb") as file:
            for offset, size in rows[["offset", "size"]][part].tolist():
                file.seek(offset)
                block = file.read(size)
                yield _renamed(block, names, work.options.learn_label) if names else block


def _renamed(block: bytes, names: dict[str, str], learn_label: bool) -> bytes:
    key = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "strict").name.partition(".")[0]
    document = document_from_sample(key, files_of_block(block))
    if (label := document.meta.get("label")) not in names:
        return block
    *segments, last = document.segments
    segments.append(replace(last, data=names[label]) if learn_label and last.data == label else last)
    return sample_block(replace(document, segments=tuple(segments), meta={**document.meta, "label": names[label]}))


def _write_tars(prefix: Path, blocks: Iterator[bytes], megabytes: float) -> None:
    for number, first in enumerate(blocks):
        with open(f"{prefix}-{number:06d}.tar", "wb") as tar:
            tar.write(first)
            while tar.tell() < int(megabytes * 2**20) and (block := next(blocks, b"")):
                tar.write(block)
            tar.write(bytes(2 * BLOCK + -(tar.tell() + 2 * BLOCK) % tarfile.RECORDSIZE))
