"""Documents: the one thing every room of Pile talks about.

A document is an ordered list of segments; a segment is text, an image or a sound. Media are held as the files they came
as (PNG, JPEG, FLAC, WAV ...), so that writing a document to a shard and reading it back changes nothing.

A WebDataset sample (the files of a tar that share a key) becomes a document in one of two ways:

* its `json` names the segments in order:
  `{"segments": [{"text": "three"}, {"file": "0.png"}, {"file": "1.flac", "loss": false}], "meta": {...}}`, and may say
  `"ordered": false` where their order is free;
* otherwise every `txt`, image and sound file is a segment. Their order is free: training draws it anew in every epoch, as a
  function of the position (`Document.ordered` is False).

A segment may also be *encoded*: the token ids themselves, as `pile encode` writes them, instead of the text or the medium they
were made of (`Codes`).

`Vocabulary` says how a document becomes one row of token ids, for the data path and the model alike:

    <begin> <text> b y t e s <image> c c c c <audio> a a a a a <audio_end> <end>

An image takes a fixed number of codes, so it needs no closing token; a text ends where the next opener or `<end>` stands.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

MODALITIES = ("text", "image", "audio")
TEXT, IMAGE, AUDIO = range(3)

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")  # whatever a file is called: Pillow hands EPS to Ghostscript, a program of its own
AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "ogg")
ENCODED_EXTENSIONS = ("textids", "imagecodes", "audiocodes")  # by modality
MODALITY_OF_EXTENSION = (
    {"txt": TEXT, "cls": TEXT}
    | dict.fromkeys(IMAGE_EXTENSIONS, IMAGE)
    | dict.fromkeys(AUDIO_EXTENSIONS, AUDIO)
    | {extension: modality for modality, extension in enumerate(ENCODED_EXTENSIONS)}
)

# A file may claim to be far larger than what it takes on disk; what claims more than this is refused before it is decoded.
MAX_IMAGE_PIXELS = 64_000_000
MAX_AUDIO_SECONDS = 3600.0
MAX_AUDIO_SAMPLES = 1 << 28  # over all channels: a gigabyte as float32
SILENCE = 1e-4  # of full scale
SAMPLE_RATES = (1_000, 768_000)  # Hz


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is a short name that rejections are counted by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Segment:
    """Text (`data` is a str) or one media file (`data` is its bytes, `extension` its kind without the dot).

    `loss` is False where the segment is given and not to be learned (a question, say): it is context only. Where training reads
    it from an indexed shard, `ids` (tokens,) are those of a text, by the model's tokenizer, in place of `data`, and `size` is
    the `segment_size` of a medium.
    """

    data: str | bytes
    extension: str = "txt"
    loss: bool = True
    ids: np.ndarray | None = field(default=None, compare=False)
    size: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def modality(self) -> int:
        return MODALITY_OF_EXTENSION[self.extension]

    @property
    def text(self) -> str:
        if not isinstance(self.data, str):
            raise ValueError("this text is encoded, as token ids: use the shards that it was encoded from")
        return self.data

    @property
    def file(self) -> bytes:
        assert isinstance(self.data, bytes)
        return self.data

    @property
    def is_encoded(self) -> bool:
        return self.extension in ENCODED_EXTENSIONS

    @property
    def codes(self) -> Codes:
        """Of an encoded segment. Raises `BadSample` (`damaged_codes`) where its file is not what `Codes.to_bytes` writes."""
        return Codes.from_bytes(self.file)

    @classmethod
    def from_image(cls, pixels: np.ndarray, loss: bool = True) -> Segment:
        """A PNG segment from uint8 pixels (H, W) or (H, W, C) with 1 or 3 channels."""
        from PIL import Image

        file = io.BytesIO()
        grey = pixels.ndim == 3 and pixels.shape[2] == 1
        Image.fromarray(pixels[..., 0] if grey else pixels).save(file, "png")
        return cls(file.getvalue(), "png", loss)

    @classmethod
    def from_audio(cls, waveform: np.ndarray, sample_rate: int, extension: str = "flac", loss: bool = True) -> Segment:
        """A sound segment from mono samples in [-1, 1], stored with 16 bits a sample. `sample_rate` in Hz."""
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, np.clip(waveform, -1, 1), sample_rate, "PCM_16", format=extension.upper())
        return cls(file.getvalue(), extension, loss)


@dataclass(frozen=True)
class Codes:
    """What stands in the file of an encoded segment.

    encoder: 32 hexadecimal digits, the fingerprint of the tokenizer or codec; size: UTF-8 bytes, pixels, or samples a channel
    of what was encoded; sample_rate: Hz, 0 but for sounds; values: (T,) ids from 0, of the tokenizer or the code book; breaks:
    (2, K), places where a sentence of a text ends, in UTF-8 bytes and in tokens; is_lost: the sample was damaged when it was to
    be encoded, and only the number of the values counts, which keeps its place in the order.
    """

    encoder: str
    size: int
    sample_rate: int
    values: np.ndarray
    breaks: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.uint32))
    is_lost: bool = False

    HEADER = struct.Struct("<16sQIHHI")  # encoder, size, sample rate, bytes of a value, is lost, number of breaks

    def to_bytes(self) -> bytes:
        """Header, breaks as uint32, values as uint16 or uint32, all little-endian."""
        item = 2 if int(self.values.max(initial=0)) < 1 << 16 else 4
        encoder, breaks = bytes.fromhex(self.encoder), self.breaks.shape[1]
        header = self.HEADER.pack(encoder, self.size, self.sample_rate, item, self.is_lost, breaks)
        return header + self.breaks.astype("<u4").tobytes() + self.values.astype(f"<u{item}").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Codes:
        try:
            encoder, size, sample_rate, item, is_lost, count = cls.HEADER.unpack_from(data)
            breaks = np.frombuffer(data, "<u4", 2 * count, cls.HEADER.size).reshape(2, count)
            values = np.frombuffer(data, {2: "<u2", 4: "<u4"}[item], -1, cls.HEADER.size + 8 * count)
        except (struct.error, ValueError, KeyError) as error:
            raise BadSample("damaged_codes", f"the file of an encoded segment is damaged: {error}") from error
        if size >= 1 << 40 or (sample_rate and not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]):
            raise BadSample("damaged_codes", f"it claims {size:,} of something, at {sample_rate:,} Hz")
        return cls(encoder.hex(), size, sample_rate, values, breaks, bool(is_lost))


@dataclass(frozen=True)
class Document:
    """Segments in order. `ordered` is False where the order of the segments is free, `meta` is kept but not learned."""

    segments: tuple[Segment, ...]
    key: str = ""
    ordered: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict)


def document_from_sample(key: str, files: Mapping[str, bytes]) -> Document:
    """The document of a WebDataset sample, `files` by extension (what follows the first dot of the name).

    Raises:
        BadSample: `invalid_utf8`, `invalid_json`, `missing_file` or `no_segment`.
    """
    return document_and_files(key, files)[0]


def document_and_files(key: str, files: Mapping[str, bytes]) -> tuple[Document, list[str]]:
    """The same, and which of the files is each segment; "" for a text that stands in the `json`."""
    description = _parse_json(key, files["json"]) if "json" in files else {}
    meta = description.get("meta", {})
    if not isinstance(meta, dict):
        raise BadSample("invalid_json", f"the meta of sample {key!r} is a {type(meta).__name__}, not an object")
    if "segments" in description:
        if not isinstance(description["segments"], list):
            raise BadSample("invalid_json", f"the segments of sample {key!r} are not a list")
        named = [_named_segment(key, entry, files) for entry in description["segments"]]
        ordered = bool(description.get("ordered", True))
    else:
        named = [
            (name, _segment_from_file(key, name, data))
            for name, data in sorted(files.items(), key=lambda file: (file[0].rsplit(".", 1)[-1] == "cls", file[0]))
            if name.rsplit(".", 1)[-1].lower() in MODALITY_OF_EXTENSION  # what something is comes after it
        ]
        if isinstance(description.get("text"), str):
            named.append(("", Segment(description["text"])))
        ordered = len(named) < 2
    named = [(name, segment) for name, segment in named if segment.data]
    if not named:
        raise BadSample("no_segment", f"sample {key!r} holds no text, image or sound, only {sorted(files)}")
    return Document(tuple(segment for _, segment in named), key, ordered, meta), [name for name, _ in named]


def sample_from_document(document: Document) -> dict[str, str | bytes]:
    """The WebDataset sample of a document, `__key__` included: the inverse of `document_from_sample`. A text alone is a `txt`,
    anything else has a `json`."""
    sample: dict[str, str | bytes] = {"__key__": document.key}
    first = document.segments[0]
    if len(document.segments) == 1 and isinstance(first.data, str) and first.loss and document.ordered and not document.meta:
        return sample | {"txt": first.text.encode()}
    entries: list[dict[str, Any]] = []
    for number, segment in enumerate(document.segments):
        entry: dict[str, Any]
        if isinstance(segment.data, str):
            entry = {"text": segment.text}
        else:
            entry = {"file": f"{number}.{segment.extension}"}
            sample[entry["file"]] = segment.file
        entries.append(entry if segment.loss else entry | {"loss": False})
    description: dict[str, Any] = {"segments": entries} | ({"meta": dict(document.meta)} if document.meta else {})
    if not document.ordered:
        description["ordered"] = False
    sample["json"] = json.dumps(description, ensure_ascii=False, sort_keys=True).encode()
    return sample


def _parse_json(key: str, data: bytes) -> dict[str, Any]:
    try:
        description = json.loads(data)
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", f"json of sample {key!r}: {error}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: lists in lists in lists ...
        raise BadSample("invalid_json", f"json of sample {key!r}: {error}") from error
    if not isinstance(description, dict):
        raise BadSample("invalid_json", f"json of sample {key!r} is a {type(description).__name__}, not an object")
    return description


def _named_segment(key: str, entry: Any, files: Mapping[str, bytes]) -> tuple[str, Segment]:
    if not isinstance(entry, dict) or not any(isinstance(entry.get(name), str) for name in ("text", "file")):
        raise BadSample(
            "invalid_json", f"a segment of sample {key!r} has neither a text nor the name of a file: {entry!r:.100}"
        )
    loss = bool(entry.get("loss", True))
    if isinstance(entry.get("text"), str):
        return "", Segment(entry["text"], loss=loss)
    name = entry["file"]
    if name not in files:
        raise BadSample("missing_file", f"sample {key!r} names {name!r} as a segment but holds only {sorted(files)}")
    return name, _segment_from_file(key, name, files[name], loss)


def _segment_from_file(key: str, name: str, data: bytes, loss: bool = True) -> Segment:
    extension = name.rsplit(".", 1)[-1].lower()
    if extension not in MODALITY_OF_EXTENSION:
        known = ", ".join(MODALITY_OF_EXTENSION)
        raise BadSample("unknown_extension", f"sample {key!r} has a segment {name!r}; known extensions are {known}")
    if MODALITY_OF_EXTENSION[extension] != TEXT or extension in ENCODED_EXTENSIONS:
        return Segment(data, extension, loss)
    try:
        return Segment(data.decode(), "txt", loss)
    except UnicodeDecodeError as error:
        raise BadSample("invalid_utf8", f"{name!r} of sample {key!r}: {error}") from error


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


_SENTENCE_END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["'\u2019\u201d)\]]*(?=\s)|\n+(?=\S)|[\u3002\uff01\uff1f](?=\S)""")
BREAK_SPACING = 128  # least characters between two of them: they are for cuts, not for grammar


