"""The weights of an alternative: slices and means of the parent's, made on demand.

Every function takes the tensors of a layer by name and returns those that change. Units that stay keep their order.

Shapes: H query heads, K key-value heads, E experts, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from layersmith.library.axes.axis import (
    Bundle,
    ExpertsAxis,
    HeadsAxis,
    HeadSizeAxis,
    InnerAxis,
    StateAxis,
    WeightAxis,
    WidthAxis,
)

Tensors = Mapping[str, torch.Tensor]


def narrow(weights: Tensors, axis: WidthAxis, kept: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of an FFN or of experts with only some channels.

    Args:
        weights: Weights of the layer.
        axis: Axis of the channels.
        kept: The channels that stay, per bundle: ``[channels]``, or ``[members, channels]`` for experts.
    """
    result: dict[str, torch.Tensor] = {}
    for bundle, channels in zip(axis.bundles, kept, strict=True):
        ordered = channels.sort(-1).values
        sizes = {"channels": bundle.size}
        for w in bundle.weights:
            if not bundle.members:
                result[w.name] = _take(weights[w.name], w.dim, w.gathered({"channels": ordered}, sizes))
                continue
            entries = [w.gathered({"channels": ordered[m]}, sizes) for m in range(bundle.members)]
            if bundle.stacked:
                views = members_of(weights, bundle, w)
                members = [_take(weight, dim, e) for (weight, dim), e in zip(views, entries, strict=True)]
                if not bundle.flat:  # a stack may have more rows than experts
                    members += [_take(idle, w.dim - 1, entries[0]) for idle in weights[w.name][bundle.members :]]
                result[w.name] = torch.cat(members) if bundle.flat else torch.stack(members)
            else:
                result |= {w.name.format(m): _take(weights[w.name.format(m)], w.dim, e) for m, e in enumerate(entries)}
    return result


def members_of(weights: Tensors, bundle: Bundle, w: WeightAxis) -> list[tuple[torch.Tensor, int]]:
    """A view of a bundle's weight for each member, and the dimension of the view along which channels lie."""
    if not bundle.members:
        return [(weights[w.name], w.dim)]
    if bundle.flat:
        stack = weights[w.name].unflatten(0, (bundle.members, -1))
        return [(stack[m], w.dim - 1) for m in range(bundle.members)]
    if bundle.stacked:
        return [(weights[w.name][m], w.dim - 1) for m in range(bundle.members)]
    return [(weights[w.name.format(m)], w.dim) for m in range(bundle.members)]


def keep_kv_heads(weights: Tensors, axis: HeadsAxis, heads: torch.Tensor) -> dict[str, torch.Tensor]:
    """The attention's weights with only the given KV heads and the contribution of their query heads.

    The number of query heads stays. Each remaining KV head is read by its query heads and by some whose KV head was
    removed. The contribution of the latter is set to zero.
    """
    kept = heads.sort().values
    order, silent = regrouped(axis, kept)
    result = _gather(weights, axis, {"kv": kept, "queries": order})
    reader = axis.weight(axis.reader)
    sizes = {"kv": len(kept), "queries": axis.num_heads}
    entries = reader.positions("queries", sizes)[silent].flatten()
    result[reader.name].index_fill_(reader.dim, entries.to(result[reader.name].device), 0)
    return result


