"""Does the model name what it sees and hears, and draw and say what it is told? Measured by judges that never saw its output.

Labelled media (documents of one image or sound and its name) are split into training and held-out shards. The judges, a
support vector machine on pixels and one on log-mel frames, are trained on real training media only. Every generative figure
stands beside two others: the judge on real held-out media, and on the codec's reconstruction of them, which is the ceiling of
the model.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pile_app.data.assembly import assemble, whole
from pile_app.data.sources import SourceData
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document, Segment, decode_audio, decode_image
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate, plain, segment_length
from pile_app.training.callbacks import log_samples_to_wandb, plain_example, write_samples
from pile_app.training.module import PileModule

SHOWN = 10  # examples of each kind that the report shows


@dataclass
class Labelled:
    """Media of one modality: segments, decoded arrays, and the name of each."""

    segments: list[Segment]
    arrays: list[np.ndarray]
    names: list[str]


class Judge:
    """A support vector machine from features of a medium to its name.

    Args:
        features: decoded medium -> (F,) float.
        real: what it is trained on.

    Raises:
        ImportError: scikit-learn is missing.
    """

    def __init__(self, features: Callable[[np.ndarray], np.ndarray], real: Labelled) -> None:
        try:
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
            from sklearn.svm import SVC
        except ImportError as error:
            raise ImportError("the judges need scikit-learn: `uv sync --extra demo` or `pip install scikit-learn`") from error
        self.features = features
        self.classifier = make_pipeline(StandardScaler(with_std=False), SVC(C=10.0))
        self.classifier.fit([features(array) for array in real.arrays], real.names)

    def accuracy(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> float:
        """Share of media that it calls by their name."""
        return float(self.classifier.score([self.features(array) for array in arrays], list(names)))


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


class EvaluateCrossModal(Callback):
    """The final evaluation of a run on labelled media; its figures go to `summary.json`, examples to `samples/evaluation/`.

    Args:
        train: shards of labelled training media, for the judges.
        heldout: shards of labelled held-out media.
        text_source: source whose held-out text is also given to `xz -9e` and `zstd -19`; null: none.
        draws: media generated for each kind of request.
        sampling: how they are drawn (names are always read greedily).
    """

    def __init__(
        self,
        train: str,
        heldout: str,
        text_source: str | None = None,
        draws: int = 200,
        sampling: Sampling = Sampling(guidance=3.0, max_seconds=1.5),  # noqa: B008 (frozen)
    ) -> None:
        self.train = train
        self.heldout = heldout
        self.text_source = text_source
        self.draws = draws
        self.sampling = sampling
        self._examples: list[tuple[str, Document, Segment, Segment | None]] = []

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """All figures, by their names in `summary.json`."""
        assert isinstance(pl_module, PileModule)
        model = pl_module.model
        self._examples = []
        figures: dict[str, Any] = {}
        train, heldout = self._load(model, self.train), self._load(model, self.heldout)
        judges = {}
        for modality, real in train.items():
            features = image_features if modality == IMAGE else audio_features(model.vocabulary.sample_rate)
            judges[modality] = Judge(features, real)
            figures |= self._codec_figures(model, modality, judges[modality], heldout[modality])
        for modality, media in heldout.items():
            figures[f"{MODALITIES[modality]}_to_text_accuracy"] = self._read(model, modality, media)
            names = self._names(media)
            picked = [self._picked(media, name) for name in names]
            figures[f"text_to_{MODALITIES[modality]}_accuracy"] = self._make(model, modality, judges[modality], names, picked)
        if IMAGE in heldout and AUDIO in heldout:
            figures["image_to_audio_accuracy"] = self._image_to_audio(model, judges[AUDIO], heldout[IMAGE], heldout[AUDIO])
        figures |= self._conditioning_gains(model, heldout)
        if self.text_source is not None:
            figures |= self._text_figures(trainer, model)
        folder = Path(trainer.default_root_dir) / "samples" / "evaluation"
        write_samples(folder, [plain_example(model, *example) for example in self._examples])
        log_samples_to_wandb(trainer, folder)
        return figures

    def _load(self, model: FusedLanguageModel, pattern: str) -> dict[int, Labelled]:
        source = SourceData("labelled", pattern, model.vocabulary, model.tokenizer, context=1 << 20)
        media: dict[int, Labelled] = {}
        for number in range(len(source)):
            medium, name = source.document(number).segments
            kept = media.setdefault(medium.modality, Labelled([], [], []))
            kept.segments.append(medium)
            kept.arrays.append(decoded(model, medium))
            kept.names.append(plain(model, name).text)
        return media

    def _names(self, media: Labelled) -> list[str]:
        """As many names as draws, each as often as the others."""
        names = sorted(set(media.names))
        return [names[i % len(names)] for i in range(self.draws)]

    @staticmethod
    def _picked(media: Labelled, name: str) -> Segment:
        return media.segments[media.names.index(name)]

    def _codec_figures(self, model: FusedLanguageModel, modality: int, judge: Judge, heldout: Labelled) -> dict[str, Any]:
        """The judge on real media and on reconstructions; quality of the codec; how much of its code book it uses."""
        name = MODALITIES[modality]
        codes, again, figures = reconstruct(model, modality, heldout.arrays)
        quantizer = model.codecs[modality].quantizer
        return figures | {
            f"{name}_judge_accuracy": judge.accuracy(heldout.arrays, heldout.names),
            f"{name}_codec_accuracy": judge.accuracy(again, heldout.names),
            f"{name}_code_use": len(codes.unique()) / quantizer.codes,
        } | ({"audio_codec_accuracy_griffin_lim": judge.accuracy(griffin_lim(model, heldout.arrays), heldout.names)}
             if modality == AUDIO else {})  # fmt: skip

    def _read(self, model: FusedLanguageModel, modality: int, media: Labelled) -> float:
        """Medium -> name: share of names read letter by letter as they should be."""
        prompts = [Document((segment,)) for segment in media.segments]
        answers = generate(model, prompts, TEXT, Sampling(temperature=0, max_text=2 * max(map(len, media.names))))
        for prompt, answer, name in self._spread(prompts, answers, media.names):
            self._examples.append((f"{MODALITIES[modality]} → text", prompt, answer, Segment(name)))
        return float(np.mean([answer.text == name for answer, name in zip(answers, media.names, strict=True)]))

    def _make(
        self, model: FusedLanguageModel, modality: int, judge: Judge, names: list[str], references: list[Segment]
    ) -> float:
        """Name -> medium: share that the judge calls by that name."""
        prompts = [Document((Segment(name),)) for name in names]
        answers = generate(model, prompts, modality, self.sampling)
        for prompt, answer, reference in list(zip(prompts, answers, references, strict=True))[:SHOWN]:
            self._examples.append((f"text → {MODALITIES[modality]}", prompt, answer, reference))
        return judge.accuracy([decoded(model, answer) for answer in answers], names)

    def _image_to_audio(self, model: FusedLanguageModel, judge: Judge, images: Labelled, sounds: Labelled) -> float:
        prompts = [Document((segment,)) for segment in images.segments[: self.draws]]
        names = images.names[: self.draws]
        answers = generate(model, prompts, AUDIO, self.sampling)
        for prompt, answer, name in self._spread(prompts, answers, names):
            self._examples.append(("image → audio", prompt, answer, self._picked(sounds, name)))
        return judge.accuracy([decoded(model, answer) for answer in answers], names)

    @staticmethod
    def _spread(prompts: list[Document], answers: list[Segment], names: list[str]) -> list[tuple[Document, Segment, str]]:
        """The first example of each name, so that the report shows all of them."""
        firsts = {name: number for number, name in reversed(list(enumerate(names)))}
        return [(prompts[n], answers[n], names[n]) for n in sorted(firsts.values())[:SHOWN]]

    def _conditioning_gains(self, model: FusedLanguageModel, heldout: dict[int, Labelled]) -> dict[str, float]:
        """Nats a token that the right condition saves over one of another document: near 0, it is ignored."""
        gains: dict[int, list[float]] = {}
        for modality, media in heldout.items():
            pairs = list(zip(media.segments, [Segment(name) for name in media.names], strict=True))[: self.draws]
            for reading in (True, False):
                ordered = [(medium, name) if reading else (name, medium) for medium, name in pairs]
                # A shift by a prime, and sources sorted by label or not, hardly any document keeps its own name.
                shuffled = [(ordered[(i + 37) % len(ordered)][0], answer) for i, (_, answer) in enumerate(ordered)]
                gain = answer_loss(model, shuffled) - answer_loss(model, ordered)
                gains.setdefault(TEXT if reading else modality, []).append(gain)
        return {f"{MODALITIES[modality]}_conditioning_gain": float(np.mean(values)) for modality, values in gains.items()}

    def _text_figures(self, trainer: Trainer, model: FusedLanguageModel) -> dict[str, float]:
        """Bits a byte of the source's held-out text: the model's, and those of two compressors on the same bytes."""
        import zstandard

        data = trainer.datamodule  # type: ignore[attr-defined]
        source = data.validation_data[data.validation_names.index(self.text_source)]
        segments = (segment for number in range(len(source)) for segment in source.document(number).segments)
        text = "".join(plain(model, segment).text for segment in segments if segment.modality == TEXT).encode()
        compressed = {
            "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
            "zstd": zstandard.ZstdCompressor(level=19).compress(text),
        }
        own = trainer.callback_metrics[f"validation/source/{self.text_source}_bits_per_byte"]
        figures = {f"text_bits_per_byte_{name}": 8 * len(packed) / len(text) for name, packed in compressed.items()}
        return {"text_bits_per_byte": float(own), "text_heldout_bytes": float(len(text)), **figures}


def decoded(model: FusedLanguageModel, segment: Segment) -> np.ndarray:
    """What the codecs see of a medium, or make of its codes: uint8 (C, H, W) pixels or float32 samples."""
    segment = plain(model, segment)
    if segment.modality == IMAGE:
        return decode_image(segment.file, *model.vocabulary.image_shape)
    try:
        return decode_audio(segment.file, model.vocabulary.sample_rate)
    except ValueError:  # an untrained model may well say nothing at all
        return np.zeros(model.vocabulary.samples_per_token, np.float32)


def batch_audio(model: FusedLanguageModel, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(M, S) samples, padded with silence, and (M,) tokens."""
    device = model.token_bytes.device
    rate = model.vocabulary.sample_rate
    tokens = torch.tensor([model.vocabulary.audio_tokens(len(waveform), rate) for waveform in waveforms], device=device)
    audio = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(waveform) for waveform in waveforms], batch_first=True)
    return audio.to(device), tokens


