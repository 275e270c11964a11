"""Documents whose segments are in free order and longer than the context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pile_app.data.datamodule import PackDataset
from pile_app.data.order import Phase, TrainingOrder
from pile_app.data.shards import write_shards
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import IMAGE, TEXT, Document, Segment
from pile_app.vocabulary import Vocabulary

VOCABULARY = Vocabulary(image_codes=12, image_shape=(1, 8, 8), image_grid=(2, 2))
CONTEXT = 32


def packs(documents: list[Document], folder: Path) -> PackDataset:
    write_shards(documents, folder, "x")
    source = SourceData("x", str(folder / "*.tar"), VOCABULARY, ByteTokenizer(), CONTEXT)
    order = TrainingOrder([source.order(0)], [Phase(0, (1,))])
    return PackDataset([source], order, VOCABULARY, ByteTokenizer(), CONTEXT, 1)


def test_free_order_is_drawn_anew_in_each_epoch(tmp_path: Path, image: Callable[[int], Segment]) -> None:
    dataset = packs([Document((image(0), Segment("one")), "a", ordered=False)], tmp_path)
    openers = [int(dataset[position].tokens[0, 1]) for position in range(20)]
    assert set(openers) == {Vocabulary.OPENERS[TEXT], Vocabulary.OPENERS[IMAGE]}


def test_a_cut_document_in_free_order_is_predicted_once_in_each_epoch(tmp_path: Path, image: Callable[[int], Segment]) -> None:
    text = "a text that is longer than the context of 32 tokens, so it is cut"
    dataset = packs([Document((image(0), Segment(text)), "a", ordered=False)], tmp_path)
    order = dataset.order
    assert isinstance(order, TrainingOrder) and order.packs_per_epoch == 3
    for epoch in range(8):
        seen = [dataset[position] for position in range(3 * epoch, 3 * epoch + 3)]
        assert not any(pack.rejected for pack in seen)
        predicted = np.concatenate([pack.tokens.flatten()[pack.targets[TEXT] + 1] for pack in seen])
        assert sorted(predicted) == sorted(
            [Vocabulary.OPENERS[IMAGE], Vocabulary.OPENERS[TEXT], Vocabulary.END]
            + [byte + Vocabulary.SPECIALS for byte in text.encode()]
        )
        assert sum(len(pack.targets[IMAGE]) for pack in seen) == VOCABULARY.image_tokens
