"""`pile plan`: what a configuration will need."""

from __future__ import annotations

import argparse

SUMMARY = "say what a configuration will need, how long it will take, and what is unwise in it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pile plan [options] [SETTING=VALUE ...]"
    parser.epilog = "Nothing of the model is allocated. Exit code 2: a step does not fit into the memory of a device."
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="as train.py takes them: data.global_batch=64")
    parser.add_argument("--config", action="append", default=[], help="as train.py takes it; can be repeated")
    parser.add_argument("--devices", type=int, help="of the whole run (default: as configured, else 1)")
    parser.add_argument(
        "--hardware", choices=("h100", "h200", "b200", "a100", "l40s", "rtx4090", "cpu"), default="h100", help="kind of device"
    )
    parser.add_argument("--utilization", type=float, default=0.4, help="fraction of the hardware's FLOP/s that is reached")
    parser.add_argument("--text-tokens", type=int, default=32_762, help="size of a tokenizer that does not exist yet")
    parser.add_argument("--read-data", action="store_true", help="open the shards: fill, lengths, modalities, epochs")


def run(options: argparse.Namespace) -> None:
    from pile_app.training.plan import Plan

    if wrong := [setting for setting in options.settings if "=" not in setting]:
        raise ValueError(f"{wrong[0]!r} is not SETTING=VALUE, e.g. data.global_batch=64")
    arguments = [*(f"--config={path}" for path in options.config), *(f"--{setting}" for setting in options.settings)]
    plan = Plan(
        arguments, options.devices, options.hardware, options.utilization, options.text_tokens, options.read_data
    )  # fmt: skip
    print(plan)
    if not plan.fits:
        raise SystemExit(2)
