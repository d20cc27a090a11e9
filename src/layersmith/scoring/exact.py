"""Exact replace-one-block scores: the parent with one alternative in the place of its subblock.

Nothing before the replaced subblock changes, so every run starts from the parent's hidden states there. What the
parent gives, and all that follows from it alone, is computed once for a batch of rows. Alternatives of one layer go on
together through the layers after it; the head and the metrics run on spans of tokens, so that logits of a whole batch
are held for the parent alone.

Where the parent's weights stay on the disk, a layer is done with everything that goes through it before the next is
read: with the parent's own rows, and with alternatives of all layers before it.

Where a parent cannot be taken apart (see :mod:`layersmith.execution.layerwise`) the whole model is run with a layer
exchanged.

Shapes: B rows, T tokens, D hidden, V vocabulary, A alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from layersmith.execution.exchange import forward_with, hands_over, layer_outputs
from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import Batch, LayerwiseParent
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.scoring.forward import most_seconds, plan_start, read, start_all
from layersmith.scoring.metrics import Reference, Rows, as_rows, labels_of, measure, row_means
from layersmith.scoring.work import Plan, Work, plan_all, share_of_layer

# Logits that are held at once for what is not the parent.
_SPAN_BYTES = {"cpu": 4 * 1024**2, "cuda": 512 * 1024**2}


@dataclass(frozen=True)
class Measured:
    """Metrics of one alternative on the rows of a batch; None stands for the parent."""

    alternative: Alternative | None
    rows: Rows


def run_exactly(
    library: Library,
    staged: LayerwiseParent | None,
    groups: Sequence[Sequence[Alternative]],
    rows: torch.Tensor,
    work: Work | None = None,
) -> Iterator[Measured]:
    """Metrics of alternatives on rows ``[B, T]``; the parent's own first.

    Args:
        library: of the alternatives.
        staged: the parent taken apart; None where it cannot be.
        groups: alternatives of one layer each that go on in one batch; those of a layer follow each other.
        rows: token ids.
        work: told of what is done.
    """
    work = work or Work()
    if staged is None:
        yield from _run_whole(library, [a for group in groups for a in group], rows, work)
    else:
        yield from _run_staged(staged, groups, rows, work)


def amounts_of(
    library: Library, staged: LayerwiseParent | None, a: Alternative, rows: int, length: int
) -> dict[str, float]:
    """Kinds of work of an exact run to their amounts."""
    depth = len(library.parent.blocks)
    if staged is None:
        return {"whole": rows * (depth - a.layer + 1) / (depth + 1) if hands_over(library.parent) else rows}
    return {
        "build": 1.0,
        f"own {a.subblock}": _share_of_layer(a) * staged.operations(a.layer, a.layer + 1, rows, length),
        "rest": staged.operations(a.layer + 1, depth, rows, length),
        "head": staged.head_operations(rows, length),
    }


def _share_of_layer(a: Alternative) -> float:
    """About what an alternative runs of its layer: that of an attention also the FFN behind it."""
    return share_of_layer(a) + (0.5 if a.subblock == "attention" else 0.0)


def amounts_of_parent(staged: LayerwiseParent | None, rows: int, length: int) -> dict[str, float]:
    """The same of what the parent itself gives."""
    if staged is None:
        return {"whole": rows}
    forward = staged.operations(0, len(staged.layers), rows, length)
    return {"forward": forward, "reference": 2 * staged.head_operations(rows, length)}


def in_groups(alternatives: Sequence[Alternative], together: int) -> list[list[Alternative]]:
    """Alternatives by layer, so many at a time."""
    by_layer: dict[int, list[Alternative]] = {}
    for alternative in alternatives:
        by_layer.setdefault(alternative.layer, []).append(alternative)
    return [own[at : at + together] for _, own in sorted(by_layer.items()) for at in range(0, len(own), together)]


@torch.no_grad()
def _run_staged(
    staged: LayerwiseParent, groups: Sequence[Sequence[Alternative]], rows: torch.Tensor, work: Work
) -> Iterator[Measured]:
    depth, shape = len(staged.layers), rows.shape
    of_head = staged.head_operations(*shape)
    with staged.arithmetic.needs():
        with work.doing("forward", staged.operations(0, depth, *shape)):
            batch = staged.start(rows)
            inputs = staged.hidden_states(batch)
        with work.doing("reference", 2 * of_head):
            reference = Reference.of(*staged.head(rows, inputs[-1]), rows)
            own_spans = [reference.span(start, end) for start, end in spans(rows, staged.vocab_size)]
            of_parent = as_rows(row_means([measure(own, own.logits.clone(), own.hidden) for own in own_spans]))
    yield Measured(None, of_parent)
    for i, of_layer in groupby(groups, key=lambda group: group[0].layer):
        own = list(of_layer)
        of_layer_itself, of_rest = staged.operations(i, i + 1, *shape), staged.operations(i + 1, depth, *shape)
        starts_there = any(a.subblock == "ffn" for group in own for a in group)
        with work.doing("build", 0.0):
            stages = staged.split(i, batch, inputs[i])
        middle = None
        if starts_there and stages.layout == "sequence":
            with work.doing("own ffn", 0.0):
                middle = staged.run(batch, i, inputs[i], stages.attention)
        for group in own:
            with staged.arithmetic.needs():
                hidden = []
                for a in group:
                    with work.doing("build", 1.0):
                        module = staged.replacement(a)
                    with work.doing(f"own {a.subblock}", _share_of_layer(a) * of_layer_itself):
                        hidden.append(staged.replaced(batch, a, inputs[i], middle, module))
                with work.doing("rest", len(group) * of_rest):
                    after = _rest(staged, batch, i, torch.stack(hidden))
                with work.doing("head", len(group) * of_head):
                    measured = _measured(staged, reference, rows, after)
            yield from (Measured(a, own_rows) for a, own_rows in zip(group, measured, strict=True))


# ---------------------------------------------------------------------------------------------- layer by layer


@dataclass(frozen=True)
class Job:
    """Rows ``[B, T]``, and alternatives to run on them."""

    rows: torch.Tensor
    alternatives: Sequence[Alternative]


@torch.no_grad()
def run_layer_by_layer(
    staged: LayerwiseParent, jobs: Sequence[Job], states: States, most_bytes: float, work: Work | None = None
) -> Iterator[tuple[int, Measured]]:
    """Metrics of alternatives on the rows of several batches; the parent's own first, then by waves of alternatives.

    A wave reads each layer from its first alternative's on once. Results come at its end: it ends when its hidden
    states take what they may, or after about a minute, unless layers would then be read too often.

    Args:
        staged: the parent taken apart.
        jobs: what is to be run.
        states: where hidden states wait.
        most_bytes: that those of a wave may take.
        work: told of what is done.

    Yields:
        The number of the job, and what was measured.
    """
    work = work or Work()
    started = start_all(staged, [job.rows for job in jobs], states, work)
    depth = len(staged.layers)

    def of_head(n: int) -> float:
        return staged.head_operations(*jobs[n].rows.shape)

    for n, job in enumerate(jobs):
        with work.doing("head", of_head(n)):
            (own,) = by_spans(staged, job.rows, states, [("parent", depth, n)])
        yield n, Measured(None, own)
    seconds = work.seconds_of("forward", 1.0)
    most_operations = most_seconds(staged, work, 1) / seconds if seconds else math.inf
    waves = list(_waves(staged, jobs, most_bytes, most_operations))
    planned = _amounts_of_waves(staged, jobs, list(_waves(staged, jobs, most_bytes)))
    for kind, amount in _amounts_of_waves(staged, jobs, waves).items():
        work.plan(kind, amount - planned[kind])
    for wave in waves:
        for j in range(wave[0][0].layer, depth):
            read(staged, j, work)
            for alternative, numbers in wave:
                if alternative.layer < j:
                    for n in numbers:
                        with work.doing("rest", staged.operations(j, j + 1, *jobs[n].rows.shape)):
                            hidden = staged.run(started[n], j, states.get((alternative.identity, n)))
                            states.put((alternative.identity, n), hidden)
            _begin(staged, jobs, started, [own for own in wave if own[0].layer == j], states, work)
        for n, job in enumerate(jobs):
            run = [alternative for alternative, numbers in wave if n in numbers]
            with work.doing("head", (1 + len(run)) * of_head(n)):
                changed = [(alternative.identity, n) for alternative in run]
                _, *measured = by_spans(staged, job.rows, states, [("parent", depth, n), *changed])
                for key in changed:
                    states.forget(key)
            for alternative, rows in zip(run, measured, strict=True):
                yield n, Measured(alternative, rows)


def plan_layer_by_layer(staged: LayerwiseParent, jobs: Sequence[Job], most_bytes: float, plan: Plan) -> None:
    """Tell what :func:`run_layer_by_layer` will do, but for the runs of the alternatives themselves."""
    plan_start(staged, [job.rows.shape for job in jobs], plan)
    for job in jobs:
        plan("head", staged.head_operations(*job.rows.shape))
    plan_all(plan, _amounts_of_waves(staged, jobs, list(_waves(staged, jobs, most_bytes))))


# Alternatives with the numbers of their jobs.
_Wave = list[tuple[Alternative, list[int]]]


def _amounts_of_waves(staged: LayerwiseParent, jobs: Sequence[Job], waves: Sequence[_Wave]) -> dict[str, float]:
    """What waves take beside the runs of their alternatives."""
    of_heads = sum(staged.head_operations(*job.rows.shape) for job in jobs)
    reading = sum(len(staged.layers) - wave[0][0].layer for wave in waves)
    return {"head": len(waves) * of_heads, "reading": reading}


def _waves(
    staged: LayerwiseParent, jobs: Sequence[Job], most_bytes: float, most_operations: float = math.inf
) -> Iterator[_Wave]:
    """Alternatives by layer: as many as may wait at once, and take so many operations or one more."""
    by_identity: dict[str, tuple[Alternative, list[int]]] = {}
    for n, job in enumerate(jobs):
        for alternative in job.alternatives:
            by_identity.setdefault(alternative.identity, (alternative, []))[1].append(n)
    wave: _Wave = []
    used, operations, depth = 0, 0.0, len(staged.layers)
    for alternative, numbers in sorted(by_identity.values(), key=lambda own: own[0].layer):
        size = sum(jobs[n].rows.numel() for n in numbers) * staged.bytes_of_a_token
        if wave and (used + size > most_bytes or operations > most_operations):
            yield wave
            wave, used, operations = [], 0, 0.0
        wave.append((alternative, numbers))
        used += size
        operations += sum(staged.operations(alternative.layer, depth, *jobs[n].rows.shape) for n in numbers)
    if wave:
        yield wave


def _begin(
    staged: LayerwiseParent,
    jobs: Sequence[Job],
    started: Sequence[Batch],
    own: Sequence[tuple[Alternative, list[int]]],
    states: States,
    work: Work,
) -> None:
    """Run a layer with each of its alternatives."""
    middles: set[int] = set()
    for alternative, numbers in own:
        i, module = alternative.layer, None
        for n in numbers:
            hidden = states.get(("parent", i, n))
            with work.doing("build", 1.0):
                stages = staged.split(i, started[n], hidden)
                module = staged.replacement(alternative) if module is None else module
            amount = _share_of_layer(alternative) * staged.operations(i, i + 1, *jobs[n].rows.shape)
            with work.doing(f"own {alternative.subblock}", amount):
                middle = None
                if stages.layout == "sequence" and alternative.subblock == "ffn":
                    if n not in middles:
                        middles.add(n)
                        states.put(("middle", n), staged.run(started[n], i, hidden, stages.attention))
                    middle = states.get(("middle", n))
                states.put((alternative.identity, n), staged.replaced(started[n], alternative, hidden, middle, module))
    for n in middles:
        states.pop(("middle", n))


def by_spans(staged: LayerwiseParent, rows: torch.Tensor, states: States, keys: Sequence[Hashable]) -> list[Rows]:
    """Metrics of hidden states ``[B, T, D]``, the parent's own first; nothing is held but those of a span."""
    found: list[list[dict[str, torch.Tensor]]] = [[] for _ in keys]
    labels = labels_of(rows)
    for start, end in spans(rows, staged.vocab_size):
        ids = rows[:, start:end]
        logits, read = staged.head(ids, states.part(keys[0], start, end))
        reference = Reference.of(logits, read, ids, labels[:, start:end])
        found[0].append(measure(reference, logits.clone(), read))
        for metrics, key in zip(found[1:], keys[1:], strict=True):
            metrics.append(measure(reference, *staged.head(ids, states.part(key, start, end))))
    return [as_rows(row_means(metrics)) for metrics in found]


