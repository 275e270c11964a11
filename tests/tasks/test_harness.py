"""EleutherAI's harness over a run: its own metrics, on tasks made from local files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import TinyRun

from pile_app.cli import main
from pile_app.data.tokenizers import load_tokenizer, train_tokenizer
from pile_app.documents import TEXT, Document, Segment
from pile_app.model.fused import FusedLanguageModel
from pile_app.model.generate import Sampling, generate
from pile_app.model.open_weights import HuggingFace
from pile_app.model.score import score_continuations
from pile_app.tasks.harness import PileLM
from pile_app.training.load import load_run
from pile_app.vocabulary import Vocabulary

QUESTIONS = [{"question": f"What follows {n}?", "answers": ["one", f"{n + 1}"], "right": 1} for n in range(6)]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "choices": """
task: choices
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: answers
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "texts": """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "answers": """
task: answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def test_tasks_from_local_files_measure_the_run(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, tasks = tmp_path / "run", tmp_path / "tasks"
    shutil.copytree(tiny_run.folder, run)
    tasks.mkdir()
    (tasks / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text + COMMON.format(file=tasks / "questions.jsonl"))
    main(["evaluate", str(run), "--tasks", "choices,texts", "--include", str(tasks)])
    found = json.loads((run / "evaluation-tasks.json").read_text())["tasks"]
    assert "choices" in capsys.readouterr().out

    model = load_run(run)[0].model
    right = 0
    for question in QUESTIONS:
        prompts = [f"{question['question']}\nAnswer:"] * 2
        one, other = score_continuations(model, prompts, [f" {answer}" for answer in question["answers"]])  # type: ignore[attr-defined]
        right += other.nats < one.nats
    assert found["choices"]["acc"] == pytest.approx(right / 6)
    texts = [str(question["question"]) for question in QUESTIONS]
    nats = sum(score.nats for score in score_continuations(model, [""] * 6, texts))
    assert found["texts"]["bits_per_byte"] == pytest.approx(nats / sum(map(len, texts)) / math.log(2), rel=1e-5)

    for arguments, told in (
        (["--tasks", "other", "--include", str(tasks)], "choices"),
        (["--tasks", "choices", "--on", "a=b.tar"], "not both"),
        (["--limit", "3"], "belong to --tasks"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), *arguments])
        assert told in capsys.readouterr().err


@pytest.fixture(scope="module", params=["own", "open_weights"])
def model(request: pytest.FixtureRequest, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> FusedLanguageModel:
    """A run of a Transformer, and open weights; a token is a byte in both."""
    if request.param == "own":
        return load_run(tiny_run.folder)[0].model
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)
    train_tokenizer(["once upon a time " * 9], "bpe", 256, folder / "tokenizer.json")
    backbone = HuggingFace(str(folder))
    tokenizer = load_tokenizer(str(backbone.tokenizer))
    assert len(tokenizer.encode("once upon a time")) == 16
    return FusedLanguageModel(backbone, tokenizer).eval()


def ask(kind: str, language_model: PileLM, *arguments: tuple[object, ...]) -> list[Any]:
    answers: list[Any] = getattr(language_model, kind)([SimpleNamespace(args=args) for args in arguments])
    return answers


def test_answers_end_at_a_stop_string(model: FusedLanguageModel) -> None:
    prompts = ["What follows 1?", "Who?", "x" * 300]
    settings = {"until": ["q"], "max_gen_toks": 9, "do_sample": False}
    found = ask("generate_until", PileLM(model, 128), *((prompt, settings) for prompt in prompts))
    shown = [*prompts[:2], "x" * (128 - 2 - 9)]
    for prompt, answer in zip(shown, found, strict=True):
        free = generate(model, [Document((Segment(prompt),))], TEXT, Sampling(temperature=0, max_text=9))[0]
        assert answer == free.text.partition("q")[0]


@pytest.mark.parametrize("context", [16, 256])
def test_a_prompt_keeps_half_of_the_context(model: FusedLanguageModel, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks for answers of 256 tokens at any context."""
    seen: list[tuple[str, int]] = []

    def write(model: FusedLanguageModel, prompts: list[Document], to: int, sampling: Sampling) -> list[Segment]:
        seen.extend((str(prompt.segments[0].text), sampling.max_text) for prompt in prompts)
        return [Segment("answer")] * len(prompts)

    monkeypatch.setattr("pile_app.tasks.harness.generate", write)
    question = "".join(chr(97 + n % 26) for n in range(300))
    assert ask("generate_until", PileLM(model, context), (question, {"until": []})) == ["answer"]
    [(prompt, longest)] = seen
    assert question.endswith(prompt) and context // 2 <= len(prompt) and len(prompt) + longest + 2 <= context


def test_a_continuation_longer_than_the_context_is_scored_in_windows(model: FusedLanguageModel) -> None:
    """Each window of half the context sees the half before it."""
    prompt, continuation = "What follows?", "onetwothreefourfivesixseveneightnineten"
    [(log_p, is_greedy)] = ask("loglikelihood", PileLM(model, 20), (prompt, continuation))
    whole = prompt + continuation
    nats = 0.0
    for first in range(len(prompt), len(whole), 10):
        stop = min(first + 10, len(whole))
        [score] = score_continuations(model, [whole[:first]], [whole[first:stop]], 20)
        nats += score.nats
    assert log_p == pytest.approx(-nats, rel=1e-3) and not is_greedy
    texts = ["", "How"]
    short = ask("loglikelihood", PileLM(model, 64), *((text, " many") for text in texts))
    nats_of_each = [score.nats for score in score_continuations(model, texts, [" many"] * 2)]
    assert [-log_p for log_p, _ in short] == pytest.approx(nats_of_each, rel=1e-5)


@pytest.mark.parametrize("model", ["open_weights"], indirect=True)
def test_log_likelihoods_of_open_weights_are_those_of_transformers(model: FusedLanguageModel) -> None:
    assert isinstance(model.backbone, HuggingFace)
    prompt, continuation = "once upon", " a time"
    plain = transformers.LlamaForCausalLM.from_pretrained(model.backbone.path, attn_implementation="eager").eval()
    ids = [Vocabulary.BEGIN, Vocabulary.OPENERS[TEXT], *(model.tokenizer.encode(prompt + continuation) + 6)]
    with torch.no_grad():
        embedded = model.embeddings[TEXT]()[torch.tensor(ids[:-1])][None]
        logits = plain.model(inputs_embeds=embedded).last_hidden_state[0] @ model.heads[TEXT]().T
    log_p = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[-len(continuation) :].sum()
    [(found, _)] = ask("loglikelihood", PileLM(model, 64), (prompt, continuation))
    assert found == pytest.approx(float(log_p), rel=1e-3)
