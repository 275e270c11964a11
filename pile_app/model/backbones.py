"""Backbones: token vectors in, vectors out, causal, aware of where documents begin, with a cache for generation.

    forward(x, document, position, cache, piece_starts) -> (B, T, D)

x: (B, T, `embedding_width`) token vectors, of width D unless a recurrent backbone is told otherwise; document: (B, T) document
of each token, equal values see each other, -1 is padding; position: (B, T) index within the document; cache: from `new_cache`,
for generation, where each row holds one document and each call brings its next T tokens; piece_starts: (P + 1,) int32 flat
indices where pieces begin, then B * T, for CUDA.

The Transformer is here, LSTM, RNN and MinGRU are in `recurrent.py`, shared code is in `base.py`.

Notable choices: no biases and no learned norm gains; RoPE (arXiv:2104.09864) with QK-norm (arXiv:2010.04245); ReLU²
(arXiv:2109.08668); output projections start at zero, so every block starts as the identity; each block may mix the embedding
back in (modded-nanogpt's x0 skip).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.model.attention import AttentionMask, attend, make_cached_mask, make_mask
from pile_app.model.base import Backbone, Cache, initialize_block, matmul_dtype, norm
from pile_app.model.open_weights import HuggingFace
from pile_app.model.recurrent import LSTM, RNN, MinGRU

__all__ = ["LSTM", "RNN", "Backbone", "Cache", "HuggingFace", "MinGRU", "Transformer", "matmul_dtype", "norm"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x: (B, H, T, d); cos, sin: (B, 1, T, d / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Transformer(Backbone):
    """Pre-norm decoder-only Transformer.

    Args:
        width: D.
        layers: number of blocks, each attention and a feed-forward net.
        heads: H query heads; `width / heads` is the size of each, which has to be even.
        key_value_heads: heads of keys and values, shared by `heads / key_value_heads` queries each (grouped-query attention,
            arXiv:2305.13245); None: `heads`.
        feed_forward: width of the feed-forward net as a multiple of D.
        rope_base: wavelength base of the rotary embedding, in tokens.
        dropout: see `Backbone`.
        skips: each block may mix the embedding back in.
        sharpness: scale of attention, times sqrt(d); queries and keys have the norm sqrt(d), which bounds how sharp it can be
            (1.2 as in modded-nanogpt). 1, and no skips, are the architecture of nanochat (see `huggingface.py`).
    """

    tensor_parallel = dict.fromkeys(("query", "key", "value", "expand"), "colwise")
    tensor_parallel |= dict.fromkeys(("attention_out", "contract"), "rowwise")

    def __init__(
        self, width: int = 128, layers: int = 4, heads: int = 4, key_value_heads: int | None = None,
        feed_forward: float = 4.0, rope_base: float = 10_000.0, dropout: float = 0.0, skips: bool = True,
        sharpness: float = 1.2,
    ) -> None:  # fmt: skip
        super().__init__(width, layers, dropout)
        self.check(width, heads, key_value_heads)
        if not sharpness > 0:
            raise ValueError(f"backbone sharpness={sharpness} must be above 0")
        self.heads, self.rope_base, self.skips, self.sharpness = heads, rope_base, skips, sharpness
        self.key_value_heads = key_value_heads or heads
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, self.key_value_heads, int(feed_forward * width), dropout, skips, sharpness)
            for _ in range(layers)
        )

    @staticmethod
    def check(width: int, heads: int, key_value_heads: int | None) -> None:
        """Raises ValueError for sizes that do not fit together."""
        if heads < 1 or width % heads or (width // heads) % 2:
            raise ValueError(f"backbone heads={heads} must divide width={width} into heads of an even size")
        if key_value_heads is not None and (key_value_heads < 1 or heads % key_value_heads):
            raise ValueError(f"backbone key_value_heads={key_value_heads} must divide heads={heads}")

    def compile_blocks(self) -> None:
        self.is_compiled = True
        for block in self.blocks:
            block.compile()

    def flops_per_token(self, context: float) -> float:
        return super().flops_per_token(context) + 4.0 * self.layers * self.width * context

    def forward(
        self, x: Tensor, document: Tensor, position: Tensor, cache: Cache | None = None, piece_starts: Tensor | None = None
    ) -> Tensor:
        dtype, head_width = matmul_dtype(x), self.width // self.heads
        # Not a buffer, which `bf16-true` would round: positions beyond some 256 would blur.
        exponents = torch.arange(0, head_width, 2, device=x.device, dtype=torch.float32) / -head_width
        angles = position[:, None, :, None] * self.rope_base**exponents  # (B, 1, T, d / 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        tokens, past = x.size(1), cache.length if cache is not None else 0
        if cache is None:
            mask = make_mask(document, position, piece_starts, dtype, head_width)
        else:
            mask = make_cached_mask(tokens, past, x.device)
        embedding = x
        for index, block in enumerate(self.blocks):
            # A compiled block would be compiled again for each index.
            x = self.run(block, x, embedding, cos, sin, mask, index if cache is not None else 0, cache)
        if cache is not None:
            cache.length += tokens
        return norm(x)


class TransformerBlock(nn.Module):
    def __init__(
        self, width: int, heads: int, key_value_heads: int, hidden: int, dropout: float, skips: bool, sharpness: float
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.scale = sharpness / self.head_width**0.5
        key_value_width = key_value_heads * self.head_width
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, key_value_width, bias=False)
        self.value = nn.Linear(width, key_value_width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)
        self.skips = nn.Parameter(torch.empty(2)) if skips else None  # of the stream, of the embedding
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize_block([self.query, self.key, self.value, self.expand], [self.attention_out, self.contract])
        if self.skips is not None:
            with torch.no_grad():
                self.skips.copy_(torch.tensor([1.0, 0.0]))

    def forward(
        self, x: Tensor, embedding: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, layer: int, cache: Cache | None
    ) -> Tensor:
        if self.skips is not None:
            x = self.skips[0] * x + self.skips[1] * embedding
        x = x + self.dropout(self.attend(norm(x), cos, sin, mask, layer, cache))
        return x + self.dropout(self.contract(F.relu(self.expand(norm(x))).square()))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, layer: int, cache: Cache | None) -> Tensor:
        batch, tokens, _ = x.shape
        x = x.to(matmul_dtype(x))  # once, instead of in each of the three products

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, tokens, -1, self.head_width).transpose(1, 2)  # (B, H, T, d)

        query = norm(rotate(heads(self.query(x)), cos, sin))
        key = norm(rotate(heads(self.key(x)), cos, sin))
        value = heads(self.value(x))
        if cache is not None:
            key, value = cache.append(layer, key.to(value.dtype), value)
        y = attend(query, key, value, mask, scale=self.scale)
        return self.attention_out(y.transpose(1, 2).reshape(batch, tokens, -1))  # (B, T, D)
