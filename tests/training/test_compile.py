"""Compiled blocks under FSDP2, with the CPU's tracing backend: the C++ compiler takes half a minute a function."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from conftest import BACKBONES
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from pile_app.data.tokenizers import ByteTokenizer
from pile_app.model.backbones import Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.parallel import shard
from pile_app.training.plan import make_batch


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_sharded_blocks_compile_and_give_the_same_gradients(world_of_one: None, half: torch.dtype | None) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = FusedLanguageModel(BACKBONES["transformer"](), ByteTokenizer())
        assert isinstance(model.backbone, Transformer)
        for block in model.backbone.blocks if is_compiled else ():
            block.compile(backend=backend)
        shard(model, mesh, half)
        with torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
            losses = model(make_batch(model, 2, 32, (1.0, 0.0, 0.0)))
        torch.stack([loss.total for loss in losses.values()]).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()})
    assert compiled
    plain, other = found
    assert plain.keys() == other.keys()
    for name in plain:
        torch.testing.assert_close(
            other[name], plain[name], atol=1e-4 if half is None else 0.05, rtol=1e-3 if half is None else 0.1
        )
