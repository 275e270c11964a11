"""Published layouts of named entities: how they are read, repaired and rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_app.data.shards import Shards
from pile_app.documents import BadSample, Document
from pile_app.prepare.listing import Listing, Record
from pile_app.prepare.options import Options
from pile_app.prepare.pipeline import prepare
from pile_app.prepare.readers import read_unit

CONLL = "-DOCSTART- -X- O O\n\nU.N. NNP I-NP I-ORG\nofficial NN I-NP O\nEkeus NNP I-NP I-PER\n\t\nWien\tB-LOC\nWien\tI-LOC\n"


def found(folder: Path, name: str, data: str, **options: Any) -> list[Record]:
    (folder / name).write_text(data)
    chosen = Options(**options)
    return [one for unit in Listing(str(folder / name), chosen).units() for one in read_unit(unit, chosen)]


def entities(one: Record) -> list[tuple[str, str]]:
    assert isinstance(one.content, Document), one.content
    text = one.content.segments[0].text
    return [(text[start:stop], name) for start, stop, name in one.content.meta["spans"]]


def reasons(given: list[Record]) -> list[str]:
    return [one.content.reason for one in given if isinstance(one.content, BadSample)]


def test_conll_files_of_every_scheme_become_the_same_documents(tmp_path: Path) -> None:
    written = {
        "bio": "New B-LOC\nYork I-LOC\nAda B-PER\nBob B-PER\nran O\n\nAda B-PER\n",
        "iob1": "New I-LOC\nYork I-LOC\nAda I-PER\nBob B-PER\nran O\n\nAda I-PER\n",
        "bioes": "New B-LOC\nYork E-LOC\nAda S-PER\nBob S-PER\nran O\n\nAda S-PER\n",
        "bilou": "New B-LOC\nYork L-LOC\nAda U-PER\nBob U-PER\nran O\n\nAda U-PER\n",
    }
    for scheme, data in written.items():
        one, other = found(tmp_path, f"{scheme}.conll", data)
        assert entities(one) == [("New York", "LOC"), ("Ada", "PER"), ("Bob", "PER")], scheme
        assert (entities(other), one.layout, other.where) == ([("Ada", "PER")], "CoNLL", f"{scheme}.conll:7")
        assert isinstance(one.content, Document) and one.content.meta["words"][1:3] == [[4, 8], [9, 12]]


def test_columns_document_starts_and_wrong_lines_of_conll(tmp_path: Path) -> None:
    one, other = found(tmp_path, "a.conll", CONLL)
    assert entities(one) == [("U.N.", "ORG"), ("Ekeus", "PER")] and entities(other) == [("Wien Wien", "LOC")]
    first, second, third, fourth = found(tmp_path, "b.conll", "a O\nb\n\nc X-LOC\n\nI I-LOC\n\nd B-LOC\n")
    assert reasons([first, second]) == ["no_tag", "unknown_tag"]
    assert (entities(third), third.layout, fourth.layout) == ([("I", "LOC")], "CoNLL, fixed", "CoNLL")


def test_spans_of_records_are_checked_and_repaired(tmp_path: Path) -> None:
    text = "Ada saw New York-based Bob"
    records: list[dict[str, Any]] = [
        {"text": text, "spans": [{"start": 8, "end": 16, "label": "LOC"}, {"start": 0, "end": 3, "label": "PER"}]},
        {"text": text, "entities": [[0, 4, "PER"]]},  # with the blank behind it
        {"text": text, "entities": [[0, 99, "PER"]]},
        {"text": text, "entities": [[3, 3, "PER"]]},
        {"text": text, "entities": [[0, 7, "PER"], [4, 7, "ACT"]]},
        {"text": "e\u0301te\u0301 in Li\u0301on  \r\nx", "entities": [[9, 14, "LOC"]]},  # cleaning composes and cuts
        {"text": text, "entities": []},
        {"text": "\0", "entities": [[0, 1, "LOC"]]},  # cleaning leaves nothing
    ]
    given = found(tmp_path, "a.jsonl", "".join(json.dumps(record) + "\n" for record in records), kind="entities")
    assert reasons(given) == ["invalid_span", "invalid_span", "overlapping_spans"]
    whole, trimmed, composed, none, _ = (one for one in given if isinstance(one.content, Document))
    assert entities(whole) == [("Ada", "PER"), ("New York-based", "LOC")] and whole.layout.endswith("fixed")
    assert entities(trimmed) == [("Ada", "PER")] and trimmed.layout == "entities (JSON lines), fixed"
    assert entities(composed) == [("Líon", "LOC")] and composed.layout == "entities (JSON lines)"
    assert isinstance(composed.content, Document) and composed.content.segments[0].text == "été in Líon\nx"
    assert entities(none) == []
    (plain,) = found(tmp_path, "b.jsonl", json.dumps({"text": "x", "entities": {"hashtags": []}}))
    assert plain.content == {"text": "x", "entities": {"hashtags": []}}
    assert reasons(found(tmp_path, "b.jsonl", json.dumps({"text": "x"}), kind="entities")) == ["no_spans"]


def test_token_lists_of_hugging_face_in_json_lines_and_parquet(tmp_path: Path) -> None:
    tokens, names = ["Ada", "in", "New", "York"], ["B-PER", "O", "B-LOC", "I-LOC"]
    wanted = [("Ada", "PER"), ("New York", "LOC")]
    lines = [{"tokens": tokens, "ner_tags": names}, {"tokens": tokens, "tags": [1, 0, 2, 3]}, {"tokens": tokens, "tags": ["O"]}]
    given = found(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert entities(given[0]) == wanted and reasons(given) == ["unknown_tag", "no_tag"]
    features = {"ner_tags": {"feature": {"names": ["O", "B-PER", "B-LOC", "I-LOC"], "_type": "ClassLabel"}}}
    table = pa.table({"tokens": [tokens], "ner_tags": [[1, 0, 2, 3]]})
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "b.parquet")
    options = Options(kind="entities")
    (one,) = (one for unit in Listing(str(tmp_path / "b.parquet"), options).units() for one in read_unit(unit, options))
    assert entities(one) == wanted and one.layout == "entities (Parquet)"


def test_prepare_writes_entities_to_shards_and_counts_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.conll").write_text(CONLL + "\nx Q-LOC\n\nI I-PER\n\nx\u0301 B-PER\n")
    prepare(tmp_path / "in", tmp_path / "out", kind="entities", validation_fraction=0.0, processes=1)
    said = capsys.readouterr().err
    assert "2 CoNLL, fixed" in said or "CoNLL, fixed" in said, said
    assert "1 unknown_tag" in said
    (shard,) = (tmp_path / "out").glob("*.tar")
    texts = list(Shards(str(shard)))
    spans = {one.segments[0].text: one.meta["spans"] for one in texts}
    assert spans["Wien Wien"] == [[0, 9, "LOC"]] and spans["x\u0301"] == [[0, 2, "PER"]]
