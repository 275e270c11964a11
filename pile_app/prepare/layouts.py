"""Recipes for layouts whose files do not say by themselves what belongs together, and what names of folders and files mean.

Each recipe takes the files that it knows out of `listing.rest`, and adds samples, skips files with a reason, or sets splits.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from pile_app.documents import AUDIO_EXTENSIONS
from pile_app.prepare.files import DAMAGE, MEDIA, extension, read_text
from pile_app.prepare.text import decode_text

TEXT_EXTENSIONS = ("txt", "text", "md", "rst", "caption", "lab")
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"), **dict.fromkeys(("test", "testb", "devtest", "testing"), "test"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev", "development", "testa"), "validation"),
    **dict.fromkeys(("eval", "evaluation"), "test"),
}  # fmt: skip
_IN_NAME = re.compile(rf"(?:^|[^a-z])(?:news)?({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?:set)?(?=[^a-z]|$)")
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice?|note|changelog|citation|contributing|authors|credits|requirements|class(_?names|es)|labels|"
    r"update)\b[^.]*(\.(txt|md|rst|text|cff))?|(dataset_infos?|dataset_dict|state)\.json|sample_submission\.csv",
    re.IGNORECASE,
)


def named_split(name: str) -> str | None:
    """The split that a name says: train, validation or test for `dev-clean`, `val2017`, `cc3m-train-0001.tar`; else None."""
    found = _IN_NAME.findall(re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower())
    return _WORDS[found[-1]] if found else None


def split_of(name: str) -> str | None:
    """The split of a file by the innermost folder that names one, else by its own name if it holds many samples."""
    *folders, base = name.split("/")
    split = next((split for folder in reversed(folders) if (split := named_split(folder))), None)
    return split or (None if extension(base) in MEDIA else named_split(base))


def is_about(name: str) -> bool:
    """Whether a file describes a data set, such as a README or a license."""
    return bool(_ABOUT.fullmatch(os.path.basename(name)))


def speaker_of(name: str) -> dict[str, str]:
    """The speaker in the names of LibriSpeech and its kin: `84/121123/84-121123-0000.flac`."""
    parts = name.split("/")
    known = len(parts) > 2 and re.match(rf"{re.escape(parts[-3])}[-_]{re.escape(parts[-2])}[-_]", parts[-1])
    return {"speaker": parts[-3]} if known else {}


def common_voice(listing: Any) -> None:
    """The tables of the splits are read; `validated.tsv`, which contains them, only without them, and no other table."""
    for folder in {
        os.path.dirname(name)
        for name in listing.rest
        if os.path.basename(name) in ("validated.tsv", "invalidated.tsv", "train.tsv")
    }:
        here = {
            os.path.basename(name): name for name in listing.rest if os.path.dirname(name) == folder and name.endswith(".tsv")
        }
        if not any(name.startswith(os.path.join(folder, "clips/")) for name in listing.rest):
            continue
        used = here.keys() & {"train.tsv", "dev.tsv", "test.tsv"} or here.keys() & {"validated.tsv"}
        for base in sorted(here.keys() - used):
            listing.skip(here[base], "other_table", f"of Common Voice, {', '.join(sorted(used)) or 'no other table'} is read")


def kaldi(listing: Any) -> None:
    """`wav.scp`, `text` and `utt2spk`, each with lines `utterance value`. Commands in `wav.scp` are not run."""
    for scp in [name for name in listing.rest if os.path.basename(name) == "wav.scp"]:
        folder = os.path.dirname(scp)
        found = {
            base: os.path.join(folder, base)
            for base in ("wav.scp", "text", "utt2spk")
            if os.path.join(folder, base) in listing.rest
        }
        if "text" not in found or os.path.join(folder, "segments") in listing.rest:
            listing.skip(scp, "ignored_layout", "of Kaldi, a folder with wav.scp and text, without segments, is read")
            continue
        values = {base: _pairs(listing.take(name).real, listing.encoding) for base, name in found.items()}
        for key, path in values["wav.scp"].items():
            file = listing.tree.resolve(scp, path)
            if file is None or key not in values["text"]:
                missing = f"{path!r} is not in the input" if file is None else f"text has no line of {key!r}"
                listing.reject(f"{scp}:{key}", "missing_file" if file is None else "missing_text", missing, "Kaldi")
                continue
            speaker = {"speaker": values["utt2spk"][key]} if key in values.get("utt2spk", {}) else {}
            listing.add("Kaldi", f"{scp}:{key}", {"audio": file}, {"text": values["text"][key]} | speaker)
        listing.scopes.add(folder)


def _pairs(path: str, encoding: str) -> dict[str, str]:
    lines = decode_text(read_text(path, encoding)).splitlines()
    return {key: value.strip() for key, _, value in (line.strip().partition(" ") for line in lines) if key}


def parallel_folders(listing: Any) -> None:
    """Join two neighboring folders with the same names, media in one and texts in the other: `wav48` and `txt`, `images` and
    `captions`. A number of the microphone (`p225_001_mic1.flac`) does not count."""
    tops: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in listing.rest:
        parts = name.split("/")
        for depth in range(len(parts) - 1):
            tops["/".join(parts[:depth])][parts[depth]].append(name)
    for top, children in tops.items():
        texts = {child: names for child, names in children.items() if all(extension(name) in TEXT_EXTENSIONS for name in names)}
        media = {child: names for child, names in children.items() if all(extension(name) in MEDIA for name in names)}
        if (
            not texts
            or not media
            or not all(name in listing.rest for names in (*texts.values(), *media.values()) for name in names)
        ):
            continue
        stems = {child: {_inner_stem(top, child, name): name for name in names} for child, names in texts.items()}
        for child, names in media.items():
            keys = [re.sub(r"_mic\d+$", "", _inner_stem(top, child, name)) for name in names]
            other = max(stems, key=lambda one: len(stems[one].keys() & set(keys)))
            if 2 * len(stems[other].keys() & set(keys)) < len(set(keys)):
                continue
            is_speech = extension(names[0]) in AUDIO_EXTENSIONS
            for key, name in zip(keys, names, strict=True):
                text = (
                    {"txt" if other not in ("labels", "annotations") else f"{other}.txt": listing.tree.files[stems[other][key]]}
                    if key in stems[other]
                    else {}
                )
                if is_speech and not text:
                    listing.take(name)
                    listing.reject(name, "missing_field", f"no text in {other}/ has its name", "VCTK")
                    continue
                speaker = {"speaker": key.split("/")[-2]} if is_speech and "/" in key else {}
                listing.add(
                    "VCTK" if is_speech else f"{child}/ and {other}/",
                    name,
                    {extension(name): listing.take(name)} | text,
                    speaker,
                )
            for key in set(keys) & stems[other].keys():
                listing.take(stems[other][key])
            if is_speech:
                listing.scopes.add(top)


def _inner_stem(top: str, child: str, name: str) -> str:
    return name[len(os.path.join(top, child)) + 1 :].rpartition(".")[0]


def split_lists(listing: Any) -> None:
    """`validation_list.txt`: names of media files, a line each; media that no list names are for training."""
    lists = [
        name
        for name in listing.rest
        if extension(name) == "txt" and split_of(name) and re.search("list|split|names|images", os.path.basename(name))
    ]
    named: dict[str, str] = {}
    for name in lists:
        try:
            lines = decode_text(read_text(listing.tree.files[name].real, listing.encoding)).split("\n")
        except (ValueError, *DAMAGE):
            continue
        files = [listing.tree.resolve(name, line) for line in map(str.strip, lines) if line]
        if files and all(file is not None and extension(file.name) in MEDIA for file in files):
            listing.take(name)
            named |= {file.name: named_split(os.path.basename(name)) or "" for file in files}
    if named:
        listing.splits = {name: named.get(name, "train") for name in listing.tree.files if extension(name) in MEDIA}


RECIPES: tuple[Callable[[Any], None], ...] = (common_voice, kaldi, parallel_folders, split_lists)
