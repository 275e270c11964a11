"""The promises of `data/evaluation.py` on names in two languages: prompts, counted answers, and separate figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch import Trainer

import data.evaluation
from data.evaluation import EvaluateCrossModal, spread
from pile_app.data.datamodule import Source
from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment
from pile_app.model.backbones import Transformer
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.generate import Sampling
from pile_app.training.module import PileModule

ENGLISH = ("cat", "dog", "owl", "cow", "fox", "elephant", "crocodile")
FRENCH = ("chat", "chien", "hibou", "vache", "renard", "éléphant", "crocodile")
LABELS = ENGLISH
NAMES = {one: (f"en: {one}", f"fr: {other}") for one, other in zip(ENGLISH, FRENCH, strict=True)}


def labelled(each: int, labels: tuple[str, ...] = LABELS, sounds: bool = True) -> Iterator[Document]:
    for n, label in enumerate(labels * each):
        rng = np.random.default_rng(n)
        names = tuple(map(Segment, NAMES[label]))
        pixels = np.full((8, 8, 3), 35 * LABELS.index(label), np.uint8) + rng.integers(0, 9, (8, 8, 3), np.uint8)
        # Images have no loss, as in training; names have.
        yield Document((Segment.from_image(pixels, loss=False), *names), f"view-{n}", True, {"label": label})
        if sounds:
            tone = 0.3 * np.sin(np.arange(1500) * 0.2 * (1 + LABELS.index(label))) + 0.01 * rng.standard_normal(1500)
            yield Document((Segment.from_audio(tone, 8000), names[n % 2]), f"clip-{n}", True, {"label": names[n % 2].text})


@pytest.fixture
def evaluation(tmp_path: Path) -> EvaluateCrossModal:
    write_shards(labelled(8), tmp_path, "judge")
    write_shards(labelled(2), tmp_path, "views")
    write_shards(labelled(2, ("owl",), sounds=False), tmp_path, "unseen")
    patterns = [f"{tmp_path}/{prefix}-*.tar" for prefix in ("judge", "views", "unseen")]
    sampling = Sampling(max_seconds=0.2)
    return EvaluateCrossModal(*patterns, draws=4, reads=14, separator=":", sampling=sampling)


@pytest.fixture
def module() -> PileModule:
    image = ImageCodecConfig(size=8, channels=3, patch=4, levels=(5, 5), width=8, blocks=1)
    audio = AudioCodecConfig(sample_rate=8000, hop=80, window=160, mels=16, levels=(5, 5), width=8, blocks=1)
    return PileModule(Transformer(16, 1, 1), image=image, audio=audio).eval()


def test_every_figure_of_unseen_labels_stands_apart(
    evaluation: EvaluateCrossModal, module: PileModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.evaluation, "MANY", 2)  # seven names are many
    trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_checkpointing=False)
    evaluation.text_source = "prose"  # fault 2: sources of one's own have no prose, and the run ended without a report
    sources = {"mine": Source(train=evaluation.train)}
    trainer.datamodule = SimpleNamespace(validation_names=["mine"], sources=sources)  # type: ignore[attr-defined]
    figures = evaluation.evaluate(trainer, module)
    assert figures["image_judge_accuracy"] == figures["audio_judge_accuracy"] == figures["unseen_image_judge_accuracy"] == 1
    # An untrained model finds all letters equally likely, so the two longest of seven names are not among the five likeliest.
    assert figures["image_to_text_top5"] == figures["image_to_text_top5_fr"] == pytest.approx(5 / 7)
    assert figures["unseen_image_to_text_top5_fr"] == 1
    assert {"image_conditioning_gain", "audio_conditioning_gain", "text_conditioning_gain"} <= figures.keys()
    assert {"text_to_image_accuracy", "unseen_text_to_image_accuracy", "image_to_audio_accuracy"} <= figures.keys()
    assert not any(key.startswith("unseen_audio") for key in figures), "there are no sounds of what is unseen"
    samples = json.loads((tmp_path / "samples" / "evaluation" / "samples.json").read_text())
    read = [
        (sample["prompt"][1]["text"], sample["references"][0]["text"])
        for sample in samples
        if sample["title"] == "image → text"
    ]
    assert {language for language, _ in read} == {"en:", "fr:"}, "the prompt says the language"
    for language, answer in read:  # and only the rest of the name is the answer
        assert language + answer in {name for names in NAMES.values() for name in names}


@pytest.mark.parametrize(("length", "count"), [(10, 10), (10, 3), (3, 10), (1, 5)])
def test_examples_are_spread_evenly(length: int, count: int) -> None:
    places = spread(length, count)
    assert len(places) == count and set(places) <= set(range(length))
    assert len(set(places)) == min(length, count)
