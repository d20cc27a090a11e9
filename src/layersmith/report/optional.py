"""What some runs have and others do not: the frontier, refinement, distillation, measured times.

Each is read from the file that its stage writes. Where the file is missing, the report omits the section.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import TypedDict

from layersmith.costs.times import Check, Timing, kept_in
from layersmith.library.stored_weights import Record
from layersmith.records import parse
from layersmith.report.data import (
    Clock,
    Curve,
    Distillation,
    Evaluation,
    Frontier,
    HiddenSizeRow,
    Refined,
    Round,
    StageTime,
    Trained,
)
from layersmith.run.artifacts import read_json
from layersmith.run.folder import ASKED_FRONTIER, ROUNDS, Run
from layersmith.search.refine import RefinedData
from layersmith.search.solution import Solution

T = TypeVar("T")


class _Log(TypedDict):
    """What ``log.json`` of a global distillation holds."""

    name: str
    x: str
    points: list[Any]


@dataclass(frozen=True)
class TimeChecks:
    """Children that were timed whole to correct sums of parts, and the parent's time by its parts."""

    parent: Timing
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Optional:
    """The results that not every run has.

    Attributes:
        as_cut: The child's evaluation before global distillation, which is what scores predict.
    """

    as_cut: Evaluation | None = None
    time_checks: TimeChecks | None = None
    clock: Clock | None = None
    frontier: Frontier | None = None
    distillation: Distillation | None = None
    refined: Refined | None = None
    timings: tuple[StageTime, ...] = ()
    rounds: tuple[Round, ...] = ()
    hidden_sizes: tuple[HiddenSizeRow, ...] = ()

    @property
    def narrowing(self) -> float:
        """Loss of the parent with the hidden size that was taken."""
        return next((row.narrowing for row in self.hidden_sizes if row.taken), 0.0)


def read_optional(run: Run) -> Optional:
    """All of these results of a run."""
    return Optional(
        as_cut=_read(Evaluation, run.folder / "evaluation" / "evaluation.json"),
        time_checks=read_time_checks(run.folder),
        clock=read_clock(run.folder),
        frontier=read_frontier(run.folder),
        distillation=read_distillation(run.folder),
        refined=read_refined(run.folder / "refine" / "refine.json"),
        timings=tuple(parse(StageTime, timing, "log.jsonl: ") for timing in run.log.times()),
        rounds=read_rounds(run),
        hidden_sizes=read_hidden_sizes(run.folder),
    )


def read_hidden_sizes(folder: Path) -> tuple[HiddenSizeRow, ...]:
    """What each hidden size would cost; empty for a run without a choice."""
    path = folder / "hidden_size" / "hidden_size.json"
    return tuple(parse(HiddenSizeRow, row, f"{path}: ") for row in read_json(path)) if path.is_file() else ()


def read_rounds(run: Run) -> tuple[Round, ...]:
    """What each of several rounds did, this run as the last; empty for a run without rounds."""
    count = run.header()["recipe"].get("rounds", {}).get("count", 1)
    if count == 1 or not (run.folder / ROUNDS).is_dir():
        return ()
    folders = [*(run.folder / ROUNDS / f"{number}" for number in range(1, count)), run.folder]
    return tuple(_round(number, folder) for number, folder in enumerate(folders, 1))


def _round(number: int, folder: Path) -> Round:
    solution = Solution.from_dict(read_json(folder / "solution" / "solution.json"))
    compared = folder / "distillation" / "evaluation" / "evaluation.json"
    after = parse(Evaluation, read_json(compared)["after"], f"{compared}: ") if compared.is_file() else None
    header = Run(folder).header()
    return Round(
        number=number,
        parameters=solution.costs["parameters"],
        changed=sum(not a.is_parent for a in solution.alternatives),
        tokens=header["recipe"]["distillation"]["tokens"] if after is not None else 0,
        kl=_kl(_read(Evaluation, folder / "evaluation" / "evaluation.json")),
        kl_distilled=_kl(after),
    )


def _kl(evaluation: Evaluation | None) -> float | None:
    row = None if evaluation is None else evaluation.row("kl_divergence")
    return None if row is None else row.child


def _read(cls: type[T], path: Path) -> T | None:
    return parse(cls, read_json(path), f"{path}: ") if path.is_file() else None


def read_refined(path: Path) -> Refined | None:
    """What refinement tried and gained."""
    if not path.is_file():
        return None
    data = read_json(path, RefinedData)
    return parse(Refined, {"tried": data["tried"], "passes": data["passes"], **data["measured"]}, f"{path}: ")


def read_frontier(folder: Path) -> Frontier | None:
    """The run's frontier without its solutions, with the losses that ``search --frontier --measure`` measured of it."""
    of_run, asked = (_read(Frontier, folder / stage / "frontier.json") for stage in ("frontier", ASKED_FRONTIER))
    if of_run and asked and asked.objective == of_run.objective and _sums(asked) == _sums(of_run):
        return replace(of_run, points=asked.points, baselines=asked.baselines)
    return of_run


def _sums(frontier: Frontier) -> list[tuple[Any, Any]]:
    return [(point.cost, point.score) for point in frontier.points]


def read_time_checks(folder: Path) -> TimeChecks | None:
    """Checks of the times of alternatives; None if the budget has no latency limit."""
    data = kept_in(folder)
    if data is None:
        return None
    checks = tuple(parse(Check, entry, "times.json: checks.") for entry in data["checks"])
    return TimeChecks(parse(Timing, data["parent"], "times.json: parent."), checks)


def read_clock(folder: Path) -> Clock | None:
    """Measured times of parent and child; None if they were not timed."""
    return _read(Clock, folder / "clock" / "times.json")


def read_distillation(folder: Path) -> Distillation | None:
    """Curves of global distillation, and what local distillation gained; None if there was neither."""
    curves = []
    for file in sorted((folder / "distillation").rglob("log.json")):
        log = read_json(file, _Log)
        for name, points in ((log["name"], log["points"]), (f"{log['name']}, held out", log.get("validation", ()))):
            if points:
                curves.append(parse(Curve, {"name": name, "x": log["x"], "points": points}, "log.json: "))
    path, trained = folder / "library" / "distilled.json", trained_alternatives(folder)
    records: list[dict[str, Any]] = read_json(path, list[Record]) if path.is_file() else []
    refitted = sum(bool(record.get("weights")) and not record["tokens"] for record in records)
    return Distillation(tuple(curves), trained, refitted) if curves or trained or refitted else None


def trained_alternatives(folder: Path) -> tuple[Trained, ...]:
    """Alternatives, and layers trained jointly, with their error as they were cut, after training and during it."""
    trained: list[Trained] = []
    for stage in ("library", "pairs"):
        path = folder / stage / "distilled.json"
        records: list[dict[str, Any]] = read_json(path, list[Record]) if path.is_file() else []
        for record in records:
            cut = record["before"] if record.get("pruned") is None else record["pruned"]
            if record["tokens"] and cut is not None and record["after"] is not None:
                trained.append(parse(Trained, record | {"before": cut}, f"{path}: "))
    return tuple(trained)
