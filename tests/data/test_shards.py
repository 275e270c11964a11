"""The promises of `data/shards.py`: shards are read back as written, and damage is reported where it is found."""

from __future__ import annotations

import dataclasses
import gzip
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tar
from hypothesis import given
from hypothesis import strategies as st

from pile_app.data import index as index_module
from pile_app.data import shards
from pile_app.data.files import ShardError
from pile_app.data.index import UNORDERED, starts
from pile_app.data.manifest import SUFFIX
from pile_app.data.packing import sentence_ends
from pile_app.data.shards import Shards, expand_shards, write_shards
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
    return write_shards(DOCUMENTS, tmp_path, "test").paths[0]


def edit(path: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(change(bytearray(data)))


def flip(place: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[place] ^= 1
        return data

    return change


def test_documents_come_back_from_shards_unchanged(tmp_path: Path) -> None:
    reader = write_shards(DOCUMENTS, tmp_path, "test", shard_bytes=8192)
    assert len(reader.paths) > 2 and list(reader) == DOCUMENTS
    assert [reader.key(number) for number in range(len(reader))] == [document.key for document in DOCUMENTS]
    assert reader.balance()["read"] == len(reader) == len(DOCUMENTS) and not reader.balance()["rejected"]


def test_the_index_says_what_is_in_the_shard(shard: str) -> None:
    reader = Shards(shard)
    index = reader.index(0)
    assert index.first_segment[:4].tolist() == [0, 1, 3, 6]
    assert index.modality[:6].tolist() == [TEXT, IMAGE, TEXT, TEXT, AUDIO, TEXT]
    assert index.segment_size[:6].tolist() == [6, 48, 9, 7, 800, 14]
    assert index.sample_rate[:6].tolist() == [0, 0, 0, 0, 8000, 0]
    assert index.loss[:6].tolist() == [True, True, False, True, True, True]
    assert index.flags[:3].tolist() == [0, UNORDERED, 0]
    assert reader.sizes == [os.path.getsize(shard)]


def test_samples_are_read_in_any_order(shard: str) -> None:
    reader = Shards(shard)
    for number in np.random.default_rng(0).permutation(len(DOCUMENTS)).tolist():
        assert reader.document(number) == DOCUMENTS[number]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shards(DOCUMENTS, tmp_path / name, "test") for name in "ab")
    for name in ("test-000000.tar", f"test{SUFFIX}"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first.fingerprint == second.fingerprint


def test_members_carry_no_time_and_short_names_no_extra_header(tmp_path: Path) -> None:
    path = write_shards(DOCUMENTS[:2] + DOCUMENTS[3:], tmp_path, "test").paths[0]
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert {member.mtime for member in members} == {0}
    assert all(member.offset_data == member.offset + tarfile.BLOCKSIZE and not member.pax_headers for member in members)


def test_the_fingerprint_changes_with_any_sample(tmp_path: Path) -> None:
    def fingerprint(documents: list[Document], name: str) -> str:
        return write_shards(documents, tmp_path, name).fingerprint

    changed = [*DOCUMENTS[:-1], dataclasses.replace(DOCUMENTS[-1], segments=(Segment("another"),))]
    swapped = [*DOCUMENTS[:-2], DOCUMENTS[-1], DOCUMENTS[-2]]
    prints = {fingerprint(one, f"s{n}") for n, one in enumerate([DOCUMENTS, changed, swapped, DOCUMENTS[:-1]])}
    assert len(prints) == 4


def test_documents_without_a_key_are_numbered(tmp_path: Path) -> None:
    documents = [Document((Segment(f"{n}" * 2000),)) for n in range(5)]
    written = write_shards(documents, tmp_path, "p", shard_bytes=8192)
    assert [written.key(n) for n in range(5)] == [f"p-{n:09d}" for n in range(5)]


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        yield DOCUMENTS[0]
        assert not list(tmp_path.glob("*.tar"))

    write_shards(documents(), tmp_path, "test")
    assert [path.name for path in tmp_path.glob("*.tar*")].count("test-000000.tar") == 1
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("key", ["v1.2", "folder/a.b", ".hidden"])
def test_a_key_that_would_be_read_back_as_another_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="first dot"):
        write_shards([Document((Segment("x"),), key)], tmp_path, "test")
    assert not list(tmp_path.iterdir())


def told(reader: Shards) -> dict[str, tuple[int, list[str]]]:
    """Reason -> number and keys of the samples that were rejected; the balance is right."""
    balance = reader.balance()
    assert balance["read"] == balance["documents"] + balance["rejected"].total()
    return {reason: (count, balance["examples"][reason][0]) for reason, count in balance["rejected"].items()}


def keys(reader: Shards) -> list[str]:
    return [reader.key(number) for number in range(len(reader))]


def test_of_two_samples_with_one_key_the_first_is_kept(tmp_path: Path) -> None:
    documents = [Document((Segment(text),), key) for text, key in (("1", "a"), ("2", "b"), ("3", "b"), ("4", "c"), ("5", "a"))]
    reader = write_shards(documents, tmp_path, "test")
    assert keys(reader) == ["a", "b", "c"] and [document.segments[0].text for document in reader] == ["1", "2", "4"]
    assert told(reader) == {"duplicate_key": (2, ["b", "a"])}


def test_shards_of_other_programs_are_read_and_their_bad_samples_listed(tmp_path: Path) -> None:
    png, flac = Segment.from_image(GREY).file, Segment.from_audio(TONE, 8000).file
    files = [("./a/1.png", png), ("./a/1.txt", b"caption"), ("./a/2.png", b"no image"), ("./a/2.txt", b"x")]
    files += [("./a/3.png", png), ("./a/3.txt", b"\xff"), ("./a/4.txt", b"a caption without its picture")]
    files += [(f"./a/{n}.{kind}", data) for n in range(5, 9) for kind, data in (("png", png), ("txt", b"caption"))]
    reader = Shards(write_tar(tmp_path / "foreign.tar", files))
    assert keys(reader) == ["./a/1", *(f"./a/{n}" for n in range(5, 9))]
    assert told(reader) == {
        "undecodable_image": (1, ["./a/2"]), "invalid_utf8": (1, ["./a/3"]), "missing_field": (1, ["./a/4"])
    }  # fmt: skip
    assert [segment.data for segment in reader.document(0).segments] == [png, "caption"]
    assert not reader.document(0).ordered
    spoken = Shards(write_tar(tmp_path / "b.tar", [("1.flac", flac), ("1.json", b'{"text": "spoken"}')]))
    assert [segment.data for segment in spoken.document(0).segments] == [flac, "spoken"]


def test_what_is_not_used_is_counted_by_name(tmp_path: Path) -> None:
    files = [file for n in range(3) for file in ((f"{n}.txt", b"a text"), (f"{n}.json", b'{"url": "x", "text": "a text"}'))]
    files += [
        ("3.txt", b"a text"),
        ("3.npy", b"numbers"),
        ("README", b"no extension"),
        ("._0.txt", b"macOS"),
        (".cache.txt", b"hidden"),
        ("__MACOSX/0.txt", b"macOS"),
    ]
    reader = Shards(write_tar(tmp_path / "x.tar", files), fields="[txt]")
    assert reader.balance()["unused"] == {"json.url": 3, "json.text": 3, "npy": 1, "hidden files": 3}
    assert told(reader) == {"missing_field": (1, ["README"])}


def test_captions_survive_archives_made_on_macos(tmp_path: Path) -> None:
    png = Segment.from_image(GREY).file
    both = [("png", png), ("txt", b"caption")]
    files = [(f"{mark}{n}.{kind}", data) for n in range(3) for kind, data in both for mark in ("._", "")]
    reader = Shards(write_tar(tmp_path / "x.tar", files))
    assert [[segment.data for segment in document.segments] for document in reader] == [[png, "caption"]] * 3


def test_samples_whose_files_are_not_adjacent_are_counted_and_not_torn(tmp_path: Path) -> None:
    png = Segment.from_image(GREY).file
    path = write_tar(tmp_path / "x.tar", [("1.png", png), ("2.png", png), ("1.txt", b"one"), ("2.txt", b"two")])
    with pytest.raises(ShardError, match=r"x\.tar.*scattered_key.*`pile prepare` joins them"):
        Shards(path)
    path = write_tar(
        tmp_path / "y.tar", [("1.png", png), ("2.png", png), ("1.txt", b"one"), ("3.png", png), ("3.txt", b"three")]
    )
    reader = Shards(path)
    assert keys(reader) == ["2", "3"] and told(reader) == {"scattered_key": (1, ["1"])}


def test_names_with_dots_that_join_several_samples_are_ambiguous(tmp_path: Path) -> None:
    png = Segment.from_image(GREY).file
    pairs = [(f"{name}.{kind}", data) for name in ("a.b", "a.c", "d") for kind, data in (("png", png), ("txt", b"cap"))]
    reader = Shards(write_tar(tmp_path / "x.tar", pairs))
    assert keys(reader) == ["d"] and told(reader) == {"ambiguous_names": (1, ["a"])}
    reader = Shards(write_tar(tmp_path / "x.tar", pairs), fields="[b.png, c.png, b.txt|c.txt]")  # the field map names them
    assert len(reader.document(0).segments) == 3
    views = [(f"{n}.{side}.png", png) for n in range(3) for side in ("left", "right")]
    assert [len(document.segments) for document in Shards(write_tar(tmp_path / "views.tar", views))] == [2, 2, 2]


def test_a_tar_without_samples_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a-0.tar", [])
    with pytest.raises(ShardError, match=r"a-0\.tar.*holds no usable sample, the archive is empty"):
        Shards(str(tmp_path / "a-0.tar"))
    write_tar(tmp_path / "a-1.tar", [("1.txt", b"text")])
    assert len(Shards(str(tmp_path / "a-*.tar"))) == 1
    assert "a-0.tar" in caplog.text and "holds no sample" in caplog.text


@pytest.mark.parametrize("cut", ["empty", "header", "payload", "between members", "between samples", "half the end"])
def test_a_truncated_shard_is_never_indexed(shard: str, cut: str) -> None:
    index = Shards(shard).index(0)
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
    with pytest.raises(ShardError, match=r"test-000000\.tar' has .* bytes, .* were indexed: run `pile index "):
        Shards(shard).document(0)
    with pytest.raises(ShardError, match=r"test-000000\.tar"):
        Shards(shard, again="changed")


@pytest.mark.parametrize("damage", ["one bit", "zeros", "a block of zeros"])
def test_a_damaged_header_in_the_middle_does_not_end_the_shard_in_silence(shard: str, damage: str) -> None:
    offset = int(Shards(shard).index(0).offset[5])
    if damage == "one bit":
        edit(shard, flip(offset + 10))
    else:
        size = 512 if damage == "zeros" else 4096
        edit(shard, lambda data: data[:offset] + bytes(size) + data[offset + size :])
    with pytest.raises(ShardError, match="damaged or truncated"):
        Shards(shard, again="all")


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"no tar at all" * 200)
    with pytest.raises(ShardError, match=r"x\.tar.*damaged"):
        Shards(str(path))
    path.write_bytes(gzip.compress(b"tar" * 1000))
    with pytest.raises(ShardError, match=r"x\.tar.*compressed: gunzip it first"):
        Shards(str(path))


