"""What all contestants of `data_peers.py` share: the work on each item, and the talk with the driver.

The work is the same to the byte, so that what differs is the loader. Every function here takes the raw files of a whole batch:
that is what a loader's collate function sees in its worker, and faster for every peer than an item at a time (no small tensors,
one pass into the memory that DataLoader hands to the training process).

Figures (units of work):
    text_bytes   tokens, one a byte, in rows of CONTEXT: documents end to end, a 0 after each
    text_bpe     the same with a byte-level BPE of 32,000 tokens, tokenized while loading
    text_tokens  the same tokens, tokenized beforehand
    image        JPEG files of 256 x 256 -> (32, 3, 256, 256) uint8
    ogg, flac    files of 5 s at 44.1 kHz -> (16, 80000) float32 at 16 kHz

A contestant is a file `<name>_peer.py` with `prepare(folder)`, which writes its format from the tars, and `open_loader(figure,
folder, **settings)`, which gives an iterable of batches with one worker process; see `main` for how the driver talks to it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

CONTEXT = 4096
DOCUMENTS = 64  # texts of a batch, before they are cut to rows
IMAGES = 32
CLIPS = 16
SHUFFLE_BUFFER = 1000  # samples, for the peers that shuffle in a buffer
RATE, OWN_RATE, CLIP_SECONDS = 16_000, 44_100, 5

DATA_OF = {"text_bytes": "text", "text_bpe": "text", "text_tokens": "tokens", "image": "image", "ogg": "ogg", "flac": "flac"}
EXTENSION_OF = {"text": "txt", "image": "jpg", "ogg": "ogg", "flac": "flac"}
BATCH_OF = {"text_bytes": DOCUMENTS, "text_bpe": DOCUMENTS, "text_tokens": 8, "image": IMAGES, "ogg": CLIPS, "flac": CLIPS}
FRACTIONS = ("0", "0.9")  # of an epoch, where the resume figure begins


def empty_batch(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """In shared memory where this is a worker, as `default_collate` has it: the batch is not copied once more."""
    if get_worker_info() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)


def decode_images(files: Sequence[bytes]) -> Tensor:
    """(N, 3, 256, 256) uint8, channels last in memory: libjpeg-turbo writes each image to its place."""
    import simplejpeg

    batch = empty_batch((len(files), 256, 256, 3), torch.uint8)
    for file, place in zip(files, batch.numpy(), strict=True):
        simplejpeg.decode_jpeg(file, buffer=place)
    return batch.permute(0, 3, 1, 2)


def decode_clips(files: Sequence[bytes]) -> Tensor:
    """(M, 80000) float32 mono at 16 kHz: libsndfile, then torchaudio's windowed sinc, whose filter is kept."""
    import soundfile

    batch = empty_batch((len(files), CLIP_SECONDS * RATE), torch.float32)
    for file, place in zip(files, batch, strict=True):
        samples, rate = soundfile.read(io.BytesIO(file), dtype="float32")
        waveform = resampler(rate)(torch.from_numpy(samples))
        place[: len(waveform)] = waveform[: len(place)]
        place[len(waveform) :] = 0
    return batch


@lru_cache(4)
def resampler(rate: int) -> Any:
    import torchaudio

    return torchaudio.transforms.Resample(rate, RATE)


