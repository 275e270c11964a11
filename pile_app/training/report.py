"""Pages about runs: `report.html` in the folder of each, and `compare.html` of several (`pile compare`).

A page contains its styles, charts (SVG), images and sounds (`data:` URIs), so it can be mailed and opened without a network.
The report shows the files of the run folder that exist: metrics.csv (curves, see `CHARTS`), summary.json (final figures, see
`FIGURES`), config.yaml, and samples/{evaluation,step-N}/samples.json: a list of {"title", "prompt", "outputs", "references"} of
parts, {"modality": "text", "text": ...} or {"modality": "image", "file": ...}. The comparison shows the curves of all runs by
steps, tokens and seconds, their final figures (those of the last validation while a run trains), and the settings that differ.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from PIL import Image, ImageOps

from pile_app.documents import BadSample
from pile_app.media import audio_size, image_size

FIGURES = (  # pattern of a key in summary.json, unit, meaning; the first match counts
    (r"\w*_to_text_accuracy", "%", "of unseen media are named right, letter by letter"),
    (r"\w*_to_text\w*_top5", "%", "of unseen media: the right name is among the five likeliest (raised: frequency taken off)"),
    (r"\w*_to_(image|audio)_\w+", "%", "is recognised as what was asked for, by a judge trained on real media only"),
    (r"\w*_codec_accuracy", "%", "of media through the codec are recognised by the judge: the most that generation can reach"),
    (r"\w*_judge_accuracy", "%", "of real media are recognised by the judge"),
    (r"text_bits_per_byte(_\w+)?", "bits per byte", "to encode unseen text (xz, zstd: with that compressor); less is better"),
    (r"text_conditioning_gain", "nats per token", "that a wrong image or sound adds to a text's loss"),
    (r"image_psnr", "dB", "peak signal-to-noise ratio of unseen images through the codec; more is better"),
    (r"\w+_code_use", "%", "of all codes occur in unseen media"),
    (r"parameters|steps|tokens", "", ""),
    (r"train_seconds", "s", "wall-clock"),
    (r"tokens_per_second", "tokens/s", "mean over the training"),
    (r"peak_memory_bytes", "bytes", "held at once"),
    (r"(?s).*", "", ""),
)
LOSS_UNITS = ("nats per token", "bits per byte", "reconstruction loss")
STATUS = ("device", "steps", "tokens", "train_seconds", "tokens_per_second", "parameters")
HEADLINE = {  # figures on top, each with the figure to compare it with
    "image_to_text_accuracy": "image_judge_accuracy", "audio_to_text_accuracy": "audio_judge_accuracy",
    "text_to_image_accuracy": "image_codec_accuracy", "text_to_audio_accuracy": "audio_codec_accuracy",
    "image_to_audio_accuracy": "audio_codec_accuracy", "unseen_image_to_text_top5": "unseen_image_to_text_accuracy",
    "unseen_text_to_image_accuracy": "unseen_image_codec_accuracy", "text_bits_per_byte": "text_bits_per_byte_xz",
    "image_psnr": "", "text_conditioning_gain": "",
}  # fmt: skip
CHARTS = (  # pattern of a column in metrics.csv, section, chart, curve, unit; the first match counts
    (r"(train|validation)/loss", "Loss", "All modalities", r"\1", "nats per token"),
    (r"(train|validation)/(\w+)(?<!_codec)_loss", "Loss", r"\2", r"\1", "nats per token"),
    (r"(train|validation)/(\w+)_bits_per_byte", "Loss", r"\2, bits per byte", r"\1", "bits per byte"),
    (r"(train|validation)/(\w+)_codec_loss", "Loss", "Codecs", r"\2, \1", "reconstruction loss"),
    (r"(train|validation)/source/(\w+)_loss", "Loss", "By source", r"\2, \1", "nats per token"),
    (r"learning_rate/(.+)|lr-(.+)", "Learning rate and speed", "Learning rate", r"\1\2", "learning rate"),
    (r"throughput/(tokens|train_seconds)", "", "", "", ""),  # axes of a comparison
    (r"throughput/(.+)", "Learning rate and speed", r"\1", "", r"\1"),
    (r"data/(.+)", "Data", r"\1", "", r"\1"),
    (r"((?:train|validation)?)/?(.+)", "Other measurements", r"\2", r"\1", r"\2"),
)
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".m4a", ".aac", ".webm")
MIME = {".jpg": "jpeg", ".jpe": "jpeg", ".jfif": "jpeg", ".mp3": "mpeg", ".opus": "ogg", ".m4a": "mp4"}  # else as the suffix
STYLE = """
:root{color-scheme:light dark;--page:#fafaf8;--card:#fff;--ink:#20242a;--soft:#666e79;--line:#e2e4e1;--c0:#2f6fb5;--c1:#d9702b;
--c2:#2e9268;--c3:#a2508f;--c4:#8a7422;--c5:#5a6b7c}@media(prefers-color-scheme:dark){:root{--page:#15181c;--card:#1d2126;
--ink:#e4e6e8;--soft:#9aa2ac;--line:#30363d;--c0:#6ba7e6;--c1:#f0955a;--c2:#5cc296;--c3:#d488c2;--c4:#cbb45a;--c5:#9fb0c2}}
*{box-sizing:border-box}body{margin:auto;max-width:1120px;padding:2.5rem 1.25rem 4rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}h1{font-size:2rem;line-height:1.2;margin:0}h2{font-size:1.3rem;margin:3rem 0 1rem;
padding-bottom:.3rem;border-bottom:1px solid var(--line)}h3{font-size:1rem;margin:1.6rem 0 .6rem}nav{margin:.6rem 0 1.4rem}a{
color:var(--c0);text-decoration:none;margin-right:1.1rem}small,th,figcaption,summary,.soft{color:var(--soft);font-size:.82rem;
font-weight:400}b{color:var(--ink)}.soft span,figcaption *{margin-right:.8rem}.grid{display:grid;gap:.8rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least,12.2rem)),1fr))}.charts{--least:26rem}.card{
background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem .9rem;margin:0;min-width:0;
break-inside:avoid}.big{display:block;font-size:1.6rem;line-height:1.3}.row{display:flex;flex-wrap:wrap;gap:.35rem}.prompt{
font-weight:650}.steps .grid{--least:32rem}.steps .grid:has(.long,.sound){--least:100%}.made .grid:has(.long){--least:25rem}
.steps .card{display:grid;grid:auto/4rem;grid-auto-flow:column;grid-auto-columns:minmax(4rem,1fr);gap:.5rem;overflow-x:auto}
.steps .grid:has(.long,.sound) .card{grid-template-columns:7rem;gap:1rem}.steps small{font-size:.72rem;white-space:nowrap}pre{
margin:0;font:.85rem/1.45 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;max-height:24rem;
overflow:auto}.prompt pre{font-weight:650}img{display:block;border-radius:4px;max-width:100%}.pixels{image-rendering:pixelated}
.sound{width:100%;margin:0}.sound img{width:100%;height:3.5rem}audio{width:100%;height:2rem;margin-top:.3rem}.scroll{
overflow-x:auto}svg{display:block;width:100%}table{border-collapse:collapse}td,th{text-align:left;
padding:.35rem 1.6rem .35rem 0;border-bottom:1px solid var(--line)}details pre{max-height:none}summary{cursor:pointer}svg text{
fill:var(--soft);font-size:11px}svg path{stroke:var(--line)}polyline{fill:none;stroke-width:2;stroke-linejoin:round;
stroke-linecap:round}.raw{opacity:.2}i{display:inline-block;width:.9rem;height:3px;vertical-align:middle}figcaption i{
margin-right:.35rem}figcaption span{display:inline-block}@media print{audio,nav{display:none}body{padding:0}}
"""
# With this policy the browser loads nothing from elsewhere and runs no script of a sample.
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta
http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src {media}; media-src
{media}"><title>{title}</title><style>{style}</style><h1>{title}</h1><p class="soft">{status}</p><nav>{links}</nav>{body}</html>
"""
AXES = {"step": "", "tokens": "throughput/tokens", "seconds": "throughput/train_seconds"}  # columns of metrics.csv
GENERAL = ("steps", "tokens", "parameters", "train_seconds", "tokens_per_second", "peak_memory_bytes")
LESS_IS_BETTER = r"loss|.*(_loss|bits_per_byte|perplexity)(_\w+)?"
MORE_IS_BETTER = r".*(accuracy|precision|recall\w*|f1|mrr|psnr|top5)"
SAME = r"(name|runs|wandb|config|ledger|checkpoint_every|trainer\.(logger|default_root_dir))(\..*)?"  # settings not compared