def reconstruct(
    model: FusedLanguageModel, modality: int, arrays: Sequence[np.ndarray]
) -> tuple[Tensor, list[np.ndarray], dict[str, float]]:
    """(codes used, media through the codec, quality): PSNR in dB over all pixels, or the mean log-mel error in nats."""
    if modality == IMAGE:
        assert model.image_codec is not None
        images = torch.from_numpy(np.stack(arrays)).to(model.token_bytes.device)
        codes = model.image_codec.encode(images)
        again = model.image_codec.decode(codes)
        error = ((again.float() - images.float()) / 255).square().mean()
        return codes, list(again.cpu().numpy()), {"image_psnr": -10 * math.log10(max(float(error), 1e-10))}
    codec = model.audio_codec
    assert codec is not None
    audio, tokens = batch_audio(model, arrays)
    codes = codec.encode(audio, tokens)
    inside = torch.arange(codes.size(1), device=codes.device) < tokens[:, None]
    again = codec.decode(codes, tokens)
    padded = torch.nn.functional.pad(audio, (0, again.size(1) - audio.size(1)))
    distance = (codec.log_mel(codec.spectrogram(again)) - codec.log_mel(codec.spectrogram(padded))).abs().mean(-1)
    frames = inside.repeat_interleave(codec.config.frames_per_token, 1)
    waveforms = [w[: len(array)] for w, array in zip(again.cpu().numpy(), arrays, strict=True)]
    return codes[inside], waveforms, {"audio_log_mel_distance": float(distance[frames].mean())}


