"""What every kind of layer keeps in the cache, and whether layers append to the cache in turn."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.block_config import MambaConfig
from layersmith.errors import UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.conventions import QUERY_HEADS
from layersmith.model_descriptor.infer.attributes import numbers, value_at
from layersmith.model_descriptor.infer.cache_contents import filled_cache, recurrent_states
from layersmith.model_descriptor.infer.removal import put
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.specimen import TOKENS, Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind
from layersmith.model_descriptor.stock import language_config, stock_model, whole_number
from layersmith.modeling_layersmith import LAYER_INDEX_NAMES, set_cache_slot
from layersmith.upstream import cache_slots, convolution_states, keys_and_values

# ---------------------------------------------------------------------------------------------- appending in turn


def appends_to_cache(specimen: Specimen, names: Sequence[str], kinds: Sequence[LayerKind]) -> bool:
    """Whether the cache is a list to which layers append in turn, so that there can be no gap in it.

    The experiment removes one attention. If layers append, the cache does not fill while later layers keep their
    slots, and does once each has moved up by one.

    Args:
        specimen: The model.
        names: Names of its layers.
        kinds: Kind of every layer.
    """
    attentions = {i: kind.attention for i, kind in enumerate(kinds) if kind.attention is not None}
    removable = [i for i, attention in attentions.items() if attention.removable and not attention.stays]
    gone = next((i for i in removable if i != max(attentions)), None)
    if gone is None:
        return False
    model = stock_model(specimen.config, "cpu", torch.float32).eval()
    for name, record in attentions.pop(gone).replaced:
        put(model.get_submodule(names[gone]), name, record)
    if _fills_cache(model, specimen.ids):
        return False
    for slot, (i, attention) in enumerate(attentions.items()):
        set_cache_slot(model.get_submodule(names[i]), slot, attention.modules)
    return _fills_cache(model, specimen.ids)


def _fills_cache(model: nn.Module, ids: torch.Tensor) -> bool:
    with torch.no_grad(), foreign_code("Does the cache fill?", refusal_is_answer=True) as attempt:
        model(input_ids=ids, use_cache=True)
    return not attempt.failed


# ---------------------------------------------------------------------------------------------- what a layer keeps


@dataclass(frozen=True)
class KeptState:
    """A tensor in the cache whose size does not grow with the number of tokens.

    Attributes:
        shape: Its shape for one sequence.
        of_mixer: Whether it is the state of the mixer, which has heads * head size * state size numbers.
        channels: Convolution weights whose first dimensions add up to the state's first. Its last dimension is as long
            as their last, plus ``beyond``.
        beyond: See ``channels``.
        itemsize: Bytes of a number where that does not follow the dtype of the weights; else 0.
    """

    shape: tuple[int, ...]
    of_mixer: bool = False
    channels: tuple[str, ...] = ()
    beyond: int = 0
    itemsize: int = 0

    def numbers(self, mamba: MambaConfig | None, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The count of its numbers for one sequence.

        Args:
            mamba: Sizes of the layer's mixer, if they are known.
            shapes: Shapes of the layer's weights.
        """
        if self.of_mixer and mamba is not None:
            return mamba.num_heads * mamba.head_dim * mamba.state_dim
        if self.channels:
            return sum(shapes[name][0] for name in self.channels) * (shapes[self.channels[0]][-1] + self.beyond)
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeptTokens:
    """A tensor in the cache that grows with every token and is neither keys nor values.

    Attributes:
        numbers: Numbers for each token.
        itemsize: Bytes of a number where that does not follow the dtype of the weights; else 0.
        name: Name of the attribute of the cache slot.
        once: Whether the first layer of its kind keeps it for all of them, even if its attention was removed.
    """

    numbers: int
    itemsize: int = 0
    name: str = ""
    once: bool = False


@dataclass(frozen=True)
class InCache:
    """What a layer keeps in the cache.

    Attributes:
        stateful: Whether it keeps a state of fixed size and no keys and values.
        numbers: Numbers for each number of a value head; 2 where keys are as long as values.
        latent: Numbers for each token that all heads share, of keys and of values; empty if heads share none.
        empty: Whether it keeps nothing, e.g. because it uses the keys and values of another layer.
        states: States of fixed size.
        slots: Number of slots of the cache that it uses, one for each of its attentions.
        per_token: What it keeps of every token in addition to keys and values, e.g. the keys of an indexer.
        for_each_query: Whether it keeps keys and values once for each query head, though several share a KV head.
        holds_more: Whether it holds tensors that none of the above counts, so that its size is an estimate.
    """

    stateful: bool = False
    numbers: float = 2.0
    latent: tuple[int, ...] = ()
    empty: bool = False
    states: tuple[KeptState, ...] = ()
    slots: int = 1
    per_token: tuple[KeptTokens, ...] = ()
    for_each_query: bool = False
    holds_more: bool = False


