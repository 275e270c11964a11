"""Named entities of a text: words, spans and BIO tags, and from each to the other.

A tagged document is one text whose `meta` holds `spans`, [start, stop, type] in characters, in order and apart from each other,
and, where the text came as words, `words`, [start, stop] of each; else the words are those of `word_places`.

Tags are numbers, K = 1 + 2 x types of them: 0 outside, 1 + 2t begins an entity of type t, 2 + 2t goes on with it (BIO, also
called IOB2).
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.tokenizers import Tokenizer

OUTSIDE = 0
# Scripts that do not write spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
Place = tuple[int, int]  # [start, stop) in characters


class Span(NamedTuple):
    """An entity: [start, stop) in characters."""

    start: int
    stop: int
    type: str


def word_places(text: str) -> list[Place]:
    """The words of a text that came without any, [start, stop) in characters.

    A word is a URL, an @name or #tag, letters and digits with `-`, `.` or `&` within (`U.S`, `AT&T`, `10.5`), an apostrophe
    with what follows (`'s`), a single character of a script without spaces, or a run of one other sign (`...`).
    """
    return [found.span() for found in _word().finditer(text)]


@lru_cache(1)
def _word() -> re.Pattern[str]:
    # `\w` leaves out the marks that vowels of Indic scripts and accents are.
    marks = "".join(chr(code) for code in range(0x300, 0x1E950) if unicodedata.category(chr(code))[0] == "M")
    letter = rf"(?:[^\W{UNSPACED}][{marks}]*)"
    return re.compile(
        rf"https?://\S+|[@#]?{letter}+(?:[-.&]{letter}+)*|['\u2019]{letter}+|[{UNSPACED}][{marks}]*|(\S)\1*[{marks}]*"
    )


def document_words(text: str, meta: Mapping[str, Any]) -> list[Place]:
    """Of a tagged document: those that it names, else its `word_places`."""
    return [(start, stop) for start, stop in meta["words"]] if "words" in meta else word_places(text)


def tags_of_words(words: Sequence[Place], spans: Iterable[Sequence[Any]], types: Sequence[str]) -> np.ndarray:
    """(words,) int32 tags.

    Raises:
        ValueError: a span is of no type of `types`, or does not begin and end with words.
    """
    tags = np.zeros(len(words), np.int32)
    starts, stops = [start for start, _ in words], [stop for _, stop in words]
    for start, stop, name in spans:
        first, last = bisect_left(starts, start), bisect_right(stops, stop)
        if name not in types:
            raise ValueError(f"the span [{start}, {stop}) has the type {name!r}, model.objective.types names {list(types)}")
        if first >= last or starts[first] != start or stops[last - 1] != stop or tags[first:last].any():
            raise ValueError(
                f"the span [{start}, {stop}) of type {name!r} does not begin and end with words, or lies in another: "
                "`pile prepare --kind entities` mends such spans, or says why not"
            )
        tags[first], tags[first + 1 : last] = 1 + 2 * types.index(name), 2 + 2 * types.index(name)
    return tags


def spans_of_words(words: Sequence[Place], tags: Sequence[int], types: Sequence[str]) -> list[Span]:
    """The inverse, of tags that are valid BIO."""
    spans: list[Span] = []
    for (start, stop), tag in zip(words, tags, strict=True):
        if tag % 2:
            spans.append(Span(start, stop, types[tag // 2]))
        elif tag:
            spans[-1] = spans[-1]._replace(stop=stop)
    return spans


def last_tokens(text: str, words: Sequence[Place], tokenizer: Tokenizer) -> np.ndarray:
    """(words,) number of the token of `text` in which each word ends, increasing, with any tokenizer.

    Words that end in one and the same token have equal numbers.
    """
    # Tokens that end by a place are what the tokenizer counts before it. Where one ends with the word it is the last of those,
    # else the one that reaches over the end of the word, and so over its last character.
    breaks = sorted({place for _, stop in words for place in (stop - 1, stop)})
    ids, before = tokenizer.encode_all([text], [breaks])[0]
    count = dict(zip(breaks, before.tolist(), strict=True))
    last = np.array([max(count[stop] - 1, count[stop - 1]) for _, stop in words], np.int64)
    return np.minimum(last, len(ids) - 1)


def merge_words(last: np.ndarray, words: Sequence[Place], tags: np.ndarray) -> tuple[np.ndarray, list[Place], np.ndarray]:
    """(U,) tokens, [start, stop) and (U,) tags of the words, those that end in one token as one: a token has one tag.

    It is the tag of the first of them that is in an entity; what then begins without a beginning begins there.
    """
    first = np.flatnonzero(np.diff(last, prepend=-1)).tolist()
    if len(first) == len(words):
        return last, list(words), tags
    stop = [*first[1:], len(words)]
    merged = [next((tag for tag in tags[a:b].tolist() if tag), OUTSIDE) for a, b in zip(first, stop, strict=True)]
    for place, tag in enumerate(merged):
        if tag and tag % 2 == 0 and (place == 0 or (merged[place - 1] + 1) // 2 != tag // 2):
            merged[place] = tag - 1
    return last[first], [(words[a][0], words[b - 1][1]) for a, b in zip(first, stop, strict=True)], np.array(merged, np.int32)


_TAG = re.compile("(?:O|([BIESLU])-(.+))")


def spans_of_tags(sentence: Sequence[str], scheme: str = "BIO") -> tuple[list[tuple[int, int, str]], int]:
    """([first, stop) word and type of each entity, how many tags were mended) of tags in any of `SCHEMES`.

    What the scheme does not allow is read as conlleval reads it: an inside tag without a beginning begins an entity, and one
    without an end ends before what follows.

    Raises:
        ValueError: a tag is of none of the schemes.
    """
    found: list[tuple[int, int, str]] = []
    mended = 0
    is_open = False  # whether the entity before may go on
    for place, tag in enumerate(sentence):
        match = _TAG.fullmatch(tag)
        if match is None:
            raise ValueError(f"{tag!r} is no tag: O, or B-, I- (E-, S- or L-, U-) and a type")
        part, name = match.groups()
        goes_on = is_open and part in ("I", "E", "L") and found[-1][2] == name
        if goes_on:
            found[-1] = (found[-1][0], place + 1, name)
        else:
            mended += is_open and scheme == "BIOES"  # it had no end
            if part is not None:
                mended += part in ("I", "E", "L") and scheme != "IOB1"
                found.append((place, place + 1, name))
        is_open = part in ("B", "I")
    return found, mended + (is_open and scheme == "BIOES")


SCHEMES = ("BIO", "IOB1", "BIOES")


def scheme_of_tags(sentences: Iterable[Sequence[str]]) -> str:
    """BIOES (or BILOU) where its tags are used; IOB1 where B only ever parts an entity from one of the same type before it, and
    some entity has none; else BIO."""
    inside_first = begins_alone = False
    for tags in sentences:
        previous = "O"
        for tag in tags:
            if tag[:2] in ("E-", "S-", "L-", "U-"):
                return "BIOES"
            inside_first |= tag[:2] == "I-" and previous[2:] != tag[2:]
            begins_alone |= tag[:2] == "B-" and previous[2:] != tag[2:]
            previous = tag
    return "IOB1" if inside_first and not begins_alone else "BIO"
