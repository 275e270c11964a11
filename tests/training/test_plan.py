"""`pile plan` says what a run will need: counted on the meta device, traced on fake tensors, equal to the real thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
import yaml
from conftest import AUDIO, BACKBONES, IMAGE, REPOSITORY, TINY_CONFIG, TinyRun
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from pile_app.cli import main as pile
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.model.backbones import LSTM, Transformer
from pile_app.model.codec_configs import ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.readers import ReaderConfig, ReadersConfig
from pile_app.training import parallel
from pile_app.training.cli import parse_config
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.training.plan import (
    Layout,
    LiveBytes,
    Memory,
    Plan,
    count_parts,
    make_batch,
    meta_model,
    plan_memory,
    run_backward,
)

SIZES = sorted((REPOSITORY / "conf" / "sizes").glob("*.yaml"))
FRACTIONS = (0.5, 0.3, 0.2)


def meta(backbone: str = "transformer") -> FusedLanguageModel:
    with torch.device("meta"):
        return FusedLanguageModel(BACKBONES[backbone](), ByteTokenizer(), IMAGE, AUDIO)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "default.yaml").write_text("{}")  # no defaults
    path = tmp_path / "config.yaml"
    path.write_text(TINY_CONFIG.format(shards="nowhere"))
    return path


@pytest.fixture
def planned(config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans the tiny configuration with other settings."""
    monkeypatch.chdir(config.parent)

    def make(*settings: str, **values: Any) -> Plan:
        return Plan([f"--config={config}", *(f"--{setting}" for setting in settings)], **values)

    return make


