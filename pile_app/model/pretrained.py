"""Weights into models, and models as folders that can be handed on.

    config.json        sizes, by the names that `FusedLanguageModel` and its parts take
    model.safetensors  weights
    tokenizer.json     where the tokenizer is not bytes

Reading a folder runs no code of it: safetensors holds numbers only, and the backbone is a class of `backbones.py`, by name; the
caller passes the class of any other.
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
from torch import Tensor, nn

from pile_app.data.tokenizers import load_tokenizer
from pile_app.model import backbones
from pile_app.model.backbones import Backbone
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.pretrained_codecs import save_codecs, take_codecs
from pile_app.model.readers import ReaderConfig, ReadersConfig

FORMAT = 1
CODECS = {"image": ImageCodecConfig, "audio": AudioCodecConfig}


def load_weights(model: nn.Module, source: Mapping[str, Tensor] | Path, prefix: str = "") -> None:
    """Copy weights into a model, or into a part of one, from tensors by name or a folder that `pile export` wrote.

    `prefix` of the names in the source ("model.", "model.image_codec."); tensors with other names are ignored. Raises
    ValueError if tensors are missing, unknown, or of another shape; the message lists them.
    """
    weights = _read_folder(source)[1] if isinstance(source, Path) else source
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    check_shapes(model, weights)
    model.load_state_dict(weights)


def check_shapes(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError if weights, by name, are not those of the module."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    saved = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    different = [f"{name}: {saved.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} in the model"
                 for name in sorted(own.keys() | saved.keys()) if own.get(name) != saved.get(name)]  # fmt: skip
    if different:
        shown, fix = "; ".join(different[:5]), "set the model back as it was, or choose another --name"
        raise ValueError(f"{len(different)} of {len(own)} tensors have another shape: {shown}; {fix}")


def save_pretrained(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Write a `FusedLanguageModel`, weights in their own precision, into a new or empty folder. `config`: the `model` section
    of the run's config.yaml. Raises ValueError if the folder is not empty."""
    make_empty(folder)
    values = {name: config[name] for name in inspect.signature(type(model)).parameters if name in config}
    backbone = config["backbone"]
    values["backbone"] = {"class": backbone["class_path"].rpartition(".")[2], **(backbone.get("init_args") or {})}
    if config.get("tokenizer", "bytes") != "bytes":
        shutil.copyfile(config["tokenizer"], folder / "tokenizer.json")
        values["tokenizer"] = "tokenizer.json"
    model.backbone.save_description(folder / "backbone")  # type: ignore[operator, union-attr]
    save_codecs(model.codecs, folder)  # type: ignore[arg-type]
    save_readers(model.readers, folder)  # type: ignore[arg-type]
    description = {"format": FORMAT, "model": values, "vocabulary": asdict(model.vocabulary)}  # type: ignore[call-overload]
    (folder / "config.json").write_text(json.dumps(description, indent=1))
    save_weights(model.state_dict(), folder)


def make_empty(folder: Path) -> None:
    """Create a folder. Raises ValueError if it holds something."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: choose another folder to export to")
    folder.mkdir(parents=True, exist_ok=True)


def save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `model.safetensors`, whole or not at all."""
    temporary = folder / "model.safetensors.tmp"
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    first = {weight.data_ptr(): name for name, weight in reversed(tensors.items())}
    tied = {name: weight.clone() for name, weight in tensors.items() if first[weight.data_ptr()] != name}
    save_file(tensors | tied, temporary, {"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")


def read_pretrained(folder: Path, backbone_class: type[Backbone] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the arguments of `FusedLanguageModel` and its weights from a folder; see `FusedLanguageModel.from_pretrained`."""
    description, weights = _read_folder(folder)
    arguments = dict(description["model"])
    sizes = dict(arguments.pop("backbone"))
    name = sizes.pop("class")
    found = backbone_class or vars(backbones).get(name)
    if not (inspect.isclass(found) and issubclass(found, Backbone)):
        raise ValueError(f"{str(folder)!r} holds a backbone {name!r}, which is not Pile's: pass its class as backbone_class")
    if found.is_pretrained:
        sizes |= {"path": str(folder / "backbone"), "pretrained": False}
    is_bytes = arguments.pop("tokenizer", "bytes") == "bytes"
    take_codecs(arguments, folder)
    try:
        arguments |= {key: make(**arguments[key]) for key, make in CODECS.items() if arguments.get(key)}
        readers = arguments.get("readers") or {}
        take_readers(readers, folder)
        arguments["readers"] = ReadersConfig(**{name: one and ReaderConfig(**one) for name, one in readers.items()})
        arguments["backbone"] = found(**sizes)
    except TypeError as error:
        raise ValueError(f"{str(folder / 'config.json')!r} does not belong to this version of Pile: {error}") from error
    file = "bytes" if is_bytes else str(folder / "tokenizer.json")  # never a path out of the folder
    arguments["tokenizer"] = load_tokenizer(arguments["backbone"].tokenizer or file, arguments["backbone"].turns)
    return arguments, weights


def save_readers(readers: Mapping[str, Any], folder: Path, again: bool = True) -> None:
    """Write what pretrained readers can be built from into `folder/<modality>_reader`; `again`: also if it is there."""
    for name, reader in readers.items():
        target = folder / f"{name}_reader"
        if again or not target.exists():
            shutil.rmtree(target, ignore_errors=True)
            reader.save_description(target)


def take_readers(readers: Any, folder: Path) -> None:
    """Let pretrained readers be built from where `save_readers` described them; their weights follow."""
    for name in CODECS:
        if (path := folder / f"{name}_reader").is_dir() and readers and readers.get(name) and readers[name].get("path"):
            readers[name]["path"], readers[name]["pretrained"] = str(path), False


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        description = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(folder)!r} is not a folder that `pile export` wrote, or is damaged: {error}") from error
    if description.get("format") != FORMAT:
        raise ValueError(f"{str(folder / 'config.json')!r} has format {description.get('format')}, this version reads {FORMAT}")
    return description, weights
