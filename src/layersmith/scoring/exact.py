"""Exact replace-one-block scores: the metrics of the parent with one subblock replaced by an alternative.

Nothing before the replaced subblock changes, so every run starts from the parent's hidden states there. The parent's
outputs, and all that depends on them alone, are computed once per batch of rows. Alternatives of one layer run through
the later layers as one batch. The head and the metrics run on spans of tokens, so that only the parent's logits are
held for a whole batch.

If the parent's weights stay on the disk, each layer runs on all hidden states that have to pass it before the next
layer is read: those of the parent, and those of alternatives of all layers before it.

If the parent cannot be run layer by layer (see :mod:`layersmith.execution.layerwise`), the whole model runs with one
layer exchanged.

Shapes: B rows, T tokens, D hidden, V vocabulary, A alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

from layersmith.execution.exchange import forward_with, hands_over, layer_outputs
from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import Batch, LayerwiseParent
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.run import ranks
from layersmith.scoring.forward import most_seconds, plan_start, read, start_all
from layersmith.scoring.metrics import Reference, Rows, as_rows, check_rows, labels_of, measure, row_means
from layersmith.scoring.work import Plan, Work, plan_all, share_of_layer

# Bytes of logits of one span of tokens. A larger span takes more memory; a smaller one uses the device less well.
SPAN_BYTES = {"cpu": 4 * 1024**2, "cuda": 512 * 1024**2}


@dataclass(frozen=True)
class Measured:
    """Metrics of one alternative, or of the parent if it is None, on the rows of a batch."""

    alternative: Alternative | None
    rows: Rows

    def __post_init__(self) -> None:
        check_rows(self.rows, "the parent" if self.alternative is None else self.alternative)


def run_exactly(
    library: Library,
    layerwise: LayerwiseParent | None,
    groups: Sequence[Sequence[Alternative]],
    rows: torch.Tensor,
    work: Work | None = None,
) -> Iterator[Measured]:
    """Metrics of the parent, then of alternatives, on rows ``[B, T]``.

    Args:
        library: The library of the alternatives.
        layerwise: The parent, run layer by layer; None if it cannot be.
        groups: Alternatives of one layer that run as one batch; groups of one layer are adjacent.
        rows: Token ids.
        work: Counts and times the work.
    """
    work = work or Work()
    if layerwise is None:
        yield from _run_whole(library, [a for group in groups for a in group], rows, work)
    else:
        yield from _run_layerwise(layerwise, groups, rows, work)


def amounts_of(
    library: Library, layerwise: LayerwiseParent | None, a: Alternative, rows: int, length: int
) -> dict[str, float]:
    """Kind of work to its amount, for an exact run of one alternative."""
    depth = len(library.parent.blocks)
    if layerwise is None:
        return {"whole": rows * (depth - a.layer + 1) / (depth + 1) if hands_over(library.parent) else rows}
    return {
        "build": 1.0,
        f"changed {a.subblock}": _share_of_layer(a) * layerwise.operations(a.layer, a.layer + 1, rows, length),
        "rest": layerwise.operations(a.layer + 1, depth, rows, length),
        "head": layerwise.head_operations(rows, length),
    }


def _share_of_layer(a: Alternative) -> float:
    """The approximate share of its layer that an alternative runs; after an attention, the FFN runs too."""
    return share_of_layer(a) + (0.5 if a.subblock == "attention" else 0.0)


def amounts_of_parent(layerwise: LayerwiseParent | None, rows: int, length: int) -> dict[str, float]:
    """Kind of work to its amount, for the run of the parent."""
    if layerwise is None:
        return {"whole": rows}
    forward = layerwise.operations(0, len(layerwise.layers), rows, length)
    return {"forward": forward, "reference": 2 * layerwise.head_operations(rows, length)}


def in_groups(alternatives: Sequence[Alternative], together: int) -> list[list[Alternative]]:
    """Groups of at most ``together`` alternatives of one layer, by layer."""
    by_layer: dict[int, list[Alternative]] = {}
    for alternative in alternatives:
        by_layer.setdefault(alternative.layer, []).append(alternative)
    return [
        of_layer[start : start + together]
        for _, of_layer in sorted(by_layer.items())
        for start in range(0, len(of_layer), together)
    ]


@torch.no_grad()
def _run_layerwise(
    layerwise: LayerwiseParent, groups: Sequence[Sequence[Alternative]], rows: torch.Tensor, work: Work
) -> Iterator[Measured]:
    depth, shape = len(layerwise.layers), rows.shape
    head_operations = layerwise.head_operations(*shape)
    with layerwise.arithmetic.needs():
        with work.doing("forward", layerwise.operations(0, depth, *shape)):
            batch = layerwise.start(rows)
            inputs = layerwise.hidden_states(batch)
        with work.doing("reference", 2 * head_operations):
            reference = Reference.of(*layerwise.head(rows, inputs[-1]), rows)
            parts = [reference.span(start, end) for start, end in spans(rows, layerwise.vocab_size)]
            of_parent = as_rows(row_means([measure(part, part.logits.clone(), part.hidden) for part in parts]))
    yield Measured(None, of_parent)
    for i, of_layer in groupby(groups, key=lambda group: group[0].layer):
        layer_groups = list(of_layer)
        layer_operations = layerwise.operations(i, i + 1, *shape)
        rest_operations = layerwise.operations(i + 1, depth, *shape)
        has_ffns = any(a.subblock == "ffn" for group in layer_groups for a in group)
        with work.doing("build", 0.0):
            stages = layerwise.split(i, batch, inputs[i])
        middle = None
        if has_ffns and stages.layout == "sequence":
            with work.doing("changed ffn", 0.0):
                middle = layerwise.run(batch, i, inputs[i], stages.attention)
        for group in layer_groups:
            with layerwise.arithmetic.needs():
                hidden = []
                for a in group:
                    with work.doing("build", 1.0):
                        module = layerwise.replacement(a)
                    with work.doing(f"changed {a.subblock}", _share_of_layer(a) * layer_operations):
                        hidden.append(layerwise.replaced(batch, a, inputs[i], middle, module))
                with work.doing("rest", len(group) * rest_operations):
                    after = _rest(layerwise, batch, i, torch.stack(hidden))
                with work.doing("head", len(group) * head_operations):
                    measured = _measured(layerwise, reference, rows, after)
            yield from (Measured(a, of_rows) for a, of_rows in zip(group, measured, strict=True))


# ---------------------------------------------------------------------------------------------- layer by layer


@dataclass(frozen=True)
class Job:
    """Alternatives to run on token ids ``[B, T]``."""

    rows: torch.Tensor
    alternatives: Sequence[Alternative]


@torch.no_grad()
def run_layer_by_layer(
    layerwise: LayerwiseParent, jobs: Sequence[Job], states: States, most_bytes: float, work: Work | None = None
) -> Generator[tuple[int, Measured], None, None]:
    """Metrics of the parent, then of alternatives in waves, on the rows of several batches.

    A wave reads each layer once, from the layer of its first alternative on, and gives its results at its end. Its size
    is limited by the bytes of its hidden states, and to about a minute of work, but never so small that reading layers
    takes a large share of the time. Processes that a parent is divided between do this together, and each gives the
    results whose heads it ran.

    Args:
        layerwise: The parent, run layer by layer.
        jobs: Alternatives and the rows on which they run.
        states: Stores hidden states between layers.
        most_bytes: Limit of the hidden states of a wave.
        work: Counts and times the work.

    Yields:
        The number of the job, and the metrics.
    """
    with layerwise.division.passing(states, partial(_homes, layerwise)) as shared:
        yield from _Waves(layerwise, jobs, shared, work or Work()).run(most_bytes)


def _homes(layerwise: LayerwiseParent, key: tuple[Any, ...]) -> Sequence[int]:
    """The processes that get what is put under a key: the parent's final hidden states and limits go to all of them.

    Of an alternative ``(identity, i, n, number)`` the final ones go to the process that has its head.
    """
    division, i = layerwise.division, key[1]
    if i < len(division.owners):
        return [division.owner_in_group(i, key[2])]
    return range(ranks.count()) if key[0] in ("parent", "limit") else [(key[2] + key[3]) % ranks.count()]


# Alternatives, each with the numbers of its jobs.
_Wave = list[tuple[Alternative, list[int]]]


@dataclass(frozen=True, eq=False)
class _Waves:
    """The work of :func:`run_layer_by_layer`.

    Where a parent is divided between processes, each runs some layers on all that passes through, and begins what is
    changed in them. ``(identity, i, n, number)`` is the input of layer i, or of the head, of an alternative.
    """

    layerwise: LayerwiseParent
    jobs: Sequence[Job]
    states: States
    work: Work

    @property
    def depth(self) -> int:
        return len(self.layerwise.layers)

    def run(self, most_bytes: float) -> Iterator[tuple[int, Measured]]:
        layerwise, jobs, states, work = self.layerwise, self.jobs, self.states, self.work
        started = start_all(layerwise, [job.rows for job in jobs], states, work)
        for n, job in enumerate(jobs):
            if self.layerwise.division.is_mine(n):
                with work.doing("head", self._of_head(n)):
                    (of_parent,) = by_spans(layerwise, job.rows, states, [("parent", self.depth, n)])
                yield n, Measured(None, of_parent)
        waves = list(_waves(layerwise, jobs, most_bytes, self._most_operations()))
        planned = _amounts_of_waves(layerwise, jobs, list(_waves(layerwise, jobs, most_bytes)))
        for kind, amount in _amounts_of_waves(layerwise, jobs, waves).items():
            work.plan(kind, amount - planned[kind])
        for wave in waves:
            self._through_layers(wave, started)
            yield from self._heads(wave)

    def _most_operations(self) -> float:
        """The limit of a wave, from the first process's times."""
        if ranks.is_first() or not self.layerwise.division.is_open:
            seconds = self.work.seconds_of("forward", 1.0)
            most = most_seconds(self.layerwise, self.work, 1) / seconds if seconds else math.inf
            self.states.put(("limit", self.depth), torch.tensor(most, dtype=torch.float64))
        return float(self.states.pop(("limit", self.depth)))

    def _of_head(self, n: int) -> float:
        return self.layerwise.head_operations(*self.jobs[n].rows.shape)

    def _through_layers(self, wave: _Wave, started: Mapping[int, Batch]) -> None:
        layerwise, jobs, states, work = self.layerwise, self.jobs, self.states, self.work
        of_group = [(a, [n for n in numbers if n in started]) for a, numbers in wave]
        for j in layerwise.division.here_in_group:
            if j < wave[0][0].layer:
                continue
            read(layerwise, j, work)
            for number, (alternative, numbers) in enumerate(of_group):
                if alternative.layer < j:
                    for n in numbers:
                        with work.doing("rest", layerwise.operations(j, j + 1, *jobs[n].rows.shape)):
                            hidden = states.pop((alternative.identity, j, n, number))
                            states.put((alternative.identity, j + 1, n, number), layerwise.run(started[n], j, hidden))
            of_layer = [(number, *entry) for number, entry in enumerate(of_group) if entry[0].layer == j]
            _begin(layerwise, jobs, started, of_layer, states, work)

    def _heads(self, wave: _Wave) -> Iterator[tuple[int, Measured]]:
        layerwise, depth = self.layerwise, self.depth
        for n, job in enumerate(self.jobs):
            run = [
                (number, a)
                for number, (a, numbers) in enumerate(wave)
                if n in numbers and layerwise.division.is_mine(n + number)
            ]
            if not run and layerwise.division.is_open:
                continue
            with self.work.doing("head", (1 + len(run)) * self._of_head(n)):
                changed = [(a.identity, depth, n, number) for number, a in run]
                _, *measured = by_spans(layerwise, job.rows, self.states, [("parent", depth, n), *changed])
                for key in changed:
                    self.states.forget(key)
            for (_, alternative), rows in zip(run, measured, strict=True):
                yield n, Measured(alternative, rows)


