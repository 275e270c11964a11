"""The commands that `pile prepare` prints train on what it wrote, pasted into a shell as they are; only sizes are added."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import picture, sound
from processes import start

SMALL = [
    "--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.accelerator=cpu", "--model.codec_steps=1",
    "--data.context=256", "--data.global_batch=2", "--checkpoint_every=4", "--wandb=null",
    "--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1", "--model.backbone.init_args.heads=2",
]  # fmt: skip
PICTURES = "--model.image={size: 16, channels: 3, patch: 8, levels: [4, 3], width: 16, blocks: 1}"
SOUNDS = "--model.audio={sample_rate: 8000, hop: 80, window: 320, mels: 20, levels: [4, 3], width: 16, blocks: 1}"


def texts(folder: Path) -> None:
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"the text number {number}: " + "once upon a time " * 6)


def captions(folder: Path) -> None:
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(picture(number))
        (folder / f"{number}.txt").write_text(f'it\'s "picture" {number}')


def transcripts(folder: Path) -> None:
    for number in range(20):
        (folder / f"{number}.wav").write_bytes(sound(number))
        (folder / f"{number}.txt").write_text(f"tone {number}")


def spoken_pictures(folder: Path) -> None:
    captions(folder)
    for number in range(20):
        (folder / f"{number}.wav").write_bytes(sound(number))


def reviews(folder: Path) -> None:
    with open(folder / "reviews.csv", "w", newline="") as file:
        rows = [[f"{'good' if n % 2 else 'bad'} film {n}", "it's good" if n % 2 else "no"] for n in range(40)]
        csv.writer(file).writerows([["text", "label"], *rows])


def entities(folder: Path) -> None:
    lines = [f"In O\n{city} B-place\nsaw O\nAda{n} B-person\n" for n in range(20) for city in ("Paris", "Rome")]
    (folder / "tweets.conll").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("write", "options", "config", "tasks"),
    [
        (texts, [], "text_only", []),
        (captions, [], "photos", []),
        (transcripts, [], "speech", []),
        (spoken_pictures, [], "media", []),
        (reviews, [], "text_only", ["classes"]),
        (entities, ["--kind", "entities"], "text_only", ["entities"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_printed_commands_train(
    tmp_path: Path, write: Callable[[Path], None], options: list[str], config: str, tasks: list[str]
) -> None:  # fmt: skip
    (tmp_path / "my files").mkdir()
    write(tmp_path / "my files")
    printed = start(["pile", "prepare", "my files", "shards/it's mine", "--processes", "1", *options], tmp_path).succeed()
    lines = [line.removeprefix("uv run ") for line in printed.splitlines()]
    commands = [line for line in lines if line.startswith("pile train ")]
    names = ["it-s-mine", *(f"it-s-mine-{task}" for task in tasks)]
    assert len(commands) == len(names) and f"--config {config} " in commands[0]
    codecs = [PICTURES] * (config in ("photos", "media")) + [SOUNDS] * (config in ("speech", "media"))
    for command, name in zip(commands, names, strict=True):
        split = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
        start([*split.stdout.splitlines(), *SMALL, *codecs], tmp_path).succeed()
        summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        assert summary["steps"] == 4
        assert tasks == [] or name == names[0] or any(key.endswith("f1") for key in summary)
        codecs = []  # the run that the second begins with has them
    titles = [
        sample["title"] for sample in json.loads((tmp_path / "runs/it-s-mine/samples/step-00000004/samples.json").read_text())
    ]
    wanted = {"photos": {"image", "text"}, "speech": {"audio", "text"}, "media": {"image", "audio", "text"}}
    assert {title.split(" → ")[1] for title in titles} == wanted.get(config, {"text"})


def test_in_a_clone_under_uv_the_command_is_one_of_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pile_app.prepare.pipeline import prepare

    texts_folder = tmp_path / "in"
    texts_folder.mkdir()
    texts(texts_folder)
    monkeypatch.setenv("UV", "/usr/bin/uv")
    prepare(texts_folder, tmp_path / "out", processes=1)
    assert capsys.readouterr().out.startswith("uv run pile train --config text_only ")
