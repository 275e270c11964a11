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
    from pile_app.data.shards import ShardIndex, Shards
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
    _add_encode(add(encode_shards, "encode", "write shards anew as token ids, so that training need not decode them"))
    _add_generate(add(generate_segments, "generate", "let a trained model write text, images or sound"))
    _add_export(add(export_run, "export", "write a run's model as safetensors with its config, to hand on"))
    _add_inspect(add(inspect_run, "inspect", "show what data hold, or what a run was trained on"))
    _add_plan(add(plan_run, "plan", "say what a configuration will need, how long it will take, and what is unwise in it"))
    return parser


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that say something: no None, no switch, no empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = isinstance(action.default, str | float | int) and not isinstance(action.default, bool)
        return super()._get_help_string(action) if told else action.help


# -- pile prepare


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Work is kept in OUTPUT.partial: the same command continues where it was interrupted. Every step is described in "
        "docs/prepare.md."
    )
    kinds = ("auto", "text", "images", "audio", "interleaved", "webdataset")
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


def prepare_shards(options: argparse.Namespace) -> None:
    from pile_app.prepare.pipeline import prepare

    values = dict(vars(options))
    del values["command"]
    prepare(values.pop("input"), values.pop("output"), **values)


# -- pile index


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="paths or quoted patterns, e.g. 'shards/train-{000..099}.tar'")
    parser.add_argument(
        "--verify", action="store_true", help="write nothing: read every sample and compare its checksum with the index"
    )
    parser.add_argument("--processes", type=int, help="how many work at a time (default: one a core)")


def index_shards(options: argparse.Namespace) -> None:
    from functools import partial

    from pile_app.data.shards import ShardError
    from pile_app.data.sources import for_each

    shards = _open_shards(options.shards)
    task = partial(_verify_shard if options.verify else _index_shard, shards)
    differing = 0
    for number, (line, count) in enumerate(for_each(task, range(len(shards)), options.processes)):
        differing += count
        print(f"{shards.paths[number]}: {line}", flush=True)
    if differing:
        raise ShardError(
            f"{differing:,} documents differ from what was indexed: fetch those shards again, or run `pile index` without "
            "--verify to take them as they are (runs that were trained on them will not resume)"
        )


def _open_shards(patterns: str | Sequence[str]) -> Shards:
    """Shards of this machine or of others, which are fetched into the default cache."""
    from pile_app.data.remote import ShardCache
    from pile_app.data.shards import Shards, expand_shards
    from pile_app.data.sources import cache_folder

    return Shards(expand_shards(patterns), ShardCache(cache_folder() / "shards", int(100e9)))


def _index_shard(shards: Shards, number: int) -> tuple[str, int]:
    """(what to say of the shard, 0)."""
    from pile_app.data.shards import build_index

    if shards.remote[number] and shards.cache is not None:
        Path(shards.local(number)).unlink(missing_ok=True)  # it may be of an earlier version
        shards.cache.fetch(shards.paths[number])
    return describe_index(build_index(shards.local(number))), 0


def _verify_shard(shards: Shards, number: int) -> tuple[str, int]:
    """(what to say of the shard, documents that differ from its index)."""
    from pile_app.documents import BadSample

    if shards.remote[number]:
        shards.make_index(number)
    keys, different = shards.index(number).keys, []
    for sample, key in enumerate(keys):
        try:
            shards.document(number, sample)
        except BadSample:
            different.append(key)
    listed = ", ".join(different[:5] + ["..."] * (len(different) > 5))
    verdict = f"{len(different):,} differ from the index: {listed}" if different else "all as indexed"
    return f"{len(keys):,} documents, {verdict}", len(different)


def describe_index(index: ShardIndex) -> str:
    """`300 documents; 300 text, 150 image; rejected: 2 invalid_json`"""
    from pile_app.documents import MODALITIES

    counts = [(name, int((index.modality == modality).sum())) for modality, name in enumerate(MODALITIES)]
    segments = ", ".join(f"{count:,} {name}" for name, count in counts if count) or "no segments"
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in Counter(r for _, r in index.rejected).most_common())
    return f"{len(index):,} documents; {segments}; rejected: {rejected or 'none'}"


