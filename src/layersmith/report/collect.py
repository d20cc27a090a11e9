"""Collects the data of a report from the results of a run's stages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layersmith.library.alternative import Alternative, in_words
from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.report.data import (
    THIS_CHILD,
    BudgetLimit,
    BudgetRow,
    Cell,
    CheckedScore,
    CheckedSum,
    CheckedTime,
    Checks,
    Evaluation,
    ImportanceCurve,
    ImportancePoint,
    Layer,
    Model,
    Report,
    Scores,
    Search,
    Subblock,
)
from layersmith.report.optional import Optional
from layersmith.report.words import cost_unit, metric_unit
from layersmith.run.header import first_parent
from layersmith.scoring.formats import FormatScores, foretold
from layersmith.scoring.metrics import METRICS
from layersmith.scoring.score import Score, losses
from layersmith.search.solution import Solution
from layersmith.units import format_cost

# Part of a curve's name after the layer: the subblock, and what is removed there.
_PARTS = {
    "ffn": ("ffn", "FFN channels"),
    "shared": ("ffn", "channels of shared experts"),
    "experts": ("ffn", "experts"),
    "attention": ("attention", "KV heads"),
    "mixer": ("attention", "groups of mixer heads"),
}

# Warnings that end so do not make the results less valid, and are shown as notes.
_NO_LOSS = "were left out."


@dataclass(frozen=True)
class Results:
    """What the stages of a finished run give.

    Attributes:
        header: The run's ``run.json``: parent, versions, data.
        costs: Key of an alternative to its costs.
        evaluation: The child's evaluation.
        optional: Results that not every run has.
        of_formats: Scores of number formats, if the run offers any.
    """

    header: dict[str, Any]
    library: Library
    scores: list[Score]
    solution: Solution
    costs: Mapping[str, Mapping[str, int]]
    evaluation: Evaluation
    recipe: Recipe
    optional: Optional
    of_formats: FormatScores = field(default_factory=dict)


def collect(results: Results) -> Report:
    """All data of a report."""
    solution, optional, runtime = results.solution, results.optional, results.library.parent.runtime
    before, after, limits = _measured_costs(solution, optional)
    frontier = optional.frontier
    if optional.clock and frontier is not None and frontier.cost in optional.clock.parent and frontier.cost in limits:
        frontier = dataclasses.replace(frontier, budget=BudgetLimit(limits[frontier.cost]))
    optional = dataclasses.replace(optional, frontier=frontier)
    name, warnings = parent_name(results.header), results.header["data"].get("warnings", ())
    was, now = format_cost("parameters", before["parameters"]), format_cost("parameters", after["parameters"])
    return Report(
        title=f"{name}: {was} to {now} parameters",
        parent=Model(name, before),
        child=Model(f"{name}, child", after),
        batch=solution.workload.batch,
        context=solution.workload.context,
        budget=tuple(
            BudgetRow(cost, limit, cost_unit(cost), used=after[cost], parent=before[cost])
            for cost, limit in limits.items()
        ),
        evaluation=results.evaluation,
        layers=_layers(results),
        scores=_score_table(results),
        importance=importance(results.library),
        checks=Checks(
            scores=_checked_scores(results.scores),
            sums=_checked_sums(results, optional),
            times=_checked_times(solution, optional),
        ),
        times=optional.clock,
        search=Search(solution.score, solution.proven_optimal, solution.bound, optional.refined),
        frontier=frontier,
        distillation=optional.distillation,
        samples=results.evaluation.samples,
        recipe=results.recipe.to_dict(),
        environment=results.header["versions"] | {"device": str(runtime.device.type), "dtype": str(runtime.dtype)},
        timings=optional.timings,
        warnings=tuple(w for w in warnings if not w.endswith(_NO_LOSS)),
        notes=(*(w for w in warnings if w.endswith(_NO_LOSS)), *results.library.notes),
        rounds=optional.rounds,
        hidden_sizes=optional.hidden_sizes,
    )


def _measured_costs(solution: Solution, optional: Optional) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Costs of parent and child, and the limits; times are the measured ones where there are any."""
    before, after, clock = solution.parent_costs, solution.costs, optional.clock
    if clock is None:
        return before, after, solution.limits
    before, after = before | clock.parent, after | clock.child
    # A limit that is a fraction of a time refers to the parent's time as measured together with the child's.
    timed = {cost: limit for cost, limit in solution.asked.resolve(before).items() if cost in clock.parent}
    return before, after, solution.limits | timed


def parent_name(header: dict[str, Any]) -> str:
    """The last part of the first parent's path or hub name."""
    return first_parent(header).rstrip("/").rsplit("/", 1)[-1]


def described(library: Library, alternative: Alternative) -> tuple[str, str]:
    """The shapes in words of a subblock of the parent and of its alternative.

    A config may leave the number of query heads to the model's config. It is named if the alternative changes it.
    """
    block = library.parent.blocks[alternative.layer]
    was: Any = Alternative(alternative.layer, alternative.subblock, "parent").subblock_config(block)
    now: Any = alternative.subblock_config(block)
    heads = library.axes[alternative.layer].kv
    unsaid = alternative.subblock == "attention" and was.num_attention_heads is None
    if unsaid and heads is not None and now.num_attention_heads is not None:
        was = dataclasses.replace(was, num_attention_heads=heads.num_heads * heads.together)
    words = in_words(now)
    return in_words(was), f"{words}, {alternative.format}" if alternative.format else words


