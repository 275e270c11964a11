"""Seconds to a loss of 1.886 nats a character on the validation split of tiny Shakespeare, against nanoGPT's CPU recipe.

    python benchmarks/time_to_loss.py ../shared/data/tinyshakespeare/input.txt [--rounds 3] [--threads 2]

Runs take turns, with another seed in every round, each a process of its own, timed from its start to its end:

    pile      `python train.py --config conf/shakespeare_fast.yaml`
    nanogpt   nanoGPT's recipe through the same `train.py` (`peers/nanogpt_train.py`, `peers/nanogpt.yaml`)
    loop      nanoGPT's recipe as the plain loop that it is at home (`peers/nanogpt_peer.py`), without Lightning, up to the line
              that says it is there

`pile` and `nanogpt` validate on the whole split, stop where the loss is reached, and then validate again and write checkpoint,
summary and report. Loss is nats a character over exactly the characters of the split: bits a byte · ln 2. Nothing else should
run meanwhile; where something does, the CPU's seconds with `--threads 1` are still about what a quiet machine takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 1.886
PROJECT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "pile": ["train.py", "--config", "conf/shakespeare_fast.yaml"],
    "nanogpt": ["benchmarks/peers/nanogpt_train.py", "--config", "benchmarks/peers/nanogpt.yaml"],
}
COLUMNS = {"seconds": 1, "cpu": 1, "training": 1, "steps": 0, "size": 3, "loss": 4}  # and their digits


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train(command: list[str], seed: int, runs: Path, text: Path) -> dict[str, float]:
    """Whole seconds, seconds of training, steps, parameters and loss of a run of `train.py`."""
    command = [sys.executable, *command, "--wandb", "null", "--runs", str(runs), "--name", f"{seed}"]
    command += ["--seed_everything", str(seed), "--data.seed", str(seed)]
    environment = os.environ | {"PILE_SHAKESPEARE": str(text)}
    began, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run(command, check=True, cwd=PROJECT, env=environment, capture_output=True)
    whole, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    summary = json.loads((runs / f"{seed}" / "summary.json").read_text())
    loss = summary["text_bits_per_byte"] * math.log(2)
    size = summary["parameters"]["language_model"] / 1e6
    return {
        "seconds": whole,
        "cpu": cpu,
        "training": summary["train_seconds"],
        "steps": summary["steps"],
        "size": size,
        "loss": loss,
    }


def train_loop(seed: int, text: Path) -> dict[str, float]:
    """The same of the plain loop, until the validation that reaches the target, or its last one."""
    command = [sys.executable, "benchmarks/peers/nanogpt_peer.py", str(text), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    began, cpu = time.perf_counter(), cpu_seconds()
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    figures: dict[str, float] = {}
    for line in process.stdout:
        words = line.split()
        figures = {"seconds": time.perf_counter() - began, "training": float(words[2]), "steps": int(words[1].rstrip(":"))}
        figures |= {"size": float(words[4]), "loss": float(words[-1])}
        if figures["loss"] <= TARGET:
            break
    process.terminate()
    process.wait()
    return figures | {"cpu": cpu_seconds() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=["pile", "nanogpt", "loop"], default=["pile", "nanogpt", "loop"])
    options = parser.parse_args()
    text = options.text.resolve()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    subprocess.run([sys.executable, "data/shakespeare/prepare.py", "--text", str(text)], check=True, cwd=PROJECT)
    runs = Path(tempfile.mkdtemp(prefix="pile-time-to-loss-"))
    runs_of: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    print("| what | seed | whole seconds | of the CPU | training | steps | M parameters | nats a character | reached |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in range(options.first_seed, options.first_seed + options.rounds):
        for name in options.only:
            figures = train_loop(seed, text) if name == "loop" else train(COMMANDS[name], seed, runs / name, text)
            reached = figures["loss"] <= TARGET
            if name == "pile" and not reached:
                figures["seconds"] = figures["cpu"] = math.inf
            runs_of[name].append(figures)
            columns = [f"{figures[column]:.{digits}f}" for column, digits in COLUMNS.items()]
            print(f"| {' | '.join([name, str(seed), *columns, 'yes' if reached else 'no'])} |", flush=True)
    for column in ("seconds", "cpu"):
        median = {name: statistics.median(one[column] for one in figures) for name, figures in runs_of.items()}
        print(f"\nmedian {column}: " + ", ".join(f"{name} {value:.1f}" for name, value in median.items()))
        for peer in ("nanogpt", "loop"):
            if "pile" in median and peer in median:  # a peer that did not get there would have taken longer still
                print(f"pile ÷ {peer}: {median['pile'] / median[peer]:.3f}")


if __name__ == "__main__":
    main()