def plan_layer_by_layer(layerwise: LayerwiseParent, jobs: Sequence[Job], most_bytes: float, plan: Plan) -> None:
    """Plan the work of :func:`run_layer_by_layer` except for the runs of the alternatives."""
    plan_start(layerwise, [job.rows.shape for job in jobs], plan)
    for job in jobs:
        plan("head", layerwise.head_operations(*job.rows.shape))
    plan_all(plan, _amounts_of_waves(layerwise, jobs, list(_waves(layerwise, jobs, most_bytes))))


def _amounts_of_waves(layerwise: LayerwiseParent, jobs: Sequence[Job], waves: Sequence[_Wave]) -> dict[str, float]:
    """Work of waves except for the runs of their alternatives."""
    of_heads = sum(layerwise.head_operations(*job.rows.shape) for job in jobs)
    reading = sum(len(layerwise.layers) - wave[0][0].layer for wave in waves)
    return {"head": len(waves) * of_heads, "reading": reading}


def _waves(
    layerwise: LayerwiseParent, jobs: Sequence[Job], most_bytes: float, most_operations: float = math.inf
) -> Iterator[_Wave]:
    """Split alternatives, by layer, into waves within the limits; the last one of a wave may exceed the operations."""
    by_identity: dict[str, tuple[Alternative, list[int]]] = {}
    for n, job in enumerate(jobs):
        for alternative in job.alternatives:
            by_identity.setdefault(alternative.identity, (alternative, []))[1].append(n)
    wave: _Wave = []
    used, operations, depth = 0, 0.0, len(layerwise.layers)
    for alternative, numbers in sorted(by_identity.values(), key=lambda entry: entry[0].layer):
        size = sum(jobs[n].rows.numel() for n in numbers) * layerwise.bytes_of_a_token
        if wave and (used + size > most_bytes or operations > most_operations):
            yield wave
            wave, used, operations = [], 0, 0.0
        wave.append((alternative, numbers))
        used += size
        operations += sum(layerwise.operations(alternative.layer, depth, *jobs[n].rows.shape) for n in numbers)
    if wave:
        yield wave


