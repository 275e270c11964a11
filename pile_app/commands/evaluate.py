"""`pile evaluate`: a run's checkpoint on any shards, or on tasks of EleutherAI's harness."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "measure a run on shards: perplexity, bits a byte, accuracy, codecs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--on",
        action="append",
        default=[],
        metavar="NAME=SHARDS",
        help="shards (a quoted pattern, or URLs) and their name; may stand several times (default: what the run validates on)",
    )
    parser.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of lm-eval to evaluate on instead (extra lm-eval)")
    parser.add_argument("--include", type=Path, metavar="FOLDER", help="of YAML files of own tasks; only those are known then")
    parser.add_argument("--fewshot", type=int, help="solved examples before each question (default: as each task says)")
    parser.add_argument("--limit", type=int, help="most documents of each task")
    parser.add_argument(
        "--checkpoint", help="last, best, previous, or a file (default: best for a run with an objective, else last)"
    )
    parser.add_argument("--output", type=Path, help="file for the figures (default: RUN/evaluation.json)")


def run(options: argparse.Namespace) -> None:
    on = parse_sources(options.on)
    if options.tasks is not None:
        if on:
            raise ValueError("give --on or --tasks, not both")
        from pile_app.tasks.harness import evaluate_tasks, print_tasks

        tasks = options.tasks.split(",")
        file = options.output or options.run / "evaluation-tasks.json"
        print_tasks(
            evaluate_tasks(options.run, tasks, options.include, options.fewshot, options.limit, options.checkpoint, file)
        )
        print(f"saved in {file}")
        return
    if options.include is not None or options.fewshot is not None or options.limit is not None:
        raise ValueError("--include, --fewshot and --limit belong to --tasks")
    from pile_app.tasks.evaluate import evaluate, print_tables

    print_tables(evaluate(options.run, on, options.checkpoint, options.output))
    print(f"saved in {options.output or options.run / 'evaluation.json'}")


def parse_sources(given: list[str]) -> dict[str, str]:
    """Name -> pattern.

    Raises:
        ValueError: one is not NAME=SHARDS, or a name stands there twice.
    """
    sources: dict[str, str] = {}
    for one in given:
        name, equals, pattern = one.partition("=")
        if not (name and equals and pattern) or "/" in name:
            raise ValueError(f"--on {one!r} is not NAME=SHARDS, e.g. --on 'books=shards/books-*.tar'")
        if name in sources:
            raise ValueError(f"--on names {name!r} twice: give each set of shards a name of its own")
        sources[name] = pattern
    return sources
