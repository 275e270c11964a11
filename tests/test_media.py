"""The promises of `media.py`: each kind of file decodes to what it shows, and hostile files are refused with a reason."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, UNREADABLE_EXTENSIONS, BadSample, Segment
from pile_app.fields import document_from_sample
from pile_app.media import MAX_AUDIO_SECONDS, audio_size, decode_audio, decode_image, image_size, split_at_silence
from pile_app.tasks.media_index import thumbnail
from pile_app.vocabulary import Vocabulary

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
TONE = 0.5 * np.sin(np.arange(800) / 5)


def wav(samples: np.ndarray, sample_rate: int = 8000, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, subtype, format="WAV")
    return file.getvalue()


def png(width: int, height: int, bits: int = 8, color: int = 0, rows: bytes = b"") -> bytes:
    """A PNG by hand; its header may claim any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    pixels = zlib.compress(rows) if rows else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def flac_that_claims(samples: int) -> bytes:
    """A FLAC of a few bytes whose header claims any length (36 bits)."""
    data = bytearray(Segment.from_audio(TONE, 8000).file)
    offset = 8 + 13  # "fLaC", the header of STREAMINFO, its fields before
    data[offset] = data[offset] & 0xF0 | samples >> 32
    data[offset + 1 : offset + 5] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def test_a_file_is_decoded_as_the_format_of_an_image_and_nothing_else() -> None:
    """An EPS would be run by Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for use in (image_size, lambda data: decode_image(data, 1, 8, 8)):
        with pytest.raises(BadSample, match="undecodable_image: cannot identify image file"):
            use(eps)


def test_a_jpeg_that_is_smaller_than_its_markers_say_is_refused() -> None:
    """Otherwise pixels of the image that was decoded into this memory before would remain."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 90, np.uint8)).save(file, "jpeg")
    plain = file.getvalue()
    data = plain[:2] + b"\xff\x01" + plain[2:]  # a marker without a length
    data = data.ljust(4 + int.from_bytes(data[4:6], "big"), b"\0")
    data += b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 8, 8) + b"\x03" + bytes(3) + b"\xff\xda" + bytes(20)
    with pytest.raises(BadSample, match="undecodable_image"):
        decode_image(data, 3, 8, 8, out=np.full((8, 8, 3), 200, np.uint8))


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("undecodable_image", b"no image"),
        ("undecodable_image", b""),
        ("undecodable_image", Segment.from_image(GREY).file[:45]),
        ("image_too_large", png(8001, 8000)),
        ("image_too_large", png(10_000, 10_000)),  # Pillow warns
        ("image_too_large", png(60_000, 60_000)),  # Pillow refuses
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
    """An Ogg file has no field for its length: that is the end of its last page."""
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


# Kinds of images


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = RAMP.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(WIDE), "png"),
        saved(Image.fromarray(WIDE), "tiff"),
        saved(Image.fromarray(65535 - WIDE), "tiff", tiffinfo={262: 0}),  # white is zero
        saved(Image.fromarray(WIDE.astype(np.int32)), "tiff"),
        saved(Image.fromarray((RAMP / 255).astype(np.float32)), "tiff"),
        saved(Image.fromarray(WIDE), "png", transparency=0x1234),  # a grey that no pixel has
    ],
    ids=["png", "tiff", "inverted", "32 bits", "float", "transparency"],
)
def test_a_ramp_of_16_bits_is_the_ramp_of_8_bits(data: bytes) -> None:
    """Fault 5: it was white."""
    for channels in (1, 3):
        assert (decode_image(data, channels, 16, 16) == RAMP).all()


def test_pictures_of_16_bits_are_shown_as_they_are() -> None:
    """Whoever writes an image again, such as the search page, takes the pixels that training takes."""
    shown = Image.open(io.BytesIO(thumbnail(saved(Image.fromarray(WIDE), "png"))))
    assert np.abs(np.asarray(shown.convert("L")).astype(int) - RAMP).mean() < 4


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
def test_every_kind_of_16_bit_png_is_decoded(color: int, channels: int) -> None:
    pixels = np.full((8, 8, channels), 65535, ">u2")
    pixels[..., 0] = 30_000
    data = png(8, 8, 16, color, b"".join(b"\0" + row.tobytes() for row in pixels))
    expected = [117] * 3 if channels < 3 else [117, 255, 255]
    assert decode_image(data, 3, 8, 8)[:, 0, 0].tolist() == expected


