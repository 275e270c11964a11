"""Peak memory of a batch of sounds of mixed lengths, compared with a batch of equally long sounds with the same seconds.

    python benchmarks/mixed_sounds.py [--long 200] [--short 2] [--count 200]

One sound of 200 s with 200 of 2 s, against 201 of 3 s: decoded into a training batch and filled with codes, a training step of
the codec, its loss in validation, and the work of `pile encode`. Each in a process of its own; memory is the highest resident
size minus the size before the batch. Bar: mixed / equal at most 1.5.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from pile_app.data.assembly import PackedDocument, assemble, whole
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import Document, Segment
from pile_app.media import decode_audio
from pile_app.model.backbones import MinGRU
from pile_app.model.codecs import AudioCodecConfig
from pile_app.model.fused import FusedLanguageModel
from pile_app.tasks.encode import encode_sounds

KINDS = ("fill", "codec step", "validation", "encode")
RATE = 16_000


def measure(kind: str, lengths: list[float], folder: Path) -> float:
    """Peak MiB of one batch of sounds of these seconds, `<seconds>.flac` in the folder."""
    torch.manual_seed(0)
    model = FusedLanguageModel(MinGRU(width=32, layers=1), ByteTokenizer(), None, AudioCodecConfig())

    def once(lengths: list[float]) -> None:
        if kind == "encode":
            encode_sounds([decode_audio(files[seconds], RATE) for seconds in lengths], model)
            return
        rows: list[list[PackedDocument]] = [[]]
        context = max(4 + int(model.vocabulary.audio_tokens(round(seconds * RATE), RATE)) for seconds in lengths)
        free = context
        for seconds in sorted(lengths, reverse=True):
            document = Document((Segment(files[seconds], "flac"),))
            length = 4 + int(model.vocabulary.audio_tokens(round(seconds * RATE), RATE))
            if length > free:
                rows.append([])
                free = context
            rows[-1].append(whole(document, length))
            free -= length
        batch = assemble(rows, model.vocabulary, model.tokenizer, context)
        assert not batch.rejected and len(batch.sound_tokens) == len(lengths)
        if kind == "fill":
            model.fill(batch)
        elif kind == "validation":
            with torch.no_grad():
                model.codec_loss(batch)
        else:
            sum(model.codec_loss(batch, crop=50).values()).backward()

    files = {seconds: (folder / f"{seconds}.flac").read_bytes() for seconds in {*lengths, 1.0}}
    once([1.0])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    once(lengths)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=float, default=200.0)
    parser.add_argument("--short", type=float, default=2.0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    mixed = [options.long] + [options.short] * options.count
    lengths = {"mixed": mixed, "equal": [round(sum(mixed) / len(mixed), 3)] * len(mixed)}
    if options.only:
        kind, which, folder = options.only
        print(measure(kind, lengths[which], Path(folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for seconds in {*lengths["mixed"], *lengths["equal"], 1.0}:
            noise = np.random.default_rng(0).uniform(-0.3, 0.3, round(seconds * RATE))
            Path(folder, f"{seconds}.flac").write_bytes(Segment.from_audio(noise, RATE).file)
        for kind in KINDS:
            peaks = {}
            for which in lengths:
                command = [sys.executable, *sys.argv, "--only", kind, which, folder]
                peaks[which] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            ratio = round(peaks["mixed"] / peaks["equal"], 2)
            print(json.dumps({"kind": kind, **{f"{which}_MiB": round(peak) for which, peak in peaks.items()}, "ratio": ratio}))


if __name__ == "__main__":
    main()
