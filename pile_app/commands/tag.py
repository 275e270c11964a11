"""`pile tag`: texts to their named entities."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pile_app.documents import Document

SUMMARY = "find the named entities of texts, by a run that was trained to tag"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "FILE is a text, each line of which is read by itself, or what `pile prepare --kind entities` reads (CoNLL, tagged "
        "JSON lines, Parquet): then its own words are tagged. inline: [Paris|location]; json: a line a text, start and end in "
        "characters; html: a page."
    )
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="file of texts")
    parser.add_argument("--text", action="append", default=[], help="a text; may stand several times")
    parser.add_argument("--format", choices=("inline", "json", "html"), default="inline", help="how to write them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: to the terminal)")
    parser.add_argument("--checkpoint", default="best", help="last, best, previous, or a file")


def run(options: argparse.Namespace) -> None:
    import json

    import torch

    from pile_app.documents import Document, Segment
    from pile_app.tasks.tag_texts import as_inline, as_page, as_record, tag_documents
    from pile_app.training.load import load_run

    documents = [Document((Segment(text),)) for text in options.text if text]
    documents += read_documents(options.file) if options.file is not None else []
    if not documents:
        raise ValueError("there is nothing to tag: give a FILE, or --text")
    module, data, _ = load_run(options.run, options.checkpoint)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    tagged = tag_documents(module, documents, data.context)
    if options.format == "html":
        written = as_page(tagged, module.objective.types, f"{options.run.name}: {options.file or 'entities'}")  # type: ignore[union-attr, arg-type]
    else:
        lines = map(as_inline, tagged) if options.format == "inline" else (
            json.dumps(as_record(one), ensure_ascii=False) for one in tagged
        )  # fmt: skip
        written = "".join(line + "\n" for line in lines)
    if options.output is None:
        sys.stdout.write(written)
    else:
        options.output.write_text(written, encoding="utf-8")
        print(options.output)


def read_documents(path: Path) -> Iterator[Document]:
    """Read the documents of a file, or each line of a text; what cannot be used is named on stderr."""
    from pile_app.documents import BadSample, Document, Segment
    from pile_app.prepare import listing, readers

    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    if listing.FORMATS.get(listing.extension(path.name)) not in ("conll", "json", "parquet"):
        yield from (Document((Segment(line),)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        return
    for where, document in readers.read_documents(path):
        if isinstance(document, BadSample):
            print(f"{where} is rejected, {document}", file=sys.stderr)
        elif document.segments[0].text.strip():
            yield document
