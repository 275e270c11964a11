"""Classification of texts, sounds and images with one config, beside a plain baseline on the same examples.

    python benchmarks/classification.py sst2|trec|fsdd|mnist|esc10 [--folder runs/classification] [--data ../shared/data]

Prepares the data (`data/labelled/prepare.py`), trains a small model on them (`classification/*.yaml`, once for all that begin
with it), adapts it with `conf/tasks/classification.yaml`, and measures the checkpoint that is best on the validation split (of
sounds the last one: known speakers and 17 clips cannot tell) on the test split, once, by `pile classify --on`. Prints a JSON
line; seconds are of this call alone.

Baselines are scikit-learn's logistic regression: on TF-IDF of words, or words and pairs (which, and C, chosen on the
validation split); on pixels; on log-mel frames, of ESC-10 their mean and deviation over time. They see the same training
examples, other speeds included.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pile_app.commands.data import open_shards
from pile_app.documents import Document
from pile_app.media import decode_audio

HERE = Path(__file__).parent
ROOT = HERE.parent
Scores = tuple[float, float]  # accuracy, macro F1


@dataclass
class Task:
    """pretrained: name of the model to begin with; sets: what that one reads; options: of the adaptation; bar: accuracy;
    beside: sets that are learned from, too, by model and baseline alike; checkpoint: that is measured."""

    pretrained: str
    sets: tuple[str, ...]
    bar: float
    baseline: Callable[[dict[str, list[Document]]], Scores]
    options: dict[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    checkpoint: str = "best"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--folder", type=Path, default=Path("runs/classification"), help="for runs and shards")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--skip-baseline", action="store_true")
    options, more = parser.parse_known_args(arguments)
    task, folder, shards = TASKS[options.task], options.folder, options.folder / "shards"
    begin = time.monotonic()
    for name in dict.fromkeys((*task.sets, *task.beside, options.task)):
        if not (shards / name / "dataset.json").exists():
            run(ROOT / "data/labelled/prepare.py", name, "--data", options.data, "--folder", shards)
    prepared = time.monotonic()
    pretrain(task, folder, shards)
    pretrained = time.monotonic()
    adapted = adapt(options.task, task, folder, shards, options.seed, more)
    test = shards / options.task / f"{options.task}-test-*.tar"
    run("-m", "pile_app.cli", "classify", adapted, "--checkpoint", task.checkpoint, "--on", test)
    done = time.monotonic()
    found = json.loads((adapted / "classified" / "classification.json").read_text())
    summary = json.loads((adapted / "summary.json").read_text())
    result = {"task": options.task} | {name: round(found[name], 4) for name in ("accuracy", "f1", "recall", "precision")}
    result |= {"bar": task.bar, "documents": found["documents"], "validation_accuracy": round(summary["accuracy"], 4)}
    result |= {"validation_f1": round(summary["f1"], 4), "steps": summary["steps"], "seed": options.seed}
    result |= {"parameters": summary["parameters"]["language_model"]}
    spans = {"prepare": prepared - begin, "pretrain": pretrained - prepared, "adapt_and_test": done - pretrained}
    result |= {f"{name}_seconds": round(seconds, 1) for name, seconds in spans.items()}
    if not options.skip_baseline:
        documents = {split: read(shards / options.task, split) for split in ("train", "validation", "test")}
        for name in task.beside:
            documents["train"] += read(shards / name, "train")
        accuracy, f1 = task.baseline(documents)
        result |= {"baseline_accuracy": round(accuracy, 4), "baseline_f1": round(f1, 4)}
    print(json.dumps(result))


def run(*command: object) -> None:
    """A Python program, whose output goes to stderr."""
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=sys.stderr)


def pretrain(task: Task, folder: Path, shards: Path) -> None:
    if (folder / task.pretrained / "summary.json").exists():
        return
    more: list[object] = []
    if task.pretrained == "sentences":
        tokenizer = folder / "sentences.json"
        texts = shards / "sentences" / "sentences-train-*.tar"
        run("-m", "pile_app.cli", "tokenizer", texts, tokenizer, "--kind", "bpe", "--size", 12000)
        more = ["--model.tokenizer", tokenizer]
    config = HERE / "classification" / f"{task.pretrained}.yaml"
    run(ROOT / "train.py", "--config", config, "--runs", folder, *sources(shards, task.sets), *more)


def adapt(name: str, task: Task, folder: Path, shards: Path, seed: int, more: Sequence[str]) -> Path:
    labels = json.loads((shards / name / "dataset.json").read_text())["labels"]
    pre = folder / task.pretrained
    given = {f"model.objective.init_args.{key}" if "." not in key else key: value for key, value in task.options.items()}
    chosen = [part for key, value in given.items() for part in (f"--{key}", json.dumps(value))]
    begin = ["--config", pre / "config.yaml", "--config", ROOT / "conf/tasks/classification.yaml", "--model.start_from", pre]
    task_name = f"{name}-{seed}"
    place = ["--name", task_name, "--runs", folder, "--seed_everything", seed, "--data.seed", seed]
    objective = ["--model.objective.init_args.labels", json.dumps(labels)]
    run(ROOT / "train.py", *begin, *place, *sources(shards, [name, *task.beside]), *objective, *chosen, *more)
    return folder / task_name


def sources(shards: Path, names: Sequence[str]) -> list[str]:
    patterns = {}
    for name in names:
        splits = json.loads((shards / name / "dataset.json").read_text())["sources"][name]
        patterns[name] = {
            split: str(shards / name / about["shards"]) for split, about in splits.items() if split in ("train", "validation")
        }
    return ["--data.sources", yaml.safe_dump(patterns, default_flow_style=True, width=10_000)]


# -- baselines


def read(folder: Path, split: str) -> list[Document]:
    return list(open_shards(str(folder / f"{folder.name}-{split}-*.tar")))


def regress(features: dict[str, Any], documents: dict[str, list[Document]], c: float, steps: int) -> tuple[float, Scores]:
    """(validation accuracy, test scores) of a logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    labels = {split: [document.segments[-1].text for document in some] for split, some in documents.items()}
    model = LogisticRegression(C=c, max_iter=steps).fit(features["train"], labels["train"])
    guesses = {split: model.predict(features[split]) for split in ("validation", "test")}
    accuracy = {split: float(np.mean(guess == np.array(labels[split]))) for split, guess in guesses.items()}
    return accuracy["validation"], (accuracy["test"], float(f1_score(labels["test"], guesses["test"], average="macro")))


