"""The report's data: what is in ``report.json``. docs/report.md describes every field.

Losses are in nats per token, memory in bytes, times in seconds, shares between 0 and 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from layersmith.records import parse, to_data
from layersmith.tables import Shown, Table

SCHEMA = 1
THIS_CHILD = "this child"
Number = int | float
# Name of a cost, e.g. ``parameters``, to its amount.
Costs = dict[str, Number]


@dataclass(frozen=True)
class MetricRow:
    """One metric of parent and child; ``difference`` is paired by row, or by item for a metric of a ``task``."""

    metric: str
    label: str
    parent: float | None
    child: float
    child_standard_error: float | None
    difference: float | None
    difference_standard_error: float | None
    lower_is_better: bool
    parent_standard_error: float | None = None
    task: str | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """The row of a table: label, parent, child, and difference, each number with its standard error."""
        parent = "" if self.parent is None else f"{self.parent:.4f}"
        difference = self.difference
        change = "" if difference is None else _with_noise(difference, self.difference_standard_error, "+")
        return self.label, parent, _with_noise(self.child, self.child_standard_error), change


def _with_noise(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"


@dataclass(frozen=True)
class Sample:
    """What parent and child write after a prompt."""

    prompt: str
    parent: str
    child: str


@dataclass(frozen=True)
class Evaluation(Shown):
    """The comparison of parent and child; ``samples`` is empty if no text was generated."""

    tokens: int
    sequences: int
    rows: tuple[MetricRow, ...]
    samples: tuple[Sample, ...] = ()

    def row(self, metric: str) -> MetricRow | None:
        """The row of a metric; None if it was not measured."""
        return next((row for row in self.rows if row.metric == metric), None)

    def tables(self) -> list[Table]:
        """The metrics with their standard errors."""
        title = f"evaluated on {self.tokens:,} tokens" if self.tokens else "evaluated on tasks"
        return [Table(title, ("", "parent", "model", "difference"), [row.cells() for row in self.rows], True)]


@dataclass(frozen=True)
class Subblock:
    """The alternative that was chosen for an attention or FFN; ``parent`` and ``child`` are its shapes in words."""

    parent: str
    child: str
    kind: str
    method: str
    kept: float
    parameters: int
    parent_parameters: int
    costs: Costs
    parent_costs: Costs
    score: float | None


@dataclass(frozen=True)
class Layer:
    """What became of one layer."""

    layer: int
    attention: Subblock
    ffn: Subblock


@dataclass(frozen=True)
class Cell:
    """The score of one alternative; ``exact_rows`` of ``rows`` were run exactly, the rest is estimated."""

    value: float | None
    standard_error: float | None
    loss: float | None
    chosen: bool
    metrics: dict[str, float | None]
    exact_rows: int
    rows: int
    costs: Costs


@dataclass(frozen=True)
class Scores:
    """Scores of all alternatives: a row per layer, a column per name of an alternative."""

    objective: str
    unit: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell | None, ...], ...]

    @property
    def is_empty(self) -> bool:
        return not any(cell for row in self.rows for cell in row)


@dataclass(frozen=True)
class ImportancePoint:
    """The share of the output's energy that is ``lost`` when this many units are ``left``."""

    left: Number
    lost: float


@dataclass(frozen=True)
class ImportanceCurve:
    """Loss of a subblock's output as units (channels, heads, experts) are removed."""

    layer: int
    subblock: str
    of: str
    name: str
    units: Number
    points: tuple[ImportancePoint, ...]

    def at(self, share: float) -> float:
        """The loss where this share of the units is left, interpolated linearly."""
        points = sorted((p.left / self.units, p.lost) for p in self.points)
        for (a, lost_a), (b, lost_b) in itertools.pairwise(points):
            if a <= share <= b:
                return lost_a + (lost_b - lost_a) * (share - a) / ((b - a) or 1.0)
        return points[-1][1]


@dataclass(frozen=True)
class CheckedScore:
    """A second-order estimate before correction, and the exact score on the same rows."""

    layer: int
    subblock: str
    alternative: str
    estimated: float
    exact: float
    rows: int


@dataclass(frozen=True)
class CheckedSum:
    """The sum of a model's scores, and its measured loss."""

    what: str
    predicted: float
    measured: float | None
    error: float | None


@dataclass(frozen=True)
class CheckedTime:
    """A model's time relative to the parent's: by the sum of its parts, and measured."""

    what: str
    phase: str
    fraction: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Checks:
    """Predictions against measurements."""

    scores: tuple[CheckedScore, ...] = ()
    sums: tuple[CheckedSum, ...] = ()
    times: tuple[CheckedTime, ...] = ()


@dataclass(frozen=True)
class Clock:
    """Times of parent and child, and the workload.

    Attributes:
        predicted: Whether they were not measured, but asked of AIConfigurator for both as whole models.
        noise: For parent and child: standard errors and spread of the repeats, and whether the machine was busy.
    """

    parent: Costs
    child: Costs
    batch: int
    prompt: int
    generated: int
    device: str
    noise: dict[str, Noise] = field(default_factory=dict)
    predicted: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether repeats of one time disagree so much that no speed-up can be read from these times."""
        return any(noise.busy for noise in self.noise.values())


@dataclass(frozen=True)
class Noise:
    """Noise of a model's times: standard errors in seconds, and the spread of repeats as a share of their median."""

    error: Costs
    spread: Costs
    busy: bool


