"""The report and the model card, and the result that ``compress`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from layersmith.heterogeneous.checkpoint import load
from layersmith.records import parse
from layersmith.report.card import Child, complete_card
from layersmith.report.collect import Results, collect
from layersmith.report.data import Evaluation
from layersmith.report.html import render
from layersmith.report.optional import read_optional
from layersmith.run import ranks
from layersmith.run.artifacts import fingerprint, write_json, write_text
from layersmith.run.cards import keep_card
from layersmith.search.solution import Solution
from layersmith.stages.distill import COMPARED, DISTILLED, keep_card_of_distilled
from layersmith.stages.evaluate import EVALUATION
from layersmith.stages.finalists import FINALISTS
from layersmith.stages.formats import scores_of_formats
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import CHILD
from layersmith.stages.refine import SOLUTION, read_costs
from layersmith.stages.scores import SCORES
from layersmith.tables import Shown, Table
from layersmith.units import format_count

NAME, PAGE = "report", "report.html"


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """Result of a run.

    Attributes:
        run: Folder of the run.
        child: Folder of the child.
        solution: The solution, with the costs of parent and child.
        evaluation: Table and rows of the evaluation, as in ``evaluation/evaluation.json``.
        report: The HTML page.
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

    def __repr__(self) -> str:
        return f"Result({self})"

    def tables(self) -> list[Table]:
        """The solution, the evaluation, and where child and report are."""
        folders = Table("", ("", "folder"), [("child", str(self.child)), ("report", str(self.report))])
        return [*self.solution.tables(), *parse(Evaluation, self.evaluation, "evaluation: ").tables(), folders]

    def load(self, **how: Any) -> PreTrainedModel:
        """The child as a model; arguments are those of :func:`layersmith.load`."""
        return load(self.child, **how)

    def metric(self, name: str) -> dict[str, Any]:
        """One row of the evaluation's table, e.g. ``"loss"`` or ``"kl_divergence"``."""
        return next(row for row in self.evaluation["rows"] if row["metric"] == name)


def result_of(job: Job, is_distilled: bool) -> Result:
    """What the finished stages give; after global distillation the distilled child."""
    evaluation, child = job.read(EVALUATION), CHILD
    if is_distilled:
        evaluation = job.read(COMPARED)["after"] | {"samples": evaluation["samples"]}
        child = DISTILLED
    folder = job.run.folder
    return Result(folder, folder / child.name, job.read(SOLUTION), evaluation, folder / PAGE)


def write_report(job: Job, *, is_distilled: bool, again: bool = False) -> Result:
    """Write ``report.html`` and ``report.json``, and the evaluation into the child's card.

    Args:
        job: A job whose stages are finished.
        is_distilled: Whether it is about the child after global distillation.
        again: Write them even if the stages have not changed since.

    Raises:
        InputError: A file of a stage is damaged or missing.
    """
    run = job.run
    ranks.doing(NAME)
    result = result_of(job, is_distilled)
    made = {name: stage for name, stage in run.made().items() if name not in (NAME, FINALISTS.name)}
    run.require(*made)
    inputs = fingerprint([made, is_distilled])
    ranks.on_first(lambda: _keep_cards(job))
    if again or ranks.from_first(lambda: not _is_written(job, inputs)):
        ranks.on_first(lambda: _write(job, result, inputs))
    return result


def _is_written(job: Job, inputs: str) -> bool:
    made = job.run.made().get(NAME)
    if made is None or made["inputs"] != inputs:
        return False
    if damage := job.run.damage(NAME):
        job.progress.note(f"{damage}; the report is made again.")
    return damage is None


def _write(job: Job, result: Result, inputs: str) -> None:
    run, library = job.run, job.read(LIBRARY)
    _complete_card(job)
    results = Results(
        header=Child(run, library, result.solution, job.recipe).header(),
        library=library,
        scores=job.read(SCORES),
        solution=result.solution,
        costs=read_costs(run.folder / SOLUTION.name),
        evaluation=parse(Evaluation, result.evaluation, "evaluation.json: "),
        recipe=job.recipe,
        optional=read_optional(run),
        of_formats=scores_of_formats(job),
    )
    report = collect(results).to_json()
    files = [run.folder / "report.json", run.folder / PAGE]
    write_json(files[0], report)
    write_text(files[1], render(report))
    run.finished(NAME, inputs, run.record_of(NAME, files))


def _keep_cards(job: Job) -> None:
    run = job.run.folder
    keep_card(run, CHILD.name, job.progress, lambda: _complete_card(job))
    if job.made_from(COMPARED) is not None:
        keep_card_of_distilled(job)


def _complete_card(job: Job) -> None:
    child = Child(job.run, job.read(LIBRARY), job.read(SOLUTION), job.recipe)
    complete_card(job.run.folder / CHILD.name, child, parse(Evaluation, job.read(EVALUATION), "evaluation.json: "))
