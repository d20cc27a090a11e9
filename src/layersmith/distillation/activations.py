"""Hidden states of rows on their way through the layers of the parent and, if wanted, of a child.

Shapes: N rows, B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """What the current layer returned for some rows; only once :attr:`is_recorded`."""
        assert self._next is not None
        return self._next[rows]

    def advance(self) -> None:
        """Go to the next layer."""
        self.current, self._next = self._next, None


class Rows:
    """Rows of tokens and their hidden states in the parent, and in a child from its first changed layer on.

    Attributes:
        tokens: ``[N, T]``.
        parent, child: Their hidden states.
    """

    def __init__(self, tokens: torch.Tensor, batch_tokens: int):
        self.tokens, self.batch_rows = tokens, max(1, batch_tokens // tokens.shape[1])
        self.parent, self.child = HiddenStates(), HiddenStates()

    def batches(self) -> Iterator[torch.Tensor]:
        """Row numbers of each batch."""
        yield from torch.arange(len(self.tokens)).split(self.batch_rows)

    def start(self, layerwise: LayerwiseParent[Any], rows: torch.Tensor) -> tuple[Batch, torch.Tensor]:
        """A batch, and the input of the parent's current layer for it."""
        device = layerwise.parent.runtime.device
        batch = layerwise.start(self.tokens[rows].to(device))
        return batch, batch.embedded if self.parent.current is None else self.parent.current[rows].to(device)

    def child_input(self, rows: torch.Tensor, parent_input: torch.Tensor) -> torch.Tensor:
        """The input of the child's current layer; up to its first changed layer that is the parent's."""
        return parent_input if self.child.current is None else self.child.current[rows].to(parent_input.device)

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
    layerwise: LayerwiseParent[Any], i: int, split: Split, batch: Batch, hidden: torch.Tensor
) -> tuple[dict[str, Target], torch.Tensor]:
    """Run a layer of the parent: targets for ``attention``, ``ffn`` and ``block``, and the layer's output."""
    if split.layout == "whole":
        output = layerwise.run(batch, i, hidden)
        return dict.fromkeys(("attention", "ffn", BLOCK), Target(batch, hidden, hidden, output)), output
    middle = layerwise.run(batch, i, hidden, split.attention)
    given = middle if split.layout == "sequence" else hidden
    output = layerwise.run(batch, i, given, split.ffn)
    whole = output if split.layout == "sequence" else middle + output - hidden
    targets = {"attention": Target(batch, hidden, hidden, middle), "ffn": Target(batch, given, given, output)}
    return targets | {BLOCK: Target(batch, hidden, hidden, whole)}, whole
