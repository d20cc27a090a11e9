"""The weights of an alternative: slices and means of the parent's, made when they are asked for.

Shapes: H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from layersmith.library.axes import Axis


def narrow_ffn(weights: Mapping[str, torch.Tensor], axis: Axis, channels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The FFN's weights with only the given channels; ``channels`` are used in ascending order."""
    kept = channels.sort().values
    return {w.name: _take(weights[w.name], w.dim, w.entries(kept, axis.size)) for w in axis.weights}


def keep_kv_heads(weights: Mapping[str, torch.Tensor], axis: Axis, heads: torch.Tensor) -> dict[str, torch.Tensor]:
    """The attention's weights with only the given KV heads and the contribution of their query heads.

    The number of query heads is the model's and stays. Each KV head that is left is read by its own query heads and
    by some whose KV head went; what those add to the output is set to zero, so removing a KV head whose query heads
    add nothing changes nothing.
    """
    kept = heads.sort().values
    group, new_group = axis.num_heads // axis.size, axis.num_heads // len(kept)
    own = (kept[:, None] * group + torch.arange(group)).tolist()
    orphans = iter(sorted(set(range(axis.num_heads)) - {h for hs in own for h in hs}))
    order: list[int] = []
    silent: list[int] = []
    for hs in own:
        extra = [next(orphans) for _ in range(new_group - group)]
        silent += range(len(order) + group, len(order) + new_group)
        order += [*hs, *extra]
    result = {w.name: _take(weights[w.name], w.dim, w.entries(kept, axis.size)) for w in axis.weights}
    for w in axis.queries:
        result[w.name] = _take(weights[w.name], w.dim, w.entries(torch.tensor(order), axis.num_heads))
        if w.name == f"{axis.output}.weight":
            result[w.name].index_fill_(
                w.dim, w.entries(torch.tensor(silent, dtype=torch.long), axis.num_heads).to(result[w.name].device), 0
            )
    return result


def pool_kv_heads(weights: Mapping[str, torch.Tensor], axis: Axis, num_heads: int) -> dict[str, torch.Tensor]:
    """The attention's key and value weights with neighbouring KV heads averaged; query heads stay as they are.

    Source: Ainslie et al., "GQA" (arXiv 2305.13245), section 2.1.
    """
    result = {}
    for w in axis.weights:
        weight = weights[w.name].movedim(w.dim, 0)
        rest = weight.shape[1:]
        pooled = weight.float().view(num_heads, axis.size // num_heads, axis.head_dim, *rest).mean(1)
        result[w.name] = pooled.reshape(-1, *rest).movedim(0, w.dim).to(weight.dtype).contiguous()
    return result


def _take(weight: torch.Tensor, dim: int, entries: torch.Tensor) -> torch.Tensor:
    return weight.index_select(dim, entries.to(weight.device))
