"""Check or change a single document; each step is a function of the document and the options only: `cut_long_sounds`, then
`apply_steps`: repair, cleaning, quality (Gopher, C4), decontamination; sizes, resampling and re-encoding of media."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise, product
from statistics import fmean
from typing import Any

import numpy as np

from pile_app.data.tokenizers import clean_text
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Document, Segment
from pile_app.media import audio_size, decode_audio, decode_image, image_size, load_image, split_at_silence
from pile_app.prepare.ngrams import EvaluationTexts
from pile_app.prepare.options import Options, require
from pile_app.records import is_marker

PIECE_SECONDS, WHOLE_SECONDS = 30.0, 60.0  # default limits for sounds that can be cut, and for those that cannot
PADDING = 0.5  # seconds of sound kept around the words of a piece
Part = tuple[float, float, str]  # start and end in seconds, text
_BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "\u25cf", "\u25aa", "\u2219", "\u00b7", "- ", "* ")
_ELLIPSES = ("...", "\u2026")
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_SENTENCE = re.compile(r"[^\s.!?\u2026\u3002\uff01\uff1f\u0964\u061f][.!?\u2026\u3002\uff01\uff1f\u0964\u061f]+")


def apply_steps(document: Document, options: Options, evaluation: EvaluationTexts | None = None) -> Document:
    """Return the document as it will be written. Quality rules apply to documents of a single text: captions are short.

    Raises BadSample: `encoded_segment`, `empty_text`, `moved_spans`, the reason of a rule, or what the decoders raise."""
    if any(segment.is_encoded for segment in document.segments):
        raise BadSample("encoded_segment", "it contains token ids: prepare the shards that were encoded")
    steps = {TEXT: _text_step, IMAGE: _image_step, AUDIO: _audio_step}
    changed = [steps[segment.modality](segment, options) for segment in document.segments]
    texts = [n for n, segment in enumerate(changed) if segment.modality == TEXT]
    if len(changed) == len(texts) == 1:
        for name in options.quality:
            changed = [replace(changed[0], data=QUALITY[name](changed[0].text))]
    elif options.clean and len(texts) == 1:
        caption = changed[texts[0]]
        changed[texts[0]] = replace(caption, data=caption.text.strip(), choices=tuple(map(str.strip, caption.choices)))
    segments = tuple(segment for segment in changed if segment.modality != TEXT or segment.text.strip())
    learned = [any(segment.loss for segment in some) for some in (document.segments, segments)]
    if not segments or (len(segments) < len(changed) and learned == [True, False]):
        raise BadSample("empty_text", "the text is empty or only whitespace")
    for segment in segments:
        if evaluation is not None and segment.modality == TEXT:
            evaluation.check(segment.text)
    if "spans" in document.meta and segments != document.segments:
        raise BadSample("moved_spans", "a filter, such as --quality c4, changed the text after its entities were located")
    return replace(document, segments=segments)


def _text_step(segment: Segment, options: Options) -> Segment:
    if is_marker(segment):  # of a chat: cleaning removes markers, as it does where users write them
        return segment
    choices = tuple(text for choice in segment.choices if (text := normalize_text(choice, options)).strip())
    return replace(segment, data=choices[0] if choices else normalize_text(segment.text, options), choices=choices)


def normalize_text(text: str, options: Options) -> str:
    """Repair and clean a text as far as the options ask for it. Doing so twice changes nothing."""
    text = _ftfy()(text) if options.repair else text
    return clean_text(text) if options.clean else text


@lru_cache(1)
def _ftfy() -> Callable[[str], str]:
    """Return a function that fixes mojibake, HTML entities, terminal escapes and control characters (Speer 2019), but keeps
    quotes, ligatures and full-width characters."""
    ftfy = require("ftfy", "prepare", "--repair")
    off = ("explain", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes", "fix_line_breaks")
    return partial(ftfy.fix_text, config=ftfy.TextFixerConfig(normalization=None, **dict.fromkeys(off, False)))


# -- images and sounds


def _image_step(segment: Segment, options: Options) -> Segment:
    height, width = image_size(segment.file)
    small, large = sorted((height, width))
    if small < options.min_image_size:
        raise BadSample("image_too_small", f"{width}x{height} pixels; min_image_size is {options.min_image_size}")
    if options.max_aspect and large > options.max_aspect * small:
        raise BadSample("image_aspect", f"{width}x{height}: aspect {large / small:.2f}; max_aspect is {options.max_aspect:g}")
    decode_image(segment.file, 3, height, width)
    return _shrink(segment, options.image_max_size) if options.image_max_size and large > options.image_max_size else segment


def _shrink(segment: Segment, size: int) -> Segment:
    """Re-encode an image with no side longer than `size`, turned as EXIF says: JPEG and WebP stay so, others become PNG."""
    from PIL import Image

    formats = {"webp": "WEBP"} | dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "JPEG")
    name, written, image = formats.get(segment.extension, "PNG"), io.BytesIO(), load_image(segment.file, size)
    if image.mode not in (("RGB", "L") if name == "JPEG" else ("RGB", "RGBA", "L", "LA")):
        image = image.convert("RGBA" if image.has_transparency_data and name != "JPEG" else "RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    image.info = {}
    image.save(written, name, **({} if name == "PNG" else {"quality": 90}))
    return replace(segment, data=written.getvalue(), extension="png" if name == "PNG" else segment.extension)


def _audio_step(segment: Segment, options: Options) -> Segment:
    samples, rate = audio_size(segment.file)
    if samples < rate * options.min_audio_seconds:
        raise BadSample("audio_too_short", f"{samples / rate:,.3f} seconds; min_audio_seconds is {options.min_audio_seconds:g}")
    target, own = options.resample or rate, segment.extension
    waveform = decode_audio(segment.file, target)
    if options.silence is not None:
        level = 20 * math.log10(max(float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))), 1e-9))
        if level < options.silence:
            raise BadSample("silent_audio", f"{level:.1f} dB of full scale on average (RMS); silence is {options.silence:g}")
    wanted = options.audio_format or (own if target == rate or own == "wav" else "flac")
    return segment if (target, wanted) == (rate, own) else Segment.from_audio(waveform, target, wanted, segment.loss)


def cut_long_sounds(document: Document, options: Options, sample: Mapping[str, Any]) -> list[Document]:
    """Cut a sound that is longer than `max_audio_seconds` into documents: between the timed parts of the transcript in its
    `sample`, or at silence if nothing is said about it. Without times, or with other media, it is kept up to `WHOLE_SECONDS`.

    Raises BadSample: `audio_too_long`."""
    limit, whole = options.max_audio_seconds or PIECE_SECONDS, options.max_audio_seconds or WHOLE_SECONDS
    sounds = [n for n, segment in enumerate(document.segments) if segment.modality == AUDIO and not segment.is_encoded]
    sizes = [audio_size(document.segments[n].file) for n in sounds]
    seconds = max((samples / rate for samples, rate in sizes), default=0)
    if seconds <= limit:
        return [document]
    parts = transcript_parts(sample)
    said = [n for n, segment in enumerate(document.segments) if n not in sounds and segment.data != document.meta.get("label")]
    is_timed = 0 < max((end - start for start, end, _ in parts), default=0) <= limit
    if len(sounds) > 1 or len(said) > 1 or (said and not (is_timed and document.segments[said[0]].modality == TEXT)):
        if seconds > whole:
            detail = f"{seconds:,.1f} seconds, without times to cut it; max_audio_seconds is {whole:g}"
            raise BadSample("audio_too_long", detail)
        return [document]
    sound, rate = document.segments[sounds[0]], sizes[0][1]
    waveform = decode_audio(sound.file, rate)
    silent = [] if said else split_at_silence(waveform, rate, limit)
    documents = []
    for start, stop, text in _pack(parts, limit, seconds) if said else [(a / rate, b / rate, "") for a, b in silent]:
        cut = waveform[round(start * rate) : round(stop * rate)]
        new = {n: replace(document.segments[n], data=text, choices=()) for n in said}
        new[sounds[0]] = Segment.from_audio(cut, rate, options.audio_format or "flac", sound.loss)
        segments = tuple(new.get(n, segment) for n, segment in enumerate(document.segments))
        documents.append(replace(document, segments=segments, meta={**document.meta, "start_seconds": round(start, 3)}))
    return documents


def _pack(parts: Sequence[Part], limit: float, seconds: float) -> list[Part]:
    """Join consecutive parts of a transcript to pieces of at most `limit` seconds, with some sound around the words."""
    groups: list[list[Part]] = []
    for part in sorted(parts):
        if not groups or part[1] - groups[-1][0][0] > limit:
            groups.append([])
        groups[-1].append(part)
    spans = [(group[0][0], max(end for _, end, _ in group)) for group in groups]
    edges = [0.0, *((end + start) / 2 for (_, end), (start, _) in pairwise(spans)), seconds]
    pieces = []
    for (start, end), group, (least, most) in zip(spans, groups, pairwise(edges), strict=True):
        margin = min(PADDING, (limit - end + start) / 2)
        glue = "" if any(text.startswith(" ") for *_, text in group) else " "
        text = glue.join(text for *_, text in group).strip()
        pieces.append((max(least, start - margin), min(most, end + margin), text))
    return pieces


def transcript_parts(sample: Mapping[str, Any]) -> list[Part]:
    """Find the timed parts of a transcript: Whisper's `segments`, `words` or `chunks`, among the columns or in the `json`."""
    data = sample.get("json")
    with suppress(ValueError, RecursionError):
        data = json.loads(data) if isinstance(data, bytes) else data
    for name, holder in product(("segments", "chunks", "words"), (sample, data)):
        with suppress(TypeError, KeyError, ValueError, AttributeError):
            found = holder[name]
            parts = [(*(one.get("timestamp") or (one["start"], one["end"])), one.get("text") or one["word"]) for one in found]
            if parts and all(0 <= float(start) <= float(end) and text.strip() for start, end, text in parts):
                return parts
    return []


