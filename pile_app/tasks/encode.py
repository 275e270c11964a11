"""`pile encode`: shards of documents → shards of the same documents as token ids.

Frozen codecs give the same codes in every epoch; here they are computed once. Images and sounds become encoded segments
(`Codes`), texts too if the tokenizer is not bytes. A new shard holds the same documents under the same name, in the same order,
with the same keys, flags and sizes, so training plans the same packs from either; the manifests are compared. A medium that
cannot be decoded is copied; a sample that differs from the manifest leaves segments of its sizes that say so (`is_lost`).

`encoded.json` next to the new shards, written after each of them, lets an interrupted run continue:

    {"<shard>": {"source": fingerprint of the old shard, "bytes": of the new one, "encoders": {modality: fingerprint},
                 "documents", "encoded": {modality: segments}, "left": {reason: segments or samples left unchanged}}}
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.data.assembly import assemble, whole
from pile_app.data.files import ShardError, available_cores, whole_file
from pile_app.data.index import TYPES, UNORDERED, columns_of, segment_breaks, segment_size, starts, text_counts
from pile_app.data.manifest import split_path
from pile_app.data.packing import sentence_ends
from pile_app.data.shards import Shards
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import (
    AUDIO,
    ENCODED_EXTENSIONS,
    MODALITIES,
    TEXT,
    BadSample,
    Codes,
    Document,
    Segment,
    sample_from_document,
)
from pile_app.fields import OWN

if TYPE_CHECKING:
    from pile_app.model.fused import FusedLanguageModel
    from pile_app.training.module import PileModule

LEDGER = "encoded.json"
DOCUMENTS_AT_ONCE = 512
FILES = ("offset", "size", "crc", "file", "file_offset", "file_size")  # columns that encoding changes
NO_ENCODER = "0" * 32  # of a lost segment


class Encoders:
    """A tokenizer, and a model for its codecs (None: media stay as they are).

    Args:
        batch: images or sounds that are encoded at once.

    Raises:
        ValueError: nothing would be encoded.
    """

    def __init__(self, tokenizer: Tokenizer, model: FusedLanguageModel | None = None, batch: int = 64) -> None:
        from pile_app.model.fused import codec_fingerprint

        self.tokenizer, self.model, self.batch = tokenizer, model, batch
        codecs = model.codecs if model is not None else {}
        self.fingerprints = {modality: codec_fingerprint(codec) for modality, codec in codecs.items()}
        if tokenizer.fingerprint != "bytes":
            self.fingerprints[TEXT] = tokenizer.fingerprint
        if not self.fingerprints:
            raise ValueError("nothing to encode: bytes are read as fast as their ids, and there is no codec for media")

    @classmethod
    def of_run(cls, run: str, module: PileModule, step: int, batch: int = 64) -> Encoders:
        """Make them of a run's module. Raises ValueError if its codecs are still being trained at `step`."""
        if step < module.codec_steps:
            still = f"trained for {module.codec_steps} steps, and the checkpoint is of step {step}: train further"
            raise ValueError(f"the codecs of {run!r}, which still change, cannot be used: they are {still}")
        return cls(module.tokenizer, module.model, batch)


