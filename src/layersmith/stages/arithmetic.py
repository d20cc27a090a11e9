"""Counts the work of every stage before a run starts, and from a measured rate the seconds that each will take.

Arithmetic is two operations for each weight and token. What takes equally long for any number of rows is counted in
seconds: rankings, building alternatives, the programs of refinement. What is only known when the run is under way is
counted at its most: every layer is changed, no training stops early, and every exact run that is allowed is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from layersmith.costs.clock import LEAST_ROUNDS
from layersmith.costs.stopwatch import REFERENCE_REPEATS
from layersmith.costs.table import CostTable
from layersmith.evaluation.task_size import tokens_of_tasks
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes
from layersmith.recipe import DistillationRecipe, LocalDistillationRecipe, Recipe
from layersmith.scoring.library_scores import SWEEP_PASSES
from layersmith.scoring.task import exact_passes
from layersmith.stages.job import formats_of

# A training step takes a forward pass and twice as much for the gradients of activations and weights.
TRAINING = 3.0
# Kinds whose heads are ranked.
_OF_HEADS = ("kv_heads", "head_groups", "query_heads")
# Kinds whose last projection has other inputs than the parent's, so that they are run for their refit.
_RUN_FOR_REFIT = ("kv_heads", "query_heads", "window")
# Held-out rows are one in 24 of the training rows, and errors on them are taken eight times.
_EVALUATION = 8 / 24
# The share of a layer that a child keeps, and the share of its attention, where neither is known yet.
_KEPT, _OF_ATTENTION = 0.8, 0.3
# Generating a token reads all weights, which takes as long as this many tokens of a forward pass.
_TOKENS_OF_A_STEP = 8
# Seconds of a stage for each second that a forward pass takes for as many operations: backward passes and small modules
# are slower than a forward pass. From runs of the two demos on one thread and on two.
_SLOWER = {
    "statistics": 1.0, "library": 1.3, "scores": 1.12, "formats": 1.3, "refine": 1.0, "pairs": 1.0, "evaluation": 1.0,
    "tasks": 1.2, "clock": 0.8, "distilled": 1.2,
}  # fmt: skip
# Seconds for each weight of an alternative that making it takes besides its arithmetic, and so does scoring it: its
# layer is built anew, on one thread. A GPU copies weights faster: there as many operations as that many tokens take.
_OF_A_WEIGHT, _TOKENS_OF_AN_ALTERNATIVE = 4.5e-8, 4000
# Seconds for each alternative that the programs of refinement take, which every process solves.
_OF_PROGRAMS = 0.003
# Rankings multiply in double precision, which takes twice as long on a CPU; a GPU has at least this share of its rate,
# by the data sheets of those that are worst at it (L40S). They read and write each number of the second moments about
# eight times on the CPU, in these seconds. A GPU's CPU is taken to have at most this rate for a process.
_DOUBLE, _DOUBLE_OF_A_GPU, _OF_A_MOMENT, _HOST = 2.0, 1 / 80, 6e-9, 4e11
# Seconds that a layer takes in the statistics besides its arithmetic: it is built, and its parts are looked up.
_OF_A_LAYER = 0.02
# Seconds of a stage besides its arithmetic, at least.
_AT_LEAST = {"describe": 4.0, "data": 1.0, "frontier": 1.0, "child": 0.2, "evaluation": 0.4}
# Bytes of a checkpoint that are read, or written and read again, in a second.
_DISK = 5e8


class SearchSpace(Protocol):
    """What work is counted from: an outline of a parent, or what its run has found."""

    @property
    def alternatives(self) -> Sequence[Alternative]: ...
    @property
    def axes(self) -> Sequence[LayerAxes]: ...
    @property
    def costs(self) -> CostTable: ...


@dataclass(frozen=True)
class Found:
    """The search space of a run that is under way."""

    alternatives: Sequence[Alternative]
    axes: Sequence[LayerAxes]
    costs: CostTable


def stage_work(flops: Mapping[str, float]) -> dict[str, float]:
    """Operations of each stage, with those that are slower than a forward pass counted for more."""
    return {stage: _SLOWER.get(stage, 1.0) * count for stage, count in flops.items() if stage != "clock"}


def stage_seconds(
    flops: Mapping[str, float], space: SearchSpace, recipe: Recipe, rate: float, is_timed: bool = False
) -> dict[str, float]:
    """Seconds of every stage, in the order of the pipeline; of tasks by their own name.

    Args:
        flops: Operations of each stage, from :func:`stage_flops`.
        space: The search space.
        recipe: All settings.
        rate: Operations per second of the parent's forward pass.
        is_timed: Whether the budget limits a time, so that alternatives are timed.
    """
    seconds = {
        stage: _SLOWER.get(stage, 0.0) * flops.get(stage, 0.0) / rate + _AT_LEAST.get(stage, 0.0) for stage in ORDER
    }
    seconds["frontier"] += 2e-3 * len(space.alternatives)
    seconds["statistics"] += ranking_seconds(space, rate)
    building = min(_OF_A_WEIGHT, 2.0 * _TOKENS_OF_AN_ALTERNATIVE / rate)
    building *= sum(_size(space, a) for a in space.alternatives if not a.is_parent)
    seconds["scores"] += building
    seconds["refine"] += program_seconds(space) if flops.get("refine") else 0.0
    if recipe.local_distillation.reconstruct:
        seconds["library"] += building
    for stage in ("describe", "child"):
        seconds[stage] += space.costs.parent["weight_bytes"] / _DISK
    rounds = seconds["clock"]
    if rounds:  # at least a few rounds, then as many as fit into a quarter of the time for measuring
        least, most = ((1 / REFERENCE_REPEATS + n) * rounds for n in (LEAST_ROUNDS, recipe.costs.rounds))
        seconds["clock"] = 1.0 + min(most, max(least, recipe.costs.seconds / 4))
    if is_timed:
        seconds["costs"] = 1.5 * recipe.costs.seconds
    return {stage: value for stage, value in seconds.items() if value}


def program_seconds(space: SearchSpace) -> float:
    """Seconds in which refinement chooses children, however many rows there are."""
    return _OF_PROGRAMS * len(space.alternatives)


def ranking_seconds(space: SearchSpace, rate: float) -> float:
    """Seconds of the rankings and linear replacements, which take equally long for any number of rows.

    A ranking multiplies the reader's weight by itself, 2 D F^2 for F inputs and D outputs. A linear replacement of D^2
    weights is solved for in 8/3 D^3.
    """
    products = solutions = numbers = 0.0
    for side, weights in _ranked(space):
        products += 2.0 * weights * side
        numbers += side**2
    for size in _linear(space):
        solutions += 8 / 3 * size**1.5
        numbers += 2 * size
    on_cpu = min(rate, _HOST) / _DOUBLE
    seconds = products / max(on_cpu, rate * _DOUBLE_OF_A_GPU) + solutions / on_cpu
    return seconds + _OF_A_MOMENT * numbers + _OF_A_LAYER * len(space.axes)


def _ranked(space: SearchSpace) -> Iterator[tuple[int, float]]:
    """Of what is ranked by all second moments of a reader's inputs: their number F, and the reader's D F weights."""
    kinds = {(a.layer, a.kind) for a in space.alternatives}
    by_moments = {a.layer for a in space.alternatives if (a.kind, a.method) == ("ffn_width", "iterative")}
    sizes = {(a.layer, a.subblock): _size(space, a) for a in space.alternatives if a.is_parent}
    for i, axes in enumerate(space.axes):
        if axes.ffn is not None and not axes.of_experts and i in by_moments:
            yield axes.ffn.size, sizes.get((i, "ffn"), 0) / 3
        if axes.kv is not None and any((i, kind) in kinds for kind in _OF_HEADS):
            queries = axes.kv.num_heads * axes.kv.together
            share = queries / (2 * queries + 2 * axes.kv.size)  # of the weights of queries, keys, values and outputs
            yield queries * axes.kv.head_dim, sizes.get((i, "attention"), 0) * share


def _linear(space: SearchSpace) -> list[int]:
    """Weights of each linear replacement."""
    return [_size(space, a) for a in space.alternatives if a.kind == "linear"]


# Stages that take time, in the order of the pipeline; tasks are a part of the evaluation.
ORDER = (
    "describe", "data", "costs", "statistics", "library", "scores", "formats", "frontier", "refine", "pairs", "child",
    "evaluation", "tasks", "clock", "distilled",
)  # fmt: skip


def stage_flops(space: SearchSpace, recipe: Recipe) -> dict[str, float]:
    """Operations of each stage, in the order of the pipeline; for the clock those of one round."""
    data, layers, formats = recipe.data, _layers(space), formats_of(recipe)
    head = space.costs.fixed["active_parameters"]
    whole = sum(layers) + head
    calibration, scoring, evaluation = (
        rows * data.sequence_length
        for rows in (data.calibration_sequences, data.scoring_sequences, data.evaluation_sequences)
    )
    training = data.training_sequences * data.sequence_length if data.training_sequences > 1 else 0
    samples = max(1, len(recipe.prompts)) * recipe.completion_tokens * _TOKENS_OF_A_STEP
    flops = {
        "statistics": 2.0 * whole * calibration + _sums(space, calibration),
        "library": _library(space, recipe.local_distillation, calibration, training),
        "scores": 2.0 * scoring * _scoring_passes(space, recipe, layers),
        "formats": 2.0 * whole * (calibration + scoring * (3.5 + len(formats))) if formats else 0.0,
        "refine": 2.0 * recipe.search.refine_passes * whole * scoring,
        "pairs": _pairs(space, recipe, calibration, training),
        "evaluation": 4.0 * whole * (evaluation + samples),
        "tasks": 4.0 * whole * (tokens_of_tasks(recipe.evaluation) or 0.0),
        "clock": _round(recipe, whole) if recipe.costs.time_child else 0.0,
        "distilled": (2.0 + 2.0 * TRAINING) * whole * _trained(recipe.distillation),
    }
    return {stage: count for stage, count in flops.items() if count}


def _trained(recipe: DistillationRecipe) -> int:
    """Tokens of global distillation in both parts."""
    return recipe.tokens + (recipe.long_tokens if recipe.tokens else 0)


def _round(recipe: Recipe, whole: float) -> float:
    """A round of timing parent and child: each several times, with a warm-up and two prompts each time."""
    tokens = 3 * recipe.data.sequence_length + _TOKENS_OF_A_STEP * (recipe.costs.decode_steps + 4)
    return 2.0 * whole * 2 * REFERENCE_REPEATS * tokens


def _layers(space: SearchSpace) -> list[int]:
    """Active parameters of each layer of the parent."""
    layers = [0] * len(space.axes)
    for alternative in space.alternatives:
        if alternative.is_parent:
            layers[alternative.layer] += _size(space, alternative)
    return layers


def _size(space: SearchSpace, alternative: Alternative) -> int:
    return int(space.costs.by_key[alternative.key]["active_parameters"])


def _moments(space: SearchSpace, tokens: int) -> float:
    """Second moments of FFN channels, for the refit."""
    widths = [axes.ffn.size for axes in space.axes if axes.ffn is not None and not axes.of_experts]
    return 2.0 * tokens * sum(float(width) ** 2 for width in widths)


def _sums(space: SearchSpace, tokens: int) -> float:
    """All second moments of the statistics; linear replacements have those of inputs and with outputs."""
    return 2.0 * tokens * (sum(float(side) ** 2 for side, _ in _ranked(space)) + 2.0 * sum(_linear(space)))


def _library(space: SearchSpace, recipe: LocalDistillationRecipe, calibration: int, training: int) -> float:
    changed = [a for a in space.alternatives if not a.is_parent and a.traits.has_weights]
    total = 0.0
    if recipe.reconstruct:
        total += 2.0 * sum(_layers(space)) * calibration + _moments(space, calibration)
        total += sum(2.0 * _size(space, a) * calibration for a in changed if a.kind in _RUN_FOR_REFIT)
        total += _solutions(space, changed)
    tokens = min(recipe.tokens, training)
    if tokens:
        trained = [a for a in changed if recipe.kinds is None or a.kind in recipe.kinds]
        total += 2.0 * (TRAINING + _EVALUATION) * tokens * sum(_size(space, a) for a in trained)
        total += 2.0 * sum(_layers(space)) * tokens
    return total


def _solutions(space: SearchSpace, changed: Sequence[Alternative]) -> float:
    """The equations of the FFNs' refits, in double precision, which takes twice as long: a factor of K^3 / 3, and for
    D outputs 2 D K^2 to solve and 2 D K (F - K) for what is missing, where three projections have 3 D K weights."""
    total = 0.0
    for a in changed:
        ffn = space.axes[a.layer].ffn
        if a.kind == "ffn_width" and isinstance(a.size, int) and ffn is not None:
            total += a.size**3 / 3 + 2 / 3 * _size(space, a) * ffn.size
    return 2.0 * total


def _scoring_passes(space: SearchSpace, recipe: Recipe, layers: Sequence[int]) -> float:
    """Parameters that a scoring token meets: an exact score runs the alternative's layer and those after it."""
    head = space.costs.fixed["active_parameters"]
    whole = sum(layers) + head
    suffix = [sum(layers[i:]) + head for i in range(len(layers))]
    exact = float(sum(suffix[a.layer] for a in space.alternatives if not a.is_parent) + whole)
    if recipe.scoring.mode == "exact" or recipe.scoring.objective != "kl_divergence":
        return exact
    estimated = (SWEEP_PASSES + exact_passes(recipe.scoring, any(axes.of_experts for axes in space.axes))) * whole
    return estimated if recipe.scoring.mode == "second_order" else min(exact, estimated)


def _pairs(space: SearchSpace, recipe: Recipe, calibration: int, training: int) -> float:
    """Before training the refit: the parent's layer, the child's attention, and the child's layer twice. For training
    the parent's layer, training of the child's, and the child's once more to go on."""
    settings = recipe.local_distillation
    layers, tokens = sum(_layers(space)), min(settings.coupled_tokens, training)
    total = 2.0 * (1.0 + (TRAINING + _EVALUATION + 1.0) * _KEPT) * layers * tokens
    if settings.child_refit and settings.coupled_on == "child":
        more = min(settings.child_refit_sequences * recipe.data.sequence_length, training - tokens)
        total += 2.0 * (1.0 + (_OF_ATTENTION + 2.0) * _KEPT) * layers * (calibration + more)
        total += 1.5 * _KEPT**2 * _moments(space, calibration + more)
    return total
