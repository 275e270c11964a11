"""`pile index`: shards that came from elsewhere."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pile_app.data.index import ShardIndex
    from pile_app.data.shards import Shards

SUMMARY = "index shards that came from elsewhere, or check them against their index"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="paths or quoted patterns, e.g. 'shards/train-{000..099}.tar'")
    parser.add_argument(
        "--verify", action="store_true", help="write nothing: read every sample and compare its checksum with the index"
    )
    parser.add_argument("--processes", type=int, help="how many work at a time (default: one a core)")


def run(options: argparse.Namespace) -> None:
    from functools import partial

    from pile_app.data.sources import for_each
    from pile_app.data.tar import ShardError

    shards = open_shards(options.shards)
    task = partial(_verify_shard if options.verify else _index_shard, shards)
    differing = 0
    for number, (line, count) in enumerate(for_each(task, range(len(shards)), options.processes)):
        differing += count
        print(f"{shards.paths[number]}: {line}", flush=True)
    if differing:
        raise ShardError(
            f"{differing:,} documents differ from what was indexed: fetch those shards again, or run `pile index` without "
            "--verify to take them as they are (runs that were trained on them will not resume)"
        )


def open_shards(patterns: str | Sequence[str]) -> Shards:
    """Shards of this machine or of others, which are fetched into the default cache."""
    from pile_app.data.remote import ShardCache
    from pile_app.data.shards import Shards, expand_shards
    from pile_app.data.sources import cache_folder

    return Shards(expand_shards(patterns), ShardCache(cache_folder() / "shards", int(100e9)))


def _index_shard(shards: Shards, number: int) -> tuple[str, int]:
    """(what to say of the shard, 0)."""
    from pile_app.data.index import build_index

    if shards.remote[number] and shards.cache is not None:
        Path(shards.local(number)).unlink(missing_ok=True)  # it may be of an earlier version
        shards.cache.fetch(shards.paths[number])
    return describe_index(build_index(shards.local(number))), 0


def _verify_shard(shards: Shards, number: int) -> tuple[str, int]:
    """(what to say of the shard, documents that differ from its index)."""
    from pile_app.documents import BadSample

    if shards.remote[number]:
        shards.make_index(number)
    keys, different = shards.index(number).keys, []
    for sample, key in enumerate(keys):
        try:
            shards.document(number, sample)
        except BadSample:
            different.append(key)
    listed = ", ".join(different[:5] + ["..."] * (len(different) > 5))
    verdict = f"{len(different):,} differ from the index: {listed}" if different else "all as indexed"
    return f"{len(keys):,} documents, {verdict}", len(different)


def describe_index(index: ShardIndex) -> str:
    """`300 documents; 300 text, 150 image; rejected: 2 invalid_json`"""
    from pile_app.documents import MODALITIES

    counts = [(name, int((index.modality == modality).sum())) for modality, name in enumerate(MODALITIES)]
    segments = ", ".join(f"{count:,} {name}" for name, count in counts if count) or "no segments"
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in Counter(r for _, r in index.rejected).most_common())
    return f"{len(index):,} documents; {segments}; rejected: {rejected or 'none'}"
