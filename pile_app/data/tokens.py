"""Token counts and ids of the texts of a shard, by a tokenizer other than bytes.

Counts become columns of the manifest. The ids of a local shard are kept in `<shard>.<fingerprint>.tokens.safetensors`, so that
training need not tokenize; if there is no such file, the worker that reads a document tokenizes it."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress

import numpy as np

from pile_app.data.files import ShardError, map_arrays, save_arrays
from pile_app.data.index import EXTENSIONS, ShardIndex, starts
from pile_app.data.packing import sentence_ends
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import TEXT, BadSample, Codes

TOKENIZED_AT_ONCE = 1 << 20  # characters


def columns_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """Names of the manifest's columns for a tokenizer: (G,) counts of tokens, and breaks in tokens."""
    return f"tokens.{tokenizer.fingerprint[:16]}", f"breaks.{tokenizer.fingerprint[:16]}"


def text_counts(index: ShardIndex, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """((G,) int64 tokens of each text, 0 for media; breaks in tokens) of a shard. Raises `ShardError` if they are damaged."""
    if tokenizer.fingerprint == "bytes":
        return np.where(index.modality == TEXT, index.segment_size, 0).astype(np.int64), index.break_bytes
    counts, breaks = (index.columns[name] for name in columns_of(tokenizer))
    if _checksum(counts, breaks) != index.about["tokens"].get(tokenizer.fingerprint[:16]):
        raise ShardError(f"the token counts of shard {index.path!r} are damaged: run `pile index --overwrite {index.path}`")
    return counts.astype(np.int64), breaks


def _checksum(counts: np.ndarray, breaks: np.ndarray) -> int:
    return zlib.crc32(breaks.tobytes(), zlib.crc32(counts.tobytes()))


class KeptIds:
    """The ids of the texts of a local shard. Raises OSError or ValueError if they are missing, or those of another shard."""

    def __init__(self, index: ShardIndex, path: str, tokenizer: Tokenizer) -> None:
        arrays, header = map_arrays(_path(path, tokenizer))
        in_files = index.file == EXTENSIONS.index("txt")  # the shard itself holds the ids of encoded texts
        self.first = starts(np.where(in_files, text_counts(index, tokenizer)[0], 0))
        lengths = [len(arrays.get(name, ())) for name in ("crc", "ids")]
        if header.get("shard") != index.about["fingerprint"] or lengths != [len(in_files), self.first[-1]]:
            raise ValueError("these are the ids of another shard")
        self.path, self.crc, self.ids_of_all = index.path, arrays["crc"], arrays["ids"]
        self.is_checked = bytearray(len(in_files))

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) ids of a text, whose checksum is compared once. Raises `BadSample` if they are damaged."""
        ids = self.ids_of_all[self.first[row] : self.first[row + 1]]
        if not self.is_checked[row] and zlib.crc32(ids.data) != self.crc[row]:
            raise BadSample("checksum", f"the token ids that were kept for {self.path!r} are damaged: remove the file")
        self.is_checked[row] = True
        return ids


def count_tokens(index: ShardIndex, path: str, tokenizer: Tokenizer, keep: bool) -> None:
    """Add the columns of a tokenizer to an index. keep: write the ids next to the tar at `path`, if the folder can be written.

    Raises `ShardError` if a sample differs from the index, or another tokenizer encoded it."""
    kind = "<u2" if tokenizer.size <= 1 << 16 else "<u4"
    counts, crc = np.zeros(len(index.modality), "<u4"), np.zeros(len(index.modality), "<u4")
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # row -> ids (none if the shard holds them), breaks
    waiting: dict[int, str] = {}
    size = 0

    def tokenize() -> None:
        texts = list(waiting.values())
        for row, (ids, ends) in zip(waiting, tokenizer.encode_all(texts, list(map(sentence_ends, texts))), strict=True):
            found[row] = ids.astype(kind), ends.astype("<u4")
            counts[row], crc[row] = len(ids), zlib.crc32(found[row][0].data)
        waiting.clear()

    with open(path, "rb") as file:
        for sample in range(len(index)):
            if not any(index.numbers.modality[row] == TEXT for row in index.rows(sample)):
                continue
            try:
                block = index.block(sample, file.fileno())
                for row, content in index.contents(sample, block).items():
                    if isinstance(content, str):
                        waiting[row] = content
                        size += len(content)
                    elif index.modality[row] == TEXT:
                        codes = Codes.from_bytes(content)
                        if codes.encoder != tokenizer.fingerprint:
                            fix = f"{tokenizer.fingerprint}: set model.tokenizer to that tokenizer, or encode the shards again"
                            raise ShardError(f"{index.path!r} holds text encoded by {codes.encoder}, the model's is {fix}")
                        counts[row] = len(codes.values)
                        found[row] = np.zeros(0, kind), codes.breaks[1].astype("<u4")
            except BadSample as error:
                raise ShardError(f"the texts of shard {index.path!r} cannot be tokenized: {error}{index.fix}") from error
            if size > TOKENIZED_AT_ONCE:
                tokenize()
                size = 0
    tokenize()
    in_order = [(np.zeros(0, kind), np.zeros(0, "<u4")), *(found[row] for row in sorted(found))]
    breaks = np.concatenate([ends for _, ends in in_order])
    index.columns |= dict(zip(columns_of(tokenizer), (counts, breaks), strict=True))
    index.about["tokens"][tokenizer.fingerprint[:16]] = _checksum(counts, breaks)
    if keep and os.access(os.path.dirname(path) or ".", os.W_OK):
        with suppress(OSError):
            arrays = {"crc": [crc], "ids": [ids for ids, _ in in_order]}
            save_arrays(_path(path, tokenizer), arrays, {"shard": index.about["fingerprint"]})


def _path(path: str, tokenizer: Tokenizer) -> str:
    return f"{path}.{tokenizer.fingerprint[:16]}.tokens.safetensors"
