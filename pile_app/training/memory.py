"""What a training step needs of a device's memory, without the memory: the step itself, run on fake tensors.

PyTorch's fake tensors have shapes, types and storages, but no numbers. Forward and backward of the model as it is run on them,
and `LiveBytes` counts the storages that are alive. So whatever the model does (autocast, activation checkpointing, another
loss) is in the figures, and no formula has to follow it.

    weights       parameters and buffers
    gradients     as wide as the parameters
    optimizer     Muon: one momentum; AdamW: two moments; SGD: one momentum
    activations   what forward leaves for backward
    peak          the most that is alive at once

The codecs' phase is not in it, nor what the device's runtime takes for itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pile_app.data.batch import NOT_LEARNED, Batch, allocate
from pile_app.model import attention, loss
from pile_app.model.backbones import LSTM, Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.optim import OptimizerConfig, make_optimizer

COLUMNWISE = ("query", "key", "value", "expand")  # matrices that tensor parallelism cuts by outputs; the others by inputs
LSTM_WORKSPACE = {"32": 65, "bf16": 47}  # bytes a unit and token that oneDNN keeps for backward; fake tensors do not show them


@dataclass(frozen=True)
class Layout:
    """How a run is shared out.

    Args:
        strategy: single, ddp, or fsdp (FSDP2: weights, gradients and optimizer are cut over the data-parallel ranks).
        devices: of the whole run.
        tensor_parallel: devices that share the matrices of each block.
        bucket_view: DDP's gradients are views of its buckets (`gradient_as_bucket_view`), or stand beside them.
    """

    strategy: Literal["single", "ddp", "fsdp"] = "single"
    devices: int = 1
    tensor_parallel: int = 1
    bucket_view: bool = False

    @property
    def data_parallel(self) -> int:
        return self.devices // self.tensor_parallel

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and optimizer are cut into over the data-parallel ranks."""
        return self.data_parallel if self.strategy == "fsdp" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. See the module's docstring; `parallel`: DDP's buckets, or what FSDP2 gathers of others."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    parallel: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are alive.

    Args:
        given: tensors that are there already; views of them are nothing new.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now, self.peak = 0.0, 0.0
        self.gradients: dict[int, float] = {}  # of `now`, by parameter
        self._sizes = WeakIdKeyDictionary({tensor.untyped_storage(): [0.0] for tensor in given})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._sizes:
            size = [float(storage.nbytes())]
            self._sizes[storage] = size
            self.now += size[0]
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: list[float]) -> None:
        self.now -= size[0]

    def keep_gradient(self, kept: float, parameter: Tensor) -> None:
        """Once backward is done with a parameter: `kept` bytes of its gradient are left (FSDP2 keeps a part of it)."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._add(storage)
        size = self._sizes[storage]
        self.now += kept - size[0]
        size[0] = self.gradients[id(parameter)] = kept


def count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def plan_memory(
    model: FusedLanguageModel,
    config: OptimizerConfig,
    micro_batch: int,
    context: int,
    *,
    shares: tuple[float, ...] = (1.0, 0.0, 0.0),
    accumulated: bool = False,
    precision: str = "32-true",
    layout: Layout = Layout(),
    codec_steps: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Memory:
    """Memory of one device in a language-model step.

    Args:
        model: on the meta device; its matrices are cut where `layout` asks for tensor parallelism.
        config: of the optimizer.
        micro_batch: packs that the device computes at once.
        context: tokens of a pack.
        shares: of the modalities in the targets.
        accumulated: several micro-batches make one step, so that gradients are there when forward begins.
        precision: Lightning's: 32-true or bf16-mixed.
        layout: how the run is shared out.
        codec_steps: of the run; the codecs' optimizer state stays after their phase.
        device: attention on a CPU keeps its probabilities.
    """
    if layout.tensor_parallel > 1:
        cut_matrices(model, layout.tensor_parallel)
    codecs = {id(p) for codec in model.codecs.values() for p in codec.parameters()}
    trained = [p for p in model.parameters() if id(p) not in codecs]
    optimizer, _ = make_optimizer(model, config, codec_steps, codec_steps + 1)
    states = {"muon": 1, "adamw": 2, "sgd": int(config.momentum > 0)}
    state, state_of_codecs = 0, 0
    for group in optimizer.param_groups:
        kind = "muon" if group.get("muon") else "adamw" if config.name == "muon" else config.name
        size = states[kind] * count_bytes(group["params"])
        state, state_of_codecs = (state, size) if group["name"] == "codecs" else (state + size, state_of_codecs)
    gradients = count_bytes(trained)  # as large as the language model's weights
    whole = count_bytes(model.parameters()) - gradients + count_bytes(model.buffers())  # codecs are on every device
    kept_bytes = {n: p.numel() * p.itemsize / layout.shards for n, p in model.named_parameters() if id(p) not in codecs}
    parallel = 0
    if layout.strategy == "ddp" and not layout.bucket_view:
        parallel = gradients
    elif layout.shards > 1:  # two blocks at a time with their weights and one with gradients; all that is in no block stays
        blocks = list(getattr(model.backbone, "blocks", ()))
        largest = max((count_bytes(block.parameters()) for block in blocks), default=0)
        root = gradients - sum(count_bytes(block.parameters()) for block in blocks)
        for block in blocks if precision == "bf16-mixed" else ():
            block.to(torch.bfloat16)  # as they are gathered
        parallel = 2 * root + 2 * max((count_bytes(block.parameters()) for block in blocks), default=0) + largest
    batch = make_batch(model, micro_batch, context, shares)
    with _as_on_cuda(model) if device == "cuda" else nullcontext():
        held, peak = trace_step(model, batch, accumulated, precision, kept_bytes)
    half_cells = precision != "32-true" and not (isinstance(model.backbone, LSTM) and not model.backbone.autocast_on_cpu)
    units = sum(cell.hidden_size for cell in model.modules() if isinstance(cell, nn.LSTM)) * micro_batch * context
    workspace = units * LSTM_WORKSPACE["bf16" if half_cells else "32"]
    if device == "cpu":
        workspace += (
            probabilities_bytes(model, micro_batch, context, 4 if precision == "32-true" else 2) // layout.tensor_parallel
        )
    held, peak = held + workspace, peak + workspace
    weights, state = gradients // layout.shards + whole, state // layout.shards + state_of_codecs
    return Memory(weights, gradients // layout.shards, state, held, parallel, weights + state + parallel + peak)


def probabilities_bytes(model: FusedLanguageModel, micro_batch: int, context: int, itemsize: int) -> int:
    """What attention in blocks keeps for backward (`attention.py`); fake tensors take another way, which keeps nothing."""
    backbone = model.backbone
    if not isinstance(backbone, Transformer) or context > attention.LONGEST:
        return 0
    ends = [min(begin + attention.BLOCK, context) for begin in range(0, context, attention.BLOCK)]
    seen = sum((end - begin) * end for begin, end in zip([0, *ends], ends, strict=False))
    return micro_batch * backbone.heads * seen * itemsize * (1 if backbone.recompute else backbone.layers)


def cut_matrices(model: FusedLanguageModel, parts: int) -> None:
    """Gives every block of a Transformer the shapes it has on one of `parts` tensor-parallel devices."""
    if not isinstance(model.backbone, Transformer):
        raise ValueError("tensor parallelism is for the Transformer: recurrent cells are not cut")
    for module in model.backbone.modules():
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                rows, columns = linear.weight.shape
                cut = rows if name in COLUMNWISE else columns
                if cut % parts:
                    raise ValueError(f"tensor_parallel={parts} does not divide the {cut} of backbone matrix {name!r}")
                shape = (rows // parts, columns) if name in COLUMNWISE else (rows, columns // parts)
                linear.weight = nn.Parameter(linear.weight.new_empty(shape))
                linear.out_features, linear.in_features = shape


def trace_step(
    model: FusedLanguageModel, batch: Batch, accumulated: bool, precision: str, kept: Mapping[str, float]
) -> tuple[int, int]:
    """(bytes that forward leaves for backward, most bytes at once beside weights and optimizer) of one micro-batch.

    `accumulated`: gradients are there before; `kept`: parameter -> bytes of its gradient once it is complete.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model.to_empty(device="cpu")
        batch = replace(batch, buffer=fake.from_tensor(batch.buffer))
        with _documents_as_packs(model), LiveBytes([*model.parameters(), *model.buffers()]) as live:
            for name, size in kept.items():
                parameter = model.get_parameter(name)
                keep = partial(live.keep_gradient, size)
                parameter.register_post_accumulate_grad_hook(keep)
                if accumulated:
                    parameter.grad = torch.empty_like(parameter)
                    keep(parameter)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                losses = model(batch)
                total = torch.stack([one.total for one in losses.values()]).sum()
            del losses
            held = live.now - sum(live.gradients.values())
            total.backward()
    return int(held), int(live.peak)


