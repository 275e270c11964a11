"""Words of a text, and tags of words: [start, stop) in characters, and BIO, IOB1 and BIOES (or BILOU) tags."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from pile_app.documents import BadSample

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
SCHEMES = ("BIO", "IOB1", "BIOES")
Offsets = tuple[int, int]  # [start, stop) in characters
_TAG = re.compile("(?:O|([BIESLU])-(.+))")


def word_offsets(text: str) -> list[Offsets]:
    """Split a text into words.

    A word is a URL, an @name or #tag, letters and digits with `-`, `.` or `&` within (`U.S`, `AT&T`, `10.5`), an apostrophe
    with the letters after it (`'s`), a single character of a script without spaces, or a run of another sign (`...`).
    """
    return [found.span() for found in _word().finditer(text)]


@lru_cache(1)
def _word() -> re.Pattern[str]:
    # `\w` has no combining marks: vowels of Indic scripts, accents.
    marks = "".join(chr(code) for code in range(0x300, 0x1E950) if unicodedata.category(chr(code))[0] == "M")
    letter = rf"(?:[^\W{UNSPACED}][{marks}]*)"
    return re.compile(
        rf"https?://\S+|[@#]?{letter}+(?:[-.&]{letter}+)*|['\u2019]{letter}+|[{UNSPACED}][{marks}]*|(\S)\1*[{marks}]*"
    )


def spans_of_tags(sentence: Sequence[str], scheme: str = "BIO") -> tuple[list[tuple[int, int, str]], int]:
    """Return ([first, stop) word and type of each entity, number of invalid tags) of tags in one of `SCHEMES`.

    Invalid tags are read as conlleval does: an inside tag without beginning begins an entity, and an entity without end tag
    ends before the next tag.

    Raises:
        BadSample: `unknown_tag`.
    """
    found: list[tuple[int, int, str]] = []
    invalid = 0
    is_open = False  # whether the last entity may continue
    for index, tag in enumerate(sentence):
        match = _TAG.fullmatch(tag)
        if match is None:
            raise BadSample("unknown_tag", f"{tag!r} is no tag: O, or B-, I- (E-, S- or L-, U-) and a type")
        part, name = match.groups()
        if is_open and part in ("I", "E", "L") and found[-1][2] == name:
            found[-1] = (found[-1][0], index + 1, name)
        else:
            invalid += is_open and scheme == "BIOES"  # without end tag
            if part is not None:
                invalid += part in ("I", "E", "L") and scheme != "IOB1"
                found.append((index, index + 1, name))
        is_open = part in ("B", "I")
    return found, invalid + (is_open and scheme == "BIOES")


def scheme_of_tags(sentences: Iterable[Sequence[str]]) -> str:
    """Recognize the scheme: BIOES (or BILOU) by its tags; IOB1 if B only separates an entity from one of the same type before
    it, and some entity begins with I; else BIO."""
    inside_first = begins_alone = False
    for tags in sentences:
        for previous, tag in zip(["O", *tags], tags, strict=False):
            if tag[:2] in ("E-", "S-", "L-", "U-"):
                return "BIOES"
            inside_first |= tag[:2] == "I-" and previous[2:] != tag[2:]
            begins_alone |= tag[:2] == "B-" and previous[2:] != tag[2:]
    return "IOB1" if inside_first and not begins_alone else "BIO"
