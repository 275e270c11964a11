"""Documents in a table that is searched by embedding, in LanceDB: embedded, on disk or in object storage (`s3://bucket/index`).

A row is a segment: its vector, what shows it on a page, and where it is from. Only the model that made the table adds to it or
searches it. Documents are identified by their shard (or file) and key; adding a document again replaces it.

Small tables are searched exactly, by comparing all vectors. From `APPROXIMATE_FROM` rows on the table has an HNSW index over
quantized vectors, whose best hits are compared again exactly; `recall_of_approximation` measures what it misses.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.documents import AUDIO, AUDIO_EXTENSIONS, IMAGE, IMAGE_EXTENSIONS, MODALITIES, TEXT, BadSample, Document, Segment
from pile_app.media import load_image
from pile_app.prepare.options import require
from pile_app.training.report import data_uri

if TYPE_CHECKING:
    from pile_app.tasks.embed import Embedder

TABLE = "media"
VERSION = 2
APPROXIMATE_FROM = 100_000  # rows
REFINE = 10  # times as many as asked for are compared again, exactly
CHECKED = 100  # vectors that the approximation is checked on
THUMBNAIL = 192  # pixels
MAX_SOUND_BYTES = 1 << 18  # larger sounds are not kept in the table: the row says where they are
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Hit:
    """A segment that was found: cosine similarity; key of its document, index in it, modality, shard or file; its text, or that
    of a medium's document; the medium to show (b"" for a text, or if it is large) and its extension."""

    similarity: float
    document: str
    segment: int
    modality: str
    origin: str
    text: str
    medium: bytes
    extension: str


class MediaIndex:
    """The table of a folder or URL, made if there is none and `is_new`. Raises ValueError if there is no table, another model
    made it, or LanceDB is not installed."""

    def __init__(self, uri: str, embedder: Embedder, is_new: bool = False) -> None:
        self.embedder = embedder
        if is_new and not _has_table(uri):
            metadata = {"version": VERSION, "fingerprint": embedder.fingerprint, "run": embedder.run}
            schema = make_schema(embedder.objective.dimensions, metadata)
            self.table = connect(uri).create_table(TABLE, schema=schema)
            return
        self.table, made_by = open_table(uri)
        if made_by["fingerprint"] != embedder.fingerprint:
            raise ValueError(
                f"the index {uri!r} was made by another model ({made_by['fingerprint']}, run {made_by['run']!r}; this model is "
                f"{embedder.fingerprint}), and embeddings of two models cannot be compared: give that run, or index elsewhere"
            )

    def __len__(self) -> int:
        return int(self.table.count_rows())

    def add(self, documents: Sequence[tuple[Document, str]]) -> tuple[int, int, list[BadSample]]:
        """Embed and write documents, each with its shard or file. Returns (rows, earlier rows that were replaced, reasons of
        skipped segments)."""
        import pyarrow

        latest = {f"{origin}#{document.key}": (document, origin) for document, origin in documents}
        if not latest:
            return 0, 0, []
        vectors, bad = self.embedder.segments([segment for document, _ in latest.values() for segment in document.segments])
        rows, number = [], 0
        for source, (document, origin) in latest.items():
            caption = " · ".join(_text_of(segment) for segment in document.segments if segment.modality == TEXT)
            for place, segment in enumerate(document.segments):
                if number not in bad:
                    row = make_row(document.key, place, segment, origin, caption)
                    rows.append(row | {"id": f"{source}#{place}", "source": source, "vector": vectors[number]})
                number += 1
        sources = ", ".join("'" + source.replace("'", "''") + "'" for source in latest)
        done = (
            self.table.merge_insert("id")
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(f"source IN ({sources})")
            .execute(pyarrow.Table.from_pylist(rows, schema=self.table.schema))
        )
        return len(rows), done.num_updated_rows + done.num_deleted_rows, list(bad.values())

    def finish(self, approximate_from: int = APPROXIMATE_FROM) -> float | None:
        """Compact the table, and index a large one. Returns the recall of the approximate search, None if it is exact."""
        from lancedb.index import BTree, HnswSq

        self.table.optimize()
        if len(self) < approximate_from:
            return None
        if not self.table.list_indices():
            self.table.create_index("vector", config=HnswSq(distance_type="cosine"))
            self.table.create_index("source", config=BTree())  # documents are looked up when they come again
        return self.recall_of_approximation()

    def recall_of_approximation(self, count: int = 10) -> float:
        """Fraction of the nearest `count` that the approximate search finds as well, over vectors of the table."""
        offsets = np.linspace(0, len(self) - 1, min(CHECKED, len(self)), dtype=int).tolist()
        some = self.table.take_offsets(offsets).select(["vector"]).to_arrow()["vector"].to_pylist()
        recalls = []
        for vector in some:
            query = np.array(vector, np.float32)
            exact, approximate = (
                {(hit.origin, hit.document, hit.segment) for hit in self.search(query, count, exact=is_exact)}
                for is_exact in (True, False)
            )
            recalls.append(len(exact & approximate) / len(exact))
        return float(np.mean(recalls))

    def find(self, query: Document, count: int, modality: str | None = None, exact: bool = False) -> list[Hit]:
        return self.search(self.embedder.documents([query])[0], count, modality, exact)

    def search(self, vector: np.ndarray, count: int, modality: str | None = None, exact: bool = False) -> list[Hit]:
        """Find the segments nearest to a vector (E,), the nearest first. `exact`: compare all, even if there is an index."""
        query = self.table.search(vector).distance_type("cosine").limit(count)
        query = query.bypass_vector_index() if exact else query.refine_factor(REFINE)
        if modality is not None:
            query = query.where(f"modality = '{modality}'")
        rows = query.select([*Hit.__dataclass_fields__.keys() - {"similarity"}, "_distance"]).to_list()
        return [Hit(1 - row.pop("_distance"), **row) for row in rows]


