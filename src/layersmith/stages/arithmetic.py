"""Counts the arithmetic of every stage before a run starts: two operations for each weight and token.

Stages that are not named here do hardly any arithmetic. What is only known when the run is under way is counted at its
most: every layer is changed, no training stops early, and every exact run that is allowed is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from layersmith.library.alternative import Alternative
from layersmith.recipe import LocalDistillationRecipe, Recipe
from layersmith.scoring.library_scores import SWEEP_PASSES, exact_passes
from layersmith.stages.inspect import Outline

# A training step takes a forward pass and twice as much for the gradients of activations and weights.
TRAINING = 3.0
# Kinds whose last projection has other inputs than the parent's, so that they are run for their refit.
_RUN_FOR_REFIT = ("kv_heads", "query_heads", "window")
# Held-out rows are one in 24 of the training rows, and errors on them are taken eight times.
_EVALUATION = 8 / 24


def stage_flops(outline: Outline, recipe: Recipe) -> dict[str, float]:
    """Operations of each stage, in the order of the pipeline."""
    data, layers = recipe.data, _layers(outline)
    head = outline.costs.fixed["active_parameters"]
    whole = sum(layers) + head
    calibration, scoring, evaluation = (
        rows * data.sequence_length
        for rows in (data.calibration_sequences, data.scoring_sequences, data.evaluation_sequences)
    )
    training = data.training_sequences * data.sequence_length if data.training_sequences > 1 else 0
    flops = {
        "statistics": 2.0 * whole * calibration + _moments(outline, calibration),
        "library": _library(outline, recipe.local_distillation, calibration, training),
        "scores": 2.0 * scoring * _scoring_passes(outline, recipe, layers),
        "refine": 2.0 * recipe.search.refine_passes * whole * scoring,
        "pairs": _pairs(outline, recipe.local_distillation, calibration, training),
        "evaluation": 4.0 * whole * evaluation,
        "distilled": (2.0 + 2.0 * TRAINING) * whole * recipe.distillation.tokens,
    }
    return {stage: count for stage, count in flops.items() if count}


def _layers(outline: Outline) -> list[int]:
    """Active parameters of each layer of the parent."""
    layers = [0] * len(outline.axes)
    for alternative in outline.alternatives:
        if alternative.is_parent:
            layers[alternative.layer] += _size(outline, alternative)
    return layers


def _size(outline: Outline, alternative: Alternative) -> int:
    return int(outline.costs.by_key[alternative.key]["active_parameters"])


def _moments(outline: Outline, tokens: int) -> float:
    """Second moments of FFN channels, for the ranking and the refit."""
    widths = [axes.ffn.size for axes in outline.axes if axes.ffn is not None and not axes.of_experts]
    return 2.0 * tokens * sum(float(width) ** 2 for width in widths)


def _library(outline: Outline, recipe: LocalDistillationRecipe, calibration: int, training: int) -> float:
    changed = [a for a in outline.alternatives if not a.is_parent and a.traits.has_weights]
    total = 0.0
    if recipe.reconstruct:
        total += 2.0 * sum(_layers(outline)) * calibration + _moments(outline, calibration)
        total += sum(2.0 * _size(outline, a) * calibration for a in changed if a.kind in _RUN_FOR_REFIT)
        total += _solutions(changed)
    tokens = min(recipe.tokens, training)
    if tokens:
        trained = [a for a in changed if recipe.kinds is None or a.kind in recipe.kinds]
        total += 2.0 * (TRAINING + _EVALUATION) * tokens * sum(_size(outline, a) for a in trained)
        total += 2.0 * sum(_layers(outline)) * tokens
    return total


def _solutions(changed: Sequence[Alternative]) -> float:
    """Cholesky factors of the FFNs' moments, in double precision, which takes twice as long."""
    widths = [float(a.size) for a in changed if a.kind == "ffn_width" and isinstance(a.size, int)]
    return 2.0 * sum(width**3 / 3 for width in widths)


def _scoring_passes(outline: Outline, recipe: Recipe, layers: Sequence[int]) -> float:
    """Parameters that a scoring token meets: an exact score runs the alternative's layer and those after it."""
    head = outline.costs.fixed["active_parameters"]
    whole = sum(layers) + head
    suffix = [sum(layers[i:]) + head for i in range(len(layers))]
    exact = float(sum(suffix[a.layer] for a in outline.alternatives if not a.is_parent) + whole)
    if recipe.scoring.mode == "exact" or recipe.scoring.objective != "kl_divergence":
        return exact
    estimated = (SWEEP_PASSES + exact_passes(recipe.scoring, outline.blocks)) * whole
    return estimated if recipe.scoring.mode == "second_order" else min(exact, estimated)


def _pairs(outline: Outline, recipe: LocalDistillationRecipe, calibration: int, training: int) -> float:
    """The parent's layer, the child's forward pass, and training of both subblocks of a layer; before it the refit."""
    layers, tokens = sum(_layers(outline)), min(recipe.coupled_tokens, training)
    total = 2.0 * (2.0 + TRAINING + _EVALUATION) * layers * tokens
    if recipe.child_refit and recipe.coupled_on == "child":
        # The parent's layer for each subblock, the child's for each and once to go on; attentions count as layers.
        total += 2.0 * 5 * layers * calibration + _moments(outline, calibration)
    return total
