"""`pile inspect RUN --step N` or `--position P:Q`: the training data of a run at any step or position.

The order of the data is a pure function of the position: step N (after which `global_step` is N) saw the packs at positions
[(N - 1) * G, N * G), where G is `data.global_batch`; nothing is logged while training. Texts and media are those that the packs
held: segments in the order drawn for that epoch, pieces of cut documents, hidden conditions; codes are decoded by the run.

The output folder holds the media, `documents.html`, and `documents.json`: {"run", "step": null for positions, "trained",
"phase", "positions": [first, stop], "found": documents of the positions, "documents": [{"position", "step", "source", "epoch",
"key", "facts", "tokens": [start, stop] of the document, "place": first index in the pack, "rejected": null | {"reason",
"detail"}, "segments": [{"modality", "text" | "file" | "note", "hidden", "learned"}]}]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pile_app.data.assembly import PackedDocument
from pile_app.data.datamodule import PackDataset, PileDataModule
from pile_app.data.index import segment_size
from pile_app.data.tokenizers import Tokenizer
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Segment
from pile_app.tasks.inspect_data import Decode, describe_segment, state_of, write_page
from pile_app.training.load import load_run
from pile_app.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pile_app.model.fused import FusedLanguageModel

TOLD_CHARACTERS = 100  # of a text in the summary


def inspect_training(run: Path, asked: int | tuple[int, int], folder: Path, limit: int | None = None) -> str:
    """Write at most `limit` documents of a step (from 1), or at positions [first, stop) (from 0), into `folder`; return a
    summary. Steps to come are described as planned. Raises ValueError if the data are not those of the run."""
    step = asked if isinstance(asked, int) else None
    if any(number is not None and number < 1 for number in (step, limit)):
        raise ValueError(f"steps and limits count from 1, not step {step}, limit {limit}")
    if not isinstance(asked, int) and not 0 <= asked[0] < asked[1]:
        raise ValueError(f"positions are START:STOP with 0 <= START < STOP, not {asked[0]}:{asked[1]} (STOP is excluded)")
    module, data, checkpoint = load_run(run)
    data.setup()
    check_same_data(data, checkpoint["PileDataModule"])
    batch = data.global_batch
    first, stop = ((asked - 1) * batch, asked * batch) if isinstance(asked, int) else asked
    folder.mkdir(parents=True, exist_ok=True)
    dataset, decode = data.train_dataset(), decoder(module.model)
    entries = (one for position in range(first, stop) for one in describe_pack(dataset, position, batch, folder, decode))
    first_step, last_step = first // batch + 1, (stop - 1) // batch + 1
    phases = ["codecs"] * (first_step <= module.codec_steps) + ["language model"] * (last_step > module.codec_steps)
    description = {
        "run": str(run),
        "step": step,
        "trained": last_step <= checkpoint["global_step"],
        "phase": ", ".join(phases),
        "positions": [first, stop],
        "found": sum(len(dataset.order.pack(position)) for position in range(first, stop)),
        "documents": list(islice(entries, limit)),
    }
    (folder / "documents.json").write_text(json.dumps(description, indent=1, ensure_ascii=False), "utf-8", "backslashreplace")
    return _tell(description, folder)


def check_same_data(data: PileDataModule, saved: dict[str, Any]) -> None:
    """Raise ValueError if today's positions are not those of the run that saved `saved`."""
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


def describe_pack(dataset: PackDataset, position: int, batch: int, folder: Path, decode: Decode) -> Iterator[dict[str, Any]]:
    """Describe each document in the pack of a position; write its media into `folder`."""
    pack = dataset[position]
    used = set(pack.document[0].tolist())
    rejected = iter(pack.rejected)
    place = 0
    for number, one in enumerate(dataset.documents(position)):
        piece = one.piece
        _, _, reason, detail = (None,) * 4 if number in used else next(rejected)
        yield {
            "position": position,
            "step": position // batch + 1,
            "source": dataset.sources[piece.source].name,
            "epoch": piece.epoch,
            "key": one.key,
            "facts": f"tokens {piece.start:,} to {piece.stop - 1:,}, at place {place:,}",
            "tokens": [piece.start, piece.stop],
            "place": place,
            "rejected": {"reason": reason, "detail": detail} if reason else None,
            "segments": [
                describe_segment(segment, folder / f"{position}-{number}-{index}", decode, hidden)
                for index, hidden, segment in segments_of_piece(one, dataset.vocabulary, dataset.tokenizer)
            ],
        }
        place += piece.stop - piece.start


