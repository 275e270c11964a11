"""Read 20,000 small files as `pile prepare` does (list, read units, bytes of each file), and with `datasets` (imagefolder,
undecoded, bytes of each file). Prints both rates in documents/s and their ratio; the bar is 0.5.

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


def read_with_pile(folder: Path) -> int:
    from pile_app.fields import Fields
    from pile_app.prepare.options import Options
    from pile_app.prepare.readers import list_units, medium, read_unit

    options, fields, total = Options(), Fields.parse("[png, {label: label}]"), 0
    for unit in list_units(str(folder), options):
        for record in read_unit(str(folder), unit, options):
            document = fields.read(record.where, record.content, partial(medium, str(folder), record.where)).document  # type: ignore[arg-type]
            total += bool(document.segments[0].file)
    return total


def read_with_datasets(folder: Path, cache: Path) -> int:
    import datasets

    data = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))
    data = data.cast_column("image", datasets.Image(decode=False))
    return sum(bool(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()) for row in data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="pile prepare's reading against datasets, small files")
    parser.add_argument("--files", type=int, default=20_000)
    count = parser.parse_args().files
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        folder.mkdir()
        write_files(folder, count)
        rates = {}
        for name, read in (("pile", read_with_pile), ("datasets", partial(read_with_datasets, cache=Path(temporary, "cache")))):
            start = time.perf_counter()
            assert read(folder) == count
            rates[name] = count / (time.perf_counter() - start)
    ratio = rates["pile"] / rates["datasets"]
    print(f"pile {rates['pile']:,.0f}/s, datasets {rates['datasets']:,.0f}/s, ratio {ratio:.2f} (bar: 0.5)")
