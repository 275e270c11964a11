"""`pile`: data to shards, a trained model to text, images and sound. (Training is `python train.py`.)

Each command is a file of `commands/`: SUMMARY, `add_arguments(parser)` and `run(options)`, which imports what it needs when it
runs, so that `pile --help` answers at once. What a user can mend is told in one line and ends with exit code 2; anything else
is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module


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
        from pile_app.data.files import ShardError

        if not isinstance(error, (ValueError, OSError, ShardError)):  # BadSample is a ValueError
            raise
        print(f"pile: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


COMMANDS = (  # as `pile --help` lists them
    "prepare",
    "index",
    "tokenizer",
    "encode",
    "inspect",
    "plan",
    "generate",
    "chat",
    "evaluate",
    "classify",
    "tag",
    "index-media",
    "search",
    "export",
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `options.command` is the function to call with the options."""
    parser = argparse.ArgumentParser(prog="pile", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module("pile_app.commands." + name.replace("-", "_"))
        summary: str = command.SUMMARY
        added = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=_DefaultsFormatter
        )
        command.add_arguments(added)
        added.set_defaults(command=command.run)
    return parser


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that say something: no None, no switch, no empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = isinstance(action.default, str | float | int) and not isinstance(action.default, bool)
        return super()._get_help_string(action) if told else action.help


if __name__ == "__main__":
    main()
