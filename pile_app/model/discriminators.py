"""Adversarial loss of codecs: discriminators learn to tell media from reconstructions, the codec learns to fool them.

    views: one (N, C, H, W) of images, spectrograms (1, 1, frames, bins) at several resolutions of sounds

Notable choices: hinge loss on patches (arXiv:1611.07004), feature matching (arXiv:1512.09300), no statistics of a batch, so
a loss is a mean over its media and does not depend on micro-batches. Both sides learn in one backward pass: discriminators see
detached reconstructions, and the codec's term sees detached weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pile_app.documents import AUDIO, IMAGE, MODALITIES
from pile_app.model.codecs import Codec, Convolution, ImageCodec, View


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial loss of the codecs, in the last part of their phase.

    Args:
        image: weight of the loss of the image codec; 0: none.
        audio: weight of the loss of the audio codec; 0: none.
        features: weight of feature matching in it.
        start: fraction of `codec_steps` after which it begins.
        width: channels of the discriminators' first layer.
    """

    image: float = 0.02
    audio: float = 0.1
    features: float = 4.0
    start: float = 0.5
    width: int = 32

    def __post_init__(self) -> None:
        if min(self.image, self.audio, self.features) < 0 or not 0 <= self.start < 1 or self.width < 1:
            raise ValueError(f"adversarial weights are at least 0, start is in [0, 1) and width at least 1, not {self}")


class PatchDiscriminator(nn.Module):
    """(N, C, H, W) -> features of each layer and, last, how real each patch looks. The stride along time is 1, so
    that `inside` (H, 1) keeps the sounds of a row apart."""

    def __init__(self, channels: int, width: int, stride: tuple[int, int]) -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(Convolution(*pair, *stride) for pair in pairwise(sizes))
        self.realness = nn.Conv2d(sizes[-1], 1, 1)

    def forward(self, x: Tensor, inside: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2) * inside
            features.append(x)
        return [*features, self.realness(x)]


class Adversary(nn.Module):
    """The discriminators of a codec, one for each view."""

    last: Tensor  # () detached loss of the last call

    def __init__(self, config: AdversarialConfig, codec: Codec) -> None:
        super().__init__()
        self.weight, channels, stride, views = config.audio, 1, (1, 2), 3
        if isinstance(codec, ImageCodec):
            self.weight, channels, stride, views = config.image, codec.config.channels, (2, 2), 1
        self.features = config.features
        self.views = nn.ModuleList(PatchDiscriminator(channels, config.width, stride) for _ in range(views))

    def forward(self, views: Sequence[View]) -> Tensor:
        """Loss of the discriminators plus weighted loss of the codec, means over the media; () float32."""
        losses = []
        for discriminator, (real, made, inside) in zip(self.views, views, strict=True):
            frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
            of_real, of_made = discriminator(real, inside), discriminator(made.detach(), inside)
            losses.append(_mean(F.relu(1 - of_real[-1]) + F.relu(1 + of_made[-1]), inside))
            *matched, realness = functional_call(discriminator, frozen, (made, inside))
            distances = [_mean((a - b.detach()).abs(), inside) for a, b in zip(matched, of_real, strict=False)]
            losses.append(self.weight * (self.features * torch.stack(distances).mean() - _mean(realness, inside)))
        loss = torch.stack(losses).sum() / len(views)
        self.last = loss.detach()
        return loss


def _mean(x: Tensor, inside: Tensor) -> Tensor:
    """() of (N, C, H, W), over the rows that count."""
    weights = inside.expand_as(x)
    return (x * weights).sum() / weights.sum()


def make_adversaries(config: AdversarialConfig | None, codecs: Mapping[int, Codec]) -> nn.ModuleDict:
    """Adversaries of the codecs that learn, by names of modalities."""
    weights = {IMAGE: config.image, AUDIO: config.audio} if config else {}
    wanted = {m: codec for m, codec in codecs.items() if weights.get(m) and not codec.config.pretrained}
    return nn.ModuleDict({MODALITIES[m]: Adversary(config, codec) for m, codec in wanted.items() if config})
