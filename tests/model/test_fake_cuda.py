"""The forward pass on a GPU, traced on fake CUDA tensors, which need none: every tensor is on the device, types fit, and
nothing waits for the device (`nonzero`, `item` and branches on values raise)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import READERS
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pile_app.data.annotation import Annotator
from pile_app.data.assembly import assemble, whole
from pile_app.data.batch import Batch
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.model import attention, generate
from pile_app.model.backbones import LSTM, RNN, Backbone, MinGRU, Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Decoder, Sampling
from pile_app.model.segments import segment_length
from pile_app.tasks.classification import Classification
from pile_app.tasks.retrieval import Contrastive
from pile_app.tasks.tagging import Span, Tagging
from pile_app.training.objective import Objective
from pile_app.training.plan import run_backward
from pile_app.vocabulary import Vocabulary

MakeModel = Callable[..., FusedLanguageModel]
MakeSegment = Callable[..., Segment]
HALF = {"bf16": torch.bfloat16, "16": torch.float16}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
HOPPER, TURING = (9, 0), (7, 5)
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "transformer": lambda: Transformer(32, 2, heads=4),
    "grouped-query": lambda: Transformer(32, 2, heads=4, key_value_heads=2),
    "odd-heads": lambda: Transformer(36, 2, heads=3, key_value_heads=1),
    "lstm": lambda: LSTM(32, 2),
    "narrow-embedding": lambda: LSTM(32, 2, embedding_width=24),
    "rnn": lambda: RNN(32, 2),
    "mingru": lambda: MinGRU(32, 2),
}


@contextmanager
def fake_cuda(precision: str = "32-true", capability: tuple[int, int] = HOPPER) -> Iterator[None]:
    """Tensors made here are fake tensors on a GPU of this capability, with Lightning's `precision`."""
    half = HALF.get(precision.partition("-")[0])
    with (
        patch("torch.cuda.get_device_capability", lambda device=None: capability),
        torch.backends.cudnn.flags(enabled=False),  # it asks the driver
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device("cuda"),
    ):
        # `torch.autocast` turns itself off without a GPU.
        torch.set_autocast_enabled("cuda", half is not None and precision.endswith("mixed"))
        torch.set_autocast_dtype("cuda", half or torch.float16)
        torch.set_default_dtype(half if half and precision.endswith("true") else torch.float32)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
            torch.set_default_dtype(torch.float32)
            torch.clear_autocast_cache()


def check(*tensors: Tensor) -> None:
    assert tensors and all(tensor.device.type == "cuda" for tensor in tensors)


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """document, position (2, 10) and piece_starts (4,) of rows of 4 + 6 and of 10 tokens."""
    lengths = (4, 6, 10)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths), output_size=20).view(2, 10)
    position = torch.cat([torch.arange(length) for length in lengths]).view(2, 10)
    return document, position, torch.tensor([0, 4, 10, 20], dtype=torch.int32)


def test_what_waits_for_the_device_raises() -> None:
    with fake_cuda(), pytest.raises(DataDependentOutputException):
        int(torch.ones(2).sum())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("capability", [HOPPER, TURING])
def test_packed_documents(name: str, precision: str, capability: tuple[int, int]) -> None:
    with fake_cuda(precision, capability):
        backbone = BACKBONES[name]()
        x = torch.randn(2, 10, backbone.embedding_width)
        for starts in (packed()[2], None, torch.tensor([0, 10, 20], dtype=torch.int32)):
            check(backbone(x, *packed()[:2], None, starts))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BACKBONES)
def test_generation_with_a_cache(name: str, precision: str) -> None:
    with fake_cuda(precision), torch.no_grad():
        backbone = BACKBONES[name]().eval()
        cache = backbone.new_cache(capacity=6)
        x, position = torch.randn(3, 10, backbone.embedding_width), torch.arange(10).expand(3, -1)
        for first, stop in ((0, 4), (4, 5), (5, 6), (6, 8), (8, 9)):
            steps = slice(first, stop)
            check(backbone(x[:, steps], torch.zeros_like(position[:, steps]), position[:, steps], cache))
        cache = cache.select(torch.tensor([2, 0]))
        check(backbone(x[:2, 9:], torch.zeros(2, 1, dtype=torch.int64), position[:2, 9:], cache))


