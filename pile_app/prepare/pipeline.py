"""The pipeline of `pile prepare`: units of the input are read and filtered in parallel; duplicates, splits and shards follow in
one process. The same command continues an interrupted one from `<output>.partial/`. The same input gives the same bytes with
any engine, any number of processes, and after any interruption."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from pile_app.data.files import LOCK_EX, LOCK_NB, Run, available_cores, flock, worker_pool
from pile_app.data.shards import Shards
from pile_app.fields import OWN, Fields
from pile_app.prepare.assign import Summary, listed, write_shards
from pile_app.prepare.listing import Listing, Unit
from pile_app.prepare.ngrams import EvaluationTexts
from pile_app.prepare.options import Options, require
from pile_app.prepare.readers import evaluation_texts, infer_maps
from pile_app.prepare.spill import Work, read_job, slug

PREPARE_VERSION = 8  # changes with the result of the same options, and with the files in between
JOB_BYTES, JOB_UNITS = 1 << 24, 1024
T = TypeVar("T")
KIND_FIELDS = {"chat": "messages", "interleaved": "interleaved"}


def prepare(
    input: Path | str,
    output: Path | str,
    *,
    engine: Literal["local", "ray"] = "local",
    processes: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Summary:
    """Read `input` and write shards with their manifests, `dataset.json` and `rejected.jsonl` to the folder `output`. Print the
    field maps and the balance to stderr, and to stdout the commands that train on the shards.

    Args:
        input: a file or folder, a data set on the Hugging Face hub or an address of fsspec; `#name` chooses a configuration.
        engine: processes on this machine, or Ray Data, on the cluster that `RAY_ADDRESS` names or on this machine.
        processes: default: one per core. 1: in this process.
        overwrite: replace an earlier result in `output`, and an interrupted preparation with other options.
        options: the fields of `Options`.

    Raises ValueError: an argument is out of its bounds, `output` is in use, nothing in `input` is usable, or an interrupted
    preparation had other options or another input."""
    given, output = str(input), Path(output)
    fields = options.get("fields") or KIND_FIELDS.get(options.get("kind", ""))
    chosen = Options.of(options | {"fields": fields and str(Fields.parse(fields))})
    _check(given, output, chosen, engine, overwrite)
    folder, summary = output.parent / f"{output.name}.partial", Summary(output)
    result, earlier = folder / "result", output.parent / f".{output.name}.{uuid.uuid4().hex}.old"
    with _lock(folder), ENGINES[engine](processes or available_cores()) as run:
        local = localize(given, str(folder))
        path = os.path.abspath(local if os.path.exists(local) else local.partition("#")[0])  # a link is known by its own name
        listing = Listing(local, chosen, str(folder))
        units = list(listing.units())
        maps, summary.maps = infer_maps(units, chosen)
        for line in summary.maps:
            print(f"fields: {line}", file=sys.stderr)
        name = os.path.basename(path if local == given else given.partition("#")[0].rstrip("/"))
        work = Work(folder, slug(name if os.path.isdir(path) else name.split(".")[0]) or "data", chosen, maps)
        _continue(work, output, overwrite, listing.tree.digest.hexdigest())
        jobs = _jobs(units)
        waiting = [(job, units) for job, units in enumerate(jobs) if not work.is_read(job)]
        if len(waiting) < len(jobs):
            print(f"continues {folder}: {len(jobs) - len(waiting):,} of {len(jobs):,} jobs are done", file=sys.stderr)
        for _ in tracked(run(partial(read_job, work), waiting), "read", len(waiting)):
            pass
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        write_shards(work, len(jobs), result, summary)
        if not summary.documents:
            _refuse(folder, given, summary)
        for prefix in (f"{source}-{split}" for source, splits in summary.sources.items() for split in splits):
            shards = Shards(f"{result}/{prefix}-[0-9]*.tar", fields=OWN, processes=processes)  # its manifest
            if (balance := shards.balance())["rejected"]:
                raise AssertionError(f"{prefix}: documents that were written cannot be read back: {balance['examples']}")
        description = summary.description() | {"input": given, "options": asdict(chosen)}
        (result / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        if output.exists():
            os.replace(output, earlier)
        os.replace(result, output)
        for done in (earlier, folder):
            shutil.rmtree(done, ignore_errors=True)
    summary.print()
    return summary


def localize(input: str, work: str) -> str:
    """Download a data set of the hub (`[hf://datasets/]owner/name[/path]`) or an address of fsspec below `work`, once; return
    its path. A local path is returned unchanged. Raises ValueError: the data set cannot be fetched."""
    path, _, config = input.partition("#")
    hub = re.fullmatch(r"(?:hf://datasets/)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(/.*)?", path)
    if os.path.exists(path) or not (hub or "://" in path):
        return input
    target = os.path.join(work, "download")
    try:
        if hub:
            name, revision, inner = hub.groups()
            fetch = require("huggingface_hub", "prepare", "reading from the hub").snapshot_download
            patterns = [inner.strip("/"), f"{inner.strip('/')}/*"] if inner else None
            fetch(name, repo_type="dataset", revision=revision, local_dir=target, allow_patterns=patterns)
        else:
            import fsspec

            system, inner = fsspec.core.url_to_fs(path)
            target = os.path.join(target, os.path.basename(inner.rstrip("/")))
            if not os.path.exists(target):
                system.get(inner, f"{target}.partial", recursive=system.isdir(inner))
                os.rename(f"{target}.partial", target)
    except ValueError:
        raise
    except Exception as error:  # of any file system
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"input {input!r} is not here, and cannot be fetched: {said}"[:400]) from error
    return f"{target}#{config}" if config else target


def _check(given: str, output: Path, options: Options, engine: str, overwrite: bool) -> None:
    """Refuse arguments that would fail after hours."""
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; choose from {', '.join(ENGINES)}")
    for library, option in (("ftfy", "repair"), ("datasketch", "near_duplicates")):
        if getattr(options, option):
            require(library, "prepare", f"--{option.replace('_', '-')}")
    if engine == "ray":
        import_ray()
    if found := sorted(set(str(output)) & set("*?[]{}")):
        raise ValueError(f"output {str(output)!r} contains {' '.join(found)}, a wildcard in patterns of shards: give another")
    inside, outside = output.resolve(), Path(given).resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise ValueError(f"output {str(output)!r} and input {given!r} contain each other: give an output folder elsewhere")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if "pile_dataset" not in _read_json(output / "dataset.json"):
            raise ValueError(f"output {str(output)!r} exists and is not a result of `pile prepare`: give another")
        if not overwrite:
            raise ValueError(f"output {str(output)!r} holds an earlier result: give another, or --overwrite (overwrite=True)")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Make the folder of a preparation and keep others out of it; remove it if nothing was done in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not (folder / "lock").exists():
        raise ValueError(f"{str(folder)!r}, where work would be kept, exists and is not of `pile prepare`: give another output")
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "wb") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except OSError:
            raise ValueError(f"another `pile prepare` is working in {str(folder)!r}") from None
        try:
            yield
        except BaseException as error:
            if (folder / "state.json").exists():
                kept = f"what is done is kept in {folder}: the same command continues"
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(f"interrupted: {kept}") from None
                print(kept, file=sys.stderr)
            elif not (folder / "rejected.jsonl").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _jobs(units: Iterable[Unit]) -> list[list[Unit]]:
    """Group units to jobs of some megabytes."""
    jobs, weight = list[list[Unit]](), JOB_BYTES
    for unit in units:
        if weight >= JOB_BYTES or len(jobs[-1]) == JOB_UNITS:
            jobs, weight = [*jobs, []], 0
        jobs[-1].append(unit)
        weight += unit.weight
    return jobs


def _continue(work: Work, output: Path, overwrite: bool, digest: str) -> None:
    """Keep the jobs that an interrupted preparation of the same input and options has done, or refuse, or remove them."""
    folder, options = work.folder, work.options
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    if options.decontaminate:
        texts = chain.from_iterable(map(evaluation_texts, options.decontaminate))
        count, short = EvaluationTexts.save(texts, options.ngram, folder / "evaluation")
        print(f"evaluation sets: {count:,} texts, {short:,} of them too short to be searched for", file=sys.stderr)
    state: dict[str, Any] = {
        "prepare_version": PREPARE_VERSION, "output": str(output.resolve()), "source": work.source,
        "field maps": {table: str(fields) for table, fields in work.maps.items()}, "files of the input": digest,
        "evaluation sets": [hashlib.blake2b(Path(path).read_bytes()).hexdigest() for path in options.decontaminate],
        "libraries": {name: version(name) for name in ("numpy", "pillow", *(["ftfy"] if options.repair else []))},
        **asdict(options) | {"label_names": None},  # they are given at the end
    }  # fmt: skip
    state, earlier = json.loads(json.dumps(state)), _read_json(folder / "state.json")
    if earlier and earlier != state and not overwrite:
        names = ", ".join(name for name, value in state.items() if earlier.get(name) != value)
        hint = "give the same command to continue it, or --overwrite (overwrite=True) to start again"
        raise ValueError(f"{str(folder)!r} holds an interrupted preparation that differs in {names}: {hint}")
    if earlier != state:
        shutil.rmtree(folder / "spill", ignore_errors=True)
    (folder / "rejected.jsonl").unlink(missing_ok=True)
    (folder / "state.json").write_text(json.dumps(state))


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return {}


def _refuse(folder: Path, given: str, summary: Summary) -> None:
    """Refuse an input without usable samples: keep the reasons, and show the first rejected sample, else file."""
    reasons, counts = folder / "rejected.jsonl", summary.rejected + summary.of("unread")
    os.replace(folder / "result" / "rejected.jsonl", reasons)
    for path in ("result", "spill"):
        shutil.rmtree(folder / path, ignore_errors=True)
    (folder / "state.json").unlink()
    if not counts:
        reasons.unlink()
        raise ValueError(f"{given!r} contains no files")
    with open(reasons) as lines:
        rank = {reason: int(reason.startswith(("about", "hidden"))) for reason in counts} | dict.fromkeys(summary.rejected, -1)
        first = min(map(json.loads, lines), key=lambda line: rank[line["reason"]])
    text = f"{given!r} holds nothing usable: {listed(counts)}. The first is {first['file']}: {first['detail']}. All are listed"
    raise ValueError(f"{text} in {reasons}. Options such as --fields, --label and --kind say how to read it")


# -- engines: contexts of `run(task, items)`, which calls `task(item)` in any order, possibly twice, and yields after each


@contextmanager
def _ray(processes: int) -> Iterator[Run]:
    """Run on the cluster that `RAY_ADDRESS` names, or on `processes` cores of this machine."""
    ray = import_ray()
    if started := not ray.is_initialized():
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": processes, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **here)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(task: Callable[[Any], object], items: Sequence[Any]) -> Iterator[Any]:
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


ENGINES: dict[str, Callable[[int], AbstractContextManager[Run]]] = {
    "local": lambda processes: worker_pool(processes, "pile_app.prepare.spill"),
    "ray": _ray,
}


def tracked(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """Show a progress bar on stderr if it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, console=Console(stderr=True), disable=not sys.stderr.isatty())
