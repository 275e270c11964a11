"""What a data set holds, and how it fills packs: `pile inspect PATH ...`.

PATH is a folder that `pile prepare` wrote, shards (a folder or a pattern), a run, or its configuration. Only that one says how
many tokens an image or a sound takes, and then counts everything; without it media are told in pixels and seconds. Everything
follows from the indexes of the shards; `duplicates` alone reads them. The output folder gets `lengths.png`, `documents.html`
with some documents of each source, their media in `documents/`, and

    statistics.json   {"paths", "tokenizer", "context", "vocabulary": null where media are not counted, "notes",
                       "sources": [{"source", "split", "shards", "bytes", "documents", "rejected": {reason: samples},
                                    "segments": {modality: number}, "text_bytes", "audio_seconds", "image_pixels": quantiles,
                                    "tokens": {modality: number | null, "special": ..., "all": ...},
                                    "document_tokens": quantiles, "only_text": media are not in document_tokens,
                                    "longer": documents longer than the context, "cut": those that are cut, "left_out": those
                                    that are not used, as a medium in them is longer than the context, "packs" of an epoch,
                                    "fill": share of their places that hold tokens, "padding": 1 - fill}],
                       "duplicates": null | {"documents" | "images" | "sounds": {...}, see `find_duplicates`}}

Quantiles are {"count", "sum", "minimum", "1%", "25%", "50%", "75%", "99%", "maximum"}.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.data.files import ShardError, cache_folder
from pile_app.data.order import hash64
from pile_app.data.remote import ShardCache
from pile_app.data.shards import Shards, expand_shards
from pile_app.data.sources import SourceData, segment_tokens
from pile_app.data.tokenizers import Tokenizer, load_tokenizer
from pile_app.data.tokens import text_counts
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Segment
from pile_app.prepare.engines import tracked
from pile_app.tasks.inspect_duplicates import find_duplicates
from pile_app.tasks.inspect_lengths import Histogram, draw_lengths
from pile_app.tasks.inspect_page import describe_segment, write_page
from pile_app.vocabulary import Vocabulary

CONTEXT = 512  # as `data.context` is where nobody sets it


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
        tokenizer: "bytes" or a tokenizer.json; None: that of the run, or bytes.
        context: tokens of a pack; None: that of the run, or 512.
        duplicates: read all shards, and count what occurs more than once.
        samples: documents of each source to show.

    Raises:
        ValueError: a path is none of what it may be, or a number is out of its bounds.
        ShardError: a shard is missing, damaged, or not what was indexed.
    """
    if samples < 0 or (context is not None and context < 8):
        raise ValueError(f"samples={samples} must be 0 or more, context={context} tokens at least 8")
    plan = make_plan(paths, tokenizer, context)
    parts = [Part(*names, Shards(tars, plan.cache, tokenizer=plan.tokenizer)) for names, tars in plan.shards.items()]
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        measure(part, plan)
    description = {
        "paths": list(paths),
        "tokenizer": plan.tokenizer_name,
        "context": plan.context,
        "vocabulary": asdict(plan.vocabulary) if plan.has_model else None,
        "notes": notes(parts, plan),
        "sources": [part.description() for part in parts],
        "duplicates": find_duplicates(parts) if duplicates else None,
    }
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    (folder / "statistics.json").write_text(text, "utf-8", "backslashreplace")
    draw_lengths(parts, plan.context, folder / "lengths.png")
    groups = [(part.title, list(sample_documents(part, samples, plan, folder / "documents"))) for part in parts if samples]
    write_page("Documents of " + ", ".join(map(str, paths)), [], groups, folder, "documents")
    return description


# -- What is to be looked at


@dataclass
class Plan:
    """Shards by (source, split), and what turns them into tokens. has_model: the vocabulary is that of a run."""

    cache: ShardCache
    shards: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    tokenizer_name: str = "bytes"
    tokenizer: Tokenizer = field(default_factory=lambda: load_tokenizer("bytes"))
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    has_model: bool = False
    context: int = CONTEXT
    seed: int = 0

    def add(self, source: str, split: str, tars: Sequence[str]) -> None:
        names = (f"{source} ({number})" if number > 1 else source for number in count(1))
        self.shards[next(name for name in names if (name, split) not in self.shards), split] = list(tars)


