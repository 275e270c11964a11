"""A run from its command line to its summary: refusals, counts and completion."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from attempts import Workbench, checkpoint, losses, make_bench
from conftest import REPOSITORY
from lightning.pytorch import Trainer
from ports import free_port
from processes import start

from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import ByteTokenizer, load_tokenizer, train_tokenizer
from pile_app.documents import Document, Segment
from pile_app.model.backbones import Transformer
from pile_app.model.fused import make_vocabulary
from pile_app.training import cli
from pile_app.training.load import load_run
from pile_app.training.module import PileModule
from pile_app.training.optim import OptimizerConfig

SHORT = ("--model.codec_steps", "1", "--trainer.max_steps", "4")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With `full`, a complete run of 14 steps."""
    bench = make_bench(tmp_path_factory.mktemp("run"))
    bench.train("full")
    return bench


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.backbone.init_args.widht", "64"], ["widht"]),
        (["--data.context", "long"], ["data.context", "long"]),
        (["--model.backbone.init_args.heads", "5"], ["32", "5"]),
        (["--data.context", "9", "--model.image.patch", "2"], ["data.context=9", "16 codes"]),
        (["--trainer.max_steps", "-1"], ["trainer.max_steps", "data.epochs"]),
        (["--data.micro_batch", "3"], ["data.micro_batch=3", "data.global_batch=4"]),
        (["--checkpoint_every", "0"], ["checkpoint_every=0"]),
        (["--trainer.devices", "5"], ["data.global_batch=4", "5 devices"]),
        (["--trainer.accumulate_grad_batches", "2"], ["accumulate_grad_batches=2", "data.micro_batch"]),
        (["--trainer.barebones", "true"], ["trainer.barebones"]),
        (["--trainer.enable_checkpointing", "false"], ["trainer.enable_checkpointing", "checkpoint_every"]),
        (["--trainer.limit_train_batches", "1"], ["limit_train_batches=1", "trainer.max_steps"]),
        (["--trainer.max_epochs", "3"], ["max_epochs=3", "data.epochs"]),
        (["--trainer.overfit_batches", "2"], ["overfit_batches=2"]),
        (["--trainer.precision", "bf16-true"], ["trainer.precision=bf16-true", "bf16-mixed"]),
        (["--trainer.precision", "16-true"], ["trainer.precision=16-true", "16-mixed"]),
        (["--trainer.precision", "64-true"], ["trainer.precision=64-true", "32-true"]),
        (["--trainer.max_time", "soon"], ["soon", "DD:HH:MM:SS"]),
    ],
)
def test_config_that_cannot_be_is_refused_by_name(bench: Workbench, arguments: list[str], named: list[str]) -> None:
    attempt = bench.start("refused", *arguments)
    assert attempt.wait() == 2
    [error] = attempt.text.splitlines()
    assert all(word in error for word in named), attempt.text
    assert not bench.run("refused").exists()


def test_folder_that_cannot_be_written_is_refused_in_a_line(bench: Workbench) -> None:
    attempt = bench.start("x", "--runs", str(bench.config))  # a file, where not even root can make a folder
    assert attempt.wait() == 2
    assert "cannot be written" in attempt.text.splitlines()[-1] and "--runs" in attempt.text.splitlines()[-1]


def test_config_can_be_printed(bench: Workbench) -> None:
    printed = yaml.safe_load(bench.train("printed", "--print_config"))
    assert printed["data"]["context"] == 128 and printed["trainer"]["max_steps"] == 14
    assert not bench.run("printed").exists()


