"""The promises of `model/codecs.py`: codes go there and back, and depend on their own medium only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.codecs import AudioCodec, FiniteScalarQuantizer, ImageCodec, mirror_and_shift

LEVELS = [(3,), (4,), (8, 5, 5, 5), (5, 7, 3), (4, 6, 8), (3, 4), (16, 3)]
AUDIO = AudioCodecConfig(
    sample_rate=8000, hop=80, window=320, mels=20, frames_per_token=2, levels=(5, 4, 3), width=16, blocks=2
)


def image_codec(channels: int = 3, size: int = 16, patch: int = 4, width: int = 16) -> ImageCodec:
    torch.manual_seed(0)
    codec = ImageCodec(ImageCodecConfig(size, channels, patch, levels=(5, 4, 3), width=width, blocks=1))
    perturb(codec)
    return codec


def audio_codec(config: AudioCodecConfig = AUDIO) -> AudioCodec:
    torch.manual_seed(0)
    codec = AudioCodec(config)
    perturb(codec)
    return codec


def perturb(codec: torch.nn.Module) -> None:
    """As they are made, the blocks are the identity."""
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    codec.eval()


def images(count: int, channels: int = 3, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def sounds(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(A, samples_per_token) tones in noise, (M,) tokens."""
    generator, rows = torch.Generator().manual_seed(2), []
    for number, length in enumerate(lengths):
        tone = torch.sin(torch.arange(length) * (0.1 + 0.2 * number))
        sound = 0.4 * tone + 0.1 * torch.randn(length, generator=generator)
        rows.append(F.pad(sound, (0, -length % AUDIO.samples_per_token)).view(-1, AUDIO.samples_per_token))
    return torch.cat(rows), torch.tensor([len(row) for row in rows])


