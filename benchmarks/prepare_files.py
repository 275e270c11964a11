"""`pile prepare` of many small pictures in one process, against `datasets` that only reads them: at least half as fast.

    python benchmarks/prepare_files.py [--files 20000]

Pile decodes, splits, and writes shards and a manifest; `datasets` (imagefolder, undecoded) reads the bytes of each file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from common import command, table


def main(files: int = 20_000) -> bool:
    import datasets

    from pile_app.documents import Segment
    from pile_app.prepare.pipeline import prepare

    pictures = [Segment.from_image(np.full((8, 8, 3), grey, np.uint8)).file for grey in range(256)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        for n in range(files):
            path = folder / f"class{n % 20:02d}" / f"{n:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pictures[n % 256])

        def read_with_datasets() -> int:
            data = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=f"{temporary}/cache")
            data = data.cast_column("image", datasets.Image(decode=False))
            return sum(bool(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()) for row in data)

        programs = {
            "pile": lambda: prepare(folder, Path(temporary, "shards"), processes=1, exact_duplicates=False).documents,
            "datasets": read_with_datasets,
        }
        rates = {}
        for name, program in programs.items():
            began = time.perf_counter()
            assert program() == files
            rates[name] = files / (time.perf_counter() - began)
    ratio = rates["pile"] / rates["datasets"]
    table(["", "documents/s"], [*((name, f"{rate:,.0f}") for name, rate in rates.items()), ("ratio, bar 0.5", f"{ratio:.2f}")])
    return ratio >= 0.5


if __name__ == "__main__":
    command(main, __doc__)
