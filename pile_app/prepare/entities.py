"""Texts with named entities: words, tags of words (BIO, IOB1, BIOES or BILOU), and published data sets of them.

CoNLL files have a word and its tag in each line; records have `text` with `spans` or `entities`, or `tokens` with `ner_tags` or
`tags`. They become documents as `tasks/tagging.py` describes. Offsets are [start, stop) in characters. Errors with a single
reading are repaired: invalid tags, spans that end in whitespace or within a word, duplicate spans."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any, BinaryIO

from pile_app.documents import BadSample, Document, Segment
from pile_app.fields import is_texts
from pile_app.prepare.files import MAX_LINE_BYTES, decode_text, lines_of

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
Offsets = tuple[int, int]  # [start, stop) in characters
_TAG = re.compile("(?:O|([BIESLU])-(.+))")
SPAN_FIELDS = ("spans", "entities")
TAG_FIELDS = ("ner_tags", "tags")
KEYS = {"start", "end", "label"}  # of a span
Clean = Callable[[str], str]
Sentence = tuple[int, list[str], list[str]] | tuple[int, BadSample]  # number of the first line, words and tags


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


# -- published data sets


def sentences_of_conll(file: BinaryIO) -> Iterator[Sentence]:
    """Yield the sentences, which blank lines or `-DOCSTART-` separate; words are in the first column, tags in the last."""
    first, size, error, rows = 0, 0, None, list[list[str]]()
    for number, line in enumerate(chain(lines_of(file), [b""]), start=1):
        try:
            if isinstance(line, BadSample):
                raise line
            text = decode_text(line).rstrip("\r\n")
            if not text.strip() or text.startswith("-DOCSTART-"):
                if error or rows:
                    yield (first, error) if error else (first, [row[0] for row in rows], [row[-1] for row in rows])
                first, size, error, rows = 0, 0, None, []
                continue
            columns = [column.strip() for column in text.split("\t" if "\t" in text else None)]
            if not rows and columns[0] == "#" and len(columns) > 2:
                continue  # CoNLL-U's "# sent_id = 1"
            size += len(text)
            if len(columns) < 2 or not columns[0]:
                raise BadSample("no_tag", f"line {number} holds {text!r:.100}, not a word and its tag")
            if size > MAX_LINE_BYTES:
                raise BadSample("line_too_long", f"a sentence is longer than {MAX_LINE_BYTES:,} bytes")
            rows += [columns] if error is None else []
        except BadSample as found:
            error = error or found
        first = first or number


def document_of_words(words: Sequence[str], tags: Sequence[str], scheme: str, clean: Clean) -> tuple[Document, bool]:
    """Return the document, and whether tags were repaired. Raises `BadSample`: `no_tag`, `unknown_tag` or `moved_spans`."""
    if len(words) != len(tags):
        raise BadSample("no_tag", f"{len(words)} words and {len(tags)} tags")
    kept = [(word.strip(), tag) for word, tag in zip(words, tags, strict=True) if word.strip()]
    found, invalid = spans_of_tags([tag for _, tag in kept], scheme)
    ends = accumulate(len(word) + 1 for word, _ in kept)
    offsets = [(end - 1 - len(word), end - 1) for (word, _), end in zip(kept, ends, strict=True)]
    spans = [[offsets[first][0], offsets[stop - 1][1], name] for first, stop, name in found]
    return _document(" ".join(word for word, _ in kept), spans, offsets, clean), bool(invalid)


def document_of_spans(text: str, given: Sequence[Any], clean: Clean) -> tuple[Document, bool]:
    """Return the document, and whether spans were repaired. Raises `BadSample`: `invalid_span`, `overlapping_spans` ..."""
    asked = [_span(text, span) for span in given]
    trimmed = [(stop - len(text[start:stop].lstrip()), start + len(text[start:stop].rstrip()), name)
               for start, stop, name in asked]  # fmt: skip
    document = _document(text, [list(span) for span in sorted(set(trimmed))], None, clean)
    words = word_offsets(document.segments[0].text)
    starts, stops = [start for start, _ in words], [stop for _, stop in words]
    spans = [[starts[bisect_right(starts, start) - 1], stops[bisect_left(stops, stop)], name]
             for start, stop, name in document.meta["spans"]]  # fmt: skip
    for left, right in pairwise(spans):
        if right[0] < left[1]:
            raise BadSample("overlapping_spans", f"{left} and {right}: one contains the other, or they share a word")
    repaired = trimmed != asked or len(spans) < len(asked) or spans != document.meta["spans"]
    return Document(document.segments, meta={"spans": spans}), repaired


def document_of_record(record: Mapping[str, Any], clean: Clean) -> tuple[Document, bool] | None:
    """Read a tagged record; None if it has another layout. Raises `BadSample`."""
    spans, tags = (next((record[name] for name in names if isinstance(record.get(name), list)), None)
                   for names in (SPAN_FIELDS, TAG_FIELDS))  # fmt: skip
    words, text = record.get("tokens"), record.get("text")
    if tags is not None and is_texts(words):
        if any(isinstance(tag, int) for tag in tags):
            raise BadSample("unknown_tag", "its tags are numbers without names: write names, such as B-person")
        return document_of_words(words, list(map(str, tags)), scheme_of_tags([list(map(str, tags))]), clean)  # type: ignore[arg-type]
    if spans is None or not isinstance(text, str):
        return None
    are_spans = (span.keys() >= KEYS if isinstance(span, dict) else isinstance(span, list) and len(span) == 3 for span in spans)
    return document_of_spans(text, spans, clean) if all(are_spans) else None


def _span(text: str, span: Any) -> tuple[int, int, str]:
    start, stop, name = [span["start"], span["end"], span["label"]] if isinstance(span, dict) else span
    if (type(start), type(stop), type(name)) != (int, int, str) or not name:
        raise BadSample("invalid_span", f"{span!r:.100} is not a start, an end and a label")
    if not 0 <= start < stop <= len(text) or text[start:stop].isspace():
        raise BadSample("invalid_span", f"{span!r:.100} is empty or out of range in a text of {len(text)} characters")
    return start, stop, name


def _document(text: str, spans: list[list[Any]], words: list[Offsets] | None, clean: Clean) -> Document:
    """Clean the text and move the offsets with their characters. Raises `BadSample`: `moved_spans` if that is ambiguous."""
    cleaned = clean(text)
    if cleaned != text:
        offsets = sorted({offset for start, stop, *_ in [*spans, *(words or [])] for offset in (start, stop)})
        # A character of private use, which the text does not hold, goes through the cleaning at each offset.
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        parts = clean(mark.join(text[a:b] for a, b in pairwise([0, *offsets, len(text)]))).split(mark)
        if len(parts) != len(offsets) + 1 or "".join(parts) != cleaned:
            raise BadSample("moved_spans", "cleaning or repair changes the text across the border of a word or span")
        moved = dict(zip(offsets, accumulate(map(len, parts)), strict=False))
        spans = [[moved[start], moved[stop], name] for start, stop, name in spans if moved[start] < moved[stop]]
        words = words and [(moved[start], moved[stop]) for start, stop in words if moved[start] < moved[stop]]
    meta = {"spans": spans} | ({"words": [list(word) for word in words]} if words is not None else {})
    return Document((Segment(cleaned),), meta=meta)
