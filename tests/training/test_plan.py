"""`pile plan` tells what a run will need: counted on the meta device, traced on fake tensors, and equal to the real thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import AUDIO, BACKBONES, IMAGE, REPOSITORY, TINY_CONFIG, TinyRun
from torch.utils.flop_counter import FlopCounterMode

from pile_app.cli import main as pile
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.model import attention, loss
from pile_app.model.backbones import LSTM, Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.advice import advise
from pile_app.training.memory import Layout, LiveBytes, make_batch, plan_memory
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.training.plan import Plan, count_parts, make_plan

SIZES = sorted((REPOSITORY / "conf" / "sizes").glob("*.yaml"))
SHARES = (0.5, 0.3, 0.2)


def meta(backbone: str = "transformer") -> FusedLanguageModel:
    with torch.device("meta"):
        return FusedLanguageModel(BACKBONES[backbone](), ByteTokenizer(), IMAGE, AUDIO)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "default.yaml").write_text("{}")  # nothing is below it
    path = tmp_path / "config.yaml"
    path.write_text(TINY_CONFIG.format(shards="nowhere"))
    return path


@pytest.fixture
def planned(config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the plan of the tiny configuration with settings of one's own."""
    monkeypatch.chdir(config.parent)

    def make(*settings: str, **values: Any) -> Plan:
        return make_plan([f"--config={config}", *(f"--{setting}" for setting in settings)], **values)

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
    batch = make_batch(model, 2, 65, SHARES)
    with FlopCounterMode(display=False) as counter:
        torch.stack([one.total for one in model(batch).values()]).sum().backward()
    # In blocks of 128 queries, each of 65 places is multiplied with all 65; and 64 of them have a target.
    backbone = model.flops_per_token(65, (0.0, 0.0, 0.0))
    heads = model.flops_per_token(65, SHARES) - backbone
    assert counter.get_total_flops() / (2 * 65) == pytest.approx(backbone + heads * 64 / 65, rel=0.01)


def test_each_target_goes_through_its_own_head_alone() -> None:
    model = meta()
    text, image, audio = (s.stop - s.start for s in model.vocabulary.slices)
    assert (text, image, audio) == (262, 12, 37)
    none = model.flops_per_token(10, (0, 0, 0))
    assert model.flops_per_token(10, SHARES) - none == pytest.approx(3 * 2 * 32 * (0.5 * 262 + 0.3 * 12 + 0.2 * 37))


