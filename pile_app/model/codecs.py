"""Codecs: images and sounds to tokens and back, small CNNs around finite scalar quantization (FSQ, arXiv:2309.15505).

    images (N, C, height, width) uint8  <->  codes (N, rows * columns) int64
    sounds (M, S) float32, S samples    <->  codes (M, T) int64, T = ceil(S / samples_per_token)

A code is the mixed-radix number of its FSQ levels, so codes that differ in one level are neighbours; the language model shares
statistics among them (`FusedLanguageModel`). FSQ needs no code-book loss and no tricks against unused codes.

Notable choices: the image codec never convolves at full resolution (patches become channels first; on a CPU ten times cheaper);
every layer of the audio codec sees zeros past the end of a sound, so a sound's codes do not depend on what it is batched with;
the waveform comes from magnitudes and phases through an inverse STFT (Vocos, arXiv:2306.00814), no vocoder, no discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """

    size: int = 32
    channels: int = 3
    patch: int = 4
    levels: tuple[int, ...] = (8, 5, 5, 5)
    width: int = 64
    blocks: int = 2

    def __post_init__(self) -> None:
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
    """

    sample_rate: int = 16_000
    hop: int = 160
    window: int = 640
    mels: int = 80
    frames_per_token: int = 2
    levels: tuple[int, ...] = (8, 5, 5, 5)
    width: int = 128
    blocks: int = 4

    def __post_init__(self) -> None:
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


class FiniteScalarQuantizer(nn.Module):
    """FSQ: bounds each of d numbers, rounds it to one of L_i levels, gradients pass the rounding as if it were not there.

    Args:
        levels: L_1 .. L_d; `codes` = their product, `level_count` = their sum.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.codes, self.level_count = math.prod(levels), sum(levels)  # no tensors: planning builds models on the meta device
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """(..., d) any real numbers -> (..., d) quantized, in [-1, 1], float32 (half precision would move the borders)."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2)

    def to_codes(self, quantized: Tensor) -> Tensor:
        """(..., d) quantized -> (...) int64 codes."""
        middle = self.levels // 2
        return ((quantized * middle).round().long() + middle).mul(self.basis).sum(-1)

    def to_levels(self, codes: Tensor) -> Tensor:
        """(...) codes -> (..., d) int64 level of each dimension, 0 to L_i - 1."""
        return codes[..., None] // self.basis % self.levels

    def from_codes(self, codes: Tensor) -> Tensor:
        """(...) codes -> (..., d) quantized: the inverse of `to_codes`."""
        middle = self.levels // 2
        return (self.to_levels(codes) - middle) / middle


class _ResidualBlock(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        nn.init.zeros_(self[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ImageCodec(nn.Module):
    """Patches -> CNN -> FSQ -> CNN -> patches. Pixels are scaled to [-1, 1] inside.

    Args:
        config: its shape.
    """

    def __init__(self, config: ImageCodecConfig) -> None:
        super().__init__()
        self.config = config
        patch_width = config.channels * config.patch**2
        self.quantizer = FiniteScalarQuantizer(config.levels)
        dimensions = len(config.levels)
        blocks = [_ResidualBlock(config.width) for _ in range(2 * config.blocks)]
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(config.patch),
            nn.Conv2d(patch_width, config.width, 3, padding=1),
            *blocks[: config.blocks],
            nn.GroupNorm(8, config.width),
            nn.Conv2d(config.width, dimensions, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dimensions, config.width, 3, padding=1),
            *blocks[config.blocks :],
            nn.GroupNorm(8, config.width),
            nn.SiLU(),
            nn.Conv2d(config.width, patch_width, 3, padding=1),
            nn.PixelShuffle(config.patch),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of codes."""
        side = self.config.size // self.config.patch
        return side, side

    def patches(self, images: Tensor) -> Tensor:
        """(N, C, height, width) uint8 -> (N, rows * columns, C * patch^2) pixels that each code stands for, in [-1, 1]."""
        return F.pixel_unshuffle(images.float() / 127.5 - 1, self.config.patch).flatten(2).transpose(1, 2)

    def _quantize(self, images: Tensor) -> Tensor:
        pixels = images.float() / 127.5 - 1
        return self.quantizer(self.encoder(pixels).permute(0, 2, 3, 1))  # (N, rows, columns, d)

    def _reconstruct(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized.permute(0, 3, 1, 2))  # (N, C, height, width) in [-1, 1]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(N, C, height, width) uint8 -> (N, rows * columns) codes, row by row."""
        return self.quantizer.to_codes(self._quantize(images)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(N, rows * columns) codes -> (N, C, height, width) uint8."""
        pixels = self._reconstruct(self.quantizer.from_codes(codes).unflatten(1, self.grid))
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def loss(self, images: Tensor) -> Tensor:
        """Mean over pixels of absolute plus squared error, pixels in [-1, 1]; () float32."""
        target = images.float() / 127.5 - 1
        error = self._reconstruct(self._quantize(images)) - target
        return (error.abs() + error.square()).mean()


class _ConvNeXtBlock(nn.Module):
    """ConvNeXt for sequences (arXiv:2201.03545): depthwise convolution, then a feed-forward net at each place; (M, T, D)."""

    def __init__(self, width: int, kernel: int = 7) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 3 * width)
        self.contract = nn.Linear(3 * width, width)
        nn.init.zeros_(self.contract.weight)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        y = self.depthwise((x * inside).transpose(1, 2)).transpose(1, 2)
        return x + self.contract(F.gelu(self.expand(self.norm(y))))


class AudioCodec(nn.Module):
    """Log-mel frames -> CNN -> FSQ -> CNN -> magnitudes and phases -> inverse STFT.

    Args:
        config: its shape.
    """

    window: Tensor
    filterbank: Tensor
    FLOOR = 1e-3  # magnitudes below are silence: 16-bit noise is not to be reproduced

    def __init__(self, config: AudioCodecConfig) -> None:
        super().__init__()
        import torchaudio

        self.config = config
        width, bins, dimensions = config.width, config.window // 2 + 1, len(config.levels)
        with torch.device("cpu"):  # it looks at what it made, which the meta device does not have
            filterbank = torchaudio.functional.melscale_fbanks(
                bins, 0.0, config.sample_rate / 2, config.mels, config.sample_rate, norm="slaney", mel_scale="slaney"
            )
        self.register_buffer("filterbank", filterbank * config.sample_rate / config.window, persistent=False)  # sums to 1
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self.quantizer = FiniteScalarQuantizer(config.levels)
        self.embed = nn.Linear(config.mels * config.frames_per_token, width)
        self.encoder = nn.ModuleList(_ConvNeXtBlock(width) for _ in range(config.blocks))
        self.to_quantizer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dimensions))
        self.from_quantizer = nn.Conv1d(dimensions, width, 3, padding=1)
        self.decoder = nn.ModuleList(_ConvNeXtBlock(width) for _ in range(config.blocks))
        self.unfold = nn.Linear(width, width * config.frames_per_token)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * bins))
        self.frame_block = _ConvNeXtBlock(width)

    def spectrogram(self, audio: Tensor, window: int | None = None, hop: int | None = None) -> Tensor:
        """(M, S) samples -> (M, S / hop, bins) magnitudes; frames are centred on hops, no frame beyond the sound."""
        window, hop = window or self.config.window, hop or self.config.hop
        padded = F.pad(audio, ((window - hop) // 2, (window - hop) // 2))
        weights = self.window if window == self.config.window else torch.hann_window(window, device=audio.device)
        spectrum = torch.stft(padded, window, hop, window=weights, center=False, return_complex=True)
        # abs() of a complex zero has no gradient.
        return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt().transpose(1, 2)

    def log_mel(self, magnitudes: Tensor) -> Tensor:
        """(M, frames, bins) -> (M, frames, mels), natural logarithm, about 0 at full scale."""
        return ((magnitudes / (self.config.window / 4)) @ self.filterbank).clamp_min(self.FLOOR).log()

    def _fit(self, audio: Tensor, tokens: int) -> Tensor:
        """Samples cut or padded with silence to a whole number of tokens."""
        return F.pad(audio, (0, tokens * self.config.samples_per_token - audio.size(1)))

    def patches(self, audio: Tensor, tokens: Tensor) -> Tensor:
        """(M, S) samples, (M,) tokens of each sound -> (M, max tokens, frames_per_token * mels) the log-mel frames that each
        code stands for, in about [-1, 1]."""
        return self._group(self.log_mel(self.spectrogram(self._fit(audio, int(tokens.max())))))

    def _group(self, log_mel: Tensor) -> Tensor:
        frames = log_mel / -math.log(self.FLOOR) * 2 + 1
        return frames.unflatten(1, (-1, self.config.frames_per_token)).flatten(2)

    def _quantize(self, log_mel: Tensor, inside: Tensor) -> Tensor:
        x = self.embed(self._group(log_mel))  # (M, T, D)
        for block in self.encoder:
            x = block(x, inside)
        return self.quantizer(self.to_quantizer(x)) * inside  # (M, T, d)

    def _reconstruct(self, quantized: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """(M, T, d) -> magnitudes (M, frames, bins) and waveform (M, S)."""
        x = self.from_quantizer(quantized.transpose(1, 2)).transpose(1, 2)
        for block in self.decoder:
            x = block(x, inside)
        x = self.unfold(x).unflatten(2, (self.config.frames_per_token, -1)).flatten(1, 2)  # (M, frames, D)
        frames_inside = inside.repeat_interleave(self.config.frames_per_token, 1)
        x = self.frame_block(x, frames_inside)
        log_magnitude, real, imaginary = self.head(x).float().chunk(3, dim=-1)
        magnitude = log_magnitude.clamp(max=7).exp()
        length = (real.square() + imaginary.square() + 1e-6).sqrt()
        spectrum = torch.complex(magnitude * real / length, magnitude * imaginary / length)
        return magnitude, self._inverse_stft(spectrum, frames_inside)

    def _inverse_stft(self, spectrum: Tensor, inside: Tensor) -> Tensor:
        """(M, frames, bins) complex -> (M, frames * hop): overlap-add of windowed frames, divided by the windows' energy.
        `inside` (M, frames, 1): frames past the end of a sound weigh nothing, or they would sound in its last samples.

        `torch.istft` cannot pad this way (it wants a frame centred on the first sample).
        """
        window, hop = self.config.window, self.config.hop
        weights = self.window * inside  # (M, frames, window)
        size = (1, (weights.size(1) - 1) * hop + window)

        def overlap_add(parts: Tensor) -> Tensor:
            return F.fold(parts.transpose(1, 2), size, (1, window), stride=(1, hop)).flatten(1)

        samples = overlap_add(torch.fft.irfft(spectrum, window) * weights)
        trim = (window - hop) // 2
        return (samples / overlap_add(weights.square()).clamp_min(1e-3))[:, trim : size[1] - trim]

    @staticmethod
    def _inside(tokens: Tensor, longest: int) -> Tensor:
        """(M, T, 1) float, 1 within each sound."""
        return (torch.arange(longest, device=tokens.device) < tokens[:, None]).float()[..., None]

    @torch.no_grad()
    def encode(self, audio: Tensor, tokens: Tensor) -> Tensor:
        """(M, S) samples, (M,) tokens of each sound -> (M, max tokens) codes, valid up to each sound's tokens."""
        longest = int(tokens.max())
        log_mel = self.log_mel(self.spectrogram(self._fit(audio, longest)))
        return self.quantizer.to_codes(self._quantize(log_mel, self._inside(tokens, longest)))

    @torch.no_grad()
    def decode(self, codes: Tensor, tokens: Tensor) -> Tensor:
        """(M, T) codes, (M,) tokens of each -> (M, T * samples_per_token) samples, silent past each sound's end."""
        inside = self._inside(tokens, codes.size(1))
        _, waveform = self._reconstruct(self.quantizer.from_codes(codes) * inside, inside)
        return (waveform * inside.squeeze(2).repeat_interleave(self.config.samples_per_token, 1)).clamp(-1, 1)

    @torch.no_grad()
    def decode_magnitudes(self, codes: Tensor, tokens: Tensor) -> Tensor:
        """(M, T) codes -> (M, frames, bins) magnitudes, for Griffin-Lim as a check on the phases."""
        inside = self._inside(tokens, codes.size(1))
        magnitudes, _ = self._reconstruct(self.quantizer.from_codes(codes) * inside, inside)
        return magnitudes * inside.repeat_interleave(self.config.frames_per_token, 1)

    @torch.no_grad()
    def log_mel_distances(self, audio: Tensor, again: Tensor, tokens: Tensor) -> Tensor:
        """(F,) mean absolute difference over the mel bands, in nats, of each frame within the sounds, sound after sound.

        Args:
            audio: (M, S) samples.
            again: (M, max tokens * samples_per_token) what `decode` made of their codes.
            tokens: (M,) of each sound.
        """
        longest = int(tokens.max())
        bands, bands_again = (self.log_mel(self.spectrogram(self._fit(one, longest))) for one in (audio, again))
        inside = self._inside(tokens, longest).squeeze(2).repeat_interleave(self.config.frames_per_token, 1) > 0
        return (bands_again - bands).abs().mean(-1)[inside]

    def loss(self, audio: Tensor, tokens: Tensor) -> Tensor:
        """Log-mel error of the magnitudes, plus a multi-resolution STFT loss of the waveform (arXiv:1910.11480); () float32."""
        longest = max(2, int(tokens.max()))  # the largest window below takes two frames
        inside = self._inside(tokens, longest)
        audio = self._fit(audio, longest)
        target = self.log_mel(self.spectrogram(audio))
        magnitude, waveform = self._reconstruct(self._quantize(target, inside), inside)
        frames_inside = inside.repeat_interleave(self.config.frames_per_token, 1)
        per_frame = (self.log_mel(magnitude) - target).abs().mean(-1, keepdim=True)
        loss = (per_frame * frames_inside).sum() / frames_inside.sum()
        waveform = waveform * inside.squeeze(2).repeat_interleave(self.config.samples_per_token, 1)
        for scale in (0.5, 1.0, 2.0):
            window, hop = int(self.config.window * scale), int(self.config.hop * scale)
            made, real = self.spectrogram(waveform, window, hop), self.spectrogram(audio, window, hop)
            floor = self.FLOOR * window / 4
            log_error = (made.clamp_min(floor).log() - real.clamp_min(floor).log()).abs().mean()
            convergence = (made - real).norm() / real.norm().clamp_min(1e-5)
            loss = loss + (log_error + convergence) / 3
        return loss
