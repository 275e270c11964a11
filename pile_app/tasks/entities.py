"""Named entities for training: spans of a text <-> tags of its words <-> the tokens in which the words end.

A tagged document is a text whose `meta` holds `spans`, [start, stop, type] in characters, sorted and not overlapping, and, if
it was published as words, `words`, [start, stop] of each; else `word_offsets` splits it.

Tags are numbers, K = 1 + 2 x types: 0 outside, 1 + 2t begins an entity of type t, 2 + 2t continues it (BIO, also called IOB2).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pile_app.data.tokenizers import Tokenizer
from pile_app.prepare.entities import Offsets, word_offsets

OUTSIDE = 0


class Span(NamedTuple):
    """An entity: [start, stop) in characters."""

    start: int
    stop: int
    type: str


def document_words(text: str, meta: Mapping[str, Any]) -> list[Offsets]:
    """Return the words that a tagged document names, else its `word_offsets`."""
    return [(start, stop) for start, stop in meta["words"]] if "words" in meta else word_offsets(text)


def tags_of_words(words: Sequence[Offsets], spans: Iterable[Sequence[Any]], types: Sequence[str]) -> np.ndarray:
    """Return (words,) int32 tags.

    Raises:
        ValueError: the type of a span is not in `types`, or it does not begin and end with words.
    """
    tags = np.zeros(len(words), np.int32)
    starts, stops = [start for start, _ in words], [stop for _, stop in words]
    for start, stop, name in spans:
        first, last = bisect_left(starts, start), bisect_right(stops, stop)
        if name not in types:
            raise ValueError(
                f"the span [{start}, {stop}) has the type {name!r}, model.objective.types has {list(types)}: add it there"
            )
        if first >= last or starts[first] != start or stops[last - 1] != stop or tags[first:last].any():
            raise ValueError(
                f"the span [{start}, {stop}) of type {name!r} does not begin and end with words, or lies in another: "
                "`pile prepare --kind entities` repairs or rejects such spans"
            )
        tags[first], tags[first + 1 : last] = 1 + 2 * types.index(name), 2 + 2 * types.index(name)
    return tags


def spans_of_words(words: Sequence[Offsets], tags: Sequence[int], types: Sequence[str]) -> list[Span]:
    """Invert `tags_of_words`, for valid BIO tags."""
    spans: list[Span] = []
    for (start, stop), tag in zip(words, tags, strict=True):
        if tag % 2:
            spans.append(Span(start, stop, types[tag // 2]))
        elif tag:
            spans[-1] = spans[-1]._replace(stop=stop)
    return spans


def last_tokens(text: str, words: Sequence[Offsets], tokenizer: Tokenizer) -> np.ndarray:
    """Return (words,) index of the token of `text` in which each word ends, not decreasing, with any tokenizer."""
    # The tokenizer counts the tokens that end at or before an offset. If the last of them ends with the word, it is the token;
    # else the next token is, which covers the last character of the word.
    breaks = sorted({offset for _, stop in words for offset in (stop - 1, stop)})
    ids, before = tokenizer.encode_all([text], [breaks])[0]
    count = dict(zip(breaks, before.tolist(), strict=True))
    last = np.array([max(count[stop] - 1, count[stop - 1]) for _, stop in words], np.int64)
    return np.minimum(last, len(ids) - 1)


def merge_words(last: np.ndarray, words: Sequence[Offsets], tags: np.ndarray) -> tuple[np.ndarray, list[Offsets], np.ndarray]:
    """Merge words that end in the same token, since a token has one tag: (U,) tokens, offsets and (U,) tags.

    The tag is that of the first of them in an entity; an inside tag that then has no beginning becomes one.
    """
    first = np.flatnonzero(np.diff(last, prepend=-1)).tolist()
    if len(first) == len(words):
        return last, list(words), tags
    stop = [*first[1:], len(words)]
    merged = [next((tag for tag in tags[a:b].tolist() if tag), OUTSIDE) for a, b in zip(first, stop, strict=True)]
    for index, tag in enumerate(merged):
        if tag and tag % 2 == 0 and (index == 0 or (merged[index - 1] + 1) // 2 != tag // 2):
            merged[index] = tag - 1
    return last[first], [(words[a][0], words[b - 1][1]) for a, b in zip(first, stop, strict=True)], np.array(merged, np.int32)
