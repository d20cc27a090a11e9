"""A causal model up to its head: the head's input, the output of each decoder layer, and the head alone.

The model's own ``forward`` runs, so whatever a family does before, between and after its layers is done. It is stopped
where the output embedding is called, so that the logits of all tokens are never in memory at once. The head alone is
the output embedding if logits are its output. Otherwise it is the same ``forward`` without layers, with the output
embedding applied to other hidden states, so that a scale or a soft cap of the logits is applied too.

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
from layersmith.execution.sharded import with_head


@dataclass(frozen=True, eq=False)
class Taken:
    """Results of a forward pass.

    Attributes:
        read: ``[B, T, D]``, input of the head.
        layers: ``[B, T, D]``, output of each decoder layer, in the order of their calls.
    """

    read: torch.Tensor
    layers: list[torch.Tensor]


class _AtTheHead(Exception):
    """Raised where the head is called, with its input."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden


class Tap:
    """Runs a model up to its head, and the head alone. Hooks stay in the model until :meth:`close`.

    Attributes:
        model: A parent, or a child with the same kind of layers.
        vocab_size: V, number of logits.
        is_plain: Whether logits are the output of the output embedding, unchanged.
    """

    def __init__(self, model: Parent):
        self.model = model
        self._forward: Callable[..., Any] = model.model.forward
        self._output: nn.Module = model.head
        self._layers: list[torch.Tensor] | None = None
        self._stops = False
        self._handles = [layer.register_forward_hook(self._keep) for layer in model.layers]
        self._handles.append(self._output.register_forward_pre_hook(self._stop))
        with with_head(model.model):
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
        """Parameters of the head."""
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
        """Logits ``[n, V]`` of head inputs ``[n, D]``."""
        if self.is_plain:
            logits: torch.Tensor = self._output(hidden)
            return logits
        with self._given(hidden[None]):
            return self._forward(input_ids=self._probe.to(hidden.device), use_cache=False).logits[0]

    @contextmanager
    def _given(self, hidden: torch.Tensor) -> Iterator[None]:
        """While open, layers are skipped and the output embedding reads ``hidden`` instead of its input."""
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
        """Find out whether logits are changed after the output embedding, and check that the head alone is exact."""
        device = self.model.runtime.device
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
            self._outputs = [_without_inference_mode(output) for output in outputs]
        read = self.run(self._probe, False).read[0]
        made_alone, expected = self.head(read[2:]), logits[0, 2:]
        there = expected.isfinite()
        size = float(expected[there].abs().max())
        if not torch.allclose(made_alone[there], expected[there], rtol=1e-3, atol=1e-3 * size):
            raise UnsupportedModel(
                f"{self.model.path}: the logits of a token do not depend on the head's input for that token alone."
            )


def _without_inference_mode(value: Any) -> Any:
    """The output of a layer as ordinary tensors, which autograd accepts."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(_without_inference_mode(v) for v in value) if isinstance(value, tuple | list) else value
