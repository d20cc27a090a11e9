"""What ``--json`` writes: one object for each command. ``docs/output.schema.json`` is generated from these classes.

Losses are in nats per token, memory in bytes, times in seconds, shares between 0 and 1. A number that is not finite is
null. Fields may be added under the same value of ``schema``; it increases when one is removed or changes its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from layersmith.costs.times import Times, Timing
from layersmith.export.run import Exported
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.records import parse
from layersmith.report.collect import described
from layersmith.report.data import Clock, Evaluation, Frontier, Number, Report
from layersmith.run.artifacts import read_json
from layersmith.search.solution import Solution
from layersmith.stages.distill_finished import Distilled
from layersmith.stages.dry_run import Plan
from layersmith.stages.exported_recipe import ExportedRecipe
from layersmith.stages.inspect import Inspection
from layersmith.stages.nested import NestedChildren
from layersmith.stages.reopen import Searched
from layersmith.stages.verify import Verification
from layersmith.stages.vocabulary import Trimmed


@dataclass(frozen=True)
class Shape:
    """A subblock of the parent and of the child in words; ``child`` is the parent's shape if nothing changed."""

    parent: str
    child: str
    is_changed: bool


@dataclass(frozen=True)
class LayerShapes:
    """What becomes of one layer."""

    layer: int
    attention: Shape
    ffn: Shape


@dataclass(frozen=True)
class CostPair:
    """A cost of parent and child, and the upper limit on the child's if the budget has one."""

    parent: Number
    child: Number
    limit: Number | None


@dataclass(frozen=True)
class SolutionOutput:
    """One alternative for each subblock, and the costs of the whole child for a workload."""

    layers: tuple[LayerShapes, ...]
    costs: dict[str, CostPair]
    batch: int
    context: int
    generated: int
    score: float
    proven_optimal: bool
    bound: float | None


@dataclass(frozen=True)
class Compressed:
    """``compress`` and ``demo``; ``times`` is null if parent and child were not timed.

    ``repository`` is the one that ``--push-to-hub`` uploaded the child to.
    """

    run: Path
    child: Path
    report: Path
    solution: SolutionOutput
    evaluation: Evaluation
    times: Clock | None
    repository: str | None


@dataclass(frozen=True)
class Stopped:
    """``compress --until``: the last stage that is finished."""

    run: Path
    stopped_after: str


@dataclass(frozen=True)
class Verified:
    """``inspect --verify``; the exit code is 1 if it failed."""

    failed: bool
    verification: Verification


@dataclass(frozen=True)
class SearchOutput:
    """``search``: solutions, best first, and the folder of the first if ``--out`` names one."""

    solutions: tuple[SolutionOutput, ...]
    child: Path | None


@dataclass(frozen=True)
class FrontierOutput:
    """``search --frontier``: the frontier and the file that also has its solutions."""

    file: Path
    frontier: Frontier


@dataclass(frozen=True)
class AlternativeTime:
    """Time of one alternative for a whole batch."""

    layer: int
    subblock: str
    alternative: str
    time: Timing


@dataclass(frozen=True)
class TimesOutput:
    """``costs``: times of all alternatives, of what is outside the layers, and of the whole parent."""

    source: str
    device: str
    batch: int
    prompt: int
    generated: int
    alternatives: tuple[AlternativeTime, ...]
    outside_layers: Timing
    parent: Timing
    csv: Path | None


@dataclass(frozen=True)
class Finalist:
    """A solution that was distilled briefly: its sum of scores, its loss then, and whether it was chosen."""

    number: int
    score: float
    kl: float
    won: bool


@dataclass(frozen=True)
class DistilledOutput:
    """``distill``: the distilled child, evaluations of the child before and after, and the solutions tried first."""

    child: Path
    before: Evaluation
    after: Evaluation
    finalists: tuple[Finalist, ...]


@dataclass(frozen=True)
class ReportOutput:
    """``report``: the page and its data."""

    report: Path
    data: Path


