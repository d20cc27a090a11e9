"""Scores of number formats: the loss increase when one subblock of the parent has its weights in a format.

The second-order estimate of :mod:`.second_order` needs only how the subblock's output changes, so a sweep with the
quantized subblocks gives the scores of all of them. Errors of rounding are small, where the estimate is accurate. In a
child many of them add up, so the scores of a format are scaled such that their sum is the KL divergence of the parent
with all subblocks in that format, which is measured.

The score of an alternative in a format is foretold by its parts: the score of its shape plus that of the format on the
parent's subblock. To second order this is E[(g . (s + r))^2] for the changes s of pruning and r of rounding; rounding
errors are nearly uncorrelated with what pruning changes, so the mixed term is small. docs/log.md has the error.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from layersmith.execution.exchange import few_tokens, logits_and_hidden
from layersmith.execution.hidden_states import States, StatesOnDisk
from layersmith.execution.layerwise import Batch, LayerwiseParent, split_layers, tokens_at_once
from layersmith.library.alternative import Alternative
from layersmith.library.formats import (
    EMBEDDINGS,
    InputMoments,
    embeddings_in,
    head_weight,
    in_formats,
    kv_key,
    matrices,
    quantized,
    quantized_embeddings,
    with_embeddings,
)
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept, layer_file, write_layer
from layersmith.quantization.formats import FORMATS, KV_FORMATS, format_named
from layersmith.recipe import ScoringRecipe
from layersmith.run.progress import Progress
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.estimated import row_seed
from layersmith.scoring.metrics import Reference, as_rows, measure, row_means
from layersmith.scoring.second_order import SeededBatch, estimate
from layersmith.scoring.silencing import Survey
from layersmith.scoring.task import KL

# Name of a format to the loss increase on each row, by the key of the parent's subblock in that format.
FormatScores = dict[str, dict[str, list[float]]]
_TABLES: tuple[tuple[Iterable[str], Callable[[str], str]], ...] = ((FORMATS, str), (KV_FORMATS, kv_key))


@dataclass(frozen=True, eq=False)
class FormatTask:
    """What formats are scored with.

    Attributes:
        library: The library of the parent.
        layerwise: The parent, run layer by layer.
        formats: Names of the formats.
        kv_alternatives: The parent's attentions with their keys and values in each format of the KV cache.
        calibration: ``[N, T]`` rows for GPTQ's second moments.
        scoring: ``[N, T]`` rows to score on.
        recipe: Settings of scoring.
        seed: Seed of the random signs.
        folder: Folder for quantized weights; those that an interrupted run left there are used.
        progress: Receives layers and rows.
    """

    library: Library
    layerwise: LayerwiseParent[Library]
    formats: Sequence[str]
    kv_alternatives: Sequence[Alternative]
    calibration: torch.Tensor
    scoring: torch.Tensor
    recipe: ScoringRecipe
    seed: int
    folder: Path
    progress: Progress

    def batches(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Numbers of the rows that run together."""
        most = tokens_at_once(self.library.parent, self.layerwise, self.recipe.batch_tokens)
        return list(torch.arange(len(rows)).split(max(1, most // rows.shape[1])))

    def states(self) -> States:
        return States() if self.library.parent.stream is None else StatesOnDisk(self.folder)


def score_formats(task: FormatTask) -> tuple[FormatScores, torch.Tensor | None]:
    """Score every subblock of the parent in every format, and embeddings with head.

    Returns:
        The scores; and the mean product of the head's inputs, from which it is quantized, or None if it has no format.
    """
    subblocks = [a for a in task.library.alternatives if a.is_parent]
    children = {name: [a.in_format(name) for a in subblocks] for name in task.formats}
    quantized = [a for child in children.values() for a in child]
    for a in task.kv_alternatives:
        children.setdefault(kv_key(a.kv_format), []).append(a)
    kept, moment = _quantized(task, quantized) if quantized else (task.library.kept, None)
    library = task.library.with_kept(kept)
    scores = _estimated(task, library, [*quantized, *task.kv_alternatives])
    evaluator = child_evaluator(library, task.scoring, task.recipe, task.progress, task.folder)
    measured = evaluator.run(list(children.values()), range(len(task.scoring)))
    result: FormatScores = {}
    for (name, child), rows in zip(children.items(), measured, strict=True):
        total = math.fsum(value for a in child for value in scores[a.key])
        factor = math.fsum(row[KL] for row in rows) / total if total > 0 else 1.0
        result[name] = {a.key: [factor * value for value in scores[a.key]] for a in child}
    if not with_embeddings(task.formats) or task.library.parent.stream is not None:
        return result, None
    for name, values in _of_embeddings(task, moment).items():
        result[name][EMBEDDINGS] = values
    return result, moment


@torch.no_grad()
def _of_embeddings(task: FormatTask, moment: torch.Tensor | None) -> dict[str, list[float]]:
    """KL of the parent with embeddings and head in each format that a program runs them in, on every row."""
    parent, losses = task.library.parent, {name: list[float]() for name in with_embeddings(task.formats)}
    rounded = {name: quantized_embeddings(parent.model, name, moment) for name in losses}
    with task.progress.stage("score embeddings", len(task.scoring), "rows") as advance:
        for row in task.scoring.to(parent.runtime.device).split(1):
            reference = Reference.of(*logits_and_hidden(parent, row), row)
            for name, values in losses.items():
                with embeddings_in(parent.model, rounded[name]):
                    values += [r[KL] for r in as_rows(row_means([measure(reference, *logits_and_hidden(parent, row))]))]
            advance(1)
    return losses


def foretold(
    shapes: Sequence[Alternative], losses: Mapping[str, float], scores: FormatScores
) -> dict[Alternative, float]:
    """Each alternative in each format to its loss, from the losses of shapes by key and the scores of formats."""
    formats, kv_formats = ([name for name in table if key(name) in scores] for table, key in _TABLES)
    every = {key: math.fsum(rows) / len(rows) for by_key in scores.values() for key, rows in by_key.items()}
    of_parent = {
        (a.layer, a.subblock, a.format, a.kv_format): every[a.key]
        for a in in_formats([a for a in shapes if a.is_parent], formats, kv_formats)
        if a.key in every
    }
    result = {}
    for a in in_formats(shapes, formats, kv_formats):
        parts = [key for key in ((a.format, ""), ("", a.kv_format)) if any(key)]
        if all((a.layer, a.subblock, *part) in of_parent for part in parts):
            result[a] = losses[a.shape.key] + math.fsum(of_parent[a.layer, a.subblock, *part] for part in parts)
    return result


def _estimated(task: FormatTask, library: Library, alternatives: Sequence[Alternative]) -> dict[str, list[float]]:
    """Second-order estimates; all rows pass a layer together if layers are read from the disk."""
    parent, batches, samples = library.parent, task.batches(task.scoring), range(task.recipe.samples)
    scores: dict[str, list[float]] = {a.key: [] for a in alternatives}
    layerwise = split_layers(parent, library)
    with task.progress.stage("score formats", len(task.scoring), "rows") as advance:
        for some in [batches] if parent.stream is not None else [[batch] for batch in batches]:
            seeded = [
                SeededBatch(
                    task.scoring[batch].to(parent.runtime.device),
                    [[row_seed(task.seed, k, row) for row in batch.tolist()] for k in samples],
                )
                for batch in some
            ]
            for values in estimate(layerwise, alternatives, Survey(), seeded, task.states()):
                for a in alternatives:
                    scores[a.key] += values[a.identity].tolist()
            advance(sum(map(len, some)))
    return scores


@torch.no_grad()
def _quantized(task: FormatTask, alternatives: Sequence[Alternative]) -> tuple[Kept, torch.Tensor | None]:
    """The parent's subblocks in formats, quantized on the parent's inputs, in files by layer; and the head's moment."""
    parent, states = task.library.parent, task.states()
    layerwise = task.layerwise
    depth, started, records = len(layerwise.layers), [], []
    few = layerwise.start(few_tokens(parent))
    for n, rows in enumerate(task.batches(task.calibration)):
        batch = layerwise.start(task.calibration[rows].to(parent.runtime.device))
        states.put(n, batch.embedded)
        started.append(batch.without_embedded())
    with task.progress.stage("quantize", depth, "layers") as advance:
        for i, layer in enumerate(layerwise.layers):
            layerwise.read(i)
            of_layer = [a for a in alternatives if a.layer == i]
            names = matrices(parent.model, parent.descriptor, layer, i, depth, task.library.axes[i])
            is_new = not layer_file(task.folder, i).is_file()
            moments = InputMoments(layer, [name for members in names.values() for name in members] if is_new else ())
            run = partial(layerwise.run, few, i, few.embedded)
            with moments.watching():
                for n, batch in enumerate(started):
                    states.put(n, layerwise.run(batch, i, states.get(n)))
            if is_new:
                of_names = {a.identity: dict.fromkeys(names[a.subblock], format_named(a.format)) for a in of_layer}
                weights = {
                    identity: quantized(layer, formats, moments, run).tensors()
                    for identity, formats in of_names.items()
                }
                write_layer(layer_file(task.folder, i), weights)
            records += [{"identity": a.identity, "layer": i, "weights": a.identity} for a in of_layer]
            advance(1)
    return Kept(tuple(records), {}, task.folder), _head_moment(task, started, states)


def _head_moment(task: FormatTask, started: Sequence[Batch], states: States) -> torch.Tensor | None:
    """The mean product of the head's inputs, from the outputs of the last layer.

    None if the head gets no format: it is no linear map, or stays on the disk.
    """
    parent = task.library.parent
    head = head_weight(parent.model)
    if head is None or parent.stream is not None or not with_embeddings(task.formats):
        return None
    moments = InputMoments(parent.model, [head])
    with moments.watching():
        for n, batch in enumerate(started):
            for ids, hidden in zip(batch.input_ids.split(1), states.get(n).split(1), strict=True):
                task.layerwise.head(ids, hidden)
    moment = moments.of(head)
    return None if moment is None else moment.float()  # as the run keeps it
