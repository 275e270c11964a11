"""What one unit of the input becomes on the way to shards, and how shards are put together from it.

    unit ──► make_spill ──► spill/0000/0000012.blocks       samples as they will stand in a shard, one after another
                            spill/0000/0000012.safetensors  a row a document; what was rejected
    plan ──► write_shard ──► result/<source>-train-000000.tar and its index

Both are functions of files in a `Workplace`, and write files that appear when they are whole: any process on any machine that
sees the folder may run them, in any order and again, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.data.index import MAX_SAMPLE_BYTES, build_index, load_index, map_arrays, save_arrays
from pile_app.data.tar import BLOCK, ShardError, files_of_block
from pile_app.documents import IMAGE, TEXT, BadSample, Document, Segment, sample_from_document
from pile_app.fields import document_from_sample
from pile_app.media import audio_size
from pile_app.prepare.files import whole_file
from pile_app.prepare.filters import apply_steps
from pile_app.prepare.labels import choose_split
from pile_app.prepare.listing import Item, split_of
from pile_app.prepare.ngrams import PERMUTATIONS, EvaluationTexts, minhash
from pile_app.prepare.options import Options
from pile_app.prepare.readers import Found, read_item

KEPT = 20  # rejected samples of each reason that are kept for review
KEPT_BYTES = 1 << 20  # of a file
KEPT_CHARACTERS = 1 << 16
ROW = np.dtype(  # of a document: byte range in the blocks, number of its source in `Table.sources`, split, sizes, content
    [
        ("offset", "<u8"), ("size", "<u8"), ("source", "<u4"), ("split", "|u1"),
        ("text_bytes", "<u8"), ("images", "<u4"), ("audio_seconds", "<f8"), ("digest", "<u8", 2),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Workplace:
    """The folder of a preparation that is under way.

    root: of the input; source: name of documents that name none; options: what the shards will hold; splits: that the names of
    the files give.
    """

    folder: Path
    root: str
    source: str
    options: Options
    splits: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str) -> Workplace:
        state = json.loads((Path(folder) / "state.json").read_bytes())
        return cls(Path(folder), state["root"], state["source"], Options.of(state["options"]), tuple(state["splits"]))

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def evaluation(self) -> str:
        return str(self.folder / "evaluation.safetensors")

    def blocks(self, unit: int) -> str:
        return str(self.folder / "spill" / f"{unit // 1000:04d}" / f"{unit:07d}.blocks")

    def table(self, unit: int) -> str:
        return self.blocks(unit).removesuffix("blocks") + "safetensors"

    def plan(self, shard: str) -> Path:
        return self.folder / "plans" / f"{shard}.npy"

    def write_units(self, items: Iterable[Item], unit_bytes: int) -> int:
        """Groups items to units of about `unit_bytes`, a line of `units.jsonl` each; their number."""
        places: list[int] = []
        with open(self.folder / "units.jsonl", "wb") as file:
            for unit in _grouped(items, unit_bytes):
                places.append(file.tell())
                file.write(json.dumps(unit).encode() + b"\n")
        np.save(self.folder / "units.npy", np.array(places, np.uint64))
        return len(places)

    def items(self, unit: int) -> list[Item]:
        """What a unit consists of."""
        places = np.load(self.folder / "units.npy", mmap_mode="r")
        with open(self.folder / "units.jsonl", "rb") as file:
            file.seek(int(places[unit]))
            return [Item(*item) for item in json.loads(file.readline())]


def _grouped(items: Iterable[Item], most_bytes: int, most_items: int = 1024) -> Iterator[list[Item]]:
    unit: list[Item] = []
    weight = 0
    for item in items:
        unit.append(item)
        weight += item.weight
        if weight >= most_bytes or len(unit) == most_items:
            yield unit
            unit, weight = [], 0
    if unit:
        yield unit


@dataclass(frozen=True)
class Table:
    """The documents of a unit, N rows, and what was rejected.

    rows: (N,) `ROW`; signatures: (N, 128) uint32, or (0, 128) where none were asked for, zeros where there is none; files:
    names; rejected: [row it came before, source, file, reason, detail, offset, size]; layouts: documents, and what was
    rejected, by what they were read as; labels: number of the class of each; blocks: bytes of the blocks.
    """

    rows: np.ndarray
    signatures: np.ndarray
    sources: list[str]
    files: list[str]
    rejected: list[list[Any]]
    layouts: dict[str, int]
    labels: dict[str, int]
    blocks: int

    TYPES = {"rows": "|u1", "signatures": "<u4"}  # noqa: RUF012 (a table, never changed)

    def save(self, path: str) -> None:
        texts = {name: getattr(self, name) for name in ("sources", "files", "rejected", "layouts", "labels", "blocks")}
        arrays = {"rows": self.rows.view(np.uint8), "signatures": self.signatures.reshape(-1)}
        save_arrays(path, arrays, {name: json.dumps(value) for name, value in texts.items()})

    @classmethod
    def load(cls, path: str) -> Table:
        arrays, header = map_arrays(path, cls.TYPES)
        texts = {name: json.loads(value) for name, value in header.items()}
        return cls(arrays["rows"].view(ROW), arrays["signatures"].reshape(-1, PERMUTATIONS), **texts)

    @classmethod
    def digests(cls, path: str) -> np.ndarray:
        """(N, 2) uint64: of the contents of the documents, without reading the rest."""
        return map_arrays(path, cls.TYPES)[0]["rows"].view(ROW)["digest"]


def is_spilled(work: Workplace, unit: int) -> bool:
    """Whether a unit is done: both of its files are there and whole."""
    try:
        _, header = map_arrays(work.table(unit), Table.TYPES)
        return os.path.getsize(work.blocks(unit)) == int(header["blocks"])
    except (OSError, ValueError, KeyError):
        return False


def make_spill(folder: str, unit: int) -> None:
    """Reads, mends and judges what a unit holds, and writes its blocks and table."""
    work = Workplace.load(folder)
    options = work.options
    evaluation = EvaluationTexts(work.evaluation, options.ngram) if options.decontaminate else None
    rows: list[tuple[Any, ...]] = []
    signatures: list[np.ndarray] = []
    sources: dict[str, int] = {}
    files: list[str] = []
    rejected: list[list[Any]] = []
    reasons: Counter[str] = Counter()
    layouts: Counter[str] = Counter()
    labels: dict[str, int] = {}
    place = 0
    os.makedirs(os.path.dirname(work.blocks(unit)), exist_ok=True)
    with whole_file(work.blocks(unit)) as blocks:
        for item, found in ((one, found) for one in work.items(unit) for found in read_item(work.root, one, options)):
            layouts[found.layout] += 1
            source = work.source
            try:
                if isinstance(found.content, BadSample):
                    raise found.content
                document, meta = found.content, dict(found.content.meta)
                source = slug(str(meta.get("pile_set_name", ""))) or source
                document = replace(document, key=f"{unit:07d}-{len(files):06d}", meta={"file": found.file} | meta)
                document = apply_steps(document, options, evaluation)
                block = sample_block(document)
            except BadSample as error:
                block = (_review(found) if reasons[error.reason] < KEPT else None) or b""
                reasons[error.reason] += 1
                detail = re.sub(r"<_io\.BytesIO object at \w+>", "the file", error.detail)  # the address differs in every run
                rejected.append([len(files), source, found.file, error.reason, detail, place, blocks.write(block)])
            else:
                number = sources.setdefault(source, len(sources))
                split, *about = _describe(document, work, split_of(item), bool(found.label))
                rows.append((place, blocks.write(block), number, split, *about))
                files.append(found.file)
                if found.label:
                    labels[document.segments[-1].text] = found.class_number
                if options.near_duplicates is not None:
                    signatures.append(_signature(document))
            place += len(block)
    hashes = np.array(signatures, "<u4").reshape(-1, PERMUTATIONS)
    Table(np.array(rows, ROW), hashes, list(sources), files, rejected, dict(layouts), labels, place).save(work.table(unit))


def write_shard(folder: str, shard: str) -> None:
    """Copies the samples of a plan, (K, 3) of unit, offset and size in its blocks, to a shard, and indexes it."""
    work = Workplace.load(folder)
    path = str(work.result / f"{shard}.tar")
    with suppress(ShardError, OSError):
        load_index(path)
        return
    with whole_file(path) as tar:
        for unit, samples in groupby(np.load(work.plan(shard)).tolist(), itemgetter(0)):
            with open(work.blocks(unit), "rb") as blocks:
                for _, offset, size in samples:
                    blocks.seek(offset)
                    tar.write(blocks.read(size))
        end = tar.tell() + 2 * BLOCK
        tar.write(bytes(2 * BLOCK + -end % tarfile.RECORDSIZE))
    index = build_index(path)
    if index.rejected:
        raise RuntimeError(f"{path!r}: what was prepared cannot be read back: {index.rejected[:3]}")


# -- documents as blocks


def sample_block(document: Document) -> bytes:
    """The members of a tar that hold a document, whose key is set.

    Raises:
        BadSample: `invalid_utf8`, or it is too large to be a sample.
    """
    try:
        sample = sample_from_document(document)
    except UnicodeEncodeError as error:
        raise BadSample("invalid_utf8", str(error)) from error
    del sample["__key__"]
    block = b"".join(tar_member(f"{document.key}.{name}".encode(), sample[name]) for name in sorted(sample))  # type: ignore[arg-type]
    if len(block) > MAX_SAMPLE_BYTES:
        raise BadSample("file_too_large", f"the sample has {len(block):,} bytes; at most {MAX_SAMPLE_BYTES:,} are read")
    return block


def tar_member(name: bytes, data: bytes) -> bytes:
    """A file of a tar, as `webdataset.TarWriter` writes it with mtime 0; `tarfile` takes ten times as long."""
    before, after, total = _template()
    size = b"%011o" % len(data)
    total += sum(name) + sum(size)
    header = b"".join((name, bytes(100 - len(name)), before, size, b"\0%011o\0%06o\0 " % (0, total), after))
    return b"".join((header, data, bytes(-len(data) % BLOCK)))


@lru_cache(1)
def _template() -> tuple[bytes, bytes, int]:
    """(header from mode to size, header after the checksum, sum of a header without name, size and checksum)."""
    member = tarfile.TarInfo()
    member.mode, member.uname, member.gname, member.mtime = 0o444, "bigdata", "bigdata", 0
    header = member.tobuf(tarfile.USTAR_FORMAT)
    total = sum(header[:124]) + sum(header[135:148]) + 8 * ord(" ") + sum(header[156:])
    return header[100:124], header[156:], total


def document_of_block(block: bytes) -> Document:
    return document_from_sample("", files_of_block(block))


def _describe(document: Document, work: Workplace, given: str | None, is_labelled: bool) -> tuple[Any, ...]:
    """The columns of `ROW` after `source`."""
    options = work.options
    media = [segment for segment in document.segments if segment.modality != TEXT]
    digest = _digest(document.segments, options.seed)
    # By the media where there are any: five captions of one image are five documents on one side. And so are two labels.
    drawn = _digest(media or document.segments[:-1], options.seed) if media or is_labelled else digest
    draw = int.from_bytes(drawn[:8], "big") / 2**64
    text_bytes = sum(len(segment.text.encode()) for segment in document.segments if segment.modality == TEXT)
    sounds = [audio_size(segment.file) for segment in media if segment.modality != IMAGE]
    seconds = sum(samples / rate for samples, rate in sounds)
    split = choose_split(given, work.splits, draw, options.validation_share)
    return split, text_bytes, len(media) - len(sounds), seconds, tuple(np.frombuffer(digest, "<u8").tolist())


def _signature(document: Document) -> np.ndarray:
    """Of the texts; zeros where there are media, whose captions may well be alike."""
    if any(segment.modality != TEXT for segment in document.segments):
        return np.zeros(PERMUTATIONS, np.uint32)
    return minhash("\n".join(segment.text for segment in document.segments))


def _digest(segments: Iterable[Segment], seed: int) -> bytes:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for segment in segments:
        data = segment.data.encode() if isinstance(segment.data, str) else segment.data
        digest.update(f":{segment.modality}:{len(data)}:".encode() + data)
    return digest.digest()


def _review(found: Found) -> bytes | None:
    """What was rejected as a sample for people to look at; None where there is nothing to see."""
    if isinstance(found.content, Document):
        segments = tuple(map(_review_segment, found.content.segments))
    else:
        segments = (Segment(found.raw[:KEPT_CHARACTERS].decode(errors="replace")),)
    return sample_block(Document(segments, "rejected")) if any(segment.data for segment in segments) else None


def _review_segment(segment: Segment) -> Segment:
    if isinstance(segment.data, str):
        return replace(segment, data=segment.data[:KEPT_CHARACTERS].encode(errors="replace").decode())
    if len(segment.data) > KEPT_BYTES:
        return Segment(f"<{segment.extension}, {len(segment.data):,} bytes>")
    return segment


@lru_cache(1024)
def slug(name: str) -> str:
    """A name for files, from any; of 128 bytes at most, as file systems have 255 for shard, index and what is being written."""
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:64].encode()[:128].decode(errors="ignore")
