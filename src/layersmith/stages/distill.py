"""Global distillation: the child learns from the parent, on text that evaluation never shows.

These stages run at the end of ``compress`` if the recipe asks for it, and in the command ``distill`` on a finished run.
Every process of a launcher such as ``torchrun`` trains; the first one alone writes.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layersmith.data.overlap import without_copies
from layersmith.data.splits import check_vocabulary, evaluation_rows, holds_tokens, prepare
from layersmith.distillation.arguments import rehearse, training_arguments
from layersmith.distillation.finalists import Finalist, diverse_solutions
from layersmith.distillation.parent_logits import ParentLogits, cache_folder, remember
from layersmith.distillation.steps import Steps
from layersmith.distillation.train import GlobalSetup, Trained, TrainingRows, hidden_size_of, train
from layersmith.errors import InputError, UsageError
from layersmith.evaluation.compare import compare
from layersmith.heterogeneous.checkpoint import load
from layersmith.library.library import Library
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.recipe import DISTILLATION_TOKENS, DistillationRecipe, Recipe
from layersmith.records import parse, to_data
from layersmith.report.card import Child, complete_card, write_card
from layersmith.report.data import Evaluation
from layersmith.run import ranks
from layersmith.run.artifacts import read_json, read_tensors, remove, write_json, write_tensors
from layersmith.run.cards import keep_card
from layersmith.run.digests import read_sealed, write_sealed
from layersmith.run.journal import work_folder
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.run.stage import Making, Stage
from layersmith.search.solution import Solution
from layersmith.stages.costs import COSTS
from layersmith.stages.data import DATA, digest_of
from layersmith.stages.evaluate import rows_of_tasks, task_inputs
from layersmith.stages.job import Job
from layersmith.stages.library import LIBRARY
from layersmith.stages.realize import CHILD, library_with_pairs
from layersmith.stages.refine import SOLUTION
from layersmith.stages.search import problem_of, read_solution

# Bytes a parameter on the disk: two checkpoints of weights and two moments in float32.
_CHECKPOINTED = 2 * 3 * 4


def is_wanted(job: Job) -> bool:
    return job.recipe.distillation.tokens > 0


def check(job: Job) -> Steps:
    """How the recipe's tokens are divided into steps.

    Raises:
        UsageError: Settings do not go together, with the number of processes, or with the size of the parent.
    """
    if job.is_streamed:
        raise UsageError(
            f"{job.source}: larger than the memory, so it cannot be distilled here. Set distillation.tokens to 0, or "
            "stream to never in the recipe."
        )
    settings, parent = job.recipe.distillation, job.parent
    steps = Steps.of(settings, settings.tokens, job.read(DATA).evaluation.shape[1], parent.runtime.world_size)
    size = hidden_size_of(parent)
    arguments = training_arguments(settings, steps, parent.runtime, size, job.recipe.seed, job.run.folder)  # raises
    if parent.runtime.world_size == 1:
        job.once("rehearsal of training", lambda: rehearse(arguments, settings.trainer))
    return steps


def check_disk(job: Job) -> None:
    """Raises: InputError: Checkpoints will not fit on the disk."""
    costs, settings, steps = job.read(SOLUTION).costs, job.recipe.distillation, check(job)
    needed = costs["parameters"] * _CHECKPOINTED + costs["weight_bytes"]
    needed += ParentLogits.bytes_for(steps.count * steps.tokens, settings.cache_top) if settings.cache_top else 0
    free = shutil.disk_usage(job.run.folder).free
    if free < needed:
        raise InputError(
            f"{job.run.folder}: distillation needs about {needed / 1e9:.1f} GB here for checkpoints, {free / 1e9:.1f} "
            "GB are free. Free some and run the same command again."
        )


# ---------------------------------------------------------------------------------------------- data


def _source(job: Job) -> str:
    return job.data if job.training_data is None else job.training_data


def _overlap(job: Job) -> str:
    return job.recipe.distillation.overlap or job.recipe.data.overlap


def _rows_inputs(job: Job) -> Any:
    steps = check(job)
    other = None if job.training_data is None else digest_of(job.training_data)
    return [job.made_from(DATA), steps.count * steps.rows, other, _overlap(job)]


def _make_rows(job: Job, making: Making) -> None:
    check_disk(job)
    steps = check(job)
    with making.progress.stage(ROWS.name, 1, "source") as advance:
        held = {name: getattr(job.read(DATA), name) for name in ("scoring", "evaluation")}
        rows, description = find_rows(
            job.recipe, _source(job), job.training_data is None, job.tokenizer, held, steps.count * steps.rows
        )
        check_vocabulary(int(rows.max()) + 1, job.parent.language_config.vocab_size)
        advance(1)
    write_tensors(making.folder / "tokens.safetensors", {"training": rows.int()})
    write_json(making.folder / "data.json", description)
    for warning in description["warnings"]:
        making.progress.note(warning)


ROWS: Stage[Job, torch.Tensor] = Stage(
    name="distillation/data",
    inputs=_rows_inputs,
    make=_make_rows,
    read=lambda job, folder: read_tensors(folder / "tokens.safetensors")["training"],
    is_wanted=is_wanted,
)


def find_rows(
    recipe: Recipe,
    source: str,
    is_the_runs: bool,
    tokenizer: Any,
    held: Mapping[str, torch.Tensor],
    wanted: int,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Up to ``wanted`` rows of a source, ``[N, T]``, that the run's other splits do not have, and what is said of them.

    Args:
        recipe: of the run.
        source: of documents.
        is_the_runs: whether the run's other rows were dealt from it too.
        tokenizer: of the parent.
        held: the run's rows.
        wanted: rows.

    Raises:
        InputError: nothing is left that evaluation does not show, or the recipe refuses what it shows.
    """
    length, spelling = held["evaluation"].shape[1], None if holds_tokens(source) else tokenizer
    what = recipe.distillation.overlap or recipe.data.overlap
    warnings: list[str] = []
    rows = torch.empty(0, length, dtype=torch.long)
    if is_the_runs:
        dealing = dataclasses.replace(recipe.data, sequence_length=length, training_sequences=wanted, overlap="allow")
        dealt = prepare(source, tokenizer, dealing, recipe.seed)
        splits = {"scoring": dealt.scoring}
        scoring = without_copies(splits, dealt.evaluation, spelling, recipe.data.overlap, source, [])[0]["scoring"]
        if torch.equal(dealt.evaluation, held["evaluation"]) and torch.equal(scoring, held["scoring"]):
            rows = dealt.training
        else:
            warnings.append(f"{source}: no longer deals the run's rows; evaluation's are kept out by what is in them.")
    if not len(rows):
        reading = dataclasses.replace(recipe.data, sequence_length=length, evaluation_sequences=wanted)
        rows = evaluation_rows(source, tokenizer, reading, recipe.seed)
    splits = {"training": rows}
    kept, found = without_copies(
        splits, held["evaluation"], spelling, what, source, warnings, field="distillation.overlap"
    )
    rows = kept["training"]
    if len(rows) < wanted:
        warnings.append(
            f"{source} has {len(rows) * length:,} tokens to learn from; they are seen {wanted / len(rows):.1f} times."
        )
    overlapping = None if found is None else found["training"]
    description = {"source": source, "rows": len(rows), "wanted": wanted, "warnings": warnings}
    return rows, description | {"overlap": what, "overlapping": overlapping}