@pytest.mark.parametrize("extension", [*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS, *UNREADABLE_EXTENSIONS])
def test_a_caption_never_loses_its_medium_without_a_word(extension: str) -> None:
    """Fault 3: gif+txt and m4a+txt became texts without a medium."""
    try:
        document = document_from_sample("k", {extension: b"medium", "txt": b"caption"})
        assert {segment.extension for segment in document.segments} == {extension, "txt"}
    except BadSample as error:
        assert extension in UNREADABLE_EXTENSIONS and error.reason == "unreadable_medium"


def test_transparent_grey_of_16_bits_is_white_and_pixels_without_a_known_range_are_refused() -> None:
    assert decode_image(saved(Image.fromarray(WIDE), "png", transparency=0), 1, 16, 16)[0, 0, :2].tolist() == [255, 1]
    for values in (WIDE.astype(np.int32) * 1000, WIDE.astype(np.float32), np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(BadSample, match="undecodable_image: pixels from"):
            decode_image(saved(Image.fromarray(values), "tiff"), 1, 8, 8)


COLORS = Image.new("RGB", (16, 8), (200, 30, 60))


@pytest.mark.parametrize("kind", ["png", "gif", "bmp", "tiff", "webp", "avif", "jpeg"])
def test_every_kind_of_image_is_decoded(kind: str) -> None:
    data = saved(COLORS, kind)
    assert image_size(data) == (8, 16)
    decoded = decode_image(data, 3, 8, 16)
    assert np.abs(decoded.astype(int) - np.array([200, 30, 60]).reshape(3, 1, 1)).max() < 12


@pytest.mark.parametrize(
    "image",
    [
        COLORS.quantize(4),
        COLORS.convert("CMYK"),
        COLORS.convert("RGBA"),
        Image.merge("LA", (Image.new("L", (16, 8), 90), Image.new("L", (16, 8), 255))),
        Image.new("1", (16, 8), 1),
        COLORS.convert("YCbCr"),
    ],
    ids=lambda image: image.mode,
)
def test_every_mode_of_pixels_is_decoded(image: Image.Image) -> None:
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(int)
    assert np.abs(decode_image(saved(image, "tiff"), 3, 8, 16) - expected).max() <= 1


def test_transparent_parts_of_a_palette_are_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, 4, 8))
    for kind in ("png", "gif"):
        decoded = decode_image(saved(image, kind, transparency=0), 3, 8, 8)
        assert (decoded[:, :, :4] == 255).all() and decoded[:, 0, 7].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp", "png", "avif"])
def test_the_first_frame_of_several_is_decoded(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert image_size(data) == (16, 16)
    red, green, blue = decode_image(data, 3, 16, 16).reshape(3, -1).mean(1)
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("undecodable_image", b"8BPS" + bytes(60)),  # formats that Pillow knows, and nobody asked for
        ("undecodable_image", saved(COLORS, "ico")),
        ("undecodable_image", saved(COLORS, "pdf")),
        ("undecodable_image", saved(COLORS, "ppm")),
        ("image_too_large", b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"," + bytes(9) + b"\2\2L\1\0;"),
        ("image_too_large", b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0)),
        ("undecodable_image", saved(COLORS, "gif")[:40]),
        ("undecodable_image", saved(COLORS, "tiff")[:60]),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size", "ignore:Truncated File Read")
