"""Refinement with the truth: solutions are run as whole models, and the search goes on around the best.

The program minimises a sum of scores, each measured in an otherwise whole parent. What a child loses is another thing:
errors of its parts add up or cancel. So the program's solution is run on some scoring rows. Then, round by round: a
sweep around the best child tells what every exchange would change in what it loses, alone and with others
(:mod:`layersmith.scoring.exchanges`); the same integer program, with these for scores, gives the best child that
differs in at most so many subblocks, for several numbers; those are run, and the best of all is the next to go on from.
It ends where nothing better is found, or when the work that is allowed is done. The best few are run on all rows, and
the best of these is taken; the program's own solution always is among them, so it is never worse on these rows.

Everything that is run is kept in a journal by what the solution is and by row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layersmith.library.alternative import Alternative
from layersmith.recipe import SearchRecipe
from layersmith.run.artifacts import fingerprint
from layersmith.scoring.children import WholeModels
from layersmith.scoring.exchanges import Around
from layersmith.scoring.metrics import loss_of
from layersmith.scoring.score import Journal, standard_error
from layersmith.scoring.task import row_order
from layersmith.search.problem import SearchProblem, Solution

Chosen = tuple[Alternative, ...]
Members = Sequence[Sequence[tuple[Alternative, ...]]]  # for each group of the program what can be chosen

_FINALISTS = 2  # run on all rows, beside the program's own
_ROUNDS = 2  # for which there should be work, so many rows are taken
_MOST_EXCHANGES = (1 / 24, 1 / 12, 1 / 6, 1 / 3)  # of the children of a round, as shares of all subblocks
# Optima under random factors on the scores say which alternatives are worth a look.
_DRAWS, _TEMPERATURE = 32, 0.5
_LINES = 6  # programs along the slope at the last one's answer, for each number of exchanges
_PROPOSALS, _STEPS, _MISSES = 48, 30, 4  # exchanges at random from there


@dataclass(frozen=True)
class Refined:
    """What refinement found.

    Attributes:
        solution: the best.
        plain: the program's own.
        tried: solutions that were run.
        passes: work done, in forward passes of the parent over the scoring rows.
        measured: loss of the two under the objective on all rows, and of their difference the standard error.
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
    models: WholeModels,
    recipe: SearchRecipe,
    objective: str,
    journal: Journal,
    *,
    seed: int = 0,
    advance: Callable[[float], None] = lambda passes: None,
) -> Refined:
    """Search on from the program's solution with whole models.

    Args:
        problem: The search problem to solve.
        plain: the program's.
        models: runs solutions.
        recipe: how much work is allowed.
        objective: the metric.
        journal: keeps results.
        seed: of the random factors and exchanges.
        advance: told of passes.
    """
    search = _Search(problem, models, recipe, objective, journal, random.Random(seed), advance)
    best = search.run(plain)
    return search.refined(plain, best)


