"""Which alternatives run exactly in each round, and when it is enough.

The first round serves the scores as such: it lowers their errors as much as possible. Each further round serves the
search: it takes the alternatives whose errors decide what is chosen (:mod:`layersmith.scoring.regret`), given what
earlier rounds have shown. The first estimates foresee how many rounds are needed, so that a remaining time can be
shown; more follow only where runs show that the regret is still too large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layersmith.scoring.correction import Prior, RunLimits, choose_runs, correct, draw, misfit
from layersmith.scoring.regret import ExpectedRegret

# Share of the work for each round. Small rounds adapt better to what was shown. They also end closer to the number that
# was foreseen, so that the displayed remaining time is right (benchmarks/time_left.py).
SHARES = (1 / 4, *[1 / 8] * 6)
# Posterior draws from which the regret is estimated: more would lower its noise and take longer in each round.
_DRAWS = 128
# Rounds that were not foreseen follow only if the regret exceeds its target this many times. A lower factor runs more
# for little gain, and makes the displayed remaining time wrong (benchmarks/time_left.py).
_UNFORESEEN = 1.5

# Index of an alternative to the number of rows on which it runs exactly; and to r on these rows, with their number.
Runs = Mapping[int, int]
Observed = Mapping[int, tuple[float, int]]


@dataclass(frozen=True)
class Rounds:
    """The rounds of exact runs of one library.

    Attributes:
        known: The prior before any exact run.
        estimates: ``[n]``, mean second-order estimates.
        costs: Cost of an exact run of each alternative on one row, in forward passes.
        num_rows: N, the number of scoring rows.
        passes: Forward passes that all exact runs may take.
        precision: Runs stop once the relative standard deviation of every score is below this.
        settled: After the first round, runs also stop once the expected regret is below this.
        expected_regret: The model of the regret; without it, one round serves the scores as such.
    """

    known: Prior
    estimates: torch.Tensor
    costs: Sequence[float]
    num_rows: int
    passes: float
    precision: float
    settled: float
    expected_regret: ExpectedRegret | None

    @property
    def count(self) -> int:
        """The largest number of rounds."""
        return 1 if self.expected_regret is None else len(SHARES)

    def after(self, k: int, runs: Runs, observed: Observed, foreseen: int = 0) -> dict[int, int]:
        """All runs after round k; ``runs`` unchanged if nothing more has to run.

        Args:
            k: Number of the round, from 0.
            runs: Runs of the rounds before.
            observed: What they showed.
            foreseen: Rounds that are made in any case; further ones only if needed.
        """
        worth = None
        if k and self.expected_regret is not None:
            regret, worth = self.worth(observed)
            if k >= foreseen and regret <= self.settled * (_UNFORESEEN if foreseen else 1):
                return dict(runs)
        passes = self.passes * (1.0 if self.expected_regret is None else SHARES[k])
        limits = RunLimits(self.num_rows, passes, self.precision)
        return choose_runs(self.known, self.costs, limits, runs, worth)

    def foresee(self, k: int, runs: Runs, observed: Observed, foreseen: int = 0) -> tuple[int, Runs]:
        """The number of rounds and all runs, if the runs from round k on show what the prior expects."""
        while k < (foreseen or self.count) and (following := self.after(k, runs, observed, foreseen)) != runs:
            mean, _ = correct(self.known, observed, self.num_rows)
            seen = {i for i in observed if runs[i] == following[i]}
            observed = {i: observed[i] if i in seen else (float(mean[i]), n) for i, n in following.items()}
            k, runs = k + 1, following
        return k, runs

    def worth(self, observed: Observed) -> tuple[float, torch.Tensor]:
        """The expected regret of choosing by the scores, and ``[n]`` the value of reducing each variance.

        If exact runs deviate more from the estimates than the prior expects, the regret is scaled up accordingly.
        """
        assert self.expected_regret is not None
        mean, deviation = correct(self.known, observed, self.num_rows)
        drawn = draw(self.known, observed, self.num_rows, _DRAWS, seed=0)
        regret, part = self.expected_regret.regret(self.estimates * mean.exp(), self.estimates[:, None] * drawn.exp())
        return regret * max(1.0, misfit(self.known, observed, self.num_rows)), part / deviation.square().clamp_min(1e-9)


def relative_log(exact: Sequence[float], estimated: Sequence[float]) -> float | None:
    """r, the logarithm of exact over estimated KL on some rows; None if either is 0."""
    over, under = math.fsum(exact), math.fsum(estimated)
    return math.log(over / under) if over > 0 and under > 0 else None
