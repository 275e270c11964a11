"""Many devices: FSDP2 and tensor parallelism, applied to the model from outside, and the strategy `fsdp2` of Lightning.

    devices = data_parallel x tensor_parallel, a mesh of (D, P); devices of one row (P) train on the same packs

* `fully_shard` (FSDP2): each Transformer block, and the rest of the language model as another unit, is sharded over D devices
  and gathered when it is computed. All devices gather the same units in the same order, whatever their batches hold.
* Tensor parallel: of each block, the P devices of a row hold H / P heads and 1 / P of the feed-forward net each, by the plan
  of the backbone (`Backbone.tensor_parallel`); that of open weights is the one of transformers.
* The codecs are small, and what they do depends on the media of a batch: every device has them whole, and `average_gradients`
  makes their gradients equal.
"""

from __future__ import annotations

import copy
import math
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from pile_app.data.files import whole_file
from pile_app.model.backbones import Backbone
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.pretrained import check_shapes
from pile_app.training import checkpoints
from pile_app.training.checkpoints import Region, explaining_failure, join_tensors, split_tensors

BUCKET = 1 << 25  # gradients that are averaged at a time


class SummedGradients(ParallelStyle):
    """A norm between sharded layers: every device has its weight, and sums the gradients over the heads of all devices."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        hooked: set[int] = set()

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=device_mesh.get_group())
            return gradient

        def hook(module: nn.Module, _: Any) -> None:  # of the parameter that FSDP2 has gathered, which stays the same object
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in hooked:
                    hooked.add(id(parameter))
                    parameter.register_hook(summed)

        module.register_forward_pre_hook(hook)
        return module


STYLES: dict[str, type[ParallelStyle]] = {
    "colwise": ColwiseParallel,  # by outputs, before heads and hidden units
    "rowwise": RowwiseParallel,  # by inputs, after them
    "replicated_with_grad_allreduce": SummedGradients,
}


def tensor_parallel_plan(backbone: Backbone, size: int) -> dict[str, ParallelStyle]:
    """Return how the layers of a block are sharded over `size` devices. Raises ValueError if they cannot be."""
    kind, plan = getattr(backbone, "kind", type(backbone).__name__), backbone.tensor_parallel
    if not plan or not set(plan.values()) <= STYLES.keys():
        raise ValueError(f"tensor_parallel_size={size}: no plan says how {kind} is sharded: set it to 1, use fsdp2")
    for name in ("heads", "key_value_heads"):
        if (heads := getattr(backbone, name)) % size:
            raise ValueError(f"tensor_parallel_size={size} must divide the backbone's {heads} {name.replace('_', ' ')}")
    return {name: STYLES[style]() for name, style in plan.items()}


@torch.no_grad()
def shard(model: FusedLanguageModel, mesh: DeviceMesh, half: torch.dtype | None = None) -> None:
    """Shard the language model over the devices, in place, with the weights of rank 0.

    Parameters are sharded on the meta device and materialized once, tensor by tensor. Other ranks need not initialize theirs.
    `half`: dtype that blocks are gathered and computed in (under autocast). Raises ValueError if heads cannot be sharded.
    """
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    blocks: list[nn.Module] = list(getattr(model.backbone, "blocks", ()))
    codecs = {p for codec in model.codecs.values() for p in codec.parameters()}
    weights = {name: p for name, p in model.named_parameters() if p not in codecs and p.numel()}
    buffers = dict(model.named_buffers())
    for name in weights:
        _assign(model, name, nn.Parameter(weights[name].to("meta"), weights[name].requires_grad))
        if dist.get_rank():
            weights[name] = torch.empty(0)  # type: ignore[assignment]
    model.backbone.tie()
    for block in blocks if tensor.size() > 1 else ():
        parallelize_module(block, tensor, tensor_parallel_plan(model.backbone, tensor.size()))
    unsharded = {p for p in model.parameters() if not p.is_meta}
    # Autocast rounds the matrices to `half` anyway; rounding them first halves what is sent. Gradients are summed in float32.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=data, mp_policy=policy if half else MixedPrecisionPolicy())
    fully_shard(model, mesh=data, ignored_params=unsharded)
    register_fsdp_forward_method(model, "read")  # of objectives
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    for module in model.modules():
        if any(p is not None and p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
    model.backbone.tie()
    for name, buffer in buffers.items():
        _assign(model, name, buffer)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            value = parameter.to(device)
            dist.broadcast(value, 0)
            parameter.copy_(value)
        else:
            value = weights.pop(name).to(device) if not dist.get_rank() else torch.empty(parameter.shape, device=device)
            dist.broadcast(value, 0)
            parameter.to_local().copy_(place_like(value, parameter).to_local())  # type: ignore[attr-defined]


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, value)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of unsharded parameters over all devices, in place, in buckets; a missing one counts as zero."""
    parameters = [p for p in parameters if p.numel()]
    buckets = zip(accumulate(p.numel() for p in parameters), parameters, strict=True)
    for _, some in groupby(buckets, lambda pair: pair[0] // BUCKET):
        bucket = [parameter for _, parameter in some]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the () L2 norm of all gradients over all devices, each element counted once, in one all-reduce.

    `torch.nn.utils.get_total_norm` refuses gradients that are sharded over different meshes.
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
    if not by_copies:  # of a step that is skipped, on all devices alike
        return torch.zeros((), device=parameters[0].device)
    total = torch.stack([torch.nn.utils.get_total_norm(group).square() / copies for copies, group in by_copies.items()]).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], bound: float, norm: Tensor) -> None:
    """Scale all gradients, whose norm is `norm`, so that it is at most `bound`, as `clip_grads_with_norm_` does."""
    factor = (bound / (norm + 1e-6)).clamp_max(1.0)
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor.to(gradient.dtype))


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every device has whole as `like` is sharded, without communication."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    whole = DTensor.from_local(tensor.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


