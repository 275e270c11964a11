"""Compare Pile's audio codec at 800 bit/s with Codec2 and Opus at 1,200 to 6,000, on voices never heard, by PESQ and STOI.

    python benchmarks/audio_codec.py --train '[S/es_MX_f_Allison, S/fr_CA_f_June, S/it_IT_m_Carlo, fsdd/recordings]' \
        --test S/ru_RU_f_IvrvoiceRU --seconds 600                  # 8 kHz
    python benchmarks/audio_codec.py --rate 16000 --seconds 600    # voices of espeak-ng, every eighth is held out

S is usr/share/asterisk/sounds of Debian's asterisk-core-sounds-{es,fr,it,ru}-wav; fsdd: Free Spoken Digit Dataset. Sentences of
docs/ in espeak-ng's voices and many languages are added (`pip install espeakng-loader`). The judges: `pip install pesq pystoi`,
and Debian's codec2 and opus-tools in PATH. Tune on a folder outside `--train` that is not the test's.

Trains the codec of conf/speech.yaml, with `--levels`, for so many CPU seconds (`process_time`) in one thread, on crops of a
second at random speeds. All clips are brought to one loudness, as usual; delays are taken out for STOI.
"""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from common import PROJECT, command, machine, table

sys.path.insert(0, str(PROJECT))
from data.speech import Espeak
from pile_app.media import resample
from pile_app.model.codec_configs import AudioCodecConfig
from pile_app.model.codecs import AudioCodec

LOUDNESS, LONGEST = 0.05, 8.0  # root mean square of the parts that are not silent, -26 dB; seconds
LANGUAGES = "en-us en es fr it de pt nl sv da fi pl cs hu ro tr id sw vi et lv lt hr sk is eu cy af sq"
Clips = list[np.ndarray]
Code = Callable[[np.ndarray, str], np.ndarray]  # a clip and a folder for files -> the clip again


