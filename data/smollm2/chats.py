"""Makes conversations for `conf/smollm2_digits.yaml`: about digits, and general ones in which the model keeps its own answers.

    python data/smollm2/chats.py [--folder data/smollm2/shards] [--seed 0]

    chat-train        conversations of `data/digits_chat/prepare.py`, in which 30 % of the questions are general
    chat-validation   the same with held-out pictures and voices, and as many conversations as there

General questions are answered by the open weights in `data/smollm2/model` themselves, before they learn anything, so that a
model that learns these conversations keeps writing its own English. The demo's digits are made first where they are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.documents import TEXT, Segment
from pile_app.model.generate import Sampling, generate
from pile_app.records import MARKERS, Turn, conversation_prompt
from pile_app.tasks.chat import Conversation
from pile_app.training.load import load_run

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the repository

from data.digits import prepare as digits
from data.digits_chat import prepare as digits_chat
from data.recipe import deal, finished, recipe_command, timed, write_whole

VERSION = 2  # of this recipe: raise it when the bytes of the shards change
HERE = Path(__file__).parent
CONVERSATIONS, VALIDATION_CONVERSATIONS = 4_000, 100
GENERAL = 0.3  # of the questions
ANSWERS = 3  # to each general question
QUESTIONS = {
    "What is {}?": "gravity, bread, a river, democracy, jazz, photosynthesis, chess, a bicycle, sleep, tea, love",
    "Who was {}?": "Isaac Newton, Cleopatra, Mozart, Marie Curie, Shakespeare, Napoleon, Frida Kahlo, Charles Darwin",
    "Tell me about {}.": "Paris, whales, the Romans, coffee, the weather, football, dinosaurs, your day, yourself, cats, snow",
    "Why {}?": "is the sky blue, do people dream, do birds sing, do we laugh, are plants green, is music important, do we age",
    "How do I {}?": "cook rice, learn a language, make friends, stay healthy, write a letter, save energy, plant a tree, relax",
    "Do you like {}?": "music, books, the sea, winter, games, animals, cooking, long walks, mathematics, travelling",
    "Where is {}?": "Japan, the Amazon, Mount Everest, Cairo, the Sahara, Iceland, the heart, Brazil",
    "{}": "Hello!, Good evening., How are you?, Thank you., Goodbye!, Can you help me?, I am tired., Tell me a joke.",
}


class Talker(digits_chat.Speaker):
    """A speaker who also deals out general questions with their answers, in conversations that fill a context of 512 tokens."""

    follow_up, most_questions = 0.8, 6

    def __init__(self, *arguments: Any, general: Iterator[tuple[str, str]]) -> None:
        super().__init__(*arguments)
        self.general = general

    def exchange(self, digit: int, known: bool) -> tuple[list[Segment], list[Segment], int, bool]:
        if self.rng.random() >= GENERAL:
            return super().exchange(digit, known)
        question, answer = next(self.general)
        return [Segment(question)], [Segment(answer)], digit, known


def own_answers(weights: Path) -> list[tuple[str, str]]:
    """General questions, and what open weights answer, up to the end of a sentence. Raises RuntimeError: no weights."""
    if not (weights / "config.json").is_file():
        raise RuntimeError(f"{weights} is missing: python data/smollm2/prepare.py")
    questions = [form.format(topic.strip()) for form, topics in QUESTIONS.items() for topic in topics.split(",")] * ANSWERS
    model = load_run(weights)[0].model
    prompts = [conversation_prompt([Turn("user", (Segment(question),))]) for question in questions]
    sampling = Sampling(temperature=0.8, top_p=0.9, max_text=60, stop=(*MARKERS, *Conversation(model, 512).stop))
    written = (answer.text for answer in generate(model, prompts, TEXT, sampling))
    cut = (text[: 1 + max(text.rfind(mark) for mark in ".!?")].strip() for text in written)
    return [(question, answer) for question, answer in zip(questions, cut, strict=True) if answer]


def prepare(folder: Path, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the shards to `folder` atomically and return the content of its `dataset.json`. A complete folder is not changed.

    Raises:
        FileExistsError: a folder holds something else, or the data of another seed or version of a recipe.
        RuntimeError: the open weights, scikit-learn or espeak-ng are missing.
    """
    if (done := finished(folder, VERSION, seed, report)) is not None:
        return done
    digits.prepare(HERE.parent / "digits" / "shards", seed, report)
    progress = timed(report)
    answered = own_answers(HERE / "model")
    progress(f"{len(answered)} answers to general questions")
    pictures, clips = digits.handwritten_digits(seed), digits.spoken_digits(seed)[:2]
    speaker = partial(Talker, general=deal(answered, np.random.default_rng([seed, 8])))
    make: Sequence[tuple[str, int, float]] = (
        ("train", CONVERSATIONS, digits_chat.AUGMENTED), ("validation", VALIDATION_CONVERSATIONS, 0.0),
    )  # fmt: skip
    sources = {
        f"chat-{split}": digits_chat.conversations(count, pictures[n], clips[n], seed, augmented, split, speaker)
        for n, (split, count, augmented) in enumerate(make)
    }
    summary = {"version": VERSION, "seed": seed, "documents": {name: len(found) for name, found in sources.items()}}
    write_whole(folder, sources, summary, progress)
    return summary


if __name__ == "__main__":
    sys.exit(recipe_command(prepare, __doc__, HERE / "shards", ("documents",)))
