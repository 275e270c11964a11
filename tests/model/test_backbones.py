"""The promises of `model/backbones.py`, for each of them: documents in one row do not see each other, nobody sees ahead, and
the cache changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from pile_app.model.attention import AttentionMask, attend, make_mask
from pile_app.model.backbones import LSTM, RNN, Backbone, Cache, MinGRU, Transformer
from pile_app.model.recurrent import _recur_by_doubling, linear_recurrence

WIDTH = 32
MAKE: dict[str, Callable[[], Backbone]] = {
    "transformer": lambda: Transformer(WIDTH, 3, heads=4),
    "grouped-query": lambda: Transformer(WIDTH, 2, heads=4, key_value_heads=2),
    "multi-query": lambda: Transformer(WIDTH, 2, heads=4, key_value_heads=1),
    "lstm": lambda: LSTM(WIDTH, 2),
    "narrow-embedding": lambda: LSTM(48, 2, embedding_width=WIDTH),
    "rnn": lambda: RNN(WIDTH, 2),
    "mingru": lambda: MinGRU(WIDTH, 2),
}


@pytest.fixture(params=list(MAKE))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Perturbed: as they are made, the blocks of a Transformer are the identity."""
    torch.manual_seed(0)
    backbone = MAKE[request.param]()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return backbone.eval()


def one_document(tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, tokens, dtype=torch.int32), torch.arange(tokens, dtype=torch.int32).expand(batch, -1)


def rows_of(lengths: list[list[tuple[int, int]]], tokens: int) -> tuple[Tensor, Tensor]:
    """document and position (B, T) of rows of (number of the document, its length), the rest padding."""
    document = torch.full((len(lengths), tokens), -1, dtype=torch.int32)
    position = torch.zeros(len(lengths), tokens, dtype=torch.int32)
    for row, pieces in enumerate(lengths):
        place = 0
        for number, length in pieces:
            document[row, place : place + length] = number
            position[row, place : place + length] = torch.arange(length) if number >= 0 else 0
            place += length
    return document, position


# Documents of one token, of a whole row, next to padding in the middle (a bad sample) and at the end; and an empty row.
LAYOUT = [
    [(0, 40), (1, 1), (2, 17), (3, 36)],
    [(0, 96)],
    [(0, 5), (-1, 20), (2, 30), (3, 1)],
    [(0, 1)],
    [],
]


def test_packed_documents_give_what_each_gives_alone(backbone: Backbone) -> None:
    document, position = rows_of(LAYOUT, 96)
    x = torch.randn(len(LAYOUT), 96, WIDTH)
    together = backbone(x, document, position)
    assert together.isfinite().all()
    for row, pieces in enumerate(LAYOUT):
        place = 0
        for number, length in pieces:
            span = slice(place, place + length)
            place += length
            if number >= 0:
                alone = backbone(x[row : row + 1, span], *one_document(length))
                torch.testing.assert_close(together[row, span], alone[0], atol=1e-5, rtol=1e-5)


def test_gradients_of_a_document_do_not_hang_on_its_neighbours(backbone: Backbone) -> None:
    document, position = rows_of(LAYOUT, 96)
    x = torch.randn(len(LAYOUT), 96, WIDTH, requires_grad=True)
    backbone(x, document, position)[0, 41:58].square().mul(torch.rand(backbone.width)).sum().backward()
    assert x.grad is not None
    touched = x.grad.abs().sum(-1) > 0
    assert touched[0, 41:58].all()
    touched[0, 41:58] = False
    assert not touched.any()


def test_no_place_sees_a_later_one(backbone: Backbone) -> None:
    x = torch.randn(2, 24, WIDTH)
    before = backbone(x, *one_document(24, 2))
    for place in (1, 12, 23):
        changed = x.clone()
        changed[:, place:] = torch.randn_like(changed[:, place:])
        after = backbone(changed, *one_document(24, 2))
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-6, rtol=0)
        assert (after[:, place] - before[:, place]).abs().max() > 1e-2


def test_every_place_sees_all_earlier_ones(backbone: Backbone) -> None:
    x = torch.randn(1, 12, WIDTH, requires_grad=True)
    backbone(x, *one_document(12))[0, -1].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 5, 1, 6], [20]])