@dataclass(frozen=True)
class PushOutput:
    """``push``: the repository on the Hub."""

    repository: str


@dataclass(frozen=True)
class ErrorOutput:
    """Why a command failed: the kind of the error, one or more sentences, and the exit code."""

    kind: str
    message: str
    exit_code: int


# What the key ``result`` holds for each command.
RESULTS: dict[str, Any] = {
    "compress": Compressed | Plan | Stopped,
    "inspect": Inspection | Verified,
    "search": SearchOutput | FrontierOutput | NestedChildren,
    "costs": TimesOutput,
    "distill": DistilledOutput,
    "evaluate": Evaluation,
    "report": ReportOutput,
    "export": Exported | ExportedRecipe,
    "push": PushOutput,
    "vocabulary": Trimmed,
    "demo": Compressed,
}


def to_json(command: str, result: Any) -> str:
    """The JSON text of a command's result; null for a number that is not finite."""
    return TypeAdapter(RESULTS[command]).dump_json(result).decode()


# ---------------------------------------------------------------------------------------------- from results


def compressed(result: Any, repository: str | None = None) -> Compressed:
    """From what ``layersmith.compress`` returns."""
    report = Report.from_json(read_json(result.run / "report.json"))
    layers = tuple(
        LayerShapes(row.layer, *(Shape(s.parent, s.child, s.kind != "parent") for s in (row.attention, row.ffn)))
        for row in report.layers
    )
    return Compressed(
        run=result.run,
        child=result.child,
        report=result.report,
        solution=_solution(result.solution, layers),
        evaluation=evaluation(result.evaluation),
        times=report.times,
        repository=repository,
    )


def solution(library: Library, found: Solution) -> SolutionOutput:
    """From a solution of the search."""
    layers: list[dict[str, Shape]] = [{} for _ in library.parent.blocks]
    for a in found.alternatives:
        layers[a.layer][a.subblock] = Shape(*described(library, a), not a.is_parent)
    return _solution(found, tuple(LayerShapes(i, row["attention"], row["ffn"]) for i, row in enumerate(layers)))


def searched(made: Searched) -> SearchOutput:
    """From the solutions of a search."""
    return SearchOutput(tuple(solution(made.library, each) for each in made.solutions), made.child)


def _solution(found: Solution, layers: tuple[LayerShapes, ...]) -> SolutionOutput:
    costs = {n: CostPair(found.parent_costs[n], cost, found.limits.get(n)) for n, cost in found.costs.items()}
    load = found.workload
    return SolutionOutput(
        layers=layers,
        costs=costs,
        batch=load.batch,
        context=load.context,
        generated=load.generated,
        score=found.score,
        proven_optimal=found.proven_optimal,
        bound=found.bound,
    )


def frontier(file: Path) -> FrontierOutput:
    """From the file of a frontier."""
    return FrontierOutput(file, parse(Frontier, read_json(file), f"{file}: "))


def evaluation(table: dict[str, Any]) -> Evaluation:
    """From the table of an evaluation."""
    return parse(Evaluation, table, "evaluation: ")


def distilled(made: Distilled) -> DistilledOutput:
    """From the result of a global distillation."""
    finalists = tuple(parse(Finalist, row, "finalists: ") for row in made.finalists)
    return DistilledOutput(made.child, evaluation(made.before), evaluation(made.after), finalists)


def times(measured: Times, alternatives: Sequence[Alternative], csv: Path | None) -> TimesOutput:
    """From the times of all alternatives."""
    load = measured.workload
    return TimesOutput(
        source=measured.source,
        device=measured.device,
        batch=load.batch,
        prompt=load.prompt,
        generated=load.generated,
        alternatives=tuple(AlternativeTime(a.layer, a.subblock, a.name, measured.by_key[a.key]) for a in alternatives),
        outside_layers=measured.fixed,
        parent=measured.parent(alternatives),
        csv=csv,
    )
