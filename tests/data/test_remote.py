"""The promises of `data/remote.py`, against real servers on this machine: nginx, Python's, moto's S3, some that misbehave."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from pile_app.data import remote
from pile_app.data.files import ShardError, locked
from pile_app.data.remote import Prefetcher, ShardCache, Wanted, expand_remote, is_remote
from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"  # where it is on Debian, not on everybody's path
needs_nginx = pytest.mark.skipif(
    not os.path.exists(NGINX) and "CI" not in os.environ, reason="nginx is not installed: apt-get install nginx"
)
PROCESSES = multiprocessing.get_context("spawn")
KB = 1000


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1000 * KB, retries=2, backoff_seconds=0.01)


class Server:
    """nginx over a folder. The files under `/slow/` come at 200 kB a second."""

    def __init__(self, base: Path) -> None:
        self.files = base / "files"
        self.log = base / "access.log"
        (self.files / "slow").mkdir(parents=True)
        base.chmod(0o755)
        self.port = free_port()
        (base / "nginx.conf").write_text(f"""
            user root; worker_processes 1; pid {base}/pid; error_log {base}/error.log;
            events {{}}
            http {{
              log_format plain '$request_method $request_uri $status';
              access_log {self.log} plain;
              client_body_temp_path {base}/t1; proxy_temp_path {base}/t2; fastcgi_temp_path {base}/t3;
              uwsgi_temp_path {base}/t4; scgi_temp_path {base}/t5;
              server {{
                listen 127.0.0.1:{self.port}; root {self.files}; autoindex on;
                location /slow/ {{ limit_rate 200k; }}
                location /private/ {{ return 403; }}
                location /signed/ {{ if ($request_method = HEAD) {{ return 403; }} }}
              }}
            }}""")
        self.base = base
        self.start()

    def start(self) -> None:
        command = [NGINX, "-c", str(self.base / "nginx.conf"), "-p", str(self.base), "-g", "daemon off;"]
        self.process = subprocess.Popen(command)
        wait_until(lambda: answers(self.port))

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def put(self, name: str, data: bytes) -> str:
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return self.url(name)

    def requests(self, name: str = "") -> list[str]:
        """ "METHOD /path status" of all requests of a file so far."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/-")
        connection.getresponse().read()  # the one worker answers after it has logged what came before
        connection.close()
        return [line for line in self.log.read_text().splitlines() if f"/{name}" in line and " /- " not in line]


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "nginx")
    yield server
    server.process.terminate()
    server.process.wait()


def content(n: int, size: int = 300 * KB) -> bytes:
    return (b"%d " % n) * (size // len(b"%d " % n)) + b"." * (size % len(b"%d " % n))


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def whole_files(cache: ShardCache) -> list[Path]:
    return [path for path in Path(cache.folder).glob("?" * 32 + "/*") if path.name.endswith(".tar")]


def bytes_held(cache: ShardCache) -> int:
    """Of whole files and those under way. Room is made under a lock, and a file that was just finished may be listed twice."""
    Path(cache.folder).mkdir(exist_ok=True)
    total = 0
    with locked(os.path.join(cache.folder, "room.lock")):
        for folder in Path(cache.folder).glob("?" * 32):
            sizes = [0]
            for path in folder.iterdir():
                if path.suffix not in (".lock", ".tmp"):
                    with contextlib.suppress(FileNotFoundError):
                        sizes.append(path.stat().st_size)
            total += max(sizes)
    return total


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("http://host/a.tar", True),
        ("https://host/a.tar", True),
        ("s3://bucket/a.tar", True),
        ("gs://bucket/a.tar", True),
        ("pipe:cat a.tar", True),
        ("file:///data/a.tar", False),
        ("/data/a.tar", False),
        ("data/a:b.tar", False),
    ],
)
def test_what_is_remote(path: str, expected: bool) -> None:
    assert is_remote(path) == expected


