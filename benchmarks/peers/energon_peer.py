"""megatron-energon: the tars with its metadata beside them, a crude dataset, a task encoder, the savable loader.

https://nvidia.github.io/Megatron-Energon: basic/quickstart (`max_samples_per_sequence`; the shuffle buffer is as large as
webdataset's), basic/save_restore (`save_state_rank`, and `restore_state_rank` before the first batch), "Crude datasets" (a
cooker in place of a sample type). Restoring replays what was loaded since the last internal checkpoint (docstring of
`get_savable_loader`), so these are taken every 10 s in place of 60.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contest import BATCH_OF, DATA_OF, EXTENSION_OF, SHUFFLE_BUFFER, batch_maker, main, shards
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SavableDataLoader,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)


@edataclass
class FileSample(Sample):
    file: bytes


def cooker(extension: str) -> Cooker[Any]:
    @stateless
    def cook(sample: dict[str, Any]) -> FileSample:
        return FileSample(**basic_sample_keys(sample), file=sample[extension])

    return Cooker(cook)


class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    decoder = None

    def __init__(self, extension: str, make: Callable[[Sequence[bytes]], Any]) -> None:
        super().__init__()
        self.cookers = [cooker(extension)]
        self.make = make

    @stateless
    def encode_sample(self, sample: FileSample) -> FileSample:
        return sample

    @stateless
    def batch(self, samples: list[FileSample]) -> Any:
        return self.make([sample.file for sample in samples])

    @stateless
    def encode_batch(self, batch: Any) -> Any:
        return batch


def prepare(folder: Path) -> None:
    for data in ("text", "image", "ogg", "flac"):
        out = folder / "energon" / data
        if (out / ".nv-meta" / "dataset.yaml").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        for path in shards(folder, data):  # it writes beside the tars, and so do others
            if not (out / Path(path).name).exists():
                os.link(path, out / Path(path).name)
        subprocess.run(
            [
                Path(sys.executable).parent / "energon", "prepare", out, "--non-interactive", "--split-ratio", "1,0,0",
                "--sample-type", "CrudeWebdataset", "--num-workers", "2", "--force-overwrite", "--no-progress",
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip


def open_loader(figure: str, folder: Path, fraction: float = 0, state: Any = None) -> SavableDataLoader[Any]:
    if figure == "text_tokens":
        raise SystemExit("energon has no format for tokens")
    data = DATA_OF[figure]
    dataset = get_train_dataset(
        folder / "energon" / data,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=1),
        batch_size=BATCH_OF[figure],
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Encoder(EXTENSION_OF[data], batch_maker(figure, folder)),
    )
    loader = get_savable_loader(dataset, checkpoint_every_sec=10)
    if state is not None:
        loader.restore_state_rank(state)
    return loader


def save(loader: SavableDataLoader[Any]) -> Any:
    return loader.save_state_rank()


if __name__ == "__main__":
    main(open_loader, prepare, save)
