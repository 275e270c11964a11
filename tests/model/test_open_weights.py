"""Backbones of transformers: the same values as transformers computes, packed as alone, cached as not."""

from __future__ import annotations

import json
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
from pile_app.model.segments import prompt_tokens
from pile_app.records import ROLES, Turn, conversation_prompt

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

FAMILIES: dict[str, Any] = {
    "qwen2": lambda: transformers.Qwen2Config(**WIDE),
    "phi3": lambda: transformers.Phi3Config(**WIDE, pad_token_id=0),
    "olmo2": lambda: transformers.Olmo2Config(**WIDE, pad_token_id=0),
    "granite": lambda: transformers.GraniteConfig(
        **WIDE, logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5
    ),
    "cohere": lambda: transformers.CohereConfig(**WIDE, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "starcoder2": lambda: transformers.Starcoder2Config(**WIDE, residual_dropout=0, embedding_dropout=0),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=64, max_position_embeddings=128),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "mixtral": lambda: transformers.MixtralConfig(**WIDE, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **WIDE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "opt": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=32, dropout=0, pad_token_id=0
    ),
    "falcon": lambda: transformers.FalconConfig(**SIZES, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": lambda: transformers.FalconConfig(**SIZES, alibi=True),
    "bloom": lambda: transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "gemma2": lambda: transformers.Gemma2Config(**WIDE, head_dim=8),
    "mamba": lambda: transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2),
}
REFUSED = dict.fromkeys(("falcon", "falcon-alibi", "bloom", "mpt", "mamba"), "do not take another attention function")
REFUSED |= {"gptj": "its head has a bias", "gemma2": "its attention caps the scores"}


def write(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    train_tokenizer(["once upon a time there was a king " * 20], "bpe", 280, folder / "tokenizer.json")
    return folder


@pytest.fixture(params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(CONFIGS[request.param](), tmp_path / request.param)


def reference(folder: Path, ids: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def logits(backbone: HuggingFace, ids: Tensor, *arguments: Any) -> Tensor:
    x = torch.nn.functional.embedding(ids, backbone.text_embedding())
    found = backbone(x, *arguments) @ backbone.text_head().T
    return found if backbone.logit_cap is None else backbone.logit_cap * (found / backbone.logit_cap).tanh()


def test_logits_are_those_of_transformers_alone_packed_and_cached(folder: Path) -> None:
    assert_same_logits(folder)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_families_are_right_or_refused(family: str, tmp_path: Path) -> None:
    folder = write(FAMILIES[family](), tmp_path / "weights")
    if (reason := REFUSED.get(family)) is None:
        return assert_same_logits(folder)
    with pytest.raises(ValueError, match=reason) as refused:
        HuggingFace(str(folder))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < len(str(folder)) + 180


@torch.no_grad()
def assert_same_logits(folder: Path) -> None:
    """Alone, packed, and with a cache."""
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


def test_adapters_of_media_leave_texts_alone(folder: Path, image: Any, sound: Any) -> None:
    model = fused(folder, lora=LoRA(rank=2, media_only=True)).eval()
    plain = fused(folder).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
            else:
                plain.get_parameter(name.replace(".base_layer", "")).copy_(parameter)
    text, shown = Segment("once upon a time"), Document((Segment("a king"), image(1), Segment("there was")), "shown")
    documents = [Document((text,), "text"), shown, Document((text, text), "texts")]
    rows, grids, _ = zip(*(prompt_tokens(model, document, TEXT) for document in documents), strict=True)
    tokens, indices = torch.cat(rows)[None], torch.cat(grids)[None]
    document = torch.cat([torch.full_like(row, n) for n, row in enumerate(rows)])[None]
    position = torch.cat([torch.arange(len(row)) for row in rows])[None]
    ours, theirs = (m.hidden(tokens, indices, document, position) for m in (model, plain))
    opener = rows[1].tolist().index(model.vocabulary.OPENERS[1])
    media = len(rows[0]) + opener, len(rows[0]) + len(rows[1])
    same = (ours - theirs).abs().amax(-1)[0] < 1e-4
    assert same.tolist() == [not media[0] <= n < media[1] for n in range(len(same))]

    cache, steps = model.backbone.new_cache(), []
    inside = slice(len(rows[0]), media[1])
    for first in range(inside.start, inside.stop, 5):
        part = slice(first, min(first + 5, inside.stop))
        with torch.no_grad():
            steps.append(model.hidden(tokens[:, part], indices[:, part], tokens[:, part] * 0, position[:, part], cache))
    torch.testing.assert_close(torch.cat(steps, 1), ours[:, inside], atol=1e-4, rtol=1e-4)

    gradients = []
    for model.backbone.recompute in (False, True):
        model.train().zero_grad()
        losses = [model.hidden(tokens, indices, document, position).square().sum() for _ in range(2)]
        (losses[0] + 2 * losses[1]).backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "lora" in name])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("lora", [None, LoRA(rank=2), LoRA(rank=2, media_only=True)], ids=["full", "lora", "media"])
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


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "without system": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% else %}<|im_end|>{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}",
}
TURNS = {
    "chatml": ("<|im_start|>system", "<|im_end|>\n<|im_start|>user", "<|im_end|>\n<|im_start|>assistant"),
    "without system": ("</s><|im_start|>", "</s><|im_start|>", "<|im_end|>"),
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_turns_are_those_of_the_chat_template_and_exported(name: str, tmp_path: Path) -> None:
    folder = write(CONFIGS["llama"](), tmp_path / "weights")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(folder)
    backbone = HuggingFace(str(folder))
    words = load_tokenizer(str(backbone.tokenizer), backbone.turns)
    model = FusedLanguageModel(backbone, words).eval()
    assert words.fingerprint != load_tokenizer(str(backbone.tokenizer)).fingerprint
    for marker, expected in zip(ROLES.values(), TURNS[name], strict=True):
        assert words.decode(words.encode(marker)) == expected
        [(ids, _)] = words.encode_all([marker], [[]])
        assert ids.tolist() == words.encode(marker).tolist()
    assert set(words.encode("<|im_end|>")).isdisjoint(tokenizer.all_special_ids), "what a user writes is text"
    save_huggingface(model, "", 64, tmp_path / "out")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": role, "content": "once"} for role in ("system", "user", "assistant", "user")]
    found = exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = conversation_prompt([Turn(one["role"], (Segment(one["content"]),)) for one in messages])
    ours = [*prompt_tokens(model, prompt, None)[0].tolist(), 2]  # `<text>` of the answer
    begin = exported.convert_tokens_to_ids(["<begin>", "<end>", "<text>"])
    assert found == [begin[token] if token < 3 else token - 6 for token in ours]


def test_a_gguf_file_is_what_was_written(tmp_path: Path) -> None:
    gguf, _ = pytest.importorskip("gguf"), pytest.importorskip("accelerate")
    config = transformers.Qwen2Config(**WIDE, rms_norm_eps=1e-6, tie_word_embeddings=False)
    folder = write(config, tmp_path / "weights")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(300)
    described = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    tokens += [f"<unused{number}>" for number in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 300)
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk"}
    names |= {"self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm"}
    names |= {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for name, weight in model.state_dict().items():
        for theirs, other in names.items():
            name = name.replace(theirs, other)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.randint(300, (1, 9))
    with torch.no_grad():
        found, expected = (
            logits(HuggingFace(str(path)).eval(), ids, torch.zeros_like(ids), torch.arange(9)[None])
            for path in (tmp_path / "model.gguf", folder)
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_gguf_file_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pile_app.model.open_weights.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the extra smollm2"):
        HuggingFace("missing.gguf")
