"""A text-only Transformer as a folder of Hugging Face's transformers: `NanoChatForCausalLM` (transformers 5), logits equal.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json

nanochat's architecture (https://github.com/karpathy/nanochat) is ours in all but two things: its blocks do not mix the
embedding back in (`skips: false`), and it scales attention by 1 / sqrt(d) (`sharpness: 1`). Normed embedding, norms without
gains, RoPE before QK-norm, ReLU², untied head, logits capped at 15 are the same. It turns queries and keys the other way round,
which swapping the halves of their heads undoes. No other architecture of transformers that we know is equal to ours with other
settings: Qwen3 (QK-norm) has no cap of the logits, Gemma 3 (QK-norm and cap) norms what a block adds, none has skips.

Special tokens keep their ids, tokens of the text follow; the tokenizer writes `<begin> <text>` before a text as training does.
No code of transformers is needed to write the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor

from pile_app.data.tokenizers import plain_description
from pile_app.documents import AUDIO, IMAGE, TEXT
from pile_app.model.backbones import Transformer, TransformerBlock
from pile_app.model.base import EPSILON, LOGIT_CAP
from pile_app.model.fused import FusedLanguageModel
from pile_app.vocabulary import Vocabulary

SPECIALS = {
    Vocabulary.BEGIN: "<begin>",
    Vocabulary.END: "<end>",
    Vocabulary.NULL: "<null>",
    Vocabulary.OPENERS[TEXT]: "<text>",
    Vocabulary.OPENERS[IMAGE]: "<image>",
    Vocabulary.OPENERS[AUDIO]: "<audio>",
}


def save_huggingface(model: FusedLanguageModel, tokenizer: str, context: int, folder: Path) -> None:
    """Writes the folder.

    Args:
        model: text only, a Transformer with `skips: false` and `sharpness: 1`.
        tokenizer: as configured: "bytes", or the path of a `tokenizer.json`.
        context: tokens that the model was trained with.
        folder: new, or empty.

    Raises:
        ValueError: transformers has no architecture like this model's; the message names the setting. Or the folder holds
            something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: choose another folder to export to")
    backbone = check_exportable(model)
    first = blocks_of(backbone)[0]
    size = len(model.heads[TEXT]())
    config = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": size,
        "hidden_size": backbone.width,
        "intermediate_size": first.expand.out_features,
        "num_hidden_layers": backbone.layers,
        "num_attention_heads": backbone.width // first.head_width,
        "num_key_value_heads": first.key.out_features // first.head_width,
        "max_position_embeddings": context,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_base},
        "final_logit_softcapping": LOGIT_CAP,
        "tie_word_embeddings": False,
        "bos_token_id": Vocabulary.BEGIN,
        "eos_token_id": Vocabulary.END,
        "pad_token_id": Vocabulary.END,
        "dtype": "float32",
    }
    described = hf_tokenizer(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().float().cpu().contiguous() for name, w in hf_weights(model).items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": SPECIALS[Vocabulary.BEGIN],
        "eos_token": SPECIALS[Vocabulary.END],
        "pad_token": SPECIALS[Vocabulary.END],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # their names are ordinary text where they stand in one
    }
    ends = [Vocabulary.END, *Vocabulary.OPENERS]
    generation = {"bos_token_id": Vocabulary.BEGIN, "eos_token_id": ends, "pad_token_id": Vocabulary.END}
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", described),
        ("tokenizer_config.json", of_tokenizer),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def check_exportable(model: FusedLanguageModel) -> Transformer:
    """The backbone of a model that transformers has an architecture for.

    Raises:
        ValueError: it has none.
    """
    backbone = model.backbone
    reason = ""
    if model.codecs:
        reason = "it has media; only models with model.image: null and model.audio: null are text alone"
    elif not isinstance(backbone, Transformer):
        reason = f"its backbone is {type(backbone).__name__}, not Transformer"
    elif blocks_of(backbone)[0].skips is not None:
        reason = "its blocks mix the embedding back in; train with model.backbone.init_args.skips: false"
    elif backbone.sharpness != 1:
        reason = f"its attention is scaled by {backbone.sharpness}; train with model.backbone.init_args.sharpness: 1"
    if reason:
        raise ValueError(f"transformers has no architecture equal to this model: {reason}")
    assert isinstance(backbone, Transformer)
    return backbone


def blocks_of(backbone: Transformer) -> list[TransformerBlock]:
    return cast("list[TransformerBlock]", list(backbone.blocks))


def hf_weights(model: FusedLanguageModel) -> dict[str, Tensor]:
    """Name in `NanoChatForCausalLM` -> weight."""
    weights = {"model.embed_tokens.weight": model.embeddings[TEXT](), "lm_head.weight": model.heads[TEXT]()}
    assert isinstance(model.backbone, Transformer)
    for number, block in enumerate(blocks_of(model.backbone)):
        layer = f"model.layers.{number}"
        for theirs, ours in (("q_proj", block.query), ("k_proj", block.key)):
            halves = ours.weight.unflatten(0, (-1, 2, block.head_width // 2))  # (heads, halves, d / 2, D)
            weights[f"{layer}.self_attn.{theirs}.weight"] = halves.flip(1).flatten(0, 2)
        weights[f"{layer}.self_attn.v_proj.weight"] = block.value.weight
        weights[f"{layer}.self_attn.o_proj.weight"] = block.attention_out.weight
        weights[f"{layer}.mlp.fc1.weight"] = block.expand.weight
        weights[f"{layer}.mlp.fc2.weight"] = block.contract.weight
    return weights


def hf_tokenizer(tokenizer: str) -> dict[str, Any]:
    """The `tokenizer.json` whose ids are those of the model: special tokens first, then the tokenizer's own.

    Raises:
        ValueError: it is no BPE, or has special tokens of its own in the middle of its ids.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    if tokenizer == "bytes":
        plain = Library(models.BPE({piece: byte for byte, piece in enumerate(byte_pieces())}, []))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        plain.decoder = decoders.ByteLevel()
        description = json.loads(plain.to_str())
    else:
        description = plain_description(json.loads(Path(tokenizer).read_text(encoding="utf-8")))
    if (kind := description["model"]["type"]) != "BPE":
        raise ValueError(f"tokenizer {tokenizer!r} is a {kind} model: only bytes and BPE are exported to transformers")
    vocabulary = description["model"]["vocab"]
    # The library takes the ids of special tokens from the model's vocabulary alone.
    specials = {name: number for number, name in SPECIALS.items()}
    description["model"]["vocab"] = specials | {piece: token + Vocabulary.SPECIALS for piece, token in vocabulary.items()}
    own = [{**token, "id": token["id"] + Vocabulary.SPECIALS} for token in description["added_tokens"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": number, "content": name, **flags} for number, name in sorted(SPECIALS.items())]
    description["added_tokens"] = special + own
    begins = [Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT]]
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": SPECIALS[b], "type_id": 0}} for b in begins),
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {SPECIALS[b]: {"id": SPECIALS[b], "ids": [b], "tokens": [SPECIALS[b]]} for b in begins},
    }
    return dict(description)


def byte_pieces() -> list[str]:
    """Byte -> the character that byte-level tokenizers write for it (GPT-2's table): itself where it can be seen, else one from
    U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]
