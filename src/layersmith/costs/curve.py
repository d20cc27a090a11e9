"""Correction from the sum of parts to the time of a whole child.

Parts are timed in models in which every layer has them. In a child they are next to other parts, and what two of them
save together is not the sum of what each saves, for example if what remains fits into a cache. So whole children are
timed, and the sum is corrected:

    t(child) / t(parent) = f(x),   x = sum of parts / t(parent),

with f increasing and fixed at both ends, since the parent and the model of no-ops are timed themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Prior: twice the standard deviation of the error of a sum halfway between its ends, as a share of the parent's time. A
# larger value follows the timed children more closely, and their noise too.
_SPREAD = 0.1
# The curve rises at least this much for each unit of the sum, so that it can be inverted.
_LEAST_SLOPE = 0.1


@dataclass(frozen=True)
class Curve:
    """A piecewise linear increasing function; beyond its points the slope is 1.

    Attributes:
        sums: Sums of parts, as shares of the parent's time.
        wholes: Times of the whole children with these sums, as shares of the parent's time.
    """

    sums: tuple[float, ...] = (0.0, 1.0)
    wholes: tuple[float, ...] = (0.0, 1.0)

    def __call__(self, share: float) -> float:
        return _between(share, self.sums, self.wholes)

    def inverse(self, share: float) -> float:
        return _between(share, self.wholes, self.sums)

    @staticmethod
    def fitted(least: float, seen: Sequence[tuple[float, float, float]]) -> Curve:
        """The curve through timed children, smoothed as far as their distance from the sum is noise.

        The error of the sum is modelled as a Brownian bridge between the ends. Its mean given the timed children is
        linear between them, and shrunk towards 0 by their noise (Gaussian process regression).

        Args:
            least: Time of the model of no-ops, as a share of the parent's.
            seen: For each timed child the sum, the whole, and its standard error, as shares of the parent's time.
        """
        inside = [(x, y, error) for x, y, error in seen if least < x < 1]
        if not inside or least >= 1:
            return Curve()
        x, y, error = np.array(inside).T
        place = (x - least) / (1 - least)
        covariance = _SPREAD**2 * (np.minimum.outer(place, place) - np.outer(place, place))
        error_of_sum = covariance @ np.linalg.solve(covariance + np.diag(np.square(error) + 1e-12), y - x)
        sums, wholes = [least], [least]
        for k in np.argsort(x, kind="stable"):
            if x[k] <= sums[-1]:
                continue
            low = wholes[-1] + _LEAST_SLOPE * (x[k] - sums[-1])
            high = 1 - _LEAST_SLOPE * (1 - x[k])
            sums.append(float(x[k]))
            wholes.append(float(min(high, max(low, x[k] + error_of_sum[k]))))
        return Curve((*sums, 1.0), (*wholes, 1.0))


def _between(share: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if share <= xs[0]:
        return ys[0] + share - xs[0]
    if share >= xs[-1]:
        return ys[-1] + share - xs[-1]
    return float(np.interp(share, xs, ys))


@dataclass(frozen=True)
class Bend:
    """Corrects all costs that are times, each by its curve.

    Attributes:
        curves: Curve of each time cost.
        parent: Costs of the parent.
        made_of: For each cost that is a weighted sum of time costs, their weights.
    """

    curves: Mapping[str, Curve]
    parent: Mapping[str, Any]
    made_of: Mapping[str, Mapping[str, float]]

    def whole(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Costs of a child from the sums of its parts."""
        costs = dict(sums)
        for cost, curve in self.curves.items():
            costs[cost] = curve(sums[cost] / self.parent[cost]) * self.parent[cost]
        for cost, weights in self.made_of.items():
            costs[cost] = math.fsum(weight * costs[name] for name, weight in weights.items())
        return costs

    def sum_for(self, cost: Callable[[Mapping[str, Any]], float], limit: float) -> float:
        """The sum of parts of a child that costs ``limit``, if all its costs are the same share of the parent's.

        Args:
            cost: A cost as a function of all costs by name, increasing in each.
            limit: Cost of the whole child.
        """
        unit, curve = self._curve_of(cost)
        return curve.inverse(limit / unit) * unit

    def whole_for(self, cost: Callable[[Mapping[str, Any]], float], total: float) -> float:
        """Cost of a child whose parts sum to ``total``, under the same assumption."""
        unit, curve = self._curve_of(cost)
        return curve(total / unit) * unit

    def _curve_of(self, cost: Callable[[Mapping[str, Any]], float]) -> tuple[float, Curve]:
        """The parent's cost, and the curve of a combined cost."""
        unit = cost(self.parent) or 1.0
        sums = sorted({share for curve in self.curves.values() for share in curve.sums})
        children = ({name: share * value for name, value in self.parent.items()} for share in sums)
        return unit, Curve(tuple(sums), tuple(cost(self.whole(child)) / unit for child in children))
