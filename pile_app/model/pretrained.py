"""A model as a folder that can be handed on: weights without anything that could run.

    config.json        sizes, by the names that `FusedLanguageModel` and its parts take
    model.safetensors  weights
    tokenizer.json     where the tokenizer is not bytes

Reading it runs nothing of the folder: safetensors holds numbers only, and the backbone is named, one of `backbones.py`, not
imported. Where it is another, the caller passes its class.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pile_app.data.tokenizers import load_tokenizer
from pile_app.model import backbones
from pile_app.model.backbones import Backbone
from pile_app.model.codecs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel

FORMAT = 1
CODECS = {"image": ImageCodecConfig, "audio": AudioCodecConfig}


def save_pretrained(model: FusedLanguageModel, config: Mapping[str, Any], folder: Path) -> None:
    """Writes the folder.

    Args:
        model: whose weights are written, in their own precision.
        config: the `model` section of a run's config.yaml, which it was built from.
        folder: new, or empty.

    Raises:
        ValueError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: choose another folder to export to")
    folder.mkdir(parents=True, exist_ok=True)
    taken = [name for name in inspect.signature(FusedLanguageModel).parameters if name in config]
    values = {name: config[name] for name in taken}
    backbone = config["backbone"]
    values["backbone"] = {"class": backbone["class_path"].rpartition(".")[2], **(backbone.get("init_args") or {})}
    if config.get("tokenizer", "bytes") != "bytes":
        shutil.copyfile(config["tokenizer"], folder / "tokenizer.json")
        values["tokenizer"] = "tokenizer.json"
    description = {"format": FORMAT, "model": values, "vocabulary": asdict(model.vocabulary)}
    (folder / "config.json").write_text(json.dumps(description, indent=1))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(weights, temporary, {"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")


def load_pretrained(folder: Path, backbone_class: type[Backbone] | None = None) -> FusedLanguageModel:
    """The model of a folder that `save_pretrained` wrote, in evaluation mode on the CPU.

    Args:
        folder: see the module.
        backbone_class: of a model whose backbone is not one of `backbones.py`.

    Raises:
        ValueError: the folder is not one, or its parts do not belong together.
    """
    try:
        description = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(folder)!r} is not a folder that `pile export` wrote, or is damaged: {error}") from error
    if description.get("format") != FORMAT:
        raise ValueError(f"{str(folder / 'config.json')!r} has format {description.get('format')}, this version reads {FORMAT}")
    values = dict(description["model"])
    sizes = dict(values.pop("backbone"))
    name = sizes.pop("class")
    found = backbone_class or vars(backbones).get(name)
    if not (inspect.isclass(found) and issubclass(found, Backbone)):
        raise ValueError(f"{str(folder)!r} holds a backbone {name!r}, which is not Pile's: pass its class as backbone_class")
    tokenizer = values.pop("tokenizer", "bytes")
    if tokenizer != "bytes":  # never a path out of the folder
        tokenizer = str(folder / "tokenizer.json")
    parts = {key: make(**values.pop(key)) for key, make in CODECS.items() if values.get(key)}
    try:
        model = FusedLanguageModel(found(**sizes), load_tokenizer(tokenizer), **values | parts)
        model.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{str(folder)!r}: config.json and weights do not belong to this version of Pile: {error}") from error
    model.fingerprint_codecs()
    return model.eval()
