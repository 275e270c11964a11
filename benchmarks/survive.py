"""A run that is stopped, killed or left with a damaged checkpoint, and resumed by the same command.

    python benchmarks/survive.py [--parts '[kills, stop, write, damage]'] [--times 10] [--seed 0]

Each attempt is `train.py` in real processes (Gloo on CPU). One run is disturbed `times` times and then ends. Afterwards
all metrics, weights, momenta and counters equal those of an undisturbed run to the last bit.

    kills   SIGKILL at a random time, with 1 to 3 devices, 0 to 3 workers, micro-batches of 1 or 2: the ledger of documents
            is compared instead, after each kill up to the last checkpoint (`--times 50` gives the figure of results.md)
    stop    SIGTERM and SIGUSR1 in turns, also to the loading workers, at a random time
    write   SIGKILL while a checkpoint is being written, at a random byte
    damage  last.ckpt is truncated, partly zeroed, or has a bit flipped, at a random byte
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common import TESTS, command

sys.path[:0] = TESTS
from attempts import Workbench, assert_same_run, checkpoint, losses, make_bench  # noqa: E402
from processes import Command  # noqa: E402

from pile_app.training.callbacks import read_ledger  # noqa: E402

EVERY = 5
COMMON = (
    *("--checkpoint_every", str(EVERY), "--trainer.val_check_interval", "20", "--model.backbone.init_args.width", "128"),
    *("--model.codec_steps", "10"),
)


class Disturbed:
    """The run that is disturbed, and a random generator that says how."""

    def __init__(self, bench: Workbench, name: str, seed: int, *words: str) -> None:
        self.bench, self.name, self.words = bench, name, words
        self.folder = bench.run(name)
        self.last = self.folder / "checkpoints" / "last.ckpt"
        self.draw = random.Random(seed)

    def start(self, ranks: int = 1, workers: int = 0, micro_batch: int = 1) -> list[Command]:
        shape = ("--data.num_workers", str(workers), "--data.micro_batch", str(micro_batch))
        if ranks == 1:
            return [self.bench.start(self.name, *self.words, *shape)]
        return self.bench.start_ranks(self.name, *self.words, *shape, ranks=ranks)

    def entries(self) -> list[dict[str, object]]:
        """Packs of the ledger by position, without a last line that is not whole."""
        paths = (self.folder / "ledger").glob("*.jsonl")
        lines = [line for path in paths for line in path.read_text().splitlines() if line.endswith("}")]
        return sorted(map(json.loads, lines), key=lambda entry: entry["position"])

    def steps(self) -> int:
        """The last optimizer step that was trained, whether it was saved or not."""
        return max((int(str(entry["step"])) for entry in self.entries()), default=0)

    def wait_for_steps(self, attempts: list[Command], count: int) -> None:
        began, least = time.monotonic(), self.steps()
        while self.steps() < least + count and all(one.process.exitcode is None for one in attempts):
            least = min(least, self.steps())  # an attempt first drops the steps after its checkpoint
            if time.monotonic() - began > 120:
                raise TimeoutError(f"no step in 120 s:\n{attempts[0].text[-3000:]}")
            time.sleep(0.005)

    def readable_step(self) -> int:
        """The step of last.ckpt, or of the checkpoint before it if that is damaged; 0 without any, -1 if none can be read."""
        kept = [path for path in (self.last, self.last.with_name("previous.ckpt")) if path.exists()]
        for path in kept:
            with suppress(Exception), zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    return checkpoint(self.folder, path.stem)["global_step"]
        return -1 if kept else 0

    def same_until(self, step: int, reference: Path) -> bool:
        """Whether everything that was logged in the first steps is what the undisturbed run logged."""
        ours, theirs = losses(self.folder), losses(reference)
        # A validation is logged after the checkpoint that waits for it was due; the resumed run does it.
        return all(
            ours.get(one, {}).items() <= values.items() and ("train/loss" in ours.get(one, {}) or "train/loss" not in values)
            for one, values in theirs.items()
            if one < step - 1
        )


def send(attempts: list[Command], number: int) -> None:
    """Send a signal to all processes, to their loading workers first."""
    for attempt in attempts:
        path = Path(f"/proc/{attempt.process.pid}/task/{attempt.process.pid}/children")
        children = [int(word) for word in path.read_text().split()] if path.exists() else []
        for process in (*children, attempt.process.pid):
            with suppress(ProcessLookupError):
                os.kill(process or 0, number)


def kill(attempts: list[Command]) -> None:
    send(attempts, signal.SIGKILL)
    for attempt in attempts:
        attempt.wait()


def finish(run: Disturbed) -> None:
    (attempt,) = run.start()
    assert attempt.wait(1800) == 0, attempt.text[-3000:]


def kills(run: Disturbed, turn: int) -> str:
    ranks, workers, micro_batch = run.draw.choice([1, 2, 3]), run.draw.randrange(4), run.draw.choice([1, 2])
    attempts = run.start(ranks, workers, micro_batch)
    run.wait_for_steps(attempts, run.draw.randint(1, 12))
    time.sleep(run.draw.random() * 0.1)
    kill(attempts)
    return f"{ranks} devices, {workers} workers, micro-batch {micro_batch}"


def stop(run: Disturbed, turn: int) -> str:
    sent = (signal.SIGTERM, signal.SIGUSR1)[turn % 2]
    attempts = run.start(workers=run.draw.randrange(3))
    run.wait_for_steps(attempts, 1)
    time.sleep(run.draw.random() * 0.4)
    began = time.monotonic()
    send(attempts, sent)
    assert attempts[0].wait() == 128 + sent, attempts[0].text[-3000:]
    assert run.readable_step() == run.steps(), f"step {run.steps()} was trained, step {run.readable_step()} saved"
    return f"{sent.name}, saved and gone within {time.monotonic() - began:.2f} s"


def write(run: Disturbed, turn: int) -> str:
    size = run.last.stat().st_size if run.last.exists() else 1_000_000
    attempts = run.start()
    run.wait_for_steps(attempts, 1 + run.draw.randrange(8))
    least, began = max(1.0, size * run.draw.random()), time.monotonic()

    def written() -> int:
        with suppress(FileNotFoundError):
            return max((path.stat().st_size for path in run.last.parent.glob(".last.ckpt.new.*.tmp")), default=0)
        return 0

    while written() < least and time.monotonic() - began < 60:
        time.sleep(0.0002)
    kill(attempts)
    return f"killed with {written():,} of {size:,} bytes written"


def damage(run: Disturbed, turn: int) -> str:
    attempts = run.start()
    run.wait_for_steps(attempts, 2 * EVERY + 1 + run.draw.randrange(5))  # two checkpoints
    kill(attempts)
    content = bytearray(run.last.read_bytes())
    offset, how = run.draw.randrange(len(content)), ("truncated at", "zeroed from", "bit flipped at")[turn % 3]
    if how == "truncated at":
        content = content[:offset]
    elif how == "zeroed from":
        content[offset:] = bytes(len(content) - offset)
    else:
        content[offset] ^= 1 << run.draw.randrange(8)
    run.last.write_bytes(content)
    return f"{how} byte {offset:,}"


PARTS: dict[str, Callable[[Disturbed, int], str]] = {"kills": kills, "stop": stop, "write": write, "damage": damage}


def disturb(folder: Path, part: str, times: int, seed: int) -> bool:
    """Whether the run equals the undisturbed one after every disturbance and at its end."""
    packs = 6 if part == "kills" else 2  # of a step
    bench = make_bench(folder)
    words = (*COMMON, "--data.global_batch", str(packs), "--trainer.max_steps", str(max(30, (8 if packs == 6 else 26) * times)))
    run, reference = Disturbed(bench, part, seed, *words), Disturbed(bench, "undisturbed", seed, *words)
    finish(reference)
    same = 0
    for turn in range(times):
        how = PARTS[part](run, turn)
        step = run.readable_step()
        if part == "kills":
            same += run.entries()[: packs * step] == reference.entries()[: packs * step]
        else:
            same += step >= 0 and run.same_until(step, reference.folder)
        print(f"{part} {turn + 1}: {how}; continues after step {step}; {same} of {turn + 1} exact", flush=True)
    finish(run)
    whole = read_ledger(run.folder) == read_ledger(reference.folder)
    if part != "kills":
        assert_same_run(run.folder, reference.folder)
    print(f"{part}: {same} of {times} exact; the whole run is {'identical' if whole else 'DIFFERENT'}", flush=True)
    return whole and same == times


def main(parts: list[str] = list(PARTS), times: int = 10, seed: int = 0) -> bool:  # noqa: B006
    survived = []
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="pile-survive-") as name:
            survived.append(disturb(Path(name), part, times, seed))
    return all(survived)


if __name__ == "__main__":
    command(main, __doc__)