def encode_shards(shards: Shards, folder: Path, encoders: Encoders, overwrite: bool = False) -> dict[str, Any]:
    """Write `folder/<name>` for every shard, and return what `encoded.json` says of them. Segments that are encoded already are
    copied; `overwrite`: encode all shards again.

    Raises ValueError if two shards have the same name, or one would replace its source or an unrelated file; ShardError.
    """
    names = [split_path(path)[1] for path in shards.paths]
    if bad := [name for name in names if not name.endswith(".tar")]:
        raise ValueError(f"the name of shard {bad[0]!r} does not end in .tar: rename it")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two shards are called {twice[0]!r}: encode them into different folders")
    if any(os.path.realpath(path) == os.path.realpath(folder / name) for path, name in zip(shards.paths, names, strict=True)):
        raise ValueError(f"{str(folder)!r} is the folder of the shards themselves: give another one")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = dict(json.loads((folder / LEDGER).read_text()))
    except (OSError, ValueError, TypeError):  # shards that are there are not known to be ours
        done = {}

    def note(name: str, entry: dict[str, Any]) -> None:
        done[name] = entry
        with whole_file(folder / LEDGER) as file:
            file.write(json.dumps(done, indent=1, sort_keys=True).encode() + b"\n")

    by_name = {MODALITIES[modality]: fingerprint for modality, fingerprint in encoders.fingerprints.items()}
    for shard, name in enumerate(names):
        path = folder / name
        entry = {"source": shards.index(shard).about["fingerprint"], "encoders": by_name}
        if path.exists() and not overwrite:
            stored = done.get(name, {})
            if any(stored.get(key) != value for key, value in entry.items()):
                wrong = f"{str(path)!r} was not made from {shards.paths[shard]!r} by these encoders"
                raise ValueError(f"{wrong}: give --overwrite, or another folder")
            if stored.get("bytes") == path.stat().st_size:
                print(f"{path}: there already")
                continue
        note(name, entry)  # from here on, the file of that name is ours
        counts = _encode_shard(shards, shard, path, encoders)
        note(name, entry | {"bytes": path.stat().st_size, "documents": len(shards.index(shard))} | counts)
        print(f"{path}: {describe_counts([done[name]])}")
    made = Shards([str(folder / name) for name in names], fields=OWN, again="changed")
    for new, old in ((made.index(shard), shards.index(shard)) for shard in range(len(names))):
        compared = (name for name in TYPES if name not in FILES)
        if different := [name for name in compared if not np.array_equal(new.columns[name], old.columns[name])]:
            fix = f"run `pile index --overwrite {old.path}`, then this command with --overwrite"
            raise ShardError(f"the manifest of {new.path!r} is not that of {old.path!r} in {', '.join(different)}: {fix}")
    return {name: done[name] for name in names}


def describe_counts(entries: Sequence[dict[str, Any]]) -> str:
    """`300 documents; encoded: 150 image; left as they were: 2 silent_audio`"""
    told = [f"{sum(entry['documents'] for entry in entries):,} documents"]
    for key, what in (("encoded", "encoded"), ("left", "left as they were")):
        counts = sum((Counter(entry[key]) for entry in entries), Counter[str]())
        told.append(f"{what}: {', '.join(f'{count:,} {name}' for name, count in sorted(counts.items())) or 'nothing'}")
    return "; ".join(told)


def _encode_shard(shards: Shards, shard: int, path: Path, encoders: Encoders) -> dict[str, Counter[str]]:
    """Writes the shard at `path`, which appears when it is whole; what was encoded and left, for `encoded.json`."""
    import webdataset

    encoded, left = Counter[str](), Counter[str]()
    with whole_file(path, durable=True) as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for numbers in _batched(range(*shards.first_document[shard : shard + 2]), DOCUMENTS_AT_ONCE):
            documents = [_read(shards, number, encoders.tokenizer, left) for number in numbers]
            for document in _encode(documents, encoders, encoded, left):
                tar.write(_sample(document))
    return {"encoded": encoded, "left": left}


def _sample(document: Document) -> dict[str, str | bytes]:
    """The WebDataset sample of a document; that of a single encoded segment is one file, half the bytes in a tar."""
    segment, *others = document.segments
    if segment.is_encoded and segment.loss and document.ordered and not (others or document.meta):
        return {"__key__": document.key, segment.extension: segment.file}
    return sample_from_document(document)


