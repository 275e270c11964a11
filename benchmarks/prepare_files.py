"""Prepare 20,000 small pictures with `pile prepare` in one process (decode, split, write shards and a manifest), and only
read them with `datasets` (imagefolder, undecoded, bytes of each file). Prints both rates and their ratio; the bar is 0.5.

    python benchmarks/prepare_files.py --files 20000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np


def write_files(folder: Path, count: int) -> None:
    from pile_app.documents import Segment

    pictures = [Segment.from_image(np.full((8, 8, 3), number, np.uint8)).file for number in range(256)]
    for number in range(count):
        path = folder / f"class{number % 20:02d}" / f"{number:06d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pictures[number % 256])


def prepare_with_pile(folder: Path, output: Path) -> int:
    from pile_app.prepare.pipeline import prepare

    return prepare(folder, output, processes=1, exact_duplicates=False).documents


def read_with_datasets(folder: Path, cache: Path) -> int:
    import datasets

    data = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))
    data = data.cast_column("image", datasets.Image(decode=False))
    return sum(bool(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()) for row in data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="pile prepare against datasets, small files")
    parser.add_argument("--files", type=int, default=20_000)
    count = parser.parse_args().files
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        folder.mkdir()
        write_files(folder, count)
        import datasets  # noqa: F401 (not part of the time)

        rates = {}
        programs = {
            "pile": partial(prepare_with_pile, output=Path(temporary, "shards")),
            "datasets": partial(read_with_datasets, cache=Path(temporary, "cache")),
        }
        for name, program in programs.items():
            start = time.perf_counter()
            assert program(folder) == count
            rates[name] = count / (time.perf_counter() - start)
    ratio = rates["pile"] / rates["datasets"]
    print(f"pile {rates['pile']:,.0f}/s, datasets {rates['datasets']:,.0f}/s, ratio {ratio:.2f} (bar: 0.5)")
