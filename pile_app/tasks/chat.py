"""A conversation with a model: what is said, what still fits its context, what comes back. Without a user interface: see
`commands/chat.py` for the terminal and `chat_page.py` for the browser.

    conversation.ask([Segment("What is this?"), picture], sampling)  ──►  str pieces, Segment, Segment ..., Notice

The layout is that of training (`records.py`). What does not fit the context is dropped from the front, by whole
turns, and a `Notice` says so; what the assistant says can be no longer than what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from pile_app import documents, media
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import AUDIO, IMAGE, MODALITIES, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate_document
from pile_app.model.segments import segment_length
from pile_app.records import MARKERS, Turn, clean_turn, conversation_prompt

ANSWER_SHARE = 4  # a quarter of the context, at least, is kept free for the answer


@dataclass(frozen=True)
class Limits:
    """Of what a user may send at a time, and what may come back.

    Args:
        upload_bytes: of a file.
        uploads: files of a message.
        image_pixels: of an image.
        audio_seconds: of a sound.
        characters: of the text of a message.
        segments: of an answer.
    """

    upload_bytes: int = 10 << 20
    uploads: int = 4
    image_pixels: int = 16_000_000
    audio_seconds: float = 30.0
    characters: int = 8_000
    segments: int = 6


@dataclass(frozen=True)
class Notice:
    """Something that the user should know and the model does not."""

    text: str


def read_upload(name: str, data: bytes, limits: Limits) -> Segment:
    """An image or a sound that somebody sent, decoded once to be sure that it can be.

    Raises:
        ValueError: it is too large or too long, of no kind that is read, or damaged.
    """
    extension = PurePath(name).suffix[1:].lower()
    if len(data) > limits.upload_bytes:
        raise ValueError(f"{name} has {len(data) / 1e6:.1f} MB; at most {limits.upload_bytes / 1e6:.1f} MB can be sent")
    try:
        if extension in documents.IMAGE_EXTENSIONS:
            height, width = media.image_size(data)
            if height * width > limits.image_pixels:
                raise ValueError(
                    f"{name} has {width} x {height} pixels; at most {limits.image_pixels / 1e6:.0f} million can be sent"
                )
            media.decode_image(data, 3, 16, 16)
        elif extension in documents.AUDIO_EXTENSIONS:
            samples, rate = media.audio_size(data)
            if samples / rate > limits.audio_seconds:
                raise ValueError(f"{name} has {samples / rate:.1f} s; at most {limits.audio_seconds:.0f} s can be sent")
            media.decode_audio(data, rate)
        else:
            known = ", ".join((*documents.IMAGE_EXTENSIONS, *documents.AUDIO_EXTENSIONS))
            raise ValueError(f"{name} is of no kind that is read: {known}")
    except documents.BadSample as error:
        raise ValueError(f"{name} cannot be used, {error}") from error
    return Segment(data, extension)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer cannot write the markers of roles."""
    if any(tokenizer.decode(tokenizer.encode(marker)) != marker for marker in MARKERS):
        raise ValueError(
            "conversations need a tokenizer that writes control characters, for they mark who speaks: bytes or byte-level BPE"
        )


class Conversation:
    """Turns so far, and the model that answers.

    Args:
        model: trained on conversations.
        context: tokens that it was trained to see at a time.
        limits: of messages and answers.

    Raises:
        ValueError: the model's tokenizer cannot write the markers of roles.
    """

    def __init__(self, model: FusedLanguageModel, context: int, limits: Limits | None = None) -> None:
        check_tokenizer(model.tokenizer)
        self.model = model
        self.context = context
        self.limits = limits or Limits()
        self.turns: list[Turn] = []
        self.answers = 0  # drawn so far: each with a seed of its own

    def ask(self, segments: Sequence[Segment], sampling: Sampling) -> Iterator[str | Segment | Notice]:
        """Says something, and yields the answer: pieces of a text while it is written, then each segment when it is finished.

        An answer that is broken off (the iterator is closed) is kept as far as it came. A message that is refused leaves the
        conversation as it was.

        Raises:
            ValueError: the message is empty, too long, or of a modality that the model cannot read.
        """
        turn = self._checked(segments)
        before, self.turns = self.turns, [*self.turns, turn]
        try:
            prompt, notice = self._fitting()
        except ValueError:
            self.turns = before
            raise
        if notice:
            yield notice
        yield from self._answer(prompt, sampling)

    def retry(self, sampling: Sampling) -> Iterator[str | Segment | Notice]:
        """Another answer in place of the last. Raises ValueError where nothing was asked."""
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        if not self.turns:
            raise ValueError("nothing was asked yet")
        prompt, notice = self._fitting()
        if notice:
            yield notice
        yield from self._answer(prompt, sampling)

    def _checked(self, segments: Sequence[Segment]) -> Turn:
        turn = clean_turn(Turn("user", tuple(segments)))
        if not turn.segments:
            raise ValueError("the message is empty: write something, or add a picture or a sound")
        characters = sum(len(segment.data) for segment in turn.segments if isinstance(segment.data, str))
        if characters > self.limits.characters:
            raise ValueError(f"the message has {characters:,} characters; at most {self.limits.characters:,} can be sent")
        media = [segment for segment in turn.segments if not isinstance(segment.data, str)]
        if len(media) > self.limits.uploads:
            raise ValueError(f"the message has {len(media)} files; at most {self.limits.uploads} can be sent")
        for segment in media:
            if segment.modality not in self.model.vocabulary.modalities:
                raise ValueError(f"the model has no {MODALITIES[segment.modality]} codec: it cannot read {segment.extension}")
        return turn

    def _fitting(self) -> tuple[Document, Notice | None]:
        """The prompt, as many of the last turns as fit; and what to say of those that do not."""
        room = self.context - self.context // ANSWER_SHARE
        for first in range(len(self.turns)):
            if first and self.turns[first].role == "assistant":
                continue  # an answer without its question
            prompt = conversation_prompt(self.turns[first:])
            if prompt_length(self.model, prompt) <= room:
                text = (
                    f"The model sees {self.context:,} tokens at a time: it no longer sees the first {first} of "
                    f"{len(self.turns)} turns."
                )
                return prompt, Notice(text) if first else None
        length = prompt_length(self.model, conversation_prompt(self.turns[-1:]))
        raise ValueError(
            f"the message takes {length:,} tokens; the model sees {self.context:,} at a time, {room:,} of them of what is asked"
        )

    def _answer(self, prompt: Document, sampling: Sampling) -> Iterator[str | Segment | Notice]:
        left = self.context - prompt_length(self.model, prompt)
        sampling = replace(
            sampling, stop=(*sampling.stop, *MARKERS), max_text=min(sampling.max_text, left), seed=sampling.seed + self.answers
        )
        if AUDIO in self.model.vocabulary.modalities:
            seconds = left / self.model.vocabulary.audio_tokens_per_second
            sampling = replace(sampling, max_seconds=min(sampling.max_seconds, seconds))
        self.answers += 1
        written: list[Segment] = []
        text = ""  # of the segment under way
        try:
            for event in generate_document(
                self.model, prompt, sampling, most_segments=self.limits.segments, continue_text=False
            ):
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
    """Tokens, `<begin>` included."""
    return 1 + sum(segment_length(model, segment) for segment in prompt.segments)


def shown_image(segment: Segment, pixels: int = 224) -> bytes:
    """A PNG of an image as large as people like to see it: small ones are enlarged, pixel by pixel."""
    import io

    from PIL import Image

    assert segment.modality == IMAGE
    image = media.load_image(segment.file, pixels).convert("RGB")
    scale = pixels // max(image.size)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
