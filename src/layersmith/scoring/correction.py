"""From second-order estimates and some exact runs to scores with an error.

Let r be the logarithm of exact over estimated KL. Estimates of small changes are right: r grows with how large a change
is beside the hidden states that it is made to (``size``), is alike for alternatives of one subblock and kind that
change about as much, and somewhat alike within a kind and within a subblock. That is written down as a Gaussian process
over all alternatives,

    cov(r_a, r_b) = h_a h_b (0.2 [same kind] k + 0.4 [same kind and subblock] k + 0.2 [same subblock] + 0.2 [a = b])
    h = 0.08 + 0.3 size + 2.5 size^2,   k = exp(-(log e_a - log e_b)^2 / (2 * 1.5^2)),

e the estimates. Where experts of later layers are chosen by routers, a small change moves a few tokens over the edge to
another expert: about as many as it is large, each by a jump that does not get smaller. So KL falls with the size of a
change there and not with its square, e is too low by a factor 1 + b / sqrt(e), and the covariance has another term,

    f_a f_b (0.8 [same kind] + 0.2 [a = b]),   f = log(1 + 0.002 / sqrt(e)),

for those whose changes a router sees: what is done to every token moves more over the edge than what is done to a few
that used an expert. What is done to experts themselves changes few tokens, and an estimate that few tokens make up
tells less: with s its relative standard deviation over the N rows, s^2 / N is added to the variance of r.

An exact run on n of N rows observes r with variance (0.12 + 0.3 (h + f) + s)^2 (1/n - 1/N). The variance that is left
does not depend on what is observed, so the runs can be chosen beforehand: always the one that lowers the summed
variance most for its cost. Of alternatives of experts, or that a router sees, small estimates count for less in that
sum: below a tenth of the median they decide nothing, however wrong. The measurements behind the
constants are in docs/measurements/scoring.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layersmith.library.alternative import Alternative

_SMALLEST = 1e-9  # an estimate of nothing has no logarithm
_JUMPS = 0.002  # b, in the root of nats; only its order of magnitude matters, since exact runs tell its factor
_SMALL_SHARE = 0.1  # of the median estimate


@dataclass(frozen=True)
class Prior:
    """What is known before any exact run.

    Attributes:
        covariance: ``[n, n]`` float64, of r.
        noise: ``[n]``, standard deviation of r on a single row.
        weight: ``[n]``, how much the variance of each counts when runs are chosen.
    """

    covariance: torch.Tensor
    noise: torch.Tensor
    weight: torch.Tensor


def prior(
    alternatives: Sequence[Alternative],
    estimates: Sequence[float],
    sizes: Sequence[float],
    before_routers: Sequence[bool] | None = None,
    of_experts: Sequence[float | None] | None = None,
    num_rows: int = 1,
) -> Prior:
    """See the module's docstring.

    Args:
        alternatives: n of them.
        estimates: of their KL.
        sizes: of their changes, beside the hidden states.
        before_routers: whether a router sees their changes; default: none does.
        of_experts: relative standard deviations over rows of the estimates of alternatives of experts; None for the
            others. Default: there are none.
        num_rows: N.
    """
    size = torch.tensor(sizes, dtype=torch.float64).clamp(0, 1.5)
    spread = 0.08 + 0.3 * size + 2.5 * size.square()
    logs = torch.tensor([math.log(max(e, _SMALLEST)) for e in estimates], dtype=torch.float64)
    near = torch.exp(-(logs[:, None] - logs).square() / (2 * 1.5**2))
    kind = _same([(a.subblock, a.kind, a.method) for a in alternatives])
    place = _same([(a.layer, a.subblock) for a in alternatives])
    correlation = (0.2 * kind + 0.4 * kind * place) * near + 0.2 * place + 0.2 * torch.eye(len(logs))
    jumps = (_JUMPS * torch.exp(-logs / 2)).log1p()
    seen = torch.tensor(before_routers or [False] * len(logs))
    jumps *= seen
    own = torch.eye(len(logs), dtype=torch.float64)
    covariance = spread[:, None] * spread * correlation + jumps[:, None] * jumps * (0.8 * kind + 0.2 * own)
    by_rows = of_experts or [None] * len(logs)
    scatter = torch.tensor([s or 0.0 for s in by_rows], dtype=torch.float64)
    covariance += torch.diag(scatter.square() / num_rows)
    small = (logs.exp() / (_SMALL_SHARE * logs.exp().median())).clamp(max=1).square()
    routed = seen | torch.tensor([s is not None for s in by_rows])
    return Prior(covariance, 0.12 + 0.3 * (spread + jumps) + scatter, torch.where(routed, small, 1.0))


def _same(keys: Sequence[object]) -> torch.Tensor:
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    own = torch.tensor([numbers[key] for key in keys])
    return (own[:, None] == own).double()


def choose_runs(
    known: Prior,
    costs: Sequence[float],
    num_rows: int,
    budget: float,
    precision: float,
    done: Mapping[int, int] | None = None,
    worth: torch.Tensor | None = None,
) -> dict[int, int]:
    """Which alternatives to run exactly, and on how many rows.

    Args:
        known: the prior.
        costs: of an exact run on one row.
        num_rows: N; a first run is on one row, a further one doubles the rows.
        budget: for the sum of costs.
        precision: nothing more is run once every standard deviation of r is below, as far as it counts.
        done: index to its rows, of what was run before and costs nothing more.
        worth: ``[n]``, how much the variance of each counts; default: as in the prior.

    Returns:
        Index of an alternative to its rows, those of before included.
    """
    left = known.covariance.clone()
    cost = torch.tensor(costs, dtype=torch.float64)
    rows = torch.zeros(len(cost), dtype=torch.float64)
    if done:
        at, cross, solved = _given(known, done, num_rows)
        left -= cross @ solved
        rows[at] = torch.tensor(list(done.values()), dtype=torch.float64)
    weight = known.weight if worth is None else worth
    spent = 0.0
    while True:
        variance = left.diagonal()
        more = torch.minimum(torch.where(rows > 0, rows, 1.0), num_rows - rows)
        noise = known.noise.square() / more.clamp_min(1)
        gain = weight @ left.square() / (variance + noise) / (cost * more.clamp_min(1))
        gain[(more < 1) | (spent + cost * more > budget)] = -1
        best = int(gain.argmax())
        if gain[best] <= 0 or float((known.weight * variance).max()) <= precision**2:
            return {i: int(n) for i, n in enumerate(rows.tolist()) if n}
        column = left[:, best].clone()
        left -= torch.outer(column, column) / (variance[best] + noise[best])
        spent += float(cost[best] * more[best])
        rows[best] += more[best]


def _given(known: Prior, counts: Mapping[int, int], num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places ``[m]`` of what was run on so many rows, covariances with that ``[n, m]``, and its weights ``[m, n]``."""
    at = torch.tensor(list(counts))
    cross = known.covariance[:, at]
    return at, cross, torch.linalg.solve(cross[at] + torch.diag(_variance_of_runs(known, counts, num_rows)), cross.T)


