"""Which alternatives are run exactly, round after round, and when it is enough.

The first round serves the scores as such: it lowers their errors as much as it can. Each further one serves what they
are for, and goes to alternatives that decide what the search takes (:mod:`layersmith.scoring.regret`), by what the
rounds before have shown. How many it takes to settle the search's solutions is foreseen by the first estimates, so that
the time left can be told; only where runs show otherwise are there more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layersmith.scoring.correction import Prior, choose_runs, correct, draw, misfit
from layersmith.scoring.regret import Contest

SHARES = (1 / 4, *[1 / 8] * 6)  # of all the work, for each round
_DRAWS = 128
# More rounds than were foreseen are made where the regret is so many times as large as it should be.
_UNFORESEEN = 1.5

# Place of an alternative to the number of rows on which it runs exactly; and to what they showed, with that number.
Runs = Mapping[int, int]
Observed = Mapping[int, tuple[float, int]]


@dataclass(frozen=True)
class Rounds:
    """See the module's docstring.

    Attributes:
        known: before any exact run.
        estimates: ``[n]``.
        costs: of an exact run on one row, in forward passes.
        num_rows: N.
        passes: that all exact runs may take.
        precision: nothing more is run once every score is known so well.
        settled: nor, after the first round, once the regret is thought to be below.
        contest: of the search; None: everything serves the scores as such, in one round.
    """

    known: Prior
    estimates: torch.Tensor
    costs: Sequence[float]
    num_rows: int
    passes: float
    precision: float
    settled: float
    contest: Contest | None

    @property
    def count(self) -> int:
        """Of the rounds, at most."""
        return 1 if self.contest is None else len(SHARES)

    def after(self, k: int, runs: Runs, observed: Observed, foreseen: int = 0) -> dict[int, int]:
        """All runs there are after round k; those of before if there is nothing more to be run.

        Args:
            k: from 0.
            runs: of the rounds before.
            observed: what they showed.
            foreseen: so many rounds are made, the others if they are needed.
        """
        worth = None
        if k and self.contest is not None:
            regret, worth = self.worth(observed)
            if k >= foreseen and regret <= self.settled * (_UNFORESEEN if foreseen else 1):
                return dict(runs)
        passes = self.passes * (1.0 if self.contest is None else SHARES[k])
        return choose_runs(self.known, self.costs, self.num_rows, passes, self.precision, runs, worth)

    def foresee(self, k: int, runs: Runs, observed: Observed, foreseen: int = 0) -> tuple[int, Runs]:
        """The number of rounds there will be, and all runs, if those from round k on show what is believed."""
        while k < (foreseen or self.count) and (following := self.after(k, runs, observed, foreseen)) != runs:
            mean, _ = correct(self.known, observed, self.num_rows)
            seen = {i for i in observed if runs[i] == following[i]}
            observed = {i: observed[i] if i in seen else (float(mean[i]), n) for i, n in following.items()}
            k, runs = k + 1, following
        return k, runs

    def worth(self, observed: Observed) -> tuple[float, torch.Tensor]:
        """The regret of children chosen by the scores, and how much the variance of each is worth, ``[n]``.

        Where exact runs show more than they should by what was known before, the regret is as much larger.
        """
        assert self.contest is not None
        mean, deviation = correct(self.known, observed, self.num_rows)
        drawn = draw(self.known, observed, self.num_rows, _DRAWS, seed=0)
        regret, part = self.contest.regret(self.estimates * mean.exp(), self.estimates[:, None] * drawn.exp())
        return regret * max(1.0, misfit(self.known, observed, self.num_rows)), part / deviation.square().clamp_min(1e-9)


def relative_log(exact: Sequence[float], estimated: Sequence[float]) -> float | None:
    """r on some rows; None where one of the two is nothing."""
    over, under = math.fsum(exact), math.fsum(estimated)
    return math.log(over / under) if over > 0 and under > 0 else None
