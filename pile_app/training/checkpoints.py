"""Checkpoints that are written completely or not at all, and runs that stop between two optimizer steps.

    save -> a new file or folder, synced to disk -> last.ckpt becomes previous.ckpt -> the new one becomes last.ckpt

A checkpoint is a file of `torch.save` or, for a sharded model, a link to a folder `.1a2b3c4d.parts/`: `part-N.pt` holds what
device N has of the tensors of model and optimizer, as name -> (whole shape, offset, part), and `meta.pt` everything else.
Any number of devices reads what any other number wrote. Files are read with `weights_only`, which executes nothing.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pile_app.data.files import sync_folder, whole_file
from pile_app.documents import MODALITIES
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.pretrained import load_weights, read_pretrained

log = logging.getLogger(__name__)

LAST, PREVIOUS, ASIDE = "last.ckpt", "previous.ckpt", "aside.ckpt"
META, PARTS = "meta.pt", ".parts"
Steps = tuple[tuple[int, int], ...]
Region = tuple[Tensor, tuple[int, ...]]  # part of a tensor, and the index in the whole of its first element

# -- Writing


def publish(staged: Path, path: Path) -> None:
    """Rename a complete file, or a link to a complete folder, to `path`. The old `last.ckpt` becomes `previous.ckpt`."""
    if staged.is_dir():
        link = path.with_name(f".{path.name}.new")
        link.unlink(missing_ok=True)
        link.symlink_to(staged.name)
        staged = link
    kept = path.with_name(PREVIOUS)
    for target in (kept, path) if path.name == LAST and path.exists() else (path,):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        if target == kept:
            os.replace(path, kept)
    os.replace(staged, path)
    sync_folder(path.parent)
    remove_leftovers(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what no checkpoint needs: replaced parts, and what killed processes left. No save may be in progress."""
    linked = {link.resolve() for link in folder.iterdir() if link.is_symlink()}
    for path in folder.glob(".*"):
        if path.name.endswith(PARTS) and path.resolve() not in linked:
            shutil.rmtree(path)
        elif ".ckpt.new" in path.name:
            path.unlink()


@contextmanager
def explaining_failure(path: Path) -> Iterator[None]:
    """Turn an error of writing into an OSError that says how to continue."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        fix = "the checkpoint before it is whole. Free some space and run the same command again"
        raise OSError(f"{str(path)!r} could not be written ({error}); {fix}") from error


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are complete or absent; Lightning's are moved from /tmp without a sync."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        staged = path.with_name(f".{path.name}.new")
        with explaining_failure(path):
            with whole_file(staged, durable=True) as file:
                torch.save(checkpoint, file)
            publish(staged, path)

    def load_checkpoint(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint that rank 0 has verified, whole, on the CPU."""
        chosen = [str(path)]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        checkpoint, states = read_checkpoint(chosen[0]), "optimizer_states"
        if not torch.cuda.is_available() and states in checkpoint:  # which the optimizer would update in the mapping
            checkpoint[states] = tree_map_only(Tensor, Tensor.clone, checkpoint[states])
        return checkpoint


# -- Reading


