"""What `train.py` does: read and check the configuration, build, train or resume, evaluate, report.

The configuration is LightningCLI's: `conf/default.yaml`, then each `--config`, then single values from the command line. What
cannot be is refused before data or model are built.
"""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any, Literal

# Lightning's own advice on its internals, of no use to whoever trains a model.
warnings.filterwarnings("ignore", message=".*(isinstance\\(treespec, LeafSpec\\)|num_workers|Checkpoint directory).*")
warnings.filterwarnings("ignore", message=".*not resumable.*")
warnings.filterwarnings("ignore", message=".*(`_get_vocab|srun|tensorboardX|Trainer\\(log_every_n_steps|torch.jit.script).*")

from jsonargparse import Namespace  # noqa: E402
from lightning.pytorch import Callback, Trainer, seed_everything  # noqa: E402, F401
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402

from pile_app.data.datamodule import PileDataModule, Source, check_data  # noqa: E402
from pile_app.model.backbones import Transformer  # noqa: E402
from pile_app.model.codecs import AudioCodecConfig, ImageCodecConfig  # noqa: E402
from pile_app.model.fused import make_vocabulary  # noqa: E402
from pile_app.training.guards import DivergedError, GuardConfig  # noqa: E402
from pile_app.training.module import PileModule  # noqa: E402
from pile_app.training.muon import cpu_multiplies_bfloat16  # noqa: E402
from pile_app.training.sharded import read_checkpoint  # noqa: E402
from pile_app.training.strategy import ShardedStrategy  # noqa: E402, F401 (registers `fsdp2`)

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "val_check_interval": 500,
    "check_val_every_n_epoch": None,
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # the data module shares out each step itself
}


class PileCLI(LightningCLI):
    """LightningCLI plus the run folder: `--name`, `--runs`, `--checkpoint_every`, `--wandb`, `--ledger`, `--guard`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="name of the run; naming an existing run resumes it")
        parser.add_argument("--runs", type=str, default="runs", help="folder that holds the runs")
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=500,
            help="optimizer steps between checkpoints (last.ckpt and previous.ckpt)",
        )
        parser.add_argument(
            "--monitor", type=str, default="validation/loss", help="metric that best.ckpt is the best by, see metrics.csv"
        )
        parser.add_argument("--monitor_mode", type=Literal["min", "max"], default="min", help="which values of it are better")
        parser.add_argument("--wandb", type=str | None, default="pile", help="project in Weights & Biases; null: none")
        parser.add_argument(
            "--ledger", type=bool, default=False, help="write down the documents of every optimizer step, in runs/<name>/ledger"
        )
        parser.add_argument("--guard", type=GuardConfig, default=GuardConfig(), help="optimizer steps that are not taken")
        link_model_to_data(parser)

    @property
    def run_folder(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def before_instantiate_classes(self) -> None:
        from pile_app.training.resume import choose_checkpoint, read_skipped
        from pile_app.training.run import check_writable, completed_steps

        is_first = is_first_process()
        try:
            check_config(self.config)
            if is_first:
                check_writable(self.run_folder)
            self.config.guard.skip_steps = tuple(
                sorted({tuple(one) for one in (*self.config.guard.skip_steps, *read_skipped(self.run_folder))})
            )
            self.checkpoint = choose_checkpoint(self.run_folder / "checkpoints", self.config.guard.skip_steps, is_first)
        except (ValueError, OSError) as error:
            self.parser.error(str(error))
        steps = completed_steps(self.run_folder, self.config.trainer.max_steps, self.config.data.epochs)
        if steps is not None:
            if is_first:
                print(
                    f"{self.run_folder} is complete ({steps} steps): open {self.run_folder / 'report.html'}; to train longer "
                    "raise trainer.max_steps, or choose another --name"
                )
            raise SystemExit

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        from pile_app.training.callbacks import DataReport, Ledger, PileProgressBar, Throughput
        from pile_app.training.checkpoints import DurableCheckpointIO, ExactResume, GracefulStop, LastCheckpoint
        from pile_app.training.guards import StepGuard
        from pile_app.training.run import RunFolder, make_loggers

        run = self.run_folder
        config = self.parser.dump(self.config, skip_link_targets=True, skip_none=False)
        self.run = RunFolder(run, config)
        self.stop = GracefulStop()
        callbacks: list[Callback] = [
            # First: where ranks then agree on something in this step, all have written theirs before any saves a checkpoint.
            *([Ledger(run)] if self.config.ledger else []),
            ExactResume(),
            self.stop,
            self.run,
            StepGuard(run, GuardConfig(**vars(self.config.guard)), self.stop),
            DataReport(run, self.config.data.max_rejected_share),
            Throughput(),
            PileProgressBar(),
            LearningRateMonitor("step"),
            ModelCheckpoint(
                run / "checkpoints",
                filename="best",
                monitor=self.config.monitor,
                mode=self.config.monitor_mode,
                save_top_k=1,
                enable_version_counter=False,
            ),
            LastCheckpoint(run / "checkpoints", self.config.checkpoint_every),  # after the best one, whose score it keeps
        ]
        if self.config.trainer.fast_dev_run:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        chosen = {
            "callbacks": [*callbacks, *(self.config_init.trainer.callbacks or [])],
            "default_root_dir": str(run),
            "plugins": [DurableCheckpointIO(), *(self.config_init.trainer.plugins or [])],
        }
        if self.config.trainer.precision is None:
            chosen["precision"] = fast_precision(self.config.trainer.accelerator)
        if self.config.trainer.logger is None:
            chosen["logger"] = make_loggers(run, self.config.wandb)
        return self._instantiate_trainer({**self.config_init.trainer, **chosen}, [])


def fast_precision(accelerator: Any) -> str:
    """bf16-mixed (weights stay float32) where the hardware multiplies bfloat16, for the demo a third faster; else 32-true."""
    import torch

    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_multiplies_bfloat16() else "32-true"


def link_model_to_data(parser: LightningArgumentParser) -> None:
    parser.link_arguments("model.vocabulary", "data.vocabulary", apply_on="instantiate")
    parser.link_arguments("model.tokenizer", "data.tokenizer", apply_on="instantiate")
    parser.link_arguments("model.annotator", "data.annotator", apply_on="instantiate")


def make_model_parser() -> LightningArgumentParser:
    """Of `model` and `data` alone, as training has them, for what uses a run without training it (see `load.py`)."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(PileModule, "model")
    parser.add_lightning_class_args(PileDataModule, "data")
    link_model_to_data(parser)
    return parser


