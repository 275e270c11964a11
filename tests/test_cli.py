"""`pile`: every command through its own entry point, on shards made here and the run that `tiny_run` trained."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
import torch
import yaml
from conftest import REPOSITORY, TinyRun, media_documents
from PIL import Image

from pile_app.bundled import find_config
from pile_app.cli import COMMANDS, load_command, main, make_parser
from pile_app.commands.use import read_prompt
from pile_app.data.shards import Shards, expand_shards, write_shards
from pile_app.data.tokenizers import load_tokenizer
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document, Segment
from pile_app.training.load import load_run
from pile_app.vocabulary import Vocabulary
from tests.data.test_remote import serving

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs `pile` with arguments that it has to refuse with one line; that line."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()  # of what ran before
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.startswith("pile: error: ") and error.count("\n") == 1, error
        return error

    return run


def pile(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def copy_run(tiny_run: TinyRun, folder: Path) -> TinyRun:
    """The run and its shards, free to be damaged."""
    copy = TinyRun(folder / "run", folder / "config.yaml", folder / "shards")
    shutil.copytree(tiny_run.folder, copy.folder)
    shutil.copytree(tiny_run.shards, copy.shards)
    config = (copy.folder / "config.yaml").read_text()
    (copy.folder / "config.yaml").write_text(config.replace(str(tiny_run.shards), str(copy.shards)))
    return copy


def flip_byte(path: Path, after: bytes) -> None:
    """Changes the byte of a file that follows the first `after`."""
    data = bytearray(path.read_bytes())
    data[data.index(after) + len(after)] ^= 1
    path.write_bytes(data)


def test_help_is_complete_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pile_app.cli import format_help; print(format_help()); "
        "print([name for name in ('numpy', 'torch', 'lightning', 'jsonargparse', 'argparse') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("[]")
    for command in COMMANDS:
        assert re.search(rf"^  {command}\s", shown, re.MULTILINE), shown


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert f"usage: pile {command} " in shown or command == "train"
        assert all(action.help for action in make_parser(command, load_command(command))[0]._actions), "an option without help"


def options_of(command: str) -> dict[str, Any]:
    parser, _ = make_parser(command, load_command(command))
    return {action.dest: action for action in parser._actions}


def test_an_option_means_the_same_in_every_command() -> None:
    commands = {name: options_of(name) for name in COMMANDS if name != "train"}

    def of(option: str) -> list[Any]:
        return [options[option] for options in commands.values() if option in options]

    assert {action.default for action in of("device")} == {"auto"} and len(of("device")) >= 7
    assert {action.help.split(" (")[0] for action in of("checkpoint")} == {"last, best, previous, or a path"}
    assert all("folder" in action.help.split()[0] for action in of("output") if action.option_strings)
    assert all("SHARDS" in action.help or "shards" in action.help for action in of("on")) and len(of("on")) == 3


def test_options_take_dashes_or_underscores_and_mistakes_are_one_line(fails: Fails, tmp_path: Path) -> None:
    parser, _ = make_parser("generate", load_command("generate"))
    assert parser.parse_args(["run", "--to", "text", "--top_p", "0.5"]).top_p == 0.5
    assert "did you mean generate?" in fails("generat")
    assert "one of ['text', 'image', 'audio', 'any']" in fails("generate", "x", "--to", "txt")
    assert "are required: to" in fails("generate", "x") and "--count: Expected" in fails(
        "generate", "x", "--to", "text", "--count", "a"
    )
    assert "no option: write settings as for pile train" in fails("plan", "data.context=64")
    assert "there is no configuration 'nix'; give a file, or choose from" in fails("train", "--config", "nix")
    assert [find_config(name).name for name in ("1.5b", "tasks/chat", "chat", "conf/lstm.yaml")] == [
        "1.5b.yaml", "chat.yaml", "chat.yaml", "lstm.yaml",
    ]  # fmt: skip
    (tmp_path / "options.yaml").write_text("to: text\ncount: 0\n")
    assert "--count must be at least 1" in fails("generate", "x", "--config", tmp_path / "options.yaml")


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pile_app.cli.run_command", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["index", "x"])
    assert stopped.value.code == 130 and capsys.readouterr().err.strip() == "pile: index was interrupted"


def test_an_installed_package_brings_configurations_and_the_demos_recipe(tmp_path: Path) -> None:
    """As a wheel lays it out, in an empty folder."""
    installed, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "shards", "*.partial", "model.safetensors")
    shutil.copytree(REPOSITORY / "pile_app", installed / "pile_app", ignore=ignored)
    sources = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "sources"
    ]
    for folder, target in sources.items():
        shutil.copytree(REPOSITORY / folder, installed / target, ignore=ignored)
    code = (
        "from pile_app.cli import main; from pile_app.bundled import copy_recipe; copy_recipe('data/digits/prepare.py'); "
        "main(['train', '--config', 'text_only', '--print_config'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text_only = yaml.safe_load((REPOSITORY / "conf" / "text_only.yaml").read_text())
    printed = yaml.safe_load(done.stdout.partition("\n")[2])
    assert printed["name"] == text_only["name"] and printed["data"]["prepare"] == "data/digits/prepare.py"
    assert {"data/digits/prepare.py", "data/digits_chat/prepare.py", "data/recipe.py", "data/speech.py"} <= {
        str(path.relative_to(empty)) for path in empty.rglob("*.py")
    }


# -- prepare, index, tokenizer


def test_prepare_then_index_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails) -> None:
    source = tmp_path / "notes"
    source.mkdir()
    for n in range(20):
        (source / f"{n}.txt").write_text(f"note {n} \r\n")
    pile("prepare", source, tmp_path / "out", "--validation-fraction", "0.3", "--seed", "1", "--no-clean")
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["options"]["clean"] is False and description["options"]["seed"] == 1
    counts = {split: one["documents"] for split, one in description["sources"]["notes"].items()}
    assert sum(counts.values()) == 20 and 0 < counts["validation"] < 10
    assert "notes-train-[0-9]*.tar" in capsys.readouterr().out

    shard = tmp_path / "out" / "notes-train-000000.tar"
    stored = (tmp_path / "out" / "notes-train.manifest.safetensors").read_bytes()
    pile("index", tmp_path / "out" / "*.tar", "--verify")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{shard}: as indexed",
        f"{tmp_path / 'out' / 'notes-validation-000000.tar'}: as indexed",
    ]
    pile("index", shard, "--overwrite")
    assert capsys.readouterr().out.startswith(
        f"{counts['train']} samples: {counts['train']} documents; rejected: none; fields segments"
    )
    assert (tmp_path / "out" / "notes-train.manifest.safetensors").read_bytes() == stored

    assert "--overwrite" in fails("prepare", source, tmp_path / "out")
    pile("prepare", source, tmp_path / "out", "--overwrite", "--validation-fraction", "0")
    assert not (tmp_path / "out" / "notes-validation-000000.tar").exists()
    assert "does not exist" in fails("prepare", tmp_path / "nothing", tmp_path / "new")


def test_index_ends_in_a_balance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [*media_documents(6, "train"), Document((Segment(b"no image", "png"),), "broken")]
    write_shards(documents, tmp_path, "x")
    pile("index", tmp_path / "x-{000000..000000}.tar")
    shown = capsys.readouterr().out
    assert shown.startswith("7 samples: 6 documents; rejected: 1 undecodable_image (broken); fields segments")
    assert shown.endswith("x.manifest.safetensors\n")


def test_verify_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails) -> None:
    write_shards((Document((Segment(f"text {n}"),), f"key-{n}") for n in range(9)), tmp_path, "x")
    flip_byte(tmp_path / "x-000000.tar", b"text ")
    with pytest.raises(SystemExit):
        pile("index", tmp_path / "*.tar", "--verify")
    shown = capsys.readouterr()
    assert shown.out.endswith("x-000000.tar: 1 documents differ: key-0\n")
    assert shown.err.startswith("pile: error: 1 documents differ")
    pile("index", tmp_path / "*.tar")
    pile("index", tmp_path / "*.tar", "--verify")
    assert "no shard matches" in fails("index", tmp_path / "none-*.tar")


def test_shards_of_a_server_are_indexed_verified_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PILE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    write_shards((Document((Segment(f"text {n}"),), f"key-{n}") for n in range(9)), tmp_path / "served", "x")
    with serving(functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))) as port:
        url = f"http://127.0.0.1:{port}/x-000000.tar"
        pile("tokenizer", url, tmp_path / "t.json", "--kind", "bpe", "--size", "260")
        write_shards([Document((Segment("changed"),), "new")], tmp_path / "served", "x")
        capsys.readouterr()
        pile("index", url, "--verify")
        pile("index", url)
        pile("index", url, "--verify")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{url}: as indexed",  # the copy that was fetched
        "1 samples: 1 documents; rejected: none; fields segments",
        *[line for line in lines if "manifests" in line],
        f"{url}: as indexed",
    ]


def test_tokenizer_from_shards_and_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat sat on the mat\r\n" * 9)
    (tmp_path / "texts" / "b.png").write_bytes(b"no text")
    write_shards([Document((Segment("the cat sat on the mat\n" * 9),), "a")], tmp_path / "shards", "x")
    pile("tokenizer", tmp_path / "texts", tmp_path / "a" / "folder.json", "--kind", "bpe", "--size", "264")
    pile("tokenizer", tmp_path / "shards" / "*.tar", tmp_path / "shards.json", "--kind", "bpe", "--size", "264")
    assert (tmp_path / "a" / "folder.json").read_bytes() == (tmp_path / "shards.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "shards.json")).size == 264
    assert "264 tokens; train with --model.tokenizer" in capsys.readouterr().out
    pile("tokenizer", tmp_path / "texts", tmp_path / "words.json", "--kind", "words", "--size", "4")
    assert load_tokenizer(str(tmp_path / "words.json")).size == 4

    (tmp_path / "empty").mkdir()
    assert "holds no text" in fails("tokenizer", tmp_path / "empty", tmp_path / "t.json", "--kind", "bpe", "--size", "300")
    assert "smallest sizes" in fails("tokenizer", tmp_path / "texts", tmp_path / "t.json", "--kind", "bpe", "--size", "9")
    assert "does not exist" in fails("tokenizer", tmp_path / "nix", tmp_path / "t.json", "--kind", "bpe", "--size", "300")
    assert not (tmp_path / "t.json").exists()


# -- generate


def media_files(folder: Path) -> dict[str, Path]:
    """One file of each kind a prompt takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    wave = 0.4 * np.sin(np.arange(4410) / 9)
    for extension in ("png", "jpg", "webp"):
        Image.fromarray(pixels).save(folder / f"a.{extension}")
    for extension in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(folder / f"a.{extension}", wave, 22_050)
    return {path.suffix[1:]: path for path in folder.glob("a.*")}


