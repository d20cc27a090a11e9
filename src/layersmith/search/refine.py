"""Refinement with the truth: choices near the program's are run as whole models, and the search goes on from there.

The program minimises a sum of scores, each measured in an otherwise whole parent. What a child loses is another thing:
errors of its parts add up or cancel. So the program's choice and others like it are run on some scoring rows; a
:class:`~layersmith.search.surrogate.Surrogate` is given what was seen, and says which exchanges may be better; those
are run next, until the work that is allowed is done. Where a sweep of second-order scores over the same rows is at most
a third of that work, it comes first and tells the surrogate how alternatives work together. The best few are run on all
rows, and the best of these is taken; the program's own choice always is among them, so it is never worse on these rows.

Everything that is run is kept in a journal by what the choice is and by row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layersmith.artifacts import fingerprint
from layersmith.library.alternative import Alternative
from layersmith.recipe import SearchRecipe
from layersmith.scoring.library_scores import SWEEP_PASSES, row_order
from layersmith.scoring.metrics import loss_of
from layersmith.scoring.score import Journal, standard_error
from layersmith.scoring.together import Together
from layersmith.search.choose import Choice, Space
from layersmith.search.surrogate import Surrogate
from layersmith.search.whole import WholeModels

Chosen = tuple[Alternative, ...]

_AT_ONCE = 6  # choices that are run before the surrogate is asked again
_FINALISTS = 3  # run on all rows, beside the program's own
_TEMPERATURE = 0.35  # of the random factors on scores by which the first others are found
_PROPOSALS = 48  # exchanges that are looked at, in each step of a descent on the surrogate
_STEPS = 30
_MOST_OF_SWEEP = 1 / 3  # of the work that is allowed


@dataclass(frozen=True)
class Refined:
    """What refinement found.

    Attributes:
        choice: the best.
        plain: the program's own.
        tried: choices that were run.
        passes: work done, in forward passes of the parent over the scoring rows.
        measured: loss of the two under the objective on all rows, and of their difference the standard error.
    """

    choice: Choice
    plain: Choice
    tried: int
    passes: float
    measured: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "choice": self.choice.to_dict(), "plain": self.plain.to_dict(), "tried": self.tried,
            "passes": round(self.passes, 6), "measured": self.measured,
        }  # fmt: skip

    def __str__(self) -> str:
        before, after = self.measured["plain"], self.measured["choice"]
        return (
            f"refine: {self.tried} children run on {self.measured['rows']} scoring rows or some of them, "
            f"{self.passes:.1f} forward passes; {self.measured['objective']} {before:.4f} => {after:.4f}"
        )


def refine(
    space: Space,
    plain: Choice,
    models: WholeModels,
    recipe: SearchRecipe,
    objective: str,
    journal: Journal,
    *,
    seed: int = 0,
    advance: Callable[[float], None] = lambda passes: None,
) -> Refined:
    """Search on from the program's choice with whole models.

    Args:
        space: of the choices.
        plain: the program's.
        models: runs choices.
        recipe: how much work is allowed.
        objective: the metric.
        journal: keeps results.
        seed: of the random factors and exchanges.
        advance: told of passes.
    """
    search = _Search(space, models, recipe, objective, journal, random.Random(seed), advance)
    best = search.run(plain)
    return search.refined(plain, best)


@dataclass(eq=False)
class _Search:
    space: Space
    models: WholeModels
    recipe: SearchRecipe
    objective: str
    journal: Journal
    rng: random.Random
    advance: Callable[[float], None]

    def __post_init__(self) -> None:
        order = row_order(len(self.models.tokens))
        self.rows = sorted(order[: self.recipe.refine_rows])
        self.all_rows = sorted(order)
        self.seen: dict[Chosen, float] = {}  # on the few rows
        self.passes = 1.0  # the parent itself
        # Scores of the same rows would be better; they differ by one factor that the surrogate has to learn anyway.
        self.losses: Mapping[str, float] = self.space.losses
        self.together: Together | None = None

    def run(self, plain: Choice) -> Chosen:
        start = plain.alternatives
        sweep = SWEEP_PASSES * len(self.rows) / len(self.all_rows)
        if self.objective == "kl_divergence" and sweep <= _MOST_OF_SWEEP * self.recipe.refine_passes:
            self.together = self.models.together(self.space.alternatives, self.rows, self.rng.randrange(2**20))
            if self.together is not None:
                self.passes += sweep
                self.advance(sweep)
        kept_back = self._price([start] * (_FINALISTS + 1), len(self.all_rows) - len(self.rows))
        allowed = self.recipe.refine_passes - kept_back
        self._see([start])
        first = self._others_like(plain, allowed)
        for at in range(0, len(first), _AT_ONCE):
            self._see(first[at : at + _AT_ONCE])
        while True:
            following = self._following()
            if not following or self.passes + self._price(following, len(self.rows)) > allowed:
                break
            self._see(following)
        finalists = [start, *(c for c in sorted(self.seen, key=self._rank) if c != start)][: _FINALISTS + 1]
        # The few rows are known of all of them.
        others = len(self.all_rows) - len(self.rows)
        while len(finalists) > 1 and self.passes + self._price(finalists, others) > self.recipe.refine_passes:
            finalists.pop()
        on_all = self._measure(finalists, self.all_rows, others)
        return finalists[min(range(len(finalists)), key=lambda k: (on_all[k], k))]

    # ------------------------------------------------------------------------------------------ what is run

    def _see(self, choices: Sequence[Chosen]) -> None:
        for choice, value in zip(choices, self._measure(choices, self.rows), strict=True):
            self.seen[choice] = value

    def _measure(self, choices: Sequence[Chosen], rows: Sequence[int], priced: int | None = None) -> list[float]:
        """Loss of each under the objective, on some rows; only what is not known yet is run.

        So many rows are counted as work, by default all.
        """
        keys = [_key(choice) for choice in choices]
        price = self._price(choices, len(rows) if priced is None else priced)
        missing = [row for row in rows if not all((key, row) in self.journal.known for key in keys)]
        if missing:
            for key, own in zip(keys, self.models.run(choices, missing), strict=True):
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
        own = tuple(a for a in self.space.alternatives if a.kind == "parent")
        if not self.journal.has("parent", rows):
            self.journal.write("parent", rows, self.models.run([own], rows)[0])
        return [self.journal.known["parent", row][self.objective] for row in rows]

    def _price(self, choices: Sequence[Chosen], num_rows: int) -> float:
        return self.models.cost(choices, num_rows)

    def _rank(self, choice: Chosen) -> tuple[float, str]:
        return self.seen[choice], _key(choice)

    # ------------------------------------------------------------------------------------------ what to run

    def _others_like(self, plain: Choice, allowed: float) -> list[Chosen]:
        """Optima of the program with random factors on the scores of each place; for about half of the work."""
        found: list[Chosen] = []
        count = int(0.5 * (allowed - self.passes) / max(self._price([plain.alternatives], len(self.rows)), 1e-9))
        for _ in range(min(count, 2 * len(plain.alternatives))):
            factors = {(a.layer, a.subblock): math.exp(self.rng.gauss(0, _TEMPERATURE)) for a in plain.alternatives}
            losses = {a.key: self.losses[a.key] * factors[a.layer, a.subblock] for a in self.space.alternatives}
            other = self.space.best_by(losses)
            if other is not None and other.alternatives not in self.seen and other.alternatives not in found:
                found.append(other.alternatives)
        return found

    def _following(self) -> list[Chosen]:
        """What the surrogate takes for best, from several starts; each unlike the others."""
        surrogate = Surrogate(self.losses, list(self.seen), list(self.seen.values()), self.together)
        starts = sorted(self.seen, key=self._rank)
        found: list[Chosen] = []
        for k in range(_AT_ONCE):
            optimism = (0.0, 0.5, 1.0)[k % 3]
            end = self._descend(surrogate, starts[min(k // 2, len(starts) - 1)], optimism)
            if end not in self.seen and end not in found:
                found.append(end)
        return found

    def _descend(self, surrogate: Surrogate, start: Chosen, optimism: float) -> Chosen:
        """Exchange one alternative or two at a time while the surrogate says it is better."""

        def judged(choices: Sequence[Chosen]) -> list[float]:
            mean, deviation = surrogate.predict(choices)
            return list(mean - optimism * deviation)

        (value,) = judged([start])
        misses = 0
        for _ in range(_STEPS):
            proposals = list(dict.fromkeys(self._exchanged(start) for _ in range(_PROPOSALS)))
            proposals = [p for p in proposals if p != start and self.space.fits(p)]
            if proposals:
                values = judged(proposals)
                at = min(range(len(proposals)), key=lambda k: values[k])
                if values[at] < value:
                    start, value, misses = proposals[at], values[at], 0
                    continue
            misses += 1
            if misses == 4:
                break
        return start

    def _exchanged(self, chosen: Chosen) -> Chosen:
        """Another alternative in one to three places (of layers alike in all of them)."""
        members = self.space.members
        changed = {(a.layer, a.subblock): a for a in chosen}
        for own in self.rng.sample(members, min(len(members), self.rng.choice((1, 2, 2, 2, 3)))):
            for a in own[self.rng.randrange(len(own))]:
                changed[a.layer, a.subblock] = a
        return tuple(changed[a.layer, a.subblock] for a in chosen)

    # ------------------------------------------------------------------------------------------ the answer

    def refined(self, plain: Choice, best: Chosen) -> Refined:
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
        choice = plain if best == plain.alternatives else self.space.of(best)
        return Refined(choice, plain, len(self.seen), self.passes, measured)


def _key(choice: Sequence[Alternative]) -> str:
    return fingerprint([a.key for a in choice if a.kind != "parent"])


def read_refined(data: dict[str, Any]) -> Refined:
    """From what :meth:`Refined.to_dict` gave."""
    choices = {name: Choice.from_dict(data[name]) for name in ("choice", "plain")}
    return Refined(**{**data, **choices})
