"""Recurrent backbones: LSTM, RNN and MinGRU, residual and pre-norm like the Transformer. See `backbones.py` for the interface.

The state starts at zero at every document. On a CPU, LSTM and RNN take documents as rows of their own, in groups of about a
length; on a GPU that would wait for the device, so rows that hold several documents go step by step. MinGRU forgets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pile_app.model.base import Backbone, Cache, initialize_block, norm


class _Recurrent(Backbone):
    """Stack of recurrent cells: `x + cell(norm(x))`, without `x` in a first cell whose input has another width.

    Args:
        width: D, also the size of each cell's state.
        layers: number of cells.
        dropout: see `Backbone`.
        embedding_width: size of the token vectors; null: D.
    """

    cell: type[nn.LSTM] | type[nn.RNN]
    step: Callable[..., tuple[Tensor, ...]]  # of one token

    def __init__(self, width: int = 184, layers: int = 3, dropout: float = 0.0, embedding_width: int | None = None) -> None:
        super().__init__(width, layers, dropout)
        if embedding_width is not None and embedding_width < 1:
            raise ValueError(f"a backbone needs embedding_width >= 1, not {embedding_width}")
        self.embedding_width = embedding_width or width
        sizes = [self.embedding_width, *[width] * (layers - 1)]
        self.cells = nn.ModuleList(self.cell(size, width, batch_first=True) for size in sizes)
        self.drop = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for cell in self.cells:
            if isinstance(cell, nn.LSTM):  # remember by default (Jozefowicz et al. 2015)
                nn.init.ones_(cell.get_parameter("bias_ih_l0")[self.width : 2 * self.width])

    def forward(
        self, x: Tensor, document: Tensor, position: Tensor, cache: Cache | None = None, piece_starts: Tensor | None = None
    ) -> Tensor:
        if cache is not None or x.is_cuda:
            is_whole = cache is not None or (piece_starts is not None and len(piece_starts) == len(x) + 1)
            return self._stack(x, cache, None if is_whole else position != 0)
        flat = x.flatten(0, 1)  # (B * T, D)
        out = flat.new_zeros(len(flat), self.width)
        for indices, inside in _document_rows(document, position):
            rows = self._stack(flat[indices])  # (documents, longest, D); the rest of a row is not used
            out = out.index_put((indices[inside],), rows[inside].to(out.dtype))  # rows: autocast's type
        return out.view(*x.shape[:2], self.width)  # (B, T, D)

    def _stack(self, x: Tensor, cache: Cache | None = None, continues: Tensor | None = None) -> Tensor:
        """`continues`: (B, T) False where a document begins; None: rows hold one document each."""
        for index, cell in enumerate(self.cells):
            if continues is not None:
                y = self.run(partial(self._by_steps, cell), norm(x), continues)
            else:
                state = cache.layers[index] if cache is not None and index < len(cache.layers) else None
                y, state = self.run(cell, norm(x), state[0] if state and len(state) == 1 else state)
                if cache is not None:
                    cache.layers[index : index + 1] = [state if isinstance(state, tuple) else (state,)]
            x = x + self.drop(y) if x.size(-1) == self.width else self.drop(y)
        return norm(x)

    def _by_steps(self, cell: Any, x: Tensor, continues: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, width) of a cell whose state is set to zero where a document begins."""
        state: tuple[Tensor, ...] = (x.new_zeros(len(x), self.width),) * (1 + isinstance(cell, nn.LSTM))
        outputs = []
        for now, kept in zip(x.unbind(1), continues[..., None].unbind(1), strict=True):
            state = self.step(now, tuple(part * kept for part in state), *cell.all_weights[0])
            outputs.append(state[0])
        return torch.stack(outputs, 1)


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), residual and pre-norm."""

    cell = nn.LSTM
    step = staticmethod(torch.lstm_cell)
    # On x86 CPUs without AVX-512 torch's own fails under autocast ("could not create a primitive descriptor"): float32 there.
    autocast_on_cpu: bool = torch.cpu.get_capabilities().get("avx512_bw", True)

    def run(self, block: Callable[..., Any], *arguments: Any) -> Any:
        x, state = arguments
        if self.autocast_on_cpu or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().run(block, x, state)
        with torch.autocast("cpu", enabled=False):
            return super().run(block, x.float(), state and tuple(part.float() for part in state))


class RNN(_Recurrent):
    """Recurrent net with tanh (Elman 1990), residual and pre-norm."""

    cell = nn.RNN
    step = staticmethod(lambda x, state, *weights: (torch.rnn_tanh_cell(x, state[0], *weights),))


class MinGRU(Backbone):
    """Gated linear recurrence: minGRU (arXiv:2410.01201) with the short convolution of Griffin (arXiv:2402.19427), residual and
    pre-norm, each cell followed by a feed-forward net as in a Transformer.

        y   = norm(x);  c = convolution(y), each channel over its last `CONVOLUTION` tokens
        f_t = sigmoid(F c_t + bias);  h_t = f_t h_{t-1} + (1 - f_t) Z c_t
        x   = x + O norm(h)

    Gates do not depend on the state before, so every matrix product is over all tokens at once. A document begins with f = 0.

    Args:
        width: D.
        layers: number of blocks.
        feed_forward: width of the feed-forward net as a multiple of D.
        dropout: see `Backbone`.
    """

    def __init__(self, width: int = 128, layers: int = 4, feed_forward: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__(width, layers, dropout)
        if not feed_forward > 0:
            raise ValueError(f"backbone feed_forward={feed_forward} must be above 0")
        self.blocks = nn.ModuleList(_MinGRUBlock(width, int(feed_forward * width), dropout) for _ in range(layers))

    def forward(
        self, x: Tensor, document: Tensor, position: Tensor, cache: Cache | None = None, piece_starts: Tensor | None = None
    ) -> Tensor:
        indices = position[..., None]  # (B, T, 1)
        for number, block in enumerate(self.blocks):
            x = self.run(block, x, indices, number, cache)
        return norm(x)


class _MinGRUBlock(nn.Module):
    CONVOLUTION = 4

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.forget = nn.Linear(width, width, bias=False)
        self.candidate = nn.Linear(width, width, bias=False)
        self.recurrence_out = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)
        self.forget_bias = nn.Parameter(torch.empty(width))
        self.taps = nn.Parameter(torch.empty(self.CONVOLUTION, width))  # of this token, the one before, ...
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        initialize_block([self.forget, self.candidate, self.expand], [self.recurrence_out, self.contract])
        # Half-lives of half a token to a hundred, spread over the channels.
        self.forget_bias.copy_(torch.linspace(-1.0, 5.0, len(self.forget_bias)))
        self.taps.zero_()[0] = 1

    def forward(self, x: Tensor, indices: Tensor, number: int, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.recur(norm(x), indices, number, cache))
        return x + self.dropout(self.contract(F.relu(self.expand(norm(x))).square()))

    def recur(self, y: Tensor, indices: Tensor, number: int, cache: Cache | None) -> Tensor:
        """y: (B, T, D); indices: (B, T, 1) position in the document."""
        state, past = cache.layers[number] if cache is not None and number < len(cache.layers) else (None, None)
        before = self.CONVOLUTION - 1
        extended = F.pad(y, (0, 0, before, 0)) if past is None else torch.cat([past.transpose(0, 1), y], dim=1)
        convolved = y * self.taps[0]
        for tap in range(1, self.CONVOLUTION):
            earlier = extended[:, before - tap : extended.size(1) - tap]
            convolved = torch.addcmul(convolved, earlier * (indices >= tap), self.taps[tap])
        forget = torch.sigmoid(self.forget(convolved).float() + self.forget_bias)
        new = (1 - forget) * self.candidate(convolved).float()
        forget = forget * (indices > 0)  # documents start from zero
        if state is not None:
            new[:, 0].addcmul_(forget[:, 0], state[0])
        hidden = linear_recurrence(forget, new)
        if cache is not None:
            past = extended[:, extended.size(1) - before :].transpose(0, 1)  # (CONVOLUTION - 1, B, D)
            cache.layers[number : number + 1] = [(hidden[None, :, -1], past)]
        return self.recurrence_out(norm(hidden).to(y.dtype))


class _LinearRecurrence(torch.autograd.Function):
    """h_t = factor_t h_{t-1} + new_t, h before the first is zero (`factor_0` is not read). All (B, T, D), float32.

    The gradient of a linear recurrence is a linear recurrence from the last token to the first.
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor, new: Tensor) -> Tensor:
        hidden = _recur(factor, new)
        ctx.save_for_backward(factor, hidden)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        factor, hidden = ctx.saved_tensors
        later = F.pad(factor[:, 1:], (0, 0, 0, 1)).flip(1)
        of_new = _recur(later, gradient.flip(1)).flip(1)
        return of_new * F.pad(hidden[:, :-1], (0, 0, 1, 0)), of_new


