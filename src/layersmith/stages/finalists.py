"""Distil several solutions for a short while; the one whose child is closest to the parent is trained to the end."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersmith.distillation.finalists import Finalist, diverse_solutions
from layersmith.distillation.train import GlobalSetup, TrainingRows, in_float32, save_trained, train
from layersmith.library.library import Library
from layersmith.records import parse, to_data
from layersmith.run import ranks
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.digests import read_sealed, write_sealed
from layersmith.run.journal import shared_work_folder
from layersmith.run.stage import Making, Stage
from layersmith.search.solution import Solution
from layersmith.stages import long_context
from layersmith.stages.data import DATA
from layersmith.stages.job import Job
from layersmith.stages.realize import CHILD, library_with_pairs
from layersmith.stages.refine import SOLUTION
from layersmith.stages.search import problem_of, read_solution
from layersmith.stages.training_rows import LONG_ROWS, ROWS, is_wanted

# Settings that came later: where they are not set, the trainings of earlier versions are as good.
_LATER = ("lora_rank", "long_tokens", "long_sequence_length", "long_learning_rate", "long_data")


def has_finalists(job: Job) -> bool:
    return is_wanted(job) and job.recipe.distillation.finalists > 1


def training_inputs(job: Job) -> list[Any]:
    """Where loggers write, how often checkpoints are written, and what each process holds change no weights."""
    settings = to_data(dataclasses.replace(job.recipe.distillation, report_to=(), save_seconds=0.0))
    stages = (CHILD, ROWS, LONG_ROWS) if long_context.is_wanted(job) else (CHILD, ROWS)
    made = [job.made_from(stage) for stage in stages]
    counted = {n: v for n, v in settings.items() if n != "sharded" and (v or n not in _LATER)}
    return [*made, counted, job.recipe.seed, job.dtype]


def _solutions(job: Job) -> list[Solution]:
    """The run's solution, and others that differ enough from it."""
    settings = job.recipe.distillation
    problem = problem_of(job)
    return ranks.from_first(
        lambda: diverse_solutions(problem, job.read(SOLUTION), settings.finalists, settings.finalist_distance)
    )


def _try_all(job: Job, making: Making) -> tuple[list[Solution], list[Finalist]]:
    settings = job.recipe.distillation
    tokens = settings.finalist_tokens or max(1, settings.tokens // 10)
    library = library_with_pairs(job).with_parent(job.stored_parent)
    solutions = _solutions(job)
    if len(solutions) < settings.finalists:
        making.progress.note(f"only {len(solutions)} solutions differ enough to be tried")
    shared_work_folder(making.scratch, making.inputs)
    with making.progress.stage(FINALISTS.name, tokens * len(solutions), "tokens") as advance:
        tried = [
            _try(job, _Trial(i, solution, tokens, making.scratch / f"{i}"), library, advance)
            for i, solution in enumerate(solutions)
        ]
    return solutions, tried


@dataclass(frozen=True)
class _Trial:
    """A solution whose child is trained for a short while, in a folder."""

    number: int
    solution: Solution
    tokens: int
    folder: Path


def _try(job: Job, trial: _Trial, library: Library, advance: Callable[[float], None]) -> Finalist:
    """Train a child, unless an interrupted run did."""
    folder = trial.folder
    known = ranks.from_first(lambda: read_sealed(folder / "finalist.json", dict[str, Any]))
    if known is not None:
        advance(trial.tokens)
        return parse(Finalist, known, "finalist.json: ")
    child = in_float32(library.compose(trial.solution.alternatives))
    setup = GlobalSetup(
        recipe=dataclasses.replace(job.recipe.distillation, eval_every=0, report_to=()),
        tokens=trial.tokens,
        seed=job.recipe.seed,
        folder=folder / "checkpoints",
        curve=folder / "log.json",
        name=f"finalist {trial.number}",
    )
    trained = train(job.first_parent, child, TrainingRows(job.read(ROWS), job.read(DATA).scoring), setup, advance)
    finalist = Finalist(
        number=trial.number,
        score=trial.solution.score,
        parameters=trial.solution.costs["parameters"],
        tokens=trial.tokens,
        kl=trained.validation["kl"],
    )

    def write() -> None:
        shutil.rmtree(folder / "child", ignore_errors=True)
        save_trained(child, trained, library.parent.dtype, job.tokenizer, folder / "child")
        files = [file for file in (folder / "child").rglob("*") if file.is_file()]
        write_sealed(folder / "finalist.json", finalist.to_dict(), files)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    ranks.on_first(write)
    gc.collect()
    return finalist


def _make_finalists(job: Job, making: Making) -> None:
    """The winner has the least KL on the scoring rows."""
    solutions, tried = _try_all(job, making)
    best = min(range(len(tried)), key=lambda i: (tried[i].kl, i))
    records = [finalist.to_dict() | {"won": i == best} for i, finalist in enumerate(tried)]
    shutil.copytree(making.scratch / f"{best}" / "child", making.folder / f"{best}")
    write_json(making.folder / "finalists.json", records)
    write_json(making.folder / "solution.json", solutions[best].to_dict())


FINALISTS: Stage[Job, list[dict[str, Any]]] = Stage(
    name="distillation/finalists",
    inputs=lambda job: ["finalists", *training_inputs(job)],
    make=_make_finalists,
    read=lambda job, folder: list(read_json(folder / "finalists.json", list[dict[str, Any]])),
    is_wanted=has_finalists,
    meanwhile=_try_all,
)


def starting_child(job: Job) -> tuple[Path, Solution]:
    """The child that is trained on, and its solution."""
    if not has_finalists(job):
        return job.read(CHILD), job.read(SOLUTION)
    folder = job.run.folder / FINALISTS.name
    return folder / str(next(t["number"] for t in job.read(FINALISTS) if t["won"])), read_solution(job, folder)
