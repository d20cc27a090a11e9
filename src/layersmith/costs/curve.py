"""From the sum of parts to the time of a whole child.

Parts are timed in models in which all layers have them; in a child they stand beside others, and what two of them save
together is not what each saves, e.g. where what is left fits into a cache. So children that were timed as wholes bend
the sum:

    t(child) / t(parent) = f(x),   x = sum of parts / t(parent),

f increasing, with both ends fixed, since the parent and a model of no-ops are timed themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What a sum halfway between its ends is off by, as far as is known before any check, twice; of the parent's time.
_SPREAD = 0.1
# A step of the sum is worth at least so much of a step of the whole.
_LEAST_SLOPE = 0.1


@dataclass(frozen=True)
class Curve:
    """A line through points, both coordinates increasing; beyond them the slope is 1.

    Attributes:
        sums: shares of the parent's time.
        wholes: what they stand for.
    """

    sums: tuple[float, ...] = (0.0, 1.0)
    wholes: tuple[float, ...] = (0.0, 1.0)

    def __call__(self, share: float) -> float:
        return _between(share, self.sums, self.wholes)

    def inverse(self, share: float) -> float:
        return _between(share, self.wholes, self.sums)

    @staticmethod
    def fitted(least: float, seen: Sequence[tuple[float, float, float]]) -> Curve:
        """The curve through what was seen, as far as that is not noise.

        What a sum is off by is taken for a Brownian bridge between the ends: its mean, given what was seen, is a line
        from one to the next, drawn to 0 by noise.

        Args:
            least: share of a model of no-ops.
            seen: sum, whole and the standard error of that, as shares of the parent's time.
        """
        inside = [(x, y, error) for x, y, error in seen if least < x < 1]
        if not inside or least >= 1:
            return Curve()
        x, y, error = np.array(inside).T
        place = (x - least) / (1 - least)
        covariance = _SPREAD**2 * (np.minimum.outer(place, place) - np.outer(place, place))
        off = covariance @ np.linalg.solve(covariance + np.diag(np.square(error) + 1e-12), y - x)
        sums, wholes = [least], [least]
        for k in np.argsort(x, kind="stable"):
            if x[k] <= sums[-1]:
                continue
            low = wholes[-1] + _LEAST_SLOPE * (x[k] - sums[-1])
            high = 1 - _LEAST_SLOPE * (1 - x[k])
            sums.append(float(x[k]))
            wholes.append(float(min(high, max(low, x[k] + off[k]))))
        return Curve((*sums, 1.0), (*wholes, 1.0))


def _between(share: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if share <= xs[0]:
        return ys[0] + share - xs[0]
    if share >= xs[-1]:
        return ys[-1] + share - xs[-1]
    return float(np.interp(share, xs, ys))


@dataclass(frozen=True)
class Bend:
    """Whole costs from sums of parts: those that are times go along curves, and what is made of them with them.

    Attributes:
        curves: by cost.
        parent: costs of the parent.
        made_of: cost that is a weighted sum of others: their weights.
    """

    curves: Mapping[str, Curve]
    parent: Mapping[str, Any]
    made_of: Mapping[str, Mapping[str, float]]

    def whole(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Costs of a child from the sums of its parts'."""
        found = dict(sums)
        for cost, curve in self.curves.items():
            found[cost] = curve(sums[cost] / self.parent[cost]) * self.parent[cost]
        for cost, weights in self.made_of.items():
            found[cost] = math.fsum(weight * found[name] for name, weight in weights.items())
        return found

    def sum_for(self, cost: Callable[[Mapping[str, Any]], float], limit: float) -> float:
        """The sum of parts for which a whole child costs ``limit``, if all its costs are the same share of the
        parent's.

        Args:
            cost: from costs by name, increasing in each.
            limit: of the whole child.
        """
        unit, curve = self._curve_of(cost)
        return curve.inverse(limit / unit) * unit

    def whole_for(self, cost: Callable[[Mapping[str, Any]], float], total: float) -> float:
        """What a child costs whose parts sum to ``total``, under the same assumption."""
        unit, curve = self._curve_of(cost)
        return curve(total / unit) * unit

    def _curve_of(self, cost: Callable[[Mapping[str, Any]], float]) -> tuple[float, Curve]:
        """The parent's cost, and what a share of it stands for."""
        unit = cost(self.parent) or 1.0
        sums = sorted({share for curve in self.curves.values() for share in curve.sums})
        children = ({name: share * value for name, value in self.parent.items()} for share in sums)
        return unit, Curve(tuple(sums), tuple(cost(self.whole(child)) / unit for child in children))
