"""What `pile plan` prints: the figures of a plan, and warnings by rules of thumb, each with its number and a fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pile_app.documents import MODALITIES
from pile_app.training.plan import NODE, Plan


def describe(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (name, figure) lines."""
    config, layout, memory = plan.config, plan.layout, plan.memory
    shares = ", ".join(f"{MODALITIES[m]} {plan.data.shares[m]:.0%}" for m in plan.vocabulary.modalities)
    source = "from 64 packs" if plan.data.measured else "assumed, --read-data measures"
    codecs = f", codecs {plan.codec_flops_per_token / 1e6:,.1f} M" if plan.codec_flops_per_token else ""
    batch = f"{plan.micro_batch} x {plan.accumulated} x {layout.data_parallel}"
    parallel = f", tensor parallel {layout.tensor_parallel}" if layout.tensor_parallel > 1 else ""
    names = ("weights", "gradients", "optimizer", "activations", "parallel")
    each = ", ".join(f"{name} {_bytes(getattr(memory, name))}" for name in names if getattr(memory, name))
    reserved = "memory that malloc keeps" if plan.device_name == "cpu" else "CUDA's own and fragments"
    speed = plan.tokens_per_step / plan.seconds_per_step
    sending = f"; {plan.seconds_sending:.3g} s of sending to hide behind it" if plan.seconds_sending else ""
    rows: list[tuple[str, Any]] = [
        ("parameters", ", ".join(f"{part} {size:,}" for part, size in plan.parts.items() if size)),
        ("language model", f"{plan.language_parameters:,} parameters"),
        ("data", f"fill {plan.data.fill:.1%}, {plan.data.attended:,.0f} tokens attended to, targets {shares} ({source})"),
        ("FLOPs a token", f"{plan.flops_per_token / 1e6:,.1f} M forward and backward{codecs}"),
        ("step", f"{config.data.global_batch} packs ({batch}) of {config.data.context:,}: {plan.tokens_per_step:,} tokens"),
        ("devices", f"{layout.devices} x {plan.device_name}, {layout.strategy}{parallel}, {plan.precision}"),
        ("memory of a device", f"{_bytes(memory.peak)} at the peak: {each} (gradients come as activations go)"),
        ("needed of a device", f"{_bytes(plan.peak_bytes)} of {_bytes(plan.device.memory)}, with {reserved}"),
        ("a checkpoint", _bytes(plan.checkpoint_bytes)),
        (
            "speed",
            f"{speed:,.0f} tokens/s at {plan.utilization:.0%} utilization, {plan.seconds_per_step:.3g} s a step{sending}",
        ),
    ]
    if plan.tokens is not None and plan.steps is not None:
        ratio, seconds = plan.tokens / (20 * plan.language_parameters), plan.steps * plan.seconds_per_step
        rows += [
            ("tokens", f"{plan.tokens:,.0f} in {plan.steps:,} steps, {ratio:.2f} x Chinchilla's 20 a parameter"),
            ("time", f"{_duration(seconds)} ({seconds * layout.devices / 3600:,.1f} device hours)"),
        ]
        if plan.data.tokens:
            rows.append(("passes over the data", f"{plan.tokens / plan.data.tokens:.2f} ({plan.data.tokens:,} tokens)"))
    return rows


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    units = (("days", 86_400), ("hours", 3_600), ("minutes", 60))
    return next((f"{seconds / size:,.1f} {unit}" for unit, size in units if seconds >= size), f"{seconds:,.0f} seconds")


def format_plan(plan: Plan) -> str:
    rows = describe(plan)
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {figure}" for name, figure in rows), *(f"warning: {one}" for one in advise(plan))])


def advise(plan: Plan) -> list[str]:
    """Warnings, most pressing first."""
    return [warning for rule in RULES for warning in rule(plan)]


