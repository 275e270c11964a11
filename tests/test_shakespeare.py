"""`data/shakespeare/prepare.py` keeps every character of a text, and splits it where nanoGPT does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pile_app.cli import main as pile
from pile_app.data.shards import Shards

spec = importlib.util.spec_from_file_location("prepare_shakespeare", REPOSITORY / "data" / "shakespeare" / "prepare.py")
assert spec is not None and spec.loader is not None
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


def test_every_character_is_kept_and_the_last_tenth_validates(tmp_path: Path) -> None:
    scene = "  First Citizen: \r\nWe are accounted poor citizens, \t\n\n\n\n" + "x" * 500 + "\n\n"
    text = scene * 80 + "y" * 40_000 + "é at the end "  # and a stretch without a blank line
    (tmp_path / "input.txt").write_bytes(text.encode())
    assert recipe.main(["--text", str(tmp_path / "input.txt"), "--folder", str(tmp_path / "shards")]) == 0
    parts = {}
    for split in ("train", "validation"):
        documents = list(Shards(str(tmp_path / "shards" / f"{split}-*.tar")))
        parts[split] = "".join(segment.text for document in documents for segment in document.segments)
        assert max(len(document.segments[0].text) for document in documents) <= recipe.DOCUMENT_CHARACTERS
    border = int(0.9 * len(text))
    assert parts == {"train": text[:border], "validation": text[border:]}


def test_a_text_that_is_not_there_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--text", str(tmp_path / "nothing.txt"), "--folder", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "nothing.txt" in error and "--text" in error and "PILE_SHAKESPEARE" in error


def test_the_configuration_makes_the_model_that_the_published_losses_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    """README and docs/results.md say 1.48 and 1.85 nats: when one of these numbers changes, measure that loss again."""
    for config, parameters, steps in (("shakespeare", "659,232", "900"), ("shakespeare_fast", "528,640", "92")):
        pile(["plan", "--config", config, "--hardware", "cpu"])
        told = capsys.readouterr().out
        assert f" {parameters} parameters" in told and f"in {steps} steps" in told
