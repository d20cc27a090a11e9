"""Evaluates solutions as whole models: the true loss of a child on scoring rows, not the sum of its scores.

Children with equal first layers share the outputs of these layers. For each batch of rows, solutions are sorted by
their layers, and each starts at the first layer in which it differs from the solution before it. The parent's logits
are computed once per batch. If the parent's weights stay on the disk, all solutions and rows pass through a layer
before the next one is read. If the parent cannot be run layer by layer (see :mod:`layersmith.execution.layerwise`), the
whole model runs with layers exchanged.

Work is counted in forward passes of the parent over all rows.

Shapes: N rows, B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.execution.exchange import exchanged, logits_and_hidden
from layersmith.execution.hidden_states import States, StatesOnDisk
from layersmith.execution.layerwise import Batch, LayerwiseParent, NotLayerwise, split_layers, tokens_at_once
from layersmith.library.alternative import Alternative, no_op_of_other
from layersmith.library.library import Library
from layersmith.recipe import ScoringRecipe
from layersmith.run.progress import Progress
from layersmith.scoring.exact import by_spans, spans
from layersmith.scoring.exchanges import ExchangeEffects, exchange_effects
from layersmith.scoring.metrics import Reference, Rows, as_rows, check_rows, measure, row_means

Places = tuple[tuple[Alternative, ...], ...]  # the changed alternatives of every layer

# Neighbours of a solution share most of their layers, so built layers are kept, up to this share of the parent's
# weights.
_KEPT_SHARE = 0.5


class _Layers:
    """Layers with alternatives, of which the last used stay built, and their numbers of parameters."""

    def __init__(self, library: Library):
        self.library, parent = library, library.parent
        self._of_parent = [sum(p.numel() for p in layer.parameters()) for layer in parent.layers]
        self.head = sum(p.numel() for p in parent.head.parameters())
        self.total = sum(self._of_parent) + self.head
        self._built: dict[tuple[Alternative, ...], nn.Module] = {}
        self._sizes: dict[tuple[Alternative, ...], int] = {}

    def module(self, i: int, changes: tuple[Alternative, ...]) -> nn.Module:
        """The parent's layer ``i`` with these alternatives."""
        if not changes:
            return self.library.parent.layers[i]
        if changes in self._built:
            self._built[changes] = self._built.pop(changes)  # moves it to the end: the least recently used goes first
        else:
            self._built[changes] = self.library.layer(*changes)
            kept = {key: sum(p.numel() for p in layer.parameters()) for key, layer in self._built.items()}
            while sum(kept.values()) > _KEPT_SHARE * self.total and len(kept) > 1:
                oldest = next(iter(kept))
                del self._built[oldest], kept[oldest]
        return self._built[changes]

    def num_parameters(self, i: int, changes: tuple[Alternative, ...]) -> int:
        """Parameters of layer ``i`` with these alternatives."""
        if not changes:
            return self._of_parent[i]
        if changes not in self._sizes:
            self._sizes[changes] = self.library.num_parameters(*changes)
        return self._sizes[changes]

    def num_parameters_from(self, first: int, places: Places) -> int:
        """Parameters of a child's layers from ``first`` on, and of its head."""
        return sum(self.num_parameters(i, changes) for i, changes in enumerate(places) if i >= first) + self.head


