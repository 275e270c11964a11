"""An index of media: the nearest are found, documents replace each other, other models are kept out, pages run nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pile_app.documents import BadSample, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.tasks.embed import Embedder
from pile_app.tasks.media_index import Hit, MediaIndex, read_query, show_hits
from pile_app.tasks.retrieval import Contrastive

pytest.importorskip("lancedb", reason="extra `search`")
MakeImage = Callable[[int], Segment]


@pytest.fixture
def embedder(tiny_model: Callable[..., FusedLanguageModel]) -> Embedder:
    model, objective = tiny_model(), Contrastive(dimensions=8)
    objective.build(model)
    return Embedder(model, objective, context=64, batch_tokens=100)


def test_documents_of_any_modality_are_embedded_whatever_they_are_batched_with(
    embedder: Embedder, image: MakeImage, sound: Callable[..., Segment]
) -> None:
    segments = [Segment("a" * n) for n in range(1, 20)] + [image(1), sound(1), sound(2, 4000)]
    together, bad = embedder.segments(segments)
    assert not bad
    for number in (0, 11, 19, 20, 21):
        np.testing.assert_allclose(embedder.segments([segments[number]])[0][0], together[number], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    mean = together[[0, 19]].mean(0)
    pooled = embedder.documents([Document((segments[0], image(1)))])[0]
    np.testing.assert_allclose(pooled, mean / np.linalg.norm(mean), atol=1e-5)


def test_what_cannot_be_embedded_is_named_and_a_long_text_is_read_from_its_beginning(
    embedder: Embedder, sound: Callable[..., Segment]
) -> None:
    damaged, long = Segment(b"no image", "png"), sound(1, 80_000)
    vectors, bad = embedder.segments([damaged, Segment("b" * 60), Segment("b" * 900), long])
    assert {number: error.reason for number, error in bad.items()} == {0: "undecodable_image", 3: "longer_than_context"}
    assert not vectors[[0, 3]].any() and vectors[1].any()
    assert abs(vectors[1] @ vectors[2]) > 0.99
    with pytest.raises(BadSample, match="undecodable_image"):
        embedder.documents([Document((damaged,))])


def test_search_returns_the_exact_neighbours_and_a_key_that_comes_again_replaces(
    embedder: Embedder, image: MakeImage, tmp_path: Path
) -> None:
    index = MediaIndex(str(tmp_path / "index"), embedder, is_new=True)
    documents = [Document((image(n), Segment(f"it's number {n}")), f"it's/{n}") for n in range(30)]
    assert index.add([(document, "a.tar") for document in documents])[:2] == (60, 0)
    vectors, _ = embedder.segments([segment for document in documents for segment in document.segments])
    query = embedder.documents([Document((Segment("number 7"),))])[0]
    order = np.argsort(-(vectors @ query), kind="stable")
    found = index.search(query, 10)
    assert [(hit.document, hit.segment) for hit in found] == [(f"it's/{n // 2}", n % 2) for n in order[:10]]
    np.testing.assert_allclose([hit.similarity for hit in found], (vectors @ query)[order[:10]], atol=1e-5)
    images = index.search(query, 5, "image")
    assert [hit.document for hit in images] == [f"it's/{n // 2}" for n in order if n % 2 == 0][:5]
    assert images[0].text.startswith("it's number") and images[0].medium[8:12] == b"WEBP"

    again = [Document((Segment("other"),), "it's/3"), Document((Segment("new"),), "new"), Document((Segment("newer"),), "new")]
    assert index.add([(document, "a.tar") for document in again])[:2] == (2, 2)
    assert len(index) == 60
    new = [hit for hit in index.search(query, 60) if hit.document in ("it's/3", "new")]
    assert sorted((hit.document, hit.text) for hit in new) == [("it's/3", "other"), ("new", "newer")]


def test_keys_of_another_shard_replace_nothing(embedder: Embedder, tmp_path: Path) -> None:
    """Every `pile prepare` begins at the key 0000000-000000: a second folder replaced the first."""
    index = MediaIndex(str(tmp_path / "index"), embedder, is_new=True)
    for origin in ("/data/cats/x-000000.tar", "/data/dogs/x-000000.tar", "/data/cats/x-000000.tar"):
        index.add([(Document((Segment(f"{origin} {n}"),), f"0000000-{n:06d}"), origin) for n in range(5)])
    assert len(index) == 10
    hits = index.find(Document((Segment("/data/dogs/x-000000.tar 3"),)), 1)
    assert (hits[0].origin, hits[0].document) == ("/data/dogs/x-000000.tar", "0000000-000003")


def test_an_approximate_index_is_checked_against_the_exact_search(embedder: Embedder, tmp_path: Path) -> None:
    index = MediaIndex(str(tmp_path / "index"), embedder, is_new=True)
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (300, 6))
    index.add([(Document((Segment("".join(row)),), f"{n}"), "") for n, row in enumerate(letters)])
    assert index.finish() is None and not index.table.list_indices()
    recall = index.finish(approximate_from=300)
    assert recall is not None and recall > 0.95
    assert len(index.table.list_indices()) == 2
    index.add([(Document((Segment("later"),), "later"), "")])
    later = embedder.documents([Document((Segment("later"),))])[0]
    assert index.search(later, 1)[0].document == "later"  # what came after the index was made is found, too


def test_an_index_refuses_another_model(embedder: Embedder, tmp_path: Path) -> None:
    uri = str(tmp_path / "index")
    with pytest.raises(ValueError, match=r"no index at .*: make one with `pile index-media"):
        MediaIndex(uri, embedder)
    embedder.run = "runs/a"
    MediaIndex(uri, embedder, is_new=True)
    MediaIndex(uri, embedder)
    with torch.no_grad():
        embedder.objective.projections[1].weight[0, 0] += 1e-3
    for is_new in (False, True):
        with pytest.raises(ValueError, match=r"made by another model .*'runs/a'"):
            MediaIndex(uri, embedder, is_new)


def test_hits_carry_their_media_and_run_nothing_that_an_index_holds(image: MakeImage) -> None:
    evil = '<script>alert("x")</script>'
    hits = [
        Hit(0.5, evil, 0, "image", "a.tar", evil, image(1).file, "png"),
        Hit(0.4, "b", 1, "audio", evil, "far", b"", "flac"),
        Hit(0.3, "c", 1, "audio", "c", "near", b"RIFF", "ogg"),
    ]
    shown = show_hits(hits)
    assert "<script" not in shown and shown.count("&lt;script&gt;alert") == 4
    assert shown.count("data:image/png;base64,") == 1 and shown.count('<audio controls src="data:audio/ogg;base64,') == 1
    assert "http://" not in shown and "https://" not in shown


def test_a_query_is_a_text_or_the_file_that_it_names(image: MakeImage, tmp_path: Path) -> None:
    (tmp_path / "a.PNG").write_bytes(image(1).file)
    assert read_query("a red fish").segments[0].text == "a red fish"
    assert read_query(str(tmp_path / "a.PNG")).segments[0].extension == "png"
    with pytest.raises(ValueError, match=r"no file 'bark\.wav'"):
        read_query("bark.wav")
