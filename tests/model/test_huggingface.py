"""A model in the layout of transformers: the same tokens, the same logits, the same answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pile_app.data.tokenizers import load_tokenizer, train_tokenizer
from pile_app.documents import TEXT, Document, Segment
from pile_app.model.backbones import LSTM, Backbone, Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate
from pile_app.model.huggingface import save_huggingface
from pile_app.model.segments import prompt_tokens

TEXTS = ["one two three", "  spaces,\nlines and <text> in a text — é €", ""]


def make_model(tokenizer: str, backbone: Backbone) -> FusedLanguageModel:
    """Every parameter away from its initial value."""
    torch.manual_seed(0)
    model = FusedLanguageModel(backbone, load_tokenizer(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    return model.eval()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_logits_and_answers_are_equal_in_transformers(kind: str, tmp_path: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = kind
    if kind == "bpe":
        tokenizer = str(tmp_path / "tokenizer.json")
        train_tokenizer(["one two three, four - é and more lines\n of text"] * 9, "bpe", 300, tokenizer)
    backbone = Transformer(
        width=48, layers=2, heads=4, key_value_heads=2, feed_forward=3, rope_base=500.0, skips=False, sharpness=1.0
    )
    ours = make_model(tokenizer, backbone)
    save_huggingface(ours, tokenizer, 64, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        tokens = prompt_tokens(ours, Document((Segment(text),)), TEXT)[0]
        assert their_tokenizer(text)["input_ids"] == tokens.tolist()
        assert their_tokenizer.decode(tokens[2:]) == text
        row = tokens[None]
        with torch.no_grad():
            hidden = ours.hidden(row, torch.zeros_like(row), torch.zeros_like(row), torch.arange(len(tokens))[None])
            assert torch.allclose(theirs(row).logits, ours.logits(hidden, TEXT), atol=1e-4)
    answer = generate(ours, [Document((Segment("one"),))], TEXT, Sampling(temperature=0, max_text=12))[0]
    written = theirs.generate(**their_tokenizer("one", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0]
    assert their_tokenizer.decode(written[2 + len(ours.tokenizer.encode("one")) :], skip_special_tokens=True) == answer.text


def test_what_transformers_does_not_have_is_refused_by_its_setting(
    tmp_path: Path, tiny_model: Callable[..., FusedLanguageModel]
) -> None:
    words = tmp_path / "words.json"
    train_tokenizer(["one two"], "words", 5, words)
    sizes = {"width": 16, "layers": 1, "heads": 2}
    fitting = Transformer(**sizes, skips=False, sharpness=1.0)  # type: ignore[arg-type]
    for model, tokenizer, told in (
        (tiny_model(), "bytes", "model.image: null"),
        (make_model("bytes", LSTM(16, 1)), "bytes", "LSTM, not Transformer"),
        (make_model("bytes", Transformer(**sizes)), "bytes", "skips: false"),  # type: ignore[arg-type]
        (make_model("bytes", Transformer(**sizes, skips=False)), "bytes", "sharpness: 1"),  # type: ignore[arg-type]
        (make_model(str(words), fitting), str(words), "WordLevel model"),
    ):
        with pytest.raises(ValueError, match=told):
            save_huggingface(model, tokenizer, 64, tmp_path / "out")
        assert not (tmp_path / "out").exists()