@dataclass(frozen=True)
class _Caches:
    """Caches of one specimen after three runs.

    Attributes:
        cache: After the whole text.
        shorter: After a shorter text, which shows what grows with the tokens; None if the model keeps none then.
        narrow: Of the model in bfloat16, which shows tensors with a fixed dtype; None if it does not run so.
    """

    cache: Any
    shorter: Any
    narrow: Any

    @classmethod
    def of(cls, specimen: Specimen) -> _Caches | None:
        cache = filled_cache(specimen)
        return None if cache is None else cls(cache, _shorter_cache(specimen), _narrow_cache(specimen))


_SHORTER = TOKENS // 2


def _shorter_cache(specimen: Specimen) -> Any:
    fewer = copy.copy(specimen)
    fewer.ids = specimen.ids[:, :_SHORTER]
    return filled_cache(fewer)


def _narrow_cache(specimen: Specimen) -> Any:
    narrow = copy.copy(specimen)
    with foreign_code("Can the model be in bfloat16?") as attempt:
        narrow.model = copy.deepcopy(specimen.model).to(torch.bfloat16)
    return None if attempt.failed else filled_cache(narrow)


def in_cache(
    specimen: Specimen,
    names: Sequence[str],
    of_layer: Sequence[int],
    kinds: Sequence[LayerKind],
    sizes: Sequence[Sizes],
) -> list[InCache]:
    """What a layer of every kind leaves in the cache after a run.

    If the model keeps no cache, keys and values of equal length are assumed.

    Args:
        specimen: The model.
        names: Names of its layers.
        of_layer: Kind of every layer.
        kinds, sizes: The kinds of layers and their sizes.
    """
    caches = _Caches.of(specimen)
    if caches is None:
        return [InCache()] * len(kinds)
    return [_of_kind(specimen, caches, names, of_layer, k, kinds[k], sizes[k]) for k in range(len(kinds))]


def _of_kind(
    specimen: Specimen,
    caches: _Caches,
    names: Sequence[str],
    of_layer: Sequence[int],
    k: int,
    kind: LayerKind,
    sizes: Sizes,
) -> InCache:
    """What the first layer of a kind keeps. Seven parameters, since what a layer keeps depends on all others too."""
    index = list(of_layer).index(k)
    layer = specimen.model.get_submodule(names[index])
    slots = _slots_of_layer(layer, kind)
    first = index * slots  # all slots of a layer are alike
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters() if kind.owners.get(n) == "attention"}
    slot = _slot(caches.cache, first)
    states = _states(caches, first, shapes)
    per_token = _per_token(slot, _slot(caches.shorter, first), _slot(caches.narrow, first))
    # A tensor that no other layer of the kind has is kept by one layer for all of them.
    others = [_slot(caches.cache, j * slots) for j, other in enumerate(of_layer) if other == k and j != index]
    per_token = tuple(
        replace(kept, once=bool(others) and all(getattr(other, kept.name, None) is None for other in others))
        for kept in per_token
    )
    return replace(
        _of_keys_and_values(slot, bool(states), sizes, language_config(specimen.config), index),
        states=states,
        slots=slots,
        per_token=per_token,
        holds_more=_holds_more(slot, [state for _, state in _fixed(caches.cache, first)], per_token),
    )


def _of_keys_and_values(slot: Any, has_states: bool, sizes: Sizes, language: PretrainedConfig, index: int) -> InCache:
    keys, values = keys_and_values(slot)
    if keys is None or not keys.numel():
        return InCache(stateful=has_states, empty=not has_states)
    has_values = values is not None and bool(values.shape[-1])
    if not has_values and keys.ndim == 4 and keys.shape[1] == 1:
        return InCache(latent=(keys.shape[-1],))  # the values are computed from the keys
    if values is None or not has_values or keys.ndim != 4 or values.ndim != 4:
        return InCache()
    if keys.shape[1] == 1 and sizes.kv_heads is None:
        return InCache(latent=(keys.shape[-1], values.shape[-1]))
    heads = whole_number(language, QUERY_HEADS)
    fewer = sizes.kv_heads is not None and value_at(language, sizes.kv_heads, index) != heads
    each = fewer and keys.shape[1] == heads
    return InCache(numbers=1.0 + keys.shape[-1] / values.shape[-1], for_each_query=each)


