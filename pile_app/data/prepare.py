"""Own data to shards: the engine of `pile prepare`.

    files ──► readers ──► documents ──► clean, check, drop duplicates ──► <source>-train-*.tar, <source>-validation-*.tar

What is read, and how it becomes documents, is in `readers.py`.

Media are decoded once to check them and stored as the files they came as. What cannot be used is counted by reason and listed
in `rejected.jsonl`. A document goes to training or validation by the hash of its content (of its media, where it has any), so
it stays on its side whatever is added later. Documents stream: memory does not grow with the data. The same input gives the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pile_app.data.readers import DigestSet, Kind, Options, read_files
from pile_app.data.shards import ShardWriter
from pile_app.data.text import clean_text
from pile_app.documents import (
    AUDIO,
    IMAGE,
    TEXT,
    BadSample,
    Document,
    Segment,
    audio_size,
    decode_audio,
    decode_image,
    image_size,
)

SPLITS = ("train", "validation")


@dataclass
class Tally:
    """What one split of one source holds."""

    documents: int = 0
    text_bytes: int = 0
    images: int = 0
    audio_seconds: float = 0.0

    def add(self, document: Document) -> None:
        self.documents += 1
        for segment in document.segments:
            if segment.modality == TEXT:
                self.text_bytes += len(segment.text.encode())
            elif segment.modality == IMAGE:
                self.images += 1
            else:
                samples, rate = audio_size(segment.file)
                self.audio_seconds += samples / rate


@dataclass
class Summary:
    """What `prepare` wrote: `sources[source][split]`, a split without documents is absent; `rejected[reason]`."""

    output: Path
    sources: dict[str, dict[str, Tally]] = field(default_factory=lambda: defaultdict(dict))
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def documents(self) -> int:
        return sum(tally.documents for splits in self.sources.values() for tally in splits.values())

    def shards(self, source: str) -> dict[str, str]:
        """Pattern of the shards of each split, relative to `output`."""
        return {split: f"{source}-{split}-*.tar" for split in SPLITS if split in self.sources[source]}

    def description(self) -> dict[str, Any]:
        """What `dataset.json` holds, but for the options."""
        sources = {
            source: {
                split: {"shards": pattern, **asdict(self.sources[source][split])}
                for split, pattern in self.shards(source).items()
            }
            for source in sorted(self.sources)
        }
        return {"pile_dataset": 1, "sources": sources, "rejected": dict(sorted(self.rejected.items()))}

    def yaml(self) -> str:
        """The `data.sources` of a configuration: every source that has documents to train on."""
        import yaml

        patterns = {source: self.shards(source) for source in sorted(self.sources)}
        sources = {
            source: {split: os.path.join(self.output, pattern) for split, pattern in splits.items()}
            for source, splits in patterns.items()
            if "train" in splits
        }
        description = {"data": {"sources": sources}}
        return yaml.safe_dump(description, default_flow_style=None, sort_keys=False, allow_unicode=True, width=10_000).rstrip()


def prepare(
    input: Path,
    output: Path,
    *,
    kind: Kind = "auto",
    validation_share: float = 0.01,
    seed: int = 0,
    clean: bool = True,
    shard_megabytes: float = 64,
    max_audio_seconds: float = 30.0,
    caption_from_folder: bool = False,
    document_bytes: int = 1 << 20,
    overwrite: bool = False,
) -> Summary:
    """Reads the file or folder `input` and writes shards, `dataset.json` and `rejected.jsonl` to the folder `output`.

    The folder appears when it is whole. A summary goes to stderr, the sources ready to paste into a configuration to stdout.

    Args:
        validation_share: expected share of documents for validation, 0 or more and below 1.
        seed: of the hash that splits training from validation.
        clean: run `clean_text` on every text.
        max_audio_seconds: longer sounds are rejected.
        caption_from_folder: media without caption get the name of their folder as caption (class folders).
        document_bytes: a longer text file is cut into several documents (reading one costs its whole length, whatever is used).
        overwrite: replace an earlier result in `output`.

    Raises:
        ValueError: an argument is out of its bounds, `output` is in use, or `input` holds nothing usable.
    """
    input, output = Path(input), Path(output)
    options = Options(
        kind, validation_share, seed, clean, shard_megabytes, max_audio_seconds, caption_from_folder, document_bytes
    )
    _check_folders(input, output, overwrite)
    summary = Summary(output)
    writers: dict[tuple[str, str], ShardWriter] = {}
    root = input if input.is_dir() else input.parent
    name = input.resolve().name
    default_source = _slug(name if input.is_dir() else name.split(".", 1)[0]) or "data"
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        with (
            open(temporary / "rejected.jsonl", "w", encoding="utf-8") as rejections,
            DigestSet(temporary / "seen.sqlite") as seen,
            _progress() as advance,
        ):
            for found in read_files(input, options, seen):
                file = os.fsencode(os.path.relpath(found.file, root)).decode(errors="replace")
                source = default_source
                try:
                    if isinstance(found.content, BadSample):
                        raise found.content
                    source = _slug(str(found.content.meta.get("pile_set_name", ""))) or default_source
                    document = replace(found.content, meta={"file": file} | dict(found.content.meta))
                    document = _clean(document) if options.clean else document
                    check(document, options.max_audio_seconds)
                    if not seen.add(_digest(document.segments, seed)):
                        raise BadSample("duplicate", "a document of the same content was taken before")
                except BadSample as error:
                    summary.rejected[error.reason] += 1
                    detail = re.sub(
                        r"<_io\.BytesIO object at \w+>", "the file", error.detail
                    )  # an address differs in every run
                    line = {"source": source, "file": file, "reason": error.reason, "detail": detail}
                    rejections.write(json.dumps(line) + "\n")
                    continue
                split = _split(document, seed, validation_share)
                if (source, split) not in writers:
                    writers[source, split] = ShardWriter(temporary, f"{source}-{split}", int(shard_megabytes * 2**20))
                writers[source, split].write(document)
                summary.sources[source].setdefault(split, Tally()).add(document)
                advance()
        if not writers:
            raise ValueError(
                f"{str(input)!r} holds nothing usable for kind {kind!r}: looked for files *.{', *.'.join(options.extensions)}; "
                f"found {_counts(summary.rejected) or 'no file at all'}"
            )
        for writer in writers.values():
            writer.finish_shard()
        os.remove(temporary / "seen.sqlite")
        description = summary.description() | {"input": str(input), "options": asdict(options)}
        (temporary / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        _move_into_place(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _print_summary(summary)
    return summary


def check(document: Document, max_audio_seconds: float) -> None:
    """Decodes everything in a document once.

    Raises:
        BadSample: `invalid_utf8`, `empty_text`, or what `decode_image` and `decode_audio` raise.
    """
    texts = [segment.text for segment in document.segments if segment.modality == TEXT]
    if not all(text.strip() for text in texts):
        raise BadSample("empty_text", "the text is empty or only whitespace")
    try:
        json.dumps([texts, document.meta], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadSample("invalid_utf8", str(error)) from error
    for segment in document.segments:
        if segment.modality == IMAGE:
            decode_image(segment.file, 3, *image_size(segment.file))
        elif segment.modality == AUDIO:
            samples, rate = audio_size(segment.file)
            if samples / rate > max_audio_seconds:
                raise BadSample("audio_too_long", f"{samples / rate:,.1f} seconds; max_audio_seconds is {max_audio_seconds:g}")
            decode_audio(segment.file, rate)


def _slug(name: str) -> str:
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:64]


def _clean(document: Document) -> Document:
    segments = (replace(one, data=clean_text(one.text)) if one.modality == TEXT else one for one in document.segments)
    return replace(document, segments=tuple(segments))


def _digest(segments: Iterable[Segment], seed: int) -> bytes:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for segment in segments:
        data = segment.data.encode() if isinstance(segment.data, str) else segment.data
        digest.update(f":{segment.modality}:{len(data)}:".encode() + data)
    return digest.digest()


def _split(document: Document, seed: int, validation_share: float) -> str:
    """By the media where there are any: five captions of one image are five documents on one side."""
    media = [segment for segment in document.segments if segment.modality != TEXT]
    draw = int.from_bytes(_digest(media or document.segments, seed)[:8], "big") / 2**64
    return "validation" if draw < validation_share else "train"


def _check_folders(input: Path, output: Path, overwrite: bool) -> None:
    if not input.exists():
        raise ValueError(f"input {str(input)!r} does not exist (working folder {os.getcwd()})")
    inside, outside = output.resolve(), input.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise ValueError(f"output {str(output)!r} and input {str(input)!r} lie in each other; give an output folder elsewhere")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not _is_result(output):
            raise ValueError(f"output {str(output)!r} exists and is not the result of an earlier `pile prepare`; give another")
        if not overwrite:
            raise ValueError(
                f"output {str(output)!r} holds an earlier result; give another folder, or --overwrite (overwrite=True)"
            )


def _is_result(output: Path) -> bool:
    try:
        return "pile_dataset" in json.loads((output / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return False


def _move_into_place(temporary: Path, output: Path) -> None:
    earlier = output.parent / f".{output.name}.{os.getpid()}.old"
    if _is_result(output):
        os.replace(output, earlier)
    os.replace(temporary, output)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def _progress() -> Iterator[Callable[[], None]]:
    """A counter on stderr where somebody looks; yields the function that counts one document."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed:,} documents"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("prepare", total=None)
        yield lambda: progress.advance(task)


def _counts(rejected: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common())


def _print_summary(summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        "source", "split", *(Column(name, justify="right") for name in ("documents", "text bytes", "images", "hours"))
    )
    for source, splits in sorted(summary.sources.items()):
        for split in (split for split in SPLITS if split in splits):
            one = splits[split]
            figures = (f"{one.documents:,}", f"{one.text_bytes:,}", f"{one.images:,}", f"{one.audio_seconds / 3600:,.3f}")
            table.add_row(source, split, *figures)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    if summary.rejected:
        console.print(f"left out: {_counts(summary.rejected)}; see {summary.output / 'rejected.jsonl'}")
    for source, splits in sorted(summary.sources.items()):
        for split in set(SPLITS) - set(splits):
            console.print(f"{source} has no {split} documents: change validation_share, or cut text finer with document_bytes")
    print(summary.yaml())
