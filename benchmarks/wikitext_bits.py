"""Bits per byte on WikiText-2's validation text after ten minutes of training on local text, against compressors and n-grams.

    python benchmarks/wikitext_bits.py [--run runs/local_text] [--context 256 --stride 128]

Trains `conf/local_text.yaml` if the run is not there. Every figure counts all bytes of the file. The compressors read it alone;
the n-gram models (`ngrams.py`) are trained on exactly the text that the run was trained on. Our model reads the file in
windows that overlap (`score.rolling_scores`), so that each token counts once. The bar: below all of them.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import zstandard
from common import command, table
from ngrams import byte_bits, word_bits

from pile_app.data.shards import Shards
from pile_app.model.score import rolling_scores
from pile_app.training.load import load_run, read_config


def read(pattern: str) -> str:
    """The texts of shards, in order."""
    return "".join(segment.text for document in Shards(pattern) for segment in document.segments)


def main(
    run: Path = Path("runs/local_text"),
    checkpoint: str = "last",
    evaluation: str = "data/local_text/shards/evaluation-*.tar",
    context: int | None = None,
    stride: int | None = None,
) -> bool:
    """context: tokens of a window, default that of the run; stride: new tokens of each window, default half of the context."""
    if not (run / "summary.json").exists():
        words = ["train.py", "--config", "conf/local_text.yaml", "--name", run.name, "--runs", str(run.parent)]
        subprocess.run([sys.executable, *words], check=True)
    training = "".join(read(source["train"]) for source in read_config(run)["data"]["sources"].values())
    text = read(evaluation)
    data = text.encode()
    module, datamodule, saved = load_run(run, checkpoint)
    context = context or datamodule.context
    scores = rolling_scores(module.model, text, context, stride or context // 2)
    assert sum(score.bytes for score in scores) == len(data)
    bits = {
        "gzip -9": 8 * len(gzip.compress(data, 9)),
        "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "zstd -19": 8 * len(zstandard.ZstdCompressor(level=19).compress(data)),
        "5-gram Kneser-Ney, words": word_bits(training, text),
        "5-gram Kneser-Ney, bytes": byte_bits(training, text),
        "Pile": sum(score.nats for score in scores) / math.log(2),
    }
    table(["", "bits per byte"], [(name, f"{value / len(data):.4f}") for name, value in bits.items()])
    summary = json.loads((run / "summary.json").read_text())
    sizes = f"{len(data):,} bytes scored; trained on {len(training.encode()):,} bytes for {summary['train_seconds']:.0f} s"
    print(f"{sizes}, {saved['global_step']:,} steps, {summary['parameters']['language_model']:,} parameters")
    return bits.pop("Pile") < min(bits.values())


if __name__ == "__main__":
    command(main, __doc__)
