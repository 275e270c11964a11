"""Documents on a page, to look at and listen to.

Its media lie beside it. A policy sees to it that nothing else is loaded, and that no script of a sample runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pile_app.documents import MODALITIES, TEXT, BadSample, Segment
from pile_app.training.report import STYLE, medium

Decode = Callable[[Segment], Segment | None]  # an encoded segment -> text or medium, None where that cannot be

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta
http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:;
media-src 'self' file:"><title>{title}</title><style>{style}</style><h1>{title}</h1><p class="soft">{status}</p>{body}</html>
"""
PAGE_STYLE = """
.documents{--least:24rem}.card>small{display:block;margin-bottom:.5rem;overflow-wrap:anywhere}.segment{margin:.45rem 0}
.segment>small{display:block}.away{opacity:.5}.bad{color:var(--c1)}.segment img{max-height:16rem}figure.sound img{height:3.5rem}
"""
SHOWN_CHARACTERS = 20_000  # of a text


def describe_segment(segment: Segment, path: Path, decode: Decode, hidden: bool = False) -> dict[str, Any]:
    """{"modality", "text" | "file" | "note", "hidden", "learned"}. A medium is written to `path` and its extension as it is
    stored; what is encoded, as what it decodes to."""
    entry: dict[str, Any] = {"modality": MODALITIES[segment.modality], "hidden": hidden, "learned": segment.loss and not hidden}
    if segment.is_encoded:
        try:
            decoded = decode(segment)
        except BadSample as error:
            return entry | {"note": str(error)}
        if decoded is None:
            return entry | {"note": f"encoded as {len(segment.file):,} bytes of codes, which only the model's run can decode"}
        segment = decoded
    if segment.modality == TEXT:
        return entry | {"text": segment.text}
    path = path.with_name(f"{path.name}.{segment.extension}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(segment.file)
    return entry | {"file": path.name}


def write_page(
    title: str, notes: Sequence[str], groups: Iterable[tuple[str, Sequence[Mapping[str, Any]]]], folder: Path, media: str = ""
) -> None:
    """Writes `folder/documents.html`.

    Args:
        groups: (heading, documents) each; a document has a "key", "facts", "segments" (see `describe_segment`) and "rejected".
        media: folder of the media, within `folder`.
    """
    body = ""
    for heading, documents in groups:
        cards = "".join(_card(one, folder / media, media) for one in documents)
        body += f'<h2>{escape(heading)}</h2><div class="grid documents">{cards}</div>'
    status = "".join(f"<span>{escape(note)}</span>" for note in notes)
    page = PAGE.format(title=escape(title), style=STYLE + PAGE_STYLE, status=status, body=body)
    (folder / "documents.html").write_text(page, "utf-8", errors="backslashreplace")


def state_of(segment: Mapping[str, Any]) -> str:
    """Whether the model saw and learned a segment, in words; "" where it did both."""
    return "hidden" if segment["hidden"] else "" if segment["learned"] else "given, not learned"


def _card(one: Mapping[str, Any], folder: Path, media: str) -> str:
    card = f"<small><b>{escape(one['key'])}</b> {escape(one['facts'])}</small>"
    if one["rejected"]:
        card += f'<small class="bad">{escape(one["rejected"]["reason"])}: {escape(one["rejected"]["detail"])}</small>'
    for segment in one["segments"]:
        state = state_of(segment)
        note = f"<small>{escape(state)}</small>" if state else ""
        card += f'<div class="segment{" away" * segment["hidden"]}">{note}{_shown(segment, folder, media)}</div>'
    return f'<div class="card">{card}</div>'


def _shown(segment: dict[str, Any], folder: Path, media: str) -> str:
    if "text" in segment:
        text = segment["text"]
        more = f"\n... and {len(text) - SHOWN_CHARACTERS:,} more characters" if len(text) > SHOWN_CHARACTERS else ""
        return medium({"text": text[:SHOWN_CHARACTERS] + more}, folder)
    if "note" in segment:
        return f'<small class="bad">{escape(segment["modality"])}: {escape(segment["note"])}</small>'
    link = escape(quote(f"{media}/{segment['file']}" if media else segment["file"]))
    return medium(segment, folder, link, least=120)
