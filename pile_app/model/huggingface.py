"""A text-only Transformer as a folder of Hugging Face's transformers: `NanoChatForCausalLM` (transformers 5), logits equal.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json

nanochat's architecture (https://github.com/karpathy/nanochat) is ours without `skips` and with `sharpness` 1: normed embedding,
norms without gains, RoPE before QK-norm, ReLU², untied head, logits capped at 15. It rotates queries and keys the other way
round, which swapping the halves of their heads undoes. Special tokens keep their ids, tokens of the text follow; the tokenizer
writes `<begin> <text>` before a text, as in training. Writing the folder needs no code of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pile_app.data.tokenizers import plain_description
from pile_app.documents import TEXT
from pile_app.model.backbones import HuggingFace, Transformer
from pile_app.model.base import EPSILON, LOGIT_CAP
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.pretrained import make_empty, save_weights
from pile_app.records import ROLES
from pile_app.vocabulary import Vocabulary

# By id, as `Vocabulary` has them.
SPECIALS = ("<begin>", "<end>", "<text>", "<image>", "<audio>", "<null>")
ENDS = [Vocabulary.END, *Vocabulary.OPENERS]


def save_huggingface(model: FusedLanguageModel, tokenizer: str, context: int, folder: Path) -> None:
    """Write a text-only Transformer with `skips: false` and `sharpness: 1` into a new or empty folder.

    `tokenizer`: as configured, "bytes" or the path of a `tokenizer.json`. Raises ValueError if transformers has no architecture
    like this model's, naming the setting, or if the folder is not empty.
    """
    if isinstance(model.backbone, HuggingFace):
        return save_open_weights(model, model.backbone, folder)
    backbone = check_exportable(model)
    first: Any = backbone.blocks[0]
    ids = {"bos_token_id": Vocabulary.BEGIN, "eos_token_id": Vocabulary.END, "pad_token_id": Vocabulary.END}
    config = ids | {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "dtype": "float32",
        "vocab_size": model.vocabulary.slices[TEXT].stop, "max_position_embeddings": context, "tie_word_embeddings": False,
        "hidden_size": backbone.width, "intermediate_size": first.expand.out_features,
        "num_hidden_layers": backbone.layers, "num_attention_heads": backbone.heads,
        "num_key_value_heads": first.key.out_features // first.head_width,
        "rms_norm_eps": EPSILON, "final_logit_softcapping": LOGIT_CAP,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_base},
    }  # fmt: skip
    described = hf_tokenizer(tokenizer)
    of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "clean_up_tokenization_spaces": False,
        "bos_token": SPECIALS[Vocabulary.BEGIN], "eos_token": SPECIALS[Vocabulary.END], "pad_token": SPECIALS[Vocabulary.END],
        "split_special_tokens": True,  # their names in a text are ordinary text
    }  # fmt: skip
    make_empty(folder)
    save_weights({name: weight.float() for name, weight in hf_weights(model, backbone).items()}, folder)
    generation = ids | {"eos_token_id": ENDS}
    files = {"config": config, "tokenizer": described, "tokenizer_config": of_tokenizer, "generation_config": generation}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def save_open_weights(model: FusedLanguageModel, backbone: HuggingFace, folder: Path) -> None:
    """Write the language model of text as a folder that transformers loads, adapters merged, logits equal.

    `<begin>` and `<text>`, which precede each text, and `<end>` join the vocabulary; the tokenizer writes the first two.

    Raises:
        ValueError: the folder is not empty.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    make_empty(folder)
    plain: Any = backbone.merged()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(backbone.path, revision=backbone.revision)
    specials = {"<begin>": Vocabulary.BEGIN, "<text>": Vocabulary.OPENERS[TEXT], "<end>": Vocabulary.END}
    first = max(len(backbone.text_head()), len(tokenizer))
    plain.resize_token_embeddings(first + len(specials), mean_resizing=False)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(first - len(tokenizer))] + list(specials), special_tokens=True)
    read, written = plain.get_input_embeddings(), plain.get_output_embeddings()
    with torch.no_grad():
        for row, token in enumerate(specials.values(), first):
            written.weight[row] = model.heads[TEXT]()[token] / backbone.head_scale
            if written.weight is not read.weight or token != Vocabulary.END:
                read.weight[row] = model.embeddings[TEXT]()[token] / getattr(read, "scalar_embed_scale", 1.0)
    ids = dict(zip(specials, range(first, first + len(specials)), strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> <text> $A", special_tokens=[(name, ids[name]) for name in ("<begin>", "<text>")]
    )
    tokenizer.bos_token, tokenizer.eos_token = "<begin>", "<end>"
    for config in (plain.config, plain.generation_config):
        config.bos_token_id, config.eos_token_id = ids["<begin>"], ids["<end>"]
    if backbone.turns:
        tokenizer.chat_template = chat_template(backbone.turns)
        plain.generation_config.eos_token_id = [ids["<end>"], int(model.tokenizer.encode(ROLES["user"])[0])]
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chat_template(turns: Mapping[str, str]) -> str:
    """A chat template that writes conversations as `records.py` lays them out."""
    texts = json.dumps({role: turns[marker] for role, marker in ROLES.items()}, ensure_ascii=False)
    turn = "{{ '<text>' + turns[message['role']] + '<text>' + message['content'] }}"
    answer = "{% if add_generation_prompt %}{{ '<text>' + turns['assistant'] + '<text>' }}{% endif %}"
    return f"{{% set turns = {texts} %}}<begin>{{% for message in messages %}}{turn}{{% endfor %}}{answer}"


def check_exportable(model: FusedLanguageModel) -> Transformer:
    """Return the backbone. Raises ValueError if transformers has no architecture for the model."""
    backbone = model.backbone
    if model.codecs:
        reason = "it has media; only models with model.image: null and model.audio: null are text alone"
    elif not isinstance(backbone, Transformer):
        reason = f"its backbone is {type(backbone).__name__}, not Transformer"
    elif backbone.skips:
        reason = "its blocks mix the embedding back in; train with model.backbone.init_args.skips: false"
    elif backbone.sharpness != 1:
        reason = f"its attention is scaled by {backbone.sharpness}; train with model.backbone.init_args.sharpness: 1"
    else:
        return backbone
    raise ValueError(f"transformers has no architecture equal to this model: {reason}")


def hf_weights(model: FusedLanguageModel, backbone: Transformer) -> dict[str, Tensor]:
    """Name in `NanoChatForCausalLM` -> weight."""
    weights = {"model.embed_tokens.weight": model.embeddings[TEXT](), "lm_head.weight": model.heads[TEXT]()}
    theirs = {"self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value",
              "self_attn.o_proj": "attention_out", "mlp.fc1": "expand", "mlp.fc2": "contract"}  # fmt: skip
    for layer, block in enumerate(backbone.blocks):
        for name, ours in theirs.items():
            weight = block.get_parameter(f"{ours}.weight")
            if ours in ("query", "key"):
                halves = weight.unflatten(0, (-1, 2, backbone.width // backbone.heads // 2))  # (heads, halves, d / 2, D)
                weight = halves.flip(1).flatten(0, 2)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    return weights


def hf_tokenizer(tokenizer: str) -> dict[str, Any]:
    """The `tokenizer.json` whose ids are those of the model: special tokens first, then the tokenizer's own.

    Raises:
        ValueError: it is no BPE.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if tokenizer == "bytes":
        plain = Tokenizer(models.BPE({piece: byte for byte, piece in enumerate(byte_pieces())}, []))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        plain.decoder = decoders.ByteLevel()
        description = json.loads(plain.to_str())
    else:
        description = plain_description(json.loads(Path(tokenizer).read_text(encoding="utf-8")))
    if (kind := description["model"]["type"]) != "BPE":
        raise ValueError(f"tokenizer {tokenizer!r} is a {kind} model: only bytes and BPE are exported to transformers")
    # The library takes the ids of special tokens from the model's vocabulary alone.
    pieces = {piece: token + Vocabulary.SPECIALS for piece, token in description["model"]["vocab"].items()}
    description["model"]["vocab"] = {name: token for token, name in enumerate(SPECIALS)} | pieces
    own = [{**token, "id": token["id"] + Vocabulary.SPECIALS} for token in description["added_tokens"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description["added_tokens"] = [{"id": token, "content": name, **flags} for token, name in enumerate(SPECIALS)] + own
    begins = (Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT])
    prefix = [{"SpecialToken": {"id": SPECIALS[token], "type_id": 0}} for token in begins]
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*prefix, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {SPECIALS[t]: {"id": SPECIALS[t], "ids": [t], "tokens": [SPECIALS[t]]} for t in begins},
    }
    return dict(description)


def byte_pieces() -> list[str]:
    """The character that byte-level tokenizers write for each byte (GPT-2's table): itself if visible, else one from U+0100
    on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