def test_other_formats_and_bombs_are_refused(reason: str, data: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(data, 3, 8, 8)
    assert caught.value.reason == reason


# Kinds of sounds


def test_channels_in_opposite_phase_are_heard() -> None:
    """Fault 20: their mean is silence."""
    for channels in ([TONE, -TONE], [TONE, -0.99 * TONE], [0 * TONE, TONE, -TONE, 0 * TONE]):
        decoded = decode_audio(wav(np.stack(channels, 1)), 8000)
        assert np.abs(np.abs(decoded) - np.abs(TONE)).max() < 1e-3
    unrelated = np.random.default_rng(0).uniform(-0.9, 0.9, (800, 6))
    assert np.abs(decode_audio(wav(unrelated), 8000) - unrelated.mean(1)).max() < 1e-3
    with pytest.raises(BadSample, match="silent_audio"):
        decode_audio(wav(np.zeros((100, 2))), 8000)


def test_opus_in_ogg_needs_no_extra() -> None:
    file = io.BytesIO()
    seconds = np.arange(48_000) / 48_000
    soundfile.write(file, 0.5 * np.sin(2 * np.pi * 440 * seconds), 48_000, "OPUS", format="OGG")
    assert audio_size(file.getvalue()) == (48_000, 48_000)
    assert np.abs(decode_audio(file.getvalue(), 16_000)[2000:-2000]).max() == pytest.approx(0.5, abs=0.05)


CONTAINERS = {"ipod": "aac", "adts": "aac", "webm": "libopus", "mp4": "aac", "matroska": "aac"}


def in_container(kind: str, sound: np.ndarray, rate: int = 48_000) -> bytes:
    """Stereo, both channels alike."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(CONTAINERS[kind], rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([sound, sound]).astype(np.float32), format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_m4a_aac_webm_are_decoded_by_pyav(kind: str) -> None:
    data = in_container(kind, 0.5 * np.sin(2 * np.pi * 440 * np.arange(96_000) / 48_000))
    samples, rate = audio_size(data)
    assert rate == 48_000 and 0 <= samples - 96_000 < 4096
    decoded = decode_audio(data, 16_000)
    assert len(decoded) == -(-samples // 3)
    spectrum = np.abs(np.fft.rfft(decoded[:32_000] * np.hanning(32_000)))
    assert spectrum.argmax() / 2 == 440 and np.abs(decoded[8000:24_000]).max() == pytest.approx(0.5, abs=0.05)
    tagged = b"ID3\4\0\0\0\0\0\4tags" + data
    assert kind != "adts" or len(decode_audio(tagged, 16_000)) == len(decoded)
    rng = np.random.default_rng(0)
    for _ in range(20):  # damage is refused, or the promised length is kept
        changed = bytearray(data)
        for place in rng.integers(0, 600, 3):
            changed[place] = rng.integers(256)
        with contextlib.suppress(BadSample):
            samples, rate = audio_size(bytes(changed))
            assert len(decode_audio(bytes(changed), 8000)) == -(-samples * 8000 // rate)


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    for data in (b"\0\0\0\x1cftypM4A \0\0", b"\x1aE\xdf\xa3rest", b"\xff\xf1L\x80"):
        with pytest.raises(BadSample, match=r"no_decoder: .* pip install 'pile-app\[media\]'"):
            audio_size(data)


def test_playlists_are_not_followed() -> None:
    for data in (b"#EXTM3U\nhttp://127.0.0.1:9/x.aac\n", b"ffconcat version 1.0\nfile /etc/passwd\n"):
        with pytest.raises(BadSample, match="undecodable_audio"):
            audio_size(data)


# Cutting at silence


@settings(max_examples=60)
@given(st.integers(0, 60_000), st.floats(0.2, 5), st.integers(0, 2**32))
def test_pieces_are_the_whole_sound_in_order_and_within_the_limit(samples: int, seconds: float, seed: int) -> None:
    waveform = np.random.default_rng(seed).standard_normal(samples).astype(np.float32)
    pieces = split_at_silence(waveform, 1000, seconds)
    longest = int(seconds * 1000)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])] and pieces[-1][1] == samples
    assert all(stop - start <= longest for start, stop in pieces)
    assert len(pieces) == 1 or min(stop - start for start, stop in pieces) >= longest // 4


def test_a_sound_is_split_in_its_pauses() -> None:
    waveform = np.sin(np.arange(90_000) / 3).astype(np.float32)
    pauses = [(21_000, 23_000), (46_500, 48_000), (70_000, 70_900)]
    for start, stop in pauses:
        waveform[start:stop] *= 0.001
    cuts = [stop for _, stop in split_at_silence(waveform, 8000, 3.5)[:-1]]
    assert len(cuts) == 3 and all(start < cut < stop for cut, (start, stop) in zip(cuts, pauses, strict=True))
    assert split_at_silence(waveform, 8000, 12) == [(0, 90_000)]
    with pytest.raises(ValueError, match=r"max_seconds must be at least 0\.2, not 0\.1"):
        split_at_silence(waveform, 8000, 0.1)