def _variance_of_runs(known: Prior, counts: Mapping[int, int], num_rows: int) -> torch.Tensor:
    """``[m]``: of r as exact runs on so many rows show it."""
    rows = torch.tensor(list(counts.values()), dtype=torch.float64)
    return known.noise[torch.tensor(list(counts))].square() * (1 / rows - 1 / num_rows) + 1e-8


def correct(
    known: Prior, observed: Mapping[int, tuple[float, int]], num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation ``[n]`` of r, given what exact runs showed.

    Args:
        known: the prior.
        observed: index to r on the rows that were run, and their number.
        num_rows: N.
    """
    if not observed:
        return torch.zeros_like(known.noise), known.covariance.diagonal().sqrt()
    _, cross, solved = _given(known, {i: rows for i, (_, rows) in observed.items()}, num_rows)
    mean = solved.T @ torch.tensor([r for r, _ in observed.values()], dtype=torch.float64)
    variance = known.covariance.diagonal() - (cross * solved.T).sum(1)
    return mean, variance.clamp_min(0).sqrt()


def draw(known: Prior, observed: Mapping[int, tuple[float, int]], num_rows: int, count: int, seed: int) -> torch.Tensor:
    """``[n, count]``: r as it may be, given what exact runs showed: draws of the prior, led to what was seen.

    Args:
        known: the prior.
        observed: index to r on the rows that were run, and their number.
        num_rows: N.
        count: of the draws.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(known.noise)
    free = torch.randn(n, count, generator=generator, dtype=torch.float64)
    drawn = torch.linalg.cholesky(known.covariance) @ free
    if not observed:
        return drawn
    counts = {i: rows for i, (_, rows) in observed.items()}
    at, _, solved = _given(known, counts, num_rows)
    noise = torch.randn(len(at), count, generator=generator, dtype=torch.float64)
    seen = torch.tensor([r for r, _ in observed.values()], dtype=torch.float64)
    off = seen[:, None] - drawn[at] - noise * _variance_of_runs(known, counts, num_rows).sqrt()[:, None]
    return drawn + solved.T @ off


def misfit(known: Prior, observed: Mapping[int, tuple[float, int]], num_rows: int) -> float:
    """What exact runs showed over what the prior expects of them, in the root mean square; 1 if it is right."""
    if not observed:
        return 1.0
    counts = {i: rows for i, (_, rows) in observed.items()}
    expected = known.covariance.diagonal()[list(counts)] + _variance_of_runs(known, counts, num_rows)
    seen = torch.tensor([r for r, _ in observed.values()], dtype=torch.float64)
    return float((seen.square() / expected).mean().sqrt())