def test_a_flipped_bit_spoils_its_sample_and_no_other(shard: str) -> None:
    edit(shard, flip(int(Shards(shard).index(0).offset[4]) + 512 + 20))
    reader = Shards(shard)
    with pytest.raises(BadSample, match="text-0001") as caught:
        reader.document(4)
    assert caught.value.reason == "checksum"
    assert [reader.document(number) for number in (3, 5)] == [DOCUMENTS[3], DOCUMENTS[5]]


def test_a_missing_shard_is_named(tmp_path: Path, shard: str) -> None:
    absent = str(tmp_path / "absent.tar")
    with pytest.raises(ShardError, match=r"absent\.tar"):
        expand_shards(absent)
    reader = Shards(shard)
    os.remove(shard)
    with pytest.raises(ShardError, match="cannot be opened"):
        reader.document(0)


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
    reader = Shards(shard)
    assert reader.document(0) == DOCUMENTS[0]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.document(1) == DOCUMENTS[1]
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.document(2) == DOCUMENTS[2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader.document(3) == DOCUMENTS[3]


def test_a_reader_holds_only_some_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 3)
    documents = [Document((Segment(f"{n}" * 12_000),), f"d-{n}") for n in range(10)]
    reader = write_shards(documents, tmp_path, "x", shard_bytes=1)
    assert len(reader.paths) == 10
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(10), *reversed(range(10)), 0, 5, 0, 5]:
        assert reader.document(number) == documents[number]
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 3


