"""Read chats and interleaved documents of published data sets: record -> list of segments.

* Chats: OpenAI (`messages` of `role`, `content`), ShareGPT (`conversations` of `from`, `value`), LLaVA (the same with `image`
  and `<image>` in a text), The Cauldron (`texts` of `user`, `assistant`), Alpaca (`instruction`, `input`, `output`), and lists
  of strings in which user and assistant take turns.
* Interleaved: OBELICS (`texts` and `images`, aligned) and MMC4 (`text_list`, and `image_info` with the index of a text).

A turn is the marker of its role, a text segment of one control character, then its segments. Only answers are learned, up to
the marker of the next speaker. Users cannot forge a role: `strip_markers` removes these characters from all other texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from pile_app.documents import BadSample, Document, Segment

Medium = Callable[[Any], Segment]  # a value that `SampleView.medium` knows -> segment; raises BadSample

ROLES = {"system": "\x01", "user": "\x02", "assistant": "\x03"}
MARKERS = tuple(ROLES.values())
TOOL_RESULTS = ("tool", "function", "ipython", "observation", "function_response", "tool_response")  # context, as the user's
TOOL_CALLS = ("function_call", "tool_call")
SPEAKERS = {"system": "system", "developer": "system"} | dict.fromkeys(("user", "human", "prompter", *TOOL_RESULTS), "user")
SPEAKERS |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")

MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chosen", "completion")
ALPACA = (("instruction", "prompt"), ("input", "context"), ("output", "completion", "response"))  # question, context, answer
MEDIA = {"image": ("image", "images"), "audio": ("audio", "audios", "sound")}
CHAT_FIELDS = {*MESSAGES, *chain(*ALPACA), *MEDIA["image"], *MEDIA["audio"], "system", "history"}
INTERLEAVED_FIELDS = {"texts", "images", "text_list", "image_info"}


@dataclass(frozen=True)
class Turn:
    """A message: `role` is a key of `ROLES`; `loss` is False for an answer that is only context (OpenAI's `"weight": 0`)."""

    role: str
    segments: tuple[Segment, ...]
    loss: bool = True


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
    """Join turns to a document that ends with the last learned answer; turns after it are counted in `dropped`.

    Raises BadSample: `unknown_role` or `no_answer`."""
    joined, dropped = _join(turns), Counter() if dropped is None else dropped
    while joined and not any(segment.loss for segment in joined[-1].segments):
        joined.pop()
        dropped["unanswered_turn"] += 1
    if not joined:
        raise BadSample("no_answer", "no turn of the assistant is learned")
    return Document((*_lay_out(joined), Segment(ROLES["user"], loss=joined[-1].segments[-1].loss)), key, meta=meta or {})


def conversation_prompt(turns: Sequence[Turn]) -> Document:
    """Lay out the beginning of a conversation, up to the answer that the assistant is to give."""
    return Document(tuple(_lay_out([*_join(turns), Turn("assistant", ())])))


def _join(turns: Sequence[Turn]) -> list[Turn]:
    """Clean the turns, drop empty ones, join neighbours of one role, and set which segments are learned."""
    joined: list[Turn] = []
    for turn in map(clean_turn, turns):
        if turn.role not in ROLES:
            raise BadSample("unknown_role", f"{turn.role!r} is none of {', '.join(ROLES)}")
        segments = tuple(replace(segment, loss=turn.role == "assistant" and turn.loss) for segment in turn.segments)
        if joined and joined[-1].role == turn.role:
            segments = joined.pop().segments + segments
        joined += [Turn(turn.role, segments)] if segments else []
    return joined


def _lay_out(turns: Sequence[Turn]) -> list[Segment]:
    segments: list[Segment] = []
    for turn in turns:  # the marker after a learned answer is learned with it
        segments += [Segment(ROLES[turn.role], loss=bool(segments) and segments[-1].loss), *turn.segments]
    return segments


def chat_layout(record: Any) -> str | None:
    """Name the chat layout of a record, None if it is no chat."""
    return _messages(record)[0]


def chat(record: Any, medium: Medium, dropped: Counter[str]) -> list[Segment]:
    """Read a chat: a record, or the list of its messages. `dropped` counts, by name, the parts that are not kept as written.

    Raises BadSample: the record is no chat, or has parts that cannot be read."""
    layout, messages = _messages(record)
    record = record if isinstance(record, Mapping) else {}
    if layout is None:
        fields = f"fields {sorted(record)[:8]}, but no messages, conversations or instruction + output"
        raise BadSample("no_conversation", fields)
    reader = _ChatReader(medium, dropped)
    for kind, names in MEDIA.items():
        reader.queues[kind] = [medium(value) for name in names for value in _listed(record.get(name))]
    if isinstance(record.get("system"), str):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    turns = [turn for message in messages for turn in reader.turns(message)]
    if left := tuple(segment for queue in reader.queues.values() for segment in queue):  # begin the first question, as in TRL
        turns.insert(next((n for n, turn in enumerate(turns) if turn.role != "system"), len(turns)), Turn("user", left))
        dropped["media_without_placeholder"] += len(left)
    return list(conversation(turns, dropped=dropped).segments)


def _messages(record: Any) -> tuple[str | None, list[Mapping[str, Any]]]:
    """Return the layout, and the messages as those of OpenAI or ShareGPT."""
    record = {"messages": record} if isinstance(record, list) else record if isinstance(record, Mapping) else {}
    for found in (record[name] for name in MESSAGES if isinstance(record.get(name), list)):
        prompt = record.get("prompt")
        if isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt):  # TRL
            found = [*({**message, "weight": 0} for message in prompt), *found]
        if found and all(isinstance(message, str) for message in found):
            return "dialogue", [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(found)]
        for layout, keys in (("OpenAI messages", {"role", "content"}), ("ShareGPT", {"from", "value"})):
            if all(isinstance(m, Mapping) for m in found) and any(keys <= m.keys() for m in found):
                return layout, found
    both = _listed(record.get("texts"))
    if both and all(isinstance(one, Mapping) and {"user", "assistant"} <= one.keys() for one in both):
        return "The Cauldron", [{"role": role, "content": one[role]} for one in both for role in ("user", "assistant")]
    alternatives = ([record[name] for name in names if isinstance(record.get(name), str | int | float)] for names in ALPACA)
    question, context, answer = (str(found[0]) if found else None for found in alternatives)
    if question is None or answer is None:
        return None, []
    pairs = [pair if isinstance(pair, list) and len(pair) == 2 else [{}, {}] for pair in _listed(record.get("history"))]
    pairs.append(["\n\n".join(text for text in (question, context) if text and text.strip()), answer])
    return "Alpaca", [{"role": ("user", "assistant")[n], "content": pair[n]} for pair in pairs for n in range(2)]


