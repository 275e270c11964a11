"""The options of `pile prepare`, for the library, the command line and the documentation alike; and optional libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any

KINDS = ("auto", "text", "images", "audio", "interleaved", "entities", "chat", "webdataset")


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional library. Raises `ValueError` with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{purpose} needs {module}: pip install {module} (or, in a clone, uv sync --extra {extra})") from error


def _option(default: Any, help: str, *bounds: float, choices: tuple[Any, ...] = (), off: str = "", metavar: str = "") -> Any:
    """Define a field of `Options`. bounds: smallest and largest value; off: the flag that turns the option off."""
    metadata = {"help": help, "bounds": bounds, "choices": choices, "off": off, "metavar": metavar or None}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """The options that decide what the shards contain, with their help texts."""

    kind: str = _option("auto", "kind of the input; the names of its files are ignored", choices=KINDS)
    fields: str | None = _option(None, "files or columns of a document, e.g. '[jpg|png, json.caption|txt]'", metavar="YAML")
    validation_fraction: float | None = _option(None, "of the documents; default 5 %%, at least 32, at most 20 %%", 0, 0.9)
    seed: int = _option(0, "of the hash that splits training from validation")
    given_splits: bool = _option(True, "ignore splits given by names of files, folders or columns", off="--mix-splits")
    shard_megabytes: float = _option(64.0, "size of a shard", 0.01, 1e6)
    label: str | None = _option(None, "the column or field that is the label", metavar="NAME")
    label_from_folder: bool = _option(False, "the folder of a file is its label")
    label_names: tuple[str, ...] = _option((), "names for the labels that there are, in order", metavar="NAME")
    learn_label: bool = _option(False, "the label becomes the last text of its document, which training learns")
    label_loss_only: bool = _option(False, "with --learn-label: compute the loss on the label only")
    document_bytes: int = _option(1 << 20, "cut longer text files into several documents", 16, 1 << 26)
    encoding: str = _option("", "of text files and tables that are not UTF-8 or UTF-16, e.g. latin-1", metavar="NAME")
    clean: bool = _option(True, "keep texts unchanged", off="--no-clean")
    repair: bool = _option(False, "fix wrong decoding, HTML entities and the like (ftfy)")
    quality: tuple[str, ...] = _option((), "reject texts that break these rules", choices=("gopher", "c4"))
    exact_duplicates: bool = _option(True, "keep exact duplicates", off="--keep-duplicates")
    near_duplicates: float | None = _option(None, "drop texts this similar to an earlier text, e.g. 0.8", 0.1, 1)
    decontaminate: tuple[str, ...] = _option((), "drop texts that contain a part of these evaluation sets", metavar="FILE")
    ngram: int = _option(13, "consecutive words that make a part", 1, 100)
    min_image_size: int = _option(0, "reject images with a shorter side, in pixels", 0, 100_000)
    max_aspect: float | None = _option(None, "reject images whose sides have a larger ratio", 1, 100_000)
    image_max_size: int | None = _option(None, "shrink images to this longer side, in pixels", 1, 100_000)
    min_audio_seconds: float = _option(0.0, "reject shorter sounds", 0, 3600)
    max_audio_seconds: float | None = _option(None, "cut longer sounds (default 30), else reject them (60)", 0.01, 3600)
    silence: float | None = _option(None, "reject sounds below this mean level in dB of full scale, e.g. -60", -200, 0)
    resample: int | None = _option(None, "store sounds at this rate in Hz, mono", 1000, 768_000)
    audio_format: str | None = _option(None, "store sounds in this format, mono", choices=("flac", "wav"))
    follow_links: str | None = _option(None, "follow symbolic links into this folder, e.g. a hub's cache", metavar="ROOT")

    def __post_init__(self) -> None:
        for option in fields(self):
            value, bounds, choices = getattr(self, option.name), option.metadata["bounds"], option.metadata["choices"]
            for item in value if isinstance(value, tuple) else () if value is None else (value,):
                if bounds and not bounds[0] <= item <= bounds[1]:
                    raise ValueError(f"{option.name} is {item}; choose from {bounds[0]:g} to {bounds[1]:g}")
                if choices and item not in choices:
                    raise ValueError(f"{option.name} is {item!r}; choose from {', '.join(choices)}")
        if self.label and self.label_from_folder:
            raise ValueError("label and label_from_folder exclude each other")
        if self.label_loss_only and not self.learn_label:
            raise ValueError("label_loss_only needs learn_label: otherwise the label is no text that is learned")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Make options from names and values, in which JSON and command lines have lists for tuples."""
        known = {option.name for option in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"no option is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        given: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**given)
