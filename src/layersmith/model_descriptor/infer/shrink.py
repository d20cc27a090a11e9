"""A small config with the same kinds of layers as a large one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith import upstream
from layersmith.errors import UnsupportedModel, first_line
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.conventions import ROTARY, TOKEN, TOKEN_ID, VOCABULARY
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import signature
from layersmith.model_descriptor.stock import stock_model

# Numbers of parameters. A model with at most _WHOLE is not shrunk: a hundred of it are built and run. A shrunk model
# has at most _SMALL if one that runs exists, else at most _LARGEST. A model of that size is taken whole if none exists.
_WHOLE = 3_000_000
_SMALL = 3_000_000
_LARGEST = 30_000_000
_VOCABULARY = 997
# With 1, only layers and tokens become fewer: enough for a narrow model with a large vocabulary.
_DIVISORS = (1, 2, 4, 8, 16, 32, 64)
# Numbers below this are not divided; the last three are for a narrow model with a few large numbers, e.g. of experts.
_LEAST = (2, 4, 8, 33, 65, 129)
# Head sizes that are not divided: where a state has heads, their number and their size cannot both be divided.
_KEPT: tuple[tuple[int, ...], ...] = ((), (64,), (128,), (64, 128), (256,), (64, 128, 256))
# The last resort: this many attributes are tried, each as the only one that is not divided.
_MOST_FACTORS = 6


@dataclass(frozen=True)
class _Division:
    """How the numbers of a config become smaller.

    Attributes:
        num_layers: The number of layers of the large model.
        divisor: Every number is divided by it, except:
        least: Numbers below it.
        kept: These numbers.
        fixed: These attributes.
        depth: The new value of each attribute that is the number of layers.
    """

    num_layers: int
    divisor: int = 1
    least: int = 2
    kept: tuple[int, ...] = ()
    fixed: frozenset[str] = frozenset()
    depth: dict[str, int] = field(default_factory=dict)

    def of(self, config: PretrainedConfig) -> PretrainedConfig:
        """A smaller copy of a config and of the configs nested in it."""
        small = copy.deepcopy(config)
        for part in _configs(small):
            for name, value in list(vars(part).items()):
                if not name.startswith("_") and (changed := self._smaller(name, value)) is not value:
                    # An attribute that is computed from others cannot be set and need not be.
                    with foreign_code(f"Can {name} be set?", refusal_is_answer=True) as attempt:
                        attempt.call(setattr, part, name, changed)
            if upstream.is_heterogeneous(part):
                with foreign_code("Can some layers have other attributes?", refusal_is_answer=True) as attempt:
                    attempt.call(upstream.set_per_layer_entries, part, self._entries(part))
        return small

    def _entries(self, part: PretrainedConfig) -> dict[int, dict[str, Any]]:
        """Smaller entries of ``per_layer_config`` for the layers that are left."""
        length = max(self.depth.values(), default=self.num_layers)
        entries = upstream.per_layer_entries(part)
        return {i: {n: self._smaller(n, v) for n, v in e.items()} for i, e in entries.items() if i < length}

    def _smaller(self, name: str, value: Any) -> Any:
        if name.endswith(TOKEN_ID):
            return 0 if type(value) is int and value >= _VOCABULARY else [0] if isinstance(value, list) else value
        if type(value) is int:
            if name in self.depth and value == self.num_layers:
                return self.depth[name]
            if VOCABULARY in name and value > _VOCABULARY:
                return _VOCABULARY
            return value if value in self.kept or name in self.fixed else self._divided(value)
        if isinstance(value, list) and len(value) == self.num_layers:
            short = value[: max(self.depth.values(), default=self.num_layers)]
            return [self._divided(v) for v in short] if all(type(v) is int for v in short) else short
        if name.startswith(ROTARY) and isinstance(value, dict):
            return {key: self._smaller_rotary(part) for key, part in value.items()}
        return value

    def _divided(self, value: int) -> int:
        return value if value < self.least else max(2, value // self.divisor)

    def _smaller_rotary(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._smaller_rotary(part) for key, part in value.items()}
        if isinstance(value, list) and all(type(v) is int for v in value):
            return [max(1, v // self.divisor) for v in value]  # sections of a head
        if isinstance(value, list) and len(value) >= self.divisor:
            return value[: max(1, len(value) // self.divisor)]  # a factor for every frequency of a head
        return value


def shrunk(config: PretrainedConfig, large: nn.Module) -> PretrainedConfig:
    """``config`` itself if its model is small, else a config with fewer and narrower layers of all the same kinds.

    Every number of the config is divided by the same power of two, so that multiples stay multiples. The small model
    has to run and to have every kind of layer of the large one.

    Args:
        config: Config of the model.
        large: The model, on the meta device.

    Raises:
        UnsupportedModel: No such config runs, and why the last one did not.
    """
    if _elements(large) <= _WHOLE:
        return config
    search = _Search(config, [signature(layer) for layer in _longest_list(large).children()])
    whole = _Division(len(search.kinds))
    # An odd number of heads is not divided, since the other sizes are multiples of it.
    values = {v for part in _configs(config) for n, v in vars(part).items() if type(v) is int and TOKEN not in n}
    odd = tuple(sorted(v for v in values if v % 2 and v > 8))
    for attempt in ("everything", "all but patterns", "factors"):
        if attempt == "all but patterns":
            whole = replace(whole, fixed=frozenset(search.patterns()))
        sizes: Sequence[tuple[int, ...]] = (*_KEPT, odd)
        staying = [whole]
        if attempt == "factors":
            sizes = _KEPT[:1]
            staying = [replace(whole, fixed=whole.fixed | {name}) for name in _factors(config)]
        if (small := search.first_that_runs(staying, sizes)) is not None:
            return small
    if _elements(large) <= _LARGEST:
        return config
    raise UnsupportedModel(f"no smaller model of its family could be made to experiment with ({search.problem}).")


class _Search:
    """Small configs of one large config, tried one after another.

    Attributes:
        kinds: Signature of every layer of the large model.
        problem: Why the last config failed.
    """

    def __init__(self, config: PretrainedConfig, kinds: list[Any]):
        self.config, self.kinds = config, kinds
        self.problem = "no smaller model of the same kinds of layers runs"
        self._depths = self._depth_attributes()
        # A layer may use other outputs of the layer before it, so the small model should have each pair of kinds.
        pairs = list(itertools.pairwise(kinds))
        self._lengths = dict.fromkeys(max(2, n) for n in (_first_with_all(pairs) + 1, _first_with_all(kinds)))

    def first_that_runs(
        self, staying: Sequence[_Division], sizes: Sequence[tuple[int, ...]]
    ) -> PretrainedConfig | None:
        """The first config whose model is small and runs with all kinds of layers; else the first larger one."""
        larger = []
        for division, length, kept, divisor, least in itertools.product(
            staying, self._lengths, sizes, _DIVISORS, _LEAST
        ):
            if divisor == 1 and (kept, least) != (sizes[0], _LEAST[0]):
                continue  # nothing is divided, so it is the same config
            depth = dict.fromkeys(self._depths, length)
            small = replace(division, divisor=divisor, least=least, kept=kept, depth=depth).of(self.config)
            model, problem = _built(small)
            self.problem = problem or self.problem
            if model is None or _elements(model) > _LARGEST:
                continue
            if {signature(layer) for layer in _longest_list(model).children()} != set(self.kinds):
                continue
            if _elements(model) > _SMALL:
                larger.append(small)
            elif self._runs(small):
                return small
        return next(filter(self._runs, larger), None)

    def patterns(self) -> set[str]:
        """Attributes that determine the kind of each layer: with another value, the order of kinds differs."""
        names = set()
        for part in _configs(self.config):
            for name, value in vars(part).items():
                if type(value) is not int or name.startswith("_") or not 1 < value < len(self.kinds):
                    continue
                changed = copy.deepcopy(self.config)
                for other in _configs(changed):
                    if type(other) is type(part) and getattr(other, name, None) == value:
                        setattr(other, name, value - 1)
                model, _ = _built(changed)
                layers = [] if model is None else list(_longest_list(model).children())
                if len(layers) == len(self.kinds) and [signature(layer) for layer in layers] != self.kinds:
                    names.add(name)
        return names

    def _depth_attributes(self) -> list[str]:
        """Attributes that set the number of layers: if one is reduced by 1, the model has one layer less."""
        num_layers = len(self.kinds)
        names = {
            n for part in _configs(self.config) for n, v in vars(part).items() if v == num_layers and type(v) is int
        }
        depths = []
        for name in sorted(names):
            model, _ = _built(_Division(num_layers, depth={name: num_layers - 1}).of(self.config))
            if model is not None and len(_longest_list(model)) == num_layers - 1:
                depths.append(name)
        return depths

    def _runs(self, config: PretrainedConfig) -> bool:
        try:
            Specimen(config)
        except UnsupportedModel as error:
            self.problem = first_line(error)
            return False
        return True


def _built(config: PretrainedConfig) -> tuple[nn.Module | None, str]:
    """A model on the meta device that has a list of layers; or None and the reason."""
    model = None
    with foreign_code("Can a smaller model be built?", refusal_is_answer=True) as attempt:
        model = stock_model(config)
    if model is not None and not _lists(model):
        return None, _NO_LIST
    return model, attempt.reason


def _elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _factors(config: PretrainedConfig) -> list[str]:
    """Attributes whose product with another attribute is a third one, e.g. the head size; the smallest first.

    The three attributes cannot all be divided.
    """
    factors: dict[str, int] = {}
    for part in _configs(config):
        numbers = {n: v for n, v in vars(part).items() if type(v) is int and v > 1 and not n.endswith(TOKEN_ID)}
        for (name, value), (_, other) in itertools.permutations(numbers.items(), 2):
            if value <= other and value * other in numbers.values():
                factors[name] = value
    return sorted(factors, key=lambda name: factors[name])[:_MOST_FACTORS]


_NO_LIST = "it has no list of modules, so its layers cannot be identified."


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]


def _longest_list(model: nn.Module) -> nn.ModuleList:
    lists = _lists(model)
    if not lists:
        raise UnsupportedModel(_NO_LIST)
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


def _first_with_all(kinds: list[Any]) -> int:
    """The length of the shortest prefix that has all kinds."""
    seen: set[Any] = set()
    for i, kind in enumerate(kinds):
        seen.add(kind)
        if seen == set(kinds):
            return i + 1
    return len(kinds)


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and all configs nested in it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _configs(value)
