"""Processes that form a mesh of devices and run one function each: their tensors are sharded."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from ports import free_port
from processes import forks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from pile_app.data.tokenizers import ByteTokenizer
from pile_app.model.backbones import Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.load import SkipInitialization
from pile_app.training.muon import Muon
from pile_app.training.parallel import WholeModel, clip_gradients, gradient_norm, place_like, shard, tensor_parallel_plan

MeshFunction = Callable[[DeviceMesh, Path], None]


def on_mesh(shape: tuple[int, int], function: MeshFunction, folder: Path) -> None:
    """Runs `function(mesh, folder)` in as many processes as the mesh has devices; each has to end well."""
    port = free_port()
    world = shape[0] * shape[1]
    processes = [forks().Process(target=_member, args=(rank, port, shape, function, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world, [path.read_text()[-2000:] for path in sorted(folder.glob("member-*.txt"))]


def _member(rank: int, port: int, shape: tuple[int, int], function: MeshFunction, folder: Path) -> None:
    with open(folder / f"member-{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=shape[0] * shape[1])
    function(init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel")), folder)
    dist.destroy_process_group()


def shard_on_mesh(mesh: DeviceMesh, folder: Path) -> None:
    """Shard a model of 170 MB, as `fsdp2` does, and check what this process holds of it and has ever held."""
    rank = dist.get_rank()
    before = memory("VmRSS")
    torch.manual_seed(0)
    with SkipInitialization() if rank else nullcontext():
        model = FusedLanguageModel(Transformer(width=768, layers=6, heads=4), ByteTokenizer())
    weights = dict(model.state_dict()) if not rank else {}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    norm = float(sum(p.detach().double().square().sum() for p in model.parameters())) if not rank else 0.0
    whole = WholeModel(model)
    shard(model, mesh)
    held = sum(p.to_local().numel() * 4 for p in model.parameters() if isinstance(p, DTensor))
    assert not any(p.is_meta for p in model.parameters()) and held < 0.6 * size
    assert not rank or memory("VmHWM") - before < 0.85 * size, (memory("VmHWM") - before, size)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    gathered = whole.gather(model)
    assert (gathered is None) == bool(rank)
    if gathered is not None:
        assert norm and all(torch.equal(tensor, weights[name]) for name, tensor in gathered.state_dict().items())


def memory(name: str) -> int:
    """Bytes that this process holds in memory (VmRSS), or has held at most (VmHWM)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def make_blocks() -> torch.nn.Module:
    """Two blocks of a Transformer whose matrices are tall, wide and square, and do not divide evenly; gradients with a seed."""
    torch.manual_seed(1)
    backbone = Transformer(width=24, layers=2, heads=4, key_value_heads=2, feed_forward=1.75)
    for parameter in backbone.parameters():
        parameter.data = torch.randn_like(parameter)
    return backbone


def gradients(step: int, model: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def moved_by_muon(model: torch.nn.Module, muon: type[torch.optim.Muon]) -> dict[str, torch.Tensor]:
    """Weights after three steps."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizer = muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        for parameter, gradient in zip(model.parameters(), gradients(step, model), strict=True):
            parameter.grad = place_like(gradient, parameter)
        optimizer.step()
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def clip_parts(model: torch.nn.Module) -> torch.Tensor:
    norm = gradient_norm(model.parameters())
    clip_gradients(model.parameters(), 5.0, norm)
    return norm


def clip_whole(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)


def clipped(model: torch.nn.Module, clip: Callable[[torch.nn.Module], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients after clipping, and what their norm was."""
    for parameter, gradient in zip(model.parameters(), gradients(7, model), strict=True):
        parameter.grad = place_like(gradient, parameter)
    norm = clip(model)
    return {"norm": norm} | {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def save_from_mesh(mesh: DeviceMesh, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    model = make_blocks()
    for block in model.blocks:  # type: ignore[union-attr]
        if mesh.shape[1] > 1:
            parallelize_module(block, mesh["tensor_parallel"], tensor_parallel_plan(model, mesh.shape[1]))
        fully_shard(block, mesh=mesh["data_parallel"])
    moved, gradients = moved_by_muon(model, Muon), clipped(model, clip_parts)
    if dist.get_rank() == 0:
        torch.save((moved, gradients), folder / "saved.pt")
