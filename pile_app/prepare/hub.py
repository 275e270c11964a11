"""Data sets of the Hugging Face hub: download remote inputs, and read from data set cards which files are which split.

`datasets` resolves the files, splits and features of a card, for a folder as for the hub. `tables.py` reads the rows and leaves
media undecoded, because `datasets` gives up on a whole file where one row is bad."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Any, NamedTuple

from pile_app.prepare.layouts import named_split
from pile_app.prepare.options import require


class Card(NamedTuple):
    """A data set card. splits: file -> split, of all files that are read; classes: column -> names of its classes."""

    splits: dict[str, str | None] = {}  # noqa: RUF012
    classes: dict[str, list[str]] = {}  # noqa: RUF012


def localize(input: str, work: str) -> str:
    """Download a data set of the hub (`[hf://datasets/]owner/name[/path]`) or an address of fsspec below `work`, once; return
    its path. A local path is returned unchanged. Raises ValueError: the data set cannot be fetched."""
    path, _, config = input.partition("#")
    hub = re.fullmatch(r"(?:hf://datasets/)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(/.*)?", path)
    if os.path.exists(path) or not (hub or "://" in path):
        return input
    target = os.path.join(work, "download")
    try:
        if hub:
            name, revision, inner = hub.groups()
            fetch = require("huggingface_hub", "prepare", "reading from the hub").snapshot_download
            patterns = [inner.strip("/"), f"{inner.strip('/')}/*"] if inner else None
            fetch(name, repo_type="dataset", revision=revision, local_dir=target, allow_patterns=patterns)
        else:
            import fsspec

            system, inner = fsspec.core.url_to_fs(path)
            target = os.path.join(target, os.path.basename(inner.rstrip("/")))
            if not os.path.exists(target):
                system.get(inner, f"{target}.partial", recursive=system.isdir(inner))
                os.rename(f"{target}.partial", target)
    except ValueError:
        raise
    except Exception as error:  # of any file system
        raise ValueError(
            f"input {input!r} is not here, and cannot be fetched: {type(error).__name__}: {error}"[:400]
        ) from error
    return f"{target}#{config}" if config else target


def read_card(root: str, config: str = "") -> Card:
    """Read the card of a folder in the hub's layout, whose README.md names configurations or features; else an empty one.
    Raises ValueError: there are several configurations, and none is the default or asked for."""
    head = ""
    with suppress(OSError), open(os.path.join(root, "README.md"), encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 20)
    if not re.match(r"---\s*\n(?:.*\n)*?(configs|dataset_info):", head):
        return Card()
    datasets = require("datasets", "prepare", "reading data set cards")
    try:
        builder = datasets.load_dataset_builder(root, config or None)
        found: Any = builder.config.data_files or {}
    except Exception as error:
        if isinstance(error, ValueError) and "Config name is missing" in str(error):
            names = datasets.get_dataset_config_names(root)
            raise ValueError(f"{root!r} has several configurations: {', '.join(names)}; e.g. {root}#{names[0]}") from error
        return Card()  # a card that `datasets` cannot use; the files say what they are
    splits = {os.path.relpath(path, root): named_split(str(split)) or str(split) for split in found for path in found[split]}
    features = {name: getattr(about, "feature", about) for name, about in (builder.info.features or {}).items()}
    return Card({**splits}, {name: list(about.names) for name, about in features.items() if hasattr(about, "names")})
