"""Augmentation of the images and sounds of a source, in training only: `transforms: [flip, "crop(0.8)", "speed(0.9, 1.1)"]`.

Images are uint8 (C, H, W) before they are resized for the codec, sounds float32 (S,) at the codec's sample rate. Parameters are
drawn from (seed, position, piece, segment), so augmentation does not depend on workers and ranks."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from pile_app.data.order import hash64
from pile_app.media import resample


def draw(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def crop(image: Tensor, generator: Generator, scale: float = 0.8) -> Tensor:
    """Crop a random part, whose sides are `scale` to 1 of the image's."""
    part = draw(generator, scale, 1)
    height, width = (max(1, round(side * part)) for side in image.shape[1:])
    top, left = (int(draw(generator, 0, image.size(axis) - kept + 1)) for axis, kept in ((1, height), (2, width)))
    return image[:, top : top + height, left : left + width]


def flip(image: Tensor, generator: Generator, chance: float = 0.5) -> Tensor:
    """Mirror left and right."""
    return image.flip(2) if draw(generator, 0, 1) < chance else image


def rotate(image: Tensor, generator: Generator, degrees: float = 10) -> Tensor:
    """Rotate by up to `degrees` either way; the empty corners get the mean color of the image's corners."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    fill = image[:, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean(1).tolist()
    return functional.rotate(image, draw(generator, -degrees, degrees), InterpolationMode.BILINEAR, fill=fill)


def color(image: Tensor, generator: Generator, strength: float = 0.2) -> Tensor:
    """Change brightness, contrast and saturation by factors from 1 - `strength` to 1 + `strength`."""
    from torchvision.transforms.v2 import functional

    for adjust in (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation):
        image = adjust(image, draw(generator, 1 - strength, 1 + strength))
    return image


def speed(sound: Tensor, generator: Generator, low: float = 0.9, high: float = 1.1) -> Tensor:
    """Play faster or slower, pitch included; the sound is then cut, or ends in silence, as its number of codes is fixed."""
    return torch.from_numpy(resample(sound.numpy(), round(100 * draw(generator, low, high)), 100))


def noise(sound: Tensor, generator: Generator, decibels: float = 20) -> Tensor:
    """Add white noise at this signal-to-noise ratio."""
    from torchaudio.functional import add_noise

    return add_noise(sound, torch.randn(sound.shape, generator=generator), torch.tensor(float(decibels)))


def mask(sound: Tensor, generator: Generator, time: float = 0, freq: float = 0) -> Tensor:
    """Silence up to `time` of the duration and up to `freq` of the frequencies (SpecAugment, arXiv:1904.08779, on samples)."""

    def silence(values: Tensor, most: float) -> Tensor:
        length = int(len(values) * draw(generator, 0, most))
        start = int(draw(generator, 0, len(values) - length + 1))
        return torch.cat([values[:start], values.new_zeros(length), values[start + length :]])

    sound = torch.fft.irfft(silence(torch.fft.rfft(sound), freq), len(sound)) if freq else sound
    return silence(sound, time) if time else sound


def shift(sound: Tensor, generator: Generator, fraction: float = 0.1) -> Tensor:
    """Move the sound by up to `fraction` of its length either way, with silence before or after it."""
    by = int(len(sound) * draw(generator, -fraction, fraction))
    silence = sound.new_zeros(abs(by))
    return torch.cat([silence, sound[: len(sound) - by]] if by > 0 else [sound[-by:], silence])


BOUNDS = {  # of the options above
    "scale": (0.01, 1), "chance": (0, 1), "degrees": (0, 180), "strength": (0, 1), "low": (0.5, 2), "high": (0.5, 2),
    "decibels": (-20, 100), "time": (0, 1), "freq": (0, 1), "fraction": (0, 1),
}  # fmt: skip
IMAGE_TRANSFORMS = {function.__name__: function for function in (crop, flip, rotate, color)}
AUDIO_TRANSFORMS = {function.__name__: function for function in (speed, noise, mask, shift)}


class Transforms:
    """Apply the transforms of a source: names with arguments, or import paths of functions (tensor, generator, ...) -> tensor
    for images and sounds. Raises ValueError for a wrong name, argument or value."""

    def __init__(self, specs: Sequence[str], seed: int) -> None:
        self.seed = seed
        steps = [_parse(spec) for spec in specs]
        self.image = [step for name, *step in steps if name not in AUDIO_TRANSFORMS]
        self.audio = [step for name, *step in steps if name not in IMAGE_TRANSFORMS]

    def __call__(self, medium: np.ndarray, position: int, piece: int, segment: int) -> np.ndarray:
        """Augment pixels (H, W, C) or samples (S,) of a segment of a piece of the pack at `position`."""
        generator = Generator().manual_seed(int(hash64(self.seed, position, piece, segment, "transforms")) >> 1)
        tensor = torch.from_numpy(medium).permute((2, 0, 1) if medium.ndim == 3 else (0,))
        for function, values, options in self.image if medium.ndim == 3 else self.audio:
            made = function(tensor, generator, *values, **options)
            if not isinstance(made, Tensor) or (made.dtype, made.ndim) != (tensor.dtype, tensor.ndim) or not made.numel():
                raise ValueError(f"transforms: {function.__name__} must return a {tensor.ndim}-d tensor of {tensor.dtype}")
            tensor = made
        return tensor.permute((1, 2, 0) if medium.ndim == 3 else (0,)).numpy()


def _parse(spec: str) -> tuple[Any, ...]:
    """Read `name(1, option=2)`, literals only: (name, function, values, options)."""
    known: dict[str, Any] = {**IMAGE_TRANSFORMS, **AUDIO_TRANSFORMS}
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        module, _, attribute = (name := ast.unparse(call.func)).rpartition(".")
        if not all(part.isidentifier() for part in name.split(".")) or not (module or name in known):
            raise ValueError(f"known are {', '.join(known)}, and import paths such as my_package.my_module.function")
        function = getattr(importlib.import_module(module), attribute) if module else known[name]
        values = [ast.literal_eval(value) for value in call.args]
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
        given = inspect.signature(function).bind(None, None, *values, **options).arguments
        for option, value in [] if module else [*given.items()][2:]:
            low, high = BOUNDS[option]
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{option} must be from {low} to {high}, not {value!r}")
    except (SyntaxError, ValueError, TypeError, ImportError, AttributeError) as error:
        raise ValueError(f"transforms: {spec!r} cannot be used: {error}") from error
    return name, function, values, options
