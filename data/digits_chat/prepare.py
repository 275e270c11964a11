"""Makes conversations about digits, from the handwritten and spoken digits of the demo (`data/digits/prepare.py`).

    python data/digits_chat/prepare.py [--folder data/digits_chat/shards] [--seed 0]

The user shows a picture, plays a sound or asks; the assistant answers with words, a picture or a spoken word, or several of
them. A conversation has one to three such turns, and later ones may refer to earlier ones ("Another one."). Pictures and voices
of `chat-validation` appear in no training conversation. The layout is that of `pile_app/records.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pile_app.documents import AUDIO, IMAGE, Document, Segment
from pile_app.records import Turn, conversation

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the repository

from data.digits import prepare as digits
from data.recipe import finished, package_versions, recipe_command, timed, write_whole

VERSION = 1  # of this recipe: raise it when the bytes of the shards change
TRAIN_CONVERSATIONS = 12_000
VALIDATION_CONVERSATIONS = 200
FOLLOW_UP = 0.35  # chance that another question follows
AUGMENTED = 0.95

SHOWN = ("", "", "What is this?", "Which digit is it?", "What do you see?", "Read this.", "And this one?")
PLAYED = ("", "", "What do you hear?", "What did I say?", "Which digit is it?", "And this one?")
DRAW = ("Draw a {}.", "Draw me a {}, please.", "Show me a {}.", "A picture of a {}, please.", "draw {}", "{} as a picture")
SAY = ("Say {}.", "How does {} sound?", "Please say {}.", "say {}", "Read {} to me.")
AGAIN = ("Draw another one.", "Another one, please.", "One more picture.", "Draw it.", "Can you draw it?")
SAY_AGAIN = ("Say it.", "Say it again.", "How does it sound?", "Read it to me.")
NEXT = ("What comes next?", "Which digit comes after it?", "And the next one?")
SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Good morning."), "Hello! Show me a digit, or ask me to draw or say one."),
    (("What can you do?", "Help", "Who are you?"), "I read, draw and say the digits from zero to nine."),
    (("Thanks", "Thank you.", "Thank you!", "Great!"), "You are welcome."),
)


class Speaker:
    """Draw the turns of a conversation; `media` returns the next picture or clip of a digit."""

    follow_up, most_questions = FOLLOW_UP, 3

    def __init__(self, rng: np.random.Generator, media: Callable[[int, int], Segment]) -> None:
        self.rng = rng
        self.media = media

    def pick(self, texts: Sequence[str]) -> str:
        return texts[int(self.rng.integers(len(texts)))]

    def conversation(self, digit: int, key: str) -> Document:
        """Return a conversation that begins with `digit`."""
        turns: list[Turn] = []
        known = False  # which digit "it" is
        while True:
            asked, answer, digit, known = self.exchange(digit, known)
            turns += [Turn("user", tuple(asked)), Turn("assistant", tuple(answer))]
            if len(turns) == 2 * self.most_questions or self.rng.random() >= self.follow_up:
                return conversation(turns, key, {"label": digits.DIGITS[digit]})
            if not known:
                digit = int(self.rng.integers(10))

    def exchange(self, digit: int, known: bool) -> tuple[list[Segment], list[Segment], int, bool]:
        """Return (question, answer, the last digit mentioned, whether there is one)."""
        name = digits.DIGITS[digit]
        chance = self.rng.random()
        if known and chance < 0.6:
            if chance < 0.2:
                return [Segment(self.pick(AGAIN))], [Segment(f"Here is {name}."), self.media(IMAGE, digit)], digit, True
            if chance < 0.4:
                return [Segment(self.pick(SAY_AGAIN))], [Segment(f"Here is {name}."), self.media(AUDIO, digit)], digit, True
            digit = (digit + 1) % 10
            name = digits.DIGITS[digit]
            return [Segment(self.pick(NEXT))], [Segment(f"Next is {name}."), self.media(AUDIO, digit)], digit, True
        if known:
            digit = int(self.rng.integers(10))
            name = digits.DIGITS[digit]
        chance = self.rng.random()
        if chance < 0.5:
            shown = [self.media(IMAGE, digit), *self.words(SHOWN)]
            if self.rng.random() < 0.3:
                shown.reverse()
            return shown, [Segment(f"It is {name}."), self.media(AUDIO, digit)], digit, True
        if chance < 0.65:
            return (
                [self.media(AUDIO, digit), *self.words(PLAYED)],
                [Segment(f"I hear {name}."), self.media(IMAGE, digit)],
                digit,
                True,
            )
        if chance < 0.8:
            return [Segment(self.pick(DRAW).format(name))], [Segment(f"Here is {name}."), self.media(IMAGE, digit)], digit, True
        if chance < 0.95:
            return [Segment(self.pick(SAY).format(name))], [Segment(f"Here is {name}."), self.media(AUDIO, digit)], digit, True
        said, answer = SMALL_TALK[int(self.rng.integers(len(SMALL_TALK)))]
        return [Segment(self.pick(said))], [Segment(answer)], digit, known

    def words(self, texts: Sequence[str]) -> list[Segment]:
        text = self.pick(texts)
        return [Segment(text)] if text else []


def conversations(
    count: int,
    pictures: Sequence[Any],
    clips: Sequence[Any],
    seed: int,
    augmented: float,
    prefix: str,
    make_speaker: Callable[..., Speaker] = Speaker,
) -> list[Document]:
    """Return `count` conversations, with every digit, picture and clip about equally often; some media are augmented."""
    rng = np.random.default_rng([seed, 7])
    decks: dict[int, dict[int, Iterator[Any]]] = {IMAGE: digits._decks(pictures, rng), AUDIO: digits._decks(clips, rng)}

    def media(modality: int, digit: int) -> Segment:
        medium = next(decks[modality][digit])
        if rng.random() >= augmented:
            segment: Segment = medium.segment
            return segment
        if modality == AUDIO:
            return Segment.from_audio(digits.vary(medium.waveform, rng), digits.SAMPLE_RATE)
        return Segment.from_image(digits.augment(medium.pixels, rng))

    speaker = make_speaker(rng, media)
    return [speaker.conversation(number % 10, f"{prefix}-{number:06d}") for number in range(count)]


def prepare(folder: Path, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write all shards to `folder` atomically and return the content of its `dataset.json`.

    Raises:
        FileExistsError: the folder holds something else, or the data of another seed or version of this recipe.
        RuntimeError: scikit-learn or espeak-ng is missing or fails.
    """
    if (done := finished(folder, VERSION, seed)) is not None:
        report(f"{folder} is complete already (recipe {VERSION}, seed {seed}); nothing to do")
        return done
    progress = timed(report)

    pictures, held_out_pictures = digits.handwritten_digits(seed)
    clips, held_out_clips, _ = digits.spoken_digits(seed)
    progress(
        f"{len(pictures):,} pictures and {len(clips):,} clips, {len(held_out_pictures):,} and {len(held_out_clips):,} held out"
    )
    sources = {
        "chat-train": conversations(TRAIN_CONVERSATIONS, pictures, clips, seed, AUGMENTED, "train"),
        "chat-validation": conversations(VALIDATION_CONVERSATIONS, held_out_pictures, held_out_clips, seed, 0.0, "validation"),
        "labelled-train": digits.labelled_documents(pictures, clips),
        "labelled-heldout": digits.labelled_documents(held_out_pictures, held_out_clips),
    }
    summary: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        "documents": {prefix: len(documents) for prefix, documents in sources.items()},
        "packages": package_versions("scikit-learn", "espeakng-loader", "numpy", "pillow", "torch", "torchaudio", "soundfile"),
    }
    write_whole(folder, sources, summary, progress)
    progress(f"{folder} is complete")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    shown = ()
    return recipe_command(prepare, __doc__, Path(__file__).parent / "shards", shown, arguments)


if __name__ == "__main__":
    sys.exit(main())
