"""The second part of global distillation, on longer rows: its settings, and the rows that it is judged on.

A row of text is cut from documents that follow each other, so consecutive rows are joined to long ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from layersmith.distillation.steps import Steps
from layersmith.distillation.train import hidden_size_of
from layersmith.errors import UsageError
from layersmith.evaluation.compare import RowsToCompare
from layersmith.recipe import LONGER_ROWS, DistillationRecipe
from layersmith.run.progress import Progress
from layersmith.stages.data import DATA
from layersmith.stages.job import Job

# The peak of its learning rate, as a share of that of the first part.
_LOWER = 1 / 3
# Rows of an optimizer step, at least.
_LEAST_ROWS = 4


def is_wanted(job: Job) -> bool:
    settings = job.recipe.distillation
    return bool(settings.tokens and settings.long_tokens)


def require_tokens(settings: DistillationRecipe) -> None:
    """Raises: UsageError: The second part has no first one."""
    if settings.long_tokens and not settings.tokens:
        raise UsageError("recipe distillation.long_tokens: they follow distillation.tokens, which is 0. Set it too.")


def length_of(job: Job) -> int:
    """Tokens of a long row.

    Raises:
        UsageError: The parent's context or the evaluation's text is too short for it, or it is no whole number of rows.
    """
    asked, evaluation = job.recipe.distillation.long_sequence_length, job.read(DATA).evaluation
    length, positions = evaluation.shape[1], job.parent.positions
    if asked is None:
        most = min(LONGER_ROWS * length, evaluation.numel(), positions or LONGER_ROWS * length)
        asked = most // length * length
    where = "recipe distillation.long_sequence_length"
    if asked % length or asked <= length:
        raise UsageError(
            f"{where}: {asked} is not a larger multiple of the rows of the run, which have {length} tokens."
        )
    if positions is not None and asked > positions:
        raise UsageError(f"{where}: {asked} is more than the parent's context of {positions} tokens.")
    if asked > evaluation.numel():
        raise UsageError(
            f"{where}: evaluation has {evaluation.numel():,} tokens, too few for a row of {asked}. Set "
            f"data.evaluation_sequences to {-(-asked // length)} or more."
        )
    return asked


def settings_of(job: Job) -> DistillationRecipe:
    """The section ``distillation`` as the second part follows it."""
    settings = job.recipe.distillation
    tokens, rate = settings.long_tokens, settings.long_learning_rate
    return dataclasses.replace(
        settings,
        tokens=tokens,
        learning_rate=_LOWER * settings.rate(hidden_size_of(job.parent)) if rate is None else rate,
        batch_tokens=settings.batch_tokens or max(settings.step_tokens(tokens), _LEAST_ROWS * length_of(job)),
        eval_every=0,
        cache_top=0,
    )


def check(job: Job) -> Steps:
    """How its tokens are divided into steps.

    Raises:
        UsageError: Its rows are too long, or cannot be shared by the processes.
    """
    settings = settings_of(job)
    return Steps.of(settings, settings.tokens, length_of(job), job.parent.runtime.world_size)


def joined(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Consecutive rows ``[N, T]`` joined to rows ``[M, length]``; what is left over is dropped."""
    count = rows.numel() // length
    return rows.flatten()[: count * length].view(count, length)


def compared(job: Job, child: Any, progress: Progress) -> list[dict[str, Any]]:
    """Rows for the evaluation's table: loss and KL divergence on long rows; all processes work on them together."""
    tokens = joined(job.read(DATA).evaluation, length_of(job))
    rows = RowsToCompare(tokens, job.recipe.scoring.rows_at_once(tokens.shape[1]), job.tokenizer)
    of_all = rows.compare_in_all(job.first_parent.model, child, progress).to_dict()["rows"]
    return [
        row
        | {"metric": f"{row['metric']}_of_long_rows", "label": f"{row['label']}, rows of {tokens.shape[1]:,} tokens"}
        for row in of_all
        if row["metric"] in ("loss", "kl_divergence")
    ]
