"""The promises of `data/packing.py`: packs are full, media are whole, and every token is predicted once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data.datamodule import PackDataset
from pile_app.data.order import Phase, TrainingOrder
from pile_app.data.packing import PADDING, Pack, assemble, best_fit_decreasing, collate, cut_document, empty_pack
from pile_app.data.shards import write_shards
from pile_app.data.sources import SourceData
from pile_app.data.text import ByteTokenizer
from pile_app.documents import (
    AUDIO,
    ENCODED_EXTENSIONS,
    IMAGE,
    TEXT,
    BadSample,
    Codes,
    Document,
    Segment,
    Vocabulary,
    decode_audio,
    decode_image,
)

VOCABULARY = Vocabulary(
    image_codes=12,
    image_shape=(1, 8, 8),
    image_grid=(2, 2),
    audio_codes=36,
    sample_rate=8000,
    samples_per_token=320,
)
BEGIN, END, NULL, HOLE = Vocabulary.BEGIN, Vocabulary.END, Vocabulary.NULL, 0
TEXT_OPENER, IMAGE_OPENER, AUDIO_OPENER = Vocabulary.OPENERS
TOKENIZER = ByteTokenizer()


def ids(text: str) -> list[int]:
    return [Vocabulary.SPECIALS + byte for byte in text.encode()]


def length_of(document: Document) -> int:
    sizes = {TEXT: lambda s: len(s.text.encode()), IMAGE: lambda s: 0, AUDIO: lambda s: len(decode_audio(s.file, 8000))}
    return 2 + sum(VOCABULARY.segment_tokens(s.modality, sizes[s.modality](s), 8000) for s in document.segments)


def predicted(pack: Pack) -> list[list[int]]:
    """Places that are predicted, by modality."""
    return [sorted(int(place) + 1 for places in targets for place in places) for targets in pack.targets]


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
    with pytest.raises(ValueError, match="101 tokens cannot stand in a pack of 100"):
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
    """Segments of a document, and places inside its texts where a sentence ends."""
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
        assert all(times[place] == 1 for place in body), "a token is never predicted"
        if modality != TEXT:
            assert any(start <= first and first + tokens <= stop for start, stop in pieces), "a medium is cut"
            assert not any(first < edge < first + tokens for piece in pieces for edge in piece), "a medium is cut"
        first += tokens
    # What is not predicted: openers that a piece begins with, and an `<end>` that would stand alone.
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
    with pytest.raises(ValueError, match="medium of 33 tokens cannot stand in a context of 32"):
        cut_document([(TEXT, 5), (IMAGE, 33)], 32)


def test_the_pieces_of_a_document_lay_out_its_tokens(image: Callable[[int], Segment]) -> None:
    document = Document((Segment("a text of some length"), image(0), Segment("more of it, and more"), image(1)), "k")
    length = length_of(document)
    whole = assemble([(0, document, "k", 0, length, 0)], VOCABULARY, TOKENIZER, length)
    segments = [(s.modality, VOCABULARY.segment_tokens(s.modality, len(s.data))) for s in document.segments]
    pieces = cut_document(segments, 14)
    assert len(pieces) > 3
    pixels, bodies = [], Counter()
    for start, stop in pieces:
        pack = assemble([(0, document, "k", start, stop, 0)], VOCABULARY, TOKENIZER, 14)
        size = stop - start
        assert pack.tokens[:size].tolist() == whole.tokens[start:stop].tolist()
        assert pack.position[:size].tolist() == list(range(size))
        pixels += pack.images
        slots = np.concatenate([np.zeros(0, int), *pack.image_slots])
        assert ((slots > 0) & (slots < size)).all()
        bodies += Counter((modality, place + start) for modality in range(3) for place in predicted(pack)[modality])
    assert np.array_equal(np.stack(pixels), np.stack(whole.images))
    assert set(bodies.values()) == {1}
    assert {place for modality, place in bodies if modality == IMAGE} == set(predicted(whole)[IMAGE])


def test_documents_in_free_order_that_are_cut_keep_their_media_whole(tmp_path: Path, image: Callable[[int], Segment]) -> None:
    documents = [
        Document((image(n), Segment("x" * 28), image(n + 50), Segment("y" * 9)), f"long-{n}", ordered=False) for n in range(20)
    ]
    documents += [Document((image(n), Segment("z" * 5)), f"short-{n}", ordered=False) for n in range(40)]
    write_shards(documents, tmp_path, "s")
    data = SourceData("s", str(tmp_path / "s-*.tar"), VOCABULARY, TOKENIZER, 32)
    order = TrainingOrder([data.order(0)], [Phase(0, (1,))], seed=0)
    dataset = PackDataset([data], order, VOCABULARY, TOKENIZER, 32, seed=0, condition_dropout=0.0)
    images, texts, orders = 0, Counter[int](), set()
    for position in range(order.packs_per_epoch):
        pack = dataset[position]
        assert not pack.rejected
        for slots in pack.image_slots:
            assert slots[-1] < 32 and len(set(pack.document[slots[0] - 1 : slots[-1] + 1].tolist())) == 1
            assert pack.tokens[slots[0] - 1] == IMAGE_OPENER
        images += len(pack.images)
        texts.update(pack.tokens[predicted(pack)[TEXT]].tolist())
        whole = pack.tokens[: int((pack.document == 0).sum())].tolist()
        if len(whole) == length_of(documents[-1]):
            orders.add(whole[1])
    assert images == 2 * 20 + 40
    assert [texts[Vocabulary.SPECIALS + ord(letter)] for letter in "xyz"] == [20 * 28, 20 * 9, 40 * 5]
    assert orders == {TEXT_OPENER, IMAGE_OPENER}, "the order of whole documents is drawn"


# Assembling


def test_a_pack_lays_out_tokens_positions_targets_and_slots(
    image: Callable[[int], Segment], sound: Callable[..., Segment]
) -> None:
    both = Document((Segment("hé"), image(0), sound(1, 700)), "both")
    text = Document((Segment("ab"),), "text")
    pieces = [(3, both, "both", 0, length_of(both), 0), (1, text, "text", 0, length_of(text), 0)]
    pack = assemble(pieces, VOCABULARY, TOKENIZER, 24)
    assert pack.tokens.tolist() == [
        *(BEGIN, TEXT_OPENER, *ids("hé"), IMAGE_OPENER, *[HOLE] * 4, AUDIO_OPENER, *[HOLE] * 3, VOCABULARY.audio_end, END),
        *(BEGIN, TEXT_OPENER, *ids("ab"), END),
        *[0] * 3,
    ]  # fmt: skip
    assert pack.document.tolist() == [0] * 16 + [1] * 5 + [PADDING] * 3
    assert pack.position.tolist() == [*range(16), *range(5), 0, 0, 0]
    assert pack.source.tolist() == [3] * 16 + [1] * 5 + [0] * 3
    assert predicted(pack) == [[1, 2, 3, 4, 5, 10, 15, 17, 18, 19, 20], [6, 7, 8, 9], [11, 12, 13, 14]]
    assert [slots.tolist() for slots in pack.image_slots] == [[6, 7, 8, 9]]
    assert [slots.tolist() for slots in pack.audio_slots] == [[11, 12, 13]]
    assert np.array_equal(pack.images[0], decode_image(both.segments[1].file, 1, 8, 8))
    assert np.array_equal(pack.audio[0], decode_audio(both.segments[2].file, 8000))
    assert pack.rejected == []


@pytest.mark.parametrize("why", ["reading", "decoding", "length"])
def test_a_bad_sample_masks_its_span_and_moves_nothing_else(why: str, image: Callable[[int], Segment]) -> None:
    good = [Document((Segment("left"), image(0)), "a"), Document((image(1), Segment("right")), "c")]
    middle: Document | BadSample = Document((Segment("bad"), image(2)), "b")
    length = length_of(middle)  # type: ignore[arg-type]

    def pack(document: Document | BadSample, stop: int = length) -> Pack:
        first, last = ((0, one, one.key, 0, length_of(one), 0) for one in good)
        return assemble([first, (1, document, "b", 0, stop, 0), last], VOCABULARY, TOKENIZER, 64)

    bad: dict[str, Document | BadSample] = {
        "reading": BadSample("checksum", "rotten"),
        "decoding": Document((Segment("bad"), Segment(b"no image", "png")), "b"),
        "length": Document((Segment("ba"), image(2)), "b"),
    }
    right, wrong = pack(middle), pack(bad[why])
    reasons = {"reading": "checksum", "decoding": "undecodable_image", "length": "length"}
    assert [one[:3] for one in wrong.rejected] == [(1, "b", reasons[why])]
    span = np.arange(length) + length_of(good[0])
    outside = np.setdiff1d(np.arange(64), span)
    for name in ("tokens", "document", "position", "source"):
        assert np.array_equal(getattr(wrong, name)[outside], getattr(right, name)[outside]), name
    assert (wrong.document[span] == PADDING).all() and not wrong.tokens[span].any()
    for kept, all_of_them in zip(predicted(wrong), predicted(right), strict=True):
        assert kept == [place for place in all_of_them if place not in span]
    assert [slots.tolist() for slots in wrong.image_slots] == [right.image_slots[i].tolist() for i in (0, 2)]
    assert np.array_equal(wrong.images, [right.images[i] for i in (0, 2)])


def test_condition_dropout_hides_segments_and_masks_their_loss(
    image: Callable[[int], Segment], sound: Callable[..., Segment]
) -> None:
    document = Document((Segment("abc"), image(0), sound(0, 300), Segment("de")), "k")
    length = length_of(document)
    packs = [assemble([(0, document, "k", 0, length, n)], VOCABULARY, TOKENIZER, length) for n in range(4)]
    plain = packs[0]
    bodies = [range(2, 5), range(6, 10), range(11, 13), range(14, 16)]  # places of each segment, openers left out
    for dropped, pack in enumerate(packs):
        hidden = [place for body in bodies[:dropped] for place in body]
        seen = np.setdiff1d(np.arange(length), hidden)
        assert (pack.tokens[hidden] == NULL).all()
        assert np.array_equal(pack.tokens[seen], plain.tokens[seen])
        assert np.array_equal(pack.document, plain.document) and np.array_equal(pack.position, plain.position)
        masked = {*hidden, *(body[0] - 1 for body in bodies[:dropped])}
        assert [[p for p in places if p not in masked] for places in predicted(plain)] == predicted(pack)
        assert len(pack.images) == len(pack.image_slots) == int(dropped < 2)
        assert len(pack.audio) == len(pack.audio_slots) == int(dropped < 3)


def test_a_segment_without_loss_is_seen_and_not_predicted(image: Callable[[int], Segment]) -> None:
    picture = image(0)

    def pack(*losses: bool) -> Pack:
        given = Segment(picture.data, "png", losses[1])
        document = Document((Segment("ask", loss=losses[0]), given, Segment("so", loss=losses[2])), "k")
        return assemble([(0, document, "k", 0, 14, 0)], VOCABULARY, TOKENIZER, 14)

    plain = pack(True, True, True)
    assert predicted(plain) == [[1, 2, 3, 4, 5, 10, 11, 12, 13], [6, 7, 8, 9], []]
    question = pack(False, False, True)
    assert np.array_equal(question.tokens, plain.tokens)
    assert np.array_equal(question.images, plain.images) and np.array_equal(question.image_slots, plain.image_slots)
    assert predicted(question) == [[10, 11, 12, 13], [], []]
    assert predicted(pack(True, False, True))[IMAGE] == []
    assert predicted(pack(True, True, False))[TEXT] == [1, 2, 3, 4, 5]


def test_media_without_a_codec_are_named(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    for segment, reason in ((image(0), "no_image_codec"), (sound(0), "no_audio_codec")):
        document = Document((segment,), "k")
        pack = assemble([(0, document, "k", 0, 7, 0)], Vocabulary(), TOKENIZER, 8)
        assert [one[2] for one in pack.rejected] == [reason]


def test_a_document_in_a_pack_is_what_it_is_alone(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    documents = [
        Document((Segment("ab"), image(0)), "a"),
        Document((sound(1, 900), Segment("given", loss=False), Segment("c")), "b"),
        Document((image(1), image(2)), "c"),
    ]
    lengths = [length_of(one) for one in documents]
    entries = [(0, one, one.key, 0, length, 0) for one, length in zip(documents, lengths, strict=True)]
    together = assemble(entries, VOCABULARY, TOKENIZER, 64)
    alone = [assemble([entry], VOCABULARY, TOKENIZER, length) for entry, length in zip(entries, lengths, strict=True)]
    filled = sum(lengths)
    for name in ("tokens", "position", "source"):
        assert np.array_equal(getattr(together, name)[:filled], np.concatenate([getattr(one, name) for one in alone])), name
    assert together.document[:filled].tolist() == np.repeat(np.arange(3), lengths).tolist()
    offsets = np.cumsum([0, *lengths[:-1]]).tolist()
    for modality in range(3):
        moved = [place + offset for one, offset in zip(alone, offsets, strict=True) for place in predicted(one)[modality]]
        assert predicted(together)[modality] == moved
    for media in ("images", "audio"):
        apart = [medium for one in alone for medium in getattr(one, media)]
        assert all(map(np.array_equal, getattr(together, media), apart)) and len(apart) == len(getattr(together, media))
    slots = [slots + offset for one, offset in zip(alone, offsets, strict=True) for slots in one.image_slots]
    assert np.array_equal(together.image_slots, slots)


# Encoded segments


ENCODER = "0123456789abcdef" * 2


class Encoder:
    """A tokenizer by name."""

    size, fingerprint, token_bytes = 256, ENCODER, np.ones(256, np.int64)
    encode = staticmethod(TOKENIZER.encode)


def encoded(modality: int, values: list[int], size: int, rate: int = 0, encoder: str = ENCODER) -> Segment:
    return Segment(Codes(encoder, size, rate, np.array(values)).to_bytes(), ENCODED_EXTENSIONS[modality])


def test_encoded_segments_are_laid_out_as_what_they_were_made_of(image: Callable[[int], Segment]) -> None:
    vocabulary = dataclasses.replace(VOCABULARY, tokenizer=ENCODER, image_codec="1" * 32, audio_codec="2" * 32)
    document = Document(
        (
            encoded(TEXT, list(b"h\xc3\xa9"), 3),
            encoded(IMAGE, [11, 0, 5, 7], 64, encoder="1" * 32),
            encoded(AUDIO, [35, 0, 1], 700, 8000, "2" * 32),
        ),
        "k",
    )
    pack = assemble([(0, document, "k", 0, 16, 0)], vocabulary, Encoder(), 16)  # type: ignore[arg-type]
    image_codes, audio_codes = vocabulary.starts[IMAGE], vocabulary.starts[AUDIO]
    assert not pack.rejected and not pack.images and not pack.audio
    assert pack.tokens.tolist() == [
        *(BEGIN, TEXT_OPENER, *ids("hé"), IMAGE_OPENER, *(image_codes + code for code in (11, 0, 5, 7))),
        *(AUDIO_OPENER, *(audio_codes + code for code in (35, 0, 1)), vocabulary.audio_end, END),
    ]  # fmt: skip
    assert predicted(pack) == [[1, 2, 3, 4, 5, 10, 15], [6, 7, 8, 9], [11, 12, 13, 14]]


def test_encoded_segments_of_another_encoder_or_beyond_the_vocabulary_are_refused() -> None:
    vocabulary = dataclasses.replace(VOCABULARY, image_codec="1" * 32)

    def lay_out(segment: Segment) -> Pack:
        return assemble([(0, Document((segment,), "k"), "k", 0, 7, 0)], vocabulary, TOKENIZER, 8)

    with pytest.raises(ValueError, match="encoded by 22222222222222222222222222222222, the model's codec is 1111"):
        lay_out(encoded(IMAGE, [1, 2, 3, 4], 64, encoder="2" * 32))
    assert [one[2] for one in lay_out(encoded(IMAGE, [1, 2, 3, 12], 64, encoder="1" * 32)).rejected] == ["damaged_codes"]
    assert [one[2] for one in lay_out(encoded(IMAGE, [1, 2, 3], 64, encoder="1" * 32)).rejected] == ["damaged_codes"]
    assert [one[2] for one in lay_out(Segment(b"rotten", "imagecodes")).rejected] == ["damaged_codes"]
    assert not lay_out(encoded(IMAGE, [1, 2, 3, 11], 64, encoder="1" * 32)).rejected


# Collating


def test_a_batch_points_at_the_same_places_as_its_packs(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    documents = [
        Document((image(0), sound(0, 900)), "a"),
        Document((Segment("only text"),), "b"),
        Document((sound(1, 2000), image(1), image(2)), "c"),
    ]
    packs = [assemble([(0, one, one.key, 0, length_of(one), 0)], VOCABULARY, TOKENIZER, 32) for one in documents]
    for number, (pack, one) in enumerate(zip(packs, documents, strict=True)):
        pack.number, pack.documents = 7 + number, [(0, one.key, 2, 0, length_of(one))]
    batch = collate([*packs, empty_pack(32)], VOCABULARY)
    assert batch.tokens.shape == batch.document.shape == batch.position.shape == batch.source.shape == (4, 32)
    assert torch.equal(batch.tokens[:3], torch.from_numpy(np.stack([pack.tokens for pack in packs])))
    for modality in range(3):
        places = [np.concatenate([np.zeros(0, int), *pack.targets[modality]]) + 32 * row for row, pack in enumerate(packs)]
        assert batch.targets[modality].tolist() == np.concatenate(places).tolist()
    slots = [slot + 32 * row for row, pack in enumerate(packs) for slot in pack.image_slots]
    assert np.array_equal(batch.image_slots, slots) and batch.images.shape == (3, 1, 8, 8)
    sounds = [slot + 32 * row for row, pack in enumerate(packs) for slot in pack.audio_slots]
    assert batch.audio_slots.tolist() == np.concatenate(sounds).tolist()
    assert batch.audio_tokens.tolist() == [3, 7] and batch.audio.shape == (2, 2000)
    assert not batch.audio[0, 900:].any() and batch.audio[0, :900].any()
    assert batch.normalizer == sum(len(places) for places in batch.targets)
    assert collate(packs, VOCABULARY, 123.0).normalizer == 123
    assert batch.numbers == [7, 8, 9, 0]
    assert batch.documents == [*([(0, one.key, 2, 0, length_of(one))] for one in documents), []]
    assert batch.source_tokens == [] and collate(packs, VOCABULARY, 5.0, [3, 4]).source_tokens == [3, 4]
    assert batch.padding_share == 1 - sum(map(length_of, documents)) / 128


def test_a_batch_without_media_has_empty_tensors() -> None:
    batch = collate([empty_pack(8)], VOCABULARY)
    assert batch.images.shape == (0, 1, 8, 8) and batch.image_slots.shape == (0, 4)
    assert batch.audio.shape == (0, 0) and len(batch.audio_slots) == len(batch.audio_tokens) == 0
    assert [len(places) for places in batch.targets] == [0, 0, 0]
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.targets[0].is_meta
