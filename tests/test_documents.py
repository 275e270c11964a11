"""The promises of `documents.py`: samples and documents are two forms of one thing, and bad files are named, not decoded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data.assembly import assemble, whole
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import (
    AUDIO,
    ENCODED_EXTENSIONS,
    IMAGE,
    SAMPLE_RATES,
    TEXT,
    BadSample,
    Codes,
    Document,
    Segment,
    sample_from_document,
)
from pile_app.fields import document_from_sample
from pile_app.vocabulary import Vocabulary

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5

TEXTS = st.characters(exclude_characters="\x01\x02\x03", exclude_categories=("Cs",))  # without markers of roles
segments = st.one_of(
    st.builds(Segment, st.text(min_size=1, alphabet=TEXTS), loss=st.booleans()),
    st.builds(Segment, st.binary(min_size=1), st.sampled_from(["png", "webp", "wav", "flac"]), st.booleans()),
)


def read_back(document: Document) -> Document:
    sample = sample_from_document(document)
    key = str(sample.pop("__key__"))
    return document_from_sample(key, {name: bytes(data) for name, data in sample.items()})  # type: ignore[arg-type]


def wav(samples: np.ndarray, sample_rate: int = 8000, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, subtype, format="WAV")
    return file.getvalue()


@given(
    st.builds(
        Document,
        st.lists(segments, min_size=1, max_size=4).map(tuple),
        st.just("key"),
        st.booleans(),
        st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
    )
)
def test_a_document_comes_back_from_its_sample_unchanged(document: Document) -> None:
    assert read_back(document) == document


def test_segments_named_in_the_json_keep_their_order_and_loss() -> None:
    description = {"segments": [{"text": "what?"}, {"file": "b.png", "loss": False}, {"file": "a.txt"}], "meta": {"n": 1}}
    files = {"json": json.dumps(description).encode(), "a.txt": b"that", "b.png": b"x", "unnamed.png": b"y"}
    document = document_from_sample("k", files)
    assert document.segments == (Segment("what?"), Segment(b"x", "png", loss=False), Segment("that"))
    assert document.ordered and document.meta == {"n": 1}


@pytest.mark.parametrize(
    ("reason", "files"),
    [
        ("invalid_utf8", {"txt": b"caf\xe9"}),
        ("invalid_utf8", {"json": b'{"text": "caf\xe9"}'}),
        ("invalid_json", {"json": b'{"segments": ['}),
        ("invalid_json", {"json": b'{"segments": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"}),
        ("invalid_json", {"json": b'{"meta": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001}),
        ("invalid_json", {"json": b'{"text": "a", "meta": {"n": ' + b"1" * 10_000 + b"}}"}),
        ("invalid_json", {"json": b'{"segments": 3}'}),
        ("invalid_json", {"json": b'{"segments": ["a"]}'}),
        ("invalid_json", {"json": b'{"segments": [{"file": ["a"]}]}'}),
        ("missing_file", {"json": b'{"segments": [{"file": "0.png"}]}', "1.png": b"x"}),
        ("unknown_medium", {"json": b'{"segments": [{"file": "0.mp4"}]}', "0.mp4": b"x"}),
        ("no_segment", {"json": b'{"label": 3}'}),
        ("no_segment", {"txt": b""}),
    ],
)
def test_a_sample_that_makes_no_document_is_refused_with_a_reason(reason: str, files: dict[str, bytes]) -> None:
    with pytest.raises(BadSample) as caught:
        document_from_sample("the-key", files)
    assert caught.value.reason == reason
    if reason != "invalid_utf8" or "json" in files:
        assert "the-key" in caught.value.detail


# Encoded segments


@st.composite
def codes(draw: Callable[..., Any]) -> Codes:
    values = draw(st.lists(st.integers(0, 2**16 - 1) | st.integers(0, 2**32 - 1), max_size=40))
    places = draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=5))
    encoder = draw(st.binary(min_size=16, max_size=16)).hex()
    return Codes(
        encoder, draw(st.integers(0, 2**40 - 1)), draw(st.just(0) | st.integers(*SAMPLE_RATES)), np.array(values, np.int64),
        np.array(places, np.int64).reshape(-1, 2).T, draw(st.booleans()),
    )  # fmt: skip


@given(codes())
def test_codes_come_back_from_their_file_unchanged(made: Codes) -> None:
    back = Codes.from_bytes(made.to_bytes())
    for name in ("encoder", "size", "sample_rate", "is_lost"):
        assert getattr(back, name) == getattr(made, name)
    assert np.array_equal(back.values, made.values) and np.array_equal(back.breaks, made.breaks)


@given(codes(), st.data())
def test_codes_that_are_cut_off_are_refused_or_hold_fewer_values(made: Codes, data: st.DataObject) -> None:
    whole = made.to_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        back = Codes.from_bytes(cut)
    except BadSample as error:
        assert error.reason == "damaged_codes"
        return
    assert len(back.values) < len(made.values) and np.array_equal(back.values, made.values[: len(back.values)])


@given(st.binary(max_size=200))
def test_bytes_that_are_no_codes_are_refused_or_read_within_bounds(data: bytes) -> None:
    try:
        back = Codes.from_bytes(data)
    except BadSample as error:
        assert error.reason == "damaged_codes"
        return
    assert back.values.nbytes + back.breaks.nbytes + Codes.HEADER.size == len(data)


@pytest.mark.parametrize("modality", [TEXT, IMAGE, AUDIO])
def test_an_encoded_segment_is_one_of_its_modality(modality: int) -> None:
    data = Codes("ab" * 16, 700, 8000, np.arange(5)).to_bytes()
    segment = Segment(data, ENCODED_EXTENSIONS[modality], loss=False)
    assert segment.is_encoded and segment.modality == modality and segment.codes.values.tolist() == list(range(5))
    assert not Segment("text").is_encoded and not Segment(b"x", "png").is_encoded
    document = Document((segment, Segment("text")), "k")
    assert read_back(document) == document
    lone = document_from_sample("k", {ENCODED_EXTENSIONS[modality]: data})
    assert lone.segments == (Segment(data, ENCODED_EXTENSIONS[modality]),)


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_slices_of_the_vocabulary_are_contiguous_and_cover_it(text: int, image: int, audio: int) -> None:
    vocabulary = Vocabulary(text_tokens=text, image_codes=image, audio_codes=audio)
    ids = [i for one in vocabulary.slices for i in range(one.start, one.stop)]
    assert ids == list(range(vocabulary.size))
    specials = [Vocabulary.BEGIN, Vocabulary.END, *Vocabulary.OPENERS, Vocabulary.NULL]
    assert sorted(specials) == list(range(Vocabulary.SPECIALS))
    sizes = [one.stop - one.start for one in vocabulary.slices]
    assert sizes == [Vocabulary.SPECIALS + text, image, audio + 1]
    assert [one.start for one in vocabulary.slices[1:]] == list(vocabulary.starts[1:])
    assert vocabulary.audio_end == vocabulary.size - 1


VOCABULARY = Vocabulary(
    image_codes=12,
    image_shape=(1, 8, 8),
    image_grid=(2, 2),
    audio_codes=36,
    sample_rate=8000,
    samples_per_token=320,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["text", "image", "audio"]), min_size=1, max_size=4), st.integers(1, 1500))
def test_token_counts_of_segments_equal_what_assemble_lays_out(kinds: list[str], size: int) -> None:
    made: dict[str, Callable[[], tuple[Segment, int]]] = {
        "text": lambda: (Segment("é" * size), VOCABULARY.segment_tokens(TEXT, 2 * size)),
        "image": lambda: (Segment.from_image(GREY), VOCABULARY.segment_tokens(IMAGE, 48)),
        "audio": lambda: (Segment(wav(np.full(size, 0.5), 11025), "wav"), VOCABULARY.segment_tokens(AUDIO, size, 11025)),
    }
    parts = [made[kind]() for kind in kinds]
    length = 2 + sum(tokens for _, tokens in parts)
    document = Document(tuple(segment for segment, _ in parts), "k")
    pack = assemble([[whole(document, length)]], VOCABULARY, ByteTokenizer(), length)
    assert not pack.rejected
    openers = [Vocabulary.OPENERS[segment.modality] for segment in document.segments]
    places = np.cumsum([1, *(tokens for _, tokens in parts)])
    assert pack.tokens[0, places].tolist() == [*openers, Vocabulary.END]
    assert pack.tokens[0, 0] == Vocabulary.BEGIN
    # One token more than was promised is an error of the sample, and not a shift of everything that follows.
    too_long = assemble([[whole(document, length + 1)]], VOCABULARY, ByteTokenizer(), length + 1)
    assert [reason for _, _, reason, _ in too_long.rejected] == ["length"]
