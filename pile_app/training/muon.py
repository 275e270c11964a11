"""Muon (https://kellerjordan.github.io/posts/muon/), also for sharded matrices and for CPUs without bfloat16 instructions.

torch's Muon orthogonalizes in bfloat16, at 0.3 GFLOPS on a CPU with AVX2 only, against 77 in float32 (docs/results.md).

Momentum is elementwise and stays sharded. Newton-Schulz needs whole matrices: of every W matrices each of W devices receives
one (all-to-all), orthogonalizes it, and sends the parts back. So a device does 1 / W of the work, and two bfloat16 copies of
the matrices are sent in a step, whatever W is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pile_app.model.base import cpu_multiplies_bfloat16

Rectangle = tuple[slice, slice]  # rows and columns of a matrix that a device holds


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which matrices are orthogonalized."""
    return torch.bfloat16 if device.type != "cpu" or cpu_multiplies_bfloat16() else torch.float32


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with the same groups and state ("momentum_buffer"), for whole and sharded matrices."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_mesh: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_mesh[getattr(parameter, "device_mesh", None)].append(parameter)
            if group.get("stacked"):  # many small matrices, which no device shares
                self._step_stacked(group, by_mesh.pop(None, []))
            for mesh, parameters in by_mesh.items():
                count = mesh.size() if mesh is not None else 1
                for first in range(0, len(parameters), count):
                    self._step_together(group, mesh, parameters[first : first + count])

    def _step_together(self, group: dict[str, Any], mesh: DeviceMesh | None, parameters: list[Tensor]) -> None:
        """Move at most as many matrices as devices; the i-th device orthogonalizes the i-th."""
        updates = [self._update(group, parameter) for parameter in parameters]
        like = updates[0].new_empty(0, dtype=compute_dtype(updates[0].device))
        updates = [update.to(like.dtype) for update in updates]
        if mesh is None:
            return move(parameters[0], newton_schulz(updates[0], group), parameters[0].shape, group)
        ranks = mesh.mesh.flatten().tolist()
        me = ranks.index(dist.get_rank())
        parts = [[rectangle(parameter, rank) for rank in ranks] for parameter in parameters]
        own = parts[me] if me < len(parameters) else []
        process_group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
        received = exchange(updates, own, like, process_group)
        pieces: list[Tensor] = []
        if own:
            whole = like.new_zeros(parameters[me].shape)
            for rows_columns, piece in zip(own, received, strict=True):
                whole[rows_columns] = piece
            whole = newton_schulz(whole, group)
            pieces = [whole[rows_columns] for rows_columns in own]
        returned = exchange(pieces, [of_parameter[me] for of_parameter in parts], like, process_group)
        for parameter, piece in zip(parameters, returned, strict=True):
            move(local(parameter), piece, parameter.shape, group)

    def _step_stacked(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Orthogonalize matrices of the same shape at once: on a CPU a call costs more than a small product."""
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for shape, alike in by_shape.items():
            updates = torch.stack([self._update(group, parameter) for parameter in alike])
            for parameter, update in zip(alike, newton_schulz(updates.to(compute_dtype(updates.device)), group), strict=True):
                move(parameter, update, shape, group)

    def _update(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """Update the momentum; return the local part of what is orthogonalized."""
        state = self.state[parameter]
        assert parameter.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient, buffer = local(parameter.grad), local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def move(parameter: Tensor, update: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
    """Take the step. `shape`: of the whole matrix that `parameter` may be a part of."""
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


def newton_schulz(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Orthogonalize one matrix, or each of a stack, by the quintic iteration of torch's Muon, in the matrix's own type."""
    a, b, c = group["ns_coefficients"]
    is_tall, is_one = matrix.size(-2) > matrix.size(-1), matrix.dim() == 2
    x = matrix.mT if is_tall else matrix
    x = x / (x.norm() if is_one else x.norm(dim=(-2, -1), keepdim=True)).clamp(min=group["eps"])
    add = torch.addmm if is_one else torch.baddbmm
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def rectangle(matrix: Tensor, rank: int) -> Rectangle:
    """Return the part of a matrix that device `rank` holds."""
    # If both mesh dimensions shard one dimension, the last comes first, as tensor parallelism is applied before FSDP2.
    assert isinstance(matrix, DTensor)
    mesh = matrix.device_mesh
    coordinates = (mesh.mesh == rank).nonzero()[0].tolist()
    begin, size = [0, 0], list(matrix.shape)
    for devices, index, placement in reversed(list(zip(mesh.shape, coordinates, matrix.placements, strict=True))):
        if placement.is_replicate():
            continue
        dimension = placement.dim
        chunk = -(-size[dimension] // devices)  # as in `torch.chunk`
        skipped = min(index * chunk, size[dimension])
        begin[dimension] += skipped
        size[dimension] = min(chunk, size[dimension] - skipped)
    return slice(begin[0], begin[0] + size[0]), slice(begin[1], begin[1] + size[1])


def exchange(sent: list[Tensor], expected: list[Rectangle], like: Tensor, group: Any) -> list[Tensor]:
    """Send the i-th matrix to the i-th device; return what the devices sent here, in their order, as `like`."""
    shapes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in expected]
    world = dist.get_world_size(group)
    out_sizes = [tensor.numel() for tensor in sent] + [0] * (world - len(sent))
    in_sizes = [rows * columns for rows, columns in shapes] + [0] * (world - len(shapes))
    outgoing = torch.cat([tensor.flatten() for tensor in sent]) if sent else like
    incoming = like.new_empty(sum(in_sizes))
    dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
    return [piece.view(shape) for piece, shape in zip(incoming.split(in_sizes), shapes, strict=False)]
