"""Which optimizer steps are not taken, and what happens when there are too many of them.

After the last backward pass of a step its loss and the norm of its gradient are known. A step is *rejected* if one of them is
not finite, or if its data are to be skipped (`skip_steps`). Its gradients are dropped before the optimizer sees them, and
torch's optimizers leave a parameter without gradient alone: weights, momenta and step counts stay the same to the bit. The
schedule and the position of the data go on, so position = steps x global batch still holds, and a resumed run rejects the same
steps.

All ranks decide alike, from numbers that were averaged over them: one all-reduce of three floats and one wait for the device
per optimizer step. A signal to stop (`GracefulStop`) travels with them. A run that has rejected more than `max_rejected` steps
in a row stops before any of them reaches a checkpoint, and prints the option that skips their data, from `rewind_steps` before
them, as PaLM did (arXiv:2204.02311, 5.1).
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
from pile_app.training.callbacks import keep_lines
from pile_app.training.checkpoints import GracefulStop
from pile_app.training.module import PileModule

log = logging.getLogger(__name__)

PASSED_OVER = "passed over"


@dataclass(frozen=True)
class GuardConfig:
    """Which optimizer steps are not taken. See `guards.py`.

    Args:
        max_rejected: steps in a row that may be rejected; with one more the run stops.
        rewind_steps: optimizer steps before the first rejected one that a run that stops advises to pass over too.
        skip_steps: first and last of the optimizer steps, counted from 1, whose data are passed over. A range that begins
            before `last.ckpt` takes the run back to the checkpoint before.
    """

    max_rejected: int = 10
    rewind_steps: int = 100
    skip_steps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_rejected", 0), ("rewind_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be at least {least}")
        for first, last in self.skip_steps:
            if not 1 <= first <= last:
                raise ValueError(f"guard.skip_steps: [{first}, {last}] is no range of steps: 1 <= first <= last")


class DivergedError(FloatingPointError):
    """Too many steps were rejected in a row, from `first` to `last`."""

    def __init__(self, message: str, first: int, last: int) -> None:
        super().__init__(message)
        self.first = first
        self.last = last


class StepGuard(Callback):
    """Rejects optimizer steps (see the module), lists them with their documents in `rejected.jsonl`, and keeps what is not
    finite out of checkpoints.

    A line of `rejected.jsonl` is what one device had of a rejected step: {"step": from 1, "reason", "loss", "gradient_norm",
    "positions": of its packs, "documents": [[source, key, epoch, first token, stop], ...]}.

    Ranks agree on `stop` together with the step.

    Raises:
        DivergedError: more than `max_rejected` steps in a row.
        FloatingPointError: weights or momenta are not finite when a checkpoint is due. It is not written.
    """

    def __init__(self, run: Path, config: GuardConfig, stop: GracefulStop) -> None:
        self.path = run / "rejected.jsonl"
        self.config = config
        self.stop = stop
        self.counts: Counter[str] = Counter()  # of rejected steps, by reason
        self.in_a_row = 0
        self.reason = ""  # why the step under way was rejected
        self.step: dict[str, float] = {}
        self.packs: list[tuple[int, list[Any]]] = []  # (position, documents) of the step under way

    @property
    def state_key(self) -> str:
        return "StepGuard"

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "in_a_row": self.in_a_row,
            "skip_steps": [list(one) for one in self.config.skip_steps],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = Counter(state_dict["counts"])
        self.in_a_row = state_dict["in_a_row"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PileModule)
        pl_module.guard = self

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a killed attempt rejected after its last checkpoint comes anew."""
        if trainer.is_global_zero:
            keep_lines(self.path, lambda entry: entry["step"] <= trainer.global_step)
        trainer.strategy.barrier("rejected")

    def skips(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 1, is not trained on at all."""
        return any(first <= step <= last for first, last in self.config.skip_steps)

    def rejects(self, module: PileModule, loss: Tensor, gradient_norm: Tensor) -> bool:
        """Whether the optimizer step under way is not to be taken; the same on all ranks.

        Args:
            module: in training.
            loss: () of this rank's share of the step.
            gradient_norm: () of all gradients, before they are clipped.
        """
        trainer = module.trainer
        signalled = torch.full((), float(self.stop.is_due), device=loss.device)
        figures = torch.stack([loss.float(), gradient_norm.float(), signalled])
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
        assert isinstance(pl_module, PileModule)
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
        # A device that stopped alone would leave the others waiting for it.
        if trainer.strategy.reduce_boolean_decision(bool(name), all=False):
            raise FloatingPointError(
                f"after step {trainer.global_step} {name or 'the part of another device'} holds values that are not finite: "
                "lower the learning rate. They were not saved; the last checkpoint is from before"
            )


def find_not_finite(state: Any) -> str:
    """The path of a tensor in nested dictionaries and lists that holds nan or inf, "" where there is none.

    Waits once for each device, however many tensors it holds. Of a sharded tensor the part of this rank counts.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for keys, value in tree_leaves_with_path(state):
        local = value.to_local() if hasattr(value, "to_local") else value
        if isinstance(local, Tensor) and local.is_floating_point():
            path = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
            by_device[local.device].append((path, local.isfinite().all()))
    for entries in by_device.values():
        for (path, _), finite in zip(entries, torch.stack([flag for _, flag in entries]).tolist(), strict=True):
            if not finite:
                return path
    return ""
