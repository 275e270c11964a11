"""Decode media: sizes from headers, images to uint8 pixels, sounds to mono float32 samples, within limits.

The content decides the format, not the file name. Only the formats in the tables below are opened: Pillow would hand an EPS
file to Ghostscript, and FFmpeg would follow the addresses in a playlist. Every error is a `BadSample`."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pile_app.documents import SAMPLE_RATES, BadSample

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow's names
AUDIO_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")  # libsndfile's; Opus is in OGG
FFMPEG_FORMATS = (  # (offset, bytes there, FFmpeg demuxer): decoded by PyAV
    (4, b"ftyp", "mov"),  # m4a
    (0, b"\x1aE\xdf\xa3", "matroska"),  # webm
    (0, bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "asf"),  # wma
)

# A small file may claim any size: beyond these limits nothing is decoded.
MAX_IMAGE_PIXELS = 64_000_000
MAX_AUDIO_SECONDS = 3600.0
MAX_AUDIO_SAMPLES = 1 << 28  # over all channels: 1 GiB as float32
SILENCE = 1e-4  # of full scale: -80 dB
Transform = Callable[[np.ndarray], np.ndarray]
PRIMING = 4096  # samples of silence, at most, that an AAC or Opus encoder puts before a sound and the decoder removes


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) in pixels as stored, from the header only."""
    with _open_image(data) as image:
        return image.height, image.width


def _open_image(data: bytes) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        is_bomb = isinstance(error, Image.DecompressionBombError)  # above Pillow's own limit
        raise BadSample("image_too_large" if is_bomb else "undecodable_image", str(error)) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise BadSample("image_too_large", f"{image.width}x{image.height} pixels; at most {MAX_IMAGE_PIXELS:,} are decoded")
    return image


def decode_image(
    data: bytes, channels: int, height: int, width: int, out: np.ndarray | None = None, transform: Transform | None = None
) -> np.ndarray:
    """Decode the first frame of an image to uint8 pixels (channels, height, width): rotated as its EXIF data says, transparent
    parts white, 16 bits as 8, resized (antialiased) to cover the wanted size and cropped at the center.

    out: contiguous (height, width, channels) uint8 buffer; the result is a view of it. transform: augmentation
    (H, W, channels) -> (H', W', channels), uint8; it sees at most twice the wanted size."""
    if out is None:
        out = np.empty((height, width, channels), np.uint8)
    if transform is not None or not _decode_jpeg(data, out):
        out[:] = _decode_any(data, channels, height, width, transform)
    return out.transpose(2, 0, 1)


def _decode_jpeg(data: bytes, out: np.ndarray) -> bool:
    """Decode a JPEG of the wanted size into `out`: the same pixels as Pillow, in 1/6 (32 pixels) to 3/4 (512) of its time.
    Return False, for Pillow to do it, where Exif data may rotate the image, for CMYK, for grey from color, and for damage."""
    header = data[: max(0, data.find(b"\xff\xda"))]  # up to the first scan
    if data[:2] != b"\xff\xd8" or b"\xff\xe1" in header or b"\xff\xe2" in header:  # Exif; or ICC, which may hold any bytes
        return False
    import simplejpeg

    grey = out.shape[2] == 1
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != out.shape[:2] or color not in (("Gray",) if grey else ("Gray", "YCbCr", "RGB")):
            return False
        simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", fastdct=False, fastupsample=False, buffer=out)
    except ValueError:
        return False
    return True


def load_image(data: bytes, side: int) -> Any:
    """Decode the first frame to a Pillow image with 8 bits a channel, in any mode, rotated as its EXIF data says. A JPEG of
    more than twice `side` pixels decodes to a half, a quarter ... of its size, in a fraction of the time."""
    from PIL import ImageOps

    with _open_image(data) as file:
        try:
            file.draft(None, (2 * side, 2 * side))
            return _to_8_bits(ImageOps.exif_transpose(file), getattr(file, "tag_v2", {}))
        except Exception as error:
            raise error if isinstance(error, BadSample) else BadSample("undecodable_image", str(error)) from error


def _decode_any(data: bytes, channels: int, height: int, width: int, transform: Transform | None) -> np.ndarray:
    """Decode any format with Pillow to (height, width, channels) uint8."""
    from PIL import Image, ImageOps

    image = load_image(data, max(width, height))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    except ValueError as error:  # a color space that Pillow cannot convert, such as LAB
        raise BadSample("undecodable_image", str(error)) from error
    if transform is not None:
        if image.width > 2 * width and image.height > 2 * height:
            image = ImageOps.cover(image, (2 * width, 2 * height))
        pixels = transform(np.array(image).reshape(image.height, image.width, channels))
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)