def griffin_lim(model: FusedLanguageModel, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The codec's magnitudes with phases by Griffin and Lim (1984) instead of its own: the check on those."""
    import torchaudio

    codec = model.audio_codec
    assert codec is not None
    audio, tokens = batch_audio(model, arrays)
    magnitudes = codec.decode_magnitudes(codec.encode(audio, tokens), tokens).cpu()
    find_phases = torchaudio.transforms.GriffinLim(codec.config.window, hop_length=codec.config.hop, power=1, rand_init=False)
    frames = tokens.cpu() * codec.config.frames_per_token
    return [find_phases(one[:n].T).numpy() for one, n in zip(magnitudes, frames.tolist(), strict=True)]


@torch.no_grad()
def answer_loss(model: FusedLanguageModel, pairs: Sequence[tuple[Segment, Segment]]) -> float:
    """Mean nats a token of the second segments, given the first."""
    total, count = 0.0, 0
    model.eval()
    for condition, answer in pairs:
        document = Document((Segment(condition.data, condition.extension, loss=False), answer))
        length = 2 + sum(segment_length(model, segment) for segment in document.segments)
        batch = assemble([[whole(document, length)]], model.vocabulary, model.tokenizer, length)
        losses = model(batch.to(model.token_bytes.device))
        total += float(losses[answer.modality].total)
        count += len(losses[answer.modality].each)
    return total / count
