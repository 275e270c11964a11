"""The promises of `tasks/rank.py` and `tasks/judges.py`: the likeliest names, and what a judge takes a medium for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from data.judges import MANY, Judge, Labelled
from pile_app.documents import TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.segments import prompt_tokens
from pile_app.tasks.rank import rank_names
from pile_app.vocabulary import Vocabulary

NAMES = ("cat", "cart", "car", "dog", "dogs", "do", "ünïcode", "a longer name than the others")


def log_likelihood(model: FusedLanguageModel, prompt: Document, name: str, hidden_media: bool = False) -> float:
    """Of the name and its end, token by token, nothing cached."""
    tokens, places, _ = prompt_tokens(model, prompt, TEXT)
    if hidden_media:
        is_code = tokens >= model.vocabulary.slices[TEXT].stop
        tokens, places = torch.where(is_code, Vocabulary.NULL, tokens), torch.zeros_like(places)
    answer = torch.tensor([Vocabulary.SPECIALS + int(token) for token in model.tokenizer.encode(name)])
    whole = torch.cat([tokens, answer])[None]
    everywhere = torch.cat([places, torch.zeros_like(answer)])[None]
    position = torch.arange(whole.size(1))[None]
    with torch.no_grad():
        hidden = model.hidden(whole, everywhere, torch.zeros_like(whole), position)[0, len(tokens) - 1 :]
        log_p = model.logits(hidden, TEXT).log_softmax(-1)
    end = log_p[-1, [Vocabulary.END, *Vocabulary.OPENERS]].logsumexp(-1)
    return float(log_p[torch.arange(len(answer)), answer].sum() + end)


@pytest.mark.parametrize("backbone", ["transformer", "lstm", "mingru"])
def test_names_are_ranked_by_their_likelihood(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment], backbone: str
) -> None:
    model = tiny_model(backbone).eval()
    prompts = [Document((image(n), Segment("en: "))) for n in range(3)] + [Document((image(4),))]
    ranked = rank_names(model, prompts, NAMES, count=len(NAMES), width=len(NAMES))
    for prompt, order in zip(prompts, ranked, strict=True):
        scores = [log_likelihood(model, prompt, name) for name in NAMES]
        assert order == sorted(range(len(NAMES)), key=lambda n: -scores[n])
    assert rank_names(model, prompts, NAMES, count=2, width=len(NAMES)) == [order[:2] for order in ranked]


@pytest.mark.parametrize("backbone", ["transformer", "lstm", "mingru"])
def test_a_prior_is_taken_off_the_likelihood(
    tiny_model: Callable[..., FusedLanguageModel], image: Callable[[int], Segment], backbone: str
) -> None:
    model = tiny_model(backbone).eval()
    for prompts in ([Document((image(n), Segment("en: "))) for n in range(3)], [Document((image(4),))]):
        ranked = rank_names(model, prompts, NAMES, count=len(NAMES), width=len(NAMES), prior=0.5)
        for prompt, order in zip(prompts, ranked, strict=True):
            scores = [
                log_likelihood(model, prompt, name) - 0.5 * log_likelihood(model, prompt, name, hidden_media=True)
                for name in NAMES
            ]
            assert order == sorted(range(len(NAMES)), key=lambda n: -scores[n])


def test_many_labels_are_judged_too_and_the_right_one_is_among_the_five_best() -> None:
    rng = np.random.default_rng(0)
    labels = [f"label {n}" for n in range(MANY + 10)]
    centres = rng.standard_normal((len(labels), 64))

    def media(spread: float, each: int) -> Labelled:
        of = list(range(len(labels))) * each
        arrays = [centres[n] + spread * rng.standard_normal(64) for n in of]
        return Labelled(arrays=arrays, labels=[labels[n] for n in of])

    judge = Judge(lambda array: array, media(0.3, 8))
    unseen = media(0.3, 2)
    figures = judge.figures("it", unseen.arrays, unseen.labels)
    assert figures["it_accuracy"] > 0.95 and figures["it_top5"] >= figures["it_accuracy"]
    assert judge.best(unseen.arrays, 1)[0] == [judge.classifier.predict(unseen.arrays[:1])[0]]
