"""Peak memory of the loss with a large vocabulary, ours against plain cross-entropy: forward and backward of the head alone.

    python benchmarks/memory.py [--vocabulary 65536] [--tokens 8192] [--width 512] [--device cpu]

Each in a process of its own. On a CPU, memory is what is resident at most minus what is resident before the first step; on
CUDA, what is allocated at most. Plain is what the field writes: logits in bf16 by autocast, the cap, float32 for
`F.cross_entropy`; once with the soft cap and once without. Bar: at most 0.5x of the smaller of the two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pile_app.model.fused import LOGIT_CAP
from pile_app.model.loss import linear_cross_entropy

KINDS = ("plain", "plain, no cap", "ours")


def loss_of(kind: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if kind == "ours":
        return linear_cross_entropy(hidden, weight, targets, LOGIT_CAP)[0]
    logits = F.linear(hidden, weight).float()
    if kind == "plain":
        logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
    return F.cross_entropy(logits, targets, reduction="sum")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(kind: str, vocabulary: int, tokens: int, width: int, device: str) -> dict[str, float]:
    """Peak bytes beyond hidden states, weight and their gradients, and seconds, of the second of two steps."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, width, device=device)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    before, peak, stop = resident(), 0, threading.Event()
    if device == "cuda":
        before = torch.cuda.memory_allocated()

    def watch() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    if device != "cuda":
        threading.Thread(target=watch, daemon=True).start()
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            value = loss_of(kind, hidden, weight, targets)
        value.backward()
        loss = float(value.detach())
        seconds = time.perf_counter() - began
    stop.set()
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"bytes": peak - before, "seconds": seconds, "loss": loss / tokens}


def table(vocabulary: int, tokens: int, width: int, device: str) -> str:
    found = {}
    for kind in KINDS:
        words = ["--kind", kind, "--vocabulary", vocabulary, "--tokens", tokens, "--width", width, "--device", device]
        done = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, capture_output=True, text=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    least = min(found[kind]["bytes"] for kind in KINDS[:-1])
    lines = [
        f"\n### The head's loss: {tokens:,} tokens, {vocabulary:,} words, width {width}, bf16 autocast, {device}\n",
        "| | peak memory | of the smaller plain one | seconds | nats a token |",
        "|---|---|---|---|---|",
    ]
    for kind, one in found.items():
        share = one["bytes"] / least
        lines.append(f"| {kind} | {one['bytes'] / 1e9:.2f} GB | {share:.2f}x | {one['seconds']:.2f} | {one['loss']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kind", choices=KINDS, help="measure one in this process, as JSON")
    options = parser.parse_args()
    shape = (options.vocabulary, options.tokens, options.width, options.device)
    print(json.dumps(measure(options.kind, *shape)) if options.kind else table(*shape))


if __name__ == "__main__":
    main()
