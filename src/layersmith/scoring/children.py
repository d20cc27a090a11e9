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
from collections.abc import Callable, Sequence
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
from layersmith.run import ranks
from layersmith.run.crew import Crew
from layersmith.run.progress import Progress
from layersmith.scoring.child_ways import Batched, Places, Results, Ways
from layersmith.scoring.exact import spans
from layersmith.scoring.exchanges import ExchangeEffects, exchange_effects
from layersmith.scoring.metrics import Reference, Rows, as_rows, check_rows, measure, row_means

# Neighbours of a solution share most of their layers, so built layers are kept, up to this share of the parent's
# weights.
KEPT_SHARE = 0.5

Solutions = Sequence[Sequence[Alternative]]


def _unseen(rows: float) -> None:
    """For work of which nobody wants to see the progress."""


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
            while sum(kept.values()) > KEPT_SHARE * self.total and len(kept) > 1:
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
        crew: Of several processes, the others follow the first while it leads, and take part in all evaluations.
    """

    library: Library
    layerwise: LayerwiseParent | None
    tokens: torch.Tensor
    batch_rows: int
    folder: Path = Path(tempfile.gettempdir())
    spill_bytes: float = math.inf
    passes: float = 0.0
    crew: Crew = field(init=False)
    _ends: dict[tuple[int, ...], States] = field(default_factory=dict)
    _started: dict[tuple[int, ...], tuple[Batch | None, Reference]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._layers = _Layers(self.library)
        self.crew = Crew({"run": self._run, "effects": self._exchange_effects})

    @torch.no_grad()
    def run(self, solutions: Solutions, rows: Sequence[int], advance: Callable[[float], None] = _unseen) -> list[Rows]:
        """Metrics of every solution on each of some rows; ``advance`` is called with the number of rows just done."""
        found = self.crew.do("run", solutions, rows, *([] if self.crew.is_open else [advance]))
        return self._in_order(found, solutions, rows)

    @torch.no_grad()
    def run_in_all(self, solutions: Solutions, rows: Sequence[int]) -> list[Rows]:
        """:meth:`run` of all processes, which all call this with the same arguments and have the same result."""
        return self._in_order(self.crew.in_all("run", solutions, rows), solutions, rows)

    def _in_order(self, found: Results, solutions: Solutions, rows: Sequence[int]) -> list[Rows]:
        return [[row for batch in self._batches(rows) for row in found[self._places(s), batch]] for s in solutions]

    def _batches(self, rows: Sequence[int]) -> list[Batched]:
        return [tuple(rows[start : start + self.batch_rows]) for start in range(0, len(rows), self.batch_rows)]

    @torch.no_grad()
    def _run(self, solutions: Solutions, rows: Sequence[int], advance: Callable[[float], None] = _unseen) -> Results:
        """Metrics of every solution on every batch; all processes of the crew find some of them."""
        places, batches = sorted(map(self._places, solutions), key=_sort_key), self._batches(rows)

        def run_here() -> Results:
            found = (self._run_streamed if self.streamed else self._run_share)(places, batches, advance)
            for result in found.values():
                check_rows(result, "a candidate child")
            return found

        if not self.crew.is_open:
            return run_here()
        return {key: result for of_process in ranks.from_each(run_here) for key, result in of_process.items()}

    def _run_streamed(
        self, places: Sequence[Places], batches: Sequence[Batched], advance: Callable[[float], None]
    ) -> Results:
        assert self.layerwise is not None
        found: Results = {}
        self.layerwise.division.is_open = self.crew.is_open
        self._ends = {batch: kept for batch, kept in self._ends.items() if batch in batches}
        # The hidden states before and after a layer are within the limit of bytes.
        of_batch = 2 * (len(places) + 1) * self.batch_rows * self.tokens.shape[1] * self.layerwise.bytes_of_a_token
        size = max(1, int(min(len(batches), self.spill_bytes / of_batch)))
        for part in (batches[start : start + size] for start in range(0, len(batches), size)):
            ways = Ways(self.library, self.layerwise, {rows: self._tokens_of(rows) for rows in part}, self._states)
            found |= ways.run(places, self._ends)
            self.passes += ways.weights / self._layers.total / len(self.tokens)
            advance(sum(map(len, part)))
        return found

    def _run_share(
        self, places: Sequence[Places], batches: Sequence[Batched], advance: Callable[[float], None]
    ) -> Results:
        """Run a range of neighbouring solutions, which share layers, on each batch; the whole range without a crew."""
        count, number = (ranks.count(), ranks.number()) if self.crew.is_open else (1, 0)
        first, last = (len(batches) * len(places) * k // count for k in (number, number + 1))
        method = self._from_shared_layers if self.layerwise is not None else self._by_exchange
        found: Results = {}
        for n, batch in enumerate(batches):
            start = n * len(places)
            if mine := places[max(0, first - start) : max(0, last - start)]:
                found |= {(one, batch): result for one, result in method(mine, batch).items()}
            advance(len(batch))
        return found

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
        effects: ExchangeEffects = self.crew.do("effects", solution, others, rows, seed)
        return effects

    def _exchange_effects(
        self, solution: Sequence[Alternative], others: Sequence[Alternative], rows: Sequence[int], seed: int
    ) -> ExchangeEffects:
        assert self.layerwise is not None
        batches = [self._tokens_of(batch) for batch in self._batches(rows)]
        self.layerwise.division.is_open = self.crew.is_open
        self.passes += self.cost_of_effects(solution, others, len(rows))
        return exchange_effects(self.layerwise, solution, others, batches, seed, self._states())

    def cost_of_effects(self, solution: Sequence[Alternative], others: Sequence[Alternative], num_rows: int) -> float:
        """Work of :meth:`exchange_effects`: a forward pass of the parent, two of the child, and two backward passes."""
        child = self._layers.num_parameters_from(0, self._places(solution))
        alone = sum(self.library.num_parameters(a, no_op_of_other(a)) for a in others)
        return (self._layers.total + 4 * child + alone) / self._layers.total * num_rows / len(self.tokens)

    # ------------------------------------------------------------------------------------------ three methods

    def _from_shared_layers(self, solutions: Sequence[Places], rows: Batched) -> dict[Places, Rows]:
        """Run each solution from the first layer in which it differs from the one before it."""
        layerwise = self.layerwise
        assert layerwise is not None
        batch, reference = self._start(rows)
        assert batch is not None
        results: dict[Places, Rows] = {}
        states: list[torch.Tensor] = [batch.embedded]  # the inputs of the layers that are known
        before: Places | None = None
        for places in solutions:
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
            results[places] = as_rows(row_means(measured))
            before = places
        return results

    def _states(self) -> States:
        return StatesOnDisk(self.folder, self.spill_bytes) if self.streamed else States()

    def _by_exchange(self, solutions: Sequence[Places], rows: Batched) -> dict[Places, Rows]:
        """Run the whole model with exchanged layers."""
        _, reference = self._start(rows)
        results = {}
        for places in solutions:
            layers = {i: self._layers.module(i, changes) for i, changes in enumerate(places) if changes}
            with exchanged(self.library.parent, layers):
                logits, hidden = logits_and_hidden(self.library.parent, self._tokens_of(rows))
            self._count(self._layers.num_parameters_from(0, places), rows)
            results[places] = as_rows(row_means([measure(reference, logits, hidden)]))
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
