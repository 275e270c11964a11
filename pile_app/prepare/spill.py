"""The parallel parts of `pile prepare`: units of the input become blocks and a table, and shards are copied from blocks.

    job  ──► read_job ──► spill/0000/0000012.blocks       documents as they are written to a shard, one after another
                          spill/0000/0000012.safetensors  a row per document; what was rejected; counts
    plan ──► write_shard ──► result/<source>-train-000000.tar

Both are functions of files in a `Work` folder and write files that appear when complete: any process on any machine that sees
the folder may run them, in any order and repeatedly, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from pile_app.data.index import MAX_SAMPLE_BYTES, build_index
from pile_app.data.tar import BLOCK, files_of_block
from pile_app.documents import IMAGE, TEXT, BadSample, Document, Segment, describe, sample_from_document
from pile_app.fields import Field, Fields, Sample, document_from_sample
from pile_app.media import audio_size
from pile_app.prepare.files import whole_file
from pile_app.prepare.filters import apply_steps, cut_long_sounds, transcript_parts
from pile_app.prepare.ngrams import PERMUTATIONS, EvaluationTexts, minhash
from pile_app.prepare.options import Options
from pile_app.prepare.readers import Record, Unit, medium, named_split, read_unit

SPLITS = ("train", "validation", "test")
ROW = np.dtype(  # of a document: byte range in the blocks; source; given split + 1, or 0; sizes; hashes of content and for the split
    [
        ("offset", "<u8"), ("size", "<u8"), ("source", "<u4"), ("split", "|u1"), ("text_bytes", "<u8"), ("images", "<u4"),
        ("audio_seconds", "<f8"), ("digest", "<u8", 2), ("draw", "<u8"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The folder of a preparation in progress. root: of the input; source: name of documents that name none; maps: the field map
    of each table (`table_of`), or why there is none."""

    folder: Path
    root: str
    source: str
    options: Options
    maps: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str) -> Work:
        state = json.loads((Path(folder) / "state.json").read_bytes())
        return cls(Path(folder), state["root"], state["source"], Options.of(state["options"]), state["fields"])

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def blocks(self, job: int) -> Path:
        return self.folder / "spill" / f"{job // 1000:04d}" / f"{job:07d}.blocks"

    def units(self, job: int) -> list[Unit]:
        start = int(np.load(self.folder / "jobs.npy", mmap_mode="r")[job])
        with open(self.folder / "jobs.jsonl", "rb") as file:
            file.seek(start)
            return [Unit(*unit) for unit in json.loads(file.readline())]

    @cached_property
    def _fields(self) -> dict[str, Fields]:
        return {}

    def fields(self, record: Record) -> Fields:
        """The field map of a record. Raises BadSample (`no_fields`) if none could be inferred."""
        table = table_of(record)
        if table not in self._fields:
            spec = self.options.fields or self.maps.get(table)
            try:
                found = Fields.parse(spec) if spec else Fields.infer([record.content])  # of a table that was not sampled
            except BadSample:
                raise
            except ValueError as error:
                raise BadSample("no_fields", str(error)) from error
            self._fields[table] = with_label(found, self.options)
        return self._fields[table]


def table_of(record: Record) -> str:
    """Name the records that share a field map: those of a table, whatever the digits in its name, else of a folder."""
    name, is_row, _ = record.where.partition(":")
    return f"{record.layout} {re.sub(r'[0-9]+', '', name) if is_row else os.path.join(os.path.dirname(name), '')}"


def with_label(fields: Fields, options: Options) -> Fields:
    """Apply the options about labels to a field map."""
    entries = list(fields.entries)
    if name := options.label:
        names = tuple(dict.fromkeys((name, f"json.{name.removeprefix('json.')}")))
        entries = [one for one in entries if one.role != "label" and not set(one.names) & set(names)] + [Field(names, "label")]
    learn, given = options.learn_label, options.label_loss_only
    entries = [replace(one, learn=one.learn or learn) if one.role == "label" else replace(one, loss=one.loss and not given)
               for one in entries]  # fmt: skip
    return replace(fields, entries=tuple(entries), shuffle=fields.shuffle and not learn)


