"""`pile`: from data to shards, to a trained model, to text, images and sound.

A command is a typed function: its signature defines the options for Python and the command line, its docstring the help. The
modules of `COMMANDS` are imported when a command runs, so `pile --help` starts at once. Errors that a user can fix are one line
and exit code 2; others are bugs and show their traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS = {  # name: (module:function, a line of help)
    "prepare": ("prepare.pipeline:prepare", "make shards of your own texts, images and sounds"),
    "index": ("commands.data:index", "write the manifest of shards that came from elsewhere, or check shards against it"),
    "tokenizer": ("commands.data:tokenizer", "train a tokenizer on the texts of shards or of a folder"),
    "inspect": ("commands.data:inspect", "show what a data set holds, or what a run was trained on"),
    "plan": ("commands.train:plan", "tell the memory, time and risks of a configuration"),
    "train": ("commands.train:train", "train a model; without options, the demo"),
    "encode": ("commands.data:encode", "write shards again as token ids, so that training need not encode them"),
    "evaluate": ("commands.train:evaluate", "measure a run on shards, or on tasks of lm-eval"),
    "compare": ("commands.train:compare", "compare runs: curves, final figures, settings that differ"),
    "generate": ("commands.use:generate", "let a trained model write text, images or sound"),
    "chat": ("commands.use:chat", "talk with a trained model in the terminal"),
    "app": ("commands.use:app", "serve a page for a run: generate, chat, search, classify, tag"),
    "classify": ("commands.use:classify", "label texts, images and sounds with a trained classifier"),
    "tag": ("commands.use:tag", "find the named entities of texts"),
    "index-media": ("commands.use:index_media", "embed documents of any modality into an index"),
    "search": ("commands.use:search", "search an index by a text, an image or a sound"),
    "export": ("commands.train:export", "write a run's model as safetensors with its config"),
}

SHARED = {  # options that mean the same in every command; a docstring says where one differs
    "run": "folder of the run: runs/NAME",
    "checkpoint": "last, best, previous, or a path (auto: best of a run with an objective, else last)",
    "device": "cpu, cuda, ... (auto: a GPU if there is one)",
    "on": "SHARDS or NAME=SHARDS: quoted patterns or URLs",
    "temperature": "0 takes the most likely token",
    "top_p": "draw from the most likely tokens that have this probability together",
    "guidance": "weight of the prompt, 1: as learned",
    "seed": "seed of the draws",
    "output": "folder for the results",
    "max_text": "largest number of text tokens of a segment",
    "max_seconds": "longest sound",
    "processes": "number of processes (default: one for each core)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. `arguments`: None takes those of the command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(format_help())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("pile-app"))
        return
    try:
        run_command(words[0], words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `pile inspect ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"\npile: {str(error) or f'{words[0]} was interrupted'}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from pile_app.data.files import ShardError

        if words[0] == "train" or not isinstance(error, (ValueError, OSError, ShardError)):  # training reports its own
            raise
        print(f"pile: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def format_help() -> str:
    lines = [f"  {name:<13}{summary}" for name, (_, summary) in COMMANDS.items()]
    about = (__doc__ or "").partition("\n")[0].removeprefix("`pile`: ")
    return "\n".join([f"usage: pile COMMAND [options]\n\n{about}\n\ncommands:", *lines, "\nOptions: pile COMMAND --help"])


def run_command(name: str, words: Sequence[str]) -> None:
    """Run a command by its name. Raises ValueError for an unknown command, or options that do not parse."""
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        raise ValueError(f"there is no command {name!r}; " + (f"did you mean {near[0]}?" if near else "see pile --help"))
    command = load_command(name)
    if name == "train":  # all of its options are those of its configuration
        return command(*words)
    parser, forwards = make_parser(name, command)
    own, forwarded = _split(words, parser) if forwards else ([*map(_with_underscores, words)], [])
    try:
        values = vars(parser.parse_args(own))
    except Exception as error:  # jsonargparse's
        if type(error).__name__ != "ArgumentError":
            raise
        message = str(error).replace('Parser key "', "--").replace('":', ":").replace("a typing.Literal", "one of ")
        raise ValueError(f"{' '.join(message.split())}; see pile {name} --help") from error
    if not forwards:
        del values["config"]
    command(*forwarded, **values)


def load_command(name: str) -> Callable[..., Any]:
    module, _, function = COMMANDS[name][0].partition(":")
    command: Callable[..., Any] = getattr(import_module(f"pile_app.{module}"), function)
    return command


def make_parser(name: str, command: Callable[..., Any]) -> tuple[ArgumentParser, bool]:
    """Make the parser of a typed function, and tell whether it forwards options that it does not know.

    Parameters before `*` are positional, the others options; a sequence takes several values, `prompt` the ordered
    `--text`, `--image` and `--audio`; `*settings` takes everything else; `**options` are the fields of `prepare`'s `Options`.
    """
    from dataclasses import fields
    from inspect import Parameter, signature
    from typing import get_type_hints

    from docstring_parser import parse
    from jsonargparse import ArgumentParser

    described = parse(command.__doc__ or "")
    about = SHARED | {one.arg_name: " ".join((one.description or "").split()) for one in described.params}
    text = "\n\n".join(filter(None, [described.short_description, described.long_description]))
    parser = ArgumentParser(prog=f"pile {name}", description=text, exit_on_error=False)
    kinds, forwards = get_type_hints(command), False
    for parameter in signature(command).parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            forwards = True
        elif parameter.kind is Parameter.VAR_KEYWORD:
            from pile_app.prepare.options import Options

            kinds = get_type_hints(Options)
            for option in fields(Options):
                _add_option(parser, option.name, kinds[option.name], option.default, **option.metadata)
        elif parameter.name == "prompt":
            _add_prompt(parser)
        else:
            named = parameter.name, kinds[parameter.name], parameter.default, about.get(parameter.name, "")
            _add_option(parser, *named, is_positional=parameter.kind is Parameter.POSITIONAL_OR_KEYWORD)
    if not forwards:
        parser.add_argument("--config", action="config", help="YAML file of options")
    return parser, forwards


def _add_option(
    parser: ArgumentParser, name: str, kind: Any, default: Any, help: str, *, is_positional: bool = False,
    choices: Sequence[Any] = (), off: str = "", metavar: str | None = None, bounds: Sequence[float] = (),
) -> None:  # fmt: skip
    """Add a parameter of a command, or a field of `Options`. `off`: the flag that turns it off; `bounds`: checked later."""
    from collections import abc
    from inspect import Parameter
    from typing import Literal, get_args, get_origin

    from jsonargparse import ActionYesNo

    named: dict[str, Any] = {"help": help.replace("%%", "%"), "default": default}
    if kind is bool:
        named |= {"action": "store_false", "dest": name} if off else {"action": ActionYesNo}
    else:
        is_list = get_origin(kind) in (abc.Sequence, list, tuple)
        chosen: Any = Literal[tuple(choices)] if choices else get_args(kind)[0] if is_list else kind
        named |= {"type": chosen | None if default is None else chosen} | ({"metavar": metavar} if metavar else {})
        if is_list:
            named |= {"nargs": "+"} | ({} if is_positional else {"action": "extend", "default": list(default)})
        elif is_positional and default is not Parameter.empty:
            named["nargs"] = "?"
    if default is Parameter.empty:
        del named["default"]
        named |= {} if is_positional else {"required": True}
    parser.add_argument(name if is_positional else _with_underscores(off) or f"--{name}", **named)


def _add_prompt(parser: ArgumentParser) -> None:
    """Add `--text`, `--image` and `--audio`, which append (modality, value) to one list: their order is kept."""
    from argparse import Action

    class Append(Action):
        def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
            setattr(namespace, self.dest, [*getattr(namespace, self.dest), (self.const, value)])

    kinds = {"text": "text", "image": "image file (png, jpg, webp)", "audio": "sound file (wav, flac, ogg, mp3)"}
    for modality, what in kinds.items():
        named: dict[str, Any] = {"const": modality, "metavar": modality.upper(), "help": f"{what} of the prompt, repeatable"}
        parser.add_argument(f"--{modality}", action=Append, dest="prompt", default=[], **named)


def _with_underscores(word: str) -> str:
    """`--top-p=0.9` is `--top_p=0.9`."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") and " " not in name else word


def _split(words: Sequence[str], parser: ArgumentParser) -> tuple[list[str], list[str]]:
    """(options of the parser, all others), each with the values that follow it."""
    parts: tuple[list[str], list[str]] = [], []
    is_other = True
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            is_other = _with_underscores(word).partition("=")[0] not in parser._option_string_actions
        parts[is_other].append(word if is_other else _with_underscores(word))
    return parts


if __name__ == "__main__":
    main()
