"""Shared by the tests of several packages: small media, and a model small enough to run in milliseconds."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch looks: tests run side by side and are small

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from processes import forks, start, start_ranks

from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import ByteTokenizer, train_tokenizer
from pile_app.documents import Document, Segment
from pile_app.model.backbones import LSTM, RNN, Backbone, MinGRU, Transformer
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.readers import ReaderConfig, ReadersConfig

# No test fails because the machine is slow; and where CI is set, as `.ci/run` does, every run draws the same examples.
settings.register_profile(
    "pile", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ, print_blob=True
)
settings.load_profile("pile")

IMAGE = ImageCodecConfig(size=8, channels=1, patch=4, levels=(4, 3), width=16, blocks=1)
AUDIO = AudioCodecConfig(
    sample_rate=8000, hop=80, window=320, mels=20, frames_per_token=4, levels=(4, 3, 3), width=16, blocks=1
)
READERS = ReadersConfig(ReaderConfig(width=8), ReaderConfig(width=8))
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "transformer": lambda: Transformer(width=32, layers=2, heads=4, key_value_heads=2),
    "lstm": lambda: LSTM(width=32, layers=2),
    "rnn": lambda: RNN(width=32, layers=2),
    "mingru": lambda: MinGRU(width=32, layers=2),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that make whole runs or the demo's data take longest: begun first, they leave no core alone at the end."""
    items.sort(key=lambda item: item.path.parent.name in ("data", "model"))
    if any(item.path.parent.name in ("tasks", "training") for item in items):
        forks()  # before `pile prepare`, in a test, starts the same server with less


@pytest.fixture
def tiny_model() -> Callable[..., FusedLanguageModel]:
    """Makes a model of text, 8x8 images (4 codes) and 8 kHz sound (25 codes a second) over a named backbone.

    `perturbed` moves every parameter away from its initial value (heads start at zero), so that predictions differ.
    """

    def make(backbone: str = "transformer", perturbed: bool = True, readers: ReadersConfig | None = None) -> FusedLanguageModel:
        torch.manual_seed(0)
        model = FusedLanguageModel(BACKBONES[backbone](), ByteTokenizer(), IMAGE, AUDIO, readers=readers or ReadersConfig())
        if perturbed:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += torch.randn_like(parameter) * 0.1
        return model.eval()

    return make


@pytest.fixture
def image() -> Callable[[int], Segment]:
    """Makes the n-th 8x8 grey image."""
    return lambda n: Segment.from_image(np.random.default_rng(n).integers(0, 256, (8, 8), np.uint8))


@pytest.fixture
def sound() -> Callable[..., Segment]:
    """Makes the n-th 8 kHz sound: a tone in noise."""

    def make(n: int, samples: int = 1500) -> Segment:
        rng = np.random.default_rng(n)
        tone = np.sin(np.arange(samples) * (0.1 + 0.05 * n))
        return Segment.from_audio(0.4 * tone + 0.05 * rng.standard_normal(samples), 8000)

    return make


REPOSITORY = Path(__file__).parents[1]
# Background jobs of a shell ignore SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Parts of the configurations of tiny runs, here and in `training/attempts.py`.
TINY_CODECS = """
  image: {{size: 8, channels: 1, patch: 4, levels: [4, 3], width: 16, blocks: 1}}
  audio: {{sample_rate: 8000, hop: 80, window: 320, mels: 20, frames_per_token: 4, levels: [4, 3, 3], width: 16, blocks: 1}}
"""
TINY_DATA = """
data:
  sources:
    media: {{train: "{shards}/media-train-*.tar", validation: "{shards}/media-validation-*.tar", weight: 1}}
    prose: {{train: "{shards}/prose-train-*.tar", validation: "{shards}/prose-validation-*.tar", weight: 1}}
  context: 128
  global_batch: 4
  condition_dropout: 0.5
"""
TINY_CONFIG = f"""
model:
  backbone: {{{{class_path: Transformer, init_args: {{{{width: 32, layers: 2, heads: 2}}}}}}}}
{TINY_CODECS}
  codec_steps: 2
{TINY_DATA}
trainer: {{{{max_steps: 6, val_check_interval: 3, accelerator: cpu, precision: 32-true}}}}
checkpoint_every: 3
"""


def write_tiny_shards(folder: Path) -> None:
    """What those runs train on: captioned images, transcribed sounds and texts."""
    for split, count in (("train", 60), ("validation", 8)):
        write_shards(media_documents(count, split), folder, f"media-{split}", shard_bytes=60_000)
        write_shards(prose_documents(count, split), folder, f"prose-{split}")


@dataclass(frozen=True)
class TinyRun:
    """A run that `train.py` made: its folder, the config it was given, the folder of its shards."""

    folder: Path
    config: Path
    shards: Path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Six steps over captioned images, transcribed sounds and texts, by the real entry point. Not to be changed: copy it."""
    base = tmp_path_factory.mktemp("tiny")
    shards = base / "shards"
    write_tiny_shards(shards)
    (base / "conf").mkdir()
    (base / "conf" / "default.yaml").write_text("{}")  # `pile plan` lays the configuration over it
    config = base / "config.yaml"
    config.write_text(TINY_CONFIG.format(shards=shards))
    train("--config", config, "--name", "x", "--runs", base / "runs", "--wandb", "null", cwd=base)
    return TinyRun(base / "runs" / "x", config, shards)


def write_chatty_weights(folder: Path) -> Path:
    """Tiny Llama of random weights with a chat template, as a folder of transformers."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 340, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(["It is three. What is this? I hear eight! " * 9], "bpe", 300, folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|over|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|over|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def train(*arguments: str | Path, cwd: Path, ranks: int = 1) -> None:
    """`python train.py ...` from `cwd`, where no `conf/default.yaml` adds to the config."""
    words = ["train.py", *map(str, arguments)]
    if ranks > 1:
        words += ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]
    for rank in start_ranks(words, cwd, ranks) if ranks > 1 else [start(words, cwd)]:
        rank.succeed()


def media_documents(count: int, split: str) -> Iterator[Document]:
    """Captioned images and transcribed sounds by turns, segments in free order; every seventh a question with its answer."""
    for n in range(count):
        rng = np.random.default_rng(n)
        if n % 2:
            medium = Segment.from_image(rng.integers(0, 256, (8, 8), np.uint8))
        else:
            medium = Segment.from_audio(0.3 * rng.standard_normal(1600 + 100 * (n % 5)), 8000)
        if n % 7 == 6:
            question = Segment("what is this?", loss=False)
            yield Document((question, medium, Segment(f"number {n}")), f"{split}-{n}")
        else:
            yield Document((medium, Segment(f"number {n}")), f"{split}-{n}", ordered=False)


def prose_documents(count: int, split: str) -> Iterator[Document]:
    """Texts of 20 to 300 bytes; the longer texts are cut in a context of 128."""
    for n in range(count):
        yield Document((Segment(f"{split} text {n}: " + "lorem ipsum " * (1 + n % 24)),), f"{split}-{n}")


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> str:
    """Write a tar as another program would; returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)
