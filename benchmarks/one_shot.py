"""Omniglot: 20-way one-shot recognition of characters of an alphabet that was never seen, by embeddings.

    python benchmarks/one_shot.py [--data ../shared/data/omniglot/images_background_small1.zip]

Trains `conf/classifier.yaml` with `conf/tasks/retrieval.yaml` on the other four alphabets: a drawing and the name of its
character have similar vectors. Characters turned by 90, 180 and 270 degrees are further characters. Then 20 characters of the
held-out alphabet, one drawing of each, and 20 other drawings of them: the nearest vector decides; mean of 400 such tasks, drawn
with seed 0. The baseline takes the nearest drawing by pixels (28 x 28, cosine).
"""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml
from common import PROJECT, command, table
from PIL import Image, ImageOps

from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment
from pile_app.tasks.embed import Embedder
from pile_app.training.load import load_run

WAYS, TASKS, SIDE = 20, 400, 28


def read(archive: Path) -> dict[tuple[str, str], list[Image.Image]]:
    """(alphabet, character) -> drawings, white on black."""
    found: dict[tuple[str, str], list[Image.Image]] = defaultdict(list)
    with zipfile.ZipFile(archive) as file:
        for name in sorted(name for name in file.namelist() if name.endswith(".png")):
            _, alphabet, character, _ = name.split("/")
            found[alphabet, character].append(ImageOps.invert(Image.open(io.BytesIO(file.read(name))).convert("L")))
    return found


def segment(drawing: Image.Image) -> Segment:
    return Segment.from_image(np.asarray(drawing.resize((32, 32), Image.Resampling.BOX)))


def accuracy(vectors: np.ndarray) -> float:
    """Of (characters, drawings, D) unit vectors."""
    rng, right = np.random.default_rng(0), 0
    for _ in range(TASKS):
        chosen = vectors[rng.permutation(len(vectors))[:WAYS]]
        shown, asked = rng.permutation(chosen.shape[1])[:2]
        right += int(((chosen[:, asked] @ chosen[:, shown].T).argmax(1) == np.arange(WAYS)).sum())
    return right / TASKS / WAYS


def train(folder: Path, documents: list[Document], more: list[str]) -> Path:
    write_shards(documents, folder / "shards", "omniglot-train")
    given = {"omniglot": {"train": f"{folder}/shards/omniglot-train-*.tar", "transforms": ["crop(0.85)", "rotate(10)"]}}
    words = ["--config", "classifier", "--config", "retrieval", "--model.start_from", "null", "--model.audio", "null",
             "--model.image", "{size: 32, channels: 1, patch: 8, levels: [8, 5, 5, 5], width: 32, blocks: 1}",
             "--trainer.max_steps", "600", "--trainer.val_check_interval", "600", "--wandb", "null", "--samples", "false",
             "--data.sources", yaml.safe_dump(given, default_flow_style=True, width=10_000),
             "--name", "omniglot", "--runs", str(folder)]  # fmt: skip
    subprocess.run([sys.executable, PROJECT / "train.py", *words, *more], check=True, stdout=sys.stderr)
    return folder / "omniglot"


def main(
    data: Path = Path("../shared/data/omniglot/images_background_small1.zip"),
    held_out: str = "Korean",
    more: list[str] | None = None,
) -> None:
    """held_out: alphabet; more: options of training."""
    drawings = read(data)
    documents = [
        Document((segment(one.rotate(turn)), Segment(f"{alphabet} {name} {turn}")), f"{alphabet}-{name}-{turn}-{number}")
        for (alphabet, name), found in drawings.items() if alphabet != held_out
        for turn in (0, 90, 180, 270) for number, one in enumerate(found)
    ]  # fmt: skip
    test = [found for (alphabet, _), found in drawings.items() if alphabet == held_out]
    kept = min(map(len, test))
    with TemporaryDirectory() as folder:
        run = train(Path(folder), documents, more or [])
        module, datamodule, _ = load_run(run)
        vectors, bad = Embedder.of_run(run, module, datamodule.context).segments(
            [segment(one) for found in test for one in found[:kept]]
        )
        assert not bad, bad
    pixels = np.stack([np.asarray(one.resize((SIDE, SIDE)), np.float32).ravel() for found in test for one in found[:kept]])
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    rows = [
        (name, f"{accuracy(found.reshape(len(test), kept, -1)):.3f}") for name, found in (("Pile", vectors), ("pixels", pixels))
    ]
    table(["embedding", f"{WAYS}-way one-shot, {held_out}"], rows)


if __name__ == "__main__":
    command(main, __doc__)
