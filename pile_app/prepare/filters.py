"""The steps of `pile prepare` that judge or mend one document, each a function of the document and its options alone.

    Document ──► repair, clean, quality, decontamination ──► Document, or BadSample(reason)
                 sizes, aspect, duration, silence, resampling, re-encoding

Texts: `repair_text` (ftfy), `clean_text` (in `text.py`), `QUALITY` (rules of Gopher and C4 that hold for any language that
writes spaces), `EvaluationTexts` (n-gram overlap), `minhash` (what near-duplicates are found by).
Media: everything is decoded once; what is too small, too long or silent is rejected; what has to be smaller, or of another rate
or format, is encoded anew.

Rules of quality and near-duplicates are for documents of text alone: a caption is short and may well be repeated.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.data.tokenizers import clean_text
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Document, Segment
from pile_app.media import IMAGE_FORMATS, audio_size, decode_audio, decode_image, image_size
from pile_app.prepare.ngrams import EvaluationTexts
from pile_app.prepare.options import require
from pile_app.prepare.quality import QUALITY
from pile_app.records import is_marker

if TYPE_CHECKING:
    from pile_app.prepare.options import Options


def apply_steps(document: Document, options: Options, evaluation: EvaluationTexts | None = None) -> Document:
    """The document as it will be stored.

    Raises:
        BadSample: `encoded_segment`, `empty_text`, `moved_spans`, a rule's own reason, or what `decode_image` and
            `decode_audio` raise.
    """
    if any(segment.is_encoded for segment in document.segments):
        raise BadSample("encoded_segment", "it holds token ids: prepare the shards that they were made from")
    segments = tuple(_STEPS[segment.modality](segment, options) for segment in document.segments)
    if len(segments) == 1 and segments[0].modality == TEXT:
        for name in options.quality:
            segments = (replace(segments[0], data=QUALITY[name](segments[0].text)),)
    for segment in segments:
        if segment.modality == TEXT:
            if not segment.text or segment.text.isspace():
                raise BadSample("empty_text", "the text is empty or only whitespace")
            if evaluation is not None:
                evaluation.check(segment.text)
    if "spans" in document.meta and segments != document.segments:
        raise BadSample("moved_spans", "a step changes the text after its entities were found: --quality c4 does")
    return replace(document, segments=segments)


def _text_step(segment: Segment, options: Options) -> Segment:
    if is_marker(segment):  # of a conversation; cleaning would take it out, as it does wherever users write it
        return segment
    text = mend_text(segment.text, options)
    return segment if text is segment.data else replace(segment, data=text)


def mend_text(text: str, options: Options) -> str:
    """Repaired and cleaned, as far as the options ask for it."""
    if options.repair:
        text = repair_text(text)
    if options.clean:
        text = clean_text(text)
    return text


# -- repair

# A code point that one of ftfy's fixers changes or removes whatever stands around it, or an HTML entity may begin.
_FIXED_ALONE = re.compile("[&\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]")
# ASCII far from all else. ftfy's sign of mojibake takes at most 7 characters, one of them not ASCII.
_FAR_ASCII = re.compile("(?<=[\x00-\x7f]{7})[\x00-\x7f]+(?=[\x00-\x7f]{7})")


def may_need_repair(text: str) -> bool:
    """False where `repair_text` would surely change nothing. ftfy takes tens of times as long to find that out."""
    if _FIXED_ALONE.search(text):
        return True
    return not text.isascii() and bool(_badness().search(_FAR_ASCII.sub("", text)))


def repair_text(text: str) -> str:
    """Undoes mojibake, HTML entities in plain text, terminal escapes and stray control characters with ftfy (Speer 2019).

    Typography is left alone: quotes, ligatures and full-width characters are no damage. Repairing twice changes nothing.
    """
    if not may_need_repair(text):
        return text
    ftfy = require("ftfy", "prepare", "repairing text")
    return ftfy.fix_text(text, _ftfy_config())


@lru_cache(1)
def _ftfy_config() -> Any:
    ftfy = require("ftfy", "prepare", "repairing text")
    kept = ("fix_latin_ligatures", "fix_character_width", "uncurl_quotes", "fix_line_breaks")
    return ftfy.TextFixerConfig(explain=False, normalization=None, **dict.fromkeys(kept, False))


@lru_cache(1)
def _badness() -> re.Pattern[str]:
    return require("ftfy.badness", "prepare", "repairing text").BADNESS_RE


# -- media


def _image_step(segment: Segment, options: Options) -> Segment:
    height, width = image_size(segment.file)
    small, large = sorted((height, width))
    if small < options.min_image_size:
        raise BadSample("image_too_small", f"{width}x{height} pixels; min_image_size is {options.min_image_size}")
    if options.max_aspect and large > options.max_aspect * small:
        raise BadSample(
            "image_aspect", f"{width}x{height} pixels: aspect {large / small:.2f}; max_aspect is {options.max_aspect:g}"
        )
    decode_image(segment.file, 3, height, width)
    if options.image_max_size and large > options.image_max_size:
        return replace(segment, data=shrink_image(segment, options.image_max_size))
    return segment


_ENCODERS = {"jpg": ("JPEG", {"quality": 90}), "webp": ("WEBP", {"quality": 90}), "png": ("PNG", {})}


def shrink_image(segment: Segment, size: int) -> bytes:
    """The file of an image, no side longer than `size`, in its own format; turned as EXIF says, without metadata."""
    from PIL import Image, ImageOps

    name, parameters = _ENCODERS[segment.extension.replace("jpeg", "jpg")]
    with Image.open(io.BytesIO(segment.file), formats=IMAGE_FORMATS) as file:
        file.draft(None, (2 * size, 2 * size))  # a JPEG may decode to a half, a quarter ... of its size
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            transparent = image.mode == "PA" or "transparency" in image.info
            image = image.convert("RGBA" if transparent else "RGB")
        if name == "JPEG" and image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        image.info = {}
        written = io.BytesIO()
        image.save(written, name, **parameters)
    return written.getvalue()


def _audio_step(segment: Segment, options: Options) -> Segment:
    samples, rate = audio_size(segment.file)
    seconds = samples / rate
    if seconds > options.max_audio_seconds:
        raise BadSample("audio_too_long", f"{seconds:,.1f} seconds; max_audio_seconds is {options.max_audio_seconds:g}")
    if seconds < options.min_audio_seconds:
        raise BadSample("audio_too_short", f"{seconds:,.3f} seconds; min_audio_seconds is {options.min_audio_seconds:g}")
    target = options.resample or rate
    with _one_thread(target != rate):
        waveform = decode_audio(segment.file, target)
    if options.silence is not None:
        level = 20 * math.log10(max(float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))), 1e-9))
        if level < options.silence:
            raise BadSample("silent_audio", f"{level:.1f} dB of full scale on average (RMS); silence is {options.silence:g}")
    own = segment.extension
    wanted = options.audio_format or (own if target == rate or own == "wav" else "flac")
    if target == rate and wanted == own:
        return segment
    return Segment.from_audio(waveform, target, wanted, segment.loss)


@contextmanager
def _one_thread(needed: bool) -> Iterator[None]:
    """PyTorch computes with one thread inside: the same bits everywhere, and processes that do not fight over cores."""
    if not needed:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_STEPS: dict[int, Callable[[Segment, Any], Segment]] = {TEXT: _text_step, IMAGE: _image_step, AUDIO: _audio_step}
