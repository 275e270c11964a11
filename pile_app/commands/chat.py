"""`pile chat`: a conversation with a model, in the terminal or in the browser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pile_app.documents import Segment
    from pile_app.model.generate import Sampling
    from pile_app.tasks.chat import Conversation, Notice

SUMMARY = "talk with a trained model, in text, pictures and sound"
SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "guidance": float,
    "max_text": int,
    "max_seconds": float,
    "seed": int,
}
HELP = """\
/image FILE     send a picture with the next message (alone on a line, an empty message sends it)
/sound FILE     send a sound
/retry          another answer to the last message
/reset          begin anew
/settings       show the settings; /settings temperature 0.5 changes one
/quit           end (or Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The model should have been trained on conversations: conf/tasks/chat.yaml. In the terminal, /help lists what can be "
        "done beside typing. --browser needs the extra `chat`; the page is for this machine alone unless --host says otherwise."
    )
    parser.add_argument("run", type=Path, help="folder of the run: runs/<name>")
    parser.add_argument("--browser", action="store_true", help="serve a page instead of talking in the terminal")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: to every machine that can reach it")
    parser.add_argument("--port", type=int, default=7860, help="of the page")
    parser.add_argument(
        "--users", type=int, default=8, help="most messages that are answered or wait at a time; others are refused"
    )
    parser.add_argument("--upload-megabytes", type=float, default=10.0, help="largest file that can be sent")
    parser.add_argument("--upload-seconds", type=float, default=30.0, help="longest sound that can be sent")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=0.9, help="draw among the most likely tokens of this probability")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of what was said, 1: as learned")
    parser.add_argument("--max-text", type=int, default=512, help="most text tokens of a part of an answer")
    parser.add_argument("--max-seconds", type=float, default=5.0, help="longest sound of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--checkpoint", default="last", help="last, best, previous, or a file")
    parser.add_argument("--output", type=Path, help="folder for pictures and sounds in the terminal (default: RUN/chat)")


def run(options: argparse.Namespace) -> None:
    import torch

    from pile_app.model.generate import Sampling
    from pile_app.tasks.chat import Conversation, Limits
    from pile_app.training.load import load_run

    sampling = Sampling(**{name: getattr(options, name) for name in SETTINGS})
    limits = Limits(upload_bytes=int(options.upload_megabytes * 1e6), audio_seconds=options.upload_seconds)
    if options.users < 1 or limits.upload_bytes < 1 or limits.audio_seconds <= 0:
        raise ValueError("--users, --upload-megabytes and --upload-seconds have to be above 0")
    if options.browser:
        from pile_app.tasks.chat_page import import_gradio

        import_gradio()  # says at once that it is missing
    module, data, _ = load_run(options.run, options.checkpoint)
    module.to("cuda" if torch.cuda.is_available() else "cpu")

    def begin() -> Conversation:
        return Conversation(module.model, data.context, limits)

    begin()  # refuses a tokenizer that cannot hold conversations
    if options.browser:
        from pile_app.tasks.chat_page import serve

        serve(begin, sampling, options.run.name, options.host, options.port, options.users)
    else:
        Terminal(begin, sampling, options.output or options.run / "chat").talk()


class Terminal:
    """Reads lines, prints answers; media of an answer are saved to a folder and named.

    Args:
        begin: makes a new conversation.
        sampling: the settings to begin with.
        folder: for what the model draws and says.
    """

    def __init__(self, begin: Callable[[], Conversation], sampling: Sampling, folder: Path) -> None:
        self.begin, self.sampling, self.folder = begin, sampling, folder
        self.conversation = begin()
        self.attached: list[Segment] = []
        self.commands = {"image": self.attach, "sound": self.attach, "retry": self.retry, "reset": self.reset}
        self.commands |= {"settings": self.settings, "help": lambda _: print(HELP)}

    def talk(self) -> None:
        interactive = sys.stdin.isatty()
        if interactive:
            print("Write something; /help lists what else can be done.")
        while True:
            try:
                line = input("you> " if interactive else "").strip()
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            try:
                self.take(line)
            except (ValueError, OSError) as error:
                print(f"({error})")

    def take(self, line: str) -> None:
        """One line of the user's."""
        from pile_app.documents import Segment

        name, _, argument = line.removeprefix("/").partition(" ")
        if line.startswith("/"):
            if name not in self.commands:
                raise ValueError(f"there is no /{name}; /help lists what there is")
            self.commands[name](argument.strip())
            return
        if line or self.attached:
            segments = [*self.attached, *([Segment(line)] if line else [])]
            self.attached = []
            self.show(self.conversation.ask(segments, self.sampling))

    def attach(self, path: str) -> None:
        from pile_app.tasks.chat import read_upload

        if not path:
            raise ValueError("name a file: /image digit.png, /sound word.wav")
        self.attached.append(read_upload(Path(path).name, Path(path).expanduser().read_bytes(), self.conversation.limits))
        print("(goes with your next message; an empty line sends it alone)")

    def retry(self, _: str) -> None:
        self.show(self.conversation.retry(self.sampling))

    def reset(self, _: str) -> None:
        self.conversation, self.attached = self.begin(), []
        print("(a new conversation)")

    def settings(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if argument:
            if name not in SETTINGS:
                raise ValueError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
            self.sampling = replace(self.sampling, **{name: SETTINGS[name](value)})
        print("(" + ", ".join(f"{name} {getattr(self.sampling, name):g}" for name in SETTINGS) + ")")

    def show(self, events: Iterator[str | Segment | Notice]) -> None:
        """Prints an answer while it is written; Ctrl-C breaks it off."""
        from pile_app.tasks.chat import Notice

        try:
            for event in events:
                if isinstance(event, str):
                    print(event, end="", flush=True)
                elif isinstance(event, Notice):
                    print(f"({event.text})")
                elif isinstance(event.data, str):
                    print()
                else:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    path = self.folder / f"{len(list(self.folder.iterdir())):03d}.{event.extension}"
                    path.write_bytes(event.data)
                    print(path)
        except KeyboardInterrupt:
            events.close()  # type: ignore[attr-defined]
            print("\n(broken off)")
