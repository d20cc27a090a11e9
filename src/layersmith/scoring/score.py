"""What a score is, and the journal that keeps results while they come."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from layersmith.errors import UsageError
from layersmith.library.alternative import Alternative
from layersmith.run.artifacts import saying_disk_full
from layersmith.scoring.metrics import loss_of

_SYNC_EVERY_SECONDS = 5.0


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


# ---------------------------------------------------------------------------------------------- the journal

Values = dict[str, float]


class Journal:
    """Results by what they are of and by row, appended to a file as they come; in memory only without a path.

    A file of other inputs is started anew, and a last line that was cut off is as if never written.

    Args:
        path: the file.
        inputs: digest of everything that results depend on.
    """

    def __init__(self, path: Path | None, inputs: str):
        self.path, self.inputs = path, inputs
        self.known: dict[tuple[str, int], Values] = {}
        self._file: IO[bytes] | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        if self.path is not None:
            self.known = _read(self.path, self.inputs)
            with saying_disk_full(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.known:
                    _cut_off_broken_end(self.path)
                self._file = open(self.path, "ab" if self.known else "wb")
                if not self.known:
                    self._append({"inputs": self.inputs})
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, of: str, rows: Iterable[int]) -> bool:
        return all((of, row) in self.known for row in rows)

    def write(self, of: str, rows: Sequence[int], results: Sequence[Values]) -> None:
        """Results on rows; those that are known already stay."""
        for row, values in zip(rows, results, strict=True):
            if (of, row) not in self.known:  # a batch may have been cut off in its middle
                self.known[of, row] = values
                self._append({"of": of, "row": row, "values": values})

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is not None and self.path is not None:
            with saying_disk_full(self.path):
                self._file.write(json.dumps(record).encode() + b"\n")
                self._file.flush()
                if time.monotonic() - self._synced > _SYNC_EVERY_SECONDS:
                    os.fsync(self._file.fileno())
                    self._synced = time.monotonic()


def _read(path: Path, inputs: str) -> dict[tuple[str, int], Values]:
    known: dict[tuple[str, int], Values] = {}
    if not path.is_file():
        return known
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if number == 0:
                if record.get("inputs") != inputs:
                    return {}
                continue
            if not line.endswith(b"\n"):
                break
            known[record["of"], record["row"]] = record["values"]
    return known


def _cut_off_broken_end(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)
