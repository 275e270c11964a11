"""Optimizers and learning-rate schedules.

One optimizer object, whatever it is made of, so that Lightning's automatic optimization, clipping and resume keep working.
Codecs and language model have groups of their own: each phase of a run moves only its groups.

    muon   Muon (https://kellerjordan.github.io/posts/muon/) for the backbone's matrices, AdamW for the rest; both are torch's
           (see muon.py for matrices that are cut over devices)
    adamw  AdamW (arXiv:1711.05101) for everything
    sgd    SGD with Nesterov momentum
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pile_app.model.fused import FusedLanguageModel
from pile_app.training.muon import Muon, ShardedMuon
from pile_app.training.objective import Objective


@dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move.

    Args:
        name: muon, adamw or sgd.
        learning_rate: peak rate of AdamW or SGD.
        matrix_learning_rate: peak rate of Muon.
        codec_learning_rate: peak rate of AdamW for the codecs, in their phase.
        weight_decay: L2, on matrices only; decoupled from the gradient but for sgd.
        momentum: of SGD and Muon.
        betas: of AdamW.
        schedule: wsd (warm-up, stable, linear decay; arXiv:2404.06395), cosine or constant.
        warmup_steps: optimizer steps of linear warm-up.
        decay_share: share of the steps that wsd spends decaying, at the end.
        final_share: rate at the end as a share of the peak (wsd, cosine).
        base_width: width of the backbone that the rates were tuned at: at width D the heads' rate of AdamW, and that of hidden
            matrices where it moves them, are multiplied by `base_width / D` (muP, arXiv:2203.03466). null: rates as they are.
    """

    name: Literal["muon", "adamw", "sgd"] = "muon"
    learning_rate: float = 0.003
    matrix_learning_rate: float = 0.02
    codec_learning_rate: float = 0.003
    weight_decay: float = 0.0
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 20
    decay_share: float = 0.4
    final_share: float = 0.02
    base_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "matrix_learning_rate", "codec_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer {name}={getattr(self, name)} must be above 0")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError("optimizer weight_decay and warmup_steps must be at least 0")
        if self.base_width is not None and self.base_width < 1:
            raise ValueError(f"optimizer base_width={self.base_width} must be at least 1, or null")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.final_share <= 1:
            raise ValueError("optimizer decay_share and final_share are shares, 0 to 1")


def schedule_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Share of the peak rate at optimizer step `step` (from 0) of `steps`; 0 outside."""
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
    """torch's Muon and AdamW behind one optimizer; a group with `muon: True` goes to the first, every other to the second."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {})
        matrices = [group for group in self.param_groups if group.get("muon")]
        others = [group for group in self.param_groups if not group.get("muon")]
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            is_cut = isinstance(matrices[0]["params"][0], DTensor)
            muon = ShardedMuon if is_cut else Muon
            parts.append(muon(matrices, momentum=momentum, weight_decay=0.0))
        if others:
            parts.append(torch.optim.AdamW(others, betas=betas, weight_decay=0.0, fused=True))
        self.parts = parts
        self._share()

    def _share(self) -> None:
        """The parts and this optimizer see the same groups (a schedule writes into them) and the same state."""
        muon, adamw = iter(self.parts[0].param_groups), iter(self.parts[-1].param_groups)
        self.param_groups = [next(muon) if group.get("muon") else next(adamw) for group in self.param_groups]
        for part in self.parts:
            part.state = self.state

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
        muon = [group for group in self.param_groups if group.get("muon")]
        others = [group for group in self.param_groups if not group.get("muon")]
        self.parts[0].param_groups = muon or others
        self.parts[-1].param_groups = others or muon
        self._share()


def make_optimizer(
    model: FusedLanguageModel, config: OptimizerConfig, codec_steps: int, steps: int, objective: Objective | None = None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Optimizer and its schedule, to be stepped once an optimizer step. The first `codec_steps` of `steps` train the codecs;
    then the language model's schedule begins."""
    codecs = [p for codec in model.codecs.values() for p in codec.parameters()]
    in_codecs = {id(p) for p in codecs}
    layers = [layer for layer in model.backbone.modules() if isinstance(layer, nn.Linear | nn.RNNBase)]
    hidden = {id(p) for layer in layers for p in layer.parameters() if p.dim() == 2}
    matrices: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # Tables of modalities that the model does not have are empty: nothing cuts them, and a fused step takes no mixture.
        if id(parameter) in in_codecs or not parameter.requires_grad or not parameter.numel():
            continue
        (matrices if id(parameter) in hidden else heads if name.startswith("heads.") else others).append(parameter)
    # Muon is for hidden matrices; torch's recurrent cells stack their gates into one and do better with AdamW.
    muon = config.name == "muon" and not any(isinstance(layer, nn.RNNBase) for layer in layers)
    decayed = [p for p in others if p.dim() >= 2]
    plain = [p for p in others if p.dim() < 2]
    rate = config.learning_rate
    # Adam moves every entry by the rate, so a sum over D of them D times as far; Muon's update has the same norm at any D.
    inner_rate = rate * (config.base_width / model.backbone.width if config.base_width and config.name != "sgd" else 1.0)
    matrix_rate = config.matrix_learning_rate if muon else inner_rate
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": matrix_rate, "weight_decay": config.weight_decay, "muon": muon},
        {"params": heads, "lr": inner_rate, "weight_decay": config.weight_decay},
        {"params": decayed, "lr": rate, "weight_decay": config.weight_decay},
        {"params": plain, "lr": rate, "weight_decay": 0.0},
    ]
    names = ["matrices", "heads", "tables", "vectors"]
    if codec_steps:
        groups.append({"params": codecs, "lr": config.codec_learning_rate, "weight_decay": 0.0})
        names.append("codecs")
    if objective is not None:
        groups.append({"params": list(objective.parameters()), "lr": objective.learning_rate, "weight_decay": 0.0})
        names.append("objective")
    groups = [group | {"name": name} for group, name in zip(groups, names, strict=True) if group["params"]]
    optimizer: torch.optim.Optimizer
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
    else:
        optimizer = MuonAdamW(groups, config.momentum, config.betas)

    def factor(name: str) -> Callable[[int], float]:
        if name == "codecs":
            return lambda step: schedule_factor(config, step, codec_steps)
        return lambda step: schedule_factor(config, step - codec_steps, steps - codec_steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(str(g["name"])) for g in optimizer.param_groups])


def l1_penalty(module: nn.Module) -> torch.Tensor:
    """Sum of the absolute values of all matrices; () float32."""
    return torch.stack([p.abs().sum() for p in module.parameters() if p.dim() >= 2]).sum()
