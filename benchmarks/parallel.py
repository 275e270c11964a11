"""Is a step the same however many devices take it, and a run the same wherever it goes on?

    python benchmarks/parallel.py curves [--steps 50]     one process against DDP, FSDP2 and tensor parallel
    python benchmarks/parallel.py resume [--steps 50]     DDP 2 -> FSDP2 2 -> 1 process, and back by way of 4

Every run is `train.py`'s `main` in real processes (Gloo on CPU, float32), on texts, captioned images and transcribed sounds:
clipped gradients, dropout, two validations; the codecs learn in the first steps. The figures are the largest differences over
all steps: of the loss, which has the bar, and of the loss of any modality or source, in training or validation. torch's Muon
orthogonalizes in bfloat16, which turns differences in the last bit of a float32 sum into some 1e-5 of the loss;
`--optimizer adamw` shows what is left without it. `--only NAME` runs one line of a table.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "training"), str(REPOSITORY)]

BAR = 1e-4
SHARDED = ("--trainer.strategy", "pile_app.training.parallel.ShardedStrategy", "--trainer.strategy.tensor_parallel_size")
# name -> (processes, arguments)
SHAPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ("--data.micro_batch", "1")),
    "DDP 2": (2, ("--data.micro_batch", "1")),
    "FSDP2 2": (2, ("--trainer.strategy", "fsdp2", "--data.micro_batch", "1")),
    "tensor parallel 2": (2, (*SHARDED, "2", "--data.micro_batch", "1")),
    "FSDP2 4": (4, ("--trainer.strategy", "fsdp2", "--data.micro_batch", "1")),
    "FSDP2 2 x tensor parallel 2": (4, (*SHARDED, "2", "--data.micro_batch", "1")),
}
CHAINS = {
    "DDP 2 -> FSDP2 2 -> 1 process": ("DDP 2", "FSDP2 2", "1 process"),
    "1 -> FSDP2 2 -> FSDP2 2 x tensor parallel 2 -> DDP 2": ("1 process", "FSDP2 2", "FSDP2 2 x tensor parallel 2", "DDP 2"),
}


def main() -> None:
    from attempts import make_bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["curves", "resume"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--only", default="", help="lines whose name contains this")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pile-parallel-"))
    bench = make_bench(folder)
    common = ("--trainer.max_steps", str(options.steps), "--trainer.val_check_interval", str(options.steps // 2))
    common += (
        "--model.optimizer.name",
        options.optimizer,
        "--model.codec_steps",
        "5",
        "--checkpoint_every",
        str(options.steps),
    )

    def attempt(name: str, shape: str, **environment: str) -> None:
        from ports import free_port

        processes, words = SHAPES[shape]
        if processes == 1:
            attempts = [bench.start(name, *common, *words, **environment)]
        else:
            attempts = bench.start_ranks(name, *common, *words, port=free_port(), ranks=processes, **environment)
        for one in attempts:
            code = one.wait(170)
            if code not in (0, 143 if environment else 0):
                sys.exit(f"{name}, {shape} ended with {code}:\n{one.text[-4000:]}")

    attempt("unbroken", "1 process")
    print(f"| {options.part}, {options.steps} steps, {options.optimizer} | loss | any modality or source | seconds |")
    print("|---|---|---|---|")
    worst = 0.0
    lines = [name for name in (SHAPES if options.part == "curves" else CHAINS) if options.only in name and name != "1 process"]
    for number, line in enumerate(lines):
        began = time.monotonic()
        if options.part == "curves":
            attempt(str(number), line)
        else:
            stages = CHAINS[line]
            for place, shape in enumerate(stages, 1):
                # GracefulStop ends the attempt after the micro-batch in which it is told to, once its step is done.
                step = options.steps * place // len(stages)
                micro_batches = 4 if shape == "1 process" else 2
                stop = {"STOP_AT": str(step * micro_batches - 1)} if place < len(stages) else {}
                attempt(str(number), shape, **stop)
        of_loss, of_any = differences(bench.run("unbroken"), bench.run(str(number)))
        worst = max(worst, of_loss)
        print(f"| {line} | {of_loss:.1e} | {of_any:.1e} | {time.monotonic() - began:.0f} |", flush=True)
    print(f"bar {BAR:.0e}: {'reached' if worst <= BAR else 'MISSED'}")
    shutil.rmtree(folder)
    sys.exit(worst > BAR)


def differences(run: Path, other: Path) -> tuple[float, float]:
    """Largest over all steps: of the losses of training and validation, and of any part of them."""
    from attempts import losses

    one, two = losses(run), losses(other)
    if one.keys() != two.keys():
        sys.exit(f"{run} and {other} logged other steps")
    found = {
        (step, name): abs(float(value) - float(two[step][name]))
        for step in one
        for name, value in one[step].items()
        if name.endswith("loss")
    }
    whole = [difference for (_, name), difference in found.items() if name in ("train/loss", "validation/loss")]
    return max(whole), max(found.values())


if __name__ == "__main__":
    main()