class Rows:
    """Raw texts of a batch -> (rows, CONTEXT) int64, documents end to end; what fills no row waits for the next batch."""

    END = 0  # a NUL in bytes, `<end>` in the BPE

    def __init__(self, tokenizer: Path | None) -> None:
        self.path = tokenizer
        self._tokenizer: Any = None
        self._rest = np.zeros(0, np.int64)

    def __call__(self, texts: Sequence[bytes]) -> Tensor:
        if self.path is None:
            tokens = [np.frombuffer(b"\0".join([*texts, b""]), np.uint8)]
        else:
            if self._tokenizer is None:
                from tokenizers import Tokenizer

                self._tokenizer = Tokenizer.from_file(str(self.path))
            encodings = self._tokenizer.encode_batch_fast([str(text, "utf-8") for text in texts], add_special_tokens=False)
            tokens = [np.array([*one.ids, self.END]) for one in encodings]
        size = len(self._rest) + sum(map(len, tokens))
        rows = empty_batch((size // CONTEXT, CONTEXT), torch.int64)
        self._rest, everything = self._rest[:0], [self._rest, *tokens]
        flat, place = rows.view(-1).numpy(), 0
        for part in everything:
            taken = min(len(part), len(flat) - place)
            flat[place : place + taken] = part[:taken]
            place += taken
            if taken < len(part):
                self._rest = np.concatenate([self._rest, part[taken:]])
        return rows


def stack_tokens(rows: Sequence[Any]) -> Tensor:
    """Rows of tokens, of any integer type -> (rows, CONTEXT) int64."""
    batch = empty_batch((len(rows), CONTEXT), torch.int64)
    for place, row in zip(batch.numpy(), rows, strict=True):
        place[:] = row
    return batch


def batch_maker(figure: str, folder: Path) -> Callable[[Sequence[Any]], Tensor]:
    """Raw files of a batch (or rows of tokens) -> what is delivered."""
    makers: dict[str, Callable[[Sequence[Any]], Tensor]] = {
        "text_bytes": Rows(None),
        "text_bpe": Rows(folder / "tokenizer.json"),
        "text_tokens": stack_tokens,
        "image": decode_images,
        "ogg": decode_clips,
        "flac": decode_clips,
    }
    return makers[figure]


def units_of(batch: Any, figure: str) -> int:
    return batch.numel() if figure.startswith("text") else len(batch)


def shards(folder: Path, data: str) -> list[str]:
    return sorted(map(str, (folder / "tars" / data).glob("*.tar")))


def samples_of(path: str) -> Iterator[bytes]:
    """The files of a tar in order (one file a sample)."""
    import tarfile

    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield file.read()


def token_rows(folder: Path) -> Iterator[np.ndarray]:
    """(CONTEXT,) uint16 rows of all texts, tokenized: what the peers with a format for tokens store."""
    rows = Rows(folder / "tokenizer.json")
    for path in shards(folder, "text"):
        texts = list(samples_of(path))
        for first in range(0, len(texts), DOCUMENTS):
            yield from rows(texts[first : first + DOCUMENTS]).numpy().astype(np.uint16)


def main(
    open_loader: Callable[..., Iterable[Any]],
    prepare: Callable[[Path], None],
    save: Callable[[Any], Any] = lambda loader: None,
    units: Callable[[Any, str], int] = units_of,
    imports: tuple[str, ...] = (),
) -> None:
    """Runs a contestant. A peer's file ends with this call.

        prepare FOLDER                          writes its format
        speed FIGURE FOLDER                     one JSON line when the first batch is there, then one for each line on stdin,
                                                which holds the seconds to load for; ends with stdin
        save FRACTION FOLDER                    loads that share of an epoch and keeps the loader's state
        resume FRACTION FOLDER [--began TIME]   seconds from TIME, when the process was started, to imports and the first batch

    Args:
        open_loader: (figure, folder, fraction=0, state=None) -> iterable of batches, of one epoch or endless.
        prepare: writes the contestant's format below the folder.
        save: loader -> state that `open_loader` takes.
        units: (batch, figure) -> units of work in it.
        imports: what `open_loader` imports late.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["prepare", "speed", "save", "resume"])
    parser.add_argument("what", nargs="?", default="")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--began", type=float, default=time.time())
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "prepare":
        prepare(options.folder)
    elif options.command == "speed":
        _serve_slices(open_loader(options.what, options.folder), options.what, units)
    elif options.command == "save":
        _save_state(open_loader("image", options.folder), float(options.what), options.folder, save, units)
    else:
        for name in imports:
            __import__(name)
        imported = time.time()
        fraction = float(options.what)
        state_file = _state_file(options.folder, options.what)
        saved = torch.load(state_file, weights_only=False) if fraction and state_file.exists() else {}
        batch = next(iter(open_loader("image", options.folder, fraction=fraction, state=saved.get("state"))))
        first = time.time()
        assert units(batch, "image") > 0
        continues = _digest(batch) == saved["next"] if "next" in saved else None
        _say(imports=imported - options.began, first_batch=first - imported, total=first - options.began, continues=continues)
    sys.stdout.flush()


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _serve_slices(loader: Iterable[Any], figure: str, units: Callable[[Any, str], int]) -> None:
    epochs = 0

    def forever() -> Iterator[Any]:
        nonlocal epochs
        while True:
            epochs += 1
            yield from loader

    batches = forever()
    _say(ready=units(next(batches), figure))
    for line in sys.stdin:
        seconds, done = float(line), 0
        warm = time.perf_counter() + min(1.0, seconds / 4)
        while time.perf_counter() < warm:  # what the worker had ready while others had their turn
            next(batches)
        epochs = 0
        cpu = _cpu_of_workers()
        began = now = time.perf_counter()
        while now < began + seconds:
            done += units(next(batches), figure)
            now = time.perf_counter()
        _say(units=done, seconds=now - began, epoch_ends=epochs, cores=(_cpu_of_workers() - cpu) / (now - began))


def _cpu_of_workers() -> float:
    """Seconds of CPU that the child processes have used: one worker with several threads may take more than one core."""
    ticks = 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _state_file(folder: Path, fraction: str) -> Path:
    return folder / "states" / f"{Path(sys.argv[0]).stem}-{fraction}.pt"


def _save_state(
    loader: Any, fraction: float, folder: Path, save: Callable[[Any], Any], units: Callable[[Any, str], int]
) -> None:
    """With the digest of the batch that comes next, so that a resumed loader can be told from one that begins anew."""
    wanted = int(fraction * json.loads((folder / "facts.json").read_text())["image"])
    done = 0
    batches = iter(loader)
    while done < wanted:
        done += units(next(batches), "image")
    state = copy.deepcopy(save(loader))
    path = _state_file(folder, f"{fraction:g}")
    path.parent.mkdir(exist_ok=True)
    torch.save({"state": state, "next": _digest(next(batches))}, path)
    _say(saved=done)


def _digest(batch: Any) -> str:
    images = batch if isinstance(batch, Tensor) else batch.images
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
