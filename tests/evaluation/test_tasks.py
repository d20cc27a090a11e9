"""Tasks: formats of files, paired noise, and agreement with likelihoods that are computed here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layersmith
from layersmith.errors import InputError, UsageError
from layersmith.evaluation.choices import answers, in_batches, questions
from layersmith.evaluation.tasks import TaskResult, require_tasks, run_tasks, task_rows
from layersmith.recipe import EvaluationRecipe
from tests.conformance.tiny import tiny_config
from tests.conftest import TINY_RECIPE, stock_model

ITEMS = [
    {"query": "import os", "choices": ["def read(path):", "class Tree:", "return"], "gold": 2},
    {"query": "Question: what does len return?", "choices": ["a number", "a list of strings"], "gold": 0},
    {"query": "for name in", "choices": ["names:", "0x"], "gold": 0},
]


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return file


def test_differences_are_paired_by_item() -> None:
    before = TaskResult("quiz", "acc", [1.0, 1.0, 0.0, 1.0], 0.25)
    after = TaskResult("quiz", "acc", [1.0, 0.0, 0.0, 1.0], 0.25)
    (row,) = task_rows([before], [after])
    assert (row["parent"], row["child"], row["difference"]) == (0.75, 0.5, -0.25)
    assert row["difference_standard_error"] == pytest.approx(0.25)  # of 0, -1, 0, 0
    assert "4 items, chance 0.25" in row["label"]


def test_perplexity_is_of_the_mean_log_likelihood() -> None:
    result = TaskResult("story", "perplexity", [-1.0, -3.0], None)
    assert result.mean == pytest.approx(math.exp(2))
    assert result.error == pytest.approx(math.exp(2))  # the standard error of the mean is 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", "", "not JSON"),
        ("other.jsonl", '{"question": "?"}\n', "needs the fields"),
        ("code.yaml", "task: mine\n", "not a task"),
        ("folder", None, "not a task"),
        ("deep.jsonl", "[" * 100_000, "not JSON"),
    ],
)
def test_files_in_other_formats_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, words: str
) -> None:
    monkeypatch.setattr("layersmith.evaluation.tasks.find_spec", lambda package: object())
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        require_tasks([str(tmp_path / name)])


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersmith.evaluation.tasks.find_spec", lambda package: None)
    with pytest.raises(UsageError, match=r"pip install 'layersmith\[tasks\]'"):
        require_tasks(["arc_easy"])
    require_tasks([])


# ---------------------------------------------------------------------------------------------- with lm-eval


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    prompt, whole = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
    with torch.inference_mode():
        scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(scores[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))


def test_accuracy_is_that_of_likelihoods(choices: Path, make_parent: Callable[..., Path], tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    model = layersmith.load(make_parent("llama"))
    results = run_tasks(model, tokenizer, EvaluationRecipe(tasks=(str(choices),)))
    accuracy = next(result for result in results if result.metric == "acc")
    expected = []
    for item in ITEMS:
        context = item["query"] + ("\nAnswer:" if str(item["query"]).startswith("Question:") else "")
        scores = [log_likelihood(model, tokenizer, str(context), f" {choice}") for choice in item["choices"]]
        expected.append(float(scores.index(max(scores)) == item["gold"]))
    assert accuracy.values == expected
    assert accuracy.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


@pytest.mark.parametrize(
    ("family", "is_shared"), [("llama", True), ("gpt2", True), ("mixtral", True), ("bamba", False)]
)
def test_contexts_are_read_once(family: str, is_shared: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Likelihoods are those of whole sequences; where a cache cannot be repeated, every sequence is read."""
    pytest.importorskip("lm_eval")
    config = tiny_config(family)
    config.vocab_size = len(tokenizer)
    model = stock_model(config)
    query = "def read(path):\n    return path.read_text()\n\nimport os"
    items = [
        {"query": query + i * " name", "choices": ["a", "a list of names", "0x", "names:"], "gold": 0} for i in range(6)
    ]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    read = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal read
        read += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    results = run_tasks(model, tokenizer, EvaluationRecipe(tasks=(str(file),)))
    handle.remove()
    whole = expected = 0
    for item in items:
        scores = [log_likelihood(model, tokenizer, str(item["query"]), f" {choice}") for choice in item["choices"]]
        expected += scores.index(max(scores)) == 0
        whole += sum(len(tokenizer(f"{item['query']} {choice}")["input_ids"]) for choice in item["choices"])
    assert next(result for result in results if result.metric == "acc").mean == expected / len(items)
    assert (read < 0.75 * whole) == is_shared  # lm-eval itself reads the first batch too


