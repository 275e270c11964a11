"""`pile search`: what of an index is nearest to a text, a picture or a sound."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "find texts, pictures and sounds of an index by a text, a picture or a sound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The page shows what was found; everything it shows is in the one file."
    parser.add_argument("index", help="folder or URL that `pile index-media` wrote")
    parser.add_argument("query", help="a text in quotes, or an image or sound file")
    parser.add_argument("--to", choices=("text", "image", "audio"), help="find only these")
    parser.add_argument("--count", type=int, default=10, help="how many")
    parser.add_argument("--exact", action="store_true", help="compare all, even where a large index has a faster way")
    parser.add_argument("--run", type=Path, help="folder of the run that made the index (default: where it was then)")
    parser.add_argument("--checkpoint", default="best", help="last, best, previous, or a file")
    parser.add_argument("--device", default="cpu", help="that the model computes on: cpu, cuda ...")
    parser.add_argument("--page", type=Path, default=Path("search.html"), help="file to write the page to")


def run(options: argparse.Namespace) -> None:
    from pile_app.documents import Document
    from pile_app.tasks.embed import Embedder
    from pile_app.tasks.media_index import MediaIndex, run_of_index
    from pile_app.tasks.search_page import format_hits, read_query, write_search_page

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, not {options.count}")
    query = read_query(options.query)
    embedder = Embedder.of_run(options.run or Path(run_of_index(options.index)), options.checkpoint, options.device)
    index = MediaIndex(options.index, embedder)
    hits = index.search(embedder.documents([Document((query,))])[0], options.count, options.to, options.exact)
    print(format_hits(hits))
    write_search_page(options.page, options.query, query, hits, len(index))
    print(f"open {options.page}")
