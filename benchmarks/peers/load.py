"""A contestant of `data_peers.py`. The work on each item is the same, so the loaders make the difference.

    python load.py pile|webdataset|litdata prepare all FOLDER        writes its format
    python load.py ... speed FIGURE FOLDER                           a line of JSON for the first batch, and for each line on
                                                                     stdin, the seconds to load for
    python load.py pile resume FRACTION FOLDER                       seconds from the imports to the first batch

Figures: text_bytes and text_bpe (a BPE of 32,000) in rows of CONTEXT tokens, documents end to end, tokenized while loading;
image: JPEG -> (32, 3, 256, 256) uint8; ogg, flac: 5 s at 44.1 kHz -> (16, 80000) float32 at 16 kHz. Peers work on the raw files
of a whole batch in their collate function, which is faster for each than item by item. They are tuned as their documentation
says: webdataset batches in the worker (wds-distributed), litdata keeps its "auto" defaults, with chunks of 64 MB. Pile is
`PileDataModule.train_dataloader`: packs of CONTEXT; 125 codes an image and 250 a clip fill one with as many as the others'.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

CONTEXT, RATE = 4096, 16_000
BATCH = {"text_bytes": 64, "text_bpe": 64, "image": 32, "ogg": 16, "flac": 16}  # raw files
PACKS = {"text_bytes": 32, "text_bpe": 8, "image": 1, "ogg": 1, "flac": 1}
KIND = {figure: figure.partition("_")[0] for figure in BATCH}


def allocate(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """In a worker, in shared memory, as `default_collate` does it: the batch is not copied again."""
    if get_worker_info() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)


def decode_images(files: Sequence[bytes]) -> torch.Tensor:
    import simplejpeg

    batch = allocate(len(files), 256, 256, 3, dtype=torch.uint8)
    for file, row in zip(files, batch.numpy(), strict=True):
        simplejpeg.decode_jpeg(file, buffer=row)
    return batch.permute(0, 3, 1, 2)


class Clips:
    """libsndfile, then torchaudio's windowed sinc with a filter that is computed once."""

    resample: Any = None

    def __call__(self, files: Sequence[bytes]) -> torch.Tensor:
        import soundfile
        import torchaudio

        self.resample = self.resample or torchaudio.transforms.Resample(44_100, RATE)
        batch = allocate(len(files), 5 * RATE, dtype=torch.float32).zero_()
        for file, row in zip(files, batch, strict=True):
            waveform = self.resample(torch.from_numpy(soundfile.read(io.BytesIO(file), dtype="float32")[0]))[: len(row)]
            row[: len(waveform)] = waveform
        return batch


