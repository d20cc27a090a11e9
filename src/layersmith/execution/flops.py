"""Floating-point operations: those that a result needs, and those that were done for it.

The operations of a module on hidden states of one shape are counted once, by PyTorch, which observes its matrix
products and attentions; elementwise work is not counted. A backward pass to the input of a module takes as many
operations as its matrices, and two and a half times those of its attentions. It is not observed, because PyTorch then
uses other kernels, which round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.utils.flop_counter import FlopCounterMode

from layersmith import upstream

T = TypeVar("T")


# Matrix products of attention in the backward pass, five, per product in the forward pass, two.
_ATTENTION_BACKWARD = 2.5


class Arithmetic:
    """A tally.

    Attributes:
        done: operations so far.
        needed: those among them that the result could not do without.
    """

    def __init__(self) -> None:
        self.done = self.needed = 0.0
        self._forward: dict[Hashable, float] = {}
        self._backward: dict[Hashable, float] = {}
        self._to_weights: dict[Hashable, float] = {}
        self._is_needed = False

    def count(self, key: Hashable, run: Callable[[], T]) -> T:
        """Run something forward and add the operations of everything with this key."""
        if key in self._forward:
            result = run()
        else:
            with FlopCounterMode(display=False, custom_mapping=upstream.attention_counters()) as counter:
                result = run()
            by_kind = counter.get_flop_counts().get("Global", {})
            attention = float(sum(n for kind, n in by_kind.items() if "attention" in str(kind)))
            self._forward[key] = float(counter.get_total_flops())
            self._backward[key] = self._forward[key] + (_ATTENTION_BACKWARD - 1) * attention
            self._to_weights[key] = self._forward[key] - attention
        self.add(self._forward[key])
        return result

    def of(self, key: Hashable) -> tuple[float, float]:
        """Operations of matrices and of attentions in something that was counted forward."""
        matrices = self._to_weights[key]
        return matrices, self._forward[key] - matrices

    def count_backward(self, key: Hashable) -> None:
        """Add the operations of a backward pass through something that was counted forward."""
        self.add(self._backward[key])

    def count_training(self, key: Hashable) -> None:
        """Add the operations of a backward pass to inputs and weights of something that was counted forward."""
        self.add(self._backward[key] + self._to_weights[key])

    def add(self, operations: float) -> None:
        """Add operations that were counted otherwise."""
        self.done += operations
        if self._is_needed:
            self.needed += operations

    @contextmanager
    def needs(self) -> Iterator[None]:
        """While open, what is counted is needed."""
        before, self._is_needed = self._is_needed, True
        try:
            yield
        finally:
            self._is_needed = before

    def __str__(self) -> str:
        return f"{_flops(self.needed)} needed, {_flops(self.done)} done ({self.done / max(self.needed, 1.0):.2f}x)"


def _flops(value: float) -> str:
    for scale, name in ((1e15, "PFLOP"), (1e12, "TFLOP")):
        if value >= scale:
            return f"{value / scale:.2f} {name}"
    return f"{value / 1e9:.2f} GFLOP"
