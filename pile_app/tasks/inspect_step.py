"""What an optimizer step was trained on: `pile inspect`.

The order of the data is a pure function of the position, so step N (the one after which `global_step` is N) saw the packs at
positions [(N - 1) * G, N * G), G being `data.global_batch`; nothing has to be logged while training. Texts and media are those
that the packs held: segments in the order drawn for that epoch, pieces of cut documents, hidden conditions.

`documents.json` in the output folder:

    {"run", "step", "trained", "phase": "codecs" | "language model", "positions": [first, stop], "found": documents of the step,
     "documents": [{"position", "source", "epoch", "key", "tokens": [start, stop] of the document, "place": first in the pack,
                    "rejected": null | {"reason", "detail"},
                    "segments": [{"modality", "text" | "file", "hidden", "learned"}]}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pile_app.data.datamodule import PackDataset, PackedDocument, PileDataModule
from pile_app.data.text import Tokenizer
from pile_app.documents import AUDIO, MODALITIES, TEXT, BadSample, Segment, Vocabulary, audio_size
from pile_app.training.load import load_run


def inspect_step(run: Path, step: int, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Writes the documents of step `step` into `folder`: their media as stored and `documents.json`, which is returned.

    Args:
        run: folder of the run.
        step: 1 or more; a step that is still to come is told as planned.
        folder: is made where it is missing.
        limit: at most so many documents; None: all.

    Raises:
        ValueError: `step` or `limit` is below 1, or the data are not what the run was trained on.
        ShardError: a shard or its index is missing.
    """
    if step < 1 or (limit is not None and limit < 1):
        raise ValueError(f"steps and limits count from 1, not step {step} and limit {limit}")
    module, data, checkpoint = load_run(run)
    data.setup()
    check_same_data(data, checkpoint["PileDataModule"])
    folder.mkdir(parents=True, exist_ok=True)
    first, stop = (step - 1) * data.global_batch, step * data.global_batch
    dataset = data.train_dataset()
    documents: list[dict[str, Any]] = []
    for position in range(first, stop):
        if limit is not None and len(documents) >= limit:
            break
        documents += describe_pack(dataset, position, folder)
    description = {
        "run": str(run),
        "step": step,
        "trained": step <= checkpoint["global_step"],
        "phase": "codecs" if step <= module.codec_steps else "language model",
        "positions": [first, stop],
        "found": sum(len(dataset.order.pack(position)) for position in range(first, stop)),
        "documents": documents[:limit],
    }
    (folder / "documents.json").write_text(json.dumps(description, indent=1, ensure_ascii=False))
    return description


def check_same_data(data: PileDataModule, saved: dict[str, Any]) -> None:
    """Raises ValueError where today's positions are not those of the run that saved `saved`."""
    now = data.identity()
    for name, fingerprint in saved["fingerprints"].items():
        if now["fingerprints"].get(name) != fingerprint:
            shards = repr(data.sources[name].train) if name in data.sources else "gone from config.yaml"
            raise ValueError(
                f"the shards of source {name!r} ({shards}) are not those that the run was trained on (their fingerprint was "
                f"{fingerprint}, now it is {now['fingerprints'].get(name)}): restore them to see what a step was trained on"
            )
    different = [f"{key} was {saved[key]}, now it is {value}" for key, value in now.items() if saved[key] != value]
    if different:
        raise ValueError(f"the run was trained in another order of the data ({'; '.join(different)}): see config.yaml")


def describe_pack(dataset: PackDataset, position: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The entry of each document in the pack of a position; media are written into `folder`."""
    pack = dataset[position]
    used = set(pack.document.tolist())
    rejected = iter(pack.rejected)
    place = 0
    for number, one in enumerate(dataset.documents(position)):
        piece, source = one.piece, dataset.sources[one.piece.source]
        reason = None
        if number not in used:
            _, _, name, detail = next(rejected)
            reason = {"reason": name, "detail": detail}
        yield {
            "position": position,
            "source": source.name,
            "epoch": piece.epoch,
            "key": one.key,
            "tokens": [piece.start, piece.stop],
            "place": place,
            "rejected": reason,
            "segments": [
                _describe_segment(segment, hidden, folder / f"{position}-{number}-{index}")
                for index, hidden, segment in segments_of_piece(one, dataset.vocabulary, dataset.tokenizer)
            ],
        }
        place += piece.stop - piece.start


def segments_of_piece(one: PackedDocument, vocabulary: Vocabulary, tokenizer: Tokenizer) -> Iterator[tuple[int, bool, Segment]]:
    """(number, whether it was hidden, segment) for what lies inside the piece; of a text that was cut, the part inside."""
    if isinstance(one.document, BadSample):
        return
    start, stop = one.piece.start, one.piece.stop
    first = 1  # after `<begin>`
    for number, segment in enumerate(one.document.segments):
        try:
            length = _segment_tokens(segment, vocabulary, tokenizer)
        except BadSample:  # the whole document is rejected, and its pieces cannot be told apart any more
            yield number, number < one.dropped, segment
            continue
        if first < stop and first + length > start:
            if segment.modality == TEXT and (first < start or first + length > stop):
                ids = tokenizer.encode(segment.text)[max(0, start - first - 1) : max(0, stop - first - 1)]
                segment = Segment(tokenizer.decode(ids), "txt", segment.loss)
            yield number, number < one.dropped, segment
        first += length


def _segment_tokens(segment: Segment, vocabulary: Vocabulary, tokenizer: Tokenizer) -> int:
    if segment.modality == TEXT:
        return vocabulary.segment_tokens(TEXT, tokenizer.count(segment.text))
    size, rate = audio_size(segment.file) if segment.modality == AUDIO else (0, 0)
    return vocabulary.segment_tokens(segment.modality, size, rate)


def _describe_segment(segment: Segment, hidden: bool, path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"modality": MODALITIES[segment.modality]}
    if segment.modality == TEXT:
        entry["text"] = segment.text
    else:
        entry["file"] = f"{path.name}.{segment.extension}"
        (path.parent / entry["file"]).write_bytes(segment.file)
    return entry | {"hidden": hidden, "learned": segment.loss and not hidden}


def format_step(description: dict[str, Any], text_limit: int = 100) -> str:
    """For people, one line a segment; texts are shortened to `text_limit` characters."""
    first, stop = description["positions"]
    notes = ["only the codecs learned from it"] if description["phase"] == "codecs" else []
    notes += [] if description["trained"] else ["planned: the checkpoint is from before it"]
    lines = [
        f"step {description['step']} of {description['run']}: positions {first} to {stop - 1}, "
        f"{description['found']} documents" + (f" ({'; '.join(notes)})" if notes else "")
    ]
    position = None
    for one in description["documents"]:
        if one["position"] != position:
            position = one["position"]
            lines.append(f"position {position}: source {one['source']}, epoch {one['epoch']}")
        start, end = one["tokens"]
        lines.append(f"  {one['key']}: tokens {start} to {end - 1}, at place {one['place']}")
        if one["rejected"]:
            lines.append(f"    not used, {one['rejected']['reason']}: {one['rejected']['detail']}")
        for segment in one["segments"]:
            text = segment.get("text", "")
            shown = (
                repr(text[:text_limit]) + (" ..." if len(text) > text_limit else "") if "text" in segment else segment["file"]
            )
            state = " (hidden)" if segment["hidden"] else "" if segment["learned"] else " (given, not learned)"
            lines.append(f"    {segment['modality']} {shown}{state}")
    if len(description["documents"]) < description["found"]:
        lines.append(f"and {description['found'] - len(description['documents'])} more documents")
    return "\n".join(lines)
