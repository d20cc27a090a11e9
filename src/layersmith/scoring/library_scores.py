"""Score a whole library: exactly, or by second-order estimates with exact runs where they matter.

Results are appended to a journal as they come, keyed by the alternative's identity and the number of the row. Row
selection depends only on results, so a resumed run gives the same scores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from layersmith.execution.layerwise import LayerwiseParent, NotLayerwise, split_layers
from layersmith.library.library import Library
from layersmith.recipe import ScoringRecipe
from layersmith.run.journal import Recording
from layersmith.scoring.estimated import estimated_scores
from layersmith.scoring.exact_runs import exact_scores
from layersmith.scoring.regret import Axis
from layersmith.scoring.score import Score
from layersmith.scoring.task import KL, PARENT, ScoringProgress, ScoringTask, clock_of, exact_passes, has_experts

# About the cost of a second-order sweep in forward passes. If exact runs of all alternatives cost less than the sweep
# and its own exact runs, estimates save nothing. benchmarks/results has 6 to 7 passes for both on four parents.
SWEEP_PASSES = 6.0

logger = logging.getLogger(__name__)


def score_library(
    library: Library,
    tokens: torch.Tensor,
    recipe: ScoringRecipe,
    *,
    axes: Sequence[Axis] = (),
    seed: int = 0,
    recording: Recording = Recording(),
) -> list[Score]:
    """Score every alternative of a library; the parent's subblocks score as the parent.

    All processes of a launcher call this, divide the work, and return the scores that one process would.

    Args:
        library: The library.
        tokens: ``[N, T]`` scoring rows.
        recipe: Settings of scoring.
        axes: Costs by which the search will choose; what decides there is run exactly first. Default: the errors of
            all scores count alike.
        seed: Seed of the random signs.
        recording: Keeps results as they come and shows the work.

    Returns:
        Scores in the order of the library's alternatives.
    """
    parent, progress = library.parent, recording.progress
    steps = sum(a.kind != PARENT for a in library.alternatives)
    with progress.stage("score", steps, "alternatives") as advance:
        layerwise: LayerwiseParent[Library] | None = None
        try:
            layerwise = split_layers(parent, library, by_all=True)
        except NotLayerwise as reason:
            progress.note(f"each alternative is scored by running the whole model, because {reason}.")
        shown = ScoringProgress(advance, steps, tokens.shape[1], clock_of(progress, parent.runtime.device))
        with recording.journal() as results:
            results.share()
            task = ScoringTask(
                library=library,
                layerwise=layerwise,
                tokens=tokens,
                recipe=recipe,
                folder=recording.folder,
                progress=shown,
                results=results,
            )
            by_estimates, regret = _by_estimates(task), None
            if by_estimates:
                scores, regret = estimated_scores(task, axes, seed)
            else:
                scores = exact_scores(task)
    if layerwise is not None and layerwise.arithmetic.done:
        progress.note(_summary(scores, by_estimates, regret, len(tokens)))
        logger.info("arithmetic of scoring: %s", layerwise.arithmetic)
    return scores


def _by_estimates(task: ScoringTask) -> bool:
    """Whether second-order estimates are possible and wanted; by default, whether they save work."""
    if task.recipe.mode == "exact" or task.recipe.objective != KL or task.layerwise is None:
        return False
    if task.recipe.mode == "second_order":
        return True
    passes = SWEEP_PASSES + exact_passes(task.recipe, has_experts(task.library.parent.blocks))
    return sum(map(task.exact_cost, task.pending)) > passes


def _summary(scores: Sequence[Score], by_estimates: bool, regret: float | None, num_rows: int) -> str:
    scored = [s for s in scores if s.alternative.kind != PARENT]
    if not by_estimates:
        rows = scores[0].exact_rows
        return f"scored {len(scored)} alternatives exactly" + (f" on {rows} of {num_rows} rows" * (rows < num_rows))
    text = f"scored {len(scored)} alternatives ({sum(s.exact_rows > 0 for s in scored)} also exactly)"
    return text if regret is None else f"{text}; estimated regret {regret:.1%} of the loss increase"