def test_complete_run_is_not_trained_again_unless_it_is_to_be_longer(bench: Workbench) -> None:
    before = {path: path.stat().st_mtime_ns for path in bench.run("full").rglob("*")}
    assert "runs/full is complete (14 steps): open runs/full/report.html" in bench.train("full")
    assert {path: path.stat().st_mtime_ns for path in bench.run("full").rglob("*")} == before
    steps = losses(bench.run("full"))
    bench.train("full", "--trainer.max_steps", "16", "--model.optimizer.schedule", "constant")
    assert json.loads((bench.run("full") / "summary.json").read_text())["steps"] == 16
    longer = losses(bench.run("full"))
    assert {15} <= longer.keys() and all(longer[step] == steps[step] for step in range(14))


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--model.optimizer.learning_rate", "0.1"], "model.optimizer.learning_rate was 0.003, now it is 0.1"),
        (["--model.backbone.init_args.width", "64"], "model.backbone.init_args.width was 32, now it is 64"),
        (["--model.backbone", "{class_path: LSTM, init_args: {width: 32, layers: 2}}"], "was Transformer, now it is LSTM"),
        (["--data.global_batch", "8"], "data.global_batch was 4, now it is 8"),
        (["--trainer.gradient_clip_val", "0.5"], "trainer.gradient_clip_val was 1.0, now it is 0.5"),
    ],
)
def test_run_is_complete_for_its_own_configuration_only(bench: Workbench, arguments: list[str], difference: str) -> None:
    if not bench.run("whole").exists():
        bench.train("whole", *SHORT)
    attempt = bench.start("whole", *SHORT, *arguments)
    assert attempt.wait() == 2
    [error] = attempt.text.splitlines()
    assert f"runs/whole is complete (4 steps) with another configuration: {difference}" in error.replace(
        "model.backbone w", "w"
    )
    assert "--name" in error and "trainer.max_steps" in error
    assert "is complete (4 steps): open" in bench.train("whole", *SHORT, "--data.micro_batch", "2", "--checkpoint_every", "9")


def test_run_that_ends_worse_than_guessing_says_so(bench: Workbench, tmp_path: Path) -> None:
    """And, with another folder for its runs, writes nothing into the working folder."""
    before = set(bench.folder.iterdir())
    words = ("--runs", str(tmp_path), "--model.optimizer.name", "adamw", "--model.optimizer.learning_rate", "1e6")
    said = bench.train("wild", *SHORT, *words, "--model.optimizer.schedule", "constant")
    assert "text_loss is" in said and "guessing has 5.5" in said and "lower the learning rate" in said
    summary = json.loads((tmp_path / "wild" / "summary.json").read_text())
    assert "guessing" in summary["warnings"][0] and summary["watched_step"] == 4
    assert "warnings" not in json.loads((bench.run("full") / "summary.json").read_text())
    assert {path.name for path in set(bench.folder.iterdir()) - before if not path.name.startswith("output-")} == set()


def test_other_settings_than_those_of_start_from_are_refused(bench: Workbench) -> None:
    attempt = bench.start("from", "--model.start_from", "runs/full", "--model.backbone.init_args.heads", "4")
    assert attempt.wait() == 2
    [error] = attempt.text.splitlines()
    assert "model.start_from='runs/full' holds another model: model.backbone.init_args.heads was 2, now it is 4" in error
    attempt = bench.start(
        "from", "--model.codecs_from", "runs/full/checkpoints/last.ckpt", "--model.audio.sample_rate", "16000"
    )
    assert attempt.wait() == 2 and "model.audio.sample_rate was 8000, now it is 16000" in attempt.text


def test_run_resumes_without_the_files_that_it_began_with(bench: Workbench, tmp_path: Path) -> None:
    origin = shutil.copytree(bench.run("full"), tmp_path / "origin")
    begin = ("begun", "--model.start_from", str(origin), "--model.codec_steps", "0")
    assert bench.start(*begin, KILL_AT="4").wait() == -9
    shutil.rmtree(origin)
    assert "is complete" in bench.train(*begin)


def test_configuration_is_laid_over_the_default_next_to_train_py_in_any_working_folder(tmp_path: Path) -> None:
    words = [str(REPOSITORY / "train.py"), "--config", str(REPOSITORY / "conf" / "text_only.yaml"), "--print_config"]
    printed = yaml.safe_load(start(words, tmp_path).succeed())
    default = yaml.safe_load((REPOSITORY / "conf" / "default.yaml").read_text())
    assert printed["model"]["optimizer"]["learning_rate"] == default["model"]["optimizer"]["learning_rate"] == 0.01


def test_missing_default_configuration_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "BUNDLED", tmp_path / "installed")
    with pytest.raises(FileNotFoundError, match=r"no conf/default.yaml"):
        cli.parse_config([])


