"""Base of all backbones: the interface (see `backbones.py`), the cache, the norm, initialization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pile_app.data.tokenizers import Tokenizer

EPSILON = torch.finfo(torch.float32).eps


@dataclass
class Cache:
    """State of a backbone after `length` tokens: recurrent state of each layer, or its keys and values in buffers of `capacity`
    tokens, which double when they are full."""

    layers: list[tuple[Tensor, ...]] = field(default_factory=list)
    length: int = 0
    capacity: int = 0
    seen_media: Tensor | None = None  # (B, 1) whether a medium was read, for backbones that need it

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write a layer's next tokens, each (B, H, T, d), and return views of all, (B, H, length + T, d). The caller adds T to
        `length` after the last layer."""
        stop = self.length + new[0].size(2)
        old = self.layers[layer] if layer < len(self.layers) else ()
        if not old or old[0].size(2) < stop:
            size = max(self.capacity, stop) if self.capacity and not old else 2 * stop
            buffers = tuple(x.new_empty(*x.shape[:2], size, x.size(3)) for x in new)
            for buffer, tokens in zip(buffers, old, strict=False):  # the first buffers have nothing to take over
                buffer[:, :, : self.length] = tokens[:, :, : self.length]
            self.layers[layer : layer + 1] = [buffers]
        for buffer, x in zip(self.layers[layer], new, strict=True):
            buffer[:, :, self.length : stop] = x
        return tuple(buffer[:, :, :stop] for buffer in self.layers[layer])

    def select(self, rows: Tensor) -> Cache:
        """Copy some rows. Recurrent states are (layers of the cell, B, D), keys and values (B, ...)."""
        layers = [tuple(t[:, rows] if t.dim() == 3 else t[rows] for t in layer) for layer in self.layers]
        return Cache(layers, self.length, self.capacity, None if self.seen_media is None else self.seen_media[rows])


LOGIT_CAP = 15.0  # logits are capped softly (arXiv:2408.00118)


class Backbone(nn.Module, ABC):
    """See `backbones.py`.

    Args:
        width: D, size of the token vectors.
        layers: number of blocks.
        dropout: dropout probability of each block's output, 0 to 1.
    """

    recompute = False  # activation checkpointing of each block
    normalizes_input = True  # the embedding is RMS-normed before the first block
    code_std = 0.5  # of the initial vectors of codes
    logit_cap: float | None = LOGIT_CAP
    tokenizer: str | None = None  # the only one that the backbone works with
    adapts_media_only = False  # takes `seen_media`, (B, T) of bool: an image or sound of the document begins here or before
    is_pretrained = False  # its weights come from others, and train at rates of their own
    passes = 3.0  # through the matrices in training: forward, backward by inputs and by weights
    turns: Mapping[str, str] = {}  # marker of a role (`records.py`) -> its text in the chat template of open weights
    words = 0  # text tokens that the backbone brings vectors of; 0: it brings none
    is_compiled = False
    tensor_parallel: Mapping[str, str] = {}  # layer of a block -> style in `training/parallel.py`; empty: cannot be sharded

    def __init__(self, width: int = 128, layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"a backbone needs width >= 1 and layers >= 1, not width={width}, layers={layers}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability, 0 <= dropout < 1, not {dropout}")
        self.width = self.embedding_width = width
        self.layers = layers
        self.dropout = dropout

    def new_cache(self, capacity: int = 0) -> Cache:
        """An empty cache. `capacity`: tokens to reserve memory for; 0: it grows by doubling."""
        return Cache(capacity=capacity)

    def save_description(self, folder: Path) -> None:
        """Write the files, other than weights, that building the backbone needs; none by default."""

    def text_tables(self, tokenizer: Tokenizer) -> tuple[nn.Module, nn.Module] | None:
        """Embedding and head of the special and text tokens, if the backbone brings its own: modules that return
        (special + text tokens, D). None: they are trained from scratch."""
        return None

    def tie(self) -> None:
        """Let layers that share a weight share it again, after their parameters were replaced."""

    @abstractmethod
    def forward(
        self, x: Tensor, document: Tensor, position: Tensor, cache: Cache | None = None, piece_starts: Tensor | None = None
    ) -> Tensor: ...

    def compile_blocks(self) -> None:
        """Compile each block, and the loss, by `torch.compile` for training; generation does not use what is compiled.

        Raises:
            ValueError: there is nothing to compile.
        """
        raise ValueError(f"model.compile: torch.compile gains nothing with {type(self).__name__}, leave it false")

    def run(self, block: Callable[..., Any], *arguments: Any) -> Any:
        """Run a block, with activation checkpointing if `recompute` is set."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def flops_per_token(self, context: float) -> float:
        """Forward only, multiply-adds count two. `context`: tokens that an average token attends to."""
        return 2.0 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)


def initialize(model: nn.Module) -> None:
    """Initialize all parameters and buffers: for a model that was built on the meta device, after `to_empty`."""
    for module in reversed(list(model.modules())):  # parts before the whole, which may initialize them its own way
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def initialize_block(inputs: list[nn.Linear], outputs: list[nn.Linear]) -> None:
    """Input matrices keep the variance; output matrices start at zero, so that a residual block starts as the identity."""
    for layer in inputs:
        bound = (3 / layer.in_features) ** 0.5
        nn.init.uniform_(layer.weight, -bound, bound)
    for layer in outputs:
        nn.init.zeros_(layer.weight)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gain (arXiv:1910.07467)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Norm.apply(x)
    return F.rms_norm(x, (x.size(-1),), eps=EPSILON)


class _Norm(torch.autograd.Function):
    """A fused kernel for CPUs, in a third to half of the time of its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.size(-1))
        scale = mean.add_(EPSILON).rsqrt_()
        y = torch.mul(x, scale.to(x.dtype))
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(gradient, y).unsqueeze(-1).div_(y.size(-1))
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale.to(y.dtype))


def cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of `x` are computed in: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
