"""Bits a byte on WikiText-2's validation text after ten minutes of training on local text, beside compressors and n-grams.

    python benchmarks/wikitext_bits.py [--run runs/local_text] [--context 256 --stride 128] [--output figures.json]

Trains `conf/local_text.yaml` if the run is not there. Every figure counts all bytes of the file. The compressors read it alone;
the n-gram models (`ngrams.py`) are trained on exactly the text that the run was trained on, evaluated text as it is. Our model
reads the file in windows that overlap (`score.rolling_scores`): each token counts once. The bar: below all of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard
from ngrams import byte_bits, word_bits

from pile_app.data.shards import Shards
from pile_app.model.score import rolling_scores
from pile_app.training.load import load_run, read_config

CONFIG = "conf/local_text.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/local_text"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--checkpoint", default="last", help="of the run (default: %(default)s)")
    parser.add_argument("--evaluation", default="data/local_text/shards/evaluation-*.tar", help="default: %(default)s")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the run's context)")
    parser.add_argument("--stride", type=int, help="new tokens of each window (default: half of them)")
    parser.add_argument("--output", type=Path, help="write the figures there too, as JSON")
    options = parser.parse_args()
    if not (options.run / "summary.json").exists():
        command = [
            sys.executable,
            "train.py",
            "--config",
            CONFIG,
            "--name",
            options.run.name,
            "--runs",
            str(options.run.parent),
        ]
        subprocess.run(command, check=True)
    figures = measure(options)
    best = min(value for name, value in figures["bits_per_byte"].items() if name != "Pile")
    print("| | bits a byte | bar |\n|---|---|---|")
    for name, value in figures["bits_per_byte"].items():
        print(f"| {name} | {value:.4f} | {f'below {best:.4f}' if name == 'Pile' else ''} |")
    print(json.dumps({name: value for name, value in figures.items() if name != "bits_per_byte"}))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1))
    return 0 if figures["bits_per_byte"]["Pile"] < best else 1


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    sources = read_config(options.run)["data"]["sources"]
    training = "".join(text for source in sources.values() for text in texts(source["train"]))
    text = "".join(texts(options.evaluation))
    data = text.encode()
    bits = {
        "gzip -9": 8 * len(gzip.compress(data, 9)),
        "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "zstd -19": 8 * len(zstandard.ZstdCompressor(level=19).compress(data)),
        "5-gram Kneser-Ney, words": word_bits(training, text),
        "5-gram Kneser-Ney, bytes": byte_bits(training, text),
    }
    module, datamodule, saved = load_run(options.run, options.checkpoint)
    context = options.context or datamodule.context
    stride = options.stride or context // 2
    began = time.perf_counter()
    scores = rolling_scores(module.model, text, context, stride)
    seconds = time.perf_counter() - began
    assert sum(score.bytes for score in scores) == len(data)
    bits["Pile"] = sum(score.nats for score in scores) / math.log(2)
    summary = json.loads((options.run / "summary.json").read_text())
    return {
        "bits_per_byte": {name: value / len(data) for name, value in bits.items()},
        "evaluated_bytes": len(data),
        "training_bytes": len(training.encode()),
        "train_seconds": summary["train_seconds"],
        "steps": saved["global_step"],
        "tokens": summary["tokens"],
        "parameters": summary["parameters"]["language_model"],
        "window": context,
        "stride": stride,
        "scoring_seconds": round(seconds, 1),
    }


def texts(pattern: str) -> Iterator[str]:
    """The texts of shards, in order."""
    for document in Shards(pattern):
        yield from (segment.text for segment in document.segments)


if __name__ == "__main__":
    sys.exit(main())
