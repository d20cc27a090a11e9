"""What layers leave in the cache, and whether it is a list that they append to in turn.

Such a list bears no gap: once a layer does not write to it, every later one has to take the slot before its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layersmith.heterogeneous.modeling_layersmith import set_cache_slot
from layersmith.model_descriptor.attributes import Sizes
from layersmith.model_descriptor.mixers import filled_cache
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
class InCache:
    """What a layer leaves in the cache.

    Attributes:
        stateful: a state of fixed size, no keys and values.
        numbers: for each one of a value head; 2 where keys are as long as values.
        latent: numbers for a token that all heads share; 0 if each KV head has its own.
    """

    stateful: bool = False
    numbers: float = 2.0
    latent: int = 0


def in_cache(specimen: Specimen, layers: Sequence[int], sizes: Sequence[Sizes]) -> list[InCache]:
    """Look at the cache after a run; where there is none, they are taken for keys and values of one length."""
    try:
        cache = filled_cache(specimen)
        slots = [cache.layers[i] for i in layers]
    except Exception:  # a family's own code may keep no cache, or another kind
        return [InCache()] * len(layers)
    found = []
    for slot, own in zip(slots, sizes, strict=True):
        keys, values = getattr(slot, "keys", None), getattr(slot, "values", None)
        if not isinstance(keys, torch.Tensor) or not keys.numel():
            found.append(InCache(stateful=True))
        elif not isinstance(values, torch.Tensor) or keys.ndim != 4 or values.ndim != 4 or not values.shape[-1]:
            found.append(InCache())
        elif keys.shape[1] == 1 and own.query_heads and own.kv_heads is None:
            found.append(InCache(latent=keys.shape[-1] + values.shape[-1]))
        else:
            found.append(InCache(numbers=1.0 + keys.shape[-1] / values.shape[-1]))
    return found
