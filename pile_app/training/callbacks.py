"""Callbacks that measure, record and show a run while it trains. Stopping: `checkpoints.py`, rejected steps: `guards.py`."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from pile_app.data.batch import Batch
from pile_app.data.datamodule import data_parallel
from pile_app.data.files import ShardError, whole_file
from pile_app.documents import MODALITIES, TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate, plain
from pile_app.training.module import PileModule
from pile_app.training.wandb_run import log_samples

Questions = dict[tuple[str, int], list[tuple[Document, Segment | None]]]
SAMPLING = Sampling(temperature=0.9, top_p=0.9, guidance=2.0, max_text=128, max_seconds=4.0)  # of samples by default
MOST_REJECTED_AT_INDEXING = 0.5  # of a source, whose rejected samples are printed before training starts


def drop_later_lines(trainer: Trainer, paths: Iterable[Path]) -> None:
    """Drop what a killed process wrote into JSON lines files after its last checkpoint. All ranks have to call it."""
    for path in paths if trainer.is_global_zero else ():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # the last may be unfinished
        with whole_file(path) as file:
            file.write("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= trainer.global_step).encode())
    trainer.strategy.barrier("lines")


def append_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Add entries, each with its "step", to a JSON lines file."""
    if lines := [json.dumps(entry) + "\n" for entry in entries]:
        with open(path, "a") as file:
            file.writelines(lines)


def named_documents(trainer: Trainer, documents: Iterable[Any]) -> list[list[Any]]:
    """[[source, key, epoch, first token, stop], ...] of a training batch's documents, whose sources are numbers."""
    sources: list[str] = trainer.datamodule.source_names  # type: ignore[attr-defined]
    return [[sources[source], *rest] for source, *rest in documents]


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def is_logged(trainer: Trainer, batch_idx: int) -> bool:
    return ends_step(trainer, batch_idx) and trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


class DataReport(Callback):
    """Count padding, tokens of each source and unusable documents, which are listed in `quarantine.jsonl`.

    Raises ShardError or RuntimeError if more than `max_rejected_share` is unusable: of the samples of a source when it was
    indexed (at least half), or of the documents that any device read, once there are 100.
    """

    def __init__(self, run: Path, max_rejected_share: float) -> None:
        self.path, self.max_rejected_share = run / "quarantine.jsonl", max_rejected_share
        self.documents = 0
        self.rejected, self.source_tokens = Counter[str](), Counter[str]()
        self.tokens = self.positions = 0  # of documents, and of their packs

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self.documents, "rejected": dict(self.rejected), "source_tokens": dict(self.source_tokens)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.documents = state_dict["documents"]
        self.rejected, self.source_tokens = Counter(state_dict["rejected"]), Counter(state_dict["source_tokens"])

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Drop the entries after the checkpoint that is resumed, and check how many documents were rejected at indexing."""
        drop_later_lines(trainer, self.path.parent.glob(self.path.name))
        for data in trainer.datamodule.train_data:  # type: ignore[attr-defined]
            count = sum(data.rejected().values())
            if count > max(MOST_REJECTED_AT_INDEXING, self.max_rejected_share) * (count + len(data)):
                bad, fix = f"{count:,} of {count + len(data):,} samples", "or raise data.max_rejected_share above that fraction"
                raise ShardError(f"source {data.name!r}: {bad} cannot be used ({data.rejected()}): fix data or `fields`, {fix}")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        names: list[str] = trainer.datamodule.source_names  # type: ignore[attr-defined]
        self.documents += sum(map(len, batch.documents))
        self.tokens += sum(batch.piece_lengths)
        self.positions += batch.tokens.numel()
        self._record("train", names, batch, batch_idx // trainer.accumulate_grad_batches + 1)
        self.rejected.update(f"{names[source]}/{reason}" for source, _, reason, _ in batch.rejected)
        if ends_step(trainer, batch_idx):
            self.source_tokens.update(dict(zip(names, batch.source_tokens, strict=True)))
        if not is_logged(trainer, batch_idx):
            return
        values = {"data/padding_share": 1 - self.tokens / self.positions}
        values |= {f"data/tokens/{name}": float(tokens) for name, tokens in self.source_tokens.items()}
        values |= {f"data/rejected/{name}": float(count) for name, count in self.rejected.items()}
        module.log_dict(values, rank_zero_only=True, batch_size=1)
        self.tokens = self.positions = 0
        count = sum(self.rejected.values())
        too_many = count > self.max_rejected_share * max(100, self.documents)
        if trainer.strategy.reduce_boolean_decision(too_many, all=False):
            what = f"{count} of {self.documents:,} documents could not be used ({dict(self.rejected)}), see {self.path}"
            raise RuntimeError(f"{what}: more than data.max_rejected_share={self.max_rejected_share:.1%}")

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, *_: Any) -> None:
        self._record("validation", trainer.datamodule.validation_names, batch, trainer.global_step)  # type: ignore[attr-defined]

    def _record(self, split: str, names: list[str], batch: Batch, step: int) -> None:
        for source, key, reason, detail in batch.rejected:
            entry = {"step": step, "split": split, "source": names[source], "key": key, "reason": reason, "detail": detail}
            append_lines(self.path, [entry])


def count_quarantined(run: Path) -> dict[str, dict[str, int]]:
    """Return source -> reason -> unusable documents, each counted once however often it was read."""
    path = run / "quarantine.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for source, _, reason in sorted({(entry["source"], entry["key"], entry["reason"]) for entry in entries}):
        counts[source][reason] += 1
    return {source: dict(reasons) for source, reasons in counts.items()}


class Ledger(Callback):
    """Record the documents of each optimizer step in `ledger/rank-*.jsonl`, for `read_ledger`. Rejected steps are included.

    A line a pack: {"step": from 1, "position": of the pack, "documents": [[source, key, epoch, first token, stop], ...]}.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "ledger"

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        drop_later_lines(trainer, self.folder.glob("*.jsonl"))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        mesh = module.device_mesh
        if mesh is not None and mesh["tensor_parallel"].get_local_rank():
            return  # trained on what the first of its group records
        step, packs = batch_idx // trainer.accumulate_grad_batches + 1, zip(batch.numbers, batch.documents, strict=True)
        entries = ({"step": step, "position": number, "documents": named_documents(trainer, some)} for number, some in packs)
        append_lines(self.folder / f"rank-{trainer.global_rank}.jsonl", entries)


