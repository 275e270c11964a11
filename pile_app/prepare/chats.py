"""Files of conversations: the records of a JSON or YAML file, which `pile_app/records.py` reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pile_app.documents import BadSample, Document
from pile_app.records import Medium, chat


def document_of_chat(record: Any, medium: Medium) -> Document:
    """Read a chat. `meta["dropped"]` counts what was not kept as written. Raises `BadSample`."""
    dropped: Counter[str] = Counter()
    segments = chat(record, medium, dropped)
    return Document(tuple(segments), meta={"dropped": dict(dropped)} if dropped else {})


def records_of_file(name: str, data: bytes) -> Iterator[Any]:
    """Yield the records of a JSON file (a list, or one record), or the dialogues of a ChatterBot YAML or JSON file.

    Raises:
        BadSample: `invalid_json` or `invalid_yaml`.
    """
    kind = "yaml" if name.endswith((".yml", ".yaml")) else "json"
    try:
        if kind == "yaml":
            import yaml

            content = yaml.load(data, getattr(yaml, "CBaseLoader", yaml.BaseLoader))  # strings, lists and mappings only
        else:
            content = json.loads(data)
    except Exception as error:  # ValueError, RecursionError, yaml.YAMLError
        raise BadSample(f"invalid_{kind}", str(error)) from error
    dialogues = content.get("conversations") if isinstance(content, dict) and "messages" not in content else None
    if isinstance(dialogues, list) and any(isinstance(one, list) for one in dialogues):
        yield from ({"exchange": one if isinstance(one, list) else [one]} for one in dialogues)
    else:
        yield from content if isinstance(content, list) else [content]
