"""Several processes train the same run as one: the same documents in the same steps, the same losses. They stop together."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attempts import (
    Workbench,
    assert_close_runs,
    assert_same_run,
    checkpoint,
    damage,
    documents,
    is_same,
    losses,
    make_bench,
)
from conftest import REPOSITORY
from mesh import clip_whole, clipped, make_blocks, moved_by_muon, on_mesh, save_from_mesh
from ports import free_port
from processes import surroundings

from pile_app.training import muon
from pile_app.training.callbacks import read_ledger
from pile_app.training.checkpoints import (
    find_damage,
    join_tensors,
    publish,
    read_checkpoint,
    remove_leftovers,
    split_tensors,
)
from pile_app.training.muon import Muon

FSDP2 = ("--trainer.strategy", "fsdp2")
TENSOR_PARALLEL = (
    *("--trainer.strategy", "pile_app.training.parallel.ShardedStrategy"),
    *("--trainer.strategy.tensor_parallel_size", "2"),
)


def train_on_two(bench: Workbench, name: str, *arguments: str) -> list[str]:
    return [rank.succeed() for rank in bench.start_ranks(name, *arguments)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With `one`, a run of one process in micro-batches of 2, and `two`, the same on two processes."""
    bench = make_bench(tmp_path_factory.mktemp("distributed"))
    bench.train("one", "--data.micro_batch", "2")
    assert not any("sync_dist" in said for said in train_on_two(bench, "two"))
    return bench


def test_two_processes_read_what_one_reads_and_lose_what_one_loses(bench: Workbench) -> None:
    one, two = documents(bench.run("one")), documents(bench.run("two"))
    assert len(one) == 14 and all(one.values())
    assert one == two
    assert_close_runs(bench.run("two"), bench.run("one"))


def test_damaged_checkpoint_is_found_by_one_process_and_both_resume_from_the_one_before(bench: Workbench) -> None:
    shutil.copytree(bench.run("two"), bench.run("damaged"))
    last = bench.run("damaged") / "checkpoints" / "last.ckpt"
    damage(last)
    first, second = train_on_two(bench, "damaged", "--trainer.max_steps", "15", "--model.optimizer.schedule", "constant")
    assert "the checksum of" in first and "previous.ckpt, step 12" in first and "the checksum of" not in second
    assert checkpoint(bench.run("damaged"))["global_step"] == 15 and (last.parent / "aside.ckpt").exists()
    assert len(documents(bench.run("damaged"))) == 15


def test_run_killed_on_two_processes_goes_on_with_one(bench: Workbench) -> None:
    ranks = bench.start_ranks("shrunk", KILL_AT="8")
    assert ranks[0].wait() == -9
    ranks[1].process.kill()  # it may wait for the other one for half an hour
    assert checkpoint(bench.run("shrunk"))["global_step"] == 6
    bench.train("shrunk", "--data.micro_batch", "2")
    assert documents(bench.run("shrunk")) == documents(bench.run("one"))
    assert_close_runs(bench.run("shrunk"), bench.run("one"))


def test_sigterm_to_one_process_stops_both_and_the_run_resumes_exactly(bench: Workbench) -> None:
    ranks = bench.start_ranks("stopped", STOP_AT="6")
    assert [rank.wait(30) for rank in ranks] == [143, 0]
    assert checkpoint(bench.run("stopped"))["global_step"] == 8
    train_on_two(bench, "stopped")
    assert_same_run(bench.run("stopped"), bench.run("two"))


