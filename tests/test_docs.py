"""Code in the documents runs, and their links lead to existing files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from pile_app.data.shards import Shards, write_shards
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.fields import Fields

PAGES = sorted((REPOSITORY / "docs").glob("*.md"))


def test_the_example_writer_writes_a_shard_that_is_read_as_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "data-format.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    shards = Shards("mine-000000.tar")
    assert not shards.balance()["rejected"] and [shards.key(n) for n in range(3)] == ["000000", "000001", "000002"]
    document = shards.document(2)
    assert [segment.modality for segment in document.segments] == [TEXT, IMAGE, AUDIO]
    assert document.ordered and document.segments[0].text == "tone 2" and document.meta == {"number": 2}
    assert shards.index(0).segment_size.tolist() == [6, 32 * 32, 8000] * 3


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_and_named_tests_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("page", ["data-format", "prepare"])
def test_field_maps_on_the_pages_are_valid(page: str) -> None:
    text = (REPOSITORY / "docs" / f"{page}.md").read_text().replace("\\|", "|")
    shown = re.findall(r"`(\[[a-z{].*?\])`|^--fields '(.*?)'|fields: (\[.*\])[},]", text, re.MULTILINE)
    assert len(shown) > 5
    for spec in map("".join, shown):
        Fields.parse(spec)


def test_the_readme_trains_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert "max_steps=1000" in example
    write_shards(
        (Document((Segment("once upon a time " * 20),), str(n)) for n in range(40)), tmp_path / "shards/mine", "x-train"
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace("max_steps=1000", "max_steps=2, accelerator='cpu'"), names)
    assert names["module"].global_step == 2
