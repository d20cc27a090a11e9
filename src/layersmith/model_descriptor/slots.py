"""What layers leave in the cache, and whether it is a list that they append to in turn.

Such a list bears no gap: once a layer does not write to it, every later one has to take the slot before its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from layersmith.block_config import MambaConfig
from layersmith.heterogeneous.modeling_layersmith import set_cache_slot
from layersmith.model_descriptor.attributes import Sizes
from layersmith.model_descriptor.mixers import filled_cache, recurrent_states
from layersmith.model_descriptor.removal import put
from layersmith.model_descriptor.specimen import Specimen
from layersmith.model_descriptor.stock import stock_model
from layersmith.model_descriptor.subblocks import LayerKind


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
class InCache:
    """What a layer leaves in the cache.

    Attributes:
        stateful: a state of fixed size, no keys and values.
        numbers: for each one of a value head; 2 where keys are as long as values.
        latent: numbers for a token that all heads share; 0 if each KV head has its own.
        empty: nothing, e.g. because it uses the keys and values of another layer.
        states: of fixed size.
    """

    stateful: bool = False
    numbers: float = 2.0
    latent: int = 0
    empty: bool = False
    states: tuple[KeptState, ...] = ()


def in_cache(
    specimen: Specimen, names: Sequence[str], layers: Sequence[int], kinds: Sequence[LayerKind], sizes: Sequence[Sizes]
) -> list[InCache]:
    """Look at the cache after a run; where there is none, they are taken for keys and values of one length.

    Args:
        specimen: the model.
        names: of its layers.
        layers: one of every kind.
        kinds, sizes: of these.
    """
    try:
        cache = filled_cache(specimen)
    except Exception:  # a family's own code may keep no cache, or another kind
        return [InCache()] * len(layers)
    narrow = _narrow_cache(specimen)
    found = []
    for i, kind, own in zip(layers, kinds, sizes, strict=True):
        shapes = {
            name: tuple(p.shape)
            for name, p in specimen.model.get_submodule(names[i]).named_parameters()
            if kind.owners.get(name) == "attention"
        }
        slot = cache.layers[i] if i < len(cache.layers) else None
        states = _states(cache, narrow, i, shapes)
        keys, values = getattr(slot, "keys", None), getattr(slot, "values", None)
        if not isinstance(keys, torch.Tensor) or not keys.numel():
            found.append(InCache(stateful=bool(states), empty=not states))
        elif values is None and keys.ndim == 4 and keys.shape[1] == 1:
            found.append(InCache(latent=keys.shape[-1]))  # the values are made of the keys
        elif not isinstance(values, torch.Tensor) or keys.ndim != 4 or values.ndim != 4 or not values.shape[-1]:
            found.append(InCache())
        elif keys.shape[1] == 1 and own.query_heads and own.kv_heads is None:
            found.append(InCache(latent=keys.shape[-1] + values.shape[-1]))
        else:
            found.append(InCache(numbers=1.0 + keys.shape[-1] / values.shape[-1]))
        found[-1] = replace(found[-1], states=states)
    return found


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
