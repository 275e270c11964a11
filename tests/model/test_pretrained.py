"""Weights come into a model by one function; models of any size are built on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pile_app.model.fused import FusedLanguageModel
from pile_app.model.pretrained import load_weights, save_pretrained

MakeModel = Callable[..., FusedLanguageModel]
BACKBONES = ("transformer", "lstm", "rnn", "mingru")


def test_weights_come_from_names_a_prefix_or_a_folder(tiny_model: MakeModel, tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model(perturbed=False)
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()} | {"step": torch.zeros(())}
    load_weights(other.image_codec, state, "model.image_codec.")
    assert all(torch.equal(a, b) for a, b in zip(other.image_codec.parameters(), model.image_codec.parameters(), strict=True))
    assert not torch.equal(other.heads[0].weight, model.heads[0].weight)
    load_weights(other, state, "model.")
    assert torch.equal(other.heads[0].weight, model.heads[0].weight)
    save_pretrained(model, {"backbone": {"class_path": "pile_app.model.backbones.Transformer"}}, tmp_path / "out")
    again = tiny_model(perturbed=False)
    load_weights(again, tmp_path / "out")
    assert torch.equal(again.heads[0].weight, model.heads[0].weight)


def test_weights_of_another_model_are_refused_by_name(tiny_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"backbone\.blocks\.0.*missing in the model"):
        load_weights(tiny_model("lstm"), tiny_model().state_dict())
    with pytest.raises(ValueError, match=r"heads\.0\.weight: \(3, 3\) in the checkpoint, \(262, 32\) in the model"):
        load_weights(tiny_model(), tiny_model().state_dict() | {"heads.0.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_is_built_on_the_meta_device_and_initialized_once_it_has_memory(tiny_model: MakeModel, backbone: str) -> None:
    built = tiny_model(backbone, perturbed=False)
    with torch.device("meta"):
        model = tiny_model(backbone, perturbed=False)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(77)
    model.initialize()
    for (name, tensor), (_, buffer) in zip(model.named_buffers(), built.named_buffers(), strict=True):
        assert torch.equal(tensor, buffer), name
    for (name, weight), (_, expected) in zip(model.named_parameters(), built.named_parameters(), strict=True):
        assert weight.isfinite().all() and abs(float(weight.float().mean() - expected.float().mean())) < 0.2, name
        if weight.numel() >= 64:
            assert float(weight.std(correction=0)) == pytest.approx(float(expected.std(correction=0)), rel=0.5), name
