"""What a run was trained on, at any step or position: `pile inspect RUN --step N`, `pile inspect RUN --position P:Q`.

The order of the data is a pure function of the position, so step N (the one after which `global_step` is N) saw the packs at
positions [(N - 1) * G, N * G), G being `data.global_batch`; nothing has to be logged while training. Texts and media are those
that the packs held: segments in the order drawn for that epoch, pieces of cut documents, hidden conditions. Segments that were
stored encoded are decoded, by the tokenizer and the codecs of the run.

The output folder holds the media, `documents.html` to look at and listen to, and `documents.json`:

    {"run", "step": null where positions were asked for, "trained", "phase": "codecs" | "language model" | both with a comma,
     "positions": [first, stop], "found": documents of the positions,
     "documents": [{"position", "step", "source", "epoch", "key", "tokens": [start, stop] of the document,
                    "place": first in the pack, "rejected": null | {"reason", "detail"},
                    "segments": [{"modality", "text" | "file" | "note", "hidden", "learned"}]}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pile_app.data.assembly import PackedDocument
from pile_app.data.datamodule import PackDataset, PileDataModule
from pile_app.data.shards import segment_size
from pile_app.data.text import Tokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Segment, Vocabulary
from pile_app.tasks.inspect_page import Decode, describe_segment, state_of, write_page
from pile_app.training.load import load_run

if TYPE_CHECKING:
    from pile_app.model.fused import FusedLanguageModel


def inspect_step(run: Path, step: int, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Writes the documents of step `step` into `folder`, as `inspect_positions` does, and returns `documents.json`.

    Raises:
        ValueError: `step` is below 1; see `inspect_positions` for more.
    """
    if step < 1:
        raise ValueError(f"steps and limits count from 1, not step {step}")
    return _inspect(run, lambda batch: ((step - 1) * batch, step * batch), folder, limit, step)


