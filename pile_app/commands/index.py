"""`pile index`: write or check the manifest of shards that came from elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pile_app.data.manifest import Again
    from pile_app.data.remote import ShardCache
    from pile_app.data.shards import Shards

SUMMARY = "write the manifest of shards that came from elsewhere, or check shards against it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "New and changed shards are indexed. The manifest of s3:// and other writable URLs is uploaded next to them."
    )
    parser.add_argument("shards", nargs="+", help="paths, URLs or quoted patterns, e.g. 'shards/train-{000..099}.tar'")
    parser.add_argument("--fields", help="which files and JSON fields of a sample are learned, e.g. '[jpg, json.caption|txt]'")
    parser.add_argument("--tokenizer", default="bytes", help="count tokens with this tokenizer.json as well")
    parser.add_argument("--overwrite", action="store_true", help="index all shards again")
    parser.add_argument("--verify", action="store_true", help="write nothing: compare every sample with its checksum")
    parser.add_argument("--cache", help="folder for remote shards (default: that of training, ~/.cache/pile/shards)")
    parser.add_argument("--processes", type=int, help="number of processes (default: one for each core)")


def run(options: argparse.Namespace) -> None:
    from functools import partial

    from pile_app.data.files import ShardError, for_each
    from pile_app.data.shards import Shards, describe_balance
    from pile_app.data.tokenizers import load_tokenizer

    again: Again = "all" if options.overwrite else "" if options.verify else "changed"
    cache = shard_cache(options.cache)
    tokenizer = load_tokenizer(options.tokenizer)
    shards = Shards(options.shards, cache, options.fields, tokenizer, options.processes, again)
    if not options.verify:
        print(f"{describe_balance(shards.balance())}\n{', '.join(shards.publish())}")
        return
    found = for_each(partial(differing, shards), range(len(shards.paths)), options.processes)
    for path, keys in zip(shards.paths, found, strict=True):
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
    """Keys of the documents of a shard whose bytes differ from the manifest."""
    from pile_app.documents import BadSample

    keys = []
    for sample in range(len(shards.index(shard))):
        try:
            shards.block(shard, sample)
        except BadSample:
            keys.append(shards.index(shard).key(sample))
    return keys
