"""`pile inspect`: what data hold, and what a run was trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "show what data hold, or what a run was trained on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="for statistics of data: folders of `pile prepare`, shards (folder or quoted pattern), a run or a configuration; "
        "for a step or positions: the folder of the run",
    )
    parser.add_argument("--step", type=int, help="show what a run was trained on in this optimizer step, counted from 1")
    parser.add_argument("--position", metavar="P[:Q]", help="show the packs at positions P up to Q (without Q) of a run")
    parser.add_argument("--output", type=Path, help="folder for what is found (default: inspect/ beside what is inspected)")
    parser.add_argument("--limit", type=int, help="show at most so many documents (default: all; of data 8 a source)")
    parser.add_argument("--duplicates", action="store_true", help="read all shards, to count what is there more than once")
    parser.add_argument("--tokenizer", help="bytes or a tokenizer.json to count with (default: that of the run, or bytes)")
    parser.add_argument("--context", type=int, help="tokens of a pack (default: those of the run, or 512)")


def run(options: argparse.Namespace) -> None:
    if options.step is None and options.position is None:
        inspect_shards(options)
        return
    from pile_app.tasks.inspect_step import inspect_training, parse_positions

    if options.step is not None and options.position is not None:
        raise ValueError("give --step or --position, not both")
    if len(options.paths) > 1 or options.duplicates or options.tokenizer or options.context:
        raise ValueError("--step and --position take one run, and neither --duplicates, --tokenizer nor --context")
    run = Path(options.paths[0])
    if options.step is not None:
        asked, name = options.step, f"step-{options.step}"
    else:
        first, stop = asked = parse_positions(options.position)
        name = f"position-{first}" if stop == first + 1 else f"positions-{first}-{stop - 1}"
    folder = options.output or run / "inspect" / name
    print(inspect_training(run, asked, folder, options.limit))
    print(f"saved in {folder}: open {folder / 'documents.html'}")


def inspect_shards(options: argparse.Namespace) -> None:
    from pile_app.tasks.inspect_data import inspect_data
    from pile_app.tasks.inspect_tables import format_statistics

    first = Path(options.paths[0])
    inside = (first / "config.yaml", first / "inspect" / "data"), (first / "dataset.json", first / "inspect")
    folder = options.output or next((folder for file, folder in inside if file.is_file()), Path("inspect"))
    samples = 8 if options.limit is None else options.limit
    description = inspect_data(options.paths, folder, options.tokenizer, options.context, options.duplicates, samples)
    print(format_statistics(description))
    print(f"saved in {folder}: open {folder / 'lengths.png'} and {folder / 'documents.html'}")
