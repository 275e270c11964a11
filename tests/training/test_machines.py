"""Machines that the project is not developed on: Apple's GPUs, Windows, checkouts that nobody may write."""

from __future__ import annotations

import shutil
import stat
import sys
from typing import Any

import pytest
import torch
from attempts import Workbench, assert_close_runs, documents, make_bench
from processes import TESTS, start
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pile_app.training import metrics
from pile_app.training.cli import main

SHORT = ("--trainer.max_steps=4", "--model.codec_steps=2", "--trainer.val_check_interval=2", "--checkpoint_every=2")
SAMPLES = (
    "--trainer.callbacks+=pile_app.training.callbacks.SampleGeneration",
    "--trainer.callbacks.count=1",
    "--trainer.callbacks.sampling={max_text: 4, max_seconds: 0.2}",
)
WINDOWS = """
import importlib, signal, sys
from pathlib import Path

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)

from lightning.pytorch.strategies import StrategyRegistry

StrategyRegistry.pop("fsdp2")  # all of Pile is imported again
for name in [name for name in sys.modules if name.startswith("pile_app")]:
    del sys.modules[name]
import pile_app

folder = Path(pile_app.__file__).parent
modules = [path for path in folder.rglob("*.py") if path.stem != "__init__"]  # packages without that file are not walked
assert len(modules) > 60
for path in modules:
    importlib.import_module(".".join(("pile_app", *path.relative_to(folder).with_suffix("").parts)))
from pile_app.training.cli import main

main()
"""

SPAWN = f"""
import multiprocessing, runpy

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    runpy.run_path({str(TESTS / "train.py")!r}, run_name="__main__")
"""


class WithoutFloat64(TorchDispatchMode):
    """Refuses every operation that returns float64, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: the MPS framework doesn't support float64")
        return result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("machines"))


def test_apple_gpus_without_float64(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, validation, samples and the summary, where `sum_dtype` answers as for a device `mps`."""
    assert metrics.sum_dtype(torch.device("mps")) == torch.float32
    for module in list(sys.modules.values()):
        if hasattr(module, "sum_dtype"):
            monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)
    monkeypatch.chdir(bench.folder)
    monkeypatch.setattr(sys, "argv", bench.words("apple", *SHORT, *SAMPLES))
    with WithoutFloat64():
        main()
    assert (bench.run("apple") / "summary.json").exists()


def test_windows_imports_and_trains(bench: Workbench) -> None:
    """Without the modules and signals of Unix."""
    (bench.folder / "windows").mkdir()
    (bench.folder / "windows" / "train.py").write_text(WINDOWS)
    start(bench.words("windows", *SHORT), bench.folder / "windows").succeed()
    assert (bench.folder / "windows" / "runs" / "windows" / "summary.json").exists()


def test_loading_workers_that_are_spawned(bench: Workbench) -> None:
    """As on macOS and Windows; on two ranks, they read what one process reads that loads the data itself."""
    spawning = Workbench(bench.folder / "spawning", bench.shards)
    (spawning.folder / "train.py").write_text(SPAWN)
    steps = ("--trainer.max_steps=3", "--model.codec_steps=1", "--trainer.limit_val_batches=0")
    for rank in spawning.start_ranks("run", *steps, "--data.num_workers=1"):
        assert rank.wait(600) == 0, rank.text  # each worker imports everything again
    bench.train("alone", *steps, "--data.micro_batch=2")
    assert documents(spawning.run("run")) == documents(bench.run("alone"))
    assert_close_runs(spawning.run("run"), bench.run("alone"))


def test_read_only_checkout(bench: Workbench) -> None:
    """A checkout that nobody may write, as another user's, with `--runs` elsewhere."""
    checkout = bench.folder / "checkout"
    shutil.copytree(TESTS / "conf", checkout / "conf")
    shutil.copy(TESTS / "train.py", checkout)
    before = set(checkout.rglob("*"))
    for path in (checkout, *before):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    elsewhere = bench.folder / "elsewhere" / "runs"
    words = ["train.py", *bench.words("locked", *SHORT, "--runs", str(elsewhere))[1:]]
    start(words, checkout, PYTHONDONTWRITEBYTECODE="1").succeed()
    assert (elsewhere / "locked" / "report.html").exists()
    written = {path for path in checkout.rglob("*") if not path.match("output-*.txt")}  # that of `start`
    assert written == before  # also where root may write in spite of the modes
