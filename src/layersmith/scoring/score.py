"""What a score is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layersmith.errors import UsageError
from layersmith.library.alternative import Alternative
from layersmith.scoring.metrics import loss_of


@dataclass(frozen=True)
class Score:
    """One alternative's metrics.

    Attributes:
        alternative: which.
        rows: metric to its value on every scoring row. Exact scores have all metrics, others ``kl_divergence`` alone.
        exact_rows: rows on which it was run exactly; elsewhere its second-order estimate, corrected, stands.
        error: standard deviation of the mean KL that comes from the correction, beside the noise of the rows.
        checked: mean KL on the rows that were run exactly, as it was estimated before any correction, and exactly;
            None where there is no estimate or no exact run.
    """

    alternative: Alternative
    rows: dict[str, list[float]]
    exact_rows: int = 0
    error: float = 0.0
    checked: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"of": self.alternative.key, "rows": self.rows, "exact_rows": self.exact_rows}
        return record | {"error": self.error, "checked": None if self.checked is None else list(self.checked)}

    @staticmethod
    def from_dict(alternative: Alternative, record: dict[str, Any]) -> Score:
        checked = record.get("checked")
        return Score(
            alternative, record["rows"], record["exact_rows"], record["error"], tuple(checked) if checked else None
        )

    def mean(self, metric: str) -> float:
        """Raises: UsageError: this metric was not measured."""
        if metric not in self.rows:
            raise UsageError(f"{metric} was not scored in this run. Score with --scoring exact to have every metric.")
        return math.fsum(self.rows[metric]) / len(self.rows[metric])

    def standard_error(self, metric: str) -> float | None:
        """Of the mean over rows, with the error of the correction; None for a single row."""
        own = standard_error(self.rows[metric])
        return own if own is None or not self.error else math.hypot(own, self.error)


def standard_error(values: Sequence[float]) -> float | None:
    """s / sqrt(n), s the sample standard deviation; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def error_beside_each_other(values: torch.Tensor, num_rows: int) -> float:
    """How far scores stand from what all rows would give, for telling alternatives apart.

    Rows that are hard for one alternative are hard for all: that moves all scores alike and exchanges none. With s_a
    the mean of v_ar over the n rows that were run, of N, and f_r the mean over alternatives of v_ar / s_a, what is left
    is e_ar = v_ar - s_a f_r, and the error of s_a beside the others

        sqrt(var_r(e_ar) (1/n - 1/N)) / s_a.

    Scores below a tenth of the median count as that much: what they are exactly decides nothing.

    Args:
        values: ``[A, n]``, how much worse than the parent.
        num_rows: N.

    Returns:
        The root mean square over alternatives; infinite where fewer than two rows or no losses tell.
    """
    n = values.shape[1]
    scores = values.mean(1)
    least = 0.1 * float(scores.median())
    if n < 2 or least <= 0:
        return math.inf
    scale = scores.clamp_min(least)
    factors = (values / scale[:, None]).mean(0)
    left = values - scores[:, None] * factors / factors.mean()
    errors = left.square().sum(1) / (n - 1) * (1 / n - 1 / num_rows) / scale.square()
    return float(errors.mean().sqrt())


def losses(scores: Sequence[Score], objective: str) -> dict[str, float]:
    """Key of the alternative to how much worse it is than the parent under an objective; the parent has 0."""
    parent_value = next(s.mean(objective) for s in scores if s.alternative.is_parent)
    return {
        s.alternative.key: 0.0 if s.alternative.is_parent else loss_of(objective, s.mean(objective), parent_value)
        for s in scores
    }
