"""The report of a run: everything in one page, nothing from elsewhere, and no harm from what a model may write."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from pile_app.training.report import line_chart, read_curves, ticks, write_report

HOSTILE = "</pre><script>alert('made')</script>"
SECTIONS = [
    "What it made",
    "Progress over training",
    "Loss",
    "Results",
    "Learning rate and speed",
    "Data",
    "Other measurements",
    "Configuration",
    "Versions",
]


def write_samples(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for name in ("made.png", "real.png"):
        Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / name)
    soundfile.write(folder / "made.wav", np.sin(np.arange(2000) / 4) * 0.3, 8000)
    text, image, sound = {"modality": "text", "text": "three"}, {"modality": "image", "file": "made.png"}, "made.wav"
    samples = [
        {"title": "name → image", "prompt": [text], "outputs": [image], "references": [image | {"file": "real.png"}]},
        {"title": "name → sound", "prompt": [text], "outputs": [{"modality": "audio", "file": sound}]},
        {"title": "text <b>", "prompt": [], "outputs": [{"modality": "text", "text": HOSTILE}]},
    ]
    (folder / "samples.json").write_text(json.dumps(samples))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "digits <1>"
    for step in (100, 1000):
        write_samples(run / f"samples/step-{step:08d}", seed=step)
    write_samples(run / "samples/evaluation", seed=0)
    rows = ["epoch,step,train/text_loss,validation/text_loss,train/image_codec_loss,learning_rate/muon,data/padding_share,norm"]
    rows += [f"0,{step},{5 / step},,{0.3 / step},0.02,0.1,nan" for step in range(1, 101)]
    rows += ["0,100,,0.07,,,,2.5"]
    (run / "metrics.csv").write_text("\n".join(rows))
    summary = {
        "image_to_text_accuracy": 0.972,
        "train_seconds": 600.0,
        "peak_memory_bytes": 2**31,
        "parameters": {"backbone": 1_500_000},
        "surprise_<figure>": 0.1234,
        "git_revision": "3f9c1e2",
        "versions": {"torch": "2.11.0"},
        "quarantined": {"prose": {"not utf-8": 3}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text("name: '<script>'\n")
    return run


def sections_of(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page)


def test_full_run_has_every_section_and_figure(run: Path) -> None:
    page = write_report(run).read_text()
    assert sections_of(page) == SECTIONS
    for shown in (
        "97.2 <small>%",
        "10 <small>min",
        "2 <small>GiB",
        "1.5M",
        "Surprise &lt;figure&gt;",
        "0.1234",
        "3f9c1e2",
        "not utf-8",
    ):
        assert shown in page, shown
    assert "of unseen media are named right" in page
    assert page.count("data:audio/wav") == 3 and page.count("data:image/png") == 7  # 3 made, 1 real, 3 spectrograms
    assert "step 100<" in page and "step 1,000<" in page


def test_page_loads_nothing_from_elsewhere(run: Path) -> None:
    page = write_report(run).read_text()
    assert not re.search(r"https?://|url\(|@import|<link|<script", page)
    assert all(target.startswith(("data:", "#")) for target in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_what_the_model_and_the_user_wrote_is_escaped(run: Path) -> None:
    page = write_report(run).read_text()
    assert "&lt;/pre&gt;&lt;script&gt;alert(&#x27;made&#x27;)" in page
    assert "text &lt;b&gt;" in page and "name: &#x27;&lt;script&gt;" in page and "<title>digits &lt;1&gt;" in page


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("metrics.csv", {"Loss", "Learning rate and speed", "Other measurements"}),
        ("summary.json", {"Results", "Versions"}),
        ("config.yaml", {"Configuration"}),
        ("samples", {"What it made", "Progress over training"}),
    ],
)
def test_what_is_missing_is_left_out(run: Path, missing: str, gone: set[str]) -> None:
    (run / missing).rename(run.parent / "elsewhere")
    assert sections_of(write_report(run).read_text()) == [name for name in SECTIONS if name not in gone]


def test_empty_run_folder_gives_a_page(tmp_path: Path) -> None:
    assert sections_of(write_report(tmp_path).read_text()) == []


def test_missing_medium_is_named_and_files_elsewhere_are_not_read(run: Path) -> None:
    (run / "samples/evaluation/made.wav").unlink()
    assert "made.wav cannot be shown" in write_report(run).read_text()
    Image.new("L", (9, 9), 77).save(run.parent / "private.png")
    samples = [{"title": "t", "prompt": [], "outputs": [{"modality": "image", "file": "../../../private.png"}]}]
    (run / "samples/evaluation/samples.json").write_text(json.dumps(samples))
    page = write_report(run).read_text()
    assert "private.png cannot be shown" in page
    assert base64.b64encode((run.parent / "private.png").read_bytes()).decode() not in page


def test_broken_media_do_not_lose_the_report(run: Path) -> None:
    for name in ("made.png", "made.wav"):
        (run / "samples/evaluation" / name).write_bytes(b"cut off")
    page = write_report(run).read_text()
    assert "made.png cannot be shown" in page and "made.wav cannot be shown" in page


def test_samples_of_the_last_step_stand_in_for_a_final_evaluation(run: Path) -> None:
    (run / "samples/evaluation").rename(run.parent / "elsewhere")
    page = write_report(run).read_text()
    assert sections_of(page) == SECTIONS
    real = (run / "samples/step-00001000/real.png").read_bytes()
    assert base64.b64encode(real).decode() in page


@pytest.mark.parametrize("broken", ["{", "[1]", '{"a": '])
def test_unreadable_summary_is_a_clear_error(run: Path, broken: str) -> None:
    (run / "summary.json").write_text(broken)
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_report(run)


def test_resumed_step_keeps_its_last_value_and_empty_cells_are_no_points(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,validation/loss\n1,3.0,\n2,2.5,\n2,2.0,\n2,,1.9\n3,inf,")
    assert read_curves(tmp_path / "metrics.csv") == {"train/loss": {1: 3.0, 2: 2.0}, "validation/loss": {2: 1.9}}


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-2.0, 3.0], [1e-9, 1e9], [5.0, 5.0]])
def test_chart_draws_any_finite_curve_inside_its_frame(values: list[float]) -> None:
    figure = line_chart("t", "nats a token", {"train": np.array([[step, value] for step, value in enumerate(values)])})
    points = [tuple(map(float, point.split(","))) for line in re.findall(r'points="(.*?)"', figure) for point in line.split()]
    assert points and all(0 <= x <= 480 and 0 <= y <= 190 for x, y in points)


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (0, 2000, False), (0.8, 7, True), (1e-4, 1e4, True)])
def test_ticks_are_few_and_inside(low: float, high: float, log: bool) -> None:
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 8 and all(low <= tick <= high for tick in found)