@pytest.mark.parametrize("backbone", BACKBONES)
def test_parameters_on_the_meta_device_are_those_of_the_real_model(backbone: str) -> None:
    real = FusedLanguageModel(BACKBONES[backbone](), ByteTokenizer(), IMAGE, AUDIO)
    assert {n: p.shape for n, p in meta(backbone).named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    parts = count_parts(meta(backbone))
    assert sum(parts.values()) == sum(p.numel() for p in real.parameters())
    assert parts["codecs"] == sum(p.numel() for codec in real.codecs.values() for p in codec.parameters())


def test_parts_are_what_a_calculation_by_hand_gives() -> None:
    # width 32, 2 layers, 4 heads of 8 with 2 for keys and values; 6 specials + 256 bytes; 12 image codes; 36 + 1 audio codes
    block = 32 * 32 * 2 + 2 * 32 * 16 + 2 * 4 * 32 * 32
    rows = (6 + 256) + (12 + 4 + 3) + (36 + 4 + 3 + 3 + 1)
    parts = count_parts(meta())
    assert parts["backbone matrices"] == 2 * block
    assert parts["backbone vectors"] == 2 * 2
    assert parts["heads"] == rows * 32
    assert parts["embeddings"] == rows * 32 + (2 + 2) * 32  # rows and columns of an image's grid


def test_flops_per_token_are_what_torch_counts() -> None:
    torch.manual_seed(0)
    model = FusedLanguageModel(Transformer(width=32, layers=2, heads=2), ByteTokenizer(), IMAGE, AUDIO)
    batch = make_batch(model, 2, 65, FRACTIONS)
    with FlopCounterMode(display=False) as counter:
        torch.stack([one.total for one in model(batch).values()]).sum().backward()
    # In blocks of 128 queries, each of 65 positions attends to all 65; 64 of them have a target.
    backbone = model.flops_per_token(65, (0.0, 0.0, 0.0))
    heads = model.flops_per_token(65, FRACTIONS) - backbone
    assert counter.get_total_flops() / (2 * 65) == pytest.approx(backbone + heads * 64 / 65, rel=0.01)


def test_each_target_goes_through_its_own_head_alone() -> None:
    model = meta()
    text, image, audio = (s.stop - s.start for s in model.vocabulary.slices)
    assert (text, image, audio) == (262, 12, 37)
    none = model.flops_per_token(10, (0, 0, 0))
    assert model.flops_per_token(10, FRACTIONS) - none == pytest.approx(3 * 2 * 32 * (0.5 * 262 + 0.3 * 12 + 0.2 * 37))


def test_weights_gradients_and_optimizer_state_are_those_of_a_real_step() -> None:
    for name in ("muon", "adamw", "sgd"):
        config = OptimizerConfig(name=name)  # type: ignore[arg-type]
        model = FusedLanguageModel(BACKBONES["transformer"](), ByteTokenizer(), IMAGE, AUDIO)
        optimizer, _ = make_optimizer(model, config, 0, 1)
        torch.stack([one.total for one in model(make_batch(model, 1, 64, FRACTIONS)).values()]).sum().backward()
        optimizer.step()
        memory = plan_memory(meta(), config, 1, 64, fractions=FRACTIONS)
        state = sum(t.numel() * 4 for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim())
        assert memory.optimizer == state
        assert memory.gradients == sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
        assert memory.weights == sum(t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_traced_memory_is_that_of_a_real_step(backbone: str, precision: str) -> None:
    """The same count of live bytes over real tensors."""
    torch.manual_seed(0)
    model = FusedLanguageModel(BACKBONES[backbone](), ByteTokenizer(), IMAGE, AUDIO)
    batch = make_batch(model, 2, 64, FRACTIONS)
    with LiveBytes([*model.parameters(), *model.buffers(), batch.buffer]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            losses = model(batch)
            total = torch.stack([one.total for one in losses.values()]).sum()
        del losses
        held = live.now
        total.backward()
    memory = plan_memory(meta(backbone), OptimizerConfig(), 2, 64, fractions=FRACTIONS, precision=precision)
    assert memory.activations == pytest.approx(held, rel=0.1)
    assert memory.peak - memory.weights - memory.optimizer == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backward_in_python_gives_the_gradients_of_autograd(backbone: str) -> None:
    torch.manual_seed(0)
    model = FusedLanguageModel(BACKBONES[backbone](), ByteTokenizer(), IMAGE, AUDIO)
    model.backbone.recompute = True
    gradients = []
    for backward in (Tensor.backward, run_backward):
        model.zero_grad()
        backward(torch.stack([one.total for one in model(make_batch(model, 2, 16, FRACTIONS)).values()]).sum())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def activations(precision: str, backbone: nn.Module, context: int = 512) -> int:
    with torch.device("meta"):
        model = FusedLanguageModel(backbone, ByteTokenizer())  # type: ignore[arg-type]
    return plan_memory(model, OptimizerConfig(), 2, context, precision=precision, device="cuda").activations


def test_a_plan_for_cuda_traces_the_kernels_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention saves no probabilities, and no mask of T x T is created; it needs heads of a multiple of 8."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return varlen_attn(*args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", count)
    with torch.device("meta"):
        short, long = (activations("bf16-mixed", Transformer(32, 2, heads=2), context) for context in (256, 1024))
        assert len(calls) == 4 and long < 4.2 * short  # linear in the context
        activations("bf16-mixed", Transformer(24, 2, heads=2))
        activations("32-true", Transformer(32, 2, heads=2))
    assert len(calls) == 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_is_planned_for_cuda(backbone: str, precision: str) -> None:
    memory = plan_memory(meta(backbone), OptimizerConfig(), 1, 32, fractions=FRACTIONS, precision=precision, device="cuda")
    assert 0 < memory.activations < memory.peak


def test_recomputed_blocks_save_their_input_only() -> None:
    def planned(recompute: bool) -> Memory:
        model = meta()
        model.backbone.recompute = recompute
        return plan_memory(model, OptimizerConfig(), 2, 64, precision="bf16-mixed", device="cuda")

    assert planned(True).activations < 0.4 * planned(False).activations
    assert planned(True).peak < planned(False).peak


def test_distributed_parts_are_counted_once() -> None:
    def memory(layout: Layout, accumulated: bool = False) -> Memory:
        return plan_memory(meta(), OptimizerConfig(), 2, 64, fractions=FRACTIONS, layout=layout, accumulated=accumulated)

    single, ddp = memory(Layout()), memory(Layout("ddp", 4))
    assert ddp.peak == single.peak + single.gradients  # its buckets
    assert memory(Layout("ddp", 4, bucket_view=True)).peak == single.peak
    assert memory(Layout(), accumulated=True).peak > single.peak  # gradients exist during forward
    cut = memory(Layout("fsdp", 2, 2))
    assert single.weights - cut.weights == count_parts(meta())["backbone matrices"] * 4 // 2
    assert cut.activations < single.activations


@pytest.fixture
def fake_world() -> Iterator[int]:
    """A process group of 64 ranks, only the first of them real; communication does nothing."""
    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    yield 64
    dist.destroy_process_group()


class TorchOnMeta:
    """torch, with the meta device for all others: parameters stay without memory where they would be materialized."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *args: object) -> torch.device:
        return torch.device("meta")


def count_local(tensors: Any) -> int:
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.itemsize for t in tensors)


@pytest.mark.parametrize(
    "tensor_parallel, backbone",
    [(1, ()), (8, ()), (8, ("HuggingFace",)), (1, ("HuggingFace", "--model.backbone.lora={rank: 8}"))],
    ids=["fsdp2", "tensor", "llama-tensor", "llama-lora"],
)
def test_7b_on_64_ranks_holds_to_the_byte_what_the_plan_says(
    fake_world: int, tensor_parallel: int, backbone: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Our Transformer, and Llama 3 8B from its config.json alone, without weights and tokenizer."""
    monkeypatch.chdir(REPOSITORY)
    arguments = ["--config=conf/sizes/7b.yaml"]
    if backbone:
        sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
        transformers.LlamaConfig(**sizes, **heads).save_pretrained(tmp_path)
        arguments += [f"--model.backbone={backbone[0]}", f"--model.backbone.path={tmp_path}", *backbone[1:]]
    config = parse_config(arguments)
    chosen, tokenizer = OptimizerConfig(**vars(config.model.optimizer)), ByteTokenizer()
    model = meta_model(config, tokenizer)
    mesh = init_device_mesh(
        "cpu", (fake_world // tensor_parallel, tensor_parallel), mesh_dim_names=("data_parallel", "tensor_parallel")
    )
    empty = [codec.to_empty(device="cpu") for codec in model.codecs.values()]  # whole on each device
    for name, parameter in list(model.named_parameters()):
        if not parameter.numel():
            parallel._assign(model, name, nn.Parameter(torch.empty(parameter.shape)))
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "torch", TorchOnMeta())
        patched.setattr(Tensor, "copy_", lambda self, values: self)
        parallel.shard(model, mesh, torch.bfloat16)
    for codec in empty:
        codec.to("meta")
    optimizer, _ = make_optimizer(model, chosen, 1, 2)
    for group in optimizer.param_groups:
        group["fused"] = False  # no such kernel on the meta device
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    states: list[Tensor] = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    codecs = [p for codec in model.codecs.values() for p in codec.parameters()]
    gradients = count_local(p.grad for p in model.parameters() if p.grad is not None) - count_local(
        codecs
    )  # which train before the language model

    layout = Layout("fsdp", fake_world, tensor_parallel)
    memory = plan_memory(
        meta_model(config, tokenizer), chosen, 1, 256, precision="bf16-mixed", layout=layout, codec_steps=1, device="cuda"
    )
    assert memory.weights == count_local([*model.parameters(), *model.buffers()])
    assert memory.gradients == gradients
    assert memory.optimizer == count_local(states)


def test_time_follows_from_flops_devices_and_utilization(planned: Any) -> None:
    one = planned(utilization=0.5)
    assert one.tokens_per_step == 4 * 128
    assert one.seconds_per_step == pytest.approx(512 * one.flops_per_token / (67e12 * 0.5))
    assert planned(devices=4, utilization=0.25).seconds_per_step == pytest.approx(one.seconds_per_step / 2)
    assert one.tokens == 6 * 512


def test_impossible_batches_and_layouts_are_refused_with_the_fix(planned: Any) -> None:
    with pytest.raises(ValueError, match=r"global_batch=4 .* 5 devices"):
        planned(devices=5)
    with pytest.raises(ValueError, match="tensor_parallel_size=3 must divide the 4 devices"):
        sharded = "pile_app.training.parallel.ShardedStrategy"
        planned(f"trainer.strategy={sharded}", "trainer.strategy.init_args.tensor_parallel_size=3", devices=4)


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (("model.backbone.init_args.width=32768", "model.backbone.init_args.layers=2"), {}, "GB of a device with 80.0 GB"),
        (("model.backbone.init_args.width=320",), {}, "base_width"),
        (("model.backbone.init_args.width=320",), {}, "no multiple of 128"),
        (("data.global_batch=65536", "data.micro_batch=1"), {}, "lower data.global_batch"),
        ((), {"devices": 4}, "too many devices"),
        (("model.optimizer.warmup_steps=5",), {}, "warm-up"),
        ((), {}, "float32 leaves 93% of the h100 unused"),
        (("model.tokenizer=missing.json",), {"text_tokens": 9001}, "missing.json does not exist yet"),
        (("trainer.max_steps=3",), {}, "Chinchilla"),
        (("trainer.strategy=fsdp2",), {"devices": 2}, "ddp is simpler"),
    ],
)
def test_unwise_settings_are_named_with_a_fix(
    planned: Any, settings: tuple[str, ...], values: dict[str, Any], said: str
) -> None:
    assert said in " ".join(planned(*settings, **values).warnings())


