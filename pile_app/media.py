"""Media files: their sizes from the header, and decoding to pixels (uint8) and mono samples (float32), within limits."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np

from pile_app.documents import SAMPLE_RATES, BadSample

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")  # whatever a file is called: Pillow hands EPS to Ghostscript, a program of its own

# A file may claim to be far larger than what it takes on disk; what claims more than this is refused before it is decoded.
MAX_IMAGE_PIXELS = 64_000_000
MAX_AUDIO_SECONDS = 3600.0
MAX_AUDIO_SAMPLES = 1 << 28  # over all channels: a gigabyte as float32
SILENCE = 1e-4  # of full scale


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels of an encoded image, from its header only."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:  # Pillow's own limit
        raise BadSample("image_too_large", str(error)) from error
    except Exception as error:
        raise BadSample("undecodable_image", str(error)) from error
    if width * height > MAX_IMAGE_PIXELS:
        raise BadSample("image_too_large", f"{width}x{height} pixels; at most {MAX_IMAGE_PIXELS:,} are decoded")
    return height, width


def decode_image(data: bytes, channels: int, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 pixels (channels, height, width): decoded, turned as EXIF says, transparent parts on white, resized (antialiased)
    to fill, and centre-cropped.

    `out`: contiguous (height, width, channels) uint8 to decode into; the result is a view of it.
    """
    if out is None:
        out = np.empty((height, width, channels), np.uint8)
    plain = _plain_jpeg_shape(data)  # grey of a colour file is another grey than Pillow's
    if plain not in ((1, height, width), (channels, height, width)) or not _decode_jpeg(data, out):
        out[:] = _decode_any(data, channels, height, width)
    return out.transpose(2, 0, 1)


def _decode_any(data: bytes, channels: int, height: int, width: int) -> np.ndarray:
    """(height, width, channels) uint8, by Pillow."""
    from PIL import Image, ImageOps

    image_size(data)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            # A JPEG may decode to a half, a quarter ... of its size in a fraction of the time; twice ours keeps the sharpness.
            file.draft(None, (2 * max(width, height), 2 * max(width, height)))
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            if image.size != (width, height):
                image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
    except Exception as error:
        raise BadSample("undecodable_image", str(error)) from error
    return pixels[..., None] if channels == 1 else pixels


def _plain_jpeg_shape(data: bytes) -> tuple[int, int, int] | None:
    """(components, height, width) of a JPEG file without Exif data, from its markers; None for all else. Pillow takes 20 times
    as long."""
    if data[:2] != b"\xff\xd8":
        return None
    shape = None
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:  # the image itself
            return shape
        if marker == 0xE1 or marker == 0xFF:  # Exif, which may turn the image; or padding, which is rare
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of a frame
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 5, place + 7))
            shape = data[place + 9], height, width
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _decode_jpeg(data: bytes, out: np.ndarray) -> bool:
    """Straight to its place, in half of Pillow's time and the same to the bit; False where libjpeg-turbo cannot (CMYK, damage:
    Pillow says), or where a made-up file holds another image than its markers say, which would fill a part of `out`."""
    import simplejpeg

    try:
        color = "GRAY" if out.shape[2] == 1 else "RGB"
        decoded = simplejpeg.decode_jpeg(data, color, fastdct=False, fastupsample=False, buffer=out)
    except ValueError:
        return False
    return bool(decoded.shape == out.shape)


def audio_size(data: bytes) -> tuple[int, int]:
    """(samples a channel, sample rate in Hz) of an encoded sound, from its header only."""
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(data))
    except Exception as error:
        raise BadSample("undecodable_audio", str(error)) from error
    _check_audio(info.frames, info.samplerate, info.channels)
    return info.frames, info.samplerate


def _check_audio(frames: int, sample_rate: int, channels: int) -> None:
    if frames <= 0:
        raise BadSample("empty_audio", "the sound has no samples")
    if not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise BadSample("undecodable_audio", f"{sample_rate} Hz; sample rates from {SAMPLE_RATES} are decoded")
    seconds = frames / sample_rate
    if seconds > MAX_AUDIO_SECONDS or frames * channels > MAX_AUDIO_SAMPLES:
        raise BadSample(
            "audio_too_long",
            f"{seconds:,.0f} seconds, {channels} channels; at most {MAX_AUDIO_SECONDS:,.0f} seconds and "
            f"{MAX_AUDIO_SAMPLES:,} samples are decoded",
        )


def decode_audio(data: bytes, sample_rate: int) -> np.ndarray:
    """float32 mono samples in [-1, 1] at `sample_rate` Hz: `ceil(samples * sample_rate / own rate)` of them.

    Raises:
        BadSample: `undecodable_audio`, `empty_audio`, `audio_too_long`, `truncated_audio`, `nan_audio` or `silent_audio`.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, own_rate = file.frames, file.samplerate
            _check_audio(promised, own_rate, file.channels)
            samples = file.read(promised, dtype="float32", always_2d=True)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("undecodable_audio", str(error)) from error
    if len(samples) < 0.9 * promised:  # the length that some headers state is an estimate, as in MP3
        raise BadSample("truncated_audio", f"{len(samples):,} of {promised:,} samples could be decoded")
    waveform = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    waveform = resample(waveform, own_rate, sample_rate)
    if not len(waveform) * SILENCE**2 <= np.einsum("i,i", waveform, waveform) < math.inf:  # else all is well, at a glance
        if not np.isfinite(waveform).all():
            raise BadSample("nan_audio", "the sound holds samples that are not finite numbers")
        if np.abs(waveform).max() < SILENCE:
            raise BadSample("silent_audio", "no sample is louder than -80 dB of full scale")
    return _fit_length(waveform, -(-promised * sample_rate // own_rate))


def resample(waveform: np.ndarray, own_rate: int, sample_rate: int) -> np.ndarray:
    """float32 samples (S,) at `own_rate` Hz to `sample_rate` Hz (windowed sinc)."""
    if own_rate == sample_rate:
        return waveform
    import torch

    return _resampler(own_rate, sample_rate)(torch.from_numpy(waveform)).numpy()


@lru_cache(16)
def _resampler(own_rate: int, sample_rate: int) -> Any:
    """Its filter takes milliseconds to compute, so it is kept. Rates without a common factor (44,101 Hz) would take gigabytes:
    those are rounded to 100 Hz, a hundredth of a semitone at most for usual rates."""
    from torchaudio.transforms import Resample

    common = math.gcd(own_rate, sample_rate)
    if max(own_rate, sample_rate) // common > 2000:
        own_rate = max(100, round(own_rate, -2))
    return Resample(own_rate, sample_rate)


def _fit_length(waveform: np.ndarray, samples: int) -> np.ndarray:
    return waveform[:samples] if len(waveform) >= samples else np.pad(waveform, (0, samples - len(waveform)))
