"""Rules by which `pile prepare` tells texts that are no prose: Gopher's and C4's, but for those that hold for English alone.

Each takes a text and returns it, maybe with lines left out, or raises `BadSample` with the rule that it breaks. They hold for
any language that writes spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from pile_app.documents import BadSample

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
