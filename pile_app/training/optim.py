"""Optimizers and learning-rate schedules: one optimizer object with a group for each kind of parameter.

muon   Muon (see `muon.py`) for the backbone's matrices, AdamW for the rest
adamw  AdamW (arXiv:1711.05101) for everything
sgd    SGD with Nesterov momentum
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pile_app.model.codecs import Convolution
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.muon import Muon
from pile_app.training.objective import Objective


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule.

    Args:
        name: muon, adamw or sgd.
        learning_rate: peak rate of AdamW or SGD.
        matrix_learning_rate: peak rate of Muon.
        codec_learning_rate: peak rate of AdamW for the codecs, in their phase.
        codec_kernel_learning_rate: peak rate of Muon for the kernels of the image codec; without Muon they move as the rest.
        discriminator_learning_rate: peak rate of AdamW for the discriminators of `model.adversarial`, in the same phase.
        backbone_learning_rate: peak rate of AdamW for open weights or their adapters (`HuggingFace`).
        reader_learning_rate: peak rate of Muon for the kernels of CNNs that read media; without Muon, and for their vectors,
            AdamW moves them at a tenth.
        thaw_at: optimizer steps (after the codecs' phase) in which open weights stay as they are.
        weight_decay: L2, on matrices only; decoupled from the gradient except with sgd.
        momentum: of SGD and Muon.
        betas: of AdamW.
        schedule: wsd (warm-up, stable, linear decay; arXiv:2404.06395), cosine or constant.
        warmup_steps: optimizer steps of linear warm-up.
        decay_share: fraction of the steps that wsd spends decaying, at the end.
        final_share: rate at the end as a fraction of the peak (wsd, cosine).
        base_width: width of the backbone that the rates were tuned at: at width D the heads' rate of AdamW, and that of hidden
            matrices where it moves them, are multiplied by `base_width / D` (muP, arXiv:2203.03466). null: rates as they are.
    """

    name: Literal["muon", "adamw", "sgd"] = "muon"
    learning_rate: float = 0.003
    matrix_learning_rate: float = 0.02
    codec_learning_rate: float = 0.003
    codec_kernel_learning_rate: float = 0.02
    discriminator_learning_rate: float = 0.001
    backbone_learning_rate: float = 5e-5
    reader_learning_rate: float = 0.02
    thaw_at: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 20
    decay_share: float = 0.4
    final_share: float = 0.02
    base_width: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "matrix_learning_rate",
            "codec_learning_rate",
            "codec_kernel_learning_rate",
            "discriminator_learning_rate",
            "backbone_learning_rate",
            "reader_learning_rate",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer {name}={getattr(self, name)} must be above 0")
        if min(self.weight_decay, self.warmup_steps, self.thaw_at) < 0:
            raise ValueError("optimizer weight_decay, warmup_steps and thaw_at must be at least 0")
        if self.base_width is not None and self.base_width < 1:
            raise ValueError(f"optimizer base_width={self.base_width} must be at least 1, or null")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.final_share <= 1:
            raise ValueError("optimizer decay_share and final_share must be in [0, 1]")


