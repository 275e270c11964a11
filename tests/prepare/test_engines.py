"""`pile prepare` gives the same bytes by any engine, in any number of processes, and after a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pile_app.prepare import listing
from pile_app.prepare import pipeline as engine
from tests.prepare.test_pipeline import content, image, rejected, sound, write

STEPS: dict[str, Any] = {"validation_share": 0.2, "shard_megabytes": 0.3, "near_duplicates": 0.8, "repair": True}
UNIT_BYTES = 20_000


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "UNIT_BYTES", UNIT_BYTES)
    monkeypatch.setattr(listing, "ITEM_BYTES", UNIT_BYTES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = [f"w{number}" for number in range(3000)]
    many = [" ".join(words[number * 7 % 2900 :][: 20 + number % 60]) for number in range(1500)]
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "A" if len(text) % 3 else "B"}}) for text in many]
    media = {f"{number}.png": image(number) for number in range(20)} | {f"{number}.flac": sound(number) for number in range(5)}
    return write(tmp_path / "in", {"a.jsonl": "\n".join(lines), "same.txt": many[0], "bad.png": b"bad"} | media)


def test_processes_and_ray_give_the_same_bytes(
    tmp_path: Path, folder: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "UNIT_BYTES", 100_000)
    ways: dict[str, dict[str, Any]] = {
        "one": {"processes": 1},
        "two": {"processes": 2},
        "ray": {"engine": "ray", "processes": 2},
    }
    for name, way in ways.items():
        summary = engine.prepare(folder, tmp_path / name, **way, **STEPS)
        assert {"near_duplicate", "duplicate", "undecodable_image"} <= summary.rejected.keys()
    one = content(tmp_path / "one")
    assert len([name for name in one if name.endswith(".tar")]) > 4
    assert one == content(tmp_path / "two") == content(tmp_path / "ray")
    assert not list(tmp_path.glob("*.partial"))


KILLED = """
import sys, pathlib
from pile_app.prepare import listing, pipeline
if __name__ == "__main__":
    pipeline.UNIT_BYTES = listing.ITEM_BYTES = {unit_bytes}
    pipeline.prepare(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), processes={processes}, **{steps})
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_continues_to_the_same_bytes(
    tmp_path: Path, folder: Path, small_units: None, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(unit_bytes=UNIT_BYTES, processes=processes, steps=STEPS))
    child = subprocess.Popen([sys.executable, str(script), str(folder), str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out.partial" / "spill").glob("*/*2.safetensors")):
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"out\.partial.*differs in near_duplicates"):
        engine.prepare(folder, tmp_path / "out", processes=1, **STEPS | {"near_duplicates": 0.7})
    engine.prepare(folder, tmp_path / "out", processes=1, **STEPS)
    assert "units are done" in capsys.readouterr().err
    engine.prepare(folder, tmp_path / "whole", processes=1, **STEPS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_changed_input_is_noticed_and_can_be_started_anew(
    tmp_path: Path, folder: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pile_app.prepare.pipeline.Shards", full)
        with pytest.raises(OSError, match="no space"):
            engine.prepare(folder, tmp_path / "out", processes=1, **STEPS)
    write(folder, {"new.txt": "one more"})
    with pytest.raises(ValueError, match=r"differs in files of the input.*--overwrite"):
        engine.prepare(folder, tmp_path / "out", processes=1, **STEPS)
    engine.prepare(folder, tmp_path / "out", processes=1, overwrite=True, **STEPS)
    engine.prepare(folder, tmp_path / "whole", processes=1, **STEPS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_evaluation_texts_are_kept_out(tmp_path: Path) -> None:
    question = "a train leaves the station at noon and meets another one after three hours"
    write(tmp_path, {"test.jsonl": json.dumps({"question": question})})
    folder = write(tmp_path / "in", {"a.txt": f"As asked: {question.upper()}!", "b.txt": "a train leaves the station"})
    steps = {"decontaminate": [str(tmp_path / "test.jsonl")], "processes": 1}
    engine.prepare(folder, tmp_path / "out", **steps)
    assert rejected(tmp_path / "out") == {"a.txt": "contaminated"}