def read_ledger(run: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's ledger, by position. Raises ValueError if a position is missing or recorded twice."""
    entries = [json.loads(line) for path in (run / "ledger").glob("*.jsonl") for line in path.read_text().splitlines()]
    entries.sort(key=lambda entry: entry["position"])
    if [entry["position"] for entry in entries] != list(range(len(entries))):
        raise ValueError(f"the ledger of {run} holds a position twice, or lacks one")
    return entries


class Throughput(Callback):
    """Log tokens per second by modality, the fraction of time spent waiting for data, and model FLOP utilization.

    The utilization is relative to a matrix product measured on this machine at the start: 1 means that every cycle multiplies.
    (Lightning's ThroughputMonitor knows peaks of GPUs only, and neither waiting nor modalities.)
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.peak_flops = measure_matmul_flops(module.device)
        self._reset(trainer)

    def _reset(self, trainer: Trainer) -> None:
        self.tokens = [0, 0, 0]
        self.read = self.attended = 0  # tokens of the language model, and tokens that they attend to
        self.waited = getattr(trainer.train_dataloader, "waited", 0.0)  # before this interval
        self.began = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if hasattr(self, "began"):
            self.began += time.perf_counter() - self.paused

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        assert isinstance(module, PileModule)
        self.tokens = [count + len(targets) for count, targets in zip(self.tokens, batch.targets, strict=True)]
        if not module.in_codec_phase:
            self.read += sum(batch.piece_lengths)
            self.attended += sum(length * (length + 1) // 2 for length in batch.piece_lengths)
        if not is_logged(trainer, batch_idx):
            return
        seconds, (shares, _) = max(time.perf_counter() - self.began, 1e-9), data_parallel(trainer)
        waited = getattr(trainer.train_dataloader, "waited", 0.0) - self.waited
        speeds = {MODALITIES[m]: self.tokens[m] * shares / seconds for m in module.vocabulary.modalities}
        values = {f"throughput/{name}_tokens_per_second": speed for name, speed in speeds.items()}
        values |= {"throughput/tokens_per_second": sum(speeds.values()), "throughput/data_wait_share": waited / seconds}
        if self.read:
            flops = self.read * shares / trainer.world_size * module.model.flops_per_token(self.attended / self.read)
            values["throughput/model_flop_utilization"] = flops / seconds / self.peak_flops
        module.log_dict(values, rank_zero_only=True, batch_size=1)
        module.log("tokens/s", sum(speeds.values()), prog_bar=True, logger=False, rank_zero_only=True, batch_size=1)
        self._reset(trainer)


def measure_matmul_flops(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product in the precision the device trains fastest in, best of a few."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if cuda else lambda: None
    best = float("inf")
    for _ in range(5):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


class PileProgressBar(TQDMProgressBar):
    """Show the loss of each modality, tokens per second and the remaining time; rarely if stderr is no terminal."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)
        self.shown: tuple[int, dict[str, Any]] = (-1, {})

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        step = trainer.global_step // trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self.shown[0]:  # something new was logged; reading it waits for the device
            hidden = ("v_num",) if module.in_codec_phase else ("v_num", "_codec_loss")
            metrics = super().get_metrics(trainer, module).items()
            self.shown = step, {name.removeprefix("train/"): v for name, v in metrics if not name.endswith(hidden)}
        return dict(self.shown[1])


class SampleGeneration(Callback):
    """Let the model answer prompts in every modality, and write the answers to `samples/step-.../` and W&B.

    Args:
        every_n_steps: optimizer steps between samples; None: at each validation (of a model that is not sharded). There are
            always samples at the end of a run.
        count: documents from the validation data that prompts are taken from, for each pair of modalities.
        sampling: how tokens are drawn.
    """

    def __init__(self, every_n_steps: int | None = None, count: int = 4, sampling: Sampling = SAMPLING) -> None:
        if (every_n_steps is not None and every_n_steps < 1) or count < 1:
            raise ValueError(f"every_n_steps and count must be at least 1, not {every_n_steps} and {count}")
        self.every_n_steps, self.count, self.sampling = every_n_steps, count, sampling
        self.written = -1  # the last step with samples

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        is_due = trainer.global_step == trainer.fit_loop.epoch_loop.max_steps
        is_due |= self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if is_due and not module.in_codec_phase and ends_step(trainer, batch_idx):
            self.write(trainer, module.whole_model(), trainer.global_step - 1)  # type: ignore[operator]

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Write before W&B has the step of the validation."""
        assert isinstance(module, PileModule)
        is_training = trainer.state.fn == "fit" and not module.in_codec_phase
        if is_training and self.every_n_steps is None and module.whole is None:
            self.write(trainer, module.whole_model(), trainer.global_step - 1)

    def evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Write the samples of a run that ended before its last step, as by early stopping. Called on the first device."""
        assert isinstance(module, PileModule)
        if trainer.global_step >= module.codec_steps:
            self.write(trainer, module.model, trainer.global_step)
        return {}

    def write(self, trainer: Trainer, model: FusedLanguageModel | None, logged_at: int) -> None:
        """Write the samples of a step once. model: None except on the first device; logged_at: W&B's step of them."""
        if model is None or self.written == trainer.global_step:
            return
        self.written = trainer.global_step
        entries: list[Example] = []
        for (title, to), asked in sorted(self._questions(trainer, model).items(), key=lambda item: item[0]):
            prompts = [prompt for prompt, _ in asked]
            has_condition = any(segment.modality != to for segment in prompts[0].segments)  # which training hides at times
            answers = generate(model, prompts, to, self.sampling if has_condition else replace(self.sampling, guidance=1.0))
            entries += [(title, prompt, answer, real) for (prompt, real), answer in zip(asked, answers, strict=True)]
        if entries:
            folder = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:08d}"
            write_samples(folder, entries, model)
            log_samples(trainer, folder, logged_at)

    def _questions(self, trainer: Trainer, model: FusedLanguageModel) -> Questions:
        """Return (title, modality to generate) -> (prompt, reference) of each pair of modalities in the validation data."""
        found: Questions = defaultdict(list)
        for data in trainer.datamodule.validation_data or trainer.datamodule.train_data:  # type: ignore[attr-defined]
            for number in range(min(len(data), 64 * self.count)):
                try:
                    document = data.document(number)
                    segments = tuple(plain(model, s) if s.modality == TEXT else s for s in document.segments)
                except ValueError:
                    continue  # bad samples are counted where they are read for training
                if any(segment.is_encoded and segment.codes.is_lost for segment in segments):
                    continue
                for prompt, to, reference in questions(replace(document, segments=segments)):
                    asked = " + ".join(dict.fromkeys(MODALITIES[segment.modality] for segment in prompt.segments))
                    some = found[f"{asked} → {MODALITIES[to]}" if asked else MODALITIES[to], to]
                    is_new = not prompt.segments or prompt not in [other for other, _ in some]
                    if is_new and len(some) < (self.count if reference else 2):
                        some.append((prompt, reference))
        return found


