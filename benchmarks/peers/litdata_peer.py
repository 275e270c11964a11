"""litdata: chunks of raw items, StreamingDataset with shuffle, StreamingDataLoader.

https://lightning.ai/docs/litdata/features/llm-pre-training (`optimize`, `TokensLoader(block_size)`) and the docstrings of
`StreamingDataset` and `StreamingDataLoader` in 0.2.76: `batch_decode` and `item_shuffle_window` are left at "auto", the state
is the loader's `state_dict`. Chunks of 64 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch
from contest import BATCH_OF, CONTEXT, DATA_OF, batch_maker, main, samples_of, shards, token_rows


def prepare(folder: Path) -> None:
    for data in ("text", "image", "ogg", "flac"):
        out = folder / "litdata" / data
        if not (out / "index.json").exists():
            litdata.optimize(samples_of, shards(folder, data), str(out), chunk_bytes="64MB", num_workers=1, verbose=False)
    out = folder / "litdata" / "tokens"
    if not (out / "index.json").exists():
        litdata.optimize(
            partial(_tokens, folder), [0], str(out), chunk_size=CONTEXT * 4096, num_workers=1, verbose=False,
            item_loader=litdata.TokensLoader(block_size=CONTEXT),
        )  # fmt: skip


def _tokens(folder: Path, _: int) -> Iterator[torch.Tensor]:
    for row in token_rows(folder):
        yield torch.from_numpy(row)


def open_loader(figure: str, folder: Path, fraction: float = 0, state: Any = None) -> litdata.StreamingDataLoader:
    data = DATA_OF[figure]
    dataset = litdata.StreamingDataset(
        str(folder / "litdata" / data), shuffle=True, drop_last=True,
        item_loader=litdata.TokensLoader(block_size=CONTEXT) if data == "tokens" else None,
    )  # fmt: skip
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH_OF[figure], num_workers=1, collate_fn=batch_maker(figure, folder), persistent_workers=True
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def save(loader: litdata.StreamingDataLoader) -> Any:
    return loader.state_dict()


if __name__ == "__main__":
    main(open_loader, prepare, save)
