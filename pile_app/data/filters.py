"""The steps of `pile prepare` that judge or mend one document, each a function of the document and its options alone.

    Document ──► repair, clean, quality, decontamination ──► Document, or BadSample(reason)
                 sizes, aspect, duration, silence, resampling, re-encoding

Texts: `repair_text` (ftfy), `clean_text` (in `text.py`), `QUALITY` (rules of Gopher and C4 that hold for any language that
writes spaces), `EvaluationTexts` (n-gram overlap), `minhash` (what near-duplicates are found by).
Media: everything is decoded once; what is too small, too long or silent is rejected; what has to be smaller, or of another rate
or format, is encoded anew.

Rules of quality and near-duplicates are for documents of text alone: a caption is short and may well be repeated.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.data.order import mix64
from pile_app.data.shards import map_arrays, save_arrays
from pile_app.data.text import clean_text
from pile_app.documents import (
    AUDIO,
    IMAGE,
    TEXT,
    BadSample,
    Document,
    Segment,
    audio_size,
    decode_audio,
    decode_image,
    image_size,
)

if TYPE_CHECKING:
    from pile_app.data.options import Options


def require(module: str, extra: str, purpose: str) -> Any:
    """Imports a library of an extra. Raises `ValueError` with the command that installs it where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f'{purpose} needs {module}: pip install "pile-app[{extra}]"') from error


def apply_steps(document: Document, options: Options, evaluation: EvaluationTexts | None = None) -> Document:
    """The document as it will be stored.

    Raises:
        BadSample: `encoded_segment`, `empty_text`, a rule's own reason, or what `decode_image` and `decode_audio` raise.
    """
    if any(segment.is_encoded for segment in document.segments):
        raise BadSample("encoded_segment", "it holds token ids: prepare the shards that they were made from")
    segments = tuple(_STEPS[segment.modality](segment, options) for segment in document.segments)
    if len(segments) == 1 and segments[0].modality == TEXT:
        for name in options.quality:
            segments = (replace(segments[0], data=QUALITY[name](segments[0].text)),)
    for segment in segments:
        if segment.modality == TEXT:
            if not segment.text or segment.text.isspace():
                raise BadSample("empty_text", "the text is empty or only whitespace")
            if evaluation is not None:
                evaluation.check(segment.text)
    return replace(document, segments=segments)


def _text_step(segment: Segment, options: Options) -> Segment:
    text = segment.text
    if options.repair:
        text = repair_text(text)
    if options.clean:
        text = clean_text(text)
    return segment if text is segment.data else replace(segment, data=text)


# -- repair

# A code point that one of ftfy's fixers changes or removes whatever stands around it, or an HTML entity may begin.
_FIXED_ALONE = re.compile("[&\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]")
# ASCII far from all else. ftfy's sign of mojibake takes at most 7 characters, one of them not ASCII.
_FAR_ASCII = re.compile("(?<=[\x00-\x7f]{7})[\x00-\x7f]+(?=[\x00-\x7f]{7})")


def may_need_repair(text: str) -> bool:
    """False where `repair_text` would surely change nothing. ftfy takes tens of times as long to find that out."""
    if _FIXED_ALONE.search(text):
        return True
    return not text.isascii() and bool(_badness().search(_FAR_ASCII.sub("", text)))


def repair_text(text: str) -> str:
    """Undoes mojibake, HTML entities in plain text, terminal escapes and stray control characters with ftfy (Speer 2019).

    Typography is left alone: quotes, ligatures and full-width characters are no damage. Repairing twice changes nothing.
    """
    if not may_need_repair(text):
        return text
    ftfy = require("ftfy", "prepare", "repairing text")
    return ftfy.fix_text(text, _ftfy_config())


@lru_cache(1)
def _ftfy_config() -> Any:
    ftfy = require("ftfy", "prepare", "repairing text")
    kept = ("fix_latin_ligatures", "fix_character_width", "uncurl_quotes", "fix_line_breaks")
    return ftfy.TextFixerConfig(explain=False, normalization=None, **dict.fromkeys(kept, False))


