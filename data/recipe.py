"""Shared by the recipes `data/*/prepare.py`: write a folder of shards atomically, with a description of how it was made."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pile_app.data.shards import write_shards
from pile_app.documents import Document

T = TypeVar("T")


def finished(folder: Path, version: int, seed: int, report: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Return the `dataset.json` of a folder that is complete, None if there is nothing yet.

    Raises:
        FileExistsError: the folder holds something else, or the data of another seed or version of the recipe.
    """
    description = folder / "dataset.json"
    if not description.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is in use by something else: it has no dataset.json. Name another --folder")
        return None
    found: dict[str, Any] = json.loads(description.read_text())
    if (found["version"], found["seed"]) != (version, seed):
        raise FileExistsError(
            f"{folder} holds recipe {found['version']}, seed {found['seed']}; asked for recipe {version}, seed {seed}. "
            "Remove it or name another --folder"
        )
    report(f"{folder} is complete already (recipe {version}, seed {seed}); nothing to do")
    return found


def deal(cards: Sequence[T], rng: np.random.Generator) -> Iterator[T]:
    """Yield all cards in a random order, then all in another order, without end."""
    while True:
        for card in rng.permutation(len(cards)).tolist():
            yield cards[card]


def counts(fractions: Mapping[Any, float], count: int) -> list[int]:
    """Split `count` into these fractions, rounded so that the sum is `count`."""
    return np.diff(np.rint(np.cumsum([0.0, *fractions.values()]) * count).astype(int)).tolist()


def write_whole(
    folder: Path,
    sources: Mapping[str, Sequence[Document]],
    summary: Mapping[str, Any],
    progress: Callable[[str], None],
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the shards of every source, the files of `add`, and `dataset.json`, the summary, into a folder that is then renamed
    to `folder`.

    Raises:
        RuntimeError: a sample cannot be read back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary, "shards")
        for prefix, documents in sources.items():
            balance = write_shards(documents, whole, prefix).balance()
            if balance["rejected"]:
                raise RuntimeError(f"the recipe wrote samples that cannot be read back: {balance['examples']}")
            progress(f"{prefix}: {len(documents):,} documents written")
        add(whole)
        (whole / "dataset.json").write_text(json.dumps(summary, indent=1) + "\n")
        os.replace(whole, folder)


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that the bytes depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def timed(report: Callable[[str], None]) -> Callable[[str], None]:
    """Report lines after the seconds since this call."""
    start = time.perf_counter()
    return lambda line: report(f"[{time.perf_counter() - start:5.1f} s] {line}")


def recipe_command(
    prepare: Callable[[Path, int], dict[str, Any]],
    description: str | None,
    folder: Path,
    shown: Sequence[str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run the command line of a recipe; returns its exit code.

    Args:
        prepare: makes the shards in a folder, from a seed, and returns the content of their `dataset.json`.
        description: the recipe's docstring.
        folder: the default of `--folder`.
        shown: keys of `dataset.json` whose figures are printed at the end.
        arguments: default: those of the command line.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=folder, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        summary = prepare(options.folder, options.seed)
    except (RuntimeError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in shown:
        print(f"{name:>12}  " + ", ".join(f"{key} {value:,}" for key, value in summary[name].items()))
    return 0