def sentence_ends(text: str) -> list[int]:
    """Places (in characters, increasing) where a long text had best be cut: after the end of a sentence or line."""
    ends: list[int] = []
    if len(text) <= 2 * BREAK_SPACING:
        return ends
    place = BREAK_SPACING
    while found := _SENTENCE_END.search(text, place):
        if found.end() >= len(text):
            break
        ends.append(found.end())
        place = found.end() + BREAK_SPACING
    return ends


@dataclass(frozen=True)
class Vocabulary:
    """The one range of token ids and the number of tokens of every segment. Pure arithmetic: no files, no tensors.

    Ids are, in order: six special tokens, text tokens, image codes, audio codes, `<audio_end>`. Every slice that a softmax runs
    over is contiguous: specials and text; image codes; audio codes and `<audio_end>`.

    Args:
        text_tokens: size of the tokenizer's vocabulary (256 for bytes).
        image_codes: size of the image codec's code book, 0 without images.
        image_shape: (channels, height, width) that every image is resized to.
        image_grid: (rows, columns) of codes an image takes.
        audio_codes: size of the audio codec's code book, 0 without sound.
        sample_rate: Hz that every sound is resampled to.
        samples_per_token: samples that one audio code stands for.
        tokenizer: fingerprint of the tokenizer, "bytes" for UTF-8 bytes.
        image_codec: fingerprint of the image codec, where it is frozen from the start of the run.
        audio_codec: fingerprint of the audio codec, likewise.
    """

    text_tokens: int = 256
    image_codes: int = 0
    image_shape: tuple[int, int, int] = (0, 0, 0)
    image_grid: tuple[int, int] = (0, 0)
    audio_codes: int = 0
    sample_rate: int = 0
    samples_per_token: int = 0
    tokenizer: str = "bytes"
    image_codec: str = ""
    audio_codec: str = ""

    BEGIN = 0  # opens a document
    END = 1  # closes a document
    OPENERS = (2, 3, 4)  # of a text, an image, a sound: `OPENERS[modality]`
    NULL = 5  # stands where a condition was dropped (classifier-free guidance)
    SPECIALS = 6

    @cached_property
    def starts(self) -> tuple[int, int, int]:
        """First id of the text tokens, of the image codes, of the audio codes."""
        image = self.SPECIALS + self.text_tokens
        return self.SPECIALS, image, image + self.image_codes

    @property
    def audio_end(self) -> int:
        return self.starts[AUDIO] + self.audio_codes

    @property
    def size(self) -> int:
        return self.audio_end + 1

    @cached_property
    def slices(self) -> tuple[slice, slice, slice]:
        """The ids each modality's softmax runs over."""
        _, image, audio = self.starts
        return slice(0, image), slice(image, audio), slice(audio, self.size)

    @property
    def image_tokens(self) -> int:
        return self.image_grid[0] * self.image_grid[1]

    @property
    def modalities(self) -> tuple[int, ...]:
        """The modalities this vocabulary can read and write."""
        sizes = (self.text_tokens, self.image_codes, self.audio_codes)
        return tuple(modality for modality, size in enumerate(sizes) if size)

    def audio_tokens(self, samples: Any, sample_rate: Any) -> Any:
        """Number of codes of a sound with `samples` samples at `sample_rate` Hz; ints or integer arrays."""
        resampled = -(-samples * self.sample_rate // sample_rate)  # ceil, as torchaudio's resample returns
        return -(-resampled // self.samples_per_token)

    def segment_tokens(self, modality: int, size: int, sample_rate: int = 0) -> int:
        """Tokens of one segment, its opener (and `<audio_end>`) included. `size`: text tokens, or samples of a sound."""
        if modality == TEXT:
            return 1 + size
        if modality == IMAGE:
            return 1 + self.image_tokens
        return 2 + int(self.audio_tokens(size, sample_rate))

    @property
    def audio_tokens_per_second(self) -> float:
        return self.sample_rate / self.samples_per_token if self.samples_per_token else math.nan


def describe(document: Document, limit: int = 200) -> str:
    """One line a segment, for people: texts shortened to `limit` characters, media as their kind and size."""
    lines: Sequence[str] = [
        repr(segment.text[:limit]) + (" ..." if len(segment.text) > limit else "")
        if isinstance(segment.data, str)
        else f"<{MODALITIES[segment.modality]}: {segment.extension}, {len(segment.data):,} bytes>"
        for segment in document.segments
    ]
    return "\n".join(lines)
