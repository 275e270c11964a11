"""Own data to shards: the engine of `pile prepare`.

    files ──► units ──► spill: clean, check ──► drop duplicates, assign ──► <source>-train-*.tar, <source>-validation-*.tar
              listed    in parallel             one process                 in parallel

1. The input is listed as units of some megabytes (`readers.py`).
2. Each unit is read, mended and judged on its own (`filters.py`), to samples as they will stand in a shard (`spill.py`).
3. One process goes over the tables of all units in order: it drops duplicates and says which samples make which shard.
4. Each shard is put together from them.

Steps 2 and 4 run in processes here, or on a cluster through Ray Data. All is kept in `<output>.partial/` until the result is
whole, so that the same command continues where it was interrupted. The same input gives the same bytes, whatever the engine,
the number of processes and the interruptions.

A document goes to training or validation by the hash of its content (of its media, where it has any), so it stays on its side
whatever is added later. What cannot be used is counted by reason, listed in `rejected.jsonl`, and kept in part in `rejected/`.
Memory does not grow with the data but for near-duplicates (4 kB a document) and 16 bytes a unit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from heapq import merge
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pile_app.data.filters import EvaluationTexts, NearDuplicates, require
from pile_app.data.readers import DigestSet, Options, evaluation_texts, list_items
from pile_app.data.shards import map_arrays
from pile_app.data.spill import (
    KEPT,
    Table,
    Workplace,
    document_of_block,
    is_spilled,
    make_spill,
    slug,
    write_shard,
    write_units,
)

SPLITS = ("train", "validation")
PREPARE_VERSION = 1  # changes with what the same options give
UNIT_BYTES = 1 << 24
DIGESTS_AT_ONCE = 1 << 24  # that are sorted in memory


@dataclass
class Tally:
    """What one split of one source holds."""

    documents: int = 0
    text_bytes: int = 0
    images: int = 0
    audio_seconds: float = 0.0

    def add(self, table: Table, rows: np.ndarray) -> None:
        self.documents += len(rows)
        self.text_bytes += int(table.text_bytes[rows].sum())
        self.images += int(table.images[rows].sum())
        self.audio_seconds += float(table.audio_seconds[rows].sum())


@dataclass
class Summary:
    """What `prepare` wrote: `sources[source][split]`, a split without documents is absent; `rejected[reason]`; `read[layout]`,
    documents, and what was rejected, by what they were read as."""

    output: Path
    sources: dict[str, dict[str, Tally]] = field(default_factory=lambda: defaultdict(dict))
    rejected: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)

    @property
    def documents(self) -> int:
        return sum(tally.documents for splits in self.sources.values() for tally in splits.values())

    def shards(self, source: str) -> dict[str, str]:
        """Pattern of the shards of each split, relative to `output`."""
        return {split: f"{source}-{split}-*.tar" for split in SPLITS if split in self.sources[source]}

    def description(self) -> dict[str, Any]:
        """What `dataset.json` holds, but for the options."""
        sources = {
            source: {
                split: {"shards": pattern, **asdict(self.sources[source][split])}
                for split, pattern in self.shards(source).items()
            }
            for source in sorted(self.sources)
        }
        counts = {"read": dict(sorted(self.read.items())), "rejected": dict(sorted(self.rejected.items()))}
        return {"pile_dataset": 1, "sources": sources, **counts}

    def yaml(self) -> str:
        """The `data.sources` of a configuration: every source that has documents to train on."""
        import yaml

        patterns = {source: self.shards(source) for source in sorted(self.sources)}
        sources = {
            source: {split: os.path.join(self.output, pattern) for split, pattern in splits.items()}
            for source, splits in patterns.items()
            if "train" in splits
        }
        description = {"data": {"sources": sources}}
        return yaml.safe_dump(description, default_flow_style=None, sort_keys=False, allow_unicode=True, width=10_000).rstrip()


def prepare(
    input: Path,
    output: Path,
    *,
    engine: Literal["local", "ray"] = "local",
    processes: int | None = None,
    overwrite: bool = False,
    **steps: Any,
) -> Summary:
    """Reads the file or folder `input` and writes shards, `dataset.json`, `rejected.jsonl` and `rejected/` to `output`.

    That folder appears when it is whole; until then `<output>.partial/` keeps what is done, and the same call continues it. A
    summary goes to stderr, the sources ready to paste into a configuration to stdout.

    Args:
        engine: where the work is done: in processes here, or by Ray Data, on the cluster that `RAY_ADDRESS` names or here.
        processes: how many work at a time (default: one a core). 1: in this process.
        overwrite: replace an earlier result in `output`, and an interrupted preparation with other options.
        steps: the fields of `Options`.

    Raises:
        ValueError: an argument is out of its bounds, `output` is in use, `input` holds nothing usable, or an interrupted
            preparation had other options or another input.
    """
    input, output = Path(input), Path(output)
    if unknown := steps.keys() - Options.__dataclass_fields__.keys():
        raise TypeError(f"prepare has no argument {', '.join(sorted(unknown))}")
    options = Options.of(steps)
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it has to be one of {', '.join(ENGINES)}")
    processes = processes or len(os.sched_getaffinity(0))
    _check_extras(options, engine)
    _check_folders(input, output, overwrite)
    given = str(input)
    input = input.resolve()
    name = slug(input.name if input.is_dir() else input.name.split(".", 1)[0]) or "data"
    folder = output.parent / f"{output.name}.partial"
    work = Workplace(folder, str(input if input.is_dir() else input.parent), name, options)
    with _lock(folder), _progress() as progress, ENGINES[engine](processes) as run:
        units, summary = _list_input(work, given, input, output, overwrite), Summary(output)
        waiting = [unit for unit in range(units) if not is_spilled(work, unit)]
        if len(waiting) < units:
            print(f"continues {folder}: {units - len(waiting):,} of {units:,} units are done", file=sys.stderr)
        run(make_spill, str(folder), waiting, progress("read", len(waiting)))
        (folder / "plans").mkdir(exist_ok=True)
        shutil.rmtree(work.result / "rejected", ignore_errors=True)
        work.result.mkdir(exist_ok=True)
        shards = _assign(work, units, summary)
        if not shards:
            shutil.rmtree(folder)
            raise ValueError(
                f"{given!r} holds nothing usable for kind {options.kind!r}: looked for files "
                f"*.{', *.'.join(options.extensions)}; "
                f""
                f"found {_counts(summary.rejected) or 'no file at all'}"
            )
        run(write_shard, str(folder), shards, progress("write", len(shards)))
        description = summary.description() | {"input": given, "options": asdict(options)}
        (work.result / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        _move_into_place(work.result, output)
        shutil.rmtree(folder)
    _print_summary(summary)
    return summary


# -- where the work is done

Task = Callable[[str, Any], None]
Run = Callable[[Task, str, Sequence[Any], Callable[[], None]], None]  # task(folder, thing) for each of things; advance()


@contextmanager
def _here(processes: int) -> Iterator[Run]:
    """Work in this process, or in others where there are many things to do."""
    yield partial(_run_here, processes)


def _run_here(processes: int, task: Task, folder: str, things: Sequence[Any], advance: Callable[[], None]) -> None:
    if min(processes, len(things)) < 2:
        for thing in things:
            task(folder, thing)
            advance()
        return
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pile_app.data.spill"])
    waiting: set[Future[None]] = set()
    pool = ProcessPoolExecutor(min(processes, len(things)), context, _end_with_parent)
    try:
        for thing in things:
            waiting.add(pool.submit(task, folder, thing))
            if len(waiting) >= 4 * processes:
                waiting = _collect(waiting, advance)
        while waiting:
            waiting = _collect(waiting, advance)
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(waiting: set[Future[None]], advance: Callable[[], None]) -> set[Future[None]]:
    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
    for one in done:
        one.result()
        advance()
    return waiting


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _on_ray(processes: int) -> Iterator[Run]:
    """Work on the cluster that `RAY_ADDRESS` names, or on `processes` cores here."""
    ray = _import_ray()
    ours = not ray.is_initialized()
    if ours:
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": processes, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **here)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(task: Task, folder: str, things: Sequence[Any], advance: Callable[[], None]) -> None:
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
            for _ in dataset.map(run_one).iter_rows():
                advance()
        except ray.exceptions.RayError as error:
            raise ValueError(f"a task on Ray failed: {error.__cause__ or error}") from error

    try:
        yield run
    finally:
        if ours:
            ray.shutdown()


def _import_ray() -> Any:
    # Read by Ray when it is imported: else it starts workers by `uv run` in another folder, where they find no environment and
    # the driver waits for ever, and reports usage to its makers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require("ray.data", "ray", "the engine ray")
    return require("ray", "ray", "the engine ray")


ENGINES = {"local": _here, "ray": _on_ray}


# -- the input, and what is there of an earlier attempt


def _list_input(work: Workplace, given: str, input: Path, output: Path, overwrite: bool) -> int:
    """Lists the input anew, and prepares the folder of the workplace; the number of units."""
    folder, options = work.folder, work.options
    listing = folder / "listing"
    shutil.rmtree(listing, ignore_errors=True)
    listing.mkdir()
    digest = hashlib.blake2b(digest_size=16)
    with DigestSet(listing / "named.sqlite") as named:
        units = write_units(list_items(input, options, named, digest.update), listing, UNIT_BYTES)
    os.remove(listing / "named.sqlite")
    digest.update((listing / "units.jsonl").read_bytes() if units < 1000 else _file_digest(listing / "units.jsonl"))
    if options.decontaminate:
        texts = chain.from_iterable(map(evaluation_texts, options.decontaminate))
        count, short = EvaluationTexts.save(texts, options.ngram, str(listing / "evaluation.safetensors"))
        print(f"evaluation sets: {count:,} texts, {short:,} of them too short to be looked for", file=sys.stderr)
    state: dict[str, Any] = {
        "prepare_version": PREPARE_VERSION,
        "output": str(output.resolve()),
        "input": str(input),
        "options": asdict(options) | {"quality": list(options.quality), "decontaminate": list(options.decontaminate)},
        "files of the input": digest.hexdigest(),
        "evaluation sets": _file_digest(listing / "evaluation.safetensors").hex() if options.decontaminate else "",
        "libraries": {name: version(name) for name in ("numpy", "pillow", *(["ftfy"] if options.repair else []))},
    }
    earlier = _read_json(folder / "state.json")
    if earlier and earlier != state and not overwrite:
        shutil.rmtree(listing)
        raise ValueError(
            f"{str(folder)!r} holds an interrupted preparation that differs in {_differences(earlier, state)}: give the "
            "command of then to continue it, or --overwrite (overwrite=True) to start anew"
        )
    if earlier != state:
        _clear(folder, but="listing")
        (listing / "state.json").write_text(json.dumps(state))
        for path in sorted(listing.iterdir(), key=lambda path: path.name == "state.json"):
            os.replace(path, folder / path.name)
    work.save()
    shutil.rmtree(listing)
    return units


def _differences(earlier: dict[str, Any], state: dict[str, Any]) -> str:
    names = [name for name in state if name != "options" and earlier.get(name) != state[name]]
    options = earlier.get("options", {})
    return ", ".join(names + [name for name, value in state["options"].items() if options.get(name) != value])


def _clear(folder: Path, but: str) -> None:
    for path in folder.iterdir():
        if path.name not in (but, "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _file_digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Makes the folder of a preparation and keeps others out of it; a new one goes again where nothing was done in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not (folder / "lock").exists():
        raise ValueError(
            f"{str(folder)!r}, where work is kept, exists and is not of `pile prepare`; give another output folder"
        )
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another `pile prepare` works in {str(folder)!r}") from None
        try:
            yield
        except BaseException:
            if (folder / "state.json").exists():
                print(f"what is done is kept in {folder}: the same command continues", file=sys.stderr)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


# -- duplicates, and which document stands in which shard


def _assign(work: Workplace, units: int, summary: Summary) -> list[str]:
    """Writes `rejected.jsonl`, `rejected/` and the plans of all shards; the names of the shards, in order."""
    options = work.options
    duplicates = _duplicates(work, units) if options.exact_duplicates else repeat(np.zeros(0, np.int64))
    similar = NearDuplicates(options.near_duplicates) if options.near_duplicates is not None else None
    plans: dict[tuple[str, str], _ShardPlans] = {}
    with open(work.result / "rejected.jsonl", "w", encoding="utf-8") as lines, ExitStack() as stack:
        reviews = _Reviews(work, stack)
        for unit, repeated in zip(range(units), duplicates, strict=False):
            table = Table.load(work.table(unit))
            summary.read.update({layout: count for layout, count in table.layouts.items() if layout})
            dropped = _dropped(table, repeated, similar)
            for _, source, file, reason, detail, place, size in merge(table.rejected, dropped, key=lambda entry: entry[0]):
                summary.rejected[reason] += 1
                line = {"source": source, "file": file, "reason": reason, "detail": detail}
                lines.write(json.dumps(line) + "\n")
                if size:
                    reviews.add(line, unit, place, size)
            keep = np.ones(len(table.offset), bool)
            keep[[entry[0] for entry in dropped]] = False
            for number, source in enumerate(table.sources):
                for split in SPLITS:
                    chosen = keep & (table.source == number) & (table.validation == (split == "validation"))
                    if not (rows := np.flatnonzero(chosen)).size:
                        continue
                    if (source, split) not in plans:
                        plans[source, split] = _ShardPlans(work, f"{source}-{split}")
                    plans[source, split].add(unit, table.offset[rows], table.size[rows])
                    summary.sources[source].setdefault(split, Tally()).add(table, rows)
    return [shard for plan in plans.values() for shard in plan.close()]


def _dropped(table: Table, repeated: np.ndarray, similar: NearDuplicates | None) -> list[list[Any]]:
    """The documents of a unit that stood before, exactly or nearly, as entries of `Table.rejected`, in order."""
    found = dict.fromkeys(repeated.tolist(), ("duplicate", "a document of the same content was taken before"))
    for row, signature in enumerate(table.signature if similar else ()):
        if row not in found and signature.any() and similar and (first := similar.add(signature, table.files[row])):
            found[row] = "near_duplicate", f"{first[1]:.2f} of its 5-grams are those of {first[0]}"
    return [
        [row, table.sources[table.source[row]], table.files[row], *why, int(table.offset[row]), int(table.size[row])]
        for row, why in sorted(found.items())
    ]


def _duplicates(work: Workplace, units: int) -> Iterator[np.ndarray]:
    """For each unit the rows whose document stood before. Digests are sorted in parts that fit memory."""
    counts = [len(_digests(work, unit)) for unit in range(units)]
    first = np.concatenate([[0], np.cumsum(counts)])
    parts = 1 + int(first[-1]) // DIGESTS_AT_ONCE
    found = [np.zeros(0, np.int64)]
    for part in range(parts):
        digests, rows = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
        for unit in range(units):
            digest = _digests(work, unit)
            chosen = np.flatnonzero(digest[:, 1] % np.uint64(parts) == part)
            digests.append(digest[chosen])
            rows.append(first[unit] + chosen)
        one, row = np.concatenate(digests), np.concatenate(rows)
        order = np.lexsort((one[:, 1], one[:, 0]))  # stable: rows of one digest stay in order
        same = (one[order[1:]] == one[order[:-1]]).all(axis=1)
        found.append(row[order[1:][same]])
    repeated = np.sort(np.concatenate(found))
    for unit in range(units):
        start, stop = np.searchsorted(repeated, first[unit : unit + 2]).tolist()
        yield repeated[start:stop] - first[unit]


def _digests(work: Workplace, unit: int) -> np.ndarray:
    arrays, _ = map_arrays(work.table(unit), {"digest": Table.TYPES["digest"]})
    return arrays["digest"].reshape(-1, 2)


class _ShardPlans:
    """Of one source and split: which ranges of which blocks make up each shard."""

    def __init__(self, work: Workplace, prefix: str) -> None:
        self._work, self._prefix = work, prefix
        self._limit = int(work.options.shard_megabytes * 2**20)
        self._names: list[str] = []
        self._ranges: list[np.ndarray] = []
        self._bytes = 0

    def add(self, unit: int, offset: np.ndarray, size: np.ndarray) -> None:
        while len(offset):
            ends = self._bytes + np.cumsum(size)
            count = int(np.searchsorted(ends, self._limit)) + 1  # the sample that reaches the limit is the last
            self._ranges.append(_ranges(unit, offset[:count], size[:count]))
            self._bytes = int(ends[:count][-1])
            if self._bytes >= self._limit:
                self._finish()
            offset, size = offset[count:], size[count:]

    def _finish(self) -> None:
        name = f"{self._prefix}-{len(self._names):06d}"
        np.save(self._work.plan(name), np.concatenate(self._ranges))
        self._names.append(name)
        self._ranges, self._bytes = [], 0

    def close(self) -> list[str]:
        if self._ranges:
            self._finish()
        return self._names


def _ranges(unit: int, offset: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(K, 3) unit, offset, size: samples that stand side by side are one range."""
    starts = np.concatenate([[0], np.flatnonzero(offset[1:] != offset[:-1] + size[:-1]) + 1])
    columns = np.full(len(starts), unit, np.uint64), offset[starts], np.add.reduceat(size, starts)
    return np.stack(columns, axis=1)


