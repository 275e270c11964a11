"""Seconds to the loss of nanoGPT's CPU recipe on tiny Shakespeare, against nanoGPT's own `train.py`.

    git clone https://github.com/karpathy/nanoGPT && python benchmarks/time_to_loss.py input.txt nanoGPT [--rounds 3]

Whole processes take turns, each timed from its start to its end, with another seed of ours in every round. nanoGPT runs the
recipe of its README for CPUs (4 layers, 128 wide, block 64, batch 12, 2,000 steps, no compile) and ends at 1.8857 nats a
character by its own estimate on 20 batches. Pile runs `conf/shakespeare_fast.yaml` and validates on all characters of the
split. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = {
    **{"device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 100, "block_size": 64, "batch_size": 12},
    **{"n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0},
}


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, str]:
    began = time.perf_counter()
    # Containers turn bytecode off, which costs every start some six seconds of compiling.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | environment
    process = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stdout + process.stderr)
    return time.perf_counter() - began, process.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    text, nanogpt = options.text.resolve(), options.nanogpt.resolve()
    shutil.copyfile(text, nanogpt / "data" / "shakespeare_char" / "input.txt")
    timed(["data/shakespeare_char/prepare.py"], nanogpt, {})
    timed(["data/shakespeare/prepare.py", "--text", str(text)], PROJECT, {})
    runs = tempfile.mkdtemp(prefix="pile-time-to-loss-")
    whole: dict[str, list[float]] = {"pile": [], "nanogpt": []}
    for seed in range(options.rounds):
        command = ["train.py", "--config", "conf/shakespeare_fast.yaml", "--wandb", "null", "--runs", runs, "--name", str(seed)]
        command += ["--seed_everything", str(seed), "--data.seed", str(seed)]
        ours, _ = timed(command, PROJECT, {"PILE_SHAKESPEARE": str(text)})
        summary = json.loads(Path(runs, str(seed), "summary.json").read_text())
        loss = summary["text_bits_per_byte"] * math.log(2)
        theirs, printed = timed(
            ["train.py", "config/train_shakespeare_char.py", *(f"--{name}={value}" for name, value in RECIPE.items())],
            nanogpt,
            {},
        )
        estimates = re.findall(r"val loss ([\d.]+)", printed)
        whole["pile"].append(ours)
        whole["nanogpt"].append(theirs)
        print(f"seed {seed}: pile {ours:.1f} s ({summary['train_seconds']:.1f} s training), {loss:.4f} nats; "
              f"nanoGPT {theirs:.1f} s, {estimates[-1]} nats; ratio {ours / theirs:.3f}", flush=True)  # fmt: skip
    median = {name: statistics.median(seconds) for name, seconds in whole.items()}
    print(f"median: {median['pile']:.1f} ÷ {median['nanogpt']:.1f} = {median['pile'] / median['nanogpt']:.3f}")


if __name__ == "__main__":
    main()
