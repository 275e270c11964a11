"""The promises of `model/fused.py`: an exact likelihood over text, images and sound, however documents are packed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pile_app.data.assembly import PackedDocument, assemble, whole
from pile_app.data.batch import Batch
from pile_app.data.order import Piece
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Document, Segment
from pile_app.media import audio_size
from pile_app.model.base import LOGIT_CAP
from pile_app.model.fused import FactoredTable, FusedLanguageModel

MakeModel = Callable[..., FusedLanguageModel]
MakeSegment = Callable[..., Segment]
BACKBONES = ("transformer", "lstm", "rnn", "mingru")


@pytest.fixture
def documents(image: MakeSegment, sound: MakeSegment) -> list[Document]:
    return [
        Document((Segment("three"), image(0), sound(0)), "all"),
        Document((Segment("only a text"),), "text"),
        Document((image(1),), "image"),
        Document((sound(1, 300), Segment("what was said")), "transcript"),
        Document((image(2), image(3)), "images"),
    ]


def length_of(model: FusedLanguageModel, document: Document) -> int:
    length = 2
    for segment in document.segments:
        size = audio_size(segment.file) if segment.modality == AUDIO else (len(segment.data), 0)
        length += model.vocabulary.segment_tokens(segment.modality, *size)
    return length


def batch_of(model: FusedLanguageModel, rows: Sequence[Sequence[Document | BadSample]], context: int) -> Batch:
    packs = [
        [
            whole(document, length_of(model, document))
            if isinstance(document, Document)
            else PackedDocument(Piece(0, 0, 0, 0, 10, True), "bad", document)
            for document in row
        ]
        for row in rows
    ]
    return assemble(packs, model.vocabulary, model.tokenizer, context)


def losses_by_place(model: FusedLanguageModel, batch: Batch) -> dict[tuple[int, int], float]:
    """(modality, flat index) -> nats."""
    losses = model(batch)
    return {
        (modality, place): nats
        for modality, loss in losses.items()
        for place, nats in zip(batch.targets[modality].tolist(), loss.each.tolist(), strict=True)
    }


def test_untrained_the_loss_is_the_logarithm_of_each_slice(tiny_model: MakeModel, documents: list[Document]) -> None:
    model = tiny_model(perturbed=False)
    losses = model(batch_of(model, [documents], 160))
    sizes = {TEXT: 6 + 256, IMAGE: 4 * 3, AUDIO: 4 * 3 * 3 + 1}
    for modality, size in sizes.items():
        torch.testing.assert_close(losses[modality].each, torch.full_like(losses[modality].each, math.log(size)))
        torch.testing.assert_close(losses[modality].total, losses[modality].each.sum())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_loss_of_a_document_is_the_same_packed_and_alone(
    tiny_model: MakeModel, documents: list[Document], backbone: str
) -> None:
    model = tiny_model(backbone)
    first, second = documents[:3], [documents[3], BadSample("checksum", "rotten"), documents[4]]
    packed = losses_by_place(model, batch_of(model, [first, second, []], 128))
    alone: dict[tuple[int, int], float] = {}
    for row, content in enumerate([first, second]):
        offset = 128 * row
        for document in content:
            if isinstance(document, BadSample):
                offset += 10
                continue
            length = length_of(model, document)
            own = losses_by_place(model, batch_of(model, [[document]], length))
            assert len(own) == length - 1
            alone |= {(modality, place + offset): nats for (modality, place), nats in own.items()}
            offset += length
    assert packed.keys() == alone.keys()
    assert max(abs(packed[place] - alone[place]) for place in packed) < 1e-5
    assert max(packed.values()) - min(packed.values()) > 1, "the model makes a difference"


def test_media_are_encoded_to_the_same_codes_in_any_batch(tiny_model: MakeModel, documents: list[Document]) -> None:
    model = tiny_model()
    packed = model.fill(batch_of(model, [documents], 160))[0]
    alone = [model.fill(batch_of(model, [[document]], length_of(model, document)))[0] for document in documents]
    assert torch.equal(packed[: sum(map(len, alone))], torch.cat(alone))
    places = model.image_indices(batch_of(model, [[documents[4]]], 12))[0]
    assert places.tolist() == [0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_every_filled_code_stands_in_the_slice_of_its_modality(tiny_model: MakeModel, documents: list[Document]) -> None:
    model = tiny_model()
    batch = batch_of(model, [documents[:3], documents[3:]], 128)
    tokens = model.fill(batch).flatten()
    for modality, places in enumerate(batch.targets):
        one = model.vocabulary.slices[modality]
        assert len(places) and ((tokens[places + 1] >= one.start) & (tokens[places + 1] < one.stop)).all()


def test_the_loss_depends_on_targets_and_what_they_see_only(tiny_model: MakeModel, image: MakeSegment) -> None:
    """A segment without loss changes what follows it, is not predicted itself, and gets no gradient at its head."""
    model = tiny_model()
    given = Segment(image(0).data, "png", loss=False)
    batch = batch_of(model, [[Document((given, Segment("seven")), "k")]], 16)
    losses = model(batch)
    assert losses.keys() == {TEXT} and len(losses[TEXT].each) == 1 + 5 + 1
    losses[TEXT].total.backward()
    assert all(parameter.grad is None for parameter in model.heads[IMAGE].parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.embeddings[IMAGE].parameters())
    other = model(batch_of(model, [[Document((Segment(image(1).data, "png", loss=False), Segment("seven")), "k")]], 16))
    assert (other[TEXT].each - losses[TEXT].each).abs().max() > 1e-3


def test_padding_and_masked_spans_carry_no_gradient(tiny_model: MakeModel, documents: list[Document]) -> None:
    model = tiny_model()
    batch = batch_of(model, [[BadSample("checksum", "rotten"), documents[1]], []], 64)
    before = model(batch)[TEXT].total
    batch.tokens[batch.document < 0] = 99
    torch.testing.assert_close(model(batch)[TEXT].total, before)
    nothing = model(batch_of(model, [[]], 16))
    assert nothing.keys() == {TEXT} and nothing[TEXT].total == 0 and not len(nothing[TEXT].each)
    nothing[TEXT].total.backward()  # other devices wait for these gradients
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_logits_are_those_of_the_slice_and_capped(tiny_model: MakeModel) -> None:
    model = tiny_model()
    hidden = torch.randn(5, 32)
    for modality, one in enumerate(model.vocabulary.slices):
        logits = model.logits(hidden * 1000, modality)
        assert logits.shape == (5, one.stop - one.start) and logits.dtype == torch.float32
        assert logits.abs().max() <= LOGIT_CAP and logits.abs().max() > LOGIT_CAP - 1


def test_predictions_and_targets_are_numbers_within_the_slice(tiny_model: MakeModel, documents: list[Document]) -> None:
    model = tiny_model()
    batch = batch_of(model, [documents], 160)
    tokens = model.fill(batch).flatten()
    for modality, loss in model(batch, predict=True).items():
        start = model.vocabulary.slices[modality].start
        assert torch.equal(loss.targets + start, tokens[batch.targets[modality] + 1])
        assert loss.predictions.shape == loss.targets.shape
        assert not loss.each.requires_grad and loss.total.requires_grad


def test_neighbouring_codes_share_their_levels_vectors(tiny_model: MakeModel) -> None:
    quantizer = tiny_model().image_codec.quantizer  # type: ignore[union-attr]
    table = FactoredTable(quantizer.sizes, 2, 8, 1.0)
    levels = quantizer.to_levels(torch.arange(12))
    expected = table.weight[:12] + table.levels[levels[:, 0]] + table.levels[4 + levels[:, 1]]
    torch.testing.assert_close(table(), torch.cat([expected, table.weight[12:]]))


@pytest.mark.parametrize("crop", [None, 1, 3, 100])
def test_codecs_train_on_the_media_of_a_batch(tiny_model: MakeModel, documents: list[Document], crop: int | None) -> None:
    model = tiny_model()
    losses = model.codec_loss(batch_of(model, [documents], 160), crop)
    assert losses.keys() == {IMAGE, AUDIO} and all(loss.isfinite() for loss in losses.values())
    assert model.codec_loss(batch_of(model, [[documents[1]]], 32), crop) == {}


def test_crops_are_parts_of_their_own_sounds(
    tiny_model: MakeModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    batch, seen = batch_of(model, [[documents[0], documents[3], documents[0]]], 160), []
    monkeypatch.setattr(model.audio_codec, "loss", lambda *arguments: seen.append(arguments) or torch.zeros(()))
    for _ in range(20):
        model.codec_loss(batch, 2)
    assert batch.sound_tokens == [5, 1, 5]
    first, middle, last = batch.audio.split(batch.sound_tokens)
    starts = set()
    for audio, tokens, _ in seen:
        assert tokens.tolist() == [2, 1, 2] and torch.equal(audio[2:3], middle)
        for crop, sound in ((audio[:2], first), (audio[3:], last)):
            (start,) = (n for n in range(4) if torch.equal(crop, sound[n : n + 2]))
            starts.add(start)
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("crop", [None, 2])
def test_codecs_compute_without_waiting_for_the_device(
    tiny_model: MakeModel, documents: list[Document], crop: int | None
) -> None:
    """Fake tensors have no values that Python could wait for."""
    model, batch = tiny_model(), batch_of(tiny_model(), [documents], 160)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = dataclasses.replace(batch, buffer=mode.from_tensor(batch.buffer))
        assert model.fill(fake).shape == (1, 160)
        assert model.codec_loss(fake, crop).keys() == {IMAGE, AUDIO}


def test_codecs_get_no_gradient_from_the_language_model(tiny_model: MakeModel, documents: list[Document]) -> None:
    model = tiny_model()
    sum(loss.total for loss in model(batch_of(model, [documents], 160)).values()).backward()
    codec = {id(p) for c in model.codecs.values() for p in c.parameters()}
    assert all((p.grad is None) == (id(p) in codec) for p in model.parameters())


def test_a_model_of_text_alone_has_no_codecs(documents: list[Document]) -> None:
    from pile_app.data.tokenizers import ByteTokenizer
    from pile_app.model.backbones import LSTM

    model = FusedLanguageModel(LSTM(width=16, layers=1), ByteTokenizer())
    assert model.codecs == {} and model.vocabulary.modalities == (TEXT,)
    losses = model(batch_of(model, [[documents[1]]], 16))
    assert losses.keys() == {TEXT} and losses[TEXT].each.mean() == pytest.approx(math.log(262))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_learned_words_and_given_codes_are_hidden_from_what_follows_them_and_still_answered(
    tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment, backbone: str
) -> None:
    model = tiny_model(backbone)
    given = Document((Segment("given", loss=False), image(0)), "given")
    learned = Document((Segment(image(1).file, "png", loss=False), Segment("cat")), "learned")
    batch = batch_of(model, [[given], [learned]], 32)
    exact = losses_by_place(model, batch)
    words = sorted(place for modality, place in exact if modality == TEXT and place >= 32)

    def changed_by(word_dropout: float, code_dropout: float) -> list[tuple[int, int]]:
        model.train().word_dropout, model.code_dropout = word_dropout, code_dropout
        found = losses_by_place(model, batch)
        assert found.keys() == exact.keys()
        return sorted(key for key in exact if not math.isclose(exact[key], found[key], rel_tol=1e-5))

    assert changed_by(1.0, 0.0) == [(TEXT, index) for index in words[-3:]]  # "a", "t" and the end, since no word precedes "c"
    assert changed_by(0.0, 1.0) == [(TEXT, index) for index in words[-5:]]  # all of it, from the opener
    model.eval()
    assert losses_by_place(model, batch) == exact
