"""The emoji demo's poster, from a run's model: `python data/emoji/poster.py runs/emoji docs/emoji.png`.

The prompts were chosen before the model was trained, and each drawing is the model's first: nothing is cherry-picked. On the
left of each pair is OpenMoji's drawing at the size that the model sees, on the right the model's.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw, ImageFont

from pile_app.documents import AUDIO, IMAGE, Document, Segment
from pile_app.media import decode_image
from pile_app.model.generate import Sampling, generate
from pile_app.model.score import score_choices
from pile_app.training.load import load_run
from pile_app.training.report import spectrogram

DRAWN = (
    *(("en", "🐙"), ("es", "🌲"), ("tr", "🍓"), ("en", "🐧"), ("es", "🚗"), ("tr", "🌙")),
    *(("en", "👩‍🚀"), ("es", "🏠"), ("tr", "👩‍🚒"), ("en", "🎸"), ("es", "🍕"), ("tr", "😂")),
)
NEVER_SEEN = (
    *(("en", "👩‍⚖️"), ("es", "🧡"), ("tr", "🟢"), ("en", "🟪"), ("es", "📗"), ("tr", "👩‍🎨")),
    *(("en", "👩‍✈️"), ("es", "👨‍🚀"), ("tr", "👩‍🍳"), ("en", "😻"), ("es", "🧛‍♂️"), ("tr", "👨‍🎤")),
)
NAMED = ("🦊", "🎂", "👩‍🚒", "👩‍⚖️", "🧡", "👩‍✈️", "👨‍🚀", "🟪", "👩‍🎨")
# All short enough to be spoken at all.
SPOKEN = (("en", "🍕"), ("es", "🌹"), ("tr", "🐄"), ("en", "🐍"), ("es", "🍓"), ("tr", "🦊"))

WIDTH, MARGIN, GAP, CELL, LINE = 1560, 36, 16, 104, 25
INK, SOFT, PAGE, CARD, LINES = "#20242a", "#666e79", "#f6f6f3", "#ffffff", "#dfe2de"
NEW, NEW_CARD, RIGHT, CLOSE, WRONG = "#c2560c", "#fff3e8", "#1d7a4d", "#8a6d00", "#b0343c"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SAMPLING = Sampling(temperature=0.8, top_p=0.75, guidance=2.0, max_text=64, max_seconds=0.8)


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / f"DejaVuSans{'-Bold' * bold}.ttf"), size)


def load_recipe() -> ModuleType:
    path = Path(__file__).with_name("prepare.py")
    spec = importlib.util.spec_from_file_location("emoji_prepare", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Poster:
    """A canvas that grows downwards: sections of cards in rows."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 3000), PAGE)
        self.draw = ImageDraw.Draw(self.image)
        self.top = MARGIN

    def text(self, x: float, y: float, text: str, size: int = 17, color: str = INK, bold: bool = False, width: int = 0) -> None:
        """Draw a line, in a smaller font if it is wider than `width` pixels."""
        while width and size > 10 and self.draw.textlength(text, font(size, bold)) > width:
            size -= 1
        self.draw.text((x, y), text, color, font(size, bold), anchor="lm")

    def heading(self, title: str, explanation: str, color: str = INK) -> None:
        self.top += 20
        self.text(MARGIN, self.top + 14, title, 25, color, bold=True)
        left = MARGIN + self.draw.textlength(title, font(25, bold=True)) + 18
        self.text(left, self.top + 16, explanation, 17, SOFT, width=int(WIDTH - MARGIN - left))
        self.top += 42

    def cards(self, count: int, columns: int, height: int, color: str = CARD, edge: str = LINES) -> list[tuple[int, int, int]]:
        """Add cards; returns (left, top, width) of each."""
        width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns
        places = []
        for number in range(count):
            left = MARGIN + number % columns * (width + GAP)
            top = self.top + number // columns * (height + GAP)
            self.draw.rounded_rectangle((left, top, left + width, top + height), 10, color, edge, 2)
            places.append((left, top, width))
        self.top += -(-count // columns) * (height + GAP)
        return places

    def picture(self, pixels: np.ndarray, x: int, y: int, size: int = CELL) -> None:
        """Draw (3, H, W) or (H, W, 3) uint8, enlarged without smoothing."""
        rows = np.moveaxis(pixels, 0, -1) if pixels.shape[0] == 3 else pixels
        self.image.paste(Image.fromarray(rows).resize((size, size), Image.Resampling.NEAREST), (x, y))
        self.draw.rectangle((x - 1, y - 1, x + size, y + size), None, LINES)

    def save(self, path: Path) -> None:
        """Save with at most 256 colours, which are enough for flat drawings."""
        cut = self.image.crop((0, 0, WIDTH, self.top + MARGIN - GAP))
        cut.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def drawings(poster: Poster, model: Any, wanted: list[tuple[str, Any]], color: str, edge: str) -> None:
    prompts = [Document((Segment(one.name(language).text),)) for language, one in wanted]
    answers = generate(model, prompts, IMAGE, SAMPLING)
    places = poster.cards(len(wanted), 6, CELL + 60, color, edge)
    for (language, one), answer, (left, top, width) in zip(wanted, answers, places, strict=True):
        space = (width - 2 * CELL) // 3
        poster.picture(one.pixels, left + space, top + 14)
        poster.picture(decode_image(answer.file, *model.vocabulary.image_shape), left + 2 * space + CELL, top + 14)
        label(poster, left + space, top + CELL + 36, language, one.names[language], width - 2 * space)


def label(poster: Poster, x: int, y: int, language: str, name: str, width: int, color: str = INK) -> None:
    poster.text(x, y, language, 14, SOFT, bold=True)
    poster.text(x + 28, y, name, 17, color, width=width - 28)


def names(poster: Poster, model: Any, recipe: ModuleType, wanted: list[Any], emoji: list[Any]) -> None:
    rng = np.random.default_rng(7)
    views = [recipe.view(one, rng) for one in wanted]
    first: dict[str, list[tuple[str, bool, bool]]] = {}  # language -> for each view: the name, right, right among five
    for language in recipe.LANGUAGES:
        choices = sorted({f" {one.names[language]}" for one in emoji})
        prompts = [Document((view, Segment(f"{language}:"))) for view in views]
        scores = score_choices(model, prompts, [Segment(choice) for choice in choices], prior=1.0, beam=24)
        found = [[choices[index].strip() for index in best] for best in scores.topk(5).indices.tolist()]
        rights = [one.names[language] for one in wanted]
        first[language] = [(best[0], best[0] == right, right in best) for best, right in zip(found, rights, strict=True)]
    height = len(first) * LINE + 24
    for number, (left, top, width) in enumerate(poster.cards(len(wanted), 3, height)):
        if wanted[number].combination:
            poster.draw.rounded_rectangle((left, top, left + width, top + height), 10, NEW_CARD, NEW, 2)
        side = height - 20
        poster.picture(decode_image(views[number].file, *model.vocabulary.image_shape), left + 16, top + 10, side)
        for row, (language, answers) in enumerate(first.items()):
            name, is_right, is_close = answers[number]
            color = RIGHT if is_right else CLOSE if is_close else WRONG
            y = top + 12 + row * LINE + LINE // 2
            label(poster, left + side + 32, y, language, name, width - side - 44, color)


def speech(poster: Poster, model: Any, recipe: ModuleType, listed: list[tuple[str, Any]]) -> None:
    with recipe.Espeak() as espeak:
        speaker = recipe.Speaker(espeak)
        real = [speaker.answer(one, language) for language, one in listed]
    prompts = [Document((Segment(one.name(language).text),)) for language, one in listed]
    answers = generate(model, prompts, AUDIO, SAMPLING)
    places = poster.cards(len(listed), 6, CELL + 60)
    for (language, one), answer, truth, (left, top, width) in zip(listed, answers, real, places, strict=True):
        space = (width - 2 * CELL) // 3
        for place, segment in enumerate((truth, answer)):
            waveform = soundfile.read(io.BytesIO(segment.file), dtype="float32")[0]
            pixels = Image.open(io.BytesIO(spectrogram(waveform))).convert("RGB").resize((CELL, CELL))
            poster.picture(np.asarray(pixels), left + space + place * (CELL + space), top + 14)
        label(poster, left + space, top + CELL + 36, language, one.names[language], width - 2 * space)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe, (module, _, saved) = load_recipe(), load_run(arguments.run)
    model = module.model
    found, _ = recipe.distinct_emoji()
    recipe.hold_out(found, 0)
    emoji = {one.characters: one for one in found}
    summary_file = arguments.run / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {"train_seconds": 0.0}
    if wrong := [one for _, one in NEVER_SEEN if not emoji[one].combination] + [o for _, o in DRAWN if emoji[o].combination]:
        raise SystemExit(f"error: {wrong} are not on the side of the split that the poster says: seed and recipe have changed")
    poster = Poster()
    poster.text(MARGIN, poster.top + 20, "Draw me, name me, say me", 40, bold=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(not one.combination for one in found)
    minutes = f"{summary['train_seconds'] / 60:.0f} minutes on one CPU core"
    poster.text(
        MARGIN, poster.top + 62, f"One model of {size / 1e6:.1f} million parameters, trained from nothing in {minutes} on "
        f"{trained:,} emoji: drawn, named and spoken in English, Spanish and Turkish.", 19, SOFT, width=WIDTH - 2 * MARGIN,
    )  # fmt: skip
    poster.top += 76
    poster.heading("Told a name, it draws", "left: OpenMoji's drawing, 32 x 32 pixels; right: the model's")
    drawings(poster, model, [(language, emoji[one]) for language, one in DRAWN], CARD, LINES)
    explanation = "a man judge and a woman mechanic were in training, a woman judge never: not drawn, not named, not spoken"
    poster.heading("Combinations it has never seen", explanation, NEW)
    drawings(poster, model, [(language, emoji[one]) for language, one in NEVER_SEEN], NEW_CARD, NEW)
    explanation = (
        f"the name of {len(found)} that it makes likelier most; green: right; brown: right among its first five; "
        "orange cards: never seen"
    )
    poster.heading("Shown a drawing, it names", explanation)
    names(poster, model, recipe, [emoji[one] for one in NAMED], found)
    poster.heading("Told a name, it says it", "spectrograms, 0 to 4 kHz; left: espeak-ng, right: the model's voice")
    speech(poster, model, recipe, [(language, emoji[one]) for language, one in SPOKEN])
    credit = (
        "Drawings on the left: OpenMoji (openmoji.org), CC BY-SA 4.0; the model's are derived from them. Nothing is picked."
    )
    poster.text(MARGIN, poster.top + 4, credit, 15, SOFT, width=WIDTH - 2 * MARGIN)
    poster.top += 14
    poster.save(arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:.0f} kB, step {saved['global_step']:,}")


if __name__ == "__main__":
    main()
