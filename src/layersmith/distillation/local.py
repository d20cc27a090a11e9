"""Local distillation: every alternative learns to return what the parent's subblock returns, on the parent's inputs.

For a subblock that adds y to the hidden states h, and an alternative of it that adds y', the loss is

    E|y' - y|^2 / E|y|^2.

The last projection of a pruned alternative is first refitted in closed form (:mod:`.reconstruction`), then all its
weights are trained. Its error is taken on held-out rows of the training split, which no step sees: before, after and a
few times between. The best weights are kept, and an alternative that no longer improves is stopped.

Source: Bercovich et al., "Puzzle" (arXiv 2411.19146), section 3.
"""

from __future__ import annotations

import torch

from layersmith.distillation.layer_by_layer import LayerByLayer, TrainingSetup, rows_for
from layersmith.distillation.replacement import Replacement
from layersmith.library.library import Library


def distill_locally(
    library: Library, calibration: torch.Tensor, training: torch.Tensor, setup: TrainingSetup
) -> Library:
    """Refit and train the alternatives of a library, each by itself.

    Args:
        library: Library of the alternatives as pruned.
        calibration: ``[N, T]`` rows for the closed-form refit.
        training: ``[N, T]`` rows to train on; with fewer than two nothing is trained.
        setup: How to train.

    Returns:
        The library with the trained weights.

    Raises:
        UsageError: There are several processes and no folder.
    """
    replacements: dict[int, list[Replacement]] = {}
    for a in library.alternatives:
        if a.traits.has_weights:
            replacements.setdefault(a.layer, []).append(Replacement((a,), a.subblock))
    recipe = setup.recipe
    layers = LayerByLayer(library=library, setup=setup, replacements=replacements, stage="distill")
    kept = layers.run(calibration if recipe.reconstruct else calibration[:0], rows_for(training, recipe.tokens))
    return library if kept is None else library.with_kept(kept)
