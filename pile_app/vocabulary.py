"""The vocabulary: how a document becomes one row of token ids, for the data path and the model alike.

    <begin> <text> b y t e s <image> c c c c <audio> a a a a a <audio_end> <end>

An image takes a fixed number of codes, so it needs no closing token; a text ends at the next opener or `<end>`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pile_app.documents import AUDIO, TEXT


@dataclass(frozen=True)
class Vocabulary:
    """The range of token ids and the number of tokens of every segment. Pure arithmetic: no files, no tensors.

    Ids are, in order: six special tokens, text tokens, image codes, audio codes, `<audio_end>`. Each softmax runs over a
    contiguous slice: specials and text; image codes; audio codes and `<audio_end>`."""

    text_tokens: int = 256  # size of the tokenizer's vocabulary (256 for bytes)
    image_codes: int = 0  # size of the image codec's code book, 0 without images
    image_shape: tuple[int, int, int] = (0, 0, 0)  # (channels, height, width) that every image is resized to
    image_grid: tuple[int, int] = (0, 0)  # (rows, columns) of codes of an image
    audio_codes: int = 0  # size of the audio codec's code book, 0 without sound
    sample_rate: int = 0  # Hz that every sound is resampled to
    samples_per_token: int = 0  # samples that an audio code stands for
    audio_codebooks: int = 1  # codes of a frame of sound, each of a codebook of its own
    tokenizer: str = "bytes"  # fingerprint of the tokenizer, "bytes" for UTF-8 bytes
    image_codec: str = ""  # fingerprint of the image codec, where it is frozen from the start of the run
    audio_codec: str = ""  # fingerprint of the audio codec, likewise
    reads: tuple[int, ...] = ()  # modalities with a reader: their pixels or samples are read when given

    BEGIN = 0  # opens a document
    END = 1  # closes a document
    OPENERS = (2, 3, 4)  # of a text, an image, a sound: `OPENERS[modality]`
    NULL = 5  # replaces a dropped condition (classifier-free guidance)
    SPECIALS = 6

    @cached_property
    def starts(self) -> tuple[int, int, int]:
        """First id of the text tokens, of the image codes, of the audio codes."""
        image = self.SPECIALS + self.text_tokens
        return self.SPECIALS, image, image + self.image_codes

    @property
    def audio_end(self) -> int:
        return self.starts[AUDIO] + self.audio_codes

    @property
    def size(self) -> int:
        return self.audio_end + 1

    @cached_property
    def slices(self) -> tuple[slice, slice, slice]:
        """The ids each modality's softmax runs over."""
        _, image, audio = self.starts
        return slice(0, image), slice(image, audio), slice(audio, self.size)

    @property
    def image_tokens(self) -> int:
        return self.image_grid[0] * self.image_grid[1]

    @property
    def modalities(self) -> tuple[int, ...]:
        """The modalities this vocabulary can read and write."""
        sizes = (self.text_tokens, self.image_codes, self.audio_codes)
        return tuple(modality for modality, size in enumerate(sizes) if size)

    def audio_tokens(self, samples: Any, sample_rate: Any) -> Any:
        """Number of codes of a sound with `samples` samples at `sample_rate` Hz; ints or integer arrays."""
        resampled = -(-samples * self.sample_rate // sample_rate)  # ceil, as torchaudio's resample returns
        return -(-resampled // (self.samples_per_token * self.audio_codebooks)) * self.audio_codebooks

    def segment_tokens(self, modality: int, size: int, sample_rate: int = 0) -> int:
        """Tokens of one segment, its opener (and `<audio_end>`) included. `size`: text tokens, or samples of a sound."""
        if modality == AUDIO:
            return 2 + int(self.audio_tokens(size, sample_rate))
        return 1 + (size if modality == TEXT else self.image_tokens)

    @property
    def audio_tokens_per_second(self) -> float:
        return self.sample_rate / self.samples_per_token if self.samples_per_token else math.nan