def segments_of_piece(one: PackedDocument, vocabulary: Vocabulary, tokenizer: Tokenizer) -> Iterator[tuple[int, bool, Segment]]:
    """Yield (index, whether it was hidden, segment) for what lies inside the piece; of a text that was cut, the part inside."""
    if isinstance(one.document, BadSample):
        return
    start, stop = one.piece.start, one.piece.stop
    first = 1  # after `<begin>`
    for number, segment in enumerate(one.document.segments):
        ids = None
        try:
            if segment.modality == TEXT:
                ids = segment.codes.values if segment.is_encoded else tokenizer.encode(segment.text)
            size, rate = (len(ids), 0) if ids is not None else segment_size(segment) if segment.modality == AUDIO else (0, 0)
        except BadSample:  # the whole document is rejected, and its pieces cannot be told apart any more
            yield number, number < one.dropped, segment
            continue
        last = first + vocabulary.segment_tokens(segment.modality, size, rate)
        if first < stop and last > start:
            if ids is not None and (first < start or last > stop):
                inside = ids[max(0, start - first - 1) : max(0, stop - first - 1)]
                segment = Segment(tokenizer.decode(inside), "txt", segment.loss)
            yield number, number < one.dropped, segment
        first = last


def decoder(model: FusedLanguageModel) -> Decode:
    """Make a function that decodes what tokenizer and codecs of a model encoded."""
    import torch

    from pile_app.model.segments import decode_codes

    sizes = {TEXT: model.tokenizer.size, IMAGE: model.vocabulary.image_codes, AUDIO: model.vocabulary.audio_codes}

    def decode(segment: Segment) -> Segment | None:
        values = segment.codes.values
        fits = segment.modality != IMAGE or len(values) == model.vocabulary.image_tokens
        if not fits or int(values.max(initial=0)) >= sizes[segment.modality]:
            return None  # another codec made them
        if segment.modality == TEXT:
            return Segment(model.tokenizer.decode(values), "txt", segment.loss)
        with torch.no_grad():
            return decode_codes(model, [values.tolist()], segment.modality)[0]

    return decode


def _tell(description: Mapping[str, Any], folder: Path) -> str:
    """Write the page, and return the summary."""
    first, stop = description["positions"]
    where = f"positions {first} to {stop - 1}" if stop > first + 1 else f"position {first}"
    run, step = description["run"], description["step"]
    notes = [f"trained in this phase: {description['phase']}"] if "codecs" in description["phase"] else []
    notes += [] if description["trained"] else ["planned: the checkpoint is from before it"]
    what = run if step is None else f"step {step} of {run}"
    lines = [f"{what}: {where}, {description['found']} documents" + (f" ({'; '.join(notes)})" if notes else "")]
    groups = []
    for position, group in groupby(description["documents"], itemgetter("position")):
        documents = list(group)
        of_pack = f"{documents[0]['source']}, epoch {documents[0]['epoch']}"
        groups.append((f"Position {position}: {of_pack}, step {documents[0]['step']}", documents))
        lines.append(f"position {position}: source {of_pack}")
        for one in documents:
            lines.append(f"  {one['key']}: {one['facts']}")
            if one["rejected"]:
                lines.append(f"    not used, {one['rejected']['reason']}: {one['rejected']['detail']}")
            for segment in one["segments"]:
                shown, state = segment.get("file") or segment.get("note") or "", state_of(segment)
                if (text := segment.get("text")) is not None:
                    shown = repr(text[:TOLD_CHARACTERS]) + " ..." * (len(text) > TOLD_CHARACTERS)
                lines.append(f"    {segment['modality']} {shown}" + f" ({state})" * bool(state))
    if len(description["documents"]) < description["found"]:
        lines.append(f"and {description['found'] - len(description['documents'])} more documents")
    write_page(f"{Path(run).resolve().name}: {where if step is None else f'step {step}'}", notes, groups, folder)
    return "\n".join(lines)
