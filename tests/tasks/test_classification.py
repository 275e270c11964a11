"""Labelled documents: which places are labelled, and that a run learns to tell them apart from a trained model on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TinyRun, train

from pile_app.cli import main
from pile_app.data.annotation import NO_LABEL, Annotator
from pile_app.data.assembly import assemble, whole
from pile_app.data.batch import Batch
from pile_app.data.shards import Shards, write_shards
from pile_app.documents import TEXT, Document, Segment
from pile_app.fields import document_from_sample
from pile_app.model.backbones import MinGRU
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import segment_length
from pile_app.model.score import score_choices
from pile_app.tasks.classification import Classification, LabelAnnotator, pool, split_label
from pile_app.training.module import PileModule
from pile_app.training.objective import labelled_pieces, mean_by_piece
from pile_app.training.optim import OptimizerConfig, make_optimizer

CONFIG = """
model:
  readers: {{image: {{width: 8}}}}
  objective:
    class_path: pile_app.tasks.classification.Classification
    init_args:
      labels: [dark, light, low, high]
      pooling: [mean, max, deviation, last]
      class_weights: balanced
      dropout: 0.1
      learning_rate: 0.02
  optimizer: {{learning_rate: 0.01, matrix_learning_rate: 0.02}}
data:
  sources: {{labelled: {{train: "{shards}/train-*.tar", validation: "{shards}/validation-*.tar"}}}}
  global_batch: 4
  epochs: 30
trainer:
  val_check_interval: 15
  callbacks: [{{class_path: EarlyStopping, init_args: {{monitor: validation/f1, mode: max, patience: 4}}}}]
