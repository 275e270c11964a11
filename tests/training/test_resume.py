"""The same command resumes a killed run bit for bit, or says why it cannot."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from attempts import Workbench, assert_same_run, checkpoint, damage, losses, make_bench
from conftest import prose_documents
from safetensors.torch import load_file

from pile_app.cli import main
from pile_app.data.shards import write_shards

KILLED, STOPPED = -9, 143


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """With `full` and `full-micro`, two undisturbed runs, and `part`, which was killed after its checkpoint of step 6."""
    bench = make_bench(tmp_path_factory.mktemp("resume"))
    bench.train("full")
    bench.train("full-micro", "--data.micro_batch", "2")
    assert bench.start("part", KILL_AT="7").wait() == KILLED
    return bench


@pytest.mark.parametrize("workers", [0, 2])
def test_run_killed_five_times_is_bit_identical(bench: Workbench, workers: int) -> None:
    name = f"killed-{workers}"
    for step in sorted(random.Random(workers).sample(range(14), 5)):
        assert bench.start(name, "--data.num_workers", str(workers), KILL_AT=str(step)).wait() == KILLED
    bench.train(name, "--data.num_workers", str(workers))
    assert_same_run(bench.run(name), bench.run("full"))


def test_run_with_discriminators_killed_five_times_is_bit_identical(bench: Workbench, tmp_path: Path) -> None:
    arguments = ("--model.codec_steps", "9", "--model.adversarial", "{start: 0.3, width: 4}", "--checkpoint_every", "2")
    bench.train("judged", *arguments)
    for step in (2, 4, 5, 8, 11):
        assert bench.start("judged-killed", *arguments, KILL_AT=str(step)).wait() == KILLED
    bench.train("judged-killed", *arguments)
    assert_same_run(bench.run("judged-killed"), bench.run("judged"))
    assert "train/audio_adversarial_loss" in losses(bench.run("judged"))[3]
    main(["export", str(bench.run("judged")), str(tmp_path / "out")])
    exported = load_file(tmp_path / "out" / "model.safetensors")
    trained = checkpoint(bench.run("judged"))["state_dict"]
    assert (
        {f"model.{name}" for name in exported}
        == {name for name in trained if not name.startswith("adversaries.")}
        < set(trained)
    )
    bench.train("judged-after", "--model.codecs_from", str(bench.run("judged")), "--model.codec_steps", "0")


def test_run_killed_between_accumulated_micro_batches_is_bit_identical(bench: Workbench) -> None:
    """A resumed run used to save again after its first micro-batch, over the checkpoint that it came from."""
    arguments = ("accumulated", "--data.micro_batch", "2")
    for micro_batch in (12, 13):  # after the checkpoint of step 6; then, resumed, after one whole micro-batch of step 7
        assert bench.start(*arguments, KILL_AT=str(micro_batch)).wait() == KILLED
        saved = checkpoint(bench.run("accumulated"))
        progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert (saved["global_step"], progress["ready"]) == (6, 12)
    bench.train(*arguments)
    assert_same_run(bench.run("accumulated"), bench.run("full-micro"))


def test_validation_due_with_a_checkpoint_is_not_skipped(bench: Workbench) -> None:
    arguments = ("--checkpoint_every", "5")
    assert bench.start("validated", *arguments, KILL_IN_VALIDATION="10").wait() == KILLED
    assert checkpoint(bench.run("validated"))["global_step"] == 5  # not 10: that checkpoint waits for its validation
    bench.train("validated", *arguments)
    assert_same_run(bench.run("validated"), bench.run("full"))


def test_last_checkpoint_knows_the_score_of_the_validation_before_it(bench: Workbench) -> None:
    """Or a resumed run would take a worse model for the best one."""
    assert bench.start("scored", "--checkpoint_every", "5", KILL_AT="11").wait() == KILLED
    saved = checkpoint(bench.run("scored"))
    state = next(state for key, state in saved["callbacks"].items() if key.startswith("BestCheckpoint"))
    assert saved["global_step"] == 10
    assert float(state["current_score"]) == pytest.approx(float(losses(bench.run("scored"))[9]["validation/loss"]))


@pytest.mark.parametrize(("like", "micro_batch", "stop_at"), [("full", "4", "6"), ("full-micro", "2", "14")])
def test_sigterm_finishes_the_step_and_resumes_exactly(bench: Workbench, like: str, micro_batch: str, stop_at: str) -> None:
    """Also where the loading workers get the signal, as under SLURM."""
    arguments = (f"stopped-{micro_batch}", "--data.micro_batch", micro_batch, "--data.num_workers", "2")
    attempt = bench.start(*arguments, STOP_AT=stop_at)
    assert attempt.wait(30) == STOPPED, attempt.text[-3000:]
    run = bench.run(arguments[0])
    assert checkpoint(run)["global_step"] == 8
    assert [step for step, row in losses(run).items() if "validation/loss" in row] == [4]  # and not once more for stopping
    assert not (run / "summary.json").exists()
    bench.train(*arguments)
    assert_same_run(run, bench.run(like))


def test_sigterm_in_a_validation_breaks_it_off_and_the_resumed_run_begins_it_again(bench: Workbench) -> None:
    """It may last longer than the time that is left."""
    arguments = ("unvalidated", "--data.micro_batch", "1", "--data.num_workers", "2")
    assert bench.start(*arguments, STOP_IN_VALIDATION="10").wait(30) == STOPPED
    run = bench.run("unvalidated")
    assert checkpoint(run)["global_step"] == 10
    assert [step for step, row in losses(run).items() if "validation/loss" in row] == [4]
    bench.train(*arguments)
    bench.train("validated-once", *arguments[1:])
    assert_same_run(run, bench.run("validated-once"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.backbone.init_args.width", "64"], "model.backbone.init_args.width was 32, now it is 64"),
        (["--model.backbone.init_args.heads", "4"], "model.backbone.init_args.heads was 2, now it is 4"),
        (["--model.backbone", "{class_path: MinGRU, init_args: {width: 32, layers: 2}}"], "was Transformer, now it is MinGRU"),
        (["--model.audio.sample_rate", "16000"], "model.audio.sample_rate was 8000, now it is 16000"),
        (["--model.optimizer.name", "adamw"], "model.optimizer.name was muon, now it is adamw"),
        (["--model.optimizer.name", "sgd"], "model.optimizer.name was muon, now it is sgd"),
        (["--seed_everything", "1"], "seed_everything was 0, now it is 1"),
        (["--trainer.max_steps", "5"], "has trained 6 steps"),
        (["--data.seed", "1"], "data.seed was 0, now it is 1"),
        (["--data.context", "120"], "data.context was 128, now it is 120"),
        (["--data.global_batch", "8"], "data.global_batch was 4, now it is 8"),
        (["--data.sources.prose.weight", "3"], "made with weights"),
    ],
)
def test_resume_with_another_config_is_refused_and_changes_nothing(
    bench: Workbench, arguments: list[str], message: str
) -> None:
    before = contents(bench.run("part"))
    attempt = bench.start("part", *arguments)
    assert attempt.wait() == 2
    assert message in attempt.text.splitlines()[-1] and "Traceback" not in attempt.text, attempt.text[-3000:]
    assert "--name" in attempt.text.splitlines()[-1]
    assert contents(bench.run("part")) == before


def test_settings_that_change_on_resume_are_followed(bench: Workbench) -> None:
    changed = ("--model.optimizer.learning_rate", "0.5", "--model.optimizer.weight_decay", "0.25")
    shutil.copytree(bench.run("part"), bench.run("changed"))
    bench.train("changed", *changed)
    [optimizer], [schedule] = (
        checkpoint(bench.run("changed"))["optimizer_states"],
        checkpoint(bench.run("changed"))["lr_schedulers"],
    )
    rates = {group["name"]: group["initial_lr"] for group in optimizer["param_groups"]}
    assert rates["tables"] == rates["heads"] == 0.5 and schedule["base_lrs"] == list(rates.values())
    assert {group["name"]: group["weight_decay"] for group in optimizer["param_groups"]}["tables"] == 0.25
    was, now = losses(bench.run("full")), losses(bench.run("changed"))
    assert was[6]["train/loss"] == now[6]["train/loss"] and was[7]["train/loss"] != now[7]["train/loss"]
    assert float(now[6]["lr-MuonAdamW/tables"]) == pytest.approx(float(was[6]["lr-MuonAdamW/tables"]) * 0.5 / 0.003)


def test_resume_over_other_shards_is_refused_by_name(bench: Workbench, tmp_path: Path) -> None:
    shutil.copytree(bench.shards, tmp_path / "shards")
    moved = Workbench(tmp_path, tmp_path / "shards")
    assert moved.start("run", KILL_AT="4").wait() == KILLED
    write_shards(prose_documents(61, "train"), tmp_path / "shards", "prose-train")
    before = contents(moved.run("run"))
    attempt = moved.start("run")
    assert attempt.wait() == 2
    error = attempt.text.splitlines()[-1]
    assert "made with fingerprints {'prose': '" in error and "media" not in error and "restore the shards" in error
    assert contents(moved.run("run")) == before


def test_full_disk_leaves_the_checkpoint_before(bench: Workbench) -> None:
    attempt = bench.start("disk", FILE_LIMIT="7 60000")
    assert attempt.wait() == 1
    error = attempt.text.split("OSError: ")[-1]
    assert "last.ckpt' could not be written" in error and "the checkpoint before it is whole" in error
    folder = bench.run("disk") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert checkpoint(bench.run("disk"))["global_step"] == 6
    bench.train("disk")
    assert_same_run(bench.run("disk"), bench.run("full"))


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(bench: Workbench) -> None:
    attempt = bench.start("poisoned", POISON_WEIGHTS="8")  # step 9 writes a checkpoint
    assert attempt.wait() == 1
    assert "after step 9 state_dict.model.backbone" in attempt.text.split("FloatingPointError: ")[-1]
    saved = checkpoint(bench.run("poisoned"))
    assert saved["global_step"] == 6
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_kill_within_the_write_of_a_checkpoint_leaves_the_one_before(bench: Workbench) -> None:
    attempt = bench.start("torn", KILL_IN_WRITE="7 60000")
    assert attempt.wait() == -signal.SIGXFSZ
    folder = bench.run("torn") / "checkpoints"
    assert any(path.name.endswith(".tmp") for path in folder.iterdir())
    assert checkpoint(bench.run("torn"))["global_step"] == 6
    bench.train("torn")
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert_same_run(bench.run("torn"), bench.run("full"))


def test_broken_last_checkpoint_falls_back_to_the_one_before_and_says_so(bench: Workbench) -> None:
    shutil.copytree(bench.run("part"), bench.run("broken"))
    last = bench.run("broken") / "checkpoints" / "last.ckpt"
    content = damage(last)
    said = bench.train("broken")
    assert "last.ckpt' cannot be read: the checksum of" in said and "previous.ckpt, step 3" in said
    assert (last.parent / "aside.ckpt").read_bytes() == content
    assert_same_run(bench.run("broken"), bench.run("full"))


def test_metrics_cut_off_by_a_kill_are_mended(bench: Workbench) -> None:
    shutil.copytree(bench.run("part"), bench.run("cut"))
    path = bench.run("cut") / "metrics.csv"
    path.write_text(path.read_text()[:-30])
    bench.train("cut")
    assert torch.equal(
        torch.tensor(sorted(losses(bench.run("cut")))), torch.tensor(sorted(losses(bench.run("full"))))
    )  # every step is there
    assert_same_run(bench.run("cut"), bench.run("full"))


def contents(run: Path) -> dict[str, bytes]:
    """File -> its content."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
