"""The search problem: one alternative for every subblock, with costs within limits, under rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from layersmith.block_config import BlockConfig
from layersmith.costs.budget import Limits, is_time
from layersmith.costs.table import CostTable
from layersmith.costs.times import Times
from layersmith.errors import Infeasible
from layersmith.library.alternative import Alternative
from layersmith.library.formats import EMBEDDINGS, embeddings_key
from layersmith.recipe import SearchRecipe
from layersmith.search import rules as rules_of
from layersmith.search.solution import Solution
from layersmith.search.solve import Candidate, Group, ProgramSolution, Solver

NO_RULES = SearchRecipe()
_SHARED = rules_of.RULE + "like solution "
# How often a time limit is tightened until the whole child is within it. Each try solves the program again; the error
# shrinks with every one.
_TRIES = 4


class _Conversion:
    """Converts between costs of whole children and sums over their parts, which differ for times alone."""

    def __init__(self, rules: SearchRecipe, costs: CostTable):
        self.bend, self.sums = costs.bend, rules_of.extra_costs(rules, costs)

    def to_sums(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Limits on sums of parts that correspond to limits on whole children."""
        bend = self.bend
        if bend is None:
            return dict(limits)
        return {
            name: bend.sum_for(cost, limit) if (cost := self._bent(name)) is not None else limit
            for name, limit in limits.items()
        }

    def to_whole(self, name: str, total: float) -> float:
        """Cost of the whole child from the sum over its parts."""
        cost = self._bent(name)
        return total if cost is None or self.bend is None else self.bend.whole_for(cost, total)

    def _bent(self, name: str) -> Callable[[Mapping[str, Any]], float] | None:
        """Computes a cost from all costs by name; None if the cost of a child is the sum over its parts."""
        limit = self.sums.get(name)
        if limit is not None:
            return (lambda costs: rules_of.weighted(limit, costs)) if rules_of.timed(limit) else None
        return (lambda costs: float(costs[name])) if is_time(name) else None