def is_first_process() -> bool:
    """Return whether this process is rank 0, according to the environment of its launcher: torchrun, SLURM or Lightning."""
    names = ("RANK",) if "RANK" in os.environ else ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def local_region(tensor: Tensor) -> Region:
    """Return this device's part of a tensor, and the index of its first element in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
    return tensor.to_local(), tuple(offset)


def is_written(tensor: Tensor) -> bool:
    """Return whether this device saves its part of a tensor: the first device that holds it does."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    pairs = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    return not any(placement.is_replicate() and index for placement, index in pairs)


class WholeModel:
    """The language model in one piece, for samples and evaluation on one device. To be created before the model is sharded."""

    def __init__(self, model: FusedLanguageModel) -> None:
        on_meta = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        self.copy = copy.deepcopy(model, on_meta) if dist.get_rank() == 0 else None

    def gather(self, model: FusedLanguageModel) -> FusedLanguageModel | None:
        """Return a copy with all weights on rank 0, in evaluation mode; None on the others. All ranks have to call it."""
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
            _assign(whole, name, buffer)
        whole.vocabulary = model.vocabulary
        return whole.eval()


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, or over groups that shard every layer, with checkpoints written in the background.

    Args:
        tensor_parallel_size: devices of such a group; best the GPUs of one node, or fewer.
    """

    restore_checkpoint_after_setup = lightning_restore_optimizer = True

    def __init__(self, tensor_parallel_size: int = 1) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=tensor_parallel_size)
        self.group_size = tensor_parallel_size
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def setup_environment(self) -> None:
        devices = self.num_nodes * self.num_processes
        if self.group_size < 1 or devices % self.group_size:
            raise ValueError(f"tensor_parallel_size={self.group_size} must divide the {devices} devices")
        self._data_parallel_size = devices // self.group_size
        super().setup_environment()
        if self.global_rank == 0 and not is_first_process():  # it has not initialized the weights that all others will get
            raise ValueError("the launcher's environment does not say which process has rank 0: set RANK in each of them")
        if self._group is None:  # of its own, for writing while the next step already uses the default one
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]

    # Checkpoints: the same dictionary as on one device, with sharded tensors in it.
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    optimizer_state = Strategy.optimizer_state
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Copy what this device holds and return; a thread writes it. The next save or `teardown` raises its errors."""
        self._finish_saving()
        path, name = Path(self.broadcast(str(filepath))), self.broadcast(uuid.uuid4().hex[:8])
        folder = path.with_name(f".{name}{checkpoints.PARTS}")
        tensors, rest = split_tensors(checkpoint)
        if self.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_leftovers(path.parent)
            folder.mkdir()
            with explaining_failure(path), whole_file(folder / checkpoints.META, durable=True) as file:
                torch.save(rest | {"parts": self.world_size}, file)
        self.barrier("checkpoint folder")
        regions = {name: (tuple(tensor.shape), local_region(tensor)) for name, tensor in tensors.items() if is_written(tensor)}
        copied = {name: (shape, offset, part.to("cpu", copy=True)) for name, (shape, (part, offset)) in regions.items()}
        self._pending = self._writer.submit(self._write, folder, path, copied)

    def _write(self, folder: Path, path: Path, parts: dict[str, Any]) -> None:
        error, errors = "", [""] * self.world_size
        try:
            with whole_file(folder / f"part-{self.global_rank}.pt", durable=True) as file:
                torch.save(parts, file)
        except (OSError, RuntimeError) as caught:
            error = str(caught) or repr(caught)
        with explaining_failure(path):
            dist.all_gather_object(errors, error, self._group)
            if any(errors):
                raise OSError(next(filter(None, errors)))
            if self.is_global_zero:
                checkpoints.publish(folder, path)

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written. Raises OSError if this or another device could not write it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def teardown(self) -> None:
        self._finish_saving()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        """Read this device's part of a checkpoint that any strategy wrote."""
        self._finish_saving()
        path, module = Path(self.broadcast(str(checkpoint_path))), self.lightning_module
        assert module is not None
        like = {f"state_dict/{name}": tensor for name, tensor in module.state_dict().items()}
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        like |= {f"optimizer/{number}": parameter.detach() for number, parameter in enumerate(parameters)}
        none: tuple[dict[str, Tensor], dict[str, Any]] = {}, {}
        whole, rest = none if path.is_dir() else split_tensors(checkpoints.read_checkpoint(path))
        sizes = {name: (t.shape, t.dtype) for name, t in whole.items()} or checkpoints.tensor_sizes(path)
        of_model = {n.partition("/")[2]: torch.empty(s, device="meta") for n, (s, _) in sizes.items() if n.startswith("state")}
        check_shapes(module, of_model)
        loaded: dict[str, Tensor] = {}
        for name, (shape, dtype) in sizes.items():
            own = like.get(name.rpartition("/")[0] if name.startswith("optimizer/") else name)
            own = own if own is not None and own.shape == shape else torch.empty(shape)  # an optimizer's step count
            loaded[name] = place_like(whole[name], own) if whole else torch.empty_like(own, dtype=dtype)
        if not whole:
            rest = checkpoints.read_parts(path, {name: local_region(tensor) for name, tensor in loaded.items()})
        return join_tensors(loaded, rest)


StrategyRegistry.register("fsdp2", ShardedStrategy, description="every device holds a part of model and optimizer")
