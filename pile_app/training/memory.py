"""Memory of a training step on one device, traced on fake tensors: shapes, types and storages, no numbers.

`LiveBytes` counts the storages that are alive while forward and backward of the real model run, so autocast, activation
checkpointing, kernels and losses are counted as they are. `fake_gpu` takes the code path of CUDA, without a GPU. The codecs'
phase, workspaces of CUDA kernels and the CUDA runtime are not included.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pile_app.data.batch import NOT_LEARNED, Batch, allocate
from pile_app.model.attention import BLOCK, LONGEST, AttentionMask
from pile_app.model.backbones import LSTM
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.training.parallel import tensor_parallel_plan


class Layout(NamedTuple):
    """Distribution over devices. bucket_view: DDP's gradients are views of its buckets, not copies."""

    strategy: Literal["single", "ddp", "fsdp"] = "single"
    devices: int = 1
    tensor_parallel: int = 1  # devices that share the matrices of a block
    bucket_view: bool = False

    @property
    def data_parallel(self) -> int:
        return self.devices // self.tensor_parallel

    @property
    def shards(self) -> int:
        return self.data_parallel if self.strategy == "fsdp" else 1


SINGLE = Layout()


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # saved by forward for backward
    parallel: int  # DDP's buckets, or parameters and gradients gathered by FSDP2
    peak: int  # most at once during the step


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operations create and that are alive, without those of the tensors `given`."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in given})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in [tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]:
            if storage not in self._seen:
                self._seen[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def count_bytes(tensors: Iterable[Tensor], shards: int = 1) -> int:
    """Bytes of the tensors, or of the first shards if FSDP2 divides their rows."""
    return sum(math.ceil(len(t) / shards) * t[0].nbytes if t.dim() and len(t) else t.nbytes for t in tensors)


def plan_memory(
    model: FusedLanguageModel,
    config: OptimizerConfig,
    micro_batch: int,
    context: int,
    *,
    fractions: tuple[float, ...] = (1.0, 0.0, 0.0),
    accumulated: bool = False,
    precision: str = "32-true",
    layout: Layout = SINGLE,
    codec_steps: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Memory:
    """Memory of one device in an optimizer step of the language model.

    Args:
        model: on the meta device; the trace changes it.
        micro_batch: packs of `context` tokens in a forward pass.
        fractions: of the modalities among the targets.
        accumulated: gradients of an earlier micro-batch exist when forward begins.
        precision: Lightning's 32-true, bf16-mixed or 16-mixed.
        codec_steps: of the run; the state of the codecs' optimizer stays after their phase.
        device: whose kernels are traced.
    """
    if layout.tensor_parallel > 1:
        shard_matrices(model, layout.tensor_parallel)
    codecs = [p for codec in model.codecs.values() for p in codec.parameters()]
    in_codecs = {id(p) for p in codecs}
    trained = {name: p for name, p in model.named_parameters() if id(p) not in in_codecs}
    kept = {name: count_bytes([parameter], layout.shards) for name, parameter in trained.items()}
    weights = sum(kept.values()) + count_bytes(codecs) + count_bytes(model.buffers())
    kept = {name: size for name, size in kept.items() if trained[name].requires_grad}  # gradients
    optimizer = parallel = 0
    for group in make_optimizer(model, config, codec_steps, codec_steps + 1)[0].param_groups:
        momenta = 1 if group.get("muon") else int(config.momentum > 0) if config.name == "sgd" else 2
        optimizer += momenta * count_bytes(group["params"], 1 if group["name"] == "codecs" else layout.shards)
    if layout.strategy == "ddp" and not layout.bucket_view:
        parallel = sum(kept.values())
    elif layout.shards > 1:  # parameters and gradients of the root, parameters of two blocks, gradients of one
        units = [list(block.parameters()) for block in getattr(model.backbone, "blocks", ())]
        blocks, learned = [count_bytes(unit) for unit in units], [count_bytes(p for p in u if p.requires_grad) for u in units]
        root = count_bytes(trained.values()) + count_bytes(p for p in trained.values() if p.requires_grad)
        copies = 2 if precision == "32-true" else 1  # two in half precision are as large as one
        parallel = root - sum(blocks) - sum(learned) + copies * max(blocks, default=0) + max(learned, default=0)
        if precision != "32-true" and blocks:
            model.backbone.blocks.bfloat16()  # as FSDP2 gathers them
    gradients: dict[Tensor, Tensor] = {}

    def keep(parameter: Tensor) -> None:
        parameter.grad = None
        gradients.setdefault(parameter, torch.empty(sizes[parameter], dtype=torch.uint8))

    half = torch.float16 if precision.startswith("16") else torch.bfloat16
    is_lstm = isinstance(model.backbone, LSTM)
    # Without cuDNN, which needs a GPU, an LSTM's weights would be cast at every token.
    in_half = precision != "32-true" and not (is_lstm and device == "cuda")
    with fake_gpu() if device == "cuda" else _fake_cpu() as fake:
        model.to_empty(device=device)
        model.backbone.tie()
        sizes: dict[Tensor, int] = {model.get_parameter(name): size for name, size in kept.items()}
        batch = make_batch(model, micro_batch, context, fractions)
        batch = replace(batch, buffer=fake.from_tensor(batch.buffer)).to(torch.device(device))
        with LiveBytes([*model.parameters(), *model.buffers(), batch.buffer]) as live:
            for parameter in sizes:
                parameter.register_post_accumulate_grad_hook(keep)
                if accumulated:
                    keep(parameter)
            before = live.now
            with torch.autocast(device, half, enabled=in_half):
                total = torch.stack([loss.total for loss in model(batch).values()]).sum()
            activations = live.now - before
            run_backward(total)
    if is_lstm and device == "cpu":  # oneDNN keeps so many bytes a unit and token, invisible to fake tensors
        each = 47 if in_half and model.backbone.autocast_on_cpu else 65
        workspace = each * model.backbone.width * model.backbone.layers * micro_batch * context
        activations, live.peak = activations + workspace, live.peak + workspace
    peak = weights + optimizer + parallel + live.peak
    return Memory(weights, sum(kept.values()), optimizer, activations, parallel, peak)


def shard_matrices(model: FusedLanguageModel, parts: int) -> None:
    """Give every block the shapes of a single device among `parts` tensor-parallel devices."""
    dimensions = {ColwiseParallel: (("weight", 0), ("bias", 0)), RowwiseParallel: (("weight", 1),)}
    for layer, style in tensor_parallel_plan(model.backbone, parts).items():
        for block in model.backbone.blocks:  # type: ignore[union-attr]
            linear = block.get_submodule(layer)
            for name, dimension in dimensions.get(type(style), ()):
                if (whole := getattr(linear, name)) is not None:
                    if whole.size(dimension) % parts:
                        raise ValueError(f"tensor_parallel_size={parts} must divide {layer}, {tuple(whole.shape)}")
                    setattr(linear, name, nn.Parameter(whole.chunk(parts, dimension)[0].clone(), whole.requires_grad))


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeTensorMode]:
    """Tensors created here are fake tensors on a CUDA device of this compute capability. Backward: `run_backward`."""
    with (
        patch("torch.cuda.get_device_capability", lambda device=None: capability),
        patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: capability >= (8, 0)),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),  # or autocast turns itself off
        torch.backends.cudnn.flags(enabled=False),  # it asks the driver
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        torch.device("cuda"),
    ):
        yield fake


