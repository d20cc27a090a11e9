"""Scores of alternatives, and their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Len
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from layersmith.errors import UsageError
from layersmith.library.alternative import Alternative
from layersmith.scoring.metrics import loss_of


class ScoreData(TypedDict):
    """A record of ``scores.json``."""

    of: str
    rows: dict[str, Annotated[list[float], Len(1)]]
    exact_rows: NonNegativeInt
    error: float
    checked: Annotated[list[float], Len(2, 2)] | None


@dataclass(frozen=True)
class Score:
    """The metrics of one alternative.

    Attributes:
        alternative: The alternative.
        rows: Metric to its value on every scoring row. Exact scores have all metrics, others ``kl_divergence`` alone.
        exact_rows: Number of rows on which it ran exactly; the others have its corrected second-order estimate.
        error: Standard deviation of the mean KL due to the correction, without the noise of the rows.
        checked: Mean KL on the exact rows: the estimate before any correction, and the exact value; None without an
            estimate or an exact run.
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
        """The mean of a metric over rows.

        Raises:
            UsageError: The metric was not measured.
        """
        if metric not in self.rows:
            raise UsageError(f"{metric} was not scored in this run. Score with --scoring exact to get every metric.")
        return math.fsum(self.rows[metric]) / len(self.rows[metric])

    def standard_error(self, metric: str) -> float | None:
        """Standard error of the mean over rows, with the error of the correction; None for a single row."""
        of_rows = standard_error(self.rows[metric])
        return of_rows if of_rows is None or not self.error else math.hypot(of_rows, self.error)


def standard_error(values: Sequence[float]) -> float | None:
    """s / sqrt(n), s the sample standard deviation; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def relative_error(values: torch.Tensor, num_rows: int) -> float:
    """The error of scores from some of the rows, relative to the other scores.

    Rows that are hard for one alternative are hard for all, which changes all scores by the same factor and their order
    not at all. Let s_a be the mean of v_ar over n of the N rows, and f_r the mean over alternatives of v_ar / s_a. With
    the residuals e_ar = v_ar - s_a f_r, the relative error of s_a is

        sqrt(var_r(e_ar) (1/n - 1/N)) / s_a.

    Scores below a tenth of the median are raised to it, because their exact values decide nothing.

    Args:
        values: Loss increases v over the parent, ``[A, n]``.
        num_rows: N, the number of scoring rows.

    Returns:
        The root mean square over alternatives; infinite with fewer than two rows or without losses.
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
    """Key of each alternative to its loss increase over the parent under an objective; 0 for the parent."""
    parent_value = next(s.mean(objective) for s in scores if s.alternative.is_parent)
    return {
        s.alternative.key: 0.0 if s.alternative.is_parent else loss_of(objective, s.mean(objective), parent_value)
        for s in scores
    }
