"""Whether alternatives run at all, tried before anything is measured.

An axis is proved with one or two sizes, in its layer. A model's code may still refuse other sizes, so every
alternative is built here and its layer runs in the model. Which units stay does not matter for that.
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
        trial: of the parent.
        library: its orders and maps may be any.
    """
    parent = library.parent
    verdicts: dict[tuple[object, ...], str] = {}
    running, refused = [], {}
    kinds = [alike(trial, i, own) for i, own in enumerate(library.axes)]
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
    except LayersmithError as refusal:  # a descriptor says in our words what its family cannot take
        return f"it does not run with it ({first_line(refusal)})"
    finally:
        library.parent.let_go()
    if attempt.failed:
        return f"it does not run with it ({attempt.reason})"
    return "" if bool(output.isfinite().all()) else "it gives numbers that are not finite with it"


def by_reason(reasons: Mapping[int, str], num_layers: int, what: str) -> list[str]:
    """A sentence for every reason, with the layers that it holds of.

    Args:
        reasons: layer to reason.
        num_layers: that there are.
        what: does not hold.
    """
    layers: dict[str, list[int]] = {}
    for i, reason in reasons.items():
        layers.setdefault(reason, []).append(i)
    sentences = []
    for reason, own in layers.items():
        where = "any layer" if len(own) == num_layers else f"layers {', '.join(map(str, own))}"
        sentences.append(f"{what} in {where}: {reason.removesuffix('.')}.")
    return sentences


def any_orders(axes: Sequence[LayerAxes]) -> dict[str, torch.Tensor]:
    """Orders of all units, as if the first were the most important; by the names of a library's."""
    orders: dict[str, torch.Tensor] = {}
    for i, own in enumerate(axes):
        for part, axis in (("ffn", own.ffn), ("shared", own.shared)):
            for b, bundle in enumerate(axis.bundles if axis is not None else ()):
                channels = torch.arange(bundle.size)
                orders[f"{i}.{part}.{b}"] = channels.repeat(bundle.members, 1) if bundle.members else channels
        for heads, groups, within in ((own.kv, "attention", "queries"), (own.mixer, "mixer", "mixer_heads")):
            for a in range(len(heads.attentions) if heads is not None else 0):
                assert heads is not None
                orders[numbered(f"{i}.{groups}", a)] = torch.arange(heads.size)
                orders[numbered(f"{i}.{within}", a)] = torch.arange(heads.num_heads).view(heads.shares, -1)
        if own.mixer_size is not None:
            orders[f"{i}.mixer_size"] = torch.arange(own.mixer_size.size).repeat(own.mixer_size.num_heads, 1)
        if own.state is not None:
            orders[f"{i}.state"] = torch.arange(own.state.size)
        if own.experts is not None:
            orders[f"{i}.experts"] = torch.arange(own.experts.size)
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
