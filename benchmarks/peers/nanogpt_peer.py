"""nanoGPT's CPU recipe: as a backbone that `train.py` trains (`nanogpt.yaml`), and as the plain loop that it is at home.

    python benchmarks/peers/nanogpt_peer.py TEXT [--seed 0]

The loop: 4 layers, 4 heads, 128 wide, block 64, batch 12, 2,000 iterations, AdamW (0.9, 0.99), rate 1e-3 -> 1e-4 along a
cosine after 100 steps of warm-up, weight decay 0.1 on matrices, clipping at 1, no dropout, no biases, LayerNorm, GELU, learned
positions, head tied to the embedding, float32: what nanoGPT's README gives for a CPU. It prints seconds, and the loss over the
whole validation split in windows of a block. Written anew after https://github.com/karpathy/nanoGPT (MIT).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.model.backbones import Backbone, Cache


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        for layer in (self.attention_in, self.expand):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.attention_out, self.contract):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.attention_in(self.norm_1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts, is_causal=True)  # (B, H, T, d)
        x = x + self.attention_out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.contract(F.gelu(self.expand(self.norm_2(x))))


class NanoGPT(Backbone):
    """Its blocks. Like nanoGPT it takes a row for one stream of text, and knows neither documents nor a cache.

    Args:
        width: D.
        layers: number of blocks.
        heads: of attention.
        block: longest row.
    """

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, block: int = 64) -> None:
        super().__init__(width, layers)
        self.positions = nn.Parameter(torch.randn(block, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(
        self,
        x: Tensor,
        document: Tensor,
        position: Tensor,
        cache: Cache | None = None,
        piece_starts: Tensor | None = None,
    ) -> Tensor:
        x = x + self.positions[: x.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    text = options.text.read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    border = int(0.9 * len(ids))
    train, validation = ids[:border], ids[border:]
    block, batch, steps, warmup, rate, lowest = 64, 12, 2000, 100, 1e-3, 1e-4
    table = nn.Parameter(torch.randn(len(characters), 128) * 0.02)
    body = NanoGPT()
    parameters = [table, *body.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))

    def losses(x: Tensor, y: Tensor) -> Tensor:
        hidden = body(F.embedding(x, table), x, x)
        return F.cross_entropy(F.linear(hidden, table).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def validate() -> float:
        """Over every character but the first, each once; the last window is shorter."""
        total = 0.0
        for x, y in zip(validation[:-1].split(64 * block), validation[1:].split(64 * block), strict=True):
            whole = len(x) // block * block
            for part in (slice(whole), slice(whole, None)):
                if len(x[part]):
                    rows = x[part].view(-1, min(block, len(x[part])))
                    total += float(losses(rows, y[part].view_as(rows))) * rows.numel()
        return total / (len(validation) - 1)

    span = torch.arange(block + 1)
    for step in range(steps):
        share = (step + 1) / (warmup + 1)
        if step >= warmup:
            share = lowest / rate + (1 - lowest / rate) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        rows = train[torch.randint(len(train) - block, (batch,))[:, None] + span]
        loss = losses(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            loss, size = validate(), sum(p.numel() for p in parameters) / 1e6
            print(f"step {step + 1}: {time.perf_counter() - began:.1f} s, {size:.3f} M parameters, loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
