"""A conversation with a model, and its terminal.

    conversation.ask([Segment("What is this?"), picture], sampling)  ──►  str pieces, Segment, Segment ..., Notice

The layout is that of training (`records.py`). Turns that do not fit the context are dropped from the front, whole, and a
`Notice` says so; an answer is at most as long as the rest of the context.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any

from pile_app import documents, media
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import AUDIO, MODALITIES, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate_document
from pile_app.model.segments import segment_length
from pile_app.records import MARKERS, ROLES, Turn, clean_turn, conversation_prompt

ANSWER_SHARE = 4  # a quarter of the context, at least, is kept free for the answer


@dataclass(frozen=True)
class Limits:
    """Limits of a message: bytes of a file, number of files, pixels of an image, seconds of a sound, characters of the text;
    and segments of an answer."""

    upload_bytes: int = 10 << 20
    uploads: int = 4
    image_pixels: int = 16_000_000
    audio_seconds: float = 30.0
    characters: int = 8_000
    segments: int = 6


@dataclass(frozen=True)
class Notice:
    """A message to the user that the model does not see."""

    text: str


def read_upload(name: str, data: bytes, limits: Limits | None = None) -> Segment:
    """Make a segment of an image or a sound, decoded once. Raises ValueError if it is too large, unknown, or damaged."""
    extension = PurePath(name).suffix[1:].lower()
    if limits and len(data) > limits.upload_bytes:
        raise ValueError(f"{name} has {len(data) / 1e6:.3g} MB; at most {limits.upload_bytes / 1e6:.3g} MB can be sent")
    try:
        if extension in documents.IMAGE_EXTENSIONS:
            height, width = media.image_size(data)
            if limits and height * width > limits.image_pixels:
                raise ValueError(f"{name} has {width} x {height} pixels; at most {limits.image_pixels:,} can be sent")
            media.decode_image(data, 3, 16, 16)
        elif extension in documents.AUDIO_EXTENSIONS:
            samples, rate = media.audio_size(data)
            if limits and samples / rate > limits.audio_seconds:
                raise ValueError(f"{name} has {samples / rate:.3g} s; at most {limits.audio_seconds:g} s can be sent")
            media.decode_audio(data, rate)
        else:
            known = ", ".join((*documents.IMAGE_EXTENSIONS, *documents.AUDIO_EXTENSIONS))
            raise ValueError(f"{name} is of a kind that cannot be read; its name has to end in {known}")
    except documents.BadSample as error:
        raise ValueError(f"{name} cannot be used, {error}") from error
    return Segment(data, extension)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer cannot write the markers of roles."""
    has_template = bool(getattr(tokenizer, "turns", None))
    if not has_template and any(tokenizer.decode(tokenizer.encode(marker)) != marker for marker in MARKERS):
        raise ValueError(
            "conversations need a tokenizer that writes control characters, which mark who speaks: bytes or byte-level BPE"
        )


class Conversation:
    """A model that answers within its context, limits of messages and answers, and the turns so far. Raises ValueError if the
    model's tokenizer cannot write the markers of roles."""

    def __init__(
        self, model: FusedLanguageModel, context: int, limits: Limits | None = None, turns: Sequence[Turn] = ()
    ) -> None:
        check_tokenizer(model.tokenizer)
        template = getattr(model.tokenizer, "turns", {}).get(ROLES["user"], ())
        written = [model.tokenizer.decode(ids).strip() for ids in (template[:1], template)]
        self.stop = tuple(filter(None, written))[:1]  # the first token of the user's turn ends the answer before
        self.model, self.context, self.limits, self.turns = model, context, limits or Limits(), list(turns)
        self.answers = 0  # drawn so far: each has its own seed

    def ask(self, segments: Sequence[Segment], sampling: Sampling) -> Iterator[str | Segment | Notice]:
        """Say something; yield the pieces of a text while it is written, then each segment when it is finished.

        An answer that is interrupted (the iterator is closed) is kept as far as it came. A message that is empty, too long or
        unreadable is refused by ValueError, and leaves the conversation unchanged."""
        yield from self._answer([*self.turns, self._checked(segments)], sampling)

    def retry(self, sampling: Sampling) -> Iterator[str | Segment | Notice]:
        """Replace the last answer. Raises ValueError if nothing was asked."""
        turns = self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns
        if not turns:
            raise ValueError("nothing was asked yet")
        yield from self._answer(turns, sampling)

    def _checked(self, segments: Sequence[Segment]) -> Turn:
        turn = clean_turn(Turn("user", tuple(segments)))
        if not turn.segments:
            raise ValueError("the message is empty: write something, or add a picture or a sound")
        characters = sum(len(segment.data) for segment in turn.segments if isinstance(segment.data, str))
        if characters > self.limits.characters:
            raise ValueError(f"the message has {characters:,} characters; at most {self.limits.characters:,} can be sent")
        files = [segment for segment in turn.segments if not isinstance(segment.data, str)]
        if len(files) > self.limits.uploads:
            raise ValueError(f"the message has {len(files)} files; at most {self.limits.uploads} can be sent")
        for segment in files:
            if segment.modality not in self.model.vocabulary.modalities:
                raise ValueError(f"the model has no {MODALITIES[segment.modality]} codec: it cannot read {segment.extension}")
        return turn

    def _fitting(self, turns: list[Turn]) -> tuple[Document, int]:
        """Make the prompt of as many of the last turns as fit, and count those that do not."""
        room = self.context - self.context // ANSWER_SHARE
        for first in range(len(turns)):
            if first and turns[first].role == "assistant":
                continue  # an answer without its question
            prompt = conversation_prompt(turns[first:])
            if prompt_length(self.model, prompt) <= room:
                return prompt, first
        length = prompt_length(self.model, conversation_prompt(turns[-1:]))
        raise ValueError(
            f"the message takes {length:,} tokens; the model sees {self.context:,} at a time, {room:,} of them of the question"
        )

    def _answer(self, turns: list[Turn], sampling: Sampling) -> Iterator[str | Segment | Notice]:
        prompt, dropped = self._fitting(turns)
        self.turns = turns
        if dropped:
            unseen = f"it no longer sees the first {dropped} of {len(turns)} turns."
            yield Notice(f"The model sees {self.context:,} tokens at a time: {unseen}")
        left = self.context - prompt_length(self.model, prompt)
        seconds = sampling.max_seconds
        if AUDIO in self.model.vocabulary.modalities:
            seconds = min(seconds, left / self.model.vocabulary.audio_tokens_per_second)
        sampling = replace(
            sampling, stop=(*sampling.stop, *MARKERS, *self.stop), max_text=min(sampling.max_text, left), max_seconds=seconds,
            seed=sampling.seed + self.answers,
        )  # fmt: skip
        self.answers += 1
        written: list[Segment] = []
        text = ""  # of the unfinished segment
        limit = self.limits.segments
        try:
            for event in generate_document(self.model, prompt, sampling, most_segments=limit, continue_text=False):
                if isinstance(event, str):
                    text += event
                    yield event
                else:
                    text = ""
                    written.append(event.segment)
                    yield event.segment
            if not written:
                yield Notice("The model had nothing to say.")
        finally:
            if text:
                written.append(Segment(text))
            if written:
                self.turns = [*self.turns, clean_turn(Turn("assistant", tuple(written)))]


