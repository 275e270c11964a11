"""Data sets as they are to shards: the pipeline of `pile prepare`.

    input ──► units ──► field map ──► filters ──► blocks ──► duplicates, splits ──► <source>-train-*.tar, <source>-validation-*.tar
              listed    in parallel (`spill.py`)             one process (`assign.py`)    in parallel (`spill.py`)

1. The input is listed as units (`readers.py`), which are grouped to jobs of some megabytes; field maps are inferred from the
   first samples of each table and folder, so that all processes use the same.
2. Each job is read, checked and changed independently, to documents as they are written to a shard.
3. One process decides from the tables of all jobs which documents are duplicates, and which shard holds which.
4. Each shard is copied from the blocks.

Everything is kept in `<output>.partial/` until the result is complete, so that the same command continues where it was
interrupted. The same input gives the same bytes, whatever the engine, the number of processes and the interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pile_app.documents import BadSample, media_extension
from pile_app.fields import Fields
from pile_app.prepare.assign import Summary, assign
from pile_app.prepare.engines import ENGINES, import_ray, tracked
from pile_app.prepare.ngrams import EvaluationTexts
from pile_app.prepare.options import Options, require
from pile_app.prepare.readers import Unit, evaluation_texts, list_units, read_unit
from pile_app.prepare.spill import SPLITS, Work, is_read, read_job, slug, table_of, with_label, write_manifest, write_shard

PREPARE_VERSION = 4  # changes with what the same options give
JOB_BYTES, JOB_UNITS = 1 << 24, 1024
SAMPLES = 200  # by which a field map is inferred


def prepare(
    input: Path | str,
    output: Path | str,
    *,
    engine: Literal["local", "ray"] = "local",
    processes: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Summary:
    """Read the file or folder `input` and write shards with their manifests, `dataset.json` and `rejected.jsonl` to `output`.

    The folder appears when it is complete; until then `<output>.partial/` keeps what is done, and the same call continues. The
    field maps and the balance go to stderr, the sources to paste into a configuration to stdout.

    Args:
        engine: processes on this machine, or Ray Data, on the cluster that `RAY_ADDRESS` names or on this machine.
        processes: default: one per core. 1: in this process.
        overwrite: replace an earlier result in `output`, and an interrupted preparation with other options.
        options: the fields of `Options`.

    Raises:
        ValueError: an argument is out of its bounds, `output` is in use, nothing in `input` is usable, or an interrupted
            preparation had other options or another input.
    """
    given, input, output = str(input), Path(input), Path(output)
    if options.get("fields") is not None:
        options["fields"] = str(Fields.parse(options["fields"]))
    chosen = Options.of(options)
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it has to be one of {', '.join(ENGINES)}")
    _check_extras(chosen, engine)
    _check_folders(input, output, overwrite)
    input = Path(os.path.abspath(input))  # a link is known by its own name
    source = slug(input.name if input.is_dir() else input.name.split(".", 1)[0]) or "data"
    folder = output.parent / f"{output.name}.partial"
    work = Work(folder, str(input if input.is_dir() else input.parent), source, chosen)
    with _lock(folder), ENGINES[engine](processes or len(os.sched_getaffinity(0))) as run:
        (folder / "rejected.jsonl").unlink(missing_ok=True)
        summary = Summary(output)
        jobs = _list_input(work, input, output, overwrite, summary)
        waiting = [job for job in range(jobs) if not is_read(work, job)]
        if len(waiting) < jobs:
            print(f"continues {folder}: {jobs - len(waiting):,} of {jobs:,} jobs are done", file=sys.stderr)
        for _ in tracked(run(read_job, str(folder), waiting), "read", len(waiting)):
            pass
        for needed in (folder / "plans", work.result):
            needed.mkdir(exist_ok=True)
        for stale in work.result.glob("*.tmp"):  # of a process that was killed
            stale.unlink()
        shards = assign(work, jobs, summary)
        if not shards:
            _refuse(work, given, summary)
        for _ in tracked(run(write_shard, str(folder), shards), "write", len(shards)):
            pass
        for _ in run(write_manifest, str(folder), sorted({shard.rpartition("-")[0] for shard in shards})):
            pass
        description = summary.description() | {"input": given, "options": asdict(chosen)}
        (work.result / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        _move_into_place(work.result, output)
        shutil.rmtree(folder)
    _print_summary(summary)
    return summary


# -- the input, and what an earlier attempt left


def _list_input(work: Work, input: Path, output: Path, overwrite: bool, summary: Summary) -> int:
    """List the input, infer the field maps and prepare the folder for both; return the number of jobs."""
    folder, options = work.folder, work.options
    maps = _FieldMaps(work)
    starts: list[int] = []
    with open(folder / "jobs.jsonl", "wb") as file:
        for job in _group(maps.sampled(list_units(str(input), options, str(folder)))):
            starts.append(file.tell())
            file.write(json.dumps(job).encode() + b"\n")
    np.save(folder / "jobs.npy", np.array(starts, np.uint64))
    if options.decontaminate:
        texts = chain.from_iterable(map(evaluation_texts, options.decontaminate))
        count, short = EvaluationTexts.save(texts, options.ngram, folder / "evaluation")
        print(f"evaluation sets: {count:,} texts, {short:,} of them too short to be searched for", file=sys.stderr)
    found = maps.infer()
    summary.maps = maps.lines
    state: dict[str, Any] = {
        "prepare_version": PREPARE_VERSION,
        "output": str(output.resolve()),
        "root": work.root,
        "source": work.source,
        "fields": found,
        "files of the input": _digest(input),
        "evaluation sets": [_digest(Path(path)) for path in options.decontaminate],
        "libraries": {name: version(name) for name in ("numpy", "pillow", *(["ftfy"] if options.repair else []))},
        "options": json.loads(json.dumps(asdict(options))),
    }
    earlier = _read_json(folder / "state.json")

    def compared(state: dict[str, Any]) -> dict[str, Any]:  # names of labels are given at the end
        return state | {f"option {name}": value for name, value in state["options"].items() if name != "label_names"} | {"options": 0}

    if earlier and compared(earlier) != compared(state) and not overwrite:
        names = (name for name, value in compared(state).items() if compared(earlier).get(name) != value)
        raise ValueError(
            f"{str(folder)!r} holds an interrupted preparation that differs in {', '.join(names).replace('option ', '')}: give "
            "the same command to continue it, or --overwrite (overwrite=True) to start again"
        )
    if not earlier or compared(earlier) != compared(state):
        for name in ("spill", "plans", "result"):
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "state.json").write_text(json.dumps(state))
    return len(starts)


class _FieldMaps:
    """Infers the field maps of tables and folders from the first samples of each."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._samples: dict[str, list[Any]] = {}
        self._seen: Counter[tuple[str, ...]] = Counter()
        self.lines: list[str] = []

    def sampled(self, units: Iterator[Unit]) -> Iterator[Unit]:
        """Yield the units, and keep a few samples of them."""
        for unit in units:
            if self._work.options.fields is None and self._is_new(unit):
                for record in islice(read_unit(self._work.root, unit, self._work.options), SAMPLES):
                    if isinstance(record.content, dict):
                        samples = self._samples.setdefault(table_of(record), [])
                        if len(samples) < SAMPLES:
                            samples.append({name: _shortened(name, value) for name, value in record.content.items()})
            yield unit

    def _is_new(self, unit: Unit) -> bool:
        """Whether a unit may show something new: at most 200 units of a folder are sampled, and at most 2,000 in all."""
        path = str(unit.arguments[0])
        keys = (unit.reader,), (unit.reader, os.path.dirname(path))
        if any(self._seen[key] >= limit for key, limit in zip(keys, (2000, SAMPLES), strict=True)):
            return False
        self._seen.update(keys)
        return True

    def infer(self) -> dict[str, str]:
        """Return the field map of each table that was sampled, and print each in a line."""
        maps: dict[str, str] = {}
        tables: dict[str, list[str]] = {}
        for table, samples in self._samples.items():
            try:
                fields = Fields.infer([sample for sample in samples if _is_readable(sample)])
            except ValueError:  # each of its records is rejected with the reason
                continue
            maps[table] = str(fields)
            tables.setdefault(str(with_label(fields, self._work.options)), []).append(table)
        for fields, names in tables.items():
            count = sum(len(self._samples[name]) for name in names)
            layout, _, path = names[0].rpartition(" ")
            where = f"{path or 'the input'}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            self.lines.append(f"{fields}  (inferred from {count:,} samples of {where}, {layout})")
        if self._work.options.fields is not None:
            self.lines.append(f"{with_label(Fields.parse(self._work.options.fields), self._work.options)}  (given)")
        for line in self.lines:
            print(f"fields: {line}", file=sys.stderr)
        return maps


