"""A run behind the interface of EleutherAI's evaluation harness (extra `lm-eval`).

    pile evaluate runs/mine --tasks my_task --include my_tasks/      own tasks in YAML files, with local data
    pile evaluate runs/mine --tasks arc_easy,hellaswag               tasks of the harness, which downloads their data

A prompt that is too long for the run's context loses its beginning. Long texts are scored in windows of the context.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pile_app.documents import TEXT, Document, Segment
from pile_app.model.generate import Sampling, generate
from pile_app.model.score import rolling_scores, score_tokens
from pile_app.prepare.options import require
from pile_app.tasks.evaluate import print_table, save_figures
from pile_app.training.load import find_checkpoint, load_on, read_config
from pile_app.vocabulary import Vocabulary

HARNESS = require("lm_eval.api.model", "lm-eval", "evaluating on tasks of the harness")

MAX_TOKENS = 256  # of a generated answer, unless a task says otherwise


class PileLM(HARNESS.TemplateLM):  # type: ignore[name-defined]
    """A model in evaluation mode, trained with `context` tokens, as the harness asks it, `batch` prompts at a time."""

    eot_token_id = Vocabulary.END
    prefix_token_id = Vocabulary.OPENERS[TEXT]

    def __init__(self, model: Any, context: int, batch: int = 32) -> None:
        super().__init__()
        self.model, self.context, self.batch = model, context, batch

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return [int(token) + Vocabulary.SPECIALS for token in self.model.tokenizer.encode(string)]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding writes it) of each continuation, in windows if it fills the context."""
        spans, owners = [], []
        for index, (_, prompt, continuation) in enumerate(requests):
            text = [token for token in prompt + continuation if token >= Vocabulary.SPECIALS]
            tokens = [Vocabulary.BEGIN, self.prefix_token_id, *text]
            stop = len(tokens)
            first = stop - len(continuation)
            size = len(continuation) if len(continuation) < self.context else self.context // 2
            for begin in range(first, stop, max(1, size)):
                end = min(begin + size, stop)
                spans.append((tokens[max(0, end - self.context) : begin], tokens[begin:end]))
                owners.append(index)
        found: dict[int, list[Any]] = defaultdict(list)
        for owner, score in zip(owners, score_tokens(self.model, spans), strict=True):
            found[owner].append(score)
        scores = [found[index] for index in range(len(requests))]
        return [(-sum(score.nats for score in some), all(score.is_greedy for score in some)) for some in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each request's text."""
        return [-sum(score.nats for score in rolling_scores(self.model, r.args[0], self.context)) for r in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each request's context up to the first of its stop strings; the prompt keeps half of the context."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        answers: dict[int, str] = {}
        for settings, indices in groups.items():
            sampling = self._sampling(json.loads(settings))
            room = self.context - 2 - sampling.max_text
            for first in range(0, len(indices), self.batch):
                some = indices[first : first + self.batch]
                texts = [self._end(requests[index].args[0], room) for index in some]
                prompts = [Document((Segment(text),)) for text in texts]
                answers |= {i: a.text for i, a in zip(some, generate(self.model, prompts, TEXT, sampling), strict=True)}
        return [answers[index] for index in range(len(requests))]

    def _end(self, text: str, room: int) -> str:
        ids = self.model.tokenizer.encode(text)
        return text if len(ids) <= room else str(self.model.tokenizer.decode(ids[-room:]))

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """The harness's generation settings as ours."""
        until = settings.get("until") or []
        longest = int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_TOKENS)))
        return Sampling(
            temperature=float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            max_text=max(1, min(longest, self.context // 2 - 2)),
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )


def evaluate_tasks(
    run: Path, tasks: Sequence[str], include: Path | None = None, fewshot: int | None = None, limit: int | None = None,
    checkpoint: str = "auto", output: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run on tasks: task -> metric -> value; save them as JSON and in the summary of its W&B run. With `include`, a
    folder of own tasks, only those are known. Raises ValueError if there is no such run, checkpoint or task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    config = read_config(run)
    module, data, saved = load_on(run, checkpoint)
    manager = TaskManager(include_path=str(include) if include else None, include_defaults=include is None)
    if unknown := [task for task in tasks if task not in set(manager.all_tasks)]:
        where = f"{str(include)!r} has {', '.join(manager.all_tasks) or 'none'}" if include else "the harness has no such task"
        raise ValueError(f"--tasks {', '.join(unknown)}: {where}")
    found = simple_evaluate(
        PileLM(module.model, data.context), tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager,
        log_samples=False, bootstrap_iters=1000,
    )  # fmt: skip
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, int | float) and "," in name:
                values[task][name.removesuffix(",none")] = float(value)
    result = {
        "run": str(run), "checkpoint": str(find_checkpoint(run, checkpoint)), "step": saved["global_step"],
        "context": data.context, "tasks": values,
    }  # fmt: skip
    flat = {f"{task}/{name}": value for task, metrics in values.items() for name, value in metrics.items()}
    save_figures(result, flat, output or run / "evaluation-tasks.json", run, config.get("wandb"))
    return result


def print_tasks(result: dict[str, Any]) -> None:
    """Print a line a metric."""
    rows = [[task, name, f"{value:.4f}"] for task, metrics in result["tasks"].items() for name, value in metrics.items()]
    print_table(f"tasks, step {result['step']:,}", ["task", "metric", "value"], rows)
