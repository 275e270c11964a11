"""Backbones of transformers: the same values as transformers computes, packed as alone, cached as not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import AUDIO, IMAGE
from torch import Tensor

from pile_app.data.assembly import assemble
from pile_app.data.assembly import whole as packed
from pile_app.data.tokenizers import load_tokenizer, train_tokenizer
from pile_app.documents import TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, answer_prompts
from pile_app.model.huggingface import save_huggingface
from pile_app.model.open_weights import HuggingFace, LoRA

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**WIDE, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0
    ),
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
    train_tokenizer(["once upon a time there was a king " * 20], "bpe", 280, tmp_path / request.param / "tokenizer.json")
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


def fused(folder: Path, media: bool = True, **options: Any) -> FusedLanguageModel:
    backbone = HuggingFace(str(folder), **options)
    tokenizer = load_tokenizer(str(backbone.tokenizer))
    return FusedLanguageModel(backbone, tokenizer, IMAGE if media else None, AUDIO if media else None)


@torch.no_grad()
def test_the_loss_of_texts_is_that_of_transformers(folder: Path) -> None:
    """Each text follows the model's begin of a text and a newline; the special tokens are six more answers."""
    model = fused(folder).eval()
    texts = ["once upon a time there was", "a king <end>"]
    documents = [Document((Segment(text),), text) for text in texts]
    lengths = [4 + len(model.tokenizer.encode(text)) - 1 for text in texts]
    rows = [[packed(document, length) for document, length in zip(documents, lengths, strict=True)]]
    batch = assemble(rows, model.vocabulary, model.tokenizer, sum(lengths) + 3)
    nats = model(batch)[TEXT].each
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = []
    for text in texts:
        ids = torch.tensor(
            [model.vocabulary.BEGIN, model.vocabulary.OPENERS[TEXT], *(model.tokenizer.encode(text) + 6), model.vocabulary.END]
        )
        hidden = plain.base_model(inputs_embeds=model.embeddings[TEXT]()[ids[:-1]][None]).last_hidden_state[0]
        found = hidden @ model.heads[TEXT]().T
        cap = getattr(plain.config, "final_logit_softcapping", None)
        found = found if cap is None else cap * (found / cap).tanh()
        expected.append(torch.nn.functional.cross_entropy(found, ids[1:], reduction="none"))
    torch.testing.assert_close(nats, torch.cat(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(folder: Path) -> None:
    model = fused(folder, media=False).eval()
    (answer,) = answer_prompts(model, [Document((Segment("once upon"),), "x")], TEXT, Sampling(temperature=0.0, max_text=8))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = [model.vocabulary.BEGIN, model.vocabulary.OPENERS[TEXT], *(model.tokenizer.encode("once upon") + 6).tolist()]
    for code in answer.codes.tolist():
        x = model.embeddings[TEXT]()[torch.tensor(ids)][None]
        found = plain.base_model(inputs_embeds=x).last_hidden_state[0, -1] @ model.heads[TEXT]().T
        assert code == int(found.argmax())
        ids.append(code)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_new_rows_and_weights_or_adapters_learn(
    folder: Path, lora: LoRA | None, recompute: bool, image: Any, sound: Any
) -> None:
    model = fused(folder, lora=lora).train()
    model.backbone.recompute = recompute
    document = Document((image(1), Segment("once upon a time"), sound(1)), "x")
    words = len(model.tokenizer.encode("once upon a time"))
    length = 2 + 1 + model.vocabulary.image_tokens + 1 + words + model.vocabulary.segment_tokens(2, 1500, 8000)
    batch = assemble([[packed(document, length)]], model.vocabulary, model.tokenizer, 64)
    sum(loss.total for loss in model(batch).values()).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum())}
    own = {
        "embeddings.0.weight",
        "embeddings.1.weight",
        "embeddings.2.weight",
        "heads.0.weight",
        "heads.1.weight",
        "heads.2.weight",
    }
    assert own - learned <= {"embeddings.1.weight", "embeddings.2.weight"}
    weights = {name for name in learned if name.startswith("backbone.")}
    assert weights and all(("lora" in name) == (lora is not None) for name in weights)


@torch.no_grad()
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_the_export_is_loaded_by_transformers_with_the_same_logits(folder: Path, lora: LoRA | None, tmp_path: Path) -> None:
    model = fused(folder, media=False, lora=lora).eval()
    for parameter in model.parameters():
        parameter += torch.randn_like(parameter) * 0.05
    save_huggingface(model, "", 64, tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("once upon a time", return_tensors="pt").input_ids
    words = model.tokenizer.encode("once upon a time")
    assert ids[0, 2:].tolist() == words.tolist() and tokenizer.decode(ids[0, 2:]) == "once upon a time"
    tokens = torch.tensor([[0, 2, *(words + 6)]])
    position = torch.arange(tokens.size(1))[None]
    ours = model.logits(model.hidden(tokens, tokens * 0, tokens * 0, position), TEXT)[..., 6:]
    torch.testing.assert_close(plain(ids).logits[..., : ours.size(-1)], ours, atol=1e-4, rtol=1e-4)
