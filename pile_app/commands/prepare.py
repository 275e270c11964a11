"""`pile prepare`: data sets as they are to shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "make shards of your own texts, images and sounds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dataclasses import fields

    from pile_app.prepare.options import Options

    parser.epilog = "Interrupted work is kept in OUTPUT.partial and continued by the same command. See docs/prepare.md."
    parser.add_argument("input", help="file or folder to read, or the name of a data set on the Hugging Face hub")
    parser.add_argument("output", type=Path, help="folder for the shards")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="processes on this machine, or Ray Data")
    parser.add_argument("--processes", type=int, help="number of processes (default: one per core)")
    types = {"int": int, "float": float}
    for option in fields(Options):
        about, kind = option.metadata, str(option.type).split(" ")[0]
        names = {"dest": option.name, "help": about["help"], "default": option.default}
        flag = about["off"] or f"--{option.name.replace('_', '-')}"
        if kind == "bool":
            parser.add_argument(flag, action="store_false" if about["off"] else "store_true", **names)
            continue
        names |= {"nargs": "+", "default": []} if kind.startswith("tuple") else {"type": types.get(kind, str)}
        parser.add_argument(flag, choices=about["choices"] or None, metavar=about["metavar"], **names)


def run(options: argparse.Namespace) -> None:
    from pile_app.prepare.pipeline import prepare

    values = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        prepare(values.pop("input"), values.pop("output"), **values)
    except KeyboardInterrupt:  # `prepare` has printed a message
        sys.exit(130)
