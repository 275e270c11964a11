"""Shared by the benchmarks: the command line, tables, processes that take turns, environments of peers, temporary data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
TESTS = [str(PROJECT / "tests"), str(PROJECT / "tests" / "training"), str(PROJECT)]  # for `sys.path`


def command(main: Callable[..., Any], description: str | None) -> None:
    """Run `main` with the command line's arguments. A true result or False, from a bar that was missed, is the exit code 1."""
    from jsonargparse import auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=False)
    main.__doc__ = (description or "").partition("\n")[0]
    sys.exit(auto_cli(main) is False)


def table(columns: Sequence[object], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]], title: str = "") -> None:
    """Print a Markdown table, each row as soon as it is measured."""
    if title:
        print(f"\n### {title}\n")
    print(f"| {' | '.join(map(str, columns))} |\n{'|---' * len(columns)}|", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def resident(field: str = "VmRSS", process: int | str = "self") -> int:
    """Bytes of a field of `/proc/PROCESS/status`: VmRSS, VmHWM (the peak), RssAnon."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure_alone(script: str, *words: object, environment: dict[str, str] | None = None) -> Any:
    """Run a script in a process of its own; returns the JSON of the last line that it prints."""
    found = subprocess.run(
        [sys.executable, script, *map(str, words)], env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True
    )
    if found.returncode:
        raise RuntimeError(f"{script} {words} ended with {found.returncode}")
    return json.loads(found.stdout.splitlines()[-1])


def write_texts(folder: Path, name: str, lengths: Sequence[int], **options: Any) -> list[str]:
    """Shards with a text of each length, in bytes. Returns their paths."""
    from pile_app.data.shards import write_shards
    from pile_app.documents import Document, Segment

    words = ["the", "of", "a", "language", "model", "reads", "and", "writes", "text", "images", "sound"]

    def text(n: int, length: int) -> str:
        return " ".join(words[(n * i + i // 3) % len(words)] for i in range(length // 5 + 1))[:length]

    documents = (Document((Segment(text(n, length)),), f"{n}") for n, length in enumerate(lengths))
    return write_shards(documents, folder, name, **options).paths


def stand_in_trainer(step: int = 0, rank: int = 0, ranks: int = 1) -> Any:
    """Return a stand-in for the trainer of a data module."""
    sampler = {"num_replicas": ranks, "rank": rank} if ranks > 1 else None
    return SimpleNamespace(
        distributed_sampler_kwargs=sampler, local_rank=0, num_nodes=ranks, global_step=step, max_steps=1 << 40, training=True
    )


class Contestant:
    """A process that works when it is its turn: a line on stdin says how much, its answer is a line of JSON."""

    def __init__(self, words: Sequence[object], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")

    def take_turn(self, amount: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{amount}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def make_environment(folder: Path, packages: Sequence[str], overrides: Sequence[str] = ()) -> Path:
    """The Python of a virtual environment with these packages, made by `uv` unless it is there."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists() or done.read_text() != " ".join(packages):
        print(f"installing {packages[0]} ...", file=sys.stderr, flush=True)
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        (folder / "overrides.txt").write_text("\n".join(overrides))
        # --no-config: the project's own bounds do not apply to a peer.
        install: list[str | Path] = ["uv", "pip", "install", "--no-config", "--quiet", "--python", python]
        subprocess.run([*install, "--override", folder / "overrides.txt", *packages], check=True, stdout=sys.stderr)
        done.write_text(" ".join(packages))
    return python
