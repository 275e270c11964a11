"""datatrove: JSON lines -> duplicates dropped -> tokens, by its local executor.

    python datatrove_peer.py INPUT OUTPUT TOKENIZER PROCESSES exact|minhash|none [--ftfy]

https://github.com/huggingface/datatrove (README) and the docstrings of its steps: signatures (a task a file), finding (one
task; minhash: one a bucket), then a filter and `DocumentTokenizer` in one pass. Not shuffled: the other contestant does not
shuffle either. Prints JSON: the tokens written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def text_of(document: Document) -> str:
    return document.text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("processes", type=int)
    parser.add_argument("dedup", choices=["exact", "minhash", "none"])
    parser.add_argument("--ftfy", action="store_true")
    options = parser.parse_args()
    out = options.output
    files = len(list(options.input.glob("*.jsonl")))

    def execute(pipeline: list[Any], name: str, tasks: int = files) -> None:
        LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=min(tasks, options.processes), logging_dir=str(out / "logs" / name)
        ).run()

    def read() -> list[Any]:
        return [JsonlReader(str(options.input)), *([FTFYFormatter()] if options.ftfy else [])]

    last: list[Any] = []
    if options.dedup == "exact":
        exact = ExactDedupConfig(content_getter=text_of)
        execute([*read(), ExactDedupSignature(str(out / "signatures"), exact)], "signatures")
        execute([ExactFindDedups(str(out / "signatures"), str(out / "duplicates"), exact)], "find", 1)
        last = [ExactDedupFilter(str(out / "duplicates"), exact)]
    elif options.dedup == "minhash":
        minhash = MinhashConfig()
        execute([*read(), MinhashDedupSignature(str(out / "signatures"), minhash)], "signatures")
        find = MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=minhash)
        execute([find], "buckets", minhash.num_buckets)
        execute([MinhashDedupCluster(str(out / "buckets"), str(out / "duplicates"), config=minhash)], "clusters", 1)
        last = [MinhashDedupFilter(str(out / "duplicates"))]
    tokens = DocumentTokenizer(str(out / "tokens"), options.tokenizer, shuffle_documents=False)
    execute([*read(), *last, tokens], "tokens")
    written = sum(path.stat().st_size for path in (out / "tokens").glob("*.ds"))
    print(json.dumps({"tokens": written // 2}))


if __name__ == "__main__":
    main()
