"""Codecs: images and sounds to tokens and back, small CNNs around finite scalar quantization (FSQ, arXiv:2309.15505).

    images (N, C, height, width) uint8                                   <->  codes (N, rows * columns) int64
    M sounds (A, samples_per_token) float32, A codes, sound after sound  <->  codes (A,) int64

A code is the mixed-radix number of its FSQ levels, so codes that differ in one level are neighbours. FSQ needs no extra loss.

Notable choices: the image codec never convolves at full resolution, and has fewer channels where there are more positions;
sounds form one row, with gaps of silence that no layer reaches across, so a sound's codes do not depend on its batch and memory
grows with the seconds in it; the waveform comes from magnitudes and phases through an inverse STFT (Vocos, arXiv:2306.00814).
Codecs compute in float32 without TF32 whatever the run does: rounding would move codes across the borders of their levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig

View = tuple[Tensor, Tensor, Tensor]  # real and made (N, C, H, W) for a discriminator; (H, 1) 1 in rows that count
Judge = Callable[[Sequence[View]], Tensor]  # loss of an adversary, see `discriminators.py`


def in_full_precision(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a method of a codec compute in float32, without autocast and TF32."""

    @wraps(method)
    def call(codec: nn.Module, media: Tensor, *arguments: Any) -> Tensor:
        cuda: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
        flags = cuda if media.device.type == "cuda" else ()
        before = [flag.fp32_precision for flag in flags]
        try:
            for flag in flags:
                flag.fp32_precision = "ieee"
            with torch.autocast(media.device.type, enabled=False):
                return method(codec, media, *arguments)
        finally:
            for flag, precision in zip(flags, before, strict=True):
                flag.fp32_precision = precision

    return call


