"""Codecs of Hugging Face's transformers behind the interface of `codecs.py`, frozen.

    sounds: Mimi, DAC, EnCodec, X-Codec          pictures: the VQ models of Emu3 and Janus

A residual quantizer gives several codes a frame, one of each codebook. They stand one after another, each codebook with ids of
its own: with two codebooks of 1,024, the codes of two frames are `c0, 1024 + c1, c0', 1024 + c1'`. Each sound and each picture
is computed alone, so codes do not depend on the batch, and memory grows with one medium. Weights are read from safetensors only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pile_app.documents import MODALITIES
from pile_app.model.codecs import AudioCodec, AudioCodecConfig, Codec, ImageCodec, ImageCodecConfig, without_gradient


class _Kind(NamedTuple):
    """What differs between models of transformers."""

    model: str  # class of transformers
    codes: str  # setting of their config: size of a codebook
    encode: Callable[[Any, Tensor, int], Tensor]  # model, one medium, codebooks -> codes
    decode: Callable[[Any, Tensor], Tensor]  # model, codes of one medium -> samples or pixels
    codebooks: str = ""  # setting: how many there are
    hop: str = ""  # setting: samples of a frame


SOUNDS = {
    "mimi": _Kind(
        "MimiModel",
        "codebook_size",
        lambda model, audio, codebooks: model.encode(audio, num_quantizers=codebooks).audio_codes,
        lambda model, codes: model.decode(codes).audio_values,
        "num_quantizers",
        "frame_size",
    ),
    "dac": _Kind(
        "DacModel",
        "codebook_size",
        lambda model, audio, codebooks: model.encode(audio, n_quantizers=codebooks).audio_codes,
        lambda model, codes: model.decode(audio_codes=codes).audio_values,
        "n_codebooks",
        "hop_length",
    ),
    "encodec": _Kind(
        "EncodecModel",
        "codebook_size",
        lambda model, audio, _: model.encode(audio, bandwidth=model.config.target_bandwidths[-1]).audio_codes,
        lambda model, codes: model.decode(codes[None], [None]).audio_values,
        "num_quantizers",
        "hop_length",
    ),
    "xcodec": _Kind(
        "XcodecModel",
        "codebook_size",
        lambda model, audio, _: model.encode(audio).audio_codes,
        lambda model, codes: model.decode(codes).audio_values,
        "num_quantizers",
        "hop_length",
    ),
}
PICTURES = {
    "emu3_vqgan": _Kind(
        "Emu3VQVAE",
        "codebook_size",
        lambda model, pixels, _: model.encode(pixels, image_sizes=[pixels.shape[-2:]]).image_tokens[0],
        lambda model, codes: model.decode(codes),
    ),
    "janus_vqgan": _Kind(
        "JanusVQVAE",
        "num_embeddings",
        lambda model, pixels, _: model.encode(pixels).image_tokens,
        lambda model, codes: model.decode(codes.flatten(1)),
    ),
}


def _read(path: str, kinds: dict[str, _Kind]) -> tuple[_Kind, Any]:
    """The config of a codec; of a whole model (Emu3, Janus) that of its codec. Raises ValueError if it is none of `kinds`."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError("pretrained codecs need transformers: pip install transformers, or the extra huggingface") from error
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained={path!r} is no codec of transformers: {error}") from error
    config = next((part for name in ("vq_config", "vq_vae_config") if (part := getattr(config, name, None))), config)
    if config.model_type not in kinds:
        known = ", ".join(kinds[name].model for name in kinds)
        raise ValueError(f"pretrained={path!r} is a {config.model_type}, which cannot encode and decode here: take {known}")
    return kinds[config.model_type], config