def prompt_length(model: FusedLanguageModel, prompt: Document) -> int:
    """Count the tokens, including `<begin>`."""
    return 1 + sum(segment_length(model, segment) for segment in prompt.segments)


HELP = """\
/image FILE     send a picture with the next message (alone on a line, an empty message sends it)
/sound FILE     send a sound
/retry          another answer to the last message
/reset          start again
/settings       show the settings; /settings temperature 0.5 changes one
/quit           end (or Ctrl-D)"""
SETTINGS: dict[str, type[Any]] = {one.name: float if isinstance(one.default, float) else int for one in fields(Sampling)[:6]}


class Terminal:
    """Read lines, print answers; pictures and sounds of an answer are saved to a folder and named."""

    def __init__(self, conversation: Conversation, sampling: Sampling, folder: Path) -> None:
        self.conversation, self.sampling, self.folder = conversation, sampling, folder
        self.attached: list[Segment] = []
        self.commands = {"image": self.attach, "sound": self.attach, "retry": self.retry, "reset": self.reset}
        self.commands |= {"settings": self.settings, "help": lambda _: print(HELP)}

    def talk(self) -> None:
        interactive = sys.stdin.isatty()
        if interactive:
            print("Write something; /help lists the commands.")
        while True:
            try:
                line = input("you> " if interactive else "").strip()
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            try:
                self.take(line)
            except (ValueError, OSError) as error:
                print(f"({error})")

    def take(self, line: str) -> None:
        """Answer one line of the user."""
        name, _, argument = line.removeprefix("/").partition(" ")
        if line.startswith("/"):
            if name not in self.commands:
                raise ValueError(f"there is no /{name}; /help lists the commands")
            self.commands[name](argument.strip())
        elif line or self.attached:
            segments, self.attached = [*self.attached, *([Segment(line)] if line else [])], []
            self.show(self.conversation.ask(segments, self.sampling))

    def attach(self, path: str) -> None:
        if not path:
            raise ValueError("name a file: /image digit.png, /sound word.wav")
        self.attached.append(read_upload(Path(path).name, Path(path).expanduser().read_bytes(), self.conversation.limits))
        print("(goes with your next message; an empty line sends it alone)")

    def retry(self, _: str) -> None:
        self.show(self.conversation.retry(self.sampling))

    def reset(self, _: str) -> None:
        self.conversation.turns, self.attached = [], []
        print("(a new conversation)")

    def settings(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if argument:
            if name not in SETTINGS:
                raise ValueError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
            self.sampling = replace(self.sampling, **{name: SETTINGS[name](value)})
        print("(" + ", ".join(f"{name} {getattr(self.sampling, name):g}" for name in SETTINGS) + ")")

    def show(self, events: Iterator[str | Segment | Notice]) -> None:
        """Print an answer while it is written; Ctrl-C interrupts it."""
        try:
            for event in events:
                if isinstance(event, str):
                    print(event, end="", flush=True)
                elif isinstance(event, Notice):
                    print(f"({event.text})")
                elif isinstance(event.data, str):
                    print()
                else:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    path = self.folder / f"{len(list(self.folder.iterdir())):03d}.{event.extension}"
                    path.write_bytes(event.data)
                    print(path)
        except KeyboardInterrupt:
            events.close()  # type: ignore[attr-defined]
            print("\n(interrupted)")
