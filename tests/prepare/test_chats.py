"""`pile prepare --kind chat`: the common chat layouts become conversations, and no file outside the input folder is read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pile_app.data.shards import Shards, expand_shards
from pile_app.documents import Document, Segment
from pile_app.prepare.pipeline import prepare
from pile_app.records import ROLES

MakeSegment = Callable[..., Segment]
SPEAKER = {marker: role for role, marker in ROLES.items()}


def prepared(folder: Path, **options: Any) -> tuple[list[Document], list[dict[str, Any]]]:
    """The documents that `pile prepare --kind chat` writes for a folder, and the rejected samples."""
    output = folder.parent / "out"
    prepare(folder, output, kind="chat", validation_fraction=0.0, processes=1, **options)
    shards = Shards(expand_shards(str(output / "*.tar")))
    documents = list(shards)
    return documents, [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]


def told(document: Document) -> list[tuple[str, list[str | bytes]]]:
    """(role, content) of each turn; the last is the marker at the end."""
    turns: list[tuple[str, list[str | bytes]]] = []
    for segment in document.segments:
        if isinstance(segment.data, str) and segment.data in SPEAKER:
            turns.append((SPEAKER[segment.data], []))
        else:
            turns[-1][1].append(segment.data)
            assert segment.loss == (turns[-1][0] == "assistant")
    assert turns.pop() == ("user", [])
    return turns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def write_lines(path: Path, *records: Any) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_openai_messages_with_parts(folder: Path, image: MakeSegment, sound: MakeSegment) -> None:
    picture, clip = image(0).file, sound(0).file
    uri = "data:image/png;base64," + base64.b64encode(picture).decode()
    (folder / "images").mkdir()
    (folder / "images" / "two.png").write_bytes(image(1).file)
    parts = [
        {"type": "text", "text": "What is \x03 this?  "},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "flac"}},
        {"type": "image_url", "image_url": "two.png"},
    ]
    write_lines(
        folder / "a.jsonl",
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts},
                      {"role": "assistant", "content": "Noise."}]},
    )  # fmt: skip
    (document,), rejected = prepared(folder)
    assert not rejected
    assert told(document) == [
        ("system", ["Be brief."]),
        ("user", ["What is  this?", picture, clip, image(1).file]),
        ("assistant", ["Noise."]),
    ]


def test_sharegpt_and_alpaca(folder: Path) -> None:
    write_lines(
        folder / "a.jsonl",
        {"system": "s", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"},
                                          {"from": "human", "value": "<image> is a tag"}, {"from": "gpt", "value": "So?"}]},
    )  # fmt: skip
    (folder / "b.json").write_text(
        json.dumps(
            [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Go", "input": "", "output": "Gone"}]
        )
    )
    documents, rejected = prepared(folder)
    assert not rejected
    assert sorted(map(told, documents)) == sorted(
        [
            [
                ("system", ["s"]),
                ("user", ["Hi"]),
                ("assistant", ["Ho"]),
                ("user", ["<image> is a tag"]),
                ("assistant", ["So?"]),
            ],
            [("user", ["Add\n\n1 2"]), ("assistant", ["3"])],
            [("user", ["Go"]), ("assistant", ["Gone"])],
        ]
    )


def test_llava_inserts_the_image_at_its_placeholder(folder: Path, image: MakeSegment) -> None:
    (folder / "pictures").mkdir()
    (folder / "pictures" / "one.png").write_bytes(image(0).file)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A frog."}]
    (folder / "llava.json").write_text(json.dumps([{"id": 1, "image": "pictures/one.png", "conversations": turns}]))
    (document,), rejected = prepared(folder)
    assert not rejected, "the image belongs to the conversation and is no document of its own"
    assert told(document) == [("user", [image(0).file, "What is it?"]), ("assistant", ["A frog."])]


def test_unreadable_conversations_are_counted_by_reason(folder: Path, image: MakeSegment, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image(0).file)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")

    def shown(url: Any) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": url}}
        return {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]}

    answer = {"from": "gpt", "value": "y"}
    records = {
        "missing_file": [shown("../secret.png"), shown(str(tmp_path / "secret.png")), shown("file:///etc/passwd"),
                         shown("link.png"),
                         {"image": [], "images": ["no.png"], "conversations": [{"from": "human", "value": "<image>"}, answer]}],
        "remote_medium": [shown("https://example.org/a.png")],
        "invalid_base64": [shown("data:image/png;base64,???")],
        "unknown_medium": [shown("data:image/png;base64," + base64.b64encode(b"text, no image").decode())],
        "unknown_role": [{"messages": [{"role": "critic", "content": "x"}, {"role": "assistant", "content": "x"}]}],
        "unknown_content": [{"messages": [{"role": "user", "content": [{"type": "video"}]}]},
                            {"instruction": "x", "output": "y", "history": ["no pair"]}],
        "no_answer": [{"messages": [{"role": "user", "content": "Anybody?"}]},
                      {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}],
        "no_conversation": [{"text": "plain"}, {"messages": "x"}, {"messages": [{"id": 3}]}],
    }  # fmt: skip
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write_lines(folder / "a.jsonl", good, *(record for group in records.values() for record in group))
    documents, rejected = prepared(folder)
    assert [told(document) for document in documents] == [[("user", ["q"]), ("assistant", ["a"])]]
    reasons = [one["reason"] for one in rejected if one["file"].startswith("a.jsonl")]
    assert reasons == [reason for reason, group in records.items() for _ in group]
