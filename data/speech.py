"""Speech from espeak-ng, for recipes (`data/*/prepare.py`): text -> samples, trimmed and levelled."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

LEVEL = 0.1  # root mean square of a clip, -20 dB of full scale
PEAK = 0.99
SILENCE = 0.01  # of the peak: quieter samples at either end are removed
MARGIN = 0.01  # seconds that are kept of it

INSTALL = "install it with `uv sync --extra demo` or `pip install scikit-learn espeakng-loader`"


class Espeak:
    """The espeak-ng library of the package `espeakng-loader`, as a context.

    espeak-ng keeps its state in global variables, and a clip depends on the clips before it. Each context therefore loads its
    own copy of the library, so that the same calls give the same samples whatever the process has said before.
    """

    RETRIEVE_SYNCHRONOUSLY, DO_NOT_EXIT = 2, 0x8000
    RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4  # espeak_PARAMETER
    UTF8 = 1

    def __enter__(self) -> Espeak:
        self._cleanup = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            try:
                self._load(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="espeak-"))))
            except ImportError as error:
                raise RuntimeError(f"speech needs espeak-ng, which is missing ({error}): {INSTALL}") from error
            except (OSError, AttributeError, RuntimeError) as error:
                raise RuntimeError(f"espeak-ng is there but fails: {error}. If it is damaged or old, {INSTALL}") from error
            self._cleanup = stack.pop_all()
        return self

    def _load(self, folder: Path) -> None:
        import espeakng_loader

        library = Path(espeakng_loader.get_library_path())
        # espeak-ng cuts paths at 160 bytes, which a virtual environment in a deep folder exceeds: hence the link.
        data = folder / "espeak-ng-data"
        data.symlink_to(espeakng_loader.get_data_path(), target_is_directory=True)
        self._library = ctypes.CDLL(str(shutil.copy(library, folder)))
        self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self._library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        # Without DO_NOT_EXIT the library ends the process when it does not find its data.
        self.sample_rate = self._library.espeak_Initialize(self.RETRIEVE_SYNCHRONOUSLY, 0, os.fsencode(data), self.DO_NOT_EXIT)
        if self.sample_rate <= 0:
            raise RuntimeError(f"{library} does not start with the data in {data.resolve()}")
        self._blocks: list[bytes] = []
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback_type(self._receive)  # kept here: the library does not keep it alive
        self._library.espeak_SetSynthCallback(self._callback)
        self.voices = sorted(path.name for path in (data / "voices" / "!v").iterdir())

    def __exit__(self, *error: object) -> None:
        self._library.espeak_Terminate()
        self._cleanup.close()

    def _receive(self, samples: Any, count: int, events: int | None) -> int:
        if samples and count:
            self._blocks.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    def say(self, text: str, accent: str, voice: str, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Return samples (T,) in [-1, 1] at `sample_rate`. `rate` is in words per minute, pitch and range from 0 to 100."""
        if voice not in self.voices:  # the library would speak in the plain voice, without a word
            raise ValueError(f"espeak-ng has no voice {voice!r}, only {self.voices}")
        if self._library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()):
            raise ValueError(f"espeak-ng does not speak {accent!r}")
        # Louder, a third of the voices clip.
        for parameter, value in ((self.RATE, rate), (self.VOLUME, 30), (self.PITCH, pitch), (self.RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(1)  # of the breath noise; seeded with the time of day otherwise
        self._blocks.clear()
        data = text.encode()
        if self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, self.UTF8, None, None):
            raise RuntimeError(f"espeak-ng fails to say {text!r} as {accent}+{voice}")
        self._library.espeak_Synchronize()
        return np.frombuffer(b"".join(self._blocks), np.int16).astype(np.float32) / 32768


def trim(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Remove the silence at both ends except for `MARGIN` seconds."""
    magnitude = np.abs(waveform)
    loud = np.flatnonzero(magnitude > SILENCE * magnitude.max(initial=0))
    if not len(loud):
        return waveform[:0]
    margin = round(MARGIN * sample_rate)
    return waveform[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def level(waveform: np.ndarray) -> np.ndarray:
    """Scale to the loudness `LEVEL`, or less if the peak would exceed `PEAK`."""
    if not len(waveform):
        return waveform
    return waveform * min(LEVEL / np.sqrt(np.mean(waveform**2)), PEAK / np.abs(waveform).max())
