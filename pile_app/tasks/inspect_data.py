"""What a data set holds, and how it fills packs: `pile inspect PATH ...`.

PATH is a folder that `pile prepare` wrote, shards (a folder or a pattern), a run, or its configuration. Only that one says how
many tokens an image or a sound takes, and then counts everything; without it media are told in pixels and seconds. Everything
follows from the indexes of the shards; `duplicates` alone reads them.

Memory does not grow with the documents: sizes are counted in bins (`Histogram`: exact below 256, within 0.8 % above), and what
finds duplicates is sorted on disk. The output folder gets `lengths.png`, `documents.html` with some documents of each source,
decoded into `documents/`, and

    statistics.json   {"paths", "tokenizer", "context", "vocabulary": null where media are not counted, "notes",
                       "sources": [{"source", "split", "shards", "bytes", "documents", "rejected": {reason: samples},
                                    "segments": {modality: number}, "text_bytes", "audio_seconds", "image_pixels": quantiles,
                                    "tokens": {modality: number | null, "special": ..., "all": ...} | null,
                                    "document_tokens": quantiles, "only_text": media are not in document_tokens,
                                    "longer": documents longer than the context, "cut": those that are cut, "left_out": those
                                    that are not used, as a medium in them is longer than the context, "packs" of an epoch,
                                    "fill": share of their places that hold tokens, "padding": 1 - fill}],
                       "duplicates": null | {"documents" | "images" | "sounds": {...}, see `Duplicates.find`}}

Quantiles are {"count", "sum", "minimum", "1%", "25%", "50%", "75%", "99%", "maximum"}.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.data.order import hash64
from pile_app.data.remote import ShardCache
from pile_app.data.shards import ShardError, Shards, expand_shards
from pile_app.data.sources import SourceData, cache_folder
from pile_app.data.text import Tokenizer, load_tokenizer, text_tokens
from pile_app.documents import (
    AUDIO,
    IMAGE,
    MODALITIES,
    TEXT,
    BadSample,
    Segment,
    Vocabulary,
    audio_size,
    decode_audio,
    decode_image,
    image_size,
)
from pile_app.tasks.inspect_duplicates import Duplicates
from pile_app.tasks.inspect_lengths import Histogram, draw_lengths
from pile_app.tasks.inspect_page import describe_segment, write_page

CONTEXT = 512  # as `data.context` is where nobody sets it
SHOWN_PIXELS = 1024  # of the longer side of an image on the page


def inspect_data(
    paths: Sequence[str],
    folder: Path,
    tokenizer: str | None = None,
    context: int | None = None,
    duplicates: bool = False,
    samples: int = 8,
) -> dict[str, Any]:
    """Writes `statistics.json`, `lengths.png` and `documents.html` into `folder`, and returns the first.

    Args:
        paths: see above; at most one of them a run or a configuration.
        folder: is made where it is missing.
        tokenizer: "bytes" or a tokenizer.json; None: that of the run, or bytes.
        context: tokens of a pack; None: that of the run, or 512.
        duplicates: read all shards, and count what occurs more than once.
        samples: documents of each source to decode.

    Raises:
        ValueError: a path is none of what it may be, or a number is out of its bounds.
        ShardError: a shard is missing, damaged, or not what was indexed.
    """
    if samples < 0 or (context is not None and context < 8):
        raise ValueError(f"samples={samples} must be 0 or more, context={context} tokens at least 8")
    plan = make_plan(paths, tokenizer, context)
    parts = [Part(*names, Shards(tars, plan.cache)) for names, tars in plan.shards.items()]
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        measure(part, plan)
    found = None
    if duplicates:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            found = Duplicates(parts, Path(temporary), tracked).find()
    description = {
        "paths": list(paths),
        "tokenizer": plan.tokenizer_name,
        "context": plan.context,
        "vocabulary": asdict(plan.vocabulary) if plan.media else None,
        "notes": notes(parts, plan),
        "sources": [part.description() for part in parts],
        "duplicates": found,
    }
    (folder / "statistics.json").write_text(
        json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace"
    )
    draw_lengths(parts, plan.context, folder / "lengths.png")
    groups = [(part.title, list(sample_documents(part, samples, plan, folder / "documents"))) for part in parts if samples]
    write_page("Documents of " + ", ".join(map(str, paths)), [], groups, folder, "documents")
    return description


# -- What is to be looked at


@dataclass
class Plan:
    """Shards by (source, split), and what turns them into tokens. media: image and sound codecs are known."""

    shards: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    tokenizer_name: str = "bytes"
    tokenizer: Tokenizer = field(default_factory=lambda: load_tokenizer("bytes"))
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    media: bool = False
    context: int = CONTEXT
    seed: int = 0
    cache: ShardCache | None = None

    def add(self, source: str, split: str, tars: Iterable[str]) -> None:
        names = (f"{source} ({number})" if number > 1 else source for number in count(1))
        self.shards[next(name for name in names if (name, split) not in self.shards), split] = list(tars)


def make_plan(paths: Sequence[str], tokenizer: str | None, context: int | None) -> Plan:
    """Raises ValueError where a path is none of what `inspect_data` takes, ShardError where a pattern matches nothing."""
    plan = Plan(cache=ShardCache(cache_folder() / "shards", int(100e9)))
    config = None
    for path in paths:
        here = Path(path)
        if (here / "dataset.json").is_file():
            _add_prepared(plan, here)
        elif (here / "config.yaml").is_file() or here.suffix in (".yaml", ".yml"):
            if config is not None:
                raise ValueError(f"{path!r} is a second run or configuration: give one, which says how tokens are counted")
            config = _add_config(plan, here)
        elif here.is_dir():
            _add_shards(plan, expand_shards(str(here / "*.tar")))
        else:
            _add_shards(plan, expand_shards(path))
    plan.tokenizer_name = tokenizer or (config and config.model.tokenizer) or "bytes"
    plan.tokenizer = load_tokenizer(plan.tokenizer_name)
    plan.context = context or (config.data.context if config else CONTEXT)
    image = audio = None
    if config is not None:
        from pile_app.model.codecs import AudioCodecConfig, ImageCodecConfig

        image = config.model.image and ImageCodecConfig(**vars(config.model.image))
        audio = config.model.audio and AudioCodecConfig(**vars(config.model.audio))
        plan.media, plan.seed = True, config.data.seed
    from pile_app.model.fused import make_vocabulary

    plan.vocabulary = make_vocabulary(plan.tokenizer.size, plan.tokenizer.fingerprint, image, audio)
    return plan


def _add_prepared(plan: Plan, folder: Path) -> None:
    path = folder / "dataset.json"
    try:
        sources = json.loads(path.read_bytes())["sources"]
        patterns = [(source, split, one["shards"]) for source, splits in sources.items() for split, one in splits.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not what `pile prepare` writes ({error!r}): prepare the data again") from error
    for source, split, pattern in patterns:
        plan.add(source, split, expand_shards(str(folder / pattern)))


def _add_config(plan: Plan, path: Path) -> Any:
    """The `model` and `data` of a run, or of a configuration as `train.py` reads it: laid over `conf/default.yaml`."""
    import yaml
    from jsonargparse import ArgumentError

    from pile_app.training.cli import make_model_parser
    from pile_app.training.load import read_config

    if path.is_dir():
        config = read_config(path)
    else:
        config = {}
        for file in (Path("conf/default.yaml"), path):
            if file.is_file() or file == path:
                try:
                    config = _lay_over(config, yaml.safe_load(file.read_text("utf-8")) or {})
                except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
                    raise ValueError(f"{str(file)!r} is not a YAML configuration: {error}") from error
    try:
        parsed = make_model_parser().parse_object({"model": config.get("model", {}), "data": config.get("data", {})})
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not a configuration of this version of Pile: {error}") from error
    for source, one in parsed.data.sources.items():
        for split in ("train", "validation"):
            if pattern := getattr(one, split):
                plan.add(source, split, expand_shards(pattern))
    data = parsed.data
    plan.cache = ShardCache(data.cache or cache_folder() / "shards", int(data.cache_gigabytes * 1e9), data.allow_pipe)
    return parsed


def _lay_over(below: dict[str, Any], above: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """One configuration over another, as jsonargparse does it: sources and classes are replaced, not mixed."""
    merged = below | above
    for key in below.keys() & above.keys() - {"sources", "backbone"}:
        if isinstance(below[key], dict) and isinstance(above[key], dict) and depth < 3:
            merged[key] = _lay_over(below[key], above[key], depth + 1)
    return merged


def _add_shards(plan: Plan, tars: Sequence[str]) -> None:
    """Shards are of one source that lie in one folder and differ in the number at the end of their names only."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path in tars:
        folder, _, name = path.partition("?")[0].rpartition("/")
        stem = re.sub(r"[-_.]?\d*(\.tar)?$", "", name) or name
        source, split = re.fullmatch(r"(.*?)(?:[-_.](train|validation|heldout|test))?", stem, re.DOTALL).groups("")  # type: ignore[union-attr]
        groups.setdefault((folder, source, split), []).append(path)
    for (_, source, split), found in groups.items():
        plan.add(source, split, found)