def connect(uri: str) -> Any:
    """Raises ValueError if LanceDB is not installed."""
    return require("lancedb", "search", "an index of media").connect(uri)


def _has_table(uri: str) -> bool:
    return TABLE in connect(uri).list_tables().tables


def open_table(uri: str) -> tuple[Any, dict[str, Any]]:
    """Open the table of an index, and read which model made it."""
    if not _has_table(uri):
        raise ValueError(f"there is no index at {uri!r}: make one with `pile index-media RUN SHARDS --output {uri}`")
    table = connect(uri).open_table(TABLE)
    found = (table.schema.metadata or {}).get(b"pile")
    metadata = json.loads(found) if found else {}
    if metadata.get("version") != VERSION:
        raise ValueError(f"the table {TABLE!r} at {uri!r} is not an index of this version of Pile: index again elsewhere")
    return table, dict(metadata)


def make_schema(dimensions: int, metadata: dict[str, Any]) -> Any:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "source", "document", "modality", "origin", "text", "extension")]
    columns = [*texts, ("segment", pa.int32()), ("medium", pa.binary()), ("vector", pa.list_(pa.float32(), dimensions))]
    return pa.schema(columns, metadata={"pile": json.dumps(metadata)})


def make_row(key: str, place: int, segment: Segment, origin: str, caption: str) -> dict[str, Any]:
    """Describe a segment; encoded segments are shown by the text of their document."""
    medium, extension = b"", segment.extension
    if segment.modality == IMAGE and not segment.is_encoded:
        medium, extension = thumbnail(segment.file), "webp"
    elif segment.modality == AUDIO and not segment.is_encoded and len(segment.file) <= MAX_SOUND_BYTES:
        medium = segment.file
    text = (_text_of(segment) if segment.modality == TEXT else caption)[:SHOWN_CHARACTERS]
    shown = {"text": text, "medium": medium, "extension": extension, "origin": origin}
    return {"document": key, "segment": place, "modality": MODALITIES[segment.modality]} | shown


def _text_of(segment: Segment) -> str:
    return "(encoded)" if segment.is_encoded else segment.text


def thumbnail(file: bytes) -> bytes:
    """Make a WebP of at most `THUMBNAIL` pixels a side, rotated as EXIF says, transparent where the image is."""
    image = load_image(file, THUMBNAIL)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(out := io.BytesIO(), "webp", quality=85)
    return out.getvalue()


# -- Queries and hits, for people


def read_query(query: str) -> Document:
    """Read the file that a query names by its extension, which has to exist; else the query is a text."""
    path = Path(query)
    extension = path.suffix.lower().removeprefix(".")
    if extension in (*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS):
        if not path.is_file():
            raise ValueError(f"there is no file {query!r} to search by")
        return Document((Segment(path.read_bytes(), extension),))
    if not query.strip():
        raise ValueError("the query is empty: give a text, an image or a sound")
    return Document((Segment(query),))


def format_hits(hits: Sequence[Hit]) -> str:
    """Write a line each: rank, similarity, modality, shard or file, key, text."""

    def where(hit: Hit) -> str:
        file = Path(hit.origin).name
        return file if file == hit.document else f"{file} {hit.document}"

    lines = [
        f"{rank:>3}  {hit.similarity:6.3f}  {hit.modality:<5}  {where(hit)}  {' '.join(hit.text.split())[:80]}".rstrip()
        for rank, hit in enumerate(hits, 1)
    ]
    return "\n".join(lines) or "nothing of that kind is in the index"


def show_hits(hits: Sequence[Hit]) -> str:
    """Make a card of HTML for each hit."""
    cards = []
    for rank, hit in enumerate(hits, 1):
        shown = show_medium(hit.modality, hit.extension, hit.medium) if hit.medium else ""
        note = "" if shown or hit.modality == "text" else f"<small>{hit.modality}, see {escape(hit.origin)}</small>"
        about = f"<b>{rank}</b> · {hit.similarity:.3f} · {hit.modality} · {escape(hit.document)}"
        about = f'<small title="{escape(hit.origin)}">{about}</small>'
        cards.append(f'<div class="card">{shown}{note}<pre>{escape(hit.text)}</pre>{about}</div>')
    return "".join(cards)


def show_medium(modality: str, extension: str, content: bytes) -> str:
    source = data_uri(f".{extension}", content)
    return f'<audio controls src="{source}"></audio>' if modality == "audio" else f'<img src="{source}" alt="image">'