class SearchProblem:
    """All solutions that the rules allow, with their scores and costs.

    Args:
        alternatives: Alternatives of every layer, the parent's included.
        losses: Key of each alternative to its loss increase; the parent's are 0.
        costs: Costs of every alternative.
        limits: Upper limits on costs.
        rules: What a solution must satisfy besides the limits.
        blocks: Block configs of the parent; needed by rules on sizes or on groups of equal layers.

    Raises:
        Infeasible: A subblock has no allowed alternative.
        UsageError: A rule makes no sense for this parent.
    """

    def __init__(
        self,
        alternatives: Sequence[Alternative],
        losses: Mapping[str, float],
        costs: CostTable,
        limits: Limits,
        rules: SearchRecipe = NO_RULES,
        blocks: Sequence[BlockConfig] | None = None,
    ):
        self.alternatives, self.losses, self.costs, self.asked = alternatives, losses, costs, limits
        self.rules, self.blocks = rules, blocks
        self.limits = limits.resolve(costs.parent)
        self.rule_limits = rules_of.limits_of(rules, costs)
        self.conversion = _Conversion(rules, costs)
        self.by_place = rules_of.allowed(alternatives, rules, blocks)
        self._costs_by_key = {
            a.key: rules_of.costs_of(a, rules, costs) for members in self.by_place.values() for a in members
        }
        # For each group of subblocks that must be identical, key of a candidate to its alternatives.
        self._members: list[dict[str, tuple[Alternative, ...]]] = [
            _candidates(self.by_place, places) for places in rules_of.identical_groups(self.by_place, rules, blocks)
        ]
        self._solver: Solver | None = None

    def with_times(self, times: Times) -> SearchProblem:
        """The same problem with these times among the costs."""
        costs = times.into(self.costs, self.alternatives)
        return SearchProblem(self.alternatives, self.losses, costs, self.asked, self.rules, self.blocks)

    def within(self, limits: Limits) -> SearchProblem:
        """The same problem with other limits."""
        return SearchProblem(self.alternatives, self.losses, self.costs, limits, self.rules, self.blocks)

    @property
    def members(self) -> list[list[tuple[Alternative, ...]]]:
        """For each group of the program, the alternatives of its candidates."""
        return [list(members.values()) for members in self._members]

    def best(self, limits: Mapping[str, float] | None = None) -> Solution:
        """The solution with the lowest sum of losses.

        Args:
            limits: Limits in place of the budget's.

        Raises:
            Infeasible: No solution is within the limits.
        """
        if self._solver is None:
            self._solver = self.solver()
        wanted = {**(self.limits if limits is None else limits), **self.rule_limits}
        inside = self.conversion.to_sums(wanted)
        solution = self.solution_of(self._solver.solve(inside))
        for _ in range(_TRIES if self.costs.bend is not None else 0):
            # A limit on a sum of several times was translated as if each were the same share of the parent's.
            total = self._totals(solution.alternatives)
            over = {name: limit / total[name] for name, limit in wanted.items() if total[name] > limit * (1 + 1e-9)}
            if not over:
                break
            inside |= {name: inside[name] * share for name, share in over.items()}
            solution = self.solution_of(self._solver.solve(inside))
        return solution

    def best_by(
        self, losses: Mapping[str, float], away: Sequence[tuple[Sequence[Alternative], int, int]] = ()
    ) -> Solution | None:
        """The best solution under different losses and distances from given ones, or None.

        Args:
            losses: Key of each alternative to its loss.
            away: Solutions, and in how many subblocks the result differs from each, at least and at most.
        """
        likes = {}
        limits: dict[str, float] = {}
        for k, (other, least, most) in enumerate(away):
            keys = {a.key for a in other}
            name = f"{_SHARED}{k}"
            likes[name] = keys, 1
            limits[name] = len(other) - least
            if most < len(other):
                likes[name + " "] = keys, -1
                limits[name + " "] = most - len(other)
        try:
            result = self.solver(losses, likes).solve(self.conversion.to_sums(self.limits | self.rule_limits) | limits)
        except Infeasible:
            return None
        solution = self.solution_of(result)
        return dataclasses.replace(solution, score=self.score(solution.alternatives, solution.embeddings))

    def several(self, count: int, places: int) -> list[Solution]:
        """The best solutions, each of which differs from all before it in at least ``places`` subblocks."""
        solutions = [self.best()]
        while len(solutions) < count:
            following = self.best_by(self.losses, [(other.alternatives, places, 2**31) for other in solutions])
            if following is None:
                break
            solutions.append(following)
        return solutions

    def least(self, cost: str, limits: Mapping[str, float]) -> Any:
        """The least of a cost that a child can have within the rules and limits on other costs.

        Raises:
            Infeasible: No solution is within the limits.
        """
        total = self.solver().least(cost, self.conversion.to_sums({**limits, **self.rule_limits}))
        return self.conversion.to_whole(cost, total)

    def reachable(self) -> None:
        """Check that some solution is within the limits.

        Raises:
            Infeasible: No solution is within the limits.
        """
        self.solver().reachable(self.conversion.to_sums(self.limits | self.rule_limits))

    def solution_of(self, result: ProgramSolution) -> Solution:
        """The solution with the program's candidates."""
        by_key = {key: group for members in self._members for key, group in members.items()}
        alternatives = (a for key in result.chosen for a in by_key.get(key, ()))
        chosen = sorted(alternatives, key=lambda a: (a.layer, a.subblock))
        embeddings = next((name for name in self.costs.outside if embeddings_key(name) == result.chosen[-1]), "")
        return dataclasses.replace(self.of(chosen, result.proven_optimal, embeddings), bound=result.bound)

    def of(self, chosen: Sequence[Alternative], proven: bool = False, embeddings: str = "") -> Solution:
        """A solution of these alternatives with embeddings and head in a format, with its score and costs."""
        return Solution(
            alternatives=tuple(chosen),
            score=self.score(chosen, embeddings),
            costs=self._costs_of(chosen, embeddings),
            embeddings=embeddings,
            parent_costs=self.costs.parent,
            limits=self.limits,
            asked=self.asked,
            workload=self.costs.workload,
            proven_optimal=proven,
        )

    def _costs_of(self, chosen: Sequence[Alternative], embeddings: str = "") -> dict[str, Any]:
        """Costs of the whole child."""
        sums: dict[str, Any] = {}
        fixed = self.costs.outside[embeddings] if embeddings else self.costs.fixed
        for name in self.costs.parent:
            values = [self.costs.by_key[a.key][name] for a in chosen]
            whole = all(isinstance(v, int) for v in values)
            sums[name] = fixed[name] + (sum(values) if whole else math.fsum(values))
        return self.costs.whole(sums)

    def score(self, chosen: Sequence[Alternative], embeddings: str = "") -> float:
        """The sum of the losses of these alternatives, and of embeddings and head in a format."""
        outside = self.losses[embeddings_key(embeddings)] if embeddings else 0.0
        return math.fsum([*(self.losses[a.key] for a in chosen), outside])

    def fits(self, chosen: Sequence[Alternative]) -> bool:
        """Whether a solution is within all limits. Rules on groups of equal layers are not checked."""
        totals = self._totals(chosen)
        return all(totals[name] <= limit for name, limit in (self.limits | self.rule_limits).items())

    def _totals(self, chosen: Sequence[Alternative]) -> dict[str, float]:
        """All costs of the whole child, those of rules included."""
        whole = self._costs_of(chosen)
        extra = rules_of.extra_costs(self.rules, self.costs)
        return whole | {
            name: rules_of.weighted(extra[name], whole)
            if name in extra
            else sum(self._costs_by_key[a.key][name] for a in chosen)
            for name in self.rule_limits
        }

    def solver(
        self, losses: Mapping[str, float] | None = None, likes: Mapping[str, tuple[set[str], int]] | None = None
    ) -> Solver:
        """The integer program under some losses, and costs that count how many subblocks equal another solution's."""
        losses = self.losses if losses is None else losses
        groups = [_group(members, losses, likes or {}, self._costs_by_key) for members in self._members]
        fixed = rules_of.fixed_of(self.rules, self.costs)
        if self.costs.outside:  # what is outside the layers is a choice too
            groups.append(_embeddings(self, groups[0].candidates[0].costs))
            fixed = {}
        return Solver(groups, fixed, self.costs.parent, self.conversion.to_whole)


