"""Cross-entropy of a linear head whose logits are never whole in memory.

    hidden (K, D), weight (V, D), targets (K,) -> sum of -log softmax(cap · tanh(hidden @ weightᵀ / cap))[target], nats of each

The K x V logits are computed for some rows at a time, and with them, still in the forward pass, the gradients of hidden and
weight (as in Liger, arXiv:2410.10989), which backward multiplies by the gradient of the sum. No logit is computed twice.

Written for a soft cap (arXiv:2408.00118), which `torch.nn.functional.linear_cross_entropy` does not know. As
tanh(x) = 2 sigmoid(2x) - 1, the sigmoid gives both logit and slope (it is ten times as fast as tanh on CPUs). Capped logits
cannot underflow the softmax, so the logarithm of a probability is exact. Without a cap the logarithm is taken first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from pile_app.model.base import matmul_dtype

CHUNK = 1 << 25  # logits in memory at a time: 64 MiB in bfloat16
BLOCK = 1 << 19  # logits processed in float32 at a time on a CPU: they stay in the cache


def linear_cross_entropy(
    hidden: Tensor, weights: Sequence[Tensor], targets: Tensor, cap: float | None, predict: bool = False, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sum of nats (), nats of each (K,) without gradient, most likely of each (K,) where `predict`), float32 and int64.

    Computes in autocast's type, or in that of `hidden`; sums, exponentials and the gradients of `weights` are float32.

    Args:
        hidden: (K, D).
        weights: rows of the head, (V, D) together. No gradient is computed of those that require none.
        targets: (K,) int64, below V.
        cap: bound of the logits, above 0 and at most 35, or probabilities underflow; None: not bounded.
        predict: find the most likely ones as well.
        compiled: run what follows the product with the head through `torch.compile`, as one pass instead of ten.
    """
    options = (cap, matmul_dtype(hidden), predict, _compiled() if compiled else cross_entropy)
    if torch.is_grad_enabled():
        total, each, predictions = _LinearCrossEntropy.apply(hidden, targets, *weights, options)
    else:
        each, predictions, _ = _by_chunks(hidden, weights, targets, options)
        total = each.sum()
    return total, each, predictions if predict else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *weights, options = rest
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:-1])
        each, predictions, ctx.gradients = _by_chunks(hidden, weights, targets, options, wanted)
        ctx.mark_non_differentiable(each, predictions)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *weights)]
        return each.sum(), each, predictions

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward through linear_cross_entropy twice: its gradients are freed after the first")
        gradients, ctx.gradients = ctx.gradients, None
        gradient = 4 * gradient  # see `cross_entropy`
        scaled = [None if g is None else g.mul_(gradient).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return scaled[0], None, *scaled[1:], None


def _by_chunks(
    hidden: Tensor, weights: Sequence[Tensor], targets: Tensor, options: tuple[Any, ...], wanted: Sequence[bool] = ()
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Nats (K,), predictions (K,) or (0,), float32 gradients of their sum by `hidden` and each of `weights`, where `wanted`."""
    cap, dtype, predict, of_logits = options
    hidden, tables = hidden.detach().to(dtype), [weight.detach().to(dtype) for weight in weights]
    sizes = [len(table) for table in tables]
    rows = max(1, CHUNK // sum(sizes))
    block = max(1, BLOCK // sum(sizes)) if hidden.device.type == "cpu" else rows
    each, predictions, of_hidden = [], [], []
    of_weights: list[Tensor | None] = [None] * len(tables)
    for x, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        if len(tables) == 1:
            logits = x @ tables[0].t()  # (rows, V)
        else:
            logits = x.new_empty(len(x), sum(sizes))
            for part, table in zip(logits.split(sizes, 1), tables, strict=True):
                torch.mm(x, table.t(), out=part)
        if predict:
            predictions.append(logits.argmax(-1))
        pairs = zip(logits.split(block), target.split(block), strict=True)
        each += [of_logits(*pair, cap, any(wanted)) for pair in pairs]
        if not any(wanted):
            continue
        slopes = logits.split(sizes, 1)  # the logits are slopes now
        if wanted[0]:
            of_hidden.append(reduce(torch.add, map(torch.mm, slopes, tables)))
        for index, slope in enumerate(slopes):
            if wanted[1 + index]:
                part, so_far = slope.t() @ x, of_weights[index]
                of_weights[index] = part.float() if so_far is None else so_far.add_(part)
    gradient = torch.cat(of_hidden).float() if of_hidden else None
    return torch.cat(each), torch.cat(predictions) if predict else targets.new_empty(0), [gradient, *of_weights]


def cross_entropy(logits: Tensor, targets: Tensor, cap: float | None, with_gradients: bool) -> Tensor:
    """(rows, V) logits before the cap -> nats (rows,) float32; with gradients, slopes / 4 replace the logits."""
    target = targets[:, None]
    if cap is None:
        log_probabilities = logits.float().log_softmax(1)
        nats = -log_probabilities.gather(1, target).squeeze(1)
        if with_gradients:
            slopes = log_probabilities.exp_().mul_(0.25)
            logits.copy_(slopes.scatter_add_(1, target, torch.full_like(target, -0.25, dtype=slopes.dtype)))
        return nats
    # Six passes over the large tensor.
    sigmoid = logits.float().mul_(2 / cap).sigmoid_()
    capped = torch.add(sigmoid.new_tensor(-cap), sigmoid, alpha=2 * cap)
    probabilities = capped.softmax(1)
    at_target = probabilities.gather(1, target)
    if with_gradients:
        # (softmax - one-hot) · d capped / d logit, the latter being 1 - tanh² = 4 sigmoid (1 - sigmoid)
        probabilities.scatter_(1, target, at_target - 1)
        torch.ops.aten.sigmoid_backward.grad_input(probabilities, sigmoid, grad_input=logits)
    return at_target.log().neg_().squeeze(1)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(cross_entropy, dynamic=True)
