"""Commands on data sets; `pile prepare` is `pile_app.prepare.pipeline.prepare` itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pile_app.data.remote import ShardCache
    from pile_app.data.shards import Shards
    from pile_app.documents import BadSample, Document


def index(
    shards: Sequence[str], *, fields: str | None = None, tokenizer: str = "bytes", overwrite: bool = False,
    verify: bool = False, cache: str | None = None, processes: int | None = None,
) -> None:  # fmt: skip
    """Write the manifest of shards that came from elsewhere, or check shards against it.

    New and changed shards are indexed. The manifest of s3:// and other writable URLs is uploaded next to them.

    Args:
        shards: paths, URLs or quoted patterns, e.g. 'shards/train-{000..099}.tar'
        fields: the files and JSON fields of a sample that are learned, e.g. '[jpg, json.caption|txt]'
        tokenizer: count tokens with this tokenizer.json as well
        overwrite: index all shards again
        verify: write nothing: compare every sample with its checksum
        cache: folder for remote shards (default: that of training, ~/.cache/pile/shards)
    """
    from functools import partial

    from pile_app.data.files import ShardError, for_each
    from pile_app.data.shards import Shards, describe_balance
    from pile_app.data.tokenizers import load_tokenizer

    again: Literal["", "all", "changed"] = "all" if overwrite else "" if verify else "changed"
    opened = Shards(shards, shard_cache(cache), fields, load_tokenizer(tokenizer), processes, again)
    if not verify:
        print(f"{describe_balance(opened.balance())}\n{', '.join(opened.publish())}")
        return
    found = for_each(partial(differing, opened), range(len(opened.paths)), processes)
    for path, keys in zip(opened.paths, found, strict=True):
        print(f"{path}: {f'{len(keys):,} documents differ: ' + ', '.join(keys[:5]) if keys else 'as indexed'}", flush=True)
    if count := sum(map(len, found)):
        raise ShardError(
            f"{count:,} documents differ from what was indexed: fetch those shards again, or run `pile index --overwrite` to "
            "accept them (runs that were trained on them will not resume)"
        )


def shard_cache(folder: str | None = None) -> ShardCache:
    from pile_app.data.files import cache_folder
    from pile_app.data.remote import ShardCache

    return ShardCache(folder or cache_folder() / "shards", int(100e9))


def open_shards(patterns: str | Sequence[str]) -> Shards:
    """Open shards; remote shards are fetched into the default cache."""
    from pile_app.data.shards import Shards

    return Shards(patterns, shard_cache())


def differing(shards: Shards, shard: int) -> list[str]:
    """List the keys of the documents of a shard whose bytes differ from the manifest."""
    from pile_app.documents import BadSample

    keys = []
    for sample in range(len(shards.index(shard))):
        try:
            shards.block(shard, sample)
        except BadSample:
            keys.append(shards.index(shard).key(sample))
    return keys


def tokenizer(input: str, output: Path, *, kind: Literal["bpe", "words"], size: int) -> None:
    """Train a tokenizer on the texts of shards, of a file or of a folder.

    Args:
        input: shards (a quoted pattern *.tar), a text file, or a folder of text files
        output: the tokenizer.json to write
        kind: byte-level BPE, or whole words
        size: largest number of tokens
    """
    from itertools import chain

    from pile_app.data.tokenizers import clean_text, load_tokenizer, train_tokenizer
    from pile_app.documents import TEXT, Document
    from pile_app.prepare.options import Options
    from pile_app.prepare.readers import read_documents

    is_shards = input.endswith(".tar")
    documents = open_shards(input) if is_shards else (one for _, one in read_documents(input, Options(kind="text")))
    segments = (segment for one in documents if isinstance(one, Document) for segment in one.segments)
    texts = (one.text if is_shards else clean_text(one.text) for one in segments if one.modality == TEXT)
    first = next(texts, None)
    if first is None:
        raise ValueError(f"{input!r} holds no text: give shards ('shards/*.tar'), or a folder of text files")
    train_tokenizer(chain([first], texts), kind, size, output)
    print(f"{output}: {load_tokenizer(str(output)).size:,} tokens; train with --model.tokenizer {output}")


def encode(
    paths: Sequence[str], *, tokenizer: str | None = None, checkpoint: str = "auto", device: str = "auto", batch: int = 64,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write shards again as token ids, so that training need not encode them: pile encode RUN SHARDS... OUTPUT.

    Train with model.codecs_from RUN/checkpoints/last.ckpt and model.codec_steps 0; other codecs are refused.

    Args:
        paths: folder of the run (not with --tokenizer), shards (quoted patterns), and the new folder
        tokenizer: instead of a run: encode the texts alone, with this tokenizer.json
        batch: images or sounds that are encoded at once
        overwrite: replace shards that are there already
    """
    from pile_app.data.tokenizers import load_tokenizer
    from pile_app.tasks.encode import Encoders, describe_counts, encode_shards

    if len(paths) < (2 if tokenizer else 3):
        raise ValueError("pile encode takes RUN SHARDS OUTPUT, or --tokenizer FILE SHARDS OUTPUT")
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, not {batch}")
    *inputs, folder = paths
    shards = open_shards(inputs if tokenizer else inputs[1:])
    if tokenizer:
        encoders = Encoders(load_tokenizer(tokenizer), batch=batch)
    else:
        from pile_app.training.load import load_on

        module, _, saved = load_on(Path(inputs[0]), checkpoint, device)
        encoders = Encoders.of_run(inputs[0], module, saved["global_step"], batch)
    found = encode_shards(shards, Path(folder), encoders, overwrite)
    print(f"{len(found):,} shards in {folder}: {describe_counts(list(found.values()))}")


