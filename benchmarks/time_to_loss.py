"""Seconds to a loss of 1.886 nats a character on the validation split of tiny Shakespeare, against nanoGPT's CPU recipe.

    python benchmarks/time_to_loss.py ../shared/data/tinyshakespeare/input.txt [--rounds 3] [--only pile nanogpt loop]

Runs take turns, with another seed in every round, each a process of its own, timed from its start to its end:

    pile      `python train.py --config conf/shakespeare_fast.yaml`
    nanogpt   nanoGPT's recipe through the same `train.py` (`peers/nanogpt_train.py`, `peers/nanogpt.yaml`)
    loop      nanoGPT's recipe as the plain loop that it is at home (`peers/nanogpt_peer.py`), without Lightning, up to the line
              that says it is there

`pile` and `nanogpt` validate on the whole split, stop where the loss is reached, and then validate again and write checkpoint,
summary and report. Loss is nats a character over exactly the characters of the split: bits a byte · ln 2. Nothing else should
run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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


def train(command: list[str], seed: int, runs: Path, text: Path) -> dict[str, float]:
    """Whole seconds, seconds of training, steps, parameters and loss of a run of `train.py`."""
    command = [sys.executable, *command, "--wandb", "null", "--runs", str(runs), "--name", f"{seed}"]
    command += ["--seed_everything", str(seed), "--data.seed", str(seed)]
    environment = os.environ | {"PILE_SHAKESPEARE": str(text)}
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=PROJECT, env=environment, capture_output=True)
    whole = time.perf_counter() - began
    summary = json.loads((runs / f"{seed}" / "summary.json").read_text())
    loss = summary["text_bits_per_byte"] * math.log(2)
    size = summary["parameters"]["language_model"] / 1e6
    return {"seconds": whole, "training": summary["train_seconds"], "steps": summary["steps"], "size": size, "loss": loss}


def train_loop(seed: int, text: Path) -> dict[str, float]:
    """The same of the plain loop, until the validation that reaches the target, or its last one."""
    command = [sys.executable, "benchmarks/peers/nanogpt_peer.py", str(text), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    began = time.perf_counter()
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
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["pile", "nanogpt", "loop"], default=["pile", "nanogpt", "loop"])
    options = parser.parse_args()
    text = options.text.resolve()
    subprocess.run([sys.executable, "data/shakespeare/prepare.py", "--text", str(text)], check=True, cwd=PROJECT)
    runs = Path(tempfile.mkdtemp(prefix="pile-time-to-loss-"))
    seconds: dict[str, list[float]] = {name: [] for name in options.only}
    print("| what | seed | whole seconds | of them training | steps | M parameters | nats a character |")
    print("|---|---|---|---|---|---|---|")
    for seed in range(options.first_seed, options.first_seed + options.rounds):
        for name in options.only:
            figures = train_loop(seed, text) if name == "loop" else train(COMMANDS[name], seed, runs / name, text)
            # A run that ended above the target did not get there.
            seconds[name].append(figures["seconds"] if figures["loss"] <= TARGET else math.inf)
            print(
                f"| {name} | {seed} | {figures['seconds']:.1f} | {figures['training']:.1f} | {figures['steps']:.0f} "
                f"| {figures['size']:.3f} | {figures['loss']:.4f} |",
                flush=True,
            )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print("\nmedian seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in median.items()))
    for peer in ("nanogpt", "loop"):
        if "pile" in median and peer in median:
            print(f"pile ÷ {peer}: {median['pile'] / median[peer]:.3f}")


if __name__ == "__main__":
    main()
