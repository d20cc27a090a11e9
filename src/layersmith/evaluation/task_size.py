"""How much text the tasks of a recipe hold, to tell how long they will take; needs no lm-eval."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from layersmith.recipe import EvaluationRecipe
from layersmith.untrusted import parse_json

_CHARACTERS_PER_TOKEN = 4
_LONGEST_LINE = 1024**2
# A token of a choice takes as long as this many of a question: choices are short, and padded to the longest. Measured
# on the two tasks of the SmolLM2 demo, with one thread.
_OF_A_CHOICE = 2.3


def tokens_of_tasks(recipe: EvaluationRecipe) -> float | None:
    """Tokens of a forward pass that take as long as the recipe's tasks, about; None if a task is not a file."""
    total = 0.0
    for task in recipe.tasks:
        path = Path(task).expanduser()
        if not path.is_file():
            return None
        with open(path, encoding="utf-8", errors="replace") as file:
            total += sum(_characters(line[:_LONGEST_LINE]) for line in islice(file, recipe.task_items))
    return total * (1 + recipe.task_shots) / _CHARACTERS_PER_TOKEN


def _characters(line: str) -> float:
    """Characters that a model reads for an item: its question once, and every choice, which takes longer."""
    try:
        item: Any = parse_json(line)
        choices = item["choices"] if "choices" in item else [item["continuation"]]
        question = item["query"] if "query" in item else item["context"]
        return len(question) + (_OF_A_CHOICE if len(choices) > 1 else 1) * sum(map(len, choices))
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
