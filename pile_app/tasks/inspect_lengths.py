"""How long things are, without keeping each length: histograms, their quantiles, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pile_app.tasks.inspect_data import Part

COLORS = ("#2f6fb5", "#d9702b", "#2e9268", "#a2508f", "#8a7422", "#5a6b7c")
INK, SOFT, LINE = "#20242a", "#666e79", "#e2e4e1"
SHOWN_PARTS = 24
ROW, COLUMN = 0.62, 6.8  # inches; of a histogram, of a panel
TOP, BOTTOM, LABELS = 0.75, 0.55, 2.1


class Histogram:
    """Counts of whole numbers from 0 on, in bins: of 1 below 256, then 128 to an octave."""

    LARGEST = 1 << 53
    BINS = 256 + (53 - 8) * 128 + 1

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, np.int64)
        self.sum = 0
        self.minimum = self.LARGEST
        self.maximum = 0

    def add(self, values: np.ndarray) -> None:
        """values: (N,) integers."""
        if len(values):
            self.counts += np.bincount(self.bins(values), minlength=self.BINS)
            self.sum += int(values.sum())
            self.minimum = min(self.minimum, int(values.min()))
            self.maximum = max(self.maximum, int(values.max()))

    @classmethod
    def bins(cls, values: np.ndarray) -> np.ndarray:
        values = np.minimum(values, cls.LARGEST).astype(np.int64)
        octave = np.maximum(np.frexp(values.astype(np.float64))[1] - 9, 0)  # 0 below 512
        large = values >= 256
        return np.where(large, 256 + octave * 128 + (values >> (octave + 1)) - 128, values)

    @classmethod
    def centers(cls) -> np.ndarray:
        """(BINS,) the value that stands for each bin."""
        octave, place = np.divmod(np.arange(cls.BINS - 256), 128)
        width = 2.0 ** (octave + 1)
        return np.concatenate([np.arange(256), (place + 128) * width + (width - 1) / 2])

    def merge(self, other: Histogram) -> None:
        """Adds what `other` counted."""
        self.counts += other.counts
        self.sum += other.sum
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> int:
        """The value that `share` of all are not above, off by 0.8 % at most."""
        rank = max(1, int(np.ceil(share * self.count)))
        place = int(np.searchsorted(np.cumsum(self.counts), rank))
        return int(np.clip(round(float(self.centers()[place])), self.minimum, self.maximum))

    def description(self) -> dict[str, int] | None:
        if not self.count:
            return None
        shares = {f"{100 * share:g}%": self.quantile(share) for share in (0.01, 0.25, 0.5, 0.75, 0.99)}
        return {"count": self.count, "sum": self.sum, "minimum": self.minimum} | shares | {"maximum": self.maximum}


def short(value: float) -> str:
    """Three digits: 812, 12.5k, 3.1M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value / size:,.0f}{letter}"
    return f"{value:,.0f}"


class Ridge(NamedTuple):
    """A row of a panel."""

    label: str
    histogram: Histogram
    color: str
    faint: bool = False


class Panel(NamedTuple):
    title: str
    unit: str
    rows: Sequence[Ridge]
    scale: float = 1.0  # of the unit, to one of what the histograms count


