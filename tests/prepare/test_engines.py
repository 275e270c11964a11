"""`pile prepare` gives the same bytes by any engine, in any number of processes, and after a kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pile_app.prepare import pipeline
from tests.prepare.test_pipeline import content, image, lines, rejected, sound, write

STEPS: dict[str, Any] = {"shard_megabytes": 0.3, "near_duplicates": 0.8, "repair": True, "resample": 4000}
JOB_UNITS = 3


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "JOB_UNITS", JOB_UNITS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = [f"w{number}" for number in range(3000)]
    many = [" ".join(words[number * 7 % 2900 :][: 20 + number % 60]) for number in range(1500)]
    records = [{"text": text, "meta": {"pile_set_name": "A" if len(text) % 3 else "B"}} for text in many]
    tables = {f"{n:02d}.jsonl": lines(*records[50 * n : 50 * n + 50]) for n in range(30)}
    media = {f"photos/{n}.png": image(n) for n in range(20)} | {f"sounds/{n}.flac": sound(n) for n in range(5)}
    return write(tmp_path / "in", tables | media | {"same.txt": many[0], "photos/bad.png": b"bad"})


def test_processes_and_ray_give_the_same_bytes(tmp_path: Path, folder: Path, small_jobs: None) -> None:
    ways: dict[str, dict[str, Any]] = {
        "one": {"processes": 1},
        "two": {"processes": 2},
        "ray": {"engine": "ray", "processes": 2},
    }
    for name, way in ways.items():
        summary = pipeline.prepare(folder, tmp_path / name, **way, **STEPS)
        assert {"near_duplicate", "duplicate", "undecodable_image"} <= summary.rejected.keys()
        assert sorted(summary.sources) == ["a", "b", "in"]
    one = content(tmp_path / "one")
    assert len([name for name in one if name.endswith(".tar")]) > 4
    assert one == content(tmp_path / "two") == content(tmp_path / "ray")
    assert not list(tmp_path.glob("*.partial"))


KILLED = """
import sys, pathlib
from pile_app.prepare import pipeline
if __name__ == "__main__":
    pipeline.JOB_UNITS = {units}
    pipeline.prepare(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), processes={processes}, **{steps})
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_continues_to_the_same_bytes(
    tmp_path: Path, folder: Path, small_jobs: None, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(units=JOB_UNITS, processes=processes, steps=STEPS))
    child = subprocess.Popen([sys.executable, str(script), str(folder), str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.partial" / "spill").glob("*/*2.npz")):
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"out\.partial.*differs in near_duplicates"):
        pipeline.prepare(folder, tmp_path / "out", processes=1, **STEPS | {"near_duplicates": 0.7})
    pipeline.prepare(folder, tmp_path / "out", processes=1, **STEPS)
    assert "jobs are done" in capsys.readouterr().err
    pipeline.prepare(folder, tmp_path / "whole", processes=1, **STEPS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_changed_input_is_noticed_and_can_be_prepared_from_the_beginning(
    tmp_path: Path, folder: Path, small_jobs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_shards", full)
        with pytest.raises(OSError, match="no space"):
            pipeline.prepare(folder, tmp_path / "out", processes=1, **STEPS)
    write(folder, {"new.txt": "one more"})
    with pytest.raises(ValueError, match=r"differs in files of the input.*--overwrite"):
        pipeline.prepare(folder, tmp_path / "out", processes=1, **STEPS)
    pipeline.prepare(folder, tmp_path / "out", processes=1, overwrite=True, **STEPS)
    pipeline.prepare(folder, tmp_path / "whole", processes=1, **STEPS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_evaluation_texts_are_kept_out(tmp_path: Path) -> None:
    question = "a train leaves the station at noon and meets another one after three hours"
    write(tmp_path, {"test.jsonl": lines({"question": question})})
    folder = write(tmp_path / "in", {"a.txt": f"As asked: {question.upper()}!", "b.txt": "a train leaves the station"})
    steps = {"decontaminate": [str(tmp_path / "test.jsonl")], "processes": 1}
    pipeline.prepare(folder, tmp_path / "out", **steps)
    assert rejected(tmp_path / "out") == {"a.txt": "contaminated"}
