"""Many devices: the language model is cut over them here, from outside; the model knows nothing of it.

    devices = data_parallel x tensor_parallel, a mesh of (D, P); devices of one row (P) train on the same packs

* `fully_shard` (FSDP2): each Transformer block, and everything else of the language model as one more unit, lies in D parts and
  is gathered when its turn comes. All devices gather the same units in the same order, whatever their batches hold.
* Tensor parallel: of each block the P devices of a row hold H / P heads and 1 / P of the feed-forward net each.
* The codecs are small, and what they do depends on the media that a batch happens to hold: every device has them whole, and
  `average_gradients` makes their gradients equal.

Micro-batches accumulate in the sharded gradients, so that none is ever held whole.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from pile_app.model.backbones import Transformer
from pile_app.model.fused import FusedLanguageModel


def tensor_parallel_plan() -> dict[str, ParallelStyle]:
    """How the matrices of a block are cut: by outputs where heads and hidden units begin, by inputs where they end."""
    by_outputs = ("query", "key", "value", "expand")
    by_inputs = ("attention_out", "contract")
    return {name: ColwiseParallel() for name in by_outputs} | {name: RowwiseParallel() for name in by_inputs}


def shard(model: FusedLanguageModel, mesh: DeviceMesh, half: torch.dtype | None = None) -> None:
    """Cuts the language model over the devices, in place.

    Args:
        model: whole, with the same weights on every device.
        mesh: ("data_parallel", "tensor_parallel").
        half: what the blocks compute in (under autocast); their weights are gathered in it. None: as they are.

    Raises:
        ValueError: devices begin with different weights, or the backbone cannot be cut so.
    """
    check_equal_start(model)
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    blocks = list(model.backbone.blocks) if isinstance(model.backbone, Transformer) else []
    if tensor.size() > 1:
        _cut_heads(model, blocks, tensor)
    whole = {p for codec in model.codecs.values() for p in codec.parameters()}
    whole |= {p for p in model.parameters() if not p.numel()}  # tables of a modality that the model does not have
    # Autocast rounds the matrices to `half` anyway; rounding them first halves what is sent. Gradients are summed in float32.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=data, mp_policy=policy if half else MixedPrecisionPolicy())
    fully_shard(model, mesh=data, ignored_params=whole)


def _cut_heads(model: FusedLanguageModel, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    plan = tensor_parallel_plan()
    if not blocks:
        raise ValueError(
            f"tensor_parallel_size={mesh.size()} needs a Transformer, a {type(model.backbone).__name__} has no heads to cut: "
            "set it to 1"
        )
    for block in blocks:
        linear = {name: child for name, child in block.named_modules() if isinstance(child, nn.Linear)}
        if unknown := linear.keys() - plan.keys():
            raise ValueError(f"tensor_parallel_plan does not say how {sorted(unknown)} of a block are cut")
        for name in ("query", "key"):
            heads = linear[name].out_features // int(block.head_width)  # type: ignore[arg-type]
            if heads % mesh.size():
                raise ValueError(f"tensor_parallel_size={mesh.size()} must divide the backbone's {heads} {name} heads")
        parallelize_module(block, mesh, plan)


def check_equal_start(model: nn.Module) -> None:
    """Raises ValueError where devices hold different weights: each will keep its part of its own only."""
    own = [float(p.detach().flatten()[0]) for p in model.parameters() if p.numel()]
    of_all: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, own)
    if any(other != own for other in of_all):
        raise ValueError("devices begin with different weights: set seed_everything to a number")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean over all devices of the gradients of parameters that each holds whole, in place; no gradient counts as zero."""
    parameters = [p for p in parameters if p.numel()]
    if not parameters or dist.get_world_size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """() L2 norm of all gradients over all devices, each element counted once, however it is cut. One sum over the devices.

    `torch.nn.utils.get_total_norm` refuses gradients that are cut over different meshes.
    """
    parameters = list(parameters)
    by_copies: dict[int, list[Tensor]] = defaultdict(list)  # number of devices that hold the same elements -> their gradients
    for gradient in (p.grad for p in parameters if p.grad is not None and p.numel()):
        copies = dist.get_world_size()
        if isinstance(gradient, DTensor):
            pairs = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
            copies //= math.prod(size for size, placement in pairs if not placement.is_replicate())
            gradient = gradient.to_local()
        by_copies[copies].append(gradient)
    if not by_copies:  # of a step that is passed over, on all devices alike
        return torch.zeros((), device=parameters[0].device)
    total = torch.stack([torch.nn.utils.get_total_norm(group).square() / copies for copies, group in by_copies.items()]).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], bound: float, norm: Tensor) -> None:
    """Scales all gradients, whose norm is `norm`, so that it is at most `bound`. As `clip_grads_with_norm_` does it."""
    factor = (bound / (norm + 1e-6)).clamp_max(1.0)
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor.to(gradient.dtype))


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every device has whole, cut as `like` is, without any device sending anything."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    whole = DTensor.from_local(tensor.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


class WholeModel:
    """The language model in one piece, for writing samples and evaluation, which one device does. Made before it is cut."""

    def __init__(self, model: FusedLanguageModel) -> None:
        self.copy = copy.deepcopy(model).to("meta") if dist.get_rank() == 0 else None

    def gather(self, model: FusedLanguageModel) -> FusedLanguageModel | None:
        """A copy with all weights on the first device, in evaluation mode; None on the others. All have to call it."""
        weights = {}
        for name, tensor in model.state_dict().items():
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.copy is not None:
                weights[name] = gathered
        if self.copy is None:
            return None
        whole = copy.deepcopy(self.copy)
        whole.load_state_dict(weights, assign=True)
        for name, buffer in model.named_buffers():  # also those that are not in the state
            parent, _, own = name.rpartition(".")
            setattr(whole.get_submodule(parent), own, buffer)
        whole.vocabulary = model.vocabulary
        return whole.eval()
