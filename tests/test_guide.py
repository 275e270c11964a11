"""Every command of the user's guide runs as written, in order; only sizes are appended."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import AUDIO, IMAGE, REPOSITORY, media_documents
from processes import start, start_ranks

from pile_app.data.shards import write_shards

GUIDE = (REPOSITORY / "docs" / "guide.md").read_text()
SMALL = [
    "--trainer.max_steps=4 --trainer.val_check_interval=2 --trainer.accelerator=cpu --data.context=192 --data.global_batch=4",
    "--data.micro_batch=null --data.num_workers=0 --model.backbone.init_args.width=32 --model.backbone.init_args.layers=1",
    "--checkpoint_every=4 --wandb=null",
]
"""After each `pile train`: from 8 GPUs to 2 processes of a CPU, from presets to a model of a moment."""
PRESET = [
    "--model.backbone.init_args.heads=2 --trainer.devices=2 --trainer.num_nodes=1 --trainer.precision=32-true",
]
WORDS = ["once", "upon", "a", "time", "there", "was", "one", "who", "had", "three", "wishes"]
CODECS = {"image": vars(IMAGE), "audio": vars(AUDIO)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with what the guide supposes a user to have: files of each kind, and a run of the demo."""
    folder = tmp_path_factory.mktemp("guide")
    rng = np.random.default_rng(0)
    for name in ("my-texts", "my-reviews", "my-entities", "my-chats"):
        (folder / name).mkdir()
    for number in range(60):
        words = rng.choice(WORDS, 30)
        (folder / "my-texts" / f"{number}.txt").write_text(" ".join(words))
    reviews = [f"{'good' if n % 2 else 'bad'} film number {n},{'positive' if n % 2 else 'negative'}" for n in range(200)]
    (folder / "my-reviews" / "reviews.csv").write_text("\n".join(["text,label", *reviews]))
    tweets = [f"In O\n{city} B-location\nnumber O\n{n} O\n" for n in range(20) for city in ("Paris", "Rome")]
    (folder / "my-entities" / "tweets.conll").write_text("\n".join(tweets))
    turns = ({"role": "user", "content": f"What is {n}?"} for n in range(40))
    chats = [{"messages": [turn, {"role": "assistant", "content": "A number."}]} for turn in turns]
    (folder / "my-chats" / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    for split, count in (("train", 40), ("validation", 12)):
        write_shards(media_documents(count, split), folder / "data/digits/shards", f"digits-{split}")
    sources = {
        "digits": {f"{s}": f"data/digits/shards/digits-{s}-*.tar" for s in ("train", "validation")} | {"weight": 1},
    }
    demo = ["--name=digits", "--model.codec_steps=2", f"--data.sources={json.dumps(sources)}", "--trainer.callbacks=[]"]
    demo += [f"--model.{name}={json.dumps(codec)}" for name, codec in CODECS.items()] + ["--data.prepare=null"]
    run(["pile", "train", *demo], folder)
    return folder


def run(words: list[str], folder: Path) -> str:
    """Run a command of the guide with the sizes of a test appended; returns its output."""
    if "train" not in words:
        return start(words, folder).succeed()
    of_preset = any(word.startswith("sizes/") for word in words)
    small = shlex.split(" ".join(SMALL + (PRESET if of_preset else [])))
    words = [*words[words.index("pile") :], *small]  # without torchrun
    printed = [rank.succeed() for rank in (start_ranks(words, folder) if of_preset else [start(words, folder)])]
    return printed[0]


def test_every_command_of_the_guide_runs(folder: Path) -> None:
    printed: dict[str, str] = {}
    (written,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    (folder / "big.yaml").write_text(written)
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL):
        for command in block.replace("\\\n", " ").strip().splitlines():
            printed[command] = run(shlex.split(command), folder)
    said = "\n".join(printed.values())
    assert "shards/mine/my-texts-train-[0-9]*.tar" in said and "[negative, positive]" in said  # as the next commands
    assert '"label"' in said and (folder / "runs/big/checkpoints/last.ckpt").exists()
    (python,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    subprocess.run([sys.executable, "-c", python], cwd=folder, check=True)
