"""`data/tuxpaint/prepare.py` keeps concepts apart, and makes documents of a picture, a caption and a sound."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from pile_app.data.shards import Shards
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.media import image_size

spec = importlib.util.spec_from_file_location("prepare_tuxpaint", REPOSITORY / "data" / "tuxpaint" / "prepare.py")
assert spec is not None and spec.loader is not None
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Sixty pictures of noise; a frog twice under other articles, and a picture that is another one's mirror image."""
    (tmp_path / "things").mkdir()
    lines = []
    for n in range(60):
        pixels = np.random.default_rng(n).integers(0, 256, (24, 16, 4), np.uint8)
        pixels[..., 3] = 255
        if n == 59:
            pixels = np.random.default_rng(58).integers(0, 256, (24, 16, 4), np.uint8)[:, ::-1]
            pixels[..., 3] = 255
        Image.fromarray(pixels).save(tmp_path / "things" / f"{n}.png")
        caption = {0: "A frog.", 1: "The FROG!"}.get(n, f"A thing {n}.")
        stamp = {"image": f"things/{n}.png", "caption": caption, "caption_fr": f"Un machin {n}.", "category": "things"}
        if n % 2:
            stamp["speech_fr"] = f"things/{n}.wav"
            tone = Segment.from_audio(np.sin(np.arange(12_000) * 0.1 * (1 + n)), 16_000, "wav")
            (tmp_path / "things" / f"{n}.wav").write_bytes(tone.file)
        lines.append(json.dumps(stamp))
    (tmp_path / "index.jsonl").write_text("\n".join(lines))
    return tmp_path


def read(folder: Path, split: str) -> list[Document]:
    return list(Shards(f"{folder}/{split}-*.tar"))


def test_concepts_stay_together_and_every_stamp_is_in_one_split(stamps: Path, tmp_path: Path) -> None:
    of_concept = recipe.concepts(recipe.read_stamps(stamps))
    assert of_concept[0] == of_concept[1] and of_concept[58] == of_concept[59] and len(set(of_concept)) == 58
    splits = recipe.split([n // 2 for n in range(1000)], 0)
    assert splits[::2] == splits[1::2]
    assert [splits.count(split) for split in ("test", "validation", "train")] == [200, 100, 700]

    assert recipe.main(["--stamps", str(stamps), "--folder", str(tmp_path / "shards")]) == 0
    train, test = read(tmp_path / "shards", "train"), read(tmp_path / "shards", "test")
    names = [{document.key.rpartition("-")[0] or document.key for document in some} for some in (train, test)]
    assert not names[0] & names[1] and len(train) == recipe.VARIANTS * len(names[0])
    first = train[0]
    assert [segment.modality for segment in first.segments][:2] == [IMAGE, TEXT] and not first.ordered
    assert image_size(first.segments[0].file) == (32, 32) and image_size(test[0].segments[0].file) == (24, 24)
    assert {segment.modality for document in test for segment in document.segments} == {TEXT, IMAGE, AUDIO}
    assert all(document.meta["concept"] == document.segments[1].text for document in test)
    texts = {document.segments[1].text for document in train if document.meta["concept"] == first.meta["concept"]}
    assert len(texts) == 3 and any(text.startswith("Un machin") for text in texts)


def test_stamps_that_are_not_there_are_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--stamps", str(tmp_path / "nothing"), "--folder", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "nothing/index.jsonl" in error and "--stamps" in error and "PILE_TUXPAINT" in error
