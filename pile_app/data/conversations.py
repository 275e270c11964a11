"""Conversations: turns of text, images and sounds as documents, with a loss on the assistant's turns only.

    <begin> <text> ᵁ <text> What is this? <image> c c c c <text> ᴬ <text> It is three. <audio> a a a <audio_end> <text> ᵁ <end>
                                                                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ learned

A turn is a marker of its role, then its segments. A marker is a text segment of one control character (`ROLES`): every
byte-level tokenizer can write it, it costs two tokens, the vocabulary and so all trained models stay as they are, and no user
can forge it, for these characters are taken out of what anybody writes, here and wherever texts are cleaned. (A header of
letters, `User:`, could be typed; with alternation alone, a piece of a long conversation leaves in doubt who speaks.)

The assistant's turn ends with the marker of the next speaker, which is learned: that is how a model knows to stop. The last
turn ends with a marker, too, so that every answer ends alike, and then `<end>`. Everything else is given: `loss: false`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pile_app.documents import BadSample, Document, Segment

if TYPE_CHECKING:
    from pile_app.data.text import Tokenizer

ROLES = {"system": "\x01", "user": "\x02", "assistant": "\x03"}
MARKERS = tuple(ROLES.values())
_REMOVED = dict.fromkeys(map(ord, MARKERS))


@dataclass(frozen=True)
class Turn:
    """What somebody says: `role` is one of `ROLES`, `segments` in order."""

    role: str
    segments: tuple[Segment, ...]


def conversation(turns: Sequence[Turn], key: str = "", meta: Mapping[str, Any] | None = None) -> Document:
    """The document of a conversation. Turns of one role in a row are one; what comes after the last answer is left out.

    Raises:
        BadSample: `unknown_role` or `no_answer`.
    """
    joined = _joined(turns)
    while joined and joined[-1].role != "assistant":
        joined.pop()
    if not joined:
        raise BadSample("no_answer", "the conversation holds no turn of the assistant")
    return Document((*_laid_out(joined), Segment(ROLES["user"])), key, meta=meta or {})


def conversation_prompt(turns: Sequence[Turn]) -> Document:
    """The beginning of such a document, up to where the assistant speaks."""
    given = _laid_out([*_joined(turns), Turn("assistant", ())])
    return Document(tuple(replace(segment, loss=False) for segment in given))


def clean_turn(turn: Turn) -> Turn:
    """Without markers in its texts, and without texts of nothing."""
    segments = (
        replace(segment, data=segment.data.translate(_REMOVED)) if isinstance(segment.data, str) else segment
        for segment in turn.segments
    )
    return Turn(turn.role, tuple(segment for segment in segments if segment.data))


def is_marker(segment: Segment) -> bool:
    return isinstance(segment.data, str) and segment.data in MARKERS


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises ValueError where the tokenizer cannot write the markers."""
    if any(tokenizer.decode(tokenizer.encode(marker)) != marker for marker in MARKERS):
        raise ValueError(
            "conversations need a tokenizer that writes control characters, for they mark who speaks: bytes or byte-level BPE"
        )


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Cleaned, none of them empty, neighbours of different roles."""
    joined: list[Turn] = []
    for turn in turns:
        if turn.role not in ROLES:
            raise BadSample("unknown_role", f"{turn.role!r} is none of {', '.join(ROLES)}")
        turn = clean_turn(turn)
        if joined and joined[-1].role == turn.role:
            joined[-1] = Turn(turn.role, joined[-1].segments + turn.segments)
        elif turn.segments:
            joined.append(turn)
    return joined


def _laid_out(turns: Sequence[Turn]) -> list[Segment]:
    segments: list[Segment] = []
    answered = False  # the marker after an answer is learned
    for turn in turns:
        segments.append(Segment(ROLES[turn.role], loss=answered))
        answered = turn.role == "assistant"
        segments.extend(replace(segment, loss=answered) for segment in turn.segments)
    return segments
