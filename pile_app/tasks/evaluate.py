"""Evaluate a run: `Trainer.validate` on any shards, with figures by source.

    text    perplexity, accuracy of the next token, bits per UTF-8 byte
    image   bits of the codes per pixel and channel, PSNR of the codec
    audio   bits of the codes per second, log-mel distance of the codec
    metrics of the run's objective, such as accuracy, precision, recall and F1

Bits per byte are those of The Pile (arXiv:2101.00027, section 3.1): nats of tokens that write text, by ln 2 and their
UTF-8 bytes; "all" is over all bytes, "weighted" by the sources' weights in training. Documents are packed as in validation: no
piece of a long document sees the pieces before it, so bits per byte exceed those of overlapping windows.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio

from pile_app.data.batch import Batch
from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.files import whole_file
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT
from pile_app.training.load import fast_precision, find_checkpoint, load_run, read_config
from pile_app.training.metrics import likelihoods, validation_values
from pile_app.training.module import PileModule
from pile_app.training.report import short
from pile_app.training.wandb_run import WandbRun


class SourceFigures(Callback):
    """Measure by source what validation does not: quality of the codecs, documents, rejected documents."""

    def __init__(self) -> None:
        self.documents: Counter[int] = Counter()
        self.rejected: Counter[tuple[int, str]] = Counter()
        self.table = torch.zeros(0)  # of `TokenMetrics`

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        count = len(trainer.datamodule.validation_names)  # type: ignore[attr-defined]
        self.psnr = nn.ModuleList(PeakSignalNoiseRatio(data_range=255.0) for _ in range(count)).to(module.device)
        self.log_mel = nn.ModuleList(MeanMetric() for _ in range(count)).to(module.device)

    @torch.no_grad()
    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, *_: Any) -> None:
        assert isinstance(module, PileModule)
        image_codec, audio_codec = module.model.image_codec, module.model.audio_codec
        self.documents.update(source for pack in batch.documents for source, _, _, start, _ in pack if start == 0)
        self.rejected.update((source, reason) for source, _, reason, _ in batch.rejected)
        if image_codec is not None and len(batch.images):
            images, decoded = batch.images.float(), image_codec.decode(image_codec.encode(batch.images)).float()
            sources = batch.source.flatten()[batch.image_starts[: len(images)].long()]
            for source in sources.unique().tolist():
                self.psnr[source].update(decoded[sources == source], images[sources == source])
        if audio_codec is not None and len(batch.audio):
            tokens = batch.audio_tokens
            decoded = audio_codec.decode(audio_codec.encode(batch.audio, tokens), tokens)
            distances = audio_codec.log_mel_distances(batch.audio, decoded, tokens)
            sources = batch.source.flatten()[batch.audio_starts.long()]
            sources = sources.repeat_interleave(tokens * audio_codec.config.frames_per_token)
            for source in sources.unique().tolist():
                self.log_mel[source].update(distances[sources == source])

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the table, which the module's own hook resets afterwards."""
        assert isinstance(module, PileModule)
        self.table = module.token_metrics.compute().cpu().clone()

    def of_source(self, source: int, data: PileDataModule, found: dict[str, dict[str, float]]) -> dict[str, Any]:
        """All figures of a source; `found`: its likelihoods by modality."""
        metrics: list[tuple[int, str, Any]] = [(IMAGE, "psnr", self.psnr[source])]
        metrics.append((AUDIO, "log_mel_distance", self.log_mel[source]))
        for modality, name, metric in metrics:
            if metric._update_count:
                found.setdefault(MODALITIES[modality], {})[name] = float(metric.compute())
        rejected = Counter({reason: count for (of, reason), count in sorted(self.rejected.items()) if of == source})
        rejected.update(data.validation_data[source].rejected())
        return {"documents": self.documents[source], "rejected": dict(rejected), **found}


