"""What a search found: a table for the terminal, and a page of pictures and players in one file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, MODALITIES, TEXT, Segment
from pile_app.tasks.media_index import Hit
from pile_app.training.report import PAGE, STYLE, data_uri

PAGE_STYLE = """
.card img{height:8rem;object-fit:contain;margin-bottom:.5rem;background:#fff}.card>small{display:block;overflow-wrap:anywhere}
"""


def read_query(query: str) -> Segment:
    """A file where the query names one, by its extension; else the text itself.

    Raises:
        ValueError: it reads like the name of a file, and there is none.
    """
    path = Path(query)
    extension = path.suffix.lower().removeprefix(".")
    if extension in (*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS):
        if not path.is_file():
            raise ValueError(f"there is no file {query!r} to search by")
        return Segment(path.read_bytes(), extension)
    if not query.strip():
        raise ValueError("the query is empty: give a text, an image or a sound")
    return Segment(query)


def format_hits(hits: Sequence[Hit]) -> str:
    """A line each: rank, similarity, modality, document, text."""
    if not hits:
        return "nothing of that kind is in the index"
    width = min(48, max(len(hit.document) for hit in hits))
    return "\n".join(
        f"{rank:>3}  {hit.similarity:6.3f}  {hit.modality:<5}  {hit.document:<{width}}  {' '.join(hit.text.split())[:80]}"
        for rank, hit in enumerate(hits, 1)
    )


def write_search_page(path: Path, title: str, query: Segment, hits: Sequence[Hit], among: int) -> None:
    """Writes the page. Nothing on it is loaded from elsewhere, and no script runs, whatever the index holds."""
    asked = ""
    if query.modality != TEXT:
        asked = f'<div class="card">{_medium(MODALITIES[query.modality], query.extension, query.file)}</div>'
    cards = "".join(_card(rank, hit) for rank, hit in enumerate(hits, 1))
    page = PAGE.format(
        title=escape(title),
        style=STYLE + PAGE_STYLE,
        status=f"<span>the nearest {len(hits)} of {among:,} texts, pictures and sounds</span>",
        links="",
        body=f'{asked}<h2>Found</h2><div class="grid">{cards}</div>',
    )
    path.write_text(page, "utf-8", errors="backslashreplace")


def _card(rank: int, hit: Hit) -> str:
    shown = _medium(hit.modality, hit.extension, hit.medium) if hit.medium else ""
    note = "" if shown or hit.modality == "text" else f"<small>{hit.modality}, see {escape(hit.origin)}</small>"
    about = f"<small><b>{rank}</b> · {hit.similarity:.3f} · {hit.modality} · {escape(hit.document)}</small>"
    return f'<div class="card">{shown}{note}<pre>{escape(hit.text)}</pre>{about}</div>'


def _medium(modality: str, extension: str, content: bytes) -> str:
    source = data_uri(f".{extension}", content)
    return f'<audio controls src="{source}"></audio>' if modality == "audio" else f'<img src="{source}" alt="image">'