def _begin(
    layerwise: LayerwiseParent,
    jobs: Sequence[Job],
    started: Mapping[int, Batch],
    entries: Sequence[tuple[int, Alternative, list[int]]],
    states: States,
    work: Work,
) -> None:
    """Run a layer with each of its alternatives, which are entries of a wave, with their numbers in it."""
    middles: set[int] = set()
    for number, alternative, numbers in entries:
        i, module = alternative.layer, None
        for n in numbers:
            hidden = states.get(("parent", i, n))
            with work.doing("build", 1.0):
                stages = layerwise.split(i, started[n], hidden)
                module = layerwise.replacement(alternative) if module is None else module
            amount = _share_of_layer(alternative) * layerwise.operations(i, i + 1, *jobs[n].rows.shape)
            with work.doing(f"changed {alternative.subblock}", amount):
                middle = None
                if stages.layout == "sequence" and alternative.subblock == "ffn":
                    if n not in middles:
                        middles.add(n)
                        states.put(("middle", i, n), layerwise.run(started[n], i, hidden, stages.attention))
                    middle = states.get(("middle", i, n))
                states.put(
                    (alternative.identity, i + 1, n, number),
                    layerwise.replaced(started[n], alternative, hidden, middle, module),
                )
    for n in middles:
        states.forget(("middle", entries[0][1].layer, n))


