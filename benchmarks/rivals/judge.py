"""Evaluation of a child: KL and loss on held-out text of two kinds, and accuracy on tasks.

Everything is kept by row or item, so that two children can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from layersmith.evaluation.tasks import run_tasks
from layersmith.execution.exchange import forward
from layersmith.execution.parent import Parent
from layersmith.recipe import EvaluationRecipe
from layersmith.scoring.score import standard_error


@dataclass(frozen=True)
class Tasks:
    """Files of tasks, and how many items of each are taken."""

    files: Sequence[Path]
    items: int


class Judge:
    """Evaluates children on the same rows and items.

    Args:
        parent: The parent.
        tokenizer: Its tokenizer.
        texts: Rows ``[N, T]`` by the name of the text.
        tasks: The tasks.
        folder: Keeps the parent's hidden states, for other calls.
    """

    def __init__(self, parent: Parent, tokenizer: Any, texts: Mapping[str, torch.Tensor], tasks: Tasks, folder: Path):
        self.parent, self.tokenizer, self.texts = parent, tokenizer, texts
        self.recipe = EvaluationRecipe(tasks=tuple(map(str, tasks.files)), task_items=tasks.items)
        self.read = {name: self._read(rows, folder) for name, rows in texts.items()}

    def _read(self, rows: torch.Tensor, folder: Path) -> torch.Tensor:
        """What the parent's head reads, ``[N, T, D]``: its logits would take 85 times the memory."""
        digest = hashlib.sha256(self.parent.identity.encode() + rows.numpy().tobytes()).hexdigest()[:16]
        file = folder / f"parent-{digest}.safetensors"
        if not file.is_file():
            save_file({"read": torch.cat([forward(self.parent, row[None])[1] for row in rows]).clone()}, file)
        return load_file(file)["read"]

    @torch.inference_mode()
    def on_text(self, child: PreTrainedModel) -> dict[str, dict[str, list[float]]]:
        """KL and loss of every row, in nats a token."""
        result: dict[str, dict[str, list[float]]] = {}
        for name, rows in self.texts.items():
            of_text = result.setdefault(name, {"kl": [], "loss": []})
            for ids, read in zip(rows, self.read[name], strict=True):
                p = self.parent.head(read).float().log_softmax(-1)
                q = child(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
                of_text["kl"].append(float((p.exp() * (p - q)).sum(-1).mean()))
                of_text["loss"].append(float(-q[:-1].gather(-1, ids[1:, None]).mean()))
        return result

    def on_tasks(self, child: PreTrainedModel) -> dict[str, list[float]]:
        """What each task's metrics average, by ``task/metric``."""
        if not self.recipe.tasks:
            return {}
        results = run_tasks(child, self.tokenizer, self.recipe)
        return {f"{r.task}/{r.metric}": r.values for r in results}


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def over_seeds(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean over seeds of each row of text."""
    return [mean(values) for values in zip(*runs, strict=True)]


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences and its standard error."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return mean(differences), standard_error(differences) or math.inf
