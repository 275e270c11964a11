"""Bytes that each of N nodes fetches for one epoch, counted in the access log of a web server.

    python benchmarks/node_bytes.py [--nodes 2 4] [--shards 64] [--workers 1]

Every node is a process with a cache of its own that reads its part of one epoch through `PileDataModule`, as training does,
from nginx on this machine. The bar is 1.15 / N of the data for each node.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def write(folder: Path, shards: int, documents: int = 30) -> int:
    """Write shards of texts; returns their bytes."""
    import numpy as np

    from pile_app.data.shards import write_shards
    from pile_app.documents import Document, Segment

    for shard in range(shards):
        lengths = np.random.default_rng(shard).integers(2000, 20_000, documents).tolist()
        texts = (Document((Segment("word " * (length // 5 + 1)),), f"{shard}-{n}") for n, length in enumerate(lengths))
        write_shards(texts, folder, f"x-{shard:04d}")
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def read_epoch(node: int, nodes: int, base: str, cache: str, workers: int, global_batch: int) -> None:
    """The part of one node, in a process of its own."""
    from pile_app.data.datamodule import PileDataModule, Source
    from pile_app.data.tokenizers import ByteTokenizer
    from pile_app.vocabulary import Vocabulary

    sources = {"x": Source(f"{base}node{node}/x-*.tar")}
    options = {"global_batch": global_batch, "epochs": 1, "num_workers": workers, "cache": cache}
    data = PileDataModule(sources, Vocabulary(), ByteTokenizer(), 2048, **options)  # type: ignore[arg-type]
    data.setup()
    rank = {"num_replicas": nodes, "rank": node}
    about = {"local_rank": 0, "num_nodes": nodes, "global_step": 0, "max_steps": -1, "training": True}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=rank, **about)  # type: ignore[assignment]
    for batch in data.train_dataloader():
        data.on_before_batch_transfer(batch, 0)
    data.teardown()


def measure(folder: Path, nodes: int, shards: int, workers: int | None = 1, global_batch: int = 16) -> tuple[list[int], int]:
    """(bytes that each node fetched, bytes of all shards). workers: None: the nodes are read one after another, here."""
    from tests.data.test_remote import Server

    server = Server(folder / "nginx")
    config = folder / "nginx" / "nginx.conf"
    config.write_text(config.read_text().replace("$status'", "$status $body_bytes_sent'"))
    server.process.terminate()
    server.process.wait()
    try:
        server.start()
        total = write(server.files / "node0", shards)
        for node in range(1, nodes):
            (server.files / f"node{node}").symlink_to("node0")
        caches = [str(folder / f"cache{node}") for node in range(nodes)]
        arguments = [(node, nodes, server.url(""), caches[node], workers or 0, global_batch) for node in range(nodes)]
        if workers is None:
            for one in arguments:
                read_epoch(*one)
        else:
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=read_epoch, args=one) for one in arguments]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            assert not any(process.exitcode for process in processes)
        fetched: Counter[int] = Counter()
        for line in server.requests("node"):
            node, bytes_ = re.findall(r"/node(\d+)/\S* \d+ (\d+)$", line)[0]
            fetched[int(node)] += int(bytes_)
    finally:
        server.process.terminate()
        server.process.wait()
    return [fetched[node] for node in range(nodes)], total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print("| nodes | fetched by each / all shards | bar |\n|---|---|---|")
    for nodes in options.nodes:
        fetched, total = measure(Path(tempfile.mkdtemp(prefix="pile-nodes-")), nodes, options.shards, options.workers)
        fractions = ", ".join(f"{bytes_ / total:.3f}" for bytes_ in fetched)
        print(f"| {nodes} | {fractions} | ≤ {1.15 / nodes:.3f} |", flush=True)


if __name__ == "__main__":
    main()
