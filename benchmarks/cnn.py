"""A plain CNN on the labelled pictures of shards, for as many CPU seconds as another run took: the baseline of Pile's readers.

    python benchmarks/cnn.py "shards/photos-train-*.tar" "shards/photos-validation-*.tar" --size 32 --seconds 300

Six 3 x 3 convolutions with batch normalization, pooled twice; crops (padded by an eighth) and flips; AdamW, one cycle of rates.
Prints a JSON line. Seconds are those of the process (`time.process_time`), so that other load does not count.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pile_app.commands.data import open_shards
from pile_app.data.annotation import label_of


def read(pattern: str, size: int) -> tuple[Tensor, list[str]]:
    """(N, 3, size, size) float32 in [-1, 1], and labels."""
    documents = list(open_shards(pattern))
    opened = [Image.open(io.BytesIO(document.segments[0].file)).convert("RGB") for document in documents]
    pixels = np.stack([np.asarray(image.resize((size, size))) for image in opened])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, [label_of(document)[0] for document in documents]


def make(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for stage in (32, 64, 128):
        for inputs in (width, stage):
            layers += [nn.Conv2d(inputs, stage, 3, padding=1, bias=False), nn.BatchNorm2d(stage), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if stage < 128 else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
        width = stage
    return nn.Sequential(*layers, nn.Linear(width, classes)).to(memory_format=torch.channels_last)


def augment(images: Tensor) -> Tensor:
    edge = images.size(-1) // 8
    padded = F.pad(images, (edge,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * edge + 1, (2, len(images))).tolist()
    size, flips = images.size(-1), torch.rand(len(images)) < 0.5
    cropped = [one[:, y : y + size, x : x + size] for one, y, x in zip(padded, top, left, strict=True)]
    return torch.stack([one.flip(-1) if flip else one for one, flip in zip(cropped, flips.tolist(), strict=True)])


def train(images: Tensor, numbers: Tensor, seconds: float) -> tuple[nn.Sequential, int]:
    """Return a network that was trained for so many seconds, and its steps."""
    network = make(int(numbers.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003, weight_decay=0.05)
    begin, share, steps = time.process_time(), 0.0, 0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * min(1.0, 10 * share + 0.01, 1.25 * (1 - share))
        some = torch.randint(0, len(images), (128,))
        loss: Any = F.cross_entropy(network(augment(images[some]).contiguous(memory_format=torch.channels_last)), numbers[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share, steps = (time.process_time() - begin) / seconds, steps + 1
    return network.eval(), steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    (images, names), (held_out, wanted) = (read(pattern, options.size) for pattern in (options.train, options.test))
    labels = sorted(set(names))
    numbers = torch.tensor([labels.index(name) for name in names])
    network, steps = train(images, numbers, options.seconds)
    with torch.no_grad():
        guesses = torch.cat([network(part).argmax(1) for part in held_out.split(250)]).tolist()
    accuracy = float(np.mean([labels[guess] == name for guess, name in zip(guesses, wanted, strict=True)]))
    epochs = round(steps * 128 / len(images), 1)
    print(json.dumps({"accuracy": round(accuracy, 4), "documents": len(wanted), "epochs": epochs, "seconds": options.seconds}))


if __name__ == "__main__":
    main()
