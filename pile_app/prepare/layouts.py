"""Read what names of folders and files mean, and layouts whose files belong together in a way of their own.

Each recipe takes the files that it knows out of `listing.rest`, and adds samples, skips files with a reason, or sets splits."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from typing import Any

from pile_app.documents import AUDIO_EXTENSIONS
from pile_app.prepare.files import DAMAGE, MEDIA, decode_text, extension, read_text
from pile_app.prepare.options import require

TEXT_EXTENSIONS = ("txt", "text", "md", "rst", "caption", "lab")
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(("test", "testb", "devtest", "testing"), "test"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev", "development", "testa"), "validation"),
    **dict.fromkeys(("eval", "evaluation"), "test"),
}  # fmt: skip
_IN_NAME = re.compile(rf"(?:^|[^a-z])(?:news)?({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?:set)?(?=[^a-z]|$)")
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice?|note|changelog|citation|contributing|authors|credits|requirements|class(_?names|es)|labels|"
    r"update|(meta|speaker)?[_-]?info)(?![a-z])[^.]*(\.(txt|md|rst|text|cff))?|(dataset_infos?|dataset_dict|state)\.json|sample_submission\.csv",
    re.IGNORECASE,
)


def named_split(name: str) -> str | None:
    """Return train, validation or test for a name such as `dev-clean`, `val2017` or `cc3m-train-0001.tar`; else None."""
    found = _IN_NAME.findall(re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower())
    return _WORDS[found[-1]] if found else None


def split_of(name: str) -> str | None:
    """Return the split that the innermost folder of a file names, else its own name if it holds many samples."""
    *folders, base = name.split("/")
    split = next((split for folder in reversed(folders) if (split := named_split(folder))), None)
    return split or (None if extension(base) in MEDIA else named_split(base))


def is_about(name: str) -> bool:
    """Whether a file describes a data set, such as a README or a license."""
    return bool(_ABOUT.fullmatch(os.path.basename(name)))


def speaker_of(name: str) -> dict[str, str]:
    """Return the speaker in names like those of LibriSpeech: `84/121123/84-121123-0000.flac`."""
    parts = name.split("/")
    known = len(parts) > 2 and re.match(rf"{re.escape(parts[-3])}[-_]{re.escape(parts[-2])}[-_]", parts[-1])
    return {"speaker": parts[-3]} if known else {}


def common_voice(listing: Any) -> None:
    """Read the tables of the splits; else `validated.tsv`, which contains them; and no other table."""
    for folder in {os.path.dirname(name) for name in listing.rest if re.search(r"(^|/)((in)?validated|train)\.tsv$", name)}:
        tables = {name for name in listing.rest if os.path.dirname(name) == folder and name.endswith(".tsv")}
        if not any(name.startswith(os.path.join(folder, "clips/")) for name in listing.rest):
            continue
        splits = {os.path.join(folder, f"{split}.tsv") for split in ("train", "dev", "test")}
        used = tables & splits or tables & {os.path.join(folder, "validated.tsv")}
        read = ", ".join(sorted(map(os.path.basename, used))) or "no other table"
        for name in sorted(tables - used):
            listing.skip(name, "other_table", f"of Common Voice, {read} is read")


def kaldi(listing: Any) -> None:
    """Read `wav.scp`, `text` and `utt2spk`, each with lines `utterance value`. Commands in `wav.scp` are not run."""
    for scp in [name for name in listing.rest if os.path.basename(name) == "wav.scp"]:
        folder = os.path.dirname(scp)
        sounds, text, speaker, segments = (os.path.join(folder, base) for base in ("wav.scp", "text", "utt2spk", "segments"))
        if text not in listing.rest or segments in listing.rest:
            listing.skip(scp, "ignored_layout", "of Kaldi, a folder with wav.scp and text, without segments, is read")
            continue
        found = [_pairs(listing, name) if name in listing.rest else {} for name in (sounds, text, speaker)]
        for key, path in found[0].items():
            file = listing.tree.resolve(scp, path)
            if file is None:
                listing.reject(f"{scp}:{key}", "Kaldi", "missing_file", f"{path!r} is not in the input")
            elif key not in found[1]:
                listing.reject(f"{scp}:{key}", "Kaldi", "missing_text", f"text has no line of {key!r}")
            else:
                values = {name: some[key] for name, some in zip(("text", "speaker"), found[1:], strict=True) if key in some}
                listing.add("Kaldi", f"{scp}:{key}", {"audio": file}, values)
        listing.scopes.add(folder)


def _pairs(listing: Any, name: str) -> dict[str, str]:
    lines = decode_text(read_text(listing.take(name).real, listing.encoding)).splitlines()
    return {key: value.strip() for key, _, value in (line.strip().partition(" ") for line in lines) if key}


def parallel_folders(listing: Any) -> None:
    """Join neighboring folders with the same names, media in one and texts in the other: `wav48` and `txt`, `images` and
    `captions`. The index of a microphone (`p225_001_mic1.flac`) does not count."""
    tops: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))  # folder -> child -> name -> stem
    for name in listing.rest:
        parts = name.split("/")
        for depth in range(len(parts) - 1):
            tops["/".join(parts[:depth])][parts[depth]][name] = "/".join(parts[depth + 1 :]).rpartition(".")[0]
    for top, children in tops.items():
        texts = {child: names for child, names in children.items() if all(extension(name) in TEXT_EXTENSIONS for name in names)}
        media = {child: names for child, names in children.items() if all(extension(name) in MEDIA for name in names)}
        if not texts or not all(name in listing.rest for names in (*texts.values(), *media.values()) for name in names):
            continue
        for child, names in media.items():
            keys = {name: re.sub(r"_mic\d+$", "", stem) for name, stem in names.items()}
            wanted = set(keys.values())
            other = max(texts, key=lambda one: len({*texts[one].values()} & wanted))
            found = {stem: name for name, stem in texts[other].items() if stem in wanted}
            if 2 * len(found) < len(wanted):
                continue
            is_speech = extension(next(iter(names))) in AUDIO_EXTENSIONS
            text_name = "txt" if other not in ("labels", "annotations") else f"{other}.txt"
            for name, key in keys.items():
                named = {extension(name): listing.take(name)}
                if key in found:
                    named[text_name] = listing.tree.files[found[key]]
                elif is_speech:
                    listing.reject(name, "VCTK", "missing_field", f"no text in {other}/ has its name")
                    continue
                speaker = {"speaker": key.split("/")[-2]} if is_speech and "/" in key else {}
                listing.add("VCTK" if is_speech else f"{child}/ and {other}/", name, named, speaker)
            if is_speech:
                listing.scopes.add(top)


def split_lists(listing: Any) -> None:
    """Read `validation_list.txt` or `meta/test.txt`, whose lines name media; media that no list names are for training."""
    named: dict[str, str] = {}
    for name in list(listing.rest):
        base = os.path.basename(name)
        if extension(name) != "txt" or not named_split(base):
            continue
        try:
            text = decode_text(read_text(listing.tree.files[name].real, listing.encoding))
        except (ValueError, *DAMAGE):
            continue
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        found = (listing.tree.resolve(name, line) for line in lines)
        files = [file.name for file in takewhile(lambda file: file and extension(file.name) in MEDIA, found)]
        if files and len(files) == len(lines):
            listing.take(name)
            named |= dict.fromkeys(files, named_split(base) or "")
    if named:
        listing.splits = {name: named.get(name, "train") for name in listing.tree.files if extension(name) in MEDIA}


RECIPES: tuple[Callable[[Any], None], ...] = (common_voice, kaldi, parallel_folders, split_lists)


def data_set_card(listing: Any, root: str, config: str = "") -> None:
    """Read the card of a folder in the hub's layout, whose README.md names configurations or features: `datasets` resolves its
    files, splits and classes. `tables.py` reads the rows, because `datasets` gives up on a whole file where one row is bad.

    Raises ValueError: there are several configurations, and none is the default or asked for."""
    head = ""
    with suppress(OSError), open(os.path.join(root, "README.md"), encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 20)
    if not re.match(r"---\s*\n(?:.*\n)*?(configs|dataset_info):", head):
        return
    datasets = require("datasets", "prepare", "reading data set cards")
    try:
        builder = datasets.load_dataset_builder(root, config or None)
        found: Any = builder.config.data_files or {}
    except Exception as error:
        if isinstance(error, ValueError) and "Config name is missing" in str(error):
            names = datasets.get_dataset_config_names(root)
            raise ValueError(f"{root!r} has several configurations: {', '.join(names)}; e.g. {root}#{names[0]}") from error
        return  # a card that `datasets` cannot use; the files say what they are
    features = {name: getattr(about, "feature", about) for name, about in (builder.info.features or {}).items()}
    listing.classes = {name: list(about.names) for name, about in features.items() if hasattr(about, "names")}
    split_of_path = ((path, named_split(str(split)) or str(split)) for split in found for path in found[split])
    listing.splits = {os.path.relpath(path, root): split for path, split in split_of_path}
    for name in [name for name in listing.rest if listing.splits and not (name in listing.splits or is_about(name))]:
        listing.skip(name, "other_config", "the configuration of the data set card does not name it")
