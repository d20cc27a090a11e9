"""Accuracy on tasks, measured with lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

A task is given by its name in lm-eval, or by a JSONL file in one of the formats of ``task_formats``.
Results are kept item by item, so that differences between two models are paired.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from transformers import PreTrainedModel

from layersmith.errors import InputError, UsageError
from layersmith.evaluation.choices import Answer, agree, answers, in_batches, questions
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.recipe import EvaluationRecipe
from layersmith.run.progress import SILENT, Progress
from layersmith.scoring.score import standard_error
from layersmith.untrusted import parse_json

# Format of a JSONL file => fields by which it is recognized.
_FORMATS = {"multiple_choice": {"query", "choices", "gold"}, "continuation": {"context", "continuation"}}
_LABELS = {"acc": "accuracy", "acc_norm": "accuracy by length-normalized likelihood", "exact_match": "exact match"}
# What a task may be called, so that lm-eval does not take the name for a file.
_NAME = re.compile(r"[\w.+-]+")
# Characters of a line that are read to see the format of a file.
_LONGEST_LINE = 1024**2
# Sequences in one forward pass; longer ones come first, so this bounds the memory for logits.
_BATCH = 16


@dataclass(frozen=True)
class TaskResult:
    """One metric of a model on one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric in lm-eval, e.g. ``acc``; ``perplexity`` is that of the right continuation.
        values: One for each item. For ``perplexity`` the log-likelihood in nats, else what the metric averages.
        chance: What guessing would give; None if the task is not multiple choice.
    """

    task: str
    metric: str
    values: list[float]
    chance: float | None

    @property
    def mean(self) -> float:
        """The metric over all items."""
        mean = math.fsum(self.values) / len(self.values)
        return math.exp(min(-mean, 700.0)) if self.metric == "perplexity" else mean

    @property
    def error(self) -> float | None:
        """Its standard error over items, for perplexity to first order."""
        error = standard_error(self.values)
        return error if error is None or self.metric != "perplexity" else self.mean * error


def require_tasks(tasks: Sequence[str]) -> None:
    """Check before any work that lm-eval is there and that files of tasks can be read.

    Raises:
        UsageError: lm-eval is not installed.
        InputError: A task is neither a name nor a file, or its file is missing or in another format.
    """
    if tasks and find_spec("lm_eval") is None:
        raise UsageError("tasks are evaluated with lm-eval, which is not installed: pip install 'layersmith[tasks]'")
    for task in tasks:
        _definition(task)


def run_tasks(
    model: PreTrainedModel, tokenizer: Any, recipe: EvaluationRecipe, progress: Progress = SILENT
) -> list[TaskResult]:
    """Evaluate a model on the recipe's tasks.

    Raises:
        InputError: lm-eval does not know a task, or cannot get its data.
    """
    require_tasks(recipe.tasks)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with _quiet_lm_eval():
        definitions = [_definition(task) for task in recipe.tasks]
        by_name = any(isinstance(definition, str) for definition in definitions)
        with foreign_code("can lm-eval evaluate these tasks?", refusal_is_answer=True) as attempt:
            found = simple_evaluate(
                model=_counted(model, tokenizer, progress),
                tasks=definitions,
                task_manager=TaskManager(include_defaults=by_name),
                num_fewshot=recipe.task_shots or None,
                limit=recipe.task_items,
                bootstrap_iters=0,
                log_samples=True,
                verbosity=None,
            )
    if attempt.failed:
        raise InputError(f"tasks {', '.join(recipe.tasks)}: lm-eval cannot run them ({attempt.reason}).") from (
            attempt.error
        )
    results = []
    for definition in definitions:
        name = definition if isinstance(definition, str) else definition["task"]
        results += list(_results(name, found))
    return results


def _results(name: str, found: dict[str, Any]) -> Iterator[TaskResult]:
    """Results of a task, or of all tasks of a group together."""
    leaves = [name] if name in found["samples"] else _leaves(name, found["group_subtasks"])
    samples = [sample for leaf in leaves for sample in found["samples"][leaf]]
    for metric in dict.fromkeys(name for sample in samples for name in sample["metrics"]):
        values = [sample[metric] for sample in samples if metric in sample]
        if not all(isinstance(value, int | float) for value in values):
            continue  # an aggregate of more than one number an item
        choices = [len(sample["arguments"]) for sample in samples]
        chance = sum(1 / n for n in choices) / len(choices) if metric.startswith("acc") and min(choices) > 1 else None
        yield TaskResult(name, metric, [float(value) for value in values], chance)


def _leaves(group: str, children: dict[str, list[str]]) -> list[str]:
    return [
        leaf for child in children[group] for leaf in (_leaves(child, children) if children.get(child) else [child])
    ]


def task_rows(parent: Sequence[TaskResult], child: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Rows for the evaluation's table; ``parent`` may be the same results as ``child``, for a model on its own."""
    return [_row(before, after) for before, after in zip(parent, child, strict=True)]