def schedule_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the fraction of the peak rate at optimizer step `step` (from 0) of `steps`; 0 outside."""
    if not 0 <= step < steps:
        return 0.0
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / steps))
    elif config.schedule == "wsd" and config.decay_share:
        factor = min(1.0, (steps - step) / (config.decay_share * steps))
    else:
        factor = 1.0
    return warm * (config.final_share + (1 - config.final_share) * factor)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and torch's AdamW behind one optimizer; groups with `muon: True` go to the first, the others to the second."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {})
        matrices, others = self._divided()
        self.parts: list[torch.optim.Optimizer] = [Muon(matrices, momentum=momentum, weight_decay=0.0)] if matrices else []
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas, weight_decay=0.0, fused=True))
        self._share()

    def _divided(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = self.param_groups
        return [group for group in groups if group.get("muon")], [group for group in groups if not group.get("muon")]

    def _share(self) -> None:
        """Let the parts see the groups of this optimizer, which a schedule changes, and its state."""
        for part, groups in zip(self.parts, filter(None, self._divided()), strict=True):
            part.param_groups, part.state = groups, self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make_optimizer(
    model: FusedLanguageModel,
    config: OptimizerConfig,
    codec_steps: int,
    steps: int,
    objective: Objective | None = None,
    judges: Sequence[nn.Parameter] = (),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Optimizer and its schedule, to be stepped once an optimizer step. The first `codec_steps` of `steps` train the codecs;
    then the language model's schedule begins. `judges`: parameters of discriminators, trained with the codecs."""
    codecs = [p for codec in model.codecs.values() for p in codec.parameters()]
    in_codecs = {id(p) for p in codecs}
    parts = (model.backbone, model.readers)
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear | nn.RNNBase)]
    hidden = {id(p) for layer in layers for p in layer.parameters() if p.dim() == 2}
    # Muon is for hidden matrices; torch's recurrent cells stack their gates into one and do better with AdamW.
    by_muon = config.name == "muon"
    muon = by_muon and not any(isinstance(layer, nn.RNNBase) for layer in layers)
    # Adam moves every entry by the rate, so a sum over D of them D times as far; Muon's update has the same norm at any D.
    rate, scale = config.learning_rate, config.base_width / model.backbone.width if config.base_width else 1.0
    inner = rate * (scale if config.name != "sgd" else 1.0)
    by_name: dict[str, dict[str, Any]] = {
        "matrices": {"lr": config.matrix_learning_rate if muon else inner, "weight_decay": config.weight_decay, "muon": muon},
        "heads": {"lr": inner, "weight_decay": config.weight_decay},
        "tables": {"lr": rate, "weight_decay": config.weight_decay},
        "vectors": {"lr": rate, "weight_decay": 0.0},
        "readers": {
            "lr": config.reader_learning_rate * (1 if by_muon else 0.1),
            "weight_decay": config.weight_decay,
            "muon": by_muon,
        },
        "reader vectors": {"lr": config.reader_learning_rate * 0.1, "weight_decay": 0.0},
        "open weights": {"lr": config.backbone_learning_rate, "weight_decay": config.weight_decay},
        "open vectors": {"lr": config.backbone_learning_rate, "weight_decay": 0.0},  # and the embedding
    }
    groups = {name: {"params": list[nn.Parameter](), **options, "name": name} for name, options in by_name.items()}
    for name, parameter in model.named_parameters():
        # Tables of missing modalities are empty and unsharded, and a fused step refuses a mixture.
        if id(parameter) in in_codecs or not parameter.requires_grad or not parameter.numel():
            continue
        is_open = name.startswith("backbone.") and model.backbone.is_pretrained
        if is_open or name.startswith("readers."):
            kinds = ("open weights", "open vectors") if is_open or ".encoder." in name else ("readers", "reader vectors")
            groups[kinds[id(parameter) not in hidden]]["params"].append(parameter)
            continue
        outside = "heads" if name.startswith("heads.") else "tables" if parameter.dim() >= 2 else "vectors"
        groups["matrices" if id(parameter) in hidden else outside]["params"].append(parameter)
    if codec_steps:
        convolutions = (layer for codec in model.codecs.values() for layer in codec.modules() if isinstance(layer, Convolution))
        kernels = {layer.weight for layer in convolutions if by_muon}
        slow: dict[str, Any] = {} if config.name == "sgd" else {"betas": (0.5, 0.9)}
        stacked, others = [p for p in codecs if p in kernels], [p for p in codecs if p not in kernels]
        trained: tuple[tuple[str, list[nn.Parameter], float, dict[str, Any]], ...] = (
            ("codecs", others, config.codec_learning_rate, {}),
            ("codec kernels", stacked, config.codec_kernel_learning_rate, {"muon": True, "stacked": True}),
            ("discriminators", list(judges), config.discriminator_learning_rate, slow),
        )
        for name, some, rate, options in trained:
            groups[name] = {"params": some, "lr": rate, "weight_decay": 0.0, "name": name, **options}
    if objective is not None:
        head = list(objective.parameters())
        groups["objective"] = {"params": head, "lr": objective.learning_rate, "weight_decay": 0.0, "name": "objective"}
    used = [group for group in groups.values() if group["params"]]
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(used, momentum=config.momentum, nesterov=config.momentum > 0)
    else:
        optimizer = MuonAdamW(used, config.momentum, config.betas)

    def factor(name: str) -> Callable[[int], float]:
        if name in ("codecs", "codec kernels", "discriminators"):
            return lambda step: schedule_factor(config, step, codec_steps)
        start = codec_steps + (config.thaw_at if name.startswith("open") else 0)
        return lambda step: schedule_factor(config, step - start, steps - start)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(str(g["name"])) for g in optimizer.param_groups])
