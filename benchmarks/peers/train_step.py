"""A contestant of `throughput.py`: a plain training loop on random tokens.

    python train_step.py pile|pile-adamw|transformers|litgpt '{"width": 512, ...}'     (see `Shape`)

Prints {"ready": parameters}; then for each line on stdin, a number of optimizer steps, a line {"seconds", "tokens", "matmul",
"memory"}: the time of the steps, their tokens, FLOP/s of large products measured right after, peak bytes on the GPU.

Every contestant is a decoder with the same width, layers, heads and vocabulary, untied, and about as many parameters:
Llama's three matrices of a feed-forward net are 8/3 wide, our two are 4. Weights are float32, products bf16 by autocast,
gradients are clipped at 1. The peers use fused AdamW; ours uses its default, Muon with AdamW, which costs more (`pile-adamw`:
AdamW), keeps documents apart and computes the nats of each target, as in training.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """packs: of a micro-batch; micro_batches: of an optimizer step; cpu_time: measure seconds of CPU time."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    packs: int
    micro_batches: int = 1
    device: str = "cpu"
    compile: bool = False
    cpu_time: bool = False

    def clock(self) -> float:
        return time.process_time() if self.cpu_time else time.perf_counter()


Loss = Callable[[], torch.Tensor]  # of a micro-batch


def make_pile(shape: Shape, name: str = "muon") -> tuple[torch.nn.Module, Loss, torch.optim.Optimizer]:
    import numpy as np

    from pile_app.data.tokenizers import ByteTokenizer
    from pile_app.model.backbones import Transformer
    from pile_app.model.fused import FusedLanguageModel
    from pile_app.training.optim import OptimizerConfig, make_optimizer
    from pile_app.training.plan import make_batch
    from pile_app.training.run import keep_freed_memory
    from pile_app.vocabulary import Vocabulary

    if shape.device == "cpu":
        keep_freed_memory()  # as every run of Pile's on a CPU does
    tokenizer = ByteTokenizer()
    tokenizer.size = shape.vocabulary - Vocabulary.SPECIALS
    tokenizer.token_bytes = np.ones(tokenizer.size, np.int64)
    model = FusedLanguageModel(Transformer(shape.width, shape.layers, shape.heads), tokenizer).to(shape.device)
    if shape.compile:
        model.backbone.compile_blocks()
    batch = make_batch(model, shape.packs, shape.context, (1.0, 0.0, 0.0))
    batch.tokens[:] = torch.randint(Vocabulary.SPECIALS, shape.vocabulary, batch.tokens.shape)
    optimizer, _ = make_optimizer(model, OptimizerConfig(name=name), 0, 1_000_000)  # type: ignore[arg-type]

    def loss() -> torch.Tensor:
        fresh = batch.to(shape.device)
        return sum(part.total for part in model(fresh).values()) / fresh.normalizer / shape.micro_batches

    return model, loss, optimizer


def make_transformers(shape: Shape) -> tuple[torch.nn.Module, Loss, torch.optim.Optimizer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=hidden_width(shape), num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model: Any = LlamaForCausalLM(config)
    model = model.to(shape.device)
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
    makers: dict[str, Callable[[Shape], tuple[torch.nn.Module, Loss, torch.optim.Optimizer]]] = {
        "pile": make_pile,
        "pile-adamw": partial(make_pile, name="adamw"),
        "transformers": make_transformers,
        "litgpt": make_litgpt,
    }
    model, loss, optimizer = makers[name](shape)

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
    print(json.dumps({"ready": parameters}), flush=True)
    for line in sys.stdin:
        wait(shape.device)
        steps, began = int(float(line)), shape.clock()
        for _ in range(steps):
            step()
        wait(shape.device)
        seconds = shape.clock() - began
        tokens = steps * shape.micro_batches * shape.packs * shape.context
        memory = torch.cuda.max_memory_allocated() if shape.device == "cuda" else 0
        answer = {"seconds": seconds, "tokens": tokens, "matmul": measure_matmul(shape), "memory": memory}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
