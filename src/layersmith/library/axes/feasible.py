"""Runs every alternative once before anything is measured.

An axis is proved with one or two sizes, in its layer. A model's code may still refuse other sizes, so every
alternative is built here and its layer runs in the model. It does not matter for this which units stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from layersmith.errors import LayersmithError, first_line
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.plan import linear_records
from layersmith.library.alternative import Alternative
from layersmith.library.axes.axis import LayerAxes, numbered
from layersmith.library.axes.trial import Trial, alike
from layersmith.library.library import Library
from layersmith.model_descriptor.base import ModelDescriptor


def those_that_run(trial: Trial, library: Library) -> tuple[list[Alternative], list[str]]:
    """The alternatives of a library that run, and notes on the others; one layer of every kind is tried.

    Args:
        trial: Runs layers of the parent.
        library: A library with any orders and maps of the right shapes.
    """
    parent = library.parent
    verdicts: dict[tuple[object, ...], str] = {}
    running, refused = [], {}
    kinds = [alike(trial, i, layer_axes) for i, layer_axes in enumerate(library.axes)]
    for alternative in library.alternatives:
        key = (kinds[alternative.layer], dataclasses.replace(alternative, layer=0))
        if not alternative.is_parent and key not in verdicts:
            verdicts[key] = _problem(trial, library, alternative)
        if alternative.is_parent or not verdicts[key]:
            running.append(alternative)
        else:
            refused[alternative] = verdicts[key]
    notes = []
    for name in dict.fromkeys(alternative.name for alternative in refused):
        reasons = {a.layer: reason for a, reason in refused.items() if a.name == name}
        notes += by_reason(reasons, len(parent.blocks), f"{name} is not offered")
    return running, notes


def _problem(trial: Trial, library: Library, alternative: Alternative) -> str:
    try:
        with foreign_code(f"does the model run with {alternative.key}?", refusal_is_answer=True) as attempt:
            output = trial.run(alternative.layer, library.layer(alternative))
    except LayersmithError as refusal:  # a descriptor explains what its family refuses
        return f"it does not run with it ({first_line(refusal)})"
    finally:
        library.parent.let_go()
    if attempt.failed:
        return f"it does not run with it ({attempt.reason})"
    return "" if bool(output.isfinite().all()) else "its output is not finite with it"


def by_reason(reasons: Mapping[int, str], num_layers: int, what: str) -> list[str]:
    """A sentence for every reason, with its layers.

    Args:
        reasons: The reason by layer.
        num_layers: The number of layers that could have a reason.
        what: The statement to explain.
    """
    layers: dict[str, list[int]] = {}
    for i, reason in reasons.items():
        layers.setdefault(reason, []).append(i)
    sentences = []
    for reason, indices in layers.items():
        where = "any layer" if len(indices) == num_layers else f"layers {', '.join(map(str, indices))}"
        sentences.append(f"{what} in {where}: {reason.removesuffix('.')}.")
    return sentences


def any_orders(axes: Sequence[LayerAxes]) -> dict[str, torch.Tensor]:
    """Orders of all units in which the first unit is the most important, by the names of a library's orders."""
    orders: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(axes):
        for part, axis in (("ffn", layer.ffn), ("shared", layer.shared)):
            for b, bundle in enumerate(axis.bundles if axis is not None else ()):
                channels = torch.arange(bundle.size)
                orders[f"{i}.{part}.{b}"] = channels.repeat(bundle.members, 1) if bundle.members else channels
        for heads, groups, within in ((layer.kv, "attention", "queries"), (layer.mixer, "mixer", "mixer_heads")):
            if heads is None:
                continue
            for a in range(len(heads.attentions)):
                orders[numbered(f"{i}.{groups}", a)] = torch.arange(heads.size)
                orders[numbered(f"{i}.{within}", a)] = torch.arange(heads.num_heads).view(heads.shares, -1)
        if layer.mixer_size is not None:
            orders[f"{i}.mixer_size"] = torch.arange(layer.mixer_size.size).repeat(layer.mixer_size.num_heads, 1)
        if layer.state is not None:
            orders[f"{i}.state"] = torch.arange(layer.state.size)
        for inner in layer.inner:
            orders[f"{i}.inner.{inner.name}"] = torch.arange(inner.units).repeat(inner.groups, 1)
            for name in inner.norms:
                orders[f"{i}.energy.{name}"] = torch.ones(inner.weight(name).positions("channels", inner.sizes).numel())
        if layer.experts is not None:
            orders[f"{i}.experts"] = torch.arange(layer.experts.size)
    return orders


def no_maps(
    descriptor: type[ModelDescriptor], layers: Sequence[nn.Module], alternatives: Sequence[Alternative]
) -> dict[str, torch.Tensor]:
    """Zeros for every linear replacement, by the names of a library's maps."""
    maps = {}
    for a in alternatives:
        if a.kind == "linear":
            ((_, record),) = linear_records(descriptor, layers[a.layer], a.subblock).items()
            maps[f"{a.layer}.{a.subblock}"] = torch.zeros(record["size"], record["size"])
    return maps
