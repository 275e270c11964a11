"""A run is a folder `runs/<name>/`: its files, its loggers, and how its settings may change when it is continued.

config.yaml  tokenizer.json  checkpoints/{last,best}.ckpt  metrics.csv  samples/  wandb/  quarantine.jsonl  summary.json
report.html
"""

from __future__ import annotations

import csv
import ctypes
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from pile_app.data.files import whole_file
from pile_app.documents import MODALITIES
from pile_app.model.pretrained import save_readers
from pile_app.model.pretrained_codecs import save_codecs
from pile_app.training.callbacks import count_quarantined, ends_step, is_logged
from pile_app.training.checkpoints import choose_checkpoint, read_state
from pile_app.training.load import BACKBONE, TOKENIZER, take_description
from pile_app.training.module import PileModule
from pile_app.training.wandb_run import WandbRun

log = logging.getLogger(__name__)
LOCKS: list[TextIO] = []  # of this process, which are released when it ends

PACKAGES = ("lightning", "torch", "torchvision", "torchaudio", "torchmetrics", "webdataset", "wandb", "tokenizers")


def begin(run: Path, config: Namespace, dumped: str, is_first: bool) -> Path | None:
    """Lock a run, and set in its configuration what a resumed run takes from its own folder; return the checkpoint to resume
    from. `dumped`: the configuration as it is written.

    Raises SystemExit if the run is complete, ValueError if it cannot begin or go on with this configuration.
    """
    asked, model = yaml.safe_load(dumped), config.model
    if is_first:
        lock(run)
    steps = check_complete(run, asked)
    if steps is not None:
        if is_first:
            longer = "to train longer raise trainer.max_steps, or choose another --name"
            print(f"{run} is complete ({steps} steps): open {run / 'report.html'}; {longer}")
        raise SystemExit
    checkpoint = choose_checkpoint(run / "checkpoints", config.guard.skip_steps, is_first)
    if checkpoint is None:
        check_origin(asked["model"])
        return None
    was = check_resume(run, checkpoint, asked)
    if model.start_from or model.codecs_from:  # the run has them now, and does without the files that it began with
        model.start_from, model.codecs_from = None, str(checkpoint) if model.image or model.audio else None
    if model.tokenizer == was.get("tokenizer") and (run / TOKENIZER).exists():
        model.tokenizer = str(run / TOKENIZER)
    take_description(model, run)
    return checkpoint


def keep_freed_memory() -> None:
    """Let malloc keep freed memory, for training on a CPU. By default glibc returns large tensors to the system and gets them
    back page by page and zeroed, 700,000 pages in a step of 50 M parameters."""
    if sys.platform != "linux":
        return
    with suppress(AttributeError):  # musl has no such option
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for any tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end of the heap before they are returned


class _MetricsFile(ExperimentWriter):
    """Append to the metrics in the folder; Lightning's deletes them."""

    def _check_log_dir_exists(self) -> None:
        self._read()

    def _read(self) -> list[dict[str, str]]:
        """Return the rows, except an unfinished last one; new rows will have their columns."""
        path = Path(self.metrics_file_path)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        reader = csv.DictReader(line for line in lines if line.endswith("\n"))
        self.metrics_keys = list(reader.fieldnames or ())
        return list(reader)

    def keep_until(self, step: int) -> None:
        """Drop what a killed process logged after its last checkpoint, at optimizer step `step`."""
        kept = [row for row in self._read() if int(row["step"]) < step]
        if self.metrics_keys:
            writer = csv.DictWriter(text := io.StringIO(newline=""), self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)
            with whole_file(self.metrics_file_path, durable=True) as file:
                file.write(text.getvalue().encode())


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
    """Return the CSV logger and, if a project is named, W&B's."""
    return [ResumableCSVLogger(run), *([WandbRun(run, wandb_project)] if wandb_project is not None else [])]


