"""The survey of a parent, before anything is measured: its proved axes and the alternatives that run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layersmith.block_config import BlockConfig
from layersmith.errors import InputError
from layersmith.execution.exchange import first_overflow
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes
from layersmith.library.axes.feasible import any_orders, by_reason, no_maps, those_that_run
from layersmith.library.axes.find import find_axes
from layersmith.library.axes.prove import prove
from layersmith.library.axes.trial import Trial
from layersmith.library.library import Library
from layersmith.library.search_space import search_space, why_no_linear
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.recipe import LibraryRecipe

# The consequence of a missing axis, by the keys of ``LayerAxes.reasons``.
_NOT_OFFERED = {
    "ffn": "FFNs are not narrowed",
    "attention": "heads are not reduced",
    "experts": "experts are not removed",
    "shared": "shared experts are not narrowed",
    "mixer": "heads of mixers are not reduced",
    "mixer_size": "heads of mixers are not made smaller",
    "state": "states of mixers are not made smaller",
}


@dataclass(frozen=True)
class Survey:
    """The axes and alternatives of a parent.

    Attributes:
        axes: The proved axes of every layer.
        alternatives: All alternatives, the parent's subblocks included.
        ffn_ranking: The method that will rank channels.
        notes: Sentences about what cannot be offered, and why.
    """

    axes: list[LayerAxes]
    alternatives: list[Alternative]
    ffn_ranking: str
    notes: list[str]


def survey(parent: Parent, recipe: LibraryRecipe) -> Survey:
    """Find the axes of a parent, prove them, and list the alternatives that the recipe asks for and that run.

    Raises:
        InputError: The parent's activations overflow.
    """
    if (place := first_overflow(parent)) is not None:
        raise InputError(
            f"{parent.path}: the output of {place} is NaN or infinite in {str(parent.runtime.dtype)[6:]}. Repair the "
            "parent's weights, or set dtype to a wider type in the recipe."
        )
    tokens = torch.arange(32)[None] * 31 % parent.language_config.vocab_size  # any ids will do for a proof
    trial = Trial(parent, tokens)
    axes = prove(trial, find_axes(parent.descriptor, parent.config, parent.blocks))
    offered = survey_of(parent.descriptor, parent.blocks, axes, parent.layers, recipe)
    library = Library(
        parent=parent,
        axes=axes,
        alternatives=offered.alternatives,
        orders=any_orders(axes),
        maps=no_maps(parent.descriptor, parent.layers, offered.alternatives),
        notes=[],
    )
    alternatives, notes = those_that_run(trial, library)
    return dataclasses.replace(offered, alternatives=alternatives, notes=[*offered.notes, *notes])


def survey_of(
    descriptor: type[ModelDescriptor],
    blocks: Sequence[BlockConfig],
    axes: list[LayerAxes],
    layers: Sequence[nn.Module],
    recipe: LibraryRecipe,
) -> Survey:
    """The alternatives that a recipe requests and the axes allow; the layers may be on the meta device."""
    no_linear = {s: why_no_linear(descriptor, layers, s) for s in SUBBLOCKS}
    ffn_ranking = choose_ffn_ranking(axes, recipe)
    alternatives = search_space(descriptor, blocks, axes, no_linear, recipe, ffn_ranking)
    return Survey(
        axes=axes,
        alternatives=alternatives,
        ffn_ranking=ffn_ranking,
        notes=[*_notes_on(descriptor, blocks, axes, no_linear), *(_notes_on_inner(axes) if recipe.inner_sizes else ())],
    )


def choose_ffn_ranking(axes: Sequence[LayerAxes], recipe: LibraryRecipe) -> str:
    """The ranking method; ``auto`` is iterative if the channel moments fit in the memory for statistics."""
    if recipe.ffn_ranking != "auto":
        return recipe.ffn_ranking
    needed = sum(8 * axis.ffn.size**2 for axis in axes if axis.ffn is not None and not axis.of_experts)
    return "iterative" if needed <= recipe.statistics_gib * 1024**3 else "contribution"


def _notes_on_inner(axes: Sequence[LayerAxes]) -> list[str]:
    """Sentences about sizes inside subblocks that are not offered."""
    notes = []
    for name in dict.fromkeys(n for layer in axes for n in layer.reasons if n.startswith("inner.")):
        by_layer = {i: layer.reasons[name] for i, layer in enumerate(axes) if name in layer.reasons}
        notes += by_reason(by_layer, len(axes), f"{name.removeprefix('inner.')} is not made smaller")
    return notes


def _notes_on(
    descriptor: type[ModelDescriptor],
    blocks: Sequence[BlockConfig],
    axes: Sequence[LayerAxes],
    no_linear: Mapping[str, Sequence[str]],
) -> list[str]:
    """Sentences about what the library does not offer or only estimates."""
    notes = []
    if not descriptor.attn_no_op_supported():
        notes.append(f"{descriptor.__name__} has no attention no-op, so no attention is removed.")
    if not descriptor.mlp_no_op_supported():
        notes.append(f"{descriptor.__name__} has no FFN no-op, so no FFN is removed.")
    for subblock, reasons in no_linear.items():
        present = [i for i, block in enumerate(blocks) if not block.subblock(subblock).no_op]
        by_layer = {i: reasons[i] for i in present if reasons[i]}
        notes += by_reason(by_layer, len(present), f"The {subblock} is not replaced by a linear map")
    for subblock, what in _NOT_OFFERED.items():
        by_layer = {i: layer.reasons[subblock] for i, layer in enumerate(axes) if subblock in layer.reasons}
        notes += by_reason(by_layer, len(axes), what)
    why = "the layer caches more than keys and values of every token"
    estimated = {i: why for i in range(len(blocks)) if descriptor.layer_facts(i).estimates_cache}
    return [*notes, *by_reason(estimated, len(blocks), "The size of the KV cache is estimated")]
