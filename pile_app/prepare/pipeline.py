"""Own data to shards: the engine of `pile prepare`.

    files ──► units ──► spill: clean, check ──► drop duplicates, assign ──► <source>-train-*.tar, <source>-validation-*.tar
              listed    in parallel             one process                 in parallel

1. The input is listed as units of some megabytes (`listing.py`).
2. Each unit is read, mended and judged on its own (`readers.py`, `filters.py`), to samples as they will stand in a shard.
3. One process goes over the tables of all units in order: it drops duplicates and says which samples make which shard
   (`assign.py`).
4. Each shard is put together from them (`spill.py`).

Steps 2 and 4 run in processes here, or on a cluster through Ray Data. All is kept in `<output>.partial/` until the result is
whole, so that the same command continues where it was interrupted. The same input gives the same bytes, whatever the engine,
the number of processes and the interruptions.

A document goes to training or validation by the hash of its content (of its media, where it has any; without its label), so it
stays on its side whatever is added later; where files or folders are named train, validation and test they stay as they are.
What cannot be used is counted by reason, listed in `rejected.jsonl`, and kept in part in `rejected/`.
Memory does not grow with the data but for near-duplicates (4 kB a document), the names of the files of a folder and of all
tables, and 16 bytes a unit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pile_app.data.shards import Shards
from pile_app.fields import OWN
from pile_app.prepare.assign import Summary, assign
from pile_app.prepare.engines import ENGINES, import_ray, tracked
from pile_app.prepare.labels import SPLITS, given_splits
from pile_app.prepare.listing import Item, list_items, split_of
from pile_app.prepare.ngrams import EvaluationTexts
from pile_app.prepare.options import Options, require
from pile_app.prepare.readers import evaluation_texts
from pile_app.prepare.spill import Workplace, is_spilled, make_spill, slug, write_shard

PREPARE_VERSION = 3  # changes with what the same options give
UNIT_BYTES = 1 << 24


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
    given, input, output = str(input), Path(input), Path(output)
    options = Options.of(steps)
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it has to be one of {', '.join(ENGINES)}")
    _check_extras(options, engine)
    _check_folders(input, output, overwrite)
    input = input.resolve()
    name = slug(input.name if input.is_dir() else input.name.split(".", 1)[0]) or "data"
    folder = output.parent / f"{output.name}.partial"
    work = Workplace(folder, str(input if input.is_dir() else input.parent), name, options)
    with _lock(folder), ENGINES[engine](processes or len(os.sched_getaffinity(0))) as run:
        units, summary = _list_input(work, input, output, overwrite), Summary(output)
        waiting = [unit for unit in range(units) if not is_spilled(work, unit)]
        if len(waiting) < units:
            print(f"continues {folder}: {units - len(waiting):,} of {units:,} units are done", file=sys.stderr)
        for _ in tracked(run(make_spill, str(folder), waiting), "read", len(waiting)):
            pass
        shutil.rmtree(work.result / "rejected", ignore_errors=True)
        for needed in (folder / "plans", work.result):
            needed.mkdir(exist_ok=True)
        for stale in work.result.glob("*.tmp"):  # of a process that was killed
            stale.unlink()
        shards = assign(work, units, summary)
        if not shards:
            shutil.rmtree(folder)
            raise ValueError(
                f"{given!r} holds nothing usable for kind {options.kind!r}: looked for files "
                f"*.{', *.'.join(options.extensions)}; found {_counts(summary.rejected) or 'no file at all'}"
            )
        for _ in tracked(run(write_shard, str(folder), shards), "write", len(shards)):
            pass
        for prefix in sorted({shard.rpartition("-")[0] for shard in shards}):  # a manifest for each source and split
            paths = [str(work.result / f"{shard}.tar") for shard in shards if shard.rpartition("-")[0] == prefix]
            balance = Shards(paths, fields=OWN, processes=processes, again="changed").balance()
            if balance["rejected"]:
                raise RuntimeError(f"what was prepared cannot be read back: {balance['examples']}")
        description = summary.description() | {"input": given, "options": asdict(options)}
        (work.result / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        _move_into_place(work.result, output)
        shutil.rmtree(folder)
    _print_summary(summary)
    return summary


# -- the input, and what is there of an earlier attempt


def _list_input(work: Workplace, input: Path, output: Path, overwrite: bool) -> int:
    """Lists the input anew, and makes the workplace ready for it; the number of units."""
    folder, options = work.folder, work.options
    digest = hashlib.blake2b(digest_size=16)
    splits: set[str] = set()
    units = work.write_units(_noting_splits(list_items(input, options, digest.update), splits), UNIT_BYTES)
    digest.update(_file_digest(folder / "units.jsonl"))
    if options.decontaminate:
        texts = chain.from_iterable(map(evaluation_texts, options.decontaminate))
        count, short = EvaluationTexts.save(texts, options.ngram, work.evaluation)
        print(f"evaluation sets: {count:,} texts, {short:,} of them too short to be looked for", file=sys.stderr)
    state: dict[str, Any] = {
        "prepare_version": PREPARE_VERSION,
        "output": str(output.resolve()),
        "root": work.root,
        "source": work.source,
        "splits": given_splits(splits) if options.given_splits else [],
        "files of the input": digest.hexdigest(),
        "evaluation sets": _file_digest(Path(work.evaluation)).hex() if options.decontaminate else "",
        "libraries": {name: version(name) for name in ("numpy", "pillow", *(["ftfy"] if options.repair else []))},
        "options": json.loads(json.dumps(asdict(options))),
    }
    earlier = _read_json(folder / "state.json")
    if earlier != state:
        if earlier and not overwrite:
            then, now = ({**one, **one["options"], "options": None} for one in (earlier, state))
            names = ", ".join(name for name, value in now.items() if then.get(name) != value)
            raise ValueError(
                f"{str(folder)!r} holds an interrupted preparation that differs in {names}: give the command of then to "
                "continue it, or --overwrite (overwrite=True) to start anew"
            )
        for name in ("spill", "plans", "result"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "state.json").write_text(json.dumps(state))
    return units


def _noting_splits(items: Iterator[Item], splits: set[str]) -> Iterator[Item]:
    for item in items:
        if split := split_of(item):
            splits.add(split)
        yield item


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


# -- folders and what is said


def _check_extras(options: Options, engine: str) -> None:
    """Says at once what is missing, not after hours."""
    if options.repair:
        require("ftfy", "prepare", "repair")
    if options.near_duplicates is not None:
        require("datasketch", "prepare", "near_duplicates")
    if engine == "ray":
        import_ray()


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
    return "pile_dataset" in _read_json(output / "dataset.json")


def _move_into_place(result: Path, output: Path) -> None:
    earlier = output.parent / f".{output.name}.{os.getpid()}.old"
    if _is_result(output):
        os.replace(output, earlier)
    os.replace(result, output)
    shutil.rmtree(earlier, ignore_errors=True)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


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
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    console.print(f"read: {_counts(summary.read)}")
    if summary.rejected:
        console.print(f"left out: {_counts(summary.rejected)}; see {summary.output / 'rejected.jsonl'}")
    if missing:
        console.print(f"{'; '.join(missing)}: change validation_share, or cut text finer with document_bytes")
    print(summary.yaml())
