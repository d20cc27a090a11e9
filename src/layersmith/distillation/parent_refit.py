"""The closed-form refit of a layer's alternatives, while calibration rows pass through the parent's layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from layersmith.distillation.activations import BLOCK, Rows, run_parent_layer
from layersmith.distillation.reconstruction import Moments, refits
from layersmith.execution.layerwise import LayerwiseParent, Split
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.library.stored_weights import Tensors

# Tokens on which each alternative is tried once before the refit, to find the input of its last projection.
_PROBE_TOKENS = 32


@torch.no_grad()
def refit_layer(
    layerwise: LayerwiseParent[Library],
    index: int,
    split: Split,
    members: Mapping[str, Sequence[Alternative]],
    rows: Rows,
    advance: Callable[[float], None],
) -> dict[str, Tensors]:
    """Refit the last projection of each alternative to the parent's output.

    Args:
        layerwise: The parent, whose layers can be run one at a time, with the library of the alternatives.
        index: Index of the layer.
        split: The layer's attention and FFN, as they can be run alone.
        members: The alternatives of each of the layer's subblocks.
        rows: Calibration rows at this layer; they are passed on to the next.
        advance: Called with the number of rows that are done.

    Returns:
        Identity of an alternative to its refitted weight. What has no projection to refit is left out.
    """
    library = layerwise.builder
    _, hidden = rows.start(layerwise, torch.arange(1))
    probe = layerwise.start(rows.tokens[:1, :_PROBE_TOKENS].to(hidden.device))
    targets, _ = run_parent_layer(layerwise, index, split, probe, hidden[:, :_PROBE_TOKENS])
    current = [probe]

    def run(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
        return layerwise.run(current[0], index, given, module)

    moments = {}
    for subblock, alternatives in members.items():
        module: nn.Module = layerwise.layers[index] if split.layout == "whole" else getattr(split, subblock)
        given = targets[subblock].given
        to_refit = refits(library, alternatives, module, lambda a: layerwise.module_of(a, split), run, given)
        moments[subblock] = Moments(module, to_refit, run, layerwise.arithmetic.add)

    def run_and_add(place: str, given: torch.Tensor) -> torch.Tensor:
        """The output of a part of the parent's layer, which its moments observe."""
        outputs = [sums.add(given) for subblock, sums in moments.items() if place in (subblock, BLOCK)]
        module = layerwise.layers[index] if place == BLOCK else getattr(split, place)
        observed = next((output for output in outputs if output is not None), None)
        return run(module, given) if observed is None else observed

    for numbers in rows.batches():
        current[0], hidden = rows.start(layerwise, numbers)
        _, output = run_parent_layer(layerwise, index, split, current[0], hidden, run_and_add)
        rows.record_parent(numbers, output)
        advance(len(numbers))
    return {
        identity: weights for sums in moments.values() for identity, weights in sums.refitted_weights(library).items()
    }