def check_config(config: Namespace) -> None:
    """Raises ValueError for values that cannot be, alone or together; builds nothing."""
    model, data = config.model, config.data
    image = ImageCodecConfig(**vars(model.image)) if model.image else None
    audio = AudioCodecConfig(**vars(model.audio)) if model.audio else None
    vocabulary = make_vocabulary(256, "bytes", image, audio)
    if model.backbone.class_path.rsplit(".", 1)[-1] == "Transformer":
        sizes = model.backbone.init_args
        Transformer.check(sizes.width, sizes.heads, sizes.key_value_heads)
    sources = {name: Source(**vars(source)) for name, source in data.sources.items()}
    check_data(sources, data)
    if image and vocabulary.image_tokens + 3 > data.context:
        raise ValueError(
            f"data.context={data.context} is shorter than an image: model.image takes {vocabulary.image_tokens} codes "
            f"(size {image.size}, patch {image.patch}) and 3 more tokens"
        )
    if config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={config.checkpoint_every} must be at least 1 optimizer step")
    in_epochs = data.epochs is not None or any(source.epochs is not None for source in sources.values())
    if not in_epochs and config.trainer.max_steps < 0:
        raise ValueError("how long to train? Set trainer.max_steps (optimizer steps) or data.epochs (passes over the data)")


CLI_OPTIONS: dict[str, Any] = {
    "save_config_callback": None,
    "seed_everything_default": 0,
    "trainer_defaults": TRAINER_DEFAULTS,
    "parser_kwargs": {"default_config_files": ["conf/default.yaml"], "description": __doc__},
    "auto_configure_optimizers": False,
    "run": False,
}


class _ParsingCLI(PileCLI):
    """Reads and checks the configuration as training does, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        check_config(self.config)

    def instantiate_classes(self) -> None:
        pass


def parse_config(arguments: list[str]) -> Namespace:
    """The configuration that training would have with these arguments.

    Raises:
        ValueError: values that cannot be together. (For what does not parse the process ends with exit code 2.)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        cli = _ParsingCLI(PileModule, PileDataModule, **{**CLI_OPTIONS, "seed_everything_default": False}, args=arguments)
    return cli.config


DIVERGED = 3  # exit code: the same command would come to the same end


