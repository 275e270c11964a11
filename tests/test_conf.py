"""Every file in `conf/` trains as the commands at its top say, on tiny shards that lie where the demo's would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from transformers import LlamaConfig, LlamaForCausalLM

from pile_app.cli import main as pile
from pile_app.data.shards import write_shards
from pile_app.documents import MODALITIES, Document, Segment

CONFIGS = sorted(path.stem for path in (REPOSITORY / "conf").glob("*.yaml") if path.stem != "sweep")
LOCAL_TEXT = {"encyclopedia", "brown", "factbook", "essays", "definitions", "stories", "news"}
STEPS = 3
WORDS = ("three", "seven")

# All of them in one process: starting one takes longer than its three steps.
SCRIPT = """
import sys
from pile_app.training.cli import main

for name in sys.argv[1:]:
    config = [] if name == "default" else ["--config", f"conf/{name}.yaml"]
    small = "--trainer.max_steps=3 --model.codec_steps=1 --data.global_batch=2 --trainer.val_check_interval=2"
    # The demos' evaluation needs more than tiny shards; every other config has callbacks of its own.
    callbacks = ["--trainer.callbacks=[]"] if name in ("default", "lstm", "emoji", "smollm2_digits") else []
    pixels = ["--model.image.size=16"] if name in ("photos", "media") else []
    others = ["--trainer.accelerator=cpu", "--name", name, "--wandb=null", "--samples=false"]
    main([*config, *small.split(), *others, *callbacks, *pixels])
