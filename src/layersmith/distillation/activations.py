"""Hidden states of rows on their way through the layers of the parent and, if wanted, of a child.

Shapes: N rows, B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layersmith.distillation.team import Team
from layersmith.execution.hidden_states import SharedStates
from layersmith.execution.layerwise import Batch, LayerwiseParent, Split

BLOCK = "block"


class HiddenStates:
    """Inputs ``[N, T, D]`` of the current layer of one model, on the CPU, and its outputs as they are computed.

    Attributes:
        current: Inputs of the current layer; None before the first layer.
    """

    def __init__(self) -> None:
        self.current: torch.Tensor | None = None
        self._next: torch.Tensor | None = None
        self._is_known = torch.zeros(0, dtype=torch.bool)

    def record(self, rows: torch.Tensor, num_rows: int, output: torch.Tensor) -> None:
        """Keep what the current layer returned for some of the ``num_rows`` rows."""
        if self._next is None:
            self._next = torch.empty((num_rows, *output.shape[1:]), dtype=output.dtype)
            self._is_known = torch.zeros(num_rows, dtype=torch.bool)
        self._next[rows] = output.detach().cpu()
        self._is_known[rows] = True

    @property
    def is_recorded(self) -> bool:
        """Whether the current layer's outputs are known for all rows."""
        return self._next is not None and bool(self._is_known.all())

    def inputs(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Inputs of the current layer for some rows; None where :attr:`current` is."""
        return None if self.current is None else self.current[rows]

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """What the current layer returned for some rows; only once :attr:`is_recorded`."""
        assert self._next is not None
        return self._next[rows]

    def advance(self) -> None:
        """Go to the next layer."""
        self.current, self._next = self._next, None


class PassedStates(HiddenStates):
    """Hidden states of layers that are dealt to several processes, which pass them on row by row.

    Args:
        name: Name of the rows.
        states: Where the input of layer i for a row is ``(name, i, row)``.
    """

    def __init__(self, name: str, states: SharedStates):
        super().__init__()
        self._name, self._states, self._layer = name, states, 0
        self._given: set[int] = set()

    def record(self, rows: torch.Tensor, num_rows: int, output: torch.Tensor) -> None:
        """Send what was not sent before to the process that has the next layer."""
        if not len(self._is_known):
            self._is_known = torch.zeros(num_rows, dtype=torch.bool)
        for row, of_row in zip(rows.tolist(), output.detach().cpu(), strict=True):
            if not self._is_known[row]:
                self._states.put((self._name, self._layer + 1, row), of_row)
                self._is_known[row] = True

    @property
    def is_recorded(self) -> bool:
        return len(self._is_known) > 0 and bool(self._is_known.all())

    def inputs(self, rows: torch.Tensor) -> torch.Tensor | None:
        if not self._layer:
            return None
        self._given.update(rows.tolist())
        return torch.stack([self._states.get((self._name, self._layer, row)) for row in rows.tolist()])

    def advance(self) -> None:
        for row in self._given:
            self._states.forget((self._name, self._layer, row))
        self._given.clear()
        self._layer, self._is_known = self._layer + 1, self._is_known[:0]


class Rows:
    """Rows of tokens and their hidden states in the parent, and in a child from its first changed layer on.

    Attributes:
        tokens: ``[N, T]``.
        parent, child: Their hidden states.
        steps: Numbers of the rows of each step, if these are rows to train on.
        step_rows: How many rows each step has, with those of other processes.
    """

    def __init__(self, tokens: torch.Tensor, batch_tokens: int):
        self.tokens, self.batch_rows = tokens, max(1, batch_tokens // tokens.shape[1])
        self.steps: list[torch.Tensor] = []
        self.step_rows: list[int] = []
        self.parent, self.child = HiddenStates(), HiddenStates()

    @staticmethod
    def to_train(tokens: torch.Tensor, batch_tokens: int, seed: int, team: Team) -> Rows:
        """Rows in steps of ``batch_tokens``; of each step, those that this process of a team has."""
        batch_rows = max(1, batch_tokens // tokens.shape[1])
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        steps = order.split(batch_rows)
        mine = [team.mine(step) for step in steps]
        if team.is_divided:
            rows = Rows(tokens[torch.cat(mine)], batch_tokens)
            rows.steps = list(torch.arange(len(rows.tokens)).split([len(step) for step in mine]))
        else:
            rows = Rows(tokens, batch_tokens)
            rows.steps = mine
        rows.step_rows = [len(step) for step in steps]
        return rows

    def batches(self) -> Iterator[torch.Tensor]:
        """Row numbers of each batch."""
        if len(self.tokens):
            yield from torch.arange(len(self.tokens)).split(self.batch_rows)

    def start(self, layerwise: LayerwiseParent[Any], rows: torch.Tensor) -> tuple[Batch, torch.Tensor]:
        """A batch, and the input of the parent's current layer for it."""
        device = layerwise.parent.runtime.device
        batch = layerwise.start(self.tokens[rows].to(device))
        inputs = self.parent.inputs(rows)
        return batch, batch.embedded if inputs is None else inputs.to(device)

    def child_input(self, rows: torch.Tensor, parent_input: torch.Tensor) -> torch.Tensor:
        """The input of the child's current layer; up to its first changed layer that is the parent's."""
        inputs = self.child.inputs(rows)
        return parent_input if inputs is None else inputs.to(parent_input.device)

    @torch.no_grad()
    def pass_through_parent(self, layerwise: LayerwiseParent[Any], i: int) -> None:
        """Take the rows through a layer of the parent."""
        for numbers in self.batches():
            batch, hidden = self.start(layerwise, numbers)
            with layerwise.arithmetic.needs():
                self.record_parent(numbers, layerwise.run(batch, i, hidden))

    @torch.no_grad()
    def pass_through_child(self, layerwise: LayerwiseParent[Any], i: int, layer: nn.Module) -> None:
        """Take the rows through a layer of the child."""
        for numbers in self.batches():
            batch, hidden = self.start(layerwise, numbers)
            with layerwise.arithmetic.needs():
                self.record_child(numbers, layerwise.run(batch, i, self.child_input(numbers, hidden), layer))

    def record_parent(self, rows: torch.Tensor, output: torch.Tensor) -> None:
        self.parent.record(rows, len(self.tokens), output)

    def record_child(self, rows: torch.Tensor, output: torch.Tensor) -> None:
        self.child.record(rows, len(self.tokens), output)

    def advance(self) -> None:
        """Go to the next layer."""
        self.parent.advance()
        self.child.advance()


@dataclass(frozen=True)
class Target:
    """What a replacement of a subblock, or of a layer, is given on a batch and has to return; ``[B, T, D]`` each.

    Attributes:
        batch: The rows.
        given: Input of the replacement: the parent's, or the child's.
        parent_input: Input of the parent's subblock or layer.
        output: Output of the parent's subblock or layer, with the residual.
    """

    batch: Batch
    given: torch.Tensor
    parent_input: torch.Tensor
    output: torch.Tensor

    def contribution(self) -> torch.Tensor:
        """What the parent's subblock or layer adds to the hidden states, y in the loss."""
        return self.output.float() - self.parent_input.float()


def run_parent_layer(
    layerwise: LayerwiseParent[Any],
    i: int,
    split: Split,
    batch: Batch,
    hidden: torch.Tensor,
    run: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[dict[str, Target], torch.Tensor]:
    """Run a layer of the parent: targets for ``attention``, ``ffn`` and ``block``, and the layer's output.

    Args:
        layerwise: The parent, whose layers can be run one at a time.
        i: Index of the layer.
        split: The layer's attention and FFN.
        batch: The rows.
        hidden: Their input of the layer.
        run: Runs the attention, the FFN, or the ``block`` that is not split, on its input; default: just that.
    """

    def run_alone(place: str, given: torch.Tensor) -> torch.Tensor:
        return layerwise.run(batch, i, given, None if place == BLOCK else getattr(split, place))

    run = run or run_alone
    if split.layout == "whole":
        output = run(BLOCK, hidden)
        return dict.fromkeys(("attention", "ffn", BLOCK), Target(batch, hidden, hidden, output)), output
    middle = run("attention", hidden)
    given = middle if split.layout == "sequence" else hidden
    output = run("ffn", given)
    whole = output if split.layout == "sequence" else middle + output - hidden
    targets = {"attention": Target(batch, hidden, hidden, middle), "ffn": Target(batch, given, given, output)}
    return targets | {BLOCK: Target(batch, hidden, hidden, whole)}, whole