class _Reviews:
    """The first `KEPT` rejected samples of each reason: `rejected/<reason>.jsonl`, and their media beside it."""

    def __init__(self, work: Workplace, stack: ExitStack) -> None:
        self._work, self._stack = work, stack
        self._files: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()

    def add(self, line: dict[str, str], unit: int, place: int, size: int) -> None:
        reason = line["reason"]
        if self._counts[reason] == KEPT:
            return
        folder = self._work.result / "rejected"
        if reason not in self._files:
            folder.mkdir(exist_ok=True)
            path = folder / f"{reason}.jsonl"
            self._files[reason] = self._stack.enter_context(path.open("w", encoding="utf-8"))
        with open(self._work.blocks(unit), "rb") as file:
            document = document_of_block(os.pread(file.fileno(), size, place))
        segments: list[dict[str, str]] = []
        for number, segment in enumerate(document.segments):
            if isinstance(segment.data, str):
                segments.append({"text": segment.data})
                continue
            name = f"{reason}/{self._counts[reason]:02d}.{number}.{segment.extension}"
            (folder / reason).mkdir(exist_ok=True)
            (folder / name).write_bytes(segment.data)
            segments.append({"file": name})
        self._files[reason].write(json.dumps(line | {"segments": segments}, ensure_ascii=False) + "\n")
        self._counts[reason] += 1


