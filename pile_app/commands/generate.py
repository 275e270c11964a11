"""`pile generate`: prompts to text, images and sound."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pile_app.documents import Document, Segment

SUMMARY = "let a trained model write text, images or sound"


class _AppendSegment(argparse.Action):
    """`--text`, `--image` and `--audio` append to one list, so that their order on the command line is kept."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), (self.const, values)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The prompt is one document: every --text, --image and --audio, in the order given. Without a prompt the model begins "
        "on its own. A text at the end of the prompt is continued by --to text."
    )
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    add_prompt(parser)
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


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """`--text`, `--image` and `--audio`, for `read_prompt`."""
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


def run(options: argparse.Namespace) -> None:
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
