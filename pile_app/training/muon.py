"""Muon (https://kellerjordan.github.io/posts/muon/): torch's, also for CPUs that do not multiply bfloat16 and for matrices that
are cut over devices.

torch's orthogonalizes in bfloat16. On a CPU with AVX2 alone 0.3 GFLOPS were measured, and 77 in float32: it took nine tenths
of the demo's training (docs/benchmarks.md). So on CPUs it is done in float32 but where bfloat16 has instructions.

Of cut matrices, momentum is elementwise and stays cut. Newton-Schulz needs whole matrices: of every W matrices each of W
devices receives one (all-to-all), orthogonalizes it, and sends the parts back. So a device does 1 / W of the work, and what is
sent are two bfloat16 copies of the matrices a step, whatever W is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Rectangle = tuple[slice, slice]  # rows and columns of a matrix that a device holds


def cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def compute_dtype(device: torch.device) -> torch.dtype:
    """In which matrices are orthogonalized."""
    return torch.bfloat16 if device.type != "cpu" or cpu_multiplies_bfloat16() else torch.float32


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, in float32 where the CPU does not multiply bfloat16."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        device = self.param_groups[0]["params"][0].device
        if compute_dtype(device) == torch.bfloat16:
            super().step()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                    update = momentum_update(parameter.grad, state["momentum_buffer"], group)
                    move(parameter, newton_schulz(update, group), parameter.shape, group)


class ShardedMuon(torch.optim.Muon):
    """The groups, the state ("momentum_buffer") and the steps of `torch.optim.Muon` on whole matrices."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_mesh: dict[DeviceMesh, list[DTensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_mesh[parameter.device_mesh].append(parameter)
            for mesh, parameters in by_mesh.items():
                for first in range(0, len(parameters), mesh.size()):
                    self._step_together(group, mesh, parameters[first : first + mesh.size()])

    def _step_together(self, group: dict[str, Any], mesh: DeviceMesh, parameters: list[DTensor]) -> None:
        """One step of at most as many matrices as devices; the i-th device orthogonalizes the i-th."""
        updates = []
        for parameter in parameters:
            assert isinstance(parameter.grad, DTensor)
            gradient = parameter.grad.to_local()
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            updates.append(momentum_update(gradient, state["momentum_buffer"].to_local(), group))
        ranks = mesh.mesh.flatten().tolist()
        me = ranks.index(dist.get_rank())
        parts = [[rectangle(parameter, rank) for rank in ranks] for parameter in parameters]
        mine = [of_parameter[me] for of_parameter in parts]
        own = parts[me] if me < len(parameters) else []
        process_group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
        like = updates[0].new_empty(0, dtype=compute_dtype(updates[0].device))
        received = exchange([update.to(like.dtype) for update in updates], own, like, process_group)
        pieces: list[Tensor] = []
        if own:
            whole = like.new_zeros(parameters[me].shape)
            for rows_columns, piece in zip(own, received, strict=True):
                whole[rows_columns] = piece
            whole = newton_schulz(whole, group)
            pieces = [whole[rows_columns] for rows_columns in own]
        returned = exchange(pieces, mine, like, process_group)
        for parameter, piece in zip(parameters, returned, strict=True):
            move(parameter.to_local(), piece, parameter.shape, group)


def momentum_update(gradient: Tensor, buffer: Tensor, group: dict[str, Any]) -> Tensor:
    """What is orthogonalized; the gradient goes into the buffer."""
    buffer.lerp_(gradient, 1 - group["momentum"])
    return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def move(parameter: Tensor, update: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
    """The step. `shape`: of the whole matrix that `parameter` may be a part of."""
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


def newton_schulz(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """The quintic iteration of torch's Muon, in the matrix's own type."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def rectangle(matrix: DTensor, rank: int) -> Rectangle:
    """What device `rank` holds of a matrix. Of two cuts of one dimension that of the last mesh dimension comes first, as
    tensor parallelism is applied before FSDP2."""
    mesh = matrix.device_mesh
    coordinates = (mesh.mesh == rank).nonzero()[0].tolist()
    begin, size = [0, 0], list(matrix.shape)
    for devices, place, placement in reversed(list(zip(mesh.shape, coordinates, matrix.placements, strict=True))):
        if placement.is_replicate():
            continue
        dimension = placement.dim
        chunk = -(-size[dimension] // devices)  # as `torch.chunk` cuts
        skipped = min(place * chunk, size[dimension])
        begin[dimension] += skipped
        size[dimension] = min(chunk, size[dimension] - skipped)
    return slice(begin[0], begin[0] + size[0]), slice(begin[1], begin[1] + size[1])


def exchange(sent: list[Tensor], expected: list[Rectangle], like: Tensor, group: Any) -> list[Tensor]:
    """Sends the i-th matrix to the i-th device; returns what the devices sent here, of the shapes expected, in their order.
    `like`: empty, of their type and device."""
    shapes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in expected]
    world = dist.get_world_size(group)
    out_sizes = [tensor.numel() for tensor in sent] + [0] * (world - len(sent))
    in_sizes = [rows * columns for rows, columns in shapes] + [0] * (world - len(shapes))
    outgoing = torch.cat([tensor.flatten() for tensor in sent]) if sent else like
    incoming = like.new_empty(sum(in_sizes))
    dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
    return [piece.view(shape) for piece, shape in zip(incoming.split(in_sizes), shapes, strict=False)]
