"""Scores from second-order estimates, corrected by exact runs of the alternatives that decide the search.

A sweep estimates every alternative on every row. Rounds of exact runs follow (:mod:`layersmith.scoring.rounds`). A
Gaussian process infers from them the error of the other estimates (:mod:`layersmith.scoring.correction`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from layersmith.library.alternative import Alternative
from layersmith.run import ranks
from layersmith.run.journal import Journal
from layersmith.scoring.correction import Prior, correct, prior
from layersmith.scoring.exact_runs import ExactRuns, RowCounts
from layersmith.scoring.forward import most_seconds
from layersmith.scoring.regret import Axis, ExpectedRegret
from layersmith.scoring.rounds import Observed, Rounds, Runs, relative_log
from layersmith.scoring.score import Score, standard_error
from layersmith.scoring.second_order import SeededBatch, estimate, plan_estimate
from layersmith.scoring.silencing import Survey, look
from layersmith.scoring.task import KL, ScoringTask, exact_passes, has_experts, row_order
from layersmith.scoring.work import shared

_ESTIMATE = "second order "  # before the identity of an alternative, in the journal
# Rounds of exact runs to plan for while no estimate is known. Only the displayed remaining time depends on it
# (benchmarks/time_left.py).
_GUESSED_ROUNDS = 2
# One row in eight comes first in the sweep. Their estimates predict the number of rounds, so that a remaining time can
# be shown; more rows would predict better, but later.
_FIRST_SHARE = 8


def estimated_scores(task: ScoringTask, axes: Sequence[Axis], seed: int) -> tuple[list[Score], float | None]:
    """Score all alternatives by estimates, and exactly where that matters.

    Args:
        task: The scoring run; its parent is split into layers.
        axes: Costs by which the search will choose.
        seed: Seed of the random signs.

    Returns:
        The scores in the order of the library, and the expected regret of choosing by them as a share of the loss
        increase; None without axes.
    """
    assert task.layerwise is not None
    task.work.plan("choose", 2)
    survey = look(task.layerwise, task.pending, task.rows([0]), task.work)
    runs, sweep = ExactRuns(task), Sweep(task, survey, seed)
    sizes = [survey.size[a.identity] for a in task.pending]
    forecast = _Forecast(task, axes, sizes)
    sweep.plan()
    with task.work.doing("choose", 1):
        is_guess = not sweep.has(sweep.first_rows)
        planned = forecast.from_sizes() if is_guess else forecast.from_rows(sweep)[1]
    unknown = Journal(None, "")
    runs.plan(_by_identity(task, planned), {}, unknown)
    for _ in sweep.run():
        if is_guess and sweep.has(sweep.first_rows):
            runs.plan(_by_identity(task, planned), {}, unknown, -1)
            runs.plan(_by_identity(task, forecast.from_rows(sweep)[1]), {}, unknown)
            is_guess = False
    by_row = sweep.estimates(range(task.num_rows))
    with task.work.doing("choose", 1):
        rounds = forecast.rounds(by_row)
        count, _ = forecast.from_rows(sweep)
    done, observed = _run_rounds(task, runs, rounds, by_row, count)
    regret = rounds.worth(observed)[0] if rounds.expected_regret is not None else None
    return _corrected(task, rounds.known, by_row, done, observed), regret


def _run_rounds(
    task: ScoringTask, runs: ExactRuns, rounds: Rounds, by_row: Sequence[Sequence[float]], count: int
) -> tuple[Runs, Observed]:
    """Make exact runs, round by round; all of them, and what they showed."""
    done: Runs = {}
    for k in range(rounds.count):
        with task.work.doing("choose", 0):
            observed = _observed(task, by_row, done)
            following, planned = ranks.from_first(partial(_choose, rounds, k, done, observed, count))
        task.work.forget()
        if following == done:
            break
        task.progress.begin(f"of {len(planned)} run exactly", sum(planned.values()) / max(1, len(planned)))
        task.progress.add_resumed(sum(done.values()))
        runs.run(*(_by_identity(task, of) for of in (following, done, planned)))
        done = following
    return done, _observed(task, by_row, done)


def _choose(rounds: Rounds, k: int, done: Runs, observed: Observed, count: int) -> tuple[Runs, Runs]:
    """The exact runs after another round, and all that are foreseen."""
    following = rounds.after(k, done, observed, count)
    return following, rounds.foresee(k, done, observed, max(count, k + 1))[1]


def _by_identity(task: ScoringTask, runs: Runs) -> RowCounts:
    return {task.pending[index].identity: rows for index, rows in runs.items()}


def _observed(task: ScoringTask, by_row: Sequence[Sequence[float]], runs: Runs) -> Observed:
    """Index of each alternative that ran exactly, to the logarithm of exact over estimated KL, and its rows."""
    order, observed = row_order(task.num_rows), {}
    for index, n in runs.items():
        exact = [task.results.known[task.pending[index].identity, row][KL] for row in order[:n]]
        r = relative_log(exact, [by_row[index][row] for row in order[:n]])
        if r is not None:
            observed[index] = r, n
    return observed


class Sweep:
    """Second-order estimates of all alternatives on all rows; those in the journal are not made again."""

    def __init__(self, task: ScoringTask, survey: Survey, seed: int):
        self.task, self.survey, self.seed = task, survey, seed
        self.first_rows = list(range(max(1, task.num_rows // _FIRST_SHARE)))
        self._sweeps = list(self._batches_together())
        self._missing = [[rows for rows in together if not self.has(rows)] for together in self._sweeps]

    def has(self, rows: Sequence[int]) -> bool:
        return all(self.task.results.has(_ESTIMATE + a.identity, rows) for a in self.task.pending)

    def estimates(self, rows: Sequence[int]) -> list[list[float]]:
        """KL of each alternative on each row."""
        known = self.task.results.known
        return [[known[_ESTIMATE + a.identity, row][KL] for row in rows] for a in self.task.pending]

    def plan(self) -> None:
        """Add this process's part of the sweep to the planned work."""
        task = self.task
        task.progress.begin("estimated", task.num_rows / ranks.count())
        for together, missing in zip(self._sweeps, self._missing, strict=True):
            known = [rows for rows in together if rows not in missing]
            for plan, batches in ((task.work.plan, missing), (task.work.done_before, known)):
                if batches:
                    self._plan(batches, shared(plan))
            task.progress.add_resumed(len(task.pending) * sum(map(len, known)))

    def run(self) -> Iterator[None]:
        """Estimate on what is missing; yields whenever results were added."""
        task = self.task
        assert task.layerwise is not None
        # Where nothing is read from the disk, batches need not go through the layers together.
        parts = self._missing if task.streamed else [[rows for batches in self._missing for rows in batches]]
        for batches in parts:
            while batches:
                size = self._batches_of_a_minute(batches[0])
                if task.streamed and size < len(batches):
                    task.work.plan("reading", 2 * len(task.layerwise.layers))
                together = ranks.count() * size
                mine = batches[ranks.number() * size :][:size]
                divided = task.layerwise.division.is_open  # each process runs some layers on all batches
                task.results.from_each(partial(self._run, batches[:together] if divided else mine))
                batches = batches[together:]
                yield

    def _run(self, batches: Sequence[list[int]]) -> None:
        task = self.task
        assert task.layerwise is not None
        if not batches:
            return
        samples = range(task.recipe.samples)
        seeded = [
            SeededBatch(task.rows(rows), [[row_seed(self.seed, k, row) for row in rows] for k in samples])
            for rows in batches
        ]
        values = estimate(task.layerwise, task.pending, self.survey, seeded, task.states(), task.work)
        for rows, value_by_identity in zip(batches, values, strict=True):
            task.progress.add(len(value_by_identity) * len(rows))
            for identity, of_rows in value_by_identity.items():
                task.results.write(_ESTIMATE + identity, rows, [{KL: float(v)} for v in of_rows])

    def _plan(self, batches: Sequence[list[int]], plan: Callable[[str, float], None]) -> None:
        task = self.task
        assert task.layerwise is not None
        shapes = [task.tokens[rows].shape for rows in batches]
        plan_estimate(task.layerwise, task.pending, self.survey, shapes, task.recipe.samples, plan)

    def _batches_together(self) -> Iterator[list[list[int]]]:
        """Batches that go through a layer before the next layer runs: single ones if layers are in memory."""
        task = self.task
        assert task.layerwise is not None
        batches = list(task.batches(range(task.num_rows)))
        size, first = 1, self.first_rows
        if len(batches[0]) > len(first) and not task.streamed:
            batches = [first, *task.batches(range(len(first), task.num_rows))]
        if task.streamed:
            # The inputs of every layer wait on the disk, and the gradients.
            waiting = len(task.layerwise.layers) + 1 + task.recipe.samples
            of_batch = waiting * len(batches[0]) * task.length * task.layerwise.bytes_of_a_token
            size = max(1, int(task.spill_bytes / of_batch))
        for start in range(0, len(batches), size):
            yield batches[start : start + size]

    def _batches_of_a_minute(self, rows: list[int]) -> int:
        """How many batches like this one go through one sweep of a streamed parent; the same in all processes.

        Results come at the end of a sweep, so a longer one loses more if it is interrupted; a shorter one reads the
        layers more often.
        """
        task = self.task
        if not task.streamed:
            return 1
        assert task.layerwise is not None
        amounts: dict[str, float] = {}
        self._plan([rows], amounts.__setitem__)
        seconds = [task.work.seconds_of(kind, n) for kind, n in amounts.items() if kind != "reading"]
        most, needed = most_seconds(task.layerwise, task.work, 2), math.fsum(s or 0.0 for s in seconds)
        is_known = None not in seconds  # or nothing was timed yet
        return ranks.from_first(lambda: max(1, int(most / max(needed, 1e-9))) if is_known else 1)


