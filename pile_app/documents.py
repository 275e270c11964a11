"""Documents: ordered lists of segments, each text, an image or a sound.

Media stay the files they came as (PNG, JPEG, FLAC ...), so writing a document to a shard and reading it back changes nothing.
`sample_from_document` writes Pile's own form of a WebDataset sample, a `json` that names the segments in order:

    {"segments": [{"text": "three"}, {"file": "0.png"}, {"file": "1.flac", "loss": false}], "meta": {...}}"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODALITIES = ("text", "image", "audio")
TEXT, IMAGE, AUDIO = range(3)

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif")
AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "ogg", "oga", "opus", "aif", "aiff", "m4a", "aac", "webm", "weba", "wma")
UNREADABLE_EXTENSIONS = (  # media that nothing here decodes: a text with such a file is no document of its own
    "mp4", "m4v", "avi", "mov", "mkv", "mpg", "mpeg", "wmv", "flv", "3gp", "ogv", "svg", "heic", "heif", "jxl", "jp2", "psd",
    "eps", "ico", "raw", "cr2", "nef", "dng", "exr", "hdr", "mid", "midi", "amr", "ape", "pdf",
)  # fmt: skip
ENCODED_EXTENSIONS = ("textids", "imagecodes", "audiocodes")  # by modality
MODALITY_OF_EXTENSION = {"txt": TEXT} | dict.fromkeys(IMAGE_EXTENSIONS, IMAGE) | dict.fromkeys(AUDIO_EXTENSIONS, AUDIO)
MODALITY_OF_EXTENSION |= {extension: modality for modality, extension in enumerate(ENCODED_EXTENSIONS)}
_MAGIC = (
    (b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpg"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tiff"), (b"MM\0*", "tiff"),
    (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"), (b"\xff\xfb", "mp3"), (b"\xff\xf3", "mp3"), (b"\xff\xf2", "mp3"),
    (b"\xff\xf1", "aac"), (b"\xff\xf9", "aac"), (b"FORM", "aiff"), (b"\x1aE\xdf\xa3", "webm"), (b"0&\xb2u\x8ef\xcf\x11", "wma"),
)  # fmt: skip
SAMPLE_RATES = (1_000, 768_000)  # Hz


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is a short name that rejections are counted by."""

    def __init__(self, reason: str, detail: str) -> None:
        detail = re.sub(r"<_io\.BytesIO object at \w+>", "the file", detail)  # the address differs in every run
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Segment:
    """Text (`data` is a str) or a media file (`data` is its bytes, `extension` its kind without the dot).

    loss: False where the segment is context only, such as a question. choices: alternative texts, such as captions: training
    draws one for each epoch, `data` is the first. Where training reads a segment through a manifest, `ids` (tokens,) replace
    the `data` of a text, and `size` is the `segment_size` of a medium."""

    data: str | bytes
    extension: str = "txt"
    loss: bool = True
    ids: np.ndarray | None = field(default=None, compare=False)
    size: tuple[int, int] | None = field(default=None, compare=False)
    choices: tuple[str, ...] = ()

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
        """The content of an encoded segment. Raises `BadSample` (`damaged_codes`)."""
        return Codes.from_bytes(self.file)

    @classmethod
    def from_image(cls, pixels: np.ndarray, loss: bool = True) -> Segment:
        """Encode uint8 pixels (H, W) or (H, W, C), with 1 or 3 channels, as PNG."""
        from PIL import Image

        file = io.BytesIO()
        grey = pixels.ndim == 3 and pixels.shape[2] == 1
        Image.fromarray(pixels[..., 0] if grey else pixels).save(file, "png")
        return cls(file.getvalue(), "png", loss)

    @classmethod
    def from_audio(cls, waveform: np.ndarray, sample_rate: int, extension: str = "flac", loss: bool = True) -> Segment:
        """Encode mono samples in [-1, 1] at `sample_rate` Hz with 16 bits a sample."""
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, np.clip(waveform, -1, 1), sample_rate, "PCM_16", format=extension.upper())
        return cls(file.getvalue(), extension, loss)


@dataclass(frozen=True)
class Codes:
    """The content of an encoded segment's file."""

    encoder: str  # 32 hexadecimal digits, the fingerprint of the tokenizer or codec
    size: int  # UTF-8 bytes, pixels, or samples per channel of the original
    sample_rate: int  # Hz of a sound, else 0
    values: np.ndarray  # (T,) ids from 0
    breaks: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.uint32))  # (2, K) sentence ends: UTF-8 bytes, tokens
    is_lost: bool = False  # the original was damaged, and the values only keep its length

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
    """Segments in order. `ordered` is False if training shuffles them in each epoch. `meta` is kept, not learned:
    `label`, `group` (a speaker, say, that must not be in two splits) and `split` have a meaning, any other key has none."""

    segments: tuple[Segment, ...]
    key: str = ""
    ordered: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict)


def sample_from_document(document: Document) -> dict[str, str | bytes]:
    """Make the WebDataset sample of a document, with `__key__`, in Pile's own form. A plain text is a `txt` without `json`."""
    sample: dict[str, str | bytes] = {"__key__": document.key}
    first = document.segments[0]
    if document == Document((Segment(first.data),), document.key) and isinstance(first.data, str):
        return sample | {"txt": first.text.encode()}
    entries: list[dict[str, Any]] = []
    for number, segment in enumerate(document.segments):
        entries.append({} if segment.loss else {"loss": False})
        if isinstance(segment.data, str):
            entries[-1]["text"] = list(segment.choices) or segment.text
        else:
            entries[-1]["file"] = f"{number}.{segment.extension}"
            sample[entries[-1]["file"]] = segment.file
    description: dict[str, Any] = {"segments": entries} | ({"meta": dict(document.meta)} if document.meta else {})
    description |= {} if document.ordered else {"ordered": False}
    sample["json"] = json.dumps(description, ensure_ascii=False, sort_keys=True).encode()
    return sample


def media_extension(data: bytes, name: str = "") -> str | None:
    """Return the kind of a media file by its first bytes, else by its name; None if it is neither an image nor a sound."""
    if data[:4] in (b"RIFF", b"RF64"):
        return {b"WAVE": "wav", b"WEBP": "webp"}.get(data[8:12])
    extension = name.rsplit(".", 1)[-1].lower()
    if data[4:8] == b"ftyp":
        return "avif" if data[8:12] in (b"avif", b"avis") else "m4a" if data[8:11] == b"M4A" or extension == "m4a" else None
    found = next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)
    return found or (extension if extension in IMAGE_EXTENSIONS + AUDIO_EXTENSIONS else None)


def describe(document: Document, limit: int = 200) -> str:
    """Describe each segment in a line: texts shortened to `limit` characters, media by kind and size."""
    lines = []
    for segment in document.segments:
        is_text, name = isinstance(segment.data, str), MODALITIES[segment.modality]
        text = f"{segment.text[:limit]!r}{' ...' * (len(segment.text) > limit)}" if is_text else ""
        lines.append(text or f"<{name}: {segment.extension}, {len(segment.data):,} bytes>")
    return "\n".join(lines)
