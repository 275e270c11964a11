"""Word n-grams: near-duplicate texts, and texts of evaluation sets in training data."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.data.order import mix64
from pile_app.documents import BadSample
from pile_app.prepare.entities import UNSPACED
from pile_app.prepare.options import require

_WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
_BASE = np.uint64(0x9E3779B97F4A7C15)
SHINGLE = 5  # words
PERMUTATIONS = 128
SHORTEST = 8  # words of an evaluation text that is searched for


def words_of(text: str) -> list[str]:
    """Split into lower-cased words without punctuation, into characters where the script has no spaces (Chinese, Thai ...)."""
    return _WORD.findall(text.lower())


def ngram_hashes(words: list[str], n: int) -> np.ndarray:
    """Hash each n consecutive words to 64 bits, (max(0, len(words) - n + 1),) uint64."""
    count = max(0, len(words) - n + 1)
    ids = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = hashes * _BASE + ids[i : i + count]
    return mix64(hashes)


def minhash(text: str) -> np.ndarray:
    """Compute the MinHash (Broder 1997) of a text's word 5-grams with datasketch, (128,) uint32."""
    words = words_of(text) or [text]
    hashes = (ngram_hashes(words, min(SHINGLE, len(words))) >> np.uint64(32)).tolist()
    sketch = _empty_sketch().copy()
    for start in range(0, len(hashes), 4096):
        sketch.update_batch(hashes[start : start + 4096])
    return sketch.hashvalues.astype(np.uint32)


@lru_cache(1)
def _empty_sketch() -> Any:
    return require("datasketch", "prepare", "--near-duplicates").MinHash(PERMUTATIONS, seed=1, hashfunc=int)


class NearDuplicates:
    """Finds the first earlier text that resembles a text: MinHash LSH of datasketch, verified by signature."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self._kept = threshold, list[tuple[np.ndarray, str]]()
        self._index = require("datasketch", "prepare", "--near-duplicates").MinHashLSH(threshold, PERMUTATIONS)
        self._sketch = _empty_sketch().copy()

    def add(self, signature: np.ndarray, name: str) -> tuple[str, float] | None:
        """Return (name, similarity) of the first document that resembles this signature, else None and remember it."""
        self._sketch.hashvalues = signature.astype(self._sketch.hashvalues.dtype)
        for known, known_name in (self._kept[candidate] for candidate in sorted(self._index.query(self._sketch))):
            if (similarity := float((known == signature).mean())) >= self.threshold:
                return known_name, similarity
        self._index.insert(len(self._kept), self._sketch)
        self._kept.append((np.array(signature), name))
        return None


class EvaluationTexts:
    """Finds texts that contain an n-gram of an evaluation set (Brown et al. 2020, arXiv:2005.14165, appendix C), or a whole
    evaluation text of `SHORTEST` to n words. Hashes are memory-mapped, 8 bytes each."""

    def __init__(self, folder: Path) -> None:
        self._hashes = {int(path.stem): np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}

    @staticmethod
    def save(texts: Iterable[str], n: int, folder: Path) -> tuple[int, int]:
        """Write the hashes; return the number of texts, and of those too short to be searched for."""
        hashes, count, short = defaultdict[int, list[np.ndarray]](list), 0, 0
        for count, words in enumerate(map(words_of, texts), 1):  # noqa: B007
            length = min(n, len(words))
            short += length < min(n, SHORTEST)
            if length >= min(n, SHORTEST):
                hashes[length].append(np.unique(ngram_hashes(words, length)))
        folder.mkdir(exist_ok=True)
        for length, found in hashes.items():
            np.save(folder / f"{length:03d}.npy", np.unique(np.concatenate(found)))
        return count, short

    def check(self, text: str) -> None:
        """Raise BadSample (`contaminated`) if the text contains an n-gram of an evaluation text."""
        words = words_of(text)
        for length, known in self._hashes.items():
            found = ngram_hashes(words, length)
            index = np.minimum(np.searchsorted(known, found), len(known) - 1)
            if (hits := np.flatnonzero(known[index] == found)).size:
                ngram = " ".join(words[hits[0] : hits[0] + length])
                raise BadSample("contaminated", f"{length} words of an evaluation text: {ngram!r}")
