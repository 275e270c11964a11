"""Readers see given media, and nothing of media that are predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import AUDIO, IMAGE, READERS, REPOSITORY
from torch import Tensor

from pile_app.cli import main
from pile_app.data.assembly import assemble, whole
from pile_app.data.batch import Batch
from pile_app.documents import TEXT, Codes, Document, Segment
from pile_app.model.codecs import AudioCodec, ImageCodec, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Decoder, Sampling, answer_prompts, lay_out
from pile_app.model.pretrained import save_pretrained, save_readers, take_readers
from pile_app.model.readers import CNN, ReaderConfig, divide, make_reader
from pile_app.model.segments import segment_length
from pile_app.tasks.classification import Classification
from pile_app.training.checkpoints import load_origin

MakeModel = Callable[..., FusedLanguageModel]
MakeSegment = Callable[..., Segment]


def given(segment: Segment) -> Segment:
    return replace(segment, loss=False)


def batch_of(model: FusedLanguageModel, rows: list[tuple[Segment, ...]], annotator: Any = None) -> Batch:
    documents = [Document(row, str(n)) for n, row in enumerate(rows)]
    lengths = [2 + sum(segment_length(model, segment) for segment in row) for row in rows]
    pack = [whole(document, length) for document, length in zip(documents, lengths, strict=True)]
    return assemble([pack], model.vocabulary, model.tokenizer, sum(lengths) + 3, annotator=annotator)


def test_a_medium_that_is_predicted_is_not_read(
    tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likelihood of codes is exact: pixels and samples of their own medium change nothing, those of given media do."""
    model = tiny_model(readers=READERS)

    def hidden(*media: Segment) -> tuple[Tensor, Batch]:
        first, second, third, fourth = media
        batch = batch_of(model, [(given(first), second, given(third), fourth), (Segment("a"), fourth, given(first))])
        monkeypatch.setattr(model, "fill", lambda batch: codes)
        return model.read(batch)[1], batch

    media = image(0), image(1), sound(0), sound(1)
    codes = model.fill(batch_of(model, [(*media,), (Segment("a"), media[3], media[0])]))
    before, batch = hidden(*media)
    assert batch.given_images.tolist() == [0, 2] and batch.given_sound_tokens == [5] == [len(batch.given_codes)]
    assert torch.equal(hidden(media[0], image(7), media[2], sound(8))[0], before)
    for changed in ((image(7), *media[1:]), (*media[:2], sound(7), media[3])):
        assert not torch.allclose(hidden(*changed)[0], before)


def test_features_stand_where_the_codes_stand_whatever_else_is_in_the_batch(
    tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment
) -> None:
    model = tiny_model(readers=READERS)
    rows = [(given(sound(1, 600)), given(image(1)), Segment("b")), (given(sound(2, 1500)), Segment("a")), (Segment("c"),)]
    together = model.features(batch := batch_of(model, rows))[0]  # type: ignore[index]
    assert torch.equal(together.any(-1), model.fill(batch)[0] != batch.tokens[0])
    alone = [model.features(batch_of(model, [row]))[0] for row in rows]  # type: ignore[index]
    for start, found in zip(batch.piece_starts.tolist(), alone, strict=False):
        torch.testing.assert_close(together[start : start + len(found) - 3], found[:-3])


def test_with_labels_all_media_are_read_and_none_predicted(
    tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment
) -> None:
    for model, read in ((tiny_model(readers=READERS), True), (tiny_model(), False)):
        objective = Classification(["no", "yes"], language_weight=0.1)
        objective.build(model)
        batch = batch_of(model, [(image(1), sound(1), Segment("yes"))], objective.annotator)
        assert (len(batch.given_images), len(batch.given_codes)) == ((1, 5) if read else (0, 0))
        assert (batch.target_counts[1:] == (0, 0)) == read