@contextmanager
def _fake_cpu() -> Iterator[FakeTensorMode]:
    """Fake tensors on a CPU, whose kernels look for documents in the values of tensors: here each pack is one document."""

    def make_mask(document: Tensor, position: Tensor, starts: Tensor | None, dtype: torch.dtype, width: int) -> AttentionMask:
        rows = [min(BLOCK, document.size(1) - begin) for begin in range(0, document.size(1), BLOCK)]
        is_long = document.size(1) > LONGEST
        return AttentionMask(blocks=None if is_long else [(0, torch.empty(size, size, dtype=dtype)) for size in rows])

    def find_rows(document: Tensor, position: Tensor) -> list[tuple[Tensor, Any]]:
        return [(torch.arange(document.numel()).view_as(document), ...)]

    with (
        patch("pile_app.model.backbones.make_mask", make_mask),
        patch("pile_app.model.open_weights.make_mask", make_mask),
        patch("pile_app.model.recurrent._document_rows", find_rows),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
    ):
        yield fake


@torch.no_grad()
def run_backward(loss: Tensor) -> None:
    """`loss.backward()` without autograd's engine, which needs a real device: nodes run in reverse order of creation."""
    pending: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    loss.detach_()  # which would keep the graph alive

    def run_next() -> None:
        node = max(pending, key=lambda node: node._sequence_nr())
        gradients = (node.apply if isinstance(node, BackwardCFunction) else node)(*pending.pop(node))
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for (following, index), gradient in zip(node.next_functions, gradients, strict=False):
            if following is not None and gradient is not None:
                expected = following._input_metadata
                gradient = gradient.sum_to_size(expected[index].shape).to(expected[index].dtype)
                inputs = pending.setdefault(following, [None] * len(expected))
                inputs[index] = gradient if inputs[index] is None else inputs[index] + gradient

    with patch("torch._C._current_graph_task_id", lambda: 1):  # checkpointed blocks are recomputed once
        while pending:
            run_next()


def make_batch(model: FusedLanguageModel, micro_batch: int, context: int, fractions: tuple[float, ...]) -> Batch:
    """Packs of one document each, with targets of the modalities in these fractions; codes instead of media."""
    borders = (np.cumsum([0.0, *fractions]) / sum(fractions) * (context - 1)).round().astype(int).tolist()
    fields: dict[str, tuple[str, tuple[int, ...]]] = {"tokens": ("int32", (micro_batch, context))}
    fields |= dict.fromkeys(("image_starts", "audio_starts", "audio_tokens"), ("int32", (0,)))
    fields |= {"piece_starts": ("int32", (micro_batch + 1,)), "piece_sources": ("int32", (micro_batch,))}
    fields |= {"learned": ("uint8", (micro_batch, context)), "images": ("uint8", (0, 1, 1, 1))}
    fields |= {"audio": ("float32", (0, 0)), "normalizer": ("float32", ())}
    arrays, buffer, layout, memory = allocate(fields)
    buffer.zero_()
    arrays["learned"][:] = NOT_LEARNED
    arrays["piece_starts"][:] = np.arange(micro_batch + 1) * context
    arrays["normalizer"][...] = micro_batch * (context - 1)
    for modality, (first, stop) in enumerate(pairwise(borders)):
        arrays["learned"][:, first:stop] = modality
        arrays["tokens"][:, first + 1 : stop + 1] = model.vocabulary.slices[modality].start
    text, image, audio = (micro_batch * int(count) for count in np.diff(borders))
    return Batch(buffer, layout, (text, image, audio), memory=memory)
