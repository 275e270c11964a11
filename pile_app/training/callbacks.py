"""Callbacks: what is measured, kept and shown while a run trains. Checkpoints and stopping are in `checkpoints.py`, steps that
are not taken in `guards.py`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from pile_app.data.batch import PADDING, Batch
from pile_app.data.datamodule import data_parallel
from pile_app.data.files import ShardError
from pile_app.documents import MODALITIES, TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate, plain
from pile_app.training.module import PileModule
from pile_app.training.wandb_run import log_samples, step_of

log = logging.getLogger(__name__)
MOST_REJECTED_AT_INDEXING = 0.5  # of a source, whose rejected samples are printed before training starts


class DataReport(Callback):
    """Counts padding, tokens of each source, and documents that could not be used, which it lists in `quarantine.jsonl` (see
    `count_quarantined`).

    Args:
        run: the run's folder.
        max_rejected_share: stop above this fraction: of the samples of a source when it was indexed, and of the documents read,
            once there are 100.

    Raises:
        RuntimeError: more than that share could not be used, of the documents of any device.
    """

    def __init__(self, run: Path, max_rejected_share: float) -> None:
        self.path = run / "quarantine.jsonl"
        self.max_rejected_share = max_rejected_share
        self.documents = 0
        self.rejected: Counter[str] = Counter()
        self.source_tokens: Counter[str] = Counter()
        self.padding: torch.Tensor | None = None  # places of it; on the device, where to read it is to wait for it
        self.places = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "rejected": dict(self.rejected),
            "source_tokens": dict(self.source_tokens),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.documents = state_dict["documents"]
        self.rejected = Counter(state_dict["rejected"])
        self.source_tokens = Counter(state_dict["source_tokens"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the entries after the checkpoint that is resumed, and check how many documents were rejected at indexing."""
        if trainer.is_global_zero:
            keep_lines(self.path, lambda entry: entry["step"] <= trainer.global_step)
        trainer.strategy.barrier("quarantine")
        for data in trainer.datamodule.train_data:  # type: ignore[attr-defined]
            count = sum(data.rejected().values())
            if count > max(MOST_REJECTED_AT_INDEXING, self.max_rejected_share) * (count + len(data)):
                raise ShardError(
                    f"source {data.name!r}: {count:,} of {count + len(data):,} samples cannot be used ({data.rejected()}): "
                    "fix the data or its `fields`, or raise data.max_rejected_share above that fraction"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.documents += sum(map(len, batch.documents))
        padding = (batch.document == PADDING).sum()
        self.padding = padding if self.padding is None else self.padding + padding
        self.places += batch.document.numel()
        self._record(trainer, "train", batch, batch_idx // trainer.accumulate_grad_batches + 1)
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step:
            self.source_tokens.update(dict(zip(trainer.datamodule.source_names, batch.source_tokens, strict=True)))  # type: ignore[attr-defined]
        if not is_step or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        pl_module.log("data/padding_share", float(self.padding) / self.places, rank_zero_only=True, batch_size=1)
        values = {f"data/tokens/{name}": float(tokens) for name, tokens in self.source_tokens.items()}
        values |= {f"data/rejected/{name}": float(count) for name, count in self.rejected.items()}
        pl_module.log_dict(values, rank_zero_only=True, batch_size=1)
        self.padding, self.places = None, 0
        count = sum(self.rejected.values())
        too_many = count > self.max_rejected_share * max(100, self.documents)
        if trainer.strategy.reduce_boolean_decision(too_many, all=False):
            raise RuntimeError(
                f"{count} of {self.documents:,} documents could not be used ({dict(self.rejected)}), more than "
                f"data.max_rejected_share={self.max_rejected_share:.1%}. They are listed in {self.path}"
            )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        self._record(trainer, "validation", batch, trainer.global_step)

    def _record(self, trainer: Trainer, split: Literal["train", "validation"], batch: Batch, step: int) -> None:
        if not batch.rejected:
            return
        names = trainer.datamodule.source_names if split == "train" else trainer.datamodule.validation_names  # type: ignore[attr-defined]
        with open(self.path, "a") as file:
            for source, key, reason, detail in batch.rejected:
                if split == "train":
                    self.rejected[f"{names[source]}/{reason}"] += 1
                entry = {"step": step, "split": split, "source": names[source], "key": key}
                file.write(json.dumps(entry | {"reason": reason, "detail": detail}) + "\n")


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the lines of a JSON lines file that are not wanted, and one that a kill left unfinished."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines if wanted(json.loads(line))))
    os.replace(temporary, path)


class Ledger(Callback):
    """Writes down which documents each optimizer step was trained on, in `ledger/`: what `read_ledger` reads. (Steps that
    `rejected.jsonl` names stand there as well: they were read, and not taken.)

    A line a pack: {"step": from 1, "position": of the pack, "documents": [[source, key, epoch, first token, stop], ...]}. Each
    device writes a file of its own; how the packs were shared out does not show in what is read.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "ledger"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a killed attempt wrote after its last checkpoint comes anew."""
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            for path in sorted(self.folder.glob("*.jsonl")):
                keep_lines(path, lambda entry: entry["step"] <= trainer.global_step)
        trainer.strategy.barrier("ledger")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = batch_idx // trainer.accumulate_grad_batches + 1
        sources: list[str] = trainer.datamodule.source_names  # type: ignore[attr-defined]
        mesh = pl_module.device_mesh
        if mesh is not None and mesh["tensor_parallel"].get_local_rank():
            return  # trained on what the first of its group writes down
        with open(self.folder / f"rank-{trainer.global_rank}.jsonl", "a") as file:
            for position, documents in zip(batch.numbers, batch.documents, strict=True):
                named = [[sources[source], *rest] for source, *rest in documents]
                file.write(json.dumps({"step": step, "position": position, "documents": named}) + "\n")


def read_ledger(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's ledger, by position. Raises ValueError: a position stands there twice or is missing."""
    paths = sorted((run / "ledger").glob("*.jsonl"))
    entries = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    entries.sort(key=lambda entry: entry["position"])
    if [entry["position"] for entry in entries] != list(range(len(entries))):
        raise ValueError(f"the ledger of {run} holds a position twice, or lacks one")
    return entries


def count_quarantined(run: Path) -> dict[str, dict[str, int]]:
    """Source -> reason -> documents that could not be used, each counted once however often it came up."""
    path = run / "quarantine.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    counts: dict[str, dict[str, int]] = {}
    for source, _, reason in sorted({(entry["source"], entry["key"], entry["reason"]) for entry in entries}):
        reasons = counts.setdefault(source, {})
        reasons[reason] = reasons.get(reason, 0) + 1
    return counts


class Throughput(Callback):
    """Tokens a second by modality, share of the time spent waiting for data, and model FLOP utilization.

    The utilization is against a matrix product measured on this machine at the start, so 1 would be "every cycle multiplies".
    """

    def __init__(self) -> None:
        self.peak_flops = 0.0
        self._reset()

    def _reset(self) -> None:
        self.tokens = [0, 0, 0]
        self.attended: list[torch.Tensor] = []  # (2,) of each batch: places that hold something, tokens that they look at
        self.waited = 0.0
        self.began = self.ended = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peak_flops = measure_matmul_flops(pl_module.device)
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.waited += time.perf_counter() - self.ended

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        away = time.perf_counter() - self.paused
        self.began += away
        self.ended += away

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PileModule)
        for modality, targets in enumerate(batch.targets):
            self.tokens[modality] += len(targets)
        if not pl_module.in_codec_phase:
            is_token = batch.document != PADDING
            self.attended.append(torch.stack([is_token.sum(), (batch.position + 1).mul(is_token).sum()]))
        self.ended = time.perf_counter()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        seconds = max(self.ended - self.began, 1e-9)
        shares, _ = data_parallel(trainer)
        values = {
            f"throughput/{MODALITIES[m]}_tokens_per_second": self.tokens[m] * shares / seconds
            for m in pl_module.vocabulary.modalities
        }
        values["throughput/tokens_per_second"] = sum(values.values())
        values["throughput/data_wait_share"] = self.waited / seconds
        if self.attended:
            places, attended = torch.stack(self.attended).sum(0).tolist()
            flops = places * shares / trainer.world_size * pl_module.model.flops_per_token(attended / max(1, places))
            values["throughput/model_flop_utilization"] = flops / seconds / self.peak_flops
        pl_module.log_dict(values, rank_zero_only=True, batch_size=1)
        speed = values["throughput/tokens_per_second"]
        pl_module.log("tokens/s", speed, prog_bar=True, logger=False, rank_zero_only=True, batch_size=1)
        self._reset()


def measure_matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large matrix product in the precision the device trains fastest in, best of a few."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


class PileProgressBar(TQDMProgressBar):
    """Loss of each modality and tokens a second, with the time that is left. Refreshed rarely where no one watches."""

    def __init__(self) -> None:
        import sys

        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)
        self.shown: tuple[int, dict[str, Any]] = (-1, {})

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        step = trainer.global_step // trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self.shown[0]:
            return dict(self.shown[1])  # nothing new was logged, and to read what was waits for the device
        self.shown = (step, self._read_metrics(trainer, pl_module))
        return dict(self.shown[1])

    def _read_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if not pl_module.in_codec_phase:
            metrics = {name: value for name, value in metrics.items() if not name.endswith("_codec_loss")}
        return {name.removeprefix("train/"): value for name, value in metrics.items()}


class SampleGeneration(Callback):
    """Lets the model read and write in every modality, and keeps what comes out in `samples/step-.../` and W&B.

    Args:
        every_n_steps: optimizer steps between samples; there is always one at the end of a run.
        count: documents from the validation data that prompts are taken from.
        sampling: how tokens are drawn.
    """

    def __init__(self, every_n_steps: int = 500, count: int = 8, sampling: Sampling = Sampling(guidance=2.0)) -> None:  # noqa: B008
        if every_n_steps < 1 or count < 1:
            raise ValueError(f"every_n_steps and count must be at least 1, not {every_n_steps} and {count}")
        self.every_n_steps = every_n_steps
        self.count = count
        self.sampling = sampling

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        last = trainer.fit_loop.epoch_loop.max_steps
        due = step % self.every_n_steps == 0 or step == last
        if due and not pl_module.in_codec_phase and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PileModule)
        model = pl_module.whole_model()
        if model is None:
            return
        folder = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:08d}"
        entries = []
        for title, prompts, to, references in self._prompts(trainer, model):
            answers = generate(model, prompts, to, self.sampling)
            for prompt, answer, reference in zip(prompts, answers, references, strict=True):
                entries.append((title, prompt, answer, reference))
        write_samples(folder, [plain_example(model, *entry) for entry in entries])
        log_samples(trainer, folder, step_of(folder))

    def _prompts(
        self, trainer: Trainer, model: FusedLanguageModel
    ) -> list[tuple[str, list[Document], int, list[Segment | None]]]:
        """(title, prompts, modality wanted, real media to set beside) for each transition that the validation data shows.

        A document of several segments gives its first as the prompt and its second as the reference; a plain text gives its
        beginning.
        """
        kinds: dict[tuple[int, int], tuple[list[Document], list[Segment | None]]] = defaultdict(lambda: ([], []))
        for data in trainer.datamodule.validation_data or trainer.datamodule.train_data:  # type: ignore[attr-defined]
            for number in range(min(len(data), 64 * self.count)):
                try:  # codes of a medium are the better prompt: they need not be made again
                    prompt, *rest = (plain(model, s) if s.modality == TEXT else s for s in data.document(number).segments)
                except ValueError:
                    continue  # bad samples are counted where they are read for training
                if any(segment.is_encoded and segment.codes.is_lost for segment in (prompt, *rest)):
                    continue
                reference = rest[0] if rest else None
                if reference is None and prompt.modality == TEXT and len(prompt.text) > 80:
                    prompt = Segment(prompt.text[:60])
                elif reference is None or not reference.loss or prompt.modality == reference.modality == TEXT:
                    continue
                prompts, references = kinds[prompt.modality, reference.modality if reference else TEXT]
                if len(prompts) < (self.count if reference else 2):
                    prompts.append(Document((prompt,)))
                    references.append(reference)
        return [
            (f"{MODALITIES[source]} → {MODALITIES[to]}", prompts, to, references)
            for (source, to), (prompts, references) in sorted(kinds.items())
        ]


