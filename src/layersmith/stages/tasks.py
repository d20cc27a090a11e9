"""Accuracy of parent and children on the recipe's tasks, and the share of the parent's that a child must keep.

Let p_i and c_i be the results of parent and child on item i. The share is s = mean(c) / mean(p). Both answer the same
items, so its standard error is that of the mean of c_i - s p_i, divided by mean(p).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.errors import Infeasible, InputError
from layersmith.evaluation.tasks import TaskResult, name_of_task, run_tasks
from layersmith.run import user_cache
from layersmith.run.artifacts import fingerprint
from layersmith.run.progress import Progress
from layersmith.scoring.score import standard_error
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution
from layersmith.stages.data import digest_of
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY

# Children that are measured to find the smallest: the interval of sizes is halved each time.
_TRIES = 6


@dataclass(frozen=True)
class Kept:
    """The share of the parent's accuracy on a task that a child keeps.

    Attributes:
        task: Name of the task.
        share: The share.
        error: Its standard error over items, paired; None for a single item.
        least: The share that was asked for.
    """

    task: str
    share: float
    error: float | None
    least: float

    @property
    def holds(self) -> bool:
        return self.share >= self.least

    def __str__(self) -> str:
        noise = "" if self.error is None else f" ± {self.error:.3f}"
        return f"{self.task} {self.share:.3f}{noise} of the parent's accuracy ({self.least:g} asked)"

    def row(self) -> dict[str, Any]:
        """A row of the evaluation's table."""
        return {
            "metric": f"{self.task}/kept",
            "label": f"{self.task}: share of the parent's accuracy ({self.least:g} asked)",
            "task": self.task, "parent": None, "parent_standard_error": None, "child": self.share,
            "child_standard_error": self.error, "difference": None, "difference_standard_error": None,
            "lower_is_better": False,
        }  # fmt: skip


def task_inputs(job: Job) -> list[Any]:
    """What the results of tasks depend on besides the model."""
    tasks = job.recipe.evaluation.tasks
    return [[digest_of(task) for task in tasks], job.settings("evaluation", without=["keep"])] if tasks else []


def task_results(job: Job, model: Any, digest: str | None, progress: Progress) -> list[TaskResult]:
    """Results of a model on the recipe's tasks; those of a digest are kept in the user's cache."""
    key = fingerprint([digest, *task_inputs(job), job.dtype])
    known = user_cache.read("tasks", key)
    if known is not None:
        return [TaskResult(**result) for result in known]
    results = run_tasks(model, job.tokenizer, job.recipe.evaluation, progress)
    user_cache.write("tasks", key, [dataclasses.asdict(result) for result in results])
    return results


def kept_shares(keep: dict[str, float], parent: Sequence[TaskResult], child: Sequence[TaskResult]) -> list[Kept]:
    """What a child keeps of the parent's accuracy, for each task that must be kept.

    Raises:
        InputError: A task has no accuracy, or the parent's is 0.
    """
    shares = []
    for task, least in keep.items():
        name = name_of_task(task)
        pairs = [(p, c) for p, c in zip(parent, child, strict=True) if p.task == name and p.metric != "perplexity"]
        if not pairs or not pairs[0][0].mean:
            raise InputError(f"--keep {task}: the task has no accuracy, or the parent's is 0. Choose another task.")
        of_parent, of_child = pairs[0]
        share = of_child.mean / of_parent.mean
        rest = [c - share * p for p, c in zip(of_parent.values, of_child.values, strict=True)]
        error = standard_error(rest)
        shares.append(Kept(name, share, None if error is None else error / of_parent.mean, least))
    return shares


def smallest_that_keeps(job: Job, problem: SearchProblem, progress: Progress) -> Solution:
    """The smallest child, by bisection over its parameters, that keeps what the recipe asks of the parent's accuracy.

    The parent keeps everything, so there is always an answer. Children are measured as the library has them; what is
    done after the search makes them better.
    """
    whole = problem.costs.parent["parameters"]
    others = {name: limit for name, limit in problem.limits.items() if name != "parameters"}
    below, above = problem.least("parameters", others) / whole, 1.0
    best = problem.best()
    for _ in range(_TRIES):
        middle = (below + above) / 2
        solution = problem.best({**others, "parameters": int(middle * whole)})
        shares = _shares_of(job, solution, progress)
        holds = all(kept.holds for kept in shares)
        said = "; ".join(map(str, shares))
        progress.note(f"keep: at {middle:.3f} of the parameters {said}: {'kept' if holds else 'not kept'}")
        if holds:
            best, above = solution, middle
        else:
            below = middle
    return best


def _shares_of(job: Job, solution: Solution, progress: Progress) -> list[Kept]:
    digest = fingerprint([job.made_from(LIBRARY), [a.key for a in solution.alternatives]])
    parent = task_results(job, job.first_parent.model, job.first_parent.identity, progress)
    child = job.read(LIBRARY).compose(solution.alternatives)
    return kept_shares(job.recipe.evaluation.keep, parent, task_results(job, child, digest, progress))


def check_kept(job: Job, rows: Sequence[dict[str, Any]]) -> None:
    """Check the finished child.

    Raises:
        Infeasible: It keeps less of the parent's accuracy than was asked for.
    """
    for task, least in job.recipe.evaluation.keep.items():
        name = name_of_task(task)
        row = next((row for row in rows if row["metric"] == f"{name}/kept"), None)
        if row is not None and row["child"] < least:
            kept = Kept(name, row["child"], row["child_standard_error"], least)
            raise Infeasible(
                f"Infeasible: the best child within the budget keeps {kept}. It is in {job.run.folder / 'child'}. "
                "Ask for less, or for a larger child."
            )
