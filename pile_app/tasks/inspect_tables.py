"""The statistics of a data set as text: `statistics.json`, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pile_app.documents import MODALITIES
from pile_app.tasks.inspect_duplicates import duplicate_lines
from pile_app.training.report import short


def format_statistics(description: Mapping[str, Any]) -> str:
    """Two tables, what is there and how it packs, and what else there is to say."""
    sources = description["sources"]
    lines = _columns(list(map(_content, sources)))
    lines += ["", f"In tokens ({description['tokenizer']}), for packs of {description['context']:,}:"]
    lines += _columns(list(map(_packing, sources)))
    if any(one["only_text"] for one in sources):
        lines.append("* text tokens only")
    for one in sources:
        if one["rejected"]:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in one["rejected"].items())
            lines.append(f"rejected of {one['source']} {one['split']}".rstrip() + f": {reasons}")
    lines += description["notes"]
    if description["duplicates"] is not None:
        lines += ["", *duplicate_lines(description["duplicates"])]
    return "\n".join(lines)


def _content(one: Mapping[str, Any]) -> dict[str, str]:
    texts, images, sounds = (f"{one['segments'][name]:,}" if one["segments"][name] else "" for name in MODALITIES)
    pixels = one["image_pixels"] or {}
    return {
        "source": one["source"],
        "split": one["split"],
        "shards": f"{one['shards']:,}",
        "documents": f"{one['documents']:,}",
        "rejected": f"{sum(one['rejected'].values()):,}",
        "size": f"{short(one['bytes'])}B",
        "texts": texts,
        "images": images,
        "pixels: least / median / most": " / ".join(short(pixels[name]) for name in ("minimum", "50%", "maximum") if pixels),
        "sounds": sounds,
        "hours": f"{one['audio_seconds'] / 3600:,.3f}" if sounds else "",
    }


def _packing(one: Mapping[str, Any]) -> dict[str, str]:
    tokens, lengths = one["tokens"], one["document_tokens"] or {}
    mark = "*" if one["only_text"] else ""

    def told(number: float | None, form: str = ",") -> str:
        return "-" if number is None else format(number, form)

    return {
        "source": one["source"],
        "split": one["split"],
        **{name: "-" if tokens[name] is None else short(tokens[name]) for name in ("all", *MODALITIES)},
        "document: 1 %": told(lengths.get("1%")) + mark,
        "median": told(lengths.get("50%")) + mark,
        "99 %": told(lengths.get("99%")) + mark,
        "longest": told(lengths.get("maximum")) + mark,
        **{name.replace("_", " "): told(one[name]) for name in ("cut", "left_out", "packs")},
        **{name: told(one[name], ".1%") for name in ("fill", "padding")},
    }


def _columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Names to the left, numbers to the right; columns where nothing stands are left out."""
    columns = {name: [name, *(row[name] for row in rows)] for name in rows[0] if any(row[name] for row in rows)}
    widths = {name: max(map(len, column)) for name, column in columns.items()}
    left = ("source", "split")
    padded = [[cell.ljust(widths[n]) if n in left else cell.rjust(widths[n]) for cell in c] for n, c in columns.items()]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
