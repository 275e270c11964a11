"""`pile plan`: what a configuration will need and how long it will take, before anything of it is there.

The model is built on PyTorch's meta device, so 7 billion parameters are counted in seconds; memory comes from a step on fake
tensors (`memory.py`). Time is arithmetic: FLOPs a token over the device's FLOP/s times the utilization that is asked for.
`advice.py` writes it down, and says what is unwise.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch.utils.flop_counter import FlopCounterMode

from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from pile_app.documents import AUDIO, IMAGE, MODALITIES
from pile_app.model.backbones import Backbone
from pile_app.model.codecs import AudioCodec, ImageCodec
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.callbacks import measure_matmul_flops
from pile_app.training.cli import codec_configs, count_devices, fast_precision, parse_config
from pile_app.training.memory import Layout, Memory, plan_memory
from pile_app.training.optim import OptimizerConfig
from pile_app.vocabulary import Vocabulary


@dataclass(frozen=True)
class Device:
    """A kind of device, by its maker's data sheet: dense bfloat16 and float32 (no TF32) FLOP/s, bytes of memory, bytes a second
    that one device sends within a node and between nodes (a 400 or 200 Gbit/s adapter each)."""

    bf16: float
    float32: float
    memory: float
    within: float
    between: float

    def flops(self, precision: str) -> float:
        return self.float32 if precision.startswith("32") else self.bf16


DEVICES = {
    "h100": Device(989e12, 67e12, 80e9, 450e9, 50e9),  # SXM
    "h200": Device(989e12, 67e12, 141e9, 450e9, 50e9),
    "b200": Device(2250e12, 80e12, 180e9, 900e9, 50e9),
    "a100": Device(312e12, 19.5e12, 80e9, 300e9, 25e9),  # SXM, 80 GB
    "l40s": Device(362e12, 91.6e12, 48e9, 32e9, 25e9),
    "rtx4090": Device(165e12, 82.6e12, 24e9, 32e9, 3e9),
}
NODE = 8  # devices of a node
RESERVE = 1.5e9  # bytes that CUDA's context, NCCL and cuBLAS take (not measured)
FRAGMENTS = 1.15  # resident over allocated memory on a CPU, measured 1.08 to 1.22 (benchmarks/plan_memory.py)


@dataclass(frozen=True)
class DataShape:
    """What the data are like. `tokens`: of one pass over all sources, None: not known."""

    fill: float
    attended: float
    shares: tuple[float, float, float]
    tokens: int | None = None
    measured: bool = False


@dataclass(frozen=True)
class Plan:
    """The answer. Bytes, tokens, FLOPs and seconds; `parts`: parameters by part of the model."""

    config: Namespace
    vocabulary: Vocabulary
    tokenizer_is_there: bool
    parts: dict[str, int]
    data: DataShape
    device_name: str
    device: Device
    layout: Layout
    precision: str
    utilization: float
    micro_batch: int
    accumulated: int
    steps: int | None
    flops_per_token: float
    codec_flops_per_token: float
    memory: Memory

    @property
    def language_parameters(self) -> int:
        return sum(size for part, size in self.parts.items() if part != "codecs")

    @property
    def tokens_per_step(self) -> int:
        return int(self.config.data.global_batch * self.config.data.context)

    @property
    def tokens(self) -> float | None:
        return None if self.steps is None else self.steps * self.tokens_per_step * self.data.fill

    @property
    def seconds_per_step(self) -> float:
        """Of computing alone: at the utilization, which is understood to contain what is lost to waiting."""
        flops = self.tokens_per_step * (self.flops_per_token + self.codec_flops_per_token)
        return flops / (self.layout.devices * self.device.flops(self.precision) * self.utilization)

    @property
    def seconds_sending(self) -> float:
        """What each device sends and receives in a step, one after the other; most of it can hide behind computing.

        Ring all-reduce (DDP): twice the gradients. FSDP2: weights twice and gradients once for every micro-batch. Tensor
        parallel: four sums a block over the activations of a micro-batch.
        """
        layout, speed = self.layout, self.device.between if self.layout.devices > NODE else self.device.within
        whole = self.memory.gradients * layout.shards
        sent = 0.0
        if layout.data_parallel > 1:
            half = 0.5 if self.precision == "bf16-mixed" else 1.0
            sent = {"fsdp": self.accumulated * (2 * half + 1) * whole, "ddp": 2.0 * whole}.get(layout.strategy, 0.0) / speed
        if layout.tensor_parallel > 1:
            sizes = self.config.model.backbone.init_args
            activations = self.micro_batch * self.config.data.context * sizes.width * (4 if self.precision == "32-true" else 2)
            sent += self.accumulated * sizes.layers * 4 * 2 * activations / self.device.within
        return sent

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and optimizer of all devices (too much under tensor parallel: its devices hold some of it alike)."""
        return 4 * sum(self.parts.values()) + self.memory.optimizer * self.layout.shards * self.layout.tensor_parallel

    @property
    def peak_bytes(self) -> float:
        """What the device has to have: with what malloc keeps, or on CUDA with the runtime's own and 5 % for fragments."""
        return self.memory.peak * FRAGMENTS if self.device_name == "cpu" else self.memory.peak * 1.05 + RESERVE


