"""A run is a folder: `runs/<name>/`. What is in it, and how it is picked up again.

config.yaml  tokenizer.json  checkpoints/{last,best}.ckpt  metrics.csv  samples/  wandb/  quarantine.jsonl  summary.json
report.html
"""

from __future__ import annotations

import csv
import ctypes
import io
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from pile_app.training.callbacks import count_quarantined
from pile_app.training.module import PileModule
from pile_app.training.resume import TOKENIZER
from pile_app.training.sharded import write_durably
from pile_app.training.wandb_run import WandbRun

log = logging.getLogger(__name__)

PACKAGES = ("lightning", "torch", "torchvision", "torchaudio", "torchmetrics", "webdataset", "wandb", "tokenizers")


def keep_freed_memory() -> None:
    """Lets malloc keep what it was given back, for training on a CPU: as glibc comes, large tensors go back to the system and
    are got anew, page by page and zeroed, 700,000 pages in a step of 50 M parameters (docs/benchmarks.md)."""
    if sys.platform != "linux":
        return
    with suppress(AttributeError):  # musl has no such option
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for any tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end of the heap before they are given back


class _MetricsFile(ExperimentWriter):
    """Adds to the metrics that are in the folder; Lightning's deletes them."""

    def _check_log_dir_exists(self) -> None:
        self._read()

    def _read(self) -> list[dict[str, str]]:
        """Its rows, but for one that a kill left unfinished; new ones will have their columns."""
        path = Path(self.metrics_file_path)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        reader = csv.DictReader(line for line in lines if line.endswith("\n"))
        self.metrics_keys = list(reader.fieldnames or ())
        return list(reader)

    def keep_until(self, step: int) -> None:
        """Drops what was logged from optimizer step `step` on: what a killed run logged after its checkpoint comes anew."""
        kept = [row for row in self._read() if int(row["step"]) < step]
        if not self.metrics_keys:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(kept)
        write_durably(Path(self.metrics_file_path), text.getvalue().encode())


class ResumableCSVLogger(CSVLogger):
    """`metrics.csv` of a run, over all its attempts."""

    def __init__(self, run: Path) -> None:
        super().__init__(run.parent, name="", version=run.name, flush_logs_every_n_steps=1_000_000)

    @property
    @rank_zero_experiment
    def experiment(self) -> _MetricsFile:
        if not isinstance(self._experiment, _MetricsFile):
            self._experiment = _MetricsFile(self.log_dir)
        return self._experiment


def make_loggers(run: Path, wandb_project: str | None) -> list[Logger]:
    """The CSV logger and, where a project is named, W&B's."""
    return [ResumableCSVLogger(run), *([WandbRun(run, wandb_project)] if wandb_project is not None else [])]


class RunFolder(Callback):
    """Keeps the resolved config (YAML) and the time spent, over all attempts."""

    def __init__(self, run: Path, config: str) -> None:
        self.run = run
        self.config = config
        self.train_seconds = 0.0
        self.tokens = 0
        self._uncounted: torch.Tensor | None = None  # on the device: to read it is to wait for it
        self._began: float | None = None
        self.has_begun = False
        self.validation: tuple[int, dict[str, float]] = (-1, {})  # the last one: its optimizer step, its metrics

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self._elapsed(), "tokens": self._count()}

    def _count(self) -> int:
        if self._uncounted is not None:
            self.tokens, self._uncounted = self.tokens + int(self._uncounted), None
        return self.tokens

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds = state_dict["train_seconds"]
        self.tokens = state_dict["tokens"]

    def _elapsed(self) -> float:
        return self.train_seconds + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not before: a run that is refused leaves the folder as it is."""
        self._began, self.has_begun = time.perf_counter(), True
        if not trainer.is_global_zero:
            return
        (self.run / "config.yaml").write_text(self.config)
        tokenizer, copy = Path(yaml.safe_load(self.config)["model"]["tokenizer"]), self.run / TOKENIZER
        if tokenizer.is_file() and not (trainer.global_step and copy.exists()):
            shutil.copyfile(tokenizer, copy)
        (self.run / "summary.json").unlink(missing_ok=True)  # the run is not complete any more
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger):
                logger.experiment.keep_until(trainer.global_step)
            elif isinstance(logger, WandbRun):  # after metrics.csv, from which it takes the steps before
                logger.start(yaml.safe_load(self.config), trainer.global_step)
            else:
                logger.log_hyperparams(yaml.safe_load(self.config))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            targets = batch.normalizer.double()
            self._uncounted = targets if self._uncounted is None else self._uncounted + targets

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics.items()
        self.validation = trainer.global_step, {name: float(v) for name, v in metrics if name.startswith("validation/")}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.train_seconds, self._began = self._elapsed(), None

    def write_summary(self, trainer: Trainer, pl_module: LightningModule, figures: dict[str, Any]) -> Path:
        """`summary.json`: final figures under flat keys, for machines and for the report."""
        assert isinstance(pl_module, PileModule)
        model = pl_module.model
        codecs = sum(p.numel() for codec in model.codecs.values() for p in codec.parameters())
        everything = sum(p.numel() for p in model.parameters())
        device = pl_module.device
        on_gpu = device.type == "cuda"
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        kind = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads, {platform.machine()}"
        summary = {
            "name": self.run.name,
            "steps": trainer.global_step,
            "tokens": self._count(),
            "train_seconds": round(self.train_seconds, 2),
            "tokens_per_second": round(self._count() / max(self.train_seconds, 1e-9), 1),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else usage,
            "parameters": {"language_model": everything - codecs, "codecs": codecs},
            **figures,
            "quarantined": count_quarantined(self.run),
            "rejected_when_indexed": {data.name: data.rejected() for data in trainer.datamodule.train_data},  # type: ignore[attr-defined]
            "device": kind,
            "devices": trainer.world_size,
            "git_revision": git_revision(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        }
        path = self.run / "summary.json"
        path.write_text(json.dumps(summary, indent=1))
        return path


def git_revision() -> str:
    """Of the working folder, "-dirty" after it where files differ, "unknown" outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def lock(run: Path) -> IO[str]:
    """A file that is locked until it is closed, or this process ends; one process trains in a run folder at a time.

    Raises:
        ValueError: another process does.
        OSError: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run).close()
        file = open(run.with_name(f".{run.name}.lock"), "a+")  # noqa: SIM115 (kept open)
    except OSError as error:
        raise OSError(
            f"the run folder {str(run)!r} cannot be written: {error}. Choose another with --runs or --name"
        ) from error
    with suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its workers do not inherit it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{run} is being trained by {file.read().strip() or 'another process'}: wait for it, or choose another --name"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s is not locked (%s): start it once only", run, error)
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    return file
