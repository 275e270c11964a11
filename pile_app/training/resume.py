"""The checkpoint that a run resumes from, the newest that can be read and is from before the steps to skip; and the settings
that may change when it does.

A checkpoint file is torch's zip archive, which holds the CRC-32 of every record; torch does not look at them when it loads.
Here they are checked first, so a file that was cut off, zeroed in part or has a flipped bit is refused, not loaded.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from pile_app.training.checkpoints import LAST, PREVIOUS
from pile_app.training.sharded import META, find_missing

log = logging.getLogger(__name__)

ASIDE = "aside.ckpt"
TOKENIZER = "tokenizer.json"  # the copy of `model.tokenizer` in the folder of a run
Steps = tuple[tuple[int, int], ...]


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint, "" where it can be read.

    Of a checkpoint in parts the checksums of what rank 0 wrote are checked, and that the parts are there.
    """
    try:
        if path.is_dir():
            if missing := find_missing(path):
                return missing
            path = path / META
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"the checksum of {broken} differs"
        read_state(path)
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    except (pickle.UnpicklingError, KeyError, ValueError) as error:
        return f"it is none of Pile's: {str(error).partition(chr(10))[0]}"
    return ""


def read_state(path: Path) -> tuple[int, Steps]:
    """(optimizer steps of a checkpoint, steps that it was told to pass over). Reads no tensor."""
    file = path / META if path.is_dir() else path
    saved: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    skipped = saved.get("callbacks", {}).get("StepGuard", {}).get("skip_steps", [])
    return int(saved["global_step"]), tuple((first, last) for first, last in skipped)


def steps_up_to(step: int, ranges: Steps) -> set[tuple[int, int]]:
    """The part of the ranges that lies in steps 1 to `step`."""
    return {(first, min(last, step)) for first, last in ranges if first <= step}


def find_trouble(path: Path, skip_steps: Steps) -> str:
    """Why a checkpoint cannot be resumed from, "" where it can."""
    if damage := find_damage(path):
        return f"cannot be read: {damage}"
    step, known = read_state(path)
    if steps_up_to(step, skip_steps) != steps_up_to(step, known):
        return f"is from step {step}, within or after guard.skip_steps={[list(one) for one in skip_steps]}"
    return ""


def choose_checkpoint(folder: Path, skip_steps: Steps, writes: bool) -> Path | None:
    """The checkpoint to resume from; None where there is none at all, and the run begins.

    `last.ckpt`, where it cannot be used, is put aside as `aside.ckpt`, so that `previous.ckpt` stays where it is.

    Args:
        folder: of the checkpoints.
        skip_steps: ranges of optimizer steps that the run passes over.
        writes: this process may rename files.

    Raises:
        ValueError: there are checkpoints, but none that can be used.
    """
    troubles: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        trouble = find_trouble(path, skip_steps) if path.exists() else ""
        if trouble:
            troubles.append(f"{str(path)!r} {trouble}")
        elif path.exists():
            if path.name == PREVIOUS:
                why = "; ".join(troubles) or f"{str(folder / LAST)!r} is missing"
                log.warning("%s: resuming from %s, step %d", why, path, read_state(path)[0])
                if writes and (folder / LAST).exists():
                    os.replace(folder / LAST, folder / ASIDE)
                    log.warning("%s is %s now", folder / LAST, ASIDE)
            return path
    if troubles:
        raise ValueError(
            f"{'; '.join(troubles)}. There is no other checkpoint to resume from: to begin anew choose another --name, or move "
            f"{str(folder)!r} away"
        )
    return None


def range_to_skip(folder: Path, first: int, last: int, before: int) -> tuple[int, int] | None:
    """Steps to pass over after `first` to `last` were rejected, so that a checkpoint is left to resume from.

    Args:
        folder: of the checkpoints.
        before: steps before `first` that go too, where a checkpoint is from before them; else from the oldest one on.

    Returns:
        None where no checkpoint is from before `first`.
    """
    steps = [read_state(path)[0] for path in (folder / LAST, folder / PREVIOUS) if path.exists() and not find_damage(path)]
    fitting = [step for step in steps or [0] if step < first]
    return (max(first - before, min(fitting) + 1, 1), last) if fitting else None


# -- Configurations, as `config.yaml` holds them: compared by setting, since tensors of another model may have the same shapes.

