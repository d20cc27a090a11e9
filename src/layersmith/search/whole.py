"""Choices as whole models: what a child really loses on scoring rows, not the sum of its parts.

Children that agree in their first layers share what these give: choices are run in the order of their layers, batch by
batch of rows, each from where it parts from the one before. What the parent says is computed once a batch. Where a
parent cannot be taken apart (see :mod:`layersmith.staged`), its own forward is run with layers exchanged.

Work is counted in forward passes of the parent over all rows.

Shapes: N rows, B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from layersmith.execution import exchanged, logits_and_hidden
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.progress import Progress
from layersmith.recipe import Recipe
from layersmith.scoring.exact import spans
from layersmith.scoring.metrics import Reference, Rows, as_rows, measure, row_means
from layersmith.scoring.together import Together, together
from layersmith.staged import Batch, CannotTakeApart, StagedParent, take_apart

Places = tuple[tuple[Alternative, ...], ...]  # the changed alternatives of every layer

# Neighbours of a choice use the same layers again and again: so many stay built as have this share of the parent's
# weights.
_KEPT_SHARE = 0.5


@dataclass(eq=False)
class WholeModels:
    """Runs choices.

    Attributes:
        library: of their alternatives.
        staged: the parent taken apart; None where it cannot be.
        tokens: ``[N, T]`` rows.
        batch_rows: rows that run together.
        passes: work done so far.
    """

    library: Library
    staged: StagedParent | None
    tokens: torch.Tensor
    batch_rows: int
    passes: float = 0.0
    _built: dict[tuple[Alternative, ...], nn.Module] = field(default_factory=dict)
    _started: dict[tuple[int, ...], tuple[Batch | None, Reference]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parent = self.library.parent
        layers = [sum(p.numel() for p in layer.parameters()) for layer in parent.layers]
        self._head = sum(p.numel() for p in parent.head.parameters())
        self._whole = sum(layers) + self._head

    @torch.no_grad()
    def run(self, choices: Sequence[Sequence[Alternative]], rows: Sequence[int]) -> list[Rows]:
        """Metrics of every choice on every one of some rows."""
        order = sorted(range(len(choices)), key=lambda k: _sort_key(self._places(choices[k])))
        found: list[Rows] = [[] for _ in choices]
        for start in range(0, len(rows), self.batch_rows):
            batch = tuple(rows[start : start + self.batch_rows])
            own = self._in_stages if self.staged is not None else self._by_exchange
            for index, result in own([self._places(choices[k]) for k in order], batch).items():
                found[order[index]] += result
        return found

    def cost(self, choices: Sequence[Sequence[Alternative]], num_rows: int) -> float:
        """Forward passes that :meth:`run` takes, what is shared counted once; without the parent's own."""
        total, before = 0.0, None
        for places in sorted((self._places(choice) for choice in choices), key=_sort_key):
            first = 0 if before is None or self.staged is None else _parting(before, places)
            total += sum(self._weights(i, own) for i, own in enumerate(places) if i >= first) + self._head
            before = places
        return total / self._whole * num_rows / len(self.tokens)

    def together(self, alternatives: Sequence[Alternative], rows: Sequence[int], seed: int) -> Together | None:
        """How alternatives work together on some rows; None where the parent cannot be taken apart."""
        if self.staged is None or self.staged.streamed:
            return None
        batches = [self._tokens_of(rows[k : k + self.batch_rows]) for k in range(0, len(rows), self.batch_rows)]
        return together(self.staged, [a for a in alternatives if a.kind != "parent"], batches, seed)

    # ------------------------------------------------------------------------------------------ two ways

    def _in_stages(self, choices: Sequence[Places], rows: tuple[int, ...]) -> Mapping[int, Rows]:
        staged = self.staged
        assert staged is not None
        batch, reference = self._start(rows)
        assert batch is not None
        found: dict[int, Rows] = {}
        states: list[torch.Tensor] = [batch.embedded]  # what each layer is given, as far as it is known
        before: Places | None = None
        for index, places in enumerate(choices):
            first = 0 if before is None else _parting(before, places)
            del states[first + 1 :]
            for i in range(first, len(places)):
                states.append(staged.run(batch, i, states[-1], self._layer(i, places[i])))
                self._count(self._weights(i, places[i]), rows)
            measured = []
            for start, end in spans(batch.input_ids, staged.vocab_size):
                logits, read = staged.head(batch.input_ids[:, start:end], states[-1][:, start:end])
                measured.append(measure(reference.span(start, end), logits, read))
            self._count(self._head, rows)
            found[index] = as_rows(row_means(measured))
            before = places
        return found

    def _by_exchange(self, choices: Sequence[Places], rows: tuple[int, ...]) -> Mapping[int, Rows]:
        _, reference = self._start(rows)
        found = {}
        for index, places in enumerate(choices):
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
            if self.staged is None:
                batch, (logits, hidden) = None, logits_and_hidden(self.library.parent, ids)
            else:
                batch = self.staged.start(ids)
                logits, hidden = self.staged.head(ids, self.staged.hidden_states(batch)[-1])
            self._count(self._whole, rows)
            self._started[rows] = batch, Reference.of(logits, hidden, ids)
        return self._started[rows]

    # ------------------------------------------------------------------------------------------ pieces

    def _tokens_of(self, rows: Sequence[int]) -> torch.Tensor:
        return self.tokens[list(rows)].to(self.library.parent.runtime.device)

    def _places(self, choice: Sequence[Alternative]) -> Places:
        places: list[tuple[Alternative, ...]] = [() for _ in self.library.parent.blocks]
        for alternative in sorted(choice, key=lambda a: a.subblock):
            if alternative.kind != "parent":
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
        return sum(p.numel() for p in self._layer(i, own).parameters())

    def _count(self, weights: int, rows: Sequence[int]) -> None:
        self.passes += weights / self._whole * len(rows) / len(self.tokens)


def _parting(one: Places, other: Places) -> int:
    """The first layer in which two choices differ; the number of layers if they do not."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def _sort_key(places: Places) -> list[str]:
    return ["|".join(a.name for a in own) for own in places]


def whole_models(library: Library, tokens: torch.Tensor, recipe: Recipe, progress: Progress) -> WholeModels:
    """What runs choices on rows ``[N, T]``."""
    try:
        staged = take_apart(library, tokens[:1, :32].repeat(2, 1).to(library.parent.runtime.device))
    except CannotTakeApart as reason:
        staged = None
        progress.note(f"children are run whole, because {reason}.")
    return WholeModels(library, staged, tokens, recipe.scoring.rows_at_once(tokens.shape[1]))
