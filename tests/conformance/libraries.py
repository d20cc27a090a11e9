"""Whether what a library offers can be had: every alternative runs in its model, and a child of some of them works."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from transformers import PreTrainedModel

from layersmith.block_config import has_attention
from layersmith.execution.exchange import exchanged, forward
from layersmith.execution.parent import Parent
from layersmith.library.alternative import Alternative
from layersmith.library.build import build_library
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import Survey
from layersmith.recipe import LibraryRecipe


def child_of_library(parent: Parent, space: Survey, tokens: torch.Tensor) -> tuple[PreTrainedModel, bool]:
    """A child of some alternatives of the default recipe and sizes inside subblocks, and whether it remembers tokens.

    Args:
        parent: a tiny one.
        found: what there is to choose from.
        tokens: ``[B, T]`` ids.

    Raises:
        AssertionError: an alternative does not run, or the child gives something else than its layers in the parent.
    """
    library = build_library(parent, LibraryRecipe(inner_sizes=True), space, Calibration(tokens, len(tokens)))
    check_alternatives(library, tokens)
    chosen = some_of_each_kind(library)
    with exchanged(parent, library.layers(chosen)):
        wanted = forward(parent, tokens)[0]
    child = library.compose(chosen)
    with torch.no_grad():
        seen = child(input_ids=tokens, use_cache=False).logits
    assert torch.equal(seen, wanted), f"a child's logits differ by {float((seen - wanted).abs().max()):.1e}"
    return child, any(has_attention(block) for block in library.blocks(chosen))


def check_alternatives(library: Library, tokens: torch.Tensor) -> None:
    """Every alternative, in the first layer of each kind that has it, gives finite logits that are not the parent's."""
    parent = library.parent
    types = getattr(parent.language_config, "layer_types", None) or [""] * len(parent.blocks)
    kinds = [
        (type(layer).__name__, repr(block), repr(axes), own_type)
        for layer, block, axes, own_type in zip(parent.layers, parent.blocks, library.axes, types, strict=True)
    ]
    before = forward(parent, tokens)[0]
    tried = set()
    for alternative in library.alternatives:
        key = (kinds[alternative.layer], dataclasses.replace(alternative, layer=0))
        if alternative.kind == "parent" or key in tried:
            continue
        tried.add(key)
        try:
            with exchanged(parent, library.layers([alternative])):
                after = forward(parent, tokens)[0]
        except Exception as error:
            raise AssertionError(f"{alternative.key} does not run: {type(error).__name__}: {error}") from error
        assert bool(after.isfinite().all()), f"{alternative.key} gives numbers that are not finite"
        assert not torch.equal(after, before), f"{alternative.key} changes nothing"


def some_of_each_kind(library: Library) -> list[Alternative]:
    """One alternative for every subblock of every layer: as many kinds of them as there is room for."""
    used: Counter[tuple[str, str]] = Counter()
    chosen = []
    places: dict[tuple[int, str], list[Alternative]] = {}
    for alternative in library.alternatives:
        if alternative.kind != "parent":
            places.setdefault((alternative.layer, alternative.subblock), []).append(alternative)
    # Those that can be least go first, so that what only they can be is there.
    for _, members in sorted(places.items(), key=lambda place: (len({a.kind for a in place[1]}), place[0])):
        best = min(members, key=lambda a: used[a.kind, a.method])
        used[best.kind, best.method] += 1
        chosen.append(best)
    return chosen