def main(arguments: list[str] | None = None) -> None:
    """Trains. `arguments`: None takes the command line's.

    Raises:
        SystemExit: 143 or 138 after SIGTERM or SIGUSR1, with a checkpoint (run the same command again); 3 where too many
            steps in a row could not be taken (do not, before something is changed); 2 for a configuration that cannot be.
    """
    while not train(arguments):
        gc.collect()  # the model that went astray is held by cycles, and its place on the device is needed


def train(arguments: list[str] | None) -> bool:
    """One attempt: False where the run goes back to a checkpoint, and has to begin once more."""
    from pile_app.training.checkpoints import StoppedInValidation
    from pile_app.training.run import keep_freed_memory

    cli = PileCLI(PileModule, PileDataModule, **CLI_OPTIONS, args=arguments)
    if cli.trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    try:
        cli.trainer.fit(
            cli.model, datamodule=cli.datamodule, ckpt_path=str(cli.checkpoint) if cli.checkpoint else None, weights_only=True
        )
    except StoppedInValidation:
        pass
    except DivergedError as error:
        return go_back(cli, error)
    if cli.stop.stopped:
        # Only the first one says so: Lightning kills all processes that are left when one that it started fails.
        raise SystemExit(128 + (cli.stop.received or 15) if cli.trainer.is_global_zero else 0)
    finish(cli)
    return True


def go_back(cli: PileCLI, error: DivergedError) -> bool:
    """False where the run shall pass over the steps that were rejected, which is then written down; else it ends here."""
    from pile_app.training.resume import add_skipped, range_to_skip, read_skipped

    guard, run, strategy = cli.config.guard, cli.run_folder, cli.trainer.strategy
    skipped = range_to_skip(run / "checkpoints", error.first, error.last, guard.rewind_steps)
    goes_back = skipped is not None and len(read_skipped(run)) < guard.rewinds
    strategy.barrier("went astray")  # all have read what is there
    if cli.trainer.is_global_zero:
        print(f"{run}: {error}", flush=True)
        if skipped is None:
            print(
                "Every checkpoint is from after the first of them. Lower the learning rate, or begin anew with another --name"
            )
        elif goes_back:
            add_skipped(run, *skipped)
            print(f"Going back to pass over steps {skipped[0]} to {skipped[1]}", flush=True)
        else:
            ranges = [list(one) for one in (*guard.skip_steps, skipped)]
            print(
                "Lower the learning rate, or go back and pass over those data: the same command with "
                f"--guard.skip_steps '{ranges}' (--guard.rewinds 3 would have done that by itself, three times)"
            )
    strategy.barrier("written down")
    if goes_back:
        import wandb

        cli.stop.teardown(cli.trainer, cli.model, "fit")  # Lightning leaves that out after an exception

        if wandb.run is not None:
            wandb.finish()  # the next attempt goes on with it
        return False
    raise SystemExit(DIVERGED if cli.trainer.is_global_zero else 0)


def is_first_process() -> bool:
    """Of all, as far as launchers have said it: torchrun, SLURM, Lightning for the processes that it starts."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def finish(cli: PileCLI) -> None:
    """The last validation, the evaluations the config asks for, `summary.json` and `report.html`."""
    from pile_app.tasks.cross_modal import EvaluateCrossModal
    from pile_app.training.report import write_report

    trainer, module = cli.trainer, cli.model
    figures: dict[str, Any] = {}
    best = cli.run_folder / "checkpoints" / "best.ckpt"
    if module.objective is not None and best.exists():  # with little data, the last weights are seldom those to use
        module.load_state_dict(read_checkpoint(best)["state_dict"])
        print(f"{cli.run_folder}: the figures are those of best.ckpt, by {cli.config.monitor}")
    metrics = trainer.validate(module, datamodule=cli.datamodule, verbose=False)
    for name, value in (metrics[0] if metrics else {}).items():
        figures[name.removeprefix("validation/").replace("source/", "")] = value
    whole = module.whole_model()
    if whole is None:
        return
    module.model = whole
    module.to(trainer.strategy.root_device)
    if module.objective is not None:
        figures |= module.objective.report(cli.run_folder)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EvaluateCrossModal):
            figures |= callback.evaluate(trainer, module)
    cli.run.write_summary(trainer, module, figures)
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{k}": v for k, v in figures.items() if isinstance(v, float)}, step=trainer.global_step)
        logger.save()
    report = write_report(cli.run_folder)
    print(f"\n{cli.run_folder} is complete: open {report}")
