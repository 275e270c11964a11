"""A run folder back to its model: `runs/<name>/` -> module with its weights, data module, checkpoint.

Nothing of training is built (no Trainer, no logger), and no shard is opened before `data.setup()` is called.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from pile_app.data.datamodule import PileDataModule
from pile_app.model.fused import AUTOCAST
from pile_app.training.cli import make_model_parser
from pile_app.training.module import PileModule, check_shapes
from pile_app.training.resume import TOKENIZER, find_damage
from pile_app.training.sharded import read_checkpoint


def load_run(run: Path, checkpoint: str = "last") -> tuple[PileModule, PileDataModule, dict[str, Any]]:
    """The module in evaluation mode on the CPU, the data module, and the checkpoint as it was saved.

    Args:
        run: folder of the run.
        checkpoint: "last", "best", "previous" (the one before the last), or the path of a checkpoint.

    Raises:
        ValueError: `run` is not the folder of a run, holds no such checkpoint, or config and checkpoint do not belong together.
    """
    config = read_config(run)
    path = find_checkpoint(run, checkpoint)
    module, data = _build(run, config)
    if damage := find_damage(path):
        raise ValueError(f"checkpoint {str(path)!r} cannot be read, or is not one of a run of Pile: {damage}")
    saved = read_checkpoint(path)
    state = saved["state_dict"]
    try:
        check_shapes(module, state)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not fit {str(run / 'config.yaml')!r}: {error}") from error
    module.load_state_dict(state)
    trained = saved.get("PileDataModule", {}).get("tokenizer", module.tokenizer.fingerprint)
    if module.tokenizer.fingerprint != trained:
        raise ValueError(
            f"the tokenizer {config['model']['tokenizer']!r} is not the one that {str(run)!r} was trained with (fingerprint "
            f"{module.tokenizer.fingerprint} instead of {trained}): put that one back"
        )
    module.model.autocast_dtype = AUTOCAST.get(str((config.get("trainer") or {}).get("precision")))
    data.vocabulary = module.vocabulary  # which knows the codecs, now that they are loaded
    return module.eval(), data, saved


def read_config(run: Path) -> dict[str, Any]:
    """`config.yaml` of a run folder, with the run's own copy of its tokenizer."""
    path = run / "config.yaml"
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
    return config


def find_checkpoint(run: Path, checkpoint: str) -> Path:
    """The file or folder that "last", "best", "previous" or a path means."""
    named = checkpoint in ("last", "best", "previous")
    path = run / "checkpoints" / f"{checkpoint}.ckpt" if named else Path(checkpoint)
    if not path.exists():
        found = ", ".join(sorted(one.stem for one in (run / "checkpoints").glob("*.ckpt"))) or "none"
        raise ValueError(f"there is no checkpoint {str(path)!r}; checkpoints of run {str(run)!r}: {found}")
    return path


def _build(run: Path, config: dict[str, Any]) -> tuple[PileModule, PileDataModule]:
    model = config["model"] | {"codecs_from": None, "start_from": None, "compile": False}
    parser = make_model_parser()
    try:
        built = parser.instantiate_classes(parser.parse_object({"model": model, "data": config["data"]}))
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{str(run / 'config.yaml')!r} is not a configuration of this version of Pile: {error}") from error
    return built.model, built.data