def split_tensors(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a checkpoint into tensors ("state_dict/NAME", "optimizer/NUMBER/NAME") and the rest."""
    tensors = {f"state_dict/{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    if "optimizer_states" in rest:
        [state] = rest.pop("optimizer_states")  # Pile has one optimizer
        for number, of_parameter in state["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in of_parameter.items()}
        rest["optimizer_groups"] = state["param_groups"]
    return tensors, rest


def join_tensors(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Invert `split_tensors`."""
    checkpoint = dict(rest, state_dict={})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, inner = name.partition("/")
        if kind == "state_dict":
            checkpoint["state_dict"][inner] = tensor
        else:
            number, _, key = inner.partition("/")
            state.setdefault(int(number), {})[key] = tensor
    checkpoint.pop("parts", None)
    if "optimizer_groups" in checkpoint:
        checkpoint["optimizer_states"] = [{"state": state, "param_groups": checkpoint.pop("optimizer_groups")}]
    return checkpoint


def read_file(path: Path) -> dict[str, Any]:
    """Map a file of `torch.save`: its tensors are read from disk when they are used."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def part_files(folder: Path) -> list[Path]:
    return [folder / f"part-{number}.pt" for number in range(read_file(folder / META)["parts"])]


def tensor_sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole shape and the dtype of every tensor in a sharded checkpoint."""
    return {n: (torch.Size(shape), t.dtype) for f in part_files(folder) for n, (shape, _, t) in read_file(f).items()}


def read_parts(folder: Path, regions: dict[str, Region]) -> dict[str, Any]:
    """Read regions of the tensors in a sharded checkpoint into the given ones; return everything but tensors."""
    for file in part_files(folder):
        for name, (_, offset, part) in read_file(file).items():
            if name in regions:
                local, start = regions[name]
                bounds = list(zip(start, local.shape, offset, part.shape, strict=True))
                overlap = [(max(a, b), min(a + m, b + n)) for a, m, b, n in bounds]
                if all(low < high for low, high in overlap):
                    to, of = (tuple(slice(low - first, high - first) for first, (low, high) in zip(begin, overlap, strict=True))
                              for begin in (start, offset))  # fmt: skip
                    local[to].copy_(part[of])
    return read_file(folder / META)


def read_checkpoint(path: str | os.PathLike[str], optimizer: bool = True) -> dict[str, Any]:
    """Read a checkpoint on the CPU; of a folder, the optimizer's state only if `optimizer`, while a file is mapped."""
    path = Path(path)
    if not path.is_dir():
        return read_file(path)
    sizes = {name: size for name, size in tensor_sizes(path).items() if optimizer or name.startswith("state_dict/")}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
    return join_tensors(tensors, read_parts(path, {name: (t, (0,) * t.ndim) for name, t in tensors.items()}))


def load_origin(model: FusedLanguageModel, path: str, codecs_only: bool = False) -> None:
    """Take the weights of another run's model, or of its codecs only. `path`: run folder (its last
    checkpoint), checkpoint, or folder of `pile export`.

    Raises ValueError: there is no such checkpoint, or its model has another shape or another tokenizer.
    """
    option = f"model.{'codecs_from' if codecs_only else 'start_from'}={path!r}"
    if (Path(path) / "model.safetensors").is_file():  # of `pile export`
        arguments, exported = read_pretrained(Path(path))
        weights = {f"model.{name}": tensor for name, tensor in exported.items()}
        tokenizer = arguments["tokenizer"].fingerprint
    else:
        found = Path(path) / "checkpoints" / LAST if (Path(path) / "config.yaml").is_file() else Path(path)
        if damage := find_damage(found, "weights"):
            raise ValueError(f"{option} is neither a run, a readable checkpoint, nor a folder of `pile export`: {damage}")
        checkpoint = read_checkpoint(found, optimizer=False)
        weights = checkpoint["state_dict"]
        tokenizer = checkpoint.get("PileDataModule", {}).get("tokenizer", model.tokenizer.fingerprint)
    if tokenizer != model.tokenizer.fingerprint and not codecs_only:
        wrong = f"was trained with tokenizer {tokenizer}, not {model.tokenizer.fingerprint}"
        raise ValueError(f"{option} {wrong}: set model.tokenizer to that of the run")
    for name, reader in {} if codecs_only else model.readers.items():  # a model may get a reader later
        prefix = f"model.readers.{name}."
        if not any(other.startswith(prefix) for other in weights):
            weights = weights | {f"{prefix}{own}": tensor for own, tensor in reader.state_dict().items()}
    parts: dict[str, nn.Module] = {f"model.{MODALITIES[modality]}_codec.": codec for modality, codec in model.codecs.items()}
    for prefix, module in parts.items() if codecs_only else [("model.", model)]:
        load_weights(module, weights, prefix)


# -- Choosing


def find_damage(path: Path, verify: str = "all") -> str:
    """Say what is wrong with a checkpoint, "" if it can be read.

    `verify` says which checksums, which torch ignores, are compared: "all", "weights", or "" to check that files are complete.
    """
    try:
        read_state(path)
        for file in [path / META, *part_files(path)] if path.is_dir() else [path]:
            with zipfile.ZipFile(file) as archive:
                if verify == "all" and (broken := archive.testzip()):
                    return f"the checksum of {broken} differs"
                records = archive.infolist()
                for record in records:
                    if "/data/" not in record.filename:
                        archive.read(record)
            if verify == "weights":
                sums, content = {(record.file_size, record.CRC) for record in records}, read_file(file)
                parts = {name: part[2] for name, part in content.items() if name.startswith("state_dict/")}
                for name, tensor in (content.get("state_dict") or parts).items():
                    stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
                    if stored.size and (stored.size, zlib.crc32(stored.data)) not in sums:
                        return f"the checksum of {name} differs"
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    except (pickle.UnpicklingError, KeyError, ValueError) as error:
        return f"it is none of Pile's: {str(error).partition(chr(10))[0]}"
    return ""


def read_state(path: Path) -> tuple[int, Steps]:
    """Return the optimizer steps of a checkpoint and the steps that it was told to skip. Reads no tensor."""
    saved = read_file(path / META if path.is_dir() else path)
    skipped = saved.get("callbacks", {}).get("StepGuard", {}).get("skip_steps", [])
    return int(saved["global_step"]), tuple((first, last) for first, last in skipped)


def choose_checkpoint(folder: Path, skip_steps: Steps, is_first: bool) -> Path | None:
    """Return the newest checkpoint that a run which skips `skip_steps` can resume from, or None if there is none at all.

    Only rank 0 (`is_first`) compares checksums, and renames a `last.ckpt` that cannot be used to `aside.ckpt`, so that
    `previous.ckpt` keeps its name; the others will load what it has chosen. Raises ValueError if no checkpoint can be used.
    """
    last, troubles = folder / LAST, list[str]()
    for path in (last, folder / PREVIOUS):
        try:
            damage = find_damage(path, "all" if is_first else "") if path.exists() else ""
            state: tuple[int, Steps] = (0, ()) if damage else read_state(path)
        except FileNotFoundError:  # there was none, or rank 0 has just put it aside
            troubles += [f"{str(path)!r} is missing"] * (path == last)
            continue
        step, known = state
        asked, done = ({(a, min(b, step)) for a, b in ranges if a <= step} for ranges in (skip_steps, known))
        if damage:
            troubles.append(f"{str(path)!r} cannot be read: {damage}")
        elif asked != done:
            ranges = [list(one) for one in skip_steps]
            troubles.append(f"{str(path)!r} is from step {step}, within or after guard.skip_steps={ranges}")
        else:
            if troubles:
                log.warning("%s: resuming from %s, step %d", troubles[0], path, step)
                if is_first and last.exists():
                    os.replace(last, folder / ASIDE)
                    log.warning("%s is %s now", last, ASIDE)
            return path
    if not any((folder / name).exists() for name in (LAST, PREVIOUS)):
        return None
    fix = f"to begin anew choose another --name, or move {str(folder)!r} away"
    raise ValueError(f"{'; '.join(troubles)}. No other checkpoint can be resumed from: {fix}")


def range_to_skip(folder: Path, first: int, last: int, before: int) -> tuple[int, int] | None:
    """Return the steps to skip after `first` to `last` were rejected: from `before` steps earlier if a checkpoint is older than
    that, else from the oldest one on; None if no checkpoint is from before `first`."""
    steps = [read_state(path)[0] for path in (folder / LAST, folder / PREVIOUS) if path.exists() and not find_damage(path)]
    fitting = [step for step in steps or [0] if step < first]
    return (max(first - before, min(fitting) + 1, 1), last) if fitting else None


# -- During training


def validates_now(trainer: Trainer) -> bool:
    """Return whether a validation follows the current optimizer step."""
    every = trainer.val_check_batch
    steps = every // trainer.accumulate_grad_batches if isinstance(every, int) and trainer.enable_validation else 0
    return bool(steps) and trainer.global_step % steps == 0


class LastCheckpoint(Checkpoint):
    """Save `last.ckpt` every `every_n_steps` optimizer steps and at the end, after a validation that is due at the same step.

    (Lightning saves before the validation, which a resumed run then skips.)
    """

    state_key = "LastCheckpoint"

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps, self.saved_step = folder / LAST, every_n_steps, 0

    def save(self, trainer: Trainer) -> None:
        """Save on all ranks."""
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0 and self.saved_step != trainer.global_step

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._is_due(trainer) and not validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_due(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)


class StoppedInValidation(Exception):
    """Validation was interrupted; the checkpoint records that it is due."""


class GracefulStop(Callback):
    """Stop after the current optimizer step and write `last.ckpt`, on SIGTERM, SIGUSR1 or Ctrl-C, or after `max_time`.

    Validation is interrupted, and repeated by the resumed run. A second Ctrl-C ends the process at once. The handler only sets
    a flag: a collective inside it could deadlock. Ranks agree once per optimizer step, together with the figures that
    `StepGuard` averages anyway, and after each batch of validation.

    Args:
        max_time: as in Lightning's `Trainer`, for each start of the run.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
    state_key = "GracefulStop"

    def __init__(self, max_time: Any = None) -> None:
        self.timer = Timer(max_time)
        self.received: int | None = None
        self.agreed = False  # a rank has to stop, and all know it
        self.stopped = self.in_validation = False
        self._original: dict[int, Any] = {}

    @property
    def is_due(self) -> bool:
        return self.received is not None or (self.timer.time_remaining() or 1) <= 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, 143 if another rank received it; 0 after `max_time`."""
        return 128 + (self.received or signal.SIGTERM) if self.received or not self.is_due else 0

    def state_dict(self) -> dict[str, Any]:
        return {"in_validation": self.in_validation}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin with the validation that was interrupted; to Lightning it has just started."""
        if checkpoint["callbacks"].get(self.state_key, {}).get("in_validation"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for part in ("total", "current"):
                progress[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._original = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        # Lightning's own handlers would broadcast, save and requeue from inside the signal; and its loop would broadcast a flag
        # in every step, waiting for the device each time.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for number, handler in self._original.items():
            signal.signal(number, handler)
        self._original = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.timer.on_train_start(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        micro_batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # A validation that is due begins and is interrupted, so that it stays due.
        if self.agreed and micro_batch % trainer.accumulate_grad_batches == 0 and not validates_now(trainer):
            self.stopped = trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.strategy.reduce_boolean_decision(self.is_due, all=False):
            self.stopped = self.in_validation = True
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoint):
                    callback.save(trainer)
            raise StoppedInValidation
