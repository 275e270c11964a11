"""Conversations as they are found: records of the common chat layouts to documents (`data/conversations.py`).

* OpenAI: `{"messages": [{"role": "user", "content": "..." or [parts]}]}` with parts `text`, `image_url`, `input_audio`;
* ShareGPT: `{"conversations": [{"from": "human", "value": "..."}]}`;
* LLaVA: the same with `<image>` in a text and `"image": "file.jpg"` beside it (`images`, `audio`, `<audio>` alike);
* Alpaca: `{"instruction": "...", "input": "...", "output": "..."}`, perhaps with `system` and `history`;
* ChatterBot: YAML, `conversations:` is a list of lists in which the speakers take turns.

Media are data URIs, bytes, or files in the input folder; nothing is fetched from elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pile_app.data.conversations import Turn, conversation
from pile_app.documents import BadSample, Document, Segment

Medium = Callable[[Any], Segment]  # bytes, or the name of a file, to a segment

SPEAKERS = {"system": "system", "developer": "system"}
SPEAKERS |= dict.fromkeys(("user", "human", "prompter"), "user")
SPEAKERS |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")
_PLACEHOLDER = re.compile("<(image|audio)>")


def chat_layout(record: dict[str, Any]) -> str | None:
    """Name of the layout of a record, None where it is no conversation."""
    return next((name for name, (keys, _) in _LAYOUTS.items() if keys <= record.keys()), None)


def document_of_chat(record: dict[str, Any], medium: Medium) -> Document:
    """Raises `BadSample` where it is no conversation, or one with parts that cannot be read."""
    layout = chat_layout(record)
    if layout is None:
        known = "messages, conversations, or instruction and output"
        raise BadSample("no_conversation", f"the record has {sorted(record)[:8]}; a conversation has {known}")
    queues = {
        kind: [medium_of(value, medium) for name in names for value in _listed(record.get(name))]
        for kind, names in (("image", ("image", "images")), ("audio", ("audio", "audios", "sound")))
    }
    turns = list(_LAYOUTS[layout][1](record, medium, queues))
    for kind, left in queues.items():
        if left:
            raise BadSample("unplaced_medium", f"{len(left)} {kind} of the record without a <{kind}> in its texts")
    return conversation(turns)


def records_of_file(name: str, data: bytes) -> Iterator[Any]:
    """Records of a JSON file (a list, or one record) or of a ChatterBot YAML file."""
    try:
        if name.endswith((".yml", ".yaml")):
            import yaml

            content = yaml.load(data, getattr(yaml, "CBaseLoader", yaml.BaseLoader))  # strings, lists and mappings only
        else:
            content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("invalid_json", str(error)) from error
    except Exception as error:  # of yaml
        raise BadSample("invalid_yaml", str(error)) from error
    exchanges = content.get("conversations") if isinstance(content, dict) and "messages" not in content else None
    if isinstance(exchanges, list) and any(isinstance(one, list) for one in exchanges):
        yield from ({"exchange": one if isinstance(one, list) else [one]} for one in exchanges)
        return
    yield from content if isinstance(content, list) else [content]


def medium_of(value: Any, medium: Medium) -> Segment:
    """Of a data URI, base64 of `{"data": ...}`, or what `medium` takes.

    Raises:
        BadSample: `remote_medium`, `invalid_base64`, or what `medium` raises.
    """
    if isinstance(value, dict):
        value = value.get("url") or value.get("data") or value
    if isinstance(value, str):
        head, comma, encoded = value.partition(",")
        if value.startswith("data:") and comma and head.endswith(";base64"):
            return medium(_decoded(encoded))
        if re.match("[a-z]+://", value) and not value.startswith("file://"):
            raise BadSample(
                "remote_medium", f"{value[:100]!r} is not fetched: put the file into the input folder, or a data URI"
            )
        value = value.removeprefix("file://")
    return medium(value)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("invalid_base64", str(error)) from error


def _of_openai(record: dict[str, Any], medium: Medium, queues: dict[str, list[Segment]]) -> Iterator[Turn]:
    for message in _mappings(record["messages"]):
        content = message.get("content")
        parts = content if isinstance(content, list) else [] if content is None else [content]
        segments = [segment for part in parts for segment in _of_part(part, medium, queues)]
        sound = message.get("audio")
        if isinstance(sound, dict) and isinstance(sound.get("data"), str):  # what the assistant said
            segments.append(medium(_decoded(sound["data"])))
        if not segments:
            raise BadSample("unknown_content", f"a message has neither text nor media, only {sorted(message)[:8]}")
        yield Turn(_role(message.get("role")), tuple(segments))


def _of_part(part: Any, medium: Medium, queues: dict[str, list[Segment]]) -> Iterator[Segment]:
    if isinstance(part, str):
        yield from _of_text(part, queues)
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        yield from _of_text(part["text"], queues)
    elif kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        data = part["input_audio"].get("data")
        if not isinstance(data, str):
            raise BadSample("unknown_content", "an input_audio without data")
        yield medium_of(data, medium) if data.startswith("data:") else medium(_decoded(data))
    elif kind in ("image_url", "input_image", "image", "audio_url", "audio"):
        value = part.get(kind, part.get("image_url"))
        placed = queues["audio" if "audio" in kind else "image"]
        yield placed.pop(0) if value is None and placed else medium_of(value, medium)
    else:
        raise BadSample("unknown_content", f"a part of a message is of type {kind!r}")


def _of_sharegpt(record: dict[str, Any], medium: Medium, queues: dict[str, list[Segment]]) -> Iterator[Turn]:
    if isinstance(record.get("system"), str):
        yield Turn("system", tuple(_of_text(record["system"], queues)))
    for message in _mappings(record["conversations"]):
        if not isinstance(message.get("value"), str):
            raise BadSample("unknown_content", f"a message without a text as its value: {sorted(message)[:8]}")
        yield Turn(_role(message.get("from")), tuple(_of_text(message["value"], queues)))


def _of_alpaca(record: dict[str, Any], medium: Medium, queues: dict[str, list[Segment]]) -> Iterator[Turn]:
    if isinstance(record.get("system"), str):
        yield Turn("system", tuple(_of_text(record["system"], queues)))
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadSample("unknown_content", "the history of a record is not pairs of question and answer")
        yield from (
            Turn(role, tuple(_of_text(str(text), queues))) for role, text in zip(("user", "assistant"), pair, strict=True)
        )
    texts = [record[name] for name in ("instruction", "input") if isinstance(record.get(name), str) and record[name].strip()]
    yield Turn("user", tuple(_of_text("\n\n".join(texts), queues)))
    yield Turn("assistant", tuple(_of_text(str(record["output"]), queues)))


def _of_exchange(record: dict[str, Any], medium: Medium, queues: dict[str, list[Segment]]) -> Iterator[Turn]:
    for number, text in enumerate(record["exchange"]):
        if not isinstance(text, str):
            raise BadSample("unknown_content", f"a line of a dialogue is a {type(text).__name__}")
        yield Turn(("user", "assistant")[number % 2], tuple(_of_text(text, queues)))


_LAYOUTS: dict[str, tuple[set[str], Callable[..., Iterator[Turn]]]] = {
    "OpenAI messages": ({"messages"}, _of_openai),
    "ShareGPT": ({"conversations"}, _of_sharegpt),
    "Alpaca": ({"instruction", "output"}, _of_alpaca),
    "ChatterBot": ({"exchange"}, _of_exchange),
}


def _of_text(text: str, queues: dict[str, list[Segment]]) -> Iterator[Segment]:
    """The text, with the media in their places where the record has any."""
    parts = _PLACEHOLDER.split(text) if any(queues.values()) else [text]  # text, kind, text, kind, text
    for number, part in enumerate(parts):
        if number % 2:
            if not queues[part]:
                raise BadSample("missing_file", f"more <{part}> in the texts than files of the record")
            yield queues[part].pop(0)
        elif part.strip():
            yield Segment(part.strip())


def _role(name: Any) -> str:
    if name not in SPEAKERS:
        raise BadSample("unknown_role", f"{name!r} is none of {', '.join(SPEAKERS)}")
    return SPEAKERS[name]


def _mappings(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadSample("no_conversation", "the messages are not a list of objects")
    return value


def _listed(value: Any) -> list[Any]:
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]
