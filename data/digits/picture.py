"""The README's picture from the final evaluation of a run: `python data/digits/picture.py runs/digits docs/demo.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL = 80, 8, 150  # pixels
# title in samples.json, label of the row, which part of a sample it shows
ROWS = (
    ("text → image", "real image", "references"),
    ("text → image", "drawn from its name", "outputs"),
    ("text → audio", "real voice", "references"),
    ("text → audio", "spoken from its name", "outputs"),
    ("image → audio", "spoken on seeing", "prompt"),
    ("image → audio", "", "outputs"),
)


def thumbnail(path: Path) -> Image.Image:
    """The image, or the spectrogram of the sound (0 to Nyquist upwards, 60 dB), as a square."""
    if path.suffix == ".png":
        return Image.open(path).convert("L").resize((CELL, CELL), Image.Resampling.NEAREST)
    samples, _ = soundfile.read(path, dtype="float32")
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, 128), 256)[::40] * np.hanning(256)
    level = 20 * np.log10(np.abs(np.fft.rfft(frames)).T[::-1] + 1e-3)
    pixels = np.clip((level - level.max() + 60) / 60, 0, 1) * 255
    return Image.fromarray(pixels.astype(np.uint8)).resize((CELL, CELL), Image.Resampling.BILINEAR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    folder = arguments.run / "samples" / "evaluation"
    samples = json.loads((folder / "samples.json").read_text())
    picture = Image.new("L", (LABEL + 10 * (CELL + GAP), len(ROWS) * (CELL + GAP) + 22), 255)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for row, (title, label, part) in enumerate(ROWS):
        top = 22 + row * (CELL + GAP)
        draw.text((4, top + CELL / 2 - 8), label, fill=0, font=font)
        for column, sample in enumerate([sample for sample in samples if sample["title"] == title][:10]):
            left = LABEL + column * (CELL + GAP)
            if row == 0:
                draw.text((left + 2, 3), sample["prompt"][0]["text"], fill=0, font=font)
            picture.paste(thumbnail(folder / sample[part][0]["file"]), (left, top))
    picture.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