# ---------------------------------------------------------------------------------------------- training


def _write_child(child: PreTrainedModel, trained: Trained, dtype: torch.dtype, tokenizer: Any, folder: Path) -> None:
    """Write a trained child in the dtype that it had before training."""
    with quiet_transformers():
        if trained.state is not None:
            state = {name: tensor.to(dtype) for name, tensor in trained.state.items()}
            child.config.dtype = dtype
            child.save_pretrained(folder, state_dict=state)
        else:
            child.eval().to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def copied(child: PreTrainedModel) -> PreTrainedModel:
    """With weights of its own, in float32; a composed child shares the parent's."""
    tied: dict[int, torch.nn.Parameter] = {}
    for module in child.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in tied:
                tied[id(parameter)] = torch.nn.Parameter(parameter.detach().float().clone())
            module.register_parameter(name, tied[id(parameter)])
    return child


# ---------------------------------------------------------------------------------------------- finalists


def _has_finalists(job: Job) -> bool:
    return is_wanted(job) and job.recipe.distillation.finalists > 1


def _training_inputs(job: Job) -> list[Any]:
    """Where loggers write and how often checkpoints are written change no weights."""
    settings = dataclasses.replace(job.recipe.distillation, report_to=(), save_seconds=0.0)
    made = [job.made_from(stage) for stage in (CHILD, ROWS)]
    return [*made, to_data(settings), job.recipe.seed, job.dtype]


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
    work_folder(making.scratch, making.inputs)
    with making.progress.stage(FINALISTS.name, tokens * len(solutions), "tokens") as advance:
        tried = [
            _try(job, making.scratch / f"{i}", i, solution, library, tokens, advance)
            for i, solution in enumerate(solutions)
        ]
    return solutions, tried


