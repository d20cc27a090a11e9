"""Local search with true losses: evaluate whole children and search around the best.

The program minimises a sum of scores, each measured in an otherwise unchanged parent. In a child, the errors of its
parts add up or cancel. So the program's solution is evaluated on some scoring rows. Then, in each round, one sweep
around the best child predicts the effect of every exchange, alone and with others. The program, with these predictions
as scores, finds the best children that differ from it in a few subblocks (:mod:`layersmith.search.neighbours`). They
are evaluated, and the best of all children is the start of the next round.

Where many subblocks are removed, the sum of scores is far off: an FFN may be of use only for the attention before it.
Then each layer is also removed as a whole, and the program with these losses gives a second start.

The search ends when no child is better, or when the allowed work is done. The best few children are evaluated on
all rows, and the best of these is returned. The program's solution is always among them, so the result is never worse
than it on these rows. Every result is kept in a journal, by child and row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative
from layersmith.recipe import SearchRecipe
from layersmith.records import check
from layersmith.run.journal import Journal
from layersmith.scoring.children import ChildEvaluator
from layersmith.scoring.metrics import loss_of
from layersmith.scoring.score import standard_error
from layersmith.scoring.task import row_order
from layersmith.search.neighbours import Chosen, Neighbours, key_of_child, random_neighbours, worth_a_look
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution

# Children that are evaluated on all rows, besides the program's solution. Each costs a pass that rounds could use.
_FINALISTS = 2
# The rounds use as many rows as the work allows for this number of rounds. More rows rank children more reliably.
_ROUNDS = 2
# The largest number of exchanges of the children of a round, as shares of all subblocks. The prediction is accurate for
# few exchanges; many are needed to leave a local optimum. benchmarks/search.py measures what refinement gains.
_MOST_EXCHANGES = (1 / 24, 1 / 12, 1 / 6, 1 / 3)
# Layers are removed as wholes, on this many rows, if the program removes this share of all subblocks.
_ROWS_OF_LAYERS, _MANY_REMOVED = 2, 1 / 8


@dataclass(frozen=True)
class Refined:
    """The result of refinement.

    Attributes:
        solution: The best solution.
        plain: The program's solution.
        tried: Number of children that were evaluated.
        passes: Work done, in forward passes of the parent over the scoring rows.
        measured: Loss of both under the objective on all rows, and the standard error of their difference.
    """

    solution: Solution
    plain: Solution
    tried: int
    passes: float
    measured: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "choice": self.solution.to_dict(), "plain": self.plain.to_dict(), "tried": self.tried,
            "passes": round(self.passes, 6), "measured": self.measured,
        }  # fmt: skip

    def __str__(self) -> str:
        before, after = self.measured["plain"], self.measured["choice"]
        metric = {"kl_divergence": "KL"}.get(self.measured["objective"], self.measured["objective"])
        return f"refine: {metric} {before:.4f} => {after:.4f} ({self.tried} whole children evaluated)"


def refine(
    problem: SearchProblem,
    plain: Solution,
    evaluations: Evaluations,
    recipe: SearchRecipe,
    seed: int = 0,
) -> Refined:
    """Search on from the program's solution by evaluating whole children.

    Args:
        problem: The search problem.
        plain: The program's solution.
        evaluations: Evaluates whole children.
        recipe: Says how much work is allowed.
        seed: Seed of the random factors and exchanges.
    """
    best, seen = _Search(problem, evaluations, recipe, random.Random(seed)).run(plain)
    return Refined(
        solution=plain if best == plain.alternatives else problem.of(best),
        plain=plain,
        tried=seen,
        passes=evaluations.passes,
        measured=evaluations.compare(plain.alternatives, best),
    )


@dataclass(eq=False)
class Evaluations:
    """Losses of whole children, and the work that they took.

    Attributes:
        models: Evaluates whole children.
        objective: Metric to minimise.
        journal: Keeps results.
        advance: Called with forward passes that were just done.
        passes: Forward passes done so far.
    """

    models: ChildEvaluator
    objective: str
    journal: Journal
    advance: Callable[[float], None] = lambda passes: None
    passes: float = 0.0
    all_rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.all_rows = sorted(row_order(len(self.models.tokens)))
        self._parent = tuple(a for a in self.models.library.alternatives if a.is_parent)

    def losses(self, children: Sequence[Chosen], rows: Sequence[int], new_rows: int | None = None) -> list[float]:
        """Loss of each child under the objective; only results that are not in the journal are made.

        Args:
            children: The children.
            rows: Numbers of the rows.
            new_rows: How many of the rows count as work; default: all.
        """
        keys = [key_of_child(child) for child in children]
        missing = [row for row in rows if not all((key, row) in self.journal.known for key in keys)]
        price = self.price(children, len(rows) if new_rows is None else new_rows)
        if missing:
            for key, results in zip(keys, self.models.run(children, missing), strict=True):
                self.journal.write(key, missing, results)
        # Resumed results count as work too, so that a resumed search makes the same decisions.
        self.spend(price)
        return [self._loss(self._values(key, rows), rows) for key in keys]

    def price(self, children: Sequence[Chosen], num_rows: int) -> float:
        """Forward passes that evaluating children takes, the parent's included."""
        return self.models.cost(children, num_rows) + num_rows / len(self.all_rows)

    def spend(self, passes: float) -> None:
        self.passes += passes
        self.advance(passes)

    def compare(self, plain: Chosen, best: Chosen) -> dict[str, Any]:
        """Losses of two children on all rows, with standard errors."""
        of_plain, of_best = (self._values(key_of_child(child), self.all_rows) for child in (plain, best))
        difference = [a - b for a, b in zip(of_best, of_plain, strict=True)]
        return {
            "objective": self.objective,
            "rows": len(self.all_rows),
            "plain": math.fsum(of_plain) / len(of_plain),
            "choice": math.fsum(of_best) / len(of_best),
            "difference": math.fsum(difference) / len(difference),
            "difference_standard_error": standard_error(difference),
            "error": standard_error(of_best),
        }

    def _values(self, key: str, rows: Sequence[int]) -> list[float]:
        return [self.journal.known[key, row][self.objective] for row in rows]

    def _loss(self, values: Sequence[float], rows: Sequence[int]) -> float:
        mean = math.fsum(values) / len(values)
        if self.objective == "kl_divergence":
            return mean
        if not self.journal.has("parent", rows):
            self.journal.write("parent", rows, self.models.run([self._parent], rows)[0])
        of_parent = self._values("parent", rows)
        return loss_of(self.objective, mean, math.fsum(of_parent) / len(of_parent))