def test_run_keeps_its_tokenizer(bench: Workbench, tmp_path: Path) -> None:
    path, other = tmp_path / "bpe.json", tmp_path / "other.json"
    train_tokenizer(["lorem ipsum " * 9, "number one", "train text"], "bpe", 270, path)
    train_tokenizer(["dolor sit amet " * 9, "number two", "some words"], "bpe", 270, other)
    words = ("tokens", *SHORT, "--model.tokenizer", str(path))
    bench.train(*words)
    run, trained = bench.run("tokens"), load_tokenizer(str(path)).fingerprint
    shutil.copy(other, path)
    assert load_run(run)[0].tokenizer.fingerprint == trained != load_tokenizer(str(other)).fingerprint
    path.unlink()
    bench.train(*words, "--trainer.max_steps", "5")
    assert load_run(run)[1].tokenizer.fingerprint == trained
    shutil.copy(other, run / "tokenizer.json")
    with pytest.raises(ValueError, match=f"is not that of the run .* instead of {trained}"):
        load_run(run)


def test_trainer_by_hand_takes_optimizer_steps(bench: Workbench, tmp_path: Path) -> None:
    """It counts the global batch, not the micro-batch."""

    def fit(micro_batch: int, **options: Any) -> tuple[Trainer, PileModule]:
        torch.manual_seed(0)
        module = PileModule(Transformer(width=32, layers=2, heads=2), optimizer=OptimizerConfig("sgd"))
        sources = {"prose": Source(f"{bench.shards}/prose-train-*.tar", f"{bench.shards}/prose-validation-*.tar")}
        size = {"context": 128, "global_batch": 8, "micro_batch": micro_batch, "condition_dropout": 0.0}
        data = PileDataModule(sources, module.vocabulary, module.tokenizer, **size)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
        trainer = Trainer(default_root_dir=tmp_path, **quiet, **options)
        trainer.fit(module, data)
        return trainer, module

    (whole, one), (parts, two) = fit(8, max_steps=4), fit(4, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None)
    assert (whole.global_step, parts.global_step, parts.accumulate_grad_batches) == (4, 4, 2)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(parts.callback_metrics["validation/loss"])
    parts.fit(two, datamodule=parts.datamodule)  # has nothing left to do
    assert [path.name for path in tmp_path.rglob("*.ckpt")]
    for options, message in (
        ({"max_steps": 4, "accumulate_grad_batches": 2}, "accumulate_grad_batches follows"),
        ({"max_epochs": 1}, "how long to train"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(4, **options)
    with pytest.raises(ValueError, match="PileDataModule"):
        Trainer(max_steps=1, accelerator="cpu", logger=False).fit(one, torch.utils.data.DataLoader([1]))


def test_first_process_alone_writes_the_id_for_weights_and_biases(bench: Workbench) -> None:
    second = bench.start(
        *("logged", "--wandb", "pile", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"},
        **{"LOCAL_RANK": "1", "WANDB_MODE": "offline"},
    )
    while "GLOBAL_RANK: 1" not in second.text and second.process.is_alive():
        time.sleep(0.1)
    second.process.kill()
    assert "GLOBAL_RANK: 1" in second.text, second.text
    assert not (bench.run("logged") / "wandb").exists()


def test_early_stopping_by_config_completes_the_run(bench: Workbench) -> None:
    words = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=validation/loss"]
    words += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=100"]
    bench.train("early", *words)
    summary = json.loads((bench.run("early") / "summary.json").read_text())
    assert summary["steps"] == checkpoint(bench.run("early"))["global_step"] == 10
    assert "is complete (10 steps)" in bench.train("early", *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.optimizer.name", "sgd"],
        ["--model.optimizer.name", "adamw"],
        ["--model.optimizer.name", "muon"],
        ["--model.l1", "0.01"],
        ["--model.optimizer.weight_decay", "0.5"],
        ["--model.backbone", "{class_path: LSTM, init_args: {width: 32, layers: 2}}"],
        ["--model.backbone", "{class_path: RNN, init_args: {width: 32, layers: 2}}"],
    ],
    ids=lambda arguments: " ".join(arguments[-2:])[-30:],
)
def test_every_optimizer_penalty_and_backbone_trains(bench: Workbench, arguments: list[str]) -> None:
    name = "-".join(filter(str.isalnum, arguments[-1] + arguments[-2]))
    bench.train(name, *SHORT, *arguments)
    values = losses(bench.run(name))
    assert all(np.isfinite(float(values[step]["train/loss"])) for step in (1, 2, 3))
    saved = checkpoint(bench.run(name))
    assert saved["global_step"] == 4
    heads = [tensor for key, tensor in saved["state_dict"].items() if key.startswith("model.heads.0")]
    assert heads and all(bool(tensor.any()) for tensor in heads)  # they start at zero


def test_sources_may_be_called_like_methods_and_with_dots(bench: Workbench, tmp_path: Path) -> None:
    config = yaml.safe_load(bench.config.read_text())
    media, prose = config["data"]["sources"].values()
    config["data"]["sources"] = {"train": media, "type": prose, "all": media, "v1.5": prose}
    odd = Workbench(tmp_path, bench.shards)
    odd.config.write_text(yaml.safe_dump(config))
    odd.train("run", *SHORT)
    summary = json.loads((odd.run("run") / "summary.json").read_text())
    assert all(f"{name}_loss" in summary for name in ("train", "type", "all", "v1.5"))


@pytest.mark.parametrize(("bad", "code"), [(1, 0), (40, 1)])
def test_damaged_documents_are_counted_and_too_many_stop_the_run(bench: Workbench, tmp_path: Path, bad: int, code: int) -> None:
    damaged = Workbench(tmp_path, tmp_path / "shards")
    written = write_shards((Document((Segment(f"text {n}"),), f"t-{n}") for n in range(200)), damaged.shards, "prose-train")
    with open(written.paths[0], "r+b") as file:
        for offset in written.index(0).offset[:bad].tolist():
            file.seek(offset + 512)
            file.write(b"\xff")
    sources = f"{{prose: {{train: '{damaged.shards}/prose-train-*.tar', validation: null, weight: null}}}}"
    words = ["--model.image", "null", "--model.audio", "null", "--data.sources", sources]
    attempt = damaged.start("run", *words, "--data.epochs", "1", "--trainer.max_steps", "-1")
    assert attempt.wait() == code, attempt.text[-3000:]
    entries = [json.loads(line) for line in (damaged.run("run") / "quarantine.jsonl").read_text().splitlines()]
    if code:
        assert "documents could not be used" in attempt.text and "data.max_rejected_share=1.0%" in attempt.text
        assert not (damaged.run("run") / "summary.json").exists()
    else:
        assert [entry["key"] for entry in entries] == ["t-0"]
        summary = json.loads((damaged.run("run") / "summary.json").read_text())
        assert summary["quarantined"] == {"prose": {entries[0]["reason"]: 1}}


@pytest.mark.parametrize("context", [24, 64, 512])
def test_normalizer_is_the_number_of_targets(tmp_path: Path, context: int) -> None:
    """Of whole documents and of cut ones, with segments that are given and not learned."""

    def texts() -> Iterator[Document]:
        for n in range(30):
            question = Segment("what is " + "so " * (n % 5) + "big?", loss=False)
            answer = Segment("an elephant " * (1 + n % 4))
            yield Document(((question, answer), (answer, question), (answer,))[n % 3], f"t-{n}")

    write_shards(texts(), tmp_path, "text")
    tokenizer = ByteTokenizer()
    sources = {"text": Source(str(tmp_path / "text-*.tar"))}
    vocabulary = make_vocabulary(tokenizer.size, tokenizer.fingerprint, None, None)
    data = PileDataModule(sources, vocabulary, tokenizer, context, global_batch=2, condition_dropout=0.0)
    data.prepare_data()
    data.setup()
    dataset = data.train_dataset()
    for step in range(data.order.packs_per_epoch // 2):
        batch = dataset.__getitems__([2 * step, 2 * step + 1])
        assert batch.normalizer == sum(len(places) for places in batch.targets)
