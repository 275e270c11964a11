"""Pile itself, by the loader that `train.py` uses: `PileDataModule.train_dataloader`, one worker.

Packs are of CONTEXT tokens. An image takes 125 codes and a clip 250, so that 32 images or 16 clips fill one; no model is there
that would turn them into codes, and the loader does not need one. Tokens of places that hold nothing do not count; `<begin>`,
`<text>` and `<end>` of a document do, where the peers have one token (0.4 % of the BPE tokens, less of the bytes).

Resuming starts at an optimizer step, as from a checkpoint. Imports stand in functions: as with `train.py`, processes that help
with the data import this file too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Packs of a batch, much as the others'.
PACKS = {"text_bytes": 32, "text_bpe": 8, "text_tokens": 8, "image": 1, "ogg": 1, "flac": 1}


def open_module(figure: str, folder: Path) -> Any:
    from contest import CONTEXT, DATA_OF, RATE

    from pile_app.data.datamodule import PileDataModule, Source
    from pile_app.data.tokenizers import load_tokenizer
    from pile_app.vocabulary import Vocabulary

    data = "encoded" if figure == "text_tokens" else DATA_OF[figure]
    tokenizer = load_tokenizer(str(folder / "tokenizer.json") if figure in ("text_bpe", "text_tokens") else "bytes")
    media: dict[str, Any] = {}
    if figure == "image":
        media = {"image_codes": 1000, "image_shape": (3, 256, 256), "image_grid": (5, 25)}
    if figure in ("ogg", "flac"):
        media = {"audio_codes": 1000, "sample_rate": RATE, "samples_per_token": 320}
    return PileDataModule(
        {data: Source(str(folder / "tars" / data / "*.tar"))},
        Vocabulary(text_tokens=tokenizer.size, tokenizer=tokenizer.fingerprint, **media),
        tokenizer,
        context=CONTEXT,
        global_batch=PACKS[figure],
        num_workers=1,
    )


def has_data(figure: str, folder: Path) -> bool:
    return figure != "text_tokens" or any((folder / "tars" / "encoded").glob("*.tar"))


def encode_text(folder: Path) -> None:
    """Writes `tars/encoded`: the shards of `tars/text` with token ids in place of text."""
    from pile_app.cli import main as pile

    tokenizer = str(folder / "tokenizer.json")
    pile(["encode", "--tokenizer", tokenizer, str(folder / "tars" / "text" / "*.tar"), str(folder / "tars" / "encoded")])


def prepare(folder: Path) -> None:
    """Indexes and token counts, as at the start of a run; anew where an earlier version of Pile left them."""
    from pile_app.data.index import INDEX_SUFFIX, load_index
    from pile_app.data.tar import ShardError

    encode_text(folder)
    for path in (folder / "tars").glob("*/*.tar"):
        try:
            load_index(str(path))
        except ShardError:
            Path(f"{path}{INDEX_SUFFIX}").unlink(missing_ok=True)
    for figure in PACKS:
        if has_data(figure, folder):
            open_module(figure, folder).prepare_data()


def open_loader(figure: str, folder: Path, fraction: float = 0, state: None = None) -> Iterable[Any]:
    if not has_data(figure, folder):
        raise SystemExit("there are no encoded shards yet")
    module = open_module(figure, folder)
    module.setup("fit")
    step = int(fraction * module.order.packs_per_epoch / module.global_batch)
    # What the module asks of a trainer.
    module.trainer = SimpleNamespace(
        distributed_sampler_kwargs=None, local_rank=0, global_step=step, max_steps=1 << 40, training=True
    )
    return module.train_dataloader()


def units(batch: Any, figure: str) -> int:
    assert not batch.rejected, batch.rejected[0]
    if figure.startswith("text"):
        return sum(stop - start for pack in batch.documents for _, _, _, start, stop in pack)
    return len(batch.images) if figure == "image" else len(batch.audio_starts)


if __name__ == "__main__":
    from contest import main

    main(open_loader, prepare, units=units, imports=("pile_app.data.datamodule", "pile_app.data.tokenizers"))
