"""A causal model up to its head: what the head reads, what each decoder layer gives, and the head by itself.

Whatever a family does before its layers, between them and after them is done by its own ``forward``. It is left where
the output embedding is called, so that logits of all tokens are never made; the head by itself is the output embedding
where logits are nothing more, and otherwise the same ``forward`` without layers, in which the output embedding gives
what it makes of other hidden states: whatever is done to logits afterwards, a scale or a soft cap, is done.

Shapes: B rows, T tokens, N = B T, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layersmith.errors import InputError, UnsupportedModel
from layersmith.execution.exchange import Handover, exchanged, first_tensor, layer_outputs
from layersmith.execution.parent import Parent


@dataclass(frozen=True, eq=False)
class Taken:
    """What a forward pass gave.

    Attributes:
        read: ``[B, T, D]``, what the head reads.
        layers: ``[B, T, D]`` of each decoder layer, in the order of their calls.
    """

    read: torch.Tensor
    layers: list[torch.Tensor]


class _AtTheHead(Exception):
    """Thrown where the head is called, with what it was given."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden


class Tap:
    """See the module's docstring. Hooks are in the model until :meth:`close`.

    Attributes:
        model: a parent, or a child with the same kind of layers.
        vocab_size: V, of its logits.
        is_plain: whether logits are what the output embedding makes, and nothing else.
    """

    def __init__(self, model: Parent):
        self.model = model
        self._forward: Callable[..., Any] = model.model.forward
        self._output: nn.Module = model.head
        self._layers: list[torch.Tensor] | None = None
        self._stops = False
        self._handles = [layer.register_forward_hook(self._keep) for layer in model.layers]
        self._handles.append(self._output.register_forward_pre_hook(self._stop))
        self._try()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._layers is not None:
            self._layers.append(first_tensor(output))

    def _stop(self, module: nn.Module, args: Any) -> None:
        if self._stops:
            raise _AtTheHead(args[0])

    def parameters(self) -> list[nn.Parameter]:
        """Those of the head."""
        return list(self._output.parameters())

    def run(self, input_ids: torch.Tensor, with_layers: bool) -> Taken:
        """Run rows ``[B, T]`` up to the head."""
        self._layers, self._stops = ([] if with_layers else None), True
        try:
            self._forward(input_ids=input_ids, use_cache=False)
        except _AtTheHead as reached:
            return Taken(reached.hidden, self._layers or [])
        finally:
            self._layers, self._stops = None, False
        raise UnsupportedModel(f"{self.model.path}: its forward does not call its output embeddings.")

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` of what the head reads, ``[n, D]``."""
        if self.is_plain:
            logits: torch.Tensor = self._output(hidden)
            return logits
        with self._given(hidden[None]):
            return self._forward(input_ids=self._probe.to(hidden.device), use_cache=False).logits[0]

    @contextmanager
    def _given(self, hidden: torch.Tensor) -> Iterator[None]:
        """While open, layers are skipped and the output embedding reads ``hidden``, whatever it is given."""
        skipped: dict[int, nn.Module] = {
            i: Handover(layer, i, self._outputs[i]) for i, layer in enumerate(self.model.layers)
        }
        handle = self._output.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
        try:
            with exchanged(self.model, skipped):
                yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _try(self) -> None:
        """Find out what is done to logits, and that the head by itself gives the model's own."""
        device = self.model.model.device
        self._probe = torch.arange(3, 11, device=device)[None] % self.model.language_config.vocab_size
        made: list[torch.Tensor] = []
        handle = self._output.register_forward_hook(lambda module, args, output: made.append(output))
        try:
            logits = self._forward(input_ids=self._probe, use_cache=False).logits
        finally:
            handle.remove()
        if logits.isnan().any():
            raise InputError(
                f"{self.model.path}: its weights give logits that are not numbers. Restore the checkpoint."
            )
        self.vocab_size = logits.shape[-1]
        self.is_plain = bool(torch.equal(made[-1], logits))
        if not self.is_plain:
            _, _, outputs = layer_outputs(self.model, self._probe)
            self._outputs = [_own(output) for output in outputs]
        read = self.run(self._probe, False).read[0]
        made_alone, expected = self.head(read[2:]), logits[0, 2:]
        there = expected.isfinite()
        size = float(expected[there].abs().max())
        if not torch.allclose(made_alone[there], expected[there], rtol=1e-3, atol=1e-3 * size):
            raise UnsupportedModel(
                f"{self.model.path}: its logits are not made token by token from what its head reads."
            )


def _own(value: Any) -> Any:
    """What a layer returned, as ordinary tensors that training can pass on."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(_own(v) for v in value) if isinstance(value, tuple | list) else value
