"""The weights of an alternative: slices and means of the parent's, made when they are asked for.

Every function takes the tensors of a layer by name and gives those that change. Units that are kept stay in order.

Shapes: H query heads, K key-value heads, E experts, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from layersmith.library.axes.axis import Bundle, ExpertsAxis, HeadsAxis, HeadSizeAxis, StateAxis, WeightAxis, WidthAxis

Tensors = Mapping[str, torch.Tensor]


def narrow(weights: Tensors, axis: WidthAxis, kept: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """An FFN's or experts' weights with only some channels.

    Args:
        weights: of the layer.
        axis: which channels there are.
        kept: for each bundle the channels that stay: ``[channels]``, or ``[members, channels]`` for experts.
    """
    result: dict[str, torch.Tensor] = {}
    for bundle, own in zip(axis.bundles, kept, strict=True):
        ordered = own.sort(-1).values
        sizes = {"channels": bundle.size}
        for w in bundle.weights:
            if not bundle.members:
                result[w.name] = _take(weights[w.name], w.dim, w.gathered({"channels": ordered}, sizes))
                continue
            entries = [w.gathered({"channels": ordered[m]}, sizes) for m in range(bundle.members)]
            if bundle.stacked:
                views = members_of(weights, bundle, w)
                members = [_take(weight, dim, e) for (weight, dim), e in zip(views, entries, strict=True)]
                if not bundle.flat:  # there may be room for more that do nothing
                    members += [_take(idle, w.dim - 1, entries[0]) for idle in weights[w.name][bundle.members :]]
                result[w.name] = torch.cat(members) if bundle.flat else torch.stack(members)
            else:
                result |= {w.name.format(m): _take(weights[w.name.format(m)], w.dim, e) for m, e in enumerate(entries)}
    return result


def members_of(weights: Tensors, bundle: Bundle, w: WeightAxis) -> list[tuple[torch.Tensor, int]]:
    """A bundle's weight, one for each member, and the dimension of each that counts channels; all are views."""
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

    The number of query heads is the model's and stays. Each KV head that is left is read by its own query heads and
    by some whose KV head went; what those add to the output is set to zero, so removing a KV head whose query heads
    add nothing changes nothing.
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
    """Query heads in the order in which they read the KV heads that are left, and places of those that add nothing."""
    group, new_group = axis.num_heads // axis.size, axis.num_heads // len(kept)
    own = query_heads_of(axis, kept).view(len(kept), group).tolist()
    orphans = iter(sorted(set(range(axis.num_heads)) - {h for hs in own for h in hs}))
    order: list[int] = []
    silent: list[int] = []
    for hs in own:
        extra = [next(orphans) for _ in range(new_group - group)]
        silent += range(len(order) + group, len(order) + new_group)
        order += [*hs, *extra]
    return torch.tensor(order), torch.tensor(silent, dtype=torch.long)


def query_heads_of(axis: HeadsAxis, kv_heads: torch.Tensor) -> torch.Tensor:
    """The query heads that read the given KV heads."""
    group = axis.num_heads // axis.size
    return (kv_heads[:, None] * group + torch.arange(group)).flatten()


def keep_groups(weights: Tensors, axis: HeadsAxis, heads: torch.Tensor) -> dict[str, torch.Tensor]:
    """The attention's weights with only the given KV heads and their query heads."""
    kept = heads.sort().values
    return _gather(weights, axis, {"kv": kept, "queries": query_heads_of(axis, kept)})


def keep_query_heads(weights: Tensors, axis: HeadsAxis, heads: torch.Tensor) -> dict[str, torch.Tensor]:
    """The attention's weights with only the given query heads, equally many of every share."""
    return _gather(weights, axis, {"queries": heads.sort().values})


def keep_state(weights: Tensors, axis: StateAxis, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """A mixer's weights with only some numbers of the state."""
    ordered, sizes = kept.sort().values, {"state": axis.size}
    return {w.name: _take(weights[w.name], w.dim, w.gathered({"state": ordered}, sizes)) for w in axis.weights}


def keep_head_size(weights: Tensors, axis: HeadSizeAxis, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """A mixer's weights with only some entries of every head.

    Args:
        weights: of the layer.
        axis: which entries there are.
        kept: ``[H, entries]`` of each head.
    """
    ordered = kept.sort(-1).values
    units = {"channels": channels_of(axis, ordered), "entries": ordered[0]}
    return {w.name: _take(weights[w.name], w.dim, w.gathered(units, axis.sizes)) for w in axis.weights}


def channels_of(axis: HeadSizeAxis, entries: torch.Tensor) -> torch.Tensor:
    """The channels, counted through all heads, that entries ``[H, n]`` of every head are."""
    return (torch.arange(axis.num_heads)[:, None] * axis.size + entries).flatten()


def pool_kv_heads(weights: Tensors, axis: HeadsAxis, num_heads: int) -> dict[str, torch.Tensor]:
    """The attention's key and value weights with neighbouring KV heads averaged; query heads stay as they are.

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
    """The innermost module that holds all of these weights and is more than a list of modules."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for own in zip(*parts, strict=False):
        if len(set(own)) > 1 or own[0] == "{}":
            break
        common.append(own[0])
    while common and isinstance(layer.get_submodule(".".join(common)), nn.ModuleList | nn.ModuleDict):
        common.pop()
    return ".".join(common)
