"""Weights & Biases: what `wandb sync` sends of offline runs, to a server that speaks as much of its protocol as that takes."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote, unquote

import pytest
import yaml
from attempts import Workbench, checkpoint, make_bench
from conftest import REPOSITORY, prose_documents
from processes import start

from pile_app.data.shards import write_shards
from pile_app.documents import Document, Segment
from pile_app.tasks.evaluate import save_figures
from pile_app.training.callbacks import write_samples

SHORT = ("--trainer.max_steps", "7", "--model.codec_steps", "1", "--checkpoint_every", "2", "--trainer.val_check_interval", "4")
SAMPLES = ("--trainer.callbacks+=pile_app.training.callbacks.SampleGeneration", "--trainer.callbacks.every_n_steps=3")
BRIEF = ("--trainer.callbacks.count=1", "--trainer.callbacks.sampling={max_text: 4, max_seconds: 0.2}")
OFFLINE = ("--wandb", "pile", *SHORT, *SAMPLES, *BRIEF)


class Server(ThreadingHTTPServer):
    """Keeps the lines of the history by their offsets, the config, the summary and the names of the files of one run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: list[dict[str, Any]] | None = None
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.files: set[str] = set()

    def handle_error(self, *_: Any) -> None:  # W&B closes connections that it kept open
        pass

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "1", "name": "pile", "internalId": "1", "entity": {"id": "2", "name": "me"}}
        bucket = {"id": "3", "name": variables.get("name"), "displayName": "x", "description": "", "sweepName": None}
        if operation == "UpsertBucket":
            self.config |= json.loads(variables.get("config") or "{}")
            self.summary |= json.loads(variables.get("summaryMetrics") or "{}")
            return {"upsertBucket": {"bucket": bucket | {"config": "{}", "project": project}, "inserted": self.history is None}}
        if operation == "RunResumeStatus":
            lines = self.history or []
            counts = {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0}
            text = {"summaryMetrics": json.dumps(self.summary), "historyTail": json.dumps([json.dumps(x) for x in lines[-1:]])}
            text |= {"eventsTail": "[]", "config": "{}", "wandbConfig": '{"t": 1}'}
            return {"model": project | {"bucket": None if self.history is None else bucket | counts | text | {"tags": []}}}
        if operation == "CreateRunFiles":
            here = f"http://127.0.0.1:{self.server_port}"
            urls = [{"name": name, "uploadUrl": f"{here}/{quote(name)}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": urls}}
        if operation == "CreateArtifact":
            there = {"id": "4", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "4"}}}
            return {"createArtifact": {"artifact": there}}
        return {"serverInfo": {"features": []}}


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.read()
        asked = json.loads(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        if self.path.endswith("file_stream"):
            files = asked.get("files") or {}
            if lines := files.get("wandb-history.jsonl"):
                self.server.history = (self.server.history or [])[: lines["offset"]] + list(map(json.loads, lines["content"]))
            if lines := files.get("wandb-summary.json"):
                self.server.summary |= json.loads(lines["content"][-1])
            self.reply({"exitcode": None, "limits": {}})
        else:
            self.reply({"data": self.server.answer(asked.get("operationName", ""), asked.get("variables", {}))})

    def do_PUT(self) -> None:
        self.read()
        self.server.files.add(unquote(self.path))
        self.reply({})

    def read(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("wandb"))


def sync(run: Path, server: Server) -> None:
    """`wandb sync` of all that is not synced yet, as docs/guide.md says."""
    environment = os.environ | {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40}
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, sorted((run / "wandb").glob("offline-run-*")))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=run)
    assert done.returncode == 0 and "Finished syncing" in done.stderr + done.stdout, done.stderr[-2000:]


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what metrics.csv holds."""
    rows: dict[int, dict[str, float]] = {}
    for row in csv.DictReader((run / "metrics.csv").open()):
        rows.setdefault(int(row.pop("step")), {}).update({name: float(value) for name, value in row.items() if value})
    return rows


def test_a_run_resumed_twice_has_each_step_once(bench: Workbench, server: Server, image: Callable[[int], Segment]) -> None:
    """A run is killed, which can truncate W&B's file; stopped and synced; finished, evaluated and synced again."""
    run = bench.run("watched")
    assert bench.start("watched", *OFFLINE, WANDB_MODE="offline", KILL_AT="3").wait() == -9
    assert bench.start("watched", *OFFLINE, WANDB_MODE="offline", STOP_AT="3").wait() == 143
    sync(run, server)
    stopped_after = checkpoint(run)["global_step"]
    assert server.history is not None and [line["_step"] for line in server.history] == list(range(stopped_after))
    drawn = ("image", Document(()), image(3), None)  # without a prompt
    write_samples(run / "samples" / "step-00000003", [drawn])
    bench.train("watched", *OFFLINE, WANDB_MODE="offline")
    with patch.dict(os.environ, WANDB_MODE="offline"):
        save_figures({}, {"text_loss": 1.5}, run / "evaluation.json", run, "pile")  # what `pile evaluate` does at its end
    sync(run, server)
    assert [line["_step"] for line in server.history] == list(range(8))
    expected = logged(run)
    for line in server.history:
        for name, value in expected[line["_step"]].items():
            assert line[name] == pytest.approx(value), (line["_step"], name)
    assert server.config["data"]["value"]["context"] == 128
    tables = {step for step, line in enumerate(server.history) for name in line if name.startswith("samples/")}
    assert tables == {2, 5, 6}
    kinds = {line[name]["_type"] for line in server.history for name in line if name.startswith("media/")}
    assert kinds == {"audio", "images/separated"}
    for suffix in (".table.json", ".png", ".wav"):
        assert any(name.endswith(suffix) for name in server.files)
    assert server.summary["final/text_bits_per_byte"] == pytest.approx(expected[7]["final/text_bits_per_byte"])
    assert server.summary["evaluation/text_loss"] == 1.5


def test_each_trial_of_a_sweep_is_a_run_of_its_own(tmp_path: Path) -> None:
    """`conf/sweep.yaml`: the commands that W&B's agent makes of it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    sweep = load_sweep_config(str(REPOSITORY / "conf" / "sweep.yaml"))
    assert sweep is not None and sweep["metric"]["name"] == "validation/loss"
    for split in ("train", "validation"):
        write_shards(prose_documents(20, split), tmp_path / "data/digits/shards", f"prose-{split}")
    small = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.global_batch=2", "--trainer.accelerator=cpu"]
    for trial, choose in {"first0": min, "second": max}.items():
        values = {name: {"value": choose(given.get("values") or (given["min"], given["max"]))}
                  for name, given in sweep["parameters"].items()}  # fmt: skip
        macros = {"${program}": [sweep["program"]], "${args}": create_sweep_command_args({"args": values})["args"]}
        words = [word for part in create_sweep_command(list(sweep["command"])) for word in macros.get(part, [part])]
        environment = {"WANDB_SWEEP_ID": "a", "WANDB_RUN_ID": trial, "WANDB_MODE": "offline"}
        start([*words, *small, "--samples=false"], tmp_path, **environment).succeed()
        run = tmp_path / "runs" / f"sweep-{trial}"
        assert list((run / "wandb").glob(f"offline-run-*-{trial}")) and "validation/loss" in (run / "metrics.csv").read_text()
        rate = yaml.safe_load((run / "config.yaml").read_text())["model"]["optimizer"]["learning_rate"]
        assert rate == values["model.optimizer.learning_rate"]["value"]