def test_loss_that_is_no_number_on_one_process_is_rejected_by_both(bench: Workbench) -> None:
    words = ("--checkpoint_every", "1", "--trainer.max_steps", "9", "--trainer.val_check_interval", "100")
    ranks = bench.start_ranks("poisoned", *words, POISON="8 8 1")
    assert [rank.wait(30) for rank in ranks] == [0, 0]
    before, after = checkpoint(bench.run("poisoned"), "previous"), checkpoint(bench.run("poisoned"))
    assert is_same(before["state_dict"], after["state_dict"])
    entries = [json.loads(line) for line in (bench.run("poisoned") / "rejected.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [9, 9]
    assert sorted(position for entry in entries for position in entry["positions"]) == [32, 33, 34, 35]


def test_model_without_media_trains_on_two_processes(bench: Workbench) -> None:
    """Its empty tables have gradients that nothing would produce."""
    sources = f"{{prose: {{train: '{bench.shards}/prose-train-*.tar'}}}}"
    arguments = ("--model.image", "null", "--model.audio", "null", "--data.sources", sources, "--trainer.max_steps", "3")
    train_on_two(bench, "text", *arguments)
    bench.train("text-one", *arguments, "--data.micro_batch", "2")
    assert_close_runs(bench.run("text"), bench.run("text-one"))


def test_train_py_starts_its_processes_and_torchrun_resumes_the_run(bench: Workbench) -> None:
    arguments = ["train.py", "--config", str(bench.config), "--name", "launched", "--runs", str(bench.folder / "runs")]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = os.environ | surroundings()
    command = [sys.executable, str(REPOSITORY / "tests" / arguments[0]), *arguments[1:]]
    stopped = subprocess.run(command, cwd=bench.folder, env=environment | {"STOP_AT": "6"}, capture_output=True, text=True)
    assert stopped.returncode == 143, stopped.stderr[-4000:]
    assert checkpoint(bench.run("launched"))["global_step"] == 8
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run([*torchrun, *command[1:]], cwd=bench.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(losses(bench.run("launched"))) >= 14
    assert_same_run(bench.run("launched"), bench.run("two"))


def test_fsdp2_loses_what_one_process_loses(bench: Workbench) -> None:
    """Codecs' phase, batches without a medium, validation, Muon and clipping on parts of matrices."""
    train_on_two(bench, "fsdp2", *FSDP2)
    assert documents(bench.run("fsdp2")) == documents(bench.run("one"))
    assert_close_runs(bench.run("fsdp2"), bench.run("one"), 1e-4)


def test_tensor_parallel_loses_what_one_process_loses(bench: Workbench) -> None:
    """Both processes train on the same packs, each with half of the heads."""
    train_on_two(bench, "tensor", *TENSOR_PARALLEL, "--data.micro_batch", "2")
    assert documents(bench.run("tensor")) == documents(bench.run("one"))
    assert_close_runs(bench.run("tensor"), bench.run("one"), 1e-4)


def test_run_moves_from_ddp_to_fsdp2_to_one_process(bench: Workbench) -> None:
    for strategy, step in (((), 4), (FSDP2, 9)):
        ranks = bench.start_ranks("moved", *strategy, STOP_AT=str(step - 2))
        assert [rank.wait() for rank in ranks] == [143, 0], ranks[0].text[-4000:]
        saved = read_checkpoint(bench.run("moved") / "checkpoints" / "last.ckpt")
        assert saved["global_step"] == step
    bench.train("moved", "--data.micro_batch", "2")
    folder = bench.run("moved") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"], "files, no parts"
    assert documents(bench.run("moved")) == documents(bench.run("one"))
    assert_close_runs(bench.run("moved"), bench.run("one"), 1e-4)


def test_kill_between_checkpoints_in_parts_leaves_a_whole_one(bench: Workbench) -> None:
    every_step = (*FSDP2, "--checkpoint_every", "1")
    ranks = bench.start_ranks("torn", *every_step, KILL_AT="8")
    assert ranks[0].wait() == -9
    ranks[1].process.kill()
    step = read_checkpoint(bench.run("torn") / "checkpoints" / "last.ckpt")["global_step"]
    assert step in (7, 8, 9), "that of step 9 was being written, by a thread"
    train_on_two(bench, "torn", *every_step)
    assert documents(bench.run("torn")) == documents(bench.run("one"))
    assert_close_runs(bench.run("torn"), bench.run("one"), 1e-4)


@pytest.mark.parametrize("strategy", [(), FSDP2])
def test_device_that_has_nothing_left_to_read_does_not_stop_the_others(bench: Workbench, strategy: tuple[str, ...]) -> None:
    """The last step holds one pack, and three empty ones: two for the second process."""
    shards = {name: f"{{train: '{bench.shards}/{name}-train-*.tar', weight: null}}" for name in ("media", "prose")}
    sources = f"{{media: {shards['media']}, prose: {shards['prose']}}}"
    words = ("--data.sources", sources, "--data.epochs", "0.1", "--trainer.max_steps", "-1", "--model.codec_steps", "0")
    name = "emptied-" + (strategy or ("", "ddp"))[1]
    train_on_two(bench, name, *strategy, *words)
    held = [bool(entry["documents"]) for entry in read_ledger(bench.run(name))]
    assert held == [True] * 9 + [False] * 3


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_muon_and_clipping_treat_parts_of_matrices_as_whole(bench: Workbench, tmp_path: Path, shape: tuple[int, int]) -> None:
    on_mesh(shape, save_from_mesh, tmp_path)
    moved, gradients = torch.load(tmp_path / "saved.pt")
    assert is_same(moved, moved_by_muon(make_blocks(), Muon)), "to the last bit"
    torch.testing.assert_close(gradients, clipped(make_blocks(), clip_whole), rtol=1e-6, atol=1e-6)


def test_muon_in_float32_is_torchs_but_for_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPUs that do not multiply bfloat16."""
    monkeypatch.setattr(muon, "compute_dtype", lambda device: torch.float32)
    exact, rounded = moved_by_muon(make_blocks(), Muon), moved_by_muon(make_blocks(), torch.optim.Muon)
    begin = dict(make_blocks().named_parameters())
    for name in exact:
        error = (exact[name] - rounded[name]).norm() / (exact[name] - begin[name]).norm().clamp_min(1e-9)
        assert error < 0.03, name
    assert not is_same(exact, rounded)


def save_parts(folder: Path, value: int) -> None:
    """A checkpoint of (3, 2) weights, whose rows two devices share."""
    folder.mkdir()
    torch.save({"global_step": value, "parts": 2}, folder / "meta.pt")
    whole = torch.arange(6).view(3, 2) + 10 * value
    for number, (first, stop) in enumerate(((0, 2), (2, 3))):
        torch.save({"state_dict/w": ((3, 2), (first, 0), whole[first:stop].clone())}, folder / f"part-{number}.pt")


def test_checkpoint_in_parts_is_the_old_one_until_the_new_one_is_complete(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "global_step": 0}, last)
    for value in (1, 2):
        save_parts(tmp_path / f".{value}.parts", value)
        assert read_checkpoint(last)["global_step"] == value - 1
        publish(tmp_path / f".{value}.parts", last)
        found = read_checkpoint(last)
        assert found["global_step"] == value and found["state_dict"]["w"].flatten().tolist() == [
            10 * value + n for n in range(6)
        ]
        assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == value - 1
    save_parts(tmp_path / ".3.parts", 3)  # a kill before it is published
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".1.parts", ".2.parts", "last.ckpt", "previous.ckpt"]
    assert not find_damage(last)
    part = tmp_path / ".2.parts" / "part-1.pt"
    content = bytearray(part.read_bytes())
    content[content.index(torch.tensor([24, 25]).numpy().tobytes())] ^= 1
    part.write_bytes(content)
    assert "checksum" in find_damage(last) and "state_dict/w" in find_damage(last, "weights") and not find_damage(last, "")
    part.write_bytes(content[:-1])
    assert find_damage(last, "")
    part.unlink()
    assert "part-1.pt" in find_damage(last, "")


def test_checkpoint_in_parts_runs_nothing_that_is_pickled(tmp_path: Path) -> None:
    save_parts(tmp_path / "parts", 1)
    torch.save({"state_dict/w": print}, tmp_path / "parts" / "part-1.pt")
    with pytest.raises(pickle.UnpicklingError, match="print"):
        read_checkpoint(tmp_path / "parts")


def test_optimizer_state_survives_being_taken_apart() -> None:
    state = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2)}, 3: {}}, "param_groups": [{"params": [0, 3]}]}
    tensors, rest = split_tensors({"state_dict": {"a/b.c": torch.ones(1)}, "optimizer_states": [state], "global_step": 4})
    assert sorted(tensors) == ["optimizer/0/exp_avg", "optimizer/0/step", "state_dict/a/b.c"]
    whole = join_tensors(tensors, rest)
    assert whole["global_step"] == 4 and whole["state_dict"].keys() == {"a/b.c"}
    assert whole["optimizer_states"][0]["state"][0].keys() == {"step", "exp_avg"}
    assert whole["optimizer_states"][0]["param_groups"] == [{"params": [0, 3]}]
