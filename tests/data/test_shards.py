"""The promises of `data/shards.py`: what is written is read back, and damage is named where it is met."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data import index as index_module
from pile_app.data import shards
from pile_app.data.index import INDEX_SUFFIX, INDEX_VERSION, UNORDERED, ShardIndex, build_index, load_index, save_arrays
from pile_app.data.packing import sentence_ends
from pile_app.data.shards import Shards, ShardWriter, expand_shards, write_shards
from pile_app.data.tar import ShardError, read_members
from pile_app.documents import AUDIO, ENCODED_EXTENSIONS, IMAGE, TEXT, BadSample, Codes, Document, Segment

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
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def test_documents_come_back_from_shards_unchanged(tmp_path: Path) -> None:
    indexes = write_shards(DOCUMENTS, tmp_path, "test", shard_bytes=8192)
    assert len(indexes) > 2
    reader = Shards([index.path for index in indexes])
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
    assert index.flags[:3].tolist() == [0, UNORDERED, 0]
    assert index.tar_size == os.path.getsize(shard)


def test_an_index_loads_as_it_was_built(shard: str) -> None:
    built, loaded = build_index(shard), load_index(shard)
    for field in dataclasses.fields(ShardIndex):
        assert np.array_equal(getattr(built, field.name), getattr(loaded, field.name)), field.name
    assert built.fingerprint == loaded.fingerprint


def test_samples_are_read_in_any_order(shard: str) -> None:
    reader = Shards([shard])
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
    assert Shards([index.path]).document(0, 0).segments == (Segment("1"),)


def test_shards_of_other_programs_are_read_and_their_bad_samples_listed(tmp_path: Path) -> None:
    png, flac = Segment.from_image(GREY).file, Segment.from_audio(TONE, 8000).file
    files = [("./a/1.jpg", png), ("./a/1.txt", b"caption"), ("./a/2.jpg", b"no image"), ("./a/3.txt", b"\xff")]
    files += [("./a/4.flac", flac), ("./a/4.json", b'{"text": "spoken"}'), ("./a/5.json", b'{"segments": 5}')]
    index = build_index(tar_of(tmp_path / "foreign.tar", files))
    assert index.keys == ["./a/1", "./a/4"]
    assert index.rejected == [["./a/2", "undecodable_image"], ["./a/3", "invalid_utf8"], ["./a/5", "invalid_json"]]
    reader = Shards([index.path])
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
    with pytest.raises(ShardError, match=r"x\.tar.*damaged.*what stands at byte 0 is no header"):
        build_index(str(path))


def test_a_flipped_bit_spoils_its_sample_and_no_other(shard: str) -> None:
    index = load_index(shard)
    edit(shard, flip(int(index.offset[4]) + 512 + 20))
    reader = Shards([shard])
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


def test_an_index_of_another_version_is_refused_whatever_it_holds(shard: str) -> None:
    save_arrays(shard + INDEX_SUFFIX, {"other": np.zeros(3)}, {"version": "2"})
    with pytest.raises(ShardError, match=f"has version 2, not {INDEX_VERSION}: run"):
        load_index(shard)


def test_a_damaged_index_is_refused(shard: str) -> None:
    whole = Path(shard + INDEX_SUFFIX).read_bytes()
    for length in (0, 2, 7, 8, 100, len(whole) // 2, len(whole) - 3):
        Path(shard + INDEX_SUFFIX).write_bytes(whole[:length])
        with pytest.raises(ShardError, match="cannot be read"):
            load_index(shard)
    Path(shard + INDEX_SUFFIX).write_bytes(b"\x80\x04" + whole[2:])  # as a pickle begins
    with pytest.raises(ShardError, match=r"cannot be read .*: run `pile index .*test-000000\.tar`"):
        load_index(shard)


def test_a_missing_shard_is_named(tmp_path: Path, shard: str) -> None:
    absent = str(tmp_path / "absent.tar")
    for call in (build_index, expand_shards):
        with pytest.raises(ShardError, match=r"absent\.tar"):
            call(absent)
    reader = Shards([shard])
    reader.index(0)
    os.remove(shard)
    with pytest.raises(ShardError, match="cannot be opened"):
        reader.document(0, 0)


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
    reader = Shards([shard])
    assert reader.document(0, 0) == DOCUMENTS[0]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.document(0, 1) == DOCUMENTS[1]
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.document(0, 2) == DOCUMENTS[2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.document(0, 3) == DOCUMENTS[3]


def test_a_reader_holds_only_some_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 3)
    documents = [Document((Segment(f"{n}" * 3000),), f"d-{n}") for n in range(10)]
    writer = ShardWriter(tmp_path, "x")
    for document in documents:
        writer.write(document)
        writer.finish_shard()
    reader = Shards([index.path for index in writer.close()])
    assert len(reader) == 10
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(10), *reversed(range(10)), 0, 5, 0, 5]:
        assert reader.document(number, 0) == documents[number]
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 3


# What is known of long texts


def test_the_index_knows_where_the_sentences_of_long_texts_end(tmp_path: Path) -> None:
    long = "Ein Satz über Öl, der lang genug ist. " * 40
    codes = Codes("ab" * 16, 999, 0, np.arange(300), np.array([[200, 700], [55, 180]]))
    documents = [
        Document((Segment("short."), Segment(long)), "a"),
        Document((Segment(codes.to_bytes(), ENCODED_EXTENSIONS[TEXT]), Segment(long)), "b"),
    ]
    index = write_shards(documents, tmp_path, "x")[0]
    assert not index.rejected and index.segment_size.tolist() == [6, len(long.encode()), 999, len(long.encode())]
    ends = sentence_ends(long)
    assert len(ends) > 5 and index.breaks_of_segments(index.breaks).keys() == {1, 2, 3}
    for segment in (1, 3):
        assert [long.encode()[:place].decode() for place in index.breaks_of_segments(index.breaks)[segment]] == [
            long[:end] for end in ends
        ]
    assert index.breaks_of_segments(index.breaks)[2].tolist() == [200, 700]


@given(st.text(st.sampled_from("ab .\n!?\u3002\u201d\xe9")) | st.text(), st.integers(1, 400))
def test_sentences_end_inside_a_long_text_in_order_and_far_apart(text: str, times: int) -> None:
    long = text * times
    ends = sentence_ends(long)
    assert all(b - a >= 128 for a, b in zip([0, *ends], ends, strict=False))
    assert all(0 < end < len(long) for end in ends)
    for end in ends:  # after a full stop, with what closes it, or after a line
        before = long[:end].rstrip("\"'\u2019\u201d)]")
        assert before[-1] in ".!?\u2026\u3002\uff01\uff1f\n"


# Tars of other programs

names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=70).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=5).map("/".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(paths, st.integers(0, 2000), st.sampled_from([0, 1.5, 1e10])), min_size=1, max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.booleans(),
)
def test_members_are_those_that_the_standard_library_finds(
    members: list[tuple[str, int, float]], format: int, with_folders: bool
) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for number, (name, size, mtime) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, mtime if format == tarfile.PAX_FORMAT else int(mtime)
            if with_folders and number % 2:
                info.type, info.size = tarfile.DIRTYPE, 0
            try:
                tar.addfile(info, io.BytesIO(bytes([number]) * size))
            except ValueError:  # longer than the format can say
                continue
    data = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(one.name, one.offset_data, one.size, one.isfile()) for one in tar]
    found = list(read_members(lambda size, offset: data[offset : offset + size], len(data)))
    assert [(one.name.rstrip("/"), one.data, one.size, one.kind == "0") for one in found] == [
        (name.rstrip("/"), *rest) for name, *rest in expected
    ]


def header(name: bytes, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """A block as anybody may write it. size: a number, or the 12 bytes of the field."""
    field = b"%011o\0" % size if isinstance(size, int) else size
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind)
    block += b"\0" * 100 + magic
    block += bytes(512 - len(block))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def hostile(tmp_path: Path, *blocks: bytes) -> str:
    """A tar of one good sample, `blocks`, and another good sample."""
    path = tmp_path / "hostile.tar"
    first, last = (header(name, 4) + padded(b"fine") for name in (b"first.txt", b"last.txt"))
    path.write_bytes(first + b"".join(blocks) + last + bytes(1024))
    return str(path)


def pax(*records: tuple[str, str]) -> bytes:
    content = b""
    for key, value in records:
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        content += str(length).encode() + rest
    return header(b"PaxHeader", len(content), b"x") + padded(content)


MEMBER = header(b"bad.txt", 4) + padded(b"evil")


@pytest.mark.parametrize(
    "blocks",
    [
        header(b"/etc/bad.txt", 4) + padded(b"evil"),
        header(b"../bad.txt", 4) + padded(b"evil"),
        header(b"a/../../bad.txt", 4) + padded(b"evil"),
        pax(("path", "/etc/bad.txt")) + MEMBER,
        pax(("path", "a/../bad.txt")) + MEMBER,
        header(b"././@LongLink", 11, b"L") + padded(b"../bad.txt\0") + MEMBER,
        header(b"bad.txt", 0, b"1"),  # hard link
        header(b"bad.txt", 0, b"2"),  # symbolic link
        header(b"bad.txt", 0, b"3"),  # character device
        header(b"bad.txt", 0, b"4"),  # block device
        header(b"bad.txt", 0, b"6"),  # pipe
        header(b"bad.txt", 1 << 30, b"2"),  # a link that claims a gigabyte
        header(b"bad.txt", 4, b"S") + padded(b"evil"),  # sparse, GNU
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "99999999999")) + MEMBER,
        header(b"bad.txt", 4, b"M") + padded(b"evil"),  # the rest of a file of another tar
        header(b"bad.txt", 4, b"V") + padded(b"evil"),
        header(b"bad.txt", 4, b"\xe9") + padded(b"evil"),
        header(b"bad\xff.txt", 4) + padded(b"evil"),  # no UTF-8
    ],
)
def test_members_that_no_data_needs_are_rejected_and_the_others_read(tmp_path: Path, blocks: bytes) -> None:
    index = build_index(hostile(tmp_path, blocks))
    assert index.keys == ["first", "last"]
    assert [reason for _, reason in index.rejected] == ["unsafe_member"]
    loaded = load_index(index.path)
    assert loaded.rejected == index.rejected
    reader = Shards([index.path])
    assert [reader.document(0, sample).segments[0].text for sample in range(2)] == ["fine", "fine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.tar", "hostile.tar.index.safetensors"]


@pytest.mark.parametrize(
    "blocks",
    [
        header(b"PaxHeader", 2 << 30, b"x") + MEMBER,  # 2 GB of header
        header(b"././@LongLink", 2 << 30, b"L") + MEMBER,
        header(b"PaxHeader", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"x") + MEMBER,  # base 256: more than 2 ** 63
        header(b"PaxHeader", b"\xff" * 12, b"x") + MEMBER,
        header(b"bad.txt", 1 << 32) + padded(b"evil"),  # beyond the end
        header(b"bad.txt", b"\x80" + b"\0" * 7 + b"\x7f\0\0\0") + padded(b"evil"),
        header(b"bad.txt", b"\xff" * 12) + padded(b"evil"),
        header(b"bad.txt", b"-0000000004\0") + padded(b"evil"),  # backwards
        header(b"bad.txt", b"-7777777777\0") + padded(b"evil"),  # to where it stands, for ever
        header(b"bad.txt", b"0000000000x\0") + padded(b"evil"),
        pax(("size", "-512")) + MEMBER,  # to its own header
        pax(("size", "-1024")) + MEMBER,
        pax(("size", "99999999999")) + MEMBER,
        pax(("size", "many")) + MEMBER,
        header(b"PaxHeader", 8, b"x") + padded(b"-5 a=b\n\n") + MEMBER,
        header(b"PaxHeader", 8, b"x") + padded(b"0 a=bcd\n") + MEMBER,
        header(b"PaxHeader", 8, b"x") + padded(b"99 a=bc\n") + MEMBER,
        header(b"PaxHeader", 8, b"x") + padded(b"abcdefgh") + MEMBER,
        b"x" * 512 + MEMBER,
        MEMBER.replace(b"bad", b"sad", 1),  # another name than was summed
        bytes(512) + MEMBER,  # what follows the end of the archive
    ],
)
def test_headers_that_cannot_be_are_an_error_of_the_shard(tmp_path: Path, blocks: bytes) -> None:
    path = hostile(tmp_path, blocks)
    with pytest.raises(ShardError, match=r"hostile\.tar.* is damaged or truncated"):
        build_index(path)
    assert not Path(path + INDEX_SUFFIX).exists()


def test_a_large_header_of_many_records_is_read_at_once(tmp_path: Path) -> None:
    content = b"6 a=b\n" * 150_000
    index = build_index(hostile(tmp_path, header(b"PaxHeader", len(content), b"x") + padded(content) + MEMBER))
    assert index.keys == ["first", "bad", "last"]


def test_long_names_and_sizes_in_base_256_are_read(tmp_path: Path) -> None:
    name = "folder/" * 40 + "ü.txt"
    blocks = [
        header(b"././@LongLink", len(name.encode()) + 1, b"L") + padded(name.encode() + b"\0") + MEMBER,
        header(b"base.txt", b"\x80" + b"\0" * 10 + b"\x04") + padded(b"evil"),
        pax(("path", name.replace("ü", "ж")), ("size", "4")) + header(b"bad.txt", 0) + padded(b"evil"),
        header(b"old.txt", 4, b"\0", b"\0" * 8) + padded(b"evil"),
        header(b"contiguous.txt", 4, b"7") + padded(b"evil"),
        header(b"folder", 1 << 20, b"5"),
    ]
    index = build_index(hostile(tmp_path, *blocks))
    folder = "folder/" * 40
    assert index.keys == ["first", folder + "ü", "base", folder + "ж", "old", "contiguous", "last"] and not index.rejected
    assert load_index(index.path).keys == index.keys
    reader = Shards([index.path])
    texts = [reader.document(0, sample).segments[0].text for sample in range(len(index))]
    assert texts == ["fine", *["evil"] * 5, "fine"]
    assert [reader.document(0, sample).key for sample in range(len(index))] == index.keys


def test_a_sample_larger_than_allowed_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_SAMPLE_BYTES", 4096)
    files = [("a.txt", b"a"), ("b.txt", b"b" * 3000), ("b.png", b"b" * 3000), ("c.txt", b"c")]
    index = build_index(tar_of(tmp_path / "x.tar", files))
    assert index.keys == ["a", "c"] and index.rejected == [["b", "sample_too_large"]]


# Indexes


def test_an_index_is_arrays_and_json_and_no_pickle(shard: str) -> None:
    from safetensors.numpy import load_file

    whole = Path(shard + INDEX_SUFFIX).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    description = json.loads(whole[8 : 8 + length])
    assert description.keys() == {*ShardIndex.TYPES, "__metadata__"}
    loaded = load_file(shard + INDEX_SUFFIX)
    index = load_index(shard)
    assert all(np.array_equal(loaded[name], getattr(index, name)) for name in ShardIndex.TYPES)
    source = Path(shards.__file__).read_text()
    assert "pickle" not in source and "np.load" not in source


def examine(shard: str) -> None:
    """All that is asked of an index and its shard; may raise what says that they are damaged, and nothing else."""
    try:
        reader = Shards([shard])
        index = reader.index(0)
    except ShardError as error:
        assert "test-000000.tar" in str(error) and f"run `pile index {shard}`" in str(error)
        return
    assert len(index) == len(index.offset) >= 1
    for sample in range(len(index)):
        for read in (reader.document, reader.document_to_train):
            with contextlib.suppress(ShardError, BadSample):
                read(0, sample)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """A shard with long texts, and its index."""
    documents = [*DOCUMENTS, Document((Segment("A sentence that stands here often. " * 30),), "long")]
    path = write_shards(documents, tmp_path_factory.mktemp("indexed"), "test")[0].path
    return path, Path(path + INDEX_SUFFIX).read_bytes()


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_a_bit_that_flips_in_the_header_of_an_index_is_no_crash(indexed: tuple[str, bytes], data: st.DataObject) -> None:
    shard, whole = indexed
    stop = 8 + int.from_bytes(whole[:8], "little")
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, stop - 1))] ^= 1 << data.draw(st.integers(0, 7))
    Path(shard + INDEX_SUFFIX).write_bytes(changed)
    examine(shard)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_index_that_is_cut_off_is_refused(indexed: tuple[str, bytes], data: st.DataObject) -> None:
    shard, whole = indexed
    length = data.draw(st.integers(0, len(whole) - 1))
    Path(shard + INDEX_SUFFIX).write_bytes(whole[:length])
    with pytest.raises(ShardError, match=r"cannot be read .*: run `pile index .*test-000000\.tar`"):
        load_index(shard)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.binary(max_size=300))
def test_an_index_of_anything_is_refused(indexed: tuple[str, bytes], data: st.DataObject, anything: bytes) -> None:
    shard, whole = indexed
    stop = 8 + int.from_bytes(whole[:8], "little")
    description = json.loads(whole[8:stop])
    name = data.draw(st.sampled_from([*ShardIndex.TYPES, "__metadata__"]))
    value = data.draw(
        st.none() | st.integers() | st.lists(st.integers(), max_size=3)
        | st.fixed_dictionaries({"data_offsets": st.lists(st.integers() | st.floats() | st.text(), max_size=3) | st.integers()})
    )  # fmt: skip
    text = json.dumps(description | {name: value}).encode()
    for content in (anything, len(text).to_bytes(8, "little") + text + whole[stop:], (2**40).to_bytes(8, "little") + whole[8:]):
        Path(shard + INDEX_SUFFIX).write_bytes(content)
        with pytest.raises(ShardError, match=r"cannot be read .*: run `pile index .*test-000000\.tar`"):
            load_index(shard)


@pytest.mark.parametrize("name", ShardIndex.TYPES)
def test_an_index_whose_arrays_do_not_fit_together_is_refused(indexed: tuple[str, bytes], name: str) -> None:
    shard, whole = indexed
    stop = 8 + int.from_bytes(whole[:8], "little")
    description = json.loads(whole[8:stop])
    description[name]["data_offsets"][1] -= np.dtype(ShardIndex.TYPES[name]).itemsize
    text = json.dumps(description).encode()
    Path(shard + INDEX_SUFFIX).write_bytes(len(text).to_bytes(8, "little") + text + whole[stop:])
    with pytest.raises(ShardError, match=r"cannot be read .*do not fit together.*: run `pile index .*test-000000\.tar`"):
        load_index(shard)


def test_an_index_of_deep_json_is_refused(indexed: tuple[str, bytes]) -> None:
    shard = indexed[0]
    text = b"[" * 100_000
    Path(shard + INDEX_SUFFIX).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ShardError, match="cannot be read"):
        load_index(shard)


@pytest.mark.parametrize(
    "name", ["first_segment", "first_key", "first_break", "offset", "size", "crc", "file", "file_offset", "key_bytes"]
)
@pytest.mark.parametrize("value", [0, 0xFF])
def test_an_index_whose_numbers_are_damaged_is_refused_before_a_sample_is_read(
    indexed: tuple[str, bytes], name: str, value: int
) -> None:
    shard, whole = indexed
    stop = 8 + int.from_bytes(whole[:8], "little")
    first, last = json.loads(whole[8:stop])[name]["data_offsets"]
    for end in (last, (first + last) // 2 // 8 * 8):
        changed = bytearray(whole)
        changed[stop + first : stop + end] = bytes([value]) * (end - first)
        if changed == whole:
            continue
        Path(shard + INDEX_SUFFIX).write_bytes(changed)
        with pytest.raises(ShardError, match=r"index of shard .*test-000000\.tar.*: run `pile index "):
            Shards([shard]).document(0, 1)


def test_an_index_is_mapped_and_stays_what_it_was_when_it_is_made_anew(shard: str) -> None:
    index = load_index(shard)
    with pytest.raises(ValueError, match="read-only"):
        index.offset[0] = 1
    before = index.offset.tolist()
    write_shards([Document((Segment("another"),))], Path(shard).parent, "test")
    assert index.offset.tolist() == before and len(load_index(shard)) == 1
