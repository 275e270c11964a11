"""Tokens per second of a training step, against transformers' Llama and litgpt's GPT of the same size, in turns.

    python benchmarks/throughput.py [--sizes '[10M, 50M]'] [--rounds 3] [--device cpu] [--compile false]

All contestants stay in memory and take turns of `--steps` optimizer steps on all cores; medians and ranges are printed.
`peers/train_step.py` says what is timed. The fraction of the matmul rate is the FLOPs of the model (6 for each parameter of a
matrix product, and attention within the causal half) over those of large bf16 products, measured right after each turn. On a
shared machine use OMP_NUM_THREADS=1 and `--cpu_time true`. litgpt and transformers are installed with uv into an environment
of their own. Bars: 1.3 of the better peer; 50 % of the matmul rate at 50M. `500M --device cuda` is the comparison for a GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from common import Contestant, command, machine, make_environment, table

SCRIPT = Path(__file__).parent / "peers" / "train_step.py"
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 4, "heads": 2, "vocabulary": 262, "context": 256, "packs": 16},
    "10M": {"width": 256, "layers": 8, "heads": 4, "vocabulary": 8192, "context": 1024, "packs": 4, "micro_batches": 2},
    "50M": {"width": 512, "layers": 8, "heads": 4, "vocabulary": 24576, "context": 1024, "packs": 4, "micro_batches": 2},
    "500M": {"width": 1280, "layers": 20, "heads": 10, "vocabulary": 32768, "context": 4096, "packs": 4, "micro_batches": 2},
}


def flops_per_token(width: int, layers: int, vocabulary: int, context: int, **_: Any) -> float:
    """Forward and backward: matrix products of blocks and head, and attention to half the context."""
    return 3 * (2 * 12 * layers * width**2 + 4 * layers * width * context / 2 + 2 * width * vocabulary)


def main(
    sizes: list[str] = ["10M", "50M"],  # noqa: B006
    peers: list[str] = ["transformers", "litgpt"],  # noqa: B006
    rounds: int = 3,
    steps: int = 1,
    device: str = "cpu",
    compile: bool = False,
    cpu_time: bool = False,
    folder: Path = Path("/tmp/pile-bench"),
) -> None:
    """steps: of a turn; folder: for the peers' environment."""
    import torch

    version = torch.__version__.split("+")[0]
    packages = ["litgpt==0.5.9", "transformers==5.24.0", f"torch=={version}"]
    python = make_environment(folder / "environments" / "train_step", packages) if peers else Path()
    pythons = {"pile": sys.executable, "pile-adamw": sys.executable, **dict.fromkeys(peers, python)}
    for size in sizes:
        shape = SIZES[size] | {"device": device, "compile": compile, "cpu_time": cpu_time}
        running = {name: Contestant([path, SCRIPT, name, json.dumps(shape)]) for name, path in pythons.items()}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in running}
        for _ in range(rounds):
            for name, contestant in running.items():
                turns[name].append(contestant.take_turn(steps))
        for contestant in running.values():
            contestant.close()
        speeds = {name: [turn["tokens"] / turn["seconds"] for turn in found] for name, found in turns.items()}
        median = {name: statistics.median(found) for name, found in speeds.items()}
        best = max((median[name] for name in peers), default=float("nan"))
        rate = max(turn["matmul"] for found in turns.values() for turn in found)  # does not depend on the contestant
        rows = []
        for name, value in median.items():
            speed = f"{value:,.0f}", f"{min(speeds[name]):,.0f} to {max(speeds[name]):,.0f}", f"{value / best:.2f}"
            memory = max(turn["memory"] for turn in turns[name])
            flops = value * flops_per_token(**shape) / rate  # type: ignore[arg-type]
            rows.append((name, f"{running[name].ready['ready'] / 1e6:.1f} M", *speed, f"{flops:.1%}", f"{memory / 1e9:.1f} GB"))
        columns = ["", "parameters", "tokens/s", "range", "of the better peer", "of the matmul rate", "GPU memory"]
        table(columns, rows, f"{size}: {shape}; large products {rate / 1e9:,.0f} GFLOP/s")
    print(f"\n{machine()}")


if __name__ == "__main__":
    command(main, __doc__)
