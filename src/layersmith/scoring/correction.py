"""Corrects second-order estimates by a few exact runs, and states the error of the result.

Let r be the logarithm of exact over estimated KL. Estimates of small changes are accurate, so r grows with the size of
a change relative to the hidden states (``size``). It is similar for alternatives of one subblock and kind with similar
changes, and less similar within a kind or within a subblock alone. The prior is a Gaussian process over alternatives,

    cov(r_a, r_b) = h_a h_b (0.2 [same kind] k + 0.4 [same kind and subblock] k + 0.2 [same subblock] + 0.2 [a = b])
    h = 0.08 + 0.3 size + 2.5 size^2,   k = exp(-(log e_a - log e_b)^2 / (2 * 1.5^2)),

where e are the estimates. If routers of later layers choose experts, a small change sends a few tokens to other
experts. Their number is proportional to the change, but each jump stays as large. So KL falls with the size of the
change and not with its square, e is too low by a factor 1 + b / sqrt(e), and the covariance has another term,

    f_a f_b (0.8 [same kind] + 0.2 [a = b]),   f = log(1 + 0.002 / sqrt(e)),

for alternatives that change the input of a router. An alternative of the experts themselves changes few tokens, which
makes its estimate noisy: with s its relative standard deviation over the N rows, s^2 / N is added to the variance of r.

An exact run on n of N rows observes r with variance (0.12 + 0.3 (h + f) + s)^2 (1/n - 1/N). The posterior variance does
not depend on the observed values, so the runs are chosen beforehand: each time the run that lowers the weighted sum of
variances most for its cost. For alternatives of experts or before routers, estimates below a tenth of the median have
lower weights, because they decide nothing. docs/measurements/scoring.md has the measurements behind the constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layersmith.library.alternative import Alternative

# The constants below were fitted to exact over estimated scores of small trained parents; docs/scoring.md and
# benchmarks/scoring.py have the measurements. They trade trust in estimates against exact runs: a wider prior asks for
# more runs, a narrower one generalizes too far from few runs.

# h, the prior standard deviation of r: of tiny changes, and its growth with the size of a change and its square.
_SPREAD, _SPREAD_BY_SIZE, _SPREAD_BY_SQUARE = 0.08, 0.3, 2.5
# A change larger than this is as unlike the parent as any.
_LARGEST_SIZE = 1.5
# Shares of the variance of r that alternatives have in common: of one kind, of one kind and subblock, of one subblock;
# and the share of each alternative alone.
_BY_KIND, _BY_KIND_AND_PLACE, _BY_PLACE, _ALONE = 0.2, 0.4, 0.2, 0.2
# Over how large a difference of log estimates alternatives of a kind resemble each other.
_LENGTH = 1.5
# Noise of r on a single row: of exact estimates, and its growth with the prior standard deviation.
_ROW_NOISE, _ROW_NOISE_BY_SPREAD = 0.12, 0.3
# b, in the root of nats, for changes that a router sees. Only its order of magnitude matters, since exact runs show the
# factor; and shares of the variance of jumps in common by kind, and alone.
_JUMPS, _JUMPS_BY_KIND, _JUMPS_ALONE = 0.002, 0.8, 0.2
# Where routers are, estimates below this share of the median decide nothing, and count for less.
_SMALL_SHARE = 0.1
_SMALLEST = 1e-9  # an estimate of 0 has no logarithm


@dataclass(frozen=True)
class Prior:
    """The Gaussian prior of r before any exact run.

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
    """The prior of r for n alternatives; the module's docstring has the formula.

    Args:
        alternatives: The n alternatives.
        estimates: Estimates of their KL.
        sizes: Sizes of their changes relative to the hidden states.
        before_routers: Whether a router sees their changes; default: none does.
        of_experts: For alternatives of experts, the relative standard deviation of their estimates over rows; None for
            the others. Default: no alternative is of experts.
        num_rows: N, the number of scoring rows.
    """
    size = torch.tensor(sizes, dtype=torch.float64).clamp(0, _LARGEST_SIZE)
    spread = _SPREAD + _SPREAD_BY_SIZE * size + _SPREAD_BY_SQUARE * size.square()
    logs = torch.tensor([math.log(max(e, _SMALLEST)) for e in estimates], dtype=torch.float64)
    near = torch.exp(-(logs[:, None] - logs).square() / (2 * _LENGTH**2))
    kind = _same([(a.subblock, a.kind, a.method) for a in alternatives])
    place = _same([(a.layer, a.subblock) for a in alternatives])
    correlation = (_BY_KIND * kind + _BY_KIND_AND_PLACE * kind * place) * near
    correlation = correlation + _BY_PLACE * place + _ALONE * torch.eye(len(logs))
    jumps = (_JUMPS * torch.exp(-logs / 2)).log1p()
    seen = torch.tensor(before_routers or [False] * len(logs))
    jumps *= seen
    jumps_in_common = _JUMPS_BY_KIND * kind + _JUMPS_ALONE * torch.eye(len(logs), dtype=torch.float64)
    covariance = spread[:, None] * spread * correlation + jumps[:, None] * jumps * jumps_in_common
    by_rows = of_experts or [None] * len(logs)
    scatter = torch.tensor([s or 0.0 for s in by_rows], dtype=torch.float64)
    covariance += torch.diag(scatter.square() / num_rows)
    small = (logs.exp() / (_SMALL_SHARE * logs.exp().median())).clamp(max=1).square()
    routed = seen | torch.tensor([s is not None for s in by_rows])
    noise = _ROW_NOISE + _ROW_NOISE_BY_SPREAD * (spread + jumps) + scatter
    return Prior(covariance, noise, torch.where(routed, small, 1.0))


