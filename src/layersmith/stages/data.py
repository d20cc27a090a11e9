"""Token rows for calibration, scoring, evaluation and training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from layersmith.data.splits import check_vocabulary, prepare
from layersmith.execution.parent import Parent
from layersmith.recipe import Recipe
from layersmith.run.artifacts import write_json, write_tensors
from layersmith.run.progress import Progress


def read_data(data: str | Path, recipe: Recipe, model: Parent, tokenizer: Any, progress: Progress) -> Any:
    """Token rows for calibration, scoring and evaluation."""
    longest = model.positions or recipe.data.sequence_length
    with progress.stage("data", 1, "source") as advance:
        rows = dataclasses.replace(recipe.data, sequence_length=min(recipe.data.sequence_length, longest))
        tokens = prepare(data, tokenizer, rows, recipe.seed)
        splits = (tokens.calibration, tokens.scoring, tokens.evaluation, tokens.training)
        largest = max(int(rows.max()) for rows in splits if len(rows))
        check_vocabulary(largest + 1, model.language_config.vocab_size)
        advance(1)
    for warning in tokens.description.get("warnings", ()):
        progress.note(warning)
    return tokens


def write_data(folder: Path, tokens: Any) -> None:
    rows = {name: getattr(tokens, name) for name in ("calibration", "scoring", "evaluation", "training")}
    write_tensors(folder / "tokens.safetensors", rows)
    write_json(folder / "data.json", tokens.description)
