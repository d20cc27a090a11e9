"""Global distillation of a run: the child learns from the parent, on text that evaluation never shows.

distillation/data/         the rows to learn from
distillation/finalists/    solutions that were tried, and which won
distillation/global/       log.json, the curve; while it trains, checkpoints
distilled/                 the child afterwards
distillation/evaluation/   parent against child, before and after

Every process of a launcher such as ``torchrun`` runs this; the first one alone writes.

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

from layersmith.costs.budget import Budget
from layersmith.data.overlap import without_copies
from layersmith.data.splits import check_vocabulary, evaluation_rows, holds_tokens, load_tokenizer, prepare
from layersmith.distillation.finalists import Finalist, diverse_solutions
from layersmith.distillation.parent_logits import ParentLogits, cache_folder, remember
from layersmith.distillation.train import Steps, Trained, hidden_size_of, train, training_arguments
from layersmith.errors import InputError, UsageError
from layersmith.evaluation.compare import compare
from layersmith.execution.parent import Parent, load_parent
from layersmith.heterogeneous.checkpoint import load
from layersmith.library.library import Library
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.recipe import DISTILLATION_TOKENS, DistillationRecipe, Recipe
from layersmith.records import to_data
from layersmith.report.card import complete_card, write_card
from layersmith.run import ranks
from layersmith.run.artifacts import fingerprint, read_json, read_tensors, write_json, write_tensors
from layersmith.run.folder import Run
from layersmith.run.progress import SILENT, Progress
from layersmith.run.runtime import Runtime
from layersmith.search.problem import Solution
from layersmith.stages.describe import at_stored_dtype, cost_table, run_dtype
from layersmith.stages.library import with_pairs
from layersmith.stages.scores import read_scores
from layersmith.stages.search import search_problem
from layersmith.stages.times import kept_times

# Bytes a parameter on the disk: two checkpoints of weights and two moments in float32.
_CHECKPOINTED = 2 * 3 * 4


@dataclass(frozen=True)
class Distilled:
    """What a distillation gave.

    Attributes:
        child: its folder.
        before, after: evaluations of parent against child, as in ``evaluation.json``.
        finalists: what was tried first; empty if nothing was.
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
) -> Distilled:
    """Distil the parent of a finished run into its child; an interrupted distillation is gone on with.

    Args:
        run_folder: that ``compress`` made.
        tokens: to learn from; default: the recipe's, else a million.
        data: to learn from; default: the run's own, but for what evaluation has of it.
        recipe: whose section ``distillation`` goes before the run's own.
        finalists: solutions that are tried first.
        report_to: loggers, by the names that Transformers has for them; default: the recipe's.
        device: goes before the run's.
        descriptor: of the family; default: found by experiment.
        progress: told where it is.

    Raises:
        InputError: the run has no child yet; its parent or data are gone or others now; the disk is too small.
        UsageError: a recipe that does not go with the models.
    """
    run = Run.existing(run_folder)
    header = run.header()
    own = Recipe.from_dict(header["recipe"], str(run.folder / "run.json"))
    section = own.distillation if recipe is None else Recipe.read(recipe).distillation
    changes: dict[str, Any] = {"tokens": tokens or section.tokens or DISTILLATION_TOKENS}
    if finalists is not None:
        changes["finalists"] = finalists
    if report_to is not None:
        changes["report_to"] = tuple(report_to)
    own = dataclasses.replace(
        own, distillation=dataclasses.replace(section, **changes), device=own.device if device is None else device
    )
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens: must be positive, got {tokens}.")
    if "child" not in header["stages"] or not (run.folder / "child" / "config.json").is_file():
        raise InputError(f"{run.folder}: its child is not there yet. Run the same compress command again.")
    ranks.start(Runtime.detect(own.device, own.dtype))
    parent = load_parent(
        run.meant(header["parent"]["path"]), Runtime.detect(own.device, own.dtype), descriptor, own.trust_remote_code
    )
    if parent.identity != header["parent"]["identity"]:
        raise InputError(f"{parent.path}: not the parent of {run.folder} any more; its weights or config changed.")
    with ranks.first(run.at_work):
        source = run.meant(header["data"]["source"]) if data is None else data
        return distill_child(run, parent, own, source, data is None, progress)


