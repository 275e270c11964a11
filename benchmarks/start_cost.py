"""Requests and opened files until the first batch, with many shards and several ranks: at most 50 a rank.

    python benchmarks/start_cost.py [--shards 1000] [--ranks 8]

Each rank is a process that opens the source and makes its first batch. Local: files and listings that Python opens in the
folder of the shards, by an audit hook. Remote: requests that a server on loopback answers; all ranks share a cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment

BAR = 50
RANK = """
import json, sys
pattern, folder, cache, rank, ranks = *sys.argv[1:4], *map(int, sys.argv[4:])
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event in ("open", "os.listdir", "os.scandir") else None)
from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.vocabulary import Vocabulary
data = PileDataModule({"x": Source(pattern)}, Vocabulary(), ByteTokenizer(), 2048, global_batch=8 * ranks, cache=cache)
if rank == 0:
    data.prepare_data()
data.setup()
data.train_dataset().__getitems__(list(range(8 * rank, 8 * rank + 8)))
print(json.dumps(sum(path.startswith(folder) for path in opened)))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        documents = (Document((Segment(f"text {n} " * 40),), str(n)) for n in range(10 * options.shards))
        written = write_shards(documents, folder, "x", 10_000)
        asked: list[str] = []
        with_server(folder, asked, lambda url: report(len(written.paths), options.ranks, folder, Path(name), url, asked))
    return 0


def report(shards: int, ranks: int, folder: Path, work: Path, url: str, asked: list[str]) -> None:
    local = [start(f"{folder}/x-*.tar", folder, work, rank, ranks) for rank in range(ranks)]
    print(f"{shards:,} shards, {ranks} ranks; bar: {BAR} a rank")
    print(f"local:  opened files by rank {local}, most {max(local)}")
    for rank in range(ranks):
        start(f"{url}/x-{{000000..{shards - 1:06d}}}.tar", folder, work, rank, ranks)
    print(f"remote: {len(asked):,} requests of all ranks, {len(asked) / ranks:.1f} a rank; {asked[:2]}, ...")


def start(pattern: str, folder: Path, work: Path, rank: int, ranks: int) -> int:
    command = [sys.executable, "-c", RANK, pattern, str(folder), str(work / "cache"), str(rank), str(ranks)]
    environment = os.environ | {"PILE_CACHE": str(work / "kept"), "NO_PROXY": "127.0.0.1"}
    return int(
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def with_server(folder: Path, asked: list[str], work: Callable[[str], None]) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            asked.append(f"{self.command} {self.path} {code}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    work(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()


if __name__ == "__main__":
    sys.exit(main())
