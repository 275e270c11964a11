"""Run jobs of `pile prepare` in processes on this machine, or on a cluster through Ray Data.

An engine is a context of `run(task, items)`, which calls `task(item)` for each item, in any order and possibly twice, and
yields after each."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from pile_app.data.files import Run, worker_pool
from pile_app.prepare.options import require

Task = Callable[[Any], object]
T = TypeVar("T")


@contextmanager
def _local(processes: int) -> Iterator[Run]:
    with worker_pool(processes, "pile_app.prepare.spill") as run:
        try:
            yield run
        except BrokenProcessPool as error:
            raise ValueError("a process was killed, perhaps for lack of memory: try fewer with --processes") from error


@contextmanager
def _ray(processes: int) -> Iterator[Run]:
    """Run on the cluster that `RAY_ADDRESS` names, or on `processes` cores of this machine."""
    ray = import_ray()
    if started := not ray.is_initialized():
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": processes, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **here)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(task: Task, items: Sequence[Any]) -> Iterator[Any]:
        if items:
            rows = ray.data.from_items(list(map(pickle.dumps, items)), override_num_blocks=min(len(items), 10_000))
            yield from rows.map(lambda row: {"done": task(pickle.loads(row["item"])) is None}).iter_rows()

    try:
        yield run
    except ray.exceptions.RayError as error:
        raise ValueError(f"a task on Ray failed: {error.__cause__ or error}") from error
    finally:
        if started:
            ray.shutdown()


def import_ray() -> Any:
    # Read by Ray on import: otherwise `uv run` starts its workers without an environment, and usage is reported to its makers.
    for name in ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    return require("ray.data", "ray", "--engine ray") and require("ray", "ray", "--engine ray")


ENGINES: dict[str, Callable[[int], AbstractContextManager[Run]]] = {"local": _local, "ray": _ray}


def tracked(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """Show a progress bar on stderr if it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, console=Console(stderr=True), disable=not sys.stderr.isatty())
