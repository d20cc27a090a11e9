"""Wanda-sp: magnitude times activation, every layer alike.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), section 3:
a weight's importance is abs(W_ij) * |X_j|_2, its magnitude times the norm of its input over the calibration tokens.
The structured form, as An et al. (arXiv 2312.11983, section 4) compare with it, sums this over the weights of a unit
that the last projection of a subblock reads, and removes the same share of every layer.
"""

from __future__ import annotations

import torch

from benchmarks.rivals.activations import Activations
from benchmarks.rivals.problem import Choice, Problem, best_of, orders_of, uniform_shapes


def unit_scores(problem: Problem, seen: Activations, i: int, subblock: str) -> torch.Tensor:
    """The sum over a unit's weights in the last projection: ``[H]`` for heads, ``[F]`` for channels."""
    norms = (seen.square(i, subblock) * problem.calibration.numel()).sqrt()
    of_entries = (problem.reader_weight(i, subblock).double().abs() * norms).sum(0)
    return of_entries if subblock == "ffn" else of_entries.view(problem.heads(i).num_heads, -1).sum(1)


def wanda(problem: Problem, seen: Activations, parameters: float) -> Choice:
    """The paper does not say how attention and FFN share the cut; all shares are tried, and the best child is taken."""
    layers = range(len(problem.layers))
    heads, channels = ([unit_scores(problem, seen, i, s) for i in layers] for s in ("attention", "ffn"))
    orders = orders_of(problem, heads, channels)
    return best_of(problem, [Choice.of(problem, orders, shapes) for shapes in uniform_shapes(problem, parameters)])
