"""Contrastive learning: the loss, independence of the position in a batch, and recall."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyRun, train

from pile_app.cli import main as pile
from pile_app.data.assembly import assemble, whole
from pile_app.data.shards import write_shards
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.tasks.retrieval import Contrastive, Embeddings, contrastive_loss, group_of, retrieval_metrics

CONFIG = """
model:
  codec_steps: 0
  objective:
    class_path: pile_app.tasks.retrieval.Contrastive
    init_args: {{dimensions: 16, learning_rate: 0.02, dropout: 0.0}}
data:
  sources: {{pairs: {{train: "{shards}/train-*.tar", validation: "{shards}/validation-*.tar"}}}}
trainer: {{max_steps: 30, val_check_interval: 15, callbacks: []}}
monitor: validation/recall_5
monitor_mode: max
"""


def segments(count: int, modalities: list[int], labels: list[int], seed: int = 0) -> Embeddings:
    vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return Embeddings(F.normalize(vectors, dim=1), torch.tensor(labels), torch.tensor(modalities))


def test_with_one_right_answer_the_loss_is_that_of_clip() -> None:
    pairs = segments(8, [TEXT, IMAGE] * 4, [0, 0, 1, 1, 2, 2, 3, 3])
    logits = 5.0 * pairs.vectors[::2] @ pairs.vectors[1::2].T
    targets = torch.arange(4)
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(contrastive_loss(pairs, torch.tensor(5.0)), expected)


def test_right_answers_are_no_negatives_of_each_other_and_every_pair_of_modalities_counts() -> None:
    found = segments(7, [TEXT, IMAGE, TEXT, IMAGE, AUDIO, TEXT, AUDIO], [3, 3, 3, 4, 4, 4, 9])
    expected = []
    for query in range(7):
        for modality in {TEXT, IMAGE, AUDIO} - {int(found.modalities[query])}:
            among = [n for n in range(7) if found.modalities[n] == modality]
            scores = {n: (2.0 * found.vectors[query] @ found.vectors[n]).exp() for n in among}
            wrong = sum(scores[n] for n in among if found.labels[n] != found.labels[query])
            losses = [-(scores[n] / (scores[n] + wrong)).log() for n in among if found.labels[n] == found.labels[query]]
            expected += [torch.stack(losses).mean()] if losses else []
    assert len(expected) == 9
    torch.testing.assert_close(contrastive_loss(found, torch.tensor(2.0)), torch.stack(expected).mean())
    alone = segments(2, [TEXT, IMAGE], [0, 1])
    assert float(contrastive_loss(alone, torch.tensor(2.0))) == 0


def test_documents_of_a_group_or_of_the_same_first_text_belong_together(image: Callable[[int], Segment]) -> None:
    caption, other = Segment("a dog"), Segment("un chien")
    assert group_of(Document((image(1), caption), "1")) == group_of(Document((caption, other), "2"))
    assert group_of(Document((image(1), caption), "1")) != group_of(Document((other,), "1"))
    assert group_of(Document((other,), "1", meta={"concept": "a dog"})) == group_of(Document((caption,), "2"))
    assert group_of(Document((image(1),), "1")) != group_of(Document((image(1),), "2"))


def test_an_embedding_does_not_depend_on_what_a_segment_is_packed_with(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment], sound: Callable[..., Segment]
) -> None:
    model, objective = tiny_model(), Contrastive(dimensions=8)
    objective.build(model)
    objective.eval()

    def embed(*packs: list[Document], context: int = 64) -> torch.Tensor:
        lengths = {TEXT: 1 + 3, IMAGE: 1 + 4, AUDIO: 2 + 5}
        rows = [[whole(one, 2 + sum(lengths[s.modality] for s in one.segments)) for one in pack] for pack in packs]
        batch = assemble(rows, model.vocabulary, model.tokenizer, context, annotator=objective.annotator)
        return objective.embed(model.read(batch)[1], batch).vectors

    one = Document((Segment("one"), image(1)), "1")
    two = Document((sound(2), Segment("two")), "2")
    together = embed([one, two])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embed([two], [one], context=32), together[[2, 3, 0, 1]])
    torch.testing.assert_close(embed([Document((image(1),), "1")], context=16), together[1:2])


def test_micro_batches_learn_what_the_whole_step_learns(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment]
) -> None:
    """Each sees the segments of the others, and of the temperature each has a part of the gradient."""
    model, objective = tiny_model(), Contrastive(dimensions=8)
    objective.build(model)
    documents = [Document((Segment("one" if n % 2 else f"{n}xx"), image(n)), f"{n}") for n in range(6)]

    def gradients(sizes: tuple[int, ...]) -> list[torch.Tensor]:
        batches, rows = [], iter(documents)
        for size in sizes:
            packs = [[whole(one, 11)] for one in itertools.islice(rows, size)]
            numbers = list(range(sum(len(batch.numbers) for batch in batches), 6))[:size]
            batches.append(assemble(packs, model.vocabulary, model.tokenizer, 12, numbers, annotator=objective.annotator))
        objective.zero_grad()
        total = torch.zeros(())
        for batch, step in zip(batches, objective.prepare(model, batches), strict=True):
            loss = objective(model, model.read(batch)[1], batch, step)
            loss.backward()
            total += loss.detach()
        return [total, *(p.grad.clone() for p in objective.parameters() if p.grad is not None)]

    whole_step = gradients((6,))
    assert float(whole_step[0]) > 0.1
    assert sum(float(one.abs().max()) > 0 for one in whole_step) == len(whole_step) - 1, "all but the projection of sounds"
    torch.testing.assert_close(gradients((1, 3, 2)), whole_step)


def test_ranks_count_ties_against_us_and_any_right_answer_for_us() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]]), dim=1)
    among = Embeddings(vectors, torch.tensor([5, 6, 7, 6]), torch.zeros(4, dtype=torch.int64))
    queries = Embeddings(vectors[[0, 0, 3]], torch.tensor([7, 6, 99]), torch.zeros(3, dtype=torch.int64))
    metrics = retrieval_metrics(queries, among)
    assert metrics == {
        "recall_1": 0.0, "recall_5": 1.0, "recall_10": 1.0, "median_rank": 2.5, "mrr": pytest.approx((1 / 3 + 1 / 2) / 2),
        "queries": 2.0, "chance_5": 1.0,
    }  # fmt: skip
    same = Embeddings(torch.ones(10, 1), torch.arange(10), torch.zeros(10))
    assert retrieval_metrics(same, same)["recall_5"] == 0 and retrieval_metrics(same, same)["chance_5"] == pytest.approx(0.5)


def pairs(count: int) -> Iterator[Document]:
    """Eight shades of grey and their names, in free order."""
    for n in range(count):
        noise = np.random.default_rng(n).integers(0, 8, (8, 8), np.uint8)
        yield Document((Segment.from_image(noise + np.uint8(30 * (n % 8))), Segment("abcdefgh"[n % 8] * 3)), f"{n}", False)


def test_a_trained_model_finds_pictures_by_their_names_in_an_index_of_shards_and_folders(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(pairs(200), tmp_path / "shards", "train")
    write_shards(pairs(16), tmp_path / "shards", "validation")
    config = tmp_path / "task.yaml"
    config.write_text(CONFIG.format(shards=tmp_path / "shards"))
    command = ("--config", tiny_run.folder / "config.yaml", "--config", config, "--model.start_from", tiny_run.folder)
    train(*command, "--name", "task", "--runs", tmp_path, "--wandb", "null", cwd=tmp_path)
    summary = json.loads((tmp_path / "task" / "summary.json").read_text())
    assert summary["text_to_image_queries"] == summary["image_to_text_queries"] == 16
    assert summary["recall_5"] > 0.85 > 0.7 > summary["text_to_image_chance_5"]

    pytest.importorskip("lancedb", reason="extra `search`")
    files, index = tmp_path / "files", str(tmp_path / "index")
    files.mkdir()
    (files / "dog.png").write_bytes(next(pairs(1)).segments[0].file)
    (files / "dog.txt").write_text("a dog")
    (files / "bad.png").write_bytes(b"no image")
    pile(["index-media", str(tmp_path / "task"), f"{tmp_path}/shards/validation-*.tar", str(files), "--output", index])
    told = capsys.readouterr().out
    assert "34 segments" in told and "skipped: 1 undecodable_image" in told and "approximate" not in told
    pile(["search", index, str(files / "dog.png"), "--to", "image", "--count", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "1.000" in lines[0]
    pile(["search", index, "a dog", "--to", "text", "--count", "1"])
    assert capsys.readouterr().out.split()[:6] == ["1", "1.000", "text", "dog.png", "a", "dog"]
    from pile_app.training import load

    with patch("sys.stdin", io.StringIO("a dog\na dog\n")), patch.object(load, "load_on", wraps=load.load_on) as loads:
        pile(["search", index, "--to", "text", "--count", "1"])
    assert capsys.readouterr().out.count("dog.png") == 2 and loads.call_count == 1, "queries of a terminal load the model once"
    with pytest.raises(SystemExit):
        pile(["search", index, "aaa", "--run", str(tiny_run.folder), "--checkpoint", "last"])
    assert "was not trained to embed" in capsys.readouterr().err
