"""Guess the field map of samples whose author wrote none: `infer_fields(samples) -> Fields`.

Usual names decide (`caption`, `text`, `label`, `speaker` ...), then the kind of the values: media, prose, short strings. Chats
and interleaved documents are recognized by their form. The result is printed and kept, so a user can correct it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pile_app import fields
from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, UNREADABLE_EXTENSIONS
from pile_app.fields import Field, Fields, SampleView, as_list, extension, is_own_form, is_texts, listing

TEXT_NAMES = (  # of the text that a data set is about, the best first
    "caption", "captions", "normalized_text", "text_normalized", "text", "transcript", "transcription", "sentence", "sentences",
    "content", "description", "alt_text", "review", "body", "article", "abstract", "document", "chosen",
)  # fmt: skip
PAIRS = {  # a text -> the text that follows it
    "question": ("answer", "answers", "multiple_choice_answer"), "article": ("highlights",), "document": ("summary",),
    "dialogue": ("summary",), "prompt": ("chosen",), "premise": ("hypothesis",),
    "title": ("text", "content", "description", "body"),
}  # fmt: skip
GIVEN = {"question": ("context", "passage", "question"), "prompt": ("prompt",)}  # texts that are not learned
LABEL_NAMES = ("label", "labels", "cls", "class", "category", "sentiment", "target", "class_name", "fine_label", "gold_label")
GROUP_NAMES = ("speaker", "speaker_id", "client_id")
NEVER_LEARNED = "rejected|masks?|seg|segmentation|segmentation_mask|depth|depth_map|.*_parse"


def base(name: str) -> str:
    """Return a name in lower case, without the `json.` before it and the `.text` after it."""
    return name.lower().removeprefix("json.").removesuffix(".text")


def infer_fields(samples: Iterable[Mapping[str, Any]]) -> Fields:
    """Return the field map that a few samples (the first 200, say) suggest.

    Raises ValueError: nothing in the samples can be learned; the message shows the names and the first sample."""
    views = [SampleView("", sample, None) for sample in samples]
    if any(is_own_form(view.json) for view in views):
        return fields.OWN
    for role, (test, _, _) in fields.RECORDS.items():
        if sum(any(map(test, view.records())) for view in views) > len(views) / 2:
            return Fields((Field((), role),))
    names = list(dict.fromkeys(name for view in views for name in view.leaves() if not re.fullmatch(NEVER_LEARNED, base(name))))
    media = [name for name in names if any(view.is_medium(name) for view in views)]
    media = [name for name in media if "." not in name or name.startswith("json.")] or media
    by_kind = [tuple(sorted(name for name in media if name in kind)) for kind in (IMAGE_EXTENSIONS, AUDIO_EXTENSIONS)]
    others = [(name,) for name in media if name not in IMAGE_EXTENSIONS + AUDIO_EXTENSIONS]  # not files of a WebDataset
    entries = [_required(Field(alternatives), views) for alternatives in (*by_kind, *others) if alternatives]
    roles = {"label": LABEL_NAMES, "group": GROUP_NAMES, "split": ("split",)}
    scalars = {role: name for role, known in roles.items() if (name := _scalar_name(names, views, known))}
    texts = _text_entries([name for name in names if name not in scalars.values()], views, len(media))
    entries += [_required(replace(entry, optional=bool(media)), views) for entry in texts if entry.role in fields.SEGMENT_ROLES]
    if not entries:
        first = {name: view.raw(name) for view in views[:1] for name in view.leaves()}
        hint = "Name the fields, e.g. --fields '[image, text]' (in a configuration: data.sources.<name>.fields)"
        raise ValueError(f"nothing to learn was recognized among {listing(names)}; the first sample is {first!r:.300}. {hint}")
    shuffle = len(entries) > 1 and bool(media) and all(entry.loss for entry in entries)
    entries += [entry for entry in texts if entry.role not in fields.SEGMENT_ROLES]
    entries += [Field((name,), role) for role, name in scalars.items() if role not in [entry.role for entry in entries]]
    return Fields(tuple(entries), shuffle)


def _text_entries(names: Sequence[str], views: list[SampleView], with_media: int) -> list[Field]:
    """Entries for the texts of the samples: by the names that are usual, else every column of prose."""

    def values(name: str) -> list[Any]:
        return [value for view in views for value in view.values(name)]

    def entry(name: str, loss: bool = True, choose: bool = with_media > 0) -> Field:
        lists = any(isinstance(value, list) for value in values(name))
        return Field((name,), "media" if loss and not lists else "text", loss, choose=lists and choose)

    nested = {name: next((value for value in values(name) if isinstance(value, Mapping)), {}) for name in names}
    names = [*names, *(f"{name}.text" for name in names if "text" in nested[name])]  # SQuAD: {"answers": {"text": [...]}}
    names += [f"{name}.{key}" for name in names if base(name) == "translation" for key in nested[name]]
    others = [name for name in names if not any(view.is_medium(name) for view in views)]
    texts = [name for name in others if any(isinstance(one, str | bytes) or is_texts(one) for one in values(name))]
    plain = [name for name in names if any(isinstance(value, int | float) for value in values(name))]
    by_base = {base(name): name for name in reversed([*texts, *plain])}
    for first, partners in PAIRS.items():
        other = next((by_base[name] for name in partners if name in by_base), "")
        if not other or by_base.get(first) not in texts or (with_media and first == "title"):
            continue
        if first == "question" and "choices" in by_base and all(isinstance(value, int) for value in values(other)):
            return [entry(by_base[first]), entry(by_base["choices"], choose=False), Field((other,), "label")]
        given = [by_base[name] for name in GIVEN.get(first, [first]) if name in by_base]
        return [*(entry(name, loss=first not in GIVEN) for name in given), entry(other, choose=True)]
    numbered = [name for name in texts if re.fullmatch(f"({'|'.join(TEXT_NAMES)})[_-]?[0-9]+", base(name))]
    if with_media == 1 and len(numbered) > 1:  # caption_1, caption_2 ... of one picture
        return [Field(tuple(numbered), "text", choose=True)]
    usual = [name for known in TEXT_NAMES for name in texts if base(name) == known] + ["txt"] * ("txt" in texts)
    if usual:
        return [replace(entry(usual[0]), names=tuple(sorted(usual, key=lambda name: not name.startswith("json."))))]
    return [entry(name) for name in texts if extension(name) not in UNREADABLE_EXTENSIONS and _is_prose(values(name))]


def _scalar_name(names: Sequence[str], views: Sequence[SampleView], known: Sequence[str]) -> str | None:
    """The best of the known names whose values are short strings (first) or numbers, None if there is none."""
    found: dict[str, bool] = {}
    for name in sorted((name for name in names if base(name) in known), key=lambda name: known.index(base(name))):
        values = [value for view in views for value in view.values(name)]
        if values and all(isinstance(value, int) or (isinstance(value, str | bytes) and len(value) < 100) for value in values):
            found[name] = any(isinstance(value, str | bytes) for value in values)
    return min(found, key=lambda name: not found[name], default=None)


def _required(entry: Field, views: Sequence[SampleView]) -> Field:
    """A field that most samples have is required, so that a sample without it is rejected and counted; else it is optional."""
    present = sum(any(True for name in entry.names for _ in view.values(name)) for view in views)
    least = len(views) if entry.optional else len(views) / 2
    return replace(entry, optional=present < least)


def _is_prose(values: Sequence[Any]) -> bool:
    """Whether the strings of a column are texts rather than names, numbers or addresses."""
    texts = [text for value in values for text in as_list(value) if isinstance(text, str)]
    spaced = sum(" " in text.strip() and "://" not in text[:10] for text in texts)
    return spaced > len(texts) / 2