# Settings that a resumed run follows when they change; all others of `model` must stay.
FOLLOWED = re.compile(
    r"model\.(optimizer\.(?!name$)|weights\.|(dropout|word_dropout|code_dropout|l1|recompute|compile|codec_crop|tokenizer)$|"
    r"backbone\.init_args\.dropout$|objective\.init_args\.(learning_rate|language_weight)$)"
)
# Settings that say how a run is computed, not what it learns.
EXECUTION = re.compile(
    r"data\.(micro_batch|num_workers|prepare|cache|allow_pipe)|trainer\.(?!precision|gradient_clip|callbacks)"
)


def differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, old value, new value) of each setting that differs and that both have."""
    if isinstance(was, dict) and isinstance(now, dict) and was.get("class_path") == now.get("class_path"):
        for key in was | now if name == "data.sources" else was.keys() & now.keys():
            yield from differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def describe(changes: list[tuple[str, Any, Any]]) -> str:
    """`name was a, now b` of each change."""

    def short(value: Any) -> str:
        path: str | None = value.get("class_path") if isinstance(value, dict) else None
        return path.rpartition(".")[2] if path else str(value)[:80]

    return "; ".join(f"{name} was {short(was)}, now it is {short(now)}" for name, was, now in sorted(changes, key=str))


def check_resume(run: Path, checkpoint: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that the run had. Raises ValueError where the new one has another model, or fewer steps than
    were trained."""
    steps, wanted = read_state(checkpoint)[0], asked["trainer"]["max_steps"]
    if 0 <= wanted < steps:
        raise ValueError(f"trainer.max_steps={wanted}, but {run} has trained {steps} steps: choose more, or another --name")
    path = run / "config.yaml"
    was: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {"model": {}}
    fixed = {key: asked[key] for key in ("model", "seed_everything")}  # and, of the data, what makes positions comparable
    changes = list(differences(was, fixed | {"data": {key: asked["data"][key] for key in ("context", "global_batch", "seed")}}))
    unused = ("model.start_from", "model.codecs_from")
    changes = [one for one in changes if not FOLLOWED.match(one[0]) and not (one[0] in unused and one[2] is None)]
    if changes:
        raise ValueError(f"{run} cannot resume: {describe(changes)}. Set it back, or begin another run with another --name")
    return was


def check_complete(run: Path, asked: dict[str, Any]) -> int | None:
    """Optimizer steps of a run that is complete; None where there is more to do. Raises ValueError: it is complete for
    another configuration."""
    if not all((run / name).exists() for name in ("summary.json", "config.yaml", "checkpoints/last.ckpt")):
        return None
    was = yaml.safe_load((run / "config.yaml").read_text())
    for length in (("trainer", "max_steps"), ("data", "epochs")):
        if was[length[0]].get(length[1]) != asked[length[0]].get(length[1]):
            return None
    steps = int(json.loads((run / "summary.json").read_text())["steps"])
    parts = ("seed_everything", "model", "data", "trainer")
    changes = [one for part in parts for one in differences(was.get(part), asked[part], part) if not EXECUTION.match(one[0])]
    if changes:
        raise ValueError(
            f"{run} is complete ({steps} steps) with another configuration: {describe(changes)}. Choose another --name, or "
            "raise trainer.max_steps to train it longer"
        )
    return steps


def check_origin(model: dict[str, Any]) -> None:
    """Raises ValueError where `start_from` or `codecs_from` names a run whose model or codecs differ."""
    for option, parts in (("start_from", ("backbone", "image", "audio")), ("codecs_from", ("image", "audio"))):
        path = Path(model.get(option) or os.devnull)
        config = next((c for f in (path, *path.absolute().parents[1:2]) if (c := f / "config.yaml").is_file()), None)
        was = yaml.safe_load(config.read_text())["model"] if config else {}
        parts_now = [part for part in parts if option == "start_from" or model.get(part)]
        changes = [one for p in parts_now if p in was for one in differences(was[p], model.get(p), f"model.{p}")]
        if changes := [one for one in changes if not FOLLOWED.match(one[0])]:
            raise ValueError(
                f"model.{option}={str(path)!r} holds another model: {describe(changes)}. (`--config {config}` before "
                "your own takes the model as it was)"
            )