def regrouped(axis: HeadsAxis, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query heads in the order in which they read the remaining KV heads, and the places of those without effect."""
    group, new_group = axis.num_heads // axis.size, axis.num_heads // len(kept)
    readers = query_heads_of(axis, kept)
    orphans = torch.tensor(sorted(set(range(axis.num_heads)) - set(readers.tolist())), dtype=torch.long)
    order = torch.cat([readers.view(len(kept), group), orphans.view(len(kept), new_group - group)], 1)
    places = torch.arange(axis.num_heads).view(len(kept), new_group)
    return order.flatten(), places[:, group:].flatten()


def query_heads_of(axis: HeadsAxis, kv_heads: torch.Tensor) -> torch.Tensor:
    """The query heads that read the given KV heads."""
    group = axis.num_heads // axis.size
    return (kv_heads[:, None] * group + torch.arange(group)).flatten()


def keep_groups(weights: Tensors, axis: HeadsAxis, heads: torch.Tensor) -> dict[str, torch.Tensor]:
    """The attention's weights with only the given KV heads and their query heads."""
    kept = heads.sort().values
    return _gather(weights, axis, {"kv": kept, "queries": query_heads_of(axis, kept)})


def keep_query_heads(weights: Tensors, axis: HeadsAxis, heads: torch.Tensor) -> dict[str, torch.Tensor]:
    """The attention's weights with only the given query heads, equally many of each group."""
    return _gather(weights, axis, {"queries": heads.sort().values})


def keep_state(weights: Tensors, axis: StateAxis, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """A mixer's weights with only some numbers of the state."""
    ordered, sizes = kept.sort().values, {"state": axis.size}
    return {w.name: _take(weights[w.name], w.dim, w.gathered({"state": ordered}, sizes)) for w in axis.weights}


def keep_head_size(weights: Tensors, axis: HeadSizeAxis, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """A mixer's weights with only some entries of every head, ``kept`` of shape ``[H, entries]``."""
    ordered = kept.sort(-1).values
    units = {"channels": channels_of(axis, ordered), "entries": ordered[0]}
    return {w.name: _take(weights[w.name], w.dim, w.gathered(units, axis.sizes)) for w in axis.weights}


def channels_of(axis: HeadSizeAxis, entries: torch.Tensor) -> torch.Tensor:
    """The channels, counted over all heads, of the entries ``[H, n]`` of every head."""
    return (torch.arange(axis.num_heads)[:, None] * axis.size + entries).flatten()


def keep_inner(
    weights: Tensors, axis: InnerAxis, kept: torch.Tensor, energies: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The weights of a subblock with a smaller size inside it.

    A norm divides by the root of the mean square of its units. That of the units that stay is another one, so the
    norm's weight is multiplied with the root of the ratio of the two means.

    Args:
        weights: Weights of the layer.
        axis: The axis.
        kept: ``[C, units]``: the units that stay in each group.
        energies: For a norm's weight the mean squares ``[P]`` of what the norm takes. Default: the units that go are
            zero.

    Returns:
        The weights, in float32 those of norms, and the entries of arguments that all layers share.
    """
    groups = torch.arange(axis.groups)[:, None]
    units = {"channels": (groups * axis.units + kept.sort(-1).values).flatten()}
    result = {w.name: _take(weights[w.name], w.dim, w.gathered(units, axis.sizes)) for w in axis.weights}
    for w in axis.places:
        entries = w.gathered(units, axis.sizes)
        # A parent that is a child itself takes only some entries already.
        result[w.name] = _take(weights[w.name], 0, entries) if w.name in weights else entries
    for name in axis.norms:
        share = 1.0
        if energies is not None:
            taken = energies[name].double()
            stays = _take(taken, 0, axis.weight(name).gathered(units, axis.sizes)).sum()
            share = float(stays / taken.sum().clamp_min(torch.finfo(torch.float64).tiny))
        factor = (share * axis.units / kept.shape[1]) ** 0.5
        result[name] = (result[name].float() + axis.offset) * factor - axis.offset
    return result


def pool_kv_heads(weights: Tensors, axis: HeadsAxis, num_heads: int) -> dict[str, torch.Tensor]:
    """The attention's key and value weights with consecutive KV heads averaged; query heads do not change.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245), section 2.1.
    """
    result = {}
    group = axis.size // num_heads
    for w in axis.weights:
        if not any(segment.part == "kv" for segment in w.segments):
            continue
        weight = weights[w.name].movedim(w.dim, 0)
        first = torch.arange(num_heads) * group
        pooled = weight[w.gathered({"kv": first}, axis.sizes).to(weight.device)].clone()
        heads = weight.float()[w.positions("kv", axis.sizes).to(weight.device)]  # [K, entries, ...]
        means = heads.view(num_heads, group, *heads.shape[1:]).mean(1)
        places = w.positions("kv", {"kv": num_heads, "queries": axis.num_heads})
        pooled[places.to(weight.device)] = means.to(weight.dtype)
        result[w.name] = pooled.movedim(0, w.dim).contiguous()
    return result


def keep_experts(weights: Tensors, axis: ExpertsAxis, experts: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of an FFN with only the given experts."""
    kept = experts.sort().values
    sizes = {"experts": axis.size}
    result = {w.name: _take(weights[w.name], w.dim, w.gathered({"experts": kept}, sizes)) for w in axis.weights}
    for prefix in axis.lists:
        for new, old in enumerate(kept.tolist()):
            start = f"{prefix}.{old}."
            result |= {f"{prefix}.{new}.{n.removeprefix(start)}": t for n, t in weights.items() if n.startswith(start)}
    return result


def _gather(weights: Tensors, axis: HeadsAxis, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {w.name: w.taken(weights[w.name], w.gathered(kept, axis.sizes)) for w in axis.weights}


def _take(weight: torch.Tensor, dim: int, entries: torch.Tensor) -> torch.Tensor:
    return weight.index_select(dim, entries.to(weight.device))


def common_module(layer: nn.Module, names: Sequence[str]) -> str:
    """The innermost module that holds all of these weights and is not merely a list of modules."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1 or level[0] == "{}":
            break
        common.append(level[0])
    while common and isinstance(layer.get_submodule(".".join(common)), nn.ModuleList | nn.ModuleDict):
        common.pop()
    return ".".join(common)