class Rows:
    """Texts of a batch -> (rows, CONTEXT) int64, with a token 0 after each; the rest waits for the next batch."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rest = path, np.zeros(0, np.int64)
        self.tokenizer: Any = None

    def __call__(self, texts: Sequence[bytes]) -> torch.Tensor:
        if self.path is None:
            tokens = [np.frombuffer(b"\0".join([*texts, b""]), np.uint8)]
        else:
            from tokenizers import Tokenizer

            self.tokenizer = self.tokenizer or Tokenizer.from_file(str(self.path))
            encodings = self.tokenizer.encode_batch_fast([str(text, "utf-8") for text in texts], add_special_tokens=False)
            tokens = [np.array([*one.ids, 0]) for one in encodings]
        stream = np.concatenate([self.rest, *tokens])
        rows = allocate(len(stream) // CONTEXT, CONTEXT, dtype=torch.int64)
        rows.view(-1).numpy()[:], self.rest = stream[: rows.numel()], stream[rows.numel() :]
        return rows


def batch_maker(figure: str, folder: Path) -> Callable[[Sequence[bytes]], torch.Tensor]:
    if figure.startswith("text"):
        return Rows(folder / "tokenizer.json" if figure == "text_bpe" else None)
    return decode_images if figure == "image" else Clips()


def tars(folder: Path, kind: str) -> list[str]:
    return sorted(map(str, (folder / "tars" / kind).glob("*.tar")))


def samples_of(path: str) -> Iterator[bytes]:
    import tarfile

    with tarfile.open(path) as tar:
        for member in tar:
            yield tar.extractfile(member).read()  # type: ignore[union-attr]


def webdataset(figure: str, folder: Path) -> Iterable[Any]:
    import webdataset as wds

    make, paths, extension = batch_maker(figure, folder), tars(folder, KIND[figure]), KIND[figure]
    extension = {"text": "txt", "image": "jpg"}.get(extension, extension)
    data = wds.WebDataset(paths, shardshuffle=len(paths), seed=0, empty_check=False).shuffle(1000)
    batches = data.batched(BATCH[figure], collation_fn=lambda some: make([one[extension] for one in some]), partial=False)
    return wds.WebLoader(batches.repeat(), batch_size=None, num_workers=1)


def litdata(figure: str, folder: Path) -> Iterable[Any]:
    import litdata as lit

    data = lit.StreamingDataset(str(folder / "litdata" / KIND[figure]), shuffle=True, drop_last=True)
    options = {"batch_size": BATCH[figure], "collate_fn": batch_maker(figure, folder), "persistent_workers": True}
    return lit.StreamingDataLoader(data, num_workers=1, **options)


def pile(figure: str, folder: Path, fraction: float = 0, prepare: bool = False) -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from common import stand_in_trainer

    from pile_app.data.datamodule import PileDataModule, Source
    from pile_app.data.tokenizers import load_tokenizer
    from pile_app.vocabulary import Vocabulary

    tokenizer, kind = load_tokenizer(str(folder / "tokenizer.json") if figure == "text_bpe" else "bytes"), KIND[figure]
    media: dict[str, Any] = {}
    if kind == "image":
        media = {"image_codes": 1000, "image_shape": (3, 256, 256), "image_grid": (5, 25)}
    elif kind != "text":
        media = {"audio_codes": 1000, "sample_rate": RATE, "samples_per_token": 320}
    vocabulary = Vocabulary(text_tokens=tokenizer.size, tokenizer=tokenizer.fingerprint, **media)
    options: dict[str, Any] = {"context": CONTEXT, "global_batch": PACKS[figure], "num_workers": 1}
    began = time.perf_counter()
    data = PileDataModule({kind: Source(str(folder / "tars" / kind / "*.tar"))}, vocabulary, tokenizer, **options)
    if prepare:
        return data.prepare_data()
    data.setup("fit")
    data.trainer = stand_in_trainer(step=int(fraction * data.order.packs_per_epoch / data.global_batch))
    return data.train_dataloader(), began


def units_of(batch: Any, figure: str) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.numel() if figure.startswith("text") else len(batch)
    assert not batch.rejected, batch.rejected[0]
    if figure.startswith("text"):
        return sum(stop - start for pack in batch.documents for _, _, _, start, stop in pack)
    return len(batch.images) if figure == "image" else len(batch.audio_starts)


def cpu_of_workers() -> float:
    """Seconds of CPU time that the child processes have used."""
    ticks = 0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        ticks += sum(map(int, Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def serve(loader: Iterable[Any], figure: str) -> None:
    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()
    print(json.dumps({"ready": units_of(next(batches), figure)}), flush=True)
    for line in sys.stdin:
        warm = time.perf_counter() + min(1.0, float(line) / 4)
        while time.perf_counter() < warm:  # batches that were ready before this turn
            next(batches)
        units, cpu, began = 0, cpu_of_workers(), time.perf_counter()
        while time.perf_counter() < began + float(line):
            units += units_of(next(batches), figure)
        seconds = time.perf_counter() - began
        print(json.dumps({"units": units, "seconds": seconds, "cores": (cpu_of_workers() - cpu) / seconds}), flush=True)


def main() -> None:
    name, action, what, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    if action == "resume":
        loader, began = pile("image", folder, float(what))
        next(iter(loader))
        print(time.perf_counter() - began)
    elif action == "speed":
        serve(
            pile(what, folder)[0] if name == "pile" else {"webdataset": webdataset, "litdata": litdata}[name](what, folder),
            what,
        )
    elif name == "pile":
        for figure in BATCH:
            pile(figure, folder, prepare=True)
    elif name == "litdata":
        import litdata as lit

        for kind in set(KIND.values()):
            out = folder / "litdata" / kind
            if not (out / "index.json").exists():
                lit.optimize(samples_of, tars(folder, kind), str(out), chunk_bytes="64MB", num_workers=1, verbose=False)


if __name__ == "__main__":
    main()
