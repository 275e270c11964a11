"""Words of a text, and tags of words: [start, stop) in characters, and BIO, IOB1 and BIOES (or BILOU) tags."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from pile_app.documents import BadSample

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
Offsets = tuple[int, int]  # [start, stop) in characters
_TAG = re.compile("(?:O|([BIESLU])-(.+))")


def word_offsets(text: str) -> list[Offsets]:
    """Split a text into words: URLs, @names, #tags, letters and digits with `-`, `.` or `&` within (`U.S`, `AT&T`, `10.5`), an
    apostrophe with its letters (`'s`), single characters of scripts without spaces, and runs of any other sign (`...`)."""
    return [found.span() for found in _word().finditer(text)]


@lru_cache(1)
def _word() -> re.Pattern[str]:
    # `\w` has no combining marks: vowels of Indic scripts, accents.
    marks = "".join(chr(code) for code in range(0x300, 0x1E950) if unicodedata.category(chr(code))[0] == "M")
    letter = rf"(?:[^\W{UNSPACED}][{marks}]*)"
    word = rf"https?://\S+|[@#]?{letter}+(?:[-.&]{letter}+)*|['\u2019]{letter}+|[{UNSPACED}][{marks}]*|(\S)\1*[{marks}]*"
    return re.compile(word)


def spans_of_tags(sentence: Sequence[str], scheme: str = "BIO") -> tuple[list[tuple[int, int, str]], int]:
    """Return ([first, stop) word and type of each entity, number of invalid tags) of BIO, IOB1 or BIOES tags.

    As in conlleval, an inside tag without beginning begins an entity, and an entity without end tag ends before the next tag.
    Raises BadSample: `unknown_tag`."""
    found, invalid, is_open = list[tuple[int, int, str]](), 0, False  # is_open: the last entity may continue
    for index, tag in enumerate(sentence):
        if (match := _TAG.fullmatch(tag)) is None:
            raise BadSample("unknown_tag", f"{tag!r} is no tag: O, or B-, I- (E-, S- or L-, U-) and a type")
        part, name = match.groups()
        if is_open and part in ("I", "E", "L") and found[-1][2] == name:
            found[-1] = (found[-1][0], index + 1, name)
        else:
            invalid += (is_open and scheme == "BIOES") + (part in ("I", "E", "L") and scheme != "IOB1")
            found += [(index, index + 1, name)] if part else []
        is_open = part in ("B", "I")
    return found, invalid + (is_open and scheme == "BIOES")


def scheme_of_tags(sentences: Iterable[Sequence[str]]) -> str:
    """Recognize BIOES (or BILOU) by its tags; IOB1 if some entity begins with I, and B only separates entities of a type; else
    BIO."""
    inside_first = begins_alone = False
    for tags in sentences:
        for previous, tag in zip(["O", *tags], tags, strict=False):
            if tag[:2] in ("E-", "S-", "L-", "U-"):
                return "BIOES"
            inside_first |= tag[:2] == "I-" and previous[2:] != tag[2:]
            begins_alone |= tag[:2] == "B-" and previous[2:] != tag[2:]
    return "IOB1" if inside_first and not begins_alone else "BIO"