def _row(before: TaskResult, after: TaskResult) -> dict[str, Any]:
    differences = [a - b for a, b in zip(after.values, before.values, strict=True)]
    error = standard_error(differences)
    if after.metric == "perplexity" and error is not None:
        error *= after.mean  # d exp(x) = exp(x) dx
    chance = "" if after.chance is None else f", chance {after.chance:.2f}"
    return {
        "metric": f"{after.task}/{after.metric}",
        "label": f"{after.task}: {_LABELS.get(after.metric, after.metric)} ({len(after.values):,} items{chance})",
        "task": after.task,
        "parent": before.mean,
        "parent_standard_error": before.error,
        "child": after.mean,
        "child_standard_error": after.error,
        "difference": after.mean - before.mean,
        "difference_standard_error": error,
        "lower_is_better": after.metric == "perplexity",
    }


# ---------------------------------------------------------------------------------------------- definitions


def name_of_task(task: str) -> str:
    """The name of a task in results: of a JSONL file its own without the ending."""
    path = Path(task)
    return path.stem if path.suffix in (".jsonl", ".json") else task


def _definition(task: str) -> str | dict[str, Any]:
    """A task as lm-eval takes it: a name, or a definition that reads a JSONL file.

    lm-eval also takes its own YAML files. Those are refused: it runs code in them, and a recipe may come with the run
    folder of someone else.
    """
    path = Path(task).expanduser()
    if path.suffix not in (".jsonl", ".json"):
        if not _NAME.fullmatch(task) or path.suffix in (".yaml", ".yml"):
            raise InputError(f"{task}: not a task. Give the name of a task in lm-eval, or a JSONL file.")
        return task
    if not path.is_file():
        raise InputError(f"{task}: no such file. Give the name of a task in lm-eval, or a JSONL file.")
    name = _format_of(path)
    text = files("layersmith.evaluation").joinpath("task_formats", f"{name}.yaml").read_text(encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}}
    return {"task": name_of_task(task), **data, "test_split": "test", **yaml.safe_load(text)}


def _format_of(path: Path) -> str:
    """The format of a JSONL file, by the fields of its first line."""
    try:
        with open(path, encoding="utf-8") as file:
            first = parse_json(file.readline(_LONGEST_LINE))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its first line is not JSON ({error}).") from error
    fields = set(first) if isinstance(first, dict) else set()
    for name, wanted in _FORMATS.items():
        if wanted <= fields:
            return name
    known = " or ".join(", ".join(sorted(wanted)) for wanted in _FORMATS.values())
    raise InputError(f"{path}: a task file needs the fields {known} in each line.")


# ---------------------------------------------------------------------------------------------- lm-eval


def _counted(model: PreTrainedModel, tokenizer: Any, progress: Progress) -> Any:
    """The model for lm-eval, which shows progress as ours."""
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):
        """Reads a context once for all of its continuations, and shows progress."""

        advance: Callable[[float], object]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with progress.stage("tasks", len(requests), "requests") as self.advance:
                return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[Answer]:
            known = _shared(model, requests, self.max_length, super()._loglikelihood_tokens, self.advance)
            for place, answer in known.items():
                self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
            rest = [request for i, request in enumerate(requests) if i not in known]
            others = iter(super()._loglikelihood_tokens(rest, *args, **kwargs) if rest else ())
            return [known[i] if i in known else next(others) for i in range(len(requests))]

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            self.advance(len(inps))
            return super()._model_call(inps, *args, **kwargs)

    with quiet_transformers():
        return Counted(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)


def _shared(
    model: PreTrainedModel,
    requests: Sequence[tuple[Any, list[int], list[int]]],
    longest: int,
    one_by_one: Callable[..., list[Answer]],
    advance: Callable[[float], object],
) -> dict[int, Answer]:
    """Answers to the requests that share their context with others, by their places.

    The first batch is also answered by lm-eval. If that does not agree, or the model has no cache that can be repeated,
    lm-eval answers all.
    """
    result: dict[int, Answer] = {}
    for batch in in_batches(questions(requests, longest), _BATCH):
        made = None
        with foreign_code("can a context be read once?", refusal_is_answer=True):
            made = answers(model, batch)
        if made is None:
            return {}
        if result:
            advance(len(made))
        elif not agree(list(made.values()), one_by_one([requests[i] for i in made]), model.dtype):
            return {}
        result |= made
    return result


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Keep what lm-eval and its data sets print off the screen; errors are raised."""
    import datasets
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    try:
        datasets.disable_progress_bars()
        with quiet_transformers(), patch.object(task, "tqdm", lambda items, **how: items):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
