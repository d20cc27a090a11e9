"""Configs that differ from a parent's in the hidden size alone, and the weights whose shapes follow it.

The hidden size is found by experiment: it is the attribute that makes the embedding narrower. Other sizes may follow it
where a config does not say them, e.g. the size of a head or the width of an FFN. They are pinned to what they are, as
far as an attribute can do so. What still changes carries the residual stream.

Shapes: D hidden, D' the smaller hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel, first_line, whole_reason
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.conventions import EPSILON
from layersmith.model_descriptor.experiment import Shapes
from layersmith.model_descriptor.infer.attributes import AttributePath, numbers, value_at
from layersmith.model_descriptor.infer.trial import ANY_SIZES, noting_what_is_missing
from layersmith.model_descriptor.stock import language_config, stock_class, stock_model
from layersmith.upstream import model_from_config

# Epsilons of norms are below it.
_SMALL = 1e-2


@dataclass(frozen=True)
class Carrier:
    """A dimension of a weight that has entries for every channel of the residual stream, or for every head.

    Attributes:
        name: Name in the model's ``state_dict``.
        dim: The dimension.
        times: Entries for a channel; more than one where several vectors of D channels lie in one dimension.
        rest: Further entries at the end, which stay.
        unit: Neighbouring entries that stay or go together: 1 for a channel of the residual stream, else the size of a
            head. There are D entries of heads too.
        interleaved: Whether all entries of a channel or head are neighbours, rather than D apart.
    """

    name: str
    dim: int
    times: int = 1
    rest: int = 0
    unit: int = 1
    interleaved: bool = False

    def entries(self, units: torch.Tensor, hidden_size: int) -> torch.Tensor:
        """Positions in the dimension of some of the channels, or of some heads."""
        if self.interleaved:
            return (units[:, None] * self.times * self.unit + torch.arange(self.times * self.unit)).flatten()
        within = units[:, None] * self.unit + torch.arange(self.unit)
        return (torch.arange(self.times)[:, None] * hidden_size + within.flatten()).flatten()

    def staying(self, units: torch.Tensor, hidden_size: int) -> torch.Tensor:
        """The entries that are left with only some of the channels or heads."""
        last = self.times * hidden_size + torch.arange(self.rest)
        return torch.cat([self.entries(units, hidden_size), last])


@dataclass(frozen=True)
class HiddenSize:
    """How the config of a family says its hidden size.

    Attributes:
        paths: The attributes that are the hidden size.
        pins: Attributes that are set so that other sizes stay as they are.
        multipliers: Attributes that the hidden size is multiplied with, which grow as it shrinks.
        heads: Numbers of heads that shrink with it, where the size of a head follows from both.
        epsilons: Whether the epsilons of norms grow with the mean square, which is of fewer channels. They stay where
            other norms have them too and would differ.
    """

    paths: tuple[AttributePath, ...]
    pins: tuple[AttributePath, ...] = ()
    multipliers: tuple[AttributePath, ...] = ()
    heads: tuple[AttributePath, ...] = ()
    epsilons: bool = True

    def __str__(self) -> str:
        return " and ".join(".".join(path) for path in self.paths)

    def number_of_heads(self, config: PretrainedConfig) -> int:
        """The number of heads that shrinks with it; 1 if none does."""
        return value_at(config, self.heads[0]) if self.heads else 1

    def narrower(self, config: PretrainedConfig, size: int) -> PretrainedConfig:
        """A config with a smaller hidden size that is the same in everything else, as a checkpoint would hold it.

        Raises:
            UnsupportedModel: The family has no model of that size with everything else as it is.
        """
        of = Configs(config)
        values: dict[AttributePath, Any] = {**dict.fromkeys(self.paths, size), **of.grown(self.multipliers, size)}
        values |= of.fewer(self.heads, size)
        for path in self.pins:
            values |= of.pin(path, values)
        above = self.paths[0][:-1]
        for name, value in _epsilons(_part(config, above)) if self.epsilons else ():
            values[*above, name] = value * of.size / size
        return of.changed(values)


class Configs:
    """A config and its changes, with the shapes of the models that they describe.

    Attributes:
        config: The config.
        base: Shapes of its model's ``state_dict``.
        size: D.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self._shapes: dict[str, Shapes | None] = {}
        self.refusal = ""
        model = stock_model(config)
        self.base = shapes_of(model)
        self.size = _embedding_width(model)

    def changed(self, values: Mapping[AttributePath, Any], is_checked: bool = True) -> PretrainedConfig:
        """A copy with other values, written and read again as a checkpoint's config is, and checked as when written.

        Raises:
            UnsupportedModel: The config class does not take them.
        """
        changed = None
        with foreign_code("Does the config take these values?", refusal_is_answer=True) as attempt:
            changed = copy.deepcopy(self.config)
            for path, value in values.items():
                setattr(_part(changed, path[:-1]), path[-1], value)
            changed = attempt.call(type(changed).from_dict, changed.to_dict())
            if is_checked and hasattr(changed, "validate"):
                attempt.call(changed.validate)
        if changed is None or attempt.failed:
            raise UnsupportedModel(f"its config does not take these values ({whole_reason(attempt.error)}).")
        return changed

    def shapes(self, values: Mapping[AttributePath, Any]) -> Shapes | None:
        """Shapes of the model with other values; None if the family refuses them."""
        key = repr(sorted(values.items()))
        if key not in self._shapes:
            self._shapes[key] = None
            try:
                changed = self.changed(values, is_checked=False)  # other sizes may have to change too
            except UnsupportedModel as refusal:
                self.refusal = first_line(refusal)
                return None
            self._shapes[key] = self.shapes_with(changed)
        return self._shapes[key]

    def shapes_with(self, config: PretrainedConfig) -> Shapes | None:
        """Shapes of the model of a config; None if the family refuses it, and then ``refusal`` says why."""
        shapes = None
        with foreign_code("Can the model be built with these sizes?", refusal_is_answer=True) as attempt:
            shapes = shapes_of(stock_model(config))
        self.refusal = attempt.reason or self.refusal
        return shapes

    def effect(self, values: Mapping[AttributePath, Any]) -> set[tuple[str, int]] | None:
        """The dimensions that change with the values; None if there is no such model, or it has other weights."""
        shapes = self.shapes(values)
        if shapes is None or shapes.keys() != self.base.keys():
            return None
        pairs = ((name, self.base[name], shapes[name]) for name in self.base)
        if any(len(old) != len(new) for _, old, new in pairs):
            return None
        return {(n, d) for n, old in self.base.items() for d in range(len(old)) if old[d] != shapes[n][d]}

    @cached_property
    def numbers(self) -> dict[AttributePath, int]:
        """Every number attribute; 0 for those without a value, and for those that models ask for in vain."""
        return dict(numbers(self.config, num_layers=-1)) | dict.fromkeys(self._missing(), 0)

    def _missing(self) -> list[AttributePath]:
        """Attributes that the model's code asks for and the config does not have."""
        names: list[str] = []
        copied = copy.deepcopy(self.config)
        noting_what_is_missing(language := language_config(copied), names)
        with foreign_code("Which attributes does the model ask for?", refusal_is_answer=True), torch.device("meta"):
            model_from_config(stock_class(self.config), copied)
        above = next(((n,) for n, value in vars(copied).items() if value is language), ())
        return [(*above, name) for name in names]

    def hidden_paths(self) -> Iterator[tuple[AttributePath, ...]]:
        """Attributes that may be the hidden size together; those first that are it most likely."""
        equal = [path for path, value in self.numbers.items() if value == self.size]
        alone = [path for path in equal if self._narrows((path,))]
        for path in alone:
            yield (path,)
        for path in alone:
            others = [other for other in equal if other != path]
            yield from ((path, other) for other in others)
            if len(others) > 1:
                yield (path, *others)
        if not alone:
            yield from (pair for pair in itertools.combinations(equal, 2) if self._narrows(pair))

    def _narrows(self, paths: tuple[AttributePath, ...]) -> bool:
        """Whether another value makes the embedding narrower, alone or with what multiplies it."""
        for size in sizes_to_try(self.size):
            values: dict[AttributePath, Any] = dict.fromkeys(paths, size)
            grown = (
                {path: n * self.size // size} for path, n in self.numbers.items() if n and not n * self.size % size
            )
            for more in itertools.chain([{}], grown if size == self.size // 2 else ()):
                if self.shapes(values | more) is not None:
                    return _embedding_width(stock_model(self.changed(values | more, is_checked=False))) == size
        return False

    def grown(self, multipliers: tuple[AttributePath, ...], size: int) -> dict[AttributePath, int]:
        """Values of multipliers with which their products with the hidden size stay.

        Raises:
            UnsupportedModel: One would not be a whole number.
        """
        grown = {}
        for path in multipliers:
            value, rest = divmod(value_at(self.config, path) * self.size, size)
            if rest:
                raise UnsupportedModel(f"{'.'.join(path)} times {size} is not what it is times {self.size}.")
            grown[path] = value
        return grown

    def fewer(self, heads: tuple[AttributePath, ...], size: int) -> dict[AttributePath, int]:
        """Numbers of heads with which a head is as large as before.

        Raises:
            UnsupportedModel: One would not be a whole number.
        """
        fewer = {}
        for path in heads:
            fewer[path], rest = divmod(value_at(self.config, path) * size, self.size)
            if rest:
                least = self.size // value_at(self.config, path)
                raise UnsupportedModel(
                    f"its heads are {least} channels of the hidden size, so it is a multiple of that."
                )
        return fewer

    def pin(self, path: AttributePath, values: Mapping[AttributePath, Any]) -> dict[AttributePath, int]:
        """The value of an unset attribute with which least changes where other values are set; empty if none helps."""
        before = self.effect(values)
        best: dict[AttributePath, int] = {}
        for value in self._sizes:
            if self.shapes({path: value}) != self.base:  # alone it changes nothing
                continue
            after = self.effect({**values, path: value})
            if after is not None and (before is None or len(after) < len(before)):
                best, before = {path: value}, after
        return best

    @cached_property
    def _sizes(self) -> list[int]:
        """Sizes that may follow from the hidden size: lengths of dimensions, and what is left of them for a head."""
        lengths = {n for shape in self.base.values() for n in shape if n % self.size == 0} | {self.size}
        heads = {n for n in self.numbers.values() if 1 < n <= self.size}
        return sorted(lengths | {self.size // n for n in heads if self.size % n == 0}, reverse=True)

    def found(self, paths: tuple[AttributePath, ...], size: int) -> Iterator[HiddenSize]:
        """The hidden size alone, with what has to be pinned for it, with what multiplies it, and with heads."""
        values: dict[AttributePath, Any] = dict.fromkeys(paths, size)
        needed: tuple[AttributePath, ...] = ()
        if self.shapes(values) is None:  # it has to be built with what multiplies the hidden size
            needed = tuple(path for path in self.numbers if self._multiplies(path, values, size))[:1]
            values |= self.grown(needed, size)
        hidden_size = HiddenSize(paths, multipliers=needed)
        if self.shapes(values) is None:
            return
        yield hidden_size
        for path in self._unset:
            if pinned := self.pin(path, values):
                values |= pinned
                hidden_size = dataclasses.replace(hidden_size, pins=(*hidden_size.pins, path))
        if hidden_size.pins:
            yield hidden_size
        multipliers = [path for path in self.numbers if self._multiplies(path, values, size)]
        if multipliers:
            yield dataclasses.replace(hidden_size, multipliers=(*needed, *multipliers))
        for path, number in self.numbers.items():
            if path not in values and 1 < number < self.size and not (self.size % number or number * size % self.size):
                fewer = {**values, path: number * size // self.size}
                if self.effect(fewer) == self.effect(values):  # what is made of heads is as long as the hidden size
                    yield dataclasses.replace(hidden_size, heads=(path,))

    @cached_property
    def _unset(self) -> list[AttributePath]:
        """Attributes without a value that set a size once they have one."""
        unset = [path for path, value in self.numbers.items() if value == 0]
        return [path for path in unset if any(self.shapes({path: size}) != self.base for size in ANY_SIZES)]

    def _multiplies(self, path: AttributePath, values: Mapping[AttributePath, Any], size: int) -> bool:
        value = self.numbers[path]
        before = self.effect(values)
        if path in values or not value or value * self.size % size:
            return False
        after = self.effect({**values, path: value * self.size // size})
        return after is not None and (before is None or len(after) < len(before))


def carriers(base: Shapes, changed: Shapes, hidden_size: int, size: int) -> tuple[Carrier, ...]:
    """The dimensions that follow the hidden size.

    Args:
        base, changed: Shapes of a model's ``state_dict`` with ``hidden_size`` and with ``size`` channels.

    Raises:
        UnsupportedModel: Something else changes too.
    """
    if base.keys() != changed.keys():
        name = sorted(base.keys() ^ changed.keys())[0]
        raise UnsupportedModel(f"{name} is there with only one of two hidden sizes.")
    found = []
    for name, old in base.items():
        for dim, (before, after) in enumerate(zip(old, changed[name], strict=True)):
            if before == after:
                continue
            times, left = divmod(before - after, hidden_size - size)
            if left or times < 1 or before < times * hidden_size:
                raise UnsupportedModel(
                    f"{name} has {before} entries with hidden size {hidden_size} and {after} with {size}."
                )
            found.append(Carrier(name, dim, times, rest=before - times * hidden_size))
    return tuple(found)


def sizes_to_try(size: int) -> list[int]:
    """Smaller hidden sizes for experiments; a family may take only some, e.g. multiples of its heads."""
    return list(dict.fromkeys(n for n in (size * 3 // 4, size // 2, size * 7 // 8, size - 8) if 0 < n < size))


def template(name: str) -> str:
    """A name without the numbers of layers and experts in it."""
    return re.sub(r"\.\d+(?=\.|$)", ".{}", name)


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _embedding_width(model: Any) -> int:
    width = 0
    with foreign_code("How wide is the embedding?", refusal_is_answer=True):
        width = int(model.get_input_embeddings().weight.shape[1])
    if not width:
        width = next((m.embedding_dim for m in model.modules() if isinstance(m, torch.nn.Embedding)), 0)
    return width


def _part(config: Any, path: AttributePath) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _epsilons(config: Any) -> Iterator[tuple[str, float]]:
    for name, value in vars(config).items():
        if EPSILON in name and isinstance(value, float) and 0 < value < _SMALL:
            yield name, value
