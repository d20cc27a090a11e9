"""From alternatives, scores, costs, a budget and rules to solutions: one alternative for every subblock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Budget, is_time
from layersmith.costs.table import CostTable
from layersmith.costs.times import Times
from layersmith.errors import Infeasible
from layersmith.library.alternative import Alternative
from layersmith.recipe import SearchRecipe
from layersmith.records import parse, to_data
from layersmith.search import rules as rules_of
from layersmith.search.solve import Candidate, Group, ProgramSolution, Solver

NO_RULES = SearchRecipe()
_ALIKE = rules_of.RULE + "like solution "
# How often a limit is drawn in until the whole child is within it.
_TRIES = 4


@dataclass(frozen=True)
class Solution:
    """One alternative for each subblock of each layer.

    Attributes:
        alternatives: in the order of layers, attention before FFN.
        score: the sum of their losses under the objective.
        costs: of the whole child.
        parent_costs: of the whole parent.
        limits: upper limits on costs that were asked for.
        budget: as it was asked for.
        proven_optimal: whether no other solution within the limits has a lower score.
        bound: what no other is below, where that is known.
    """

    alternatives: tuple[Alternative, ...]
    score: float
    costs: dict[str, Any]
    parent_costs: dict[str, Any]
    limits: dict[str, Any]
    budget: Budget
    proven_optimal: bool
    bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "alternatives": [to_data(a) for a in self.alternatives],
            "score": self.score,
            "costs": self.costs,
            "parent_costs": self.parent_costs,
            "limits": self.limits,
            "budget": self.budget.to_dict(),
            "proven_optimal": self.proven_optimal,
            "bound": self.bound,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Solution:
        alternatives = tuple(parse(Alternative, entry, "solution.json") for entry in data["alternatives"])
        return Solution(**{**data, "alternatives": alternatives, "budget": Budget.from_dict(data["budget"])})


def choose(
    alternatives: Sequence[Alternative],
    losses: Mapping[str, float],
    costs: CostTable,
    budget: Budget,
    rules: SearchRecipe = NO_RULES,
    blocks: Sequence[BlockConfig] | None = None,
) -> Solution:
    """The best solution within a budget.

    Args:
        alternatives: of every layer, the parent's own included.
        losses: key of an alternative to what it costs in quality; the parent's are 0.
        costs: of every alternative.
        budget: upper limits.
        rules: what a solution must satisfy beside it.
        blocks: of the parent; needed where rules speak of sizes or of layers alike.

    Raises:
        Infeasible: no solution fits; the message says what the smallest child is.
    """
    return SearchProblem(alternatives, losses, costs, budget, rules, blocks).best()


class SearchProblem:
    """All solutions that rules allow, their scores and costs.

    Args:
        alternatives, losses, costs, budget, rules, blocks: see :func:`choose`.

    Raises:
        Infeasible, UsageError: rules that make no sense.
    """

    def __init__(
        self,
        alternatives: Sequence[Alternative],
        losses: Mapping[str, float],
        costs: CostTable,
        budget: Budget,
        rules: SearchRecipe = NO_RULES,
        blocks: Sequence[BlockConfig] | None = None,
    ):
        self.alternatives, self.losses, self.costs = alternatives, losses, costs
        self.budget = budget.within(costs.workload.context)
        self.rules, self.blocks = rules, blocks
        self.limits = budget.resolve(costs.parent)
        self.rule_limits = rules_of.limits_of(rules, costs)
        self.by_place = rules_of.allowed(alternatives, rules, blocks)
        self._own_costs = {
            a.key: rules_of.costs_of(a, rules, costs) for members in self.by_place.values() for a in members
        }
        # What may be chosen together, by the key of a candidate.
        self._members: list[dict[str, tuple[Alternative, ...]]] = [
            self._alike(places) for places in rules_of.together(self.by_place, rules, blocks)
        ]
        self._solver: Solver | None = None

    def with_times(self, times: Times) -> SearchProblem:
        """The same problem with these times among the costs."""
        costs = times.into(self.costs, self.alternatives)
        return SearchProblem(self.alternatives, self.losses, costs, self.budget, self.rules, self.blocks)

    def _alike(self, places: Sequence[rules_of.Place]) -> dict[str, tuple[Alternative, ...]]:
        """Alternatives that all of some subblocks have, by name."""
        by_name = [{a.name: a for a in self.by_place[place]} for place in places]
        common = [name for name in by_name[0] if all(name in own for own in by_name)]
        if not common:
            where = ", ".join(str(layer) for layer, _ in places)
            raise Infeasible(f"Infeasible: layers {where} share no {places[0][1]}. Change search.uniform_groups.")
        return {" ".join(own[name].key for own in by_name): tuple(own[name] for own in by_name) for name in common}

    @property
    def members(self) -> list[list[tuple[Alternative, ...]]]:
        """For each group of the program what can be chosen."""
        return [list(own.values()) for own in self._members]

    # ------------------------------------------------------------------------------------------ solutions

    def best(self, limits: Mapping[str, float] | None = None) -> Solution:
        """The solution with the least sum of losses.

        Args:
            limits: other than the budget's.

        Raises:
            Infeasible: none is within the limits.
        """
        if self._solver is None:
            self._solver = self.solver()
        wanted = {**(self.limits if limits is None else limits), **self.rule_limits}
        inside = self.inside(wanted)
        solution = self.solution(self._solver.solve(inside))
        for _ in range(_TRIES if self.costs.bend is not None else 0):
            # A limit on what is made of several times was translated as if all were the same share of the parent's.
            total = self._totals(solution.alternatives)
            over = {name: limit / total[name] for name, limit in wanted.items() if total[name] > limit * (1 + 1e-9)}
            if not over:
                break
            inside |= {name: inside[name] * share for name, share in over.items()}
            solution = self.solution(self._solver.solve(inside))
        return solution

    def best_by(
        self, losses: Mapping[str, float], away: Sequence[tuple[Sequence[Alternative], int, int]] = ()
    ) -> Solution | None:
        """The best solution by other losses, so far from others; None if there is none.

        Args:
            losses: key of an alternative to its loss.
            away: solutions, and in how many subblocks the wanted one differs from each, at least and at most.
        """
        likes = {}
        limits: dict[str, float] = {}
        for k, (other, least, most) in enumerate(away):
            keys = {a.key for a in other}
            name = f"{_ALIKE}{k}"
            likes[name] = keys, 1
            limits[name] = len(other) - least
            if most < len(other):
                likes[name + " "] = keys, -1
                limits[name + " "] = most - len(other)
        try:
            solution = self.solver(losses, likes).solve(self.inside(self.limits | self.rule_limits) | limits)
        except Infeasible:
            return None
        return dataclasses.replace(self.solution(solution), score=self.score(self.solution(solution).alternatives))

    def several(self, count: int, places: int) -> list[Solution]:
        """The best solution, then each time the best that differs from all before in so many subblocks, at least."""
        found = [self.best()]
        while len(found) < count:
            following = self.best_by(self.losses, [(own.alternatives, places, 2**31) for own in found])
            if following is None:
                break
            found.append(following)
        return found

    def least(self, cost: str, limits: Mapping[str, float]) -> Any:
        """The least of a cost that a child can have within limits on others; rules hold.

        Raises:
            Infeasible: no solution is within the limits.
        """
        return self._whole_of(cost, self.solver().least(cost, self.inside({**limits, **self.rule_limits})))

    def reachable(self) -> None:
        """Raises: Infeasible: no solution is within the limits."""
        self.solver().reachable(self.inside(self.limits | self.rule_limits))

    def solution(self, solution: ProgramSolution) -> Solution:
        by_key = {key: own for members in self._members for key, own in members.items()}
        chosen = sorted((a for key in solution.chosen for a in by_key[key]), key=lambda a: (a.layer, a.subblock))
        return dataclasses.replace(self.of(chosen, solution.proven_optimal), bound=solution.bound)

    def of(self, chosen: Sequence[Alternative], proven: bool = False) -> Solution:
        """A solution of these alternatives, with its score and costs."""
        own = self._costs_of(chosen)
        return Solution(tuple(chosen), self.score(chosen), own, self.costs.parent, self.limits, self.budget, proven)

    def _costs_of(self, chosen: Sequence[Alternative]) -> dict[str, Any]:
        """Of a whole child."""
        sums: dict[str, Any] = {}
        for name in self.costs.parent:
            values = [self.costs.by_key[a.key][name] for a in chosen]
            whole = all(isinstance(v, int) for v in values)
            sums[name] = self.costs.fixed[name] + (sum(values) if whole else math.fsum(values))
        return self.costs.whole(sums)

    def score(self, chosen: Sequence[Alternative]) -> float:
        return math.fsum(self.losses[a.key] for a in chosen)

    def fits(self, chosen: Sequence[Alternative]) -> bool:
        """Whether a solution is within all limits; rules on which alternatives go together are not looked at."""
        totals = self._totals(chosen)
        return all(totals[name] <= limit for name, limit in (self.limits | self.rule_limits).items())

    def _totals(self, chosen: Sequence[Alternative]) -> dict[str, float]:
        """All costs of a whole child, those of rules included."""
        whole = self._costs_of(chosen)
        extra = rules_of.extra_costs(self.rules, self.costs)
        return whole | {
            name: rules_of.weighted(extra[name], whole)
            if name in extra
            else sum(self._own_costs[a.key][name] for a in chosen)
            for name in self.rule_limits
        }

    # ------------------------------------------------------------------------------------------ sums and wholes

    def inside(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Limits on sums of parts that stand for limits on whole children."""
        bend = self.costs.bend
        if bend is None:
            return dict(limits)
        return {
            name: bend.sum_for(cost, limit) if (cost := self._bent(name)) is not None else limit
            for name, limit in limits.items()
        }

    def _whole_of(self, name: str, total: float) -> float:
        """What a whole child costs whose parts sum to so much."""
        cost = self._bent(name)
        return total if cost is None or self.costs.bend is None else self.costs.bend.whole_for(cost, total)

    def _bent(self, name: str) -> Callable[[Mapping[str, Any]], float] | None:
        """How a cost is told from those by name; None where a whole costs what its parts do."""
        limit = rules_of.extra_costs(self.rules, self.costs).get(name)
        if limit is not None:
            return (lambda own: rules_of.weighted(limit, own)) if rules_of.timed(limit) else None
        return (lambda own: float(own[name])) if is_time(name) else None

    # ------------------------------------------------------------------------------------------ the program

    def solver(
        self, losses: Mapping[str, float] | None = None, likes: Mapping[str, tuple[set[str], int]] | None = None
    ) -> Solver:
        """The integer program under some losses, and costs that count how many subblocks equal another solution's."""
        losses = self.losses if losses is None else losses
        groups = []
        for members in self._members:
            candidates = []
            for key, own in members.items():
                costs = {name: sum(self._own_costs[a.key][name] for a in own) for name in self._own_costs[own[0].key]}
                for name, (keys, sign) in (likes or {}).items():
                    costs[name] = sign * sum(a.key in keys for a in own)
                changes = sum(not a.is_parent for a in own)
                candidates.append(Candidate(key, math.fsum(losses[a.key] for a in own), costs, changes == 0, changes))
            first = next(iter(members.values()))
            groups.append(Group(f"layer {first[0].layer} {first[0].subblock}", tuple(candidates)))
        return Solver(groups, rules_of.fixed_of(self.rules, self.costs), self.costs.parent, self._whole_of)
