"""Runs next to each other: `write_comparison([Path("runs/lstm"), Path("runs/transformer")], Path("runs/compare.html"))`.

The page shows the curves of all runs by steps, tokens and seconds, their final figures, and the settings that differ. A run may
still be training: its figures are then those of its last validation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pile_app.training.load import read_config
from pile_app.training.report import PAGE, STYLE, find_row, label, line_chart, read_curves, read_json, short, table

AXES = {"step": "", "tokens": "throughput/tokens", "seconds": "throughput/train_seconds"}  # and their columns in metrics.csv
CHARTS = (  # pattern of a column, title of its chart, unit; the first match counts, no title: not shown
    (r"validation/(\w+)_bits_per_byte", r"\1, validation", "bits per byte"),
    (r"(train|validation)/loss", r"all modalities, \1", "nats per token"),
    (r"(train|validation)/(\w+)_codec_loss", r"\2 codec, \1", "reconstruction loss"),
    (r"(train|validation)/(\w+)_loss", r"\2, \1", "nats per token"),
    (r"validation/\w+_(code_bits_per_\w+|perplexity)", "", ""),
    (r"validation/(\w+)", r"\1, validation", ""),
    (r"(?s).*", "", ""),
)
GENERAL = ("steps", "tokens", "parameters", "train_seconds", "tokens_per_second", "peak_memory_bytes")
LESS_IS_BETTER = r"loss|.*(_loss|bits_per_byte|perplexity)(_\w+)?"
MORE_IS_BETTER = r".*(accuracy|precision|recall\w*|f1|mrr|psnr|top5)"
SAME = re.compile(r"(name|runs|wandb|config|ledger|checkpoint_every|trainer\.(logger|default_root_dir))(\.|$)")  # not compared
TABS = "".join(f"#{axis}:checked~.{axis}{{display:block}}" for axis in AXES)


@dataclass
class ComparedRun:
    name: str
    settings: dict[str, Any]  # dotted name -> value
    figures: dict[str, Any]
    curves: dict[str, dict[int, float]]  # column -> step -> value

    def curve(self, column: str, axis: str) -> np.ndarray | None:
        """Return (N, 2): steps, tokens or seconds, and the value; None if the run did not log them."""
        points = np.array(sorted(self.curves.get(column, {}).items()))
        if not AXES[axis] or not len(points):
            return points if len(points) else None
        known = np.array(sorted(self.curves.get(AXES[axis], {}).items()))
        if not len(known):
            return None
        return np.stack([np.interp(points[:, 0], [-1, *known[:, 0]], [0, *known[:, 1]]), points[:, 1]], 1)


def read_run(run: Path) -> ComparedRun:
    """Raises ValueError if there is no such run, or nothing was logged yet."""
    settings = {name: value for name, value in flatten(read_config(run)) if not SAME.match(name)}
    curves = read_curves(run / "metrics.csv")
    if not any(curves.values()):
        raise ValueError(f"run {str(run)!r} has logged nothing yet: it has no metrics.csv, or an empty one")
    summary: dict[str, Any] = read_json(run / "summary.json", dict)
    last = {
        name.removeprefix("validation/").removeprefix("source/"): list(points.values())[-1]
        for name, points in curves.items()
        if points
    }
    figures = summary or {
        name: value for name, value in last.items() if {f"validation/{name}", f"validation/source/{name}"} & curves.keys()
    }
    if not summary:
        steps = [step for name, points in curves.items() if name.startswith("train/") for step in points]
        figures["steps"] = f"{max(steps, default=-1) + 1:,} so far"
        figures |= {name: last[f"throughput/{name}"] for name in GENERAL if f"throughput/{name}" in last}
    if isinstance(parameters := figures.get("parameters"), dict):
        figures["parameters"] = sum(parameters.values())
    return ComparedRun(run.resolve().name, settings, figures, curves)


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """[(dotted name, value), ...] of a configuration; class names without their modules."""
    if not isinstance(value, dict) or not value:
        return [(name, value)]
    parts = []
    for key, part in value.items():
        if key == "class_path":
            parts.append((name, str(part).rpartition(".")[2]))
        else:
            parts += flatten(part, name if key == "init_args" else f"{name}.{key}".lstrip("."))
    return parts


def compare(folders: Sequence[Path]) -> tuple[list[ComparedRun], list[list[str]], list[list[str]]]:
    """Read runs; return them, a row for each final figure, and a row for each setting that differs. Raises ValueError."""
    if len({folder.resolve() for folder in folders}) < 2:
        raise ValueError("give two runs or more to compare: pile compare runs/A runs/B")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run, folder in zip(runs, folders, strict=True):
            run.name = str(folder)
    names = dict.fromkeys([*GENERAL, *(name for run in runs for name in run.figures if "/" not in name)])
    rows = []
    for name in names:
        values = [run.figures.get(name) for run in runs]
        if any(isinstance(value, int | float) for value in values) and not name.endswith("_code_use"):
            rows.append(
                [name, *("-" if value is None else value if isinstance(value, str) else short(value) for value in values)]
            )
    settings = dict.fromkeys(name for run in runs for name in run.settings)
    differ = [
        [name, *("-" if name not in run.settings else show_setting(run.settings[name]) for run in runs)] for name in settings
    ]
    return runs, rows, [row for row in differ if len(set(row[1:])) > 1]


def show_setting(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def best_of(name: str, runs: Sequence[ComparedRun]) -> float | None:
    """The best value of a figure, if it is known which values are better."""
    values = [value for run in runs if isinstance(value := run.figures.get(name), int | float)]
    choose = min if re.fullmatch(LESS_IS_BETTER, name) else max if re.fullmatch(MORE_IS_BETTER, name) else None
    return choose(values) if choose and len(values) > 1 else None


def write_comparison(folders: Sequence[Path], page: Path) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Write the page; return the names of the runs, and the rows of `compare`."""
    runs, rows, differ = compare(folders)
    names = [run.name for run in runs]
    cells = [[label(row[0])] + [escape(cell) for cell in row[1:]] for row in rows]
    for row, shown in zip(rows, cells, strict=True):
        best = best_of(row[0], runs)
        for column, run in enumerate(runs, 1):
            if best is not None and run.figures.get(row[0]) == best:
                shown[column] = f"<b>{shown[column]}</b>"
    heads = [f'<i style="background:var(--c{i % 6})"></i> {escape(name)}' for i, name in enumerate(names)]
    settings = [[escape(cell) for cell in row] for row in differ]
    body = "<h2>Final figures</h2>" + table(["", *heads], cells)
    body += "<h2>Settings that differ</h2>" + (table(["", *heads], settings) or "<p>None.</p>")
    body += "<h2>Curves</h2>" + "".join(
        f'<input type="radio" name="axis" id="{axis}"{" checked" * (axis == "step")}><label for="{axis}">by {axis}</label>'
        for axis in AXES
    )
    body += "".join(f'<div class="axis {axis}">{draw(runs, axis)}</div>' for axis in AXES)
    style = f"{STYLE}.axis{{display:none;margin-top:1rem}}label{{margin:0 1rem 0 .3rem}}td b{{color:var(--c2)}}{TABS}"
    status = "".join(f"<span>{escape(str(folder))}</span>" for folder in folders)
    page.parent.mkdir(parents=True, exist_ok=True)
    title = escape(" · ".join(names))
    page.write_text(PAGE.format(title=title, status=status, links="", body=body, style=style), "utf-8", "backslashreplace")
    return names, rows, differ


def draw(runs: Sequence[ComparedRun], axis: str) -> str:
    """A chart for each metric, a curve for each run, in the run's color; runs that did not log the axis are named."""
    charts = []
    for column in sorted({column for run in runs for column in run.curves}):
        order, match, (title, unit) = find_row(CHARTS, column)
        curves = {run.name: curve for run in runs if (curve := run.curve(column, axis)) is not None}
        if title and curves:
            title = match.expand(title).replace("_", " ")
            colors = [i for i, run in enumerate(runs) if run.name in curves]
            charts.append((order, title, line_chart(title[0].upper() + title[1:], unit, curves, axis=axis, colors=colors)))
    missing = [run.name for run in runs if AXES[axis] and AXES[axis] not in run.curves]
    note = f"<p>Not logged by {escape(', '.join(missing))}, which another version of Pile trained.</p>" if missing else ""
    return note + f'<div class="grid charts">{"".join(chart for _, _, chart in sorted(charts))}</div>'
