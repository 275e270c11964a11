"""The parallel part of `pile prepare`: jobs, some megabytes of the input each, become `spill/0000/0000012.blocks`, documents in
the bytes of a shard, and `.npz`, a row for each document, the rejected samples and all counts. Any process on any machine that
sees the folder may do a job, in any order and repeatedly, with the same result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.data.files import whole_file
from pile_app.data.tar import BLOCK, MAX_SAMPLE_BYTES
from pile_app.documents import IMAGE, TEXT, BadSample, Document, Segment, describe, sample_from_document
from pile_app.media import audio_size
from pile_app.prepare.filters import apply_steps, cut_long_sounds
from pile_app.prepare.layouts import named_split
from pile_app.prepare.listing import Record, Unit
from pile_app.prepare.ngrams import PERMUTATIONS, EvaluationTexts, minhash
from pile_app.prepare.options import Options
from pile_app.prepare.readers import Maps, read_record, read_unit

SPLITS = ("train", "validation", "test")
# Of a document: its range in the blocks; source; given split + 1, or 0; sizes; hashes of its content and for its split
ROW = np.dtype([("offset", "<u8"), ("size", "<u8"), ("source", "<u4"), ("split", "|u1"), ("text_bytes", "<u8"),
                ("images", "<u4"), ("audio_seconds", "<f8"), ("digest", "<u8", 2), ("draw", "<u8")])  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A preparation in progress. source: the name for documents without a source."""

    folder: Path
    source: str
    options: Options
    maps: Maps

    def blocks(self, job: int) -> Path:
        return self.folder / "spill" / f"{job // 1000:04d}" / f"{job:07d}.blocks"

    def part(self, job: int, name: str) -> Any:
        """Load `rows`, `signatures` or `about` (sources, files, rejected, counts, blocks) of a job's table."""
        with np.load(self.blocks(job).with_suffix(".npz")) as file:
            return json.loads(file[name].tobytes()) if name == "about" else file[name]

    def is_read(self, job: int) -> bool:
        with suppress(Exception):  # of a file that is missing or damaged
            return bool(self.blocks(job).stat().st_size == self.part(job, "about")["blocks"])
        return False


