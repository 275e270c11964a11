"""One contestant of `throughput.py` and `gpu.py`: a plain training loop on random tokens, as many steps as it is told.

    python train_step.py pile|pile-adamw|transformers|litgpt '{"width": 512, ...}'     (see `Shape`)

Prints {"ready": parameters}; then for each line on stdin, a number of optimizer steps, a line {"seconds", "tokens", "matmul",
"memory"}: the time they took, their tokens, FLOP/s of large products measured right after, peak bytes on the device.

Every contestant is a decoder with the same width, layers, heads and vocabulary, untied, and, but for rounding, the same number
of parameters: Llama's three matrices of a feed-forward net are 8/3 wide where ours, with two, are 4. Weights are float32,
products bf16 by autocast, gradients are clipped at 1. The peers take fused AdamW; ours takes its default, Muon with AdamW,
which costs more (`pile-adamw`: AdamW), and keeps documents apart and nats of each target as it does in training; `documents` a
pack.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """packs: of a micro-batch; micro_batches: of an optimizer step; documents: in each pack, of equal length (ours only);
    cpu_time: seconds are those of the processor."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    packs: int
    micro_batches: int = 1
    documents: int = 1
    device: str = "cpu"
    compile: bool = False
    parallel: str = ""
    cpu_time: bool = False

    def clock(self) -> float:
        return time.process_time() if self.cpu_time else time.perf_counter()


Loss = Callable[[], torch.Tensor]  # of a micro-batch


def make_pile(shape: Shape, name: str = "muon") -> tuple[torch.nn.Module, Loss, torch.optim.Optimizer]:
    import numpy as np

    from pile_app.data.batch import Batch, allocate
    from pile_app.data.tokenizers import ByteTokenizer
    from pile_app.model.backbones import Transformer
    from pile_app.model.fused import FusedLanguageModel
    from pile_app.training.optim import OptimizerConfig, make_optimizer
    from pile_app.training.run import keep_freed_memory
    from pile_app.vocabulary import Vocabulary

    if shape.device == "cpu":
        keep_freed_memory()  # as every run of Pile's on a CPU does
    tokenizer = ByteTokenizer()
    tokenizer.size = shape.vocabulary - Vocabulary.SPECIALS
    tokenizer.token_bytes = np.ones(tokenizer.size, np.int64)
    places, pieces = shape.packs * shape.context, shape.packs * shape.documents
    arrays, buffer, layout, memory = allocate(
        {
            "tokens": ("int32", (shape.packs, shape.context)),
            "learned": ("uint8", (shape.packs, shape.context)),
            "piece_starts": ("int32", (pieces + 1,)),
            "piece_sources": ("int32", (pieces,)),
            "images": ("uint8", (0, 1, 1, 1)),
            "image_starts": ("int32", (0,)),
            "audio": ("float32", (0, 0)),
            "audio_starts": ("int32", (0,)),
            "audio_tokens": ("int32", (0,)),
            "normalizer": ("float32", ()),
        }
    )
    starts = np.linspace(0, places, pieces + 1).astype(np.int32)
    arrays["tokens"][:] = np.random.default_rng(0).integers(Vocabulary.SPECIALS, shape.vocabulary, arrays["tokens"].shape)
    arrays["learned"][:] = 0
    arrays["learned"].reshape(-1)[starts[1:] - 1] = 3  # what follows the last token of a piece is not its own
    arrays["piece_starts"][:], arrays["piece_sources"][:] = starts, 0
    arrays["normalizer"][...] = (places - pieces) * shape.micro_batches
    batch = Batch(buffer, layout, (places - pieces, 0, 0), memory=memory)

    model = FusedLanguageModel(Transformer(shape.width, shape.layers, shape.heads), tokenizer).to(shape.device)
    if shape.compile:
        model.backbone.compile_blocks()
    name = "adamw" if shape.parallel == "fsdp" else name
    run = parallelize(model, list(model.backbone.blocks), shape)
    optimizer, _ = make_optimizer(model, OptimizerConfig(name=name), 0, 1_000_000)  # type: ignore[arg-type]

    def loss() -> torch.Tensor:
        fresh = batch.to(shape.device)
        return sum(one.total for one in run(fresh).values()) / fresh.normalizer

    return model, loss, optimizer


