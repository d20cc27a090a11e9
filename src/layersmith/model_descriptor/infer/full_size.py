"""What was found of a small specimen, in the model itself: its sizes."""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers import PretrainedConfig

from layersmith.model_descriptor.infer.attributes import numbers, value_at
from layersmith.model_descriptor.infer.mixers import mamba_config
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.subblocks import LayerKind
from layersmith.model_descriptor.stock import language_config


def at_full_length_of(length: int, kind: LayerKind, small: nn.Module, large: nn.Module) -> int | None:
    """A length of a specimen's layer in the model itself: that of a weight of the attention that is as long."""
    shapes = {name: p.shape for name, p in large.named_parameters()}
    for name, parameter in small.named_parameters():
        if kind.owners.get(name) == "attention" and length in parameter.shape and name in shapes:
            return int(shapes[name][list(parameter.shape).index(length)])
    return None


def in_config(length: int, small: PretrainedConfig, large: PretrainedConfig) -> int:
    """A length of a specimen in the model itself: what most attributes say there that are as long in the specimen."""
    own = language_config(small)
    named = [path for path, value in numbers(own, 0) if value == length]
    found = Counter(value_at(language_config(large), path) for path in named)
    return found.most_common(1)[0][0] if found else length


def widths_of(sizes: Sizes, config: PretrainedConfig, layer: nn.Module) -> tuple[int | None, int | None]:
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    places = (sizes.width_at, sizes.shared_width_at)
    own = [shapes[at[0]][at[1]] if at is not None and at[0] in shapes else None for at in places]
    if sizes.flat and own[0] is not None and sizes.num_experts is not None:
        own[0] //= value_at(language_config(config), sizes.num_experts)
    return own[0], own[1]


def mixer_of(sizes: Sizes, config: PretrainedConfig, index: int, layer: nn.Module) -> dict[str, int] | None:
    """The sizes of a layer's mixer as a ``MambaConfig`` has them; None if it has none or they are not known."""
    own = sizes.mixer
    if own is None:
        return None
    language = language_config(config)
    paths = {"num_heads": own.num_heads[:1], "state_dim": (own.state_dim,), "num_groups": (own.num_groups,)}
    numbers = {name: value_at(language, path, index) for name, found in paths.items() for path in found if path}
    found = mamba_config(own, numbers, {name: tuple(p.shape) for name, p in layer.named_parameters()})
    return None if found is None else found.to_dict()
