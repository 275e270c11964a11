"""The data room on other machines: imports on Windows and macOS, the start method `spawn`, copies to a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device

from pile_app.data.assembly import assemble, whole
from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import Document, Segment
from pile_app.vocabulary import Vocabulary

MISSING = {
    "Windows": (
        ["fcntl", "resource", "pwd", "grp", "termios"],
        ["os.pread", "os.memfd_create", "os.posix_fadvise", "os.killpg", "os.fork", "signal.SIGUSR1", "signal.SIGCHLD",
         "signal.SIGKILL", "multiprocessing.reduction.DupFd"],
    ),
    "macOS": ([], ["os.memfd_create", "os.posix_fadvise", "os.sched_getaffinity"]),
}  # fmt: skip

WITHOUT = """
import sys, os, signal, multiprocessing.reduction
sys.modules |= dict.fromkeys({modules})
for name in {names}:
    module, _, attribute = name.rpartition(".")
    vars(sys.modules[module]).pop(attribute, None)
import importlib, pkgutil, pile_app.data
for module in pkgutil.iter_modules(pile_app.data.__path__):
    importlib.import_module("pile_app.data." + module.name)
"""

TRAINING = """
import multiprocessing, sys
from types import SimpleNamespace
from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.vocabulary import Vocabulary

def keys(workers):
    data = PileDataModule({"x": Source(sys.argv[1])}, Vocabulary(), ByteTokenizer(), 64, 4, epochs=1, num_workers=workers)
    data.setup()
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, local_rank=0, global_step=0, max_steps=-1, training=True)
    return [(batch.documents, batch.tokens.tolist()) for batch in data.train_dataloader()]

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    assert keys(1) == keys(0) and len(keys(0)) > 1
"""


def run(script: Path, code: str, *arguments: str) -> None:
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("system", MISSING)
def test_the_data_room_is_imported_without_what_the_system_lacks(tmp_path: Path, system: str) -> None:
    modules, names = MISSING[system]
    begin = (
        "import torch, lightning.pytorch, fsspec, webdataset, safetensors, tokenizers\n"  # which have builds for each system
    )
    run(tmp_path / "x.py", begin + WITHOUT.format(modules=modules, names=names))


def test_loading_workers_may_be_spawned(tmp_path: Path) -> None:
    write_shards((Document((Segment("x" * (n % 50)),), f"{n}") for n in range(40)), tmp_path, "x")
    run(tmp_path / "x.py", TRAINING, str(tmp_path / "x-*.tar"))


def test_a_batch_is_copied_to_a_gpu_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document((Segment("abc"),), "a")
    batch = assemble([[whole(document, 6)]], Vocabulary(), ByteTokenizer(), 8)
    asked: list[tuple[str, bool]] = []
    copy = torch.Tensor.to

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        asked.append((torch.device(device).type, non_blocking))
        return copy(self, "cpu")

    monkeypatch.setattr(torch.Tensor, "to", to)
    for device in ("cuda", "cpu", "mps"):
        move_data_to_device(batch, torch.device(device))
    assert asked == [("cuda", True), ("cpu", False), ("mps", False)]
