"""Convert sizes of the specimen to sizes of the full model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig

from layersmith.model_descriptor.infer.attributes import numbers, value_at
from layersmith.model_descriptor.infer.cache import InCache, numbers_in_full
from layersmith.model_descriptor.infer.mixers import mamba_config
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind
from layersmith.model_descriptor.stock import language_config


@dataclass(frozen=True)
class KindInBoth:
    """A kind of layer, with one of its layers in the specimen and one in the full model.

    Attributes:
        kind: The kind.
        index: Index of the specimen's layer.
        small, large: The two layers; the large one is on the meta device.
    """

    kind: LayerKind
    index: int
    small: nn.Module
    large: nn.Module


@dataclass(frozen=True)
class FullSize:
    """Finds the size in the full model that corresponds to a size in the specimen.

    Attributes:
        specimen: The small model.
        config: Config of the full model.
        is_whole: Whether the specimen has the full model's config.
    """

    specimen: Specimen
    config: PretrainedConfig
    is_whole: bool

    def length(self, length: int, both: KindInBoth | None) -> int:
        """The length in the full model, by the attention's weights or else by the config."""
        by_weight = None if both is None else self.length_by_weight(length, both)
        return self._length_by_config(length) if by_weight is None else by_weight

    def length_by_weight(self, length: int, both: KindInBoth) -> int | None:
        """The length in the full model of the first attention weight that has ``length`` in the specimen."""
        shapes = {name: p.shape for name, p in both.large.named_parameters()}
        for name, parameter in both.small.named_parameters():
            if both.kind.owners.get(name) == "attention" and length in parameter.shape and name in shapes:
                return int(shapes[name][list(parameter.shape).index(length)])
        return None

    def _length_by_config(self, length: int) -> int:
        """The most common value in the full config of attributes that are ``length`` in the specimen's config."""
        paths = [path for path, value in numbers(language_config(self.specimen.config), 0) if value == length]
        values = Counter(value_at(language_config(self.config), path) for path in paths)
        return values.most_common(1)[0][0] if values else length

    def head_size(self, sizes: Sizes, both: KindInBoth | None) -> Sizes:
        """The sizes with the full model's head size; without query heads if it cannot be determined."""
        if sizes.head_size is None or both is None:
            return sizes
        path, size = sizes.head_size
        small_heads, heads = (
            value_at(language_config(config), sizes.query_heads[0]) for config in (self.specimen.config, self.config)
        )
        length = self.length_by_weight(small_heads * size, both)
        if length is None:
            return replace(sizes, query_heads=(), head_size=None)
        return replace(sizes, head_size=(path, length // heads))

    def in_cache(self, small: InCache, both: KindInBoth | None) -> InCache:
        """The cache contents of a layer of the full model.

        Args:
            small: Cache contents of a layer of the specimen.
            both: Layers of the kind; None if the full model has no such layer.
        """
        states = tuple(replace(s, shape=tuple(self.length(d, both) for d in s.shape)) for s in small.states)
        if both is None or self.is_whole:
            return replace(small, states=states)
        latent = small.latent
        if latent:
            whole = self.length_by_weight(sum(latent), both)
            latent = tuple(self.length(part, both) for part in latent) if whole is None else (whole,)
        lengths = [self.length_by_weight(kept.numbers, both) for kept in small.per_token]
        per_token = tuple(
            numbers_in_full(kept, place, both.index * small.slots, self.specimen, self.config)
            if length is None
            else replace(kept, numbers=length)
            for place, (kept, length) in enumerate(zip(small.per_token, lengths, strict=True))
        )
        return replace(small, states=states, latent=latent, per_token=per_token)


def widths_of(sizes: Sizes, config: PretrainedConfig, layer: nn.Module) -> tuple[int | None, int | None]:
    """The widths of a layer's FFN or experts and of its shared experts, read from its weights; None if unknown."""
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    places = (sizes.width_at, sizes.shared_width_at)
    width, shared = (shapes[at[0]][at[1]] if at is not None and at[0] in shapes else None for at in places)
    if sizes.flat and width is not None and sizes.num_experts is not None:
        width //= value_at(language_config(config), sizes.num_experts)
    return width, shared


def mixer_of(sizes: Sizes, config: PretrainedConfig, index: int, layer: nn.Module) -> dict[str, int] | None:
    """The fields of a ``MambaConfig`` for a layer's mixer; None if it has no mixer or they are unknown."""
    mixer = sizes.mixer
    if mixer is None:
        return None
    language = language_config(config)
    paths = {"num_heads": mixer.num_heads[:1], "state_dim": (mixer.state_dim,), "num_groups": (mixer.num_groups,)}
    values = {name: value_at(language, path, index) for name, some in paths.items() for path in some if path}
    fields = mamba_config(mixer, values, {name: tuple(p.shape) for name, p in layer.named_parameters()})
    return None if fields is None else fields.to_dict()
