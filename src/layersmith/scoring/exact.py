"""Exact replace-one-block scores: the parent with one alternative in the place of its subblock.

Nothing before the replaced subblock changes, so every run starts from the parent's hidden states there. What the
parent gives, and all that follows from it alone, is computed once for a batch of rows. Alternatives of one layer go on
together through the layers after it; the head and the metrics run on spans of tokens, so that logits of a whole batch
are held for the parent alone.

Where a parent cannot be taken apart (see :mod:`layersmith.staged`) the whole model is run with a layer exchanged.

Shapes: B rows, T tokens, D hidden, V vocabulary, A alternatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from layersmith.execution import forward_with, layer_outputs
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.scoring.metrics import Reference, Rows, as_rows, measure, row_means
from layersmith.staged import Batch, StagedParent

# Logits that are held at once for what is not the parent.
_SPAN_BYTES = {"cpu": 4 * 1024**2, "cuda": 512 * 1024**2}


@dataclass(frozen=True)
class Measured:
    """Metrics of one alternative on the rows of a batch; None stands for the parent."""

    alternative: Alternative | None
    rows: Rows


def run_exactly(
    library: Library, staged: StagedParent | None, groups: Sequence[Sequence[Alternative]], rows: torch.Tensor
) -> Iterator[Measured]:
    """Metrics of alternatives on rows ``[B, T]``; the parent's own first.

    Args:
        library: of the alternatives.
        staged: the parent taken apart; None where it cannot be.
        groups: alternatives of one layer each that go on in one batch; those of a layer follow each other.
        rows: token ids.
    """
    if staged is None:
        yield from _run_whole(library, [a for group in groups for a in group], rows)
    else:
        yield from _run_staged(staged, groups, rows)


def in_groups(alternatives: Sequence[Alternative], together: int) -> list[list[Alternative]]:
    """Alternatives by layer, so many at a time."""
    by_layer: dict[int, list[Alternative]] = {}
    for alternative in alternatives:
        by_layer.setdefault(alternative.layer, []).append(alternative)
    return [own[at : at + together] for _, own in sorted(by_layer.items()) for at in range(0, len(own), together)]


@torch.no_grad()
def _run_staged(
    staged: StagedParent, groups: Sequence[Sequence[Alternative]], rows: torch.Tensor
) -> Iterator[Measured]:
    batch = staged.start(rows)
    with staged.arithmetic.needs():
        inputs = staged.hidden_states(batch)
        reference = Reference.of(*staged.head(rows, inputs[-1]), rows)
    own_spans = [reference.span(start, end) for start, end in spans(rows, staged.vocab_size)]
    yield Measured(None, as_rows(row_means([measure(own, own.logits.clone(), own.hidden) for own in own_spans])))
    for i, of_layer in groupby(groups, key=lambda group: group[0].layer):
        own = list(of_layer)
        stages = staged.stages(i, batch, inputs[i])
        starts_there = stages.layout == "sequence" and any(a.subblock == "ffn" for group in own for a in group)
        middle = staged.run(batch, i, inputs[i], stages.attention) if starts_there else None
        for group in own:
            with staged.arithmetic.needs():
                hidden = torch.stack([staged.replaced(batch, a, inputs[i], middle) for a in group])
                measured = _measured(staged, reference, rows, _rest(staged, batch, i, hidden))
            yield from (Measured(a, own_rows) for a, own_rows in zip(group, measured, strict=True))


def _rest(staged: StagedParent, batch: Batch, i: int, hidden: torch.Tensor) -> torch.Tensor:
    """``[A, B, T, D]`` through the layers after ``i``."""
    many = batch.repeated(len(hidden))
    shape = hidden.shape
    flat = hidden.flatten(0, 1)
    for j in range(i + 1, len(staged.layers)):
        flat = staged.run(many, j, flat)
    return flat.view(shape)


def _measured(staged: StagedParent, reference: Reference, rows: torch.Tensor, hidden: torch.Tensor) -> list[Rows]:
    """For each of A hidden states ``[A, B, T, D]`` that the last layer gives, the metrics of every row."""
    result = []
    for own in hidden:
        found = []
        for start, end in spans(rows, staged.vocab_size):
            logits, read = staged.head(rows[:, start:end], own[:, start:end])
            found.append(measure(reference.span(start, end), logits, read))
        result.append(as_rows(row_means(found)))
    return result


def spans(rows: torch.Tensor, vocab_size: int) -> Iterator[tuple[int, int]]:
    """Start and end of neighbouring tokens of rows ``[B, T]`` whose logits are held at once."""
    num_rows, length = rows.shape
    size = max(1, _SPAN_BYTES.get(rows.device.type, _SPAN_BYTES["cuda"]) // (4 * vocab_size * num_rows))
    for start in range(0, length, size):
        yield start, min(length, start + size)


@torch.inference_mode()
def _run_whole(library: Library, alternatives: Sequence[Alternative], rows: torch.Tensor) -> Iterator[Measured]:
    parent = library.parent
    logits, hidden, outputs = layer_outputs(parent, rows)
    reference = Reference.of(logits, hidden, rows)
    yield Measured(None, as_rows(row_means([measure(reference, logits.clone(), hidden)])))
    for alternative in alternatives:
        layer = library.layer(alternative)
        changed, changed_hidden = forward_with(parent, rows, outputs, alternative.layer, layer)
        yield Measured(alternative, as_rows(row_means([measure(reference, changed, changed_hidden)])))
