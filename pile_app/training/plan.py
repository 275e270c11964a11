"""`pile plan`: parameters, memory and time of a configuration, and warnings, before anything is trained.

The model is built on PyTorch's meta device, so 7 billion parameters take seconds. Time is the FLOPs of the language model over
the devices' FLOP/s at a utilization. Memory is that of a step traced on fake tensors: shapes, types and storages, no numbers.
`LiveBytes` counts the storages that are alive while forward and backward of the real model run, so autocast, activation
checkpointing, kernels and losses are counted as they are; `fake_gpu` takes the code path of CUDA, without a GPU. The codecs'
phase, activations of readers, workspaces of CUDA kernels and the CUDA runtime are not included.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pile_app.data.batch import NOT_LEARNED, Batch, allocate
from pile_app.data.datamodule import PileDataModule, Source, whole_epochs
from pile_app.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from pile_app.documents import MODALITIES
from pile_app.model.attention import BLOCK, LONGEST, AttentionMask
from pile_app.model.backbones import LSTM, Backbone
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.readers import ReaderConfig, ReadersConfig
from pile_app.training.callbacks import measure_matmul_flops
from pile_app.training.cli import codec_configs, count_devices, is_sharded, parse_config
from pile_app.training.load import fast_precision
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.training.parallel import tensor_parallel_plan


class Device(NamedTuple):
    """A device by its data sheet."""

    bf16: float  # dense FLOP/s
    float32: float  # without TF32
    memory: float  # bytes
    within: float  # bytes/s that one device sends within a node
    between: float  # and between nodes, each device with an adapter of 400 or 200 Gbit/s


DEVICES = {
    "h100": Device(989e12, 67e12, 80e9, 450e9, 50e9),  # SXM
    "h200": Device(989e12, 67e12, 141e9, 450e9, 50e9),
    "b200": Device(2250e12, 80e12, 180e9, 900e9, 50e9),
    "a100": Device(312e12, 19.5e12, 80e9, 300e9, 25e9),  # SXM, 80 GB
    "l40s": Device(362e12, 91.6e12, 48e9, 32e9, 25e9),
    "rtx4090": Device(165e12, 82.6e12, 24e9, 32e9, 3e9),
}
NODE = 8  # devices of a node
RESERVE = 1.5e9  # bytes of CUDA's context, NCCL and cuBLAS (not measured)
FRAGMENTS = 1.15  # resident over allocated memory on a CPU, measured 1.08 to 1.22 on 2026-11-25


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


class Plan:
    """Parameters, FLOPs, bytes and seconds of a configuration: `arguments` of `train.py`, and options of `pile plan`.
    Raises ValueError: an argument or the configuration is invalid."""

    def __init__(
        self, arguments: list[str], devices: int | None = None, hardware: str = "h100", utilization: float = 0.4,
        text_tokens: int = 32_762, read_data: bool = False,
    ) -> None:  # fmt: skip
        if not 0 < utilization <= 1:
            raise ValueError(f"utilization={utilization} must be above 0 and at most 1")
        self.config = config = parse_config(arguments)
        self.hardware, self.is_gpu, self.utilization = hardware, hardware != "cpu", utilization
        self.layout = make_layout(config, devices)
        precision = str(config.trainer.precision or ("bf16-mixed" if self.is_gpu else fast_precision("cpu")))
        self.precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(precision, precision)
        self.micro_batch, self.accumulated = PileDataModule.micro_batches(config.data, self.layout.data_parallel)
        backbone = meta_backbone(config)
        spec = backbone.tokenizer or config.model.tokenizer
        self.has_tokenizer = os.path.exists(spec) or (spec == "bytes" and not backbone.words)
        tokenizer = load_tokenizer(spec, backbone.turns) if self.has_tokenizer else ByteTokenizer()
        if not self.has_tokenizer:
            tokenizer.size = backbone.words or text_tokens
            tokenizer.token_bytes = np.ones(tokenizer.size, np.int64)
        self.words, self.width, self.heads = backbone.words, backbone.width, getattr(backbone, "heads", 0)
        model = meta_model(config, tokenizer, backbone)
        self.vocabulary, self.parts = model.vocabulary, count_parts(model)
        self.parameters = sum(size for part, size in self.parts.items() if part != "codecs")
        self.fill, self.attended, self.source = 1.0, (config.data.context + 1) / 2, "assumed, --read-data measures"
        self.epoch_tokens = 0  # unknown
        used = self.vocabulary.modalities
        self.fractions = tuple((modality in used) / len(used) for modality in range(len(MODALITIES)))
        if read_data:
            self.measure_data(model, tokenizer)
        self.steps = config.trainer.max_steps if config.trainer.max_steps > 0 else None
        self.tokens_per_step = config.data.global_batch * config.data.context
        if config.data.epochs is not None and read_data:
            epoch = self.epoch_tokens / self.fill / self.tokens_per_step
            in_epochs = math.ceil(epoch * whole_epochs(config.data.epochs, config.data.min_steps, epoch))
            self.steps = min(in_epochs, self.steps or in_epochs)
        self.tokens = (self.steps or 0) * self.tokens_per_step * self.fill
        self.flops_per_token = model.flops_per_token(self.attended, self.fractions)
        self.memory = plan_memory(
            model, OptimizerConfig(**vars(config.model.optimizer)), self.micro_batch, config.data.context,
            fractions=self.fractions, accumulated=self.accumulated > 1, precision=self.precision, layout=self.layout,
            codec_steps=config.model.codec_steps, device="cuda" if self.is_gpu else "cpu",
        )  # fmt: skip
        if self.is_gpu:
            self.device, self.needed = DEVICES[hardware], self.memory.peak * 1.05 + RESERVE
        else:
            rate, memory = measure_matmul_flops(torch.device("cpu")), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            self.device, self.needed = Device(rate, rate, memory, 5e9, 1e9), self.memory.peak * FRAGMENTS
        self.fits = self.needed <= self.device.memory
        rate = self.device.float32 if self.precision == "32-true" else self.device.bf16
        self.seconds_per_step = self.tokens_per_step * self.flops_per_token / (self.layout.devices * rate * utilization)

    def seconds_sending(self) -> float:
        """Time to send gradients (DDP: twice) or weights twice and gradients once for each micro-batch (FSDP2), which overlaps
        with computing. Tensor parallelism's sums of activations are not included."""
        if self.layout.data_parallel == 1:
            return 0.0
        weights = 2.0 if self.precision == "32-true" else 1.0  # twice, half as wide
        copies = 2.0 if self.layout.strategy == "ddp" else self.accumulated * (weights + 1)
        speed = self.device.between if self.layout.devices > NODE else self.device.within
        return copies * self.memory.gradients * self.layout.shards / speed

    def measure_data(self, model: FusedLanguageModel, tokenizer: Tokenizer, packs: int = 64) -> None:
        """Open the shards and assemble some packs."""
        options = {n: v for n, v in vars(self.config.data).items() if n not in ("vocabulary", "tokenizer", "sources")}
        sources = {name: Source(**vars(source)) for name, source in self.config.data.sources.items()}
        data = PileDataModule(sources=sources, vocabulary=model.vocabulary, tokenizer=tokenizer, **options)
        data.prepare_data()
        data.setup()
        batch = data.train_dataset().__getitems__(list(range(packs)))
        is_token = batch.document >= 0
        self.fill, self.source = float(is_token.float().mean()), f"from {packs} packs"
        self.attended = float((batch.position + 1)[is_token].float().mean())
        self.fractions = tuple(len(targets) / int(is_token.sum()) for targets in batch.targets)
        self.epoch_tokens = round(data.order.packs_per_epoch * self.config.data.context * self.fill)

    def figures(self) -> dict[str, str]:
        """Name -> figure, one a line."""
        layout, memory, data = self.layout, self.memory, self.config.data
        fractions = ", ".join(f"{MODALITIES[m]} {self.fractions[m]:.0%}" for m in self.vocabulary.modalities)
        batch = f"{self.micro_batch} x {self.accumulated} x {layout.data_parallel}"
        parallel = f", tensor parallel {layout.tensor_parallel}" if layout.tensor_parallel > 1 else ""
        each = ", ".join(f"{name} {_bytes(size)}" for name, size in memory._asdict().items() if size and name != "peak")
        overhead = "CUDA's own and fragments" if self.is_gpu else "memory kept by malloc"
        speed = f"{self.tokens_per_step / self.seconds_per_step:,.0f} tokens/s at {self.utilization:.0%} utilization"
        sending = f"; {self.seconds_sending():.3g} s of communication to overlap" if layout.data_parallel > 1 else ""
        checkpoint = 4 * sum(self.parts.values()) + memory.optimizer * layout.shards * layout.tensor_parallel
        figures = {
            "parameters": ", ".join(f"{part} {size:,}" for part, size in self.parts.items() if size),
            "language model": f"{self.parameters:,} parameters",
            "data": f"fill {self.fill:.1%}, {self.attended:,.0f} tokens attended to, targets {fractions} ({self.source})",
            "FLOPs a token": f"{self.flops_per_token / 1e6:,.1f} M forward and backward, without codecs",
            "step": f"{data.global_batch} packs ({batch}) of {data.context:,}: {self.tokens_per_step:,} tokens",
            "devices": f"{layout.devices} x {self.hardware}, {layout.strategy}{parallel}, {self.precision}",
            "memory of a device": f"{_bytes(memory.peak)} at the peak: {each} (gradients grow as activations are freed)",
            "needed of a device": f"{_bytes(self.needed)} of {_bytes(self.device.memory)}, with {overhead}",
            "a checkpoint": _bytes(checkpoint),
            "speed": f"{speed}, {self.seconds_per_step:.3g} s a step{sending}",
        }
        if self.steps is not None:
            passes = f", {self.tokens / self.epoch_tokens:.2f} passes over the data" if self.epoch_tokens else ""
            ratio, hours = self.tokens / (20 * self.parameters), self.steps * self.seconds_per_step / 3600
            figures["tokens"] = f"{self.tokens:,.0f} in {self.steps:,} steps{passes}, {ratio:.2f} x Chinchilla's 20 a parameter"
            unit, size = ("days", 24.0) if hours > 24 else ("hours", 1.0) if hours > 1 else ("minutes", 1 / 60)
            figures["time"] = f"{hours / size:,.1f} {unit} ({hours * layout.devices:,.1f} device hours)"
        return figures

    def warnings(self) -> list[str]:
        """Warnings by rules of thumb, each with its figure and a fix."""
        return [text for is_unwise, text in self._rules() if is_unwise]

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """(whether to warn, warning)."""
        layout, model, memory, needed = self.layout, self.config.model, self.device.memory, self.needed
        million, per_step, optimizer, steps = self.parameters / 1e6, self.tokens_per_step, model.optimizer, self.steps
        is_deep = self.memory.activations > 0.4 * needed
        fixes = {
            f"a smaller data.micro_batch (now {self.micro_batch})": self.micro_batch > 1,
            "trainer.strategy fsdp2": layout.strategy != "fsdp" and layout.devices > 1,
            "model.recompute true": is_deep and not model.recompute,
            "tensor parallelism within a node": is_deep and layout.tensor_parallel == 1 and layout.devices > 1,
            "trainer.precision bf16-mixed": self.precision == "32-true" and self.is_gpu,
        }
        fix = ", ".join(fix for fix, helps in fixes.items() if helps) or "a smaller model"
        yield not self.fits, f"does not fit: a step needs {_bytes(needed)} of a device with {_bytes(memory)}: {fix}"
        is_empty = self.is_gpu and self.accumulated > 1 and needed < 0.4 * memory
        yield is_empty, f"{1 - needed / memory:.0%} of the memory stays empty: a larger data.micro_batch is faster"
        has_buckets = layout.strategy == "ddp" and self.memory.parallel > 1e9
        yield has_buckets, f"DDP's buckets take {_bytes(self.memory.parallel)}: set gradient_as_bucket_view=true of DDPStrategy"
        # nanochat's measured batches: 262k tokens at 42 M parameters, 524k at 70 to 235 M, 1.05 M at 0.3 to 0.9 G.
        usual = 524_288 * (million / 130) ** 0.5
        size = f"{per_step:,} tokens a step (usual is {usual:,.0f} for this model)"
        yield per_step > 4 * usual, f"{size} waste steps: lower data.global_batch"
        yield layout.devices > 1 and per_step < usual / 4, f"{size} are few: a larger data.global_batch is much faster"
        each = per_step / layout.devices
        yield self.is_gpu and each < 4096, f"{each:,.0f} tokens a step and device: too many devices for data.global_batch"
        sending, computing = self.seconds_sending(), self.seconds_per_step
        longer = f"communication takes {sending:.2g} s of a step that computes for {computing:.2g} s"
        yield sending > computing, f"{longer}: fewer devices, or a larger data.micro_batch"
        fitting = f"{million:,.0f} M parameters fit every device"
        yield layout.strategy == "fsdp" and million < 300, f"{fitting}: ddp is simpler and sends less than fsdp2"
        yield steps is None, "the length is unknown: set trainer.max_steps, or let --read-data count the epochs"
        if steps is not None:
            ratio, warmup = self.tokens / (20 * self.parameters), optimizer.warmup_steps
            passes = self.tokens / (self.epoch_tokens or math.inf)
            few = ratio < 0.25 and not self.words
            yield few, f"{ratio:.2f} of Chinchilla's tokens: a smaller model trained longer is better at the same cost"
            yield passes > 4, f"{passes:.0f} passes over the data: after four, repeated tokens teach little (arXiv:2305.16264)"
            yield warmup > 0.1 * steps, f"{warmup} of {steps:,} steps are warm-up: lower model.optimizer.warmup_steps"
            yield million > 100 and warmup < 100, f"a warm-up of {warmup} steps is short for {million:,.0f} M parameters"
        width, head = self.width, self.width // (self.heads or self.width)
        is_untuned = optimizer.base_width is None and width > 256 and optimizer.name != "sgd" and not self.words
        tuned = "set model.optimizer.base_width to the width the rates were tuned at (128 for the defaults)"
        yield is_untuned, f"rates tuned on a narrow model are too high for the heads at width {width}: {tuned}"
        yield self.precision.startswith("16"), "float16 overflows where bfloat16 does not: trainer.precision bf16-mixed"
        if self.is_gpu:
            unused = 1 - self.device.float32 / self.device.bf16
            yield self.precision == "32-true", f"float32 leaves {unused:.0%} of the {self.hardware} unused: bf16-mixed"
            yield width % 128 > 0, f"width {width} is no multiple of 128: matrix units compute whole tiles of 128"
            yield head not in (1, 64, 128), f"heads of size {head}: attention is fastest with 64 or 128"
        missing = "there is no tokenizer.json" if self.words else f"{model.tokenizer} does not exist yet (--text-tokens)"
        yield not self.has_tokenizer, f"{missing}: planned with {self.vocabulary.text_tokens:,} text tokens"
        padding = f"{1 - self.fill:.0%} of the positions are padding"
        yield self.fill < 0.95, f"{padding}: data.context={self.config.data.context} does not suit these documents"

    def __str__(self) -> str:
        lines = [f"{name:<18}  {text}" for name, text in self.figures().items()]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings())])


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def make_layout(config: Namespace, devices: int | None) -> Layout:
    """Read the trainer's options."""
    devices = count_devices(config.trainer) if devices is None else devices
    options = vars(getattr(config.trainer.strategy, "init_args", None) or Namespace())
    parallel = options.get("tensor_parallel_size", 1)
    if devices < 1 or parallel < 1 or devices % parallel:
        raise ValueError(f"tensor_parallel_size={parallel} must divide the {devices} devices")
    strategy: Any = "fsdp" if is_sharded(config.trainer) else "ddp" if devices > 1 else "single"
    return Layout(strategy, devices, parallel, bool(options.get("gradient_as_bucket_view", False)))


