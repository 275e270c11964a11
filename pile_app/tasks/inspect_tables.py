"""The statistics of a data set as text: `statistics.json`, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pile_app.documents import MODALITIES
from pile_app.tasks.inspect_duplicates import Duplicates
from pile_app.tasks.inspect_lengths import short


def format_statistics(description: Mapping[str, Any]) -> str:
    """Two tables, what is there and how it packs, and what else there is to say."""
    sources = description["sources"]
    rows = [["source", "split", "shards", "documents", "rejected", "size", "texts", "images", "pixels", "sounds", "length"]]
    for one in sources:
        pixels = one["image_pixels"]
        sides = " / ".join(short(pixels[name]) for name in ("minimum", "50%", "maximum")) if pixels else ""
        rows.append(
            [
                one["source"],
                one["split"],
                f"{one['shards']:,}",
                f"{one['documents']:,}",
                f"{sum(one['rejected'].values()):,}",
                f"{short(one['bytes'])}B",
                *(f"{one['segments'][name]:,}" if one["segments"][name] else "" for name in ("text", "image")),
                sides,
                f"{one['segments']['audio']:,}" if one["segments"]["audio"] else "",
                _duration(one["audio_seconds"]) if one["segments"]["audio"] else "",
            ]
        )
    lines = [*_columns(rows), ""]
    if any(one["image_pixels"] for one in sources):
        lines.insert(-1, "pixels of an image: smallest / median / largest")
    lines.append(f"In tokens ({description['tokenizer']}), for packs of {description['context']:,}:")
    head = ["source", "split", "tokens", "text", "image", "sound", "document: 1 %", "median", "99 %", "longest"]
    rows = [[*head, "cut", "left out", "packs", "fill", "padding"]]
    for one in sources:
        tokens, lengths = one["tokens"], one["document_tokens"]
        mark = "*" if one["only_text"] else ""
        packing = (one["cut"], one["left_out"], one["packs"])
        rows.append(
            [
                one["source"],
                one["split"],
                _tokens(tokens["all"]),
                *(_tokens(tokens[name]) if one["segments"][name] else "" for name in MODALITIES),
                *(f"{lengths[name]:,}{mark}" if lengths else "" for name in ("1%", "50%", "99%", "maximum")),
                *("-" if number is None else f"{number:,}" for number in packing),
                *("-" if one[name] is None else f"{one[name]:.1%}" for name in ("fill", "padding")),
            ]
        )
    lines += _columns(rows)
    if any(one["only_text"] for one in sources):
        lines.append("* text tokens only")
    for one in sources:
        if one["rejected"]:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in one["rejected"].items())
            lines.append(f"rejected of {one['source']} {one['split']}".rstrip() + f": {reasons}")
    lines += description["notes"]
    if description["duplicates"] is not None:
        lines += ["", *_duplicate_lines(description["duplicates"])]
    return "\n".join(lines)


def _tokens(number: int | None) -> str:
    return "-" if number is None else short(number)


def _duplicate_lines(found: Mapping[str, Any]) -> list[str]:
    lines = (
        [f"{found['unreadable']:,} documents are not what was indexed: `pile index --verify`"] if found["unreadable"] else []
    )
    for kind in Duplicates.KINDS:
        one = found[kind]
        if not one["groups"]:
            lines.append("no document occurs more than once" if kind == "documents" else "")
            continue
        where = ", ".join(f"{number:,} in {title}" for title, number in one["of_source"].items())
        lines.append(f"duplicate {kind}: {one['groups']:,} occur more than once, {one['copies']:,} copies could go: {where}")
        if one["leaked"]:
            lines.append(f"  LEAK: {one['leaked']:,} of the {kind} held out from training are in a training split too")
        for example in one["examples"][:5]:
            names = [f"{source} {split} {key}".replace("  ", " ") for source, split, key in example]
            lines.append("  " + " = ".join(names))
    return [line for line in lines if line]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right; columns where nothing stands are left out."""
    kept = [column for column in zip(*rows, strict=True) if any(cell for cell in column[1:])]
    padded = []
    for number, column in enumerate(kept):
        width = max(map(len, column))
        left = number == 0 or column[0] == "split"
        padded.append([cell.ljust(width) if left else cell.rjust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def _duration(seconds: float) -> str:
    size, unit = (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{seconds / size:,.1f} {unit}"