def describe_sound(config: AudioCodecConfig) -> dict[str, Any]:
    """The settings of an `AudioCodecConfig` that follow from its pretrained codec."""
    path, codebooks = str(config.pretrained), config.codebooks
    kind, theirs = _read(path, SOUNDS)
    rate = getattr(theirs, "sampling_rate", None) or theirs.sample_rate
    frame, most = int(getattr(theirs, kind.hop)), int(getattr(theirs, kind.codebooks))
    if getattr(theirs, "audio_channels", 1) != 1 or getattr(theirs, "chunk_length_s", None):
        raise ValueError(f"audio pretrained={path!r} takes stereo sounds in chunks: take a mono codec, such as encodec_24khz")
    possible = [count for count in range(1, most + 1) if frame % count == 0]
    if codebooks not in possible:
        raise ValueError(
            f"audio codebooks={codebooks}: {path!r} has {most} for frames of {frame} samples, which their number must divide: "
            f"set one of {possible}"
        )
    samples = frame // codebooks
    hop = next(hop for hop in range(min(samples, rate // 100), 0, -1) if samples % hop == 0)  # of the frames for readers
    return {
        "sample_rate": rate,
        "hop": hop,
        "window": hop * (2 * -(-rate // (50 * hop)) + 1),  # at least 40 ms
        "frames_per_token": samples // hop,
        "levels": (getattr(theirs, kind.codes) * codebooks,),
        "blocks": 0,
    }


def describe_picture(config: ImageCodecConfig) -> dict[str, Any]:
    """The settings of an `ImageCodecConfig` that follow from its pretrained codec."""
    kind, theirs = _read(str(config.pretrained), PICTURES)
    patch = 2 ** (len(theirs.channel_multiplier) - 1)
    side = getattr(theirs, "num_patches", None)
    if side and config.size != side * patch:
        raise ValueError(f"image size={config.size}: {config.pretrained!r} takes {side * patch} pixels, set it to that")
    return {"channels": 3, "patch": patch, "levels": (getattr(theirs, kind.codes),), "blocks": 0}


def _load(path: str, kinds: dict[str, _Kind]) -> tuple[_Kind, Any]:
    """The model, frozen. On the meta device, without weights."""
    import transformers

    kind, config = _read(path, kinds)
    made: Any = getattr(transformers, kind.model)
    if torch.get_default_device().type == "meta":
        return kind, made(config)
    names = {r"^(model\.)?(vqmodel|vision_model\.vq|vq)\w*\.": ""} if config.model_type in PICTURES else None
    try:
        options: dict[str, Any] = {"config": config, "dtype": torch.float32, "use_safetensors": True, "key_mapping": names}
        model, found = made.from_pretrained(path, output_loading_info=True, **options)
    except OSError as error:
        raise ValueError(f"pretrained={path!r} holds no weights as safetensors: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"pretrained={path!r} has no weights for {len(missing)} tensors of {kind.model}, such as {missing[0]}")
    for module in model.modules():  # numbers that its padding computes with: on a GPU each would be waited for
        for name in ("stride", "kernel_size", "padding_total"):
            if (number := module._buffers.pop(name, None)) is not None:
                setattr(module, name, number)
    return kind, model.requires_grad_(False).eval()


def save_codecs(codecs: Mapping[int, Codec], folder: Path, again: bool = True) -> None:
    """Write config and weights of pretrained codecs into `folder/<modality>_codec`; `again`: also if they are there."""
    for modality, codec in codecs.items():
        target = folder / f"{MODALITIES[modality]}_codec"
        if codec.is_frozen and (again or not target.exists()):
            codec.model.save_pretrained(target.with_suffix(".tmp"))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(target.with_suffix(".tmp"), target)


def take_codecs(model: Any, folder: Path) -> None:
    """Let the pretrained codecs of a `model` section be read from where `save_codecs` wrote them."""
    for name in ("image", "audio"):
        if (folder / f"{name}_codec").is_dir() and model.get(name) and model[name].get("pretrained"):
            model[name]["pretrained"] = str(folder / f"{name}_codec")


class PretrainedAudioCodec(AudioCodec):
    """A sound codec of transformers. Its log-mel frames are those that `AudioCodec` has."""

    is_frozen = True

    def build(self, config: AudioCodecConfig) -> None:
        self.kind, self.model = _load(str(config.pretrained), SOUNDS)

    def train(self, mode: bool = True) -> PretrainedAudioCodec:
        return super().train(False)

    @without_gradient
    def encode(self, audio: Tensor, tokens: Sequence[int] | Tensor) -> Tensor:
        """(A, samples_per_token) samples -> (A,) codes. `tokens`: a list does not wait for the device."""
        books = self.config.codebooks
        lengths = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        parts = []
        for sound in audio.split(lengths):
            codes = self.kind.encode(self.model, sound.reshape(1, 1, -1), books).flatten(0, -2)[:books].T  # (frames, books)
            parts.append((codes + self._offsets(codes.device)).flatten())
        return torch.cat(parts)

    @without_gradient
    def decode(self, codes: Tensor, tokens: Sequence[int] | Tensor) -> Tensor:
        """(A,) codes -> (A, samples_per_token) samples in [-1, 1]. Raises ValueError if codes are not in the order of their
        codebooks."""
        lengths = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        parts = []
        for one in codes.split(lengths):
            frames = one.view(-1, self.config.codebooks) - self._offsets(one.device)
            size = self.config.codes // self.config.codebooks
            if one.device.type != "cuda" and not ((frames >= 0) & (frames < size)).all():
                raise ValueError("codes of a sound are not in the order of the codec's codebooks")
            sound = self.kind.decode(self.model, frames.clamp(0, size - 1).T[None]).flatten()
            missing = len(one) * self.config.samples_per_token - len(sound)
            parts.append(nn.functional.pad(sound, (0, missing)).view(len(one), -1))  # cut where it is longer
        return torch.cat(parts).clamp(-1, 1)

    def _offsets(self, device: torch.device) -> Tensor:
        """(codebooks,) first id of each."""
        return torch.arange(self.config.codebooks, device=device) * (self.config.codes // self.config.codebooks)

    @without_gradient
    def loss(self, audio: Tensor, tokens: Tensor) -> Tensor:
        """Mean absolute log-mel error of what it reconstructs, in nats; () float32."""
        return self.log_mel_distances(audio, self.decode(self.encode(audio, tokens), tokens), tokens).mean()


class PretrainedImageCodec(ImageCodec):
    """A picture codec of transformers."""

    is_frozen = True

    def build(self, config: ImageCodecConfig) -> None:
        self.kind, self.model = _load(str(config.pretrained), PICTURES)

    def train(self, mode: bool = True) -> PretrainedImageCodec:
        return super().train(False)

    @without_gradient
    def encode(self, images: Tensor) -> Tensor:
        """(N, C, height, width) uint8 -> (N, rows * columns) codes, row by row."""
        pixels = images.float() / 127.5 - 1
        return torch.stack([self.kind.encode(self.model, image[None], 1).flatten() for image in pixels])

    def _pixels(self, codes: Tensor) -> Tensor:
        return torch.cat([self.kind.decode(self.model, one.view(1, *self.grid)) for one in codes])

    @without_gradient
    def loss(self, images: Tensor) -> Tensor:
        """Error as that of `ImageCodec`; () float32."""
        return self.error(self._pixels(self.encode(images)), images)
