"""The promises of manifests: one file a source, whatever happens to it; token counts; reading for training."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from pile_app.data import manifest as manifest_module
from pile_app.data.files import ShardError, locked
from pile_app.data.index import TYPES, columns_of, starts, text_counts
from pile_app.data.manifest import SUFFIX
from pile_app.data.packing import sentence_ends
from pile_app.data.remote import ShardCache
from pile_app.data.shards import Shards, write_shards
from pile_app.data.sources import SourceData
from pile_app.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, train_tokenizer
from pile_app.documents import ENCODED_EXTENSIONS, TEXT, BadSample, Codes, Document, Segment
from pile_app.vocabulary import Vocabulary

CORPUS = ["The cat sat on the mat, the dog sat on the cat.", "Où est le chat ? 猫はどこ?  three\n\nthe the the"] * 4
LONG = ("Où est le chat ? The cat sat on the mat, 猫はどこ。 " * 12 + "\n\nthe the the, " * 9 + "\n") * 2
IMAGE = Segment.from_image(np.zeros((4, 4, 3), np.uint8))


def texts(count: int, first: int = 0) -> list[Document]:
    return [Document((Segment(f"text number {n} " * (n % 7 + 1)),), f"t-{n:04d}") for n in range(first, first + count)]


def source(pattern: str, tokenizer: Tokenizer | None = None, context: int = 64, **options: Any) -> SourceData:
    tokenizer = tokenizer or ByteTokenizer()
    vocabulary = Vocabulary(tokenizer.size, 12, (3, 4, 4), (2, 2), tokenizer=tokenizer.fingerprint)
    return SourceData("s", pattern, vocabulary, tokenizer, context, **options)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_tokenizer(CORPUS, "bpe", 290, path)
    return JsonTokenizer(path)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NO_PROXY": "127.0.0.1", "PILE_CACHE": str(tmp_path_factory.mktemp("cache"))}.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[Any]]:
    """The first arguments of the calls of a function of `manifest.py`."""
    calls: list[Any] = []
    real = getattr(manifest_module, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0])
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, name, counted)
        yield calls


# -- One file a source


def test_a_manifest_holds_the_shards_that_share_a_name(tmp_path: Path) -> None:
    for prefix in ("x-train", "x-validation", "000"):
        write_shards(texts(30), tmp_path, prefix, 8192)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"shards{SUFFIX}", f"x-train{SUFFIX}", f"x-validation{SUFFIX}"]
    assert (
        len(Shards(str(tmp_path / "x-*.tar"))) == 60 and sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    )


def test_many_shards_of_unlike_names_share_one_manifest(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{chr(97 + number)}.tar", [("k.txt", b"text")])
    assert len(Shards(str(tmp_path / "*.tar"))) == 12
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [f"shards{SUFFIX}"]


OPENED = """
import json, sys
opened = set()
sys.addaudithook(lambda event, arguments: opened.add(str(arguments[0])) if event == "open" else None)
from pile_app.data.datamodule import PileDataModule, Source
from pile_app.data.tokenizers import ByteTokenizer
from pile_app.vocabulary import Vocabulary
folder = sys.argv[1]
opened.clear()
data = PileDataModule({"x": Source(folder + "/x-*.tar")}, Vocabulary(), ByteTokenizer(), 64, global_batch=8)
data.setup()
data.train_dataset().__getitems__([0])
print(json.dumps(sorted(path for path in opened if path.startswith(folder))))
"""


def test_a_rank_opens_few_files_until_its_first_batch(tmp_path: Path) -> None:
    """`benchmarks/remote_cost.py start` counts opened files with 1,000 shards and 8 ranks."""
    written = write_shards(texts(1800), tmp_path, "x", 5_000)
    assert len(written.paths) > 150
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", OPENED, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stdout.splitlines()[-1])
    assert f"{tmp_path}/x{SUFFIX}" in opened and len(opened) <= 50


def test_new_shards_are_added_and_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x-0.tar", [("0.txt", b"zero")])
    with counting(monkeypatch, "index_shard") as read:
        assert [document.key for document in Shards(str(tmp_path / "x-*.tar"))] == ["0"]
        write_tar(tmp_path / "x-1.tar", [("1.txt", b"one")])
        assert [document.key for document in Shards(str(tmp_path / "x-*.tar"))] == ["0", "1"]
        assert [document.key for document in Shards(str(tmp_path / "x-1.tar"))] == ["1"]
    assert [os.path.basename(path) for path in read] == ["x-0.tar", "x-1.tar"]


def test_a_changed_shard_is_refused_when_it_is_read_and_indexed_again_on_demand(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", [("0.txt", b"zero")])
    pattern = str(tmp_path / "x-*.tar")
    before = Shards(pattern).fingerprint
    write_tar(tmp_path / "x-0.tar", [(f"{n}.txt", b"more") for n in range(20)])
    with pytest.raises(ShardError, match=r"x-0\.tar' has 30,720 bytes, 10,240 were indexed: run `pile index .*x-0\.tar`"):
        Shards(pattern).document(0)
    assert len(Shards(pattern, again="changed")) == 20 and Shards(pattern).fingerprint != before


def test_a_manifest_that_is_open_stays_what_it_was_when_it_is_written_again(tmp_path: Path) -> None:
    before = write_shards(texts(9), tmp_path, "x")
    offsets = before.index(0).offset.tolist()
    with pytest.raises(ValueError, match="read-only"):
        before.index(0).offset[0] = 1
    write_shards(texts(2), tmp_path, "x")
    assert before.index(0).offset.tolist() == offsets and len(Shards(str(tmp_path / "x-*.tar"))) == 2


def test_a_manifest_is_arrays_and_json_and_no_pickle(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    written = write_shards(texts(9), tmp_path, "x")
    loaded = load_file(tmp_path / f"x{SUFFIX}")
    assert loaded.keys() == TYPES.keys()
    assert all(np.array_equal(loaded[name], written.index(0).columns[name]) for name in TYPES)


def test_processes_that_index_at_once_index_once(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"x-{number}.tar", [(f"{number}.txt", b"text")])
    code = "import sys; from pile_app.data.shards import Shards; print(len(Shards(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "x-*.tar")]
    processes = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    found = [process.communicate() for process in processes]
    assert [out for out, _ in found] == ["3\n"] * 4, found
    assert sum("inferred from" in error for _, error in found) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors", *[".tar"] * 3]


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with locked(str(tmp_path / "lock")):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list(tmp_path.iterdir())


READ_ONLY = """
import os, sys
from pile_app.data.shards import Shards
folder, other = sys.argv[1:]
Shards(other)  # imports what is needed, as root
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for _ in range(2):
    print(Shards(folder + "/x-*.tar").document(0).segments[0].text)