@dataclass
class Table:
    """What was read in a job. rows: (N,) `ROW`; signatures: (N, 128) uint32, or (0, 128); files: of the rows; rejected: [row it
    came before, source, file, reason, detail, excerpt]; counts: samples read by layout, `unread` files by reason, `fields`
    [used, unused, of rejected samples] by name, parts `dropped`, `labels`, `pieces` added by cutting; blocks: bytes."""

    rows: np.ndarray
    signatures: np.ndarray
    sources: list[str]
    files: list[str]
    rejected: list[list[Any]]
    counts: dict[str, Any]
    blocks: int

    def save(self, path: Path) -> None:
        header = {name: json.dumps(value) for name, value in vars(self).items() if name not in ("rows", "signatures")}
        with whole_file(path) as file:
            file.write(save({"rows": self.rows.view(np.uint8), "signatures": self.signatures}, header))

    @classmethod
    def load(cls, blocks: Path) -> Table:
        """Load the table of a job's blocks. Raises `OSError`, or what safetensors raises, if it is not there or not complete."""
        with safe_open(blocks.with_suffix(".safetensors"), "numpy") as file:
            header = {name: json.loads(value) for name, value in file.metadata().items()}
            return cls(file.get_tensor("rows").view(ROW), file.get_tensor("signatures"), **header)


def load_rows(blocks: Path) -> tuple[np.ndarray, list[str]]:
    """The rows of a table and the names of its sources, without the rest."""
    with safe_open(blocks.with_suffix(".safetensors"), "numpy") as file:
        return file.get_tensor("rows").view(ROW), json.loads(file.metadata()["sources"])


def is_read(work: Work, job: int) -> bool:
    """Whether a job is done: both of its files are there and complete."""
    try:
        return os.path.getsize(work.blocks(job)) == Table.load(work.blocks(job)).blocks
    except Exception:  # of safetensors
        return False


def read_job(folder: str, job: int) -> None:
    """Read, check and change the units of a job, and write its blocks and table."""
    work = Work.load(folder)
    with single_thread(work.options.resample is not None):
        _Reader(work, job).run()


