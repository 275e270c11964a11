"""Retrieval of concepts never seen in training, on the stamps of Tux Paint: recall at 5, as a multiple of chance.

    python benchmarks/retrieval.py [--run runs/retrieval] [--shards data/tuxpaint/shards]

Trains missing runs (conf/tasks/tuxpaint.yaml, then conf/tasks/retrieval.yaml), embeds the test documents with the checkpoint
that validation chose, and ranks for each test segment of one modality all segments of another. Captions are English, spoken
captions French. Any segment of a stamp with the same English caption is right; chance is the exact recall of a random order.

The baselines know the same training stamps. Caption -> image: the mean image (8 x 8 pixels, standardized) of those stamps
with the nearest captions (TF-IDF of words); image -> spoken caption: the mean sound (log-mel energies of 40 bands in 8 parts of
the time, and log duration, standardized) of the stamps with the nearest images; then by cosine.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torchaudio
from common import command, table
from sklearn.feature_extraction.text import TfidfVectorizer

from pile_app.data.shards import Shards
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document, Segment
from pile_app.media import decode_audio, decode_image
from pile_app.tasks.embed import Embedder
from pile_app.tasks.retrieval import Embeddings, group_of, retrieval_metrics
from pile_app.training.load import load_run

NEIGHBOURS, SAMPLE_RATE, SIDE, PARTS, BANDS = 5, 8000, 8, 8, 40
COLUMNS = ("recall_1", "recall_5", "recall_10", "median_rank", "mrr", "queries", "chance_5")
BAR = 5.0  # times chance, at 5


def has(document: Document, modality: int) -> bool:
    return any(segment.modality == modality for segment in document.segments)


def find(document: Document, modality: int) -> Segment:
    return next(segment for segment in document.segments if segment.modality == modality)


def image_features(segment: Segment) -> np.ndarray:
    return decode_image(segment.file, 3, SIDE, SIDE).astype(np.float32).ravel()


def sound_features(segment: Segment) -> np.ndarray:
    waveform = torch.from_numpy(decode_audio(segment.file, SAMPLE_RATE))
    mel = torchaudio.functional.melscale_fbanks(129, 50.0, 4000.0, BANDS, SAMPLE_RATE)
    spectrum = torch.stft(waveform, 256, 80, window=torch.hann_window(256), return_complex=True).abs().square()
    parts = torch.nn.functional.adaptive_avg_pool1d((spectrum.T @ mel + 1e-6).log().T[None], PARTS)
    return np.append(parts.flatten().numpy(), np.log(len(waveform)))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def embeddings(rows: np.ndarray, documents: Sequence[Document]) -> Embeddings:
    labels = torch.tensor([group_of(document) for document in documents])
    return Embeddings(torch.from_numpy(unit(rows).astype(np.float32)), labels, torch.zeros(len(labels)))


def mean_of_nearest(similarity: np.ndarray, features: np.ndarray) -> np.ndarray:
    return features[np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]].mean(1)


def measure_baselines(train: Sequence[Document], test: Sequence[Document]) -> dict[str, dict[str, float]]:
    captions, images, sounds = {}, defaultdict(list), defaultdict(list)
    for document in train:
        stamp, _, variant = document.key.rpartition("-")
        captions[stamp] = str(document.meta["concept"])
        images[stamp].append(image_features(find(document, IMAGE)))
        if has(document, AUDIO) and int(variant) % 4 != 3:  # else it may be another sound than the caption
            sounds[stamp].append(sound_features(find(document, AUDIO)))
    stamps = [stamp for stamp in captions if sounds[stamp]]
    known = {kind: np.stack([np.mean(of[stamp], 0) for stamp in stamps]) for kind, of in ((IMAGE, images), (AUDIO, sounds))}
    scale = {kind: (rows.mean(0), rows.std(0) + 1e-3) for kind, rows in known.items()}
    known = {kind: (rows - scale[kind][0]) / scale[kind][1] for kind, rows in known.items()}

    spoken = [document for document in test if has(document, AUDIO)]
    asked = {kind: (np.stack([extract(find(document, kind)) for document in documents]) - scale[kind][0]) / scale[kind][1]
             for kind, extract, documents in ((IMAGE, image_features, test), (AUDIO, sound_features, spoken))}  # fmt: skip
    words = TfidfVectorizer().fit([captions[stamp] for stamp in stamps])
    queries = words.transform([find(document, TEXT).text for document in test])
    similarity = (queries @ words.transform([captions[stamp] for stamp in stamps]).T).toarray()
    of_captions = embeddings(mean_of_nearest(similarity, known[IMAGE]), test)
    of_images = embeddings(mean_of_nearest(unit(asked[IMAGE]) @ unit(known[IMAGE]).T, known[AUDIO]), test)
    return {
        "text_to_image": retrieval_metrics(of_captions, embeddings(asked[IMAGE], test)),
        "image_to_audio": retrieval_metrics(of_images, embeddings(asked[AUDIO], spoken)),
    }


def measure_model(run: Path, test: Sequence[Document]) -> dict[str, dict[str, float]]:
    module, data, _ = load_run(run)
    embedder, found = Embedder.of_run(run, module, data.context), {}
    for modality in range(len(MODALITIES)):
        documents = [document for document in test if has(document, modality)]
        vectors, bad = embedder.segments([find(document, modality) for document in documents])
        assert not bad, bad
        found[modality] = embeddings(vectors, documents)
    return {
        f"{MODALITIES[query]}_to_{MODALITIES[target]}": retrieval_metrics(found[query], found[target])
        for query, target in permutations(found, 2)
    }


def train(run: Path) -> None:
    base = run.parent / "tuxpaint"
    adapted = ["--config", str(base / "config.yaml"), "--config", "conf/tasks/retrieval.yaml", "--name", run.name]
    for folder, words in (
        (base, ["--config", "conf/tasks/tuxpaint.yaml"]),
        (run, [*adapted, "--model.start_from", str(base), "--model.backbone.init_args.dropout", "0"]),
    ):
        if not (folder / "summary.json").exists():
            runs = ["--runs", str(run.parent), "--wandb", "null"]
            subprocess.run([sys.executable, "train.py", *words, *runs], check=True)


def main(run: Path = Path("runs/retrieval"), shards: Path = Path("data/tuxpaint/shards"), baselines_only: bool = False) -> bool:
    """baselines_only: train and load no model."""
    if not baselines_only:
        train(run)
    test = list(Shards(f"{shards}/test-*.tar"))
    figures = {"baseline": measure_baselines(list(Shards(f"{shards}/train-*.tar")), test)}
    if not baselines_only:
        figures["Pile"] = measure_model(run, test)
    times = {(system, way): values["recall_5"] / values["chance_5"]
             for system, ways in figures.items() for way, values in ways.items()}  # fmt: skip
    rows = [(system, way, *(f"{figures[system][way][name]:.3g}" for name in COLUMNS), f"{factor:.1f}")
            for (system, way), factor in times.items()]  # fmt: skip
    table(["", "", "recall@1", "@5", "@10", "median rank", "MRR", "queries", "chance @5", "x chance"], rows)
    return baselines_only or all(times["Pile", way] >= BAR for way in ("text_to_image", "image_to_audio"))


if __name__ == "__main__":
    command(main, __doc__)