@dataclass(eq=False)
class ChildEvaluator:
    """Evaluates solutions on rows of tokens.

    Attributes:
        library: The library of their alternatives.
        layerwise: The parent, run layer by layer; None if it cannot be.
        tokens: Token ids of the rows, ``[N, T]``.
        batch_rows: Rows in a batch.
        folder: Stores hidden states if the parent's weights stay on the disk.
        spill_bytes: Limit of these hidden states.
        passes: Work done so far.
    """

    library: Library
    layerwise: LayerwiseParent | None
    tokens: torch.Tensor
    batch_rows: int
    folder: Path = Path(tempfile.gettempdir())
    spill_bytes: float = math.inf
    passes: float = 0.0
    _ends: dict[tuple[int, ...], States] = field(default_factory=dict)
    _started: dict[tuple[int, ...], tuple[Batch | None, Reference]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._layers = _Layers(self.library)

    @torch.no_grad()
    def run(
        self,
        solutions: Sequence[Sequence[Alternative]],
        rows: Sequence[int],
        advance: Callable[[float], None] = lambda rows: None,
    ) -> list[Rows]:
        """Metrics of every solution on each of some rows; ``advance`` is called with the number of rows just done."""
        order = sorted(range(len(solutions)), key=lambda k: _sort_key(self._places(solutions[k])))
        sorted_places = [self._places(solutions[k]) for k in order]
        results: list[Rows] = [[] for _ in solutions]
        batches = [tuple(rows[start : start + self.batch_rows]) for start in range(0, len(rows), self.batch_rows)]
        method = self._from_shared_layers if self.layerwise is not None else self._by_exchange
        parts: Iterable[list[tuple[int, ...]]] = ([batch] for batch in batches)
        if self.streamed:
            self._ends = {batch: kept for batch, kept in self._ends.items() if batch in batches}
            method, parts = self._layer_by_layer, self._within_limit(batches, len(solutions))
        for part in parts:
            for index, result in method(sorted_places, part).items():
                check_rows(result, "a candidate child")
                results[order[index]] += result
            advance(sum(map(len, part)))
        return results

    @property
    def streamed(self) -> bool:
        """Whether the parent's weights stay on the disk until a layer runs."""
        return self.library.parent.stream is not None

    def cost(self, solutions: Sequence[Sequence[Alternative]], num_rows: int) -> float:
        """Forward passes that :meth:`run` takes without the parent's; shared layers count once."""
        total, before = 0.0, None
        for places in sorted((self._places(solution) for solution in solutions), key=_sort_key):
            first = 0 if before is None or self.layerwise is None else _first_difference(before, places)
            total += self._layers.num_parameters_from(first, places)
            before = places
        return total / self._layers.total * num_rows / len(self.tokens)

    def exchange_effects(
        self, solution: Sequence[Alternative], others: Sequence[Alternative], rows: Sequence[int], seed: int
    ) -> ExchangeEffects:
        """Effects of exchanges for other alternatives on a solution's loss; only where ``layerwise`` is not None."""
        assert self.layerwise is not None
        batches = [self._tokens_of(rows[k : k + self.batch_rows]) for k in range(0, len(rows), self.batch_rows)]
        self.passes += self.cost_of_effects(solution, others, len(rows))
        return exchange_effects(self.layerwise, solution, others, batches, seed, self._states())

    def cost_of_effects(self, solution: Sequence[Alternative], others: Sequence[Alternative], num_rows: int) -> float:
        """Work of :meth:`exchange_effects`: a forward pass of the parent, two of the child, and two backward passes."""
        child = self._layers.num_parameters_from(0, self._places(solution))
        alone = sum(self.library.num_parameters(a, no_op_of_other(a)) for a in others)
        return (self._layers.total + 4 * child + alone) / self._layers.total * num_rows / len(self.tokens)

    # ------------------------------------------------------------------------------------------ three methods

    def _from_shared_layers(
        self, solutions: Sequence[Places], batches: Sequence[tuple[int, ...]]
    ) -> Mapping[int, Rows]:
        """Run each solution from the first layer in which it differs from the one before it."""
        layerwise, (rows,) = self.layerwise, batches
        assert layerwise is not None
        batch, reference = self._start(rows)
        assert batch is not None
        results: dict[int, Rows] = {}
        states: list[torch.Tensor] = [batch.embedded]  # the inputs of the layers that are known
        before: Places | None = None
        for index, places in enumerate(solutions):
            first = 0 if before is None else _first_difference(before, places)
            del states[first + 1 :]
            for i, changes in enumerate(places[first:], first):
                states.append(layerwise.run(batch, i, states[-1], self._layers.module(i, changes)))
                self._count(self._layers.num_parameters(i, changes), rows)
            measured = []
            for start, end in spans(batch.input_ids, layerwise.vocab_size):
                logits, read = layerwise.head(batch.input_ids[:, start:end], states[-1][:, start:end])
                measured.append(measure(reference.span(start, end), logits, read))
            self._count(self._layers.head, rows)
            results[index] = as_rows(row_means(measured))
            before = places
        return results

    def _layer_by_layer(self, solutions: Sequence[Places], batches: Sequence[tuple[int, ...]]) -> Mapping[int, Rows]:
        """Run shared leading layers once. In the first call for some rows, the parent runs as one of the solutions."""
        layerwise = self.layerwise
        assert layerwise is not None
        states, depth = self._states(), len(layerwise.layers)
        known = self._ends.keys() >= set(batches)
        wanted = list(solutions) if known else [*solutions, ((),) * depth]
        started = [layerwise.start(self._tokens_of(rows)) for rows in batches]
        for n, batch in enumerate(started):
            states.put(((), n), batch.embedded)
            started[n] = batch.without_embedded()
        for i in range(depth):
            layerwise.read(i)
            reached = dict.fromkeys(places[: i + 1] for places in wanted)
            for changes in dict.fromkeys(prefix[i] for prefix in reached):
                module = self.library.layer(*changes) if changes else None
                for prefix in reached:
                    if prefix[i] == changes:
                        for n, rows in enumerate(batches):
                            hidden = states.get((prefix[:i], n))
                            states.put((prefix, n), layerwise.run(started[n], i, hidden, module))
                            self._count(self._layers.num_parameters(i, changes), rows)
                del module  # frees its weights
            for prefix in dict.fromkeys(places[:i] for places in wanted):
                for n in range(len(batches)):
                    states.forget((prefix, n))
        if not known:
            kept = self._states()
            for n, rows in enumerate(batches):
                kept.put(rows, states.get((wanted[-1], n)))
            self._ends |= dict.fromkeys(batches, kept)
        results: dict[int, Rows] = {k: [] for k in range(len(solutions))}
        for n, rows in enumerate(batches):
            states.put("parent", self._ends[rows].get(rows))
            keys = ["parent", *((places, n) for places in solutions)]
            _, *measured = by_spans(layerwise, self._tokens_of(rows), states, keys)
            states.forget("parent")
            for k, metrics in enumerate(measured):
                results[k] += metrics
                self._count(self._layers.head, rows)
        return results

    def _within_limit(self, batches: Sequence[tuple[int, ...]], solutions: int) -> Iterator[list[tuple[int, ...]]]:
        """Split batches so that their hidden states before and after a layer are within the limit of bytes."""
        assert self.layerwise is not None
        of_batch = 2 * (solutions + 1) * self.batch_rows * self.tokens.shape[1] * self.layerwise.bytes_of_a_token
        size = max(1, int(min(len(batches), self.spill_bytes / of_batch)))
        for start in range(0, len(batches), size):
            yield list(batches[start : start + size])

    def _states(self) -> States:
        return StatesOnDisk(self.folder, self.spill_bytes) if self.streamed else States()

    def _by_exchange(self, solutions: Sequence[Places], batches: Sequence[tuple[int, ...]]) -> Mapping[int, Rows]:
        """Run the whole model with exchanged layers."""
        (rows,) = batches
        _, reference = self._start(rows)
        results = {}
        for index, places in enumerate(solutions):
            layers = {i: self._layers.module(i, changes) for i, changes in enumerate(places) if changes}
            with exchanged(self.library.parent, layers):
                logits, hidden = logits_and_hidden(self.library.parent, self._tokens_of(rows))
            self._count(self._layers.num_parameters_from(0, places), rows)
            results[index] = as_rows(row_means([measure(reference, logits, hidden)]))
        return results

    def _start(self, rows: tuple[int, ...]) -> tuple[Batch | None, Reference]:
        """The embedded rows and the parent's outputs on them; kept for the last batch."""
        if rows not in self._started:
            self._started.clear()
            ids = self._tokens_of(rows)
            if self.layerwise is None:
                batch, (logits, hidden) = None, logits_and_hidden(self.library.parent, ids)
            else:
                batch = self.layerwise.start(ids)
                logits, hidden = self.layerwise.head(ids, self.layerwise.hidden_states(batch)[-1])
            self._count(self._layers.total, rows)
            self._started[rows] = batch, Reference.of(logits, hidden, ids)
        return self._started[rows]

    def _tokens_of(self, rows: Sequence[int]) -> torch.Tensor:
        return self.tokens[list(rows)].to(self.library.parent.runtime.device)

    def _places(self, solution: Sequence[Alternative]) -> Places:
        places: list[tuple[Alternative, ...]] = [() for _ in self.library.parent.blocks]
        for alternative in sorted(solution, key=lambda a: a.subblock):
            if not alternative.is_parent:
                places[alternative.layer] += (alternative,)
        return tuple(places)

    def _count(self, weights: int, rows: Sequence[int]) -> None:
        self.passes += weights / self._layers.total * len(rows) / len(self.tokens)


def _first_difference(one: Places, other: Places) -> int:
    """The first layer in which two solutions differ; the number of layers if they do not."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _sort_key(places: Places) -> list[str]:
    return ["|".join(a.name for a in changes) for changes in places]


def child_evaluator(
    library: Library, tokens: torch.Tensor, recipe: ScoringRecipe, progress: Progress, folder: Path | None = None
) -> ChildEvaluator:
    """An evaluator of solutions on rows ``[N, T]``.

    Args:
        library: The library of their alternatives.
        tokens: Token ids of the rows.
        recipe: Sets the tokens in a batch, and the limit of hidden states on the disk.
        progress: Gets a note if the parent cannot be run layer by layer.
        folder: Stores hidden states if the parent's weights stay on the disk; default: the folder of temporary files.

    Raises:
        UnsupportedModel: The parent's weights stay on the disk, and it cannot be run layer by layer.
    """
    parent, batch_tokens = library.parent, recipe.batch_tokens
    try:
        layerwise = split_layers(library.parent, library)
    except NotLayerwise as reason:
        if parent.stream is not None:
            raise UnsupportedModel(
                f"{parent.path}: the model is read from the disk layer by layer, but {reason}, so its children cannot "
                "be evaluated."
            ) from None
        layerwise = None
        progress.note(f"each child is evaluated as a whole model, because {reason}.")
    if parent.stream is not None:
        batch_tokens = tokens_at_once(parent, layerwise, batch_tokens)
    return ChildEvaluator(
        library=library,
        layerwise=layerwise,
        tokens=tokens,
        batch_rows=max(1, batch_tokens // tokens.shape[1]),
        folder=folder or Path(tempfile.gettempdir()),
        spill_bytes=recipe.spill_gib * 1024**3,
    )
