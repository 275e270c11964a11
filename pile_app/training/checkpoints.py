"""Checkpoints that survive, and runs that resume exactly.

Lightning 2.6 has gaps that only show after a kill; each has its answer here, and a test in `tests/training/test_resume.py`:

* a checkpoint is staged in /tmp and moved, not synced, and a full disk may leave half of one: `DurableCheckpointIO`;
* a checkpoint due together with a validation is written before it, and the resumed run skips that validation: `LastCheckpoint`
  waits for the validation, and what that decided (best checkpoint, early stopping) is in it;
* counters are in micro-batches, wrong after a change of devices, and a resumed run saves again after its first micro-batch,
  over the checkpoint it came from: `ExactResume`;
* SIGTERM starts a collective inside the signal handler and can deadlock: `GracefulStop` only sets a flag there; and a run that
  is told to stop first validates once more: not here.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

log = logging.getLogger(__name__)


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to disk, then renames: a checkpoint is there as a whole or not at all.

    Raises:
        OSError: it cannot be written (disk full, say). The checkpoint before it stays.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into RuntimeError
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"checkpoint {str(path)!r} could not be written ({error}); the one before it is whole. Free some space and run "
                "the same command again: it resumes from there"
            ) from error
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`, every `every_n_steps` optimizer steps and at the end. Where a validation is due too, it is saved after that.

    Args:
        folder: where.
        every_n_steps: optimizer steps between saves.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        super().__init__(folder, filename="last", save_top_k=1, every_n_train_steps=every_n_steps, enable_version_counter=False)
        self.every_n_steps = every_n_steps

    @property
    def state_key(self) -> str:
        return "LastCheckpoint"

    def save(self, trainer: Trainer) -> None:
        self._last_global_step_saved = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)

    @property
    def path(self) -> str:
        assert self.dirpath is not None
        return os.path.join(self.dirpath, "last.ckpt")

    def _due(self, trainer: Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0 and self._last_global_step_saved != trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        validates = validation_every(trainer)
        if self._due(trainer) and not (validates and trainer.global_step % validates == 0):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._due(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of Lightning's epoch is the end of the run here."""


def validation_every(trainer: Trainer) -> int:
    """Optimizer steps between validations, 0 for none."""
    every = trainer.val_check_batch
    if not isinstance(every, int) or not trainer.enable_validation:
        return 0
    return every // trainer.accumulate_grad_batches


class ExactResume(Callback):
    """Puts Lightning's counters where they belong: all follow from the optimizer steps in the checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Everything people set is in optimizer steps; Lightning counts some of it in micro-batches."""
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.accumulate_grad_batches != 1:
            raise ValueError("set data.global_batch and data.micro_batch; trainer.accumulate_grad_batches follows from them")
        _, trainer.accumulate_grad_batches = data.micro_batches(trainer.world_size)
        trainer.fit_loop.epoch_loop.max_steps = data.steps(trainer)
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            unfinished = progress[part]["processed"] - progress[part]["completed"]  # 1 within on_train_batch_end
            progress[part] |= dict.fromkeys(("ready", "started", "processed"), batches)
            progress[part]["completed"] = batches - unfinished

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback._last_global_step_saved = trainer.global_step


class GracefulStop(Callback):
    """On SIGTERM or SIGUSR1: finish the optimizer step (and the validation, where one is due), write `last.ckpt`, stop.

    Ranks agree every `every_n_steps` optimizer steps; a collective inside a signal handler could meet another one half way.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, every_n_steps: int = 1) -> None:
        self.every_n_steps = every_n_steps
        self.received: int | None = None
        self.stopped = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in self.SIGNALS:
            signal.signal(number, self._receive)
        # Otherwise Lightning broadcasts its own flag in every step, waiting for the device each time.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        micro_batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if micro_batch % (trainer.accumulate_grad_batches * self.every_n_steps):
            return
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            self.stopped = trainer.should_stop = True
            every = validation_every(trainer)
            if not every or trainer.global_step % every:
                trainer.limit_val_batches = 0
            log.warning("stopping after step %d because of a signal; the same command resumes the run", trainer.global_step)
