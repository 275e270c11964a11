"""What one unit of the input becomes on the way to shards, and how shards are put together from it.

    unit ──► make_spill ──► spill/0000/0000012.blocks       samples as they will stand in a shard, one after another
                            spill/0000/0000012.safetensors  a row a document; what was rejected
    plan ──► write_shard ──► result/<source>-train-000000.tar and its index: ranges of blocks, copied

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
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.data.filters import PERMUTATIONS, EvaluationTexts, apply_steps, minhash
from pile_app.data.readers import Found, Item, Options, read_item
from pile_app.data.shards import (
    BLOCK,
    MAX_SAMPLE_BYTES,
    ShardError,
    build_index,
    files_of_block,
    load_index,
    map_arrays,
    save_arrays,
)
from pile_app.documents import IMAGE, TEXT, BadSample, Document, Segment, audio_size, document_from_sample, sample_from_document

KEPT = 20  # rejected samples of each reason that are kept for review
KEPT_BYTES = 1 << 20  # of a file
KEPT_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Workplace:
    """The folder of a preparation that is under way.

    root: of the input; source: name of documents that name none; options: what the shards will hold.
    """

    folder: Path
    root: str
    source: str
    options: Options

    def save(self) -> None:
        values = {"root": self.root, "source": self.source, "options": asdict(self.options)}
        (self.folder / "workplace.json").write_text(json.dumps(values))

    @classmethod
    def load(cls, folder: str) -> Workplace:
        values = json.loads((Path(folder) / "workplace.json").read_bytes())
        return cls(Path(folder), values["root"], values["source"], Options.of(values["options"]))

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def evaluation(self) -> str:
        return str(self.folder / "evaluation.safetensors")

    def items(self, unit: int) -> list[Item]:
        """What a unit consists of."""
        places = np.load(self.folder / "units.npy", mmap_mode="r")
        with open(self.folder / "units.jsonl", "rb") as file:
            file.seek(int(places[unit]))
            return [Item(*item) for item in json.loads(file.readline())]

    def blocks(self, unit: int) -> str:
        return str(self.folder / "spill" / f"{unit // 1000:04d}" / f"{unit:07d}.blocks")

    def table(self, unit: int) -> str:
        return self.blocks(unit).removesuffix("blocks") + "safetensors"

    def plan(self, shard: str) -> Path:
        return self.folder / "plans" / f"{shard}.npy"


@dataclass(frozen=True)
class Table:
    """The documents of a unit, N rows, and what was rejected.

    offset, size: (N,) byte range in the blocks; source: (N,) number in `sources`; validation: (N,); text_bytes, images,
    audio_seconds: (N,); digest: (N, 2) uint64; signature: (N, 128) uint32, or (0, 128) where none were asked for, zeros where
    there is none; files: names; rejected: [row it came before, source, file, reason, detail, offset, size]; layouts: documents,
    and what was rejected, by what they were read as.
    """

    offset: np.ndarray
    size: np.ndarray
    source: np.ndarray
    validation: np.ndarray
    text_bytes: np.ndarray
    images: np.ndarray
    audio_seconds: np.ndarray
    digest: np.ndarray
    signature: np.ndarray
    sources: list[str]
    files: list[str]
    rejected: list[list[Any]]
    layouts: dict[str, int]

    TYPES = {  # noqa: RUF012 (a table, never changed)
        "offset": "<u8", "size": "<u8", "source": "<u2", "validation": "|b1", "text_bytes": "<u8", "images": "<u4",
        "audio_seconds": "<f8", "digest": "<u8", "signature": "<u4",
    }  # fmt: skip
    TEXTS = ("sources", "files", "rejected", "layouts")

    @classmethod
    def load(cls, path: str) -> Table:
        arrays, header = map_arrays(path, cls.TYPES)
        arrays["digest"] = arrays["digest"].reshape(-1, 2)
        arrays["signature"] = arrays["signature"].reshape(-1, PERMUTATIONS)
        fields: dict[str, Any] = arrays | {name: json.loads(header[name]) for name in cls.TEXTS}
        return cls(**fields)


def is_spilled(work: Workplace, unit: int) -> bool:
    """Whether a unit is done: both of its files are there and whole."""
    try:
        _, header = map_arrays(work.table(unit), Table.TYPES)
        return os.path.getsize(work.blocks(unit)) == int(header["bytes"])
    except (OSError, ValueError, KeyError):
        return False


def make_spill(folder: str, unit: int) -> None:
    """Reads, mends and judges what a unit holds, and writes its blocks and table."""
    work = Workplace.load(folder)
    options = work.options
    evaluation = EvaluationTexts(work.evaluation, options.ngram) if options.decontaminate else None
    columns: dict[str, list[Any]] = {name: [] for name in Table.TYPES}
    sources: dict[str, int] = {}
    files: list[str] = []
    rejected: list[list[Any]] = []
    reasons: Counter[str] = Counter()
    layouts: Counter[str] = Counter()
    os.makedirs(os.path.dirname(work.blocks(unit)), exist_ok=True)
    temporary = f"{work.blocks(unit)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb", 1 << 20) as blocks:
            place = 0
            for found in _read(work, unit):
                layouts[found.layout] += 1
                source = work.source
                try:
                    if isinstance(found.content, BadSample):
                        raise found.content
                    document = found.content
                    if "pile_set_name" in document.meta:
                        source = slug(str(document.meta["pile_set_name"])) or work.source
                    document = replace(
                        document, key=f"{unit:07d}-{len(files):06d}", meta={"file": found.file} | dict(document.meta)
                    )
                    document = apply_steps(document, options, evaluation)
                    block = sample_block(document)
                except BadSample as error:
                    offset = size = 0
                    if reasons[error.reason] < KEPT and (review := _review(found)) is not None:
                        offset, size = place, blocks.write(review)
                        place += size
                    reasons[error.reason] += 1
                    # An address differs in every run.
                    detail = re.sub(r"<_io\.BytesIO object at \w+>", "the file", error.detail)
                    rejected.append([len(files), source, found.file, error.reason, detail, offset, size])
                    continue
                blocks.write(block)
                _add_row(columns, document, options)
                columns["offset"].append(place)
                columns["size"].append(len(block))
                columns["source"].append(sources.setdefault(source, len(sources)))
                files.append(found.file)
                place += len(block)
        os.replace(temporary, work.blocks(unit))
    except BaseException:
        os.unlink(temporary)
        raise
    digest, signature = columns.pop("digest"), columns.pop("signature")
    arrays = {name: np.array(values, Table.TYPES[name]) for name, values in columns.items()}
    arrays["digest"] = np.frombuffer(b"".join(digest), "<u8")
    arrays["signature"] = np.array(signature, "<u4").reshape(-1)
    texts = {"sources": list(sources), "files": files, "rejected": rejected, "layouts": layouts}
    save_arrays(work.table(unit), arrays, {name: json.dumps(value) for name, value in texts.items()} | {"bytes": str(place)})


def write_shard(folder: str, shard: str) -> None:
    """Copies the ranges of a plan, (K, 3) of unit, offset and size, to a shard, and indexes it."""
    work = Workplace.load(folder)
    path = str(work.result / f"{shard}.tar")
    try:
        load_index(path)
        return
    except (ShardError, OSError):
        pass
    temporary = f"{path}.{os.getpid()}.tmp"
    opened, blocks = -1, -1
    try:
        with open(temporary, "wb", 1 << 20) as tar:
            for unit, offset, size in np.load(work.plan(shard)).tolist():
                if unit != opened:
                    if blocks >= 0:
                        os.close(blocks)
                    opened, blocks = unit, os.open(work.blocks(unit), os.O_RDONLY)
                for start in range(offset, offset + size, 1 << 24):
                    tar.write(os.pread(blocks, min(1 << 24, offset + size - start), start))
            end = tar.tell() + 2 * BLOCK
            tar.write(bytes(2 * BLOCK + -end % tarfile.RECORDSIZE))
        os.replace(temporary, path)
    finally:
        if blocks >= 0:
            os.close(blocks)
        if os.path.exists(temporary):
            os.unlink(temporary)
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


def _read(work: Workplace, unit: int) -> Iterator[Found]:
    for item in work.items(unit):
        yield from read_item(work.root, item, work.options)


def _add_row(columns: dict[str, list[Any]], document: Document, options: Options) -> None:
    media = [segment for segment in document.segments if segment.modality != TEXT]
    digest = _digest(document.segments, options.seed)
    # By the media where there are any: five captions of one image are five documents on one side.
    draw = int.from_bytes((_digest(media, options.seed) if media else digest)[:8], "big") / 2**64
    text_bytes = images = 0
    audio_seconds = 0.0
    for segment in document.segments:
        if segment.modality == TEXT:
            text_bytes += len(segment.text) if segment.text.isascii() else len(segment.text.encode())
        elif segment.modality == IMAGE:
            images += 1
        else:
            samples, rate = audio_size(segment.file)
            audio_seconds += samples / rate
    columns["digest"].append(digest)
    columns["validation"].append(draw < options.validation_share)
    columns["text_bytes"].append(text_bytes)
    columns["images"].append(images)
    columns["audio_seconds"].append(audio_seconds)
    if options.near_duplicates is not None:
        signature = np.zeros(PERMUTATIONS, np.uint32) if media else minhash("\n".join(s.text for s in document.segments))
        columns["signature"].append(signature)


def _digest(segments: Iterable[Segment], seed: int) -> bytes:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for segment in segments:
        data = segment.data.encode() if isinstance(segment.data, str) else segment.data
        digest.update(f":{segment.modality}:{len(data)}:".encode() + data)
    return digest.digest()


def _review(found: Found) -> bytes | None:
    """What was rejected as a sample for people to look at; None where there is nothing to see."""
    if isinstance(found.content, BadSample):
        if not found.raw:
            return None
        segments: tuple[Segment, ...] = (Segment(found.raw[:KEPT_CHARACTERS].decode(errors="replace")),)
    else:
        segments = tuple(map(_review_segment, found.content.segments))
    return sample_block(Document(segments, "rejected")) if any(segment.data for segment in segments) else None


def _review_segment(segment: Segment) -> Segment:
    if isinstance(segment.data, str):
        return replace(segment, data=segment.data[:KEPT_CHARACTERS].encode(errors="replace").decode())
    if len(segment.data) > KEPT_BYTES:
        return Segment(f"<{segment.extension}, {len(segment.data):,} bytes>")
    return segment


@lru_cache(1024)
def slug(name: str) -> str:
    """A name for files, from any."""
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:64]


def write_units(items: Iterable[Item], folder: Path, unit_bytes: int, unit_items: int = 1024) -> int:
    """Groups items to units of about `unit_bytes`, a line of `units.jsonl` each; their number."""
    places: list[int] = []
    unit: list[Item] = []
    weight = 0
    with open(folder / "units.jsonl", "wb") as file:

        def close() -> None:
            nonlocal unit, weight
            places.append(file.tell())
            file.write(json.dumps(unit).encode() + b"\n")
            unit, weight = [], 0

        for item in items:
            unit.append(item)
            weight += item.weight
            if weight >= unit_bytes or len(unit) == unit_items:
                close()
        if unit:
            close()
    np.save(folder / "units.npy", np.array(places, np.uint64))
    return len(places)
