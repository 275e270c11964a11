"""What somebody meets who has only installed the wheel: names of commands, messages that say the fix, figures at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import AUDIO, IMAGE, media_documents
from processes import start

from pile_app.data.shards import write_shards
from pile_app.model.open_weights import HuggingFace
from pile_app.tasks.evaluate import print_tables
from pile_app.training.load import is_pretrained

SMALL = [
    "--data.prepare=null", "--data.context=192", "--data.global_batch=2", "--data.micro_batch=null", "--data.num_workers=0",
    "--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1", "--trainer.accelerator=cpu",
    "--trainer.callbacks=[]", "--trainer.max_steps=3", "--samples=false", "--name=own",
]  # fmt: skip


class Adapted(HuggingFace):
    """A backbone of open weights that somebody derived."""


def test_a_run_that_was_refused_starts_once_it_is_fixed(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_shards(media_documents(8, split), tmp_path, f"own-{split}")
    sources = {"own": {split: f"own-{split}-*.tar" for split in ("train", "validation")}}
    words = ["pile", "train", "--config", "images_only", *SMALL, f"--data.sources={json.dumps(sources)}"]
    words += [f"--model.{name}={json.dumps(vars(codec))}" for name, codec in {"image": IMAGE, "audio": AUDIO}.items()]
    refused = start([*words, "--model.codec_steps=9"], tmp_path, WANDB_MODE="offline")
    assert refused.wait() == 2
    last = refused.text.splitlines()[-1]
    assert last.startswith("pile: error: model.codec_steps=9") and "raise trainer.max_steps" in last
    words.append("--model.codec_steps=1")
    stopped = start([*words, "--trainer.max_time=00:00:00:00"], tmp_path, WANDB_MODE="offline").succeed().splitlines()[-1]
    assert "continue with: pile train --config images_only" in stopped  # as it was typed
    said = start(words, tmp_path, WANDB_MODE="offline").succeed()
    assert "\nruns/own: validation loss " in said and said.rstrip().endswith("runs/own is complete: open runs/own/report.html")
    assert not any(noise in said for noise in ("litlogger", "anonymous", "TPU available", "Traceback"))


def test_missing_open_weights_are_one_line_with_the_command_that_makes_them(tmp_path: Path) -> None:
    refused = start(["pile", "train", "--config", "open_weights", "--wandb=null"], tmp_path)
    assert refused.wait() == 2
    (line,) = refused.text.splitlines()
    recipe = line.partition("run `python ")[2].partition(" ")[0]
    assert Path(recipe).is_file() and "--folder data/smollm2/model" in line and "--model.backbone.path" in line


def test_a_recipe_that_fails_ends_in_one_line(tmp_path: Path) -> None:
    refused = start(["pile", "train", "--config", "shakespeare_fast", "--wandb=null"], tmp_path, PILE_SHAKESPEARE="missing.txt")
    assert refused.wait() == 2 and "Traceback" not in refused.text
    assert refused.text.splitlines()[-1].startswith("pile: error: the recipe 'data/shakespeare/prepare.py' failed")
    assert "PILE_SHAKESPEARE" in refused.text


def test_words_with_tags_are_read_from_a_tsv_if_the_kind_says_so(tmp_path: Path) -> None:
    (tmp_path / "tweets.tsv").write_text("".join(f"In\tO\nParis\tB-location\n{n}\tO\n\n" for n in range(40)))
    told = start(["pile", "prepare", "tweets.tsv", "out", "--kind", "entities"], tmp_path).succeed()
    assert "40 read (40 CoNLL) = 40 documents" in told and "types '[location]'" in told


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    assert start(["pile", "--version"], tmp_path).succeed().strip().replace(".", "").isalnum()


@pytest.mark.parametrize(
    ("class_path", "expected"),
    [("HuggingFace", True), (f"{__name__}.Adapted", True), ("LSTM", False), ("pile_app.model.backbones.Transformer", False)],
)
def test_open_weights_are_known_by_the_class_of_the_backbone(class_path: str, expected: bool) -> None:
    assert is_pretrained({"class_path": class_path}) is expected


def test_the_report_of_a_classifier_has_a_row_for_each_label(capsys: pytest.CaptureFixture[str]) -> None:
    objective = {"accuracy": 0.9, "f1": 0.85, "precision/good": 0.7, "f1/good": 0.8, "precision/bad": 0.6, "f1/bad": 0.5}
    confusion = {"good": {"good": 31, "bad": 2}, "bad": {"good": 7, "bad": 44}}
    print_tables({"step": 1, "sources": {}, "objective": objective, "confusion": confusion})
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert rows == [
        ["accuracy", "0.9"], ["f1", "0.85"],
        ["good", "0.7", "0.8"], ["bad", "0.6", "0.5"],
        ["good", "31", "2"], ["bad", "7", "44"],
    ]  # fmt: skip