# -- quality of prose: a rule returns the text, possibly without some lines, or raises `BadSample` with the rule that is broken


def gopher(text: str) -> str:
    """Apply the rules of MassiveText (Rae et al. 2021, arXiv:2112.11446, section A.1.1 and table A1), except the rule
    about English stop words. Raises BadSample: `gopher_...`, the first rule that is broken."""
    for rule, value, least, most, what in _gopher_figures(text, text.split()):
        if not least <= value <= most:
            raise BadSample(f"gopher_{rule}", f"{value:,.5g} {what}; {least:g} to {most:,g} are accepted")
    return text


def _gopher_figures(text: str, words: list[str]) -> Iterator[tuple[str, float, float, float, str]]:
    """Yield (rule, value, least, most, what), each computed only if the rules before it hold."""
    count = len(words)
    yield "word_count", count, 50, 100_000, "words"
    yield "word_length", sum(map(len, words)) / count, 3, 10, "characters per word"
    symbols = max(text.count("#"), text.count("...") + text.count("\u2026"))
    yield "symbols", symbols / count, 0, 0.1, "hashes or ellipses per word"
    lines = [line for line in text.split("\n") if line.strip()]
    yield "bullet_lines", fmean(line.lstrip().startswith(_BULLETS) for line in lines), 0, 0.9, "of the lines have a bullet"
    yield "ellipsis_lines", fmean(line.rstrip().endswith(_ELLIPSES) for line in lines), 0, 0.3, "of the lines have an ellipsis"
    yield "alphabetic", fmean(any(map(str.isalpha, word)) for word in words), 0.8, 1, "of the words have a letter"
    paragraphs = [part for part in re.split(r"\n{2,}", text.strip()) if part]
    for name, parts in (("duplicate_lines", lines), ("duplicate_paragraphs", paragraphs)):
        repeated = {part: times - 1 for part, times in Counter(parts).items()}
        yield name, sum(repeated.values()) / len(parts), 0, 0.3, "of them are repeated"
        yield name, sum(len(part) * times for part, times in repeated.items()) / len(text), 0, 0.2, "of the characters"
    for n, most in TOP_NGRAMS.items():
        ngram, times = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
        characters = times * len(" ".join(ngram)) if times > 1 else 0
        yield "top_ngram", characters / len(text), 0, most, f"of the characters are in the most frequent {n}-gram"
    for n, most in DUPLICATE_NGRAMS.items():
        fraction = _duplicate_characters(words, n) / len(text)
        yield "duplicate_ngram", fraction, 0, most, f"of the characters are in repeated {n}-grams"
        if not fraction:
            return  # without a repeated 5-gram there is no repeated 6-gram


