"""Everything that a GPU can show, by one command that needs no network: one table a figure, and `gpu.json`.

    python benchmarks/gpu.py [--small] [--peers-python PATH] [--output gpu.json]

- 500 M parameters, bf16, packs of 4,096 tokens: tokens/s, share of the measured rate of large products, peak memory; ours with
  one and with eight documents a pack, eager and compiled; transformers and litgpt, eager and compiled; one after the other.
- Memory and time of the loss with 64 k words.
- Several GPUs: the same step by DDP and FSDP2 (`torchrun`).

The peers take part where their packages are at hand: in this Python, or in that of --peers-python. --small: a tiny model on
whatever there is, to see that everything runs; no figures. Bars: 50 % of the rate; 1.2x the better peer, eager against
eager and compiled against compiled; memory 0.5x.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import memory
import torch
from throughput import SCRIPT, Running, table

LARGE = {"width": 1280, "layers": 20, "heads": 10, "vocabulary": 32_768, "context": 4096, "packs": 4, "micro_batches": 2}
SMALL = {"width": 64, "layers": 2, "heads": 2, "vocabulary": 512, "context": 256, "packs": 2, "micro_batches": 2}
PEERS = ("transformers", "litgpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        parser.error("there is no GPU here; --small shows on a CPU that the command runs")
    kind = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"{kind}, torch {torch.__version__}, Python {platform.python_version()}")
    shape = (SMALL if options.small else LARGE) | {"device": device}
    results: dict[str, Any] = {"device": kind, "torch": torch.__version__, "shape": shape}

    for documents in (1, 8):
        for compiled in (False, True) if device == "cuda" else (False,):
            one = shape | {"documents": documents, "compile": compiled}
            title = f"{'compiled' if compiled else 'eager'}, {documents} documents a pack"
            names = ("pile", *PEERS) if documents == 1 else ("pile",)  # the peers know no boundaries
            results[title] = contest(title, one, names, options)
    words = (1024, 512, 64, device) if options.small else (65_536, 8_192, 1280, device)
    print(memory.table(*words), flush=True)
    ranks = torch.cuda.device_count() if device == "cuda" else 2
    if ranks > 1:
        for parallel in ("ddp", "fsdp"):
            results[parallel] = several(shape | {"parallel": parallel}, ranks)
    else:
        print("\nOne GPU: DDP and FSDP2 were not run.")
    options.output.write_text(json.dumps(results, indent=1))


def contest(title: str, shape: dict[str, Any], names: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """One after the other, as they may not fit in memory together. What cannot run is said and left out."""
    turns: dict[str, list[dict[str, float]]] = {}
    parameters = {}
    for name in names:
        python = Path(sys.executable) if name == "pile" else options.peers_python
        try:
            running = Running(name, python, shape)
            turns[name] = [running.take(1 if options.small else 5) for _ in range(3)]
            parameters[name] = running.parameters
            running.close()
        except (RuntimeError, OSError):
            print(f"{name} did not run ({title}):\n{traceback.format_exc(limit=1)}", flush=True)
            turns.pop(name, None)
    if turns:
        print(table(title, shape, parameters, turns), flush=True)
    return turns


def several(shape: dict[str, Any], ranks: int) -> dict[str, float] | None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*command, str(SCRIPT), "pile", json.dumps(shape)], capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if not answers:
        print(f"\n{shape['parallel']} on {ranks} did not run:\n{done.stderr[-2000:]}")
        return None
    speed, each = answers[0]["tokens"] / answers[0]["seconds"], answers[0]["memory"] / 1e9
    print(f"\n{shape['parallel']}, {ranks} processes: {speed:,.0f} tokens/s, {each:.1f} GB each", flush=True)
    return answers[0]


if __name__ == "__main__":
    main()