# ---------------------------------------------------------------------------------------------- by batches


def _rest(staged: LayerwiseParent, batch: Batch, i: int, hidden: torch.Tensor) -> torch.Tensor:
    """``[A, B, T, D]`` through the layers after ``i``."""
    many = batch.repeated(len(hidden))
    shape = hidden.shape
    flat = hidden.flatten(0, 1)
    for j in range(i + 1, len(staged.layers)):
        flat = staged.run(many, j, flat)
    return flat.view(shape)


def _measured(staged: LayerwiseParent, reference: Reference, rows: torch.Tensor, hidden: torch.Tensor) -> list[Rows]:
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
def _run_whole(
    library: Library, alternatives: Sequence[Alternative], rows: torch.Tensor, work: Work
) -> Iterator[Measured]:
    parent = library.parent
    with work.doing("whole", len(rows)):
        logits, hidden, outputs = layer_outputs(parent, rows)
        reference = Reference.of(logits, hidden, rows)
        of_parent = as_rows(row_means([measure(reference, logits.clone(), hidden)]))
    yield Measured(None, of_parent)
    for alternative in alternatives:
        with work.doing("whole", amounts_of(library, None, alternative, *rows.shape)["whole"]):
            layer = library.layer(alternative)
            changed, changed_hidden = forward_with(parent, rows, outputs, alternative.layer, layer)
            measured = as_rows(row_means([measure(reference, changed, changed_hidden)]))
        yield Measured(alternative, measured)
