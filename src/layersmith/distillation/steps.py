"""How training tokens are cut into optimizer steps, and the order of rows.

Neither depends on the number of processes: two processes train on the rows of each step that one would train on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from layersmith.errors import UsageError
from layersmith.recipe import DistillationRecipe


@dataclass(frozen=True)
class Steps:
    """How tokens are cut into steps.

    Attributes:
        rows: Rows of one optimizer step, over all processes.
        rows_at_once: Rows of one forward pass of one process.
        accumulated: Forward passes of one process in a step.
        count: Number of steps.
        tokens: Tokens of one step.
    """

    rows: int
    rows_at_once: int
    accumulated: int
    count: int
    tokens: int

    @staticmethod
    def of(recipe: DistillationRecipe, tokens: int, length: int, world_size: int = 1) -> Steps:
        """Steps for rows of ``length`` tokens.

        Raises:
            UsageError: The rows of a step cannot be divided by the number of processes, or of their groups.
        """
        rows, sharing = max(1, recipe.step_tokens(tokens) // length), groups(recipe, world_size)
        if rows % sharing:
            who = "processes" if sharing == world_size else f"groups of {recipe.tensor_parallel} processes"
            raise UsageError(
                f"recipe distillation.batch_tokens: {rows} rows of {length} tokens cannot be shared by {sharing} "
                f"{who}. Make it {max(1, round(rows / sharing)) * sharing * length}."
            )
        rows_of_process = rows // sharing
        most = max(1, recipe.device_tokens // length)
        at_once = max(n for n in range(1, rows_of_process + 1) if rows_of_process % n == 0 and n <= most)
        return Steps(
            rows=rows,
            rows_at_once=at_once,
            accumulated=rows_of_process // at_once,
            count=max(1, math.ceil(tokens / (rows * length))),
            tokens=rows * length,
        )


def groups(recipe: DistillationRecipe, world_size: int) -> int:
    """Number of processes, or of groups of them, that have different rows.

    Raises:
        UsageError: The processes cannot be divided into groups of ``distillation.tensor_parallel``.
    """
    if world_size % recipe.tensor_parallel:
        count = "1 process is" if world_size == 1 else f"{world_size} processes are"
        raise UsageError(
            f"recipe distillation.tensor_parallel: {count} not a multiple of {recipe.tensor_parallel}. Start a "
            "multiple with torchrun, or set it to 1."
        )
    return world_size // recipe.tensor_parallel


class RowOrder(Dataset):
    """``count`` rows in the order of training: all rows in one random order, then all in another, to the end."""

    def __init__(self, rows: torch.Tensor, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(count / len(rows)))]
        self.rows, self.order = rows, torch.cat(orders)[:count]

    def for_each_of(self, processes: int, rows_at_once: int) -> RowOrder:
        """The same, but every batch is there for each of some processes; an incomplete last batch is left out."""
        if processes > 1:
            batches = self.order[: len(self.order) // rows_at_once * rows_at_once].view(-1, rows_at_once)
            self.order = batches.repeat_interleave(processes, 0).flatten()
        return self

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.order[index]
        return {"input_ids": self.rows[row].long(), "row": row}


def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch."""
    return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}
