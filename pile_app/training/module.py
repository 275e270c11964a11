"""The Lightning module: what one optimizer step does, and what is measured.

Phase one (`codec_steps`): the codecs learn to reconstruct the media of the batches. Then they are frozen, and the language
model learns to predict the next token, with targets that no longer move. Both phases read the same stream of batches.

The loss of a step is the sum over all its targets, on all devices, divided by their planned number, so that it is the same
however the global batch is shared out. All losses are in nats a target token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from pile_app.data.annotation import Annotator
from pile_app.data.assembly import check_encoder
from pile_app.data.batch import Batch
from pile_app.data.datamodule import PileDataModule, data_parallel
from pile_app.data.order import hash64
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import Tokenizer, load_tokenizer
from pile_app.documents import AUDIO, IMAGE, MODALITIES, BadSample
from pile_app.model.backbones import Backbone
from pile_app.model.codecs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel, ModalityLoss
from pile_app.training.checkpoints import check_shapes, load_origin
from pile_app.training.metrics import TokenMetrics, validation_values
from pile_app.training.objective import Objective
from pile_app.training.optim import OptimizerConfig, l1_penalty, make_optimizer
from pile_app.training.parallel import WholeModel, average_gradients, clip_gradients, gradient_norm, shard
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.training.guards import StepGuard


@dataclass(frozen=True)
class ModalityWeights:
    """Weights of the modalities in the loss; 1 each is the likelihood of the documents.

    Args:
        text: of text and segment openers.
        image: of image codes.
        audio: of audio codes.
    """

    text: float = 1.0
    image: float = 1.0
    audio: float = 1.0

    def __post_init__(self) -> None:
        if min(self.text, self.image, self.audio) < 0:
            raise ValueError(f"weights of modalities must be at least 0, not {self}")


class PileModule(LightningModule):
    """One model over text, images and sound.

    Args:
        backbone: Transformer, LSTM, RNN or MinGRU, with its sizes.
        tokenizer: "bytes", or the path of a `tokenizer.json`.
        image: shape of the image codec; null: no images.
        audio: shape of the audio codec; null: no sound.
        codec_steps: optimizer steps of the codecs' phase; 0: codecs stay as they are loaded.
        codec_crop: audio tokens of each sound that the codec trains on at a time.
        codecs_from: checkpoint of another run to take the codecs from; they have to have this shape.
        start_from: run folder (its last checkpoint) or checkpoint to take the whole model from, codecs included; it has to have
            this shape. Training begins anew: only the weights are taken.
        objective: what is learned instead of the next token, or besides it; null: the next token.
        optimizer: how parameters move.
        weights: of the modalities in the loss.
        dropout: share of the embeddings that is dropped in training (blocks: `backbone.dropout`).
        word_dropout: share of the learned text tokens that are hidden in training from what follows them.
        code_dropout: the same of the codes of images and sounds that are given, not learned.
        l1: weight of the sum of absolute values of the language model's matrices (L2: `optimizer.weight_decay`).
        recompute: compute what is within the backbone's blocks again in backward instead of keeping it (activation
            checkpointing): memory of one block instead of all, for a third more time.
        compile: compile each block of the backbone by `torch.compile`; pays on GPUs, on CPUs it takes a minute to start.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: str = "bytes",
        image: ImageCodecConfig | None = None,
        audio: AudioCodecConfig | None = None,
        codec_steps: int = 0,
        codec_crop: int = 50,
        codecs_from: str | None = None,
        start_from: str | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        weights: ModalityWeights = ModalityWeights(),
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        code_dropout: float = 0.0,
        l1: float = 0.0,
        recompute: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if codec_steps < 0 or codec_crop < 1 or l1 < 0:
            raise ValueError(f"codec_steps >= 0, codec_crop >= 1 and l1 >= 0, not {codec_steps}, {codec_crop} and {l1}")
        if not (0 <= word_dropout < 1 and 0 <= code_dropout < 1):
            raise ValueError(f"word_dropout and code_dropout are shares, 0 to below 1, not {word_dropout} and {code_dropout}")
        self.model = FusedLanguageModel(backbone, load_tokenizer(tokenizer), image, audio, dropout, word_dropout, code_dropout)
        self.codec_steps = codec_steps if self.model.codecs else 0
        self.codec_crop = codec_crop
        self.optimizer = optimizer
        self.weights = (weights.text, weights.image, weights.audio)
        self.l1 = l1
        backbone.recompute = recompute
        if compile:
            backbone.compile_blocks()
        self.sums: dict[str, Tensor] = {}
        self.step_loss: Tensor | None = None  # () of this rank's micro-batches of the optimizer step under way
        self.guard: StepGuard | None = None  # says which steps are not taken; it enters itself here
        self.counted: Trainer | None = None  # whose settings are in optimizer steps
        self.whole: WholeModel | None = None  # of a model that is cut over the devices
        if codecs_from is not None:
            load_origin(self.model, codecs_from, codecs_only=True)
        if start_from is not None:
            load_origin(self.model, start_from)
        if (codecs_from or start_from) and not self.codec_steps:
            self.model.fingerprint_codecs()
        self.objective = objective
        if objective is not None:
            objective.build(self.model)
            if objective.freeze:
                self.model.requires_grad_(False)

    @property
    def annotator(self) -> Annotator | None:
        return self.objective.annotator if self.objective is not None else None

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def in_codec_phase(self) -> bool:
        return self.global_step < self.codec_steps and self.trainer.state.fn == "fit"

    def setup(self, stage: str) -> None:
        import torchmetrics

        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and self.counted is not self.trainer:  # or a second `fit` would count twice
            self._count_in_steps()
            self.counted = self.trainer
        for source in data.train_data:
            check_encoded(source, bool(data.sources[source.name].transforms))
        for source in data.validation_data:
            check_encoded(source)
        self.token_metrics = TokenMetrics(len(data.validation_names))
        self.codec_losses = torch.nn.ModuleDict(
            {MODALITIES[m]: torchmetrics.MeanMetric(nan_strategy="error") for m in self.model.codecs}
        )

    def _count_in_steps(self) -> None:
        """Let every setting of the trainer be in optimizer steps; Lightning counts some of them in micro-batches.
        Raises ValueError: the trainer cannot train this module."""
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PileDataModule):
            raise ValueError("PileModule trains on a PileDataModule: trainer.fit(module, datamodule=PileDataModule(...))")
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError("the data module shares out each step itself: Trainer(use_distributed_sampler=False)")
        if trainer.accumulate_grad_batches != 1:
            raise ValueError("set data.global_batch and data.micro_batch; trainer.accumulate_grad_batches follows from them")
        _, trainer.accumulate_grad_batches = data.micro_batches(data_parallel(trainer)[0])
        trainer.fit_loop.epoch_loop.max_steps = data.steps(trainer)
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.limit_train_batches *= trainer.accumulate_grad_batches
        for callback in trainer.callbacks if self.codec_steps else ():  # type: ignore[attr-defined]
            if getattr(callback, "monitor", None) is not None:
                callback.on_validation_end = self._after_codecs(callback.on_validation_end)

    def _after_codecs(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Early stopping and the best checkpoint wait for the language model; until then there is nothing to compare."""

        def call(trainer: Trainer, module: LightningModule) -> None:
            if not self.in_codec_phase:
                hook(trainer, module)

        return call

    def configure_model(self) -> None:
        """Cuts the language model over the devices, where the strategy says so. Lightning calls it before every stage."""
        if self.device_mesh is None or self.whole is not None:
            return
        if self.objective is not None:
            raise ValueError("model.objective hangs on a model in one piece: set trainer.strategy to ddp or auto")
        if self.l1:
            raise ValueError(f"model.l1={self.l1} needs whole matrices: set it to 0, or trainer.strategy to ddp")
        self.whole = WholeModel(self.model)
        shard(self.model, self.device_mesh, torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None)

    def whole_model(self) -> FusedLanguageModel | None:
        """The model in one piece on the first device, None on the others. All have to ask."""
        if self.whole is not None:
            return self.whole.gather(self.model)
        return self.model if self.trainer.is_global_zero else None

    def on_train_start(self) -> None:
        """The checkpoint holds the optimizer's settings as they were; those that are asked for now are followed."""
        optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        for group, asked, factor in zip(optimizer.param_groups, self.groups, schedule.lr_lambdas, strict=True):
            group.update(asked, lr=asked["initial_lr"] * factor(schedule.last_epoch))
        schedule.base_lrs = [asked["initial_lr"] for asked in self.groups]
        if not self.in_codec_phase:
            for codec in self.model.codecs.values():
                codec.eval()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout and crops depend on the place in the global batch alone: a resumed run draws what the uninterrupted one would
        # have, and two devices what one draws in two micro-batches.
        step, number = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        number += data_parallel(self.trainer)[1] * self.trainer.accumulate_grad_batches
        key = hash64(self.trainer.datamodule.seed, step, number)  # type: ignore[attr-defined]
        torch.manual_seed(int(key) >> 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.guard is not None and self.guard.passes_over(self.global_step + 1):
            reached = [p for p in self.model.parameters() if p.requires_grad] if self.whole is None else []
            loss = self._touch(reached).requires_grad_()  # what is cut waits for nobody outside of a forward pass
        else:
            loss = self._codec_step(batch) if self.in_codec_phase else self._language_step(batch)
            loss = loss + self._touch_unused(batch)
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        return loss

    def _codec_step(self, batch: Batch) -> Tensor:
        losses = self.model.codec_loss(batch, self.codec_crop)
        for modality, loss in losses.items():
            self._add(f"{MODALITIES[modality]}_codec_loss", loss.detach(), 1.0)
        return sum(losses.values(), torch.zeros((), device=self.device))

    def _language_step(self, batch: Batch) -> Tensor:
        if self.objective is not None:
            return self._objective_step(batch, self.objective)
        losses = self.model(batch)
        if self._is_logged(self.global_step + 1):
            self._add_losses(batch, losses)
        return self._mean_loss(batch, losses) + self._penalty()

    def _mean_loss(self, batch: Batch, losses: dict[int, ModalityLoss]) -> Tensor:
        """() nats a target, weighted, so that all micro-batches on all devices add up to those of the optimizer step."""
        shares = data_parallel(self.trainer)[0] * self.trainer.accumulate_grad_batches  # both will divide by
        total = sum(self.weights[modality] * loss.total for modality, loss in losses.items())
        return total * (shares / batch.normalizer)

    def _penalty(self) -> Tensor | float:
        if not self.l1:
            return 0.0
        language = (self.model.backbone, self.model.embeddings, self.model.heads)
        return self.l1 * torch.stack([l1_penalty(part) for part in language]).sum()

    def _objective_step(self, batch: Batch, objective: Objective) -> Tensor:
        if objective.freeze:
            self.model.eval()  # and no dropout either
        with torch.set_grad_enabled(not objective.freeze):
            tokens, hidden = objective.read(self.model, batch)
        loss = objective(self.model, hidden, batch)
        if self._is_logged(self.global_step + 1):
            self._add("objective_loss", loss.detach(), 1.0)
        if objective.language_weight:
            losses = self.model.losses(tokens, hidden, batch)
            if self._is_logged(self.global_step + 1):
                self._add_losses(batch, losses)
            loss = loss + objective.language_weight * self._mean_loss(batch, losses)
        return loss + self._penalty()

    def _is_logged(self, step: int) -> bool:
        """Whether the losses of optimizer step `step`, from 1, go to the loggers; of others nothing is summed up."""
        return step % self.trainer.log_every_n_steps == 0 or step == 1  # type: ignore[attr-defined]

    def _add_losses(self, batch: Batch, losses: dict[int, ModalityLoss]) -> None:
        sources: list[str] = self.trainer.datamodule.source_names  # type: ignore[attr-defined]
        for modality, loss in losses.items():
            self._add(f"{MODALITIES[modality]}_loss", loss.total.detach(), len(loss.each))
            self._add("loss", loss.total.detach(), len(loss.each))
            source = batch.source.flatten()[batch.targets[modality]].long()
            totals = loss.each.new_zeros(2, len(sources))
            totals.index_add_(1, source, torch.stack([loss.each, torch.ones_like(loss.each)]))
            for name, total, count in zip(sources, *totals, strict=True):
                self._add(f"source/{name}_loss", total, count)

    def _touch_unused(self, batch: Batch) -> Tensor:
        """Zero, through every parameter that this batch may not reach.

        DDP waits for the gradient of each parameter, and a batch without images does not reach the image head. One element each
        is enough, and cheaper than letting DDP search the graph; parameters without elements (of a modality that the model does
        not have) are waited for as well. FSDP2 waits for those of whatever was gathered in the forward pass: embeddings and
        heads still are, blocks are not any more, and every batch reaches them.
        """
        unused: list[torch.nn.Parameter] = []
        if self.objective is not None:  # which may reach any of them, or none
            unused += [p for p in self.parameters() if p.requires_grad]
        elif self.in_codec_phase:
            codecs = {id(p) for codec in self.model.codecs.values() for p in codec.parameters()}
            if self.whole is None:
                unused += [p for p in self.model.parameters() if id(p) not in codecs]
            for modality, media in ((IMAGE, batch.images), (AUDIO, batch.audio)):
                if modality in self.model.codecs and not len(media):
                    unused += self.model.codecs[modality].parameters()
        else:
            unused += [p for codec in self.model.codecs.values() for p in codec.parameters() if p.requires_grad]
            for modality in range(3):
                if not len(batch.targets[modality]):
                    unused += self.model.parameters_of_modality(modality)
            if not any(map(len, batch.targets)):  # padding alone
                unused += self.model.backbone.parameters()
        return self._touch([p for p in unused if not isinstance(p, DTensor)])

    def _touch(self, parameters: list[torch.nn.Parameter]) -> Tensor:
        """() zero that hangs on an element of each."""
        if not parameters:
            return torch.zeros((), device=self.device)
        return torch.cat([p.view(-1)[:1] for p in parameters]).sum() * 0.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # What the phase does not train gets no gradient at all: a zero one would still decay weights and momenta.
        codecs = [p for codec in self.model.codecs.values() for p in codec.parameters()]
        ids = {id(p) for p in codecs}
        idle = [p for p in self.model.parameters() if id(p) not in ids] if self.in_codec_phase else codecs
        for parameter in idle:
            parameter.grad = None
        if self.whole is not None and self.in_codec_phase:
            average_gradients(codecs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, and asks the guard, to whom the norm is of use, whether the step is to be taken."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.whole is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = gradient_norm(parameters)
        loss, self.step_loss = self.step_loss, None
        assert loss is not None
        if self.guard is not None and self.guard.rejects(self, loss / self.trainer.accumulate_grad_batches, norm):
            for parameter in parameters:
                parameter.grad = None  # so the optimizer leaves it, its momenta and its step count as they are
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            clip = torch.nn.utils.clip_grads_with_norm_ if self.whole is None else clip_gradients
            clip(parameters, gradient_clip_val, norm)

    def _add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Adds to the sums of the optimizer step under way."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.sums[name] += torch.stack([total.double(), torch.as_tensor(count, dtype=torch.float64, device=self.device)])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        step = self.global_step
        if self._is_logged(step):
            names = self._all_names()
            nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
            table = torch.stack([self.sums.get(name, nothing) for name in names])
            if self.trainer.world_size > 1:
                table = self.trainer.strategy.reduce(table, reduce_op="sum")
            sums = zip(names, table.tolist(), strict=True)
            values = {f"train/{name}": total / count for name, (total, count) in sums if count}
            for name, value in values.items():
                self.log(name, value, prog_bar="source" not in name, logger=False, rank_zero_only=True, batch_size=1)
            # Straight to the loggers: Lightning would log a value again in every step that has none of its own.
            for logger in self.trainer.loggers:
                logger.log_metrics(values, step=step - 1)
        self.sums = {}

    def _all_names(self) -> list[str]:
        names = ["loss", *(f"{MODALITIES[m]}_loss" for m in self.vocabulary.modalities)]
        names += [f"{MODALITIES[m]}_codec_loss" for m in self.model.codecs]
        names += ["objective_loss"] * (self.objective is not None)
        return names + [f"source/{name}_loss" for name in self.trainer.datamodule.source_names]  # type: ignore[attr-defined]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for modality, codec_loss in self.model.codec_loss(batch).items():
            self.codec_losses[MODALITIES[modality]].update(codec_loss)  # type: ignore[operator]
        if self.in_codec_phase:
            return
        if self.objective is None:
            losses = self.model(batch, predict=True)
        else:
            tokens, hidden = self.objective.read(self.model, batch)
            self.objective.update(self.model, hidden, batch)
            losses = self.model.losses(tokens, hidden, batch, predict=True)
        self.token_metrics.update(batch, losses, self.model.token_bytes)

    def on_validation_epoch_end(self) -> None:
        sources: list[str] = self.trainer.datamodule.validation_names  # type: ignore[attr-defined]
        values = {f"{name}_codec_loss": float(_compute(metric)) for name, metric in self.codec_losses.items()}
        if not self.in_codec_phase:
            values |= validation_values(_compute(self.token_metrics), sources, self.vocabulary)
            if self.objective is not None:
                values |= {name: float(value) for name, value in self.objective.compute().items()}
        self.log_dict({f"validation/{name}": value for name, value in values.items() if math.isfinite(value)})

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps: int = self.trainer.datamodule.steps(self.trainer)  # type: ignore[attr-defined]
        if self.codec_steps and steps <= self.codec_steps:
            raise ValueError(
                f"model.codec_steps={self.codec_steps} leaves nothing of the run's {steps} optimizer steps for the language "
                "model"
            )
        optimizer, schedule = make_optimizer(self.model, self.optimizer, self.codec_steps, steps, self.objective)
        self.groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks the shapes, and sets Lightning's counters: all follow from the optimizer steps in the checkpoint."""
        check_shapes(self, checkpoint["state_dict"])
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            unfinished = progress[part]["processed"] - progress[part]["completed"]  # 1 within on_train_batch_end
            progress[part] |= dict.fromkeys(("ready", "started", "processed"), batches)
            progress[part]["completed"] = batches - unfinished

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(state_dict, *args, **kwargs)
        if not self.codec_steps and self.model.codecs:
            self.model.fingerprint_codecs()  # never trained: they are what they were
        return loaded


def _compute(metric: Any) -> Tensor:
    """The value over all ranks (each has to ask, whether it has seen anything or not), nan where there is none; then reset."""
    metric._update_count = max(1, metric._update_count)  # or a rank that has seen nothing would be warned of it
    value: Tensor = metric.compute()
    metric.reset()
    return value


def check_encoded(source: SourceData, augmented: bool = False) -> None:
    """Looks at the first document with each modality in the first shard of a source, so that a run is refused before it trains.
    (A remote shard would have to be fetched for it; there the first batch says it.)

    Raises:
        ValueError: another encoder than the model's made it.
    """
    if source.remote[0]:
        return
    index = source.index(0)
    for modality in range(3):
        segments = (index.modality == modality).nonzero()[0][:1]
        for sample in index.first_segment.searchsorted(segments, side="right") - 1:
            try:
                for segment in source.document(int(sample)).segments:
                    if segment.is_encoded and not segment.codes.is_lost:
                        check_encoder(segment.codes, segment.modality, source.vocabulary, source.tokenizer, augmented)
            except BadSample:
                continue  # counted where it is read for training