def make_plan(
    arguments: list[str],
    devices: int | None = None,
    device: str = "h100",
    utilization: float = 0.4,
    strategy: str | None = None,
    tensor_parallel: int | None = None,
    text_tokens: int = 32_762,
    read_data: bool = False,
) -> Plan:
    """The plan of a configuration.

    Args:
        arguments: as `train.py` takes them.
        devices: of the whole run; None: what the configuration says, else 1.
        device: one of `DEVICES`, or cpu (measured: this machine).
        utilization: share of the device's FLOP/s that will be reached.
        strategy: single, ddp or fsdp; None: what the configuration says.
        tensor_parallel: devices that share the matrices of a block; None: what the configuration says.
        text_tokens: size of the tokenizer, where its file is not there yet.
        read_data: open the shards and look at some packs, instead of assuming full packs of one document each.

    Raises:
        ValueError: the configuration, or what is asked of it, cannot be.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is a share, 0 < utilization <= 1, not {utilization}")
    config = parse_config(arguments)
    layout = make_layout(config, devices, strategy, tensor_parallel)
    precision = config.trainer.precision or (fast_precision("cpu") if device == "cpu" else "bf16-mixed")
    precision = {"32": "32-true", "bf16": "bf16-mixed"}.get(str(precision), str(precision))
    micro_batch, accumulated = PileDataModule.micro_batches(config.data, layout.data_parallel)
    tokenizer, is_there = find_tokenizer(config.model.tokenizer, text_tokens)
    model = meta_model(config, tokenizer)
    data = look_at_data(config, model, tokenizer) if read_data else assume_data(config, model.vocabulary)
    steps = config.trainer.max_steps if config.trainer.max_steps > 0 else None
    if config.data.epochs is not None and data.tokens is not None:
        in_epochs = math.ceil(config.data.epochs * data.tokens / data.fill / config.data.context / config.data.global_batch)
        steps = min(in_epochs, steps or in_epochs)
    parts, flops = count_parts(model), model.flops_per_token(data.attended, data.shares)
    memory = plan_memory(
        model,
        OptimizerConfig(**vars(config.model.optimizer)),
        micro_batch,
        config.data.context,
        shares=data.shares,
        accumulated=accumulated > 1,
        precision=precision,
        layout=layout,
        codec_steps=config.model.codec_steps,
        device="cpu" if device == "cpu" else "cuda",
    )
    return Plan(
        config, model.vocabulary, is_there, parts, data, device, find_device(device), layout, precision, utilization,
        micro_batch, accumulated, steps, flops, codec_flops(config, data), memory,
    )  # fmt: skip


def find_device(name: str) -> Device:
    if name != "cpu":
        return DEVICES[name]
    rate = measure_matmul_flops(torch.device("cpu"))
    return Device(rate, rate, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 5e9, 1e9)


def make_layout(config: Namespace, devices: int | None, strategy: str | None, tensor_parallel: int | None) -> Layout:
    """From the trainer's options, unless they are given."""
    trainer = config.trainer
    devices = count_devices(trainer) if devices is None else devices
    chosen = trainer.strategy
    options = {} if isinstance(chosen, str) else vars(getattr(chosen, "init_args", None) or Namespace())
    name = (chosen if isinstance(chosen, str) else chosen.class_path).lower()
    if strategy is None:
        sharded = any(word in name for word in ("fsdp", "modelparallel", "sharded"))
        strategy = "fsdp" if sharded else "ddp" if devices > 1 else "single"
    size = options.get("tensor_parallel_size", 1)
    parallel = tensor_parallel or (size if isinstance(size, int) else 1)
    if devices < 1 or parallel < 1 or devices % parallel:
        raise ValueError(f"tensor_parallel={parallel} must divide the {devices} devices")
    if parallel > 1 and strategy != "fsdp":
        raise ValueError(f"tensor_parallel={parallel} needs the strategy fsdp, not {strategy}")
    if strategy == "single" and devices > 1:
        raise ValueError(f"{devices} devices need a strategy: ddp or fsdp")
    return Layout(strategy, devices, parallel, bool(options.get("gradient_as_bucket_view", False)))  # type: ignore[arg-type]