def level(samples: np.ndarray, rate: int) -> np.ndarray:
    energy = np.square(samples[: len(samples) // (rate // 50) * (rate // 50)].reshape(-1, rate // 50)).mean(1)
    loud = energy[energy > energy.max() * 1e-3].mean() if energy.any() else 1.0
    return (samples * min(LOUDNESS / math.sqrt(loud), 0.99 / (np.abs(samples).max() + 1e-9))).astype(np.float32)


def read(folder: str, rate: int) -> Clips:
    import soundfile

    files = (soundfile.read(path, dtype="float32", always_2d=True) for path in sorted(Path(folder).rglob("*.wav")))
    found = [level(resample(samples[: int(LONGEST * its), 0], its, rate), rate) for samples, its in files]
    return [clip for clip in found if len(clip) > 0.2 * rate and clip.any()]


def speak(count: int, rate: int) -> tuple[Clips, Clips]:
    """Sentences of docs/ in voices of espeak-ng, and in every eighth voice, which is held out."""
    text = "\n".join(path.read_text() for path in sorted((PROJECT / "docs").glob("*.md")))
    lines = [line for line in re.findall("[A-Za-z ,']+", text) if 25 < len(line.strip()) < 80]
    draw, parts = random.Random(1), (Clips(), Clips())
    with Espeak() as espeak:
        voices = [voice for voice in espeak.voices if not voice.startswith("whisper")]
        for number in range(count):
            index, its_rate = number % len(voices), espeak.sample_rate
            numbers = draw.randint(130, 210), draw.randint(15, 85), draw.randint(20, 80)
            samples = espeak.say(draw.choice(lines), draw.choice(LANGUAGES.split()), voices[index], *numbers)
            if len(samples) > its_rate:
                parts[index % 8 == 7].append(level(resample(samples[: 5 * its_rate], its_rate, rate), rate))
    return parts


def crop(clips: Clips, size: int, speed: float, draw: np.random.Generator) -> np.ndarray:
    """`size` samples of a random clip at a random speed, at most `speed` faster or slower."""
    clip, length = clips[draw.integers(len(clips))], round(size * (1 + speed) ** draw.uniform(-1, 1))
    first = draw.integers(max(1, len(clip) - length + 1))
    part = clip[first : first + length]
    spectrum = np.fft.rfft(np.pad(part, (0, length - len(part))))[: size // 2 + 1]  # resampled
    return np.fft.irfft(np.pad(spectrum, (0, size // 2 + 1 - len(spectrum))), size) * (size / length)


def fit(config: AudioCodecConfig, groups: Sequence[Clips], seconds: float, seed: int) -> AudioCodec:
    torch.manual_seed(seed)
    draw, codec = np.random.default_rng(seed), AudioCodec(config)
    optimizer = torch.optim.AdamW(codec.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    each, count, begin, share, step = config.samples_per_token, 6, time.process_time(), 0.0, 0
    size, weights = config.sample_rate // each * each, np.array([sum(map(len, clips)) ** 0.5 for clips in groups])
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * min(1.0, (step + 1) / 50, (1 - share) / 0.4)
        picked = draw.choice(len(groups), count, p=weights / weights.sum())
        audio = torch.from_numpy(np.stack([crop(groups[one], size, 0.15, draw) for one in picked]).astype(np.float32))
        loss = codec.loss(audio.view(-1, each), torch.full((count,), size // each))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        share, step = (time.process_time() - begin) / seconds, step + 1
    print(f"{step} steps, {seconds:.0f} CPU seconds, {sum(p.numel() for p in codec.parameters()) / 1e6:.2f} M parameters")
    return codec.eval()


def pile(codec: AudioCodec, clip: np.ndarray, folder: str) -> np.ndarray:
    each = codec.config.samples_per_token
    audio = torch.from_numpy(np.pad(clip, (0, -len(clip) % each))).view(-1, each)
    tokens = torch.tensor([len(audio)])
    return codec.decode(codec.encode(audio, tokens), tokens).flatten()[: len(clip)].numpy()


def codec2(bits: int, clip: np.ndarray, folder: str) -> np.ndarray:
    np.round(np.pad(clip, (0, 800)) * 32767).astype(np.int16).tofile(f"{folder}/in")
    for program, source, target in (("c2enc", "in", "bits"), ("c2dec", "bits", "out")):
        subprocess.run([program, str(bits), source, target], check=True, capture_output=True, cwd=folder)
    return np.fromfile(f"{folder}/out", np.int16).astype(np.float32) / 32768


def opus(rate: int, clip: np.ndarray, folder: str) -> np.ndarray:
    import soundfile

    soundfile.write(f"{folder}/in.wav", clip, rate)
    for words in ("opusenc --bitrate 6 in.wav bits", f"opusdec --rate {rate} bits out.wav"):
        subprocess.run([*words.split(), "--quiet"], check=True, cwd=folder)
    return soundfile.read(f"{folder}/out.wav", dtype="float32")[0]


def undelayed(clip: np.ndarray, again: np.ndarray, most: int = 800) -> np.ndarray:
    """`again` without its delay, by the envelopes: vocoders do not keep phases."""
    smooth = np.hanning(160)
    one, other = (np.convolve(np.abs(samples), smooth, "same") for samples in (clip, again))
    size = len(clip) + len(again) + most
    similar = np.fft.irfft(np.conj(np.fft.rfft(one - one.mean(), size)) * np.fft.rfft(other - other.mean(), size), size)
    return np.pad(again[similar[:most].argmax() :], (0, most))[: len(clip)]


def measure(name: str, code: Code, clips: Clips, rate: int) -> list[str]:
    from pesq import pesq
    from pystoi import stoi

    with tempfile.TemporaryDirectory() as folder:
        pairs = [(clip, undelayed(clip, code(clip, folder))) for clip in clips]
    rows = [(pesq(rate, *pair, "nb" if rate == 8000 else "wb"), stoi(*pair, rate)) for pair in pairs]
    return [name, *(f"{value:.3f}" for value in np.mean(rows, 0))]


def main(
    train: Sequence[str] = (), test: str = "", sentences: int = 1600, rate: int = 8000,
    levels: Sequence[int] = (8, 8, 8, 8, 16), seconds: float = 600, clips: int = 60, seed: int = 0,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    (spoken, held_out), groups = speak(sentences, rate), [read(folder, rate) for folder in train]
    tested = [one for one in (read(test, rate) if test else held_out) if len(one) > 1.5 * rate]
    tested = [tested[number] for number in np.random.default_rng(0).permutation(len(tested))[:clips]]
    shape = yaml.safe_load((PROJECT / "conf" / "speech.yaml").read_text())["model"]["audio"]
    scaled = {name: shape[name] * rate // shape["sample_rate"] for name in ("sample_rate", "hop", "window")}
    scaled |= {"levels": tuple(levels), "mels": 64 if rate == 8000 else 80}
    config = AudioCodecConfig(**shape | scaled)
    codec = fit(config, [spoken, *groups], seconds, seed)
    bits = math.log2(math.prod(levels)) * rate / config.samples_per_token
    codecs: dict[str, Code] = {f"Pile, {bits:.0f} bit/s": partial(pile, codec), "Opus, 6000 bit/s": partial(opus, rate)}
    if rate == 8000:
        codecs |= {f"Codec2, {speed} bit/s": partial(codec2, speed) for speed in (1200, 2400)}
    rows = (measure(name, code, tested, rate) for name, code in codecs.items())
    table(["codec", "PESQ", "STOI"], rows, f"{len(tested)} clips of {test or 'voices of espeak-ng'}, {machine()}")


if __name__ == "__main__":
    command(main, __doc__)
