"""Is what `pile plan` says of memory what a training step takes?

    python benchmarks/plan_memory.py [--only 10m 50m] [--steps 3]

Each case is a process of its own: real model, real optimizer, real steps on the CPU. Measured twice: what PyTorch allocates, at
its peak (its profiler sees every allocation, those inside of kernels too); and the peak of resident memory (VmHWM, which
Linux lets a process reset) over what was resident before the model was made, after a small step that loaded what libraries
load late. What malloc keeps and other libraries take is in the second alone; the plan adds a share for it (`FRAGMENTS`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pile_app.data.tokenizers import ByteTokenizer
from pile_app.model.backbones import LSTM, Backbone, Transformer
from pile_app.model.codecs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.memory import make_batch, plan_memory
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.training.plan import FRAGMENTS

# name: backbone, its sizes, text tokens, with media, packs, context
CASES = {
    "1m": (Transformer, {"width": 128, "layers": 4, "heads": 2}, 256, True, 8, 256),
    "10m": (Transformer, {"width": 256, "layers": 8, "heads": 4}, 8192, False, 4, 1024),
    "50m": (Transformer, {"width": 512, "layers": 8, "heads": 8, "key_value_heads": 4}, 24_576, False, 2, 1024),
    "150m": (Transformer, {"width": 768, "layers": 12, "heads": 6}, 49_152, True, 1, 2048),
    "lstm": (LSTM, {"width": 640, "layers": 3}, 256, False, 4, 512),
}
SHARES = {True: (0.5, 0.3, 0.2), False: (1.0, 0.0, 0.0)}


class Tokens(ByteTokenizer):
    """As many ids as asked for: only their number matters here."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.token_bytes = self.token_bytes.repeat(size // 256)


def make_model(case: str) -> FusedLanguageModel:
    kind, sizes, text, media, *_ = CASES[case]
    backbone: Backbone = kind(**sizes)
    codecs = (ImageCodecConfig(), AudioCodecConfig()) if media else (None, None)
    return FusedLanguageModel(backbone, Tokens(text), *codecs)


def resident(field: str) -> int:
    """Bytes of `/proc/self/status`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def train(model: FusedLanguageModel, case: str, optimizer: str, precision: str, accumulated: bool, steps: int) -> None:
    *_, media, packs, context = CASES[case]
    batch = make_batch(model, packs, context, SHARES[media])
    moved, schedule = make_optimizer(model, OptimizerConfig(name=optimizer), 0, steps + 1)
    for _ in range(steps):
        for _ in range(1 + accumulated):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                losses = model(batch)
                loss = torch.stack([one.total for one in losses.values()]).sum() / batch.normalizer
            del losses
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        moved.step()
        schedule.step()
        moved.zero_grad()


def measure(case: str, optimizer: str, precision: str, accumulated: bool, steps: int) -> tuple[int, int]:
    """(bytes that PyTorch allocates at most, bytes that become resident at most)."""
    train(make_model("1m"), "1m", optimizer, precision, accumulated, 1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train(make_model(case), case, optimizer, precision, accumulated, steps)
        highest = resident("VmHWM") - before
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes)), highest


def planned(case: str, optimizer: str, precision: str, accumulated: bool) -> int:
    *_, media, packs, context = CASES[case]
    with torch.device("meta"):
        model = make_model(case)
    config = OptimizerConfig(name=optimizer)
    return plan_memory(
        model, config, packs, context, fractions=SHARES[media], accumulated=accumulated, precision=precision
    ).peak  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # what the processes are started with
    options = parser.parse_args()
    if options.one:
        case, optimizer, precision, accumulated = options.one
        print(*measure(case, optimizer, precision, accumulated == "True", options.steps))
        return
    heads = (
        "model",
        "optimizer",
        "precision",
        "micro-batches",
        "planned MB",
        "allocated MB",
        "planned ÷ allocated",
        "resident MB",
    )
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for case in options.only:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in make_model(case).parameters()) / 1e6
        for optimizer in options.optimizers:
            for precision in ("32-true", "bf16-mixed"):
                for accumulated in (False, True):
                    if accumulated and precision == "32-true":
                        continue
                    plan = planned(case, optimizer, precision, accumulated)
                    name = f"{case} ({parameters:.1f} M) | {optimizer} | {precision} | {1 + accumulated}"
                    if plan > 0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
                        print(f"| {name} | {plan / 1e6:,.0f} | more than is free | | | | |", flush=True)
                        continue
                    one = [case, optimizer, precision, str(accumulated)]
                    command = [sys.executable, __file__, "--steps", str(options.steps), "--one", *one]
                    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    allocated, highest = map(int, found.splitlines()[-1].split())
                    pairs = ((plan, allocated), (plan * FRAGMENTS, highest))
                    cells = " | ".join(f"{a / 1e6:,.0f} | {b / 1e6:,.0f} | {a / b:.2f}" for a, b in pairs)
                    print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
