"""Losses of the first steps of every phase and objective on 1, 2 and 3 devices, in micro-batches of 1, 2 and 4.

    python benchmarks/losses.py [--steps 50] [--global_batch 12] [--kinds '[codecs, classification, retrieval, tagging]']

Each run is `train.py` in real processes (Gloo on CPU), with SGD in float32. Printed is the largest relative difference of any
loss to that on one device with micro-batches of 4; the bar is 1e-5. The devices need not divide the global batch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import TESTS, command, table

sys.path[:0] = TESTS
from step_losses import KINDS, Bench, difference, train_losses  # noqa: E402


def main(steps: int = 50, global_batch: int = 12, kinds: list[str] = list(KINDS)) -> bool:  # noqa: B006
    """steps: of each phase."""
    worst = 0.0

    def rows(bench: Bench) -> Iterator[tuple[object, ...]]:
        nonlocal worst
        for kind in kinds:
            expected = None
            for devices, micro_batch in ((devices, micro_batch) for devices in (1, 2, 3) for micro_batch in (4, 2, 1)):
                words = ["--data.global_batch", str(global_batch), "--data.micro_batch", str(micro_batch)]
                words += ["--trainer.max_steps", str(steps * (2 if kind == "codecs" else 1))]
                words += ["--model.codec_steps", str(steps)] if kind == "codecs" else []
                found = train_losses(bench.train(f"{kind}-{devices}-{micro_batch}", kind, *words, ranks=devices))
                expected = expected or found
                worst = max(worst, difference(expected, found))
                yield kind, devices, micro_batch, f"{difference(expected, found):.1e}"

    with tempfile.TemporaryDirectory() as folder:
        table(["kind", "devices", "micro-batch", "largest difference"], rows(Bench(Path(folder))))
    return worst <= 1e-5


if __name__ == "__main__":
    command(main, __doc__)
