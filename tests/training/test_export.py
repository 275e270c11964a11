"""A model that is handed on: the same predictions, and no code in the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyRun

from pile_app.cli import main
from pile_app.model.backbones import Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.training.checkpoints import load_origin
from pile_app.training.load import load_run


def test_exported_model_is_the_model_of_the_run(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(tiny_run.folder), str(tmp_path / "out")])
    assert "the model after step 6" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    model, module = FusedLanguageModel.from_pretrained(tmp_path / "out"), load_run(tiny_run.folder)[0]
    ours, theirs = model.state_dict(), module.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not model.training
    model.fingerprint_codecs(), module.model.fingerprint_codecs()
    assert model.vocabulary == module.model.vocabulary
    with pytest.raises(SystemExit):
        main(["export", str(tiny_run.folder), str(tmp_path / "out")])
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(tiny_run.folder), str(tmp_path / "theirs"), "--format", "huggingface"])
    assert "model.image: null" in capsys.readouterr().err and not (tmp_path / "theirs").exists()


class Strange(Transformer):
    """A backbone that Pile does not know."""


def test_folder_names_no_code_to_run(tiny_model: Callable[..., FusedLanguageModel], tmp_path: Path) -> None:
    from pile_app.model.pretrained import save_pretrained

    sizes = {"width": 32, "layers": 2, "heads": 4, "key_value_heads": 2}
    backbone = {"class_path": f"{__name__}.Strange", "init_args": sizes}
    model = FusedLanguageModel(Strange(**sizes), tiny_model().tokenizer)
    save_pretrained(model, {"backbone": backbone, "tokenizer": "bytes", "dropout": 0.0}, tmp_path / "out")
    with pytest.raises(ValueError, match="'Strange', which is not Pile's"):
        FusedLanguageModel.from_pretrained(tmp_path / "out")
    assert isinstance(FusedLanguageModel.from_pretrained(tmp_path / "out", Strange).backbone, Strange)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["model"]["backbone"]["class"] = "torch"  # in the module's names, but no backbone
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not Pile's"):
        FusedLanguageModel.from_pretrained(tmp_path / "out")


def test_damaged_folder_is_refused_in_a_line(tiny_model: Callable[..., FusedLanguageModel], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        FusedLanguageModel.from_pretrained(tmp_path)


def test_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    from pile_app.data.tokenizers import load_tokenizer, train_tokenizer
    from pile_app.model.pretrained import save_pretrained

    train_tokenizer(["one two three"] * 5, "words", 5, tmp_path / "made" / "tokenizer.json")
    spec = str(tmp_path / "made" / "tokenizer.json")
    model = FusedLanguageModel(Transformer(width=32, layers=1, heads=2), load_tokenizer(spec))
    backbone = {"class_path": "pile_app.model.backbones.Transformer", "init_args": {"width": 32, "layers": 1, "heads": 2}}
    save_pretrained(model, {"backbone": backbone, "tokenizer": spec}, tmp_path / "out")
    (tmp_path / "made").rename(tmp_path / "gone")
    loaded = FusedLanguageModel.from_pretrained(tmp_path / "out")
    assert loaded.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("two one")) == "two one"


def test_training_starts_from_an_exported_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    main(["export", str(tiny_run.folder), str(tmp_path / "out")])
    model = load_run(tiny_run.folder)[0].model
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_origin(model, str(tmp_path / "out"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="neither a run, a readable checkpoint, nor a folder of `pile export`"):
        load_origin(model, str(tmp_path))
