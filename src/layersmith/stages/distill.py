"""Global distillation: the child learns from the parent.

These stages run at the end of ``compress`` if the recipe asks for it, and in the command ``distill`` on a finished run.
Every process of a launcher such as ``torchrun`` trains; the first one alone writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layersmith.distillation.adapters import merge_adapters, merge_on_disk
from layersmith.distillation.parent_logits import ParentLogits, TopTokens, cache_folder, remember
from layersmith.distillation.straight_through import rounded_again, rounded_in_forward
from layersmith.distillation.train import (
    GlobalSetup,
    Trained,
    TrainingRows,
    last_complete_checkpoint,
    save_trained,
    train,
)
from layersmith.recipe import DistillationRecipe
from layersmith.records import parse
from layersmith.report.card import Child, complete_card, write_card
from layersmith.report.data import Evaluation
from layersmith.run import ranks
from layersmith.run.artifacts import read_json, remove, write_json
from layersmith.run.cards import keep_card
from layersmith.run.journal import shared_work_folder
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, Stage
from layersmith.stages import long_context
from layersmith.stages.data import DATA
from layersmith.stages.evaluate import compared_with_parent, rows_of_tasks
from layersmith.stages.finalists import FINALISTS, starting_child, training_inputs
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import CHILD, write_formats
from layersmith.stages.student import Student, parent_and_student
from layersmith.stages.tasks import task_inputs
from layersmith.stages.training_rows import LONG_ROWS, ROWS, check, is_wanted, training_source

# Folder of the checkpoints of a part of the training.
CHECKPOINTS = "checkpoints"


def _described(job: Job) -> Child:
    """What the card says of the distilled child."""
    steps = [check(job), *([long_context.check(job)] if long_context.is_wanted(job) else [])]
    return Child(
        run=job.run,
        library=job.read(LIBRARY),
        solution=starting_child(job)[1],
        recipe=job.recipe,
        learned_tokens=sum(of_part.count * of_part.tokens for of_part in steps),
        learned_from=training_source(job),
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of the training: how, and on what."""

    setup: GlobalSetup
    data: TrainingRows


def _parts(job: Job, making: Making, dtype: torch.dtype) -> list[_Part]:
    """The training on ordinary rows, and the one on long rows if that is wanted."""
    settings, rows = job.recipe.distillation, job.read(ROWS)

    def part(name: str, title: str, recipe: DistillationRecipe, data: TrainingRows) -> _Part:
        folder = job.run.folder / "distillation" / name
        checkpoints = shared_work_folder(folder / CHECKPOINTS, making.inputs)
        setup = GlobalSetup(
            recipe, recipe.tokens, job.recipe.seed, checkpoints, folder / "log.json", title, dtype=dtype
        )
        return _Part(setup, data)

    cache = _remembered(job, settings, rows, making.progress)
    parts = [part("global", "global distillation", settings, TrainingRows(rows, job.read(DATA).scoring, cache))]
    if long_context.is_wanted(job):
        scoring = long_context.joined(job.read(DATA).scoring, long_context.length_of(job))
        long = TrainingRows(job.read(LONG_ROWS), scoring if len(scoring) else None)
        parts.append(part("long", "global distillation on long rows", long_context.settings_of(job), long))
    return parts


def _train(job: Job, making: Making) -> tuple[Student, Trained]:
    parent, student = parent_and_student(job, making.progress)
    child, parts = student.model, _parts(job, making, student.dtype)
    # The result of earlier parts is in the checkpoint of a later one.
    later = range(len(parts) - 1, 0, -1)
    first = next((i for i in later if last_complete_checkpoint(parts[i].setup.folder) is not None), 0)
    with (
        making.progress.stage(DISTILLED.name, sum(part.setup.tokens for part in parts), "tokens") as advance,
        rounded_in_forward(child, student.rounded, parent.runtime.device),
    ):
        if first:
            advance(sum(part.setup.tokens for part in parts[:first]))
        for part in parts[first:]:
            trained = train(parent, child, part.data, part.setup, advance)
    if student.stream is None:
        merge_adapters(child)
    else:
        state = merge_on_disk(child, student.stream, student.dtype, job.run.folder / "distillation")
        trained = dataclasses.replace(trained, state=state)
    making.elsewhere.extend(part.setup.curve for part in parts)
    return dataclasses.replace(student, rounded=rounded_again(child, student.rounded)), trained


