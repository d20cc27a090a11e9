"""FLAP: units whose input fluctuates least are replaced by their mean.

Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv 2312.11983). The
metric of an input channel j is Var(X_j) * |W_:j|^2, the variance over tokens times the squared norm of the column that
reads it; a head's is the mean over its channels. Metrics are standardized within each subblock of each layer, then all
units of the model are ranked together. What a removed unit contributes on average, W_:j * E[X_j], becomes a bias.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.rivals.activations import Activations
from benchmarks.rivals.problem import Choice, Problem, head_slices, orders_of, remove_lowest
from layersmith.heterogeneous.plan import SUBBLOCKS


def fluctuation(problem: Problem, seen: Activations, i: int, subblock: str) -> torch.Tensor:
    """Var(X_j) * |W_:j|^2 for each unit."""
    variance = seen.square(i, subblock) - seen.mean[i, subblock].square()
    metric = variance * problem.reader_weight(i, subblock).double().square().sum(0)
    return metric if subblock == "ffn" else metric.view(problem.heads(i).num_heads, -1).mean(1)


def standardized(metric: torch.Tensor) -> torch.Tensor:
    return (metric - metric.mean()) / metric.std().clamp_min(1e-12)


def flap(problem: Problem, seen: Activations, parameters: float, compensate: bool = True) -> Choice:
    """Every attention keeps a slice of heads, since its bias needs a projection to sit on."""
    layers = range(len(problem.layers))
    heads, channels = ([standardized(fluctuation(problem, seen, i, s)) for i in layers] for s in SUBBLOCKS)
    # A slice is as many heads as there are groups; its metric is their mean, on the scale of the others.
    slices = [head_slices(problem, i, h)[1] / problem.heads(i).shares for i, h in enumerate(heads)]
    shapes = remove_lowest(problem, slices, channels, parameters, least=1)
    shapes = [(heads_left, max(1, width)) for heads_left, width in shapes]
    choice = Choice.of(problem, orders_of(problem, heads, channels), shapes)
    if not compensate:
        return choice
    return dataclasses.replace(choice, biases=mean_of_removed(problem, seen, choice))


def mean_of_removed(problem: Problem, seen: Activations, choice: Choice) -> dict[str, torch.Tensor]:
    """The bias of every projection that lost units, by its name in the model."""
    biases = {}
    for a in choice.chosen:
        gone = None if a.is_parent else choice.library.units_gone(a)
        if gone is not None:
            (removed,) = gone.values()
            mean = seen.mean[a.layer, a.subblock][removed]
            name = (
                f"{problem.library.parent.descriptor.layer_block_name(a.layer)}.{problem.reader(a.layer, a.subblock)}"
            )
            biases[name] = (problem.reader_weight(a.layer, a.subblock).double()[:, removed] @ mean).float()
    return biases
