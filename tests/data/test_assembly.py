"""The promises of `data/assembly.py` and `data/batch.py`: what documents become, and that a bad one moves nothing else."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device

from pile_app.data.assembly import PackedDocument, assemble, whole
from pile_app.data.batch import PADDING, Batch
from pile_app.data.datamodule import PackDataset
from pile_app.data.order import Phase, Piece, TrainingOrder
from pile_app.data.packing import cut_document
from pile_app.data.shards import write_shards
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import AUDIO, ENCODED_EXTENSIONS, IMAGE, TEXT, BadSample, Codes, Document, Segment
from pile_app.media import decode_audio, decode_image
from pile_app.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    image_codes=12,
    image_shape=(1, 8, 8),
    image_grid=(2, 2),
    audio_codes=36,
    sample_rate=8000,
    samples_per_token=320,
)
BEGIN, END, NULL, HOLE = Vocabulary.BEGIN, Vocabulary.END, Vocabulary.NULL, 0
TEXT_OPENER, IMAGE_OPENER, AUDIO_OPENER = Vocabulary.OPENERS
TOKENIZER = ByteTokenizer()


def ids(text: str) -> list[int]:
    return [Vocabulary.SPECIALS + byte for byte in text.encode()]


def length_of(document: Document) -> int:
    sizes = {TEXT: lambda s: len(s.text.encode()), IMAGE: lambda s: 0, AUDIO: lambda s: len(decode_audio(s.file, 8000))}
    return 2 + sum(VOCABULARY.segment_tokens(s.modality, sizes[s.modality](s), 8000) for s in document.segments)


class Row:
    """A batch of a single pack, with arrays by position."""

    def __init__(self, batch: Batch) -> None:
        assert len(batch.tokens) == 1
        self.tokens, self.document, self.position, self.source = (
            tensor[0].numpy() for tensor in (batch.tokens, batch.document, batch.position, batch.source)
        )
        self.targets = [places.numpy() for places in batch.targets]
        self.images, self.image_slots = batch.images.numpy(), batch.image_slots.numpy()
        self.audio, self.audio_slots = batch.audio.numpy(), batch.audio_slots.numpy()
        self.rejected = batch.rejected


def lay_out(
    entries: Sequence[tuple[int, Document | BadSample, str, int, int, int]],
    context: int,
    vocabulary: Vocabulary = VOCABULARY,
    tokenizer: Any = TOKENIZER,
) -> Row:
    """(source, document, key, start, stop, dropped) of each piece -> their pack."""
    pack = [
        PackedDocument(Piece(source, 0, 0, start, stop, False), key, document, dropped)
        for source, document, key, start, stop, dropped in entries
    ]
    return Row(assemble([pack], vocabulary, tokenizer, context))


def predicted(row: Row) -> list[list[int]]:
    """The predicted positions, by modality."""
    return [(places + 1).tolist() for places in row.targets]


# Laying out


def test_the_pieces_of_a_document_lay_out_its_tokens(image: Callable[[int], Segment]) -> None:
    document = Document((Segment("a text of some length"), image(0), Segment("more of it, and more"), image(1)), "k")
    length = length_of(document)
    uncut = lay_out([(0, document, "k", 0, length, 0)], length)
    segments = [(s.modality, VOCABULARY.segment_tokens(s.modality, len(s.data))) for s in document.segments]
    pieces = cut_document(segments, 14)
    assert len(pieces) > 3
    pixels, bodies = [], Counter()
    for start, stop in pieces:
        pack = lay_out([(0, document, "k", start, stop, 0)], 14)
        size = stop - start
        assert pack.tokens[:size].tolist() == uncut.tokens[start:stop].tolist()
        assert pack.position[:size].tolist() == list(range(size))
        pixels += list(pack.images)
        slots = pack.image_slots
        assert ((slots > 0) & (slots < size)).all()
        bodies += Counter((modality, place + start) for modality in range(3) for place in predicted(pack)[modality])
    assert np.array_equal(np.stack(pixels), uncut.images)
    assert set(bodies.values()) == {1}
    assert {place for modality, place in bodies if modality == IMAGE} == set(predicted(uncut)[IMAGE])


def test_documents_in_free_order_that_are_cut_keep_their_media_whole(tmp_path: Path, image: Callable[[int], Segment]) -> None:
    documents = [
        Document((image(n), Segment("x" * 28), image(n + 50), Segment("y" * 9)), f"long-{n}", ordered=False) for n in range(20)
    ]
    documents += [Document((image(n), Segment("z" * 5)), f"short-{n}", ordered=False) for n in range(40)]
    write_shards(documents, tmp_path, "s")
    data = SourceData("s", str(tmp_path / "s-*.tar"), VOCABULARY, TOKENIZER, 32)
    order = TrainingOrder([data.order(0)], [Phase(0, (1,))])
    dataset = PackDataset([data], order, VOCABULARY, TOKENIZER, 32, 1)
    images, texts, orders = 0, Counter[int](), set()
    for position in range(order.packs_per_epoch):
        pack = Row(dataset[position])
        assert not pack.rejected
        for slots in pack.image_slots:
            assert slots[-1] < 32 and len(set(pack.document[slots[0] - 1 : slots[-1] + 1].tolist())) == 1
            assert pack.tokens[slots[0] - 1] == IMAGE_OPENER
        images += len(pack.images)
        texts.update(pack.tokens[predicted(pack)[TEXT]].tolist())
        whole = pack.tokens[: int((pack.document == 0).sum())].tolist()
        if len(whole) == length_of(documents[-1]):
            orders.add(whole[1])
    assert images == 2 * 20 + 40
    assert [texts[Vocabulary.SPECIALS + ord(letter)] for letter in "xyz"] == [20 * 28, 20 * 9, 40 * 5]
    assert orders == {TEXT_OPENER, IMAGE_OPENER}, "the order of whole documents is drawn"


# Assembling


def test_a_pack_lays_out_tokens_positions_targets_and_slots(
    image: Callable[[int], Segment], sound: Callable[..., Segment]
) -> None:
    both = Document((Segment("hé"), image(0), sound(1, 700)), "both")
    text = Document((Segment("ab"),), "text")
    pieces = [(3, both, "both", 0, length_of(both), 0), (1, text, "text", 0, length_of(text), 0)]
    pack = lay_out(pieces, 24)
    assert pack.tokens.tolist() == [
        *(BEGIN, TEXT_OPENER, *ids("hé"), IMAGE_OPENER, *[HOLE] * 4, AUDIO_OPENER, *[HOLE] * 3, VOCABULARY.audio_end, END),
        *(BEGIN, TEXT_OPENER, *ids("ab"), END),
        *[0] * 3,
    ]  # fmt: skip
    assert pack.document.tolist() == [0] * 16 + [1] * 5 + [PADDING] * 3
    assert pack.position.tolist() == [*range(16), *range(5), 0, 0, 0]
    assert pack.source.tolist() == [3] * 16 + [1] * 5 + [0] * 3
    assert predicted(pack) == [[1, 2, 3, 4, 5, 10, 15, 17, 18, 19, 20], [6, 7, 8, 9], [11, 12, 13, 14]]
    assert pack.image_slots.tolist() == [[6, 7, 8, 9]]
    assert pack.audio_slots.tolist() == [11, 12, 13]
    assert np.array_equal(pack.images[0], decode_image(both.segments[1].file, 1, 8, 8))
    assert pack.audio.shape == (3, 320) and not pack.audio[2, 60:].any()
    assert np.array_equal(pack.audio.flatten()[:700], decode_audio(both.segments[2].file, 8000))
    assert pack.rejected == []


@pytest.mark.parametrize("why", ["reading", "decoding", "length"])
def test_a_bad_sample_masks_its_span_and_moves_nothing_else(why: str, image: Callable[[int], Segment]) -> None:
    good = [Document((Segment("left"), image(0)), "a"), Document((image(1), Segment("right")), "c")]
    middle: Document | BadSample = Document((Segment("bad"), image(2)), "b")
    length = length_of(middle)  # type: ignore[arg-type]

    def pack(document: Document | BadSample, stop: int = length) -> Row:
        first, last = ((0, one, one.key, 0, length_of(one), 0) for one in good)
        return lay_out([first, (1, document, "b", 0, stop, 0), last], 64)

    bad: dict[str, Document | BadSample] = {
        "reading": BadSample("checksum", "rotten"),
        "decoding": Document((Segment("bad"), Segment(b"no image", "png")), "b"),
        "length": Document((Segment("ba"), image(2)), "b"),
    }
    right, wrong = pack(middle), pack(bad[why])
    reasons = {"reading": "checksum", "decoding": "undecodable_image", "length": "length"}
    assert [one[:3] for one in wrong.rejected] == [(1, "b", reasons[why])]
    span = np.arange(length) + length_of(good[0])
    outside = np.setdiff1d(np.arange(64), span)
    for name in ("tokens", "document", "position", "source"):
        assert np.array_equal(getattr(wrong, name)[outside], getattr(right, name)[outside]), name
    assert (wrong.document[span] == PADDING).all() and not wrong.tokens[span].any()
    for kept, all_of_them in zip(predicted(wrong), predicted(right), strict=True):
        assert kept == [place for place in all_of_them if place not in span]
    assert [slots.tolist() for slots in wrong.image_slots] == [right.image_slots[i].tolist() for i in (0, 2)]
    assert np.array_equal(wrong.images, [right.images[i] for i in (0, 2)])


def test_condition_dropout_hides_segments_and_masks_their_loss(
    image: Callable[[int], Segment], sound: Callable[..., Segment]
) -> None:
    document = Document((Segment("abc"), image(0), sound(0, 300), Segment("de")), "k")
    length = length_of(document)
    packs = [lay_out([(0, document, "k", 0, length, n)], length) for n in range(4)]
    plain = packs[0]
    bodies = [range(2, 5), range(6, 10), range(11, 13), range(14, 16)]  # positions of each segment without its opener
    for dropped, pack in enumerate(packs):
        hidden = [place for body in bodies[:dropped] for place in body]
        seen = np.setdiff1d(np.arange(length), hidden)
        assert (pack.tokens[hidden] == NULL).all()
        assert np.array_equal(pack.tokens[seen], plain.tokens[seen])
        assert np.array_equal(pack.document, plain.document) and np.array_equal(pack.position, plain.position)
        masked = {*hidden, *(body[0] - 1 for body in bodies[:dropped])}
        assert [[p for p in places if p not in masked] for places in predicted(plain)] == predicted(pack)
        assert len(pack.images) == len(pack.image_slots) == int(dropped < 2)
        assert len(pack.audio) == int(dropped < 3)


def test_a_segment_without_loss_is_seen_and_not_predicted(image: Callable[[int], Segment]) -> None:
    picture = image(0)

    def pack(*losses: bool) -> Row:
        given = Segment(picture.data, "png", losses[1])
        document = Document((Segment("ask", loss=losses[0]), given, Segment("so", loss=losses[2])), "k")
        return lay_out([(0, document, "k", 0, 14, 0)], 14)

    plain = pack(True, True, True)
    assert predicted(plain) == [[1, 2, 3, 4, 5, 10, 11, 12, 13], [6, 7, 8, 9], []]
    question = pack(False, False, True)
    assert np.array_equal(question.tokens, plain.tokens)
    assert np.array_equal(question.images, plain.images) and np.array_equal(question.image_slots, plain.image_slots)
    assert predicted(question) == [[10, 11, 12, 13], [], []]
    assert predicted(pack(True, False, True))[IMAGE] == []
    assert predicted(pack(True, True, False))[TEXT] == [1, 2, 3, 4, 5]


def test_media_without_a_codec_are_named(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    for segment, reason in ((image(0), "no_image_codec"), (sound(0), "no_audio_codec")):
        document = Document((segment,), "k")
        pack = lay_out([(0, document, "k", 0, 7, 0)], 8, Vocabulary())
        assert [one[2] for one in pack.rejected] == [reason]


def test_a_document_in_a_pack_is_what_it_is_alone(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    documents = [
        Document((Segment("ab"), image(0)), "a"),
        Document((sound(1, 900), Segment("given", loss=False), Segment("c")), "b"),
        Document((image(1), image(2)), "c"),
    ]
    lengths = [length_of(one) for one in documents]
    entries = [(0, one, one.key, 0, length, 0) for one, length in zip(documents, lengths, strict=True)]
    together = lay_out(entries, 64)
    alone = [lay_out([entry], length) for entry, length in zip(entries, lengths, strict=True)]
    filled = sum(lengths)
    for name in ("tokens", "position", "source"):
        assert np.array_equal(getattr(together, name)[:filled], np.concatenate([getattr(one, name) for one in alone])), name
    assert together.document[:filled].tolist() == np.repeat(np.arange(3), lengths).tolist()
    offsets = np.cumsum([0, *lengths[:-1]]).tolist()
    for modality in range(3):
        moved = [place + offset for one, offset in zip(alone, offsets, strict=True) for place in predicted(one)[modality]]
        assert predicted(together)[modality] == moved
    for media in ("images", "audio"):
        apart = [medium for one in alone for medium in getattr(one, media)]
        assert all(map(np.array_equal, getattr(together, media), apart)) and len(apart) == len(getattr(together, media))
    slots = [slots + offset for one, offset in zip(alone, offsets, strict=True) for slots in one.image_slots]
    assert np.array_equal(together.image_slots, slots)


# Encoded segments


ENCODER = "0123456789abcdef" * 2


class Encoder:
    """A tokenizer by name."""

    size, fingerprint, token_bytes = 256, ENCODER, np.ones(256, np.int64)
    encode = staticmethod(TOKENIZER.encode)


def encoded(modality: int, values: list[int], size: int, rate: int = 0, encoder: str = ENCODER) -> Segment:
    return Segment(Codes(encoder, size, rate, np.array(values)).to_bytes(), ENCODED_EXTENSIONS[modality])


def test_encoded_segments_are_laid_out_as_what_they_were_made_of(image: Callable[[int], Segment]) -> None:
    vocabulary = dataclasses.replace(VOCABULARY, tokenizer=ENCODER, image_codec="1" * 32, audio_codec="2" * 32)
    document = Document(
        (
            encoded(TEXT, list(b"h\xc3\xa9"), 3),
            encoded(IMAGE, [11, 0, 5, 7], 64, encoder="1" * 32),
            encoded(AUDIO, [35, 0, 1], 700, 8000, "2" * 32),
        ),
        "k",
    )
    pack = lay_out([(0, document, "k", 0, 16, 0)], 16, vocabulary, Encoder())
    image_codes, audio_codes = vocabulary.starts[IMAGE], vocabulary.starts[AUDIO]
    assert not pack.rejected and not len(pack.images) and not len(pack.audio)
    assert pack.tokens.tolist() == [
        *(BEGIN, TEXT_OPENER, *ids("hé"), IMAGE_OPENER, *(image_codes + code for code in (11, 0, 5, 7))),
        *(AUDIO_OPENER, *(audio_codes + code for code in (35, 0, 1)), vocabulary.audio_end, END),
    ]  # fmt: skip
    assert predicted(pack) == [[1, 2, 3, 4, 5, 10, 15], [6, 7, 8, 9], [11, 12, 13, 14]]


def test_encoded_segments_of_another_encoder_or_beyond_the_vocabulary_are_refused() -> None:
    vocabulary = dataclasses.replace(VOCABULARY, image_codec="1" * 32)

    def alone(segment: Segment) -> Row:
        return lay_out([(0, Document((segment,), "k"), "k", 0, 7, 0)], 8, vocabulary)

    with pytest.raises(ValueError, match="encoded by 22222222222222222222222222222222, the model's codec is 1111"):
        alone(encoded(IMAGE, [1, 2, 3, 4], 64, encoder="2" * 32))
    assert [one[2] for one in alone(encoded(IMAGE, [1, 2, 3, 12], 64, encoder="1" * 32)).rejected] == ["damaged_codes"]
    assert [one[2] for one in alone(encoded(IMAGE, [1, 2, 3], 64, encoder="1" * 32)).rejected] == ["damaged_codes"]
    assert [one[2] for one in alone(Segment(b"rotten", "imagecodes")).rejected] == ["damaged_codes"]
    assert not alone(encoded(IMAGE, [1, 2, 3, 11], 64, encoder="1" * 32)).rejected


# Collating


def test_a_batch_points_at_the_same_places_as_its_packs(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    documents = [
        Document((image(0), sound(0, 900)), "a"),
        Document((Segment("only text"),), "b"),
        Document((sound(1, 2000), image(1), image(2)), "c"),
    ]
    packs = [[PackedDocument(Piece(0, 2, 0, 0, length_of(one), True), one.key, one)] for one in documents]
    rows = [Row(assemble([pack], VOCABULARY, TOKENIZER, 32)) for pack in packs]
    batch = assemble([*packs, []], VOCABULARY, TOKENIZER, 32, numbers=[7, 8, 9, 10])
    assert batch.tokens.shape == batch.document.shape == batch.position.shape == batch.source.shape == (4, 32)
    assert torch.equal(batch.tokens[:3], torch.from_numpy(np.stack([row.tokens for row in rows])))
    for modality in range(3):
        places = [row.targets[modality] + 32 * number for number, row in enumerate(rows)]
        assert batch.targets[modality].tolist() == np.concatenate(places).tolist()
    slots = [slot + 32 * number for number, row in enumerate(rows) for slot in row.image_slots]
    assert np.array_equal(batch.image_slots, slots) and batch.images.shape == (3, 1, 8, 8)
    assert batch.audio_slots.tolist() == [slot + 32 * number for number, row in enumerate(rows) for slot in row.audio_slots]
    assert batch.audio_tokens.tolist() == batch.sound_tokens == [3, 7] and batch.audio.shape == (10, 320)
    assert not batch.audio[2, 260:].any() and batch.audio[2, :260].any()
    assert batch.normalizer == sum(len(places) for places in batch.targets)
    assert batch.numbers == [7, 8, 9, 10]
    assert batch.documents == [*([(0, one.key, 2, 0, length_of(one))] for one in documents), []]
    planned = assemble(packs, VOCABULARY, TOKENIZER, 32, normalizer=123.0, source_tokens=[3, 4])
    assert planned.normalizer == 123 and planned.source_tokens == [3, 4] and batch.source_tokens == []
    assert float((batch.document == PADDING).float().mean()) == 1 - sum(map(length_of, documents)) / 128
    lengths = [length_of(documents[0]), 32 - length_of(documents[0])]
    assert batch.piece_starts[:3].tolist() == [0, lengths[0], 32] and batch.piece_starts[-1] == 128
    assert batch.piece_sources.tolist() == [0, PADDING, 0, PADDING, 0, PADDING, PADDING]


def test_a_batch_without_media_has_empty_tensors() -> None:
    batch = assemble([[]], VOCABULARY, TOKENIZER, 8)
    assert batch.images.shape == (0, 1, 8, 8) and batch.image_slots.shape == (0, 4)
    assert batch.audio.shape == (0, 320) and len(batch.audio_slots) == len(batch.audio_tokens) == 0
    assert [len(places) for places in batch.targets] == [0, 0, 0]
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.learned.is_meta


def test_a_batch_is_the_same_in_another_process(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    document = Document((Segment("of three"), image(0), sound(0, 900)), "k")
    batch = assemble([[whole(document, length_of(document))]], VOCABULARY, TOKENIZER, 40)
    copy = pickle.loads(pickle.dumps(batch))
    for name in ("tokens", "document", "position", "source", "images", "image_slots", "audio", "audio_slots", "normalizer"):
        assert torch.equal(getattr(copy, name), getattr(batch, name)), name
    assert all(map(torch.equal, copy.targets, batch.targets))
    assert (copy.documents, copy.numbers, copy.rejected) == (batch.documents, batch.numbers, batch.rejected)


def test_media_of_a_rejected_document_go_with_it(image: Callable[[int], Segment], sound: Callable[..., Segment]) -> None:
    """The last of its media is damaged: those before are decoded already."""
    first, last = Document((image(0), sound(0, 900)), "a"), Document((sound(1, 640), image(3)), "c")
    bad = Document((image(1), sound(2, 700), image(2), Segment(b"no image", "png")), "b")
    pack = [whole(one, length_of(one)) for one in (first, bad, last)]
    batch = assemble([pack], VOCABULARY, TOKENIZER, 80)
    alone = assemble([[pack[0], PackedDocument(pack[1].piece, "b", BadSample("x", "")), pack[2]]], VOCABULARY, TOKENIZER, 80)
    assert [one[1:3] for one in batch.rejected] == [("b", "undecodable_image")]
    for name in (
        "tokens",
        "learned",
        "document",
        "images",
        "image_slots",
        "audio",
        "audio_tokens",
        "audio_slots",
        "normalizer",
    ):
        assert torch.equal(getattr(batch, name), getattr(alone, name)), name
    assert batch.sound_tokens == alone.sound_tokens == [3, 2] and not batch.audio[2, 260:].any()


def test_a_batch_is_copied_to_a_gpu_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document((Segment("abc"),), "a")
    batch = assemble([[whole(document, 6)]], Vocabulary(), ByteTokenizer(), 8)
    asked: list[tuple[str, bool]] = []
    copy = torch.Tensor.to

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        asked.append((torch.device(device).type, non_blocking))
        return copy(self, "cpu")

    monkeypatch.setattr(torch.Tensor, "to", to)
    for device in ("cuda", "cpu", "mps"):
        move_data_to_device(batch, torch.device(device))
    assert asked == [("cuda", True), ("cpu", False), ("mps", False)]