def _try(
    job: Job,
    folder: Path,
    number: int,
    solution: Solution,
    library: Library,
    tokens: int,
    advance: Callable[[float], None],
) -> Finalist:
    """Train a solution's child for a short while, unless an interrupted run did."""
    known = ranks.from_first(lambda: read_sealed(folder / "finalist.json"))
    if known is not None:
        advance(tokens)
        return Finalist(**known)
    settings = dataclasses.replace(job.recipe.distillation, eval_every=0, report_to=())
    child = copied(library.compose(solution.alternatives))
    setup = GlobalSetup(
        recipe=settings,
        tokens=tokens,
        seed=job.recipe.seed,
        folder=folder / "checkpoints",
        curve=folder / "log.json",
        name=f"finalist {number}",
    )
    trained = train(job.parent, child, TrainingRows(job.read(ROWS), job.read(DATA).scoring), setup, advance)
    finalist = Finalist(number, solution.score, solution.costs["parameters"], tokens, trained.validation["kl"])

    def write() -> None:
        shutil.rmtree(folder / "child", ignore_errors=True)
        _write_child(child, trained, library.parent.dtype, job.tokenizer, folder / "child")
        files = [file for file in (folder / "child").rglob("*") if file.is_file()]
        write_sealed(folder / "finalist.json", dataclasses.asdict(finalist), files)
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
    inputs=lambda job: ["finalists", *_training_inputs(job)],
    make=_make_finalists,
    read=lambda job, folder: list(read_json(folder / "finalists.json")),
    is_wanted=_has_finalists,
    meanwhile=_try_all,
)


# ---------------------------------------------------------------------------------------------- the child


def _start(job: Job) -> tuple[Path, Solution]:
    """The child that is trained on, and its solution."""
    if not _has_finalists(job):
        return job.read(CHILD), job.read(SOLUTION)
    folder = job.run.folder / FINALISTS.name
    return folder / str(next(t["number"] for t in job.read(FINALISTS) if t["won"])), read_solution(folder)


def _described(job: Job) -> Child:
    """What the card says of the distilled child."""
    steps = check(job)
    return Child(
        run=job.run,
        library=job.read(LIBRARY),
        solution=_start(job)[1],
        recipe=job.recipe,
        learned_tokens=steps.count * steps.tokens,
        learned_from=_source(job),
    )


def _train(job: Job, making: Making) -> tuple[PreTrainedModel, Trained, torch.dtype]:
    settings, rows, folder = job.recipe.distillation, job.read(ROWS), job.run.folder / "distillation" / "global"
    child = load(_start(job)[0], trust_remote_code=job.recipe.trust_remote_code)
    dtype = child.dtype
    child.float()
    cache = _remembered(job, settings, rows, making.progress)
    setup = GlobalSetup(
        recipe=settings,
        tokens=settings.tokens,
        seed=job.recipe.seed,
        folder=work_folder(folder / "checkpoints", making.inputs),
        curve=folder / "log.json",
        name="global distillation",
    )
    with making.progress.stage(DISTILLED.name, settings.tokens, "tokens") as advance:
        trained = train(job.parent, child, TrainingRows(rows, job.read(DATA).scoring, cache), setup, advance)
    making.elsewhere.append(setup.curve)
    return child, trained, dtype


