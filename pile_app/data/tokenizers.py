"""Text: cleaning, tokenizers, and how many tokens the texts of a shard take.

`clean_text` runs once, when shards are written. A `Tokenizer` turns text into int32 ids and back: `bytes` (256 ids, nothing to
train, the default) or a `tokenizer.json` of the `tokenizers` library, byte-level BPE or words. `token_bytes` says how many
UTF-8 bytes each id stands for, so that losses can be told in bits per byte whatever the tokenizer.

Packing needs the token count of every text before any is read. For bytes the index of the shard holds it; for others
`text_tokens` tokenizes the shard once and keeps the ids beside it, in `<shard>.<fingerprint>.tokens.safetensors`: training
reads those, and never tokenizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pile_app.data.index import EXTENSIONS, ShardIndex, breaks_in_bytes, map_arrays, save_arrays, tokens_path
from pile_app.data.packing import sentence_ends
from pile_app.data.shards import Shards
from pile_app.data.tar import ShardError
from pile_app.documents import TEXT, BadSample, Codes, Segment

NO_TOKENS = np.zeros(0, np.int64)
_LINE_ENDS = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_UNUSUAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # what either of the two replaces
_BLANK_LINES = re.compile("\n{3,}")


def clean_text(text: str) -> str:
    """Unicode NFC, every line end a newline, no control characters but tab and newline, no whitespace at the end of lines, no
    more than one blank line in a row. Cleaning twice changes nothing."""
    if _UNUSUAL.search(text):  # mostly not, and to look is six times as fast as to replace
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", text)  # last of the two: removing a control character can bring a mark to its letter
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text)


class Tokenizer(Protocol):
    """Text to ids and back.

    `size`: ids are 0 to size - 1. `fingerprint`: differs between tokenizers that give different ids. `token_bytes`: (size,)
    int64, UTF-8 bytes that each id stands for.
    """

    size: int
    fingerprint: str
    token_bytes: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """int32 ids (tokens,)."""
        ...

    def count(self, text: str) -> int:
        """Number of tokens of `text`."""
        ...

    def encode_all(self, texts: Sequence[str], breaks: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, how many of them are before each of its breaks) of each text; breaks are places in characters."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes: an id is a byte."""

    def __init__(self) -> None:
        self.size = 256
        self.fingerprint = "bytes"
        self.token_bytes = np.ones(256, np.int64)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def count(self, text: str) -> int:
        return len(text.encode())

    def encode_all(self, texts: Sequence[str], breaks: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            (self.encode(text), np.array(breaks_in_bytes(text, places), np.int64))
            for text, places in zip(texts, breaks, strict=True)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Bytes that are not UTF-8, as an untrained model writes them, become U+FFFD."""
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library: byte-level (GPT-2, Llama 3, Qwen ...) or word-level.

    Nothing is added around a text, and nothing is cut. The names of special tokens are ordinary text to a byte-level tokenizer;
    to a word-level one the text `<unk>` is the unknown word, as in WikiText.
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        try:
            data = Path(path).read_bytes()
            description = json.loads(data)
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except OSError as error:
            raise ValueError(f'tokenizer {str(path)!r} cannot be read: {error}. Give "bytes" or a tokenizer.json') from error
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(
                f"tokenizer {str(path)!r} is not a tokenizer.json of the tokenizers library: {error}. "
                'Give "bytes" or the file that train_tokenizer or Tokenizer.save wrote'
            ) from error
        self._words = description["model"]["type"] == "WordLevel"
        if not self._words and '"ByteLevel"' not in json.dumps([description.get("pre_tokenizer"), description.get("decoder")]):
            raise ValueError(
                f"tokenizer {str(path)!r} is a {description['model']['type']} model without byte-level pre-tokenizer; its "
                "tokens stand for no fixed number of bytes. Use byte-level BPE, a WordLevel model or bytes"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not self._words
        self.fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.token_bytes = np.zeros(self.size, np.int64)
        for piece, token in vocabulary.items():
            # A byte-level piece has one character a byte; a word is followed by a space.
            byte_level = not self._words and token not in added
            self.token_bytes[token] = len(piece) if byte_level else len(piece.encode()) + self._words

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = not self._words  # lost when a Tokenizer is pickled

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_all(self, texts: Sequence[str], breaks: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            # A token that reaches over a break is on its far side.
            (
                np.array(one.ids, np.int32),
                np.searchsorted([stop for _, stop in one.offsets], places, side="right") if places else NO_TOKENS,
            )
            for one, places in zip(encodings, breaks, strict=True)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, or the tokenizer of the `tokenizer.json` at the path `spec`.

    Raises:
        ValueError: the file is missing, unreadable, or of a kind that cannot be used.
    """
    return ByteTokenizer() if spec == "bytes" else JsonTokenizer(spec)


def train_tokenizer(texts: Iterable[str], kind: Literal["bpe", "words"], size: int, path: str | Path) -> None:
    """Trains a tokenizer of at most `size` tokens and writes it to `path`; the same texts give the same file.

    `bpe` is byte-level byte-pair encoding: it writes any text. `words` is the set-up of classic word-level language models: the
    most frequent words (lower-cased, split at whitespace and punctuation), all others `<unk>`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    smallest = {"bpe": 256, "words": 2}
    if kind not in smallest:
        raise ValueError(f"a tokenizer of kind {kind!r} cannot be trained; kinds are {', '.join(smallest)}")
    if size < smallest[kind]:
        raise ValueError(f"size {size} is too small for a {kind} tokenizer; it needs {smallest[kind]} tokens or more")
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    tokenizer.save(temporary)
    os.replace(temporary, path)


@dataclass(frozen=True, eq=False)
class TextTokens:
    """The texts of a shard as a tokenizer sees them. G segments of the shard.

    counts: (G,) tokens of every text, 0 for other segments; flat_breaks: places inside long texts where a sentence ends, in
    tokens, as `ShardIndex.breaks` has them in bytes; flat_ids, crc: ids of all texts, one after the other, and (G,) the CRC-32
    of those of each; none where the tokens are the bytes.
    """

    index: ShardIndex
    counts: np.ndarray
    flat_breaks: np.ndarray
    flat_ids: np.ndarray
    crc: np.ndarray

    @cached_property
    def breaks(self) -> Mapping[int, np.ndarray]:
        """Segment -> places inside a long text where a sentence ends, in tokens."""
        return self.index.breaks_of_segments(self.flat_breaks)

    @cached_property
    def _first(self) -> np.ndarray:
        """(G + 1,) where the ids of each text begin; encoded ones have theirs in the shard."""
        counts = np.where(self.index.file == EXTENSIONS.index("txt"), self.counts, 0)
        return np.concatenate([[0], np.cumsum(counts)])

    def ids(self, segment: int) -> np.ndarray:
        """(tokens,) ids of a text. Raises `BadSample` where they are not what the tokenizer gave."""
        ids = self.flat_ids[self._first[segment] : self._first[segment + 1]]
        if zlib.crc32(ids.data) != self.crc[segment]:
            raise BadSample("checksum", f"the tokens of {self.index.path!r} that were kept are damaged: remove the file")
        return ids


def text_tokens(shards: Shards, shard: int, tokenizer: Tokenizer) -> TextTokens:
    """What a tokenizer makes of the texts of a shard.

    A subword tokenizer reads the shard once; what it found is kept beside it, and made anew when the shard changes.

    Raises:
        ShardError: a sample is not what was indexed.
    """
    index = shards.index(shard)
    kept: TextTokens | None = index.texts.get(tokenizer.fingerprint)
    if kept is None:
        kept = index.texts[tokenizer.fingerprint] = _text_tokens(index, shards, shard, tokenizer)
    return kept


def _text_tokens(index: ShardIndex, shards: Shards, shard: int, tokenizer: Tokenizer) -> TextTokens:
    if tokenizer.fingerprint == "bytes":
        counts = np.where(index.modality == TEXT, index.segment_size, 0).astype(np.int64)
        return TextTokens(index, counts, index.breaks, NO_TOKENS, NO_TOKENS)
    path = tokens_path(shards.local(shard), tokenizer.fingerprint)
    types = {"counts": "<u4", "breaks": "<u4", "crc": "<u4", "ids": "<u2" if tokenizer.size <= 1 << 16 else "<u4"}
    try:
        stored, header = map_arrays(path, types)
    except (OSError, ValueError):
        stored, header = {}, {}
    sizes = {"counts": len(index.modality), "breaks": len(index.breaks), "crc": len(index.modality)}
    if header.get("shard") != index.fingerprint or {name: len(stored[name]) for name in sizes} != sizes:
        stored = {name: array.astype(types[name]) for name, array in _tokenize(shards, shard, tokenizer, types["ids"]).items()}
        save_arrays(path, stored, {"shard": index.fingerprint})
    return TextTokens(index, stored["counts"].astype(np.int64), stored["breaks"], stored["ids"], stored["crc"])


TOKENIZED_AT_ONCE = 1 << 20  # bytes of text that are tokenized in one call


def _tokenize(shards: Shards, shard: int, tokenizer: Tokenizer, kind: str) -> dict[str, np.ndarray]:
    """The arrays that are kept, see `TextTokens`."""
    index = shards.index(shard)
    counts, crc = np.zeros(len(index.modality), np.int64), np.zeros(len(index.modality), np.uint32)
    ids: list[np.ndarray] = []
    breaks: list[np.ndarray] = []
    waiting: list[tuple[int, str]] = []
    size = 0

    def tokenize() -> None:
        nonlocal size
        found = tokenizer.encode_all([text for _, text in waiting], [sentence_ends(text) for _, text in waiting])
        for (segment, _), (of_text, places) in zip(waiting, found, strict=True):
            ids.append(of_text.astype(kind))
            counts[segment], crc[segment] = len(of_text), zlib.crc32(ids[-1].data)
            breaks.append(places)
        waiting.clear()
        size = 0

    for sample in range(len(index)):
        first, last = index.first_segment[sample : sample + 2].tolist()
        if not (index.modality[first:last] == TEXT).any():
            continue
        try:
            segments = shards.document(shard, sample).segments
            for number, one in enumerate(segments, first):
                if one.modality != TEXT:
                    continue
                if one.is_encoded:
                    codes = encoded_text(one, tokenizer, index.path)
                    tokenize()  # breaks stand in the order of the segments
                    counts[number] = len(codes.values)
                    breaks.append(codes.breaks[1])
                else:
                    waiting.append((number, one.text))
                    size += len(one.text)
        except BadSample as error:
            raise ShardError(
                f"the texts of shard {index.path!r} cannot be tokenized: {error}. Fetch the shard again, or run "
                f"`pile index {index.path}` to take it as it is"
            ) from error
        if size > TOKENIZED_AT_ONCE:
            tokenize()
    tokenize()
    all_breaks, all_ids = (np.concatenate([np.zeros(0, kind), *parts]) for parts in (breaks, ids))
    return {"counts": counts, "breaks": all_breaks, "crc": crc, "ids": all_ids}


def encoded_text(segment: Segment, tokenizer: Tokenizer, where: str) -> Codes:
    """The ids of an encoded text. Raises `ShardError` where another tokenizer made them."""
    codes = segment.codes
    if codes.encoder != tokenizer.fingerprint:
        raise ShardError(
            f"{where!r} holds text that was encoded by tokenizer {codes.encoder}, the model's is {tokenizer.fingerprint}: set "
            "model.tokenizer to the one it was encoded with, or encode the shards anew"
        )
    return codes
