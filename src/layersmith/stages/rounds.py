"""Compression in rounds: the job of each round, and what each did.

Each round is a run of all stages, in ``rounds/N`` of the run's folder and the last in the folder itself. Its parent is
the child of the round before, so importance and scores are those of what is left: scores of the first parent tell less
the more of it is gone (Iterative Puzzle, arXiv 2607.04371). What children are compared with and learn from, and what
budgets are fractions of, stays the first parent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from layersmith.costs.budget import Limit, Limits, is_time
from layersmith.errors import UsageError
from layersmith.recipe import EvaluationRecipe, Recipe
from layersmith.run.folder import ROUNDS, Run
from layersmith.stages.costs import check_reachable
from layersmith.stages.distill import DISTILLED
from layersmith.stages.inspect import outline
from layersmith.stages.job import Job, formats_of
from layersmith.stages.realize import CHILD

# Training tokens of a round that is not the last, as a share of those of the last. With a third of all tokens in each
# of three rounds the child is worse than with all in one (docs/how-to/distillation.md).
EARLY = 0.1


def rounds_of(job: Job) -> Iterator[Job]:
    """The jobs of all rounds, in order; one without rounds is its only one.

    Raises:
        UsageError: The budget does not say how large the children of rounds may be.
        Infeasible: No child can meet the budget.
    """
    recipe = job.recipe
    if recipe.rounds.count == 1:
        yield job
        return
    check_rounds(job.limits, recipe)
    space = outline(job.path, recipe.library, job.workload, job.family, job.trust_remote_code, recipe.checkpoint_dtype)
    if not formats_of(recipe):  # in which a child may become smaller still
        check_reachable(space.alternatives, space.costs, job.limits, recipe.search, space.blocks)
    source, first = job.source, None
    for number in range(1, recipe.rounds.count):
        run = Run(job.run.folder / ROUNDS / f"{number}", job.run.store, job.run.verify)
        limits, settings = limits_of_round(job.limits, recipe, number, space.costs.parent), of_round(recipe, number)
        yield dataclasses.replace(job, run=run, source=source, first=first, limits=limits, recipe=settings, _results={})
        stage = DISTILLED if settings.distillation.tokens else CHILD
        source, first = str(run.folder / stage.name), job.source
    yield dataclasses.replace(job, source=source, first=first, _results={})


def place_of(job: Job, run: Path) -> str:
    """The place of a job's folder in the run, which the names of its stages begin with; empty for the run itself."""
    return "" if job.run.folder == run else f"{job.run.folder.relative_to(run).as_posix()}/"


def check_rounds(limits: Limits, recipe: Recipe) -> None:
    """Raises: UsageError: The budget does not say how large the children of rounds may be."""
    if recipe.rounds.count == 1:
        return
    if recipe.rounds.sizes is None and (limits.counted is None or recipe.evaluation.keep or formats_of(recipe)):
        raise UsageError(
            "--rounds: the budget does not say how small the child of each round should be. Say it with rounds.sizes."
        )
    for limit in limits:
        if is_time(limit.cost) and limit.fraction is not None:
            raise UsageError(f"--rounds: give the limit on {limit} as an amount instead of a fraction.")


def limits_of_round(limits: Limits, recipe: Recipe, number: int, costs: Mapping[str, float]) -> Limits:
    """The limits of a round that is not the last: on counted costs, between the first parent's and the budget's.

    Args:
        limits: The budget.
        recipe: The recipe.
        number: Number of the round, from 1.
        costs: Counted costs of the first parent.
    """
    share, sizes = number / recipe.rounds.count, recipe.rounds.sizes
    between = []
    for limit in limits.counted or Limits((Limit("parameters", fraction="1"),)):
        whole, least = costs[limit.cost], limit.resolve(costs[limit.cost])
        falls_to = (least / whole) ** share if whole else 1.0
        amount = whole * (falls_to if sizes is None else sizes[number - 1])
        upper = amount if limits.counted is None else max(least, amount)
        between.append(Limit(limit.cost, amount=float(round(upper))))
    return Limits(tuple(between))


def of_round(recipe: Recipe, number: int) -> Recipe:
    """The recipe of a round that is not the last: its tokens, no formats, no measurements for the report."""
    each = recipe.rounds.tokens
    tokens = int(EARLY * recipe.distillation.tokens) if each is None else each[number - 1]
    return dataclasses.replace(
        recipe,
        distillation=dataclasses.replace(recipe.distillation, tokens=tokens, long_tokens=0),
        costs=dataclasses.replace(recipe.costs, time_child=False),
        evaluation=EvaluationRecipe(),
        completion_tokens=0,
        formats=(),
    )
