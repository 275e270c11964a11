"""The promises of `data/digits/prepare.py`, the recipe of the demo's data.

The whole recipe runs once (about 20 seconds), unless its folder holds shards of this version and these packages.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pile_app.data.shards import Shards
from pile_app.documents import Document, Segment

RECIPE = Path(__file__).parents[1] / "data" / "digits" / "prepare.py"


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_prepare", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()  # puts the repository on the path
recipe_module, speech = importlib.import_module("data.recipe"), importlib.import_module("data.speech")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    description = RECIPE.parent / "shards" / "dataset.json"
    if description.exists():
        found = json.loads(description.read_text())
        packages = recipe.package_versions(*recipe.PACKAGES)
        if (found["version"], found["seed"], found["packages"]) == (recipe.VERSION, 0, packages):
            return description.parent
    folder = tmp_path_factory.mktemp("digits") / "shards"
    recipe.prepare(folder)
    return folder


@pytest.fixture(scope="session")
def documents(shards: Path) -> dict[str, list[Document]]:
    prefixes = json.loads((shards / "dataset.json").read_text())["documents"]
    return {prefix: list(Shards(f"{shards}/{prefix}-*.tar")) for prefix in prefixes}


def kind(segment: Segment) -> str:
    return {"txt": "name", "png": "image", "flac": "audio"}[segment.extension]


def order(document: Document) -> tuple[str, ...]:
    return tuple(kind(segment) for segment in document.segments)


def media(documents: Sequence[Document], wanted: str) -> list[bytes]:
    return [segment.file for document in documents for segment in document.segments if kind(segment) == wanted]


def prose(documents: Sequence[Document]) -> list[str]:
    return [document.segments[0].text for document in documents]


def read_clip(file: bytes) -> tuple[np.ndarray, int]:
    import soundfile

    return soundfile.read(io.BytesIO(file), dtype="float32")


# The content of the shards


def test_every_order_has_its_share_and_every_digit_too(documents: dict[str, list[Document]]) -> None:
    train = documents["digits-train"]
    assert len(train) == recipe.TRAIN_DOCUMENTS
    found = Counter(order(document) for document in train)
    assert found.keys() == recipe.SHARES.keys()
    for wanted, share in recipe.SHARES.items():
        assert abs(found[wanted] - share * len(train)) <= 1, wanted
        of_digit = Counter(document.meta["label"] for document in train if order(document) == wanted)
        assert len(of_digit) == 10 and max(of_digit.values()) - min(of_digit.values()) <= 1, wanted


def test_documents_are_ordered_and_show_the_digit_they_are_labelled_with(documents: dict[str, list[Document]]) -> None:
    label_of = {
        document.segments[0].file: document.meta["label"]
        for prefix in ("labelled-train", "labelled-heldout")
        for document in documents[prefix]
    }
    prefixes = ("digits-train", "digits-validation", "labelled-train", "labelled-heldout", "images-validation", "clips-train")
    for prefix in prefixes:
        for document in documents[prefix]:
            assert document.ordered
            for segment in document.segments:
                label = segment.text if kind(segment) == "name" else label_of.get(segment.file, document.meta["label"])
                assert label == document.meta["label"], document.key


def test_1500_images_train_and_297_are_held_out(documents: dict[str, list[Document]]) -> None:
    train, held_out = (set(media(documents[f"labelled-{split}"], "image")) for split in ("train", "heldout"))
    assert (len(train), len(held_out)) == (1500, 297)
    assert not held_out & train
    assert not held_out & set(media(documents["digits-train"], "image"))
    assert set(media(documents["digits-validation"], "image")) <= held_out


def test_images_and_clips_stand_alone_and_held_out_ones_are_held_out(documents: dict[str, list[Document]]) -> None:
    for name, wanted in (("images", "image"), ("clips", "audio")):
        labelled = {split: set(media(documents[f"labelled-{split}"], wanted)) for split in ("train", "heldout")}
        train, validation = documents[f"{name}-train"], documents[f"{name}-validation"]
        assert {order(document) for document in train + validation} == {(wanted,)}
        assert not set(media(train, wanted)) & labelled["heldout"]
        assert set(media(validation, wanted)) <= labelled["heldout"]
    assert Counter(media(documents["images-validation"], "image")) == Counter(media(documents["labelled-heldout"], "image"))


@pytest.mark.parametrize("wanted", ["image", "audio"])
def test_most_uses_of_a_medium_are_augmented_and_none_in_validation(documents: dict[str, list[Document]], wanted: str) -> None:
    plain = set(media(documents["labelled-train"], wanted))
    for prefix in ("digits-train", {"image": "images-train", "audio": "clips-train"}[wanted]):
        uses = media(documents[prefix], wanted)
        assert np.mean([use not in plain for use in uses]) == pytest.approx(recipe.AUGMENTED, abs=0.02)
    assert set(media(documents["digits-validation"], wanted)) <= set(media(documents["labelled-heldout"], wanted))


def test_held_out_voices_are_heard_in_no_training_document(documents: dict[str, list[Document]]) -> None:
    voice_of = {
        document.segments[0].file: document.meta["voice"]
        for prefix in ("labelled-train", "labelled-heldout")
        for document in documents[prefix]
        if "voice" in document.meta
    }
    trained = [*media(documents["labelled-train"], "audio"), *media(documents["digits-train"], "audio")]
    train = {voice_of[clip] for clip in trained if clip in voice_of}  # augmented clips are new files
    held_out = {voice_of[clip] for clip in media(documents["labelled-heldout"], "audio")}
    assert held_out == set(recipe.HELD_OUT_VOICES)
    assert not train & held_out and len(train) > 80
    assert {voice_of[clip] for clip in media(documents["digits-validation"], "audio")} <= held_out


def test_clips_are_balanced_and_used_equally_often(documents: dict[str, list[Document]]) -> None:
    for split, least in (("train", 3000), ("heldout", 300)):
        clips = [document for document in documents[f"labelled-{split}"] if order(document) == ("audio", "name")]
        of_digit = Counter(document.meta["label"] for document in clips)
        assert len(clips) >= least and len(of_digit) == 10 and max(of_digit.values()) - min(of_digit.values()) <= 4
    silence, pixels = np.zeros(800, np.float32), np.zeros((16, 16), np.uint8)
    given = [recipe.Clip(n % 10, "voice", "en", silence, Segment(b"clip %d" % n, "flac")) for n in range(300)]
    pictures = [recipe.Picture(n % 10, n, pixels, Segment(b"picture %d" % n, "png")) for n in range(100)]
    uses = Counter(media(recipe.digit_documents(2000, pictures, given, 0, 0.0), "audio"))
    assert uses.keys() == {clip.segment.file for clip in given}
    assert max(uses.values()) - min(uses.values()) <= 2


def test_clips_are_mono_8_khz_equally_loud_and_at_most_a_second_long(documents: dict[str, list[Document]]) -> None:
    below = 0
    clips = media(documents["labelled-train"], "audio") + media(documents["labelled-heldout"], "audio")
    for clip in clips:
        waveform, sample_rate = read_clip(clip)
        assert sample_rate == 8000 and waveform.ndim == 1
        assert 0.15 <= len(waveform) / sample_rate <= 1.0
        loudness = np.sqrt(np.mean(waveform**2))
        peak = np.abs(waveform).max()
        assert peak < 1
        if peak < 0.989:  # else the peak decides
            assert loudness == pytest.approx(speech.LEVEL, rel=0.01)
        below += loudness < 0.99 * speech.LEVEL
        # the ends are trimmed: something is heard within a margin of either
        margin = int(speech.MARGIN * sample_rate) + 2
        assert min(np.abs(waveform[:margin]).max(), np.abs(waveform[-margin:]).max()) > 0.9 * speech.SILENCE * peak
    assert below < 0.02 * len(clips)


def test_a_classifier_that_heard_the_training_voices_understands_the_held_out_ones(
    documents: dict[str, list[Document]],
) -> None:
    import torch
    import torchaudio
    from PIL import Image
    from sklearn.svm import SVC

    spectrogram = torchaudio.transforms.MelSpectrogram(8000, n_fft=256, win_length=200, hop_length=80, n_mels=40)

    def features(clips: list[Document]) -> tuple[np.ndarray, list[str]]:
        rows = []
        for document in clips:
            mel = spectrogram(torch.from_numpy(read_clip(document.segments[0].file)[0]))  # (40, frames)
            fixed = Image.fromarray(torch.log(mel + 1e-3).numpy()).resize((32, 40), Image.Resampling.BILINEAR)
            rows.append(np.asarray(fixed).ravel())
        return np.array(rows), [document.meta["label"] for document in clips]

    train, held_out = (
        features([document for document in documents[f"labelled-{split}"] if "voice" in document.meta])
        for split in ("train", "heldout")
    )
    mean, deviation = train[0].mean(0), train[0].std(0)
    every = slice(None, None, 3)  # a third is enough; clips come by digit, so not an even step
    classifier = SVC(C=10).fit(((train[0] - mean) / deviation)[every], train[1][every])
    assert classifier.score((held_out[0] - mean) / deviation, held_out[1]) >= 0.97


def test_held_out_prose_is_in_no_training_document(documents: dict[str, list[Document]]) -> None:
    train, held_out = prose(documents["prose-train"]), prose(documents["prose-validation"])
    assert len(set(train)) == len(train) > 300 and 20 < len(held_out) < len(train) / 4
    assert sum(len(text.encode()) for text in train) > 1_000_000
    assert 50_000 < sum(len(text.encode()) for text in held_out) < 250_000

    def paragraphs(texts: list[str]) -> set[str]:
        return {" ".join(one.split()) for text in texts for one in text.split("\n\n") if len(one) >= recipe.SHARED_PARAGRAPH}

    assert not paragraphs(train) & paragraphs(held_out)


def test_the_summary_counts_what_the_shards_hold(shards: Path, documents: dict[str, list[Document]]) -> None:
    summary = json.loads((shards / "dataset.json").read_text())
    assert summary["documents"] == {prefix: len(found) for prefix, found in documents.items()}
    for split, prefix in (("train", "prose-train"), ("heldout", "prose-validation")):
        labelled = documents[f"labelled-{split}"]
        assert summary["images"][split] == len(media(labelled, "image"))
        assert summary["clips"][split] == len(media(labelled, "audio"))
        assert summary["prose_bytes"][split] == sum(len(text.encode()) for text in prose(documents[prefix]))
        hours = sum(len(read_clip(clip)[0]) for clip in media(labelled, "audio")) / 8000 / 3600
        assert summary["sound_hours"][split] == pytest.approx(hours, abs=1e-4)


# How the recipe behaves


def test_a_second_call_does_nothing(shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    command = [sys.executable, str(RECIPE), "--folder", str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "complete already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has no dataset\.json"):
        recipe.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    version = recipe.VERSION
    with pytest.raises(FileExistsError, match=f"holds recipe {version}, seed 0; asked for recipe {version}, seed 7"):
        recipe.prepare(shards, seed=7)


def test_a_failure_on_the_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(documents: object, folder: Path, prefix: str) -> None:
        folder.mkdir()
        (folder / f"{prefix}-000000.tar").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(recipe, "handwritten_digits", lambda seed: ([], []))
    monkeypatch.setattr(recipe, "spoken_digits", lambda seed: ([], [], Counter()))
    monkeypatch.setattr(recipe, "prose_documents", lambda: ([], [], Counter()))
    monkeypatch.setattr(recipe, "digit_documents", lambda *arguments: [])
    monkeypatch.setattr(recipe_module, "write_shards", disk_full)
    with pytest.raises(OSError, match="disk full"):
        recipe.prepare(tmp_path / "shards")
    assert not list(tmp_path.iterdir())


def test_which_images_are_held_out_is_a_function_of_the_seed() -> None:
    once, again, other = (recipe.handwritten_digits(seed) for seed in (0, 0, 1))
    numbers = [[picture.number for picture in held_out] for _, held_out in (once, again, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert [picture.segment for picture in once[0]] == [picture.segment for picture in again[0]]


def speak() -> str:
    """A hash of what voices with breath noise say, which is where espeak-ng draws random numbers."""
    with recipe.Espeak() as espeak:
        clips = [
            espeak.say(name, "en-us", voice, 160, 50, 50) for voice in ("f2", "victor", "klatt", "m1") for name in recipe.DIGITS
        ]
    assert all(np.abs(clip).max() < 1 for clip in clips)
    return hashlib.blake2b(b"".join(clip.tobytes() for clip in clips)).hexdigest()


def test_speech_is_the_same_in_every_process_and_however_often_one_spoke() -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_digits; print(test_digits.speak())"
    fresh = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(2)]
    assert {run.stdout.strip() for run in fresh} == {speak()} == {speak()}


def test_speech_works_where_the_data_lies_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import espeakng_loader

    deep = tmp_path / ("a" * 100) / ("b" * 100)
    deep.mkdir(parents=True)
    (deep / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep / "espeak-ng-data"))
    with recipe.Espeak() as espeak:
        assert len(espeak.say("three", "en", "m1", 160, 50, 50)) > 2000


def test_an_unknown_voice_or_accent_is_an_error_and_not_the_plain_voice() -> None:
    with recipe.Espeak() as espeak:
        with pytest.raises(ValueError, match="no voice 'nobody'"):
            espeak.say("three", "en", "nobody", 160, 50, 50)
        with pytest.raises(ValueError, match="does not speak 'xx'"):
            espeak.say("three", "xx", "m1", 160, 50, 50)


def test_a_missing_or_broken_espeak_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import espeakng_loader

    fix = "uv sync --extra demo"
    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: str(tmp_path / "libespeak-ng.so"))
    with pytest.raises(RuntimeError, match=f"(?s)is there but fails.*libespeak-ng.so.*{fix}"), recipe.Espeak():
        pass
    (tmp_path / "libespeak-ng.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=f"(?s)is there but fails.*{fix}"):
        recipe.spoken_digits(0)
    monkeypatch.undo()
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match=f"(?s)is there but fails.*does not start.*{fix}"), recipe.Espeak():
        pass
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(RuntimeError, match=f"needs? espeak-ng, which is missing.*{fix}"), recipe.Espeak():
        pass


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeError, match=r"scikit-learn, which is missing.*uv sync --extra demo"):
        recipe.handwritten_digits(0)