def by_spans(layerwise: LayerwiseParent, rows: torch.Tensor, states: States, keys: Sequence[Hashable]) -> list[Rows]:
    """Metrics of final hidden states ``[B, T, D]``, where the first key is the parent's; one span of logits is held."""
    by_key: list[list[dict[str, torch.Tensor]]] = [[] for _ in keys]
    labels = labels_of(rows)
    for start, end in spans(rows, layerwise.vocab_size):
        ids = rows[:, start:end]
        logits, read = layerwise.head(ids, states.part(keys[0], start, end))
        reference = Reference.of(logits, read, ids, labels[:, start:end])
        by_key[0].append(measure(reference, logits.clone(), read))
        for metrics, key in zip(by_key[1:], keys[1:], strict=True):
            metrics.append(measure(reference, *layerwise.head(ids, states.part(key, start, end))))
    return [as_rows(row_means(metrics)) for metrics in by_key]


# ---------------------------------------------------------------------------------------------- by batches


def _rest(layerwise: LayerwiseParent, batch: Batch, i: int, hidden: torch.Tensor) -> torch.Tensor:
    """Run hidden states ``[A, B, T, D]`` through the layers after ``i``."""
    many = batch.repeated(len(hidden))
    shape = hidden.shape
    flat = hidden.flatten(0, 1)
    for j in range(i + 1, len(layerwise.layers)):
        flat = layerwise.run(many, j, flat)
    return flat.view(shape)


def _measured(layerwise: LayerwiseParent, reference: Reference, rows: torch.Tensor, hidden: torch.Tensor) -> list[Rows]:
    """Metrics of every row for each of the A final hidden states ``[A, B, T, D]``."""
    result = []
    for final in hidden:
        of_spans = []
        for start, end in spans(rows, layerwise.vocab_size):
            logits, read = layerwise.head(rows[:, start:end], final[:, start:end])
            of_spans.append(measure(reference.span(start, end), logits, read))
        result.append(as_rows(row_means(of_spans)))
    return result


def spans(rows: torch.Tensor, vocab_size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each span of tokens of rows ``[B, T]`` whose logits are held at once."""
    num_rows, length = rows.shape
    size = max(1, SPAN_BYTES.get(rows.device.type, SPAN_BYTES["cuda"]) // (4 * vocab_size * num_rows))
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
