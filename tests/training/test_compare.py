"""`pile compare`: one page with the curves, final figures and differing settings of runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import TinyRun, train

from pile_app.cli import main


def compare(*words: str | Path) -> None:
    main(["compare", *map(str, words)])


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny Transformer, and an LSTM on the same data that logs each step."""
    folder = tmp_path_factory.mktemp("compared")
    lstm = ["--model.backbone=LSTM", "--model.backbone.width=24", "--trainer.log_every_n_steps=1", "--model.codec_steps=1"]
    train(
        "--config",
        tiny_run.config,
        *lstm,
        "--name",
        "lstm <1>",
        "--runs",
        folder,
        "--wandb",
        "null",
        cwd=tiny_run.config.parent,
    )
    shutil.copytree(tiny_run.folder, folder / "transformer")
    return [folder / "transformer", folder / "lstm <1>"]


def test_a_page_and_a_table_compare_runs(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    compare(*runs)
    printed, page = capsys.readouterr().out, (runs[0].parent / "compare.html").read_text()
    settings = page.partition("Settings that differ")[2].partition("Curves")[0]
    rows = {row[0]: row[1:] for row in (re.findall(r"<td>(.*?)</td>", line) for line in settings.split("<tr>")) if row}
    assert rows["model.backbone"] == ["Transformer", "LSTM"] and rows["model.backbone.heads"] == ["2", "-"]
    assert rows["model.codec_steps"] == ["2", "1"] and not {"name", "runs", "data.context"} & rows.keys()
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert f"{sum(summary['parameters'].values()):,}" in page and f"{summary['tokens']:,}" in printed
    best = min(json.loads((run / "summary.json").read_text())["text_bits_per_byte"] for run in runs)
    assert f"<b>{best:.4g}</b>" in page
    for text in ("Transformer", "codec steps", "tokens per second", "text bits per byte"):
        assert text in printed or text.replace(" ", "_") in printed, text
    charts = re.findall(r'aria-label="(.*?)"', page)
    for chart in ("Text, validation", "Text, train", "Image, validation", "Codecs, audio, train", "All modalities, validation"):
        assert charts.count(chart) >= 2, chart
    assert "step</text>" in page and "tokens</text>" in page and "seconds</text>" in page
    assert "lstm &lt;1&gt;" in page and "<1>" not in page
    assert not re.search(r"https?://|url\(|@import|<link|<script", page)


def test_curves_follow_tokens_and_seconds_of_the_run(runs: list[Path]) -> None:
    from pile_app.training.report import read_run

    run, summary = read_run(runs[1]), json.loads((runs[1] / "summary.json").read_text())
    tokens, seconds = (run.curve("train/text_loss", axis) for axis in ("tokens", "seconds"))
    assert tokens is not None and seconds is not None and len(tokens) == 5  # after one step of the codecs
    assert tokens[-1, 0] == summary["tokens"] and 0 < seconds[-1, 0] <= summary["train_seconds"]
    assert (tokens[1:, 0] > tokens[:-1, 0]).all() and (seconds[1:, 0] > seconds[:-1, 0]).all()


def test_a_run_that_still_trains_is_compared_by_its_last_validation(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "unfinished")
    (tmp_path / "unfinished" / "summary.json").unlink()
    compare(runs[0], tmp_path / "unfinished", "--output", tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    last = json.loads((runs[1] / "summary.json").read_text())["text_bits_per_byte"]
    assert "6 so far" in page and f"{last:.4g}" in page.partition("Settings")[0]


def test_what_cannot_be_compared_is_named(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs[0], tmp_path / "young", ignore=shutil.ignore_patterns("metrics.csv"))
    for other, told in ((runs[0], "two runs or more"), (tmp_path / "none", "none"), (tmp_path / "young", "logged nothing yet")):
        with pytest.raises(SystemExit):
            compare(runs[0], other)
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