def without_gradient(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.no_grad()(in_full_precision(method))


class FiniteScalarQuantizer(nn.Module):
    """FSQ: bounds each of d numbers and rounds it to L_i levels; gradients pass the rounding unchanged."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.sizes, self.codes = tuple(levels), math.prod(levels)
        self.register_buffer("levels", torch.empty(len(levels), dtype=torch.int64), persistent=False)
        self.register_buffer("basis", torch.empty(len(levels), dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.levels.copy_(torch.tensor(self.sizes))
        self.basis.copy_(torch.tensor([1, *self.sizes[:-1]]).cumprod(0))

    def forward(self, z: Tensor) -> Tensor:
        """(..., d) any real numbers -> (..., d) quantized, in [-1, 1], float32."""
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


class Convolution(nn.Linear):
    """(N, C, H, W) -> (N, D, H / rows, W / columns), without bias. The kernel is a matrix (D, height * width * C) with
    standardized rows (arXiv:1903.10520), which Muon moves."""

    def __init__(self, inputs: int, outputs: int, rows: int = 1, columns: int = 1) -> None:
        self.stride, self.kernel = (rows, columns), tuple(max(3, step) for step in (rows, columns))
        self.padding = tuple((size - step + 1) // 2 for size, step in zip(self.kernel, self.stride, strict=True))
        super().__init__(inputs * math.prod(self.kernel), outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.layer_norm(self.weight, (self.in_features,)) * self.in_features**-0.5
        kernel = weight.unflatten(1, (*self.kernel, -1)).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding)


class Activation(nn.GroupNorm):
    """Norm over groups of channels of each medium, then ReLU or SiLU; (N, C, H, W)."""

    def __init__(self, channels: int, function: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__(math.gcd(8, channels), channels)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(super().forward(x))


class Block(nn.Sequential):
    def __init__(self, width: int, function: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__(*(part for _ in range(2) for part in (Activation(width, function), Convolution(width, width))))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def prime_factors(number: int) -> list[int]:
    for prime in range(2, number):
        if number % prime == 0:
            return [prime, *prime_factors(number // prime)]
    return [number] if number > 1 else []


class ImageCodec(nn.Module):
    """Pixels -> CNN in stages, each with a stride -> FSQ -> CNN in stages -> pixels, which are scaled to [-1, 1] inside."""

    def __init__(self, config: ImageCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = (config.size // config.patch,) * 2  # (rows, columns) of codes
        self.build(config)

    def build(self, config: ImageCodecConfig) -> None:
        self.quantizer = FiniteScalarQuantizer(config.levels)
        width, dimensions, strides = config.width, len(config.levels), prime_factors(config.patch) or [1]
        widths = [config.channels, *(min(width, max(16, width >> n)) for n in reversed(range(len(strides))))]
        encoder, decoder = list[nn.Module](), list[nn.Module]()
        for stride, outside, inside in zip(strides, widths, widths[1:], strict=False):
            # Standardized kernels do not see flat areas, and cannot write them.
            plain = partial(nn.Conv2d, kernel_size=3, padding=1)
            convolution: Callable[[int, int], nn.Module] = Convolution if encoder else plain
            encoder += [nn.PixelUnshuffle(stride), convolution(outside * stride**2, inside), Activation(inside, F.silu)]
            decoder = [Activation(inside, F.silu), convolution(inside, outside * stride**2), nn.PixelShuffle(stride), *decoder]
        encoder[-1:] = [
            *(Block(width, F.silu) for _ in range(config.blocks)),
            Activation(width, F.silu),
            nn.Conv2d(width, dimensions, 1),
        ]
        begin = nn.Conv2d(dimensions, width, 3, padding=1)
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(begin, *(Block(width, F.silu) for _ in range(config.blocks)), *decoder)

    def _quantize(self, images: Tensor) -> Tensor:
        pixels = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return self.quantizer(self.encoder(pixels).permute(0, 2, 3, 1))  # (N, rows, columns, d)

    def _reconstruct(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized.permute(0, 3, 1, 2))  # (N, C, height, width) in [-1, 1]

    @without_gradient
    def encode(self, images: Tensor) -> Tensor:
        """(N, C, height, width) uint8 -> (N, rows * columns) codes, row by row."""
        return self.quantizer.to_codes(self._quantize(images)).flatten(1)

    @without_gradient
    def decode(self, codes: Tensor) -> Tensor:
        """(N, rows * columns) codes -> (N, C, height, width) uint8."""
        return ((self._pixels(codes).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _pixels(self, codes: Tensor) -> Tensor:
        return self._reconstruct(self.quantizer.from_codes(codes).unflatten(1, self.grid))

    @in_full_precision
    def loss(self, images: Tensor, judge: Judge | None = None) -> Tensor:
        """Mean over pixels of absolute plus squared error, pixels in [-1, 1], plus what `judge` says; () float32."""
        made = self._reconstruct(self._quantize(images))
        loss = self.error(made, images)
        if judge is None:
            return loss
        return loss + judge([(images.float() / 127.5 - 1, made, made.new_ones(1, 1))])

    def error(self, pixels: Tensor, images: Tensor) -> Tensor:
        error = pixels - (images.float() / 127.5 - 1)
        return (error.abs() + error.square()).mean()


def mirror_and_shift(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror half of the images and shift all by up to an eighth of their size, repeating edges; (N, 3) draws in [0, 1)."""
    size, reach = images.size(-1), images.size(-1) // 8
    shifts = (draws[:, :2] * (2 * reach + 1)).long() - reach
    places = torch.arange(size, device=images.device) + shifts[..., None]  # (N, 2, size)
    rows, columns = places.clamp(0, size - 1).unbind(1)
    columns = torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    return moved.gather(3, columns[:, None, None].expand_as(images))


class _ConvNeXtBlock(nn.Module):
    """ConvNeXt for sequences (arXiv:2201.03545): depthwise convolution, then a feed-forward net at each position; (N, T, D)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 3 * width)
        self.contract = nn.Linear(3 * width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.contract.weight)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        y = self.depthwise((x * inside).transpose(1, 2)).transpose(1, 2)
        return x + self.contract(F.gelu(self.expand(self.norm(y))))


class AudioCodec(nn.Module):
    """Log-mel frames -> CNN -> FSQ -> CNN -> magnitudes and phases -> inverse STFT.

    Sounds are ragged: `audio` (A, samples_per_token) holds the samples of each code, sound after sound, the last code of each
    padded with silence; `tokens` (M,) is the number of codes of each sound, A together.
    """

    window: Tensor
    filterbank: Tensor
    FLOOR = 1e-3  # magnitudes below are silence: 16-bit noise is not to be reproduced
    KERNEL = 7
    SLICE = 2048  # codes that are encoded or decoded at a time: bounds the memory of spectrograms

    def __init__(self, config: AudioCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("filterbank", torch.empty(config.window // 2 + 1, config.mels), persistent=False)
        self.register_buffer("window", torch.empty(config.window), persistent=False)
        self.build(config)
        # Codes of silence between sounds, more than a convolution or half of the loss's longest window reaches; and what all
        # layers reach together.
        self.gap = max(self.KERNEL // 2, -(-config.window // config.samples_per_token))
        self.reach = self.KERNEL // 2 * (config.blocks + 2) + 2 * self.gap
        self.reset_parameters()

    def build(self, config: AudioCodecConfig) -> None:
        width, bins, dimensions = config.width, config.window // 2 + 1, len(config.levels)
        self.quantizer = FiniteScalarQuantizer(config.levels)
        self.embed = nn.Linear(config.mels * config.frames_per_token, width)
        self.encoder = nn.ModuleList(_ConvNeXtBlock(width, self.KERNEL) for _ in range(config.blocks))
        self.to_quantizer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dimensions))
        self.from_quantizer = nn.Conv1d(dimensions, width, 3, padding=1)
        self.decoder = nn.ModuleList(_ConvNeXtBlock(width, self.KERNEL) for _ in range(config.blocks))
        self.unfold = nn.Linear(width, width * config.frames_per_token)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * bins))
        self.frame_block = _ConvNeXtBlock(width, self.KERNEL)

    def reset_parameters(self) -> None:
        import torchaudio

        rate, (bins, mels) = self.config.sample_rate, self.filterbank.shape
        with torch.device("cpu"):  # it reads what it made, which the meta device cannot
            weights = torchaudio.functional.melscale_fbanks(bins, 0.0, rate / 2, mels, rate, norm="slaney", mel_scale="slaney")
            self.window.copy_(torch.hann_window(self.config.window))
        self.filterbank.copy_(weights * rate / self.config.window)  # sums to 1

    def _row(self, codes: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(A, ...) values of each code -> (R, ...) one row with zeros between sounds, R = A + (M + 1) * gap; (R, 1) 1 inside
        sounds; (A,) index of each code in the row. Does not wait for the device."""
        device, size = codes.device, len(codes) + (len(tokens) + 1) * self.gap
        sounds = torch.arange(len(tokens), device=device).repeat_interleave(tokens, output_size=len(codes))
        indices = torch.arange(len(codes), device=device) + (sounds + 1) * self.gap
        inside = torch.zeros(size, 1, device=device).index_fill_(0, indices, 1.0)
        return codes.new_zeros(size, *codes.shape[1:]).index_copy_(0, indices, codes), inside, indices

    def _in_slices(self, function: Callable[[Tensor, Tensor], Tensor], row: Tensor, inside: Tensor) -> Tensor:
        """`function` of (R, ...) and `inside`, computed on slices that overlap by all that its layers reach."""
        parts = []
        for first in range(0, len(row), self.SLICE):
            low, high = max(0, first - self.reach), min(len(row), first + self.SLICE + self.reach)
            part = function(row[low:high], inside[low:high])
            parts.append(part[first - low : first - low + self.SLICE].clone())  # not a view, which would keep the rest
        return torch.cat(parts)

    def _map(self, function: Callable[[Tensor, Tensor], Tensor], values: Tensor, tokens: Tensor) -> Tensor:
        """`function` of (A, ...) values of each code in their row -> (A, ...)."""
        row, inside, indices = self._row(values, tokens)
        return self._in_slices(function, row, inside)[indices]

    def spectrogram(self, audio: Tensor, window: int | None = None, hop: int | None = None) -> Tensor:
        """(S,) samples -> (S / hop, bins) magnitudes; frames are centred on hops, no frame beyond the sound."""
        window, hop = window or self.config.window, hop or self.config.hop
        padded = F.pad(audio, ((window - hop) // 2, (window - hop) // 2))
        weights = self.window if window == self.config.window else torch.hann_window(window, device=audio.device)
        spectrum = torch.stft(padded, window, hop, window=weights, center=False, return_complex=True)
        # abs() of a complex zero has no gradient.
        return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt().T

    def log_mel(self, magnitudes: Tensor) -> Tensor:
        """(frames, bins) -> (frames, mels), natural logarithm, about 0 at full scale."""
        return ((magnitudes / (self.config.window / 4)) @ self.filterbank).clamp_min(self.FLOOR).log()

    def _patches(self, row: Tensor, inside: Tensor) -> Tensor:
        """(R, samples_per_token) -> (R, frames_per_token * mels) log-mel frames of each code, in about [-1, 1]."""
        frames = self.log_mel(self.spectrogram(row.flatten())) / -math.log(self.FLOOR) * 2 + 1
        return frames.view(len(row), -1)

    def _quantize(self, patches: Tensor, inside: Tensor) -> Tensor:
        """(R, frames_per_token * mels) -> (R, d) quantized, 0 outside of sounds."""
        x = self.embed(patches)[None]  # (1, R, D)
        for block in self.encoder:
            x = block(x, inside)
        return self.quantizer(self.to_quantizer(x[0])) * inside

    def _synthesize(self, quantized: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """(R, d) -> magnitudes (frames, bins) and samples (R, samples_per_token), silent outside of sounds."""
        x = self.from_quantizer(quantized.T[None]).transpose(1, 2)
        for block in self.decoder:
            x = block(x, inside)
        x = self.unfold(x).view(1, len(quantized) * self.config.frames_per_token, -1)  # (1, frames, D)
        frames_inside = inside.repeat_interleave(self.config.frames_per_token, 0)
        x = self.frame_block(x, frames_inside)
        log_magnitude, real, imaginary = self.head(x[0]).float().chunk(3, dim=-1)
        magnitude = log_magnitude.clamp(max=7).exp()
        length = (real.square() + imaginary.square() + 1e-6).sqrt()
        spectrum = torch.complex(magnitude * real / length, magnitude * imaginary / length)
        return magnitude, self._inverse_stft(spectrum, frames_inside).view(len(inside), -1) * inside

    def _inverse_stft(self, spectrum: Tensor, inside: Tensor) -> Tensor:
        """(frames, bins) complex -> (frames * hop,): overlap-add of windowed frames, divided by the windows' energy.
        `inside` (frames, 1): frames outside of sounds weigh nothing, or they would be heard at a sound's edges.

        `torch.istft` cannot pad this way (it wants a frame centred on the first sample).
        """
        window, hop = self.config.window, self.config.hop
        weights = self.window * inside  # (frames, window)
        size = (1, (len(weights) - 1) * hop + window)

        def overlap_add(parts: Tensor) -> Tensor:
            return F.fold(parts.T[None], size, (1, window), stride=(1, hop)).flatten()

        samples = overlap_add(torch.fft.irfft(spectrum, window) * weights)
        trim = (window - hop) // 2
        return (samples / overlap_add(weights.square()).clamp_min(1e-3))[trim : size[1] - trim]

    @without_gradient
    def patches(self, audio: Tensor, tokens: Tensor) -> Tensor:
        """(A, samples_per_token) -> (A, frames_per_token * mels) log-mel frames that each code represents, in about [-1, 1]."""
        return self._map(self._patches, audio, tokens)

    @without_gradient
    def encode(self, audio: Tensor, tokens: Tensor) -> Tensor:
        """(A, samples_per_token) samples -> (A,) codes."""
        quantized = self._map(lambda row, inside: self._quantize(self._patches(row, inside), inside), audio, tokens)
        return self.quantizer.to_codes(quantized)

    @without_gradient
    def decode(self, codes: Tensor, tokens: Tensor) -> Tensor:
        """(A,) codes -> (A, samples_per_token) samples in [-1, 1]."""
        quantized = self.quantizer.from_codes(codes)
        return self._map(lambda row, inside: self._synthesize(row, inside)[1], quantized, tokens).clamp(-1, 1)

    @without_gradient
    def decode_magnitudes(self, codes: Tensor, tokens: Tensor) -> Tensor:
        """(A,) codes -> (A, frames_per_token, bins) magnitudes, for Griffin-Lim as a check on the phases."""
        quantized = self.quantizer.from_codes(codes)
        return self._map(lambda row, inside: self._synthesize(row, inside)[0].unflatten(0, (len(row), -1)), quantized, tokens)

    @without_gradient
    def log_mel_distances(self, audio: Tensor, again: Tensor, tokens: Tensor) -> Tensor:
        """(A * frames_per_token,) mean absolute difference over the mel bands, in nats, of each frame of two versions."""
        difference = self.patches(again, tokens) - self.patches(audio, tokens)
        return difference.abs().unflatten(1, (self.config.frames_per_token, -1)).mean(-1).flatten() * -math.log(self.FLOOR) / 2

    @in_full_precision
    def loss(self, audio: Tensor, tokens: Tensor, judge: Judge | None = None) -> Tensor:
        """Log-mel error of the magnitudes plus a multi-resolution STFT loss of the waveform (arXiv:1910.11480); () float32.

        Mean over the codes, each weighted alike: the losses of two batches average to that of both, by their numbers of codes.
        """
        row, inside, indices = self._row(audio, tokens)
        sounds = torch.arange(len(tokens), device=row.device).repeat_interleave(tokens, output_size=len(audio))
        sound_of_row = sounds.new_zeros(len(row)).index_copy(0, indices, sounds)
        frames_inside = inside.repeat_interleave(self.config.frames_per_token, 0)
        with torch.no_grad():
            patches = self._in_slices(self._patches, row, inside)
            target = (patches.view(-1, self.config.mels) - 1) * -math.log(self.FLOOR) / 2
        magnitude, waveform = self._synthesize(self._quantize(patches, inside), inside)
        views: list[View] = []
        loss = ((self.log_mel(magnitude) - target).abs() * frames_inside).sum() / (len(audio) * patches.size(1))
        for scale in (0.5, 1.0, 2.0):
            window, hop = int(self.config.window * scale), int(self.config.hop * scale)
            if self.config.samples_per_token % hop:  # or frames would depend on where a sound begins in the row
                hop = self.config.hop
            made, real = (self.spectrogram(samples.flatten(), window, hop) for samples in (waveform, row))
            code = torch.arange(len(made), device=row.device) * hop // self.config.samples_per_token  # of each frame
            floor, of_frame = self.FLOOR * window / 4, inside[code]
            log_made, log_real = made.clamp_min(floor).log(), real.clamp_min(floor).log()
            log_error = ((log_made - log_real).abs() * of_frame).sum()
            views.append((log_real[None, None], log_made[None, None], of_frame))
            energies = torch.stack([(made - real).square().sum(1), real.square().sum(1)], 1) * of_frame
            of_sound = energies.new_zeros(len(tokens), 2).index_add(0, sound_of_row[code], energies) + 1e-10
            convergence = (tokens * (of_sound[:, 0] / of_sound[:, 1]).sqrt()).sum() / len(audio)
            loss = loss + (log_error / (audio.numel() / hop * made.size(1)) + convergence) / 3
        return loss if judge is None else loss + judge(views)


Codec = ImageCodec | AudioCodec
