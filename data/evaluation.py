"""The demos' evaluation: does the model name images and sounds, and draw and say what it is told?

Labelled media (documents of one image or sound and its name, or its names in several languages) are split into training and
held-out shards. The judges, classifiers of pixels and of log-mel frames, are trained on real media only. Every generative
figure has two references: the judge on real held-out media, and on the codec's reconstruction of them, which bounds the model.
"""

from __future__ import annotations

import lzma
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.judges import MANY, Judge, Labelled, audio_features, image_features
from pile_app.data.assembly import assemble, whole
from pile_app.data.sources import SourceData
from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document, Segment
from pile_app.media import decode_audio, decode_image
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate, plain, segment_length
from pile_app.model.score import score_choices
from pile_app.training.callbacks import write_samples
from pile_app.training.module import PileModule
from pile_app.training.wandb_run import log_samples

BEAM = 24  # of beam search over names
PHASES = 300  # sounds whose phases Griffin-Lim estimates, 32 iterations each
SHOWN = 10  # examples of each kind that the report shows


class EvaluateCrossModal(Callback):
    """The final evaluation of a run on labelled media; its figures go to `summary.json`, examples to `samples/evaluation/`.

    Args:
        train: shards of labelled training media, for the judges.
        heldout: shards of labelled held-out media.
        unseen: shards of labelled media whose labels never occur in training; null: none. Their figures begin with `unseen_`.
        text_source: source whose held-out text is also compressed by `xz -9e` and `zstd -19`; null, or a source without
            validation: none.
        draws: media generated for each kind of request.
        reads: media that the model names, repeated if there are fewer; null: each once.
        separator: between the language of a name, which is part of the prompt, and the rest of it, which is the answer: ":" in
            "fr: chat" (and in its tokens "fr", ":", " chat"). "fr" alone asks for speech. Empty: the answer is the whole name.
        prior: weight of the unconditional likelihood that is subtracted in ranking (`score_choices`): figures `..._raised_...`.
        sampling: of generated media (names are always decoded greedily).
    """

    def __init__(
        self,
        train: str,
        heldout: str,
        unseen: str | None = None,
        text_source: str | None = None,
        draws: int = 200,
        reads: int | None = None,
        separator: str = "",
        prior: float = 1.0,
        sampling: Sampling = Sampling(guidance=3.0, max_seconds=1.5),  # noqa: B008 (frozen)
    ) -> None:
        self.train = train
        self.heldout = heldout
        self.unseen = unseen
        self.text_source = text_source
        self.draws = draws
        self.reads = reads
        self.separator = separator
        self.prior = prior
        self.sampling = sampling
        self._examples: list[tuple[str, Document, Segment, Segment | None]] = []
        self._choices: dict[str, list[str]] = {}  # prompt ("fr:") -> the names to choose from

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return all figures by their names in `summary.json`."""
        assert isinstance(pl_module, PileModule)
        model = pl_module.model
        self._examples = []
        figures: dict[str, Any] = {}
        if not self._is_of(getattr(trainer, "datamodule", None)):
            print(f"no evaluation on {self.heldout}: the run was trained on other data", file=sys.stderr)
            return {}
        train = self._load(model, self.train)
        sets = {"": self._load(model, self.heldout)}
        if self.unseen is not None:
            sets["unseen_"] = self._load(model, self.unseen)
        self._choices = self._choices_of(media for loaded in sets.values() for media in loaded.values())
        judges = {}
        for modality, real in train.items():
            judges[modality] = Judge(
                image_features if modality == IMAGE else audio_features(model.vocabulary.sample_rate), real
            )
        for prefix, loaded in sets.items():
            for modality, media in loaded.items():
                name, judge = MODALITIES[modality], judges[modality]
                found = self._codec_figures(model, modality, judge, media)
                found |= self._read(model, modality, media, prefix)
                found |= judge.figures(f"text_to_{name}", *self._make(model, modality, media, prefix))
                if modality == IMAGE and AUDIO in judges:
                    found |= self._image_to_audio(model, judges[AUDIO], media, sets[""][AUDIO])
                figures |= {prefix + key: value for key, value in found.items()}
        figures |= self._conditioning_gains(model, sets[""])
        if self.text_source and self.text_source in trainer.datamodule.validation_names:  # type: ignore[attr-defined]
            figures |= self._text_figures(trainer, model)
        elif self.text_source:
            print(f"no source {self.text_source!r} is validated on: no comparison with xz and zstd", file=sys.stderr)
        folder = Path(trainer.default_root_dir) / "samples" / "evaluation"
        write_samples(folder, self._examples, model)
        log_samples(trainer, folder, trainer.global_step)
        return figures

    def _is_of(self, data: Any) -> bool:
        """Tell whether training reads a shard in the folder of the labelled media, as the demos do."""
        patterns = [source.train for source in data.sources.values()] if data else [self.train]
        given = [one for many in patterns for one in ([many] if isinstance(many, str) else many)]
        return Path(self.train).parent in {Path(one).parent for one in given}

    def _load(self, model: FusedLanguageModel, pattern: str) -> dict[int, Labelled]:
        source = SourceData("labelled", pattern, model.vocabulary, model.tokenizer, context=1 << 20)
        media: dict[int, Labelled] = {}
        for number in range(len(source)):
            document = source.document(number)
            medium, *names = document.segments
            kept = media.setdefault(medium.modality, Labelled())
            kept.segments.append(medium)
            kept.arrays.append(decoded(model, medium))
            kept.names.append(tuple(plain(model, name).text for name in names))
            kept.labels.append(document.meta.get("label", kept.names[-1][0]))
        return media

    def _asked(self, name: str) -> tuple[str, str]:
        """Split a name into its part in the prompt and the answer: "fr: chat" -> "fr:", " chat"."""
        head, separator, answer = name.partition(self.separator) if self.separator else ("", "", name)
        return head + separator, answer

    def _choices_of(self, media: Iterable[Labelled]) -> dict[str, list[str]]:
        names = {name for one in media for several in one.names for name in several}
        choices: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            asked, answer = self._asked(name)
            choices[asked].append(answer)
        return choices

    def _question(self, medium: Segment, asked: str) -> Document:
        return Document((medium, Segment(asked)) if asked else (medium,))

    def _codec_figures(self, model: FusedLanguageModel, modality: int, judge: Judge, heldout: Labelled) -> dict[str, Any]:
        """Return the judge's figures on real media and on reconstructions, the codec's quality, and its code use."""
        name = MODALITIES[modality]
        codes, again, figures = reconstruct(model, modality, heldout.arrays)
        figures |= judge.figures(f"{name}_judge", heldout.arrays, heldout.labels)
        figures |= judge.figures(f"{name}_codec", again, heldout.labels)
        figures[f"{name}_code_use"] = len(codes.unique()) / model.codecs[modality].quantizer.codes
        if modality == AUDIO:
            phases_found = griffin_lim(model, heldout.arrays[:PHASES])
            figures["audio_codec_accuracy_griffin_lim"] = judge.accuracy(phases_found, heldout.labels[:PHASES])
        return figures

    def _read(self, model: FusedLanguageModel, modality: int, media: Labelled, prefix: str) -> dict[str, float]:
        """Medium -> name: return the fraction of correct names, with the languages in turn; with many names also the fraction
        among the five most likely of the language."""
        count = len(media.segments)
        chosen = spread(count, self.reads or count)
        turns = [turn // count + turn for turn in range(len(chosen))]  # another language when a medium comes once more
        names = [media.names[n][turn % len(media.names[n])] for turn, n in zip(turns, chosen, strict=True)]
        asked, wanted = zip(*map(self._asked, names), strict=True)
        prompts = [self._question(media.segments[n], question) for n, question in zip(chosen, asked, strict=True)]
        answers = generate(model, prompts, TEXT, Sampling(temperature=0, max_text=2 * max(map(len, wanted))))
        title = f"{prefix.replace('_', ' ')}{MODALITIES[modality]} → text"
        for prompt, answer, name in first_of_each(prompts, answers, wanted):
            self._examples.append((title, prompt, answer, Segment(name)))
        is_right = np.array([answer.text == name for answer, name in zip(answers, wanted, strict=True)])
        figures: dict[str, float] = {}
        found = {"accuracy": is_right}
        if max(map(len, self._choices.values())) > MANY:
            ranks = self._ranks(model, prompts, asked, wanted, 0.0)
            raised = self._ranks(model, prompts, asked, wanted, self.prior)
            found |= {"top5": ranks < 5, "raised_accuracy": raised == 0, "raised_top5": raised < 5}
        questions = sorted(set(asked)) if self.separator and len(found) > 1 else []
        for name, hits in found.items():
            figures[f"{MODALITIES[modality]}_to_text_{name}"] = float(hits.mean())
            for question in questions:
                key = f"{MODALITIES[modality]}_to_text_{name}_{question.removesuffix(self.separator)}"
                figures[key] = float(hits[np.array(asked) == question].mean())
        return figures

    def _ranks(
        self, model: FusedLanguageModel, prompts: Sequence[Document], asked: Sequence[str], wanted: Sequence[str], prior: float
    ) -> np.ndarray:
        """Return (N,) ranks of the right name among all names of its language, from 0; 5 if it is not among the first five."""
        ranks = np.zeros(len(wanted), np.int64)
        for question, choices in self._choices.items():
            rows = [row for row, one in enumerate(asked) if one == question]
            names_of = [Segment(name) for name in choices]
            scores = score_choices(model, [prompts[row] for row in rows], names_of, prior=prior, beam=BEAM)
            for row, best in zip(rows, scores.topk(min(5, len(choices))).indices.tolist(), strict=True):
                names = [choices[index] for index in best]
                ranks[row] = names.index(wanted[row]) if wanted[row] in names else 5
        return ranks

    def _make(
        self, model: FusedLanguageModel, modality: int, media: Labelled, prefix: str
    ) -> tuple[list[np.ndarray], list[str]]:
        """Name -> medium, for names of all labels in turn: return the generated media and their labels."""
        first = {label: number for number, label in reversed(list(enumerate(media.labels)))}
        labels = [sorted(first)[index] for index in spread(len(first), self.draws)]
        several = [media.names[first[label]] for label in labels]
        prompts = [Document((Segment(names[turn % len(names)]),)) for turn, names in enumerate(several)]
        answers = generate(model, prompts, modality, self.sampling)
        title = f"{prefix.replace('_', ' ')}text → {MODALITIES[modality]}"
        references = [media.segments[first[label]] for label in labels]
        for prompt, answer, reference in list(zip(prompts, answers, references, strict=True))[:SHOWN]:
            self._examples.append((title, prompt, answer, reference))
        return [decoded(model, answer) for answer in answers], labels

    def _image_to_audio(self, model: FusedLanguageModel, judge: Judge, images: Labelled, sounds: Labelled) -> dict[str, float]:
        """Image -> its spoken name, with the languages in turn: return the judge's figures."""
        said = {name: number for number, (name, *_) in reversed(list(enumerate(sounds.names)))}
        pairs = [(n, [name for name in names if name in said]) for n, names in enumerate(images.names)]
        pairs = [(n, names) for n, names in pairs if names][: self.draws]
        if not pairs:
            return {}
        names = [several[turn % len(several)] for turn, (_, several) in enumerate(pairs)]
        asked = [name.partition(self.separator)[0] if self.separator else "" for name in names]
        prompts = [self._question(images.segments[n], one) for (n, _), one in zip(pairs, asked, strict=True)]
        answers = generate(model, prompts, AUDIO, self.sampling)
        for prompt, answer, name in first_of_each(prompts, answers, names):
            self._examples.append(("image → audio", prompt, answer, sounds.segments[said[name]]))
        labels = [sounds.labels[said[name]] for name in names]
        return judge.figures("image_to_audio", [decoded(model, answer) for answer in answers], labels)

    def _conditioning_gains(self, model: FusedLanguageModel, heldout: dict[int, Labelled]) -> dict[str, float]:
        """Return the nats per token saved by the right condition over another document's; near 0, the condition is ignored."""
        gains: dict[int, list[float]] = {}
        for modality, media in heldout.items():
            names = [Segment(several[0]) for several in media.names]
            pairs = list(zip(media.segments, names, strict=True))[: self.draws]
            for reading in (True, False):
                ordered = [(medium, name) if reading else (name, medium) for medium, name in pairs]
                # A shift by a prime, and sources sorted by label or not, hardly any document keeps its own name.
                shuffled = [(ordered[(i + 37) % len(ordered)][0], answer) for i, (_, answer) in enumerate(ordered)]
                gain = answer_loss(model, shuffled) - answer_loss(model, ordered)
                gains.setdefault(TEXT if reading else modality, []).append(gain)
        return {f"{MODALITIES[modality]}_conditioning_gain": float(np.mean(values)) for modality, values in gains.items()}

    def _text_figures(self, trainer: Trainer, model: FusedLanguageModel) -> dict[str, float]:
        """Return bits per byte of the source's held-out text: the model's, and those of two compressors on the same bytes."""
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


