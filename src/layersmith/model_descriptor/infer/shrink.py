"""A small config with the same kinds of layers as a large one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel, first_line
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import signature
from layersmith.model_descriptor.stock import stock_model

_OWN = 30_000_000  # parameters; up to here a model is its own specimen
_VOCABULARY = 997
_SMALL = 8_000_000  # and up to here a smaller one is small enough
_LARGEST = _OWN  # or up to here, where there is no such: no larger than what is its own specimen
_DIVISORS = (2, 4, 8, 16, 32, 64)
# Numbers below this stay.
_LEAST = (2, 4, 8)
# Sizes of heads that stay: where a state has heads, their number and their size cannot both be divided.
_KEPT: tuple[tuple[int, ...], ...] = ((), (64,), (128,), (64, 128), (256,), (64, 128, 256))
# Attributes that stay, one at a time, where nothing else helps.
_MOST_FACTORS = 6


def shrunk(config: PretrainedConfig, large: nn.Module) -> PretrainedConfig:
    """``config`` itself if its model is small, else one with fewer and narrower layers of all the same kinds.

    Every number of the config is divided by the same power of two, so that what was a multiple of what still is; the
    result counts only if its model runs and has every kind of layer of the large one.

    Args:
        config: of a model.
        large: the model, on the meta device.

    Raises:
        UnsupportedModel: no such config was found.
    """
    if _elements(large) <= _OWN:
        return config
    kinds = [signature(layer) for layer in _longest_list(large).children()]
    depths = _depth_attributes(config, len(kinds))
    # What a layer gives may be used by the next one, or not, as that is: at best each pair that is there is there.
    pairs = list(itertools.pairwise(kinds))
    lengths = dict.fromkeys(max(2, length) for length in (_first_with_all(pairs) + 1, _first_with_all(kinds)))
    problem = "no smaller model of the same kinds of layers runs"
    fixed: set[str] = set()
    # An odd number of heads, of which the other sizes are multiples, stays.
    numbers = {v for own in _configs(config) for n, v in vars(own).items() if type(v) is int and "token" not in n}
    odd = tuple(sorted(v for v in numbers if v % 2 and v > max(_LEAST)))

    def runs(small: PretrainedConfig) -> bool:
        nonlocal problem
        try:
            Specimen(small)
        except Exception as error:  # whatever a family's own code raises for sizes that do not go together
            problem = first_line(error)
            return False
        return True

    for attempt in ("everything", "all but patterns", "factors"):
        if attempt == "all but patterns":
            fixed = _patterns(config, kinds)
        sizes = (*_KEPT, odd)
        staying = [fixed]
        if attempt == "factors":
            sizes, staying = _KEPT[:1], [fixed | {name} for name in _factors(config)]
        larger = []
        for stays, length, kept, divisor, least in itertools.product(staying, lengths, sizes, _DIVISORS, _LEAST):
            small = _divided(config, divisor, least, kept, stays, len(kinds), dict.fromkeys(depths, length))
            try:
                model = stock_model(small)
                size = _elements(model)
                if size > _LARGEST or {signature(layer) for layer in _longest_list(model).children()} != set(kinds):
                    continue
            except Exception as error:  # as above
                problem = first_line(error)
                continue
            if size > _SMALL:
                larger.append(small)
            elif runs(small):
                return small
        if (found := next(filter(runs, larger), None)) is not None:
            return found
    raise UnsupportedModel(f"no smaller model of its family could be made to experiment with ({problem}).")


def _elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _depth_attributes(config: PretrainedConfig, num_layers: int) -> list[str]:
    """Attributes whose number is that of the layers, by taking one layer away."""
    names = {n for own in _configs(config) for n, v in vars(own).items() if type(v) is int and v == num_layers}
    found = []
    for name in sorted(names):
        shorter = _divided(config, 1, 2, (), set(), num_layers, {name: num_layers - 1})
        with suppress(Exception):  # whatever a family's own code raises for a number that it cannot take
            if len(_longest_list(stock_model(shorter))) == num_layers - 1:
                found.append(name)
    return found


def _patterns(config: PretrainedConfig, kinds: list[Any]) -> set[str]:
    """Attributes that say which layers are of which kind: another value, and the kinds are in other places."""
    found = set()
    for own in _configs(config):
        for name, value in vars(own).items():
            if type(value) is not int or name.startswith("_") or not 1 < value < len(kinds):
                continue
            changed = copy.deepcopy(config)
            for other in _configs(changed):
                if type(other) is type(own) and getattr(other, name, None) == value:
                    setattr(other, name, value - 1)
            try:
                layers = _longest_list(stock_model(changed))
            except Exception:  # whatever a family's own code raises for a number that it cannot take
                continue
            if len(layers) == len(kinds) and [signature(layer) for layer in layers.children()] != kinds:
                found.add(name)
    return found


def _factors(config: PretrainedConfig) -> list[str]:
    """Attributes of which another's number is the product with a third's, e.g. the size of heads, smallest first.

    Of such three not all can be divided.
    """
    found: dict[str, int] = {}
    for own in _configs(config):
        numbers = {n: v for n, v in vars(own).items() if type(v) is int and v > 1 and not n.endswith("_token_id")}
        for (name, value), (_, other) in itertools.permutations(numbers.items(), 2):
            if value <= other and value * other in numbers.values():
                found[name] = value
    return sorted(found, key=lambda name: found[name])[:_MOST_FACTORS]


def _longest_list(model: nn.Module) -> nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UnsupportedModel("it has no list of modules, so its layers cannot be told.")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _first_with_all(kinds: list[Any]) -> int:
    seen: set[Any] = set()
    for i, kind in enumerate(kinds):
        seen.add(kind)
        if seen == set(kinds):
            return i + 1
    return len(kinds)


def _divided(
    config: PretrainedConfig,
    divisor: int,
    least: int,
    kept: tuple[int, ...],
    fixed: set[str],
    num_layers: int,
    depth: dict[str, int],
) -> PretrainedConfig:
    small = copy.deepcopy(config)

    def smaller(name: str, value: Any) -> Any:
        if name.endswith("_token_id"):
            return 0 if type(value) is int and value >= _VOCABULARY else [0] if isinstance(value, list) else value
        if type(value) is int:
            if name in depth and value == num_layers:
                return depth[name]
            if "vocab" in name and value > _VOCABULARY:
                return _VOCABULARY
            stays = value < least or value in kept or name in fixed
            return value if stays else max(2, value // divisor)
        if isinstance(value, list) and len(value) == num_layers:
            short = value[: max(depth.values(), default=num_layers)]
            whole = all(type(v) is int for v in short)
            return [v if v < least else max(2, v // divisor) for v in short] if whole else short
        if name.startswith("rope") and isinstance(value, dict):
            return {key: _smaller_rope(own, divisor) for key, own in value.items()}
        return value

    for own in _configs(small):
        for name, value in list(vars(own).items()):
            if not name.startswith("_") and (changed := smaller(name, value)) is not value:
                # An attribute that is computed from others cannot be set, and need not.
                with suppress(Exception):
                    setattr(own, name, changed)
    return small


def _smaller_rope(value: Any, divisor: int) -> Any:
    if isinstance(value, dict):
        return {key: _smaller_rope(own, divisor) for key, own in value.items()}
    if isinstance(value, list) and all(type(v) is int for v in value):
        return [max(1, v // divisor) for v in value]  # sections of a head
    if isinstance(value, list) and len(value) >= divisor:
        return value[: max(1, len(value) // divisor)]  # a factor for every frequency of a head
    return value


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _configs(value)
