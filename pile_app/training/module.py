"""The Lightning module: the loss of an optimizer step, and what is measured.

Phase one (`codec_steps`): the codecs learn to reconstruct the media of the batches. Then they are frozen, and the language
model learns to predict the next token, or an objective is learned. Both phases read the same stream of batches.

The loss of a step is the sum over all its targets divided by their number, however the step is divided into devices and
micro-batches; of codecs, over images and over the codes of sounds; of objectives, as they define it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pile_app.data.annotation import Annotator
from pile_app.data.assembly import check_encoder
from pile_app.data.batch import Batch
from pile_app.data.datamodule import PileDataModule, data_parallel
from pile_app.data.order import hash64
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import Tokenizer, load_tokenizer
from pile_app.documents import MODALITIES, BadSample, Document
from pile_app.model.backbones import Backbone
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.discriminators import AdversarialConfig, make_adversaries
from pile_app.model.fused import AUTOCAST, FusedLanguageModel, ModalityLoss
from pile_app.model.pretrained import check_shapes
from pile_app.model.readers import ReadersConfig
from pile_app.training.checkpoints import load_origin
from pile_app.training.metrics import TokenMetrics, sum_dtype, validation_values
from pile_app.training.objective import Objective, sum_over_devices
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.training.parallel import WholeModel, average_gradients, clip_gradients, gradient_norm, shard
from pile_app.vocabulary import Vocabulary

CHECKED, CHECKED_BYTES = 20_000, 256 << 20  # of a source: documents whose labels are checked, a second of work


@dataclass(frozen=True)
class ModalityWeights:
    """Weights of the modalities in the loss; with 1 each it is the likelihood of the documents.

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


class Guard(Protocol):
    """Decides which optimizer steps are not taken (see `guards.py`)."""

    def skips(self, step: int) -> bool:
        """Return whether step `step`, from 1, is not trained on."""

    def rejects(self, module: PileModule, loss: Tensor, gradient_norm: Tensor) -> bool:
        """Return whether the current step is dropped, the same on all ranks. `loss`: () of this rank's part of the step."""