def make_batch(model: FusedLanguageModel, micro_batch: int, context: int, shares: tuple[float, ...]) -> Batch:
    """Packs of one document each, with targets of the modalities in their shares; no media: codes count as given."""
    places, nothing = (micro_batch, context), ("int32", (0,))
    arrays, buffer, layout, memory = allocate(
        {
            "tokens": ("int32", places),
            "learned": ("uint8", places),
            "piece_starts": ("int32", (micro_batch + 1,)),
            "piece_sources": ("int32", (micro_batch,)),
            "images": ("uint8", (0, 1, 1, 1)),
            **dict.fromkeys(("image_starts", "audio_starts", "audio_tokens"), nothing),
            "audio": ("float32", (0, 0)),
            "normalizer": ("float32", ()),
        }
    )
    arrays["tokens"][:] = 0
    arrays["learned"][:] = NOT_LEARNED
    arrays["piece_starts"][:] = np.arange(micro_batch + 1) * context
    arrays["piece_sources"][:] = 0
    arrays["normalizer"][...] = micro_batch * (context - 1)
    borders = (np.cumsum([0.0, *shares]) / sum(shares) * (context - 1)).round().astype(int).tolist()
    for modality, (first, stop) in enumerate(pairwise(borders)):
        arrays["learned"][:, first:stop] = modality
        arrays["tokens"][:, first + 1 : stop + 1] = model.vocabulary.slices[modality].start
    text, image, audio = (micro_batch * (stop - first) for first, stop in pairwise(borders))
    return Batch(buffer, layout, (text, image, audio), memory=memory)


@contextmanager
def _as_on_cuda(model: FusedLanguageModel) -> Iterator[None]:
    """The trace is on fake tensors of a CPU, on which some things are done otherwise."""
    block, loss.BLOCK = loss.BLOCK, loss.CHUNK
    if isinstance(model.backbone, LSTM):
        model.backbone.autocast_on_cpu = True
    try:
        yield
    finally:
        loss.BLOCK = block


@contextmanager
def _documents_as_packs(model: FusedLanguageModel) -> Iterator[None]:
    """Recurrent backbones look at numbers to find documents, and fake tensors have none: with a cache every pack is one row."""
    if isinstance(model.backbone, Transformer):
        yield
        return
    hidden: Callable[..., Tensor] = model.hidden
    model.hidden = lambda *args: hidden(*args[:4], model.backbone.new_cache())  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.hidden
