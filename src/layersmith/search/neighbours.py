"""Children near a given one with lower predicted losses, from the integer program and from random exchanges.

The prediction is second order around the child (:mod:`layersmith.scoring.exchanges`). It is quadratic in the exchanges,
and the program is linear, so the program is solved repeatedly with the slopes at its last answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from layersmith.library.alternative import Alternative
from layersmith.run.artifacts import fingerprint
from layersmith.scoring.exchanges import ExchangeEffects
from layersmith.search.problem import SearchProblem
from layersmith.search.solution import Solution

Chosen = tuple[Alternative, ...]
Members = Sequence[Sequence[tuple[Alternative, ...]]]  # what can be chosen for each group of the program

# Solutions under random factors on the scores show which alternatives are worth a look. More draws look at more
# alternatives, each of which costs a run of its subblock; a higher temperature (standard deviation of the logarithm of
# a factor) goes further from the scores. benchmarks/search.py measures what refinement gains by them.
_DRAWS, _TEMPERATURE = 32, 0.5
# Programs along the slopes for each number of exchanges: the answers repeat or alternate soon.
_LINES = 6
# Random descent after the program: proposals per step, steps, and steps without success before it ends. A prediction
# takes microseconds, so these only bound the time.
_PROPOSALS, _STEPS, _MISSES = 48, 30, 4
# Exchanged groups per proposal are drawn from these: mostly pairs, which can move cost from one place to another.
_EXCHANGED = (1, 2, 2, 2, 3)


def key_of_child(chosen: Sequence[Alternative]) -> str:
    """The key of a child in the journal of refinement."""
    return fingerprint([a.key for a in chosen if not a.is_parent])


def worth_a_look(problem: SearchProblem, plain: Solution, rng: random.Random) -> list[Alternative]:
    """Alternatives that the program takes, or would take if scores were somewhat different."""
    wanted = dict.fromkeys(plain.alternatives)
    for _ in range(_DRAWS):
        factors = {(a.layer, a.subblock): math.exp(rng.gauss(0, _TEMPERATURE)) for a in plain.alternatives}
        losses = {a.key: problem.losses[a.key] * factors[a.layer, a.subblock] for a in problem.alternatives}
        other = problem.best_by(losses)
        wanted |= dict.fromkeys(other.alternatives if other is not None else ())
    return list(wanted)


@dataclass(frozen=True)
class Neighbours:
    """Children near ``base``, and their predicted loss increases over it.

    Attributes:
        problem: The search problem.
        base: The child at which effects were measured.
        effects: Effects of exchanging its alternatives.
        rng: Source of random exchanges.
    """

    problem: SearchProblem
    base: Chosen
    effects: ExchangeEffects
    rng: random.Random

    def best(self, numbers: Sequence[int], seen: Collection[Chosen]) -> list[Chosen]:
        """The best child for each largest number of exchanges, best first; only those predicted to be better."""
        known = {*self.base, *(a for a in self.problem.alternatives if a.key in self.effects.place)}
        pool = [[members for members in group if known.issuperset(members)] for group in self.problem.members]
        predicted: dict[Chosen, float] = {}
        for most in numbers:
            child = self._descend(self._by_program(most), most, pool)
            if (change := self.predict(child)) < 0 and child not in seen:
                predicted[child] = change
        return sorted(predicted, key=lambda child: predicted[child])

    def predict(self, child: Chosen) -> float:
        """Predicted loss increase of a child over the base; infinite if an exchange was not measured."""
        exchanged = [a for a, b in zip(child, self.base, strict=True) if a != b]
        if any(a.key not in self.effects.place for a in exchanged):
            return math.inf
        return self.effects.of(exchanged)

    def _by_program(self, most: int) -> Chosen:
        """The best child with at most ``most`` exchanges, by the program along slopes of the prediction."""
        place, here = self.effects.place, set(self.base)
        best, slopes = self.base, self.effects.given(())
        far = 1e3 * (float(np.abs(slopes).sum()) + 1e-12)  # alternatives that were not measured are not to be taken
        for _ in range(_LINES):
            losses: dict[str, float] = {}
            for members in self.problem.by_place.values():
                slope = {a.key: float(slopes[place[a.key]]) if a.key in place else far for a in members}
                slope |= {a.key: 0.0 for a in members if a in here}
                least = min(slope.values())
                losses |= {key: value - least for key, value in slope.items()}
            child = self.problem.best_by(losses, [(self.base, 1, most)])
            if child is None:
                break
            if self.predict(child.alternatives) < self.predict(best):
                best = child.alternatives
            # Half way, or two answers may alternate.
            slopes = (slopes + self._slopes(child.alternatives)) / 2
        return best

    def _slopes(self, child: Chosen) -> np.ndarray:
        """What each exchange adds if those of a child in other places are made as well."""
        place = self.effects.place
        exchanged = [a for a, b in zip(child, self.base, strict=True) if a != b and a.key in place]
        slopes = self.effects.given(exchanged)
        rows: dict[tuple[int, str], list[int]] = {}
        for a in self.problem.alternatives:
            if a.key in place:
                rows.setdefault((a.layer, a.subblock), []).append(place[a.key])
        for a in exchanged:
            same_place = rows[a.layer, a.subblock]
            slopes[same_place] -= self.effects.mixed[same_place, place[a.key]]
        return slopes

    def _descend(self, start: Chosen, most: int, pool: Members) -> Chosen:
        """Make random exchanges while they are predicted to be better and at most ``most`` differ from the base."""
        value, misses = self.predict(start), 0
        for _ in range(_STEPS):
            proposals = dict.fromkeys(exchanged(start, pool, self.rng) for _ in range(_PROPOSALS))
            predicted = {p: self.predict(p) for p in proposals}
            near = (p for p in proposals if sum(a != b for a, b in zip(p, self.base, strict=True)) <= most)
            better = sorted((p for p in near if predicted[p] < value), key=lambda p: (predicted[p], key_of_child(p)))
            best = next((p for p in better if self.problem.fits(p)), None)
            if best is not None:
                start, value, misses = best, predicted[best], 0
                continue
            misses += 1
            if misses == _MISSES:
                break
        return start


def random_neighbours(
    problem: SearchProblem, base: Chosen, seen: Collection[Chosen], count: int, rng: random.Random
) -> list[Chosen]:
    """Children with random exchanges and the lowest sums of scores, for a parent at which nothing can be predicted."""
    children: dict[Chosen, None] = {}
    for _ in range(_PROPOSALS):
        other = exchanged(base, problem.members, rng)
        if other not in seen and problem.fits(other):
            children[other] = None
    return sorted(children, key=lambda child: (problem.score(child), key_of_child(child)))[:count]


def exchanged(chosen: Chosen, members: Members, rng: random.Random) -> Chosen:
    """Other alternatives in one to three groups."""
    changed = {(a.layer, a.subblock): a for a in chosen}
    for group in rng.sample(members, min(len(members), rng.choice(_EXCHANGED))):
        for a in group[rng.randrange(len(group))]:
            changed[a.layer, a.subblock] = a
    return tuple(changed[a.layer, a.subblock] for a in chosen)