class PileModule(LightningModule):
    """One model over text, images and sound.

    Args:
        backbone: Transformer, LSTM, RNN or MinGRU, with its sizes; or HuggingFace, with the path of open weights.
        tokenizer: "bytes", or the path of a `tokenizer.json`; open weights bring theirs.
        image: shape of the image codec; null: no images.
        audio: shape of the audio codec; null: no sound.
        codec_steps: optimizer steps of the codecs' phase; 0: codecs stay as they are loaded.
        codec_crop: audio tokens of each sound that the codec trains on at a time.
        codec_augment: mirror and shift the images that the image codec trains on; pays for some thousands of pictures or fewer.
        adversarial: discriminators that the codecs learn to fool; null: codecs learn from the reconstruction error alone.
        codecs_from: checkpoint of another run to take codecs of this shape from.
        start_from: run folder (its last checkpoint) or checkpoint to take all weights from, of a model of this shape. Training
            starts at step 0.
        objective: trained instead of the next token, or in addition; null: the next token.
        optimizer: optimizer and schedule.
        weights: of the modalities in the loss.
        dropout: fraction of the embeddings that is dropped in training (blocks: `backbone.dropout`).
        word_dropout: fraction of the learned text tokens that are hidden in training from what follows them.
        code_dropout: the same for codes of images and sounds that are given, not learned.
        readers: networks that read given images and sounds, in addition to their codes.
        l1: weight of the sum of absolute values of the language model's matrices (L2: `optimizer.weight_decay`).
        recompute: activation checkpointing of the backbone's blocks: memory of one block instead of all, for a third more time.
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
        codec_augment: bool = False,
        adversarial: AdversarialConfig | None = None,
        codecs_from: str | None = None,
        start_from: str | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        weights: ModalityWeights = ModalityWeights(),
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        code_dropout: float = 0.0,
        readers: ReadersConfig = ReadersConfig(),  # noqa: B008 (frozen)
        l1: float = 0.0,
        recompute: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if codec_steps < 0 or codec_crop < 1 or l1 < 0:
            raise ValueError(f"codec_steps >= 0, codec_crop >= 1 and l1 >= 0, not {codec_steps}, {codec_crop} and {l1}")
        if not (0 <= word_dropout < 1 and 0 <= code_dropout < 1):
            raise ValueError(f"word_dropout and code_dropout are in [0, 1), not {word_dropout} and {code_dropout}")
        if backbone.tokenizer is not None and tokenizer not in ("bytes", backbone.tokenizer):
            raise ValueError(f"model.tokenizer={tokenizer!r}: the backbone has its own, {backbone.tokenizer!r}; leave it out")
        words = load_tokenizer(backbone.tokenizer or tokenizer, backbone.turns)
        self.model = FusedLanguageModel(backbone, words, image, audio, dropout, word_dropout, code_dropout, readers)
        self.codec_steps = 0 if all(codec.config.pretrained for codec in self.model.codecs.values()) else codec_steps
        self.codec_crop, self.codec_augment = codec_crop, codec_augment
        self.adversaries = make_adversaries(adversarial if self.codec_steps else None, self.model.codecs)
        self.adversaries_from = int(adversarial.start * codec_steps) if adversarial else 0
        self.optimizer = optimizer
        self.weights = (weights.text, weights.image, weights.audio)
        self.l1 = l1
        backbone.recompute = recompute
        if compile:
            backbone.compile_blocks()
        self.sums = torch.zeros(0, 2)  # losses of the current step, and what they are means over, by `logged`
        self.step_loss: Tensor | None = None  # () of this rank's micro-batches of the current step
        self.held: list[Batch] = []  # micro-batches of the current step, where its loss depends on all of them
        self.is_reduced_next = False  # the next backward pass is the last of a step whose gradients DDP does not average
        self.guard: Guard | None = None  # a callback that sets itself
        self.counted: Trainer | None = None  # whose settings are in optimizer steps
        self.whole: WholeModel | None = None  # of a sharded model
        if codecs_from is not None:
            load_origin(self.model, codecs_from, codecs_only=True)
        if start_from is not None:
            load_origin(self.model, start_from)
        self.model.fingerprint_codecs(trained=bool(self.codec_steps) or not (codecs_from or start_from))
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

    @property
    def parts(self) -> int:
        """Micro-batches of a step over all devices."""
        return data_parallel(self.trainer)[0] * int(self.trainer.accumulate_grad_batches)

    @property
    def codec_parameters(self) -> list[torch.nn.Parameter]:
        """Those that are trained in the codecs' phase only, discriminators included."""
        parts = (*self.model.codecs.values(), self.adversaries)
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def setup(self, stage: str) -> None:
        from torchmetrics import MeanMetric

        self.model.autocast_dtype = AUTOCAST.get(str(self.trainer.precision))
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and self.counted is not self.trainer:  # or a second `fit` would count twice
            self._count_in_steps()
            self.counted = self.trainer
        for source in data.train_data + data.validation_data:
            augmented = source in data.train_data and bool(data.sources[source.name].transforms)
            check_source(source, self.annotator, augmented, labels=stage == "fit")
        self.token_metrics = TokenMetrics(len(data.validation_names), sum_dtype(self.trainer.strategy.root_device))
        names = ["loss", *(f"{MODALITIES[m]}_loss" for m in self.vocabulary.modalities)]
        names += [f"{MODALITIES[m]}_codec_loss" for m in self.model.codecs] + ["objective_loss"] * (self.objective is not None)
        names += [f"{name}_adversarial_loss" for name in self.adversaries]
        self.logged = {name: row for row, name in enumerate(names + [f"source/{name}_loss" for name in data.source_names])}
        device = self.trainer.strategy.root_device
        self.sums = torch.zeros(len(self.logged), 2, dtype=sum_dtype(device), device=device)
        self.codec_losses = torch.nn.ModuleDict({MODALITIES[m]: MeanMetric(nan_strategy="error") for m in self.model.codecs})

    def _count_in_steps(self) -> None:
        """Express all settings of the trainer in optimizer steps; Lightning counts some of them in micro-batches.

        Raises:
            ValueError: the trainer cannot train this module.
        """
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PileDataModule):
            raise ValueError("PileModule trains on a PileDataModule: trainer.fit(module, datamodule=PileDataModule(...))")
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError("the data module divides each step itself: Trainer(use_distributed_sampler=False)")
        if trainer.accumulate_grad_batches != 1:
            raise ValueError("set data.global_batch and data.micro_batch; trainer.accumulate_grad_batches follows from them")
        steps: int = data.steps(trainer)
        _, trainer.accumulate_grad_batches = data.micro_batches(data_parallel(trainer)[0])
        trainer.fit_loop.epoch_loop.max_steps = steps
        if isinstance(trainer.val_check_interval, int):
            if self.objective is not None:  # whose best checkpoint is used: one validation at least
                trainer.val_check_interval = min(trainer.val_check_interval, steps)
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.limit_train_batches *= trainer.accumulate_grad_batches
        for callback in trainer.callbacks if self.codec_steps else ():  # type: ignore[attr-defined]
            if getattr(callback, "monitor", None) is not None:
                callback.on_validation_end = self._after_codecs(callback.on_validation_end)

    def _after_codecs(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Let early stopping and the best checkpoint wait for the language model."""

        def call(trainer: Trainer, module: LightningModule) -> None:
            if not self.in_codec_phase:
                hook(trainer, module)

        return call

    def configure_model(self) -> None:
        """Shard the language model, if the strategy does. Lightning calls it before every stage."""
        if self.device_mesh is None or self.whole is not None:
            return
        if self.objective is not None and self.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError("model.objective counts labels on every device: set tensor_parallel_size to 1")
        if self.l1:
            raise ValueError(f"model.l1={self.l1} needs whole matrices: set it to 0, or trainer.strategy to ddp")
        self.whole = WholeModel(self.model)
        shard(self.model, self.device_mesh, torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None)
        for part in filter(None, (self.objective, self.adversaries)):  # which are small, and whole on each device
            for tensor in (*part.parameters(), *part.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    def whole_model(self) -> FusedLanguageModel | None:
        """Return the unsharded model on the first device, None on the others. All devices have to call it."""
        if self.whole is not None:
            return self.whole.gather(self.model)
        return self.model if self.trainer.is_global_zero else None

    # -- Training

    def on_train_start(self) -> None:
        """Follow the optimizer's settings of the configuration, not those of the checkpoint."""
        optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        for group, asked, factor in zip(optimizer.param_groups, self.groups, schedule.lr_lambdas, strict=True):
            group.update(asked, lr=asked["initial_lr"] * factor(schedule.last_epoch))
        schedule.base_lrs = [asked["initial_lr"] for asked in self.groups]
        self.held = []
        if not self.in_codec_phase:
            for codec in self.model.codecs.values():
                codec.eval()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._seed(batch)
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):  # else we average gradients ourselves, of what the step trains
            wrapper.require_backward_grad_sync = not self._needs_whole_step

    def _seed(self, batch: Batch) -> None:
        """Let dropout depend on the position of the batch: a resumed run draws what the uninterrupted run would have drawn, and
        two devices what one draws in two micro-batches."""
        position = min(batch.numbers, default=0)
        torch.manual_seed(int(hash64(self.trainer.datamodule.seed, "dropout", position)) >> 1)  # type: ignore[attr-defined]

    @property
    def _needs_whole_step(self) -> bool:
        return self.in_codec_phase or self.objective is not None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.guard is not None and self.guard.skips(self.global_step + 1):
            whole = self.whole is not None or self._needs_whole_step  # nothing waits for gradients
            loss = self._touch([] if whole else [p for p in self.model.parameters() if p.requires_grad]).requires_grad_()
        elif self._needs_whole_step:
            return self._whole_step(batch)
        else:  # Lightning and DDP average over the parts
            language = self._language_loss(batch, self.model(batch))
            loss = language * self.parts + self._penalty() + self._touch_unused(batch)
        self._add_step_loss(loss)
        return loss

    def _add_step_loss(self, loss: Tensor) -> None:
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()

    def _language_loss(self, batch: Batch, losses: dict[int, ModalityLoss]) -> Tensor:
        """Return () the batch's part of the step's loss: weighted nats / targets of the step."""
        if self._is_logged(self.global_step + 1):
            self._add_losses(batch, losses)
        return sum(self.weights[modality] * loss.total for modality, loss in losses.items()) / batch.normalizer

    def _penalty(self) -> Tensor | float:
        if not self.l1:
            return 0.0
        language = (self.model.backbone, self.model.embeddings, self.model.heads)
        matrices = [p for part in language for p in part.parameters() if p.dim() >= 2]
        return self.l1 * torch.stack([matrix.abs().sum() for matrix in matrices]).sum()

    def _whole_step(self, batch: Batch) -> Tensor:
        """Hold the micro-batches of a step until the last, as the loss of each depends on all of them; then train on all."""
        self.held.append(batch)
        if len(self.held) < self.trainer.accumulate_grad_batches:
            return torch.zeros((), device=self.device, requires_grad=True)
        batches, self.held = self.held, []
        losses = self._codec_losses(batches) if self.in_codec_phase else self._objective_losses(batches)
        for number, part in enumerate(losses, start=1):
            loss = part * self.parts
            self._add_step_loss(loss)
            if number < len(batches):
                self.trainer.strategy.backward(loss / len(batches), None)
        self.is_reduced_next = True
        return loss

    def _codec_losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        """Yield each batch's part of the step's loss, which is a mean over all images, and over all codes of sounds."""
        counts = [self.model.codec_counts(batch, self.codec_crop) for batch in batches]
        sums = {modality: float(sum(count.get(modality, 0) for count in counts)) for modality in self.model.codecs}
        on_device = sum_over_devices(torch.stack([torch.full((), value, device=self.device) for value in sums.values()]))
        copies = self.trainer.world_size / data_parallel(self.trainer)[0]  # tensor-parallel devices read the same
        totals = dict(zip(sums, on_device.clamp_min(1) / copies, strict=True))
        adversaries: dict[str, Any] = dict(self.adversaries.items()) if self.global_step >= self.adversaries_from else {}
        for batch, count in zip(batches, counts, strict=True):
            self._seed(batch)
            loss = torch.zeros((), device=self.device, requires_grad=True)
            for modality, mean in self.model.codec_loss(batch, self.codec_crop, self.codec_augment, adversaries).items():
                name, error = MODALITIES[modality], mean.detach()
                if name in adversaries:
                    adversarial = adversaries[name].last
                    error = error - adversarial
                    self._add(f"{name}_adversarial_loss", adversarial * count[modality], count[modality])
                self._add(f"{name}_codec_loss", error * count[modality], count[modality])
                loss = loss + mean * count[modality] / totals[modality]
            yield loss

    def _objective_losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        objective = self.objective
        assert objective is not None
        if objective.freeze:
            self.model.eval()  # and no dropout either
        steps = objective.prepare(self.model, batches, self._seed)
        torch.clear_autocast_cache()  # of weights without gradients
        for batch, step in zip(batches, steps, strict=True):
            self._seed(batch)
            with torch.set_grad_enabled(not objective.freeze):
                tokens, hidden = objective.read(self.model, batch)
            loss = objective(self.model, hidden, batch, step)
            self._add("objective_loss", loss.detach(), 1 / self.parts)
            if objective.language_weight:
                language = self._language_loss(batch, self.model.losses(tokens, hidden, batch))
                loss = loss + objective.language_weight * language
            if self.whole is not None:  # FSDP2 reduces all gathered parameters together: on each device the same
                loss = loss + self._touch(p for p in self.model.parameters() if p.requires_grad)
            yield loss + self._penalty() / self.parts

    def on_after_backward(self) -> None:
        """Average gradients that DDP and FSDP2 do not: of the codecs in their phase, and with an objective.

        Parameters that the step did not reach have zero gradients, on one device as on several.
        """
        if not self.is_reduced_next:
            return
        self.is_reduced_next = False
        codecs = self.codec_parameters
        ids = {id(p) for p in codecs}
        trained = codecs if self.in_codec_phase else [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.trainer.world_size > 1:
            average_gradients(p for p in trained if not isinstance(p, DTensor))

    def _touch_unused(self, batch: Batch) -> Tensor:
        """Return zero with a gradient for every parameter that this batch may not reach.

        DDP waits for the gradient of each parameter, and a batch without images does not reach the image head. One element of
        each is enough, and cheaper than letting DDP search the graph; parameters without elements count as well. FSDP2 waits
        for those that were gathered in the forward pass and still are: embeddings and heads, which every batch reaches in part.
        """
        unused = self.codec_parameters
        for modality in range(3):
            if not len(batch.targets[modality]):
                unused += self.model.parameters_of_modality(modality)
        if not any(map(len, batch.targets)):  # padding alone
            unused += self.model.backbone.parameters()
        for reader in self.model.readers.values():  # of media that are given
            unused += [p for p in reader.parameters() if p.requires_grad]
        return self._touch(unused)

    def _touch(self, parameters: Iterable[torch.nn.Parameter]) -> Tensor:
        """Return () zero that depends on an element of each that is not sharded."""
        touched = [p.view(-1)[:1] for p in parameters if not isinstance(p, DTensor)]
        return torch.cat(touched).sum() * 0.0 if touched else torch.zeros((), device=self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.in_codec_phase:  # no gradient at all: a zero gradient would still decay weights and momenta
            for parameter in self.codec_parameters:
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and ask the guard, which needs the norm, whether the step is taken."""
        judges = list(self.adversaries.parameters())  # clipped apart from what they judge
        ids = {id(p) for p in judges}
        parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in ids]
        if self.whole is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).to(self.device)
        else:
            norm = gradient_norm(parameters)
        loss, self.step_loss = self.step_loss, None
        assert loss is not None
        if self.guard is not None and self.guard.rejects(self, loss / self.trainer.accumulate_grad_batches, norm):
            for parameter in (*parameters, *judges):
                parameter.grad = None  # so the optimizer leaves it, its momenta and its step count as they are
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_([*parameters, *judges], gradient_clip_val)
        elif gradient_clip_val:
            clip = torch.nn.utils.clip_grads_with_norm_ if self.whole is None else clip_gradients
            clip(parameters, gradient_clip_val, norm)
            torch.nn.utils.clip_grad_norm_(judges, gradient_clip_val)

    # -- What is logged

    def _is_logged(self, step: int) -> bool:
        """Return whether the losses of optimizer step `step`, from 1, go to the loggers; others are not summed."""
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

    def _add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add to the sums of the current step, if it is logged."""
        if self._is_logged(self.global_step + 1):
            self.sums[self.logged[name], 0] += total
            self.sums[self.logged[name], 1] += count

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        step = self.global_step
        if self._is_logged(step):
            sums, self.sums = self.sums, torch.zeros_like(self.sums)
            if self.trainer.world_size > 1:
                sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
            pairs = zip(self.logged, sums.tolist(), strict=True)
            values = {f"train/{name}": total / count for name, (total, count) in pairs if count}
            for name, value in values.items():
                self.log(name, value, prog_bar="source" not in name, logger=False, rank_zero_only=True, batch_size=1)
            # Straight to the loggers: Lightning would log a value again in every step that has none of its own.
            for logger in self.trainer.loggers:
                logger.log_metrics(values, step=step - 1)

    # -- Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        counts = self.model.codec_counts(batch)
        for modality, codec_loss in self.model.codec_loss(batch).items():
            self.codec_losses[MODALITIES[modality]].update(codec_loss, counts[modality])  # type: ignore[operator]
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

    # -- Optimizer and checkpoint

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps: int = self.trainer.datamodule.steps(self.trainer)  # type: ignore[attr-defined]
        if self.codec_steps and steps <= self.codec_steps:
            raise ValueError(
                f"model.codec_steps={self.codec_steps} leaves none of the run's {steps} optimizer steps for the language "
                "model: lower model.codec_steps, or raise trainer.max_steps"
            )
        parts = (self.objective, list(self.adversaries.parameters()))
        optimizer, schedule = make_optimizer(self.model, self.optimizer, self.codec_steps, steps, *parts)
        self.groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the shapes, and set Lightning's counters, which all follow from the optimizer steps in the checkpoint."""
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
        self.model.fingerprint_codecs(trained=bool(self.codec_steps))
        return loaded


def _compute(metric: Any) -> Tensor:
    """Return the value over all ranks, nan without any; then reset. Ranks that have seen nothing must call it too."""
    metric._update_count = max(1, metric._update_count)  # or a rank that has seen nothing would warn
    value: Tensor = metric.compute()
    metric.reset()
    return value


def check_source(source: SourceData, annotator: Annotator | None, augmented: bool, labels: bool) -> None:
    """Check documents in local shards, so that a run is refused before it trains: whether the model's encoders made the first
    document with each modality, and the labels; in large sources only those of documents spread evenly over all shards.

    Raises:
        ValueError: another encoder made a document, the model reads its media themselves, or it cannot be labelled.
    """

    def check_codes(document: Document) -> None:
        for segment in document.segments:
            if segment.is_encoded and not segment.codes.is_lost:
                check_encoder(segment.codes, segment.modality, source.vocabulary, source.tokenizer, augmented)

    checks: list[tuple[Iterable[int], Callable[[Document], Any]]] = []
    if not source.remote[0]:
        index = source.index(0)
        rows = np.concatenate([(index.modality == modality).nonzero()[0][:1] for modality in range(3)])
        checks.append((index.first_segment.searchsorted(rows, side="right") - 1, check_codes))
    if labels and annotator is not None and type(annotator).check is not Annotator.check:
        step = max(len(source) // CHECKED, sum(source.sizes) // CHECKED_BYTES) + 1
        checks.append((range(0, len(source), step), lambda document: annotator.check(annotator.arrange(document))))
    for numbers, check in checks:
        for number in map(int, numbers):
            shard, _ = source.place(number)
            try:
                if not source.remote[shard]:
                    check(source.document(number))
            except BadSample:
                continue  # counted where it is read for training
            except ValueError as error:
                raise ValueError(f"{source.paths[shard]}: {error}") from error