# -- folders and what is said


def _check_extras(options: Options, engine: str) -> None:
    """Says at once what is missing, not after hours."""
    if options.repair:
        require("ftfy", "prepare", "repair")
    if options.near_duplicates is not None:
        require("datasketch", "prepare", "near_duplicates")
    if engine == "ray":
        _import_ray()


def _check_folders(input: Path, output: Path, overwrite: bool) -> None:
    if not input.exists():
        raise ValueError(f"input {str(input)!r} does not exist (working folder {os.getcwd()})")
    inside, outside = output.resolve(), input.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise ValueError(f"output {str(output)!r} and input {str(input)!r} lie in each other; give an output folder elsewhere")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not _is_result(output):
            raise ValueError(f"output {str(output)!r} exists and is not the result of an earlier `pile prepare`; give another")
        if not overwrite:
            raise ValueError(
                f"output {str(output)!r} holds an earlier result; give another folder, or --overwrite (overwrite=True)"
            )


def _is_result(output: Path) -> bool:
    try:
        return "pile_dataset" in json.loads((output / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return False


def _move_into_place(result: Path, output: Path) -> None:
    earlier = output.parent / f".{output.name}.{os.getpid()}.old"
    if _is_result(output):
        os.replace(output, earlier)
    os.replace(result, output)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on stderr where somebody looks; yields what makes one, which returns the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:

        def start(name: str, total: int) -> Callable[[], None]:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        yield start


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def _print_summary(summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        "source", "split", *(Column(name, justify="right") for name in ("documents", "text bytes", "images", "hours"))
    )
    for source, splits in sorted(summary.sources.items()):
        for split in (split for split in SPLITS if split in splits):
            one = splits[split]
            figures = (f"{one.documents:,}", f"{one.text_bytes:,}", f"{one.images:,}", f"{one.audio_seconds / 3600:,.3f}")
            table.add_row(source, split, *figures)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    console.print(f"read: {_counts(summary.read)}")
    if summary.rejected:
        console.print(f"left out: {_counts(summary.rejected)}; see {summary.output / 'rejected.jsonl'}")
    for source, splits in sorted(summary.sources.items()):
        for split in set(SPLITS) - set(splits):
            console.print(f"{source} has no {split} documents: change validation_share, or cut text finer with document_bytes")
    print(summary.yaml())
