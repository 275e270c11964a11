"""Loading against webdataset, litdata, mosaicml-streaming and megatron-energon: speed of one worker, and resuming.

    python benchmarks/data_peers.py [--quick] [--only image resume ...] [--peers pile litdata ...]

Makes the data and an environment for each peer once (with `uv`, under --folder), then lets all contestants load the same files
from the page cache, one worker each, in turns of some seconds (A B C ... A B C ...), so that what else the machine does hits
all alike. Prints Markdown tables and writes `data_peers.json`. Nothing else should run meanwhile, and --quick gives no
figures: one short turn each. What is loaded and how is in `peers/contest.py`; how each peer is tuned, and by which page of its
documentation, in `peers/<name>_peer.py`.

Bars: Pile at least 1.0x the best peer, on packed text 1.3x; media at 90 % or more of decoding alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = PROJECT / "benchmarks" / "peers"
SHARED_PACKAGES = [
    "torch==2.14.1", "torchvision==0.29.2", "torchaudio==2.11.0", "soundfile==0.14.0", "tokenizers==0.23.3",
    "simplejpeg==1.9.0",
]  # fmt: skip
ALONE, IN_WORKER = "decoding alone", "decoding in a worker"


@dataclass(frozen=True)
class Contestant:
    """script: in `peers/`; package, further: what its environment holds besides `SHARED_PACKAGES`, "" for Pile's own;
    overrides: bounds of its packages that do not hold; resumes: it takes part in that figure."""

    script: str
    package: str = ""
    further: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    resumes: bool = True


CONTESTANTS = {
    "pile": Contestant("pile_peer"),
    "webdataset": Contestant("webdataset_peer", "webdataset==1.0.2"),
    "litdata": Contestant("litdata_peer", "litdata==0.2.76"),
    # It wants transformers < 5, which wants an older `tokenizers` than the others have; it only takes two classes from there.
    "streaming": Contestant("streaming_peer", "mosaicml-streaming==0.13.0", overrides=("transformers==5.24.0",)),
    "energon": Contestant("energon_peer", "megatron-energon==7.4.1"),
    ALONE: Contestant("decode_alone", "webdataset==1.0.2", resumes=False),
    IN_WORKER: Contestant("decode_alone", "webdataset==1.0.2", variables=(("DECODE_IN_WORKER", "1"),), resumes=False),
}
FIGURES = {  # unit, least share of the best peer
    "text_bytes": ("tokens/s", 1.3),
    "text_bpe": ("tokens/s", 1.3),
    "text_tokens": ("tokens/s", 1.3),
    "image": ("images/s", 1.0),
    "ogg": ("clips/s", 1.0),
    "flac": ("clips/s", 1.0),
}
DATA_OF = {"text_bytes": "text", "text_bpe": "text", "text_tokens": "tokens", "image": "image", "ogg": "ogg", "flac": "flac"}
MEDIA = ("image", "ogg", "flac")
HAS_NO_TOKENS = ("webdataset", "energon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pile-bench"), help="for data and environments (25 GB)")
    parser.add_argument("--only", nargs="+", choices=[*FIGURES, "resume"], default=[*FIGURES, "resume"])
    parser.add_argument("--peers", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    parser.add_argument("--text-megabytes", type=float, default=120)
    parser.add_argument("--resume-gigabytes", type=float, default=2.2, help="of images, for both their figures")
    parser.add_argument("--quick", action="store_true", help="small data, one round of short turns: does it run?")
    options = parser.parse_args()
    data = options.folder / ("quick" if options.quick else "data")
    copies = "4"
    if options.quick:
        options.rounds, options.seconds, options.text_megabytes, options.resume_gigabytes, copies = 1, 2.0, 12, 0.2, "1"

    load = os.getloadavg()[0]  # before this adds its own
    chosen = {name: CONTESTANTS[name] for name in options.peers}
    pythons = {name: make_environment(options.folder / "environments", one) for name, one in chosen.items()}
    run([sys.executable, SCRIPTS / "make_data.py", data, "--text-megabytes", str(options.text_megabytes),
         "--image-gigabytes", str(options.resume_gigabytes), "--copies", copies])  # fmt: skip
    for name, one in chosen.items():
        print(f"data of {name} ...", file=sys.stderr, flush=True)
        run([pythons[name], SCRIPTS / f"{one.script}.py", "prepare", "all", data], environment_of(one))

    if load > 0.5:
        print(f"**The machine is busy** (load {load:.1f}): these are no figures.", flush=True)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "load": load,
        "facts": json.loads((data / "facts.json").read_text()),
    }
    for figure in options.only:
        read_all(data, DATA_OF.get(figure, "image"))
        if figure != "resume":
            results[figure] = measure_speed(figure, chosen, pythons, data, options.rounds, options.seconds)
            print(speed_table(figure, results[figure]), flush=True)
        else:
            results[figure] = measure_resume(chosen, pythons, data, options.rounds)
            print(resume_table(results[figure]), flush=True)
    (data / "data_peers.json").write_text(json.dumps(results, indent=1))
    print(f"\n{results['machine']}; written to {data / 'data_peers.json'}")


def read_all(data: Path, name: str) -> None:
    """Everybody's copy of one kind of data, so that it comes from the page cache."""
    for path in data.rglob("*"):
        if path.is_file() and name in path.relative_to(data).parts:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


def run(command: list[Any], environment: dict[str, str] | None = None) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr, env=environment)


def environment_of(contestant: Contestant) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    quiet = {"PYTHONWARNINGS": "ignore", "LITDATA_DISABLE_VERSION_CHECK": "1"}
    one_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | quiet | one_thread | dict(contestant.variables)


