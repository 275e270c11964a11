"""The promises of `documents.py`: samples and documents are two forms of one thing, and bad files are named, not decoded."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data.packing import assemble
from pile_app.data.text import ByteTokenizer
from pile_app.documents import (
    AUDIO,
    IMAGE,
    MAX_AUDIO_SECONDS,
    TEXT,
    BadSample,
    Document,
    Segment,
    Vocabulary,
    audio_size,
    decode_audio,
    decode_image,
    document_from_sample,
    image_size,
    sample_from_document,
)

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
TONE = 0.5 * np.sin(np.arange(800) / 5)

segments = st.one_of(
    st.builds(Segment, st.text(min_size=1, alphabet=st.characters(exclude_categories=("Cs",))), loss=st.booleans()),
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


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


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


def test_a_caption_dataset_is_documents_of_two_segments_in_free_order() -> None:
    document = document_from_sample("k", {"jpg": b"pixels", "txt": "a café".encode()})
    assert [segment.modality for segment in document.segments] == [IMAGE, TEXT]
    assert document.segments[1].text == "a café"
    assert not document.ordered


@pytest.mark.parametrize(
    ("files", "modalities"),
    [
        ({"txt": b"alone"}, [TEXT]),
        ({"JPG": b"x", "cls": b"7"}, [TEXT, IMAGE]),
        ({"flac": b"x", "json": b'{"text": "said"}'}, [AUDIO, TEXT]),
        ({"0.png": b"x", "1.png": b"y", "meta.xml": b"z"}, [IMAGE, IMAGE]),
        ({"txt": b"", "png": b"x"}, [IMAGE]),
    ],
)
def test_public_layouts_are_read_as_they_are(files: dict[str, bytes], modalities: list[int]) -> None:
    document = document_from_sample("k", files)
    assert sorted(segment.modality for segment in document.segments) == sorted(modalities)
    assert document.ordered == (len(files.keys() - {"json", "meta.xml"}) == 1 and len(modalities) == 1)


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
        ("invalid_json", {"json": b"[1, 2]"}),
        ("invalid_json", {"json": b'{"segments": 3}'}),
        ("invalid_json", {"json": b'{"segments": ["a"]}'}),
        ("invalid_json", {"json": b'{"segments": [{"file": ["a"]}]}'}),
        ("invalid_json", {"json": b'{"text": "a", "meta": "b"}'}),
        ("missing_file", {"json": b'{"segments": [{"file": "0.png"}]}', "1.png": b"x"}),
        ("unknown_extension", {"json": b'{"segments": [{"file": "0.tiff"}]}', "0.tiff": b"x"}),
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


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("undecodable_image", b"no image"),
        ("undecodable_image", b""),
        ("undecodable_image", Segment.from_image(GREY).file[:45]),
        ("image_too_large", png_that_claims(8001, 8000)),
        ("image_too_large", png_that_claims(10_000, 10_000)),  # Pillow warns
        ("image_too_large", png_that_claims(60_000, 60_000)),  # Pillow refuses
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bad_image_is_refused_with_a_reason(reason: str, data: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(data, 1, 8, 8)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("undecodable_audio", b"no sound"),
        ("undecodable_audio", wav(TONE)[:20]),
        ("empty_audio", wav(np.zeros(0))),
        ("silent_audio", wav(np.zeros(100))),
        ("silent_audio", wav(np.full(100, 5e-5), subtype="FLOAT")),
        ("nan_audio", wav(np.where(np.arange(100) == 50, np.nan, 0.5), subtype="FLOAT")),
        ("nan_audio", wav(np.where(np.arange(100) == 50, np.inf, 0.5), subtype="FLOAT")),
        ("audio_too_long", wav(np.full(int(MAX_AUDIO_SECONDS) + 1, 0.5), sample_rate=1)),
    ],
)
def test_a_bad_sound_is_refused_with_a_reason(reason: str, data: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        decode_audio(data, 8000)
    assert caught.value.reason == reason


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 3), (1, 5, 3), (5, 1, 3), (1, 1), (1, 1, 1)])
def test_an_image_comes_back_from_its_segment_bit_for_bit(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    segment = Segment.from_image(pixels)
    channels = shape[2] if len(shape) == 3 else 1
    assert image_size(segment.file) == shape[:2]
    decoded = decode_image(segment.file, channels, *shape[:2])
    assert np.array_equal(decoded, np.moveaxis(pixels.reshape(*shape[:2], channels), 2, 0))


def test_an_image_fills_the_wanted_shape_and_transparent_parts_are_white() -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (30, 10), (255, 0, 0, 0)).save(file, "png")
    for channels in (1, 3):
        decoded = decode_image(file.getvalue(), channels, 16, 8)
        assert decoded.shape == (channels, 16, 8) and decoded.dtype == np.uint8
        assert (decoded == 255).all()


def test_a_sound_comes_back_from_its_segment_with_16_bits() -> None:
    for extension in ("flac", "wav"):
        segment = Segment.from_audio(TONE, 8000, extension)
        assert audio_size(segment.file) == (800, 8000)
        assert np.abs(decode_audio(segment.file, 8000) - TONE).max() < 1 / 32768
    stereo = wav(np.stack([TONE, np.zeros(800)], 1))
    assert np.abs(decode_audio(stereo, 8000) - TONE / 2).max() < 1 / 32768


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000]),
    st.sampled_from([8000, 11025, 16000, 24000]),
    st.sampled_from([160, 320, 333]),
)
def test_the_length_after_resampling_is_known_from_the_header(samples: int, own: int, wanted: int, per_token: int) -> None:
    data = wav(np.full(samples, 0.5), own)
    vocabulary = Vocabulary(audio_codes=9, sample_rate=wanted, samples_per_token=per_token)
    decoded = decode_audio(data, wanted)
    assert len(decoded) == -(-samples * wanted // own)
    assert vocabulary.audio_tokens(*audio_size(data)) == -(-len(decoded) // per_token)


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
    pack = assemble([(0, document, "k", 0, length, 0)], VOCABULARY, ByteTokenizer(), length)
    assert not pack.rejected
    openers = [Vocabulary.OPENERS[segment.modality] for segment in document.segments]
    places = np.cumsum([1, *(tokens for _, tokens in parts)])
    assert pack.tokens[places].tolist() == [*openers, Vocabulary.END]
    assert pack.tokens[0] == Vocabulary.BEGIN
    # One token more than was promised is an error of the sample, and not a shift of everything that follows.
    too_long = assemble([(0, document, "k", 0, length + 1, 0)], VOCABULARY, ByteTokenizer(), length + 1)
    assert [reason for _, _, reason, _ in too_long.rejected] == ["length"]
