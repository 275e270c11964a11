"""`pile inspect PATH ...`: statistics of a data set and its packs; and the page of documents, also for steps of a run.

PATH is a folder of `pile prepare`, shards (a folder or a pattern), a run, or a configuration. Only the last two tell how many
tokens an image or a sound takes; without them media are counted in pixels and seconds. Everything follows from the manifests,
only `duplicates` reads the shards. The output folder gets `documents.html` with its media in `documents/`, and
`statistics.json`: {"paths", "tokenizer", "context", "vocabulary": null if media are not counted, "notes", "sources": a list of
`Part.description()`, "duplicates": null or `find_duplicates()`}.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import count, groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pile_app.data.files import ShardError, cache_folder
from pile_app.data.index import text_counts
from pile_app.data.order import hash64
from pile_app.data.remote import ShardCache
from pile_app.data.shards import Shards, expand_shards
from pile_app.data.sources import SourceData, segment_tokens
from pile_app.data.tokenizers import Tokenizer, load_tokenizer
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Segment
from pile_app.prepare.pipeline import tracked
from pile_app.training.report import STYLE, medium, short
from pile_app.vocabulary import Vocabulary

CONTEXT = 512  # the default of `data.context`
QUANTILES = {"minimum": 0.0, "1%": 0.01, "25%": 0.25, "50%": 0.5, "75%": 0.75, "99%": 0.99, "maximum": 1.0}
KINDS = ("documents", "images", "sounds")  # of duplicates
EXAMPLES = 10
SHOWN_CHARACTERS = 20_000  # of a text on the page
Decode = Callable[[Segment], Segment | None]  # an encoded segment -> text or medium, None if that is impossible


def inspect_data(
    paths: Sequence[str], folder: Path, tokenizer: str | None = None, context: int | None = None, duplicates: bool = False,
    samples: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Write `statistics.json` and `documents.html`, with `samples` documents of each source, into `folder`; return the former.
    At most one path is a run or a configuration. Raises ValueError for a path or number that cannot be, or ShardError."""
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
    groups = [(part.title, list(sample_documents(part, samples, plan, folder / "documents"))) for part in parts if samples]
    write_page("Documents of " + ", ".join(map(str, paths)), [], groups, folder, "documents")
    return description


