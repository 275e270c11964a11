"""Checkpoints in parts: every device writes and reads what it holds, nobody the whole. `strategy.py` uses them.

    last.ckpt -> .1a2b3c4d.parts/         a link, which is made once the folder is complete, and renamed as a file would be
        meta.pt                           what a single-file checkpoint holds, but for the tensors of model and optimizer
        .metadata  __0_0.distcp  ...      those, by torch.distributed.checkpoint

Tensors have the names and shapes of the whole model, so any number of devices, cut in any way, can read what any other wrote:
`read_checkpoint` the whole, on one device or under DDP, the strategy its own parts. Nothing that is pickled is run: `meta.pt`
is read with `weights_only`, and `.metadata` may name torch's own descriptions of tensors only.

Lightning's strategy writes `last.ckpt/` in place: a kill can leave parts of two steps in it, which load without an error.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

META, PARTS = "meta.pt", ".parts"
# All that `.metadata` is made of.
DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta"),
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(t).removeprefix("torch.") for t in vars(torch).values() if isinstance(t, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


def take_tensors(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a checkpoint into tensors of model ("state_dict/NAME") and optimizer ("optimizer/NUMBER/NAME"), and the rest."""
    tensors = {f"state_dict/{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    states = rest.pop("optimizer_states", None)
    if states is not None:
        [state] = states  # Pile has one optimizer
        for number, of_parameter in state["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in of_parameter.items()}
        rest["optimizer_groups"] = state["param_groups"]
    return tensors, rest


def put_tensors(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `take_tensors`."""
    checkpoint = dict(rest, state_dict={})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, inner = name.partition("/")
        if kind == "state_dict":
            checkpoint["state_dict"][inner] = tensor
        else:
            number, _, key = inner.partition("/")
            state.setdefault(int(number), {})[key] = tensor
    if "optimizer_groups" in checkpoint:
        checkpoint["optimizer_states"] = [{"state": state, "param_groups": checkpoint.pop("optimizer_groups")}]
    return checkpoint


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint, of one file or in parts, as a whole and on the CPU. Raises OSError, RuntimeError, EOFError,
    pickle.UnpicklingError: it cannot be read."""
    path = Path(path)
    if path.is_dir():
        whole = {name: torch.empty(size.size, dtype=size.properties.dtype) for name, size in tensor_sizes(path).items()}
        return read_folder(path, whole, None)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def read_folder(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Reads a checkpoint in parts into the tensors given; `group`: of the devices that do so together, None for one alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be, on one device
        dcp.load(tensors, storage_reader=SafeReader(folder), process_group=group, no_dist=group is None)
    return put_tensors(torch.load(folder / META, map_location="cpu", weights_only=True), tensors)


def tensor_sizes(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor in a checkpoint in parts."""
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class SafeReader(dcp.FileSystemReader):
    """torch's reader, but for what `.metadata` may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _Descriptions(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"the checkpoint's .metadata names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


def write_durably(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write a file that is there as a whole or not at all: next to its final path, synced to disk, renamed.

    Files that a killed process left are removed; a path has one writer at a time.

    Raises:
        OSError: it cannot be written (disk full, say). The file that was at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with saying_how_to_go_on(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Renames in a folder reach the disk."""
    opened = os.open(folder, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


def publish(folder: Path, path: Path) -> None:
    """Makes a complete folder the checkpoint `path`, at once: there is always one, the old or the new."""
    link = path.with_name(f".{path.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, path)
    sync_folder(path.parent)
    remove_leftovers(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes parts that no link points to: of checkpoints that were replaced, or never finished. None may be under way."""
    kept = {link.resolve() for link in folder.iterdir() if link.is_symlink()}
    for parts in folder.glob(f".*{PARTS}"):
        if parts.resolve() not in kept:
            shutil.rmtree(parts)


def find_missing(folder: Path) -> str:
    """What a checkpoint in parts lacks, "" where all its files are as long as they should be.

    Raises:
        OSError, pickle.UnpicklingError: its `.metadata` cannot be read.
    """
    for stored in SafeReader(folder).read_metadata().storage_data.values():
        path = folder / stored.relative_path
        if not path.is_file() or path.stat().st_size < stored.offset + stored.length:
            return f"its part {path.name} is missing or cut off"
    return ""


@contextmanager
def saying_how_to_go_on(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise OSError(
            f"{str(path)!r} could not be written ({error}); the checkpoint before it is whole. Free some space and run the "
            "same command again: it resumes from there"
        ) from error
