"""Solutions as whole models: what a child really loses on scoring rows, not the sum of its parts.

Children that agree in their first layers share what these give: solutions are run in the order of their layers, batch
by batch of rows, each from where it parts from the one before. What the parent says is computed once a batch. Where the
parent's weights stay on the disk, all solutions and all rows go through a layer before the next is read. Where a parent
cannot be taken apart (see :mod:`layersmith.execution.layerwise`), its own forward is run with layers exchanged.

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
from layersmith.recipe import Recipe
from layersmith.run.progress import Progress
from layersmith.scoring.exact import by_spans, spans
from layersmith.scoring.exchanges import ExchangeEffects, exchange_effects
from layersmith.scoring.metrics import Reference, Rows, as_rows, measure, row_means

Places = tuple[tuple[Alternative, ...], ...]  # the changed alternatives of every layer

# Neighbours of a solution use the same layers again and again: so many stay built as have this share of the parent's
# weights.
_KEPT_SHARE = 0.5


@dataclass(eq=False)
class ChildEvaluator:
    """Runs solutions.

    Attributes:
        library: of their alternatives.
        layerwise: the parent taken apart; None where it cannot be.
        tokens: ``[N, T]`` rows.
        batch_rows: rows that run together.
        folder: where hidden states wait if the parent's weights stay on the disk.
        spill_bytes: that those may take.
        passes: work done so far.
    """

    library: Library
    layerwise: LayerwiseParent | None
    tokens: torch.Tensor
    batch_rows: int
    folder: Path = Path(tempfile.gettempdir())
    spill_bytes: float = math.inf
    passes: float = 0.0
    _ends: dict[tuple[int, ...], States] = field(default_factory=dict)
    _built: dict[tuple[Alternative, ...], nn.Module] = field(default_factory=dict)
    _started: dict[tuple[int, ...], tuple[Batch | None, Reference]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parent = self.library.parent
        self._layers = [sum(p.numel() for p in layer.parameters()) for layer in parent.layers]
        self._head = sum(p.numel() for p in parent.head.parameters())
        self._whole = sum(self._layers) + self._head
        self._changed: dict[tuple[Alternative, ...], int] = {}

    @torch.no_grad()
    def run(
        self,
        solutions: Sequence[Sequence[Alternative]],
        rows: Sequence[int],
        advance: Callable[[float], None] = lambda rows: None,
    ) -> list[Rows]:
        """Metrics of every solution on every one of some rows; ``advance`` is told of rows."""
        order = sorted(range(len(solutions)), key=lambda k: _sort_key(self._places(solutions[k])))
        sorted_places = [self._places(solutions[k]) for k in order]
        found: list[Rows] = [[] for _ in solutions]
        batches = [tuple(rows[start : start + self.batch_rows]) for start in range(0, len(rows), self.batch_rows)]
        way = self._in_stages if self.layerwise is not None else self._by_exchange
        parts: Iterable[list[tuple[int, ...]]] = ([batch] for batch in batches)
        if self.streamed:
            self._ends = {batch: kept for batch, kept in self._ends.items() if batch in batches}
            way, parts = self._layer_by_layer, self._that_may_wait(batches, len(solutions))
        for part in parts:
            for index, result in way(sorted_places, part).items():
                found[order[index]] += result
            advance(sum(map(len, part)))
        return found

    @property
    def streamed(self) -> bool:
        """Whether the parent's weights stay on the disk until a layer runs."""
        return self.library.parent.stream is not None

    def cost(self, solutions: Sequence[Sequence[Alternative]], num_rows: int) -> float:
        """Forward passes that :meth:`run` takes, what is shared counted once; without the parent's own."""
        total, before = 0.0, None
        for places in sorted((self._places(solution) for solution in solutions), key=_sort_key):
            first = 0 if before is None or self.layerwise is None else _parting(before, places)
            total += sum(self._weights(i, own) for i, own in enumerate(places) if i >= first) + self._head
            before = places
        return total / self._whole * num_rows / len(self.tokens)

    def exchange_effects(
        self, solution: Sequence[Alternative], others: Sequence[Alternative], rows: Sequence[int], seed: int
    ) -> ExchangeEffects:
        """What exchanges for others do to a solution on some rows; the parent can be taken apart."""
        assert self.layerwise is not None
        batches = [self._tokens_of(rows[k : k + self.batch_rows]) for k in range(0, len(rows), self.batch_rows)]
        self.passes += self.cost_of_effects(solution, others, len(rows))
        most = self.spill_bytes if self.streamed else math.inf
        return exchange_effects(self.layerwise, solution, others, batches, seed, self._states(), most)

    def cost_of_effects(self, solution: Sequence[Alternative], others: Sequence[Alternative], num_rows: int) -> float:
        """Forward passes that :meth:`around` takes: the parent's; the child's, again by stages, and two back."""
        child = sum(self._weights(i, own) for i, own in enumerate(self._places(solution))) + self._head
        alone = sum(self.library.num_parameters(a, no_op_of_other(a)) for a in others)
        return (self._whole + 4 * child + alone) / self._whole * num_rows / len(self.tokens)

    # ------------------------------------------------------------------------------------------ three ways

    def _in_stages(self, solutions: Sequence[Places], batches: Sequence[tuple[int, ...]]) -> Mapping[int, Rows]:
        layerwise, (rows,) = self.layerwise, batches
        assert layerwise is not None
        batch, reference = self._start(rows)
        assert batch is not None
        found: dict[int, Rows] = {}
        states: list[torch.Tensor] = [batch.embedded]  # what each layer is given, as far as it is known
        before: Places | None = None
        for index, places in enumerate(solutions):
            first = 0 if before is None else _parting(before, places)
            del states[first + 1 :]
            for i in range(first, len(places)):
                states.append(layerwise.run(batch, i, states[-1], self._layer(i, places[i])))
                self._count(self._weights(i, places[i]), rows)
            measured = []
            for start, end in spans(batch.input_ids, layerwise.vocab_size):
                logits, read = layerwise.head(batch.input_ids[:, start:end], states[-1][:, start:end])
                measured.append(measure(reference.span(start, end), logits, read))
            self._count(self._head, rows)
            found[index] = as_rows(row_means(measured))
            before = places
        return found

    def _layer_by_layer(self, solutions: Sequence[Places], batches: Sequence[tuple[int, ...]]) -> Mapping[int, Rows]:
        """Leading layers that solutions share are run once. The first time, the parent is one of the solutions."""
        layerwise = self.layerwise
        assert layerwise is not None
        states, depth = self._states(), len(self._layers)
        known = all(rows in self._ends for rows in batches)
        wanted = list(solutions) if known else [*solutions, ((),) * depth]
        started = [layerwise.start(self._tokens_of(rows)) for rows in batches]
        for n, batch in enumerate(started):
            states.put(((), n), batch.embedded)
            started[n] = batch.without_embedded()
        for i in range(depth):
            layerwise.read(i)
            reached = dict.fromkeys(places[: i + 1] for places in wanted)
            for own in dict.fromkeys(way[i] for way in reached):
                module = self.library.layer(*own) if own else None
                for way in reached:
                    if way[i] == own:
                        for n, rows in enumerate(batches):
                            states.put((way, n), layerwise.run(started[n], i, states.get((way[:i], n)), module))
                            self._count(self._weights(i, own), rows)
                del module  # it holds on to weights
            for way in dict.fromkeys(places[:i] for places in wanted):
                for n in range(len(batches)):
                    states.forget((way, n))
        if not known:
            kept = self._states()
            for n, rows in enumerate(batches):
                kept.put(rows, states.get((wanted[-1], n)))
            self._ends |= dict.fromkeys(batches, kept)
        found: dict[int, Rows] = {k: [] for k in range(len(solutions))}
        for n, rows in enumerate(batches):
            states.put("parent", self._ends[rows].get(rows))
            _, *measured = by_spans(
                layerwise, self._tokens_of(rows), states, ["parent", *((own, n) for own in solutions)]
            )
            states.forget("parent")
            for k, own_rows in enumerate(measured):
                found[k] += own_rows
                self._count(self._head, rows)
        return found

    def _that_may_wait(self, batches: Sequence[tuple[int, ...]], solutions: int) -> Iterator[list[tuple[int, ...]]]:
        """Batches that go through a layer together: their hidden states, before and after it, take what they may."""
        assert self.layerwise is not None
        of_batch = 2 * (solutions + 1) * self.batch_rows * self.tokens.shape[1] * self.layerwise.bytes_of_a_token
        size = max(1, int(min(len(batches), self.spill_bytes / of_batch)))
        for start in range(0, len(batches), size):
            yield list(batches[start : start + size])

    def _states(self) -> States:
        return StatesOnDisk(self.folder) if self.streamed else States()

    def _by_exchange(self, solutions: Sequence[Places], batches: Sequence[tuple[int, ...]]) -> Mapping[int, Rows]:
        (rows,) = batches
        _, reference = self._start(rows)
        found = {}
        for index, places in enumerate(solutions):
            layers = {i: self._layer(i, own) for i, own in enumerate(places) if own}
            with exchanged(self.library.parent, layers):
                logits, hidden = logits_and_hidden(self.library.parent, self._tokens_of(rows))
            self._count(sum(self._weights(i, own) for i, own in enumerate(places)) + self._head, rows)
            found[index] = as_rows(row_means([measure(reference, logits, hidden)]))
        return found

    def _start(self, rows: tuple[int, ...]) -> tuple[Batch | None, Reference]:
        """Rows on their way, and what the parent says of them; kept for the last batch."""
        if rows not in self._started:
            self._started.clear()
            ids = self._tokens_of(rows)
            if self.layerwise is None:
                batch, (logits, hidden) = None, logits_and_hidden(self.library.parent, ids)
            else:
                batch = self.layerwise.start(ids)
                logits, hidden = self.layerwise.head(ids, self.layerwise.hidden_states(batch)[-1])
            self._count(self._whole, rows)
            self._started[rows] = batch, Reference.of(logits, hidden, ids)
        return self._started[rows]

    # ------------------------------------------------------------------------------------------ pieces

    def _tokens_of(self, rows: Sequence[int]) -> torch.Tensor:
        return self.tokens[list(rows)].to(self.library.parent.runtime.device)

    def _places(self, solution: Sequence[Alternative]) -> Places:
        places: list[tuple[Alternative, ...]] = [() for _ in self.library.parent.blocks]
        for alternative in sorted(solution, key=lambda a: a.subblock):
            if not alternative.is_parent:
                places[alternative.layer] += (alternative,)
        return tuple(places)

    def _layer(self, i: int, own: tuple[Alternative, ...]) -> nn.Module:
        if not own:
            return self.library.parent.layers[i]
        if own in self._built:
            self._built[own] = self._built.pop(own)  # the last used is the last to go
        else:
            self._built[own] = self.library.layer(*own)
            kept = {key: sum(p.numel() for p in layer.parameters()) for key, layer in self._built.items()}
            while sum(kept.values()) > _KEPT_SHARE * self._whole and len(kept) > 1:
                oldest = next(iter(kept))
                del self._built[oldest], kept[oldest]
        return self._built[own]

    def _weights(self, i: int, own: tuple[Alternative, ...]) -> int:
        if not own:
            return self._layers[i]
        if own not in self._changed:
            self._changed[own] = self.library.num_parameters(*own)
        return self._changed[own]

    def _count(self, weights: int, rows: Sequence[int]) -> None:
        self.passes += weights / self._whole * len(rows) / len(self.tokens)


