"""Checkpoints that survive, and runs that stop exactly. What a run resumes from: `resume.py`.

    save → last.ckpt.next, durably → ranks meet → last.ckpt becomes previous.ckpt → last.ckpt.next becomes last.ckpt

so that one of the three is always whole; files and folders (sharded checkpoints) alike. Gaps of Lightning 2.6 that only show
after a kill, each with its answer here and a test in `tests/training/test_resume.py`:

* a checkpoint is staged in /tmp and moved, not synced, and a full disk may leave half of it: `DurableCheckpointIO`;
* there is one last checkpoint, overwritten in place where it is a folder: `LastCheckpoint` keeps the one before;
* a checkpoint due together with a validation is written before it, and the resumed run skips that validation: `LastCheckpoint`
  waits for the validation, and the best score and early stopping are in it;
* counters are in micro-batches, wrong after a change of devices: `PileModule.on_load_checkpoint`; and a resumed run saves again
  after its first micro-batch, over the checkpoint it came from: not `LastCheckpoint`;
* SIGTERM starts a collective inside the signal handler and can deadlock, and a run that is told to stop validates once more:
  not `GracefulStop`.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pile_app.training.sharded import read_checkpoint, remove_leftovers, sync_folder, write_durably
from pile_app.training.strategy import ShardedStrategy

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def remove(path: Path) -> None:
    """A checkpoint, file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def promote(staged: Path, last: Path) -> None:
    """`last` becomes the one before, `staged` becomes `last`; each file or folder."""
    previous = last.with_name(PREVIOUS)
    if last.exists():
        remove(previous)
        os.rename(last, previous)
    os.rename(staged, last)
    sync_folder(last.parent)
    remove_leftovers(last.parent)


class DurableCheckpointIO(TorchCheckpointIO):
    """A checkpoint file is there as a whole or not at all. See `write_durably`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        write_durably(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Also one in parts, whole. Never runs what is pickled."""
        return read_checkpoint(path)


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`, every `every_n_steps` optimizer steps and at the end, and the one before it as `previous.ckpt`. Where a
    validation is due too, it is saved after that.

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
        """On all ranks."""
        self._last_global_step_saved = trainer.global_step
        staged = self.path.with_name(f"{LAST}.next")
        trainer.save_checkpoint(staged, weights_only=False)
        if isinstance(trainer.strategy, ShardedStrategy):  # which goes on to write it
            trainer.strategy.after_saving(lambda: promote(staged, self.path))
        else:
            if trainer.is_global_zero:
                promote(staged, self.path)
            trainer.strategy.barrier("promoted")

    @property
    def path(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath) / LAST

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_global_step_saved = trainer.global_step

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


class StoppedInValidation(Exception):
    """Validation was interrupted; the checkpoint records that it is due."""


class GracefulStop(Callback):
    """Stop after the current optimizer step and write `last.ckpt`, on SIGTERM, SIGUSR1 or Ctrl-C, or after `max_time`.

    Validation is interrupted, and repeated by the resumed run. A second Ctrl-C ends the process at once. The handler only sets
    a flag: a collective inside it could meet another one half way. Ranks agree once per optimizer step, together with the
    figures that `StepGuard` averages anyway, and after each batch of validation.

    Args:
        max_time: as in Lightning's `Trainer`, for each start of the run.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, max_time: Any = None) -> None:
        self.timer = Timer(max_time)
        self.received: int | None = None
        self.agreed = False  # a rank has to stop, and all know it
        self.stopped = False
        self.in_validation = False
        self._original: dict[int, Any] = {}

    @property
    def is_due(self) -> bool:
        return self.received is not None or (self.timer.time_remaining() or 1) <= 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, 143 for one that another rank received; 0 after `max_time`."""
        return 128 + (self.received or signal.SIGTERM) if self.received or not self.is_due else 0

    @property
    def state_key(self) -> str:
        return "GracefulStop"

    def state_dict(self) -> dict[str, Any]:
        return {"in_validation": self.in_validation}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin with the validation that was interrupted; to Lightning it has just started."""
        if checkpoint["callbacks"].get(self.state_key, {}).get("in_validation"):
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for part in ("total", "current"):
                progress[part] |= begun

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for number in self.SIGNALS:
            self._original[number] = signal.signal(number, self._receive)
        # Lightning's own handlers would broadcast, save and requeue from inside the signal; and its loop would broadcast a flag
        # in every step, waiting for the device each time.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._original.items():
            signal.signal(number, handler)
        self._original = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.timer.on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        micro_batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if micro_batch % trainer.accumulate_grad_batches or not self.agreed:
            return
        every = validation_every(trainer)
        if every and trainer.global_step % every == 0:
            return  # the validation that is due begins and is interrupted, so that it stays due
        self.stopped = trainer.should_stop = True
        trainer.limit_val_batches = 0

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.strategy.reduce_boolean_decision(self.is_due, all=False):
            self.stopped = self.in_validation = True
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint):
                    callback.save(trainer)
            raise StoppedInValidation
