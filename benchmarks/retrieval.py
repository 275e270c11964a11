"""Retrieval on concepts never seen: caption -> image, image -> spoken caption and the others, on the stamps of Tux Paint.

    python benchmarks/retrieval.py [--run runs/retrieval] [--shards data/tuxpaint/shards] [--output retrieval.json]

trains what is not there yet (conf/tasks/tuxpaint.yaml, then conf/tasks/retrieval.yaml), embeds the test documents with the
checkpoint that validation chose, and ranks for each test segment of one modality all of another.
Captions are English, spoken captions French. A right answer is any segment of a stamp with the same English caption; chance is
the recall at 5 of a random order, by exact combinatorics.

Baselines know the same training stamps, and nothing is learned but nearest neighbours:

* caption -> image, bag of words: the `NEIGHBOURS` training stamps with the nearest captions (English; TF-IDF of words, cosine);
  the mean of their images, 8 x 8 pixels, standardized; test images by cosine to it.
* image -> spoken caption: the `NEIGHBOURS` training stamps with the nearest images, as above; the mean of their spoken captions
  (log-mel energies of 40 bands in 8 equal parts of the time, and log duration, standardized); test sounds by cosine to it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torchaudio
from sklearn.feature_extraction.text import TfidfVectorizer

from pile_app.data.shards import Shards
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document, Segment
from pile_app.media import decode_audio, decode_image
from pile_app.tasks.embed import Embedder
from pile_app.tasks.retrieval import Embeddings, group_of, retrieval_metrics

NEIGHBOURS = 5
SAMPLE_RATE = 8000
SIDE = 8  # pixels of the baseline's images
PARTS, BANDS = 8, 40
COLUMNS = ("recall_1", "recall_5", "recall_10", "median_rank", "mrr", "queries", "chance_5")
BAR = 5.0  # times chance, at 5


def read(pattern: str) -> list[Document]:
    return list(Shards(pattern))


def first(document: Document, modality: int) -> Segment | None:
    return next((segment for segment in document.segments if segment.modality == modality), None)


def image_features(file: bytes) -> np.ndarray:
    return decode_image(file, 3, SIDE, SIDE).astype(np.float32).ravel()


def sound_features(file: bytes) -> np.ndarray:
    waveform = torch.from_numpy(decode_audio(file, SAMPLE_RATE))
    mel = torchaudio.functional.melscale_fbanks(129, 50.0, 4000.0, BANDS, SAMPLE_RATE)
    spectrum = torch.stft(waveform, 256, 80, window=torch.hann_window(256), return_complex=True).abs().square()
    parts = torch.nn.functional.adaptive_avg_pool1d((spectrum.T @ mel + 1e-6).log().T[None], PARTS)
    return np.append(parts.flatten().numpy(), np.log(len(waveform)))


class Baselines:
    """Of training documents: for each stamp its English caption, the mean features of its images and of its French speech."""

    def __init__(self, documents: Sequence[Document]) -> None:
        images, sounds = defaultdict(list), defaultdict(list)
        captions = {}
        for document in documents:
            stamp, _, variant = document.key.rpartition("-")
            captions[stamp] = str(document.meta["concept"])
            images[stamp].append(image_features(first(document, IMAGE).file))
            sound = first(document, AUDIO)
            if sound is not None and int(variant) % 4 != 3:  # else it may be another sound than the caption
                sounds[stamp].append(sound_features(sound.file))
        self.stamps = [stamp for stamp in captions if sounds[stamp]]
        self.image_scale, self.images = self._standard([np.mean(images[stamp], 0) for stamp in self.stamps])
        self.sound_scale, self.sounds = self._standard([np.mean(sounds[stamp], 0) for stamp in self.stamps])
        self.words = TfidfVectorizer().fit([captions[stamp] for stamp in self.stamps])
        self.captions = self.words.transform([captions[stamp] for stamp in self.stamps])

    @staticmethod
    def _standard(features: list[np.ndarray]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        rows = np.stack(features)
        scale = rows.mean(0), rows.std(0) + 1e-3
        return scale, (rows - scale[0]) / scale[1]

    def images_of_captions(self, captions: Sequence[str]) -> np.ndarray:
        return self._mean_of_nearest((self.words.transform(captions) @ self.captions.T).toarray(), self.images)

    def sounds_of_images(self, images: np.ndarray) -> np.ndarray:
        return self._mean_of_nearest(unit(images) @ unit(self.images).T, self.sounds)

    @staticmethod
    def _mean_of_nearest(similarity: np.ndarray, features: np.ndarray) -> np.ndarray:
        return features[np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]].mean(1)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def embeddings(rows: np.ndarray, documents: Sequence[Document]) -> Embeddings:
    labels = torch.tensor([group_of(document) for document in documents])
    return Embeddings(torch.from_numpy(unit(rows).astype(np.float32)), labels, torch.zeros(len(labels)))


def measure_baselines(train: Sequence[Document], test: Sequence[Document]) -> dict[str, dict[str, float]]:
    baselines = Baselines(train)
    spoken = [document for document in test if first(document, AUDIO)]

    def features(documents: Sequence[Document], modality: int) -> np.ndarray:
        extract, scale = {
            IMAGE: (image_features, baselines.image_scale),
            AUDIO: (sound_features, baselines.sound_scale),
        }[modality]
        return (np.stack([extract(first(document, modality).file) for document in documents]) - scale[0]) / scale[1]

    captions = baselines.images_of_captions([first(document, TEXT).text for document in test])
    images = features(test, IMAGE)
    sounds = baselines.sounds_of_images(images)
    return {
        "text_to_image": retrieval_metrics(embeddings(captions, test), embeddings(images, test)),
        "image_to_audio": retrieval_metrics(embeddings(sounds, test), embeddings(features(spoken, AUDIO), spoken)),
    }


def measure_model(run: Path, test: Sequence[Document]) -> dict[str, dict[str, float]]:
    embedder = Embedder.of_run(run)
    found = {}
    for modality in range(len(MODALITIES)):
        documents = [document for document in test if first(document, modality)]
        vectors, bad = embedder.segments([first(document, modality) for document in documents])
        assert not bad, bad
        found[modality] = embeddings(vectors, documents)
    return {
        f"{MODALITIES[query]}_to_{MODALITIES[target]}": retrieval_metrics(found[query], found[target])
        for query, target in permutations(found, 2)
    }


def train(run: Path) -> None:
    runs = ["--runs", str(run.parent), "--wandb", "null"]
    first_run = run.parent / "tuxpaint"
    steps = (
        (first_run, ["--config", "conf/tasks/tuxpaint.yaml"]),
        (run, ["--config", str(first_run / "config.yaml"), "--config", "conf/tasks/retrieval.yaml", "--name", run.name]),
    )
    for folder, arguments in steps:
        if not (folder / "summary.json").exists():
            start = ["--model.start_from", str(first_run), "--model.backbone.init_args.dropout", "0"] if folder == run else []
            subprocess.run([sys.executable, "train.py", *arguments, *start, *runs], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/retrieval"), help="default: %(default)s")
    parser.add_argument("--shards", type=Path, default=Path("data/tuxpaint/shards"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("retrieval.json"), help="default: %(default)s")
    parser.add_argument("--baselines-only", action="store_true", help="train and load nothing")
    options = parser.parse_args()
    if not options.baselines_only:
        train(options.run)
    test = read(f"{options.shards}/test-*.tar")
    figures = {"bag of words, nearest neighbours": measure_baselines(read(f"{options.shards}/train-*.tar"), test)}
    if not options.baselines_only:
        figures["Pile"] = measure_model(options.run, test)
    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print("| | | recall@1 | @5 | @10 | median rank | MRR | queries | chance @5 | x chance |\n" + "|---" * 10 + "|")
    for system, directions in figures.items():
        for direction, values in directions.items():
            times = values["recall_5"] / values["chance_5"]
            shown = " | ".join(f"{values[name]:.3g}" for name in COLUMNS)
            print(f"| {system} | {direction.replace('_', ' ')} | {shown} | {times:.1f} |")
    if options.baselines_only:
        return 0
    pile = figures["Pile"]
    return int(any(pile[way]["recall_5"] < BAR * pile[way]["chance_5"] for way in ("text_to_image", "image_to_audio")))


if __name__ == "__main__":
    sys.exit(main())