def inspect_positions(run: Path, first: int, stop: int, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Writes the documents at positions [first, stop) into `folder`: their media, `documents.html` and `documents.json`, which
    is returned.

    Args:
        run: folder of the run.
        first: 0 or more; positions that are still to come are told as planned.
        stop: above `first`.
        folder: is made where it is missing.
        limit: at most so many documents; None: all.

    Raises:
        ValueError: the positions are none, `limit` is below 1, or the data are not what the run was trained on.
        ShardError: a shard or its index is missing.
    """
    if not 0 <= first < stop:
        raise ValueError(f"positions count from 0 and have to be some, not {first}:{stop} (the last one is not included)")
    return _inspect(run, lambda batch: (first, stop), folder, limit, None)


def parse_positions(text: str) -> tuple[int, int]:
    """(first, stop) of `7` or `7:12`, where 12 is not included."""
    first, colon, stop = text.partition(":")
    try:
        return int(first), int(stop) if colon else int(first) + 1
    except ValueError:
        raise ValueError(f"--position {text!r} is neither a position, as 7, nor a range, as 7:12") from None


def _inspect(
    run: Path, positions: Callable[[int], tuple[int, int]], folder: Path, limit: int | None, step: int | None
) -> dict[str, Any]:
    """`positions`: (first, stop) from the packs of an optimizer step."""
    if limit is not None and limit < 1:
        raise ValueError(f"steps and limits count from 1, not limit {limit}")
    module, data, checkpoint = load_run(run)
    data.setup()
    check_same_data(data, checkpoint["PileDataModule"])
    folder.mkdir(parents=True, exist_ok=True)
    first, stop = positions(data.global_batch)
    dataset = data.train_dataset()
    decode = decoder(module.model)
    documents: list[dict[str, Any]] = []
    for position in range(first, stop):
        if limit is not None and len(documents) >= limit:
            break
        of_step = position // data.global_batch + 1
        documents += [{"step": of_step} | one for one in describe_pack(dataset, position, folder, decode)]
    first_step, last_step = first // data.global_batch + 1, (stop - 1) // data.global_batch + 1
    phases = ["codecs"] * (first_step <= module.codec_steps) + ["language model"] * (last_step > module.codec_steps)
    description = {
        "run": str(run),
        "step": step,
        "trained": last_step <= checkpoint["global_step"],
        "phase": ", ".join(phases),
        "positions": [first, stop],
        "found": sum(len(dataset.order.pack(position)) for position in range(first, stop)),
        "documents": documents[:limit],
    }
    (folder / "documents.json").write_text(json.dumps(description, indent=1, ensure_ascii=False), "utf-8", "backslashreplace")
    groups = [
        (f"Position {position}: {of_pack[0]['source']}, epoch {of_pack[0]['epoch']}, step {of_pack[0]['step']}", of_pack)
        for position, of_pack in _groups(documents[:limit], "position")
    ]
    write_page(f"{run.resolve().name}: {_asked_for(description)}", _notes(description), groups, folder)
    return description


def _groups(documents: Iterable[dict[str, Any]], key: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    for value, group in groupby(documents, lambda one: one[key]):
        yield value, list(group)


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
    different = [f"{key} was {saved.get(key)}, now it is {value}" for key, value in now.items() if saved.get(key) != value]
    if different:
        raise ValueError(f"the run was trained in another order of the data ({'; '.join(different)}): see config.yaml")


def describe_pack(dataset: PackDataset, position: int, folder: Path, decode: Decode) -> Iterator[dict[str, Any]]:
    """The entry of each document in the pack of a position; media are written into `folder`."""
    pack = dataset[position]
    used = set(pack.document[0].tolist())
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
                describe_segment(segment, folder / f"{position}-{number}-{index}", decode, hidden)
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
                ids = segment.codes.values if segment.is_encoded else tokenizer.encode(segment.text)
                inside = ids[max(0, start - first - 1) : max(0, stop - first - 1)]
                segment = Segment(tokenizer.decode(inside), "txt", segment.loss)
            yield number, number < one.dropped, segment
        first += length


def _segment_tokens(segment: Segment, vocabulary: Vocabulary, tokenizer: Tokenizer) -> int:
    if segment.modality == TEXT:
        tokens = len(segment.codes.values) if segment.is_encoded else tokenizer.count(segment.text)
        return vocabulary.segment_tokens(TEXT, tokens)
    return vocabulary.segment_tokens(segment.modality, *(segment_size(segment) if segment.modality == AUDIO else (0, 0)))


def decoder(model: FusedLanguageModel) -> Decode:
    """Decodes what tokenizer and codecs of a model encoded."""
    import torch

    from pile_app.model.generate import _decode

    sizes = {TEXT: model.tokenizer.size, IMAGE: model.vocabulary.image_codes, AUDIO: model.vocabulary.audio_codes}

    def decode(segment: Segment) -> Segment | None:
        try:
            values = segment.codes.values
        except BadSample:
            return None
        fits = segment.modality != IMAGE or len(values) == model.vocabulary.image_tokens
        if not fits or int(values.max(initial=0)) >= sizes[segment.modality]:
            return None  # another codec made them
        if segment.modality == TEXT:
            return Segment(model.tokenizer.decode(values), "txt", segment.loss)
        with torch.no_grad():
            return _decode(model, [torch.from_numpy(values.astype("int64"))], segment.modality)[0]

    return decode


def _asked_for(description: Mapping[str, Any]) -> str:
    first, stop = description["positions"]
    if description["step"] is not None:
        return f"step {description['step']}"
    return f"position {first}" if stop == first + 1 else f"positions {first} to {stop - 1}"


def _notes(description: Mapping[str, Any]) -> list[str]:
    """What one has to know of these positions."""
    notes = {
        "codecs": ["only the codecs learned from it"],
        "codecs, language model": ["first the codecs learned, then the rest"],
    }
    planned = [] if description["trained"] else ["planned: the checkpoint is from before it"]
    return notes.get(description["phase"], []) + planned


def format_step(description: dict[str, Any], text_limit: int = 100) -> str:
    """For people, one line a segment; texts are shortened to `text_limit` characters."""
    first, stop = description["positions"]
    notes = _notes(description)
    what = f"step {description['step']} of {description['run']}" if description["step"] is not None else description["run"]
    where = f"positions {first} to {stop - 1}" if stop > first + 1 else f"position {first}"
    lines = [f"{what}: {where}, {description['found']} documents" + (f" ({'; '.join(notes)})" if notes else "")]
    for position, documents in _groups(description["documents"], "position"):
        lines.append(f"position {position}: source {documents[0]['source']}, epoch {documents[0]['epoch']}")
        for one in documents:
            start, end = one["tokens"]
            lines.append(f"  {one['key']}: tokens {start} to {end - 1}, at place {one['place']}")
            lines += describe_lines(one, text_limit)
    if len(description["documents"]) < description["found"]:
        lines.append(f"and {description['found'] - len(description['documents'])} more documents")
    return "\n".join(lines)


def describe_lines(one: Mapping[str, Any], text_limit: int = 100) -> list[str]:
    """A line for each segment of a document, and for why it was not used."""
    lines = [f"    not used, {one['rejected']['reason']}: {one['rejected']['detail']}"] if one["rejected"] else []
    for segment in one["segments"]:
        text = segment.get("text", "")
        shown = repr(text[:text_limit]) + (" ..." if len(text) > text_limit else "") if "text" in segment else ""
        lines.append(f"    {segment['modality']} {shown or segment.get('file') or segment['note']}{state_of(segment, ' ({})')}")
    return lines
