"""The promises of `data/digits_chat/prepare.py`: answers match the shown, spoken or requested digit."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, write_chatty_weights

from pile_app.documents import IMAGE, TEXT, Segment
from pile_app.records import ROLES

spec = importlib.util.spec_from_file_location("digits_chat", REPOSITORY / "data" / "digits_chat" / "prepare.py")
assert spec is not None and spec.loader is not None
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
NAMES = recipe.digits.DIGITS
sys.path.insert(0, str(REPOSITORY))
from data.smollm2 import chats  # noqa: E402


def test_answers_are_of_the_digit_that_was_shown_said_or_asked_for() -> None:
    shown: dict[bytes, int] = {}

    def media(modality: int, digit: int) -> Segment:
        """A file that says which digit it is."""
        data = b"%d-%d" % (len(shown), digit)
        shown[data] = digit
        return Segment(data, "png" if modality == IMAGE else "flac")

    speaker = recipe.Speaker(np.random.default_rng(0), media)
    follow_ups = kinds = 0
    for number in range(400):
        document = speaker.conversation(number % 10, f"k{number}")
        spoken_of, role = None, ""
        for segment in document.segments:
            if segment.modality == TEXT and segment.text in ROLES.values():
                role = segment.text
                continue
            if segment.modality != TEXT:
                digit = shown[segment.file]
                assert role == ROLES["user"] or digit == spoken_of
                spoken_of = digit
                kinds |= 1 << (2 * (role == ROLES["user"]) + (segment.modality == IMAGE))
            elif role == ROLES["user"]:
                known = (*recipe.SHOWN, *recipe.PLAYED, *recipe.AGAIN, *recipe.NEXT)  # "Another one, please."
                named = [name for name in NAMES if name in segment.text and segment.text not in known]
                spoken_of = NAMES.index(named[0]) if named else spoken_of
                if segment.text in recipe.NEXT:
                    spoken_of, follow_ups = (spoken_of + 1) % 10, follow_ups + 1
            elif named := re.findall("(?:is|hear) (\\w+)\\.", segment.text):
                assert NAMES[spoken_of] == named[0]
        assert document.key == f"k{number}" and document.meta["label"] in NAMES
    assert follow_ups > 10 and kinds == 0b1111


def test_general_questions_are_answered_by_the_open_weights_themselves(tmp_path: Path) -> None:
    questions = {form.format(topic.strip()) for form, topics in chats.QUESTIONS.items() for topic in topics.split(",")}
    with pytest.raises(RuntimeError, match="is missing: python"):
        chats.own_answers(tmp_path)
    answered = chats.own_answers(write_chatty_weights(tmp_path / "weights"))
    assert {question for question, _ in answered} <= questions
    assert all(answer[-1] in ".!?" and "<|over|>" not in answer for _, answer in answered)
    pairs = [(question, f"Of {question}") for question in sorted(questions)]
    media = Segment(b"0", "png")
    speaker = chats.Talker(np.random.default_rng(0), lambda *_: media, general=iter(pairs * 9))
    told = [segment for number in range(200) for segment in speaker.conversation(3, f"k{number}").segments]
    of = {
        segment.text: answer for segment, _, answer in zip(told, told[1:], told[2:], strict=False) if segment.modality == TEXT
    }
    found = [of[question].text for question in questions if question in of]
    assert len(found) > len(questions) / 2 and all(text.startswith("Of ") for text in found)
    assert sum(segment == media for segment in told) > 150, "digits are most of it"


def test_recipes_run_from_any_folder(tmp_path: Path) -> None:
    """They import `data/recipe.py` and each other."""
    command = [sys.executable, str(REPOSITORY / "data" / "digits_chat" / "prepare.py"), "--help"]
    assert "--folder" in subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