def make_plan(paths: Sequence[str], tokenizer: str | None, context: int | None) -> Plan:
    """Raises ValueError where a path is none of what `inspect_data` takes, ShardError where a pattern matches nothing."""
    from pile_app.model.codecs import AudioCodecConfig, ImageCodecConfig
    from pile_app.model.fused import make_vocabulary

    plan = Plan(ShardCache(cache_folder() / "shards", int(100e9)))
    config = None
    for path in paths:
        here = Path(path)
        if (here / "dataset.json").is_file():
            _add_prepared(plan, here / "dataset.json")
        elif (here / "config.yaml").is_file() or here.suffix in (".yaml", ".yml"):
            if config is not None:
                raise ValueError(f"{path!r} is a second run or configuration: give one, which says how tokens are counted")
            config = _add_config(plan, here)
        else:
            _add_shards(plan, expand_shards(str(here / "*.tar") if here.is_dir() else path))
    image = audio = None
    if config is not None:
        image = config.model.image and ImageCodecConfig(**vars(config.model.image))
        audio = config.model.audio and AudioCodecConfig(**vars(config.model.audio))
        plan.has_model, plan.seed, plan.context = True, config.data.seed, config.data.context
        plan.tokenizer_name = config.model.tokenizer
    plan.context = context or plan.context
    plan.tokenizer_name = tokenizer or plan.tokenizer_name
    plan.tokenizer = load_tokenizer(plan.tokenizer_name)
    plan.vocabulary = make_vocabulary(plan.tokenizer.size, plan.tokenizer.fingerprint, image, audio)
    return plan