"""


def labelled(count: int) -> Iterator[Document]:
    """Dark and light images with their names in free order, and texts of low and high letters."""
    for n in range(count):
        rng = np.random.default_rng(n)
        if n % 2:
            pixels = rng.integers(0, 100, (8, 8), np.uint8) + np.uint8(150 * (n % 4 == 1))
            document = Document((Segment.from_image(pixels), Segment("light" if n % 4 == 1 else "dark")), f"{n}", ordered=False)
        else:
            letters = rng.choice(list("abcd" if n % 4 else "wxyz"), 12)
            document = Document((Segment("".join(letters)), Segment("low" if n % 4 else "high")), f"{n}")
        yield document


def mislabelled(count: int) -> Iterator[Document]:
    """Texts of low letters that are said to be high."""
    for n in range(count):
        yield Document((Segment("".join(np.random.default_rng(n).choice(list("abcd"), 12))), Segment("high")), f"wrong-{n}")


def test_a_label_in_the_last_text_is_not_read(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment]
) -> None:
    model = tiny_model()
    annotator = LabelAnnotator(["no", "yes"])
    of_text = Document((Segment("good"), Segment("yes")), "a", meta={"label": "yes"})  # {label: cls, learn: true}
    of_image = Document((Segment("no"), image(1)), "b", ordered=False)
    documents = [annotator.arrange(document) for document in (of_text, of_image)]
    assert [document.segments[-1].text for document in documents] == ["yes", "no"]
    lengths = [2 + 1 + 4 + 1 + 3, 2 + 1 + 4 + 1 + 2]
    pack = [whole(document, length) for document, length in zip(documents, lengths, strict=True)]
    batch = assemble([pack], model.vocabulary, model.tokenizer, 24, annotator=annotator)
    assert batch.labels[0].tolist() == [-1] * 2 + [1] * 5 + [-1] * 6 + [0] * 5 + [-1] * 6
    _, hidden = model.read(batch)
    features = mean_by_piece(hidden, batch)
    pieces, labels = labelled_pieces(batch)
    assert pieces.tolist() == [0, 1] and labels.tolist() == [1, 0]
    torch.testing.assert_close(features[0], hidden[0, 2:7].mean(0))

    other = Document((*documents[0].segments[:-1], Segment("no ")), "a")
    again = assemble([[whole(other, 11), pack[1]]], model.vocabulary, model.tokenizer, 24, annotator=annotator)
    again.labels.copy_(batch.labels)
    torch.testing.assert_close(mean_by_piece(model.read(again)[1], again), features)


def test_a_label_in_a_field_leaves_every_token_to_be_read(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment]
) -> None:
    """Fault 13: a label became text that is learned, unasked."""
    model = tiny_model()
    samples = [{"cls": b"yes", "txt": b"good"}, {"png": image(1).file, "cls": b"no"}, {"txt": b"yes", "cls": b"yes"}]
    documents = [document_from_sample(f"{n}", sample) for n, sample in enumerate(samples)]
    assert [len(document.segments) for document in documents] == [1, 1, 1]
    pack = [whole(document, length) for document, length in zip(documents, [7, 7, 6], strict=True)]
    batch = assemble([pack], model.vocabulary, model.tokenizer, 24, annotator=LabelAnnotator(["no", "yes"]))
    assert batch.labels[0].tolist() == [-1, -1, *[1] * 5, -1, -1, *[0] * 5, -1, -1, *[1] * 4, *[-1] * 4]
    assert [split_label(document, ["no", "yes"])[1] for document in documents] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"objective\.head language predicts labels as text, .* learn: true"):
        assemble([pack], model.vocabulary, model.tokenizer, 24, annotator=LabelAnnotator(["no", "yes"], as_text=True))
    with pytest.raises(ValueError, match=r"'x' has no label: name its field"):
        LabelAnnotator(["no", "yes"]).arrange(Document((image(1), image(2)), "x", ordered=False))


@pytest.mark.parametrize("as_text", [False, True])
def test_new_documents_are_read_as_in_training(tiny_model: Callable[..., FusedLanguageModel], as_text: bool) -> None:
    model, objective = tiny_model(), Classification(["no", "yes"], pooling=["last", "mean"], dropout=0.0)
    objective.build(model)
    torch.nn.init.normal_(objective.head.weight)
    texts = {"abc": "yes", "no": "no", "yes": "no"}
    documents = [
        Document((Segment(text), *[Segment(label)] * as_text), text, meta={"label": label}) for text, label in texts.items()
    ]
    pack = [whole(one, 2 + sum(1 + len(segment.text) for segment in one.segments)) for one in documents]
    batch = assemble([pack], model.vocabulary, model.tokenizer, 48, annotator=objective.annotator)
    _, hidden = model.read(batch)
    objective(model, hidden, batch)
    objective.eval()
    probabilities = objective.logits(model, hidden, batch)[0].softmax(-1)
    asked = [split_label(document, objective.labels)[0] for document in documents]
    torch.testing.assert_close(objective.predict(model, asked), probabilities)


def test_an_unknown_label_is_named(tiny_model: Callable[..., FusedLanguageModel]) -> None:
    model = tiny_model()
    document = Document((Segment("good"), Segment("maybe")), "7")
    with pytest.raises(ValueError, match=r"'7' has the label 'maybe', .*\['no', 'yes'\]"):
        assemble([[whole(document, 13)]], model.vocabulary, model.tokenizer, 16, annotator=LabelAnnotator(["no", "yes"]))


def test_segments_can_be_pieces_that_do_not_see_each_other(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment]
) -> None:
    class Pairs(Annotator):
        splits_segments = True

        def labels(self, document, spans, length, number, tokenizer):  # type: ignore[no-untyped-def]
            labels = np.full(length, NO_LABEL, np.int32)
            for first, stop in spans:
                labels[first:stop] = number
            return labels

    model = tiny_model()

    def read(first: str) -> torch.Tensor:
        document = Document((Segment(first), image(1)), "a")
        batch = assemble([[whole(document, 11)]], model.vocabulary, model.tokenizer, 12, annotator=Pairs())
        assert batch.piece_starts.tolist() == [0, 1, 5, 10, 11, 12]
        assert labelled_pieces(batch)[0].tolist() == [1, 2]
        return mean_by_piece(model.read(batch)[1], batch)

    features, others = read("one"), read("two")
    torch.testing.assert_close(others[2], features[2])
    assert not torch.allclose(others[1], features[1])


@pytest.fixture(scope="module")
def classifier(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from `tiny_run` on, on two processes; its shards lie in `shards` beside it."""
    folder = tmp_path_factory.mktemp("classifier")
    write_shards(labelled(120), folder / "shards", "train")
    write_shards([*labelled(20), *mislabelled(4)], folder / "shards", "validation")
    config = folder / "task.yaml"
    config.write_text(CONFIG.format(shards=folder / "shards"))
    task = REPOSITORY / "conf" / "tasks" / "classification.yaml"
    configs = [part for path in (tiny_run.folder / "config.yaml", task, config) for part in ("--config", path)]
    command = (*configs, "--model.start_from", tiny_run.folder)
    train(*command, "--name", "task", "--runs", folder, "--wandb", "null", cwd=folder, ranks=2)
    return folder / "task"


