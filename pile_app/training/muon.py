"""Muon (https://kellerjordan.github.io/posts/muon/) for matrices that are cut over devices.

Momentum is elementwise and stays cut. Newton-Schulz needs whole matrices: of every W matrices each of W devices receives one
(all-to-all), orthogonalizes it with torch's own Muon, and sends the parts back. So a device does 1 / W of the work, and what is
sent are two bfloat16 copies of the matrices a step, whatever W is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Rectangle = tuple[slice, slice]  # rows and columns of a matrix that a device holds


class ShardedMuon(torch.optim.Muon):
    """The groups, the state ("momentum_buffer") and the steps of `torch.optim.Muon` on whole matrices."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_mesh: dict[DeviceMesh, list[DTensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_mesh[parameter.device_mesh].append(parameter)
            for mesh, parameters in by_mesh.items():
                for first in range(0, len(parameters), mesh.size()):
                    self._step_together(group, mesh, parameters[first : first + mesh.size()])
        return loss

    def _step_together(self, group: dict[str, Any], mesh: DeviceMesh, parameters: list[DTensor]) -> None:
        """One step of at most as many matrices as devices; the i-th device orthogonalizes the i-th."""
        momentum = group["momentum"]
        updates = []
        for parameter in parameters:
            assert isinstance(parameter.grad, DTensor)
            gradient = parameter.grad.to_local()
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            buffer = state["momentum_buffer"].to_local()
            buffer.lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(buffer, momentum) if group["nesterov"] else buffer)
        ranks = mesh.mesh.flatten().tolist()
        me = ranks.index(dist.get_rank())
        parts = [[rectangle(parameter, rank) for rank in ranks] for parameter in parameters]
        mine = [of_parameter[me] for of_parameter in parts]
        own = parts[me] if me < len(parameters) else []
        process_group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
        received = exchange([update.bfloat16() for update in updates], own, updates[0].device, process_group)
        pieces: list[Tensor] = []
        if own:
            whole = updates[0].new_zeros(parameters[me].shape, dtype=torch.bfloat16)
            for rows_columns, piece in zip(own, received, strict=True):
                whole[rows_columns] = piece
            whole = orthogonalize(whole, group)
            pieces = [whole[rows_columns] for rows_columns in own]
        returned = exchange(pieces, mine, updates[0].device, process_group)
        for parameter, piece in zip(parameters, returned, strict=True):
            rows, columns = parameter.shape
            local = parameter.to_local()
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(piece, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Newton-Schulz on a whole matrix, both bfloat16, by torch's Muon: one step from zero at rate 1 and without momentum."""
    is_tall = matrix.size(0) > matrix.size(1)
    wide = (matrix.T if is_tall else matrix).float()
    parameter = torch.nn.Parameter(torch.zeros_like(wide))
    parameter.grad = wide
    settings = {name: group[name] for name in ("ns_coefficients", "ns_steps", "eps")}
    torch.optim.Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, **settings).step()
    result = -parameter.detach().bfloat16()
    return result.T if is_tall else result


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


def exchange(sent: list[Tensor], expected: list[Rectangle], device: torch.device, group: Any) -> list[Tensor]:
    """Sends the i-th matrix to the i-th device; returns what the devices sent here, of the shapes expected, in their order."""
    shapes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in expected]
    world = dist.get_world_size(group)
    out_sizes = [tensor.numel() for tensor in sent] + [0] * (world - len(sent))
    in_sizes = [rows * columns for rows, columns in shapes] + [0] * (world - len(shapes))
    outgoing = torch.cat([tensor.flatten() for tensor in sent]) if sent else torch.empty(0, dtype=torch.bfloat16, device=device)
    incoming = torch.empty(sum(in_sizes), dtype=torch.bfloat16, device=device)
    dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
    return [piece.view(shape) for piece, shape in zip(incoming.split(in_sizes), shapes, strict=False)]