@needs_nginx
class TestHTTP:
    def test_a_file_arrives_whole_and_is_downloaded_once(self, nginx: Server, cache: ShardCache) -> None:
        url = nginx.put("a.tar", content(1))
        path = cache.fetch(url, 300 * KB)
        assert read(path) == content(1) and path == cache.path(url)
        assert cache.fetch(url, 300 * KB) == path
        assert nginx.requests() == ["GET /a.tar 200"]
        descriptor = cache.open(url)
        assert os.pread(descriptor, 2, 0) == b"1 "
        os.close(descriptor)

    def test_same_names_in_two_folders_do_not_collide(self, nginx: Server, cache: ShardCache) -> None:
        urls = [nginx.put(f"{folder}/0000.tar", content(n)) for n, folder in enumerate("ab")]
        for n, url in enumerate(urls):
            assert read(cache.fetch(url)) == content(n)
        assert len({cache.path(url) for url in urls}) == 2
        assert {os.path.basename(cache.path(url)) for url in urls} == {"0000.tar"}

    def test_wildcards_are_listed(self, nginx: Server) -> None:
        urls = [nginx.put(f"set/train-{n}.tar", b"x") for n in (2, 0, 1)]
        nginx.put("set/other.tar", b"x")
        assert expand_remote(nginx.url("set/train-*.tar")) == sorted(urls)
        assert expand_remote(nginx.url("set/train-[01].tar")) == sorted(urls)[:2]
        assert expand_remote(nginx.url("set/nothing-*.tar")) == []
        assert expand_remote(urls[0]) == [urls[0]]
        assert expand_remote(urls[0] + "?key=a") == [urls[0] + "?key=a"]
        with pytest.raises(ShardError, match="no-such-folder"):
            expand_remote(nginx.url("no-such-folder/*.tar"))

    @pytest.mark.parametrize("name", ["missing.tar", "private/a.tar"])
    def test_a_missing_or_forbidden_file_is_an_error_at_once(self, nginx: Server, cache: ShardCache, name: str) -> None:
        with pytest.raises(ShardError, match=name):
            cache.fetch(nginx.url(name))
        assert len(nginx.requests(name)) == 1
        assert whole_files(cache) == [] and bytes_held(cache) == 0

    def test_a_signed_url_keeps_its_query_and_needs_no_head(self, nginx: Server, cache: ShardCache, tmp_path: Path) -> None:
        url = nginx.put("signed/a.tar", content(3)) + "?X-Amz-Credential=a%2Fb%2Bc&X-Amz-Expires=60"
        path = cache.fetch(url)
        assert read(path) == content(3) and os.path.basename(path) == "a.tar"
        assert nginx.requests() == ["GET /signed/a.tar?X-Amz-Credential=a%2Fb%2Bc&X-Amz-Expires=60 200"]
        assert cache.fetch_small(url + ".index.safetensors", str(tmp_path / "none")) is None

    def test_small_files_beside_a_shard(self, nginx: Server, cache: ShardCache, tmp_path: Path) -> None:
        url = nginx.put("a.tar.index.safetensors", b"index")
        to = str(tmp_path / "other" / "a.tar.index.safetensors")
        for _ in range(2):
            assert cache.fetch_small(url, to) == to and read(to) == b"index"
        for missing in ("b.tar.index.safetensors", "private/b.index.safetensors"):
            assert cache.fetch_small(nginx.url(missing), str(tmp_path / "none")) is None
        assert len(nginx.requests("a.tar.index.safetensors")) == 1 and not (tmp_path / "none").exists()

    def test_a_changed_file_is_refused(self, nginx: Server, cache: ShardCache) -> None:
        url = nginx.put("a.tar", content(1))
        with pytest.raises(ShardError, match=r"a\.tar' has 300,000 bytes, 200,000 were indexed.*pile index"):
            cache.fetch(url, 200 * KB)
        cache.fetch(url)
        nginx.put("a.tar", content(1, 200 * KB))
        assert len(read(cache.fetch(url, 200 * KB))) == 200 * KB  # the old copy is of no use

    def test_wrong_content_is_fetched_once_more_and_then_an_error(self, nginx: Server, cache: ShardCache) -> None:
        url = nginx.put("a.tar", content(1))
        seen: list[str] = []

        def refuse(path: str) -> None:
            seen.append(path)
            assert read(path) == content(1) and not os.path.exists(cache.path(url))
            raise ShardError("not what was indexed")

        with pytest.raises(ShardError, match="not what was indexed"):
            cache.fetch(url, None, refuse)
        assert len(seen) == len(nginx.requests("a.tar")) == 2
        assert whole_files(cache) == [] and bytes_held(cache) == 0

        def mended(path: str) -> None:
            seen.append(path)
            if len(seen) == 3:
                raise ShardError("not what was indexed")

        assert read(cache.fetch(url, None, mended)) == content(1)

    def test_processes_that_ask_at_once_download_once(self, nginx: Server, cache: ShardCache) -> None:
        url = nginx.put("slow/a.tar", content(7))
        with PROCESSES.Pool(4) as pool:
            paths = pool.starmap(fetch_whole, [(cache, url, content(7))] * 4, chunksize=1)
        assert set(paths) == {cache.path(url)}
        assert nginx.requests("slow/a.tar") == ["GET /slow/a.tar 200"]

    def test_a_killed_download_leaves_nothing_that_looks_whole(self, nginx: Server, cache: ShardCache) -> None:
        url = nginx.put("slow/a.tar", content(5, 900 * KB))
        process = PROCESSES.Process(target=cache.fetch, args=(url,))
        process.start()
        wait_until(lambda: list(Path(cache.folder).glob("*/*.part")))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert list(Path(cache.folder).glob("*/*.part")) and not os.path.exists(cache.path(url))
        other = nginx.put("b.tar", content(6, 900 * KB))  # does not fit next to the part that the dead process left
        assert read(cache.fetch(other)) == content(6, 900 * KB)
        assert not list(Path(cache.folder).glob("*/*.part"))
        nginx.put("slow/a.tar", content(5, 100 * KB))
        assert read(cache.fetch(url)) == content(5, 100 * KB)

    def test_the_least_recently_used_file_is_evicted_first_and_never_one_that_is_open(
        self, nginx: Server, cache: ShardCache
    ) -> None:
        a, b, c, d, e = urls = [nginx.put(f"{name}.tar", content(n)) for n, name in enumerate("abcde")]  # three fit
        for url in (a, b, c):
            cache.fetch(url)
        descriptor = cache.open(a)
        cache.fetch(c)
        cache.fetch(d)
        assert [os.path.exists(cache.path(url)) for url in urls] == [True, False, True, True, False]
        cache.fetch(e)
        assert [os.path.exists(cache.path(url)) for url in urls] == [True, False, False, True, True]
        os.close(descriptor)
        cache.fetch(b)
        assert [os.path.exists(cache.path(url)) for url in urls] == [False, True, False, True, True]

    def test_a_file_that_another_process_needs_next_is_kept_until_that_process_ends(
        self, nginx: Server, cache: ShardCache
    ) -> None:
        a, b, c, d, e = (nginx.put(f"{name}.tar", content(n)) for n, name in enumerate("abcde"))
        ready = PROCESSES.Event()
        process = PROCESSES.Process(target=prefetch_and_stay, args=(cache, a, ready))
        process.start()
        assert ready.wait(60)
        for url in (b, c, d):
            cache.fetch(url)
        assert os.path.exists(cache.path(a)) and not os.path.exists(cache.path(b))
        process.kill()
        process.join()
        cache.fetch(e)
        assert not os.path.exists(cache.path(a))

    def test_everything_in_the_folder_counts(self, nginx: Server, cache: ShardCache) -> None:
        a, b = (nginx.put(f"{name}.tar", content(n)) for n, name in enumerate("ab"))
        kept = Path(cache.fetch_small(nginx.put("x.manifest", content(3, 350 * KB)), f"{cache.folder}/manifests/x") or "")
        beside = Path(cache.fetch(a) + ".tokens.safetensors")
        beside.write_bytes(content(4, 300 * KB))
        cache.fetch(b)
        held = sum(path.stat().st_size for path in Path(cache.folder).rglob("*") if path.is_file())
        assert held <= cache.max_bytes and kept.exists() and os.path.exists(cache.path(b))

    def test_a_file_that_is_needed_replaces_one_in_use_rather_than_wait_for_ever(
        self, nginx: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(remote, "STUCK_SECONDS", 0.5)
        descriptors = [cache.open(nginx.put(f"{n}.tar", content(n))) for n in range(4)]  # three fit
        assert [os.pread(descriptor, 2, 0) for descriptor in descriptors] == [b"0 ", b"1 ", b"2 ", b"3 "]
        assert "raise data.cache_gigabytes" in caplog.text
        for descriptor in descriptors:
            os.close(descriptor)

    def test_a_file_too_large_for_the_cache_names_the_setting(self, nginx: Server, cache: ShardCache) -> None:
        kept = cache.fetch(nginx.put("a.tar", content(1)))
        url = nginx.put("huge.tar", content(1, 1001 * KB))
        with pytest.raises(ShardError, match=r"huge\.tar.*data\.cache_gigabytes"):
            cache.fetch(url)
        assert os.path.exists(kept)
        with pytest.raises(ValueError, match=r"data\.cache_gigabytes"):
            ShardCache("x", 0)

    def test_the_bound_holds_under_several_processes(self, nginx: Server, cache: ShardCache) -> None:
        cache.max_bytes = 650 * KB  # two files of six
        for n in range(6):
            nginx.put(f"{n}.tar", content(n))
        base = nginx.url("")
        worst, done = 0, threading.Event()

        def watch() -> None:
            nonlocal worst
            while not done.is_set():
                worst = max(worst, bytes_held(cache))
                time.sleep(0.001)  # or we hold the lock all the time

        watcher = threading.Thread(target=watch)
        watcher.start()
        processes = [PROCESSES.Process(target=read_all_in_turn, args=(cache, base, seed)) for seed in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        done.set()
        watcher.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert 300 * KB <= worst <= cache.max_bytes

    def test_the_next_files_are_fetched_while_one_is_used(self, nginx: Server, cache: ShardCache) -> None:
        urls = [nginx.put(f"{n}.tar", content(n, 200 * KB)) for n in range(8)]
        there = lambda: [os.path.exists(cache.path(url)) for url in urls]  # noqa: E731
        prefetcher = Prefetcher(cache, ((n + 1, Wanted(url, 200 * KB)) for n, url in enumerate(urls)), ahead=3)
        try:
            wait_until(lambda: there() == [True] * 3 + [False] * 5)
            time.sleep(0.1)
            assert there() == [True] * 3 + [False] * 5
            prefetcher.advance(2)
            wait_until(lambda: there() == [True] * 5 + [False] * 3)
            prefetcher.advance(5)  # five fit: of the used ones, the longest unused go
            wait_until(lambda: there() == [False] * 3 + [True] * 5)
        finally:
            prefetcher.close()
        assert len(nginx.requests()) == 8
        assert not any(thread.is_alive() for thread in prefetcher._threads)

    def test_what_is_needed_sooner_makes_no_room_for_what_is_needed_later(self, nginx: Server, cache: ShardCache) -> None:
        urls = [nginx.put(f"{n}.tar", content(n, 400 * KB)) for n in range(4)]  # two fit
        prefetcher = Prefetcher(cache, [(n + 1, Wanted(url, 400 * KB)) for n, url in enumerate(urls)], ahead=4)
        try:
            wait_until(lambda: len(whole_files(cache)) == 2)
            time.sleep(0.3)
            assert os.path.exists(cache.path(urls[0])) and os.path.exists(cache.path(urls[1]))
            prefetcher.advance(1)
            wait_until(lambda: os.path.exists(cache.path(urls[2])))
            assert os.path.exists(cache.path(urls[1]))
        finally:
            prefetcher.close()
        assert len(nginx.requests()) == 3

    def test_a_process_that_was_forked_meanwhile_keeps_no_file(self, nginx: Server, cache: ShardCache) -> None:
        urls = [nginx.put(f"{n}.tar", content(n, 400 * KB)) for n in range(3)]  # two fit
        prefetcher = Prefetcher(cache, [(n + 1, Wanted(url, 400 * KB)) for n, url in enumerate(urls)], ahead=4)
        wait_until(lambda: len(whole_files(cache)) == 2)
        time.sleep(0.1)  # until the prefetcher has opened the second
        if not (child := os.fork()):
            time.sleep(100)
            os._exit(0)
        try:
            prefetcher.advance(1)
            wait_until(lambda: os.path.exists(cache.path(urls[2])), 10)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            prefetcher.close()

    def test_a_file_that_was_passed_while_it_was_fetched_gives_its_room_back(self, nginx: Server, cache: ShardCache) -> None:
        urls = [nginx.put(f"{n}.tar", content(n, 400 * KB)) for n in range(4)]  # two fit
        prefetcher = Prefetcher(cache, [(n + 1, Wanted(url, 400 * KB)) for n, url in enumerate(urls)], ahead=4)
        try:
            prefetcher.advance(2)
            wait_until(lambda: os.path.exists(cache.path(urls[3])))
        finally:
            prefetcher.close()

    def test_a_prefetcher_leaves_errors_to_the_reader(
        self, nginx: Server, cache: ShardCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        urls = [nginx.url("gone-0.tar"), nginx.url("gone-1.tar"), nginx.put("a.tar", content(1))]
        prefetcher = Prefetcher(cache, ((1, Wanted(url)) for url in urls), threads=1)
        wait_until(lambda: os.path.exists(cache.path(urls[2])))
        prefetcher.close()
        assert [record.levelname for record in caplog.records if "fetched ahead" in record.message] == ["WARNING"]
        with pytest.raises(ShardError, match="gone-0"):
            cache.fetch(urls[0])

    def test_closing_a_prefetcher_ends_its_download(self, nginx: Server, cache: ShardCache) -> None:
        url = nginx.put("slow/a.tar", content(1, 900 * KB))  # takes four seconds
        prefetcher = Prefetcher(cache, [(1, Wanted(url))])
        wait_until(lambda: bytes_held(cache) == 900 * KB)
        begun = time.monotonic()
        prefetcher.close()
        assert time.monotonic() - begun < 2
        assert bytes_held(cache) == 0 and not any(thread.is_alive() for thread in prefetcher._threads)

    def test_a_pickled_cache_is_the_same_cache(self, nginx: Server, cache: ShardCache) -> None:
        url = nginx.put("a.tar", content(1))
        path = cache.fetch(url)
        copy = pickle.loads(pickle.dumps(cache))
        assert vars(copy) == vars(cache) and copy.fetch(url) == path
        assert len(nginx.requests()) == 1

    def test_a_lock_is_free_again_though_a_child_was_forked_meanwhile(self, nginx: Server, cache: ShardCache) -> None:
        """A DataLoader's worker, forked while a thread downloads, inherits the descriptor of the lock."""
        url = nginx.put("slow/a.tar", content(1))
        thread = threading.Thread(target=cache.fetch, args=(url,))
        thread.start()
        wait_until(lambda: list(Path(cache.folder).glob("*/*.part")))
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        try:
            thread.join()
            os.unlink(cache.path(url))
            nginx.put("slow/a.tar", b"new")
            begun = time.monotonic()
            assert read(cache.fetch(url)) == b"new"
            assert time.monotonic() - begun < 10
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@needs_nginx
def test_shards_of_a_training_are_fetched_ahead_once_and_hold_the_same(nginx: Server, tmp_path: Path) -> None:
    import torch  # here: processes of other tests import this module, and need none of it

    from pile_app.data.datamodule import PileDataModule, Source, shards_ahead
    from pile_app.data.tokenizers import ByteTokenizer
    from pile_app.model.fused import make_vocabulary

    texts = (Document((Segment(f"text {n} " * 20),), str(n)) for n in range(600))
    written = write_shards(texts, nginx.files / "set", "a", shard_bytes=30_000)
    tokenizer, here, there = ByteTokenizer(), str(nginx.files / "set/a-*.tar"), nginx.url("set/a-*.tar")
    vocabulary = make_vocabulary(tokenizer.size, tokenizer.fingerprint, None, None)
    local, remote = (
        PileDataModule({"a": Source(where)}, vocabulary, tokenizer, 256, global_batch=2, cache=str(tmp_path / "cache"))
        for where in (here, there)
    )
    for data in (local, remote):
        data.prepare_data()
        data.setup()
    assert len(written.paths) > 18 and whole_files(remote.cache) == []
    streams = range(remote.order.streams)
    ahead = Prefetcher(remote.cache, shards_ahead(remote.train_data, remote.order, streams, 0, 10**6), ahead=16)
    try:
        wait_until(lambda: len(whole_files(remote.cache)) == 16)
        ahead.advance(10**6)
        wait_until(lambda: len(whole_files(remote.cache)) == len(written.paths))
        for position in range(0, remote.order.packs_per_epoch, 7):
            assert torch.equal(*(data.train_dataset()[position].tokens for data in (local, remote)))
    finally:
        ahead.close()
    assert sum(line.endswith(".tar 200") for line in nginx.requests("set/")) == len(written.paths)


@needs_nginx
@pytest.mark.parametrize("nodes", [2, 4])
def test_each_node_fetches_its_part_of_an_epoch(tmp_path: Path, nodes: int) -> None:
    from benchmarks.remote_cost import measure

    fetched, total = measure(tmp_path, nodes, shards=48, workers=None)
    assert max(fetched) <= 1.15 / nodes * total, [bytes_ / total for bytes_ in fetched]
    assert sum(fetched) >= total, "every shard is read by some node"


def fetch_whole(cache: ShardCache, url: str, expected: bytes) -> str:
    path = cache.fetch(url, len(expected))
    assert read(path) == expected
    return path


def prefetch_and_stay(cache: ShardCache, url: str, ready: Any) -> None:
    Prefetcher(cache, [(1, Wanted(url))])
    wait_until(lambda: os.path.exists(cache.path(url)))
    ready.set()
    time.sleep(30)


def read_all_in_turn(cache: ShardCache, base: str, seed: int) -> None:
    for step in range(12):
        n = (step * (1 + 4 * (seed % 2)) + seed) % 6
        descriptor = cache.open(f"{base}{n}.tar", 300 * KB)
        assert os.pread(descriptor, 1 << 20, 0) == content(n)
        os.close(descriptor)


class TestOtherServers:
    def test_pythons_own_server(self, tmp_path: Path, cache: ShardCache) -> None:
        (tmp_path / "a.tar").write_bytes(content(4))
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
        with serving(handler) as port:
            assert read(cache.fetch(f"http://127.0.0.1:{port}/a.tar", 300 * KB)) == content(4)

    def test_a_dead_link_names_the_url(self, cache: ShardCache, tmp_path: Path) -> None:
        url = f"http://127.0.0.1:{free_port()}/a.tar"
        for ask in (cache.fetch, lambda url: cache.fetch_small(url, str(tmp_path / "small"))):
            begun = time.monotonic()
            with pytest.raises(ShardError, match=rf"{url}.*[Cc]onnect.*tried 3 times"):
                ask(url)
            assert 0.03 <= time.monotonic() - begun < 5  # 0.01 s, then 0.02 s
        with pytest.raises(ShardError, match="tried 6 times"):
            expand_quickly(url.replace("a.tar", "*.tar"))

    @pytest.mark.parametrize("failures", [2, 99])
    def test_a_transfer_that_breaks_off_is_tried_again(self, cache: ShardCache, failures: int) -> None:
        asked: list[int] = []

        class Breaking(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.readline().strip():
                    pass
                asked.append(1)
                data = content(8)
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data))
                self.wfile.write(data if len(asked) > failures else data[: 100 * KB])

        with serving(Breaking) as port:
            url = f"http://127.0.0.1:{port}/a.tar"
            if failures == 2:
                assert read(cache.fetch(url)) == content(8)
            else:
                with pytest.raises(ShardError, match=rf"{url}.*tried 3 times"):
                    cache.fetch(url)
                assert whole_files(cache) == [] and bytes_held(cache) == 0
        assert len(asked) == 3

    @pytest.mark.parametrize(("status", "tries"), [("503 Busy", 3), ("429 Slow down", 3), ("400 Bad", 1)])
    def test_only_what_may_pass_is_tried_again(self, cache: ShardCache, status: str, tries: int) -> None:
        asked: list[int] = []

        class Failing(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.readline().strip():
                    pass
                asked.append(1)
                self.wfile.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status.encode())

        with serving(Failing) as port, pytest.raises(ShardError, match=status[:3]):
            cache.fetch(f"http://127.0.0.1:{port}/a.tar")
        assert len(asked) == tries

    def test_a_size_that_nobody_says(self, cache: ShardCache) -> None:
        """Chunked transfer: the bound is kept as the bytes come, and a file that ends early is known by its index."""

        class Chunked(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.readline().strip():
                    pass
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
                for _ in range(15):
                    self.wfile.write(b"%x\r\n%s\r\n" % (100 * KB, content(9, 100 * KB)))
                    cut.wait(0.01)
                self.wfile.write(b"0\r\n\r\n")

        cut = threading.Event()
        with serving(Chunked) as port:
            url = f"http://127.0.0.1:{port}/a.tar"
            with pytest.raises(ShardError, match=r"data\.cache_gigabytes"):
                cache.fetch(url)
            cache.max_bytes = 2000 * KB
            assert len(read(cache.fetch(url))) == 1500 * KB
            with pytest.raises(ShardError, match="1,500,000 of 1,600,000"):
                cache.fetch(url, 1600 * KB)

    def test_an_unknown_scheme_and_a_missing_package_are_one_line(
        self, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ShardError, match=r"nosuch://host/a\.tar"):
            cache.fetch("nosuch://host/a.tar")
        known = sys.modules["fsspec.registry"]._registry
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(known, "s3", raising=False)
        monkeypatch.delitem(known, "s3a", raising=False)
        with pytest.raises(ShardError, match="pip install s3fs"):
            cache.fetch("s3://bucket/a.tar")


def expand_quickly(url: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote.time, "sleep", lambda seconds: None)
        return expand_remote(url)


class serving:
    """A server of connections, each answered by a handler in a thread, on a port of this machine."""

    def __init__(self, handler: Any) -> None:
        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    def __enter__(self) -> int:
        threading.Thread(target=functools.partial(self.server.serve_forever, 0.02), daemon=True).start()
        return self.server.server_address[1]

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class TestPipe:
    def test_a_pipe_is_refused_unless_switched_on(self, cache: ShardCache, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"data\.allow_pipe"):
            cache.fetch(f"pipe:touch {tmp_path}/ran")
        assert not (tmp_path / "ran").exists()

    def test_the_output_of_a_command_is_a_shard(self, cache: ShardCache, tmp_path: Path) -> None:
        cache.allow_pipe = True
        (tmp_path / "a.tar").write_bytes(content(1))
        url = f"pipe:cat {tmp_path}/a.tar | cat"
        assert is_remote(url) and expand_remote(url) == [url]
        assert read(cache.fetch(url)) == content(1)
        (tmp_path / "a.tar").unlink()
        assert read(cache.fetch(url, 300 * KB)) == content(1)
        assert cache.fetch_small(url + ".index.safetensors", str(tmp_path / "none")) is None

    @pytest.mark.parametrize(
        ("command", "said"),
        [
            ("echo half; echo the disk is gone >&2; exit 3", "exit status 3: the disk is gone.*tried 3 times"),
            ("no-such-command-at-all", "exit status 127"),
            ("false | echo half", "exit status 1"),
        ],
    )
    def test_a_failing_command_says_how(self, cache: ShardCache, command: str, said: str) -> None:
        cache.allow_pipe = True
        with pytest.raises(ShardError, match=said):
            cache.fetch(f"pipe:{command}")
        assert whole_files(cache) == [] and bytes_held(cache) == 0

    def test_a_command_that_never_ends_is_killed_when_given_up(self, cache: ShardCache, tmp_path: Path) -> None:
        cache.allow_pipe = True
        begun = time.monotonic()
        with pytest.raises(ShardError, match=r"data\.cache_gigabytes"):
            cache.fetch(f"pipe:echo $$ > {tmp_path}/pid; head -c 1100000 /dev/zero; sleep 60")
        assert time.monotonic() - begun < 10
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A bucket of moto's server, asked by the real s3fs through the environment alone, as users do."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server._server.port
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        s3fs.S3FileSystem.clear_instance_cache()
        filesystem = s3fs.S3FileSystem()
        filesystem.mkdir("shards")
        yield filesystem
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


class TestS3:
    def test_a_file_arrives_whole(self, s3: Any, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pile_app.data.remote.CHUNK", 100 * KB)  # several ranges
        s3.pipe_file("shards/a.tar", content(1, 350 * KB))
        url = "s3://shards/a.tar"
        assert read(cache.fetch(url, 350 * KB)) == content(1, 350 * KB)
        s3.pipe_file("shards/a.tar", content(2, 250 * KB))
        assert read(cache.fetch(url, 250 * KB)) == content(2, 250 * KB)

    def test_wildcards_are_listed(self, s3: Any) -> None:
        for name in ("x-1.tar", "x-0.tar", "y.tar"):
            s3.pipe_file(f"shards/set/{name}", b"x")
        assert expand_remote("s3://shards/set/x-*.tar") == ["s3://shards/set/x-0.tar", "s3://shards/set/x-1.tar"]
        assert expand_remote("s3://shards/set/x-?.tar") == ["s3://shards/set/x-0.tar", "s3://shards/set/x-1.tar"]

    @pytest.mark.parametrize("url", ["s3://shards/missing.tar", "s3://no-such-bucket/a.tar"])
    def test_a_missing_key_is_an_error_at_once(self, s3: Any, cache: ShardCache, url: str, tmp_path: Path) -> None:
        cache.backoff_seconds = 60
        with pytest.raises(ShardError, match=url):
            cache.fetch(url)
        assert cache.fetch_small(url + ".index.safetensors", str(tmp_path / "none")) is None

    def test_a_worker_process_reads_from_s3(self, s3: Any, cache: ShardCache) -> None:
        s3.pipe_file("shards/b.tar", content(3))
        with PROCESSES.Pool(1) as pool:
            assert pool.apply(fetch_whole, (cache, "s3://shards/b.tar", content(3))) == cache.path("s3://shards/b.tar")

    def test_a_dead_endpoint_names_the_url(self, s3: Any, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        type(s3).clear_instance_cache()
        cache.retries = 1
        with pytest.raises(ShardError, match=r"s3://shards/a\.tar.*tried 2 times"):
            cache.fetch("s3://shards/a.tar")
        type(s3).clear_instance_cache()

    def test_missing_credentials_are_named_at_once(
        self, s3: Any, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        cache.backoff_seconds = 60
        type(s3).clear_instance_cache()
        with pytest.raises(ShardError, match=r"s3://shards/a\.tar.*Set the credentials"):
            cache.fetch("s3://shards/a.tar")
        type(s3).clear_instance_cache()

    def test_pile_index_publishes_the_manifest(self, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from pile_app.cli import main
        from pile_app.data.shards import Shards
        from pile_app.data.tokenizers import load_tokenizer, train_tokenizer

        written = write_shards(
            (Document((Segment(f"text {n} " * 20),), str(n)) for n in range(200)), tmp_path / "x", "x", 30_000
        )
        for path in written.paths:
            s3.put(path, f"shards/published/{os.path.basename(path)}")
        train_tokenizer(["text 1 2 3 4"] * 9, "bpe", 270, tmp_path / "t.json")
        arguments = [
            "s3://shards/published/x-*.tar",
            "--tokenizer",
            str(tmp_path / "t.json"),
            "--cache",
            str(tmp_path / "one"),
            "--processes",
            "1",
        ]
        main(["index", *arguments])
        shown = capsys.readouterr().out
        assert shown.startswith("200 samples: 200 documents; rejected: none; fields [txt]\n")
        assert shown.endswith("s3://shards/published/x.manifest.safetensors\n")
        other = ShardCache(tmp_path / "two", 1000 * KB)
        found = Shards("s3://shards/published/x-*.tar", other, tokenizer=load_tokenizer(str(tmp_path / "t.json")))
        assert len(found) == 200 and not whole_files(other), "no shard is fetched to count it"
        assert found.document(7) == written.document(7) and len(whole_files(other)) == 1