def _shortened(name: str, value: Any) -> Any:
    """The beginning of a medium, by which its kind is known."""
    return value[:64] if isinstance(value, bytes) and name.lower() not in ("json", "txt") and media_extension(value) else value


def _is_readable(sample: Any) -> bool:
    try:
        Fields.infer([sample])
    except BadSample:
        return False
    except ValueError:
        pass
    return True


def _group(units: Iterator[Unit]) -> Iterator[list[Unit]]:
    job: list[Unit] = []
    for unit in units:
        job.append(unit)
        if sum(one.weight for one in job) >= JOB_BYTES or len(job) == JOB_UNITS:
            yield job
            job = []
    if job:
        yield job


def _digest(path: Path) -> str:
    """Of names, sizes and times of change of a file, or of all files of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for folder, folders, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        folders.sort()
        for name in sorted(names):
            about = os.lstat(os.path.join(folder, name))
            digest.update(os.fsencode(os.path.join(folder, name)) + f"\0{about.st_size}\0{about.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Make the folder of a preparation and keep others out of it; remove it if nothing was done in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not (folder / "lock").exists():
        raise ValueError(f"{str(folder)!r} exists and is not of `pile prepare`, which keeps its work there: give another output")
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another `pile prepare` is working in {str(folder)!r}") from None
        try:
            yield
        except BaseException as error:
            interrupted = "interrupted: " * isinstance(error, KeyboardInterrupt)
            if (folder / "state.json").exists():
                print(f"{interrupted}what is done is kept in {folder}: the same command continues", file=sys.stderr)
            elif not (folder / "rejected.jsonl").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _refuse(work: Work, given: str, summary: Summary) -> None:
    """Nothing is usable: keep the reasons, and show the first."""
    for path in work.folder.iterdir():
        if path.name not in ("result", "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.replace(work.result / "rejected.jsonl", work.folder / "rejected.jsonl")
    shutil.rmtree(work.result)
    if not summary.first:
        raise ValueError(f"{given!r} contains no files")
    file, detail = summary.first["file"], summary.first["detail"]
    raise ValueError(
        f"{given!r} holds nothing usable: {_counts(summary.rejected + summary.unread)}. The first is {file}: {detail}. All are "
        f"listed in {work.folder / 'rejected.jsonl'}"
    )


# -- checks and messages


def _check_extras(options: Options, engine: str) -> None:
    """Name a missing library at once, not after hours."""
    for needed, module, flag in ((options.repair, "ftfy", "--repair"), (options.near_duplicates, "datasketch", "--near-duplicates")):
        if needed:
            require(module, "prepare", flag)
    if engine == "ray":
        import_ray()


def _check_folders(input: Path, output: Path, overwrite: bool) -> None:
    if not input.exists():
        raise ValueError(f"input {str(input)!r} does not exist (working folder {os.getcwd()})")
    if found := sorted(set(str(output)) & set("*?[]{}")):
        raise ValueError(f"output {str(output)!r} contains {' '.join(found)}, which has a meaning in patterns of shards: give another")
    inside, outside = output.resolve(), input.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise ValueError(f"output {str(output)!r} and input {str(input)!r} contain each other: give an output folder elsewhere")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not _is_result(output):
            raise ValueError(f"output {str(output)!r} exists and is not a result of `pile prepare`: give another")
        if not overwrite:
            raise ValueError(f"output {str(output)!r} holds an earlier result: give another, or --overwrite (overwrite=True)")


def _is_result(output: Path) -> bool:
    return "pile_dataset" in _read_json(output / "dataset.json")


def _move_into_place(result: Path, output: Path) -> None:
    earlier = output.parent / f".{output.name}.{uuid.uuid4().hex}.old"
    if _is_result(output):
        os.replace(output, earlier)
    os.replace(result, output)
    shutil.rmtree(earlier, ignore_errors=True)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _print_summary(summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    figures = (Column(name, justify="right") for name in ("documents", "text bytes", "images", "hours"))
    table = Table("source", "split", *figures)
    missing = []
    for source, splits in sorted(summary.sources.items()):
        for split in SPLITS:
            if one := splits.get(split):
                hours = f"{one.audio_seconds / 3600:,.3f}"
                table.add_row(source, split, f"{one.documents:,}", f"{one.text_bytes:,}", f"{one.images:,}", hours)
            elif split != "test":
                missing.append(f"{source} has no {split} documents")
    balance = summary.balance()
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    pieces = f" + {summary.pieces:,} pieces of long sounds" if summary.pieces else ""
    console.print(
        f"samples: {balance['samples']:,} read ({_counts(summary.read)}){pieces} = {balance['documents']:,} documents + "
        f"{balance['rejected']:,} rejected" + (f" ({_counts(summary.rejected)})" if summary.rejected else "")
    )
    if balance["fields"]:
        unused = Counter(balance["unused_fields"])
        lost = f" + {balance['of_rejected']:,} of rejected samples" if balance["of_rejected"] else ""
        console.print(f"files and fields: {balance['fields']:,} read = {balance['used']:,} used + {balance['unused']:,} unused{lost}")
        for name, count in unused.most_common(20):
            console.print(f"  {name}: {count:,} unused")
    for what, counts in (("parts of chats dropped", summary.dropped), ("files not read", summary.unread)):
        if counts:
            console.print(f"{what}: {_counts(counts)}")
    if summary.rejected or summary.unread:
        console.print(f"see {summary.output / 'rejected.jsonl'}")
    if missing:
        console.print(f"{'; '.join(missing)}: set validation_fraction, or cut texts into more documents with document_bytes")
    print(summary.yaml())
