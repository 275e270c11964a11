"""Readers: a network reads the pixels or samples of given images and sounds. Its features are added to the embeddings of the
codes, which leave out details.

    images (N, C, height, width) uint8                 -> (N * codes, embedding width)
    sounds (A, samples_per_token) float32, A codes     -> (A, embedding width)

A reader sees a whole medium, so it must never read media whose codes are predicted: `data/assembly.py` lists the media that are
given. Features depend on their own medium only, and start at 0, so adding a reader does not change a model at first.

Notable choices: a small residual CNN with group norm and standardized kernels (arXiv:1912.11370), so without statistics of a
batch; its kernels are matrices, which Muon moves; on CPUs that multiply bfloat16 it computes in it, in half the time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.model.base import cpu_multiplies_bfloat16
from pile_app.model.codecs import Activation, AudioCodec, Block, Convolution, ImageCodec, prime_factors


@dataclass(frozen=True)
class ReaderConfig:
    """How given media of a modality are read, in addition to their codes.

    Args:
        path: folder or hub name of an encoder of transformers (CLIP, SigLIP, DINOv2; Whisper, Wav2Vec2), whose features go
            through a projector (LLaVA, arXiv:2304.08485); null: a CNN, trained from scratch.
        revision: branch, tag or commit on the hub.
        pretrained: load the encoder's weights; false: build it from its config with random weights.
        train: train the encoder's weights (at `optimizer.backbone_learning_rate`), not the projector alone.
        width: channels of the CNN's last stage; the two before it have a half and a quarter.
        blocks: residual blocks of each of the last two stages.
    """

    path: str | None = None
    revision: str = "main"
    pretrained: bool = True
    train: bool = False
    width: int = 128
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4 or self.blocks < 0:
            raise ValueError(f"a reader's width is a multiple of 4, its blocks 0 or more, not {self.width} and {self.blocks}")


@dataclass(frozen=True)
class ReadersConfig:
    """Readers of given media. Modalities without a codec get no reader.

    Args:
        image: reader of images; null: only codes are read.
        audio: reader of sounds; null: only codes are read.
    """

    image: ReaderConfig | None = None
    audio: ReaderConfig | None = None


class Reader(nn.Module, ABC):
    """Reads the media of one codec."""

    codec: Any

    def __init__(self, codec: ImageCodec | AudioCodec) -> None:
        super().__init__()
        self.__dict__["codec"] = codec  # which is no part of it

    @abstractmethod
    def forward(self, media: Tensor, tokens: Sequence[int]) -> Tensor:
        """(codes, embedding width) float32, of images or of sounds with `tokens` codes each."""

    def save_description(self, folder: Path) -> None:
        """Write what the reader can be built from without its weights, if a ReaderConfig does not say it all."""


def make_reader(config: ReaderConfig, codec: ImageCodec | AudioCodec, width: int) -> Reader:
    if config.path is None:
        return CNN(config, codec, width)
    return Pretrained(config, codec, width)


class CNN(Reader):
    """Convolutions in three stages, the last two with residual blocks; the strides between them lead to the grid of codes, or
    from frames to codes."""

    def __init__(self, config: ReaderConfig, codec: ImageCodec | AudioCodec, width: int) -> None:
        super().__init__(codec)
        if isinstance(codec, ImageCodec):
            channels, rest = codec.config.channels, 1
            rows, self.pool = divide(codec.config.patch, codec.config.size)
            columns = rows
        else:
            channels, rest, self.pool = 1, codec.config.mels, 1
            rows, columns = divide(codec.config.frames_per_token)[0][::-1], [2, 2, 2]
        sizes = [channels, config.width // 4, config.width // 2, config.width]
        layers: list[nn.Module] = []
        for stage in range(3):
            layers += [Activation(sizes[stage])] if stage else []
            layers += [Convolution(sizes[stage], sizes[stage + 1], rows[stage], columns[stage])]
            layers += [Block(sizes[stage + 1]) for _ in range(config.blocks if stage else 0)]
            rest = -(-rest // columns[stage])
        self.layers = nn.Sequential(*layers, Activation(config.width))
        self.out = nn.Linear(config.width * rest, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, media: Tensor, tokens: Sequence[int]) -> Tensor:
        codec, kind = self.codec, media.device.type
        is_half = kind == "cpu" and cpu_multiplies_bfloat16()
        with torch.autocast(kind, torch.bfloat16) if is_half else nullcontext():
            if isinstance(codec, ImageCodec):
                pixels = (media.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
                x = self.layers(pixels).permute(0, 2, 3, 1)  # (N, H, W, D)
                x = x.unflatten(2, (-1, self.pool)).unflatten(1, (-1, self.pool)).mean((2, 4))
                return self.out(x).flatten(0, 2).float()
            frames = codec.patches(media, torch.tensor(tokens, device=media.device))  # (codes, frames_per_token * mels)
            sounds = [sound.view(1, -1, codec.config.mels, 1).permute(0, 3, 1, 2) for sound in frames.split(list(tokens))]
            return self.out(torch.cat([self.layers(sound)[0].permute(1, 2, 0) for sound in sounds]).flatten(1)).float()


def divide(factor: int, size: int = 0) -> tuple[list[int], int]:
    """Three strides and how much is pooled after them, product `factor`: the last two strides are prime, or 1. Of images with
    `size` rows, the first leaves 32 rows or more."""
    primes = [1, 1, *prime_factors(factor)]
    first = pool = 1
    for prime in primes[:-2]:
        if size and size // (first * prime) < 32:
            pool *= prime
        else:
            first *= prime
    return [first, *primes[-2:]], pool


class Pretrained(Reader):
    """Features of an encoder of transformers, pooled to the grid of codes, through a projector.

    Encoders see the codec's pixels or samples, resized or resampled and normed as they were trained. They are read without
    dropout, each sound alone.
    """

    encoder: Any

    def __init__(self, config: ReaderConfig, codec: ImageCodec | AudioCodec, width: int) -> None:
        super().__init__(codec)
        try:
            from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel
        except ImportError as error:
            raise ValueError("readers with a path need transformers: pip install 'pile-app[huggingface]'") from error
        is_image = isinstance(codec, ImageCodec)
        known = KINDS[is_image]
        options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        try:
            shape = AutoConfig.from_pretrained(str(config.path), **options)
            shape = getattr(shape, "vision_config", shape) if is_image else shape
            if shape.model_type not in known:
                raise ValueError(f"a {shape.model_type} model is none of {', '.join(known)}")
            self.processor = (AutoImageProcessor if is_image else AutoFeatureExtractor).from_pretrained(config.path, **options)
            missing = list[str]()
            if not config.pretrained:
                encoder = AutoModel.from_config(shape)
            else:
                encoder, info = AutoModel.from_pretrained(
                    str(config.path),
                    config=shape,
                    dtype=torch.float32,
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
                missing = [name for name in info["missing_keys"] if "pooler" not in name and "masked_spec" not in name]
            if missing:
                raise ValueError(f"the file lacks {len(missing)} weights, such as {missing[0]}")
        except (OSError, ValueError) as error:
            raise ValueError(f"reader path={config.path!r} is no encoder of transformers that is known: {error}") from error
        self.encoder = encoder.get_encoder() if shape.model_type == "whisper" else encoder
        self.shape, self.trains = shape, config.train
        self.encoder.eval().requires_grad_(config.train)
        self.project = nn.Sequential(nn.Linear(shape.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.project[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.project[2].bias)  # type: ignore[arg-type]

    def save_description(self, folder: Path) -> None:
        self.shape.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def train(self, mode: bool = True) -> Pretrained:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, media: Tensor, tokens: Sequence[int]) -> Tensor:
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            if isinstance(self.codec, ImageCodec):
                features = self._look(media)
            else:
                sounds = zip(media.split(list(tokens)), tokens, strict=True)
                features = torch.cat([F.adaptive_avg_pool1d(self._listen(sound.flatten()).T, n).T for sound, n in sounds])
        return self.project(features).float()

    def _look(self, images: Tensor) -> Tensor:
        """(N, C, height, width) -> (N * codes, D)"""
        size = self.shape.image_size
        pixels = F.interpolate(images.float() / 255, (size, size), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.processor.image_mean, self.processor.image_std))
        hidden = self.encoder(pixel_values=(pixels.clamp(0, 1).expand(-1, 3, -1, -1) - mean) / std).last_hidden_state
        side = size // self.shape.patch_size
        grid = hidden[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))  # without class and register tokens
        return F.adaptive_avg_pool2d(grid.float(), self.codec.grid).flatten(2).transpose(1, 2).flatten(0, 1)

    def _listen(self, samples: Tensor) -> Tensor:
        """(S,) -> (frames, D)"""
        from torchaudio.functional import resample

        rate = self.processor.sampling_rate
        samples = resample(samples, self.codec.config.sample_rate, rate)
        if self.shape.model_type != "whisper":  # its first convolutions need some samples
            if self.processor.do_normalize:
                samples = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
            return self.encoder(F.pad(samples, (0, max(0, 800 - len(samples))))[None]).last_hidden_state[0]
        hop, window = self.processor.hop_length, self.processor.n_fft
        frames = 2 * self.shape.max_source_positions  # of a window: longer sounds are read in several
        padded = F.pad(samples, (0, -len(samples) % (frames * hop))).view(-1, frames * hop)
        spectrum = torch.stft(padded, window, hop, window=torch.hann_window(window, device=padded.device), return_complex=True)
        bands = torch.as_tensor(self.processor.mel_filters, dtype=torch.float32, device=padded.device)
        mel = (bands.T @ spectrum[..., :-1].abs().square()).clamp_min(1e-10).log10()
        mel = (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4
        hidden = self.encoder(mel).last_hidden_state.flatten(0, 1)
        return hidden[: max(1, -(-len(samples) // (2 * hop)))]


KINDS = {  # of encoders, by whether they read images
    True: ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit"),
    False: ("whisper", "wav2vec2", "hubert", "wavlm"),
}