def _duplicate_characters(words: list[str], n: int) -> int:
    """Count the characters in n-grams that were seen before, none twice."""
    seen, characters, index = set[tuple[str, ...]](), 0, 0
    while index <= len(words) - n:
        ngram = tuple(words[index : index + n])
        characters += len(" ".join(ngram)) if ngram in seen else 0
        index += n if ngram in seen else 1
        seen.add(ngram)
    return characters


def c4(text: str) -> str:
    """Apply the rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2; numbers as in its code, `c4_utils.py`).

    Lines of fewer than 5 words, with a word of more than 1000 characters, or that name Javascript are removed, as are citation
    marks such as `[1]`. English terminal punctuation, policy phrases, bad words and repeated spans of sentences are not judged.
    Raises BadSample: `c4_...`, the first rule that is broken."""
    if "lorem ipsum" in text.lower():
        raise BadSample("c4_lorem_ipsum", "the text contains 'lorem ipsum'")
    if "{" in text:
        raise BadSample("c4_curly_bracket", "the text contains a curly bracket, as code does")
    lines = [(line, line.split()) for line in re.sub(r"\[\d+\]", "", text).split("\n") if "javascript" not in line.lower()]
    prose = [line for line, words in lines if not words or (len(words) >= 5 and max(map(len, words)) <= 1000)]
    kept = re.sub("\n{3,}", "\n\n", "\n".join(prose)).strip()
    if (sentences := len(_SENTENCE.findall(kept))) < 3:
        raise BadSample("c4_sentences", f"{sentences} sentences remain; at least 3 are needed")
    return kept


QUALITY: dict[str, Callable[[str], str]] = {"gopher": gopher, "c4": c4}