class RunFolder(Callback):
    """Write the configuration, the tokenizer and the summary of a run, and count its time and tokens over all attempts."""

    def __init__(self, run: Path, config: str) -> None:
        self.run, self.config = run, config
        self.train_seconds, self.tokens = 0.0, 0
        self._uncounted: torch.Tensor | None = None  # stays on the device, since reading it would wait
        self._began: float | None = None
        self.has_begun = False
        self.validation: tuple[int, dict[str, float]] = (-1, {})  # the last one: its optimizer step, its metrics

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self._elapsed(), "tokens": self._count()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds, self.tokens = state_dict["train_seconds"], state_dict["tokens"]

    def _count(self) -> int:
        if self._uncounted is not None:
            self.tokens, self._uncounted = self.tokens + int(self._uncounted), None
        return self.tokens

    def _elapsed(self) -> float:
        return self.train_seconds + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Write into the folder; not earlier, since a run that is refused must not change it."""
        self._began, self.has_begun = time.perf_counter(), True
        if not trainer.is_global_zero:
            return
        (self.run / "config.yaml").write_text(self.config)
        tokenizer, copy = Path(yaml.safe_load(self.config)["model"]["tokenizer"]), self.run / TOKENIZER
        if tokenizer.is_file() and not (trainer.global_step and copy.exists()):
            shutil.copyfile(tokenizer, copy)
        if not (self.run / BACKBONE).exists():
            module.model.backbone.save_description(self.run / BACKBONE)  # type: ignore[union-attr, operator]
        save_codecs(module.model.codecs, self.run, again=not trainer.global_step)  # type: ignore[arg-type, union-attr]
        save_readers(module.model.readers, self.run, again=not trainer.global_step)  # type: ignore[arg-type, union-attr]
        (self.run / "summary.json").unlink(missing_ok=True)  # the run is not complete any more
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger):
                logger.experiment.keep_until(trainer.global_step)
            elif isinstance(logger, WandbRun):  # after metrics.csv, from which it takes the steps before
                logger.start(yaml.safe_load(self.config), trainer.global_step)
            else:
                logger.log_hyperparams(yaml.safe_load(self.config))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx):
            targets = batch.normalizer.long()
            self._uncounted = targets if self._uncounted is None else self._uncounted + targets
        if is_logged(trainer, batch_idx):
            progress = {"throughput/tokens": float(self._count()), "throughput/train_seconds": self._elapsed()}
            module.log_dict(progress, rank_zero_only=True, batch_size=1)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        metrics = trainer.callback_metrics.items()
        self.validation = trainer.global_step, {name: float(v) for name, v in metrics if name.startswith("validation/")}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.train_seconds, self._began = self._elapsed(), None

    def write_summary(self, trainer: Trainer, module: PileModule, figures: dict[str, Any]) -> None:
        """Write `summary.json`: final figures under flat keys, for machines and for the report."""
        codecs = sum(p.numel() for codec in module.model.codecs.values() for p in codec.parameters())
        everything = sum(p.numel() for p in module.model.parameters())
        on_gpu = module.device.type == "cuda"
        cpu = f"{torch.get_num_threads()} threads, {platform.machine()}"
        summary = {
            "name": self.run.name,
            "steps": trainer.global_step,
            "tokens": self._count(),
            "train_seconds": round(self.train_seconds, 2),
            "tokens_per_second": round(self._count() / max(self.train_seconds, 1e-9), 1),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(module.device) if on_gpu else peak_memory(),
            "parameters": {"language_model": everything - codecs, "codecs": codecs},
            **figures,
            "quarantined": count_quarantined(self.run),
            "rejected_when_indexed": {data.name: data.rejected() for data in trainer.datamodule.train_data},  # type: ignore[attr-defined]
            "device": torch.cuda.get_device_name(module.device) if on_gpu else cpu,
            "devices": trainer.world_size,
            "git_revision": git_revision(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        }
        (self.run / "summary.json").write_text(json.dumps(summary, indent=1))


def find_divergence(trainer: Trainer, module: PileModule, metrics: dict[str, Any], monitor: str) -> list[str]:
    """Say if a run ended far worse than its best validation, or worse than guessing."""
    if module.objective is not None:
        return []
    slices, modalities = module.vocabulary.slices, module.vocabulary.modalities
    chances = {f"{MODALITIES[m]}_loss": math.log(slices[m].stop - slices[m].start) for m in modalities}
    losses = {n: float(metrics.get(f"validation/{n}", metrics.get(f"train/{n}", math.nan))) for n in chances}
    bound = 1.1 if any(loss < 0.99 * chances[name] for name, loss in losses.items()) else 0.0  # or nothing was learned at all
    said = "{} is {:.4g}, guessing has {:.4g}: lower the learning rate"
    worse = sorted(name for name, loss in losses.items() if loss > bound * chances[name])
    found = [said.format(name, losses[name], chances[name]) for name in worse]
    for callback in trainer.checkpoint_callbacks:
        best, mode = getattr(callback, "best_model_score", None), getattr(callback, "mode", "")
        if best is not None and monitor in metrics:
            last, best = float(metrics[monitor]), float(best)
            if last > 1.5 * best > 0 if mode == "min" else 1.5 * last < best:
                found.append(f"{monitor} ended at {last:.4g}, its best was {best:.4g}: best.ckpt holds those weights")
    return found


def peak_memory() -> int | None:
    """Return the largest resident size of this process in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git_revision() -> str:
    """Return the revision of the working folder, with "-dirty" if files differ, or "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def lock(run: Path) -> None:
    """Lock a run folder until this process ends. Raises ValueError if another one trains in it, OSError if it is read-only."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run).close()
        file = open(run.with_name(f".{run.name}.lock"), "a+")  # noqa: SIM115 (kept open)
    except OSError as error:
        fix = "Choose another with --runs or --name"
        raise OSError(f"the run folder {str(run)!r} cannot be written: {error}. {fix}") from error
    LOCKS.append(file)
    with suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its workers do not inherit it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(f"{run} is being trained by {owner}: wait for it, or choose another --name") from None
        except OSError as error:  # a file system without locks
            log.warning("%s is not locked (%s): start it once only", run, error)
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)


