"""Tokenizers: text -> int32 ids (tokens,) -> text, and the cleaning of texts when shards are written.

A tokenizer is `bytes` (256 ids, the default) or a `tokenizer.json` of the `tokenizers` library. The `token_bytes` of a text's
tokens sum up to its UTF-8 bytes, for losses in bits per byte (where texts are split at whitespace, with a space a word)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pile_app.data.files import whole_file

_warn = lru_cache(logging.getLogger(__name__).warning)  # each message once
NO_TOKENS = np.zeros(0, np.int64)
_LINE_ENDS = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_UNUSUAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # what either of the two replaces
_BLANK_LINES = re.compile("\n{3,}")


def clean_text(text: str) -> str:
    """Convert to Unicode NFC with newlines as line ends; remove other control characters than tab, whitespace at the end of
    lines, and blank lines after a blank line. Cleaning twice changes nothing."""
    if _UNUSUAL.search(text):  # searching is six times as fast as replacing, and most texts have none
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", text)  # after that, since removing a control character can join a mark to its letter
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text)


class Tokenizer(Protocol):
    """Text to ids and back."""

    size: int  # ids are 0 to size - 1
    fingerprint: str  # differs between tokenizers that give different ids
    token_bytes: np.ndarray  # (size,) int64, UTF-8 bytes that each id stands for

    def encode(self, text: str) -> np.ndarray:
        """Return int32 ids (tokens,)."""

    def encode_all(self, texts: Sequence[str], breaks: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (ids, number of tokens before each break) of each text; breaks are character offsets."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes: an id is a byte."""

    def __init__(self) -> None:
        self.size, self.fingerprint, self.token_bytes = 256, "bytes", np.ones(256, np.int64)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str], breaks: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for ids, offsets in zip(map(self.encode, texts), breaks, strict=True):
            first = np.append(np.flatnonzero(ids & 0xC0 != 0x80), len(ids))  # byte of each character
            found.append((ids, first[np.array(offsets, np.int64)]))
        return found

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode UTF-8; invalid bytes, which an untrained model writes, become U+FFFD."""
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")


# Texts that show what a tokenizer loses, in NFC as `clean_text` returns it.
PROBES = {
    "capitals": "The CAT sat",
    "spaces": " a  b ",
    "newlines and tabs": "a\n\nb\tc",
    "accents": "d\u00e9j\u00e0 vu",
    "punctuation": "it's 3.5, (or) \u201cso\u201d!",
    "compatibility characters": "\ufb01ve \u00bd \u2460",
    "CJK": "\u732b\u306f\u3069\u3053",
    "emoji": "ok \U0001f469\u200d\U0001f680",
}
_MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)  # <|user|>, [INST]; added words and runs of spaces are ordinary tokens
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ANY = 1 << 30
PARTS = ("normalizer", "pre_tokenizer", "decoder")


class JsonTokenizer:
    """A `tokenizer.json`: BPE (byte-level or with byte fallback), Unigram, WordPiece or WordLevel.

    Nothing is added to a text or truncated. Control tokens that are written in a text are encoded as ordinary text, except for
    the `<unk>` of a WordLevel model, as in WikiText. A warning says what the tokenizer loses.

    Args:
        path: of the file.
        turns: texts that are encoded as others, with control tokens: markers of roles as the chat template of open weights."""

    def __init__(self, path: str | Path, turns: Mapping[str, str] | None = None) -> None:
        from tokenizers import Tokenizer

        try:
            data = Path(path).read_bytes()
            description = plain_description(json.loads(data))
            self._tokenizer = Tokenizer.from_str(json.dumps(description))
            self._tokenizer.encode("\U000f0000")  # fails if there is no token for unknown words
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(
                f"tokenizer {str(path)!r} cannot be used: {error!r:.300}. "
                'Give "bytes", or the path of a tokenizer.json of the tokenizers library'
            ) from error
        self.turns = {
            text: np.array(self._tokenizer.encode(other, add_special_tokens=False).ids, np.int32)
            for text, other in (turns or {}).items()
        }
        self._tokenizer.encode_special_tokens = True
        data += json.dumps(turns).encode() if turns else b""
        self.fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
        vocabulary, model = self._tokenizer.get_vocab(with_added_tokens=True), description["model"]
        self.size = max(vocabulary.values()) + 1
        unknown = model.get("unk_token") if model.get("unk_id") is None else self._tokenizer.id_to_token(model["unk_id"])
        control = [token["id"] for token in description["added_tokens"] if token["special"] and token["content"] != unknown]
        has_bytes = model.get("byte_fallback") or "ByteFallback" in json.dumps(description["decoder"])
        single_bytes = [token for piece, token in vocabulary.items() if has_bytes and _BYTE.fullmatch(piece)]
        # Most characters of a text that become one token; if a token covers more, its name is written in the text.
        self._longest = np.full(self.size, _ANY)
        self._longest[control], self._longest[single_bytes] = 1, len("<0x00>") - 1
        self.token_bytes = np.zeros(self.size, np.int64)
        self.token_bytes[single_bytes] = 1
        if '"ByteLevel"' in json.dumps([description[part] for part in PARTS]):  # a character of a piece is a byte
            added = {token["id"] for token in description["added_tokens"]}
            for piece, token in vocabulary.items():
                self.token_bytes[token] = len(piece.encode() if token in added else piece)
        else:
            first = self._tokenizer.encode("a", add_special_tokens=False).ids[:1]
            rest = sorted(set(vocabulary.values()) - set(single_bytes))
            before, *after = map(self.decode, [first, *([*first, token] for token in rest)])
            self.token_bytes[rest] = [max(0, len(text.encode()) - len(before.encode())) for text in after]
        back = {name: self.decode(self.encode(text)) for name, text in PROBES.items()}
        if lost := [name for name, text in PROBES.items() if back[name] != text]:
            lowers = lost[0] == "capitals" and back["capitals"] == PROBES["capitals"].lower()
            losses = ", ".join(["lower-cases"] * lowers + [f"loses {name}" for name in lost[lowers:]])
            example = f"{PROBES[lost[-1]]!r} comes back as {back[lost[-1]]!r}"
            _warn(f"tokenizer {str(path)!r} {losses}: text cannot come back as written, {example}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # lost when a Tokenizer is pickled

    def _encode(self, text: str, encoding: Any = None) -> list[tuple[np.ndarray, int, Any]]:
        """Encode a text in pieces (ids, start, encoding), cut within the names of control tokens."""
        if encoding is None:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        longest = self._longest[ids]
        if longest.min(initial=_ANY) < _ANY:
            starts, stops = np.array(encoding.offsets).T
            if cuts := sorted(set((starts[stops - starts > longest] + 1).tolist())):
                pieces = pairwise([0, *cuts, len(text)])
                return [(ids, a + start, piece) for a, b in pieces for ids, start, piece in self._encode(text[a:b])]
        return [(ids, 0, encoding)]

    def encode(self, text: str) -> np.ndarray:
        return self.turns[text] if text in self.turns else np.concatenate([ids for ids, _, _ in self._encode(text)])

    def encode_all(self, texts: Sequence[str], breaks: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for text, offsets, encoding in zip(texts, breaks, encodings, strict=True):
            if text in self.turns:
                found.append((self.turns[text], NO_TOKENS))
                continue
            pieces, before = self._encode(text, encoding), NO_TOKENS
            if offsets:  # a token that reaches over a break is after it
                stops = [start + stop for _, start, piece in pieces for _, stop in piece.offsets]
                before = np.searchsorted(stops, offsets, side="right")
            found.append((np.concatenate([ids for ids, _, _ in pieces]), before))
        return found

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)


def plain_description(description: Mapping[str, Any]) -> dict[str, Any]:
    """Change a `tokenizer.json` so that it adds nothing to a text and removes no space, and mark all its control tokens."""
    unknown = description["model"].get("unk_token") if description["model"]["type"] == "WordLevel" else None
    tokens = [
        token | {"special": token["content"] != unknown and (token["special"] or bool(_MARKUP.fullmatch(token["content"])))}
        for token in description.get("added_tokens") or []
    ]
    # Where words are split at whitespace, the space that is added before each word keeps them apart.
    splits = re.search('"(Whitespace|WhitespaceSplit|BertPreTokenizer|Removed)"', json.dumps(description.get("pre_tokenizer")))
    parts = {part: _plain_part(description.get(part), bool(splits)) for part in PARTS}
    return {**description, **parts, "added_tokens": tokens, "truncation": None, "padding": None, "post_processor": None}


def _plain_part(part: Any, splits: bool) -> Any:
    if not part or (not splits and (part["type"] == "Prepend" or (part["type"] == "Strip" and "start" in part))):
        return None
    changes = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}} if not splits else {}
    changes["WordPiece"] = {"cleanup": False}  # of the decoder: it moves punctuation
    lists = {name: [_plain_part(one, splits) for one in value] for name, value in part.items() if isinstance(value, list)}
    return part | changes.get(part["type"], {}) | {name: list(filter(None, value)) for name, value in lists.items()}


def load_tokenizer(spec: str, turns: Mapping[str, str] | None = None) -> Tokenizer:
    """Load `bytes`, or the `tokenizer.json` at the path `spec`. Raises ValueError if the file cannot be read. `turns`: see
    `JsonTokenizer`."""
    return ByteTokenizer() if spec == "bytes" else JsonTokenizer(spec, turns)


def train_tokenizer(texts: Iterable[str], kind: Literal["bpe", "words"], size: int, path: str | Path) -> None:
    """Train a tokenizer of at most `size` tokens and write it to `path`; the same texts give the same file.

    `bpe` is byte-level; `words` are the most frequent words, lower-cased, split at whitespace and punctuation, else `<unk>`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    smallest = {"bpe": 256, "words": 2}
    if size < smallest.get(kind, size + 1):
        raise ValueError(f"no tokenizer of kind {kind!r} and size {size} can be trained; kinds and smallest sizes: {smallest}")
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
