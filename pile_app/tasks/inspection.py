"""`pile inspect`: statistics of a data set (`inspect_data`), and the training data of a step of a run (`inspect_training`).

Statistics follow from the manifests; only `duplicates` reads the shards. Media are counted in tokens if a run or configuration
tells their codecs, else in pixels and seconds. Steps follow from the order, a pure function of the position: step N saw the
packs at [(N - 1) * G, N * G), G = `data.global_batch`. Texts and media are shown as the packs held them: segments in the order
drawn for that epoch, pieces of cut documents, hidden conditions, codes decoded by the run.

Both write `documents.html` with its media, and a description:

    statistics.json  {"paths", "tokenizer", "context", "vocabulary": null if media are not counted, "notes", "sources": a list
                     of `measure()`, "duplicates": null or `find_duplicates()`}
    documents.json   {"run", "step": null for positions, "trained", "phase", "positions": [first, stop], "found": documents of
                     the positions, "documents": a list of `describe_pack()`}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from html import escape
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np

from pile_app.data.files import ShardError, cache_folder
from pile_app.data.index import segment_size, text_counts
from pile_app.data.order import hash64
from pile_app.data.remote import ShardCache
from pile_app.data.shards import Shards, expand_shards
from pile_app.data.sources import SourceData, segment_tokens
from pile_app.data.tokenizers import Tokenizer, load_tokenizer
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Segment
from pile_app.prepare.pipeline import tracked
from pile_app.training.report import medium, short, write_page
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.data.assembly import PackedDocument
    from pile_app.data.datamodule import PackDataset
    from pile_app.model.fused import FusedLanguageModel

CONTEXT = 512  # the default of `data.context`
QUANTILES = {"minimum": 0.0, "1%": 0.01, "25%": 0.25, "50%": 0.5, "75%": 0.75, "99%": 0.99, "maximum": 1.0}
KINDS = ("documents", "images", "sounds")  # of duplicates
SPLITS = ("train", "validation")
EXAMPLES = 10
SHOWN_CHARACTERS = 20_000  # of a text on the page
Decode = Callable[[Segment], Segment | None]  # an encoded segment -> text or medium, None if that is impossible
STYLE = """
.documents{--least:24rem}.card>small{display:block;margin-bottom:.5rem;overflow-wrap:anywhere}.segment{margin:.45rem 0}
.segment>small{display:block}.away{opacity:.5}.bad{color:var(--c1)}.segment img{max-height:16rem}figure.sound img{height:3.5rem}
"""


# -- Data sets


class Plan(NamedTuple):
    """What turns shards into tokens and packs. has_model: the vocabulary is that of a run."""

    cache: ShardCache
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    has_model: bool
    context: int
    seed: int


class Part(NamedTuple):
    """A split of a source."""

    source: str
    split: str
    shards: Shards

    @property
    def title(self) -> str:
        return f"{self.source}, {self.split}" if self.split else self.source


def inspect_data(
    paths: Sequence[str], folder: Path, tokenizer: str | None = None, context: int | None = None, duplicates: bool = False,
    samples: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Write `statistics.json` and `documents.html`, with `samples` documents of each source, into `folder`; return the former.

    A path is a folder of `pile prepare`, shards (a folder or a pattern), or, once at most, a run or a configuration. Raises
    ValueError for a path or number that cannot be, or ShardError.
    """
    from pile_app.model.fused import make_vocabulary

    if samples < 0 or (context is not None and context < 8):
        raise ValueError(f"samples={samples} must be 0 or more, context={context} tokens at least 8")
    found, config = find_shards(paths)
    codecs: tuple[Any, Any] = (None, None)
    name, seed, cache = tokenizer or "bytes", 0, ShardCache(cache_folder() / "shards", int(100e9))
    if config is not None:
        from pile_app.training.cli import codec_configs

        data, codecs, name = config.data, codec_configs(config), tokenizer or config.model.tokenizer
        context, seed = context or data.context, data.seed
        cache = ShardCache(data.cache or cache_folder() / "shards", int(data.cache_gigabytes * 1e9), data.allow_pipe)
    loaded = load_tokenizer(name)
    vocabulary = make_vocabulary(loaded.size, loaded.fingerprint, *codecs)
    plan = Plan(cache, loaded, vocabulary, config is not None, context or CONTEXT, seed)
    parts = [Part(*names, Shards(tars, cache, tokenizer=loaded)) for names, tars in found.items()]
    folder.mkdir(parents=True, exist_ok=True)
    sources = [measure(part, plan) for part in parts]
    description = {
        "paths": list(paths), "tokenizer": name, "context": plan.context,
        "vocabulary": asdict(vocabulary) if plan.has_model else None, "notes": notes(sources, plan), "sources": sources,
        "duplicates": find_duplicates(parts) if duplicates else None,
    }  # fmt: skip
    write_json(folder / "statistics.json", description)
    groups = [(part.title, list(sample_documents(part, samples, plan, folder / "documents"))) for part in parts if samples]
    show_documents("Documents of " + ", ".join(map(str, paths)), [], groups, folder, "documents")
    return description


