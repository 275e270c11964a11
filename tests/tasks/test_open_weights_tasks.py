"""Tasks on open weights, from the configurations as they are: tiny random weights learn, are loaded, classify and tag."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import REPOSITORY, train, write_chatty_weights
from test_tagging import sentence

from pile_app.cli import main as pile
from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import train_tokenizer
from pile_app.documents import Document, Segment
from pile_app.model.generate import Sampling
from pile_app.prepare.pipeline import prepare
from pile_app.records import MARKERS, Turn, conversation
from pile_app.tasks.chat import Conversation
from pile_app.training.load import load_run

CONF = REPOSITORY / "conf"
GREEDY = Sampling(temperature=0, max_text=20)


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


def test_a_picture_in_a_conversation_is_named(tmp_path: Path) -> None:
    """By conf/smollm2_digits.yaml: the chat template of the weights around pictures, and talk in between."""
    write_chatty_weights(tmp_path / "weights")
    rng = np.random.default_rng(0)

    def picture(is_bright: bool) -> Segment:
        return Segment.from_image(rng.integers(200, 256, (16, 16), np.uint8) if is_bright else np.zeros((16, 16), np.uint8))

    def asked(is_bright: bool) -> list[Turn]:
        answer = Segment("It is three." if is_bright else "I hear eight!")
        return [Turn("user", (Segment("What is this?"), picture(is_bright))), Turn("assistant", (answer,))]

    def talk() -> list[Turn]:
        return [Turn("user", (Segment("Hello"),)), Turn("assistant", (Segment("Hello!"),))]

    for split, count in (("train", 200), ("validation", 8)):
        drawn = [[talk() if kind == 2 else asked(kind == 1) for kind in rng.integers(3, size=4)] for _ in range(count)]
        told = [[turn for exchange in exchanges for turn in exchange] for exchanges in drawn]
        write_shards([conversation(turns, str(n)) for n, turns in enumerate(told)], tmp_path / "chats", f"chat-{split}")
    sources = "{chat: {train: chats/chat-train-*.tar, validation: chats/chat-validation-*.tar}}"
    rates = ("--model.optimizer.backbone_learning_rate", "0.01", "--model.optimizer.learning_rate", "0.01")
    steps = ("--model.codec_steps", "20", "--trainer.max_steps", "160", "--trainer.val_check_interval", "160")
    place = ("--name", "seeing", "--runs", "runs", "--wandb", "null", "--samples", "false", "--trainer.accelerator", "cpu")
    config = ("--config", CONF / "smollm2_digits.yaml", "--model.backbone.path", "weights", "--trainer.callbacks", "[]")
    config += ("--model.backbone.lora", "null")  # random weights have to learn, too
    train(*config, "--data.sources", sources, *rates, *steps, *place, cwd=tmp_path)
    module, data, _ = load_run(tmp_path / "runs" / "seeing")
    spoken = Conversation(module.model, data.context)
    for is_bright in (True, False, False, True):
        answer = "".join(
            one for one in spoken.ask([Segment("What is this?"), picture(is_bright)], GREEDY) if isinstance(one, str)
        )
        assert answer == ("It is three." if is_bright else "I hear eight!")
        assert "".join(one for one in spoken.ask([Segment("Hello")], GREEDY) if isinstance(one, str)) == "Hello!"
    template = module.model.tokenizer.decode(module.model.tokenizer.encode(MARKERS[1]))
    assert template == "<|over|>\n<|turn|>user", "the weights' own, around what a user writes"
