"""Whether a family's cache is a list that its layers append to in turn.

Such a cache bears no gap: once a layer does not write to it, every later one has to take the slot before its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layersmith.heterogeneous.modeling_layersmith import set_cache_slot
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
