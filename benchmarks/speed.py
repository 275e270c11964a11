"""Two costs of a run: Lightning with all callbacks against a hand-written loop, and seconds to nanoGPT's loss.

    python benchmarks/speed.py overhead [--rounds 2] [--steps 60]
    git clone https://github.com/karpathy/nanoGPT && python benchmarks/speed.py nanogpt --text input.txt --clone nanoGPT

`overhead`: a tiny model (4 layers, 128 wide, bytes, 16 packs of 256 tokens), the same batches of the same loader in turns;
the median time of a step, without the first ten. Bar: 0.97 of the hand-written loop's speed. `nanogpt`: processes take turns,
nanoGPT with the CPU recipe of its README (1.8857 nats a character by its own estimate), Pile with `conf/shakespeare_fast.yaml`
and another seed in every round, validated on all characters of the split. Bar: 0.135. Nothing else should run meanwhile.
"""

from __future__ import annotations

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
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from common import PROJECT, command, machine, table, write_texts

PACKS, CONTEXT, WARM = 16, 256, 10


def by_lightning(folder: Path, steps: int, turn: int) -> list[float]:
    """Seconds of each step of `train.py`, by a callback after all others."""
    from lightning.pytorch import Callback

    from pile_app.training import cli

    ends: list[float] = []

    class Stopwatch(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    make = cli.PileCLI.instantiate_trainer

    def with_stopwatch(self: Any, **kwargs: Any) -> Any:
        trainer: Any = make(self, **kwargs)
        trainer.callbacks.append(Stopwatch())
        return trainer

    words = ["--name", f"turn-{turn}", "--runs", str(folder / "runs"), "--wandb", "null"]
    words += ["--model.backbone", "{class_path: Transformer, init_args: {width: 128, layers: 4, heads: 2}}"]
    words += ["--model.image", "null", "--model.audio", "null", "--model.codec_steps", "0", "--data.prepare", "null"]
    words += ["--trainer.callbacks", "[]", "--model.optimizer.learning_rate", "0.003"]  # not those of the demo
    words += ["--data.sources", f"{{text: {{train: '{folder}/text-*.tar'}}}}", "--data.context", str(CONTEXT)]
    words += ["--data.global_batch", str(PACKS), "--trainer.max_steps", str(steps), "--trainer.precision", "bf16-mixed"]
    with patch.object(cli.PileCLI, "instantiate_trainer", with_stopwatch):
        cli.main(words)
    return [end - begin for begin, end in pairwise(ends)]


def by_hand(folder: Path, steps: int) -> list[float]:
    """Seconds of each step of a plain loop."""
    import torch

    from pile_app.data.datamodule import PileDataModule, Source, StepBatches
    from pile_app.model.backbones import Transformer
    from pile_app.training.module import PileModule
    from pile_app.training.optim import make_optimizer

    torch.manual_seed(0)
    module = PileModule(Transformer(128, 4, 2))
    sources = {"text": Source(f"{folder}/text-*.tar")}
    data = PileDataModule(sources, module.vocabulary, module.tokenizer, CONTEXT, PACKS)
    data.prepare_data()
    data.setup()
    optimizer, schedule = make_optimizer(module.model, module.optimizer, 0, steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ends = []
    for batch in data._loader(data.train_dataset(), StepBatches(0, steps, PACKS, PACKS, 0, 1)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(part.total for part in module.model(batch).values()) / batch.normalizer
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ends.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(ends)]


def overhead(rounds: int, steps: int) -> bool:
    medians: dict[str, list[float]] = {"by hand": [], "by Lightning": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder, "text", [5 * (20 + n % 180) for n in range(4000)])
        os.chdir(folder)  # where no conf/default.yaml adds to the config
        for turn in range(rounds):
            for kind, seconds in (("by hand", by_hand(folder, steps)), ("by Lightning", by_lightning(folder, steps, turn))):
                medians[kind].append(statistics.median(seconds[WARM:]))
    best = {kind: min(values) for kind, values in medians.items()}
    rows = [(kind, ", ".join(f"{value * 1e3:.1f}" for value in values), f"{PACKS * CONTEXT / best[kind]:,.0f}")
            for kind, values in medians.items()]  # fmt: skip
    table(["", "ms a step, medians of the turns", "tokens/s, best turn"], rows)
    print(f"\nLightning and callbacks: {best['by hand'] / best['by Lightning']:.3f} of the plain loop's speed")
    return best["by hand"] / best["by Lightning"] >= 0.97


RECIPE = {
    **{"device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 100, "block_size": 64, "batch_size": 12},
    **{"n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0},
}


def timed(words: list[str], folder: Path, **environment: str) -> tuple[float, str]:
    began = time.perf_counter()
    # Containers turn bytecode off, which costs every start some six seconds of compiling.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | environment
    process = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - began, process.stdout


def nanogpt_rows(text: Path, clone: Path, rounds: int, ratios: list[float]) -> Iterator[tuple[object, ...]]:
    shutil.copyfile(text, clone / "data" / "shakespeare_char" / "input.txt")
    timed(["data/shakespeare_char/prepare.py"], clone)
    timed(["data/shakespeare/prepare.py", "--text", str(text)], PROJECT)
    runs = tempfile.mkdtemp(prefix="pile-nanogpt-")
    for seed in map(str, range(rounds)):
        words = ["train.py", "--config", "conf/shakespeare_fast.yaml", "--wandb", "null", "--runs", runs, "--name", seed]
        ours, _ = timed([*words, "--seed_everything", seed, "--data.seed", seed], PROJECT, PILE_SHAKESPEARE=str(text))
        summary = json.loads(Path(runs, seed, "summary.json").read_text())
        recipe = [f"--{name}={value}" for name, value in RECIPE.items()]
        theirs, printed = timed(["train.py", "config/train_shakespeare_char.py", *recipe], clone)
        ratios.append(ours / theirs)
        loss, their_loss = summary["text_bits_per_byte"] * math.log(2), re.findall(r"val loss ([\d.]+)", printed)[-1]
        yield seed, f"{ours:.1f}", f"{loss:.4f}", f"{theirs:.1f}", their_loss, f"{ratios[-1]:.3f}"


def main(
    what: Literal["overhead", "nanogpt"],
    rounds: int | None = None,
    steps: int = 60,
    text: Path | None = None,
    clone: Path | None = None,
) -> bool:
    """steps: of a turn of `overhead`, at least 12; text: tiny Shakespeare; clone: of nanoGPT."""
    print(machine())
    if what == "overhead":
        return overhead(rounds or 2, steps)
    if text is None or clone is None:
        sys.exit("error: `nanogpt` needs --text FILE and --clone FOLDER")
    ratios: list[float] = []
    columns = ["seed", "Pile: seconds", "nats", "nanoGPT: seconds", "nats", "ratio"]
    table(columns, nanogpt_rows(text.resolve(), clone.resolve(), rounds or 3, ratios))
    print(f"median ratio {statistics.median(ratios):.3f}")
    return statistics.median(ratios) <= 0.135


if __name__ == "__main__":
    command(main, __doc__)
