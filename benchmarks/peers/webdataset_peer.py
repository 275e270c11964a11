"""webdataset: sequential tars, shards shuffled, samples shuffled in a buffer, batches made in the worker.

https://webdataset.github.io/webdataset/sharding/ (shuffle the shards, then a buffer) and
https://github.com/tmbdev/wds-distributed (batches in the worker and `WebLoader(batch_size=None)`, since sending single samples
is slow; `repeat` in place of epochs). It keeps no state: one resumes by skipping what was seen, here before anything is
decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from contest import BATCH_OF, DATA_OF, EXTENSION_OF, SHUFFLE_BUFFER, batch_maker, main, shards


def prepare(folder: Path) -> None:
    """Reads the tars as they are."""


def open_loader(figure: str, folder: Path, fraction: float = 0, state: None = None) -> Iterable[Any]:
    if figure == "text_tokens":
        raise SystemExit("webdataset has no format for tokens")
    extension, make = EXTENSION_OF[DATA_OF[figure]], batch_maker(figure, folder)
    paths = shards(folder, DATA_OF[figure])
    dataset = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0, empty_check=False).shuffle(SHUFFLE_BUFFER)
    if fraction:
        skipped = int(fraction * images_of(folder))
        dataset = dataset.compose(lambda samples: islice(samples, skipped, None))
    dataset = dataset.batched(
        BATCH_OF[figure], collation_fn=lambda samples: make([sample[extension] for sample in samples]), partial=False
    )
    return webdataset.WebLoader(dataset if fraction else dataset.repeat(), batch_size=None, num_workers=1)


def images_of(folder: Path) -> int:
    import json

    return json.loads((folder / "facts.json").read_text())["image"]


def save(loader: Any) -> Iterator[Any]:
    raise SystemExit("webdataset keeps no state")


if __name__ == "__main__":
    main(open_loader, prepare, save)