def questions(document: Document) -> Iterator[tuple[Document, int, Segment | None]]:
    """Yield (prompt, modality of the answer, reference) for each pair of modalities that the model learns from a document.

    A document of one text is prompted with its beginning, one of one medium with nothing. Where the order counts, the first
    learned segment after the first answers those before it; where it does not, each modality answers each of the others.
    """
    first, *rest = segments = document.segments
    if not rest and first.modality == TEXT:
        if beginning := first.text[: min(60, len(first.text) // 2)]:
            yield Document((Segment(beginning),)), TEXT, None
    elif not rest:
        yield Document(()), first.modality, first
    elif document.ordered:
        if learned := next((number for number, segment in enumerate(segments) if number and segment.loss), 0):
            yield Document(segments[:learned]), segments[learned].modality, segments[learned]
    else:
        each = {segment.modality: segment for segment in reversed(segments)}
        for prompt, answer in permutations([each[modality] for modality in sorted(each)], 2):
            if answer.loss:
                yield Document((prompt,)), answer.modality, answer


Example = tuple[str, Document, Segment, Segment | None]  # title, prompt, answer, reference


def write_samples(folder: Path, examples: Iterable[Example], model: FusedLanguageModel | None = None) -> None:
    """Write prompts, answers and references as PNG, WAV and TXT, and `samples.json`, which lists them for `report.py`.
    `model`: decodes those that are encoded."""
    folder.mkdir(parents=True, exist_ok=True)

    def keep(number: int, role: str, *segments: Segment | None) -> list[dict[str, str]]:
        parts = []
        for segment in (plain(model, segment) if model else segment for segment in segments if segment):
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
        for number, (title, prompt, answer, reference) in enumerate(examples)
    ]
    (folder / "samples.json").write_text(json.dumps(described, indent=1, ensure_ascii=False))