def test_two_processes_learn_labels_of_texts_and_images_and_stop_when_f1_does_not_rise(classifier: Path) -> None:
    summary = json.loads((classifier / "summary.json").read_text())
    assert summary["accuracy"] == pytest.approx(20 / 24) and summary["devices"] == 2
    precision, recall = {"dark": 1, "light": 1, "low": 5 / 9, "high": 1}, {"dark": 1, "light": 1, "low": 1, "high": 5 / 9}
    f1 = {label: 2 * precision[label] * recall[label] / (precision[label] + recall[label]) for label in precision}
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert summary[name] == pytest.approx(sum(values.values()) / 4), "macro"
        for label, value in values.items():
            assert summary[f"{name}/{label}"] == summary["labels"][label][name] == pytest.approx(value)
    assert summary["text_loss"] > 0
    assert summary["steps"] <= 15 * 8  # of 30 epochs of 8 steps and more
    assert summary["confusion"] == [[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 4, 5]]
    assert (classifier / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_classifies_what_it_is_given(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["classify", str(classifier), "--on", str(classifier.parent / "shards" / "validation-*.tar")])
    found = json.loads((classifier / "classified" / "classification.json").read_text())
    assert found["documents"] == 24 and found["accuracy"] == pytest.approx(20 / 24)
    lines = (classifier / "classified" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["true"] for line in lines[:4]] == ["high", "light", "low", "dark"]
    (tmp_path / "bright.png").write_bytes(Segment.from_image(np.full((8, 8), 240, np.uint8)).file)
    (tmp_path / "texts.txt").write_text("abba dada\n\nzzyx wwxy\n")
    capsys.readouterr()
    main(["classify", str(classifier), "--image", str(tmp_path / "bright.png")])
    main(["classify", str(classifier), "--file", str(tmp_path / "texts.txt")])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["label"] for answer in answers] == ["light", "low", "high"]
    assert answers[1]["text"] == "abba dada" and sum(answers[1]["probabilities"].values()) == pytest.approx(1, abs=0.001)
    main(["evaluate", str(classifier), "--output", str(tmp_path)])
    measured = json.loads((tmp_path / "evaluation.json").read_text())["checkpoint"]
    assert measured.endswith("best.ckpt"), "as its summary, and as classify"
    with pytest.raises(SystemExit):
        main(["classify", str(classifier)])
    assert "what to classify?" in capsys.readouterr().err


