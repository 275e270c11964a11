"""Packing: which pieces of documents share a pack. Pure functions of lengths.

A document longer than a pack is cut between segments or sentences if possible, else inside a text, never inside a medium. A
piece that continues a text repeats the last token of the previous piece, so every token and code is predicted exactly once."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from pile_app.documents import TEXT


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Pack indices into bins with `sum(lengths) <= capacity`: longest first, each into the fullest bin with room."""
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a piece of {int(lengths.max())} tokens does not fit a pack of {capacity}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []  # free tokens of the bins, distinct, increasing
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        tightest = bisect_left(rooms, length)
        if tightest < len(rooms):
            room = rooms[tightest]
            number = by_room[room].pop()
            if not by_room[room]:
                del rooms[tightest]
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        if not by_room[room - length]:
            insort(rooms, room - length)
        by_room[room - length].append(number)
    return [np.array(indices) for indices in bins]


def cut_document(
    segments: Sequence[tuple[int, int]], context: int, breaks: Sequence[int] | np.ndarray = ()
) -> list[tuple[int, int]]:
    """Cut a document into ranges [start, stop) of at most `context` tokens.

    The cut is the last between segments or at a break, unless that wastes more than a 32nd of the context: then inside a text.

    Args:
        segments: (modality, tokens with opener and closing token) of each segment, without `<begin>` and `<end>`.
        breaks: token offsets in the document at which a sentence ends; increasing.

    Raises:
        ValueError: an image or a sound is longer than the context."""
    openers = list(accumulate((tokens for _, tokens in segments), initial=1))  # offsets of the openers, then of `<end>`
    longest = max((tokens for modality, tokens in segments if modality != TEXT), default=0)
    if longest > context:
        raise ValueError(f"a medium of {longest} tokens does not fit a context of {context}")
    length = openers[-1] + 1
    pieces: list[tuple[int, int]] = []
    start = 0
    while length > start + context:
        limit = start + context
        segment = bisect_right(openers, limit) - 1
        cut = openers[segment]
        if segments[min(segment, len(segments) - 1)][0] == TEXT or cut == limit:  # else never inside an image or a sound
            inside = bisect_right(breaks, limit)
            if inside and breaks[inside - 1] > cut:
                cut = int(breaks[inside - 1])
            if limit - cut > context / 32:
                cut = limit
        if cut > 1:  # not `<begin>` alone
            pieces.append((start, cut))
        if cut == openers[-1] and segments[-1][0] != TEXT:
            return pieces  # only `<end>` remains, without a token to predict it from
        # A piece that continues a text, or with its `<end>`, repeats the previous token, to predict from.
        start = cut if cut == openers[segment] and cut != openers[-1] else cut - 1
    pieces.append((start, length))
    return pieces


_SENTENCE_END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["'\u2019\u201d)\]]*(?=\s)|\n+(?=\S)|[\u3002\uff01\uff1f](?=\S)""")
BREAK_SPACING = 128  # minimum of characters between two breaks


def sentence_ends(text: str) -> list[int]:
    """Find the character offsets, increasing, where a long text may be cut: after sentences and lines."""
    ends: list[int] = []
    if len(text) <= 2 * BREAK_SPACING:
        return ends
    start = BREAK_SPACING
    while (found := _SENTENCE_END.search(text, start)) and found.end() < len(text):
        ends.append(found.end())
        start = found.end() + BREAK_SPACING
    return ends
