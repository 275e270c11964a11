"""Which checkpoint a run resumes from: the newest that can be read and has seen nothing that the run is to pass over.

A checkpoint file is torch's zip archive, which holds the CRC-32 of every record; torch does not look at them when it loads.
Here they are checked first, so a file that was cut off, zeroed in part or has a flipped bit is refused, not loaded.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import torch

from pile_app.training.checkpoints import LAST, PREVIOUS, write_durably
from pile_app.training.sharded import META, find_missing

log = logging.getLogger(__name__)

ASIDE = "aside.ckpt"
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


# -- Steps that a run has decided to pass over, when it went back by itself: `skip_steps.json` in its folder.


def read_skipped(run: Path) -> Steps:
    """Ranges that the run has added."""
    path = run / "skip_steps.json"
    return tuple((first, last) for first, last in json.loads(path.read_text())) if path.exists() else ()


def add_skipped(run: Path, first: int, last: int) -> None:
    """Adds a range, durably."""
    content = json.dumps([*read_skipped(run), [first, last]]).encode()

    def write(file: IO[bytes]) -> None:
        file.write(content)

    write_durably(run / "skip_steps.json", write)


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
