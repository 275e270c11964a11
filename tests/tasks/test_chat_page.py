"""The page of `pile chat --browser`, asked over HTTP as a browser or an attacker would."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AUDIO, IMAGE

from pile_app.data.tokenizers import ByteTokenizer
from pile_app.model.backbones import Transformer
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling
from pile_app.tasks.chat import Conversation, Limits
from pile_app.tasks.chat_page import import_gradio, serve, stop
from tests.ports import free_port

pytest.importorskip("gradio", reason="the extra chat")


class Page:
    """A running server: its address, the folder of its files."""

    def __init__(self, address: str, folder: Path, config: dict[str, Any]) -> None:
        self.address, self.folder, self.config = address, folder, config

    def get(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
        """(status, body, headers). The path goes out as it is: no client tidies it."""
        request = urllib.request.Request(self.address, data, headers)
        request.selector = path
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def upload(self, name: str, data: bytes) -> tuple[int, Any]:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + b"\r\n--x--\r\n"
        status, answer, _ = self.get("/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})
        return status, json.loads(answer) if status == 200 else answer

    def ask(self, text: str, files: list[str], session: str) -> list[dict[str, Any]]:
        """Sends a message; everything that the server says about it."""
        (function,) = (one for one in self.config["dependencies"] if any(target[1] == "submit" for target in one["targets"]))
        sent = {"text": text, "files": [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in files]}
        data = {"data": [sent, [], None, 1.0, 1.0, 1.0, 0.5, 0], "fn_index": function["id"], "session_hash": session}
        status, body, _ = self.get("/gradio_api/queue/join", json.dumps(data).encode(), **{"Content-Type": "application/json"})
        assert status == 200, body
        status, body, _ = self.get(f"/gradio_api/queue/data?session_hash={session}")
        return [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    torch.manual_seed(0)
    model = FusedLanguageModel(Transformer(width=32, layers=1, heads=2), ByteTokenizer(), IMAGE, AUDIO).eval()
    limits = Limits(upload_bytes=30_000, audio_seconds=0.5)
    sampling, port = Sampling(max_text=8, max_seconds=0.2), free_port()
    served = serve(lambda: Conversation(model, 400, limits), sampling, "tiny", "127.0.0.1", port, users=2, block=False)
    try:
        address = f"http://127.0.0.1:{port}"
        config = json.loads(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/config").read())
        yield Page(address, served.pile_folder, config)
    finally:
        stop(served)
    assert not served.pile_folder.exists(), "the files go with the server"


def test_the_page_comes_and_names_no_other_host(page: Page) -> None:
    status, body, headers = page.get("/")
    assert status == 200 and b"gradio" in body
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and not import_gradio().analytics.analytics_enabled()
    assert page.config["analytics_enabled"] is False
    assert b"fonts.googleapis" not in page.get("/theme.css")[1]


def test_no_file_outside_the_folder_is_served(page: Page, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (page.folder / "link.txt").symlink_to(secret)
    (page.folder / "linked").symlink_to(tmp_path)
    beside = Path(f"{page.folder}-other")
    beside.mkdir()
    (beside / "a.txt").write_text("secret")
    inside = page.folder / "inside.txt"
    inside.write_text("mine")
    places = [
        "/etc/passwd", str(secret), f"{page.folder}/link.txt", f"{page.folder}/linked/secret.txt", f"{beside}/a.txt",
        f"{page.folder}/../{beside.name}/a.txt", f"{page.folder}/../../../../../../etc/passwd", "../../../../etc/passwd",
        str(page.folder), "pyproject.toml", os.path.abspath("pyproject.toml"), "http://127.0.0.1:1/", "file:///etc/passwd", "",
    ]  # fmt: skip
    try:
        for place in places:
            for written in {place, urllib.parse.quote(place, safe=""), place.replace("..", "%2e%2e"), place.replace("/", "//")}:
                for prefix in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/gradio_api/../gradio_api/file="):
                    status, body, _ = page.get(prefix + written)
                    assert status in (307, 400, 403, 404, 405, 422) and b"secret" not in body and b"root:" not in body, (
                        prefix + written
                    )
        assert page.get(f"/gradio_api/file={inside}")[:2] == (200, b"mine")
    finally:
        (beside / "a.txt").unlink()
        beside.rmdir()
        (page.folder / "linked").unlink()
        (page.folder / "link.txt").unlink()


def test_nothing_but_the_page_is_served(page: Page) -> None:
    for path in (
        "/gradio_api/proxy=http://127.0.0.1:1/", "/monitoring", "/monitoring/summary", "/gradio_api/runs",
        "/gradio_api/vibe-code",
        "/gradio_api/profiling/summary", "/gradio_api/run-history/records", "/gradio_api/deep_link", "/docs", "/openapi.json",
        "/static/../../routes.py", "/static/%2e%2e/%2e%2e/routes.py", "/assets/../../../routes.py",
        "/gradio_api/custom_component/1/a/b/c",
    ):  # fmt: skip
        status, body, _ = page.get(path)
        assert status in (403, 404) and b"import" not in body, path


def test_uploads_over_the_limit_are_refused_and_others_lie_in_the_folder(page: Page, image: Any) -> None:
    assert page.upload("a.png", b"\0" * 40_000)[0] == 413
    status, (path,) = page.upload("../../../../tmp/evil.png", image(0).file)
    assert status == 200 and Path(path).resolve().is_relative_to(page.folder.resolve())
    assert page.get(f"/gradio_api/file={path}")[1] == image(0).file


def shown(events: list[dict[str, Any]]) -> tuple[Any, str]:
    """(messages, notice) at the end."""
    (last,) = (event for event in events if event["msg"] == "process_completed")
    assert last["success"], last
    data = last["output"]["data"]
    return data[0], data[3]


def test_a_picture_is_sent_and_answered(page: Page, image: Any) -> None:
    _, (path,) = page.upload("digit.png", image(0).file)
    events = page.ask("What is <b>this</b>?", [path], "one")
    generating = [event for event in events if event["msg"] == "process_generating"]
    (messages, _) = shown(page.ask("What is <b>this</b>?", [path], "two")) if not generating else (None, None)
    first = generating[0]["output"]["data"][0] if generating else messages
    assert [message["role"] for message in first[:2]] == ["user", "user"]
    assert "this" in json.dumps(first) and "<script" not in json.dumps(first)
    served = [one["file"]["path"] for message in first for one in message["content"] if isinstance(one, dict) and "file" in one]
    assert served and all(Path(one).resolve().is_relative_to(page.folder.resolve()) for one in served)
    assert page.get(f"/gradio_api/file={served[0]}")[0] == 200


def test_a_new_conversation_is_begun_at_once_and_messages_wait_in_the_queue(page: Page) -> None:
    """Buttons that are not queued go another way, which messages cannot take past the limit of users."""

    def run(event: str, data: list[Any]) -> tuple[int, Any]:
        found = [one for one in page.config["dependencies"] if any(target[1] == event for target in one["targets"])]
        body = json.dumps({"fn_index": found[-1]["id"], "data": data, "session_hash": "run"}).encode()
        status, answer, _ = page.get("/gradio_api/run/predict", body, **{"Content-Type": "application/json"})
        return status, json.loads(answer)

    status, answer = run("click", [None])  # the last button
    assert status == 200 and answer["data"][0] == []
    assert run("submit", [{"text": "a", "files": []}, [], None, 1.0, 1.0, 1.0, 0.5, 0])[0] >= 400


def test_messages_that_name_files_of_the_server_are_refused(page: Page, tmp_path: Path, image: Any) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(image(0).file)
    for number, path in enumerate((str(outside), "/etc/passwd", f"{page.folder}/../../etc/passwd")):
        events = page.ask("look", [path], f"outside{number}")
        (last,) = (event for event in events if event["msg"] == "process_completed")
        assert not last["success"] or last["output"]["data"][0] == [], path


def test_what_cannot_be_used_is_said_on_the_page(page: Page, sound: Any) -> None:
    _, (path,) = page.upload("long.flac", sound(0, 6000).file)
    messages, notice = shown(page.ask("listen", [path], "long"))
    assert messages == [] and "at most 0 s" in notice.replace("0.5", "0") and "<span>" in notice
    _, (path,) = page.upload("fake.png", b"not a picture")
    assert "undecodable_image" in shown(page.ask("look", [path], "fake"))[1]
