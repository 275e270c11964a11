"""The page of `pile app`, asked over HTTP by Gradio's own client."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import AUDIO, IMAGE

from pile_app.data.tokenizers import ByteTokenizer
from pile_app.documents import Segment
from pile_app.model.backbones import Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.records import Turn
from pile_app.tasks.app import REFUSED, import_gradio, is_this_machine, make_app, serve, turns_of
from pile_app.tasks.chat import Limits
from pile_app.tasks.classification import Classification
from tests.ports import free_port

pytest.importorskip("gradio", reason="the extra chat")
LIMITS = Limits(upload_bytes=30_000, audio_seconds=0.5)


def module_of(objective: Any = None) -> Any:
    torch.manual_seed(0)
    model = FusedLanguageModel(Transformer(width=32, layers=1, heads=2), ByteTokenizer(), IMAGE, AUDIO).eval()
    if objective is not None:
        objective.build(model)
        objective.eval()
    return SimpleNamespace(model=model, objective=objective, device=torch.device("cpu"))


class Site:
    """A running page, and its functions as its own browser code calls them."""

    def __init__(self, address: str, blocks: Any) -> None:
        self.address, self.blocks = address, blocks

    def get(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def upload(self, name: str, data: bytes) -> int:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + b"\r\n--x--\r\n"
        return self.get("/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})[0]

    def function(self, name: str) -> Callable[..., Any]:
        return next(one.fn for one in self.blocks.fns.values() if getattr(one.fn, "__name__", "") == name)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    port = free_port()
    module = module_of(Classification(["dark", "light"], pooling=["mean"]))
    made: list[Any] = []
    stop = serve(lambda: made.append(make_app(module, 400, "tiny", None, LIMITS)) or made[0], "127.0.0.1", port, block=False)
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    try:
        yield Site(f"http://127.0.0.1:{port}", made[0])
    finally:
        stop()
    assert not folder.exists(), "the files go with the server"


def test_the_page_has_the_tabs_of_its_run_and_loads_nothing_from_other_hosts(site: Site) -> None:
    status, body, headers = site.get("/")
    assert status == 200 and b"gradio" in body
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    assert not import_gradio().analytics.analytics_enabled()
    config = site.get("/config")[1].decode()
    for tab in ("tab-generate", "tab-chat", "tab-classify"):
        assert tab in config
    assert "tab-search" not in config and "tab-tag" not in config, "the run can do neither"


def test_files_of_the_server_and_large_uploads_are_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("hidden words")
    for path in ("/etc/passwd", str(tmp_path / "secret.txt"), "../../../../etc/passwd", os.path.abspath("pyproject.toml")):
        status, body, _ = site.get(f"/gradio_api/file={path}")
        assert status in (400, 403, 404) and b"hidden words" not in body and b"root:" not in body
    assert site.upload("a.png", b"\0" * 11_000_000) == 413 and site.upload("a.png", b"\0" * 10) == 200


def test_the_page_generates_and_classifies_what_it_is_sent(site: Site, image: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(0).file)
    sent = {"text": "number", "files": [str(tmp_path / "a.png")]}
    drawn = site.function("generate")(sent, "image", 3, 0.8, 0.9, 1.0, 8, 0.2, 0)
    assert drawn.count("data:image/png;base64,") == 3
    assert "<audio" in site.function("generate")({"text": "", "files": []}, "audio", 1, 0.8, 0.9, 1.0, 8, 0.2, 0)
    said = site.function("classify")(sent, "")
    assert set(said) == {"dark", "light"} and sum(said.values()) == pytest.approx(1)


def test_a_conversation_goes_on_from_what_the_page_shows(site: Site, image: Any, sound: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(0).file)
    picture = {"type": "file", "file": {"path": str(tmp_path / "a.png")}}
    history = [
        {"role": "user", "content": [picture]},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "too long"},
        {"role": "assistant", "content": "no", "metadata": {"title": REFUSED}},
    ]
    assert turns_of(history) == [
        Turn("user", (image(0), Segment("What is this?"))),
        Turn("assistant", (Segment("seven"),)),
    ]


def test_what_cannot_be_used_is_told_on_the_page(site: Site, sound: Any, tmp_path: Path) -> None:
    gradio = import_gradio()
    (tmp_path / "long.flac").write_bytes(sound(0, 6000).file)
    (tmp_path / "fake.png").write_bytes(b"not a picture")
    for name, reason in (("long.flac", "at most 0.5 s"), ("fake.png", "undecodable_image")):
        with pytest.raises(gradio.Error, match=reason):
            site.function("classify")({"text": "", "files": [str(tmp_path / name)]}, "")
    with pytest.raises(gradio.Error, match="nothing was sent"):
        site.function("classify")({"text": " ", "files": []}, "")


def test_other_machines_are_asked_for_a_password(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert [is_this_machine(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1", "gpu-box")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    monkeypatch.delenv("PILE_PASSWORD", raising=False)
    port = free_port()
    stop = serve(lambda: make_app(module_of(), 400, "tiny"), "0.0.0.0", port, block=False)
    try:
        told = capsys.readouterr().out
        password = told.split("password '")[1].split("'")[0]
        other = Site(f"http://127.0.0.1:{port}", None)
        assert other.get("/config")[0] == 401
        assert other.get("/login", f"username=pile&password={password}".encode())[0] == 200
        assert other.get("/login", b"username=pile&password=wrong")[0] == 400
    finally:
        stop()


def test_a_language_model_labels_by_its_own_words(site: Site) -> None:
    page = make_app(module_of(), 400, "tiny")
    classify = next(one.fn for one in page.fns.values() if getattr(one.fn, "__name__", "") == "classify")
    said = classify({"text": "good", "files": []}, "yes, no, maybe")
    assert set(said) == {"yes", "no", "maybe"} and sum(said.values()) == pytest.approx(1)
