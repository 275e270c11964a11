"""Attempts at a run: `train.py` in real processes that can be killed."""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import resource
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_CODECS, TINY_DATA, write_tiny_shards
from lightning.pytorch import Callback, LightningModule, Trainer
from processes import Command, start, start_ranks

from pile_app.training.callbacks import read_ledger

CONFIG = f"""
model:
  backbone: {{{{class_path: Transformer, init_args: {{{{width: 32, layers: 2, heads: 2, dropout: 0.1}}}}}}}}
{TINY_CODECS}
  codec_steps: 3
  dropout: 0.1
{TINY_DATA}
trainer:
  precision: 32-true
  max_steps: 14
  val_check_interval: 5
  log_every_n_steps: 1
  accelerator: cpu
  callbacks: [{{{{class_path: attempts.Watch}}}}]
checkpoint_every: 3
ledger: true
wandb: null
"""
PASSING = ("throughput/", "epoch")  # columns of metrics.csv that hang on the clock, or say nothing


class Watch(Callback):
    """Writes down what each micro-batch held and lost, and meddles where the environment says so.

    KILL_AT, STOP_AT, INTERRUPT_AT: number of the micro-batch after which rank 0 gets SIGKILL, SIGTERM or SIGINT (Ctrl-C), its
    loading workers too; INTERRUPT_AGAIN: the same once more;
    KILL_IN_VALIDATION, STOP_IN_VALIDATION: step in whose validation it does; POISON: "first last rank" of the micro-batches
    whose loss becomes nan; POISON_WEIGHTS: number of the one after which the weights are; FILE_LIMIT: "number bytes", after
    which no file can grow beyond so many bytes, as on a full disk; KILL_IN_WRITE: the same, but whoever tries is killed;
    SLEEP: seconds that each micro-batch takes longer; INTERRUPT_IN_LAST_VALIDATION: SIGINT in that after training.
    """

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Called at the end of the run, as for every callback of the config; the figures go to summary.json."""
        return {"watched_step": trainer.global_step}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        first, last, rank = map(int, os.environ.get("POISON", "-1 -1 0").split())
        if first <= batch_idx <= last and rank == trainer.global_rank:
            pl_module._language_loss = lambda *given: type(pl_module)._language_loss(pl_module, *given) * math.nan

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        vars(pl_module).pop("_language_loss", None)
        time.sleep(float(os.environ.get("SLEEP", "0")))
        if os.environ.get("POISON_WEIGHTS") == str(batch_idx):
            next(pl_module.model.backbone.parameters()).data.fill_(math.nan)
        for name, action in (("FILE_LIMIT", signal.SIG_IGN), ("KILL_IN_WRITE", signal.SIG_DFL)):
            number, limit = os.environ.get(name, "-1 0").split()
            if int(number) == batch_idx:
                signal.signal(signal.SIGXFSZ, action)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        ctrl_c = (("INTERRUPT_AT", signal.SIGINT), ("INTERRUPT_AGAIN", signal.SIGINT))
        for name, number in (("KILL_AT", signal.SIGKILL), ("STOP_AT", signal.SIGTERM), *ctrl_c):
            if os.environ.get(name) == str(batch_idx) and trainer.is_global_zero:
                for process in (*(worker.pid for worker in multiprocessing.active_children()), os.getpid()):
                    os.kill(process, number)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if "INTERRUPT_IN_LAST_VALIDATION" in os.environ and trainer.state.fn == "validate":
            os.kill(os.getpid(), signal.SIGINT)
        for name, number in (("KILL_IN_VALIDATION", signal.SIGKILL), ("STOP_IN_VALIDATION", signal.SIGTERM)):
            if os.environ.get(name) == str(trainer.global_step):
                os.kill(os.getpid(), number)


def make_bench(folder: Path) -> Workbench:
    """Captioned images, transcribed sounds and texts, and a config that trains 14 steps on them."""
    write_tiny_shards(folder / "shards")
    return Workbench(folder, folder / "shards")


class Workbench:
    """A folder with a config, where attempts are made."""

    def __init__(self, folder: Path, shards: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.shards = shards
        self.config = folder / "config.yaml"
        self.config.write_text(CONFIG.format(shards=shards))

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def words(self, name: str, *arguments: str) -> list[str]:
        return ["train.py", "--config", str(self.config), "--name", name, *arguments]

    def start(self, name: str, *arguments: str, **environment: str) -> Command:
        """Begins or resumes the run `name`."""
        return start(self.words(name, *arguments), self.folder, **environment)

    def start_ranks(self, name: str, *arguments: str, ranks: int = 2, **environment: str) -> list[Command]:
        """The same on several processes."""
        words = ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp", *arguments]
        return start_ranks(self.words(name, *words), self.folder, ranks, **environment)

    def train(self, name: str, *arguments: str, **environment: str) -> str:
        """Train a run, which must succeed, and return its output."""
        return self.start(name, *arguments, **environment).succeed()


def damage(path: Path) -> bytes:
    """Flip a bit in the middle of a file; return its new content."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    return bytes(content)


def losses(run: Path) -> dict[int, dict[str, str]]:
    """Step -> its values in metrics.csv, as strings."""
    rows: dict[int, dict[str, str]] = defaultdict(dict)
    for row in csv.DictReader((run / "metrics.csv").open()):
        kept = {key: value for key, value in row.items() if value and not key.startswith(PASSING)}
        for key, value in kept.items():
            assert rows[int(row["step"])].setdefault(key, value) == value, f"{key} of step {row['step']} was logged twice"
    return dict(rows)


def assert_same_run(run: Path, other: Path) -> None:
    """Every logged value and every weight is the same, to the last bit."""
    assert losses(run) == losses(other)
    for name in ("last", "best"):
        one, two = checkpoint(run, name), checkpoint(other, name)
        assert one["global_step"] == two["global_step"]
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert is_same(one[key], two[key]), key


def is_same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(is_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(is_same, one, two))
    return bool(one == two)


def assert_close_runs(run: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Every loss is equal up to rounding."""
    one, two = losses(run), losses(other)
    assert one.keys() == two.keys()
    for step in one:
        names = [name for name in one[step] if name.endswith("loss")]
        assert names == [name for name in two[step] if name.endswith("loss")]
        for name in names:
            assert math.isclose(float(one[step][name]), float(two[step][name]), rel_tol=tolerance), (step, name)


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def documents(run: Path) -> dict[int, list[Any]]:
    """Step -> documents of its global batch."""
    found: dict[int, list[Any]] = defaultdict(list)
    for entry in read_ledger(run):
        found[entry["step"]] += entry["documents"]
    return dict(found)