# -- Settings that may change. Configurations are compared, since tensors of another model may have the same shapes.

# Settings that a resumed run follows when they change; all others of `model` must stay.
FOLLOWED = re.compile(
    r"model\.(optimizer\.(?!name$)|weights\.|(dropout|word_dropout|code_dropout|l1|recompute|compile|codec_crop|codec_augment|tokenizer)$|"
    r"backbone\.init_args\.dropout$|objective\.init_args\.(learning_rate|language_weight)$)"
)
# Settings that say how a run is computed, not what it learns.
EXECUTION = re.compile(
    r"data\.(micro_batch|num_workers|prepare|cache|allow_pipe)|trainer\.(?!precision|gradient_clip|callbacks)"
)


def differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, old value, new value) of each setting that differs and that both have."""
    if isinstance(was, dict) and isinstance(now, dict) and was.get("class_path") == now.get("class_path"):
        for key in was | now if name == "data.sources" else was.keys() & now.keys():
            yield from differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def describe_changes(settings: Iterable[tuple[str, Any, Any]], allowed: re.Pattern[str]) -> str:
    """Format what differs in settings, (name, old, new), and must not: "name was a, now it is b; ...", or "" if all is well."""

    def short(value: Any) -> str:
        path: str | None = value.get("class_path") if isinstance(value, dict) else None
        return path.rpartition(".")[2] if path else str(value)[:80]

    changes = (change for name, was, now in settings for change in differences(was, now, name) if not allowed.match(change[0]))
    return "; ".join(f"{name} was {short(was)}, now it is {short(now)}" for name, was, now in sorted(changes, key=str))


def check_resume(run: Path, checkpoint: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the run's old model section. Raises ValueError if the new model differs, or for too few steps."""
    steps, wanted = read_state(checkpoint)[0], asked["trainer"]["max_steps"]
    if 0 <= wanted < steps:
        raise ValueError(f"trainer.max_steps={wanted}, but {run} has trained {steps} steps: choose more, or another --name")
    path = run / "config.yaml"
    was: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {}
    model: dict[str, Any] = was.get("model", {})
    kept = {name: model.get(name) for name in ("start_from", "codecs_from") if asked["model"][name] is None}  # needed no more
    positions = {key: asked["data"][key] for key in ("context", "global_batch", "seed")}
    fixed = {"model": asked["model"] | kept, "seed_everything": asked["seed_everything"], "data": positions}
    if changes := describe_changes(((name, was.get(name, now), now) for name, now in fixed.items()), FOLLOWED):
        raise ValueError(f"{run} cannot resume: {changes}. Set it back, or begin another run with another --name")
    return model


def check_complete(run: Path, asked: dict[str, Any]) -> int | None:
    """Return the steps of a complete run, else None. Raises ValueError if it is complete for another configuration."""
    if not all((run / name).exists() for name in ("summary.json", "config.yaml", "checkpoints/last.ckpt")):
        return None
    was = yaml.safe_load((run / "config.yaml").read_text())
    lengths = (("trainer", "max_steps"), ("data", "epochs"), ("data", "min_steps"))
    if any((was[part].get(name) or 0) != (asked[part].get(name) or 0) for part, name in lengths):
        return None
    steps = int(json.loads((run / "summary.json").read_text())["steps"])
    parts = ("seed_everything", "model", "data", "trainer")
    if changes := describe_changes(((part, was.get(part), asked[part]) for part in parts), EXECUTION):
        fix = "Choose another --name, or raise trainer.max_steps to train it longer"
        raise ValueError(f"{run} is complete ({steps} steps) with another configuration: {changes}. {fix}")
    return steps


def check_origin(model: dict[str, Any]) -> None:
    """Raise ValueError if `start_from` or `codecs_from` names a run whose model or codecs differ."""
    for option, parts in (("start_from", ("backbone", "image", "audio")), ("codecs_from", ("image", "audio"))):
        path = Path(model.get(option) or os.devnull)
        config = next((c for f in (path, *path.absolute().parents[1:2]) if (c := f / "config.yaml").is_file()), None)
        was = yaml.safe_load(config.read_text())["model"] if config else {}
        compared = [part for part in parts if part in was and (option == "start_from" or model.get(part))]
        if changes := describe_changes(((f"model.{part}", was[part], model.get(part)) for part in compared), FOLLOWED):
            fix = f"(`--config {config}` before your own takes the model as it was)"
            raise ValueError(f"model.{option}={str(path)!r} holds another model: {changes}. {fix}")
