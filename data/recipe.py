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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pile_app.data.shards import write_shards
from pile_app.documents import Document


def finished(folder: Path, version: int, seed: int) -> dict[str, Any] | None:
    """The `dataset.json` of a folder that holds just what would be made, None where there is nothing yet.

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
    return found


def write_whole(
    folder: Path,
    sources: Mapping[str, Sequence[Document]],
    summary: Mapping[str, Any],
    progress: Callable[[str], None],
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the shards of every source, what `add` adds, and `dataset.json`, the summary, into a folder that is then renamed
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
    """Of Python and the packages that the bytes depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def timed(report: Callable[[str], None]) -> Callable[[str], None]:
    """Reports lines with the seconds since this was called before them."""
    start = time.perf_counter()
    return lambda line: report(f"[{time.perf_counter() - start:5.1f} s] {line}")


def recipe_command(
    prepare: Callable[[Path, int], dict[str, Any]],
    description: str | None,
    folder: Path,
    shown: Sequence[str],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a recipe; its exit code.

    Args:
        prepare: makes the shards in a folder, from a seed, and returns the content of their `dataset.json`.
        description: the recipe's docstring.
        folder: where shards go unless `--folder` says otherwise.
        shown: keys of `dataset.json` whose figures are printed at the end.
        arguments: None takes the command line's.
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
