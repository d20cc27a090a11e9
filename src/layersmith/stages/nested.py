"""Nested children of a finished run: one checkpoint for several sizes, and what nesting costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersmith.costs.budget import Budget, Limits, parse_limit
from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.local import distill_locally
from layersmith.errors import UsageError
from layersmith.evaluation.compare import RowsToCompare
from layersmith.heterogeneous.checkpoint import save
from layersmith.heterogeneous.nested import NESTED, SIZES, write_parts
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import SearchRecipe
from layersmith.report.card import Child, model_card
from layersmith.report.words import with_noise
from layersmith.run.artifacts import refuse_existing, write_json, write_text
from layersmith.run.cards import CARD
from layersmith.run.progress import SILENT, Callback, Progress, progress_of
from layersmith.scoring.score import standard_error
from layersmith.search.nested import nested
from layersmith.search.solution import Solution
from layersmith.stages.data import DATA
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.reopen import SearchRequest
from layersmith.tables import Shown, Table
from layersmith.units import format_bytes


@dataclass(frozen=True)
class NestedSize:
    """One of the nested children, and the best child of the same budget by itself.

    Attributes:
        name: The budget.
        solution, alone: Both solutions.
        kl, kl_alone: KL divergence of both children to the parent on the evaluation rows, in nats a token; None if it
            was not measured.
        kl_price, kl_price_error: The difference, and its standard error over rows.
        separate_bytes: Bytes of tensors that the checkpoint holds for this size alone; None if none was written.
    """

    name: str
    solution: Solution
    alone: Solution
    kl: float | None = None
    kl_alone: float | None = None
    kl_price: float | None = None
    kl_price_error: float | None = None
    separate_bytes: int | None = None


@dataclass(frozen=True, repr=False)
class NestedChildren(Shown):
    """Nested children of several sizes, from the largest to the smallest.

    Attributes:
        sizes: The sizes.
        proven_optimal: Whether no nested solutions have a lower sum of scores over all sizes.
        bound: No nested solutions have a lower sum.
        child: Folder of the checkpoint, if one was written.
    """

    sizes: tuple[NestedSize, ...]
    proven_optimal: bool
    bound: float
    child: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """What ``nested.json`` holds."""
        rows = [
            {
                "name": size.name,
                "parameters": size.solution.costs["parameters"],
                "score": size.solution.score,
                "score_alone": size.alone.score,
                "kl": size.kl,
                "kl_alone": size.kl_alone,
                "kl_price": size.kl_price,
                "kl_price_error": size.kl_price_error,
                "separate_bytes": size.separate_bytes,
            }
            for size in self.sizes
        ]
        return {"sizes": rows, "proven_optimal": self.proven_optimal, "bound": self.bound}

    def tables(self) -> list[Table]:
        """The price of nesting at every size."""
        headings = ["size", "parameters", "sum of scores", "alone", "price"]
        measured = self.sizes[0].kl is not None
        headings += ["KL", "KL alone", "price of KL"] if measured else []
        headings += ["separate tensors"] if self.child is not None else []
        rows = []
        for size in self.sizes:
            score, alone = size.solution.score, size.alone.score
            row = [size.name, f"{size.solution.costs['parameters']:,}", f"{score:.4f}", f"{alone:.4f}"]
            row.append(f"{score / alone - 1:+.1%}" if alone else "")
            if size.kl is not None and size.kl_alone is not None and size.kl_price is not None:
                row += [f"{size.kl:.4f}", f"{size.kl_alone:.4f}", with_noise(size.kl_price, size.kl_price_error)]
            rows.append([*row, format_bytes(size.separate_bytes)] if size.separate_bytes is not None else row)
        proof = "proven optimal for these scores" if self.proven_optimal else f"no sum below {self.bound:.4f}"
        return [Table(f"nested children ({proof})", headings, rows, is_numeric=True)]

    def __repr__(self) -> str:
        return f"NestedChildren({', '.join(size.name for size in self.sizes)}, child={self.child})"


def nested_children(
    request: SearchRequest,
    sizes: Sequence[str],
    *,
    out: Path | None = None,
    measure: bool = False,
    progress: Progress = SILENT,
) -> NestedChildren:
    """Nested children of a finished run, of several sizes.

    Args:
        request: The run, and limits that hold for all sizes.
        sizes: Limits on the parameters of each, such as ``0.8`` or ``7B``; their names are these words.
        out: New folder for the checkpoint; default: none is written.
        measure: Also compare each child, and the best one of its budget by itself, with the parent on the run's
            evaluation rows.
        progress: Receives steps and notes.

    Raises:
        Infeasible: No child of the run's library is within one of the budgets.
        InputError: The run is not finished, or ``out`` exists.
        UsageError: An argument is wrong.
    """
    if out is not None:
        refuse_existing(out)
    limits = {text.strip(): parse_limit("parameters", text.strip()) for text in sizes}
    job, problem = dataclasses.replace(request, formats=()).open(progress)
    whole = problem.costs.parent["parameters"]
    names = sorted(limits, key=lambda name: -limits[name].resolve(whole))
    if len({limits[name].resolve(whole) for name in names}) < max(2, len(sizes)):
        raise UsageError(f"--nested {','.join(sizes)}: give two or more different sizes, such as 0.9,0.8,0.7.")
    others = tuple(limit for limit in request.budget.limits if limit.cost != "parameters")
    found = nested(problem, [Limits((limits[name], *others)) for name in names])
    made = [NestedSize(*row) for row in zip(names, found.solutions, found.alone, strict=True)]
    if measure or out is not None:
        with job.run.locked():
            library = _library(job, [*found.solutions, *(found.alone if measure else ())], progress)
            libraries = [_refitted(job, library, solution, progress) for solution in found.solutions]
            if measure:
                alone = [_refitted(job, library, solution, progress) for solution in found.alone]
                pairs = zip(made, libraries, alone, strict=True)
                made = [_measured(job, size, library, other, progress) for size, library, other in pairs]
            if out is not None:
                made = _written(
                    job, NestedChildren(tuple(made), found.proven_optimal, found.bound), libraries, out, progress
                )
    return NestedChildren(tuple(made), found.proven_optimal, found.bound, out)


def _library(job: Job, solutions: Sequence[Solution], progress: Progress) -> Library:
    """The run's library, with slices and refitted projections in place of trained weights, which sizes cannot share."""
    library = job.read(LIBRARY)
    if not job.recipe.local_distillation.tokens:
        return library
    chosen = tuple(dict.fromkeys(a for solution in solutions for a in solution.alternatives))
    some = dataclasses.replace(library.with_kept(Kept()), alternatives=chosen, _skeletons={})
    calibration = job.read(DATA).calibration
    return library.with_kept(distill_locally(some, calibration, calibration[:0], _setup(job, progress)).kept)


