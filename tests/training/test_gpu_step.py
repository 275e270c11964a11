"""A whole optimizer step on a GPU, traced on fake CUDA tensors: forward, backward, clipping, Muon and AdamW. Every tensor is on
the device, types fit, and nothing waits for the device. (The forward pass in detail: tests/model/test_fake_cuda.py.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import BACKBONES
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from pile_app.data.assembly import assemble, whole
from pile_app.data.batch import Batch
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.segments import segment_length
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.training.plan import fake_gpu, run_backward

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
MakeModel = Callable[..., FusedLanguageModel]
MakeSegment = Callable[..., Segment]


def batch_of(model: FusedLanguageModel, rows: list[list[Segment]]) -> Batch:
    documents = [Document(tuple(row), str(n)) for n, row in enumerate(rows)]
    lengths = [2 + sum(segment_length(model, segment) for segment in row) for row in rows]
    pack = [whole(document, length) for document, length in zip(documents, lengths, strict=True)]
    batch = assemble([pack], model.vocabulary, model.tokenizer, sum(lengths) + 3)
    assert not batch.rejected
    return batch


@contextmanager
def training(model: FusedLanguageModel, precision: str) -> Iterator[None]:
    with fake_gpu((9, 0) if precision != "16-mixed" else (7, 5)):
        model.to_empty(device="cuda")
        with torch.autocast("cuda", HALF.get(precision), enabled=precision in HALF):
            yield


def check_step(parameters: list[nn.Parameter], loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    run_backward(loss)
    parameters = [p for p in parameters if p.numel()]
    assert all(p.grad is not None and p.grad.is_cuda and p.grad.dtype == torch.float32 for p in parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert states and all(value.is_cuda for value in states)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_of_the_language_model(
    tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment, backbone: str, precision: str
) -> None:
    model = tiny_model(backbone).train()
    model.backbone.recompute = backbone == "transformer"
    batch = batch_of(model, [[Segment("three"), image(0), sound(0)], [sound(1, 300), Segment("said")]])
    with training(model, precision):
        batch = batch.to("cuda")
        losses = model(batch)
        assert losses.keys() == {TEXT, IMAGE, AUDIO}
        parameters = [p for name, p in model.named_parameters() if "_codec." not in name]
        optimizer, _ = make_optimizer(model, OptimizerConfig(), 0, 1)
        check_step(parameters, torch.stack([loss.total for loss in losses.values()]).sum() / batch.normalizer, optimizer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_step_of_the_codecs(tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment, precision: str) -> None:
    model = tiny_model().train()
    batch = batch_of(model, [[image(0), sound(0)], [sound(1, 300)]])
    with training(model, precision):
        losses = model.codec_loss(batch.to("cuda"))
        assert losses.keys() == {IMAGE, AUDIO}
        parameters = [p for codec in model.codecs.values() for p in codec.parameters()]
        optimizer, _ = make_optimizer(model, OptimizerConfig(), 1, 2)
        check_step(parameters, torch.stack([torch.as_tensor(loss) for loss in losses.values()]).sum(), optimizer)


def test_a_batch_is_copied_without_waiting_for_the_device(tiny_model: MakeModel) -> None:
    """As Lightning moves it, which copies without blocking only what is a tensor."""
    batch, seen = batch_of(tiny_model(), [[Segment("three")]]), []
    copy = Tensor.to

    def record(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("non_blocking"))
        return copy(self, *args, **kwargs)

    with fake_gpu(), patch.object(Tensor, "to", record):
        assert move_data_to_device(batch, torch.device("cuda")).tokens.is_cuda
    assert seen and all(seen)
