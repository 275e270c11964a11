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

from pile_app.data.files import ShardError, whole_file
from pile_app.data.index import TYPES, UNORDERED, segment_breaks, segment_size, starts
from pile_app.data.manifest import split_path
from pile_app.data.packing import sentence_ends
from pile_app.data.shards import Shards
from pile_app.data.tokenizers import Tokenizer
from pile_app.data.tokens import columns_of, text_counts
from pile_app.documents import (
    ENCODED_EXTENSIONS,
    IMAGE,
    MODALITIES,
    TEXT,
    BadSample,
    Codes,
    Document,
    Segment,
    sample_from_document,
)
from pile_app.fields import OWN
from pile_app.media import decode_audio, decode_image

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
            raise ValueError(
                f"the codecs of {run!r} are trained for {module.codec_steps} steps, and the checkpoint is of step {step}: "
                "train further, codes of codecs that still change cannot be used"
            )
        return cls(module.tokenizer, module.model, batch)


def encode_shards(shards: Shards, folder: Path, encoders: Encoders, overwrite: bool = False) -> dict[str, Any]:
    """Write `folder/<name>` for every shard, and return what `encoded.json` says of them.

    Args:
        shards: of documents; segments that are encoded already are copied.
        folder: not that of the shards.
        overwrite: encode all of them again.

    Raises:
        ValueError: two shards have the same name, or a shard would replace its source or an unrelated file.
        ShardError: a shard cannot be read.
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
            raise ShardError(
                f"the manifest of {new.path!r} differs from that of {old.path!r} in {', '.join(different)}: run "
                f"`pile index --overwrite {old.path}`, then this command with --overwrite"
            )
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
    with whole_file(path) as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for numbers in _batched(range(*shards.first_document[shard : shard + 2]), DOCUMENTS_AT_ONCE):
                documents = [_read(shards, number, encoders.tokenizer, left) for number in numbers]
                for document in _encode(documents, encoders, encoded, left):
                    tar.write(_sample(document))
        file.flush()
        os.fsync(file.fileno())
    return {"encoded": encoded, "left": left}


def _sample(document: Document) -> dict[str, str | bytes]:
    """The WebDataset sample of a document; that of a single encoded segment is one file, half the bytes in a tar."""
    segment = document.segments[0]
    alone = len(document.segments) == 1 and segment.is_encoded and segment.loss and document.ordered and not document.meta
    if alone:
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
            raise ShardError(
                f"{error}: fetch the shard again (its tokens were never counted, so it cannot be skipped)"
            ) from error
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
            for number in some if modality == TEXT else ():
                segments[number] = encode_text(segments[number], encoders.tokenizer)
            if modality != TEXT and encoders.model is not None:
                codes = _encode_media([segments[number].file for number in some], modality, encoders.model, left)
                for number, values in zip(some, codes, strict=True):
                    if values is not None:
                        file = Codes(fingerprint, *segment_size(segments[number]), values).to_bytes()
                        segments[number] = replace(segments[number], data=file, extension=ENCODED_EXTENSIONS[modality])
        if done := sum(segments[number].is_encoded for number in numbers):
            encoded[MODALITIES[modality]] += done
    remaining = iter(segments)
    for document in documents:
        yield replace(document, segments=tuple(islice(remaining, len(document.segments))))


def _batched(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def encode_text(segment: Segment, tokenizer: Tokenizer) -> Segment:
    """The ids of a text, with the places where its sentences end."""
    ends = sentence_ends(segment.text)
    ids, in_tokens = tokenizer.encode_all([segment.text], [ends])[0]
    size, _ = segment_size(segment)
    breaks = np.stack([segment_breaks(segment), in_tokens]).reshape(2, -1)
    codes = Codes(tokenizer.fingerprint, size, 0, ids, breaks)
    return Segment(codes.to_bytes(), ENCODED_EXTENSIONS[TEXT], segment.loss)


def _encode_media(files: list[bytes], modality: int, model: FusedLanguageModel, left: Counter[str]) -> list[np.ndarray | None]:
    """Encode each image or sound to codes (T,), or None if it cannot be decoded."""
    vocabulary = model.vocabulary

    def decode(file: bytes) -> np.ndarray | BadSample:
        try:
            if modality == IMAGE:
                return decode_image(file, *vocabulary.image_shape)
            return decode_audio(file, vocabulary.sample_rate)
        except BadSample as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release the interpreter's lock
        decoded = list(pool.map(decode, files))
    left.update(medium.reason for medium in decoded if isinstance(medium, BadSample))
    media = [medium for medium in decoded if not isinstance(medium, BadSample)]
    codes = iter(encode_media(media, modality, model) if media else ())
    return [None if isinstance(medium, BadSample) else next(codes) for medium in decoded]


def encode_media(media: Sequence[np.ndarray], modality: int, model: FusedLanguageModel) -> list[np.ndarray]:
    """Encode uint8 pixels (C, H, W), or float32 samples (S,), to codes (T,) each."""
    import torch

    codec: Any = model.codecs[modality]
    vocabulary, device = model.vocabulary, model.token_bytes.device
    if modality == IMAGE:
        pixels = torch.from_numpy(np.stack([image.transpose(1, 2, 0) for image in media]))  # channels last, as in batches
        return list(codec.encode(pixels.to(device).permute(0, 3, 1, 2)).cpu().numpy())
    per_token = vocabulary.samples_per_token
    tokens = [vocabulary.audio_tokens(len(sound), vocabulary.sample_rate) for sound in media]
    padded = [np.pad(sound, (0, count * per_token - len(sound))) for count, sound in zip(tokens, media, strict=True)]
    audio = torch.from_numpy(np.concatenate(padded).astype(np.float32).reshape(-1, per_token)).to(device)
    codes = codec.encode(audio, torch.tensor(tokens, device=device))
    return np.split(codes.cpu().numpy(), np.cumsum(tokens)[:-1])
