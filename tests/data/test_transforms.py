"""The promises of `data/transforms.py`: augmentation is a function of the position, is read safely, and moves nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from pile_app.data.assembly import PackedDocument, assemble, whole
from pile_app.data.batch import Batch
from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.order import Piece
from pile_app.data.shards import write_shards
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.data.transforms import AUDIO_TRANSFORMS, IMAGE_TRANSFORMS, Transforms
from pile_app.documents import ENCODED_EXTENSIONS, IMAGE, Codes, Document, Segment
from pile_app.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    image_codes=12, image_shape=(3, 8, 8), image_grid=(2, 2), audio_codes=36, sample_rate=8000, samples_per_token=320
)
ALL = [
    "flip",
    "crop(0.7)",
    "rotate(20)",
    "color(0.3)",
    "speed(0.8, 1.2)",
    "noise(10)",
    "mask(time=0.2, freq=0.2)",
    "shift(0.2)",
]


def darker(medium: Tensor, generator: Generator, by: float = 2) -> Tensor:
    """A transform of a user."""
    return (medium / by).to(medium.dtype)


def wrong(medium: Tensor, generator: Generator) -> Tensor:
    return medium.double()


def broken(medium: Tensor, generator: Generator) -> Tensor:
    raise RuntimeError("a mistake of the user's")


def picture(n: int = 0, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (height, width, 3), np.uint8)


def tone(samples: int = 4000) -> np.ndarray:
    return (0.5 * np.sin(np.arange(samples) / 5)).astype(np.float32)


def documents() -> list[Document]:
    return [
        Document((Segment.from_image(picture(n)), Segment(f"{n}"), Segment.from_audio(tone(1000 + 300 * n), 8000)), f"{n}")
        for n in range(4)
    ]


def batch(transforms: dict[int, Transforms] | None, numbers: list[int], **options: Any) -> Batch:
    """Packs of two documents at these positions; the second is of source 1."""
    packs = []
    for number in numbers:
        pair = [documents()[number % 4], documents()[(number + 1) % 4]]
        lengths = [2 + 5 + 2 + 2 + -(-(1000 + 300 * int(one.key)) // 320) for one in pair]
        sources = enumerate(zip(pair, lengths, strict=True))
        packs.append([PackedDocument(Piece(n, 0, 0, 0, length, True), one.key, one) for n, (one, length) in sources])
    made = assemble(packs, VOCABULARY, ByteTokenizer(), 64, numbers=numbers, transforms=transforms, **options)
    assert not made.rejected
    return made


def test_augmentation_depends_on_the_position_alone_and_moves_no_token() -> None:
    transforms = {0: Transforms(ALL, seed=7)}
    plain, made = batch(None, [3, 4, 5, 6]), batch(transforms, [3, 4, 5, 6])
    for name in ("tokens", "learned", "piece_starts", "image_starts", "audio_starts", "audio_tokens"):
        assert torch.equal(getattr(made, name), getattr(plain, name)), name
    assert not (made.images[::2] == plain.images[::2]).all((1, 2, 3)).any(), "every image of the source is augmented"
    assert (made.images[1::2] == plain.images[1::2]).all(), "and none of the other source"
    sounds, others = (list(one.audio.split(one.sound_tokens)) for one in (made, plain))
    assert [torch.equal(*pair) for pair in zip(sounds, others, strict=True)] == [False, True] * 4
    with ThreadPoolExecutor(2) as pool:  # other batches, in another order, by threads
        again = batch(transforms, [6, 4], decode=pool.map)
    assert torch.equal(again.images, made.images[[6, 7, 2, 3]])
    assert torch.equal(again.audio, torch.cat([sounds[n] for n in (6, 7, 2, 3)]))
    assert not torch.equal(batch({0: Transforms(ALL, seed=8)}, [3]).images[0], made.images[0])
    assert not torch.equal(batch(transforms, [7]).images[0], made.images[0]), "the document of position 3, at another one"


@pytest.mark.parametrize("name", IMAGE_TRANSFORMS)
def test_an_image_stays_an_image(name: str) -> None:
    made = [Transforms([name], 0)(picture(), position, 0, 0) for position in range(8)]
    assert all(one.dtype == np.uint8 and one.shape[2] == 3 for one in made)
    assert any(one.shape != (20, 30, 3) or (one != picture()).any() for one in made)
    grey = Transforms([name], 0)(picture()[..., :1], 0, 0, 0)
    assert grey.shape[2] == 1


@pytest.mark.parametrize("name", ["speed", "noise", "mask(0.2)", "mask(freq=0.2)", "shift"])
def test_a_sound_stays_a_sound(name: str) -> None:
    made = [Transforms([name], 0)(tone(), position, 0, 0) for position in range(8)]
    assert all(one.dtype == np.float32 and one.ndim == 1 and np.isfinite(one).all() for one in made)
    assert any(len(one) != 4000 or (one != tone()).any() for one in made)


def test_transforms_do_what_they_are_called() -> None:
    assert (Transforms(["flip(1)"], 0)(picture(), 0, 0, 0) == picture()[:, ::-1]).all()
    assert (Transforms(["flip(chance=0)"], 0)(picture(), 0, 0, 0) == picture()).all()
    kept = [Transforms(["crop(0.5)"], 0)(picture(), n, 0, 0).shape[0] / 20 for n in range(50)]
    assert min(kept) < 0.6 and max(kept) > 0.9
    fast = Transforms(["speed(2, 2)"], 0)(tone(), 0, 0, 0)
    assert len(fast) == 2000 and np.abs(np.fft.rfft(fast)).argmax() == np.abs(np.fft.rfft(tone())).argmax()
    noisy = Transforms(["noise(10)"], 0)(tone(), 0, 0, 0) - tone()
    assert np.mean(tone() ** 2) / np.mean(noisy**2) == pytest.approx(10, rel=0.1)
    masked = Transforms(["mask(time=0.5)"], 0)(np.ones(4000, np.float32), 1, 0, 0)
    edges = np.flatnonzero(np.diff(masked))
    assert len(edges) in (1, 2) and 0 < (masked == 0).sum() < 2000
    spectrum = np.abs(np.fft.rfft(Transforms(["mask(freq=0.5)"], 0)(np.eye(1, 4000, dtype=np.float32)[0], 1, 0, 0)))
    assert ((spectrum < 1e-3) | (spectrum > 0.999)).all() and 0 < (spectrum < 1e-3).mean() < 0.5
    shifted = [Transforms(["shift(0.5)"], 0)(tone() + 2, n, 0, 0) for n in range(20)]
    assert {bool(one[0]) for one in shifted} == {True, False} and all(len(one) == 4000 for one in shifted)


def test_a_function_of_the_user_gets_images_and_sounds() -> None:
    transforms = Transforms([f"{__name__}.darker(by=4)"], 0)
    assert (transforms(picture(), 0, 0, 0) == picture() // 4).all()
    assert np.allclose(transforms(tone(), 0, 0, 0), tone() / 4)
    with pytest.raises(ValueError, match=r"transforms: wrong must return a 3-d tensor of torch\.uint8"):
        Transforms([f"{__name__}.wrong"], 0)(picture(), 0, 0, 0)
    with pytest.raises(RuntimeError, match="a mistake of the user's"):  # no sample is rejected for it
        batch({0: Transforms([f"{__name__}.broken"], 0)}, [0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flp", "known are crop, flip, rotate, color, speed, noise, mask, shift, and import paths"),
        ("crop(0)", "scale must be from 0.01 to 1, not 0"),
        ("crop('a')", "scale must be from 0.01 to 1, not 'a'"),
        ("speed(1.1, 3)", "high must be from 0.5 to 2, not 3"),
        ("mask(colour=3)", "unexpected keyword argument 'colour'"),
        ("mask(time=2)", "time must be from 0 to 1, not 2"),
        ("flip(__import__('os').getpid())", "malformed node or string"),
        ("__import__('os').system('true')", "known are"),
        ("crop(0.8); flip", "invalid syntax"),
        ("no_such_package.function", "No module named 'no_such_package'"),
        ("math.no_such_function", "has no attribute 'no_such_function'"),
        ("", "invalid syntax"),
    ],
)
def test_wrong_transforms_are_named_at_start_up(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^transforms: ") as caught:
        Transforms([spec], 0)
    assert "\n" not in str(caught.value) and repr(spec) in str(caught.value) and message in str(caught.value)


def test_encoded_media_cannot_be_augmented(image: Callable[[int], Segment]) -> None:
    segment = Segment(Codes("1" * 32, 64, 0, np.arange(4)).to_bytes(), ENCODED_EXTENSIONS[IMAGE])
    with pytest.raises(ValueError, match="transforms cannot augment codes: train on the original shards"):
        assemble(
            [[whole(Document((segment,), "k"), 7)]], VOCABULARY, ByteTokenizer(), 8, transforms={0: Transforms(["flip"], 0)}
        )


def test_all_names_have_a_test() -> None:
    assert {spec.partition("(")[0] for spec in ALL} == {*IMAGE_TRANSFORMS, *AUDIO_TRANSFORMS}


def test_training_is_augmented_whatever_the_workers_and_validation_is_not(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_shards(documents(), tmp_path, split)
    patterns = {"train": str(tmp_path / "train-*.tar"), "validation": str(tmp_path / "validation-*.tar")}

    def batches(transforms: list[str], workers: int) -> tuple[list[Batch], list[Batch]]:
        sources = {"media": Source(**patterns, transforms=transforms)}  # type: ignore[arg-type]
        data = PileDataModule(sources, VOCABULARY, ByteTokenizer(), context=64, global_batch=2, num_workers=workers)
        data.setup()
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs=None, local_rank=0, global_step=0, max_steps=6, training=True, world_size=1
        )
        return list(data.train_dataloader()), list(data.val_dataloader())

    (plain, held_out), (made, validation), (again, _) = batches([], 0), batches(ALL, 0), batches(ALL, 2)
    assert len(plain) == len(made) == len(again) > 2
    for one, other, third in zip(plain, made, again, strict=True):
        assert torch.equal(one.tokens, other.tokens) and not torch.equal(one.images, other.images)
        assert torch.equal(other.images, third.images) and torch.equal(other.audio, third.audio)
    assert all(torch.equal(*pair) for pair in zip((b.images for b in held_out), (b.images for b in validation), strict=True))
    with pytest.raises(ValueError, match="transforms: 'flp' cannot be used"):
        batches(["flp"], 0)
