"""Finds sizes inside a subblock: config attributes that change one subblock alone and are no number of heads or width.

These are the sizes of a head of queries and keys or of values, the ranks of latent attention, and the latent width of
experts. Which units they count, and what removing one does, the library proves later. The experiments here show what
else a layer needs with another size. A rotary embedding is made once for all layers, so a layer with smaller heads
takes only some of its entries. Attention scores are scaled by the size of a head, and keep the parent's scale.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.experiment import Effect
from layersmith.model_descriptor.infer.attributes import AttributePath, merged, nested
from layersmith.model_descriptor.infer.cache_contents import filled_cache
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.trial import Trial
from layersmith.model_descriptor.stock import language_config
from layersmith.modeling_layersmith import with_overrides
from layersmith.upstream import cache_slots, keys_and_values


@dataclass(frozen=True)
class SharedEntries:
    """An argument of a module that all layers share, and that is as long as a size or a part of it.

    Attributes:
        module: The module of the layer.
        argument: Name of the argument: a tensor, or a tuple of tensors.
        length: Length of its last dimension, of every ``of`` numbers of the size.
        of: See ``length``.
    """

    module: str
    argument: str
    length: int
    of: int


@dataclass(frozen=True)
class InnerSize:
    """An attribute that sets a size inside one subblock.

    Attributes:
        path: The attribute.
        subblock: ``"attention"`` or ``"ffn"``.
        value: The size in the config that was examined, where its attribute is not set; else 0.
        constants: Module, attribute and value of numbers that stay when the size changes, e.g. the scale of attention
            scores.
        shared: Arguments of which a layer with another size takes only some entries.
        cached: Numbers in the KV cache for each token and head, for every number of the size.
    """

    path: AttributePath
    subblock: str
    value: int = 0
    constants: tuple[tuple[str, str, float], ...] = ()
    shared: tuple[SharedEntries, ...] = ()
    cached: float = 0.0

    @property
    def name(self) -> str:
        return ".".join(self.path)


def find_inner_sizes(
    trial: Trial, known: Collection[AttributePath], head_size: tuple[AttributePath, int] | None
) -> tuple[InnerSize, ...]:
    """The sizes inside the subblocks of a kind of layer.

    Args:
        trial: The kind of layer.
        known: Attributes that set other sizes.
        head_size: An attribute that is not set and would be the size of a head, and its value in the small model.
    """
    values = {path: trial.value(path) for path in trial.effects if path not in known}
    if head_size is not None:
        values[head_size[0]] = head_size[1]
    found = (_inner_size(trial, path, value) for path, value in values.items() if value > 1)
    return tuple(size for size in found if size is not None)


def _inner_size(trial: Trial, path: AttributePath, value: int) -> InnerSize | None:
    other = next((n for n in (2 * value, value // 2) if n > 1 and trial.shapes({path: n}) is not None), None)
    if other is None:
        return None
    effect = Effect.between(trial.base, trial.shapes({path: other}) or {}, other)
    owners = {trial.kind.owners.get(name) for name in effect.shapes}
    governs_one = effect.shapes and not effect.came_or_went and len(owners) == 1
    if not governs_one or any(len(effect.dims(name)) != 1 for name in effect.shapes):
        return None
    whole = _whole_model(trial, path, other)
    subblock = next(iter(owners))
    if whole is None or subblock is None or whole.hidden_size != trial.specimen.hidden_size:
        return None
    before, after = (_floats(specimen.model.get_submodule(trial.layer_name)) for specimen in (trial.specimen, whole))
    constants = tuple((*place, number) for place, number in before.items() if after.get(place, number) != number)
    size = InnerSize(path, subblock, 0 if trial.numbers.get(path) else value, constants)
    if subblock == "ffn":
        return size
    shared = tuple(_shared_entries(trial, whole, value, other))
    return replace(size, shared=shared, cached=_cached(trial, whole, other - value))


def _whole_model(trial: Trial, path: AttributePath, other: int) -> Specimen | None:
    """The small model with another value for all its parts, not only in layers; None if it does not run.

    Parts outside the layers, such as a rotary embedding, may read the size from another attribute of the same value.
    """
    config, value = trial.specimen.config, trial.value(path)
    language = language_config(config)
    outer = next((name for name, part in vars(config).items() if part is language), None)
    twins = [twin for twin in trial.idle_everywhere if trial.value(twin) == value]
    for paths in ((path,), *((path, twin) for twin in twins)):
        overrides: dict[str, Any] = {}
        for changed in paths:
            overrides = merged(overrides, nested(language, changed, other))
        with suppress(UnsupportedModel), foreign_code("Does the config take it?", refusal_is_answer=True):
            return Specimen(with_overrides(config, {outer: overrides} if outer else overrides))
    return None


def _shared_entries(trial: Trial, whole: Specimen, value: int, other: int) -> Iterator[SharedEntries]:
    """The arguments of modules of the attention that become longer with the size; of the outermost modules only."""
    assert trial.kind.attention is not None
    found: set[str] = set()
    before, after = (_arguments(specimen, trial.layer_name) for specimen in (trial.specimen, whole))
    for (module, argument), length in before.items():
        inside = any(module == name or module.startswith(f"{name}.") for name in trial.kind.attention.modules)
        longer = after.get((module, argument), length)
        if inside and argument not in found and longer * value == length * other:
            found.add(argument)
            yield SharedEntries(module, argument, length, value)


def _arguments(specimen: Specimen, layer: str) -> dict[tuple[str, str], int]:
    """Module in a layer and name of an argument to the length of its tensors' last dimension, where all are alike."""
    prefix = f"{layer}."
    inside = [name for name, _ in specimen.model.named_modules() if name.startswith(prefix)]
    lengths: dict[tuple[str, str], int] = {}
    for call in specimen.trace(specimen.ids, keep=inside):
        for name, given in call.kwargs.items() if call.name.startswith(prefix) else ():
            parts = given if isinstance(given, tuple | list) else [given]
            tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim > 1]
            if name != "hidden_states" and len(tensors) == len(parts) and len({t.shape[-1] for t in tensors}) == 1:
                lengths.setdefault((call.name.removeprefix(prefix), name), tensors[0].shape[-1])
    return lengths