class _Reader:
    def __init__(self, work: Work, job: int) -> None:
        self.work, self.job, self.options = work, job, work.options
        self.evaluation = EvaluationTexts(work.folder / "evaluation") if work.options.decontaminate else None
        self.rows: list[tuple[Any, ...]] = []
        self.signatures: list[np.ndarray] = []
        self.sources: dict[str, int] = {}
        self.files: list[str] = []
        self.rejected: list[list[Any]] = []
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in ("read", "unread", "dropped", "labels", "pieces")}
        self.fields: dict[str, list[int]] = {}

    def run(self) -> None:
        path = self.work.blocks(self.job)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as self.blocks:
            for unit in self.work.units(self.job):
                for record in read_unit(self.work.root, unit, self.options):
                    self._read(record)
            size = self.blocks.tell()
        counts = self.counts | {"fields": self.fields}
        read, cut = self.counts["read"].total(), self.counts["pieces"].total()
        if read + cut + self.counts["unread"].total() != len(self.rows) + len(self.rejected):
            raise AssertionError(f"job {self.job}: {read} samples became {len(self.rows)} documents, {len(self.rejected)} rejected")
        signatures = np.array(self.signatures, "<u4").reshape(-1, PERMUTATIONS)
        rows = np.array(self.rows, ROW)
        Table(rows, signatures, list(self.sources), self.files, self.rejected, counts, size).save(path.with_suffix(".safetensors"))

    def _read(self, record: Record) -> None:
        if isinstance(record.content, BadSample) and not record.layout:  # a file that is not read
            self.counts["unread"][record.content.reason] += 1
            return self._reject(record, record.content)
        self.counts["read"][record.layout] += 1
        source = self.work.source
        try:
            document, parts = self._document(record)
            source = slug(str(document.meta.get("pile_set_name", ""))) or source
            draw, split = self._draw(document), named_split(str(document.meta.get("split", ""))) or record.split
            pieces = cut_long_sounds(document, self.options, parts)
        except BadSample as error:
            return self._reject(record, error, source)
        self.counts["pieces"]["pieces"] += len(pieces) - 1
        for piece in pieces:
            try:
                self._write(record, source, split, draw, piece)
            except BadSample as error:
                self._reject(record, error, source, piece)

    def _document(self, record: Record) -> tuple[Document, list[Any]]:
        """The document of a record, and the timed parts of its transcript."""
        sample, parts = record.content, []
        if isinstance(sample, BadSample):
            raise sample
        if isinstance(sample, Document):
            document = sample
        else:
            try:
                reading = self.work.fields(record).read(record.where, sample, partial(medium, self.work.root, record.where))
            except BadSample:
                self._count_fields(sample, 2)
                raise
            parts, meta = transcript_parts(sample), _meta(sample)
            self._count_fields(reading.used, 0)
            self._count_fields((name for name in reading.unused if name != "meta" or not meta), 1)
            self._count_fields((name for name in reading.unused if name == "meta" and meta), 0)
            if lost := {name for name in sample if name != "json"} - {*reading.used, *reading.unused}:
                raise AssertionError(f"{record.where}: {sorted(lost)} are neither used nor unused")
            self.counts["dropped"].update(reading.dropped)
            document = replace(reading.document, meta={**meta, **reading.document.meta})
        return self._labelled(document, record), parts

    def _count_fields(self, names: Iterable[str], column: int) -> None:
        for name in names:
            self.fields.setdefault(name, [0, 0, 0])[column] += 1

    def _labelled(self, document: Document, record: Record) -> Document:
        options, meta, segments = self.options, dict(document.meta), document.segments
        name, _, row = record.where.partition(":")  # the row of a table, or the name of a member of an archive
        folder = os.path.basename(os.path.dirname(row if "/" in row else name))
        if options.label_from_folder:
            if not folder:
                raise BadSample("no_label", "the file is in no folder below the input, whose name would be the label")
            meta["label"] = folder
            segments = tuple(replace(one, loss=one.loss and not options.label_loss_only) for one in segments)
            segments += (Segment(folder),) * options.learn_label
        if options.label and "label" not in meta:
            raise BadSample("no_label", f"there is no {options.label!r}")
        if options.caption_from_folder and folder and all(segment.modality != TEXT for segment in segments):
            segments += (Segment(folder),)
        ordered = document.ordered or (options.label_from_folder and options.learn_label)
        return replace(document, segments=segments, meta={"file": record.where} | meta, ordered=ordered)

    def _draw(self, document: Document) -> int:
        """64 bits that decide the split: of the group, else of the media, else of the texts without the label."""
        group, label = document.meta.get("group"), document.meta.get("label")
        media = [segment for segment in document.segments if segment.modality != TEXT]
        texts = [segment for segment in document.segments if segment.data != label] or document.segments
        return int.from_bytes(_digest([Segment(str(group))] if group is not None else media or texts, self.options.seed)[:8], "big")

    def _write(self, record: Record, source: str, split: str | None, draw: int, document: Document) -> None:
        document = apply_steps(document, self.options, self.evaluation)
        block = sample_block(replace(document, key=f"{self.job:07d}-{len(self.files):06d}"))
        label = document.meta.get("label")
        digest = np.frombuffer(_digest([*document.segments, Segment(str(label))], self.options.seed), "<u8").tolist()
        texts = [segment.text for segment in document.segments if segment.modality == TEXT]
        images = sum(segment.modality == IMAGE for segment in document.segments)
        sizes = [audio_size(segment.file) for segment in document.segments if segment.modality > IMAGE]
        seconds = sum(samples / rate for samples, rate in sizes)
        given = SPLITS.index(split) + 1 if split and self.options.given_splits else 0
        number = self.sources.setdefault(source, len(self.sources))
        text_bytes = sum(len(text.encode()) for text in texts)
        if self.options.near_duplicates is not None:  # captions of different media may well be alike: zeros
            is_text = len(texts) == len(document.segments)
            self.signatures.append(minhash("\n".join(texts)) if is_text else np.zeros(PERMUTATIONS, np.uint32))
        if label is not None:
            self.counts["labels"][str(label)] += 1
        self.rows.append((self.blocks.tell(), len(block), number, given, text_bytes, images, seconds, tuple(digest), draw))
        self.files.append(record.where)
        self.blocks.write(block)

    def _reject(self, record: Record, error: BadSample, source: str = "", document: Document | None = None) -> None:
        detail = re.sub(r"<_io\.BytesIO object at \w+>", "the file", error.detail)  # the address differs in every run
        shown = document or record.content
        excerpt = describe(shown) if isinstance(shown, Document) else "" if isinstance(shown, BadSample) else excerpt_of(shown)
        self.rejected.append([len(self.files), source or self.work.source, record.where, error.reason, detail, excerpt])