def draw_lengths(parts: Sequence[Part], context: int, path: Path) -> None:
    """Writes a picture: a panel each for documents by source, segments by modality, pixels and seconds."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(part.source for part in parts))

    def color(source: str) -> str:
        return COLORS[names.index(source) % len(COLORS)]

    def ridges(which: str) -> list[Ridge]:
        rows = [
            Ridge(
                part.title,
                getattr(part, which),
                COLORS[names.index(part.source) % len(COLORS)],
                part.split not in ("train", ""),
            )
            for part in parts
            if getattr(part, which).count
        ]
        return sorted(rows, key=lambda row: -row.histogram.count)[:SHOWN_PARTS] if len(rows) > SHOWN_PARTS else rows

    by_modality = []
    for modality, name in enumerate(("text", "images", "sound")):
        histogram = Histogram()
        for part in parts:
            histogram.merge(part.segment_tokens[modality])
        if histogram.count:
            by_modality.append(Ridge(name, histogram, COLORS[modality]))
    text_only = any(part.unknown for part in parts)
    panels = [
        Panel("Documents" + ": text alone where codecs are not known" * text_only, "tokens", ridges("document_tokens")),
        Panel("Segments", "tokens", by_modality),
        Panel("Images", "pixels", ridges("pixels")),
        Panel("Sounds", "seconds", ridges("milliseconds"), 1e-3),
    ]
    panels = [
        panel._replace(title=panel.title + f", the {SHOWN_PARTS} largest" * (len(panel.rows) == SHOWN_PARTS < len(parts)))
        for panel in panels
        if panel.rows
    ]
    if not panels:
        return
    grid = [panels[place : place + 2] for place in range(0, len(panels), 2)]
    heights = [TOP + ROW * max(len(panel.rows) for panel in line) + BOTTOM for line in grid]
    width, height = COLUMN * min(2, len(panels)), sum(heights)
    figure = Figure((width, height), dpi=130, facecolor="white")
    for number, line in enumerate(grid):
        top = height - sum(heights[:number]) - TOP
        for column, panel in enumerate(line):
            tall = ROW * len(panel.rows)
            place = (column * COLUMN + LABELS, top - tall, COLUMN - LABELS - 0.3, tall)
            axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
            _draw_panel(axes, panel, context if panel.unit == "tokens" else None)
    figure.savefig(path)


def _draw_panel(axes: Any, panel: Panel, mark: int | None) -> None:
    """Histograms over one logarithmic axis, each as high as its highest bin, with a line at the median; `mark`: the context."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows, scale = panel.rows, panel.scale
    ends = [max(1, min(row.histogram.minimum for row in rows)), max(2, *(row.histogram.maximum for row in rows))]
    if mark is not None and ends[0] / 4 < mark < ends[1] * 4:
        ends = [min(ends[0], mark), max(ends[1], mark)]
    else:
        mark = None
    low, high = np.log2(ends)
    fineness = min(8, max(2, round(48 / (high - low + 1))))  # bins an octave
    edges = 2.0 ** (np.arange(np.floor(low - 0.3) * fineness, np.ceil(high + 0.3) * fineness + 1) / fineness)
    for number, row in enumerate(rows):
        bottom = len(rows) - 1 - number
        counts, _ = np.histogram(np.maximum(Histogram.centers(), 1), edges, weights=row.histogram.counts)
        tops = bottom + 0.68 * counts / counts.max()
        axes.axhline(bottom, color=LINE, linewidth=1, zorder=0)
        alpha = 0.4 if row.faint else 0.85
        axes.stairs(tops, edges * scale, baseline=bottom, fill=True, color=row.color, alpha=alpha, linewidth=0)
        axes.stairs(np.where(counts > 0, tops, np.nan), edges * scale, baseline=bottom, color=row.color, linewidth=0.8)
        median = max(1, row.histogram.quantile(0.5)) * scale
        axes.plot([median] * 2, [bottom, bottom + 0.72], color=INK, linewidth=1)
        told = short(median) if median >= 10 else f"{median:.3g}"
        axes.annotate(told, (median, bottom + 0.74), ha="center", va="bottom", fontsize=8, color=INK, annotation_clip=False)
    if mark is not None:
        axes.axvline(mark, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(f"context {mark:,}", (mark, 1), (0, 5), ha="center", fontsize=8, color=SOFT, **where)
    axes.set_xscale("log")
    axes.set_xlim(edges[0] * scale, edges[-1] * scale)
    axes.set_ylim(-0.02, len(rows))
    axes.set_yticks([len(rows) - 1 - number + 0.34 for number in range(len(rows))], [""] * len(rows))
    for number, row in enumerate(rows):
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        place = (0, len(rows) - 1 - number + 0.34)
        label = row.label if len(row.label) <= 24 else f"{row.label[:9]}\u2026{row.label[-14:]}"
        axes.annotate(label, place, (-10, 1), va="bottom", fontsize=9.5, color=INK, parse_math=False, **where)
        axes.annotate(f"{row.histogram.count:,}", place, (-10, -1), va="top", fontsize=8, color=SOFT, **where)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", which="both", colors=SOFT, labelsize=8, length=3, color=LINE)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if (high - low) < 9 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.unit, fontsize=8.5, color=SOFT)
    axes.set_title(panel.title, loc="left", x=0, fontsize=12, fontweight="bold", color=INK, pad=20)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