def write_page(
    file: Path, title: str, status: Iterable[str], body: str, links: str = "", style: str = "", media: str = "data:"
) -> None:
    """Write a page. `title` and `status` are text, all else HTML; `media`: where images and sounds may come from."""
    notes = "".join(f"<span>{escape(note)}</span>" for note in status)
    page = PAGE.format(title=escape(title), status=notes, links=links, body=body, style=STYLE + style, media=media)
    file.write_text(page, "utf-8", errors="backslashreplace")


def write_report(run: Path) -> Path:
    """Write `run/report.html` and return its path. Raises ValueError if `summary.json` or a `samples.json` cannot be read."""
    summary: dict[str, Any] = read_json(run / "summary.json", dict)
    charts = draw_charts(read_curves(run / "metrics.csv"))
    steps = {int(path.parent.name[5:]): path.parent for path in run.glob("samples/step-*/samples.json")}
    some = sorted(steps)[:: -max(1, -(-len(steps) // 6))][::-1]  # six at most, the last included
    evaluation = run / "samples/evaluation"
    made = evaluation if (evaluation / "samples.json").exists() else steps[max(steps)] if steps else evaluation
    config = (run / "config.yaml").read_text("utf-8") if (run / "config.yaml").exists() else ""
    versions = {"git_revision": summary.pop("git_revision", None)} | (summary.pop("versions", None) or {})
    rejected = [
        [escape(source), escape(reason), when, short(count)]
        for name, when in (("rejected_when_indexed", "when indexed"), ("quarantined", "when read"))
        for source, reasons in (summary.pop(name, None) or {}).items()
        for reason, count in reasons.items()
    ]
    keys = sorted(summary, key=lambda key: (find_row(FIGURES, key)[0], key))
    results = [[label(key), figure(key, summary[key]), find_row(FIGURES, key)[2][1]] for key in keys]
    sections = {
        "What it made": sample_cards({"made": made}, "references"),
        "Progress over training": sample_cards({f"step {step:,}": steps[step] for step in some}, least=3, style="steps"),
        "Loss": charts["Loss"],
        "Results": table(["", "", "meaning"], results),
        "Learning rate and speed": charts["Learning rate and speed"],
        "Data": charts["Data"] + table(["source", "rejected because", "", "samples"], rejected),
        "Other measurements": charts["Other measurements"],
        "Configuration": config and f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>",
        "Versions": table(["", ""], [[escape(name), figure("", value)] for name, value in versions.items() if value]),
    }
    shown = [(name, content) for name, content in sections.items() if content]
    facts = "".join(f"<span><b>{figure(key, summary[key])}</b> {label(key).lower()}</span>" for key in STATUS if key in summary)
    links = "".join(f'<a href="#{i}">{name}</a>' for i, (name, _) in enumerate(shown))
    body = "".join(f'<h2 id="{i}">{name}</h2>{content}' for i, (name, content) in enumerate(shown))
    cards = ""
    for key, other in ((key, other) for key, other in HEADLINE.items() if key in summary):
        note = f"<small>{label(other)}: {figure(other, summary[other])}</small>" if other in summary else ""
        cards += f'<div class="card">{label(key)}<span class="big">{figure(key, summary[key])}</span>{note}</div>'
    top = f'<p class="soft">{facts}</p><div class="grid">{cards}</div>'
    write_page(run / "report.html", run.resolve().name, [], top + body, links)
    return run / "report.html"


def read_json(path: Path, kind: type) -> Any:
    """Read a list or dictionary; empty if there is no file."""
    try:
        content = json.loads(path.read_text("utf-8")) if path.exists() else kind()
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): delete it or write it again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__} where a {kind.__name__} belongs")
    return content


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Column → {step: value} of a file of CSVLogger; the last value of a step counts (resuming repeats steps)."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for row in csv.DictReader(path.read_text("utf-8").splitlines()) if path.exists() else ():
        for name in row.keys() - {"step", "epoch", None}:
            if row[name] and row["step"] and math.isfinite(float(row[name])):
                curves[name][int(float(row["step"]))] = float(row[name])
    return curves


def find_row(rows: Sequence[tuple[str, ...]], name: str) -> tuple[int, re.Match[str], tuple[str, ...]]:
    """Index of the first row whose pattern matches a name, the match, and the rest of the row."""
    return next((i, match, row[1:]) for i, row in enumerate(rows) if (match := re.fullmatch(row[0], name)))


def label(key: str) -> str:
    return escape(key.replace("_to_", " → ").replace("audio", "sound").replace("_", " ").capitalize())


def figure(key: str, value: Any) -> str:
    """A figure and its unit, as HTML."""
    if isinstance(value, dict):
        return ", ".join(f"{escape(name)} {figure('', part)}" for name, part in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    unit = find_row(FIGURES, key)[2][0]
    scale, unit = {"%": (100, "%"), "bytes": (2**-30, "GiB"), "s": (1 / 60, "min")}.get(unit, (1, unit))
    return f"{short(value * scale)} <small>{unit}</small>" if unit else short(value)


def short(value: float) -> str:
    """Three or four digits: 0.0123, 97.25, 1,250, 12.5M."""
    size, letter = next((unit for unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if abs(value) >= unit[0]), (1, ""))
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value / size:.{3 if letter else 4}g}{letter}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>{lines}</table></div>' if rows else ""


def sample_cards(folders: dict[str, Path], *extra: str, least: int = 2, style: str = "made") -> str:
    """Under each title one card a prompt with the outputs of each folder; cards of fewer than `least` parts are skipped."""
    titles: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, folder in folders.items():
        for sample in read_json(folder / "samples.json", list):
            card = titles[sample.get("title", "")][json.dumps(sample.get("prompt"))]
            for kind in ("outputs", *extra) if card else ("prompt", "outputs", *extra):
                note = {"outputs": name, "references": "real"}.get(kind, "" if sample.get("prompt") else "no prompt")
                shown = "".join(medium(part, folder) for part in sample.get(kind) or ())
                if shown or kind == "prompt":
                    card.append(f'<div class="{kind}"><small>{note}</small><div class="row">{shown}</div></div>')
    page = ""
    for title, prompts in titles.items():
        cards = "".join(f'<div class="card">{"".join(card)}</div>' for card in prompts.values() if len(card) >= least)
        page += f'<h3>{escape(title)}</h3><div class="grid">{cards}</div>' if cards else ""
    return page and f'<div class="{style}">{page}</div>'


def medium(part: dict[str, Any], folder: Path, link: str | None = None, least: int = 64) -> str:
    """A text, image or sound on a page: within it, or at `link`. Small images are shown at `least` pixels or more."""
    if "file" not in part:
        text = str(part.get("text", ""))
        return f'<pre class="{"long" if len(text) > 60 else ""}">{escape(text)}</pre>'
    path = folder / Path(part["file"]).name  # a sample is never a file from elsewhere
    try:
        content = path.read_bytes()
        source = link or data_uri(path.suffix, content)
        if part["modality"] == "audio":
            samples, rate = audio_size(content)
            waveform, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)  # (S, C)
            note, picture = f"{samples / rate:.2f} s, up to {rate / 2000:g} kHz", spectrogram(waveform.mean(1))
            image = f'<img src="{data_uri(".png", picture)}" alt="{note}" title="{note}">'
            return f'<figure class="sound">{image}<audio controls src="{source}"></audio></figure>'
        height, width = image_size(content)
    except (OSError, BadSample, soundfile.LibsndfileError) as error:
        return f'<small class="bad">{escape(path.name)} cannot be shown: {escape(str(error))}</small>'
    scale = max(1, least // max(width, height))
    shape = f'class="{"pixels" if scale > 1 else ""}" width="{min(4 * least, scale * width)}"'
    return f'<img {shape} src="{source}" alt="image" title="{width} x {height} pixels">'


def data_uri(suffix: str, content: bytes) -> str:
    kind = "audio" if suffix in SOUNDS else "image"
    return f"data:{kind}/{MIME.get(suffix, suffix[1:])};base64,{base64.b64encode(content).decode()}"


def spectrogram(waveform: np.ndarray, window: int = 256, columns: int = 160) -> bytes:
    """PNG of a waveform (S,): time to the right, frequency upwards to half the sample rate, the loudest 70 dB."""
    waveform = np.pad(waveform, (0, max(0, window + 1 - len(waveform))))
    starts = np.linspace(0, len(waveform) - window, columns).astype(int)
    frames = waveform[starts[:, None] + np.arange(window)] * np.hanning(window)  # (columns, window)
    decibels = 20 * np.log10(np.abs(np.fft.rfft(frames)).T[:0:-1] + 1e-5)  # (window / 2, columns)
    image = Image.fromarray(np.clip(255 * (1 + (decibels - decibels.max()) / 70), 0, 255).astype(np.uint8))
    image = ImageOps.colorize(image, "#14142f", "#fff0b4", mid="#aa3c6e")
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def draw_charts(curves: dict[str, dict[int, float]]) -> dict[str, str]:
    """Section → its charts, in the order of CHARTS, and text before images before sound."""
    charts: dict[tuple[int, str, str, str], dict[str, np.ndarray]] = defaultdict(dict)
    for name in sorted(curves, key=lambda name: ("text" not in name, "image" not in name, name)):
        order, match, row = find_row(CHARTS, name)
        section, title, curve, unit = (match.expand(part).replace("_", " ") for part in row)
        if not title:
            continue
        charts[order, section, title, unit][curve] = np.array(sorted(curves[name].items()))  # (N, 2): step, value
    page: dict[str, str] = defaultdict(str)
    for (_, section, title, unit), lines in sorted(charts.items(), key=lambda item: item[0][0]):
        page[section] += line_chart(title[0].upper() + title[1:], unit, lines)
    return defaultdict(str, {name: f'<div class="grid charts">{figures}</div>' for name, figures in page.items()})


def line_chart(
    title: str, unit: str, curves: dict[str, np.ndarray], axis: str = "step", colors: Sequence[int] = range(100),
    width: int = 480, height: int = 190,
) -> str:  # fmt: skip
    """Curves (N, 2) of steps and values as an SVG figure: means over a 40th of the points, over the faint points."""
    means = {}
    for name, curve in curves.items():
        window = np.ones(1 if unit == "learning rate" else 1 + 2 * (len(curve) // 80))
        means[name] = curve.copy()
        means[name][:, 1] = np.convolve(curve[:, 1], window, "same") / np.convolve(np.ones(len(curve)), window, "same")
    steps, values = np.concatenate(list(means.values())).T
    usual = np.quantile(np.concatenate(list(curves.values()))[:, 1], [0.01, 0.99])  # a lone spike does not flatten the rest
    last, low, high = max(steps.max(), 1), min(*usual, values.min()), max(*usual, values.max())
    is_loss = unit in LOSS_UNITS
    log = bool(is_loss and low > 0 and high > 6 * low)
    bend = np.log if log else np.asarray
    margin = 0.06 * (high - low or abs(high) or 1)
    low, high = (low / 1.1, high * 1.1) if log else (low - margin if is_loss or low < 0 else 0.0, high + margin)

    def place(curve: np.ndarray) -> str:
        thin = curve[np.linspace(0, len(curve) - 1, min(len(curve), 400)).astype(int)].clip([0, low], None)
        x, y = width * thin[:, 0] / last, height * (bend(high) - bend(thin[:, 1])) / (bend(high) - bend(low))
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]
        return " ".join([points[0], *points])  # a curve of one point is drawn as a dot

    lines = keys = grid = ""
    for i, (name, mean) in zip(colors, means.items(), strict=False):
        color = f"var(--c{i % 6})"
        lines += f'<polyline class="raw" stroke="{color}" points="{place(curves[name])}"/>'
        lines += f'<polyline stroke="{color}" points="{place(mean)}"/>'
        keys += f'<span><i style="background:{color}"></i>{escape(name)} {short(mean[-1, 1])}</span>'
    for tick in ticks(low, high, log):
        y = height * (bend(high) - bend(tick)) / (bend(high) - bend(low))
        grid += f'<path d="M0 {y:.1f}H{width}"/><text x="-6" y="{y:.1f}" dy="4" text-anchor="end">{short(tick)}</text>'
    for tick in ticks(0, last):
        grid += f'<text x="{width * tick / last:.1f}" y="{height + 16}" text-anchor="middle">{short(tick)}</text>'
    return (
        f'<figure class="card"><figcaption><b>{escape(title)}</b>{keys}</figcaption><svg viewBox="-64 -8 {width + 84} '
        f'{height + 46}" role="img" aria-label="{escape(title)}">{grid}<svg width="{width}" height="{height}">{lines}</svg>'
        f'<text x="{width / 2}" y="{height + 34}" text-anchor="middle">{axis}</text><text text-anchor="middle" '
        f'transform="translate(-52 {height / 2}) rotate(-90)">{escape(unit)}{", log scale" * log}</text></svg></figure>'
    )


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """A handful of round numbers between `low` and `high`."""
    rounds = [factor * 10.0**k for k in range(-12, 13) for factor in (1, 2, 5)]
    inside = [tick for tick in rounds if low <= tick <= high]
    step = next((step for step in rounds if (high - low) / step <= 6), high - low)
    even = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return inside[:: 1 + len(inside) // 7] if log else even


# -- Runs next to each other


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
    from pile_app.training.load import read_config

    settings = {name: value for name, value in flatten(read_config(run)) if not re.fullmatch(SAME, name)}
    curves = read_curves(run / "metrics.csv")
    if not curves:
        raise ValueError(f"run {str(run)!r} has logged nothing yet: it has no metrics.csv, or an empty one")
    figures: dict[str, Any] = read_json(run / "summary.json", dict)
    if not figures:  # it still trains
        last = {name: points[max(points)] for name, points in curves.items()}
        steps = max((max(points) for name, points in curves.items() if name.startswith("train/")), default=-1)
        figures = {re.sub("validation/(source/)?", "", name): last[name] for name in last if name.startswith("validation/")}
        figures |= {name: last[f"throughput/{name}"] for name in GENERAL if f"throughput/{name}" in last}
        figures["steps"] = f"{steps + 1:,} so far"
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


def write_comparison(folders: Sequence[Path], page: Path) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Write the page; return the names of the runs, a row for each final figure, and a row for each setting that differs.
    Raises ValueError for fewer than two runs, or if a run has logged nothing."""
    if len({folder.resolve() for folder in folders}) < 2:
        raise ValueError("give two runs or more to compare: pile compare runs/A runs/B")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run, folder in zip(runs, folders, strict=True):
            run.name = str(folder)
    names, figures, shown = [run.name for run in runs], list[list[str]](), list[list[str]]()  # shown: as HTML
    for name in dict.fromkeys([*GENERAL, *(name for run in runs for name in run.figures if "/" not in name)]):
        values = [run.figures.get(name) for run in runs]
        numbers = [value for value in values if isinstance(value, int | float)]
        if numbers and not name.endswith("_code_use"):
            cells = ["-" if value is None else value if isinstance(value, str) else short(value) for value in values]
            choose = min if re.fullmatch(LESS_IS_BETTER, name) else max if re.fullmatch(MORE_IS_BETTER, name) else None
            best = [choose(numbers)] if choose and len(numbers) > 1 else []
            figures.append([name, *cells])
            marked = [f"<b>{cell}</b>" if value in best else escape(cell) for cell, value in zip(cells, values, strict=True)]
            shown.append([label(name), *marked])
    flow: dict[str, Any] = {"default_flow_style": True, "width": math.inf}
    settings: list[list[str]] = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        texts = [yaml.safe_dump(run.settings[name], **flow) if name in run.settings else "-" for run in runs]
        if len(set(texts)) > 1:
            settings.append([name, *(text.removesuffix("\n").removesuffix("\n...") for text in texts)])
    heads = ["", *(f'<i style="background:var(--c{i % 6})"></i> {escape(name)}' for i, name in enumerate(names))]
    body = "<h2>Final figures</h2>" + table(heads, shown) + "<h2>Settings that differ</h2>"
    body += (table(heads, [[escape(cell) for cell in row] for row in settings]) or "<p>None.</p>") + "<h2>Curves</h2>"
    for axis in AXES:
        checked = " checked" * (axis == "step")
        body += f'<input type="radio" name="axis" id="{axis}"{checked}><label for="{axis}">by {axis}</label>'
    body += "".join(f'<div class="axis {axis}">{compare_curves(runs, axis)}</div>' for axis in AXES)
    looks = ".axis{display:none;margin-top:1rem}label{margin:0 1rem 0 .3rem}td b{color:var(--c2)}"
    looks += "".join(f"#{axis}:checked~.{axis}{{display:block}}" for axis in AXES)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, " · ".join(names), map(str, folders), body, style=looks)
    return names, figures, settings


def compare_curves(runs: Sequence[ComparedRun], axis: str) -> str:
    """A chart for each metric, a curve for each run, in the run's color; runs that did not log the axis are named."""
    charts = []
    for column in sorted({column for run in runs for column in run.curves if column.startswith(("train/", "validation/"))}):
        order, match, (_, title, curve, unit) = find_row(CHARTS, column)
        curves = {run.name: points for run in runs if (points := run.curve(column, axis)) is not None}
        if curves:
            title, unit = match.expand(f"{title}, {curve}").replace("_", " "), match.expand(unit).replace("_", " ")
            colors = [i for i, run in enumerate(runs) if run.name in curves]
            charts.append((order, title, line_chart(title[0].upper() + title[1:], unit, curves, axis=axis, colors=colors)))
    missing = [run.name for run in runs if AXES[axis] and AXES[axis] not in run.curves]
    note = f"<p>Not logged by {escape(', '.join(missing))}, which another version of Pile trained.</p>" if missing else ""
    return note + f'<div class="grid charts">{"".join(chart for _, _, chart in sorted(charts))}</div>'
