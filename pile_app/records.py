"""Read chats and interleaved documents of published data sets: `record -> list of segments`.

* chats: OpenAI `{"messages": [{"role": "user", "content": "..." or [parts]}]}`, ShareGPT `{"conversations": [{"from": "human",
  "value": "..."}]}`, LLaVA (the same with `<image>` in a text and `"image": "file.jpg"`), The Cauldron (`texts` of `user` and
  `assistant`), Alpaca (`instruction`, `input`, `output`), and lists of strings in which user and assistant take turns;
* OBELICS (`texts` and `images`, two aligned lists) and MMC4 (`text_list` and `image_info`).

A turn is the marker of its role, then its segments. Only the assistant's turns are learned, with the marker that ends them:

    <begin> <text> ᵁ <text> What is this? <image> c c c c <text> ᴬ <text> It is three. <text> ᵁ <end>
                                                                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^ learned

A marker is a text segment of one control character, which every byte-level tokenizer can write. Users cannot forge a role:
`strip_markers` removes these characters from all other texts.
"""

from __future__ import annotations

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from pile_app.documents import BadSample, Document, Segment

Medium = Callable[[Any], Segment]  # bytes, {"bytes", "path"} or the name of a file -> segment; raises BadSample
Message = Mapping[str, Any]

ROLES = {"system": "\x01", "user": "\x02", "assistant": "\x03"}
MARKERS = tuple(ROLES.values())
SPEAKERS = {"system": "system", "developer": "system"}
SPEAKERS |= dict.fromkeys(("user", "human", "prompter"), "user")
SPEAKERS |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")
TOOL_CALLS = ("function_call", "tool_call")  # roles of messages that no reader of the conversation sees
TOOL_RESULTS = ("tool", "function", "ipython", "observation", "function_response", "tool_response")  # context, as the user's

MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "exchange", "chosen")
QUESTION, CONTEXT, ANSWER = ("instruction", "prompt"), ("input", "context"), ("output", "completion", "response")
SYSTEM = ("system", "system_prompt")
MEDIA = {"image": ("image", "images"), "audio": ("audio", "audios", "sound")}
CHAT_FIELDS = {*MESSAGES, *QUESTION, *CONTEXT, *ANSWER, *SYSTEM, *MEDIA["image"], *MEDIA["audio"], "texts", "history"}
INTERLEAVED_FIELDS = {"texts", "images", "text_list", "image_info"}


@dataclass(frozen=True)
class Turn:
    """A message: `role` is a key of `ROLES`; `loss` is False for an answer that is context only (OpenAI's `"weight": 0`)."""

    role: str
    segments: tuple[Segment, ...]
    loss: bool = True


# -- conversations


def strip_markers(text: str) -> str:
    return text.translate(dict.fromkeys(map(ord, MARKERS)))


def is_marker(segment: Segment) -> bool:
    return isinstance(segment.data, str) and segment.data in MARKERS


def clean_turn(turn: Turn) -> Turn:
    """Remove markers from the texts of a turn, then empty segments."""
    cleaned = (replace(s, data=strip_markers(s.data)) if isinstance(s.data, str) else s for s in turn.segments)
    return replace(turn, segments=tuple(segment for segment in cleaned if segment.data))


def conversation(
    turns: Sequence[Turn], key: str = "", meta: Mapping[str, Any] | None = None, dropped: Counter[str] | None = None
) -> Document:
    """Join turns to a document that ends with the last learned answer; later turns are counted in `dropped`.

    Raises:
        BadSample: `unknown_role` or `no_answer`.
    """
    joined = _join(turns)
    while joined and not any(segment.loss for segment in joined[-1].segments):
        joined.pop()
        if dropped is not None:
            dropped["unanswered_turn"] += 1
    if not joined:
        raise BadSample("no_answer", "no turn of the assistant is learned")
    return Document((*_lay_out(joined), Segment(ROLES["user"], loss=joined[-1].segments[-1].loss)), key, meta=meta or {})


def conversation_prompt(turns: Sequence[Turn]) -> Document:
    """Lay out the beginning of a conversation, up to the answer that the assistant is to give."""
    segments = _lay_out([*_join(turns), Turn("assistant", ())])
    return Document(tuple(replace(segment, loss=False) for segment in segments))


def _join(turns: Sequence[Turn]) -> list[Turn]:
    """Clean the turns, drop empty ones, join neighbours of one role, and set which segments are learned."""
    joined: list[Turn] = []
    for turn in map(clean_turn, turns):
        if turn.role not in ROLES:
            raise BadSample("unknown_role", f"{turn.role!r} is none of {', '.join(ROLES)}")
        segments = tuple(replace(segment, loss=turn.role == "assistant" and turn.loss) for segment in turn.segments)
        if joined and joined[-1].role == turn.role:
            joined[-1] = Turn(turn.role, joined[-1].segments + segments)
        elif segments:
            joined.append(Turn(turn.role, segments))
    return joined


