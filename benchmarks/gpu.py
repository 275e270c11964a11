"""What a GPU can show, by one command that needs no network: training speed, eager and compiled, and memory of the loss.

    python benchmarks/gpu.py [--size 500M] [--device cuda] [--peers '[transformers, litgpt]']

Bars: 50 % of the rate of large bf16 products; with peers, which are installed from a package registry, 1.3 of the better one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import command

HERE = Path(__file__).parent


def main(size: str = "500M", device: str = "cuda", peers: str = "[]") -> None:
    speed = ["throughput.py", "--sizes", f"[{size}]", "--device", device, "--peers", peers, "--steps", "5"]
    for words in (
        [*speed, "--compile", "false"],
        [*speed, "--compile", "true"],
        ["memory.py", "loss", "--device", device, "--sizes", "[65536, 8192, 1280]"],
    ):
        subprocess.run([sys.executable, HERE / words[0], *words[1:]], check=True)


if __name__ == "__main__":
    command(main, __doc__)