class _ChatReader:
    """Reads messages. `queues`: media of the record, to which texts refer by `<image>` and `<audio>`, in order."""

    def __init__(self, medium: Medium, dropped: Counter[str]) -> None:
        self._medium, self._dropped = medium, dropped
        self.queues: dict[str, list[Segment]] = {}

    def turns(self, message: Mapping[str, Any]) -> Iterator[Turn]:
        role = message.get("role") or message.get("from")
        calls = bool(message.get("tool_calls") or message.get("function_call") or role in TOOL_CALLS)
        self._dropped.update(["tool_call"] * calls + ["role_of_tool"] * (role in TOOL_RESULTS))
        if role in TOOL_CALLS:
            return
        if role not in SPEAKERS:
            raise BadSample("unknown_role", f"{role!r} is none of {', '.join(SPEAKERS)}")
        sound = message.get("audio")  # an answer of OpenAI that was spoken
        parts = [*_listed(message.get("content", message.get("value"))), *_listed(message.get("refusal"))]
        parts += [{"type": "audio", "audio": sound}] if isinstance(sound, Mapping) and sound.get("data") else []
        if segments := tuple(segment for part in parts for segment in self.part(part)):
            learned = all(message.get(name) != 0 for name in ("weight", "train", "loss"))
            yield Turn(SPEAKERS[role], segments, learned)
        elif not calls:
            self._dropped["empty_message"] += 1

    def part(self, part: Any) -> Iterator[Segment]:
        """Read a part of a message: a text, or an object with a `type` (OpenAI, Anthropic, transformers)."""
        given: Mapping[str, Any] = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = given.get("type") if isinstance(given, Mapping) else None
        text = kind and (given.get(kind) or given.get("text") or "")
        if kind in ("text", "input_text", "output_text", "refusal") and isinstance(text, str):
            yield from self.text(text)
        elif kind in ("tool_use", "thinking", "redacted_thinking"):
            self._dropped["tool_call" if kind == "tool_use" else kind] += 1
        elif kind == "tool_result":
            yield from (segment for one in _listed(given.get("content")) for segment in self.part(one))
        elif kind in ("image_url", "input_image", "image", "audio_url", "input_audio", "audio"):
            value = next((given[name] for name in (kind, "image_url", "source", "url", "path") if given.get(name)), None)
            queue = self.queues["audio" if "audio" in kind else "image"]
            yield queue.pop(0) if value is None and queue else self._medium(value)
        else:
            raise BadSample("unknown_content", f"a part of a message is {part!r:.80}, not text, image or audio")

    def text(self, text: str) -> Iterator[Segment]:
        """Split a text at `<image>` and `<audio>`, if the record has media."""
        for number, part in enumerate(re.split("<(image|audio)>", text) if any(self.queues.values()) else [text]):
            if number % 2 and not self.queues[part]:
                raise BadSample("missing_file", f"more <{part}> in the texts than files of the record")
            if number % 2:
                yield self.queues[part].pop(0)
            elif part.strip():
                yield Segment(part.strip())


