"""Prune the alternatives, and train them against the parent (local distillation)."""

from __future__ import annotations

from typing import Any

import torch

from layersmith.distillation.local import distill_chosen, distill_locally
from layersmith.execution.parent import Parent
from layersmith.library.library import Library, Survey, build_library
from layersmith.library.stored_weights import Kept
from layersmith.recipe import Recipe
from layersmith.run import ranks
from layersmith.run.folder import Run
from layersmith.run.progress import Progress
from layersmith.search.problem import Solution


def make_library(
    run: Run, inputs: str, model: Parent, recipe: Recipe, found: Survey, tokens: Any, progress: Progress
) -> Library:
    """Prune, refit and train: the library, with what its alternatives have learned by themselves."""

    def prune() -> Library:
        return build_library(
            model,
            recipe.library,
            found,
            tokens.calibration,
            batch_sequences=recipe.scoring.rows_at_once(tokens.calibration.shape[1]),
            checkpoint=run.partial("library"),
            inputs=inputs,
            progress=progress,
        )

    def make() -> Library:
        work = run.work("library")
        if ranks.are_several():  # one prunes, and all train
            ranks.on_first(lambda: prune().write(work / "pruned"))
            pruned = Library.read(work / "pruned", model)
        else:
            pruned = prune()
        return distill_locally(
            pruned,
            tokens.calibration,
            tokens.training,
            recipe.local_distillation,
            seed=recipe.seed,
            work=work,
            inputs=inputs,
            progress=progress,
        )

    run.do("library", inputs, lambda folder: make().write(folder), make)
    return Library.read(run.folder / "library", model)


def teach_pairs(
    run: Run,
    inputs: str,
    library: Library,
    solution: Solution,
    recipe: Recipe,
    tokens: torch.Tensor,
    progress: Progress,
) -> Library:
    """Train what was chosen for each layer together."""

    def make() -> Kept:
        return distill_chosen(
            library,
            solution.alternatives,
            tokens,
            recipe.local_distillation,
            seed=recipe.seed,
            work=run.work("pairs"),
            inputs=inputs,
            progress=progress,
        ).pairs

    run.do("pairs", inputs, lambda folder: make().write(folder), make)
    return with_pairs(run, library)


def with_pairs(run: Run, library: Library) -> Library:
    """The library with what was trained together for the run's own solution, which other solutions may have in part."""
    return library.with_kept(library.kept, Kept.read(run.folder / "pairs"))
