"""Labels that a judge gives to media (`data/judges.py`)."""

from __future__ import annotations

import numpy as np

from data.judges import MANY, Judge, Labelled


def test_many_labels_are_judged_too_and_the_right_one_is_among_the_five_best() -> None:
    rng = np.random.default_rng(0)
    labels = [f"label {n}" for n in range(MANY + 10)]
    centres = rng.standard_normal((len(labels), 64))

    def media(spread: float, each: int) -> Labelled:
        of = list(range(len(labels))) * each
        arrays = [centres[n] + spread * rng.standard_normal(64) for n in of]
        return Labelled(arrays=arrays, labels=[labels[n] for n in of])

    judge = Judge(lambda array: array, media(0.3, 8))
    unseen = media(0.3, 2)
    figures = judge.figures("it", unseen.arrays, unseen.labels)
    assert figures["it_accuracy"] > 0.95 and figures["it_top5"] >= figures["it_accuracy"]
    assert judge.best(unseen.arrays, 1)[0] == [judge.classifier.predict(unseen.arrays[:1])[0]]
