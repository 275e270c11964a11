"""The README's first command on a fresh clone, timed as a whole, and its figures beside what they have to reach.

    python benchmarks/demo.py [--clone FOLDER]

Clones the project to an empty folder, without a virtual environment, runs `pip install uv && uv run --no-dev train.py` there,
and prints a Markdown table. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

# key in summary.json -> (at least or at most, bar); None: printed beside the others
BARS: dict[str, tuple[str, float] | None] = {
    "total_seconds": ("at most", 600),
    "train_seconds": ("at most", 360),
    "image_to_text_accuracy": ("at least", 0.95),
    "audio_to_text_accuracy": ("at least", 0.97),
    "text_to_image_accuracy": ("at least", 0.95),
    "text_to_audio_accuracy": ("at least", 0.90),
    "image_to_audio_accuracy": ("at least", 0.85),
    "image_psnr": ("at least", 20),
    "image_code_use": ("at least", 0.3),
    "image_judge_accuracy": None,
    "audio_judge_accuracy": None,
    "image_codec_accuracy": None,
    "audio_codec_accuracy": None,
    "audio_codec_accuracy_griffin_lim": None,
    "text_conditioning_gain": ("at least", 0),
    "image_conditioning_gain": ("at least", 0),
    "audio_conditioning_gain": ("at least", 0),
    "text_bits_per_byte": None,
    "text_bits_per_byte_xz": None,
    "text_bits_per_byte_zstd": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clone", type=Path, help="folder to clone into; default: a temporary one")
    clone = parser.parse_args().clone or Path(tempfile.mkdtemp(prefix="pile-demo-"))
    project = Path(__file__).resolve().parent.parent
    subprocess.run(["git", "clone", "--quiet", project, clone], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    began = time.perf_counter()
    subprocess.run("pip install -q uv && uv run --no-dev train.py", shell=True, check=True, cwd=clone, env=environment)
    total = time.perf_counter() - began
    summary = json.loads((clone / "runs" / "digits" / "summary.json").read_text()) | {"total_seconds": round(total, 1)}
    print(f"\n{clone}\n\n| figure | measured | bar |\n|---|---|---|")
    for key, bar in BARS.items():
        print(f"| `{key}` | {summary[key]:.4g} | {f'{bar[0]} {bar[1]:g}' if bar else ''} |")


if __name__ == "__main__":
    main()
