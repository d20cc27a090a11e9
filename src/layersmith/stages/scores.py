"""Score every alternative."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.folder import Run
from layersmith.run.progress import Progress
from layersmith.scoring.library_scores import score_library
from layersmith.scoring.regret import Axis
from layersmith.scoring.score import Score


def make_scores(
    run: Run,
    inputs: str,
    library: Library,
    recipe: Recipe,
    axes: Sequence[Axis],
    tokens: torch.Tensor,
    progress: Progress,
) -> list[Score]:
    def make(folder: Path) -> None:
        scores = score_library(
            library,
            tokens,
            recipe.scoring,
            axes=axes,
            seed=recipe.seed,
            journal=run.partial("scores"),
            inputs=inputs,
            progress=progress,
        )
        write_json(folder / "scores.json", [s.to_dict() for s in scores])

    run.do("scores", inputs, make)
    return read_scores(run, library)


def read_scores(run: Run, library: Library) -> list[Score]:
    records = {record["of"]: record for record in read_json(run.folder / "scores" / "scores.json")}
    return [Score.from_dict(alternative, records[alternative.key]) for alternative in library.alternatives]
