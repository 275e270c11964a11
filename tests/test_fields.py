"""Field maps: given or inferred, they say what of a sample is learned, and lose nothing uncounted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pile_app.documents import TEXT, BadSample, Document, Segment, sample_from_document
from pile_app.fields import OWN, Fields
from pile_app.infer import infer_fields

PNG = Segment.from_image(np.zeros((4, 4, 3), np.uint8)).file
FLAC = Segment.from_audio(0.1 * np.sin(np.arange(800)), 8000).file


def described(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def texts(document: Document) -> list[str]:
    return [segment.text for segment in document.segments if segment.modality == TEXT]


@pytest.mark.parametrize(
    "spec",
    [
        "[jpg|png|webp, json.caption|txt]",
        "[flac|wav, {text: txt, loss: false}]",
        "[image, {text: captions, choose: true}, {label: class}, {group: speaker}, shuffle]",
        "[{text: txt, optional: true}, {label: cls, learn: true}]",
        "messages",
        "segments",
    ],
)
def test_a_field_map_is_its_own_yaml(spec: str) -> None:
    assert str(Fields.parse(spec)) == spec
    assert Fields.parse(str(Fields.parse(spec))) == Fields.parse(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "names no segment"),
        ([{"label": "cls"}], "names no segment"),
        ([{"txet": "txt"}], "txet.*needs one of text, image"),
        ([{"text": "txt", "loss": "no"}], "loss: 'no' must be true or false"),
        (["jpg|"], "alternatives"),
        (["messages", "txt"], "whole document"),
        ("[jpg", "is not YAML"),
    ],
)
def test_a_wrong_field_map_is_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fields.parse(spec)


CAPTIONED = {"jpg": PNG, "txt": b"a cat", "json": described(caption="a cat", url="u", key=1, status="success")}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("samples", "spec", "segments", "unused"),
    [
        ([CAPTIONED], "[jpg, json.caption|txt, shuffle]", ["png", "a cat"], ["json.key", "json.status", "json.url"]),
        ([{"png": PNG, "seg.png": PNG, "txt": b"a"}], "[png, txt, shuffle]", ["png", "a"], ["seg.png"]),
        (
            [{"flac": FLAC, "json": described(text="hi there", segments=[{"start": 0, "end": 1, "text": "hi there"}])}],
            "[flac, json.text, shuffle]",
            ["flac", "hi there"],
            ["json.segments"],
        ),
        ([{"flac": FLAC, "json": b"[1, 2]"}], "[flac]", ["flac"], ["json"]),
        ([{"jpg": PNG, "txt": b"a", "json": described(meta="a string", nested={"a": {"b": 1}})}], "[jpg, txt, shuffle]",
         ["png", "a"], ["json.meta", "json.nested"]),
        ([{"jpg": PNG, "cls": b"7"}], "[jpg, {label: cls}]", ["png"], []),
        ([{"text": "hello world", "id": 3}], "[text]", ["hello world"], ["id"]),
        ([{"review": "a good film", "sentiment": "positive"}], "[review, {label: sentiment}]", ["a good film"], []),
        ([{"title": "a title", "description": "some text", "label": 2}], "[title, description, {label: label}]",
         ["a title", "some text"], []),
        ([{"image": {"bytes": PNG, "path": None}, "captions": ["a", "b"]}],
         "[image, {text: captions, choose: true}, shuffle]", ["png", "a"], []),
        ([{"image": {"bytes": PNG, "path": None}, "question": "what?", "answers": ["a cat"]}],
         "[image, {text: question, loss: false}, {text: answers, choose: true}]", ["png", "what?", "a cat"], []),
        ([{"image": {"bytes": PNG, "path": None}, "mask": {"bytes": PNG, "path": None}, "edit_prompt": "make it red"}],
         "[image, edit_prompt, shuffle]", ["png", "make it red"], ["mask"]),
        ([{"sentence1": "a b", "sentence2": "c d", "label": 0}], "[sentence1, sentence2, {label: label}]", ["a b", "c d"], []),
        ([{"Sentence": "a b", "Label": "x"}], "[Sentence, {label: Label}]", ["a b"], []),
        ([{"text": "a b", "labels": [2]}], "[text]", ["a b"], ["labels"]),
        ([{"article": "a b", "highlights": "c d", "id": "x"}], "[article, highlights]", ["a b", "c d"], ["id"]),
        ([{"passage": "a b", "question": "c d", "answer": True}],
         "[{text: passage, loss: false}, {text: question, loss: false}, answer]", ["a b", "c d", "True"], []),
        ([{"context": "a b", "question": "c d", "answers": {"text": ["a"], "answer_start": [0]}, "id": "x"}],
         "[{text: context, loss: false}, {text: question, loss: false}, {text: answers.text, choose: true}]",
         ["a b", "c d", "a"], ["id"]),
        ([{"question": "a b", "choices": ["x", "y"], "answer": 1}], "[question, {text: choices}, {label: answer}]",
         ["a b", "x", "y"], []),
        ([{"translation": {"en": "a b", "de": "c d"}}], "[translation.en, translation.de]", ["a b", "c d"], []),
        ([{"chosen": "Human: a b", "rejected": "Human: c d"}], "[chosen]", ["Human: a b"], ["rejected"]),
        ([{"target": 3, "category": "dog", "audio": {"bytes": FLAC, "path": None}}], "[audio, {label: category}]",
         ["flac"], ["target"]),
        ([{"audio": {"bytes": FLAC, "path": None}, "text": "A", "normalized_text": "a", "speaker": "N/A"}],
         "[audio, normalized_text|text, {group: speaker}, shuffle]", ["flac", "a"], []),
        ([{"audio": {"bytes": FLAC, "path": None}, "caption_1": "a b", "caption_2": "c d"}],
         "[audio, {text: caption_1|caption_2, choose: true}, shuffle]", ["flac", "a b"], []),
        ([{"audio": {"bytes": FLAC, "path": None}, "label": "001 - Dog bark"}], "[audio, {label: label}]", ["flac"], []),
        ([{"prompt": "a b", "chosen": "c d", "rejected": "e f"}], "[{text: prompt, loss: false}, chosen]", ["a b", "c d"],
         ["rejected"]),
        ([{"messages": CHAT, "id": 1}], "messages", ["\x02", "hi", "\x03", "hello", "\x02"], ["id"]),
    ],
)  # fmt: skip
def test_the_field_map_is_inferred_and_what_it_does_not_name_is_listed(
    samples: list[dict[str, Any]], spec: str, segments: list[str], unused: list[str]
) -> None:
    fields = infer_fields(samples)
    assert str(fields) == spec
    reading = fields.read("k", samples[0])
    found = [s.text if s.modality == TEXT else "png" if s.data == PNG else s.extension for s in reading.document.segments]
    assert found == segments
    assert sorted(reading.unused) == unused
    assert "group" not in reading.document.meta  # "N/A" is nobody
    leaves = {f"json.{name}" for name in json.loads(samples[0]["json"])} if b"{" in samples[0].get("json", b"") else {"json"}
    assert {*reading.used, *reading.unused} == (samples[0].keys() - {"json"}) | (leaves if "json" in samples[0] else set())


def test_a_sample_without_its_medium_is_rejected_and_not_learned_as_a_text() -> None:
    failed = {"txt": b"failed", "json": described(caption="failed", url="u", key=2, status="failed")}
    fields = infer_fields([CAPTIONED, CAPTIONED, failed])
    with pytest.raises(BadSample, match="missing_field: sample 'k' has no jpg"):
        fields.read("k", failed)
    with pytest.raises(BadSample, match="unreadable_medium"):
        infer_fields([{"heic": b"x", "txt": b"a caption"}]).read("k", {"heic": b"x", "txt": b"a caption"})


def test_a_damaged_json_costs_only_what_needs_it() -> None:
    sample = {"jpg": PNG, "txt": b"a cat", "json": b'{"caption": '}
    assert texts(Fields.parse("[jpg, txt]").read("k", sample).document) == ["a cat"]
    assert texts(Fields.parse("[jpg, json.caption|txt]").read("k", sample).document) == ["a cat"]
    with pytest.raises(BadSample, match="invalid_json"):
        Fields.parse("[jpg, json.caption]").read("k", sample)


def test_what_is_not_learned_is_marked_and_labels_are_no_text_unless_asked_for() -> None:
    sample = {"jpg": PNG, "question.txt": b"what?", "cls": b"cat", "json": described(speaker="ann")}
    fields = Fields.parse("[jpg, {text: question.txt, loss: false}, {label: cls}, {group: json.speaker}]")
    document = fields.read("k", sample).document
    assert [segment.loss for segment in document.segments] == [True, False]
    assert document.meta == {"label": "cat", "group": "ann"}
    learned = Fields.parse("[jpg, {label: cls, learn: true}]").read("k", sample).document
    assert texts(learned) == ["cat"] and learned.segments[-1].loss


def test_alternative_captions_survive_a_shard() -> None:
    document = Document((Segment(PNG, "png"), Segment("a", choices=("a", "b"))), "k", False, {"label": "x"})
    sample = {name: data for name, data in sample_from_document(document).items() if name != "__key__"}
    assert infer_fields([sample]) == OWN
    assert OWN.read("k", sample).document == document


@pytest.mark.parametrize(
    "sample", [{"txt": b"a\x03b\x02"}, {"json": described(segments=[{"text": "a\x03b\x02"}])}, {"text": "a\x03b"}]
)
def test_a_role_cannot_be_forged_from_a_raw_shard(sample: dict[str, Any]) -> None:
    assert texts(infer_fields([sample]).read("k", sample).document) == ["ab"]


def test_numbered_captions_are_alternatives_of_one_text() -> None:
    sample = {"image": {"bytes": PNG, "path": None}, "caption_1": "a b", "caption_2": "", "caption_3": "c d"}
    document = infer_fields([sample]).read("k", sample).document
    assert document.segments[1].choices == ("a b", "c d")


@pytest.mark.parametrize("sample", [{"jpg": b"", "txt": b"a cat"}, {"image": {"bytes": b"", "path": None}, "text": "a cat"}])
def test_an_empty_medium_does_not_leave_a_text_alone(sample: dict[str, Any]) -> None:
    with pytest.raises(BadSample, match=r"missing_field|empty_file"):
        Fields.parse("[jpg|image, txt|text]").read("k", sample)


def test_a_chat_in_the_json_shows_the_picture_of_its_sample() -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
    sample = {"png": PNG, "json": described(conversations=turns)}
    reading = infer_fields([sample]).read("k", sample)
    assert [segment.extension for segment in reading.document.segments[:3]] == ["txt", "png", "txt"]
    assert reading.unused == ()


@pytest.mark.parametrize("label", [-1, None, ""])  # as GLUE's test sets have it
def test_a_document_whose_label_is_unknown_has_none(label: Any) -> None:
    assert Fields.parse("[text, {label: label}]").read("k", {"text": "a b", "label": label}).document.meta == {}


def test_nothing_to_learn_shows_the_names_the_first_sample_and_the_option() -> None:
    with pytest.raises(ValueError, match=r"among id, x; the first sample is \{'id': 3, 'x': 'abc'\}.*--fields"):
        infer_fields([{"id": 3, "x": "abc"}])
