"""What a part of a backbone is worth: the same small model with and without it, on the bytes of a text.

    python benchmarks/ablations.py FILE [--of mingru transformer] [--seeds 0 1 2] [--steps 100] [--batch 16] [--context 128] ...

Trains as `learning_rates.py` does, on windows that are the same for all variants of a seed, and prints the held-out nats a byte
of each, and CPU milliseconds of a step (one thread). What a variant has that Pile's backbones have not is written here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from learning_rates import fit
from torch import Tensor, nn

from pile_app.data.tokenizers import ByteTokenizer
from pile_app.model.backbones import MinGRU, Transformer, norm
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.optim import OptimizerConfig


class GatedOutput(nn.Module):
    """Griffin's (arXiv:2402.19427): O (sigmoid(G y) norm(h)), y being what the cell got."""

    def __init__(self, out: nn.Linear) -> None:
        super().__init__()
        width = out.in_features
        self.out, self.gate = out, nn.Linear(width, width, bias=False)
        nn.init.uniform_(self.gate.weight, -((3 / width) ** 0.5), (3 / width) ** 0.5)
        self.y = torch.zeros(0)

    def forward(self, hidden: Tensor) -> Tensor:
        y: Tensor = self.out(hidden * torch.sigmoid(self.gate(self.y)))
        return y


def gate_output(model: FusedLanguageModel) -> None:
    for block in blocks(model):
        block.recurrence_out = gated = GatedOutput(block.recurrence_out)

        def recur(y: Tensor, *where: Any, gated: GatedOutput = gated, plain: Any = block.recur) -> Tensor:
            gated.y = y
            result: Tensor = plain(y, *where)
            return result

        block.recur = recur


def use_swiglu(model: FusedLanguageModel) -> None:
    """silu(A x) · B x (arXiv:2002.05202) instead of relu(B x)², two thirds as wide, so of as many parameters."""
    for block in blocks(model):
        width, hidden = block.expand.in_features, block.expand.out_features * 2 // 3
        block.gate, block.expand = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        block.contract = nn.Linear(hidden, width, bias=False)
        for layer in (block.gate, block.expand):
            nn.init.uniform_(layer.weight, -((3 / width) ** 0.5), (3 / width) ** 0.5)
        nn.init.zeros_(block.contract.weight)
        block.forward = forward_with_swiglu.__get__(block)


def forward_with_swiglu(self: Any, x: Tensor, embedding: Tensor, *where: Any) -> Tensor:
    x = self.skips[0] * x + self.skips[1] * embedding
    x = x + self.attend(norm(x), *where)
    y = norm(x)
    return x + self.contract(F.silu(self.gate(y)) * self.expand(y))


class ValueOfToken(nn.Module):
    """A value embedding (arXiv:2410.17897 has it as a residual; this is modded-nanogpt's): each token adds a vector of its own
    to the values of a block."""

    def __init__(self, value: nn.Linear, vocabulary: int) -> None:
        super().__init__()
        self.value = value
        self.table = nn.Parameter(torch.zeros(vocabulary, value.out_features))
        self.tokens = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.value(x)
        return y + F.embedding(self.tokens, self.table).to(y.dtype)


def add_value_embeddings(model: FusedLanguageModel) -> None:
    for block in blocks(model):
        block.value = ValueOfToken(block.value, len(model.token_bytes))
    hidden = model.hidden

    def hidden_of(tokens: Tensor, *rest: Any) -> Tensor:
        for block in blocks(model):
            block.value.tokens = tokens
        return hidden(tokens, *rest)

    model.hidden = hidden_of  # type: ignore[method-assign]


def blocks(model: FusedLanguageModel) -> Any:
    return model.backbone.blocks


def keep(model: FusedLanguageModel) -> None:
    pass


VARIANTS: dict[str, dict[str, Callable[[FusedLanguageModel], None]]] = {
    "mingru": {"as it is": keep, "output gate": gate_output},
    "transformer": {"as it is": keep, "value embeddings": add_value_embeddings, "SwiGLU": use_swiglu},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", help="text, read as bytes")
    parser.add_argument("--of", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, help="default: 4 of the MinGRU, 3 of the Transformer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs=2, default=[0.02, 0.03], help="of AdamW and Muon")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--warmup", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rate, matrix_rate = options.rates
    config = OptimizerConfig(
        learning_rate=rate, matrix_learning_rate=matrix_rate, momentum=options.momentum, warmup_steps=options.warmup
    )
    for name in options.of:
        for variant, change in VARIANTS[name].items():
            losses, began = [], time.process_time()
            for seed in options.seeds:
                options.seed = seed
                torch.manual_seed(seed)
                mingru = name == "mingru"
                layers = options.layers or (4 if mingru else 3)
                backbone = MinGRU(options.width, layers) if mingru else Transformer(options.width, layers)
                model = FusedLanguageModel(backbone, ByteTokenizer())
                change(model)
                losses.append(fit(model, config, options))
            seconds = (time.process_time() - began) / len(losses) / options.steps
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            shown = ", ".join(f"{loss:.3f}" for loss in losses)
            print(
                f"| {name}, {variant} | {millions:.3f} | {1000 * seconds:.0f} | {shown} | {statistics.fmean(losses):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