def test_generate_writes_every_modality(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = media_files(tmp_path)
    out = tmp_path / "out"
    common = ("--seed", "3", "--output", out)
    pile("generate", tiny_run.folder, "--text", "number", "--to", "text", "--count", "2", "--max-text", "9", *common)
    printed = capsys.readouterr().out
    texts = [(out / f"{n:03d}.txt").read_text() for n in range(2)]
    assert printed == "".join(f"{text}\n{out / f'{n:03d}.txt'}\n" for n, text in enumerate(texts))
    assert texts[0] != texts[1]

    pile(
        "generate", tiny_run.folder, "--audio", files["wav"], "--text", "number 3", "--to", "image", "--guidance", "2", *common
    )
    assert capsys.readouterr().out == f"{out / '000.png'}\n"
    assert Image.open(out / "000.png").size == (8, 8)

    pile("generate", tiny_run.folder, "--image", files["jpg"], "--to", "audio", "--max-seconds", "0.5", *common)
    samples, rate = soundfile.read(out / "000.wav")
    assert rate == 8000 and 0 < len(samples) <= 4000


def test_generate_writes_into_the_run_by_default(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path).folder
    shutil.rmtree(tmp_path / "shards")  # generation needs none
    pile("generate", run, "--to", "image", "--checkpoint", "best")
    assert (run / "generated" / "000.png").is_file()
    pile("generate", run, "--to", "image", "--checkpoint", run / "checkpoints" / "last.ckpt")


def test_same_seed_same_answer(tiny_run: TinyRun, tmp_path: Path) -> None:
    answers = []
    for number, more in enumerate(([], [], ["--seed", "5"])):
        prompt = ("--text", "number", "--to", "text", "--max-text", "24", "--output", tmp_path / str(number))
        pile("generate", tiny_run.folder, *prompt, *more)
        answers.append((tmp_path / str(number) / "000.txt").read_text())
    assert answers[0] == answers[1] != answers[2]


def test_prompt_keeps_the_order_of_the_command_line(tmp_path: Path) -> None:
    files = media_files(tmp_path)
    parts = ["--text", "one", "--audio", files["flac"], "--text", "two", "--image", files["png"], "--audio", files["mp3"]]
    parser, _ = make_parser("generate", load_command("generate"))
    options = parser.parse_args(["run", *map(str, parts), "--to", "text"])
    segments = read_prompt(options.prompt).segments
    assert [segment.modality for segment in segments] == [TEXT, AUDIO, TEXT, IMAGE, AUDIO]
    assert [segment.text for segment in segments if segment.modality == TEXT] == ["one", "two"]
    assert segments[1].file == files["flac"].read_bytes()


def test_a_choice_is_one_of_the_choices_and_comes_with_log_probabilities(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--text", "number", "--to", "text", "--logprobs", "--output", tmp_path)
    pile("generate", tiny_run.folder, *common, "--choices", " 1", " 22", " 333", "--temperature", "0")
    told = json.loads((tmp_path / "000.json").read_text())
    assert (
        told["text"] == (tmp_path / "000.txt").read_text() == max(told["log_probabilities"], key=told["log_probabilities"].get)
    )
    pile("generate", tiny_run.folder, *common, "--max-text", "5")
    told = json.loads((tmp_path / "000.json").read_text())
    assert told["ended_by"] == "limit" and len(told["tokens"]) == 5
    assert told["log_probability"] == pytest.approx(sum(one["log_probability"] for one in told["tokens"]))
    assert (tmp_path / "000.txt").read_text() in capsys.readouterr().out


def test_generate_any_lets_the_model_choose_what_comes(tiny_run: TinyRun, tmp_path: Path) -> None:
    for seed in range(8):
        pile("generate", tiny_run.folder, "--to", "any", "--seed", str(seed), "--max-seconds", "0.3", "--output", tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written and all(name.startswith("000-") and name.endswith((".txt", ".png", ".wav")) for name in written)


def test_prompt_takes_every_kind_of_media(tmp_path: Path) -> None:
    files = media_files(tmp_path)
    for extension, path in files.items():
        name = "image" if extension in ("png", "jpg", "webp") else "audio"
        (segment,) = read_prompt([(name, str(path))]).segments
        assert (segment.extension, segment.data) == (extension, path.read_bytes())
    assert read_prompt([]).segments == ()


def test_generate_refuses_in_one_line(tiny_run: TinyRun, tmp_path: Path, fails: Fails) -> None:
    run = tiny_run.folder
    (tmp_path / "bad.png").write_bytes(b"no image")
    soundfile.write(tmp_path / "silent.wav", np.zeros(800), 8000)
    assert "there is no run folder" in fails("generate", tmp_path / "nix", "--to", "text")
    assert "holds no config.yaml" in fails("generate", tmp_path, "--to", "text")
    assert "checkpoints of run" in fails("generate", run, "--to", "text", "--checkpoint", tmp_path / "nix.ckpt")
    assert "cannot be read" in fails("generate", run, "--to", "text", "--checkpoint", tmp_path / "bad.png")
    assert "cannot be read" in fails("generate", run, "--to", "text", "--checkpoint", tmp_path)
    assert "'nix.png'" in fails("generate", run, "--image", "nix.png", "--to", "text")
    assert "undecodable_image" in fails("generate", run, "--image", tmp_path / "bad.png", "--to", "text")
    assert "silent_audio" in fails("generate", run, "--audio", tmp_path / "silent.wav", "--to", "text")
    assert "has to end in .wav, .flac" in fails("generate", run, "--audio", tmp_path / "bad.png", "--to", "text")
    assert "--count" in fails("generate", run, "--to", "text", "--count", "0")
    assert "top_p" in fails("generate", run, "--to", "text", "--top-p", "0")


def test_checkpoint_of_another_shape_or_config_of_another_kind(tiny_run: TinyRun, tmp_path: Path, fails: Fails) -> None:
    run = copy_run(tiny_run, tmp_path).folder
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("width: 32", "width: 64"))
    assert "another shape" in fails("generate", run, "--to", "text")
    (run / "config.yaml").write_text(config.replace("codec_steps:", "codec_step:"))
    assert "is not a configuration of this version of Pile" in fails("generate", run, "--to", "text")
    (run / "config.yaml").write_text("model: [")
    assert "is not YAML" in fails("generate", run, "--to", "text")
    (run / "config.yaml").write_text("a: 1")
    assert "no model and data" in fails("generate", run, "--to", "text")
    (run / "config.yaml").write_text(config)
    shutil.rmtree(run / "checkpoints")
    assert "checkpoints of run" in fails("generate", run, "--to", "text") and fails("generate", run, "--to", "text").count(
        "none"
    )


def test_a_modality_the_model_does_not_know(tiny_run: TinyRun, tmp_path: Path, fails: Fails) -> None:
    files = media_files(tmp_path)
    run = copy_run(tiny_run, tmp_path).folder
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"  audio:\n(    .*\n)+", "  audio: null\n", config))
    module, _, _ = _load_without_checkpoint(run)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) | {"state_dict": module.state_dict()}
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    assert "no audio codec" in fails("generate", run, "--to", "audio")
    assert "no audio codec" in fails("generate", run, "--audio", files["wav"], "--to", "text")