def _candidates(
    by_place: Mapping[rules_of.Place, Sequence[Alternative]], places: Sequence[rules_of.Place]
) -> dict[str, tuple[Alternative, ...]]:
    """Key of a candidate to its alternatives, for the alternatives that all of these subblocks have."""
    by_name = [{a.name: a for a in by_place[place]} for place in places]
    common = [name for name in by_name[0] if all(name in names for names in by_name)]
    if not common:
        where = ", ".join(str(layer) for layer, _ in places)
        raise Infeasible(
            f"Infeasible: layers {where} have no {places[0][1]} alternative in common. Change search.uniform_groups."
        )
    members = [tuple(names[name] for names in by_name) for name in common]
    return {" ".join(a.key for a in group): group for group in members}


def _group(
    members: Mapping[str, tuple[Alternative, ...]],
    losses: Mapping[str, float],
    likes: Mapping[str, tuple[set[str], int]],
    costs_by_key: Mapping[str, Mapping[str, float]],
) -> Group:
    """The group of the program whose candidates, by key, stand for these alternatives."""
    candidates = []
    for key, group in members.items():
        costs = {name: sum(costs_by_key[a.key][name] for a in group) for name in costs_by_key[group[0].key]}
        for name, (keys, sign) in likes.items():
            costs[name] = sign * sum(a.key in keys for a in group)
        changes, score = sum(not a.is_parent for a in group), math.fsum(losses[a.key] for a in group)
        candidates.append(Candidate(key=key, score=score, costs=costs, is_parent=changes == 0, changes=changes))
    first = next(iter(members.values()))
    return Group(f"layer {first[0].layer} {first[0].subblock}", tuple(candidates))


def _embeddings(problem: SearchProblem, names: Iterable[str]) -> Group:
    """Embeddings and head in the parent's data type, and in every format, with these costs."""
    candidates = []
    for format, outside in {"": problem.costs.fixed, **problem.costs.outside}.items():
        fixed = rules_of.fixed_of(problem.rules, dataclasses.replace(problem.costs, fixed=outside))
        costs, score = {name: fixed.get(name, 0) for name in names}, problem.score((), format)
        candidates.append(Candidate(embeddings_key(format), score, costs, is_parent=not format, changes=bool(format)))
    return Group(EMBEDDINGS, tuple(candidates))


def shapes_of(problem: SearchProblem, solution: Solution) -> SearchProblem:
    """The problem of choosing shapes alone, where everything has the number format that it has in a solution."""
    shapes = [a for a in problem.alternatives if a == a.shape]
    pairs = {a.key: pair.key for a, pair in zip(shapes, solution.with_formats(shapes), strict=True)}
    by_key = {key: problem.costs.by_key[pair] for key, pair in pairs.items()}
    fixed = problem.costs.outside.get(solution.embeddings, problem.costs.fixed)
    costs = dataclasses.replace(problem.costs, by_key=by_key, fixed=fixed, outside={})
    losses = {key: problem.losses[pair] for key, pair in pairs.items()}
    return SearchProblem(shapes, losses, costs, problem.asked, problem.rules, problem.blocks)
