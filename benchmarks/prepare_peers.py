"""Preparing text against datatrove: JSON lines -> cleaned, duplicates dropped, tokenized, written; tokens/s a core.

    python benchmarks/prepare_peers.py [--quick] [--dedup exact minhash] [--processes 1 2] [--ftfy]

Both read the documents of `data_peers.py` (a tenth of them copies) with the same 32,000-token tokenizer, in turns (A B A B
...). What each writes: datatrove its tokens, Pile its shards with index and token counts. Starting the programs counts for
both. Cleaning is Pile's default (NFC, line ends, control characters); datatrove has none that compares and does none; with
`--ftfy` both repair texts with that library. minhash: datatrove's default of 14 bands of 8 hashes of 5 words, whose threshold
is about 0.72; Pile drops texts that are 0.8 alike. Prints a Markdown table, writes `prepare_peers.json`. Nothing else should
run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_peers import PROJECT, SCRIPTS, Contestant, describe_machine, environment_of, make_environment, run

DATATROVE = Contestant("datatrove_peer", "datatrove[io,processing]==0.10.1", ("spacy",))  # spacy: words for minhash
PILE = Contestant("pile_prepare")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pile-bench"), help="for data and environments")
    parser.add_argument("--dedup", nargs="+", choices=["exact", "minhash", "none"], default=["exact"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ftfy", action="store_true", help="repair texts")
    parser.add_argument("--quick", action="store_true", help="small data, one round: does it run?")
    options = parser.parse_args()
    data = options.folder / ("quick" if options.quick else "data")
    rounds = 1 if options.quick else options.rounds
    if not (data / "facts.json").exists():
        size = ["--text-megabytes", "12", "--image-gigabytes", "0.2", "--copies", "1"] if options.quick else []
        run([sys.executable, SCRIPTS / "make_data.py", data, *size])
    python = make_environment(options.folder / "environments", DATATROVE)
    further = {"pile": ["--repair"] if options.ftfy else [], "datatrove": ["--ftfy"] if options.ftfy else []}
    programs = {
        "pile": (PILE, PROJECT / ".venv" / "bin" / "python"),
        "datatrove": (DATATROVE, python),
    }

    results: dict[str, Any] = {"machine": describe_machine()}
    print("| duplicates | processes | | tokens/s a core | range | tokens | of datatrove |\n|---|---|---|---|---|---|---|")
    for dedup in options.dedup:
        for processes in options.processes:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
            for _ in range(rounds):
                for name, (program, interpreter) in programs.items():
                    answer = time_once(program, interpreter, data, dedup, processes, further[name])
                    if answer is not None:
                        found[name].append(answer)
            results[f"{dedup} {processes}"] = found
            print_rows(dedup, processes, found)
    (data / "prepare_peers.json").write_text(json.dumps(results, indent=1))
    print(f"\n{results['machine']}; written to {data / 'prepare_peers.json'}")


def time_once(
    program: Contestant, python: Path, data: Path, dedup: str, processes: int, further: list[str]
) -> dict[str, float] | None:
    """Tokens, seconds and tokens a second and core; None where it cannot do this."""
    output = data / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    arguments = [data / "jsonl", output, data / "tokenizer.json", processes, dedup, *further]
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, [python, SCRIPTS / f"{program.script}.py", *arguments])), capture_output=True, text=True,
        env=environment_of(program) | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    seconds = time.perf_counter() - began
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        print(f"{program.script}, {dedup}, {processes} processes: {done.stderr[-1000:]}", file=sys.stderr)
        return None
    tokens = json.loads(done.stdout.splitlines()[-1])["tokens"]
    print(
        f"{program.script}, {dedup}, {processes} processes: {tokens:,} tokens in {seconds:.1f} s", file=sys.stderr, flush=True
    )
    return {"tokens": tokens, "seconds": seconds, "speed": tokens / seconds / processes}


def print_rows(dedup: str, processes: int, found: dict[str, list[dict[str, float]]]) -> None:
    speeds = {name: [one["speed"] for one in answers] for name, answers in found.items() if answers}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        ratio = f"{medians[name] / medians['datatrove']:.2f}x" if "datatrove" in medians else "-"
        cells = [f"{medians[name]:,.0f}", f"{min(values):,.0f} to {max(values):,.0f}", f"{found[name][0]['tokens']:,}", ratio]
        print(f"| {dedup} | {processes} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
