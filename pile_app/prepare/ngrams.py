"""Words in a row: near-duplicates of texts, and texts of evaluation sets in training data."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from pile_app.data.index import map_arrays, save_arrays
from pile_app.data.order import mix64
from pile_app.documents import BadSample
from pile_app.prepare.entities import UNSPACED
from pile_app.prepare.options import require

_WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
_BASE = np.uint64(0x9E3779B97F4A7C15)
SHINGLE = 5  # words
PERMUTATIONS = 128


def words_of(text: str) -> list[str]:
    """Lower-cased words without punctuation; a character alone where the script has no spaces (Chinese, Japanese, Thai ...)."""
    return _WORD.findall(text.lower())


def ngram_hashes(words: list[str], n: int) -> np.ndarray:
    """A 64-bit hash of each n words in a row, (max(0, len(words) - n + 1),) uint64."""
    count = max(0, len(words) - n + 1)
    ids = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = hashes * _BASE + ids[i : i + count]
    return mix64(hashes)


def minhash(text: str) -> np.ndarray:
    """(128,) uint32: the MinHash (Broder 1997) of the words of a text, five in a row, by datasketch."""
    words = words_of(text) or [text]
    hashes = (ngram_hashes(words, min(SHINGLE, len(words))) >> np.uint64(32)).tolist()
    sketch = _empty_sketch().copy()
    for start in range(0, len(hashes), 4096):
        sketch.update_batch(hashes[start : start + 4096])
    return sketch.hashvalues.astype(np.uint32)


@lru_cache(1)
def _empty_sketch() -> Any:
    return require("datasketch", "prepare", "finding near-duplicates").MinHash(PERMUTATIONS, seed=1, hashfunc=int)


class NearDuplicates:
    """Finds the first document, of those before, that a document resembles: MinHash-LSH by datasketch, verified by signature.

    Memory grows by about 4 kB a document of text that is kept (128 permutations at a threshold of 0.8).
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        datasketch = require("datasketch", "prepare", "finding near-duplicates")
        self._index = datasketch.MinHashLSH(threshold, PERMUTATIONS)
        self._sketch = _empty_sketch().copy()
        self._signatures: list[np.ndarray] = []
        self._names: list[str] = []

    def add(self, signature: np.ndarray, name: str) -> tuple[str, float] | None:
        """(name, similarity) of the first that resembles this one, else None: then this one is remembered."""
        self._sketch.hashvalues = signature.astype(self._sketch.hashvalues.dtype)
        for candidate in sorted(self._index.query(self._sketch)):
            similarity = float((self._signatures[candidate] == signature).mean())
            if similarity >= self.threshold:
                return self._names[candidate], similarity
        self._index.insert(len(self._names), self._sketch)
        self._signatures.append(np.array(signature))
        self._names.append(name)
        return None


class EvaluationTexts:
    """The n-grams of evaluation sets, by which documents that hold a part of them are known (Brown et al. 2020,
    arXiv:2005.14165, appendix C: n of 8 to 13 words, lower case, without punctuation).

    A text of fewer than `n` words counts as a whole, if it has at least `SHORTEST`. Hashes of 64 bits in files that processes
    share, 8 bytes an n-gram.
    """

    SHORTEST = 8

    def __init__(self, path: str, n: int) -> None:
        types = {f"ngrams{length}": "<u8" for length in range(min(n, self.SHORTEST), n + 1)}
        arrays, _ = map_arrays(path, types)
        self._hashes = {length: arrays[f"ngrams{length}"] for length in range(min(n, self.SHORTEST), n + 1)}

    @classmethod
    def save(cls, texts: Iterable[str], n: int, path: str) -> tuple[int, int]:
        """Writes the file; (texts, those of them that are too short to be looked for)."""
        hashes: dict[int, list[np.ndarray]] = {length: [] for length in range(min(n, cls.SHORTEST), n + 1)}
        count = short = 0
        for count, text in enumerate(texts, 1):  # noqa: B007 (the count is what is wanted)
            words = words_of(text)
            if len(words) < min(n, cls.SHORTEST):
                short += 1
            else:
                length = min(n, len(words))
                hashes[length].append(np.unique(ngram_hashes(words, length)))
        arrays = {
            f"ngrams{length}": np.unique(np.concatenate([np.zeros(0, np.uint64), *found])) for length, found in hashes.items()
        }
        save_arrays(path, arrays, {})
        return count, short

    def check(self, text: str) -> None:
        """Raises BadSample (`contaminated`) where the text holds an n-gram of an evaluation text."""
        words = words_of(text)
        for length, known in self._hashes.items():
            if not len(known):
                continue
            found = ngram_hashes(words, length)
            places = np.minimum(np.searchsorted(known, found), len(known) - 1)
            if (at := np.flatnonzero(known[places] == found)).size:
                ngram = " ".join(words[at[0] : at[0] + length])
                raise BadSample("contaminated", f"{length} words of an evaluation text: {ngram!r}")
