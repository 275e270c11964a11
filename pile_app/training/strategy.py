"""The strategy `fsdp2`: Lightning's `ModelParallelStrategy` with checkpoints that are written while training goes on, complete
or not at all, and that every other strategy can read (see `sharded.py`)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from pile_app.training.module import check_shapes
from pile_app.training.parallel import place_like
from pile_app.training.sharded import (
    META,
    PARTS,
    publish,
    put_tensors,
    read_folder,
    remove_leftovers,
    saying_how_to_go_on,
    take_tensors,
    tensor_sizes,
    write_durably,
)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, or over groups of them that cut every layer among themselves (see `parallel.py`).

    Args:
        tensor_parallel_size: devices of such a group; best the GPUs of one node, or fewer.
    """

    def __init__(self, tensor_parallel_size: int = 1) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=tensor_parallel_size)
        self.group_size = tensor_parallel_size
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        devices = self.num_nodes * self.num_processes
        if self.group_size < 1 or devices % self.group_size:
            raise ValueError(f"tensor_parallel_size={self.group_size} must divide the {devices} devices")
        self._data_parallel_size = devices // self.group_size
        super().setup_environment()
        if self._group is None:  # of its own, for what is written while the next step already talks over the default one
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]

    # -- Checkpoints: the same dictionary as on one device, with sharded tensors in it.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Copies what this device holds, and returns; a thread writes it. `finish_saving` says whether that went well."""
        self.finish_saving()
        path, name = Path(self.broadcast(str(filepath))), self.broadcast(uuid.uuid4().hex[:8])
        folder = path.with_name(f".{name}{PARTS}")
        tensors, rest = take_tensors(checkpoint)
        if self.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            write_durably(folder / META, lambda file: torch.save(rest, file))
        self.barrier("checkpoint folder")
        written = dcp.async_save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=self._group)
        assert isinstance(written, Future)
        self._pending = self._writer.submit(self._publish, written, folder, path)

    def _publish(self, written: Future[Any], folder: Path, path: Path) -> None:
        with saying_how_to_go_on(path):
            written.result()  # the first device has it when all have written
            if self.is_global_zero:
                publish(folder, path)

    def finish_saving(self) -> None:
        """Waits for the checkpoint that is being written. Raises OSError: it could not be written, on this or another
        device. The one before it stays."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def after_saving(self, do: Callable[[], None]) -> None:
        """Runs `do` on the first device, once the checkpoint that is being written is complete."""
        pending = self._pending

        def wait_and_do() -> None:
            if pending is not None:
                pending.result()
            if self.is_global_zero:
                do()

        self._pending = self._writer.submit(wait_and_do)

    def teardown(self) -> None:
        self.finish_saving()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        """This device's parts of a checkpoint, whatever wrote it."""
        self.finish_saving()
        path = Path(self.broadcast(str(checkpoint_path)))
        module = self.lightning_module
        assert module is not None
        own = {f"state_dict/{name}": tensor for name, tensor in module.state_dict().items()}
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        own |= {f"optimizer/{number}": parameter.detach() for number, parameter in enumerate(parameters)}
        if path.is_dir():
            sizes = tensor_sizes(path)
            prefix = "state_dict/"
            saved = {n.removeprefix(prefix): torch.empty(s.size, device="meta") for n, s in sizes.items() if prefix in n}
            check_shapes(module, saved)  # before they are read into tensors of other shapes
            tensors = {}
            for name, size in sizes.items():
                like = own.get(name.rpartition("/")[0] if name.startswith("optimizer/") else name)
                if like is not None and like.shape == size.size:
                    tensors[name] = torch.empty_like(like, dtype=size.properties.dtype)
                else:
                    tensors[name] = torch.empty(size.size, dtype=size.properties.dtype)
            return read_folder(path, tensors, self._group)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_shapes(module, checkpoint["state_dict"])
        tensors, rest = take_tensors(checkpoint)
        for name, tensor in tensors.items():
            like = own.get(name.rpartition("/")[0] if name.startswith("optimizer/") else name)
            if like is not None and like.shape == tensor.shape:
                tensors[name] = place_like(tensor, like)
        return put_tensors(rest, tensors)


StrategyRegistry.register("fsdp2", ShardedStrategy, description="every device holds a part of model and optimizer")
