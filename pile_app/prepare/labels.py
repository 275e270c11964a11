"""Labelled data as they come: which column or folder says what something is, and which file belongs to which split.

record {"sentence": ..., "label": 1}  ──► text, text "1" or the name of class 1     the last segment is the label
train.csv  validation-00000.parquet  test/  ──► train, validation, test             as they were given
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pile_app.documents import BadSample, Document, Segment
from pile_app.prepare.options import MEDIA_EXTENSIONS, Options

SPLITS = ("train", "validation", "test")
LABEL_COLUMN = "label"  # is one without being asked for; others by `label_column`
TEXT_COLUMNS = ("caption", "transcript", "transcription", "text", "sentence")
MOST_LABELS = 1000  # that are told; where there are more it is hardly a class

# -- splits

_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip
_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(_WORDS)})(?=[-_.])")


def split_in_path(path: str) -> str | None:
    """The split that the outermost folder of that name says, else the name of a file that holds many documents."""
    *folders, name = path.lower().split("/")
    for folder in folders:
        if folder in _WORDS:
            return _WORDS[folder]
    kind = name.rsplit(".", 1)[-1]
    if found := _IN_NAME.search(f"{name}."):
        return None if kind in MEDIA_EXTENSIONS else _WORDS[found[1]]
    return None


def given_splits(found: Collection[str]) -> list[str]:
    """Those that count: training and another one. A folder `test` alone is as likely the tests of some program."""
    return sorted(found) if "train" in found and len(found) > 1 else []


def choose_split(given: str | None, splits: Collection[str], draw: float, share: float) -> int:
    """Number in `SPLITS` of a document: the split that it was given, where there are `splits`; else `draw`, 0 to 1, decides."""
    if splits and given in ("validation", "test"):
        return SPLITS.index(given)
    return int(draw < share and not (given == "train" and "validation" in splits))


# -- labels


def label_column(columns: Collection[str], options: Options) -> str | None:
    """Which of the columns holds the label; None: there is none.

    Raises:
        BadSample: the column that was asked for is not among them.
    """
    wanted = options.label_column
    if wanted and wanted not in columns:
        raise BadSample("no_label", f"label_column is {wanted!r}; there are {sorted(columns)}")
    return wanted if wanted is not None else LABEL_COLUMN if LABEL_COLUMN in columns else None


def texts_of(record: Mapping[str, Any], options: Options) -> list[Segment]:
    """The texts of the columns that were asked for, else of the first that is known by name."""
    for name in options.text_column:
        if not isinstance(record.get(name), str):
            raise BadSample("no_text", f"text_column is {name!r}; there are texts in {_texts(record)}")
    names = options.text_column or [name for name in TEXT_COLUMNS if isinstance(record.get(name), str)][:1]
    return [Segment(record[name]) for name in names]


def _texts(record: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, value in record.items() if isinstance(value, str))


def labelled(inputs: Sequence[Segment], label: str, options: Options) -> Document:
    """Inputs, then the label, which alone is learned where `label_loss_only` is set.

    Raises:
        BadSample: `no_text`, there is nothing to be labelled.
    """
    if not inputs:
        names = ", ".join(TEXT_COLUMNS)
        raise BadSample("no_text", f"there is a label and nothing that it is of: name the text_column (known: {names})")
    given = tuple(replace(segment, loss=not options.label_loss_only) for segment in inputs)
    return Document((*given, Segment(label.strip())))


def label_text(value: Any, names: Sequence[str] = ()) -> str:
    """A label as text: the name of class number `value` where the names are known.

    Raises:
        BadSample: `no_label`, it is missing (-1, as Hugging Face has it, too), a number that is no class, or a list.
    """
    if isinstance(value, int) and names:
        if 0 <= value < len(names):
            return names[value]
    elif isinstance(value, bool) or (isinstance(value, int) and value >= 0) or (isinstance(value, str) and value.strip()):
        return str(value)
    raise BadSample("no_label", f"{value!r} is no label" + (f": there are {len(names)} classes" if names else ""))


def class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str]:
    """Of a column, as Hugging Face's datasets write them into a Parquet file; none where they do not."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        about = features[column]
        names = about.get("feature", about)["names"]  # of lists: those of what is in them
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def label_of_folder(path: str) -> str:
    """Raises BadSample where the file lies in no folder below the input."""
    folder = os.path.basename(os.path.dirname(path))
    if not folder:
        raise BadSample("no_label", "label_from_folder, and it lies in no folder below the input")
    return folder


def in_order(labels: Mapping[str, int]) -> list[str]:
    """Labels (-> number of the class, -1 where that is not known) in the order of the classes, else of numbers, of letters."""

    def place(label: str) -> tuple[int, int, str]:
        number = labels[label] if labels[label] >= 0 else int(label) if label.isdecimal() else -1
        return (number < 0, number, label)

    return sorted(labels, key=place)