@pytest.mark.parametrize("backbone", ["transformer", "mingru"])
def test_a_prompt_is_read_as_in_training(tiny_model: MakeModel, image: MakeSegment, sound: MakeSegment, backbone: str) -> None:
    model = tiny_model(backbone, readers=READERS)
    segments = (given(image(1)), given(sound(1)))
    batch = batch_of(model, [(*segments, Segment("yes"))])
    with model.inference():
        trained = model.read(batch)[1]
        for prompt in (segments, (image(1), sound(1))):  # whether it says so or not
            context = lay_out(model, Document(prompt), TEXT, with_masked=True)
            read, _ = Decoder(model, context, 3, guidance=2.0).read()
            torch.testing.assert_close(read, trained[:, : read.size(1)], atol=1e-5, rtol=1e-4)
            assert context[1][2] is not None and not context[1][2].any()  # nothing is seen behind `<null>`
        half = Document((given(Segment("draw")), image(1), given(Segment("and?"))))  # an answer of the model, drawn by itself
        assert not lay_out(model, half, TEXT, False)[0][2].any()  # type: ignore[union-attr]
    answers = answer_prompts(model, [Document((image(n),)) for n in range(3)], TEXT, Sampling(max_text=3))
    again = answer_prompts(model, [Document((image(2),))], TEXT, Sampling(max_text=3))
    assert answers[2].codes.shape == again[0].codes.shape


def test_encoded_media_are_refused_with_the_fix(tiny_model: MakeModel) -> None:
    model = tiny_model(readers=READERS)
    model.fingerprint_codecs()
    codes = Codes(model.vocabulary.audio_codec, 1500, 8000, np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match=r"model\.readers\.audio reads it itself: train on the original shards, or set it to"):
        batch_of(model, [(Segment(codes.to_bytes(), "audiocodes"),)])


@pytest.mark.parametrize(
    ("patch", "size", "strides", "pool"),
    [(1, 4, [1, 1, 1], 1), (4, 8, [1, 2, 2], 1), (7, 28, [1, 1, 7], 1), (8, 32, [1, 2, 2], 2), (16, 128, [4, 2, 2], 1)],
)
def test_strides_and_pooling_lead_to_the_grid(patch: int, size: int, strides: list[int], pool: int) -> None:
    assert divide(patch, size) == (strides, pool)
    codec = ImageCodec(ImageCodecConfig(size=size, channels=1, patch=patch, width=16))
    reader = CNN(ReaderConfig(width=8), codec, 32)
    assert reader(torch.zeros(3, 1, size, size, dtype=torch.uint8), ()).shape == (3 * (size // patch) ** 2, 32)


def save_encoder(kind: str, folder: Path) -> Path:
    """A tiny encoder of random weights, as it lies on the hub."""
    import transformers as t

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any
    if kind == "clip":
        text = t.CLIPTextConfig(**sizes, vocab_size=9)
        vision = t.CLIPVisionConfig(**sizes, image_size=12, patch_size=4)
        model = t.CLIPModel(t.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
        t.CLIPImageProcessor().save_pretrained(folder)
    elif kind == "siglip":
        model = t.SiglipVisionModel(t.SiglipVisionConfig(**sizes, image_size=12, patch_size=4))
        t.SiglipImageProcessor().save_pretrained(folder)
    elif kind == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(**sizes, image_size=12, patch_size=4))
        t.BitImageProcessor().save_pretrained(folder)
    elif kind == "whisper":
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        some = {"num_mel_bins": 80, "d_model": 16, "max_source_positions": 5, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        ids = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        model = t.WhisperModel(t.WhisperConfig(**layers, **some, **ids))
        t.WhisperFeatureExtractor().save_pretrained(folder)
    else:
        convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (20, 16)}
        model = t.Wav2Vec2Model(t.Wav2Vec2Config(**sizes, **convolutions, num_feat_extract_layers=2,
                                                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))  # fmt: skip
        t.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "whisper", "wav2vec2"])