class _Forecast:
    """The rounds of exact runs as estimates foresee them."""

    def __init__(self, task: ScoringTask, axes: Sequence[Axis], sizes: Sequence[float]):
        self.task, self.axes, self.sizes = task, axes, sizes

    def rounds(self, by_row: Sequence[Sequence[float]]) -> Rounds:
        """The rounds, from estimates of each alternative by row."""
        task, num_rows = self.task, self.task.num_rows
        blocks = task.library.parent.blocks
        return Rounds(
            known=self._prior(by_row),
            estimates=torch.tensor([math.fsum(values) / num_rows for values in by_row], dtype=torch.float64),
            costs=[task.exact_cost(a) / num_rows for a in task.pending],
            num_rows=num_rows,
            passes=exact_passes(task.recipe, has_experts(blocks)),
            precision=task.recipe.precision,
            settled=task.recipe.settled,
            expected_regret=ExpectedRegret(task.library.alternatives, task.pending, self.axes) if self.axes else None,
        )

    def from_sizes(self) -> Runs:
        """The expected exact runs before any estimate: KL goes roughly with the square of a change's size."""
        rounds = self.rounds([[size**2] * self.task.num_rows for size in self.sizes])
        routed = any(block.ffn.moe is not None for block in self.task.library.parent.blocks)
        return rounds.foresee(0, {}, {}, rounds.count if routed else min(_GUESSED_ROUNDS, rounds.count))[1]

    def from_rows(self, sweep: Sweep) -> tuple[int, Runs]:
        """The number of rounds and all exact runs, from the estimates on the first rows."""
        rows, num_rows = sweep.first_rows, self.task.num_rows
        by_row = [[value * num_rows / len(rows) for value in values] for values in sweep.estimates(rows)]
        return self.rounds(by_row).foresee(0, {}, {})

    def _prior(self, by_row: Sequence[Sequence[float]]) -> Prior:
        task, blocks = self.task, self.task.library.parent.blocks
        estimates = [math.fsum(values) / task.num_rows for values in by_row]
        scatter_of_experts = [
            _scatter(values) if a.subblock == "ffn" and blocks[a.layer].ffn.moe is not None else None
            for a, values in zip(task.pending, by_row, strict=True)
        ]
        routed = [self._is_before_a_router(a) for a in task.pending]
        return prior(task.pending, estimates, self.sizes, routed, scatter_of_experts, task.num_rows)

    def _is_before_a_router(self, a: Alternative) -> bool:
        """Whether a change by this alternative can send tokens to other experts."""
        blocks = enumerate(self.task.library.parent.blocks)
        return any(block.ffn.moe is not None and (a.layer, a.subblock) < (i, "ffn") for i, block in blocks)


