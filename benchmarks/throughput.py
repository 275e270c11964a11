"""Tokens a second of a training step, ours against transformers' Llama and litgpt's GPT of the same size, in turns.

    python benchmarks/throughput.py [--sizes 10M 50M] [--rounds 3] [--steps 1] [--documents 1]

All three stand in memory and take turns of --steps optimizer steps (A B C A B C), each with all cores to itself, so that what
else the machine does hits all alike; medians and ranges are printed. `peers/train_step.py` says what is timed. The share of the
matmul rate is FLOPs of the model (6 a parameter of a matrix product, and attention within the causal half) over those of large
bf16 products, measured right after each turn. On a machine that others use, too: OMP_NUM_THREADS=1 and --cpu-time. litgpt and
transformers are installed with uv into an environment of their own.

Bars: 1.2x the better peer; 50 % of the matmul rate at 50M.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_peers import Contestant, describe_machine, make_environment, run

SCRIPT = Path(__file__).parent / "peers" / "train_step.py"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 128, "layers": 4, "heads": 2, "vocabulary": 262, "context": 256, "packs": 16},
    "10M": {"width": 256, "layers": 8, "heads": 4, "vocabulary": 8192, "context": 1024, "packs": 4, "micro_batches": 2},
    "50M": {"width": 512, "layers": 8, "heads": 4, "vocabulary": 24576, "context": 1024, "packs": 4, "micro_batches": 2},
}
PEERS = Contestant("train_step", "litgpt==0.5.9", further=("transformers==5.24.0",))


class Running:
    """A contestant in a process of its own."""

    def __init__(self, name: str, python: Path, shape: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [str(python), str(SCRIPT), name, json.dumps(shape)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.parameters = int(self._answer()["ready"])

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")

    def take(self, steps: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer | {"speed": answer["tokens"] / answer["seconds"]}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def flops_per_token(shape: dict[str, Any]) -> float:
    """Forward and backward: matrix products of blocks and head, and attention, of which a token sees half a document."""
    width, layers = shape["width"], shape["layers"]
    seen = shape["context"] / shape.get("documents", 1) / 2
    return 3 * (2 * 12 * layers * width**2 + 4 * layers * width * seen + 2 * width * shape["vocabulary"])


def peers_python(folder: Path) -> Path:
    """The Python that has torch (of the project's version), transformers and litgpt."""
    import torch

    python = make_environment(folder / "environments", PEERS)
    wanted = torch.__version__.split("+")[0]
    found = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    if found.stdout.strip().split("+")[0] != wanted:
        run(["uv", "pip", "install", "--no-config", "--quiet", "--python", python, f"torch=={wanted}"])
    return python


def measure(shape: dict[str, Any], pythons: dict[str, Path], rounds: int, steps: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Parameters of each contestant, and what its turns gave."""
    running = {name: Running(name, python, shape) for name, python in pythons.items()}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, one in running.items():
            turns[name].append(one.take(steps))
            print(f"{name}: {turns[name][-1]['speed']:,.0f} tokens/s", file=sys.stderr, flush=True)
    for one in running.values():
        one.close()
    return {name: one.parameters for name, one in running.items()}, turns


def table(title: str, shape: dict[str, Any], parameters: dict[str, int], turns: dict[str, list[dict[str, float]]]) -> str:
    speeds = {name: statistics.median(turn["speed"] for turn in found) for name, found in turns.items()}
    best = max((value for name, value in speeds.items() if not name.startswith("pile")), default=float("nan"))
    # The best of all: what the machine can do does not hang on who asks.
    rate = max(turn["matmul"] for found in turns.values() for turn in found)
    lines = [
        f"\n### {title}: {shape}; large products {rate / 1e9:,.0f} GFLOP/s\n",
        "| | parameters | tokens/s | range | of the better peer | share of the matmul rate | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, value in speeds.items():
        found = turns[name]
        low, high = (pick(turn["speed"] for turn in found) for pick in (min, max))
        share = value * flops_per_token(shape) / rate
        memory = max(turn["memory"] for turn in found)
        shown = f"{memory / 1e9:.1f} GB" if memory else "-"
        lines.append(
            f"| {name} | {parameters[name] / 1e6:.1f} M | {value:,.0f} | {low:,.0f} to {high:,.0f} | {value / best:.2f}x | "
            f"{share:.1%} | {shown} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pile-bench"), help="for the peers' environment")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10M", "50M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a turn")
    parser.add_argument("--documents", type=int, default=1, help="in each pack of ours; the peers know no boundaries")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor, for a machine that is shared")
    options = parser.parse_args()
    python = peers_python(options.folder)
    pythons = {"pile": Path(sys.executable), "pile-adamw": Path(sys.executable), "transformers": python, "litgpt": python}
    for size in options.sizes:
        shape = SIZES[size] | {"documents": options.documents, "cpu_time": options.cpu_time}
        print(table(size, shape, *measure(shape, pythons, options.rounds, options.steps)), flush=True)
    print(f"\n{describe_machine()}")


if __name__ == "__main__":
    main()
