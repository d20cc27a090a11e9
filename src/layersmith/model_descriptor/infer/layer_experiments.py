"""Experiments with the modules of one decoder layer: what happens if a module is silenced or gets another input.

Shapes: T tokens, D hidden. One sequence at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.infer.specimen import Argument, Call, Specimen, experiment, first_tensor_of


class TracedLayer:
    """One decoder layer of a specimen. Names of modules are relative to it; the empty name is the layer itself.

    Attributes:
        calls: The first call of every module.
    """

    def __init__(self, specimen: Specimen, layer_name: str):
        self.specimen, self.layer_name = specimen, layer_name
        self.layer = specimen.model.get_submodule(layer_name)
        self._prefix = f"{layer_name}."
        self._inside = [layer_name, *(self._prefix + name for name, _ in self.layer.named_modules() if name)]
        self.calls = self._trace(specimen.ids)
        self._other_calls = self._trace(specimen.other_ids)
        hidden = next((v for v in self.calls[""].tensors().values() if v.ndim >= 2 and v.is_floating_point()), None)
        if hidden is None:
            raise UnsupportedModel(f"{layer_name} is called without hidden states.")
        self._hidden_shape = hidden.shape
        self._tokens = specimen.ids.shape[1] if specimen.ids.shape[1] in hidden.shape else hidden.shape[-2]

    def _trace(self, ids: torch.Tensor) -> dict[str, Call]:
        calls: dict[str, Call] = {}
        for call in self.specimen.trace(ids, keep=self._inside):
            if call.name.startswith(self._prefix) or call.name == self.layer_name:
                calls.setdefault(call.name.removeprefix(self.layer_name).removeprefix("."), call)
        return calls

    def weights(self, name: str) -> set[str]:
        """Names of the parameters in a module."""
        return {weight for weight, _ in self.layer.get_submodule(name).named_parameters(prefix=name)}

    def matrices(self, name: str) -> dict[str, int]:
        """Parameters of a module with two or more dimensions, and how many numbers each has."""
        named = self.layer.get_submodule(name).named_parameters(prefix=name)
        return {weight: p.numel() for weight, p in named if p.ndim >= 2}

    def children(self, name: str) -> list[str]:
        """Modules one level down that are called; a list that is not called itself gives its members."""
        called = []
        for part, child in self.layer.get_submodule(name).named_children():
            full = f"{name}.{part}".removeprefix(".")
            if full in self.calls:
                called.append(full)
            elif isinstance(child, nn.ModuleList | nn.ModuleDict):
                called += self.children(full)
        return called

    def _token_dim(self, tensor: torch.Tensor) -> int | None:
        """The dimension of a tensor that counts tokens."""
        return next((dim for dim in (1, 0) if tensor.ndim > dim and tensor.shape[dim] == self._tokens), None)

    def _changed_tokens(self, base: torch.Tensor, seen: torch.Tensor) -> set[int]:
        change = (seen - base).abs().movedim(self._token_dim(base) or 0, 0).flatten(1).amax(1)
        return set(torch.nonzero(change > 1e-6 * base.abs().max()).flatten().tolist())


class ExaminedLayer(TracedLayer):
    """One decoder layer of a specimen, and experiments with its modules.

    Attributes:
        passes: Modules that give one of their arguments when they are silenced; all others give zeros. None: no
            argument will do.
        always_dead: Parameters that do not matter for the logits in any case.
    """

    def __init__(self, specimen: Specimen, layer_name: str):
        super().__init__(specimen, layer_name)
        self.passes: dict[str, Argument] = {}
        self.always_dead: set[str] = set()
        self.always_dead = self.dead([])

    # ------------------------------------------------------------------------------------------ silencing

    def dead(self, names: Sequence[str]) -> set[str]:
        """Parameters that stop mattering for the logits when modules are silenced; none if the model refuses."""
        unused: set[str] = set()
        with experiment(f"Which weights are unused without {names} of {self.layer_name}?"):
            unused = self.specimen.dead(self._silenced(names), among=self._prefix)
        return {name.removeprefix(self._prefix) for name in unused} - self.always_dead

    def given_only_zeros(self, names: Sequence[str]) -> set[str]:
        """Modules whose inputs are all zero while others are silenced, e.g. a norm after the subblock."""
        with self.specimen.silenced(self._silenced(names)):
            calls = self.specimen.trace(self.specimen.ids, keep=self._inside)
        silent = set()
        for call in calls:
            given = [value for value in call.tensors().values() if value.is_floating_point()]
            if call.name.startswith(self._prefix) and given and not any(bool(value.any()) for value in given):
                silent.add(call.name.removeprefix(self._prefix))
        return silent

    def keeps_stream(self, name: str) -> bool:
        """Whether the layer's input still reaches the logits when a module gives zeros.

        Gradients show it. Where the model gives none, the input is changed instead.
        """
        inputs: list[torch.Tensor] = []
        added = 0.0

        def watched(value: torch.Tensor) -> torch.Tensor:
            change = torch.linspace(-1, 1, value.numel()).view_as(value)
            inputs.append((value.detach() + added * change).requires_grad_())
            return inputs[-1]

        keeps = False
        with (
            experiment(f"Does the input of {self.layer_name} reach the logits without {name}?"),
            _changed_input(self.layer, watched, lambda value: value.ndim >= 2),
            self.specimen.silenced({self._prefix + name: None}),
            torch.enable_grad(),
        ):
            logits = self.specimen.forward(self.specimen.ids)
            if inputs:
                grad = None
                with experiment("Does the model give gradients?"):
                    (grad,) = torch.autograd.grad(logits.square().sum(), inputs[0], allow_unused=True)
                added = 1.0
                keeps = (
                    not torch.equal(self.specimen.forward(self.specimen.ids), logits)
                    if grad is None
                    else bool(grad.any())
                )
        return keeps

    def _silenced(self, names: Sequence[str]) -> dict[str, Argument]:
        return {self._prefix + name: self.passes.get(name) for name in names}

    # ------------------------------------------------------------------------------------------ other inputs

    def hidden_outputs(self, name: str) -> int:
        """How many tensors of the shape of the hidden states a module returns."""
        output = self.calls[name].output
        parts = output if isinstance(output, tuple | list) else [output]
        return sum(isinstance(part, torch.Tensor) and part.shape == self._hidden_shape for part in parts)

    def residual_argument(self, name: str) -> Argument:
        """The argument that a module adds to what it computes: its output changes exactly as that argument does."""
        output = first_tensor_of(self.calls[name].output)
        base = self._output_for(name, {})
        for key, value in self.calls[name].tensors().items():
            if output is None or value.shape != output.shape or not value.is_floating_point():
                continue
            change = torch.linspace(-1, 1, value.numel()).view_as(value)
            seen = self._output_for(name, {key: value + change})
            if base is not None and seen is not None and torch.allclose(seen - base, change, atol=1e-4):
                return key
        return None

    def mixes(self, name: str) -> bool | None:
        """Whether a module lets one token depend on another; None if it gives nothing for each token."""
        call = self.calls[name]
        output = first_tensor_of(call.output)
        others = self._inputs_for_other_tokens(name)
        if output is None or not others or not output.is_floating_point() or self._token_dim(output) is None:
            return None
        at = min(min(self._changed_tokens(call.tensors()[key], other)) for key, other in others.items())
        changed = {}
        for key, other in others.items():
            value = call.tensors()[key].clone()
            dim = self._token_dim(value) or 0
            value.select(dim, at).copy_(other.select(dim, at))
            changed[key] = value
        base, seen = self._output_for(name, {}), self._output_for(name, changed)
        if base is None or seen is None or base.shape != seen.shape:  # it does not run alone
            mixed = self._changed_through_its_state(name)
        else:
            mixed = self._changed_tokens(base, seen) - {at}
        return bool(mixed) or self._reads_elsewhere(name)

    def _inputs_for_other_tokens(self, name: str) -> dict[int | str, torch.Tensor]:
        """Tensor arguments of a module's call that depend on the tokens, with their values for the other tokens."""
        given, other = self.calls[name].tensors(), self._other_calls[name].tensors()
        return {
            key: other[key]
            for key, value in given.items()
            if key in other
            and value.is_floating_point()
            and value.shape == other[key].shape
            and self._token_dim(value) is not None
            and not torch.equal(value, other[key])
        }

    def _output_for(self, name: str, changed: dict[int | str, torch.Tensor]) -> torch.Tensor | None:
        """The first tensor that a module gives with some arguments changed; None if it does not run alone."""
        call = self.calls[name]
        args = [changed.get(i, value) for i, value in enumerate(call.args)]
        kwargs = {key: changed.get(key, value) for key, value in call.kwargs.items()}
        output = None
        with torch.no_grad(), experiment(f"Does {name} run alone?"):
            output = first_tensor_of(self.layer.get_submodule(name)(*args, **kwargs))
        return output

    def _changed_through_its_state(self, name: str) -> set[int]:
        """Tokens for which a module's output changes though its input does not, with token 0 of the layer's input."""

        def disturbed(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value.select(self._token_dim(value) or 0, 0).add_(0.1)
            return value

        with _changed_input(self.layer, disturbed, lambda value: self._token_dim(value) is not None):
            calls = self._trace(self.specimen.ids)
        base, seen = first_tensor_of(self.calls[name].output), first_tensor_of(calls[name].output)
        if base is None or seen is None:
            return set()
        given: set[int] = set()
        for key, value in self.calls[name].tensors().items():
            if value.is_floating_point() and self._token_dim(value) is not None:
                given |= self._changed_tokens(value, calls[name].tensors()[key])
        return self._changed_tokens(base, seen) - given

    def _reads_elsewhere(self, name: str) -> bool:
        """Whether the output depends on the tokens other than through the module's tensor arguments.

        It does in an attention whose keys and values come from an earlier layer.
        """
        given = self.calls[name].tensors()

        def hand_back(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return tuple(given.get(i, v) for i, v in enumerate(args)), {k: given.get(k, v) for k, v in kwargs.items()}

        calls: dict[str, Call] = {}
        with (
            experiment(f"Does {name} run with its input exchanged?"),
            _hooked(self.layer.get_submodule(name), hand_back),
        ):
            calls = self._trace(self.specimen.other_ids)
        if name not in calls:
            return False
        base, seen = first_tensor_of(self.calls[name].output), first_tensor_of(calls[name].output)
        return base is not None and seen is not None and bool(self._changed_tokens(base, seen))


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """While open, a hook runs before a module and may change its arguments."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _changed_input(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], counts: Callable[[torch.Tensor], bool]
) -> Iterator[None]:
    """While open, the first floating-point argument of a module that counts is changed."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        changed = list(args)
        for place, value in itertools.chain(enumerate(args), list(kwargs.items())):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and counts(value):
                (changed if isinstance(place, int) else kwargs)[place] = change(value)
                break
        return tuple(changed), kwargs

    with _hooked(module, hook):
        yield