def memory(plan: Plan) -> Iterator[str]:
    needed, there, devices = plan.peak_bytes, plan.device.memory, plan.layout.devices
    if needed > there:
        much = plan.memory.activations > 0.4 * needed
        fixes = {
            f"a smaller data.micro_batch (now {plan.micro_batch})": plan.micro_batch > 1,
            "trainer.strategy fsdp2": plan.layout.strategy != "fsdp" and devices > 1,
            "model.recompute true": much and not plan.config.model.recompute,
            "tensor parallelism within a node": much and plan.layout.tensor_parallel == 1 and devices > 1,
            "trainer.precision bf16-mixed": plan.precision == "32-true" and plan.device_name != "cpu",
        }
        fitting = ", ".join(fix for fix, fits in fixes.items() if fits) or "a smaller model"
        yield f"a step needs {needed / 1e9:.0f} GB of a device with {there / 1e9:.0f} GB: {fitting}"
    elif needed > 0.9 * there:
        yield f"a step needs {needed / there:.0%} of the device's memory: the first longer sound or fragment may be too much"
    elif plan.accumulated > 1 and needed < 0.4 * there and plan.device_name != "cpu":
        yield (
            f"{plan.accumulated} micro-batches a step leave {1 - needed / there:.0%} of the memory empty: a larger "
            f"data.micro_batch (now {plan.micro_batch}) is faster"
        )
    if plan.layout.strategy == "ddp" and plan.memory.parallel > 1e9:
        yield f"DDP's buckets take another {plan.memory.parallel / 1e9:.1f} GB: set gradient_as_bucket_view=true of DDPStrategy"


def batch_size(plan: Plan) -> Iterator[str]:
    # nanochat's measured batches: 262k tokens at 42 M parameters, 524k at 70 to 235 M, 1.05 M at 0.3 to 0.9 G, 2.1 M up to 6 G.
    usual = 524_288 * (plan.language_parameters / 130e6) ** 0.5
    ratio = plan.tokens_per_step / usual
    if ratio > 4:
        yield f"{plan.tokens_per_step:,} tokens a step waste steps (usual is {usual:,.0f}): lower data.global_batch"
    if ratio < 1 / 4 and plan.layout.devices > 1:
        yield (
            f"{plan.tokens_per_step:,} tokens a step are few for a model of this size (usual is {usual:,.0f}): with several "
            "devices a larger data.global_batch is as good for each token and much faster"
        )


def devices(plan: Plan) -> Iterator[str]:
    layout = plan.layout
    each = plan.tokens_per_step / layout.devices
    if plan.device_name != "cpu" and each < 4096:
        yield f"{each:,.0f} tokens a step and device cannot keep it busy: too many devices for data.global_batch"
    if plan.seconds_sending > plan.seconds_per_step:
        yield (
            f"sending takes {plan.seconds_sending:.2g} s of a step that computes for {plan.seconds_per_step:.2g} s, so the "
            f"utilization stays below {plan.utilization:.0%}: fewer devices, or a larger data.micro_batch"
        )
    if layout.tensor_parallel > NODE:
        yield f"tensor_parallel={layout.tensor_parallel} exceeds a node of {NODE}: it belongs inside a node"
    if layout.strategy == "fsdp" and plan.language_parameters < 300e6:
        yield f"{plan.language_parameters / 1e6:,.0f} M parameters fit every device: ddp is simpler and sends less than fsdp"


def training_length(plan: Plan) -> Iterator[str]:
    if plan.tokens is None:
        yield "the length is not known: set trainer.max_steps, or let --read-data count the epochs"
        return
    ratio = plan.tokens / (20 * plan.language_parameters)
    if ratio < 0.25:
        yield f"{ratio:.2f} of Chinchilla's tokens: a smaller model trained longer would be better for the same cost"
    passes = plan.tokens / plan.data.tokens if plan.data.tokens else 0
    if passes > 4:  # arXiv:2305.16264: up to 4 passes are almost as good as new data
        yield f"{passes:.0f} passes over the data: after four, repeated tokens teach little; more data, or a smaller model"
    steps = plan.steps or 0
    warmup, codecs = plan.config.model.optimizer.warmup_steps, plan.config.model.codec_steps
    if warmup > 0.1 * steps:
        yield f"{warmup} of {steps:,} steps are warm-up: lower model.optimizer.warmup_steps"
    if plan.language_parameters > 100e6 and warmup < 100:
        yield f"a warm-up of {warmup} steps is short for {plan.language_parameters / 1e6:,.0f} M parameters: use some hundred"
    if codecs >= steps:
        yield f"model.codec_steps={codecs} leaves nothing of {steps:,} steps for the language model"