class Operations(TorchDispatchMode):
    """Records (name, elements) of what each operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [(str(func), x.numel()) for x in tree_leaves(out) if isinstance(x, Tensor) and not func.is_view]
        return out


@pytest.mark.parametrize(
    ("backbone", "guidance", "dtype"),
    [("transformer", 1.0, torch.float16), ("transformer", 2.0, torch.bfloat16), ("transformer", 1.0, None),
     ("lstm", 1.0, torch.bfloat16), ("mingru", 2.0, torch.bfloat16)],
)  # fmt: skip
def test_a_token_is_generated_without_waiting_copying_weights_or_growing(
    tiny_model: MakeModel, backbone: str, guidance: float, dtype: torch.dtype | None
) -> None:
    model = tiny_model(backbone)
    model.autocast_dtype = dtype
    tokens, looks, counts = 10, [], []

    def look(self: Tensor) -> list[list[int]]:
        looks.append(self.shape)
        return [[Vocabulary.SPECIALS] * self.size(1)] * self.size(0)

    with fake_cuda(), patch.object(FakeTensor, "tolist", look), patch.object(generate, "CHECK_EVERY", 4):
        model.to_empty(device="cuda")
        with model.inference():
            context = [(*[torch.zeros(3, 5, dtype=torch.int64)] * 2, None)] * (1 + (guidance != 1))
            decoder = Decoder(model, context, tokens, guidance, indices=range(3))
            hidden, buffers = model.hidden, []

            def record(*arguments: Any) -> Tensor:
                counts.append(Counter(name for name, size in operations.seen))
                buffers.append([id(tensor) for cache in decoder.caches for layer in cache.layers for tensor in layer])
                largest.append(max((size for _, size in operations.seen), default=0))
                operations.seen.clear()
                return hidden(*arguments)

            largest: list[int] = []
            with patch.object(model, "hidden", record), Operations() as operations:
                for _ in decoder.write(TEXT, Sampling(max_text=tokens)):
                    raise AssertionError("a batch is not streamed")
    assert looks == [(3, 4), (3, 4), (3, 2)]
    step = len(context)
    assert counts[3 * step] == counts[-step], "the work of a token does not change"
    assert max(largest[2 * step :]) < model.heads[TEXT].weight.numel(), "no table is computed for a token"
    for cache in decoder.caches:
        for layer in cache.layers:
            if backbone == "transformer":
                assert all(t.dtype == (dtype or torch.float32) and t.size(2) == 5 + tokens for t in layer)
    if backbone == "transformer":
        assert buffers[2 * step] == buffers[-1]


@pytest.mark.parametrize("backbone", ["transformer", "lstm", "rnn", "mingru"])
def test_codecs_compute_in_float32_without_tf32(tiny_model: MakeModel, backbone: str) -> None:
    model, seen = tiny_model(backbone), []
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]

    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "conv" in str(func) or "mm" in str(func):
                seen.append((args[0].dtype, *(flag.fp32_precision for flag in flags)))
            return func(*args, **(kwargs or {}))

    with fake_cuda("bf16-mixed"):
        model.to_empty(device="cuda")
        image, audio = model.codecs[IMAGE], model.codecs[AUDIO]
        pixels, samples, lengths = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(5, 320), torch.tensor([2, 3])
        with Precisions():
            image.loss(pixels), image.decode(image.encode(pixels))
            audio.loss(samples, lengths), audio.decode(audio.encode(samples, lengths), lengths)
    assert set(seen) == {(torch.float32, "ieee", "ieee")} and len(seen) > 20
    assert before == [flag.fp32_precision for flag in flags]


@pytest.mark.parametrize(
    ("dtype", "head_width", "capability", "expected"),
    [
        (torch.bfloat16, 64, (9, 0), True),
        (torch.float16, 64, (8, 0), True),
        (torch.float16, 64, (7, 5), False),  # T4
        (torch.float16, 64, (7, 0), False),  # V100
        (torch.float16, 12, (9, 0), False),
        (torch.float16, 264, (9, 0), False),
        (torch.float32, 64, (9, 0), False),
    ],
)
def test_flash_attention_runs_where_it_can(
    dtype: torch.dtype, head_width: int, capability: tuple[int, int], expected: bool
) -> None:
    with fake_cuda(capability=capability):
        document, position, starts = packed()
        mask = attention.make_mask(document, position, starts, dtype, head_width)
        assert (mask.starts is not None) == expected == (mask.mask is None)


def test_flash_attention_groups_queries_where_torch_can() -> None:
    def torch_2_11(query: Tensor, key: Tensor, value: Tensor, *lengths: object, **options: object) -> Tensor:
        given.append(key.size(1))
        return query

    def torch_2_12(query: Tensor, key: Tensor, value: Tensor, *lengths: object, enable_gqa: bool, **options: object) -> Tensor:
        assert enable_gqa
        return torch_2_11(query, key, value)

    given: list[int] = []
    with fake_cuda():
        query, key, mask = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8), attention.AttentionMask(starts=packed()[2])
        for version in (torch_2_11, torch_2_12):
            with patch("torch.nn.attention.varlen.varlen_attn", version):
                assert attention.attend(query, key, key, mask, 1.0).shape == query.shape
    assert given == [4, 2]


@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed", "16-mixed"))
@pytest.mark.parametrize("backbone", ["transformer", "lstm", "rnn", "mingru"])
def test_codecs_and_loss_of_a_batch(
    tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment, backbone: str, precision: str
) -> None:
    model = tiny_model(backbone, readers=READERS).train()
    with fake_cuda(precision):
        model.to_empty(device="cuda")
        model.word_dropout = model.code_dropout = 0.1
        batch = batch_of(
            model, [[Segment("three"), image(0), sound(0)], [given(sound(1, 300)), given(image(1)), Segment("said")]]
        )
        check(*model.codec_loss(batch, 2).values(), *model.codec_loss(batch).values())
        losses = model(batch, predict=True)
        assert losses.keys() == {TEXT, IMAGE, AUDIO}
        for loss in losses.values():
            check(loss.total, loss.each, loss.targets, loss.predictions)
            assert loss.total.dtype == torch.float32
        with torch.no_grad():
            check(*(loss.total for loss in model(batch).values()))


def given(segment: Segment) -> Segment:
    return replace(segment, loss=False)


def test_codes_become_media(tiny_model: MakeModel) -> None:
    model = tiny_model()
    with fake_cuda():
        model.to_empty(device="cuda")
        image, audio = model.codecs[IMAGE], model.codecs[AUDIO]
        check(image.decode(torch.zeros(2, 4, dtype=torch.int64)))
        check(audio.decode(torch.zeros(5, dtype=torch.int64), torch.tensor([2, 3])))


def batch_of(model: FusedLanguageModel, rows: list[list[Segment]], annotator: Annotator | None = None, **meta: object) -> Batch:
    documents = [Document(tuple(row), str(n), meta=meta) for n, row in enumerate(rows)]
    lengths = [2 + sum(segment_length(model, segment) for segment in row) for row in rows]
    pack = [whole(document, length) for document, length in zip(documents, lengths, strict=True)]
    batch = assemble([pack], model.vocabulary, model.tokenizer, sum(lengths) + 3, annotator=annotator)
    assert not batch.rejected
    return batch.to("cuda")


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "classification": lambda: Classification(["yes", "no"], pooling=["mean", "max", "deviation", "last"], class_weights=[1, 2]),
    "language-head": lambda: Classification(["yes", "no"], head="language", class_weights="balanced"),
    "label-text": lambda: Classification(["yes", "yesterday", "no"], head="language"),
    "retrieval": Contrastive,
    "tagging": lambda: Tagging(["person"]),
}


@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed", "16-mixed"))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_and_backward_of_objectives(
    tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment, name: str, precision: str
) -> None:
    model, objective = tiny_model(readers=READERS).train(), OBJECTIVES[name]().train()
    objective.build(model)
    with fake_cuda(precision):
        model.to_empty(device="cuda")
        objective.to_empty(device="cuda")
        if name == "tagging":
            rows, meta = [[Segment("Ada reads")]], {"spans": [Span(0, 3, "person")]}
        else:
            rows, meta = [[Segment("one"), image(0), Segment("yes")], [sound(0), Segment("no")]], {}
        batch = batch_of(model, rows, objective.annotator, **meta)
        loss = objective(model, objective.read(model, batch)[1], batch)
        check(loss)
        run_backward(loss)
        reached = {**dict(model.backbone.named_parameters()), **dict(objective.named_parameters())}
        gradients = [p.grad for p in reached.values() if p.grad is not None]
        check(*gradients)
        assert len(gradients) == len(reached) and all(gradient.dtype == torch.float32 for gradient in gradients)
