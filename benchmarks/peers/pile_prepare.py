"""`pile prepare`, then the token counts that a run takes before its first step.

    python pile_prepare.py INPUT OUTPUT TOKENIZER PROCESSES exact|minhash|none [OPTION ...]

Further options go to `pile prepare` as they are. Prints JSON: the tokens counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

DUPLICATES = {"exact": [], "minhash": ["--near-duplicates", "0.8"], "none": ["--keep-duplicates"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("processes", type=int)
    parser.add_argument("dedup", choices=DUPLICATES)
    options, further = parser.parse_known_args()
    pile = Path(sys.executable).parent / "pile"
    command = [pile, "prepare", options.input, options.output, "--validation-fraction", "0", "--processes", options.processes]
    subprocess.run(list(map(str, [*command, *DUPLICATES[options.dedup], *further])), check=True, stdout=sys.stderr)
    print(json.dumps({"tokens": count(options.output, options.tokenizer, options.processes)}))


def count(folder: Path, path: str, processes: int) -> int:
    from pile_app.data.sources import SourceData
    from pile_app.data.tokenizers import load_tokenizer
    from pile_app.data.tokens import text_counts
    from pile_app.vocabulary import Vocabulary

    tokenizer = load_tokenizer(path)
    vocabulary = Vocabulary(text_tokens=tokenizer.size, tokenizer=tokenizer.fingerprint)
    source = SourceData("text", str(folder / "*.tar"), vocabulary, tokenizer, 4096, processes=processes)
    return sum(int(text_counts(source.index(shard), tokenizer)[0].sum()) for shard in range(len(source.paths)))


if __name__ == "__main__":
    main()
