"""Text: cleaning and tokenizers.

`clean_text` runs once, when shards are written. A `Tokenizer` turns text into int32 ids and back: `bytes` (256 ids, nothing to
train, the default) or a `tokenizer.json` of the `tokenizers` library, byte-level BPE or words. `token_bytes` says how many
UTF-8 bytes each id stands for, so that losses can be told in bits per byte whatever the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

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


def breaks_in_bytes(text: str, breaks: Sequence[int]) -> list[int]:
    """Convert positions in a text from characters to UTF-8 bytes."""
    if text.isascii():
        return list(breaks)
    return np.cumsum([len(text[a:b].encode()) for a, b in pairwise([0, *breaks])]).tolist()


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
