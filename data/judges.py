"""Judges: classifiers that are trained on real media and label the media that a model generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pile_app.documents import Segment

MANY = 50  # labels: a support vector machine for each two of more of them takes too long
COMPONENTS = 300
SHRINKAGE = 0.02  # of the covariance towards a multiple of the identity


@dataclass
class Labelled:
    """Media of a modality: segments, decoded arrays, the names of each, and its label."""

    segments: list[Segment] = field(default_factory=list)
    arrays: list[np.ndarray] = field(default_factory=list)
    names: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


class Judge:
    """Classify the features of a medium: a support vector machine, or for more than `MANY` labels linear discriminant analysis
    of the principal components, whose common covariance models shifts and rotations.

    Args:
        features: decoded medium -> (F,) float.
        real: media to train it on.

    Raises:
        ImportError: scikit-learn is missing.
    """

    def __init__(self, features: Callable[[np.ndarray], np.ndarray], real: Labelled) -> None:
        try:
            from sklearn.decomposition import PCA
            from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
            from sklearn.svm import SVC
        except ImportError as error:
            raise ImportError("the judges need scikit-learn: `uv sync --extra demo` or `pip install scikit-learn`") from error
        self.features = features
        self.labels = sorted(set(real.labels))
        table = np.stack([features(array) for array in real.arrays])
        steps: tuple[Any, ...] = (StandardScaler(with_std=False), SVC(C=10.0))
        if len(self.labels) > MANY:
            components = PCA(min(COMPONENTS, *table.shape), svd_solver="randomized", random_state=0)
            steps = (components, LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE))
        self.classifier = make_pipeline(*steps)
        self.classifier.fit(table, real.labels)

    def accuracy(self, arrays: Sequence[np.ndarray], labels: Sequence[str]) -> float:
        """Return the fraction of media that the judge labels correctly."""
        return float(self.classifier.score([self.features(array) for array in arrays], list(labels)))

    def best(self, arrays: Sequence[np.ndarray], count: int) -> list[list[str]]:
        """Return the most likely labels of each medium, best first. Needs more than two labels."""
        scores = self.classifier.decision_function([self.features(array) for array in arrays])
        order = np.argsort(-scores, axis=1)[:, :count]
        return [[str(self.classifier.classes_[place]) for place in row] for row in order]

    def figures(self, name: str, arrays: Sequence[np.ndarray], labels: Sequence[str]) -> dict[str, float]:
        """Return `<name>_accuracy`, and with many labels `<name>_top5`."""
        figures = {f"{name}_accuracy": self.accuracy(arrays, labels)}
        if len(self.labels) > MANY:
            found = self.best(arrays, 5)
            figures[f"{name}_top5"] = float(np.mean([label in five for label, five in zip(labels, found, strict=True)]))
        return figures


def image_features(pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels of any shape -> (pixels,) in [0, 1]."""
    return pixels.reshape(-1) / 255.0


def audio_features(sample_rate: int) -> Callable[[np.ndarray], np.ndarray]:
    """Samples -> log-mel spectrogram, 40 bands, squeezed in time to 32 frames: (1280,) float."""
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(sample_rate, n_fft=sample_rate // 31, hop_length=sample_rate // 100, n_mels=40)

    def features(waveform: np.ndarray) -> np.ndarray:
        log_mel = (mel(torch.as_tensor(waveform)) + 1e-4).log()  # (40, frames)
        return torch.nn.functional.interpolate(log_mel[None], 32, mode="linear")[0].flatten().numpy()

    return features
