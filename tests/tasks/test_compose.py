"""Every file in `conf/tasks/` is laid over the configuration of any run, trains, and its command uses the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY

from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import train_tokenizer
from pile_app.documents import Document, Segment

RUNS = {  # name: the options of its training
    "text_only": ["--config", "conf/text_only.yaml"],
    "lstm": ["--config", "conf/lstm.yaml", "--model.backbone.init_args.layers=1"],
    "images_only": ["--config", "conf/images_only.yaml"],
    "audio_only": ["--config", "conf/audio_only.yaml"],
    "default": [],
    "shakespeare": ["--config", "conf/shakespeare.yaml"],
    "encoded": [
        "--model.codecs_from=runs/default/checkpoints/last.ckpt", "--model.codec_steps=0",
        "--data.sources={digits: {train: encoded/digits-train-*.tar, validation: encoded/digits-validation-*.tar}}",
    ],
    "open_weights": ["--model.backbone=HuggingFace", "--model.backbone.path=weights", "--model.backbone.lora={rank: 2}"],
}  # fmt: skip
LABELS = ["three", "seven"]
TASKS = {  # name of the configuration: further options of its training
    "classification": ["--model.objective.init_args.labels", json.dumps(LABELS)],
    "ner": ["--model.objective.init_args.types", "[place]"],
    "retrieval": [],
    "chat": [],
}
DATA = {  # of a task, or of a task over a run
    "classification": "labelled",
    "ner": "entities",
    "retrieval": "digits",
    "chat": "chats",
    "images_only-classification": "pictures",
    "images_only-retrieval": "pictures",
    "audio_only-classification": "sounds",
    "audio_only-retrieval": "sounds",
}
REFUSED = {  # what does not fit, and the fix that its message names
    "text_only-retrieval": "this model has text alone: start from a run with model.image or model.audio",
    "shakespeare-retrieval": "this model has text alone: start from a run with model.image or model.audio",
    "encoded-retrieval": "model.readers.image reads it itself: train on the original shards, or set it to null",
}
FIXED = {"encoded-retrieval": ["--model.readers.image", "null", "--model.readers.audio", "null"]}
# One process for all: starting one takes longer than its two steps. It answers each command with a line of JSON.
SCRIPT = """
import contextlib, io, json, sys, traceback, warnings
from unittest.mock import patch
import pile_app.training.callbacks
from pile_app.cli import main

warnings.simplefilter("ignore")
pile_app.training.callbacks.measure_matmul_flops = lambda device: 1e9
for line in sys.stdin:
    words, typed = json.loads(line)
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch("sys.stdin", io.StringIO(typed)):
            main(words)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        code = 1
        err.write(traceback.format_exc())
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""
SMALL = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--data.global_batch=4",
    "--data.micro_batch=null",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--wandb=null",
    "--data.prepare=null",
    "--trainer.enable_progress_bar=false",
]


@dataclass
class Shell:
    """Commands in a folder, run by one process."""

    folder: Path
    process: subprocess.Popen[str]

    def run(self, *words: str, typed: str = "", small: bool = True) -> tuple[int, str, str]:
        """Return the exit code, and what was printed to stdout and stderr. `small`: train for two steps."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([[*words, *(SMALL if small and words[0] == "train" else [])], typed]) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        return code, out, err

    def succeed(self, *words: str, typed: str = "", small: bool = True) -> str:
        code, out, err = self.run(*words, typed=typed, small=small)
        assert code == 0, f"{' '.join(words)}\n{err[-3000:]}"
        return out


def documents(kind: str, count: int) -> Iterator[Document]:
    for n in range(count):
        rng, name = np.random.default_rng(n), LABELS[n % 2]
        image = Segment.from_image(rng.integers(0, 256, (16, 16), np.uint8))
        clip = Segment.from_audio(0.3 * rng.standard_normal(2000), 8000)
        text, label = Segment(f"text {n} of {name} " + "lorem ipsum " * (n % 9)), {"label": name}
        yield {
            "prose": Document((text,), f"{n}"),
            "images": Document((image,), f"{n}"),
            "clips": Document((clip,), f"{n}"),
            "digits": Document((image, Segment(name), clip), f"{n}"),
            "pictures": Document((image, Segment(f"{name} {n}")), f"{n}", meta=label),
            "sounds": Document((clip, Segment(f"{name} {n}")), f"{n}", meta=label),
            "labelled": Document((text,), f"{n}", meta=label),
            "entities": Document((Segment(f"In Paris {name}"),), f"{n}", meta={"spans": [[3, 8, "place"]]}),
            "chats": Document((Segment(f"What is {n}?", loss=False), Segment(name)), f"{n}"),
        }[kind]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A folder in which each of `RUNS` was trained."""
    folder = tmp_path_factory.mktemp("compose")
    (folder / "conf").symlink_to(REPOSITORY / "conf")
    for split in ("train", "validation"):
        for kind in ("digits", "prose", "images", "clips"):
            write_shards(documents(kind, 24), folder / "data/digits/shards", f"{kind}-{split}")
        write_shards(documents("prose", 24), folder / "data/shakespeare/shards", split)
        for kind in {*DATA.values()}:
            write_shards(documents(kind, 24), folder / "shards", f"{kind}-{split}")
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=512)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "weights")
    train_tokenizer(["once upon a time there was a king " * 20], "bpe", 280, folder / "weights" / "tokenizer.json")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    shell = Shell(folder, process)
    for name, options in RUNS.items():
        if name == "encoded":
            for kind in ("data/digits/shards/digits", "shards/labelled", "shards/entities", "shards/chats"):
                shell.succeed("encode", "runs/default", f"{kind}-*.tar", "encoded")
        steps = ["--model.codec_steps=1"] * (name != "encoded")
        shell.succeed("train", *options, *steps, "--name", name, "--trainer.callbacks=[]")
    yield shell
    process.stdin.close()  # type: ignore[union-attr]
    process.wait()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("run", RUNS)
