"""How much text the tasks of a recipe hold, to tell how long they will take; needs no lm-eval."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from layersmith.recipe import EvaluationRecipe
from layersmith.untrusted import parse_json

_CHARACTERS_PER_TOKEN = 4
_LONGEST_LINE = 1024**2


def tokens_of_tasks(recipe: EvaluationRecipe) -> float | None:
    """Tokens of all requests of the recipe's tasks, about; None if a task is not a file."""
    total = 0.0
    for task in recipe.tasks:
        path = Path(task).expanduser()
        if not path.is_file():
            return None
        with open(path, encoding="utf-8", errors="replace") as file:
            total += sum(_characters(line[:_LONGEST_LINE]) for line in islice(file, recipe.task_items))
    return total * (1 + recipe.task_shots) / _CHARACTERS_PER_TOKEN


def _characters(line: str) -> int:
    """Characters that a model reads for an item: its question once for every choice."""
    try:
        item: Any = parse_json(line)
        choices = item["choices"] if "choices" in item else [item["continuation"]]
        question = item["query"] if "query" in item else item["context"]
        return sum(len(question) + len(choice) for choice in choices)
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
