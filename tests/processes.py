"""Commands as a user gives them, each in a process of its own.

It is forked from a server that has done the imports, so a start takes half a second instead of four to twelve; it runs
the same, `train.py` from its first line. Launching itself (`train.py` starting its ranks, torchrun) is tested in
`training/test_distributed.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch

from ports import free_port

TESTS = Path(__file__).parent
PRELOADED = ["preload", "attempts", "mesh"]


def surroundings() -> dict[str, str]:
    """Environment in which a process finds `attempts`."""
    return {"PYTHONPATH": os.pathsep.join(map(str, (TESTS / "training", TESTS, TESTS.parent))), "OMP_NUM_THREADS": "1"}


def forks() -> ForkServerContext:
    """Processes of this context are forked from the server, which is started if it does not run.

    A process has one such server, and what it imports is what its first user asked for: `pile prepare` asks for less.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, surroundings()):
        forkserver.ensure_running()
    return context


@dataclass
class Command:
    """A command that runs, or has ended."""

    words: Sequence[str]
    process: ForkServerProcess
    output: Path

    def wait(self, seconds: float = 240) -> int:
        """The exit code; -9 after SIGKILL."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{shlex.join(self.words)}\ndid not end within {seconds} s:\n{self.text[-3000:]}")
        return self.process.exitcode

    def succeed(self) -> str:
        """Wait for its success; returns its output."""
        assert self.wait() == 0, f"{shlex.join(self.words)}\n{self.text[-4000:]}"
        return self.text

    @property
    def text(self) -> str:
        """Its output so far."""
        return self.output.read_text()


def start(words: Sequence[str], folder: Path, **environment: str) -> Command:
    """Begins `train.py ...` or `pile ...` in `folder`."""
    number, output = tempfile.mkstemp(".txt", "output-", folder)
    os.close(number)
    process = forks().Process(target=_run, args=(list(words), folder, environment, output))
    process.start()
    return Command(words, process, Path(output))


def start_ranks(words: Sequence[str], folder: Path, ranks: int = 2, **environment: str) -> list[Command]:
    """The same on several processes, as a launcher starts them."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    return [start(words, folder, **group, LOCAL_RANK=str(rank), **environment) for rank in range(ranks)]


def _run(words: list[str], folder: Path, environment: dict[str, str], output: str) -> None:
    import torch

    from pile_app.cli import main

    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = words
    multiprocessing.set_start_method("fork", force=True)  # of loading workers, as in a process that nothing was forked from
    torch.set_num_threads(1)
    if words[0] == "pile":
        main(words[1:])
    else:
        here = folder / words[0]  # a clone's; else a `train.py` without a default configuration
        runpy.run_path(str(here if here.exists() else TESTS / words[0]), run_name="__main__")