# -- Counting


@dataclass
class Part:
    """One split of one source, and what was counted in it.

    segment_tokens: of texts, images and sounds, without openers; text_only: media are not counted in `document_tokens`.
    """

    source: str
    split: str
    shards: Shards
    bytes: int = 0
    first_document: list[int] = field(default_factory=lambda: [0])
    rejected: Counter[str] = field(default_factory=Counter)
    segments: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    text_bytes: int = 0
    seconds: float = 0.0
    pixels: Histogram = field(default_factory=Histogram)
    milliseconds: Histogram = field(default_factory=Histogram)
    document_tokens: Histogram = field(default_factory=Histogram)
    segment_tokens: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in MODALITIES])
    unknown: set[int] = field(default_factory=set)  # modalities whose tokens are not known
    longer: int = 0
    left_out: int | None = None
    packs: int | None = None
    fill: float | None = None

    @property
    def title(self) -> str:
        return f"{self.source}, {self.split}" if self.split else self.source

    @property
    def documents(self) -> int:
        return self.first_document[-1]

    @property
    def tokens(self) -> dict[str, int | None]:
        sums: dict[str, int | None] = {
            name: None if modality in self.unknown else self.segment_tokens[modality].sum
            for modality, name in enumerate(MODALITIES)
        }
        everything = None if self.unknown else self.document_tokens.sum
        special = None if everything is None else everything - sum(value or 0 for value in sums.values())
        return sums | {"special": special, "all": everything}

    def description(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "split": self.split,
            "shards": len(self.shards),
            "bytes": self.bytes,
            "documents": self.documents,
            "rejected": dict(self.rejected.most_common()),
            "segments": {name: int(number) for name, number in zip(MODALITIES, self.segments, strict=True)},
            "text_bytes": self.text_bytes,
            "audio_seconds": round(self.seconds, 3),
            "image_pixels": self.pixels.description(),
            "tokens": self.tokens,
            "document_tokens": self.document_tokens.description(),
            "only_text": bool(self.unknown),
            "longer": None if self.unknown else self.longer,
            "cut": None if self.left_out is None else self.longer - self.left_out,
            "left_out": self.left_out,
            "packs": self.packs,
            "fill": self.fill,
            "padding": None if self.fill is None else 1 - self.fill,
        }