# Statistics of long texts


def test_the_index_knows_where_the_sentences_of_long_texts_end(tmp_path: Path) -> None:
    long = "Ein Satz über Öl, der lang genug ist. " * 40
    codes = Codes("ab" * 16, 999, 0, np.arange(300), np.array([[200, 700], [55, 180]]))
    documents = [
        Document((Segment("short."), Segment(long)), "a"),
        Document((Segment(codes.to_bytes(), ENCODED_EXTENSIONS[TEXT]), Segment(long)), "b"),
    ]
    index = write_shards(documents, tmp_path, "x").index(0)
    assert index.segment_size.tolist() == [6, len(long.encode()), 999, len(long.encode())]
    ends = sentence_ends(long)
    assert len(ends) > 5 and index.break_count.tolist() == [0, len(ends), 2, len(ends)]
    first = starts(index.break_count)
    for row in (1, 3):
        in_bytes = index.break_bytes[first[row] : first[row + 1]]
        assert [long.encode()[:end].decode() for end in in_bytes] == [long[:end] for end in ends]
    assert index.break_bytes[first[2] : first[3]].tolist() == [200, 700]


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
        header(b"bad.txt", 4, b"M") + padded(b"evil"),  # the rest of a file of another tar
        header(b"bad.txt", 4, b"V") + padded(b"evil"),
        header(b"bad.txt", 4, b"\xe9") + padded(b"evil"),
        header(b"bad\xff.txt", 4) + padded(b"evil"),  # no UTF-8
    ],
)
def test_members_that_no_data_needs_are_rejected_and_the_others_read(tmp_path: Path, blocks: bytes) -> None:
    reader = Shards(hostile(tmp_path, blocks))
    assert keys(reader) == ["first", "last"] and [*told(reader)] == ["unsafe_member"]
    assert [document.segments[0].text for document in reader] == ["fine", "fine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.manifest.safetensors", "hostile.tar"]