def plain_example(
    model: FusedLanguageModel, title: str, prompt: Document, answer: Segment, reference: Segment | None
) -> tuple[str, Document, Segment, Segment | None]:
    """An entry of `write_samples` without encoded segments."""
    shown = Document(tuple(plain(model, segment) for segment in prompt.segments))
    return title, shown, answer, plain(model, reference) if reference else None


def write_samples(folder: Path, entries: list[tuple[str, Document, Segment, Segment | None]]) -> None:
    """Prompts, answers and references as PNG, WAV and TXT, with `samples.json` saying which is which (see `report.py`)."""
    folder.mkdir(parents=True, exist_ok=True)

    def keep(number: int, role: str, *segments: Segment | None) -> list[dict[str, str]]:
        parts = []
        for segment in filter(None, segments):
            name, is_text = f"{number:03d}-{role}.{segment.extension}", segment.modality == TEXT
            if role == "output" or not is_text:
                (folder / name).write_bytes(segment.text.encode() if is_text else segment.file)
            parts.append({"modality": MODALITIES[segment.modality], **({"text": segment.text} if is_text else {"file": name})})
        return parts

    described = [
        {
            "title": title,
            "prompt": keep(number, "prompt", *prompt.segments),
            "outputs": keep(number, "output", answer),
            "references": keep(number, "reference", reference),
        }
        for number, (title, prompt, answer, reference) in enumerate(entries)
    ]
    (folder / "samples.json").write_text(json.dumps(described, indent=1, ensure_ascii=False))