@dataclass(eq=False)
class _Search:
    problem: SearchProblem
    models: WholeModels
    recipe: SearchRecipe
    objective: str
    journal: Journal
    rng: random.Random
    advance: Callable[[float], None]

    def __post_init__(self) -> None:
        self.all_rows = sorted(row_order(len(self.models.tokens)))
        self.rows = self.all_rows
        self.seen: dict[Chosen, float] = {}  # on the few rows
        self.passes = 0.0

    def run(self, plain: Solution) -> Chosen:
        start = plain.alternatives
        others = self._worth_a_look(plain)
        self.rows = self._few_rows(start, others)
        kept_back = self._end(start) * (1 - len(self.rows) / len(self.all_rows))
        allowed = self.recipe.refine_passes - kept_back
        self._see([start])
        base: Chosen | None = None
        while True:
            best = min(self.seen, key=self._rank)
            if best == base:
                break  # nothing better was found around it
            base = best
            following = self._following(base, others, allowed)
            while following and self.passes + self._price(following, len(self.rows)) > allowed:
                following.pop()
            if not following:
                break
            self._see(following)
        finalists = [start, *(c for c in sorted(self.seen, key=self._rank) if c != start)][: _FINALISTS + 1]
        # The few rows are known of all of them.
        left = len(self.all_rows) - len(self.rows)
        while len(finalists) > 1 and self.passes + self._price(finalists, left) > self.recipe.refine_passes:
            finalists.pop()
        on_all = self._measure(finalists, self.all_rows, left)
        return finalists[min(range(len(finalists)), key=lambda k: (on_all[k], k))]

    # ------------------------------------------------------------------------------------------ what is run

    def _see(self, solutions: Sequence[Chosen]) -> None:
        for solution, value in zip(solutions, self._measure(solutions, self.rows), strict=True):
            self.seen[solution] = value

    def _measure(self, solutions: Sequence[Chosen], rows: Sequence[int], priced: int | None = None) -> list[float]:
        """Loss of each under the objective, on some rows; only what is not known yet is run.

        So many rows are counted as work, by default all.
        """
        keys = [_key(solution) for solution in solutions]
        price = self._price(solutions, len(rows) if priced is None else priced)
        missing = [row for row in rows if not all((key, row) in self.journal.known for key in keys)]
        if missing:
            for key, own in zip(keys, self.models.run(solutions, missing), strict=True):
                self.journal.write(key, missing, own)
        # Counted as if all had been run, so that an interrupted search takes the same way.
        self.passes += price
        self.advance(price)
        return [self._loss([self.journal.known[key, row][self.objective] for row in rows], rows) for key in keys]

    def _loss(self, values: Sequence[float], rows: Sequence[int]) -> float:
        if self.objective == "kl_divergence":
            return math.fsum(values) / len(values)
        parent = self._parent_rows(rows)
        return loss_of(self.objective, math.fsum(values) / len(values), math.fsum(parent) / len(parent))

    def _parent_rows(self, rows: Sequence[int]) -> list[float]:
        own = tuple(a for a in self.problem.alternatives if a.is_parent)
        if not self.journal.has("parent", rows):
            self.journal.write("parent", rows, self.models.run([own], rows)[0])
        return [self.journal.known["parent", row][self.objective] for row in rows]

    def _price(self, solutions: Sequence[Chosen], num_rows: int) -> float:
        """Of solutions, and of the parent beside them."""
        return self.models.cost(solutions, num_rows) + num_rows / len(self.all_rows)

    def _rank(self, solution: Chosen) -> tuple[float, str]:
        return self.seen[solution], _key(solution)

    # ------------------------------------------------------------------------------------------ what to run

    def _worth_a_look(self, plain: Solution) -> list[Alternative]:
        """Alternatives that the program takes, or would if scores were somewhat different."""
        found = dict.fromkeys(plain.alternatives)
        for _ in range(_DRAWS):
            factors = {(a.layer, a.subblock): math.exp(self.rng.gauss(0, _TEMPERATURE)) for a in plain.alternatives}
            losses = {
                a.key: self.problem.losses[a.key] * factors[a.layer, a.subblock] for a in self.problem.alternatives
            }
            other = self.problem.best_by(losses)
            found |= dict.fromkeys(other.alternatives if other is not None else ())
        return list(found)

    def _few_rows(self, start: Chosen, others: Sequence[Alternative]) -> list[int]:
        """So many that there is work for some rounds, and for finalists on all rows."""
        order, whole = row_order(len(self.models.tokens)), len(self.all_rows)
        if self.recipe.refine_rows is not None:
            return sorted(order[: self.recipe.refine_rows])
        of_child = self.models.cost([start], whole)
        of_round = 1 + len(_MOST_EXCHANGES) * of_child
        if self.models.staged is not None:
            of_round += self.models.cost_around(start, others, whole)
        of_end = self._end(start)
        share = (self.recipe.refine_passes - of_end) / max(1 + of_child + _ROUNDS * of_round - of_end, 1e-9)
        return sorted(order[: min(whole, max(1, int(share * whole)))])

    def _end(self, start: Chosen) -> float:
        """What finalists take on all rows, at most, if they are as large as one."""
        return 1 + (_FINALISTS + 1) * self.models.cost([start], len(self.all_rows))

    def _following(self, base: Chosen, others: Sequence[Alternative], allowed: float) -> list[Chosen]:
        """What to run next, best first: children that differ little from one, by a sweep around it."""
        if self.models.staged is None:
            return self._like(base)
        here = set(base)
        looked_at = [a for a in others if a not in here]
        price = self.models.cost_around(base, looked_at, len(self.rows))
        if not looked_at or self.passes + price > allowed:
            return []
        around = self.models.around(base, looked_at, self.rows, self.rng.randrange(2**20))
        self.passes += price
        self.advance(price)
        known = here.union(looked_at)
        pool = [[own for own in group if known.issuperset(own)] for group in self.problem.members]
        least = 2 * max(len(own) for group in self.problem.members for own in group)
        found: dict[Chosen, float] = {}
        for most in sorted({max(least, round(share * len(base))) for share in _MOST_EXCHANGES}):
            end = self._descend(around, base, self._by_program(around, base, most), most, pool)
            if (foretold := self._foretold(around, base, end)) < 0 and end not in self.seen:
                found[end] = foretold
        return sorted(found, key=lambda c: found[c])

    def _by_program(self, around: Around, base: Chosen, most: int) -> Chosen:
        """The best child with at most so many exchanges, by the program along slopes of what a sweep foretells."""
        here = set(base)
        # What was not looked at is not to be taken.
        far = 1e3 * (float(np.abs(around.beside(())).sum()) + 1e-12)
        best, slopes = base, around.beside(())
        for _ in range(_LINES):
            losses: dict[str, float] = {}
            for own in self.problem.by_place.values():
                told = {
                    a.key: 0.0 if a in here else float(slopes[k]) if (k := around.place.get(a.key)) is not None
                    else far
                    for a in own
                }  # fmt: skip
                least = min(told.values())
                losses |= {key: loss - least for key, loss in told.items()}
            found = self.problem.best_by(losses, [(base, 1, most)])
            if found is None:
                break
            if self._foretold(around, base, found.alternatives) < self._foretold(around, base, best):
                best = found.alternatives
            # Half way, or two answers may take turns.
            slopes = (slopes + self._slopes(around, base, found.alternatives)) / 2
        return best

    def _slopes(self, around: Around, base: Chosen, solution: Chosen) -> np.ndarray:
        """What each exchange adds where those of a solution in other places are made as well."""
        exchanges = [a for a, own in zip(solution, base, strict=True) if a != own and a.key in around.place]
        slopes = around.beside(exchanges)
        rows: dict[tuple[int, str], list[int]] = {}
        for a in self.problem.alternatives:
            if a.key in around.place:
                rows.setdefault((a.layer, a.subblock), []).append(around.place[a.key])
        for a in exchanges:
            own = rows[a.layer, a.subblock]
            slopes[own] -= around.mixed[own, around.place[a.key]]
        return slopes

    def _foretold(self, around: Around, base: Chosen, solution: Chosen) -> float:
        """What a solution loses more than the one that a sweep went around; infinite where that was not looked at."""
        exchanges = [a for a, own in zip(solution, base, strict=True) if a != own]
        if any(a.key not in around.place for a in exchanges):
            return math.inf
        return around.of(exchanges)

    def _descend(self, around: Around, base: Chosen, start: Chosen, most: int, pool: Members) -> Chosen:
        """Exchange one alternative or some at a time while that is foretold to be better, and within ``most``."""
        value, misses = self._foretold(around, base, start), 0
        for _ in range(_STEPS):
            proposals = dict.fromkeys(self._exchanged(start, pool) for _ in range(_PROPOSALS))
            told = {p: self._foretold(around, base, p) for p in proposals}
            near = (p for p in proposals if sum(a != own for a, own in zip(p, base, strict=True)) <= most)
            better = sorted((p for p in near if told[p] < value), key=lambda p: (told[p], _key(p)))
            best = next((p for p in better if self.problem.fits(p)), None)
            if best is not None:
                start, value, misses = best, told[best], 0
                continue
            misses += 1
            if misses == _MISSES:
                break
        return start

    def _like(self, base: Chosen) -> list[Chosen]:
        """Where nothing is foretold: solutions like the best, by chance."""
        found: dict[Chosen, None] = {}
        for _ in range(_PROPOSALS):
            other = self._exchanged(base, self.problem.members)
            if other not in self.seen and self.problem.fits(other):
                found[other] = None
        nearest = sorted(found, key=lambda c: (self.problem.score(c), _key(c)))
        return nearest[: len(_MOST_EXCHANGES)]

    def _exchanged(self, chosen: Chosen, members: Members) -> Chosen:
        """Another alternative in one to three places (of layers alike in all of them)."""
        changed = {(a.layer, a.subblock): a for a in chosen}
        for own in self.rng.sample(members, min(len(members), self.rng.choice((1, 2, 2, 2, 3)))):
            for a in own[self.rng.randrange(len(own))]:
                changed[a.layer, a.subblock] = a
        return tuple(changed[a.layer, a.subblock] for a in chosen)

    # ------------------------------------------------------------------------------------------ the answer

    def refined(self, plain: Solution, best: Chosen) -> Refined:
        rows = self.all_rows
        values = {
            name: [self.journal.known[_key(own), row][self.objective] for row in rows]
            for name, own in (("plain", plain.alternatives), ("choice", best))
        }
        difference = [a - b for a, b in zip(values["choice"], values["plain"], strict=True)]
        measured = {
            "objective": self.objective,
            "rows": len(rows),
            **{name: math.fsum(own) / len(own) for name, own in values.items()},
            "difference": math.fsum(difference) / len(difference),
            "difference_standard_error": standard_error(difference),
            "error": standard_error(values["choice"]),
        }
        solution = plain if best == plain.alternatives else self.problem.of(best)
        return Refined(solution, plain, len(self.seen), self.passes, measured)


def _key(solution: Sequence[Alternative]) -> str:
    return fingerprint([a.key for a in solution if not a.is_parent])


def read_refined(data: dict[str, Any]) -> Refined:
    """From what :meth:`Refined.to_dict` gave."""
    return Refined(
        solution=Solution.from_dict(data["choice"]),
        plain=Solution.from_dict(data["plain"]),
        tried=data["tried"],
        passes=data["passes"],
        measured=data["measured"],
    )