def _add_prepared(plan: Plan, path: Path) -> None:
    try:
        sources = json.loads(path.read_bytes())["sources"]
        patterns = [(source, split, one["shards"]) for source, splits in sources.items() for split, one in splits.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not what `pile prepare` writes ({error!r}): prepare the data again") from error
    for source, split, pattern in patterns:
        plan.add(source, split, expand_shards(str(path.parent / pattern)))


def _add_config(plan: Plan, path: Path) -> Any:
    """The `model` and `data` of a run, or of a configuration as `train.py` reads it: laid over `conf/default.yaml`."""
    import yaml
    from jsonargparse import ArgumentError

    from pile_app.training.load import make_model_parser

    below = Path("conf/default.yaml")
    parser, parsed = make_model_parser(), None
    for file in [path / "config.yaml"] if path.is_dir() else [below, path] if below.is_file() else [path]:
        try:
            content = yaml.safe_load(file.read_text("utf-8")) or {}
            chosen = {name: content[name] for name in ("model", "data") if name in content}
            parsed = parser.parse_object(chosen, parsed)  # laid over what was parsed before
        except (yaml.YAMLError, UnicodeDecodeError, ArgumentError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(file)!r} is not a configuration of this version of Pile: {error}") from error
    assert parsed is not None
    data = parsed.data
    for source, one in data.sources.items():
        for split in ("train", "validation"):
            if pattern := getattr(one, split):
                plan.add(source, split, expand_shards(pattern))
    plan.cache = ShardCache(data.cache or cache_folder() / "shards", int(data.cache_gigabytes * 1e9), data.allow_pipe)
    return parsed


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

    sizes: bytes of the texts, pixels of the images, milliseconds of the sounds; segment_tokens:
    of each modality, without openers; without_codec: modalities that are there and whose tokens are not known: then
    `document_tokens` counts texts alone.
    """

    source: str
    split: str
    shards: Shards
    sizes: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in MODALITIES])
    segment_tokens: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in MODALITIES])
    document_tokens: Histogram = field(default_factory=Histogram)
    without_codec: list[int] = field(default_factory=list)
    longer: int = 0
    left_out: int | None = None
    packs: int | None = None
    fill: float | None = None

    @property
    def title(self) -> str:
        return f"{self.source}, {self.split}" if self.split else self.source

    @property
    def only_text(self) -> bool:
        return bool(self.without_codec)

    def description(self) -> dict[str, Any]:
        text, image, audio = (tokens.sum for tokens in self.segment_tokens)
        everything = self.document_tokens.sum
        tokens: dict[str, int | None] = {"text": text, "image": image, "audio": audio}
        tokens |= {"special": everything - text - image - audio, "all": everything}
        return {
            "source": self.source,
            "split": self.split,
            "shards": len(self.shards.paths),
            "bytes": sum(self.shards.sizes),
            "documents": len(self.shards),
            "rejected": dict(self.shards.balance()["rejected"].most_common()),
            "segments": {name: sizes.count for name, sizes in zip(MODALITIES, self.sizes, strict=True)},
            "text_bytes": self.sizes[TEXT].sum,
            "audio_seconds": self.sizes[AUDIO].sum / 1000,
            "image_pixels": self.sizes[IMAGE].description(),
            "tokens": dict.fromkeys(tokens) | {"text": text} if self.only_text else tokens,
            "document_tokens": self.document_tokens.description(),
            "only_text": self.only_text,
            "longer": None if self.only_text else self.longer,
            "cut": None if self.left_out is None else self.longer - self.left_out,
            "left_out": self.left_out,
            "packs": self.packs,
            "fill": self.fill,
            "padding": None if self.fill is None else 1 - self.fill,
        }


def measure(part: Part, plan: Plan) -> None:
    """Counts what the indexes of a part say, and packs it as training would."""
    present: set[int] = set()
    for shard in range(len(part.shards.paths)):
        present |= set(np.unique(part.shards.index(shard).modality).tolist())
    part.without_codec = sorted(present - set(plan.vocabulary.modalities))
    for shard in tracked(range(len(part.shards.paths)), f"{part.title}: counting", len(part.shards.paths)):
        _measure_shard(part, shard, plan)
    if part.only_text or not len(part.shards):
        return
    try:
        data = SourceData(part.source, part.shards.paths, plan.vocabulary, plan.tokenizer, plan.context, plan.cache)
    except ShardError:  # every shard was read above: what remains is that no document fits
        part.left_out, part.packs = len(part.shards), 0
        return
    part.left_out = int(data.counts["too_long"].sum())
    part.packs = data.order(plan.seed).packs_per_epoch
    part.fill = float(data.tokens.tokens.sum()) / (part.packs * plan.context)


def _measure_shard(part: Part, shard: int, plan: Plan) -> None:
    index = part.shards.index(shard)
    counts, _ = text_counts(index, plan.tokenizer)
    sizes = index.segment_size.astype(np.int64)
    sizes = np.where(index.modality == AUDIO, np.rint(1000 * sizes / np.maximum(index.sample_rate, 1)), sizes)
    tokens = counts if part.only_text else segment_tokens(index, plan.vocabulary, counts)
    special = 0 if part.only_text else 1 + (index.modality == AUDIO)
    for modality in range(len(MODALITIES)):
        part.sizes[modality].add(sizes[index.modality == modality])
        if modality == TEXT or not part.only_text:
            part.segment_tokens[modality].add((tokens - special)[index.modality == modality])
    if len(index):
        lengths = np.add.reduceat(tokens, index.first_segment[:-1]) + 2 * (not part.only_text)
        part.document_tokens.add(lengths)
        part.longer += int((lengths > plan.context).sum())


def notes(parts: Sequence[Part], plan: Plan) -> list[str]:
    """What has to be said of the statistics."""
    unknown = sorted({modality for part in parts for modality in part.without_codec})
    if not unknown:
        return []
    names = " and ".join(("texts", "images", "sounds")[modality] for modality in unknown)
    if plan.has_model:
        return [f"The model of the run has no codec for {names}: it cannot be trained on sources that hold them."]
    return [
        f"How many tokens {names} take hangs on the codecs of a model: give a run or a configuration beside the shards. "
        "Without it, sources with media tell the tokens of their texts only, and are not packed."
    ]


# -- Documents to look at and listen to


def sample_documents(part: Part, samples: int, plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of some documents, drawn by a hash of their number, for `write_page`; media are written into `folder`."""

    def decode(segment: Segment) -> Segment | None:
        codes = segment.codes
        if segment.modality == TEXT and codes.encoder == plan.tokenizer.fingerprint:
            return Segment(plan.tokenizer.decode(codes.values), "txt", segment.loss)
        return None

    drawn: set[int] = set()
    for draw in count():
        if len(drawn) == min(samples, len(part.shards)):
            break
        drawn.add(int(hash64("inspect", part.source, part.split, draw) % np.uint64(len(part.shards))))
    name = re.sub(r"\W+", "-", part.title)
    for number in sorted(drawn):
        shard, sample = part.shards.place(number)
        index = part.shards.index(shard)
        facts = f"{os.path.basename(index.path)}, document {sample:,}"
        entry: dict[str, Any] = {"key": index.key(sample), "facts": facts, "rejected": None, "segments": []}
        try:
            document = part.shards.document(number)
        except BadSample as error:
            yield entry | {"rejected": {"reason": error.reason, "detail": error.detail}}
            continue
        if not document.ordered:
            entry["facts"] += ", in free order"
        entry["segments"] = [
            describe_segment(segment, folder / f"{name}-{number}-{place}", decode)
            for place, segment in enumerate(document.segments)
        ]
        yield entry
