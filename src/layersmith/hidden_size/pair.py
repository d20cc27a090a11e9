"""A small random model with dead channels, and the same model without them, to be compared.

Channels are dead if every entry for them, in all weights that carry the residual stream, is zero.

Shapes: D hidden, D' the smaller hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.hidden_size.config import Carrier, Configs, carriers, shapes_of, template
from layersmith.hidden_size.narrowing import Factor, Kept, Narrowing, layer_of, without_channels
from layersmith.library.axes.layers import input_dim
from layersmith.model_descriptor.infer.specimen import Specimen, experiment, first_tensor_of

# Largest difference, relative to the largest number, that rounding and the epsilons of norms explain.
_TOLERANCE = 3e-4
# The embeddings of the small model are multiplied with it, so that epsilons of norms are small against its numbers.
_LOUD = 10.0


class Pair:
    """A random model with dead channels, and one without these channels.

    Attributes:
        names: Modules that are compared: those that hold weights which carry the residual stream.
        with_weights: All modules that hold weights.
        embedding: The weight of the first embedding that does; empty if none does.
        fixed: Factors of weights of the narrow model, by their names.
        stream: Power of sqrt(D / D') with which the residual stream of the narrow model is multiplied.
    """

    def __init__(self, configs: Configs, narrower: PretrainedConfig, guess: Narrowing, seed: int):
        self.guess, self.hidden_size = guess, configs.size
        self.large, self.small = Specimen(configs.config, seed), Specimen(narrower, seed)
        base, changed = shapes_of(self.large.model), shapes_of(self.small.model)
        self.size = Configs(narrower).size
        self.ratio = self.hidden_size / self.size
        self.generator = torch.Generator().manual_seed(seed)
        self.kept, self.gone = (Kept(units) for units in self._some(self.hidden_size))
        if guess.hidden_size.heads:
            self.guess = guess = dataclasses.replace(
                guess,
                of_heads=_of_heads(
                    self.large, carriers(base, changed, self.hidden_size, self.size), self.gone.channels
                ),
            )
        heads = guess.hidden_size.number_of_heads(configs.config)
        self.carriers = guess.carriers(base, changed, self.hidden_size, self.size, self.hidden_size // heads)
        for layer in sorted({layer_of(c.name) for c in self.carriers if c.unit > 1}):
            self.kept.heads[layer], self.gone.heads[layer] = self._some(heads)
        self.fixed: dict[str, Factor] = {}
        self.stream = 0
        names = (f"{name}.weight" for name, m in self.large.model.named_modules() if isinstance(m, nn.Embedding))
        self.embedding = next((name for name in names if any(c.name == name for c in self.carriers)), "")
        self._make_dead()
        self.logits = self.large.run()
        self.sliced = without_channels(self.large.model.state_dict(), self.carriers, self.kept, self.hidden_size)
        carrying = {c.name for c in self.carriers}
        self.names = [
            name
            for name, module in self.small.model.named_modules()
            if any(f"{name}.{own}".lstrip(".") in carrying for own, _ in module.named_parameters(recurse=False))
        ]
        modules = self.small.model.named_modules()
        self.with_weights = [name for name, m in modules if next(m.parameters(recurse=False), None) is not None]
        self.outputs: dict[str, list[Any]] = {}  # of the modules of the large model, in the order of their calls
        for call in self.large.trace(self.large.ids, keep=self.with_weights):
            if call.name in self.with_weights:
                self.outputs.setdefault(call.name, []).append(call.output)

    def _some(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The channels or heads that stay, of a number of them, and those that go."""
        order = torch.randperm(number, generator=self.generator)
        left = number * self.size // self.hidden_size
        return order[:left].sort().values, order[left:]

    @torch.no_grad()
    def _make_dead(self) -> None:
        state = self.large.model.state_dict()
        if self.embedding:
            state[self.embedding].mul_(_LOUD)
        for carrier in self.carriers:
            weight = state[carrier.name]
            weight.index_fill_(carrier.dim, carrier.entries(self.gone.of(carrier), self.hidden_size), 0)
            if self.guess.centered and carrier.unit == 1:
                first, second = (carrier.entries(self.kept.channels[i::2], self.hidden_size) for i in (0, 1))
                sign = 1 if weight.ndim == 1 and carrier.name.endswith("weight") else -1
                weight.index_copy_(carrier.dim, second, sign * weight.index_select(carrier.dim, first))

    # ------------------------------------------------------------------------------------------ comparing

    def check(self) -> None:
        """Raises: UnsupportedModel: With the factors of the guess, the logits are not those of the large model."""
        named = self.guess.factors
        self.load({name: named[template(name)] for name in self.sliced if template(name) in named})
        if not close(self.logits, self.narrow_logits()):
            raise UnsupportedModel("without dead channels of the residual stream, its logits are others.")

    def load(self, factors: Mapping[str, Factor]) -> None:
        """Give the narrow model its weights, multiplied with factors."""
        self.small.model.load_state_dict(self.sliced)
        self.fixed = {}
        for name, factor in factors.items():
            self.multiply(name, factor)

    @torch.no_grad()
    def multiply(self, name: str, factor: Factor | None) -> None:
        """Multiply a weight of the narrow model with another factor; None for none."""
        weight = self.small.model.state_dict()[name]
        weight.copy_(self.sliced[name] if factor is None else factor.of(self.sliced[name], self.ratio))
        self.fixed.pop(name, None)
        if factor is not None:
            self.fixed[name] = factor

    def narrow_logits(self) -> torch.Tensor:
        """Logits of the narrow model.

        Raises:
            UnsupportedModel: It does not run.
        """
        with experiment("Does the narrow model run?") as attempt:
            return self.small.run(self.large.ids)
        raise UnsupportedModel(f"with fewer channels it does not run ({attempt.reason}).")

    def first_difference(self) -> tuple[str, Any]:
        """Name and call of the first module whose output differs from the large model's; an empty name if all agree."""
        calls = []
        with experiment("Does the narrow model run?") as attempt:
            calls = self.small.trace(self.large.ids, keep=self.names)
        if attempt.failed:
            raise UnsupportedModel(f"with fewer channels it does not run ({attempt.reason}).")
        seen: dict[str, int] = {}
        for call in sorted((c for c in calls if c.name in self.names), key=lambda c: c.end):
            number = seen[call.name] = seen.get(call.name, -1) + 1
            if not self.agrees(call.name, number, call.output):
                return call.name, (number, call.args, call.kwargs)
        return "", None

    def agrees(self, name: str, number: int, output: Any) -> bool:
        """Whether an output of a module is that of the large model without the dead channels."""
        if number >= len(self.outputs.get(name, ())):
            return True
        expected, made = first_tensor_of(self.outputs[name][number]), first_tensor_of(output)
        if expected is None or made is None or not made.is_floating_point() or expected.ndim != made.ndim:
            return True
        for dim, (before, after) in enumerate(zip(expected.shape, made.shape, strict=True)):
            if before == after:
                continue
            times = before // self.hidden_size
            if after != times * self.size or before % self.hidden_size or self._gives_heads(name):
                return True  # it is no vector of channels; what follows from it is compared
            entries = Carrier("", dim, times).entries(self.kept.channels, self.hidden_size)
            expected = expected.index_select(dim, entries) * self.ratio ** (self.stream / 2)
        return close(expected, made)

    def _gives_heads(self, name: str) -> bool:
        return any(c.unit > 1 and c.name == f"{name}.bias" for c in self.carriers) or any(
            c.unit > 1 and c.name == f"{name}.weight" and c.dim != input_dim(self.small.model, c.name)
            for c in self.carriers
        )

    def weights(self, name: str) -> list[str]:
        """Names of a module's weights that no module before it uses too."""
        module = self.small.model.get_submodule(name)
        names = [f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False)]
        return [weight for weight in names if weight not in self.shared]

    @cached_property
    def shared(self) -> set[str]:
        """Weights that several modules use, but for the first."""
        first: dict[int, str] = {}
        pairs = self.small.model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in pairs if first.setdefault(id(parameter), name) != name}


