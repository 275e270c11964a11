"""Commands around a training run: plan, train, evaluate, compare, export."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def train(*settings: str) -> None:
    """Train a model, or resume a run: `python train.py` and `pile train` are the same.

    Args:
        settings: the options of LightningCLI; --config takes a file or the name of one in conf/: --config text_only
    """
    from pile_app.training.cli import main

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    is_script = Path(sys.argv[0]).name == "train.py"
    main(list(settings), ("python", sys.argv[0]) if is_script else ("pile", "train"))


def plan(
    *settings: str, devices: int | None = None,
    hardware: Literal["h100", "h200", "b200", "a100", "l40s", "rtx4090", "cpu"] = "h100", utilization: float = 0.4,
    text_tokens: int = 32_762, read_data: bool = False,
) -> None:  # fmt: skip
    """Tell what a configuration will need, how long it will take, and what is unwise in it.

    Takes all options of `pile train` as well: --config conf/sizes/7b.yaml --data.global_batch 64. Nothing of the model is
    allocated. Memory is that of a language-model step, not of the codec phase. Exits with 2 if a step does not fit a device.

    Args:
        devices: devices of the whole run (default: those of the configuration, else 1)
        hardware: kind of the devices
        utilization: fraction of the hardware's FLOP/s that is reached
        text_tokens: size of a tokenizer that does not exist yet
        read_data: open the shards: fill, lengths, modalities, epochs
    """
    from pile_app.bundled import find_configs
    from pile_app.training.plan import Plan

    if wrong := [word for word in settings[:1] if not word.startswith("--")]:
        raise ValueError(f"{wrong[0]!r} is no option: write settings as for pile train, e.g. --data.global_batch 64")
    found = Plan(find_configs(settings), devices, hardware, utilization, text_tokens, read_data)
    print(found)
    if not found.fits:
        sys.exit(2)


def evaluate(
    run: Path, *, on: Sequence[str] = (), tasks: str | None = None, include: Path | None = None, fewshot: int | None = None,
    limit: int | None = None, checkpoint: str = "auto", output: Path | None = None,
) -> None:  # fmt: skip
    """Measure a run on shards: perplexity, bits per byte, accuracy, codecs, its objective; or on tasks of lm-eval.

    Args:
        on: SHARDS or NAME=SHARDS: quoted patterns or URLs (default: the validation data of the run)
        tasks: NAME[,NAME]: tasks of lm-eval instead of shards (extra lm-eval)
        include: folder of YAML files of own tasks; only those are known then
        fewshot: solved examples before each question (default: as each task says)
        limit: at most this many documents of each task
        output: folder for the figures (default: RUN)
    """
    from pile_app.commands.data import parse_sources

    folder = output or run
    if tasks is None:
        if include is not None or fewshot is not None or limit is not None:
            raise ValueError("--include, --fewshot and --limit belong to --tasks")
        from pile_app.tasks.evaluate import evaluate as measure
        from pile_app.tasks.evaluate import print_tables

        file = folder / "evaluation.json"
        print_tables(measure(run, parse_sources(on), checkpoint, file))
    else:
        if on:
            raise ValueError("give --on or --tasks, not both")
        from pile_app.tasks.harness import evaluate_tasks, print_tasks

        file = folder / "evaluation-tasks.json"
        print_tasks(evaluate_tasks(run, tasks.split(","), include, fewshot, limit, checkpoint, file))
    print(f"saved in {file}")


def compare(runs: Sequence[Path], *, output: Path | None = None) -> None:
    """Compare runs: their curves by steps, tokens and seconds, final figures, and settings that differ, on one page.

    Args:
        runs: folders of the runs
        output: folder for compare.html (default: the folder that holds the first run)
    """
    from pile_app.tasks.evaluate import print_table
    from pile_app.training.report import write_comparison

    page = (output or runs[0].resolve().parent) / "compare.html"
    names, figures, settings = write_comparison(runs, page)
    print_table("final figures", ["", *names], figures)
    print_table("settings that differ", ["", *names], settings)
    print(f"saved: open {page}")


def export(run: Path, output: Path, *, format: Literal["pile", "huggingface"] = "pile", checkpoint: str = "auto") -> None:
    """Write a run's model as safetensors with its config, to hand on.

    FusedLanguageModel.from_pretrained(FOLDER) reads it; no code of the folder is run.

    Args:
        output: new folder for config.json, weights and tokenizer
        format: huggingface: NanoChatForCausalLM of transformers, for text-only Transformers without skips and with sharpness 1
    """
    from pile_app.model.pretrained import save_pretrained
    from pile_app.training.load import load_run, read_config

    module, data, saved = load_run(run, checkpoint)
    config = read_config(run)["model"]
    if format == "huggingface":
        from pile_app.model.huggingface import save_huggingface

        save_huggingface(module.model, config.get("tokenizer", "bytes"), data.context, output)
    else:
        save_pretrained(module.model, config, output)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: the model after step {saved['global_step']:,}, {size / 1e6:,.1f} MB")
