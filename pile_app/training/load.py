"""Load the model of a run folder for inference: `runs/<name>/` -> module with its weights, data module, checkpoint.

Nothing of training is built (no Trainer, no logger). The weights are mapped, the optimizer's state is not read, and no shard is
opened before `data.setup()` is called.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from torch.overrides import TorchFunctionMode

from pile_app.data.datamodule import PileDataModule
from pile_app.model import backbones
from pile_app.model.fused import AUTOCAST
from pile_app.model.pretrained import check_shapes, take_readers
from pile_app.model.pretrained_codecs import take_codecs
from pile_app.training.checkpoints import find_damage, read_checkpoint
from pile_app.training.module import PileModule
from pile_app.training.muon import cpu_multiplies_bfloat16

TOKENIZER = "tokenizer.json"  # the copy of `model.tokenizer` in the folder of a run
BACKBONE = "backbone"  # config and tokenizer of open weights there
OPEN_CONTEXT = 2048  # tokens that open weights see at a time, where no run says otherwise


FILLING = ("uniform_", "normal_", "zero_", "fill_")


class SkipInitialization(TorchFunctionMode):
    """Within this context, modules do not initialize their weights, which are replaced anyway.

    Allocated memory that is never written takes no room.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = (kwargs or {}).get("tensor", args[0] if args else None)
        is_filled = getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in FILLING
        if is_filled and isinstance(tensor, torch.nn.Parameter):
            return tensor
        return (torch.empty if func is torch.randn else func)(*args, **kwargs or {})


def load_run(run: Path, checkpoint: str = "auto") -> tuple[PileModule, PileDataModule, dict[str, Any]]:
    """Return the module in evaluation mode on the CPU, the data module, and the checkpoint as it was saved.

    Args:
        run: folder of the run; or of open weights of transformers, or their GGUF file, which are taken as they are.
        checkpoint: "auto", "last", "best", "previous" (the one before the last), or the path of a checkpoint. "auto": the one
            that the run's summary is about, the best with an objective, else the last.

    Raises:
        ValueError: `run` is not the folder of a run, holds no such checkpoint, or config and checkpoint do not belong together.
    """
    config = read_config(run)
    if is_open_weights(run):
        module, data = build_run(run, config)
        return module.eval(), data, {"global_step": 0, "state_dict": module.state_dict()}
    path = find_checkpoint(run, checkpoint)
    if damage := find_damage(path, "weights"):
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {damage}")
    with SkipInitialization():
        module, data = build_run(run, config)
    saved = read_checkpoint(path, optimizer=False)
    try:
        check_shapes(module, saved["state_dict"])
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not fit {str(run / 'config.yaml')!r}: {error}") from error
    module.load_state_dict(saved["state_dict"], assign=True)
    trained = saved.get("PileDataModule", {}).get("tokenizer", module.tokenizer.fingerprint)
    if module.tokenizer.fingerprint != trained:
        wrong = f"is not that of the run {str(run)!r} (fingerprint {module.tokenizer.fingerprint} instead of {trained})"
        raise ValueError(f"the tokenizer {config['model']['tokenizer']!r} {wrong}: put that one back")
    precision = (config.get("trainer") or {}).get("precision") or fast_precision("auto")
    module.model.autocast_dtype = AUTOCAST.get(str(precision))
    data.vocabulary = module.vocabulary  # which knows the codecs, now that they are loaded
    return module.eval(), data, saved


def fast_precision(accelerator: Any) -> str:
    """bf16-mixed (weights stay float32) where the hardware multiplies bfloat16, for the demo a third faster; else 32-true."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_multiplies_bfloat16() else "32-true"


def load_on(run: Path, checkpoint: str, device: str = "auto") -> tuple[PileModule, PileDataModule, dict[str, Any]]:
    """Load a run onto a device; "auto": a GPU if there is one."""
    module, data, saved = load_run(run, checkpoint)
    module.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return module, data, saved


def read_config(run: Path) -> dict[str, Any]:
    """Read `config.yaml` of a run folder, with the run's own copy of its tokenizer."""
    path = run / "config.yaml"
    if is_open_weights(run):
        backbone = {"class_path": "HuggingFace", "init_args": {"path": str(run)}}
        data = {"sources": {"open": {"train": "none"}}, "context": OPEN_CONTEXT}
        return {"model": {"backbone": backbone}, "data": data, "trainer": {}}
    if not run.is_dir():
        raise ValueError(f"there is no run folder {str(run)!r} (working folder {os.getcwd()})")
    if not path.is_file():
        raise ValueError(f"{str(run)!r} is not the folder of a run: it holds no config.yaml")
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(config, dict) or not {"model", "data"} <= config.keys():
        raise ValueError(f"{str(path)!r} has no model and data: it is not the config.yaml of a run")
    if config["model"].get("tokenizer", "bytes") != "bytes" and (run / TOKENIZER).is_file():
        config["model"]["tokenizer"] = str(run / TOKENIZER)
    take_description(config["model"], run)
    return config


def is_open_weights(run: Path) -> bool:
    """Whether it is no run, but a folder of transformers or a GGUF file."""
    try:
        return run.suffix == ".gguf" or "model_type" in json.loads((run / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def is_pretrained(backbone: Any) -> bool:
    """Whether a backbone of a configuration, a class and its arguments, starts from open weights."""
    module, _, name = backbone["class_path"].rpartition(".")
    return bool(getattr(import_module(module or backbones.__name__), name).is_pretrained)


def take_description(model: Any, run: Path) -> None:
    """Let open weights be built from the description in the run's folder, where the checkpoint has the weights, and
    pretrained codecs and readers be read from there."""
    if (run / BACKBONE).is_dir() and is_pretrained(model["backbone"]):
        arguments = model["backbone"]["init_args"]
        arguments["path"], arguments["pretrained"] = str(run / BACKBONE), False
    take_codecs(model, run)
    take_readers(model.get("readers"), run)


def find_checkpoint(run: Path, checkpoint: str) -> Path:
    """Return the file or folder of a checkpoint; see `load_run`."""
    if is_open_weights(run):
        return run
    if checkpoint == "auto":
        has_best = read_config(run)["model"].get("objective") and (run / "checkpoints" / "best.ckpt").exists()
        checkpoint = "best" if has_best else "last"
    named = checkpoint in ("last", "best", "previous")
    path = run / "checkpoints" / f"{checkpoint}.ckpt" if named else Path(checkpoint)
    if not path.exists():
        found = ", ".join(sorted(file.stem for file in (run / "checkpoints").glob("*.ckpt"))) or "none"
        raise ValueError(f"there is no checkpoint {str(path)!r}; checkpoints of run {str(run)!r}: {found}")
    return path


def link_model_to_data(parser: LightningArgumentParser) -> None:
    for name in ("vocabulary", "tokenizer", "annotator"):
        parser.link_arguments(f"model.{name}", f"data.{name}", apply_on="instantiate")


def build_run(run: Path, config: dict[str, Any]) -> tuple[PileModule, PileDataModule]:
    """Build model and data module of a run's configuration, without the files that training began with, and not compiled."""
    model = config["model"] | {"codecs_from": None, "start_from": None, "compile": False}
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(PileModule, "model")
    parser.add_lightning_class_args(PileDataModule, "data")
    link_model_to_data(parser)
    try:
        built = parser.instantiate_classes(parser.parse_object({"model": model, "data": config["data"]}))
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{str(run / 'config.yaml')!r} is not a configuration of this version of Pile: {error}") from error
    return built.model, built.data