def write_shard(folder: str, shard: str) -> None:
    """Copy the documents of a plan, (K, 3) of job, offset and size in its blocks, to a shard."""
    work = Work.load(folder)
    names = json.loads((work.folder / "labels.json").read_bytes())
    if (path := work.result / f"{shard}.tar").exists():
        return
    with whole_file(path) as tar:
        for job, offset, size in np.load(work.folder / "plans" / f"{shard}.npy").tolist():
            with open(work.blocks(job), "rb") as blocks:
                block = os.pread(blocks.fileno(), size, offset)
            tar.write(_renamed(block, names, work.options) if names else block)
        tar.write(bytes(2 * BLOCK + -(tar.tell() + 2 * BLOCK) % tarfile.RECORDSIZE))


def write_manifest(folder: str, prefix: str) -> None:
    """Index the shards of a source and split, and check that they can be read back."""
    for path in sorted((Work.load(folder).result).glob(f"{prefix}-*.tar")):
        if rejected := build_index(str(path)).rejected:
            raise AssertionError(f"{path.name}: documents that were written cannot be read back: {rejected[:3]}")


def _renamed(block: bytes, names: Mapping[str, str], options: Options) -> bytes:
    """A document with the name of its label."""
    files = files_of_block(block)
    key = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "strict").name.partition(".")[0]
    document = document_from_sample(key, files)
    if (label := document.meta.get("label")) not in names:
        return block
    *others, last = document.segments
    if options.learn_label and last.data == label:
        others, last = others, replace(last, data=names[label])
    return sample_block(replace(document, segments=(*others, last), meta={**document.meta, "label": names[label]}))


def sample_block(document: Document) -> bytes:
    """The members of a tar that hold a document, whose key is set. Raises BadSample: `invalid_utf8`, `file_too_large`."""
    try:
        sample = sample_from_document(document)
    except UnicodeEncodeError as error:
        raise BadSample("invalid_utf8", str(error)) from error
    block = bytearray()
    for name in sorted(sample.keys() - {"__key__"}):
        data = sample[name]
        assert isinstance(data, bytes)
        member = tarfile.TarInfo(f"{document.key}.{name}")
        member.size, member.mode = len(data), 0o444
        block += member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
    if len(block) > MAX_SAMPLE_BYTES:
        raise BadSample("file_too_large", f"the sample has {len(block):,} bytes; at most {MAX_SAMPLE_BYTES:,} are read")
    return bytes(block)


def _digest(segments: Iterable[Segment], seed: int) -> bytes:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for segment in segments:
        for data in segment.choices or (segment.data,):
            raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
            digest.update(f":{segment.modality}:{len(raw)}:".encode() + raw)
    return digest.digest()


def _meta(sample: Sample) -> dict[str, Any]:
    """The plain values of a sample's `meta`, which may name its source (`pile_set_name`)."""
    meta = sample.get("meta")
    kept = (str, int, float, bool)
    return {name: value for name, value in meta.items() if isinstance(value, kept)} if isinstance(meta, Mapping) else {}


def excerpt_of(sample: Sample, limit: int = 300) -> str:
    """A sample for people: names and shortened values."""
    return ", ".join(f"{name}: {value[:80] if isinstance(value, str | bytes) else value!s:.80}" for name, value in sample.items())[:limit]


@contextmanager
def single_thread(needed: bool) -> Iterator[None]:
    """Let PyTorch compute with one thread: the same bits everywhere, and processes do not compete for cores."""
    if not needed:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def slug(name: str) -> str:
    """Make a file name of at most 128 bytes from any name: file systems allow 255, of which suffixes need some."""
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:64].encode()[:128].decode(errors="ignore")
