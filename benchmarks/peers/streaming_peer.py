"""mosaicml-streaming: MDS shards, StreamingDataset with shuffle (py1e), StreamingDataLoader.

https://docs.mosaicml.com/projects/streaming, API of `StreamingDataset` (`batch_size` given to it too, py1e is the default) and
"Fast resumption" (`state_dict` of the loader). Local shards of 64 MB without compression. Tokens are rows of
`ndarray:uint16:4096`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streaming
from contest import BATCH_OF, CONTEXT, DATA_OF, batch_maker, main, samples_of, shards, token_rows


def prepare(folder: Path) -> None:
    for data in ("text", "image", "ogg", "flac", "tokens"):
        out = folder / "mds" / data
        if (out / "index.json").exists():
            continue
        kind = f"ndarray:uint16:{CONTEXT}" if data == "tokens" else "bytes"
        with streaming.MDSWriter(out=str(out), columns={"file": kind}, size_limit=64 << 20) as writer:
            if data == "tokens":
                for row in token_rows(folder):
                    writer.write({"file": row})
            else:
                for path in shards(folder, data):
                    for file in samples_of(path):
                        writer.write({"file": file})


def open_loader(figure: str, folder: Path, fraction: float = 0, state: Any = None) -> streaming.StreamingDataLoader:
    streaming.base.util.clean_stale_shared_memory()
    make = batch_maker(figure, folder)

    def collate(samples: Sequence[dict[str, Any]]) -> Any:
        return make([sample["file"] for sample in samples])

    dataset = streaming.StreamingDataset(
        local=str(folder / "mds" / DATA_OF[figure]), shuffle=True, batch_size=BATCH_OF[figure], num_canonical_nodes=1
    )
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=BATCH_OF[figure], num_workers=1, collate_fn=collate, persistent_workers=True, drop_last=True
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def save(loader: streaming.StreamingDataLoader) -> Any:
    return loader.state_dict()


if __name__ == "__main__":
    main(open_loader, prepare, save)
