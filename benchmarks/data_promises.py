"""What the data path promises, measured: shares of tokens, memory of a loading worker, packed against unpacked losses, fill.

    python benchmarks/data_promises.py

Makes its data in a temporary folder (texts, small images and sounds), reads it through `PileDataModule` as `train.py` does.
"""

from __future__ import annotations

import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pile_app.data.assembly import assemble
from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.packing import best_fit_decreasing
from pile_app.data.shards import write_shards
from pile_app.data.sources import SourceData
from pile_app.documents import Document, Segment
from pile_app.model.backbones import LSTM, RNN, Transformer
from pile_app.model.codecs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel

WEIGHTS = {"web": 0.4, "books": 0.25, "images": 0.15, "speech": 0.15, "code": 0.05}
MEDIAN = {"web": 400, "books": 3000, "code": 900}  # bytes
IMAGE = ImageCodecConfig(size=32, channels=3, patch=8, levels=(8, 5, 5), width=32, blocks=1)
AUDIO = AudioCodecConfig(8000, hop=80, window=320, mels=20, frames_per_token=4, levels=(4, 3, 3), width=16, blocks=1)


@dataclass
class Stand:
    """In place of a Trainer."""

    max_steps: int = 10**9
    global_step: int = 0
    distributed_sampler_kwargs: None = None
    local_rank: int = 0
    training: bool = True


def documents(source: str, count: int) -> Iterator[Document]:
    rng = np.random.default_rng(sum(source.encode()))
    words = ["lorem", "ipsum", "dolor", "sit", "amet.", "consectetur", "elit.", "sed"]
    for n in range(count):
        if source == "images":
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            yield Document((Segment.from_image(pixels), Segment("noise " * int(rng.integers(1, 30)))), f"{n}", ordered=False)
        elif source == "speech":
            yield Document((Segment.from_audio(0.3 * rng.standard_normal(int(rng.integers(4000, 80000))), 8000),), f"{n}")
        else:
            size = int(np.exp(rng.normal(np.log(MEDIAN[source]), 1)).clip(10, 40_000))
            yield Document((Segment(" ".join(rng.choice(words, size // 6 + 1))),), f"{n}")


def make(folder: Path, model: FusedLanguageModel, context: int, **options: object) -> PileDataModule:
    sources = {name: Source(str(folder / f"{name}-*.tar"), weight=weight) for name, weight in WEIGHTS.items()}
    data = PileDataModule(sources, model.vocabulary, model.tokenizer, context, **options)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    data.trainer = Stand()  # type: ignore[assignment]
    return data


def best_fill(source: SourceData, context: int) -> float:
    """Fill of the packs if a whole source were packed at once."""
    pieces = np.concatenate([source.pieces(shard) for shard in range(len(source.paths))])
    lengths = pieces["stop"] - pieces["start"]
    return float(lengths.sum()) / context / len(best_fit_decreasing(lengths, context))


def resident(process: int) -> float:
    """Anonymous megabytes of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="pile-promises-"))
    for name, count in {"web": 4000, "books": 600, "images": 2000, "speech": 300, "code": 1500}.items():
        write_shards(documents(name, count), folder, name, shard_bytes=2 << 20)
    torch.manual_seed(0)
    backbone = Transformer(width=64, layers=2, heads=2)
    model = FusedLanguageModel(backbone, load(), IMAGE, AUDIO).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    print("| figure | measured | bar |\n|---|---|---|")
    for context in (256, 512):
        data = make(folder, model, context)
        tokens = np.zeros(len(WEIGHTS), np.int64)
        position = 0
        while tokens.sum() < 1_000_000:
            tokens += data.order.sizes(position, position + 8)[0]
            position += 8
        shares = tokens / tokens.sum()
        worst = max(abs(share - weight) for share, weight in zip(shares, WEIGHTS.values(), strict=True))
        print(f"| worst error of 5 shares after 10⁶ tokens, context {context} | {worst:.3%} | ≤ 0.2 % |")

    for context in (512, 4096):
        data = make(folder, model, context)
        fills = [f"{order.source.name} {order.tokens_per_pack / context:.2%}" for order in data.order.sources]
        most = [f"{source.name} {best_fill(source, context):.2%}" for source in data.train_data]
        print(f"| fill, context {context} | {', '.join(fills)} | ≥ 98 %, or best fit of the whole source: {', '.join(most)} |")

    data = make(folder, model, 512, global_batch=16, num_workers=1)
    seen, first = 0, 0.0
    batches = iter(data.train_dataloader())
    while seen < 100_000:
        seen += sum(map(len, next(batches).documents))
        (worker,) = (child.pid for child in multiprocessing.active_children())
        if not first and seen >= 1000:
            first = resident(worker)
    last = resident(worker)
    print(f"| worker after 10⁵ samples ÷ after 10³ | {last:.0f} MB ÷ {first:.0f} MB = {last / first:.3f} | ≤ 1.1 |")
    del batches

    data = make(folder, model, 512, condition_dropout=0.0)
    dataset = data.train_dataset()
    backbones = {"Transformer": backbone, "LSTM": LSTM(width=64, layers=2), "RNN": RNN(width=64, layers=2)}
    for name, one in backbones.items():
        model.backbone = one.eval()
        worst, compared = 0.0, 0
        for position in range(40):
            with torch.no_grad():
                packed = losses(model, dataset[position])
                alone: dict[int, float] = {}
                for number, entry in enumerate(dataset.documents(position)):
                    alone[number] = losses(model, assemble([[entry]], model.vocabulary, model.tokenizer, entry.piece.stop))[0]
            compared += len(alone)
            worst = max(worst, *(abs(packed[n] - alone[n]) for n in alone))
        print(f"| packed against alone, worst loss of {compared} pieces, {name} | {worst:.1e} nats | ≤ 1e-5 |")


def load() -> object:
    from pile_app.data.tokenizers import ByteTokenizer

    return ByteTokenizer()


def losses(model: FusedLanguageModel, batch: object) -> dict[int, float]:
    """Number of the document in the batch -> its mean loss."""
    sums: dict[int, list[float]] = {}
    for modality, loss in model(batch).items():
        owners = batch.document.flatten()[batch.targets[modality]]  # type: ignore[attr-defined]
        for owner, each in zip(owners.tolist(), loss.each.tolist(), strict=True):
            sums.setdefault(owner, []).append(each)
    return {owner: float(np.mean(values)) for owner, values in sums.items()}


if __name__ == "__main__":
    main()
