"""The promises of `data/shards.py`: what is written is read back, and damage is named where it is met."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pile_app.data import shards
from pile_app.data.shards import (
    INDEX_SUFFIX,
    ShardError,
    ShardIndex,
    ShardReader,
    ShardWriter,
    build_index,
    expand_shards,
    load_index,
    write_shards,
)
from pile_app.documents import AUDIO, IMAGE, TEXT, BadSample, Document, Segment

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)
TONE = 0.5 * np.sin(np.arange(800) / 5)
DOCUMENTS = [
    Document((Segment("one é"),), "plain"),
    Document((Segment.from_image(GREY), Segment("a caption", loss=False)), "folder/pair", ordered=False, meta={"label": "x"}),
    Document((Segment("listen:"), Segment.from_audio(TONE, 8000), Segment("was it a tone?")), "ü-" + "long" * 60),
    *(Document((Segment(f"text number {n} " * (n % 7 + 1)),), f"text-{n:04d}") for n in range(20)),
]


@pytest.fixture
def shard(tmp_path: Path) -> str:
    return write_shards(DOCUMENTS, tmp_path, "test")[0].path


def edit(path: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(change(bytearray(data)))


def flip(place: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[place] ^= 1
        return data

    return change


def tar_of(path: Path, files: list[tuple[str, bytes]]) -> str:
    """A tar as another program writes it."""
    import io

    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def test_documents_come_back_from_shards_unchanged(tmp_path: Path) -> None:
    indexes = write_shards(DOCUMENTS, tmp_path, "test", shard_bytes=8192)
    assert len(indexes) > 2
    reader = ShardReader(indexes)
    read = [reader.document(number, sample) for number, index in enumerate(indexes) for sample in range(len(index))]
    assert read == DOCUMENTS
    assert [key for index in indexes for key in index.keys] == [document.key for document in DOCUMENTS]
    assert not any(index.rejected for index in indexes)


def test_the_index_says_what_is_in_the_shard(shard: str) -> None:
    index = load_index(shard)
    assert index.first_segment[:4].tolist() == [0, 1, 3, 6]
    assert index.modality[:6].tolist() == [TEXT, IMAGE, TEXT, TEXT, AUDIO, TEXT]
    assert index.segment_size[:6].tolist() == [6, 48, 9, 7, 800, 14]
    assert index.sample_rate[:6].tolist() == [0, 0, 0, 0, 8000, 0]
    assert index.loss[:6].tolist() == [True, True, False, True, True, True]
    assert index.flags[:3].tolist() == [0, shards.UNORDERED, 0]
    assert index.tar_size == os.path.getsize(shard)


def test_an_index_loads_as_it_was_built(shard: str) -> None:
    built, loaded = build_index(shard), load_index(shard)
    for field in dataclasses.fields(ShardIndex):
        assert np.array_equal(getattr(built, field.name), getattr(loaded, field.name)), field.name
    assert built.fingerprint == loaded.fingerprint


def test_samples_are_read_in_any_order(shard: str) -> None:
    reader = ShardReader([load_index(shard)])
    for sample in np.random.default_rng(0).permutation(len(DOCUMENTS)).tolist():
        assert reader.document(0, sample) == DOCUMENTS[sample]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_shards(DOCUMENTS, tmp_path / "a", "test")[0]
    second = write_shards(DOCUMENTS, tmp_path / "b", "test")[0]
    assert Path(first.path).read_bytes() == Path(second.path).read_bytes()
    assert first.fingerprint == second.fingerprint


def test_members_carry_no_time_and_short_names_no_extra_header(tmp_path: Path) -> None:
    path = write_shards(DOCUMENTS[:2] + DOCUMENTS[3:], tmp_path, "test")[0].path
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert {member.mtime for member in members} == {0}
    assert all(member.offset_data == member.offset + tarfile.BLOCKSIZE and not member.pax_headers for member in members)


def test_the_fingerprint_changes_with_any_sample(tmp_path: Path) -> None:
    def fingerprint(documents: list[Document], name: str) -> str:
        return write_shards(documents, tmp_path, name)[0].fingerprint

    changed = [*DOCUMENTS[:-1], dataclasses.replace(DOCUMENTS[-1], segments=(Segment("another"),))]
    swapped = [*DOCUMENTS[:-2], DOCUMENTS[-1], DOCUMENTS[-2]]
    prints = {fingerprint(one, f"s{n}") for n, one in enumerate([DOCUMENTS, changed, swapped, DOCUMENTS[:-1]])}
    assert len(prints) == 4


def test_documents_without_a_key_are_numbered(tmp_path: Path) -> None:
    documents = [Document((Segment(f"{n}" * 2000),)) for n in range(5)]
    indexes = write_shards(documents, tmp_path, "p", shard_bytes=8192)
    assert [key for index in indexes for key in index.keys] == [f"p-{n:09d}" for n in range(5)]


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "test")
    writer.write(DOCUMENTS[0])
    assert not list(tmp_path.glob("*.tar"))
    writer.close()
    assert [path.name for path in tmp_path.glob("*.tar*")].count("test-000000.tar") == 1
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("key", ["v1.2", "folder/a.b", ".hidden"])
def test_a_key_that_would_be_read_back_as_another_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="first dot"):
        ShardWriter(tmp_path, "test").write(Document((Segment("x"),), key))


def test_samples_of_one_key_are_rejected_and_not_merged(tmp_path: Path) -> None:
    documents = [Document((Segment(text),), key) for text, key in (("1", "a"), ("2", "b"), ("3", "b"), ("4", "c"), ("5", "a"))]
    index = write_shards(documents, tmp_path, "test")[0]
    assert index.keys == ["a", "c"]
    assert index.rejected == [["b", "duplicate_key"], ["a", "duplicate_key"]]
    assert ShardReader([index]).document(0, 0).segments == (Segment("1"),)


def test_shards_of_other_programs_are_read_and_their_bad_samples_listed(tmp_path: Path) -> None:
    png, flac = Segment.from_image(GREY).file, Segment.from_audio(TONE, 8000).file
    files = [("./a/1.jpg", png), ("./a/1.txt", b"caption"), ("./a/2.jpg", b"no image"), ("./a/3.txt", b"\xff")]
    files += [("./a/4.flac", flac), ("./a/4.json", b'{"text": "spoken"}'), ("./a/5.json", b'{"segments": 5}')]
    index = build_index(tar_of(tmp_path / "foreign.tar", files))
    assert index.keys == ["./a/1", "./a/4"]
    assert index.rejected == [["./a/2", "undecodable_image"], ["./a/3", "invalid_utf8"], ["./a/5", "invalid_json"]]
    reader = ShardReader([load_index(index.path)])
    assert [segment.data for segment in reader.document(0, 0).segments] == [png, "caption"]
    assert [segment.data for segment in reader.document(0, 1).segments] == [flac, "spoken"]


@pytest.mark.parametrize("cut", ["empty", "header", "payload", "between members", "between samples", "half the end"])
def test_a_truncated_shard_is_never_indexed(shard: str, cut: str) -> None:
    index = load_index(shard)
    offset, size = int(index.offset[2]), int(index.size[2])
    with tarfile.open(shard) as tar:
        inner = next(member for member in tar if offset < member.offset < offset + size)
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    places = {
        "empty": 0,
        "header": inner.offset + 100,
        "payload": inner.offset_data + 600,
        "between members": inner.offset,
        "between samples": offset + size,
        "half the end": end + 511,
    }
    edit(shard, lambda data: data[: places[cut]])
    with pytest.raises(ShardError, match=r"test-000000\.tar"):
        build_index(shard)
    with pytest.raises(ShardError, match="stale"):
        load_index(shard)


@pytest.mark.parametrize("damage", ["one bit", "zeros", "a block of zeros"])
def test_a_damaged_header_in_the_middle_does_not_end_the_shard_in_silence(shard: str, damage: str) -> None:
    offset = int(load_index(shard).offset[5])
    if damage == "one bit":
        edit(shard, flip(offset + 10))
    else:
        size = 512 if damage == "zeros" else 4096
        edit(shard, lambda data: data[:offset] + bytes(size) + data[offset + size :])
    with pytest.raises(ShardError, match="damaged or truncated"):
        build_index(shard)


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"\x1f\x8b" + b"compressed" * 200)
    with pytest.raises(ShardError, match="not an uncompressed tar"):
        build_index(str(path))


def test_a_flipped_bit_spoils_its_sample_and_no_other(shard: str) -> None:
    index = load_index(shard)
    edit(shard, flip(int(index.offset[4]) + 512 + 20))
    reader = ShardReader([load_index(shard)])
    with pytest.raises(BadSample) as caught:
        reader.document(0, 4)
    assert caught.value.reason == "checksum" and "text-0001" in caught.value.detail
    assert [reader.document(0, sample) for sample in (3, 5)] == [DOCUMENTS[3], DOCUMENTS[5]]


def test_a_stale_or_missing_index_says_how_to_mend_it(shard: str) -> None:
    edit(shard, lambda data: data + bytes(512))
    with pytest.raises(ShardError, match=r"stale: .* run `pile index .*test-000000\.tar`"):
        load_index(shard)
    os.remove(shard + INDEX_SUFFIX)
    with pytest.raises(ShardError, match=r"has no index: run `pile index .*test-000000\.tar`"):
        load_index(shard)


def test_an_index_of_another_version_is_refused(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "INDEX_VERSION", shards.INDEX_VERSION + 1)
        build_index(shard)
    with pytest.raises(ShardError, match=f"has version {shards.INDEX_VERSION + 1}, not {shards.INDEX_VERSION}: run"):
        load_index(shard)


def test_a_damaged_index_is_refused(shard: str) -> None:
    whole = Path(shard + INDEX_SUFFIX).read_bytes()
    for length in (0, 2, 100, len(whole) // 2, len(whole) - 3):
        Path(shard + INDEX_SUFFIX).write_bytes(whole[:length])
        with pytest.raises(ShardError, match="cannot be read"):
            load_index(shard)
    Path(shard + INDEX_SUFFIX).write_bytes(flip(200)(bytearray(whole)))
    with pytest.raises(ShardError, match="cannot be read"):
        load_index(shard)


def test_a_missing_shard_is_named(tmp_path: Path, shard: str) -> None:
    absent = str(tmp_path / "absent.tar")
    for call in (build_index, expand_shards):
        with pytest.raises(ShardError, match=r"absent\.tar"):
            call(absent)
    index = load_index(shard)
    os.remove(shard)
    with pytest.raises(ShardError, match="cannot be opened"):
        ShardReader([index]).document(0, 0)


def test_braces_and_wildcards_expand_in_order(tmp_path: Path) -> None:
    for name in ("a-000", "a-001", "a-002", "b-7"):
        (tmp_path / f"{name}.tar").touch()
    t = str(tmp_path)
    assert expand_shards(f"{t}/a-{{000..002}}.tar") == [f"{t}/a-{n:03d}.tar" for n in range(3)]
    assert expand_shards(f"{t}/a-*.tar") == [f"{t}/a-{n:03d}.tar" for n in range(3)]
    assert expand_shards(f"{t}/{{b,a}}-*[27].tar") == [f"{t}/b-7.tar", f"{t}/a-002.tar"]
    assert expand_shards([f"{t}/b-7.tar", f"{t}/a-001.tar"]) == [f"{t}/b-7.tar", f"{t}/a-001.tar"]


def test_a_pattern_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a-0.tar").touch()
    t = str(tmp_path)
    for pattern, message in (
        (f"{t}/c-*.tar", "no shard matches"),
        (f"{t}/a-{{0..1}}.tar", "does not exist"),
        ([f"{t}/a-0.tar", f"{t}/*.tar"], "twice"),
        (f"{t}/a-{{0..1.tar", "brace"),
    ):
        with pytest.raises(ShardError, match=message):
            expand_shards(pattern)


def test_a_reader_survives_pickling_and_forking(shard: str) -> None:
    reader = ShardReader([load_index(shard)])
    assert reader.document(0, 0) == DOCUMENTS[0]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.document(0, 1) == DOCUMENTS[1]
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.document(0, 2) == DOCUMENTS[2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.document(0, 3) == DOCUMENTS[3]