def measure(part: Part, plan: Plan) -> None:
    """Counts what the indexes of a part say, and packs it as training would."""
    for shard in tracked(range(len(part.shards)), f"{part.title}: counting"):
        part.shards.make_index(shard)
        _measure_shard(part, shard, plan)
    if part.unknown or not part.documents:
        return
    try:
        data = SourceData(part.source, part.shards.paths, plan.vocabulary, plan.tokenizer, plan.context, plan.cache)
    except ShardError:  # every shard was read above: what remains is that no document fits
        part.left_out, part.packs = part.documents, 0
        return
    part.left_out = int(data.counts["too_long"].sum())
    part.packs = data.order(plan.seed).packs_per_epoch
    part.fill = data.tokens.tokens / (part.packs * plan.context)


def _measure_shard(part: Part, shard: int, plan: Plan) -> None:
    index = part.shards.index(shard)
    part.bytes += index.tar_size
    part.first_document.append(part.documents + len(index))
    part.rejected.update(reason for _, reason in index.rejected)
    if not len(index):
        return
    sizes = index.segment_size.astype(np.int64)
    texts, images, sounds = (index.modality == modality for modality in (TEXT, IMAGE, AUDIO))
    rates = index.sample_rate[sounds].astype(np.int64)
    part.segments += [texts.sum(), images.sum(), sounds.sum()]
    part.text_bytes += int(sizes[texts].sum())
    part.seconds += float((sizes[sounds] / rates).sum())
    part.pixels.add(sizes[images])
    part.milliseconds.add(sizes[sounds] * 1000 // rates)

    tokens = text_tokens(part.shards, shard, plan.tokenizer).counts.copy()
    part.unknown |= {
        modality for modality in (IMAGE, AUDIO) if part.segments[modality] and modality not in plan.vocabulary.modalities
    }
    if IMAGE not in part.unknown:
        tokens[images] = plan.vocabulary.image_tokens
    if AUDIO not in part.unknown and len(rates):
        tokens[sounds] = plan.vocabulary.audio_tokens(sizes[sounds], rates)
    for modality, places in enumerate((texts, images, sounds)):
        if modality not in part.unknown:
            part.segment_tokens[modality].add(tokens[places])
    lengths = np.add.reduceat(tokens + 1 + sounds, index.first_segment[:-1].astype(np.int64)) + 2
    if part.unknown:  # then the texts alone are told
        lengths = np.add.reduceat(np.where(texts, tokens, 0), index.first_segment[:-1].astype(np.int64))
    part.document_tokens.add(lengths)
    part.longer += int((lengths > plan.context).sum())


def tracked(numbers: Sequence[int], what: str) -> Iterable[int]:
    """The numbers, with a bar on stderr where somebody looks."""
    from rich.console import Console
    from rich.progress import track

    return track(numbers, what, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


# -- Documents to look at and listen to


def sample_documents(part: Part, samples: int, plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of some documents, drawn by a hash of their number, for `write_page`; media are decoded into `folder`."""
    drawn: set[int] = set()
    for draw in count():
        if len(drawn) == min(samples, part.documents):
            break
        drawn.add(int(hash64("inspect", part.source, part.split, draw) % np.uint64(part.documents)))
    name = re.sub(r"\W+", "-", f"{part.source}-{part.split}" if part.split else part.source)
    for number in sorted(drawn):
        shard = int(np.searchsorted(part.first_document, number, side="right")) - 1
        sample = number - part.first_document[shard]
        index = part.shards.index(shard)
        entry: dict[str, Any] = {
            "key": index.key(sample),
            "facts": f"{os.path.basename(index.path)}, document {sample:,}",
            "rejected": None,
            "segments": [],
        }
        try:
            document = part.shards.document(shard, sample)
        except BadSample as error:
            yield entry | {"rejected": {"reason": error.reason, "detail": error.detail}}
            continue
        if not document.ordered:
            entry["facts"] += ", in free order"
        for place, segment in enumerate(document.segments):
            entry["segments"].append(_decoded_segment(segment, folder / f"{name}-{number}-{place}", plan))
        yield entry


def _decoded_segment(segment: Segment, path: Path, plan: Plan) -> dict[str, Any]:
    """Text as text, images as PNG at their own size (up to `SHOWN_PIXELS`), sounds as mono WAV at their own rate."""
    try:
        decoded = _decode(segment, plan.tokenizer)
        if decoded is None:
            codes = segment.codes
            size = ("{:,} bytes", "{:,} pixels", "{:,} samples")[segment.modality].format(codes.size)
            note = f"{len(codes.values):,} codes of {size}; only a run decodes them (--position)"
            return {"modality": MODALITIES[segment.modality], "note": note, "hidden": False, "learned": segment.loss}
    except BadSample as error:
        return {"modality": MODALITIES[segment.modality], "note": str(error), "hidden": False, "learned": segment.loss}
    return describe_segment(decoded, path, lambda _: None)


def _decode(segment: Segment, tokenizer: Tokenizer) -> Segment | None:
    """Raises `BadSample` where it cannot be decoded; None: by this tokenizer, or without codecs."""
    if segment.is_encoded:
        codes = segment.codes
        if segment.modality == TEXT and codes.encoder == tokenizer.fingerprint:
            return Segment(tokenizer.decode(codes.values), "txt", segment.loss)
        return None
    if segment.modality == IMAGE:
        height, width = image_size(segment.file)
        scale = min(1.0, SHOWN_PIXELS / max(height, width))
        pixels = decode_image(segment.file, 3, max(1, round(scale * height)), max(1, round(scale * width)))
        return Segment.from_image(np.moveaxis(pixels, 0, -1), segment.loss)
    if segment.modality == AUDIO:
        _, rate = audio_size(segment.file)
        return Segment.from_audio(decode_audio(segment.file, rate), rate, "wav", segment.loss)
    return segment


def notes(parts: Sequence[Part], plan: Plan) -> list[str]:
    told = []
    unknown = sorted({modality for part in parts for modality in part.unknown})
    names = " and ".join(("texts", "images", "sounds")[modality] for modality in unknown)
    if unknown and not plan.media:
        told.append(
            f"How many tokens {names} take hangs on the codecs of a model: give a run or a configuration beside the shards. "
            "Without it, sources with media tell the tokens of their texts only, and are not packed."
        )
    elif unknown:
        told.append(f"The model of the run has no codec for {names}: it cannot be trained on sources that hold them.")
    return told
