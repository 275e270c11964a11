"""Codecs of Hugging Face's transformers behind the interface of `codecs.py`, frozen.

    sounds: Mimi, DAC, EnCodec, X-Codec          pictures: the VQ models of Emu3 and Janus

A residual quantizer gives several codes a frame, one of each codebook. They stand one after another, each codebook with ids of
its own: with two codebooks of 1,024, the codes of two frames are `c0, 1024 + c1, c0', 1024 + c1'`. Each sound and each picture
is computed alone, so codes do not depend on the batch, and memory grows with one medium. Weights are safetensors only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pile_app.documents import MODALITIES
from pile_app.model.codec_configs import PICTURES, SOUNDS, AudioCodecConfig, ImageCodecConfig, Kinds, read_pretrained_config
from pile_app.model.codecs import AudioCodec, Codec, ImageCodec, Judge, without_gradient


def _load(path: str, kinds: Kinds) -> Any:
    """The model, frozen. On the meta device, without weights."""
    import transformers

    config = read_pretrained_config(path, kinds)
    name = kinds[config.model_type][0]
    make: Any = getattr(transformers, name)
    if torch.get_default_device().type == "meta":
        return make(config)
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    if kinds is PICTURES:
        options["key_mapping"] = {r"^(model\.)?vqmodel\.": ""}  # of a whole model
    try:
        model, found = make.from_pretrained(path, **options)
    except OSError as error:
        raise ValueError(f"pretrained={path!r} holds no weights as safetensors: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"pretrained={path!r} has no weights for {len(missing)} tensors of {name}, such as {missing[0]}")
    for module in model.modules():  # numbers that its padding computes with: on a GPU each would be waited for
        for name in ("stride", "kernel_size", "padding_total"):
            if (number := module._buffers.pop(name, None)) is not None:
                setattr(module, name, number)
    model.requires_grad_(False).eval()
    model.train = lambda mode=True: model  # it stays in evaluation mode
    return model


def save_codecs(codecs: Mapping[int, Codec], folder: Path, again: bool = True) -> None:
    """Write config and weights of pretrained codecs into `folder/<modality>_codec`; `again`: also if they are there."""
    for modality, codec in codecs.items():
        target = folder / f"{MODALITIES[modality]}_codec"
        if codec.config.pretrained and (again or not target.exists()):
            theirs: Any = codec.model
            theirs.save_pretrained(target.with_suffix(".tmp"))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(target.with_suffix(".tmp"), target)


def take_codecs(model: Any, folder: Path) -> None:
    """Let the pretrained codecs of a `model` section be read from where `save_codecs` wrote them."""
    for name in ("image", "audio"):
        if (folder / f"{name}_codec").is_dir() and model.get(name) and model[name].get("pretrained"):
            model[name]["pretrained"] = str(folder / f"{name}_codec")


class PretrainedAudioCodec(AudioCodec):
    """A sound codec of transformers. Its log-mel frames are those that `AudioCodec` has."""

    model: Any  # `PreTrainedModel`

    def build(self, config: AudioCodecConfig) -> None:
        self.model, self.codes = _load(str(config.pretrained), SOUNDS), config.levels[0] // config.codebooks

    @without_gradient
    def encode(self, audio: Tensor, tokens: Sequence[int] | Tensor) -> Tensor:
        """(A, samples_per_token) samples -> (A,) codes. `tokens`: a list does not wait for the device."""
        model, books = self.model, self.config.codebooks
        most = {"bandwidth": getattr(model.config, "target_bandwidths", [0])[-1]}  # of which the first codebooks are taken
        options = {"mimi": {"num_quantizers": books}, "dac": {"n_quantizers": books}}.get(model.config.model_type, most)
        parts = []
        for sound in audio.split(_on_host(tokens)):
            codes = model.encode(sound.reshape(1, 1, -1), **options).audio_codes.flatten(0, -2)[:books]  # (books, frames)
            parts.append((codes.T + self._offsets(codes)).flatten())
        return torch.cat(parts)

    @without_gradient
    def decode(self, codes: Tensor, tokens: Sequence[int] | Tensor) -> Tensor:
        """(A,) codes -> (A, samples_per_token) samples in [-1, 1]. Raises ValueError if codes are not in the order of their
        codebooks."""
        parts = []
        for one in codes.split(_on_host(tokens)):
            frames = one.view(-1, self.config.codebooks) - self._offsets(one)
            if one.device.type == "cpu" and (frames // self.codes).any():
                raise ValueError("codes of a sound are not in the order of the codec's codebooks")
            books = frames.T[None]  # (1, codebooks, frames)
            arguments = {"dac": (None, books), "encodec": (books[None], [None])}.get(self.model.config.model_type, (books,))
            sound = self.model.decode(*arguments).audio_values.flatten()
            missing = len(one) * self.config.samples_per_token - len(sound)  # negative where it is longer
            parts.append(nn.functional.pad(sound, (0, missing)).view(len(one), -1))
        return torch.cat(parts).clamp(-1, 1)

    def _offsets(self, codes: Tensor) -> Tensor:
        """(codebooks,) first id of each."""
        return torch.arange(self.config.codebooks, device=codes.device) * self.codes

    @without_gradient
    def loss(self, audio: Tensor, tokens: Tensor, judge: Judge | None = None) -> Tensor:
        """Mean absolute log-mel error of what it reconstructs, in nats; () float32."""
        return self.log_mel_distances(audio, self.decode(self.encode(audio, tokens), tokens), tokens).mean()


def _on_host(tokens: Sequence[int] | Tensor) -> list[int]:
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


class PretrainedImageCodec(ImageCodec):
    """A picture codec of transformers."""

    model: Any  # `PreTrainedModel`

    def build(self, config: ImageCodecConfig) -> None:
        self.model = _load(str(config.pretrained), PICTURES)

    @without_gradient
    def encode(self, images: Tensor) -> Tensor:
        """(N, C, height, width) uint8 -> (N, rows * columns) codes, row by row."""
        sizes = {"image_sizes": [images.shape[-2:]]} if self.model.config.model_type == "emu3_vqgan" else {}
        found = [self.model.encode(image[None], **sizes).image_tokens for image in images.float() / 127.5 - 1]
        return torch.stack([codes[0].flatten() if sizes else codes.flatten() for codes in found])

    def _pixels(self, codes: Tensor) -> Tensor:
        shape = self.grid if self.model.config.model_type == "emu3_vqgan" else (-1,)
        return torch.cat([self.model.decode(one.view(1, *shape)) for one in codes])

    @without_gradient
    def loss(self, images: Tensor, judge: Judge | None = None) -> Tensor:
        """Error as that of `ImageCodec`; () float32."""
        return self.error(self._pixels(self.encode(images)), images)


def make_codec(config: ImageCodecConfig | AudioCodecConfig | None) -> Any:
    """The codec of a config; None of none."""
    if config is None:
        return None
    if config.pretrained:
        return PretrainedImageCodec(config) if isinstance(config, ImageCodecConfig) else PretrainedAudioCodec(config)
    return ImageCodec(config) if isinstance(config, ImageCodecConfig) else AudioCodec(config)
