"""`pile prepare` reads public data sets without help: the documents are right, and everything else is counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from layouts import LAYOUTS, Expected, read_back, read_balance, shown

from pile_app.documents import Document
from pile_app.prepare.pipeline import prepare


@dataclass(frozen=True)
class Prepared:
    expected: Expected
    documents: dict[str, list[Document]]
    output: Path


@pytest.fixture(scope="module", params=LAYOUTS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    layout, folder = LAYOUTS[request.param], tmp_path_factory.mktemp("layout")
    (folder / "in").mkdir()
    expected = layout.write(folder / "in")
    prepare(folder / "in" / expected.input, folder / "out", processes=1, **layout.options)
    return Prepared(expected, read_back(folder / "out"), folder / "out")


def test_documents(prepared: Prepared) -> None:
    """Number of documents, segments in order, texts, labels, groups and split."""
    for split in ("train", "validation", "test"):
        expected = sorted(map(shown, getattr(prepared.expected, split)))
        assert sorted(map(shown, prepared.documents.get(split, []))) == expected, split


def test_balance(prepared: Prepared) -> None:
    """Samples read = documents + rejected; fields that no document holds and files that were not read are counted by name."""
    balance, expected = read_balance(prepared.output), prepared.expected
    assert balance.documents == sum(map(len, prepared.documents.values()))
    assert balance.documents == len(expected.train) + len(expected.validation) + len(expected.test)
    assert balance.rejected == expected.rejected
    assert balance.unused == expected.unused
    assert balance.unread == sorted(expected.unread)
