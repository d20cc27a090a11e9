"""The ways that candidate children take through the layers of a parent whose weights stay on the disk.

Each layer is read once, for all solutions and rows. Solutions with equal first layers share the way through these.

Shapes: B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import LayerwiseParent
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.run import ranks
from layersmith.scoring.exact import by_spans
from layersmith.scoring.metrics import Rows

Places = tuple[tuple[Alternative, ...], ...]  # the changed alternatives of every layer
Batched = tuple[int, ...]  # numbers of the rows of a batch
Results = dict[tuple[Places, Batched], Rows]


@dataclass(eq=False)
class Ways:
    """Runs solutions through the layers, together with the parent where its final hidden states are not known.

    Where the parent is divided between processes, each runs its layers on all solutions, and some of the heads; each
    group of processes has some of the batches.
    ``("child", i, p, n)`` is the input of layer i, or of the head, on the p-th way through the layers before it, for
    batch n.

    Attributes:
        library: The library of the alternatives.
        layerwise: The parent, run layer by layer.
        batches: Token ids ``[B, T]`` by the numbers of the rows.
        new_states: Makes a store of hidden states.
        weights: Parameters that were applied so far, times rows.
    """

    library: Library
    layerwise: LayerwiseParent
    batches: Mapping[Batched, torch.Tensor]
    new_states: Callable[[], States]
    weights: float = field(default=0.0, init=False)

    def run(self, solutions: Sequence[Places], ends: dict[Batched, States]) -> Results:
        """Metrics of solutions whose heads this process has.

        Args:
            solutions: The changed alternatives of every layer, for each solution.
            ends: Where the parent's final hidden states of a batch are, under the numbers of its rows; missing ones
                are added.
        """
        division, depth = self.layerwise.division, len(self.layerwise.layers)
        of_parent: Places = ((),) * depth
        is_known = ends.keys() >= self.batches.keys()
        wanted = list(solutions) if is_known else [*solutions, of_parent]
        ways = [list(dict.fromkeys(places[:i] for places in wanted)) for i in range(depth + 1)]
        last = {places: p for p, places in enumerate(ways[depth])}

        def homes(key: tuple[Any, ...]) -> Sequence[int]:
            _, i, p, n = key
            if i < depth:
                return [division.owner_in_group(i, n)]
            return range(ranks.count()) if p == last.get(of_parent) else [(n + p) % ranks.count()]

        results: Results = {}
        with division.passing(self.new_states(), homes) as states:
            self._through_layers(ways, states)
            if not is_known:
                kept = self.new_states()
                for n, rows in enumerate(self.batches):
                    kept.put(rows, states.get(("child", depth, last[of_parent], n)))
                ends |= dict.fromkeys(self.batches, kept)
            for n, (rows, ids) in enumerate(self.batches.items()):
                mine = [s for s in dict.fromkeys(solutions) if division.is_mine(n + last[s])]
                finals = _Finals(ends[rows], rows, states)
                measured = by_spans(self.layerwise, ids, finals, [rows, *(("child", depth, last[s], n) for s in mine)])
                results |= {(s, rows): metrics for s, metrics in zip(mine, measured[1:], strict=True)}
                self.weights += len(rows) * len(mine) * sum(p.numel() for p in self.library.parent.head.parameters())
        return results

    def _through_layers(self, ways: Sequence[Sequence[Places]], states: States) -> None:
        layerwise, rows = self.layerwise, list(self.batches)
        started = layerwise.start_here(
            self.batches.values(), lambda n, embedded: states.put(("child", 0, 0, n), embedded)
        )
        for i in layerwise.division.here_in_group:
            layerwise.read(i)
            before = {way: p for p, way in enumerate(ways[i])}
            for changes in dict.fromkeys(way[i] for way in ways[i + 1]):
                module = self.library.layer(*changes) if changes else layerwise.layers[i]
                size = sum(parameter.numel() for parameter in module.parameters())
                for p, way in enumerate(ways[i + 1]):
                    if way[i] == changes:
                        for n, batch in started.items():
                            hidden = states.get(("child", i, before[way[:i]], n))
                            states.put(("child", i + 1, p, n), layerwise.run(batch, i, hidden, module))
                            self.weights += len(rows[n]) * size
                del module  # frees its weights
            for p in range(len(before)):
                for n in started:
                    states.forget(("child", i, p, n))


class _Finals(States):
    """Final hidden states of a batch: the parent's, whose key is the numbers of the rows, and those of children."""

    def __init__(self, of_parent: States, rows: Batched, of_children: States):
        self._of_parent, self._rows, self._of_children = of_parent, rows, of_children

    def part(self, key: Any, start: int, end: int) -> torch.Tensor:
        return (self._of_parent if key == self._rows else self._of_children).part(key, start, end)
