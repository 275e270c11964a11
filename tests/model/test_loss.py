"""The promises of `model/loss.py`: it is plain cross-entropy of capped logits, in value and gradient, with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pile_app.model import loss
from pile_app.model.loss import linear_cross_entropy

CAP = 15.0


def example(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (37, 16), weight (11, 16), targets (37,)."""
    torch.manual_seed(0)
    hidden = (scale * torch.randn(37, 16)).requires_grad_()
    return hidden, torch.randn(11, 16, requires_grad=True), torch.randint(11, (37,))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = CAP * torch.tanh(F.linear(hidden, weight).float() / CAP)
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("rows", [1, 5, 37, 1000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_values_and_gradients_are_those_of_plain_cross_entropy(
    rows: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", rows * 11)
    hidden, weight, targets = example(scale)
    expected = plain(hidden, weight, targets)
    gradients = torch.autograd.grad(0.3 * expected.sum(), (hidden, weight))
    total, each, predictions = linear_cross_entropy(hidden, [weight], targets, CAP)
    torch.testing.assert_close(each, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total, expected.sum(), atol=1e-4, rtol=1e-5)
    assert predictions is None and not each.requires_grad
    for own, wanted in zip(torch.autograd.grad(0.3 * total, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_head_in_two_parts_of_which_one_is_frozen(frozen: int, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 8 * 11)
    hidden, weight, targets = example()
    whole, each, _ = linear_cross_entropy(hidden, [weight], targets, cap)
    of_hidden, of_weight = torch.autograd.grad(whole, (hidden, weight))
    parts = [part.detach().requires_grad_() for part in weight.split([3, 8])]
    parts[frozen].requires_grad_(False)
    total, same, _ = linear_cross_entropy(hidden, parts, targets, cap)
    total.backward()
    torch.testing.assert_close(same, each)
    torch.testing.assert_close(hidden.grad, of_hidden)
    torch.testing.assert_close(parts[1 - frozen].grad, of_weight.split([3, 8])[1 - frozen])
    assert parts[frozen].grad is None


def test_half_precision_is_as_near_to_the_truth_as_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 8 * 11)
    hidden, weight, targets = example()
    truth = torch.autograd.grad(plain(hidden, weight, targets).sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        expected, total = plain(hidden, weight, targets).sum(), linear_cross_entropy(hidden, [weight], targets, CAP)[0]
    assert total.dtype == torch.float32
    plainly, chunked = (torch.autograd.grad(value, (hidden, weight)) for value in (expected, total))
    for own, other, exact in zip(chunked, plainly, truth, strict=True):
        assert own.dtype == torch.float32
        assert (own - exact).norm() < 1.2 * (other - exact).norm() < 0.02 * exact.norm()


def test_predictions_and_nats_are_the_same_without_gradients() -> None:
    hidden, weight, targets = example()
    _, each, predictions = linear_cross_entropy(hidden, [weight], targets, CAP, predict=True)
    assert torch.equal(predictions, F.linear(hidden, weight).argmax(-1))  # type: ignore[arg-type]
    with torch.no_grad():
        total, alone, same = linear_cross_entropy(hidden, [weight], targets, CAP, predict=True)
    assert torch.equal(alone, each) and torch.equal(same, predictions)  # type: ignore[arg-type]
    assert not total.requires_grad


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets = example()
    total = linear_cross_entropy(hidden, [weight], targets, CAP)[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        total.backward()


def test_six_passes_over_the_logits() -> None:
    passes: list[str] = []

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            if isinstance(out, Tensor) and out.shape == (37, 11) and not func.is_view:
                passes.append(str(func))
            return out

    hidden, weight, targets = example()
    with Passes():
        linear_cross_entropy(hidden, [weight], targets, CAP)
    assert len(passes) == 1 + 6, passes  # one writes one element a row


def test_compiled_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the C++ compiler, which takes a minute: the trace is the same."""
    compiled = torch.compile(loss.cross_entropy, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(loss, "_compiled", lambda: compiled)
    monkeypatch.setattr(loss, "CHUNK", 5 * 11)
    results = []
    for is_compiled in (False, True):
        hidden, weight, targets = example()
        total, each, _ = linear_cross_entropy(hidden, [weight], targets, CAP, compiled=is_compiled)
        results.append([each, *torch.autograd.grad(total, (hidden, weight))])
    for plain_value, value in zip(*results, strict=True):
        torch.testing.assert_close(value, plain_value, atol=1e-5, rtol=1e-5)