def _lay_out(turns: Sequence[Turn]) -> list[Segment]:
    segments: list[Segment] = []
    for turn in turns:  # the marker after an answer is learned with it
        segments += [Segment(ROLES[turn.role], loss=bool(segments) and segments[-1].loss), *turn.segments]
    return segments


# -- chats


def chat_layout(record: Any) -> str | None:
    """Name the chat layout of a record, None where it is no chat."""
    return _messages(record)[0]


def chat(record: Any, medium: Medium, dropped: Counter[str]) -> list[Segment]:
    """Read a chat: a record, or the list of its messages. `dropped` counts by name what is not kept as it was written.

    Raises:
        BadSample: the record is no chat, or has parts that cannot be read.
    """
    layout, messages = _messages(record)
    record = record if isinstance(record, Mapping) else {}
    if layout is None:
        raise BadSample(
            "no_conversation", f"fields {sorted(record)[:8]}, but no messages, conversations or instruction + output"
        )
    reader = _ChatReader(medium, dropped)
    for kind, names in MEDIA.items():
        values = (value for name in names for value in _listed(record.get(name)))
        reader.queues[kind] = [reader.medium(value) for value in values]
    system = [{"role": "system", "content": text} for name in SYSTEM if isinstance(text := record.get(name), str)]
    turns = [turn for message in [*system, *messages] for turn in reader.turns(message)]
    if left := [segment for queue in reader.queues.values() for segment in queue]:  # as TRL does
        dropped["place_of_medium"] += len(left)
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise BadSample("unplaced_medium", f"{len(left)} media, but neither <image> or <audio> in a text nor a user's turn")
        turns[first] = replace(turns[first], segments=(*left, *turns[first].segments))
    return list(conversation(turns, dropped=dropped).segments)


def _messages(record: Any) -> tuple[str | None, list[Message]]:
    """(layout, messages in OpenAI's or ShareGPT's form)"""
    record = {"messages": record} if isinstance(record, list) else record if isinstance(record, Mapping) else {}
    for name in MESSAGES:
        messages = record.get(name)
        if isinstance(messages, list) and messages and all(isinstance(one, str) for one in messages):
            return "dialogue", [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(messages)]
        if isinstance(messages, list) and all(isinstance(one, Mapping) for one in messages):
            for layout, keys in (("OpenAI messages", {"role", "content"}), ("ShareGPT", {"from", "value"})):
                if any(keys <= one.keys() for one in messages):
                    return layout, messages
    texts = record.get("texts")
    if (
        isinstance(texts, list)
        and texts
        and all(isinstance(one, Mapping) and {"user", "assistant"} <= one.keys() for one in texts)
    ):
        return "The Cauldron", [{"role": role, "content": one[role]} for one in texts for role in ("user", "assistant")]
    question, context, answer = (_first_text(record, names) for names in (QUESTION, CONTEXT, ANSWER))
    if question is None or answer is None:
        return None, []
    history = (pair if isinstance(pair, list) and len(pair) == 2 else [{}, {}] for pair in _listed(record.get("history")))
    pairs = [*history, ["\n\n".join(text for text in (question, context) if text and text.strip()), answer]]
    return "Alpaca", [
        {"role": r, "content": text} for pair in pairs for r, text in zip(("user", "assistant"), pair, strict=True)
    ]


