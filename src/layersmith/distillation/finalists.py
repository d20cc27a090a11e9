"""Several solutions for one budget, different by construction: each is the best that differs enough from those before.

Two solutions differ in a subblock if they chose other alternatives there. That a new one differs from an old one in K
of G subblocks is one more limit on costs: an alternative that the old one chose costs 1, any other 0, and no more than
G - K may be spent. So the integer program stays what it is, and its answers stay proven.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.costs.library_costs import CostTable
from layersmith.errors import Infeasible
from layersmith.library.alternative import Alternative
from layersmith.search.budget import Budget
from layersmith.search.choose import Choice, choose
from layersmith.search.solve import Candidate, Group, solve

_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Finalist:
    """A solution that was tried.

    Attributes:
        number: its place by the sum of scores, from 0.
        score: that sum.
        parameters: of the child.
        tokens: it was distilled for.
        kl: to the parent after that, on the scoring rows, in nats a token.
    """

    number: int
    score: float
    parameters: int
    tokens: int
    kl: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def diverse_choices(
    alternatives: Sequence[Alternative],
    losses: Mapping[str, float],
    costs: CostTable,
    budget: Budget,
    count: int,
    distance: int | None = None,
) -> list[Choice]:
    """Up to ``count`` choices within a budget, the best first.

    Args:
        alternatives, losses, costs, budget: see :func:`layersmith.search.choose.choose`.
        count: of choices.
        distance: subblocks in which any two differ at least; default: a tenth of all.

    Returns:
        Fewer than ``count`` where no others are left.

    Raises:
        Infeasible: no choice fits at all.
    """
    found = [choose(alternatives, losses, costs, budget)]
    places: dict[tuple[int, str], list[Alternative]] = {}
    for alternative in alternatives:
        places.setdefault((alternative.layer, alternative.subblock), []).append(alternative)
    least = distance or max(1, math.ceil(_LEAST_SHARE * len(places)))
    by_key = {alternative.key: alternative for alternative in alternatives}
    while len(found) < count:
        chosen_before = [{a.key for a in choice.alternatives} for choice in found]

        def costs_of(own: Alternative, before: Sequence[set[str]] = tuple(chosen_before)) -> dict[str, int]:
            same = {f"same_as_{n}": int(own.key in keys) for n, keys in enumerate(before)}
            return {name: costs.by_key[own.key][name] for name in costs.parent} | same

        groups = [
            Group(
                f"layer {layer} {subblock}",
                tuple(Candidate(own.key, losses[own.key], costs_of(own), own.kind == "parent") for own in members),
            )
            for (layer, subblock), members in sorted(places.items())
        ]
        limits = budget.resolve(costs.parent)
        apart = {f"same_as_{n}": len(groups) - least for n in range(len(found))}
        try:
            solution = solve(groups, limits | apart, costs.fixed)
        except Infeasible:
            break
        found.append(
            dataclasses.replace(
                found[0],
                alternatives=tuple(by_key[key] for key in solution.chosen),
                score=solution.score,
                costs={name: solution.costs[name] for name in costs.parent},
            )
        )
    return found
