"""The losses of a run do not depend on devices and micro-batches: of both phases, and of every objective."""

from __future__ import annotations

import json

import pytest
import torch
from attempts import documents
from step_losses import KINDS, Bench, difference, train_losses

from pile_app.training.metrics import TokenMetrics, sum_dtype

NAMES = {
    "codecs": {"image_codec_loss", "audio_codec_loss", "text_loss", "image_loss", "audio_loss"},
    "adversarial": {"image_codec_loss", "audio_codec_loss", "image_adversarial_loss", "audio_adversarial_loss", "image_loss"},
    "classification": {"objective_loss", "text_loss"},
    "retrieval": {"objective_loss"},
    "tagging": {"objective_loss"},
}

FAST = (
    *("--model.optimizer.warmup_steps", "0", "--model.optimizer.learning_rate", "0.1"),
    *("--model.optimizer.codec_learning_rate", "0.1"),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("losses"))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_same_on_one_device_and_in_micro_batches_on_three(bench: Bench, kind: str) -> None:
    """Four packs: one, one and two for the three devices, which run two micro-batches each."""
    one = train_losses(bench.train(f"{kind}-1", kind, *FAST))
    three = train_losses(bench.train(f"{kind}-3", kind, *FAST, "--data.micro_batch", "1", ranks=3))
    assert NAMES[kind] <= {name.removeprefix("train/") for _, name in one}
    assert len({step for step, _ in one}) == 6
    if kind not in ("codecs", "adversarial"):
        best = bench.folder / f"runs/{kind}-1/checkpoints/best.ckpt"
        assert best.exists(), "a short run with an objective is validated once, whatever val_check_interval"
    assert difference(one, three) < 1e-5, (one, three)
    states = [
        torch.load(bench.folder / f"runs/{kind}-{n}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in (1, 3)
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["adversarial", "classification", "retrieval", "tagging"])
def test_sharded_model_loses_what_one_device_loses(bench: Bench, kind: str) -> None:
    one = train_losses(bench.train(f"{kind}-1", kind, *FAST))
    run = bench.train(f"{kind}-sharded", kind, *FAST, "--data.micro_batch", "1", ranks=2, strategy="fsdp2")
    assert difference(one, train_losses(run)) < 1e-5
    assert (
        json.loads((run / "summary.json").read_text()).keys()
        == json.loads((bench.folder / f"runs/{kind}-1/summary.json").read_text()).keys()
    )


def test_run_with_readers_is_resumed_bit_by_bit(bench: Bench) -> None:
    whole = bench.train("classification-1", "classification", *FAST)
    bench.train("cut", "classification", *FAST, codes=(143,), STOP_AT="2")
    cut = bench.train("cut", "classification", *FAST)
    assert train_losses(cut) == train_losses(whole)
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, cut)]
    assert any(name.startswith("model.readers.image.") for name in states[0])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_sums_on_apples_gpus_have_no_float64() -> None:
    table = TokenMetrics(2, sum_dtype(torch.device("mps"))).table
    assert table.dtype == torch.float32 and sum_dtype(torch.device("cuda")) == torch.float64


def test_run_of_one_device_goes_on_with_three_that_do_not_divide_its_batch(bench: Bench) -> None:
    """Fault 17: 8 devices -> 6 was refused."""
    bench.train("grown", "codecs", *FAST, codes=(143,), STOP_AT="2")
    grown = bench.train("grown", "codecs", *FAST, ranks=3)
    whole = bench.train("codecs-1", "codecs", *FAST)
    assert documents(grown) == documents(whole) and len(documents(whole)) == 6
    assert difference(train_losses(whole), train_losses(grown)) < 1e-5
