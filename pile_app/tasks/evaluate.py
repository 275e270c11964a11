"""Evaluation of a trained run: `Trainer.validate` on any shards, and its figures by source.

    text    perplexity a token, accuracy of the next token, bits a UTF-8 byte
    image   bits of the codes a pixel and channel, PSNR of the codec
    audio   bits of the codes a second, log-mel distance of the codec
    objective of the run, if it has one: its metrics, such as accuracy, precision, recall and F1

Bits a byte are those of The Pile (arXiv:2101.00027, section 3.1): nats of all tokens that write text, divided by ln 2 and by
the UTF-8 bytes they write. As there, each source (component) has its own figure; "all" is the mean over all bytes, and
"weighted" the mean by the shares that the run gives its sources in training, where every evaluated source has one.

Documents are packed as in validation: one longer than the context is cut into pieces that see nothing of those before them
(docs/architecture.md, "Cutting"), so its bits a byte are above what a longer context, or overlapping windows, would give.
`score.rolling_scores` has overlapping windows.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio

from pile_app.data.batch import Batch
from pile_app.data.datamodule import Source
from pile_app.data.files import whole_file
from pile_app.documents import MODALITIES, TEXT
from pile_app.model.fused import full_precision
from pile_app.training.cli import fast_precision
from pile_app.training.load import find_checkpoint, load_run, read_config
from pile_app.training.metrics import likelihoods, validation_values
from pile_app.training.module import PileModule
from pile_app.training.wandb_run import WandbRun


class SourceFigures(Callback):
    """What validation alone does not measure: quality of the codecs, and documents, by source."""

    def __init__(self) -> None:
        self.documents: Counter[int] = Counter()
        self.rejected: Counter[tuple[int, str]] = Counter()
        self.likelihoods = torch.zeros(0)  # table of `TokenMetrics`, over all devices

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sources = len(trainer.datamodule.validation_names)  # type: ignore[attr-defined]
        self.psnr = nn.ModuleList(PeakSignalNoiseRatio(data_range=255.0) for _ in range(sources)).to(pl_module.device)
        self.log_mel = nn.ModuleList(MeanMetric() for _ in range(sources)).to(pl_module.device)

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        assert isinstance(pl_module, PileModule)
        model = pl_module.model
        self.documents.update(source for pack in batch.documents for source, _, _, start, _ in pack if start == 0)
        self.rejected.update((source, reason) for source, _, reason, _ in batch.rejected)
        if model.image_codec is not None and len(batch.images):
            with full_precision(batch):
                again = model.image_codec.decode(model.image_codec.encode(batch.images)).float()
            of = batch.source.flatten()[batch.image_starts[: len(batch.images)].long()]
            for number in of.unique().tolist():
                self.psnr[number].update(again[of == number], batch.images[of == number].float())
        if model.audio_codec is not None and len(batch.audio):
            codec, tokens = model.audio_codec, batch.audio_tokens
            with full_precision(batch):
                distances = codec.log_mel_distances(
                    batch.audio, codec.decode(codec.encode(batch.audio, tokens), tokens), tokens
                )
            of = batch.source.flatten()[batch.audio_starts.long()]
            of_frames = of.repeat_interleave(tokens * codec.config.frames_per_token)
            for number in of.unique().tolist():
                self.log_mel[number].update(distances[of_frames == number])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the module's, which resets the table."""
        assert isinstance(pl_module, PileModule)
        self.likelihoods = pl_module.token_metrics.compute().cpu().clone()

    def codec_figures(self, number: int) -> dict[str, dict[str, float]]:
        """Modality -> figure of its codec on a source, where it holds such media."""
        pairs: list[tuple[str, str, Any]] = [
            ("image", "psnr", self.psnr[number]),
            ("audio", "log_mel_distance", self.log_mel[number]),
        ]
        return {modality: {name: float(metric.compute())} for modality, name, metric in pairs if metric._update_count}