def evaluate(run: Path, on: Mapping[str, str], checkpoint: str = "auto", output: Path | None = None) -> dict[str, Any]:
    """Evaluate a run on `on`, name -> pattern of shards (empty: its own validation sources), and save the figures as JSON
    (None: `evaluation.json` in the run's folder) and in the summary of its W&B run. Raises ValueError or ShardError."""
    config = read_config(run)
    module, data, saved = load_run(run, checkpoint)
    weights = {name: source.weight for name, source in data.sources.items()}
    if on:
        data.sources, data.prepare = {name: Source(train=pattern, validation=pattern) for name, pattern in on.items()}, None
    elif not any(source.validation for source in data.sources.values()):
        raise ValueError(f"run {str(run)!r} has no validation source: name shards with --on NAME=SHARDS")
    figures = SourceFigures()
    precision: Any = config["trainer"].get("precision") or fast_precision("auto")
    trainer = Trainer(
        accelerator="auto", devices=1, precision=precision, callbacks=[figures], logger=False, enable_checkpointing=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    logged = trainer.validate(module, datamodule=data, verbose=False)[0]
    names, vocabulary = data.validation_names, module.vocabulary
    found = [likelihoods(rows, vocabulary) for rows in figures.table]
    sources = {name: figures.of_source(number, data, found[number]) for number, name in enumerate(names)}
    result: dict[str, Any] = {
        "run": str(run), "checkpoint": str(find_checkpoint(run, checkpoint)), "step": saved["global_step"],
        "context": data.context, "precision": str(trainer.precision), "sources": sources,
        "all": likelihoods(figures.table.sum(0), vocabulary),
    }  # fmt: skip
    values = {
        f"{name}/{modality}_{figure}": value
        for name, found in [*sources.items(), ("all", result["all"])]
        for modality in MODALITIES
        for figure, value in found.get(modality, {}).items()
    }
    bits: dict[str, Any] = {name: found.get(MODALITIES[TEXT], {}).get("bits_per_byte") for name, found in sources.items()}
    parts: list[Any] = [weights.get(name) for name in sources]
    if len(sources) > 1 and None not in (*parts, *bits.values()):
        shares = dict(zip(sources, np.divide(parts, np.sum(parts)).tolist(), strict=True))  # by the weights in training
        result["weighted"] = {"shares": shares, "bits_per_byte": sum(shares[name] * bits[name] for name in sources)}
        values["weighted/text_bits_per_byte"] = result["weighted"]["bits_per_byte"]
    if module.objective is not None:
        known = {*validation_values(figures.table, names, vocabulary), *(f"{name}_codec_loss" for name in MODALITIES)}
        metrics = {name.removeprefix("validation/"): float(value) for name, value in logged.items()}
        result["objective"] = {name: value for name, value in metrics.items() if name not in known}
        values |= {f"objective/{name}": value for name, value in result["objective"].items()}
    if (confusion := getattr(module.objective, "confusion", None)) is not None:
        labels: list[str] = module.objective.labels  # type: ignore[union-attr, assignment]
        rows = (dict(zip(labels, row, strict=True)) for row in confusion.tolist())
        result["confusion"] = dict(zip(labels, rows, strict=True))
    save_figures(result, values, output or run / "evaluation.json", run, config.get("wandb"))
    return result


def save_figures(result: Mapping[str, Any], values: Mapping[str, float], file: Path, run: Path, project: str | None) -> None:
    """Write the result as JSON, and the values under `evaluation/` into the summary of the run's W&B run, if it has a project
    (offline: in another folder for `wandb sync`)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(str(file)) as written:
        written.write(json.dumps(result, indent=1).encode())
    if project is not None:
        experiment = WandbRun(run, project, "evaluation").experiment
        experiment.summary.update({f"evaluation/{name}": value for name, value in values.items()})
        experiment.finish()


def print_tables(result: Mapping[str, Any]) -> None:
    """Print one table a modality, a line a source, then the objective's metrics."""
    sources: dict[str, Any] = {**result["sources"], **({"all": result["all"]} if len(result["sources"]) > 1 else {})}
    for modality in MODALITIES:
        rows = {name: found[modality] for name, found in sources.items() if found.get(modality)}
        if rows and modality == MODALITIES[TEXT] and "weighted" in result:
            rows["weighted"] = result["weighted"]
        names = list(dict.fromkeys(figure for figures in rows.values() for figure in figures if figure != "shares"))
        cells = [[name, *(short(figures[n]) if n in figures else "" for n in names)] for name, figures in rows.items()]
        print_table(f"{modality}, step {result['step']:,}", ["source", *names], cells)
    metrics: dict[str, float] = result.get("objective", {})
    by_label: dict[str, dict[str, float]] = {}  # "f1/happy" -> its row and column
    for name, value in metrics.items():
        if "/" in name:
            by_label.setdefault(name.partition("/")[2], {})[name.partition("/")[0]] = value
    print_table("objective", ["metric", "value"], [[name, short(value)] for name, value in metrics.items() if "/" not in name])
    found = {name: None for row in by_label.values() for name in row}
    cells = [[label, *(short(row[n]) if n in row else "" for n in found)] for label, row in by_label.items()]
    print_table("by label", ["label", *found], cells)
    counts = result.get("confusion", {})
    lines = [[label, *map(str, row.values())] for label, row in counts.items()]
    print_table("documents by true label (row) and predicted label (column)", ["label", *counts], lines)
    if rejected := {name: found["rejected"] for name, found in result["sources"].items() if found["rejected"]}:
        print(f"documents that could not be used: {rejected}")


def print_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table, figures to the right; nothing if it has no rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading.replace("_", " "), justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    if rows:
        Console(width=None if sys.stdout.isatty() else 160).print(table)  # a file has room