def words_baseline(documents: dict[str, list[Document]]) -> Scores:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = {split: [document.segments[0].text for document in some] for split, some in documents.items()}
    found = []
    for longest in (1, 2):
        vectorizer = TfidfVectorizer(ngram_range=(1, longest)).fit(texts["train"])
        features = {split: vectorizer.transform(some) for split, some in texts.items()}
        found += [regress(features, documents, c, 1000) for c in (1.0, 10.0)]
    return max(found)[1]


def pixels_baseline(documents: dict[str, list[Document]]) -> Scores:
    from PIL import Image

    def pixels(document: Document) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(document.segments[0].file)), np.float32).ravel() / 255

    features = {split: np.stack([pixels(document) for document in some]) for split, some in documents.items()}
    return regress(features, documents, 0.1, 60)[1]


def sounds_baseline(documents: dict[str, list[Document]], frames: int) -> Scores:
    """frames: that a sound is averaged to, one after the other; 1: mean and deviation over all of it."""
    import torch
    import torchaudio
    from sklearn.preprocessing import StandardScaler

    mel = torchaudio.transforms.MelSpectrogram(8000, n_fft=400, hop_length=80, n_mels=40)

    def describe(document: Document) -> np.ndarray:
        logs = mel(torch.from_numpy(decode_audio(document.segments[0].file, 8000))).clamp_min(1e-4).log()  # (40, T)
        if frames == 1:
            return torch.cat([logs.mean(1), logs.std(1)]).numpy()
        return torch.nn.functional.adaptive_avg_pool1d(logs[None], frames).flatten().numpy()

    features = {split: np.stack([describe(document) for document in some]) for split, some in documents.items()}
    scaler = StandardScaler().fit(features["train"])
    scaled = {split: scaler.transform(some) for split, some in features.items()}
    return max(regress(scaled, documents, c, 500) for c in (0.01, 0.1, 1.0))[1]


OF_REVIEWS = {
    "pooling": ["mean"],
    "ngrams": 2,
    "language_weight": 0.0,
    "learning_rate": 0.01,
    "dropout": 0.5,
    "model.dropout": 0.4,
    "model.backbone.init_args.dropout": 0.3,
    "model.optimizer.learning_rate": 0.001,
    "model.optimizer.matrix_learning_rate": 0.0005,
    "trainer.val_check_interval": 100,
}
OF_SOUNDS = {  # gently: at higher rates the model learns its few speakers and recordings by heart
    "language_weight": 0.0,
    "learning_rate": 0.004,
    "model.optimizer.learning_rate": 0.0001,
    "model.optimizer.matrix_learning_rate": 0.0005,
    "trainer.callbacks": [],  # speakers that are known say nothing about when to stop
}
TASKS = {
    "sst2": Task(
        *("sentences", ("sentences",), 0.813, words_baseline),
        OF_REVIEWS,
        ("lexicon",),
    ),
    "trec": Task(
        *("sentences", ("sentences",), 0.902, words_baseline),
        {
            "pooling": ["mean", "max"],
            "ngrams": 2,
            "learning_rate": 0.004,
            "model.dropout": 0.2,
            "model.backbone.init_args.dropout": 0.2,
            "model.optimizer.learning_rate": 0.003,
            "model.optimizer.matrix_learning_rate": 0.01,
            "data.epochs": 10,
        },
    ),
    "fsdd": Task(
        *("sounds", ("fsdd", "esc10"), 0.90, partial(sounds_baseline, frames=10)),
        OF_SOUNDS | {"pooling": ["last"], "data.epochs": 2},
        checkpoint="last",
    ),
    "esc10": Task(
        *("sounds", ("fsdd", "esc10"), 0.74, partial(sounds_baseline, frames=1)),
        OF_SOUNDS
        | {
            "pooling": ["max"],
            "sound_statistics": True,
            "learning_rate": 0.008,
            "dropout": 0.5,
            "trainer.val_check_interval": 100,
        },
        checkpoint="last",
    ),
    "mnist": Task(
        *("digits", ("mnist",), 0.985, pixels_baseline),
        {
            "pooling": ["mean", "max", "last"],
            "language_weight": 0.0,
            "dropout": 0.1,
            "model.optimizer.learning_rate": 0.004,
            "model.optimizer.matrix_learning_rate": 0.02,
            "data.epochs": 3,
            "trainer.val_check_interval": 1400,
        },
    ),
}

if __name__ == "__main__":
    main()
