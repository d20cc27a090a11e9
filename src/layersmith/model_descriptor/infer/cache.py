"""What layers leave in the cache, and whether it is a list that they append to in turn.

Such a list bears no gap: once a layer does not write to it, every later one has to take the slot before its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.block_config import MambaConfig
from layersmith.model_descriptor.infer.attributes import numbers, value_at
from layersmith.model_descriptor.infer.cache_contents import filled_cache, recurrent_states
from layersmith.model_descriptor.infer.removal import put
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.specimen import TOKENS, Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind
from layersmith.model_descriptor.stock import language_config, stock_model, whole_number
from layersmith.modeling_layersmith import LAYER_INDEX_NAMES, set_cache_slot


def appends_to_cache(specimen: Specimen, names: Sequence[str], kinds: Sequence[LayerKind]) -> bool:
    """Run without one attention: the cache fails while later layers keep their slots, and does not once they move up.

    Args:
        specimen: the model.
        names: of its layers.
        kinds: of every layer.
    """
    attentions = [i for i, kind in enumerate(kinds) if kind.attention is not None]
    gone = next(
        (i for i in attentions[:-1] if (own := kinds[i].attention) and own.removable and not own.stays),
        None,
    )
    if gone is None:
        return False
    model = stock_model(specimen.config, "cpu", torch.float32).eval()
    attention = kinds[gone].attention
    assert attention is not None
    for name, record in attention.replaced:
        put(model.get_submodule(names[gone]), name, record)
    if _fills_cache(model, specimen.ids):
        return False
    for slot, i in enumerate(own for own in attentions if own != gone):
        own = kinds[i].attention
        assert own is not None
        set_cache_slot(model.get_submodule(names[i]), slot, own.modules)
    return _fills_cache(model, specimen.ids)


def _fills_cache(model: nn.Module, ids: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True)
    except Exception:  # whatever a family's own code raises
        return False
    return True


@dataclass(frozen=True)
class KeptState:
    """A tensor in the cache whose size does not grow with the tokens.

    Attributes:
        shape: for a sequence.
        of_mixer: whether it is the state of the mixer: heads times their size times N.
        channels: weights of a convolution whose first dimensions together are its first; its last is as long as
            theirs and ``beyond``.
        beyond: see there.
        itemsize: bytes of a number, where that does not go with the dtype of the weights; else 0.
    """

    shape: tuple[int, ...]
    of_mixer: bool = False
    channels: tuple[str, ...] = ()
    beyond: int = 0
    itemsize: int = 0

    def numbers(self, mamba: MambaConfig | None, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many numbers a sequence has in it.

        Args:
            mamba: the sizes of the layer's mixer, if they are known.
            shapes: of the layer's weights.
        """
        if self.of_mixer and mamba is not None:
            return mamba.num_heads * mamba.head_dim * mamba.state_dim
        if self.channels:
            return sum(shapes[name][0] for name in self.channels) * (shapes[self.channels[0]][-1] + self.beyond)
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeptTokens:
    """A tensor in the cache that grows by as much with every token.

    Attributes:
        numbers: a token.
        itemsize: bytes of a number, where that does not go with the dtype of the weights; else 0.
        name: of the attribute of the cache's layer.
        once: whether the first layer of its kind keeps it for all of them, with or without an attention of its own.
    """

    numbers: int
    itemsize: int = 0
    name: str = ""
    once: bool = False


@dataclass(frozen=True)
class InCache:
    """What a layer leaves in the cache.

    Attributes:
        stateful: a state of fixed size, no keys and values.
        numbers: for each one of a value head; 2 where keys are as long as values.
        latent: numbers for a token that all heads share, of keys and of values; none if each KV head has its own.
        empty: nothing, e.g. because it uses the keys and values of another layer.
        states: of fixed size.
        slots: of the cache that are its own: one for each of its attentions.
        beside: what is kept of every token beside keys and values, e.g. the keys of what chooses among them.
        for_each_query: keys and values once for each query head, though several have the same.
        more: whether there are tensors beside all these, or keys and values in one, so that what it takes is estimated.
    """

    stateful: bool = False
    numbers: float = 2.0
    latent: tuple[int, ...] = ()
    empty: bool = False
    states: tuple[KeptState, ...] = ()
    slots: int = 1
    beside: tuple[KeptTokens, ...] = ()
    for_each_query: bool = False
    more: bool = False