@pytest.mark.parametrize(
    "blocks",
    [
        header(b"PaxHeader", 2 << 30, b"x") + MEMBER,  # 2 GB of header
        header(b"././@LongLink", 2 << 30, b"L") + MEMBER,
        header(b"PaxHeader", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"x") + MEMBER,  # base 256: more than 2 ** 63
        header(b"bad.txt", 1 << 32) + padded(b"evil"),  # beyond the end
        header(b"bad.txt", b"\x80" + b"\0" * 7 + b"\x7f\0\0\0") + padded(b"evil"),
        header(b"bad.txt", b"\xff" * 12) + padded(b"evil"),
        header(b"bad.txt", b"-0000000004\0") + padded(b"evil"),  # backwards
        header(b"bad.txt", b"-7777777777\0") + padded(b"evil"),  # to its own offset, an endless loop
        header(b"bad.txt", b"0000000000x\0") + padded(b"evil"),
        pax(("size", "-512")) + MEMBER,  # to its own header
        pax(("size", "-1024")) + MEMBER,
        pax(("size", "99999999999")) + MEMBER,
        pax(("size", "many")) + MEMBER,
        header(b"PaxHeader", 8, b"x") + padded(b"0 a=bcd\n") + MEMBER,
        b"x" * 512 + MEMBER,
        MEMBER.replace(b"bad", b"sad", 1),  # another name than was summed
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "99999999999")) + MEMBER,
        bytes(512) + MEMBER,  # what follows the end of the archive
    ],
)
def test_headers_that_cannot_be_are_an_error_of_the_shard(tmp_path: Path, blocks: bytes) -> None:
    path = hostile(tmp_path, blocks)
    with pytest.raises(ShardError, match=r"hostile\.tar.* is damaged or truncated"):
        Shards(path)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.tar"]


def test_a_large_header_of_many_records_is_read_at_once(tmp_path: Path) -> None:
    content = b"6 a=b\n" * 150_000
    assert keys(Shards(hostile(tmp_path, header(b"PaxHeader", len(content), b"x") + padded(content) + MEMBER))) == [
        "first", "bad", "last"
    ]  # fmt: skip


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
    reader = Shards(hostile(tmp_path, *blocks))
    folder = "folder/" * 40
    assert keys(reader) == ["first", folder + "ü", "base", folder + "ж", "old", "contiguous", "last"] and not told(reader)
    assert [document.segments[0].text for document in reader] == ["fine", *["evil"] * 5, "fine"]
    assert [document.key for document in reader] == keys(reader)


def test_a_sample_larger_than_allowed_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_SAMPLE_BYTES", 4096)
    files = [("a.txt", b"a"), ("b.txt", b"b" * 3000), ("b.png", b"b" * 3000), ("c.txt", b"c")]
    reader = Shards(write_tar(tmp_path / "x.tar", files), fields="[txt]")
    assert keys(reader) == ["a", "c"] and told(reader) == {"sample_too_large": (1, ["b"])}
