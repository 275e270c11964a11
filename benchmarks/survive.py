"""What a run survives: signals, kills while a checkpoint is written, a full disk, damaged checkpoints; each ten times.

    python benchmarks/survive.py [--parts stop kill disk damage] [--times 10] [--devices 1] [--seed 0]

Each attempt is `train.py`'s `main` in real processes (Gloo on CPU). One run is disturbed again and again, and resumed by the
same command; it is compared with an undisturbed one: after each disturbance all that was logged up to the checkpoint, at the
end every metric, weight, momentum and counter, to the last bit.

    stop    SIGTERM and SIGUSR1 by turns, also to the loading workers, at a random time after training began
    kill    SIGKILL while a checkpoint is being written, at a random share of its bytes
    disk    the disk (a tmpfs; needs root) is filled up to a random rest below the size of a checkpoint
    damage  between attempts last.ckpt is cut off, zeroed in part, or has a bit flipped, at a random place
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "training"), str(REPOSITORY)]

if TYPE_CHECKING:
    from attempts import Attempt, Workbench

STEPS, EVERY = 260, 5
COMMON = (
    *("--trainer.max_steps", str(STEPS), "--checkpoint_every", str(EVERY), "--trainer.val_check_interval", "20"),
    *("--model.backbone.init_args.width", "128", "--model.codec_steps", "10", "--data.global_batch", "2"),
)


class Disturbed:
    """The run that is disturbed."""

    def __init__(self, bench: Workbench, name: str, devices: int) -> None:
        self.bench = bench
        self.name = name
        self.devices = devices
        self.checkpoints = bench.run(name) / "checkpoints"

    def start(self, workers: int = 0) -> list[Attempt]:
        words = (*COMMON, "--data.num_workers", str(workers))
        if self.devices == 1:
            return [self.bench.start(self.name, *words)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return self.bench.start_ranks(self.name, *words, port=port, ranks=self.devices)

    def steps(self) -> int:
        """The last optimizer step that was trained, whether it was saved or not."""
        lines = [line for path in self.ledger for line in path.read_text().splitlines() if line.endswith("}")]
        return max((int(line.split(",")[0].split(":")[1]) for line in lines), default=0)

    @property
    def ledger(self) -> list[Path]:
        return sorted((self.bench.run(self.name) / "ledger").glob("*.jsonl"))

    def wait_for_steps(self, attempts: list[Attempt], count: int) -> None:
        """Until the attempt has trained so many."""
        began, least = time.monotonic(), self.steps()
        while self.steps() < least + count and all(one.process.exitcode is None for one in attempts):
            least = min(least, self.steps())  # an attempt first drops what came after its checkpoint
            if time.monotonic() - began > 120:
                raise TimeoutError(f"the attempt does not get on:\n{attempts[0].text[-3000:]}")
            time.sleep(0.005)

    def finish(self) -> None:
        for attempt in self.start():
            assert attempt.wait(300) == 0, attempt.text[-3000:]

    def readable(self) -> tuple[bool, int]:
        """(last.ckpt can be read, or the one before it; optimizer steps of that one). Pile's own check is not asked."""
        import zipfile

        import torch

        for name in ("last.ckpt", "previous.ckpt"):
            with suppress(Exception), zipfile.ZipFile(self.checkpoints / name) as archive:
                if archive.testzip() is None:
                    return True, torch.load(self.checkpoints / name, weights_only=True)["global_step"]
        return not any((self.checkpoints / name).exists() for name in ("last.ckpt", "previous.ckpt")), 0

    def same_until(self, step: int, reference: Path) -> bool:
        """Whether everything that was logged in the first steps is what the undisturbed run logged."""
        from attempts import losses

        ours, theirs = losses(self.bench.run(self.name)), losses(reference)
        # A validation is logged after the checkpoint that waits for it was due; the resumed run does it.
        return all(
            ours.get(one, {}).items() <= values.items() and ("train/loss" in ours.get(one, {}) or "train/loss" not in values)
            for one, values in theirs.items()
            if one < step - 1
        )


def send(attempts: list[Attempt], number: int) -> None:
    """To all processes, and to their loading workers first."""
    for attempt in attempts:
        path = Path(f"/proc/{attempt.process.pid}/task/{attempt.process.pid}/children")
        children = [int(word) for word in path.read_text().split()] if path.exists() else []
        for process in (*children, attempt.process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, number)


def stop(run: Disturbed, draw: random.Random, number: int) -> str:
    sent = (signal.SIGTERM, signal.SIGUSR1)[number % 2]
    attempts = run.start(workers=draw.randrange(3))
    run.wait_for_steps(attempts, 1)
    time.sleep(draw.random() * 0.4)
    began = time.monotonic()
    send(attempts, sent)
    codes = [attempt.wait() for attempt in attempts]
    assert codes == [128 + sent, *[0] * (len(codes) - 1)], (codes, attempts[0].text[-3000:])
    _, step = run.readable()
    assert step == run.steps(), f"step {run.steps()} was trained, step {step} saved"
    return f"{sent.name}, saved and gone within {time.monotonic() - began:.2f} s"