def _refitted(job: Job, library: Library, solution: Solution, progress: Progress) -> Library:
    """The library with last projections that were refitted on the inputs that they have in a child."""
    calibration = job.read(DATA).calibration
    return distill_jointly(library, solution.alternatives, calibration, calibration[:0], _setup(job, progress))


def _setup(job: Job, progress: Progress) -> TrainingSetup:
    recipe = dataclasses.replace(job.recipe.local_distillation, tokens=0, coupled_tokens=0)
    return TrainingSetup(recipe, seed=job.recipe.seed, progress=progress)


def _measured(job: Job, size: NestedSize, nested: Library, alone: Library, progress: Progress) -> NestedSize:
    """The size with the KL divergence of both children on the evaluation rows."""
    tokens = job.read(DATA).evaluation
    rows = RowsToCompare(tokens, job.recipe.scoring.rows_at_once(tokens.shape[1]))
    kl, kl_alone = (
        rows.compare_in_all(job.first_parent.model, library.compose(solution.alternatives), progress).metrics[
            "kl_divergence"
        ]
        for library, solution in ((nested, size.solution), (alone, size.alone))
    )
    prices = [a - b for a, b in zip(kl, kl_alone, strict=True)]
    mean, mean_alone, price = (math.fsum(values) / len(values) for values in (kl, kl_alone, prices))
    return dataclasses.replace(
        size, kl=mean, kl_alone=mean_alone, kl_price=price, kl_price_error=standard_error(prices)
    )


def _written(
    job: Job, made: NestedChildren, libraries: Sequence[Library], out: Path, progress: Progress
) -> list[NestedSize]:
    """The sizes with the bytes that each takes in the checkpoint, once it is written."""
    sizes = list(made.sizes)

    def write(library: Library, size: NestedSize, folder: Path, write_more: Callable[[Path], None]) -> None:
        child = Child(job.run, library, size.solution, job.recipe)
        model = library.with_parent(job.stored_parent).compose(size.solution.alternatives)

        def write_extra(made: Path) -> None:
            write_text(made / CARD, model_card(made, child))
            write_more(made)

        save(model, folder, tokenizer=job.tokenizer, write_extra=write_extra)

    def write_smaller(folder: Path) -> None:
        sizes[0] = dataclasses.replace(sizes[0], separate_bytes=0)
        for s, (library, size) in enumerate(zip(libraries[1:], sizes[1:], strict=True), 1):
            small = folder / SIZES / size.name
            write(library, size, small, lambda made: None)
            sizes[s] = dataclasses.replace(size, separate_bytes=write_parts(folder, small))
        data = dataclasses.replace(made, sizes=tuple(sizes)).to_dict()
        write_json(folder / NESTED, data)

    with progress.stage("nested children", 1, "checkpoint") as advance:
        write(libraries[0], sizes[0], out, write_smaller)
        advance(1)
    return sizes


def search_nested(
    run: str | Path,
    sizes: Sequence[str | float],
    *,
    budget: Budget | dict[str, Any] | str | float = 1.0,
    out: str | Path | None = None,
    measure: bool = False,
    objective: str | None = None,
    rules: SearchRecipe | None = None,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress | bool = True,
    callback: Callback | None = None,
    trust_remote_code: bool = False,
) -> NestedChildren:
    """Find nested children of a finished run, so that one checkpoint serves several sizes.

    Args:
        run: Folder that ``compress`` made.
        sizes: Limits on the parameters of each, such as ``0.8`` or ``"7B"``.
        budget: Limits that hold for every size.
        out: New folder for the checkpoint, from which ``layersmith.load(out, size="0.8")`` loads one; default: none.
        measure: Also measure what nesting costs on the run's evaluation rows.
        objective: Metric to minimise; default: the recipe's.
        rules: Rules on the solutions besides the budget; default: the recipe's section ``search``.
        descriptor: Descriptor of the parent's model family; default: inferred.
        progress: Whether to show progress; or a progress that receives it.
        callback: Called with an :class:`~layersmith.run.progress.Event` when a stage begins, does steps, or ends.
        trust_remote_code: Let Transformers run code from the parent's folder or hub page.

    Raises:
        Infeasible: No child of the run's library is within one of the budgets.
        InputError: The run is not finished, or ``out`` exists.
        UsageError: An argument is wrong.
    """
    request = SearchRequest(
        run, Budget.parse(budget), objective, rules, descriptor, trust_remote_code=trust_remote_code
    )
    folder, shown = None if out is None else Path(out), progress_of(progress, callback)
    return nested_children(request, [str(size) for size in sizes], out=folder, measure=measure, progress=shown)