@torch.no_grad()
def _of_heads(large: Specimen, found: Sequence[Carrier], gone: torch.Tensor) -> frozenset[tuple[str, int]]:
    """The dimensions of weights that hold heads rather than channels, by names without numbers.

    In a layer, a map between channels and heads has both. It reads channels if its input is zero for channels that
    are dead in everything else.

    Args:
        large: The model with all channels.
        found: The dimensions that follow the hidden size.
        gone: The dead channels.
    """
    dims: dict[str, list[Carrier]] = {}
    for carrier in found:
        dims.setdefault(carrier.name, []).append(carrier)
    mapped = {n.removesuffix(".weight") for n, both in dims.items() if len(both) == 2 and layer_of(n) >= 0}
    model = Specimen(large.config).model
    for carrier in found:
        if carrier.name.rpartition(".")[0] not in mapped:
            entries = carrier.entries(gone, large.hidden_size)
            model.state_dict()[carrier.name].index_fill_(carrier.dim, entries, 0)
    given: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: given.setdefault(n, args[0]))
        for name in mapped
    ]
    model(input_ids=large.ids, use_cache=False)
    of_heads = set()
    for name, tensor in given.items():
        reads = input_dim(model, f"{name}.weight")
        is_reader = not tensor[..., gone].any()
        for carrier in found:
            if carrier.name.rpartition(".")[0] == name:
                reading = carrier.dim == reads and carrier.name.endswith("weight")
                if reading != is_reader:
                    of_heads.add((template(carrier.name), carrier.dim))
    for handle in handles:
        handle.remove()
    return frozenset(of_heads)


def close(expected: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether two outputs are the same but for rounding and the epsilons of norms."""
    most = float(expected.abs().max())
    return expected.shape == made.shape and float((expected - made).abs().max()) <= _TOLERANCE * most