def in_cache(
    specimen: Specimen,
    names: Sequence[str],
    of_layer: Sequence[int],
    kinds: Sequence[LayerKind],
    sizes: Sequence[Sizes],
) -> list[InCache]:
    """Look at the cache after a run; where there is none, they are taken for keys and values of one length.

    Args:
        specimen: the model.
        names: of its layers.
        of_layer: the kind of each.
        kinds, sizes: of every kind.
    """
    cache = filled_cache(specimen)
    if cache is None:
        return [InCache()] * len(kinds)
    narrow, shorter = _narrow_cache(specimen), _shorter_cache(specimen)
    found = []
    for k, (kind, own) in enumerate(zip(kinds, sizes, strict=True)):
        layer = list(of_layer).index(k)
        slots = _slots(specimen.model.get_submodule(names[layer]), kind)
        i = layer * slots  # the first of its slots; all are alike
        shapes = {
            name: tuple(p.shape)
            for name, p in specimen.model.get_submodule(names[layer]).named_parameters()
            if kind.owners.get(name) == "attention"
        }
        slot = _slot(cache, i)
        states = _states(cache, narrow, i, shapes)
        keys, values = getattr(slot, "keys", None), getattr(slot, "values", None)
        if not isinstance(keys, torch.Tensor) or not keys.numel():
            found.append(InCache(stateful=bool(states), empty=not states))
        elif (values is None or not values.shape[-1]) and keys.ndim == 4 and keys.shape[1] == 1:
            found.append(InCache(latent=(keys.shape[-1],)))  # the values are made of the keys
        elif not isinstance(values, torch.Tensor) or keys.ndim != 4 or values.ndim != 4 or not values.shape[-1]:
            found.append(InCache())
        elif keys.shape[1] == 1 and own.kv_heads is None:
            found.append(InCache(latent=(keys.shape[-1], values.shape[-1])))
        else:
            heads = whole_number(language_config(specimen.config), "num_attention_heads")
            fewer = (
                own.kv_heads is not None and value_at(language_config(specimen.config), own.kv_heads, layer) != heads
            )
            for_each = fewer and keys.shape[1] == heads
            found.append(InCache(numbers=1.0 + keys.shape[-1] / values.shape[-1], for_each_query=for_each))
        beside = _beside(*(_slot(own, i) for own in (cache, shorter, narrow)))
        # What one layer keeps for all that are like it.
        others = [_slot(cache, j * slots) for j, other in enumerate(of_layer) if other == k and j != layer]
        beside = tuple(
            replace(own, once=bool(others) and all(getattr(other, own.name, None) is None for other in others))
            for own in beside
        )
        more = found[-1].slots == 1 and _holds_more(slot, [own for _, own in _fixed(cache, i)], beside)
        found[-1] = replace(found[-1], states=states, slots=slots, beside=beside, more=more)
    return found


def _holds_more(slot: Any, states: Sequence[torch.Tensor], beside: Sequence[KeptTokens]) -> bool:
    """Whether a slot holds tensors that are none of its keys, values and states and do not grow with every token."""
    known = [getattr(slot, name, None) for name in ("keys", "values", *(own.name for own in beside))]
    storages = [own.data_ptr() for own in known[:2] if isinstance(own, torch.Tensor) and own.numel()]
    counted = {id(own) for own in (*known, *states)}
    values = (
        [v for own in vars(slot).values() for v in (own.values() if isinstance(own, dict) else [own])] if slot else []
    )
    tensors = [own for own in values if isinstance(own, torch.Tensor) and own.ndim > 1 and own.numel()]
    return len(set(storages)) < len(storages) or any(id(own) not in counted for own in tensors)


def _slot(cache: Any, index: int) -> Any:
    return cache.layers[index] if cache is not None and index < len(cache.layers) else None


def _slots(layer: nn.Module, kind: LayerKind) -> int:
    """How many slots of the cache a layer has: its attentions are numbered one after another."""
    inside = tuple(f"{name}." for name in kind.attention.modules) if kind.attention is not None else ()
    numbers = {
        getattr(module, name)
        for path, module in layer.named_modules()
        for name in LAYER_INDEX_NAMES
        if f"{path}.".startswith(inside) and type(module.__dict__.get(name)) is int
    }
    return max(1, len(numbers))