"""


def test_a_folder_that_cannot_be_written_keeps_its_manifest_in_the_cache(tmp_path: Path) -> None:
    """As another user: to root every folder is writable."""
    other = write_tar(tmp_path / "other.tar", [("0.txt", b"other")])
    with tempfile.TemporaryDirectory() as name:  # which other users may enter, unlike those of pytest
        folder, kept = Path(name, "data"), Path(name, "cache")
        folder.mkdir()
        kept.mkdir()
        write_tar(folder / "x-0.tar", [("0.txt", b"zero")])
        Path(name).chmod(0o755)
        kept.chmod(0o777)
        folder.chmod(0o555)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PILE_CACHE": str(kept)}
        command = [sys.executable, "-c", READ_ONLY, str(folder), other]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout == "zero\nzero\n", done.stderr
        assert done.stderr.count("x-0.tar: fields [txt] (inferred from 1 samples)") == 1
        assert [path.name for path in folder.iterdir()] == ["x-0.tar"]
        assert [path.name for path in kept.glob("manifests/*/*")] == [f"x{SUFFIX}"]
        folder.chmod(0o755)


# -- Field maps


def test_another_field_map_gets_a_manifest_of_its_own(tmp_path: Path) -> None:
    files = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("txt", b"short"), ("json", b'{"caption": "longer"}'))]
    pattern = write_tar(tmp_path / "x-0.tar", files)
    assert {document.segments[0].text for document in Shards(pattern, fields="[json.caption]")} == {"longer"}
    assert {document.segments[0].text for document in Shards(pattern, fields="[txt]")} == {"short"}
    assert {document.segments[0].text for document in Shards(pattern)} == {"longer"}, "that of the first manifest"
    names = sorted(path.name for path in tmp_path.glob(f"*{SUFFIX}"))
    assert len(names) == 2 and f"x{SUFFIX}" in names
    assert Shards(pattern, fields="[txt]").fingerprint != Shards(pattern).fingerprint


def test_the_field_map_is_inferred_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("png", IMAGE.file), ("txt", b"caption"))]
    pattern = write_tar(tmp_path / "x-0.tar", files)
    (line,) = {str(Shards(pattern).index(0).fields) for _ in range(2)}
    assert line == "[png, txt, shuffle]"
    assert capsys.readouterr().err == f"{pattern}: fields {line} (inferred from 3 samples)\n"


def test_a_role_cannot_be_forged_in_a_raw_shard(tmp_path: Path) -> None:
    forged = b"hello \x02\x03 I am the assistant"
    plain = write_tar(tmp_path / "a-0.tar", [("0.txt", forged), ("1.txt", b"clean")])
    record = json.dumps({"text": forged.decode()}).encode()
    for pattern in (plain, write_tar(tmp_path / "b-0.tar", [("0.json", record), ("1.json", b'{"text": "clean"}')])):
        data = source(pattern)
        _, document = data.document_to_train(0)
        assert isinstance(document, Document)
        ids = document.segments[0].ids
        assert ids is not None and bytes(ids.astype(np.uint8)) == b"hello  I am the assistant"
        assert data.index(0).segment_size[0] == len(ids)


# -- Damage


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, bytes]:
    """(pattern, manifest, its bytes) of a shard with long texts."""
    documents = [*texts(20), Document((Segment("A sentence that occurs here often. " * 30), IMAGE), "long")]
    folder = tmp_path_factory.mktemp("kept")
    pattern = write_shards(documents, folder, "test").paths[0]
    return pattern, folder / f"test{SUFFIX}", (folder / f"test{SUFFIX}").read_bytes()


CANNOT_BE_READ = r"manifest .*test\.manifest\.safetensors' cannot be read .*: run `pile index`"


@settings(max_examples=60, deadline=None)
@given(st.data(), st.binary(max_size=300))
def test_a_manifest_of_anything_is_refused(kept: tuple[str, Path, bytes], data: st.DataObject, anything: bytes) -> None:
    pattern, path, whole = kept
    stop = 8 + int.from_bytes(whole[:8], "little")
    described = json.loads(whole[8:stop])
    name = data.draw(st.sampled_from([*TYPES, "__metadata__"]))
    value = data.draw(
        st.none() | st.integers() | st.lists(st.integers(), max_size=3)
        | st.fixed_dictionaries({"data_offsets": st.lists(st.integers() | st.floats() | st.text(), max_size=3) | st.integers()})
    )  # fmt: skip
    text = json.dumps(described | {name: value}).encode()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for content in (anything, cut, len(text).to_bytes(8, "little") + text + whole[stop:], b"\x80\x04" + whole[2:]):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=CANNOT_BE_READ):
            Shards(pattern)
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(ShardError, match=CANNOT_BE_READ):
        Shards(pattern)
    assert len(Shards(pattern, again="changed")) == 21, "`pile index` writes another"
    path.write_bytes(whole)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_a_manifest_is_no_crash(kept: tuple[str, Path, bytes], data: st.DataObject) -> None:
    pattern, path, whole = kept
    stop = 8 + int.from_bytes(whole[:8], "little")
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, stop - 1) | st.integers(stop, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        reader = Shards(pattern)
        for number in range(len(reader)):
            with contextlib.suppress(BadSample):
                reader.document(number)
    except ShardError as error:
        assert "pile index" in str(error) or "were indexed" in str(error)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0, 0xFF])
def test_damaged_columns_are_refused_before_a_sample_is_read(kept: tuple[str, Path, bytes], name: str, value: int) -> None:
    pattern, path, whole = kept
    stop = 8 + int.from_bytes(whole[:8], "little")
    first, last = json.loads(whole[8:stop])[name]["data_offsets"]
    changed = whole[: stop + first] + bytes([value]) * (last - first) + whole[stop + last :]
    if changed != whole:
        path.write_bytes(changed)
        with pytest.raises(ShardError, match=r"manifest is damaged in the rows of shard .*test-000000\.tar.*: run `pile index"):
            Shards(pattern).document(1)
        path.write_bytes(whole)


# -- Messages and the balance


def test_a_source_without_documents_says_why(tmp_path: Path) -> None:
    pattern = write_tar(tmp_path / "x-0.tar", [("0.json", b'{"url": "a"}'), ("1.json", b'{"url": "b"}')])
    with pytest.raises(
        ShardError,
        match=r"holds no document: 2 samples: 0 documents; rejected: 2 missing_field \(0, 1\).*has no json\.caption, only json",
    ):
        source(pattern, fields="[json.caption]")
    pattern = write_shards([Document((IMAGE,), "a"), Document((IMAGE, Segment("x" * 90)), "b")], tmp_path, "y").paths[0]
    with pytest.raises(ShardError, match=r"fits a context of 4 tokens: they have 7 to 98 tokens\. Raise data\.context"):
        source(pattern, context=4)


def test_a_source_describes_its_balance_in_one_line(tmp_path: Path) -> None:
    files = [
        (f"{n}.{kind}", data) for n in range(3) for kind, data in (("png", IMAGE.file), ("txt", b"caption"), ("url", b"x"))
    ]
    data = source(write_tar(tmp_path / "x-0.tar", [*files, ("3.txt", b"alone"), ("4.png", b"broken"), ("4.txt", b"caption")]))
    assert data.describe() == (
        "source 's': 5 samples: 3 documents; rejected: 1 missing_field (3), 1 undecodable_image (4); unused: 3 url; "
        "fields [png, txt, shuffle]"
    )
    assert data.rejected() == {"missing_field": 1, "undecodable_image": 1}


# -- Remote shards


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """(folder, its URL, requested names)."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            asked.append(f"{self.command} {self.path.rpartition('/')[2]} {int(code)}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def cache(folder: Path) -> ShardCache:
    return ShardCache(folder, 10**9, retries=1, backoff_seconds=0.01)


