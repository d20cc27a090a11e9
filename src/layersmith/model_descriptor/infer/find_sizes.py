"""Finds which config attributes set the sizes of a layer, by building layers that differ in one attribute.

Everything is built on the meta device first. An attribute that changes shapes of a layer governs them, and which shapes
it changes says what it may be: a number of key-value heads changes what projections give, but not what the last one
takes. Small models that run then prove what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.ffn import with_ffn_sizes
from layersmith.model_descriptor.infer.inner_sizes import find_inner_sizes
from layersmith.model_descriptor.infer.kv_heads import (
    NOT_UNDERSTOOD,
    OF_QUERIES,
    KVHeads,
    find_kv_heads,
    keys_need_queries,
)
from layersmith.model_descriptor.infer.mixers import find_mixer
from layersmith.model_descriptor.infer.query_heads import QueryHeads, find_query_heads
from layersmith.model_descriptor.infer.sizes import MixerSizes, Sizes
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.infer.subblocks import LayerKind
from layersmith.model_descriptor.infer.trial import Survey, Trial


def find_sizes(
    specimen: Specimen,
    layer_classes: Sequence[type[nn.Module]],
    layers_name: str,
    kinds: Sequence[LayerKind],
    of_layer: Sequence[int],
) -> list[Sizes]:
    """The attributes that set the sizes of every kind of layer.

    Args:
        specimen: A small model of the same classes.
        layer_classes: Classes of its decoder layers.
        layers_name: Name of the list that holds them.
        kinds: The kinds of layers.
        of_layer: Number of the kind of every layer.
    """
    survey = Survey(specimen, layer_classes, layers_name, of_layer)
    if not survey.base:  # layers are not built from a config
        return [Sizes()] * len(kinds)
    trials = survey.trials(kinds)
    of_kinds = [_sizes_of(trial) for trial in trials]
    return [
        sizes if sizes.query_heads else replace(sizes, heads_elsewhere=_heads_elsewhere(trial, of_kinds))
        for trial, sizes in zip(trials, of_kinds, strict=True)
    ]


def _sizes_of(trial: Trial) -> Sizes:
    mixer = find_mixer(trial)
    # A layer that keeps only a state has no KV heads, and its heads are counted as the mixer's.
    keeps_state_only = mixer is not None and mixer.is_alone
    of_mixer = mixer is not None and mixer.is_alone and bool(mixer.num_heads or mixer.state_dim)
    kv = KVHeads() if keeps_state_only else find_kv_heads(trial)
    queries = QueryHeads() if of_mixer else find_query_heads(trial, kv.path)
    no_kv_heads = kv.reason
    if no_kv_heads == NOT_UNDERSTOOD and queries.paths and keys_need_queries(trial, kv.of_keys, queries.paths[0]):
        no_kv_heads = OF_QUERIES
    sizes = Sizes(
        kv_heads=kv.path,
        query_heads=queries.paths,
        head_size=queries.pin,
        no_query_heads=queries.reason,
        head_blocks=queries.blocks,
        head_pairs=queries.pairs,
        no_kv_heads=no_kv_heads,
        keys=next((path for path in kv.of_keys if path not in queries.paths), None),
        mixer=mixer,
        outcomes=(*kv.outcomes, *queries.outcomes),
    )
    sizes = with_ffn_sizes(trial, sizes)
    return replace(sizes, inner=find_inner_sizes(trial, _paths(sizes), sizes.head_size))


def _paths(sizes: Sizes) -> set[AttributePath]:
    """The attributes that set numbers of heads, widths, numbers of experts, and sizes of mixers."""
    mixer = sizes.mixer or MixerSizes()
    single = (sizes.kv_heads, sizes.keys, sizes.width, sizes.num_experts, sizes.expert_width, sizes.shared_width)
    several = (*sizes.query_heads, *mixer.num_heads, *mixer.head_dim)
    paths = (*single, *several, sizes.experts_per_token, mixer.state_dim, mixer.num_groups)
    return {path for path in paths if path is not None}


def _heads_elsewhere(trial: Trial, of_kinds: Sequence[Sizes]) -> AttributePath | None:
    """The number of query heads of other kinds of layers that changes shapes of this kind."""
    for sizes in of_kinds:
        for path in sizes.query_heads[:1]:
            value = trial.survey.value(path)
            twice = trial.shapes({path: 2 * value, **dict([sizes.head_size] if sizes.head_size else [])})
            if twice is not None and twice != trial.base:
                return path
    return None