# With its callbacks, on media of one's own.
own = "{own: {train: shards/media/*-train-*.tar, validation: shards/media/*-validation-*.tar}}"
main([*small.split(), "--trainer.accelerator=cpu", "--name=own", "--wandb=null", f"--data.sources={own}"])
"""


def documents(kind: str, count: int) -> Iterator[Document]:
    for n in range(count):
        rng = np.random.default_rng(n)
        image = Segment.from_image(rng.integers(0, 256, (16, 16), np.uint8))
        clip = Segment.from_audio(0.3 * rng.standard_normal(2000), 8000)
        name = Segment(WORDS[n % 2])
        segments = {
            "digits": (image, name, clip),
            "labelled": (image if n % 4 < 2 else clip, name),
            "prose": (Segment(f"text {n} " + "lorem ipsum dolor " * (1 + n % 9)),),
            "images": (image,),
            "clips": (clip,),
            "pictures": (image, name),
            "recordings": (clip, name),
            "media": (image, name, clip),
        }[kind]
        yield Document(segments, ordered=kind != "media", key=f"{kind}-{n}", meta={"label": name.text})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder, after every config was trained in it."""
    base = tmp_path_factory.mktemp("conf")
    (base / "conf").symlink_to(REPOSITORY / "conf")
    shards = base / "data" / "digits" / "shards"
    for kind in ("digits", "labelled", "prose", "images", "clips"):
        for split in ("train", "heldout" if kind == "labelled" else "validation"):
            write_shards(documents(kind, 24), shards, f"{kind}-{split}")
    for split in ("train", "validation"):
        for own in ("pictures", "recordings", "media"):
            write_shards(documents(own, 12), base / "shards" / own, f"own-{split}")
        write_shards(documents("digits", 24), base / "data" / "emoji" / "shards", f"emoji-{split}")
        write_shards(documents("digits", 24), base / "data" / "smollm2" / "shards", f"chat-{split}")
        write_shards(documents("prose", 24), base / "data" / "shakespeare" / "shards", split)
    pile(["tokenizer", f"{shards}/prose-train-*.tar", str(shards / "words.json"), "--kind", "words", "--size", "10000"])
    emoji_tokenizer = str(base / "data" / "emoji" / "shards" / "tokenizer.json")
    pile(["tokenizer", f"{shards}/prose-train-*.tar", emoji_tokenizer, "--kind", "bpe", "--size", "300"])
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    weights = base / "data" / "smollm2" / "model"
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512)).save_pretrained(weights)
    shutil.copyfile(emoji_tokenizer, weights / "tokenizer.json")
    local = base / "data" / "local_text" / "shards"
    for name in LOCAL_TEXT:
        for split in ("train", "validation"):
            write_shards(documents("prose", 24), local / name, f"{name}-{split}")
    pile(["tokenizer", f"{shards}/prose-train-*.tar", str(local / "tokenizer.json"), "--kind", "bpe", "--size", "300"])
    command = [sys.executable, "-c", SCRIPT, *CONFIGS]
    done = subprocess.run(command, cwd=base, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return base


def test_the_demos_config_trains_on_media_of_ones_own(trained: Path) -> None:
    """It once failed after training, in the evaluation of the digits."""
    run = trained / "runs" / "own"
    summary = yaml.safe_load((run / "summary.json").read_text())
    assert summary["steps"] == STEPS and not any("judge" in key for key in summary)
    samples = json.loads((run / "samples" / "step-00000003" / "samples.json").read_text())
    assert {sample["title"] for sample in samples} == {f"{a} → {b}" for a in MODALITIES for b in MODALITIES if a != b}
    assert "What it made" in (run / "report.html").read_text()


def resolved(trained: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((trained / "runs" / name / "config.yaml").read_text())
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_and_reports(trained: Path, name: str) -> None:
    run = trained / "runs" / name
    summary = yaml.safe_load((run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert np.isfinite(summary["loss"])
    assert (run / "report.html").exists() and (run / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_at_its_top_names_the_config_and_its_run(name: str) -> None:
    text = (REPOSITORY / "conf" / f"{name}.yaml").read_text()
    config = yaml.safe_load(text)
    assert text.startswith("# ")
    if name != "default":
        assert re.search(rf"\n#   python train\.py --config (conf/{name}\.yaml\n|{name} )", text)
        assert config["name"] == name


@pytest.mark.parametrize(
    ("name", "sources", "codecs"),
    [
        ("default", {"digits", "prose"}, {"image", "audio"}),
        ("lstm", {"digits", "prose"}, {"image", "audio"}),
        ("smollm2_digits", {"digits", "chat", "prose"}, {"image", "audio"}),
        ("emoji", {"emoji"}, {"image", "audio"}),
        ("text_only", {"prose"}, set()),
        ("images_only", {"images"}, {"image"}),
        ("audio_only", {"clips"}, {"audio"}),
        ("lstm_words", {"prose"}, set()),
        ("shakespeare", {"plays"}, set()),
        ("shakespeare_fast", {"plays"}, set()),
        ("local_text", LOCAL_TEXT, set()),
        ("photos", {"pictures"}, {"image"}),
        ("speech", {"recordings"}, {"audio"}),
        ("media", {"media"}, {"image", "audio"}),
    ],
)
def test_nothing_of_the_demo_leaks_into_a_config(trained: Path, name: str, sources: set[str], codecs: set[str]) -> None:
    config = resolved(trained, name)
    assert set(config["data"]["sources"]) == sources
    assert {codec for codec in ("image", "audio") if config["model"].get(codec)} == codecs
    assert "EvaluateCrossModal" not in str(config["trainer"].get("callbacks"))


def test_lstm_words_is_the_classic_baseline(trained: Path) -> None:
    import torch

    config = resolved(trained, "lstm_words")
    assert config["data"]["epochs"] == 10
    assert yaml.safe_load((REPOSITORY / "conf" / "lstm_words.yaml").read_text())["data"]["global_batch"] == 32
    state = torch.load(trained / "runs" / "lstm_words" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["model.embeddings.0.weight"].shape[1] == 64
    assert state["model.backbone.cells.0.weight_ih_l0"].shape == (4 * 128, 64)
    assert state["model.heads.0.weight"].shape == (state["model.embeddings.0.weight"].shape[0], 128)
    assert len(state["model.heads.0.weight"]) < 100  # words and specials, not bytes