def _to_8_bits(image: Any, tags: Any) -> Any:
    """Scale grey of 9 to 16 bits, or floats from 0 to 1, to 8 bits; Pillow would clip it. `tags`: of a TIFF."""
    if not image.mode.startswith(("I", "F")):
        return image
    from PIL import Image

    values = np.asarray(image)
    highest = 1 if image.mode == "F" else 2 ** min(16, tags.get(258, (16,))[0]) - 1  # 258: bits per sample
    if not 0 <= values.min() <= values.max() <= highest:
        raise BadSample("undecodable_image", f"pixels from {values.min():g} to {values.max():g}; 0 to {highest} are decoded")
    grey = np.rint(values * (255 / highest)).astype(np.uint8)
    scaled = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)  # 262: photometric interpretation, 0: white is zero
    if (transparent := image.info.get("transparency")) is not None:
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


class _Sound(NamedTuple):
    """An opened sound. `read()` decodes to (S, channels) float32; `slack`: samples that decoding may lose."""

    frames: int
    rate: int
    channels: int
    read: Callable[[], np.ndarray]
    slack: int = 0


def audio_size(data: bytes) -> tuple[int, int]:
    """Return (samples a channel, sample rate in Hz) of a sound without decoding it."""
    return _open_sound(data)[:2]


