"""What is lost where scores are wrong: which of them decide what the search takes.

At a size of the child there is a multiplier of the cost, lambda, under which every subblock takes the alternative of
least score + lambda cost. Most alternatives are far from that whatever their errors. With s the scores as they are
known, s' scores as they may be, and a, a' what a subblock takes by each, what is lost by not knowing is

    E[(s'_a + lambda c_a) - (s'_a' + lambda c_a')],

summed over subblocks; beside the sum of the scores of what is taken it is the child's regret. Half of each term is the
doing of a, half of a', and so much it is worth to run them exactly. Multipliers are those of the middle scores.

Shapes: n alternatives, K draws of their scores, G subblocks, M the most alternatives of a subblock, the parent's own
included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layersmith.library.alternative import Alternative

# A multiplier is looked for between these, in scores for the whole parent's cost.
_LEAST, _MOST, _HALVINGS = 1e-15, 1e6, 60


@dataclass(frozen=True)
class Axis:
    """A cost by which children are chosen.

    Attributes:
        cost: its name.
        shares: key of an alternative, a parent's own too, to its share of the parent's cost.
        fixed: the share of what is outside the layers.
        sizes: of the children that matter, as shares of the parent's cost.
    """

    cost: str
    shares: Mapping[str, float]
    fixed: float
    sizes: tuple[float, ...]


class Contest:
    """Alternatives and the axes on which they stand beside each other.

    Args:
        alternatives: all of them, a parent's own for every subblock among them.
        pending: those that are scored, in the order of all that is given and told.
        axes: of the search.
    """

    def __init__(self, alternatives: Sequence[Alternative], pending: Sequence[Alternative], axes: Sequence[Axis]):
        index = {a.identity: i for i, a in enumerate(pending)}
        places: dict[tuple[int, str], list[Alternative]] = {}
        for a in sorted(alternatives, key=lambda a: a.kind != "parent"):
            places.setdefault((a.layer, a.subblock), []).append(a)
        most = max(map(len, places.values()))
        # Place of a candidate in scores with a 0 in front, which is the parent's and that of what is not there.
        self._at = torch.zeros(len(places), most, dtype=torch.long)
        self._costs = [torch.full(self._at.shape, math.inf, dtype=torch.float64) for _ in axes]
        for row, own in enumerate(places.values()):
            for column, a in enumerate(own):
                self._at[row, column] = 0 if a.kind == "parent" else 1 + index[a.identity]
                for axis, costs in zip(axes, self._costs, strict=True):
                    costs[row, column] = axis.shares[a.key]
        self._axes, self._count = axes, len(pending)

    def regret(self, middle: torch.Tensor, drawn: torch.Tensor) -> tuple[float, torch.Tensor]:
        """What is lost, as a share of the loss of what is taken; the mean over sizes, and whose doing it is.

        Args:
            middle: ``[n]``, the scores as they are known.
            drawn: ``[n, K]``, as they may be.

        Returns:
            The regret, and the part of each alternative in it, ``[n]``.
        """
        known = torch.cat([middle.new_zeros(1), middle])[self._at]  # [G, M]
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
        """``[1 + n]``: the part of each in what is lost at a size."""
        taken = (known + multiplier * costs).argmin(1, keepdim=True)  # [G, 1]
        whole = float(known.gather(1, taken).sum())
        found = torch.zeros(1 + self._count, dtype=torch.float64)
        if whole <= 0:
            return found
        values = maybe + multiplier * costs[:, :, None]
        least, instead = values.min(1)  # [G, K]
        taken_instead = taken.expand_as(instead)
        lost = values.gather(1, taken_instead[:, None])[:, 0] - least
        for chosen in (taken_instead, instead):
            found.index_add_(0, self._at.gather(1, chosen).flatten(), lost.flatten() / (2 * lost.shape[1] * whole))
        return found


def _multiplier(scores: torch.Tensor, costs: torch.Tensor, size: float) -> float:
    """The least one under which what subblocks take, ``[G, M]``, costs no more than a size."""
    low, high = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        taken = (scores + middle * costs).argmin(1, keepdim=True)
        if float(costs.gather(1, taken).sum()) > size:
            low = middle
        else:
            high = middle
    return high