# -- What to inspect


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
    """Raises ValueError if a path is none of what `inspect_data` takes, ShardError if a pattern matches nothing."""
    from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
    from pile_app.model.fused import make_vocabulary

    plan = Plan(ShardCache(cache_folder() / "shards", int(100e9)))
    config = image = audio = None
    for path in paths:
        here = Path(path)
        if (here / "dataset.json").is_file():
            _add_prepared(plan, here / "dataset.json")
        elif (here / "config.yaml").is_file() or here.suffix in (".yaml", ".yml"):
            if config is not None:
                raise ValueError(f"{path!r} is a second run or configuration: give one, which tells how tokens are counted")
            config = _add_config(plan, here)
        else:
            _add_shards(plan, expand_shards(str(here / "*.tar") if here.is_dir() else path))
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
    """Read `model` and `data` of a run, or of a configuration as training reads it: laid over `conf/default.yaml`."""
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
    """Shards of one folder whose names differ in the last number only are of one source."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path in tars:
        folder, _, name = path.partition("?")[0].rpartition("/")
        stem = re.sub(r"[-_.]?\d*(\.tar)?$", "", name) or name
        source, split = re.fullmatch(r"(.*?)(?:[-_.](train|validation|heldout|test))?", stem, re.DOTALL).groups("")  # type: ignore[union-attr]
        groups.setdefault((folder, source, split), []).append(path)
    for (_, source, split), found in groups.items():
        plan.add(source, split, found)


# -- Counting


def describe_values(values: np.ndarray) -> dict[str, int] | None:
    """Return the number of values, their sum and quantiles; None without any."""
    if not len(values):
        return None
    found = np.quantile(values, [*QUANTILES.values()], method="inverted_cdf").tolist()
    return {"count": len(values), "sum": int(values.sum()), **dict(zip(QUANTILES, found, strict=True))}


@dataclass
class Part:
    """A split of a source, and what was counted in it.

    sizes: bytes of the texts, pixels of the images, milliseconds of the sounds; segment_tokens: by modality, without openers;
    only_text: the tokens of some modality are not known, `document_tokens` counts texts only; longer: documents longer than the
    context; left_out: those with a medium longer than it, which are not used; packs: of an epoch; fill: fraction of their
    positions that hold tokens.
    """

    source: str
    split: str
    shards: Shards
    sizes: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64) for _ in MODALITIES])
    segment_tokens: list[int] = field(default_factory=lambda: [0] * len(MODALITIES))
    document_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
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
        """Quantiles are {"count", "sum", "minimum", "1%", "25%", "50%", "75%", "99%", "maximum"}."""
        by_modality = self.segment_tokens
        everything = int(self.document_tokens.sum())
        tokens: dict[str, int | None] = dict(zip(MODALITIES, by_modality, strict=True))
        tokens |= {"special": everything - sum(by_modality), "all": everything}
        kept = {name: getattr(self, name) for name in ("source", "split", "only_text", "left_out", "packs", "fill")}
        return kept | {
            "shards": len(self.shards.paths),
            "bytes": sum(self.shards.sizes),
            "documents": len(self.shards),
            "rejected": dict(self.shards.balance()["rejected"].most_common()),
            "segments": {name: len(sizes) for name, sizes in zip(MODALITIES, self.sizes, strict=True)},
            "text_bytes": int(self.sizes[TEXT].sum()),
            "audio_seconds": int(self.sizes[AUDIO].sum()) / 1000,
            "image_pixels": describe_values(self.sizes[IMAGE]),
            "tokens": dict.fromkeys(tokens) | {"text": by_modality[TEXT]} if self.only_text else tokens,
            "document_tokens": describe_values(self.document_tokens),
            "longer": None if self.only_text else self.longer,
            "cut": None if self.left_out is None else self.longer - self.left_out,
            "padding": None if self.fill is None else 1 - self.fill,
        }


def measure(part: Part, plan: Plan) -> None:
    """Count what the manifests of a part tell, and pack it as training would."""
    indexes = range(len(part.shards.paths))
    present = set(np.concatenate([np.unique(part.shards.index(shard).modality) for shard in indexes]).tolist())
    part.without_codec = sorted(present - set(plan.vocabulary.modalities))
    for shard in tracked(indexes, f"{part.title}: counting", len(indexes)):
        index = part.shards.index(shard)
        counts, _ = text_counts(index, plan.tokenizer)
        sizes = index.segment_size.astype(np.int64)
        sizes = np.where(index.modality == AUDIO, np.rint(1000 * sizes / np.maximum(index.sample_rate, 1)), sizes)
        tokens = counts if part.only_text else segment_tokens(index, plan.vocabulary, counts)
        special = 0 if part.only_text else 1 + (index.modality == AUDIO)
        for modality in range(len(MODALITIES)):
            part.sizes[modality] = np.append(part.sizes[modality], sizes[index.modality == modality].astype(np.int64))
            if modality == TEXT or not part.only_text:
                part.segment_tokens[modality] += int((tokens - special)[index.modality == modality].sum())
        if len(index):
            lengths = np.add.reduceat(tokens, index.first_segment[:-1]) + 2 * (not part.only_text)
            part.document_tokens = np.append(part.document_tokens, lengths.astype(np.int64))
            part.longer += int((lengths > plan.context).sum())
    if part.only_text or not len(part.shards):
        return
    try:
        data = SourceData(part.source, part.shards.paths, plan.vocabulary, plan.tokenizer, plan.context, plan.cache)
    except ShardError:  # every shard was read above, so no document fits
        part.left_out, part.packs = len(part.shards), 0
        return
    part.left_out = int(data.counts["too_long"].sum())
    part.packs = data.order(plan.seed).packs_per_epoch
    part.fill = float(data.tokens.tokens.sum()) / (part.packs * plan.context)


def notes(parts: Sequence[Part], plan: Plan) -> list[str]:
    unknown = sorted({modality for part in parts for modality in part.without_codec})
    names = " and ".join(("texts", "images", "sounds")[modality] for modality in unknown)
    if unknown and plan.has_model:
        return [f"The model of the run has no codec for {names}: it cannot be trained on sources that hold them."]
    return [
        f"The tokens of {names} depend on the codecs of a model: give a run or a configuration with the shards. Without it, "
        "sources with media are counted in tokens of their texts only, and are not packed."
    ] * bool(unknown)


def sample_documents(part: Part, samples: int, plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """Describe some documents, drawn by a hash, for `write_page`; media are written into `folder`."""

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
        entry["facts"] += ", in free order" * (not document.ordered)
        entry["segments"] = [
            describe_segment(segment, folder / f"{name}-{number}-{place}", decode)
            for place, segment in enumerate(document.segments)
        ]
        yield entry


# -- Duplicates


def find_duplicates(parts: Sequence[Part]) -> dict[str, Any]:
    """Find documents, images and sounds that occur more than once, whatever their keys.

    The shards are read once; hashes of 128 bits go to a temporary database, which SQLite sorts on disk.

    Returns {"unreadable": documents whose bytes differ from the manifest, "documents" | "images" | "sounds": {"groups":
    contents that occur more than once, "copies": how many could go, "of_source": {source and split: copies in it, all but the
    first of each group}, "leaked": those outside the training split that occur in the training split of any source,
    "examples": [[source, split, key] of each copy, at most 5 of a group], leaked ones first}}.
    """
    unreadable = Counter[str]()
    found: dict[str, Any] = {
        kind: {"groups": 0, "copies": 0, "of_source": Counter(), "leaked": 0, "examples": []} for kind in KINDS
    }
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE seen (kind, hash, held_out, part, number)")
        for number, part in enumerate(parts):
            held_out = part.split not in ("train", "")
            rows = ((kind, one, held_out, number, document) for kind, one, document in _hashes(part, unreadable))
            database.executemany("INSERT INTO seen VALUES (?, ?, ?, ?, ?)", rows)
        ordered = database.execute("SELECT * FROM seen ORDER BY kind, hash, held_out, part, number")
        for (kind, _), group in groupby(ordered, lambda row: row[:2]):
            copies = list(group)
            if len(copies) < 2:
                continue
            of_kind, is_leak = found[KINDS[kind]], not copies[0][2] and copies[-1][2]
            of_kind["groups"] += 1
            of_kind["copies"] += len(copies) - 1
            of_kind["of_source"].update(parts[part].title for *_, part, _ in copies[1:])
            of_kind["leaked"] += sum(held_out for _, _, held_out, *_ in copies) if is_leak else 0
            example = [[parts[p].source, parts[p].split, parts[p].shards.key(n)] for *_, p, n in copies[:4] + copies[4:][-1:]]
            of_kind["examples"] = sorted([*of_kind["examples"], (not is_leak, example)], key=lambda one: one[0])[:EXAMPLES]
    for kind in KINDS:
        found[kind]["examples"] = [example for _, example in found[kind]["examples"]]
    return {"unreadable": unreadable["documents"]} | found


def _hashes(part: Part, unreadable: Counter[str]) -> Iterator[tuple[int, bytes, int]]:
    """Yield (index of the kind, hash, index of the document) of every document and medium."""
    for number in tracked(range(len(part.shards)), f"{part.title}: reading", len(part.shards)):
        try:
            document = part.shards.document(number)
        except BadSample:
            unreadable["documents"] += 1
            continue
        hashes = [_hash(segment) for segment in document.segments]
        whole = b"".join(hashes if document.ordered else sorted(hashes))
        yield 0, hashlib.blake2b(whole, digest_size=16).digest(), number
        yield from ((one.modality, its, number) for one, its in zip(document.segments, hashes, strict=True) if one.modality)


def _hash(segment: Segment) -> bytes:
    kind = segment.extension if segment.is_encoded else MODALITIES[segment.modality]
    data = segment.data.encode("utf-8", "surrogatepass") if isinstance(segment.data, str) else segment.data
    return hashlib.blake2b(data, digest_size=16, person=kind.encode()).digest()


# -- Tables


def format_statistics(description: Mapping[str, Any]) -> str:
    """Write `statistics.json` for people: a table of what there is, a table of how it packs, and notes."""
    sources, found = description["sources"], description["duplicates"]
    lines = [_table(list(map(_content, sources)))]
    lines += [f"In tokens ({description['tokenizer']}), for packs of {description['context']:,}:"]
    lines += [_table(list(map(_packing, sources)))]
    for one in sources:
        if one["rejected"]:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in one["rejected"].items())
            lines.append(f"rejected of {one['source']} {one['split']}".rstrip() + f": {reasons}")
    lines += description["notes"]
    if found is None:
        return "\n".join(lines)
    lines += [f"{found['unreadable']:,} documents differ from the manifest: `pile index --verify`"] * bool(found["unreadable"])
    lines += ["no document occurs more than once"] * (not found["documents"]["groups"])
    for kind, one in ((kind, found[kind]) for kind in KINDS if found[kind]["groups"]):
        where = ", ".join(f"{number:,} in {title}" for title, number in one["of_source"].items())
        lines.append(f"duplicate {kind}: {one['groups']:,} occur more than once, {one['copies']:,} copies could go: {where}")
        if one["leaked"]:
            lines.append(f"  LEAK: {one['leaked']:,} of the {kind} held out from training are in a training split too")
        lines += ["  " + " = ".join(" ".join(filter(None, name)) for name in example) for example in one["examples"][:5]]
    return "\n".join(lines)


def _content(one: Mapping[str, Any]) -> dict[str, str]:
    pixels = one["image_pixels"] or {}
    return {
        **{name: one[name] for name in ("source", "split")},
        **{name: f"{one[name]:,}" for name in ("shards", "documents")},
        "rejected": f"{sum(one['rejected'].values()):,}",
        "size": f"{short(one['bytes'])}B",
        **{f"{name}s": f"{count:,}" if count else "" for name, count in one["segments"].items()},
        "pixels: min / median / max": " / ".join(short(pixels[name]) for name in ("minimum", "50%", "maximum") if pixels),
        "hours": f"{one['audio_seconds'] / 3600:,.3f}" if one["segments"]["audio"] else "",
    }


def _packing(one: Mapping[str, Any]) -> dict[str, str]:
    lengths = {"shortest 1 %": "1%", "median": "50%", "longest 1 %": "99%", "longest": "maximum"}
    numbers = {name: f"{(one['document_tokens'] or {}).get(key, 0):,}" for name, key in lengths.items()}
    return {
        **{name: one[name] for name in ("source", "split")},
        **{name: "-" if one["tokens"][name] is None else short(one["tokens"][name]) for name in ("all", *MODALITIES)},
        **{name: number + " of text" * one["only_text"] for name, number in numbers.items()},
        **{name: "-" if one[name] is None else f"{one[name]:,}" for name in ("cut", "left_out", "packs")},
        **{name: "-" if one[name] is None else f"{one[name]:.1%}" for name in ("fill", "padding")},
    }


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Format rows as text, without empty columns."""
    from rich.console import Console
    from rich.table import Table

    table, names = Table(box=None, pad_edge=False), [name for name in rows[0] if any(row[name] for row in rows)]
    for name in names:
        table.add_column(name, justify="left" if name in ("source", "split") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    console = Console(file=io.StringIO(), width=1000, markup=False, highlight=False)
    console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


# -- Page of documents. A policy makes sure that nothing else is loaded, and that no script of a sample runs.

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta
http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:;
media-src 'self' file:"><title>{title}</title><style>{style}</style><h1>{title}</h1><p class="soft">{status}</p>{body}</html>
"""
PAGE_STYLE = """
.documents{--least:24rem}.card>small{display:block;margin-bottom:.5rem;overflow-wrap:anywhere}.segment{margin:.45rem 0}
.segment>small{display:block}.away{opacity:.5}.bad{color:var(--c1)}.segment img{max-height:16rem}figure.sound img{height:3.5rem}
"""


def describe_segment(segment: Segment, path: Path, decode: Decode, hidden: bool = False) -> dict[str, Any]:
    """Return {"modality", "text" | "file" | "note", "hidden", "learned"}; write a medium to `path` plus its
    extension, unchanged or decoded from its codes."""
    entry: dict[str, Any] = {"modality": MODALITIES[segment.modality], "hidden": hidden, "learned": segment.loss and not hidden}
    if segment.is_encoded:
        try:
            decoded = decode(segment)
        except BadSample as error:
            return entry | {"note": str(error)}
        if decoded is None:
            return entry | {"note": f"encoded as {len(segment.file):,} bytes of codes, which only the model's run can decode"}
        segment = decoded
    if segment.modality == TEXT:
        return entry | {"text": segment.text}
    path = path.with_name(f"{path.name}.{segment.extension}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(segment.file)
    return entry | {"file": path.name}


def write_page(
    title: str, notes: Sequence[str], groups: Iterable[tuple[str, Sequence[Mapping[str, Any]]]], folder: Path, media: str = ""
) -> None:
    """Write `folder/documents.html`.

    Args:
        groups: (heading, documents) each; a document has a "key", "facts", "segments" (see `describe_segment`) and "rejected".
        media: folder of the media, within `folder`.
    """
    body = ""
    for heading, documents in groups:
        cards = "".join(_card(one, folder / media, media) for one in documents)
        body += f'<h2>{escape(heading)}</h2><div class="grid documents">{cards}</div>'
    status = "".join(f"<span>{escape(note)}</span>" for note in notes)
    page = PAGE.format(title=escape(title), style=STYLE + PAGE_STYLE, status=status, body=body)
    (folder / "documents.html").write_text(page, "utf-8", errors="backslashreplace")


def state_of(segment: Mapping[str, Any]) -> str:
    """Tell whether the model saw and learned a segment; "" if it did both."""
    return "hidden" if segment["hidden"] else "" if segment["learned"] else "given, not learned"


def _card(one: Mapping[str, Any], folder: Path, media: str) -> str:
    card = f"<small><b>{escape(one['key'])}</b> {escape(one['facts'])}</small>"
    if one["rejected"]:
        card += f'<small class="bad">{escape(one["rejected"]["reason"])}: {escape(one["rejected"]["detail"])}</small>'
    for segment in one["segments"]:
        note = f"<small>{escape(state_of(segment))}</small>" if state_of(segment) else ""
        if "note" in segment:
            shown = f'<small class="bad">{escape(segment["modality"])}: {escape(segment["note"])}</small>'
        elif "text" in segment:
            text, more = segment["text"], len(segment["text"]) - SHOWN_CHARACTERS
            text = f"{text[:SHOWN_CHARACTERS]}\n... and {more:,} more characters" if more > 0 else text
            shown = medium({"text": text}, folder)
        else:
            link = escape(quote(f"{media}/{segment['file']}" if media else segment["file"]))
            shown = medium(dict(segment), folder, link, least=120)
        card += f'<div class="segment{" away" * segment["hidden"]}">{note}{shown}</div>'
    return f'<div class="card">{card}</div>'
