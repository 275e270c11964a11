"""Runs with SGD in float32 of every phase and objective, to compare their losses between devices and micro-batches."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from attempts import Watch
from conftest import TINY_CODECS
from lightning.pytorch import LightningModule, Trainer
from processes import start, start_ranks
from torch.optim import Optimizer

from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment
from pile_app.model import readers

CONFIG = f"""
model:
  backbone: {{{{class_path: Transformer, init_args: {{{{width: 32, layers: 2, heads: 2}}}}}}}}
{TINY_CODECS}
  codec_crop: 3
  word_dropout: 0.1
  optimizer: {{{{name: sgd}}}}
data:
  sources: {{{{mixed: {{{{train: "{{shards}}/mixed-*.tar", validation: "{{shards}}/mixed-*.tar"}}}}}}}}
  context: 96
  global_batch: 4
trainer:
  precision: 32-true
  max_steps: 6
  val_check_interval: 1000
  log_every_n_steps: 1
  accelerator: cpu
  callbacks: [{{{{class_path: step_losses.Check}}}}]
checkpoint_every: 1000
ledger: true
wandb: null
"""
TASKS = "pile_app.tasks"
READERS = ("--model.readers", "{image: {width: 8}, audio: {width: 8}}")
KINDS = {  # name -> the options of a run
    "codecs": ("--model.codec_steps", "3", *READERS),
    "adversarial": (
        "--model.codec_steps",
        "4",
        "--model.codec_augment",
        "true",
        "--model.adversarial",
        "{start: 0.25, width: 4}",
    ),
    "classification": (
        *("--model.objective", f"{TASKS}.classification.Classification", "--model.objective.labels", "[a, b, c]"),
        *("--model.objective.pooling", "[mean, max, deviation, last]", "--model.objective.class_weights", "balanced"),
        *("--model.objective.language_weight", "0.2", "--model.objective.label_smoothing", "0.1", *READERS),
    ),
    "retrieval": ("--model.objective", f"{TASKS}.retrieval.Contrastive", *READERS),
    "tagging": (
        *("--model.objective", f"{TASKS}.tagging.Tagging", "--model.objective.types", "[person, place]"),
        *("--model.objective.width", "16"),
    ),
}


def documents(count: int) -> Iterator[Document]:
    """Images and sounds of several lengths with a tagged text and a label."""
    for n in range(count):
        rng = np.random.default_rng(n)
        medium = Segment.from_image(rng.integers(0, 256, (8, 8), np.uint8))
        if n % 2:
            medium = Segment.from_audio(0.3 * rng.standard_normal(500 + 300 * (n % 7)), 8000)
        name, place = ("Ada", "Bob", "Eve")[n % 3], ("Oslo", "Rome")[n % 2]
        text, spans = f"{name} saw {place}" + " again" * (n % 3), [[0, 3, "person"], [8, 12, "place"]]
        medium = replace(medium, loss=n % 5 > 0)  # or it is given
        yield Document((medium, Segment(text)), f"{n}", True, {"label": "abca"[n % 4], "spans": spans, "concept": f"{n % 11}"})


# Gradients of bfloat16 are rounded, and so differ a little between a batch and its parts.
readers.cpu_multiplies_bfloat16 = lambda: False


class Check(Watch):
    """Checks that devices exchange gradients only of what a phase trains: DDP leaves a gradient wherever it averages."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if pl_module.in_codec_phase:
            assert all(p.grad is None for p in pl_module.model.backbone.parameters())


class Bench:
    """A folder with shards and a config, where runs are trained."""

    def __init__(self, folder: Path) -> None:
        write_shards(documents(80), folder / "shards", "mixed", shard_bytes=20_000)
        (folder / "config.yaml").write_text(CONFIG.format(shards=folder / "shards"))
        self.folder = folder

    def train(
        self,
        name: str,
        kind: str,
        *options: str,
        ranks: int = 1,
        strategy: str = "ddp",
        codes: tuple[int, ...] = (0,),
        **environment: str,
    ) -> Path:
        """Train a run in `ranks` processes, whose exit codes must be among `codes`, and return its folder."""
        words = ["train.py", "--config", str(self.folder / "config.yaml"), "--name", name, *KINDS[kind], *options]
        if ranks > 1:
            words += ["--trainer.devices", str(ranks), "--trainer.strategy", strategy]
            commands = start_ranks(words, self.folder, ranks, **environment)
        else:
            commands = [start(words, self.folder, **environment)]
        for command in commands:
            assert command.wait(900) in codes, command.text[-4000:]
        return self.folder / "runs" / name


def train_losses(run: Path) -> dict[tuple[int, str], float]:
    """Return (step, name) -> value of every training loss."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return {
        (int(row["step"]), name): float(value)
        for row in rows
        for name, value in row.items()
        if value and name.startswith("train/") and name.endswith("loss")
    }


def difference(one: dict[tuple[int, str], float], other: dict[tuple[int, str], float]) -> float:
    """Return the largest relative difference, infinite if the losses are not those of the same steps."""
    if one.keys() != other.keys() or not all(map(math.isfinite, one.values())):
        return math.inf
    return max(abs(one[key] - other[key]) / max(1e-3, abs(one[key])) for key in one)