def make_transformers(shape: Shape) -> tuple[torch.nn.Module, Loss, torch.optim.Optimizer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=hidden_width(shape), num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context, tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(shape.device)
    tokens = torch.randint(shape.vocabulary, (shape.packs, shape.context), device=shape.device)
    run = torch.compile(model) if shape.compile else model
    return model, lambda: run(input_ids=tokens, labels=tokens).loss / shape.micro_batches, adamw(model)


def make_litgpt(shape: Shape) -> tuple[torch.nn.Module, Loss, torch.optim.Optimizer]:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        n_embd=shape.width, intermediate_size=hidden_width(shape), n_layer=shape.layers, n_head=shape.heads,
        block_size=shape.context, padded_vocab_size=shape.vocabulary, vocab_size=shape.vocabulary, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = GPT(config).to(shape.device)
    model.max_seq_length = shape.context
    tokens = torch.randint(shape.vocabulary, (shape.packs, shape.context + 1), device=shape.device)
    run = torch.compile(model) if shape.compile else model

    def loss() -> torch.Tensor:  # as litgpt's own pretraining computes it
        return chunked_cross_entropy(run(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous()) / shape.micro_batches

    return model, loss, adamw(model)


def hidden_width(shape: Shape) -> int:
    return -(-8 * shape.width // 3 // 32) * 32


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)


def parallelize(model: torch.nn.Module, blocks: list[torch.nn.Module], shape: Shape) -> Any:
    if shape.parallel == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # it knows no media
    if shape.parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for part in [*blocks, model]:
            fully_shard(part, ignored_params={p for p in part.parameters() if not p.numel()})  # of media it does not know
    return model


def measure_matmul(shape: Shape) -> float:
    """FLOP/s of a large bf16 product, best of a few."""
    device = shape.device
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    best = float("inf")
    for _ in range(6):
        wait(device)
        began = shape.clock()
        a @ b
        wait(device)
        best = min(best, shape.clock() - began)
    return 2.0 * size**3 / best


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    name, shape = sys.argv[1], Shape(**json.loads(sys.argv[2]))
    torch.manual_seed(0)
    if shape.parallel:
        torch.distributed.init_process_group("nccl" if shape.device == "cuda" else "gloo")
        if shape.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    make = {
        "pile": make_pile,
        "pile-adamw": partial(make_pile, name="adamw"),
        "transformers": make_transformers,
        "litgpt": make_litgpt,
    }[name]
    model, loss, optimizer = make(shape)

    def step() -> None:
        for _ in range(shape.micro_batches):
            with torch.autocast(shape.device, torch.bfloat16):
                value = loss()
            value.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.numel()], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3 if shape.device == "cuda" else 1):
        step()
    parameters = sum(p.numel() for p in model.parameters())
    ranks = torch.distributed.get_world_size() if shape.parallel else 1
    print(json.dumps({"ready": parameters}), flush=True)
    for line in sys.stdin if not shape.parallel else ["10"]:
        wait(shape.device)
        began = shape.clock()
        for _ in range(int(line)):
            step()
        wait(shape.device)
        seconds = shape.clock() - began
        tokens = int(line) * shape.micro_batches * shape.packs * shape.context * ranks
        memory = torch.cuda.max_memory_allocated() if shape.device == "cuda" else 0
        answer = {"seconds": seconds, "tokens": tokens, "matmul": measure_matmul(shape), "memory": memory}
        if not shape.parallel or torch.distributed.get_rank() == 0:
            print(json.dumps(answer), flush=True)
    if shape.parallel:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
