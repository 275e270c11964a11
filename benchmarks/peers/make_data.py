"""The data of `data_peers.py`, made once from `../shared/data`: the same files for every contestant.

    python benchmarks/peers/make_data.py FOLDER [--text-megabytes 60] [--image-gigabytes 2.2] [--copies 4]

tars/text    documents of sentences and speeches, drawn anew, 1,600 bytes in the median (log-normal)
tars/image   JPEG, 256 x 256, quality 90, about 24 kB: photos of CIFAR-10, enlarged, with detail and noise; 3,000 differ
tars/ogg     5 s at 44.1 kHz mono: clips of ESC-10, mixed by twos; 600 differ, `--copies` of each
tars/flac    the same clips
tokenizer.json, facts.json
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
IMAGES, CLIPS = 3000, 600  # that differ
SHARD_BYTES = {"text": 8 << 20, "image": 64 << 20, "ogg": 16 << 20, "flac": 64 << 20}
VOCABULARY = 32_000


def documents(size: int) -> Iterator[str]:
    """`size` bytes of texts. Words are changed with a small chance, so that two documents never share long passages and the
    tokenizer meets rare words too."""
    random = np.random.default_rng(0)
    prose = (SHARED / "wikitext2" / "valid.txt").read_text()
    plays = (SHARED / "tinyshakespeare" / "input.txt").read_text()
    reviews = (SHARED / "sst2" / "train.tsv").read_text() + (SHARED / "sent-conv" / "subj.all").read_text(errors="replace")
    parts = [
        [line.strip() for line in prose.split("\n") if len(line) > 40],
        [part.strip() for part in plays.split("\n\n") if part.strip()],
        [re.sub(r"^\d\s|\s\d$", "", line).strip() for line in reviews.split("\n") if line.strip()],
    ]
    words = np.array(sorted({word for lines in parts for line in lines for word in line.split()}))
    while size > 0:
        target = min(60_000, int(random.lognormal(np.log(1600), 0.9)) + 20)
        kind = int(random.integers(3))
        text: list[str] = []
        length = 0
        while length < target:
            part = parts[kind][int(random.integers(len(parts[kind])))].split(" ")
            changed = random.random(len(part)) < 0.08
            part = [str(random.choice(words)) if change else word for word, change in zip(part, changed, strict=True)]
            line = " ".join(part)[: target - length + 40]
            text.append(line)
            length += len(line) + 1
        document = "\n".join(text)
        size -= len(document.encode())
        yield document


def photos() -> Iterator[bytes]:
    from PIL import Image

    random = np.random.default_rng(0)
    with tarfile.open(SHARED / "cifar10-subset.tar") as tar:
        members = [member for member in tar if member.isfile() and "/train/" in member.name]
        for member in members[:: len(members) // IMAGES][:IMAGES]:
            photo = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
            fine = Image.fromarray(random.integers(0, 256, (128, 128), np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
            pixels = np.asarray(photo.resize((256, 256), Image.Resampling.BICUBIC), np.float32)
            detail = (np.asarray(fine, np.float32)[..., None] - 128) / 10 + random.normal(0, 5, pixels.shape)
            file = io.BytesIO()
            Image.fromarray(np.clip(pixels + detail, 0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
            yield file.getvalue()


def clips() -> Iterator[np.ndarray]:
    """(220500,) float32 each."""
    import soundfile

    random = np.random.default_rng(0)
    sounds = []
    for path in sorted((SHARED / "esc10").glob("*/*.ogg")):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        assert rate == 44_100
        sounds.append(np.resize(samples.mean(axis=1), 220_500))
    for _ in range(CLIPS):
        one, other = (sounds[i] for i in random.integers(len(sounds), size=2))
        mixed = random.uniform(0.4, 0.8) * one + 0.2 * np.roll(other, int(random.integers(len(other))))
        yield mixed + random.normal(0, 1e-3, len(mixed)).astype(np.float32)  # no digital silence


def encoded(waveform: np.ndarray, kind: str, subtype: str) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(waveform, -1, 1), 44_100, format=kind, subtype=subtype)
    return file.getvalue()


def write_tars(folder: Path, extension: str, files: Iterator[bytes], shard_bytes: int) -> int:
    """Returns the number of files. Plain WebDataset: one file a sample."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    stream = open(folder / "000000.tar", "wb")  # noqa: SIM115 (closed with its writer)
    writer = webdataset.TarWriter(stream, encoder=False, mtime=0)
    shards, count = 1, 0
    for count, data in enumerate(files, 1):
        if stream.tell() > shard_bytes:
            writer.close()
            stream.close()
            stream = open(folder / f"{shards:06d}.tar", "wb")  # noqa: SIM115
            writer = webdataset.TarWriter(stream, encoder=False, mtime=0)
            shards += 1
        writer.write({"__key__": f"{count:08d}", extension: data})
    writer.close()
    stream.close()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text-megabytes", type=float, default=60)
    parser.add_argument("--image-gigabytes", type=float, default=2.2)
    parser.add_argument("--copies", type=int, default=4, help="of each clip")
    options = parser.parse_args()
    folder: Path = options.folder
    facts_path = folder / "facts.json"
    if facts_path.exists():
        print(f"{folder} holds the data already")
        return
    tars = folder / "tars"
    folder.mkdir(parents=True, exist_ok=True)

    texts = list(documents(int(options.text_megabytes * 1e6)))
    facts = {"text": write_tars(tars / "text", "txt", (text.encode() for text in texts), SHARD_BYTES["text"])}
    facts["text_bytes"] = sum(len(text.encode()) for text in texts)
    train_tokenizer(texts[:: max(1, len(texts) // 10_000)], folder / "tokenizer.json")

    jpegs = list(photos())
    copies = max(1, round(options.image_gigabytes * 1e9 / sum(map(len, jpegs))))
    everything = (jpeg for _ in range(copies) for jpeg in jpegs)
    facts["image"] = write_tars(tars / "image", "jpg", everything, SHARD_BYTES["image"])
    facts["image_bytes"] = copies * sum(map(len, jpegs))

    waveforms = list(clips())
    for name, subtype in (("ogg", "VORBIS"), ("flac", "PCM_16")):
        files = [encoded(waveform, name.upper(), subtype) for waveform in waveforms]
        everything = (file for _ in range(options.copies) for file in files)
        facts[name] = write_tars(tars / name, name, everything, SHARD_BYTES[name])
        facts[f"{name}_bytes"] = options.copies * sum(map(len, files))
    facts_path.write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Byte-level BPE. `pile_app.data.tokenizers.train_tokenizer` makes the same; this file does not depend on it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


if __name__ == "__main__":
    main()
