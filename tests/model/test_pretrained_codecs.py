"""Codecs of transformers: its own codes and media, whatever they are batched with, and a model that reads and writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import BACKBONES
from test_fake_cuda import batch_of, check, fake_cuda
from torch import Tensor, nn

from pile_app.data.assembly import assemble, whole
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel, codec_fingerprint
from pile_app.model.generate import Sampling, answer_prompts
from pile_app.model.pretrained_codecs import make_codec
from pile_app.model.segments import segment_length
from pile_app.tasks.encode import encode_media

SMALL = {"codebook_size": 16, "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "sampling_rate": 8000}
MIMI = SMALL | {"codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16}
DAC = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 5], "upsampling_ratios": [5, 2], "decoder_hidden_size": 16}
HUBERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [8, 8, 8],
          "conv_stride": [4, 5, 4], "conv_kernel": [8, 5, 4], "num_feat_extract_layers": 3,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
VQ = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
SOUND_CONFIGS: dict[str, Callable[[], Any]] = {
    "Mimi": lambda: transformers.MimiConfig(**MIMI, **HEADS, upsample_groups=16),
    "Dac": lambda: transformers.DacConfig(**DAC, n_codebooks=3, codebook_size=16, codebook_dim=4, hidden_size=16,
                                          hop_length=10, sampling_rate=8000),
    "Encodec": lambda: transformers.EncodecConfig(**SMALL, codebook_dim=16, target_bandwidths=[4.0, 16.0]),
    "Xcodec": lambda: transformers.XcodecConfig(
        sample_rate=8000, codebook_size=16, target_bandwidths=[0.4, 0.8], kernel_size=3,
        acoustic_model_config={**DAC, "model_type": "dac", "downsampling_ratios": [8, 10], "upsampling_ratios": [8, 10],
                               "hidden_size": 16},
        semantic_model_config={**HUBERT, "model_type": "hubert"}),
}  # fmt: skip
PICTURE_CONFIGS: dict[str, Callable[[], Any]] = {
    "Emu3VQVAE": lambda: transformers.Emu3VQVAEConfig(
        **VQ, codebook_size=16, embed_dim=4, latent_channels=4, hidden_size=64, temporal_downsample_factor=2
    ),
    "JanusVQVAE": lambda: transformers.JanusVQVAEConfig(**VQ, num_embeddings=16, embed_dim=4, latent_channels=8, num_patches=4),
}


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Writes a codec with random weights, and returns its folder."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            torch.manual_seed(0)
            config = (SOUND_CONFIGS | PICTURE_CONFIGS)[name]()
            model = getattr(transformers, name if name in PICTURE_CONFIGS else f"{name}Model")(config)
            for key, tensor in model.state_dict().items():
                if tensor.dim() > 1 and "alpha" not in key and "weight_g" not in key:  # as it is made, all codes are the same
                    nn.init.normal_(tensor, std=1.5 / tensor[0].numel() ** 0.5)
                if key.endswith("cluster_usage"):
                    tensor.fill_(1.0)
            made[name] = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(made[name])
        return made[name]

    return make


def theirs(name: str, folder: str) -> Any:
    return getattr(transformers, name if name in PICTURE_CONFIGS else f"{name}Model").from_pretrained(folder).eval()


def sounds(per_frame: int, *frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count * per_frame, generator=generator) / 4 for count in frames]


@pytest.mark.parametrize("codebooks", [1, 2])
@pytest.mark.parametrize("name", SOUND_CONFIGS)
@torch.no_grad()
def test_sounds_have_the_codes_and_samples_of_transformers(save: Callable[[str], str], name: str, codebooks: int) -> None:
    codec = make_codec(AudioCodecConfig(pretrained=save(name), codebooks=codebooks, mels=8))
    model, shape = theirs(name, save(name)), codec.config
    per_frame = shape.samples_per_token * codebooks
    assert shape.levels == (16 * codebooks,) and per_frame == {"Mimi": 16, "Dac": 10, "Encodec": 8, "Xcodec": 80}[name]
    some = sounds(per_frame, 40, 25, 70)
    tokens = [len(sound) // shape.samples_per_token for sound in some]
    audio = torch.cat(some).view(-1, shape.samples_per_token)
    codes = codec.encode(audio, torch.tensor(tokens))
    assert codes.shape == (sum(tokens),) and codes.min() >= 0 and codes.max() < 16 * codebooks and len(codes.unique()) > 3
    again = codec.decode(codes, tokens)
    assert again.shape == audio.shape
    for sound, one, decoded in zip(some, codes.split(tokens), again.split(tokens), strict=True):
        assert torch.equal(codec.encode(sound.view(-1, shape.samples_per_token), [len(one)]), one), "alone as in the batch"
        levels = {"Mimi": {"num_quantizers": codebooks}, "Dac": {"n_quantizers": codebooks}, "Encodec": {"bandwidth": 16.0}}
        expected = model.encode(sound[None, None], **levels.get(name, {})).audio_codes.flatten(0, -2)[:codebooks]
        assert torch.equal(one.view(-1, codebooks).T, expected + 16 * torch.arange(codebooks)[:, None])
        arguments = {"Encodec": (expected[None, None], [None]), "Dac": (None, expected[None])}.get(name, (expected[None],))
        samples = model.decode(*arguments).audio_values.flatten()[: len(sound)]
        torch.testing.assert_close(decoded.flatten()[: len(samples)], samples.clamp(-1, 1), atol=1e-5, rtol=0)
        assert len(samples) > len(sound) - per_frame
    assert codec.patches(audio, torch.tensor(tokens)).shape == (sum(tokens), shape.frames_per_token * 8)
    if codebooks == 2:
        with pytest.raises(ValueError, match="order of the codec's codebooks"):
            codec.decode(codes.flip(0), tokens)


@pytest.mark.parametrize("name", PICTURE_CONFIGS)
@torch.no_grad()
def test_pictures_have_the_codes_and_pixels_of_transformers(save: Callable[[str], str], name: str) -> None:
    codec = make_codec(ImageCodecConfig(pretrained=save(name), size=8))
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes = codec.encode(images)
    assert codes.shape == (3, 16) and codes.min() >= 0 and codes.max() < 16 and len(codes.unique()) > 3
    model, pixels = theirs(name, save(name)), images / 127.5 - 1
    sizes = {"image_sizes": [(8, 8)] * 3} if name == "Emu3VQVAE" else {}
    expected = model.encode(pixels, **sizes).image_tokens
    expected = torch.stack(expected) if isinstance(expected, list) else expected
    assert torch.equal(expected.reshape(3, 16), codes)
    decoded = model.decode(expected.reshape(3, *((4, 4) if name == "Emu3VQVAE" else (16,))))
    as_bytes = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    assert codec.decode(codes).shape == images.shape and (codec.decode(codes) - as_bytes).abs().max() <= 1
    assert torch.equal(codec.encode(images[1:2]), codes[1:2]), "alone as in the batch"


def test_the_codec_of_a_whole_model_is_read(save: Callable[[str], str], tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
            "intermediate_size": 16, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    names = {"<image>": 1, "<|extra_200|>": 2}
    emu3 = transformers.Emu3Config(vq_config=PICTURE_CONFIGS["Emu3VQVAE"]().to_dict(), text_config=text, vocabulary_map=names)
    janus = transformers.JanusConfig(
        vq_config=PICTURE_CONFIGS["JanusVQVAE"]().to_dict(), text_config=text | {"model_type": "llama"}, vision_config=vision
    )
    for name, config in (("Emu3", emu3), ("Janus", janus)):
        whole = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        whole.save_pretrained(tmp_path / name)
        found = make_codec(ImageCodecConfig(pretrained=str(tmp_path / name), size=8)).model.state_dict()
        expected = whole.model.vqmodel.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_what_cannot_be_a_codec_is_refused_with_the_fix(save: Callable[[str], str], tmp_path: Path) -> None:
    dac = save("Dac")
    (tmp_path / "config.json").write_text((Path(dac) / "config.json").read_text())
    stereo = transformers.EncodecConfig(audio_channels=2, chunk_length_s=1.0, overlap=0.01)
    stereo.save_pretrained(tmp_path / "stereo")
    transformers.ChameleonVQVAEConfig().save_pretrained(tmp_path / "chameleon")
    for message, config, options in (
        ("set one of \\[1, 2\\]", AudioCodecConfig, {"pretrained": dac, "codebooks": 3}),
        ("need a pretrained codec", AudioCodecConfig, {"codebooks": 2}),
        ("take a mono codec", AudioCodecConfig, {"pretrained": str(tmp_path / "stereo")}),
        ("take Emu3VQVAE, JanusVQVAE", ImageCodecConfig, {"pretrained": str(tmp_path / "chameleon")}),
        ("take MimiModel, DacModel", AudioCodecConfig, {"pretrained": save("Emu3VQVAE")}),
        ("takes 8 pixels", ImageCodecConfig, {"pretrained": save("JanusVQVAE"), "size": 16}),
        ("is no codec", AudioCodecConfig, {"pretrained": str(tmp_path / "nothing")}),
        ("no weights as safetensors", AudioCodecConfig, {"pretrained": str(tmp_path)}),
    ):
        with pytest.raises(ValueError, match=message):
            make_codec(config(**options))


def fused(save: Callable[[str], str], audio: str = "Mimi", codebooks: int = 2) -> FusedLanguageModel:
    torch.manual_seed(0)
    sound = AudioCodecConfig(pretrained=save(audio), codebooks=codebooks, mels=8)
    model = FusedLanguageModel(
        BACKBONES["transformer"](), ByteTokenizer(), ImageCodecConfig(pretrained=save("Emu3VQVAE"), size=8), sound
    )
    with torch.no_grad():
        for part in (model.backbone, model.embeddings, model.heads):
            for parameter in part.parameters():
                parameter += torch.randn_like(parameter) * 0.1
    return model.eval()


def sound_segment(seed: int = 0, samples: int = 333) -> Segment:
    return Segment.from_audio(np.random.default_rng(seed).uniform(-0.3, 0.3, samples).astype(np.float32), 8000)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_generated_codes_take_turns_in_codebooks(save: Callable[[str], str], guidance: float) -> None:
    model = fused(save)
    prompts = [Document((Segment(text), sound_segment()), text) for text in ("one", "two", "six")]
    for seconds in (0.05, 0.0001):
        sampling = Sampling(max_seconds=seconds, guidance=guidance, temperature=3.0)
        for answer in answer_prompts(model, prompts, AUDIO, sampling):
            codes = answer.codes[answer.codes < 32]
            assert len(codes) % 2 == 0 and torch.equal(codes // 16, torch.arange(len(codes)) % 2)
            assert len(codes) <= max(2, seconds * 1000) and answer.segment.modality == AUDIO
            assert torch.isfinite(answer.log_probabilities).all()
    (image,) = answer_prompts(model, prompts[:1], IMAGE)
    assert len(image.codes) == 16 and image.segment.modality == IMAGE


def test_encoded_media_have_the_codes_of_training(save: Callable[[str], str]) -> None:
    model = fused(save)
    pixels = [np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8) for n in range(2)]
    document = Document((Segment.from_image(pixels[0]), sound_segment(0), Segment.from_image(pixels[1]), sound_segment(1, 50)))
    length = 2 + sum(segment_length(model, segment) for segment in document.segments)
    tokens = model.fill(assemble([[whole(document, length)]], model.vocabulary, model.tokenizer, length + 2))[0].numpy()
    images, audio = ([codes.values for codes in encode_media(document.segments[modality - 1 :: 2], modality, model, "00" * 16)]
                     for modality in (IMAGE, AUDIO))  # fmt: skip
    for found, modality in ((images, IMAGE), (audio, AUDIO)):
        ids = model.vocabulary.slices[modality]
        inside = tokens[(tokens >= ids.start) & (tokens < ids.stop) & (tokens != model.vocabulary.audio_end)]
        assert np.array_equal(inside - ids.start, np.concatenate(found))
    assert [len(codes) for codes in audio] == [42, 8], "whole frames of two codes"


def test_the_path_is_no_part_of_a_codec_but_its_weights_are(save: Callable[[str], str], tmp_path: Path) -> None:
    codec = make_codec(AudioCodecConfig(pretrained=save("Dac")))
    codec.model.save_pretrained(tmp_path / "copy")
    copy = make_codec(AudioCodecConfig(pretrained=str(tmp_path / "copy")))
    assert codec_fingerprint(codec) == codec_fingerprint(copy)
    assert codec_fingerprint(make_codec(replace(codec.config, codebooks=2))) != codec_fingerprint(codec)
    next(copy.parameters()).data += 1
    assert codec_fingerprint(codec) != codec_fingerprint(copy)


@pytest.mark.parametrize("audio", ["Dac", "Xcodec"])  # padding of the others reads numbers, which fake tensors do not have
def test_a_batch_on_a_gpu(save: Callable[[str], str], audio: str) -> None:
    model = fused(save, audio).train()
    assert not any(module.training for codec in model.codecs.values() for module in codec.model.modules())
    image = Segment.from_image(np.zeros((8, 8, 3), np.uint8))
    with fake_cuda("bf16-mixed"):
        model.to_empty(device="cuda")
        batch = batch_of(model, [[Segment("three"), image, sound_segment()], [sound_segment(1, 900), image]])
        assert not model.codec_loss(batch)
        losses = model(batch, predict=True)
        assert losses.keys() == {TEXT, IMAGE, AUDIO}
        check(*(loss.total for loss in losses.values()))
        check(model.codecs[AUDIO].decode(torch.zeros(6, dtype=torch.int64), [2, 4]))
