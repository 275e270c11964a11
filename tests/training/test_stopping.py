"""Stopping a run, and what Lightning's own switches do to it."""

from __future__ import annotations

import platform
import shlex
import signal
import time
from pathlib import Path

import pytest
from attempts import Workbench, assert_same_run, checkpoint, is_same, losses, make_bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With `full`, a complete run of 14 steps."""
    bench = make_bench(tmp_path_factory.mktemp("stopping"))
    bench.train("full")
    return bench


def test_ctrl_c_saves_a_checkpoint_and_prints_the_command_that_continues(bench: Workbench) -> None:
    arguments = ("interrupted", "--data.num_workers", "2")
    attempt = bench.start(*arguments, INTERRUPT_AT="6")
    assert attempt.wait(30) == 130, attempt.text[-3000:]
    assert checkpoint(bench.run("interrupted"))["global_step"] == 8
    said, _, command = attempt.text.splitlines()[-1].partition("; continue with: ")
    assert said == "runs/interrupted: stopped after step 8" and "Traceback" not in attempt.text
    python, program, *words = shlex.split(command)
    assert (python, Path(program).name, *words) == ("python", *attempt.words)
    bench.train(*arguments)
    assert_same_run(bench.run("interrupted"), bench.run("full"))


def test_ctrl_c_after_the_last_step_leaves_a_run_that_the_same_command_finishes(bench: Workbench) -> None:
    attempt = bench.start("nearly", INTERRUPT_IN_LAST_VALIDATION="1")
    assert attempt.wait(30) == 130, attempt.text[-3000:]
    assert "stopped after step 14; continue with: python" in attempt.text.splitlines()[-1]
    assert "is complete (14 steps)" not in bench.train("nearly") and (bench.run("nearly") / "summary.json").exists()
    assert_same_run(bench.run("nearly"), bench.run("full"))


def test_second_ctrl_c_ends_at_once(bench: Workbench) -> None:
    attempt = bench.start("hurried", INTERRUPT_AT="7", INTERRUPT_AGAIN="7")
    assert attempt.wait(30) == -signal.SIGINT
    assert checkpoint(bench.run("hurried"))["global_step"] == 6
    assert "Traceback" not in attempt.text


def test_max_time_stops_and_the_same_command_continues(bench: Workbench) -> None:
    arguments = ("timed", "--trainer.max_time", "00:00:00:04")
    said = bench.train(*arguments, SLEEP="2")
    stopped = checkpoint(bench.run("timed"))["global_step"]
    assert 0 < stopped < 14 and f"stopped after step {stopped}" in said
    assert not (bench.run("timed") / "summary.json").exists()
    assert "is complete" in bench.train(*arguments)
    assert_same_run(bench.run("timed"), bench.run("full"))


@pytest.mark.parametrize("steps", ["1", "5"])
def test_fast_dev_run_leaves_nothing_behind(bench: Workbench, steps: str) -> None:
    """Neither a run of its own nor traces in an existing run; 5 steps train codecs and language model in 2 micro-batches."""
    for name in ("trial", "full"):
        before = snapshot(bench.folder)
        said = bench.train(name, "--trainer.fast_dev_run", steps, "--data.micro_batch", "2")
        assert f"fast_dev_run: {steps} optimizer steps; nothing is kept" in said
        assert snapshot(bench.folder) == before


def test_second_process_with_the_same_name_is_refused_with_the_first(bench: Workbench) -> None:
    first = bench.start("shared", SLEEP="0.3")
    while "Epoch" not in first.text:
        time.sleep(0.1)
    second = bench.start("shared")
    assert second.wait() == 2
    [error] = second.text.splitlines()
    assert f"runs/shared is being trained by process {first.process.pid} on {platform.node()}" in error and "--name" in error
    first.succeed()
    assert_same_run(bench.run("shared"), bench.run("full"))


@pytest.mark.parametrize("switch", ["logger", "enable_progress_bar"])
def test_loggers_and_progress_bar_can_be_switched_off(bench: Workbench, switch: str) -> None:
    said = bench.train(switch, f"--trainer.{switch}", "false")
    assert "is complete" in said and ("Epoch" in said) == (switch == "logger")
    assert (bench.run(switch) / "metrics.csv").exists() == (switch != "logger")
    assert is_same(checkpoint(bench.run(switch))["state_dict"], checkpoint(bench.run("full"))["state_dict"])


def test_early_stopping_waits_for_the_language_model_and_validation_reports_codecs_until_then(bench: Workbench) -> None:
    words = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=validation/loss"]
    words += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=0"]
    bench.train("waits", *words, "--model.codec_steps", "10", "--trainer.val_check_interval", "2")
    rows = losses(bench.run("waits"))
    values = {step: {n for n in row if n.startswith("validation/")} for step, row in rows.items() if step % 2}
    codecs = {"validation/image_codec_loss", "validation/audio_codec_loss"}
    assert all(values[step] == codecs for step in (1, 3, 5, 7))
    assert all(values[step] > codecs | {"validation/loss"} for step in (9, 11, 13))


def snapshot(folder: Path) -> dict[Path, int]:
    """Path -> time of its last change, of all but what commands print."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.name.startswith("output-")}
