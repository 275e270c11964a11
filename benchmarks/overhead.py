"""What Lightning and all callbacks cost: a run of `train.py` against a hand-written loop with the same model, data, optimizer.

    python benchmarks/overhead.py [--steps 60] [--rounds 2]

The shape is the tiny one: 4 layers, 128 wide (0.8 M parameters), bytes, 16 packs of 256 tokens. Both read the same batches from
the same loader. Turns alternate; a turn's figure is the median time of a step, from the end of one to the end of the next,
without those that a turn begins with. Checkpoints and validations come after the last step that counts. Bar: at least 0.97 of
the hand-written loop's tokens a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from data_peers import describe_machine
from lightning.pytorch import Callback

from pile_app.data.datamodule import PileDataModule, Source, StepBatches
from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment
from pile_app.model.backbones import Transformer
from pile_app.training import cli
from pile_app.training.module import PileModule
from pile_app.training.optim import make_optimizer

PACKS, CONTEXT, WARM = 16, 256, 10


def documents() -> Iterator[Document]:
    words = ["the", "of", "a", "language", "model", "reads", "and", "writes", "text", "images", "sound"]
    for n in range(4000):
        yield Document((Segment(" ".join(words[(n * i + i // 3) % len(words)] for i in range(20 + n % 180))),), f"d-{n}")


class Stopwatch(Callback):
    """When each step ended; the last of the callbacks, so that all others are in it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def by_lightning(folder: Path, steps: int, turn: int) -> list[float]:
    """Seconds of each step of a run by the real entry point."""
    watch = Stopwatch()
    make = cli.PileCLI.instantiate_trainer

    def with_watch(self: cli.PileCLI, **kwargs: Any) -> Any:
        trainer = make(self, **kwargs)
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        return trainer

    cli.PileCLI.instantiate_trainer = with_watch  # type: ignore[method-assign]
    words = ["--name", f"turn-{turn}", "--runs", str(folder / "runs"), "--wandb", "null"]
    words += ["--model.backbone", "{class_path: Transformer, init_args: {width: 128, layers: 4, heads: 2}}"]
    words += ["--model.image", "null", "--model.audio", "null", "--model.codec_steps", "0", "--data.prepare", "null"]
    words += ["--trainer.callbacks", "[]", "--model.optimizer.learning_rate", "0.003"]  # not those of the demo
    words += ["--data.sources", f"{{text: {{train: '{folder}/text-*.tar'}}}}", "--data.context", str(CONTEXT)]
    words += ["--data.global_batch", str(PACKS), "--trainer.max_steps", str(steps), "--trainer.precision", "bf16-mixed"]
    try:
        cli.main(words)
    finally:
        cli.PileCLI.instantiate_trainer = make  # type: ignore[method-assign]
    return [end - begin for begin, end in pairwise(watch.ends)]


def by_hand(folder: Path, steps: int) -> list[float]:
    """Seconds of each step of a plain loop."""
    torch.manual_seed(0)
    module = PileModule(Transformer(128, 4, 2))
    sources = {"text": Source(f"{folder}/text-*.tar")}
    data = PileDataModule(sources, module.vocabulary, module.tokenizer, CONTEXT, PACKS)
    data.prepare_data()
    data.setup()
    optimizer, schedule = make_optimizer(module.model, module.optimizer, 0, steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loader = data._loader(data.train_dataset(), StepBatches(0, steps, PACKS, PACKS, 0, 1))
    ends = []
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16):
            losses = module.model(batch)
            loss = sum(one.total for one in losses.values()) / batch.normalizer
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ends.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of a turn; the first 10 do not count")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    medians: dict[str, list[float]] = {"by hand": [], "by Lightning": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(documents(), folder, "text")
        os.chdir(folder)  # where no conf/default.yaml adds to the config
        for turn in range(options.rounds):
            for kind, seconds in (
                ("by hand", by_hand(folder, options.steps)),
                ("by Lightning", by_lightning(folder, options.steps, turn)),
            ):
                medians[kind].append(statistics.median(seconds[WARM:]))
                print(f"{kind}: {medians[kind][-1] * 1e3:.1f} ms a step", file=sys.stderr, flush=True)
    best = {kind: min(values) for kind, values in medians.items()}
    print("| | ms a step, medians of the turns | tokens/s, best turn |\n|---|---|---|")
    for kind, values in medians.items():
        shown = ", ".join(f"{value * 1e3:.1f}" for value in values)
        print(f"| {kind} | {shown} | {PACKS * CONTEXT / best[kind]:,.0f} |")
    print(f"\nLightning and callbacks: {best['by hand'] / best['by Lightning']:.3f} of the plain loop (bar 0.97)")
    print(describe_machine())


if __name__ == "__main__":
    main()