def _parting(one: Places, other: Places) -> int:
    """The first layer in which two solutions differ; the number of layers if they do not."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _sort_key(places: Places) -> list[str]:
    return ["|".join(a.name for a in own) for own in places]


def child_evaluator(
    library: Library, tokens: torch.Tensor, recipe: Recipe, progress: Progress, folder: Path | None = None
) -> ChildEvaluator:
    """What runs solutions on rows ``[N, T]``.

    Args:
        library: of their alternatives.
        tokens: the rows.
        recipe: says how many run together, and what may wait on the disk.
        progress: told where a parent cannot be taken apart.
        folder: where hidden states wait if the parent's weights stay on the disk; default: that of temporary files.

    Raises:
        UnsupportedModel: the parent's weights stay on the disk, and it cannot be taken apart.
    """
    parent, most = library.parent, recipe.scoring.batch_tokens
    try:
        layerwise = split_layers(library.parent, library)
    except NotLayerwise as reason:
        if parent.stream is not None:
            raise UnsupportedModel(
                f"{parent.path}: it is read from the disk layer by layer, and no child can be run so, because {reason}."
            ) from None
        layerwise = None
        progress.note(f"children are run whole, because {reason}.")
    if parent.stream is not None:
        most = tokens_at_once(parent, layerwise, most)
    rows = max(1, most // tokens.shape[1])
    folder = folder or Path(tempfile.gettempdir())
    return ChildEvaluator(library, layerwise, tokens, rows, folder, recipe.scoring.spill_gib * 1024**3)