# -- pile tokenizer


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="shards (a quoted pattern *.tar), or a text file, or a folder of text files")
    parser.add_argument("output", type=Path, help="the tokenizer.json to write")
    parser.add_argument("--kind", choices=("bpe", "words"), required=True, help="byte-level BPE, or whole words")
    parser.add_argument("--size", type=int, required=True, help="most tokens")


def make_tokenizer(options: argparse.Namespace) -> None:
    from pile_app.data.text import load_tokenizer, train_tokenizer
    from pile_app.prepare.readers import read_texts

    texts = _texts_of_shards(options.input) if options.input.endswith(".tar") else read_texts(Path(options.input))
    first = next(texts, None)
    if first is None:
        raise ValueError(f"{options.input!r} holds no text: give shards ('shards/*.tar'), or a folder of text files")
    train_tokenizer(chain([first], texts), options.kind, options.size, options.output)
    tokenizer = load_tokenizer(str(options.output))
    print(f"{options.output}: {tokenizer.size:,} tokens; train with --model.tokenizer {options.output}")


def _texts_of_shards(pattern: str) -> Iterator[str]:
    from pile_app.documents import TEXT

    shards = _open_shards(pattern)
    for shard in range(len(shards)):
        shards.make_index(shard)
        for sample in range(len(shards.index(shard))):
            document = shards.document(shard, sample)
            yield from (segment.text for segment in document.segments if segment.modality == TEXT)


# -- pile encode


def _add_encode(parser: argparse.ArgumentParser) -> None:
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


def encode_shards(options: argparse.Namespace) -> None:
    paths = list(options.paths)
    if len(paths) < (2 if options.tokenizer else 3):
        raise ValueError("pile encode takes RUN SHARDS OUTPUT, or --tokenizer FILE SHARDS OUTPUT")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {options.batch}")
    from pile_app.data.text import load_tokenizer
    from pile_app.tasks import encode

    run = None if options.tokenizer else Path(paths.pop(0))
    folder = Path(paths.pop())
    shards = _open_shards(paths)
    if run is None:
        encoders = encode.Encoders(load_tokenizer(options.tokenizer), batch=options.batch)
    else:
        encoders = encode.Encoders.of_run(run, options.checkpoint, options.device, options.batch)
    found = encode.encode_shards(shards, folder, encoders, options.overwrite)
    print(f"{len(found):,} shards in {folder}: {encode.describe_counts(list(found.values()))}")


# -- pile export


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "FusedLanguageModel.from_pretrained(FOLDER) reads it; no code of the folder is run."
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="new folder for config.json, weights and tokenizer")
    parser.add_argument("--checkpoint", default="last", help="last, best, previous, or a file")


def export_run(options: argparse.Namespace) -> None:
    from pile_app.model.pretrained import save_pretrained
    from pile_app.training.load import load_run, read_config

    module, _, saved = load_run(options.run, options.checkpoint)
    save_pretrained(module.model, read_config(options.run)["model"], options.output)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: the model after step {saved['global_step']:,}, {size / 1e6:,.1f} MB")


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
    kinds = {"text": "text", "image": "image file (png, jpg, webp)", "audio": "sound file (wav, flac, ogg, mp3)"}
    for name, what in kinds.items():
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
    parser.add_argument("--checkpoint", default="last", help="last, best, previous, or a file")
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
    from pile_app import documents

    extension = Path(path).suffix[1:].lower()
    known = documents.IMAGE_EXTENSIONS if name == "image" else documents.AUDIO_EXTENSIONS
    if extension not in known:
        raise ValueError(f"--{name} {path!r}: its name has to end in .{', .'.join(known)}")
    data = Path(path).read_bytes()
    try:  # once here, where the name of the file is known
        if name == "image":
            documents.decode_image(data, 3, *documents.image_size(data))
        else:
            documents.decode_audio(data, documents.audio_size(data)[1])
    except documents.BadSample as error:
        raise ValueError(f"--{name} {path!r} cannot be used, {error}") from error
    return documents.Segment(data, extension)


