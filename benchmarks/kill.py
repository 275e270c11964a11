"""A run that is killed at random points, with another number of workers and devices each time, against an undisturbed one.

    python benchmarks/kill.py [--kills 50] [--seed 0]

Each attempt is `train.py`'s `main` in real processes (Gloo on CPU), 1, 2 or 3 of them, with 0 to 3 loading workers each, in
micro-batches of 1 or 2 packs. After a random number of steps and some milliseconds all of them get SIGKILL. Then the ledger,
as far as the last checkpoint goes, is compared with that of the undisturbed run; the attempt after the last kill runs to the
end. Validations and ends of epochs fall in between.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "training"), str(REPOSITORY)]

COMMON = (
    *("--data.global_batch", "6", "--checkpoint_every", "2", "--trainer.val_check_interval", "25"),
    *("--model.codec_steps", "10"),
)


def main() -> None:
    from attempts import checkpoint, make_bench

    from pile_app.training.callbacks import read_ledger

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="pile-kill-"))
    bench = make_bench(folder)
    steps = 8 * options.kills
    bench.train("undisturbed", *COMMON, "--trainer.max_steps", str(steps))
    wanted = read_ledger(bench.run("undisturbed"))
    same = kills = 0
    while kills < options.kills:
        world, workers, micro = draw.choice([1, 2, 3]), draw.randrange(4), draw.choice([1, 2])
        shape = ("--data.num_workers", str(workers), "--data.micro_batch", str(micro))
        words = (*COMMON, "--trainer.max_steps", str(steps), *shape)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if world == 1:
            attempts = [bench.start("killed", *words)]
        else:
            attempts = bench.start_ranks("killed", *words, port=port, ranks=world)
        kill_when(bench.run("killed") / "ledger", draw.randint(1, 12), draw.random() * 0.1, [one.process for one in attempts])
        kills += 1
        last = bench.run("killed") / "checkpoints" / "last.ckpt"
        step = checkpoint(bench.run("killed"))["global_step"] if last.exists() else 0
        found = entries_until(bench.run("killed") / "ledger", step)
        same += found == wanted[: 6 * step]
        how = f"{world} devices, {workers} workers, micro-batch {micro}"
        print(f"kill {kills}: {how}: step {step}, {same} of {kills} same", flush=True)
    bench.train("killed", *COMMON, "--trainer.max_steps", str(steps))
    whole = read_ledger(bench.run("killed")) == wanted
    epochs = max(document[2] for entry in wanted for document in entry["documents"]) + 1
    verdict = "identical" if whole else "DIFFERENT"
    print(f"{same} of {kills} prefixes identical; whole ledger of {len(wanted)} packs, {epochs} epochs: {verdict}")
    shutil.rmtree(folder)
    sys.exit(0 if whole and same == kills else 1)


def entries_until(ledger: Path, step: int) -> list[dict[str, object]]:
    """As the next attempt will keep them."""
    lines = [line for path in ledger.glob("*.jsonl") for line in path.read_text().splitlines() if line.endswith("}")]
    entries = [entry for entry in map(json.loads, lines) if entry["step"] <= step]
    return sorted(entries, key=lambda entry: entry["position"])


def kill_when(ledger: Path, steps: int, delay: float, processes: list) -> None:
    """SIGKILL to all and to their workers, `delay` seconds after `steps` steps were written down."""

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in ledger.glob("*.jsonl"))

    began = time.monotonic()
    least = lines()  # an attempt first drops what came after its checkpoint
    while lines() < least + 6 * steps and all(process.exitcode is None for process in processes):
        least = min(least, lines())
        if time.monotonic() - began > 120:
            raise TimeoutError("the attempt does not get on")
        time.sleep(0.005)
    time.sleep(delay)
    for process in processes:
        for child in children(process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.kill()
    for process in processes:
        process.join()


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


if __name__ == "__main__":
    main()