def test_a_step_that_does_not_fit_ends_with_code_2(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    sizes = [f"--model.backbone.init_args.{size}" for size in ("width=32768", "layers=2")]
    with pytest.raises(SystemExit) as ended:
        pile(["plan", "--config", str(config), *sizes])
    assert ended.value.code == 2
    assert "warning: does not fit: a step needs" in capsys.readouterr().out


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_every_preset_parses_and_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    text = path.read_text()
    command = next(line for line in text.splitlines() if line.startswith("#   pile plan")).split()[3:]
    values = dict(zip(command[::2], command[1::2], strict=True))
    assert values["--config"] == f"conf/sizes/{path.name}"
    plan = Plan(
        [f"--config={values['--config']}"],
        devices=int(values["--devices"]),
        text_tokens=int(values.get("--text-tokens", 32_762)),
    )
    size = {"tiny": 1e6, "small": 10e6, "50m": 75e6, "150m": 150e6, "500m": 500e6, "1.5b": 1.5e9, "7b": 7e9}[path.stem]
    assert plan.parameters == pytest.approx(size, rel=0.4)
    assert 0.8 < plan.tokens / (20 * plan.parameters) < 2
    assert plan.fits
    said = " ".join(plan.warnings())
    for one in ("tokens a step", "no multiple of", "base_width", "warm-up", "micro_batch", "buckets"):
        assert one not in said
    assert yaml.safe_load(text)["name"] == path.stem


def test_plan_of_a_run_with_its_data_measures_them(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_run.config.parent)
    pile(["plan", "--config", str(tiny_run.config), "--hardware", "a100", "--read-data", "--trainer.precision=bf16-mixed"])
    said = capsys.readouterr().out
    assert "from 64 packs" in said and "passes over the data" in said and "1 x a100, single, bf16-mixed" in said


def test_rates_follow_the_width_and_stay_at_the_base() -> None:
    def rates(width: int, lstm: bool = False, image: Any = None, **values: Any) -> dict[str, float]:
        backbone = LSTM(width, 1) if lstm else Transformer(width, 1, 2)
        model = FusedLanguageModel(backbone, ByteTokenizer(), image, readers=ReadersConfig(ReaderConfig()))
        optimizer, _ = make_optimizer(model, OptimizerConfig(**values), 0, 9)
        return {str(group["name"]): group["initial_lr"] for group in optimizer.param_groups}

    plain = {"matrices": 0.02, "heads": 0.003, "tables": 0.003, "vectors": 0.003}
    assert rates(64) == rates(64, base_width=64) == plain
    assert rates(128, base_width=64) == plain | {"heads": 0.0015}  # Muon's matrices need nothing
    assert rates(128, base_width=64, name="adamw") == {"matrices": 0.0015, "heads": 0.0015, "tables": 0.003, "vectors": 0.003}
    assert rates(128, lstm=True, base_width=64)["matrices"] == 0.0015
    seeing = rates(
        64, image=ImageCodecConfig(), name="muon", learning_rate=0.0001
    )  # small for trained weights, not for a new CNN
    assert (seeing["vectors"], seeing["readers"], seeing["reader vectors"]) == (0.0001, 0.02, 0.002)
    with pytest.raises(ValueError, match="base_width=0"):
        OptimizerConfig(base_width=0)
