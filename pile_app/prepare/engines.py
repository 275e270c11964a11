"""Run jobs of `pile prepare` in processes on this machine, or on a cluster through Ray Data.

An engine is a context of `run(task, items)`, which calls `task(item)` for each item, in any order and possibly twice, and
yields after each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from pile_app.data.files import worker_context
from pile_app.prepare.options import require

Task = Callable[[Any], object]
Run = Callable[[Task, Sequence[Any]], Iterable[Any]]
T = TypeVar("T")


@contextmanager
def _local(processes: int) -> Iterator[Run]:
    context, others = worker_context("pile_app.prepare.spill"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, _start_worker) as pool:  # a process starts when there is work for it

        def run(task: Task, items: Sequence[Any]) -> Iterable[Any]:
            if min(processes, len(items)) < 2:
                return map(task, items)
            with _delayed_interrupt():  # a worker that was just being started would not be found below
                futures = [pool.submit(task, item) for item in items]
            return (future.result() for future in futures)  # not `map`, which cancels the rest: an error if a worker was killed

        try:
            yield run
        except BrokenProcessPool as error:
            raise ValueError("a process was killed, perhaps for lack of memory: try fewer with --processes") from error
        except BaseException:  # such as Ctrl-C: do not wait for the running tasks
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


@contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def _start_worker() -> None:
    """End with the parent: a worker whose parent was killed would wait for work forever."""
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


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
