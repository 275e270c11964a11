"""Backbones of transformers: the same values as transformers computes, packed as alone, cached as not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from pile_app.model.open_weights import HuggingFace  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**WIDE, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**WIDE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "mistral": lambda: transformers.MistralConfig(**WIDE, sliding_window=4),
}


@pytest.fixture(params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def reference(folder: Path, ids: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def logits(backbone: HuggingFace, ids: Tensor, *arguments: Any) -> Tensor:
    x = torch.nn.functional.embedding(ids, backbone.text_embedding())
    found = backbone(x, *arguments) @ backbone.text_head().T
    return found if backbone.logit_cap is None else backbone.logit_cap * (found / backbone.logit_cap).tanh()


@torch.no_grad()
def test_logits_are_those_of_transformers_alone_packed_and_cached(folder: Path) -> None:
    backbone = HuggingFace(str(folder)).eval()
    ids = torch.randint(300, (1, 20))
    lengths = (7, 13)
    parts = ids.split(lengths, dim=1)
    whole = [torch.arange(n)[None] for n in lengths]
    alone = [logits(backbone, part, torch.zeros_like(part), position) for part, position in zip(parts, whole, strict=True)]
    for part, found in zip(parts, alone, strict=True):
        torch.testing.assert_close(found, reference(folder, part), atol=1e-4, rtol=1e-4)
    document = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[None]
    packed = logits(backbone, ids, document, torch.cat(whole, 1))
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)
    cache, second, steps = backbone.new_cache(13), parts[1], []
    for start, stop in ((0, 5), (5, 11), (11, 12), (12, 13)):
        steps.append(logits(backbone, second[:, start:stop], torch.zeros(1, stop - start), whole[1][:, start:stop], cache))
    torch.testing.assert_close(torch.cat(steps, 1), alone[1], atol=1e-4, rtol=1e-4)
