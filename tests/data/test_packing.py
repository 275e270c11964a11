"""The promises of `data/packing.py`: packs are full, media are whole, and every token is predicted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data.packing import best_fit_decreasing, cut_document
from pile_app.documents import AUDIO, IMAGE, TEXT

# Packing


@given(st.lists(st.integers(1, 100), max_size=200), st.integers(100, 150))
def test_every_piece_is_packed_once_and_no_pack_overflows(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    assert sorted(index for one in bins for index in one.tolist()) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[index] for index in one) for one in bins]
    assert all(0 <= room < capacity for room in rooms)
    # What opened a pack fitted into none of those before it: no two packs can be merged.
    fills = sorted(capacity - room for room in rooms)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


def test_a_piece_goes_into_the_fullest_pack_that_takes_it() -> None:
    bins = best_fit_decreasing(np.array([3, 6, 7]), 10)
    assert [sorted(one.tolist()) for one in bins] == [[0, 2], [1]]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(2000, 5000))
def test_packs_of_documents_of_natural_lengths_are_nearly_full(seed: int, count: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(np.log(400), 1.0, count).astype(np.int64).clip(3, 4096)
    packs = best_fit_decreasing(lengths, 4096)
    assert lengths.sum() / (4096 * len(packs)) >= 0.98


def test_a_piece_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="101 tokens does not fit a pack of 100"):
        best_fit_decreasing(np.array([3, 101]), 100)


# Cutting

segment_lists = st.lists(
    st.one_of(
        st.tuples(st.just(TEXT), st.integers(1, 120)),
        st.tuples(st.just(IMAGE), st.integers(2, 24)),
        st.tuples(st.just(AUDIO), st.integers(3, 24)),
    ),
    min_size=1,
    max_size=8,
)


@st.composite
def segments_with_breaks(draw: Callable[..., Any]) -> tuple[list[tuple[int, int]], list[int]]:
    """Segments of a document, and positions inside its texts where a sentence ends."""
    segments = draw(segment_lists)
    breaks, opener = [], 1
    for modality, tokens in segments:
        if modality == TEXT and tokens > 2:
            breaks += sorted(draw(st.sets(st.integers(opener + 2, opener + tokens - 1), max_size=8)))
        opener += tokens
    return segments, breaks


@settings(max_examples=500)
@given(segments_with_breaks(), st.integers(24, 60), st.booleans())
def test_a_cut_document_loses_nothing_and_repeats_nothing(
    document: tuple[list[tuple[int, int]], list[int]], context: int, with_breaks: bool
) -> None:
    segments, breaks = document
    pieces = cut_document(segments, context, np.array(breaks, np.uint32) if with_breaks else ())
    assert all(stop - start > 1 for start, stop in pieces), "a token alone predicts nothing"
    length = 2 + sum(tokens for _, tokens in segments)
    assert all(0 < stop - start <= context for start, stop in pieces)
    times = Counter(place for start, stop in pieces for place in range(start + 1, stop))
    assert set(times.values()) <= {1}, "a token is predicted twice"
    first = 1
    for modality, tokens in segments:
        body = range(first + 1, first + tokens)  # without its opener
        assert all(times[index] == 1 for index in body), "a token is never predicted"
        if modality != TEXT:
            assert any(start <= first and first + tokens <= stop for start, stop in pieces), "a medium is cut"
            assert not any(first < edge < first + tokens for piece in pieces for edge in piece), "a medium is cut"
        first += tokens
    # Not predicted: the opener at the start of a piece, and an `<end>` that would be alone.
    openers = set(np.cumsum([1, *(tokens for _, tokens in segments)]).tolist())
    assert set(range(1, length)) - times.keys() <= openers
    assert times[length - 1] == 1 or (segments[-1][0] != TEXT and length - 1 == pieces[-1][1])


@settings(max_examples=500)
@given(segments_with_breaks(), st.integers(24, 60))
def test_a_cut_falls_where_a_segment_or_sentence_ends_if_that_wastes_little(
    document: tuple[list[tuple[int, int]], list[int]], context: int
) -> None:
    segments, breaks = document
    openers = np.cumsum([1, *(tokens for _, tokens in segments)]).tolist()
    inside_media = [
        range(a + 1, a + tokens) for a, (modality, tokens) in zip(openers, segments, strict=False) if modality != TEXT
    ]
    for start, stop in cut_document(segments, context, breaks):
        limit = start + context
        if stop == openers[-1] + 1 or (stop == openers[-1] and segments[-1][0] != TEXT):
            continue  # the end of the document
        (medium,) = [one for one in inside_media if limit in one] or [None]
        best = max((place for place in {*openers, *breaks} if place <= limit), default=0)
        if medium is not None:
            assert stop == medium.start - 1, "before the medium that does not fit"
        elif limit - best <= context / 32:
            assert stop == best
        else:
            assert stop == limit, "or the piece is full"


def test_a_long_text_is_cut_at_the_ends_of_its_sentences() -> None:
    assert cut_document([(TEXT, 150)], 64, [30, 63, 100, 126]) == [(0, 63), (62, 126), (125, 152)]
    assert cut_document([(TEXT, 150)], 64, [50, 120]) == [(0, 64), (63, 127), (126, 152)], "that would waste too much"
    assert cut_document([(TEXT, 150)], 64) == [(0, 64), (63, 127), (126, 152)]
    assert cut_document([(TEXT, 62), (TEXT, 60)], 64, [30]) == [(0, 63), (63, 124)]


@pytest.mark.parametrize("seed", range(3))
def test_packs_of_long_texts_cut_at_their_sentences_are_nearly_full(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces: list[int] = []
    texts = rng.lognormal(np.log(400), 1.0, 5000).astype(int).clip(1, 60_000)
    assert (texts > 4096).any()
    for tokens in texts.tolist():
        breaks = np.cumsum(rng.integers(30, 200, tokens // 30)) + 2
        pieces += [stop - start for start, stop in cut_document([(TEXT, tokens + 1)], 4096, breaks[breaks < tokens + 2])]
    packs = best_fit_decreasing(np.array(pieces), 4096)
    assert sum(pieces) / (4096 * len(packs)) >= 0.98


@given(segment_lists)
def test_a_document_that_fits_is_not_cut(segments: list[tuple[int, int]]) -> None:
    length = 2 + sum(tokens for _, tokens in segments)
    assert cut_document(segments, length) == cut_document(segments, length + 9) == [(0, length)]


def test_a_medium_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="medium of 33 tokens does not fit a context of 32"):
        cut_document([(TEXT, 5), (IMAGE, 33)], 32)
