"""The hidden size as a choice of the whole model: one search for every size, and the best of all.

A narrow parent is made for every size that the recipe names. Each is the parent of a run up to its search, in a folder
of its own, and so is the parent itself. A size costs the loss of its narrow parent and the sum of scores of the best
solution that fits. The integer program of every size is solved to its optimum, so the least of these sums is the best
of all sizes by these scores. A size whose narrow parent alone loses more is not scored. What children are compared
with and learn from, and what budgets are fractions of, stays the first parent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from layersmith.costs.budget import is_time
from layersmith.errors import UsageError
from layersmith.execution.exchange import forward
from layersmith.execution.parent import Parent
from layersmith.hidden_size.channels import by_activations, by_second_order, head_importance, norms_of
from layersmith.hidden_size.narrow import Narrower, check_narrow, hidden_size_of, refit, why_not, write
from layersmith.hidden_size.narrowing import Kept
from layersmith.hidden_size.prove import prove_narrowing
from layersmith.recipe import HiddenSizeRecipe, Objective, Recipe
from layersmith.run.artifacts import read_json, write_json
from layersmith.run.folder import HIDDEN_SIZES, Run
from layersmith.run.progress import Progress
from layersmith.run.stage import Making, Stage
from layersmith.scoring.metrics import Reference, loss_of, measure, row_means
from layersmith.stages.data import DATA, TOKENIZER_FILES, digest_of_split
from layersmith.stages.effort import with_effort
from layersmith.stages.job import Job
from layersmith.stages.realize import shards
from layersmith.stages.search import SEARCH

_FILE = "hidden_size.json"


class Narrowed(TypedDict):
    """A narrow parent: its hidden size, its loss on the scoring rows, and the reason if it could not be made."""

    size: int
    loss: float
    problem: str


class Made(TypedDict):
    """All narrow parents, and the hidden size of the parent they were made from."""

    hidden_size: int
    narrowed: list[Narrowed]


class Choice(TypedDict):
    """What a hidden size would cost; ``total`` is None where it was not searched, and ``problem`` says why."""

    size: int
    narrowing: float
    scores: float | None
    total: float | None
    parameters: int | None
    problem: str
    taken: bool


# ---------------------------------------------------------------------------------------------- narrow parents


def sizes_of(recipe: HiddenSizeRecipe, whole: int, is_possible: Callable[[int], bool]) -> list[int]:
    """The smaller hidden sizes that a recipe names for a parent with ``whole`` channels, the largest first.

    A fraction stands for the nearest multiple that is possible. Sizes in channels are taken as they are.
    """
    named = recipe.sizes
    if named is None:
        multiples = range(recipe.multiple, whole, recipe.multiple)
        nearest = (sorted(multiples, key=lambda size: abs(size - part * whole)) for part in recipe.fractions)
        named = tuple(next(filter(is_possible, sizes), 0) for sizes in nearest)
    return sorted({size for size in named if 0 < size < whole}, reverse=True)


def _inputs(job: Job) -> Any:
    scoring = job.recipe.scoring
    rows = [digest_of_split(job, split) for split in ("calibration", "scoring")]
    tokenizer = job.files_besides_weights(*TOKENIZER_FILES, "generation_config.json")
    settings = [job.settings("hidden_size"), scoring.objective, scoring.batch_tokens, job.recipe.seed]
    return [job.identity, *rows, *settings, job.dtype, tokenizer]


def _make(job: Job, making: Making) -> None:
    recipe, parent, tokens = job.recipe.hidden_size, job.parent, job.read(DATA)
    check_narrow(parent)
    narrowing = prove_narrowing(parent.config)
    sizes = sizes_of(recipe, hidden_size_of(parent), lambda size: not why_not(parent, narrowing, size))
    if narrowing.centered:
        making.progress.note("its norms subtract a mean: removing channels also changes that mean.")
    made: list[Narrowed] = []
    batches = tokens.calibration.split(job.recipe.scoring.rows_at_once(tokens.calibration.shape[1]))
    units: Units | None = None
    for size in sizes:
        if problem := why_not(parent, narrowing, size):
            made.append(Narrowed(size=size, loss=0.0, problem=problem))
            continue
        narrower = Narrower.of(parent, narrowing, size)
        if units is None:
            units = _units(job, narrower, batches, making.progress)
        kept = units.best(size, narrower.heads_left)
        model: Any = narrower.model(kept)
        if recipe.refit:
            with making.progress.stage(f"refit {size}", len(tokens.calibration), "rows") as advance:
                refit(narrower, model, kept, batches, advance)
        folder = making.folder / str(size)
        write(narrower, model, folder, **shards(parent))
        job.tokenizer.save_pretrained(folder)
        loss = _loss(job.first_parent, model, tokens.scoring, job.recipe.scoring.objective, len(batches[0]))
        made.append(Narrowed(size=size, loss=loss, problem=""))
    write_json(making.folder / _FILE, Made(hidden_size=hidden_size_of(parent), narrowed=made))


@dataclass(frozen=True, eq=False)
class Units:
    """Channels ``[D]``, and the heads of each layer where their number shrinks too, the most important first."""

    channels: torch.Tensor
    heads: Mapping[int, torch.Tensor]

    def best(self, size: int, heads: int) -> Kept:
        """The most important ones, in their order in the parent."""
        return Kept(self.channels[:size].sort().values, {i: h[:heads].sort().values for i, h in self.heads.items()})


def _units(job: Job, narrower: Narrower, batches: Sequence[torch.Tensor], progress: Progress) -> Units:
    parent, norms = narrower.parent, norms_of(narrower.parent.model, narrower.carriers)
    with progress.stage("channels", sum(map(len, batches)), "rows") as advance:
        if job.recipe.hidden_size.ranking == "activations" or parent.stream is not None:
            channels = by_activations(parent, norms, batches, advance)
        else:
            channels = by_second_order(parent, norms, batches, job.recipe.seed, advance)
    heads: dict[int, torch.Tensor] = {}
    if narrower.heads > 1:
        with progress.stage("heads", sum(map(len, batches)), "rows") as advance:
            heads = head_importance(parent, narrower.carriers, batches, advance)
    return Units(_falling(channels), {layer: _falling(of_layer) for layer, of_layer in heads.items()})


def _falling(importance: torch.Tensor) -> torch.Tensor:
    return importance.argsort(descending=True, stable=True)


@torch.inference_mode()
def _loss(first: Parent, model: Any, tokens: torch.Tensor, objective: Objective, at_once: int) -> float:
    """The mean loss increase of a narrow parent over the first parent on rows of tokens."""
    sums: dict[str, float] = {"parent": 0.0, "narrow": 0.0}
    for rows in tokens.to(first.runtime.device).split(at_once):
        logits, hidden = forward(first, rows)
        reference = Reference.of(logits, hidden, rows)
        for name, made in (("parent", logits), ("narrow", model(input_ids=rows, use_cache=False).logits)):
            sums[name] += float(row_means([measure(reference, made.clone(), hidden)])[objective].sum())
    return loss_of(objective, sums["narrow"] / len(tokens), sums["parent"] / len(tokens))


NARROWED: Stage[Job, Made] = Stage(
    name="narrowed",
    inputs=_inputs,
    make=_make,
    read=lambda job, folder: read_json(folder / _FILE, Made),
    is_shared=True,
)


# ---------------------------------------------------------------------------------------------- the choice


def hidden_sizes_of(job: Job) -> Iterator[tuple[Job, bool]]:
    """The jobs of a run, in order, and whether each is only a part of it: one up to the search for every hidden size.

    The last is the whole run of the size that is taken; it is the only one if the recipe names no other sizes. The
    caller runs each job before it asks for the next.

    Raises:
        UsageError: The recipe does not go with other hidden sizes.
        UnsupportedModel: The hidden size of the parent cannot change, and why.
    """
    recipe = job.recipe.hidden_size
    if not recipe.fractions and not recipe.sizes:
        yield job, False
        return
    if job.first is not None:  # the first of several rounds has chosen
        yield dataclasses.replace(job, recipe=_without_hidden_states(job.recipe)), False
        return
    _check(job)
    folder, settings = job.run.folder / HIDDEN_SIZES, with_effort(job.recipe)
    yield (parents := _part(job, folder / "parents", recipe=settings)), True
    found = parents.read(NARROWED)
    whole, narrowed = found["hidden_size"], found["narrowed"]
    del parents  # with the models that it has loaded
    settings = dataclasses.replace(settings, hidden_size=HiddenSizeRecipe())
    choices: list[Choice] = []
    for made in (Narrowed(size=whole, loss=0.0, problem=""), *narrowed):
        least = min((c["total"] for c in choices if c["total"] is not None), default=None)
        if not made["problem"] and least is not None and made["loss"] >= least:
            made["problem"] = "its narrow parent alone loses more than the best child of another size"
        choice = Choice(
            size=made["size"], narrowing=made["loss"], scores=None, total=None, parameters=None,
            problem=made["problem"], taken=False,
        )  # fmt: skip
        choices.append(choice)
        if made["problem"]:
            continue
        part = _part(job, folder / str(made["size"]), recipe=settings, **_source(job, made["size"], whole))
        yield part, True
        if not part.run.folder.is_dir() or part.made_from(SEARCH) is None:
            choice["problem"] = "no child of this size meets the budget"
            continue
        solution = part.read(SEARCH).solution
        choice["scores"], choice["total"] = solution.score, made["loss"] + solution.score
        choice["parameters"] = int(solution.costs["parameters"])
    taken = min(
        (c for c in choices if c["total"] is not None), key=lambda c: float(c["total"] or 0), default=choices[0]
    )
    taken["taken"] = True
    _say(job, choices)
    yield _taken(job, taken["size"], whole, choices), False


def _taken(job: Job, size: int, whole: int, choices: Sequence[Choice]) -> Job:
    """The run of the hidden size that was taken."""
    recipe = job.recipe if size == whole else _without_hidden_states(job.recipe)
    source = _source(job, size, whole)
    return dataclasses.replace(job, **source, recipe=recipe, hidden_sizes=tuple(choices), _results={})


def _without_hidden_states(recipe: Recipe) -> Recipe:
    """A recipe in which parent and child do not compare hidden states, which may have different sizes."""
    return dataclasses.replace(recipe, distillation=dataclasses.replace(recipe.distillation, hidden=0.0))


def _part(job: Job, folder: Path, **changes: Any) -> Job:
    return dataclasses.replace(job, run=Run(folder, job.run.store, job.run.verify), _results={}, **changes)


def _source(job: Job, size: int, whole: int) -> Mapping[str, Any]:
    """The parent of a hidden size and the first parent, as fields of a job."""
    if size == whole:
        return {}
    narrow = job.run.folder / HIDDEN_SIZES / "parents" / NARROWED.name / str(size)
    return {"source": str(narrow), "first": job.first or job.source}


def _check(job: Job) -> None:
    """Raises: UsageError: The recipe or the budget does not go with other hidden sizes."""
    recipe = job.recipe
    if recipe.effort.within is not None:
        raise UsageError(
            "hidden_size: --within does not plan runs with several hidden sizes. Set effort.level instead."
        )
    if recipe.scoring.objective == "hidden_distance":
        raise UsageError("hidden_size: hidden states of different sizes have no distance. Choose another objective.")
    if recipe.distillation.tokens and not recipe.distillation.kl + recipe.distillation.lm:
        raise UsageError("hidden_size: hidden states of different sizes teach nothing. Set distillation.kl.")
    for limit in job.limits:
        if is_time(limit.cost) and limit.fraction is not None:
            raise UsageError(f"hidden_size: give the limit on {limit} as an amount instead of a fraction.")


def _say(job: Job, choices: Sequence[Choice]) -> None:
    for choice in choices:
        text, narrowing = choice["problem"], choice["narrowing"]
        if choice["total"] is not None:
            text = f"loss {choice['total']:.4f}: {narrowing:.4f} by narrowing, {choice['scores']:.4f} by scores"
        job.progress.note(f"hidden size {choice['size']}: {text}{'; taken' if choice['taken'] else ''}")


HIDDEN_SIZE: Stage[Job, list[Choice]] = Stage(
    name="hidden_size",
    inputs=lambda job: list(job.hidden_sizes),
    make=lambda job, making: write_json(making.folder / _FILE, list(job.hidden_sizes)),
    read=lambda job, folder: read_json(folder / _FILE, list[Choice]),
    is_wanted=lambda job: bool(job.hidden_sizes),
)
