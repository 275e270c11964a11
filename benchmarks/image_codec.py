"""The image codec on drawings, digits and photos, compared with WebP and JPEG, and how well a CNN recognizes its output.

    python benchmarks/image_codec.py --seconds 120
    python benchmarks/image_codec.py --parts "[photos]" --seconds 300  # accuracy kept; Fréchet distance ÷ without discriminator

Drawings: Tux Paint stamps of 64 pixels on white, 134 held out; digits: MNIST of 16 pixels; photos: a subset of CIFAR-10.
Drawings and photos become 64 codes of 12 bits: 96 bytes. Seconds are those of the process.
"""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cnn
import numpy as np
import torch
from common import command, table
from PIL import Image
from torch import Tensor

from pile_app.data.tokenizers import load_tokenizer
from pile_app.model import codecs
from pile_app.model.backbones import Transformer
from pile_app.model.codec_configs import ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.optim import OptimizerConfig, make_optimizer, schedule_factor

CONFIGS = {
    "drawings": ImageCodecConfig(size=64, patch=8, levels=(8, 8, 8, 8)),
    "digits": ImageCodecConfig(size=16, channels=1, patch=4, levels=(5, 5, 5), width=32),
    "photos": ImageCodecConfig(size=32, patch=4, levels=(8, 8, 8, 8)),
}


def as_tensor(images: Sequence[Any]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def drawings(data: Path) -> tuple[Tensor, Tensor]:
    files, images = sorted((data / "tuxpaint-stamps").rglob("*.png")), []
    random.Random(0).shuffle(files)
    for file in files:
        image = Image.open(file).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        width, height = (max(64, round(side * 64 / min(image.size))) for side in image.size)
        left, top = (width - 64) // 2, (height - 64) // 2
        images.append(image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64)))
    return as_tensor(images[:-134]), as_tensor(images[-134:])


def digits(data: Path) -> tuple[Tensor, Tensor]:
    def read(name: str, count: int) -> Tensor:
        content = gzip.decompress((data / "mnist" / f"{name}-images-idx3-ubyte.gz").read_bytes())
        pixels = np.frombuffer(content, np.uint8, -1, 16).reshape(-1, 28, 28)[:count]
        return as_tensor([Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC) for image in pixels])

    return read("train", 4000), read("t10k", 500)


def photos(data: Path, part: str) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) images, (N,) classes."""
    with tarfile.open(data / "cifar10-subset.tar") as archive:
        members = sorted((m for m in archive if m.isfile() and f"/{part}/" in m.name), key=lambda member: member.name)
        images = [Image.open(archive.extractfile(member)).convert("RGB") for member in members]  # type: ignore[arg-type]
    labels = [Path(member.name).parent.name for member in members]
    return as_tensor(images), torch.tensor([sorted(set(labels)).index(label) for label in labels])


def train(config: ImageCodecConfig, images: Tensor, seconds: float, adversarial: Any = None) -> Any:
    """Return a codec that was trained for so many CPU seconds, as a run trains it in its first phase."""
    torch.manual_seed(0)
    model, judges = FusedLanguageModel(Transformer(32, 1, 1), load_tokenizer("bytes"), config), list[Any]()
    if adversarial is not None:
        from pile_app.model import discriminators

        judges = list(discriminators.make_adversaries(adversarial, model.codecs).values())
    codec, options, learned = model.image_codec, OptimizerConfig(), [p for judge in judges for p in judge.parameters()]
    optimizer, _ = make_optimizer(model, options, 1000, 1001, None, *[learned] * bool(judges))
    generator, share, step, begin = torch.Generator().manual_seed(0), 0.0, 0, time.process_time()
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule_factor(options, 30 + int(share * 1000), 1030) * min(1, (step + 1) / 20)
        batch = images[torch.randint(len(images), (16,), generator=generator)]
        if config.size > 16 and hasattr(codecs, "mirror_and_shift"):
            batch = codecs.mirror_and_shift(batch, torch.rand(16, 3, generator=generator))
        loss: Any = codec.loss(batch, *(judges if judges and share >= adversarial.start else ()))  # type: ignore[union-attr]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share, step = (time.process_time() - begin) / seconds, step + 1
    return codec


def again(codec: Any, images: Tensor) -> Tensor:
    return torch.cat([codec.decode(codec.encode(part)) for part in images.split(50)])


def psnr(images: Tensor, others: Tensor) -> float:
    """dB, mean over the images."""
    errors = (images.float() - others.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
    return round(float((10 * torch.log10(255**2 / errors)).mean()), 2)


def compress(image: Tensor, kind: str, limit: int = 96) -> Tensor:
    """The best of all sizes and qualities that take at most `limit` bytes; of JPEG, headers do not count."""
    original, found = Image.fromarray(image.permute(1, 2, 0).numpy()), []
    for side in (2, 4, 6, 8, 12, 16, 24, 32, 64):
        for quality in (1, 10, 30, 60, 80):
            original.resize((side, side), Image.Resampling.LANCZOS).save(file := io.BytesIO(), kind, quality=quality)
            content = file.getvalue()
            if len(content) - (content.index(b"\xff\xda") + 14 if kind == "jpeg" else 0) <= limit:
                found.append(as_tensor([Image.open(file).convert("RGB").resize(original.size, Image.Resampling.BICUBIC)]))
    return max(found, key=lambda candidate: psnr(image[None], candidate))


@torch.no_grad()
def look(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 128) features and (N,) classes."""
    features = torch.cat([network[:-1](part / 127.5 - 1) for part in images.split(250)])
    return features.double(), network[-1](features).argmax(1)


def frechet(one: Tensor, other: Tensor) -> float:
    a, b = torch.cov(one.T), torch.cov(other.T)
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return float((one.mean(0) - other.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def main(
    data: Path = Path("../shared/data"), parts: tuple[str, ...] = ("drawings", "digits", "photos"), seconds: float = 120
) -> None:
    """seconds: of training, for each codec and for the CNN."""
    torch.set_num_threads(1)
    for name in [name for name in parts if name != "photos"]:
        images, held_out = {"drawings": drawings, "digits": digits}[name](data)
        rows = [("Pile", psnr(held_out, again(train(CONFIGS[name], images, seconds), held_out)))]
        for kind in ("webp", "jpeg") if name == "drawings" else ():
            rows.append((kind, psnr(held_out, torch.cat([compress(image, kind) for image in held_out]))))
        table((name, f"PSNR of held-out images after {seconds:.0f} s"), rows)
    if "photos" in parts:
        from pile_app.model import discriminators  # which older versions lack

        (images, labels), (held_out, wanted) = photos(data, "train"), photos(data, "test")
        network = cnn.train(images / 127.5 - 1, labels, seconds)[0]
        table(("photos", "accuracy of a CNN, ÷ on real photos", "PSNR", "Fréchet distance, ÷ without discriminator"), [])
        features, classes = look(network, held_out)
        right, distance = float((classes == wanted).float().mean()), 0.0
        for adversarial in (None, discriminators.AdversarialConfig()):
            decoded = again(train(CONFIGS["photos"], images, seconds, adversarial), held_out)
            found, classes = look(network, decoded)
            accuracy, apart = float((classes == wanted).float().mean()), frechet(features, found)
            distance = distance or apart
            kept, ratio = f"{accuracy:.3f}, {accuracy / right:.3f}", f"{apart:.3f}, {apart / distance:.3f}"
            print(f"| {'with' if adversarial else 'without'} discriminator | {kept} | {psnr(held_out, decoded)} | {ratio} |")


if __name__ == "__main__":
    command(main, __doc__)
