"""Checkpoints are read as far as needed, models are built as far as a device holds them, private parts are pinned."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TinyRun
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy
from mesh import on_mesh, shard_on_mesh
from packaging.requirements import Requirement

from pile_app.training.load import load_run


def flip_bit(path: Path, tensor: torch.Tensor) -> None:
    """Damage a tensor in a checkpoint."""
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def test_inference_verifies_weights_and_reads_nothing_of_the_optimizer(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run.folder, tmp_path / "x")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("compile: false", "compile: true"))
    path = run / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    states = saved["optimizer_states"][0]["state"].values()
    flip_bit(path, max((t for state in states for t in state.values()), key=torch.numel))
    module, _, _ = load_run(run)
    assert all(torch.equal(tensor, saved["state_dict"][name]) for name, tensor in module.state_dict().items())
    assert not any(part._compiled_call_impl for part in module.modules()), "inference compiles only if asked"
    flip_bit(path, saved["state_dict"]["model.heads.0.weight"])
    with pytest.raises(ValueError, match=r"cannot be read.*checksum of model\.heads\.0\.weight differs"):
        load_run(run)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_a_device_holds_its_part_of_the_model_only(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Rank 1 draws no weights and gets its part of those of rank 0; asserts are in the processes."""
    on_mesh(shape, shard_on_mesh, tmp_path)


def test_private_attributes_of_lightning_are_there_and_it_is_pinned_below_its_next_version() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    used = {  # what Pile replaces, calls or sets
        trainer: ["_accelerator_connector", "_signal_connector"],
        trainer._signal_connector: ["register_signal_handlers"],
        trainer._accelerator_connector: ["use_distributed_sampler"],
        trainer.fit_loop.epoch_loop: ["_broadcast_sigterm_tensor"],
        LightningCLI: ["_instantiate_trainer"],
        ModelParallelStrategy(): ["_data_parallel_size"],
        CSVLogger("x"): ["_experiment"],
        ExperimentWriter: ["_check_log_dir_exists"],
    }
    assert all(hasattr(owner, name) for owner, names in used.items() for name in names)
    lines = (REPOSITORY / "pyproject.toml").read_text().splitlines()
    [line] = [line.strip(' ",') for line in lines if line.strip().startswith('"lightning[') and "==" not in line]
    import lightning

    major, minor, *_ = map(int, lightning.__version__.split(".")[:2])
    pinned = Requirement(line).specifier
    assert lightning.__version__ in pinned and f"{major}.{minor + 1}.0" not in pinned


def test_everything_is_imported_without_what_windows_lacks() -> None:
    script = (
        "import signal, sys; sys.modules.update(fcntl=None, resource=None); del signal.SIGUSR1\n"
        "import pile_app.cli, pile_app.training.cli, pile_app.training.report"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
