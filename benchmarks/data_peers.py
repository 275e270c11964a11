"""Loading against webdataset and litdata: speed of one worker on the same files. And the first batch of a resumed epoch.

    python benchmarks/data_peers.py [--only '[image, ogg, flac, text_bpe, text_bytes, resume]'] [--rounds 3] [--seconds 4]

Makes the data (`peers/make_data.py`) and an environment for each peer once, under `--folder`, then lets the contestants load
the same files from the page cache, one worker each, in turns. `peers/load.py` says what is loaded and how. `resume`: seconds
from the imports to the first batch of images at 0 and at 90 % of an epoch, with Pile alone. Nothing else should run
meanwhile. Bars: the best peer; on text 1.3 of it; resuming 1.2 of the start of an epoch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import Contestant, command, machine, make_environment, measure_alone, table

SCRIPTS = Path(__file__).resolve().parent / "peers"
FIGURES = {  # unit, least ratio to the best peer
    "image": ("images/s", 1.0),
    "ogg": ("clips/s", 1.0),
    "flac": ("clips/s", 1.0),
    "text_bpe": ("tokens/s", 1.3),
    "text_bytes": ("tokens/s", 1.3),
}
SHARED_PACKAGES = ["torch==2.14.1", "torchaudio==2.11.0", "soundfile==0.14.0", "tokenizers==0.23.3", "simplejpeg==1.9.0"]
PACKAGES = {"webdataset": "webdataset==1.0.2", "litdata": "litdata==0.2.76"}


def main(
    only: list[str] = [*FIGURES, "resume"],  # noqa: B006
    peers: list[str] = list(PACKAGES),  # noqa: B006
    rounds: int = 3,
    seconds: float = 4.0,
    text_megabytes: float = 120,
    image_gigabytes: float = 2.2,
    copies: int = 4,
    folder: Path = Path("/tmp/pile-bench"),
) -> bool:
    """seconds: of a turn; copies: of each clip; folder: for data and environments, some 10 GB."""
    data = folder / f"data-{text_megabytes:g}-{image_gigabytes:g}-{copies}"
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    quiet = {"PYTHONWARNINGS": "ignore", "LITDATA_DISABLE_VERSION_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = kept | quiet | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    pythons = {"pile": Path(sys.executable)}
    for name in peers:
        packages = [PACKAGES[name], *SHARED_PACKAGES]
        pythons[name] = make_environment(folder / "environments" / name, packages)
    sizes = ["--text_megabytes", text_megabytes, "--image_gigabytes", image_gigabytes, "--copies", copies]
    subprocess.run(list(map(str, [sys.executable, SCRIPTS / "make_data.py", data, *sizes])), check=True, env=os.environ)
    environments = {name: os.environ | environment if name == "pile" else environment for name in pythons}
    for name, python in pythons.items():
        subprocess.run([python, SCRIPTS / "load.py", name, "prepare", "all", data], check=True, env=environments[name])

    met = True
    for figure in (name for name in FIGURES if name in only):
        read_all(data, figure.partition("_")[0])
        running = {name: Contestant([python, SCRIPTS / "load.py", name, "speed", figure, data], environments[name])
                   for name, python in pythons.items()}  # fmt: skip
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
        for _ in range(rounds):
            for name, contestant in running.items():
                found = contestant.take_turn(seconds)
                turns[name].append((found["units"] / found["seconds"], found["cores"]))
        for contestant in running.values():
            contestant.close()
        speeds = {name: statistics.median(speed for speed, _ in of) for name, of in turns.items()}
        best = max((speeds[name] for name in peers), default=float("nan"))
        unit, bar = FIGURES[figure]
        rows = [(name, f"{speed:,.4g}", f"{min(turns[name])[0]:,.4g} to {max(turns[name])[0]:,.4g}", f"{speed / best:.2f}",
                 f"{statistics.median(cores for _, cores in turns[name]):.2f}") for name, speed in speeds.items()]  # fmt: skip
        table(["", unit, "range", f"of the best peer, bar {bar}", "cores of the worker"], rows, figure)
        met &= not speeds["pile"] < bar * best
    if "resume" in only:
        read_all(data, "image")
        starts = {at: statistics.median(measure_alone(str(SCRIPTS / "load.py"), "pile", "resume", at, data)
                                        for _ in range(rounds)) for at in ("0", "0.9")}  # fmt: skip
        first = [(f"{float(at):.0%} of the epoch", f"{value:.3f}") for at, value in starts.items()]
        table(["Pile's first batch at", "seconds after the imports"], first)
        met &= starts["0.9"] <= 1.2 * starts["0"]
    print(f"\n{machine()}")
    return met


def read_all(data: Path, name: str) -> None:
    """Bring every contestant's copy of one kind of data into the page cache."""
    for path in data.rglob("*"):
        if path.is_file() and name in path.relative_to(data).parts:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


if __name__ == "__main__":
    command(main, __doc__)
