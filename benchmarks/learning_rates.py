"""Does the best learning rate stay where it is when the model grows?

    python benchmarks/learning_rates.py FILE [--vary width|depth] [--sizes 64 128 256] [--rates 0.01 0.02 0.04] ...

Trains the model as it is (embedding, backbone, heads, optimizer, schedule) on random windows of the bytes of a text file, the
last tenth of which is held out, and prints the held-out nats a byte for each size and rate. Every run sees the same windows.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import TEXT
from pile_app.model.backbones import LSTM, Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.optim import OptimizerConfig, make_optimizer
from pile_app.vocabulary import Vocabulary

HEAD_WIDTH = 32


def windows(tokens: torch.Tensor, starts: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) tokens and the ones that follow them."""
    places = starts[:, None] + torch.arange(context)
    return tokens[places], tokens[places + 1]


def loss_of(model: FusedLanguageModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros_like(tokens)
    position = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(model.hidden(tokens, zeros, zeros, position).flatten(0, 1), TEXT)
    return F.cross_entropy(logits, targets.flatten())


def train(options: argparse.Namespace, width: int, layers: int, config: OptimizerConfig) -> float:
    """Held-out nats a byte after `options.steps` steps."""
    torch.manual_seed(options.seed)
    backbone = LSTM(width, layers) if options.lstm else Transformer(width, layers, max(1, width // HEAD_WIDTH))
    return fit(FusedLanguageModel(backbone, ByteTokenizer()), config, options)


def fit(model: FusedLanguageModel, config: OptimizerConfig, options: argparse.Namespace) -> float:
    """Held-out nats a byte after `options.steps` steps on `options.batch` windows each, of `options.context` bytes."""
    optimizer, schedule = make_optimizer(model, config, 0, options.steps)
    text = np.fromfile(options.file, np.uint8).astype(np.int64) + Vocabulary.SPECIALS
    tokens = torch.from_numpy(text)
    border = len(tokens) * 9 // 10
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        starts = torch.randint(border - options.context - 1, (options.batch,), generator=generator)
        loss = loss_of(model, *windows(tokens, starts, options.context))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        starts = torch.linspace(border, len(tokens) - options.context - 2, 256).long()
        parts = [loss_of(model, *windows(tokens, part, options.context)) for part in starts.split(32)]
    return float(torch.stack(parts).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", help="text, read as bytes")
    parser.add_argument("--vary", choices=("width", "depth"), default="width")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.04])
    parser.add_argument("--of", choices=("matrices", "rest"), default="matrices", help="whose rates: Muon's or AdamW's")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--base-width", type=int, help="as model.optimizer.base_width")
    parser.add_argument("--lstm", action="store_true", help="instead of the Transformer")
    parser.add_argument("--layers", type=int, default=2, help="where the width varies")
    parser.add_argument("--width", type=int, default=64, help="where the depth varies")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.sizes:
        width, layers = (size, options.layers) if options.vary == "width" else (options.width, size)
        started, losses = time.perf_counter(), []
        for rate in options.rates:
            config = OptimizerConfig(name=options.optimizer, base_width=options.base_width, learning_rate=0.01)
            field = "matrix_learning_rate" if options.of == "matrices" and options.optimizer == "muon" else "learning_rate"
            losses.append(train(options, width, layers, replace(config, **{field: rate})))
        best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        cells = "  ".join(f"{rate:g}: {loss:.3f}{'*' if i == best else ' '}" for i, (rate, loss) in
                          enumerate(zip(options.rates, losses, strict=True)))  # fmt: skip
        print(f"{options.vary} {size:4d}  {cells}  ({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