def distill_child(
    run: Run, parent: Parent, recipe: Recipe, source: str | Path, is_the_runs: bool, progress: Progress = SILENT
) -> Distilled:
    """As :func:`distill`, in a run that is open.

    Args:
        run: has a child.
        parent: of the run.
        recipe: says everything, the number of tokens too.
        source: of documents to learn from.
        is_the_runs: whether the run's other rows were dealt from it too.
        progress: told where it is.
    """
    settings = recipe.distillation
    held = read_tensors(run.folder / "data" / "tokens.safetensors")
    steps = check_training(parent, recipe, held["evaluation"].shape[1], run.folder)
    tokenizer = load_tokenizer(parent.path, trust_remote_code=recipe.trust_remote_code)

    rows = read_rows(run, recipe, str(source), is_the_runs, tokenizer, steps, parent, progress)
    child_inputs = run.header()["stages"]["child"]
    inputs = fingerprint(
        [
            child_inputs,
            run.header()["stages"]["distillation/data"],
            to_data(dataclasses.replace(settings, report_to=(), save_seconds=0.0)),
            recipe.seed,
            run_dtype(parent),
        ]
    )
    is_done = ranks.from_first(lambda: run.is_done("distilled", inputs) and (run.folder / "distilled").is_dir())
    if not is_done:
        ranks.on_first(lambda: check_disk(run, settings, steps))
    tried = [] if settings.finalists < 2 else try_finalists(run, inputs, parent, recipe, rows, held, progress)
    start, solution = run.folder / "child", run.folder / "solution"
    if tried:
        solution = run.folder / "distillation" / "finalists"
        start = solution / str(next(t["number"] for t in tried if t["won"]))
    library = Library.read(run.folder / "library", parent)
    of_card = (run, library, Solution.from_dict(read_json(solution / "solution.json")), recipe)
    learned: dict[str, Any] = {"learned_tokens": steps.count * steps.tokens, "learned_from": str(source)}
    if not is_done:
        train_child(
            run, inputs, start, parent, recipe, rows, held["scoring"], tokenizer,
            lambda folder: write_card(folder, *of_card, **learned), progress,
        )  # fmt: skip
    evaluations = evaluate(run, inputs, parent, recipe, held["evaluation"], progress)
    ranks.on_first(lambda: complete_card(run.folder / "distilled", *of_card, evaluations["after"], **learned))
    return Distilled(run.folder / "distilled", evaluations["before"], evaluations["after"], tried)


def check_training(parent: Parent, recipe: Recipe, length: int, folder: Path) -> Steps:
    """How a recipe's tokens will be cut into steps, for rows of ``length``.

    Raises:
        UsageError: something of the recipe does not go together, or with the number of processes.
    """
    settings = recipe.distillation
    steps = Steps.of(settings, settings.tokens, length, parent.runtime.world_size)
    training_arguments(settings, steps, parent.runtime, hidden_size_of(parent), recipe.seed, folder)  # raises
    return steps


# ---------------------------------------------------------------------------------------------- data


def read_rows(
    run: Run,
    recipe: Recipe,
    source: str,
    is_the_runs: bool,
    tokenizer: Any,
    steps: Steps,
    parent: Parent,
    progress: Progress,
) -> torch.Tensor:
    """Rows to learn from, ``[N, T]`` int32: none of evaluation's documents, nor copies of them that are not allowed."""
    wanted, overlap = steps.count * steps.rows, recipe.distillation.overlap or recipe.data.overlap
    inputs = fingerprint([run.header()["data"]["sha256"], wanted, None if is_the_runs else source, overlap])

    def make(folder: Path) -> None:
        held = read_tensors(run.folder / "data" / "tokens.safetensors")
        rows, description = find_rows(recipe, source, is_the_runs, tokenizer, held, wanted)
        check_vocabulary(int(rows.max()) + 1, parent.language_config.vocab_size)
        write_tensors(folder / "tokens.safetensors", {"training": rows.int()})
        write_json(folder / "data.json", description)

    with progress.stage("distillation data", 1, "source") as advance:
        run.do("distillation/data", inputs, make)
        advance(1)
    for warning in read_json(run.folder / "distillation" / "data" / "data.json")["warnings"]:
        progress.note(warning)
    return read_tensors(run.folder / "distillation" / "data" / "tokens.safetensors")["training"]


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