def kill(run: Disturbed, draw: random.Random, number: int) -> str:
    last = run.checkpoints / "last.ckpt"
    size = last.stat().st_size if last.exists() else 1_000_000
    attempts = run.start()
    run.wait_for_steps(attempts, 1 + draw.randrange(8))
    least, written, began = size * draw.random(), 0, time.monotonic()
    while time.monotonic() - began < 60:
        with suppress(FileNotFoundError):
            written = max((path.stat().st_size for path in run.checkpoints.glob(".last.ckpt.new.*.tmp")), default=0)
            if written >= max(1.0, least):
                break
        time.sleep(0.0002)
    send(attempts, signal.SIGKILL)
    for attempt in attempts:
        attempt.wait()
    torn = [path.stat().st_size for path in run.checkpoints.glob(".last.ckpt.new.*.tmp")]
    return f"killed with {torn[0]:,} of {size:,} bytes written" if torn else "killed just after the write"


def disk(run: Disturbed, draw: random.Random, number: int) -> str:
    attempts = run.start()
    run.wait_for_steps(attempts, 1 + draw.randrange(8))
    size = (run.checkpoints / "last.ckpt").stat().st_size if (run.checkpoints / "last.ckpt").exists() else 1_000_000
    free = int(size * draw.random())
    filler = run.bench.folder / "runs" / "filler"
    with suppress(OSError), open(filler, "wb") as file:
        room = os.statvfs(filler.parent)
        os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - free))
    codes = [attempt.wait() for attempt in attempts]
    filler.unlink()
    said = attempts[0].text
    assert codes[0] == 1 and ("could not be written" in said or "No space left" in said), (codes, said[-3000:])
    return f"{free:,} of {size:,} bytes free: " + (
        "said so" if "could not be written" in said else "a log met the full disk first"
    )


def damage(run: Disturbed, draw: random.Random, number: int) -> str:
    attempts = run.start()
    run.wait_for_steps(attempts, 2 * EVERY + 1 + draw.randrange(5))  # two checkpoints
    send(attempts, signal.SIGKILL)
    for attempt in attempts:
        attempt.wait()
    last = run.checkpoints / "last.ckpt"
    content = bytearray(last.read_bytes())
    place = draw.randrange(len(content))
    how = ("cut off at", "zeroed from", "bit flipped at")[number % 3]
    if how == "cut off at":
        content = content[:place]
    elif how == "zeroed from":
        content[place:] = bytes(len(content) - place)
    else:
        content[place] ^= 1 << draw.randrange(8)
    last.write_bytes(content)
    return f"{how} byte {place:,}"


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


PARTS: dict[str, Callable[[Disturbed, random.Random, int], str]] = {"stop": stop, "kill": kill, "disk": disk, "damage": damage}


def disturb(bench: Workbench, part: str, options: argparse.Namespace) -> bool:
    """Whether the run came through every time."""
    from attempts import assert_same_run

    draw = random.Random(options.seed)
    run, reference = Disturbed(bench, part, options.devices), bench.run("undisturbed")
    readable = same = 0
    for number in range(options.times):
        how = PARTS[part](run, draw, number)
        is_readable, step = run.readable()
        is_same = run.same_until(step, reference)
        readable, same = readable + is_readable, same + is_same
        print(f"{part} {number + 1}: {how}; goes on after step {step}", flush=True)
    last_step = run.readable()[1]
    assert last_step < STEPS, "the run was complete before the last disturbance: raise STEPS"
    run.finish()
    try:
        assert_same_run(bench.run(part), reference)
    except AssertionError as error:
        print(f"{part}: the run is not the undisturbed one: {error}")
        whole = False
    else:
        whole = True
    print(
        f"{part}: {readable} of {options.times} left a readable last checkpoint, or one before it; {same} of {options.times} "
        f"exact so far; the whole run is {'identical' if whole else 'DIFFERENT'}",
        flush=True,
    )
    return whole and readable == same == options.times


def main() -> None:
    from attempts import make_bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pile-survive-"))
    survived = []
    for part in options.parts:
        place = folder / part
        (place / "runs").mkdir(parents=True)
        with small_disk(place / "runs", 150) if part == "disk" else nullcontext():
            bench = make_bench(place)
            reference = Disturbed(bench, "undisturbed", options.devices)
            reference.finish()
            survived.append(disturb(bench, part, options))
    shutil.rmtree(folder)
    sys.exit(0 if all(survived) else 1)


if __name__ == "__main__":
    main()
