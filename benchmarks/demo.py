"""The README's first command on a fresh clone: its seconds as a whole and the figures of its run, with their bars.

    python benchmarks/demo.py [--clone FOLDER]

Clones the project to an empty folder without a virtual environment and runs `pip install uv && uv run --no-dev train.py` there.
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from common import PROJECT, command, machine, table

BARS: dict[str, float | None] = {  # of a key of summary.json: at least, if negative at most; None: only printed
    **{"total_seconds": -600, "train_seconds": -360, "image_to_text_accuracy": 0.95, "audio_to_text_accuracy": 0.97},
    **{"text_to_image_accuracy": 0.95, "text_to_audio_accuracy": 0.90, "image_to_audio_accuracy": 0.85},
    **{"image_psnr": 20, "image_code_use": 0.3, "text_conditioning_gain": 0, "image_conditioning_gain": 0},
    **{"audio_conditioning_gain": 0, "image_judge_accuracy": None, "audio_judge_accuracy": None, "image_codec_accuracy": None},
    **{"audio_codec_accuracy": None, "text_bits_per_byte": None, "text_bits_per_byte_xz": None},
    **{"text_bits_per_byte_zstd": None},
}


def main(clone: Path | None = None) -> bool:
    """clone: the folder to clone into; default: a temporary one."""
    clone = clone or Path(tempfile.mkdtemp(prefix="pile-demo-"))
    subprocess.run(["git", "clone", "--quiet", PROJECT, clone], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    began = time.perf_counter()
    subprocess.run("pip install -q uv && uv run --no-dev train.py", shell=True, check=True, cwd=clone, env=environment)
    total = time.perf_counter() - began
    summary = json.loads((clone / "runs" / "digits" / "summary.json").read_text()) | {"total_seconds": round(total, 1)}
    bounds = {name: "" if bar is None else f"at {'most' if bar < 0 else 'least'} {abs(bar):g}" for name, bar in BARS.items()}
    table(["figure", "measured", "bar"], [(f"`{name}`", f"{summary[name]:.4g}", bounds[name]) for name in BARS], str(clone))
    print(machine())
    return all(bar is None or (summary[name] >= bar if bar >= 0 else summary[name] <= -bar) for name, bar in BARS.items())


if __name__ == "__main__":
    command(main, __doc__)
