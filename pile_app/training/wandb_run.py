"""The run in Weights & Biases, online with a key and offline without: one history, however often the run is resumed.

W&B's step is the optimizer step. Online, W&B skips the steps that it has from before the run was resumed. Offline, each attempt
would start an empty file, so a resumed run copies `metrics.csv` and `samples/` into its file and removes the older files.
`wandb sync` then replaces the earlier history.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class WandbRun(WandbLogger):
    """The W&B run of a run folder.

    Args:
        run: the run's folder; it keeps the W&B id.
        project: in W&B.
        attempt: "training" logs the history from its beginning, "evaluation" adds to the run that is there.
    """

    def __init__(self, run: Path, project: str, attempt: Literal["training", "evaluation"] = "training") -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_SILENT", "true")
        identity = run / "wandb" / "id"
        if not identity.exists():
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8])  # a sweep gives it
        resume = None if mode == "offline" and attempt == "training" else "allow"
        settings = wandb.Settings(silent=mode != "online", console="off")
        named: dict[str, Any] = {"name": run.name, "project": project, "id": identity.read_text(), "save_dir": str(run)}
        super().__init__(**named, resume=resume, mode=mode, settings=settings)
        self.run, self.mode = run, mode
        self._wandb_init.pop("anonymous", None)  # W&B warns of it

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is None or step >= self.experiment.step:  # else logged before the run was resumed
            self.experiment.log(dict(metrics) | ({} if step is None else {"trainer/global_step": step}), step=step)

    def log_samples(self, folder: Path, step: int) -> None:
        """Log a folder of `write_samples` as tables, pictures and players."""
        import wandb

        def cell(part: dict[str, str]) -> Any:
            if part["modality"] == "text":
                return part["text"]
            kind = wandb.Image if part["modality"] == "image" else wandb.Audio
            return kind(str(folder / part["file"]))

        rows = json.loads((folder / "samples.json").read_text())
        for title in dict.fromkeys(row["title"] for row in rows):
            pairs = [(row["prompt"][-1:], row["outputs"][0]) for row in rows if row["title"] == title]
            lines = [[*map(cell, prompt or [{"modality": "text", "text": ""}]), cell(answer)] for prompt, answer in pairs]
            table = wandb.Table(["prompt", "answer"], lines)
            media = {f"media/{title}": [cell(answer) for _, answer in pairs]} if pairs[0][1]["modality"] != "text" else {}
            self.log_metrics({f"samples/{title}": table} | media, step)

    def start(self, config: dict[str, Any], first_step: int) -> None:
        """Log the configuration and, offline, all that was logged before `first_step`."""
        self.log_hyperparams(config)
        earlier = [path for path in (self.run / "wandb").glob("offline-run-*") if path != Path(self.experiment.dir).parent]
        if self.mode != "offline" or not earlier or not (self.run / "metrics.csv").exists():  # refused before training
            return
        with open(self.run / "metrics.csv", newline="") as file:
            history: list[tuple[int, Any]] = [(int(row.pop("step")), row) for row in csv.DictReader(file)]
        # Samples of step-00000500 are logged at 499, the step of the last losses before them.
        history += [(int(folder.name[5:]) - 1, folder) for folder in (self.run / "samples").glob("step-*")]
        for step, logged in sorted(history, key=lambda entry: entry[0]):
            if step >= first_step:
                break
            if isinstance(logged, Path):
                self.log_samples(logged, step)
            else:
                self.log_metrics({name: float(value) for name, value in logged.items() if value}, step)
        for path in earlier:
            shutil.rmtree(path)


def log_samples(trainer: Trainer, folder: Path, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun):
            logger.log_samples(folder, step)


def close(trainer: Trainer) -> None:
    """Write what W&B still buffers."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbRun) and trainer.is_global_zero:
            logger.experiment.finish()
