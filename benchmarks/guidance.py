"""What guidance does to words, drawings and sounds of the digits' demo, with and without what holds implausible tokens back.

    python benchmarks/guidance.py runs/digits [--data data/digits/shards] [--guidance 2] [--temperature 0.8] [--top-p 0.75]

Of 60 held-out pictures and 60 held-out sounds, how many are named right; and shares of 200 drawings and 200 sounds by name, and
of 200 spoken answers to a picture, that the judges of the demo's evaluation take for what was asked. A threshold of 1e-30 holds
nothing back. Prints a JSON line for each threshold and seed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from pile_app.documents import AUDIO, IMAGE, MODALITIES, TEXT, Document
from pile_app.model import generate
from pile_app.model.sampling import Sampling
from pile_app.tasks.cross_modal import EvaluateCrossModal
from pile_app.tasks.judges import Judge, audio_features, image_features
from pile_app.training.load import load_run

NAMED = 60  # pictures, and sounds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/digits/shards"))
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.75)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1e-30, 0.01, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    module, _, _ = load_run(options.run)
    model = module.model.eval()
    sampling = Sampling(options.temperature, options.top_p, options.guidance, max_text=10, max_seconds=1.2)
    evaluation = EvaluateCrossModal(str(options.data / "labelled-train-*.tar"), str(options.data / "labelled-heldout-*.tar"))
    train, heldout = evaluation._load(model, evaluation.train), evaluation._load(model, evaluation.heldout)
    features = {IMAGE: image_features, AUDIO: audio_features(model.vocabulary.sample_rate)}
    judges = {modality: Judge(features[modality], media) for modality, media in train.items()}
    for threshold in options.thresholds:
        generate.PLAUSIBLE = threshold
        for seed in options.seeds:
            evaluation.sampling = replace(sampling, seed=seed)
            found: dict[str, float] = {"threshold": threshold, "seed": seed}
            for modality, media in heldout.items():
                name = MODALITIES[modality]
                prompts = [Document((medium,)) for medium in media.segments[:NAMED]]
                answers = generate.generate(model, prompts, TEXT, evaluation.sampling)
                found[f"{name}_named"] = sum(one.text == names[0] for one, names in zip(answers, media.names, strict=False))
                found |= judges[modality].figures(f"text_to_{name}", *evaluation._make(model, modality, media, ""))
            found |= evaluation._image_to_audio(model, judges[AUDIO], heldout[IMAGE], heldout[AUDIO])
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