def spread(length: int, count: int) -> list[int]:
    """Return `count` evenly spread indices below `length`, each several times if `count` is larger."""
    return [n * length // count if count < length else n % length for n in range(count)]


def first_of_each(
    prompts: Sequence[Document], answers: Sequence[Segment], names: Sequence[str]
) -> list[tuple[Document, Segment, str]]:
    """Return the first example of each name, so that the report shows many names."""
    firsts = {name: number for number, name in reversed(list(enumerate(names)))}
    return [(prompts[n], answers[n], names[n]) for n in sorted(firsts.values())[:SHOWN]]


def decoded(model: FusedLanguageModel, segment: Segment) -> np.ndarray:
    """Return the codec's input for a medium, or its output for codes: uint8 (C, H, W) pixels or float32 samples."""
    segment = plain(model, segment)
    if segment.modality == IMAGE:
        return decode_image(segment.file, *model.vocabulary.image_shape)
    try:
        return decode_audio(segment.file, model.vocabulary.sample_rate)
    except ValueError:  # an untrained model may well say nothing at all
        return np.zeros(model.vocabulary.samples_per_token, np.float32)


def batch_audio(model: FusedLanguageModel, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return (A, samples_per_token) samples of each code, sound after sound, and (M,) tokens of each sound."""
    per_token, device = model.vocabulary.samples_per_token, model.token_bytes.device
    padded = [F.pad(torch.as_tensor(one), (0, -len(one) % per_token)).view(-1, per_token) for one in waveforms]
    return torch.cat(padded).to(device), torch.tensor([len(one) for one in padded], device=device)


def reconstruct(
    model: FusedLanguageModel, modality: int, arrays: Sequence[np.ndarray]
) -> tuple[Tensor, list[np.ndarray], dict[str, float]]:
    """Return (codes, reconstructions, quality): PSNR in dB over all pixels, or the mean log-mel error in nats."""
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
    again = codec.decode(codes, tokens)
    apart = again.cpu().split(tokens.tolist())
    waveforms = [one.flatten().numpy()[: len(array)] for one, array in zip(apart, arrays, strict=True)]
    return codes, waveforms, {"audio_log_mel_distance": float(codec.log_mel_distances(audio, again, tokens).mean())}


def griffin_lim(model: FusedLanguageModel, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Decode the codec's magnitudes with phases by Griffin and Lim (1984), to compare with the codec's own phases."""
    import torchaudio

    codec = model.audio_codec
    assert codec is not None
    audio, tokens = batch_audio(model, arrays)
    magnitudes = codec.decode_magnitudes(codec.encode(audio, tokens), tokens).cpu()
    find_phases = torchaudio.transforms.GriffinLim(codec.config.window, hop_length=codec.config.hop, power=1, rand_init=False)
    return [find_phases(one.flatten(0, 1).T).numpy() for one in magnitudes.split(tokens.tolist())]


@torch.no_grad()
def answer_loss(model: FusedLanguageModel, pairs: Sequence[tuple[Segment, Segment]]) -> float:
    """Return the mean nats per token of the second segments, given the first."""
    total, count = 0.0, 0
    model.eval()
    for condition, answer in pairs:
        document = Document((Segment(condition.data, condition.extension, loss=False), replace(answer, loss=True)))
        length = 2 + sum(segment_length(model, segment) for segment in document.segments)
        batch = assemble([[whole(document, length)]], model.vocabulary, model.tokenizer, length)
        losses = model(batch.to(model.token_bytes.device))
        total += float(losses[answer.modality].total)
        count += len(losses[answer.modality].each)
    return total / count
