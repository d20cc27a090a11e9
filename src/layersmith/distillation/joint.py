"""Joint local distillation: the attention and the FFN that a solution has for a layer are trained together.

They learn to return what the parent's layer returns, and so compensate for each other's losses. By default their input
is what the child's layers before them return once these are trained, so they compensate for those layers too: hidden
states of parent and child go through the layers side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layersmith.distillation.activations import BLOCK
from layersmith.distillation.layer_by_layer import LayerByLayer, TrainingSetup, rows_for
from layersmith.distillation.replacement import Replacement
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative, changed_by_layer
from layersmith.library.library import Library


def distill_jointly(
    library: Library,
    solution: Sequence[Alternative],
    calibration: torch.Tensor,
    training: torch.Tensor,
    setup: TrainingSetup,
) -> Library:
    """Train the alternatives of each layer of a solution as one block.

    First their last projections are refitted on the child's inputs (:mod:`.child_refit`), then all weights are trained.
    Where one of the two subblocks is the parent's, it is trained too. Layers that are wholly the parent's stay as they
    are.

    Args:
        library: Library with the locally distilled weights.
        solution: One alternative for each subblock of each layer.
        calibration: ``[N, T]`` rows for the refit.
        training: ``[N, T]`` rows to train on; with fewer than two nothing is trained. Those that are left are for the
            refit, as many as the recipe wants.
        setup: How to train; its recipe's ``coupled_on`` says whose hidden states layers are given.

    Returns:
        The library, with jointly trained weights that replace the others where a layer has both alternatives.
    """
    changed = changed_by_layer(solution)
    removed = {i for i, members in changed.items() if sum(a.is_no_op for a in members) == len(SUBBLOCKS)}
    replacements = {i: [Replacement(tuple(members), BLOCK)] for i, members in changed.items() if i not in removed}
    if not replacements:
        return library
    layers = LayerByLayer(
        library=library,
        setup=setup,
        replacements=replacements,
        stage="distill pairs",
        child=changed if setup.recipe.coupled_on == "child" else None,
    )
    trained = rows_for(training, setup.recipe.coupled_tokens)
    refits = setup.recipe.coupled_on == "child" and setup.recipe.child_refit
    more = training[len(trained) :][: setup.recipe.child_refit_sequences]
    rows = torch.cat([calibration, more]) if refits else calibration[:0]
    pairs = layers.run(rows, trained)
    return library if pairs is None else library.with_kept(library.kept, pairs)