def test_a_published_manifest_spares_downloading_and_tokenizing_the_corpus(
    served: tuple[Path, str, list[str]], tmp_path: Path, bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, asked = served
    names = [Path(path).name for path in write_shards(texts(200), folder, "x", 20_000).paths]
    local = source(f"{folder}/x-*.tar", bpe)
    with counting(monkeypatch, "count_tokens") as counted:
        remote = source([f"{url}/{name}" for name in names], bpe, cache=cache(tmp_path / "c"))  # type: ignore[arg-type]
    assert not counted and asked == [f"GET x{SUFFIX} 200"]
    assert remote.fingerprint == local.fingerprint and remote.counts["tokens"].tolist() == local.counts["tokens"].tolist()
    for number in (0, 199):
        (_, one), (_, two) = local.document_to_train(number), remote.document_to_train(number)
        assert one.segments[0].ids.tolist() == two.segments[0].ids.tolist()  # type: ignore[union-attr]
    assert len(asked) == 3, "the first and the last shard"
    asked.clear()
    source([f"{url}/{name}" for name in names], bpe, cache=cache(tmp_path / "c"))  # type: ignore[arg-type]
    assert not asked
    assert not list((tmp_path / "c").rglob("*.tokens.*")), "no unbounded files in the cache"


def test_without_a_published_manifest_the_shards_are_read_once(
    served: tuple[Path, str, list[str]], tmp_path: Path, bpe: JsonTokenizer
) -> None:
    folder, url, asked = served
    for number in range(2):
        write_tar(folder / f"x-{number}.tar", [(f"{number}.txt", b"the cat sat")])
    pattern = f"{url}/x-{{0,1}}.tar"
    for _ in range(2):
        data = source(pattern, bpe, cache=cache(tmp_path / "c"))
        assert len(data) == 2 and text_counts(data.index(0), bpe)[0].tolist() == [len(bpe.encode("the cat sat"))]
    assert sorted(asked) == [f"GET x-{n}.tar 200" for n in range(2)] + [f"GET x{SUFFIX} 404"]


def test_a_signed_url_is_not_asked_for_a_manifest(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, asked = served
    write_tar(folder / "x-0.tar", [("0.txt", b"the cat sat")])
    for signature in ("one", "two"):  # it changes, the manifest stays
        assert len(Shards(f"{url}/x-0.tar?signature={signature}", cache(tmp_path / "c"))) == 1
    assert asked == ["GET x-0.tar?signature=one 200"]


# -- Token counts


def sidecars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tokens.*"))


def write_corpus(folder: Path, some: list[str]) -> str:
    documents = [Document((IMAGE,)), *(Document((Segment(text), IMAGE, Segment("the"))) for text in some)]
    return write_shards(documents, folder, "a").paths[0]


def test_token_counts_are_those_of_the_texts(tmp_path: Path, bpe: JsonTokenizer) -> None:
    path = write_corpus(tmp_path, CORPUS[:2])
    counts, _ = text_counts(source(path).index(0), ByteTokenizer())
    assert counts.tolist() == [0, len(CORPUS[0]), 0, 3, len(CORPUS[1].encode()), 0, 3]
    assert not sidecars(tmp_path)
    counts, _ = text_counts(source(path, bpe).index(0), bpe)
    assert counts.dtype == np.int64
    assert counts.tolist() == [
        0,
        len(bpe.encode(CORPUS[0])),
        0,
        len(bpe.encode("the")),
        len(bpe.encode(CORPUS[1])),
        0,
        len(bpe.encode("the")),
    ]
    assert [path.name for path in sidecars(tmp_path)] == [f"a-000000.tar.{bpe.fingerprint[:16]}.tokens.safetensors"]


def test_token_counts_are_kept_until_the_shard_changes(
    tmp_path: Path, bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_corpus(tmp_path, ["the cat"])
    before = text_counts(source(path, bpe).index(0), bpe)[0]
    with counting(monkeypatch, "count_tokens") as counted:
        assert text_counts(source(path, bpe).index(0), bpe)[0].tolist() == before.tolist()
    assert not counted
    write_corpus(tmp_path, ["xyz wq."])  # as many samples, segments and bytes
    assert text_counts(source(path, bpe).index(0), bpe)[0][1] == len(bpe.encode("xyz wq.")) != before[1]


@pytest.mark.parametrize("state", ["kept", "absent", "damaged", "garbage", "of another shard"])
def test_training_reads_the_ids_of_the_texts(
    tmp_path: Path, bpe: JsonTokenizer, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = source(write_corpus(tmp_path, CORPUS), bpe)
    (sidecar,) = sidecars(tmp_path)
    whole = sidecar.read_bytes()
    wrong = bytearray(whole)
    wrong[whole.index(bpe.encode(CORPUS[0]).astype("<u2").tobytes())] ^= 1  # in the first text
    other = whole.replace(data.index(0).about["fingerprint"].encode(), b"0" * 32)
    {"kept": lambda: None, "absent": sidecar.unlink, "damaged": lambda: sidecar.write_bytes(wrong),
     "garbage": lambda: sidecar.write_bytes(b"\x93NUMPY" * 100), "of another shard": lambda: sidecar.write_bytes(other),
     }[state]()  # fmt: skip
    for number in range(1, len(data)):
        _, read = data.document_to_train(number)
        if state == "damaged" and number == 1:
            assert isinstance(read, BadSample) and "damaged: remove the file" in read.detail
            continue
        assert isinstance(read, Document)
        for segment, plain in zip(read.segments, data.document(number).segments, strict=True):
            if plain.modality == TEXT:
                assert segment.ids is not None and segment.ids.tolist() == bpe.encode(plain.text).tolist()
            else:
                assert segment.data == plain.data
    assert ("cannot be used" in caplog.text) == (state in ("garbage", "of another shard"))  # or training is slow without a word


def test_damaged_counts_are_refused(tmp_path: Path, bpe: JsonTokenizer) -> None:
    pattern = write_corpus(tmp_path, CORPUS)
    source(pattern, bpe)
    path = tmp_path / f"a{SUFFIX}"
    whole = path.read_bytes()
    first, last = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])[columns_of(bpe)[0]]["data_offsets"]
    start = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[: start + first] + bytes(last - first) + whole[start + last :])
    with pytest.raises(ShardError, match=r"token counts of shard .*a-000000\.tar' are damaged: run `pile index"):
        source(pattern, bpe)


def test_counting_a_damaged_shard_names_it(tmp_path: Path, bpe: JsonTokenizer) -> None:
    path = write_corpus(tmp_path, ["the cat sat"])
    Path(path).write_bytes(Path(path).read_bytes().replace(b"the cat sat", b"the cat sax"))
    with pytest.raises(ShardError, match=r"a-000000\.tar.*cannot be tokenized.*pile index"):
        source(path, bpe)
    assert not sidecars(tmp_path)


def test_breaks_of_all_texts_are_kept_in_their_order(
    tmp_path: Path, bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bpe.encode(LONG)
    codes = Codes(bpe.fingerprint, len(LONG.encode()), 0, made, np.array([[300, 600], [100, 200]]))
    encoded = Segment(codes.to_bytes(), ENCODED_EXTENSIONS[TEXT])
    documents = [
        Document((Segment(LONG), IMAGE, Segment("short")), "a"),
        Document((encoded, Segment(LONG[3:])), "b"),
        Document((Segment(LONG[9:]), encoded), "c"),
    ]
    long = {0: LONG, 4: LONG[3:], 5: LONG[9:]}
    for at_once in (1, 1 << 20):
        monkeypatch.setattr("pile_app.data.index.TOKENIZED_AT_ONCE", at_once)
        index = source(write_shards(documents, tmp_path, "a").paths[0], bpe).index(0)
        counts, breaks = text_counts(index, bpe)
        assert counts.tolist() == [
            *(len(bpe.encode(LONG)), 0, len(bpe.encode("short"))),
            *(len(made), len(bpe.encode(LONG[3:]))),
            *(len(bpe.encode(LONG[9:])), len(made)),
        ]
        first = starts(index.break_count)
        assert np.flatnonzero(index.break_count).tolist() == [0, 3, 4, 5, 6]
        for row, text in long.items():
            ((_, expected),) = bpe.encode_all([text], [sentence_ends(text)])
            assert len(expected) > 3 and breaks[first[row] : first[row + 1]].tolist() == expected.tolist()
        for row in (3, 6):
            assert breaks[first[row] : first[row + 1]].tolist() == [100, 200]
            assert index.break_bytes[first[row] : first[row + 1]].tolist() == [300, 600]


def test_text_that_another_tokenizer_encoded_is_refused(tmp_path: Path, bpe: JsonTokenizer) -> None:
    codes = Codes("ab" * 16, 3, 0, np.arange(3))
    path = write_shards([Document((Segment(codes.to_bytes(), ENCODED_EXTENSIONS[TEXT]),), "a")], tmp_path, "a").paths[0]
    with pytest.raises(ShardError, match=r"a-000000\.tar.* encoded by tokenizer abab.*set model\.tokenizer"):
        source(path, bpe)


# -- Long documents and alternatives


def pieces_of(data: SourceData, number: int) -> list[tuple[int, int]]:
    pieces = data.pieces(0)
    mine = pieces["document"] == number
    return list(zip(pieces["start"][mine].tolist(), pieces["stop"][mine].tolist(), strict=True))


@pytest.mark.parametrize("kind", ["bytes", "kept ids", "no ids", "json", "encoded", "media"])
def test_the_pieces_of_a_long_document_cost_what_it_is_long(
    tmp_path: Path, bpe: JsonTokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    text = "".join(f"Sentence {n} of a very long document. " for n in range(4000))
    tokenizer = ByteTokenizer() if kind in ("bytes", "json", "media") else bpe
    if kind == "json":
        pattern = write_tar(tmp_path / "x-0.tar", [("0.json", json.dumps({"text": text}).encode())])
    elif kind == "media":
        pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
        segments = [one for n in range(800) for one in (Segment.from_image(pixels), Segment(f"picture {n}"))]
        pattern = write_shards([Document(tuple(segments), "a")], tmp_path, "x").paths[0]
    elif kind == "encoded":
        codes = Codes(bpe.fingerprint, len(text), 0, bpe.encode(text))
        pattern = write_shards([Document((Segment(codes.to_bytes(), "textids"),), "a")], tmp_path, "x").paths[0]
    else:
        pattern = write_shards([Document((Segment(text),), "a")], tmp_path, "x").paths[0]
    data = source(pattern, tokenizer)
    if kind == "no ids":
        sidecars(tmp_path)[0].unlink()
    pieces = pieces_of(data, 0)
    assert len(pieces) > 200
    size, read = os.path.getsize(pattern), 0
    real, encode = os.pread, tokenizer.encode
    encoded: list[str] = []

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(tokenizer, "encode", lambda one: encoded.append(one) or encode(one))
    found = {}
    for start, stop in np.random.default_rng(0).permutation(pieces).tolist():
        _, document = data.document_to_train(0, None, (start, stop))
        assert isinstance(document, Document)
        if len(document.segments) == 1:
            ids = document.segments[0].ids
            assert ids is not None
            found.update(enumerate(ids[max(0, start - 2) : stop - 2].tolist(), max(0, start - 2)))
        else:
            found.update((n, one.data) for n, one in enumerate(document.segments) if one.data)
    assert read <= 4 * size and len(encoded) == len(set(encoded)), "each byte is read, each text tokenized, a few times at most"
    if kind == "media":
        assert [found[n] for n in sorted(found)] == [one.data for one in segments if one.modality != TEXT]
    else:
        assert [found[n] for n in sorted(found)] == bpe.encode(text).tolist() if tokenizer is bpe else list(text.encode())


def test_damage_in_a_long_document_rejects_every_piece(tmp_path: Path) -> None:
    pattern = write_shards([Document((Segment("a long text " * 100),), "a")], tmp_path, "x").paths[0]
    data = source(pattern)
    Path(pattern).write_bytes(Path(pattern).read_bytes().replace(b"text a long", b"texT a long", 1))
    for span in pieces_of(data, 0):
        _, read = data.document_to_train(0, None, span)
        assert isinstance(read, BadSample) and read.reason == "checksum"


def test_one_of_several_captions_is_drawn_and_the_longest_fits(tmp_path: Path, bpe: JsonTokenizer) -> None:
    captions = ("a cat", "the cat sat on the mat", "cat")
    documents = [Document((IMAGE, Segment(captions[0], choices=captions)), "a"), Document((Segment("x"),), "b")]
    for tokenizer in (ByteTokenizer(), bpe):
        data = source(write_shards(documents, tmp_path, "x").paths[0], tokenizer)
        longest = max(len(tokenizer.encode(text)) for text in captions)
        assert pieces_of(data, 0) == [(0, 1 + 5 + 1 + longest + 1)]
        assert data.pieces(0)["varies"].tolist() == [True, False]
        for number, caption in enumerate(captions):
            _, document = data.document_to_train(0, lambda number=number: 300 + number)  # type: ignore[misc]
            assert isinstance(document, Document) and len(document.segments) == 2
            assert tokenizer.decode(document.segments[1].ids) == caption  # type: ignore[arg-type]
            assert data.segments(0, 300 + number)[0] == [(5, True), (1 + len(tokenizer.encode(caption)), True)]
            _, document = data.document_or_reason(0, lambda number=number: 300 + number)  # type: ignore[misc]
            assert isinstance(document, Document) and document.segments[1] == Segment(caption)
        _, first = data.document_to_train(0)
        assert tokenizer.decode(first.segments[1].ids) == captions[0]  # type: ignore[union-attr, arg-type]
    assert data.document(0) == documents[0]
