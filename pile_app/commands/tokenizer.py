"""`pile tokenizer`: text to a tokenizer.json."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from pile_app.commands.index import open_shards

SUMMARY = "train a tokenizer on the texts of shards, or of a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="shards (a quoted pattern *.tar), or a text file, or a folder of text files")
    parser.add_argument("output", type=Path, help="the tokenizer.json to write")
    parser.add_argument("--kind", choices=("bpe", "words"), required=True, help="byte-level BPE, or whole words")
    parser.add_argument("--size", type=int, required=True, help="most tokens")


def run(options: argparse.Namespace) -> None:
    from pile_app.data.tokenizers import load_tokenizer, train_tokenizer

    texts = _texts_of_shards(options.input) if options.input.endswith(".tar") else _texts_of_files(options.input)
    first = next(texts, None)
    if first is None:
        raise ValueError(f"{options.input!r} holds no text: give shards ('shards/*.tar'), or a folder of text files")
    train_tokenizer(chain([first], texts), options.kind, options.size, options.output)
    tokenizer = load_tokenizer(str(options.output))
    print(f"{options.output}: {tokenizer.size:,} tokens; train with --model.tokenizer {options.output}")


def _texts_of_shards(pattern: str) -> Iterator[str]:
    from pile_app.documents import TEXT

    for document in open_shards(pattern):
        yield from (segment.text for segment in document.segments if segment.modality == TEXT)


def _texts_of_files(path: str) -> Iterator[str]:
    from pile_app.data.tokenizers import clean_text
    from pile_app.documents import TEXT, Document
    from pile_app.prepare.options import Options
    from pile_app.prepare.readers import read_documents

    for _, document in read_documents(path, Options(kind="text")):
        if isinstance(document, Document):
            yield from (clean_text(segment.text) for segment in document.segments if segment.modality == TEXT)