def is_interleaved(record: Any) -> bool:
    """Whether the record has `text_list` (MMC4), or `texts` and `images` (OBELICS)."""
    if not isinstance(record, Mapping) or not ("text_list" in record or isinstance(record.get("images"), list)):
        return False
    texts = record.get("text_list", record.get("texts"))
    return isinstance(texts, list) and all(text is None or isinstance(text, str) for text in texts)


def interleaved(record: Mapping[str, Any], medium: Medium, dropped: Counter[str]) -> list[Segment]:
    """Read texts and images in order, an image before the text of its index; consecutive texts become one segment. Images that
    cannot be read are counted by reason. Raises `BadSample` if none can."""
    texts, glue = (record["text_list"], " ") if "text_list" in record else (record["texts"], "\n\n")
    aligned: list[list[Any]] = [[image] if image else [] for image in _listed(record.get("images"))]
    aligned += [[] for _ in range(len(aligned), len(texts))]
    lost: Counter[str] = Counter()
    for image in _listed(record.get("image_info")):
        index = image.get("matched_text_index", 0) if isinstance(image, Mapping) else None
        if isinstance(index, int) and 0 <= index < len(texts):
            aligned[index].append(image.get("image_name", image))
        else:
            lost["unknown_content"] += 1
    segments: list[Segment] = []
    for text, images in zip_longest((strip_markers(text or "") for text in texts), aligned):
        for image in images or ():
            try:
                segments.append(medium(image))
            except BadSample as error:
                lost[error.reason] += 1
        if text and segments and isinstance(segments[-1].data, str):
            segments[-1] = Segment(segments[-1].data + glue + text)
        elif text and text.strip():
            segments.append(Segment(text))
    dropped.update(lost)
    if not segments or (lost and all(isinstance(segment.data, str) for segment in segments)):
        detail = f"none of its images can be read: {dict(lost)}" if lost else "it has neither text nor image"
        raise BadSample(next(iter(lost), "empty_text"), detail)
    return segments


def _listed(value: Any) -> list[Any]:
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]
