"""How long things are: histograms, their quantiles, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pile_app.documents import AUDIO, IMAGE
from pile_app.training.report import short

if TYPE_CHECKING:
    from pile_app.tasks.inspect_data import Part

COLORS = ("#2f6fb5", "#d9702b", "#2e9268", "#a2508f", "#8a7422", "#5a6b7c")
SHOWN_PARTS = 24
BINS = 64


class Histogram:
    """Whole numbers from 0 on, and how often each was seen: memory grows with the different ones alone."""

    def __init__(self) -> None:
        self.values = self.counts = np.zeros(0, np.int64)  # (U,) increasing, (U,)

    def add(self, values: np.ndarray, counts: np.ndarray | None = None) -> None:
        """values: (N,) integers; counts: (N,) of each, None: one."""
        counts = np.ones(len(values), np.int64) if counts is None else counts
        self.values, places = np.unique(np.concatenate([self.values, values.astype(np.int64)]), return_inverse=True)
        self.counts = np.bincount(places, np.concatenate([self.counts, counts]), len(self.values)).astype(np.int64)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def sum(self) -> int:
        return int((self.values * self.counts).sum())

    def quantile(self, share: float) -> int:
        """The smallest value that `share` of all are not above."""
        rank = max(1, int(np.ceil(share * self.count)))
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank)])

    def description(self) -> dict[str, int] | None:
        if not self.count:
            return None
        shares = {f"{100 * share:g}%": self.quantile(share) for share in (0.01, 0.25, 0.5, 0.75, 0.99)}
        ends = {"minimum": int(self.values[0])}, {"maximum": int(self.values[-1])}
        return {"count": self.count, "sum": self.sum} | ends[0] | shares | ends[1]


class Panel(NamedTuple):
    """Histograms over one axis; scale: of the unit, to one of what the histograms count."""

    title: str
    unit: str
    rows: list[tuple[str, Histogram, str]]  # label, counts, color
    scale: float = 1.0


def draw_lengths(parts: Sequence[Part], context: int, path: Path) -> None:
    """Writes a picture: a panel each for documents by source, segments by modality, pixels and seconds."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(part.source for part in parts))
    shown = sorted(parts, key=lambda part: len(part.shards), reverse=True)[:SHOWN_PARTS]
    shown.sort(key=parts.index)

    def rows(histograms: Sequence[Histogram]) -> list[tuple[str, Histogram, str]]:
        colors = [COLORS[names.index(part.source) % len(COLORS)] for part in shown]
        named = zip([part.title for part in shown], histograms, colors, strict=True)
        return [row for row in named if row[1].count]

    by_modality = [("text", Histogram(), COLORS[0]), ("images", Histogram(), COLORS[1]), ("sound", Histogram(), COLORS[2])]
    for part in parts:
        for (_, histogram, _), tokens in zip(by_modality, part.segment_tokens, strict=True):
            histogram.add(tokens.values, tokens.counts)
    of_text = ": text alone where codecs are not known" * any(part.only_text for part in parts)
    panels = [
        Panel(f"Documents{of_text}", "tokens", rows([part.document_tokens for part in shown])),
        Panel("Segments", "tokens", [row for row in by_modality if row[1].count]),
        Panel("Images", "pixels", rows([part.sizes[IMAGE] for part in shown])),
        Panel("Sounds", "seconds", rows([part.sizes[AUDIO] for part in shown]), 1e-3),
    ]
    panels = [panel for panel in panels if panel.rows]
    if not panels:
        return
    lines = -(-len(panels) // 2)
    figure = Figure((14, lines * (1.2 + 0.55 * max(len(panel.rows) for panel in panels))), dpi=110, layout="constrained")
    for place, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(lines, 2, place + 1), panel, context)
    if len(shown) < len(parts):
        figure.suptitle(f"the {SHOWN_PARTS} largest of {len(parts):,} sources and splits")
    figure.savefig(path)


def _draw_panel(axes: Any, panel: Panel, context: int) -> None:
    """Histograms one above the other over a logarithmic axis, each as high as its highest bin, with its median."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    smallest, largest = (f(histogram.values[place] for _, histogram, _ in panel.rows) for f, place in ((min, 0), (max, -1)))
    edges = np.geomspace(max(1, smallest) / 1.1, max(2, largest) * 1.1, BINS + 1)
    for place, (_, histogram, color) in enumerate(reversed(panel.rows)):
        counts, _ = np.histogram(np.maximum(histogram.values, 1), edges, weights=histogram.counts)
        axes.stairs(
            place + 0.7 * counts / counts.max(), edges * panel.scale, baseline=place, fill=True, color=color, alpha=0.85
        )
        median = max(1, histogram.quantile(0.5)) * panel.scale
        axes.plot([median] * 2, [place, place + 0.72], color="black", linewidth=1)
        axes.annotate(short(median), (median, place + 0.74), ha="center", fontsize=8)
    if panel.unit == "tokens":
        axes.axvline(context, color="grey", linestyle="--", linewidth=1, zorder=0)
        axes.annotate(f"context {context:,}", (context, len(panel.rows)), ha="center", va="bottom", fontsize=8, color="grey")
    labels = [f"{label}\n{histogram.count:,}" for label, histogram, _ in reversed(panel.rows)]
    axes.set_yticks(np.arange(len(labels)) + 0.3, labels, fontsize=8, parse_math=False)
    axes.set_ylim(0, len(panel.rows))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 1e4 * edges[0] else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(panel.unit)
    axes.set_title(panel.title, loc="left", pad=14)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