def _remembered(job: Job, settings: DistillationRecipe, rows: torch.Tensor, progress: Progress) -> ParentLogits | None:
    """The parent's most likely tokens on the rows, if the recipe wants them kept."""
    if not settings.cache_top or not settings.kl:
        return None
    k = settings.cache_top
    folder = cache_folder(job.run.folder / "distillation" / "parent-logits", job.parent, rows, k, settings.temperature)
    at_once = max(1, settings.device_tokens // rows.shape[1])
    with progress.stage("parent's logits", len(rows), "rows") as advance:

        def make(advance: Callable[[float], None]) -> ParentLogits:
            return remember(job.parent, rows, k, settings.temperature, folder, at_once, advance)

        ranks.on_first(lambda: make(advance))
        return make(lambda done: None)  # read from the disk


def _make_distilled(job: Job, making: Making) -> None:
    child, trained, dtype = _train(job, making)
    _write_child(child, trained, dtype, job.tokenizer, making.folder)
    write_card(making.folder, _described(job))


DISTILLED: Stage[Job, Path] = Stage(
    name="distilled",
    inputs=_training_inputs,
    make=_make_distilled,
    read=lambda job, folder: folder,
    is_wanted=is_wanted,
    meanwhile=_train,
)


def _evaluate(job: Job, making: Making) -> None:
    """Parent against child, before and after, on rows that neither search nor training has seen."""
    remove_checkpoints(job)
    runtime, tokens, found = job.parent.runtime, job.read(DATA).evaluation, {}
    batch = job.recipe.scoring.rows_at_once(tokens.shape[1])
    for when, stage in (("before", CHILD), ("after", DISTILLED)):
        trusts = job.recipe.trust_remote_code
        child = load(job.read(stage), dtype=runtime.dtype, device=runtime.device, trust_remote_code=trusts).eval()
        found[when] = compare(
            job.parent.model, child, tokens, batch_sequences=batch, tokenizer=job.tokenizer, progress=making.progress
        ).to_dict()
        found[when]["rows"] += rows_of_tasks(job, child, job.made_from(stage), making.progress)
        del child
    write_json(making.folder / "evaluation.json", found)
    complete_card_of_distilled(job, found["after"])


def complete_card_of_distilled(job: Job, evaluation: dict[str, Any]) -> None:
    """Write the card of the distilled child with its evaluation, unless someone has edited the card."""
    parsed = parse(Evaluation, evaluation, "evaluation.json: ")
    complete_card(job.run.folder / DISTILLED.name, _described(job), parsed)


def remove_checkpoints(job: Job) -> None:
    """Remove the checkpoints of a training that is finished."""
    remove(job.run.folder / "distillation" / "global" / "checkpoints")


def keep_card_of_distilled(job: Job) -> None:
    """Write the card of the distilled child again if it is missing and this job can."""
    run, evaluation = job.run.folder, job.read(COMPARED)["after"]
    write = (lambda: complete_card_of_distilled(job, evaluation)) if is_wanted(job) else None
    keep_card(run, DISTILLED.name, job.progress, write)


COMPARED: Stage[Job, dict[str, Any]] = Stage(
    name="distillation/evaluation",
    inputs=lambda job: [job.made_from(DISTILLED), *task_inputs(job)],
    make=_evaluate,
    read=lambda job, folder: dict(read_json(folder / "evaluation.json")),
    is_wanted=is_wanted,
)

DISTILLATION: tuple[Stage[Job, Any], ...] = (ROWS, FINALISTS, DISTILLED, COMPARED)


# ---------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Distilled:
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


def distill(
    run_folder: str | Path,
    *,
    tokens: int | None = None,
    data: str | Path | None = None,
    recipe: Recipe | dict[str, Any] | str | Path | None = None,
    finalists: int | None = None,
    report_to: Sequence[str] | None = None,
    device: str | None = None,
    descriptor: type[ModelDescriptor] | None = None,
    progress: Progress = SILENT,
    verify: bool = False,
) -> Distilled:
    """Distil the parent of a finished run into its child. Call it again to resume an interrupted distillation.

    Args:
        run_folder: Folder that ``compress`` made.
        tokens: Number of tokens to learn from; default: the recipe's, else a million.
        data: Text to learn from; default: the run's, without what evaluation shows.
        recipe: Its section ``distillation`` replaces the run's.
        finalists: Number of solutions that are tried for a short while first.
        report_to: Loggers, by the names that Transformers has for them; default: the recipe's.
        device: Device; default: the run's.
        descriptor: Descriptor of the parent's model family; default: inferred.
        progress: Receives steps and notes.
        verify: Hash all files of the run, also large ones whose size and time of change are as before.

    Raises:
        InputError: The run has no child yet, its parent or data are gone or have changed, or the disk is too small.
        UsageError: Settings do not go with the models.
    """
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens: must be positive, got {tokens}.")

    def change(settings: Recipe) -> Recipe:
        section = settings.distillation if recipe is None else Recipe.read(recipe).distillation
        changes: dict[str, Any] = {"tokens": tokens or section.tokens or DISTILLATION_TOKENS}
        if finalists is not None:
            changes["finalists"] = finalists
        if report_to is not None:
            changes["report_to"] = tuple(report_to)
        section = dataclasses.replace(section, **changes)
        return dataclasses.replace(settings, distillation=section, device=device or settings.device)

    job = Job.of_run(run_folder, (LIBRARY, COSTS, CHILD), descriptor, progress, change, verify)
    job.training_data = None if data is None else str(data)
    ranks.start(Runtime.detect(job.recipe.device, job.recipe.dtype))
    with ranks.first(job.run.locked):
        for stage in DISTILLATION:
            job.do(stage)
        ranks.on_first(lambda: remove_checkpoints(job))
        ranks.on_first(lambda: keep_card_of_distilled(job))
    compared = job.read(COMPARED)
    tried = job.read(FINALISTS) if _has_finalists(job) else []
    return Distilled(job.read(DISTILLED), compared["before"], compared["after"], tried)