def _corrected(
    task: ScoringTask, known: Prior, by_row: Sequence[Sequence[float]], runs: Runs, observed: Observed
) -> list[Score]:
    """Exact values on rows that ran exactly, corrected estimates elsewhere."""
    num_rows = task.num_rows
    order = row_order(num_rows)
    mean, deviation = correct(known, observed, num_rows)
    scores = {}
    for index, a in enumerate(task.pending):
        factor = math.exp(float(mean[index]))
        values = [factor * e for e in by_row[index]]
        exact_rows = order[: runs.get(index, 0)]
        estimated = math.fsum(v for row, v in enumerate(values) if row not in exact_rows)
        error = float(deviation[index]) * estimated / num_rows
        for row in exact_rows:
            values[row] = task.results.known[a.identity, row][KL]
        checked = None
        if exact_rows:
            pairs = [(by_row[index][row], values[row]) for row in exact_rows]
            before, after = (math.fsum(column) / len(exact_rows) for column in zip(*pairs, strict=True))
            checked = before, after
        scores[a.identity] = Score(a, {KL: values}, len(exact_rows), error, checked)
    of_parent = {KL: [0.0] * num_rows}
    return [scores.get(a.identity) or Score(a, of_parent, num_rows) for a in task.library.alternatives]


def _scatter(values: Sequence[float]) -> float:
    """Standard deviation over the mean."""
    mean = math.fsum(values) / len(values)
    error = standard_error(values)
    return 0.0 if error is None or mean <= 0 else error * math.sqrt(len(values)) / mean


def row_seed(seed: int, sample: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {sample} {row}".encode()).digest()[:7], "big")