@lru_cache(1)
def _badness() -> re.Pattern[str]:
    return require("ftfy.badness", "prepare", "repairing text").BADNESS_RE


# -- quality

_BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf", "\u25aa", "\u2219", "\u00b7", "- ", "* ")
_ELLIPSES = ("...", "\u2026")
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def gopher(text: str) -> str:
    """The text, if it keeps the rules of MassiveText (Rae et al. 2021, arXiv:2112.11446, section A.1.1 and table A1).

    Left out: two of eight English stop words.

    Raises:
        BadSample: `gopher_...`, the first rule that is broken.
    """
    words = text.split()
    count = len(words)
    if not 50 <= count <= 100_000:
        raise BadSample("gopher_word_count", f"{count:,} words; 50 to 100,000 pass")
    length = sum(map(len, words)) / count
    if not 3 <= length <= 10:
        raise BadSample("gopher_word_length", f"words of {length:.2f} characters on average; 3 to 10 pass")
    symbols = max(text.count("#"), text.count("...") + text.count("\u2026")) / count
    _at_most("gopher_symbols", 0.1, symbols, "hashes or ellipses a word")
    lines = [line for line in text.split("\n") if line.strip()]
    _at_most("gopher_bullet_lines", 0.9, _share(line.lstrip().startswith(_BULLETS) for line in lines), "lines with a bullet")
    _at_most(
        "gopher_ellipsis_lines", 0.3, _share(line.rstrip().endswith(_ELLIPSES) for line in lines), "lines with an ellipsis"
    )
    alphabetic = _share(any(map(str.isalpha, word)) for word in words)
    if alphabetic < 0.8:
        raise BadSample("gopher_alphabetic", f"{alphabetic:.3f} of the words hold a letter; at least 0.8 pass")
    paragraphs = [one for one in re.split(r"\n{2,}", text.strip()) if one]
    for name, parts, most_characters in (("line", lines, 0.2), ("paragraph", paragraphs, 0.2)):
        repeated = _repeated(parts)
        _at_most(f"gopher_duplicate_{name}s", 0.3, len(repeated) / len(parts), f"{name}s that were there before")
        characters = sum(map(len, repeated)) / len(text)
        _at_most(f"gopher_duplicate_{name}s", most_characters, characters, f"characters in {name}s that were there before")
    for n, most in TOP_NGRAMS.items():
        ngram, times = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
        if times > 1:
            share = times * len(" ".join(ngram)) / len(text)
            _at_most("gopher_top_ngram", most, share, f"characters in the most frequent {n}-gram")
    for n, most in DUPLICATE_NGRAMS.items():
        share = _duplicate_characters(words, n) / len(text)
        if not share:
            break  # where no 5-gram is repeated, no 6-gram is
        _at_most("gopher_duplicate_ngram", most, share, f"characters in repeated {n}-grams")
    return text


def _at_most(reason: str, most: float, value: float, what: str) -> None:
    if value > most:
        raise BadSample(reason, f"{value:.3f} {what}; at most {most:g} pass")


def _share(claims: Iterable[bool]) -> float:
    values = list(claims)
    return sum(values) / len(values)


