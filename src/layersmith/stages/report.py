"""The report, the model card, and the result that `compress` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersmith.library.library import Library
from layersmith.recipe import Recipe
from layersmith.report.card import complete_card
from layersmith.report.collect import collect
from layersmith.report.html import render
from layersmith.report.optional import read_optional
from layersmith.run import ranks
from layersmith.run.artifacts import write_json, write_text
from layersmith.run.folder import Run
from layersmith.scoring.score import Score
from layersmith.search.problem import Solution
from layersmith.units import format_count


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        run: its folder.
        child: the child's folder.
        solution: the solution, with the costs of parent and child.
        evaluation: the evaluation's table and rows, as in ``evaluation/evaluation.json``.
        report: the HTML page.
    """

    run: Path
    child: Path
    solution: Solution
    evaluation: dict[str, Any]
    report: Path

    def __str__(self) -> str:
        before, after = self.solution.parent_costs["parameters"], self.solution.costs["parameters"]
        loss, kl = self.metric("loss"), self.metric("kl_divergence")
        return (
            f"{format_count(before)} => {format_count(after)} parameters ({after / before:.2f}x), "
            f"loss {loss['parent']:.4f} => {loss['child']:.4f}, KL {kl['child']:.4f}; child: {self.child}"
        )

    def metric(self, name: str) -> dict[str, Any]:
        """One row of the evaluation's table, e.g. ``"loss"`` or ``"kl_divergence"``."""
        return next(row for row in self.evaluation["rows"] if row["metric"] == name)


def finish(
    run: Run,
    library: Library,
    scores: list[Score],
    solution: Solution,
    costs: dict[str, dict[str, int]],
    evaluation: dict[str, Any],
    recipe: Recipe,
) -> Result:
    """Write the report, and what is known by now into the child's card."""

    def write() -> None:
        complete_card(run.folder / "child", run, library, solution, recipe, evaluation)
        report = collect(run.header(), library, scores, solution, costs, evaluation, recipe, read_optional(run))
        write_json(run.folder / "report.json", report)
        write_text(run.folder / "report.html", render(report))

    ranks.on_first(write)
    return Result(run.folder, run.folder / "child", solution, evaluation, run.folder / "report.html")
