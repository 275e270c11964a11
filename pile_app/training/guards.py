"""Reject optimizer steps that are not finite, or whose data are to be skipped; stop after too many in a row.

After the last backward pass of a step its loss and gradient norm are known. A rejected step drops its gradients, and torch's
optimizers leave parameters without gradient alone: weights, momenta and step counts stay the same to the bit. Schedule and
position of the data go on, so position = steps x global batch holds, and a resumed run rejects the same steps.

All ranks decide alike, from averaged numbers: one all-reduce of three floats and one wait for the device per optimizer step. A
signal to stop (`GracefulStop`) travels with them.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves_with_path

from pile_app.data.batch import Batch
from pile_app.training.callbacks import drop_later_lines
from pile_app.training.checkpoints import GracefulStop
from pile_app.training.module import PileModule

log = logging.getLogger(__name__)

PASSED_OVER = "passed over"


@dataclass(frozen=True)
class GuardConfig:
    """Which optimizer steps are rejected. See `guards.py`.

    Args:
        max_rejected: steps in a row that may be rejected; with one more the run stops.
        rewind_steps: optimizer steps before the first rejected one that a stopped run suggests to skip too (PaLM,
            arXiv:2204.02311, 5.1).
        skip_steps: first and last of the optimizer steps, counted from 1, whose data are skipped. A range that begins before
            `last.ckpt` takes the run back to an earlier checkpoint.
    """

    max_rejected: int = 10
    rewind_steps: int = 100
    skip_steps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_rejected", "rewind_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be at least 0")
        for first, last in self.skip_steps:
            if not 1 <= first <= last:
                raise ValueError(f"guard.skip_steps: [{first}, {last}] is no range of steps: 1 <= first <= last")


class DivergedError(FloatingPointError):
    """Too many steps were rejected in a row, from `first` to `last`."""

    def __init__(self, message: str, first: int, last: int) -> None:
        super().__init__(message)
        self.first, self.last = first, last


class StepGuard(Callback):
    """Reject optimizer steps, list their documents in `rejected.jsonl`, and keep non-finite weights out of checkpoints.

    A line of `rejected.jsonl` is one device's part of a rejected step: {"step": from 1, "reason", "loss", "gradient_norm",
    "positions": of its packs, "documents": [[source, key, epoch, first token, stop], ...]}.

    Raises:
        DivergedError: more than `max_rejected` steps in a row.
        FloatingPointError: weights or momenta are not finite when a checkpoint is due, which is not written.
    """

    state_key = "StepGuard"

    def __init__(self, run: Path, config: GuardConfig, stop: GracefulStop) -> None:
        self.path, self.config, self.stop = run / "rejected.jsonl", config, stop
        self.counts: Counter[str] = Counter()  # of rejected steps, by reason
        self.in_a_row = 0
        self.reason = ""  # to reject the current step
        self.step: dict[str, float] = {}  # loss and gradient norm of the current step
        self.packs: list[tuple[int, list[Any]]] = []  # (position, documents) of the current step

    def state_dict(self) -> dict[str, Any]:
        skipped = [list(one) for one in self.config.skip_steps]
        return {"counts": dict(self.counts), "in_a_row": self.in_a_row, "skip_steps": skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self.in_a_row = Counter(state_dict["counts"]), state_dict["in_a_row"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PileModule)
        pl_module.guard = self

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        drop_later_lines(trainer, self.path.parent.glob(self.path.name))

    def skips(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.config.skip_steps)

    def rejects(self, module: PileModule, loss: Tensor, gradient_norm: Tensor) -> bool:
        trainer = module.trainer
        figures = torch.stack([loss.float(), gradient_norm.float(), loss.new_full((), self.stop.is_due).float()])
        if trainer.world_size > 1:
            figures = trainer.strategy.reduce(figures, reduce_op="mean")
        mean_loss, norm, stopping = figures.tolist()
        self.stop.agreed = stopping > 0
        self.step = {"loss": mean_loss, "gradient_norm": norm}
        wrong = [f"{name} not finite" for name, value in self.step.items() if not math.isfinite(value)]
        self.reason = PASSED_OVER if self.skips(trainer.global_step + 1) else "".join(wrong[:1])
        return bool(self.reason)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.packs += zip(batch.numbers, batch.documents, strict=True)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, packs, self.packs = trainer.global_step, self.packs, []
        if self.reason:
            self.counts[self.reason] += 1
            self._write(trainer, step, packs)
        self.in_a_row = self.in_a_row + 1 if self.reason not in ("", PASSED_OVER) else 0
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = {"train/gradient_norm": self.step["gradient_norm"]}
            values |= {f"rejected/{reason}".replace(" ", "_"): float(count) for reason, count in self.counts.items()}
            pl_module.log_dict(values, rank_zero_only=True, batch_size=1)
        if self.in_a_row > self.config.max_rejected:
            raise DivergedError(
                f"{self.in_a_row} optimizer steps in a row could not be taken, up to step {step} ({self.reason}: {self.step}). "
                f"Nothing of them is in a checkpoint; their documents are listed in {self.path}",
                step - self.in_a_row + 1,
                step,
            )

    def _write(self, trainer: Trainer, step: int, packs: Sequence[tuple[int, list[Any]]]) -> None:
        sources: list[str] = trainer.datamodule.source_names  # type: ignore[attr-defined]
        named = [[sources[source], *rest] for _, documents in packs for source, *rest in documents]
        entry = {"step": step, "reason": self.reason} | {name: str(value) for name, value in self.step.items()}
        entry |= {"positions": [position for position, _ in packs], "documents": named}
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.reason != PASSED_OVER and trainer.is_global_zero:
            log.warning("step %d is not taken: %s (%s)", step, self.reason, self.step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        name = find_not_finite({key: checkpoint.get(key) for key in ("state_dict", "optimizer_states")})
        # All devices raise together, or the others would wait.
        if trainer.strategy.reduce_boolean_decision(bool(name), all=False):
            raise FloatingPointError(
                f"after step {trainer.global_step} {name or 'the part of another device'} holds values that are not finite: "
                "lower the learning rate. They were not saved; the last checkpoint is from before"
            )


def find_not_finite(state: Any) -> str:
    """Return the path of a tensor in nested dictionaries and lists that holds nan or inf, or "".

    Waits once for each device, however many tensors it holds. Of a sharded tensor the part of this rank is checked.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for keys, value in tree_leaves_with_path(state):
        local = value.to_local() if hasattr(value, "to_local") else value
        if isinstance(local, Tensor) and local.is_floating_point():
            path = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
            by_device[local.device].append((path, local.isfinite().all()))
    for entries in by_device.values():
        finite = torch.stack([flag for _, flag in entries]).tolist()
        if not all(finite):
            return entries[finite.index(False)][0]
    return ""
