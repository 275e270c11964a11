"""The bar of the media figures: the same files from memory, the same decoder, no loader, one process.

With DECODE_IN_WORKER=1 the same in a worker of a plain `DataLoader`: what any loader on it can reach at best.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from contest import BATCH_OF, DATA_OF, batch_maker, main, samples_of, shards
from torch.utils.data import DataLoader, IterableDataset


class DecodedBatches(IterableDataset[Any]):
    """Endless, over at most 3,000 files, which is all that differ."""

    def __init__(self, figure: str, folder: Path) -> None:
        self.files = list(islice((file for path in shards(folder, DATA_OF[figure]) for file in samples_of(path)), 3000))
        self.make, self.size = batch_maker(figure, folder), BATCH_OF[figure]

    def __iter__(self) -> Iterator[Any]:
        while True:
            for first in range(0, len(self.files) - self.size + 1, self.size):
                yield self.make(self.files[first : first + self.size])


def prepare(folder: Path) -> None:
    pass


def open_loader(figure: str, folder: Path) -> Iterable[Any]:
    batches = DecodedBatches(figure, folder)
    return DataLoader(batches, batch_size=None, num_workers=1) if os.environ.get("DECODE_IN_WORKER") == "1" else batches


if __name__ == "__main__":
    main(open_loader, prepare)
