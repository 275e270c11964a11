"""Open weights: memory of LoRA, speed of training, packed against padded batches, bits a byte on WikiText-2.

    python benchmarks/open_weights.py data/smollm2/model --data ../shared/data [--steps 10] [--rounds 3] [--parts bits speed]

Every measurement is a process of its own; ours and that of plain transformers alternate, in float32, with the same batch and
optimizer (AdamW, all weights). On two cores a round takes about six minutes.

| part | ratio | bar |
|---|---|---|
| memory | peak memory of LoRA ÷ full fine-tuning | at most 0.6 |
| speed | tokens/s of train.py ÷ a plain loop of transformers | at least 1.0 |
| packed | sentences/s of SST-2, packs of train.py ÷ padded batches of a plain loop | at least 1.3 |
| bits | bits a byte of WikiText-2 valid, `pile evaluate FOLDER` ÷ a plain loop, a window a document | 1 ± 0.001 |
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTEXT, BATCH, SENTENCES, WINDOW = 512, 4, 64, 3000  # tokens, packs, sentences of a padded batch, characters of a document
OURS = (
    *("--config", "text_only", "--model.backbone", "HuggingFace", "--model.tokenizer", "bytes", "--model.optimizer.name"),
    *("adamw", "--data.context", str(CONTEXT), "--data.global_batch", str(BATCH), "--data.micro_batch", str(BATCH)),
    *("--data.prepare", "null", "--trainer.precision", "32-true", "--trainer.callbacks", "[]", "--wandb", "null"),
    *("--checkpoint_every", "100000", "--data.num_workers", "0", "--samples", "false"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of SmolLM2 or another model of transformers")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with wikitext2/valid.txt and sst2/train.tsv"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=10**9, help="of WikiText-2, at most")
    parser.add_argument("--parts", nargs="+", default=["memory", "speed", "packed", "bits"])
    parser.add_argument("--plain", choices=["whole", "padded", "bits"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(options)))
        return 0
    return measure(options, Path(tempfile.mkdtemp(prefix="pile-open-")))


def measure(options: argparse.Namespace, folder: Path) -> int:
    text = (options.data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    windows = [text[first : first + WINDOW].strip() for first in range(0, len(text), WINDOW)][: options.documents]
    lines = (options.data / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:20_000]
    files = {"wikitext": windows, "sst2": [sentence for line in lines if (sentence := line.split("\t")[0].strip())]}
    for name, texts in files.items():
        (folder / f"{name}.json").write_text(json.dumps(texts))
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number, one in enumerate(texts):
                member = tarfile.TarInfo(f"{number:06d}.txt")
                member.size = len(one.encode())
                tar.addfile(member, io.BytesIO(one.encode()))

    def ours(data: str, *settings: str) -> dict[str, Any]:
        name = f"run{len(list(folder.glob('runs/*')))}"
        sources = f"{{text: {{train: {folder / data}.tar}}}}"
        words = ("--model.backbone.path", str(options.model), "--trainer.max_steps", str(options.steps), "--name", name)
        run([sys.executable, "train.py", *OURS, *words, "--runs", str(folder / "runs"), "--data.sources", sources, *settings])
        figures: dict[str, Any] = json.loads((folder / "runs" / name / "summary.json").read_text())
        return figures

    def theirs(kind: str, data: str) -> dict[str, Any]:
        words = [str(options.model), "--plain", kind, "--file", str(folder / f"{data}.json"), "--steps", str(options.steps)]
        found: dict[str, Any] = json.loads(run([sys.executable, __file__, *words]).splitlines()[-1])
        return found

    ratios: dict[str, list[float]] = {part: [] for part in options.parts}
    for _ in range(options.rounds):
        full = ours("wikitext") if {"memory", "speed"} & ratios.keys() else {}
        if "memory" in ratios:
            adapted = ours("wikitext", "--model.backbone.lora", "{rank: 16}")
            ratios["memory"].append(adapted["peak_memory_bytes"] / full["peak_memory_bytes"])
        if "speed" in ratios:
            ratios["speed"].append(full["tokens_per_second"] / theirs("whole", "wikitext")["tokens_per_second"])
        if "packed" in ratios:
            ratios["packed"].append(ours("sst2")["tokens_per_second"] / theirs("padded", "sst2")["tokens_per_second"])
    if "bits" in ratios:
        on = f"wikitext={folder / 'wikitext'}.tar"
        run([sys.executable, "-m", "pile_app.cli", "evaluate", str(options.model), "--on", on, "--output", str(folder)])
        bits = json.loads((folder / "evaluation.json").read_text())["all"]["text"]["bits_per_byte"]
        expected = theirs("bits", "wikitext")["bits_per_byte"]
        print(f"bits a byte: {bits:.5f}, plain {expected:.5f}")
        ratios["bits"].append(bits / expected)
    bars = {"memory": (0, 0.6), "speed": (1.0, math.inf), "packed": (1.3, math.inf), "bits": (0.999, 1.001)}
    for part, values in ratios.items():
        low, high = bars[part]
        print(f"{part}: {statistics.median(values):.4f} of {[round(value, 4) for value in values]}, bar {low} to {high}")
    return 0 if all(bars[part][0] <= statistics.median(values) <= bars[part][1] for part, values in ratios.items()) else 1


def run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def plain(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer, texts = AutoTokenizer.from_pretrained(options.model), json.loads(options.file.read_text())
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    tokens = [tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    if options.plain == "bits":
        nats = 0.0
        with torch.no_grad():
            for ids in tokens:
                logits = model(torch.tensor([[begin, newline, *ids]])).logits[0, 1:-1].float()
                nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        return {"bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in texts)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    rows = [[begin, newline, *ids, end] for ids in tokens]
    flat = [token for row in rows for token in row]
    learned, began = 0, time.perf_counter()
    for step in range(options.steps):
        first = step * BATCH * CONTEXT
        batch = [flat[at : at + CONTEXT] for at in range(first, first + BATCH * CONTEXT, CONTEXT)]
        if options.plain == "padded":
            batch = rows[step * SENTENCES : (step + 1) * SENTENCES]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        learned += int(mask.sum()) - len(batch)
    return {"tokens_per_second": learned / (time.perf_counter() - began)}


if __name__ == "__main__":
    sys.exit(main())
