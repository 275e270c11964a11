"""What a step of Muon costs on a CPU: torch's, in bfloat16, against ours in float32; turns alternate.

    python benchmarks/muon.py [--width 128] [--layers 4] [--turns 9]

Where the CPU has bfloat16 instructions, `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` shows what one without them takes.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from data_peers import describe_machine
from torch import Tensor, nn

from pile_app.model.backbones import Transformer
from pile_app.training import muon


def seconds(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> float:
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient.clone()
    begin = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    print(
        describe_machine(),
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    torch.manual_seed(0)
    backbone = Transformer(width=options.width, layers=options.layers)
    matrices = [parameter.detach() for parameter in backbone.parameters() if parameter.ndim == 2]
    gradients = [torch.randn_like(matrix) for matrix in matrices]
    muon.compute_dtype = lambda device: torch.float32
    taken: dict[str, list[float]] = {"torch's, bfloat16": [], "ours, float32": []}
    for turn in range(options.turns + 1):
        for times, of in zip(taken.values(), (torch.optim.Muon, muon.Muon), strict=True):
            passed = seconds(of([nn.Parameter(matrix.clone()) for matrix in matrices], lr=0.02), gradients)
            if turn:
                times.append(passed)
    print(f"{len(matrices)} matrices, {sum(matrix.numel() for matrix in matrices):,} numbers")
    for name, times in taken.items():
        print(f"{name:20} {1000 * statistics.median(times):9.1f} ms a step")


if __name__ == "__main__":
    main()