def read_job(work: Work, item: tuple[int, Sequence[Unit]]) -> None:
    """Read, check and change the units of a job, and write its blocks and table."""
    job, units = item
    if not work.folder.is_dir():
        raise ValueError(f"a node cannot see {str(work.folder)!r}: input and output have to be in folders that all nodes share")
    if work.options.resample:  # the same bits everywhere, and processes do not compete for cores
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
    path = work.blocks(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as blocks:
        reader = _Reader(work, job, blocks)
        for unit in units:
            for record in read_unit(unit, work.options):
                reader.read(record)
        about = {name: getattr(reader, name) for name in ("files", "rejected", "counts")}
        about |= {"sources": list(reader.sources), "blocks": blocks.tell()}
    rows, signatures = np.array(reader.rows, ROW), np.array(reader.signatures, "<u4").reshape(-1, PERMUTATIONS)
    with whole_file(path.with_suffix(".npz")) as file:
        np.savez(file, rows=rows, signatures=signatures, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    if work.options.resample:
        torch.set_num_threads(threads)


class _Reader:
    """Reads the records of a job. counts: by `<what>:<name>`, as `Summary` has them."""

    def __init__(self, work: Work, job: int, blocks: Any) -> None:
        self.work, self.job, self.options, self.blocks = work, job, work.options, blocks
        self.evaluation = EvaluationTexts(work.folder / "evaluation") if self.options.decontaminate else None
        self.rows, self.signatures, self.files = list[tuple[Any, ...]](), list[np.ndarray](), list[str]()
        self.rejected, self.sources, self.counts = list[tuple[str, ...]](), dict[str, int](), Counter[str]()

    def read(self, record: Record) -> None:
        source, sample = self.work.source, record.content if isinstance(record.content, Mapping) else {}
        self.counts.update([f"read:{record.layout}"] * bool(record.layout))
        try:
            document = self._complete(self._document(record, sample), record)
            source = slug(str(document.meta.get("pile_set_name", ""))) or source
            pieces = cut_long_sounds(document, self.options, sample)
        except BadSample as error:
            return self._reject(record, error, source, "rejected" if record.layout else "unread")
        self.counts["pieces:"] += len(pieces) - 1
        for piece in pieces:
            try:
                self._write(record, source, self._draw(document), apply_steps(piece, self.options, self.evaluation))
            except BadSample as error:
                self._reject(record, error, source)

    def _document(self, record: Record, sample: Mapping[str, Any]) -> Document:
        """Return the document of a record, and count its fields."""
        try:
            reading = read_record(record, self.options, self.work.maps)
        except BadSample:
            self.counts.update(f"lost:{name}" for name in sample)
            raise
        if lost := sample.keys() - {"json", *reading.used, *reading.unused}:
            raise AssertionError(f"{record.where}: {sorted(lost)} are neither used nor unused")
        meta = sample.get("meta")  # may name the source: `pile_set_name`
        items = meta.items() if isinstance(meta, Mapping) else ()
        meta = {name: value for name, value in items if isinstance(value, str | int | float)}
        self.counts.update(f"{'used' if name == 'meta' and meta else 'unused'}:{name}" for name in reading.unused)
        self.counts.update(f"used:{name}" for name in reading.used)
        self.counts.update({f"dropped:{name}": count for name, count in reading.dropped.items()})
        return replace(reading.document, meta={**meta, **reading.document.meta})

    def _complete(self, document: Document, record: Record) -> Document:
        """Add the label that a folder gives, and the name of the file."""
        options, meta, segments, ordered = self.options, dict(document.meta), document.segments, document.ordered
        name, _, row = record.where.partition(":")  # the row of a table, or the name of a member of an archive
        folder = os.path.basename(os.path.dirname(row if "/" in row else name))
        if options.label_from_folder and folder:
            meta["label"], ordered = folder, ordered or options.learn_label
            segments = tuple(replace(segment, loss=segment.loss and not options.label_loss_only) for segment in segments)
            segments += (Segment(folder),) * options.learn_label
        if (options.label or options.label_from_folder) and "label" not in meta:
            raise BadSample("no_label", f"there is no {options.label or 'folder below the input to take the label from'}")
        return replace(document, segments=segments, ordered=ordered, meta={"file": record.where} | meta)

    def _draw(self, document: Document) -> int:
        """Hash to 64 bits, which decide the split: the group, else the media, else the texts without the label."""
        group, segments = document.meta.get("group"), document.segments
        media = [segment for segment in segments if segment.modality != TEXT]
        texts = [segment for segment in segments if segment.data != document.meta.get("label")]
        return _hash(media or texts or segments if group is None else [Segment(str(group))], self.options.seed)[0]

    def _write(self, record: Record, source: str, draw: int, document: Document) -> None:
        block = sample_block(replace(document, key=f"{self.job:07d}-{len(self.files):06d}"))
        label, segments = document.meta.get("label"), document.segments
        texts = [segment.text for segment in segments if segment.modality == TEXT]
        images = sum(segment.modality == IMAGE for segment in segments)
        sounds = [audio_size(segment.file) for segment in segments if segment.modality > IMAGE]
        sizes = sum(len(text.encode()) for text in texts), images, sum(samples / rate for samples, rate in sounds)
        split = named_split(str(document.meta.get("split", ""))) or record.split
        given = SPLITS.index(split) + 1 if split and self.options.given_splits else 0
        digest = _hash([*segments, Segment(str(label))], self.options.seed)
        number = self.sources.setdefault(source, len(self.sources))
        self.rows.append((self.blocks.tell(), self.blocks.write(block), number, given, *sizes, digest, draw))
        self.files.append(record.where)
        self.counts.update([] if label is None else [f"label:{label}"])
        self.counts.update(f"entity:{name}" for *_, name in document.meta.get("spans", ()))
        if self.options.near_duplicates is not None:  # zeros with media, whose captions may well be alike
            is_text = len(texts) == len(segments)
            self.signatures.append(minhash("\n".join(texts)) if is_text else np.zeros(PERMUTATIONS, np.uint32))

    def _reject(self, record: Record, error: BadSample, source: str, what: str = "rejected") -> None:
        self.counts[f"{what}:{error.reason}"] += 1
        sample, excerpt = record.content, describe(record.content) if isinstance(record.content, Document) else ""
        if isinstance(sample, Mapping):
            short = {name: value[:80] if isinstance(value, str | bytes) else value for name, value in sample.items()}
            excerpt = ", ".join(f"{name}: {value!s:.80}" for name, value in short.items())[:300]
        self.rejected.append((source, record.where, error.reason, error.detail, excerpt))


def sample_block(document: Document) -> bytes:
    """Return the tar members of a document with a key. Raises BadSample: `invalid_utf8`, `file_too_large`."""
    try:
        sample = sample_from_document(document)
    except UnicodeEncodeError as error:
        raise BadSample("invalid_utf8", str(error)) from error
    block = bytearray()
    for name in sorted(sample.keys() - {"__key__"}):
        data, member = bytes(sample[name]), tarfile.TarInfo(f"{document.key}.{name}")  # type: ignore[arg-type]
        member.size, member.mode = len(data), 0o444
        block += member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
    if len(block) > MAX_SAMPLE_BYTES:
        raise BadSample("file_too_large", f"the sample has {len(block):,} bytes; at most {MAX_SAMPLE_BYTES:,} are read")
    return bytes(block)


def _hash(segments: Iterable[Segment], seed: int) -> tuple[int, int]:
    """Hash the contents of segments to two times 64 bits."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for segment in segments:
        for data in segment.choices or (segment.data,):
            raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
            digest.update(f":{segment.modality}:{len(raw)}:".encode() + raw)
    return struct.unpack(">QQ", digest.digest())


def slug(name: str) -> str:
    """Make a file name of at most 128 bytes from any name: file systems allow 255, including suffixes."""
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:64].encode()[:128].decode(errors="ignore")
