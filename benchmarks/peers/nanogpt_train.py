"""`train.py` with nanoGPT's embedding and head: one table of deviation 0.02 for both, no norm, logits capped only at 80.

    python benchmarks/peers/nanogpt_train.py --config benchmarks/peers/nanogpt.yaml

For `time_to_loss.py`. With our own embedding and head nanoGPT's rates end at 2.06 and not at its 1.89, which would flatter us.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch.nn.functional as F
from torch import Tensor, nn

from pile_app.model import fused
from pile_app.model.backbones import Cache
from pile_app.model.fused import FusedLanguageModel
from pile_app.training import cli, module


class TiedLanguageModel(FusedLanguageModel):
    """Of text alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.normal_(self.embeddings[0].weight, std=0.02)
        self.heads = self.embeddings

    def hidden(
        self,
        tokens: Tensor,
        image_places: Tensor,
        document: Tensor,
        position: Tensor,
        cache: Cache | None = None,
        piece_starts: Tensor | None = None,
    ) -> Tensor:
        return self.backbone(F.embedding(tokens, self.embeddings[0]()), document, position, cache)


if __name__ == "__main__":
    fused.LOGIT_CAP = 80.0
    module.FusedLanguageModel = TiedLanguageModel
    cli.main()
