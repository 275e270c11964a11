"""Named entities: a tagger cannot give tags that are none, counts as seqeval counts, and learns from a trained model on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyRun, train
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import classification_report as seqeval_report
from seqeval.metrics import f1_score, precision_score, recall_score

from pile_app.cli import main as pile
from pile_app.data.assembly import assemble, whole
from pile_app.documents import Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.prepare.entities import spans_of_tags
from pile_app.prepare.pipeline import prepare
from pile_app.tasks.tagging import EntityScores, LinearChain, Span, TagAnnotator, Tagged, as_inline, as_record, gather_words

TYPES = ["person", "place"]
NAMES = ["O", "B-person", "I-person", "B-place", "I-place"]

CONFIG = """
model:
  codec_steps: 0
  objective:
    class_path: pile_app.tasks.tagging.Tagging
    init_args: {{types: [person, place], width: 16, dropout: 0.1, learning_rate: 0.02}}
  optimizer: {{name: adamw, learning_rate: 0.003}}
data:
  sources: {{tagged: {{train: "{shards}/*-train-*.tar", validation: "{shards}/*-validation-*.tar"}}}}
trainer: {{max_steps: 60, val_check_interval: 30, callbacks: []}}
monitor: validation/f1
monitor_mode: max
"""


def random_chain(seed: int, scale: float) -> LinearChain:
    torch.manual_seed(seed)
    chain = LinearChain(len(TYPES))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return chain


@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([1.0, 1e4]))
def test_no_weights_decode_to_tags_that_are_not_bio(seed: int, words: int, scale: float) -> None:
    chain = random_chain(seed, scale)
    lengths = torch.randint(1, words + 1, (3,))
    lengths[0] = words
    tags = chain.decode(scale * torch.randn(3, words, len(NAMES)), lengths)
    for row, length in zip(tags.tolist(), lengths.tolist(), strict=True):
        assert spans_of_tags([NAMES[tag] for tag in row[:length]])[1] == 0
        assert not any(row[length:])


def test_the_chain_sums_and_decodes_over_all_sequences() -> None:
    chain = random_chain(0, 1.0)
    emissions, lengths = torch.randn(2, 3, 5), torch.tensor([3, 2])
    tags = torch.tensor([[0, 1, 2], [3, 4, 0]])
    first, step = (scores.detach() for scores in chain._scores())
    found = chain.decode(emissions, lengths)
    for row, length in enumerate(lengths.tolist()):

        def score(path: tuple[int, ...], row: int = row) -> float:
            steps = sum(float(step[a, b]) for a, b in itertools.pairwise(path))
            own = sum(float(emissions[row, word, tag]) for word, tag in enumerate(path))
            return float(first[path[0]]) + own + steps + float(chain.last.detach()[path[-1]])

        paths = list(itertools.product(range(5), repeat=length))
        total = torch.logsumexp(torch.tensor([score(path) for path in paths]), 0)
        gold = score(tuple(tags[row, :length].tolist()))
        assert chain(emissions, tags, lengths)[row].item() == pytest.approx(float(total) - gold, abs=1e-4)
        assert tuple(found[row, :length].tolist()) == max(paths, key=score)


def bio(rng: np.random.Generator, words: int) -> list[int]:
    tags: list[int] = []
    while len(tags) < words:
        kind, size = int(rng.integers(0, 4)), int(rng.integers(1, 4))
        tags += [0] * size if kind > 1 else [1 + 2 * kind] + [2 + 2 * kind] * (size - 1)
    return tags[:words]


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_scores_are_those_of_seqeval(seed: int, words: int) -> None:
    rng = np.random.default_rng(seed)
    gold, found = ([bio(rng, words) for _ in range(4)] for _ in range(2))
    found[0] = gold[0]
    scores = EntityScores(len(TYPES))
    for part in (slice(0, 2), slice(2, 4)):
        scores.update(torch.tensor(found[part]), torch.tensor(gold[part]))
    values = scores.compute()
    named = [[[NAMES[tag] for tag in tags] for tags in rows] for rows in (gold, found)]
    for name, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert values[name].item() == pytest.approx(function(*named, zero_division=0))
    by_type = seqeval_report(*named, output_dict=True, zero_division=0)
    for number, kind in enumerate(TYPES):
        if kind in by_type:
            assert values["f1_by_type"][number].item() == pytest.approx(by_type[kind]["f1-score"])
            assert values["count_by_type"][number].item() == by_type[kind]["support"]


def test_a_word_is_its_last_token_and_the_mean_of_its_own(tiny_model: Callable[..., FusedLanguageModel]) -> None:
    model = tiny_model()
    one = Document((Segment("Ada in York"),), "a", meta={"spans": [[0, 3, "person"], [7, 11, "place"]]})
    other = Document((Segment("é b"),), "b", meta={"spans": [], "words": [[0, 1], [2, 3]]})
    pack = [whole(one, 14), whole(other, 7)]
    batch = assemble([pack], model.vocabulary, model.tokenizer, 24, annotator=TagAnnotator(TYPES))
    placed = {place: label for place, label in enumerate(batch.labels[0].tolist()) if label >= 0}
    assert placed == {4: 1, 7: 0, 12: 3, 17: 0, 19: 0}
    _, hidden = model.read(batch)
    words = gather_words(hidden, batch)
    assert words.tags.tolist() == [[1, 0, 3], [0, 0, 0]] and words.lengths.tolist() == [3, 2]
    torch.testing.assert_close(words.features[0, 2], torch.cat([hidden[0, 12], hidden[0, 8:13].mean(0)]))
    torch.testing.assert_close(words.features[1, 0], torch.cat([hidden[0, 17], hidden[0, 15:18].mean(0)]))
    batch.labels[0, 4] = 2  # as in a piece that begins within an entity
    assert gather_words(hidden, batch).tags[0].tolist() == [1, 0, 3]


def test_documents_that_are_not_tagged_are_named(tiny_model: Callable[..., FusedLanguageModel]) -> None:
    model = tiny_model()
    for document, message in (
        (Document((Segment("Ada"),), "7"), "'7' is not tagged"),
        (Document((Segment("Ada"),), "8", meta={"spans": [[0, 3, "thing"]]}), "'8': .* has the type 'thing'"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble([[whole(document, 6)]], model.vocabulary, model.tokenizer, 16, annotator=TagAnnotator(TYPES))


HOSTILE = Tagged("<b>Ada</b> & [Bob]", [Span(3, 6, "person"), Span(13, 18, "<i>")])


def test_texts_are_shown_with_their_entities() -> None:
    assert as_inline(HOSTILE) == "<b>[Ada|person]</b> & [[Bob]|<i>]"
    assert as_record(HOSTILE)["spans"][0] == {"start": 3, "end": 6, "label": "person", "text": "Ada"}


PEOPLE, PLACES, OTHERS = ("Ada", "Bo", "Cy Dee"), ("Oslo", "New Ur", "Rom"), ("saw", "the", "in", "of")


def sentence(number: int) -> str:
    """CoNLL lines of five words or names."""
    rng = np.random.default_rng(number)
    lines = []
    for _ in range(5):
        kind = int(rng.integers(0, 4))
        words = str(rng.choice((PEOPLE, PLACES, OTHERS, OTHERS)[kind])).split()
        name = ("person", "place", "", "")[kind]
        lines += [f"{word} {'IB'[place == 0] + '-' + name if name else 'O'}" for place, word in enumerate(words)]
    return "\n".join(lines) + "\n\n"


def test_a_trained_model_learns_to_tag_and_tags_texts_and_files(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.conll").write_text("".join(map(sentence, range(200))))
    prepare(tmp_path / "names.conll", tmp_path / "shards", kind="entities", validation_fraction=0.1, processes=1)
    config = tmp_path / "task.yaml"
    config.write_text(CONFIG.format(shards=tmp_path / "shards"))
    command = ("--config", tiny_run.folder / "config.yaml", "--config", config, "--model.start_from", tiny_run.folder)
    train(*command, "--name", "task", "--runs", tmp_path, "--wandb", "null", cwd=tmp_path)
    summary = json.loads((tmp_path / "task" / "summary.json").read_text())
    assert summary["f1"] > 0.95 and summary["person_f1"] > 0.9, summary
    table = json.loads((tmp_path / "task" / "entities.json").read_text())
    assert table["place"]["count"] > 5 and table["place"]["f1"] == pytest.approx(summary["place_f1"])

    capsys.readouterr()
    long = " ".join(["the Bo saw New Ur ."] * 20)  # three times the context
    pile(["tag", str(tmp_path / "task"), "--text", "Ada saw New Ur", "--text", long])
    short, cut = capsys.readouterr().out.splitlines()
    assert short == "[Ada|person] saw [New Ur|place]"
    assert cut.count("[New Ur|place]") + cut.count("[Bo|person]") > 36
    assert cut.replace("|place]", "").replace("|person]", "").replace("[", "") == long

    gold = [line for number in range(300, 320) for line in sentence(number).splitlines()]
    (tmp_path / "new.conll").write_text("\n".join(gold) + "\n")
    pile(["tag", str(tmp_path / "task"), str(tmp_path / "new.conll"), "--format", "json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"].split() for record in records] == [
        [line.split()[0] for line in sentence(number).splitlines() if line] for number in range(300, 320)
    ]
    assert {one["text"] for record in records for one in record["spans"] if one["label"] == "place"} >= set(PLACES)