_SHORTER = TOKENS // 2


def numbers_in_full(own: KeptTokens, place: int, slot: int, specimen: Specimen, large: PretrainedConfig) -> KeptTokens:
    """What a model itself keeps of a token, of whose specimen that is known: by the attribute that sets how much.

    Args:
        own: of the specimen.
        place: of it among all that is kept beside keys and values.
        slot: of the cache.
        specimen: a small one.
        large: the config of the model itself.
    """
    language = language_config(large)
    for path, value in numbers(language_config(specimen.config), 0):
        if not 1 < value <= own.numbers:
            continue
        config = copy.deepcopy(specimen.config)
        setattr(reduce(getattr, path[:-1], language_config(config)), path[-1], 2 * value)
        with suppress(Exception):  # whatever a family's own code raises for a size that it cannot take
            other = Specimen(config)
            twice = _beside(filled_cache(other).layers[slot], _shorter_cache(other).layers[slot], None)[place]
            if (more := twice.numbers - own.numbers) > 0:
                a_unit, rest = divmod(more, value)
                return own if rest else replace(own, numbers=own.numbers + a_unit * (value_at(language, path) - value))
    return own


def _beside(slot: Any, shorter: Any, narrow: Any) -> tuple[KeptTokens, ...]:
    """What a slot keeps of every token beside keys and values; states are none of it, since they do not grow.

    Args:
        slot: of the cache.
        shorter: the same after a shorter text.
        narrow: the same of the model in bfloat16.
    """
    found = []
    for name, tensor in vars(slot).items() if slot is not None and shorter is not None else ():
        twin = getattr(shorter, name, None)
        if name in ("keys", "values") or not isinstance(tensor, torch.Tensor) or not isinstance(twin, torch.Tensor):
            continue
        a_token, rest = divmod(tensor.numel(), TOKENS)
        if rest or not a_token or twin.numel() != a_token * _SHORTER:
            continue
        in_narrow = getattr(narrow, name, None)
        of_its_own = isinstance(in_narrow, torch.Tensor) and in_narrow.dtype != torch.bfloat16
        found.append(KeptTokens(a_token, tensor.element_size() if of_its_own else 0, name))
    return tuple(found)


def _shorter_cache(specimen: Specimen) -> Any:
    """The cache after a shorter text, to see what grows with the tokens; None if there is none."""
    fewer = copy.copy(specimen)
    with suppress(Exception):  # whatever a family's own code raises
        fewer.ids = specimen.ids[:, :_SHORTER]
        return filled_cache(fewer)
    return None


def _narrow_cache(specimen: Specimen) -> Any:
    """The cache of the model in bfloat16, to see what it keeps in another dtype; None if it does not run so."""
    narrow = copy.copy(specimen)
    with suppress(Exception):  # whatever a family's own code raises
        narrow.model = copy.deepcopy(specimen.model).to(torch.bfloat16)
        return filled_cache(narrow)
    return None


def _states(cache: Any, narrow: Any, i: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[KeptState, ...]:
    found = []
    for number, (of_mixer, state) in enumerate(_fixed(cache, i)):
        shape = tuple(state.shape[1:])
        channels: tuple[str, ...] = ()
        beyond = 0
        if not of_mixer and len(shape) == 2:
            kernels = {name: own for name, own in shapes.items() if len(own) == 3}
            if sum(own[0] for own in kernels.values()) == shape[0]:
                channels = tuple(kernels)
            else:
                channels = tuple(name for name, own in kernels.items() if own[0] == shape[0])[:1]
            beyond = shape[1] - shapes[channels[0]][-1] if channels else 0
        twin = _fixed(narrow, i)[number][1] if narrow is not None else state
        itemsize = twin.element_size() if narrow is not None and twin.dtype != torch.bfloat16 else 0
        found.append(KeptState(shape, of_mixer, channels, beyond, itemsize))
    return tuple(found)


def _fixed(cache: Any, i: int) -> list[tuple[bool, torch.Tensor]]:
    """What a layer keeps that does not grow with the tokens; whether it is a mixer's state, and the tensor."""
    layer = cache.layers[i] if i < len(cache.layers) else None
    convolved = getattr(layer, "conv_states", None) or {}
    return [(False, own) for own in convolved.values() if own is not None] + [
        (True, own) for own in recurrent_states(cache, i)
    ]