def _same(keys: Sequence[object]) -> torch.Tensor:
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    ids = torch.tensor([numbers[key] for key in keys])
    return (ids[:, None] == ids).double()


@dataclass(frozen=True)
class RunLimits:
    """How much may run exactly.

    Attributes:
        num_rows: N. A first run is on one row; each further one doubles the rows.
        budget: Limit of the summed costs.
        precision: Nothing more runs once every weighted standard deviation of r is below this.
    """

    num_rows: int
    budget: float
    precision: float


def choose_runs(
    known: Prior,
    costs: Sequence[float],
    limits: RunLimits,
    done: Mapping[int, int] | None = None,
    worth: torch.Tensor | None = None,
) -> dict[int, int]:
    """Which alternatives to run exactly, and on how many rows.

    Args:
        known: The prior.
        costs: Cost of an exact run of each alternative on one row.
        limits: How much may run.
        done: Index of each alternative that ran before to its rows, which cost nothing more.
        worth: ``[n]``, how much the variance of each counts; default: the prior's weights.

    Returns:
        Index of each alternative to its rows, those of ``done`` included.
    """
    left = known.covariance.clone()
    cost = torch.tensor(costs, dtype=torch.float64)
    rows = torch.zeros(len(cost), dtype=torch.float64)
    if done:
        at, cross, solved = _given(known, done, limits.num_rows)
        left -= cross @ solved
        rows[at] = torch.tensor(list(done.values()), dtype=torch.float64)
    weight = known.weight if worth is None else worth
    spent = 0.0
    while True:
        variance = left.diagonal()
        added = torch.minimum(torch.where(rows > 0, rows, 1.0), limits.num_rows - rows)
        noise = known.noise.square() / added.clamp_min(1)
        gain = weight @ left.square() / (variance + noise) / (cost * added.clamp_min(1))
        gain[(added < 1) | (spent + cost * added > limits.budget)] = -1
        best = int(gain.argmax())
        if gain[best] <= 0 or float((known.weight * variance).max()) <= limits.precision**2:
            return {i: int(n) for i, n in enumerate(rows.tolist()) if n}
        column = left[:, best].clone()
        left -= torch.outer(column, column) / (variance[best] + noise[best])
        spent += float(cost[best] * added[best])
        rows[best] += added[best]


def _given(known: Prior, counts: Mapping[int, int], num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices ``[m]`` of the runs, covariances with them ``[n, m]``, and their regression weights ``[m, n]``."""
    at = torch.tensor(list(counts))
    cross = known.covariance[:, at]
    return at, cross, torch.linalg.solve(cross[at] + torch.diag(_variance_of_runs(known, counts, num_rows)), cross.T)


def _variance_of_runs(known: Prior, counts: Mapping[int, int], num_rows: int) -> torch.Tensor:
    """``[m]``: variance of the observation of r by each exact run."""
    rows = torch.tensor(list(counts.values()), dtype=torch.float64)
    return known.noise[torch.tensor(list(counts))].square() * (1 / rows - 1 / num_rows) + 1e-8


def correct(
    known: Prior, observed: Mapping[int, tuple[float, int]], num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and standard deviation ``[n]`` of r, given exact runs.

    Args:
        known: The prior.
        observed: Index of each alternative that ran exactly to r on its rows, and their number.
        num_rows: N, the number of scoring rows.
    """
    if not observed:
        return torch.zeros_like(known.noise), known.covariance.diagonal().sqrt()
    _, cross, solved = _given(known, {i: rows for i, (_, rows) in observed.items()}, num_rows)
    mean = solved.T @ torch.tensor([r for r, _ in observed.values()], dtype=torch.float64)
    variance = known.covariance.diagonal() - (cross * solved.T).sum(1)
    return mean, variance.clamp_min(0).sqrt()


def draw(known: Prior, observed: Mapping[int, tuple[float, int]], num_rows: int, count: int, seed: int) -> torch.Tensor:
    """``[n, count]``: posterior samples of r, which are prior samples conditioned by Matheron's rule.

    Source: Wilson et al., "Pathwise Conditioning of Gaussian Processes", arXiv 2011.04026 (2020).

    Args:
        known: The prior.
        observed: Index of each alternative that ran exactly to r on its rows, and their number.
        num_rows: N, the number of scoring rows.
        count: Number of samples.
        seed: Seed of the samples.
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
    """Root mean square of the observed r over their prior standard deviation; 1 if the prior is right."""
    if not observed:
        return 1.0
    counts = {i: rows for i, (_, rows) in observed.items()}
    expected = known.covariance.diagonal()[list(counts)] + _variance_of_runs(known, counts, num_rows)
    seen = torch.tensor([r for r, _ in observed.values()], dtype=torch.float64)
    return float((seen.square() / expected).mean().sqrt())
