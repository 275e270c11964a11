"""`pile generate`: prompts to text, images and sound."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pile_app.documents import Document, Segment
    from pile_app.model.fused import FusedLanguageModel
    from pile_app.model.generate import Answer, Sampling

SUMMARY = "let a trained model write text, images or sound"


class _AppendSegment(argparse.Action):
    """`--text`, `--image` and `--audio` append to one list, so that their order on the command line is kept."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), (self.const, values)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The prompt is one document: every --text, --image and --audio, in the order given. Without a prompt the model begins "
        "on its own. A text at the end of the prompt is continued by --to text. A single text is shown while it is written."
    )
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    add_prompt(parser)
    parser.add_argument(
        "--to",
        choices=("text", "image", "audio", "any"),
        required=True,
        help="what to write; any: as many segments of any kind as the model wants",
    )
    parser.add_argument("--count", type=int, default=1, help="answers")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the most likely tokens of this probability")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of the prompt, 1: as learned")
    parser.add_argument("--seed", type=int, default=0, help="of the draws: decides what is drawn")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="a text ends before the first of these")
    parser.add_argument("--choices", nargs="+", default=[], metavar="TEXT", help="the answer is one of these texts")
    parser.add_argument("--logprobs", action="store_true", help="also write every token's log-probability, to NNN.json")
    parser.add_argument("--max-text", type=int, default=256, help="most text tokens")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="longest sound")
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

    from pile_app.model.generate import Sampling
    from pile_app.training.load import load_run

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, not {options.count}")
    if options.choices and options.to != "text":
        raise ValueError(f"--choices are texts: they go with --to text, not --to {options.to}")
    if options.to == "any" and options.logprobs:
        raise ValueError("--logprobs goes with --to text, image or audio")
    names = ("temperature", "top_p", "guidance", "max_text", "max_seconds", "seed")
    sampling = Sampling(**{name: getattr(options, name) for name in names}, stop=tuple(options.stop))
    prompt = read_prompt(options.prompt)
    module, _, _ = load_run(options.run, options.checkpoint)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.output or options.run / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for name, segment, details in _write(module.model, prompt, sampling, options):
        path = folder / f"{name}.{segment.extension}"
        if isinstance(segment.data, str):
            path.write_text(segment.data, encoding="utf-8")
        else:
            path.write_bytes(segment.data)
        print(path)
        if details:
            path.with_suffix(".json").write_text(json.dumps(details, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write(
    model: FusedLanguageModel, prompt: Document, sampling: Sampling, options: argparse.Namespace
) -> Iterator[tuple[str, Segment, dict[str, Any]]]:
    """What is asked for, texts shown: name of the file, segment, and what there is to say of it."""
    from pile_app.documents import MODALITIES, TEXT, Segment
    from pile_app.model.generate import answer_prompts, generate_document, stream
    from pile_app.model.score import choose

    prompts = [prompt] * options.count
    if options.choices:
        for number, choice in enumerate(choose(model, prompts, options.choices, sampling)):
            text = options.choices[choice.index]
            print(text)
            scores = dict(zip(options.choices, choice.log_probabilities.tolist(), strict=True))
            yield f"{number:03d}", Segment(text), {"text": text, "log_probabilities": scores} if options.logprobs else {}
        return
    if options.to == "any":
        for number in range(options.count):
            written = generate_document(model, prompt, replace(sampling, seed=sampling.seed + number))
            for part, answer in enumerate(_shown(written)):
                yield f"{number:03d}-{part}", answer.segment, {}
        return
    if options.to == "text" and options.count == 1:
        answers: Iterable[Answer] = _shown(stream(model, prompt, sampling))
    else:
        answers = answer_prompts(model, prompts, MODALITIES.index(options.to), sampling)
    for number, answer in enumerate(answers):
        if answer.segment.modality == TEXT and options.count > 1:
            print(answer.segment.text)
        yield f"{number:03d}", answer.segment, _details(model, answer) if options.logprobs else {}


def _shown(pieces: Iterable[str | Answer]) -> Iterator[Answer]:
    """The answers; texts are printed while they are written."""
    from pile_app.documents import TEXT

    for piece in pieces:
        if isinstance(piece, str):
            print(piece, end="", flush=True)
            continue
        if piece.segment.modality == TEXT:
            print()
        yield piece


def _details(model: FusedLanguageModel, answer: Answer) -> dict[str, Any]:
    """Of a segment, for JSON: its tokens with their log-probabilities in nats; codes of a medium are numbers."""
    from pile_app.documents import MODALITIES, TEXT
    from pile_app.vocabulary import Vocabulary

    specials = {Vocabulary.END: "<end>"} | {
        opener: f"<{name}>" for opener, name in zip(Vocabulary.OPENERS, MODALITIES, strict=True)
    }
    tokens: list[str | int] = answer.codes.tolist()
    if answer.segment.modality == TEXT:
        tokens = [specials.get(code) or model.tokenizer.decode([code - Vocabulary.SPECIALS]) for code in answer.codes.tolist()]
    scores = answer.log_probabilities.tolist()
    each = [{"token": token, "log_probability": score} for token, score in zip(tokens, scores, strict=True)]
    return {"ended_by": answer.ended_by, "log_probability": sum(scores), "tokens": each}


def read_prompt(parts: Sequence[tuple[str, str]]) -> Document:
    """The document of (modality, text or path) parts.

    Raises:
        ValueError: a file is not of that modality, or cannot be decoded.
        OSError: a file cannot be read.
    """
    from pile_app.documents import Document, Segment

    return Document(tuple(Segment(value) if name == "text" else _read_medium(name, value) for name, value in parts))


def _read_medium(name: str, path: str) -> Segment:
    from pile_app import documents, media

    extension = Path(path).suffix[1:].lower()
    known = documents.IMAGE_EXTENSIONS if name == "image" else documents.AUDIO_EXTENSIONS
    if extension not in known:
        raise ValueError(f"--{name} {path!r}: its name has to end in .{', .'.join(known)}")
    data = Path(path).read_bytes()
    try:  # once here, where the name of the file is known
        if name == "image":
            media.decode_image(data, 3, *media.image_size(data))
        else:
            media.decode_audio(data, media.audio_size(data)[1])
    except documents.BadSample as error:
        raise ValueError(f"--{name} {path!r} cannot be used, {error}") from error
    return documents.Segment(data, extension)
