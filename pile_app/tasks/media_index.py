"""Documents in a table that is searched by embedding, in LanceDB: embedded, on disk or in object storage (`s3://bucket/index`).

A row is a segment: its vector, what shows it on a page, and where it is from. The table says in its metadata by which model it
was made; no other adds to it or searches it. A document that comes again, by its key, replaces what was there, in one version
of the table.

Small tables are searched exactly, by comparing all. From `APPROXIMATE_FROM` rows on the table has an index (HNSW over scalar-
quantized vectors, the nearest ones compared again as they are), and `recall_of_approximation` says what that misses.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, BadSample, Document, Segment
from pile_app.media import load_image
from pile_app.prepare.options import require

if TYPE_CHECKING:
    import pyarrow

    from pile_app.tasks.embed import Embedder

TABLE = "media"
VERSION = 1
APPROXIMATE_FROM = 100_000  # rows
REFINE = 10  # times as many as asked for are compared again, exactly
CHECKED = 100  # vectors that the approximation is checked on
THUMBNAIL = 192  # pixels
MAX_SOUND_BYTES = 1 << 18  # larger ones are not kept in the table: the row says where they are
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Hit:
    """What was found: cosine similarity, document, number and modality of the segment, shard or file it is from, its text, or
    that of a medium's document; the medium to show (b"" of a text, or where it is large) and its extension."""

    similarity: float
    document: str
    segment: int
    modality: str
    origin: str
    text: str
    medium: bytes
    extension: str


class MediaIndex:
    """The table of a folder or URL.

    Args:
        uri: of the database.
        embedder: the model that makes its vectors.
        is_new: make it where there is none.
        run: folder of the model's run, which a new index remembers.

    Raises:
        ValueError: there is none, or another model made it; or LanceDB is not installed.
    """

    def __init__(self, uri: str, embedder: Embedder, is_new: bool = False, run: str = "") -> None:
        fingerprint = embedder.fingerprint
        database = connect(uri)
        if TABLE in database.list_tables().tables:
            self.table = database.open_table(TABLE)
            made_by = read_metadata(self.table, uri)
            if made_by["fingerprint"] != fingerprint:
                raise ValueError(
                    f"the index {uri!r} was made by another model ({made_by['fingerprint']}, run {made_by['run']!r}; this one "
                    f"is {fingerprint}): embeddings of two models cannot be compared. Give that run, or index anew elsewhere"
                )
        elif is_new:
            metadata = {"version": VERSION, "fingerprint": fingerprint, "run": run}
            schema = make_schema(embedder.objective.dimensions, metadata)
            self.table = database.create_table(TABLE, schema=schema)
        else:
            raise ValueError(f"there is no index at {uri!r}: make one with `pile index-media RUN SHARDS --output {uri}`")
        self.embedder = embedder

    def __len__(self) -> int:
        return int(self.table.count_rows())

    def add(self, documents: Sequence[tuple[Document, str]]) -> tuple[int, int, list[BadSample]]:
        """Embeds and writes (document, shard or file it is from) each; of two with one key the last stays. Returns (rows, rows
        that went for them, why segments were left out)."""
        import pyarrow

        latest = {document.key: (document, origin) for document, origin in documents}
        segments = [segment for document, _ in latest.values() for segment in document.segments]
        vectors, bad = self.embedder.segments(segments)
        rows, number = [], 0
        for document, origin in latest.values():
            caption = " · ".join(_text_of(segment) for segment in document.segments if segment.modality == TEXT)
            for place, segment in enumerate(document.segments):
                if number not in bad:
                    rows.append(make_row(document.key, place, segment, origin, caption, vectors[number]))
                number += 1
        keys = ", ".join("'" + key.replace("'", "''") + "'" for key in latest)
        data = pyarrow.Table.from_pylist(rows, schema=self.table.schema)
        done = (
            self.table.merge_insert("id")
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(f"document IN ({keys})")
            .execute(data)
        )
        return len(rows), done.num_updated_rows + done.num_deleted_rows, list(bad.values())

    def finish(self, approximate_from: int = APPROXIMATE_FROM) -> float | None:
        """Compacts the table, and indexes a large one. Returns the recall of the approximate search, None where it is exact."""
        from lancedb.index import BTree, HnswSq

        self.table.optimize()
        if len(self) < approximate_from:
            return None
        if not self.table.list_indices():
            self.table.create_index("vector", config=HnswSq(distance_type="cosine"))
            self.table.create_index("document", config=BTree())  # documents are looked for when they come again
        return self.recall_of_approximation()

    def recall_of_approximation(self, count: int = 10) -> float:
        """Share of the nearest `count` that the approximate search finds, too, over vectors of the table."""
        places = np.linspace(0, len(self) - 1, min(CHECKED, len(self)), dtype=int).tolist()
        some = self.table.take_offsets(places).select(["vector"]).to_arrow()["vector"].to_pylist()
        shares = []
        for vector in some:
            exact, approximate = (
                {(hit.document, hit.segment) for hit in self.search(np.array(vector, np.float32), count, exact=exact)}
                for exact in (True, False)
            )
            shares.append(len(exact & approximate) / len(exact))
        return float(np.mean(shares))

    def search(self, vector: np.ndarray, count: int, modality: str | None = None, exact: bool = False) -> list[Hit]:
        """The nearest segments, the nearest first.

        Args:
            vector: (E,).
            count: how many.
            modality: text, image or audio alone; None: all.
            exact: compare all, whatever index there is.
        """
        query = self.table.search(vector).distance_type("cosine").limit(count)
        query = query.bypass_vector_index() if exact else query.refine_factor(REFINE)
        if modality is not None:
            query = query.where(f"modality = '{modality}'")
        rows = query.select([*Hit.__dataclass_fields__.keys() - {"similarity"}, "_distance"]).to_list()
        return [Hit(1 - row.pop("_distance"), **row) for row in rows]


