"""Exact runs of alternatives, each on the first of the rows in their order, and all alternatives until it is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from layersmith.library.alternative import Alternative
from layersmith.run import ranks
from layersmith.run.journal import Journal
from layersmith.scoring.exact import (
    Job,
    Measured,
    amounts_of,
    amounts_of_parent,
    in_groups,
    plan_layer_by_layer,
    run_exactly,
    run_layer_by_layer,
)
from layersmith.scoring.metrics import METRICS, PARENT_VALUES
from layersmith.scoring.score import Score, relative_error
from layersmith.scoring.task import PARENT, ScoringTask, row_order
from layersmith.scoring.work import plan_all, shared

# Identity of an alternative to the number of rows on which it runs exactly.
RowCounts = Mapping[str, int]
# Exact scoring of all alternatives checks after 8, 16, 32, ... rows whether they are enough. From fewer rows, standard
# errors are too uncertain to stop.
_LEAST_ROWS = 8
# The limit of what the busiest process does is found within a billionth of everything.
_HALVINGS = 30


@dataclass(frozen=True)
class _Part:
    """One batch of rows, and the alternatives that run on it.

    Attributes:
        rows: Numbers of the rows.
        groups: Alternatives in the groups that run together. They don't depend on results of an interrupted run, or
            rounding would differ after a restart.
        missing: The groups of which some results are missing.
        is_needed: Whether anything has to run, the parent included.
    """

    rows: list[int]
    groups: list[list[Alternative]]
    missing: list[list[Alternative]]
    is_needed: bool


class ExactRuns:
    """Plans and makes exact runs; results go to the task's journal."""

    def __init__(self, task: ScoringTask):
        self.task = task

    def run(self, wanted: RowCounts, done: RowCounts, planned: RowCounts | None = None) -> None:
        """Run alternatives exactly.

        Args:
            wanted: Rows of each alternative after this call.
            done: Rows of each alternative from earlier calls.
            planned: Rows of each alternative at the end of scoring, as far as known, for the remaining time; default:
                ``wanted``.
        """
        task = self.task
        self.plan(planned or wanted, done, task.results)
        parts = list(self._parts(task.results, wanted, done))
        for part in parts:
            task.progress.add_resumed(len(part.rows) * (sum(map(len, part.groups)) - sum(map(len, part.missing))))
        task.results.from_each(lambda: self._run(list(self._share(parts))))

    def _run(self, parts: Sequence[_Part]) -> None:
        """Run what is missing of parts."""
        task = self.task
        if task.streamed:
            assert task.layerwise is not None
            parts, jobs = self._jobs(parts)
            if not parts:
                return
            with closing(
                run_layer_by_layer(task.layerwise, jobs, task.states(), task.spill_bytes, task.work)
            ) as measured:  # other processes hear of an error at once
                for n, result in measured:
                    self._write(parts[n].rows, result)
            return
        for part in parts:
            if part.is_needed:
                for result in run_exactly(task.library, task.layerwise, part.missing, task.rows(part.rows), task.work):
                    self._write(part.rows, result)

    def _share(self, parts: Sequence[_Part]) -> Iterator[_Part]:
        """This process's share of the missing groups; see :func:`deal_groups`.

        All of them where the parent is divided, since each process runs some layers of all groups.
        """
        task = self.task
        if ranks.count() == 1 or (task.layerwise is not None and task.layerwise.division.is_open):
            yield from parts
            return
        costs = [
            (len(part.rows), [len(part.rows) * sum(map(task.exact_cost, group)) for group in part.missing])
            for part in parts
        ]
        for part, owners in zip(parts, deal_groups(costs, ranks.count()), strict=True):
            mine = [group for group, owner in zip(part.missing, owners, strict=True) if owner == ranks.number()]
            of_parent_alone = part.is_needed and not part.missing and ranks.is_first()
            yield dataclasses.replace(part, missing=mine, is_needed=bool(mine) or of_parent_alone)

    def plan(self, wanted: RowCounts, done: RowCounts, results: Journal, sign: int = 1) -> None:
        """Add the work of exact runs to the planned work, or with ``sign`` -1 take it back.

        Args:
            wanted: Rows of each alternative in the end.
            done: Rows of each alternative from earlier calls.
            results: Results that need no work.
            sign: 1 or -1.
        """
        task = self.task

        @shared
        def add(kind: str, amount: float) -> None:
            task.work.plan(kind, sign * amount)

        parts = list(self._parts(results, wanted, done))
        for part in parts:
            for group in part.groups:
                plan = add if group in part.missing else task.work.done_before
                for a in group:
                    plan_all(plan, amounts_of(task.library, task.layerwise, a, len(part.rows), task.length))
            if not task.streamed and part.is_needed:
                plan_all(add, amounts_of_parent(task.layerwise, len(part.rows), task.length))
        if task.streamed:
            assert task.layerwise is not None
            plan_layer_by_layer(task.layerwise, self._jobs(parts)[1], task.spill_bytes, add)

    def _parts(self, results: Journal, wanted: RowCounts, done: RowCounts) -> Iterator[_Part]:
        task = self.task
        order = row_order(task.num_rows)
        # All rows of a batch are wanted by the same alternatives.
        ends = sorted({n for counts in (wanted, done) for n in counts.values() if n})
        for start, end in zip([0, *ends], ends, strict=False):
            for places in task.batches(range(start, end)):
                rows = [order[p] for p in places]
                run = [a for a in task.pending if done.get(a.identity, 0) <= places[0] < wanted.get(a.identity, 0)]
                if not run:
                    continue
                together = 1 if task.streamed else max(1, task.tokens_at_once // (len(rows) * task.length))
                groups = in_groups(run, together)
                missing = [g for g in groups if not all(results.has(a.identity, rows) for a in g)]
                yield _Part(rows, groups, missing, bool(missing) or not results.has(PARENT, rows))

    def _jobs(self, parts: Sequence[_Part]) -> tuple[list[_Part], list[Job]]:
        """The parts of which something has to run, and their jobs."""
        needed = [part for part in parts if part.is_needed]
        return needed, [Job(self.task.rows(part.rows), [a for g in part.missing for a in g]) for part in needed]

    def _write(self, rows: list[int], measured: Measured) -> None:
        key = PARENT if measured.alternative is None else measured.alternative.identity
        self.task.results.write(key, rows, measured.rows)
        if measured.alternative is not None:
            self.task.progress.add(len(rows))


def deal_groups(parts: Sequence[tuple[float, Sequence[float]]], processes: int) -> list[list[int]]:
    """The process that runs each group of each part, so that the busiest has as little to do as possible.

    Each process has a range of the groups in one piece: then few parts are run by two processes, which both have to run
    the parent.

    Args:
        parts: The cost of running the parent on the rows of a part, and of each of its groups.
        processes: Number of processes.
    """

    def with_at_most(limit: float) -> list[list[int]]:
        process, load, result = 0, 0.0, []
        for of_parent, of_groups in parts:
            owners: list[int] = []
            for cost in of_groups:
                needed = cost + (0.0 if owners and owners[-1] == process else of_parent)
                if load and load + needed > limit:
                    process, load, needed = process + 1, 0.0, cost + of_parent
                load += needed
                owners.append(process)
            result.append(owners)
        return result

    most = sum(of_parent + sum(of_groups) for of_parent, of_groups in parts)
    least = 0.0
    for _ in range(_HALVINGS):
        limit = (least + most) / 2
        last = max((max(owners) for owners in with_at_most(limit) if owners), default=0)
        least, most = (limit, most) if last >= processes else (least, limit)
    return with_at_most(most)


def exact_scores(task: ScoringTask) -> list[Score]:
    """Run all alternatives exactly, on more and more rows until the scores have the recipe's ``row_precision``."""
    runs, num_rows, precision = ExactRuns(task), task.num_rows, task.recipe.row_precision
    ends = _doubling_to(num_rows) if precision else [num_rows]
    done, until = 0, num_rows
    for end in ends:
        task.work.forget()
        task.progress.begin("scored", until)
        task.progress.add_resumed(done * len(task.pending))
        wanted, before, planned = ({a.identity: rows for a in task.pending} for rows in (end, done, until))
        runs.run(wanted, before, planned)
        done = end
        if precision and done < num_rows:
            increases = _loss_increases(task, row_order(num_rows)[:done])
            error = ranks.from_first(partial(relative_error, increases, num_rows))
            if error <= precision:
                break
            # The error falls with the square root of 1/n - 1/N.
            needed = 1 / (1 / num_rows + (precision / error) ** 2 * (1 / done - 1 / num_rows))
            until = next(e for e in ends if e >= min(needed, num_rows) and e > done)
    rows = sorted(row_order(num_rows)[:done])
    return [_exact_score(a, task.results, rows) for a in task.library.alternatives]


def _loss_increases(task: ScoringTask, rows: Sequence[int]) -> torch.Tensor:
    """``[A, n]``: how much worse than the parent the alternatives are on each row."""
    known, objective = task.results.known, task.recipe.objective
    values = [[known[a.identity, row][objective] for row in rows] for a in task.pending]
    of_parent = [PARENT_VALUES.get(objective, known[PARENT, row][objective]) for row in rows]
    difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(of_parent, dtype=torch.float64)
    return -difference if objective.endswith("agreement") else difference


def _doubling_to(num_rows: int) -> list[int]:
    """Numbers of rows after which the error is checked."""
    ends = [_LEAST_ROWS]
    while ends[-1] < num_rows:
        ends.append(2 * ends[-1])
    return [*ends[:-1], num_rows]


def _exact_score(alternative: Alternative, results: Journal, rows: Sequence[int]) -> Score:
    if alternative.kind == PARENT:  # by definition, not by rounding
        values = {
            metric: [PARENT_VALUES.get(metric, results.known[PARENT, row][metric]) for row in rows]
            for metric in METRICS
        }
    else:
        known = [results.known[alternative.identity, row] for row in rows]
        values = {metric: [of_row[metric] for of_row in known] for metric in METRICS}
    return Score(alternative, values, len(rows))
