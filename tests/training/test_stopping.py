"""Stopping a run, and what Lightning's own switches do to it."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest
from attempts import Workbench, assert_same_run, checkpoint, make_bench


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