def evaluate(run: Path, on: Mapping[str, str], checkpoint: str = "last", output: Path | None = None) -> dict[str, Any]:
    """Evaluates a run; the figures also go to `output` (default: `evaluation.json` in the run's folder) and to its W&B run.

    Args:
        run: its folder.
        on: name -> pattern of shards; empty: the run's own sources of validation.
        checkpoint: see `load_run`.
        output: file to write.

    Raises:
        ValueError: `run` or `checkpoint` is not one, or there is nothing to evaluate on.
        ShardError: shards cannot be read.
    """
    config = read_config(run)
    module, data, saved = load_run(run, checkpoint)
    weights = {name: source.weight for name, source in data.sources.items()}
    if on:
        data.sources = {name: Source(train=pattern, validation=pattern) for name, pattern in on.items()}
        data.prepare = None
    elif not any(source.validation for source in data.sources.values()):
        raise ValueError(f"run {str(run)!r} has no source of validation: name shards with --on NAME=SHARDS")
    figures = SourceFigures()
    trainer = make_trainer(config, figures)
    logged: Mapping[str, Any] = trainer.validate(module, datamodule=data, verbose=False)[0]
    names, table, vocabulary = data.validation_names, figures.likelihoods, module.vocabulary
    known = {f"validation/{name}" for name in validation_values(table, names, vocabulary)}
    known |= {f"validation/{MODALITIES[modality]}_codec_loss" for modality in module.model.codecs}
    result: dict[str, Any] = {
        "run": str(run),
        "checkpoint": str(find_checkpoint(run, checkpoint)),
        "step": saved["global_step"],
        "context": data.context,
        "precision": str(trainer.precision),
        "sources": {},
    }
    for number, name in enumerate(names):
        by_modality = likelihoods(table[number], vocabulary)
        for modality, of_codec in figures.codec_figures(number).items():
            by_modality.setdefault(modality, {}).update(of_codec)
        rejected = {reason: count for (source, reason), count in sorted(figures.rejected.items()) if source == number}
        rejected_before = data.validation_data[number].rejected()
        result["sources"][name] = {
            "documents": figures.documents[number],
            "rejected": dict(Counter(rejected) + Counter(rejected_before)),
            **by_modality,
        }
    result["all"] = likelihoods(table.sum(0), vocabulary)
    if weighted := weighted_bits_per_byte(result["sources"], weights):
        result["weighted"] = weighted
    if module.objective is not None:
        result["objective"] = {n.removeprefix("validation/"): float(v) for n, v in logged.items() if n not in known}
    values = {
        f"{name}/{modality}_{figure}": value
        for name, source in [*result["sources"].items(), ("all", result["all"])]
        for modality, found in source.items()
        if modality in MODALITIES
        for figure, value in found.items()
    }
    values |= {f"objective/{name}": value for name, value in result.get("objective", {}).items()}
    if weighted:
        values["weighted/text_bits_per_byte"] = weighted["bits_per_byte"]
    keep(result, values, output or run / "evaluation.json", run, config.get("wandb"))
    return result


def make_trainer(config: Mapping[str, Any], *callbacks: Callback) -> Trainer:
    """Of one device, in the precision of the run."""
    precision: Any = config["trainer"].get("precision") or fast_precision("auto")
    return Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def weighted_bits_per_byte(sources: Mapping[str, Any], weights: Mapping[str, float | None]) -> dict[str, Any]:
    """Mean of the sources' bits a byte by their weights in training; nothing where one has no weight or no text."""
    shares = {name: weights.get(name) for name in sources}
    bits = {name: figures.get(MODALITIES[TEXT], {}).get("bits_per_byte") for name, figures in sources.items()}
    if len(sources) < 2 or None in shares.values() or None in bits.values():
        return {}
    total = sum(share for share in shares.values() if share)
    return {
        "shares": {name: (share or 0.0) / total for name, share in shares.items()},
        "bits_per_byte": sum((shares[name] or 0.0) * bits[name] for name in sources) / total,
    }


def keep(result: Mapping[str, Any], values: Mapping[str, float], file: Path, run: Path, project: str | None) -> None:
    """Writes the result as JSON, and its values into the summary of the run's W&B run, under `evaluation/`, where it has a
    project; offline that is one more folder for `wandb sync`."""
    with whole_file(str(file)) as written:
        written.write(json.dumps(result, indent=1).encode())
    if project is not None:
        experiment = WandbRun(run, project, "evaluation").experiment
        experiment.summary.update({f"evaluation/{name}": value for name, value in values.items()})
        experiment.finish()


# -- The table on the screen.

COLUMNS = {  # modality -> (heading, figure, digits after the point)
    "text": (
        ("bytes", "bytes", 0), ("tokens", "targets", 0), ("perplexity", "perplexity", 2), ("accuracy", "accuracy", 4),
        ("bits a byte", "bits_per_byte", 4),
    ),
    "image": (
        ("codes", "targets", 0), ("perplexity", "perplexity", 2), ("accuracy", "accuracy", 4),
        ("code bits a pixel and channel", "code_bits_per_pixel_channel", 4), ("PSNR of the codec, dB", "psnr", 2),
    ),
    "audio": (
        ("codes", "targets", 0), ("perplexity", "perplexity", 2), ("accuracy", "accuracy", 4),
        ("code bits a second", "code_bits_per_second", 2), ("log-mel distance of the codec, nats", "log_mel_distance", 4),
    ),
}  # fmt: skip


def print_tables(result: Mapping[str, Any]) -> None:
    """The figures as tables, one a modality, a line a source."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has room
    sources: dict[str, Any] = {**result["sources"], **({"all": result["all"]} if len(result["sources"]) > 1 else {})}
    for modality, columns in COLUMNS.items():
        if not any(modality in source for source in sources.values()):
            continue
        table = Table("source", title=f"{modality}, step {result['step']:,}")
        for heading, _, _ in columns:
            table.add_column(heading, justify="right")
        for name, source in sources.items():
            figures = source.get(modality)
            if figures:
                cells = (f"{figures[key]:,.{digits}f}" if key in figures else "" for _, key, digits in columns)
                table.add_row(name, *cells)
        if modality == "text" and "weighted" in result:
            table.add_row("weighted", *[""] * (len(columns) - 1), f"{result['weighted']['bits_per_byte']:,.4f}")
        console.print(table)
    if "objective" in result:
        table = Table("objective", "value")
        for name, value in result["objective"].items():
            table.add_row(name, f"{value:.4f}")
        console.print(table)
    rejected = {name: source["rejected"] for name, source in result["sources"].items() if source["rejected"]}
    if rejected:
        console.print(f"documents that could not be used: {rejected}")
