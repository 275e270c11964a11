"""Files that come with the package: `conf/` and the recipes of `data/`, of the clone or, in a wheel, in `pile_app/bundled/`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
BUNDLED = HERE / "bundled" if (HERE / "bundled").is_dir() else HERE.parent
GROUPS = ("", "tasks", "sizes")  # folders of conf/


def find_config(name: str) -> Path:
    """Find a configuration by its path, or by its name in `conf/`: text_only, tasks/chat, chat. Raises ValueError."""
    stem = name.removesuffix(".yaml").removeprefix("conf/")
    folders = [folder / "conf" / group for folder in (Path(), BUNDLED) for group in GROUPS]
    found = next((file for file in (Path(name), *(folder / f"{stem}.yaml" for folder in folders)) if file.is_file()), None)
    if found is None:
        there = sorted(str(one.relative_to(BUNDLED / "conf").with_suffix("")) for one in (BUNDLED / "conf").rglob("*.yaml"))
        raise ValueError(f"there is no configuration {name!r}; give a file, or choose from {', '.join(there)}")
    return found


def find_configs(settings: Sequence[str]) -> list[str]:
    """Replace the names of configurations after `--config` by their paths."""
    words = list(settings)
    for number, word in enumerate(words):
        if word.startswith("--config="):
            words[number] = f"--config={find_config(word.removeprefix('--config='))}"
        elif number and settings[number - 1] == "--config":
            words[number] = str(find_config(word))
    return words


def copy_recipe(recipe: str) -> None:
    """Copy the recipes of the package, which use each other, into the working folder if it has no `recipe`, e.g.
    `data/digits/prepare.py`."""
    path = Path(recipe)
    if path.is_absolute() or path.parts[:1] != ("data",) or not (BUNDLED / path).is_file():
        return
    for file in (found.relative_to(BUNDLED) for found in sorted((BUNDLED / "data").rglob("*.py"))):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(BUNDLED / file, file)
    print(f"copied the recipe {recipe} from the package", flush=True)
