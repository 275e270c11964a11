"""Peak memory of the loss, and of sounds of mixed lengths.

    python benchmarks/memory.py loss      our loss against plain cross-entropy: at most 0.15 of the smaller one
    python benchmarks/memory.py sounds    200 s among 200 sounds of 2 s against equal clips of as many seconds: at most 1.5

Each case runs in a process of its own. Memory is the peak of the resident size minus the size before the step (on a GPU, of
the allocated bytes). Plain cross-entropy computes bf16 logits by autocast and converts them to float32, with and without the
soft cap.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from common import command, measure_alone, resident, table

from pile_app.data.assembly import PackedDocument, assemble, whole
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import AUDIO, Document, Segment
from pile_app.model.backbones import MinGRU
from pile_app.model.base import LOGIT_CAP
from pile_app.model.codec_configs import AudioCodecConfig
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.loss import linear_cross_entropy

# -- The loss.

KINDS = ("plain", "plain, no cap", "ours")


def measure_loss(kind: str, vocabulary: int, tokens: int, width: int, device: str) -> dict[str, float]:
    """Peak bytes beyond hidden states, weight and their gradients, and seconds of the second of two steps."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, width, device=device)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    before = torch.cuda.memory_allocated() if device == "cuda" else start_peak()
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            if kind == "ours":
                loss = linear_cross_entropy(hidden, [weight], targets, LOGIT_CAP)[0]
            else:
                logits = F.linear(hidden, weight).float()
                logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP) if kind == "plain" else logits
                loss = F.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        nats = float(loss.detach()) / tokens  # waits for the device
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return {"bytes": peak - before, "seconds": seconds, "nats": nats}


def start_peak() -> int:
    """Reset the peak of this process; returns its resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def loss_table(vocabulary: int, tokens: int, width: int, device: str) -> bool:
    found = {kind: measure_alone(__file__, "loss", "--one", kind, "--sizes", [vocabulary, tokens, width], "--device", device)
             for kind in KINDS}  # fmt: skip
    least = min(found[kind]["bytes"] for kind in KINDS[:-1])
    rows = [(kind, f"{one['bytes'] / 1e9:.2f} GB", f"{one['bytes'] / least:.2f}", f"{one['seconds']:.2f}", f"{one['nats']:.4f}")
            for kind, one in found.items()]  # fmt: skip
    title = f"The loss of {tokens:,} tokens, vocabulary {vocabulary:,}, width {width}, bf16 autocast, {device}"
    table(["", "peak memory", "of the smaller plain one", "seconds", "nats a token"], rows, title)
    return found["ours"]["bytes"] <= 0.15 * least


# -- Sounds of mixed lengths.

RATE = 16_000
WORK = ("batch", "codec step", "validation", "pile encode")


def measure_sounds(work: str, lengths: list[float], folder: str) -> int:
    """Peak bytes of one batch of sounds of these seconds, `<seconds>.flac` in the folder."""
    from pile_app.tasks.encode import encode_media

    torch.manual_seed(0)
    model = FusedLanguageModel(MinGRU(width=32, layers=1), ByteTokenizer(), None, AudioCodecConfig())
    files = {seconds: Path(folder, f"{seconds}.flac").read_bytes() for seconds in {*lengths, 1.0}}

    def once(lengths: list[float]) -> None:
        if work == "pile encode":
            encode_media([Segment(files[seconds], "flac") for seconds in lengths], AUDIO, model, "")
            return
        tokens = {seconds: 4 + int(model.vocabulary.audio_tokens(round(seconds * RATE), RATE)) for seconds in lengths}
        context = max(tokens.values())
        rows: list[list[PackedDocument]] = [[]]
        free = context
        for seconds in sorted(lengths, reverse=True):
            if tokens[seconds] > free:
                rows.append([])
                free = context
            rows[-1].append(whole(Document((Segment(files[seconds], "flac"),)), tokens[seconds]))
            free -= tokens[seconds]
        batch = assemble(rows, model.vocabulary, model.tokenizer, context)
        assert not batch.rejected and len(batch.sound_tokens) == len(lengths)
        if work == "batch":
            model.fill(batch)
        elif work == "validation":
            with torch.no_grad():
                model.codec_loss(batch)
        else:
            sum(model.codec_loss(batch, crop=50).values()).backward()  # type: ignore[union-attr]

    once([1.0])
    before = start_peak()
    once(lengths)
    return resident("VmHWM") - before


def sounds_table(lengths: dict[str, list[float]]) -> bool:
    ratios: list[float] = []

    def rows() -> Iterator[tuple[object, ...]]:
        for work in WORK:
            mixed, equal = (measure_alone(__file__, "sounds", "--one", json.dumps([work, lengths[which], folder]))
                            for which in ("mixed", "equal"))  # fmt: skip
            ratios.append(mixed / equal)
            yield work, f"{mixed / 2**20:.0f}", f"{equal / 2**20:.0f}", f"{mixed / equal:.2f}"

    with tempfile.TemporaryDirectory() as folder:
        for seconds in {*lengths["mixed"], *lengths["equal"], 1.0}:
            noise = np.random.default_rng(0).uniform(-0.3, 0.3, round(seconds * RATE))
            Path(folder, f"{seconds}.flac").write_bytes(Segment.from_audio(noise, RATE).file)
        table(["work", "mixed MiB", "equal MiB", "ratio"], rows())
    return max(ratios) <= 1.5


def main(
    what: Literal["loss", "sounds"],
    sizes: tuple[int, int, int] = (65_536, 8_192, 512),
    count: int = 200,
    device: str = "cpu",
    one: str | None = None,
) -> bool | None:
    """sizes: vocabulary, tokens and width of `loss`; count: short sounds of `sounds`; one: the case that this process runs."""
    if one:
        return print(json.dumps(measure_loss(one, *sizes, device) if what == "loss" else measure_sounds(*json.loads(one))))
    if what == "loss":
        return loss_table(*sizes, device)
    mixed = [200.0] + [2.0] * count
    return sounds_table({"mixed": mixed, "equal": [round(sum(mixed) / len(mixed), 3)] * len(mixed)})


if __name__ == "__main__":
    command(main, __doc__)
