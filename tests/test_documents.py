"""The promises of `documents.py`: samples and documents are two forms of one thing, and bad files are named, not decoded."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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
from pile_app.media import MAX_AUDIO_SECONDS, _plain_jpeg_shape, audio_size, decode_audio, decode_image, image_size
from pile_app.vocabulary import Vocabulary

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
TONE = 0.5 * np.sin(np.arange(800) / 5)

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


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def flac_that_claims(samples: int) -> bytes:
    """A FLAC of a few bytes whose header claims any length (36 bits)."""
    data = bytearray(Segment.from_audio(TONE, 8000).file)
    place = 8 + 13  # "fLaC", the header of STREAMINFO, its fields before
    data[place] = data[place] & 0xF0 | samples >> 32
    data[place + 1 : place + 5] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def test_a_file_is_decoded_as_the_format_of_an_image_and_nothing_else() -> None:
    """An EPS would be run by Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for use in (image_size, lambda data: decode_image(data, 1, 8, 8)):
        with pytest.raises(BadSample, match="undecodable_image: cannot identify image file"):
            use(eps)


def test_a_jpeg_that_is_smaller_than_its_markers_say_is_refused() -> None:
    """Or what stood in its place before, of another document, would be taken for a part of its pixels."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 90, np.uint8)).save(file, "jpeg")
    plain = file.getvalue()
    data = plain[:2] + b"\xff\x01" + plain[2:]  # a marker without a length: who reads one jumps behind the image
    data = data.ljust(4 + int.from_bytes(data[4:6], "big"), b"\0")
    data += b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 8, 8) + b"\x03" + bytes(3) + b"\xff\xda" + bytes(20)
    assert _plain_jpeg_shape(data) == (3, 8, 8)
    with pytest.raises(BadSample, match="undecodable_image"):
        decode_image(data, 3, 8, 8, out=np.full((8, 8, 3), 200, np.uint8))


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
        ("undecodable_audio", wav(np.full(100, 0.5), sample_rate=1)),
        ("undecodable_audio", wav(np.full(100, 0.5), sample_rate=999)),
        ("audio_too_long", wav(np.full(int(MAX_AUDIO_SECONDS * 1000) + 1, 0.5), sample_rate=1000, subtype="PCM_U8")),
        ("audio_too_long", wav(np.full((1 << 20, 257), 0.5, np.float32), 48_000, "PCM_U8")),
        ("audio_too_long", flac_that_claims(1 << 35)),
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


def jpeg(image: Image.Image, **arguments: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", **arguments)
    return file.getvalue()


def by_pillow(data: bytes, mode: str) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32),
    st.sampled_from(["L", "RGB", "CMYK"]), st.integers(1, 100), st.integers(0, 2), st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_jpeg_of_the_right_size_is_decoded_as_pillow_does_to_the_bit(
    height: int, width: int, seed: int, mode: str, quality: int, subsampling: int, progressive: bool, smooth: bool
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    if smooth:
        pixels = np.sort(pixels, axis=1)
    data = jpeg(Image.fromarray(pixels).convert(mode), quality=quality, subsampling=subsampling, progressive=progressive)
    for channels, wanted in ((1, "L"), (3, "RGB")):
        assert np.array_equal(decode_image(data, channels, height, width), by_pillow(data, wanted)), wanted


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpeg", "png", "webp"])
def test_an_image_is_turned_as_exif_says(orientation: int, extension: str) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # unlike itself however it is turned
    seen = Image.fromarray(pixels)
    back = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = seen.transpose(Image.Transpose[back[orientation]]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, extension, exif=exif, quality=95)
    decoded = decode_image(file.getvalue(), 3, 32, 32).astype(int)
    assert np.abs(decoded - pixels.transpose(2, 0, 1)).mean() < 10
    upright = decode_image(file.getvalue(), 1, 16, 16)
    assert upright[0, 1, 2] > 200 and upright[0, 13, 13] < 50


def test_exif_data_after_the_header_of_the_frame_turns_the_image_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 255
    data = jpeg(Image.fromarray(pixels), exif=exif)
    place = data.index(b"\xff\xe1")
    length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    scan = data.index(b"\xff\xda")
    moved = data[:place] + data[place + length : scan] + data[place : place + length] + data[scan:]
    assert np.array_equal(decode_image(moved, 1, 16, 16), decode_image(data, 1, 16, 16))
    assert decode_image(data, 1, 16, 16)[0, 2, 2] < 50


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.97), st.booleans(), st.sampled_from([1, 3]), st.sampled_from([8, 40]))
def test_a_truncated_jpeg_is_refused(share: float, progressive: bool, channels: int, size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = jpeg(Image.fromarray(pixels), progressive=progressive, quality=90)
    with pytest.raises(BadSample) as caught:
        decode_image(data[: int(share * len(data))], channels, size, size)
    assert caught.value.reason == "undecodable_image"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_image_has_the_wanted_shape_or_is_refused(data: st.DataObject) -> None:
    made = jpeg(Image.fromarray(GREY).convert("RGB")) if data.draw(st.booleans()) else Segment.from_image(GREY).file
    changed = bytearray(made)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadSample):
        assert decode_image(bytes(changed), 3, 6, 8).shape == (3, 6, 8)


def test_a_jpeg_with_two_headers_of_a_frame_has_the_wanted_shape_or_is_refused() -> None:
    small, large = jpeg(Image.new("RGB", (8, 8))), jpeg(Image.new("RGB", (64, 48)))
    place = small.index(b"\xff\xc0")
    frame = small[place : place + 2 + int.from_bytes(small[place + 2 : place + 4], "big")]
    # A restart marker has no length; what takes it for a segment of one jumps to a frame that is not there.
    jump = b"\xff\xd8\xff\xd0" + large[2:]
    jump = jump.ljust(4 + int.from_bytes(large[2:4], "big"), b"\0") + frame + b"\xff\xda" + bytes(64)
    for data in (large[:2] + frame + large[2:], large.replace(b"\xff\xda", frame + b"\xff\xda", 1), jump):
        with contextlib.suppress(BadSample):
            assert decode_image(data, 3, 8, 8).shape == (3, 8, 8)


def test_an_image_fills_the_wanted_shape_and_transparent_parts_are_white() -> None:
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
    st.sampled_from([8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 44101, 47999, 48000, 1009]),
    st.sampled_from([8000, 11025, 16000, 24000]),
    st.sampled_from([160, 320, 333]),
)
def test_the_length_after_resampling_is_known_from_the_header(samples: int, own: int, wanted: int, per_token: int) -> None:
    data = wav(np.full(samples, 0.5), own)
    vocabulary = Vocabulary(audio_codes=9, sample_rate=wanted, samples_per_token=per_token)
    decoded = decode_audio(data, wanted)
    assert len(decoded) == -(-samples * wanted // own)
    assert vocabulary.audio_tokens(*audio_size(data)) == -(-len(decoded) // per_token)


@pytest.mark.parametrize("own", [8000, 11025, 22050, 44100, 44101, 48000])
def test_a_resampled_tone_is_the_same_tone(own: int) -> None:
    seconds = np.arange(own * 3) / own
    decoded = decode_audio(wav(0.5 * np.sin(2 * np.pi * 440 * seconds), own), 16_000)
    assert len(decoded) == 48_000
    spectrum = np.abs(np.fft.rfft(decoded * np.hanning(len(decoded))))
    assert spectrum.argmax() / 3 == pytest.approx(440, abs=0.4)
    assert np.abs(decoded[4000:-4000]).max() == pytest.approx(0.5, abs=0.01)


def encoded_sound(kind: str, seconds: int = 4) -> bytes:
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000 * seconds)
    soundfile.write(file, noise + 0.3 * np.sin(np.arange(16_000 * seconds) / 9), 16_000, format=kind.upper())
    return file.getvalue()


SOUNDS = {kind: encoded_sound(kind) for kind in ("flac", "ogg", "mp3")}


@pytest.mark.parametrize("kind", SOUNDS)
def test_every_kind_of_sound_has_the_promised_length(kind: str) -> None:
    assert audio_size(SOUNDS[kind]) == (64_000, 16_000)
    for rate in (8000, 11_025, 16_000, 24_000):
        decoded = decode_audio(SOUNDS[kind], rate)
        assert len(decoded) == -(-64_000 * rate // 16_000) and decoded.dtype == np.float32
        assert np.abs(decoded[-rate:]).max() > 0.1, "and is no silence at its end"


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.85))
def test_a_truncated_flac_is_refused(share: float) -> None:
    with pytest.raises(BadSample) as caught:
        decode_audio(SOUNDS["flac"][: int(share * len(SOUNDS["flac"]))], 8000)
    assert caught.value.reason in ("truncated_audio", "undecodable_audio")


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.99), st.sampled_from(["ogg", "mp3"]))
def test_a_truncated_ogg_or_mp3_is_refused_or_has_the_length_that_its_header_says(share: float, kind: str) -> None:
    """An Ogg file says nowhere how long it is: that is where its last page ends."""
    data = SOUNDS[kind][: int(share * len(SOUNDS[kind]))]
    try:
        samples, rate = audio_size(data)
        assert len(decode_audio(data, 8000)) == -(-samples * 8000 // rate)
        assert kind == "ogg" or share > 0.85
    except BadSample as error:
        assert error.reason in ("truncated_audio", "undecodable_audio", "empty_audio")


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["flac", "ogg", "wav"]))
def test_a_damaged_sound_has_the_promised_length_or_is_refused(data: st.DataObject, kind: str) -> None:
    made = wav(TONE) if kind == "wav" else SOUNDS[kind]
    changed = bytearray(made)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, min(len(made), 400) - 1))] = data.draw(st.integers(0, 255))
    try:
        samples, rate = audio_size(bytes(changed))
        decoded = decode_audio(bytes(changed), 8000)
    except BadSample:
        return
    assert len(decoded) == -(-samples * 8000 // rate) and np.isfinite(decoded).all()


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
