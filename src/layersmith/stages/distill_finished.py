"""The command ``distill``: global distillation of a finished run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersmith.data.in_memory import Text, source_of
from layersmith.errors import UsageError
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import DISTILLATION_TOKENS, Recipe
from layersmith.report.words import number
from layersmith.run import ranks
from layersmith.run.progress import Callback, Progress, progress_of
from layersmith.run.runtime import Runtime
from layersmith.stages.costs import COSTS
from layersmith.stages.distill import COMPARED, DISTILLATION, DISTILLED, keep_card_of_distilled, remove_checkpoints
from layersmith.stages.finalists import FINALISTS, has_finalists
from layersmith.stages.job import ask_together, job_of_run
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import CHILD
from layersmith.tables import Shown, Table


@dataclass(frozen=True)
class Distilled(Shown):
    """Result of a global distillation.

    Attributes:
        child: Folder of the distilled child.
        before, after: Evaluations of parent against child, as in ``evaluation.json``.
        finalists: Solutions that were tried first; empty if none were.
    """

    child: Path
    before: dict[str, Any]
    after: dict[str, Any]
    finalists: list[dict[str, Any]]

    def tables(self) -> list[Table]:
        """The child's metrics before and after, and the parent's."""
        rows = [
            (new["label"], number(new["parent"]), number(old["child"]), number(new["child"]))
            for old, new in zip(self.before["rows"], self.after["rows"], strict=True)
        ]
        return [Table(str(self.child), ("", "parent", "child", "distilled"), rows, True)]


def distill(
    run: str | Path,
    *,
    tokens: int | None = None,
    data: Text | None = None,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    finalists: int | None = None,
    report_to: Sequence[str] | None = None,
    device: str | None = None,
    descriptor: type[ModelDescriptor] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool = True,
    callback: Callback | None = None,
    verify: bool = False,
) -> Distilled:
    """Distil the parent of a finished run into its child. Call it again to resume an interrupted distillation.

    Args:
        run: Folder that ``compress`` made.
        tokens: Number of tokens to learn from; default: the recipe's, else a million.
        data: Text to learn from; default: the run's, without what evaluation shows.
        recipe: Its section ``distillation`` replaces the run's, and so does ``stream`` if it is not ``auto``.
        finalists: Number of solutions that are tried for a short while first.
        report_to: Loggers, by the names that Transformers has for them; default: the recipe's.
        device: Device; default: the run's.
        descriptor: Descriptor of the parent's model family; default: inferred.
        trust_remote_code: Let Transformers run code from the folders of parent and child.
        progress: Whether to show progress; or a progress that receives it.
        callback: Called with an :class:`~layersmith.run.progress.Event` when a stage begins, does steps, or ends.
        verify: Hash all files of the run, also large ones whose size and time of change are as before.

    Raises:
        InputError: The run has no child yet, its parent or data are gone or have changed, or the disk is too small.
        UsageError: Settings do not go with the models.
    """
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens: must be positive, got {tokens}.")

    def change(settings: Recipe) -> Recipe:
        given = settings if recipe is None else Recipe.read(recipe)
        section, stream = given.distillation, settings.stream if given.stream == "auto" else given.stream
        changes: dict[str, Any] = {"tokens": tokens or section.tokens or DISTILLATION_TOKENS}
        changes |= {} if finalists is None else {"finalists": finalists}
        changes |= {} if report_to is None else {"report_to": tuple(report_to)}
        section = dataclasses.replace(section, **changes)
        return dataclasses.replace(settings, distillation=section, device=device or settings.device, stream=stream)

    shown = progress_of(progress, callback)
    job = job_of_run(run, (LIBRARY, COSTS, CHILD), descriptor, shown, change, verify, trust_remote_code)
    job.training_data = None if data is None else source_of(data)
    ranks.start(Runtime.detect(job.recipe.device, job.recipe.dtype))
    ask_together(job)
    with ranks.first(job.run.locked):
        for stage in DISTILLATION:
            job.do(stage)
        ranks.on_first(lambda: remove_checkpoints(job))
        ranks.on_first(lambda: keep_card_of_distilled(job))
    compared, tried = job.read(COMPARED), job.read(FINALISTS) if has_finalists(job) else []
    return Distilled(job.read(DISTILLED), compared["before"], compared["after"], tried)
