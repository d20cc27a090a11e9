"""Infer the structure of a model by experiment. ``find`` runs the experiments in the order of their dependencies.

The experiments change and run the specimen, a small random model of the same classes. Sizes are then read from the
full model on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.infer.cache import appends_to_cache, in_cache
from layersmith.model_descriptor.infer.find_sizes import find_sizes
from layersmith.model_descriptor.infer.find_subblocks import find_kind
from layersmith.model_descriptor.infer.findings import Findings
from layersmith.model_descriptor.infer.full_size import FullSize, KindInBoth, mixer_of, widths_of
from layersmith.model_descriptor.infer.inner_sizes import in_full
from layersmith.model_descriptor.infer.layers import (
    Structure,
    check_configurable,
    find_structure,
    groups_outside,
    why_no_attention,
)
from layersmith.model_descriptor.infer.per_kind_sizes import Split, split, splits_of
from layersmith.model_descriptor.infer.removal import proved
from layersmith.model_descriptor.infer.shrink import shrunk
from layersmith.model_descriptor.infer.sizes import Sizes
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind, signature
from layersmith.model_descriptor.stock import causal_lm_config, stock_model


@dataclass
class _Kinds:
    """The kinds of layers of the specimen, the signature of each kind, and the kind of every layer."""

    signatures: list[Any]
    kinds: list[LayerKind]
    of_layer: list[int]

    def of_model(self, layers: Sequence[nn.Module]) -> list[int]:
        """The kind of every layer of the full model.

        Raises:
            UnsupportedModel: The specimen has no layer of the same kind.
        """
        of_layer = []
        for layer in layers:
            if (classes := signature(layer)) not in self.signatures:
                raise UnsupportedModel(f"{type(layer).__name__}: its layers change their modules when they run.")
            of_layer.append(self.signatures.index(classes))
        return of_layer

    def extend(self, splits: Sequence[Split], of_layer: list[int]) -> None:
        """Add a kind for every split, with the classes of the kind that is split."""
        self.kinds += [self.kinds[part.kind] for part in splits]
        self.signatures += [self.signatures[part.kind] for part in splits]
        self.of_layer = of_layer


def find(config: PretrainedConfig) -> Findings:
    """Run the experiments on the model of a config.

    Raises:
        UnsupportedModel: What the experiments could not answer, and why.
    """
    config = causal_lm_config(config)
    skeleton = _skeleton(config)
    small = shrunk(config, skeleton)
    specimen = Specimen(small)
    structure = find_structure(specimen)
    names = [f"{structure.layers}.{i}" for i in range(structure.num_layers)]
    classes = tuple(dict.fromkeys(type(specimen.model.get_submodule(name)) for name in names))
    notes: list[str] = []
    kinds = _find_kinds(specimen, structure, names, notes)
    check_configurable(specimen.config, classes)
    appends = appends_to_cache(specimen, names, [kinds.kinds[k] for k in kinds.of_layer])

    layers = list(skeleton.get_submodule(structure.layers).children())
    sizes, of_layer = _find_sizes(specimen, config, classes, structure, kinds, layers)
    full = FullSize(specimen, config, is_whole=small is config)
    both = [_in_both(k, specimen, names, kinds, of_layer, layers) for k in range(len(kinds.kinds))]
    sizes = [full.head_size(of_kind, pair) for of_kind, pair in zip(sizes, both, strict=True)]
    sizes = [
        _with_inner(of_kind, [layers[i] for i, j in enumerate(of_layer) if j == k]) for k, of_kind in enumerate(sizes)
    ]
    caches = in_cache(specimen, names, kinds.of_layer, kinds.kinds, sizes)
    return Findings(
        structure=structure,
        classes=classes,
        signatures=tuple(kinds.signatures),
        kinds=tuple(kinds.kinds),
        sizes=tuple(sizes),
        cache=tuple(full.in_cache(cache, pair) for cache, pair in zip(caches, both, strict=True)),
        of_layer=tuple(of_layer),
        groups=groups_outside(skeleton, structure),
        remote_code=not type(specimen.model).__module__.startswith("transformers."),
        appends=appends,
        widths=tuple(widths_of(sizes[k], config, layers[i]) for i, k in enumerate(of_layer)),
        mixers=tuple(mixer_of(sizes[k], config, i, layers[i]) for i, k in enumerate(of_layer)),
        notes=tuple(notes),
        config=config,
    )


def _skeleton(config: PretrainedConfig) -> nn.Module:
    """The full model on the meta device."""
    with foreign_code("Can the model be built from its config?", refusal_is_answer=True) as attempt:
        return stock_model(config)
    raise UnsupportedModel(f"its model cannot be built from this config ({attempt.reason}).") from attempt.error


def _find_kinds(specimen: Specimen, structure: Structure, names: Sequence[str], notes: list[str]) -> _Kinds:
    """The kinds of layers with the no-ops that are proved.

    Args:
        specimen: The small model.
        structure: Names of its modules.
        names: Names of its layers.
        notes: Gets a line for each no-op that is refuted.
    """
    kinds = _Kinds([], [], [])
    for name in names:
        classes = signature(specimen.model.get_submodule(name))
        if classes not in kinds.signatures:
            kinds.signatures.append(classes)
            kinds.kinds.append(find_kind(specimen, name))
        kinds.of_layer.append(kinds.signatures.index(classes))
    if not any(kind.attention for kind in kinds.kinds):
        raise UnsupportedModel(why_no_attention(specimen, structure.layers))
    of_layer = kinds.of_layer
    # A no-op has to hold before each kind of layer and in the last layer: the next layer may use a subblock's output.
    pairs = list(zip(of_layer, [*of_layer[1:], None], strict=True))
    first_of_pair = sorted({pair: i for i, pair in reversed(list(enumerate(pairs)))}.values())
    for k, kind in enumerate(kinds.kinds):
        kinds.kinds[k] = proved(specimen, [names[i] for i in first_of_pair if of_layer[i] == k], kind, notes)
    return kinds


def _find_sizes(
    specimen: Specimen,
    config: PretrainedConfig,
    classes: Sequence[type[nn.Module]],
    structure: Structure,
    kinds: _Kinds,
    layers: Sequence[nn.Module],
) -> tuple[list[Sizes], list[int]]:
    """The sizes of every kind, and the kind of every layer of the full model.

    Layers that read their sizes from other attributes than the rest of their kind become a separate kind.
    """
    sizes = find_sizes(specimen, classes, structure.layers, kinds.kinds, kinds.of_layer)
    splits = splits_of(specimen.config, classes, structure.layers, kinds.of_layer, sizes)
    of_layer = kinds.of_model(layers)
    if splits:
        small = split(specimen.config, classes, structure.layers, kinds.of_layer, splits)
        of_layer = split(config, classes, structure.layers, of_layer, splits)
        kinds.extend(splits, small)
        sizes = find_sizes(specimen, classes, structure.layers, kinds.kinds, kinds.of_layer)
    return sizes, of_layer


def _with_inner(sizes: Sizes, layers: Sequence[nn.Module]) -> Sizes:
    """The sizes of a kind with those inside its subblocks as they are in the layers of the full model."""
    head_size = sizes.head_size[1] if sizes.head_size is not None else 0
    return replace(sizes, inner=tuple(in_full(size, head_size, layers) for size in sizes.inner))


def _in_both(
    k: int,
    specimen: Specimen,
    names: Sequence[str],
    kinds: _Kinds,
    of_layer: Sequence[int],
    layers: Sequence[nn.Module],
) -> KindInBoth | None:
    """The first layer of a kind in the specimen and in the full model; None if the full model has no such layer."""
    if k not in of_layer:
        return None
    index = kinds.of_layer.index(k)
    small = specimen.model.get_submodule(names[index])
    return KindInBoth(kinds.kinds[k], index, small, layers[of_layer.index(k)])
