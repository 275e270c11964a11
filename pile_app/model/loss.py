"""Cross-entropy of a linear head whose logits are never whole in memory.

    hidden (K, D), weight (V, D), targets (K,) -> sum of -log softmax(cap · tanh(hidden @ weightᵀ / cap))[target], nats of each

The K x V logits are computed for some rows at a time, and with them, still in the forward pass, the gradients of hidden and
weight (as in Liger, arXiv:2410.10989), which backward multiplies by the gradient of the sum. No logit is computed twice.

Written for a soft cap (arXiv:2408.00118), which `torch.nn.functional.linear_cross_entropy` does not know. As
tanh(x) = 2 sigmoid(2x) - 1, the sigmoid gives both logit and slope (it is ten times as fast as tanh on CPUs). Capped logits
cannot underflow the softmax, so the logarithm of a probability is exact. Without a cap the logarithm is taken first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pile_app.model.base import matmul_dtype

CHUNK = 1 << 25  # logits in memory at a time: 64 MiB in bfloat16
BLOCK = 1 << 19  # logits processed in float32 at a time on a CPU: they stay in the cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, predict: bool = False, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sum of nats (), nats of each (K,) without gradient, most likely of each (K,) where `predict`), float32 and int64.

    Computes in autocast's type, or in that of `hidden`; sums, exponentials and the gradient of `weight` are float32.

    Args:
        hidden: (K, D).
        weight: (V, D) of the head.
        targets: (K,) int64, below V.
        cap: bound of the logits, above 0 and at most 35, or probabilities underflow; None: not bounded.
        predict: find the most likely ones as well.
        compiled: run what follows the product with the head through `torch.compile`, as one pass instead of ten.
    """
    options = (cap, matmul_dtype(hidden), predict, _compiled() if compiled else cross_entropy)
    if torch.is_grad_enabled():
        total, each, predictions = _LinearCrossEntropy.apply(hidden, weight, targets, options)
    else:
        each, predictions, _, _ = _by_chunks(hidden, weight, targets, options, with_gradients=False)
        total = each.sum()
    return total, each, predictions if predict else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        each, predictions, *gradients = _by_chunks(hidden, weight, targets, options, with_gradients=True)
        ctx.mark_non_differentiable(each, predictions)
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        ctx.dtypes = hidden.dtype, weight.dtype
        return each.sum(), each, predictions

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward through linear_cross_entropy twice: its gradients are freed after the first")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        gradient = 4 * gradient  # see `cross_entropy`
        hidden_dtype, weight_dtype = ctx.dtypes
        return (of_hidden * gradient).to(hidden_dtype), of_weight.mul_(gradient).to(weight_dtype), None, None


def _by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: tuple[Any, ...], with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Nats (K,), predictions (K,) or (0,), gradients of their sum by hidden (K, D) and weight (V, D), float32."""
    cap, dtype, predict, of_logits = options
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    rows = max(1, CHUNK // len(weight))
    block = max(1, BLOCK // len(weight)) if weight.device.type == "cpu" else rows
    each, predictions, of_hidden = [], [], []
    of_weight: Tensor | None = None
    for x, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = x @ weight.t()  # (rows, V)
        if predict:
            predictions.append(logits.argmax(-1))
        pairs = zip(logits.split(block), target.split(block), strict=True)
        each += [of_logits(*pair, cap, with_gradients) for pair in pairs]
        if with_gradients:  # the logits are slopes now
            of_hidden.append(logits @ weight)
            part = logits.t() @ x
            of_weight = part.float() if of_weight is None else of_weight.add_(part)
    gradients = (torch.cat(of_hidden).float(), of_weight) if with_gradients else (None, None)
    return torch.cat(each), torch.cat(predictions) if predict else targets.new_empty(0), *gradients


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
