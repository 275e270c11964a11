"""Token counts and ids of the texts of a shard, by a tokenizer other than bytes.

Counts become columns of the manifest. The ids of a local shard are kept in `<shard>.<fingerprint>.tokens.safetensors`, so that
training need not tokenize; if there is no such file, the worker that reads a document tokenizes it.
"""

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
from pile_app.fields import Fields

TOKENIZED_AT_ONCE = 1 << 20  # characters


def columns_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """Names of the manifest's columns for a tokenizer: (G,) counts of tokens, and breaks in tokens."""
    return f"tokens.{tokenizer.fingerprint[:16]}", f"breaks.{tokenizer.fingerprint[:16]}"


def text_counts(index: ShardIndex, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """((G,) int64 tokens of each text, 0 for media; breaks in tokens) of a shard. Raises `ShardError` if they are damaged."""
    if tokenizer.fingerprint == "bytes":
        return np.where(index.modality == TEXT, index.segment_size, 0).astype(np.int64), index.break_bytes
    if _checksum(index, tokenizer) != index.about["tokens"].get(tokenizer.fingerprint[:16]):
        raise ShardError(f"the token counts of shard {index.path!r} are damaged: run `pile index --overwrite {index.path}`")
    counts, breaks = (index.columns[name] for name in columns_of(tokenizer))
    return counts.astype(np.int64), breaks


class KeptIds:
    """The ids of the texts of a local shard. Raises OSError or ValueError if they are not kept, or those of another shard."""

    def __init__(self, index: ShardIndex, path: str, tokenizer: Tokenizer) -> None:
        self.arrays, header = map_arrays(_path(path, tokenizer), {"crc": "<u4", "ids": _kind(tokenizer)})
        self.path = index.path
        in_files = index.file == EXTENSIONS.index("txt")  # the shard itself holds the ids of encoded texts
        self.first = starts(np.where(in_files, text_counts(index, tokenizer)[0], 0))
        is_whole = len(self.arrays["crc"]) == len(in_files) and len(self.arrays["ids"]) == self.first[-1]
        if header.get("shard") != index.about["fingerprint"] or not is_whole:
            raise ValueError("these are the ids of another shard")

    def ids(self, row: int, is_checked: bool = False) -> np.ndarray:
        """(tokens,) ids of a text. Raises `BadSample` if they are damaged."""
        ids = self.arrays["ids"][self.first[row] : self.first[row + 1]]
        if not is_checked and zlib.crc32(ids.data) != self.arrays["crc"][row]:
            raise BadSample("checksum", f"the token ids that were kept for {self.path!r} are damaged: remove the file")
        return ids


def count_tokens(index: ShardIndex, path: str, fields: Fields, tokenizer: Tokenizer, keep: bool) -> None:
    """Add the columns of a tokenizer to an index.

    Args:
        path: of the tar.
        keep: whether the ids are written next to it, if the folder can be written.

    Raises:
        ShardError: a sample differs from the index, or another tokenizer encoded it.
    """
    arrays = _tokenize(index, path, fields, tokenizer)
    for name in columns_of(tokenizer):
        index.columns[name] = arrays.pop(name.partition(".")[0])
    index.about["tokens"][tokenizer.fingerprint[:16]] = _checksum(index, tokenizer)
    if keep and os.access(os.path.dirname(path) or ".", os.W_OK):
        with suppress(OSError):
            save_arrays(_path(path, tokenizer), arrays, {"shard": index.about["fingerprint"]})


def _checksum(index: ShardIndex, tokenizer: Tokenizer) -> int:
    counts, breaks = (index.columns[name] for name in columns_of(tokenizer))
    return zlib.crc32(breaks.tobytes(), zlib.crc32(counts.tobytes()))


def _path(path: str, tokenizer: Tokenizer) -> str:
    return f"{path}.{tokenizer.fingerprint[:16]}.tokens.safetensors"


def _kind(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.size <= 1 << 16 else "<u4"


def _tokenize(index: ShardIndex, path: str, fields: Fields, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    counts, crc = np.zeros(len(index.modality), "<u4"), np.zeros(len(index.modality), "<u4")
    ids, breaks = [np.zeros(0, _kind(tokenizer))], [np.zeros(0, "<u4")]
    waiting: list[tuple[int, str]] = []
    size = 0

    def tokenize() -> None:
        found = tokenizer.encode_all([text for _, text in waiting], [sentence_ends(text) for _, text in waiting])
        for (row, _), (of_text, ends) in zip(waiting, found, strict=True):
            ids.append(of_text.astype(_kind(tokenizer)))
            counts[row], crc[row] = len(of_text), zlib.crc32(ids[-1].data)
            breaks.append(ends.astype("<u4"))
        waiting.clear()

    with open(path, "rb") as file:
        for sample in range(len(index)):
            rows = np.arange(*index.first_segment[sample : sample + 2])
            rows = rows[index.modality[rows] == TEXT].tolist()
            block = os.pread(file.fileno(), int(index.size[sample]), int(index.offset[sample])) if rows else b""
            try:
                if rows and zlib.crc32(block) != index.crc[sample]:
                    raise BadSample("checksum", f"sample {index.key(sample)!r} differs from the manifest")
                for row, text in zip(rows, index.contents(sample, block, fields, rows), strict=True):
                    if isinstance(text, str):
                        waiting.append((row, text))
                        size += len(text)
                        continue
                    tokenize()  # breaks are in the order of the rows
                    codes = check_encoded(Codes.from_bytes(text), tokenizer, index.path)
                    counts[row] = len(codes.values)
                    breaks.append(codes.breaks[1].astype("<u4"))
            except BadSample as error:
                raise ShardError(
                    f"the texts of shard {index.path!r} cannot be tokenized: {error}. Fetch the shard again, or run "
                    f"`pile index --overwrite {index.path}` to accept it"
                ) from error
            if size > TOKENIZED_AT_ONCE:
                tokenize()
                size = 0
    tokenize()
    return {"tokens": counts, "breaks": np.concatenate(breaks), "crc": crc, "ids": np.concatenate(ids)}


def check_encoded(codes: Codes, tokenizer: Tokenizer, where: str) -> Codes:
    """Raise `ShardError` if another tokenizer encoded a text."""
    if codes.encoder != tokenizer.fingerprint:
        raise ShardError(
            f"{where!r} holds text that was encoded by tokenizer {codes.encoder}, the model's is {tokenizer.fingerprint}: set "
            "model.tokenizer to the one that encoded it, or encode the shards again"
        )
    return codes
