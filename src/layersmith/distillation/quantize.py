"""Quantize a child: the weights of each layer in the number formats that a solution chose.

Layers are quantized in order by GPTQ. The second moments of a layer's inputs are those of the child whose layers
before it are quantized already, so that each layer is quantized for the inputs that it will have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from layersmith.distillation.activations import Rows
from layersmith.errors import UnsupportedModel
from layersmith.execution.exchange import few_tokens, set_weight
from layersmith.execution.layerwise import Batch, Builder, LayerwiseParent, NotLayerwise, split_layers
from layersmith.execution.parent import Parent
from layersmith.library.alternative import Alternative, changed_by_layer, pair_identity
from layersmith.library.formats import InputMoments, Quantization, matrices, quantized
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept, Tensors, digest_of
from layersmith.quantization.formats import Format, format_named
from layersmith.quantization.rounding import Rounded
from layersmith.run.progress import SILENT, Progress


def layerwise_of(parent: Parent, builder: Builder) -> LayerwiseParent[Builder]:
    """The parent, run layer by layer; ``builder`` builds layers with alternatives.

    Raises:
        UnsupportedModel: It cannot be, so its weights cannot be quantized.
    """
    try:
        return split_layers(parent, builder)
    except NotLayerwise as reason:
        raise UnsupportedModel(
            f"{parent.path}: weights are quantized layer by layer, but {reason}. Leave formats out."
        ) from None


def formats_of(library: Library, layer: nn.Module, alternatives: Sequence[Alternative]) -> dict[str, Format]:
    """Name of each weight in a layer to its format, for alternatives of that layer."""
    parent, i = library.parent, alternatives[0].layer
    of_subblock = matrices(parent.model, parent.descriptor, layer, i, len(parent.blocks), library.axes[i])
    return {name: format_named(a.format) for a in alternatives if a.format for name in of_subblock[a.subblock]}


def quantize_child(
    library: Library,
    solution: Sequence[Alternative],
    calibration: torch.Tensor,
    batch_tokens: int,
    progress: Progress = SILENT,
) -> tuple[Library, dict[str, Rounded]]:
    """Quantize the layers of a solution that have formats.

    Args:
        library: Library with the jointly trained weights of the solution's shapes.
        solution: One alternative for each subblock of each layer.
        calibration: ``[N, T]`` rows for the second moments.
        batch_tokens: Tokens per forward pass.
        progress: Receives rows through a layer.

    Returns:
        The library with quantized weights of the layers, which :meth:`.Library.compose` takes; and the rounded weights
        by their names in the model.

    Raises:
        UnsupportedModel: The parent cannot run layer by layer.
    """
    changed = changed_by_layer(solution)
    last = max((i for i, members in changed.items() if any(a.format for a in members)), default=-1)
    rounded: dict[str, Rounded] = {}
    if last < 0:
        return library, rounded
    layerwise, rows = layerwise_of(library.parent, library), Rows(calibration, batch_tokens)
    few = layerwise.start(few_tokens(library.parent))
    with progress.stage("quantize", (last + 1) * len(calibration), "rows through a layer") as advance:
        for i in range(last + 1):
            members = changed.get(i, [])
            if any(a.format for a in members):
                of_layer = _quantized(library, layerwise, members, rows, few)
                prefix = library.parent.descriptor.layer_block_name(i)
                rounded |= {f"{prefix}.{name}": weight for name, weight in of_layer.rounded.items()}
                pairs = _with(library.pairs, members, of_layer)
                library = library.with_kept(library.kept, pairs)
            layer = library.layer(*members) if members else library.parent.layer(i)
            rows.pass_through_child(layerwise, i, layer)
            rows.advance()
            advance(len(calibration))
    return library, rounded


@torch.no_grad()
def _quantized(
    library: Library, layerwise: LayerwiseParent[Library], members: Sequence[Alternative], rows: Rows, few: Batch
) -> Quantization:
    """The quantized weights of a layer, attention first: the FFN is given what the quantized attention returns."""
    layer, i, result = library.layer(*members), members[0].layer, Quantization({}, {})
    for a in sorted(members, key=lambda a: a.subblock):
        formats = formats_of(library, layer, [a])
        moments = InputMoments(layer, list(formats))
        if not formats:
            continue
        with moments.watching():
            for numbers in rows.batches():
                batch, hidden = rows.start(layerwise, numbers)
                layerwise.run(batch, i, rows.child_input(numbers, hidden), layer)
        made = quantized(layer, formats, moments, partial(layerwise.run, few, i, few.embedded, layer))
        for name, values in made.tensors().items():
            set_weight(layer, name, values.to(layer.get_parameter(name)))
        result.add(made)
    return result


@dataclass(eq=False)
class _Dequantized(Mapping[str, Tensors]):
    """Weights by the identity of alternatives. Of rounded ones only the levels stay in memory."""

    others: Mapping[str, Tensors]
    rounded: dict[str, Quantization] = field(default_factory=dict)

    def __getitem__(self, identity: str) -> Tensors:
        if identity in self.rounded:
            return self.rounded[identity].tensors()
        return self.others[identity]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.others, **self.rounded})

    def __len__(self) -> int:
        return len({**self.others, **self.rounded})


def _with(pairs: Kept, members: Sequence[Alternative], rounded: Quantization) -> Kept:
    """Kept weights with the rounded ones of a layer."""
    identity, known = pair_identity(members), pairs.in_memory
    weights = known if isinstance(known, _Dequantized) else _Dequantized(known)
    weights.rounded[identity] = rounded
    record = {"of": " + ".join(a.key for a in members), "identity": identity, "layer": members[0].layer}
    record |= {"subblock": "block", "weights": digest_of(weights[identity]), "tokens": 0, "before": None, "after": None}
    return Kept((*pairs.records, record), weights, pairs.folder)