def _holds_more(slot: Any, states: Sequence[torch.Tensor], per_token: Sequence[KeptTokens]) -> bool:
    """Whether a slot holds tensors that are not counted, or keys and values in one."""
    known = [getattr(slot, name, None) for name in ("keys", "values", *(kept.name for kept in per_token))]
    storages = [kept.data_ptr() for kept in known[:2] if isinstance(kept, torch.Tensor) and kept.numel()]
    counted = {id(kept) for kept in (*known, *states)}
    attributes = vars(slot).values() if slot is not None else ()
    values = [v for held in attributes for v in (held.values() if isinstance(held, dict) else [held])]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.ndim > 1 and v.numel()]
    return len(set(storages)) < len(storages) or any(id(v) not in counted for v in tensors)


def _slot(cache: Any, index: int) -> Any:
    slots = cache_slots(cache)
    return slots[index] if index < len(slots) else None


def _slots_of_layer(layer: nn.Module, kind: LayerKind) -> int:
    """The number of slots that a layer uses: its attentions have indices that follow one another."""
    inside = tuple(f"{name}." for name in kind.attention.modules) if kind.attention is not None else ()
    indices = {
        getattr(module, name)
        for path, module in layer.named_modules()
        for name in LAYER_INDEX_NAMES
        if f"{path}.".startswith(inside) and type(module.__dict__.get(name)) is int
    }
    return max(1, len(indices))


def _per_token(slot: Any, shorter: Any, narrow: Any) -> tuple[KeptTokens, ...]:
    """What a slot keeps of every token in addition to keys and values; states do not grow and are left out."""
    kept = []
    for name, tensor in vars(slot).items() if slot is not None and shorter is not None else ():
        twin = getattr(shorter, name, None)
        if name in ("keys", "values") or not isinstance(tensor, torch.Tensor) or not isinstance(twin, torch.Tensor):
            continue
        count, rest = divmod(tensor.numel(), TOKENS)
        if rest or not count or twin.numel() != count * _SHORTER:
            continue
        in_narrow = getattr(narrow, name, None)
        has_dtype = isinstance(in_narrow, torch.Tensor) and in_narrow.dtype != torch.bfloat16
        kept.append(KeptTokens(count, tensor.element_size() if has_dtype else 0, name))
    return tuple(kept)


def _states(caches: _Caches, index: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[KeptState, ...]:
    kernels = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    twins = _fixed(caches.narrow, index)
    states = []
    for number, (of_mixer, state) in enumerate(_fixed(caches.cache, index)):
        shape = tuple(state.shape[1:])
        channels: tuple[str, ...] = ()
        if not of_mixer and len(shape) == 2:
            together = sum(kernel[0] for kernel in kernels.values()) == shape[0]
            alone = [name for name, kernel in kernels.items() if kernel[0] == shape[0]]
            channels = tuple(kernels if together else alone[:1])
        beyond = shape[1] - shapes[channels[0]][-1] if channels else 0
        twin = twins[number][1] if caches.narrow is not None else state
        itemsize = twin.element_size() if caches.narrow is not None and twin.dtype != torch.bfloat16 else 0
        states.append(KeptState(shape, of_mixer, channels, beyond, itemsize))
    return tuple(states)


def _fixed(cache: Any, index: int) -> list[tuple[bool, torch.Tensor]]:
    """What a layer keeps that does not grow with the tokens: whether it is a mixer's state, and the tensor."""
    if cache is None:
        return []
    convolved = [(False, state) for state in convolution_states(_slot(cache, index))]
    return convolved + [(True, state) for state in recurrent_states(cache, index)]


# ---------------------------------------------------------------------------------------------- in the model itself


def numbers_in_full(
    kept: KeptTokens, place: int, slot: int, specimen: Specimen, config: PretrainedConfig
) -> KeptTokens:
    """What the model itself keeps of a token, by the attribute that sets how much the specimen keeps.

    The experiment doubles one attribute of the specimen after another, until what is kept grows with it.

    Args:
        kept: What the specimen keeps.
        place: Its place among everything that the slot keeps in addition to keys and values.
        slot: Index of the cache slot.
        specimen: The small model.
        config: Config of the model itself.
    """
    language = language_config(config)
    for path, value in numbers(language_config(specimen.config), 0):
        if not 1 < value <= kept.numbers:
            continue
        changed = copy.deepcopy(specimen.config)
        with foreign_code(f"Can {'.'.join(path)} be {2 * value}?", refusal_is_answer=True) as attempt:
            attempt.call(setattr, reduce(getattr, path[:-1], language_config(changed)), path[-1], 2 * value)
        if attempt.failed:
            continue
        try:
            other = Specimen(changed)
        except UnsupportedModel:  # a size that the family cannot have
            continue
        twice = _per_token(_slot(filled_cache(other), slot), _slot(_shorter_cache(other), slot), None)
        if place < len(twice) and (more := twice[place].numbers - kept.numbers) > 0:
            for_each, rest = divmod(more, value)
            full = kept.numbers + for_each * (value_at(language, path) - value)
            return kept if rest else replace(kept, numbers=full)
    return kept
