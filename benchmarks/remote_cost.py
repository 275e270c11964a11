"""What remote shards cost: bytes of an epoch that each of N nodes fetches; files and requests until the first batch.

    python benchmarks/remote_cost.py bytes [--nodes '[2, 4]'] [--shards 64]       at most 1.15 / N of the data each
    python benchmarks/remote_cost.py start [--shards 1000] [--ranks 8]            at most 50 a rank

`bytes`: each node is a process with a cache of its own that reads its part of one epoch through `PileDataModule` from nginx on
this machine, whose log is summed. `start`: each rank is a process that opens the source and makes its first batch; files and
listings that Python opens in the shards' folder are counted by an audit hook, requests by a server; the ranks share a cache.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import sys
import tempfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from common import TESTS, command, measure_alone, stand_in_trainer, table, write_texts  # noqa: E402

# -- Bytes of an epoch.


def read_epoch(node: int, nodes: int, base: str, cache: str, workers: int, global_batch: int) -> None:
    """Read the part of one node."""
    data = open_data(f"{base}node{node}/x-*.tar", cache, global_batch=global_batch, epochs=1, num_workers=workers)
    data.setup()
    data.trainer = stand_in_trainer(rank=node, ranks=nodes)
    data.trainer.max_steps = -1
    for batch in data.train_dataloader():
        data.on_before_batch_transfer(batch, 0)
    data.teardown()


def open_data(pattern: str, cache: str, **options: Any) -> Any:
    from pile_app.data.datamodule import PileDataModule, Source
    from pile_app.data.tokenizers import ByteTokenizer
    from pile_app.vocabulary import Vocabulary

    return PileDataModule({"x": Source(pattern)}, Vocabulary(), ByteTokenizer(), 2048, cache=cache, **options)


def measure(folder: Path, nodes: int, shards: int, workers: int | None = 1, global_batch: int = 16) -> tuple[list[int], int]:
    """(bytes that each node fetched, bytes of all shards). workers: None: the nodes are read one after another, here."""
    import numpy as np

    sys.path[:0] = TESTS
    from tests.data.test_remote import Server

    server = Server(folder / "nginx")
    config = folder / "nginx" / "nginx.conf"
    config.write_text(config.read_text().replace("$status'", "$status $body_bytes_sent'"))
    server.process.terminate()
    server.process.wait()
    try:
        server.start()
        for shard in range(shards):
            lengths = np.random.default_rng(shard).integers(2000, 20_000, 30).tolist()
            write_texts(server.files / "node0", f"x-{shard:04d}", lengths)
        total = sum(path.stat().st_size for path in (server.files / "node0").glob("*.tar"))
        for node in range(1, nodes):
            (server.files / f"node{node}").symlink_to("node0")
        parts = [
            (node, nodes, server.url(""), str(folder / f"cache{node}"), workers or 0, global_batch) for node in range(nodes)
        ]
        if workers is None:
            for part in parts:
                read_epoch(*part)
        else:
            processes = [multiprocessing.get_context("spawn").Process(target=read_epoch, args=part) for part in parts]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            assert not any(process.exitcode for process in processes)
        fetched: Counter[int] = Counter()
        for line in server.requests("node"):
            node, size = map(int, re.findall(r"/node(\d+)/\S* \d+ (\d+)$", line)[0])
            fetched[node] += size
    finally:
        server.process.terminate()
        server.process.wait()
    return [fetched[node] for node in range(nodes)], total


# -- The start of a run.


def open_first_batch(pattern: str, folder: str, cache: str, rank: int, ranks: int) -> int:
    """Files and listings of the folder that a rank opens until its first batch."""
    opened: list[str] = []
    names = ("open", "os.listdir", "os.scandir")
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event in names else None)
    data = open_data(pattern, cache, global_batch=8 * ranks)
    if rank == 0:
        data.prepare_data()
    data.setup()
    data.train_dataset().__getitems__(list(range(8 * rank, 8 * rank + 8)))
    return sum(path.startswith(folder) for path in opened)


def measure_start(work: Path, shards: int, ranks: int) -> bool:
    folder, asked = work / "data", list[str]()

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(f"{self.command} {self.path} {code}")

    count = len(write_texts(folder, "x", [360] * (10 * shards), shard_bytes=10_000))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"PILE_CACHE": str(work / "kept"), "NO_PROXY": "127.0.0.1"}

    def opened(pattern: str) -> list[int]:
        return [measure_alone(__file__, "start", "--one", json.dumps([pattern, str(folder), str(work / "cache"), rank, ranks]),
                              environment=environment) for rank in range(ranks)]  # fmt: skip

    local = opened(f"{folder}/x-*.tar")
    opened(f"http://127.0.0.1:{server.server_address[1]}/x-{{000000..{count - 1:06d}}}.tar")
    server.shutdown()
    rows = [("local, opened files by rank", local), ("remote, requests a rank", f"{len(asked) / ranks:.1f}")]
    table(["", f"{count:,} shards, {ranks} ranks; bar 50"], rows)
    return max(local) <= 50 and len(asked) <= 50 * ranks


def main(
    what: Literal["bytes", "start"],
    nodes: list[int] = [2, 4],  # noqa: B006
    shards: int | None = None,
    ranks: int = 8,
    workers: int = 1,
    one: str | None = None,
) -> bool | None:
    """one: the part of a process."""
    if one:
        return print(open_first_batch(*json.loads(one)))
    with tempfile.TemporaryDirectory(prefix="pile-remote-") as name:
        if what == "start":
            return measure_start(Path(name), shards or 1000, ranks)
        found = {count: measure(Path(name, str(count)), count, shards or 64, workers) for count in nodes}
    rows = [(count, ", ".join(f"{size / total:.3f}" for size in fetched), f"≤ {1.15 / count:.3f}")
            for count, (fetched, total) in found.items()]  # fmt: skip
    table(["nodes", "fetched by each ÷ all shards", "bar"], rows)
    return all(max(fetched) <= 1.15 / count * total for count, (fetched, total) in found.items())


if __name__ == "__main__":
    command(main, __doc__)