def train_child(
    run: Run,
    inputs: str,
    start: Path,
    parent: Parent,
    recipe: Recipe,
    rows: torch.Tensor,
    validation: torch.Tensor,
    tokenizer: Any,
    write_more: Callable[[Path], None],
    progress: Progress,
) -> None:
    """Train the child in ``start`` and write it as the run's ``distilled``, and more into the same folder."""
    settings, name = recipe.distillation, "global distillation"
    child = load(start, trust_remote_code=recipe.trust_remote_code)
    dtype = child.dtype
    child.float()
    cache = remembered(run, settings, parent, rows, progress)
    folder = run.folder / "distillation" / "global"
    training = _own_folder(folder / "checkpoints", inputs)
    with progress.stage("distill", settings.tokens, "tokens") as advance:
        trained = train(
            parent, child, rows, settings, tokens=settings.tokens, seed=recipe.seed, folder=training,
            curve=folder / "log.json", name=name, validation=validation, cache=cache, advance=advance,
        )  # fmt: skip

    def write(made: Path) -> None:
        _write_child(child, trained, dtype, tokenizer, made)
        write_more(made)

    run.do("distilled", inputs, write)
    ranks.on_first(lambda: shutil.rmtree(training, ignore_errors=True))


def _write_child(child: PreTrainedModel, trained: Trained, dtype: torch.dtype, tokenizer: Any, folder: Path) -> None:
    """In the dtype in which it was before."""
    with quiet_transformers():
        if trained.state is not None:
            state = {name: tensor.to(dtype) for name, tensor in trained.state.items()}
            child.config.dtype = dtype
            child.save_pretrained(folder, state_dict=state)
        else:
            child.eval().to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def remembered(
    run: Run, settings: DistillationRecipe, parent: Parent, rows: torch.Tensor, progress: Progress
) -> ParentLogits | None:
    """The parent's most likely tokens on the rows, if the recipe wants them kept."""
    if not settings.cache_top or not settings.kl:
        return None
    k = settings.cache_top
    folder = cache_folder(run.folder / "distillation" / "parent-logits", parent, rows, k, settings.temperature)
    at_once = max(1, settings.device_tokens // rows.shape[1])
    with progress.stage("parent's logits", len(rows), "rows") as advance:

        def make(advance: Callable[[float], None]) -> ParentLogits:
            return remember(parent, rows, k, settings.temperature, folder, at_once, advance)

        ranks.on_first(lambda: make(advance))
        return make(lambda done: None)  # read from the disk


def _own_folder(folder: Path, inputs: str) -> Path:
    """The folder for checkpoints of these inputs; those of others are removed."""

    def make() -> None:
        said = folder / "inputs.json"
        if folder.exists() and (not said.is_file() or read_json(said) != inputs):
            shutil.rmtree(folder)
        write_json(said, inputs)

    ranks.on_first(make)
    return folder


def check_disk(run: Run, settings: DistillationRecipe, steps: Steps) -> None:
    """Raises: InputError: checkpoints will not fit on the disk."""
    costs = read_json(run.folder / "solution" / "solution.json")["costs"]
    needed = costs["parameters"] * _CHECKPOINTED + costs["weight_bytes"]
    needed += ParentLogits.bytes_for(steps.count * steps.tokens, settings.cache_top) if settings.cache_top else 0
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise InputError(
            f"{run.folder}: distillation needs about {needed / 1e9:.1f} GB here for checkpoints, {free / 1e9:.1f} GB "
            "are free. Free some and run the same command again."
        )


# ---------------------------------------------------------------------------------------------- finalists


def try_finalists(
    run: Run,
    inputs: str,
    parent: Parent,
    recipe: Recipe,
    rows: torch.Tensor,
    held: Mapping[str, torch.Tensor],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Distil several solutions for a short while; the winner has the least KL on the scoring rows."""
    settings = recipe.distillation
    inputs = fingerprint(["finalists", inputs])
    place = run.folder / "distillation" / "finalists"
    if not ranks.from_first(lambda: run.is_done("distillation/finalists", inputs) and place.is_dir()):
        tokens = settings.finalist_tokens or max(1, settings.tokens // 10)
        found = _solutions(run, parent, recipe)
        if len(found.solutions) < settings.finalists:
            progress.note(f"only {len(found.solutions)} solutions differ enough to be tried")
        work = _own_folder(run.folder / "distillation" / "finalists.work", inputs)
        short = dataclasses.replace(settings, eval_every=0, report_to=())
        with progress.stage("finalists", tokens * len(found.solutions), "tokens") as advance:
            tried = [
                _try(work, i, solution, found.library, parent, recipe, short, tokens, rows, held["scoring"], advance)
                for i, solution in enumerate(found.solutions)
            ]
        best = min(range(len(tried)), key=lambda i: (tried[i].kl, i))
        records = [finalist.to_dict() | {"won": i == best} for i, finalist in enumerate(tried)]

        def write(folder: Path) -> None:
            shutil.copytree(work / f"{best}" / "child", folder / f"{best}")
            write_json(folder / "finalists.json", records)
            write_json(folder / "solution.json", found.solutions[best].to_dict())

        run.do("distillation/finalists", inputs, write)
        ranks.on_first(lambda: shutil.rmtree(work, ignore_errors=True))
    return list(read_json(place / "finalists.json"))


@dataclass(frozen=True)
class _Found:
    library: Library
    solutions: list[Solution]


def _solutions(run: Run, parent: Parent, recipe: Recipe) -> _Found:
    settings = recipe.distillation
    stored = at_stored_dtype(parent, recipe, run.folder)
    library = with_pairs(run, Library.read(run.folder / "library", stored))
    budget = Budget.from_dict(run.header()["budget"])
    costs = cost_table(stored, library, budget)
    if (times := kept_times(run)) is not None:
        costs = times.into(costs, library.alternatives)
    problem = search_problem(library, read_scores(run, library), recipe, costs, budget)
    own = Solution.from_dict(read_json(run.folder / "solution" / "solution.json"))
    solutions = ranks.from_first(
        lambda: diverse_solutions(problem, own, settings.finalists, settings.finalist_distance)
    )
    return _Found(library, solutions)


def _try(
    work: Path,
    number: int,
    solution: Solution,
    library: Library,
    parent: Parent,
    recipe: Recipe,
    settings: DistillationRecipe,
    tokens: int,
    rows: torch.Tensor,
    validation: torch.Tensor,
    advance: Callable[[float], None],
) -> Finalist:
    folder = work / f"{number}"
    if not (folder / "finalist.json").is_file():
        child = library.compose(solution.alternatives)
        own = copied(child)
        trained = train(
            parent, own, rows, settings, tokens=tokens, seed=recipe.seed, folder=folder / "checkpoints",
            curve=folder / "log.json", name=f"finalist {number}", validation=validation, advance=advance,
        )  # fmt: skip
        finalist = Finalist(number, solution.score, solution.costs["parameters"], tokens, trained.validation["kl"])

        def write() -> None:
            shutil.rmtree(folder / "child", ignore_errors=True)
            tokenizer = load_tokenizer(parent.path, trust_remote_code=recipe.trust_remote_code)
            _write_child(own, trained, library.parent.dtype, tokenizer, folder / "child")
            write_json(folder / "finalist.json", dataclasses.asdict(finalist))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

        ranks.on_first(write)
        del child, own
        gc.collect()
    else:
        advance(tokens)
    return Finalist(**read_json(folder / "finalist.json"))


def copied(child: PreTrainedModel) -> PreTrainedModel:
    """With weights of its own, in float32; a composed child shares the parent's."""
    tied: dict[int, torch.nn.Parameter] = {}
    for module in child.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in tied:
                tied[id(parameter)] = torch.nn.Parameter(parameter.detach().float().clone())
            module.register_parameter(name, tied[id(parameter)])
    return child


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate(
    run: Run, inputs: str, parent: Parent, recipe: Recipe, tokens: torch.Tensor, progress: Progress
) -> dict[str, Any]:
    """Parent against child, before and after, on rows that neither search nor training has seen."""

    def make(folder: Path) -> None:
        runtime, found = parent.runtime, {}
        for when, name in (("before", "child"), ("after", "distilled")):
            child = load(
                run.folder / name,
                dtype=runtime.dtype,
                device=runtime.device,
                trust_remote_code=recipe.trust_remote_code,
            ).eval()
            batch = recipe.scoring.rows_at_once(tokens.shape[1])
            found[when] = compare(parent.model, child, tokens, batch_sequences=batch, progress=progress).to_dict()
            del child
        write_json(folder / "evaluation.json", found)

    run.do("distillation/evaluation", inputs, make)
    return dict(read_json(run.folder / "distillation" / "evaluation" / "evaluation.json"))