def make_environment(folder: Path, contestant: Contestant) -> Path:
    """The Python of a contestant; installs what it needs where that is missing."""
    if not contestant.package:
        return PROJECT / ".venv" / "bin" / "python"
    place = folder / contestant.package.split("==")[0].split("[")[0]
    python, done = place / "bin" / "python", place / "installed"
    if not done.exists():
        print(f"environment of {contestant.package} ...", file=sys.stderr, flush=True)
        run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, place])
        overrides = place / "overrides.txt"
        overrides.write_text("\n".join(contestant.overrides))
        # --no-config: or the project's own bounds hold for them too.
        install = ["uv", "pip", "install", "--no-config", "--quiet", "--python", python, "--override", overrides]
        run([*install, contestant.package, *contestant.further, *SHARED_PACKAGES])
        done.touch()
    return python


# -- Speed.


class Running:
    """A contestant that loads while it is its turn."""

    def __init__(self, contestant: Contestant, python: Path, figure: str, data: Path) -> None:
        self.log = open(data / f"{contestant.script}.log", "w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [python, SCRIPTS / f"{contestant.script}.py", "speed", figure, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env=environment_of(contestant),
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"{self.process.args}: {self.log.read()[-2000:]}")

    def load_for(self, seconds: float) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def measure_speed(
    figure: str, chosen: dict[str, Contestant], pythons: dict[str, Path], data: Path, rounds: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """Contestant -> what each turn gave: `speed` in units a second, `cores` that its workers took."""
    running: dict[str, Running] = {}
    turns: dict[str, list[dict[str, float]]] = {}
    for name, one in chosen.items():
        if (one.script == "decode_alone" and figure not in MEDIA) or (figure == "text_tokens" and name in HAS_NO_TOKENS):
            continue
        try:
            running[name] = Running(one, pythons[name], figure, data)
            turns[name] = []
        except RuntimeError as error:
            print(f"{name} does not take part in {figure}: {error}", file=sys.stderr)
    for round_ in range(rounds):
        for name, one in running.items():
            answer = one.load_for(seconds)
            turns[name].append(answer | {"speed": answer["units"] / answer["seconds"]})
            print(f"{figure} {round_ + 1}/{rounds} {name}: {turns[name][-1]['speed']:,.1f}", file=sys.stderr, flush=True)
    for one in running.values():
        one.close()
    return turns


def speed_table(figure: str, turns: dict[str, list[dict[str, float]]]) -> str:
    unit, bar = FIGURES[figure]
    speeds = {name: [turn["speed"] for turn in found] for name, found in turns.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    peers = {name: value for name, value in medians.items() if name not in ("pile", ALONE, IN_WORKER)}
    best = max(peers.values(), default=float("nan"))
    alone = medians.get(ALONE, float("nan"))
    lines = [
        f"\n### {figure}: {unit}, median of {max(map(len, speeds.values()), default=0)} turns; bar {bar}x the best peer\n",
        f"| | {unit} | range | of the best peer | of decoding alone | cores of its worker |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in medians.items():
        shown = f"{min(speeds[name]):,.4g} to {max(speeds[name]):,.4g}"
        cores = statistics.median(turn["cores"] for turn in turns[name])
        ratios = f"{value / best:.2f}x | {value / alone:.2f} | {cores:.2f}".replace("nan", "-")
        lines.append(f"| {name} | {value:,.4g} | {shown} | {ratios} |")
    if any(value > 1.05 * alone for value in medians.values()):
        lines.append("\n**Not valid**: no loader decodes faster than its decoder alone. Something else took the processor.")
    if any(turn["cores"] > 1.1 for found in turns.values() for turn in found):
        lines.append("\n**Not one core each**: a worker took more than one, see the last column.")
    return "\n".join(lines)


# -- Resuming.


def measure_resume(
    chosen: dict[str, Contestant], pythons: dict[str, Path], data: Path, rounds: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Contestant -> fraction of the epoch -> what each start took."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    names = [name for name, one in chosen.items() if one.resumes]
    for name in names:  # once: the state that each saves at 90 %
        one = chosen[name]
        if name not in ("pile", "webdataset") and not (data / "states" / f"{one.script}-0.9.pt").exists():
            print(f"state of {name} ...", file=sys.stderr, flush=True)
            run([pythons[name], SCRIPTS / f"{one.script}.py", "save", "0.9", data], environment_of(one))
    for _ in range(rounds):
        for name in names:
            for fraction in ("0", "0.9"):
                one = chosen[name]
                command = [pythons[name], SCRIPTS / f"{one.script}.py", "resume", fraction, data, "--began", str(time.time())]
                answer = subprocess.run(
                    list(map(str, command)), check=True, capture_output=True, text=True, env=environment_of(one)
                )
                line = next(line for line in answer.stdout.splitlines() if line.startswith("{"))
                found.setdefault(name, {}).setdefault(fraction, []).append(json.loads(line))
                print(f"resume {name} at {fraction}: {line}", file=sys.stderr, flush=True)
    return found


def resume_table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    lines = [
        "\n### Seconds from the start of the process to the first batch of images, medians\n",
        "| | imports | at 0 %: after them | at 90 %: after them | at 0 %: all | at 90 %: all | first batch is the next one |",
        "|---|---|---|---|---|---|---|",
    ]

    def median(name: str, fraction: str, part: str) -> float:
        return statistics.median(one[part] for one in found[name][fraction])

    for name in found:
        numbers = [median(name, "0", "imports")]
        numbers += [median(name, fraction, part) for part in ("first_batch", "total") for fraction in ("0", "0.9")]
        continues = {True: "yes", False: "no", None: "-"}[found[name]["0.9"][0]["continues"]]
        lines.append(f"| {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + f" | {continues} |")
    return "\n".join(lines)


def describe_machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


if __name__ == "__main__":
    main()
