"""Write a solution as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith.execution.parent import Parent
from layersmith.library.library import Library
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.recipe import Recipe
from layersmith.report.card import write_card
from layersmith.run.folder import Run
from layersmith.run.progress import Progress
from layersmith.search.problem import Solution
from layersmith.stages.describe import at_stored_dtype


def realize(
    run: Run, inputs: str, library: Library, solution: Solution, tokenizer: Any, recipe: Recipe, progress: Progress
) -> None:
    """Write the child in the parent's dtype, and check that it is what the search counted."""

    def make(folder: Path) -> None:
        own = library.with_parent(at_stored_dtype(library.parent, recipe, run.folder))
        child = own.compose(solution.alternatives)
        counted = sum(parameter.numel() for parameter in child.parameters())
        if counted != solution.costs["parameters"]:
            raise RuntimeError(f"the child has {counted} parameters, the search counted {solution.costs['parameters']}")
        with quiet_transformers():
            child.save_pretrained(folder, **shards(library.parent))
            tokenizer.save_pretrained(folder)
        write_card(folder, run, library, solution, recipe)
        advance(1)

    with progress.stage("realize", 1, "child") as advance:
        run.do("child", inputs, make)


def shards(parent: Parent) -> dict[str, Any]:
    """How a child is cut into files: as usual, or so that few of its weights are in memory at once."""
    return {} if parent.stream is None else {"max_shard_size": "500MB"}
