"""Causal attention within documents, by what is fastest on the device.

    query (B, H, T, d), key and value (B, H_kv, T, d), where documents stand -> (B, H, T, d)

CUDA, half precision   `torch.nn.attention.varlen`: each piece of a pack is a sequence of its own, no mask
CPU                    blocks of BLOCK queries against the keys from the first document in sight on
elsewhere              SDPA with a (B, 1, T, T) mask

Why blocks on a CPU: torch's flash kernel multiplies at a fifth of the rate that large products reach there, and slower with a
mask. A block's scores are one matrix product; its probabilities are kept for backward in the type of the values, which takes
B · H · T² bytes at most in bfloat16 (so contexts above LONGEST go by SDPA). Measured in `docs/benchmarks.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake  # of a plan: no numbers to find blocks by

BLOCK = 128  # queries
LONGEST = 4096  # tokens of a pack whose probabilities are kept


@dataclass(frozen=True)
class Sight:
    """What each place may look at: itself and earlier places of its document. One of three, see the module's docstring.

    starts: (P + 1,) int32 flat places where pieces begin, for varlen; blocks: of BLOCK queries, (first key, mask that is added
    to the scores of the last keys, (B or 1, 1, queries, keys)); mask: (B or 1, 1, T, keys), True where a place may look.
    """

    starts: Tensor | None = None
    blocks: list[tuple[int, Tensor]] | None = None
    mask: Tensor | None = None


def find_sight(document: Tensor, position: Tensor, piece_starts: Tensor | None, dtype: torch.dtype) -> Sight:
    """document, position: (B, T) as the backbone gets them; dtype: that of queries, keys and values."""
    if document.is_cuda and piece_starts is not None and dtype in (torch.bfloat16, torch.float16):
        return Sight(starts=piece_starts)
    if document.device.type == "cpu" and document.size(1) <= LONGEST and not is_fake(document):
        return Sight(blocks=_find_blocks(document, position, dtype))
    same = document[:, :, None] == document[:, None, :]
    return Sight(mask=same.tril()[:, None])


def attend(query: Tensor, key: Tensor, value: Tensor, sight: Sight, scale: float) -> Tensor:
    """See the module's docstring. `scale`: of the scores."""
    groups = query.size(1) // key.size(1)
    if sight.mask is not None:
        return F.scaled_dot_product_attention(query, key, value, sight.mask, scale=scale, enable_gqa=groups > 1)
    query, key = query.to(value.dtype), key.to(value.dtype)
    if groups > 1:  # varlen_attn knows grouped queries from torch 2.12 on only
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if sight.blocks is not None:
        return _BlockAttention.apply(query, key, value, scale, sight.blocks)
    assert sight.starts is not None
    from torch.nn.attention.varlen import varlen_attn

    tokens = query.size(2)
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, H, d)
    starts, causal = sight.starts, (-1, 0)
    # No piece is longer than a pack: the true maximum would have to be waited for.
    y = varlen_attn(query, key, value, starts, starts, tokens, tokens, scale=scale, window_size=causal)
    assert isinstance(y, Tensor)
    return y.unflatten(0, (-1, tokens)).transpose(1, 2)  # (B, H, T, d)


def _find_blocks(document: Tensor, position: Tensor, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    tokens = document.size(1)
    causal = torch.full((BLOCK, BLOCK), -torch.inf, dtype=dtype).triu(1)
    begins = list(range(0, tokens, BLOCK))
    firsts = (torch.tensor(begins) - position[:, ::BLOCK]).amin(0).clamp_min(0).tolist()
    blocks = []
    for begin, first in zip(begins, firsts, strict=True):
        end = min(begin + BLOCK, tokens)
        same = document[:, begin:end, None] == document[:, None, first:end]  # (B, queries, keys)
        if bool(same.all()):
            blocks.append((first, causal[: end - begin, : end - begin]))
        else:
            mask = torch.zeros_like(same, dtype=dtype).masked_fill_(~same.tril(begin - first), -torch.inf)
            blocks.append((first, mask[:, None]))
    return blocks


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: list[tuple[int, Tensor]]) -> Tensor:
        # Products of views that are not contiguous are copied by the library in every one of them.
        query, key, value = query.mul(scale).contiguous(), key.contiguous(), value.contiguous()
        out = torch.empty_like(query)
        kept = []
        for number, (first, mask) in enumerate(blocks):
            rows = slice(number * BLOCK, (number + 1) * BLOCK)
            keys = slice(first, rows.stop)
            scores = query[:, :, rows] @ key[:, :, keys].transpose(2, 3)  # (B, H, queries, keys)
            scores[..., -mask.size(-1) :] += mask
            probabilities = scores.softmax(-1)
            out[:, :, rows] = probabilities @ value[:, :, keys]
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.firsts = scale, [first for first, _ in blocks]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        for number, (first, probabilities) in enumerate(zip(ctx.firsts, kept, strict=True)):
            rows = slice(number * BLOCK, (number + 1) * BLOCK)
            keys = slice(first, rows.stop)
            out = gradient[:, :, rows]
            of_value[:, :, keys] += probabilities.transpose(2, 3) @ out
            by_probabilities = out @ value[:, :, keys].transpose(2, 3)
            scores = torch.ops.aten._softmax_backward_data(by_probabilities, probabilities, -1, probabilities.dtype)
            of_query[:, :, rows] = scores @ key[:, :, keys]
            of_key[:, :, keys] += scores.transpose(2, 3) @ query[:, :, rows]
        return of_query.mul_(ctx.scale), of_key.to(key.dtype), of_value.to(value.dtype), None, None