def _read(shards: Shards, number: int, tokenizer: Tokenizer, left: Counter[str]) -> Document:
    """Read a document, or make lost segments of its sizes if its bytes are not those that were indexed."""
    shard, sample = shards.place(number)
    index = shards.index(shard)
    try:
        return replace(shards.document(number), key=index.key(sample))
    except BadSample as error:
        if tokenizer.fingerprint != "bytes" and columns_of(tokenizer)[0] not in index.columns:
            raise ShardError(f"{error}: fetch the shard again (its tokens were never counted: it is not skipped)") from error
        left[error.reason] += 1
    counts, in_tokens = text_counts(index, tokenizer)
    first_break = starts(index.break_count)
    segments = []
    for row in range(*index.first_segment[sample : sample + 2].tolist()):
        modality, size, rate = (int(column[row]) for column in (index.modality, index.segment_size, index.sample_rate))
        of_row = slice(*first_break[row : row + 2])
        breaks = np.stack([index.break_bytes[of_row], in_tokens[of_row]])
        encoder = tokenizer.fingerprint if modality == TEXT and tokenizer.fingerprint != "bytes" else NO_ENCODER
        values = np.zeros(int(counts[row]) if encoder != NO_ENCODER else 0, np.uint16)
        file = Codes(encoder, size, rate, values, breaks, is_lost=True).to_bytes()
        segments.append(Segment(file, ENCODED_EXTENSIONS[modality], bool(index.loss[row])))
    return Document(tuple(segments), index.key(sample), not index.flags[sample] & UNORDERED)


def _encode(documents: list[Document], encoders: Encoders, encoded: Counter[str], left: Counter[str]) -> Iterator[Document]:
    """The documents with what can be encoded encoded."""
    segments = [segment for document in documents for segment in document.segments]
    for modality, fingerprint in encoders.fingerprints.items():
        numbers = [n for n, one in enumerate(segments) if one.modality == modality and not one.is_encoded and not one.choices]
        for some in _batched(numbers, encoders.batch):
            chosen = [segments[number] for number in some]
            if modality == TEXT:
                found: Sequence[Codes | BadSample] = [encode_text(segment, encoders.tokenizer) for segment in chosen]
            else:
                assert encoders.model is not None
                found = encode_media(chosen, modality, encoders.model, fingerprint)
            for number, segment, codes in zip(some, chosen, found, strict=True):
                if isinstance(codes, BadSample):
                    left[codes.reason] += 1
                else:
                    encoded[MODALITIES[modality]] += 1
                    segments[number] = replace(segment, data=codes.to_bytes(), extension=ENCODED_EXTENSIONS[modality])
    remaining = iter(segments)
    for document in documents:
        yield replace(document, segments=tuple(islice(remaining, len(document.segments))))


def _batched(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def encode_text(segment: Segment, tokenizer: Tokenizer) -> Codes:
    """The ids of a text, and where its sentences end."""
    ids, in_tokens = tokenizer.encode_all([segment.text], [sentence_ends(segment.text)])[0]
    breaks = np.stack([segment_breaks(segment), in_tokens]).reshape(2, -1)
    return Codes(tokenizer.fingerprint, segment_size(segment)[0], 0, ids, breaks)


def encode_media(
    segments: Sequence[Segment], modality: int, model: FusedLanguageModel, fingerprint: str
) -> list[Codes | BadSample]:
    """The codes of images or sounds, laid out as in training; the reason where a medium cannot be decoded."""
    from pile_app.model.segments import segment_length

    sizes = [1 + segment_length(model, segment) for segment in segments]  # with `<begin>`, opener and end of a sound
    packs = [[whole(Document((one,), str(n)), size)] for n, (one, size) in enumerate(zip(segments, sizes, strict=True))]
    with ThreadPoolExecutor(available_cores()) as pool:  # decoders release the interpreter's lock
        batch = assemble(packs, model.vocabulary, model.tokenizer, max(sizes), decode=pool.map)
    found: dict[int, Codes | BadSample] = {int(key): BadSample(*why) for _, key, *why in batch.rejected}
    tokens = model.fill(batch.to(model.token_bytes.device)).cpu().numpy() - model.vocabulary.slices[modality].start
    for number, (segment, size) in enumerate(zip(segments, sizes, strict=True)):
        if number not in found:
            codes = tokens[number, 2 : size - (modality == AUDIO)]
            found[number] = Codes(fingerprint, *segment_size(segment), codes)
    return [found[number] for number in range(len(segments))]