def _cached(trial: Trial, whole: Specimen, more: int) -> float:
    """Numbers in the KV cache for each token and head, for every number of the size."""
    numbers = []
    for specimen in (trial.specimen, whole):
        slots = cache_slots(filled_cache(specimen))
        slot = trial.index * len(slots) // len(trial.survey.base)  # a layer with several attentions has several
        kept = keys_and_values(slots[slot]) if slot < len(slots) else (None, None)
        numbers.append(sum(t.shape[-1] for t in kept if t is not None and t.numel() and t.ndim == 4))
    return (numbers[1] - numbers[0]) / more


def in_full(size: InnerSize, value: int, layers: Sequence[nn.Module]) -> InnerSize:
    """A size in the full model, with the constants of its layers; those that differ between layers are left out.

    Args:
        size: The size in the small model.
        value: Its value in the full model, where its attribute is not set.
        layers: The layers of the kind in the full model.
    """
    floats = [_floats(layer) for layer in layers]
    constants = []
    for module, name, _ in size.constants:
        numbers = {of_layer.get((module, name)) for of_layer in floats}
        number = next(iter(numbers), None)
        if len(numbers) == 1 and number is not None:
            constants.append((module, name, number))
    return replace(size, constants=tuple(constants), value=value if size.value else 0)


def _floats(layer: nn.Module) -> dict[tuple[str, str], float]:
    """Module and attribute of every plain float of a layer's modules."""
    return {
        (name, attribute): value
        for name, module in layer.named_modules()
        for attribute, value in vars(module).items()
        if type(value) is float
    }
