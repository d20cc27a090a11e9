"""What can be asked of a run, or of a model, after the main job: another budget, the report, an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersmith import pipeline
from layersmith.artifacts import read_json
from layersmith.data import evaluation_rows, load_tokenizer
from layersmith.errors import InputError, UsageError, did_you_mean
from layersmith.evaluation.compare import compare
from layersmith.heterogeneous.checkpoint import load, save
from layersmith.library.library import Library
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.progress import SILENT, Progress
from layersmith.recipe import DataRecipe, Recipe, ScoringRecipe
from layersmith.report.card import write_card
from layersmith.run import Run
from layersmith.runtime import Runtime
from layersmith.scoring.metrics import METRICS
from layersmith.scoring.score import losses
from layersmith.search.budget import Budget
from layersmith.search.choose import Choice, choose


def reopen(run: Run, descriptor: type[ModelDescriptor] | None = None) -> tuple[Recipe, Library]:
    """The recipe and library of a finished run.

    Raises:
        InputError: the run is not finished, or its parent is gone or another one now.
    """
    header = run.header()
    recipe = Recipe.from_dict(header["recipe"], str(run.folder / "run.json"))
    for stage in ("library", "scores"):
        if stage not in header["stages"]:
            raise InputError(f"{run.folder}: its {stage} are not finished. Run the same compress command again.")
    parent = pipeline.open_parent(header["parent"]["path"], recipe, run.folder, descriptor)
    if parent.identity != header["parent"]["identity"]:
        raise InputError(f"{parent.path}: not the parent of {run.folder} any more; its weights or config changed.")
    return recipe, Library.read(run.folder / "library", parent)


def search_again(
    run_folder: str | Path,
    budget: Budget,
    objective: str | None = None,
    out: str | Path | None = None,
    progress: Progress = SILENT,
    descriptor: type[ModelDescriptor] | None = None,
) -> tuple[Library, Choice]:
    """The best child of a finished run for another budget; written to ``out`` if that is given.

    Raises:
        Infeasible: no child of the run's library fits.
        UsageError: an unknown objective.
    """
    run = Run.existing(run_folder)
    if objective is not None and objective not in METRICS:
        raise UsageError(f"--objective {objective}: unknown. {did_you_mean(objective, METRICS)}")
    if out is not None and Path(out).exists():
        raise InputError(f"{out}: already there. Choose another folder.")
    recipe, library = reopen(run, descriptor)
    costs = pipeline.cost_table(library.parent, library, budget)
    scores = pipeline.read_scores(run, library)
    choice = choose(library.alternatives, losses(scores, objective or recipe.scoring.objective), costs, budget)
    if out is not None:
        with progress.stage("realize", 1, "child") as advance:
            own = library.with_parent(pipeline.at_stored_dtype(library.parent, recipe, run.folder))
            save(
                own.compose(choice.alternatives),
                out,
                tokenizer=load_tokenizer(library.parent.path),
                more=lambda folder: write_card(folder, run, library, choice, recipe),
            )
            advance(1)
    return library, choice


def report_again(run_folder: str | Path) -> Path:
    """Write a finished run's report anew."""
    run = Run.existing(run_folder)
    recipe, library = reopen(run)
    for stage, file in (("solution", "solution.json"), ("evaluation", "evaluation.json")):
        if not (run.folder / stage / file).is_file():
            raise InputError(f"{run.folder}: its {stage} is not finished. Run the same compress command again.")
    choice = Choice.from_dict(read_json(run.folder / "solution" / "solution.json"))
    evaluation = read_json(run.folder / "evaluation" / "evaluation.json")
    scores = pipeline.read_scores(run, library)
    costs = read_json(run.folder / "solution" / "costs.json")["alternatives"]
    return pipeline.finish(run, library, scores, choice, costs, evaluation, recipe).report


def evaluate_model(
    model: str | Path,
    data: str | Path,
    parent: str | Path | None = None,
    sequences: int = DataRecipe.evaluation_sequences,
    sequence_length: int = DataRecipe.sequence_length,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Loss and perplexity of a model, and its agreement with a parent, on text.

    Raises:
        UsageError: sizes that are not positive.
    """
    if sequences < 1 or sequence_length < 2:
        raise UsageError("--sequences must be at least 1 and --sequence-length at least 2.")
    runtime = Runtime.detect(device, "auto")
    loaded = load(model, dtype=runtime.dtype, device=runtime.device).eval()
    reference = load(parent, dtype=runtime.dtype, device=runtime.device).eval() if parent is not None else loaded
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or sequence_length
    length = min(sequence_length, longest)
    rows = evaluation_rows(data, load_tokenizer(model), sequence_length=length, sequences=sequences, seed=seed)
    batch = max(1, ScoringRecipe.batch_tokens // rows.shape[1])
    return compare(reference, loaded, rows, batch_sequences=batch, progress=progress).to_dict()