def meta_backbone(config: Namespace) -> Backbone:
    """Build the backbone on the meta device; open weights from their config alone."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    chosen = config.model.backbone.clone()
    if "pretrained" in chosen.init_args:
        chosen.init_args.pretrained = False
    with torch.device("meta"):
        backbone: Backbone = parser.instantiate(Namespace(backbone=chosen)).backbone
    backbone.recompute = config.model.recompute
    return backbone


def meta_model(config: Namespace, tokenizer: Tokenizer, backbone: Backbone | None = None) -> FusedLanguageModel:
    """Build the model on the meta device; pretrained readers from their configs alone."""
    given = vars(config.model.readers).items()
    readers = ReadersConfig(**{name: one and ReaderConfig(**vars(one) | {"pretrained": False}) for name, one in given})
    with torch.device("meta"):
        own = backbone or meta_backbone(config)
        return FusedLanguageModel(own, tokenizer, *codec_configs(config), config.model.dropout, readers=readers)


def count_parts(model: FusedLanguageModel) -> dict[str, int]:
    """Parameters by part of the model."""
    parts = dict.fromkeys(("embeddings", "heads", "backbone matrices", "backbone vectors", "readers", "codecs"), 0)
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if part == "backbone":
            part = "backbone matrices" if parameter.dim() >= 2 else "backbone vectors"
        parts[part if part in parts else "codecs" if part.endswith("codec") else "embeddings"] += parameter.numel()
    return parts


# -- Memory


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
    model: FusedLanguageModel, config: OptimizerConfig, micro_batch: int, context: int, *,
    fractions: tuple[float, ...] = (1.0, 0.0, 0.0), accumulated: bool = False, precision: str = "32-true",
    layout: Layout = Layout(), codec_steps: int = 0, device: Literal["cpu", "cuda"] = "cpu",  # noqa: B008 (immutable)
) -> Memory:  # fmt: skip
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
        optimizer += momenta * count_bytes(group["params"], 1 if group["name"].startswith("codec") else layout.shards)
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
    empty = ("image_starts", "audio_starts", "audio_tokens", "given_images", "given_codes")
    fields |= dict.fromkeys(empty, ("int32", (0,)))
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
