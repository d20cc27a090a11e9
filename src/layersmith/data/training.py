"""Rows for global distillation, which have nothing of the run's other rows.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layersmith.data.overlap import OverlapRule, without_copies
from layersmith.data.splits import evaluation_rows, holds_tokens, prepare
from layersmith.recipe import DataRecipe, Overlap


@dataclass(frozen=True)
class TrainingSource:
    """A source of documents to distil on.

    Attributes:
        path: The source.
        is_of_run: Whether the run's other rows come from it too.
        num_rows: Number of rows to read, at most.
        overlap: What to do with rows that evaluation also has.
    """

    path: str
    is_of_run: bool
    num_rows: int
    overlap: Overlap


def training_rows(
    source: TrainingSource, recipe: DataRecipe, tokenizer: Any, run_rows: Mapping[str, torch.Tensor], seed: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows ``[N, T]`` of a source that the run's other splits do not have, and their description.

    Args:
        source: The source.
        recipe: The recipe's section ``data``, with which the run's rows were made.
        tokenizer: Tokenizer of the parent.
        run_rows: The run's rows for ``scoring`` and ``evaluation``.
        seed: Seed of the order of documents.

    Raises:
        InputError: No rows are left without those of evaluation, or the recipe refuses such rows.
    """
    evaluation, path = run_rows["evaluation"], source.path
    length, decoder = evaluation.shape[1], None if holds_tokens(path) else tokenizer
    warnings: list[str] = []
    rows = torch.empty(0, length, dtype=torch.long)
    if source.is_of_run:
        larger = dataclasses.replace(
            recipe, sequence_length=length, training_sequences=source.num_rows, overlap="allow"
        )
        again = prepare(path, tokenizer, larger, seed)
        rule = OverlapRule(recipe.overlap, path)
        scoring = without_copies({"scoring": again.scoring}, again.evaluation, decoder, rule, [])[0]["scoring"]
        if torch.equal(again.evaluation, evaluation) and torch.equal(scoring, run_rows["scoring"]):
            rows = again.training
        else:
            warnings.append(
                f"{path}: the source has changed since the run's rows were made from it. Rows of evaluation are "
                "recognized by their text alone."
            )
    if not len(rows):
        reading = dataclasses.replace(recipe, sequence_length=length, evaluation_sequences=source.num_rows)
        rows = evaluation_rows(path, tokenizer, reading, seed)
    rule = OverlapRule(source.overlap, path, "distillation.overlap")
    kept, counts = without_copies({"training": rows}, evaluation, decoder, rule, warnings)
    rows = kept["training"]
    if len(rows) < source.num_rows:
        warnings.append(
            f"{path} has {len(rows) * length:,} tokens for training; each is used "
            f"{source.num_rows / len(rows):.1f} times."
        )
    description = {"source": path, "rows": len(rows), "wanted": source.num_rows, "warnings": warnings}
    overlapping = None if counts is None else counts["training"]
    return rows, description | {"overlap": source.overlap, "overlapping": overlapping}