# -- pile inspect


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="for statistics of data: folders of `pile prepare`, shards (folder or quoted pattern), a run or a configuration; "
        "for a step or positions: the folder of the run",
    )
    parser.add_argument("--step", type=int, help="show what a run was trained on in this optimizer step, counted from 1")
    parser.add_argument("--position", metavar="P[:Q]", help="show the packs at positions P up to Q (without Q) of a run")
    parser.add_argument("--output", type=Path, help="folder for what is found (default: inspect/ beside what is inspected)")
    parser.add_argument("--limit", type=int, help="show at most so many documents (default: all; of data 8 a source)")
    parser.add_argument("--duplicates", action="store_true", help="read all shards, to count what is there more than once")
    parser.add_argument("--tokenizer", help="bytes or a tokenizer.json to count with (default: that of the run, or bytes)")
    parser.add_argument("--context", type=int, help="tokens of a pack (default: those of the run, or 512)")


def inspect_run(options: argparse.Namespace) -> None:
    if options.step is None and options.position is None:
        inspect_shards(options)
        return
    from pile_app.tasks.inspect_step import inspect_training, parse_positions

    if options.step is not None and options.position is not None:
        raise ValueError("give --step or --position, not both")
    if len(options.paths) > 1 or options.duplicates or options.tokenizer or options.context:
        raise ValueError("--step and --position take one run, and neither --duplicates, --tokenizer nor --context")
    run = Path(options.paths[0])
    if options.step is not None:
        asked, name = options.step, f"step-{options.step}"
    else:
        first, stop = asked = parse_positions(options.position)
        name = f"position-{first}" if stop == first + 1 else f"positions-{first}-{stop - 1}"
    folder = options.output or run / "inspect" / name
    print(inspect_training(run, asked, folder, options.limit))
    print(f"saved in {folder}: open {folder / 'documents.html'}")


def inspect_shards(options: argparse.Namespace) -> None:
    from pile_app.tasks.inspect_data import inspect_data
    from pile_app.tasks.inspect_tables import format_statistics

    first = Path(options.paths[0])
    inside = (first / "config.yaml", first / "inspect" / "data"), (first / "dataset.json", first / "inspect")
    folder = options.output or next((folder for file, folder in inside if file.is_file()), Path("inspect"))
    samples = 8 if options.limit is None else options.limit
    description = inspect_data(options.paths, folder, options.tokenizer, options.context, options.duplicates, samples)
    print(format_statistics(description))
    print(f"saved in {folder}: open {folder / 'lengths.png'} and {folder / 'documents.html'}")


# -- pile plan


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pile plan [options] [SETTING=VALUE ...]"
    parser.epilog = "Nothing of the model is allocated. Memory is that of a language-model step (not of the codecs' phase)."
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="as train.py takes them: data.global_batch=64")
    parser.add_argument("--config", action="append", default=[], help="as train.py takes it; may stand several times")
    parser.add_argument("--devices", type=int, help="of the whole run (default: what the configuration says, else 1)")
    parser.add_argument(
        "--device", choices=("h100", "h200", "b200", "a100", "l40s", "rtx4090", "cpu"), default="h100", help="kind"
    )
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the device's FLOP/s that is reached")
    parser.add_argument("--strategy", choices=("single", "ddp", "fsdp"), help="default: what the configuration says")
    parser.add_argument("--tensor-parallel", type=int, help="devices that share the matrices of a block")
    parser.add_argument("--text-tokens", type=int, default=32_762, help="of a tokenizer that is not there yet")
    parser.add_argument("--read-data", action="store_true", help="open the shards: fill, lengths, modalities, passes")


def plan_run(options: argparse.Namespace) -> None:
    from pile_app.training.advice import format_plan
    from pile_app.training.plan import make_plan

    values = dict(vars(options))
    del values["command"]
    wrong = [setting for setting in options.settings if "=" not in setting]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not SETTING=VALUE, e.g. data.global_batch=64")
    arguments = [f"--config={path}" for path in values.pop("config")]
    plan = make_plan([*arguments, *(f"--{setting}" for setting in values.pop("settings"))], **values)
    print(format_plan(plan))


if __name__ == "__main__":
    main()
