"""`pile encode`: shards to token ids, once."""

from __future__ import annotations

import argparse
from pathlib import Path

from pile_app.commands.index import open_shards

SUMMARY = "write shards anew as token ids, so that training need not decode them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "pile encode [options] RUN SHARDS [SHARDS ...] OUTPUT\n"
        "       pile encode [options] --tokenizer FILE SHARDS [SHARDS ...] OUTPUT"
    )
    parser.epilog = "Train with model.codecs_from RUN/checkpoints/last.ckpt and model.codec_steps 0: other codecs are refused."
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folder of the run, shards (quoted patterns), new folder")
    parser.add_argument("--tokenizer", help="instead of a run: encode the texts alone, with this tokenizer.json")
    parser.add_argument("--checkpoint", default="last", help="last, best, previous, or a file")
    parser.add_argument("--device", default="cpu", help="that the codecs compute on: cpu, cuda ...")
    parser.add_argument("--batch", type=int, default=64, help="images or sounds that are encoded at once")
    parser.add_argument("--overwrite", action="store_true", help="encode anew what is there already")


def run(options: argparse.Namespace) -> None:
    paths = list(options.paths)
    if len(paths) < (2 if options.tokenizer else 3):
        raise ValueError("pile encode takes RUN SHARDS OUTPUT, or --tokenizer FILE SHARDS OUTPUT")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {options.batch}")
    from pile_app.data.tokenizers import load_tokenizer
    from pile_app.tasks import encode

    run = None if options.tokenizer else Path(paths.pop(0))
    folder = Path(paths.pop())
    shards = open_shards(paths)
    if run is None:
        encoders = encode.Encoders(load_tokenizer(options.tokenizer), batch=options.batch)
    else:
        encoders = encode.Encoders.of_run(run, options.checkpoint, options.device, options.batch)
    found = encode.encode_shards(shards, folder, encoders, options.overwrite)
    print(f"{len(found):,} shards in {folder}: {encode.describe_counts(list(found.values()))}")
