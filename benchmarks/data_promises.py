"""Promises of the data path: fractions of the tokens by source, packs without much padding, constant memory of a worker.

    python benchmarks/data_promises.py [--samples 100000]

Makes its data in a temporary folder (texts, small images and sounds) and reads it through `PileDataModule` as `train.py` does.
"""

from __future__ import annotations

import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import command, resident, stand_in_trainer, table, write_texts

from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.packing import best_fit_decreasing
from pile_app.data.shards import write_shards
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import Document, Segment
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel

WEIGHTS = {"web": 0.4, "books": 0.25, "images": 0.15, "speech": 0.15, "code": 0.05}
TEXTS = {"web": (4000, 400), "books": (600, 3000), "code": (1500, 900)}  # documents, median bytes
IMAGE = ImageCodecConfig(size=32, channels=3, patch=8, levels=(8, 5, 5), width=32, blocks=1)
AUDIO = AudioCodecConfig(8000, hop=80, window=320, mels=20, frames_per_token=4, levels=(4, 3, 3), width=16, blocks=1)


def write_sources(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, (count, median) in TEXTS.items():
        lengths = np.exp(rng.normal(np.log(median), 1, count)).clip(10, 40_000).astype(int).tolist()
        write_texts(folder, name, lengths, shard_bytes=2 << 20)
    pictures = (rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(2000))
    captioned = (Document((Segment.from_image(pixels), Segment("noise " * int(rng.integers(1, 30)))), f"{n}", ordered=False)
                 for n, pixels in enumerate(pictures))  # fmt: skip
    write_shards(captioned, folder, "images", shard_bytes=2 << 20)
    noises = (0.3 * rng.standard_normal(int(rng.integers(4000, 80_000))) for _ in range(300))
    speech = (Document((Segment.from_audio(noise, 8000),), f"{n}") for n, noise in enumerate(noises))
    write_shards(speech, folder, "speech", shard_bytes=2 << 20)


def best_fill(source: SourceData, context: int) -> float:
    """The fraction of tokens in packs that are not padding, if the whole source were packed at once."""
    pieces = np.concatenate([source.pieces(shard) for shard in range(len(source.paths))])
    lengths = pieces["stop"] - pieces["start"]
    return float(lengths.sum()) / context / len(best_fit_decreasing(lengths, context))


def rows(folder: Path, samples: int) -> Iterator[tuple[str, str, str]]:
    from pile_app.model.backbones import MinGRU

    model = FusedLanguageModel(MinGRU(width=32, layers=1), ByteTokenizer(), IMAGE, AUDIO)

    def open_data(context: int, **options: int) -> PileDataModule:
        sources = {name: Source(str(folder / f"{name}-*.tar"), weight=weight) for name, weight in WEIGHTS.items()}
        data = PileDataModule(sources, model.vocabulary, model.tokenizer, context, **options)  # type: ignore[arg-type]
        data.prepare_data()
        data.setup()
        data.trainer = stand_in_trainer()
        return data

    for context in (256, 512):
        data = open_data(context)
        tokens = np.zeros(len(WEIGHTS), np.int64)
        for position in range(0, 1 << 30, 8):
            if tokens.sum() >= 1_000_000:
                break
            tokens += data.order.sizes(position, position + 8)[0]
        worst = np.abs(tokens / tokens.sum() - list(WEIGHTS.values())).max()
        yield f"worst error of 5 fractions after 10⁶ tokens, context {context}", f"{worst:.3%}", "≤ 0.2 %"
    for context in (512, 4096):
        data = open_data(context)
        fills = ", ".join(f"{order.source.name} {order.tokens_per_pack / context:.1%}" for order in data.order.sources)
        best = ", ".join(f"{source.name} {best_fill(source, context):.1%}" for source in data.train_data)
        yield f"tokens that are not padding, context {context}", fills, f"≥ 98 %; best fit of the whole source: {best}"
    seen, first = 0, 0
    batches = iter(open_data(512, global_batch=16, num_workers=1).train_dataloader())
    while seen < samples:
        seen += sum(map(len, next(batches).documents))
        (worker,) = (int(child.pid or 0) for child in multiprocessing.active_children())
        first = first or (resident("RssAnon", worker) if seen >= 1000 else 0)
    last = resident("RssAnon", worker)
    yield f"memory of a worker after {samples:,} samples ÷ after 1,000", f"{last / first:.3f} of {first / 1e6:.0f} MB", "≤ 1.1"


def main(samples: int = 100_000) -> None:
    """samples: that a worker has loaded when its memory is compared with that after 1,000."""
    with tempfile.TemporaryDirectory() as name:
        write_sources(Path(name))
        table(["figure", "measured", "bar"], rows(Path(name), samples))


if __name__ == "__main__":
    command(main, __doc__)
