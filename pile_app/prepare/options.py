"""What `pile prepare` is asked for, the kinds of files it knows, and the libraries that not everybody has installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from pile_app.documents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS

Kind = Literal["auto", "text", "images", "audio", "interleaved", "entities", "chat", "webdataset"]

MEDIA_EXTENSIONS = IMAGE_EXTENSIONS + AUDIO_EXTENSIONS
TEXT_EXTENSIONS = ("txt", "text", "md", "rst")
JSON_EXTENSIONS = ("jsonl", "jsonl.gz", "jsonl.zst")
TABLE_EXTENSIONS = ("csv", "tsv")
TAGGED_EXTENSIONS = ("conll", "bio", "iob")
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "auto": (*TEXT_EXTENSIONS, *JSON_EXTENSIONS, "parquet", *MEDIA_EXTENSIONS, *TABLE_EXTENSIONS, *TAGGED_EXTENSIONS, "tar"),
    "text": (*TEXT_EXTENSIONS, *JSON_EXTENSIONS, *TABLE_EXTENSIONS, "parquet"),
    "images": (*IMAGE_EXTENSIONS, *TABLE_EXTENSIONS, "parquet"),
    "audio": (*AUDIO_EXTENSIONS, *TABLE_EXTENSIONS, "parquet"),
    "interleaved": (*JSON_EXTENSIONS, "parquet"),
    "chat": (*JSON_EXTENSIONS, "json", "yml", "yaml", "parquet"),
    "entities": (*TAGGED_EXTENSIONS, *JSON_EXTENSIONS, "parquet"),
    "webdataset": ("tar",),
}
RULES = ("gopher", "c4")  # of quality


def require(module: str, extra: str, purpose: str) -> Any:
    """Imports a library of an extra. Raises `ValueError` with the command that installs it where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f'{purpose} needs {module}: pip install "pile-app[{extra}]"') from error


@dataclass(frozen=True)
class Options:
    """The options of `pile prepare` that decide what the shards hold; `docs/prepare.md` says what each does."""

    kind: Kind = "auto"
    validation_share: float = 0.01
    seed: int = 0
    clean: bool = True
    shard_megabytes: float = 64
    caption_from_folder: bool = False
    label_from_folder: bool = False
    label_column: str | None = None
    label_names: tuple[str, ...] = ()
    text_column: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    label_loss_only: bool = False
    given_splits: bool = True
    document_bytes: int = 1 << 20
    repair: bool = False
    quality: tuple[str, ...] = ()
    exact_duplicates: bool = True
    near_duplicates: float | None = None
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13
    min_image_size: int = 0
    max_aspect: float | None = None
    image_max_size: int | None = None
    min_audio_seconds: float = 0.0
    max_audio_seconds: float = 30.0
    silence: float | None = None
    resample: int | None = None
    audio_format: str | None = None

    BOUNDS = {  # noqa: RUF012 (a table, never changed)
        "shard_megabytes": (0.01, 1e6), "max_audio_seconds": (0.01, 3600), "min_audio_seconds": (0, 3600),
        "document_bytes": (16, 1 << 26), "near_duplicates": (0.1, 1), "ngram": (1, 100), "min_image_size": (0, 100_000),
        "max_aspect": (1, 100_000), "image_max_size": (1, 100_000), "silence": (-200, 0), "resample": (1000, 768_000),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it has to be 0 or more and below 1")
        for name, (smallest, largest) in self.BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value <= largest:
                raise ValueError(f"{name} is {value}; it has to be {smallest:g} or more and at most {largest:g}")
        chosen: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
            "kind": ((self.kind,), tuple(EXTENSIONS)),
            "quality": (self.quality, RULES),
            "audio_format": ((self.audio_format,), (None, "flac", "wav")),
        }
        for name, (values, known) in chosen.items():
            for value in set(values) - set(known):
                raise ValueError(f"{name} is {value!r}; it has to be one of {', '.join(map(str, known))}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """From names and values; JSON and command lines have lists for tuples."""
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**given)

    @property
    def extensions(self) -> tuple[str, ...]:
        return EXTENSIONS[self.kind]