@dataclass(frozen=True)
class Refined:
    """What refinement tried and gained, in loss on the scoring rows."""

    tried: int
    passes: float
    objective: str
    rows: int
    plain: float
    choice: float
    error: float | None
    difference: float
    difference_standard_error: float | None


@dataclass(frozen=True)
class Search:
    """The sum of scores of the solution, and how good that is known to be."""

    score: float
    proven_optimal: bool
    bound: float | None
    refined: Refined | None


@dataclass(frozen=True)
class Measured:
    """The measured loss of a whole model."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class FrontierPoint:
    """The best model for one budget."""

    cost: Number
    fraction: float
    score: float | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class Series:
    """One baseline's points."""

    name: str
    points: tuple[FrontierPoint, ...]


@dataclass(frozen=True)
class BudgetLimit:
    """The run's limit of the frontier's cost."""

    limit: Number | None


@dataclass(frozen=True)
class Frontier:
    """The predicted, and in part measured, loss for every budget."""

    cost: str
    objective: str
    points: tuple[FrontierPoint, ...]
    budget: BudgetLimit
    baselines: tuple[Series, ...] = ()

    def series(self) -> tuple[Series, ...]:
        """The search's points and those of the baselines."""
        return (Series("search", self.points), *self.baselines)


@dataclass(frozen=True)
class CurvePoint:
    """The loss after a number of training tokens."""

    tokens: Number
    loss: float | None = None


@dataclass(frozen=True)
class Curve:
    """A curve of global distillation."""

    name: str
    x: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Trained:
    """What local distillation did to one alternative, or to a layer (``subblock`` is ``block``) trained jointly."""

    of: str
    layer: int
    subblock: str
    before: float
    after: float
    tokens: int
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Distillation:
    """Training of the child and of alternatives; ``refitted`` counts alternatives refitted in closed form only."""

    curves: tuple[Curve, ...]
    alternatives: tuple[Trained, ...]
    refitted: int = 0


@dataclass(frozen=True)
class StageTime:
    """Wall time of a stage over all attempts."""

    stage: str
    seconds: float
    interruptions: int


@dataclass(frozen=True)
class Round:
    """What one of several rounds did.

    Attributes:
        parameters: Parameters of its child.
        changed: Subblocks in which its child differs from its parent.
        tokens: Tokens of global distillation.
        kl: KL divergence of its child from the first parent on the evaluation rows; after it ``kl_distilled``.
    """

    number: int
    parameters: int
    changed: int
    tokens: int
    kl: float | None
    kl_distilled: float | None


@dataclass(frozen=True)
class HiddenSizeRow:
    """What a hidden size would cost, where there was a choice.

    Attributes:
        size: The hidden size.
        narrowing: Loss of the parent with that hidden size.
        scores: Sum of the scores of its best solution; None if it was not searched.
        total: Both together.
        parameters: Parameters of that solution.
        problem: Why it was not searched.
        taken: Whether the child has it.
    """

    size: int
    narrowing: float
    scores: float | None
    total: float | None
    parameters: int | None
    problem: str
    taken: bool


@dataclass(frozen=True)
class BudgetRow:
    """One limit, and how much of it the child uses."""

    label: str
    limit: Number
    unit: str
    used: Number
    parent: Number


@dataclass(frozen=True)
class Model:
    """Name and costs of parent or child."""

    name: str
    costs: Costs


@dataclass(frozen=True)
class Report:
    """All data of a report."""

    title: str
    parent: Model
    child: Model
    batch: int
    context: int
    budget: tuple[BudgetRow, ...]
    evaluation: Evaluation
    layers: tuple[Layer, ...]
    scores: Scores
    importance: tuple[ImportanceCurve, ...]
    checks: Checks
    times: Clock | None
    search: Search
    frontier: Frontier | None
    distillation: Distillation | None
    recipe: dict[str, Any]
    environment: dict[str, Any]
    timings: tuple[StageTime, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    samples: tuple[Sample, ...] = ()
    rounds: tuple[Round, ...] = ()
    hidden_sizes: tuple[HiddenSizeRow, ...] = ()
    schema: int = field(default=SCHEMA)

    def to_json(self) -> dict[str, Any]:
        """The data of ``report.json``: costs are beside the name, and samples at the top."""
        data: dict[str, Any] = to_data(self)
        for model in ("parent", "child"):
            data[model] = {"name": data[model]["name"], **data[model]["costs"]}
        data["evaluation"].pop("samples")
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_json`."""
        models = {}
        for model in ("parent", "child"):
            costs = {name: value for name, value in data[model].items() if name != "name"}
            models[model] = {"name": data[model]["name"], "costs": costs}
        return parse(Report, data | models, "report.json: ")