class _ChatReader:
    """Reads messages; `queues` are the media of the record that its texts refer to by `<image>` and `<audio>`, in order."""

    def __init__(self, medium: Medium, dropped: Counter[str]) -> None:
        self._medium, self._dropped = medium, dropped
        self.queues: dict[str, list[Segment]] = {}

    def turns(self, message: Message) -> Iterator[Turn]:
        role = message.get("role") or message.get("from")
        content = message.get("content", message.get("value"))
        if calls := bool(message.get("tool_calls") or message.get("function_call") or role in TOOL_CALLS):
            self._dropped["tool_call"] += 1
        if role in TOOL_CALLS:
            return
        if role in TOOL_RESULTS:
            self._dropped["role_of_tool"] += 1
        elif role not in SPEAKERS:
            raise BadSample("unknown_role", f"{role!r} is none of {', '.join((*SPEAKERS, *TOOL_RESULTS))}")
        segments = [segment for part in [*_listed(content), *_listed(message.get("refusal"))] for segment in self.part(part)]
        if isinstance(sound := message.get("audio"), Mapping) and sound.get("data"):  # the assistant spoke
            segments.append(self.medium(sound))
        if segments:
            yield Turn(
                SPEAKERS.get(role, "user"), tuple(segments), all(message.get(n) != 0 for n in ("weight", "train", "loss"))
            )
        elif not calls:
            self._dropped["empty_message"] += 1

    def part(self, part: Any) -> Iterator[Segment]:
        """Read a part of a message: a text, or an object with a `type` (OpenAI, Anthropic, transformers)."""
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            yield from self.text(part)
        elif kind in ("text", "input_text", "output_text", "refusal"):
            yield from self.text(part.get("refusal" if kind == "refusal" else "text") or "")
        elif kind in ("tool_use", "thinking", "redacted_thinking"):
            self._dropped["tool_call" if kind == "tool_use" else kind] += 1
        elif kind == "tool_result":
            for one in _listed(part.get("content")):
                yield from self.part(one)
        elif kind in ("image_url", "input_image", "image", "audio_url", "input_audio", "audio"):
            names = (kind, "image_url", "source", "url", "path", "data")
            value = next((part[name] for name in names if part.get(name) is not None), None)
            queue = self.queues["audio" if "audio" in kind else "image"]
            yield queue.pop(0) if value is None and queue else self.medium(value)
        else:
            raise BadSample("unknown_content", f"a part of a message is {part!r:.80}, not text, image or audio")

    def text(self, text: str) -> Iterator[Segment]:
        """Split a text at `<image>` and `<audio>`, where the record has media."""
        for number, part in enumerate(re.split("<(image|audio)>", text) if any(self.queues.values()) else [text]):
            if number % 2:
                if not self.queues[part]:
                    raise BadSample("missing_file", f"more <{part}> in the texts than files of the record")
                yield self.queues[part].pop(0)
            elif part.strip():
                yield Segment(part.strip())

    def medium(self, value: Any) -> Segment:
        """Read a data URI, base64 of `{"data": ...}`, or what `medium` takes; nothing is fetched."""
        encoded = None
        if isinstance(value, Mapping):
            encoded = value.get("data")
            value = encoded or value.get("url") or value
        if isinstance(value, str) and re.match("data:[^,]*;base64,", value):
            encoded = value.partition(",")[2]
        if isinstance(encoded, str):
            try:
                return self._medium(base64.b64decode(encoded, validate=True))
            except ValueError as error:
                raise BadSample("invalid_base64", str(error)) from error
        if isinstance(value, str) and re.match("(?!file:)[a-z]+://", value):
            raise BadSample("remote_medium", f"{value[:100]!r} is not fetched: put the file into the input, or a data URI")
        return self._medium(value.removeprefix("file://") if isinstance(value, str) else value)


# -- interleaved documents


def is_interleaved(record: Any) -> bool:
    return _interleaved_layout(record) is not None


def interleaved(record: Mapping[str, Any], medium: Medium, dropped: Counter[str]) -> list[Segment]:
    """Read texts and images in their order; consecutive texts become one segment. Images that cannot be read are counted.

    Raises:
        BadSample: no image or no text at all could be read, or the record is not interleaved.
    """
    layout = _interleaved_layout(record)
    if layout is None:
        raise BadSample("not_interleaved", f"fields {sorted(record)[:8]}, but no texts + images (OBELICS) or text_list (MMC4)")
    glue = " " if layout == "MMC4" else "\n\n"
    segments: list[Segment] = []
    lost: Counter[str] = Counter()
    for kind, value in (_mmc4 if layout == "MMC4" else _obelics)(record, lost):
        if kind == "text" and segments and isinstance(segments[-1].data, str):
            segments[-1] = Segment(segments[-1].data + glue + value)
        elif kind == "text":
            segments += [Segment(value)] if value.strip() else []
        else:
            try:
                segments.append(medium(value))
            except (BadSample, OSError) as error:
                lost[getattr(error, "reason", "missing_file")] += 1
    dropped.update(lost)
    if lost and not any(isinstance(segment.data, bytes) for segment in segments):
        raise BadSample(next(iter(lost)), f"none of its images can be read: {dict(lost)}")
    if not segments:
        raise BadSample("empty_text", "the record holds neither a text nor an image")
    return segments


def _interleaved_layout(record: Any) -> str | None:
    for name, layout in (("text_list", "MMC4"), ("texts", "OBELICS")) if isinstance(record, Mapping) else ():
        texts = record.get(name)
        if isinstance(texts, list) and all(text is None or isinstance(text, str) for text in texts):
            return layout
    return None


def _mmc4(record: Mapping[str, Any], lost: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Yield each image before the sentence that it was matched with."""
    texts, images = record["text_list"], defaultdict(list)
    for image in _listed(record.get("image_info")):
        index = image.get("matched_text_index", 0) if isinstance(image, Mapping) else None
        if isinstance(index, int):
            images[min(max(index, 0), len(texts))].append(image.get("image_name", image))
        else:
            lost["unknown_content"] += 1
    for index, text in enumerate([*texts, None]):
        yield from (("image", image) for image in images[index])
        if text is not None:
            yield "text", text


def _obelics(record: Mapping[str, Any], lost: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Yield the text or image, or both, at each index of the two lists."""
    for text, image in zip_longest(record["texts"], _listed(record.get("images"))):
        yield from [("image", image)] * (image is not None and image != "") + [("text", text)] * (text is not None)


def _first_text(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((str(record[name]) for name in names if isinstance(record.get(name), str | int | float)), None)


def _listed(value: Any) -> list[Any]:
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]