def inspect(
    paths: Sequence[str], *, step: int | None = None, position: str | None = None, output: Path | None = None,
    limit: int | None = None, duplicates: bool = False, tokenizer: str | None = None, context: int | None = None,
) -> None:  # fmt: skip
    """Show what a data set holds, or what a run was trained on in a step or at positions.

    Args:
        paths: folders of `pile prepare`, shards (folder or quoted pattern), a run or a configuration; for a step or positions,
            the folder of the run
        step: show what a run was trained on in this optimizer step, counted from 1
        position: P or P:Q: show the packs at positions P up to Q (Q excluded) of a run
        output: folder for the results (default: inspect/ next to what is inspected)
        limit: show at most this many documents (default: all; of a data set, 8 for each source)
        duplicates: read all shards, to count what occurs more than once
        tokenizer: bytes or a tokenizer.json to count with (default: that of the run, or bytes)
        context: tokens of a pack (default: those of the run, or 512)
    """
    first = Path(paths[0])
    if step is None and position is None:
        from pile_app.tasks.inspection import format_statistics, inspect_data

        inside = (first / "config.yaml", first / "inspect" / "data"), (first / "dataset.json", first / "inspect")
        folder = output or next((folder for file, folder in inside if file.is_file()), Path("inspect"))
        print(format_statistics(inspect_data(paths, folder, tokenizer, context, duplicates, 8 if limit is None else limit)))
        print(f"saved in {folder}: open {folder / 'documents.html'}")
        return
    from pile_app.tasks.inspection import inspect_training

    if step is not None and position is not None:
        raise ValueError("give --step or --position, not both")
    if len(paths) > 1 or duplicates or tokenizer or context:
        raise ValueError("--step and --position take one run, and neither --duplicates, --tokenizer nor --context")
    asked: int | tuple[int, int] = parse_positions(position) if position is not None else step or 0
    name = f"step-{step}" if position is None else f"position-{position.replace(':', '-')}"
    folder = output or first / "inspect" / name
    print(inspect_training(first, asked, folder, limit))
    print(f"saved in {folder}: open {folder / 'documents.html'}")


def parse_positions(text: str) -> tuple[int, int]:
    """Parse `7` or `7:12`, where 12 is excluded, to (first, stop)."""
    first, colon, stop = text.partition(":")
    try:
        return int(first), int(stop) if colon else int(first) + 1
    except ValueError:
        raise ValueError(f"--position {text!r} is neither a position, as 7, nor a range, as 7:12") from None


RECORDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".conll", ".bio", ".iob")


def read_texts(path: Path) -> Iterator[tuple[str, Document | BadSample]]:
    """Yield (file:line, document) of each line of a text file, or of each row or record of a table, JSON lines or CoNLL."""
    from pile_app.documents import Document, Segment
    from pile_app.prepare.readers import read_documents

    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    if path.suffix.lower() not in RECORDS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", Document((Segment(line.strip()),))
        return
    yield from read_documents(path)


def parse_sources(given: Sequence[str]) -> dict[str, str]:
    """Parse --on: SHARDS or NAME=SHARDS each, to name -> pattern. Raises ValueError for a name that is given twice."""
    import re

    sources: dict[str, str] = {}
    for one in given:
        name, equals, pattern = one.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            pattern, name = one, re.split(r"[\[{*?]|\.tar", Path(one).name)[0].strip("-_.") or "shards"
        if not pattern:
            raise ValueError(f"--on {one!r} names no shards: give SHARDS or NAME=SHARDS, e.g. --on 'books=shards/books-*.tar'")
        if name in sources:
            raise ValueError(f"--on names {name!r} twice: give each set of shards its own name, --on NAME=SHARDS")
        sources[name] = pattern
    return sources
