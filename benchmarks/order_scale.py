"""Memory and start-up time of the order of the training data, by number of documents.

    python benchmarks/order_scale.py [--documents 10000 1000000 10000000] [--folder /tmp/pile-order]

Writes synthetic indexes (10,000 documents a shard, log-normal lengths of median 400 bytes; the tars are holes: nothing of
them is read), then starts a process for each figure: `first` makes the table of the order, with all cores; `again` finds it in
the cache, as every later start, rank and worker does; `at 0 %` and `at 90 %` of an epoch plan 64 packs from there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHARD = 10_000  # documents
CONTEXT = 4096


def write_indexes(folder: Path, documents: int) -> None:
    from pile_app.data.index import TYPES, ShardIndex, fingerprint
    from pile_app.data.manifest import SUFFIX, save_manifest
    from pile_app.fields import OWN

    folder.mkdir(parents=True)
    indexes = []
    for number in range(documents // SHARD):
        rng = np.random.default_rng(number)
        lengths = np.exp(rng.normal(np.log(400), 1.0, SHARD)).clip(1, 100_000).astype("<u8")
        keys = [f"{number:06d}-{n:06d}" for n in range(SHARD)]
        sizes = 512 + -(-lengths.astype(np.int64) // 512) * 512
        path = folder / f"text-{number:06d}.tar"
        with open(path, "wb") as file:
            file.truncate(int(sizes.sum()) + 1024)
        columns = {
            "offset": np.concatenate([[0], np.cumsum(sizes)[:-1]]), "size": sizes, "crc": rng.integers(0, 1 << 32, SHARD),
            "segments": np.ones(SHARD), "segment_size": lengths, "loss": np.ones(SHARD), "break_bytes": [],
            "key_bytes": np.frombuffer("".join(keys).encode(), np.uint8), "key_size": np.full(SHARD, len(keys[0])),
        }  # fmt: skip
        arrays = {name: np.asarray(columns.get(name, np.zeros(SHARD))).astype(kind) for name, kind in TYPES.items()}
        about = {"name": path.name, "size": os.path.getsize(path), "read": SHARD, "rejected": {}, "unused": {}, "dropped": {}}
        about |= {
            "fingerprint": fingerprint(about["size"], arrays),
            "tokens": {},
            "rows": [SHARD, SHARD, 0, sum(map(len, keys))],
        }
        indexes.append(ShardIndex(str(path), about, arrays, OWN))
    save_manifest(str(folder / f"text{SUFFIX}"), OWN, indexes)


def measure(folder: Path, share: float) -> dict[str, float]:
    """In a process of its own: seconds of each part, megabytes on top of the imports."""
    from pile_app.data.datamodule import PackDataset, PileDataModule, Source  # noqa: F401
    from pile_app.data.tokenizers import ByteTokenizer
    from pile_app.vocabulary import Vocabulary

    imported = memory()
    began = time.perf_counter()
    sources = {"text": Source(str(folder / "*.tar"))}
    data = PileDataModule(sources, Vocabulary(), ByteTokenizer(), context=CONTEXT)
    data.setup()
    set_up = time.perf_counter()
    first = int(share * data.order.packs_per_epoch)
    for position in range(first, first + 64):
        data.order.pack(position)
    planned = time.perf_counter()
    return {
        "setup": set_up - began,
        "plan": planned - set_up,
        "megabytes": memory() - imported,
        "packs": data.order.packs_per_epoch,
        "fill": data.order.sources[0].tokens_per_pack / CONTEXT,
    }


def memory() -> float:
    """Peak resident megabytes, without pages of mapped files that other processes share."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pile-order"))
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.folder, options.measure)))
        return
    print("| documents | index on disk | first | again | 64 packs at 0 % | at 90 % | memory | packs | fill |")
    print("|---|---|---|---|---|---|---|---|---|")
    for documents in options.documents:
        folder = options.folder / str(documents)
        if not folder.exists():
            write_indexes(folder, documents)
        cache = options.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        found = []
        for share in (0.0, 0.0, 0.9):
            command = [sys.executable, __file__, "--folder", str(folder), "--measure", str(share)]
            surroundings = os.environ | {"PILE_CACHE": str(cache)}
            done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        first, again, late = found
        size = sum(path.stat().st_size for path in folder.glob("*.index.safetensors"))
        print(
            f"| {documents:,} | {size / 1e6:,.1f} MB | {first['setup']:.2f} s | {again['setup']:.2f} s | "
            f"{again['plan']:.2f} s | {late['plan']:.2f} s | {again['megabytes']:.0f} MB | {again['packs']:,.0f} | "
            f"{again['fill']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