def learning_rate(plan: Plan) -> Iterator[str]:
    optimizer = plan.config.model.optimizer
    width = getattr(plan.config.model.backbone.init_args, "width", 0)
    if optimizer.base_width is None and width > 256 and optimizer.name != "sgd":
        yield (
            f"rates that were tuned on a narrow model are too high for the heads at width {width}: set "
            "model.optimizer.base_width to the width that they were tuned at (128 for the defaults)"
        )
    if optimizer.name == "adamw" and optimizer.learning_rate * (optimizer.base_width or width) / max(width, 1) > 0.006:
        yield f"a rate of {optimizer.learning_rate} is high for AdamW at width {width}: 0.001 to 0.004 is usual"
    if plan.config.trainer.gradient_clip_val is None and plan.language_parameters > 100e6:
        yield "no gradient clipping: set trainer.gradient_clip_val (1.0), or one bad batch may undo a day"


def precision(plan: Plan) -> Iterator[str]:
    if plan.precision == "32-true" and plan.device_name != "cpu":
        yield f"float32 leaves {1 - plan.device.float32 / plan.device.bf16:.0%} of the {plan.device_name} unused: bf16-mixed"
    if plan.precision.startswith("16"):
        yield "float16 overflows where bfloat16 does not: trainer.precision bf16-mixed"


def matrix_sizes(plan: Plan) -> Iterator[str]:
    if plan.device_name == "cpu":
        return
    sizes = plan.config.model.backbone.init_args
    width, heads = sizes.width, getattr(sizes, "heads", None)
    if width % 128:
        yield f"width {width} is no multiple of 128: matrix units work in such tiles, the rest of the last tile is wasted"
    if heads and width // heads not in (64, 128):
        yield f"heads of {width // heads} numbers: attention kernels are fastest with 64 or 128"
    if heads and (hidden := int(sizes.feed_forward * width)) // plan.layout.tensor_parallel % 128:
        yield f"a feed-forward net of {hidden} on {plan.layout.tensor_parallel} devices is no multiple of 128 on each"
    for modality in plan.vocabulary.modalities:
        size = plan.vocabulary.slices[modality].stop - plan.vocabulary.slices[modality].start
        if size > 8192 and size % 8:
            yield f"the softmax over {MODALITIES[modality]} has {size:,} entries, no multiple of 8: {-size % 8} more are faster"


def data(plan: Plan) -> Iterator[str]:
    context, spec = plan.config.data.context, plan.config.model.tokenizer
    if not plan.tokenizer_is_there:
        yield f"{spec} is not there yet: planned with {plan.vocabulary.text_tokens:,} text tokens (--text-tokens)"
    if not plan.data.measured:
        return
    if plan.data.fill < 0.95:
        yield f"{1 - plan.data.fill:.0%} of the positions are padding: a context of {context:,} does not suit these documents"
    if plan.data.attended < context / 8:
        yield (
            f"a token sees {plan.data.attended:,.0f} tokens of a context of {context:,}: documents are short; a shorter "
            "data.context with a larger data.global_batch costs less memory"
        )
    absent = [MODALITIES[m] for m in plan.vocabulary.modalities if not plan.data.shares[m]]
    if absent:
        yield f"nothing of the first packs is {' or '.join(absent)}, which the model has a codec for: model.{absent[0]} null"


RULES: tuple[Callable[[Plan], Iterator[str]], ...] = (
    memory, batch_size, devices, training_length, learning_rate, precision, matrix_sizes, data,
)  # fmt: skip
