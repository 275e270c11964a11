"""Training from the command line: read and check the configuration, build, train or resume, evaluate, report.

The configuration is LightningCLI's: `conf/default.yaml`, then each `--config`, then single values from the command line.
Invalid settings fail before data or model are built.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn

# Lightning's advice on its internals, which users cannot follow. (Logged values are already reduced over ranks.)
warnings.filterwarnings("ignore", message=".*(isinstance\\(treespec, LeafSpec\\)|num_workers|Checkpoint directory|sync_dist).*")
warnings.filterwarnings("ignore", message=".*not resumable.*")
warnings.filterwarnings(
    "ignore", message=".*(Total length of `list`|`_get_vocab|srun|tensorboardX|Trainer\\(log_every_n_steps|torch.jit.script).*"
)

logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: not str(record.msg).startswith(("💡 Tip", "GPU available: False", "TPU available: False"))
)

gc.disable()  # the imports make a million objects and no garbage: searching them took a quarter of the start

import torch  # noqa: E402
from jsonargparse import ArgumentError, Namespace  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything  # noqa: E402, F401
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

from pile_app.bundled import BUNDLED, find_configs  # noqa: E402
from pile_app.data.datamodule import PileDataModule, Source, check_data  # noqa: E402
from pile_app.data.tar import ShardError  # noqa: E402
from pile_app.model.backbones import Transformer  # noqa: E402
from pile_app.model.codec_configs import AudioCodecConfig, ImageCodecConfig  # noqa: E402
from pile_app.model.fused import make_vocabulary  # noqa: E402
from pile_app.model.pretrained_codecs import take_codecs  # noqa: E402
from pile_app.training import checkpoints  # noqa: E402
from pile_app.training.callbacks import DataReport, Ledger, PileProgressBar, SampleGeneration, Throughput  # noqa: E402
from pile_app.training.guards import DivergedError, GuardConfig, StepGuard  # noqa: E402
from pile_app.training.load import SkipInitialization, fast_precision, is_pretrained, link_model_to_data  # noqa: E402
from pile_app.training.module import PileModule  # noqa: E402
from pile_app.training.parallel import is_first_process  # noqa: E402 (and registers `fsdp2`)
from pile_app.training.run import RunFolder, begin, find_divergence, keep_freed_memory, make_loggers  # noqa: E402
from pile_app.training.wandb_run import close  # noqa: E402

REFUSED = 2  # exit code: the configuration is invalid
DIVERGED = 3  # exit code: the same command would end in the same way

gc.freeze()
gc.enable()

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


OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("name", str, "run", "name of the run; naming an existing run resumes it"),
    ("runs", str, "runs", "folder that holds the runs"),
    ("checkpoint_every", int, 500, "optimizer steps between checkpoints (last.ckpt and previous.ckpt)"),
    ("monitor", str, "validation/loss", "metric that best.ckpt is the best by, see metrics.csv"),
    ("monitor_mode", Literal["min", "max"], "min", "which values of it are better"),
    ("wandb", str | None, "pile", "project in Weights & Biases; null: none"),
    ("samples", bool, True, "write samples of every modality at each validation and at the end (see SampleGeneration)"),
    ("ledger", bool, False, "record the documents of every optimizer step, in runs/<name>/ledger"),
    ("guard", GuardConfig, GuardConfig(), "which optimizer steps are rejected"),
    ("open_weights", dict[str, Any], {}, "what a configuration sets otherwise where the backbone is HuggingFace"),
)


class PileCLI(LightningCLI):
    """LightningCLI with a run folder, `OPTIONS`, and a checked configuration."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, kind, default, text in OPTIONS:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        link_model_to_data(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lay `open_weights` over the configurations, under what the command line sets, where it applies."""
        super().parse_arguments(parser, args)
        if self.config.open_weights and is_pretrained(self.config.model.backbone):
            words = list(sys.argv[1:] if args is None else args)
            place = max((number for number, word in enumerate(words) if word.startswith("--config")), default=-1) + 1
            place += place > 0 and "=" not in words[place - 1]
            words[place:place] = ["--config", json.dumps(self.config.open_weights | {"open_weights": {}})]
            super().parse_arguments(parser, words)

    @property
    def run_folder(self) -> Path:
        return Path(self.scratch.name if self.config.trainer.fast_dev_run else self.config.runs) / self.config.name

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        default = find_default_config()
        sys.path.append(str(default.absolute().parents[1]))  # callbacks of `data/`
        return super().init_parser(default_config_files=[str(default)], **kwargs)

    def before_instantiate_classes(self) -> None:
        config, model = self.config, self.config.model
        if "WANDB_SWEEP_ID" in os.environ:  # each trial is a run of its own
            config.name += f"-{os.environ['WANDB_RUN_ID']}"
        self.dumped = self.parser.dump(config, skip_link_targets=True, skip_none=False)
        if not config.trainer.fast_dev_run and any((self.run_folder / "checkpoints").glob("*.ckpt")):
            take_codecs(model, self.run_folder)
        check_config(config)
        group = getattr(getattr(config.trainer.strategy, "init_args", None), "tensor_parallel_size", 1)
        PileDataModule.micro_batches(config.data, max(1, count_devices(config.trainer) // group))
        config.guard.skip_steps = tuple(sorted({tuple(one) for one in config.guard.skip_steps}))
        self.checkpoint: Path | None = None
        if config.trainer.fast_dev_run:
            self.scratch = TemporaryDirectory(prefix="pile-")
            self.run_folder.mkdir()
            # Both phases where there are steps for both.
            model.codec_steps = min(model.codec_steps, int(config.trainer.fast_dev_run) - 1)
        else:
            self.checkpoint = begin(self.run_folder, config, self.dumped, is_first_process())

    def instantiate_classes(self) -> None:
        """Build everything; weights that a checkpoint or rank 0 will replace are not drawn."""
        is_replaced = self.checkpoint is not None or (is_sharded(self.config.trainer) and not is_first_process())
        if is_replaced and is_pretrained(self.config.model.backbone):
            self.config.model.backbone.init_args.pretrained = False
        with SkipInitialization() if is_replaced else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run, config, asked = self.run_folder, self.config, self.config.trainer
        is_kept = not asked.fast_dev_run
        self.run, self.stop = RunFolder(run, self.dumped), checkpoints.GracefulStop(asked.max_time)
        folder = run / "checkpoints"
        best = BestCheckpoint(folder, "best", config.monitor, mode=config.monitor_mode, enable_version_counter=False)
        given: list[Callback] = self.config_init.trainer.callbacks or []
        is_sampled = config.samples and config.model.objective is None
        is_sampled &= is_kept and not any(isinstance(one, SampleGeneration) for one in given)
        callbacks: list[tuple[bool, Callback]] = [
            # First: where ranks then agree on something in this step, all have written theirs before any saves a checkpoint.
            (config.ledger and is_kept, Ledger(run)),
            (True, self.stop),
            (True, self.run),
            (True, StepGuard(run, GuardConfig(**vars(config.guard)), self.stop)),
            (True, DataReport(run, config.data.max_rejected_share)),
            (True, Throughput()),
            (asked.enable_progress_bar is not False, PileProgressBar()),
            (asked.logger is not False and is_kept, LearningRateMonitor("step")),
            (is_kept, best),
            # After the best, whose score it keeps.
            (True, checkpoints.LastCheckpoint(folder, config.checkpoint_every)),
            (is_sampled, SampleGeneration()),
        ]
        chosen = {
            "callbacks": [callback for wanted, callback in callbacks if wanted] + given,
            "default_root_dir": str(run),
            "max_time": None,  # `GracefulStop` stops without another validation, and each attempt has all of it
            "plugins": [checkpoints.DurableCheckpointIO(), *(self.config_init.trainer.plugins or [])],
        }
        if asked.precision is None:
            chosen["precision"] = fast_precision(asked.accelerator)
        if asked.logger is None:
            project = config.wandb if is_first_process() else None  # others log nothing
            chosen["logger"] = make_loggers(run, project) if is_kept else []
        return self._instantiate_trainer({**self.config_init.trainer, **chosen}, [])


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Skip Lightning's warning about files in the folder: a resumed run has some, and it imports s3fs to look for them."""


def is_sharded(trainer: Namespace) -> bool:
    name = str(getattr(trainer.strategy, "class_path", trainer.strategy))
    return name.rpartition(".")[2] in ("fsdp2", "ShardedStrategy")


def check_config(config: Namespace) -> None:
    """Raises ValueError for values that cannot be, alone or together; builds nothing."""
    model, data, trainer = config.model, config.data, config.trainer
    Timer(trainer.max_time)
    for switch, (allowed, fix) in SWITCHES.items():
        if str(value := getattr(trainer, switch)) not in allowed.split():
            raise ValueError(f"trainer.{switch}={value} is not possible: {fix}")
    image, audio = codec_configs(config)
    vocabulary = make_vocabulary(256, "bytes", image, audio)
    if model.backbone.class_path.rsplit(".", 1)[-1] == "Transformer":
        sizes = model.backbone.init_args
        Transformer.check(sizes.width, sizes.heads, sizes.key_value_heads)
    sources = {name: Source(**vars(source)) for name, source in data.sources.items()}
    check_data(sources, data)
    if image and vocabulary.image_tokens + 3 > data.context:
        taken = f"{vocabulary.image_tokens} codes (size {image.size}, patch {image.patch}) and 3 more tokens"
        raise ValueError(f"data.context={data.context} is shorter than an image: model.image takes {taken}")
    if config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={config.checkpoint_every} must be at least 1 optimizer step")
    in_epochs = data.epochs is not None or any(source.epochs is not None for source in sources.values())
    if not in_epochs and trainer.max_steps < 0:
        raise ValueError("how long to train? Set trainer.max_steps (optimizer steps) or data.epochs (passes over the data)")


def codec_configs(config: Namespace) -> tuple[ImageCodecConfig | None, AudioCodecConfig | None]:
    image, audio = config.model.image, config.model.audio
    return ImageCodecConfig(**vars(image)) if image else None, AudioCodecConfig(**vars(audio)) if audio else None


def count_devices(trainer: Namespace) -> int:
    """Devices of all nodes that the configuration asks for."""
    devices = trainer.devices
    if str(devices) in ("auto", "-1"):
        devices = 1 if trainer.accelerator == "cpu" else torch.cuda.device_count()
    elif isinstance(devices, list) or "," in str(devices):
        devices = len(re.findall(r"\d+", str(devices)))
    return max(1, int(devices)) * trainer.num_nodes


# Switches of Lightning's that a run cannot follow: the values that it can, and the fix.
IN_STEPS = "set trainer.max_steps (optimizer steps) or data.epochs (passes over the data)"
SWITCHES = {
    "accumulate_grad_batches": ("1", "set data.global_batch and data.micro_batch, it follows from them"),
    "barebones": ("False", "it excludes checkpoints and metrics, without which there is no run"),
    "enable_checkpointing": ("None True", "a run resumes from its checkpoints; set checkpoint_every"),
    "limit_train_batches": ("None 1.0", IN_STEPS),
    "max_epochs": ("None -1", IN_STEPS),
    "min_epochs": ("None", IN_STEPS),
    "overfit_batches": ("0.0 0", "take few documents with data.sources, and " + IN_STEPS),
    "precision": (
        "None 32-true 32 bf16-mixed bf16 16-mixed 16",
        "choose 32-true, bf16-mixed or 16-mixed, which keep weights and sums in float32",
    ),
    "reload_dataloaders_every_n_epochs": ("0", "the order of the data is fixed"),
    "use_distributed_sampler": ("False", "the data module shares out each step itself"),
}


def find_default_config() -> Path:
    """`conf/default.yaml`, which every configuration is laid over: next to `train.py`, in the working folder, or ours.
    Raises FileNotFoundError: there is none."""
    main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    for folder in (folders := [*[main.parent] * (main.name == "train.py"), Path(), BUNDLED]):
        if (path := folder / "conf" / "default.yaml").is_file():
            return path
    raise FileNotFoundError(f"no conf/default.yaml, which configurations are laid over, in {' or '.join(map(str, folders))}")


CLI_OPTIONS: dict[str, Any] = {
    "save_config_callback": None,
    "seed_everything_default": 0,
    "trainer_defaults": TRAINER_DEFAULTS,
    "parser_kwargs": {"exit_on_error": False, "description": __doc__},
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
    """The configuration that training would have with these arguments. Raises ValueError: it does not parse, or has values
    that cannot be together."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        try:
            options = CLI_OPTIONS | {"seed_everything_default": False}
            return _ParsingCLI(PileModule, PileDataModule, **options, args=arguments).config
        except ArgumentError as error:
            raise ValueError(str(error)) from error


def main(arguments: list[str] | None = None, program: tuple[str, ...] = ("python", "train.py")) -> None:
    """Trains. `arguments`: None takes the command line's. Raises SystemExit: 143, 138 or 130 after SIGTERM, SIGUSR1 or
    Ctrl-C, and 0 after `trainer.max_time`, with a checkpoint (run the same command again); 3 where too many steps in a row
    were rejected (change something first); 2 for an invalid configuration."""
    atexit.register(gc.freeze)  # or the interpreter searches everything twice for garbage, a second, before it ends
    cli: PileCLI = None  # type: ignore[assignment]
    name = " ".join(program) if program[0] == "pile" else Path(program[-1]).name
    try:
        words = None if arguments is None else find_configs(arguments)
        options = CLI_OPTIONS | {"parser_kwargs": CLI_OPTIONS["parser_kwargs"] | {"prog": name}}
        cli = PileCLI(PileModule, PileDataModule, **options, args=words)
        if cli.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        checkpoint = str(cli.checkpoint) if cli.checkpoint else None
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except checkpoints.StoppedInValidation:
        pass
    except KeyboardInterrupt:  # before training
        raise SystemExit(128 + signal.SIGINT) from None
    except DivergedError as error:
        stop_diverged(cli, error)
    except (ArgumentError, ValueError, OSError, ShardError, MisconfigurationException) as error:
        if cli is not None and cli.run.has_begun:
            raise
        print(f"{name.split()[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(REFUSED) from error
    if cli.config.trainer.fast_dev_run:
        print(f"fast_dev_run: {cli.trainer.global_step} optimizer steps; nothing is kept")
        return
    if not cli.stop.stopped:
        try:
            return finish(cli)
        except (KeyboardInterrupt, SystemExit):  # Lightning exits on Ctrl-C
            cli.stop.received = signal.SIGINT
    if not cli.trainer.is_global_zero:
        raise SystemExit  # with 0: Lightning kills all other processes if one of them fails
    close(cli.trainer)
    command = shlex.join(["python", *sys.argv] if arguments is None else [*program, *arguments])
    print(f"\n{cli.run_folder}: stopped after step {cli.trainer.global_step}; continue with: {command}", flush=True)
    raise SystemExit(cli.stop.exit_code)


def stop_diverged(cli: PileCLI, error: DivergedError) -> NoReturn:
    """Say how the run can go on."""
    guard, run = cli.config.guard, cli.run_folder
    skipped = checkpoints.range_to_skip(run / "checkpoints", error.first, error.last, guard.rewind_steps)
    ranges = [list(one) for one in (*guard.skip_steps, *([skipped] if skipped else []))]
    if not cli.trainer.is_global_zero:
        raise SystemExit
    print(f"{run}: {error}")
    if skipped is None:
        print("All checkpoints are from later steps. Lower the learning rate, or begin anew with another --name")
    else:
        print(f"Lower the learning rate, or skip those data: the same command with --guard.skip_steps '{ranges}'")
    raise SystemExit(DIVERGED)


def finish(cli: PileCLI) -> None:
    """Validate, run the evaluations of the config's callbacks, and write `summary.json` and `report.html`."""
    from pile_app.training.report import short, write_report

    trainer, module, run = cli.trainer, cli.model, cli.run_folder
    logged, best = dict(trainer.callback_metrics), run / "checkpoints" / "best.ckpt"
    step, metrics = cli.run.validation
    if module.objective is not None and best.exists():  # with little data, the last weights are seldom the best
        sharded = module.whole is not None
        saved = trainer.strategy.load_checkpoint(best) if sharded else checkpoints.read_checkpoint(best, optimizer=False)
        module.load_state_dict(saved["state_dict"])
        print(f"{run}: the figures are those of best.ckpt, by {cli.config.monitor}")
        step = step if step == saved["global_step"] else -1
    if step != trainer.global_step or module.whole is not None:  # not yet of these weights; a sharded model leaves its devices
        metrics = dict((trainer.validate(module, datamodule=cli.datamodule, verbose=False) or [{}])[0])
    else:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
    figures: dict[str, Any] = {n.removeprefix("validation/").replace("source/", ""): value for n, value in metrics.items()}
    whole = module.whole_model()
    if whole is None:
        return
    module.model = whole
    module.to(trainer.strategy.root_device)
    if module.objective is not None:
        figures |= module.objective.report(run)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "evaluate"):
            figures |= callback.evaluate(trainer, module)
    warned = find_divergence(trainer, module, {**logged, **metrics}, cli.config.monitor)
    cli.run.write_summary(trainer, module, figures | ({"warnings": warned} if warned else {}))
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{k}": v for k, v in figures.items() if isinstance(v, float)}, step=trainer.global_step)
        logger.save()
    close(trainer)
    report = write_report(run)
    main = [f"{name} {short(figures[name])}" for name in ("loss", "text_bits_per_byte", "accuracy", "f1") if name in figures]
    said = [*warned, *(["validation " + ", ".join(main)] if main else [])]
    print("".join(f"\n{run}: {text}" for text in said), f"\n{run} is complete: open {report}", sep="")
