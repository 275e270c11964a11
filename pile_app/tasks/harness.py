"""A run behind the interface of EleutherAI's evaluation harness, so that its tasks measure it (extra `lm-eval`).

    pile evaluate runs/mine --tasks my_task --include my_tasks/      tasks of own YAML files, from local data
    pile evaluate runs/mine --tasks arc_easy,hellaswag               tasks of the harness, whose data it fetches itself

What is asked for goes to `model/score.py` and `model/generate.py`. A prompt longer than the run's context loses its beginning;
`loglikelihood_rolling` reads a long text in windows of the context that overlap as little as can be, each token once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pile_app.documents import TEXT, Document, Segment
from pile_app.model.generate import Sampling, generate
from pile_app.model.score import rolling_scores, score_continuations
from pile_app.prepare.options import require
from pile_app.tasks.evaluate import keep
from pile_app.training.load import find_checkpoint, load_run, read_config

HARNESS = require("lm_eval.api.model", "lm-eval", "evaluating on tasks of the harness")

MAX_TOKENS = 256  # of an answer, where a task does not say


class PileLM(HARNESS.LM):  # type: ignore[name-defined]
    """A model as the harness asks it.

    Args:
        model: in evaluation mode, on its device.
        context: tokens that it was trained with.
        batch: prompts that are answered at a time.
    """

    def __init__(self, model: Any, context: int, batch: int = 32) -> None:
        super().__init__()
        self.model = model
        self.context = context
        self.batch = batch

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would give it) of each request's (context, continuation)."""
        prompts, continuations = zip(*(request.args for request in requests), strict=True)
        scores = score_continuations(self.model, prompts, continuations, self.context)
        return [(-score.nats, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each request's text."""
        return [-sum(score.nats for score in rolling_scores(self.model, r.args[0], self.context)) for r in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes after each request's context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers: dict[int, str] = {}
        for settings, numbers in groups.items():
            sampling = _sampling(json.loads(settings))
            for first in range(0, len(numbers), self.batch):
                some = numbers[first : first + self.batch]
                prompts = [self._prompt(requests[number].args[0], sampling.max_text) for number in some]
                for number, answer in zip(some, generate(self.model, prompts, TEXT, sampling), strict=True):
                    answers[number] = answer.text
        return [answers[number] for number in range(len(requests))]

    def _prompt(self, text: str, answer: int) -> Document:
        """The text, without its beginning where prompt and answer are longer than the context."""
        ids = self.model.tokenizer.encode(text)
        room = max(1, self.context - 2 - answer)
        return Document((Segment(text if len(ids) <= room else self.model.tokenizer.decode(ids[-room:])),))


def _sampling(settings: dict[str, Any]) -> Sampling:
    """The harness's generation settings as ours."""
    until = settings.get("until") or []
    return Sampling(
        temperature=float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0,
        top_p=float(settings.get("top_p", 1.0)),
        max_text=int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_TOKENS))),
        stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    )


def evaluate_tasks(
    run: Path,
    tasks: Sequence[str],
    include: Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    checkpoint: str = "last",
    output: Path | None = None,
) -> dict[str, Any]:
    """Task -> metric -> value; also in `output` (default: `evaluation-tasks.json` in the run's folder) and the run's W&B run.

    Args:
        run: folder of a run.
        tasks: names of tasks or groups.
        include: folder with YAML files of own tasks; then only those are known, and nothing is fetched.
        fewshot: solved examples before each question; None: as each task says.
        limit: most documents of each task; None: all.
        checkpoint: see `load_run`.
        output: file to write.

    Raises:
        ValueError: `run` or `checkpoint` is not one, a task is not known, or `lm-eval` is not installed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    config = read_config(run)
    module, data, saved = load_run(run, checkpoint)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    manager = TaskManager(include_path=str(include) if include else None, include_defaults=include is None)
    known: Callable[[str], bool] = set(manager.all_tasks).__contains__
    if unknown := [task for task in tasks if not known(task)]:
        where = f"{str(include)!r} has {', '.join(manager.all_tasks) or 'none'}" if include else "the harness has no such task"
        raise ValueError(f"--tasks {', '.join(unknown)}: {where}")
    language_model = PileLM(module.model, data.context)
    found = simple_evaluate(
        language_model, tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=False,
        bootstrap_iters=1000,
    )  # fmt: skip
    values = {task: metrics_of(metrics) for task, metrics in found["results"].items()}
    result = {
        "run": str(run), "checkpoint": str(find_checkpoint(run, checkpoint)), "step": saved["global_step"],
        "context": data.context, "tasks": values,
    }  # fmt: skip
    flat = {f"{task}/{name}": value for task, metrics in values.items() for name, value in metrics.items()}
    keep(result, flat, output or run / "evaluation-tasks.json", run, config.get("wandb"))
    return result


def metrics_of(found: dict[str, Any]) -> dict[str, float]:
    """`acc,none` and the like -> value, under the name without the filter where that is `none`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and "," in name
    }


def print_tasks(result: dict[str, Any]) -> None:
    """A line for each metric."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", title=f"tasks, step {result['step']:,}")
    table.add_column("value", justify="right")
    for task, metrics in result["tasks"].items():
        for name, value in metrics.items():
            table.add_row(task, name, f"{value:.4f}")
    Console().print(table)
