"""Scores of number formats: the loss increase when one subblock of the parent has its weights in a format.

The second-order estimate of :mod:`.second_order` needs only how the subblock's output changes, so a sweep with the
quantized subblocks gives the scores of all of them. Errors of rounding are small, where the estimate is accurate. In a
child many of them add up, so the scores of a format are scaled such that their sum is the KL divergence of the parent
with all subblocks in that format, which is measured.

The score of an alternative in a format is foretold by its parts: the score of its shape plus that of the format on the
parent's subblock. To second order this is E[(g . (s + r))^2] for the changes s of pruning and r of rounding; rounding
errors are nearly uncorrelated with what pruning changes, so the mixed term is small. docs/log.md has the error.

Several processes divide this as they divide other work: layers are quantized where they are dealt to; estimates are
divided by layers if the parent stays on the disk, else by rows.

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
from layersmith.run import ranks
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
        folder: Folder for quantized weights, which all processes share; those that an interrupted run left are used.
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
    """Score every subblock of the parent in every format, and embeddings with head; all processes call this.

    Returns:
        The scores; and the mean product of the head's inputs, from which it is quantized, or None if it has no format.

    Raises:
        Exception: As from :func:`.ranks.together`.
    """
    subblocks = [a for a in task.library.alternatives if a.is_parent]
    children = {name: [a.in_format(name) for a in subblocks] for name in task.formats}
    quantized = [a for child in children.values() for a in child]
    for a in task.kv_alternatives:
        children.setdefault(kv_key(a.kv_format), []).append(a)
    library, moment = task.library, None
    if quantized:
        kept, of_head = ranks.together(lambda: _quantized(task, quantized))
        library = library.with_kept(kept)
        moment = next((m for m in ranks.from_each(lambda: of_head) if m is not None), None)
    scores = _estimated(task, library, [*quantized, *task.kv_alternatives])
    evaluator = child_evaluator(library, task.scoring, task.recipe, task.progress, task.folder)
    measured = evaluator.run_in_all(list(children.values()), range(len(task.scoring)))
    result: FormatScores = {}
    for (name, child), rows in zip(children.items(), measured, strict=True):
        total = math.fsum(value for a in child for value in scores[a.key])
        factor = math.fsum(row[KL] for row in rows) / total if total > 0 else 1.0
        result[name] = {a.key: [factor * value for value in scores[a.key]] for a in child}
    for name, values in _of_embeddings(task, moment).items():
        result[name][EMBEDDINGS] = values
    return result, moment


@torch.no_grad()
def _of_embeddings(task: FormatTask, moment: torch.Tensor | None) -> dict[str, list[float]]:
    """KL of the parent with embeddings and head in each format that a program runs them in, on every row."""
    parent, names = task.library.parent, with_embeddings(task.formats)
    if not names or parent.stream is not None:
        return {}
    mine = range(ranks.number(), len(task.scoring), ranks.count())
    rounded = {name: quantized_embeddings(parent.model, name, moment) for name in names}

    def of_rows() -> dict[tuple[str, int], float]:
        found = {}
        with task.progress.stage("score embeddings", len(mine), "rows") as advance:
            for number in mine:
                row = task.scoring[number : number + 1].to(parent.runtime.device)
                reference = Reference.of(*logits_and_hidden(parent, row), row)
                for name in names:
                    with embeddings_in(parent.model, rounded[name]):
                        measured = row_means([measure(reference, *logits_and_hidden(parent, row))])
                    found[name, number] = as_rows(measured)[0][KL]
                advance(1)
        return found

    found = {key: value for of_process in ranks.from_each(of_rows) for key, value in of_process.items()}
    return {name: [found[name, number] for number in range(len(task.scoring))] for name in names}


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
    batches = list(enumerate(task.batches(task.scoring)))
    layerwise = split_layers(library.parent, library, by_all=True)
    mine = batches if layerwise.division.is_open else batches[ranks.number() :: ranks.count()]
    together = [mine] if layerwise.streamed else [[batch] for batch in mine]

    def estimated() -> dict[tuple[str, int], list[float]]:
        found = {}
        with task.progress.stage("score formats", sum(len(rows) for _, rows in mine), "rows") as advance:
            for some in together:
                seeded = [_seeded(task, rows) for _, rows in some]
                values = estimate(layerwise, alternatives, Survey(), seeded, task.states())
                for (n, rows), of_batch in zip(some, values, strict=True):
                    found.update({(identity, n): of_rows.tolist() for identity, of_rows in of_batch.items()})
                    advance(len(rows))
        return found

    found = {key: values for of_process in ranks.from_each(estimated) for key, values in of_process.items()}
    return {a.key: [value for n, _ in batches for value in found[a.identity, n]] for a in alternatives}


def _seeded(task: FormatTask, rows: torch.Tensor) -> SeededBatch:
    samples = range(task.recipe.samples)
    seeds = [[row_seed(task.seed, k, row) for row in rows.tolist()] for k in samples]
    return SeededBatch(task.scoring[rows].to(task.library.parent.runtime.device), seeds)


@torch.no_grad()
def _quantized(task: FormatTask, alternatives: Sequence[Alternative]) -> tuple[Kept, torch.Tensor | None]:
    """The parent's subblocks in formats, quantized on the parent's inputs, in files by layer; and the head's moment.

    Only the process that has the last layer has the moment.
    """
    layerwise, started, moment = task.layerwise, [], None
    division = layerwise.division
    few = layerwise.start(few_tokens(task.library.parent))
    division.is_open = ranks.are_several()  # also of a parent in memory: quantizing takes longer than running
    try:
        mine = division.here
        with (
            division.passing(task.states()) as states,
            task.progress.stage("quantize", len(mine), "layers") as advance,
        ):
            for n, rows in enumerate(task.batches(task.calibration)):
                batch = layerwise.start(task.calibration[rows].to(task.library.parent.runtime.device))
                if 0 in mine:
                    states.put(("calibration", 0, n), batch.embedded)
                started.append(batch.without_embedded())
            for i in mine:
                outputs = _quantize_layer(task, [a for a in alternatives if a.layer == i], i, few, started, states)
                if i + 1 == len(layerwise.layers):
                    moment = _head_moment(task, started, outputs)
                advance(1)
    finally:
        division.is_open = False
    of_layers = sorted(alternatives, key=lambda a: a.layer)
    records = tuple({"identity": a.identity, "layer": a.layer, "weights": a.identity} for a in of_layers)
    return Kept(records, {}, task.folder), moment


def _head_moment(task: FormatTask, started: Sequence[Batch], outputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The mean product of the head's inputs, from the outputs of the last layer.

    None if the head gets no format: it is no linear map, or stays on the disk.
    """
    parent = task.library.parent
    head = head_weight(parent.model)
    if head is None or parent.stream is not None or not with_embeddings(task.formats):
        return None
    moments = InputMoments(parent.model, [head])
    with moments.watching():
        for batch, output in zip(started, outputs, strict=True):
            for ids, hidden in zip(batch.input_ids.split(1), output.split(1), strict=True):
                task.layerwise.head(ids, hidden)
    moment = moments.of(head)
    return None if moment is None else moment.float()  # as the run keeps it


