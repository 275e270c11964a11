"""`pile`: data to shards, a trained model to text, images and sound. (Training is `python train.py`.)

Every command imports what it needs when it runs, so that `pile --help` answers at once. What a user can mend is told in one
line and ends with exit code 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pile_app.data.shards import ShardIndex
    from pile_app.documents import Document, Segment


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. `arguments`: None takes the command line's."""
    options = make_parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `pile inspect ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from pile_app.data.shards import ShardError

        if not isinstance(error, (ValueError, OSError, ShardError)):  # BadSample is a ValueError
            raise
        print(f"pile: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `options.command` is the function to call with the options."""
    parser = argparse.ArgumentParser(prog="pile", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(command: Any, name: str, summary: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=_DefaultsFormatter,
        )
        added.set_defaults(command=command)
        return added

    _add_prepare(add(prepare_shards, "prepare", "make shards of own texts, images and sounds"))
    _add_index(add(index_shards, "index", "index shards that came from elsewhere, or check them against their index"))
    _add_tokenizer(add(make_tokenizer, "tokenizer", "train a tokenizer on the texts of shards, or of a folder"))
    _add_generate(add(generate_segments, "generate", "let a trained model write text, images or sound"))
    _add_inspect(add(inspect_run, "inspect", "show what an optimizer step of a run was trained on"))
    return parser


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that say something: no None, no switch, no empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = isinstance(action.default, str | float | int) and not isinstance(action.default, bool)
        return super()._get_help_string(action) if told else action.help


# -- pile prepare


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="file or folder to read")
    parser.add_argument("output", type=Path, help="folder for the shards")
    parser.add_argument("--kind", choices=("auto", "text", "images", "audio"), default="auto", help="what to read")
    parser.add_argument("--validation-share", type=float, default=0.01, help="share of the documents for validation")
    parser.add_argument("--seed", type=int, default=0, help="of the hash that splits training from validation")
    parser.add_argument("--no-clean", dest="clean", action="store_false", help="keep texts as they are")
    parser.add_argument("--max-audio-seconds", type=float, default=30.0, help="leave longer sounds out")
    parser.add_argument("--shard-megabytes", type=float, default=64.0, help="size of a shard")
    parser.add_argument("--document-bytes", type=int, default=1 << 20, help="cut longer text files into several documents")
    parser.add_argument(
        "--caption-from-folder", action="store_true", help="media without caption get the name of their folder as caption"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")


def prepare_shards(options: argparse.Namespace) -> None:
    from pile_app.data.prepare import prepare

    values = dict(vars(options))
    del values["command"]
    prepare(values.pop("input"), values.pop("output"), **values)


# -- pile index


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="paths or quoted patterns, e.g. 'shards/train-{000..099}.tar'")
    parser.add_argument(
        "--verify", action="store_true", help="write nothing: read every sample and compare its checksum with the index"
    )


def index_shards(options: argparse.Namespace) -> None:
    from pile_app.data.shards import ShardError, build_index, expand_shards, load_index

    differing = 0
    for path in expand_shards(options.shards):
        if not options.verify:
            print(f"{path}: {describe_index(build_index(path))}", flush=True)
            continue
        index = load_index(path)
        different = differing_samples(index)
        differing += len(different)
        listed = ", ".join(different[:5] + ["..."] * (len(different) > 5))
        verdict = f"{len(different):,} differ from the index: {listed}" if different else "all as indexed"
        print(f"{path}: {len(index):,} documents, {verdict}", flush=True)
    if differing:
        raise ShardError(
            f"{differing:,} documents differ from what was indexed: fetch those shards again, or run `pile index` without "
            "--verify to take them as they are (runs that were trained on them will not resume)"
        )


def describe_index(index: ShardIndex) -> str:
    """`300 documents; 300 text, 150 image; rejected: 2 invalid_json`"""
    from pile_app.documents import MODALITIES

    counts = [(name, int((index.modality == modality).sum())) for modality, name in enumerate(MODALITIES)]
    segments = ", ".join(f"{count:,} {name}" for name, count in counts if count) or "no segments"
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in Counter(r for _, r in index.rejected).most_common())
    return f"{len(index):,} documents; {segments}; rejected: {rejected or 'none'}"


def differing_samples(index: ShardIndex) -> list[str]:
    """Keys of the samples of a shard that are not what was indexed."""
    from pile_app.data.shards import ShardReader
    from pile_app.documents import BadSample

    reader, different = ShardReader([index]), []
    for sample, key in enumerate(index.keys):
        try:
            reader.document(0, sample)
        except BadSample:
            different.append(key)
    return different


# -- pile tokenizer


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="shards (a quoted pattern *.tar), or a text file, or a folder of text files")
    parser.add_argument("output", type=Path, help="the tokenizer.json to write")
    parser.add_argument("--kind", choices=("bpe", "words"), required=True, help="byte-level BPE, or whole words")
    parser.add_argument("--size", type=int, required=True, help="most tokens")


def make_tokenizer(options: argparse.Namespace) -> None:
    from pile_app.data.readers import read_texts
    from pile_app.data.text import load_tokenizer, train_tokenizer

    texts = _texts_of_shards(options.input) if options.input.endswith(".tar") else read_texts(_existing(options.input))
    first = next(texts, None)
    if first is None:
        raise ValueError(f"{options.input!r} holds no text: give shards ('shards/*.tar'), or a folder of text files")
    train_tokenizer(chain([first], texts), options.kind, options.size, options.output)
    tokenizer = load_tokenizer(str(options.output))
    print(f"{options.output}: {tokenizer.size:,} tokens; train with --model.tokenizer {options.output}")


def _texts_of_shards(pattern: str) -> Iterator[str]:
    from pile_app.data.shards import ShardReader, expand_shards, load_index
    from pile_app.documents import TEXT

    reader = ShardReader([load_index(path) for path in expand_shards(pattern)])
    for shard, index in enumerate(reader.indexes):
        for sample in range(len(index)):
            document = reader.document(shard, sample)
            yield from (segment.text for segment in document.segments if segment.modality == TEXT)


def _existing(path: str) -> Path:
    if not os.path.exists(path):
        raise ValueError(f"{path!r} does not exist (working folder {os.getcwd()})")
    return Path(path)


# -- pile generate


class _AppendSegment(argparse.Action):
    """`--text`, `--image` and `--audio` append to one list, so that their order on the command line is kept."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), (self.const, values)])


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The prompt is one document: every --text, --image and --audio, in the order given. Without a prompt the model begins "
        "on its own. A text at the end of the prompt is continued by --to text."
    )
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    for name, what in (
        ("text", "text"),
        ("image", "image file (png, jpg, webp)"),
        ("audio", "sound file (wav, flac, ogg, mp3)"),
    ):
        parser.add_argument(
            f"--{name}",
            dest="prompt",
            action=_AppendSegment,
            const=name,
            default=[],
            metavar=name.upper() if name == "text" else "FILE",
            help=f"{what} of the prompt; may stand several times",
        )
    parser.add_argument("--to", choices=("text", "image", "audio"), required=True, help="what to write")
    parser.add_argument("--count", type=int, default=1, help="answers")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the most likely tokens of this probability")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of the prompt, 1: as learned")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--max-text", type=int, default=256, help="most text tokens")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="longest sound")
    parser.add_argument("--no-cache", dest="use_cache", action="store_false", help="compute all anew for every token")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a file")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN/generated)")


def generate_segments(options: argparse.Namespace) -> None:
    import torch

    from pile_app.documents import MODALITIES
    from pile_app.model.generate import Sampling, generate
    from pile_app.training.load import load_run

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, not {options.count}")
    names = ("temperature", "top_p", "guidance", "max_text", "max_seconds", "seed", "use_cache")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    prompt = read_prompt(options.prompt)
    module, _, _ = load_run(options.run, options.checkpoint)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.output or options.run / "generated"
    answers = generate(module.model, [prompt] * options.count, MODALITIES.index(options.to), sampling)
    folder.mkdir(parents=True, exist_ok=True)
    for number, answer in enumerate(answers):
        path = folder / f"{number:03d}.{answer.extension}"
        if isinstance(answer.data, str):
            print(answer.data)
            path.write_text(answer.data, encoding="utf-8")
        else:
            path.write_bytes(answer.data)
        print(path)


def read_prompt(parts: Sequence[tuple[str, str]]) -> Document:
    """The document of (modality, text or path) parts.

    Raises:
        ValueError: a file is not of that modality, or cannot be decoded.
        OSError: a file cannot be read.
    """
    from pile_app.documents import Document, Segment

    return Document(tuple(Segment(value) if name == "text" else _read_medium(name, value) for name, value in parts))


def _read_medium(name: str, path: str) -> Segment:
    from pile_app.documents import (
        AUDIO_EXTENSIONS,
        IMAGE_EXTENSIONS,
        BadSample,
        Segment,
        audio_size,
        decode_audio,
        decode_image,
        image_size,
    )

    extension = Path(path).suffix[1:].lower()
    known = IMAGE_EXTENSIONS if name == "image" else AUDIO_EXTENSIONS
    if extension not in known:
        raise ValueError(f"--{name} {path!r}: its name has to end in .{', .'.join(known)}")
    data = Path(path).read_bytes()
    try:  # once here, where the name of the file is known
        if name == "image":
            decode_image(data, 3, *image_size(data))
        else:
            decode_audio(data, audio_size(data)[1])
    except BadSample as error:
        raise ValueError(f"--{name} {path!r} cannot be used, {error}") from error
    return Segment(data, extension)


# -- pile inspect


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    parser.add_argument("--step", type=int, required=True, help="optimizer step, counted from 1")
    parser.add_argument("--output", type=Path, help="folder for media and documents.json (default: RUN/inspect/step-N)")
    parser.add_argument("--limit", type=int, help="show at most so many documents (default: all)")


def inspect_run(options: argparse.Namespace) -> None:
    from pile_app.tasks.inspect_step import format_step, inspect_step

    folder = options.output or options.run / "inspect" / f"step-{options.step}"
    print(format_step(inspect_step(options.run, options.step, folder, options.limit)))
    print(f"saved in {folder}")


if __name__ == "__main__":
    main()
