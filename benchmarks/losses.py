"""Losses of the first steps of every phase and objective on 1, 2 and 3 devices, in micro-batches of 1, 2 and 4.

    python benchmarks/losses.py [--steps 50] [--global_batch 12]

Each run is `train.py` in real processes (Gloo on CPU), with SGD in float32. Printed is the largest relative difference of any
loss to that of one device with micro-batches of 4; the bar is 1e-5. The devices need not
divide the global batch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "training"), str(REPOSITORY)]


def main() -> None:
    from step_losses import KINDS, Bench, difference, train_losses

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each phase")
    parser.add_argument("--global_batch", type=int, default=12)
    options = parser.parse_args()
    print("kind            devices  micro-batch  largest difference")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for kind in KINDS:
            expected = None
            for devices in (1, 2, 3):
                for micro in (4, 2, 1):
                    steps = ("--trainer.max_steps", str(options.steps * (2 if kind == "codecs" else 1)))
                    words = ("--data.global_batch", str(options.global_batch), "--data.micro_batch", str(micro), *steps)
                    phases = ("--model.codec_steps", str(options.steps)) if kind == "codecs" else ()
                    found = train_losses(bench.train(f"{kind}-{devices}-{micro}", kind, *words, *phases, ranks=devices))
                    expected = expected or found
                    print(f"{kind:15} {devices:7} {micro:12}  {difference(expected, found):.1e}", flush=True)


if __name__ == "__main__":
    main()
