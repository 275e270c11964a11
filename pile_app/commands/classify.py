"""`pile classify`: labels and their probabilities, by a run that was trained with `conf/tasks/classification.yaml`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pile_app.commands.generate import add_prompt, read_prompt

if TYPE_CHECKING:
    from pile_app.documents import Document
    from pile_app.model.fused import FusedLanguageModel
    from pile_app.tasks.classification import Classification

SUMMARY = "tell the labels of texts, images and sounds, by a trained classifier"
AT_ONCE = 1024  # documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "One document of every --text, --image and --audio in the order given, or a text a line of --file; the answers are "
        "JSON lines. --on measures the classifier on labelled shards instead."
    )
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    add_prompt(parser)
    parser.add_argument("--file", type=Path, help="texts: one a line, or JSON lines with a text each (.jsonl)")
    parser.add_argument("--on", metavar="SHARDS", help="labelled shards (a quoted pattern *.tar) to measure it on")
    parser.add_argument("--checkpoint", default="best", help="last, best, previous, or a file")
    parser.add_argument("--output", type=Path, help="folder for what --on finds (default: RUN/classified)")


def run(options: argparse.Namespace) -> None:
    import torch

    from pile_app.tasks.classification import Classification
    from pile_app.training.load import load_run

    if sum(map(bool, (options.prompt, options.file, options.on))) != 1:
        raise ValueError("what to classify? Give --text, --image and --audio, or --file, or --on")
    module, _, _ = load_run(options.run, options.checkpoint)
    objective = module.objective
    if not isinstance(objective, Classification):
        raise ValueError(f"{str(options.run)!r} is no classifier: train one with conf/tasks/classification.yaml")
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    if options.on:
        measure(objective, module.model, options.on, options.output or options.run / "classified")
        return
    if options.prompt:
        answer(objective, module.model, [({}, read_prompt(options.prompt))])
        return
    texts = read_texts(options.file)
    while some := list(islice(texts, AT_ONCE)):
        answer(objective, module.model, some)


def read_texts(path: Path) -> Iterator[tuple[dict[str, Any], Document]]:
    """(what to say of it, the document) of every line that holds a text."""
    from pile_app.documents import Document, Segment

    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if path.suffix == ".jsonl":
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f'{path}:{number} is no object with a "text": {error}') from error
            else:
                text = line.strip()
            yield {"text": text}, Document((Segment(str(text)),), f"{path}:{number}")


def answer(objective: Classification, model: FusedLanguageModel, documents: Sequence[tuple[dict[str, Any], Document]]) -> None:
    """A JSON line each: label and the probability of every label, highest first."""
    for (about, _), row in zip(documents, objective.predict(model, [one for _, one in documents]), strict=True):
        chances = {objective.labels[number]: round(float(row[number]), 4) for number in row.argsort(descending=True).tolist()}
        print(json.dumps({**about, "label": next(iter(chances)), "probabilities": chances}, ensure_ascii=False))


def measure(objective: Classification, model: FusedLanguageModel, pattern: str, folder: Path) -> dict[str, Any]:
    """Accuracy, macro precision, recall and F1 on labelled shards: printed, and with `confusion.png` and `predictions.jsonl`
    in the folder as `classification.json`.

    Raises:
        ValueError: a document has no label, or one that the classifier does not know.
    """
    import torch

    from pile_app.commands.index import open_shards
    from pile_app.tasks.classification import split_label

    folder.mkdir(parents=True, exist_ok=True)
    shards = open_shards(pattern)
    labelled = (split_label(document, objective.labels) for document in shards)
    count = 0
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as lines:
        while some := list(islice(labelled, AT_ONCE)):
            probabilities = objective.predict(model, [document for document, _ in some])
            device = model.token_bytes.device
            objective.metrics.update(probabilities.to(device), torch.tensor([number for _, number in some], device=device))
            for (document, number), row in zip(some, probabilities, strict=True):
                guess = int(row.argmax())
                said = {"key": document.key, "true": objective.labels[number], "label": objective.labels[guess]}
                lines.write(json.dumps(said | {"probability": round(float(row[guess]), 4)}, ensure_ascii=False) + "\n")
            count += len(some)
    if not count:
        raise ValueError(f"{pattern!r} holds no document")
    values = {name: float(value) for name, value in objective.compute().items()}
    found = {"documents": count, **values, **objective.report(folder)}
    (folder / "classification.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({"documents": count} | {name: round(value, 4) for name, value in values.items()}))
    print(folder / "confusion.png")
    return found
