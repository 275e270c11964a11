"""`pile export`: a run's model to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write a run's model as safetensors with its config, to hand on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "FusedLanguageModel.from_pretrained(FOLDER) reads it; no code of the folder is run."
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="new folder for config.json, weights and tokenizer")
    parser.add_argument(
        "--format",
        choices=("pile", "huggingface"),
        default="pile",
        help="huggingface: NanoChatForCausalLM of transformers, for text-only Transformers without skips and with sharpness 1",
    )
    parser.add_argument("--checkpoint", default="last", help="last, best, previous, or a file")


def run(options: argparse.Namespace) -> None:
    from pile_app.model.pretrained import save_pretrained
    from pile_app.training.load import load_run, read_config

    module, data, saved = load_run(options.run, options.checkpoint)
    config = read_config(options.run)["model"]
    if options.format == "huggingface":
        from pile_app.model.huggingface import save_huggingface

        save_huggingface(module.model, config.get("tokenizer", "bytes"), data.context, options.output)
    else:
        save_pretrained(module.model, config, options.output)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: the model after step {saved['global_step']:,}, {size / 1e6:,.1f} MB")
