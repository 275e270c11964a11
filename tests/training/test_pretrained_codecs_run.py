"""Runs with codecs of transformers: train, resume, encode, use and export without the folders that they came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from attempts import Workbench, assert_same_run, make_bench
from processes import start

from pile_app.documents import AUDIO, IMAGE, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate
from pile_app.model.pretrained import save_pretrained
from pile_app.training.load import load_run, read_config

EARS = ("--model.audio.pretrained", "ears", "--model.audio.codebooks", "2", "--data.context", "300")
EYES = ("--model.image.pretrained", "eyes")
LENGTH = ("--checkpoint_every", "2", "--trainer.max_steps", "6")


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    torch.manual_seed(0)
    dac = transformers.DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[8, 10], upsampling_ratios=[10, 8], decoder_hidden_size=16, n_codebooks=3,
        codebook_size=16, codebook_dim=4, hidden_size=16, hop_length=80, sampling_rate=8000,
    )  # fmt: skip
    emu3 = transformers.Emu3VQVAEConfig(
        base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1, hidden_size=64, codebook_size=16, embed_dim=4,
        latent_channels=4, temporal_downsample_factor=2,
    )  # fmt: skip
    transformers.DacModel(dac).save_pretrained(tmp_path / "ears")
    transformers.Emu3VQVAE(emu3).save_pretrained(tmp_path / "eyes")
    return make_bench(tmp_path)


def test_a_run_beside_our_image_codec_continues_bit_identically_without_the_folder(bench: Workbench) -> None:
    bench.train("whole", *EARS, *LENGTH)
    assert bench.start("parts", *EARS, *LENGTH, KILL_AT="4").wait() == -9
    shutil.move(bench.folder / "ears", bench.folder / "away")
    bench.train("parts", *EARS, *LENGTH)
    assert_same_run(bench.run("parts"), bench.run("whole"))


def test_a_run_encodes_and_is_used_and_exported_without_the_folders(bench: Workbench, tmp_path: Path) -> None:
    options = (*EARS, *EYES, *LENGTH)
    bench.train("run", *options)
    shards = [str(path) for path in bench.shards.glob("*.tar")]
    start(["pile", "encode", str(bench.run("run")), *shards, "encoded"], bench.folder).succeed()
    bench.config.write_text(bench.config.read_text().replace(str(bench.shards), "encoded"))
    bench.train("codes", *options)
    for folder in ("ears", "eyes"):
        shutil.move(bench.folder / folder, bench.folder / f"{folder}-away")
    module, _, _ = load_run(bench.run("run"))
    of_codes = load_run(bench.run("codes"))[0].state_dict()
    assert all(torch.equal(of_codes[name], tensor) for name, tensor in module.state_dict().items())
    assert module.codec_steps == 0 and module.model.audio_codec is not None
    theirs = transformers.DacModel.from_pretrained(bench.folder / "ears-away").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in module.model.audio_codec.model.state_dict().items())
    prompt = [Document((Segment("once upon"),), "x")]
    for modality in (IMAGE, AUDIO):
        (segment,) = generate(module.model, prompt, modality, Sampling(max_seconds=0.2))
        assert segment.modality == modality
    save_pretrained(module.model, read_config(bench.run("run"))["model"], tmp_path / "export")
    again = FusedLanguageModel.from_pretrained(tmp_path / "export")
    assert again.vocabulary == module.vocabulary and module.vocabulary.audio_codec
