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
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MODALITIES = ("text", "image", "audio")
TEXT, IMAGE, AUDIO = range(3)

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif")
AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "ogg", "oga", "opus", "aif", "aiff", "m4a", "aac", "webm", "weba", "wma")
UNREADABLE_EXTENSIONS = (  # media that nothing here decodes: text that belongs to one is no document of its own
    "mp4", "m4v", "avi", "mov", "mkv", "mpg", "mpeg", "wmv", "flv", "3gp", "ogv", "svg", "heic", "heif", "jxl", "jp2", "psd",
    "eps", "ico", "raw", "cr2", "nef", "dng", "exr", "hdr", "mid", "midi", "amr", "ape",
)  # fmt: skip
ENCODED_EXTENSIONS = ("textids", "imagecodes", "audiocodes")  # by modality
MODALITY_OF_EXTENSION = (
    {"txt": TEXT, "cls": TEXT}
    | dict.fromkeys(IMAGE_EXTENSIONS, IMAGE)
    | dict.fromkeys(AUDIO_EXTENSIONS, AUDIO)
    | {extension: modality for modality, extension in enumerate(ENCODED_EXTENSIONS)}
)

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


def describe(document: Document, limit: int = 200) -> str:
    """One line a segment, for people: texts shortened to `limit` characters, media as their kind and size."""
    lines: Sequence[str] = [
        repr(segment.text[:limit]) + (" ..." if len(segment.text) > limit else "")
        if isinstance(segment.data, str)
        else f"<{MODALITIES[segment.modality]}: {segment.extension}, {len(segment.data):,} bytes>"
        for segment in document.segments
    ]
    return "\n".join(lines)