def test_weights_gradients_and_optimizer_state_are_those_of_a_real_step() -> None:
    for name in ("muon", "adamw", "sgd"):
        config = OptimizerConfig(name=name)  # type: ignore[arg-type]
        model = FusedLanguageModel(BACKBONES["transformer"](), ByteTokenizer(), IMAGE, AUDIO)
        optimizer, _ = make_optimizer(model, config, 0, 1)
        torch.stack([one.total for one in model(make_batch(model, 1, 64, SHARES)).values()]).sum().backward()
        optimizer.step()
        memory = plan_memory(meta(), config, 1, 64, shares=SHARES)
        state = sum(t.numel() * 4 for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim())
        assert memory.optimizer == state
        assert memory.gradients == sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
        assert memory.weights == sum(t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("backbone", ["transformer", "lstm"])
def test_traced_memory_is_that_of_a_real_step(backbone: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same count of live bytes, over real tensors. (Resident memory of larger models: benchmarks/plan_memory.py.)"""
    monkeypatch.setattr(attention, "LONGEST", 0)  # a plan counts on kernels that keep no probabilities, as GPUs have them
    torch.manual_seed(0)
    model = FusedLanguageModel(BACKBONES[backbone](), ByteTokenizer(), IMAGE, AUDIO)
    batch = make_batch(model, 2, 64, SHARES)
    with LiveBytes([*model.parameters(), *model.buffers(), batch.buffer]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            losses = model(batch)
            total = torch.stack([one.total for one in losses.values()]).sum()
        del losses
        held = live.now
        total.backward()
    memory = plan_memory(meta(backbone), OptimizerConfig(), 2, 64, shares=SHARES, precision=precision)
    assert memory.activations == pytest.approx(held, rel=0.1)
    assert memory.peak - memory.weights - memory.optimizer == pytest.approx(live.peak, rel=0.1)


def test_cross_entropy_is_planned_as_the_device_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU works on a few rows of logits in float32 at a time, a GPU on all of a chunk."""
    monkeypatch.setattr(loss, "BLOCK", 1024)
    peaks = {device: plan_memory(meta("rnn"), OptimizerConfig(), 8, 64, device=device).peak for device in ("cpu", "cuda")}
    assert peaks["cuda"] > peaks["cpu"]
    assert loss.BLOCK == 1024


def test_what_is_shared_out_is_counted_once_over_the_devices() -> None:
    def memory(layout: Layout, accumulated: bool = False) -> Any:
        return plan_memory(meta(), OptimizerConfig(), 2, 64, shares=SHARES, layout=layout, accumulated=accumulated)

    single, ddp, fsdp = memory(Layout()), memory(Layout("ddp", 4)), memory(Layout("fsdp", 4))
    assert ddp.peak == single.peak + single.gradients  # its buckets
    assert memory(Layout("ddp", 4, bucket_view=True)).peak == single.peak
    whole = single.weights - single.gradients  # codecs and buffers
    assert fsdp.weights == single.gradients // 4 + whole
    assert (fsdp.gradients, fsdp.optimizer) == (single.gradients // 4, single.optimizer // 4)
    assert memory(Layout(), accumulated=True).peak > single.peak  # gradients are there while forward runs
    cut = memory(Layout("fsdp", 2, 2))
    matrices = count_parts(meta())["backbone matrices"] * 4
    assert single.weights - cut.weights == matrices // 2
    assert cut.activations < single.activations


def test_time_follows_from_flops_devices_and_utilization(planned: Any) -> None:
    one = planned(utilization=0.5)
    assert one.tokens_per_step == 4 * 128
    assert one.seconds_per_step == pytest.approx(512 * (one.flops_per_token + one.codec_flops_per_token) / (67e12 * 0.5))
    assert planned(devices=4, strategy="ddp", utilization=0.25).seconds_per_step == pytest.approx(one.seconds_per_step / 2)
    assert one.tokens == 6 * 512


def test_batches_that_do_not_divide_are_refused_with_the_mend(planned: Any) -> None:
    with pytest.raises(ValueError, match=r"global_batch=4 .* 3 devices.*numbers of devices: \[1, 2, 4\]"):
        planned(devices=3)
    with pytest.raises(ValueError, match="tensor_parallel=3 must divide the 4 devices"):
        planned(devices=4, tensor_parallel=3)


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (("model.backbone.init_args.width=6400", "model.backbone.init_args.layers=60"), {}, "GB of a device with 80 GB"),
        (("model.backbone.init_args.width=320",), {}, "base_width"),
        (("model.backbone.init_args.width=320",), {}, "no multiple of 128"),
        (("data.global_batch=65536", "data.micro_batch=1"), {}, "lower data.global_batch"),
        ((), {"devices": 4}, "too many devices"),
        (("model.optimizer.warmup_steps=5",), {}, "warm-up"),
        ((), {}, "float32 leaves 93% of the h100 unused"),
        (("model.tokenizer=missing.json",), {"text_tokens": 9001}, "missing.json is not there yet"),
        (("trainer.max_steps=3",), {}, "Chinchilla"),
        ((), {"devices": 2, "strategy": "fsdp"}, "ddp is simpler"),
    ],
)
def test_what_is_unwise_is_said(planned: Any, settings: tuple[str, ...], values: dict[str, Any], said: str) -> None:
    assert said in " ".join(advise(planned(*settings, **values)))


def test_recomputing_blocks_is_planned_as_it_is_trained(planned: Any) -> None:
    kept, recomputed = (planned(f"model.recompute={value}").memory.activations for value in ("false", "true"))
    assert recomputed < 0.8 * kept


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_every_preset_parses_and_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    text = path.read_text()
    command = next(line for line in text.splitlines() if line.startswith("#   pile plan")).split()[3:]
    values = dict(zip(command[::2], command[1::2], strict=True))
    assert values["--config"] == f"conf/sizes/{path.name}"
    plan = make_plan(
        [f"--config={values['--config']}"],
        devices=int(values["--devices"]),
        text_tokens=int(values.get("--text-tokens", 32_762)),
    )
    size = {"tiny": 1e6, "small": 10e6, "50m": 75e6, "150m": 150e6, "500m": 500e6, "1.5b": 1.5e9, "7b": 7e9}[path.stem]
    assert plan.language_parameters == pytest.approx(size, rel=0.4)
    assert 0.8 < plan.tokens / (20 * plan.language_parameters) < 2  # type: ignore[operator]
    assert plan.peak_bytes < plan.device.memory
    said = " ".join(advise(plan))
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
    def rates(width: int, lstm: bool = False, **values: Any) -> dict[str, float]:
        backbone = LSTM(width, 1) if lstm else Transformer(width, 1, 2)
        optimizer, _ = make_optimizer(FusedLanguageModel(backbone, ByteTokenizer()), OptimizerConfig(**values), 0, 9)
        return {str(group["name"]): group["initial_lr"] for group in optimizer.param_groups}

    plain = {"matrices": 0.02, "heads": 0.003, "tables": 0.003, "vectors": 0.003}
    assert rates(64) == rates(64, base_width=64) == plain
    assert rates(128, base_width=64) == plain | {"heads": 0.0015}  # Muon's matrices need nothing
    assert rates(128, base_width=64, name="adamw") == {"matrices": 0.0015, "heads": 0.0015, "tables": 0.003, "vectors": 0.003}
    assert rates(128, lstm=True, base_width=64)["matrices"] == 0.0015
    with pytest.raises(ValueError, match="base_width=0"):
        OptimizerConfig(base_width=0)