def _layers(results: Results) -> tuple[Layer, ...]:
    loss = losses(results.scores, results.recipe.scoring.objective)
    loss |= {a.key: v for a, v in foretold(results.library.alternatives, loss, results.of_formats).items()}
    layers: list[dict[str, Subblock]] = [{} for _ in results.library.parent.blocks]
    for alternative in results.solution.alternatives:
        parent = Alternative(alternative.layer, alternative.subblock, "parent")
        costs, parent_costs = dict(results.costs[alternative.key]), dict(results.costs[parent.key])
        left, whole = costs["parameters"], parent_costs["parameters"]
        was, now = described(results.library, alternative)
        layers[alternative.layer][alternative.subblock] = Subblock(
            parent=was,
            child=now,
            kind="quantized" if alternative.shape.is_parent and not alternative.is_parent else alternative.kind,
            method=alternative.method,
            kept=left / whole if whole else 1.0,
            parameters=left,
            parent_parameters=whole,
            costs=dict(costs),
            parent_costs=dict(parent_costs),
            score=loss[alternative.key],
        )
    return tuple(Layer(i, **subblocks) for i, subblocks in enumerate(layers))


def _score_table(results: Results) -> Scores:
    scores, objective = results.scores, results.recipe.scoring.objective
    chosen, loss = {a.shape.key for a in results.solution.alternatives}, losses(scores, objective)
    names = list(dict.fromkeys(s.alternative.name for s in scores if not s.alternative.is_parent))
    columns = sorted(names, key=lambda name: not name.startswith("attention"))
    by_place = {(s.alternative.layer, s.alternative.name): s for s in scores}

    def cell(score: Score | None) -> Cell | None:
        if score is None:
            return None
        return Cell(
            value=score.mean(objective),
            standard_error=score.standard_error(objective),
            loss=loss[score.alternative.key],
            chosen=score.alternative.key in chosen,
            metrics={metric: score.mean(metric) for metric in METRICS if metric in score.rows},
            exact_rows=score.exact_rows,
            rows=len(score.rows[objective]),
            costs=dict(results.costs[score.alternative.key]),
        )

    rows = (
        tuple(cell(by_place.get((layer, column))) for column in columns)
        for layer in sorted({s.alternative.layer for s in scores})
    )
    return Scores(objective, metric_unit(objective), tuple(columns), tuple(rows))


def importance(library: Library) -> tuple[ImportanceCurve, ...]:
    """A curve for each ranked part of each layer."""
    curves = []
    for name, points in library.importance.items():
        match = re.fullmatch(r"(\d+)\.([a-z]+)(?:\.\d+)?", name)
        if match is None or match[2] not in _PARTS or len(points) < 3:
            continue
        subblock, removed = _PARTS[match[2]]
        curves.append(
            ImportanceCurve(
                layer=int(match[1]),
                subblock=subblock,
                of=removed,
                name=name,
                units=points[0][0],
                points=tuple(ImportancePoint(left, lost) for left, lost in points),
            )
        )
    return tuple(sorted(curves, key=lambda c: (list(_PARTS).index(c.name.split(".")[1]), c.layer, c.name)))


def _checked_scores(scores: list[Score]) -> tuple[CheckedScore, ...]:
    """Second-order estimates before correction, against exact runs on the same rows."""
    return tuple(
        CheckedScore(
            layer=s.alternative.layer,
            subblock=s.alternative.subblock,
            alternative=s.alternative.name,
            estimated=s.checked[0],
            exact=s.checked[1],
            rows=s.exact_rows,
        )
        for s in scores
        if s.checked is not None
    )


def _checked_sums(results: Results, optional: Optional) -> tuple[CheckedSum, ...]:
    """Sums of scores against measured losses: of this child, and of models on the frontier that were evaluated."""
    objective, frontier = results.recipe.scoring.objective, optional.frontier
    checked = []
    measured = measured_loss(optional.as_cut or results.evaluation, objective)
    # The scores of a later round are of its own parent, and its child was compared with the first.
    if measured is not None and not optional.rounds:
        checked.append(CheckedSum(THIS_CHILD, optional.narrowing + results.solution.score, *measured))
    if frontier is not None and frontier.objective == objective:
        checked += [
            CheckedSum("frontier" if series.name == "search" else series.name, p.score, p.measured.mean,
                       p.measured.error)
            for series in frontier.series()
            for p in series.points
            if p.measured and p.score is not None
        ]  # fmt: skip
    return tuple(checked)


def _checked_times(solution: Solution, optional: Optional) -> tuple[CheckedTime, ...]:
    """Times of whole children relative to the parent's: by the sum of their parts, and measured."""
    checked, known, clock = [], optional.time_checks, optional.clock
    phases = ("prefill", "decode")
    for check in known.checks if known is not None else ():
        for phase in phases:
            predicted = getattr(check.parts, phase) / getattr(known.parent, phase) if known else 0.0
            measured = getattr(check.whole, phase) / getattr(check.parent, phase)
            checked.append(CheckedTime(check.what, phase, check.fraction, predicted, measured))
    if clock is not None and "prefill_seconds" in solution.costs:
        fraction = solution.costs["parameters"] / solution.parent_costs["parameters"]
        for phase in phases:
            cost = f"{phase}_seconds"
            predicted = solution.costs[cost] / solution.parent_costs[cost]
            checked.append(CheckedTime(THIS_CHILD, phase, fraction, predicted, clock.child[cost] / clock.parent[cost]))
    return tuple(checked)


def measured_loss(evaluation: Evaluation, objective: str) -> tuple[float | None, float | None] | None:
    """The child's loss above its parent's under an objective, and its standard error; None if it was not measured."""
    row = evaluation.row("loss" if objective == "lm_loss" else objective)
    if row is None:
        return None
    if objective == "lm_loss":
        return row.difference, row.difference_standard_error
    return (1 - row.child if objective.endswith("agreement") else row.child), row.child_standard_error
