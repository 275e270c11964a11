"""Several processes train the same run as one: the same documents in the same steps, the same losses. They stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from attempts import (
    Attempt,
    Workbench,
    assert_close_runs,
    assert_same_run,
    checkpoint,
    documents,
    is_same,
    losses,
    make_bench,
    surroundings,
)
from conftest import REPOSITORY
from ports import free_port


def start_ranks(bench: Workbench, name: str, *arguments: str, **environment: str) -> list[Attempt]:
    return bench.start_ranks(name, *arguments, port=free_port(), **environment)


def train_on_two(bench: Workbench, name: str, *arguments: str) -> None:
    for rank in start_ranks(bench, name, *arguments):
        assert rank.wait() == 0, rank.text[-4000:]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With `one`, a run of one process in micro-batches of 2, and `two`, the same on two processes."""
    bench = make_bench(tmp_path_factory.mktemp("distributed"))
    bench.train("one", "--data.micro_batch", "2")
    train_on_two(bench, "two")
    return bench


def test_two_processes_read_what_one_reads_and_lose_what_one_loses(bench: Workbench) -> None:
    one, two = documents(bench.run("one")), documents(bench.run("two"))
    assert len(one) == 14 and all(one.values())
    assert one == two
    assert_close_runs(bench.run("two"), bench.run("one"))


def test_run_killed_on_two_processes_goes_on_with_one(bench: Workbench) -> None:
    ranks = start_ranks(bench, "shrunk", KILL_AT="8")
    assert ranks[0].wait() == -9
    ranks[1].process.kill()  # it may wait for the other one for half an hour
    assert checkpoint(bench.run("shrunk"))["global_step"] == 6
    bench.train("shrunk", "--data.micro_batch", "2")
    assert documents(bench.run("shrunk")) == documents(bench.run("one"))
    assert_close_runs(bench.run("shrunk"), bench.run("one"))


def test_sigterm_to_one_process_stops_both_and_the_run_resumes_exactly(bench: Workbench) -> None:
    ranks = start_ranks(bench, "stopped", STOP_AT="6")
    assert [rank.wait(30) for rank in ranks] == [143, 0]
    assert checkpoint(bench.run("stopped"))["global_step"] == 8
    train_on_two(bench, "stopped")
    assert_same_run(bench.run("stopped"), bench.run("two"))


def test_loss_that_is_no_number_on_one_process_is_rejected_by_both(bench: Workbench) -> None:
    words = ("--checkpoint_every", "1", "--trainer.max_steps", "9", "--trainer.val_check_interval", "100")
    ranks = start_ranks(bench, "poisoned", *words, POISON="8 8 1")
    assert [rank.wait(30) for rank in ranks] == [0, 0]
    before, after = checkpoint(bench.run("poisoned"), "previous"), checkpoint(bench.run("poisoned"))
    assert is_same(before["state_dict"], after["state_dict"])
    entries = [json.loads(line) for line in (bench.run("poisoned") / "rejected.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [9, 9]
    assert sorted(position for entry in entries for position in entry["positions"]) == [32, 33, 34, 35]


def test_model_without_media_trains_on_two_processes(bench: Workbench) -> None:
    """Its empty tables have gradients that nothing would produce."""
    sources = f"{{prose: {{train: '{bench.shards}/prose-train-*.tar'}}}}"
    arguments = ("--model.image", "null", "--model.audio", "null", "--data.sources", sources, "--trainer.max_steps", "3")
    train_on_two(bench, "text", *arguments)
    bench.train("text-one", *arguments, "--data.micro_batch", "2")
    assert_close_runs(bench.run("text"), bench.run("text-one"))


def test_train_py_starts_its_processes_and_torchrun_resumes_the_run(bench: Workbench) -> None:
    arguments = ["train.py", "--config", str(bench.config), "--name", "launched", "--runs", str(bench.folder / "runs")]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = os.environ | surroundings()
    command = [sys.executable, str(REPOSITORY / arguments[0]), *arguments[1:]]
    stopped = subprocess.run(command, cwd=bench.folder, env=environment | {"STOP_AT": "6"}, capture_output=True, text=True)
    assert stopped.returncode == 143, stopped.stderr[-4000:]
    assert checkpoint(bench.run("launched"))["global_step"] == 8
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run([*torchrun, *command[1:]], cwd=bench.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(losses(bench.run("launched"))) >= 14
    assert_same_run(bench.run("launched"), bench.run("two"))