def test_a_task_is_laid_over_any_run_and_its_command_uses_it(shell: Shell, run: str, task: str) -> None:
    name, kind = f"{run}-{task}", DATA.get(f"{run}-{task}", DATA[task])
    prefix = "encoded" if run == "encoded" else "data/digits/shards" if kind == "digits" else "shards"
    source = {split: f"{prefix}/{kind}-{split}-*.tar" for split in ("train", "validation")}
    command = [
        "train",
        "--config",
        f"runs/{run}/config.yaml",
        "--config",
        f"conf/tasks/{task}.yaml",
        "--model.start_from",
        f"runs/{run}",
    ]
    command += ["--name", name, f"--data.sources={json.dumps({kind: source})}", *TASKS[task]]
    if name in REFUSED:
        code, _, error = shell.run(*command)
        told = error.strip().splitlines()[-1]
        assert code == 2 and told.startswith("pile: error: ") and REFUSED[name] in told, error
        assert "Traceback" not in error
        if name not in FIXED:
            return
    shell.succeed(*command, *FIXED.get(name, []))
    if task == "classification":
        label = json.loads(shell.succeed("classify", f"runs/{name}", "--text", "of seven"))["label"]
        assert label in LABELS and (shell.folder / "runs" / name / "confusion.png").exists()
    elif task == "ner":
        assert "Paris" in shell.succeed("tag", f"runs/{name}", "--text", "In Paris")
    elif task == "chat":
        assert shell.succeed("chat", f"runs/{name}", typed="/settings max_text 4\nhello\n").count("\n") >= 1
    else:
        shell.succeed("index-media", f"runs/{name}", source["validation"])
        found = shell.succeed("search", f"runs/{name}/index", "seven", "--count", "3")
        assert found.count("\n") == 3


def test_few_examples_are_learned_and_the_best_checkpoint_is_kept(shell: Shell) -> None:
    """Fault 3: three examples of each of ten classes make fewer steps than the interval between validations."""
    kinds = [f"class{n}" for n in range(10)]
    for split, count in (("train", 30), ("validation", 10)):
        few = (Document((Segment(f"{n} {chr(97 + n % 10) * 8}"),), f"{n}", meta={"label": kinds[n % 10]}) for n in range(count))
        write_shards(few, shell.folder / "few", f"few-{split}")
    options = ["--config", "runs/text_only/config.yaml", "--config", "conf/tasks/classification.yaml", "--wandb=null"]
    options += ["--model.start_from", "runs/text_only", "--model.objective.init_args.labels", json.dumps(kinds)]
    options += ["--data.sources={few: {train: few/few-train-*.tar, validation: few/few-validation-*.tar}}"]
    options += ["--data.num_workers=0", "--trainer.accelerator=cpu"]
    shell.succeed(
        "train", *options, "--name=few", "--trainer.max_steps=-1", "--data.global_batch=8", "--data.min_steps=40", small=False
    )
    few = json.loads((shell.folder / "runs/few/summary.json").read_text())
    assert few["steps"] < 50 and (shell.folder / "runs/few/checkpoints/best.ckpt").exists()
    assert few["f1"] > 0.5, few  # chance is 0.1
    found = json.loads(shell.succeed("classify", "runs/few", "--text", "7 dddddddd"))
    assert found["label"] == "class3" and len(found["probabilities"]) == 10
