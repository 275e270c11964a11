"""`pile index-media`: documents to an index that `pile search` looks into."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pile_app.documents import Document

SUMMARY = "embed documents of any modality into an index, to search it with pile search"
DOCUMENTS_AT_ONCE = 512

Found = Iterator[tuple["Document", str] | str]  # a document and its shard or file, or the reason of one that cannot be used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Run it again to add to an index: a document whose key is there already replaces it."
    parser.add_argument("run", type=Path, help="folder of a run that was trained to embed (conf/tasks/retrieval.yaml)")
    parser.add_argument(
        "input", nargs="+", help="shards (quoted patterns), folders of shards, or folders of files that `pile prepare` reads"
    )
    parser.add_argument("--output", required=True, help="folder or URL (s3://...) of the index; new, or made by the same model")
    parser.add_argument("--checkpoint", default="best", help="last, best, previous, or a file")
    parser.add_argument("--device", default="cpu", help="that the model computes on: cpu, cuda ...")


def run(options: argparse.Namespace) -> None:
    from itertools import chain, islice

    from pile_app.tasks.embed import Embedder
    from pile_app.tasks.media_index import MediaIndex

    embedder = Embedder.of_run(options.run, options.checkpoint, options.device)
    index = MediaIndex(options.output, embedder, is_new=True, run=str(options.run.resolve()))
    documents, rows, replaced, left = 0, 0, 0, Counter[str]()
    found = chain.from_iterable(map(read_documents, options.input))
    while some := list(islice(found, DOCUMENTS_AT_ONCE)):
        usable = [one for one in some if not isinstance(one, str)]
        left.update(one for one in some if isinstance(one, str))
        if not usable:
            continue
        added, went, bad = index.add(usable)
        documents, rows, replaced = documents + len(usable), rows + added, replaced + went
        left.update(one.reason for one in bad)
        print(f"{documents:,} documents, {rows:,} segments", flush=True)
    told = ", ".join(f"{count:,} {reason}" for reason, count in left.most_common()) or "nothing"
    print(f"{options.output}: {len(index):,} segments; {replaced:,} of them, or of earlier ones, replaced; left out: {told}")
    recall = index.finish()
    print(
        "searched exactly: all are compared"
        if recall is None
        else f"searched approximately: {100 * recall:.1f} % of the exact ten nearest are found"
    )


def read_documents(path: str) -> Found:
    """Of shards, or of a folder: its shards where it holds any, else whatever `pile prepare` would read of it."""
    from pile_app.commands.index import open_shards
    from pile_app.documents import BadSample

    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        yield from _read_folder(folder)
        return
    shards = open_shards(f"{path}/*.tar" if folder.is_dir() else path)
    yield from shards.balance()["rejected"].elements()
    for number in range(len(shards)):
        try:
            yield shards.document(number), shards.paths[shards.place(number)[0]]
        except BadSample as error:
            yield error.reason


def _read_folder(folder: Path) -> Found:
    from dataclasses import replace

    from pile_app.documents import BadSample
    from pile_app.prepare import readers

    for file, document in readers.read_documents(folder.resolve()):
        yield (
            document.reason if isinstance(document, BadSample) else (replace(document, key=file), str(folder.resolve() / file))
        )