def test_tables_are_classified_by_their_text_and_what_cannot_be_read_is_named(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("abba dada", "low"), ("zzyx wwxy", "high"), ("abcd abcd", "low")]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in rows))
    for name in ("a.csv", "a.jsonl"):
        main(["classify", str(classifier), "--file", str(tmp_path / name)])
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(answer["text"], answer["label"]) for answer in answers] == rows, "the label is no part of the text"

    images = [(np.full((8, 8), value, np.uint8), label) for value, label in ((240, "light"), (10, "dark"), (250, "light"))]
    documents = [Document((Segment.from_image(one),), str(n), meta={"label": label}) for n, (one, label) in enumerate(images)]
    (path,) = write_shards(documents, tmp_path / "shards", "x").paths
    content = bytearray(Path(path).read_bytes())
    content[content.index(b"IDAT") + 6] ^= 0xFF  # of the first image
    Path(path).write_bytes(content)
    Shards(path, again="all")
    main(["classify", str(classifier), "--on", f"mine={path}", "--output", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert "0 is skipped, undecodable_image" in told.err
    found = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert (found["documents"], found["rejected"], found["accuracy"]) == (2, {"undecodable_image": 1}, 1.0)


def documents_of(rows: dict[str, str]) -> list[Document]:
    return [Document((Segment(text), Segment(label)), text) for text, label in rows.items()]


def batch_of(model: FusedLanguageModel, objective: Classification, documents: list[Document]) -> Batch:
    lengths = [2 + sum(1 + len(segment.text) for segment in document.segments) for document in documents]
    pack = [whole(document, length) for document, length in zip(documents, lengths, strict=True)]
    return assemble([pack], model.vocabulary, model.tokenizer, sum(lengths) + 3, annotator=objective.annotator)


def media_batch(model: FusedLanguageModel, objective: Classification, rows: list[tuple[Any, ...]]) -> Batch:
    """Rows of segments and a label."""
    documents = [Document((*segments, Segment(label)), label) for *segments, label in rows]
    lengths = [2 + sum(segment_length(model, segment) for segment in document.segments) for document in documents]
    pack = [whole(document, length) for document, length in zip(documents, lengths, strict=True)]
    return assemble([pack], model.vocabulary, model.tokenizer, sum(lengths) + 3, annotator=objective.annotator)


def test_features_are_mean_maximum_deviation_and_last_of_what_stands_before_the_label(
    tiny_model: Callable[..., FusedLanguageModel],
) -> None:
    model, objective = tiny_model(), Classification(["no", "yes"])
    batch = batch_of(model, objective, documents_of({"abc": "yes", "defg": "no"}))
    _, hidden = model.read(batch)
    features = pool(hidden, batch, ["mean", "max", "deviation", "last"])[:2]
    for row, places in zip(features, (slice(2, 6), slice(12, 17)), strict=True):
        seen = hidden[0, places]
        torch.testing.assert_close(row, torch.cat([seen.mean(0), seen.amax(0), seen.std(0, correction=0), seen[-1]]))


def test_what_is_predicted_for_new_documents_is_what_is_measured_in_packs(
    tiny_model: Callable[..., FusedLanguageModel],
) -> None:
    model, objective = tiny_model(), Classification(["no", "yes"], pooling=["mean", "max"])
    objective.build(model)
    torch.nn.init.normal_(objective.head.weight)
    documents = documents_of({"abc": "yes", "defg": "no", "a": "no"})
    batch = batch_of(model, objective, documents)
    objective.eval()
    logits, _ = objective.logits(model, model.read(batch)[1], batch)
    asked, numbers = zip(*(split_label(document, objective.labels) for document in documents), strict=True)
    assert numbers == (1, 0, 0)
    torch.testing.assert_close(objective.predict(model, asked), logits.softmax(-1))


def test_the_models_own_softmax_chooses_among_the_labels(tiny_model: Callable[..., FusedLanguageModel]) -> None:
    model, objective = tiny_model(), Classification(["no", "yes"], head="language")
    objective.build(model)
    assert not list(objective.parameters())
    batch = batch_of(model, objective, documents_of({"abc": "yes"}))
    _, hidden = model.read(batch)
    logits, _ = objective.logits(model, hidden, batch)
    torch.testing.assert_close(logits[0], model.logits(hidden, TEXT)[0, 5, [6 + ord("n"), 6 + ord("y")]])
    objective(model, hidden, batch).backward()
    assert model.heads[TEXT].weight.grad[6 + ord("y")].abs().sum() > 0


def test_labels_that_begin_alike_are_learned_and_scored_as_text(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment]
) -> None:
    model, labels = tiny_model(perturbed=False), ["two", "three", "no", "nothing"]
    objective = Classification(labels, head="language", class_weights=[1.0, 2.0, 1.0, 1.0])
    objective.build(model)
    rows = [(image(n), Segment("abcdefgh"[n]), labels[n % 4]) for n in range(8)] + [(image(9), "no")]
    batch = media_batch(model, objective, rows)
    tokens, hidden = model.read(batch)
    probabilities = model.logits(hidden, TEXT).detach().log_softmax(-1)[0]
    stops = batch.piece_starts[1:10].tolist()
    nats = [-sum(float(probabilities[at, tokens[0, at + 1]]) for at in range(stop - len(row[-1]) - 2, stop - 1))
            for stop, row in zip(stops, rows, strict=True)]  # fmt: skip
    weights = [1.0 + (row[-1] == "three") for row in rows]
    expected = sum(w * n for w, n in zip(weights, nats, strict=True)) / sum(weights)
    assert objective(model, hidden, batch).item() == pytest.approx(expected, rel=1e-4)

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        objective(model, model.read(batch)[1], batch).backward()
        optimizer.step()
    objective.eval()
    objective.update(model, model.read(batch)[1], batch)
    assert objective.compute()["accuracy"] == 1
    documents = [Document(tuple(segments), label) for *segments, label in rows]
    predicted = objective.predict(model, documents)
    torch.testing.assert_close(predicted, objective.logits(model, hidden, batch)[0].softmax(-1))
    alone = score_choices(model, documents[-1:], [Segment(label) for label in labels])
    torch.testing.assert_close(predicted[-1:], alone.softmax(-1))


def test_a_rare_label_weighs_more_when_balanced(tiny_model: Callable[..., FusedLanguageModel]) -> None:
    model = tiny_model()
    losses = {}
    for weights in (None, "balanced", [1.0, 3.0]):
        objective = Classification(["no", "yes"], class_weights=weights, dropout=0.0)  # type: ignore[arg-type]
        objective.build(model)
        with torch.no_grad():
            objective.head.bias.copy_(torch.tensor([1.0, 0.0]))
        batch = batch_of(model, objective, documents_of({"a": "no", "b": "no", "c": "no", "d": "no", "e": "yes"}))
        losses[str(weights)] = objective(model, model.read(batch)[1], batch).item()
    no, yes = np.log1p(np.exp(-1)), np.log1p(np.exp(1))
    assert losses["None"] == pytest.approx((4 * no + yes) / 5, rel=1e-5)
    assert losses["[1.0, 3.0]"] == pytest.approx((4 * no + 3 * yes) / 7, rel=1e-5)
    rare, common = 7 / (2 * 2), 7 / (2 * 5)  # each label was seen once more than it was
    expected = (4 * common * no + rare * yes) / (4 * common + rare)
    assert losses["balanced"] == pytest.approx(expected, rel=1e-5)


def test_a_frozen_model_is_probed_by_a_head_that_alone_learns() -> None:
    objective = Classification(["no", "yes"], freeze=True)
    module = PileModule(MinGRU(width=32, layers=1), objective=objective)
    optimizer, _ = make_optimizer(module.model, OptimizerConfig(), 0, 10, objective)
    assert [group["name"] for group in optimizer.param_groups] == ["objective"]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batch = batch_of(module.model, objective, documents_of({"abc": "yes", "defg": "no", "hi": "no"}))
    objective(module.model, module.model.read(batch)[1], batch).backward()
    optimizer.step()
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"objective.head.weight", "objective.head.bias"}
