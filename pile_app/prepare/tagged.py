"""Texts with named entities, as they are published, to tagged documents (see `data/entities.py`).

* CoNLL files: a word a line, its tag in the last column, a blank line after each sentence; BIO (IOB2), IOB1, BIOES and BILOU.
  A sentence is a document, its words with a space between. Lines of `-DOCSTART-` are passed over.
* Records (JSON lines, Parquet): `text` with `spans` or `entities`, each {"start", "end", "label"} or [start, end, label] in
  characters; or `tokens` with `ner_tags` or `tags`, names as above.

What is wrong and has one reading is mended, and what was is told by the layout that the summary counts: tags that their scheme
does not allow, spans with blanks at their ends, spans that end within a word, which they then take in whole, the same span
twice. Spans out of range, overlapping, or of no type reject the document.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, BinaryIO

from pile_app.data.entities import Place, scheme_of_tags, spans_of_tags, word_places
from pile_app.documents import BadSample, Document, Segment
from pile_app.prepare.files import MAX_LINE_BYTES, decode, lines_of

SPAN_FIELDS = ("spans", "entities")
TAG_FIELDS = ("ner_tags", "tags")
MAX_SENTENCE_BYTES = MAX_LINE_BYTES
Mend = Callable[[str], str]


def sentences_of_conll(file: BinaryIO) -> Iterator[tuple[int, list[str], list[str]] | tuple[int, BadSample]]:
    """(number of the first line, words, tags) of each sentence, or why it cannot be read."""
    first, words, tags = 0, [], []  # type: ignore[var-annotated]
    trouble: BadSample | None = None
    size = 0
    for number, line in enumerate(chain(lines_of(file), [b""]), start=1):
        try:
            if isinstance(line, BadSample):
                raise line
            text = decode(line).rstrip("\r\n")
        except BadSample as error:
            first, trouble = first or number, trouble or error
            continue
        if not text.strip() or text.startswith("-DOCSTART-"):
            if trouble is not None:
                yield first, trouble
            elif words:
                yield first, words, tags
            first, words, tags, trouble, size = 0, [], [], None, 0
            continue
        columns = text.split("\t") if "\t" in text else text.split()
        if not words and columns[0] == "#" and len(columns) > 2:
            continue  # CoNLL-U's "# sent_id = 1"
        first, size = first or number, size + len(text)
        if len(columns) < 2 or not columns[0].strip():
            trouble = trouble or BadSample("no_tag", f"line {number} holds {text!r:.100}: a word and its tag are wanted")
        elif size > MAX_SENTENCE_BYTES:
            trouble = trouble or BadSample("line_too_long", f"a sentence is longer than {MAX_SENTENCE_BYTES:,} bytes")
        else:
            words.append(columns[0].strip())
            tags.append(columns[-1].strip())


def scheme_of_conll(file: BinaryIO) -> str:
    return scheme_of_tags(sentence[2] for sentence in sentences_of_conll(file) if len(sentence) == 3)


def document_of_words(words: Sequence[str], tags: Sequence[str], scheme: str, mend: Mend) -> tuple[Document, bool]:
    """The document, and whether tags were mended.

    Raises:
        BadSample: `no_tag` where there are more of one than of the other, `unknown_tag`, or what `_mended` raises.
    """
    if len(words) != len(tags):
        raise BadSample("no_tag", f"{len(words)} words and {len(tags)} tags")
    try:
        found, mended = spans_of_tags(tags, scheme)
    except ValueError as error:
        raise BadSample("unknown_tag", str(error)) from error
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    spans = [[places[first][0], places[stop - 1][1], name] for first, stop, name in found]
    return _document(" ".join(words), spans, places, mend), bool(mended)


def document_of_spans(text: str, given: Sequence[Any], mend: Mend) -> tuple[Document, bool]:
    """The document, and whether spans were mended.

    Raises:
        BadSample: `invalid_span`, `overlapping_spans`, or what `_mended` raises.
    """
    asked = [_span(text, one) for one in given]
    trimmed = [_trimmed(text, *one) for one in asked]
    document = _document(text, [list(span) for span in sorted(set(trimmed))], None, mend)
    words = word_places(document.segments[0].text)
    starts, stops = [start for start, _ in words], [stop for _, stop in words]
    spans = [
        [starts[bisect_right(starts, start) - 1], stops[bisect_left(stops, stop)], name]
        for start, stop, name in document.meta["spans"]
    ]
    for one, other in pairwise(spans):
        if other[0] < one[1]:
            raise BadSample("overlapping_spans", f"{one} and {other}: an entity lies in another, or shares a word with it")
    changed = trimmed != asked or len(spans) < len(asked) or spans != document.meta["spans"]
    return Document(document.segments, meta={"spans": spans}), changed


def document_of_record(record: dict[str, Any], mend: Mend) -> tuple[Document, bool] | None:
    """Of a record that is tagged; None for one of another layout. Raises what the two above raise."""
    tags = next((record[name] for name in TAG_FIELDS if isinstance(record.get(name), list)), None)
    words = record.get("tokens")
    if tags is not None and isinstance(words, list) and all(isinstance(word, str) for word in words):
        if any(isinstance(tag, int) for tag in tags):
            raise BadSample("unknown_tag", "its tags are numbers that nothing names: write names, such as B-person")
        names = [tag if isinstance(tag, str) else repr(tag) for tag in tags]
        kept = [(word.strip(), tag) for word, tag in zip(words, names, strict=False) if word.strip()]
        if len(words) != len(tags):
            raise BadSample("no_tag", f"{len(words)} words and {len(tags)} tags")
        return document_of_words([word for word, _ in kept], [tag for _, tag in kept], scheme_of_tags([names]), mend)
    spans = next((record[name] for name in SPAN_FIELDS if isinstance(record.get(name), list)), None)
    if spans is not None and isinstance(record.get("text"), str) and all(map(_is_span, spans)):
        return document_of_spans(record["text"], spans, mend)
    return None


def _is_span(one: Any) -> bool:
    return {"start", "end", "label"} <= one.keys() if isinstance(one, dict) else isinstance(one, list) and len(one) == 3


def _span(text: str, one: Any) -> tuple[int, int, str]:
    start, stop, name = (one["start"], one["end"], one["label"]) if isinstance(one, dict) else one
    if not (isinstance(start, int) and isinstance(stop, int) and isinstance(name, str) and name):
        raise BadSample("invalid_span", f"{one!r:.100} is not a start, an end and a label")
    if not 0 <= start < stop <= len(text) or text[start:stop].isspace():
        raise BadSample("invalid_span", f"{one!r:.100} holds nothing of a text of {len(text)} characters")
    return start, stop, name


def _trimmed(text: str, start: int, stop: int, name: str) -> tuple[int, int, str]:
    inside = text[start:stop]
    return stop - len(inside.lstrip()), start + len(inside.rstrip()), name


def _document(text: str, spans: list[list[Any]], words: list[Place] | None, mend: Mend) -> Document:
    """With text mended, and places moved to where their characters are then.

    Raises:
        BadSample: `moved_spans` where that cannot be said.
    """
    mended = mend(text)
    if mended != text:
        places = sorted({place for start, stop, *_ in [*spans, *(words or [])] for place in (start, stop)})
        moved = dict(zip(places, _moved(text, places, mend), strict=True))
        spans = [[moved[start], moved[stop], name] for start, stop, name in spans if moved[start] < moved[stop]]
        words = words and [(moved[start], moved[stop]) for start, stop in words if moved[start] < moved[stop]]
    meta = {"spans": spans} | ({"words": [list(word) for word in words]} if words is not None else {})
    return Document((Segment(mended),), meta=meta)


def _moved(text: str, places: Sequence[int], mend: Mend) -> list[int]:
    """Where the places of a text are in `mend(text)`: a mark at each goes through with it."""
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)  # of private use: nobody's character
    cuts = [0, *places, len(text)]
    parts = mend(mark.join(text[a:b] for a, b in pairwise(cuts))).split(mark)
    if len(parts) != len(places) + 1 or "".join(parts) != mend(text):
        raise BadSample("moved_spans", "cleaning or repair changes the text across the border of a word or span")
    moved, place = [], 0
    for part in parts[:-1]:
        place += len(part)
        moved.append(place)
    return moved