def _repeated(parts: list[str]) -> list[str]:
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def _duplicate_characters(words: list[str], n: int) -> int:
    """Characters in n-grams that were there before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    characters = at = 0
    while at <= len(words) - n:
        ngram = tuple(words[at : at + n])
        if ngram in seen:
            characters += len(" ".join(ngram))
            at += n
        else:
            seen.add(ngram)
            at += 1
    return characters


_SENTENCE = re.compile(r"[^\s.!?\u2026\u3002\uff01\uff1f\u0964\u061f][.!?\u2026\u3002\uff01\uff1f\u0964\u061f]+")
_CITATION = re.compile(r"\[\d+\]")


def c4(text: str) -> str:
    """The text in the form of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2; numbers as in its code, `c4_utils.py`).

    Lines of fewer than 5 words, with a word of more than 1000 characters, or that name Javascript go, and so do citation marks
    as `[1]`. Left out: lines without English terminal punctuation, English phrases of policies, bad words, repeated spans of
    three sentences over the whole data set.

    Raises:
        BadSample: `c4_...`, the first rule that is broken.
    """
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        raise BadSample("c4_lorem_ipsum", "the text holds 'lorem ipsum'")
    if "{" in text:
        raise BadSample("c4_curly_bracket", "the text holds a curly bracket, as code does")
    lines = [line for line in _CITATION.sub("", text).split("\n") if not line.strip() or _is_prose(line)]
    kept = re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip()
    sentences = len(_SENTENCE.findall(kept))
    if sentences < 3:
        raise BadSample("c4_sentences", f"{sentences} sentences are left; at least 3 pass")
    return kept


def _is_prose(line: str) -> bool:
    words = line.split()
    return len(words) >= 5 and max(map(len, words)) <= 1000 and "javascript" not in line.lower()


QUALITY: dict[str, Callable[[str], str]] = {"gopher": gopher, "c4": c4}


# -- n-grams: near-duplicates and decontamination

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")
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


# -- media


def _image_step(segment: Segment, options: Options) -> Segment:
    height, width = image_size(segment.file)
    small, large = sorted((height, width))
    if small < options.min_image_size:
        raise BadSample("image_too_small", f"{width}x{height} pixels; min_image_size is {options.min_image_size}")
    if options.max_aspect and large > options.max_aspect * small:
        raise BadSample(
            "image_aspect", f"{width}x{height} pixels: aspect {large / small:.2f}; max_aspect is {options.max_aspect:g}"
        )
    decode_image(segment.file, 3, height, width)
    if options.image_max_size and large > options.image_max_size:
        return replace(segment, data=shrink_image(segment, options.image_max_size))
    return segment


_ENCODERS = {"jpg": ("JPEG", {"quality": 90}), "webp": ("WEBP", {"quality": 90}), "png": ("PNG", {})}


def shrink_image(segment: Segment, size: int) -> bytes:
    """The file of an image, no side longer than `size`, in its own format; turned as EXIF says, without metadata."""
    from PIL import Image, ImageOps

    name, parameters = _ENCODERS[segment.extension.replace("jpeg", "jpg")]
    with Image.open(io.BytesIO(segment.file)) as file:
        file.draft(None, (2 * size, 2 * size))  # a JPEG may decode to a half, a quarter ... of its size
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            transparent = image.mode == "PA" or "transparency" in image.info
            image = image.convert("RGBA" if transparent else "RGB")
        if name == "JPEG" and image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        image.info = {}
        written = io.BytesIO()
        image.save(written, name, **parameters)
    return written.getvalue()


def _audio_step(segment: Segment, options: Options) -> Segment:
    samples, rate = audio_size(segment.file)
    seconds = samples / rate
    if seconds > options.max_audio_seconds:
        raise BadSample("audio_too_long", f"{seconds:,.1f} seconds; max_audio_seconds is {options.max_audio_seconds:g}")
    if seconds < options.min_audio_seconds:
        raise BadSample("audio_too_short", f"{seconds:,.3f} seconds; min_audio_seconds is {options.min_audio_seconds:g}")
    target = options.resample or rate
    with _one_thread(target != rate):
        waveform = decode_audio(segment.file, target)
    if options.silence is not None:
        level = 20 * math.log10(max(float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))), 1e-9))
        if level < options.silence:
            raise BadSample("silent_audio", f"{level:.1f} dB of full scale on average (RMS); silence is {options.silence:g}")
    own = segment.extension
    wanted = options.audio_format or (own if target == rate or own == "wav" else "flac")
    if target == rate and wanted == own:
        return segment
    return Segment.from_audio(waveform, target, wanted, segment.loss)


@contextmanager
def _one_thread(needed: bool) -> Iterator[None]:
    """PyTorch computes with one thread inside: the same bits everywhere, and processes that do not fight over cores."""
    if not needed:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_STEPS: dict[int, Callable[[Segment, Any], Segment]] = {TEXT: _text_step, IMAGE: _image_step, AUDIO: _audio_step}