def _load_without_checkpoint(run: Path) -> Any:
    from pile_app.training.load import build_run, read_config

    return *build_run(run, read_config(run)), None


def test_load_run_gives_the_trained_weights(tiny_run: TinyRun) -> None:
    module, data, checkpoint = load_run(tiny_run.folder)
    saved = checkpoint["state_dict"]
    assert checkpoint["global_step"] == 6 and not module.training
    assert module.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    assert data.vocabulary is module.vocabulary or data.vocabulary == module.vocabulary
    assert data.train_data == [], "no shard is opened before setup"


# -- inspect


def batch_of_step(run: Path, step: int) -> tuple[Any, Any]:
    """(data module, the batch that the training loader gives for a step)."""
    _, data, _ = load_run(run)
    data.setup()
    trainer = SimpleNamespace(distributed_sampler_kwargs=None, local_rank=0, global_step=step - 1, max_steps=6)
    data.trainer = trainer  # type: ignore[assignment]
    return data, next(iter(data.train_dataloader()))


@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_inspect_lists_what_the_training_loader_gives(
    tiny_run: TinyRun, tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pile("inspect", tiny_run.folder, "--step", str(step), "--output", tmp_path)
    description = json.loads((tmp_path / "documents.json").read_text())
    data, batch = batch_of_step(tiny_run.folder, step)
    documents = description["documents"]
    assert description["positions"] == [4 * (step - 1), 4 * step] and description["trained"]
    assert description["phase"] == ("codecs" if step <= 2 else "language model")
    assert [(one["source"], one["key"]) for one in documents] == [
        (data.source_names[source], key) for of_pack in batch.documents for source, key, *_ in of_pack
    ]
    hidden = 0
    for one in documents:
        assert one["rejected"] is None
        row, (start, stop), place = one["position"] - 4 * (step - 1), one["tokens"], one["place"]
        tokens = batch.tokens[row, place : place + stop - start].tolist()
        assert (batch.position[row, place : place + stop - start] == torch.arange(stop - start)).all()
        if start:
            continue
        openers = [MODALITIES[Vocabulary.OPENERS.index(token)] for token in tokens if token in Vocabulary.OPENERS]
        assert openers == [segment["modality"] for segment in one["segments"]]
        for segment in one["segments"]:
            if "text" in segment and not segment["hidden"]:
                expected = [byte + Vocabulary.SPECIALS for byte in segment["text"].encode()]
                assert str(expected)[1:-1] in str(tokens)[1:-1]
        hidden += any(segment["hidden"] for segment in one["segments"])
        assert (Vocabulary.NULL in tokens) == any(segment["hidden"] for segment in one["segments"])
    given = [s for one in documents for s in one["segments"] if s.get("text") == "what is this?"]
    assert not any(segment["learned"] for segment in given)
    assert f"positions {4 * (step - 1)} to {4 * step - 1}, {len(documents)} documents" in capsys.readouterr().out


def test_inspect_saves_media_as_stored(tiny_run: TinyRun, tmp_path: Path) -> None:
    stored = {d.key: d for d in media_documents(60, "train")}
    seen = set()
    for step in range(1, 7):
        pile("inspect", tiny_run.folder, "--step", str(step), "--output", tmp_path / str(step))
        for one in json.loads((tmp_path / str(step) / "documents.json").read_text())["documents"]:
            for segment in one["segments"]:
                if "file" in segment:
                    original = next(s for s in stored[one["key"]].segments if s.modality != TEXT)
                    assert (tmp_path / str(step) / segment["file"]).read_bytes() == original.file
                    seen.add(segment["modality"])
    assert seen == {"image", "audio"}


def test_inspect_limit_default_folder_and_steps_to_come(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails
) -> None:
    run = copy_run(tiny_run, tmp_path).folder
    pile("inspect", run, "--step", "9", "--limit", "2")
    description = json.loads((run / "inspect" / "step-9" / "documents.json").read_text())
    assert len(description["documents"]) == 2 < description["found"] and not description["trained"]
    shown = capsys.readouterr().out
    assert "planned: the checkpoint is from before it" in shown
    assert f"and {description['found'] - 2} more documents" in shown
    assert "count from 1" in fails("inspect", run, "--step", "0")
    assert "count from 1" in fails("inspect", run, "--step", "1", "--limit", "0")


def test_inspect_tells_what_was_rejected(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copy_run(tiny_run, tmp_path)
    pile("inspect", copy.folder, "--step", "4")
    documents = json.loads((copy.folder / "inspect" / "step-4" / "documents.json").read_text())["documents"]
    key = next(one["key"] for one in documents if one["source"] == "media")
    for shard in expand_shards(str(copy.shards / "media-train-*.tar")):
        if f"{key}.json".encode() in Path(shard).read_bytes():
            flip_byte(Path(shard), f'number {key.removeprefix("train-")}"'.encode())
    pile("inspect", copy.folder, "--step", "4")
    after = json.loads((copy.folder / "inspect" / "step-4" / "documents.json").read_text())["documents"]
    assert [one["key"] for one in after] == [one["key"] for one in documents]
    assert {one["key"] for one in after if one["rejected"]} == {key}
    assert "not used, checksum" in capsys.readouterr().out


def test_inspect_refuses_other_shards(tiny_run: TinyRun, tmp_path: Path, fails: Fails) -> None:
    copy = copy_run(tiny_run, tmp_path)
    shard = copy.shards / "prose-train-000000.tar"
    flip_byte(shard, b"lorem")
    Shards(str(shard), again="all")
    message = fails("inspect", copy.folder, "--step", "1")
    assert "fingerprints {'prose':" in message and "restore the shards" in message
    (copy.shards / "prose-train.manifest.safetensors").write_bytes(b"no manifest")
    assert "prose-train.manifest.safetensors' cannot be read" in fails("inspect", copy.folder, "--step", "1")
    shard.unlink()
    assert "no shard matches" in fails("inspect", copy.folder, "--step", "1")


def test_inspect_refuses_another_order(tiny_run: TinyRun, tmp_path: Path, fails: Fails) -> None:
    copy = copy_run(tiny_run, tmp_path)
    config = (copy.folder / "config.yaml").read_text()
    (copy.folder / "config.yaml").write_text(config.replace("\n  seed: 0", "\n  seed: 1"))
    assert "seed 0, now it is 1" in fails("inspect", copy.folder, "--step", "1")
