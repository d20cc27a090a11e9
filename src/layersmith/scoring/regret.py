"""The expected regret of choosing with estimated scores, and which scores it comes from.

At each size of the child there is a multiplier of the cost, lambda, under which every subblock takes the alternative
with the lowest score + lambda cost. Most alternatives are far from being taken, whatever their errors. Let s be the
known scores, s' a draw of what they may be, and a and a' what a subblock takes by s and by s'. Not knowing s' costs

    E[(s'_a + lambda c_a) - (s'_a' + lambda c_a')],

summed over subblocks. Divided by the sum of the scores of what is taken, this is the child's expected regret. Each
term is attributed half to a and half to a'; that share is the value of scoring them exactly. The multipliers are those
of the known scores.

Source: the value of perfect information, Raiffa and Schlaifer, "Applied Statistical Decision Theory" (1961).

Shapes: n alternatives, K draws of their scores, G subblocks, M the most alternatives of a subblock, the parent's
included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layersmith.library.alternative import Alternative

# Bounds of a multiplier, in nats per cost of the whole parent: scores lie far inside them. Bisection on a logarithmic
# scale reaches the precision of float64 after 60 halvings.
_LEAST, _MOST, _HALVINGS = 1e-15, 1e6, 60


@dataclass(frozen=True)
class Axis:
    """A cost by which children are chosen.

    Attributes:
        cost: Name of the cost.
        shares: Key of each alternative, the parent's included, to its share of the parent's cost.
        fixed: Share of what is outside the layers.
        sizes: Sizes of the children that the scores are for, as shares of the parent's cost.
    """

    cost: str
    shares: Mapping[str, float]
    fixed: float
    sizes: tuple[float, ...]


class ExpectedRegret:
    """The alternatives of every subblock, with their costs on the axes of the search.

    Args:
        alternatives: All alternatives, with the parent's for every subblock.
        pending: The alternatives that are scored, in the order of all inputs and outputs.
        axes: Costs by which children are chosen.
    """

    def __init__(self, alternatives: Sequence[Alternative], pending: Sequence[Alternative], axes: Sequence[Axis]):
        index = {a.identity: i for i, a in enumerate(pending)}
        places: dict[tuple[int, str], list[Alternative]] = {}
        for a in sorted(alternatives, key=lambda a: not a.is_parent):
            places.setdefault((a.layer, a.subblock), []).append(a)
        most = max(map(len, places.values()))
        # Index of each candidate into the scores with a 0 in front, which stands for the parent and for padding.
        self._at = torch.zeros(len(places), most, dtype=torch.long)
        self._costs = [torch.full(self._at.shape, math.inf, dtype=torch.float64) for _ in axes]
        for row, members in enumerate(places.values()):
            for column, a in enumerate(members):
                self._at[row, column] = 0 if a.is_parent else 1 + index[a.identity]
                for axis, costs in zip(axes, self._costs, strict=True):
                    costs[row, column] = axis.shares[a.key]
        self._axes, self._count = axes, len(pending)

    def regret(self, known: torch.Tensor, drawn: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The expected regret as a share of the loss increase, averaged over sizes.

        Args:
            known: ``[n]``, the known scores.
            drawn: ``[n, K]``, draws of what they may be.

        Returns:
            The regret, and the part of each alternative in it, ``[n]``.
        """
        known = torch.cat([known.new_zeros(1), known])[self._at]  # [G, M]
        maybe = torch.cat([drawn.new_zeros(1, drawn.shape[1]), drawn])[self._at]  # [G, M, K]
        parts = [
            self._at_size(known, maybe, costs, _multiplier(known, costs, size - axis.fixed))
            for axis, costs in zip(self._axes, self._costs, strict=True)
            for size in axis.sizes
        ]
        if not parts:
            return 0.0, torch.zeros(self._count, dtype=torch.float64)
        mean = torch.stack(parts).mean(0)
        return float(mean.sum()), mean[1:]

    def _at_size(
        self, known: torch.Tensor, maybe: torch.Tensor, costs: torch.Tensor, multiplier: float
    ) -> torch.Tensor:
        """``[1 + n]``: the part of each alternative in the regret at one size."""
        taken = (known + multiplier * costs).argmin(1, keepdim=True)  # [G, 1]
        whole = float(known.gather(1, taken).sum())
        parts = torch.zeros(1 + self._count, dtype=torch.float64)
        if whole <= 0:
            return parts
        values = maybe + multiplier * costs[:, :, None]
        least, instead = values.min(1)  # [G, K]
        taken_instead = taken.expand_as(instead)
        lost = values.gather(1, taken_instead[:, None])[:, 0] - least
        for chosen in (taken_instead, instead):
            parts.index_add_(0, self._at.gather(1, chosen).flatten(), lost.flatten() / (2 * lost.shape[1] * whole))
        return parts


def _multiplier(scores: torch.Tensor, costs: torch.Tensor, size: float) -> float:
    """The lowest multiplier under which the candidates that subblocks take cost no more than ``size``."""
    low, high = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        taken = (scores + middle * costs).argmin(1, keepdim=True)
        if float(costs.gather(1, taken).sum()) > size:
            low = middle
        else:
            high = middle
    return high