def _quantize_layer(
    task: FormatTask, of_layer: Sequence[Alternative], i: int, few: Batch, started: Sequence[Batch], states: States
) -> list[torch.Tensor]:
    """Write the file of layer ``i`` unless it is there, and pass all batches on; returns outputs of the last."""
    parent, layerwise = task.library.parent, task.layerwise
    layer, depth, file = layerwise.layers[i], len(layerwise.layers), layer_file(task.folder, i)
    layerwise.read(i)
    names = matrices(parent.model, parent.descriptor, layer, i, depth, task.library.axes[i])
    is_new = not file.is_file()
    moments = InputMoments(layer, [name for members in names.values() for name in members] if is_new else ())
    outputs: list[torch.Tensor] = []
    with moments.watching():
        for n, batch in enumerate(started):
            output = layerwise.run(batch, i, states.pop(("calibration", i, n)))
            if i + 1 < depth:
                states.put(("calibration", i + 1, n), output)
            elif parent.stream is None:
                outputs.append(output)
    if is_new:
        run = partial(layerwise.run, few, i, few.embedded)
        of_names = {a.identity: dict.fromkeys(names[a.subblock], format_named(a.format)) for a in of_layer}
        weights = {
            identity: quantized(layer, formats, moments, run).tensors() for identity, formats in of_names.items()
        }
        write_layer(file, weights)
    return outputs
