"""From alternatives, scores, costs and a budget to the choice: one alternative for every subblock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layersmith import schema
from layersmith.costs.library_costs import CostTable
from layersmith.library.alternative import Alternative
from layersmith.search.budget import Budget
from layersmith.search.solve import Candidate, Group, solve


@dataclass(frozen=True)
class Choice:
    """One alternative for each subblock of each layer.

    Attributes:
        alternatives: in the order of layers, attention before FFN.
        score: the sum of their losses under the objective.
        costs: of the whole child.
        parent_costs: of the whole parent.
        limits: upper limits on costs that were asked for.
        budget: as it was asked for.
        proven_optimal: whether no other choice within the limits has a lower score.
    """

    alternatives: tuple[Alternative, ...]
    score: float
    costs: dict[str, int]
    parent_costs: dict[str, int]
    limits: dict[str, int]
    budget: Budget
    proven_optimal: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "alternatives": [schema.to_data(a) for a in self.alternatives],
            "score": self.score,
            "costs": self.costs,
            "parent_costs": self.parent_costs,
            "limits": self.limits,
            "budget": self.budget.to_dict(),
            "proven_optimal": self.proven_optimal,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Choice:
        alternatives = tuple(schema.parse(Alternative, entry, "solution.json") for entry in data["alternatives"])
        return Choice(**{**data, "alternatives": alternatives, "budget": Budget.from_dict(data["budget"])})


def choose(
    alternatives: Sequence[Alternative], losses: Mapping[str, float], costs: CostTable, budget: Budget
) -> Choice:
    """The best choice within a budget.

    Args:
        alternatives: of every layer, the parent's own included.
        losses: key of an alternative to what it costs in quality; the parent's are 0.
        costs: of every alternative.
        budget: upper limits.

    Raises:
        Infeasible: no choice fits; the message says what the smallest child is.
    """
    by_place: dict[tuple[int, str], list[Alternative]] = {}
    for alternative in alternatives:
        by_place.setdefault((alternative.layer, alternative.subblock), []).append(alternative)
    limits = budget.resolve(costs.parent)
    groups = [
        Group(
            f"layer {layer} {subblock}",
            tuple(
                Candidate(
                    a.key, losses[a.key], {name: costs.by_key[a.key][name] for name in costs.parent}, a.kind == "parent"
                )
                for a in members
            ),
        )
        for (layer, subblock), members in sorted(by_place.items())
    ]
    solution = solve(groups, limits, costs.fixed, parent_costs=costs.parent)
    by_key = {a.key: a for a in alternatives}
    return Choice(
        tuple(by_key[key] for key in solution.chosen),
        solution.score,
        dict(solution.costs),
        costs.parent,
        limits,
        budget,
        solution.proven_optimal,
    )
