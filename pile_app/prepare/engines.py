"""Where `pile prepare` works: in processes here, or on a cluster through Ray Data.

An engine is a context in which `run(task, folder, things)` calls `task(folder, thing)` for each of the things, in any order and
maybe again, and yields once for each that is done.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

from pile_app.prepare.options import require

Run = Callable[[Callable[[str, Any], None], str, Sequence[Any]], Iterator[Any]]  # task(folder, thing) for each of things


def _here(processes: int) -> AbstractContextManager[Run]:
    """Work in this process, or in others where there are many things to do."""
    return nullcontext(partial(_run_here, processes))


def _run_here(processes: int, task: Callable[[str, Any], None], folder: str, things: Sequence[Any]) -> Iterator[Any]:
    processes = min(processes, len(things))
    if processes < 2:
        yield from map(partial(task, folder), things)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pile_app.prepare.spill"])
    with ProcessPoolExecutor(processes, context, _end_with_parent) as pool:
        yield from pool.map(partial(task, folder), things, chunksize=1 + len(things) // 10_000)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _on_ray(processes: int) -> Iterator[Run]:
    """Work on the cluster that `RAY_ADDRESS` names, or on `processes` cores here."""
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": processes, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **here)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(task: Callable[[str, Any], None], folder: str, things: Sequence[Any]) -> Iterator[Any]:
        folder = os.path.abspath(folder)

        def run_one(row: dict[str, Any]) -> dict[str, Any]:
            if not os.path.isdir(folder):
                raise ValueError(
                    f"a node does not see {folder!r}: input and output have to lie in folders that all nodes share"
                )
            task(folder, row["item"])
            return row

        if not things:
            return
        dataset = ray.data.from_items(list(things), override_num_blocks=min(len(things), 10_000))
        try:
            yield from dataset.map(run_one).iter_rows()
        except ray.exceptions.RayError as error:
            raise ValueError(f"a task on Ray failed: {error.__cause__ or error}") from error

    try:
        yield run
    finally:
        if ours:
            ray.shutdown()


def import_ray() -> Any:
    # Read by Ray when it is imported: else it starts workers by `uv run` in another folder, where they find no environment and
    # the driver waits for ever, and reports usage to its makers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require("ray.data", "ray", "the engine ray")
    return require("ray", "ray", "the engine ray")


ENGINES: dict[str, Callable[[int], AbstractContextManager[Run]]] = {"local": _here, "ray": _on_ray}
T = TypeVar("T")


def tracked(things: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The things, with a bar on stderr where somebody looks."""
    from rich.console import Console
    from rich.progress import track

    return track(things, what, total, console=Console(stderr=True), disable=not sys.stderr.isatty())