class _PlannedTokenizer(ByteTokenizer):
    """Stands for a tokenizer that is not there yet, of which only the size is known."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.fingerprint = size, "planned"
        self.token_bytes = np.ones(size, np.int64)


def find_tokenizer(spec: str, text_tokens: int) -> tuple[Tokenizer, bool]:
    """(the tokenizer or one of that size, whether it is there)."""
    if spec == "bytes" or os.path.exists(spec):
        return load_tokenizer(spec), True
    return _PlannedTokenizer(text_tokens), False


def meta_model(config: Namespace, tokenizer: Tokenizer) -> FusedLanguageModel:
    """The model of a configuration, with shapes and without numbers."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    image, audio = codec_configs(config)
    with torch.device("meta"):
        backbone = parser.instantiate_classes(Namespace(backbone=config.model.backbone)).backbone
        backbone.recompute = config.model.recompute
        return FusedLanguageModel(backbone, tokenizer, image, audio, config.model.dropout)


def count_parts(model: FusedLanguageModel) -> dict[str, int]:
    """Parameters by part."""
    matrices = sum(p.numel() for p in model.backbone.parameters() if p.dim() >= 2)
    parts = {
        "embeddings": sum(p.numel() for p in model.embeddings.parameters())
        + model.image_rows.numel() + model.image_columns.numel(),
        "heads": sum(p.numel() for p in model.heads.parameters()),
        "backbone matrices": matrices,
        "backbone vectors": sum(p.numel() for p in model.backbone.parameters()) - matrices,
        "codecs": sum(p.numel() for codec in model.codecs.values() for p in codec.parameters()),
    }  # fmt: skip
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    return parts


def assume_data(config: Namespace, vocabulary: Vocabulary) -> DataShape:
    """Packs full of one document each, which attends to the most, and as many targets of each modality."""
    used = vocabulary.modalities
    text, image, audio = ((modality in used) / len(used) for modality in range(len(MODALITIES)))
    return DataShape(1.0, (config.data.context + 1) / 2, (text, image, audio))


def look_at_data(config: Namespace, model: FusedLanguageModel, tokenizer: Tokenizer, packs: int = 64) -> DataShape:
    """Opens the shards, and assembles some packs."""
    values = {name: value for name, value in vars(config.data).items() if name not in ("vocabulary", "tokenizer", "sources")}
    sources = {name: Source(**vars(source)) for name, source in config.data.sources.items()}
    data = PileDataModule(sources=sources, vocabulary=model.vocabulary, tokenizer=tokenizer, **values)
    data.prepare_data()
    data.setup()
    dataset = data.train_dataset()
    batch = dataset.__getitems__(list(range(packs)))
    places = (batch.document >= 0).sum().item()
    targets = [len(places_of) for places_of in batch.targets]
    text, image, audio = (count / places for count in targets)
    packs_per_epoch = data.order.packs_per_epoch
    fill = places / batch.document.numel()
    attended = float((batch.position + 1)[batch.document >= 0].float().mean())
    return DataShape(fill, attended, (text, image, audio), round(packs_per_epoch * config.data.context * fill), True)


def codec_flops(config: Namespace, data: DataShape) -> float:
    """FLOPs of the frozen codecs for one token of the stream: counted while they encode one image and one second of sound."""
    total = 0.0
    image, audio = codec_configs(config)
    with FlopCounterMode(display=False) as counter:
        if image:
            codes = ImageCodec(image).encode(torch.zeros(1, image.channels, image.size, image.size, dtype=torch.uint8))
            total = data.shares[IMAGE] * counter.get_total_flops() / codes.numel()
    with FlopCounterMode(display=False) as counter:
        if audio:
            count = audio.sample_rate // audio.samples_per_token
            codes = AudioCodec(audio).encode(torch.zeros(count, audio.samples_per_token), torch.tensor([count]))
            total += data.shares[AUDIO] * counter.get_total_flops() / codes.numel()
    return total
