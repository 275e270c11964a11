"""Constrained choice: the answer is one of some given texts, with its exact probability.

A text's log-probability is that of all its tokens *and of ending there*, so that "one" is not favoured over "one hundred" for
being its beginning. Choosing among the texts by these is drawing from the model given that its answer is one of them; to forbid
tokens one by one would not be: it weighs a text by how few others share its beginning.

The prompt is read once; all texts continue its cache side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pile_app.documents import TEXT, Document
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Rows, check_modalities, evaluating
from pile_app.model.sampling import Sampling, Uniforms, draw
from pile_app.model.segments import prompt_tokens
from pile_app.vocabulary import Vocabulary

AT_ONCE = 64  # texts that are scored side by side


@dataclass(frozen=True)
class Choice:
    """`number` of the text that was chosen; (C,) log-probabilities of all of them by the model, which need not sum to 1."""

    number: int
    log_probabilities: Tensor


@torch.no_grad()
def choose(
    model: FusedLanguageModel, prompts: Sequence[Document], texts: Sequence[str], sampling: Sampling | None = None
) -> list[Choice]:
    """One of the texts for each prompt, as if the model's own answer had been drawn until it was one of them. Temperature 0
    takes the most likely; other temperatures and `top_p` hold for the choice among the texts.

    Raises:
        ValueError: fewer than two texts, one of nothing, or one twice.
        BadSample: a medium of a prompt cannot be decoded.
    """
    if len(texts) < 2 or not all(texts) or len(set(texts)) < len(texts):
        raise ValueError(f"choices are two or more different texts, none of them empty, not {list(texts)}")
    sampling = replace(sampling or Sampling(), use_cache=True)
    check_modalities(model, TEXT, prompts)
    device = model.token_bytes.device
    ids = [torch.from_numpy(model.tokenizer.encode(text)).long().to(device) + Vocabulary.SPECIALS for text in texts]
    choices = []
    with evaluating(model):
        for number, prompt in enumerate(prompts):
            rows = Rows(model, [prompt_tokens(model, prompt, TEXT)], sampling, [number])
            first = rows.logits(TEXT).log_softmax(-1)
            parts = (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))
            scores = torch.cat([_score(rows, first, part) for part in parts])
            drawn = draw(scores[None], sampling, Uniforms(sampling.seed, [number], device))
            choices.append(Choice(int(drawn), scores))
    return choices


def _score(rows: Rows, first: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """(C,) log-probabilities that what follows is each text and then no more text. `first`: (1, V) those of the first token."""
    tokens = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)  # (C, L)
    later = rows.look_ahead(tokens).log_softmax(-1)
    log_probabilities = torch.cat([first[:, None].expand(len(tokens), -1, -1), later], 1)  # (C, 1 + L, V)
    each = log_probabilities[:, :-1].gather(2, tokens[:, :, None]).squeeze(2)
    lengths = torch.tensor([len(text) for text in texts], device=tokens.device)
    inside = torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None]
    ends = log_probabilities[:, :, [Vocabulary.END, *Vocabulary.OPENERS]].logsumexp(-1)
    return each.masked_fill(~inside, 0).sum(1) + ends.gather(1, lengths[:, None]).squeeze(1)
