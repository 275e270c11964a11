"""Bad samples of every kind: each is counted under its reason, the run finishes, and every good document is seen once."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from attempts import Workbench
from conftest import media_documents, prose_documents

from pile_app.data.shards import Shards, write_shards
from pile_app.documents import Document, Segment, sample_from_document
from pile_app.training.callbacks import count_quarantined, read_ledger

COUNT = 1000  # documents; each kind of bad sample is half a percent of them
EACH = COUNT // 200


def image(n: int, extension: str = "png") -> bytes:
    return Segment.from_image(np.random.default_rng(n).integers(0, 256, (8, 8), np.uint8)).file


def sound(n: int, peak: float = 0.3, samples: int = 1600) -> bytes:
    return Segment.from_audio(peak * np.random.default_rng(n).standard_normal(samples), 8000, "wav").file


def broken(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def nan_sound(n: int) -> bytes:
    """A WAV file of float32 samples, with one NaN."""
    samples = np.full(1600, 0.1, "<f4")
    samples[n] = np.nan
    body = struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32)
    riff = b"WAVEfmt " + struct.pack("<I", 16) + body + b"data" + struct.pack("<I", 6400) + samples.tobytes()
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


def huge_image(n: int) -> bytes:
    """A PNG file that claims 30,000 x 30,000 pixels."""
    import zlib

    header = struct.pack(">II", 30_000, 30_000) + image(n)[24:29]
    return broken(image(n), 16, header + struct.pack(">I", zlib.crc32(b"IHDR" + header)))


# Reason -> the files of the n-th such sample. The last three pass the index, which reads headers only.
BAD: dict[str, Callable[[int], dict[str, bytes]]] = {
    "invalid_json": lambda n: {"json": b'{"segments": ['},
    "invalid_utf8": lambda n: {"txt": b"bytes \xff\xfe that are no text"},
    "missing_file": lambda n: {"json": json.dumps({"segments": [{"file": "7.png"}]}).encode()},
    "unknown_medium": lambda n: {"json": b'{"segments": [{"file": "0.mp4"}]}', "0.mp4": b"film"},
    "no_segment": lambda n: {"xml": b"<nothing/>"},
    "undecodable_image": lambda n: {"png": b"\x89PNG\r\n" + bytes(40)},
    "image_too_large": lambda n: {"png": huge_image(n)},
    "undecodable_audio": lambda n: {"flac": b"fLaC" + bytes(100)},
    "empty_audio": lambda n: {"wav": sound(n, samples=0)},
    "nan_audio": lambda n: {"wav": nan_sound(n)},
    "silent_audio": lambda n: {"wav": sound(n, peak=0.0)},
    "checksum": lambda n: {"txt": b"a text that decays after it was indexed"},
}
WHEN_READ = ("nan_audio", "silent_audio", "checksum")


def write_with_bad_samples(path: Path) -> tuple[set[str], Counter[str]]:
    """One shard; (keys of its good documents, bad samples by reason)."""
    media, prose = list(media_documents(COUNT // 2, "train")), list(prose_documents(COUNT // 2, "text"))
    good = [document for pair in zip(media, prose, strict=True) for document in pair]
    samples: list[tuple[str, dict[str, bytes]]] = []
    for number, document in enumerate(good):
        sample = sample_from_document(document)
        key = str(sample.pop("__key__"))
        samples.append((key, {name: data if isinstance(data, bytes) else data.encode() for name, data in sample.items()}))
        reason = list(BAD)[number % len(BAD)]
        if number // len(BAD) % (COUNT // len(BAD) // EACH) == 0 and number // len(BAD) // (COUNT // len(BAD) // EACH) < EACH:
            samples.append((f"bad-{reason}-{number}", BAD[reason](number)))
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for name, data in files.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    Shards(str(path), fields="segments")
    data = path.read_bytes()  # as a disk does it in time: the texts of these samples lose a bit
    path.write_bytes(data.replace(b"a text that decays", b"a tExt that decays"))
    return {document.key for document in good}, Counter(key.split("-")[1] for key, _ in samples if key.startswith("bad-"))


def test_bad_samples_of_twelve_kinds_are_counted_and_no_good_one_is_lost(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    good, planted = write_with_bad_samples(shards / "mixed-train-000000.tar")
    assert planted == Counter(dict.fromkeys(BAD, EACH)) and len(BAD) == 12
    write_shards([Document((Segment("a text to validate on"),), "v")], shards, "mixed-validation")
    bench = Workbench(tmp_path, shards)
    config = bench.config.read_text().split("  sources:")[0]
    rest = "  context: 128" + bench.config.read_text().split("  context: 128")[1]
    source = f'{{train: "{shards}/mixed-train-*.tar", validation: "{shards}/mixed-validation-*.tar"}}'
    bench.config.write_text(f"{config}  sources:\n    mixed: {source}\n  epochs: 1\n  max_rejected_share: 0.1\n{rest}")
    few_steps = ("--data.global_batch", "32", "--trainer.val_check_interval", "1000", "--checkpoint_every", "1000")
    attempt = bench.start("run", "--trainer.max_steps", "-1", *few_steps)
    assert attempt.wait() == 0, attempt.text[-3000:]
    summary = json.loads((bench.run("run") / "summary.json").read_text())
    assert summary["rejected_when_indexed"] == {"mixed": {name: EACH for name in sorted(BAD) if name not in WHEN_READ}}
    assert count_quarantined(bench.run("run")) == summary["quarantined"] == {"mixed": dict.fromkeys(sorted(WHEN_READ), EACH)}
    balance = Shards(str(shards / "mixed-train-000000.tar")).balance()
    assert balance["read"] == balance["documents"] + balance["rejected"].total()
    assert all(key.split("-")[1] == reason for reason, (keys, _) in balance["examples"].items() for key in keys)
    last = list(read_metrics(bench.run("run")))
    assert all(float(last[-1][f"data/rejected/mixed/{reason}"]) == EACH for reason in WHEN_READ)
    seen = Counter()
    for entry in read_ledger(bench.run("run")):
        for _, key, _, start, _ in entry["documents"]:
            seen[key] += start == 0
    assert good <= seen.keys() and set(seen.values()) == {1}
    assert len(seen) == len(good) + len(WHEN_READ) * EACH


def read_metrics(run: Path) -> list[dict[str, str]]:
    import csv

    return [row for row in csv.DictReader((run / "metrics.csv").open()) if row.get("data/tokens/mixed")]
