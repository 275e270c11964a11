"""Causal attention within documents, with the fastest kernel of the device.

    query (B, H, T, d), key and value (B, H_kv, T, d), attention mask -> (B, H, T, d)

CUDA, half precision   `torch.nn.attention.varlen` on sm80 and later: each piece of a pack is a sequence, no mask
CPU                    blocks of BLOCK queries against the keys from the first visible document on
elsewhere              SDPA with a (B, 1, T, T) mask

Why blocks on a CPU: torch's flash kernel multiplies at a fifth of the rate of large products, and slower with a mask. A block's
scores are one product; its probabilities are saved for backward in the type of the values, at most B · H · T² bytes in bfloat16
(so contexts above LONGEST use SDPA).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake  # memory planning: no values to find blocks by

BLOCK = 128  # queries
LONGEST = 4096  # tokens of a pack whose probabilities are saved


@dataclass(frozen=True)
class AttentionMask:
    """Each position attends to itself and to earlier positions of its document. At most one field is set; none: one document a
    row, T queries against T keys, or a single query against all keys.

    starts: (P + 1,) int32 flat indices where pieces begin, for varlen; blocks: of BLOCK queries, (first key, mask to add to the
    scores of the last keys, (B, 1, 1, queries, keys) or (queries, keys)); mask: (B or 1, 1, T, keys), True: may attend.
    """

    starts: Tensor | None = None
    blocks: list[tuple[int, Tensor]] | None = None
    mask: Tensor | None = None


def make_mask(
    document: Tensor, position: Tensor, piece_starts: Tensor | None, dtype: torch.dtype, head_width: int
) -> AttentionMask:
    """document, position: (B, T) as the backbone gets them; dtype: of queries, keys and values; head_width: d."""
    device = document.device
    if device.type == "cuda" and piece_starts is not None and flash_runs(device, dtype, head_width):
        return AttentionMask(starts=piece_starts)
    if device.type == "cpu" and document.size(1) <= LONGEST and not is_fake(document):
        return AttentionMask(blocks=_find_blocks(document, position, dtype))
    same = document[:, :, None] == document[:, None, :]
    return AttentionMask(mask=same.tril()[:, None])


def make_cached_mask(tokens: int, past: int, device: torch.device) -> AttentionMask:
    """Mask of the next `tokens` tokens of a document, one a row, whose first `past` tokens are in a cache."""
    if tokens == 1 or not past:
        return AttentionMask()
    return AttentionMask(mask=torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)[None, None])


def flash_runs(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether the flash kernel takes this type and head size on this GPU: sm80 or later, a multiple of 8 up to 256."""
    is_possible = dtype in (torch.bfloat16, torch.float16) and head_width % 8 == 0 and head_width <= 256
    return is_possible and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """See the module's docstring. `scale`: of the scores."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    if mask.blocks is not None:
        return _BlockAttention.apply(query, key, value, scale, mask.blocks)
    options: dict[str, Any] = {"scale": scale}
    groups, tokens = query.size(1) // key.size(1), query.size(2)
    if mask.starts is None:
        if groups > 1 and mask.mask is not None and query.is_cuda:  # with a mask, no fused kernel of CUDA groups queries
            key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
        options |= {"is_causal": mask.mask is None and tokens > 1, "enable_gqa": groups > 1}
        return F.scaled_dot_product_attention(query, key, value, mask.mask, **options)
    from torch.nn.attention.varlen import varlen_attn

    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, H, d)
    # No piece is longer than a pack: reading the true maximum would wait for the device.
    y = varlen_attn(query, key, value, mask.starts, mask.starts, tokens, tokens, window_size=(-1, 0), **options)
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
            blocks.append((first, mask[:, None, None]))
    return blocks


class _BlockAttention(torch.autograd.Function):
    """The G = H / H_kv queries that share a key are rows of one matrix product: keys and values are never repeated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: list[tuple[int, Tensor]]) -> Tensor:
        # Matrix products copy views that are not contiguous, in every product.
        query, key, value = query.mul(scale).contiguous(), key.contiguous(), value.contiguous()
        out = torch.empty_like(query)
        grouped = query.unflatten(1, (key.size(1), -1)), out.unflatten(1, (key.size(1), -1))  # (B, H_kv, G, T, d)
        kept = []
        for index, (first, mask) in enumerate(blocks):
            rows = slice(index * BLOCK, (index + 1) * BLOCK)
            keys = slice(first, rows.stop)
            queries, outs = (x[:, :, :, rows] for x in grouped)
            scores = queries.flatten(2, 3) @ key[:, :, keys].transpose(2, 3)  # (B, H_kv, G * queries, keys)
            scores.unflatten(2, queries.shape[2:4])[..., -mask.size(-1) :].add_(mask)
            probabilities = scores.softmax(-1)
            outs.copy_((probabilities @ value[:, :, keys]).view_as(outs))
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.firsts = scale, [first for first, _ in blocks]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        grouped = [x.unflatten(1, (key.size(1), -1)) for x in (gradient.contiguous(), query, of_query)]
        for index, (first, probabilities) in enumerate(zip(ctx.firsts, kept, strict=True)):
            rows = slice(index * BLOCK, (index + 1) * BLOCK)
            keys = slice(first, rows.stop)
            outs, queries, of_queries = (x[:, :, :, rows] for x in grouped)
            out = outs.flatten(2, 3)  # (B, H_kv, G * queries, d)
            of_value[:, :, keys] += probabilities.transpose(2, 3) @ out
            by_probabilities = out @ value[:, :, keys].transpose(2, 3)
            scores = torch.ops.aten._softmax_backward_data(by_probabilities, probabilities, -1, probabilities.dtype)
            of_queries.copy_((scores @ key[:, :, keys]).view_as(of_queries))
            of_key[:, :, keys] += scores.transpose(2, 3) @ queries.flatten(2, 3)
        return of_query.mul_(ctx.scale), of_key.to(key.dtype), of_value.to(value.dtype), None, None
