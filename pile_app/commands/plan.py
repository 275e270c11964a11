"""`pile plan`: what a configuration will need."""

from __future__ import annotations

import argparse

SUMMARY = "say what a configuration will need, how long it will take, and what is unwise in it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pile plan [options] [SETTING=VALUE ...]"
    parser.epilog = "Nothing of the model is allocated. Memory is that of a language-model step (not of the codecs' phase)."
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="as train.py takes them: data.global_batch=64")
    parser.add_argument("--config", action="append", default=[], help="as train.py takes it; may stand several times")
    parser.add_argument("--devices", type=int, help="of the whole run (default: what the configuration says, else 1)")
    parser.add_argument(
        "--device", choices=("h100", "h200", "b200", "a100", "l40s", "rtx4090", "cpu"), default="h100", help="kind"
    )
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the device's FLOP/s that is reached")
    parser.add_argument("--strategy", choices=("single", "ddp", "fsdp"), help="default: what the configuration says")
    parser.add_argument("--tensor-parallel", type=int, help="devices that share the matrices of a block")
    parser.add_argument("--text-tokens", type=int, default=32_762, help="of a tokenizer that is not there yet")
    parser.add_argument("--read-data", action="store_true", help="open the shards: fill, lengths, modalities, passes")


def run(options: argparse.Namespace) -> None:
    from pile_app.training.advice import format_plan
    from pile_app.training.plan import make_plan

    values = dict(vars(options))
    del values["command"]
    wrong = [setting for setting in options.settings if "=" not in setting]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not SETTING=VALUE, e.g. data.global_batch=64")
    arguments = [f"--config={path}" for path in values.pop("config")]
    plan = make_plan([*arguments, *(f"--{setting}" for setting in values.pop("settings"))], **values)
    print(format_plan(plan))