def test_the_cache_changes_nothing(backbone: Backbone, chunks: list[int]) -> None:
    x = torch.randn(3, 20, WIDTH)
    document, position = one_document(20, 3)
    whole = backbone(x, document, position)
    cache = backbone.new_cache()
    steps = [
        backbone(*(part.contiguous() for part in parts), cache)
        for parts in zip(x.split(chunks, 1), document.split(chunks, 1), position.split(chunks, 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("capacity", [0, 4, 21, 100])
def test_a_cache_of_any_capacity_gives_what_concatenation_gives_to_the_bit(
    backbone: Backbone, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def concatenate(cache: Cache, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        old = cache.layers[layer : layer + 1]
        cache.layers[layer : layer + 1] = [tuple(map(partial(torch.cat, dim=2), zip(*old, new, strict=True)))]
        return cache.layers[layer]

    x, (document, position) = torch.randn(3, 21, WIDTH), one_document(21, 3)

    @torch.no_grad()
    def generate(cache: Cache) -> tuple[Tensor, int]:
        parts = [part.split([4, 2, *[1] * 15], 1) for part in (x, document, position)]
        addresses, outputs = set(), []
        for step in zip(*parts, strict=True):
            outputs.append(backbone(*(part.contiguous() for part in step), cache))
            addresses.add(cache.layers[0][0].data_ptr())
        return torch.cat(outputs, 1), len(addresses)

    reserved, allocations = generate(backbone.new_cache(capacity))
    if isinstance(backbone, Transformer):
        assert allocations == {0: 3, 4: 3, 21: 1, 100: 1}[capacity]
    monkeypatch.setattr(Cache, "append", concatenate)
    assert torch.equal(reserved, generate(backbone.new_cache())[0])


def test_rows_of_a_cache_can_be_chosen(backbone: Backbone) -> None:
    x = torch.randn(4, 10, WIDTH)
    document, position = one_document(10, 4)
    cache = backbone.new_cache()
    backbone(x[:, :9], document[:, :9], position[:, :9], cache)
    rows = torch.tensor([2, 0])
    chosen = backbone(x[rows, 9:], document[rows, 9:], position[rows, 9:], cache.select(rows))
    torch.testing.assert_close(chosen[:, 0], backbone(x, document, position)[rows, 9], atol=1e-5, rtol=1e-5)


class OnGPU(Tensor):
    """Takes the way of a GPU, on the CPU."""

    is_cuda = True


@pytest.mark.parametrize("name", ["lstm", "narrow-embedding", "rnn"])
@pytest.mark.parametrize("layout", [LAYOUT, [[(0, 96)], [(1, 96)]]])
def test_recurrent_backbones_give_the_same_where_finding_documents_would_wait(
    name: str, layout: list[list[tuple[int, int]]]
) -> None:
    torch.manual_seed(0)
    backbone = MAKE[name]()
    document, position = rows_of(layout, 96)
    starts = torch.tensor([0, 96, 192], dtype=torch.int32) if len(layout) == 2 else None
    x, weight = torch.randn(len(layout), 96, WIDTH), torch.randn(len(layout), 96, 1)
    weight[document < 0] = 0
    results = []
    for way in (x, x.as_subclass(OnGPU)):
        y = backbone(way, document, position, None, starts).as_subclass(Tensor) * weight
        results.append([y, *torch.autograd.grad(y.sum(), list(backbone.parameters()))])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_late_positions_do_not_blur_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backbone = Transformer(64, 1, heads=1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    half = copy.deepcopy(backbone).to(dtype)  # as Lightning's `bf16-true`
    x, document, position = torch.randn(1, 64, 64).to(dtype), *one_document(64)
    exact = backbone(x.float(), document, position)
    for first in (0, 1000, 30_000):
        y = half(x, document, position + first).float()  # only distances count
        assert (y - exact).norm() < 0.02 * exact.norm()


def test_every_parameter_is_trained(backbone: Backbone) -> None:
    document, position = rows_of(LAYOUT, 96)
    backbone(torch.randn(len(LAYOUT), 96, WIDTH), document, position).square().mul(torch.rand(backbone.width)).sum().backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not without


def test_one_layer_with_its_own_embedding_width_is_the_textbook_lstm_between_norms() -> None:
    torch.manual_seed(0)
    backbone = LSTM(width=48, layers=1, embedding_width=WIDTH)
    textbook = torch.nn.LSTM(WIDTH, 48, batch_first=True)
    textbook.load_state_dict(backbone.cells[0].state_dict())
    x = torch.randn(2, 24, WIDTH)
    expected, _ = textbook(x / x.square().mean(-1, keepdim=True).sqrt())
    expected = expected / expected.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(backbone(x, *one_document(24, 2)), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="embedding_width >= 1, not 0"):
        LSTM(width=48, layers=1, embedding_width=0)


def test_a_linear_recurrence_is_its_formula_with_its_gradient_by_steps_and_by_doubling() -> None:
    torch.manual_seed(0)
    factor = torch.rand(2, 13, 3, dtype=torch.float64, requires_grad=True)
    new = torch.randn(2, 13, 3, dtype=torch.float64, requires_grad=True)
    state, states = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(13):
        state = factor[:, t] * state + new[:, t]
        states.append(state)
    torch.testing.assert_close(linear_recurrence(factor, new), torch.stack(states, dim=1))
    torch.testing.assert_close(_recur_by_doubling(factor, new), torch.stack(states, dim=1))
    assert torch.autograd.gradcheck(linear_recurrence, (factor, new))


def test_only_training_drops() -> None:
    for make in (Transformer, LSTM, RNN, MinGRU):
        backbone = make(width=32, layers=1, dropout=0.5)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        x, where = torch.randn(1, 8, 32), one_document(8)
        assert not torch.equal(backbone.train()(x, *where), backbone(x, *where))
        assert torch.equal(backbone.eval()(x, *where), backbone(x, *where))


def test_a_transformer_begins_as_the_identity() -> None:
    x = torch.randn(1, 8, WIDTH)
    y = Transformer(WIDTH, 3, heads=4)(x, *one_document(8))
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (WIDTH,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transformer(width=0), "width >= 1"),
        (lambda: LSTM(layers=0), "layers >= 1"),
        (lambda: RNN(dropout=1.0), "dropout"),
        (lambda: RNN(dropout=-0.1), "dropout"),
        (lambda: Transformer(width=32, heads=5), "heads=5 must divide width=32"),
        (lambda: Transformer(width=12, heads=4), "even size"),
        (lambda: Transformer(width=32, heads=0), "heads=0"),
        (lambda: Transformer(width=32, heads=4, key_value_heads=3), "key_value_heads=3 must divide heads=4"),
        (lambda: Transformer(width=32, heads=4, key_value_heads=0), "key_value_heads=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Callable[[], Backbone], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_grouped_queries_take_fewer_parameters_and_context_costs_flops() -> None:
    full, grouped = MAKE["transformer"](), Transformer(WIDTH, 3, heads=4, key_value_heads=1)
    assert full.flops_per_token(0) - grouped.flops_per_token(0) == 2 * 3 * 2 * WIDTH * (WIDTH - WIDTH // 4)
    assert full.flops_per_token(100) - full.flops_per_token(0) == 4 * 3 * WIDTH * 100


@pytest.mark.parametrize(
    "backbone", (Transformer(16, 1, 2), LSTM(16, 1), RNN(16, 1), MinGRU(16, 1)), ids=lambda one: type(one).__name__
)
def test_half_precision_gives_nearly_the_same_hidden_states(backbone: Backbone) -> None:
    document = torch.tensor([[0, 0, 0, 1, 1, -1]])
    position = torch.tensor([[0, 1, 2, 0, 1, 0]])
    x = torch.randn(1, 6, 16)
    exact = backbone(x, document, position)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(x, document, position)
    torch.testing.assert_close(half[:, :5].float(), exact[:, :5], atol=0.05, rtol=0.05)


def skip_without_compiler() -> None:
    """Inductor, the backend that users get, needs a C++ compiler; without one this says so and nothing else is tested."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"torch.compile is NOT tested on this machine, which has no C++ compiler: install g++ ({error})")


@pytest.mark.parametrize(("change", "kind"), [("recompute", Transformer), ("recompute", MinGRU), ("compile", Transformer)])
def test_recomputing_and_compiling_blocks_change_no_gradient(change: str, kind: type[Transformer | MinGRU]) -> None:
    if change == "compile":
        skip_without_compiler()
    document, position = rows_of([[(0, 100), (1, 60)], [(0, 130), (-1, 30)]], 160)
    x = torch.randn(2, 160, WIDTH)
    gradients = []
    for changed in (False, True):
        torch.manual_seed(0)
        backbone = kind(WIDTH, 2 if change == "recompute" else 1, dropout=0.1)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        if changed and change == "recompute":
            backbone.recompute = True
        elif changed:
            backbone.compile_blocks()
        torch.manual_seed(1)
        with inductor_config.patch(compile_threads=1, fallback_random=True):  # dropout as without compiling
            backbone(x, document, position).square().mul(torch.rand(WIDTH)).sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-4, rtol=1e-4)


def test_nothing_is_compiled_where_it_gains_nothing() -> None:
    with pytest.raises(ValueError, match=r"model\.compile.*LSTM"):
        LSTM(WIDTH, 1).compile_blocks()


@pytest.mark.parametrize("tokens", [96, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_blocks_is_attention_with_a_mask(tokens: int, dtype: torch.dtype) -> None:
    pieces = [[(0, tokens)], [(0, tokens // 3), (-1, 40), (1, tokens - 40 - tokens // 3)], [(0, 130), (1, 20)]]
    document, position = rows_of([row if sum(n for _, n in row) <= tokens else [] for row in pieces], tokens)
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, tokens, 16, requires_grad=True) for heads in (4, 2, 2))
    weight = torch.randn(3, 4, tokens, 16)
    seen = document >= 0
    results = []
    for mask in (
        AttentionMask(mask=(document[:, :, None] == document[:, None, :]).tril()[:, None]),
        make_mask(document, position, None, dtype, 16),
    ):
        kind = torch.float32 if mask.mask is not None else dtype
        y = attend(query.to(kind), key.to(kind), value.to(kind), mask, scale=0.3).float()
        y = y * seen[:, None, :, None]
        results.append([y, *torch.autograd.grad((y * weight).sum(), (query, key, value))])
    for own, expected in zip(results[1], results[0], strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
        assert (own - expected).norm() < 0.01 * expected.norm()