def connect(uri: str) -> Any:
    """Raises ValueError where LanceDB is not installed."""
    return require("lancedb", "search", "an index of media").connect(uri)


def run_of_index(uri: str) -> str:
    """The run that made an index."""
    database = connect(uri)
    if TABLE not in database.list_tables().tables:
        raise ValueError(f"there is no index at {uri!r}: make one with `pile index-media RUN SHARDS --output {uri}`")
    return str(read_metadata(database.open_table(TABLE), uri)["run"])


def read_metadata(table: Any, uri: str) -> dict[str, Any]:
    """What the table says of its model."""
    found = (table.schema.metadata or {}).get(b"pile")
    metadata = json.loads(found) if found else {}
    if metadata.get("version") != VERSION:
        raise ValueError(f"the table {TABLE!r} at {uri!r} is not an index of this version of Pile: index anew elsewhere")
    return dict(metadata)


def make_schema(dimensions: int, metadata: dict[str, Any]) -> pyarrow.Schema:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "document", "modality", "origin", "text", "extension")]
    columns = [*texts, ("segment", pa.int32()), ("medium", pa.binary()), ("vector", pa.list_(pa.float32(), dimensions))]
    return pa.schema(columns, metadata={"pile": json.dumps(metadata)})


def make_row(key: str, place: int, segment: Segment, origin: str, caption: str, vector: np.ndarray) -> dict[str, Any]:
    """Of a segment. What came encoded is shown by the text of its document alone."""
    medium, extension = b"", segment.extension
    if segment.modality == IMAGE and not segment.is_encoded:
        medium, extension = thumbnail(segment.file), "webp"
    elif segment.modality == AUDIO and not segment.is_encoded and len(segment.file) <= MAX_SOUND_BYTES:
        medium = segment.file
    text = _text_of(segment) if segment.modality == TEXT else caption
    return {
        "id": f"{key}#{place}",
        "document": key,
        "segment": place,
        "modality": MODALITIES[segment.modality],
        "origin": origin,
        "text": text[:SHOWN_CHARACTERS],
        "medium": medium,
        "extension": extension,
        "vector": vector,
    }


def _text_of(segment: Segment) -> str:
    return "(encoded)" if segment.is_encoded else segment.text


def thumbnail(file: bytes) -> bytes:
    """Make a WebP of at most `THUMBNAIL` pixels a side, rotated as EXIF says, transparent where the image is."""
    image = load_image(file, THUMBNAIL)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(out := io.BytesIO(), "webp", quality=85)
    return out.getvalue()
