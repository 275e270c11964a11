"""Steps that are not taken: they leave no trace in weights and momenta, are written down, and too many of them end the run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from attempts import Workbench, assert_same_run, checkpoint, is_same, losses, make_bench

from pile_app.training.checkpoints import choose_checkpoint, find_damage, range_to_skip
from pile_app.training.guards import GuardConfig, find_not_finite

DIVERGED = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("guards"))


def rejected(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]


def test_step_that_is_no_number_leaves_weights_and_momenta_as_they_were(bench: Workbench) -> None:
    bench.train("one", "--checkpoint_every", "1", "--trainer.max_steps", "8", POISON="7 7 0")
    before, after = checkpoint(bench.run("one"), "previous"), checkpoint(bench.run("one"))
    assert (before["global_step"], after["global_step"]) == (7, 8)
    assert is_same(before["state_dict"], after["state_dict"])
    moved, kept = after["optimizer_states"][0], before["optimizer_states"][0]
    assert is_same(moved["state"], kept["state"])
    assert not is_same(moved["param_groups"], kept["param_groups"])  # the schedule advances
    (entry,) = rejected(bench.run("one"))
    assert entry["step"] == 8 and entry["positions"] == [28, 29, 30, 31]
    assert {source for source, *_ in entry["documents"]} <= {"media", "prose"} and len(entry["documents"]) > 4
    assert losses(bench.run("one"))[7]["rejected/loss_not_finite"] == "1.0"


def test_run_that_rejects_steps_resumes_exactly(bench: Workbench) -> None:
    bench.train("unbroken", POISON="7 7 0")
    assert bench.start("killed", POISON="7 7 0", KILL_AT="8").wait() == -9
    bench.train("killed", POISON="7 7 0")
    assert_same_run(bench.run("killed"), bench.run("unbroken"))
    assert rejected(bench.run("killed")) == rejected(bench.run("unbroken"))


def test_too_many_rejected_steps_stop_the_run_and_their_data_can_be_passed_over(bench: Workbench) -> None:
    """Equal to a run that skipped them from the start."""
    words = ("--guard.max_rejected", "1", "--guard.rewind_steps", "1")
    attempt = bench.start("by-hand", *words, POISON="7 8 0")
    assert attempt.wait() == DIVERGED, attempt.text[-3000:]
    assert "to 9 could not be taken (loss not finite" in attempt.text and "--guard.skip_steps '[[7, 9]]'" in attempt.text
    assert "Traceback" not in attempt.text
    saved = checkpoint(bench.run("by-hand"))
    assert saved["global_step"] == 6
    assert find_not_finite({name: saved[name] for name in ("state_dict", "optimizer_states")}) == ""
    bench.train("by-hand", *words, "--guard.skip_steps", "[[7, 9]]", POISON="7 8 0")
    bench.train("from-the-start", *words, "--guard.skip_steps", "[[7, 9]]")
    assert_same_run(bench.run("by-hand"), bench.run("from-the-start"))
    assert [entry["reason"] for entry in rejected(bench.run("by-hand"))] == ["passed over"] * 3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_rejected": -1}, "guard.max_rejected=-1"),
        ({"skip_steps": ((5, 4),)}, "[5, 4]"),
    ],
)
def test_guard_that_cannot_be_is_refused_by_name(values: dict, named: str) -> None:
    with pytest.raises(ValueError, match="guard") as caught:
        GuardConfig(**values)
    assert named in str(caught.value)


def test_what_is_not_finite_is_found_by_name() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("inf")])
    assert find_not_finite({"a": good, "b": [{"c": 1, "d": torch.arange(2)}]}) == ""
    assert find_not_finite({"a": good, "b": [{"c": 1, "d": bad}]}) == "b.0.d"


# -- Which checkpoint a run resumes from.


def save(folder: Path, name: str, step: int, skip_steps: list[list[int]] | None = None) -> Path:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(50, 40, generator=generator), "b": torch.randn(7, generator=generator)}
    state = {"StepGuard": {"skip_steps": skip_steps or []}}
    folder.mkdir(exist_ok=True)
    torch.save({"global_step": step, "state_dict": weights, "callbacks": state}, folder / name)
    return folder / name


def test_every_damage_to_a_checkpoint_is_found_or_harmless(tmp_path: Path) -> None:
    path = save(tmp_path, "last.ckpt", 6)
    content, draw = path.read_bytes(), random.Random(0)
    whole = torch.load(path, weights_only=True)
    assert find_damage(path) == ""
    flipped = 0
    for _ in range(200):
        broken, place = bytearray(content), draw.randrange(len(content))
        broken[place] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        if find_damage(path):
            flipped += 1
        else:
            assert is_same(torch.load(path, weights_only=True), whole)  # in what pads the archive
    assert flipped > 150
    for place in draw.sample(range(len(content)), 50):
        path.write_bytes(content[:place])
        assert find_damage(path)
        path.write_bytes(content[:place] + bytes(len(content) - place))
        assert find_damage(path)


def test_newest_readable_checkpoint_is_chosen_and_never_the_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_checkpoint(tmp_path, (), True) is None
    last, previous = save(tmp_path, "last.ckpt", 6), save(tmp_path, "previous.ckpt", 3)
    assert choose_checkpoint(tmp_path, (), True) == last
    last.write_bytes(last.read_bytes()[:1000])
    assert choose_checkpoint(tmp_path, (), True) == previous
    assert "cannot be read" in caplog.text and not last.exists() and (tmp_path / "aside.ckpt").exists()
    previous.write_bytes(b"")
    with pytest.raises(ValueError, match="No other checkpoint can be resumed from"):
        choose_checkpoint(tmp_path, (), True)


def test_range_to_pass_over_takes_the_run_back_before_it(tmp_path: Path) -> None:
    last, previous = save(tmp_path, "last.ckpt", 600), save(tmp_path, "previous.ckpt", 300)
    assert choose_checkpoint(tmp_path, ((601, 700),), False) == last
    assert choose_checkpoint(tmp_path, ((500, 700),), False) == previous
    with pytest.raises(ValueError, match="within or after guard"):
        choose_checkpoint(tmp_path, ((200, 250),), False)
    save(tmp_path, "last.ckpt", 600, [[200, 250]])
    assert choose_checkpoint(tmp_path, ((200, 250),), False) == last


def test_range_to_pass_over_leaves_a_checkpoint_to_begin_from(tmp_path: Path) -> None:
    assert range_to_skip(tmp_path, 40, 50, before=100) == (1, 50)
    save(tmp_path, "last.ckpt", 600), save(tmp_path, "previous.ckpt", 300)
    assert range_to_skip(tmp_path, 640, 650, before=100) == (540, 650)
    assert range_to_skip(tmp_path, 340, 350, before=100) == (301, 350)
    assert range_to_skip(tmp_path, 300, 350, before=100) is None
