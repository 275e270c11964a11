"""Quality rules for prose: those of Gopher and C4, without the rules that only hold for English.

A rule takes a text and returns it, possibly without some lines, or raises `BadSample` with the rule that was broken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import fmean

from pile_app.documents import BadSample

_BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf", "\u25aa", "\u2219", "\u00b7", "- ", "* ")
_ELLIPSES = ("...", "\u2026")
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_SENTENCE = re.compile(r"[^\s.!?\u2026\u3002\uff01\uff1f\u0964\u061f][.!?\u2026\u3002\uff01\uff1f\u0964\u061f]+")


def gopher(text: str) -> str:
    """Apply the rules of MassiveText (Rae et al. 2021, arXiv:2112.11446, section A.1.1 and table A1), except the rule
    about English stop words. Raises BadSample: `gopher_...`, the first rule that is broken."""
    for rule, value, least, most, what in _gopher_figures(text, text.split()):
        if not least <= value <= most:
            raise BadSample(f"gopher_{rule}", f"{value:,.5g} {what}; {least:g} to {most:,g} are accepted")
    return text


def _gopher_figures(text: str, words: list[str]) -> Iterator[tuple[str, float, float, float, str]]:
    """Yield (rule, value, least, most, what), each computed only if the rules before it hold."""
    count = len(words)
    yield "word_count", count, 50, 100_000, "words"
    yield "word_length", sum(map(len, words)) / count, 3, 10, "characters per word"
    symbols = max(text.count("#"), text.count("...") + text.count("\u2026"))
    yield "symbols", symbols / count, 0, 0.1, "hashes or ellipses per word"
    lines = [line for line in text.split("\n") if line.strip()]
    yield "bullet_lines", fmean(line.lstrip().startswith(_BULLETS) for line in lines), 0, 0.9, "of the lines have a bullet"
    yield "ellipsis_lines", fmean(line.rstrip().endswith(_ELLIPSES) for line in lines), 0, 0.3, "of the lines have an ellipsis"
    yield "alphabetic", fmean(any(map(str.isalpha, word)) for word in words), 0.8, 1, "of the words have a letter"
    paragraphs = [part for part in re.split(r"\n{2,}", text.strip()) if part]
    for name, parts in (("duplicate_lines", lines), ("duplicate_paragraphs", paragraphs)):
        repeated = {part: times - 1 for part, times in Counter(parts).items()}
        yield name, sum(repeated.values()) / len(parts), 0, 0.3, "of them are repeated"
        yield name, sum(len(part) * times for part, times in repeated.items()) / len(text), 0, 0.2, "of the characters"
    for n, most in TOP_NGRAMS.items():
        ngram, times = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
        characters = times * len(" ".join(ngram)) if times > 1 else 0
        yield "top_ngram", characters / len(text), 0, most, f"of the characters are in the most frequent {n}-gram"
    for n, most in DUPLICATE_NGRAMS.items():
        fraction = _duplicate_characters(words, n) / len(text)
        yield "duplicate_ngram", fraction, 0, most, f"of the characters are in repeated {n}-grams"
        if not fraction:
            return  # without a repeated 5-gram there is no repeated 6-gram


def _duplicate_characters(words: list[str], n: int) -> int:
    """Count the characters in n-grams that were seen before, none twice."""
    seen, characters, index = set[tuple[str, ...]](), 0, 0
    while index <= len(words) - n:
        ngram = tuple(words[index : index + n])
        characters += len(" ".join(ngram)) if ngram in seen else 0
        index += n if ngram in seen else 1
        seen.add(ngram)
    return characters


def c4(text: str) -> str:
    """Apply the rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2; numbers as in its code, `c4_utils.py`).

    Lines of fewer than 5 words, with a word of more than 1000 characters, or that name Javascript are removed, as are citation
    marks such as `[1]`. English terminal punctuation, policy phrases, bad words and repeated spans of sentences are not judged.
    Raises BadSample: `c4_...`, the first rule that is broken."""
    if "lorem ipsum" in text.lower():
        raise BadSample("c4_lorem_ipsum", "the text contains 'lorem ipsum'")
    if "{" in text:
        raise BadSample("c4_curly_bracket", "the text contains a curly bracket, as code does")
    lines = [line for line in re.sub(r"\[\d+\]", "", text).split("\n") if not line.strip() or _is_prose(line)]
    kept = re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip()
    if (sentences := len(_SENTENCE.findall(kept))) < 3:
        raise BadSample("c4_sentences", f"{sentences} sentences remain; at least 3 are needed")
    return kept


def _is_prose(line: str) -> bool:
    words = line.split()
    return len(words) >= 5 and max(map(len, words)) <= 1000 and "javascript" not in line.lower()


QUALITY: dict[str, Callable[[str], str]] = {"gopher": gopher, "c4": c4}