def test_answers_are_those_of_whole_sequences() -> None:
    """Two contexts of one length, one of another, and one that nobody shares."""
    model = stock_model(tiny_config("llama"))
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 100, (count,), generator=generator).tolist()

    contexts = [tokens(12), tokens(12), tokens(15)]
    requests = [(None, c, tokens(n)) for c in contexts for n in (1, 3, 2)] + [(None, tokens(9), tokens(2))]
    asked = questions(requests, 17)
    assert [question.places for question in asked] == [[0, 1, 2], [3, 4, 5]]  # 15 and 3 tokens are too long
    batches = list(in_batches(questions(requests, 64), 6))
    assert [[q.places[0] for q in batch] for batch in batches] == [[6], [0, 3]]
    known = {place: answer for batch in batches for place, answer in (answers(model, batch) or {}).items()}
    assert sorted(known) == list(range(9))
    for place, (likelihood, is_greedy) in known.items():
        _, context, continuation = requests[place]
        with torch.inference_mode():
            scores = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert likelihood == pytest.approx(
            sum(float(s[t]) for s, t in zip(scores, continuation, strict=True)), abs=1e-4
        )
        assert is_greedy == (scores.argmax(-1).tolist() == continuation)


def test_a_run_reports_tasks(
    choices: Path, make_parent: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    recipe = TINY_RECIPE | {"evaluation": {"tasks": [str(choices)], "task_items": 2}}
    out = tmp_path / "run"
    result = layersmith.compress(make_parent("llama"), out, data=text_folder, budget=0.8, recipe=recipe)
    assert result.metric("choices/acc")["task"] == "choices"
    card = (result.child / "README.md").read_text()
    assert "choices: accuracy (2 items" in card
    assert "name: choices" in card
    assert "choices: accuracy (2 items" in result.report.read_text()


def test_names_that_lm_eval_does_not_know_are_refused(make_parent: Callable[..., Path], tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    model = layersmith.load(make_parent("llama"))
    with pytest.raises(InputError, match="cannot run them"):
        run_tasks(model, tokenizer, EvaluationRecipe(tasks=("no_such_task",)))


def test_a_child_keeps_a_share_of_the_accuracy(
    make_parent: Callable[..., Path], tokenizer: Any, text_folder: Path, tmp_path: Path
) -> None:
    """The right choices are those that the parent prefers, so that its accuracy is 1."""
    pytest.importorskip("lm_eval")
    model = layersmith.load(make_parent("llama"))
    words = ["return self", "import os", "class Tree:", "def read(path):", "for name in names:", "None", "0x", "else:"]
    lines = []
    for i, query in enumerate(words):
        choices = [words[(i + k) % len(words)] for k in (1, 3)]
        scores = [log_likelihood(model, tokenizer, query, f" {choice}") for choice in choices]
        lines.append(json.dumps({"query": query, "choices": choices, "gold": scores.index(max(scores))}) + "\n")
    file = tmp_path / "preferred.jsonl"
    file.write_text("".join(lines))
    recipe = TINY_RECIPE | {"evaluation": {"tasks": [str(file)], "keep": {str(file): 0.5}}}
    out = tmp_path / "run"
    result = layersmith.compress(make_parent("llama"), out, data=text_folder, budget="1.0", recipe=recipe)
    assert result.metric("preferred/acc")["parent"] == 1.0
    assert result.metric("preferred/kept")["child"] >= 0.5
    assert result.solution.costs["parameters"] < result.solution.parent_costs["parameters"]
