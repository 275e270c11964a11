"""Classification and named entities on public data, each prepared, trained and measured by the commands that a user would give.

    python benchmarks/labels.py sst2 trec trec10 wnut17 [--data ../shared/data] [--weights data/smollm2/model] [--seed 0]
    python benchmarks/labels.py mnist fsdd fsdd-jackson fsdd-lucas fsdd-nicolas esc10      # a new model each, its CNN reads

Texts begin from open weights, with `conf/open_weights.yaml`, a file of `conf/tasks/` and nothing else (trec10, ten questions of
each class: LoRA). Options of training at the end are passed on. Figures are those of the validation split; with `--test` the
test split is read, once, by `pile classify --on` or `pile tag`. Prints a JSON line for each; seconds are those of all steps.

TF-IDF of words and pairs with logistic regression, on the same examples, stands beside the texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from pile_app.commands.data import open_shards, read_texts
from pile_app.data.shards import write_shards

ROOT = Path(__file__).parent.parent
FEW = {"model.backbone.lora": {"rank": 16}, "model.optimizer.backbone_learning_rate": 0.002, "data.epochs": 30}
SPOKEN = ["speed(0.8, 1.25)", "shift", "mask(time=0.2, freq=0.1)"]
# set -> configuration of a new model ("": open weights), transforms, options
TASKS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "sst2": ("", [], {}), "trec": ("", [], {}), "trec10": ("", [], FEW), "wnut17": ("", [], {}),
    "mnist": ("digits", ["crop(0.9)", "rotate(8)"], {"data.epochs": 3, "trainer.val_check_interval": 1400}),
    **{name: ("sounds", SPOKEN, {}) for name in ("fsdd", "fsdd-jackson", "fsdd-lucas", "fsdd-nicolas", "esc10")},
}  # fmt: skip


def run(*command: object, stdout: Any = sys.stderr) -> subprocess.CompletedProcess[str]:
    """A Python program, whose output goes to stderr."""
    return subprocess.run([sys.executable, *map(str, command)], check=True, stdout=stdout, text=True)


def prepare(name: str, data: Path, shards: Path) -> None:
    if (shards / name / "dataset.json").exists():
        pass
    elif name == "wnut17":
        words = ("prepare", data / "wnut17" / "wnut17train.conll", shards / name, "--kind", "entities")
        run("-m", "pile_app.cli", *words, "--validation-fraction", 0.1)
    elif name == "trec10":
        prepare("trec", data, shards)
        labels = json.loads((shards / "trec" / "dataset.json").read_text())["labels"]
        found = open_shards(pattern(shards, "trec", "train"))
        ranked = sorted(found, key=lambda one: hashlib.blake2b(one.segments[0].text.encode()).digest())
        few = [one for label in labels for one in [d for d in ranked if d.meta["label"] == label][:10]]
        write_shards(few, shards / name, "trec-train")
        (shards / name / "dataset.json").write_text((shards / "trec" / "dataset.json").read_text())
    else:
        run(ROOT / "data/labelled/prepare.py", name, "--data", data, "--folder", shards)


def pattern(shards: Path, name: str, split: str) -> str:
    """trec10 is measured on the splits of trec."""
    folder = "trec" if name == "trec10" and split != "train" else name
    return str(shards / folder / f"*-{split}-[0-9]*.tar")


def source(shards: Path, name: str, transforms: list[str]) -> list[str]:
    given: dict[str, Any] = {split: pattern(shards, name, split) for split in ("train", "validation")}
    given |= {"transforms": transforms} if transforms else {}
    return ["--data.sources", yaml.safe_dump({name: given}, default_flow_style=True, width=10_000)]


def train(name: str, options: argparse.Namespace, more: list[str]) -> Path:
    config, transforms, chosen = TASKS[name]
    shards, task = options.folder / "shards", "ner" if name == "wnut17" else "classification"
    prepare(name, options.data, shards)
    words: list[object] = ["--config", "open_weights", "--config", task, "--model.backbone.path", options.weights]
    if config:
        words = ["--config", ROOT / "benchmarks" / "classification" / f"{config}.yaml", "--config", task]
    labels = json.loads((shards / name / "dataset.json").read_text()).get("labels")
    for key, value in ({"labels": labels} | chosen if labels else chosen).items():
        words += [f"--{key if '.' in key else f'model.objective.init_args.{key}'}", json.dumps(value)]
    folder: Path = options.folder / f"{name}-{options.seed}"
    words += ["--name", folder.name, "--runs", options.folder, "--seed_everything", options.seed, "--data.seed", options.seed]
    run(ROOT / "train.py", *words, *source(shards, name, transforms), *more)
    return folder


def measure_on_test(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    if name != "wnut17":
        is_last = TASKS[name][0] == "sounds"  # known speakers and 17 clips cannot tell
        words: tuple[object, ...] = ("--checkpoint", "last") if is_last else ()
        run("-m", "pile_app.cli", "classify", folder, *words, "--on", pattern(options.folder / "shards", name, "test"))
        found = json.loads((folder / "classified" / "classification.json").read_text())
        return {key: round(found[key], 4) for key in ("accuracy", "f1", "documents")}
    development = options.data / "wnut17" / "emerging.dev.conll"
    words = ("-m", "pile_app.cli", "tag", folder, development, "--format", "json")
    lines = run(*words, stdout=subprocess.PIPE).stdout.splitlines()
    guesses = [{(span["start"], span["end"], span["label"]) for span in json.loads(line)["spans"]} for line in lines]
    golds = [{tuple(span) for span in document.meta["spans"]} for _, document in read_texts(development)]  # type: ignore[union-attr]
    right = sum(len(gold & guess) for gold, guess in zip(golds, guesses, strict=True))
    return {"f1": round(2 * right / sum(map(len, golds + guesses)), 4), "documents": len(golds)}


def baseline(shards: Path, name: str, split: str) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    parts = {part: list(open_shards(pattern(shards, name, part))) for part in ("train", split)}
    texts, said = ({part: [take(one) for one in some] for part, some in parts.items()}
                   for take in (lambda one: one.segments[0].text, lambda one: one.meta["label"]))  # fmt: skip
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0, max_iter=1000))
    return round(float(model.fit(texts["train"], said["train"]).score(texts[split], said[split])), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--weights", type=Path, default=ROOT / "data" / "smollm2" / "model")
    parser.add_argument("--folder", type=Path, default=Path("runs/labels"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="measure on the test split, too")
    options, more = parser.parse_known_args()
    for name in options.tasks:
        begin = time.monotonic()
        folder = train(name, options, more)
        summary = json.loads((folder / "summary.json").read_text())
        row: dict[str, Any] = {"task": name, "seed": options.seed, "steps": summary["steps"]}
        row |= {f"validation_{key}": round(summary[key], 4) for key in ("accuracy", "f1") if key in summary}
        row |= measure_on_test(name, folder, options) if options.test else {}
        row["seconds"] = round(time.monotonic() - begin)
        if name in ("sst2", "trec", "trec10"):
            row["tf_idf"] = baseline(options.folder / "shards", name, "test" if options.test else "validation")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
