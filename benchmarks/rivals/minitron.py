"""Minitron's width pruning: hidden size, heads and FFN channels, the same in every layer.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (arXiv 2407.14679),
section 2. Importance comes from activations of a calibration set: of channels and hidden dimensions the mean magnitude
over tokens, of heads the mean L2 norm of their output, each aggregated over rows by the L2 norm; a hidden dimension's
is summed over all norms. Several architectures of the size are compared before any is trained.

layersmith has no axis for the hidden size. A narrower model is therefore computed at full width, with the removed
dimensions at zero in embedding, norms and outputs. A norm over n of D dimensions equals the norm over all D times
sqrt(D / n), so the norms' weights are scaled by sqrt(n / D).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.rivals.activations import Activations, norms_of, observe
from benchmarks.rivals.problem import Choice, Problem, batches, keeping, orders_of, uniform_shapes
from benchmarks.rivals.refit import SETUP, refitted
from layersmith.distillation.activations import Rows
from layersmith.distillation.child_refit import ChildRefit
from layersmith.execution.exchange import set_weight
from layersmith.execution.layerwise import split_layers
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative, pair_identity
from layersmith.library.library import Library

FRACTIONS = (1.0, 15 / 16, 7 / 8, 13 / 16, 3 / 4)


@dataclass(frozen=True, eq=False)
class Narrow:
    """A choice over a parent with fewer hidden dimensions.

    Attributes:
        problem: The problem with that parent.
        choice: Of its channels and heads.
        kept: Hidden dimensions.
    """

    problem: Problem
    choice: Choice
    kept: torch.Tensor


@torch.no_grad()
def narrowed(problem: Problem, kept: torch.Tensor) -> Problem:
    """The problem of a parent in which all other hidden dimensions are zero."""
    parent = problem.library.parent
    model = copy.deepcopy(parent.model)
    size = parent.language_config.hidden_size
    mask = torch.zeros(size).index_fill_(0, kept, 1)
    other = dataclasses.replace(parent, model=model, identity=f"{parent.identity} {kept.tolist()}")
    new = dataclasses.replace(problem, library=dataclasses.replace(problem.library, parent=other, _skeletons={}))
    for i, layer in enumerate(new.layers):
        for norm in norms_of(problem, layer):
            norm.weight.mul_(mask * (len(kept) / size) ** 0.5)
        for subblock in SUBBLOCKS:
            layer.get_submodule(problem.reader(i, subblock)).weight.mul_(mask[:, None])
    final = model.get_submodule(parent.descriptor.final_norm_name().removesuffix(".weight"))
    final.weight.mul_(mask * (len(kept) / size) ** 0.5)
    model.get_input_embeddings().weight.mul_(mask)
    return new


@torch.no_grad()
def divergence(problem: Problem, model: PreTrainedModel, rows: torch.Tensor) -> float:
    """The mean KL divergence of a model to the parent."""
    total = 0.0
    for batch in batches(rows, 2048):
        p, q = (m(input_ids=batch, use_cache=False).logits.float().log_softmax(-1) for m in (problem.model, model))
        total += float((p.exp() * (p - q)).sum(-1).mean()) * len(batch)
    problem.work.tokens += 2 * rows.numel()
    return total / len(rows)


def minitron(problem: Problem, seen: Activations, parameters: float, rows: int = 8) -> Narrow:
    """The best of several architectures. The size counts the embedding too, which a smaller hidden size makes smaller.

    Args:
        problem: The problem.
        seen: Activations of its parent.
        parameters: In the layers at the parent's hidden size, to which the embedding is added.
        rows: Scoring rows on which architectures are compared.
    """
    size = problem.library.parent.language_config.hidden_size
    rest = sum(p.numel() for p in problem.model.parameters()) - problem.sizes.total
    hidden = seen.hidden.norm(dim=0).sort(descending=True, stable=True).indices
    heads, channels = (
        [seen.magnitude[i, subblock].norm(dim=0) for i in range(len(problem.layers))] for subblock in SUBBLOCKS
    )
    orders = orders_of(problem, heads, channels)
    best, lowest = None, float("inf")
    for fraction in FRACTIONS:
        kept = hidden[: round(size * fraction / 16) * 16].sort().values
        new = problem if len(kept) == size else narrowed(problem, kept)
        for shapes in uniform_shapes(problem, (parameters + rest) * size / len(kept) - rest):
            choice = Choice.of(new, orders, shapes)
            found = divergence(problem, choice.child(), problem.scoring[:rows])
            if found < lowest:
                best, lowest = Narrow(new, choice, kept), found
    assert best is not None
    return best


def parameters_of(problem: Problem, narrow: Narrow) -> int:
    """All parameters of the model without the dimensions that are zero; each weight has the hidden size once."""
    whole = sum(p.numel() for p in narrow.choice.child().parameters())
    return whole * len(narrow.kept) // problem.library.parent.language_config.hidden_size


@torch.no_grad()
def refitted_narrow(problem: Problem, narrow: Narrow) -> Choice:
    """Both refits; the second has the parent's hidden states in the kept dimensions as its target."""
    choice = refitted(narrow.problem, observe(narrow.problem), narrow.choice)
    if len(narrow.kept) == problem.library.parent.language_config.hidden_size:
        return choice
    library = dataclasses.replace(choice.library, alternatives=[*problem.library.alternatives, *choice.chosen])
    layerwise, rows = split_layers(problem.library.parent, library), Rows(problem.calibration, 4096)
    mask = torch.zeros(problem.library.parent.language_config.hidden_size).index_fill_(0, narrow.kept, 1)
    rows.child.current = torch.cat([layerwise.start(b).embedded for b in batches(problem.calibration)]) * mask
    refit = SETUP.recipe.child_refit
    for i in range(len(problem.layers)):
        split = split_layers(problem.library.parent, problem.library).split(i, *rows.start(layerwise, torch.arange(1)))
        layer = library.layer(*[a for a in choice.chosen if a.layer == i])
        one = ChildRefit(library, layerwise, i, split, refit)
        attention, ffn = (a for a in choice.chosen if a.layer == i)
        alone = library.without(i, "ffn") if attention.is_parent else library.alone(attention)
        _set_all(layer, one._correct(alone, "attention", "attention", rows), mask)
        _set_all(layer, one._correct(layer, "ffn", "block", rows), mask)
        if not rows.parent.is_recorded:
            rows.pass_through_parent(layerwise, i)
        rows.pass_through_child(layerwise, i, layer)
        rows.advance()
        library = _with_weights(library, [attention, ffn], layer)
    problem.work.tokens += 3 * problem.calibration.numel()
    return Choice(library, choice.chosen, choice.parameters)


def _set_all(layer: nn.Module, weights: Mapping[str, torch.Tensor], mask: torch.Tensor) -> None:
    for name, weight in weights.items():
        set_weight(layer, name, weight.to(mask.dtype) * mask[:, None])


def _with_weights(library: Library, changed: Sequence[Alternative], layer: nn.Module) -> Library:
    """The library with the weights of a layer's last projections, for these alternatives together."""
    names = [r[0] for s in SUBBLOCKS if (r := library.last_projection(changed[0].layer, s)) is not None]
    present = dict(layer.named_parameters())
    weights = {name: present[name].detach() for name in names if name in present}
    return library.with_kept(library.kept, keeping(library.pairs, pair_identity(changed), changed[0].layer, weights))
