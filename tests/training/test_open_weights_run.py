"""Runs on open weights of transformers, from a folder as the hub has it: train, resume, use, export, without that folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from attempts import Workbench, assert_close_runs, assert_same_run, make_bench

from pile_app.data.tokenizers import train_tokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate
from pile_app.model.huggingface import save_huggingface
from pile_app.model.pretrained import save_pretrained
from pile_app.training.checkpoints import read_checkpoint
from pile_app.training.load import load_run, read_config

FSDP2 = ("--trainer.strategy", "fsdp2")
TENSOR_PARALLEL = (
    *("--trainer.strategy", "pile_app.training.parallel.ShardedStrategy"),
    *("--trainer.strategy.tensor_parallel_size", "2"),
)
SETTINGS = ("--model.backbone", "HuggingFace", "--model.backbone.path", "weights", "--checkpoint_every", "2")


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "weights")
    train_tokenizer(["once upon a time there was a king " * 20], "bpe", 280, tmp_path / "weights" / "tokenizer.json")
    return make_bench(tmp_path)


def test_a_run_that_stopped_continues_bit_identically_without_the_folder(bench: Workbench) -> None:
    options = (*SETTINGS, "--model.optimizer.thaw_at", "1", "--trainer.max_steps", "6")
    bench.train("whole", *options)
    assert bench.start("parts", *options, KILL_AT="4").wait() == -9
    shutil.move(bench.folder / "weights", bench.folder / "away")
    bench.train("parts", *options)
    assert_same_run(bench.run("parts"), bench.run("whole"))


@pytest.mark.parametrize("lora", [(), ("--model.backbone.lora", "{rank: 2}")], ids=["full", "lora"])
def test_a_run_writes_every_modality_and_is_exported_without_the_folder(
    bench: Workbench, lora: tuple[str, ...], tmp_path: Path
) -> None:
    bench.train("run", *SETTINGS, *lora, "--trainer.max_steps", "5")
    shutil.move(bench.folder / "weights", bench.folder / "away")
    module, _, saved = load_run(bench.run("run"))
    assert saved["global_step"] == 5
    for modality in (TEXT, IMAGE, AUDIO):
        prompt = [Document((Segment("once upon"),), "x")]
        (segment,) = generate(module.model, prompt, modality, Sampling(max_text=4, max_seconds=0.2))
        assert segment.modality == modality
    save_pretrained(module.model, read_config(bench.run("run"))["model"], tmp_path / "pile")
    again = FusedLanguageModel.from_pretrained(tmp_path / "pile")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        ours, theirs = (m.logits(m.hidden(tokens, tokens * 0, tokens * 0, tokens), TEXT) for m in (module.model, again))
    torch.testing.assert_close(ours, theirs)
    save_huggingface(module.model, "", 128, tmp_path / "huggingface")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface")


LORAS = {"full": (), "lora": ("--model.backbone.lora", "{rank: 2}")}
LORAS["media"] = ("--model.backbone.lora", "{rank: 2, media_only: true}")


@pytest.mark.parametrize("lora", LORAS.values(), ids=list(LORAS))
def test_two_processes_lose_what_one_loses_and_continue_each_others_runs(bench: Workbench, lora: tuple[str, ...]) -> None:
    """From FSDP2 to one process; from one process to half of the heads on each of two."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = transformers.Qwen3Config(**sizes, **heads, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
    weights = transformers.Qwen3ForCausalLM(config)
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights.save_pretrained(bench.folder / "weights")
    rates = ("--model.optimizer.backbone_learning_rate", "0.01", "--model.optimizer.learning_rate", "0.01")
    options = (
        *SETTINGS,
        *lora,
        *rates,
        "--model.optimizer.name",
        "sgd",
        "--trainer.max_steps",
        "6",
        "--model.codec_steps",
        "1",
    )
    alone = (*options, "--data.micro_batch", "2")
    bench.train("one", *alone)

    def on_two(name: str, *arguments: str, codes: tuple[int, int] = (0, 0), **environment: str) -> None:
        ranks = bench.start_ranks(name, *arguments, **environment)
        assert tuple(rank.wait() for rank in ranks) == codes, ranks[0].text[-3000:]

    on_two("sharded", *options, *FSDP2, codes=(143, 0), STOP_AT="1")
    bench.train("sharded", *alone)
    assert bench.start("heads", *alone, STOP_AT="3").wait() == 143
    on_two("heads", *alone, *TENSOR_PARALLEL)
    for name in ("sharded", "heads"):
        assert_close_runs(bench.run(name), bench.run("one"), 1e-5)
        found, expected = (read_checkpoint(bench.run(run) / "checkpoints" / "last.ckpt") for run in (name, "one"))
        torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=1e-4, atol=1e-5)
    model = load_run(bench.run("heads"))[0].model.backbone.model  # type: ignore[union-attr]
    assert model.lm_head.weight is model.model.embed_tokens.weight
