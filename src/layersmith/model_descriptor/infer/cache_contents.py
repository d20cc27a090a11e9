"""What a run of a small model leaves in its cache: keys, and the states of recurrent mixers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layersmith import upstream
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.infer.specimen import Specimen


def filled_cache(specimen: Specimen) -> Any:
    """The cache that a run leaves, which has a list ``layers``; None where the model keeps none of that kind."""
    output: Any = None
    with torch.no_grad(), foreign_code("Does the model run with a cache?", refusal_is_answer=True):
        output = specimen.model(input_ids=specimen.ids, use_cache=True)
    # Models without any attention call it by another name.
    values = output.values() if isinstance(output, Mapping) else ()
    return next((value for value in values if isinstance(getattr(value, "layers", None), list | tuple)), None)


def keys_in_cache(specimen: Specimen, index: int) -> torch.Tensor | None:
    """The keys that a run leaves of a layer; None if it leaves none."""
    slots = upstream.cache_slots(filled_cache(specimen))
    return upstream.keys_and_values(slots[index])[0] if index < len(slots) else None


def recurrent_states(cache: Any, index: int) -> list[torch.Tensor]:
    """The states of fixed size that a layer keeps; some families keep them in a list with one entry for each layer."""
    slots = upstream.cache_slots(cache)
    if index < len(slots) and (states := upstream.recurrent_states(slots[index])):
        return states
    lists = [value for value in vars(cache).values() if isinstance(value, list) and value is not cache.layers]
    entries = [values[index] for values in lists if index < len(values)]
    return [entry for entry in entries if isinstance(entry, torch.Tensor)]
