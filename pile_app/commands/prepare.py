"""`pile prepare`: files of users to shards."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "make shards of own texts, images and sounds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Work is kept in OUTPUT.partial: the same command continues where it was interrupted. Every step is described in "
        "docs/prepare.md."
    )
    kinds = ("auto", "text", "images", "audio", "interleaved", "entities", "chat", "webdataset")
    parser.add_argument("input", type=Path, help="file or folder to read")
    parser.add_argument("output", type=Path, help="folder for the shards")
    parser.add_argument("--kind", choices=kinds, default="auto", help="what to read")
    parser.add_argument("--validation-share", type=float, default=0.01, help="share of the documents for validation")
    parser.add_argument("--seed", type=int, default=0, help="of the hash that splits training from validation")
    parser.add_argument("--shard-megabytes", type=float, default=64.0, help="size of a shard")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="processes here, or Ray Data")
    parser.add_argument("--processes", type=int, help="how many work at a time (default: one a core)")

    text = parser.add_argument_group("text")
    text.add_argument("--document-bytes", type=int, default=1 << 20, help="cut longer text files into several documents")
    text.add_argument("--repair", action="store_true", help="undo wrong decoding, HTML entities and the like (ftfy)")
    text.add_argument("--no-clean", dest="clean", action="store_false", help="keep texts as they are")
    text.add_argument(
        "--quality", type=lambda names: names.split(","), default=[], metavar="RULES", help="gopher, c4, or gopher,c4"
    )

    labels = parser.add_argument_group("labels (of classes; a column `label` is one without being asked for)")
    labels.add_argument("--label-column", metavar="NAME", help="column that holds the label; '': none does")
    labels.add_argument("--label-names", nargs="+", default=[], metavar="NAME", help="what classes 0, 1 ... are called")
    labels.add_argument("--text-column", nargs="+", default=[], metavar="NAME", help="columns that hold the texts, in order")
    labels.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="of tables without a line of names: theirs")
    labels.add_argument("--label-from-folder", action="store_true", help="the folder of a file is its label")
    labels.add_argument("--label-loss-only", action="store_true", help="what is labelled is given, the label alone is learned")
    labels.add_argument(
        "--mix-splits",
        dest="given_splits",
        action="store_false",
        help="files named train or test are nothing special",
    )

    again = parser.add_argument_group("duplicates and evaluation sets")
    again.add_argument("--keep-duplicates", dest="exact_duplicates", action="store_false", help="keep exact duplicates")
    again.add_argument(
        "--near-duplicates", type=float, metavar="SIMILARITY", help="drop texts this similar to another, e.g. 0.8"
    )
    again.add_argument("--decontaminate", nargs="+", default=[], metavar="FILE", help="drop texts that hold a part of these")
    again.add_argument("--ngram", type=int, default=13, help="words in a row that make a part")

    media = parser.add_argument_group("images and sounds")
    media.add_argument("--caption-from-folder", action="store_true", help="media without caption get the name of their folder")
    media.add_argument("--min-image-size", type=int, default=0, metavar="PIXELS", help="leave out images with a shorter side")
    media.add_argument(
        "--max-aspect", type=float, metavar="RATIO", help="leave out images with longer to shorter side above this"
    )
    media.add_argument("--image-max-size", type=int, metavar="PIXELS", help="shrink images to this longer side")
    media.add_argument("--min-audio-seconds", type=float, default=0.0, help="leave shorter sounds out")
    media.add_argument("--max-audio-seconds", type=float, default=30.0, help="leave longer sounds out")
    media.add_argument(
        "--silence", type=float, metavar="DB", help="leave out sounds below this mean level, e.g. -60 (full scale: 0)"
    )
    media.add_argument("--resample", type=int, metavar="HZ", help="store sounds at this rate, mono")
    media.add_argument("--audio-format", choices=("flac", "wav"), help="store sounds in this format, mono")


def run(options: argparse.Namespace) -> None:
    from pile_app.prepare.pipeline import prepare

    values = dict(vars(options))
    del values["command"]
    prepare(values.pop("input"), values.pop("output"), **values)
