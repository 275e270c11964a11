"""Makes shards of a plain-text file: its first 90 % for training, the rest for validation, as nanoGPT splits tiny Shakespeare.

    python data/shakespeare/prepare.py [--text FILE] [--folder data/shakespeare/shards]

The text is not part of the project. `--text`, else the environment's `PILE_SHAKESPEARE`, names it; without either it is
`../shared/data/tinyshakespeare/input.txt`. Any UTF-8 text will do: every character is kept, in order, in
documents of some 16 kB that end with a blank line if possible. (Reading a piece of a longer document takes longer.)

Tokens are bytes. Tiny Shakespeare is ASCII, so a byte is a character, and `validation/text_bits_per_byte` · ln 2 is nats a
character over exactly the characters of the validation split. nanoGPT's softmax has 65 ids, one a character that occurs; ours
has 262, 256 bytes and six special tokens; within a few steps it learns not to expect most of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment

DEFAULT = "../shared/data/tinyshakespeare/input.txt"
TRAIN_FRACTION = 0.9
DOCUMENT_CHARACTERS = 16_384


def documents(text: str, split: str) -> Iterator[Document]:
    """Split a text into documents of at most `DOCUMENT_CHARACTERS`."""
    start = number = 0
    while start < len(text):
        stop = start + DOCUMENT_CHARACTERS
        if stop < len(text):
            blank = text.rfind("\n\n", start, stop)
            stop = blank + 2 if blank > start else stop
        yield Document((Segment(text[start:stop]),), key=f"{split}-{number:06d}")
        start, number = stop, number + 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, default=os.environ.get("PILE_SHAKESPEARE", DEFAULT), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "shards", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not options.text.is_file():
        print(
            f"error: there is no text at {str(options.text)!r} (from {os.getcwd()}). Give the file with --text, or in the "
            "environment's PILE_SHAKESPEARE: tiny Shakespeare is `input.txt` of Karpathy's char-rnn",
            file=sys.stderr,
        )
        return 1
    text = options.text.read_bytes().decode()  # `read_text` would change line ends
    border = int(TRAIN_FRACTION * len(text))
    for split, part in (("train", text[:border]), ("validation", text[border:])):
        written = write_shards(documents(part, split), options.folder, split)
        print(f"{split}: {len(part):,} characters in {len(written):,} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