# Quantizer


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_comes_back_from_its_quantized_vector(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    codes = torch.arange(quantizer.codes)
    assert quantizer.codes == math.prod(levels)
    quantized = quantizer.from_codes(codes)
    assert quantized.shape == (len(codes), len(levels)) and quantized.abs().max() <= 1
    assert len(quantized.unique(dim=0)) == len(codes)
    assert torch.equal(quantizer.to_codes(quantized), codes)
    of_levels = quantizer.to_levels(codes)
    assert (of_levels >= 0).all() and (of_levels < torch.tensor(levels)).all()
    assert torch.equal((of_levels * quantizer.basis).sum(-1), codes)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_encoder_can_reach_every_code_and_no_other(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    sweep = torch.linspace(-30, 30, 20001)[:, None].expand(-1, len(levels))
    reached = quantizer.to_levels(quantizer.to_codes(quantizer(sweep)))
    for dimension, count in enumerate(levels):
        assert reached[:, dimension].unique().tolist() == list(range(count))
        assert (reached[:, dimension].diff() >= 0).all(), "neighbouring numbers have neighbouring levels"
    near_zero = torch.tensor([[-0.01], [0.01]]).expand(-1, len(levels))
    assert not quantizer(near_zero).any(), "an encoder that begins near zero begins in the middle of a level"


@settings(deadline=None)
@given(st.sampled_from(LEVELS), st.integers(0, 2**31))
def test_what_the_decoder_sees_in_training_is_what_the_code_says(levels: tuple[int, ...], seed: int) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    z = torch.randn(50, len(levels), generator=torch.Generator().manual_seed(seed)) * 3
    quantized = quantizer(z)
    torch.testing.assert_close(quantizer.from_codes(quantizer.to_codes(quantized)), quantized, atol=1e-6, rtol=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_gradients_pass_the_rounding(levels: tuple[int, ...]) -> None:
    z = (torch.rand(64, len(levels)) * 2 - 1).requires_grad_()
    FiniteScalarQuantizer(levels)(z).sum().backward()
    assert z.grad is not None and (z.grad > 0).all()


# Images


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_encoded_and_decoded_in_shape_and_range(channels: int) -> None:
    codec = image_codec(channels)
    codes = codec.encode(images(5, channels))
    assert codec.grid == (4, 4) and codes.shape == (5, 16) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codec.quantizer.codes and len(codes.unique()) > 3
    decoded = codec.decode(codes)
    assert decoded.shape == (5, channels, 16, 16) and decoded.dtype == torch.uint8
    assert len(decoded.unique()) > 10


@pytest.mark.parametrize(("size", "patch", "width"), [(16, 4, 16), (64, 8, 64), (48, 6, 24), (10, 5, 8), (8, 1, 8)])
def test_codes_of_an_image_do_not_depend_on_its_batch(size: int, patch: int, width: int) -> None:
    codec, batch = image_codec(3, size, patch, width), images(6, size=size)
    together = codec.encode(batch)
    for number in range(6):
        assert torch.equal(codec.encode(batch[number : number + 1])[0], together[number])
        alone, among = codec.decode(together[number : number + 1])[0], codec.decode(together)[number]
        assert (alone.int() - among.int()).abs().max() <= 1, "sums of float32 in another order"


def test_codes_of_an_image_are_row_by_row() -> None:
    """A change in a corner changes the codes there (the convolutions do not reach across)."""
    torch.manual_seed(0)
    codec = ImageCodec(ImageCodecConfig(size=64, patch=4, width=8, blocks=0)).eval()
    codec.encoder = torch.nn.Sequential(*(layer for layer in codec.encoder if not isinstance(layer, torch.nn.GroupNorm)))
    plain = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    changed = plain.clone()
    changed[:, :, :4, 60:] = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    places = (codec.encode(plain) != codec.encode(changed))[0].unflatten(0, (16, 16)).nonzero()
    assert len(places) and places[:, 0].max() < 8 and places[:, 1].min() > 7


def test_images_are_mirrored_and_shifted_by_draws() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    left, still, right = 0.0, 0.5, 0.99  # by one pixel
    draws = torch.tensor([[still, still, 0.4], [right, still, 0.4], [still, left, 0.4], [still, still, 0.6]])
    same, down, across, mirrored = mirror_and_shift(image.expand(4, 3, 8, 8), draws)[:, :1]
    assert torch.equal(same, image[0]) and torch.equal(mirrored, image[0].flip(-1))
    assert torch.equal(down[:, :-1], image[0][:, 1:]) and torch.equal(down[:, -1], image[0][:, -1])
    assert torch.equal(across[..., 1:], image[0][..., :-1]) and torch.equal(across[..., 0], image[0][..., 0])


# Sound


NARROW = AudioCodecConfig(sample_rate=8000, hop=40, window=400, mels=20, frames_per_token=1, width=16, blocks=3)


@pytest.mark.parametrize("config", [AUDIO, NARROW], ids=["two frames a code", "a window over many codes"])
@pytest.mark.parametrize("size", [1 << 20, 7], ids=["at once", "in slices"])
def test_codes_of_a_sound_do_not_depend_on_its_batch(
    config: AudioCodecConfig, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = audio_codec(config)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.tensor([20, 1, 11, 1, 26, 60])
    audio = torch.randn(int(tokens.sum()), config.samples_per_token, generator=generator)
    audio *= torch.rand(len(audio), 1, generator=generator) ** 8  # loud next to quiet
    alone = [codec.encode(part, tokens[n : n + 1]) for n, part in enumerate(audio.split(tokens.tolist()))]
    waveforms = [codec.decode(codes, tokens[n : n + 1]) for n, codes in enumerate(alone)]
    patches = [codec.patches(part, tokens[n : n + 1]) for n, part in enumerate(audio.split(tokens.tolist()))]
    monkeypatch.setattr(codec, "SLICE", size)
    together = codec.encode(audio, tokens)
    assert together.shape == (119,) and together.dtype == torch.int64 and together.max() < codec.quantizer.codes
    assert torch.equal(together, torch.cat(alone)) and len(together.unique()) >= 10
    torch.testing.assert_close(codec.decode(together, tokens), torch.cat(waveforms), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.patches(audio, tokens), torch.cat(patches), atol=1e-5, rtol=1e-5)


class Produced(TorchDispatchMode):
    """Counts the bytes of all tensors that operations produce, and of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.total += tensor.numel() * tensor.itemsize
                self.largest = max(self.largest, tensor.numel() * tensor.itemsize)
        return result


def test_memory_grows_with_the_seconds_in_a_batch_not_with_the_longest_sound() -> None:
    """One sound of 200 units with 200 of 2, against the same seconds in equal sounds: all were padded to the longest."""
    codec = audio_codec()
    mixed, equal = torch.tensor([200] + [2] * 200), torch.full((200,), 3)
    for use in (codec.encode, codec.loss, lambda audio, tokens: codec.decode(torch.zeros(600, dtype=torch.int64), tokens)):
        counts = []
        for tokens in (mixed, equal):
            with Produced() as counted:
                use(torch.rand(600, AUDIO.samples_per_token), tokens)
            counts.append((counted.total, counted.largest))
        assert all(one <= 1.1 * other for one, other in zip(*counts, strict=True))


def test_long_sounds_are_computed_in_slices_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = audio_codec()
    monkeypatch.setattr(codec, "SLICE", 64)
    spectrum = 2 * (64 + 2 * codec.reach) * (AUDIO.window // 2 + 1) * 8  # complex
    for use in (codec.encode, lambda audio, tokens: codec.decode(torch.zeros(2000, dtype=torch.int64), tokens)):
        with Produced() as counted:
            use(torch.rand(2000, AUDIO.samples_per_token), torch.tensor([2000]))
        assert counted.largest <= max(2.5 * spectrum, 1.1 * 2000 * AUDIO.samples_per_token * 4)


def test_a_decoded_sound_is_as_long_as_its_codes() -> None:
    codec, tokens = audio_codec(), torch.tensor([9, 1, 14])
    codes = torch.randint(0, codec.quantizer.codes, (24,))
    waveform = codec.decode(codes, tokens)
    assert waveform.shape == (24, AUDIO.samples_per_token) and waveform.dtype == torch.float32
    assert waveform.abs().max() <= 1 and waveform.any(1).all()
    magnitudes = codec.decode_magnitudes(codes, tokens)
    assert magnitudes.shape == (24, 2, 161) and (magnitudes >= 0).all()


def test_the_distance_of_a_sound_to_itself_is_zero_and_grows_with_noise() -> None:
    codec, (audio, tokens) = audio_codec(), sounds([3000, 100, 1601])
    noisy = [audio + level * torch.randn(audio.shape, generator=torch.Generator().manual_seed(0)) for level in (0, 0.05, 0.5)]
    distances = [codec.log_mel_distances(audio, one, tokens) for one in noisy]
    assert distances[0].shape == (2 * len(audio),) and not distances[0].any()
    assert 0 < distances[1].mean() < distances[2].mean() < 10


def test_the_loss_of_equal_sounds_does_not_depend_on_their_number() -> None:
    codec, (audio, tokens) = audio_codec(), sounds([2400])
    torch.testing.assert_close(codec.loss(audio.repeat(5, 1), tokens.repeat(5)), codec.loss(audio, tokens), atol=0, rtol=1e-3)


@pytest.mark.parametrize(("hop", "window"), [(80, 320), (80, 160), (100, 300), (64, 256), (160, 640)])
def test_the_inverse_transform_of_a_true_spectrum_is_the_waveform(hop: int, window: int) -> None:
    codec = audio_codec(AudioCodecConfig(sample_rate=8000, hop=hop, window=window, mels=20, width=16, blocks=1))
    audio = torch.randn(hop * 12)
    padding = (window - hop) // 2
    padded = torch.nn.functional.pad(audio, (padding, padding))
    spectrum = torch.stft(padded, window, hop, window=codec.window, center=False, return_complex=True).T
    assert len(spectrum) == len(codec.spectrogram(audio)) == 12
    torch.testing.assert_close(codec.spectrogram(audio), spectrum.abs(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(codec._inverse_stft(spectrum, torch.ones(12, 1)), audio, atol=1e-4, rtol=1e-4)


def test_a_full_scale_tone_is_near_zero_in_its_mel_band() -> None:
    codec = audio_codec()
    tone = torch.sin(torch.arange(8000) * 2 * math.pi * 1000 / 8000)
    log_mel = codec.log_mel(codec.spectrogram(tone))[10]
    assert -3 < log_mel.max() < 0.5
    assert log_mel.min() == pytest.approx(math.log(AudioCodec.FLOOR), abs=0.5)
    assert codec.log_mel(codec.spectrogram(0 * tone)).max() == pytest.approx(math.log(AudioCodec.FLOOR))


# Training


def test_thirty_steps_of_training_lower_the_loss_of_images() -> None:
    torch.manual_seed(0)
    codec = ImageCodec(ImageCodecConfig(size=16, channels=1, patch=4, levels=(8, 5, 5), width=16, blocks=1))
    ramp = torch.linspace(0, 255, 16)
    batch = torch.stack([ramp.expand(16, 16), ramp.flip(0).expand(16, 16), ramp[:, None].expand(16, 16)])[:, None].byte()
    losses = train(codec, lambda: codec.loss(batch), learning_rate=1e-2)
    assert losses[-1] < 0.5 * losses[0]


def test_thirty_steps_of_training_lower_the_loss_of_sounds() -> None:
    torch.manual_seed(0)
    codec = AudioCodec(AUDIO)
    audio, tokens = sounds([3000, 1000, 2222])
    losses = train(codec, lambda: codec.loss(audio, tokens), learning_rate=5e-3)
    assert losses[-1] < 0.75 * losses[0]


def train(codec: torch.nn.Module, loss: Callable[[], Tensor], learning_rate: float) -> list[float]:
    optimizer = torch.optim.Adam(codec.parameters(), learning_rate)
    losses = []
    for _ in range(30):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("frames_per_token", [1, 2, 4])
def test_the_shortest_and_the_silent_sound_have_a_loss(frames_per_token: int) -> None:
    config = AudioCodecConfig(
        sample_rate=8000, hop=80, window=320, mels=20, frames_per_token=frames_per_token, width=16, blocks=1
    )
    codec = AudioCodec(config)
    for audio in (torch.randn(1, config.samples_per_token), torch.zeros(1, config.samples_per_token)):
        loss = codec.loss(audio, torch.tensor([1]))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageCodecConfig(size=30, patch=4), "patch=4 must divide size=30"),
        (lambda: ImageCodecConfig(channels=4), "channels"),
        (lambda: ImageCodecConfig(width=20), "multiple of 8"),
        (lambda: ImageCodecConfig(levels=()), "levels"),
        (lambda: ImageCodecConfig(levels=(8, 2)), "at least 3 levels"),
        (lambda: AudioCodecConfig(hop=160, window=300), "at least twice hop"),
        (lambda: AudioCodecConfig(hop=160, window=641), "even"),
        (lambda: AudioCodecConfig(frames_per_token=0), "frames_per_token"),
    ],
)
def test_shapes_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