class _Search:
    """Rounds of evaluating children around the best one."""

    def __init__(
        self, problem: SearchProblem, evaluations: Evaluations, recipe: SearchRecipe, rng: random.Random
    ) -> None:
        self.problem, self.evaluations, self.recipe, self.rng = problem, evaluations, recipe, rng
        self.rows: list[int] = []  # on which the children of the rounds are evaluated
        self.seen: dict[Chosen, float] = {}  # loss of each child on these rows

    def run(self, plain: Solution) -> tuple[Chosen, int]:
        """The best child, and how many were evaluated."""
        start = plain.alternatives
        others = worth_a_look(self.problem, plain, self.rng)
        self.rows = self._few_rows(start, others)
        all_rows = self.evaluations.all_rows
        allowed = self.recipe.refine_passes - self._end(start) * (1 - len(self.rows) / len(all_rows))
        starts = [start, *self._without_layers(start, allowed)]
        others = list(dict.fromkeys([*others, *(a for child in starts for a in child)]))
        self._rounds(starts, others, allowed)
        finalists = [start, *(c for c in sorted(self.seen, key=self._rank) if c != start)][: _FINALISTS + 1]
        left = len(all_rows) - len(self.rows)  # the few rows already have results
        while len(finalists) > 1 and not self._is_affordable(finalists, left, self.recipe.refine_passes):
            finalists.pop()
        losses = self.evaluations.losses(finalists, all_rows, left)
        return finalists[min(range(len(finalists)), key=lambda k: (losses[k], k))], len(self.seen)

    def _without_layers(self, start: Chosen, allowed: float) -> list[Chosen]:
        """The program's child where a removed subblock loses its share of its layer's loss; none if few are removed."""
        if sum(a.is_no_op for a in start) < _MANY_REMOVED * len(start):
            return []
        removed = {(a.layer, a.subblock): a for a in self.problem.alternatives if a.is_no_op}
        whole = {(a.layer, a.subblock): a for a in self.problem.alternatives if a.is_parent}
        layers = [i for i in sorted({a.layer for a in start}) if all((i, s) in removed for s in SUBBLOCKS)]
        children = [tuple((removed if a.layer == i else whole)[a.layer, a.subblock] for a in start) for i in layers]
        rows = self.rows[:_ROWS_OF_LAYERS]
        if not children or not self._is_affordable([*children, start, start], len(rows), allowed):
            return []
        losses = dict(self.problem.losses)
        for i, loss in zip(layers, self.evaluations.losses(children, rows), strict=True):
            sizes = {s: self.problem.costs.by_key[whole[i, s].key]["parameters"] for s in SUBBLOCKS}
            losses |= {removed[i, s].key: loss * size / sum(sizes.values()) for s, size in sizes.items()}
        found = self.problem.best_by(losses)
        return [] if found is None or found.alternatives == start else [found.alternatives]

    def _rounds(self, starts: Sequence[Chosen], others: Sequence[Alternative], allowed: float) -> None:
        """Evaluate children around the best one until none is better or the allowed passes are done."""
        self._evaluate(starts)
        base: Chosen | None = None
        while (best := min(self.seen, key=self._rank)) != base:
            base = best
            following = self._following(base, others, allowed)
            while following and not self._is_affordable(following, len(self.rows), allowed):
                following.pop()
            if not following:
                break
            self._evaluate(following)

    def _evaluate(self, children: Sequence[Chosen]) -> None:
        self.seen |= dict(zip(children, self.evaluations.losses(children, self.rows), strict=True))

    def _is_affordable(self, children: Sequence[Chosen], num_rows: int, allowed: float) -> bool:
        return self.evaluations.passes + self.evaluations.price(children, num_rows) <= allowed

    def _rank(self, child: Chosen) -> tuple[float, str]:
        return self.seen[child], key_of_child(child)

    def _few_rows(self, start: Chosen, others: Sequence[Alternative]) -> list[int]:
        """As many rows as leave work for some rounds, and for the finalists on all rows."""
        models, whole = self.evaluations.models, len(self.evaluations.all_rows)
        order = row_order(whole)
        if self.recipe.refine_rows is not None:
            return sorted(order[: self.recipe.refine_rows])
        of_child = models.cost([start], whole)
        of_round = 1 + len(_MOST_EXCHANGES) * of_child
        if models.layerwise is not None:
            of_round += models.cost_of_effects(start, others, whole)
        of_end = self._end(start)
        share = (self.recipe.refine_passes - of_end) / max(1 + of_child + _ROUNDS * of_round - of_end, 1e-9)
        return sorted(order[: min(whole, max(1, int(share * whole)))])

    def _end(self, start: Chosen) -> float:
        """Passes that the finalists take on all rows, at most, if they are as large as ``start``."""
        return 1 + (_FINALISTS + 1) * self.evaluations.models.cost([start], len(self.evaluations.all_rows))

    def _following(self, base: Chosen, others: Sequence[Alternative], allowed: float) -> list[Chosen]:
        """Children to evaluate next, best first: those near the base that are predicted to lose less."""
        models = self.evaluations.models
        if models.layerwise is None:
            return random_neighbours(self.problem, base, self.seen, len(_MOST_EXCHANGES), self.rng)
        here = set(base)
        others = [a for a in others if a not in here]
        price = models.cost_of_effects(base, others, len(self.rows))
        if not others or self.evaluations.passes + price > allowed:
            return []
        effects = models.exchange_effects(base, others, self.rows, self.rng.randrange(2**20))
        self.evaluations.spend(price)
        least = 2 * max(len(members) for group in self.problem.members for members in group)
        numbers = sorted({max(least, round(share * len(base))) for share in _MOST_EXCHANGES})
        return Neighbours(self.problem, base, effects, self.rng).best(numbers, self.seen)


class RefinedData(TypedDict):
    """What ``refine.json`` holds."""

    choice: dict[str, Any]
    plain: dict[str, Any]
    tried: NonNegativeInt
    passes: float
    measured: dict[str, Any]


def read_refined(data: dict[str, Any]) -> Refined:
    """From what :meth:`Refined.to_dict` gave."""
    check(data, RefinedData, "refine.json")
    return Refined(
        solution=Solution.from_dict(data["choice"]),
        plain=Solution.from_dict(data["plain"]),
        tried=data["tried"],
        passes=data["passes"],
        measured=data["measured"],
    )
