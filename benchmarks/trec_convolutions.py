"""TREC-6 by a small convolutional network of its own (Kim 2014, arXiv:1408.5882), beside `classification.py trec`.

    python benchmarks/trec_convolutions.py [--data ../shared/data] [--seeds 0 1] [--capitals]

Vectors of 300 that begin at random, 100 filters over 3, 4 and 5 words each, their maxima, dropout of a half, a linear layer; 12
epochs of AdamW. A tenth of the training questions, drawn by a fixed seed, is for validation. Prints accuracies of the last
epoch and of the one that is best on the validation questions, a JSON line a seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

WIDTH, FILTERS, LENGTHS, EPOCHS, ROWS = 300, 100, (3, 4, 5), 12, 50
PADDING, UNKNOWN = 0, 1
Questions = list[tuple[str, list[str]]]  # label, words


class ConvolutionalNetwork(nn.Module):
    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH, padding_idx=PADDING)
        nn.init.uniform_(self.embedding.weight, -0.25, 0.25)
        self.filters = nn.ModuleList(nn.Conv1d(WIDTH, FILTERS, length) for length in LENGTHS)
        self.linear = nn.Linear(FILTERS * len(LENGTHS), classes)

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) -> (B, classes)"""
        x = self.embedding(words).mT
        strongest = torch.cat([one(x).relu().amax(2) for one in self.filters], 1)
        return self.linear(F.dropout(strongest, 0.5, self.training))


def read(path: Path, capitals: bool) -> Questions:
    lines = path.read_text("latin-1").splitlines()
    parts = [line.partition(" ") for line in lines]
    return [(label.partition(":")[0], (text if capitals else text.lower()).split()) for label, _, text in parts]


def train(splits: dict[str, Questions], seed: int) -> list[tuple[float, float]]:
    """(validation, test) accuracy after each epoch."""
    torch.manual_seed(seed)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(w for _, some in splits["train"] for w in some), 2)}
    labels = sorted({label for label, _ in splits["train"]})
    tensors = {}
    for split, questions in splits.items():
        rows = [torch.tensor([PADDING] * 4 + [numbers.get(w, UNKNOWN) for w in some] + [PADDING] * 4) for _, some in questions]
        classes = torch.tensor([labels.index(label) for label, _ in questions])
        tensors[split] = pad_sequence(rows, batch_first=True, padding_value=PADDING), classes
    network = ConvolutionalNetwork(len(numbers) + 2, len(labels))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    words, classes = tensors["train"]
    accuracies = []
    for _ in range(EPOCHS):
        network.train()
        for rows in torch.randperm(len(words)).split(ROWS):
            optimizer.zero_grad()
            F.cross_entropy(network(words[rows]), classes[rows]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            right = {split: network(words).argmax(1) == classes for split, (words, classes) in tensors.items()}
        accuracies.append((float(right["validation"].float().mean()), float(right["test"].float().mean())))
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--capitals", action="store_true")
    options = parser.parse_args()
    known, test = (read(options.data / "sent-conv" / f"TREC.{split}", options.capitals) for split in ("train", "test"))
    order = np.random.RandomState(0).permutation(len(known))
    held = len(known) // 10
    splits = {"train": [known[n] for n in order[held:]], "validation": [known[n] for n in order[:held]], "test": test}
    for seed in options.seeds:
        accuracies = train(splits, seed)
        last, best = accuracies[-1], max(accuracies)
        names = ("validation", "test")
        figures = {"seed": seed, "last": dict(zip(names, last, strict=True)), "best": dict(zip(names, best, strict=True))}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