def find_shards(paths: Sequence[str]) -> tuple[dict[tuple[str, str], list[str]], Any]:
    """Return (source, split) -> shards, and the configuration of the run among the paths, or None.

    Raises ValueError if a path is none of what `inspect_data` takes, ShardError if a pattern matches nothing.
    """
    there: list[tuple[str, str, list[str]]] = []
    config = None
    for path in paths:
        here = Path(path)
        if (file := here / "dataset.json").is_file():
            try:
                sources = json.loads(file.read_bytes())["sources"]
                patterns = [(source, split, one["shards"]) for source in sources for split, one in sources[source].items()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{str(file)!r} is not what `pile prepare` writes ({error!r}): prepare again") from error
            there += [(source, split, expand_shards(str(here / pattern))) for source, split, pattern in patterns]
        elif (file := here / "config.yaml").is_file() or here.suffix in (".yaml", ".yml"):
            if config is not None:
                raise ValueError(f"{path!r} is a second run or configuration: give one, which tells how tokens are counted")
            from pile_app.training.cli import parse_config

            file = file if here.is_dir() else here
            try:
                config = parse_config(["--config", str(file)])  # as training reads it, laid over `conf/default.yaml`
            except ValueError as error:
                raise ValueError(f"{str(file)!r} is not a configuration of this version of Pile: {error}") from error
            named = [(source, split, getattr(one, split)) for source, one in config.data.sources.items() for split in SPLITS]
            there += [(source, split, expand_shards(pattern)) for source, split, pattern in named if pattern]
        else:  # shards of one folder whose names differ in the last number only are of one source
            groups: dict[tuple[str, str, str], list[str]] = {}
            for tar in expand_shards(str(here / "*.tar") if here.is_dir() else path):
                folder, _, name = tar.partition("?")[0].rpartition("/")
                stem = re.sub(r"[-_.]?\d*(\.tar)?$", "", name) or name
                source, split = re.fullmatch(r"(.*?)(?:[-_.](train|validation|heldout|test))?", stem, re.S).groups("")  # type: ignore[union-attr]
                groups.setdefault((folder, source, split), []).append(tar)
            there += [(source, split, tars) for (_, source, split), tars in groups.items()]
    found: dict[tuple[str, str], list[str]] = {}
    for source, split, tars in there:
        names = (f"{source} ({number})" if number > 1 else source for number in count(1))
        found[next(name for name in names if (name, split) not in found), split] = tars
    return found, config


def describe_values(values: np.ndarray) -> dict[str, int] | None:
    """Return the number of values, their sum and quantiles; None without any."""
    if not len(values):
        return None
    found = np.quantile(values, [*QUANTILES.values()], method="inverted_cdf").tolist()
    return {"count": len(values), "sum": int(values.sum()), **dict(zip(QUANTILES, found, strict=True))}


def measure(part: Part, plan: Plan) -> dict[str, Any]:
    """Count what the manifests of a part tell, and pack it as training would.

    Returns "source", "split", "shards", "bytes", "documents", "rejected" (reason -> samples), and

        segments                 by modality; "audio_seconds" in all, "image_pixels" of each (`describe_values`)
        tokens                   by modality without openers, "special" and "all"; "document_tokens" of each
        only_text                the tokens of some modality are not known: texts alone are counted, and nothing is packed
        longer, cut, left_out    documents longer than the context; that are cut; with a medium longer than it, not used
        packs, fill, padding     packs of an epoch, fractions of their positions with and without tokens
    """
    shards = part.shards
    indexes = [shards.index(shard) for shard in range(len(shards.paths))]
    names = ("modality", "segment_size", "sample_rate")
    modality, sizes, rate = (np.concatenate([getattr(index, name) for index in indexes]) for name in names)
    only_text = not set(np.unique(modality).tolist()) <= set(plan.vocabulary.modalities)
    tokens, lengths = list[np.ndarray](), [np.zeros(0, np.int64)]
    for index in tracked(indexes, f"{part.title}: counting", len(indexes)):
        counts = text_counts(index, plan.tokenizer)[0]
        tokens.append(counts if only_text else segment_tokens(index, plan.vocabulary, counts))
        if len(index):
            lengths.append(np.add.reduceat(tokens[-1], index.first_segment[:-1]) + 2 * (not only_text))
    document_tokens = np.concatenate(lengths).astype(np.int64)
    content = np.concatenate(tokens) - (0 if only_text else 1 + (modality == AUDIO))  # without openers and `<audio_end>`
    counted: dict[str, int | None] = {name: int(content[modality == m].sum()) for m, name in enumerate(MODALITIES)}
    everything, longer = int(document_tokens.sum()), int((document_tokens > plan.context).sum())
    counted |= {"special": everything - int(content.sum()), "all": everything}
    if only_text:
        counted = dict.fromkeys(counted) | {"text": counted["text"]}
    left_out: int | None = None
    packs: int | None = None
    fill: float | None = None
    if len(shards) and not only_text:
        try:
            data = SourceData(part.source, shards.paths, plan.vocabulary, plan.tokenizer, plan.context, plan.cache)
        except ShardError:  # every shard was read above, so no document fits
            left_out, packs = len(shards), 0
        else:
            left_out, packs = int(data.counts["too_long"].sum()), data.order(plan.seed).packs_per_epoch
            fill = float(data.tokens.tokens.sum()) / (packs * plan.context)
    return {
        "source": part.source,
        "split": part.split,
        "shards": len(shards.paths),
        "bytes": sum(shards.sizes),
        "documents": len(shards),
        "rejected": dict(shards.balance()["rejected"].most_common()),
        "segments": {name: int((modality == number).sum()) for number, name in enumerate(MODALITIES)},
        "audio_seconds": float((sizes / np.maximum(rate, 1))[modality == AUDIO].sum()),
        "image_pixels": describe_values(sizes[modality == IMAGE]),
        "only_text": only_text,
        "tokens": counted,
        "document_tokens": describe_values(document_tokens),
        "longer": None if only_text else longer,
        "left_out": left_out,
        "cut": None if left_out is None else longer - left_out,
        "packs": packs,
        "fill": fill,
        "padding": None if fill is None else 1 - fill,
    }


def notes(sources: Sequence[dict[str, Any]], plan: Plan) -> list[str]:
    there = {name for one in sources for name, segments in one["segments"].items() if segments}
    unknown = [number for number, name in enumerate(MODALITIES) if name in there and number not in plan.vocabulary.modalities]
    names = " and ".join(("texts", "images", "sounds")[modality] for modality in unknown)
    if unknown and plan.has_model:
        return [f"The model of the run has no codec for {names}: it cannot be trained on sources that hold them."]
    return [
        f"The tokens of {names} depend on the codecs of a model: give a run or a configuration with the shards. Without it, "
        "sources with media are counted in tokens of their texts only, and are not packed."
    ] * bool(unknown)


def sample_documents(part: Part, samples: int, plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """Describe some documents, drawn by a hash, for `show_documents`; media are written into `folder`."""

    def decode(segment: Segment) -> Segment | None:
        codes = segment.codes
        if segment.modality == TEXT and codes.encoder == plan.tokenizer.fingerprint:
            return Segment(plan.tokenizer.decode(codes.values), "txt", segment.loss)
        return None

    draws = (int(hash64("inspect", part.source, part.split, draw) % np.uint64(len(part.shards))) for draw in count())
    drawn: set[int] = set()
    while len(drawn) < min(samples, len(part.shards)):
        drawn.add(next(draws))
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


def find_duplicates(parts: Sequence[Part]) -> dict[str, Any]:
    """Find documents, images and sounds that occur more than once, whatever their keys.

    The shards are read once; hashes of 128 bits go to a temporary database, which SQLite sorts on disk.

    Returns {"unreadable": documents whose bytes differ from the manifest, "documents" | "images" | "sounds": {"groups":
    contents that occur more than once, "copies": how many could go, "of_source": {source and split: copies in it, all but the
    first of each group}, "leaked": those outside the training split that occur in the training split of any source,
    "examples": [[source, split, key] of each copy, at most 5 of a group], leaked ones first}}.
    """
    unreadable = Counter[str]()
    found: dict[str, Any] = {kind: {"groups": 0, "copies": 0, "of_source": Counter(), "leaked": 0} for kind in KINDS}
    examples: dict[str, list[tuple[bool, list[list[str]]]]] = {kind: [] for kind in KINDS}  # (is none of a leak, copies)
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE seen (kind, hash, held_out, part, number)")
        for number, part in enumerate(parts):
            held_out = part.split not in ("train", "")
            rows = ((kind, one, held_out, number, document) for kind, one, document in _hashes(part, unreadable))
            database.executemany("INSERT INTO seen VALUES (?, ?, ?, ?, ?)", rows)
        ordered = database.execute("SELECT * FROM seen ORDER BY kind, hash, held_out, part, number")
        for (kind, _), group in groupby(ordered, itemgetter(0, 1)):
            copies = list(group)
            if len(copies) < 2:
                continue
            of_kind, is_leak = found[KINDS[kind]], not copies[0][2] and copies[-1][2]
            of_kind["groups"] += 1
            of_kind["copies"] += len(copies) - 1
            of_kind["of_source"].update(parts[part].title for *_, part, _ in copies[1:])
            of_kind["leaked"] += sum(held_out for _, _, held_out, *_ in copies) if is_leak else 0
            names = [[parts[p].source, parts[p].split, parts[p].shards.key(n)] for *_, p, n in copies[:4] + copies[4:][-1:]]
            kept = sorted([*examples[KINDS[kind]], (not is_leak, names)], key=itemgetter(0))
            examples[KINDS[kind]] = kept[:EXAMPLES]
    for kind in KINDS:
        found[kind]["examples"] = [names for _, names in examples[kind]]
    return {"unreadable": unreadable["documents"]} | found


def _hashes(part: Part, unreadable: Counter[str]) -> Iterator[tuple[int, bytes, int]]:
    """Yield (index of the kind, hash, index of the document) of every document and medium."""

    def digest(data: str | bytes, kind: str = "") -> bytes:
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        return hashlib.blake2b(data, digest_size=16, person=kind.encode()).digest()

    for number in tracked(range(len(part.shards)), f"{part.title}: reading", len(part.shards)):
        try:
            document = part.shards.document(number)
        except BadSample:
            unreadable["documents"] += 1
            continue
        kinds = (one.extension if one.is_encoded else MODALITIES[one.modality] for one in document.segments)
        hashes = [digest(one.data, kind) for one, kind in zip(document.segments, kinds, strict=True)]
        yield 0, digest(b"".join(hashes if document.ordered else sorted(hashes))), number
        yield from ((one.modality, its, number) for one, its in zip(document.segments, hashes, strict=True) if one.modality)


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
    """Format rows as text, without empty columns; names to the left, figures to the right."""
    columns = []
    for name in (name for name in rows[0] if any(row[name] for row in rows)):
        cells = [name, *(row[name] for row in rows)]
        align = str.ljust if name in ("source", "split") else str.rjust
        columns.append([align(cell, max(map(len, cells))) for cell in cells])
    return "".join("  ".join(line).rstrip() + "\n" for line in zip(*columns, strict=True))


# -- Steps of a run


def inspect_training(run: Path, asked: int | tuple[int, int], folder: Path, limit: int | None = None) -> str:
    """Write at most `limit` documents of a step (from 1), or at positions [first, stop) (from 0), into `folder`; return a
    summary. Steps to come are described as planned. Raises ValueError if the data are not those of the run."""
    from pile_app.training.load import load_run

    step = asked if isinstance(asked, int) else None
    if any(number is not None and number < 1 for number in (step, limit)):
        raise ValueError(f"steps and limits count from 1, not step {step}, limit {limit}")
    if not isinstance(asked, int) and not 0 <= asked[0] < asked[1]:
        raise ValueError(f"positions are START:STOP with 0 <= START < STOP, not {asked[0]}:{asked[1]} (STOP is excluded)")
    module, data, checkpoint = load_run(run)
    data.setup()
    data.load_state_dict(checkpoint["PileDataModule"])
    batch = data.global_batch
    first, stop = ((asked - 1) * batch, asked * batch) if isinstance(asked, int) else asked
    folder.mkdir(parents=True, exist_ok=True)
    dataset, decode = data.train_dataset(), decoder(module.model)
    entries = (one for position in range(first, stop) for one in describe_pack(dataset, position, batch, folder, decode))
    first_step, last_step = first // batch + 1, (stop - 1) // batch + 1
    phases = ["codecs"] * (first_step <= module.codec_steps) + ["language model"] * (last_step > module.codec_steps)
    description = {
        "run": str(run), "step": step, "trained": last_step <= checkpoint["global_step"], "phase": ", ".join(phases),
        "positions": [first, stop],
        "found": sum(len(dataset.order.pack(position)) for position in range(first, stop)),
        "documents": list(islice(entries, limit)),
    }  # fmt: skip
    write_json(folder / "documents.json", description)
    return _tell(description, folder)


def describe_pack(dataset: PackDataset, position: int, batch: int, folder: Path, decode: Decode) -> Iterator[dict[str, Any]]:
    """Describe each document in the pack of a position; write its media into `folder`.

    "tokens": [start, stop] of the document; "place": first index in the pack; "segments": see `describe_segment`.
    """
    pack = dataset[position]
    used = set(pack.document[0].tolist())
    rejected = iter(pack.rejected)
    place = 0
    for number, one in enumerate(dataset.documents(position)):
        piece = one.piece
        _, _, reason, detail = (None,) * 4 if number in used else next(rejected)
        yield {
            "position": position,
            "step": position // batch + 1,
            "source": dataset.sources[piece.source].name,
            "epoch": piece.epoch,
            "key": one.key,
            "facts": f"tokens {piece.start:,} to {piece.stop - 1:,}, at place {place:,}",
            "tokens": [piece.start, piece.stop],
            "place": place,
            "rejected": {"reason": reason, "detail": detail} if reason else None,
            "segments": [
                describe_segment(segment, folder / f"{position}-{number}-{index}", decode, hidden)
                for index, hidden, segment in segments_of_piece(one, dataset.vocabulary, dataset.tokenizer)
            ],
        }
        place += piece.stop - piece.start


def segments_of_piece(one: PackedDocument, vocabulary: Vocabulary, tokenizer: Tokenizer) -> Iterator[tuple[int, bool, Segment]]:
    """Yield (index, whether it was hidden, segment) for what lies inside the piece; of a text that was cut, the part inside."""
    if isinstance(one.document, BadSample):
        return
    start, stop = one.piece.start, one.piece.stop
    first = 1  # after `<begin>`
    for number, segment in enumerate(one.document.segments):
        ids = None
        try:
            if segment.modality == TEXT:
                ids = segment.codes.values if segment.is_encoded else tokenizer.encode(segment.text)
            size, rate = (len(ids), 0) if ids is not None else segment_size(segment) if segment.modality == AUDIO else (0, 0)
        except BadSample:  # the whole document is rejected, and its pieces cannot be told apart any more
            yield number, number < one.dropped, segment
            continue
        last = first + vocabulary.segment_tokens(segment.modality, size, rate)
        if first < stop and last > start:
            if ids is not None and (first < start or last > stop):
                inside = ids[max(0, start - first - 1) : max(0, stop - first - 1)]
                segment = Segment(tokenizer.decode(inside), "txt", segment.loss)
            yield number, number < one.dropped, segment
        first = last


def decoder(model: FusedLanguageModel) -> Decode:
    """Make a function that decodes what tokenizer and codecs of a model encoded."""
    import torch

    from pile_app.model.segments import decode_codes

    sizes = {TEXT: model.tokenizer.size, IMAGE: model.vocabulary.image_codes, AUDIO: model.vocabulary.audio_codes}

    def decode(segment: Segment) -> Segment | None:
        values = segment.codes.values
        fits = segment.modality != IMAGE or len(values) == model.vocabulary.image_tokens
        if not fits or int(values.max(initial=0)) >= sizes[segment.modality]:
            return None  # another codec made them
        if segment.modality == TEXT:
            return Segment(model.tokenizer.decode(values), "txt", segment.loss)
        with torch.no_grad():
            return decode_codes(model, [values.tolist()], segment.modality)[0]

    return decode


def _tell(description: Mapping[str, Any], folder: Path) -> str:
    """Write the page, and return the summary: a line a document."""
    (first, stop), run, step, found = (description[name] for name in ("positions", "run", "step", "found"))
    where = f"positions {first} to {stop - 1}" if stop > first + 1 else f"position {first}"
    notes = [f"trained in this phase: {description['phase']}"] * ("codecs" in description["phase"])
    notes += ["planned: the checkpoint is from before it"] * (not description["trained"])
    what = run if step is None else f"step {step} of {run}"
    lines = [f"{what}: {where}, {found} documents" + (f" ({'; '.join(notes)})" if notes else "")]
    groups = []
    for position, group in groupby(description["documents"], itemgetter("position")):
        documents = list(group)
        heading = f"Position {position}: {documents[0]['source']}, epoch {documents[0]['epoch']}, step {documents[0]['step']}"
        groups.append((heading, documents))
        lines.append(heading)
        for one in documents:
            lines.append(f"  {one['key']}: {one['facts']}, {' + '.join(segment['modality'] for segment in one['segments'])}")
            if one["rejected"]:
                lines.append(f"    not used, {one['rejected']['reason']}: {one['rejected']['detail']}")
    if len(description["documents"]) < found:
        lines.append(f"and {found - len(description['documents'])} more documents")
    show_documents(f"{Path(run).resolve().name}: {where if step is None else f'step {step}'}", notes, groups, folder)
    return "\n".join(lines)


# -- Both


def write_json(path: Path, description: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def describe_segment(segment: Segment, path: Path, decode: Decode, hidden: bool = False) -> dict[str, Any]:
    """Return {"modality", "text" | "file" | "note", "hidden", "learned"}; write a medium, or its decoded codes, to `path` plus
    its extension."""
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


def show_documents(
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
    write_page(folder / "documents.html", title, notes, body, style=STYLE, media="data: 'self' file:")


def _card(one: Mapping[str, Any], folder: Path, media: str) -> str:
    card = f"<small><b>{escape(one['key'])}</b> {escape(one['facts'])}</small>"
    if one["rejected"]:
        card += f'<small class="bad">{escape(one["rejected"]["reason"])}: {escape(one["rejected"]["detail"])}</small>'
    for segment in one["segments"]:
        state = "hidden" if segment["hidden"] else "" if segment["learned"] else "given, not learned"
        note = f"<small>{state}</small>" if state else ""
        if "note" in segment:
            shown = f'<small class="bad">{escape(segment["modality"])}: {escape(segment["note"])}</small>'
        elif "text" in segment:
            text, more = segment["text"], len(segment["text"]) - SHOWN_CHARACTERS
            shown = medium(
                {"text": f"{text[:SHOWN_CHARACTERS]}\n... and {more:,} more characters" if more > 0 else text}, folder
            )
        else:
            link = escape(quote(f"{media}/{segment['file']}" if media else segment["file"]))
            shown = medium(dict(segment), folder, link, least=120)
        card += f'<div class="segment{" away" * segment["hidden"]}">{note}{shown}</div>'
    return f'<div class="card">{card}</div>'
