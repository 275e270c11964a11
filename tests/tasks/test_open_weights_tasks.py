"""Tasks on open weights, from the configurations as they are: tiny random weights learn, are loaded, classify and tag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import REPOSITORY, train
from test_tagging import sentence

from pile_app.cli import main as pile
from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import train_tokenizer
from pile_app.documents import Document, Segment
from pile_app.prepare.pipeline import prepare
from pile_app.training.load import load_run

CONF = REPOSITORY / "conf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, labelled texts and tagged texts."""
    base = tmp_path_factory.mktemp("open")
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(base / "weights")
    texts = ["".join(map(sentence, range(20))), "a good film , a bad film"]
    train_tokenizer(texts, "bpe", 300, base / "weights" / "tokenizer.json")
    words = ("good", "bad") * 60
    reviews = [Document((Segment(f"a {word} film"),), str(n), meta={"label": word}) for n, word in enumerate(words)]
    for split, some in (("train", reviews), ("validation", reviews[:10])):
        write_shards(some, base / "reviews", f"reviews-{split}")
    (base / "names.conll").write_text("".join(map(sentence, range(200))))
    prepare(base / "names.conll", base / "entities", kind="entities", validation_fraction=0.1, processes=1)
    return base


def test_open_weights_classify_by_two_configurations_without_another_setting(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = ("--config", CONF / "open_weights.yaml", "--config", CONF / "tasks" / "classification.yaml")
    chosen = ("--model.backbone.path", "weights", "--model.objective.init_args.labels", "[good, bad]")
    sources = "{reviews: {train: reviews/reviews-train-*.tar, validation: reviews/reviews-validation-*.tar}}"
    rates = ("--model.optimizer.backbone_learning_rate", "0.01", "--data.epochs", "8")  # of weights that know nothing
    place = ("--name", "kind", "--runs", "runs", "--wandb", "null", "--data.context", "64", "--trainer.accelerator", "cpu")
    train(*configs, *chosen, "--data.sources", sources, *rates, *place, cwd=folder)
    config = yaml.safe_load((folder / "runs" / "kind" / "config.yaml").read_text())
    given = yaml.safe_load((CONF / "tasks" / "classification.yaml").read_text())["open_weights"]
    assert config["data"]["global_batch"] == given["data"]["global_batch"], "of open_weights"
    assert config["data"]["epochs"] == 8, "the command line comes last"
    assert config["open_weights"] == {}
    summary = json.loads((folder / "runs" / "kind" / "summary.json").read_text())
    assert summary["accuracy"] == 1.0
    capsys.readouterr()
    pile(["classify", str(folder / "runs" / "kind"), "--text", "a bad film"])
    assert json.loads(capsys.readouterr().out)["label"] == "bad"


def test_open_weights_of_a_run_tag_the_second_reading(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = ("--config", CONF / "open_weights.yaml", "--config", CONF / "tasks" / "ner.yaml")
    shards = f"{folder}/entities/names-{{}}-*.tar"
    sources = f"{{names: {{train: {shards.format('train')}, validation: {shards.format('validation')}}}}}"
    chosen = ("--model.backbone.path", "weights", "--model.objective.init_args.types", "[person, place]")
    rates = ("--model.optimizer.backbone_learning_rate", "0.01", "--data.epochs", "6")
    place = ("--name", "names", "--runs", "runs", "--wandb", "null", "--data.context", "96", "--trainer.accelerator", "cpu")
    train(*configs, *chosen, "--data.sources", sources, *rates, *place, cwd=folder)
    summary = json.loads((folder / "runs" / "names" / "summary.json").read_text())
    assert summary["f1"] > 0.9, summary
    _, data, _ = load_run(folder / "runs" / "names")
    data.setup("fit")
    piece, _, document, _ = data.train_dataset().documents(0)[0]
    assert [segment.loss for segment in document.segments] == [False, True]
    assert piece.stop == 2 + sum(1 + len(data.tokenizer.encode(segment.text)) for segment in document.segments)
    capsys.readouterr()
    long = " ".join(["the Bo saw New Ur in"] * 20)  # more than two readings in one context
    pile(["tag", str(folder / "runs" / "names"), "--text", "Ada saw New Ur", "--text", long])
    short, cut = capsys.readouterr().out.splitlines()
    assert short == "[Ada|person] saw [New Ur|place]"
    assert cut.count("[New Ur|place]") + cut.count("[Bo|person]") > 36
    assert cut.replace("|place]", "").replace("|person]", "").replace("[", "") == long