linear_recurrence: Callable[[Tensor, Tensor], Tensor] = _LinearRecurrence.apply


def _recur(factor: Tensor, new: Tensor) -> Tensor:
    """Step by step on a CPU: 0.2 ms for (32, 64, 128), an eighth of what doubling takes, which needs fewer kernels on a GPU."""
    if new.device.type != "cpu":
        return _recur_by_doubling(factor, new)
    hidden = torch.empty_like(new)
    hidden[:, 0] = new[:, 0]
    factors, news, states = factor.unbind(1), new.unbind(1), hidden.unbind(1)
    for t in range(1, len(states)):
        torch.addcmul(news[t], factors[t], states[t - 1], out=states[t])
    return hidden


def _recur_by_doubling(factor: Tensor, new: Tensor) -> Tensor:
    """In log2 T rounds (Hillis and Steele 1986): `new` then sums up `reach` tokens, `factor` is their product."""
    reach = 1
    while reach < new.size(1):
        summed = torch.addcmul(new[:, reach:], factor[:, reach:], new[:, :-reach])
        new = torch.cat([new[:, :reach], summed], dim=1)
        factor = torch.cat([factor[:, :reach], factor[:, reach:] * factor[:, :-reach]], dim=1)
        reach *= 2
    return new


def _document_rows(document: Tensor, position: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(indices, inside) of documents as rows, grouped by length so that little is padded; twice as fast as `PackedSequence`.

    indices: (documents, longest) flat indices into (B * T); inside: the same shape, False past the end of a document.
    """
    flat = document.flatten()
    starts = ((position.flatten() == 0) & (flat >= 0)).nonzero().squeeze(1)
    same = (document[:, 1:] == document[:, :-1]) & (position[:, 1:] != 0)
    ends = F.pad(~same, (0, 1), value=True).flatten() & (flat >= 0)
    lengths = ends.nonzero().squeeze(1) - starts + 1
    bounds = [int(lengths.max()) if len(lengths) else 0]
    while bounds[0] > 32:
        bounds.insert(0, bounds[0] // 2)
    groups = []
    for lower, upper in pairwise([0, *bounds]):
        chosen = (lengths > lower) & (lengths <= upper)
        if chosen.any():
            start, length = starts[chosen], lengths[chosen]
            steps = torch.arange(int(length.max()), device=document.device)
            inside = steps < length[:, None]
            groups.append((torch.where(inside, start[:, None] + steps, start[:, None]), inside))
    return groups
