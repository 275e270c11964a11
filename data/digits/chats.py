"""Makes conversations about the demo's digits, for `conf/smollm2_digits.yaml`.

    python data/digits/chats.py [--folder data/digits/shards/chats] [--seed 0]

    chats-train        two to four questions: what a picture shows, what a voice says, draw or say a digit, and general ones
    chats-validation   the same with held-out pictures and voices

The answers to general questions are those of the open weights in `data/smollm2/model` itself, so that a model that learns
these conversations still answers in its own English. The digits' shards are made first where they are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.documents import TEXT, Document, Segment
from pile_app.model.generate import Sampling, generate
from pile_app.records import MARKERS, Turn, conversation, conversation_prompt
from pile_app.training.load import load_run

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the repository

from data.digits import prepare as digits
from data.recipe import deal, finished, recipe_command, timed, write_whole

VERSION = 1  # of this recipe: raise it when the bytes of the shards change
HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "smollm2" / "model"
DOCUMENTS = {"train": 3_000, "validation": 60}
ANSWERS = 3  # to each general question
# kind of question -> its share, and questions with their answers; "{}" is the digit, with an article where it follows "a"
SHARES = {"image": 0.4, "audio": 0.15, "draw": 0.1, "say": 0.1, "talk": 0.25}
ASKED = {
    "image": (
        ("What is this?", "This is a {}."), ("Which digit do you see?", "I see a {}."), ("What number is it?", "It is a {}."),
        ("What is in the picture?", "The picture shows a {}."), ("Which digit is in this picture?", "It is the digit {}."),
        ("Can you read this digit?", "Yes, this is a {}."), ("And this one?", "That is a {}."), ("", "This is a {}."),
    ),
    "audio": (
        ("What do you hear?", "I hear the word {}."), ("Which digit is spoken?", "It is the digit {}."),
        ("What does the voice say?", "The voice says {}."), ("", "I hear the word {}."),
    ),
    "draw": (("Draw a {}.", ""), ("Please draw the digit {}.", ""), ("Show me a {}.", "")),
    "say": (("Say {}.", ""), ("Please say the digit {}.", ""), ("How does {} sound?", "")),
}  # fmt: skip
TOPICS = {
    "What is {}?": "gravity, bread, a river, democracy, jazz, photosynthesis, chess, a bicycle, sleep, tea, love",
    "Who was {}?": "Isaac Newton, Cleopatra, Mozart, Marie Curie, Shakespeare, Napoleon, Frida Kahlo, Charles Darwin",
    "Tell me about {}.": "Paris, whales, the Romans, coffee, the weather, football, dinosaurs, your day, yourself, cats, snow",
    "Why {}?": "is the sky blue, do people dream, do birds sing, do we laugh, are plants green, is music important, do we age",
    "How do I {}?": "cook rice, learn a language, make friends, stay healthy, write a letter, save energy, plant a tree, relax",
    "Do you like {}?": "music, books, the sea, winter, games, animals, cooking, long walks, mathematics, travelling",
    "Where is {}?": "Japan, the Amazon, Mount Everest, Cairo, the Sahara, Iceland, the heart, Brazil",
    "{}": "Hello!, Good evening., How are you?, Thank you., Goodbye!, Can you help me?, I am tired., Tell me a joke.",
}  # fmt: skip


def prepare(folder: Path, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the shards to `folder` atomically and return the content of its `dataset.json`. A complete folder is not changed.

    Raises:
        FileExistsError: the folder holds something else, or the data of another seed or version of this recipe.
        RuntimeError: the open weights are missing.
    """
    if (done := finished(folder, VERSION, seed, report)) is not None:
        return done
    digits.prepare(HERE / "shards", seed, report)
    progress = timed(report)
    talk = own_answers(WEIGHTS)
    progress(f"{len(talk)} general questions answered")
    pictures, clips = digits.handwritten_digits(seed), digits.spoken_digits(seed)[:2]
    sources = {
        f"chats-{split}": chats(DOCUMENTS[split], pictures[n], clips[n], talk, seed + n, digits.AUGMENTED * (split == "train"))
        for n, split in enumerate(DOCUMENTS)
    }
    summary = {"version": VERSION, "seed": seed, "documents": {name: len(found) for name, found in sources.items()}}
    write_whole(folder, sources, summary, progress)
    return summary


def own_answers(weights: Path) -> list[tuple[str, str]]:
    """General questions, and what open weights answer, up to the end of a sentence."""
    if not (weights / "config.json").is_file():
        raise RuntimeError(f"{weights} is missing: python data/smollm2/prepare.py")
    questions = [form.format(topic.strip()) for form, topics in TOPICS.items() for topic in topics.split(",")] * ANSWERS
    model = load_run(weights)[0].model
    turn = model.tokenizer.decode(model.tokenizer.encode(MARKERS[1])[:1])  # the first token of the next turn
    prompts = [conversation_prompt([Turn("user", (Segment(question),))]) for question in questions]
    sampling = Sampling(temperature=0.8, top_p=0.9, max_text=60, stop=(*MARKERS, turn))
    written = (answer.text for answer in generate(model, prompts, TEXT, sampling))
    cut = (text[: 1 + max(text.rfind(mark) for mark in ".!?")].strip() for text in written)
    return [(question, answer) for question, answer in zip(questions, cut, strict=True) if answer]


def chats(
    count: int,
    pictures: Sequence[digits.Picture],
    clips: Sequence[digits.Clip],
    talk: Sequence[tuple[str, str]],
    seed: int,
    augmented: float,
) -> list[Document]:
    """Conversations of two to four questions; the fraction `augmented` of the media is augmented."""
    rng = np.random.default_rng([seed, 5])
    decks: dict[str, Iterator[Any]] = {"image": deal(pictures, rng), "audio": deal(clips, rng), "talk": deal(talk, rng)}
    kinds, shares = list(SHARES), list(SHARES.values())

    def exchange(kind: str) -> tuple[Turn, Turn]:
        if kind == "talk":
            question, answer = next(decks[kind])
            return Turn("user", (Segment(question),)), Turn("assistant", (Segment(answer),))
        medium = next(decks["image" if kind in ("image", "draw") else "audio"])
        shown: Segment = medium.segment
        if rng.random() < augmented and isinstance(medium, digits.Picture):
            shown = Segment.from_image(digits.augment(medium.pixels, rng))
        elif rng.random() < augmented and isinstance(medium, digits.Clip):
            shown = Segment.from_audio(digits.vary(medium.waveform, rng), digits.SAMPLE_RATE)
        forms = ASKED[kind]
        question, answer = (said(form, digits.DIGITS[medium.digit]) for form in forms[rng.integers(len(forms))])
        text = (Segment(question),) if question else ()
        if kind in ("draw", "say"):
            return Turn("user", text), Turn("assistant", (shown,))
        given = (*text, shown) if rng.random() < 0.5 else (shown, *text)
        return Turn("user", given), Turn("assistant", (Segment(answer),))

    documents = []
    for number in range(count):
        turns = [turn for _ in range(rng.integers(2, 5)) for turn in exchange(str(rng.choice(kinds, p=shares)))]
        documents.append(conversation(turns, key=f"chats-{number:05d}"))
    return documents


def said(form: str, digit: str) -> str:
    """The sentence about a digit: a three, an eight."""
    return form.replace("a {}", "an {}" if digit == "eight" else "a {}").format(digit)


if __name__ == "__main__":
    sys.exit(recipe_command(prepare, __doc__, HERE / "shards" / "chats", ("documents",)))
