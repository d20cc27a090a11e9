"""layersmith's closed-form refits for any choice, so that methods can be compared without their weight updates.

Two refits, as ``layersmith compress`` does them: of every cut projection on the parent's inputs, then of the last
projections of all layers on the child's. A layer that the choice leaves whole is refitted too.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.rivals.activations import Activations
from benchmarks.rivals.problem import Choice, Problem, keeping
from layersmith.distillation.joint import distill_jointly
from layersmith.distillation.layer_by_layer import TrainingSetup
from layersmith.distillation.reconstruction import refit
from layersmith.execution.parent import as_stored
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept
from layersmith.recipe import LocalDistillationRecipe

SETUP = TrainingSetup(LocalDistillationRecipe(tokens=0, coupled_tokens=0))


def refitted(problem: Problem, seen: Activations, choice: Choice) -> Choice:
    """The same choice with refitted weights; biases and other changes of the method are left out."""
    chosen, kept = [_cut(problem, a) for a in choice.chosen], Kept()
    for a in chosen:
        if a.traits.has_weights:
            kept = keeping(kept, a.identity, a.layer, _refitted(problem, seen, choice.library, a))
    library = dataclasses.replace(choice.library, kept=kept, _skeletons={})
    return Choice(refitted_on_child(problem, library, chosen), chosen, choice.parameters)


def _refitted(problem: Problem, seen: Activations, library: Library, a: Alternative) -> dict[str, torch.Tensor]:
    """The projection that reads the units of an alternative, from the moments of the parent's."""
    gone = library.units_gone(a)
    assert gone is not None
    (removed,) = gone.values()
    weight, moment = problem.reader_weight(a.layer, a.subblock).double(), seen.moment[a.layer, a.subblock].double()
    left = torch.ones(len(moment), dtype=torch.bool).index_fill_(0, removed, False).nonzero()[:, 0]
    new = refit(weight[:, left], moment[left][:, left], weight @ moment[:, left])
    return {f"{problem.reader(a.layer, a.subblock)}.weight": as_stored(new, library.parent.dtype)}


def refitted_on_child(problem: Problem, library: Library, chosen: list[Alternative]) -> Library:
    """The second refit. The problem's own alternatives say which weights are last projections."""
    library = dataclasses.replace(library, alternatives=[*problem.library.alternatives, *chosen])
    problem.work.tokens += 3 * problem.calibration.numel()
    return distill_jointly(library, chosen, problem.calibration, problem.calibration[:0], SETUP)


def _cut(problem: Problem, a: Alternative) -> Alternative:
    """A whole FFN as a cut one that keeps every channel: only changed layers are refitted on the child's inputs."""
    if a.subblock != "ffn" or not a.is_parent:
        return a
    return Alternative(a.layer, "ffn", "ffn_width", "iterative", problem.width(a.layer).size)