def test_encoders_of_transformers_read_media(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    path = str(save_encoder(kind, tmp_path / kind))
    codec = ImageCodec(IMAGE) if kind in ("clip", "siglip", "dinov2") else AudioCodec(AUDIO)
    reader: Any = make_reader(ReaderConfig(path=path), codec, 32)
    assert not any(parameter.requires_grad for parameter in reader.encoder.parameters())
    torch.manual_seed(1)
    if isinstance(codec, ImageCodec):
        media, tokens = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8), []
    else:
        media, tokens = torch.randn(7, 320) * 0.1, [3, 4]
    assert not reader(media, tokens).any()  # features start at 0
    torch.nn.init.normal_(reader.project[2].weight)
    features = reader(media, tokens)
    assert features.shape == (8 if not tokens else 7, 32) and features.std(0).min() > 0
    features.sum().backward()
    described = tmp_path / "described"
    reader.save_description(described)
    again = make_reader(ReaderConfig(path=str(described), pretrained=False, train=True), codec, 32)
    again.load_state_dict(reader.state_dict())
    torch.testing.assert_close(again(media, tokens), features)
    again(media, tokens).sum().backward()
    assert any(parameter.grad is not None for parameter in again.encoder.parameters())  # type: ignore[union-attr]


def test_features_of_whisper_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = save_encoder("whisper", tmp_path)
    codec = AudioCodec(replace(AUDIO, sample_rate=16000))
    reader: Any = make_reader(ReaderConfig(path=str(path)), codec, 32)
    samples = torch.randn(1600) * 0.1  # a window of 0.1 seconds
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    mel = extractor(samples.numpy(), sampling_rate=16000, return_tensors="pt", padding=False).input_features[..., :10]
    expected = reader.encoder(mel.float()).last_hidden_state[0]
    torch.testing.assert_close(reader._listen(samples), expected, atol=2e-3, rtol=2e-3)


def test_a_folder_describes_the_reader_that_the_model_has(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = str(save_encoder("clip", tmp_path / "clip"))
    codec = ImageCodec(IMAGE)
    save_readers({"image": make_reader(ReaderConfig(path=path), codec, 32)}, tmp_path)
    for none in (None, {}, {"image": None}, {"image": {"path": None}}):  # of another attempt than the one that wrote it
        before = repr(none)
        take_readers(none, tmp_path)
        assert repr(none) == before
    readers = {"image": {"path": path, "pretrained": True}}
    take_readers(readers, tmp_path)
    assert readers == {"image": {"path": str(tmp_path / "image_reader"), "pretrained": False}}
    save_readers({"image": make_reader(ReaderConfig(width=8), codec, 32)}, tmp_path, again=False)
    assert (tmp_path / "image_reader").exists()
    save_readers({"image": make_reader(ReaderConfig(width=8), codec, 32)}, tmp_path)
    assert not (tmp_path / "image_reader").exists()


def test_a_pretrained_reader_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    path = save_encoder("clip", tmp_path / "clip")
    main(["plan", "--config", str(REPOSITORY / "conf" / "images_only.yaml"), f"--model.readers.image.path={path}"])
    assert "readers" in capsys.readouterr().out


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = save_encoder("whisper", tmp_path / "ears")
    for folder, codec in ((path, ImageCodec(IMAGE)), (tmp_path / "nothing", AudioCodec(AUDIO))):
        with pytest.raises(ValueError, match=r"reader path='.*' is no encoder of transformers that is known"):
            make_reader(ReaderConfig(path=str(folder)), codec, 32)  # type: ignore[arg-type]


def test_a_model_gets_a_reader_and_is_at_first_what_it_was(tiny_model: MakeModel, image: MakeSegment, tmp_path: Path) -> None:
    old, new = tiny_model(), tiny_model(perturbed=False, readers=READERS)
    sizes = {"width": 32, "layers": 2, "heads": 4, "key_value_heads": 2}
    config: dict[str, Any] = {"backbone": {"class_path": "Transformer", "init_args": sizes}}
    config |= {"image": asdict(IMAGE), "audio": asdict(AUDIO)}
    save_pretrained(old, config, tmp_path / "old")
    load_origin(new, str(tmp_path / "old"))
    rows = [(given(image(1)), Segment("a"))]
    torch.testing.assert_close(new.read(batch_of(new, rows))[1], old.read(batch_of(old, rows))[1])
    save_pretrained(new, config | {"readers": asdict(READERS)}, tmp_path / "new")
    again = FusedLanguageModel.from_pretrained(tmp_path / "new")
    assert again.vocabulary.reads == (1, 2) and again.readers.state_dict().keys() == new.readers.state_dict().keys()
