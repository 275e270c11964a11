"""Shapes of the codecs of images and sounds: own ones, and those that follow from a pretrained codec of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# By type in `config.json`: the class, and the settings that hold the number of codebooks and the samples of a frame.
SOUNDS = {
    "mimi": ("MimiModel", "num_quantizers", "frame_size"),
    "dac": ("DacModel", "n_codebooks", "hop_length"),
    "encodec": ("EncodecModel", "num_quantizers", "hop_length"),
    "xcodec": ("XcodecModel", "num_quantizers", "hop_length"),
}
PICTURES = {"emu3_vqgan": ("Emu3VQVAE", "codebook_size"), "janus_vqgan": ("JanusVQVAE", "num_embeddings")}
Kinds = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class ImageCodecConfig:
    """Shape of the image codec.

    Args:
        size: pixels; every image is resized and centre-cropped to `size` x `size`.
        channels: 1 (grey) or 3 (colour).
        patch: pixels a side that become one code; has to divide `size`.
        levels: FSQ levels of each dimension; their product is the number of codes.
        width: channels of the convolutions.
        blocks: residual blocks of the encoder, and of the decoder.
        pretrained: folder or hub name of Emu3's or Janus's VQ model, used as it is; all but `size` follows from it.
    """

    size: int = 32
    channels: int = 3
    patch: int = 4
    levels: tuple[int, ...] = (8, 5, 5, 5)
    width: int = 64
    blocks: int = 2
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if self.pretrained:
            vars(self).update(_describe(self))
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(f"image patch={self.patch} must divide size={self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"image channels must be 1 (grey) or 3 (colour), not {self.channels}")
        if self.width % 8:
            raise ValueError(f"image codec width={self.width} must be a multiple of 8 (group normalization)")
        check_levels(self.levels)


@dataclass(frozen=True)
class AudioCodecConfig:
    """Shape of the audio codec.

    Args:
        sample_rate: Hz; every sound is resampled to it.
        hop: samples between spectrogram frames.
        window: samples of a spectrogram's window (its n_fft).
        mels: mel bands the encoder sees.
        frames_per_token: spectrogram frames that one code stands for: `sample_rate / hop / frames_per_token` codes a second.
        levels: FSQ levels of each dimension; their product is the number of codes.
        width: channels of the convolutions.
        blocks: ConvNeXt blocks of the encoder, and of the decoder.
        pretrained: folder or hub name of a Mimi, DAC, EnCodec or X-Codec model, used as it is; all but `mels` follows from it.
        codebooks: of the pretrained codec, from the first on: so many codes a frame.
    """

    sample_rate: int = 16_000
    hop: int = 160
    window: int = 640
    mels: int = 80
    frames_per_token: int = 2
    levels: tuple[int, ...] = (8, 5, 5, 5)
    width: int = 128
    blocks: int = 4
    pretrained: str | None = None
    codebooks: int = 1

    def __post_init__(self) -> None:
        if self.pretrained:
            vars(self).update(_describe(self))
        elif self.codebooks != 1:
            raise ValueError(f"audio codebooks={self.codebooks}: several codes a frame need a pretrained codec")
        if self.window < 2 * self.hop or (self.window - self.hop) % 2:
            raise ValueError(f"audio window={self.window} must be at least twice hop={self.hop}, and their difference even")
        if self.frames_per_token < 1:
            raise ValueError(f"audio frames_per_token must be at least 1, not {self.frames_per_token}")
        check_levels(self.levels)

    @property
    def samples_per_token(self) -> int:
        return self.hop * self.frames_per_token


def check_levels(levels: Sequence[int]) -> None:
    if not levels or min(levels) < 3:
        raise ValueError(f"FSQ needs at least 3 levels in each dimension, not {list(levels)}")


def read_pretrained_config(path: str, kinds: Kinds) -> Any:
    """The config of a codec; of a whole model (Emu3, Janus) that of its codec. Raises ValueError if it is none of `kinds`."""
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path)
    except ImportError as error:
        raise ValueError("pretrained codecs need transformers: pip install transformers, or the extra huggingface") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"pretrained={path!r} is no codec of transformers: {error}") from error
    config = getattr(config, "vq_config", config)
    if config.model_type not in kinds:
        known = ", ".join(kind[0] for kind in kinds.values())
        raise ValueError(f"pretrained={path!r} is a {config.model_type}, which cannot encode and decode here: take {known}")
    return config


def _describe(config: ImageCodecConfig | AudioCodecConfig) -> dict[str, Any]:
    """The settings of a codec that follow from the pretrained one. Raises ValueError if they cannot be."""
    path = str(config.pretrained)
    if isinstance(config, ImageCodecConfig):
        theirs = read_pretrained_config(path, PICTURES)
        patch, side = 2 ** (len(theirs.channel_multiplier) - 1), getattr(theirs, "num_patches", None)
        if side and config.size != side * patch:
            raise ValueError(f"image size={config.size}: {path!r} takes {side * patch} pixels, set it to that")
        return {"channels": 3, "patch": patch, "levels": (getattr(theirs, PICTURES[theirs.model_type][1]),), "blocks": 0}
    theirs, codebooks = read_pretrained_config(path, SOUNDS), config.codebooks
    rate = getattr(theirs, "sampling_rate", None) or theirs.sample_rate
    most, frame = (int(getattr(theirs, name)) for name in SOUNDS[theirs.model_type][1:])
    if getattr(theirs, "audio_channels", 1) != 1 or getattr(theirs, "chunk_length_s", None):
        raise ValueError(f"audio pretrained={path!r} takes stereo sounds in chunks: take a mono codec, such as encodec_24khz")
    possible = [count for count in range(1, most + 1) if frame % count == 0]
    if codebooks not in possible:
        raise ValueError(f"audio codebooks={codebooks}: {path!r} has frames of {frame} samples: set one of {possible}")
    samples = frame // codebooks
    hop = next(hop for hop in range(min(samples, rate // 100), 0, -1) if samples % hop == 0)
    window = hop * (2 * -(-rate // (50 * hop)) + 1)  # at least 40 ms
    spectrogram = {"hop": hop, "window": window, "frames_per_token": samples // hop}  # for readers
    return {"sample_rate": rate, "levels": (theirs.codebook_size * codebooks,), "blocks": 0} | spectrogram