def decode_audio(data: bytes, sample_rate: int) -> np.ndarray:
    """Decode a sound to float32 mono samples in [-1, 1] at `sample_rate` Hz: `ceil(samples * sample_rate / own rate)` of them.
    Channels are averaged; where that would cancel them (opposite phase), the loudest channel is used.

    Raises BadSample: `undecodable_audio`, `no_decoder`, `empty_audio`, `audio_too_long`, `truncated_audio`, `nan_audio` or
    `silent_audio`."""
    sound = _open_sound(data)
    try:
        samples = sound.read()
    except Exception as error:
        raise BadSample("undecodable_audio", str(error)) from error
    if sound.frames - len(samples) > max(sound.frames / 10, sound.slack):  # some headers only estimate the length
        raise BadSample("truncated_audio", f"{len(samples):,} of {sound.frames:,} samples could be decoded")
    waveform = resample(_mix_down(samples), sound.rate, sample_rate)
    if not len(waveform) * SILENCE**2 <= np.einsum("i,i", waveform, waveform) < math.inf:  # one fast check for good sounds
        if not np.isfinite(waveform).all():
            raise BadSample("nan_audio", "the sound holds samples that are not finite numbers")
        if np.abs(waveform).max(initial=0) < SILENCE:
            raise BadSample("silent_audio", "no sample is louder than -80 dB of full scale")
    length = -(-sound.frames * sample_rate // sound.rate)
    return waveform[:length] if len(waveform) >= length else np.pad(waveform, (0, length - len(waveform)))


def _mix_down(samples: np.ndarray) -> np.ndarray:
    """Average channels: (S, C) -> (S,). They cancel if the mean has less than a tenth of the energy of a mean of unrelated
    channels (the sum of their energies / C^2)."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    mean = samples.mean(axis=1)
    energies = np.einsum("sc,sc->c", samples, samples)
    cancels = np.einsum("s,s", mean, mean) < 0.1 * energies.sum() / samples.shape[1] ** 2
    return np.ascontiguousarray(samples[:, energies.argmax()]) if cancels else mean


def _open_sound(data: bytes) -> _Sound:
    demuxer = _ffmpeg_demuxer(data)
    try:
        sound = _open_with_pyav(data, demuxer) if demuxer else _open_with_soundfile(data)
    except ImportError as error:
        raise BadSample("no_decoder", f"{demuxer} (m4a, aac, webm, wma) needs PyAV: pip install 'pile-app[media]'") from error
    except Exception as error:
        raise BadSample("undecodable_audio", str(error)) from error
    if sound.frames <= 0:
        raise BadSample("empty_audio", "the sound has no samples")
    if not SAMPLE_RATES[0] <= sound.rate <= SAMPLE_RATES[1]:
        raise BadSample("undecodable_audio", f"{sound.rate} Hz; sample rates from {SAMPLE_RATES} are decoded")
    if sound.frames > MAX_AUDIO_SECONDS * sound.rate or sound.frames * sound.channels > MAX_AUDIO_SAMPLES:
        limit = f"up to {MAX_AUDIO_SECONDS:g} s and {MAX_AUDIO_SAMPLES:,} samples are decoded"
        raise BadSample("audio_too_long", f"{sound.frames / sound.rate:,.0f} s, {sound.channels} channels; {limit}")
    return sound


def _open_with_soundfile(data: bytes) -> _Sound:
    import soundfile

    file = soundfile.SoundFile(io.BytesIO(data))
    if file.format not in AUDIO_FORMATS:
        raise ValueError(f"{file.format} is none of {', '.join(AUDIO_FORMATS)}")
    return _Sound(file.frames, file.samplerate, file.channels, lambda: file.read(file.frames, "float32", always_2d=True))


def _ffmpeg_demuxer(data: bytes) -> str:
    for offset, start, name in FFMPEG_FORMATS:
        if data[offset : offset + len(start)] == start:
            return name
    first = 0
    if data[:3] == b"ID3" and len(data) > 10:  # a tag before the sound, its size in 7 bits a byte
        first = 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])
    header = data[first : first + 2]
    return "aac" if len(header) == 2 and header[0] == 0xFF and header[1] & 0xF6 == 0xF0 else ""


def _open_with_pyav(data: bytes, demuxer: str) -> _Sound:
    """Take the length from the times of the packets: in headers it is missing (webm of browsers) or an estimate (AAC)."""
    import av

    with av.open(io.BytesIO(data), format=demuxer) as container:
        stream = container.streams.audio[0]
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        packets = [(one.pts, one.pts + (one.duration or 0)) for one in container.demux(stream) if one.pts is not None]
        first, last = min(packets, default=(0, 0))[0], max((stop for _, stop in packets), default=0)
        frames = round((last - max(0, first)) * stream.time_base * rate)  # priming comes before 0

    def read() -> np.ndarray:
        parts, length = [np.zeros((channels, 0), np.float32)], 0
        with av.open(io.BytesIO(data), format=demuxer) as container:
            to_planes = av.AudioResampler(format="fltp")
            for frame in container.decode(container.streams.audio[0]):
                parts += [planes.to_ndarray() for planes in to_planes.resample(frame)]
                length += frame.samples
                if length >= frames:
                    break
        return np.concatenate(parts, axis=1)[:, :frames].T

    return _Sound(frames, rate, channels, read, PRIMING)


def resample(waveform: np.ndarray, own_rate: int, sample_rate: int) -> np.ndarray:
    """Resample float32 samples (S,) from `own_rate` to `sample_rate` Hz (windowed sinc)."""
    if own_rate == sample_rate:
        return waveform
    import torch

    return _resampler(own_rate, sample_rate)(torch.from_numpy(np.ascontiguousarray(waveform))).numpy()


@lru_cache(64)
def _resampler(own_rate: int, sample_rate: int) -> Any:
    """Make a resampler, which takes milliseconds. Rates without a common factor (44,101 Hz) would take gigabytes, and are
    rounded to 100 Hz."""
    from torchaudio.transforms import Resample

    common = math.gcd(own_rate, sample_rate)
    if max(own_rate, sample_rate) // common > 2000:
        own_rate = max(100, round(own_rate, -2))
    return Resample(own_rate, sample_rate)


def split_at_silence(waveform: np.ndarray, rate: int, max_seconds: float) -> list[tuple[int, int]]:
    """Split mono samples (S,) into pieces of at most `max_seconds`, each cut at the quietest moment of its second half. Return
    [start, stop) in samples, which together are the whole sound; several pieces have `max_seconds / 4` or more each."""
    longest, step = int(max_seconds * rate), max(1, rate // 50)
    if longest < 10 * step:
        raise ValueError(f"max_seconds must be at least {10 * step / rate:g}, not {max_seconds}")
    if len(waveform) <= longest:
        return [(0, len(waveform))]
    frames = waveform[: len(waveform) // step * step].reshape(-1, step)
    energy = np.convolve(np.einsum("fs,fs->f", frames, frames), np.ones(5), "same")  # of 0.1 seconds around each frame
    pieces, start = [], 0
    while len(waveform) - start > longest:
        last = min(longest, len(waveform) - start - longest // 4)  # leaves a piece that is not too short
        low, high = -(-(start + longest // 2) // step), (start + last) // step
        cut = (high - 1 - int(energy[low:high][::-1].argmin())) * step + step // 2  # the last of equally quiet moments
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(waveform))]