def _remembered(job: Job, settings: DistillationRecipe, rows: torch.Tensor, progress: Progress) -> ParentLogits | None:
    """The parent's most likely tokens on the rows, if the recipe wants them kept."""
    if not settings.cache_top or not settings.kl:
        return None
    top = TopTokens(settings.cache_top, settings.temperature)
    folder = cache_folder(job.run.folder / "distillation" / "parent-logits", job.first_parent, rows, top)
    at_once = max(1, settings.device_tokens // rows.shape[1])
    with progress.stage("parent's logits", len(rows), "rows") as advance:

        def make(advance: Callable[[float], None]) -> ParentLogits:
            return remember(job.first_parent, rows, top, folder, at_once, advance)

        ranks.on_first(lambda: make(advance))
        return make(lambda done: None)  # read from the disk


def _make_distilled(job: Job, making: Making) -> None:
    student, trained = _train(job, making)
    save_trained(student.model, trained, student.dtype, job.tokenizer, making.folder)
    write_formats(making.folder, student.model, student.rounded)
    write_card(making.folder, _described(job))


DISTILLED: Stage[Job, Path] = Stage(
    name="distilled",
    inputs=training_inputs,
    make=_make_distilled,
    read=lambda job, folder: folder,
    is_wanted=is_wanted,
    meanwhile=_train,
)


def _compared(job: Job, making: Making) -> dict[str, dict[str, Any]]:
    """Parent against child, before and after, on rows that neither search nor training has seen; in all processes."""
    ranks.on_first(lambda: remove_checkpoints(job))
    comparisons: dict[str, dict[str, Any]] = {}
    for when, stage in (("before", CHILD), ("after", DISTILLED)):
        child, compared = compared_with_parent(job, job.read(stage), making.progress)
        comparisons[when] = compared.to_dict()
        if long_context.is_wanted(job):
            comparisons[when]["rows"] += long_context.compared(job, child, making.progress)
        if ranks.is_first():
            comparisons[when]["rows"] += rows_of_tasks(job, child, job.made_from(stage), making.progress)
        del child
    return comparisons


def _evaluate(job: Job, making: Making) -> None:
    comparisons = _compared(job, making)
    write_json(making.folder / "evaluation.json", comparisons)
    complete_card_of_distilled(job, comparisons["after"])


def complete_card_of_distilled(job: Job, evaluation: dict[str, Any]) -> None:
    """Write the card of the distilled child with its evaluation, unless someone has edited the card."""
    parsed = parse(Evaluation, evaluation, "evaluation.json: ")
    complete_card(job.run.folder / DISTILLED.name, _described(job), parsed)


def remove_checkpoints(job: Job) -> None:
    """Remove the checkpoints of a training that is finished."""
    for name in ("global", "long"):
        remove(job.run.folder / "distillation" / name / CHECKPOINTS)


def keep_card_of_distilled(job: Job) -> None:
    """Write the card of the distilled child again if it is missing and this job can."""
    run, evaluation = job.run.folder, job.read(COMPARED)["after"]
    write = (lambda: complete_card_of_distilled(job, evaluation)) if is_wanted(job) else None
    keep_card(run, DISTILLED.name, job.progress, write)


COMPARED: Stage[Job, dict[str, Any]] = Stage(
    name="distillation/evaluation",
    inputs=lambda job: [job.made_from(DISTILLED), *task_inputs(job), job.recipe.evaluation.keep],
    make=_evaluate,
    read=lambda job, folder: dict(read_json(folder / "evaluation.json", dict[str, dict[str, Any]])),
    is_wanted=is_wanted,
    meanwhile=_compared,
)

DISTILLATION: tuple[Stage[Job, Any], ...] = (ROWS, LONG_ROWS, FINALISTS, DISTILLED, COMPARED)
